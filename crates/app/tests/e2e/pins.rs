//! What cannot be carried pins: the switchover is given up with a reason, and the session is as it was. By force
//! it is told.

use pg::Connection;
use wire::frontend;
use wire::sqlstate::SqlState;

use crate::support::{Installation, extended, run, shown, value};

/// How a session is pinned, a word of the reason, and a look that must work as before after a switchover that
/// was given up.
const PINNED: &[(&str, &str, &str)] = &[
    ("CREATE TEMP TABLE mine AS SELECT 7 AS n", "temporary objects", "SELECT n FROM mine"),
    ("CREATE TEMP VIEW v AS SELECT 7 AS n", "temporary objects", "SELECT n FROM v"),
    (
        "CREATE FUNCTION pg_temp.f() RETURNS int LANGUAGE sql AS 'SELECT 7'",
        "temporary objects",
        "SELECT pg_temp.f()",
    ),
    ("CREATE TYPE pg_temp.kind AS ENUM ('x')", "temporary objects", "SELECT 'x'::pg_temp.kind"),
    ("DECLARE c CURSOR WITH HOLD FOR SELECT 7", "WITH HOLD", "FETCH c"),
    ("SELECT nextval('s')", "currval", "SELECT currval('s') = lastval()"),
    ("INSERT INTO counted DEFAULT VALUES", "currval", "SELECT lastval() IS NOT NULL"),
    ("SELECT setseed(0.5)", "random seed", "SELECT 1"),
    ("LOAD 'plpgsql'", "LOAD", "SELECT 1"),
    ("SELECT 1; PREPARE p AS SELECT 7; SELECT 2", "together with other statements", "EXECUTE p"),
    (
        "SELECT set_config('app.' || 'x', '7', false)",
        "computes the name",
        "SELECT current_setting('app.x')",
    ),
    (
        "PREPARE gone AS SELECT * FROM dropped; DROP TABLE dropped",
        "together with other",
        "SELECT 1",
    ),
    ("SELECT pg_backup_start('x', true)", "backup", "SELECT 1"),
];

async fn set_up(installation: &Installation) {
    let sql = "CREATE SEQUENCE s; CREATE TABLE counted (n serial); CREATE TABLE dropped (n int)";
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
        assert!(text.contains(reason), "{sql}: {text}");
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
    run(&mut pinned, "CREATE TEMP TABLE mine (n int)").await;
    let output =
        installation.holdfast(&["switchover", "shop", "--to", "b", "--on-timeout", "force"]);
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(value(&mut free, "SHOW work_mem").await, "5MB");
    let told = last_words(&mut pinned).await;
    assert_eq!(told.0, Some(SqlState::ADMIN_SHUTDOWN));
    assert!(told.1.contains("temporary objects, such as `mine`"), "{}", told.1);
}

/// The error that ends a connection: its code and its detail.
async fn last_words(connection: &mut Connection) -> (Option<SqlState>, String) {
    let message = connection.receive().await.unwrap();
    match message.view().unwrap() {
        wire::backend::Backend::Error(fields) => (
            fields.sqlstate(),
            String::from_utf8_lossy(fields.field(b'D').unwrap_or_default()).into_owned(),
        ),
        other => panic!("{other:?}"),
    }
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
