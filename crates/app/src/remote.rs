//! A proxy whose control is in another process: asks what to serve, obeys, and holds where nothing is proven.
//! What it makes of what it is told is said by `model::proxies`.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::SocketAddr as TcpAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::State as Extract;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use link::{Client, ClientError, Controls};
use model::barrier::{Order as Barrier, Report};
use model::cell::CellState;
use model::lease::{Moment, Terms};
use model::proxies::{
    Action, Bye, CANCEL_MAX, Cancel, Contact, Fetch, FetchCancels, Fetched, FetchedCancels,
    Finished, Follower, Open, Order, Renew, Renewed, SESSIONS_OF_ONE, Sender, Stray,
};
use model::seat::Tenure;
use pg::Address;
use pg::admin::Admin;
use pg::clock;
use proxy::mover::Mover;
use proxy::{Proxy, ProxyConfig};
use serde::Deserialize;
use tls::mutual::Mutual;
use tokio::net::TcpListener;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::run::{GRACE, RunError};

/// Between two looks at what is proven.
const TICK: Duration = Duration::from_millis(50);
/// Until control has said how long a lease is.
const FIRST_MAX: Duration = Duration::from_secs(2);
const REPORT_MAX: Duration = Duration::from_secs(5);
/// How often what became of an order is offered.
const REPORT_TRIES: u32 = 20;
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Between two words that control is not heard.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// Orders and actions that may wait.
const JOBS_MAX: usize = 256;
/// What became of orders, that may wait to be said.
const FINISHED_MAX: usize = 64;

/// A proxy whose control is elsewhere, by its configuration.
#[derive(Debug, Clone)]
pub(crate) struct RemoteConfig {
    pub(crate) name: String,
    /// Nodes of control, one of which is control.
    pub(crate) control: Vec<Address>,
    pub(crate) tls: Option<Mutual>,
    /// For load balancers and Prometheus.
    pub(crate) health: Option<TcpAddr>,
    pub(crate) proxy: ProxyConfig,
}

/// A running proxy whose control is elsewhere.
pub(crate) struct Remote {
    pub(crate) proxy: Arc<Proxy>,
    following: Arc<Following>,
    tasks: JoinSet<()>,
    /// So that no other process on this host goes by the same name.
    _name: UnixListener,
}

struct Following {
    controls: Arc<Controls>,
    sender: Sender,
    proxy: Arc<Proxy>,
    state: Mutex<State>,
    /// Control is to be asked at once.
    hurry: Notify,
    jobs: mpsc::Sender<Job>,
}

#[derive(Default)]
struct State {
    contact: Contact,
    followers: BTreeMap<String, Follower>,
    /// Applications for which an action of our own waits.
    queued: BTreeSet<String>,
}

enum Job {
    /// Of the control of a tenure, and when it was asked for.
    Ordered(Order, Moment, Tenure),
    Own(String, Action),
}

/// Control has heard.
#[derive(Deserialize)]
struct Heard {}

impl Remote {
    /// Starts to serve once control has been heard.
    ///
    /// # Errors
    /// An address is taken, or the name.
    pub(crate) async fn start(config: RemoteConfig) -> Result<Remote, RunError> {
        let RemoteConfig { name, control, tls, health, proxy } = config;
        let controls = Controls::new(control, tls);
        let own = take_name(&name, &controls).await?;
        let run =
            u64::from(std::process::id()) << 32 | (clock::now().0.as_millis() & 0xffff_ffff) as u64;
        let sender = Sender { name, host: clock::network_number(), run };
        let number = first_number(&controls, &sender).await;
        let first_id = number.saturating_mul(SESSIONS_OF_ONE).saturating_add(1);
        let apps: Vec<String> = proxy.apps.iter().map(|app| app.name.clone()).collect();
        let nobody = apps.iter().map(|app| (app.clone(), String::new())).collect();
        let proxy = Proxy::start(ProxyConfig { first_id, ..proxy }, &nobody).await?;
        let proxy = Arc::new(proxy);
        let (jobs, incoming) = mpsc::channel(JOBS_MAX);
        let (finished, to_say) = mpsc::channel(FINISHED_MAX);
        let followers = apps.iter().map(|app| (app.clone(), Follower::default())).collect();
        let following = Arc::new(Following {
            controls,
            sender,
            proxy: proxy.clone(),
            state: Mutex::new(State { followers, ..State::default() }),
            hurry: Notify::new(),
            jobs,
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(following.clone().renew());
        tasks.spawn(following.clone().fetch());
        tasks.spawn(following.clone().obey(incoming, finished));
        tasks.spawn(following.clone().say(to_say));
        tasks.spawn(following.clone().watch());
        tasks.spawn(following.clone().pass_cancels_on(following.proxy.strays()));
        tasks.spawn(following.clone().hear_cancels());
        for app in apps {
            tasks.spawn(following.clone().ask_server(app));
        }
        if let Some(address) = health {
            let listener = TcpListener::bind(address).await;
            let listener = listener.map_err(|source| RunError::Api { address, source })?;
            let routes = routes(following.clone());
            tasks.spawn(async move {
                if let Err(error) = axum::serve(listener, routes).await {
                    tracing::error!(%error, "health is told no more");
                }
            });
        }
        Ok(Remote { proxy, following, tasks, _name: own })
    }

    /// Resolves when something of it has ended that never should: what is left would serve and obey nothing.
    pub(crate) async fn failed(&mut self) {
        let _ = self.tasks.join_next().await;
    }

    /// Lets running requests end, and tells control that nobody has to wait for this proxy.
    pub(crate) async fn stop(mut self) {
        self.proxy.stop(GRACE).await;
        self.tasks.shutdown().await;
        let bye = Bye { sender: self.following.sender.clone() };
        let told =
            self.following.client().post::<_, Heard>("/v1/proxies/bye", &bye, REPORT_MAX).await;
        if let Err(error) = told {
            tracing::warn!(error = model::chain(&error), "control does not know that we end");
        }
    }
}

/// Takes the name on this host, once the last process of it has ended.
async fn take_name(name: &str, controls: &Controls) -> Result<UnixListener, RunError> {
    let mut said: Option<Moment> = None;
    loop {
        // Such a name has 107 bytes at most (unix(7)), which the addresses of a few nodes may exceed.
        let mut of = DefaultHasher::new();
        controls.to_string().hash(&mut of);
        let own = format!("holdfast-proxy-{:016x}-{name}", of.finish());
        let own = SocketAddr::from_abstract_name(own);
        match own.and_then(|own| UnixListener::bind_addr(&own)) {
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                say_now_and_then(&mut said, || {
                    tracing::warn!(name, "another proxy of this name runs on this host");
                });
                sleep(RETRY_PAUSE).await;
            }
            taken => {
                return taken.map_err(|source| RunError::Name { name: name.to_owned(), source });
            }
        }
    }
}

fn say_now_and_then(said: &mut Option<Moment>, say: impl FnOnce()) {
    let now = clock::now();
    if said.is_none_or(|at| at.plus(SAY_EVERY).from(now).is_zero()) {
        *said = Some(now);
        say();
    }
}

/// Asks control who we are, until it answers.
async fn first_number(controls: &Arc<Controls>, sender: &Sender) -> u64 {
    let mut client = controls.client();
    let mut said: Option<Moment> = None;
    loop {
        let asked =
            Renew { sender: sender.clone(), sessions: BTreeMap::new(), holds: BTreeSet::new() };
        match client.post::<_, Renewed>("/v1/proxies/renew", &asked, FIRST_MAX).await {
            Ok(renewed) => return renewed.number,
            Err(error) => {
                say_now_and_then(&mut said, || {
                    tracing::warn!(
                        error = model::chain(&error),
                        "nobody is served before control answers"
                    );
                });
                controls.turn();
                sleep(RETRY_PAUSE).await;
            }
        }
    }
}

impl Following {
    fn client(&self) -> Client {
        self.controls.client()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the proxy do something by itself, once. What is not proven any more is not served any more, whatever is being
    /// done just now.
    fn act_on(&self, state: &mut State, app: &str, action: Action) {
        if action == Action::Cut {
            tracing::error!(app, "nobody is served: what is served is not proven any more");
            self.proxy.passes_until(app, Moment(Duration::ZERO));
            self.proxy.cut(app);
            return;
        }
        if state.queued.insert(app.to_owned())
            && self.jobs.try_send(Job::Own(app.to_owned(), action)).is_err()
        {
            // It is asked for again.
            state.queued.remove(app);
        }
    }

    /// What clients send passes for as long as is proven now.
    fn pass(&self, state: &State) {
        for (app, follower) in &state.followers {
            if let Some(moment) = follower.passes_until(&state.contact) {
                self.proxy.passes_until(app, moment);
            }
        }
    }

    async fn renew(self: Arc<Self>) {
        let mut client = self.client();
        let mut is_heard = true;
        loop {
            let sent = clock::now();
            let (sessions, holds) = {
                let state = self.state();
                let count = |app: &str| u64::try_from(self.proxy.session_count(app)).unwrap_or(0);
                let sessions =
                    state.followers.keys().map(|app| (app.clone(), count(app))).collect();
                let holding = state.followers.iter().filter(|(_, follower)| follower.holds());
                (sessions, holding.map(|(app, _)| app.clone()).collect())
            };
            let question = Renew { sender: self.sender.clone(), sessions, holds };
            let terms = self.state().contact.terms();
            let every = terms.map_or(FIRST_MAX, Terms::renew_every);
            match client.post::<_, Renewed>("/v1/proxies/renew", &question, every).await {
                Ok(renewed) if !Terms::LENGTHS.contains(&renewed.terms.length) => {
                    let length = renewed.terms.length;
                    tracing::error!(?length, "control speaks of a lease that there is not");
                    sleep(RETRY_PAUSE).await;
                }
                Ok(renewed) => {
                    if !is_heard {
                        tracing::info!("control answers again");
                    }
                    is_heard = true;
                    self.told(&renewed, sent);
                    let _ = timeout(renewed.terms.renew_every(), self.hurry.notified()).await;
                }
                Err(error) => {
                    if is_heard {
                        tracing::warn!(error = model::chain(&error), "control is not heard");
                    }
                    is_heard = false;
                    // Another node may be control.
                    self.controls.turn();
                    sleep(RETRY_PAUSE.min(every / 4)).await;
                }
            }
        }
    }

    fn told(&self, renewed: &Renewed, sent: Moment) {
        let mut state = self.state();
        state.contact.answered(sent, renewed.terms, clock::now());
        for (app, route) in &renewed.routes {
            let Some(follower) = state.followers.get_mut(app) else { continue };
            if let Some(action) = follower.told(route, sent) {
                self.act_on(&mut state, app, action);
            }
        }
        self.pass(&state);
    }

    async fn fetch(self: Arc<Self>) {
        let mut client = self.client();
        let (mut last, mut tenure) = (0, Tenure::default());
        loop {
            let sent = clock::now();
            let contact = self.state().contact;
            let (Some(_), Some(terms)) = (contact.held(sent), contact.terms()) else {
                // An order that was asked for before control was heard would not be obeyed.
                sleep(TICK).await;
                continue;
            };
            // Control answers within half of that.
            let limit = terms.renew_every() * 2;
            let question = Fetch { sender: self.sender.clone(), last };
            match client.post::<_, Fetched>("/v1/proxies/orders", &question, limit).await {
                Ok(fetched) => {
                    if tenure != client.tenure() {
                        // Another control counts its orders anew.
                        (last, tenure) = (0, client.tenure());
                    }
                    for order in fetched.orders {
                        last = order.id;
                        if self.jobs.send(Job::Ordered(order, sent, tenure)).await.is_err() {
                            return;
                        }
                    }
                }
                // It is said where it is asked what to serve.
                Err(_) => sleep(RETRY_PAUSE).await,
            }
        }
    }

    /// Cancel requests for none of our sessions go to control, which tells the other proxies.
    async fn pass_cancels_on(self: Arc<Self>, mut strays: mpsc::Receiver<Cancel>) {
        let mut client = self.client();
        while let Some(cancel) = strays.recv().await {
            let stray = Stray { sender: self.sender.clone(), cancel };
            let told = client.post::<_, Heard>("/v1/proxies/cancel", &stray, CANCEL_MAX).await;
            if let Err(error) = told {
                tracing::debug!(error = model::chain(&error), "a cancel request is lost");
            }
        }
        std::future::pending().await
    }

    async fn hear_cancels(self: Arc<Self>) {
        let mut client = self.client();
        loop {
            let terms = self.state().contact.terms();
            let limit = terms.map_or(FIRST_MAX, |terms| terms.renew_every() * 2);
            let question = FetchCancels { sender: self.sender.clone() };
            let asked = client.post::<_, FetchedCancels>("/v1/proxies/cancels", &question, limit);
            match asked.await {
                Ok(FetchedCancels { cancels }) => {
                    for cancel in &cancels {
                        self.proxy.cancel(cancel).await;
                    }
                }
                // One of before knows nothing of it, and one that is none any more says so.
                Err(ClientError::Refused(_)) => sleep(FIRST_MAX).await,
                Err(_) => sleep(RETRY_PAUSE).await,
            }
        }
    }

    /// One thing after the other.
    async fn obey(
        self: Arc<Self>,
        mut jobs: mpsc::Receiver<Job>,
        finished: mpsc::Sender<Finished>,
    ) {
        let mut mover = self.proxy.mover();
        while let Some(job) = jobs.recv().await {
            match job {
                Job::Own(app, action) => self.act(&mut mover, &app, action).await,
                Job::Ordered(order, sent, tenure) => {
                    let id = order.id;
                    let obeyed = match self.controls.is_latest(tenure) {
                        true => self.carry_out(&mut mover, order, sent).await,
                        false => Err("it was given by an earlier control".into()),
                    };
                    let report = match obeyed {
                        Ok(report) => report,
                        Err(error) => {
                            tracing::warn!(order = id, error, "an order was not obeyed");
                            Report { error: Some(error), ..Report::default() }
                        }
                    };
                    self.hurry.notify_one();
                    let done = Finished { sender: self.sender.clone(), id, report };
                    if finished.send(done).await.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Says what became of orders, while control waits for that.
    async fn say(self: Arc<Self>, mut finished: mpsc::Receiver<Finished>) {
        let mut client = self.client();
        while let Some(done) = finished.recv().await {
            for _ in 0..REPORT_TRIES {
                let limit = self.state().contact.terms().map_or(FIRST_MAX, Terms::renew_every);
                match client.post::<_, Heard>("/v1/proxies/finished", &done, limit).await {
                    Ok(Heard {}) => break,
                    Err(error) => {
                        tracing::warn!(error = model::chain(&error), "control has not heard");
                        sleep(RETRY_PAUSE).await;
                    }
                }
            }
        }
    }

    async fn carry_out(
        &self,
        mover: &mut Mover,
        order: Order,
        sent: Moment,
    ) -> Result<Report, String> {
        let app = order.what.app().to_owned();
        let by = {
            let mut state = self.state();
            let now = clock::now();
            state.contact.check(&order, sent, now)?;
            let by = state.contact.held(now).ok_or("control is not heard any more")?;
            let follower = state.followers.get_mut(&app);
            let follower = follower.ok_or_else(|| format!("there is no application `{app}`"))?;
            follower.check(&order.what)?;
            if matches!(order.what, Barrier::Hold { .. } | Barrier::Cut { .. }) {
                // From its begin on.
                follower.obeyed(&order.what, by, now);
                self.pass(&state);
            }
            by
        };
        let report = self.have_done(mover, &order.what, by).await;
        Ok(report)
    }

    /// Obeys an order by the answer of control to what was asked at `by`.
    async fn have_done(&self, mover: &mut Mover, order: &Barrier, by: Moment) -> Report {
        let terms = self.state().contact.terms();
        if let (Barrier::Release { app, .. }, Some(terms)) = (order, terms) {
            self.proxy.passes_until(app, terms.stop_at(by));
        }
        let report = mover.obey(order.clone()).await;
        if let Barrier::GiveUp { app } = order {
            // Also whoever was not held: nothing passes for them from now on, and nobody would tell them.
            self.proxy.cut(app);
        }
        if report.error.is_none() {
            let mut state = self.state();
            if let Some(follower) = state.followers.get_mut(order.app()) {
                follower.obeyed(order, by, clock::now());
            }
            self.pass(&state);
        }
        report
    }

    async fn act(&self, mover: &mut Mover, app: &str, action: Action) {
        // An order may have come between.
        let by = {
            let state = self.state();
            let is_wanted =
                state.followers.get(app).is_some_and(|follower| follower.wants(&action));
            let now = clock::now();
            let by = match &action {
                // Only by what is still proven.
                Action::Release(_) => state.contact.held(now),
                Action::Cut | Action::GiveUp => Some(now),
            };
            by.filter(|_| is_wanted)
        };
        if let Some(by) = by {
            let app = app.to_owned();
            let order = match action {
                Action::Cut => Barrier::Cut { app },
                Action::GiveUp => {
                    tracing::error!(app, "whoever is held is told: control is not heard");
                    Barrier::GiveUp { app }
                }
                Action::Release(Open { cell, state, epoch }) => {
                    tracing::info!(app, cell, %state, %epoch, "application is served");
                    Barrier::Release { app, to: cell, state, epoch }
                }
            };
            if let Some(error) = self.have_done(mover, &order, by).await.error {
                tracing::error!(app = order.app(), error, "application cannot be served");
            }
        }
        self.state().queued.remove(app);
    }

    /// Looks whether what is served is still proven.
    async fn watch(self: Arc<Self>) {
        loop {
            sleep(TICK).await;
            let now = clock::now();
            let mut state = self.state();
            let contact = state.contact;
            let acts: Vec<(String, Action)> = state
                .followers
                .iter_mut()
                .filter_map(|(app, follower)| Some((app.clone(), follower.at(now, &contact)?)))
                .collect();
            for (app, action) in acts {
                self.act_on(&mut state, &app, action);
            }
        }
    }

    /// Asks an application's server whether it is what it was: once while control is heard, and again and again while that
    /// proves nothing.
    async fn ask_server(self: Arc<Self>, app: String) {
        let mut open: Option<(String, Admin)> = None;
        loop {
            let terms = self.state().contact.terms();
            let every = terms.map_or(FIRST_MAX, Terms::renew_every);
            sleep(every / 2).await;
            let sent = clock::now();
            let cell = {
                let state = self.state();
                let follower = state.followers.get(&app);
                let asks = follower.zip(terms).and_then(|(follower, t)| follower.asks(sent, t));
                asks.map(|open| open.cell.clone())
            };
            let Some(cell) = cell else { continue };
            let answer = timeout(every, async {
                let mut admin = match open.take() {
                    Some((of, admin)) if of == cell => admin,
                    _ => self.proxy.admin(&app, &cell).await?,
                };
                let answer = admin.proof().await.map_err(|error| model::chain(&error))?;
                Ok::<_, String>((admin, answer))
            });
            match answer.await.unwrap_or_else(|_| Err(format!("no answer in {every:?}"))) {
                Ok((admin, answer)) => {
                    open = Some((cell, admin));
                    let mut state = self.state();
                    let is_heard = state.contact.held(clock::now()).is_some();
                    if let Some(follower) = state.followers.get_mut(&app) {
                        follower.answered(answer, sent, is_heard);
                    }
                    self.pass(&state);
                }
                Err(error) => {
                    tracing::warn!(app, cell, error, "its server does not say what it is");
                }
            }
        }
    }
}

/// Health for load balancers, and metrics.
fn routes(following: Arc<Following>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/liveness", get(|| async { "alive\n" }))
        .route("/health", get(|| async { "healthy\n" }))
        .route("/readiness", get(primary))
        .route("/primary", get(primary))
        .route("/read-write", get(primary))
        .route("/read-only", get(read_only))
        .with_state(following)
}

async fn metrics(Extract(following): Extract<Arc<Following>>) -> Response {
    let mut out = String::new();
    following.proxy.write_metrics(&mut out);
    ([("content-type", "text/plain; version=0.0.4")], out).into_response()
}

async fn primary(Extract(following): Extract<Arc<Following>>) -> (StatusCode, String) {
    served(&following, "primary", CellState::takes_writes)
}

async fn read_only(Extract(following): Extract<Arc<Following>>) -> (StatusCode, String) {
    served(&following, "read-only", |state| state.takes_writes() || state == CellState::Fenced)
}

fn served(
    following: &Following,
    what: &str,
    does: impl Fn(CellState) -> bool,
) -> (StatusCode, String) {
    let state = following.state();
    let lacks = state
        .followers
        .iter()
        .find(|(_, follower)| !follower.open().is_some_and(|open| does(open.state)));
    match lacks {
        None => (StatusCode::OK, format!("{what}\n")),
        Some((app, follower)) => {
            let text = match follower.open() {
                Some(open) => format!("cell `{}` of `{app}` is {}\n", open.cell, open.state),
                None => format!("application `{app}` is not served\n"),
            };
            (StatusCode::SERVICE_UNAVAILABLE, text)
        }
    }
}
