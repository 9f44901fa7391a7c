//! Why a session cannot be moved, in words that a person can act on.

use serde::{Deserialize, Serialize};

/// One reason that holds a session on its server. The text names what is held and what would let it go.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "pin", content = "what")]
pub enum Pin {
    /// Server base backup started by the session (`pg_backup_start`).
    BackupMode { statement: String },
    /// Custom settings whose names are computed, so that they cannot be listed.
    CustomSettings { statement: String },
    /// dblink connections live in the server process.
    Dblink { statement: String },
    /// A setting could not be given its value on the other server, or does not agree there.
    Differs { what: String, here: String, there: String },
    /// A cursor WITH HOLD that cannot be opened again.
    HoldCursor { name: String, why: String },
    /// A library loaded by LOAD that may hold more than settings; its name, or the statement.
    Library { name: String },
    /// Advisory locks, which somebody else could take between the old server and the new.
    Locks { held: usize },
    /// The server answered what was not asked.
    OutOfStep,
    /// A prepared statement whose text cannot be prepared again by itself.
    Prepared { name: String, why: String },
    /// A statement that the other server refuses.
    Refused { what: String, error: String },
    /// A walsender connection.
    Replication,
    /// The session acts for a replication origin.
    ReplicationOrigin,
    /// `setseed`: the generator's state cannot be read.
    Seed { statement: String },
    /// `currval` and `lastval` have values that cannot be given to another session.
    Sequences { why: String },
    /// A language that keeps state between calls in its interpreter is in use in the database.
    StatefulLanguage { language: String },
    /// Something temporary that cannot be made again.
    Temporary { what: String },
    /// A temporary replication slot.
    TemporarySlot { slot: String },
    /// The state is larger than its limit.
    TooLarge { what: String, size: u64, max: u64 },
    /// The session has settings that nobody named.
    UnnamedSettings { bytes: i64 },
    /// An earlier unnamed statement lives on whose text is no longer known.
    Unnamed,
}

impl Pin {
    /// A word for metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Pin::BackupMode { .. } => "backup_mode",
            Pin::CustomSettings { .. } => "custom_settings",
            Pin::Dblink { .. } => "dblink",
            Pin::Differs { .. } => "differs",
            Pin::HoldCursor { .. } => "hold_cursor",
            Pin::Library { .. } => "library",
            Pin::Locks { .. } => "locks",
            Pin::OutOfStep => "out_of_step",
            Pin::Prepared { .. } => "prepared",
            Pin::Refused { .. } => "refused",
            Pin::Replication => "replication",
            Pin::ReplicationOrigin => "replication_origin",
            Pin::Seed { .. } => "seed",
            Pin::Sequences { .. } => "sequences",
            Pin::StatefulLanguage { .. } => "stateful_language",
            Pin::Temporary { .. } => "temporary",
            Pin::TemporarySlot { .. } => "temporary_slot",
            Pin::TooLarge { .. } => "too_large",
            Pin::UnnamedSettings { .. } => "unnamed_settings",
            Pin::Unnamed => "unnamed",
        }
    }
}

impl std::fmt::Display for Pin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Pin::BackupMode { statement } => {
                write!(
                    f,
                    "a base backup is under way since `{statement}`; it ends with pg_backup_stop"
                )
            }
            Pin::CustomSettings { statement } => {
                write!(
                    f,
                    "`{statement}` computes the name of a setting, so it cannot be found again"
                )
            }
            Pin::Dblink { statement } => {
                write!(f, "`{statement}` may have opened a dblink connection inside the server")
            }
            Pin::Differs { what, here, there } => {
                write!(f, "{what} is `{here}` here and `{there}` on the other server")
            }
            Pin::HoldCursor { name, why } => {
                write!(f, "cursor `{name}` is open WITH HOLD, and {why}; CLOSE it")
            }
            Pin::Library { name } => write!(f, "a library was loaded by LOAD: {name}"),
            Pin::Locks { held } => write!(
                f,
                "{held} advisory locks are held, which others could take in between; a switchover moves them"
            ),
            Pin::OutOfStep => write!(f, "the server answered what was not asked"),
            Pin::Prepared { name, why } => write!(f, "prepared statement `{name}` {why}"),
            Pin::Refused { what, error } => {
                write!(f, "{what} is refused by the other server: {error}")
            }
            Pin::Replication => write!(f, "it is a replication connection"),
            Pin::ReplicationOrigin => write!(f, "a replication origin is set up"),
            Pin::Seed { statement } => write!(f, "`{statement}` may have set the random seed"),
            Pin::Sequences { why } => {
                write!(
                    f,
                    "currval and lastval have values that cannot be restored: {why}; DISCARD SEQUENCES forgets them"
                )
            }
            Pin::StatefulLanguage { language } => {
                write!(f, "functions in `{language}` may keep state inside the server")
            }
            Pin::Temporary { what } => {
                write!(f, "temporary objects cannot be made again: {what}; DISCARD TEMP drops them")
            }
            Pin::TemporarySlot { slot } => write!(f, "temporary replication slot `{slot}`"),
            Pin::TooLarge { what, size, max } => {
                write!(f, "{what} is {size} large, at most {max} are moved")
            }
            Pin::UnnamedSettings { bytes } => write!(
                f,
                "{bytes} bytes of custom settings have names that are in no statement and no catalog"
            ),
            Pin::Unnamed => {
                write!(f, "the text of the unnamed statement is not known after an error")
            }
        }
    }
}
