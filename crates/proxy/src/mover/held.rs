//! What is done with one session while it is held for a switchover: it is read, copied and attached.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::barrier::Reason;
use model::session::Facts;
use model::session::capture::Captured;

use super::{Held, POLL, Read};
use crate::app::{App, Cell};
use crate::carry::{self, Model};
use crate::session::{Leg, Session};

/// A cancel request on its way is waited for so long before its session is read.
const CANCEL_WAIT: Duration = Duration::from_secs(1);

/// Reads a session that has just been held.
pub(super) async fn read_held(session: &mut Session, app: &App) -> Read {
    if session.is_detached() {
        return Read::Ready(Box::default());
    }
    let deadline = Instant::now() + CANCEL_WAIT;
    while session.cancels_under_way() && Instant::now() < deadline {
        tokio::time::sleep(POLL).await;
    }
    if !app.regime_now().state.takes_writes() {
        // Its server says of all that they only read, which is no state of theirs: it is asked once it does not.
        return Read::Not;
    }
    let Ok(facts) = app.facts(&session.cell, &session.identity.database) else {
        // Of a database of which nothing is known yet.
        return Read::Not;
    };
    match read_and_still(session, &facts).await {
        Ok(captured) => Read::Captured(Box::new(captured), facts),
        Err(reason) => Read::Failed(reason),
    }
}

async fn read_and_still(session: &mut Session, facts: &Facts) -> Result<Captured, Reason> {
    carry::unstill(session).await?;
    let captured = carry::capture(session, facts, false).await?;
    carry::still(session, &captured.snapshot, facts).await?;
    Ok(captured)
}

/// Completes what was read of a held session, and sees to it that a copy of it stands on `cell`.
pub(super) async fn capture_one(
    held: &mut Held,
    app: &App,
    cell: &Cell,
) -> Result<(), Vec<Reason>> {
    let one = |reason: Reason| vec![reason];
    let session = &mut held.session;
    if session.is_detached() {
        return Ok(());
    }
    let database = &session.identity.database;
    let here = app.facts(&session.cell, database).map_err(one)?;
    let there = app.facts(cell, database).map_err(one)?;
    let mut captured = match std::mem::replace(&mut held.read, Read::Not) {
        Read::Captured(captured, facts) if facts.asks_the_same(&here) => *captured,
        Read::Failed(reason) if !matches!(reason, Reason::Busy { .. }) => return Err(vec![reason]),
        _ => read_and_still(session, &here).await.map_err(one)?,
    };
    if !here.backends.contains_key(&session.backend_pid) {
        // Its locks are gone, whatever was read of it before.
        let error = format!("process {} has ended", session.backend_pid);
        return Err(vec![Reason::ServerLost { error }]);
    }
    captured.complete(&here, session.backend_pid);
    if !captured.pins.is_empty() {
        return Err(captured.pins.into_iter().map(Reason::Pinned).collect());
    }
    let carried = carry::take(session, captured, &here).await.map_err(one)?;
    let prepared = app.take_prepared(session.id);
    let custom = session.hints.custom.clone();
    let identity = session.identity.clone();
    let model = Model {
        identity: &identity,
        custom: &custom,
        limits: app.moves,
        here: &here,
        there: &there,
    };
    let copies = (prepared, app.take_stage(session.id));
    match carry::ensure(session, &carried, copies, cell, &model, false).await {
        Ok(copy) => app.keep_prepared(session.id, copy),
        Err(reason) => {
            carry::put_back(session, &carried).await;
            return Err(vec![reason]);
        }
    }
    held.read = Read::Ready(Box::new(carried));
    Ok(())
}

pub(super) async fn attach_one(held: &mut Held, app: &App, cell: Arc<Cell>) -> Result<Leg, Reason> {
    let failed = |error: &str| Reason::Failed { error: error.into() };
    if held.session.is_detached() {
        // It is attached where there is a free server, when it needs one.
        held.session.cell = cell;
        held.session.moves += 1;
        return Ok(Leg::vacant());
    }
    let prepared = app
        .take_prepared(held.session.id)
        .ok_or_else(|| failed("it has no copy on the other server"))?;
    let Read::Ready(carried) = &held.read else {
        return Err(failed("its state was not read"));
    };
    let database = &held.session.identity.database;
    let (here, there) = (app.facts(&held.session.cell, database)?, app.facts(&cell, database)?);
    let model = Model {
        identity: &held.session.identity,
        custom: &held.session.hints.custom,
        limits: app.moves,
        here: &here,
        there: &there,
    };
    let attached = carry::attach(&held.session, carried, prepared, &model).await?;
    held.session.swap(attached, cell).map_err(|error| failed(&error.to_string()))
}
