//! Putting a session on the server where its copy stands.

use std::collections::BTreeMap;
use std::sync::Arc;

use model::barrier::Reason;
use model::session::Snapshot;
use model::session::capture::{BEGIN, BEGIN_WRITE};
use model::session::replay::{self, Phase};
use pg::connection::Connection;
use wire::backend::TxStatus;
use wire::frame::Side;
use wire::frontend;

use super::belongings::Carried;
use super::listening::{self, channels_of};
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
    last_look(&mut connection, "off").await?;
    let channels = &carried.snapshot.channels;
    if !channels.is_empty() && channels_of(&mut connection).await.map_err(failed)? != *channels {
        let error = "the server does not listen to the session's channels".into();
        return Err(Reason::Failed { error });
    }
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
    last_look(&mut connection, &wanted).await?;
    if carried.snapshot.channels.is_empty() {
        fail_as(session, &mut connection).await?;
    } else {
        listening::hand_over(session, &mut connection, &carried.snapshot).await?;
    }
    Ok(Attached { connection })
}

/// A session whose transaction has failed finds it failed.
pub(super) async fn fail_as(session: &Session, connection: &mut Connection) -> Result<(), Reason> {
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
    let steps = replay::idle_timeout_steps(snapshot, model.here);
    run_steps(connection, BEGIN, &steps, "COMMIT").await
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

/// The server must be in recovery or not, as told. It reports the end of its recovery by itself, with the answer to any
/// message; this is also the round trip in which other parameters that changed at a promotion arrive.
async fn last_look(connection: &mut Connection, in_recovery: &str) -> Result<(), Reason> {
    let mut out = Vec::new();
    frontend::sync(&mut out);
    exchange(connection, &out).await.map_err(failed)?;
    if connection.params.get("in_hot_standby").map(String::as_str) == Some(in_recovery) {
        return Ok(());
    }
    Err(Reason::Failed { error: format!("in_hot_standby is not `{in_recovery}`") })
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
        let (stream, unread) = connection.into_stream().map_err(std::io::Error::other)?;
        let server = Leg::new(stream.into_parts()?, unread, Side::Backend);
        let old = std::mem::replace(&mut self.server, server);
        self.backend_pid = pid;
        self.backend_secret = secret.into();
        self.cell = cell;
        self.moves += 1;
        // Every statement was prepared anew, under the settings of now.
        (self.restyled, self.unnamed_restyled) = (false, false);
        self.stilled = Vec::new();
        if let Some(sharing) = &mut self.sharing {
            sharing.here.unnamed = Default::default();
        }
        self.client.push(&aside);
        self.tell_params(&params);
        Ok(old)
    }
}
