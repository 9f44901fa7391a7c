//! Making a fresh server session equal to a snapshot, and proving it.

use std::collections::BTreeSet;

use model::barrier::Reason;
use model::session::capture::{self, STATEMENT_NAME};
use model::session::protocol::Unnamed;
use model::session::replay::{self, Phase, Step};
use model::session::{Facts, Pin, Snapshot};
use pg::connect::Login;
use pg::connection::{Connection, QueryError};
use tokio::time::timeout;
use wire::frontend;

use super::reading::Kind;
use super::{ANSWER_MAX, failed};
use crate::app::Cell;
use crate::session::{Identity, Session};

/// A session attached beforehand to another cell.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(super) cell: String,
    pub(super) connection: Connection,
    /// What was restored: everything but what must wait for the switch.
    pub(super) snapshot: Snapshot,
    /// The unnamed statement that stands there, as it was sent.
    unnamed: Vec<u8>,
}

/// What making a copy of a session takes.
pub(crate) struct Model<'a> {
    pub(crate) identity: &'a Identity,
    pub(crate) custom: &'a BTreeSet<String>,
    /// Of the server that the session stands on, and of the one where the copy shall stand.
    pub(crate) here: &'a Facts,
    pub(crate) there: &'a Facts,
}

/// Attaches a copy of the session to `cell`, which may be a standby, and proves that it is the same except for
/// what only a primary allows. The session itself is not needed: its client goes on meanwhile.
pub(crate) async fn prepare(
    model: &Model<'_>,
    snapshot: &Snapshot,
    cell: &Cell,
) -> Result<Prepared, Reason> {
    let login = Login {
        params: model.identity.params.clone(),
        credential: model.identity.credential.clone(),
    };
    let mut connection = cell.target.login(&login).await.map_err(failed)?;
    let snapshot = snapshot.beforehand();
    restore(&mut connection, model, &snapshot).await?;
    Ok(Prepared { cell: cell.name.clone(), connection, snapshot, unnamed: Vec::new() })
}

/// Makes a fresh server session equal to `snapshot`, and proves it by a second capture.
async fn restore(
    connection: &mut Connection,
    model: &Model<'_>,
    snapshot: &Snapshot,
) -> Result<(), Reason> {
    let kind = Kind {
        identity: model.identity,
        custom: model.custom.clone(),
        setval: false,
        alone: false,
        reference: model.here,
    };
    let kind = kind.of_copy(snapshot);
    let look = async |connection: &mut Connection| {
        let captured = kind.capture(connection, model.there).await.map_err(failed)?;
        Ok(captured.snapshot.without_settings_of_server(snapshot, model.there))
    };
    let fresh = look(connection).await?;
    let steps = replay::steps(&fresh, snapshot, Phase::Standby, model.here);
    run_steps(connection, &steps, "COMMIT").await?;
    let again = look(connection).await?.beforehand();
    match snapshot.differences(&again).into_iter().next() {
        None => Ok(()),
        Some(pin) => Err(Reason::Pinned(pin)),
    }
}

/// Runs each step by itself, so that a refusal names what was refused; all of them in one transaction, under
/// settings that are in nobody's way. What the steps set stays when it is committed.
pub(super) async fn run_steps(
    connection: &mut Connection,
    steps: &[Step],
    end: &str,
) -> Result<(), Reason> {
    if steps.is_empty() {
        return Ok(());
    }
    let mut out = Vec::new();
    let ours = |sql: &str, params: &[&str], out: &mut Vec<u8>| {
        Connection::add_statement(out, STATEMENT_NAME, sql, params);
        frontend::sync(out);
    };
    ours(capture::BEGIN, &[], &mut out);
    ours(capture::PROTECT, &[], &mut out);
    for step in steps {
        match step {
            Step::Run { sql, params, .. } => {
                let params: Vec<&str> = params.iter().map(String::as_str).collect();
                ours(sql, &params, &mut out);
            }
            Step::Prepare { sql, .. } => frontend::query(&mut out, sql.as_bytes()),
            Step::Parse { name, sql, types } => {
                frontend::parse(&mut out, name.as_bytes(), sql.as_bytes(), types);
                frontend::sync(&mut out);
            }
        }
    }
    ours(end, &[], &mut out);
    let ask = async {
        connection.send(&out).await?;
        let mut results = Vec::new();
        for _ in 0..steps.len() + 3 {
            results.push(connection.answers().await);
        }
        Ok::<_, QueryError>(results)
    };
    let results = timeout(ANSWER_MAX, ask).await.unwrap_or(Err(QueryError::Timeout(ANSWER_MAX)));
    let mut results = results.map_err(failed)?.into_iter();
    for _ in 0..2 {
        if let Some(Err(error)) = results.next() {
            return Err(failed(error));
        }
    }
    for (step, result) in steps.iter().zip(results) {
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

/// Parses the unnamed statement, as the client sent it. From then on everything of ours has a name and leaves it
/// alone.
async fn parse_unnamed(prepared: &mut Prepared, session: &Session) -> Result<(), Reason> {
    if session.protocol.unnamed() != Unnamed::Last || session.unnamed == prepared.unnamed {
        return Ok(());
    }
    // In a transaction of ours, as a standby refuses one of an isolation level that the session may have by default.
    let mut out = Vec::new();
    Connection::add_statement(&mut out, STATEMENT_NAME, capture::BEGIN, &[]);
    frontend::sync(&mut out);
    out.extend_from_slice(&session.unnamed);
    frontend::sync(&mut out);
    Connection::add_statement(&mut out, STATEMENT_NAME, "COMMIT", &[]);
    frontend::sync(&mut out);
    let connection = &mut prepared.connection;
    let ask = async {
        connection.send(&out).await?;
        connection.answers().await?;
        let parsed = connection.answers().await;
        connection.answers().await?;
        parsed
    };
    match timeout(ANSWER_MAX, ask).await.unwrap_or(Err(QueryError::Timeout(ANSWER_MAX))) {
        Ok(_) => {
            prepared.unnamed.clone_from(&session.unnamed);
            Ok(())
        }
        Err(error @ QueryError::Server { .. }) => {
            let why = format!("cannot be prepared again: {error}");
            Err(Reason::Pinned(Pin::Prepared { name: "(unnamed)".into(), why }))
        }
        Err(error) => Err(failed(error)),
    }
}

/// Before the point of no return: a copy of the session as it is now stands on the standby, or is made there, and
/// its unnamed statement can be prepared there.
pub(crate) async fn ensure(
    session: &Session,
    snapshot: &Snapshot,
    prepared: Option<Prepared>,
    cell: &Cell,
    here: &Facts,
    there: &Facts,
) -> Result<Prepared, Reason> {
    let fits = prepared.filter(|prepared| {
        prepared.cell == cell.name && prepared.snapshot == snapshot.beforehand()
    });
    let mut prepared = match fits {
        Some(prepared) => prepared,
        None => {
            let custom = &session.hints.custom;
            let model = Model { identity: &session.identity, custom, here, there };
            prepare(&model, snapshot, cell).await?
        }
    };
    parse_unnamed(&mut prepared, session).await?;
    Ok(prepared)
}
