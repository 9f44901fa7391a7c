//! What a lost server alone had is told row by row.

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Command;
use std::time::{Duration, Instant};

use pg::connection::Connection;
use tls::{ClientTls, SslMode};

use crate::failover::{files_elsewhere, stop_receiving, wait_active};
use crate::support::{Installation, connect, login, run, shown, value};

/// Every way in which rows are written, in transactions that end in every way; also in one that began while the standby followed.
#[tokio::test]
async fn rows_that_only_a_lost_server_had_are_kept() {
    let mut installation = Installation::start_pooled("lost-rows", 4);
    files_elsewhere(&mut installation, "b");
    let mut direct = installation.direct("a").await;
    run(&mut direct, "CREATE DATABASE other").await;
    run(&mut direct, "CREATE TABLE t (n int PRIMARY KEY, x text)").await;
    run(&mut direct, "CREATE TABLE odd (n int)").await;
    run(&mut direct, "ALTER TABLE odd RENAME TO \"odd \"\"\tname\"").await;
    run(&mut direct, "CREATE TABLE gone (n int)").await;
    run(&mut direct, "INSERT INTO t SELECT g, 'old' || g FROM generate_series(1, 10) g").await;
    let other = async || {
        let tls = ClientTls::load(SslMode::Disable, None, None).unwrap();
        let port = installation.facts.servers["a"];
        login(port, "postgres", None, tls, &[("database", "other")]).await.unwrap()
    };
    run(&mut other().await, "CREATE TABLE u (n int, x text)").await;
    let mut early = installation.direct("a").await;
    run(&mut early, "BEGIN").await;
    run(&mut early, "INSERT INTO t VALUES (100, 'early')").await;
    stop_receiving(&installation).await;
    for sql in [
        "INSERT INTO t SELECT g, 'new, \"quoted\"' || g FROM generate_series(11, 13) g",
        "UPDATE t SET x = 'first' WHERE n = 3",
        "UPDATE t SET x = 'last' WHERE n = 3",
        "UPDATE t SET x = NULL WHERE n = 5",
        "DELETE FROM t WHERE n IN (4, 11)",
        "COPY t FROM PROGRAM 'printf \"21\\\\tcopied\\\\n22\\\\tcopied\\\\n\"'",
        "BEGIN; SAVEPOINT a; INSERT INTO t VALUES (30, 'kept'); RELEASE a; SAVEPOINT b; INSERT INTO t VALUES (31, 'not'); ROLLBACK TO b; COMMIT",
        "BEGIN; INSERT INTO t VALUES (32, 'not'); ROLLBACK",
        "INSERT INTO t VALUES (40, repeat('long', 100000))",
        "INSERT INTO \"odd \"\"\tname\" VALUES (1)",
        "INSERT INTO gone VALUES (1)",
        "DROP TABLE gone",
    ] {
        run(&mut direct, sql).await;
    }
    run(&mut other().await, "INSERT INTO u VALUES (7, 'there')").await;
    run(&mut early, "INSERT INTO t VALUES (101, 'late')").await;
    run(&mut early, "COMMIT").await;
    // Never to be committed by anybody.
    run(&mut early, "BEGIN").await;
    run(&mut early, "INSERT INTO t VALUES (102, 'not')").await;
    installation.signal_server("a", "KILL");
    let lose = ["failover", "shop", "--to", "b", "--allow-data-loss"];
    let text = shown(&installation.holdfast_in_background(&lose).await.unwrap());
    wait_active(&installation, "b").await;
    let kept = installation.dir.join("state/lost/shop-1");
    let rows = std::fs::read_to_string(kept.join("rows.txt")).unwrap_or_else(|_| panic!("{text}"));
    let csv = |table: &str| -> Vec<String> {
        let line = rows.lines().find(|line| line.starts_with(table)).expect(&rows);
        let path = kept.join(line.split_once(" rows in ").expect(line).1);
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let text = std::fs::read_to_string(path).unwrap();
        let mut lines: Vec<String> =
            text.lines().map(|line| line.chars().take(40).collect()).collect();
        lines.get_mut(1..).unwrap().sort();
        lines
    };
    let expected = [
        "n,x",
        "100,early",
        "101,late",
        "12,\"new, \"\"quoted\"\"12\"",
        "13,\"new, \"\"quoted\"\"13\"",
        "21,copied",
        "22,copied",
        "3,last",
        "30,kept",
        "40,longlonglonglonglonglonglonglonglongl",
        "5,",
    ];
    assert_eq!(csv("public.t of postgres"), expected, "{rows}");
    assert_eq!(csv("public.u of other"), ["n,x", "7,there"], "{rows}");
    assert_eq!(csv("public.\"odd"), ["n", "1"], "{rows}");
    assert!(rows.contains("9 inserted, 3 updated, 2 deleted; 10 rows"), "{rows}");
    assert!(rows.contains("1 inserted, 0 updated, 0 deleted; not read: it is gone"), "{rows}");
    assert!(rows.contains("changes of catalogs"), "{rows}");
    assert_eq!(kept.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    assert!(!installation.dir.join("a.holdfast-rows").exists());
    // What was deleted there is here still, and can be looked at.
    let deleted = std::fs::read_to_string(kept.join("deleted.sql")).unwrap();
    let (_, sql) = deleted.trim_end().split_once('\n').expect(&deleted);
    let mut new = installation.direct("b").await;
    let found = new.query(sql).await.unwrap();
    let found: Vec<_> = found.first().unwrap().rows.iter().map(|row| row[2].clone()).collect();
    assert_eq!(found, [Some("4".to_owned())], "{deleted}");
    let report = shown(&installation.holdfast(&["executions", "1", "--report"]));
    assert!(report.contains("public.t of postgres: 9 inserted"), "{report}");
}

/// Who asks for a failover loses nothing where the host of the server that has crashed lives: its agent has the log.
#[tokio::test]
async fn what_a_lost_servers_host_has_is_handed_over() {
    let mut installation = Installation::start_with_agents("lost-handed");
    installation.reconfigure(|text| text.replacen("automatic = true", "automatic = false", 1));
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE written (n int, x text)").await;
    stop_receiving(&installation).await;
    // More than one file of it.
    run(
        &mut client,
        "INSERT INTO written SELECT g, repeat('x', 1000) FROM generate_series(1, 30000) g",
    )
    .await;
    run(&mut client, "INSERT INTO written VALUES (0)").await;
    // No record is behind its end, and none says where that is.
    run(&mut installation.direct("a").await, "SELECT pg_switch_wal()").await;
    installation.signal_server("a", "KILL");
    let failover = ["failover", "shop", "--to", "b"];
    let output = installation.holdfast_in_background(&failover).await.unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    let mut client = installation.connect().await;
    assert_eq!(value(&mut client, "SELECT count(*) FROM written").await, "30001");
    let text = shown(&installation.holdfast(&["executions", "1"]));
    assert!(text.contains("were read from the lost server's disk"), "{text}");
    assert!(text.contains("rewound, streams"), "{text}");
    assert!(text.contains("were read from the lost server's disk"), "{text}");
    assert!(text.contains("rewound, streams"), "{text}");
    assert_eq!(value(&mut client, "SHOW restore_command").await, "");
    assert!(!installation.dir.join("b.holdfast-wal").exists());
    wait_active(&installation, "b").await;
}

/// Where a server is in its log: the file, and how far into that.
async fn log_position(server: &mut Connection) -> (String, u64) {
    let sql = "SELECT file_name || ' ' || file_offset FROM pg_walfile_name_offset(pg_current_wal_flush_lsn())";
    let said = value(server, sql).await;
    let (file, offset) = said.split_once(' ').unwrap();
    (file.to_owned(), offset.parse().unwrap())
}

/// As a disk that has said that it has written what it has not.
fn lose_log(installation: &Installation, cell: &str, (file, from): (&str, u64), len: u64) {
    let path = installation.dir.join(cell).join("pg_wal").join(file);
    let log = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let len = len.min(log.metadata().unwrap().len() - from);
    log.write_all_at(&vec![0; usize::try_from(len).unwrap()], from).unwrap();
}

/// Waits until the standby has all that the active server has written.
async fn wait_received(installation: &Installation) {
    let at = value(&mut installation.direct("a").await, "SELECT pg_current_wal_flush_lsn()").await;
    let sql = format!("SELECT pg_last_wal_receive_lsn() >= '{at}'");
    let mut standby = installation.direct("b").await;
    while value(&mut standby, &sql).await != "t" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A server whose disk has lost what was acknowledged does not come back, and the standby that has it is left as it is.
#[tokio::test]
async fn a_disk_that_has_lost_log_is_not_taken_for_the_newest() {
    let installation = Installation::start("lost-by-disk");
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE written (n int)").await;
    run(&mut client, "INSERT INTO written VALUES (1)").await;
    let mut direct = installation.direct("a").await;
    let (file, from) = log_position(&mut direct).await;
    run(&mut client, "INSERT INTO written VALUES (2)").await;
    wait_received(&installation).await;
    installation.signal_server("a", "KILL");
    lose_log(&installation, "a", (&file, from), u64::MAX);
    let failover = installation.holdfast_in_background(&["failover", "shop", "--to", "b"]);
    let output = failover.await.unwrap();
    let text = shown(&output);
    assert!(!output.status.success(), "nobody can say that nothing is lost: {text}");
    assert!(text.contains("the lost server does not start: "), "{text}");
    assert!(text.contains("was seen, and its log ends at"), "{text}");
    let running = Command::new("pgrep")
        .args(["-f", &format!("postgres -D {}", installation.dir.join("a").display())])
        .output()
        .unwrap();
    assert!(running.stdout.is_empty(), "{}", String::from_utf8_lossy(&running.stdout));
    let lose = ["failover", "shop", "--to", "b", "--allow-data-loss"];
    let output = installation.holdfast_in_background(&lose).await.unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    let mut client = installation.connect().await;
    let all = "SELECT string_agg(n::text, ',' ORDER BY n) FROM written";
    assert_eq!(value(&mut client, all).await, "1,2");
}

/// Of what a standby has received nothing is replaced by what a bad disk has.
#[tokio::test]
async fn what_was_received_is_replayed_before_a_disk_is_read() {
    let installation = Installation::start("lost-received");
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE written (n int, x text)").await;
    let mut standby = installation.direct("b").await;
    wait_received(&installation).await;
    run(&mut standby, "SELECT pg_wal_replay_pause()").await;
    let fill = "INSERT INTO written SELECT g, repeat('x', 1000) FROM generate_series(1, 20000) g";
    run(&mut client, fill).await;
    let mut direct = installation.direct("a").await;
    let (file, from) = log_position(&mut direct).await;
    run(&mut client, fill).await;
    wait_received(&installation).await;
    installation.signal_server("a", "KILL");
    lose_log(&installation, "a", (&file, from), 8192);
    // Its log is not whole any more, so it cannot be made a standby by itself, and nobody waits for that here.
    let failover = installation.holdfast_in_background(&["failover", "shop", "--to", "b"]);
    let deadline = Instant::now() + Duration::from_secs(60);
    let is_there = || shown(&installation.holdfast(&["status", "shop"])).contains("active cell b");
    while !is_there() && !failover.is_finished() {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut client = installation.connect().await;
    assert_eq!(value(&mut client, "SELECT count(*) FROM written").await, "40000");
    drop(failover);
}

/// What ends with a switch to the next file, or with a record that is longer than whatever is read at a time, ends no later than
/// it was seen to.
#[tokio::test]
async fn a_server_is_started_again_wherever_its_log_ends() {
    let mut installation = Installation::start_with_agents("lost-ends");
    installation.reconfigure(|text| text.replacen("automatic = true", "automatic = false", 1));
    for sql in [
        "SELECT pg_switch_wal()",
        "SELECT pg_logical_emit_message(true, 'x', repeat('a', 300000))",
        "SELECT pg_logical_emit_message(false, E'\\nrmgr: XLOG len (rec/tot): 34/ 34, tx: 0, lsn: FFFF/00000028, prev 0/0, desc: NOOP', 'x')",
        "BEGIN; CREATE TABLE gone AS SELECT repeat('x', 100) FROM generate_series(1, 10000); ROLLBACK",
    ] {
        wait_active(&installation, "a").await;
        let mut direct = installation.direct("a").await;
        for sql in sql.split("; ") {
            run(&mut direct, sql).await;
        }
        // Until control has looked.
        tokio::time::sleep(Duration::from_secs(1)).await;
        installation.signal_server("a", "KILL");
        let deadline = Instant::now() + Duration::from_secs(60);
        let port = installation.facts.servers["a"];
        while connect(port, "postgres", None).await.is_err() {
            let status = shown(&installation.holdfast(&["status", "shop"]));
            assert!(Instant::now() < deadline, "{sql}: {status}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// The same where somebody asks for a failover.
#[tokio::test]
async fn nothing_is_lost_wherever_the_log_ends() {
    for sql in [
        "SELECT pg_switch_wal()",
        "SELECT pg_logical_emit_message(true, 'x', repeat('a', 300000))",
        "SELECT pg_logical_emit_message(true, E'\\nrmgr: XLOG len (rec/tot): 34/ 34, tx: 0, lsn: FFFF/00000028, prev 0/0, desc: NOOP', 'x')",
    ] {
        let installation = Installation::start("lost-ends-failover");
        run(&mut installation.direct("a").await, sql).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        installation.signal_server("a", "KILL");
        let failover = ["failover", "shop", "--to", "b"];
        let text = shown(&installation.holdfast_in_background(&failover).await.unwrap());
        assert!(
            text.contains("lost: 0 bytes") && text.contains("rewound, streams"),
            "{sql}: {text}"
        );
    }
}
