//! On how many servers a commit is before it is acknowledged, and what that proves when one of them is lost.
//!
//! A commit waits for `acks` of the N standbys. Where the positions of R of those are known, the furthest of them has every
//! acknowledged commit if R + acks > N: any set of R has one in common with any set of `acks`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::Lsn;

/// How long commits may wait for standbys that are not there, unless the policy is strict.
pub const SHORT_MAX: Duration = Duration::from_secs(1);

/// What an application asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Durability {
    /// Standbys that must have a commit before it is acknowledged; with none, replication is asynchronous.
    pub acks: usize,
    /// Commits wait for ever where there are too few standbys; else they go on without, and the store says so first.
    pub is_strict: bool,
}

/// It is proven, for the epoch that it is recorded in, that no commit is acknowledged before `acks` of the standbys have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protection {
    pub acks: usize,
    /// Their cells.
    pub standbys: BTreeSet<String>,
}

/// What a standby of a cell calls itself where it connects.
pub fn standby_name(cell: &str) -> String {
    format!("holdfast_{cell}")
}

impl Protection {
    /// `synchronous_standby_names` (manual, section 20.6.2).
    pub fn names(&self) -> String {
        let quoted = |cell: &String| format!("\"{}\"", standby_name(cell).replace('"', "\"\""));
        let names: Vec<String> = self.standbys.iter().map(quoted).collect();
        format!("ANY {} ({})", self.acks, names.join(", "))
    }

    /// Whether a server's `synchronous_standby_names` were set by us, for whatever cells.
    pub fn is_ours(configured: &str) -> bool {
        let list = configured
            .strip_prefix("ANY ")
            .and_then(|rest| rest.split_once(" ("))
            .and_then(|(_, list)| list.strip_suffix(')'));
        list.is_some_and(|list| list.split(", ").all(|name| name.starts_with("\"holdfast_")))
    }

    /// Whether the furthest of these cells has every acknowledged commit.
    pub fn is_covered_by<'a>(&self, cells: impl IntoIterator<Item = &'a str>) -> bool {
        let known: BTreeSet<&str> =
            cells.into_iter().filter(|cell| self.standbys.contains(*cell)).collect();
        known.len() + self.acks > self.standbys.len()
    }
}

/// What there is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Nothing,
    /// Give standbys their names: some do not stream, or under another.
    Name,
    /// Have commits wait, prove that they do, and record it.
    Protect(Protection),
    /// Record that it is not so any more, and then have commits wait no longer.
    Unprotect(String),
}

/// Sees the active cell's server again and again.
#[derive(Debug, Clone, Default)]
pub struct Keeper {
    /// Since when there are too few standbys.
    short_since: Option<Instant>,
    /// What each standby had when it was last seen to have more, and when that was.
    progress: BTreeMap<String, (Lsn, Instant)>,
}

/// A standby as the primary sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Follower {
    pub cell: String,
    /// What it has on its disk, as far as it has said.
    pub flushed: Lsn,
}

impl Keeper {
    /// Those of the standbys that stream that get on with it: one that hangs streams by name only, until the server gives it up
    /// after `wal_sender_timeout`. `written` is what the primary has.
    pub fn follow(
        &mut self,
        now: Instant,
        written: Lsn,
        streaming: &[Follower],
    ) -> BTreeSet<String> {
        let mut follows = BTreeSet::new();
        self.progress.retain(|cell, _| streaming.iter().any(|one| one.cell == *cell));
        for Follower { cell, flushed } in streaming {
            let (had, since) = self.progress.entry(cell.clone()).or_insert((*flushed, now));
            if *flushed > *had || *flushed >= written {
                (*had, *since) = (*flushed, now);
            }
            if now.duration_since(*since) < SHORT_MAX {
                follows.insert(cell.clone());
            }
        }
        follows
    }

    /// `recorded` is what the store says, `configured` the server's `synchronous_standby_names`, `streaming` the cells whose
    /// standbys stream, of all `others`.
    pub fn next(
        &mut self,
        now: Instant,
        policy: Durability,
        recorded: Option<&Protection>,
        configured: &str,
        (streaming, others): (&BTreeSet<String>, &BTreeSet<String>),
    ) -> Step {
        let wanted = Protection { acks: policy.acks, standbys: others.clone() };
        let is_ours = configured == wanted.names();
        if policy.acks == 0 {
            // What somebody else has configured is theirs.
            return match recorded {
                None if !Protection::is_ours(configured) => Step::Nothing,
                _ => Step::Unprotect("no acknowledgements are asked for".into()),
            };
        }
        if streaming.intersection(others).count() >= policy.acks {
            self.short_since = None;
            return match recorded {
                Some(recorded) if *recorded == wanted && is_ours => Step::Nothing,
                _ => Step::Protect(wanted),
            };
        }
        let since = *self.short_since.get_or_insert(now);
        let is_asked = recorded.is_some() || is_ours;
        if !is_asked {
            return Step::Name;
        }
        if policy.is_strict || now.duration_since(since) < SHORT_MAX {
            return Step::Nothing;
        }
        Step::Unprotect(format!(
            "{} of the standbys stream, {} are needed",
            streaming.len(),
            policy.acks
        ))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)]

    use super::*;

    fn cells(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn the_names_are_those_of_the_manual() {
        let protection = Protection { acks: 2, standbys: cells(&["b", "c\""]) };
        assert_eq!(protection.names(), "ANY 2 (\"holdfast_b\", \"holdfast_c\"\"\")");
    }

    #[test]
    fn any_recruits_share_one_with_any_acknowledgement() {
        for standbys in 1usize..6 {
            let all: Vec<String> = (0..standbys).map(|number| number.to_string()).collect();
            for acks in 1..=standbys {
                let protection = Protection { acks, standbys: all.iter().cloned().collect() };
                for recruits in 0u32..1 << standbys {
                    let of = |set: u32| (0..standbys).filter(move |at| set >> at & 1 == 1);
                    let covered = protection.is_covered_by(of(recruits).map(|at| all[at].as_str()));
                    let sets =
                        (0u32..1 << standbys).filter(|set| set.count_ones() as usize == acks);
                    let meets = sets.clone().all(|set| set & recruits != 0);
                    assert_eq!(covered, meets, "{standbys} {acks} {recruits:b}");
                }
            }
        }
        let protection = Protection { acks: 1, standbys: cells(&["b"]) };
        assert!(!protection.is_covered_by(["z"]), "a stranger is no recruit");
    }

    #[test]
    fn a_standby_that_hangs_follows_nobody() {
        let (mut keeper, now) = (Keeper::default(), Instant::now());
        let mut see = |ms, written, flushed| {
            let one = Follower { cell: "b".into(), flushed: Lsn(flushed) };
            let at = now + Duration::from_millis(ms);
            !keeper.follow(at, Lsn(written), &[one]).is_empty()
        };
        assert!(see(0, 10, 10));
        // Nothing is written, so there is nothing to follow.
        assert!(see(5_000, 10, 10));
        assert!(see(5_100, 20, 10) && see(5_999, 20, 10));
        assert!(!see(6_000, 20, 10));
        assert!(see(6_100, 30, 15), "it gets on");
    }

    #[test]
    fn what_is_recorded_is_taken_back_before_commits_go_on_alone() {
        let (mut keeper, now) = (Keeper::default(), Instant::now());
        let policy = Durability { acks: 1, is_strict: false };
        let (none, others) = (cells(&[]), cells(&["b"]));
        let wanted = Protection { acks: 1, standbys: others.clone() };
        let names = wanted.names();
        assert_eq!(keeper.next(now, policy, None, "", (&none, &others)), Step::Name);
        let protect = keeper.next(now, policy, None, "", (&others, &others));
        assert_eq!(protect, Step::Protect(wanted.clone()));
        let mut see = |ms, recorded, configured: &str, streaming| {
            let at = now + Duration::from_millis(ms);
            keeper.next(at, policy, recorded, configured, (streaming, &others))
        };
        assert_eq!(see(1, Some(&wanted), &names, &others), Step::Nothing);
        // Somebody has changed it.
        assert_eq!(see(2, Some(&wanted), "", &others), Step::Protect(wanted.clone()));
        assert_eq!(see(3, Some(&wanted), &names, &none), Step::Nothing);
        assert_eq!(see(1_002, Some(&wanted), &names, &none), Step::Nothing);
        assert!(matches!(see(1_003, Some(&wanted), &names, &none), Step::Unprotect(_)));
        // What was asked for once is taken back; what is somebody else's is not.
        let asks_none = Durability { acks: 0, ..policy };
        let mut none =
            |configured: &str| keeper.next(now, asks_none, None, configured, (&others, &others));
        assert!(matches!(none(&names), Step::Unprotect(_)));
        assert_eq!(none("FIRST 1 (mine)"), Step::Nothing);
        let none = cells(&[]);
        let strict = Durability { is_strict: true, ..policy };
        let later = now + Duration::from_secs(60);
        let waits = keeper.next(later, strict, Some(&wanted), &names, (&none, &others));
        assert_eq!(waits, Step::Nothing);
    }
}
