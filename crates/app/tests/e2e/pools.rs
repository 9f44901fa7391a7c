//! Sessions that share server connections, a transaction at a time.

use std::collections::BTreeSet;
use std::time::Duration;

use wire::frontend::{self, Target};

use crate::kinds::{KINDS, ROLES};
use crate::support::{
    Installation, cancel, connect, console, extended, named, run, shown, there_and_back, value,
};

const PID: &str = "SELECT pg_backend_pid()";

/// How the only session of `name` shares servers. While it is looked at, it is not listed.
pub(crate) async fn pool_of(installation: &Installation, name: &str) -> String {
    loop {
        let rows = console(installation).await.query("SHOW SESSIONS").await.unwrap();
        let rows = rows.into_iter().next().unwrap().rows;
        if let Some(row) = rows.into_iter().find(|row| row[4].as_deref() == Some(name)) {
            return row.last().unwrap().clone().unwrap_or_default();
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn many_sessions_share_few_servers() {
    let installation = Installation::start_pooled("pool-many", 3);
    let mut sessions = Vec::new();
    for _ in 0..20 {
        sessions.push(installation.connect().await);
    }
    let mut pids = BTreeSet::new();
    for round in 0..5 {
        for session in &mut sessions {
            pids.insert(value(session, PID).await);
            assert_eq!(
                value(session, &format!("SELECT {round} + 1")).await,
                (round + 1).to_string()
            );
        }
    }
    assert!(pids.len() <= 3, "{pids:?}");
    // Transactions keep a server each, the others wait in line.
    let [a, b, c, d, ..] = sessions.as_mut_slice() else { panic!() };
    for one in [&mut *a, &mut *b, &mut *c] {
        run(one, "BEGIN").await;
    }
    let waiting = tokio::spawn({
        let mut out = Vec::new();
        frontend::query(&mut out, b"SELECT 7");
        let mut other = installation.connect().await;
        async move {
            other.send(&out).await.unwrap();
            other.answers().await.unwrap().remove(0).rows.remove(0).remove(0)
        }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!waiting.is_finished());
    run(a, "COMMIT").await;
    assert_eq!(waiting.await.unwrap().as_deref(), Some("7"));
    for one in [b, c] {
        run(one, "ROLLBACK").await;
    }
    assert_eq!(value(d, "SELECT 1").await, "1");
}

/// What one session does is there for itself, and not for others.
#[tokio::test]
async fn state_stays_with_its_session() {
    let installation = Installation::start_pooled("pool-state", 2);
    let mut one = named(&installation, "one").await;
    let mut other = named(&installation, "other").await;
    let kinds = [
        ("SET statement_timeout = '77s'", "SHOW statement_timeout"),
        ("SET app.user_id = '7'", "SELECT current_setting('app.user_id', true)"),
        ("SELECT set_config('app.x', 'y', false)", "SELECT current_setting('app.x', true)"),
        ("BEGIN; SET LOCAL app.z = 'y'; COMMIT", "SELECT current_setting('app.z', true) IS NULL"),
        ("CREATE TEMP TABLE t AS SELECT 7 AS n", "SELECT to_regclass('t') IS NULL"),
        (
            "SELECT pg_advisory_lock(7)",
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
        ),
        ("LISTEN a", "SELECT string_agg(c, ',') FROM pg_listening_channels() c"),
        (
            "PREPARE p AS SELECT 7",
            "SELECT string_agg(name, ',') FROM pg_prepared_statements WHERE from_sql",
        ),
        (
            "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
            "SELECT string_agg(name, ',') FROM pg_cursors WHERE is_holdable",
        ),
        (
            "CREATE TABLE IF NOT EXISTS counted (n serial); INSERT INTO counted DEFAULT VALUES",
            "SELECT currval('counted_n_seq')",
        ),
        ("SET ROLE pg_monitor", "SELECT current_user"),
    ];
    let mut fresh = installation.direct("a").await;
    for (set_up, look) in kinds {
        run(&mut one, set_up).await;
        let own = value(&mut one, look).await;
        // Whoever shares a server sees what a fresh login sees.
        let expected = fresh.value(look).await.map_err(|error| error.to_string());
        for _ in 0..3 {
            assert_eq!(value(&mut one, look).await, own, "{set_up}");
            let seen = other.value(look).await.map_err(|error| error.to_string());
            assert_eq!(seen, expected, "{set_up}");
        }
    }
    let shown = pool_of(&installation, "one").await;
    assert!(shown.starts_with("keeps its server"), "{shown}");
}

/// A session whose settings alone are its own shares servers again, which are given them.
#[tokio::test]
async fn settings_go_with_their_session() {
    let installation = Installation::start_pooled("pool-settings", 2);
    let mut one = named(&installation, "one").await;
    let mut other = named(&installation, "one").await;
    run(&mut one, "SET work_mem = '7MB'; SET TimeZone = 'Asia/Tokyo'; SET app.x = 'y'").await;
    run(&mut other, "SET app.x = 'z'").await;
    for _ in 0..5 {
        assert_eq!(value(&mut one, "SHOW work_mem").await, "7MB");
        assert_eq!(value(&mut other, "SHOW work_mem").await, "4MB");
        assert_eq!(value(&mut one, "SELECT current_setting('app.x')").await, "y");
        assert_eq!(value(&mut other, "SELECT current_setting('app.x')").await, "z");
        assert_eq!(value(&mut one, "SHOW TimeZone").await, "Asia/Tokyo");
    }
    assert_eq!(one.params["TimeZone"], "Asia/Tokyo");
    assert_ne!(other.params["TimeZone"], "Asia/Tokyo");
    let rows = console(&installation).await.query("SHOW SESSIONS").await.unwrap();
    let shown: Vec<_> = rows[0].rows.iter().map(|row| row.last().unwrap().clone()).collect();
    assert!(shown.iter().all(|pool| pool.as_deref() == Some("shared")), "{shown:?}");
}

/// Sets every kind of state up in a session of its own, all of them sharing two servers, has others use those, and looks
/// again, and once more after a switchover. Gives what each does for it.
pub(crate) async fn every_kind() -> Vec<(&'static str, String)> {
    let installation = Installation::start_pooled("pool-kinds", 2);
    run(&mut installation.connect().await, ROLES).await;
    let mut others = vec![installation.connect().await, installation.connect().await];
    let mut sessions = Vec::new();
    for (name, set_up, look) in KINDS {
        let mut session = installation.connect().await;
        for sql in *set_up {
            run(&mut session, sql).await;
        }
        let before = value(&mut session, look).await;
        sessions.push((name, look, before, session));
    }
    let mut fresh = installation.direct("a").await;
    for (name, look, before, session) in &mut sessions {
        let expected = fresh.value(look).await.map_err(|error| error.to_string());
        for other in &mut others {
            let seen = other.value(look).await.map_err(|error| error.to_string());
            // Of advisory locks and the like everybody sees what all have.
            assert!(
                seen == expected || seen.as_ref().ok() != Some(&Some(before.clone())),
                "{name}: {seen:?}"
            );
        }
        assert_eq!(value(session, look).await, *before, "{name}");
    }
    let mut outcomes = Vec::new();
    // While a session is looked at, it is not listed.
    let shown = loop {
        let shown = console(&installation).await.query("SHOW SESSIONS").await.unwrap().remove(0);
        if shown.rows.len() == sessions.len() + others.len() {
            break shown;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let mut pools: Vec<(u64, String)> = Vec::new();
    for row in shown.rows {
        let id = row[0].as_deref().unwrap().parse().unwrap();
        pools.push((id, row.last().unwrap().clone().unwrap_or_default()));
    }
    pools.sort();
    // The first session has ended; the two others come before.
    let mine = pools.into_iter().skip(others.len()).map(|(_, pool)| pool);
    installation.switch_to("b");
    for ((name, look, before, session), pool) in sessions.iter_mut().zip(mine) {
        assert_eq!(value(session, look).await, *before, "{name} after a switchover");
        let shared = pool.is_empty() || pool == "shared";
        outcomes.push((**name, if shared { "shared".into() } else { "keeps".to_owned() }));
    }
    outcomes
}

#[tokio::test]
async fn every_kind_of_state_is_its_sessions_own() {
    let outcomes = every_kind().await;
    let shared = outcomes.iter().filter(|(_, outcome)| outcome == "shared").count();
    assert!(shared > 10, "{outcomes:?}");
}

/// Settings that are set for a transaction, or plainly, cost no look: nobody keeps a server for them.
#[tokio::test]
async fn plain_settings_keep_no_server() {
    let installation = Installation::start_pooled("pool-plain", 1);
    let mut one = named(&installation, "app").await;
    let mut other = named(&installation, "app").await;
    for tenant in 0..30 {
        for (session, mine) in [(&mut one, tenant), (&mut other, 100 + tenant)] {
            let local = format!("BEGIN; SET LOCAL app.tenant = '{mine}'; SELECT 1; COMMIT");
            run(session, &local).await;
            assert_eq!(value(session, "SELECT current_setting('app.tenant')").await, "");
            run(session, &format!("SET search_path = 'tenant{mine}'")).await;
            run(session, &format!("BEGIN; SET work_mem = '{}MB'; ROLLBACK", tenant + 10)).await;
            let set = format!("SELECT set_config('app.plain', '{mine}', false)");
            assert_eq!(value(session, &set).await, mine.to_string());
        }
        for (session, mine) in [(&mut one, tenant), (&mut other, 100 + tenant)] {
            assert_eq!(value(session, "SHOW search_path").await, format!("tenant{mine}"));
            assert_eq!(value(session, "SHOW work_mem").await, "4MB");
            assert_eq!(
                value(session, "SELECT current_setting('app.plain')").await,
                mine.to_string()
            );
        }
    }
    // There is one server in all: whoever kept it would have kept the other waiting.
    let mut pids = BTreeSet::new();
    for session in [&mut one, &mut other] {
        pids.insert(value(session, PID).await);
    }
    assert_eq!(pids.len(), 1);
}

/// Values of sequences keep a server, so that `currval` is right; unless the configuration gives them up.
#[tokio::test]
async fn values_of_sequences_are_kept_or_forgotten() {
    let mut installation = Installation::start_pooled("pool-currval", 2);
    let mut one = named(&installation, "one").await;
    let mut other = named(&installation, "other").await;
    run(&mut one, "CREATE TABLE counted (n serial, x text)").await;
    run(&mut one, "INSERT INTO counted DEFAULT VALUES").await;
    run(&mut other, "INSERT INTO counted DEFAULT VALUES").await;
    for (session, expected) in [(&mut one, "1"), (&mut other, "2")] {
        assert_eq!(value(session, "SELECT currval('counted_n_seq')").await, expected);
    }
    let shown = pool_of(&installation, "one").await;
    assert!(shown.contains("values of sequences") || shown.contains("currval"), "{shown}");
    installation.reconfigure(|text| text.replace("pool_size", "pool_currval = false\npool_size"));
    let mut one = named(&installation, "one").await;
    let mut other = named(&installation, "other").await;
    for session in [&mut one, &mut other] {
        run(session, "INSERT INTO counted DEFAULT VALUES").await;
        let both = "BEGIN; INSERT INTO counted DEFAULT VALUES; SELECT currval('counted_n_seq') > 0; COMMIT";
        run(session, both).await;
        let error = session.value("SELECT currval('counted_n_seq')").await.unwrap_err();
        assert_eq!(error.sqlstate().unwrap().to_string(), "55000", "{error}");
    }
    for name in ["one", "other"] {
        assert_eq!(pool_of(&installation, name).await, "shared");
    }
}

/// Prepared statements of the protocol are there wherever the session is attached.
#[tokio::test]
async fn prepared_statements_go_with_their_session() {
    let installation = Installation::start_pooled("pool-prepared", 3);
    let mut sessions = Vec::new();
    for n in 0..6 {
        let mut session = installation.connect().await;
        let mut out = Vec::new();
        frontend::parse(&mut out, b"same", b"SELECT $1::int + 1", &[]);
        frontend::parse(&mut out, b"own", format!("SELECT $1::int + {n}").as_bytes(), &[]);
        frontend::sync(&mut out);
        extended(&mut session, &out).await;
        sessions.push(session);
    }
    for _ in 0..4 {
        for (n, session) in sessions.iter_mut().enumerate() {
            for (name, expected) in [("same", 42), ("own", 41 + n)] {
                let mut out = Vec::new();
                frontend::describe(&mut out, Target::Statement(name.as_bytes()));
                frontend::bind_text(&mut out, b"", name.as_bytes(), &[Some(b"41")]);
                frontend::execute(&mut out, b"", 0);
                frontend::sync(&mut out);
                assert_eq!(extended(session, &out).await, [Some(expected.to_string())]);
            }
        }
    }
    // A name that is taken is refused, one that is closed can be taken again, and deallocated ones are gone.
    let session = &mut sessions[0];
    let parse = |name: &[u8], sql: &[u8]| {
        let mut out = Vec::new();
        frontend::parse(&mut out, name, sql, &[]);
        frontend::sync(&mut out);
        out
    };
    session.send(&parse(b"same", b"SELECT 1")).await.unwrap();
    let error = session.answers().await.unwrap_err();
    assert_eq!(error.sqlstate().unwrap().to_string(), "42P05", "{error}");
    let mut out = Vec::new();
    frontend::close(&mut out, Target::Statement(b"same"));
    out.extend(parse(b"same", b"SELECT 'other'"));
    extended(session, &out).await;
    run(session, "DEALLOCATE own").await;
    let mut out = Vec::new();
    frontend::bind_text(&mut out, b"", b"own", &[]);
    frontend::sync(&mut out);
    session.send(&out).await.unwrap();
    let error = session.answers().await.unwrap_err();
    assert_eq!(error.sqlstate().unwrap().to_string(), "26000", "{error}");
    run(session, "DEALLOCATE ALL").await;
    extended(session, &parse(b"same", b"SELECT 'third'")).await;
    let mut out = Vec::new();
    frontend::bind_text(&mut out, b"", b"same", &[]);
    frontend::execute(&mut out, b"", 0);
    frontend::sync(&mut out);
    assert_eq!(extended(session, &out).await, [Some("third".to_owned())]);
}

/// Sessions that are attached to no server go with a switchover as others do.
#[tokio::test]
async fn a_switchover_takes_them_along() {
    let installation = Installation::start_pooled("pool-switch", 2);
    let mut sessions = Vec::new();
    for _ in 0..10 {
        sessions.push(installation.connect().await);
    }
    run(&mut sessions[0], "SET work_mem = '7MB'").await;
    run(&mut sessions[1], "CREATE TEMP TABLE t AS SELECT 7 AS n").await;
    let mut out = Vec::new();
    frontend::parse(&mut out, b"p", b"SELECT 8", &[]);
    frontend::sync(&mut out);
    extended(&mut sessions[2], &out).await;
    let text = installation.switch_to("b");
    assert!(text.contains("10 sessions"), "{text}");
    assert_eq!(value(&mut sessions[0], "SHOW work_mem").await, "7MB");
    assert_eq!(value(&mut sessions[1], "SELECT n FROM t").await, "7");
    let mut out = Vec::new();
    frontend::bind_text(&mut out, b"", b"p", &[]);
    frontend::execute(&mut out, b"", 0);
    frontend::sync(&mut out);
    assert_eq!(extended(&mut sessions[2], &out).await, [Some("8".to_owned())]);
    for session in &mut sessions {
        let port = value(session, "SELECT inet_server_port()").await;
        assert_eq!(port, installation.facts.servers["b"].to_string());
    }
    let output = installation.holdfast(&["sessions", "shop"]);
    assert!(shown(&output).contains("shared"), "{}", shown(&output));
}

/// Whoever loses its server in a transaction is told; whoever has none does not notice.
#[tokio::test]
async fn servers_that_end_are_replaced() {
    let installation = Installation::start_pooled("pool-killed", 2);
    let mut direct = installation.direct("a").await;
    let (mut one, mut other) = (installation.connect().await, installation.connect().await);
    let kill = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity \
        WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND application_name <> 'holdfast'";
    for _ in 0..5 {
        assert_eq!(value(&mut one, "SELECT 1").await, "1");
        run(&mut direct, kill).await;
        // The proxy hears of it by its socket, the sooner the better.
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(value(&mut other, "SELECT 2").await, "2");
    }
    run(&mut one, "BEGIN").await;
    run(&mut direct, kill).await;
    assert!(one.query("SELECT 1").await.is_err());
    assert_eq!(value(&mut other, "SELECT 3").await, "3");
}

/// A client that goes away in the middle leaves a server that others can use, or none.
#[tokio::test]
async fn clients_that_leave_are_in_nobodys_way() {
    let installation = Installation::start_pooled("pool-left", 1);
    let mut last = installation.connect().await;
    let pid = value(&mut last, PID).await;
    for sql in [
        "SELECT 1",
        "BEGIN",
        "SELECT pg_sleep(0.2)",
        "COPY orders FROM STDIN",
        "SELECT 1/0",
        "LISTEN a",
    ] {
        let mut one = installation.connect().await;
        let mut out = Vec::new();
        frontend::query(&mut out, sql.as_bytes());
        one.send(&out).await.unwrap();
        drop(one);
        assert_eq!(value(&mut last, "SELECT 2").await, "2", "{sql}");
    }
    // In line.
    run(&mut last, "BEGIN").await;
    for _ in 0..5 {
        let mut one = installation.connect().await;
        let mut out = Vec::new();
        frontend::query(&mut out, b"SELECT 1");
        one.send(&out).await.unwrap();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    run(&mut last, "COMMIT").await;
    assert_eq!(value(&mut last, "SELECT 3").await, "3");
    // One that says goodbye leaves its server as it is.
    let before = value(&mut last, PID).await;
    for _ in 0..5 {
        let mut one = installation.connect().await;
        let mut out = Vec::new();
        frontend::query(&mut out, b"SELECT 1");
        frontend::terminate(&mut out);
        one.send(&out).await.unwrap();
        while one.receive().await.is_ok() {}
    }
    assert_eq!(value(&mut last, PID).await, before);
    assert_ne!(pid, before, "one that was in a transaction took it along");
}

/// A cancel request reaches the statement that its client runs, and no other.
#[tokio::test]
async fn cancel_requests_reach_their_own() {
    let installation = Installation::start_pooled("pool-cancel", 2);
    let mut sessions = Vec::new();
    for _ in 0..6 {
        sessions.push(installation.connect().await);
    }
    let port = installation.facts.port;
    for round in 0..30 {
        let mut one = sessions.remove(0);
        let (pid, secret) = (one.pid, one.secret.clone());
        // Idle, it has nothing to cancel, whoever runs something meanwhile.
        cancel(port, pid, &secret).await;
        for other in &mut sessions {
            assert_eq!(value(other, "SELECT 1").await, "1");
        }
        let mut out = Vec::new();
        frontend::query(&mut out, b"SELECT pg_sleep(60)");
        one.send(&out).await.unwrap();
        tokio::time::sleep(Duration::from_millis(round % 5)).await;
        let (cancelled, others) = tokio::join!(
            async {
                loop {
                    cancel(port, pid, &secret).await;
                    let answer = one.answers();
                    if let Ok(answer) =
                        tokio::time::timeout(Duration::from_millis(200), answer).await
                    {
                        return answer.unwrap_err();
                    }
                }
            },
            async {
                for other in &mut sessions {
                    assert_eq!(value(other, "SELECT 2").await, "2");
                }
            }
        );
        let () = others;
        assert_eq!(cancelled.sqlstate().unwrap().to_string(), "57014", "{cancelled}");
        sessions.push(one);
    }
}

/// Whoever waits for too long is told, and why.
#[tokio::test]
async fn the_wait_for_a_server_ends() {
    let mut installation = Installation::start_pooled("pool-wait", 1);
    let more = "pool_wait_max = \"1s\"\npool_kept_max = 0\npool_size";
    installation.reconfigure(|text| text.replace("pool_size", more));
    let mut one = installation.connect().await;
    let mut other = installation.connect().await;
    run(&mut one, "LISTEN a").await;
    let mut out = Vec::new();
    frontend::query(&mut out, b"SELECT 1");
    other.send(&out).await.unwrap();
    let (state, detail) = crate::support::last_words(&mut other).await;
    assert_eq!(state.unwrap().to_string(), "53300", "{detail}");
    assert!(detail.contains("1 shared server connections"), "{detail}");
    run(&mut one, "UNLISTEN a").await;
    let mut other = installation.connect().await;
    assert_eq!(value(&mut other, "SELECT 1").await, "1");
}

/// Settings that code sets out of sight, and names that are written otherwise than they are read.
#[tokio::test]
async fn what_code_does_out_of_sight_stays_with_its_session() {
    let installation = Installation::start_pooled("pool-sight", 1);
    let mut one = installation.connect().await;
    let mut other = installation.connect().await;
    let make = "CREATE FUNCTION sets() RETURNS int LANGUAGE plpgsql AS \
        $$BEGIN PERFORM set_config('work_mem', '7MB', false); RETURN 1; END$$; \
        CREATE FUNCTION nested() RETURNS void LANGUAGE plpgsql AS \
        $$BEGIN DO $x$BEGIN PERFORM sets(); END$x$; END$$; \
        CREATE FUNCTION loops() RETURNS void LANGUAGE plpgsql AS \
        $$BEGIN FOR i IN 1..sets() LOOP END LOOP; END$$; \
        CREATE FUNCTION quotes() RETURNS void LANGUAGE plpgsql AS \
        $$BEGIN UPDATE \"pg_settings\" SET setting = '7MB' WHERE name = 'work_mem'; END$$; \
        CREATE FUNCTION parts(int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS \
        $$BEGIN PERFORM sets(); RETURN $1; END$$; \
        CREATE TABLE pp (a int) PARTITION BY RANGE (parts(a)); \
        CREATE TABLE pp1 PARTITION OF pp FOR VALUES FROM (0) TO (9); \
        CREATE TABLE caf\u{e9} (n int); \
        CREATE FUNCTION fires() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM sets(); RETURN NEW; END$$; \
        CREATE TRIGGER t BEFORE INSERT ON caf\u{e9} EXECUTE FUNCTION fires()";
    run(&mut one, make).await;
    for sql in
        ["SELECT nested()", "SELECT loops()", "SELECT quotes()", "INSERT INTO pp1 VALUES (1)"]
    {
        run(&mut one, sql).await;
        assert_eq!(value(&mut one, "SHOW work_mem").await, "7MB", "{sql}");
        assert_eq!(value(&mut other, "SHOW work_mem").await, "4MB", "{sql}");
        run(&mut one, "RESET work_mem").await;
    }
    // A statement without a name was harmless when it was prepared.
    run(&mut one, "CREATE FUNCTION turns() RETURNS int LANGUAGE sql AS 'SELECT 1'").await;
    let mut out = Vec::new();
    frontend::parse(&mut out, b"", b"SELECT turns()", &[]);
    frontend::sync(&mut out);
    extended(&mut one, &out).await;
    let replace = "CREATE OR REPLACE FUNCTION turns() RETURNS int LANGUAGE sql AS 'SELECT sets()'";
    run(&mut other, replace).await;
    let mut out = Vec::new();
    frontend::bind_text(&mut out, b"", b"", &[]);
    frontend::execute(&mut out, b"", 0);
    frontend::sync(&mut out);
    extended(&mut one, &out).await;
    assert_eq!(value(&mut one, "SHOW work_mem").await, "7MB");
    assert_eq!(value(&mut other, "SHOW work_mem").await, "4MB");
    run(&mut one, "RESET work_mem").await;
    let mut latin = installation.connect().await;
    run(&mut latin, "SET client_encoding = LATIN1").await;
    let mut out = Vec::new();
    frontend::query(&mut out, b"INSERT INTO caf\xe9 VALUES (1)");
    latin.send(&out).await.unwrap();
    latin.answers().await.unwrap();
    assert_eq!(value(&mut latin, "SHOW work_mem").await, "7MB");
    assert_eq!(value(&mut other, "SHOW work_mem").await, "4MB");
}

/// A statement whose literals mean something else by now is not prepared anew on a server that lacks it: the session is told.
#[tokio::test]
async fn a_literal_is_never_read_under_other_settings() {
    let installation = Installation::start_pooled("pool-literal", 2);
    let mut one = installation.connect().await;
    let mut other = installation.connect().await;
    run(&mut one, "SET datestyle = 'ISO, DMY'").await;
    let mut out = Vec::new();
    frontend::parse(&mut out, b"s", b"SELECT to_char('01/02/2020'::date, 'YYYY-MM-DD')", &[]);
    frontend::sync(&mut out);
    extended(&mut one, &out).await;
    // Whichever server the other takes: one of these finds one without the statement.
    let pid = value(&mut one, PID).await;
    while {
        run(&mut other, "BEGIN").await;
        value(&mut other, PID).await != pid
    } {
        run(&mut one, "BEGIN").await;
        run(&mut other, "COMMIT").await;
        run(&mut one, "COMMIT").await;
    }
    run(&mut one, "SET datestyle = 'ISO, MDY'").await;
    let mut out = Vec::new();
    frontend::bind_text(&mut out, b"", b"s", &[]);
    frontend::execute(&mut out, b"", 0);
    frontend::sync(&mut out);
    one.send(&out).await.unwrap();
    let told = crate::support::last_words(&mut one).await;
    assert_eq!(told.0.unwrap().to_string(), "57P01", "{}", told.1);
    run(&mut other, "COMMIT").await;
}

/// Sessions that stand on no server keep what their login gave them, also where another server's configuration is
/// another; whoever logs in after that has what that one gives.
#[tokio::test]
async fn what_a_login_gave_stays_on_another_server() {
    let installation = Installation::start_pooled("pool-configured", 3);
    let mut other = installation.direct("b").await;
    run(&mut other, "ALTER SYSTEM SET work_mem = '9MB'").await;
    run(&mut other, "SELECT pg_reload_conf()").await;
    let mut plain = installation.connect().await;
    let mut set = installation.connect().await;
    run(&mut set, "SET lock_timeout = '7s'").await;
    let seen = |work_mem: &str, lock_timeout: &str| [work_mem.to_owned(), lock_timeout.to_owned()];
    for cell in there_and_back().iter().chain(&["b"]) {
        if installation.active() != *cell {
            installation.switch_to(cell);
        }
        let fresh = if *cell == "b" { "9MB" } else { "4MB" };
        let mut new = installation.connect().await;
        let (old, fresh) = (seen("4MB", "0"), seen(fresh, "0"));
        for _ in 0..3 {
            for (session, expected) in
                [(&mut plain, &old), (&mut new, &fresh), (&mut set, &seen("4MB", "7s"))]
            {
                for (name, value_of) in ["work_mem", "lock_timeout"].iter().zip(expected) {
                    assert_eq!(&value(session, &format!("SHOW {name}")).await, value_of, "{cell}");
                }
            }
        }
        run(&mut plain, "SET work_mem = '5MB'").await;
        assert_eq!(value(&mut plain, "SHOW work_mem").await, "5MB");
        run(&mut plain, "RESET work_mem").await;
        assert_eq!(value(&mut plain, "SHOW work_mem").await, "4MB", "{cell}");
        assert_eq!(value(&mut new, "SHOW work_mem").await, fresh[0], "{cell}");
    }
}

/// What others do to roles and the configuration, long apart, ends nobody.
#[tokio::test]
async fn a_role_that_is_created_after_a_reload_ends_no_session() {
    let installation = Installation::start_pooled("pool-roles", 8);
    let mut direct = installation.direct("a").await;
    run(&mut direct, "CREATE ROLE user0 LOGIN; CREATE ROLE user1 LOGIN").await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let mut sessions = Vec::new();
    for _ in 0..6 {
        let mut session = installation.connect().await;
        run(&mut session, "SET work_mem = '7MB'").await;
        sessions.push(session);
    }
    run(&mut direct, "ALTER SYSTEM SET log_min_duration_statement = '1h'").await;
    run(&mut direct, "SELECT pg_reload_conf()").await;
    // Whoever looks has seen it by then.
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    run(&mut direct, "CREATE ROLE another").await;
    for user in ["user0", "user1"] {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        // A login of another kind, on a connection that has the configuration from before it was opened.
        drop(connect(installation.facts.port, user, None).await.unwrap());
    }
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    // They stood on few servers, and get more.
    for session in &mut sessions {
        run(session, "BEGIN").await;
    }
    for session in &mut sessions {
        assert_eq!(value(session, "SHOW work_mem").await, "7MB");
        run(session, "COMMIT").await;
    }
}
