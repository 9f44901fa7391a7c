//! The configuration file is taken up while clients go on.

use std::time::{Duration, Instant};

use pg::Connection;
use wire::frontend;
use wire::sqlstate::SqlState;

use crate::agents::wait_until;
use crate::failover::begin;
use crate::nodes::{control_of, wait_for_control};
use crate::support::{HOLDFAST, Installation, run, shown, signal, value};

async fn refused(session: &mut Connection, sql: &str) {
    let error = session.query(sql).await.map(|_| ()).expect_err(sql);
    assert_eq!(error.sqlstate(), Some(SqlState::INSUFFICIENT_PRIVILEGE), "{sql}: {error}");
}

fn change(installation: &Installation, from: &str, to: &str) {
    let text = std::fs::read_to_string(installation.config()).unwrap();
    assert!(text.contains(from), "{from} is not in {text}");
    std::fs::write(installation.config(), text.replacen(from, to, 1)).unwrap();
}

#[tokio::test]
async fn what_an_application_keeps_to_is_taken_up_while_clients_go_on() {
    let installation = Installation::start("configuration");
    let mut client = installation.connect().await;
    run(&mut client, "SET work_mem = '7MB'").await;
    let says = |args: &[&str]| shown(&installation.holdfast(args));
    assert!(says(&["diff"]).contains("nothing is different"), "{}", says(&["diff"]));
    change(&installation, "[[app.cell]]", "[app.objectives]\nrto = \"1ms\"\n\n[[app.cell]]");
    let text = says(&["diff"]);
    assert!(text.contains("app.shop.objectives.rto") && text.contains("at once"), "{text}");
    let text = says(&["switchover", "shop", "--to", "b"]);
    assert!(!text.contains("objective"), "not taken up yet: {text}");
    let text = says(&["apply", "--reason", "we promise more"]);
    assert!(text.contains("app.shop.objectives.rto") && text.contains("1ms"), "{text}");
    assert!(says(&["diff"]).contains("nothing is different"));
    let audit = says(&["audit"]);
    assert!(audit.contains("apply") && audit.contains("we promise more"), "{audit}");
    let text = says(&["switchover", "shop", "--to", "a"]);
    assert!(text.contains(", objective 1ms: missed"), "{text}");
    // A signal does the same.
    change(&installation, "rto = \"1ms\"", "rto = \"10m\"");
    signal(installation.pid(), "HUP");
    wait_until("the signal", async || says(&["diff"]).contains("nothing is different")).await;
    let text = says(&["switchover", "shop", "--to", "b"]);
    assert!(text.contains(", objective 10m: met"), "{text}");
    assert_eq!(value(&mut client, "SHOW work_mem").await, "7MB");
}

#[tokio::test]
async fn nothing_is_taken_up_that_could_not_run_together() {
    let installation = Installation::start("configuration-waits");
    let mut client = installation.connect().await;
    let says = |args: &[&str]| shown(&installation.holdfast(args));
    // A mistake anywhere: nothing is taken up, by nobody.
    let (before, with) = ("sslmode = \"disable\"\n", "sslmode = \"disable\"\nslots = ");
    change(&installation, before, &format!("{with}\"perhaps\"\n"));
    let output = installation.holdfast(&["apply"]);
    assert!(!output.status.success());
    assert!(shown(&output).contains("`app.slots`"), "{}", shown(&output));
    signal(installation.pid(), "HUP");
    // What a cell is takes a restart, and with it what was checked with it. The signal may be obeyed as late as now.
    change(&installation, "\"-c listen_addresses", "\"-c work_mem=8MB\", \"-c listen_addresses");
    change(&installation, "slots = \"perhaps\"", "slots = true");
    let text = says(&["apply"]);
    assert!(!text.contains("at once"), "{text}");
    let waits = text.lines().filter(|line| line.contains("at a restart")).count();
    assert!(waits >= 2 && text.contains("app.shop.slots"), "{text}");
    assert!(!text.contains("work_mem"), "what may be a secret is not shown: {text}");
    assert_eq!(value(&mut client, "SELECT 1").await, "1");
    assert!(says(&["diff"]).contains("app.shop.slots"), "it waits still");
}

#[tokio::test]
async fn each_node_takes_up_its_own_file_and_a_reload_ends_nobody() {
    let installation = Installation::start_nodes("configuration-nodes", &[]);
    let first = wait_for_control(&installation).await;
    let mut client = installation.connect().await;
    run(&mut client, "SET work_mem = '7MB'").await;
    for number in 1..=3 {
        let path = installation.dir.join(format!("control-{number}.toml"));
        let text = std::fs::read_to_string(&path).unwrap();
        let with = "[app.objectives]\nrto = \"10m\"\n\n[[app.cell]]";
        std::fs::write(&path, text.replacen("[[app.cell]]", with, 1)).unwrap();
    }
    let says = |args: &[&str]| shown(&installation.holdfast(args));
    assert!(says(&["diff"]).contains("app.shop.objectives.rto"));
    let proxies = installation.facts.proxies.iter().map(|(_, pid)| *pid);
    let agents = ["a", "b"].map(|cell| installation.agent(cell));
    let all: Vec<u32> =
        installation.facts.controls.iter().copied().chain(proxies).chain(agents).collect();
    for pid in &all {
        signal(*pid, "HUP");
    }
    wait_until("the signal", async || says(&["diff"]).contains("nothing is different")).await;
    for pid in &all {
        assert!(std::fs::exists(format!("/proc/{pid}/cwd")).unwrap(), "process {pid} has ended");
    }
    // Each proxy has rules in a file of its own.
    for number in 1..=2 {
        let path = installation.dir.join(format!("proxy-{number}.toml"));
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text.replacen("[[app.cell]]", &format!("{FREEZE}[[app.cell]]"), 1))
            .unwrap();
    }
    let text = says(&["diff"]);
    assert!(text.contains("2 proxies have other rules for `shop` in their files"), "{text}");
    let text = says(&["apply"]);
    assert!(text.contains("2 proxies go by the new rules of `shop`"), "{text}");
    refused(&mut client, "CREATE TABLE t (n int)").await;
    refused(&mut installation.connect_elsewhere().await, "CREATE TABLE t (n int)").await;
    // What takes the place of control has taken up the same.
    // Until agents have each other's promises, a server ends with its lease.
    tokio::time::sleep(Duration::from_secs(3)).await;
    signal(installation.facts.controls[first], "KILL");
    wait_until("another control", async || control_of(&installation).is_some()).await;
    let text = says(&["diff"]);
    assert!(text.contains("nothing is different"), "{text}");
    let text = says(&["switchover", "shop", "--to", "b"]);
    assert!(text.contains(", objective 10m: met"), "{text}");
    assert_eq!(value(&mut client, "SHOW work_mem").await, "7MB");
}

/// Also of one that waits for control.
#[test]
fn a_reload_ends_nobody_who_waits() {
    let dir = std::env::temp_dir().join(format!("holdfast-waits-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let app = "[[app]]\nname = \"shop\"\nauth = \"trust\"\nsslmode = \"disable\"\n\n\
        [[app.cell]]\nname = \"a\"\nserver = \"127.0.0.1:1\"\nactive = true\n\n\
        [[app.cell]]\nname = \"b\"\nserver = \"127.0.0.1:2\"\n";
    let proxy = "[proxy]\nlisten = [\"127.0.0.1:0\"]\n\n[proxy.control]\nname = \"waits\"\naddress = \"127.0.0.1:1\"\n\n";
    let path = dir.join("proxy.toml");
    std::fs::write(&path, format!("{proxy}{app}")).unwrap();
    let log = dir.join("log");
    let mut child = std::process::Command::new(HOLDFAST)
        .args(["run", "-c"])
        .arg(&path)
        .env("HOLDFAST_LOG", "debug")
        .stderr(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::fs::metadata(&log).unwrap().len() == 0 {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(20));
    }
    signal(child.id(), "HUP");
    std::thread::sleep(Duration::from_millis(300));
    let ended = child.try_wait().unwrap();
    let _ = child.kill();
    let _ = child.wait();
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(ended.is_none(), "{ended:?}: {said}");
    std::fs::remove_dir_all(&dir).unwrap();
}

const FREEZE: &str = "[app.policy]\nversion = 2\n\n[[app.policy.rule]]\nname = \"freeze\"\nstates = [\"active\"]\n\
    classes = [\"definition\"]\ndisposition = \"refuse\"\n\n[[app.policy.rule]]\nname = \"all\"\nstates = [\"active\"]\ndisposition = \"accept\"\n\n";

/// What a statement does that SQL has prepared is known, whenever that was; of what was prepared while nothing was judged, it is
/// not.
#[tokio::test]
async fn a_prepared_statement_passes_no_rule_that_is_taken_up() {
    for pool in [None, Some(4)] {
        let installation = match pool {
            None => Installation::start("configuration-prepared"),
            Some(size) => Installation::start_pooled("configuration-shared", size),
        };
        let apply = async || {
            let output = installation.holdfast_in_background(&["apply"]);
            shown(&output.await.unwrap())
        };
        let freeze = FREEZE.replace("definition", "write");
        let mut before = installation.connect().await;
        run(&mut before, "CREATE TABLE t (n int)").await;
        run(&mut before, "PREPARE ins AS INSERT INTO t VALUES (1)").await;
        run(&mut before, "EXECUTE ins").await;
        change(&installation, "[[app.cell]]", &format!("{freeze}[[app.cell]]"));
        apply().await;
        refused(&mut before, "EXECUTE ins").await;
        let mut client = installation.connect().await;
        run(&mut client, "PREPARE ins AS INSERT INTO t VALUES (2)").await;
        run(&mut client, "PREPARE sel AS SELECT 3").await;
        refused(&mut client, "EXECUTE ins").await;
        for version in [3, 4] {
            let (from, to) = (format!("version = {}", version - 1), format!("version = {version}"));
            change(&installation, &from, &to);
            let text = apply().await;
            assert!(text.contains("1 proxies go by the new rules"), "{text}");
            refused(&mut client, "EXECUTE ins").await;
            assert_eq!(value(&mut client, "EXECUTE sel").await, "3");
        }
        let moved = installation.holdfast_in_background(&["switchover", "shop", "--to", "b"]);
        assert!(moved.await.unwrap().status.success());
        refused(&mut client, "EXECUTE ins").await;
        assert_eq!(value(&mut client, "EXECUTE sel").await, "3");
        assert_eq!(value(&mut client, "SELECT count(*) FROM t").await, "1");
    }
}

/// Rules for commands begin to hold, and end, between two commands of each session: none is told anything else.
#[tokio::test]
async fn rules_for_commands_are_taken_up_between_two_commands() {
    let installation = Installation::start_pooled("configuration-rules", 8);
    let apply = async || {
        let output = installation.holdfast_in_background(&["apply"]);
        shown(&output.await.unwrap())
    };
    let mut client = installation.connect().await;
    let writers = begin(&installation).await;
    for _ in 0..3 {
        run(&mut client, "CREATE TABLE t (n int); DROP TABLE t").await;
        change(&installation, "[[app.cell]]", &format!("{FREEZE}[[app.cell]]"));
        let text = shown(&installation.holdfast(&["diff"]));
        assert!(text.contains("app.shop.policy.rule.freeze.classes"), "{text}");
        let text = apply().await;
        assert!(text.contains("1 proxies go by the new rules of `shop`"), "{text}");
        refused(&mut client, "CREATE TABLE t (n int)").await;
        change(&installation, FREEZE, "");
        let text = apply().await;
        assert!(text.contains("1 proxies go by the new rules of `shop`"), "{text}");
    }
    for writer in writers {
        let (acknowledged, told) = writer.stop().await;
        assert!(acknowledged.len() > 50 && told.is_empty(), "{} {told:?}", acknowledged.len());
    }
    // Also in a transaction that is open, and nobody waits for its end; what it has bound is still there.
    run(&mut client, "BEGIN; DECLARE c CURSOR FOR SELECT 1").await;
    let mut copies = installation.connect().await;
    let mut copy = Vec::new();
    frontend::query(&mut copy, b"COPY written FROM STDIN");
    copies.send(&copy).await.unwrap();
    assert_eq!(copies.receive().await.unwrap().tag, b'G');
    change(&installation, "[[app.cell]]", &format!("{FREEZE}[[app.cell]]"));
    let text = apply().await;
    assert!(text.contains("at once") && text.contains("go by the new rules"), "{text}");
    refused(&mut installation.connect().await, "CREATE TABLE t (n int)").await;
    assert_eq!(value(&mut client, "FETCH c").await, "1");
    let mut rest = Vec::new();
    frontend::copy_data(&mut rest, b"-1\n");
    frontend::copy_done(&mut rest);
    copies.send(&rest).await.unwrap();
    copies.answers().await.unwrap();
    assert_eq!(value(&mut copies, "SELECT count(*) FROM written WHERE n = -1").await, "1");
    // Whoever does not wait for answers neither.
    let mut pipeline = Vec::new();
    for sql in ["COMMIT", "BEGIN", "DROP TABLE t", "COMMIT"] {
        frontend::query(&mut pipeline, sql.as_bytes());
    }
    client.send(&pipeline).await.unwrap();
    let mut answers = Vec::new();
    while answers.len() < 4 {
        answers.push(client.answers().await.map(drop));
    }
    assert!(answers[0].is_ok() && answers[1].is_ok(), "{answers:?}");
    let told = answers[2].as_ref().unwrap_err().sqlstate();
    assert_eq!(told, Some(SqlState::INSUFFICIENT_PRIVILEGE), "{answers:?}");
    refused(&mut client, "DROP TABLE t").await;
    // What SQL may have prepared anew is nothing that defines.
    run(&mut client, "DO 'BEGIN END'").await;
    run(&mut client, r"SELECT 'C:\'").await;
    assert!(shown(&installation.holdfast(&["diff"])).contains("nothing is different"));
    // The same in other words.
    change(&installation, "name = \"freeze\"\n", "name = \"freeze\"\nroles = []\n");
    assert!(shown(&installation.holdfast(&["diff"])).contains("app.shop.policy.rule.freeze.roles"));
    apply().await;
    assert!(shown(&installation.holdfast(&["diff"])).contains("nothing is different"));
}
