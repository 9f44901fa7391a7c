//! One execution, stage by stage. What comes next is said by `model::switchover`; here it is recorded, done and
//! recorded again, so that whoever finds it after a crash knows where it stands.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use model::Lsn;
use model::agent::{Fetch, Fetched, Finished, Renew, Renewed, Sender};
use model::barrier::{Blocker, Order, Report};
use model::cell::{Application, CellState, Epoch};
use model::durability::Protection;
use model::failover::Analysis;
use model::persisted::{Execution, LogEntry, LogEvent};
use model::switchover::{Ending, Kind, Next, OnTimeout, Outcome, Stage, next, resume};
use serde::{Deserialize, Serialize};
use store::Store;
use thiserror::Error;
use tokio::sync::{Mutex, MutexGuard, oneshot};

use crate::agents::Link;
use crate::config::{AppServers, ControlConfig};
use crate::member::Member;
use crate::records::{self, RecordError};
use crate::watch::Seen;
use crate::{Proxies, stages};

/// Executions that are shown and kept in mind; older ones stay in the store.
pub const EXECUTIONS_SHOWN_MAX: usize = 100;

/// What a switchover is asked to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchoverRequest {
    pub to: String,
    #[serde(default)]
    pub dry_run: bool,
    /// How long running transactions may take to end.
    #[serde(default = "default_deadline_ms")]
    pub deadline_ms: u64,
    #[serde(default)]
    pub on_timeout: OnTimeout,
}

fn default_deadline_ms() -> u64 {
    30_000
}

/// What a cell is to be fenced from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceRequest {
    /// From reads as well.
    #[serde(default)]
    pub all: bool,
    /// How long running transactions may take to end.
    #[serde(default = "default_deadline_ms")]
    pub deadline_ms: u64,
    #[serde(default)]
    pub on_timeout: OnTimeout,
}

/// Which cell is to take the place of one whose server is lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverRequest {
    pub to: String,
    /// What the lost server alone has may be given up; and where Holdfast cannot see it, it is dead: you say so.
    #[serde(default)]
    pub allow_data_loss: bool,
    #[serde(default)]
    pub dry_run: bool,
}

/// The cell that clients are attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    pub cell: String,
    pub state: CellState,
    pub epoch: Epoch,
}

/// Which sessions are to be moved, and where to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// All of the application, if none is named.
    #[serde(default)]
    pub session: Option<u64>,
    /// A cell whose server may serve them, as the one where they stand.
    pub to: String,
    /// How long running transactions may take to end.
    #[serde(default = "default_deadline_ms")]
    pub deadline_ms: u64,
}

/// What a dry run found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DryRun {
    pub app: String,
    pub from: String,
    pub to: String,
    pub steps: Vec<String>,
    pub sessions: u64,
    pub movable: u64,
    pub blockers: Vec<Blocker>,
    /// Why it would be refused; empty if it would go.
    pub refusals: Vec<String>,
    /// Settings that the two servers' own files give otherwise; sessions keep what they have.
    pub configured_otherwise: Vec<String>,
}

#[derive(Debug, Error)]
pub enum ControlError {
    #[error("there is no application `{app}`; configured are {known}")]
    NoApp { app: String, known: String },
    #[error("application `{app}` has no cell `{cell}`; its cells are {known}")]
    NoCell { app: String, cell: String, known: String },
    #[error("cell `{cell}` is active already, in epoch {epoch}")]
    AlreadyActive { cell: String, epoch: u64 },
    #[error("cell `{cell}` is {state}, only a passive cell can become active")]
    NotPassive { cell: String, state: CellState },
    #[error("execution {id} is changing application `{app}`; see `holdfast executions {id}`")]
    UnderWay { app: String, id: u64 },
    #[error(
        "application `{app}` has no active cell, which this takes; see `holdfast status {app}`"
    )]
    NoActive { app: String },
    #[error("cell `{cell}` is {state}, only an active cell can be fenced")]
    NotActive { cell: String, state: CellState },
    #[error(
        "cell `{cell}` is {state}, only a cell that was fenced takes writes again by `unfence`"
    )]
    NotFenced { cell: String, state: CellState },
    #[error(
        "cell `{cell}` is {state}, but `{newest}` took writes after it; `holdfast unfence {app} {newest}`"
    )]
    NotNewest { app: String, cell: String, state: CellState, newest: String },
    #[error("{0}")]
    Refused(String),
    #[error("no execution {0}")]
    NoExecution(u64),
    #[error(
        "execution {id} has ended: {ending:?}; only one that is stuck or lacks its rejoin can be retried"
    )]
    NotRetryable { id: u64, ending: Option<Ending> },
    #[error("cell `{cell}` of application `{app}` has no agent by the configuration")]
    NoAgent { app: String, cell: String },
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Control of all applications of this process.
pub struct Control {
    pub config: ControlConfig,
    store: Arc<dyn Store>,
    proxies: Proxies,
    /// One execution an application at a time; the store says so as well, across processes.
    running: BTreeMap<String, Mutex<()>>,
    /// What was seen last of active cells, by application.
    seen: std::sync::Mutex<BTreeMap<String, Seen>>,
    /// Whoever reads an application to write it holds this, never across a wait: an execution is not to meet a conflict.
    writing: std::sync::Mutex<()>,
}

/// What an execution is asked to be.
struct Asked {
    kind: Kind,
    from: String,
    to: String,
    deadline_ms: u64,
    on_timeout: OnTimeout,
    allow_data_loss: bool,
    is_automatic: bool,
}

impl Asked {
    fn new(kind: Kind, from: String, to: String) -> Asked {
        let on_timeout = OnTimeout::Abort;
        let (allow_data_loss, is_automatic) = (false, false);
        Asked { kind, from, to, deadline_ms: 0, on_timeout, allow_data_loss, is_automatic }
    }
}

pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Control {
    /// Opens every application in the store.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub fn open(
        config: ControlConfig,
        store: Arc<dyn Store>,
        proxies: Proxies,
    ) -> Result<Arc<Control>, ControlError> {
        for (name, app) in &config.apps {
            let first = || Application::new(&app.first_active, app.cells.keys().cloned());
            let seen = records::open_application(&*store, name, first)?;
            for cell in seen.application.cells.keys() {
                if !app.cells.contains_key(cell) {
                    tracing::warn!(
                        app = name,
                        cell,
                        "the store knows a cell that is not configured"
                    );
                }
            }
        }
        let running = config.apps.keys().map(|app| (app.clone(), Mutex::default())).collect();
        let seen = Default::default();
        let writing = std::sync::Mutex::default();
        Ok(Arc::new(Control { config, store, proxies, running, seen, writing }))
    }

    /// The cell of each application that clients are attached to.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn served_cells(&self) -> Result<BTreeMap<String, Option<Served>>, ControlError> {
        let mut all = BTreeMap::new();
        for app in self.config.apps.keys() {
            let application = records::application(&*self.store, app)?.application;
            let served = application.served().map(|(cell, state)| Served {
                cell: cell.to_owned(),
                state,
                epoch: application.epoch,
            });
            all.insert(app.clone(), served);
        }
        Ok(all)
    }

    /// # Errors
    /// There is no such application, or the store cannot be read.
    pub fn application(&self, app: &str) -> Result<Application, ControlError> {
        self.servers(app)?;
        Ok(records::application(&*self.store, app)?.application)
    }

    /// The newest executions of an application, newest first.
    ///
    /// # Errors
    /// There is no such application, or the store cannot be read.
    pub fn executions(&self, app: &str) -> Result<Vec<Execution>, ControlError> {
        self.servers(app)?;
        let mut all = records::executions(&*self.store, app)?;
        all.reverse();
        all.truncate(EXECUTIONS_SHOWN_MAX);
        Ok(all)
    }

    /// # Errors
    /// The store cannot be read, or has no such execution.
    pub fn execution(&self, app: &str, id: u64) -> Result<Execution, ControlError> {
        records::execution(&*self.store, app, id)?.ok_or(ControlError::NoExecution(id))
    }

    fn write_alone(&self) -> std::sync::MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the server of a cell has a guard: it was a primary by a lease.
    pub(crate) fn is_attended(&self, app: &str, cell: &str) -> bool {
        records::is_attended(&*self.store, app, cell).unwrap_or(false)
    }

    pub(crate) fn servers(&self, app: &str) -> Result<&AppServers, ControlError> {
        self.config.apps.get(app).ok_or_else(|| ControlError::NoApp {
            app: app.into(),
            known: self.config.apps.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }

    /// Sends an order to the proxy and waits for its report, which has its own deadlines.
    pub async fn order(&self, order: Order) -> Report {
        let (tx, rx) = oneshot::channel();
        let gone =
            || Report { error: Some("the proxy does not answer".into()), ..Report::default() };
        if self.proxies.send((order, tx)).await.is_err() {
            return gone();
        }
        rx.await.unwrap_or_else(|_| gone())
    }

    /// Whoever holds this may change the application.
    fn take(&self, app: &str) -> Result<MutexGuard<'_, ()>, ControlError> {
        self.servers(app)?;
        let taken = self.running.get(app).and_then(|running| running.try_lock().ok());
        taken.ok_or_else(|| {
            let application = records::application(&*self.store, app);
            let id = application.ok().and_then(|seen| seen.application.execution).unwrap_or(0);
            ControlError::UnderWay { app: app.into(), id }
        })
    }

    fn check_cell(&self, app: &str, cell: &str) -> Result<(), ControlError> {
        let servers = self.servers(app)?;
        if servers.cells.contains_key(cell) {
            return Ok(());
        }
        let known = servers.cells.keys().cloned().collect::<Vec<_>>().join(", ");
        Err(ControlError::NoCell { app: app.into(), cell: cell.into(), known })
    }

    fn check(
        &self,
        app: &str,
        application: &Application,
        to: &str,
    ) -> Result<String, ControlError> {
        self.check_cell(app, to)?;
        if let Some(id) = application.execution {
            return Err(ControlError::UnderWay { app: app.into(), id });
        }
        let from =
            application.active().ok_or_else(|| ControlError::NoActive { app: app.into() })?;
        if from == to {
            return Err(ControlError::AlreadyActive {
                cell: to.into(),
                epoch: application.epoch.0,
            });
        }
        match application.cells.get(to) {
            Some(CellState::Passive) => Ok(from.to_owned()),
            state => Err(ControlError::NotPassive {
                cell: to.into(),
                state: state.copied().unwrap_or(CellState::Fenced),
            }),
        }
    }

    /// Looks at everything a switchover would need, and changes nothing.
    ///
    /// # Errors
    /// It would be refused at once.
    pub async fn dry_run(
        &self,
        app: &str,
        request: &SwitchoverRequest,
    ) -> Result<DryRun, ControlError> {
        let application = self.application(app)?;
        let from = self.check(app, &application, &request.to)?;
        let servers = self.servers(app)?;
        let mut refusals = Vec::new();
        let mut configured_otherwise = Vec::new();
        match stages::check_servers(servers, &from, &request.to).await {
            Err(refusal) => refusals.push(refusal),
            Ok((mut old, mut new, _)) => match stages::differences(&mut old, &mut new).await {
                Err(refusal) => refusals.push(refusal),
                Ok(names) => configured_otherwise = names,
            },
        }
        let report = self.order(Order::Inspect { app: app.into() }).await;
        Ok(DryRun {
            app: app.into(),
            to: request.to.clone(),
            steps: stages::describe(servers, &from, request),
            from,
            sessions: report.sessions,
            movable: report.done,
            blockers: report.blockers,
            refusals,
            configured_otherwise,
        })
    }

    /// Begins a switchover and runs it to its end.
    ///
    /// # Errors
    /// It is refused before anything was done. How it went otherwise is in the execution.
    pub async fn switchover(
        &self,
        app: &str,
        request: SwitchoverRequest,
    ) -> Result<Execution, ControlError> {
        let _taken = self.take(app)?;
        let seen = records::application(&*self.store, app)?;
        let from = self.check(app, &seen.application, &request.to)?;
        let SwitchoverRequest { to, deadline_ms, on_timeout, .. } = request;
        let asked = Asked::new(Kind::Switchover, from, to);
        self.execute(app, seen, Asked { deadline_ms, on_timeout, ..asked }).await
    }

    /// Looks at everything a failover would need, and changes nothing.
    ///
    /// # Errors
    /// It would be refused at once.
    pub async fn failover_dry_run(
        &self,
        app: &str,
        request: &FailoverRequest,
    ) -> Result<DryRun, ControlError> {
        let application = self.application(app)?;
        let from = self.check(app, &application, &request.to)?;
        let servers = self.servers(app)?;
        let asked = Asked::new(Kind::Failover, from.clone(), request.to.clone());
        let asked = Asked { allow_data_loss: request.allow_data_loss, ..asked };
        let mut execution = asked.execution(app, 0, &application);
        let assessed = stages::run(self, &mut execution, Stage::Assess).await;
        let report = self.order(Order::Inspect { app: app.into() }).await;
        Ok(DryRun {
            app: app.into(),
            to: request.to.clone(),
            steps: stages::describe_failover(servers, &execution),
            from,
            sessions: report.sessions,
            movable: report.done,
            blockers: report.blockers,
            refusals: assessed.err().into_iter().collect(),
            configured_otherwise: Vec::new(),
        })
    }

    /// Has another cell take the place of the active one, whose server is lost, and runs that to its end.
    ///
    /// # Errors
    /// It is refused before anything was done. How it went otherwise is in the execution.
    pub async fn fail_over(
        &self,
        app: &str,
        request: FailoverRequest,
        is_automatic: bool,
    ) -> Result<Execution, ControlError> {
        let _taken = self.take(app)?;
        let FailoverRequest { to, allow_data_loss, .. } = request;
        if let Some((stuck, application)) = self.stands_in_the_way(app)? {
            // It may have left its server fenced, so it goes only if this one comes about.
            let from = self.check(app, &application, &to)?;
            let asked = Asked::new(Kind::Failover, from, to.clone());
            let asked = Asked { allow_data_loss, ..asked };
            let mut provisional = asked.execution(app, 0, &application);
            stages::run(self, &mut provisional, Stage::Assess)
                .await
                .map_err(ControlError::Refused)?;
            self.supersede(app, stuck)?;
        }
        let seen = records::application(&*self.store, app)?;
        let from = self.check(app, &seen.application, &to)?;
        let asked = Asked::new(Kind::Failover, from, to);
        self.execute(app, seen, Asked { allow_data_loss, is_automatic, ..asked }).await
    }

    /// The application as it is watched over: an execution that stands still before its point of no return is in the way of
    /// nobody who fails over.
    ///
    /// # Errors
    /// There is no such application, or the store cannot be read.
    pub fn watched(&self, app: &str) -> Result<Application, ControlError> {
        match self.stands_in_the_way(app)? {
            Some((_, application)) => Ok(application),
            None => self.application(app),
        }
    }

    /// An execution that stands still before its point of no return, and the application without it.
    fn stands_in_the_way(
        &self,
        app: &str,
    ) -> Result<Option<(Execution, Application)>, ControlError> {
        let mut application = self.application(app)?;
        let Some(id) = application.execution else { return Ok(None) };
        let execution = self.execution(app, id)?;
        if !execution.is_stuck_before(&application) {
            return Ok(None);
        }
        application.execution = None;
        Ok(Some((execution, application)))
    }

    /// Writes an execution as it is, between the begin and the end of a stage.
    pub(crate) fn save(&self, execution: &Execution) -> Result<(), ControlError> {
        let _writing = self.write_alone();
        let seen = records::application(&*self.store, &execution.app)?;
        records::write(&*self.store, &execution.app, seen.revision, &seen.application, execution)?;
        Ok(())
    }

    /// A failover takes the place of an execution that stands still.
    fn supersede(&self, app: &str, mut execution: Execution) -> Result<(), ControlError> {
        let _writing = self.write_alone();
        let mut seen = records::application(&*self.store, app)?;
        execution.ending = Some(Ending::Aborted);
        if seen.application.state(&execution.from).map_err(RecordError::Cell)?
            == CellState::Draining
        {
            let from = execution.from.clone();
            seen.application.change(&from, CellState::Active).map_err(RecordError::Cell)?;
        }
        seen.application.execution = None;
        records::write(&*self.store, app, seen.revision, &seen.application, &execution)?;
        Ok(())
    }

    /// Where the active cell's server was seen last.
    pub(crate) fn last_seen(&self, app: &str) -> Option<Lsn> {
        self.seen(app)?.lsn
    }

    /// What was seen last of the active cell's server.
    pub fn seen(&self, app: &str) -> Option<Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(app).cloned()
    }

    pub(crate) fn forget_seen(&self, app: &str) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).remove(app);
    }

    pub(crate) fn note_seen(&self, app: &str, note: impl FnOnce(&mut Seen)) {
        let mut all = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        note(all.entry(app.to_owned()).or_insert_with(|| Seen {
            cell: String::new(),
            analysis: Analysis::NoProblem,
            lsn: None,
            blocked: None,
        }));
    }

    fn link(&self, sender: &Sender) -> Result<&Link, ControlError> {
        let Sender { app, cell, .. } = sender;
        match &self.servers(app)?.cells.get(cell).and_then(|server| server.member.as_ref()) {
            Some(Member::Agent(link)) => Ok(link),
            _ => Err(ControlError::NoAgent { app: app.clone(), cell: cell.clone() }),
        }
    }

    /// Answers an agent that asks for its lease.
    ///
    /// # Errors
    /// There is to be no such agent, or the store cannot be read, which says nothing of the lease.
    pub fn renew(&self, asked: &Renew) -> Result<Renewed, ControlError> {
        let Sender { app, cell, .. } = &asked.sender;
        self.link(&asked.sender)?.renew(asked, || {
            let application = records::application(&*self.store, app)?.application;
            let (epoch, seen) = (application.epoch, asked.seen);
            if epoch < seen {
                tracing::error!(app, cell, %epoch, %seen, "the store is older than what the agent has seen; `holdfast store restore` says what to do");
            }
            let has_it = application.granted_to.as_ref() == Some(cell) && epoch >= seen;
            if has_it {
                records::attend(&*self.store, app, cell)?;
            }
            Ok((epoch, has_it))
        })
    }

    /// Orders for an agent, which waits for some a while.
    ///
    /// # Errors
    /// There is to be no such agent.
    pub async fn fetch(&self, asked: &Fetch) -> Result<Fetched, ControlError> {
        Ok(self.link(&asked.sender)?.fetch(&asked.sender).await)
    }

    /// What an agent says of an order.
    ///
    /// # Errors
    /// There is to be no such agent.
    pub fn finished(&self, finished: Finished) -> Result<(), ControlError> {
        self.link(&finished.sender)?.finished(finished);
        Ok(())
    }

    /// Records what is proven of the commits of the active cell, in `epoch` if one is given; gives the epoch. Where nothing is
    /// proven, also while an execution runs.
    pub(crate) fn record_protection(
        &self,
        app: &str,
        cell: &str,
        epoch: Option<Epoch>,
        protected: Option<Protection>,
    ) -> Result<Epoch, String> {
        let _writing = self.write_alone();
        let seen = records::application(&*self.store, app).map_err(|error| model::chain(&error))?;
        let mut application = seen.application;
        let is_other = application.active() != Some(cell)
            || application.execution.is_some()
            || epoch.is_some_and(|epoch| epoch != application.epoch);
        if is_other {
            return Err("the application is being changed".into());
        }
        let epoch = application.epoch;
        if application.protected != protected {
            application.protected = protected;
            records::update(&*self.store, app, seen.revision, &application)
                .map_err(|error| model::chain(&error))?;
        }
        Ok(epoch)
    }

    /// The execution that lacks its rejoin, if the agent that could do it is there.
    pub(crate) fn lacks_rejoin(&self, app: &str) -> Option<u64> {
        let last = self.executions(app).ok()?.into_iter().next()?;
        let member = self.servers(app).ok()?.cells.get(&last.from)?.member.as_ref()?;
        let lacks = last.ending == Some(Ending::CompletedWithoutRejoin);
        (lacks && member.is_attended()).then_some(last.id)
    }

    /// The execution that stands still before its point of no return: its way back is tried again once the server answers.
    pub(crate) fn stuck_before(&self, app: &str) -> Option<u64> {
        self.stands_in_the_way(app).ok().flatten().map(|(execution, _)| execution.id)
    }

    /// Has the agent of the active cell start its server again, if nothing is changing the application.
    pub(crate) async fn start_again(
        &self,
        app: &str,
        cell: &str,
        member: &Member,
    ) -> Result<(), String> {
        let _taken = self.take(app).map_err(|error| model::chain(&error))?;
        let application = self.application(app).map_err(|error| model::chain(&error))?;
        if application.active() != Some(cell) || application.execution.is_some() {
            return Err(format!("`{cell}` is not the active cell any more"));
        }
        member.start_again(application.epoch).await
    }

    /// Fences the active cell and runs that to its end. Clients stay, and read.
    ///
    /// # Errors
    /// It is refused before anything was done. How it went otherwise is in the execution.
    pub async fn fence(
        &self,
        app: &str,
        cell: &str,
        request: FenceRequest,
    ) -> Result<Execution, ControlError> {
        let _taken = self.take(app)?;
        let (seen, state) = self.see(app, cell)?;
        if state != CellState::Active {
            return Err(ControlError::NotActive { cell: cell.into(), state });
        }
        let kind = if request.all { Kind::FenceAll } else { Kind::Fence };
        let asked = Asked::new(kind, cell.to_owned(), cell.to_owned());
        let FenceRequest { deadline_ms, on_timeout, .. } = request;
        self.execute(app, seen, Asked { deadline_ms, on_timeout, ..asked }).await
    }

    /// Gives a fenced cell a new grant and runs that to its end.
    ///
    /// # Errors
    /// It is refused before anything was done. How it went otherwise is in the execution.
    pub async fn unfence(&self, app: &str, cell: &str) -> Result<Execution, ControlError> {
        let _taken = self.take(app)?;
        let (seen, state) = self.see(app, cell)?;
        match seen.application.served() {
            Some((newest, _)) if newest != cell => {
                let (app, newest) = (app.to_owned(), newest.to_owned());
                return Err(ControlError::NotNewest { app, cell: cell.into(), state, newest });
            }
            Some((_, CellState::Fenced | CellState::Recovering | CellState::Passive)) => (),
            // The store was restored: whoever asks says that this is the newest.
            None if !state.takes_writes() => (),
            _ => return Err(ControlError::NotFenced { cell: cell.into(), state }),
        }
        stages::check_alone(self.servers(app)?, cell).await.map_err(ControlError::Refused)?;
        let asked = Asked::new(Kind::Unfence, cell.to_owned(), cell.to_owned());
        self.execute(app, seen, asked).await
    }

    /// An application that nothing is changing, and the state of one of its cells.
    fn see(&self, app: &str, cell: &str) -> Result<(records::Seen, CellState), ControlError> {
        self.check_cell(app, cell)?;
        let seen = records::application(&*self.store, app)?;
        if let Some(id) = seen.application.execution {
            return Err(ControlError::UnderWay { app: app.into(), id });
        }
        let state = seen.application.state(cell).map_err(RecordError::Cell)?;
        Ok((seen, state))
    }

    /// Records a new execution and runs it to its end.
    async fn execute(
        &self,
        app: &str,
        seen: records::Seen,
        asked: Asked,
    ) -> Result<Execution, ControlError> {
        let last =
            records::executions(&*self.store, app)?.last().map_or(0, |execution| execution.id);
        let kind = asked.kind;
        let execution = asked.execution(app, last + 1, &seen.application);
        {
            let _writing = self.write_alone();
            let now = records::application(&*self.store, app)?;
            let mut application = now.application;
            // What is recorded of its commits may have changed since it was looked at, and is as good.
            if (application.epoch, &application.cells, application.execution)
                != (seen.application.epoch, &seen.application.cells, None)
            {
                let id = application.execution.unwrap_or(0);
                return Err(ControlError::UnderWay { app: app.into(), id });
            }
            application.execution = Some(execution.id);
            records::write(&*self.store, app, now.revision, &application, &execution)?;
        }
        let (id, kind_name) = (execution.id, kind.name());
        let (from, to) = (&execution.from, &execution.to);
        tracing::info!(app, execution = id, from, to, kind = kind_name, "execution begins");
        self.run(execution, kind.first()).await
    }

    /// Moves sessions to fresh connections, while the application goes on.
    ///
    /// # Errors
    /// Another change of the application is under way, or there is no such cell.
    pub async fn move_sessions(
        &self,
        app: &str,
        request: MoveRequest,
    ) -> Result<Report, ControlError> {
        let _taken = self.take(app)?;
        self.check_cell(app, &request.to)?;
        let application = records::application(&*self.store, app)?.application;
        if application.active().is_none() {
            // What a fenced server says of all its sessions would become their own.
            return Err(ControlError::NoActive { app: app.into() });
        }
        let MoveRequest { session, to, deadline_ms } = request;
        Ok(self.order(Order::Move { app: app.into(), session, to, deadline_ms }).await)
    }

    /// Takes up an execution that stands still.
    ///
    /// # Errors
    /// There is none, or it does not stand still.
    pub async fn retry(&self, app: &str, id: u64) -> Result<Execution, ControlError> {
        let _taken = self.take(app)?;
        let mut execution = self.execution(app, id)?;
        let seen = records::application(&*self.store, app)?;
        let stage = match execution.ending {
            Some(Ending::CompletedWithoutRejoin) if seen.application.execution.is_none() => {
                Stage::Rejoin
            }
            Some(Ending::Stuck) => {
                resume(execution.kind, execution.stage, seen.application.is_past(&execution))
            }
            ending => return Err(ControlError::NotRetryable { id, ending }),
        };
        execution.ending = None;
        execution.reason = None;
        {
            let _writing = self.write_alone();
            let seen = records::application(&*self.store, app)?;
            let mut application = seen.application;
            application.execution = Some(id);
            records::write(&*self.store, app, seen.revision, &application, &execution)?;
        }
        self.run(execution, stage).await
    }

    /// Finds executions that a crash has left under way, and brings each to its end. To be called before
    /// clients are served.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub async fn recover(&self) -> Result<(), ControlError> {
        for app in self.config.apps.keys() {
            let _taken = self.take(app)?;
            let application = records::application(&*self.store, app)?.application;
            let Some(id) = application.execution else { continue };
            let execution = self.execution(app, id)?;
            if execution.ending.is_some() {
                tracing::warn!(
                    app,
                    execution = id,
                    "execution stands still; see `holdfast executions {id}`"
                );
                continue;
            }
            let stage = resume(execution.kind, execution.stage, application.is_past(&execution));
            tracing::warn!(app, execution = id, found = %execution.stage, goes_on = %stage, "execution was cut off");
            self.run(execution, stage).await?;
        }
        Ok(())
    }

    async fn run(
        &self,
        mut execution: Execution,
        mut stage: Stage,
    ) -> Result<Execution, ControlError> {
        loop {
            self.begin(&mut execution, stage)?;
            crash_point(stage, "begin");
            let began = Instant::now();
            let result = stages::run(self, &mut execution, stage).await;
            let took = began.elapsed();
            crash_point(stage, "end");
            let (outcome, text) = match result {
                Ok(text) => (Outcome::Done, text),
                Err(text) => (Outcome::Failed, text),
            };
            let after = next(execution.kind, stage, outcome);
            self.end(&mut execution, stage, outcome, text, took, after)?;
            match after {
                Next::Go(next) => stage = next,
                Next::End(ending) => {
                    if ending == Ending::Stuck && stage.holds_clients() {
                        // Clients are not left waiting for a person.
                        let app = execution.app.clone();
                        let report = self.order(Order::GiveUp { app }).await;
                        tracing::warn!(app = execution.app, told = report.told, "sessions ended");
                    }
                    return Ok(execution);
                }
            }
        }
    }

    /// Records that a stage begins, with the change of cells that goes with it.
    fn begin(&self, execution: &mut Execution, stage: Stage) -> Result<(), ControlError> {
        let _writing = self.write_alone();
        let seen = records::application(&*self.store, &execution.app)?;
        let mut application = seen.application;
        application
            .enter(execution.kind, stage, &execution.from, &execution.to)
            .map_err(RecordError::Cell)?;
        execution.stage = stage;
        execution.record(LogEntry {
            at_ms: now_ms(),
            stage,
            event: LogEvent::Started,
            text: String::new(),
            took_ms: None,
        });
        // Between hold and release every write delays clients, so only those that recovery needs are made.
        if matters_after_a_crash(stage) {
            records::write(&*self.store, &execution.app, seen.revision, &application, execution)?;
        }
        Ok(())
    }

    fn end(
        &self,
        execution: &mut Execution,
        stage: Stage,
        outcome: Outcome,
        text: String,
        took: Duration,
        after: Next,
    ) -> Result<(), ControlError> {
        let _writing = self.write_alone();
        let seen = records::application(&*self.store, &execution.app)?;
        let mut application = seen.application;
        let (app, id) = (execution.app.clone(), execution.id);
        let took_ms = took.as_secs_f64() * 1_000.0;
        let event = match outcome {
            Outcome::Done => {
                application
                    .leave(stage, &execution.from, &execution.to)
                    .map_err(RecordError::Cell)?;
                tracing::info!(app, execution = id, %stage, took_ms, text, "stage is done");
                LogEvent::Done
            }
            Outcome::Failed => {
                tracing::warn!(app, execution = id, %stage, took_ms, reason = text, "stage failed");
                execution.reason.get_or_insert_with(|| format!("{stage}: {text}"));
                LogEvent::Failed
            }
        };
        execution.record(LogEntry { at_ms: now_ms(), stage, event, text, took_ms: Some(took_ms) });
        if let Next::End(ending) = after {
            execution.ending = Some(ending);
            if ending != Ending::Stuck {
                application.execution = None;
            }
            tracing::info!(app, execution = id, ?ending, "execution has ended");
        }
        if matches!(after, Next::End(_))
            || matches!(stage, Stage::Promote | Stage::Regrant | Stage::Release)
            || outcome == Outcome::Failed
        {
            records::write(&*self.store, &app, seen.revision, &application, execution)?;
        }
        Ok(())
    }
}

impl Asked {
    fn execution(self, app: &str, id: u64, application: &Application) -> Execution {
        let Asked { kind, from, to, deadline_ms, on_timeout, .. } = self;
        Execution {
            id,
            app: app.into(),
            kind,
            from,
            to,
            epoch: application.epoch,
            deadline_ms,
            on_timeout,
            allow_data_loss: self.allow_data_loss,
            is_automatic: self.is_automatic,
            started_at_ms: now_ms(),
            stage: kind.first(),
            lsn: None,
            lost: None,
            ending: None,
            reason: None,
            log: Vec::new(),
        }
    }
}

/// Stages whose begin a crash must find in the store: those that change cells or servers.
fn matters_after_a_crash(stage: Stage) -> bool {
    match stage {
        Stage::Prepare
        | Stage::Hold
        | Stage::Grant
        | Stage::Promote
        | Stage::Rejoin
        | Stage::Confine
        | Stage::Regrant
        | Stage::Assess
        | Stage::Revert => true,
        // The fence is taken back by Revert, which follows every crash before the grant, and so is all that was done to a
        // lost server.
        Stage::Fence
        | Stage::Capture
        | Stage::CatchUp
        | Stage::Attach
        | Stage::Cut
        | Stage::Isolate
        | Stage::Recruit
        | Stage::Release => false,
    }
}

/// Tests kill the process here; a release build has no such point.
fn crash_point(stage: Stage, at: &str) {
    if cfg!(debug_assertions)
        && std::env::var("HOLDFAST_CRASH_AT").is_ok_and(|point| point == format!("{stage}:{at}"))
    {
        eprintln!("holdfast: crash point {stage}:{at}");
        std::process::abort();
    }
}
