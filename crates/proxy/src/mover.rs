//! Obeys the orders of a switchover, application by application. Between orders it holds sessions as values.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use model::barrier::{Blocker, Order, Pauses, Reason, Report};
use model::session::{Facts, Snapshot};
use model::switchover::OnTimeout;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use wire::backend;
use wire::sqlstate::SqlState;

use crate::app::{App, Cell};
use crate::carry::{self, Model, Prepared};
use crate::engine::{Command, Want};
use crate::proxy::Shared;
use crate::session::{Identity, Leg, Session, SessionView};

/// How long one session is waited for while it is prepared; a busy one is read during the switch.
const PREPARE_WAIT: Duration = Duration::from_millis(100);
/// How often counts are looked at while sessions come in.
const POLL: Duration = Duration::from_millis(2);
/// A cancel request on its way is waited for so long before its session is read.
const CANCEL_WAIT: Duration = Duration::from_secs(1);
/// Connections left behind that are ended at once, and the rest between: each costs its server a process's end.
const RETIRED_AT_ONCE: usize = 8;
const RETIRE_PAUSE: Duration = Duration::from_millis(10);
/// However many there are, they are ended within about this time.
const RETIRE_MAX: Duration = Duration::from_secs(2);

struct Held {
    session: Box<Session>,
    snapshot: Option<Snapshot>,
}

/// What is held of one application.
#[derive(Default)]
struct Holding {
    sessions: Vec<Held>,
    incoming: Option<mpsc::UnboundedReceiver<Box<Session>>>,
}

/// One per proxy. Orders come one at a time.
pub struct Mover {
    shared: Arc<Shared>,
    holdings: HashMap<String, Holding>,
    /// Connections to the old server of sessions that have moved, by application.
    retired: HashMap<String, Vec<Leg>>,
}

type Captures = Vec<(Held, Result<(), Vec<Reason>>)>;

impl Mover {
    pub(crate) fn new(shared: Arc<Shared>) -> Mover {
        Mover { shared, holdings: HashMap::new(), retired: HashMap::new() }
    }

    /// Obeys one order to its end.
    pub async fn obey(&mut self, order: Order) -> Report {
        let result = match order {
            Order::Inspect { app } => self.prepare(&app, None).await,
            Order::Prepare { app, to } => self.prepare(&app, Some(&to)).await,
            Order::Hold { app, deadline_ms, on_timeout } => {
                self.hold(&app, Duration::from_millis(deadline_ms), on_timeout).await
            }
            Order::Backends { app } => Ok(self.backends(&app)),
            Order::Capture { app, to, on_timeout } => self.capture(&app, &to, on_timeout).await,
            Order::CountLocks { app } => self.count_locks(&app).await,
            Order::Attach { app, to } => self.attach(&app, &to).await,
            Order::Release { app, to } => self.release(&app, &to).await,
            Order::Retire { app } => Ok(self.retire(&app).await),
        };
        result.unwrap_or_else(|error| Report { error: Some(error), ..Report::default() })
    }

    fn app(&self, name: &str) -> Result<Arc<App>, String> {
        self.shared.app(name).ok_or_else(|| format!("this proxy has no application `{name}`"))
    }

    fn cell(app: &App, name: &str) -> Result<Arc<Cell>, String> {
        app.cells
            .get(name)
            .cloned()
            .ok_or_else(|| format!("application `{}` has no cell `{name}`", app.name))
    }

    /// Reads every session at its next idle moment, and attaches a copy of it to `to`, if one is named.
    async fn prepare(&mut self, app: &str, to: Option<&str>) -> Result<Report, String> {
        let app = self.app(app)?;
        let to = to.map(|name| Mover::cell(&app, name)).transpose()?;
        if to.is_some() {
            app.forget();
        }
        let mut views = self.shared.views().await;
        views.retain(|view| view.app == app.name);
        let databases: BTreeSet<&str> = views.iter().map(|view| view.database.as_str()).collect();
        let cells = app.active().into_iter().chain(to.clone());
        learn_all(&app, cells, &databases).await;
        let ids: Vec<u64> = views.iter().map(|view| view.id).collect();
        let places = Arc::new(Semaphore::new(self.shared.config.limits.moves_at_once));
        let mut tasks = JoinSet::new();
        for id in &ids {
            let (shared, app, to, places, id) =
                (self.shared.clone(), app.clone(), to.clone(), places.clone(), *id);
            tasks.spawn(async move {
                let _place = places.acquire_owned().await;
                prepare_one(&shared, &app, to.as_deref(), id).await
            });
        }
        let mut report = Report { sessions: count(ids.len()), ..Report::default() };
        while let Some(result) = tasks.join_next().await {
            match result {
                Ok(Ok(())) => report.done += 1,
                Ok(Err(Some(blocker))) => report.blockers.push(blocker),
                // It ended meanwhile.
                Ok(Err(None)) => report.sessions = report.sessions.saturating_sub(1),
                Err(error) => return Err(format!("preparing a session broke off: {error}")),
            }
        }
        report.blockers.sort_by_key(|blocker| blocker.session.id);
        Ok(report)
    }

    /// Closes the gate and collects sessions as they come to a safe point.
    async fn hold(
        &mut self,
        app: &str,
        limit: Duration,
        on_timeout: OnTimeout,
    ) -> Result<Report, String> {
        let app = self.app(app)?;
        let deadline = Instant::now() + limit;
        let holding = self.holdings.entry(app.name.clone()).or_default();
        if holding.incoming.is_none() {
            let (out, incoming) = mpsc::unbounded_channel();
            app.hold();
            for engine in &self.shared.engines {
                engine.send(Command::Want(Want::App(app.clone()), out.clone()));
            }
            holding.incoming = Some(incoming);
        }
        let Holding { sessions: held, incoming } = holding;
        while held.len() < app.sessions.load(Ordering::SeqCst) && Instant::now() < deadline {
            if let Some(incoming) = incoming
                && let Ok(Some(mut session)) = timeout(POLL, incoming.recv()).await
            {
                session.held_since = Some(Instant::now());
                held.push(Held { session, snapshot: None });
            }
        }
        let done = held.len();
        let sessions = app.sessions.load(Ordering::SeqCst).max(done);
        let mut report =
            Report { sessions: count(sessions), done: count(done), ..Report::default() };
        if done < sessions {
            report.blockers = self.busy(&app).await;
        }
        if on_timeout == OnTimeout::Force && !report.blockers.is_empty() {
            report.told = count(report.blockers.len());
            let what = "its transaction did not end before the deadline of a switchover";
            for engine in &self.shared.engines {
                engine.send(Command::End(Want::App(app.clone()), forced(what)));
            }
            for blocker in &report.blockers {
                self.shared.metrics.count_move("forced", &blocker.reasons);
            }
        }
        Ok(report)
    }

    fn backends(&self, app: &str) -> Report {
        let held =
            self.holdings.get(app).map(|holding| holding.sessions.as_slice()).unwrap_or_default();
        Report {
            backends: held.iter().map(|held| held.session.backend_pid).collect(),
            ..Report::default()
        }
    }

    async fn busy(&self, app: &App) -> Vec<Blocker> {
        let blocker = |view: SessionView| Blocker {
            session: model::barrier::NamedSession {
                id: view.id,
                user: view.user,
                database: view.database,
                application_name: view.application_name,
            },
            reasons: vec![Reason::Busy { what: view.state }],
        };
        let views = self.shared.views().await;
        views.into_iter().filter(|view| view.app == app.name).map(blocker).collect()
    }

    /// Reads the state of every held session. By force, those that cannot be moved are told and ended.
    async fn capture(
        &mut self,
        app: &str,
        to: &str,
        on_timeout: OnTimeout,
    ) -> Result<Report, String> {
        let app = self.app(app)?;
        let cell = Mover::cell(&app, to)?;
        let force = on_timeout == OnTimeout::Force;
        let mut report = Report::default();
        let holding = self.holdings.entry(app.name.clone()).or_default();
        let held = std::mem::take(&mut holding.sessions);
        report.sessions = count(held.len());
        let databases: BTreeSet<&str> =
            held.iter().map(|held| held.session.identity.database.as_str()).collect();
        // Anew, for what backends hold and for functions made since: nothing of it can change any more.
        learn_all(&app, held.first().map(|held| held.session.cell.clone()), &databases).await;
        for (held, result) in
            capture_all(held, &app, &cell, self.shared.config.limits.moves_at_once).await?
        {
            match result {
                Ok(()) => {
                    report.done += 1;
                    holding.sessions.push(held);
                }
                Err(reasons) => {
                    report
                        .blockers
                        .push(Blocker { session: held.session.named(), reasons: reasons.clone() });
                    if force {
                        report.told += 1;
                        let why: Vec<String> = reasons.iter().map(Reason::to_string).collect();
                        self.shared.metrics.count_move("forced", &reasons);
                        held.session.tell_and_end(&forced(&why.join("; ")));
                    } else {
                        holding.sessions.push(held);
                    }
                }
            }
        }
        Ok(report)
    }

    /// Counts the locks of every held session. One that lost them on the way has lost its server.
    async fn count_locks(&mut self, app: &str) -> Result<Report, String> {
        let app = self.app(app)?;
        let holding = self.holdings.entry(app.name.clone()).or_default();
        let mut report = Report::default();
        for mut held in std::mem::take(&mut holding.sessions) {
            let Some(snapshot) = held.snapshot.as_mut().filter(|held| !held.locks.is_empty())
            else {
                holding.sessions.push(held);
                continue;
            };
            report.sessions += 1;
            match carry::count_locks(&mut held.session, snapshot).await {
                Ok(()) => {
                    report.done += 1;
                    holding.sessions.push(held);
                }
                Err(reason) => {
                    report.told += 1;
                    let (named, reasons) = (held.session.named(), vec![reason]);
                    self.shared.metrics.count_move("failed", &reasons);
                    held.session.tell_and_end(&forced("its advisory locks were lost"));
                    report.blockers.push(Blocker { session: named, reasons });
                }
            }
        }
        Ok(report)
    }

    /// Attaches every held session to `to`. One for which that fails cannot go back any more and is told.
    async fn attach(&mut self, app: &str, to: &str) -> Result<Report, String> {
        let app = self.app(app)?;
        let cell = Mover::cell(&app, to)?;
        let holding = self.holdings.entry(app.name.clone()).or_default();
        let held = std::mem::take(&mut holding.sessions);
        let mut report = Report { sessions: count(held.len()), ..Report::default() };
        let places = Arc::new(Semaphore::new(self.shared.config.limits.moves_at_once));
        let mut tasks = JoinSet::new();
        for mut held in held {
            let (app, cell, places) = (app.clone(), cell.clone(), places.clone());
            tasks.spawn(async move {
                let _place = places.acquire_owned().await;
                let result = attach_one(&mut held, &app, cell).await;
                (held, result)
            });
        }
        let retired = self.retired.entry(app.name.clone()).or_default();
        while let Some(result) = tasks.join_next().await {
            let (held, result) =
                result.map_err(|error| format!("attaching a session broke off: {error}"))?;
            match result {
                Ok(old) => {
                    retired.push(old);
                    report.done += 1;
                    self.shared.metrics.count_move("moved", &[]);
                    holding.sessions.push(held);
                }
                Err(reason) => {
                    report.told += 1;
                    let reasons = vec![reason];
                    self.shared.metrics.count_move("failed", &reasons);
                    let why = reasons.iter().map(Reason::to_string).collect::<Vec<_>>().join("; ");
                    report.blockers.push(Blocker { session: held.session.named(), reasons });
                    held.session.tell_and_end(&forced(&why));
                }
            }
        }
        Ok(report)
    }

    /// Ends the connections that moved sessions have left behind.
    async fn retire(&mut self, app: &str) -> Report {
        let mut retired = self.retired.remove(app).unwrap_or_default();
        let report = Report { done: count(retired.len()), ..Report::default() };
        let rounds = RETIRE_MAX.as_millis() / RETIRE_PAUSE.as_millis().max(1);
        let rounds = usize::try_from(rounds).unwrap_or(1).max(1);
        let at_once = RETIRED_AT_ONCE.max(retired.len().div_ceil(rounds));
        while !retired.is_empty() {
            for mut leg in retired.drain(..at_once.min(retired.len())) {
                crate::session::terminate(&mut leg);
            }
            tokio::time::sleep(RETIRE_PAUSE).await;
        }
        report
    }

    /// Opens the gate to `to` and gives every held session back to an engine.
    async fn release(&mut self, app: &str, to: &str) -> Result<Report, String> {
        let app = self.app(app)?;
        let cell = Mover::cell(&app, to)?;
        app.forget();
        let mut holding = self.holdings.remove(&app.name).unwrap_or_default();
        for engine in &self.shared.engines {
            engine.send(Command::Unwant(Want::App(app.clone())));
        }
        let mut pauses = Vec::new();
        let mut report = Report { sessions: count(holding.sessions.len()), ..Report::default() };
        app.open(cell.clone());
        // Sessions that were handed out after the last look. On a new server they would be lost ones.
        if let Some(mut incoming) = holding.incoming.take() {
            // The engines answer in order, so whatever was on its way is here once they have answered this.
            let _ = self.shared.views().await;
            incoming.close();
            while let Some(session) = incoming.recv().await {
                holding.sessions.push(Held { session, snapshot: None });
            }
        }
        for mut held in holding.sessions {
            if held.session.cell.name != cell.name {
                report.told += 1;
                held.session.tell_and_end(&forced("it came to a safe point only after the switch"));
                continue;
            }
            if let Some(since) = held.session.held_since.take() {
                let pause = since.elapsed();
                self.shared.metrics.count_pause(pause);
                pauses.push(pause.as_secs_f64() * 1_000.0);
            }
            report.done += 1;
            self.shared.give(held.session);
        }
        report.pauses = Pauses::of(pauses);
        Ok(report)
    }
}

/// Asks each server for what is the same for all sessions of each database. What fails is the sessions' reason.
async fn learn_all(
    app: &Arc<App>,
    cells: impl IntoIterator<Item = Arc<Cell>>,
    databases: &BTreeSet<&str>,
) {
    let mut tasks = JoinSet::new();
    for cell in cells {
        for database in databases {
            let (app, cell, database) = (app.clone(), cell.clone(), (*database).to_owned());
            tasks.spawn(async move { app.learn(&cell, &database).await });
        }
    }
    while tasks.join_next().await.is_some() {}
}

fn count(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

fn forced(why: &str) -> backend::Report {
    backend::Report::fatal(
        SqlState::ADMIN_SHUTDOWN,
        "terminating connection due to administrator command",
    )
    .detail(format!("the session could not be moved to another server: {why}"))
    .hint("connect again; the session's temporary state is lost")
}

async fn prepare_one(
    shared: &Shared,
    app: &Arc<App>,
    to: Option<&Cell>,
    id: u64,
) -> Result<(), Option<Blocker>> {
    let (out, mut incoming) = mpsc::unbounded_channel();
    for engine in &shared.engines {
        engine.send(Command::Want(Want::One(id), out.clone()));
    }
    drop(out);
    let Ok(Some(mut session)) = timeout(PREPARE_WAIT, incoming.recv()).await else {
        for engine in &shared.engines {
            engine.send(Command::Unwant(Want::One(id)));
        }
        let views = shared.views().await;
        // It may have been handed out at the very end of the wait.
        if let Ok(session) = incoming.try_recv() {
            shared.give(session);
            return Ok(());
        }
        let Some(view) = views.into_iter().find(|view| view.id == id) else { return Err(None) };
        let session = model::barrier::NamedSession {
            id,
            user: view.user,
            database: view.database,
            application_name: view.application_name,
        };
        return Err(Some(Blocker { session, reasons: vec![Reason::Busy { what: view.state }] }));
    };
    let here = app.facts(&session.cell, &session.identity.database);
    let captured = match &here {
        Ok(here) => carry::capture(&mut session, here).await,
        Err(reason) => Err(reason.clone()),
    };
    let (named, identity, custom) =
        (session.named(), session.identity.clone(), session.hints.custom.clone());
    // The client goes on while its copy is made.
    shared.give(session);
    let reasons = match captured {
        Ok(captured) if captured.pins.is_empty() => match to {
            None => return Ok(()),
            Some(cell) => {
                match copy_of(app, &identity, &custom, here, &captured.snapshot, cell).await {
                    Ok(prepared) => {
                        let mut all =
                            app.prepared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        all.insert(id, prepared);
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
    here: Result<Arc<Facts>, Reason>,
    snapshot: &Snapshot,
    cell: &Cell,
) -> Result<Prepared, Reason> {
    let (here, there) = (here?, app.facts(cell, &identity.database)?);
    carry::prepare(&Model { identity, custom, here: &here, there: &there }, snapshot, cell).await
}

async fn capture_all(
    held: Vec<Held>,
    app: &Arc<App>,
    cell: &Arc<Cell>,
    at_once: usize,
) -> Result<Captures, String> {
    let places = Arc::new(Semaphore::new(at_once));
    let mut tasks = JoinSet::new();
    for mut held in held {
        let (app, cell, places) = (app.clone(), cell.clone(), places.clone());
        tasks.spawn(async move {
            let _place = places.acquire_owned().await;
            let result = capture_one(&mut held, &app, &cell).await;
            (held, result)
        });
    }
    let mut all = Vec::new();
    while let Some(result) = tasks.join_next().await {
        all.push(result.map_err(|error| format!("reading a session broke off: {error}"))?);
    }
    Ok(all)
}

async fn capture_one(held: &mut Held, app: &App, cell: &Cell) -> Result<(), Vec<Reason>> {
    let deadline = Instant::now() + CANCEL_WAIT;
    while held.session.cancels_under_way() && Instant::now() < deadline {
        tokio::time::sleep(POLL).await;
    }
    let one = |reason: Reason| vec![reason];
    let database = &held.session.identity.database;
    let here = app.facts(&held.session.cell, database).map_err(one)?;
    let there = app.facts(cell, database).map_err(one)?;
    let captured = carry::capture(&mut held.session, &here).await.map_err(one)?;
    if !captured.pins.is_empty() {
        return Err(captured.pins.into_iter().map(Reason::Pinned).collect());
    }
    let id = held.session.id;
    let lock = || app.prepared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let prepared = lock().remove(&id);
    let copy =
        carry::ensure(&held.session, &captured.snapshot, prepared, cell, &here, &there).await;
    lock().insert(id, copy.map_err(one)?);
    held.snapshot = Some(captured.snapshot);
    Ok(())
}

async fn attach_one(held: &mut Held, app: &App, cell: Arc<Cell>) -> Result<Leg, Reason> {
    let failed = |error: &str| Reason::Failed { error: error.into() };
    let prepared = {
        let mut all = app.prepared.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.remove(&held.session.id)
    };
    let prepared = prepared.ok_or_else(|| failed("it has no copy on the other server"))?;
    let snapshot = held.snapshot.as_ref().ok_or_else(|| failed("its state was not read"))?;
    let database = &held.session.identity.database;
    let (here, there) = (app.facts(&held.session.cell, database)?, app.facts(&cell, database)?);
    let attached = carry::attach(&held.session, snapshot, prepared, &there, &here).await?;
    held.session.swap(attached, cell).map_err(|error| failed(&error.to_string()))
}
