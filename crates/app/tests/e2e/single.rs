//! Sessions that move one by one, to a fresh connection of the server where they stand, while others go on.

use pg::Connection;
use wire::backend::{Backend, TxStatus};
use wire::frontend;
use wire::sqlstate::SqlState;

use crate::kinds::{KINDS, ROLES};
use crate::support::{Installation, run, shown, there_and_back, value};

#[tokio::test]
async fn every_kind_of_carried_state_is_the_same_on_a_fresh_connection() {
    let installation = Installation::start("single");
    run(&mut installation.connect().await, ROLES).await;
    let mut sessions = Vec::new();
    for (name, set_up, look) in KINDS.iter().filter(|(name, ..)| *name != "locks of every form") {
        let mut session = installation.connect().await;
        for sql in *set_up {
            run(&mut session, sql).await;
        }
        let before = value(&mut session, look).await;
        let pid = value(&mut session, "SELECT pg_backend_pid()").await;
        sessions.push((name, look, before, pid, session));
    }
    for _ in 0..2 {
        let output = installation.holdfast(&["move", "shop", "--all", "--to", "a"]);
        let text = shown(&output);
        assert!(output.status.success(), "{text}");
        for (name, look, before, pid, session) in &mut sessions {
            let now = value(session, "SELECT pg_backend_pid()").await;
            assert_ne!(now, *pid, "{name}");
            *pid = now;
            assert_eq!(value(session, look).await, *before, "{name}");
            assert_eq!(session.status, TxStatus::Idle);
        }
    }
}

#[tokio::test]
async fn a_session_stays_where_it_cannot_move_alone() {
    let installation = Installation::start("stays");
    let mut session = installation.connect().await;
    run(&mut session, "SELECT pg_advisory_lock(7)").await;
    let pid = value(&mut session, "SELECT pg_backend_pid()").await;
    let refused = |args: &[&str]| {
        let output = installation.holdfast(args);
        assert_eq!(output.status.code(), Some(1), "{}", shown(&output));
        shown(&output)
    };
    let text = refused(&["move", "shop", "--all", "--to", "a"]);
    assert!(text.contains("1 advisory locks are held"), "{text}");
    run(&mut session, "SELECT pg_advisory_unlock(7)").await;
    let text = refused(&["move", "shop", "--all", "--to", "b"]);
    assert!(text.contains("in_hot_standby is `off` where it stands"), "{text}");
    run(&mut session, "BEGIN; SELECT 1").await;
    let text = refused(&["move", "shop", "--all", "--to", "a", "--deadline", "200ms"]);
    assert!(text.contains("a transaction is open"), "{text}");
    run(&mut session, "COMMIT").await;
    let text = refused(&["move", "shop", "--session", "99", "--to", "a"]);
    assert!(text.contains("has no session 99"), "{text}");
    assert_eq!(value(&mut session, "SELECT pg_backend_pid()").await, pid);
}

/// To restore a value takes a lock on the sequence. Somebody has used it and not committed: nobody is kept waiting.
#[tokio::test]
async fn a_sequence_in_use_keeps_a_session_where_it_is_and_nobody_waiting() {
    let installation = Installation::start("sequence-in-use");
    let mut session = installation.connect().await;
    run(&mut session, "CREATE TABLE counted (n serial); INSERT INTO counted DEFAULT VALUES").await;
    let mut other = installation.direct("a").await;
    run(&mut other, "BEGIN; INSERT INTO counted DEFAULT VALUES").await;
    let output = installation.holdfast(&["move", "shop", "--all", "--to", "a"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(shown(&output).contains("lock timeout"), "{}", shown(&output));
    let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted";
    assert_eq!(value(&mut other, waiting).await, "0");
    assert_eq!(value(&mut session, "SELECT lastval()").await, "1");
    run(&mut other, "COMMIT").await;
    let output = installation.holdfast(&["move", "shop", "--all", "--to", "a"]);
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(value(&mut session, "SELECT lastval()").await, "1");
}

/// What is too large to be read keeps a session where it is, and as it is.
#[tokio::test]
async fn a_value_that_is_too_large_keeps_a_session_where_it_is() {
    let installation = Installation::start("too-large");
    for (sql, look) in [
        ("CREATE TEMP TABLE t AS SELECT repeat('x', 70000000) AS a", "SELECT length(a) FROM t"),
        (
            "DECLARE c SCROLL CURSOR WITH HOLD FOR SELECT length(repeat('x', 70000000)), repeat('x', 70000000)",
            "MOVE c; SELECT 1",
        ),
    ] {
        let mut session = installation.connect().await;
        run(&mut session, sql).await;
        let output = installation.holdfast(&["move", "shop", "--all", "--to", "a"]);
        assert_eq!(output.status.code(), Some(1), "{}", shown(&output));
        run(&mut session, look).await;
    }
}

/// Nothing is left of a transaction that has failed but that it has; one with a savepoint can still go on.
#[tokio::test]
async fn a_failed_transaction_is_failed_wherever_its_session_stands() {
    let installation = Installation::start("failed-transaction");
    let mut session = installation.connect().await;
    let fail = async |session: &mut Connection, sql: &str| {
        assert!(session.query(sql).await.is_err());
        assert_eq!(session.status, TxStatus::Failed);
    };
    run(&mut session, "SET work_mem = '5MB'; CREATE TEMP TABLE mine AS SELECT 7 AS n").await;
    let aborted = Some(SqlState(*b"25P02"));
    for command in ["move shop --all --to a", "sessions shop --pinned", "switchover shop --to b"] {
        fail(&mut session, "BEGIN; SET work_mem = '6MB'; SELECT 1/0").await;
        let args: Vec<&str> = command.split(' ').collect();
        let output = installation.holdfast(&args);
        let text = shown(&output);
        assert!(output.status.success() || there_and_back().len() == 1, "{command}: {text}");
        let refused = session.query("SELECT 1").await.unwrap_err();
        assert_eq!(refused.sqlstate(), aborted, "{command}");
        let answers = session.query("COMMIT").await.unwrap();
        assert_eq!(answers[0].tag, "ROLLBACK", "{command}");
        assert_eq!(value(&mut session, "SHOW work_mem").await, "5MB", "{command}");
        assert_eq!(value(&mut session, "SELECT n FROM mine").await, "7", "{command}");
    }
    fail(&mut session, "BEGIN; SAVEPOINT here; SELECT 1/0").await;
    let cell = "b";
    let args = ["move", "shop", "--all", "--to", cell, "--deadline", "100ms"];
    let text = shown(&installation.holdfast(&args));
    assert!(text.contains("a failed transaction is open"), "{text}");
    run(&mut session, "ROLLBACK TO here; COMMIT").await;
    fail(&mut session, "BEGIN READ ONLY; SELECT 1/0").await;
    let text = shown(&installation.holdfast(&args));
    assert!(text.contains("a failed transaction is open"), "{text}");
}

/// A notifier goes on while its listener moves again and again: each notification comes once, in order.
#[tokio::test]
async fn no_notification_is_lost_or_comes_twice() {
    let installation = Installation::start("listener");
    let mut listener = installation.connect().await;
    run(&mut listener, "LISTEN jobs").await;
    let mut notifier = installation.direct("a").await;
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let go_on = stop.clone();
    let notifying = tokio::spawn(async move {
        let mut sent = 0;
        while !go_on.load(std::sync::atomic::Ordering::SeqCst) {
            run(&mut notifier, &format!("NOTIFY jobs, '{sent}'")).await;
            sent += 1;
        }
        run(&mut notifier, "NOTIFY jobs, 'end'").await;
        sent
    });
    for _ in 0..10 {
        let args = ["move", "shop", "--all", "--to", "a"];
        let output = installation.holdfast_in_background(&args).await.unwrap();
        assert!(output.status.success(), "{}", shown(&output));
    }
    stop.store(true, std::sync::atomic::Ordering::SeqCst);
    let sent: usize = notifying.await.unwrap();
    let mut heard = Vec::new();
    loop {
        let message = listener.receive().await.unwrap();
        let Backend::Notification { payload, .. } = message.view().unwrap() else { continue };
        let payload = String::from_utf8_lossy(payload).into_owned();
        if payload == "end" {
            break;
        }
        heard.push(payload);
    }
    let wanted: Vec<String> = (0..sent).map(|number| number.to_string()).collect();
    let at = heard.iter().zip(&wanted).position(|(a, b)| a != b);
    let around = at.map(|at| &heard[at.saturating_sub(3)..(at + 3).min(heard.len())]);
    assert_eq!((heard.len(), around), (wanted.len(), None));
}

/// A message may begin at the end of what has arrived: what it is about is not guessed. And what the server says about
/// questions of ours is not the client's.
#[tokio::test]
async fn long_statements_move_although_their_headers_came_alone() {
    let installation = Installation::start("alone");
    let mut session = installation.connect().await;
    run(&mut session, "SET client_min_messages = log; SET log_statement = 'all'").await;
    for (number, name) in [(1, b"".as_slice()), (2, b""), (3, b"named")] {
        let mut out = Vec::new();
        let text = format!("SELECT {number} /* {} */", "x".repeat(40_000));
        frontend::parse(&mut out, name, text.as_bytes(), &[]);
        frontend::sync(&mut out);
        session.send(&out[..5]).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        session.send(&out[5..]).await.unwrap();
        session.answers().await.unwrap();
    }
    let output = installation.holdfast(&["move", "shop", "--all", "--to", "a"]);
    assert!(output.status.success(), "{}", shown(&output));
    for (name, expected) in [(b"".as_slice(), "2"), (b"named", "3")] {
        let mut out = Vec::new();
        frontend::bind_text(&mut out, b"", name, &[]);
        frontend::execute(&mut out, b"", 0);
        frontend::sync(&mut out);
        session.send(&out).await.unwrap();
        loop {
            let message = session.receive().await.unwrap();
            match message.view().unwrap() {
                Backend::DataRow(values) => assert_eq!(values[0], Some(expected.as_bytes())),
                Backend::Notice(fields) => {
                    assert!(!fields.message().contains("holdfast"), "{}", fields.message());
                }
                Backend::Ready(_) => break,
                _ => (),
            }
        }
    }
}
