//! The shapes that the store keeps, and their keys. A field that is added later has a default.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::audit::{Asking, Draft};
use crate::cell::{CellError, CellState, Epoch};
use crate::lost::LostRows;
use crate::objectives::{Measured, Objectives};
use crate::switchover::{Ending, Kind, OnTimeout, Stage};

pub use crate::cell::Application;

/// Log entries that one execution keeps; a switchover writes about twenty.
pub const LOG_LEN_MAX: usize = 1_000;

pub fn application_key(app: &str) -> String {
    format!("app/{app}")
}

/// Is there once the cell's server was a primary by a lease: it has a guard, and starts as a standby without.
pub fn attended_key(app: &str, cell: &str) -> String {
    format!("attended/{app}/{cell}")
}

/// Whom the lease of a cell was given, and the longest that may still last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attended {
    pub host: u64,
    #[serde(default)]
    pub directory: u64,
    #[serde(default)]
    pub epoch: Epoch,
    pub length: std::time::Duration,
    /// Which server it was, as long as that is known.
    #[serde(default)]
    pub place: Option<u64>,
}

impl Attended {
    /// The lease of this one may go on by pledges while another host asks for it in the same epoch. A host that was booted
    /// again has ended its server; and one that has the same server in hand ends it when its own lease is over.
    pub fn may_go_on(&self, epoch: Epoch, directory: u64, place: Option<u64>) -> bool {
        let is_same_server = self.place.is_some() && self.place == place;
        self.epoch == epoch && self.directory != directory && !is_same_server
    }
}

/// Whom the agent of a cell may ask for pledges.
pub fn pleads_key(app: &str, cell: &str) -> String {
    format!("pleads/{app}/{cell}")
}

/// Sets of cells, each with the directory of its agent: the agent goes by one of the sets, and its lease goes on only if all of
/// that pledge.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pleads(pub BTreeSet<BTreeMap<String, u64>>);

impl Pleads {
    /// What it has said that it goes by, and what it is answered.
    pub fn of(said: BTreeMap<String, u64>, answered: BTreeMap<String, u64>) -> Pleads {
        Pleads([said, answered].into_iter().filter(|cells| !cells.is_empty()).collect())
    }

    /// That the agent of `cell` with this directory pledges no more is enough: no lease goes on without it. Another one of the
    /// cell knows nothing of what was pledged.
    pub fn all_need(&self, cell: &str, directory: Option<u64>) -> bool {
        self.0.iter().all(|cells| directory.is_some() && cells.get(cell).copied() == directory)
    }
}

/// A proxy of another process.
pub fn proxy_key(name: &str) -> String {
    format!("proxy/{name}")
}

/// What is remembered of a proxy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    /// Ids of its sessions begin with this.
    pub number: u64,
    /// Where it was heard from last.
    pub host: u64,
    /// It has said that it ends.
    pub is_out: bool,
    /// Applications in which it goes by nothing that was, as that was waited for when it was silent.
    pub out_of: BTreeSet<String>,
    /// Applications in which another process of its name, on another host, may go by what was.
    pub ghosts: BTreeSet<String>,
}

impl Registered {
    /// It is heard, from `host`. One that was heard on another host, and has not said that it ends, may still serve there; on
    /// the same host there are no two of a name.
    pub fn heard(&self, host: u64, apps: impl Iterator<Item = String>) -> Registered {
        let mut ghosts = self.ghosts.clone();
        if host != self.host && !self.is_out {
            ghosts.extend(apps.filter(|app| !self.out_of.contains(app)));
        }
        Registered { number: self.number, host, is_out: false, out_of: BTreeSet::new(), ghosts }
    }

    /// Nothing that was is gone by in `app` any more, by any process of this name that is silent.
    pub fn outwaited(&mut self, app: &str, is_silent: bool) {
        self.ghosts.remove(app);
        if is_silent {
            self.out_of.insert(app.to_owned());
        }
    }

    /// Somebody of this name may go by what was in `app`, if he is not held by order.
    pub fn may_serve(&self, app: &str) -> bool {
        !self.is_out && !self.out_of.contains(app)
    }
}

/// Executions sort by their number.
pub fn execution_key(app: &str, id: u64) -> String {
    format!("execution/{app}/{id:020}")
}

pub fn execution_prefix(app: &str) -> String {
    format!("execution/{app}/")
}

/// One change of an application's cells: what was asked, and what has happened so far.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Execution {
    pub id: u64,
    pub app: String,
    #[serde(default)]
    pub kind: Kind,
    pub from: String,
    /// Of a switchover the target, else the same cell.
    pub to: String,
    /// The epoch before it; the grant makes it the next one.
    pub epoch: Epoch,
    pub deadline_ms: u64,
    pub on_timeout: OnTimeout,
    /// Of a failover: somebody has said that what the lost server alone has may be given up.
    #[serde(default)]
    pub allow_data_loss: bool,
    /// Nobody has asked for it.
    #[serde(default)]
    pub is_automatic: bool,
    #[serde(default)]
    pub asked: Asking,
    /// Milliseconds since 1970, for people; never used to decide.
    pub started_at_ms: u64,
    pub stage: Stage,
    /// The LSN that the target must reach before the grant; of a failover, that it has reached.
    pub lsn: Option<crate::Lsn>,
    /// What only the lost server had, once it was looked at.
    #[serde(default)]
    pub lost: Option<LostTail>,
    /// Nobody could tell what the lost server alone had, and the whole of it is kept: what is there since is no more than a copy.
    #[serde(default)]
    pub is_kept_whole: bool,
    /// The timeline that the target writes, once it is a primary.
    #[serde(default)]
    pub timeline: Option<u64>,
    /// Of a failover: when the lost server has answered last, in milliseconds since 1970.
    #[serde(default)]
    pub heard_at_ms: Option<u64>,
    /// What the application was to keep to when this began, and what it has cost.
    #[serde(default)]
    pub objectives: Objectives,
    #[serde(default)]
    pub measured: Measured,
    pub ending: Option<Ending>,
    /// Why it was given up or stands still.
    pub reason: Option<String>,
    pub log: Vec<LogEntry>,
}

impl Execution {
    /// What it does, in words.
    pub fn says(&self) -> String {
        let Execution { id, kind, from, to, allow_data_loss, .. } = self;
        let what = match from == to {
            true => format!("execution {id}: cell `{to}`"),
            false => format!("execution {id}: {} from `{from}` to `{to}`", kind.name()),
        };
        what + if *allow_data_loss { ", what is lost is given up" } else { "" }
    }

    /// The record of a change that this execution is, or makes.
    pub fn draft(&self, did: &'static str, epoch: Epoch, text: String) -> Draft {
        let Asking { by, reason, .. } = self.asked.clone();
        Draft { by, did, app: self.app.clone(), epoch: epoch.0, reason, text }
    }

    /// It stands still, and nothing that it has done is beyond going back.
    pub fn is_stuck_before(&self, application: &Application) -> bool {
        let goes_back = self.kind != Kind::Unfence;
        self.ending == Some(Ending::Stuck) && goes_back && !application.is_past(self)
    }
}

/// What a server had written that no other has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostTail {
    /// Where the histories part, and where the lost one ends.
    pub from: crate::Lsn,
    pub to: crate::Lsn,
    /// Commits in it.
    pub transactions: u64,
    /// Where it is kept: a directory with its WAL and what that says.
    pub kept_in: String,
    #[serde(default)]
    pub timeline: Option<u64>,
    /// Row by row, once that was read.
    #[serde(default)]
    pub rows: Option<LostRows>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LogEntry {
    pub at_ms: u64,
    pub stage: Stage,
    pub event: LogEvent,
    pub text: String,
    /// How long the stage took, when it has ended.
    pub took_ms: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogEvent {
    Started,
    Done,
    Failed,
}

impl Execution {
    pub fn record(&mut self, entry: LogEntry) {
        if self.log.len() < LOG_LEN_MAX {
            self.log.push(entry);
        }
    }
}

impl Application {
    /// The change of cells that goes with the begin of a stage, in the same transaction as its record.
    ///
    /// # Errors
    /// The cells are not in the states that the stage follows.
    pub fn enter(
        &mut self,
        kind: Kind,
        stage: Stage,
        from: &str,
        to: &str,
    ) -> Result<(), CellError> {
        match stage {
            // One that is fenced takes no writes all the while, and nothing leads from there to draining.
            Stage::Hold if kind == Kind::Switchover && self.state(from)? == CellState::Fenced => {
                Ok(())
            }
            Stage::Hold => self.change(from, CellState::Draining),
            Stage::Grant => {
                if self.state(from)? != CellState::Fenced {
                    self.change(from, CellState::Fenced)?;
                }
                self.change(to, CellState::Promoting)
            }
            // Entered again after a crash, the cell is recovering already.
            Stage::Rejoin if self.state(from)? == CellState::Recovering => Ok(()),
            Stage::Rejoin => self.change(from, CellState::Recovering),
            Stage::Confine => {
                self.change(from, CellState::Fenced)?;
                if kind == Kind::FenceAll {
                    self.change(from, CellState::Recovering)?;
                    self.change(from, CellState::Passive)?;
                }
                Ok(())
            }
            // Nothing leads from fenced to active: it is a new grant, in the next epoch.
            Stage::Regrant => {
                if self.state(to)? == CellState::Fenced {
                    self.change(to, CellState::Recovering)?;
                }
                if self.state(to)? == CellState::Recovering {
                    self.change(to, CellState::Passive)?;
                }
                if self.state(to)? == CellState::Passive {
                    self.change(to, CellState::Promoting)?;
                }
                Ok(())
            }
            Stage::Prepare
            | Stage::Fence
            | Stage::Capture
            | Stage::CatchUp
            | Stage::Promote
            | Stage::Attach
            | Stage::Release
            | Stage::Assess
            | Stage::Cut
            | Stage::Isolate
            | Stage::Recruit
            | Stage::Revert => Ok(()),
        }
    }

    /// The change of cells that goes with the end of a stage.
    ///
    /// # Errors
    /// The cells are not in the states that the stage follows.
    pub fn leave(&mut self, stage: Stage, from: &str, to: &str) -> Result<(), CellError> {
        match stage {
            Stage::Promote | Stage::Regrant if self.state(to)? == CellState::Active => Ok(()),
            Stage::Promote | Stage::Regrant => self.change(to, CellState::Active),
            Stage::Rejoin => {
                self.lacking.remove(from);
                self.change(from, CellState::Passive)
            }
            Stage::Revert if self.state(from)? == CellState::Draining => {
                self.change(from, CellState::Active)
            }
            _ => Ok(()),
        }
    }

    /// Whether an execution is past its point of no return: the epoch is no longer the one before it, or the cell that is to
    /// be fenced is.
    pub fn is_past(&self, execution: &Execution) -> bool {
        match execution.kind {
            Kind::Switchover | Kind::Unfence | Kind::Failover => self.epoch > execution.epoch,
            Kind::Fence | Kind::FenceAll => {
                self.cells.get(&execution.from).is_some_and(|state| !state.takes_writes())
            }
            // It changes nobody's grant.
            Kind::Rejoin => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::switchover::{Next, Outcome, next, resume};

    fn run(app: &mut Application, stage: Stage) -> Ending {
        run_kind(app, Kind::Switchover, stage, "b")
    }

    fn run_kind(app: &mut Application, kind: Kind, mut stage: Stage, to: &str) -> Ending {
        loop {
            app.enter(kind, stage, "a", to).unwrap();
            app.leave(stage, "a", to).unwrap();
            match next(kind, stage, Outcome::Done) {
                Next::Go(after) => stage = after,
                Next::End(ending) => return ending,
            }
        }
    }

    fn application() -> Application {
        Application::new("a", ["a".into(), "b".into()])
    }

    #[test]
    fn pledges_of_another_directory_say_nothing() {
        let set = |cells: &[(&str, u64)]| {
            cells.iter().map(|(cell, directory)| ((*cell).to_owned(), *directory)).collect()
        };
        let pleads = Pleads::of(set(&[("b", 1)]), set(&[("b", 2), ("c", 3)]));
        assert!(!pleads.all_need("b", Some(2)) && !pleads.all_need("c", Some(3)));
        let pleads = Pleads::of(set(&[("b", 2)]), set(&[("b", 2), ("c", 3)]));
        assert!(pleads.all_need("b", Some(2)) && !pleads.all_need("b", None));
        // Where nobody may be asked, nothing goes on.
        assert!(Pleads::of(set(&[]), set(&[])).all_need("b", None));
    }

    #[test]
    fn another_process_of_a_name_is_a_ghost_only_elsewhere() {
        let apps = || ["shop".to_owned(), "other".to_owned()].into_iter();
        let first = Registered { number: 1, host: 7, ..Registered::default() };
        assert_eq!(first.heard(7, apps()), first);
        let mut moved = first.heard(8, apps());
        assert_eq!((moved.host, moved.ghosts.len()), (8, 2));
        moved.outwaited("shop", false);
        assert!(moved.may_serve("shop") && !moved.ghosts.contains("shop"));
        moved.outwaited("other", true);
        assert!(!moved.may_serve("other") && moved.may_serve("shop"));
        // In what it was waited for while it was silent, nobody of its name is left.
        assert_eq!(moved.heard(9, apps()).ghosts.into_iter().collect::<Vec<_>>(), ["shop"]);
        let ended = Registered { is_out: true, ..first };
        assert!(ended.heard(8, apps()).ghosts.is_empty() && !ended.may_serve("shop"));
    }

    #[test]
    fn a_switchover_takes_the_cells_along() {
        let mut app = application();
        assert_eq!(run(&mut app, Stage::Prepare), Ending::Completed);
        assert_eq!((app.active(), app.epoch), (Some("b"), Epoch(2)));
        assert_eq!(app.cells["a"], CellState::Passive);
    }

    #[test]
    fn a_fenced_cell_hands_over_without_writing_again() {
        let mut app = application();
        run_kind(&mut app, Kind::Fence, Kind::Fence.first(), "a");
        let before = app.clone();
        // Given up before its grant it is as it was.
        app.enter(Kind::Switchover, Stage::Hold, "a", "b").unwrap();
        app.leave(Stage::Revert, "a", "b").unwrap();
        assert_eq!(app, before);
        assert_eq!(run(&mut app, Stage::Prepare), Ending::Completed);
        assert_eq!((app.active(), app.epoch), (Some("b"), Epoch(2)));
        assert_eq!(app.cells["a"], CellState::Passive);
    }

    #[test]
    fn a_failover_gives_the_next_epoch_to_the_other_cell() {
        let mut app = application();
        let first = Kind::Failover.first();
        assert_eq!(run_kind(&mut app, Kind::Failover, first, "b"), Ending::Completed);
        assert_eq!((app.active(), app.epoch), (Some("b"), Epoch(2)));
        assert_eq!(app.cells["a"], CellState::Passive);
    }

    #[test]
    fn a_fenced_cell_is_served_and_takes_writes_again_in_the_next_epoch() {
        for (kind, state) in
            [(Kind::Fence, CellState::Fenced), (Kind::FenceAll, CellState::Passive)]
        {
            let mut app = application();
            assert_eq!(run_kind(&mut app, kind, kind.first(), "a"), Ending::Completed);
            assert_eq!(
                (app.active(), app.served(), app.epoch),
                (None, Some(("a", state)), Epoch(1))
            );
            // Found after a crash between its grant and its end, it goes on.
            app.enter(Kind::Unfence, Stage::Regrant, "a", "a").unwrap();
            assert_eq!(app.epoch, Epoch(2));
            let stage = Kind::Unfence.first();
            assert_eq!(run_kind(&mut app, Kind::Unfence, stage, "a"), Ending::Completed);
            assert_eq!((app.served(), app.epoch), (Some(("a", CellState::Active)), Epoch(2)));
        }
    }

    #[test]
    fn a_crash_at_any_stage_ends_with_one_active_cell() {
        let order = [
            Stage::Prepare,
            Stage::Hold,
            Stage::Fence,
            Stage::Capture,
            Stage::CatchUp,
            Stage::Grant,
            Stage::Promote,
            Stage::Attach,
            Stage::Release,
            Stage::Rejoin,
        ];
        for crash in 0..order.len() {
            for after_leave in [false, true] {
                let mut app = application();
                let before = app.epoch;
                for stage in &order[..=crash] {
                    app.enter(Kind::Switchover, *stage, "a", "b").unwrap();
                    if *stage != order[crash] || after_leave {
                        app.leave(*stage, "a", "b").unwrap();
                    }
                }
                if order[crash] == Stage::Rejoin && after_leave {
                    continue;
                }
                let granted = app.epoch > before;
                let ending = run(&mut app, resume(Kind::Switchover, order[crash], granted));
                let (active, ended) =
                    if granted { ("b", Ending::Completed) } else { ("a", Ending::Aborted) };
                assert_eq!(
                    (app.active(), ending),
                    (Some(active), ended),
                    "crash at {}",
                    order[crash]
                );
            }
        }
    }
}
