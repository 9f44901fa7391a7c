//! The statements that make a fresh server session equal to a snapshot.
//!
//! Order matters: settings first, then the session's user, then its role, because each may take away the right
//! to do the one before; then what is named under them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::facts::Facts;
use super::snapshot::{Prepared, Snapshot};
use super::temporary::{Statement, Temporary};
use crate::sql;

/// One thing to do on the new server, in the order given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A statement of ours, with what it restores.
    Run { what: String, sql: String, params: Vec<String> },
    /// A SQL-level PREPARE, run as the client wrote it.
    Prepare { name: String, sql: String },
    /// A protocol-level Parse.
    Parse { name: String, sql: String, types: Vec<String> },
    /// A COPY FROM STDIN of ours, with its rows.
    Copy { what: String, sql: String, rows: Arc<Vec<u8>> },
}

/// When a step can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Beforehand, also on a standby, while the client goes on.
    Standby,
    /// Only once every session is held and the server is a primary: LISTEN is refused in recovery (25006), and
    /// a lock that was taken beforehand would be in the way of whoever holds it by then.
    Primary,
}

/// The steps of a phase that take a session from what its login gave, `from`, to `to`. A setting that only
/// `from` has is given the value that `reference` has for it, by which both were read.
pub fn steps(from: &Snapshot, to: &Snapshot, phase: Phase, reference: &Facts) -> Vec<Step> {
    match phase {
        Phase::Standby => on_standby(from, to, reference),
        Phase::Primary => {
            let mut steps = lock(from, to);
            steps.extend(listen(from, to));
            steps
        }
    }
}

/// The steps that give `currval` and `lastval` their values, on a primary, each group in a transaction that is
/// rolled back: what a session remembers of its sequences is not part of it, while the restarted sequence is
/// (`sequence.c`). One sequence a transaction, so that sessions cannot lock each other out in a circle.
/// `setval` leaves `lastval` alone, so the sequence that was used last comes last, by `nextval`.
pub fn sequence_steps(to: &Snapshot) -> Vec<[Step; 3]> {
    let last =
        to.last_value.and_then(|last| to.sequences.iter().find(|(_, value)| **value == last));
    let last_name = last.map(|(name, _)| name);
    let run = |what: &str, sql: String| Step::Run {
        what: format!("the value of {what}"),
        sql,
        params: Vec::new(),
    };
    // Whoever uses the sequence next waits behind this.
    let soon = Step::Run {
        what: "a timeout".into(),
        sql: "SELECT pg_catalog.set_config('lock_timeout', '200ms', true)".into(),
        params: Vec::new(),
    };
    let others = to.sequences.iter().filter(|(name, _)| Some(*name) != last_name);
    let by_setval = others.map(|(name, value)| {
        let literal = sql::quote_literal(name);
        [
            soon.clone(),
            run(name, format!("ALTER SEQUENCE {name} RESTART")),
            run(name, format!("SELECT pg_catalog.setval({literal}, {value})")),
        ]
    });
    let by_nextval = last.map(|(name, value)| {
        let literal = sql::quote_literal(name);
        [
            soon.clone(),
            run(name, format!("ALTER SEQUENCE {name} RESTART {value}")),
            run(name, format!("SELECT pg_catalog.nextval({literal})")),
        ]
    });
    by_setval.chain(by_nextval).collect()
}

/// Startup parameters that give a login what RESET finds in `to`, where the `fresh` one has something else: the
/// defaults of roles and databases are those of now.
pub fn login_params(fresh: &Snapshot, to: &Snapshot, there: &Facts) -> Vec<(Vec<u8>, Vec<u8>)> {
    let (Some(has), Some(wants)) = (&fresh.beneath, &to.beneath) else { return Vec::new() };
    let names: BTreeSet<&String> = has.keys().chain(wants.keys()).collect();
    let differing = names.into_iter().filter(|name| has.get(*name) != wants.get(*name));
    let param = |name: &String| {
        let value = wants.get(name).or_else(|| there.resets.get(name))?;
        Some((name.clone().into_bytes(), value.clone().into_bytes()))
    };
    differing.filter_map(param).collect()
}

/// A copy waits for its session, longer than it may be idle.
pub const STAY: &str = "SELECT pg_catalog.set_config('idle_session_timeout', '0', false)";

/// Ends [`STAY`]: the session has the timeout that its login gave it, or its own.
pub fn idle_timeout_steps(to: &Snapshot, reference: &Facts) -> Vec<Step> {
    let Some(wanted) = idle_timeout(to, reference) else { return Vec::new() };
    let run = |sql: &str, params| Step::Run {
        what: format!("setting {IDLE_TIMEOUT}"),
        sql: sql.into(),
        params,
    };
    let own = "SELECT pg_catalog.set_config('idle_session_timeout', $1, false) \
        WHERE pg_catalog.current_setting('idle_session_timeout') OPERATOR(pg_catalog.<>) $1";
    vec![run("RESET idle_session_timeout", Vec::new()), run(own, vec![wanted.clone()])]
}

/// The `idle_session_timeout` of a session, as SHOW gives it; `0` for none.
pub fn idle_timeout<'a>(of: &'a Snapshot, reference: &'a Facts) -> Option<&'a String> {
    let configured = || reference.configured.get(IDLE_TIMEOUT).map(|one| &one.value);
    of.settings.get(IDLE_TIMEOUT).or_else(configured)
}

const IDLE_TIMEOUT: &str = "idle_session_timeout";

fn on_standby(from: &Snapshot, to: &Snapshot, reference: &Facts) -> Vec<Step> {
    // Settings are theirs; whatever was loaded before stays loaded.
    let load = |name: &String| Step::Run {
        what: format!("library {name}"),
        sql: format!("LOAD {}", sql::quote_literal(name)),
        params: Vec::new(),
    };
    let mut steps: Vec<Step> = to.libraries.iter().map(load).collect();
    let names: BTreeSet<&String> = from.settings.keys().chain(to.settings.keys()).collect();
    let wanted = |name: &String| {
        let value = match to.settings.get(name) {
            Some(value) => value,
            None => &reference.configured.get(name)?.value,
        };
        (from.settings.get(name) != Some(value)).then_some(value)
    };
    // temp_buffers can be set only before temporary tables are used, so nothing of ours may come before it.
    for name in names.iter().filter(|name| !LATE.contains(&name.as_str())) {
        if let Some(value) = wanted(name) {
            steps.push(set(format!("setting {name}"), name, value));
        }
    }
    for (name, value) in &to.custom {
        if from.custom.get(name) != Some(value) {
            steps.push(set_unless(format!("setting {name}"), name, value));
        }
    }
    if from.session_user != to.session_user {
        steps.push(set("session authorization".into(), "session_authorization", &to.session_user));
    }
    if from.role != to.role {
        steps.push(set("role".into(), "role", &to.role));
    }
    steps.extend(prepared_steps(from, to));
    for name in LATE {
        if let Some(name) = names.get(&name.to_owned())
            && let Some(value) = wanted(name)
        {
            steps.push(set(format!("setting {name}"), name, value));
        }
    }
    steps
}

/// The steps that prepare statements.
pub fn prepared_steps(from: &Snapshot, to: &Snapshot) -> Vec<Step> {
    let missing = to.prepared.iter().filter(|(name, one)| from.prepared.get(*name) != Some(*one));
    missing.map(|(name, prepared)| prepare(name, prepared)).collect()
}

/// The steps that make temporary objects again, with the rows of each table by its quoted name. All of them in one
/// transaction, under [`super::temporary::READ_FORMATS`]; statistics of the planner are made for those in `analyzed`.
pub fn temporary_steps(
    temporary: &Temporary,
    rows: &BTreeMap<String, Arc<Vec<u8>>>,
    analyzed: &BTreeSet<String>,
) -> Vec<Step> {
    let run = |what: &str, sql: String| Step::Run { what: what.into(), sql, params: Vec::new() };
    let mut owned: Vec<(&String, Step)> = Vec::new();
    let made = |one: &Statement| run("a temporary object", one.sql.clone());
    owned.extend(temporary.first.iter().map(|one| (&one.owner, made(one))));
    for table in &temporary.tables {
        if let Some(rows) = rows.get(&table.name).filter(|rows| !rows.is_empty()) {
            let what = format!("the rows of {}", table.name);
            let sql = format!("COPY {} FROM STDIN", table.name);
            owned.push((&table.owner, Step::Copy { what, sql, rows: rows.clone() }));
        }
    }
    for (name, position) in &temporary.sequences {
        let literal = sql::quote_literal(name);
        let (last, is_called) = (position.last_value, position.is_called);
        let sql = format!("SELECT pg_catalog.setval({literal}, {last}, {is_called})");
        owned.push((&position.owner, run(name, sql)));
    }
    owned.extend(temporary.then.iter().map(|one| (&one.owner, made(one))));
    for table in temporary.tables.iter().filter(|table| analyzed.contains(&table.name)) {
        owned.push((&table.owner, run("statistics", format!("ANALYZE {}", table.name))));
    }
    let (mut steps, mut role) = (Vec::new(), None);
    for (owner, step) in owned {
        if role != Some(owner) {
            steps.push(Step::Run {
                what: format!("the role `{owner}`"),
                sql: "SELECT pg_catalog.set_config('role', $1, true)".into(),
                params: vec![owner.clone()],
            });
            role = Some(owner);
        }
        steps.push(step);
    }
    // What the positions of sequences have left behind is no value of the session's own.
    steps.push(run("values of sequences", "DISCARD SEQUENCES".into()));
    steps
}

/// Settings that would be in the way of the steps after them: a timeout of a millisecond, a text encoding that is
/// not ours, an isolation level that a standby refuses.
const LATE: [&str; 9] = [
    "default_transaction_isolation",
    "default_transaction_read_only",
    "default_transaction_deferrable",
    "exit_on_error",
    "lock_timeout",
    "statement_timeout",
    "client_encoding",
    "transaction_timeout",
    // Between our statements the server is idle in our transaction.
    "idle_in_transaction_session_timeout",
];

fn set(what: String, name: &str, value: &str) -> Step {
    // The value is not sent back: it may be large.
    Step::Run {
        what,
        sql: "SELECT pg_catalog.set_config($1, $2, false) IS NULL".into(),
        params: vec![name.into(), value.into()],
    }
}

/// A library brings values of its own for its settings, which the session may not be allowed to set.
fn set_unless(what: String, name: &str, value: &str) -> Step {
    Step::Run {
        what,
        sql: "SELECT pg_catalog.set_config($1, $2, false) IS NULL \
              WHERE (pg_catalog.current_setting($1, true) OPERATOR(pg_catalog.=) $2) IS NOT TRUE"
            .into(),
        params: vec![name.into(), value.into()],
    }
}

fn lock(from: &Snapshot, to: &Snapshot) -> Vec<Step> {
    let mut steps = Vec::new();
    for (lock, count) in &to.locks {
        let function =
            if lock.shared { "pg_try_advisory_lock_shared" } else { "pg_try_advisory_lock" };
        for _ in from.locks.get(lock).copied().unwrap_or(0)..*count {
            // Not getting it must be an error, so that it is not overlooked. A CASE would not do: its constant
            // division is carried out by the planner.
            let sql = format!(
                "SELECT 1 OPERATOR(pg_catalog./) pg_catalog.{function}({})::pg_catalog.int4",
                lock.arguments()
            );
            steps.push(Step::Run {
                what: format!("advisory lock ({})", lock.arguments()),
                sql,
                params: Vec::new(),
            });
        }
    }
    steps
}

fn prepare(name: &str, prepared: &Prepared) -> Step {
    if prepared.from_sql {
        Step::Prepare { name: name.into(), sql: prepared.text.clone() }
    } else {
        Step::Parse { name: name.into(), sql: prepared.text.clone(), types: prepared.types.clone() }
    }
}

fn listen(from: &Snapshot, to: &Snapshot) -> Vec<Step> {
    let missing = to.channels.difference(&from.channels);
    missing
        .map(|channel| Step::Run {
            what: format!("listening on `{channel}`"),
            sql: format!("LISTEN {}", sql::quote_name(channel)),
            params: Vec::new(),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::facts::Configured;
    use super::super::snapshot::AdvisoryLock;
    use super::*;

    #[test]
    fn steps_come_in_the_order_that_rights_allow() {
        let configured = Configured { value: "4MB".into(), superuser: false };
        let reference =
            Facts { configured: [("work_mem".to_owned(), configured)].into(), ..Facts::default() };
        let mut from =
            Snapshot { role: "none".into(), session_user: "root".into(), ..Snapshot::default() };
        from.settings.insert("work_mem".into(), "8MB".into());
        let mut to =
            Snapshot { role: "reader".into(), session_user: "app".into(), ..Snapshot::default() };
        to.settings.insert("geqo".into(), "off".into());
        to.settings.insert("client_encoding".into(), "LATIN1".into());
        to.custom.insert("app.x".into(), "1".into());
        let prepared = |from_sql| Prepared { text: "t".into(), from_sql, types: vec!["23".into()] };
        to.prepared.insert("a".into(), prepared(false));
        to.prepared.insert("b".into(), prepared(true));
        to.locks.insert(AdvisoryLock { classid: 0, objid: 1, objsubid: 1, shared: true }, 2);
        to.channels.insert("Jobs".into());
        let what = |phase| -> Vec<String> {
            let steps = steps(&from, &to, phase, &reference);
            steps
                .into_iter()
                .map(|step| match step {
                    Step::Run { what, .. } => what,
                    Step::Prepare { name, .. } => format!("prepare {name}"),
                    Step::Parse { name, .. } => format!("parse {name}"),
                    Step::Copy { what, .. } => what,
                })
                .collect()
        };
        assert_eq!(
            what(Phase::Standby),
            [
                "setting geqo",
                "setting work_mem",
                "setting app.x",
                "session authorization",
                "role",
                "parse a",
                "prepare b",
                "setting client_encoding",
            ]
        );
        assert_eq!(
            what(Phase::Primary),
            [
                "advisory lock ('1'::pg_catalog.int8)",
                "advisory lock ('1'::pg_catalog.int8)",
                "listening on `Jobs`"
            ]
        );
        assert_eq!(steps(&to, &to, Phase::Standby, &reference), []);
    }

    #[test]
    fn a_login_brings_the_defaults_that_the_session_had() {
        let beneath = |pairs: &[(&str, &str)]| {
            let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
            Snapshot { beneath: Some(pairs.iter().map(own).collect()), ..Snapshot::default() }
        };
        let resets = BTreeMap::from([("geqo".to_owned(), "on".to_owned())]);
        let there = Facts { resets, ..Facts::default() };
        let fresh = beneath(&[("geqo", "off"), ("work_mem", "9216"), ("same", "1")]);
        let to = beneath(&[("work_mem", "3072"), ("same", "1")]);
        let params = login_params(&fresh, &to, &there);
        let pair = |name: &str, value: &str| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
        assert_eq!(params, [pair("geqo", "on"), pair("work_mem", "3072")]);
        assert_eq!(login_params(&to, &to, &there), []);
    }

    #[test]
    fn the_sequence_that_was_used_last_comes_last() {
        let mut to = Snapshot { last_value: Some(5), ..Snapshot::default() };
        to.sequences.insert("public.a".into(), 5);
        to.sequences.insert("public.b".into(), 9);
        let shown: Vec<String> = sequence_steps(&to)
            .into_iter()
            .flatten()
            .map(|step| match step {
                Step::Run { sql, .. } => sql,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(
            shown,
            [
                "SELECT pg_catalog.set_config('lock_timeout', '200ms', true)",
                "ALTER SEQUENCE public.b RESTART",
                "SELECT pg_catalog.setval('public.b', 9)",
                "SELECT pg_catalog.set_config('lock_timeout', '200ms', true)",
                "ALTER SEQUENCE public.a RESTART 5",
                "SELECT pg_catalog.nextval('public.a')",
            ]
        );
    }
}
