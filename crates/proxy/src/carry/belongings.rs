//! What a session has beside its snapshot: the rows of its temporary tables and of its cursors.
//!
//! A cursor that does not scroll gives its rows only once. If the session stays where it is after all, they are put
//! back: the cursor is opened again from its rows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use model::barrier::Reason;
use model::session::capture::{self, BEGIN, BEGIN_READ, Captured, STATEMENT_NAME, Subject};
use model::session::cursor::{self, Column, Contents, Cursor, Shape};
use model::session::temporary::{self, Temporary};
use model::session::{Facts, Pin, Snapshot};
use model::sql;
use pg::connection::{Answer, Connection, QueryError};
use tokio::time::timeout;
use wire::frontend;
use wire::sqlstate::SqlState;

use super::reading::{Kind, ask_aside, is_in_step};
use super::{borrow, cut, exchange, failed, give_back, roll_back};
use crate::app::App;
use crate::session::Session;

/// Rows of a cursor that are fetched at once.
const FETCHED_AT_ONCE: usize = 1_000;

/// A part of what may be held in all. It is given back when it is dropped.
#[derive(Debug)]
struct Reserved {
    of: Arc<AtomicU64>,
    bytes: u64,
}

impl Reserved {
    fn take(app: &App, bytes: u64) -> Result<Reserved, Pin> {
        let before = app.temporary.fetch_add(bytes, Ordering::SeqCst);
        let reserved = Reserved { of: app.temporary.clone(), bytes };
        let (size, max) = (before.saturating_add(bytes), app.moves.temporary_total_max);
        if size > max {
            let what = "temporary data of all sessions that are held".into();
            return Err(Pin::TooLarge { what, size, max });
        }
        Ok(reserved)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.of.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Belongings {
    /// By the table's quoted name, as COPY writes them.
    pub(super) rows: BTreeMap<String, Arc<Vec<u8>>>,
    /// The same with generated columns, which are not carried but computed again, for tables that have some.
    pub(super) whole: BTreeMap<String, Arc<Vec<u8>>>,
    pub(super) cursors: BTreeMap<String, Contents>,
    /// Tables of which the planner has statistics.
    pub(super) analyzed: BTreeSet<String>,
    /// Their size counts among all that are held.
    reserved: Vec<Arc<Reserved>>,
}

/// Everything that is carried of a session.
#[derive(Debug, Clone, Default)]
pub(crate) struct Carried {
    pub(crate) snapshot: Snapshot,
    pub(crate) belongings: Belongings,
}

impl Belongings {
    pub(super) fn is_empty(&self) -> bool {
        self.rows.values().all(|rows| rows.is_empty()) && self.cursors.is_empty()
    }

    /// They came in a way that has changed the session that they came from.
    fn are_taken(&self, snapshot: &Snapshot) -> bool {
        self.cursors
            .keys()
            .any(|name| snapshot.cursors.get(name).is_some_and(|cursor| !cursor.is_scrollable))
    }
}

/// Takes what the session has. After an error it has everything still, or has lost its server.
pub(crate) async fn take(
    session: &mut Session,
    captured: Captured,
    facts: &Facts,
) -> Result<Carried, Reason> {
    let belongings = Belongings { analyzed: captured.analyzed, ..Belongings::default() };
    let mut carried = Carried { snapshot: captured.snapshot, belongings };
    let Carried { snapshot, belongings: taken } = &mut carried;
    if snapshot.temporary.tables.is_empty() && snapshot.cursors.is_empty() {
        return Ok(carried);
    }
    let mut connection = borrow(session).await?;
    let identity = session.identity.clone();
    let kind = Kind::of(session, &identity, facts, false);
    let subject = kind.subject(&connection, facts);
    let mut result = read_rows(&mut connection, &subject, &snapshot.temporary).await;
    let mut pin = None;
    if let Ok(rows) = &mut result {
        [taken.rows, taken.whole] = std::mem::take(rows);
        let size = taken.rows.values().map(|rows| rows.len()).sum::<usize>();
        match Reserved::take(&session.app, u64::try_from(size).unwrap_or(u64::MAX)) {
            Ok(reserved) => taken.reserved.push(Arc::new(reserved)),
            Err(too_large) => pin = Some(too_large),
        }
        for name in snapshot.cursors.keys() {
            match describe_cursor(&mut connection, &subject, name).await {
                Ok(columns) => {
                    let contents = Contents { columns, ..Contents::default() };
                    let why = match contents.refused() {
                        Some(refused) => Some(format!("has a column of type `{refused}`")),
                        None if !snapshot.cursors[name].is_scrollable => {
                            try_out(&mut connection, &subject, &contents).await
                        }
                        None => None,
                    };
                    pin = pin.or(why.map(|why| Pin::HoldCursor { name: name.clone(), why }));
                }
                Err(error) => result = Err(error),
            }
            if pin.is_some() || result.is_err() {
                break;
            }
        }
    }
    if result.is_ok() && pin.is_none() {
        // Those that scroll come first: what is refused there has changed nothing.
        let mut names: Vec<&String> = snapshot.cursors.keys().collect();
        names.sort_by_key(|name| !snapshot.cursors[*name].is_scrollable);
        for name in names {
            let scrolls = snapshot.cursors[name].is_scrollable;
            match read_cursor(&mut connection, &subject, name, scrolls).await {
                Ok(contents) => {
                    let size = contents.rows.iter().map(|row| cursor::size_of(row)).sum::<u64>();
                    let max = subject.temporary_max;
                    if size > max {
                        pin = Some(Pin::TooLarge { what: format!("cursor `{name}`"), size, max });
                    } else {
                        match Reserved::take(&session.app, size) {
                            Ok(reserved) => taken.reserved.push(Arc::new(reserved)),
                            Err(too_large) => pin = Some(too_large),
                        }
                    }
                    taken.cursors.insert(name.clone(), contents);
                }
                Err(error) => result = Err(error),
            }
            if pin.is_some() || result.is_err() {
                break;
            }
        }
    }
    let in_step = is_in_step(&result);
    give_back(session, connection, in_step).await?;
    let reason = match (result, pin) {
        (Ok(_), None) => return Ok(carried),
        (Ok(_), Some(pin)) => Reason::Pinned(pin),
        (Err(error), _) if in_step => failed(error),
        (Err(error), _) => return Err(Reason::ServerLost { error: model::chain(&error) }),
    };
    put_back(session, &carried).await;
    Err(reason)
}

/// The session stays where it is: what was taken in a way that changed it is put back. If that fails, it loses its
/// server, which its client is told.
pub(crate) async fn put_back(session: &mut Session, carried: &Carried) {
    let Carried { snapshot, belongings: taken } = carried;
    if !taken.are_taken(snapshot) {
        return;
    }
    let result = match borrow(session).await {
        Err(error) => Err(error.to_string()),
        Ok(mut connection) => {
            let only = |(name, contents): (&String, &Contents)| {
                let cursor = snapshot.cursors.get(name).filter(|cursor| !cursor.is_scrollable)?;
                let mut statements = vec![(format!("CLOSE {}", sql::quote_name(name)), Vec::new())];
                statements.extend(contents.declare(name, *cursor));
                Some(statements)
            };
            let statements: Vec<_> = taken.cursors.iter().filter_map(only).flatten().collect();
            let (identity, facts) = (session.identity.clone(), Facts::default());
            let kind = Kind::of(session, &identity, &facts, false);
            let subject = kind.subject(&connection, &facts);
            let result = open_cursors(&mut connection, &subject, &statements).await;
            let given = give_back(session, connection, result.is_ok()).await;
            result.map_err(|error| error.to_string()).and(given.map_err(|error| error.to_string()))
        }
    };
    if let Err(error) = result {
        tracing::error!(session = session.id, error, "a cursor could not be put back");
        cut(session);
    }
}

/// The rows of every temporary table; and those of some with their generated columns.
pub(super) async fn read_rows(
    connection: &mut Connection,
    subject: &Subject<'_>,
    temporary: &Temporary,
) -> Result<[BTreeMap<String, Arc<Vec<u8>>>; 2], QueryError> {
    let mut statements = Vec::new();
    for table in &temporary.tables {
        let (owner, name) = (sql::quote_literal(&table.owner), &table.name);
        statements.push(format!("SELECT pg_catalog.set_config('role', {owner}, true)"));
        statements.push(format!("COPY {name} TO STDOUT"));
        let whole = if temporary.generates(name) { "" } else { " LIMIT 0" };
        statements.push(format!("COPY (SELECT * FROM {name}{whole}) TO STDOUT"));
    }
    if statements.is_empty() {
        return Ok(Default::default());
    }
    let answers = ask_aside(connection, subject, BEGIN_READ, &statements).await?;
    let (mut rows, mut whole) = (BTreeMap::new(), BTreeMap::new());
    let mut copied = answers.into_iter().map(|answer| Arc::new(answer.copied));
    for table in &temporary.tables {
        // The role, the rows, all of them.
        let (_, plain, all) = (copied.next(), copied.next(), copied.next());
        rows.extend(plain.map(|plain| (table.name.clone(), plain)));
        if temporary.generates(&table.name) {
            whole.extend(all.map(|all| (table.name.clone(), all)));
        }
    }
    Ok([rows, whole])
}

/// The columns of a cursor. Its rows stay where they are.
async fn describe_cursor(
    connection: &mut Connection,
    subject: &Subject<'_>,
    name: &str,
) -> Result<Vec<Column>, QueryError> {
    let fetch = format!("FETCH FROM {}", sql::quote_name(name));
    begin_aside(connection, subject).await?;
    let wait_max = connection.answer_timeout;
    let described = timeout(wait_max, connection.columns_of(STATEMENT_NAME, &fetch)).await;
    let described = match described.unwrap_or(Err(QueryError::Timeout(wait_max))) {
        Ok(described) => described,
        Err(error @ QueryError::Server { .. }) => {
            roll_back(connection).await?;
            return Err(error);
        }
        Err(error) => return Err(error),
    };
    let of_type = |(_, oid, modifier): &(String, u32, i32)| {
        format!(
            "(SELECT format_type(oid, {modifier}) || CASE WHEN typcategory = 'A' THEN ' array' \
             WHEN typtype = 'c' THEN ' row' WHEN typarray <> 0 THEN ' element' ELSE ' none' END \
             || ' ' || typdelim::text FROM pg_type WHERE oid = {oid})"
        )
    };
    let types: Vec<String> = described.iter().map(of_type).collect();
    let answer = run_and_commit(connection, &format!("SELECT {}", types.join(", "))).await?;
    let types = answer.rows.into_iter().next().unwrap_or_default();
    let column = |((name, ..), described): ((String, u32, i32), Option<String>)| {
        let described = described.unwrap_or_default();
        let (described, delimiter) = described.rsplit_once(' ').unwrap_or((&described, ""));
        let (sql_type, shape) = described.rsplit_once(' ').unwrap_or((described, ""));
        let shape = match shape {
            "element" => Shape::Element,
            "array" => Shape::Array,
            "row" => Shape::Row,
            _ => Shape::None,
        };
        let delimiter = delimiter.chars().next().unwrap_or(',');
        Column { name, sql_type: sql_type.to_owned(), shape, delimiter }
    };
    Ok(described.into_iter().zip(types).map(column).collect())
}

/// Reads a cursor. One that scrolls stands afterwards where it stood, also after an error that leaves the connection
/// in step; another has nothing left.
async fn read_cursor(
    connection: &mut Connection,
    subject: &Subject<'_>,
    name: &str,
    scrolls: bool,
) -> Result<Contents, QueryError> {
    let quoted = sql::quote_name(name);
    let columns = describe_cursor(connection, subject, name).await?;
    let mut contents = Contents { columns, ..Contents::default() };
    if !scrolls {
        fetch_all(connection, subject, &quoted, false, &mut contents).await?;
        return Ok(contents);
    }
    let here = format!("FETCH RELATIVE 0 FROM {quoted}");
    let here = ask_aside(connection, subject, BEGIN_READ, &[here]).await?;
    let on_a_row = here.first().is_some_and(|answer| !answer.rows.is_empty());
    let moved = to_its_begin(connection, subject, &quoted).await?;
    // From behind the last row all of them were passed, from a row those before it.
    contents.position = if on_a_row || moved > 0 { moved + 1 } else { 0 };
    let fetched = fetch_all(connection, subject, &quoted, true, &mut contents).await;
    if let Err(error) = &fetched
        && !is_in_step(&fetched)
    {
        tracing::debug!(%error, "a cursor could not be read");
        return fetched.map(|()| contents);
    }
    let back = format!("MOVE ABSOLUTE {} FROM {quoted}", contents.position);
    match ask_aside(connection, subject, BEGIN_READ, &[back]).await {
        Ok(_) => fetched.map(|()| contents),
        Err(error) => Err(lost(&error)),
    }
}

/// What a cursor had, or where it stood, is not known any more.
fn lost(error: &QueryError) -> QueryError {
    QueryError::Lost { what: "a cursor".into(), error: model::chain(error) }
}

/// The cursor has failed before, so nothing was taken from it.
fn is_dead(error: &QueryError, contents: &Contents) -> bool {
    contents.rows.is_empty() && error.sqlstate() == Some(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE)
}

/// Moves a cursor before its first row, and gives how many rows it passed. Once this has begun, an error leaves
/// nothing that tells where the cursor stood.
async fn to_its_begin(
    connection: &mut Connection,
    subject: &Subject<'_>,
    quoted: &str,
) -> Result<u64, QueryError> {
    begin_aside(connection, subject).await?;
    let moved = run_and_commit(connection, &format!("MOVE BACKWARD ALL FROM {quoted}")).await;
    let moved = moved.map_err(|error| lost(&error))?;
    let count = moved.tag.strip_prefix("MOVE ").and_then(|count| count.parse().ok());
    count.ok_or(QueryError::Unexpected(b'C'))
}

/// Begins a transaction of ours. After an error nothing has happened.
async fn begin_aside(connection: &mut Connection, subject: &Subject<'_>) -> Result<(), QueryError> {
    let mut out = Vec::new();
    let aside = capture::first_questions(subject).0;
    let aside = aside.last().map_or("", |(question, _)| question);
    for sql in [BEGIN_READ, aside, temporary::FORMATS] {
        Connection::add_statement(&mut out, STATEMENT_NAME, sql, &[]);
    }
    frontend::sync(&mut out);
    exchange(connection, &out).await.map(drop)
}

/// Runs one statement in it, and ends it. After an error it is not known whether the statement was run.
async fn run_and_commit(connection: &mut Connection, sql: &str) -> Result<Answer, QueryError> {
    let mut out = Vec::new();
    Connection::add_described(&mut out, STATEMENT_NAME, sql);
    frontend::sync(&mut out);
    let answers = exchange(connection, &out).await?;
    let mut out = Vec::new();
    Connection::add_statement(&mut out, STATEMENT_NAME, "COMMIT", &[]);
    frontend::sync(&mut out);
    exchange(connection, &out).await?;
    Ok(answers.into_iter().next().unwrap_or_default())
}

/// Fetches what a cursor still has, or more than may be carried of one that scrolls. What a cursor that does not scroll
/// has given is nowhere else: an error after that leaves a session that is not what it was.
async fn fetch_all(
    connection: &mut Connection,
    subject: &Subject<'_>,
    quoted: &str,
    scrolls: bool,
    contents: &mut Contents,
) -> Result<(), QueryError> {
    let mut size = 0;
    loop {
        let fetch = format!("FETCH FORWARD {FETCHED_AT_ONCE} FROM {quoted}");
        let begun = begin_aside(connection, subject).await;
        let is_untouched = contents.rows.is_empty() && begun.is_err();
        let fetched = match begun {
            Ok(()) => run_and_commit(connection, &fetch).await,
            Err(error) => Err(error),
        };
        let answer = match fetched {
            Ok(answer) => answer,
            Err(error) if scrolls || is_untouched || is_dead(&error, contents) => {
                return Err(error);
            }
            Err(error) => return Err(lost(&error)),
        };
        let names = answer.columns.iter().map(|(name, ..)| name);
        if !names.eq(contents.columns.iter().map(|column| &column.name)) {
            return Err(QueryError::Unexpected(b'T'));
        }
        let is_last = answer.rows.len() < FETCHED_AT_ONCE;
        size += answer.rows.iter().map(|row| cursor::size_of(row)).sum::<u64>();
        contents.rows.extend(answer.rows);
        if is_last || (scrolls && size > subject.temporary_max) {
            return Ok(());
        }
    }
}

/// Whether a cursor that does not scroll could be put back, before anything is taken from it; else why not.
async fn try_out(
    connection: &mut Connection,
    subject: &Subject<'_>,
    contents: &Contents,
) -> Option<String> {
    if connection.params.get("server_encoding").is_some_and(|encoding| encoding == "SQL_ASCII") {
        return Some("its text is in no known encoding".into());
    }
    let limits = "SELECT current_setting('temp_file_limit')".to_owned();
    let limits = match ask_aside(connection, subject, BEGIN_READ, &[limits]).await {
        Ok(answers) => answers,
        Err(error) => return Some(format!("cannot be tried: {error}")),
    };
    let limit = limits.first().and_then(|answer| answer.rows.first()?.first()?.clone());
    if limit.as_deref() != Some("-1") {
        return Some("temp_file_limit might keep it from being opened again".into());
    }
    let name = "_holdfast trial 7f3a9c41";
    let cursor = Cursor { is_scrollable: false };
    let mut statements = contents.declare(name, cursor);
    statements.push((format!("CLOSE {}", sql::quote_name(name)), Vec::new()));
    let tried = open_cursors(connection, subject, &statements).await;
    tried.err().map(|error| format!("cannot be opened again: {error}"))
}

/// Opens cursors from their rows, in a transaction of their own, as the login: the session's role may not see types.
pub(super) async fn open_cursors(
    connection: &mut Connection,
    subject: &Subject<'_>,
    statements: &[(String, Vec<String>)],
) -> Result<(), QueryError> {
    if statements.is_empty() {
        return Ok(());
    }
    let mut out = Vec::new();
    let aside = capture::first_questions(subject).0;
    let aside = aside.last().map_or("", |(question, _)| question);
    for sql in [BEGIN, aside, temporary::FORMATS] {
        Connection::add_statement(&mut out, STATEMENT_NAME, sql, &[]);
    }
    for (sql, params) in statements {
        let params: Vec<&str> = params.iter().map(String::as_str).collect();
        Connection::add_statement(&mut out, STATEMENT_NAME, sql, &params);
    }
    Connection::add_statement(&mut out, STATEMENT_NAME, "COMMIT", &[]);
    frontend::sync(&mut out);
    exchange(connection, &out).await.map(drop)
}

/// Whether the cursors of a copy that scroll have the same rows and stand at the same.
pub(super) async fn same_cursors(
    connection: &mut Connection,
    subject: &Subject<'_>,
    snapshot: &Snapshot,
    wanted: &Belongings,
) -> Result<(), Reason> {
    for (name, contents) in &wanted.cursors {
        if !snapshot.cursors.get(name).is_some_and(|cursor| cursor.is_scrollable) {
            continue;
        }
        let found = read_cursor(connection, subject, name, true).await.map_err(failed)?;
        if found != *contents {
            let why = "its rows are not the same on the other server".into();
            return Err(Reason::Pinned(Pin::HoldCursor { name: name.clone(), why }));
        }
    }
    Ok(())
}
