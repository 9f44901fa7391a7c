//! What control of all applications has, and what of it is read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use model::cell::Application;
use model::persisted::Execution;
use model::switchover::{Kind, Stage};
use store::Store;
use tokio::sync::{Mutex, MutexGuard, Notify, broadcast, watch};

use crate::Proxies;
use crate::cancels;
use crate::config::{AppServers, ControlConfig};
use crate::member::Member;
use crate::proxies::Remote;
use crate::records;
use crate::requests::{ControlError, Served};
use crate::safety::Counts;
use crate::seat::Seated;
use crate::watch::Seen;

/// Between two looks whether it is somebody's turn.
const LOOK: Duration = Duration::from_millis(5);
/// How long a rejoin may take to be given up.
const GIVE_UP_MAX: Duration = Duration::from_secs(5);
/// Executions that are shown and kept in mind; older ones stay in the store.
pub const EXECUTIONS_SHOWN_MAX: usize = 100;

/// Control of all applications of this process.
pub struct Control {
    pub config: ControlConfig,
    /// What makes it control.
    pub seat: Arc<Seated>,
    /// The same, to read and write.
    pub(crate) store: Arc<dyn Store>,
    /// The proxy of this process.
    pub(crate) proxies: Proxies,
    pub(crate) remotes: std::sync::Mutex<BTreeMap<String, Arc<Remote>>>,
    /// Cancel requests that another proxy may know.
    pub(crate) cancels: broadcast::Sender<cancels::Told>,
    /// Applications of which proxies wait for orders.
    pub(crate) changing: std::sync::Mutex<BTreeSet<String>>,
    /// One execution an application at a time; the store says so as well, across processes.
    pub(crate) running: BTreeMap<String, Mutex<()>>,
    /// What was seen last of active cells, by application.
    pub(crate) seen: std::sync::Mutex<BTreeMap<String, Seen>>,
    /// Of applications and names.
    pub(crate) alarms: std::sync::Mutex<BTreeMap<(String, String), crate::alarms::Seen>>,
    /// Whoever reads an application to write it holds this, never across a wait: an execution is not to meet a conflict.
    pub(crate) writing: std::sync::Mutex<()>,
    /// How often each rule, of each application, was in the way of a change, and how often one was made in spite of it.
    pub(crate) refusals: std::sync::Mutex<Counts>,
    /// How often rejoins were given up for a failover, by application.
    pub(crate) rejoins_given_up: BTreeMap<String, watch::Sender<u64>>,
    /// Something was said to a plan of the application, or of it was done.
    pub(crate) stirred: BTreeMap<String, Notify>,
    pub(crate) never: Notify,
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
        seat: Arc<Seated>,
        proxies: Proxies,
    ) -> Result<Arc<Control>, ControlError> {
        let store: Arc<dyn Store> = seat.clone();
        records::must_be_whole(&*store)?;
        for (name, app) in &config.apps {
            let first = || Application::new(&app.first_active, app.cells.keys().cloned());
            let mut seen = records::open_application(&*store, name, first)?;
            if seen.application.adopt(app.cells.keys()) {
                let text = "cells are new".to_owned();
                let epoch = seen.application.epoch;
                let draft = records::own(name, "adopt", epoch, "they are configured", text);
                records::update(&*store, name, seen.revision, &seen.application, draft)?;
            }
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
        for (app, servers) in &config.apps {
            for (cell, server) in &servers.cells {
                if let Some(Member::Agent(link)) = &server.member
                    && let Some(attended) = records::attended(&*store, app, cell)?
                {
                    link.remember(attended);
                }
            }
        }
        let cancels = cancels::channel();
        let mut remotes = BTreeMap::new();
        if let Some(terms) = config.terms {
            for (name, registered) in records::proxies(&*store)? {
                let hearing = cancels::Hearing::of(&cancels);
                let remote = Arc::new(Remote::new(&name, terms, registered, hearing));
                remotes.insert(name, remote);
            }
        }
        let remotes = std::sync::Mutex::new(remotes);
        let changing = std::sync::Mutex::new(config.apps.keys().cloned().collect());
        let running = config.apps.keys().map(|app| (app.clone(), Mutex::default())).collect();
        let seen = Default::default();
        let writing = std::sync::Mutex::default();
        let stirred = config.apps.keys().map(|app| (app.clone(), Notify::new())).collect();
        let never = Notify::new();
        let rejoins_given_up = config.apps.keys().map(|app| (app.clone(), watch::Sender::new(0)));
        let rejoins_given_up = rejoins_given_up.collect();
        Ok(Arc::new(Control {
            config,
            seat,
            store,
            proxies,
            remotes,
            cancels,
            changing,
            running,
            seen,
            alarms: std::sync::Mutex::default(),
            writing,
            refusals: std::sync::Mutex::default(),
            rejoins_given_up,
            stirred,
            never,
        }))
    }

    /// The cell of an application that clients are attached to.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn served_cell(&self, app: &str) -> Result<Option<Served>, ControlError> {
        let application = records::application(&*self.store, app)?.application;
        Ok(application.served().map(|(cell, state)| Served {
            cell: cell.to_owned(),
            state,
            epoch: application.epoch,
        }))
    }

    /// That of each application.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn served_cells(&self) -> Result<BTreeMap<String, Option<Served>>, ControlError> {
        self.config.apps.keys().map(|app| Ok((app.clone(), self.served_cell(app)?))).collect()
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
        let older = all.split_off(all.len().min(EXECUTIONS_SHOWN_MAX));
        // What is still to be done is not forgotten, however old.
        let lacking = self.application(app)?.lacking;
        all.extend(older.into_iter().filter(|one| lacking.get(&one.from) == Some(&one.id)));
        Ok(all)
    }

    /// # Errors
    /// The store cannot be read, or has no such execution.
    pub fn execution(&self, app: &str, id: u64) -> Result<Execution, ControlError> {
        records::execution(&*self.store, app, id)?.ok_or(ControlError::NoExecution(id))
    }

    pub(crate) fn write_alone(&self) -> std::sync::MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the server of a cell has a guard: it was a primary by a lease.
    pub(crate) fn is_attended(&self, app: &str, cell: &str) -> bool {
        records::attended(&*self.store, app, cell).is_ok_and(|host| host.is_some())
    }

    pub(crate) fn servers(&self, app: &str) -> Result<&AppServers, ControlError> {
        self.config.apps.get(app).ok_or_else(|| ControlError::NoApp {
            app: app.into(),
            known: self.config.apps.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }

    /// Whoever holds this may change the application.
    pub(crate) fn take(&self, app: &str) -> Result<MutexGuard<'_, ()>, ControlError> {
        self.servers(app)?;
        let taken = self.running.get(app).and_then(|running| running.try_lock().ok());
        taken.ok_or_else(|| {
            let application = records::application(&*self.store, app);
            let id = application.ok().and_then(|seen| seen.application.execution).unwrap_or(0);
            ControlError::UnderWay { app: app.into(), id }
        })
    }

    /// As [`Control::take`], for people: what is done meanwhile to the server of an application that nothing is changing is
    /// waited for.
    pub(crate) async fn take_in_turn(&self, app: &str) -> Result<MutexGuard<'_, ()>, ControlError> {
        const TURN_MAX: Duration = Duration::from_secs(20);
        let deadline = Instant::now() + TURN_MAX;
        loop {
            match self.take(app) {
                Err(ControlError::UnderWay { id: 0, .. }) if Instant::now() < deadline => {
                    tokio::time::sleep(LOOK).await;
                }
                taken => return taken,
            }
        }
    }

    /// The execution that makes the old server a standby, if that is all that is still being done.
    pub fn rejoining(&self, app: &str, application: &Application) -> Option<Execution> {
        let execution = self.execution(app, application.execution?).ok()?;
        (execution.stage == Stage::Rejoin && execution.ending.is_none()).then_some(execution)
    }

    /// Whether nothing is being done to an application, or a rejoin alone, of another cell than this.
    pub fn is_settled_but_for(
        &self,
        app: &str,
        application: &Application,
        cell: Option<&str>,
    ) -> bool {
        match self.rejoining(app, application) {
            Some(execution) => cell.is_none_or(|cell| execution.from != cell),
            None => application.execution.is_none(),
        }
    }

    /// The same of one that nobody has asked for, and that is in the way of what somebody asks for.
    pub(crate) async fn give_up_rejoin_of_standby(&self, app: &str) -> Result<(), ControlError> {
        match self.rejoining(app, &self.application(app)?) {
            Some(execution) if execution.kind == Kind::Rejoin => self.give_up_rejoin(app).await,
            _ => Ok(()),
        }
    }

    /// A rejoin that is being done is broken off: it can be done again, and what else is to be done cannot wait.
    pub(crate) async fn give_up_rejoin(&self, app: &str) -> Result<(), ControlError> {
        let deadline = Instant::now() + GIVE_UP_MAX;
        while self.rejoining(app, &self.application(app)?).is_some() && Instant::now() < deadline {
            if let Some(given_up) = self.rejoins_given_up.get(app) {
                given_up.send_modify(|times| *times += 1);
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    pub(crate) fn check_cell(&self, app: &str, cell: &str) -> Result<(), ControlError> {
        let servers = self.servers(app)?;
        if servers.cells.contains_key(cell) {
            return Ok(());
        }
        let known = servers.cells.keys().cloned().collect::<Vec<_>>().join(", ");
        Err(ControlError::NoCell { app: app.into(), cell: cell.into(), known })
    }
}
