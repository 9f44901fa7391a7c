//! The agent: renews its lease, watches its server, obeys control.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use link::{Client, Controls};
use model::agent::{Fetch, Fetched, Finished, Order, Renew, Renewed, Sender, Task};
use model::cell::Epoch;
use model::failover::Process;
use model::lease::{Holder, Moment, Terms};
use model::member::{Done, Work};
use model::pledge::Neighbour;
use model::seat::Tenure;
use pg::clock;
use pg::instance::Instance;
use pg::member::Local;
use serde::Deserialize;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Notify, mpsc, watch};
use tokio::time::{sleep, timeout};

use crate::config::AgentConfig;
use crate::epoch::EpochFile;
use crate::guard::Guard;
use crate::pledging::Pledges;

/// Between two looks at the server's process and at the lease.
const TICK: Duration = Duration::from_millis(20);
/// Of a lease whose length control has not said yet.
const FIRST_TERMS: Terms = Terms { length: Duration::from_secs(2) };
/// A server that was found takes so long until it has its first lease, at most.
const FIRST_MAX: Duration = Duration::from_secs(3);
/// Longer than control has a fetch wait.
const FETCH_MAX: Duration = Duration::from_secs(15);
const REPORT_MAX: Duration = Duration::from_secs(5);
/// How long what became of an order is offered.
const REPORT_TRIES: u32 = 20;
/// After something that did not succeed.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// How long a lease of a new epoch may take to arrive.
const LEASE_WAIT_MAX: Duration = Duration::from_secs(5);
const STOP_MAX: Duration = Duration::from_secs(60);
/// How long an agent before this one may take to be gone.
const LOCK_MAX: Duration = Duration::from_secs(5);
/// Between two tries to end a server that does not end.
const END_PAUSE: Duration = Duration::from_millis(500);
/// Between two starts of a standby that crashes.
const STANDBY_PAUSE: Duration = Duration::from_secs(5);

/// What control has said last.
#[derive(Debug, Default)]
struct Heard {
    /// When that was asked which was answered last; none if the last question was not.
    sent: Option<Moment>,
    every: Duration,
    neighbours: Vec<Neighbour>,
}

#[derive(Debug, Error)]
pub enum AgentError {
    #[error("cannot listen on `{address}` for other agents")]
    Listen { address: std::net::SocketAddr, source: std::io::Error },
    #[error("`{path}` cannot be {what}")]
    File { path: PathBuf, what: &'static str, source: std::io::Error },
    #[error(
        "`{path}` holds `{found}`, an epoch is needed; it is written by an agent and by nobody else"
    )]
    Epoch { path: PathBuf, found: String },
    #[error("`{0}` is in use by another agent")]
    InUse(PathBuf),
}

/// An order as it was fetched.
#[derive(Debug)]
struct Fresh {
    at: Moment,
    /// That of the control which gave it.
    tenure: Tenure,
    order: Order,
}

/// A running agent.
pub struct Agent {
    beside: Arc<Beside>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    /// Held while the agent runs.
    _lock: std::fs::File,
}

pub(crate) struct Beside {
    pub(crate) config: AgentConfig,
    pub(crate) sender: Sender,
    pub(crate) pledges: std::sync::Mutex<Pledges>,
    heard: std::sync::Mutex<Heard>,
    controls: Arc<Controls>,
    /// The highest version of the application that was seen.
    version: watch::Sender<u64>,
    local: Local,
    holder: std::sync::Mutex<Holder>,
    epochs: EpochFile,
    guard: Mutex<Guard>,
    /// Whoever works on the server's files or starts it.
    working: Mutex<()>,
    /// The lease is to be asked for at once.
    hurry: Notify,
    /// There is another answer.
    answered: watch::Sender<()>,
    /// Until then the server that was found may run without a lease.
    patience: Moment,
}

impl Agent {
    /// Takes charge of the server, as it is found.
    ///
    /// # Errors
    /// The state directory cannot be used.
    pub async fn start(config: AgentConfig) -> Result<Agent, AgentError> {
        let dir = config.state_dir.clone();
        let file = |what| {
            let path = dir.clone();
            move |source| AgentError::File { path, what, source }
        };
        std::fs::create_dir_all(&dir).map_err(file("made"))?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&dir, mode).map_err(file("protected"))?;
        let lock = std::fs::File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(dir.join("agent.lock"))
            .map_err(file("locked"))?;
        // One that was killed may take a moment to be gone.
        let began = clock::now();
        while lock.try_lock().is_err() {
            if began.plus(LOCK_MAX).from(clock::now()).is_zero() {
                return Err(AgentError::InUse(dir));
            }
            sleep(TICK).await;
        }
        let (epochs, seen) = EpochFile::read(&dir)?;
        let guard = Guard::new(&dir, &config.guard).map_err(file("used"))?;
        let pledges = Pledges::read(&dir).map_err(file("read"))?;
        let run =
            u64::from(std::process::id()) << 32 | (clock::now().0.as_millis() & 0xffff_ffff) as u64;
        // A copy of the directory is another, on another machine or in another network of this one.
        let directory = read_host(&dir.join("host"))?;
        let host = directory ^ clock::boot_number() ^ clock::network_number();
        let sender =
            Sender { app: config.app.clone(), cell: config.cell.clone(), host, directory, run };
        let local = Local { instance: config.instance.clone(), lost_dir: dir.join("lost") };
        let beside = Arc::new(Beside {
            sender,
            local,
            holder: std::sync::Mutex::new(Holder::new(seen)),
            epochs,
            pledges: std::sync::Mutex::new(pledges),
            heard: std::sync::Mutex::default(),
            controls: Controls::new(config.control.clone(), config.tls.clone()),
            version: watch::Sender::new(read_version(&dir.join("version"))),
            guard: Mutex::new(guard),
            working: Mutex::new(()),
            hurry: Notify::new(),
            answered: watch::Sender::new(()),
            patience: read_patience(&dir.join("lease")),
            config,
        });
        beside.begin().await;
        let (orders, work) = mpsc::channel(model::agent::ORDERS_MAX);
        let mut tasks = Vec::new();
        if let Some(address) = beside.config.listen {
            let listener = TcpListener::bind(address).await;
            let listener = listener.map_err(|source| AgentError::Listen { address, source })?;
            tasks.push(tokio::spawn(beside.clone().answer_pleas(listener)));
        }
        tasks.extend([
            tokio::spawn(beside.clone().renew()),
            tokio::spawn(beside.clone().watch()),
            tokio::spawn(beside.clone().plead_on()),
            tokio::spawn(beside.clone().keep_version()),
            tokio::spawn(beside.clone().fetch(orders)),
            tokio::spawn(beside.clone().obey(work)),
        ]);
        Ok(Agent { beside, tasks, _lock: lock })
    }

    /// Stops the server, as there is nobody any more who would, and ends.
    pub async fn stop(self) {
        let instance = self.beside.instance();
        let stopped = instance.stop("fast", STOP_MAX).await;
        // Nobody is beside it any more: whoever starts it starts a standby.
        match stopped.and_then(|()| instance.must_be_standby()) {
            Ok(()) => self.beside.guard.lock().await.dismiss(),
            Err(error) => {
                tracing::error!(error = model::chain(&error), "the server is left to its guard");
            }
        }
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// The number of this agent's state directory, which is made once.
fn read_host(path: &std::path::Path) -> Result<u64, AgentError> {
    let file = |what| move |source| AgentError::File { path: path.to_owned(), what, source };
    if let Ok(text) = std::fs::read_to_string(path)
        && let Ok(host) = text.trim().parse()
    {
        return Ok(host);
    }
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut random| std::io::Read::read_exact(&mut random, &mut bytes))
        .map_err(file("made"))?;
    let host = u64::from_ne_bytes(bytes);
    write_durably(path, format!("{host}\n").as_bytes()).map_err(file("written"))?;
    Ok(host)
}

/// The highest version of the application that was seen; one that cannot be read is as if none had been.
fn read_version(path: &std::path::Path) -> u64 {
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Until when a server that was found running may run without a lease: as long as the last one lasts; a while, if there was
/// never one.
fn read_patience(path: &std::path::Path) -> Moment {
    let first = Moment(clock::now().0 + FIRST_MAX);
    let Ok(text) = std::fs::read_to_string(path) else { return first };
    let mut words = text.split_whitespace();
    let until = words.next().and_then(|word| word.parse().ok()).map(Duration::from_nanos);
    match until {
        Some(until) if words.next() == Some(&clock::boot()) => Moment(until).min(first),
        // Of another boot.
        _ => Moment(Duration::ZERO),
    }
}

impl Beside {
    fn instance(&self) -> &Instance {
        &self.local.instance
    }

    pub(crate) fn with_holder<T>(&self, act: impl FnOnce(&mut Holder) -> T) -> T {
        act(&mut self.holder.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn lease(&self) -> Option<Epoch> {
        self.with_holder(|holder| holder.epoch(clock::now()))
    }

    /// A server that does not run is started if it is a standby. Any other waits for control, and is a standby for whoever
    /// starts it.
    async fn begin(self: &Arc<Self>) {
        let instance = self.instance();
        if instance.is_running() {
            return;
        }
        let condition = self.local.carry_out(&Work::Look).await;
        let is_rejoining = match condition {
            Ok(Done::Condition(condition)) => condition.is_rejoining,
            _ => false,
        };
        if is_rejoining {
            return;
        }
        if !instance.is_standby() || (instance.may_take_writes() && !instance.is_fresh_copy()) {
            if let Err(error) = instance.must_be_standby() {
                tracing::error!(error = model::chain(&error), "`standby.signal` cannot be written");
            }
            return;
        }
        let beside = self.clone();
        tokio::spawn(async move {
            let _working = beside.working.lock().await;
            if let Err(error) = beside.instance().start(pg::member::START_MAX).await {
                tracing::error!(error = model::chain(&error), "the standby does not start");
            }
        });
    }

    fn check_epoch(&self, epoch: Epoch) -> Result<(), String> {
        let seen = self.with_holder(|holder| holder.seen());
        match epoch < seen {
            true => Err(format!("epoch {epoch} is over, this host has seen {seen}")),
            false => Ok(()),
        }
    }

    /// Remembers an epoch for ever, before anything is done by it.
    fn see(&self, epoch: Epoch) -> Result<(), String> {
        self.check_epoch(epoch)?;
        self.epochs.see(epoch)?;
        self.with_holder(|holder| holder.see(epoch))
            .map_err(|seen| format!("epoch {epoch} is over, this host has seen {seen}"))
    }

    /// For the next agent, if this one is killed: how long the server may run without a lease of its own. It need not outlive
    /// the machine, as the server does not.
    fn note_lease(&self, kill_at: Moment) -> Result<(), String> {
        let path = self.config.state_dir.join("lease");
        let text = format!("{} {}\n", kill_at.0.as_nanos(), clock::boot());
        let temporary = path.with_extension("new");
        std::fs::write(&temporary, text)
            .and_then(|()| std::fs::rename(&temporary, &path))
            .map_err(|error| format!("`{}`: {error}", path.display()))
    }

    /// Control has answered what was asked of it last, not long ago.
    pub(crate) fn hears_control(&self, now: Moment) -> bool {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.sent.is_some_and(|sent| now < sent.plus(heard.every * 2))
    }

    /// All other agents, if control has said that it knows them all.
    pub(crate) fn neighbours(&self) -> Vec<Neighbour> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).neighbours.clone()
    }

    fn client(&self) -> Client {
        self.controls.client()
    }

    async fn renew(self: Arc<Self>) {
        let mut client = self.client();
        let mut terms = FIRST_TERMS;
        let mut is_heard = true;
        loop {
            let sent = clock::now();
            let question = Renew {
                sender: self.sender.clone(),
                seen: self.with_holder(|holder| holder.seen()),
                seen_version: *self.version.borrow(),
                process: self.process(),
                is_in_hand: self.instance().is_in_hand().is_ok(),
                place: self.instance().place(),
                postmaster: self.instance().postmaster(),
                listens: self.config.listen.map(|address| address.to_string()),
                neighbours: (self.neighbours().into_iter())
                    .map(|one| (one.cell, one.directory))
                    .collect(),
            };
            let limit = terms.renew_every();
            match client.post::<_, Renewed>("/v1/agents/renew", &question, limit).await {
                Ok(Renewed { terms: said, .. }) if !Terms::LENGTHS.contains(&said.length) => {
                    let length = said.length;
                    tracing::error!(?length, "control speaks of a lease that there is not");
                    sleep(RETRY_PAUSE).await;
                    continue;
                }
                // Nobody goes by what is older than what was seen: as if control were gone.
                Ok(Renewed { version, .. }) if version < *self.version.borrow() => {
                    if is_heard {
                        let seen = *self.version.borrow();
                        tracing::error!(
                            version,
                            seen,
                            "control's store is older than what was seen"
                        );
                    }
                    is_heard = false;
                    self.heard.lock().unwrap_or_else(PoisonError::into_inner).sent = None;
                    let _ = timeout(terms.renew_every(), self.hurry.notified()).await;
                    continue;
                }
                Ok(renewed) => {
                    if !is_heard {
                        tracing::info!("control answers again");
                    }
                    is_heard = true;
                    terms = renewed.terms;
                    self.answered(sent, &renewed).await;
                }
                Err(error) => {
                    if is_heard {
                        tracing::warn!(error = model::chain(&error), "no lease was renewed");
                    }
                    is_heard = false;
                    self.heard.lock().unwrap_or_else(PoisonError::into_inner).sent = None;
                    // Another node may be control.
                    self.controls.turn();
                    // Sooner than usual, but not at once.
                    let pause = RETRY_PAUSE.min(terms.renew_every() / 4);
                    let _ = timeout(pause, self.hurry.notified()).await;
                    continue;
                }
            }
            let _ = timeout(terms.renew_every(), self.hurry.notified()).await;
        }
    }

    fn see_version(&self, version: u64) {
        self.version.send_if_modified(|seen| {
            let is_new = version > *seen;
            *seen = version.max(*seen);
            is_new
        });
    }

    /// Keeps the highest version for the next agent; no lease waits for the disk.
    async fn keep_version(self: Arc<Self>) {
        let mut seen = self.version.subscribe();
        while seen.changed().await.is_ok() {
            let (version, path) =
                (*seen.borrow_and_update(), self.config.state_dir.join("version"));
            let write = move || write_durably(&path, format!("{version}\n").as_bytes());
            if let Ok(Err(error)) = tokio::task::spawn_blocking(write).await {
                tracing::warn!(%error, "the version of the store that was seen cannot be written");
            }
        }
    }

    async fn answered(&self, sent: Moment, renewed: &Renewed) {
        self.see_version(renewed.version);
        {
            let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
            heard.sent = Some(sent);
            heard.every = renewed.terms.renew_every();
            // A control that has just begun has not heard them all, and may be gone before it has: those that it was told
            // before are as good, as control is told that they are gone by.
            if !renewed.neighbours.is_empty() {
                heard.neighbours.clone_from(&renewed.neighbours);
            }
        }
        // Control has pledges ended before it gives another epoch; nobody's word but ours is needed for that.
        let is_new = |epoch: &Epoch| *epoch > self.with_holder(|holder| holder.seen());
        if renewed.granted.as_ref().is_some_and(is_new) && !self.has_no_pledges(sent) {
            tracing::error!("a lease of a new epoch is not held while pledges of ours last");
        } else if let Some(epoch) = renewed.granted {
            let kill_at = renewed.terms.kill_at(sent);
            match self.prepare_for(epoch, kill_at).await {
                Ok(()) => self.with_holder(|holder| holder.granted(sent, renewed.terms, epoch)),
                Err(error) => tracing::error!(error, "the lease cannot be held"),
            }
        }
        self.answered.send_replace(());
    }

    /// What must be so before the server may take writes until then.
    pub(crate) async fn prepare_for(&self, epoch: Epoch, kill_at: Moment) -> Result<(), String> {
        self.instance().is_in_hand().map_err(|error| model::chain(&error))?;
        // Control and neighbours may prolong it at once, and there is one place for the note.
        let mut guard = self.guard.lock().await;
        // Nothing is prolonged for one that is over.
        self.check_epoch(epoch)?;
        self.note_lease(kill_at)?;
        guard.extend(kill_at).await?;
        self.see(epoch)
    }

    fn process(&self) -> Process {
        match self.instance().is_running() {
            true => Process::Lives,
            // Whether it was shut down is asked for by an order, as it takes a program.
            false => Process::Crashed,
        }
    }

    /// Ends the server when there is no lease, and tells control at once what has changed.
    async fn watch(self: Arc<Self>) {
        let mut before = self.process();
        let mut started = None;
        loop {
            sleep(TICK).await;
            let process = self.process();
            if process != before {
                before = process;
                self.hurry.notify_one();
            }
            let is_patient = !self.patience.from(clock::now()).is_zero();
            if process != Process::Lives && self.instance().is_crashed_standby() {
                self.clone().start_standby(&mut started);
                continue;
            }
            if process != Process::Lives
                || is_patient
                || self.lease().is_some()
                || !self.instance().may_take_writes()
            {
                continue;
            }
            tracing::error!("there is no lease: the server is ended");
            if let Err(error) = self.local.carry_out(&Work::Isolate).await {
                tracing::error!(error, "the server does not end");
                sleep(END_PAUSE).await;
            }
        }
    }

    /// A standby that has crashed is started again, unless somebody works on it; the lease is watched meanwhile.
    fn start_standby(self: Arc<Self>, started: &mut Option<Moment>) {
        let is_early =
            started.is_some_and(|at| !Moment(at.0 + STANDBY_PAUSE).from(clock::now()).is_zero());
        if is_early {
            return;
        }
        *started = Some(clock::now());
        tokio::spawn(async move {
            let Ok(_working) = self.working.try_lock() else { return };
            if !self.instance().is_crashed_standby() {
                return;
            }
            tracing::warn!("the standby has crashed and is started again");
            if let Err(error) = self.instance().start(pg::member::START_MAX).await {
                tracing::error!(error = model::chain(&error), "the standby does not start");
            }
        });
    }

    async fn fetch(self: Arc<Self>, orders: mpsc::Sender<Fresh>) {
        let mut client = self.client();
        let (mut last, mut tenure) = (0, Tenure::default());
        loop {
            let question = Fetch { sender: self.sender.clone(), last };
            match client.post::<_, Fetched>("/v1/agents/orders", &question, FETCH_MAX).await {
                Ok(fetched) => {
                    let at = clock::now();
                    if tenure != client.tenure() {
                        // Another control counts its orders anew.
                        (last, tenure) = (0, client.tenure());
                    }
                    for order in fetched.orders {
                        last = order.id;
                        if orders.send(Fresh { at, tenure, order }).await.is_err() {
                            return;
                        }
                    }
                }
                // It is said where the lease is renewed.
                Err(_) => sleep(RETRY_PAUSE).await,
            }
        }
    }

    async fn obey(self: Arc<Self>, mut orders: mpsc::Receiver<Fresh>) {
        let mut client = self.client();
        while let Some(Fresh { at, tenure, order }) = orders.recv().await {
            let result = loop {
                let now = clock::now();
                if at.plus(order.wait_max).from(now).is_zero() {
                    break Err("nobody waits for it any more".into());
                }
                if !self.controls.is_latest(tenure) {
                    break Err("it was given by an earlier control".into());
                }
                // Until it is heard, another may be control.
                if !self.hears_control(now) {
                    sleep(TICK).await;
                    continue;
                }
                // Whoever works on the server is waited for, and all is asked anew.
                match self.working.try_lock() {
                    Ok(_working) => break self.carry_out(&order).await,
                    Err(_) => sleep(TICK).await,
                }
            };
            if let Err(error) = &result {
                tracing::warn!(order = order.id, error, "an order was not carried out");
            }
            self.hurry.notify_one();
            let finished = Finished { sender: self.sender.clone(), id: order.id, result };
            for _ in 0..REPORT_TRIES {
                let path = "/v1/agents/finished";
                match client.post::<_, Noted>(path, &finished, REPORT_MAX).await {
                    Ok(Noted {}) => break,
                    Err(error) => {
                        tracing::warn!(error = model::chain(&error), "control has not heard");
                        sleep(RETRY_PAUSE).await;
                    }
                }
            }
        }
    }

    async fn carry_out(&self, order: &Order) -> Result<Done, String> {
        self.see(order.epoch)?;
        match &order.what {
            Task::HoldLease => {
                let mut answers = self.answered.subscribe();
                self.hurry.notify_one();
                // What was answered some time ago may be over.
                let held = answers.wait_for(|_| self.lease() == Some(order.epoch));
                match timeout(LEASE_WAIT_MAX, held).await {
                    Ok(Ok(_)) => Ok(Done::Nothing),
                    _ => Err(format!("no lease of epoch {} in {LEASE_WAIT_MAX:?}", order.epoch)),
                }
            }
            Task::EndPledges { directory } if *directory != self.sender.directory => {
                Err("it is for another agent of this cell".into())
            }
            Task::EndPledges { .. } => self.end_pledges(order.epoch).await.map(Done::PledgesOver),
            Task::Work(Work::StartAgain) if self.lease().is_none() => {
                Err("there is no lease, without which it cannot be a primary".into())
            }
            Task::Work(work) => {
                if *work == Work::Isolate {
                    // Nobody can start it as a primary any more.
                    self.with_holder(|holder| holder.give_up(clock::now()));
                }
                self.local.carry_out(work).await
            }
        }
    }
}

/// Control has taken note.
#[derive(Deserialize)]
struct Noted {}

pub(crate) fn write_durably(path: &std::path::Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    let temporary = path.with_extension("new");
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    match path.parent() {
        Some(dir) => std::fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}
