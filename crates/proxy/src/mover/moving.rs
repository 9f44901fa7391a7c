//! Moving sessions one by one, while the rest of the application goes on.
//!
//! It takes the same steps as a switchover, with two differences. The old server goes on working for others, so
//! nothing may be given up there that they could take; and the session's backend is asked by the session itself.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::barrier::{Blocker, Pauses, Reason, Report};
use model::session::Pin;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::preparing::{PREPARE_WAITS, learn_all, prepare_one};
use super::{Mover, all, count, each};
use crate::app::{App, Cell};
use crate::carry::{self, Model};
use crate::engine::{Command, Want};
use crate::proxy::Shared;
use crate::session::{Session, terminate};

impl Mover {
    /// Moves one session of an application, or all, to a fresh connection of `to`.
    pub(super) async fn move_some(
        &mut self,
        app: &str,
        id: Option<u64>,
        to: &str,
        limit: Duration,
    ) -> Result<Report, String> {
        let app = self.app(app)?;
        let cell = Mover::cell(&app, to)?;
        let mut views = self.shared.views().await;
        views.retain(|view| view.app == app.name && id.is_none_or(|id| view.id == id));
        if let Some(id) = id
            && views.is_empty()
        {
            let name = &app.name;
            return Err(format!(
                "application `{name}` has no session {id}; see `holdfast sessions {name}`"
            ));
        }
        let databases = views.iter().map(|view| view.database.clone()).collect();
        let from = app.active().filter(|from| from.name != cell.name);
        all(learn_all(&app, from.into_iter().chain([cell.clone()]), &databases)).await?;
        let deadline = Instant::now() + limit;
        let ids: Vec<u64> = views.iter().map(|view| view.id).collect();
        let mut report = Report { sessions: count(ids.len()), ..Report::default() };
        let mut pauses = Vec::new();
        let moving = each(ids, self.shared.config.limits.moves_at_once, |id| {
            let (shared, app, cell) = (self.shared.clone(), app.clone(), cell.clone());
            async move { move_one(&shared, &app, cell, id, deadline).await }
        });
        for result in all(moving).await? {
            match result {
                Ok(pause) => {
                    report.done += 1;
                    pauses.push(pause);
                    self.shared.metrics.count_move("moved", &[]);
                }
                Err(Some(blocker)) => {
                    self.shared.metrics.count_move("stayed", &blocker.reasons);
                    report.blockers.push(blocker);
                }
                // It ended meanwhile.
                Err(None) => report.sessions = report.sessions.saturating_sub(1),
            }
        }
        app.forget();
        report.blockers.sort_by_key(|blocker| blocker.session.id);
        report.pauses = Pauses::of(pauses);
        Ok(report)
    }
}

/// Moves one session; gives how long it was held, in milliseconds.
async fn move_one(
    shared: &Shared,
    app: &Arc<App>,
    cell: Arc<Cell>,
    id: u64,
    deadline: Instant,
) -> Result<f64, Option<Blocker>> {
    match prepare_one(shared, app, Some(&cell), id, PREPARE_WAITS[0]).await {
        Ok(()) => (),
        // It is waited for below, and read then.
        Err(Some(blocker)) if matches!(blocker.reasons.as_slice(), [Reason::Busy { .. }]) => (),
        Err(other) => return Err(other),
    }
    let mut session = take(shared, id, deadline).await?;
    session.held_since = Some(Instant::now());
    let result = swap_one(&mut session, app, cell).await;
    let named = session.named();
    let mut pauses = Vec::new();
    shared.go_on(session, &mut pauses);
    match result {
        Ok(()) => Ok(pauses.first().copied().unwrap_or_default()),
        Err(reasons) => Err(Some(Blocker { session: named, reasons })),
    }
}

/// Takes a session from its engine at its next safe point.
pub(super) async fn take(
    shared: &Shared,
    id: u64,
    deadline: Instant,
) -> Result<Box<Session>, Option<Blocker>> {
    let (out, mut incoming) = mpsc::unbounded_channel();
    for engine in &shared.engines {
        engine.send(Command::Want(Want::One(id), out.clone()));
    }
    drop(out);
    let left = deadline.saturating_duration_since(Instant::now());
    let mut taken = timeout(left, incoming.recv()).await.ok().flatten();
    if taken.is_none() {
        for engine in &shared.engines {
            engine.send(Command::Unwant(Want::One(id)));
        }
        let views = shared.views().await;
        // It may have been handed out at the very end of the wait.
        taken = incoming.try_recv().ok();
        if taken.is_none() {
            let view = views.into_iter().find(|view| view.id == id).ok_or(None)?;
            return Err(Some(view.into_busy()));
        }
    }
    taken.ok_or(None)
}

/// Puts a held session on a fresh connection of `cell`. After an error it stands where it stood.
async fn swap_one(session: &mut Session, app: &App, cell: Arc<Cell>) -> Result<(), Vec<Reason>> {
    let one = |reason: Reason| vec![reason];
    if session.is_detached() {
        if app.active().is_some_and(|active| Arc::ptr_eq(&active, &cell)) {
            return Ok(());
        }
        let error = "it shares the server connections of the active cell".into();
        return Err(one(Reason::Failed { error }));
    }
    let database = session.identity.database.clone();
    let here = app.facts(&session.cell, &database).map_err(one)?;
    let there = app.facts(&cell, &database).map_err(one)?;
    let mut captured = carry::capture(session, &here, true).await.map_err(one)?;
    captured.complete(&here, session.backend_pid);
    if !captured.snapshot.locks.is_empty() {
        captured.pins.push(Pin::Locks { held: captured.snapshot.locks.len() });
    }
    if !captured.pins.is_empty() {
        return Err(captured.pins.into_iter().map(Reason::Pinned).collect());
    }
    let carried = carry::take(session, captured, &here).await.map_err(one)?;
    let (identity, custom) = (session.identity.clone(), session.hints.custom.clone());
    let model = Model {
        identity: &identity,
        custom: &custom,
        limits: app.moves,
        here: &here,
        there: &there,
    };
    let prepared = app.take_prepared(session.id);
    let attached =
        match carry::ensure(session, &carried, (prepared, None), &cell, &model, true).await {
            Ok(prepared) => carry::attach_live(session, &carried, prepared, &model).await,
            Err(reason) => Err(reason),
        };
    let attached = match attached {
        Ok(attached) => attached,
        Err(reason) => {
            carry::put_back(session, &carried).await;
            return Err(one(reason));
        }
    };
    let mut old = match session.swap(attached, cell) {
        Ok(old) => old,
        Err(error) => {
            // What it listened to has been handed over already.
            carry::cut(session);
            return Err(one(Reason::ServerLost { error: error.to_string() }));
        }
    };
    terminate(&mut old);
    Ok(())
}
