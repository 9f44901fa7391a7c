//! A server's programs and its data directory on this machine.
//!
//! PostgreSQL refuses to run as root, so as root everything here runs as the owner of the data directory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Mode, OFlags};
use thiserror::Error;
use tokio::process::Command;
use tokio::time::timeout;

use crate::processes::Places;
use crate::progress::stands_still;

/// Longest file of a server that is read whole.
const FILE_LEN_MAX: u64 = 1024 * 1024;
/// Output of a program that is kept for its error.
const OUTPUT_LEN_MAX: u64 = 8_000;
/// How long a copy may stand still. One that goes on is as long as the server is large. It stands still while a checkpoint
/// of the source is awaited, and while all that was written is flushed.
pub(crate) const STALL_MAX: Duration = Duration::from_secs(30 * 60);
/// The longest that it may take all the same.
const COPY_MAX: Duration = Duration::from_secs(3 * 24 * 3_600);

/// How long a program may take.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Limit {
    Whole(Duration),
    /// Without reading or writing anything.
    Still(Duration),
}

#[derive(Debug, Error)]
pub enum InstanceError {
    #[error("`{program}` is not in `{bin_dir}`")]
    NoProgram { program: &'static str, bin_dir: PathBuf },
    #[error("`{program}` cannot be run")]
    Run { program: String, source: std::io::Error },
    #[error("`{program}` did not end within {limit:?}")]
    Timeout { program: String, limit: Duration },
    #[error("`{program}` neither read nor wrote anything for {limit:?}")]
    Stalled { program: String, limit: Duration },
    #[error("`{program}` ended with {status}: {output}")]
    Failed { program: String, status: String, output: String },
    #[error(
        "process {pid} cannot be seen or ended; Holdfast has to run in the server's PID namespace, as its owner or with the rights to trace and kill (CAP_SYS_PTRACE, CAP_KILL)"
    )]
    Unseen { pid: u32 },
    #[error("`{path}` cannot be {what}")]
    File { path: PathBuf, what: &'static str, source: std::io::Error },
}

/// The uid and gid that programs run as; none to stay who we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunAs {
    pub uid: u32,
    pub gid: u32,
}

/// What the control file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlData {
    pub system_identifier: String,
    /// It is a primary that has ended as it should.
    pub is_shut_down: bool,
}

/// A disk that answers does so at once.
const CONTROL_DATA_MAX: Duration = Duration::from_secs(2);
/// States of a control file (`DBState`).
const SHUT_DOWN: u32 = 1;
const SHUT_DOWN_IN_RECOVERY: u32 = 2;
const IN_ARCHIVE_RECOVERY: u32 = 5;

/// A server that this process may start and stop.
#[derive(Debug, Clone)]
pub struct Instance {
    pub bin_dir: PathBuf,
    pub data_dir: PathBuf,
    pub run_as: Option<RunAs>,
    /// Further options of the server's command line.
    pub options: Vec<String>,
    pub shared: Arc<Shared>,
}

/// What is known to all who speak of one server.
#[derive(Debug, Default)]
pub struct Shared {
    /// Where the data directory is, and where processes of it are still, by what its path led to before.
    pub(crate) places: Mutex<Places>,
    /// Device and number of the program that the postmaster was seen to be.
    pub(crate) program: Mutex<Option<(u64, u64)>>,
    /// Somebody writes `standby.signal`, and the disk may take its time.
    pub(crate) is_writing: AtomicBool,
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}

/// The directory of the newest server programs on this machine: Debian's layout, or what is on the PATH.
pub fn find_bin_dir() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok().into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = versions
        .filter_map(|entry| {
            let major = entry.file_name().to_str()?.parse().ok()?;
            let bin = entry.path().join("bin");
            bin.join("pg_ctl").exists().then_some((major, bin))
        })
        .collect();
    found.sort();
    let on_path = || {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path)
            .find(|dir| dir.join("pg_ctl").exists() && dir.join("initdb").exists())
    };
    found.pop().map(|(_, bin)| bin).or_else(on_path)
}

impl Instance {
    /// A server by its directories. As root its programs run as the owner of the data directory.
    ///
    /// # Errors
    /// The data directory does not exist, and no rejoin has moved it away.
    pub fn of(bin_dir: &Path, data_dir: &Path) -> Result<Instance, InstanceError> {
        let owner = std::fs::metadata(data_dir)
            .or_else(|error| crate::rejoin::what_is_left(data_dir).ok_or(error))
            .map_err(|source| InstanceError::File {
                path: data_dir.to_owned(),
                what: "read",
                source,
            })?;
        let run_as = is_root().then(|| RunAs { uid: owner.uid(), gid: owner.gid() });
        Ok(Instance {
            bin_dir: bin_dir.to_owned(),
            data_dir: data_dir.to_owned(),
            run_as,
            options: Vec::new(),
            shared: Arc::default(),
        })
    }

    /// Whether the distribution has this program; those for embedding have only the server.
    pub fn has(&self, program: &str) -> bool {
        self.bin_dir.join(program).exists()
    }

    /// Runs one of the server's programs to its end.
    ///
    /// # Errors
    /// It is missing, takes longer than `limit`, or fails; then with the end of its output.
    pub async fn run(
        &self,
        program: &'static str,
        args: &[&str],
        limit: Duration,
    ) -> Result<String, InstanceError> {
        self.run_within(program, args, Limit::Whole(limit)).await
    }

    async fn run_within(
        &self,
        program: &'static str,
        args: &[&str],
        limit: Limit,
    ) -> Result<String, InstanceError> {
        let (status, mut output) = self.run_into_file(program, args, None, limit).await?;
        let len = output.metadata().map_or(0, |file| file.len());
        let start = len.saturating_sub(OUTPUT_LEN_MAX);
        let mut text = Vec::new();
        let read = output.seek(SeekFrom::Start(start)).and_then(|_| output.read_to_end(&mut text));
        read.map_err(|source| InstanceError::Run { program: program.into(), source })?;
        let output = String::from_utf8_lossy(&text).trim().to_owned();
        if status.success() {
            return Ok(output);
        }
        let program = format!("{program} {}", args.first().copied().unwrap_or_default());
        Err(InstanceError::Failed { program, status: status.to_string(), output })
    }

    /// The same, with how it ended and all that it has said.
    pub(crate) async fn run_into_file(
        &self,
        program: &'static str,
        args: &[&str],
        input: Option<&[u8]>,
        limit: Limit,
    ) -> Result<(ExitStatus, File), InstanceError> {
        let path = self.bin_dir.join(program);
        if !path.exists() {
            return Err(InstanceError::NoProgram { program, bin_dir: self.bin_dir.clone() });
        }
        let shown = || format!("{program} {}", args.first().copied().unwrap_or_default());
        let mut command = Command::new(path);
        command.args(args).kill_on_drop(true).current_dir("/");
        // libpq's variables of whoever started us have no business here.
        command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C");
        if let Some(RunAs { uid, gid }) = self.run_as {
            command.uid(uid).gid(gid);
        }
        // A server started by pg_ctl would keep a pipe open for ever, so output goes to a file.
        let run = |source| InstanceError::Run { program: shown(), source };
        let output = tempfile::tempfile().map_err(run)?;
        let (out, err) = (output.try_clone().map_err(run)?, output.try_clone().map_err(run)?);
        command.stdout(out).stderr(err).stdin(Stdio::null());
        if let Some(input) = input {
            let mut file = tempfile::tempfile().map_err(run)?;
            file.write_all(input).and_then(|()| file.rewind()).map_err(run)?;
            command.stdin(file);
        }
        let mut child = command.spawn().map_err(run)?;
        let pid = child.id();
        tokio::select! {
            ended = child.wait() => Ok((ended.map_err(run)?, output)),
            error = async {
                match limit {
                    Limit::Whole(limit) => {
                        tokio::time::sleep(limit).await;
                        InstanceError::Timeout { program: shown(), limit }
                    }
                    Limit::Still(limit) => match timeout(COPY_MAX, stands_still(pid, limit)).await {
                        Ok(()) => InstanceError::Stalled { program: shown(), limit },
                        Err(_) => InstanceError::Timeout { program: shown(), limit: COPY_MAX },
                    },
                }
            } => Err(error),
        }
    }

    fn data(&self) -> &str {
        self.data_dir.to_str().unwrap_or_default()
    }

    /// Starts the server and waits until it accepts connections. Nothing happens if it runs.
    ///
    /// # Errors
    /// It does not start within `limit`.
    pub async fn start(&self, limit: Duration) -> Result<(), InstanceError> {
        if self.is_running() {
            return Ok(());
        }
        self.remove_stale_locks();
        if self.is_standby() {
            // Before the server's start, and not in the same second.
            let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let path = self.data_dir.join("standby.signal");
            let file = rustix::fs::open(path, flags, Mode::empty());
            let before = SystemTime::now().checked_sub(Duration::from_secs(2));
            if let (Ok(file), Some(before)) = (file, before) {
                let _ = File::from(file).set_modified(before);
            }
        }
        let log = self.data_dir.join("server.log");
        let seconds = limit.as_secs().max(1).to_string();
        let options = self.options.join(" ");
        let log = log.to_str().unwrap_or_default().to_owned();
        let mut args = vec!["start", "-D", self.data(), "-w", "-t", &seconds, "-l", &log];
        if !options.is_empty() {
            args.extend(["-o", &options]);
        }
        self.run("pg_ctl", &args, limit + Duration::from_secs(5)).await.map(drop)
    }

    /// Stops the server and waits for it: `fast` ends sessions, `immediate` as a crash would.
    ///
    /// # Errors
    /// It does not stop within `limit`.
    pub async fn stop(&self, mode: &str, limit: Duration) -> Result<(), InstanceError> {
        if !self.is_running() {
            return Ok(());
        }
        let seconds = limit.as_secs().max(1).to_string();
        let args = ["stop", "-D", self.data(), "-w", "-t", &seconds, "-m", mode];
        self.run("pg_ctl", &args, limit + Duration::from_secs(5)).await.map(drop)
    }

    pub fn is_running(&self) -> bool {
        self.pid().is_some()
    }

    /// A standby whose process is gone, and which was not shut down.
    pub fn is_crashed_standby(&self) -> bool {
        let is_recovering = self.state() == Some(IN_ARCHIVE_RECOVERY) || self.is_fresh_copy();
        is_recovering && self.is_standby() && !self.is_running()
    }

    /// A copy that was made to be a standby and has not come to recover: it says of itself what the other was.
    pub fn is_fresh_copy(&self) -> bool {
        let auto = std::fs::read_to_string(self.data_dir.join("postgresql.auto.conf"));
        let is_told = auto.is_ok_and(|text| {
            text.lines().any(|line| line.trim_start().starts_with("primary_conninfo"))
        });
        is_told && self.data_dir.join("backup_label").exists()
    }

    /// The system's identifier and the state of the server, as the control file says, whose beginning is the same from 15 to 18
    /// (`ControlFileData`, `DBState`).
    fn control_file(&self) -> std::io::Result<(u64, u32)> {
        let (mut system, mut versions, mut state) = ([0; 8], [0; 8], [0; 4]);
        let mut control = File::open(self.data_dir.join("global/pg_control"))?;
        control.read_exact(&mut system)?;
        control.read_exact(&mut versions)?;
        control.read_exact(&mut state)?;
        Ok((u64::from_ne_bytes(system), u32::from_ne_bytes(state)))
    }

    fn state(&self) -> Option<u32> {
        self.control_file().ok().map(|(_, state)| state)
    }

    /// Whether what runs here, if anything does, may take writes: only what is known to be a standby does not. As the control
    /// file says.
    pub fn may_take_writes(&self) -> bool {
        /// A standby that was copied from a primary, or was one, says so for a moment after its start.
        const STANDBY_START_MAX: Duration = Duration::from_secs(5);
        /// How long a server that has no `postmaster.pid` may take to write it.
        const BEGIN_LOOKS: usize = 5;
        const BEGIN_PAUSE: Duration = Duration::from_millis(20);
        if self.data_dir.metadata().is_err() {
            // Moved away for a rejoin; else nobody knows what has become of it, and its server works on.
            return crate::rejoin::what_is_left(&self.data_dir).is_none() && self.is_at_work();
        }
        if matches!(self.state(), Some(SHUT_DOWN_IN_RECOVERY | IN_ARCHIVE_RECOVERY)) {
            return false;
        }
        let changed =
            |name: &str| self.data_dir.join(name).metadata().and_then(|file| file.modified()).ok();
        let Some(signal) = changed("standby.signal") else { return true };
        // One that was there when the server was started is taken away before it takes writes (`StartupXLOG`); one that
        // came later means nothing to it.
        let started = self.lock_file().and_then(|lock| lock.started);
        if started.is_some_and(|started| signal < started) {
            return false;
        }
        let mut written = changed("postmaster.pid");
        for _ in 0..BEGIN_LOOKS {
            // One that is at work has written it, or is about to (`PostmasterMain` changes directory first).
            if written.is_some() || !self.is_at_work() {
                break;
            }
            std::thread::sleep(BEGIN_PAUSE);
            written = changed("postmaster.pid");
        }
        let age = written.and_then(|written| written.elapsed().ok());
        age.is_none_or(|age| age >= STANDBY_START_MAX)
    }

    /// Makes a new data directory.
    ///
    /// # Errors
    /// initdb fails.
    pub async fn init(&self, superuser: &str) -> Result<(), InstanceError> {
        let args = [
            "-D",
            self.data(),
            "-U",
            superuser,
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--data-checksums",
        ];
        self.run("initdb", &args, Duration::from_secs(120)).await.map(drop)
    }

    /// Copies a running server as a standby of it.
    ///
    /// # Errors
    /// pg_basebackup fails.
    pub async fn clone_from(&self, primary_conninfo: &str) -> Result<(), InstanceError> {
        let args = ["-D", self.data(), "-d", primary_conninfo, "-R", "-X", "stream", "-c", "fast"];
        self.run_within("pg_basebackup", &args, Limit::Still(STALL_MAX)).await.map(drop)
    }

    /// Takes back what was written after the histories parted. The server's own files become those of the source.
    ///
    /// # Errors
    /// pg_rewind fails; then the directory may be unusable and must be copied anew.
    pub async fn rewind(&self, source_conninfo: &str) -> Result<String, InstanceError> {
        let args = ["-D", self.data(), "--source-server", source_conninfo];
        self.run_within("pg_rewind", &args, Limit::Still(STALL_MAX)).await
    }

    /// Whoever starts the server from now on starts a standby, which takes no writes, unless [`Instance::may_be_primary`]
    /// was called.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn must_be_standby(&self) -> Result<(), InstanceError> {
        self.write(&self.data_dir.join("standby.signal"), b"")
    }

    /// Its next start, or the last one, is that of a standby.
    pub fn is_standby(&self) -> bool {
        self.data_dir.join("standby.signal").exists()
    }

    /// Takes [`Instance::must_be_standby`] back.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn may_be_primary(&self) -> Result<(), InstanceError> {
        let path = self.data_dir.join("standby.signal");
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(InstanceError::File { path, what: "removed", source })
            }
            _ => Ok(()),
        }
    }

    /// What the control file of the server says, whether it runs or not.
    ///
    /// # Errors
    /// It cannot be read, or not in time.
    pub async fn control_data(&self) -> Result<ControlData, InstanceError> {
        let instance = self.clone();
        let read = tokio::task::spawn_blocking(move || instance.control_file());
        let error = |source| InstanceError::File {
            path: self.data_dir.join("global/pg_control"),
            what: "read",
            source,
        };
        let late = |_| error(std::io::ErrorKind::TimedOut.into());
        let read = timeout(CONTROL_DATA_MAX, read).await.map_err(late)?;
        let read = read.unwrap_or_else(|panic| Err(std::io::Error::other(panic)));
        let (system, state) = read.map_err(error)?;
        Ok(ControlData { system_identifier: system.to_string(), is_shut_down: state == SHUT_DOWN })
    }

    /// Tells the server to be a standby of `primary_conninfo` from its next start.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn make_standby(&self, primary_conninfo: &str) -> Result<(), InstanceError> {
        let auto = self.data_dir.join("postgresql.auto.conf");
        let text = std::fs::read_to_string(&auto).unwrap_or_default();
        let kept = text.lines().filter(|line| {
            let name = line.split('=').next().unwrap_or_default().trim();
            // A slot that the primary does not have would keep it from streaming.
            let goes = ["primary_conninfo", "primary_slot_name", "default_transaction_read_only"];
            !goes.contains(&name)
        });
        let mut text: String = kept.map(|line| format!("{line}\n")).collect();
        let quoted = primary_conninfo.replace('\'', "''");
        text.push_str(&format!("primary_conninfo = '{quoted}'\n"));
        self.write(&auto, text.as_bytes())?;
        self.write(&self.data_dir.join("standby.signal"), b"")
    }

    /// Replaces a file as a whole, durably, owned by the server's user, where that user could do so.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), InstanceError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let error = |source| InstanceError::File { path: path.to_owned(), what: "written", source };
        let io = |source: rustix::io::Errno| error(source.into());
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(error(std::io::ErrorKind::InvalidInput.into()));
        };
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(parent, flags, Mode::empty()).map_err(io)?;
        self.check_right(&dir, 2).map_err(error)?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let temporary = format!(".{}.{}-{number}.new", name.to_string_lossy(), std::process::id());
        // Of a crash, by somebody of the same number.
        let _ = rustix::fs::unlinkat(&dir, &temporary, AtFlags::empty());
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&dir, &temporary, flags, Mode::RUSR | Mode::WUSR);
        let mut file = File::from(file.map_err(io)?);
        let written = file.write_all(bytes).and_then(|()| match self.run_as {
            Some(RunAs { uid, gid }) => std::os::unix::fs::fchown(&file, Some(uid), Some(gid)),
            None => Ok(()),
        });
        let written = written.and_then(|()| file.sync_all());
        let named = written.and_then(|()| Ok(rustix::fs::renameat(&dir, &temporary, &dir, name)?));
        if named.is_err() {
            let _ = rustix::fs::unlinkat(&dir, &temporary, AtFlags::empty());
        }
        named.and_then(|()| File::from(dir).sync_all()).map_err(error)
    }

    /// Reads a file that the server's user may read.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read_own(&self, path: &Path) -> Result<Vec<u8>, InstanceError> {
        let mut bytes = Vec::new();
        let read = self.open_own(path)?.take(FILE_LEN_MAX).read_to_end(&mut bytes);
        read.map_err(|source| InstanceError::File { path: path.to_owned(), what: "read", source })?;
        Ok(bytes)
    }

    pub(crate) fn open_own(&self, path: &Path) -> Result<File, InstanceError> {
        let error = |source| InstanceError::File { path: path.to_owned(), what: "read", source };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(path, flags, Mode::empty());
        let file = file.map_err(|source| error(source.into()))?;
        self.check_right(&file, 4).map_err(error)?;
        Ok(File::from(file))
    }

    /// Makes a directory of ours the server's user's.
    ///
    /// # Errors
    /// It cannot be, or it is a link.
    pub(crate) fn own_dir(&self, path: &Path) -> Result<(), InstanceError> {
        let error = |source| InstanceError::File { path: path.to_owned(), what: "owned", source };
        let Some(RunAs { uid, gid }) = self.run_as else { return Ok(()) };
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty());
        let dir = dir.map_err(|source| error(source.into()))?;
        std::os::unix::fs::fchown(&dir, Some(uid), Some(gid)).map_err(error)
    }

    /// The server's user may do so himself: our rights are not lent to him. `right` is 4 to read and 2 to write.
    fn check_right(&self, fd: &OwnedFd, right: u32) -> std::io::Result<()> {
        let Some(RunAs { uid, gid }) = self.run_as else { return Ok(()) };
        let found = rustix::fs::fstat(fd)?;
        let bits = match (found.st_uid == uid, found.st_gid == gid) {
            (true, _) => found.st_mode >> 6,
            (false, true) => found.st_mode >> 3,
            (false, false) => found.st_mode,
        };
        if bits & right != 0 {
            return Ok(());
        }
        let text = format!("the server's user, {uid}, may not do so");
        Err(std::io::Error::new(std::io::ErrorKind::PermissionDenied, text))
    }
}
