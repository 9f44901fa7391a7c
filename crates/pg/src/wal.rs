//! What a server that has ended has left in its write-ahead log, as `pg_waldump` reads it.

use std::io::{BufRead, BufReader, Seek};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use model::Lsn;
use model::member::WalTail;

use crate::instance::{Instance, InstanceError, Limit};

/// How long reading the log may take.
const READ_MAX: Duration = Duration::from_secs(60);
/// Lines that are kept of it.
const LINES_MAX: usize = 10_000;
/// Files before a position in which the record is looked for that reaches over it.
const FILES_BEFORE_MAX: usize = 16;
/// All records but those in which anybody who may log in can have any text shown, line breaks and all (`logicalmsg_desc`).
const SHOWN: [&str; 21] = [
    "--rmgr=XLOG",
    "--rmgr=Transaction",
    "--rmgr=Storage",
    "--rmgr=CLOG",
    "--rmgr=Database",
    "--rmgr=Tablespace",
    "--rmgr=MultiXact",
    "--rmgr=RelMap",
    "--rmgr=Standby",
    "--rmgr=Heap2",
    "--rmgr=Heap",
    "--rmgr=Btree",
    "--rmgr=Hash",
    "--rmgr=Gin",
    "--rmgr=Gist",
    "--rmgr=Sequence",
    "--rmgr=SPGist",
    "--rmgr=BRIN",
    "--rmgr=CommitTs",
    "--rmgr=ReplicationOrigin",
    "--rmgr=Generic",
];

/// The last record that could be read is named behind it.
const FAILED_AT: &str = "pg_waldump: error: error in WAL record at ";

/// What the program says.
#[derive(Debug, Default)]
struct Reading {
    tail: WalTail,
    /// The record that was shown last: where it begins, its length, and whether the rest of its segment is left out.
    record: Option<(Lsn, u64, bool)>,
    /// Ends of transactions, the first of them.
    shown: Vec<String>,
}

impl Reading {
    fn read(&mut self, line: &str) {
        let tail = &mut self.tail;
        if let Some((_, rest)) = line.split_once(" lsn: ").filter(|_| line.starts_with("rmgr: ")) {
            let lsn = rest.split(',').next().and_then(Lsn::read);
            tail.last = lsn.max(tail.last);
            let len = line.split_once("len (rec/tot):").and_then(|(_, len)| len.split_once('/'));
            let len = len.and_then(|(_, len)| len.split(',').next()?.trim().parse().ok());
            self.record = lsn.zip(len).map(|(lsn, len)| (lsn, len, rest.contains("desc: SWITCH")));
            if line.contains("rmgr: Transaction") && rest.contains("desc: COMMIT") {
                tail.commits += 1;
            }
            if line.contains("rmgr: Transaction") && self.shown.len() < LINES_MAX {
                self.shown.push(line.to_owned());
            }
        } else if let Some(rest) = line.strip_prefix(FAILED_AT) {
            // The last record that could be read, of whatever kind.
            let lsn = rest.split(':').next().and_then(Lsn::read);
            tail.last = lsn.max(tail.last);
            let end = rest.split_once("invalid record length at ").map(|(_, end)| end);
            tail.end = end.and_then(|end| end.split(':').next()).and_then(Lsn::read);
        }
    }
}

/// Where a record ends: it may go on on further pages, each with its header (`xlog_internal.h`, `xlogrecord.h`).
fn record_end(begin: Lsn, len: u64, segment: u64) -> Lsn {
    const PAGE: u64 = 8 * 1024;
    let (mut at, mut left) = (begin.0, len);
    loop {
        let room = PAGE - at % PAGE;
        if left <= room {
            return Lsn((at + left).next_multiple_of(8));
        }
        at = at.saturating_add(room);
        // That of the first page of a segment is longer.
        at = at.saturating_add(if at.is_multiple_of(segment) { 40 } else { 24 });
        left -= room;
    }
}

impl Instance {
    /// The timeline that the server has written last.
    ///
    /// # Errors
    /// Its log cannot be read.
    pub fn last_timeline(&self) -> Result<u64, InstanceError> {
        let error = |source| {
            let path = self.data_dir.join("pg_wal");
            InstanceError::File { path, what: "read", source }
        };
        let all = segments(&self.data_dir).map_err(error)?;
        let timelines = all.iter().map(|one| one.timeline);
        timelines.max().ok_or_else(|| error(std::io::ErrorKind::NotFound.into()))
    }

    /// What the log of this server, which must have ended, holds from `from` on. Where no record begins there, it is that of the
    /// files before, in which one may begin that is longer.
    ///
    /// # Errors
    /// It cannot be read, which says nothing of what it holds.
    pub(crate) async fn wal_tail(
        &self,
        timeline: u64,
        from: Lsn,
    ) -> Result<(WalTail, Vec<String>), InstanceError> {
        let mut found = self.wal_tail_at(timeline, from).await?;
        let mut all = segments(&self.data_dir).unwrap_or_default();
        all.retain(|one| one.timeline == timeline && one.begin < from);
        all.sort_by_key(|one| std::cmp::Reverse(one.begin));
        for before in all.iter().take(FILES_BEFORE_MAX) {
            if found.0.last.is_some() {
                break;
            }
            found = self.wal_tail_at(timeline, before.begin).await?;
        }
        Ok(found)
    }

    async fn wal_tail_at(
        &self,
        timeline: u64,
        from: Lsn,
    ) -> Result<(WalTail, Vec<String>), InstanceError> {
        let dir = self.data_dir.join("pg_wal");
        let dir = dir.to_str().unwrap_or_default();
        let Some((files, end)) = files_from(&self.data_dir, timeline, from) else {
            let source = std::io::Error::new(
                std::io::ErrorKind::NotFound,
                format!("no file of timeline {timeline} has {from}"),
            );
            return Err(InstanceError::File { path: dir.into(), what: "read", source });
        };
        let start = from.to_string();
        let mut args = vec!["-p", dir, "-s", &start, "-e", &end];
        args.extend(SHOWN);
        args.extend(files.iter().map(String::as_str));
        let (status, mut output) =
            self.run_into_file("pg_waldump", &args, None, Limit::Whole(READ_MAX)).await?;
        let run = |source| InstanceError::Run { program: "pg_waldump".into(), source };
        output.rewind().map_err(run)?;
        let (mut reading, mut is_understood, mut last) = (Reading::default(), false, String::new());
        for line in BufReader::new(output).lines() {
            let line = line.map_err(run)?;
            reading.read(&line);
            // A log that ends with a segment has no next one.
            is_understood |= line.starts_with(FAILED_AT)
                || line.starts_with("pg_waldump: error: could not find a valid record after ")
                || (reading.tail.last.is_some()
                    && line.starts_with("pg_waldump: error: could not find file "));
            last = line;
        }
        // It ends with an error, where no more can be read, or at the end of the files.
        if is_understood || status.success() {
            let segment = segments(&self.data_dir).ok().and_then(|all| {
                let of =
                    all.into_iter().find(|one| reading.tail.last.is_some_and(|at| one.holds(at)));
                of.map(|one| one.end.0 - one.begin.0)
            });
            // Nobody says where a record would begin in a file that is not there, or is another's.
            if let (None, Some((begin, len, is_switch)), Some(segment)) =
                (reading.tail.end, reading.record, segment)
                && reading.tail.last == Some(begin)
            {
                let end = record_end(begin, len, segment);
                let end = if is_switch { end.0.next_multiple_of(segment) } else { end.0 };
                reading.tail.end = Some(Lsn(end));
            }
            return Ok((reading.tail, reading.shown));
        }
        let (program, status) = ("pg_waldump".into(), status.to_string());
        Err(InstanceError::Failed { program, status, output: last })
    }

    /// Copies what the log holds from `from` on to `dir`, for people, with a list of its transactions.
    ///
    /// # Errors
    /// It cannot be read or written.
    pub(crate) async fn keep_wal(
        &self,
        timeline: u64,
        from: Lsn,
        dir: &Path,
    ) -> Result<(), InstanceError> {
        let error = |path: &Path| {
            let path = path.to_owned();
            move |source| InstanceError::File { path, what: "kept", source }
        };
        make_kept_dir(dir).map_err(error(dir))?;
        let all = segments(&self.data_dir).map_err(error(&self.data_dir))?;
        let (tail, shown) = self.wal_tail(timeline, from).await?;
        let end = tail.end.max(tail.last).unwrap_or(from);
        // The one that has `from` in it is wanted, too. Files behind the end are there to be written later, unless they were:
        // what is in front of them may be a bad page.
        let wanted = |one: &&Segment| {
            one.timeline == timeline && one.end > from && (one.begin <= end || one.is_written())
        };
        for one in all.iter().filter(wanted) {
            let to = dir.join(one.name());
            std::fs::copy(&one.path, &to).map_err(error(&to))?;
        }
        let text = shown.join("\n") + "\n";
        let path = dir.join("transactions.txt");
        write_kept(&path, &text).map_err(error(&path))
    }
}

/// A directory for what people are to look at. Nobody else is to read what they have in their tables.
pub(crate) fn make_kept_dir(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

pub(crate) fn create_kept(path: &Path) -> std::io::Result<std::fs::File> {
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).open(path)
}

pub(crate) fn write_kept(path: &Path, text: &str) -> std::io::Result<()> {
    let mut file = create_kept(path)?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    file.sync_all()
}

/// A file of a server's log.
pub(crate) struct Segment {
    path: PathBuf,
    pub(crate) timeline: u64,
    pub(crate) begin: Lsn,
    pub(crate) end: Lsn,
}

impl Segment {
    fn holds(&self, at: Lsn) -> bool {
        (self.begin..self.end).contains(&at)
    }

    /// Its first page is of this place, and not of the one that the file had before (`XLogPageHeaderData`).
    fn is_written(&self) -> bool {
        let mut header = [0; 16];
        let read = std::fs::File::open(&self.path)
            .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut header));
        let [_, _, _, _, _, _, _, _, place @ ..] = header;
        read.is_ok() && u64::from_ne_bytes(place) == self.begin.0
    }

    pub(crate) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }
}

/// The files of a server's log, those of all timelines.
pub(crate) fn segments(data_dir: &Path) -> std::io::Result<Vec<Segment>> {
    let entries = std::fs::read_dir(data_dir.join("pg_wal"))?.flatten();
    Ok(entries
        .filter_map(|entry| {
            let name = entry.file_name();
            let (name, len) = (name.to_str()?, entry.metadata().ok()?.len());
            let end = segment_end(name, len)?;
            let timeline = u64::from_str_radix(name.get(..8)?, 16).ok()?;
            Some(Segment { path: entry.path(), timeline, begin: Lsn(end.0 - len), end })
        })
        .collect())
}

/// The files of a timeline that follow each other from a position on: the first and the last, by which pg_waldump knows how large
/// they are, and where they end, as it waits for five seconds for one that is not there (`search_directory`, `WALDumpOpenSegment`).
pub(crate) fn files_from(
    data_dir: &Path,
    timeline: u64,
    from: Lsn,
) -> Option<([String; 2], String)> {
    let mut all = segments(data_dir).ok()?;
    all.retain(|one| one.timeline == timeline);
    all.sort_by_key(|one| one.begin);
    let at = all.iter().position(|one| one.holds(from))?;
    let first = all.get(at)?;
    let mut last = first;
    for one in all.get(at + 1..)? {
        if one.begin != last.end {
            break;
        }
        last = one;
    }
    Some(([first.name(), last.name()], last.end.to_string()))
}

/// Where the segment with this name ends, if it is one of `len` bytes.
fn segment_end(name: &str, len: u64) -> Option<Lsn> {
    let is_segment = name.len() == 24 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    let part =
        |at: usize| u64::from_str_radix(name.get(at..at + 8)?, 16).ok().filter(|_| is_segment);
    let (high, low) = (part(8)?, part(16)?);
    let begin = (high << 32).checked_add(low.checked_mul(len)?)?;
    Some(Lsn(begin.checked_add(len)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_program_are_read() {
        let mut reading = Reading::default();
        for line in [
            "rmgr: Transaction len (rec/tot):     34/    34, tx:        745, lsn: 0/050001F0, prev 0/050001B0, desc: COMMIT 2026-11-22 10:00:00.000000 UTC",
            "rmgr: Transaction len (rec/tot):     34/    34, tx:        746, lsn: 0/05000250, prev 0/050001B0, desc: ABORT 2026-11-22 10:00:00.000000 UTC",
            "pg_waldump: error: error in WAL record at 0/5000288: invalid record length at 0/50002C0: wanted 24, got 0",
        ] {
            reading.read(line);
        }
        let Reading { tail, record, shown } = reading;
        assert_eq!(record, Some((Lsn::read("0/05000250").unwrap(), 34, false)));
        assert_eq!((tail.commits, tail.last), (1, Lsn::read("0/5000288")));
        assert_eq!(tail.end, Lsn::read("0/50002C0"));
        assert_eq!(shown.len(), 2);
    }

    /// As a server of 15 has written them.
    #[test]
    fn a_record_ends_behind_the_headers_of_its_pages() {
        const SEGMENT: u64 = 16 << 20;
        let end = |begin, len| record_end(Lsn(begin), len, SEGMENT).0;
        assert_eq!(end(0x0500_01f0, 34), 0x0500_0218);
        // It fills its page, or begins on one and goes on on the next two.
        assert_eq!(end(0x0500_1fd0, 48), 0x0500_2000);
        assert_eq!(end(0x0500_1fd0, 56), 0x0500_2000 + 24 + 8);
        assert_eq!(end(0x0500_1ff0, 16 + 8168 + 5), 0x0500_4000 + 24 + 8);
        // The next page is the first of a segment.
        assert_eq!(end(0x05ff_fff0, 24), 0x0600_0000 + 40 + 8);
    }

    #[test]
    fn a_segment_ends_where_the_next_begins() {
        let end = segment_end("000000010000000000000005", 16 << 20);
        assert_eq!(end, Lsn::read("0/6000000"));
        assert_eq!(segment_end("0000000100000002000000FF", 16 << 20), Lsn::read("3/0"));
        assert_eq!(segment_end("00000002.history", 100), None);
    }
}
