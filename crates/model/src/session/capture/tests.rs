//! Answers of servers, right and wrong, and what is made of them.

use super::super::facts::{Configured, Sequence};
use super::*;

fn row(cells: &[&str]) -> Row {
    cells.iter().map(|cell| (!cell.is_empty()).then(|| (*cell).to_owned())).collect()
}

fn subject<'a>(facts: &'a Facts, custom: &'a BTreeSet<String>) -> Subject<'a> {
    Subject {
        version: ServerVersion(150_000),
        custom,
        libraries: const { &BTreeSet::new() },
        login_role: None,
        setval: false,
        facts,
        reference: facts,
        temporary_max: 0,
        beneath: false,
        in_recovery: false,
        alone: false,
    }
}

fn read_with(facts: &Facts, settings: &[Row], state: &[Row], infos: &[&str]) -> Captured {
    let aside = row(&["0", "0", "\"$user\", public", "on", "off", "UTF8", "none", "app", "99"]);
    let answers = [vec![], vec![aside], vec![], settings.to_vec(), state.to_vec()];
    let infos: Vec<String> = infos.iter().map(|info| (*info).to_owned()).collect();
    let custom = BTreeSet::new();
    let rows = |at: usize| answers.get(at).map(Vec::as_slice).unwrap_or_default();
    let mut captured = read(&subject(facts, &custom), rows, &infos).unwrap();
    captured.complete(facts, 7);
    captured
}

fn sequence(name: &str) -> Sequence {
    Sequence { name: name.into(), min: 1, max: 100 }
}

fn codes(captured: &Captured) -> Vec<&'static str> {
    captured.pins.iter().map(Pin::code).collect()
}

#[test]
fn versions_are_read_as_servers_report_them() {
    let read = |text| ServerVersion::read(text).map(|version| version.0);
    assert_eq!(read("15.20 (Debian 15.20-0+deb12u1)"), Some(150_020));
    assert_eq!(read("18beta1"), Some(180_000));
    assert_eq!(read("x"), None);
}

#[test]
fn answers_become_a_snapshot() {
    let mut facts = Facts::default();
    let configured = |value: &str| Configured { value: value.into(), superuser: false };
    facts.configured.insert("work_mem".into(), configured("4MB"));
    facts.configured.insert("geqo".into(), configured("on"));
    facts.fixed.insert("port".into());
    let lock = AdvisoryLock { classid: 0, objid: 42, objsubid: 1, shared: false };
    facts.backends.entry(7).or_default().locks.insert(lock, 1);
    let settings = [
        row(&["work_mem", "8MB", "why"]),
        row(&["geqo", "on", "why"]),
        row(&["port", "5432", "why"]),
        row(&["statement_timeout", "0", "set aside"]),
        row(&["pg_trgm.similarity_threshold", "0.4", "why"]),
    ];
    let state = [
        row(&["prepared", "p1", "select $1", "false", "23"]),
        row(&["channel", "jobs"]),
        row(&["custom", "app.user", "7"]),
    ];
    facts.sequences.insert(40, sequence("public.\"odd name\""));
    let infos = ["holdfast: lastval 5", "holdfast: currval t 5 40"];
    let captured = read_with(&facts, &settings, &state, &infos);
    assert_eq!(captured.pins, []);
    let snapshot = captured.snapshot;
    assert_eq!(snapshot.settings["work_mem"], "8MB");
    assert!(!snapshot.settings.contains_key("geqo") && !snapshot.settings.contains_key("port"));
    assert_eq!(snapshot.prepared["p1"].types, ["23"]);
    assert_eq!(snapshot.custom["app.user"], "7");
    assert_eq!(snapshot.custom["pg_trgm.similarity_threshold"], "0.4");
    assert_eq!(snapshot.locks.len(), 1);
    assert_eq!((snapshot.role.as_str(), snapshot.session_user.as_str()), ("none", "app"));
    assert_eq!(snapshot.sequences["public.\"odd name\""], 5);
    assert_eq!(snapshot.last_value, Some(5));
}

#[test]
fn rows_that_say_what_is_configured_do_not_matter() {
    let mut facts = Facts::default();
    let configured = Configured { value: "4MB".into(), superuser: false };
    facts.configured.insert("work_mem".into(), configured);
    facts.fixed.insert("port".into());
    let custom = BTreeSet::new();
    let subject = subject(&facts, &custom);
    let matters = |answer, name: &str, value: &str| {
        matters(&subject, answer, &[Some(name.as_bytes()), Some(value.as_bytes()), None])
    };
    assert!(!matters(ANSWER_SETTINGS, "work_mem", "4MB"));
    assert!(!matters(ANSWER_SETTINGS, "port", "5432"));
    assert!(matters(ANSWER_SETTINGS, "work_mem", "8MB"));
    assert!(matters(ANSWER_SETTINGS, "geqo", "on"));
    assert!(matters(ANSWER_STATE, "work_mem", "4MB"));
}

#[test]
fn what_cannot_be_carried_pins() {
    let mut facts = Facts::default();
    facts.backends.entry(7).or_default().slots.push("s".into());
    facts.backends.entry(8).or_default().slots.push("of another".into());
    facts.pins.push(Pin::StatefulLanguage { language: "plperl".into() });
    let state = [
        row(&["cursor", "c", "true", "true"]),
        row(&["cursor", "d", "false", "false"]),
        row(&[
            "prepared",
            "a",
            "prepare a as select 1; deallocate a; prepare a as select 2",
            "true",
            "{}",
        ]),
        row(&["prepared", "b", "PREPARE b AS select 2", "true", "{}"]),
    ];
    let captured = read_with(&facts, &[], &state, &["holdfast: replication origin"]);
    assert_eq!(
        codes(&captured),
        ["hold_cursor", "prepared", "replication_origin", "stateful_language", "temporary_slot"]
    );
}

#[test]
fn values_of_sequences_pin_where_they_cannot_be_restored() {
    let mut facts = Facts::default();
    facts.sequences.insert(40, sequence("public.s"));
    let pins = |facts: &Facts, infos: &[&str]| codes(&read_with(facts, &[], &[], infos));
    assert_eq!(pins(&facts, &["holdfast: currval f 5 40"]), ["sequences"]);
    assert_eq!(pins(&facts, &["holdfast: currval t 500 40"]), ["sequences"]);
    assert_eq!(pins(&facts, &["holdfast: lastval 5"]), ["sequences"]);
    assert_eq!(pins(&facts, &["holdfast: lastval 5", "holdfast: currval t 6 40"]), ["sequences"]);
    assert_eq!(pins(&facts, &["holdfast: lastval hidden"]), ["sequences"]);
    assert!(pins(&facts, &["holdfast: currval t 5 40"]).is_empty());
    // Dropped meanwhile.
    assert!(pins(&facts, &["holdfast: currval t 5 41"]).is_empty());
    facts.sequences_refused = Some("of a trigger".into());
    assert_eq!(pins(&facts, &["holdfast: currval t 5 40"]), ["sequences"]);
}

#[test]
fn real_numbers_that_may_be_rounded_pin() {
    let facts = Facts::default();
    let pins = |value: &str| codes(&read_with(&facts, &[row(&["x.y", value, "why"])], &[], &[]));
    assert_eq!(pins("0.333333"), ["refused"]);
    assert_eq!(pins("1.23457e+06"), ["refused"]);
    for value in ["0.3", "1.1", "1234567", "4MB", "10.1.2.3", "0.00001", "on", "-1"] {
        assert!(pins(value).is_empty(), "{value}");
    }
}

#[test]
fn a_server_that_answers_otherwise_is_an_error() {
    let (facts, custom) = (Facts::default(), BTreeSet::new());
    let subject = subject(&facts, &custom);
    assert!(read(&subject, |_| &[], &[]).is_err());
    let aside = [row(&["0", "0", "x", "on", "off", "UTF8", "none", "app", "0"])];
    for state in [row(&["surprise"]), row(&["prepared", "p", "x", "true"]), row(&["channel"])] {
        let state = [state];
        let rows = |at: usize| match at {
            ANSWER_PUT_ASIDE => aside.as_slice(),
            ANSWER_STATE => state.as_slice(),
            _ => &[],
        };
        assert!(read(&subject, rows, &[]).is_err());
    }
}

#[test]
fn names_of_custom_settings_are_quoted_as_an_array() {
    let facts = Facts::default();
    let custom = ["a.\"b\\".to_owned(), "c.d".to_owned()].into();
    let questions = questions(&subject(&facts, &custom));
    assert_eq!(questions.0[ANSWER_STATE].1, ["{\"a.\\\"b\\\\\",\"c.d\"}"]);
}

#[test]
fn counts_of_locks_are_read_from_their_messages() {
    let lock = AdvisoryLock { classid: 0, objid: 42, objsubid: 1, shared: true };
    let message = "holdfast: lock 0 42 1 ShareLock 3";
    assert_eq!(read_lock_count(message), Some((lock, 3)));
    assert_eq!(read_lock_count("something else"), None);
}
