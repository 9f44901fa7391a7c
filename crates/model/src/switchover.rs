//! A planned switchover: its stages in order, what follows each outcome, and where a crashed one goes on.
//!
//! Up to the grant the old server is intact and every failure goes back to it. The grant is the point of no
//! return: it is one durable transaction that begins the next epoch, and from then on the way leads forward
//! only, also after a crash.

use serde::{Deserialize, Serialize};

/// What is being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Both servers are checked; sessions are prepared on the target while clients go on.
    Prepare,
    /// New work is held, running transactions end.
    Hold,
    /// The state of every session is read. Before the fence, whose reload every backend would have to carry out
    /// first, and whose settings would hide the session's own.
    Capture,
    /// The old server takes no more writes, from whomever.
    Fence,
    /// The target has all that the old server wrote.
    CatchUp,
    /// The next epoch is the target's. The point of no return.
    Grant,
    /// The target becomes a primary.
    Promote,
    /// Every session is attached to the target, and proven to be the same.
    Attach,
    /// Held work goes on.
    Release,
    /// The old server becomes a standby.
    Rejoin,
    /// Before the grant: the old server takes writes again, held work goes on there.
    Revert,
}

impl Stage {
    pub const ALL: [Stage; 11] = [
        Stage::Prepare,
        Stage::Hold,
        Stage::Capture,
        Stage::Fence,
        Stage::CatchUp,
        Stage::Grant,
        Stage::Promote,
        Stage::Attach,
        Stage::Release,
        Stage::Rejoin,
        Stage::Revert,
    ];

    /// Clients are held while it runs. If it can go neither on nor back, they must be told: no wait is without end.
    /// Reverting is not among these: it lets them go on first.
    pub fn holds_clients(self) -> bool {
        use Stage::{Attach, Capture, CatchUp, Fence, Grant, Hold, Promote};
        matches!(self, Hold | Capture | Fence | CatchUp | Grant | Promote | Attach)
    }

    pub fn name(self) -> &'static str {
        match self {
            Stage::Prepare => "prepare",
            Stage::Hold => "hold",
            Stage::Fence => "fence",
            Stage::Capture => "capture",
            Stage::CatchUp => "catch_up",
            Stage::Grant => "grant",
            Stage::Promote => "promote",
            Stage::Attach => "attach",
            Stage::Release => "release",
            Stage::Rejoin => "rejoin",
            Stage::Revert => "revert",
        }
    }
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// How a stage ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    Failed,
}

/// How an execution ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ending {
    /// The target is active, the old server a standby.
    Completed,
    /// The target is active; the old server is fenced and not yet a standby.
    CompletedWithoutRejoin,
    /// Nothing was changed, or all of it was taken back.
    Aborted,
    /// It stands still and needs a person: `holdfast retry`.
    Stuck,
}

/// What comes after a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Go(Stage),
    End(Ending),
}

/// What comes after `stage` has ended so.
pub fn next(stage: Stage, outcome: Outcome) -> Next {
    use Next::{End, Go};
    match (stage, outcome) {
        (Stage::Prepare, Outcome::Done) => Go(Stage::Hold),
        (Stage::Hold, Outcome::Done) => Go(Stage::Capture),
        (Stage::Capture, Outcome::Done) => Go(Stage::Fence),
        (Stage::Fence, Outcome::Done) => Go(Stage::CatchUp),
        (Stage::CatchUp, Outcome::Done) => Go(Stage::Grant),
        (Stage::Grant, Outcome::Done) => Go(Stage::Promote),
        (Stage::Promote, Outcome::Done) => Go(Stage::Attach),
        (Stage::Attach, Outcome::Done) => Go(Stage::Release),
        (Stage::Release, Outcome::Done) => Go(Stage::Rejoin),
        (Stage::Rejoin, Outcome::Done) => End(Ending::Completed),
        (Stage::Revert, Outcome::Done) => End(Ending::Aborted),
        // Nothing was changed yet, but sessions were prepared: going back is the same as later on.
        (
            Stage::Prepare
            | Stage::Hold
            | Stage::Fence
            | Stage::Capture
            | Stage::CatchUp
            | Stage::Grant,
            Outcome::Failed,
        ) => Go(Stage::Revert),
        // The epoch is the target's. Going back would need a new grant, which is a switchover of its own.
        (Stage::Promote | Stage::Attach | Stage::Release | Stage::Revert, Outcome::Failed) => {
            End(Ending::Stuck)
        }
        (Stage::Rejoin, Outcome::Failed) => End(Ending::CompletedWithoutRejoin),
    }
}

/// Where an execution goes on that was found with `stage` under way. `granted` is what the store says.
pub fn resume(stage: Stage, granted: bool) -> Stage {
    match (stage, granted) {
        (Stage::Rejoin, true) => Stage::Rejoin,
        // Held sessions are gone with the process that held them, so what is left is the server's part.
        (Stage::Promote | Stage::Attach | Stage::Release | Stage::Grant, true) => Stage::Promote,
        (_, true) => Stage::Promote,
        (_, false) => Stage::Revert,
    }
}

/// What becomes of a session that cannot be moved when the deadline has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// The switchover is given up; nobody notices more than a pause.
    #[default]
    Abort,
    /// The session is ended by an error that names what it loses.
    Force,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_has_its_way() {
        let mut table = String::new();
        for stage in Stage::ALL {
            let shown = |next| match next {
                Next::Go(stage) => stage.name().to_owned(),
                Next::End(ending) => format!("{ending:?}"),
            };
            let (done, failed) = (next(stage, Outcome::Done), next(stage, Outcome::Failed));
            table.push_str(&format!("{stage}: {}, else {}\n", shown(done), shown(failed)));
        }
        assert_eq!(
            table,
            "\
prepare: hold, else revert
hold: capture, else revert
capture: fence, else revert
fence: catch_up, else revert
catch_up: grant, else revert
grant: promote, else revert
promote: attach, else Stuck
attach: release, else Stuck
release: rejoin, else Stuck
rejoin: Completed, else CompletedWithoutRejoin
revert: Aborted, else Stuck
"
        );
    }

    #[test]
    fn whoever_is_held_where_it_is_stuck_is_told() {
        let stuck = |stage: &Stage| next(*stage, Outcome::Failed) == Next::End(Ending::Stuck);
        let told: Vec<Stage> =
            Stage::ALL.into_iter().filter(stuck).filter(|s| s.holds_clients()).collect();
        // Release and revert are stuck only after clients go on.
        assert_eq!(told, [Stage::Promote, Stage::Attach]);
    }

    #[test]
    fn every_way_ends() {
        for mut stage in Stage::ALL {
            let mut steps = 0;
            while let Next::Go(after) = next(stage, Outcome::Done) {
                stage = after;
                steps += 1;
                assert!(steps < 20);
            }
        }
    }

    #[test]
    fn a_crash_goes_back_before_the_grant_and_forward_after_it() {
        for stage in Stage::ALL {
            assert_eq!(resume(stage, false), Stage::Revert);
            assert!(matches!(resume(stage, true), Stage::Promote | Stage::Rejoin));
        }
    }
}
