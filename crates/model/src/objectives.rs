//! How long clients may be without service, and how much may be lost; and what a change of cells has cost.

use serde::{Deserialize, Serialize};

use crate::persisted::{Execution, LogEntry, LogEvent};
use crate::switchover::{Kind, Stage};

/// What an application is to keep to. It is compared, and ends nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Objectives {
    /// Recovery time: milliseconds without service.
    pub rto_ms: Option<u64>,
    /// Recovery point: bytes of WAL that were on the lost server alone.
    pub rpo_bytes: Option<u64>,
}

/// What an execution has cost, as far as it is known by now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// Milliseconds in which nothing of the application was served that needs a server.
    pub without_ms: Option<u64>,
    pub lost_bytes: Option<u64>,
}

/// What was measured beside what was to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Met,
    Missed,
    /// There is no objective.
    NoObjective,
    /// It is not known what it has cost.
    Unknown,
}

impl Verdict {
    pub fn of(measured: Option<u64>, objective: Option<u64>) -> Verdict {
        match (measured, objective) {
            (_, None) => Verdict::NoObjective,
            (None, Some(_)) => Verdict::Unknown,
            (Some(measured), Some(objective)) if measured <= objective => Verdict::Met,
            (Some(_), Some(_)) => Verdict::Missed,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Verdict::Met => "met",
            Verdict::Missed => "missed",
            Verdict::NoObjective => "none",
            Verdict::Unknown => "not known",
        }
    }
}

impl Execution {
    /// What it has cost so far.
    pub fn measure(&self) -> Measured {
        Measured { without_ms: self.without_ms(), lost_bytes: self.lost_bytes() }
    }

    /// From when clients waited, or the server was heard last, to when they went on.
    fn without_ms(&self) -> Option<u64> {
        let at = |stage: Stage, event: LogEvent| {
            let found = |entry: &&LogEntry| entry.stage == stage && entry.event == event;
            self.log.iter().find(found).map(|entry| entry.at_ms)
        };
        let since = match self.kind {
            Kind::Switchover => at(Stage::Hold, LogEvent::Started),
            // Nobody knows for how long it had been lost, if nobody had heard it.
            Kind::Failover => self.heard_at_ms,
            // Clients are to be without it, or are not concerned.
            Kind::Fence | Kind::FenceAll | Kind::Unfence | Kind::Rejoin => None,
        };
        let until = at(Stage::Release, LogEvent::Done);
        // A lost server that is taken back serves only once it is there again.
        let back = at(Stage::Revert, LogEvent::Done).filter(|_| self.kind == Kind::Switchover);
        until.or(back).zip(since).map(|(until, since)| until.saturating_sub(since))
    }

    fn lost_bytes(&self) -> Option<u64> {
        let granted =
            |entry: &LogEntry| entry.stage == Stage::Grant && entry.event == LogEvent::Done;
        match (&self.lost, self.kind) {
            (Some(lost), _) => Some(lost.to.bytes_since(lost.from)),
            // The target had all before it was given the grant.
            (None, Kind::Switchover) => self.log.iter().any(granted).then_some(0),
            (None, _) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lsn;
    use crate::audit::Asking;
    use crate::cell::Epoch;
    use crate::persisted::LostTail;
    use crate::switchover::OnTimeout;

    fn execution(kind: Kind, log: &[(Stage, LogEvent, u64)]) -> Execution {
        let entry = |&(stage, event, at_ms): &(Stage, LogEvent, u64)| {
            let (text, took_ms) = (String::new(), None);
            LogEntry { at_ms, stage, event, text, took_ms }
        };
        let log = log.iter().map(entry).collect();
        Execution {
            id: 1,
            app: "shop".into(),
            kind,
            from: "a".into(),
            to: "b".into(),
            epoch: Epoch(1),
            deadline_ms: 0,
            on_timeout: OnTimeout::Abort,
            allow_data_loss: false,
            is_automatic: false,
            asked: Asking::default(),
            started_at_ms: 0,
            stage: kind.first(),
            lsn: None,
            lost: None,
            is_kept_whole: false,
            timeline: None,
            heard_at_ms: None,
            objectives: Objectives::default(),
            measured: Measured::default(),
            ending: None,
            reason: None,
            log,
        }
    }

    use LogEvent::{Done, Started};

    #[test]
    fn clients_wait_from_the_hold_to_the_release() {
        let log = [
            (Stage::Hold, Started, 100),
            (Stage::Grant, Done, 180),
            (Stage::Release, Done, 240),
            (Stage::Rejoin, Done, 9_000),
        ];
        let measured = execution(Kind::Switchover, &log).measure();
        assert_eq!(measured, Measured { without_ms: Some(140), lost_bytes: Some(0) });
        let aborted = [(Stage::Hold, Started, 100), (Stage::Revert, Done, 400)];
        let measured = execution(Kind::Switchover, &aborted).measure();
        assert_eq!(measured, Measured { without_ms: Some(300), lost_bytes: None });
        let under_way = execution(Kind::Switchover, &log[..1]).measure();
        assert_eq!(under_way, Measured::default());
    }

    #[test]
    fn a_lost_server_is_missed_since_it_was_heard_last() {
        let log = [(Stage::Assess, Started, 3_000), (Stage::Release, Done, 3_500)];
        let mut lost = execution(Kind::Failover, &log);
        assert_eq!(lost.measure(), Measured::default(), "nobody knows since when");
        lost.heard_at_ms = Some(1_000);
        lost.lost = Some(LostTail { from: Lsn(100), to: Lsn(164), ..LostTail::default() });
        assert_eq!(lost.measure(), Measured { without_ms: Some(2_500), lost_bytes: Some(64) });
        let reverted = [(Stage::Assess, Started, 0), (Stage::Revert, Done, 500)];
        assert_eq!(execution(Kind::Failover, &reverted).measure(), Measured::default());
        assert_eq!(execution(Kind::Fence, &log).measure(), Measured::default());
    }

    #[test]
    fn what_is_not_known_is_not_met() {
        let verdict = |measured, objective| Verdict::of(measured, objective);
        assert_eq!(verdict(Some(5), Some(5)), Verdict::Met);
        assert_eq!(verdict(Some(6), Some(5)), Verdict::Missed);
        assert_eq!(verdict(None, Some(5)), Verdict::Unknown);
        assert_eq!(verdict(Some(5), None), Verdict::NoObjective);
    }
}
