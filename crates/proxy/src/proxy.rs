//! Starts and stops the parts, and knows where each session is.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use model::barrier::SessionView;
use model::proxies::{CANCELS_MAX, Cancel};
use pg::admin::Admin;
use ring::rand::{SecureRandom, SystemRandom};
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use wire::backend::Report;
use wire::sqlstate::SqlState;

use crate::app::App;
use crate::config::{PolicyConfig, ProxyConfig};
use crate::confine::keeping;
use crate::engine::{Clock, Command, EngineHandle, PoolView, Want};
use crate::listener;
use crate::login;
use crate::metrics::{Metrics, write_metric};
use crate::mover::Mover;
use crate::pool::keeper;
use crate::session::Session;

/// A client's cancel key: the pid that it knows, and the secret.
type Key = (i32, Box<[u8]>);

/// What every part of the proxy knows.
pub(crate) struct Shared {
    pub(crate) config: ProxyConfig,
    pub(crate) apps: Vec<Arc<App>>,
    pub(crate) engines: Vec<Arc<EngineHandle>>,
    pub(crate) metrics: Metrics,
    pub(crate) logins: Arc<Semaphore>,
    pub(crate) clock: Clock,
    random: SystemRandom,
    next_id: AtomicU64,
    clients: AtomicUsize,
    keys: Mutex<HashMap<Key, (u64, usize)>>,
    pub(crate) rereads: OnceLock<Rereads>,
    /// Where cancel requests go that are for none of our sessions.
    pub(crate) strays: OnceLock<mpsc::Sender<Cancel>>,
}

/// What the configuration file says of an application's rules now.
#[derive(Debug)]
pub struct Reread {
    pub policy: PolicyConfig,
    /// Why they are not to be taken up, if they are others.
    pub waits: Option<String>,
}

/// Reads the configuration file anew. An error says why it cannot be gone by.
pub type Rereads = Box<dyn Fn(&str) -> Result<Reread, String> + Send + Sync>;

/// A client's place among those that are allowed, and its cancel key.
pub struct Place {
    shared: Arc<Shared>,
    key: Option<Key>,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Place")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.clients.fetch_sub(1, Ordering::SeqCst);
        if let Some(key) = &self.key {
            self.shared.keys.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        }
    }
}

impl Shared {
    pub(crate) fn take_place(self: &Arc<Shared>) -> Option<Place> {
        let taken = self.clients.fetch_add(1, Ordering::SeqCst);
        let place = Place { shared: self.clone(), key: None };
        (taken < self.config.limits.clients_max).then_some(place)
    }

    pub(crate) fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn new_secret(&self, len: usize) -> Option<Vec<u8>> {
        let mut secret = vec![0; len];
        self.random.fill(&mut secret).ok().map(|()| secret)
    }

    pub(crate) fn app(&self, name: &str) -> Option<Arc<App>> {
        self.apps.iter().find(|app| app.name == name).cloned()
    }

    pub(crate) fn app_of(&self, database: &str) -> Option<Arc<App>> {
        let named = self.apps.iter().find(|app| app.databases.iter().any(|name| name == database));
        named.or_else(|| self.apps.iter().find(|app| app.serves(database))).cloned()
    }

    /// Sessions that share servers are in one engine.
    fn engine_of(&self, session: &Session) -> usize {
        let own = || self.apps.iter().position(|app| Arc::ptr_eq(app, &session.app)).unwrap_or(0);
        let number = match &session.sharing {
            Some(_) => own(),
            None => usize::try_from(session.id).unwrap_or(0),
        };
        number % self.engines.len().max(1)
    }

    /// The pid that a client is told who has no server yet. Linux has none so large.
    pub(crate) fn own_pid(&self, id: u64) -> i32 {
        0x4000_0000 | i32::try_from(id & 0x3fff_ffff).unwrap_or(0)
    }

    /// A session begins: its cancel key works from now on.
    pub(crate) fn begin(&self, mut session: Box<Session>) {
        self.metrics.logins.fetch_add(1, Ordering::Relaxed);
        let key = (session.client_pid, session.client_secret.clone());
        let engine = self.engine_of(&session);
        session.place.key = Some(key.clone());
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).insert(key, (session.id, engine));
        self.give(session);
    }

    /// Gives a session to its engine.
    pub(crate) fn give(&self, session: Box<Session>) {
        if let Some(engine) = self.engines.get(self.engine_of(&session)) {
            engine.add(session);
        }
    }

    /// A session that was held goes on.
    pub(crate) fn go_on(&self, mut session: Box<Session>, pauses: &mut Vec<f64>) {
        if let Some(since) = session.held_since.take() {
            let pause = since.elapsed();
            self.metrics.count_pause(pause);
            pauses.push(pause.as_secs_f64() * 1_000.0);
        }
        self.give(session);
    }

    pub(crate) fn session_of_key(
        &self,
        pid: i32,
        secret: &[u8],
    ) -> Option<(u64, Arc<EngineHandle>)> {
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        let (id, engine) = *keys.get(&(pid, secret.into()))?;
        Some((id, self.engines.get(engine)?.clone()))
    }

    pub(crate) async fn views(&self) -> Vec<SessionView> {
        let mut views = Vec::new();
        for engine in &self.engines {
            views.extend(engine.views().await);
        }
        views.sort_by_key(|view| view.id);
        views
    }
}

impl Shared {
    /// Closes the gate and has every session taken from its server, which may take the engines a moment.
    pub(crate) fn cut(&self, app: &Arc<App>) {
        app.lose();
        for engine in &self.engines {
            engine.send(Command::Cut(app.clone()));
        }
    }

    pub(crate) async fn pools(&self) -> Vec<PoolView> {
        let mut pools = Vec::new();
        for engine in &self.engines {
            pools.extend(engine.pools().await);
        }
        pools
    }
}

/// A running proxy.
pub struct Proxy {
    pub(crate) shared: Arc<Shared>,
    listeners: Mutex<Vec<JoinHandle<()>>>,
    addresses: Vec<std::net::SocketAddr>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

#[derive(Debug, Error)]
pub enum StartError {
    #[error("cannot listen on `{address}`")]
    Listen { address: std::net::SocketAddr, source: io::Error },
    #[error("engine cannot be started")]
    Engine(#[source] io::Error),
    #[error("application `{app}` has no cell `{cell}`, which its state says is active")]
    NoCell { app: String, cell: String },
}

impl Proxy {
    /// Starts to serve. `active` names the active cell of each application.
    ///
    /// # Errors
    /// An address is taken, or the state names a cell that is not configured.
    pub async fn start(
        config: ProxyConfig,
        active: &BTreeMap<String, String>,
    ) -> Result<Proxy, StartError> {
        let descriptors = crate::engine::raise_descriptor_limit();
        let clients_max = config.limits.clients_max;
        let needed = u64::try_from(clients_max).unwrap_or(u64::MAX).saturating_mul(2);
        if descriptors < needed.saturating_add(100) {
            tracing::warn!(
                descriptors,
                clients_max,
                "too few descriptors for so many clients, see `ulimit -n`"
            );
        }
        let mut apps = Vec::new();
        for app in &config.apps {
            let cell = active.get(&app.name).map(String::as_str).unwrap_or_default();
            if !app.cells.contains_key(cell) && !cell.is_empty() {
                return Err(StartError::NoCell { app: app.name.clone(), cell: cell.into() });
            }
            apps.push(Arc::new(App::new(app.clone(), cell)));
        }
        let clock = Clock::new();
        let idle = u32::try_from(config.limits.idle_timeout.as_secs()).unwrap_or(u32::MAX);
        let (mut engines, mut threads) = (Vec::new(), Vec::new());
        for number in 0..config.engines.max(1) {
            let (engine, thread) =
                EngineHandle::start(&format!("engine-{number}"), idle, clock.clone())
                    .map_err(StartError::Engine)?;
            engines.push(engine);
            threads.push(thread);
        }
        let shared = Arc::new(Shared {
            logins: Arc::new(Semaphore::new(config.limits.logins_max)),
            apps,
            engines,
            metrics: Metrics::default(),
            clock: clock.clone(),
            random: SystemRandom::new(),
            next_id: AtomicU64::new(config.first_id),
            clients: AtomicUsize::new(0),
            keys: Mutex::default(),
            rereads: OnceLock::new(),
            strays: OnceLock::new(),
            config,
        });
        let (mut listeners, mut addresses) = (Vec::new(), Vec::new());
        for address in &shared.config.listen {
            let listener = listen(*address)
                .map_err(|source| StartError::Listen { address: *address, source })?;
            addresses.extend(listener.local_addr());
            listeners.push(tokio::spawn(listener::run(listener, shared.clone())));
        }
        let (jobs, incoming) = mpsc::unbounded_channel();
        for engine in &shared.engines {
            engine.set_keeper(jobs.clone());
        }
        listeners.push(tokio::spawn(keeper::run(shared.clone(), incoming)));
        for app in shared.apps.iter().filter(|app| app.pool.is_some()) {
            listeners.push(tokio::spawn(keeper::watch(shared.clone(), app.clone())));
        }
        for app in &shared.apps {
            listeners.push(tokio::spawn(keeping::watch(app.clone())));
        }
        let began = Instant::now();
        listeners.push(tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(500)).await;
                clock.set(u32::try_from(began.elapsed().as_secs()).unwrap_or(u32::MAX));
            }
        }));
        Ok(Proxy {
            shared,
            listeners: Mutex::new(listeners),
            addresses,
            threads: Mutex::new(threads),
        })
    }

    /// How rules are read anew, once and for all.
    pub fn rereads_by(&self, reread: Rereads) {
        let _ = self.shared.rereads.set(reread);
    }

    /// Where clients may connect.
    pub fn addresses(&self) -> &[std::net::SocketAddr] {
        &self.addresses
    }

    /// Cancel requests that are for none of our sessions, from now on. Who takes them too slowly misses some.
    pub fn strays(&self) -> mpsc::Receiver<Cancel> {
        let (strays, taken) = mpsc::channel(CANCELS_MAX);
        // Whoever asks first has them.
        let _ = self.shared.strays.set(strays);
        taken
    }

    /// Carries out a cancel request that has come to another proxy, if it is for one of our sessions.
    pub async fn cancel(&self, cancel: &Cancel) {
        let _ = login::cancel(&self.shared, cancel).await;
    }

    pub fn mover(&self) -> Mover {
        Mover::new(self.shared.clone())
    }

    pub async fn sessions(&self) -> Vec<SessionView> {
        self.shared.views().await
    }

    /// Takes every session of an application from its server, whatever orders are being obeyed; new work waits. Whoever has
    /// something there that is nowhere else is told and ended.
    pub fn cut(&self, app: &str) {
        if let Some(app) = self.shared.app(app) {
            self.shared.cut(&app);
        }
    }

    /// Nothing that clients of an application send reaches a server from that moment on, of this host's clock
    /// (`CLOCK_BOOTTIME`): it waits, until another moment is set or its session is cut. Without a word it always does.
    pub fn passes_until(&self, app: &str, moment: model::lease::Moment) {
        if let Some(app) = self.shared.app(app) {
            app.set_passes_until(moment);
        }
    }

    /// Holdfast's own connection to a cell's server.
    ///
    /// # Errors
    /// There is no such cell, or its server takes no login.
    pub async fn admin(&self, app: &str, cell: &str) -> Result<Admin, String> {
        let app = self.shared.app(app).ok_or("this proxy has no such application")?;
        let cell = app.cells.get(cell).ok_or("the application has no such cell")?;
        Admin::connect(&cell.target, &app.admin).await.map_err(|error| model::chain(&error))
    }

    /// Sessions of an application, wherever they are.
    pub fn session_count(&self, app: &str) -> usize {
        self.shared.app(app).map_or(0, |app| app.sessions.load(Ordering::SeqCst))
    }

    /// Everything that is counted, in Prometheus' text format.
    pub fn write_metrics(&self, out: &mut String) {
        let sum = |read: &dyn Fn(&crate::engine::Counters) -> u64| {
            self.shared.engines.iter().map(|engine| read(&engine.counters)).sum::<u64>()
        };
        let per_app = self.shared.apps.iter().map(|app| {
            let count = u64::try_from(app.sessions.load(Ordering::SeqCst)).unwrap_or(0);
            (format!("{{app=\"{}\"}}", app.name), count)
        });
        let rules: Vec<(String, u64)> =
            self.shared.apps.iter().flat_map(|app| app.rule_counts()).collect();
        let help = "Commands that a rule of the policy was about, by what became of them.";
        write_metric(out, "holdfast_policy_commands_total", "counter", help, &rules);
        write_metric(out, "holdfast_sessions", "gauge", "Sessions.", &per_app.collect::<Vec<_>>());
        let held = self.shared.apps.iter().map(|app| {
            (format!("{{app=\"{}\"}}", app.name), u64::from(app.holding.load(Ordering::SeqCst)))
        });
        write_metric(
            out,
            "holdfast_held",
            "gauge",
            "1 while new work is held.",
            &held.collect::<Vec<_>>(),
        );
        let clients = u64::try_from(self.shared.clients.load(Ordering::SeqCst)).unwrap_or(0);
        write_metric(
            out,
            "holdfast_clients",
            "gauge",
            "Connections of clients.",
            &[(String::new(), clients)],
        );
        let bytes = [
            ("{direction=\"in\"}".to_owned(), sum(&|c| c.bytes_in.load(Ordering::Relaxed))),
            ("{direction=\"out\"}".to_owned(), sum(&|c| c.bytes_out.load(Ordering::Relaxed))),
        ];
        write_metric(
            out,
            "holdfast_bytes_total",
            "counter",
            "Bytes from clients and to clients.",
            &bytes,
        );
        let one = |value| [(String::new(), value)];
        let requests = sum(&|c| c.requests.load(Ordering::Relaxed));
        write_metric(
            out,
            "holdfast_requests_total",
            "counter",
            "Requests answered.",
            &one(requests),
        );
        let errors = [
            ("{kind=\"protocol\"}".to_owned(), sum(&|c| c.protocol_errors.load(Ordering::Relaxed))),
            ("{kind=\"server_lost\"}".to_owned(), sum(&|c| c.lost_server.load(Ordering::Relaxed))),
        ];
        let outlived = sum(&|c| c.outlived.load(Ordering::Relaxed));
        write_metric(
            out,
            "holdfast_errors_total",
            "counter",
            "Sessions ended by an error.",
            &errors,
        );
        write_metric(
            out,
            "holdfast_servers_outlived_total",
            "counter",
            "Servers that were lost under a session that went on with another.",
            &one(outlived),
        );
        self.shared.metrics.write(out);
    }

    /// Stops to accept, lets running requests end until `grace` has passed, tells who is left, and ends.
    pub async fn stop(&self, grace: Duration) {
        for task in self.listeners.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            task.abort();
        }
        let report = Report::fatal(
            SqlState::ADMIN_SHUTDOWN,
            "terminating connection due to administrator command",
        )
        .detail("the proxy is shutting down");
        let deadline = Instant::now() + grace;
        let (out, mut incoming) = mpsc::unbounded_channel();
        for app in &self.shared.apps {
            app.hold();
            for engine in &self.shared.engines {
                engine.send(Command::Want(Want::App(app.clone()), out.clone()));
            }
        }
        let left = || {
            self.shared.apps.iter().map(|app| app.sessions.load(Ordering::SeqCst)).sum::<usize>()
        };
        while left() > 0 && Instant::now() < deadline {
            if let Ok(Some(session)) =
                tokio::time::timeout(Duration::from_millis(10), incoming.recv()).await
            {
                session.tell_and_end(&report);
            }
        }
        for engine in &self.shared.engines {
            for app in &self.shared.apps {
                engine.send(Command::End(Want::App(app.clone()), report.clone()));
            }
            engine.send(Command::Stop);
        }
        for thread in self.threads.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // An engine that panicked has ended, too.
            let _ = thread.join();
        }
    }
}

/// A backlog that holds a flood of logins; the kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

fn listen(address: std::net::SocketAddr) -> io::Result<TcpListener> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}
