//! What cannot be carried pins: the switchover is given up with a reason, and the session is as it was. By force
//! it is told.

use wire::frontend;
use wire::sqlstate::SqlState;

use crate::support::{
    Installation, connect, extended, last_words, other_bin_dir, run, shown, value,
};

/// How a session is pinned, a word of the reason, and a look that must work as before after a switchover that
/// was given up.
pub(crate) const PINNED: &[(&str, &str, &str)] = &[
    (
        "CREATE TEMP TABLE mine AS SELECT 7 AS n; CREATE TEMP TABLE heir () INHERITS (mine)",
        "pg_temp.heir inherits",
        "SELECT n FROM mine",
    ),
    (
        "CREATE TEMP TABLE mine AS SELECT 7 AS n; ALTER TABLE mine ENABLE ROW LEVEL SECURITY",
        "pg_temp.mine has row security",
        "SELECT n FROM mine",
    ),
    (
        "CREATE TYPE pg_temp.kind AS ENUM ('x'); CREATE FUNCTION of_temp(pg_temp.kind) RETURNS int LANGUAGE sql AS 'SELECT 1'",
        "function public.of_temp(kind) depends on a temporary object",
        "SELECT of_temp('x')",
    ),
    ("DECLARE c BINARY CURSOR WITH HOLD FOR SELECT 7", "its rows come in binary", "FETCH c"),
    ("DECLARE c CURSOR WITH HOLD FOR SELECT ROW(7, 'x')", "a column of type `record`", "FETCH c"),
    (
        "DECLARE c NO SCROLL CURSOR WITH HOLD FOR SELECT ROW(7, 'x') UNION ALL SELECT ROW(8, 'y')",
        "a column of type `record`",
        "FETCH c",
    ),
    (
        "CREATE COLLATION pg_temp.mine FROM \"C\"",
        "is in the temporary schema",
        "SELECT 'a' COLLATE pg_temp.mine",
    ),
    (
        "CREATE OPERATOR pg_temp.||| (LEFTARG = int, RIGHTARG = int, FUNCTION = int4pl)",
        "is in the temporary schema",
        "SELECT 1 OPERATOR(pg_temp.|||) 2",
    ),
    (
        "CREATE TEXT SEARCH CONFIGURATION pg_temp.mine (COPY = english)",
        "is in the temporary schema",
        "SELECT to_tsvector('pg_temp.mine', 'cats')",
    ),
    (
        "PREPARE p AS SELECT count(*) FROM counted; CREATE TEMP TABLE counted (n int)",
        "names `counted`, which is temporary and permanent",
        "EXECUTE p",
    ),
    ("PREPARE p AS SELECT $$now$$::timestamptz", "the time at which it was prepared", "EXECUTE p"),
    (
        "PREPARE p AS SELECT '01/02/2024'::date; BEGIN; CREATE TEMP TABLE x () ON COMMIT DROP; COMMIT",
        "a literal like a date",
        "EXECUTE p",
    ),
    ("SELECT setseed(0.5)", "random seed", "SELECT 1"),
    ("LOAD 'dict_snowball'", "LOAD", "SELECT 1"),
    ("DO $$BEGIN EXECUTE format('load %L', 'auto_explain'); END$$", "LOAD", "SELECT 1"),
    (
        "PREPARE p AS SELECT 6; DEALLOCATE p; PREPARE p AS SELECT 7",
        "together with others of its name",
        "EXECUTE p",
    ),
    (
        "SELECT set_config('app.' || 'x', '7', false)",
        "computes the name/bytes of custom settings",
        "SELECT current_setting('app.x')",
    ),
    (
        "PREPARE gone AS SELECT * FROM dropped; DROP TABLE dropped",
        "`gone` cannot be prepared again",
        "SELECT 1",
    ),
    ("SET seq_page_cost = 1.23456789", "six digits at most", "SELECT 1"),
    ("PREPARE p AS SELECT 'now'::timestamptz", "the time at which it was prepared", "EXECUTE p"),
    ("SELECT pg_backup_start('x', true)", "backup", "SELECT 1"),
];

/// Whether one of the words, with `/` between them, is in a text.
pub(crate) fn is_reason(text: &str, words: &str) -> bool {
    words.split('/').any(|words| text.contains(words))
}

pub(crate) async fn set_up(installation: &Installation) {
    let sql = "CREATE SEQUENCE s; CREATE TABLE counted (n serial); CREATE TABLE dropped (n int);";
    run(&mut installation.connect().await, sql).await;
}

#[tokio::test]
async fn each_kind_of_pin_stops_the_switchover_and_leaves_the_session_as_it_was() {
    let installation = Installation::start("pins");
    set_up(&installation).await;
    for (sql, reason, look) in PINNED {
        let mut session = installation.connect().await;
        run(&mut session, sql).await;
        let output =
            installation.holdfast(&["switchover", "shop", "--to", "b", "--deadline", "2s"]);
        let text = shown(&output);
        assert_eq!(output.status.code(), Some(1), "{sql}: {text}");
        assert!(is_reason(&text, reason), "{sql}: {text}");
        run(&mut session, look).await;
        assert_eq!(value(&mut session, "SELECT pg_is_in_recovery()").await, "f");
    }
    let status = shown(&installation.holdfast(&["status", "shop"]));
    assert!(status.contains("active cell a, epoch 1"), "{status}");
    // With every pinned session gone, nothing is in the way.
    installation.switch_to("b");
}

#[tokio::test]
async fn a_pinned_session_is_told_by_force_and_the_others_move() {
    let installation = Installation::start("forced");
    set_up(&installation).await;
    let mut free = installation.connect().await;
    let mut pinned = installation.connect().await;
    run(&mut free, "SET work_mem = '5MB'").await;
    run(&mut pinned, "CREATE COLLATION pg_temp.mine FROM \"C\"").await;
    let output =
        installation.holdfast(&["switchover", "shop", "--to", "b", "--on-timeout", "force"]);
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(value(&mut free, "SHOW work_mem").await, "5MB");
    let told = last_words(&mut pinned).await;
    assert_eq!(told.0, Some(SqlState::ADMIN_SHUTDOWN));
    assert!(told.1.contains("collation pg_temp.mine is in the temporary schema"), "{}", told.1);
}

/// Both a held session and its copy wait longer than they may be idle, whether the switch comes about or not.
#[tokio::test]
async fn a_session_outlives_its_idle_timeout_while_it_is_held() {
    let installation = Installation::start("idle-timeout");
    let mut busy = installation.connect().await;
    run(&mut busy, "CREATE ROLE hasty LOGIN; ALTER ROLE hasty SET idle_session_timeout = '1500ms'")
        .await;
    let mut session = installation.connect().await;
    run(&mut session, "SET idle_session_timeout = '1600ms'").await;
    let mut of_role = connect(installation.facts.port, "hasty", None).await.unwrap();
    for deadline in ["4s", "20s"] {
        run(&mut busy, "BEGIN; SELECT 1").await;
        let args = ["switchover", "shop", "--to", "b", "--deadline", deadline];
        let switch = installation.holdfast_in_background(&args);
        if deadline == "20s" {
            tokio::time::sleep(std::time::Duration::from_millis(4500)).await;
            run(&mut busy, "COMMIT").await;
        }
        let output = switch.await.unwrap();
        assert_eq!(output.status.success(), deadline == "20s", "{}", shown(&output));
        assert_eq!(value(&mut session, "SHOW idle_session_timeout").await, "1600ms", "{deadline}");
        assert_eq!(value(&mut of_role, "SHOW idle_session_timeout").await, "1500ms", "{deadline}");
        run(&mut of_role, "RESET idle_session_timeout").await;
        assert_eq!(value(&mut of_role, "SHOW idle_session_timeout").await, "1500ms", "{deadline}");
        if deadline == "4s" {
            run(&mut busy, "COMMIT").await;
            run(&mut session, "SELECT 1").await;
            run(&mut of_role, "SELECT 1").await;
        }
    }
}

/// A cursor that has failed before gives nothing, here or elsewhere, and its session lives.
#[tokio::test]
async fn a_cursor_that_has_failed_pins() {
    let installation = Installation::start("dead-cursor");
    let mut session = installation.connect().await;
    run(&mut session, "DECLARE c NO SCROLL CURSOR WITH HOLD FOR SELECT 1").await;
    assert!(session.query("FETCH PRIOR FROM c").await.is_err());
    let output = installation.holdfast(&["move", "shop", "--all", "--to", "a"]);
    assert!(shown(&output).contains("cannot be run"), "{}", shown(&output));
    assert!(session.query("FETCH c").await.is_err());
    run(&mut session, "CLOSE c; SET idle_in_transaction_session_timeout = '5ms'").await;
    run(
        &mut session,
        "DECLARE d SCROLL CURSOR WITH HOLD FOR SELECT g FROM generate_series(1, 5000) g",
    )
    .await;
    let output = installation.holdfast(&["move", "shop", "--all", "--to", "a"]);
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(value(&mut session, "FETCH LAST FROM d").await, "5000");
}

#[tokio::test]
async fn a_statement_that_cannot_be_prepared_again_pins() {
    let installation = Installation::start("broken");
    set_up(&installation).await;
    let mut session = installation.connect().await;
    let mut out = Vec::new();
    frontend::parse(&mut out, b"broken", b"SELECT * FROM dropped", &[]);
    frontend::sync(&mut out);
    extended(&mut session, &out).await;
    run(&mut session, "DROP TABLE dropped").await;
    let output = installation.holdfast(&["switchover", "shop", "--to", "b"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(shown(&output).contains("`broken` cannot be prepared again"), "{}", shown(&output));
}

/// Custom settings that functions, views and policies set under names that cannot be known: each pins whoever is in
/// the database.
#[tokio::test]
async fn code_that_computes_the_name_of_a_setting_pins() {
    let installation = Installation::start("computes");
    let mut session = installation.connect().await;
    let mut other = installation.direct("a").await;
    for (make, drop) in [
        (
            "CREATE FUNCTION f(k text) RETURNS text LANGUAGE sql AS 'SELECT set_config(''app.'' || k, ''1'', false)'",
            "DROP FUNCTION f",
        ),
        (
            "CREATE FUNCTION f(k text) RETURNS text BEGIN ATOMIC SELECT set_config('app.' || k, '1', false); END",
            "DROP FUNCTION f",
        ),
        (
            "CREATE FUNCTION f(k text) RETURNS void LANGUAGE plpgsql AS \
             'BEGIN EXECUTE format(''SET app.%I = 1'', k); END'",
            "DROP FUNCTION f",
        ),
        ("CREATE VIEW v AS SELECT set_config('app.x', '1', false)", "DROP VIEW v"),
    ] {
        run(&mut other, make).await;
        let output = installation.holdfast(&["move", "shop", "--all", "--to", "a"]);
        if other_bin_dir().is_some() {
            // The memory of settings shows that it was not called.
            assert!(output.status.success(), "{make}: {}", shown(&output));
        } else {
            assert_eq!(output.status.code(), Some(1), "{make}: {}", shown(&output));
            assert!(shown(&output).contains("computes the name"), "{make}: {}", shown(&output));
        }
        run(&mut other, drop).await;
    }
    // What can be known is carried, wherever it stands.
    let sql = "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS \
        'BEGIN SET a.b.c = 7; PERFORM set_config(''app.x''::text, ''8'', false); END'";
    run(&mut other, sql).await;
    run(&mut session, "SELECT f()").await;
    installation.switch_to("b");
    let look = "SELECT current_setting('a.b.c') || current_setting('app.x')";
    assert_eq!(value(&mut session, look).await, "78");
}

/// The server reads a literal when it prepares the statement, under the settings of then.
#[tokio::test]
async fn a_statement_prepared_under_another_date_style_pins() {
    let installation = Installation::start("restyled");
    let mut session = installation.connect().await;
    run(&mut session, "SET DateStyle = 'ISO, DMY'").await;
    run(&mut session, "PREPARE p AS SELECT '01/02/2024'::date").await;
    run(&mut session, "SET DateStyle = 'ISO, MDY'").await;
    let output = installation.holdfast(&["switchover", "shop", "--to", "b"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(shown(&output).contains("prepared under another DateStyle"), "{}", shown(&output));
    assert_eq!(value(&mut session, "EXECUTE p").await, "2024-02-01");
    run(&mut session, "DEALLOCATE ALL").await;
    run(&mut session, "PREPARE p AS SELECT '01/02/2024'::date").await;
    installation.switch_to("b");
    assert_eq!(value(&mut session, "EXECUTE p").await, "2024-01-02");
}

/// Somebody keeps a sequence locked. A look at the sessions waits for a moment, says so and harms nobody.
#[tokio::test]
async fn a_locked_sequence_keeps_a_session_busy_and_alive() {
    let installation = Installation::start("locked-sequence");
    let mut session = installation.connect().await;
    run(&mut session, "CREATE TABLE a (n serial); CREATE TABLE b (n serial)").await;
    run(&mut session, "INSERT INTO a DEFAULT VALUES").await;
    let mut other = installation.direct("a").await;
    run(&mut other, "BEGIN; TRUNCATE b RESTART IDENTITY").await;
    let text = shown(&installation.holdfast(&["sessions", "shop", "--pinned"]));
    assert!(text.contains("lock timeout"), "{text}");
    assert_eq!(value(&mut session, "SELECT lastval()").await, "1");
    run(&mut other, "COMMIT; BEGIN; SELECT nextval('a_n_seq'); PREPARE TRANSACTION 'x'").await;
    let output = installation.holdfast(&["switchover", "shop", "--to", "b"]);
    assert!(shown(&output).contains("prepared transaction `x` may hold"), "{}", shown(&output));
    run(&mut other, "ROLLBACK PREPARED 'x'").await;
    installation.switch_to("b");
    assert_eq!(value(&mut session, "SELECT lastval()").await, "1");
}

#[tokio::test]
async fn a_value_of_somebody_elses_sequence_pins() {
    let installation = Installation::start("not-owner");
    set_up(&installation).await;
    let sql = "CREATE ROLE guest LOGIN; GRANT USAGE ON SEQUENCE s TO guest";
    run(&mut installation.connect().await, sql).await;
    let mut guest = connect(installation.facts.port, "guest", None).await.unwrap();
    run(&mut guest, "SELECT nextval('s')").await;
    let output = installation.holdfast(&["switchover", "shop", "--to", "b"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(shown(&output).contains("takes the owner of `public.s`"), "{}", shown(&output));
    assert_eq!(value(&mut guest, "SELECT currval('s')").await, "1");
    run(&mut guest, "DISCARD SEQUENCES").await;
    installation.switch_to("b");
}

#[tokio::test]
async fn an_event_trigger_keeps_values_of_sequences_where_they_are() {
    let installation = Installation::start("event-trigger");
    let mut session = installation.connect().await;
    run(
        &mut session,
        "CREATE SEQUENCE s; SELECT nextval('s'); \
         CREATE FUNCTION seen() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''no''; END'; \
         CREATE EVENT TRIGGER audit ON ddl_command_end EXECUTE FUNCTION seen()",
    )
    .await;
    let output = installation.holdfast(&["switchover", "shop", "--to", "b"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(shown(&output).contains("event trigger `audit` would run"), "{}", shown(&output));
    assert_eq!(value(&mut session, "SELECT lastval()").await, "1");
}

/// Bytes that are no UTF-8, in a statement of either protocol: the server reads none of it and keeps the unnamed
/// statement that it has, whose text Holdfast has let go of.
#[tokio::test]
async fn an_unnamed_statement_that_outlived_an_unreadable_one_pins() {
    let installation = Installation::start("unreadable");
    let mut session = installation.connect().await;
    let mut out = Vec::new();
    frontend::parse(&mut out, b"", b"SELECT 'first'", &[]);
    frontend::sync(&mut out);
    extended(&mut session, &out).await;
    let mut out = Vec::new();
    frontend::parse(&mut out, b"", b"SELECT '\xff'", &[]);
    frontend::sync(&mut out);
    session.send(&out).await.unwrap();
    assert!(session.answers().await.is_err());
    let output = installation.holdfast(&["switchover", "shop", "--to", "b"]);
    assert_eq!(output.status.code(), Some(1), "{}", shown(&output));
    assert!(shown(&output).contains("unnamed statement"), "{}", shown(&output));
    // It is the first one that the server still has.
    let mut out = Vec::new();
    frontend::bind_text(&mut out, b"", b"", &[]);
    frontend::execute(&mut out, b"", 0);
    frontend::sync(&mut out);
    assert_eq!(extended(&mut session, &out).await, [Some("first".into())]);
}

#[tokio::test]
async fn an_unnamed_statement_that_was_skipped_pins() {
    let installation = Installation::start("unnamed");
    let mut session = installation.connect().await;
    let mut out = Vec::new();
    // The second Parse is skipped after the error, so the server keeps the first, whose text is gone.
    frontend::parse(&mut out, b"", b"SELECT 'first'", &[]);
    frontend::bind_text(&mut out, b"", b"missing", &[]);
    frontend::parse(&mut out, b"", b"SELECT 'second'", &[]);
    frontend::sync(&mut out);
    session.send(&out).await.unwrap();
    assert!(session.answers().await.is_err());
    let output = installation.holdfast(&["switchover", "shop", "--to", "b"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(shown(&output).contains("unnamed statement"), "{}", shown(&output));
}
