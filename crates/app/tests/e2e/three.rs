//! More than two cells: whoever is lost, the others go on together.

use std::time::{Duration, Instant};

use crate::agents::{switch_to, wait_protected, wait_until};
use crate::failover::{begin, end, wait_active};
use crate::support::{Installation, run, shown, signal, value};

const POLL: Duration = Duration::from_millis(50);

/// Which cell is active once all stream and commits wait for them.
async fn settled(installation: &Installation, not: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        let status = shown(&installation.holdfast(&["status", "shop"]));
        let active = status.split("active cell ").nth(1).and_then(|rest| rest.split(',').next());
        if let Some(active) = active
            && active != not
            && !status.contains('!')
        {
            return active.to_owned();
        }
        assert!(Instant::now() < deadline, "{status}");
        tokio::time::sleep(POLL).await;
    }
}

/// One is lost after the other, and each time the third follows whoever takes its place.
async fn lose_one_after_the_other(installation: &Installation) {
    let mut idle = installation.connect().await;
    let writers = begin(installation).await;
    run(&mut idle, "SET work_mem = '7MB'").await;
    wait_active(installation, "a").await;
    wait_protected(installation).await;
    let mut lost = "a".to_owned();
    for _ in 0..3 {
        installation.signal_server(&lost, "KILL");
        lost = settled(installation, &lost).await;
        wait_protected(installation).await;
        assert_eq!(value(&mut idle, "SHOW work_mem").await, "7MB");
    }
    for writer in writers {
        let (acknowledged, told) = writer.stop().await;
        assert!(acknowledged.len() > 50, "{} {told:?}", acknowledged.len());
        let list: Vec<String> = acknowledged.iter().map(u64::to_string).collect();
        let question = format!(
            "SELECT count(*) FROM unnest('{{{}}}'::bigint[]) n WHERE n NOT IN (SELECT n FROM written)",
            list.join(",")
        );
        assert_eq!(value(&mut idle, &question).await, "0", "acknowledged and not there");
    }
}

#[tokio::test]
async fn whichever_is_lost_the_others_follow() {
    lose_one_after_the_other(&Installation::start_of_three("three", &[])).await;
}

#[tokio::test]
async fn whichever_is_lost_the_others_follow_by_their_agents() {
    lose_one_after_the_other(&Installation::start_of_three("three-agents", &["--agents"])).await;
}

/// Says where each cell is.
fn place(installation: &mut Installation, regions: &[(&str, &str)]) {
    installation.reconfigure(|config| {
        regions.iter().fold(config, |config, (cell, region)| {
            let name = format!("[[app.cell]]\nname = \"{cell}\"\n");
            assert!(config.contains(&name), "{config}");
            config.replacen(&name, &format!("{name}region = \"{region}\"\n"), 1)
        })
    });
}

/// Of a region whose active cell is lost another cell is meant, not the lost one.
#[tokio::test]
async fn a_region_takes_the_place_of_its_own_lost_cell() {
    let mut installation = Installation::start_of_three("three-within", &[]);
    place(&mut installation, &[("a", "eu/1"), ("b", "us"), ("c", "eu/2")]);
    installation.reconfigure(|text| text.replacen("automatic = true", "automatic = false", 1));
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE t (n int)").await;
    wait_protected(&installation).await;
    let failover = ["failover", "shop", "--to", "eu"];
    let already = installation.holdfast(&failover);
    assert!(shown(&already).contains("`a` is active already"), "{}", shown(&already));
    installation.signal_server("a", "KILL");
    let output = installation.holdfast_in_background(&failover).await.unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(installation.active(), "c");
    run(&mut client, "INSERT INTO t VALUES (1)").await;
}

#[tokio::test]
async fn a_region_is_gone_to_and_left() {
    let mut installation = Installation::start_of_three("three-regions", &[]);
    place(&mut installation, &[("a", "eu/1"), ("b", "us/1"), ("c", "eu/2")]);
    crate::plans::plan(
        &mut installation,
        "[[app.plan]]\nname = \"out\"\n[[app.plan.step]]\nname = \"go\"\nleave = \"us\"\nto = \"eu\"\n",
    );
    let mut client = installation.connect().await;
    let writers = begin(&installation).await;
    wait_protected(&installation).await;
    let text = switch_to(&installation, "us").await;
    assert!(text.contains("completed"), "{text}");
    assert_eq!(settled(&installation, "").await, "b");
    let already = installation.holdfast(&["switchover", "shop", "--to", "us/1"]);
    assert!(shown(&already).contains("`b` is active already"), "{}", shown(&already));
    let nobody = installation.holdfast(&["switchover", "shop", "--to", "asia"]);
    assert!(shown(&nobody).contains("has no cell `asia`"), "{}", shown(&nobody));
    wait_protected(&installation).await;
    for expected in ["completed", "skipped"] {
        let output =
            installation.holdfast_in_background(&["execute", "shop", "out"]).await.unwrap();
        assert!(shown(&output).contains(expected), "{expected}: {}", shown(&output));
    }
    let there = settled(&installation, "").await;
    assert!(there != "b", "{there}");
    // The nearest of those that have all: the other one in `eu`.
    wait_protected(&installation).await;
    installation.signal_server(&there, "KILL");
    assert!(["a", "c"].contains(&&*settled(&installation, &there).await));
    end(&installation, writers).await;
    assert_eq!(value(&mut client, "SELECT count(*) > 50 FROM written").await, "t");
}

#[tokio::test]
async fn a_switchover_takes_the_third_along() {
    let installation = Installation::start_of_three("three-switch", &[]);
    let mut client = installation.connect().await;
    let writers = begin(&installation).await;
    wait_protected(&installation).await;
    for to in ["c", "b", "a"] {
        let text = switch_to(&installation, to).await;
        assert!(text.contains("completed"), "{text}");
        assert_eq!(settled(&installation, "").await, to);
        wait_protected(&installation).await;
    }
    end(&installation, writers).await;
    let all = value(&mut client, "SELECT count(*) FROM written").await;
    for cell in ["b", "c"] {
        let mut standby = installation.direct(cell).await;
        let deadline = Instant::now() + Duration::from_secs(30);
        while value(&mut standby, "SELECT count(*) FROM written").await != all {
            assert!(Instant::now() < deadline, "{cell} does not follow");
            tokio::time::sleep(POLL).await;
        }
    }
}

/// The new server is lost while the old one is made a standby of it: the third takes its place, and all come back.
#[tokio::test]
async fn a_failover_waits_for_no_rejoin() {
    let mut installation = Installation::start_of_three("three-rejoin", &[]);
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    installation.restart(&[("HOLDFAST_HOLD_AT", "rejoin")]);
    let mut idle = installation.connect().await;
    run(&mut idle, "CREATE TABLE t (n int); SET work_mem = '7MB'").await;
    wait_protected(&installation).await;
    installation.signal_server("a", "KILL");
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let text = shown(&installation.holdfast(&["executions", "1"]));
        if text.contains("rejoin   runs") {
            break;
        }
        assert!(Instant::now() < deadline && !text.contains("completed"), "{text}");
        tokio::time::sleep(POLL).await;
    }
    // The third follows meanwhile, and commits wait for it.
    wait_until("commits that wait", async || {
        !shown(&installation.holdfast(&["status", "shop"])).contains("by one server alone")
    })
    .await;
    let second = installation.active();
    installation.signal_server(&second, "KILL");
    let third = settled(&installation, &second).await;
    assert_ne!(third, "a", "it was no standby yet");
    assert_eq!(value(&mut idle, "SHOW work_mem").await, "7MB");
    run(&mut idle, "INSERT INTO t VALUES (1)").await;
    wait_protected(&installation).await;
}

/// A standby that was not there has more than the one that took the place: what only it has is kept, and it follows.
#[tokio::test]
async fn a_standby_that_has_gone_another_way_is_made_one_anew() {
    goes_another_way("three-strays", 0).await;
}

/// It asks for what the new primary does not have, and is not even told where that has left.
#[tokio::test]
async fn a_standby_that_has_gone_far_is_made_one_anew() {
    goes_another_way("three-far", 2).await;
}

async fn goes_another_way(name: &str, segments: usize) {
    let mut installation = Installation::start_of_three(name, &[]);
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE t (n int)").await;
    wait_protected(&installation).await;
    let mut standby = installation.direct("c").await;
    let frozen = value(&mut standby, "SELECT pid FROM pg_stat_wal_receiver").await;
    let frozen = frozen.parse().unwrap();
    drop(standby);
    signal(frozen, "STOP");
    run(&mut client, "INSERT INTO t VALUES (1)").await;
    let mut server = installation.direct("a").await;
    for _ in 0..segments {
        run(&mut server, "SELECT pg_switch_wal()").await;
        run(&mut client, "INSERT INTO t VALUES (1)").await;
    }
    drop((client, server));
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    installation.signal_server("b", "STOP");
    installation.signal_server("a", "KILL");
    // Nothing is left of its log, and what was on its way to `c` is lost with it.
    std::fs::remove_dir_all(installation.dir.join("a/pg_wal")).unwrap();
    signal(frozen, "KILL");
    installation.restart(&[]);
    let failover = ["failover", "shop", "--to", "c", "--allow-data-loss"];
    wait_until("the failover", async || {
        shown(&installation.holdfast(&failover)).contains("release") || installation.active() == "c"
    })
    .await;
    let mut client = installation.connect().await;
    assert_eq!(value(&mut client, "SELECT count(*) FROM t").await, "0", "lost, as was said");
    run(&mut client, "INSERT INTO t VALUES (2)").await;
    installation.signal_server("b", "CONT");
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let text = shown(&installation.holdfast(&["executions"]));
        if text.lines().any(|line| line.contains("rejoin: b to c") && line.contains("completed")) {
            break;
        }
        assert!(Instant::now() < deadline, "{text}");
        tokio::time::sleep(POLL).await;
    }
    let text = shown(&installation.holdfast(&["executions", "2"]));
    let commits = format!("{} commits", segments + 1);
    assert!(text.contains(&commits) && text.contains("kept in"), "{text}");
    let mut standby = installation.direct("b").await;
    wait_until("the rejoined", async || {
        value(&mut standby, "SELECT string_agg(n::text, ' ') FROM t").await == "2"
    })
    .await;
}

/// What a failover hangs on is said where somebody has chosen it, and put right where nobody has.
#[tokio::test]
async fn settings_that_are_in_the_way_are_found() {
    let installation = Installation::start_of_three("three-settings", &[]);
    let mut server = installation.direct("b").await;
    let interval = "SHOW wal_retrieve_retry_interval";
    run(&mut server, "ALTER SYSTEM SET wal_retrieve_retry_interval = '5s'").await;
    run(&mut server, "SELECT pg_reload_conf()").await;
    wait_until("the finding", async || {
        let text = shown(&installation.holdfast(&["status", "shop"]));
        text.contains("! cell `b`: `wal_retrieve_retry_interval` is 5000 ms")
    })
    .await;
    assert_eq!(value(&mut server, interval).await, "5s", "somebody has chosen it");
    let file = installation.dir.join("b/postgresql.conf");
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.contains("wal_retrieve_retry_interval = 100ms"));
    std::fs::write(&file, text.replace("wal_retrieve_retry_interval = 100ms", "")).unwrap();
    run(&mut server, "ALTER SYSTEM RESET wal_retrieve_retry_interval").await;
    run(&mut server, "SELECT pg_reload_conf()").await;
    let source = "SELECT sourcefile LIKE '%auto.conf' FROM pg_settings WHERE name = 'wal_retrieve_retry_interval'";
    wait_until("the mend", async || {
        value(&mut server, interval).await == "100ms" && value(&mut server, source).await == "t"
    })
    .await;
    wait_protected(&installation).await;
}

/// What standbys have not received is kept for them, wherever the primary is, and for nobody else.
#[tokio::test]
async fn servers_keep_wal_for_standbys_by_slots() {
    let mut installation = Installation::start_of_three("three-slots", &[]);
    installation.reconfigure(|text| text.replacen("[[app]]\n", "[[app]]\nslots = true\n", 1));
    let status = || shown(&installation.holdfast(&["status", "shop"]));
    wait_until("the limit to be missed", async || {
        status().contains("cell `a`: `max_slot_wal_keep_size` has no limit")
    })
    .await;
    for cell in ["a", "b", "c"] {
        let mut server = installation.direct(cell).await;
        run(&mut server, "ALTER SYSTEM SET max_slot_wal_keep_size = '1GB'").await;
        run(&mut server, "ALTER SYSTEM SET wal_keep_size = 0").await;
        run(&mut server, "SELECT pg_reload_conf()").await;
    }
    let slots = async |cell: &str, has: &str| {
        let mut server = installation.direct(cell).await;
        let asked = "SELECT coalesce(string_agg(slot_name || ' ' || active, ', ' ORDER BY slot_name), '') \
            FROM pg_replication_slots";
        wait_until(has, async || value(&mut server, asked).await == has).await;
    };
    slots("a", "holdfast_b true, holdfast_c true").await;
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE t (n int)").await;
    installation.signal_server("c", "INT");
    slots("a", "holdfast_b true, holdfast_c false").await;
    let mut server = installation.direct("a").await;
    for _ in 0..3 {
        run(&mut client, "INSERT INTO t VALUES (1)").await;
        run(&mut server, "SELECT pg_switch_wal()").await;
        run(&mut server, "CHECKPOINT").await;
    }
    installation.start_server("c").await;
    slots("a", "holdfast_b true, holdfast_c true").await;
    wait_protected(&installation).await;
    installation.signal_server("a", "KILL");
    let active = settled(&installation, "a").await;
    for cell in ["a", "b", "c"].into_iter().filter(|cell| *cell != active) {
        slots(cell, "").await;
    }
    let others: Vec<String> = ["a", "b", "c"]
        .into_iter()
        .filter(|cell| *cell != active)
        .map(|cell| format!("holdfast_{cell} true"))
        .collect();
    slots(&active, &others.join(", ")).await;
    // Nobody keeps anything once it is not asked for.
    installation.reconfigure(|text| text.replacen("slots = true\n", "", 1));
    let mut server = installation.direct(&active).await;
    wait_until("no slots", async || {
        value(&mut server, "SELECT count(*) FROM pg_replication_slots").await == "0"
    })
    .await;
    wait_protected(&installation).await;
}

/// Nothing is lost where the disk of a lost server can be read, also by one that has not followed it.
#[tokio::test]
async fn a_third_that_has_not_followed_reads_what_it_lacks() {
    let mut installation = Installation::start_of_three("three-reads", &[]);
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    installation.restart(&[("HOLDFAST_HOLD_AT", "rejoin")]);
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE t (n int)").await;
    wait_protected(&installation).await;
    installation.signal_server("c", "STOP");
    installation.signal_server("a", "KILL");
    wait_until("b", async || installation.active() == "b").await;
    run(&mut client, "INSERT INTO t VALUES (1)").await;
    installation.signal_server("b", "KILL");
    installation.signal_server("c", "CONT");
    wait_until("c", async || installation.active() == "c").await;
    assert_eq!(value(&mut client, "SELECT count(*) FROM t").await, "1");
}

fn lose_host(installation: &Installation, cell: &str) {
    signal(installation.agent(cell), "KILL");
    if let Some(guard) = installation.guard(cell) {
        signal(guard, "KILL");
    }
    installation.signal_server(cell, "KILL");
}

/// Two that are promoted apart write no timeline of one number, and what the first alone had is kept.
#[tokio::test]
async fn what_a_server_wrote_that_nobody_followed_is_kept() {
    let mut installation = Installation::start_of_three("three-apart", &["--agents"]);
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE t (n int)").await;
    wait_protected(&installation).await;
    installation.signal_server("c", "STOP");
    lose_host(&installation, "a");
    let fails_over = async |to: &str| {
        let asked = ["failover", "shop", "--to", to, "--allow-data-loss"];
        let deadline = Instant::now() + Duration::from_secs(60);
        while installation.active() != to {
            let text = shown(&installation.holdfast_in_background(&asked).await.unwrap());
            assert!(Instant::now() < deadline, "{text}");
        }
    };
    fails_over("b").await;
    run(&mut client, "INSERT INTO t SELECT generate_series(1, 20)").await;
    lose_host(&installation, "b");
    installation.signal_server("c", "CONT");
    fails_over("c").await;
    assert_eq!(value(&mut client, "SELECT count(*) FROM t").await, "0", "as was said");
    let timeline = "SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)";
    assert_eq!(value(&mut client, timeline).await, "00000003", "2 was b's");
    installation.start_agent("b");
    wait_until("the standby", async || {
        let status = shown(&installation.holdfast(&["status", "shop"]));
        status.lines().any(|line| line.starts_with("b ") && line.contains("yes"))
    })
    .await;
    let text = shown(&installation.holdfast(&["executions"]));
    let all = std::fs::read_dir(&installation.dir).unwrap().flatten();
    let names: Vec<String> =
        all.map(|one| one.file_name().to_string_lossy().into_owned()).collect();
    assert!(names.iter().any(|name| name.starts_with("b.holdfast-lost-")), "{names:?} {text}");
}

/// A standby that streams, though nobody has recorded that it was made one, is in nobody's way, and may take the place.
#[tokio::test]
async fn a_standby_that_was_not_recorded_takes_the_place() {
    let mut installation = Installation::start_of_three("three-settle", &[]);
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE t (n int)").await;
    wait_protected(&installation).await;
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    installation.restart(&[("HOLDFAST_CRASH_AT", "rejoin:end")]);
    installation.signal_server("a", "KILL");
    installation.wait_crashed();
    let mut server = installation.direct("b").await;
    let is_standby = value(&mut server, "SELECT pg_is_in_recovery()").await == "t";
    let lost = if is_standby { "c" } else { "b" };
    drop(server);
    installation.signal_server(lost, "KILL");
    installation.restart(&[]);
    let active = settled(&installation, lost).await;
    assert_ne!(active, lost);
    let mut client = installation.connect().await;
    run(&mut client, "INSERT INTO t VALUES (1)").await;
    wait_protected(&installation).await;
}

/// It could never follow again by itself.
#[tokio::test]
async fn a_standby_whose_log_was_removed_is_copied_anew() {
    let installation = Installation::start_with_agents("three-removed");
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE written (n int)").await;
    wait_active(&installation, "a").await;
    signal(installation.agent("b"), "STOP");
    installation.signal_server("b", "KILL");
    let mut direct = installation.direct("a").await;
    run(&mut direct, "ALTER SYSTEM SET min_wal_size = '32MB'").await;
    run(&mut direct, "ALTER SYSTEM SET max_wal_size = '32MB'").await;
    run(&mut direct, "SELECT pg_reload_conf()").await;
    let first = "SELECT min(name) FROM pg_ls_waldir() WHERE length(name) = 24";
    let needed = "SELECT pg_walfile_name(pg_current_wal_flush_lsn())";
    let needed = value(&mut direct, needed).await;
    while value(&mut direct, first).await <= needed {
        run(&mut direct, "INSERT INTO written VALUES (1)").await;
        run(&mut direct, "SELECT pg_switch_wal()").await;
        run(&mut direct, "CHECKPOINT").await;
    }
    signal(installation.agent("b"), "CONT");
    let log = async || shown(&installation.holdfast(&["executions", "1"]));
    wait_until("the copy", async || log().await.contains("completed")).await;
    wait_active(&installation, "a").await;
    let log = log().await;
    assert!(log.contains("copied anew") && log.contains("completed"), "{log}");
    let count = "SELECT count(*) FROM written";
    let expected = value(&mut direct, count).await;
    assert_eq!(value(&mut installation.direct("b").await, count).await, expected);
}
