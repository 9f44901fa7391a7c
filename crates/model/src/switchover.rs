//! Planned changes of an application's cells: their stages in order, what follows each outcome, and where a crashed one
//! goes on.
//!
//! Up to its point of no return an execution leaves the server intact, and every failure goes back. That point is one
//! durable transaction: of a switchover or failover the grant, which begins the next epoch, of a fence the record that
//! the cell is fenced. From then on the way leads forward only, also after a crash.

use serde::{Deserialize, Serialize};

/// What an execution is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Another cell becomes the active one.
    #[default]
    Switchover,
    /// The active cell becomes fenced: it reads, and clients stay.
    Fence,
    /// The active cell becomes passive: it neither reads nor writes, and clients stay.
    FenceAll,
    /// The cell that was active last is given a new grant.
    Unfence,
    /// Another cell becomes the active one, because the active one's server is lost.
    Failover,
    /// A standby that has gone another way than the active cell's server is made one anew.
    Rejoin,
}

impl Kind {
    pub const ALL: [Kind; 6] = [
        Kind::Switchover,
        Kind::Fence,
        Kind::FenceAll,
        Kind::Unfence,
        Kind::Failover,
        Kind::Rejoin,
    ];

    /// Its first stage.
    pub fn first(self) -> Stage {
        match self {
            Kind::Switchover => Stage::Prepare,
            Kind::Fence | Kind::FenceAll => Stage::Hold,
            Kind::Unfence => Stage::Regrant,
            Kind::Failover => Stage::Assess,
            Kind::Rejoin => Stage::Rejoin,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Kind::Switchover => "switchover",
            Kind::Fence => "fence",
            Kind::FenceAll => "fence --all",
            Kind::Unfence => "unfence",
            Kind::Failover => "failover",
            Kind::Rejoin => "rejoin",
        }
    }
}

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
    /// The cell is fenced, or passive, from now on. The point of no return of a fence.
    Confine,
    /// The fenced cell is given the next epoch, and its server takes writes again.
    Regrant,
    /// Whether the active cell's server is lost, and the target may take its place. Nothing is changed yet.
    Assess,
    /// Every session is taken from the lost server; new work waits.
    Cut,
    /// The lost server is proven to be dead: nobody's write is acknowledged by it any more.
    Isolate,
    /// The target has all that can be had of what the lost server wrote, and that is enough.
    Recruit,
}

impl Stage {
    pub const ALL: [Stage; 17] = [
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
        Stage::Confine,
        Stage::Regrant,
        Stage::Assess,
        Stage::Cut,
        Stage::Isolate,
        Stage::Recruit,
    ];

    /// Clients are held while it runs. If it can go neither on nor back, they must be told: no wait is without end.
    /// Reverting is not among these: it lets them go on first.
    pub fn holds_clients(self) -> bool {
        use Stage::{Attach, Capture, CatchUp, Confine, Cut, Fence, Grant, Hold, Isolate};
        use Stage::{Promote, Recruit};
        matches!(
            self,
            Hold | Capture
                | Fence
                | CatchUp
                | Grant
                | Promote
                | Attach
                | Confine
                | Cut
                | Isolate
                | Recruit
        )
    }

    /// Proxies wait for orders meanwhile: what is served is being changed.
    pub fn is_of_proxies(self) -> bool {
        !matches!(self, Stage::Prepare | Stage::Assess | Stage::Rejoin)
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
            Stage::Confine => "confine",
            Stage::Regrant => "regrant",
            Stage::Assess => "assess",
            Stage::Cut => "cut",
            Stage::Isolate => "isolate",
            Stage::Recruit => "recruit",
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
    /// A safety rule is in the way: it was not begun, and the store says nothing of it.
    Refused,
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

impl Ending {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Ending::Completed => "completed",
            Ending::CompletedWithoutRejoin => "completed, old server not rejoined",
            Ending::Aborted => "aborted, nothing changed",
            Ending::Stuck => "stuck",
        }
    }
}

/// What comes after a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Go(Stage),
    End(Ending),
}

/// What comes after `stage` has ended so.
pub fn next(kind: Kind, stage: Stage, outcome: Outcome) -> Next {
    use Next::{End, Go};
    let fences = matches!(kind, Kind::Fence | Kind::FenceAll);
    match (stage, outcome) {
        // Nothing was done yet.
        (Stage::Regrant, Outcome::Refused) => End(Ending::Aborted),
        // Of these the begin is the point of no return, which was not passed.
        (Stage::Confine | Stage::Grant, Outcome::Refused) => Go(Stage::Revert),
        (stage, Outcome::Refused) => next(kind, stage, Outcome::Failed),
        (Stage::Hold, Outcome::Done) if fences => Go(Stage::Fence),
        (Stage::Fence, Outcome::Done) if fences => Go(Stage::Confine),
        (Stage::Confine | Stage::Regrant, Outcome::Done) => Go(Stage::Release),
        (Stage::Release, Outcome::Done) if !matches!(kind, Kind::Switchover | Kind::Failover) => {
            End(Ending::Completed)
        }
        (Stage::Assess, Outcome::Done) => Go(Stage::Cut),
        // Nothing was changed, and clients wait for the server by themselves.
        (Stage::Assess, Outcome::Failed) => End(Ending::Aborted),
        (Stage::Cut, Outcome::Done) => Go(Stage::Isolate),
        (Stage::Isolate, Outcome::Done) => Go(Stage::Recruit),
        (Stage::Recruit, Outcome::Done) => Go(Stage::Grant),
        // Sessions did not come along from a lost server: there is none to attach.
        (Stage::Promote, Outcome::Done) if kind == Kind::Failover => Go(Stage::Release),
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
            | Stage::Cut
            | Stage::Isolate
            | Stage::Recruit
            | Stage::Grant,
            Outcome::Failed,
        ) => Go(Stage::Revert),
        // The epoch is the target's. Going back would need a new grant, which is a switchover of its own.
        (
            Stage::Promote
            | Stage::Attach
            | Stage::Release
            | Stage::Revert
            | Stage::Confine
            | Stage::Regrant,
            Outcome::Failed,
        ) => End(Ending::Stuck),
        (Stage::Rejoin, Outcome::Failed) => End(Ending::CompletedWithoutRejoin),
    }
}

/// Where an execution goes on that was found with `stage` under way. `is_past` says that the store has its point of no
/// return.
pub fn resume(kind: Kind, stage: Stage, is_past: bool) -> Stage {
    match (kind, stage, is_past) {
        // Held sessions are gone with the process that held them, so what is left is the server's part.
        (Kind::Switchover | Kind::Failover, Stage::Rejoin, true) => Stage::Rejoin,
        (Kind::Switchover | Kind::Failover, _, true) => Stage::Promote,
        (Kind::Fence | Kind::FenceAll, _, true) => Stage::Release,
        (Kind::Switchover | Kind::Fence | Kind::FenceAll | Kind::Failover, _, false) => {
            Stage::Revert
        }
        // It begins with its grant, and there is nothing to go back to.
        (Kind::Unfence, ..) => Stage::Regrant,
        (Kind::Rejoin, ..) => Stage::Rejoin,
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

    /// The stages that a kind has, in `next`'s order from its first, and its way back.
    fn ways(kind: Kind) -> String {
        let shown = |next| match next {
            Next::Go(stage) => stage.name().to_owned(),
            Next::End(ending) => format!("{ending:?}"),
        };
        let (mut table, mut stage) = (String::new(), kind.first());
        loop {
            let (done, failed) =
                (next(kind, stage, Outcome::Done), next(kind, stage, Outcome::Failed));
            table.push_str(&format!("{stage}: {}, else {}\n", shown(done), shown(failed)));
            stage = match done {
                Next::Go(stage) => stage,
                Next::End(_) => return table,
            };
        }
    }

    #[test]
    fn every_stage_has_its_way() {
        assert_eq!(
            ways(Kind::Switchover),
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
"
        );
        let fence = "\
hold: fence, else revert
fence: confine, else revert
confine: release, else Stuck
release: Completed, else Stuck
";
        assert_eq!((ways(Kind::Fence), ways(Kind::FenceAll)), (fence.into(), fence.into()));
        let unfence = "regrant: release, else Stuck\nrelease: Completed, else Stuck\n";
        assert_eq!(ways(Kind::Unfence), unfence);
        assert_eq!(
            ways(Kind::Failover),
            "\
assess: cut, else Aborted
cut: isolate, else revert
isolate: recruit, else revert
recruit: grant, else revert
grant: promote, else revert
promote: release, else Stuck
release: rejoin, else Stuck
rejoin: Completed, else CompletedWithoutRejoin
"
        );
        assert_eq!(ways(Kind::Rejoin), "rejoin: Completed, else CompletedWithoutRejoin\n");
        assert_eq!(next(Kind::Fence, Stage::Revert, Outcome::Done), Next::End(Ending::Aborted));
    }

    #[test]
    fn whoever_is_held_where_it_is_stuck_is_told() {
        let stuck = |stage: &Stage| {
            next(Kind::Switchover, *stage, Outcome::Failed) == Next::End(Ending::Stuck)
        };
        let told: Vec<Stage> =
            Stage::ALL.into_iter().filter(stuck).filter(|s| s.holds_clients()).collect();
        // Release and revert are stuck only after clients go on; nobody is held for a new grant.
        assert_eq!(told, [Stage::Promote, Stage::Attach, Stage::Confine]);
    }

    #[test]
    fn every_way_ends() {
        for kind in Kind::ALL {
            for mut stage in Stage::ALL {
                let mut steps = 0;
                while let Next::Go(after) = next(kind, stage, Outcome::Done) {
                    stage = after;
                    steps += 1;
                    assert!(steps < 20);
                }
            }
        }
    }

    #[test]
    fn a_crash_goes_back_before_the_point_of_no_return_and_forward_after_it() {
        for stage in Stage::ALL {
            assert_eq!(resume(Kind::Switchover, stage, false), Stage::Revert);
            let after = resume(Kind::Switchover, stage, true);
            assert!(matches!(after, Stage::Promote | Stage::Rejoin));
            assert_eq!(resume(Kind::Failover, stage, false), Stage::Revert);
            assert_eq!(resume(Kind::Failover, stage, true), after);
            assert_eq!(resume(Kind::Fence, stage, false), Stage::Revert);
            assert_eq!(resume(Kind::Fence, stage, true), Stage::Release);
            assert_eq!(resume(Kind::Unfence, stage, true), Stage::Regrant);
            assert_eq!(resume(Kind::Rejoin, stage, true), Stage::Rejoin);
        }
    }
}
