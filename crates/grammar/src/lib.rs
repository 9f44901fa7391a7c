//! PostgreSQL's own grammar: which commands a text holds, and what each of them does.
//!
//! - [`commands`]: what a text is, for the policy of cells ([`model::policy`]).
//! - `tree`: the parse tree as a flat list, without recursion, however deep it is.
//! - `classes`: what each node of the tree means.
//!
//! The grammar is that of PostgreSQL 18, which reads what 15 to 17 read as well. It is the C code of the server itself
//! (`src/backend/parser`, by `libpg_query`), with its own guard of the stack.

use std::ffi::{CStr, CString, c_char, c_int};

use model::policy::Command;
// Only its C library is called: the tree as JSON is whole, where the crate's own readers have a limit of depth or leave
// things out.
use pg_query as _;
use thiserror::Error;

mod classes;
mod tree;

/// Longest text that is read, in bytes.
pub const TEXT_LEN_MAX: usize = 1024 * 1024;

/// `PG_QUERY_DISABLE_STANDARD_CONFORMING_STRINGS` of `pg_query.h`.
const OLD_STRINGS: c_int = 32;

/// Why nothing is known of a text.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum GrammarError {
    #[error("the statement has {len} bytes, at most {TEXT_LEN_MAX} are looked at")]
    TooLong { len: usize },
    /// A server would refuse it as well, or it is of a newer grammar.
    #[error("the statement is not in PostgreSQL's grammar: {message}")]
    NotSql { message: String },
    #[error("the tree of the statement cannot be read")]
    Tree,
}

/// `PgQueryParseResult` of `pg_query.h`.
#[repr(C)]
struct ParseResult {
    tree: *mut c_char,
    stderr: *mut c_char,
    error: *mut ParseError,
}

/// `PgQueryError` of `pg_query.h`.
#[repr(C)]
struct ParseError {
    message: *mut c_char,
    function: *mut c_char,
    file: *mut c_char,
    line: c_int,
    position: c_int,
    context: *mut c_char,
}

unsafe extern "C" {
    fn pg_query_parse_opts(input: *const c_char, options: c_int) -> ParseResult;
    fn pg_query_free_parse_result(result: ParseResult);
}

/// The commands of a text, in their order. `conforming` is the session's `standard_conforming_strings`: the same bytes are
/// other commands without it.
///
/// # Errors
/// The text is too long, or no SQL.
pub fn commands(sql: &[u8], conforming: bool) -> Result<Vec<Command>, GrammarError> {
    if sql.len() > TEXT_LEN_MAX {
        return Err(GrammarError::TooLong { len: sql.len() });
    }
    let json = parse(sql, conforming)?;
    let tree = tree::Tree::read(&json).ok_or(GrammarError::Tree)?;
    classes::commands(&tree).ok_or(GrammarError::Tree)
}

/// The parse tree as JSON.
fn parse(sql: &[u8], conforming: bool) -> Result<String, GrammarError> {
    let not_sql = |message: &str| GrammarError::NotSql { message: message.into() };
    let input = CString::new(sql).map_err(|_| not_sql("it has a zero byte"))?;
    let options = if conforming { 0 } else { OLD_STRINGS };
    // SAFETY: `input` is a C string that outlives the call; the result's pointers are null or C strings of its own, read
    // before they are freed, once.
    unsafe {
        let result = pg_query_parse_opts(input.as_ptr(), options);
        let text = |pointer: *mut c_char| {
            (!pointer.is_null()).then(|| CStr::from_ptr(pointer).to_string_lossy().into_owned())
        };
        let read = match result.error.as_ref() {
            Some(error) => Err(not_sql(&text(error.message).unwrap_or_default())),
            None => text(result.tree).ok_or(GrammarError::Tree),
        };
        pg_query_free_parse_result(result);
        read
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(prepares[0].prepares, Some(Class::Write));
        assert_eq!(prepares[0].prepared.as_deref(), Some("p"));
    }

    #[test]
    fn what_is_called_is_named() {
        let sql = br#"SELECT lower(a), "Odd ""x".f(1) OVER (), a OPERATOR(public.<->) b FROM "My view" WHERE EXISTS
            (SELECT setval('s', 1)) ORDER BY g(h())"#;
        let command = &commands(sql, true).unwrap()[0];
        let names =
            |set: &std::collections::BTreeSet<String>| set.iter().cloned().collect::<Vec<_>>();
        assert_eq!(names(&command.functions), ["Odd \"x.f", "g", "h", "lower", "setval"]);
        assert_eq!(names(&command.operators), ["<->"]);
        assert_eq!(names(&command.relations), ["My view"]);
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
        assert!(
            commands(b"SELECT \xff", true).is_err() || commands(b"SELECT '\xff'", true).is_ok()
        );
        assert!(commands(b"SELECT \0", true).is_err());
    }

    proptest! {
        #[test]
        fn no_text_is_a_panic(sql in "(SELECT|DELETE|WITH|AS|\\(|\\)|'|\"|;|,|\\$|\\\\|[a-z]| |é){0,30}") {
            let _ = commands(sql.as_bytes(), true);
            let _ = commands(sql.as_bytes(), false);
        }
    }
}
