//! A proxy: goes by what control has told it, by `model::proxies`.

use std::collections::VecDeque;
use std::time::Duration;

use model::barrier::Order as Barrier;
use model::cell::CellState;
use model::lease::Moment;
use model::proxies::{Action, Answer, Contact, Follower, Open, Order, Route};
use model::seat::Tenure;

use crate::planted::Planted;
use crate::world::{Message, Place, TERMS, World};

const TICK: u64 = 20;
const RETRY: u64 = 200;
/// How long control may take to answer, and to have an order.
const RENEW_MAX: u64 = 625;
const FETCH_MAX: u64 = 1_250;

#[derive(Debug)]
enum Job {
    Ordered(Order, Moment, Tenure),
    Own(Action),
}

#[derive(Debug)]
struct UnderWay {
    /// Control's order, or our own action.
    id: Option<(u64, usize, Tenure)>,
    what: Barrier,
    by: Moment,
    /// True time at which it is done.
    done_at: u64,
}

#[derive(Debug)]
pub struct Proxy {
    /// Another number each time it is started.
    pub run: u64,
    pub follower: Follower,
    contact: Contact,
    /// Where its sessions stand.
    serves: Option<Open>,
    /// Until when what they send passes.
    passes: Moment,
    tenure: Tenure,
    at: usize,
    asked: Option<(Moment, u64)>,
    renew_at: u64,
    fetched: Option<(Moment, u64)>,
    fetch_at: u64,
    last: u64,
    asked_server: Option<u64>,
    jobs: VecDeque<Job>,
    under_way: Option<UnderWay>,
    is_queued: bool,
}

impl Proxy {
    pub fn new(run: u64) -> Proxy {
        Proxy {
            run,
            follower: Follower::default(),
            contact: Contact::default(),
            serves: None,
            passes: Moment(Duration::ZERO),
            tenure: Tenure::default(),
            at: 0,
            asked: None,
            renew_at: 0,
            fetched: None,
            fetch_at: 0,
            last: 0,
            asked_server: None,
            jobs: VecDeque::new(),
            under_way: None,
            is_queued: false,
        }
    }

    /// What clients' commands reach now.
    pub fn passing(&self, now: Moment, planted: Option<Planted>) -> Option<&Open> {
        let is_proven = now < self.passes || planted == Some(Planted::ProofNotAsked);
        self.serves.as_ref().filter(|_| is_proven)
    }

    fn pass(&mut self) {
        if let Some(moment) = self.follower.passes_until(&self.contact) {
            self.passes = moment;
        }
    }

    fn act_on(&mut self, action: Action) {
        if action == Action::Cut {
            (self.serves, self.passes) = (None, Moment(Duration::ZERO));
        } else if !self.is_queued {
            self.is_queued = true;
            self.jobs.push_back(Job::Own(action));
        }
    }

    fn told(&mut self, route: &Route, sent: Moment, now: Moment) {
        self.contact.answered(sent, TERMS, now);
        if let Some(action) = self.follower.told(route, sent) {
            self.act_on(action);
        }
        self.pass();
    }

    /// Begins a job, if it is still to be done.
    fn begin(&mut self, job: Job, now: Moment, done_at: u64) -> Option<UnderWay> {
        let app = String::new();
        let own = |what, by| Some(UnderWay { id: None, what, by, done_at });
        match job {
            Job::Own(action) => {
                self.is_queued = false;
                if !self.follower.wants(&action) {
                    return None;
                }
                match action {
                    Action::Cut => own(Barrier::Cut { app }, now),
                    Action::GiveUp => own(Barrier::GiveUp { app }, now),
                    Action::Release(Open { cell, state, epoch }) => {
                        let by = self.contact.held(now)?;
                        own(Barrier::Release { app, to: cell, state, epoch }, by)
                    }
                }
            }
            Job::Ordered(order, sent, tenure) => {
                if tenure != self.tenure || self.contact.check(&order, sent, now).is_err() {
                    return None;
                }
                let by = self.contact.held(now)?;
                self.follower.check(&order.what).ok()?;
                if matches!(order.what, Barrier::Hold { .. } | Barrier::Cut { .. }) {
                    self.follower.obeyed(&order.what, by, now);
                    self.pass();
                }
                let id = Some((order.id, self.at, tenure));
                Some(UnderWay { id, what: order.what, by, done_at })
            }
        }
    }

    fn end(&mut self, what: &Barrier, by: Moment, now: Moment) {
        self.follower.obeyed(what, by, now);
        match what {
            Barrier::Release { to, state, epoch, .. } => {
                self.serves = Some(Open { cell: to.clone(), state: *state, epoch: *epoch });
            }
            _ => self.serves = None,
        }
        self.pass();
    }
}

/// A route to a cell that takes writes.
pub(crate) fn to_active(cell: usize, epoch: model::cell::Epoch) -> Open {
    Open { cell: cell.to_string(), state: CellState::Active, epoch }
}

impl World {
    pub(crate) fn tick_proxy(&mut self, at: usize) {
        self.again(TICK, Place::Proxy(at));
        let (now, true_now, planted) = (self.clock_of_proxy(at), self.now, self.planted);
        let (here, nodes) = (Place::Proxy(at), self.nodes.len());
        let lasts = self.how_long();
        let proxy = &mut self.proxies[at];
        let (mut out, run) = (Vec::new(), proxy.run);
        if planted != Some(Planted::ProofNotAsked)
            && let Some(action) = proxy.follower.at(now, &proxy.contact)
        {
            proxy.act_on(action);
        }
        if proxy.under_way.as_ref().is_some_and(|one| true_now >= one.done_at)
            && let Some(UnderWay { id, what, by, .. }) = proxy.under_way.take()
        {
            proxy.end(&what, by, now);
            if let Some((id, node, tenure)) = id {
                out.push((Place::Node(node), Message::Obeyed { from: at, run, tenure, id }));
            }
        }
        while proxy.under_way.is_none()
            && let Some(job) = proxy.jobs.pop_front()
        {
            proxy.under_way = proxy.begin(job, now, true_now + lasts);
            if let Some(UnderWay { what: Barrier::Release { .. }, by, .. }) = &proxy.under_way {
                proxy.passes = TERMS.stop_at(*by);
            }
        }
        if proxy.asked.is_some_and(|(_, deadline)| true_now >= deadline) {
            proxy.asked = None;
            proxy.at = (proxy.at + 1) % nodes;
            proxy.renew_at = true_now + RETRY / 2;
        }
        if proxy.asked.is_none() && true_now >= proxy.renew_at {
            proxy.asked = Some((now, true_now + RENEW_MAX));
            let holds = proxy.follower.holds();
            let question = Message::RenewProxy { from: at, run, sent: now, holds };
            out.push((Place::Node(proxy.at), question));
        }
        if proxy.fetched.is_some_and(|(_, deadline)| true_now >= deadline) {
            proxy.fetched = None;
        }
        let is_held = proxy.contact.held(now).is_some();
        if proxy.fetched.is_none() && is_held && true_now >= proxy.fetch_at {
            proxy.fetched = Some((now, true_now + FETCH_MAX));
            let question = Message::Fetch { from: at, run, sent: now, last: proxy.last };
            out.push((Place::Node(proxy.at), question));
        }
        if proxy.asked_server.is_none_or(|until| true_now >= until)
            && let Some(open) = proxy.follower.asks(now, TERMS)
            && let Ok(cell) = open.cell.parse()
        {
            proxy.asked_server = Some(true_now + 1_000);
            out.push((Place::Server(cell), Message::AskServer { from: at, run, sent: now }));
        }
        for (to, message) in out {
            self.send(here, to, message);
        }
    }

    pub(crate) fn proxy_hears(&mut self, at: usize, message: Message) {
        let (now, true_now) = (self.clock_of_proxy(at), self.now);
        let nodes = self.nodes.len();
        let proxy = &mut self.proxies[at];
        match message {
            Message::Refused { sent } if proxy.asked.is_some_and(|(asked, _)| asked == sent) => {
                proxy.asked = None;
                proxy.at = (proxy.at + 1) % nodes;
                proxy.renew_at = true_now + RETRY / 2;
            }
            Message::RenewedProxy { run, tenure, sent, route }
                if run == proxy.run && tenure >= proxy.tenure =>
            {
                if proxy.asked.is_some_and(|(asked, _)| asked == sent) {
                    proxy.asked = None;
                    proxy.renew_at = true_now + RENEW_MAX;
                }
                if tenure > proxy.tenure {
                    // It counts its orders anew.
                    (proxy.tenure, proxy.last) = (tenure, 0);
                }
                proxy.told(&route, sent, now);
            }
            Message::Fetched { run, tenure, sent, order }
                if run == proxy.run
                    && tenure == proxy.tenure
                    && proxy.fetched.is_some_and(|(asked, _)| asked == sent) =>
            {
                proxy.fetched = None;
                proxy.fetch_at = true_now + 5;
                if let Some(order) = order.filter(|order| order.id > proxy.last) {
                    proxy.last = order.id;
                    proxy.jobs.push_back(Job::Ordered(order, sent, tenure));
                }
            }
            Message::ServerSaid { run, sent, answer } if run == proxy.run => {
                proxy.asked_server = None;
                let is_heard = proxy.contact.held(now).is_some();
                proxy.follower.answered(answer, sent, is_heard);
                proxy.pass();
            }
            _ => (),
        }
    }

    /// A server answers a proxy.
    pub(crate) fn server_answers(&mut self, cell: usize, to: usize, run: u64, sent: Moment) {
        let agent = &self.agents[cell];
        if agent.server.is_running {
            let answer = Answer {
                is_in_recovery: !agent.server.is_primary,
                timeline: agent.timeline,
                is_read_only: agent.is_fenced,
            };
            let said = Message::ServerSaid { run, sent, answer };
            self.send(Place::Server(cell), Place::Proxy(to), said);
        }
    }
}
