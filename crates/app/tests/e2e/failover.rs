//! The active cell's server is lost, and another takes its place: clients stay connected, and nothing that was
//! acknowledged is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::outlive::wait_shared;
use crate::support::{Installation, connect, named, run, shown, signal, value};

const POLL: Duration = Duration::from_millis(20);

/// A client that writes all the time: numbers that were acknowledged, and how often it was told to try again.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<(Vec<u64>, Vec<String>)>,
}

impl Writer {
    /// Each transaction is begun and committed by statements of its own, if `in_blocks`.
    async fn start(mut client: pg::Connection, from: u64, in_blocks: bool) -> Writer {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let (mut acknowledged, mut told) = (Vec::new(), Vec::new());
            for number in from.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let insert = format!("INSERT INTO written VALUES ({number})");
                let texts =
                    if in_blocks { vec!["BEGIN", &insert, "COMMIT"] } else { vec![&*insert] };
                let mut failed = None;
                for text in texts {
                    if let Err(error) = client.query(text).await {
                        failed = Some(error);
                        break;
                    }
                }
                match failed {
                    None => acknowledged.push(number),
                    Some(error) => {
                        let state = error.sqlstate().map(|state| state.to_string());
                        told.push(state.unwrap_or_else(|| error.to_string()));
                        // On the same connection, which is still there. One that was running may fail as well (known gap).
                        if let Err(second) = client.query("ROLLBACK").await
                            && let Err(third) = client.query("ROLLBACK").await
                        {
                            panic!("{told:?}: {error}; then {second}; then {third}");
                        }
                    }
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            (acknowledged, told)
        });
        Writer { stop, task }
    }

    pub(crate) async fn stop(self) -> (Vec<u64>, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

pub(crate) async fn wait_active(installation: &Installation, cell: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let status = shown(&installation.holdfast(&["status", "shop"]));
        if status.contains(&format!("active cell {cell},")) && !status.contains('!') {
            return;
        }
        assert!(Instant::now() < deadline, "{status}");
        tokio::time::sleep(POLL).await;
    }
}

pub(crate) async fn begin(installation: &Installation) -> Vec<Writer> {
    run(&mut installation.connect().await, "CREATE TABLE written (n bigint PRIMARY KEY)").await;
    // Whoever runs something before it is known what was defined keeps its server, and ends with it.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let mut writers = Vec::new();
    for number in 0..4 {
        let client = match installation.facts.proxies.is_empty() || number < 2 {
            true => installation.connect().await,
            false => installation.connect_elsewhere().await,
        };
        writers.push(Writer::start(client, number * 1_000_000, number % 2 == 0).await);
    }
    tokio::time::sleep(Duration::from_millis(800)).await;
    writers
}

pub(crate) async fn end(installation: &Installation, writers: Vec<Writer>) {
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut client = installation.connect().await;
    for writer in writers {
        let (acknowledged, told) = writer.stop().await;
        assert!(acknowledged.len() > 50, "{} {told:?}", acknowledged.len());
        // One whose transaction was running, or whose COMMIT was.
        assert!(told.len() <= 1, "{told:?}");
        assert!(told.iter().all(|state| state == "40001" || state == "08007"), "{told:?}");
        let list: Vec<String> = acknowledged.iter().map(u64::to_string).collect();
        let question = format!(
            "SELECT count(*) FROM unnest('{{{}}}'::bigint[]) n WHERE n NOT IN (SELECT n FROM written)",
            list.join(",")
        );
        assert_eq!(value(&mut client, &question).await, "0", "acknowledged and not there");
    }
}

#[tokio::test]
async fn a_killed_server_is_replaced_and_clients_stay() {
    let installation = Installation::start_failing_over("failover");
    let mut idle = installation.connect().await;
    run(&mut idle, "SET work_mem = '7MB'").await;
    let writers = begin(&installation).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    installation.signal_server("a", "KILL");
    wait_active(&installation, "b").await;
    assert_eq!(value(&mut idle, "SHOW work_mem").await, "7MB");
    end(&installation, writers).await;
    let execution = shown(&installation.holdfast(&["executions", "1"]));
    assert!(execution.contains("failover of shop from a to b: completed"), "{execution}");
    // The lost server is a standby, and has it all.
    let all = value(&mut idle, "SELECT count(*) FROM written").await;
    let mut old = installation.direct("a").await;
    assert_eq!(value(&mut old, "SELECT pg_is_in_recovery()").await, "t");
    while value(&mut old, "SELECT count(*) FROM written").await != all {
        tokio::time::sleep(POLL).await;
    }
}

#[tokio::test]
async fn a_login_at_a_server_that_hangs_goes_on_elsewhere() {
    let installation = Installation::start_failing_over("failover-login");
    // Another kind of login, of which nothing is known.
    let sql = "CREATE ROLE app LOGIN; CREATE ROLE other LOGIN";
    run(&mut installation.connect().await, sql).await;
    installation.signal_server("a", "STOP");
    let port = installation.facts.port;
    let logins = ["app", "other"].map(|user| tokio::spawn(connect(port, user, None)));
    for login in logins {
        let mut session = login.await.unwrap().unwrap();
        assert_eq!(value(&mut session, "SELECT pg_is_in_recovery()").await, "f");
    }
    wait_active(&installation, "b").await;
}

/// Its process lives and answers nobody: it is ended before another is granted anything.
#[tokio::test]
async fn a_server_that_hangs_is_ended_first() {
    let installation = Installation::start_failing_over("failover-hangs");
    let writers = begin(&installation).await;
    installation.signal_server("a", "STOP");
    wait_active(&installation, "b").await;
    end(&installation, writers).await;
}

#[tokio::test]
async fn a_failover_by_hand_says_what_it_would_do() {
    let installation = Installation::start_pooled("failover-by-hand", 4);
    let mut client = named(&installation, "client").await;
    run(&mut client, "CREATE TABLE written (n int); INSERT INTO written VALUES (1)").await;
    wait_shared(&installation, "client").await;
    let output = installation.holdfast(&["failover", "shop", "--to", "b"]);
    let text = shown(&output);
    assert!(output.status.code() == Some(1), "{text}");
    assert!(text.contains("holdfast switchover shop --to b"), "{text}");
    installation.signal_server("a", "KILL");
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = shown(&installation.holdfast(&["status", "shop"]));
        if status.contains("DeadPrimary") && status.contains("holdfast failover shop --to b") {
            break;
        }
        assert!(Instant::now() < deadline, "{status}");
        tokio::time::sleep(POLL).await;
    }
    let output = installation.holdfast(&["failover", "shop", "--to", "b", "--dry-run"]);
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(installation.active(), "a");
    let output = installation.holdfast(&["failover", "shop", "--to", "b"]);
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(value(&mut client, "SELECT count(*) FROM written").await, "1");
    installation.switch_to("a");
    assert_eq!(value(&mut client, "SELECT count(*) FROM written").await, "1");
}

/// Of the last cell in the configuration, the server's files are not here.
pub(crate) fn files_elsewhere(installation: &mut Installation, cell: &str) {
    let name = format!("name = \"{cell}\"");
    installation.reconfigure(|text| {
        let (before, after) = text.split_once(&name).unwrap();
        let after = after.lines().filter(|line| !line.starts_with("data_dir"));
        format!("{before}{name}{}", after.collect::<Vec<_>>().join("\n"))
    });
}

/// The standby has stopped to receive some time before.
pub(crate) async fn stop_receiving(installation: &Installation) {
    let mut standby = installation.direct("b").await;
    run(&mut standby, "ALTER SYSTEM SET primary_conninfo = ''").await;
    run(&mut standby, "SELECT pg_reload_conf()").await;
    while value(&mut standby, "SELECT count(*) FROM pg_stat_wal_receiver").await != "0" {
        tokio::time::sleep(POLL).await;
    }
}

const ROWS: &str = "INSERT INTO written SELECT g FROM generate_series(1, 1000) g";

#[tokio::test]
async fn what_only_the_lost_servers_disk_has_is_read_from_there() {
    let installation = Installation::start_pooled("failover-salvage", 4);
    let mut client = named(&installation, "client").await;
    run(&mut client, "CREATE TABLE written (n int)").await;
    stop_receiving(&installation).await;
    run(&mut client, ROWS).await;
    wait_shared(&installation, "client").await;
    run(&mut client, "INSERT INTO written VALUES (0)").await;
    installation.signal_server("a", "KILL");
    let output = installation.holdfast(&["failover", "shop", "--to", "b"]);
    let text = shown(&output);
    assert!(output.status.success() && text.contains("were read from the lost server"), "{text}");
    assert_eq!(value(&mut client, "SELECT count(*) FROM written").await, "1001");
    assert_eq!(value(&mut client, "SHOW restore_command").await, "");
    wait_active(&installation, "b").await;
}

/// Where its disk cannot be read in time, somebody has to say that what it alone has may be lost; it is told then what
/// that was, and kept.
#[tokio::test]
async fn what_is_lost_is_asked_for_and_kept() {
    let mut installation = Installation::start_pooled("failover-loses", 4);
    files_elsewhere(&mut installation, "b");
    let mut client = named(&installation, "client").await;
    run(&mut client, "CREATE TABLE written (n int)").await;
    stop_receiving(&installation).await;
    run(&mut client, ROWS).await;
    wait_shared(&installation, "client").await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    run(&mut client, "INSERT INTO written VALUES (0)").await;
    installation.signal_server("a", "KILL");
    let output = installation.holdfast(&["failover", "shop", "--to", "b"]);
    let text = shown(&output);
    assert!(!output.status.success() && text.contains("it lacks at least"), "{text}");
    let next = "holdfast failover shop --to b --allow-data-loss";
    assert!(text.contains(next), "{text}");
    assert_eq!(installation.active(), "a");
    let output = installation.holdfast(&next.split(' ').skip(1).collect::<Vec<_>>());
    let text = shown(&output);
    assert!(output.status.success() && text.contains("2 commits"), "{text}");
    assert_eq!(value(&mut client, "SELECT count(*) FROM written").await, "0");
    let kept = installation.dir.join("state/lost/shop-2");
    let transactions = std::fs::read_to_string(kept.join("transactions.txt")).unwrap();
    assert_eq!(transactions.matches("COMMIT").count(), 2, "{transactions}");
    assert!(std::fs::read_dir(&kept).unwrap().count() > 1);
    wait_active(&installation, "b").await;
}

/// Killed at any step it goes back to the old server, which is started again, or on to the new one.
#[tokio::test]
async fn a_crash_in_a_failover_finds_its_way() {
    let mut installation = Installation::start_pooled("failover-crash", 4);
    run(&mut installation.connect().await, "CREATE TABLE written (n serial)").await;
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    let (mut active, mut other, mut epoch, mut written) = ("a", "b", 1, 0);
    let stages = [
        ("assess", false),
        ("cut", false),
        ("isolate", false),
        ("recruit", false),
        ("grant", true),
        ("promote", true),
        ("release", true),
        ("rejoin", true),
    ];
    for (stage, granted) in stages {
        for at in ["begin", "end"] {
            let point = format!("{stage}:{at}");
            installation.restart(&[("HOLDFAST_CRASH_AT", &point)]);
            wait_active(&installation, active).await;
            let mut client = installation.connect().await;
            run(&mut client, "INSERT INTO written DEFAULT VALUES").await;
            written += 1;
            installation.signal_server(active, "KILL");
            let output = installation.holdfast(&["failover", "shop", "--to", other]);
            assert_eq!(output.status.code(), Some(1), "{point}: {}", shown(&output));
            installation.wait_crashed();
            installation.restart(&[]);
            if granted {
                std::mem::swap(&mut active, &mut other);
                epoch += 1;
            }
            wait_active(&installation, active).await;
            let status = shown(&installation.holdfast(&["status", "shop"]));
            let expected = format!("active cell {active}, epoch {epoch}");
            assert!(status.contains(&expected), "{point}: {status}");
            let mut client = installation.connect().await;
            let count = value(&mut client, "SELECT count(*) FROM written").await;
            assert_eq!(count, written.to_string(), "{point}");
            let mut passive = installation.direct(other).await;
            assert!(passive.query("INSERT INTO written DEFAULT VALUES").await.is_err(), "{point}");
            signal(installation.pid(), "KILL");
            installation.wait_crashed();
        }
    }
    installation.restart(&[]);
}

/// Once a lost server is isolated, whoever starts it again starts none that takes writes; if the failover is given up, it
/// is what it was.
#[tokio::test]
async fn whoever_starts_the_lost_server_starts_a_standby() {
    let mut installation = Installation::start_pooled("failover-restarted", 4);
    run(&mut installation.connect().await, "CREATE TABLE written (n serial)").await;
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    installation.restart(&[("HOLDFAST_CRASH_AT", "recruit:begin")]);
    installation.signal_server("a", "KILL");
    let output = installation.holdfast(&["failover", "shop", "--to", "b"]);
    assert_eq!(output.status.code(), Some(1), "{}", shown(&output));
    installation.wait_crashed();
    installation.start_server("a").await;
    let mut lost = installation.direct("a").await;
    assert_eq!(value(&mut lost, "SELECT pg_is_in_recovery()").await, "t");
    assert!(lost.query("INSERT INTO written DEFAULT VALUES").await.is_err());
    installation.restart(&[]);
    wait_active(&installation, "a").await;
    run(&mut installation.connect().await, "INSERT INTO written DEFAULT VALUES").await;
}

/// A standby that was a primary meanwhile has another history, however much of it.
#[tokio::test]
async fn a_standby_of_another_history_takes_nobodys_place() {
    let installation = Installation::start_pooled("failover-diverged", 4);
    run(&mut installation.connect().await, "CREATE TABLE written (n int)").await;
    let mut other = installation.direct("b").await;
    while value(&mut other, "SELECT to_regclass('written') IS NOT NULL").await != "t" {
        tokio::time::sleep(POLL).await;
    }
    run(&mut other, "SELECT pg_promote()").await;
    run(&mut other, "INSERT INTO written SELECT g FROM generate_series(1, 10000) g").await;
    run(&mut other, "CHECKPOINT").await;
    installation.signal_server("b", "INT");
    std::fs::write(installation.dir.join("b/standby.signal"), "").unwrap();
    installation.start_server("b").await;
    run(&mut installation.connect().await, "INSERT INTO written VALUES (0)").await;
    installation.signal_server("a", "KILL");
    let output = installation.holdfast(&["failover", "shop", "--to", "b"]);
    let text = shown(&output);
    assert!(!output.status.success() && text.contains("on timeline 2"), "{text}");
    assert_eq!(installation.active(), "a");
}

/// A server that was shut down by somebody, or refuses us, is not lost.
#[tokio::test]
async fn a_server_that_was_shut_down_is_not_failed_over() {
    let installation = Installation::start_failing_over("failover-shut-down");
    run(&mut installation.connect().await, "CREATE TABLE written (n int)").await;
    installation.signal_server("a", "INT");
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = shown(&installation.holdfast(&["status", "shop"]));
        assert!(status.contains("active cell a,"), "{status}");
        if status.contains("PrimaryShutDown") {
            break;
        }
        assert!(Instant::now() < deadline, "{status}");
        tokio::time::sleep(POLL).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(installation.active(), "a");
    installation.start_server("a").await;
    run(&mut installation.connect().await, "INSERT INTO written VALUES (1)").await;
}

/// A switchover that waits, or is asked for, while the primary dies is in the way of nobody.
#[tokio::test]
async fn a_primary_that_dies_in_a_switchover_is_failed_over() {
    let installation = Installation::start_failing_over("failover-switching");
    let writers = begin(&installation).await;
    let mut busy = installation.connect().await;
    run(&mut busy, "BEGIN; INSERT INTO written VALUES (-1)").await;
    let switch = installation.switch_until_it_holds().await;
    installation.signal_server("a", "KILL");
    wait_active(&installation, "b").await;
    let output = switch.await.unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", shown(&output));
    end(&installation, writers).await;
}

/// Nobody fails it over by himself, as somebody may have fenced it for a reason.
#[tokio::test]
async fn a_fenced_cell_that_is_lost_is_replaced_if_somebody_asks() {
    let installation = Installation::start_failing_over("failover-fenced");
    let mut idle = installation.connect().await;
    run(&mut idle, "CREATE TABLE written (n int)").await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let fenced = installation.holdfast(&["fence", "shop", "a"]);
    assert!(fenced.status.success(), "{}", shown(&fenced));
    let refused = installation.holdfast(&["failover", "shop", "--to", "b"]);
    assert!(shown(&refused).contains("answers as a primary"), "{}", shown(&refused));
    installation.signal_server("a", "KILL");
    tokio::time::sleep(Duration::from_secs(2)).await;
    let all = shown(&installation.holdfast(&["executions"]));
    assert_eq!(all.matches("failover").count(), 1, "{all}");
    let done = installation.holdfast_in_background(&["failover", "shop", "--to", "b"]);
    let done = done.await.unwrap();
    assert!(done.status.success(), "{}", shown(&done));
    run(&mut idle, "INSERT INTO written VALUES (1)").await;
    assert_eq!(installation.active(), "b");
    assert_eq!(value(&mut idle, "SHOW default_transaction_read_only").await, "off");
}

/// One that stands still goes back by itself once its server answers again.
#[tokio::test]
async fn a_switchover_that_could_not_go_back_does_so_later() {
    let installation = Installation::start("failover-back");
    run(&mut installation.connect().await, "CREATE TABLE written (n int)").await;
    installation.signal_server("a", "INT");
    let a = installation.dir.join("a/postmaster.pid");
    while a.exists() {
        tokio::time::sleep(POLL).await;
    }
    let output = installation.holdfast_in_background(&["switchover", "shop", "--to", "b"]);
    let output = output.await.unwrap();
    assert!(shown(&output).contains("stuck"), "{}", shown(&output));
    installation.start_server("a").await;
    wait_active(&installation, "a").await;
    let executions = shown(&installation.holdfast(&["executions"]));
    assert!(executions.contains("aborted, nothing changed"), "{executions}");
    run(&mut installation.connect().await, "INSERT INTO written VALUES (1)").await;
}

/// Whenever Holdfast is killed while a server is rejoined, whoever starts that server starts a standby, or none.
#[tokio::test]
async fn a_server_that_is_being_rejoined_starts_as_no_primary() {
    let mut installation = Installation::start("failover-rejoining");
    run(&mut installation.connect().await, "CREATE TABLE written (n int)").await;
    let mut active = "a";
    for wait_ms in [0, 20, 100, 300] {
        let to = if active == "a" { "b" } else { "a" };
        run(
            &mut installation.connect().await,
            "INSERT INTO written SELECT g FROM generate_series(1, 300000) g",
        )
        .await;
        let switch = installation.holdfast_in_background(&["switchover", "shop", "--to", to]);
        let marker = installation.dir.join(format!("{active}.holdfast-rejoin/complete"));
        while !marker.exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(wait_ms)).await;
        signal(installation.pid(), "KILL");
        installation.wait_crashed();
        switch.await.unwrap();
        // What it had started may go on for a moment.
        tokio::time::sleep(Duration::from_millis(1_000)).await;
        let dir = installation.dir.join(active);
        if dir.exists() {
            assert!(dir.join("standby.signal").exists(), "{active} after {wait_ms} ms");
            installation.start_server(active).await;
            let mut old = installation.direct(active).await;
            assert_eq!(value(&mut old, "SELECT pg_is_in_recovery()").await, "t");
        }
        installation.restart(&[]);
        wait_active(&installation, to).await;
        active = to;
    }
    let mut client = installation.connect().await;
    assert_eq!(value(&mut client, "SELECT count(*) FROM written").await, "1200000");
}

#[tokio::test]
async fn what_a_change_has_cost_stands_beside_what_it_was_to_cost() {
    let mut installation = Installation::start_failing_over("failover-objectives");
    let with = |rto: &str| {
        let objectives =
            format!("[app.objectives]\nrto = \"{rto}\"\nrpo = \"0B\"\n\n[app.failover]");
        move |text: String| text.replacen("[app.failover]", &objectives, 1)
    };
    installation.reconfigure(with("60s"));
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE t (n int)").await;
    wait_active(&installation, "a").await;
    // Long enough for control to hear it, or nobody knows since when it is lost.
    tokio::time::sleep(Duration::from_secs(2)).await;
    installation.signal_server("a", "KILL");
    wait_active(&installation, "b").await;
    let shown_of = |id: &str, more: &[&str]| {
        shown(&installation.holdfast(&[&["executions", id], more].concat()))
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    let text = loop {
        let text = shown_of("1", &[]);
        if text.contains(": completed") {
            break text;
        }
        assert!(Instant::now() < deadline, "{text}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(text.contains("without service: ") && text.contains(", objective 1m: met"), "{text}");
    assert!(text.contains("lost: 0 bytes, objective 0 bytes: met"), "{text}");
    let page = shown_of("1", &["--report"]);
    assert!(page.starts_with("# failover of shop, from a to b: completed\n"), "{page}");
    assert!(page.contains("| lost | 0 bytes, objective 0 bytes: met |"), "{page}");
    assert!(
        page.contains("| asked for by | holdfast") && page.contains("| rejoin | done |"),
        "{page}"
    );
    let metrics = format!("{}/metrics", installation.facts.api);
    let metrics = ureq::get(metrics).call().unwrap().body_mut().read_to_string().unwrap();
    assert!(metrics.contains("holdfast_recovery_ms{app=\"shop\",kind=\"failover\"} "), "{metrics}");
    assert!(metrics.contains("holdfast_loss_bytes{app=\"shop\",kind=\"failover\"} 0"), "{metrics}");
    assert!(metrics.contains("holdfast_recovery_objective_ms{app=\"shop\"} 60000"), "{metrics}");
    drop(client);
    installation.reconfigure(|text| text.replacen("rto = \"60s\"", "rto = \"1ms\"", 1));
    let text = installation.switch_to("a");
    assert!(text.contains(", objective 1ms: missed"), "{text}");
}
