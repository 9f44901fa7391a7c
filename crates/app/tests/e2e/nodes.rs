//! Several nodes of which one is control, with a real etcd: whichever is lost, another goes on, and no two do.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::agents::{switch_to, wait_until};
use crate::failover::{begin, end, wait_active};
use crate::support::{HOLDFAST, Installation, run, shown, signal, value};

/// Longer than a seat and a lease after it.
const SEAT_AND_MORE: Duration = Duration::from_secs(6);

/// The node that is control, if there is one.
pub(crate) fn control_of(installation: &Installation) -> Option<usize> {
    let mut apis = installation.facts.api.split(',').enumerate();
    apis.find(|(_, api)| {
        let output = Command::new(HOLDFAST).args(["--api", api, "executions"]).output().unwrap();
        output.status.success()
    })
    .map(|(at, _)| at)
}

pub(crate) async fn wait_for_control(installation: &Installation) -> usize {
    let mut found = None;
    wait_until("another control", async || {
        found = control_of(installation);
        found.is_some()
    })
    .await;
    found.unwrap()
}

/// Starts a node in place of one that was killed.
fn start_node(installation: &Installation, at: usize, env: &[(&str, &str)]) -> Child {
    Command::new(HOLDFAST)
        .args(["run", "-c"])
        .arg(installation.dir.join(format!("control-{}.toml", at + 1)))
        .envs(env.iter().copied())
        .env("HOLDFAST_LOG", "warn")
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn a_killed_control_is_replaced_by_another_node() {
    let installation = Installation::start_nodes("nodes-kill", &["--acks", "1"]);
    let mut idle = installation.connect_elsewhere().await;
    // Whoever runs something while a definition is looked at keeps its server, and is lost with that.
    run(&mut idle, "SET work_mem = '7MB'").await;
    let writers = begin(&installation).await;
    wait_active(&installation, "a").await;
    let first = wait_for_control(&installation).await;
    signal(installation.facts.controls[first], "KILL");
    // The primary is lost as well, before anybody has the seat.
    installation.signal_server("a", "KILL");
    wait_active(&installation, "b").await;
    assert_ne!(control_of(&installation), Some(first));
    assert_eq!(value(&mut idle, "SHOW work_mem").await, "7MB");
    switch_to(&installation, "a").await;
    end(&installation, writers).await;
    // One that ends by itself leaves the seat to the last.
    let second = wait_for_control(&installation).await;
    signal(installation.facts.controls[second], "TERM");
    wait_until("the last node", async || {
        control_of(&installation).is_some_and(|at| at != second && at != first)
    })
    .await;
    switch_to(&installation, "b").await;
}

/// A plan goes on where another node has the seat.
#[tokio::test]
async fn a_plan_outlives_the_node_that_carries_it_out() {
    let installation = Installation::start_nodes("nodes-plan", &["--no-failover"]);
    let plan = "[[app.plan]]\nname = \"p\"\n\
        [[app.plan.step]]\nname = \"switch\"\nactivate = \"b\"\n\
        [[app.plan.step]]\nname = \"wait\"\nwait = \"3s\"\n\
        [[app.plan.step]]\nname = \"back\"\nactivate = \"a\"\n";
    for at in 0..3 {
        signal(installation.facts.controls[at], "KILL");
        let path = installation.dir.join(format!("control-{}.toml", at + 1));
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}\n{plan}")).unwrap();
    }
    let mut nodes: Vec<Child> = (0..3).map(|at| start_node(&installation, at, &[])).collect();
    let first = wait_for_control(&installation).await;
    wait_active(&installation, "a").await;
    let mut idle = installation.connect().await;
    run(&mut idle, "SET work_mem = '7MB'").await;
    let begun = installation.holdfast(&["execute", "shop", "p", "--detach"]);
    assert!(begun.status.success(), "{}", shown(&begun));
    wait_until("the second step", async || {
        shown(&installation.holdfast(&["executions", "1"])).contains("wait    running")
    })
    .await;
    nodes[first].kill().unwrap();
    nodes[first].wait().unwrap();
    wait_until("the end of the plan", async || {
        shown(&installation.holdfast(&["executions", "1"])).contains("completed, ")
    })
    .await;
    assert_eq!(installation.active(), "a");
    assert_eq!(value(&mut idle, "SHOW work_mem").await, "7MB");
    let all = shown(&installation.holdfast(&["executions"]));
    assert_eq!(all.matches("switchover: ").count(), 2, "{all}");
    for node in &mut nodes {
        let _ = node.kill();
        let _ = node.wait();
    }
}

#[tokio::test]
async fn a_control_that_stood_still_does_nothing_more() {
    let installation = Installation::start_nodes("nodes-stop", &["--no-failover"]);
    let mut idle = installation.connect().await;
    run(&mut idle, "SET work_mem = '7MB'").await;
    let writers = begin(&installation).await;
    wait_active(&installation, "a").await;
    for cell in ["b", "a"] {
        let first = wait_for_control(&installation).await;
        // In the middle of a switchover, wherever that is.
        let switch = installation.holdfast_in_background(&["switchover", "shop", "--to", cell]);
        tokio::time::sleep(Duration::from_millis(700)).await;
        signal(installation.facts.controls[first], "STOP");
        tokio::time::sleep(SEAT_AND_MORE).await;
        let mut others: Vec<&str> = installation.facts.api.split(',').collect();
        others.remove(first);
        let others = others.join(",");
        let settled = || {
            let output =
                Command::new(HOLDFAST).args(["--api", &others, "status", "shop"]).output().unwrap();
            shown(&output)
        };
        wait_until("the other control", async || {
            let status = settled();
            status.contains("active cell") && !status.contains('!')
        })
        .await;
        let before = settled();
        signal(installation.facts.controls[first], "CONT");
        let _ = switch.await.unwrap();
        tokio::time::sleep(SEAT_AND_MORE).await;
        assert_ne!(control_of(&installation), Some(first));
        let words = |text: &str| text.lines().next().unwrap_or_default().to_owned();
        assert_eq!(words(&settled()), words(&before));
        if installation.active() != cell {
            switch_to(&installation, cell).await;
        }
    }
    assert_eq!(value(&mut idle, "SHOW work_mem").await, "7MB");
    end(&installation, writers).await;
}

#[tokio::test]
async fn a_store_that_is_gone_costs_nobody_anything() {
    let installation = Installation::start_nodes("nodes-store", &["--acks", "1"]);
    let etcd = installation.facts.etcd.unwrap();
    let mut idle = installation.connect_elsewhere().await;
    run(&mut idle, "SET work_mem = '7MB'").await;
    let writers = begin(&installation).await;
    wait_active(&installation, "a").await;
    signal(etcd, "STOP");
    wait_until("nobody is control", async || control_of(&installation).is_none()).await;
    tokio::time::sleep(SEAT_AND_MORE).await;
    // Clients come and go all the same.
    run(&mut installation.connect_elsewhere().await, "INSERT INTO written VALUES (9999999)").await;
    signal(etcd, "CONT");
    wait_for_control(&installation).await;
    wait_active(&installation, "a").await;
    assert_eq!(value(&mut idle, "SHOW work_mem").await, "7MB");
    switch_to(&installation, "b").await;
    for writer in writers {
        let (acknowledged, told) = writer.stop().await;
        assert!(acknowledged.len() > 50 && told.is_empty(), "{} {told:?}", acknowledged.len());
    }
}

#[tokio::test]
async fn what_a_killed_control_has_begun_another_brings_to_its_end() {
    let installation = Installation::start_nodes("nodes-crash", &["--no-failover"]);
    let mut idle = installation.connect_elsewhere().await;
    run(&mut idle, "SET work_mem = '7MB'").await;
    let writers = begin(&installation).await;
    wait_active(&installation, "a").await;
    for pid in &installation.facts.controls {
        signal(*pid, "KILL");
    }
    let mut active = "a";
    for (point, is_granted) in [("fence:end", false), ("grant:end", true), ("attach:begin", true)] {
        let mut dies = start_node(&installation, 0, &[("HOLDFAST_CRASH_AT", point)]);
        assert_eq!(wait_for_control(&installation).await, 0);
        let mut lives = start_node(&installation, 1, &[]);
        wait_active(&installation, active).await;
        let other = if active == "a" { "b" } else { "a" };
        let output = installation.holdfast_in_background(&["switchover", "shop", "--to", other]);
        let output = output.await.unwrap();
        // Whoever has asked is told by the next control what became of it.
        assert_eq!(output.status.success(), is_granted, "{point}: {}", shown(&output));
        assert!(shown(&output).contains("execution "), "{point}: {}", shown(&output));
        dies.wait().unwrap();
        if is_granted {
            active = other;
        }
        wait_active(&installation, active).await;
        assert_eq!(control_of(&installation), Some(1), "{point}");
        assert_eq!(value(&mut idle, "SHOW work_mem").await, "7MB", "{point}");
        signal(lives.id(), "TERM");
        lives.wait().unwrap();
    }
    let mut last = start_node(&installation, 2, &[]);
    wait_active(&installation, active).await;
    end(&installation, writers).await;
    signal(last.id(), "TERM");
    last.wait().unwrap();
}

#[tokio::test]
async fn a_copy_of_etcd_is_put_back_with_higher_epochs() {
    let installation = Installation::start_nodes("nodes-copy", &["--no-failover"]);
    let mut idle = installation.connect().await;
    run(&mut idle, "CREATE TABLE kept (n int)").await;
    wait_active(&installation, "a").await;
    let config = installation.dir.join("control-3.toml");
    let copy = installation.dir.join("store.copy");
    let store = |verb: &str, option: &str| {
        let mut command = Command::new(HOLDFAST);
        command.args(["store", verb, "-c"]).arg(&config).arg(option).arg(&copy);
        command.output().unwrap()
    };
    let output = store("backup", "--to");
    assert!(output.status.success(), "{}", shown(&output));
    switch_to(&installation, "b").await;
    let output = store("restore", "--from");
    assert!(shown(&output).contains("a node is control"), "{}", shown(&output));
    for pid in &installation.facts.controls {
        signal(*pid, "TERM");
    }
    wait_until("the end of all nodes", async || control_of(&installation).is_none()).await;
    let output = store("restore", "--from");
    assert!(shown(&output).contains("no cell is active"), "{}", shown(&output));
    let mut node = start_node(&installation, 0, &[]);
    wait_for_control(&installation).await;
    let status = shown(&installation.holdfast(&["status", "shop"]));
    assert!(status.contains("the store was restored"), "{status}");
    let args = ["unfence", "shop", "b"];
    let output = installation.holdfast_in_background(&args).await.unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    wait_active(&installation, "b").await;
    run(&mut installation.connect().await, "INSERT INTO kept VALUES (1)").await;
    signal(node.id(), "TERM");
    node.wait().unwrap();
}

/// A store that was wiped, or put back from a copy, knows less than agents have seen: it ends nobody's server, and what it
/// says of commits is not believed.
#[tokio::test]
async fn a_store_that_was_put_back_is_not_believed() {
    let installation = Installation::start_nodes("nodes-older", &["--acks", "1"]);
    let etcd = installation.facts.etcd.unwrap();
    let writers = begin(&installation).await;
    wait_active(&installation, "a").await;
    switch_to(&installation, "b").await;
    wait_active(&installation, "b").await;
    // Nobody is control, and etcd begins anew.
    let command = std::fs::read(format!("/proc/{etcd}/cmdline")).unwrap();
    signal(etcd, "KILL");
    wait_until("nobody is control", async || control_of(&installation).is_none()).await;
    std::fs::remove_dir_all(installation.dir.join("etcd")).unwrap();
    let words: Vec<String> = String::from_utf8(command)
        .unwrap()
        .split('\0')
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect();
    let mut etcd = Command::new(&words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    for pid in &installation.facts.controls {
        signal(*pid, "KILL");
    }
    let mut node = start_node(&installation, 0, &[]);
    wait_for_control(&installation).await;
    tokio::time::sleep(SEAT_AND_MORE).await;
    let status = shown(&installation.holdfast(&["status", "shop"]));
    assert!(status.contains("has seen a later store than this one"), "{status}");
    let mut direct = installation.direct("b").await;
    assert_eq!(value(&mut direct, "SELECT pg_is_in_recovery()").await, "f");
    for writer in writers {
        let (acknowledged, told) = writer.stop().await;
        assert!(acknowledged.len() > 50 && told.is_empty(), "{} {told:?}", acknowledged.len());
    }
    node.kill().unwrap();
    node.wait().unwrap();
    etcd.kill().unwrap();
    etcd.wait().unwrap();
}

/// A second process of a node ends; the first goes on.
#[tokio::test]
async fn a_node_that_is_started_twice_goes_on() {
    let installation = Installation::start_nodes("nodes-twice", &["--no-failover"]);
    let at = wait_for_control(&installation).await;
    let mut second = start_node(&installation, at, &[]);
    assert!(!second.wait().unwrap().success());
    tokio::time::sleep(SEAT_AND_MORE).await;
    assert_eq!(control_of(&installation), Some(at));
    switch_to(&installation, "b").await;
}
