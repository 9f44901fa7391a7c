//! Servers with an agent beside each: the lease says who may be the primary, and ends whoever lost it.

use std::time::{Duration, Instant};

use crate::failover::{begin, end, wait_active};
use crate::support::{Installation, connect, run, shown, signal, value};

const POLL: Duration = Duration::from_millis(20);

/// Long enough for a lease to end, and for what follows.
const LONG: Duration = Duration::from_secs(30);

pub(crate) async fn wait_until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !is_so().await {
        assert!(Instant::now() < deadline, "waited {LONG:?} for {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// A switchover that must complete, while writers write.
pub(crate) async fn switch_to(installation: &Installation, cell: &str) -> String {
    let output = installation.holdfast_in_background(&["switchover", "shop", "--to", cell]);
    let output = output.await.unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    shown(&output)
}

/// Writes to a server past the proxy, as long as it takes writes, and gives the number of the last.
async fn intrude(installation: &Installation, cell: &str) -> u64 {
    let mut client = installation.direct(cell).await;
    for number in 1.. {
        if client.query(&format!("INSERT INTO intruded VALUES ({number})")).await.is_err() {
            return number;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    0
}

/// A commit is on both servers before it is acknowledged.
fn synchronous(text: String) -> String {
    text.replace("acks = 0", "acks = 1")
}

/// Until that is proven: without, nobody fails over by himself.
pub(crate) async fn wait_protected(installation: &Installation) {
    wait_until("commits that wait", async || {
        !shown(&installation.holdfast(&["status", "shop"])).contains('!')
    })
    .await;
}

#[tokio::test]
async fn a_switchover_goes_by_way_of_agents() {
    let installation = Installation::start_with_agents("agents-switchover");
    let mut idle = installation.connect().await;
    run(&mut idle, "SET work_mem = '7MB'").await;
    let writers = begin(&installation).await;
    for cell in ["b", "a"] {
        let text = switch_to(&installation, cell).await;
        assert!(text.contains("completed") && text.contains("rewound"), "{text}");
    }
    assert_eq!(value(&mut idle, "SHOW work_mem").await, "7MB");
    let (mut direct, mut standby) =
        (installation.direct("a").await, installation.direct("b").await);
    assert_eq!(value(&mut direct, "SELECT pg_is_in_recovery()").await, "f");
    assert_eq!(value(&mut standby, "SELECT pg_is_in_recovery()").await, "t");
    end(&installation, writers).await;
}

#[tokio::test]
async fn a_server_that_crashes_is_started_again_by_its_agent() {
    let installation = Installation::start_with_agents("agents-crash");
    let writers = begin(&installation).await;
    installation.signal_server("a", "KILL");
    wait_until("the primary", async || {
        let Ok(mut client) = connect(installation.facts.servers["a"], "postgres", None).await
        else {
            return false;
        };
        client.value("SELECT pg_is_in_recovery()").await.is_ok_and(|v| v.as_deref() == Some("f"))
    })
    .await;
    wait_active(&installation, "a").await;
    // A failover was thought of, and would have lost what nobody had allowed to lose.
    let executions = shown(&installation.holdfast(&["executions"]));
    assert!(executions.contains("nothing may be lost"), "{executions}");
    end(&installation, writers).await;
}

#[tokio::test]
async fn a_server_without_its_agent_is_ended_before_another_is_active() {
    for (name, stop) in [("killed", "KILL"), ("stopped", "STOP"), ("guarded", "KILL")] {
        let mut installation = Installation::start_with_agents(&format!("agents-{name}"));
        installation.reconfigure(synchronous);
        let writers = begin(&installation).await;
        wait_protected(&installation).await;
        run(&mut installation.connect().await, "CREATE TABLE intruded (n bigint)").await;
        if name == "guarded" {
            // Another guard, which has hardly begun, knows what the last one knew.
            let before = installation.guard("a");
            signal(before.unwrap(), "KILL");
            let other = async || installation.guard("a").is_some_and(|now| Some(now) != before);
            wait_until("another guard", other).await;
        }
        let agent = installation.agent("a");
        signal(agent, stop);
        let intruded = intrude(&installation, "a").await;
        assert!(intruded > 1);
        wait_active_on(&installation, "b").await;
        // What it took at the end had been the lost server's alone, or was replicated: there is nothing after it.
        let mut active = installation.direct("b").await;
        let there = value(&mut active, "SELECT coalesce(max(n), 0) FROM intruded").await;
        assert!(there.parse::<u64>().unwrap() <= intruded);
        assert!(installation.guard("a").is_some());
        // It wakes up, or is started: its server is a standby from now on.
        if stop == "STOP" {
            signal(agent, "CONT");
        } else {
            installation.start_agent("a");
        }
        wait_active(&installation, "b").await;
        let mut standby = installation.direct("a").await;
        assert_eq!(value(&mut standby, "SELECT pg_is_in_recovery()").await, "t");
        end(&installation, writers).await;
    }
}

async fn wait_active_on(installation: &Installation, cell: &str) {
    wait_until("the failover", async || {
        let status = shown(&installation.holdfast(&["status", "shop"]));
        status.contains(&format!("active cell {cell},"))
    })
    .await;
    let port = installation.facts.servers[cell];
    wait_until("the promotion", async || {
        let Ok(mut client) = connect(port, "postgres", None).await else {
            return false;
        };
        client.value("SELECT pg_is_in_recovery()").await.is_ok_and(|v| v.as_deref() == Some("f"))
    })
    .await;
}

#[tokio::test]
async fn a_lost_host_is_replaced_once_its_lease_is_over() {
    let mut installation = Installation::start_with_agents("agents-host");
    installation.reconfigure(synchronous);
    let writers = begin(&installation).await;
    wait_protected(&installation).await;
    signal(installation.agent("a"), "KILL");
    signal(installation.guard("a").unwrap(), "KILL");
    installation.signal_server("a", "KILL");
    wait_active_on(&installation, "b").await;
    let execution = shown(&installation.holdfast(&["executions", "1"]));
    assert!(execution.contains("its lease is over"), "{execution}");
    assert!(execution.contains("1 of 1 standbys"), "{execution}");
    // The host is back.
    installation.start_agent("a");
    wait_active(&installation, "b").await;
    end(&installation, writers).await;
}

#[tokio::test]
async fn whoever_starts_a_server_without_a_lease_starts_none_that_takes_writes() {
    let mut installation = Installation::start_with_agents("agents-none");
    installation.reconfigure(|text| text.replace("automatic = true", "automatic = false"));
    run(&mut installation.connect().await, "CREATE TABLE intruded (n bigint)").await;
    // Control is gone for longer than the lease, and nobody pledges.
    signal(installation.agent("b"), "STOP");
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    assert!(intrude(&installation, "a").await > 1);
    // It is ended before anything is written.
    let signal_file = installation.dir.join("a/standby.signal");
    wait_until("the signal", async || signal_file.exists()).await;
    signal(installation.agent("b"), "CONT");
    // It is back, and the cell is the active one as before.
    installation.restart(&[]);
    wait_active(&installation, "a").await;
    run(&mut installation.connect().await, "INSERT INTO intruded VALUES (0)").await;
}

async fn names(installation: &Installation) -> String {
    let mut active = installation.direct("a").await;
    value(&mut active, "SHOW synchronous_standby_names").await
}

#[tokio::test]
async fn commits_wait_for_the_standby_and_not_for_ever() {
    let mut installation = Installation::start_with_agents("agents-sync");
    installation.reconfigure(synchronous);
    let writers = begin(&installation).await;
    for cell in ["b", "a"] {
        wait_protected(&installation).await;
        switch_to(&installation, cell).await;
    }
    wait_protected(&installation).await;
    assert_eq!(names(&installation).await, "ANY 1 (\"holdfast_b\")");
    // The standby is gone: commits wait for a second, and go on without it. That is said, and nobody fails over then.
    signal(installation.agent("b"), "KILL");
    installation.signal_server("b", "KILL");
    let alone = "acknowledged by one server alone";
    wait_until("the end of waiting", async || {
        shown(&installation.holdfast(&["status", "shop"])).contains(alone)
    })
    .await;
    wait_until("the setting", async || names(&installation).await.is_empty()).await;
    installation.start_agent("b");
    wait_protected(&installation).await;
    assert_eq!(names(&installation).await, "ANY 1 (\"holdfast_b\")");
    end(&installation, writers).await;
}

/// A certificate for a name, signed by an authority, in files `NAME.crt` and `NAME.key`.
fn certify(
    dir: &std::path::Path,
    name: &str,
    common_name: &str,
    authority: &rcgen::Issuer<'_, rcgen::KeyPair>,
) {
    let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, common_name);
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = params.signed_by(&key, authority).unwrap();
    std::fs::write(dir.join(format!("{name}.crt")), cert.pem()).unwrap();
    std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
}

#[tokio::test]
async fn agents_and_control_know_each_other_by_their_certificates() {
    let mut installation = Installation::start_with_agents("agents-tls");
    run(&mut installation.connect().await, "CREATE TABLE written (n int)").await;
    let dir = installation.dir.clone();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().unwrap();
    let authority = params.self_signed(&key).unwrap();
    std::fs::write(dir.join("ca.crt"), authority.pem()).unwrap();
    let authority = rcgen::Issuer::new(params, key);
    certify(&dir, "control", "control", &authority);
    certify(&dir, "a", "shop/a", &authority);
    certify(&dir, "b", "shop/b", &authority);
    let files = |name: &str| {
        let file = |end: &str| dir.join(format!("{name}.{end}")).display().to_string();
        let ca = dir.join("ca.crt").display().to_string();
        format!("cert = \"{}\"\nkey = \"{}\"\nca = \"{ca}\"\n", file("crt"), file("key"))
    };
    let show = |cell: &str, name: &str| {
        let path = dir.join(format!("agent-{cell}.toml"));
        let text = std::fs::read_to_string(&path).unwrap();
        let text: Vec<&str> = text
            .lines()
            .filter(|line| !["cert", "key", "ca "].iter().any(|key| line.starts_with(key)))
            .collect();
        std::fs::write(&path, format!("{}\n{}", text.join("\n"), files(name))).unwrap();
    };
    for cell in ["a", "b"] {
        signal(installation.agent(cell), "KILL");
        show(cell, cell);
    }
    installation.reconfigure(|text| {
        text.replace("[control.agents]\n", &format!("[control.agents]\n{}", files("control")))
    });
    for cell in ["a", "b"] {
        installation.start_agent(cell);
    }
    wait_active(&installation, "a").await;
    switch_to(&installation, "b").await;
    run(&mut installation.connect().await, "INSERT INTO written VALUES (1)").await;
    // With the other's certificate it is not believed, and gets no lease.
    signal(installation.agent("b"), "KILL");
    show("b", "a");
    installation.start_agent("b");
    wait_until("the end of the server", async || {
        connect(installation.facts.servers["b"], "postgres", None).await.is_err()
    })
    .await;
    signal(installation.agent("b"), "KILL");
    show("b", "b");
    installation.start_agent("b");
    wait_active(&installation, "b").await;
    assert_eq!(value(&mut installation.connect().await, "SELECT n FROM written").await, "1");
}

/// That a lease is over says nothing of a server that never had one: nobody would end it.
#[tokio::test]
async fn a_server_that_was_never_attended_is_not_taken_for_dead() {
    let mut installation = Installation::start_with_agents("agents-never");
    wait_until("the guard", async || installation.guard("a").is_some()).await;
    installation.reconfigure(|text| {
        text.replace("automatic = true", "automatic = false\nloss_max = \"1MB\"")
    });
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    signal(installation.agent("a"), "KILL");
    signal(installation.guard("a").unwrap(), "KILL");
    std::fs::remove_dir_all(installation.dir.join("state")).unwrap();
    installation.restart(&[]);
    // Seen once, it lives, and does not answer.
    tokio::time::sleep(Duration::from_secs(1)).await;
    installation.signal_server("a", "STOP");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let args = ["failover", "shop", "--to", "b", "--allow-data-loss"];
    let said = installation.holdfast_in_background(&args[..4]).await.unwrap();
    assert_eq!(said.status.code(), Some(1), "{}", shown(&said));
    assert!(shown(&said).contains("the agent of `a` is not heard"), "{}", shown(&said));
    let mut standby = installation.direct("b").await;
    assert_eq!(value(&mut standby, "SELECT pg_is_in_recovery()").await, "t");
    // Somebody says that it is dead, and sees to it.
    installation.signal_server("a", "KILL");
    let said = installation.holdfast_in_background(&args).await.unwrap();
    assert!(said.status.success(), "{}", shown(&said));
    assert_eq!(installation.active(), "b");
}

/// A second agent of the same cell, with a server of its own, gets no lease: else both servers would take writes.
#[tokio::test]
async fn two_agents_of_a_cell_do_not_hold_its_lease_together() {
    let installation = Installation::start_with_agents("agents-two");
    run(&mut installation.connect().await, "CREATE TABLE written (n int)").await;
    let dir = &installation.dir;
    let text = std::fs::read_to_string(dir.join("agent-b.toml")).unwrap();
    let text = text.replace("cell = \"b\"", "cell = \"a\"").replace("agent-b", "agent-second");
    let path = dir.join("agent-second.toml");
    std::fs::write(&path, text).unwrap();
    // The server of `b` becomes a primary by somebody's hand, and its agent says that it is of cell `a`.
    signal(installation.agent("b"), "KILL");
    let mut standby = installation.direct("b").await;
    run(&mut standby, "SELECT pg_promote()").await;
    let mut second = std::process::Command::new(crate::support::HOLDFAST)
        .args(["run", "-c"])
        .arg(&path)
        .env("HOLDFAST_LOG", "off")
        .spawn()
        .unwrap();
    wait_until("the end of the second primary", async || {
        connect(installation.facts.servers["b"], "postgres", None).await.is_err()
    })
    .await;
    // Nobody has noticed anything of it who works with the first.
    run(&mut installation.connect().await, "INSERT INTO written VALUES (1)").await;
    assert_eq!(installation.active(), "a");
    signal(second.id(), "KILL");
    second.wait().unwrap();
}

/// What was proven of commits is taken back once it does not hold any more.
#[tokio::test]
async fn commits_that_would_not_wait_are_not_relied_on() {
    let mut installation = Installation::start_with_agents("agents-proof");
    installation.reconfigure(synchronous);
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE written (n int)").await;
    wait_protected(&installation).await;
    let mut active = installation.direct("a").await;
    run(&mut active, "ALTER SYSTEM SET synchronous_commit = 'local'").await;
    run(&mut active, "SELECT pg_reload_conf()").await;
    let alone = async || {
        let status = shown(&installation.holdfast(&["status", "shop"]));
        status.contains("acknowledged by one server alone")
    };
    wait_until("the setting to be seen", alone).await;
    run(&mut active, "ALTER SYSTEM RESET synchronous_commit").await;
    run(&mut active, "SELECT pg_reload_conf()").await;
    wait_protected(&installation).await;
    // The standby hangs, and streams by name only.
    let mut standby = installation.direct("b").await;
    let receiver = value(&mut standby, "SELECT pid FROM pg_stat_wal_receiver").await;
    let receiver = receiver.parse().unwrap();
    signal(receiver, "STOP");
    let written = tokio::spawn(async move {
        run(&mut client, "INSERT INTO written VALUES (1)").await;
    });
    wait_until("the standby to be seen", alone).await;
    written.await.unwrap();
    signal(receiver, "CONT");
    wait_protected(&installation).await;
    // It crashes, and is there again.
    drop(standby);
    installation.signal_server("b", "KILL");
    wait_until("the standby", async || {
        connect(installation.facts.servers["b"], "postgres", None).await.is_ok()
    })
    .await;
    wait_protected(&installation).await;
}

#[tokio::test]
async fn a_target_that_crashes_before_its_promotion_is_promoted() {
    let mut installation = Installation::start_with_agents("agents-target");
    installation.reconfigure(synchronous);
    run(&mut installation.connect().await, "CREATE TABLE written (n int)").await;
    wait_protected(&installation).await;
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    installation.restart(&[("HOLDFAST_CRASH_AT", "promote:begin")]);
    installation.signal_server("a", "KILL");
    installation.wait_crashed();
    installation.signal_server("b", "KILL");
    installation.restart(&[]);
    wait_active(&installation, "b").await;
    run(&mut installation.connect().await, "INSERT INTO written VALUES (1)").await;
}

/// Without synchronous replication nothing but the lease keeps the old server from taking writes once there is another: the
/// last that it acknowledges comes before that one is seen as a primary.
#[tokio::test]
async fn nobody_writes_to_two_servers_though_replication_is_asynchronous() {
    for is_guard_new in [false, true] {
        let mut installation = Installation::start_with_agents("agents-async");
        installation.reconfigure(|text| {
            text.replace("automatic = true", "automatic = true\nloss_max = \"1MB\"")
        });
        run(&mut installation.connect().await, "CREATE TABLE intruded (n bigint)").await;
        wait_protected(&installation).await;
        let mut writer = installation.direct("a").await;
        let written = tokio::spawn(async move {
            let mut last = Instant::now();
            while writer.query("INSERT INTO intruded VALUES (1)").await.is_ok() {
                last = Instant::now();
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            last
        });
        let mut standby = installation.direct("b").await;
        let promoted = tokio::spawn(async move {
            while value(&mut standby, "SELECT pg_is_in_recovery()").await == "t" {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Instant::now()
        });
        if is_guard_new {
            let before = installation.guard("a");
            signal(before.unwrap(), "KILL");
            let other = async || installation.guard("a").is_some_and(|now| Some(now) != before);
            wait_until("another guard", other).await;
        }
        signal(installation.agent("a"), "KILL");
        let (written, promoted) = (written.await.unwrap(), promoted.await.unwrap());
        assert!(written < promoted, "{:?} too long", written.duration_since(promoted));
    }
}

/// A machine that was made anew from an older copy gets the lease of its cell, and is not started as its primary all the same:
/// a standby has more.
#[tokio::test]
async fn an_older_copy_is_not_started_as_the_primary() {
    let mut installation = Installation::start_with_agents("agents-copy");
    let bin_dir = crate::support::other_bin_dir().or_else(pg::instance::find_bin_dir).unwrap();
    if !bin_dir.join("pg_basebackup").exists() {
        return;
    }
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE written (n int)").await;
    let (data, copy) = (installation.dir.join("a"), installation.dir.join("copy"));
    let instance = pg::instance::Instance::of(&bin_dir, &data).unwrap();
    let copied = pg::instance::Instance { data_dir: copy.clone(), ..instance };
    std::fs::create_dir(&copy).unwrap();
    if let Some(run_as) = copied.run_as {
        std::os::unix::fs::chown(&copy, Some(run_as.uid), Some(run_as.gid)).unwrap();
    }
    std::fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let port = installation.facts.servers["a"];
    let conninfo = format!("host=127.0.0.1 port={port} user=postgres dbname=postgres");
    copied.clone_from(&conninfo).await.unwrap();
    for _ in 0..100 {
        run(&mut client, "INSERT INTO written SELECT generate_series(1, 100)").await;
    }
    let guard = installation.guard("a").unwrap();
    signal(installation.agent("a"), "KILL");
    signal(guard, "KILL");
    installation.signal_server("a", "KILL");
    wait_until("the end of the server", async || connect(port, "postgres", None).await.is_err())
        .await;
    std::fs::rename(&data, installation.dir.join("gone")).unwrap();
    // What makes a copy a standby is not in one that a person has taken.
    let _ = std::fs::remove_file(copy.join("standby.signal"));
    std::fs::rename(&copy, &data).unwrap();
    installation.start_agent("a");
    wait_until("the reason", async || {
        shown(&installation.holdfast(&["status", "shop"])).contains("be an older copy")
    })
    .await;
    let mut standby = installation.direct("b").await;
    assert_eq!(value(&mut standby, "SELECT count(*) FROM written").await, "10000");
    assert!(connect(port, "postgres", None).await.is_err());
}

/// Control is gone for longer than a lease: agents promise each other that nothing changes, and clients of another proxy notice
/// nothing.
#[tokio::test]
async fn without_control_servers_go_on_by_pledges() {
    let mut installation =
        Installation::start_proxied("agents-pledge", &["--pool", "8", "--agents"]);
    installation.reconfigure(synchronous);
    let mut client = installation.connect_elsewhere().await;
    run(&mut client, "CREATE TABLE written (n int)").await;
    wait_protected(&installation).await;
    // What was defined is known, and its server is asked in time.
    tokio::time::sleep(Duration::from_secs(2)).await;
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    let mut written = 0;
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until {
        run(&mut client, "INSERT INTO written VALUES (1)").await;
        written += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Then the primary's host is lost as well. Control comes back, and is told when the lease is over, whoever has promised what.
    signal(installation.agent("a"), "KILL");
    installation.restart(&[]);
    wait_active_on(&installation, "b").await;
    run(&mut client, "INSERT INTO written VALUES (1)").await;
    let there = value(&mut client, "SELECT count(*) FROM written").await;
    assert_eq!(there, (written + 1).to_string());
}

/// Nobody promises anything: the server is ended, as another may be the primary.
#[tokio::test]
async fn without_control_and_pledges_a_server_is_ended() {
    let installation = Installation::start_with_agents("agents-alone");
    let port = installation.facts.servers["a"];
    wait_until("the guard", async || installation.guard("a").is_some()).await;
    signal(installation.pid(), "STOP");
    signal(installation.agent("b"), "STOP");
    wait_until("the end of the server", async || connect(port, "postgres", None).await.is_err())
        .await;
    signal(installation.agent("b"), "CONT");
    signal(installation.pid(), "CONT");
    wait_active(&installation, "a").await;
}

/// A server that has ended as a primary is a standby for whoever starts it but control.
#[tokio::test]
async fn a_server_that_somebody_has_started_is_a_primary_again() {
    let mut installation = Installation::start_with_agents("agents-started");
    installation.reconfigure(|text| text.replace("automatic = true", "automatic = false"));
    run(&mut installation.connect().await, "CREATE TABLE written (n int)").await;
    wait_active(&installation, "a").await;
    signal(installation.agent("a"), "STOP");
    installation.signal_server("a", "KILL");
    std::fs::write(installation.dir.join("a/standby.signal"), "").unwrap();
    installation.start_server("a").await;
    assert_eq!(value(&mut installation.direct("a").await, "SELECT pg_is_in_recovery()").await, "t");
    signal(installation.agent("a"), "CONT");
    wait_active(&installation, "a").await;
    run(&mut installation.connect().await, "INSERT INTO written VALUES (1)").await;
}

/// Whoever boots with a server that has crashed as a primary leaves it to control.
#[tokio::test]
async fn an_agent_starts_no_primary_that_has_crashed() {
    let mut installation = Installation::start_with_agents("agents-crashed");
    installation.reconfigure(|text| text.replace("automatic = true", "automatic = false"));
    wait_active(&installation, "a").await;
    // One that has just been started may be a standby that says of itself what it was.
    tokio::time::sleep(Duration::from_secs(6)).await;
    signal(installation.pid(), "STOP");
    signal(installation.agent("a"), "KILL");
    installation.signal_server("a", "KILL");
    std::fs::write(installation.dir.join("a/standby.signal"), "").unwrap();
    installation.start_agent("a");
    tokio::time::sleep(Duration::from_secs(2)).await;
    let runs = connect(installation.facts.servers["a"], "postgres", None).await.is_ok();
    signal(installation.pid(), "CONT");
    assert!(!runs);
    wait_active(&installation, "a").await;
}
