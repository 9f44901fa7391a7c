//! The state of the cell that serves an application, enforced on every command.
//!
//! - here: what is enforced now, and what is known of a session for it.
//! - [`texts`]: which commands a text holds.
//! - `keeping`: what names stand for, as long as somebody may define others.
//! - `messages`: the messages of a client, one by one; `judging`: what becomes of them.
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

use crate::app::App;
use crate::config::PolicyConfig;

mod judging;
pub(crate) mod keeping;
mod messages;
pub(crate) mod texts;

use texts::Text;

/// Portals of one session of which it is known what they run; one more is refused.
const PORTALS_MAX: usize = 1_000;
/// Kinds of sessions that are judged alike, of which it is remembered what has passed.
const KEYS_MAX: usize = 1_000;
/// Statements prepared by SQL of which it is known what they do.
const PREPARED_MAX: usize = 1_000;
/// Bytes that their texts may take.
const PREPARED_LEN_MAX: usize = 1024 * 1024;
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

/// The rules by which commands are judged, and how often each was about one.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) config: PolicyConfig,
    pub(crate) counts: Vec<Counts>,
}

impl Rules {
    pub(crate) fn new(config: PolicyConfig) -> Rules {
        let rules = config.policy.rules.len() + Policy::BUILT_IN.len();
        let counts = (0..rules).map(|_| Counts::default()).collect();
        Rules { config, counts }
    }
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
    pub(crate) rules: Arc<Rules>,
    /// By database. Of one that is not here nothing is known.
    pub(crate) catalogs: BTreeMap<String, Arc<Catalog>>,
    /// Those who are judged alike, by role and database.
    pub(crate) keys: Mutex<BTreeMap<(String, String), u64>>,
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
            rules: Arc::new(Rules::new(PolicyConfig::default())),
            catalogs: BTreeMap::new(),
            keys: Mutex::default(),
        }
    }
}

static NEXT_KEY: AtomicU64 = AtomicU64::new(1);

impl Regime {
    /// The number of all who are judged alike. None if there are too many kinds.
    fn key(&self, role: &str, database: &str) -> Option<u64> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = (role.to_owned(), database.to_owned());
        if keys.len() >= KEYS_MAX && !keys.contains_key(&kind) {
            return None;
        }
        Some(*keys.entry(kind).or_insert_with(|| NEXT_KEY.fetch_add(1, Ordering::Relaxed)))
    }
}

/// How a session is judged in a regime.
#[derive(Debug, Clone, Copy)]
struct Kind {
    /// The number of all who are judged alike.
    key: Option<u64>,
    /// Not even reading is accepted.
    refuses_reading: bool,
    /// There is a rule by which commands wait.
    holds: bool,
}

/// What is known of a session while commands are judged.
#[derive(Debug, Default)]
pub(crate) struct Confined {
    /// The regime that this was learned under.
    pub(crate) regime: Arc<Regime>,
    /// Since then everything was accepted for a time.
    pub(crate) was_free: bool,
    /// How it is judged, once that was asked.
    kind: Option<Kind>,
    /// The statement without a name that was prepared last, once that was asked, where it is known.
    statement: Option<Option<Arc<Text>>>,
    /// What the portal without a name runs, where it is known.
    unnamed: Option<Arc<Text>>,
    /// What each other portal runs, where it is known.
    portals: BTreeMap<Box<[u8]>, Option<Arc<Text>>>,
    /// Others may be there, of which nothing is known any more.
    lost_portals: bool,
    /// Portals may be there that were bound while nothing was judged: they pass as what reads, for they were accepted then.
    had_portals: bool,
    /// Since then the one without a name was bound.
    bound_unnamed: bool,
    /// A command of the open batch has ended a transaction: what follows would be in another, which the server may let write.
    has_ended: bool,
    /// What `standard_conforming_strings` is for the text that is judged, where that is known.
    conforms: Option<bool>,
    /// One has changed settings, such as the encoding of what follows.
    has_set: bool,
    /// The texts in which SQL's PREPARE has prepared something, by its name.
    prepared: BTreeMap<String, Arc<Text>>,
    /// The same of what is on its way.
    prepares: VecDeque<(String, Arc<Text>)>,
    /// There may be others, that were prepared while nothing was judged.
    had_prepared: bool,
    /// Errors that are ours to tell, by the mark in the server's.
    refusals: VecDeque<(String, Report)>,
    next: u64,
    /// What marks begin with: nobody else can name a portal so. The one of queries can be seen by others of the role.
    secrets: [String; 2],
    /// The rest of a message is not passed.
    pub(crate) swallows: bool,
    /// It stands on no server, was told an error, and what follows up to its Sync is not for anybody.
    skips: bool,
    /// A command waits, and since when.
    pub(crate) held_since: Option<Instant>,
}

impl Regime {
    /// What the client is told.
    fn report(&self, app: &str, refusal: &Refusal) -> Report {
        let Regime { cell, state, epoch, rules, .. } = self;
        let policy = &rules.config.policy;
        let sqlstate = match state {
            CellState::Passive | CellState::Promoting | CellState::Recovering => {
                SqlState::CANNOT_CONNECT_NOW
            }
            CellState::Fenced => SqlState::READ_ONLY_SQL_TRANSACTION,
            CellState::Active | CellState::Draining => SqlState::INSUFFICIENT_PRIVILEGE,
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
        let secrets = [secret(), secret()];
        Confined { regime: regime.clone(), had_prepared, secrets, ..Confined::default() }
    }

    /// Another regime holds. What was refused under the one before is still to be told, and what was prepared, and bound in a
    /// transaction that goes on, is still there.
    fn renew(&mut self, regime: &Arc<Regime>, is_open: bool) {
        let mut now = Confined::new(regime, self.had_prepared);
        std::mem::swap(self, &mut now);
        let Confined { refusals, next, secrets, skips, swallows, .. } = now;
        (self.refusals, self.next, self.secrets) = (refusals, next, secrets);
        (self.skips, self.swallows) = (skips, swallows);
        (self.prepared, self.prepares) = (now.prepared, now.prepares);
        (self.has_ended, self.has_set) = (now.has_ended, now.has_set);
        if !is_open {
            return;
        }
        if now.was_free {
            // Something else may have been bound by the same name.
            self.had_portals = true;
        } else {
            (self.portals, self.unnamed) = (now.portals, now.unnamed);
            (self.lost_portals, self.had_portals) = (now.lost_portals, now.had_portals);
            self.bound_unnamed = now.bound_unnamed;
        }
    }

    /// A mark by which the server's error will be known as ours.
    fn refuse(&mut self, report: Report, is_query: bool) -> String {
        self.next += 1;
        let mark = format!("{PREFIX}{}_{}_", self.secrets[usize::from(is_query)], self.next);
        self.refusals.push_back((mark.clone(), report));
        mark
    }

    /// Our error in place of the server's, if that is about a message of ours.
    pub(crate) fn told(&mut self, error: &[u8]) -> Option<Vec<u8>> {
        let is_about = |(mark, _): &(String, Report)| {
            error.windows(mark.len()).any(|part| part == mark.as_bytes())
        };
        let at = self.refusals.iter().position(is_about)?;
        let (_, report) = self.refusals.drain(..=at).next_back()?;
        let mut out = Vec::new();
        report.write_error(&mut out);
        Some(out)
    }

    /// An error has come: whatever was bound may be gone, or be there again by a savepoint.
    pub(crate) fn on_error(&mut self) {
        self.lost_portals |= !self.portals.is_empty() || self.unnamed.is_some();
        self.unnamed = None;
        self.portals.clear();
        self.prepares.clear();
    }

    /// Everything was answered, and no transaction is open if it `is_idle`.
    pub(crate) fn on_ready(&mut self, is_idle: bool) {
        // What was refused and not told was skipped.
        self.refusals.clear();
        self.prepares.clear();
        (self.has_ended, self.has_set) = (false, false);
        if is_idle {
            self.unnamed = None;
            self.portals.clear();
            (self.lost_portals, self.had_portals, self.bound_unnamed) = (false, false, false);
        }
    }

    /// SQL's PREPARE has succeeded. One that was not judged may have prepared anything.
    pub(crate) fn on_prepared(&mut self) {
        let Some((name, text)) = self.prepares.pop_front() else {
            self.had_prepared = true;
            return;
        };
        let others = self.prepared.values().map(|other| other.weight()).sum::<usize>();
        let is_one_more = !self.prepared.contains_key(&name);
        if is_one_more
            && self.prepared.len() < PREPARED_MAX
            && others + text.weight() <= PREPARED_LEN_MAX
        {
            self.prepared.insert(name, text);
        } else {
            self.had_prepared = true;
        }
    }

    /// Nothing that was prepared is there any more.
    pub(crate) fn on_discarded(&mut self) {
        self.prepared.clear();
        self.had_prepared = !self.prepares.is_empty();
    }
}

/// What names begin with that the server does not know, and says so.
const PREFIX: &str = "holdfast_refused_";

/// 128 bits that nobody can guess: the standard library keys its hashes by the system's random numbers.
fn secret() -> String {
    let one = || std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0_u8);
    format!("{:016x}{:016x}", one(), one())
}

impl App {
    /// The rules in their order, those that stand behind them, and how often each was about a command.
    pub(crate) fn rules(&self) -> Vec<Vec<String>> {
        let rules = self.rules_now();
        let policy = &rules.config.policy;
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
        rules.counts.iter().enumerate().map(row).collect()
    }

    /// The same for Prometheus.
    pub(crate) fn rule_counts(&self) -> Vec<(String, u64)> {
        let rules = self.rules_now();
        let mut lines = Vec::new();
        for (at, counts) in rules.counts.iter().enumerate() {
            for (verdict, counter) in [
                ("accepted", &counts.accepted),
                ("refused", &counts.refused),
                ("held", &counts.held),
                ("shadowed", &counts.shadowed),
            ] {
                let (app, rule) = (&self.name, rules.config.policy.name_of(at));
                let labels = format!("{{app=\"{app}\",rule=\"{rule}\",verdict=\"{verdict}\"}}");
                lines.push((labels, counter.load(Ordering::Relaxed)));
            }
        }
        lines
    }
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
