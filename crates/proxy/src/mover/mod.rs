//! Obeys the orders of a switchover, application by application. Between orders it holds sessions as values.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use model::barrier::{Blocker, Order, Pauses, Reason, Report, SessionView};
use model::cell::{CellState, Epoch};
use model::session::Facts;
use model::session::capture::Captured;
use model::switchover::OnTimeout;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::timeout;
use wire::backend;
use wire::sqlstate::SqlState;

use crate::app::{App, Cell};
use crate::carry::{self, Carried};
use crate::config::PolicyConfig;
use crate::engine::{Command, Want};
use crate::pool::keeper::FENCE;
use crate::proxy::Shared;
use crate::session::{Leg, Session};

mod attaching;
mod held;
mod moving;
mod preparing;

use held::{capture_one, read_held};
use preparing::{PREPARE_WAITS, learn_all, prepare_one};

/// How often counts are looked at while sessions come in.
const POLL: Duration = Duration::from_millis(2);
/// Connections left behind that are ended at once, and the rest between: each costs its server a process's end.
const RETIRED_AT_ONCE: usize = 8;
const RETIRE_PAUSE: Duration = Duration::from_millis(10);
/// However many there are, they are ended within about this time.
const RETIRE_MAX: Duration = Duration::from_secs(2);
/// How long sessions may take to leave a server that is lost.
const CUT_MAX: Duration = Duration::from_secs(2);

/// Between two tries to learn what names stand for, and how many there are.
const LEARN_PAUSE: Duration = Duration::from_secs(2);
const LEARN_TRIES: u32 = 150;

struct Held {
    session: Box<Session>,
    read: Read,
    /// What its old server had for it has been heard.
    is_heard_out: bool,
}

/// How far a held session is read.
enum Read {
    Not,
    /// Since it is held, by these facts.
    Captured(Box<Captured>, Arc<Facts>),
    Failed(Reason),
    /// Nothing is in its way, and its copy stands ready.
    Ready(Box<Carried>),
}

impl Read {
    /// Other sessions can see whether it stands, or be in its way: they would get its locks, wake nobody, or hold
    /// the sequence whose value it is given.
    fn is_seen_by_others(&self) -> bool {
        let Read::Ready(carried) = self else { return false };
        let snapshot = &carried.snapshot;
        !(snapshot.locks.is_empty()
            && snapshot.channels.is_empty()
            && snapshot.sequences.is_empty())
    }

    /// Its old server may have something for it, or must be asked once more when nobody else is left there.
    fn has_last_words(&self) -> bool {
        matches!(self, Read::Ready(carried)
            if !(carried.snapshot.locks.is_empty() && carried.snapshot.channels.is_empty()))
    }
}

/// A held session that something is done with, and how that went.
type AtWork = JoinSet<(Held, Result<(), Reason>)>;

/// What is held of one application.
#[derive(Default)]
struct Holding {
    sessions: Vec<Held>,
    /// Those that stand on the other server already.
    attached: Vec<Held>,
    incoming: Option<mpsc::UnboundedReceiver<Box<Session>>>,
    /// The cell that they stand on, and their databases.
    from: Option<Arc<Cell>>,
    databases: BTreeSet<String>,
    /// How long those were held that go on, in milliseconds.
    pauses: Vec<f64>,
    /// Sessions that are being read, or whose locks are being counted, while other things go on.
    at_work: AtWork,
}

impl Holding {
    /// Waits until nothing is done any more with any session, and gives those with which it failed.
    async fn settle(&mut self) -> Result<Vec<(Held, Reason)>, String> {
        let mut failed = Vec::new();
        for (held, result) in all(std::mem::take(&mut self.at_work)).await? {
            match result {
                Ok(()) => self.sessions.push(held),
                Err(reason) => failed.push((held, reason)),
            }
        }
        Ok(failed)
    }
}

/// One per proxy. Orders come one at a time.
pub struct Mover {
    shared: Arc<Shared>,
    holdings: HashMap<String, Holding>,
    /// Connections to the old server of sessions that have moved, by application.
    retired: HashMap<String, Vec<Leg>>,
}

/// Learns what names stand for that could not be learned in time: until then whatever calls something is taken for code.
async fn learn_late(app: Arc<App>, databases: BTreeSet<String>) {
    for _ in 0..LEARN_TRIES {
        tokio::time::sleep(LEARN_PAUSE).await;
        let Some(cell) = app.active() else { continue };
        for database in &databases {
            app.learn_catalog(&cell, database).await;
        }
        let regime = app.regime_now();
        if databases.iter().all(|database| regime.catalogs.contains_key(database)) {
            return;
        }
    }
}

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
            Order::Backends { app } => self.backends(&app).await,
            Order::Capture { app, to, on_timeout } => self.capture(&app, &to, on_timeout).await,
            Order::HearOut { app } => self.hear_out(&app).await,
            Order::AttachFirst { app, to } => self.attach_first(&app, &to).await,
            Order::Attach { app, to } => self.attach(&app, &to).await,
            Order::Release { app, to, state, epoch } => self.release(&app, &to, state, epoch).await,
            Order::Cut { app } => self.cut(&app).await,
            Order::GiveUp { app } => self.give_up(&app).await,
            Order::Retire { app } => Ok(self.retire(&app).await),
            Order::List { app } => Ok(self.list(&app).await),
            Order::Compare { app } => self.compare(&app),
            Order::Reload { app } => self.reload(&app).await,
            Order::Move { app, session, to, deadline_ms } => {
                self.move_some(&app, session, &to, Duration::from_millis(deadline_ms)).await
            }
        };
        result.unwrap_or_else(|error| Report { error: Some(error), ..Report::default() })
    }

    /// The rules in the configuration file, if there are others than sessions are judged by.
    fn other_rules(&self, app: &App) -> Result<Option<PolicyConfig>, String> {
        let Some(reread) = self.shared.rereads.get() else { return Ok(None) };
        let read = reread(&app.name)?;
        match read.waits {
            _ if !app.has_other_rules(&read.policy) => Ok(None),
            Some(why) => Err(why),
            None => Ok(Some(read.policy)),
        }
    }

    fn compare(&self, app: &str) -> Result<Report, String> {
        let is_other = self.other_rules(&*self.app(app)?)?.is_some();
        Ok(Report { done: u64::from(is_other), ..Report::default() })
    }

    /// Goes by the rules in the file from here on, whatever is held or not.
    async fn reload(&self, app: &str) -> Result<Report, String> {
        let app = self.app(app)?;
        let Some(config) = self.other_rules(&app)? else { return Ok(Report::default()) };
        tracing::info!(app = app.name, version = config.policy.version, "rules are taken up");
        let views = self.shared.views().await;
        let databases = views.into_iter().filter(|view| view.app == app.name);
        let missing = app.take_up(config, &databases.map(|view| view.database).collect()).await;
        for engine in &self.shared.engines {
            // Whoever waits for rules to let it go on is judged again.
            engine.send(Command::Resume(app.clone()));
        }
        if !missing.is_empty() {
            tokio::spawn(learn_late(app, missing));
        }
        Ok(Report { done: 1, ..Report::default() })
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
        let databases = views.iter().map(|view| view.database.clone()).collect();
        let cells = app.active().into_iter().chain(to.clone());
        all(learn_all(&app, cells, &databases)).await?;
        let mut ids: Vec<u64> = views.iter().map(|view| view.id).collect();
        let mut report = Report { sessions: count(ids.len()), ..Report::default() };
        for wait in PREPARE_WAITS {
            let prepared = each(ids, self.shared.config.limits.moves_at_once, |id| {
                let (shared, app, to) = (self.shared.clone(), app.clone(), to.clone());
                async move { prepare_one(&shared, &app, to.as_deref(), id, wait).await }
            });
            // A busy one may be idle a little later; it would be read during the switch.
            let mut busy = Vec::new();
            for result in all(prepared).await? {
                match result {
                    Ok(()) => report.done += 1,
                    Err(Some(blocker)) => {
                        let is_busy = matches!(blocker.reasons.as_slice(), [Reason::Busy { .. }]);
                        if is_busy { busy.push(blocker) } else { report.blockers.push(blocker) }
                    }
                    // It ended meanwhile.
                    Err(None) => report.sessions = report.sessions.saturating_sub(1),
                }
            }
            ids = busy.iter().map(|blocker| blocker.session.id).collect();
            if wait == PREPARE_WAITS[PREPARE_WAITS.len() - 1] || ids.is_empty() || to.is_none() {
                report.blockers.extend(busy);
                break;
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
        let Holding { sessions: held, incoming, at_work, from, databases, .. } = holding;
        let places = Arc::new(Semaphore::new(self.shared.config.limits.moves_at_once));
        while held.len() + at_work.len() < app.sessions.load(Ordering::SeqCst)
            && Instant::now() < deadline
        {
            let Some(incoming) = incoming else { break };
            if let Ok(received) = timeout(POLL, incoming.recv()).await {
                // No engine is left that could hand one out.
                let Some(mut session) = received else { break };
                session.held_since = Some(Instant::now());
                from.get_or_insert_with(|| session.cell.clone());
                if !databases.contains(&session.identity.database) {
                    databases.insert(session.identity.database.clone());
                }
                let (app, places) = (app.clone(), places.clone());
                // Read at once, while others still come in: nothing of it can change while it is held.
                at_work.spawn(async move {
                    let _place = places.acquire_owned().await;
                    let read = read_held(&mut session, &app).await;
                    (Held { session, read, is_heard_out: false }, Ok(()))
                });
            }
        }
        let done = held.len() + at_work.len();
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

    async fn backends(&mut self, app: &str) -> Result<Report, String> {
        let mut report = Report::default();
        let Some(holding) = self.holdings.get_mut(app) else { return Ok(report) };
        // Those that are still being read are held as well.
        let lost = holding.settle().await?;
        let attached = holding.sessions.iter().filter(|held| !held.session.is_detached());
        report.backends = attached.map(|held| held.session.backend_pid).collect();
        if let Some(app) = self.shared.app(app) {
            report.backends.extend(app.stage_pids());
        }
        self.end_lost(lost, &mut report);
        Ok(report)
    }

    async fn busy(&self, app: &App) -> Vec<Blocker> {
        let views = self.shared.views().await;
        let of_app = views.into_iter().filter(|view| view.app == app.name);
        of_app.map(SessionView::into_busy).collect()
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
        // Anew, for what backends hold and for functions made since: nothing of it can change any more. Meanwhile
        // the last sessions are read, which does not fail by itself.
        let learning = learn_all(&app, holding.from.clone(), &holding.databases);
        // The target's were learned beforehand, but for databases that nobody was in then.
        let unknown = |name: &&String| app.facts(&cell, name).is_err();
        let unknown = holding.databases.iter().filter(unknown).cloned().collect();
        let learning_there = learn_all(&app, [cell.clone()], &unknown);
        holding.settle().await?;
        all(learning).await?;
        all(learning_there).await?;
        let held = std::mem::take(&mut holding.sessions);
        report.sessions = count(held.len());
        let captured = each(held, self.shared.config.limits.moves_at_once, |mut held| {
            let (app, cell) = (app.clone(), cell.clone());
            async move {
                let result = capture_one(&mut held, &app, &cell).await;
                (held, result)
            }
        });
        for (held, result) in all(captured).await? {
            match result {
                Ok(()) => {
                    report.done += 1;
                    holding.sessions.push(held);
                }
                // It has ended by itself, so it is in nobody's way.
                Err(reasons) if matches!(reasons.as_slice(), [Reason::ServerLost { .. }]) => {
                    report.told += 1;
                    self.shared.metrics.count_move("lost", &reasons);
                    held.session.tell_and_end(&lost());
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

    /// Begins to hear what the fenced server still has for held sessions: how often each holds its locks, and
    /// notifications that were sent since it was read. Meanwhile the target is promoted.
    async fn hear_out(&mut self, app: &str) -> Result<Report, String> {
        let app = self.app(app)?;
        let holding = self.holdings.entry(app.name.clone()).or_default();
        // It may be ordered twice, where the first answer was lost.
        let lost = holding.settle().await?;
        let (with, without): (Vec<Held>, Vec<Held>) = std::mem::take(&mut holding.sessions)
            .into_iter()
            .partition(|held| held.read.has_last_words() && !held.is_heard_out);
        holding.sessions = without;
        let mut report = Report { sessions: count(with.len()), ..Report::default() };
        self.end_lost(lost, &mut report);
        let holding = self.holdings.entry(app.name.clone()).or_default();
        let limits = &self.shared.config.limits;
        holding.at_work = each(with, limits.moves_at_once, async |mut held| {
            held.is_heard_out = true;
            let result = match &mut held.read {
                Read::Ready(carried) => {
                    carry::hear_out(&mut held.session, &mut carried.snapshot).await
                }
                _ => Ok(()),
            };
            (held, result)
        });
        Ok(report)
    }

    /// Ends sessions that have lost their locks, and with them their server.
    fn end_lost(&self, lost: Vec<(Held, Reason)>, report: &mut Report) {
        for (held, reason) in lost {
            report.told += 1;
            let (named, reasons) = (held.session.named(), vec![reason]);
            self.shared.metrics.count_move("lost", &reasons);
            held.session
                .tell_and_end(&forced("its locks or notifications were lost with its server"));
            report.blockers.push(Blocker { session: named, reasons });
        }
    }

    async fn list(&self, app: &str) -> Report {
        let mut listed = self.shared.views().await;
        listed.retain(|view| view.app == app);
        Report { sessions: count(listed.len()), listed, ..Report::default() }
    }

    /// Takes every session from a server that is lost. Those that cannot go on without it are told by their engines.
    async fn cut(&mut self, app: &str) -> Result<Report, String> {
        let app = self.app(app)?;
        let before = app.sessions.load(Ordering::SeqCst);
        self.shared.cut(&app);
        let deadline = Instant::now() + CUT_MAX;
        // An engine that has a lot to read from one may need several turns. Those that are looked at come later.
        while Instant::now() < deadline {
            let views = self.shared.views().await;
            let mut attached = views.iter().filter(|v| v.app == app.name && !v.server.is_empty());
            if attached.next().is_none() {
                break;
            }
            tokio::time::sleep(POLL).await;
        }
        let left = app.sessions.load(Ordering::SeqCst);
        let told = count(before.saturating_sub(left));
        Ok(Report { sessions: count(before), done: count(left), told, ..Report::default() })
    }

    /// Tells and ends every held session. Those that go on already are left alone; the gate stays closed, so new
    /// logins wait for their own deadline.
    async fn give_up(&mut self, app: &str) -> Result<Report, String> {
        let app = self.app(app)?;
        app.forget();
        let mut holding = self.holdings.remove(&app.name).unwrap_or_default();
        for engine in &self.shared.engines {
            engine.send(Command::Unwant(Want::App(app.clone())));
        }
        let lost = holding.settle().await?;
        self.take_in(&mut holding).await;
        let held = holding.sessions.len() + holding.attached.len();
        let mut report = Report { sessions: count(held), ..Report::default() };
        self.end_lost(lost, &mut report);
        for held in holding.attached.into_iter().chain(holding.sessions) {
            report.told += 1;
            self.shared.metrics.count_move("gave_up", &[]);
            held.session.tell_and_end(&no_server());
        }
        Ok(report)
    }

    /// Takes sessions in that were handed out after the last look, once nobody wants them any more.
    async fn take_in(&self, holding: &mut Holding) {
        let Some(mut incoming) = holding.incoming.take() else { return };
        // The engines answer in order, so whatever was on its way is here once they have answered this.
        let _ = self.shared.views().await;
        incoming.close();
        while let Some(session) = incoming.recv().await {
            holding.sessions.push(Held { session, read: Read::Not, is_heard_out: false });
        }
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

    /// Ends sessions whose transactions would write by themselves, although their server is fenced: they have set it so.
    async fn end_unfenced(&self, holding: &mut Holding, report: &mut Report) -> Result<(), String> {
        let (attached, mut rest): (Vec<Held>, Vec<Held>) = std::mem::take(&mut holding.sessions)
            .into_iter()
            .partition(|held| !held.session.is_detached());
        let asked = each(attached, self.shared.config.limits.moves_at_once, async |mut held| {
            let is_fenced = carry::is_fenced(&mut held.session).await;
            (held, is_fenced)
        });
        let mut unfenced = Vec::new();
        for (held, is_fenced) in all(asked).await? {
            match is_fenced {
                Ok(true) => rest.push(held),
                Ok(false) => unfenced.push(held),
                Err(_) => {
                    report.told += 1;
                    held.session.tell_and_end(&lost());
                }
            }
        }
        for mut held in rest {
            // If it stands on no server, the next one is fenced.
            held.session.has_lifted_fence = false;
            let sets = held.session.sharing.as_ref().is_some_and(|sharing| {
                let is_off = |of: &BTreeMap<String, String>| {
                    of.get(FENCE).is_none_or(|value| value == "off")
                };
                let welcome = sharing.pool.welcome(&held.session.cell);
                let is_given = welcome.is_none_or(|welcome| is_off(&welcome.fresh.settings));
                sharing.state.as_ref().is_some_and(|state| is_off(&state.settings)) && !is_given
            });
            if sets {
                unfenced.push(held);
            } else {
                holding.sessions.push(held);
            }
        }
        for held in unfenced {
            report.told += 1;
            let why =
                "it has set `default_transaction_read_only` to off, and its cell takes no writes";
            let told = backend::Report::fatal(
                SqlState::ADMIN_SHUTDOWN,
                "terminating connection due to administrator command",
            );
            held.session.tell_and_end(&told.detail(why).hint("connect again to read"));
        }
        Ok(())
    }

    /// Opens the gate to `to` and gives every held session back to an engine.
    async fn release(
        &mut self,
        app: &str,
        to: &str,
        state: CellState,
        epoch: Epoch,
    ) -> Result<Report, String> {
        let app = self.app(app)?;
        let cell = Mover::cell(&app, to)?;
        app.forget();
        let mut holding = self.holdings.remove(&app.name).unwrap_or_default();
        for engine in &self.shared.engines {
            engine.send(Command::Unwant(Want::App(app.clone())));
        }
        let lost = holding.settle().await?;
        let held = holding.sessions.len() + holding.attached.len();
        let mut report = Report { sessions: count(held), ..Report::default() };
        self.end_lost(lost, &mut report);
        let mut databases = holding.databases.clone();
        let views = self.shared.views().await;
        databases.extend(views.into_iter().filter(|v| v.app == app.name).map(|v| v.database));
        app.confine(&cell, state, epoch, &databases).await;
        if !state.takes_writes() {
            self.end_unfenced(&mut holding, &mut report).await?;
        }
        app.open(cell.clone());
        for engine in &self.shared.engines {
            engine.send(Command::Resume(app.clone()));
        }
        for held in std::mem::take(&mut holding.attached) {
            self.shared.go_on(held.session, &mut holding.pauses);
        }
        // On a new server these would be lost ones.
        self.take_in(&mut holding).await;
        for held in std::mem::take(&mut holding.sessions) {
            if held.session.cell.name != cell.name {
                report.told += 1;
                held.session.tell_and_end(&forced("it came to a safe point only after the switch"));
                continue;
            }
            let mut session = held.session;
            if let Read::Ready(carried) = &held.read {
                // The switch was taken back.
                carry::put_back(&mut session, carried).await;
            }
            if let Err(reason) = carry::unstill(&mut session).await {
                tracing::error!(session = session.id, %reason, "a setting could not be put back");
                carry::cut(&mut session);
            }
            self.shared.go_on(session, &mut holding.pauses);
        }
        report.done = count(holding.pauses.len());
        report.sessions = report.sessions.max(report.done);
        report.pauses = Pauses::of(holding.pauses);
        Ok(report)
    }
}

/// Begins `work` for each of `items`, so many at once.
fn each<T, R, F>(
    items: impl IntoIterator<Item = T>,
    at_once: usize,
    work: impl Fn(T) -> F,
) -> JoinSet<R>
where
    R: Send + 'static,
    F: Future<Output = R> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(at_once));
    let mut tasks = JoinSet::new();
    for item in items {
        let (places, work) = (places.clone(), work(item));
        tasks.spawn(async move {
            let _place = places.acquire_owned().await;
            work.await
        });
    }
    tasks
}

/// The results, in the order in which they are ready.
async fn all<R: 'static>(mut tasks: JoinSet<R>) -> Result<Vec<R>, String> {
    let mut results = Vec::with_capacity(tasks.len());
    while let Some(result) = tasks.join_next().await {
        results.push(result.map_err(|error| format!("work on a session broke off: {error}"))?);
    }
    Ok(results)
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

fn no_server() -> backend::Report {
    backend::Report::fatal(SqlState::CANNOT_CONNECT_NOW, "no server takes work at the moment")
        .detail("a switchover stands still after its point of no return")
        .hint("connect again later; whoever runs the databases sees why in `holdfast executions`")
}

fn lost() -> backend::Report {
    backend::Report::fatal(SqlState::CONNECTION_FAILURE, "server closed the connection")
        .detail("it ended while the session was held for a switchover")
}
