//! Reading a session's state, and attaching it to another server.
//!
//! The order never changes: capture, attach, replay, capture again, compare, swap. Until the swap the session
//! stays on its old server, untouched, and whatever goes wrong there ends nothing but the attempt.

mod attaching;
mod belongings;
mod listening;
mod reading;
mod restoring;

use model::barrier::Reason;
use model::session::capture::{BEGIN, STATEMENT_NAME};

use model::session::protocol::Unnamed;
use model::session::replay::{self, STAY, Step};
use model::session::{Facts, Snapshot};
use pg::connection::{Answer, Connection, QueryError};
use pg::stream::{Parts, Stream};
use tokio::time::timeout;
use wire::backend::TxStatus;
use wire::frame::Side;
use wire::frontend;

pub(crate) use attaching::{attach, attach_live};
pub(crate) use belongings::{Carried, put_back, take};
pub(crate) use reading::{capture, fresh, hear_out, look};
pub(crate) use restoring::{
    Model, Prepared, ensure, login_as_before, prepare, prove_settings, rehearse, stage,
};

use restoring::run_steps;

use crate::session::Session;

fn failed(error: impl std::error::Error) -> Reason {
    Reason::Failed { error: model::chain(&error) }
}

/// Borrows the session's server socket as a connection on which no transaction is open. It must be given back by
/// [`give_back`].
async fn borrow(session: &mut Session) -> Result<Connection, Reason> {
    let mut connection = socket_of(session).map_err(failed)?;
    if session.protocol.status() == TxStatus::Failed {
        // Nothing of it is left but that it has failed.
        let mut out = Vec::new();
        Connection::add_statement(&mut out, STATEMENT_NAME, "ROLLBACK", &[]);
        frontend::sync(&mut out);
        if let Err(error) = exchange(&mut connection, &out).await {
            cut(session);
            return Err(Reason::ServerLost { error: model::chain(&error) });
        }
    }
    Ok(connection)
}

/// Opens a transaction that has failed. The statement that fails needs no snapshot, which could be waited for.
async fn open_failed(connection: &mut Connection) -> Result<(), QueryError> {
    let mut out = Vec::new();
    let fails = "RESET holdfast_says_the_transaction_had_failed_before";
    for sql in ["BEGIN", fails] {
        Connection::add_statement(&mut out, STATEMENT_NAME, sql, &[]);
    }
    frontend::sync(&mut out);
    match send_and_read(connection, &out).await {
        Err(QueryError::Server { .. }) => (),
        Err(error) => return Err(error),
        Ok(_) => return Err(QueryError::Unexpected(b'Z')),
    }
    let mut out = Vec::new();
    frontend::close(&mut out, frontend::Target::Statement(STATEMENT_NAME.as_bytes()));
    frontend::sync(&mut out);
    exchange(connection, &out).await?;
    match connection.status {
        TxStatus::Failed => Ok(()),
        _ => Err(QueryError::Unexpected(b'Z')),
    }
}

/// Lets go of the prepared statements of other sessions that have shared the session's server, and of the session's
/// values of sequences if they are not to be kept.
pub(crate) async fn forget_foreign(session: &mut Session) -> Result<(), Reason> {
    let keeps_values = session.app.pool.is_none_or(|limits| limits.currval);
    let Some(sharing) = &mut session.sharing else { return Ok(()) };
    let foreign = sharing.take_foreign();
    let forgets = !keeps_values && std::mem::take(&mut sharing.has_values);
    // Statements of its own would be read anew, too, under whatever is set by then: so the plans stay, and its server is
    // not shared again.
    let has_statements = session.has_prepared || session.protocol.unnamed() != Unnamed::Absent;
    sharing.here.is_tainted |= sharing.restyles && has_statements;
    let restyles = sharing.restyles && !has_statements;
    sharing.restyles &= !restyles;
    if foreign.is_empty() && !forgets && !restyles {
        return Ok(());
    }
    let mut connection = borrow(session).await?;
    let mut out = Vec::new();
    for statement in foreign {
        frontend::close(&mut out, frontend::Target::Statement(&statement.name));
    }
    if forgets {
        Connection::add_statement(&mut out, STATEMENT_NAME, "DISCARD SEQUENCES", &[]);
    }
    if restyles {
        Connection::add_statement(&mut out, STATEMENT_NAME, "DISCARD PLANS", &[]);
    }
    frontend::sync(&mut out);
    let result = exchange(&mut connection, &out).await;
    give_back(session, connection, result.is_ok()).await?;
    result.map(drop).map_err(|error| Reason::ServerLost { error: model::chain(&error) })
}

/// Whether transactions of a held session are read-only by themselves, now that its server says so by default.
pub(crate) async fn is_fenced(session: &mut Session) -> Result<bool, Reason> {
    let value = value(session, "SHOW default_transaction_read_only").await?;
    session.has_lifted_fence = value != "on";
    // The client stays on this server, so it may know.
    let mut params = (*session.params).clone();
    params.insert("default_transaction_read_only".into(), value);
    session.tell_params(&params);
    Ok(!session.has_lifted_fence)
}

/// Whether it is the session itself, its role or its database that has it only read, and not the fence, which is a setting of the
/// server's files (`pg_settings.source`).
pub(crate) async fn only_reads_by_itself(session: &mut Session) -> Result<bool, Reason> {
    Ok(is_own_source(&value(session, FENCE_SOURCE).await?))
}

/// The question for the source of the fence's setting.
pub(crate) const FENCE_SOURCE: &str = "SELECT source FROM pg_catalog.pg_settings \
    WHERE name OPERATOR(pg_catalog.=) 'default_transaction_read_only'::pg_catalog.text";

pub(crate) fn is_own_source(source: &str) -> bool {
    // Those of `PGC_S_DATABASE` and above (`GucSource_Names`).
    ["database", "user", "database user", "client", "override", "interactive", "test", "session"]
        .contains(&source)
}

/// The first value that the session's server gives.
async fn value(session: &mut Session, sql: &str) -> Result<String, Reason> {
    let mut connection = borrow(session).await?;
    let mut out = Vec::new();
    Connection::add_statement(&mut out, STATEMENT_NAME, sql, &[]);
    frontend::sync(&mut out);
    let result = exchange(&mut connection, &out).await;
    give_back(session, connection, result.is_ok()).await?;
    let answers = result.map_err(|error| Reason::ServerLost { error: model::chain(&error) })?;
    let rows = answers.into_iter().flat_map(|answer| answer.rows).flatten();
    Ok(rows.flatten().next().unwrap_or_default())
}

fn socket_of(session: &mut Session) -> std::io::Result<Connection> {
    let server = &mut session.server;
    let parts = Parts {
        fd: server.fd.as_ref().ok_or(std::io::ErrorKind::NotConnected)?.try_clone()?,
        is_unix: server.is_unix,
        tls: server.tls.take(),
        cipher: std::mem::take(&mut server.cipher),
    };
    let stream = match Stream::from_parts(parts) {
        Ok(stream) => stream,
        Err(error) => {
            // Its TLS state is gone with it; in the clear it must not go on.
            cut(session);
            return Err(error);
        }
    };
    // What came behind the last answer, such as a notification.
    let received = std::mem::take(&mut session.server.carry);
    let mut connection = Connection::new(stream, received, None);
    connection.pid = session.backend_pid;
    connection.params = (*session.params).clone();
    connection.answer_timeout = session.app.moves.answer_timeout;
    Ok(connection)
}

/// Ends the server connection, because what it would send next is an answer to us. The engine then tells the
/// client that its server is gone, which is true: better than somebody else's answers.
pub(crate) fn cut(session: &mut Session) {
    session.server.shut_down(std::net::Shutdown::Both);
    session.server.carry.clear();
    // What has arrived already is not for the client either.
    session.server_gone = true;
    session.server.readable = false;
}

/// Gives the socket back, with the transaction that was open. `in_step` says that every question of ours was answered.
async fn give_back(
    session: &mut Session,
    mut connection: Connection,
    in_step: bool,
) -> Result<(), Reason> {
    let has_failed = session.protocol.status() == TxStatus::Failed;
    if !in_step || (has_failed && open_failed(&mut connection).await.is_err()) {
        cut(session);
        return Ok(());
    }
    let mut params = connection.params.clone();
    // The fence of a switchover sets this on the old server. It is no state of the session, and by the time the
    // client may ask, it stands on a server that is not fenced.
    let fence = "default_transaction_read_only";
    if let Some(told) = session.params.get(fence) {
        params.insert(fence.into(), told.clone());
    }
    let mut aside = connection.aside.clone();
    let Ok((stream, unread)) = connection.into_stream() else {
        cut(session);
        return Ok(());
    };
    let parts = stream.into_parts().map_err(failed)?;
    session.server.tls = parts.tls;
    session.server.cipher = parts.cipher;
    session.server.carry.extend_from_slice(&unread);
    session.know_pids(&mut aside);
    session.client.push(&aside);
    // Parameters that changed under our questions, such as by a reload, are the client's to know.
    session.tell_params(&params);
    Ok(())
}

/// A held session may be held for longer than its server lets it be idle. To be called right after it was read.
pub(crate) async fn still(
    session: &mut Session,
    snapshot: &Snapshot,
    facts: &Facts,
) -> Result<(), Reason> {
    if replay::idle_timeout(snapshot, facts).is_none_or(|timeout| timeout == "0") {
        return Ok(());
    }
    let stay = Step::Run { what: "waiting".into(), sql: STAY.into(), params: Vec::new() };
    run_on_own(session, &[stay]).await?;
    session.stilled = replay::idle_timeout_steps(snapshot, facts);
    Ok(())
}

/// Takes [`still`] back.
pub(crate) async fn unstill(session: &mut Session) -> Result<(), Reason> {
    let steps = std::mem::take(&mut session.stilled);
    if steps.is_empty() {
        return Ok(());
    }
    run_on_own(session, &steps).await
}

async fn run_on_own(session: &mut Session, steps: &[Step]) -> Result<(), Reason> {
    let mut connection = borrow(session).await?;
    let result = run_steps(&mut connection, BEGIN, steps, "COMMIT").await;
    give_back(session, connection, result.is_ok()).await?;
    result
}

/// Sends statements of ours and reads their answers. One that is refused leaves nothing behind: no open transaction,
/// and no statement of ours.
async fn exchange(connection: &mut Connection, out: &[u8]) -> Result<Vec<Answer>, QueryError> {
    match send_and_read(connection, out).await {
        Ok(answers) => Ok(answers),
        Err(error) => {
            if let QueryError::Server { .. } | QueryError::NotText | QueryError::TooLong = error {
                roll_back(connection).await?;
            }
            Err(error)
        }
    }
}

/// Sends what is in `out` and reads the answers up to ReadyForQuery.
async fn send_and_read(connection: &mut Connection, out: &[u8]) -> Result<Vec<Answer>, QueryError> {
    let wait_max = connection.answer_timeout;
    let ask = async {
        connection.ask(out).await?;
        connection.answers().await
    };
    timeout(wait_max, ask).await.unwrap_or(Err(QueryError::Timeout(wait_max)))
}

/// After a refused statement our transaction is failed; the client's session must not see it. The statement's name
/// may be left behind by an error between its Parse and its Close.
async fn roll_back(connection: &mut Connection) -> Result<(), QueryError> {
    let mut out = Vec::new();
    frontend::close(&mut out, frontend::Target::Statement(STATEMENT_NAME.as_bytes()));
    if connection.status != TxStatus::Idle {
        Connection::add_statement(&mut out, STATEMENT_NAME, "ROLLBACK", &[]);
    }
    frontend::sync(&mut out);
    send_and_read(connection, &out).await.map(drop)
}

/// Whole messages of a server, one after the other.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (_, _, len) = wire::frame::whole(Side::Backend, bytes).ok().flatten()?;
        let (message, rest) = bytes.split_at_checked(len)?;
        bytes = rest;
        Some(message)
    })
}

impl Session {
    /// Puts the pid that the client knows into notifications of its own backend.
    fn know_pids(&self, messages: &mut [u8]) {
        let mut at = 0;
        while let Some(rest) = messages.get_mut(at..)
            && let Ok(Some((tag, _, len))) = wire::frame::whole(Side::Backend, rest)
        {
            if tag == b'A' {
                self.on_notification(
                    rest.get_mut(wire::frame::HEADER_LEN..len).unwrap_or_default(),
                );
            }
            at += len;
        }
    }
}
