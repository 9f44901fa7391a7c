//! The proxies of an installation: the one of this process, and others that ask control what to do.
//!
//! A change is ordered of all of them. Who does not obey is waited for, before anything relies on it, until it goes by
//! nothing that was (`model::proxies`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use model::barrier::{Order, Report};
use model::lease::{Moment, Terms};
use model::persisted::{Registered, proxy_key};
use model::proxies::{
    self, Bye, Fetch, Fetched, Finished, Open, PROXIES_MAX, Renew, Renewed, Route, Sender,
};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use crate::Ask;
use crate::cancels::Hearing;
use crate::control::Control;
use crate::mailbox::{Identity, Mailbox, Posted};
use crate::records;
use crate::requests::ControlError;

/// How long a proxy may take for what is done with all its sessions.
const WORK_MAX: Duration = Duration::from_secs(120);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(20);
/// How long it may take to let go of a lost server, which is all that others wait for.
const CUT_MAX: Duration = Duration::from_secs(3);
/// How long it may take to list its sessions, for people.
const LIST_MAX: Duration = Duration::from_secs(5);
/// What it may take longer than the deadline that it is given.
const LATE_MAX: Duration = Duration::from_secs(15);

/// A proxy of another process.
#[derive(Debug)]
pub(crate) struct Remote {
    name: String,
    mailbox: Mailbox<Order, Report>,
    cancels: Hearing,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    registered: Registered,
    /// Where it was heard from last.
    peer: Option<IpAddr>,
    /// Sessions of each application, as it has said last.
    sessions: BTreeMap<String, u64>,
    /// Applications whose sessions it holds by order.
    holds: BTreeSet<String>,
    /// Applications of which it has not taken part in the last change.
    is_late: BTreeSet<String>,
}

/// A proxy of another process, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyView {
    pub name: String,
    pub is_heard: bool,
    /// It has said that it ends.
    pub is_out: bool,
    /// Applications in which nobody waits for it any more, as it was silent.
    pub out_of: BTreeSet<String>,
    /// Applications in which another process of its name may serve.
    pub ghosts: BTreeSet<String>,
    pub sessions: BTreeMap<String, u64>,
}

fn identity(sender: &Sender) -> Identity {
    (sender.host, sender.run)
}

impl Remote {
    pub(crate) fn new(
        name: &str,
        terms: Terms,
        registered: Registered,
        cancels: Hearing,
    ) -> Remote {
        let (peer, sessions, holds, is_late) = Default::default();
        Remote {
            name: name.into(),
            mailbox: Mailbox::new(format!("proxy `{name}`"), terms.length),
            cancels,
            state: Mutex::new(State { registered, peer, sessions, holds, is_late }),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn cancels(&self) -> &Hearing {
        &self.cancels
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has it obey, if it is there and this concerns it. What cannot be taken back any more is asked for again for a while:
    /// control, or the way to the proxy, may have stood still, and its sessions have nothing to lose.
    async fn obey(&self, order: Order, patience: Duration) -> Option<Report> {
        let app = order.app().to_owned();
        let patience = {
            let state = self.state();
            let is_its = match &order {
                Order::Move { session: Some(id), .. } => {
                    proxies::number_of(*id) == state.registered.number
                }
                // Those that have not held were reported as missing then.
                order => !order.needs_hold() || state.holds.contains(&app),
            };
            if !state.registered.may_serve(&app) || !is_its {
                return None;
            }
            if state.holds.contains(&app) { patience } else { Duration::ZERO }
        };
        let limit = match &order {
            Order::Hold { deadline_ms, .. } | Order::Move { deadline_ms, .. } => {
                Duration::from_millis(*deadline_ms).saturating_add(LATE_MAX)
            }
            Order::Cut { .. } => CUT_MAX,
            Order::List { .. } | Order::Compare { .. } => LIST_MAX,
            _ => WORK_MAX,
        };
        let deadline = Instant::now() + patience;
        let answer = loop {
            let answer = self.mailbox.ask(limit, || order.clone()).await.and_then(|mut report| {
                let refused =
                    report.error.take().map(|error| format!("proxy `{}`: {error}", self.name));
                refused.map_or(Ok(report), Err)
            });
            match &answer {
                Err(why) if order.is_past_return() && Instant::now() < deadline => {
                    tracing::warn!(proxy = self.name, why, "asking again");
                    tokio::time::sleep(LOOK).await;
                }
                _ => break answer,
            }
        };
        let mut state = self.state();
        match (&order, &answer) {
            (Order::Hold { .. } | Order::Cut { .. }, Ok(_)) => {
                state.holds.insert(app);
            }
            (Order::Release { .. } | Order::GiveUp { .. }, _) => {
                state.holds.remove(&app);
            }
            (order, Err(_)) if order.needs_hold() => {
                state.holds.remove(&app);
            }
            _ => (),
        }
        drop(state);
        Some(answer.unwrap_or_else(|why| Report { missing: vec![why], ..Report::default() }))
    }

    /// It may go by what was before the change that is under way.
    fn lags(&self, app: &str) -> bool {
        let state = self.state();
        let Registered { ghosts, .. } = &state.registered;
        let is_free = state.registered.may_serve(app) && !state.holds.contains(app);
        is_free || ghosts.contains(app)
    }

    /// Why a change that is to end nobody cannot be made, whatever the proxy itself says.
    fn haunts(&self, order: &Order) -> Option<String> {
        let begins =
            matches!(order, Order::Prepare { .. } | Order::Inspect { .. } | Order::Hold { .. });
        let is_haunted = begins && self.state().registered.ghosts.contains(order.app());
        is_haunted.then(|| {
            format!("another process of proxy `{}`, on another host, may still serve", self.name)
        })
    }
}

async fn order_here(proxy: &mpsc::Sender<Ask>, order: Order) -> Report {
    let (tx, rx) = oneshot::channel();
    let gone = || Report { error: Some("the proxy does not answer".into()), ..Report::default() };
    if proxy.send((order, tx)).await.is_err() {
        return gone();
    }
    rx.await.unwrap_or_else(|_| gone())
}

impl Control {
    fn remotes(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Remote>>> {
        self.remotes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends an order to every proxy and waits for their reports, which have their own deadlines.
    pub async fn order(&self, order: Order) -> Report {
        let mut elsewhere = JoinSet::new();
        let mut missing = Vec::new();
        let patience = self.config.terms.map_or(Duration::ZERO, |terms| terms.length);
        for remote in self.remotes().values() {
            missing.extend(remote.haunts(&order));
            let (remote, order) = (remote.clone(), order.clone());
            elsewhere.spawn(async move { remote.obey(order, patience).await });
        }
        let is_elsewhere = match &order {
            Order::Move { session: Some(id), .. } => proxies::number_of(*id) != 0,
            _ => false,
        };
        let is_of_one = matches!(&order, Order::Move { session: Some(_), .. });
        let mut reports = match &self.proxies {
            Some(here) if !is_elsewhere => vec![order_here(here, order).await],
            _ => Vec::new(),
        };
        if !missing.is_empty() {
            reports.push(Report { missing, ..Report::default() });
        }
        while let Some(answered) = elsewhere.join_next().await {
            reports.extend(answered.ok().flatten());
        }
        let merged = reports.into_iter().reduce(Report::and);
        merged.unwrap_or_else(|| {
            let error =
                is_of_one.then(|| "no proxy has this session; see `holdfast sessions`".into());
            Report { error, ..Report::default() }
        })
    }

    /// Proxies are told to wait for orders of an application, or what is so from now on.
    pub(crate) fn set_changing(&self, app: &str, is_changing: bool) {
        let mut changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if is_changing {
            changing.insert(app.to_owned());
        } else {
            changing.remove(app);
        }
    }

    /// What an execution left behind of an application is settled: proxies may serve it.
    pub fn settled(&self, app: &str) {
        self.set_changing(app, false);
    }

    /// Waits a while until every proxy is heard that was before: it may have sessions of what is gone on with.
    pub(crate) async fn wait_for_proxies(&self, app: &str) {
        let Some(terms) = self.config.terms else { return };
        let silent = || {
            let remotes = self.remotes();
            let is_silent = |remote: &Arc<Remote>| {
                remote.state().registered.may_serve(app) && remote.mailbox.heard().is_none()
            };
            remotes.values().any(is_silent)
        };
        let wait = async {
            while silent() {
                tokio::time::sleep(LOOK).await;
            }
        };
        // Whoever does not come is missing.
        let _ = tokio::time::timeout(terms.length, wait).await;
    }

    /// Waits until no proxy goes by what was so far, after its server was fenced or lost. Gives the names of those that
    /// were waited for.
    pub(crate) async fn outwait(&self, app: &str) -> Result<Vec<String>, ControlError> {
        let Some(terms) = self.config.terms else { return Ok(Vec::new()) };
        let late: Vec<Arc<Remote>> =
            self.remotes().values().filter(|remote| remote.lags(app)).cloned().collect();
        self.outwait_these(app, terms, late).await
    }

    /// Remembers who does not take part in a change, for [`Control::outwait_late`].
    pub(crate) fn note_late(&self, app: &str) {
        for remote in self.remotes().values().filter(|remote| remote.lags(app)) {
            remote.state().is_late.insert(app.to_owned());
        }
    }

    /// As [`Control::outwait`], of those who did not take part.
    pub(crate) async fn outwait_late(&self, app: &str) -> Result<Vec<String>, ControlError> {
        let Some(terms) = self.config.terms else { return Ok(Vec::new()) };
        let is_late = |remote: &Arc<Remote>| {
            let mut state = remote.state();
            let was_heard = state.peer.is_some();
            let is_late = state.is_late.remove(app) || state.registered.ghosts.contains(app);
            is_late || (state.registered.may_serve(app) && !was_heard)
        };
        let late = self.remotes().values().filter(|&remote| is_late(remote)).cloned().collect();
        self.outwait_these(app, terms, late).await
    }

    async fn outwait_these(
        &self,
        app: &str,
        terms: Terms,
        late: Vec<Arc<Remote>>,
    ) -> Result<Vec<String>, ControlError> {
        if late.is_empty() {
            return Ok(Vec::new());
        }
        tokio::time::sleep(terms.free_at(Moment(Duration::ZERO)).0).await;
        for remote in &late {
            let is_silent = remote.mailbox.heard().is_none();
            self.register(remote, |registered| registered.outwaited(app, is_silent))?;
        }
        Ok(late.iter().map(|remote| remote.name.clone()).collect())
    }

    /// Addresses of proxies that hold their sessions by order.
    pub(crate) fn holders(&self, app: &str) -> BTreeSet<IpAddr> {
        let holding = |remote: &Arc<Remote>| {
            let state = remote.state();
            state.peer.filter(|_| state.holds.contains(app))
        };
        self.remotes().values().filter_map(holding).collect()
    }

    pub fn proxies(&self) -> Vec<ProxyView> {
        let view = |remote: &Arc<Remote>| {
            let is_heard = remote.mailbox.heard().is_some();
            let state = remote.state();
            ProxyView {
                name: remote.name.clone(),
                is_heard,
                is_out: state.registered.is_out,
                out_of: state.registered.out_of.clone(),
                ghosts: state.registered.ghosts.clone(),
                sessions: if is_heard { state.sessions.clone() } else { BTreeMap::new() },
            }
        };
        self.remotes().values().map(view).collect()
    }

    /// Records what is counted on of a proxy, if that changes.
    fn register(
        &self,
        remote: &Remote,
        change: impl FnOnce(&mut Registered),
    ) -> Result<(), ControlError> {
        let mut state = remote.state();
        let mut registered = state.registered.clone();
        change(&mut registered);
        if registered != state.registered {
            records::put(&*self.store, &proxy_key(&remote.name), &registered)?;
            state.registered = registered;
        }
        Ok(())
    }

    pub(crate) fn remote(&self, sender: &Sender) -> Result<Arc<Remote>, ControlError> {
        let unknown =
            || ControlError::Refused(format!("proxy `{}` has not said what it is", sender.name));
        self.remotes().get(&sender.name).cloned().ok_or_else(unknown)
    }

    /// The proxy of this name, which may be new.
    fn enrol(&self, sender: &Sender) -> Result<Arc<Remote>, ControlError> {
        let refused = |text: String| Err(ControlError::Refused(text));
        let Some(terms) = self.config.terms else {
            return refused("control serves no other proxies".into());
        };
        if !proxies::is_name(&sender.name) {
            return refused("the proxy's name is none: letters, digits, `-`, `_` and `.`".into());
        }
        let mut remotes = self.remotes();
        if let Some(remote) = remotes.get(&sender.name) {
            return Ok(remote.clone());
        }
        let numbers = remotes.values().map(|remote| remote.state().registered.number);
        let number = numbers.max().unwrap_or(0) + 1;
        if remotes.len() >= PROXIES_MAX {
            // The name of one that has ended makes room.
            let ended = remotes.iter().find(|(_, remote)| {
                let state = remote.state();
                state.registered.is_out && state.registered.ghosts.is_empty()
            });
            let Some(ended) = ended.map(|(name, _)| name.clone()) else {
                return refused(format!("there are {PROXIES_MAX} proxies already"));
            };
            records::delete(&*self.store, &proxy_key(&ended))?;
            remotes.remove(&ended);
        }
        let registered = Registered { number, host: sender.host, ..Registered::default() };
        // What is not recorded is not counted on after a crash.
        records::put(&*self.store, &proxy_key(&sender.name), &registered)?;
        let cancels = Hearing::of(&self.cancels);
        let remote = Arc::new(Remote::new(&sender.name, terms, registered, cancels));
        remotes.insert(sender.name.clone(), remote.clone());
        tracing::info!(proxy = sender.name, number, "a proxy is new");
        Ok(remote)
    }

    /// Answers a proxy that asks what is to be served.
    ///
    /// # Errors
    /// Another process goes by its name, there are too many, or the store cannot be read or written.
    pub fn renew_proxy(&self, asked: Renew, peer: IpAddr) -> Result<Renewed, ControlError> {
        let Some(terms) = self.config.terms else {
            return Err(ControlError::Refused("control serves no other proxies".into()));
        };
        let remote = self.enrol(&asked.sender)?;
        let other = remote.mailbox.heard().filter(|other| *other != identity(&asked.sender));
        if other.is_some() {
            let name = &remote.name;
            return Err(ControlError::Refused(format!(
                "another process goes by the name of proxy `{name}`; it is heard at the moment"
            )));
        }
        let host = asked.sender.host;
        self.register(&remote, |registered| {
            *registered = registered.heard(host, self.config.apps.keys().cloned());
        })?;
        remote.mailbox.hear(identity(&asked.sender));
        let number = {
            let mut state = remote.state();
            let is_known = |app: &String| self.config.apps.contains_key(app);
            if state.peer.replace(peer).is_none() {
                state.holds = asked.holds.into_iter().filter(is_known).collect();
            }
            state.sessions = asked.sessions;
            state.sessions.retain(|app, _| is_known(app));
            state.registered.number
        };
        let mut routes = BTreeMap::new();
        for app in self.config.apps.keys() {
            routes.insert(app.clone(), self.route(app)?);
        }
        Ok(Renewed { number, terms, routes })
    }

    fn route(&self, app: &str) -> Result<Route, ControlError> {
        // Whoever begins a change says so before it reads or writes anything.
        let changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if changing.contains(app) {
            return Ok(Route::Held);
        }
        let application = records::application(&*self.store, app)?.application;
        let open = |(cell, state): (&str, _)| {
            Route::Open(Open { cell: cell.to_owned(), state, epoch: application.epoch })
        };
        Ok(application.served().map_or(Route::Held, open))
    }

    /// Orders for a proxy, which waits for some a while.
    ///
    /// # Errors
    /// There is no such proxy.
    pub async fn fetch_for_proxy(&self, asked: &Fetch) -> Result<Fetched, ControlError> {
        let remote = self.remote(&asked.sender)?;
        // An answer is an order's word for the time of its question, which so is not long ago.
        let wait_max = self.config.terms.map_or(Duration::ZERO, Terms::renew_every);
        let posted = remote.mailbox.fetch(identity(&asked.sender), asked.last, wait_max).await;
        let order = |Posted { id, wait_max, what }| proxies::Order { id, wait_max, what };
        Ok(Fetched { orders: posted.into_iter().map(order).collect() })
    }

    /// What a proxy says of an order.
    ///
    /// # Errors
    /// There is no such proxy.
    pub fn proxy_finished(&self, finished: Finished) -> Result<(), ControlError> {
        let Finished { sender, id, report } = finished;
        self.remote(&sender)?.mailbox.finished(identity(&sender), id, Ok(report));
        Ok(())
    }

    /// A proxy ends, and nobody has to wait for it.
    ///
    /// # Errors
    /// There is no such proxy, or the store cannot be written.
    pub fn proxy_ends(&self, bye: &Bye) -> Result<(), ControlError> {
        let remote = self.remote(&bye.sender)?;
        // Of another process of its name, or by hearsay, it says nothing.
        if remote.mailbox.heard_last() == Some(identity(&bye.sender)) {
            self.register(&remote, |registered| registered.is_out = true)?;
            remote.mailbox.forget();
        }
        Ok(())
    }
}
