//! Whether the active cell's server is lost, and whether another may take its place.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::Lsn;

/// A server that does not answer for so long is taken for lost. One whose process is gone is lost at once.
pub const SILENT_MAX: Duration = Duration::from_millis(1_500);

/// What a server says to whoever asks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It answers, and is a primary.
    Primary,
    /// It answers, and is in recovery.
    Standby,
    /// It refuses a login, and says why: it is there, whatever the matter is.
    Refuses,
    /// It is starting, ending or recovering.
    NotReady,
    /// Nobody answers.
    Nothing,
}

/// What became of a server's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Process {
    Lives,
    /// It is gone, and has not shut down.
    Crashed,
    /// It was shut down, by whoever may have a plan.
    ShutDown,
}

/// What is seen of the active cell's server at one moment, by ways that do not hang on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sight {
    /// What became of its process. None where that cannot be seen.
    pub process: Option<Process>,
    pub answer: Answer,
    /// Whether a standby of another cell streams from it. None if none could be asked.
    pub streams: Option<bool>,
    /// Its lease is over, so that it has been ended.
    pub is_lease_over: bool,
}

/// What is the matter with the active cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Analysis {
    NoProblem,
    /// It has not answered, for less than [`SILENT_MAX`].
    Unsure,
    /// Its process is gone, or neither we nor its standbys hear of it.
    DeadPrimary,
    /// Its process lives and answers nobody.
    PrimaryHung,
    /// We do not hear of it, its standbys do.
    UnreachablePrimary,
    /// It is in recovery, so that nothing can be written.
    PrimaryInRecovery,
    /// It was shut down.
    PrimaryShutDown,
    /// It is starting, ending or recovering.
    PrimaryNotReady,
    /// It does not let us in.
    LoginRefused,
}

impl Analysis {
    /// Those that something may begin by.
    pub const MATTERS: [Analysis; 7] = [
        Analysis::DeadPrimary,
        Analysis::PrimaryHung,
        Analysis::UnreachablePrimary,
        Analysis::PrimaryInRecovery,
        Analysis::PrimaryShutDown,
        Analysis::PrimaryNotReady,
        Analysis::LoginRefused,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Analysis::NoProblem => "NoProblem",
            Analysis::Unsure => "Unsure",
            Analysis::DeadPrimary => "DeadPrimary",
            Analysis::PrimaryHung => "PrimaryHung",
            Analysis::UnreachablePrimary => "UnreachablePrimary",
            Analysis::PrimaryInRecovery => "PrimaryInRecovery",
            Analysis::PrimaryShutDown => "PrimaryShutDown",
            Analysis::PrimaryNotReady => "PrimaryNotReady",
            Analysis::LoginRefused => "LoginRefused",
        }
    }

    /// Another server is to take its place.
    pub fn calls_for_failover(self) -> bool {
        matches!(self, Analysis::DeadPrimary | Analysis::PrimaryHung)
    }

    /// In words.
    pub fn says(self) -> &'static str {
        match self {
            Analysis::NoProblem => "the server answers",
            Analysis::Unsure => "the server has not answered for a moment",
            Analysis::DeadPrimary => "the server is dead",
            Analysis::PrimaryHung => "the server's process lives, and answers nobody",
            Analysis::UnreachablePrimary => "the server does not answer us, but its standbys",
            Analysis::PrimaryInRecovery => "the server is in recovery",
            Analysis::PrimaryShutDown => "the server was shut down",
            Analysis::PrimaryNotReady => "the server is starting, ending or recovering",
            Analysis::LoginRefused => "the server lives, and refuses our login",
        }
    }
}

impl std::fmt::Display for Analysis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Sees one server again and again.
#[derive(Debug, Clone, Copy, Default)]
pub struct Detector {
    /// Since when it has not answered.
    silent_since: Option<Instant>,
}

impl Detector {
    pub fn see(&mut self, now: Instant, sight: Sight) -> Analysis {
        match sight.answer {
            Answer::Primary => {
                self.silent_since = None;
                return Analysis::NoProblem;
            }
            Answer::Standby => {
                self.silent_since = None;
                return Analysis::PrimaryInRecovery;
            }
            Answer::Refuses | Answer::NotReady => {
                self.silent_since = None;
                let is_refused = sight.answer == Answer::Refuses;
                return if is_refused { Analysis::LoginRefused } else { Analysis::PrimaryNotReady };
            }
            Answer::Nothing => (),
        }
        let since = *self.silent_since.get_or_insert(now);
        match sight.process {
            Some(Process::Crashed) => return Analysis::DeadPrimary,
            Some(Process::ShutDown) => {
                // Whoever starts it again has its time.
                self.silent_since = None;
                return Analysis::PrimaryShutDown;
            }
            Some(Process::Lives) | None => (),
        }
        if sight.is_lease_over {
            return Analysis::DeadPrimary;
        }
        if now.duration_since(since) < SILENT_MAX {
            return Analysis::Unsure;
        }
        match (sight.process, sight.streams) {
            (Some(_), _) => Analysis::PrimaryHung,
            (None, Some(false)) => Analysis::DeadPrimary,
            (None, _) => Analysis::UnreachablePrimary,
        }
    }
}

/// What is known of the WAL that the lost server had acknowledged, beside what the candidate has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// The candidate has all of it, as the lost server's own disk says.
    All,
    /// The candidate lacks at least so many bytes.
    Lacks(u64),
    /// It was seen last at the candidate's position or before, and may have gone on.
    Perhaps,
    /// Nobody has seen where it was.
    Nothing,
}

impl Known {
    /// By where the lost server was seen last.
    pub fn of(last_seen: Option<Lsn>, received: Lsn) -> Known {
        match last_seen.map(|lsn| lsn.bytes_since(received)) {
            Some(bytes) if bytes > 0 => Known::Lacks(bytes),
            Some(_) => Known::Perhaps,
            None => Known::Nothing,
        }
    }
}

/// What may be given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LossPolicy {
    /// Somebody has said so.
    pub allowed: bool,
    /// Bytes of WAL that may be lost without asking anybody. None: nothing may be.
    pub max: Option<u64>,
}

impl LossPolicy {
    /// # Errors
    /// More may be lost than is allowed, in words.
    pub fn permits(self, known: Known) -> Result<(), String> {
        let max = self.max;
        match known {
            _ if self.allowed => Ok(()),
            Known::All => Ok(()),
            Known::Lacks(bytes) if max.is_some_and(|max| bytes <= max) => Ok(()),
            Known::Perhaps if max.is_some() => Ok(()),
            Known::Lacks(bytes) => {
                let max = max.unwrap_or(0);
                Err(format!("it lacks at least {bytes} bytes of WAL, at most {max} may be lost"))
            }
            Known::Perhaps | Known::Nothing => Err(
                "it may lack what the lost server has acknowledged last, and nothing may be lost"
                    .into(),
            ),
        }
    }
}

/// A standby that may become the primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub cell: String,
    pub timeline: u64,
    /// The end of the WAL that it has, replayed or not.
    pub received: Lsn,
    /// It has come to the end of its own log since its start, so that it knows what it has.
    pub is_sure: bool,
}

/// The one that has most; of several, the first by name.
pub fn most_advanced(candidates: &[Candidate]) -> Option<&Candidate> {
    let key = |one: &Candidate| (one.timeline, one.received);
    candidates.iter().rev().max_by_key(|one| key(one))
}

/// A candidate that somebody has chosen must have all that the others have.
///
/// # Errors
/// It is no candidate, or another has more.
pub fn check_chosen(candidates: &[Candidate], cell: &str) -> Result<Candidate, String> {
    let chosen = candidates.iter().find(|one| one.cell == cell).ok_or("it is no standby")?;
    match most_advanced(candidates) {
        Some(best) if (best.timeline, best.received) > (chosen.timeline, chosen.received) => {
            Err(format!(
                "`{}` has more: {} of timeline {}, `{cell}` has {} of timeline {}",
                best.cell, best.received, best.timeline, chosen.received, chosen.timeline
            ))
        }
        _ => Ok(chosen.clone()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::disallowed_methods)]

    use super::*;

    const SILENT: Sight =
        Sight { process: None, answer: Answer::Nothing, streams: None, is_lease_over: false };

    fn after(wait_ms: u64, sight: Sight) -> Analysis {
        let mut detector = Detector::default();
        let now = Instant::now();
        detector.see(now, sight);
        detector.see(now + Duration::from_millis(wait_ms), sight)
    }

    #[test]
    fn a_process_that_is_gone_is_dead_at_once() {
        let gone = Sight { process: Some(Process::Crashed), ..SILENT };
        assert_eq!(after(0, gone), Analysis::DeadPrimary);
        let shut_down = Sight { process: Some(Process::ShutDown), ..SILENT };
        assert_eq!(after(5_000, shut_down), Analysis::PrimaryShutDown);
        // A server that answers is there, whatever is thought of its process.
        assert_eq!(after(5_000, Sight { answer: Answer::Primary, ..gone }), Analysis::NoProblem);
        for (answer, expected) in [
            (Answer::Refuses, Analysis::LoginRefused),
            (Answer::NotReady, Analysis::PrimaryNotReady),
        ] {
            let analysis = after(60_000, Sight { answer, ..gone });
            assert!(analysis == expected && !analysis.calls_for_failover());
        }
    }

    #[test]
    fn silence_alone_is_not_enough() {
        for (sight, expected) in [
            (Sight { process: Some(Process::Lives), ..SILENT }, Analysis::PrimaryHung),
            (Sight { streams: Some(false), ..SILENT }, Analysis::DeadPrimary),
            (Sight { streams: Some(true), ..SILENT }, Analysis::UnreachablePrimary),
            (SILENT, Analysis::UnreachablePrimary),
        ] {
            assert_eq!(after(1_400, sight), Analysis::Unsure);
            assert_eq!(after(1_500, sight), expected);
        }
        assert!(!Analysis::UnreachablePrimary.calls_for_failover());
        assert!(!Analysis::Unsure.calls_for_failover());
    }

    #[test]
    fn a_server_whose_lease_is_over_is_dead_at_once() {
        let over = Sight { is_lease_over: true, ..SILENT };
        assert_eq!(after(0, over), Analysis::DeadPrimary);
        assert_eq!(after(0, Sight { answer: Answer::Primary, ..over }), Analysis::NoProblem);
    }

    #[test]
    fn an_answer_begins_the_time_anew() {
        let (mut detector, now) = (Detector::default(), Instant::now());
        let hung = Sight { process: Some(Process::Lives), ..SILENT };
        detector.see(now, hung);
        let later = now + Duration::from_secs(1);
        detector.see(later, Sight { answer: Answer::Primary, ..hung });
        assert_eq!(detector.see(later + Duration::from_secs(1), hung), Analysis::Unsure);
    }

    #[test]
    fn a_server_that_is_started_again_has_its_time() {
        let (mut detector, now) = (Detector::default(), Instant::now());
        let shut_down = Sight { process: Some(Process::ShutDown), ..SILENT };
        detector.see(now, shut_down);
        let later = now + Duration::from_secs(60);
        assert_eq!(detector.see(later, shut_down), Analysis::PrimaryShutDown);
        let starting = Sight { process: Some(Process::Lives), ..SILENT };
        assert_eq!(detector.see(later, starting), Analysis::Unsure);
    }

    #[test]
    fn what_may_be_lost_is_said_beforehand() {
        let none = LossPolicy { allowed: false, max: None };
        let some = LossPolicy { max: Some(100), ..none };
        let any = LossPolicy { allowed: true, max: None };
        let permitted = |known| [none, some, any].map(|policy| policy.permits(known).is_ok());
        assert_eq!(permitted(Known::All), [true, true, true]);
        assert_eq!(permitted(Known::Perhaps), [false, true, true]);
        assert_eq!(permitted(Known::Lacks(100)), [false, true, true]);
        assert_eq!(permitted(Known::Lacks(101)), [false, false, true]);
        assert_eq!(Known::of(Some(Lsn(7)), Lsn(5)), Known::Lacks(2));
        assert_eq!(Known::of(Some(Lsn(5)), Lsn(7)), Known::Perhaps);
        assert_eq!(Known::of(None, Lsn(7)), Known::Nothing);
        assert_eq!(permitted(Known::Nothing), [false, false, true]);
    }

    #[test]
    fn the_most_advanced_is_chosen_and_no_other() {
        let one = |cell: &str, timeline, received| Candidate {
            cell: cell.into(),
            timeline,
            received: Lsn(received),
            is_sure: true,
        };
        let all = [one("b", 1, 900), one("c", 2, 10), one("d", 2, 10)];
        assert_eq!(most_advanced(&all).unwrap().cell, "c");
        assert_eq!(check_chosen(&all, "d").unwrap().cell, "d");
        let error = check_chosen(&all, "b").unwrap_err();
        assert!(error.contains("`c` has more"), "{error}");
        assert!(check_chosen(&all, "a").is_err());
        assert_eq!(most_advanced(&[]), None);
    }
}
