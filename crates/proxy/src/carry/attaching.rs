//! Putting a session on the server where its copy stands.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::barrier::Reason;
use model::session::Snapshot;
use model::session::capture::{BEGIN, BEGIN_WRITE, PROTECT, STATEMENT_NAME};
use model::session::replay::{self, Phase};
use pg::connection::Connection;
use wire::backend::TxStatus;
use wire::frame::Side;
use wire::frontend;

use super::belongings::Carried;
use super::listening;
use super::reading::Kind;
use super::restoring::{Model, Prepared, as_login, make, parse_unnamed, run_steps};
use super::{exchange, failed, messages, open_failed};
use crate::app::Cell;
use crate::session::{Leg, Session};

/// What the new server is asked for once the session stands there.
pub(crate) struct Attached {
    connection: Connection,
}

/// Attaches the session to a primary, where its copy stands that was made beforehand.
pub(crate) async fn attach(
    session: &Session,
    carried: &Carried,
    prepared: Prepared,
    model: &Model<'_>,
) -> Result<Attached, Reason> {
    let steps = replay::steps(&prepared.snapshot, &carried.snapshot, Phase::Primary, model.here);
    let Prepared { mut connection, mut unnamed, .. } = prepared;
    run_steps(&mut connection, BEGIN, &steps, "COMMIT").await?;
    finish(&mut connection, &mut unnamed, session, carried, model).await?;
    last_look(&mut connection, &carried.snapshot, "off").await?;
    fail_as(session, &mut connection).await?;
    Ok(Attached { connection })
}

/// The same where the session's old server goes on working for others, and may be the new one.
pub(crate) async fn attach_live(
    session: &mut Session,
    carried: &Carried,
    prepared: Prepared,
    model: &Model<'_>,
) -> Result<Attached, Reason> {
    let Prepared { mut connection, mut unnamed, .. } = prepared;
    let role = "in_hot_standby";
    let wanted = session.params.get(role).cloned().unwrap_or_default();
    let found = connection.params.get(role).cloned().unwrap_or_default();
    if wanted != found {
        let error = format!(
            "{role} is `{wanted}` where it stands and `{found}` on the other server; a switchover moves it"
        );
        return Err(Reason::Failed { error });
    }
    finish(&mut connection, &mut unnamed, session, carried, model).await?;
    if !carried.snapshot.channels.is_empty() {
        listening::hand_over(session, &mut connection, &carried.snapshot).await?;
    }
    last_look(&mut connection, &carried.snapshot, &wanted).await?;
    fail_as(session, &mut connection).await?;
    Ok(Attached { connection })
}

/// A session whose transaction has failed finds it failed.
async fn fail_as(session: &Session, connection: &mut Connection) -> Result<(), Reason> {
    match session.protocol.status() {
        TxStatus::Failed => open_failed(connection).await.map_err(failed),
        _ => Ok(()),
    }
}

/// Makes what only a primary can make.
async fn finish(
    connection: &mut Connection,
    unnamed: &mut Vec<u8>,
    session: &Session,
    carried: &Carried,
    model: &Model<'_>,
) -> Result<(), Reason> {
    let snapshot = &carried.snapshot;
    if !snapshot.temporary.is_empty() {
        make(connection, model, carried).await?;
        parse_unnamed(connection, unnamed, session).await?;
    }
    if !snapshot.sequences.is_empty() {
        restore_sequences(connection, snapshot, model).await?;
    }
    Ok(())
}

/// Gives `currval` and `lastval` their values, and asks for them again.
async fn restore_sequences(
    connection: &mut Connection,
    snapshot: &Snapshot,
    model: &Model<'_>,
) -> Result<(), Reason> {
    for group in replay::sequence_steps(snapshot) {
        let mut steps = vec![as_login(model.identity)];
        steps.extend(group);
        run_steps(connection, BEGIN_WRITE, &steps, "ROLLBACK").await?;
    }
    let kind = Kind { setval: true, ..Kind::of_model(model) };
    let mut again = kind.capture(connection, model.there).await.map_err(failed)?;
    again.name_sequences(model.here);
    let again = again.snapshot;
    let only = |from: &Snapshot| Snapshot {
        sequences: from.sequences.clone(),
        last_value: from.last_value,
        ..Snapshot::default()
    };
    match only(snapshot).differences(&only(&again)).into_iter().next() {
        None => Ok(()),
        Some(pin) => Err(Reason::Pinned(pin)),
    }
}

/// The server must be in recovery or not, as told, and listen to what the session listens to. This is also the round
/// trip in which parameters that changed at a promotion arrive.
async fn last_look(
    connection: &mut Connection,
    snapshot: &Snapshot,
    in_recovery: &str,
) -> Result<(), Reason> {
    if snapshot.channels.is_empty() {
        // The server reports the end of its recovery by itself, with the answer to any message.
        let mut out = Vec::new();
        frontend::sync(&mut out);
        exchange(connection, &out).await.map_err(failed)?;
        if connection.params.get("in_hot_standby").map(String::as_str) != Some(in_recovery) {
            return Err(Reason::Failed { error: format!("in_hot_standby is not `{in_recovery}`") });
        }
        return Ok(());
    }
    let mut out = Vec::new();
    let question = "SELECT pg_catalog.pg_is_in_recovery()::pg_catalog.text UNION ALL \
        SELECT c FROM pg_catalog.pg_listening_channels() c";
    for sql in [BEGIN, PROTECT, question, "COMMIT"] {
        Connection::add_statement(&mut out, STATEMENT_NAME, sql, &[]);
    }
    frontend::sync(&mut out);
    let answers = exchange(connection, &out).await.map_err(failed)?;
    let rows = answers.into_iter().nth(2).unwrap_or_default().rows;
    let mut cells = rows.into_iter().filter_map(|row| row.into_iter().next().flatten());
    if cells.next().as_deref() != Some("false") {
        return Err(Reason::Failed { error: "the server is still in recovery".into() });
    }
    let channels: BTreeSet<String> = cells.collect();
    if channels != snapshot.channels {
        let error = "the server does not listen to the session's channels".into();
        return Err(Reason::Failed { error });
    }
    Ok(())
}

impl Session {
    /// Swaps the server: from here on the session stands on the new one. Gives the old connection.
    pub(crate) fn swap(&mut self, attached: Attached, cell: Arc<Cell>) -> std::io::Result<Leg> {
        let mut connection = attached.connection;
        let params: BTreeMap<String, String> = std::mem::take(&mut connection.params);
        // Notices are about statements of ours: the client was given its own when it sent them.
        let aside = std::mem::take(&mut connection.aside);
        let notifications = messages(&aside).filter(|message| message.first() == Some(&b'A'));
        let aside = notifications.flatten().copied().collect::<Vec<u8>>();
        let (pid, secret) = (connection.pid, std::mem::take(&mut connection.secret));
        let (stream, unread) = connection.into_stream();
        let server = Leg::new(stream.into_parts()?, unread, Side::Backend);
        let old = std::mem::replace(&mut self.server, server);
        self.backend_pid = pid;
        self.backend_secret = secret.into();
        self.cell = cell;
        self.moves += 1;
        // Every statement was prepared anew, under the settings of now.
        self.restyled = false;
        self.client.push(&aside);
        self.tell_params(&params);
        Ok(old)
    }
}
