//! Sessions of every kind that is carried, there and back, and what their clients see meanwhile.

use std::time::Duration;

use wire::backend::{Backend, TxStatus};
use wire::frontend;

use crate::kinds::{KINDS, ROLES};
use crate::support::{
    Installation, extended, http_get, last_words, login, run, shown, there_and_back, value,
};

#[tokio::test]
async fn every_kind_of_carried_state_is_the_same_there_and_back() {
    let installation = Installation::start("kinds");
    run(&mut installation.connect().await, ROLES).await;
    let mut sessions = Vec::new();
    for (name, set_up, look) in KINDS {
        let mut session = installation.connect().await;
        for sql in *set_up {
            run(&mut session, sql).await;
        }
        let before = value(&mut session, look).await;
        sessions.push((name, look, before, session));
    }
    for cell in there_and_back() {
        let text = installation.switch_to(cell);
        assert!(
            text.contains(&format!("{} of {} sessions moved", KINDS.len(), KINDS.len())),
            "{text}"
        );
        for (name, look, before, session) in &mut sessions {
            assert_eq!(value(session, look).await, *before, "{name}, on {cell}");
            assert_eq!(session.status, TxStatus::Idle);
        }
    }
}

#[tokio::test]
async fn values_of_sequences_move_and_the_sequences_stay() {
    let installation = Installation::start("sequences");
    let mut session = installation.connect().await;
    run(&mut session, "CREATE SEQUENCE s START 500; CREATE SEQUENCE only_set; CREATE SEQUENCE d")
        .await;
    run(&mut session, "SELECT nextval('s'); SELECT setval('only_set', 42)").await;
    let mut other = installation.connect().await;
    run(&mut other, "SELECT nextval('s'), nextval('s')").await;
    // Only a value by setval: lastval has none and must have none afterwards.
    let mut set = installation.connect().await;
    run(&mut set, "SELECT setval('d', 7)").await;
    for cell in there_and_back() {
        installation.switch_to(cell);
        let look = "SELECT concat_ws(' ', currval('s'), currval('only_set'), lastval())";
        assert_eq!(value(&mut session, look).await, "500 42 500", "on {cell}");
        assert_eq!(value(&mut other, "SELECT currval('s')").await, "502", "on {cell}");
        assert_eq!(value(&mut set, "SELECT currval('d')").await, "7", "on {cell}");
        assert!(set.value("SELECT lastval()").await.is_err(), "on {cell}");
    }
    // A promotion by itself lets a sequence skip what was logged ahead (`SEQ_LOG_VALS`), never go back.
    for (name, last) in [("s", 502), ("only_set", 42)] {
        let next = value(&mut session, &format!("SELECT nextval('{name}')")).await;
        let next: i64 = next.parse().unwrap();
        assert!(next > last && next <= last + 33, "{name}: {next} after {last}");
    }
}

/// Each restores its values under a lock on the sequence, and they come in any order.
#[tokio::test]
async fn sessions_that_share_sequences_do_not_lock_each_other_out() {
    let installation = Installation::start("shared-sequences");
    run(&mut installation.connect().await, "CREATE SEQUENCE x; CREATE SEQUENCE y").await;
    let mut sessions = Vec::new();
    for number in 0..24 {
        let mut session = installation.connect().await;
        let order = if number % 2 == 0 { ["x", "y"] } else { ["y", "x"] };
        for name in order {
            run(&mut session, &format!("SELECT nextval('{name}')")).await;
        }
        sessions.push(session);
    }
    let text = installation.switch_to("b");
    assert!(text.contains("24 of 24 sessions moved"), "{text}");
    for (number, session) in (1..).zip(&mut sessions) {
        let look = "SELECT concat_ws(' ', currval('x'), currval('y'), lastval())";
        assert_eq!(value(session, look).await, format!("{number} {number} {number}"));
    }
}

/// One session keeps the switchover waiting; meanwhile the servers of others, which are held and read, are ended,
/// and their locks with them. They are told, and the switchover goes on.
#[tokio::test]
async fn a_session_that_loses_its_server_while_it_is_held_is_in_nobodys_way() {
    let installation = Installation::start("killed");
    let mut busy = installation.connect().await;
    let mut held = installation.connect().await;
    let mut locker = installation.connect().await;
    run(&mut held, "SET work_mem = '5MB'").await;
    run(&mut locker, "SELECT pg_advisory_lock(1)").await;
    let mut pids = Vec::new();
    for session in [&mut held, &mut locker] {
        pids.push(value(session, "SELECT pg_backend_pid()").await);
    }
    run(&mut busy, "BEGIN; SELECT 1").await;
    let mut admin = installation.direct("a").await;
    let switch = installation.switch_until_it_holds().await;
    // They are read as soon as they are held; then nothing is asked of them for a while.
    let look = format!(
        "SELECT bool_and(now() - state_change > '500ms') FROM pg_stat_activity WHERE pid IN ({})",
        pids.join(",")
    );
    while value(&mut admin, &look).await != "t" {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for pid in pids {
        run(&mut admin, &format!("SELECT pg_terminate_backend({pid}, 5000)")).await;
    }
    run(&mut busy, "COMMIT").await;
    let output = switch.await.unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(value(&mut busy, "SELECT pg_is_in_recovery()").await, "f");
    assert!(held.query("SELECT 1").await.is_err());
    assert!(locker.query("SELECT 1").await.is_err());
}

/// The target cannot write its new timeline, so it ends while it is promoted. Clients are told at once; once the
/// target is well again, the switchover goes on from where it stood.
#[tokio::test]
async fn a_target_that_cannot_be_promoted_leaves_nobody_waiting() {
    let installation = Installation::start("stuck");
    let mut session = installation.connect().await;
    run(&mut session, "CREATE TABLE t (n int); INSERT INTO t VALUES (1)").await;
    let history = installation.dir.join("b/pg_wal/00000002.history");
    // A directory of that name can be neither written nor replaced by a file.
    std::fs::create_dir(&history).unwrap();
    std::fs::write(history.join("x"), "").unwrap();
    let output = installation.holdfast(&["switchover", "shop", "--to", "b"]);
    let text = shown(&output);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("stuck"), "{text}");
    let told = last_words(&mut session).await;
    assert_eq!(told.0, Some(wire::sqlstate::SqlState::CANNOT_CONNECT_NOW), "{}", told.1);
    // The old server is fenced: what it has is what the new one will have.
    std::fs::remove_dir_all(&history).unwrap();
    // Its server is started, and it goes on, by itself.
    crate::failover::wait_active(&installation, "b").await;
    let mut session = installation.connect().await;
    assert_eq!(value(&mut session, "SELECT n FROM t").await, "1");
}

/// A file whose lists go on after a blank, as PostgreSQL allows, is narrowed all the same; one with an error in it,
/// which the server would not load, is refused before anybody is held.
#[tokio::test]
async fn the_fence_reads_pg_hba_as_the_server_does() {
    let installation = Installation::start("hba");
    let path = installation.dir.join("a/pg_hba.conf");
    let text = std::fs::read_to_string(&path).unwrap();
    let odd = "host shop, \"postgres\" all 127.0.0.1/32 trust\nhost all all \\\n 127.0.0.1 255.0.0.0 trust\n";
    std::fs::write(&path, format!("{odd}{text}")).unwrap();
    let mut session = installation.connect().await;
    run(&mut session, "CREATE ROLE app LOGIN; SELECT pg_reload_conf()").await;
    installation.switch_to("b");
    if there_and_back().len() == 1 {
        return;
    }
    let back = installation.dir.join("b/pg_hba.conf");
    let text = std::fs::read_to_string(&back).unwrap();
    std::fs::write(&back, format!("host all all nonsense trust extra=\n{text}")).unwrap();
    let output = installation.holdfast(&["switchover", "shop", "--to", "a"]);
    assert_eq!(output.status.code(), Some(1));
    let told = shown(&output);
    assert!(told.contains("`b` cannot be fenced: line 1 of pg_hba.conf"), "{told}");
    assert!(!told.contains("hold  "), "{told}");
}

/// The listener is held and read while the notifier still has its transaction open: what that sends at its end is
/// delivered to the old server, and to the client before it goes on.
#[tokio::test]
async fn a_notification_sent_while_the_listener_is_held_arrives() {
    let installation = Installation::start("late-notify");
    let mut listener = installation.connect().await;
    run(&mut listener, "LISTEN jobs").await;
    let mut notifier = installation.connect().await;
    run(&mut notifier, "BEGIN; NOTIFY jobs, 'late'").await;
    let switch = installation.switch_until_it_holds().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    run(&mut notifier, "COMMIT").await;
    let output = switch.await.unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    run(&mut notifier, "NOTIFY jobs, 'after'").await;
    let mut heard = Vec::new();
    while heard.last().map(String::as_str) != Some("after") {
        let message = listener.receive().await.unwrap();
        if let Backend::Notification { payload, .. } = message.view().unwrap() {
            heard.push(String::from_utf8_lossy(payload).into_owned());
        }
    }
    assert_eq!(heard, ["late", "after"]);
}

/// A client of the extended protocol whose default isolation level a standby refuses.
#[tokio::test]
async fn an_unnamed_statement_moves_under_a_serializable_default() {
    let installation = Installation::start("serializable");
    let mut session = installation.connect().await;
    run(&mut session, "SET default_transaction_isolation = serializable").await;
    let mut out = Vec::new();
    frontend::parse(&mut out, b"", b"SELECT 'unnamed'", &[]);
    frontend::sync(&mut out);
    extended(&mut session, &out).await;
    installation.switch_to("b");
    let mut out = Vec::new();
    frontend::bind_text(&mut out, b"", b"", &[]);
    frontend::execute(&mut out, b"", 0);
    frontend::sync(&mut out);
    assert_eq!(extended(&mut session, &out).await, [Some("unnamed".into())]);
}

/// A sequence that got another name, and another that got its name, while the session was held.
#[tokio::test]
async fn a_value_stays_with_its_sequence_and_not_with_its_name() {
    let installation = Installation::start("renamed");
    let mut session = installation.connect().await;
    run(&mut session, "CREATE SEQUENCE s; SELECT nextval('s')").await;
    let mut busy = installation.connect().await;
    run(&mut busy, "BEGIN; ALTER SEQUENCE s RENAME TO s_old; CREATE SEQUENCE s START 500").await;
    let switch = installation.switch_until_it_holds().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    run(&mut busy, "COMMIT").await;
    let output = switch.await.unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(value(&mut session, "SELECT currval('s_old')").await, "1");
    assert!(session.value("SELECT currval('s')").await.is_err());
}

/// A session that logs into a database that nobody was in when the switchover was prepared. Learning of the other
/// database waits for a lock meanwhile.
#[tokio::test]
async fn a_session_of_a_database_that_was_not_prepared_moves() {
    let installation = Installation::start("late-database");
    let mut session = installation.connect().await;
    run(&mut session, "CREATE DATABASE late").await;
    let mut admin = installation.direct("a").await;
    run(&mut admin, "BEGIN; LOCK TABLE pg_policy IN ACCESS EXCLUSIVE MODE").await;
    let switch = installation.holdfast_in_background(&["switchover", "shop", "--to", "b"]);
    let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted";
    while value(&mut admin, waits).await == "0" {}
    let tls = tls::ClientTls::load(tls::SslMode::Disable, None, None).unwrap();
    let more = [("database", "late")];
    let late = login(installation.facts.port, "postgres", None, tls, &more).await;
    run(&mut admin, "COMMIT").await;
    let output = switch.await.unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(value(&mut late.unwrap(), "SELECT current_database()").await, "late");
}

/// A second switchover of the same application is refused, not queued.
#[tokio::test]
async fn a_second_switchover_is_refused_while_one_is_under_way() {
    let installation = Installation::start("second");
    let mut busy = installation.connect().await;
    run(&mut busy, "BEGIN; SELECT 1").await;
    let api = installation.facts.api.clone();
    let first = std::thread::spawn(move || {
        std::process::Command::new(crate::support::HOLDFAST)
            .args(["--api", &api, "switchover", "shop", "--to", "b", "--deadline", "20s"])
            .output()
            .unwrap()
    });
    while !shown(&installation.holdfast(&["executions", "1"])).contains("hold     runs") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let second = installation.holdfast(&["switchover", "shop", "--to", "b"]);
    assert_eq!(second.status.code(), Some(1));
    assert!(
        shown(&second).contains("execution 1 is changing application `shop`"),
        "{}",
        shown(&second)
    );
    run(&mut busy, "COMMIT").await;
    let first = first.join().unwrap();
    assert!(first.status.success(), "{}", shown(&first));
}

/// Settings that only the servers' own files give: the session keeps what it has seen, the server its own.
#[tokio::test]
async fn a_session_keeps_what_the_configuration_of_its_server_gave_it() {
    let installation = Installation::start("configured");
    for (cell, work_mem) in [("a", "5MB"), ("b", "6MB")] {
        let mut admin = installation.direct(cell).await;
        run(&mut admin, &format!("ALTER SYSTEM SET work_mem = '{work_mem}'")).await;
        run(&mut admin, "ALTER SYSTEM SET log_lock_waits = on").await;
        if cell == "b" {
            run(&mut admin, "ALTER SYSTEM SET log_temp_files = 0").await;
        }
        run(&mut admin, "SELECT pg_reload_conf()").await;
    }
    let mut session = installation.connect().await;
    run(&mut session, "SET log_lock_waits = off").await;
    while value(&mut session, "SHOW work_mem").await != "5MB" {}
    let dry = shown(&installation.holdfast(&["switchover", "shop", "--to", "b", "--dry-run"]));
    assert!(dry.contains("work_mem (`5MB`, `6MB`)"), "{dry}");
    installation.switch_to("b");
    let look =
        "SELECT concat_ws(' ', current_setting('work_mem'), current_setting('log_lock_waits'))";
    assert_eq!(value(&mut session, look).await, "5MB off");
    let mut fresh = installation.connect().await;
    assert_eq!(value(&mut fresh, look).await, "6MB on");
}

/// A superuser who has given up its authorization may have settings that its new self cannot see.
#[tokio::test]
async fn settings_that_the_session_itself_cannot_see_move() {
    let installation = Installation::start("unseen");
    let mut session = installation.connect().await;
    run(&mut session, "CREATE ROLE nobody; SET dynamic_library_path = '$libdir:/no'").await;
    run(&mut session, "SET SESSION AUTHORIZATION nobody").await;
    installation.switch_to("b");
    assert_eq!(value(&mut session, "SELECT session_user").await, "nobody");
    run(&mut session, "RESET SESSION AUTHORIZATION").await;
    assert_eq!(value(&mut session, "SHOW dynamic_library_path").await, "$libdir:/no");
}

#[tokio::test]
async fn locks_are_held_as_often_as_before_and_keep_others_out() {
    let installation = Installation::start("locks");
    let mut holder = installation.connect().await;
    run(&mut holder, "SELECT pg_advisory_lock(1), pg_advisory_lock(1), pg_advisory_lock(1)").await;
    installation.switch_to("b");
    let mut other = installation.connect().await;
    assert_eq!(value(&mut other, "SELECT pg_try_advisory_lock(1)").await, "f");
    for expected in ["t", "t", "t", "f"] {
        assert_eq!(value(&mut holder, "SELECT pg_advisory_unlock(1)").await, expected);
    }
    assert_eq!(value(&mut other, "SELECT pg_try_advisory_lock(1)").await, "t");
}

#[tokio::test]
async fn statements_of_the_protocol_go_on_with_and_without_a_name() {
    let installation = Installation::start("statements");
    let mut session = installation.connect().await;
    let mut out = Vec::new();
    // A name with odd bytes, a text with a comment, declared types, an empty statement, and one without a name.
    frontend::parse(&mut out, b"a \"name\"", b"/* why */ SELECT $1 + $2 -- end", &[23, 20]);
    frontend::parse(&mut out, b"empty", b"", &[]);
    frontend::parse(&mut out, b"begins", b"begin", &[]);
    frontend::parse(&mut out, b"", b"SELECT $1::text || ' unnamed'", &[]);
    frontend::sync(&mut out);
    extended(&mut session, &out).await;
    for cell in there_and_back() {
        installation.switch_to(cell);
        let mut out = Vec::new();
        frontend::bind_text(&mut out, b"", b"", &[Some(b"still")]);
        frontend::execute(&mut out, b"", 0);
        frontend::bind_text(&mut out, b"", b"a \"name\"", &[Some(b"1"), Some(b"2")]);
        frontend::execute(&mut out, b"", 0);
        frontend::bind_text(&mut out, b"", b"empty", &[]);
        frontend::execute(&mut out, b"", 0);
        frontend::sync(&mut out);
        let found = extended(&mut session, &out).await;
        assert_eq!(found, [Some("still unnamed".into()), Some("3".into()), None], "on {cell}");
        let types = "SELECT string_agg(name || parameter_types::text, ' ' ORDER BY name) FROM pg_prepared_statements";
        // A simple query would destroy the unnamed statement, so this one is asked by the other protocol.
        let mut out = Vec::new();
        frontend::parse(&mut out, b"look", types.as_bytes(), &[]);
        frontend::bind_text(&mut out, b"", b"look", &[]);
        frontend::execute(&mut out, b"", 0);
        frontend::close(&mut out, frontend::Target::Statement(b"look"));
        frontend::sync(&mut out);
        let found = extended(&mut session, &out).await;
        assert_eq!(
            found,
            [Some("a \"name\"{integer,bigint} begins{} empty{} look{}".into())],
            "on {cell}"
        );
    }
}

#[tokio::test]
async fn startup_options_and_later_defaults_do_not_change_a_session() {
    let installation = Installation::start("startup");
    let tls = || tls::ClientTls::load(tls::SslMode::Disable, None, None).unwrap();
    let mut admin = installation.connect().await;
    run(
        &mut admin,
        "CREATE ROLE app LOGIN; ALTER ROLE app SET work_mem = '3MB'; GRANT pg_read_all_data TO app",
    )
    .await;
    let more = [
        ("options", "-c geqo=off -c enable_sort=off"),
        ("application_name", "first"),
        ("DateStyle", "German"),
    ];
    let port = installation.facts.port;
    let mut session = login(port, "app", None, tls(), &more).await.unwrap();
    // What was changed for later logins must not reach this session.
    run(&mut admin, "ALTER ROLE app SET work_mem = '9MB'").await;
    let look = "SELECT concat_ws(' ', current_setting('geqo'), current_setting('enable_sort'), \
        current_setting('application_name'), current_setting('DateStyle'), current_setting('work_mem'))";
    let before = value(&mut session, look).await;
    assert_eq!(before, "off off first German, DMY 3MB");
    installation.switch_to("b");
    assert_eq!(value(&mut session, look).await, before);
    // RESET goes back to what the client asked for at its login.
    run(&mut session, "SET geqo = on; RESET geqo").await;
    assert_eq!(value(&mut session, "SHOW geqo").await, "off");
    // And to the defaults that its role had then.
    run(&mut session, "SET work_mem = '5MB'; RESET ALL").await;
    assert_eq!(value(&mut session, look).await, before);
}

#[tokio::test]
async fn a_transaction_ends_where_it_began_and_the_next_begins_elsewhere() {
    let installation = Installation::start("transaction");
    let mut session = installation.connect().await;
    run(&mut session, "CREATE TABLE t (n int)").await;
    run(&mut session, "BEGIN; INSERT INTO t VALUES (1)").await;
    let switch = std::thread::spawn({
        let api = installation.facts.api.clone();
        move || {
            let args = ["--api", &api, "switchover", "shop", "--to", "b", "--deadline", "20s"];
            std::process::Command::new(crate::support::HOLDFAST).args(args).output().unwrap()
        }
    });
    // The transaction works on while the switchover waits for it.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    run(&mut session, "INSERT INTO t VALUES (2)").await;
    run(&mut session, "COMMIT").await;
    run(&mut session, "BEGIN; INSERT INTO t VALUES (3); COMMIT").await;
    assert_eq!(value(&mut session, "SELECT sum(n) FROM t").await, "6");
    let output = switch.join().unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(
        value(&mut installation.direct("b").await, "SELECT sum(n), pg_is_in_recovery() FROM t")
            .await,
        "6"
    );
}

#[tokio::test]
async fn a_deadline_gives_the_switchover_up_and_nobody_notices() {
    let installation = Installation::start("deadline");
    let mut busy = installation.connect().await;
    let mut idle = installation.connect().await;
    run(&mut busy, "CREATE TABLE t (n int)").await;
    run(&mut busy, "BEGIN; INSERT INTO t VALUES (1)").await;
    let output = installation.holdfast(&["switchover", "shop", "--to", "b", "--deadline", "300ms"]);
    assert_eq!(output.status.code(), Some(1), "{}", shown(&output));
    assert!(shown(&output).contains("a transaction is open"), "{}", shown(&output));
    run(&mut busy, "INSERT INTO t VALUES (2); COMMIT").await;
    run(&mut idle, "INSERT INTO t VALUES (3)").await;
    assert_eq!(value(&mut idle, "SELECT sum(n) FROM t").await, "6");
    // By force the busy one is told, and what it had not committed is gone.
    run(&mut busy, "BEGIN; INSERT INTO t VALUES (4)").await;
    let args = ["switchover", "shop", "--to", "b", "--deadline", "300ms", "--on-timeout", "force"];
    let output = installation.holdfast(&args);
    assert!(output.status.success(), "{}", shown(&output));
    let error = busy.query("COMMIT").await.unwrap_err();
    assert!(
        error.sqlstate().is_none_or(|state| state == wire::sqlstate::SqlState::ADMIN_SHUTDOWN),
        "{error}"
    );
    assert_eq!(value(&mut idle, "SELECT sum(n) FROM t").await, "6");
}

#[tokio::test]
async fn notifications_of_the_session_itself_carry_the_pid_that_it_knows() {
    let installation = Installation::start("notify");
    let mut session = installation.connect().await;
    let pid = session.pid;
    run(&mut session, "LISTEN jobs").await;
    installation.switch_to("b");
    run(&mut session, "NOTIFY jobs, 'after'").await;
    // Tag, length, pid.
    assert_eq!(session.aside.get(..1), Some(&b"A"[..]));
    assert_eq!(session.aside.get(5..9), Some(&pid.to_be_bytes()[..]));
}

#[tokio::test]
async fn a_dry_run_changes_nothing_and_says_who_is_in_the_way() {
    let installation = Installation::start("dry");
    let mut pinned = installation.connect().await;
    run(&mut pinned, "CREATE COLLATION pg_temp.mine FROM \"C\"").await;
    let _free = installation.connect().await;
    let output = installation.holdfast(&["switchover", "shop", "--to", "b", "--dry-run"]);
    let text = shown(&output);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("1 of 2 sessions could be moved now"), "{text}");
    assert!(text.contains("collation pg_temp.mine is in the temporary schema"), "{text}");
    let status = shown(&installation.holdfast(&["status", "shop"]));
    assert!(status.contains("active cell a, epoch 1"), "{status}");
    let output = installation.holdfast(&["switchover", "shop", "--to", "nowhere"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        shown(&output).contains("has no cell `nowhere`; its cells are a, b"),
        "{}",
        shown(&output)
    );
}

#[tokio::test]
async fn the_console_and_the_metrics_show_what_is_there() {
    let installation = Installation::start("console");
    let mut session = installation.connect().await;
    run(&mut session, "SET application_name = 'watched'").await;
    let psql = |sql: &str| {
        let port = installation.facts.port.to_string();
        let args = [
            "-X",
            "-A",
            "-t",
            "-h",
            "127.0.0.1",
            "-U",
            "postgres",
            "-d",
            "holdfast",
            "-p",
            &port,
            "-c",
            sql,
        ];
        let output = std::process::Command::new("psql").args(args).output().unwrap();
        shown(&output)
    };
    for topic in ["SESSIONS", "CLIENTS", "SERVERS", "STATS", "PINS", "CELLS", "CONFIG", "VERSION"] {
        let text = psql(&format!("SHOW {topic}"));
        assert!(!text.contains("ERROR"), "{topic}: {text}");
    }
    assert!(psql("show sessions;").contains("watched"));
    assert!(psql("SHOW NOTHING").contains("HINT"));
    installation.switch_to("b");
    let api = installation.facts.api.strip_prefix("http://").unwrap().to_owned();
    let text = http_get(&api, "/metrics");
    for line in [
        "holdfast_sessions{app=\"shop\"} 1",
        "holdfast_moves_total{result=\"moved\",reason=\"\"} 1",
        "holdfast_pause_seconds_count 1",
        "holdfast_epoch{app=\"shop\"} 2",
    ] {
        assert!(text.contains(line), "{line} is missing: {text}");
    }
    assert!(http_get(&api, "/primary").starts_with("HTTP/1.1 200"));
}
