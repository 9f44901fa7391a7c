//! When a plan begins by itself.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::Mode;
use crate::failover::Analysis;

const DAY_MS: u64 = 24 * 3_600 * 1_000;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trigger {
    /// What is the matter with the active cell: one of these, unless there are none.
    pub on: BTreeSet<Analysis>,
    /// Alarms that are red, all of them.
    #[serde(default)]
    pub alarms: BTreeSet<String>,
    /// All of it has been so for this long.
    pub after_ms: u64,
    pub mode: Mode,
    /// Since the plan began by itself last.
    pub min_delay_ms: u64,
    /// How often it may begin by itself in a day.
    pub per_day: u32,
}

/// Whether a plan begins now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fires {
    Yes,
    /// Nothing is the matter that it is for, or not for long enough.
    No,
    /// It would, but it did lately, in words.
    HeldBack(String),
}

impl Trigger {
    /// For how long all has been so that it is for. `held_ms`: for how long `analysis` has been so; `red_ms`: for how long an
    /// alarm has been red, if it is.
    pub fn held_ms(
        &self,
        (analysis, held_ms): (Analysis, u64),
        red_ms: impl Fn(&str) -> Option<u64>,
    ) -> Option<u64> {
        let seen = match self.on.is_empty() {
            true => None,
            false => Some(self.on.contains(&analysis).then_some(held_ms)),
        };
        let all: Option<Vec<u64>> =
            seen.into_iter().chain(self.alarms.iter().map(|alarm| red_ms(alarm))).collect();
        all?.into_iter().min()
    }

    /// `held_ms`: as [`Trigger::held_ms`] says. `begun_ms`: when the plan began by itself before, by the wall clock.
    pub fn fires(&self, held_ms: Option<u64>, begun_ms: &[u64], now_ms: u64) -> Fires {
        if held_ms.is_none_or(|held| held < self.after_ms) {
            return Fires::No;
        }
        // What began in the future, by a clock that was put back, began just now.
        let ago = |at: &u64| now_ms.saturating_sub(*at);
        let today = begun_ms.iter().filter(|at| ago(at) < DAY_MS).count();
        if let Some(last) = begun_ms.iter().map(ago).min().filter(|ago| *ago < self.min_delay_ms) {
            let (last, delay) = (last / 1_000, self.min_delay_ms / 1_000);
            return Fires::HeldBack(format!(
                "it began by itself {last} s ago, {delay} s must pass"
            ));
        }
        if u32::try_from(today).unwrap_or(u32::MAX) >= self.per_day {
            let most = self.per_day;
            return Fires::HeldBack(format!(
                "it began by itself {today} times in a day, {most} at most"
            ));
        }
        Fires::Yes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000_000;

    fn trigger() -> Trigger {
        Trigger {
            on: [Analysis::DeadPrimary, Analysis::PrimaryHung].into(),
            alarms: BTreeSet::new(),
            after_ms: 2_000,
            mode: Mode::Ungraceful,
            min_delay_ms: 60_000,
            per_day: 2,
        }
    }

    #[test]
    fn it_fires_once_what_it_is_for_has_been_so_for_a_while() {
        let fires = |analysis, held| {
            let held = trigger().held_ms((analysis, held), |_| None);
            trigger().fires(held, &[], NOW)
        };
        assert_eq!(fires(Analysis::DeadPrimary, 1_999), Fires::No);
        assert_eq!(fires(Analysis::DeadPrimary, 2_000), Fires::Yes);
        assert_eq!(fires(Analysis::NoProblem, 60_000), Fires::No);
        assert_eq!(fires(Analysis::UnreachablePrimary, 60_000), Fires::No);
    }

    #[test]
    fn all_that_it_is_for_must_be_so() {
        let alarms = BTreeSet::from(["x".to_owned(), "y".into()]);
        let both = Trigger { alarms: alarms.clone(), ..trigger() };
        let alone = Trigger { alarms, on: BTreeSet::new(), ..trigger() };
        let red = |name: &str| Some(if name == "x" { 500 } else { 700 });
        let not_y = |name: &str| (name == "x").then_some(500);
        let dead = (Analysis::DeadPrimary, 600);
        assert_eq!(both.held_ms(dead, red), Some(500));
        assert_eq!(both.held_ms(dead, not_y), None);
        assert_eq!(both.held_ms((Analysis::NoProblem, 600), red), None);
        assert_eq!(alone.held_ms((Analysis::NoProblem, 600), red), Some(500));
        let nothing = Trigger { on: BTreeSet::new(), ..trigger() };
        assert_eq!(nothing.held_ms(dead, red), None);
    }

    #[test]
    fn it_does_not_fire_again_and_again() {
        let fires = |begun: &[u64]| trigger().fires(Some(9_000), begun, NOW);
        assert_eq!(fires(&[NOW - 60_000]), Fires::Yes);
        assert!(matches!(fires(&[NOW - 59_999]), Fires::HeldBack(why) if why.contains("59 s ago")));
        assert!(matches!(fires(&[NOW + 5]), Fires::HeldBack(_)), "the clock was put back");
        let often = [NOW - 80_000_000, NOW - 70_000];
        assert!(matches!(fires(&often), Fires::HeldBack(why) if why.contains("2 times in a day")));
        assert_eq!(fires(&[NOW - 90_000_000, NOW - 70_000]), Fires::Yes);
    }
}
