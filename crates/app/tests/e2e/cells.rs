//! The states of cells, as clients meet them: fenced and given a new grant, with every connection kept.

use pg::Connection;
use wire::backend::{Backend, TxStatus};
use wire::frontend;
use wire::sqlstate::SqlState;

use crate::support::{
    Installation, connect, console, extended, http_get, last_words, login, run, shown, value,
};

const SET_UP: &str = "CREATE TABLE t (n int); INSERT INTO t VALUES (1); CREATE SEQUENCE s; \
    CREATE FUNCTION writes() RETURNS int LANGUAGE sql AS 'INSERT INTO t VALUES (7) RETURNING n'; \
    CREATE FUNCTION reads() RETURNS int STABLE LANGUAGE sql AS 'SELECT 1'; \
    CREATE VIEW v AS SELECT writes() AS n";

/// What a fenced cell refuses, each a request of its own.
const REFUSED: [&str; 22] = [
    "INSERT INTO t VALUES (2)",
    "WITH w AS (DELETE FROM t RETURNING n) SELECT * FROM w",
    "SELECT 1; UPDATE t SET n = 3",
    "SELECT n FROM t FOR UPDATE",
    "SELECT n INTO u FROM t",
    "SELECT nextval('s')",
    "SELECT writes()",
    "SELECT * FROM v",
    "EXPLAIN ANALYZE DELETE FROM t",
    "COPY t FROM STDIN",
    "COPY t TO PROGRAM 'cat'",
    "DO 'BEGIN END'",
    "CREATE TABLE u (n int)",
    "TRUNCATE t",
    "NOTIFY c",
    "VACUUM t",
    "BEGIN READ WRITE",
    "SET default_transaction_read_only = off",
    "SELECT set_config('transaction_read_only', 'off', false)",
    "PREPARE TRANSACTION 'x'",
    "SELECT pg_advisory_lock(1)",
    "SELECT this is no SQL",
];

async fn refused(session: &mut Connection, sql: &str) -> String {
    let error = session.query(sql).await.map(|_| ()).expect_err(sql);
    assert_eq!(error.sqlstate(), Some(SqlState::READ_ONLY_SQL_TRANSACTION), "{sql}: {error}");
    error.to_string()
}

fn holdfast(installation: &Installation, args: &[&str]) -> String {
    let output = installation.holdfast(args);
    assert!(output.status.success(), "{args:?}: {}", shown(&output));
    shown(&output)
}

fn not_done(installation: &Installation, args: &[&str]) -> String {
    let output = installation.holdfast(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", shown(&output));
    shown(&output)
}

/// What a load balancer is told.
fn health(installation: &Installation, path: &str) -> (u16, String) {
    let address = installation.facts.api.strip_prefix("http://").unwrap();
    let answer = http_get(address, path);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn parse(name: &[u8], sql: &str) -> Vec<u8> {
    let mut out = Vec::new();
    frontend::parse(&mut out, name, sql.as_bytes(), &[]);
    out
}

/// Bind and Execute of a prepared statement.
fn execute(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    frontend::bind_text(&mut out, b"", name, &[]);
    frontend::execute(&mut out, b"", 0);
    out
}

fn sync(mut messages: Vec<u8>) -> Vec<u8> {
    frontend::sync(&mut messages);
    messages
}

/// The messages of a batch up to its ReadyForQuery: tags, SQLSTATEs of errors, and where the transaction stands.
async fn batch(session: &mut Connection, messages: Vec<u8>) -> String {
    session.send(&sync(messages)).await.unwrap();
    let mut found = String::new();
    loop {
        let message = session.receive().await.unwrap();
        match message.view().unwrap() {
            Backend::Error(fields) => {
                found.push_str(&format!("[{}]", fields.sqlstate().unwrap()));
            }
            Backend::Ready(status) => {
                found.push(match status {
                    TxStatus::Idle => 'I',
                    TxStatus::InTransaction => 'T',
                    TxStatus::Failed => 'E',
                });
                return found;
            }
            Backend::ParameterStatus { .. } => (),
            _ => found.push(char::from(message.tag)),
        }
    }
}

/// One session through all states: it is never disconnected, and what it had prepared is judged by what it does now.
async fn a_cell_goes_through_its_states(installation: Installation, shares: bool) {
    let mut one = installation.connect().await;
    let mut other = installation.connect().await;
    run(&mut one, SET_UP).await;
    let mut prepared = parse(b"w", "INSERT INTO t VALUES (9)");
    prepared.extend(parse(b"r", "SELECT n FROM t"));
    prepared.extend(parse(b"f", "SELECT reads()"));
    extended(&mut one, &sync(prepared)).await;
    extended(&mut other, &sync(parse(b"", "DELETE FROM t"))).await;
    run(&mut one, "SET application_name = 'kept'").await;
    // Its transactions would write by themselves.
    let mut lifted = installation.connect().await;
    run(&mut lifted, "SET default_transaction_read_only = off").await;

    let text = holdfast(&installation, &["fence", "shop", "a", "--deadline", "10s"]);
    assert!(text.contains("execution 1: fence of shop, cell a: completed"), "{text}");
    assert!(text.contains("logins only from 127.0.0.1"), "{text}");
    let status = shown(&installation.holdfast(&["status", "shop"]));
    assert!(status.contains("nothing takes writes: holdfast unfence shop a"), "{status}");
    assert_eq!(health(&installation, "/read-only"), (200, "read-only\n".into()));
    assert_eq!(health(&installation, "/primary"), (503, "cell `a` of `shop` is fenced\n".into()));
    for args in [
        &["fence", "shop", "a"][..],
        &["unfence", "shop", "b"],
        &["switchover", "shop", "--to", "a"],
    ] {
        not_done(&installation, args);
    }
    if shares {
        // It stands on no server, and the next one is fenced.
        refused(&mut lifted, "INSERT INTO t VALUES (2)").await;
        assert_eq!(value(&mut lifted, "SHOW default_transaction_read_only").await, "on");
    } else {
        let (state, detail) = last_words(&mut lifted).await;
        assert_eq!(state, Some(SqlState::ADMIN_SHUTDOWN));
        assert!(detail.contains("`default_transaction_read_only`"), "{detail}");
    }
    let tls = tls::ClientTls::load(tls::SslMode::Disable, None, None).unwrap();
    let options = [("options", "-c default_transaction_read_only=off")];
    let port = installation.facts.port;
    let error = login(port, "postgres", None, tls, &options).await.unwrap_err();
    assert!(error.to_string().contains("default_transaction_read_only"), "{error}");
    for sql in REFUSED {
        refused(&mut one, sql).await;
        assert_eq!(one.status, TxStatus::Idle, "{sql}");
    }
    let text = refused(&mut one, "DELETE FROM t").await;
    assert_eq!(text, "cannot execute DELETE in cell `a`, which is fenced (25006)");
    assert_eq!(value(&mut one, "SELECT count(*) FROM t WHERE n = 1").await, "1");
    assert_eq!(value(&mut one, "SHOW application_name").await, "kept");
    assert_eq!(batch(&mut one, execute(b"r")).await, "2DCI");
    assert_eq!(batch(&mut one, execute(b"f")).await, "2DCI");
    assert_eq!(batch(&mut one, execute(b"w")).await, "2[25006]I");
    // What follows in the batch is skipped, and the next batch is not.
    let mut two = execute(b"w");
    two.extend(execute(b"r"));
    two = sync(two);
    two.extend(execute(b"r"));
    assert_eq!(batch(&mut one, two).await, "2[25006]I");
    let mut rest = String::new();
    while !rest.ends_with('Z') {
        rest.push(char::from(one.receive().await.unwrap().tag));
    }
    assert_eq!(rest, "2DCZ");
    assert_eq!(batch(&mut other, execute(b"")).await, "2[25006]I");
    assert_eq!(batch(&mut other, parse(b"", "SELECT 1")).await, "1I");
    assert_eq!(batch(&mut other, execute(b"")).await, "2DCI");
    // A name that is taken stands for what it stood for.
    assert_eq!(batch(&mut one, parse(b"w", "SELECT 1")).await, "[42P05]I");
    assert_eq!(batch(&mut one, execute(b"w")).await, "2[25006]I");
    // The server itself fails the transaction.
    run(&mut one, "BEGIN; SELECT 1").await;
    refused(&mut one, "INSERT INTO t VALUES (2)").await;
    assert_eq!(one.status, TxStatus::Failed);
    let answer = one.query("SELECT 1").await.unwrap_err();
    assert_eq!(answer.sqlstate().unwrap().to_string(), "25P02");
    run(&mut one, "ROLLBACK").await;
    assert_eq!(one.status, TxStatus::Idle);
    // Statements prepared by SQL are known from then on.
    let mut fresh = installation.connect().await;
    run(&mut fresh, "PREPARE mine AS SELECT n FROM t WHERE n = 1; EXECUTE mine").await;
    run(&mut fresh, "PREPARE theirs AS DELETE FROM t").await;
    refused(&mut fresh, "EXECUTE theirs").await;
    refused(&mut fresh, "EXECUTE nobodys").await;
    let mut call = Vec::new();
    call.extend_from_slice(b"F\0\0\0\x0e\0\0\x06\x27\0\0\0\0\0\0");
    fresh.send(&call).await.unwrap();
    assert!(fresh.answers().await.is_err());
    let long = format!("SELECT 1 /* {} */", "x".repeat(300_000));
    refused(&mut fresh, &long).await;
    assert_eq!(value(&mut fresh, "SELECT 2").await, "2");
    // Whoever comes past the proxy meets a server that is read-only.
    let error = installation.direct("a").await.query("INSERT INTO t VALUES (2)").await.unwrap_err();
    assert_eq!(error.sqlstate(), Some(SqlState::READ_ONLY_SQL_TRANSACTION));
    let cells = console(&installation).await.query("SHOW CELLS").await.unwrap().remove(0).rows;
    assert_eq!(cells[0][4].as_deref(), Some("fenced"));
    let rules = console(&installation).await.query("SHOW RULES").await.unwrap().remove(0).rows;
    let default = rules.iter().find(|rule| rule[1].as_deref() == Some("default")).unwrap();
    let refusals: usize = default[8].as_deref().unwrap().parse().unwrap();
    assert!(refusals > REFUSED.len(), "{rules:?}");

    let text = holdfast(&installation, &["unfence", "shop", "a"]);
    assert!(text.contains("epoch 2 is `a`'s"), "{text}");
    run(&mut one, "INSERT INTO t VALUES (2)").await;
    assert_eq!(batch(&mut one, execute(b"w")).await, "2CI");
    assert_eq!(value(&mut other, "SELECT writes()").await, "7");
    assert_eq!(value(&mut one, "SELECT count(*) FROM t").await, "4");
    let status = shown(&installation.holdfast(&["status", "shop"]));
    assert!(status.contains("active cell a, epoch 2") && !status.contains('!'), "{status}");

    // A second time nobody is taken for one who has lifted the fence: what the server said in between was so.
    holdfast(&installation, &["fence", "shop", "a"]);
    for session in [&mut one, &mut other, &mut fresh] {
        assert_eq!(value(session, "SELECT count(*) FROM t").await, "4");
        refused(session, "INSERT INTO t VALUES (8)").await;
    }
    holdfast(&installation, &["unfence", "shop", "a"]);
    run(&mut other, "UPDATE t SET n = n").await;

    let text = holdfast(&installation, &["fence", "shop", "a", "--all"]);
    assert!(text.contains("logins closed"), "{text}");
    for session in [&mut one, &mut other] {
        let error = session.query("SELECT 1").await.unwrap_err();
        assert_eq!(error.sqlstate(), Some(SqlState::CANNOT_CONNECT_NOW), "{error}");
        assert_eq!(session.status, TxStatus::Idle);
        let mut messages = parse(b"", "SELECT 1");
        messages.extend(execute(b""));
        let answer = batch(session, messages).await;
        assert!(answer.ends_with("[57P03]I"), "{answer}");
    }
    let error = connect(installation.facts.port, "postgres", None).await.unwrap_err();
    assert!(error.to_string().contains("is passive"), "{error}");
    holdfast(&installation, &["unfence", "shop", "a"]);
    run(&mut one, "INSERT INTO t VALUES (3)").await;
    assert_eq!(value(&mut other, "SELECT count(*) FROM t").await, "5");
    assert_eq!(value(&mut one, "SHOW application_name").await, "kept");
    installation.switch_to("b");
    run(&mut one, "INSERT INTO t VALUES (4)").await;
}

#[tokio::test]
async fn a_fenced_cell_reads_and_takes_writes_again_by_a_new_grant() {
    a_cell_goes_through_its_states(Installation::start("fenced"), false).await;
}

/// Sessions that share servers.
#[tokio::test]
async fn shared_servers_are_fenced_for_each_session() {
    a_cell_goes_through_its_states(Installation::start_pooled("fenced-pool", 2), true).await;
}

const RULES: &str = "\n[app.policy]\nversion = 7\nhold_max = \"2s\"\nreading = [\"writes\"]\n\
    [[app.policy.rule]]\nname = \"wait\"\nstates = [\"fenced\"]\nclasses = [\"write\"]\ndisposition = \"hold\"\n\
    [[app.policy.rule]]\nname = \"no-ddl\"\nclasses = [\"definition\"]\nroles = [\"app\"]\ndisposition = \"refuse\"\n";

/// Rules of one's own: by role, in an active cell as well, and such as hold until the state changes.
#[tokio::test]
async fn rules_of_ones_own_are_tried_first() {
    let mut installation = Installation::start("rules");
    run(&mut installation.connect().await, &format!("{SET_UP}; CREATE ROLE app LOGIN")).await;
    installation
        .reconfigure(|text| text.replacen("\n[[app.cell]]", &format!("{RULES}\n[[app.cell]]"), 1));
    let port = installation.facts.port;
    let mut app = connect(port, "app", None).await.unwrap();
    let mut admin = installation.connect().await;
    let error = app.query("CREATE TABLE u (n int)").await.unwrap_err();
    assert_eq!(error.sqlstate(), Some(SqlState::INSUFFICIENT_PRIVILEGE));
    assert!(error.to_string().contains("CREATE TABLE in cell `a`, which is active"), "{error}");
    run(&mut app, "SELECT 1").await;
    run(&mut admin, "CREATE TABLE u (n int)").await;
    holdfast(&installation, &["fence", "shop", "a"]);
    // Whatever it does, the configuration says that it reads; the server itself refuses.
    let error = admin.query("SELECT writes()").await.unwrap_err();
    assert!(error.to_string().contains("read-only transaction"), "{error}");
    // It waits until it may wait no longer.
    let text = refused(&mut admin, "INSERT INTO t VALUES (2)").await;
    assert!(text.contains("which is fenced"), "{text}");
    // It waits, and goes on.
    let waits = tokio::spawn(async move {
        run(&mut admin, "INSERT INTO t VALUES (3)").await;
        admin
    });
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    holdfast(&installation, &["unfence", "shop", "a"]);
    let mut admin = waits.await.unwrap();
    assert_eq!(value(&mut admin, "SELECT count(*) FROM t").await, "2");
    let rules = console(&installation).await.query("SHOW RULES").await.unwrap().remove(0).rows;
    assert_eq!(rules[0][..2], [Some("shop".into()), Some("wait".into())]);
    assert_eq!(rules[0][9].as_deref(), Some("2"), "{rules:?}");
    // What would be refused is counted, and passes.
    installation
        .reconfigure(|text| text.replacen("[app.policy]\n", "[app.policy]\nshadow = true\n", 1));
    let mut app = connect(port, "app", None).await.unwrap();
    let error = app.query("CREATE TABLE u (n int)").await.unwrap_err();
    assert!(error.to_string().contains("permission denied"), "{error}");
    let rules = console(&installation).await.query("SHOW RULES").await.unwrap().remove(0).rows;
    assert_eq!(rules[1][10].as_deref(), Some("1"), "{rules:?}");
}

/// A transaction that does not end gives the fence up, or is ended; nothing that was acknowledged is after the fence.
#[tokio::test]
async fn open_transactions_are_waited_for() {
    let installation = Installation::start("fence-busy");
    let mut busy = installation.connect().await;
    run(&mut busy, SET_UP).await;
    run(&mut busy, "BEGIN; INSERT INTO t VALUES (2)").await;
    let text = not_done(&installation, &["fence", "shop", "a", "--deadline", "300ms"]);
    assert!(text.contains("aborted"), "{text}");
    run(&mut busy, "INSERT INTO t VALUES (3); COMMIT").await;
    run(&mut busy, "BEGIN; INSERT INTO t VALUES (4)").await;
    let args = ["fence", "shop", "a", "--deadline", "300ms", "--on-timeout", "force"];
    holdfast(&installation, &args);
    assert!(busy.query("COMMIT").await.is_err());
    let mut one = installation.connect().await;
    assert_eq!(value(&mut one, "SELECT count(*) FROM t").await, "3");
    refused(&mut one, "INSERT INTO t VALUES (5)").await;
}

const HIDDEN: &str = "CREATE TABLE h (n int); CREATE FUNCTION hides() RETURNS int LANGUAGE plpgsql AS \
    'BEGIN INSERT INTO h VALUES (1); RETURN 1; END'; \
    CREATE FUNCTION hides(h) RETURNS int LANGUAGE sql AS 'SELECT hides()'; \
    CREATE FUNCTION hides(int, int) RETURNS bool LANGUAGE sql AS 'SELECT hides() = 1'; \
    CREATE FUNCTION hides(int) RETURNS bool LANGUAGE sql AS 'SELECT hides() = 1'; \
    CREATE OPERATOR <!> (LEFTARG = int, RIGHTARG = int, FUNCTION = hides); \
    CREATE DOMAIN dm AS int CHECK (hides(VALUE)); CREATE VIEW v1 AS SELECT hides() AS n; CREATE VIEW v2 AS SELECT n FROM v1; \
    CREATE VIEW vlo AS SELECT lo_create(0) AS n; CREATE VIEW vop AS SELECT 1 <!> 2 AS n; CREATE VIEW vdm AS SELECT 1::dm AS n; \
    CREATE FUNCTION adds(int, int) RETURNS int LANGUAGE sql AS 'SELECT hides()'; \
    CREATE AGGREGATE agg (int) (SFUNC = adds, STYPE = int, INITCOND = 0); CREATE TYPE pt AS (x int); \
    CREATE FUNCTION to_pt(int) RETURNS pt LANGUAGE sql AS 'SELECT row(hides())::pt'; CREATE CAST (int AS pt) WITH FUNCTION to_pt(int); \
    CREATE FUNCTION \"a.upper\"() RETURNS int LANGUAGE sql AS 'SELECT hides()'; INSERT INTO h VALUES (0)";

/// Writes that hide in what names stand for, each refused before it reaches a server that would take it.
#[tokio::test]
async fn what_names_stand_for_hides_no_write() {
    let installation = Installation::start("hidden");
    let mut one = installation.connect().await;
    run(&mut one, HIDDEN).await;
    holdfast(&installation, &["fence", "shop", "a"]);
    for sql in [
        "SELECT * FROM v2",
        "SELECT * FROM vlo",
        "SELECT * FROM vop",
        "SELECT * FROM vdm",
        "SELECT 1::dm",
        "SELECT h.hides FROM h",
        "SELECT (h).hides FROM h",
        "SELECT agg(n) FROM h",
        "SELECT 1::pt",
        "SELECT 1 <!> ANY (SELECT 2)",
        "SELECT \"a.upper\"()",
        "SELECT table_to_xml('v1', true, false, '')",
        "PREPARE p (int) AS SELECT $1; EXECUTE p (hides())",
        "SELECT 1; COMMIT; SELECT 1",
    ] {
        refused(&mut one, sql).await;
        assert_eq!(one.status, TxStatus::Idle, "{sql}");
    }
    // A query is read as its server does; of what is prepared for later that is not known.
    let literals = r"SELECT '\' , '; INSERT INTO h VALUES (10); --'";
    assert_eq!(value(&mut one, literals).await, r"\");
    let mut out = parse(b"", literals);
    out.extend(execute(b""));
    assert_eq!(batch(&mut one, out).await, "12[25006]I");
    run(&mut one, "SET standard_conforming_strings = off").await;
    refused(&mut one, literals).await;
    run(&mut one, "RESET standard_conforming_strings").await;
    assert_eq!(value(&mut one, literals).await, r"\");
    // Not when it may have been set in what is under way.
    let mut out = parse(b"", "SET standard_conforming_strings = off");
    out.extend(execute(b""));
    frontend::query(&mut out, literals.as_bytes());
    one.send(&out).await.unwrap();
    assert!(one.answers().await.is_err());
    run(&mut one, "RESET standard_conforming_strings").await;
    // What the protocol has bound, FETCH would run.
    run(&mut one, "BEGIN").await;
    let mut out = parse(b"", "DELETE FROM h RETURNING n");
    frontend::bind_text(&mut out, b"x", b"", &[]);
    assert_eq!(batch(&mut one, out).await, "12T");
    refused(&mut one, "FETCH ALL FROM x").await;
    run(&mut one, "ROLLBACK").await;
    run(&mut one, "BEGIN").await;
    run(&mut one, "DECLARE c CURSOR FOR SELECT n FROM h").await;
    assert_eq!(value(&mut one, "FETCH ALL FROM c").await, "0");
    run(&mut one, "COMMIT").await;
    // A portal called as the server is told to refuse.
    let mut out = parse(b"", "INSERT INTO h VALUES (11)");
    frontend::bind_text(&mut out, b"holdfast_refused_1_", b"", &[]);
    frontend::execute(&mut out, b"holdfast_refused_1_", 0);
    assert_eq!(batch(&mut one, out).await, "1[25006]I");
    // A transaction that ends in a batch, and what would come in the next.
    let mut out = parse(b"", "COMMIT");
    out.extend(execute(b""));
    out.extend(parse(b"", "SELECT 1"));
    out.extend(execute(b""));
    let answer = batch(&mut one, out).await;
    assert!(answer.ends_with("[25006]I"), "{answer}");
    // A PREPARE that fails is not believed.
    let long = format!("DELETE FROM h /* {} */", "x".repeat(20_000));
    assert_eq!(batch(&mut one, parse(b"p", &long)).await, "1I");
    assert!(one.query("PREPARE p AS SELECT 1").await.is_err());
    refused(&mut one, "EXECUTE p").await;
    // Nor is one that may be two, by a setting.
    let mut other = installation.connect().await;
    run(&mut other, r"PREPARE either AS SELECT '\\'").await;
    refused(&mut other, "EXECUTE either").await;
    assert_eq!(value(&mut one, "SELECT count(*) FROM h").await, "1");
    for sql in [
        "SELECT count(*) FROM pg_stat_activity",
        "SELECT count(*) FROM pg_settings",
        "SELECT count(*) FROM pg_stat_replication",
        "SELECT count(*) FROM information_schema.columns",
        "SELECT count(*) FROM pg_indexes",
        "SELECT count(*) FROM pg_locks",
    ] {
        run(&mut one, sql).await;
    }
    // What needs no transaction of its own is ended if it lifts the fence all the same.
    holdfast(&installation, &["unfence", "shop", "a"]);
    run(&mut one, "INSERT INTO h VALUES (12)").await;
}

/// What our grammar cannot read the server may well execute; and a name may stand for another statement by the time it is used.
#[tokio::test]
async fn nothing_passes_a_fence_by_being_unreadable() {
    let installation = Installation::start("cells-unreadable");
    let mut one = installation.connect().await;
    run(&mut one, "CREATE TABLE t (n int)").await;
    batch(&mut one, parse(b"s", "SELECT 1")).await;
    batch(&mut one, parse(b"kept", "SELECT 2")).await;
    let mut gone = installation.connect().await;
    batch(&mut gone, parse(b"s", "SELECT 1")).await;
    run(&mut gone, "PREPARE z AS SELECT 1; DEALLOCATE z").await;
    holdfast(&installation, &["fence", "shop", "a", "--deadline", "10s"]);
    // As a string it is one literal, and as two it is a transaction of its own; only the second is too deep for us.
    let deep = "1+".repeat(20_000);
    let text = format!(
        r"SELECT '\'; COMMIT; BEGIN READ WRITE; INSERT INTO t VALUES (1); COMMIT; SELECT {deep}1 --'"
    );
    refused(&mut one, &text).await;
    assert_eq!(batch(&mut one, execute(b"kept")).await, "2DCI");
    // The same name, given anew in the batch in which it is used.
    let mut out = parse(b"", "DEALLOCATE s");
    out.extend(execute(b""));
    out.extend(parse(b"", "PREPARE s AS INSERT INTO t VALUES (2)"));
    out.extend(execute(b""));
    out.extend(execute(b"s"));
    let answer = batch(&mut one, out).await;
    assert!(answer.ends_with("[25006]I"), "{answer}");
    // Of a name that SQL may have given anew nothing is known; all else goes on, and above all the end of a transaction.
    run(&mut gone, "BEGIN").await;
    let answer = batch(&mut gone, execute(b"s")).await;
    assert!(answer.ends_with("[25006]E"), "{answer}");
    run(&mut gone, "ROLLBACK").await;
    assert_eq!(value(&mut gone, "SELECT 3").await, "3");
    holdfast(&installation, &["unfence", "shop", "a"]);
    assert_eq!(value(&mut one, "SELECT count(*) FROM t").await, "0");
}

/// A rule holds for whatever a command does, whatever a name stands for, whichever way it was given.
/// What is defined while rules hold counts after a moment, and code counts wherever it is called from.
#[tokio::test]
async fn code_is_found_behind_types_operators_and_policies() {
    const NO_CODE: &str = "\n[app.policy]\nversion = 2\n\n[[app.policy.rule]]\nname = \"reads\"\n\
        classes = [\"write\", \"code\"]\nroles = [\"app\"]\ndisposition = \"refuse\"\n";
    let mut installation = Installation::start("cells-code");
    let mut admin = installation.connect().await;
    let set_up = "CREATE ROLE app LOGIN; CREATE TABLE log (n int); CREATE TABLE t (n int); INSERT INTO t VALUES (1); \
        GRANT ALL ON log, t TO app; CREATE EXTENSION tablefunc; CREATE EXTENSION xml2; \
        CREATE FUNCTION writes(int) RETURNS bool LANGUAGE sql AS 'INSERT INTO log VALUES ($1); SELECT true'";
    run(&mut admin, set_up).await;
    installation.reconfigure(|text| {
        text.replacen("\n[[app.cell]]", &format!("{NO_CODE}\n[[app.cell]]"), 1)
    });
    let mut app = connect(installation.facts.port, "app", None).await.unwrap();
    run(&mut app, "SELECT n FROM t").await;
    let mut admin = installation.connect().await;
    for sql in [
        "CREATE DOMAIN d1 AS int CHECK (writes(VALUE))",
        "CREATE DOMAIN d2 AS d1",
        "CREATE TYPE comp AS (n d2)",
        "CREATE TYPE my AS (n int)",
        "CREATE FUNCTION my_ge(my, my) RETURNS bool LANGUAGE sql AS 'INSERT INTO log VALUES (2); SELECT true'",
        "CREATE OPERATOR >= (LEFTARG = my, RIGHTARG = my, FUNCTION = my_ge)",
        "CREATE TABLE m (v my)",
        "INSERT INTO m VALUES (ROW(1))",
        "CREATE TABLE rls (n int)",
        "INSERT INTO rls VALUES (1)",
        "ALTER TABLE rls ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY p ON rls USING (writes(n))",
        "GRANT ALL ON m, rls TO app",
        "CREATE VIEW seems AS SELECT n, writes(3) FROM t",
        "GRANT ALL ON seems TO app",
    ] {
        run(&mut admin, sql).await;
    }
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while app.query("SELECT * FROM seems").await.is_ok() {
        assert!(std::time::Instant::now() < deadline);
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let count = "SELECT count(*) FROM log";
    let before = value(&mut admin, count).await;
    for sql in [
        "SELECT * FROM seems",
        "SELECT 1::d1",
        "SELECT 1::d2",
        "SELECT '{1}'::_d1",
        "SELECT '{1}'::d2[]",
        "SELECT '(1)'::comp",
        "SELECT json_populate_record(NULL::comp, '{\"n\":1}')",
        "SELECT * FROM jsonb_to_recordset('[{\"a\":1}]') AS x (a d2)",
        "SELECT v BETWEEN ROW(1)::my AND ROW(2)::my FROM m",
        "SELECT v >= v FROM m",
        "SELECT * FROM rls",
        "SELECT * FROM crosstab('SELECT n::text, writes(4)::text, n::text FROM t') AS ct (a text, b text)",
        "SELECT * FROM xpath_table('n', 'n::text', 't; INSERT INTO log VALUES (5); SELECT n, n::text FROM t', '/', 'true') AS x (n int)",
    ] {
        app.query(sql).await.map(drop).expect_err(sql);
        assert_eq!(value(&mut admin, count).await, before, "{sql}");
    }
    run(&mut app, "SELECT CASE n WHEN 1 THEN 2 END FROM t JOIN t u USING (n)").await;
}

#[tokio::test]
async fn no_rule_is_passed_by_a_name_or_by_another_command() {
    const NO_WRITES: &str = "\n[app.policy]\nversion = 2\n\n[[app.policy.rule]]\nname = \"reads\"\n\
        classes = [\"write\", \"code\"]\nroles = [\"app\"]\ndisposition = \"refuse\"\n";
    for pool in [None, Some(2)] {
        let mut installation = match pool {
            None => Installation::start("cells-names"),
            Some(size) => Installation::start_pooled("cells-names-pool", size),
        };
        let mut admin = installation.connect().await;
        let set_up = "CREATE ROLE app LOGIN; CREATE TABLE t (n int); INSERT INTO t VALUES (1); \
            GRANT ALL ON t TO app; GRANT CREATE ON SCHEMA public TO PUBLIC; \
            CREATE FUNCTION json_value(int, int) RETURNS int LANGUAGE sql AS 'DELETE FROM t RETURNING n'; \
            CREATE FUNCTION merge_action() RETURNS int LANGUAGE sql AS 'DELETE FROM t RETURNING n'";
        run(&mut admin, set_up).await;
        installation.reconfigure(|text| {
            text.replacen("\n[[app.cell]]", &format!("{NO_WRITES}\n[[app.cell]]"), 1)
        });
        let app = async || connect(installation.facts.port, "app", None).await.unwrap();
        let mut admin = installation.connect().await;
        let several = |all: &[&str]| {
            let mut out = Vec::new();
            all.iter().for_each(|sql| frontend::query(&mut out, sql.as_bytes()));
            out
        };
        // In one batch of messages, before anything is known of what the first ones have done.
        for (first, then) in [
            (
                parse(b"x", "SELECT 1"),
                several(&["DEALLOCATE x", "PREPARE x AS DELETE FROM t", "EXECUTE x"]),
            ),
            (
                parse(b"x", "SELECT 1"),
                several(&[
                    "DEALLOCATE x",
                    "PREPARE x AS DELETE FROM t",
                    "EXPLAIN ANALYZE EXECUTE x",
                ]),
            ),
        ] {
            let mut session = app().await;
            batch(&mut session, first).await;
            session.send(&then).await.unwrap();
            let (mut ready, mut refusals) = (0, 0);
            while ready < 3 {
                match session.receive().await.unwrap().view().unwrap() {
                    Backend::Error(_) => refusals += 1,
                    Backend::Ready(_) => ready += 1,
                    _ => (),
                }
            }
            assert!(refusals > 0);
            assert_eq!(value(&mut admin, "SELECT count(*) FROM t").await, "1", "{pool:?}");
        }
        let mut session = app().await;
        for sql in [
            "CREATE TEMP TABLE z AS WITH d AS (DELETE FROM t RETURNING n) SELECT * FROM d",
            "WITH d AS (DELETE FROM t RETURNING n) SELECT * INTO TEMP z FROM d",
            "EXPLAIN ANALYZE CREATE TEMP TABLE z AS WITH d AS (DELETE FROM t RETURNING n) SELECT * FROM d",
            "PREPARE w AS WITH d AS (DELETE FROM t RETURNING n) SELECT * FROM d; CREATE TEMP TABLE z AS EXECUTE w",
            "SELECT json_value(1, 2)",
            "SELECT merge_action()",
        ] {
            session.query(sql).await.map(drop).expect_err(sql);
            let _ = session.query("ROLLBACK").await;
            assert_eq!(value(&mut admin, "SELECT count(*) FROM t").await, "1", "{sql}");
        }
        run(&mut session, "CREATE TEMP TABLE harmless AS SELECT 1 AS n").await;
        if pool.is_none() {
            continue;
        }
        // The server has a name of ours for what a client has prepared, which anybody can read and give anew.
        batch(&mut session, parse(b"mine", "SELECT 1")).await;
        batch(&mut session, execute(b"mine")).await;
        let ours = "SELECT name FROM pg_prepared_statements WHERE statement = 'SELECT 1'";
        let ours = value(&mut session, ours).await;
        assert!(ours.starts_with("holdfast_"), "{ours}");
        let mut out = several(&[
            &format!("DEALLOCATE \"{ours}\""),
            &format!("PREPARE \"{ours}\" AS DELETE FROM t"),
        ]);
        out.extend(sync(execute(b"mine")));
        session.send(&out).await.unwrap();
        let mut ready = 0;
        while ready < 3 {
            ready += u8::from(matches!(
                session.receive().await.unwrap().view().unwrap(),
                Backend::Ready(_)
            ));
        }
        assert_eq!(value(&mut admin, "SELECT count(*) FROM t").await, "1", "in one batch");
        batch(&mut session, execute(b"mine")).await;
        assert_eq!(value(&mut admin, "SELECT count(*) FROM t").await, "1", "later");
    }
}

/// A transaction that has failed is at a safe point, and outlives a fence: what follows it goes by the fence, whatever rules
/// are taken up.
#[tokio::test]
async fn rules_that_are_taken_up_lift_no_fence() {
    let installation = Installation::start("cells-reload");
    let mut client = installation.connect().await;
    run(&mut client, "CREATE TABLE t (n int); INSERT INTO t VALUES (1)").await;
    run(&mut client, "BEGIN").await;
    client.query("SELECT 1 / 0").await.unwrap_err();
    holdfast(&installation, &["fence", "shop", "a"]);
    let text = std::fs::read_to_string(installation.config()).unwrap();
    let rule = "[app.policy]\nversion = 2\n\n[[app.policy.rule]]\nname = \"reads\"\nstates = [\"fenced\"]\n\
        classes = [\"read\"]\ndisposition = \"accept\"\n\n[[app.cell]]";
    std::fs::write(installation.config(), text.replacen("[[app.cell]]", rule, 1)).unwrap();
    holdfast(&installation, &["apply"]);
    refused(&mut client, "ROLLBACK; BEGIN READ WRITE; INSERT INTO t VALUES (2); COMMIT").await;
    run(&mut client, "ROLLBACK").await;
    refused(&mut client, "INSERT INTO t VALUES (2)").await;
    assert_eq!(value(&mut client, "SELECT count(*) FROM t").await, "1");
}

/// Once nobody writes there any more, reads go on at the old cell for as long as somebody wants; then it hands over.
#[tokio::test]
async fn a_fenced_cell_hands_over_to_another() {
    for pool in [None, Some(4)] {
        let installation = match pool {
            None => Installation::start("cells-residual"),
            Some(size) => Installation::start_pooled("cells-residual-pool", size),
        };
        let roles = "CREATE ROLE app LOGIN; CREATE ROLE reader LOGIN; \
            ALTER ROLE reader SET default_transaction_read_only = on";
        run(&mut installation.direct("a").await, roles).await;
        let mut client = installation.connect().await;
        run(&mut client, "CREATE TABLE t (n int); INSERT INTO t VALUES (1)").await;
        run(&mut client, "SET work_mem = '7MB'").await;
        if pool.is_none() {
            run(&mut client, "CREATE TEMP TABLE kept AS SELECT 42 AS n").await;
        }
        // Those that only read by themselves go on doing so.
        let mut readers = Vec::new();
        let port = installation.facts.port;
        readers.push(connect(port, "reader", None).await.unwrap());
        let tls = tls::ClientTls::load(tls::SslMode::Disable, None, None).unwrap();
        let own = [("default_transaction_read_only", "on")];
        readers.push(login(port, "postgres", None, tls, &own).await.unwrap());
        readers.push(installation.connect().await);
        let only_reads = "SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY";
        run(&mut readers[2], only_reads).await;
        for reader in &mut readers {
            run(reader, "SET work_mem = '8MB'").await;
        }
        // Whoever is not the administrator cannot log in while it hands over.
        let mut app = connect(port, "app", None).await.unwrap();
        run(&mut app, "CREATE TEMP TABLE own AS SELECT 43 AS n").await;
        run(&mut app, "PREPARE q AS SELECT n FROM own").await;
        // By then one that shares servers stands on none.
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
        holdfast(&installation, &["fence", "shop", "a"]);
        let mut busy = installation.connect().await;
        run(&mut busy, "BEGIN; SELECT n FROM t").await;
        readers.push(installation.connect().await);
        run(&mut readers[3], only_reads).await;
        let mut late = connect(port, "reader", None).await.unwrap();
        run(&mut late, "SET work_mem = '8MB'").await;
        readers.push(late);
        // Given up, it is as it was.
        let args = ["switchover", "shop", "--to", "b", "--deadline", "300ms"];
        let text = not_done(&installation, &args);
        assert!(text.contains("aborted"), "{text}");
        for session in [&mut client, &mut installation.connect().await] {
            refused(session, "INSERT INTO t VALUES (2)").await;
            assert_eq!(value(session, "SHOW default_transaction_read_only").await, "on");
            assert_eq!(value(session, "SELECT count(*) FROM t").await, "1");
        }
        run(&mut busy, "COMMIT").await;
        for (to, rows) in [("b", "2"), ("a", "3")] {
            let text = holdfast(&installation, &["switchover", "shop", "--to", to]);
            assert!(text.contains("8 of 8 sessions moved"), "{text}");
            assert_eq!(installation.active(), to);
            assert_eq!(value(&mut app, "EXECUTE q").await, "43");
            for session in [&mut client, &mut busy] {
                assert_eq!(value(session, "SHOW default_transaction_read_only").await, "off");
            }
            for (which, reader) in readers.iter_mut().enumerate() {
                let shown = value(reader, "SHOW default_transaction_read_only").await;
                assert_eq!(shown, "on", "{which}, {pool:?}");
                assert!(
                    reader.query("INSERT INTO t VALUES (3)").await.is_err(),
                    "{which}, {pool:?}"
                );
            }
            run(&mut client, "INSERT INTO t VALUES (2)").await;
            assert_eq!(value(&mut client, "SHOW work_mem").await, "7MB");
            if pool.is_none() {
                assert_eq!(value(&mut client, "SELECT n FROM kept").await, "42");
            }
            // Nobody has lifted a fence by that.
            holdfast(&installation, &["fence", "shop", to]);
            refused(&mut client, "INSERT INTO t VALUES (2)").await;
            assert_eq!(value(&mut busy, "SELECT count(*) FROM t").await, rows);
        }
    }
}

/// A connection for replication runs SQL like any other, and a subscription writes whatever the server says of transactions.
#[tokio::test]
async fn what_replicates_writes_nothing_past_a_fence() {
    let installation = Installation::start("cells-replication");
    let set_up =
        "CREATE ROLE streams LOGIN REPLICATION; CREATE TABLE t (n int); GRANT ALL ON t TO streams";
    run(&mut installation.connect().await, set_up).await;
    let tls = tls::ClientTls::load(tls::SslMode::Disable, None, None).unwrap();
    let port = installation.facts.servers["a"];
    let sql = [("replication", "database")];
    let mut outsider = login(port, "streams", None, tls, &sql).await.unwrap();
    run(&mut outsider, "BEGIN").await;
    run(&mut outsider, "INSERT INTO t VALUES (1)").await;
    installation.switch_to("b");
    outsider.query("COMMIT").await.map(drop).expect_err("its transaction is over");
    assert_eq!(value(&mut installation.connect().await, "SELECT count(*) FROM t").await, "0");
    let subscribe = "CREATE SUBSCRIPTION takes CONNECTION 'host=127.0.0.1 port=1' PUBLICATION p \
        WITH (connect = false, slot_name = 'takes')";
    run(&mut installation.connect().await, subscribe).await;
    run(&mut installation.connect().await, "ALTER SUBSCRIPTION takes ENABLE").await;
    for verb in [["switchover", "shop", "--to", "a"].as_slice(), &["fence", "shop", "b"]] {
        let output = installation.holdfast(verb);
        let text = shown(&output);
        assert!(
            !output.status.success() && text.contains("ALTER SUBSCRIPTION takes DISABLE"),
            "{text}"
        );
    }
    run(&mut installation.connect().await, "ALTER SUBSCRIPTION takes DISABLE").await;
    installation.switch_to("a");
}
