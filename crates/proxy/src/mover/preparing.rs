//! What is done while clients go on: learning of databases, and making copies of sessions.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::barrier::{Blocker, Reason};
use model::cell::CellState;
use model::session::Snapshot;
use tokio::task::JoinSet;

use super::each;
use super::moving::take;
use crate::app::{App, Cell};
use crate::carry::{self, Carried, Model, Prepared};
use crate::proxy::Shared;
use crate::session::Identity;

/// How long one session is waited for while it is prepared, in the first round and those after it; one that is busy
/// then is read during the switch.
pub(super) const PREPARE_WAITS: [Duration; 3] =
    [Duration::from_millis(100), Duration::from_millis(300), Duration::from_secs(1)];
/// Databases that are asked at once.
const LEARN_AT_ONCE: usize = 4;

/// Asks each server for what is the same for all sessions of each database. What fails is the sessions' reason.
pub(super) fn learn_all(
    app: &Arc<App>,
    cells: impl IntoIterator<Item = Arc<Cell>>,
    databases: &BTreeSet<String>,
) -> JoinSet<()> {
    let of_cell =
        |cell: Arc<Cell>| databases.iter().map(move |database| (cell.clone(), database.clone()));
    each(cells.into_iter().flat_map(of_cell), LEARN_AT_ONCE, |(cell, database)| {
        let app = app.clone();
        async move { app.learn(&cell, &database).await }
    })
}

pub(super) async fn prepare_one(
    shared: &Shared,
    app: &Arc<App>,
    to: Option<&Cell>,
    id: u64,
    wait: Duration,
) -> Result<(), Option<Blocker>> {
    let mut session = take(shared, id, Instant::now() + wait).await?;
    if session.is_detached() {
        shared.give(session);
        return Ok(());
    }
    let here = app.facts(&session.cell, &session.identity.database);
    let captured = match &here {
        Ok(here) => carry::capture(&mut session, here, false).await.map(|mut captured| {
            captured.complete(here, session.backend_pid);
            captured
        }),
        Err(reason) => Err(reason.clone()),
    };
    let (named, identity, custom) =
        (session.named(), session.identity.clone(), session.hints.custom.clone());
    let from = session.cell.clone();
    // The client goes on while its copy is made.
    shared.give(session);
    let reasons = match captured {
        Ok(captured) if captured.pins.is_empty() => match to {
            None => {
                // Its logins are closed while it hands over.
                if app.regime_now().state == CellState::Fenced
                    && let Ok(here) = &here
                {
                    let (identity, custom, limits) = (&identity, &custom, app.moves);
                    let model = Model { identity, custom, limits, here, there: here };
                    match carry::stage(&model, &captured.snapshot, &from).await {
                        Ok(Some(stage)) => app.keep_stage(id, stage),
                        Ok(None) => (),
                        Err(reason) => {
                            return Err(Some(Blocker { session: named, reasons: vec![reason] }));
                        }
                    }
                }
                return Ok(());
            }
            Some(cell) => {
                let snapshot = captured.snapshot;
                match copy_of(app, &identity, &custom, &from, snapshot, cell).await {
                    Ok(prepared) => {
                        app.keep_prepared(id, prepared);
                        return Ok(());
                    }
                    Err(reason) => vec![reason],
                }
            }
        },
        Ok(captured) => captured.pins.into_iter().map(Reason::Pinned).collect(),
        Err(reason) => vec![reason],
    };
    Err(Some(Blocker { session: named, reasons }))
}

async fn copy_of(
    app: &App,
    identity: &Identity,
    custom: &BTreeSet<String>,
    from: &Cell,
    snapshot: Snapshot,
    cell: &Cell,
) -> Result<Prepared, Reason> {
    let (here, there) =
        (app.facts(from, &identity.database)?, app.facts(cell, &identity.database)?);
    let limits = app.moves;
    let model = Model { identity, custom, limits, here: &here, there: &there };
    let mut prepared = carry::prepare(&model, &snapshot, cell).await?;
    if from.name != cell.name {
        let carried = Carried { snapshot, ..Carried::default() };
        carry::rehearse(&model, &carried, from, &mut prepared, None).await?;
    }
    Ok(prepared)
}
