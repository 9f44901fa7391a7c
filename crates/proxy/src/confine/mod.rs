//! The state of the cell that serves an application, enforced on every command.
//!
//! - here: what is enforced now, and what is known of a session for it.
//! - [`texts`]: which commands a text holds.
//! - `messages`: the messages of a client, one by one.
//!
//! The decision is `model::policy`. It is taken in the state that holds when a message is to be passed, not when its
//! statement was prepared. While everything is accepted nothing is done but to remember the texts of named statements.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use model::cell::{CellState, Epoch};
use model::policy::rules::DEFAULT_RULE;
use model::policy::{Catalog, Class, Disposition, Policy, Refusal};
use wire::backend::Report;
use wire::sqlstate::SqlState;

use crate::app::{App, Params};
use crate::config::PolicyConfig;

mod messages;
pub(crate) mod texts;

use texts::Text;

/// Portals of one session of which it is known what they run; one more is refused.
const PORTALS_MAX: usize = 1_000;
/// Kinds of sessions that are judged alike, of which it is remembered what has passed.
const KEYS_MAX: usize = 1_000;
/// Statements prepared by SQL of which it is known what they do.
const PREPARED_MAX: usize = 1_000;
/// Refusals of one session whose errors have not come back.
const REFUSALS_MAX: usize = 64;

/// How often each rule was about a command.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) accepted: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) held: AtomicU64,
    /// Would have been refused or held.
    pub(crate) shadowed: AtomicU64,
}

/// What holds for all sessions of an application from some moment on.
#[derive(Debug)]
pub(crate) struct Regime {
    /// Which one it is, so that a session notices the next.
    pub(crate) number: u64,
    /// Grows with that, and with each database of which something is learned.
    pub(crate) version: u64,
    pub(crate) cell: String,
    pub(crate) state: CellState,
    pub(crate) epoch: Epoch,
    /// By database. Of one that is not here nothing is known.
    pub(crate) catalogs: BTreeMap<String, Arc<Catalog>>,
    /// Those who are judged alike, by role, database and `standard_conforming_strings`.
    pub(crate) keys: Mutex<BTreeMap<(String, String, bool), u64>>,
}

impl Default for Regime {
    /// Before anybody has said anything: everything is accepted.
    fn default() -> Regime {
        Regime {
            number: 0,
            version: 0,
            cell: String::new(),
            state: CellState::Active,
            epoch: Epoch(0),
            catalogs: BTreeMap::new(),
            keys: Mutex::default(),
        }
    }
}

static NEXT_KEY: AtomicU64 = AtomicU64::new(1);

impl Regime {
    /// The number of all who are judged alike. None if there are too many kinds.
    fn key(&self, role: &str, database: &str, conforming: bool) -> Option<u64> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = (role.to_owned(), database.to_owned(), conforming);
        if keys.len() >= KEYS_MAX && !keys.contains_key(&kind) {
            return None;
        }
        Some(*keys.entry(kind).or_insert_with(|| NEXT_KEY.fetch_add(1, Ordering::Relaxed)))
    }
}

/// What is known of a session while commands are judged.
#[derive(Debug, Default)]
pub(crate) struct Confined {
    /// The regime that this was learned under.
    pub(crate) regime: Arc<Regime>,
    /// Who it is judged like, and the parameters that this was told by.
    key: Option<(Params, Option<u64>)>,
    /// What the portal without a name runs, where it is known.
    unnamed: Option<Arc<Text>>,
    /// What each other portal runs, where it is known.
    portals: BTreeMap<Box<[u8]>, Option<Arc<Text>>>,
    /// What statements do that SQL's PREPARE has prepared since, at most.
    prepared: BTreeMap<String, Class>,
    /// There may be others that were prepared before.
    had_prepared: bool,
    /// Errors that are ours to tell, by the number in the server's.
    refusals: VecDeque<(u64, Report)>,
    next: u64,
    /// The rest of a message is not passed.
    pub(crate) swallows: bool,
    /// It stands on no server, was told an error, and what follows up to its Sync is not for anybody.
    skips: bool,
    /// A command waits, and since when.
    pub(crate) held_since: Option<Instant>,
}

impl PolicyConfig {
    pub(crate) fn counts(&self) -> Vec<Counts> {
        let rules = self.policy.rules.len() + Policy::BUILT_IN.len();
        (0..rules).map(|_| Counts::default()).collect()
    }
}

impl Regime {
    /// What the client is told.
    fn report(&self, app: &str, policy: &Policy, refusal: &Refusal) -> Report {
        let Regime { cell, state, epoch, .. } = self;
        let sqlstate = match state {
            CellState::Passive | CellState::Promoting | CellState::Recovering => {
                SqlState::CANNOT_CONNECT_NOW
            }
            CellState::Active | CellState::Draining | CellState::Fenced => {
                SqlState::READ_ONLY_SQL_TRANSACTION
            }
        };
        let (name, class) = (policy.name_of(refusal.rule), refusal.class.name());
        let what = match refusal.class {
            Class::Unknown => "a command of which nothing is known".to_owned(),
            _ => refusal.command.to_owned(),
        };
        let message = format!("cannot execute {what} in cell `{cell}`, which is {state}");
        let report = Report::error(sqlstate, message).detail(format!(
            "rule `{name}` of policy version {} refuses class `{class}`, state {state}, epoch {epoch}",
            policy.version
        ));
        match (state, name) {
            (CellState::Fenced | CellState::Passive, DEFAULT_RULE) => {
                report.hint(format!("`holdfast unfence {app} {cell}` lets it write again"))
            }
            _ => report.hint("the rules are in the configuration: [app.policy]"),
        }
    }
}

impl Confined {
    fn new(regime: &Arc<Regime>, had_prepared: bool) -> Confined {
        Confined { regime: regime.clone(), had_prepared, ..Confined::default() }
    }

    /// A number by which the server's error will be known as ours.
    fn refuse(&mut self, report: Report) -> u64 {
        self.next += 1;
        self.refusals.push_back((self.next, report));
        self.next
    }

    /// Our error in place of the server's, if that is about a message of ours.
    pub(crate) fn told(&mut self, error: &[u8]) -> Option<Vec<u8>> {
        let is_about = |(number, _): &(u64, Report)| {
            let mark = mark(*number);
            error.windows(mark.len()).any(|part| part == mark.as_bytes())
        };
        let at = self.refusals.iter().position(is_about)?;
        let (_, report) = self.refusals.drain(..=at).next_back()?;
        let mut out = Vec::new();
        report.write_error(&mut out);
        Some(out)
    }

    /// Whatever was bound may be gone.
    pub(crate) fn forget_portals(&mut self) {
        self.unnamed = None;
        self.portals.clear();
    }

    /// Everything was answered: what was refused and not told was skipped.
    pub(crate) fn forget_refusals(&mut self) {
        self.refusals.clear();
    }
}

impl App {
    /// The rules in their order, those that stand behind them, and how often each was about a command.
    pub(crate) fn rules(&self) -> Vec<Vec<String>> {
        let policy = &self.policy.policy;
        let row = |(at, counts): (usize, &Counts)| {
            let mut row = vec![self.name.clone(), policy.name_of(at).to_owned()];
            row.extend(match policy.rules.get(at) {
                Some(rule) => {
                    let states: Vec<&str> = rule.states.iter().map(|state| state.name()).collect();
                    let classes: Vec<&str> =
                        rule.classes.iter().map(|class| class.name()).collect();
                    let lists = [
                        states.join(", "),
                        classes.join(", "),
                        rule.roles.join(", "),
                        rule.databases.join(", "),
                    ];
                    lists
                        .into_iter()
                        .chain([rule.disposition.name().to_owned()])
                        .collect::<Vec<_>>()
                }
                None => vec![
                    String::new(),
                    String::new(),
                    String::new(),
                    String::new(),
                    "refuse".into(),
                ],
            });
            let counters = [&counts.accepted, &counts.refused, &counts.held, &counts.shadowed];
            row.extend(counters.iter().map(|counter| counter.load(Ordering::Relaxed).to_string()));
            row
        };
        self.policy_counts.iter().enumerate().map(row).collect()
    }

    /// The same for Prometheus.
    pub(crate) fn rule_counts(&self) -> Vec<(String, u64)> {
        let mut lines = Vec::new();
        for (at, counts) in self.policy_counts.iter().enumerate() {
            for (verdict, counter) in [
                ("accepted", &counts.accepted),
                ("refused", &counts.refused),
                ("held", &counts.held),
                ("shadowed", &counts.shadowed),
            ] {
                let (app, rule) = (&self.name, self.policy.policy.name_of(at));
                let labels = format!("{{app=\"{app}\",rule=\"{rule}\",verdict=\"{verdict}\"}}");
                lines.push((labels, counter.load(Ordering::Relaxed)));
            }
        }
        lines
    }
}

/// A name that the server does not know, and says so.
fn mark(number: u64) -> String {
    format!("holdfast_refused_{number}_")
}

impl Counts {
    fn count(&self, disposition: Disposition, shadow: bool) {
        let counter = match disposition {
            Disposition::Accept => &self.accepted,
            _ if shadow => &self.shadowed,
            Disposition::Refuse => &self.refused,
            Disposition::Hold => &self.held,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
