//! Sessions whose server is lost, and that go on with another connection.

use pg::connection::Connection;
use wire::backend::Backend;
use wire::frontend::{self, Target};

use crate::pools::pool_of;
use crate::support::{Installation, extended, last_words, named, run, signal, value};

/// Ends the server of `a` by a signal, and starts it again.
async fn lose_server(installation: &Installation, how: &str) {
    installation.signal_server("a", how);
    installation.start_server("a").await;
}

/// A session in a transaction that has written, and needs nothing else of its server: as long as definitions are read
/// anew, that is not known of any.
async fn begun(installation: &Installation, number: usize) -> Connection {
    let name = format!("open {number}");
    let mut session = named(installation, &name).await;
    loop {
        run(&mut session, "BEGIN; SET LOCAL lock_timeout = '7s'").await;
        run(&mut session, "INSERT INTO kept VALUES (1)").await;
        if pool_of(installation, &name).await == "shared" {
            return session;
        }
        run(&mut session, "ROLLBACK").await;
    }
}

/// As long as definitions are read anew, sessions that do anything keep their servers.
pub(crate) async fn wait_shared(installation: &Installation, name: &str) {
    while pool_of(installation, name).await != "shared" {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

async fn send(connection: &mut Connection, messages: impl FnOnce(&mut Vec<u8>)) {
    let mut out = Vec::new();
    messages(&mut out);
    connection.send(&out).await.unwrap();
}

/// What the server says up to so many ReadyForQuery: codes of errors, tags of commands, and states.
async fn hears(connection: &mut Connection, ready: usize) -> String {
    let mut heard = Vec::new();
    let mut left = ready;
    while left > 0 {
        let Ok(message) = connection.receive().await else {
            heard.push("the connection ended".into());
            break;
        };
        match message.view().unwrap() {
            Backend::Error(fields) => {
                heard.push(fields.sqlstate().unwrap().to_string());
                if let Some(detail) = fields.field(b'D') {
                    heard.push(String::from_utf8_lossy(detail).into_owned());
                }
            }
            Backend::CommandComplete { tag } => {
                heard.push(String::from_utf8_lossy(tag).into_owned())
            }
            Backend::Ready(status) => {
                heard.push(format!("{status:?}"));
                left -= 1;
            }
            _ => (),
        }
    }
    heard.join(" ")
}

async fn says(connection: &mut Connection, sql: &str) -> String {
    send(connection, |out| frontend::query(out, sql.as_bytes())).await;
    hears(connection, 1).await
}

/// Parse, Bind and Execute without a name.
fn add_run(out: &mut Vec<u8>, sql: &str) {
    frontend::parse(out, b"", sql.as_bytes(), &[]);
    frontend::bind_text(out, b"", b"", &[]);
    frontend::execute(out, b"", 0);
}

const SLEEPS: &str = "SELECT pg_sleep(60)";

/// Waits until so many backends of the server sleep.
async fn wait_asleep(installation: &Installation, sleepers: usize) {
    let mut direct = installation.direct("a").await;
    let question = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep'";
    while value(&mut direct, question).await != sleepers.to_string() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn sessions_go_on_with_what_they_had() {
    let installation = Installation::start_pooled("outlive", 12);
    for how in ["QUIT", "INT"] {
        let mut one = installation.connect().await;
        run(&mut one, "DROP TABLE IF EXISTS kept; CREATE TABLE kept (n int)").await;
        // Until it is known what was defined, whoever runs something keeps its server.
        tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
        let mut idle = named(&installation, "idle").await;
        run(&mut idle, "SELECT 1").await;
        wait_shared(&installation, "idle").await;
        run(&mut idle, "SET work_mem = '7MB'").await;
        let mut prepare = Vec::new();
        frontend::parse(&mut prepare, b"p", b"SELECT $1::int + 1", &[]);
        frontend::sync(&mut prepare);
        extended(&mut idle, &prepare).await;
        wait_shared(&installation, "idle").await;
        let mut open = Vec::new();
        for _ in 0..5 {
            open.push(begun(&installation, open.len()).await);
        }
        lose_server(&installation, how).await;

        assert_eq!(value(&mut idle, "SHOW work_mem").await, "7MB", "{how}");
        let mut bind = Vec::new();
        frontend::bind_text(&mut bind, b"", b"p", &[Some(b"41")]);
        frontend::execute(&mut bind, b"", 0);
        frontend::sync(&mut bind);
        assert_eq!(extended(&mut idle, &bind).await, [Some("42".to_owned())], "{how}");

        let [select, rollback, commit, extends, rolls] = open.as_mut_slice() else { panic!() };
        assert_eq!(says(select, "SELECT 1").await, "40001 Failed", "{how}");
        assert_eq!(says(select, "SELECT 1").await, "25P02 Failed", "{how}");
        assert_eq!(says(select, "COMMIT").await, "ROLLBACK Idle", "{how}");
        assert_eq!(value(select, "SHOW lock_timeout").await, "0", "{how}");
        assert_eq!(says(rollback, "ROLLBACK").await, "ROLLBACK Idle", "{how}");
        assert_eq!(says(commit, "COMMIT").await, "40001 Failed", "{how}");
        assert_eq!(says(commit, "ROLLBACK; SELECT 1").await, "ROLLBACK SELECT 1 Idle", "{how}");
        send(extends, |out| {
            add_run(out, "INSERT INTO kept VALUES (2)");
            frontend::sync(out);
            add_run(out, "COMMIT");
            frontend::sync(out);
        })
        .await;
        assert_eq!(hears(extends, 2).await, "40001 Failed ROLLBACK Idle", "{how}");
        send(rolls, |out| {
            frontend::sync(out);
            add_run(out, "ROLLBACK");
            frontend::sync(out);
        })
        .await;
        // It is not run before it is known what is run: whoever sends COMMIT instead must be told.
        assert_eq!(hears(rolls, 2).await, "InTransaction 40001 Failed", "{how}");
        assert_eq!(says(rolls, "ROLLBACK").await, "ROLLBACK Idle", "{how}");
        for session in [select, rollback, commit, extends, rolls] {
            assert_eq!(value(session, "SELECT count(*) FROM kept").await, "0", "{how}");
        }
    }
}

#[tokio::test]
async fn what_is_running_has_failed() {
    let installation = Installation::start_pooled("outlive-running", 12);
    let mut one = installation.connect().await;
    run(&mut one, "CREATE TABLE kept (n int)").await;
    let mut sessions = Vec::new();
    for _ in 0..7 {
        sessions.push(installation.connect().await);
    }
    let [begun, alone, pipeline, batch, copy, ends, late] = sessions.as_mut_slice() else {
        panic!()
    };
    // Until it is known what was defined, whoever runs something keeps its server.
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    drop(self::begun(&installation, 0).await);
    run(begun, "BEGIN").await;
    send(begun, |out| frontend::query(out, SLEEPS.as_bytes())).await;
    send(alone, |out| frontend::query(out, SLEEPS.as_bytes())).await;
    send(pipeline, |out| {
        for sql in ["BEGIN", SLEEPS] {
            add_run(out, sql);
        }
        frontend::sync(out);
        add_run(out, "INSERT INTO kept VALUES (1)");
        frontend::sync(out);
    })
    .await;
    send(batch, |out| {
        add_run(out, SLEEPS);
        frontend::flush(out);
    })
    .await;
    send(copy, |out| frontend::query(out, b"COPY kept FROM STDIN")).await;
    run(ends, "BEGIN").await;
    send(ends, |out| {
        frontend::query(out, SLEEPS.as_bytes());
        frontend::query(out, b"COMMIT");
    })
    .await;
    run(late, "CREATE TEMP TABLE t AS SELECT 1").await;
    wait_asleep(&installation, 5).await;
    // Half a message is on its way to the server.
    let (half, rest) = {
        let mut out = Vec::new();
        frontend::copy_data(&mut out, b"12\n34\n");
        (out[..8].to_vec(), out[8..].to_vec())
    };
    copy.send(&half).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    lose_server(&installation, "QUIT").await;

    assert_eq!(hears(begun, 1).await, "40001 Failed");
    assert_eq!(says(begun, "END").await, "ROLLBACK Idle");
    assert_eq!(hears(alone, 1).await, "08007 Idle");
    // Whether the second batch had been passed by then is not known.
    let heard = hears(pipeline, 2).await;
    let (passed, held) = ("BEGIN 08007 Failed 08007 Failed", "BEGIN 40001 Failed 25P02 Failed");
    assert!(heard == passed || heard == held, "{heard}");
    assert_eq!(says(pipeline, "ROLLBACK").await, "ROLLBACK Idle");
    send(batch, |out| {
        frontend::close(out, Target::Portal(b""));
        frontend::sync(out);
    })
    .await;
    assert_eq!(hears(batch, 1).await, "08007 Idle");
    assert_eq!(hears(copy, 1).await, "08007 Idle");
    copy.send(&rest).await.unwrap();
    send(copy, frontend::copy_done).await;
    assert_eq!(says(copy, "SELECT 1").await, "SELECT 1 Idle");
    assert_eq!(hears(ends, 2).await, "08007 Idle 08007 Idle");
    // The server's own words come before.
    let mut words = last_words(late).await;
    while words.0.is_none() {
        words = last_words(late).await;
    }
    let (state, detail) = words;
    assert_eq!(state.unwrap().to_string(), "08006");
    assert!(detail.contains("cannot go on with another server: "), "{detail}");
    for session in [begun, alone, pipeline, batch, copy, ends] {
        assert_eq!(value(session, "SELECT count(*) FROM kept").await, "0");
    }
}

#[tokio::test]
async fn what_is_sent_while_there_is_no_server_waits_for_one() {
    let installation = Installation::start_pooled("outlive-waits", 3);
    let mut session = installation.connect().await;
    assert_eq!(value(&mut session, "SELECT 1").await, "1");
    let pid = installation.dir.join("a").join("postmaster.pid");
    let pid = std::fs::read_to_string(pid).unwrap().lines().next().unwrap().parse().unwrap();
    signal(pid, "INT");
    while std::path::Path::new(&format!("/proc/{pid}")).exists() {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let asked = tokio::spawn(async move { value(&mut session, "SELECT 7").await });
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    assert!(!asked.is_finished());
    installation.start_server("a").await;
    assert_eq!(asked.await.unwrap(), "7");
}

/// What was set and committed may be what the session has, and nobody knows it yet; and what a lost text may have begun
/// is not gone on with.
#[tokio::test]
async fn what_may_be_committed_is_not_taken_for_nothing() {
    let installation = Installation::start_pooled("outlive-doubt", 8);
    run(&mut installation.connect().await, "CREATE TABLE kept (n int)").await;
    let procedure = "CREATE PROCEDURE commits() LANGUAGE plpgsql AS 'BEGIN COMMIT; END'";
    run(&mut installation.connect().await, procedure).await;
    tokio::time::sleep(std::time::Duration::from_millis(1_500)).await;
    let mut chained = installation.connect().await;
    for sql in ["BEGIN", "SET work_mem = '9MB'", "COMMIT AND CHAIN"] {
        run(&mut chained, sql).await;
    }
    let mut queued = installation.connect().await;
    send(&mut queued, |out| {
        frontend::query(out, b"SET work_mem = '9MB'");
        frontend::query(out, SLEEPS.as_bytes());
    })
    .await;
    let mut begins = installation.connect().await;
    let text = format!("BEGIN; {SLEEPS}");
    send(&mut begins, |out| frontend::query(out, text.as_bytes())).await;
    let mut bound = installation.connect().await;
    send(&mut bound, |out| {
        frontend::parse(out, b"b", b"BEGIN", &[]);
        frontend::sync(out);
    })
    .await;
    hears(&mut bound, 1).await;
    send(&mut bound, |out| {
        // Never executed, so what follows is a transaction by itself.
        frontend::bind_text(out, b"p", b"b", &[]);
        add_run(out, SLEEPS);
        frontend::sync(out);
    })
    .await;
    let mut half = installation.connect().await;
    send(&mut half, |out| {
        frontend::parse(out, b"", b"BEGIN", &[]);
        frontend::flush(out);
    })
    .await;
    assert_eq!(half.receive().await.unwrap().tag, b'1');
    // All of it is answered, and committed by the procedure; its batch has not ended.
    let mut answered = installation.connect().await;
    send(&mut answered, |out| {
        add_run(out, "SET work_mem = '9MB'");
        add_run(out, "CALL commits()");
        frontend::flush(out);
    })
    .await;
    while answered.receive().await.unwrap().view().unwrap()
        != (Backend::CommandComplete { tag: b"CALL" })
    {}
    wait_asleep(&installation, 3).await;
    lose_server(&installation, "QUIT").await;
    send(&mut answered, frontend::sync).await;
    for session in [&mut chained, &mut queued, &mut answered] {
        let heard = hears(session, 2).await;
        assert!(heard.ends_with("the connection ended") && heard.contains("08006"), "{heard}");
    }
    assert_eq!(hears(&mut begins, 1).await, "BEGIN 08007 Failed");
    assert_eq!(says(&mut begins, "INSERT INTO kept VALUES (1)").await, "25P02 Failed");
    assert_eq!(hears(&mut bound, 1).await, "08007 Idle");
    send(&mut half, |out| {
        frontend::bind_text(out, b"", b"", &[]);
        frontend::execute(out, b"", 0);
        add_run(out, "INSERT INTO kept VALUES (2)");
        frontend::sync(out);
        frontend::query(out, b"INSERT INTO kept VALUES (3)");
        frontend::query(out, b"COMMIT");
    })
    .await;
    let heard = hears(&mut half, 3).await;
    assert!(heard.contains("Failed 25P02 Failed ROLLBACK Idle"), "{heard}");
    let mut client = installation.connect().await;
    assert_eq!(value(&mut client, "SELECT count(*) FROM kept").await, "0");
}
