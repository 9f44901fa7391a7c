//! What is asked of whoever has a server's programs and files at hand: this process, or an agent beside the server.
//! Everything here may be asked twice.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Lsn;
use crate::failover::Process;
use crate::lost::{LostRows, Tail};

/// What the files of a server say, whether it runs or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    pub process: Process,
    /// None if its control file cannot be read.
    pub system_identifier: Option<String>,
    /// The timeline that it has written last. None if its log cannot be read.
    pub timeline: Option<u64>,
    /// A rejoin was broken off: of what it had, nothing can be told any more.
    pub is_rejoining: bool,
    /// `pg_waldump` is there.
    pub reads_wal: bool,
}

/// Whole records behind some position of a log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalTail {
    /// Where the last one begins. None if there is none.
    pub last: Option<Lsn>,
    /// Where the next would begin, if that is told.
    pub end: Option<Lsn>,
    /// Commits among them.
    pub commits: u64,
}

impl WalTail {
    /// The log goes up to `seen`, which a server had written out, or had received.
    pub fn reaches(&self, seen: Lsn) -> bool {
        /// Whole pages are written out and sent, also of a record that has not ended (`XLOG_BLCKSZ`, `XLogSendPhysical`).
        const PAGE: u64 = 8 * 1024;
        const RECORD_MAX: u64 = 1024 * 1024;
        /// Of a last record of which it is not told where it ends.
        const RECORD: u64 = 64 * 1024;
        match (self.end, self.last) {
            (Some(end), _) if seen.0.is_multiple_of(PAGE) => seen.bytes_since(end) <= RECORD_MAX,
            (Some(end), _) => end >= seen,
            (None, Some(last)) => seen.bytes_since(last) <= RECORD,
            (None, None) => false,
        }
    }
}

/// As many bytes of a log are handed over at once.
pub const PIECE_LEN: u64 = 512 * 1024;

/// A file of a server's log. What is not `used` of its bytes is nobody's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogFile {
    pub name: String,
    pub len: u64,
    pub used: u64,
}

/// Bytes of such a file, which will be `len` bytes long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    pub name: String,
    pub offset: u64,
    pub len: u64,
    pub base64: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Answered by [`Done::Condition`].
    Look,
    /// Ends every process of the server, and has whoever starts it again start a standby. Answered by [`Done::Ended`].
    Isolate,
    /// Starts what was isolated as the primary that it was.
    StartAgain,
    /// Starts the server as a standby, if it does not run.
    StartStandby,
    /// Whether `pg_hba.conf` was replaced. Answered by [`Done::Flag`].
    AreLoginsClosed {
        hba_file: PathBuf,
    },
    /// Replaces `pg_hba.conf`, and keeps what it was.
    CloseLogins {
        hba_file: PathBuf,
        rules: String,
    },
    /// Puts `pg_hba.conf` back, if it was replaced.
    OpenLogins {
        hba_file: PathBuf,
    },
    /// Makes the server a standby of another, which is on `timeline`. What only it has may go if that `is_kept`. Answered by
    /// [`Done::Text`].
    ///
    /// `standby_conninfo` names the cell, so that commits can wait for it: whoever only copies must not have that name.
    Rejoin {
        conninfo: String,
        standby_conninfo: String,
        timeline: Option<u64>,
        hba_file: Option<PathBuf>,
        is_kept: bool,
        /// Rows that only it has are kept beside its log. Then answered by [`Done::Rejoined`], if that could be tried.
        #[serde(default)]
        tail: Option<Tail>,
    },
    /// What the log of the server, which has ended, holds. Answered by [`Done::Tail`].
    ReadTail {
        timeline: u64,
        from: Lsn,
    },
    /// Copies that for people, under a name. Answered by [`Done::Text`]: where.
    KeepTail(Tail),
    /// Which files of its log a standby needs that has replayed up to `from`, and is to replay up to `to`. Answered by
    /// [`Done::LogFiles`].
    ListLog {
        timeline: u64,
        from: Lsn,
        to: Lsn,
    },
    /// [`PIECE_LEN`] bytes of one. Answered by [`Done::Text`], in base64.
    ReadLog {
        name: String,
        offset: u64,
    },
    /// Puts them where this server can read them. Answered by [`Done::Text`]: the directory.
    StageLog(Piece),
    UnstageLog,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Done {
    Nothing,
    Condition(Condition),
    Ended(usize),
    Flag(bool),
    Text(String),
    Tail(WalTail),
    LogFiles(Vec<LogFile>),
    /// How, and what only it had, or why that is not known.
    Rejoined {
        how: String,
        rows: Result<LostRows, String>,
    },
    /// No pledge holds any more; the last one has ended so long ago.
    PledgesOver(std::time::Duration),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_older_copy_does_not_reach_what_was_seen() {
        let tail = |last, end| WalTail { last: Some(Lsn(last)), end, commits: 0 };
        let seen = Lsn(0x30_0100);
        assert!(tail(0x30_00c0, Some(seen)).reaches(seen));
        assert!(!tail(0x30_0080, Some(Lsn(0x30_00c0))).reaches(seen));
        // Written out up to the end of a page, within a record.
        assert!(tail(0x2f_ff00, Some(Lsn(0x2f_ff80))).reaches(Lsn(0x30_0000)));
        assert!(!tail(0x1f_ff00, Some(Lsn(0x1f_ff80))).reaches(Lsn(0x30_0000)));
        assert!(tail(0x30_00c0, None).reaches(seen));
        assert!(!tail(0x20_00c0, None).reaches(seen));
        assert!(!WalTail::default().reaches(seen));
    }
}
