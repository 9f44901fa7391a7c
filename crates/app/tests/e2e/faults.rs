//! A server that dies, hangs, lies or refuses at any message of a move, of a switchover or of a pool: the session stays
//! what it was, where it was or where it goes; only one whose own connection was hit may end, and is told. Nothing is
//! left behind.

use std::sync::atomic::Ordering;
use std::time::Duration;

use pg::{Connection, QueryError};

use crate::agents::wait_until;
use crate::relay::{Fault, Relay};
use crate::support::{Installation, run, shown, value};

/// The connection on which a session stands.
async fn connection_of(relay: &Relay, subject: &mut Subject, admin: &mut Connection) -> u64 {
    let pid = value(&mut subject.connection, "SELECT pg_backend_pid()").await;
    let port = format!("SELECT client_port FROM pg_stat_activity WHERE pid = {pid}");
    let port = value(admin, &port).await;
    relay.ports.lock().unwrap()[&port]
}

/// A session with some of everything, and what has been taken from its cursor.
struct Subject {
    connection: Connection,
    fetched: usize,
}

const SET_UP: &[&str] = &[
    "SET work_mem = '5MB'; SET app.uid = 'me'",
    "CREATE TEMP TABLE mine (n int PRIMARY KEY, x text); INSERT INTO mine VALUES (1, 'one'), (2, NULL)",
    "CREATE TEMP TABLE fleeting (n int) ON COMMIT DELETE ROWS",
    "SELECT nextval('s')",
    "PREPARE p AS SELECT x FROM mine WHERE n = 1",
    "DECLARE c SCROLL CURSOR WITH HOLD FOR SELECT g FROM generate_series(1, 5) g; FETCH 3 FROM c",
    "DECLARE d NO SCROLL CURSOR WITH HOLD FOR SELECT g FROM generate_series(1, 100000) g LIMIT 4000",
    "LISTEN jobs",
];

impl Subject {
    async fn new(installation: &Installation) -> Subject {
        let mut connection = installation.connect().await;
        for sql in SET_UP {
            run(&mut connection, sql).await;
        }
        Subject { connection, fetched: 0 }
    }

    /// Whether it is alive; then it must be what it was.
    async fn is_alive(&mut self, when: &str) -> bool {
        let connection = &mut self.connection;
        if connection.query("SELECT 1").await.is_err() {
            return false;
        }
        self.fetched += 1;
        let looks = [
            ("SHOW work_mem", "5MB".to_owned()),
            ("SELECT current_setting('app.uid')", "me".into()),
            ("SELECT count(*) || max(x) FROM mine", "2one".into()),
            ("EXECUTE p", "one".into()),
            ("FETCH RELATIVE 0 FROM c", "3".into()),
            ("FETCH d", self.fetched.to_string()),
            ("SELECT string_agg(c, ',') FROM pg_listening_channels() c", "jobs".into()),
            ("SELECT currval('s') = lastval()", "t".into()),
            ("SELECT string_agg(name, ' ') FROM pg_prepared_statements", "p".into()),
        ];
        for (sql, wanted) in looks {
            assert_eq!(value(connection, sql).await, wanted, "{when}: {sql}");
        }
        true
    }
}

/// Strikes at every message, or at one of `step` in the test run; `HOLDFAST_FAULTS` strikes at all.
async fn strike(fault: Fault, in_test_run: usize, name: &str) {
    let mut installation = Installation::start(name);
    let relay = Relay::before(&mut installation, "move_answer_timeout = \"300ms\"").await;
    let mut admin = installation.direct("a").await;
    run(&mut admin, "CREATE SEQUENCE s").await;
    let mut subject = Subject::new(&installation).await;
    let (mut struck, mut ended, mut stayed) = (0, 0, 0);
    for left in (0_u64..).step_by(step(in_test_run)) {
        let when = format!("{fault:?} at message {left}");
        let before = relay.connections.load(Ordering::SeqCst);
        let own = connection_of(&relay, &mut subject, &mut admin).await;
        // A lie about the session itself is believed; one about its copy must not be.
        relay.arm(fault, left, if fault == Fault::Lie { before } else { 0 });
        let args = ["move", "shop", "--all", "--to", "a"];
        let output = installation.holdfast_in_background(&args).await.unwrap();
        let hit = relay.disarm();
        let moved = output.status.success();
        stayed += u64::from(!moved);
        if !subject.is_alive(&when).await {
            // Its old connection, or the new one at its very end.
            assert!(hit == Some(own) || moved, "{when}: killed; {}", shown(&output));
            ended += 1;
            subject = Subject::new(&installation).await;
        }
        nothing_is_left(&mut admin, &when).await;
        if hit.is_none() {
            assert!(moved, "{when}: {}", shown(&output));
            break;
        }
        struck += 1;
    }
    eprintln!("{fault:?}: struck {struck} times, stayed {stayed} times, ended {ended} times");
    assert!(struck > 5 && stayed > 0, "{fault:?}: struck {struck}, stayed {stayed}");
}

/// The session's own connection and the one that asks are all there is.
async fn nothing_is_left(admin: &mut Connection, when: &str) {
    let count = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'";
    for _ in 0..300 {
        if value(admin, count).await == "2" {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let all = "SELECT string_agg(state || ' ' || query, '\n') FROM pg_stat_activity WHERE backend_type = 'client backend'";
    panic!("{when}: {}", value(admin, all).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_cut_off_at_any_message_of_a_move() {
    strike(Fault::Cut, 23, "cut").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_at_any_message_of_a_move() {
    strike(Fault::Hang, 151, "hang").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_refuses_any_statement_of_a_move() {
    strike(Fault::Refuse, 3, "refuse").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_lies_in_any_message_about_a_copy() {
    strike(Fault::Lie, 17, "lie").await;
}

/// One of the test run's strikes, or of all.
fn step(in_test_run: usize) -> usize {
    if std::env::var_os("HOLDFAST_FAULTS").is_some() { 1 } else { in_test_run }
}

/// Strikes at messages of switchovers, there and back. Whatever happens, one cell is active in the end, acknowledged rows
/// are there, the other server refuses writes, and the session is what it was or was told.
async fn strike_switchovers(fault: Fault, in_test_run: usize, name: &str) {
    let mut installation = Installation::start(name);
    let own = "move_answer_timeout = \"1s\"";
    let relay = Relay::before(&mut installation, own).await;
    run(&mut installation.connect().await, "CREATE SEQUENCE s; CREATE TABLE t (n serial)").await;
    let mut subject = Subject::new(&installation).await;
    let (mut written, mut struck, mut switched, mut ended) = (0, 0, 0, 0);
    for left in (0_u64..).step_by(step(in_test_run)) {
        let when = format!("{fault:?} at message {left}");
        run(&mut installation.connect().await, "INSERT INTO t DEFAULT VALUES").await;
        written += 1;
        let active = installation.active();
        let other = if active == "a" { "b" } else { "a" };
        let mut admin = installation.direct(&active).await;
        let own = connection_of(&relay, &mut subject, &mut admin).await;
        drop(admin);
        relay.arm(fault, left, 0);
        let args = ["switchover", "shop", "--to", other, "--deadline", "3s"];
        let output = installation.holdfast_in_background(&args).await.unwrap();
        let hit = relay.disarm();
        let text = shown(&output);
        if text.contains(": stuck") || text.contains("not rejoined") {
            let id = text.split_once("execution ").unwrap().1.split(':').next().unwrap();
            let retried = installation.holdfast(&["retry", id]);
            assert!(!shown(&retried).contains(": stuck"), "{when}: {text} {}", shown(&retried));
        }
        let now = installation.active();
        assert!(!output.status.success() || now == other, "{when}: {text}");
        switched += u64::from(now == other);
        let mut client = installation.connect().await;
        run(&mut client, "INSERT INTO t DEFAULT VALUES").await;
        written += 1;
        let count = value(&mut client, "SELECT count(*) FROM t").await;
        assert_eq!(count, written.to_string(), "{when}: {text}");
        let passive = if now == "a" { "b" } else { "a" };
        // A rejoin that has failed may be tried again just now.
        let refuses = async || {
            let server = installation.facts.servers[passive];
            let Ok(mut passive) = crate::support::connect(server, "postgres", None).await else {
                return false;
            };
            let refused = passive.query("INSERT INTO t DEFAULT VALUES").await;
            matches!(refused, Err(QueryError::Server { .. }))
        };
        wait_until("a refusal", refuses).await;
        if !subject.is_alive(&when).await {
            assert!(hit == Some(own) || now == other && hit.is_some(), "{when}: killed; {text}");
            ended += 1;
            subject = Subject::new(&installation).await;
        }
        if hit.is_none() && output.status.success() {
            break;
        }
        struck += 1;
    }
    eprintln!("{fault:?}: struck {struck} times, switched {switched} times, ended {ended} times");
    assert!(struck > 3, "{fault:?}: struck {struck}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_cut_off_at_any_message_of_a_switchover() {
    strike_switchovers(Fault::Cut, 97, "cut-switch").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_at_any_message_of_a_switchover() {
    strike_switchovers(Fault::Hang, 211, "hang-switch").await;
}

/// Strikes at messages of servers that sessions share: of their opening, of looks, of settings that they are given, and of
/// the sessions' own statements. Whoever does not stand on what was hit has what it had.
async fn strike_pool(fault: Fault, in_test_run: usize, name: &str) {
    let mut installation = Installation::start_pooled(name, 2);
    let own = "move_answer_timeout = \"500ms\"";
    let relay = Relay::before(&mut installation, own).await;
    let mut admin = installation.direct("a").await;
    let set_up = |side: usize| format!("SET app.side = '{side}'; SET work_mem = '{}MB'", 5 + side);
    let (mut struck, mut ended) = (0, 0);
    for left in (0_u64..).step_by(step(in_test_run)) {
        let when = format!("{fault:?} at message {left}");
        let mut sessions = Vec::new();
        for side in 0..4 {
            let mut session = installation.connect().await;
            run(&mut session, &set_up(side)).await;
            sessions.push(session);
        }
        relay.arm(fault, left, 0);
        let mut lives = Vec::new();
        for (side, mut session) in sessions.into_iter().enumerate() {
            let answer = tokio::time::timeout(Duration::from_millis(1_500), async {
                let set = format!("SET app.more = '{left}'; SET lock_timeout = '{}s'", side + 1);
                session.query(&set).await?;
                session
                    .query("SELECT set_config('app.last', current_setting('app.side'), false)")
                    .await?;
                session.value("SELECT concat_ws(' ', current_setting('app.side'), current_setting('app.last'), \
                    current_setting('work_mem'), current_setting('lock_timeout'))").await
            });
            match answer.await {
                Ok(Ok(Some(text))) => {
                    assert_eq!(
                        text,
                        format!("{side} {side} {}MB {}s", 5 + side, side + 1),
                        "{when}"
                    );
                    lives.push((side, session));
                }
                Ok(Ok(None)) => panic!("{when}: nothing"),
                // Told, or nobody answers it.
                Ok(Err(_)) | Err(_) => drop(session),
            }
        }
        let hit = relay.disarm();
        ended += 4 - lives.len();
        assert!(lives.len() >= 2 || fault == Fault::Hang, "{when}: {} of 4 live", lives.len());
        assert!(hit.is_some() || lives.len() == 4, "{when}: {} of 4 live", lives.len());
        for (side, session) in &mut lives {
            let now = value(session, "SELECT current_setting('app.side')").await;
            assert_eq!(now, side.to_string(), "{when}");
        }
        if hit.is_none() {
            break;
        }
        struck += 1;
    }
    for _ in 0..3 {
        let mut session = installation.connect().await;
        assert_eq!(value(&mut session, "SELECT 1").await, "1");
    }
    let backends =
        "SELECT count(*) <= 8 FROM pg_stat_activity WHERE backend_type = 'client backend'";
    assert_eq!(value(&mut admin, backends).await, "t");
    eprintln!("{fault:?}: struck {struck} times, ended {ended} sessions");
    assert!(struck > 3, "{fault:?}: struck {struck}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_cut_off_at_any_message_of_a_pool() {
    strike_pool(Fault::Cut, 5, "cut-pool").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_at_any_message_of_a_pool() {
    strike_pool(Fault::Hang, 17, "hang-pool").await;
}
