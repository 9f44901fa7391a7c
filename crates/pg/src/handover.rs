//! Log of a server that has ended, handed over to a standby on another host, piece by piece. There it stands beside the data
//! directory, for `restore_command` to read.
//!
//! Pieces come from another process, so names, lengths and places are checked, and nothing is written through a link: whoever owns
//! the directory above may not use our rights.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use model::Lsn;
use model::member::{LogFile, PIECE_LEN, Piece};
use rustix::fs::{Mode, OFlags};

use crate::instance::{Instance, RunAs};
use crate::rejoin::beside;
use crate::wal::segments;

/// The largest segment (`WalSegMaxSize`).
const FILE_LEN_MAX: u64 = 1 << 30;
/// Files that are handed over: an hour of log on most servers.
const FILES_MAX: usize = 1024;
/// What the disk of a server that takes files keeps free.
const FREE_MIN: u64 = 256 << 20;
/// What stands behind the last record on its page is not written out alone.
const PAGE: u64 = 8 * 1024;
/// Longest history of timelines.
const HISTORY_LEN_MAX: u64 = 1 << 20;

/// A file of a server's log by its name, and none beside it.
fn check_name(name: &str) -> Result<(), String> {
    let is_hex = |text: &str| {
        text.bytes().all(|byte| byte.is_ascii_digit() || (b'A'..=b'F').contains(&byte))
    };
    let is_one = match name.strip_suffix(".history") {
        Some(timeline) => timeline.len() == 8 && is_hex(timeline),
        None => name.len() == 24 && is_hex(name),
    };
    is_one.then_some(()).ok_or_else(|| format!("`{}` is no file of a log", name.escape_default()))
}

impl Instance {
    /// Files that whoever has replayed up to `from` needs to replay up to `to`, on a timeline that `timeline` came from.
    pub(crate) fn list_log(
        &self,
        timeline: u64,
        from: Lsn,
        to: Lsn,
    ) -> Result<Vec<LogFile>, String> {
        let dir = self.data_dir.join("pg_wal");
        let io = |error: std::io::Error| format!("`{}`: {error}", dir.display());
        let all = segments(&self.data_dir).map_err(io)?;
        let wanted =
            all.iter().filter(|one| one.timeline <= timeline && one.end > from && one.begin <= to);
        let mut files: Vec<LogFile> = wanted
            .map(|one| {
                let (len, used) = (one.end.0 - one.begin.0, to.0.saturating_sub(one.begin.0));
                let used = used.saturating_add(PAGE).min(len);
                LogFile { name: one.name(), len, used }
            })
            .collect();
        for entry in std::fs::read_dir(&dir).map_err(io)?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let of = name.strip_suffix(".history").and_then(|of| u64::from_str_radix(of, 16).ok());
            if check_name(&name).is_ok() && of.is_some_and(|of| of <= timeline) {
                let len = entry.metadata().map_err(io)?.len();
                files.push(LogFile { name, len, used: len });
            }
        }
        if files.len() > FILES_MAX {
            return Err(format!(
                "{} files would have to be read, at most {FILES_MAX} are",
                files.len()
            ));
        }
        Ok(files)
    }

    /// Gives up to [`PIECE_LEN`] bytes of a file.
    pub(crate) fn read_log(&self, name: &str, offset: u64) -> Result<String, String> {
        check_name(name)?;
        let path = self.data_dir.join("pg_wal").join(name);
        let file = self.open_own(&path).map_err(|error| model::chain(&error))?;
        let io = |error: std::io::Error| format!("`{}`: {error}", path.display());
        std::io::Seek::seek(&mut &file, std::io::SeekFrom::Start(offset)).map_err(io)?;
        let mut bytes = Vec::new();
        (&file).take(PIECE_LEN).read_to_end(&mut bytes).map_err(io)?;
        Ok(STANDARD.encode(bytes))
    }

    /// Puts a piece of a file where a standby can read it. Gives the directory.
    pub(crate) fn stage_log(&self, piece: &Piece) -> Result<PathBuf, String> {
        let Piece { name, offset, len, base64 } = piece;
        check_name(name)?;
        let limit = if name.ends_with(".history") { HISTORY_LEN_MAX } else { FILE_LEN_MAX };
        let bytes = STANDARD.decode(base64).map_err(|error| format!("`{name}`: {error}"))?;
        let end = offset.checked_add(bytes.len() as u64).filter(|end| end <= len && *len <= limit);
        if end.is_none() {
            return Err(format!(
                "a piece of `{name}` of {} bytes at {offset} is not within {len} bytes",
                bytes.len()
            ));
        }
        let path = beside(&self.data_dir, "wal");
        let io = |error: std::io::Error| format!("`{}`: {error}", path.display());
        let dir = self.staging(&path).map_err(io)?;
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            rustix::fs::openat(&dir, name.as_str(), flags, Mode::RUSR | Mode::WUSR | Mode::RGRP);
        let file = File::from(file.map_err(|error| io(error.into()))?);
        self.lend(&file).map_err(io)?;
        if file.metadata().map_err(io)?.len() != *len {
            // A disk that is full would end the server that is to take the place.
            let disk = rustix::fs::fstatvfs(&dir).map_err(|error| io(error.into()))?;
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            if free.saturating_sub(*len) < FREE_MIN {
                return Err(format!(
                    "`{}` has {free} bytes free, and `{name}` of {len} would leave less than {FREE_MIN}",
                    path.display()
                ));
            }
            // What no piece is of, is zeros: behind the last record.
            file.set_len(*len).map_err(io)?;
        }
        file.write_all_at(&bytes, *offset).map_err(io)?;
        Ok(path)
    }

    /// Removes what was handed over.
    pub(crate) fn unstage_log(&self) -> Result<(), String> {
        let path = beside(&self.data_dir, "wal");
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(format!("`{}`: {error}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// A directory of ours, which the server's user may read.
    fn staging(&self, path: &Path) -> std::io::Result<File> {
        match std::fs::DirBuilder::new().mode(0o750).create(path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => return Err(error),
            _ => (),
        }
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        if dir.metadata()?.uid() != rustix::process::geteuid().as_raw() {
            let text = "it is somebody else's";
            return Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, text));
        }
        self.lend(&dir)?;
        Ok(dir)
    }

    /// For the server's user to read.
    fn lend(&self, file: &File) -> std::io::Result<()> {
        match self.run_as {
            Some(RunAs { gid, .. }) => std::os::unix::fs::fchown(file, None, Some(gid)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn instance(dir: &Path) -> Instance {
        Instance {
            bin_dir: dir.to_owned(),
            data_dir: dir.join("data"),
            run_as: None,
            options: Vec::new(),
            shared: Default::default(),
        }
    }

    fn piece(name: &str, offset: u64, len: u64, bytes: &[u8]) -> Piece {
        Piece { name: name.into(), offset, len, base64: STANDARD.encode(bytes) }
    }

    #[test]
    fn nothing_but_files_of_a_log_is_read_or_written() {
        let dir = tempfile::tempdir().unwrap();
        let instance = instance(dir.path());
        for name in [
            "",
            "../data",
            "postgresql.conf",
            "00000001.history/..",
            "0000000100000000000000aa",
            "/etc/passwd",
        ] {
            assert!(instance.read_log(name, 0).unwrap_err().contains("no file of a log"), "{name}");
            let error = instance.stage_log(&piece(name, 0, 1, b"x")).unwrap_err();
            assert!(error.contains("no file of a log"), "{error}");
        }
        let name = "000000010000000000000001";
        for (offset, len) in [(0, 1), (2, 3), (u64::MAX, 2), (0, 2 << 30)] {
            let error = instance.stage_log(&piece(name, offset, len, b"xy")).unwrap_err();
            assert!(error.contains("is not within"), "{error}");
        }
        assert!(!dir.path().join("data.holdfast-wal").exists());
    }

    #[test]
    fn pieces_make_a_file_and_nothing_goes_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let instance = instance(dir.path());
        let name = "000000010000000000000001";
        let at = instance.stage_log(&piece(name, 2, 6, b"cd")).unwrap();
        instance.stage_log(&piece(name, 0, 6, b"ab")).unwrap();
        assert_eq!(std::fs::read(at.join(name)).unwrap(), b"abcd\0\0");
        instance.unstage_log().unwrap();
        instance.unstage_log().unwrap();
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "whole").unwrap();
        std::fs::create_dir(&at).unwrap();
        std::os::unix::fs::symlink(&victim, at.join(name)).unwrap();
        instance.stage_log(&piece(name, 0, 2, b"xy")).unwrap_err();
        std::fs::remove_dir_all(&at).unwrap();
        std::os::unix::fs::symlink(dir.path(), &at).unwrap();
        instance.stage_log(&piece(name, 0, 2, b"xy")).unwrap_err();
        instance.unstage_log().unwrap();
        assert_eq!(std::fs::read(&victim).unwrap(), b"whole");
    }
}
