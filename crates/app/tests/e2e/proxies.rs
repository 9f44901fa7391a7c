//! Clients are served by several proxies, each a process of its own: they change over as one, and none goes by what was.

use std::time::{Duration, Instant};

use crate::agents::{switch_to, wait_until};
use crate::failover::{begin, end, wait_active};
use crate::support::{HOLDFAST, Installation, http_get, run, shown, signal, value};

/// Longer than a lease, and than it takes to be waited for.
const LEASE_AND_MORE: Duration = Duration::from_secs(4);

/// Whether the sessions of the second proxy are known to control.
async fn wait_serves(installation: &Installation) {
    wait_until("the second proxy", async || {
        shown(&installation.holdfast(&["status", "shop"])).contains("p2     serves")
    })
    .await;
}

#[tokio::test]
async fn two_proxies_switch_over_as_one() {
    let installation = Installation::start_proxied("proxies-switch", &["--no-failover"]);
    let (mut here, mut there) =
        (installation.connect().await, installation.connect_elsewhere().await);
    run(&mut here, "SELECT pg_advisory_lock(7)").await;
    run(&mut here, "LISTEN news").await;
    run(&mut there, "CREATE TEMP TABLE kept AS SELECT 42 AS n").await;
    run(&mut there, "SELECT pg_advisory_lock(8)").await;
    let writers = begin(&installation).await;
    for cell in ["b", "a"] {
        let text = switch_to(&installation, cell).await;
        assert!(text.contains("6 of 6 sessions moved"), "{text}");
        // What one has, the other still cannot have.
        assert_eq!(value(&mut there, "SELECT pg_try_advisory_lock(7)").await, "f");
        assert_eq!(value(&mut here, "SELECT pg_try_advisory_lock(8)").await, "f");
        assert_eq!(value(&mut there, "SELECT n FROM kept").await, "42");
        assert_eq!(value(&mut there, "SELECT pg_is_in_recovery()").await, "f");
        run(&mut there, "NOTIFY news, 'again'").await;
        run(&mut here, "SELECT 1").await;
    }
    let sessions = shown(&installation.holdfast(&["sessions", "shop"]));
    assert!(sessions.contains("1000000000001"), "{sessions}");
    // Each session is moved by the proxy that it is of.
    let args = ["move", "shop", "--session", "1000000000001", "--to", "a"];
    let moved = installation.holdfast_in_background(&args).await.unwrap();
    assert!(!moved.status.success() && shown(&moved).contains("lock"), "{}", shown(&moved));
    run(&mut there, "SELECT pg_advisory_unlock_all()").await;
    let moved = installation.holdfast_in_background(&args).await.unwrap();
    assert!(moved.status.success(), "{}", shown(&moved));
    assert_eq!(value(&mut there, "SELECT n FROM kept").await, "42");
    end(&installation, writers).await;
}

#[tokio::test]
async fn a_proxy_that_hangs_is_left_out_only_by_force() {
    let installation =
        Installation::start_proxied("proxies-hang", &["--no-failover", "--pool", "8"]);
    let mut there = installation.connect_elsewhere().await;
    run(&mut there, "CREATE TABLE written (n int)").await;
    wait_serves(&installation).await;
    // After a definition sessions keep their servers for a while.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let pid = installation.facts.proxies[0].1;
    signal(pid, "STOP");
    let refused = installation.holdfast_in_background(&["switchover", "shop", "--to", "b"]);
    let refused = refused.await.unwrap();
    assert_eq!(refused.status.code(), Some(1), "{}", shown(&refused));
    assert!(shown(&refused).contains("proxy `p2`"), "{}", shown(&refused));
    let args = ["switchover", "shop", "--to", "b", "--on-timeout", "force"];
    let forced = installation.holdfast_in_background(&args).await.unwrap();
    assert!(forced.status.success(), "{}", shown(&forced));
    run(&mut installation.connect().await, "INSERT INTO written VALUES (1)").await;
    // The old server is a standby now, and takes logins.
    signal(pid, "CONT");
    for _ in 0..50 {
        assert_eq!(value(&mut there, "SELECT count(*) FROM written").await, "1");
        assert_eq!(value(&mut there, "SELECT pg_is_in_recovery()").await, "f");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    run(&mut there, "INSERT INTO written VALUES (2)").await;
    wait_serves(&installation).await;
}

#[tokio::test]
async fn a_fence_waits_for_a_proxy_that_hangs() {
    let installation =
        Installation::start_proxied("proxies-fence", &["--no-failover", "--pool", "8"]);
    let (mut here, mut there) =
        (installation.connect().await, installation.connect_elsewhere().await);
    run(&mut there, "CREATE TABLE written (n int)").await;
    wait_serves(&installation).await;
    // After a definition sessions keep their servers for a while.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let pid = installation.facts.proxies[0].1;
    signal(pid, "STOP");
    let began = Instant::now();
    let args = ["fence", "shop", "a", "--on-timeout", "force"];
    let fenced = installation.holdfast_in_background(&args).await.unwrap();
    assert!(fenced.status.success(), "{}", shown(&fenced));
    assert!(shown(&fenced).contains("waited for p2"), "{}", shown(&fenced));
    assert!(began.elapsed() > Duration::from_secs(2));
    signal(pid, "CONT");
    for client in [&mut here, &mut there] {
        // Whoever lifts the fence for itself is refused by the proxy, by which of them does not matter.
        let refused = client.query("INSERT INTO written VALUES (1)").await.unwrap_err();
        assert_eq!(
            refused.sqlstate().map(|s| s.to_string()).as_deref(),
            Some("25006"),
            "{refused}"
        );
        let refused = client.query("SET default_transaction_read_only = off").await;
        assert!(refused.is_err());
        assert_eq!(value(client, "SELECT count(*) FROM written").await, "0");
    }
    let unfenced = installation.holdfast_in_background(&["unfence", "shop", "a"]).await.unwrap();
    assert!(unfenced.status.success(), "{}", shown(&unfenced));
    for client in [&mut here, &mut there] {
        run(client, "INSERT INTO written VALUES (1)").await;
    }
}

#[tokio::test]
async fn without_control_a_proxy_goes_on_while_its_server_is_what_it_was() {
    let mut installation =
        Installation::start_proxied("proxies-alone", &["--no-failover", "--pool", "8"]);
    let mut there = installation.connect_elsewhere().await;
    run(&mut there, "CREATE TABLE written (n int)").await;
    wait_serves(&installation).await;
    // Its server is asked in time.
    tokio::time::sleep(Duration::from_secs(2)).await;
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    let until = Instant::now() + 2 * LEASE_AND_MORE;
    while Instant::now() < until {
        run(&mut there, "INSERT INTO written VALUES (1)").await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Somebody fences it past everybody: nobody is served until control says what is so.
    let mut direct = installation.direct("a").await;
    run(&mut direct, "ALTER SYSTEM SET default_transaction_read_only = on").await;
    run(&mut direct, "SELECT pg_reload_conf()").await;
    tokio::time::sleep(LEASE_AND_MORE).await;
    let waits = tokio::spawn(async move {
        run(&mut there, "INSERT INTO written VALUES (2)").await;
        there
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!waits.is_finished());
    run(&mut direct, "ALTER SYSTEM RESET default_transaction_read_only").await;
    run(&mut direct, "SELECT pg_reload_conf()").await;
    installation.restart(&[]);
    let mut there = waits.await.unwrap();
    wait_serves(&installation).await;
    switch_to(&installation, "b").await;
    run(&mut there, "INSERT INTO written VALUES (3)").await;
}

#[tokio::test]
async fn a_switchover_that_lost_control_is_brought_to_its_end_for_all() {
    for (point, active) in [("capture:end", "a"), ("promote:begin", "b"), ("attach:end", "b")] {
        let mut installation = Installation::start_proxied("proxies-crash", &["--no-failover"]);
        let mut there = installation.connect_elsewhere().await;
        run(&mut there, "CREATE TEMP TABLE kept AS SELECT 42 AS n").await;
        run(&mut there, "SELECT pg_advisory_lock(8)").await;
        wait_serves(&installation).await;
        signal(installation.pid(), "KILL");
        installation.wait_crashed();
        installation.restart(&[("HOLDFAST_CRASH_AT", point)]);
        wait_serves(&installation).await;
        let switch = installation.holdfast_in_background(&["switchover", "shop", "--to", "b"]);
        installation.wait_crashed();
        switch.await.unwrap();
        installation.restart(&[]);
        assert_eq!(installation.active(), active, "{point}");
        wait_serves(&installation).await;
        assert_eq!(value(&mut there, "SELECT n FROM kept").await, "42", "{point}");
        assert_eq!(value(&mut there, "SELECT pg_is_in_recovery()").await, "f", "{point}");
        let mut here = installation.connect().await;
        assert_eq!(value(&mut here, "SELECT pg_try_advisory_lock(8)").await, "f", "{point}");
    }
}

#[tokio::test]
async fn a_lost_server_is_replaced_for_all() {
    let installation = Installation::start_proxied("proxies-failover", &["--pool", "8"]);
    let mut idle = installation.connect_elsewhere().await;
    run(&mut idle, "SET work_mem = '7MB'").await;
    let writers = begin(&installation).await;
    installation.signal_server("a", "KILL");
    wait_active(&installation, "b").await;
    assert_eq!(value(&mut idle, "SHOW work_mem").await, "7MB");
    end(&installation, writers).await;
}

/// A proxy that was killed is waited for no longer than a lease, and its name is taken by the next.
#[tokio::test]
async fn a_killed_proxy_is_replaced_by_another_of_its_name() {
    let installation = Installation::start_proxied("proxies-kill", &["--pool", "8"]);
    run(&mut installation.connect_elsewhere().await, "CREATE TABLE written (n int)").await;
    wait_serves(&installation).await;
    let start = || {
        std::process::Command::new(HOLDFAST)
            .args(["run", "-c"])
            .arg(installation.dir.join("proxy-2.toml"))
            .env("HOLDFAST_LOG", "off")
            .spawn()
            .unwrap()
    };
    signal(installation.facts.proxies[0].1, "KILL");
    installation.signal_server("a", "KILL");
    wait_until("the failover", async || installation.active() == "b").await;
    let mut next = start();
    wait_until("the next proxy", async || {
        crate::support::connect(installation.facts.proxies[0].0, "postgres", None).await.is_ok()
    })
    .await;
    run(&mut installation.connect_elsewhere().await, "INSERT INTO written VALUES (1)").await;
    // One that ends by itself says so, and nobody waits for it.
    wait_active(&installation, "b").await;
    signal(next.id(), "TERM");
    next.wait().unwrap();
    switch_to(&installation, "a").await;
}

#[tokio::test]
async fn what_a_proxy_serves_is_told_to_load_balancers() {
    let mut installation = Installation::start_proxied("proxies-health", &["--no-failover"]);
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let path = installation.dir.join("proxy-2.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let name = "[proxy.control]\n";
    std::fs::write(&path, text.replace(name, &format!("{name}health = \"{free}\"\n"))).unwrap();
    signal(installation.facts.proxies[0].1, "TERM");
    let mut next = std::process::Command::new(HOLDFAST)
        .args(["run", "-c"])
        .arg(&path)
        .env("HOLDFAST_LOG", "off")
        .spawn()
        .unwrap();
    let says = |path: &str| match std::net::TcpStream::connect(free) {
        Ok(_) => http_get(&free.to_string(), path),
        Err(_) => String::new(),
    };
    wait_until("the proxy", async || says("/primary").contains("200 OK")).await;
    assert!(says("/metrics").contains("holdfast_sessions"));
    // Neither control nor its server is there.
    signal(installation.pid(), "KILL");
    installation.wait_crashed();
    installation.signal_server("a", "QUIT");
    wait_until("the end", async || says("/primary").contains("503")).await;
    assert!(says("/primary").contains("application `shop` is not served"));
    installation.start_server("a").await;
    installation.restart(&[]);
    wait_until("the begin", async || says("/primary").contains("200 OK")).await;
    signal(next.id(), "TERM");
    next.wait().unwrap();
}
