//! Holdfast is killed at the begin and at the end of every stage of a switchover. Started again, it goes back
//! before the grant and forward after it; the store, the servers and what clients can do agree.

use crate::agents::wait_protected;
use crate::support::{Installation, run, shown, value};

const STAGES: [(&str, bool); 10] = [
    ("prepare", false),
    ("hold", false),
    ("fence", false),
    ("capture", false),
    ("catch_up", false),
    ("grant", true),
    ("promote", true),
    ("attach", true),
    ("release", true),
    ("rejoin", true),
];

#[tokio::test]
async fn a_crash_at_any_step_finds_its_way() {
    let mut installation = Installation::start("crash");
    run(&mut installation.connect().await, "CREATE TABLE t (n serial)").await;
    let (mut active, mut other, mut epoch) = ("a", "b", 1);
    let mut written = 0;
    crate::support::signal(installation.pid(), "KILL");
    installation.wait_crashed();
    for (stage, granted) in STAGES {
        for at in ["begin", "end"] {
            let point = format!("{stage}:{at}");
            installation.restart(&[("HOLDFAST_CRASH_AT", &point)]);
            run(&mut installation.connect().await, "INSERT INTO t DEFAULT VALUES").await;
            written += 1;
            let output =
                installation.holdfast(&["switchover", "shop", "--to", other, "--deadline", "5s"]);
            assert_eq!(output.status.code(), Some(1), "{point}: {}", shown(&output));
            installation.wait_crashed();

            installation.restart(&[]);
            if granted {
                std::mem::swap(&mut active, &mut other);
                epoch += 1;
            }
            if stage == "rejoin" {
                // Nobody waits for it: clients are served meanwhile.
                wait_protected(&installation).await;
            }
            let status = shown(&installation.holdfast(&["status", "shop"]));
            assert!(
                status.contains(&format!("active cell {active}, epoch {epoch}")),
                "{point}: {status}"
            );
            assert!(!status.contains('!'), "{point}: {status}");
            let executions = shown(&installation.holdfast(&["executions"]));
            let ended = if granted { "completed" } else { "aborted" };
            let newest = executions.lines().nth(1).unwrap();
            assert!(newest.contains(ended), "{point}: {executions}");
            // Clients write on the active cell, and see all that was acknowledged.
            let mut client = installation.connect().await;
            run(&mut client, "INSERT INTO t DEFAULT VALUES").await;
            written += 1;
            assert_eq!(
                value(&mut client, "SELECT count(*) FROM t").await,
                written.to_string(),
                "{point}"
            );
            assert_eq!(
                value(&mut client, "SHOW default_transaction_read_only").await,
                "off",
                "{point}"
            );
            // The server that is not active takes no writes from whomever.
            let mut passive = installation.direct(other).await;
            assert!(passive.query("INSERT INTO t DEFAULT VALUES").await.is_err(), "{point}");
            crate::support::signal(installation.pid(), "KILL");
            installation.wait_crashed();
        }
    }
    installation.restart(&[]);
}

/// Killed in the middle of a fence it goes back or on, in the middle of a new grant it goes on; a fenced cell is still fenced
/// after it, and its clients are served.
#[tokio::test]
async fn a_crash_in_a_fence_finds_its_way() {
    let mut installation = Installation::start("crash-fence");
    run(&mut installation.connect().await, "CREATE TABLE t (n serial); INSERT INTO t VALUES (0)")
        .await;
    let mut epoch = 1;
    crate::support::signal(installation.pid(), "KILL");
    installation.wait_crashed();
    for (stage, is_fenced) in
        [("hold", false), ("fence", false), ("confine", true), ("release", true)]
    {
        for at in ["begin", "end"] {
            let point = format!("{stage}:{at}");
            installation.restart(&[("HOLDFAST_CRASH_AT", &point)]);
            let output = installation.holdfast(&["fence", "shop", "a", "--deadline", "5s"]);
            assert_eq!(output.status.code(), Some(1), "{point}: {}", shown(&output));
            installation.wait_crashed();
            for after in ["regrant:begin", "regrant:end", "release:begin", "release:end"] {
                installation.restart(&[("HOLDFAST_CRASH_AT", after)]);
                let mut client = installation.connect().await;
                let status = shown(&installation.holdfast(&["status", "shop"]));
                assert_eq!(
                    status.contains("holdfast unfence shop a"),
                    is_fenced,
                    "{point}: {status}"
                );
                let write = client.query("INSERT INTO t DEFAULT VALUES").await;
                assert_eq!(write.is_err(), is_fenced, "{point}");
                assert!(value(&mut client, "SELECT count(*) FROM t").await != "0", "{point}");
                if !is_fenced {
                    crate::support::signal(installation.pid(), "KILL");
                    installation.wait_crashed();
                    break;
                }
                let output = installation.holdfast(&["unfence", "shop", "a"]);
                assert_eq!(output.status.code(), Some(1), "{point} {after}: {}", shown(&output));
                installation.wait_crashed();
                epoch += 1;
                // What was begun comes to its end.
                installation.restart(&[]);
                let status = shown(&installation.holdfast(&["status", "shop"]));
                assert!(
                    status.contains(&format!("active cell a, epoch {epoch}"))
                        && !status.contains('!'),
                    "{point} {after}: {status}"
                );
                let mut client = installation.connect().await;
                run(&mut client, "INSERT INTO t DEFAULT VALUES").await;
                let mut direct = installation.direct("a").await;
                run(&mut direct, "INSERT INTO t DEFAULT VALUES").await;
                let output = installation.holdfast(&["fence", "shop", "a"]);
                assert!(output.status.success(), "{}", shown(&output));
                crate::support::signal(installation.pid(), "KILL");
                installation.wait_crashed();
            }
            installation.restart(&[]);
            if is_fenced {
                let output = installation.holdfast(&["unfence", "shop", "a"]);
                assert!(output.status.success(), "{}", shown(&output));
                epoch += 1;
            }
            crate::support::signal(installation.pid(), "KILL");
            installation.wait_crashed();
        }
    }
    installation.restart(&[]);
}

/// An old copy of the store does not say who is active: nobody is, until a person says so, and not of a standby.
#[tokio::test]
async fn an_old_copy_of_the_store_makes_nobody_active() {
    let mut installation = Installation::start("restored");
    run(&mut installation.connect().await, "CREATE TABLE t (n serial)").await;
    let config = installation.config().display().to_string();
    let copy = installation.dir.join("copy").display().to_string();
    let store = |installation: &Installation, args: &[&str]| {
        let output = installation.holdfast(&[&["store"], args, &["-c", &config]].concat());
        (output.status.code(), shown(&output))
    };
    assert_eq!(store(&installation, &["backup", "--to", &copy]).0, Some(0));
    assert_eq!(store(&installation, &["backup", "--to", &copy]).0, Some(1));
    installation.switch_to("b");
    run(&mut installation.connect().await, "INSERT INTO t DEFAULT VALUES").await;
    let (code, text) = store(&installation, &["restore", "--from", &copy]);
    assert!(code == Some(1) && text.contains("is in use"), "{text}");
    crate::support::signal(installation.pid(), "KILL");
    installation.wait_crashed();
    let (code, text) = store(&installation, &["restore", "--from", &copy]);
    assert!(code == Some(0) && text.contains("shop: epoch 1001, no cell is active"), "{text}");
    installation.restart(&[]);
    let status = shown(&installation.holdfast(&["status", "shop"]));
    assert!(
        status.contains("active cell none") && status.contains("unfence shop CELL"),
        "{status}"
    );
    let output = installation.holdfast(&["unfence", "shop", "a"]);
    assert!(shown(&output).contains("in recovery, not a primary"), "{}", shown(&output));
    let output = installation.holdfast(&["unfence", "shop", "b"]);
    assert!(output.status.success(), "{}", shown(&output));
    let mut client = installation.connect().await;
    run(&mut client, "INSERT INTO t DEFAULT VALUES").await;
    assert_eq!(value(&mut client, "SELECT count(*) FROM t").await, "2");
    let status = shown(&installation.holdfast(&["status", "shop"]));
    assert!(status.contains("active cell b, epoch 1002"), "{status}");
    installation.switch_to("a");
    run(&mut client, "INSERT INTO t DEFAULT VALUES").await;
}

/// Before the grant it is fenced as it was, after it the other is active, and in between nobody writes.
#[tokio::test]
async fn a_crash_in_a_switchover_of_a_fenced_cell_finds_its_way() {
    let mut installation = Installation::start("crash-residual");
    run(&mut installation.connect().await, "CREATE TABLE t (n serial); INSERT INTO t VALUES (0)")
        .await;
    crate::support::signal(installation.pid(), "KILL");
    installation.wait_crashed();
    let (mut from, mut to) = ("a", "b");
    for (point, is_past) in [
        ("hold:begin", false),
        ("capture:begin", false),
        ("capture:end", false),
        ("fence:end", false),
        ("grant:begin", true),
        ("revert:begin", false),
        ("cover:set", false),
        ("cover:opened", false),
        ("cover:narrowed", false),
        ("promote:end", true),
    ] {
        installation.restart(&[]);
        assert!(installation.holdfast(&["fence", "shop", from]).status.success(), "{point}");
        crate::support::signal(installation.pid(), "KILL");
        installation.wait_crashed();
        // Those of the way back come after another.
        let is_of_way_back = point.starts_with("cover");
        let first = if is_of_way_back { "capture:end" } else { point };
        installation.restart(&[("HOLDFAST_CRASH_AT", first)]);
        let mut busy = installation.connect().await;
        if point == "revert:begin" {
            run(&mut busy, "BEGIN; SELECT 1").await;
        }
        let args = ["switchover", "shop", "--to", to, "--deadline", "300ms"];
        let output = installation.holdfast(&args);
        assert_eq!(output.status.code(), Some(1), "{point}: {}", shown(&output));
        installation.wait_crashed();
        if is_of_way_back {
            // Nobody but Holdfast comes in while it is uncovered.
            let mut here = installation.direct(from).await;
            assert_eq!(value(&mut here, "SHOW default_transaction_read_only").await, "off");
            run(&mut here, "CREATE ROLE nobody LOGIN").await;
            let server = installation.facts.servers[from];
            assert!(crate::support::connect(server, "nobody", None).await.is_err(), "{point}");
            run(&mut here, "DROP ROLE nobody").await;
            installation.crash_at_start(point);
        }
        installation.restart(&[]);
        let mut direct = installation.direct(from).await;
        if !is_past {
            let shown = value(&mut direct, "SHOW default_transaction_read_only").await;
            assert_eq!(shown, "on", "{point}");
            let hba = std::fs::read_to_string(installation.dir.join(from).join("pg_hba.conf"));
            assert!(hba.unwrap().starts_with(pg::member::HBA_MARK), "{point}");
        }
        drop(direct);
        let mut client = installation.connect().await;
        let write = client.query("INSERT INTO t DEFAULT VALUES").await;
        assert_eq!(write.is_ok(), is_past, "{point}: {write:?}");
        let is_fenced = value(&mut client, "SHOW default_transaction_read_only").await;
        assert_eq!(is_fenced == "off", is_past, "{point}");
        if !is_past {
            let output = installation.holdfast(&["switchover", "shop", "--to", to]);
            assert!(output.status.success(), "{point}: {}", shown(&output));
            let write = client.query("INSERT INTO t DEFAULT VALUES").await;
            assert!(write.is_ok(), "{point}: {write:?} {}", shown(&output));
        }
        (from, to) = (to, from);
        crate::support::signal(installation.pid(), "KILL");
        installation.wait_crashed();
    }
    installation.restart(&[]);
}

/// A switchover of a fenced cell has taken its fence off for itself, and both control and the server are lost; then a failover is
/// lost as well. The server comes back fenced.
#[tokio::test]
async fn a_fenced_cell_stays_fenced_through_two_attempts_that_are_lost() {
    let mut installation = Installation::start("crash-twice");
    run(&mut installation.connect().await, "CREATE TABLE t (n serial)").await;
    assert!(installation.holdfast(&["fence", "shop", "a"]).status.success());
    crate::support::signal(installation.pid(), "KILL");
    installation.wait_crashed();
    installation.restart(&[("HOLDFAST_CRASH_AT", "capture:end")]);
    drop(installation.holdfast(&["switchover", "shop", "--to", "b"]));
    installation.wait_crashed();
    let mut direct = installation.direct("a").await;
    assert_eq!(value(&mut direct, "SHOW default_transaction_read_only").await, "off");
    installation.signal_server("a", "KILL");
    installation.restart(&[("HOLDFAST_CRASH_AT", "recruit:begin")]);
    drop(installation.holdfast(&["failover", "shop", "--to", "b"]));
    installation.wait_crashed();
    installation.restart(&[]);
    let fenced = async || {
        let server = installation.facts.servers["a"];
        let Ok(mut direct) = crate::support::connect(server, "postgres", None).await else {
            return false;
        };
        let row = direct.value("SHOW default_transaction_read_only").await;
        row.is_ok_and(|value| value.as_deref() == Some("on"))
    };
    crate::agents::wait_until("the fence", fenced).await;
    let mut client = installation.connect().await;
    assert!(client.query("INSERT INTO t DEFAULT VALUES").await.is_err());
    assert_eq!(value(&mut client, "SELECT count(*) FROM t").await, "0");
    let output = installation.holdfast(&["unfence", "shop", "a"]);
    assert!(output.status.success(), "{}", shown(&output));
    run(&mut client, "INSERT INTO t DEFAULT VALUES").await;
}
