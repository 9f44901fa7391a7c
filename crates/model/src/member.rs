//! What is asked of whoever has a server's programs and files at hand: this process, or an agent beside the server.
//! Everything here may be asked twice.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Lsn;
use crate::failover::Process;

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

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Answered by [`Done::Condition`].
    Look,
    /// Ends every process of the server, and has whoever starts it again start a standby. Answered by [`Done::Ended`].
    Isolate,
    /// Starts what was isolated as the primary that it was.
    StartAgain,
    /// Whether `pg_hba.conf` was replaced. Answered by [`Done::Flag`].
    AreLoginsClosed { hba_file: PathBuf },
    /// Replaces `pg_hba.conf`, and keeps what it was.
    CloseLogins { hba_file: PathBuf, rules: String },
    /// Puts `pg_hba.conf` back, if it was replaced.
    OpenLogins { hba_file: PathBuf },
    /// Makes the server a standby of another, which is on `timeline`. What only it has may go if that `is_kept`. Answered by
    /// [`Done::Text`].
    Rejoin { conninfo: String, timeline: Option<u64>, hba_file: Option<PathBuf>, is_kept: bool },
    /// What the log of the server, which has ended, holds. Answered by [`Done::Tail`].
    ReadTail { timeline: u64, from: Lsn },
    /// Copies that for people, under a name. Answered by [`Done::Text`]: where.
    KeepTail { timeline: u64, from: Lsn, name: String },
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
}
