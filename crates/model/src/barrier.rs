//! What control asks of proxies during a change, and what they answer. Plain data: they may be far apart.

use serde::{Deserialize, Serialize};

use crate::cell::{CellState, Epoch};
use crate::session::Pin;
use crate::switchover::OnTimeout;

/// A session in the lists that people read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedSession {
    pub id: u64,
    pub user: String,
    pub database: String,
    pub application_name: String,
}

/// A session and why it cannot be moved now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    pub session: NamedSession,
    pub reasons: Vec<Reason>,
}

/// Why a session cannot be moved now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    Pinned(Pin),
    /// A transaction or a request has not ended.
    Busy {
        what: String,
    },
    /// Its state could not be read, or not be restored.
    Failed {
        error: String,
    },
    /// Its server connection ended while it was held. There is nothing left to move.
    ServerLost {
        error: String,
    },
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::Pinned(pin) => pin.fmt(f),
            Reason::Busy { what } => f.write_str(what),
            Reason::Failed { error } => f.write_str(error),
            Reason::ServerLost { error } => {
                write!(f, "its server connection ended while it was held: {error}")
            }
        }
    }
}

/// One thing asked of a proxy. Each is answered by one [`Report`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Attach every session to `to` beforehand, beside its server, while its client goes on.
    Prepare { app: String, to: String },
    /// Only look: who would be pinned?
    Inspect { app: String },
    /// Hold every session at its next safe point, until `deadline_ms` from now. Those that are busy then are
    /// ended with an error if `on_timeout` says so.
    Hold { app: String, deadline_ms: u64, on_timeout: OnTimeout },
    /// Name the servers' backends of held sessions; whoever else is connected is an outsider.
    Backends { app: String },
    /// Read the state of every held session, and see to it that `to`, still a standby, has a copy of each. Those
    /// that cannot be moved are told if `on_timeout` says so.
    Capture { app: String, to: String, on_timeout: OnTimeout },
    /// Begin to hear what the fenced server still has for held sessions: how often each holds its locks, and
    /// notifications. `Attach` and `Release` wait for the end of it.
    HearOut { app: String },
    /// Attach those held sessions to `to` that others can see, as they hold locks or listen, and prove that they are the
    /// same. They stay held until all such stand there, of whichever proxy: what they have is nobody else's.
    AttachFirst { app: String, to: String },
    /// Let those go on, attach all others, and let each go on as soon as it stands there.
    Attach { app: String, to: String },
    /// Let every held session go on, and new logins to `to`, which is in this state and epoch from now on.
    Release { app: String, to: String, state: CellState, epoch: Epoch },
    /// The server that sessions stand on is lost: take every session from it, and let new work wait. Those that have
    /// something there that is nowhere else are told and ended.
    Cut { app: String },
    /// Tell and end every held session: there is no server for them, and no telling when there will be.
    GiveUp { app: String },
    /// Move one session, or all, to a fresh connection of `to`, while the rest of the application goes on. A busy one
    /// is waited for until `deadline_ms` from now.
    Move { app: String, session: Option<u64>, to: String, deadline_ms: u64 },
    /// End the connections that moved sessions have left behind, little by little: they are in nobody's way.
    Retire { app: String },
    /// Only list sessions.
    List { app: String },
    /// Only look: has its configuration file other rules for commands than it goes by? Done by those that have.
    Compare { app: String },
    /// Go by the rules in its configuration file from the next command on. Done by those that have others.
    Reload { app: String },
}

impl Order {
    /// Of which application the sessions are.
    pub fn app(&self) -> &str {
        match self {
            Order::Prepare { app, .. }
            | Order::Inspect { app }
            | Order::Hold { app, .. }
            | Order::Backends { app }
            | Order::Capture { app, .. }
            | Order::HearOut { app }
            | Order::AttachFirst { app, .. }
            | Order::Attach { app, .. }
            | Order::Release { app, .. }
            | Order::Cut { app }
            | Order::GiveUp { app }
            | Order::Move { app, .. }
            | Order::Retire { app }
            | Order::List { app }
            | Order::Compare { app }
            | Order::Reload { app } => app,
        }
    }

    /// Only a proxy that holds its sessions can obey it.
    pub fn needs_hold(&self) -> bool {
        match self {
            Order::Backends { .. }
            | Order::Capture { .. }
            | Order::HearOut { .. }
            | Order::AttachFirst { .. }
            | Order::Attach { .. }
            | Order::GiveUp { .. } => true,
            Order::Prepare { .. }
            | Order::Inspect { .. }
            | Order::Hold { .. }
            | Order::Release { .. }
            | Order::Cut { .. }
            | Order::Move { .. }
            | Order::Retire { .. }
            | Order::List { .. }
            | Order::Compare { .. }
            | Order::Reload { .. } => false,
        }
    }
}

impl Order {
    /// It comes after the point of no return: there is nothing to go back to for sessions that it does not reach. Obeyed twice,
    /// it is done once.
    pub fn is_past_return(&self) -> bool {
        matches!(
            self,
            Order::HearOut { .. }
                | Order::AttachFirst { .. }
                | Order::Attach { .. }
                | Order::Release { .. }
        )
    }
}

/// A session, for tables and logs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionView {
    pub id: u64,
    pub app: String,
    pub user: String,
    pub database: String,
    pub application_name: String,
    pub client: String,
    pub tls: bool,
    pub cell: String,
    pub server: String,
    pub backend_pid: i32,
    pub state: String,
    pub connected_s: u64,
    pub idle_s: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub requests: u64,
    pub moves: u32,
    pub pins: Vec<String>,
    /// How it shares servers: `shared`, `waits`, or why it keeps one. Empty if it does not.
    #[serde(default)]
    pub pool: String,
}

impl SessionView {
    /// As one that is in the way because it is busy.
    pub fn into_busy(self) -> Blocker {
        let session = NamedSession {
            id: self.id,
            user: self.user,
            database: self.database,
            application_name: self.application_name,
        };
        Blocker { session, reasons: vec![Reason::Busy { what: self.state }] }
    }
}

/// What a proxy answers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Sessions that the order reached.
    pub sessions: u64,
    /// Sessions for which it is done.
    pub done: u64,
    /// Sessions for which it is not, and why.
    pub blockers: Vec<Blocker>,
    /// Sessions that were ended with an error.
    pub told: u64,
    /// Process ids of the servers' backends that held sessions own.
    pub backends: Vec<i32>,
    /// How long sessions were held, in milliseconds, when they are released.
    pub pauses: Option<Pauses>,
    /// The sessions, if they are to be listed.
    #[serde(default)]
    pub listed: Vec<SessionView>,
    /// Proxies that have not obeyed, and why.
    #[serde(default)]
    pub missing: Vec<String>,
    /// Why nothing was done at all.
    pub error: Option<String>,
}

impl Report {
    /// What several proxies answer as one. An error of one is one of all; pauses are those of the slowest.
    pub fn and(mut self, other: Report) -> Report {
        // What others say is not to be relied on.
        self.sessions = self.sessions.saturating_add(other.sessions);
        self.done = self.done.saturating_add(other.done);
        self.told = self.told.saturating_add(other.told);
        self.blockers.extend(other.blockers);
        self.backends.extend(other.backends);
        self.listed.extend(other.listed);
        self.missing.extend(other.missing);
        self.error = self.error.or(other.error);
        self.pauses = match (self.pauses, other.pauses) {
            (Some(a), Some(b)) => {
                Some(Pauses { p50: a.p50.max(b.p50), p99: a.p99.max(b.p99), max: a.max.max(b.max) })
            }
            (a, b) => a.or(b),
        };
        self
    }
}

/// How long sessions were held, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Pauses {
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

impl std::fmt::Display for Pauses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms", self.p50, self.p99, self.max)
    }
}

impl Pauses {
    /// Percentiles by nearest rank; none of an empty list.
    pub fn of(mut pauses: Vec<f64>) -> Option<Pauses> {
        pauses.sort_by(f64::total_cmp);
        let rank =
            |percent: usize| pauses.get((pauses.len() * percent).div_ceil(100).saturating_sub(1));
        Some(Pauses { p50: *rank(50)?, p99: *rank(99)?, max: *pauses.last()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let pauses = Pauses::of((1..=200).map(f64::from).collect()).unwrap();
        assert_eq!((pauses.p50, pauses.p99, pauses.max), (100.0, 198.0, 200.0));
        assert_eq!(Pauses::of(Vec::new()), None);
        assert_eq!(Pauses::of(vec![7.0]).unwrap().p99, 7.0);
    }
}
