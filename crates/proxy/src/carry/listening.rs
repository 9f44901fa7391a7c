//! Handing channels over while both connections listen, so that no notification is lost or comes twice.
//!
//! All listeners of a database see notifications in one order, that of the queue (`async.c`). For a moment both
//! connections listen, and a notification of ours marks a place in the queue: what is before it the old connection
//! delivers, what is behind it the new one.

use std::collections::BTreeSet;
use std::time::Duration;

use model::barrier::Reason;
use model::session::capture::{BEGIN, PROTECT, STATEMENT_NAME};
use model::session::replay::{self, Phase, Step};
use model::session::{Facts, Snapshot};
use pg::connection::{Connection, QueryError};
use wire::backend::{self, Backend};
use wire::frame::HEADER_LEN;
use wire::frontend;

use super::attaching::fail_as;
use super::restoring::run_steps;
use super::{borrow, exchange, failed, give_back, messages};
use crate::session::Session;

/// How often a connection is asked whether its mark has come.
const POLL: Duration = Duration::from_millis(2);

/// Lets `new` listen to what the session listens to, and gives the client what the old server still has for it. To be
/// the last thing that may fail: from then on notifications come by `new`. After an error the session listens where it
/// listened, and nothing is lost.
pub(super) async fn hand_over(
    session: &mut Session,
    new: &mut Connection,
    snapshot: &Snapshot,
) -> Result<(), Reason> {
    // No channel of a client has this name: it is of this move alone.
    let mark = format!("_holdfast move 7f3a9c41 {}", new.pid);
    let mut old = borrow(session).await?;
    let mut result = both_listen(&mut old, new, snapshot, &mark).await;
    if result.is_ok() {
        result = fail_as(session, new).await;
    }
    let (before, after) = parted(&old.aside, &mark);
    let mut in_step = true;
    old.aside = before;
    if result.is_err() {
        old.aside.extend(after);
        let unlisten = format!("UNLISTEN {}", model::sql::quote_name(&mark));
        in_step = run(&mut old, &unlisten).await.is_ok();
        old.aside = without(&old.aside, &mark);
    }
    give_back(session, old, in_step).await?;
    result
}

async fn both_listen(
    old: &mut Connection,
    new: &mut Connection,
    snapshot: &Snapshot,
    mark: &str,
) -> Result<(), Reason> {
    let name = model::sql::quote_name(mark);
    run(old, &format!("LISTEN {name}")).await.map_err(failed)?;
    let only = Snapshot { channels: snapshot.channels.clone(), ..Snapshot::default() };
    let mut steps = replay::steps(&Snapshot::default(), &only, Phase::Primary, &Facts::default());
    steps.push(Step::Run {
        what: "listening".into(),
        sql: format!("LISTEN {name}"),
        params: Vec::new(),
    });
    run_steps(new, BEGIN, &steps, "COMMIT").await?;
    let mut channels = channels_of(new).await.map_err(failed)?;
    channels.remove(mark);
    if channels != snapshot.channels {
        let error = "the server does not listen to the session's channels".into();
        return Err(Reason::Failed { error });
    }
    run(new, &format!("NOTIFY {name}")).await.map_err(failed)?;
    wait_for(new, mark).await?;
    wait_for(old, mark).await?;
    run(new, &format!("UNLISTEN {name}")).await.map_err(failed)?;
    new.aside = parted(&new.aside, mark).1;
    Ok(())
}

/// Runs one statement in a transaction of its own, whatever the session's settings are.
async fn run(connection: &mut Connection, sql: &str) -> Result<(), QueryError> {
    let mut out = Vec::new();
    for sql in [BEGIN, PROTECT, sql, "COMMIT"] {
        Connection::add_statement(&mut out, STATEMENT_NAME, sql, &[]);
    }
    frontend::sync(&mut out);
    exchange(connection, &out).await.map(drop)
}

async fn wait_for(connection: &mut Connection, mark: &str) -> Result<(), Reason> {
    let wait_max = connection.answer_timeout;
    let deadline = tokio::time::Instant::now() + wait_max;
    while !messages(&connection.aside).any(|message| is_mark(message, mark)) {
        if tokio::time::Instant::now() > deadline {
            return Err(failed(QueryError::Timeout(wait_max)));
        }
        tokio::time::sleep(POLL).await;
        let mut out = Vec::new();
        frontend::sync(&mut out);
        exchange(connection, &out).await.map_err(failed)?;
    }
    Ok(())
}

/// What a connection listens to.
pub(super) async fn channels_of(
    connection: &mut Connection,
) -> Result<BTreeSet<String>, QueryError> {
    let mut out = Vec::new();
    let question = "SELECT c FROM pg_catalog.pg_listening_channels() c";
    for sql in [BEGIN, PROTECT, question, "COMMIT"] {
        Connection::add_statement(&mut out, STATEMENT_NAME, sql, &[]);
    }
    frontend::sync(&mut out);
    let rows = exchange(connection, &out).await?.into_iter().nth(2).unwrap_or_default().rows;
    Ok(rows.into_iter().filter_map(|row| row.into_iter().next().flatten()).collect())
}

fn without(aside: &[u8], mark: &str) -> Vec<u8> {
    messages(aside).filter(|message| !is_mark(message, mark)).flatten().copied().collect()
}

/// Messages before the first mark, all if there is none; and what is behind it.
fn parted(aside: &[u8], mark: &str) -> (Vec<u8>, Vec<u8>) {
    let (mut before, mut after, mut found) = (Vec::new(), Vec::new(), false);
    for message in messages(aside) {
        if is_mark(message, mark) {
            found = true;
        } else if found {
            after.extend_from_slice(message);
        } else {
            before.extend_from_slice(message);
        }
    }
    (before, after)
}

fn is_mark(message: &[u8], mark: &str) -> bool {
    let Some((tag, body)) = message.first().zip(message.get(HEADER_LEN..)) else { return false };
    matches!(
        backend::read(*tag, body),
        Ok(Backend::Notification { channel, .. }) if channel == mark.as_bytes()
    )
}
