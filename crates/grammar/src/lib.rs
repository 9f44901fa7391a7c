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
mod tests;
