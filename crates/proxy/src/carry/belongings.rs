//! What a session has beside its snapshot: the rows of its temporary tables and of its cursors.
//!
//! A cursor that does not scroll gives its rows only once. If the session stays where it is after all, they are put
//! back: the cursor is opened again from its rows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::barrier::Reason;
use model::session::capture::{BEGIN, BEGIN_READ, Captured, STATEMENT_NAME, Subject};
use model::session::cursor::{Column, Contents};
use model::session::temporary::{self, Temporary};
use model::session::{Facts, Pin, Snapshot};
use model::sql;
use pg::connection::{Connection, QueryError};
use wire::frontend;

use super::reading::{Kind, ask_aside, is_in_step};
use super::{ANSWER_MAX, borrow, cut, exchange, failed, give_back};
use crate::session::Session;

/// Rows of a cursor that are fetched at once.
const FETCHED_AT_ONCE: usize = 1_000;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Belongings {
    /// By the table's quoted name, as COPY writes them.
    pub(super) rows: BTreeMap<String, Arc<Vec<u8>>>,
    pub(super) cursors: BTreeMap<String, Contents>,
    /// Tables of which the planner has statistics.
    pub(super) analyzed: BTreeSet<String>,
}

/// Everything that is carried of a session.
#[derive(Debug, Clone, Default)]
pub(crate) struct Carried {
    pub(crate) snapshot: Snapshot,
    pub(crate) belongings: Belongings,
}

impl Belongings {
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
        taken.rows = std::mem::take(rows);
        for name in snapshot.cursors.keys() {
            match describe_cursor(&mut connection, &subject, name).await {
                Ok(columns) => {
                    let contents = Contents { columns, ..Contents::default() };
                    if let Some(refused) = contents.refused() {
                        let why = format!("has a column of type `{refused}`");
                        pin = Some(Pin::HoldCursor { name: name.clone(), why });
                    }
                }
                Err(error) => result = Err(error),
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
                    let (size, max) = (contents.size(), subject.temporary_max);
                    if size > max {
                        pin = Some(Pin::TooLarge { what: format!("cursor `{name}`"), size, max });
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
            let statements = taken.cursors.iter().filter_map(only).flatten();
            let result = open_cursors(&mut connection, &statements.collect::<Vec<_>>()).await;
            let given = give_back(session, connection, result.is_ok()).await;
            result.map_err(|error| error.to_string()).and(given.map_err(|error| error.to_string()))
        }
    };
    if let Err(error) = result {
        tracing::error!(session = session.id, error, "a cursor could not be put back");
        cut(session);
    }
}

/// The rows of every temporary table.
pub(super) async fn read_rows(
    connection: &mut Connection,
    subject: &Subject<'_>,
    temporary: &Temporary,
) -> Result<BTreeMap<String, Arc<Vec<u8>>>, QueryError> {
    let mut statements = Vec::new();
    for table in &temporary.tables {
        let owner = sql::quote_literal(&table.owner);
        statements.push(format!("SELECT pg_catalog.set_config('role', {owner}, true)"));
        statements.push(format!("COPY {} TO STDOUT", table.name));
    }
    if statements.is_empty() {
        return Ok(BTreeMap::new());
    }
    let answers = ask_aside(connection, subject, BEGIN_READ, &statements).await?;
    let copied = answers.into_iter().skip(1).step_by(2).map(|answer| Arc::new(answer.copied));
    Ok(temporary.tables.iter().map(|table| table.name.clone()).zip(copied).collect())
}

/// The columns of a cursor. Its rows stay where they are.
async fn describe_cursor(
    connection: &mut Connection,
    subject: &Subject<'_>,
    name: &str,
) -> Result<Vec<Column>, QueryError> {
    let fetch = format!("FETCH FROM {}", sql::quote_name(name));
    let described = async {
        let described = connection.columns_of(STATEMENT_NAME, &fetch).await?;
        let of_type =
            |(_, oid, modifier): &(String, u32, i32)| format!("format_type({oid}, {modifier})");
        let formats: Vec<String> = described.iter().map(of_type).collect();
        let formats = format!("SELECT {}", formats.join(", "));
        let answers = ask_aside(connection, subject, BEGIN_READ, &[formats]).await?;
        Ok((described, answers))
    };
    let described = tokio::time::timeout(ANSWER_MAX, described).await;
    let (described, answers) = described.unwrap_or(Err(QueryError::Timeout(ANSWER_MAX)))?;
    let names = answers.into_iter().next().unwrap_or_default().rows.into_iter().next();
    let column = |((name, ..), sql_type): ((String, u32, i32), Option<String>)| Column {
        name,
        sql_type: sql_type.unwrap_or_default(),
    };
    Ok(described.into_iter().zip(names.unwrap_or_default()).map(column).collect())
}

/// Reads a cursor. One that scrolls stands afterwards where it stood; another has nothing left.
async fn read_cursor(
    connection: &mut Connection,
    subject: &Subject<'_>,
    name: &str,
    scrolls: bool,
) -> Result<Contents, QueryError> {
    let quoted = sql::quote_name(name);
    let columns = describe_cursor(connection, subject, name).await?;
    let mut contents = Contents { columns, ..Contents::default() };
    if scrolls {
        let statements =
            [format!("FETCH RELATIVE 0 FROM {quoted}"), format!("MOVE BACKWARD ALL FROM {quoted}")];
        let answers = ask_aside(connection, subject, BEGIN_READ, &statements).await?;
        let on_a_row = answers.first().is_some_and(|answer| !answer.rows.is_empty());
        let moved =
            answers.get(1).and_then(|answer| answer.tag.strip_prefix("MOVE ")?.parse().ok());
        let moved: u64 = moved.ok_or(QueryError::Unexpected(b'C'))?;
        // From behind the last row all of them are passed, from a row those before it.
        contents.position = if on_a_row || moved > 0 { moved + 1 } else { 0 };
    }
    loop {
        let fetch = format!("FETCH FORWARD {FETCHED_AT_ONCE} FROM {quoted}");
        let answer = ask_aside(connection, subject, BEGIN_READ, &[fetch]).await?;
        let fetched = answer.into_iter().next().unwrap_or_default().rows;
        let is_last = fetched.len() < FETCHED_AT_ONCE;
        contents.rows.extend(fetched);
        if is_last || (scrolls && contents.size() > subject.temporary_max) {
            break;
        }
    }
    if scrolls {
        let back = format!("MOVE ABSOLUTE {} FROM {quoted}", contents.position);
        ask_aside(connection, subject, BEGIN_READ, &[back]).await?;
    }
    Ok(contents)
}

/// Opens cursors from their rows, in a transaction of their own.
pub(super) async fn open_cursors(
    connection: &mut Connection,
    statements: &[(String, Vec<String>)],
) -> Result<(), QueryError> {
    if statements.is_empty() {
        return Ok(());
    }
    let mut out = Vec::new();
    Connection::add_statement(&mut out, STATEMENT_NAME, BEGIN, &[]);
    let protect = model::session::capture::PROTECT;
    for sql in [protect, temporary::FORMATS] {
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
