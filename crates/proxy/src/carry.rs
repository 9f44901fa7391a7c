//! Reading a session's state, and attaching it to another server.
//!
//! The order never changes: capture, attach, replay, capture again, compare, swap. Until the swap the session
//! stays on its old server, untouched, and whatever goes wrong there ends nothing but the attempt.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use model::barrier::Reason;
use model::session::capture::{self, Captured, CountLocks, STATEMENT_NAME, ServerVersion};
use model::session::protocol::Unnamed;
use model::session::replay::{self, Phase, Step};
use model::session::{Pin, Snapshot};
use pg::connect::Login;
use pg::connection::{Answer, Connection, QueryError};
use pg::stream::{Parts, Stream};
use tokio::time::timeout;
use wire::frame::Side;
use wire::frontend;
use wire::sqlstate::SqlState;

use crate::app::Cell;
use crate::session::{Identity, Leg, Session};

/// A late cancel request may hit a capture; it is tried again this often.
const CAPTURE_TRIES: usize = 3;
/// The longest wait for one answer of a server during a move.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// A session attached beforehand to another cell.
#[derive(Debug)]
pub struct Prepared {
    pub cell: String,
    connection: Connection,
    /// What was restored: everything but what must wait for the switch.
    snapshot: Snapshot,
}

/// What the new server is asked for once the session stands there.
pub(crate) struct Attached {
    connection: Connection,
}

fn failed(error: impl std::error::Error) -> Reason {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    Reason::Failed { error: text }
}

/// Borrows the session's server socket as a connection. It must be given back by [`give_back`].
fn borrow(session: &mut Session) -> std::io::Result<Connection> {
    let server = &mut session.server;
    let parts = Parts {
        fd: server.fd.try_clone()?,
        is_unix: server.is_unix,
        tls: server.tls.take(),
        cipher: std::mem::take(&mut server.cipher),
    };
    let stream = Stream::from_parts(parts)?;
    let mut connection = Connection::new(stream, Vec::new(), None);
    connection.pid = session.backend_pid;
    connection.params = (*session.params).clone();
    Ok(connection)
}

fn give_back(session: &mut Session, connection: Connection) -> std::io::Result<()> {
    let params = connection.params.clone();
    let aside = connection.aside.clone();
    let (stream, unread) = connection.into_stream();
    let parts = stream.into_parts()?;
    session.server.tls = parts.tls;
    session.server.cipher = parts.cipher;
    session.server.carry.extend_from_slice(&unread);
    session.client.push(&aside);
    // Parameters that changed under our questions, such as by a reload, are the client's to know.
    session.tell_params(&params);
    Ok(())
}

/// Reads the state of a session on its own server. The session must be at a safe point.
pub(crate) async fn capture(session: &mut Session, count: CountLocks) -> Result<Captured, Reason> {
    let custom = session.hints.custom.clone();
    let mut connection = borrow(session).map_err(failed)?;
    let mut result = capture_on(&mut connection, &custom, count).await;
    for _ in 1..CAPTURE_TRIES {
        match &result {
            Err(error) if error.sqlstate() == Some(SqlState::QUERY_CANCELED) => {
                result = capture_on(&mut connection, &custom, count).await;
            }
            _ => break,
        }
    }
    give_back(session, connection).map_err(failed)?;
    let mut captured = result.map_err(failed)?;
    captured.pins.extend(session.known_pins());
    match session.protocol.unnamed() {
        Unnamed::Earlier => captured.pins.push(Pin::Unnamed),
        Unnamed::Last if session.unnamed_too_long => captured.pins.push(Pin::TooLarge {
            what: "the unnamed statement".into(),
            size: u64::MAX,
            max: u64::try_from(crate::relay::UNNAMED_LEN_MAX).unwrap_or(0),
        }),
        Unnamed::Last | Unnamed::Absent => (),
    }
    captured.pins.sort();
    captured.pins.dedup();
    Ok(captured)
}

/// Sends what is in `out` and reads the answers up to the last ReadyForQuery of `syncs`.
async fn exchange(connection: &mut Connection, out: &[u8]) -> Result<Vec<Answer>, QueryError> {
    let ask = async {
        connection.send(out).await?;
        connection.answers().await
    };
    timeout(ANSWER_MAX, ask).await.unwrap_or(Err(QueryError::Timeout(ANSWER_MAX)))
}

async fn capture_on(
    connection: &mut Connection,
    custom: &BTreeSet<String>,
    count: CountLocks,
) -> Result<Captured, QueryError> {
    let version =
        connection.params.get("server_version").and_then(|text| ServerVersion::read(text));
    let questions = capture::questions(version.unwrap_or(ServerVersion(150_000)), custom);
    let mut out = Vec::new();
    for question in &questions.0 {
        Connection::add_statement(&mut out, STATEMENT_NAME, question, &[]);
    }
    frontend::sync(&mut out);
    let answers = match exchange(connection, &out).await {
        Ok(answers) => answers,
        Err(error) => {
            roll_back(connection).await?;
            return Err(error);
        }
    };
    let rows = |at: usize| answers.get(at).map(|answer| answer.rows.as_slice()).unwrap_or_default();
    let told = answers
        .iter()
        .any(|answer| answer.infos.iter().any(|info| info == capture::SEQUENCES_TOLD));
    let read = capture::read(rows(capture::ANSWER_PUT_ASIDE), rows(capture::ANSWER_STATE), told);
    let mut captured = read.map_err(|error| QueryError::Server {
        sqlstate: SqlState::INTERNAL_ERROR,
        message: error.to_string(),
    })?;
    if count == CountLocks::Alone
        && let Some(question) = capture::count_locks_question(&captured.snapshot.locks)
    {
        let mut out = Vec::new();
        Connection::add_statement(&mut out, STATEMENT_NAME, &question, &[]);
        frontend::sync(&mut out);
        let answers = exchange(connection, &out).await?;
        let counts = answers.iter().flat_map(|answer| &answer.infos);
        let counts = counts.filter_map(|info| capture::read_lock_count(info));
        captured.snapshot.locks.values_mut().zip(counts).for_each(|(held, count)| *held = count);
    }
    Ok(captured)
}

/// After a refused statement our transaction is failed; the client's session must not see it.
async fn roll_back(connection: &mut Connection) -> Result<(), QueryError> {
    if connection.status == wire::backend::TxStatus::Idle {
        // The statement's name may be left behind by an error between its Parse and its Close.
        let mut out = Vec::new();
        frontend::close(&mut out, frontend::Target::Statement(STATEMENT_NAME.as_bytes()));
        frontend::sync(&mut out);
        return exchange(connection, &out).await.map(drop);
    }
    let mut out = Vec::new();
    frontend::close(&mut out, frontend::Target::Statement(STATEMENT_NAME.as_bytes()));
    Connection::add_statement(&mut out, STATEMENT_NAME, "ROLLBACK", &[]);
    frontend::sync(&mut out);
    exchange(connection, &out).await.map(drop)
}

/// Attaches a copy of the session to `cell`, which may be a standby, and proves that it is the same except for
/// what only a primary allows. The session itself is not needed: its client goes on meanwhile.
pub(crate) async fn prepare(
    identity: &Identity,
    custom: &BTreeSet<String>,
    snapshot: Snapshot,
    cell: &Cell,
) -> Result<Prepared, Reason> {
    let connection = log_in(identity, cell).await?;
    let mut prepared =
        Prepared { cell: cell.name.clone(), connection, snapshot: snapshot.beforehand() };
    restore(&mut prepared.connection, custom, &prepared.snapshot).await?;
    Ok(prepared)
}

async fn log_in(identity: &Identity, cell: &Cell) -> Result<Connection, Reason> {
    let login = Login { params: identity.params.clone(), credential: identity.credential.clone() };
    cell.target.login(&login).await.map_err(failed)
}

/// Makes a fresh server session equal to `snapshot`, and proves it by a second capture.
async fn restore(
    connection: &mut Connection,
    custom: &BTreeSet<String>,
    snapshot: &Snapshot,
) -> Result<(), Reason> {
    let fresh = capture_on(connection, custom, CountLocks::Shared).await.map_err(failed)?;
    run_steps(connection, &replay::steps(&fresh.snapshot, snapshot, Phase::Standby)).await?;
    let again = capture_on(connection, custom, CountLocks::Shared).await.map_err(failed)?;
    match snapshot.differences(&again.snapshot).into_iter().next() {
        None => Ok(()),
        Some(pin) => Err(Reason::Pinned(pin)),
    }
}

/// Runs each step by itself, so that a refusal names what was refused.
async fn run_steps(connection: &mut Connection, steps: &[Step]) -> Result<(), Reason> {
    let mut out = Vec::new();
    for step in steps {
        match step {
            Step::Run { sql, params, .. } => {
                let params: Vec<&str> = params.iter().map(String::as_str).collect();
                Connection::add_statement(&mut out, STATEMENT_NAME, sql, &params);
                frontend::sync(&mut out);
            }
            Step::Prepare { sql, .. } => frontend::query(&mut out, sql.as_bytes()),
            Step::Parse { name, sql, types } => {
                frontend::parse(&mut out, name.as_bytes(), sql.as_bytes(), types);
                frontend::sync(&mut out);
            }
        }
    }
    let ask = async {
        connection.send(&out).await?;
        let mut results = Vec::new();
        for _ in steps {
            results.push(connection.answers().await);
        }
        Ok::<_, QueryError>(results)
    };
    let results = timeout(ANSWER_MAX, ask).await.unwrap_or(Err(QueryError::Timeout(ANSWER_MAX)));
    for (step, result) in steps.iter().zip(results.map_err(failed)?) {
        if let Err(error) = result {
            return Err(refused(step, &error));
        }
    }
    Ok(())
}

fn refused(step: &Step, error: &QueryError) -> Reason {
    let error = error.to_string();
    Reason::Pinned(match step {
        Step::Run { what, .. } => Pin::Refused { what: what.clone(), error },
        Step::Prepare { name, .. } | Step::Parse { name, .. } => {
            Pin::Prepared { name: name.clone(), why: format!("cannot be prepared again: {error}") }
        }
    })
}

/// Attaches the session to a primary: what was prepared if it still fits, else from the start.
pub(crate) async fn attach(
    session: &Session,
    snapshot: &Snapshot,
    prepared: Option<Prepared>,
    cell: &Cell,
) -> Result<Attached, Reason> {
    let wanted = snapshot.beforehand();
    let custom = &session.hints.custom;
    let mut connection = match prepared.filter(|prepared| prepared.cell == cell.name) {
        Some(prepared) if prepared.snapshot == wanted => prepared.connection,
        Some(mut prepared) => {
            // The session has changed since; its copy begins anew.
            let discard = prepared.connection.query("DISCARD ALL");
            timeout(ANSWER_MAX, discard).await.map_err(failed)?.map_err(failed)?;
            restore(&mut prepared.connection, custom, &wanted).await?;
            prepared.connection
        }
        None => {
            let mut connection = log_in(&session.identity, cell).await?;
            restore(&mut connection, custom, &wanted).await?;
            connection
        }
    };
    run_steps(&mut connection, &replay::steps(&wanted, snapshot, Phase::Primary)).await?;
    last_look(&mut connection, session, snapshot).await?;
    Ok(Attached { connection })
}

/// The server must be a primary, listen to what the session listens to, and hold the unnamed statement. This
/// is also the round trip in which parameters that changed at the promotion arrive.
async fn last_look(
    connection: &mut Connection,
    session: &Session,
    snapshot: &Snapshot,
) -> Result<(), Reason> {
    let mut out = Vec::new();
    let question = "SELECT pg_catalog.pg_is_in_recovery()::pg_catalog.text UNION ALL \
        SELECT c FROM pg_catalog.pg_listening_channels() c";
    Connection::add_statement(&mut out, STATEMENT_NAME, question, &[]);
    // The unnamed statement comes last: everything of ours has a name and leaves it alone.
    if session.protocol.unnamed() == Unnamed::Last {
        out.extend_from_slice(&session.unnamed);
    }
    frontend::sync(&mut out);
    let answers = exchange(connection, &out).await.map_err(failed)?;
    let rows = answers.into_iter().next().unwrap_or_default().rows;
    let mut cells = rows.into_iter().filter_map(|row| row.into_iter().next().flatten());
    if cells.next().as_deref() != Some("false") {
        return Err(Reason::Failed { error: "the server is still in recovery".into() });
    }
    let channels: BTreeSet<String> = cells.collect();
    if channels != snapshot.channels {
        return Err(Reason::Failed {
            error: "the server does not listen to the session's channels".into(),
        });
    }
    Ok(())
}

impl Session {
    /// Swaps the server: from here on the session stands on the new one.
    pub(crate) fn swap(
        &mut self,
        attached: Attached,
        cell: std::sync::Arc<Cell>,
    ) -> std::io::Result<()> {
        let mut connection = attached.connection;
        let params: BTreeMap<String, String> = std::mem::take(&mut connection.params);
        let aside = std::mem::take(&mut connection.aside);
        let (pid, secret) = (connection.pid, std::mem::take(&mut connection.secret));
        let (stream, unread) = connection.into_stream();
        let server = Leg::new(stream.into_parts()?, unread, Side::Backend);
        let mut old = std::mem::replace(&mut self.server, server);
        crate::session::terminate(&mut old);
        self.backend_pid = pid;
        self.backend_secret = secret.into();
        self.cell = cell;
        self.moves += 1;
        self.client.push(&aside);
        self.tell_params(&params);
        Ok(())
    }
}
