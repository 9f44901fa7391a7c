#![allow(clippy::unwrap_used)]

use model::policy::Class;
use proptest::prelude::*;

use super::*;

fn classes(sql: &str) -> Vec<Class> {
    commands(sql.as_bytes(), true).unwrap().iter().map(|command| command.class).collect()
}

#[test]
fn writes_are_found_wherever_they_hide() {
    for (sql, class) in [
        ("WITH d AS (DELETE FROM t RETURNING *) SELECT * FROM d", Class::Write),
        ("SELECT * FROM (SELECT * FROM t FOR UPDATE) x", Class::RowLock),
        ("SELECT a INTO b FROM t", Class::Definition),
        ("VALUES (1) UNION (SELECT 1 FOR SHARE)", Class::RowLock),
        ("EXPLAIN ANALYZE INSERT INTO t VALUES (1)", Class::Write),
        ("EXPLAIN (ANALYZE off) UPDATE t SET a = 1", Class::Write),
        ("EXPLAIN ANALYZE EXECUTE p", Class::Execute),
        ("EXPLAIN (COSTS off) DELETE FROM t", Class::Read),
        ("COPY t FROM STDIN", Class::Write),
        ("COPY (DELETE FROM t RETURNING *) TO STDOUT", Class::Write),
        ("COPY t TO PROGRAM 'cat'", Class::Server),
        ("COPY t TO '/tmp/x'", Class::Server),
        ("COPY t TO STDOUT", Class::Read),
        ("DECLARE c CURSOR FOR SELECT 1 FOR NO KEY UPDATE", Class::RowLock),
        ("PREPARE p AS DELETE FROM t", Class::Session),
        ("EXECUTE p", Class::Execute),
        ("BEGIN READ WRITE", Class::Unfence),
        ("START TRANSACTION ISOLATION LEVEL SERIALIZABLE, READ ONLY", Class::Begin),
        ("SET TRANSACTION READ WRITE", Class::Unfence),
        ("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE", Class::Unfence),
        ("SET LOCAL Transaction_Read_Only TO 'off'", Class::Unfence),
        ("SET default_transaction_read_only = on", Class::Session),
        ("RESET default_transaction_read_only", Class::Unfence),
        ("COMMIT PREPARED 'x'", Class::TwoPhase),
        ("CREATE TABLE t AS EXECUTE p", Class::Definition),
        ("/* SELECT */ TRUNCATE t", Class::Write),
    ] {
        assert_eq!(classes(sql), [class], "{sql}");
    }
    assert_eq!(classes("SELECT 1; DELETE FROM t;;"), [Class::Read, Class::Write]);
    assert_eq!(classes(" -- nothing"), []);
    let prepares = commands(b"PREPARE p AS DELETE FROM t", true).unwrap();
    assert_eq!(prepares[0].prepares, Some([Class::Write].into()));
    assert_eq!(prepares[0].prepared.as_deref(), Some("p"));
}

/// What a command does besides what it is called.
#[test]
fn a_command_may_do_several_things() {
    use std::collections::BTreeSet;
    let all = |sql: &str| {
        let mut commands = commands(sql.as_bytes(), true).unwrap();
        commands.remove(0).own_classes()
    };
    let writes = BTreeSet::from([Class::Definition, Class::Write]);
    for sql in [
        "CREATE TEMP TABLE z AS WITH d AS (DELETE FROM t RETURNING n) SELECT * FROM d",
        "WITH d AS (DELETE FROM t RETURNING n) SELECT * INTO TEMP z FROM d",
        "EXPLAIN ANALYZE CREATE TABLE z AS WITH d AS (DELETE FROM t RETURNING n) SELECT * FROM d",
    ] {
        assert_eq!(all(sql).intersection(&writes).count(), 2, "{sql}");
    }
    assert_eq!(all("CREATE TABLE z AS SELECT 1"), BTreeSet::from([Class::Definition]));
    assert!(all("CREATE TABLE z AS SELECT 1 FROM t FOR UPDATE").contains(&Class::RowLock));
    let executes = &commands(b"EXPLAIN ANALYZE CREATE TABLE z AS EXECUTE p", true).unwrap()[0];
    assert!(executes.own_classes().contains(&Class::Execute));
    assert_eq!(executes.prepared.as_deref(), Some("p"));
    let prepares =
        &commands(b"PREPARE p AS WITH d AS (DELETE FROM t) SELECT 1 FROM u FOR UPDATE", true)
            .unwrap()[0];
    assert_eq!(prepares.class, Class::Session);
    assert!(prepares.also.is_empty());
    let both = prepares.prepares.as_ref().unwrap();
    assert!(both.contains(&Class::Write) && both.contains(&Class::RowLock), "{both:?}");
}

/// What is syntax here is a function to an earlier server.
#[test]
fn functions_of_earlier_servers_are_named() {
    for (sql, name) in [
        ("SELECT json_value('1', '$')", "json_value"),
        ("SELECT json_exists('1', '$')", "json_exists"),
        ("SELECT json_query('1', '$')", "json_query"),
        ("SELECT json_scalar(1)", "json_scalar"),
        ("SELECT json_serialize('1')", "json_serialize"),
        ("SELECT json('1')", "json"),
        ("SELECT json_object('a': 1)", "json_object"),
        ("SELECT json_array(1)", "json_array"),
        ("SELECT json_objectagg('a': 1)", "json_objectagg"),
        ("SELECT json_arrayagg(1)", "json_arrayagg"),
        ("SELECT merge_action()", "merge_action"),
    ] {
        let command = &commands(sql.as_bytes(), true).unwrap()[0];
        assert!(command.syntax.contains(name) || command.functions.contains(name), "{sql}");
    }
}

#[test]
fn what_is_called_is_named() {
    let sql = br#"SELECT lower(a), "Odd ""x".f(1) OVER (), a OPERATOR(public.<->) b FROM "My view" WHERE EXISTS
        (SELECT setval('s', 1)) ORDER BY g(h())"#;
    let command = &commands(sql, true).unwrap()[0];
    let names = |set: &std::collections::BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>();
    assert_eq!(names(&command.functions), ["f", "g", "h", "lower", "setval"]);
    assert_eq!(names(&command.operators), ["<->"]);
    assert_eq!(names(&command.relations), ["My view"]);
    let sql = br#"SELECT t.tf, (t).ug, 1::public.dm, CAST('1' AS "Pt"), 1 <!> ANY (SELECT 2), "a.b"() FROM t"#;
    let command = &commands(sql, true).unwrap()[0];
    assert_eq!(names(&command.columns), ["t", "tf", "ug"]);
    assert_eq!(names(&command.types), ["Pt", "dm"]);
    assert_eq!(names(&command.operators), ["<!>"]);
    assert_eq!(names(&command.functions), ["a.b"]);
    let fetch = &commands(b"FETCH ALL FROM \"X\"", true).unwrap()[0];
    assert_eq!(fetch.cursor.as_deref(), Some("X"));
    for (sql, operators) in [
        ("SELECT a BETWEEN b AND c FROM t", &["<=", ">=", "BETWEEN"][..]),
        ("SELECT a NOT BETWEEN SYMMETRIC b AND c FROM t", &["<", ">", "NOT BETWEEN SYMMETRIC"]),
        ("SELECT CASE a WHEN b THEN 1 END FROM t", &["="]),
        ("SELECT CASE WHEN a THEN 1 END FROM t", &[]),
        ("SELECT 1 FROM t JOIN u USING (a)", &["="]),
        ("SELECT 1 FROM t NATURAL JOIN u", &["="]),
        ("SELECT 1 FROM t CROSS JOIN u", &[]),
        ("SELECT a IN (SELECT 1) FROM t", &["="]),
        ("SELECT a IN (1, 2), NULLIF(a, b) FROM t", &["="]),
        ("SELECT a FROM t ORDER BY a USING <~", &["<~"]),
    ] {
        let command = &commands(sql.as_bytes(), true).unwrap()[0];
        assert_eq!(names(&command.operators), operators, "{sql}");
    }
}

#[test]
fn the_same_bytes_are_other_commands_under_old_strings() {
    let sql = br"SELECT 'a\'; DELETE FROM t; --'";
    let count = |conforming| commands(sql, conforming).map(|commands| commands.len());
    assert_eq!((count(true), count(false)), (Ok(2), Ok(1)));
}

#[test]
fn deep_and_long_texts_are_refused_or_read() {
    let deep = format!("SELECT {}1{}", "(".repeat(50_000), ")".repeat(50_000));
    let _ = commands(deep.as_bytes(), true);
    let chain = format!("SELECT {}1", "1 + ".repeat(2_000));
    assert_eq!(classes(&chain), [Class::Read]);
    let long = vec![b' '; TEXT_LEN_MAX + 1];
    assert_eq!(commands(&long, true), Err(GrammarError::TooLong { len: TEXT_LEN_MAX + 1 }));
    assert!(commands(b"SELECT \xff", true).is_err() || commands(b"SELECT '\xff'", true).is_ok());
    assert!(commands(b"SELECT \0", true).is_err());
}

proptest! {
    #[test]
    fn no_text_is_a_panic(sql in "(SELECT|DELETE|WITH|AS|\\(|\\)|'|\"|;|,|\\$|\\\\|[a-z]| |é){0,30}") {
        let _ = commands(sql.as_bytes(), true);
        let _ = commands(sql.as_bytes(), false);
    }
}

/// Words, quoted names and semicolons, by where they begin and end, as PostgreSQL's scanner finds them. None where it
/// refuses.
fn scanned(sql: &str) -> Option<Vec<(usize, usize)>> {
    use pg_query::protobuf::{KeywordKind, ScanToken, Token};

    let found = pg_query::scan(sql).ok()?.tokens;
    let is_name = |token: &ScanToken| {
        // The `N` of `N'...'` stands for a type.
        let is_prefix = token.token() == Token::Nchar && token.end - token.start == 1;
        let is_keyword = token.keyword_kind() != KeywordKind::NoKeyword;
        !is_prefix && (is_keyword || matches!(token.token(), Token::Ident | Token::Ascii59))
    };
    let place = |token: ScanToken| {
        Some((usize::try_from(token.start).ok()?, usize::try_from(token.end).ok()?))
    };
    found.into_iter().filter(is_name).map(place).collect()
}

/// The same by `model::sql`. None where it cannot tell.
fn tokens(sql: &str) -> Option<Vec<(usize, usize)>> {
    use model::sql::{Kind, Tokens};

    let mut found = Vec::new();
    for token in Tokens::new(sql.as_bytes()) {
        let start = token.text.as_ptr() as usize - sql.as_ptr() as usize;
        match token.kind {
            Kind::Unclear => return None,
            Kind::Word | Kind::Quoted | Kind::Semicolon => {
                found.push((start, start + token.text.len()));
            }
            _ => (),
        }
    }
    Some(found)
}

/// Pieces at which a lexer may go wrong.
const PIECES: [&str; 60] = [
    "select", "f", "E", "e", "b", "X", "n", "N", "u&", "U&", "_", "é", "$", "$a$", "$$", "$1", "1",
    "0x", "0b1", "1e", "2.", "..", ".", ":", "::", ":=", "'", "'", "''", "\"", "\"\"", "--", "/*",
    "*/", "*", "/", "\\", "\n", "\r", "\t", "\x0b", "\x0c", "\u{a0}", " ", ";", "(", ")", ",", "@",
    "-", "+", "<", ">", "=", "!", "~", "?", "%", "#", "[",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    /// Sessions that share servers are judged by `model::sql`: what it takes for a name has to be one for the server as
    /// well, and the other way round.
    #[test]
    fn our_lexer_finds_the_names_that_postgresql_finds(
        pieces in proptest::collection::vec(proptest::sample::select(&PIECES[..]), 0..16)
    ) {
        let sql = pieces.concat();
        if let (Some(ours), Some(theirs)) = (tokens(&sql), scanned(&sql)) {
            prop_assert_eq!(ours, theirs, "{:?}", sql);
        }
    }
}
