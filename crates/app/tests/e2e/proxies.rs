//! Clients are served by several proxies, each a process of its own: they change over as one, and none goes by what was.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pg::{Connection, Port};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use wire::sqlstate::SqlState;

use crate::agents::{switch_to, wait_until};
use crate::failover::{begin, end, wait_active};
use crate::support::{HOLDFAST, Installation, cancel, http_get, run, shown, signal, value};

/// Longer than a lease, and than it takes to be waited for.
const LEASE_AND_MORE: Duration = Duration::from_secs(4);

/// Whether the sessions of the second proxy are known to control.
async fn wait_serves(installation: &Installation) {
    wait_until("the second proxy", async || {
        shown(&installation.holdfast(&["status", "shop"])).contains("p2     serves")
    })
    .await;
}

/// Behind a load balancer a cancel request comes to any of them.
#[tokio::test]
async fn a_cancel_request_reaches_its_session_by_any_proxy() {
    let installation = Installation::start_proxied("proxies-cancel", &["--no-failover"]);
    wait_serves(&installation).await;
    let (here, there) = (installation.connect().await, installation.connect_elsewhere().await);
    let ports = [installation.facts.port, installation.facts.proxies[0].0];
    for (mut session, port) in [(here, ports[1]), (there, ports[0])] {
        let (pid, secret) = (session.pid, session.secret.clone());
        let sleeps = tokio::spawn(async move {
            let ended = session.query("SELECT pg_sleep(60)").await.map(drop).unwrap_err();
            (session, ended.sqlstate())
        });
        let deadline = Instant::now() + Duration::from_secs(30);
        while !sleeps.is_finished() {
            assert!(Instant::now() < deadline, "it is not cancelled");
            // One that is not its own does nothing.
            cancel(port, pid, &[7; 4]).await;
            cancel(port, pid, &secret).await;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let (mut session, ended) = sleeps.await.unwrap();
        assert_eq!(ended, Some(SqlState::QUERY_CANCELED));
        // Late ones may hit what runs now.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(value(&mut session, "SELECT 7").await, "7");
    }
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

/// What it had not passed when it was stopped it does not pass when it goes on: nobody waits for it any more.
#[tokio::test]
async fn a_proxy_that_stood_still_passes_nothing_that_is_not_proven_any_more() {
    let installation =
        Installation::start_proxied("proxies-still", &["--no-failover", "--pool", "8"]);
    let mut there = installation.connect_elsewhere().await;
    run(&mut there, "CREATE TABLE written (n int)").await;
    wait_serves(&installation).await;
    let mut direct = installation.direct("a").await;
    for n in 0..4 {
        let sql = format!("BEGIN; INSERT INTO written VALUES ({n})");
        run(&mut there, &sql).await;
        // Neither control nor the server tells the proxy anything from here on, and the server ends nobody.
        let (proxy, control) = (installation.facts.proxies[0].1, installation.pid());
        signal(control, "STOP");
        signal(proxy, "STOP");
        let commit = tokio::spawn(async move {
            let error = there.query("COMMIT").await.map(|_| ()).expect_err("nothing is proven");
            (there, error)
        });
        tokio::time::sleep(LEASE_AND_MORE).await;
        run(&mut direct, "ALTER SYSTEM SET default_transaction_read_only = on").await;
        run(&mut direct, "SELECT pg_reload_conf()").await;
        signal(proxy, "CONT");
        let (session, error) = commit.await.unwrap();
        assert_eq!(error.sqlstate(), Some(SqlState::SERIALIZATION_FAILURE), "{error}");
        run(&mut direct, "ALTER SYSTEM RESET default_transaction_read_only").await;
        run(&mut direct, "SELECT pg_reload_conf()").await;
        signal(control, "CONT");
        there = session;
        run(&mut there, "ROLLBACK").await;
        assert_eq!(value(&mut there, "SELECT count(*) FROM written").await, "0");
        wait_serves(&installation).await;
    }
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
    let reserved = Port::reserve().unwrap();
    let free = std::net::SocketAddr::from(([127, 0, 0, 1], reserved.number()));
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

/// The way from the second proxy to control, which can be cut: bytes go nowhere, and nothing is closed.
struct Way {
    port: u16,
    is_cut: Arc<AtomicBool>,
}

impl Way {
    /// In a thread of its own, as tests wait for what they run.
    fn to(port: u16) -> Way {
        let near = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        near.set_nonblocking(true).unwrap();
        let way = Way { port: near.local_addr().unwrap().port(), is_cut: Arc::default() };
        let is_cut = way.is_cut.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async {
                let listener = TcpListener::from_std(near).unwrap();
                while let Ok((near, _)) = listener.accept().await {
                    let far = TcpStream::connect(("127.0.0.1", port)).await;
                    let Ok(far) = far else { continue };
                    let ((near_in, near_out), (far_in, far_out)) =
                        (near.into_split(), far.into_split());
                    tokio::spawn(carry(near_in, far_out, is_cut.clone()));
                    tokio::spawn(carry(far_in, near_out, is_cut.clone()));
                }
            });
        });
        way
    }

    fn cut(&self, is_cut: bool) {
        self.is_cut.store(is_cut, Ordering::SeqCst);
    }
}

async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    is_cut: Arc<AtomicBool>,
) {
    let mut bytes = [0; 4096];
    while let Ok(len) = from.read(&mut bytes).await {
        if len == 0 {
            return;
        }
        if !is_cut.load(Ordering::SeqCst) && to.write_all(&bytes[..len]).await.is_err() {
            return;
        }
    }
}

/// Changes the configurations of both proxies, and starts the second one again by a way of its own to control.
async fn reconfigure(
    installation: &mut Installation,
    change: impl Fn(String) -> String,
) -> (Way, std::process::Child) {
    signal(installation.facts.proxies[0].1, "KILL");
    let path = installation.dir.join("proxy-2.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    let (_, port) = text.split_once("address = \"127.0.0.1:").unwrap();
    let port: u16 = port.split('"').next().unwrap().parse().unwrap();
    let way = Way::to(port);
    let text = text.replace(&format!("127.0.0.1:{port}"), &format!("127.0.0.1:{}", way.port));
    std::fs::write(&path, change(text)).unwrap();
    installation.reconfigure(change);
    let second = std::process::Command::new(HOLDFAST)
        .args(["run", "-c"])
        .arg(&path)
        .env("HOLDFAST_LOG", "warn")
        .spawn()
        .unwrap();
    wait_serves(installation).await;
    (way, second)
}

/// A second application, on the same servers.
fn with_another(text: String) -> String {
    let (before, app) = text.split_once("[[app]]\n").unwrap();
    let of = |name: &str, database: &str| {
        app.replace(
            "name = \"shop\"\n",
            &format!("name = \"{name}\"\ndatabases = [\"{database}\"]\n"),
        )
    };
    format!("{before}[[app]]\n{}\n[[app]]\n{}", of("shop", "postgres"), of("other", "other"))
}

/// Writes all the time, past what fences a session, and counts what was acknowledged.
fn write_on(mut client: Connection) -> Arc<AtomicU64> {
    let acknowledged = Arc::new(AtomicU64::new(0));
    let count = acknowledged.clone();
    tokio::spawn(async move {
        loop {
            let text = "BEGIN READ WRITE; INSERT INTO written VALUES (1); COMMIT";
            match client.query(text).await {
                Ok(_) => drop(count.fetch_add(1, Ordering::SeqCst)),
                Err(error) if error.sqlstate().is_some() => {
                    let _ = client.query("ROLLBACK").await;
                }
                Err(_) => return,
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    acknowledged
}

/// A proxy that obeys a long order of another application lets go of what is not proven all the same; and that it was waited
/// for in one application says nothing of the other.
#[tokio::test]
async fn a_busy_proxy_lets_go_in_time() {
    let mut installation =
        Installation::start_proxied("proxies-busy", &["--no-failover", "--pool", "8"]);
    let mut client = installation.connect().await;
    run(&mut client, "CREATE DATABASE other").await;
    run(&mut client, "CREATE TABLE written (n int)").await;
    let (way, mut second) = reconfigure(&mut installation, with_another).await;
    let port = installation.facts.proxies[0].0;
    let tls = tls::ClientTls::load(tls::SslMode::Disable, None, None).unwrap();
    let more = [("database", "other")];
    let mut busy = crate::support::login(port, "postgres", None, tls, &more).await.unwrap();
    run(&mut busy, "BEGIN").await;
    run(&mut busy, "SELECT 1").await;
    let acknowledged = write_on(installation.connect_elsewhere().await);
    let sessions = shown(&installation.holdfast(&["sessions", "other"]));
    let id = sessions.lines().find_map(|line| line.split(' ').next().filter(|id| id.len() > 12));
    let id = id.unwrap_or_else(|| panic!("{sessions}")).to_owned();
    let args = ["move", "other", "--session", &id, "--to", "a", "--deadline", "25s"];
    let moving = installation.holdfast_in_background(&args);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(acknowledged.load(Ordering::SeqCst) > 0);
    way.cut(true);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let args = ["fence", "shop", "a", "--on-timeout", "force", "--deadline", "1s"];
    let fenced = installation.holdfast_in_background(&args).await.unwrap();
    assert!(fenced.status.success(), "{}", shown(&fenced));
    let before = acknowledged.load(Ordering::SeqCst);
    tokio::time::sleep(LEASE_AND_MORE).await;
    assert_eq!(acknowledged.load(Ordering::SeqCst), before, "{}", shown(&fenced));
    let status = shown(&installation.holdfast(&["status", "other"]));
    assert!(status.contains("p2     silent"), "{status}");
    let status = shown(&installation.holdfast(&["status", "shop"]));
    assert!(status.contains("p2     out"), "{status}");
    drop(busy);
    moving.await.unwrap();
    let refused = installation.holdfast_in_background(&["fence", "other", "a"]).await.unwrap();
    assert!(shown(&refused).contains("proxy `p2` is not heard"), "{}", shown(&refused));
    signal(second.id(), "KILL");
    second.wait().unwrap();
}

/// A server whose files Holdfast does not manage takes logins also while it is fenced.
#[tokio::test]
async fn a_server_of_somebody_elses_is_switched_over_without_losing_what_a_silent_proxy_writes() {
    let mut installation =
        Installation::start_proxied("proxies-others", &["--no-failover", "--pool", "8"]);
    run(&mut installation.connect().await, "CREATE TABLE written (n int)").await;
    let unmanaged = |text: String| {
        let is_kept = |line: &&str| {
            !["data_dir", "bin_dir", "server_options"].iter().any(|key| line.starts_with(key))
        };
        text.lines().filter(is_kept).map(|line| format!("{line}\n")).collect()
    };
    let (way, mut second) = reconfigure(&mut installation, unmanaged).await;
    let acknowledged = write_on(installation.connect_elsewhere().await);
    tokio::time::sleep(Duration::from_secs(2)).await;
    way.cut(true);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let args = ["switchover", "shop", "--to", "b", "--on-timeout", "force", "--deadline", "1s"];
    let switched = installation.holdfast_in_background(&args).await.unwrap();
    assert!(shown(&switched).contains("waited for p2"), "{}", shown(&switched));
    tokio::time::sleep(LEASE_AND_MORE).await;
    let acknowledged = acknowledged.load(Ordering::SeqCst);
    let mut client = installation.connect().await;
    let there: u64 = value(&mut client, "SELECT count(*) FROM written").await.parse().unwrap();
    assert!(acknowledged > 0 && there >= acknowledged, "{acknowledged} {there}");
    signal(second.id(), "KILL");
    second.wait().unwrap();
}

/// Control stands still for a while in a switchover, wherever it is in that.
#[tokio::test]
async fn a_control_that_stands_still_costs_nobody_his_session() {
    let installation = Installation::start_proxied("proxies-still", &["--no-failover"]);
    let mut there = installation.connect_elsewhere().await;
    run(&mut there, "CREATE TEMP TABLE kept AS SELECT 42 AS n").await;
    run(&mut there, "SELECT pg_advisory_lock(8)").await;
    wait_serves(&installation).await;
    for pause in [0, 40, 80, 120] {
        let to = if installation.active() == "a" { "b" } else { "a" };
        let switch = installation.holdfast_in_background(&["switchover", "shop", "--to", to]);
        let began = Instant::now();
        while !shown(&installation.holdfast(&["executions"])).contains("under way") {
            assert!(began.elapsed() < Duration::from_secs(30));
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
        signal(installation.pid(), "STOP");
        tokio::time::sleep(LEASE_AND_MORE).await;
        signal(installation.pid(), "CONT");
        switch.await.unwrap();
        assert_eq!(value(&mut there, "SELECT n FROM kept").await, "42");
        assert_eq!(value(&mut there, "SELECT pg_is_in_recovery()").await, "f");
        let mut here = installation.connect().await;
        assert_eq!(value(&mut here, "SELECT pg_try_advisory_lock(8)").await, "f");
        wait_active(&installation, &installation.active()).await;
    }
}
