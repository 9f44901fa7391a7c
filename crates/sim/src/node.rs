//! A node of control: wants the seat, and does what control does while it has it.

use std::collections::BTreeSet;
use std::time::Duration;

use model::barrier::Order as Barrier;
use model::cell::{CellState, Epoch};
use model::lease::{Granter, Moment};
use model::proxies::{Order, Route};
use model::seat::{Candidate, Sitting, Tenure};
use model::switchover::OnTimeout;

use crate::agent::{Server, Task};
use crate::planted::Planted;
use crate::proxy::to_active;
use crate::world::{Message, Operation, Place, SEAT, Said, TERMS, World};

const TICK: u64 = 50;
/// Between two looks at the seat.
const LOOK: u64 = 250;
/// Between two tries of an order.
const AGAIN: u64 = 300;
/// How long a failover may take until its grant.
const STEP_MAX: Duration = Duration::from_secs(20);
/// How long a server may take to be fenced.
const FENCE_MAX: Duration = Duration::from_secs(5);
/// How long a proxy may take for an order.
const OBEY_MAX: Duration = Duration::from_secs(3);
/// A proxy that waits for orders has an answer after so long.
const FETCH_MAX: u64 = 600;

#[derive(Debug)]
pub struct Node {
    pub role: Role,
    look_at: u64,
    /// What was asked of the store, and when; one at a time.
    asked: Option<Moment>,
}

#[derive(Debug)]
pub enum Role {
    Candidate(Candidate),
    Control(Box<Office>),
}

/// What a node knows while it is control.
#[derive(Debug)]
pub struct Office {
    pub sitting: Sitting,
    pub step: Step,
    granters: Vec<Granter>,
    heard: Vec<Option<(Moment, Server)>>,
    begun: Moment,
    beat_at: u64,
    order: Option<(u64, u64)>,
    next_id: u64,
    is_done: bool,
    mail: Vec<Mail>,
    /// The proxies were told what this step asks of them.
    is_posted: bool,
}

/// One proxy, as control knows it.
#[derive(Debug, Clone, Default)]
struct Mail {
    heard: Option<(Moment, u64)>,
    posted: Option<Posted>,
    /// It waits for orders: when it has asked by its clock, which run of it, what it has, and since when, in true time.
    fetch: Option<(Moment, u64, u64, u64)>,
}

#[derive(Debug, Clone)]
struct Posted {
    order: Order,
    until: Moment,
    is_fetched: bool,
    is_obeyed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Listens for whoever is there.
    Recover,
    Watch,
    /// A switchover: sessions are held, and the server takes no more writes.
    HoldAll {
        from: usize,
        to: usize,
    },
    Fence {
        from: usize,
        to: usize,
    },
    /// The way back.
    Unfence {
        cell: usize,
    },
    ReleaseBack {
        cell: usize,
    },
    /// A failover: sessions are taken from the lost server.
    Cut {
        from: usize,
        to: usize,
    },
    Isolate {
        from: usize,
        to: usize,
    },
    EndPledges {
        from: usize,
        to: usize,
    },
    Grant {
        from: usize,
        to: usize,
    },
    Hold {
        from: usize,
        to: usize,
    },
    Promote {
        from: usize,
        to: usize,
    },
    Release {
        from: usize,
        to: usize,
    },
    Rejoin {
        from: usize,
    },
    /// The active cell's server is started again.
    HoldAgain {
        cell: usize,
    },
    StartAgain {
        cell: usize,
    },
}

impl Step {
    /// Proxies wait for orders.
    fn is_of_proxies(self) -> bool {
        !matches!(
            self,
            Step::Watch | Step::Rejoin { .. } | Step::HoldAgain { .. } | Step::StartAgain { .. }
        )
    }
}

impl Node {
    pub fn new() -> Node {
        Node { role: Role::Candidate(Candidate::default()), look_at: 0, asked: None }
    }

    pub fn crash(&mut self) {
        *self = Node::new();
    }
}

impl Default for Node {
    fn default() -> Node {
        Node::new()
    }
}

impl Office {
    fn new(
        sitting: Sitting,
        now: Moment,
        (cells, proxies): (usize, usize),
        planted: Option<Planted>,
    ) -> Office {
        let granter = match planted {
            Some(Planted::GrantsForgotten) => Granter::new(Moment(Duration::ZERO), TERMS),
            _ => Granter::new(now, TERMS),
        };
        Office {
            sitting,
            step: Step::Recover,
            granters: vec![granter; cells],
            heard: vec![None; cells],
            begun: now,
            beat_at: 0,
            order: None,
            next_id: 1,
            is_done: false,
            mail: vec![Mail::default(); proxies],
            is_posted: false,
        }
    }

    fn hears(&self, cell: usize, now: Moment) -> Option<Server> {
        let (at, server) = self.heard[cell]?;
        (now < at.plus(TERMS.length)).then_some(server)
    }

    fn go(&mut self, step: Step, now: Moment) {
        self.step = step;
        self.begun = now;
        (self.order, self.is_done, self.is_posted) = (None, false, false);
    }

    /// Has all proxies obey. Gives whether one of them has not, once nobody is waited for any more.
    fn all_obey(&mut self, what: &Barrier, now: Moment) -> Option<bool> {
        if !std::mem::replace(&mut self.is_posted, true) {
            for mail in &mut self.mail {
                self.next_id += 1;
                let order = Order { id: self.next_id, wait_max: OBEY_MAX, what: what.clone() };
                let until = now.plus(OBEY_MAX);
                mail.posted = Some(Posted { order, until, is_fetched: false, is_obeyed: false });
            }
        }
        let mut is_missing = false;
        for mail in &self.mail {
            let is_heard = mail.heard.is_some_and(|(at, _)| now < at.plus(TERMS.length));
            match &mail.posted {
                Some(posted) if posted.is_obeyed => (),
                Some(posted) if is_heard && now < posted.until => return None,
                _ => is_missing = true,
            }
        }
        for mail in &mut self.mail {
            mail.posted = None;
        }
        Some(is_missing)
    }

    fn is_over(&self, cell: usize, now: Moment) -> bool {
        now >= self.granters[cell].free_at()
    }
}

impl World {
    pub(crate) fn tick_node(&mut self, at: usize) {
        self.again(TICK, Place::Node(at));
        let (now, true_now) = (self.clock_of_node(at), self.now);
        let is_late = |asked: Moment| now >= asked.plus(SEAT.length);
        let node = &mut self.nodes[at];
        if node.asked.is_some_and(is_late) {
            node.asked = None;
        }
        let is_over = match &node.role {
            Role::Control(office) => !office.sitting.is_valid(now),
            Role::Candidate(_) => false,
        };
        if is_over {
            node.crash();
        }
        let asks = match &mut node.role {
            Role::Candidate(_) if node.asked.is_none() && true_now >= node.look_at => {
                node.look_at = true_now + LOOK;
                Some(Operation::Look)
            }
            Role::Control(office) if node.asked.is_none() && true_now >= office.beat_at => {
                office.beat_at = true_now + 500;
                Some(Operation::Beat { tenure: office.sitting.tenure })
            }
            _ => None,
        };
        if let Some(operation) = asks {
            node.asked = Some(now);
            let question = Message::Ask { from: at, sent: now, operation };
            self.send(Place::Node(at), Place::Store, question);
        }
        self.answer_fetches(at);
        if let Some(act) = self.step(at, now) {
            self.carry_out(at, act);
        }
    }

    /// Gives proxies that wait for orders what there is.
    fn answer_fetches(&mut self, at: usize) {
        let true_now = self.now;
        let Role::Control(office) = &mut self.nodes[at].role else { return };
        let tenure = office.sitting.tenure;
        let mut out = Vec::new();
        for (proxy, mail) in office.mail.iter_mut().enumerate() {
            let Some((sent, run, last, since)) = mail.fetch else { continue };
            let wanted = mail.posted.as_mut().filter(|posted| {
                !posted.is_obeyed && (!posted.is_fetched || posted.order.id > last)
            });
            if wanted.is_none() && true_now < since + FETCH_MAX {
                continue;
            }
            let order = wanted.map(|posted| {
                posted.is_fetched = true;
                posted.order.clone()
            });
            mail.fetch = None;
            out.push((proxy, Message::Fetched { run, tenure, sent, order }));
        }
        for (proxy, message) in out {
            self.send(Place::Node(at), Place::Proxy(proxy), message);
        }
    }

    /// What control does next.
    fn step(&mut self, at: usize, now: Moment) -> Option<Act> {
        let (planted, true_now) = (self.planted, self.now);
        let (is_up, application) = (self.store.is_up, self.store.application);
        let active = application.granted_to;
        let answers = self.answers(at, active);
        let is_fenced = self.agents[active].is_fenced;
        let is_asked = self.is_asked;
        let app = String::new;
        let release = |cell: usize, epoch: Epoch| Barrier::Release {
            app: app(),
            to: cell.to_string(),
            state: CellState::Active,
            epoch,
        };
        let pleads = self.store.pleads[active].clone();
        let recorded = self.store.failover;
        let is_asking = self.nodes[at].asked.is_some();
        let Role::Control(office) = &mut self.nodes[at].role else { return None };
        let late = now >= office.begun.plus(STEP_MAX);
        match office.step {
            Step::Recover => {
                let all = (0..office.heard.len()).all(|cell| office.heard[cell].is_some());
                let is_rash = planted == Some(Planted::GrantsForgotten);
                if (all || is_rash || now >= office.begun.plus(TERMS.length)) && is_up {
                    match recorded {
                        Some((from, to, true)) => office.go(Step::Hold { from, to }, now),
                        Some((from, _, false)) => office.go(Step::Unfence { cell: from }, now),
                        None => office.go(Step::Watch, now),
                    }
                }
                None
            }
            Step::Watch if !is_up => None,
            Step::Watch if answers && is_fenced => {
                office.go(Step::Unfence { cell: active }, now);
                None
            }
            Step::Watch if answers => {
                let is_there =
                    |cell: usize| office.hears(cell, now).is_some_and(|one| one.is_running);
                let all = (0..office.heard.len()).all(is_there);
                let to = (active + 1) % office.heard.len();
                if !is_asked || !all {
                    return None;
                }
                office.go(Step::HoldAll { from: active, to }, now);
                Some(Act::Note(Some((active, to))))
            }
            Step::HoldAll { from, to } => {
                let hold =
                    Barrier::Hold { app: app(), deadline_ms: 1_000, on_timeout: OnTimeout::Abort };
                // Whoever is not there is left behind by force, sometimes.
                let is_forced = application.epoch.0.is_multiple_of(2);
                match office.all_obey(&hold, now)? {
                    true if !is_forced => office.go(Step::ReleaseBack { cell: from }, now),
                    _ => office.go(Step::Fence { from, to }, now),
                }
                None
            }
            Step::Fence { from, to } => {
                if office.is_done {
                    office.go(Step::Grant { from, to }, now);
                    None
                } else if now >= office.begun.plus(FENCE_MAX) {
                    office.go(Step::Unfence { cell: from }, now);
                    None
                } else {
                    office.is_due(true_now).then_some(Act::Fence { cell: from, is_fenced: true })
                }
            }
            Step::Unfence { cell } => {
                if office.is_done {
                    office.go(Step::ReleaseBack { cell }, now);
                    None
                } else if now >= office.begun.plus(FENCE_MAX) {
                    office.go(Step::Watch, now);
                    Some(Act::Note(None))
                } else {
                    office.is_due(true_now).then_some(Act::Fence { cell, is_fenced: false })
                }
            }
            Step::ReleaseBack { cell } => {
                office.all_obey(&release(cell, application.epoch), now)?;
                office.go(Step::Watch, now);
                Some(Act::Note(None))
            }
            Step::Watch => {
                let seen = office.hears(active, now);
                let is_down = seen.is_some_and(|server| !server.is_running || !server.is_primary);
                let is_rash = planted == Some(Planted::LeaseNotWaitedFor);
                if !is_down && !is_rash && !office.is_over(active, now) {
                    return None;
                }
                let may = |cell: &usize| {
                    let is_there = office.hears(*cell, now).is_some_and(|one| one.is_running);
                    *cell != active && is_there && pleads.iter().all(|set| set.contains(cell))
                };
                let to = (0..office.heard.len()).find(may);
                match to {
                    Some(to) => {
                        office.granters[active].revoke();
                        office.go(Step::Cut { from: active, to }, now);
                        Some(Act::Note(Some((active, to))))
                    }
                    None if is_down => {
                        office.go(Step::HoldAgain { cell: active }, now);
                        None
                    }
                    None => None,
                }
            }
            Step::Cut { from, to } => {
                office.all_obey(&Barrier::Cut { app: app() }, now)?;
                office.go(Step::Isolate { from, to }, now);
                None
            }
            Step::Isolate { from, to } => {
                let is_over =
                    office.is_over(from, now) || planted == Some(Planted::LeaseNotWaitedFor);
                if office.is_done {
                    office.go(Step::Grant { from, to }, now);
                } else if is_over {
                    let needs = !pleads.is_empty() && planted != Some(Planted::PledgesNotEnded);
                    let next = match needs {
                        true => Step::EndPledges { from, to },
                        false => Step::Grant { from, to },
                    };
                    office.go(next, now);
                } else if late {
                    office.granters[from].restore();
                    office.go(Step::Watch, now);
                    return Some(Act::Note(None));
                } else {
                    return office.order(true_now, from, application.epoch, Task::Isolate);
                }
                None
            }
            Step::EndPledges { from, to } => {
                if office.is_done {
                    office.go(Step::Grant { from, to }, now);
                    None
                } else if late {
                    office.granters[from].restore();
                    office.go(Step::Watch, now);
                    Some(Act::Note(None))
                } else {
                    office.order(true_now, to, application.epoch, Task::EndPledges)
                }
            }
            Step::Grant { from, to } => match office.is_done {
                true if planted == Some(Planted::StepLost) => None,
                true => {
                    office.go(Step::Hold { from, to }, now);
                    None
                }
                false if is_asking => None,
                false if office.order.is_none() => {
                    office.order = Some((0, 0));
                    let tenure = office.sitting.tenure;
                    Some(Act::Ask(Operation::Grant { tenure, from, to }))
                }
                // Nobody knows whether it is written: whoever has the seat next finds out.
                false => Some(Act::LeaveOff),
            },
            Step::Hold { from, to } => {
                office.granters[to].restore();
                match office.is_done {
                    true => {
                        office.go(Step::Promote { from, to }, now);
                        None
                    }
                    false => office.order(true_now, to, application.epoch, Task::HoldLease),
                }
            }
            Step::Promote { from, to } => match office.is_done {
                true => {
                    office.go(Step::Release { from, to }, now);
                    Some(Act::Note(None))
                }
                false if office.order.is_none_or(|(_, next)| true_now >= next) => {
                    office.order = Some((0, true_now + AGAIN));
                    let is_down = office.hears(to, now).is_some_and(|one| !one.is_running);
                    Some(match is_down {
                        true => {
                            let (id, epoch) = (0, application.epoch);
                            Act::Order { to, id, epoch, what: Task::StartStandby }
                        }
                        false => Act::Promote(to),
                    })
                }
                false => None,
            },
            Step::Release { from, to } => {
                office.all_obey(&release(to, application.epoch), now)?;
                office.go(Step::Rejoin { from }, now);
                None
            }
            Step::Rejoin { from } => {
                if office.is_done || late {
                    office.granters[from].restore();
                    office.go(Step::Watch, now);
                    None
                } else {
                    office.order(true_now, from, application.epoch, Task::Rejoin)
                }
            }
            Step::HoldAgain { cell } => {
                office.granters[cell].restore();
                if office.is_done {
                    office.go(Step::StartAgain { cell }, now);
                    None
                } else if late {
                    office.go(Step::Watch, now);
                    None
                } else {
                    office.order(true_now, cell, application.epoch, Task::HoldLease)
                }
            }
            Step::StartAgain { cell } => {
                if office.is_done || late {
                    office.go(Step::Watch, now);
                    None
                } else {
                    office.order(true_now, cell, application.epoch, Task::StartAgain)
                }
            }
        }
    }

    fn carry_out(&mut self, at: usize, act: Act) {
        let here = Place::Node(at);
        let now = self.clock_of_node(at);
        let Role::Control(office) = &self.nodes[at].role else { return };
        let tenure = office.sitting.tenure;
        match act {
            Act::Order { to, id, epoch, what } => {
                let order = Message::Order { from: at, tenure, id, epoch, what };
                self.send(here, Place::Agent(to), order);
            }
            Act::Promote(to) => {
                let run = self.agents[to].run;
                self.send(here, Place::Server(to), Message::Promote { from: at, tenure, run });
            }
            Act::Ask(operation) => {
                self.nodes[at].asked = Some(now);
                self.send(here, Place::Store, Message::Ask { from: at, sent: now, operation });
            }
            Act::Fence { cell, is_fenced } => {
                let run = self.agents[cell].run;
                let fence = Message::Fence { from: at, tenure, run, at: self.now, is_fenced };
                self.send(here, Place::Server(cell), fence);
            }
            Act::LeaveOff => self.nodes[at].crash(),
            Act::Note(failover) => {
                self.is_asked &= failover.is_none();
                let failover = failover.map(|(from, to)| (from, to, false));
                if self.store.may_write(tenure, self.planted) {
                    self.store.failover = failover;
                } else {
                    self.nodes[at].crash();
                }
            }
        }
    }

    pub(crate) fn node_hears(&mut self, at: usize, message: Message) {
        let now = self.clock_of_node(at);
        match message {
            Message::Said { sent, said } => self.store_said(at, now, sent, said),
            Message::Renew { from, host, sent, seen, server, neighbours } => {
                let answer = self.renewed(at, now, from, host, seen, server, &neighbours);
                let answer = match answer {
                    Some((tenure, granted, neighbours)) => {
                        Message::Renewed { tenure, sent, granted, neighbours }
                    }
                    None => Message::Refused { sent },
                };
                self.send(Place::Node(at), Place::Agent(from), answer);
            }
            Message::Finished { tenure, id, .. } => {
                let Role::Control(office) = &mut self.nodes[at].role else { return };
                let is_its = id != 0
                    && tenure == office.sitting.tenure
                    && office.order.is_some_and(|(asked, _)| asked == id);
                office.is_done |= is_its;
            }
            Message::RenewProxy { from, run, sent, .. } => {
                let answer = match self.proxy_renewed(at, now, from, run) {
                    Some((tenure, route)) => Message::RenewedProxy { run, tenure, sent, route },
                    None => Message::Refused { sent },
                };
                self.send(Place::Node(at), Place::Proxy(from), answer);
            }
            Message::Fetch { from, run, sent, last } => {
                let true_now = self.now;
                let Role::Control(office) = &mut self.nodes[at].role else { return };
                let mail = &mut office.mail[from];
                if mail.heard.is_some_and(|(_, heard)| heard == run) {
                    // What an earlier control gave is not what this one did.
                    let last = if last > office.next_id { 0 } else { last };
                    mail.fetch = Some((sent, run, last, true_now));
                }
            }
            Message::Obeyed { from, run, tenure, id } => {
                let Role::Control(office) = &mut self.nodes[at].role else { return };
                let is_its = tenure == office.sitting.tenure;
                let mail = &mut office.mail[from];
                let is_current = mail.heard.is_some_and(|(_, heard)| heard == run);
                if let Some(posted) = &mut mail.posted {
                    posted.is_obeyed |= is_its && is_current && posted.order.id == id;
                }
            }
            _ => (),
        }
    }

    /// What a proxy is to serve, if this node may say so.
    fn proxy_renewed(
        &mut self,
        at: usize,
        now: Moment,
        from: usize,
        run: u64,
    ) -> Option<(Tenure, Route)> {
        let (store, planted) = (&mut self.store, self.planted);
        let Role::Control(office) = &mut self.nodes[at].role else { return None };
        let tenure = office.sitting.tenure;
        if !office.sitting.is_valid(now) || !store.is_up || !store.may_write(tenure, planted) {
            return None;
        }
        let mail = &mut office.mail[from];
        let other = mail.heard.filter(|(at, heard)| *heard != run && now < at.plus(TERMS.length));
        if other.is_some() {
            return None;
        }
        mail.heard = Some((now, run));
        let application = store.application;
        let route = match office.step.is_of_proxies() {
            true => Route::Held,
            false => Route::Open(to_active(application.granted_to, application.epoch)),
        };
        Some((tenure, route))
    }

    #[allow(clippy::too_many_arguments)]
    fn renewed(
        &mut self,
        at: usize,
        now: Moment,
        from: usize,
        host: u64,
        seen: Epoch,
        server: Server,
        said: &BTreeSet<usize>,
    ) -> Option<(Tenure, Option<Epoch>, BTreeSet<usize>)> {
        let (store, planted) = (&mut self.store, self.planted);
        let Role::Control(office) = &mut self.nodes[at].role else { return None };
        let tenure = office.sitting.tenure;
        if !office.sitting.is_valid(now) || !store.is_up || !store.may_write(tenure, planted) {
            return None;
        }
        if planted != Some(Planted::GrantsForgotten)
            && let Some(before) = store.attended[from]
        {
            office.granters[from].remember(before, TERMS.length);
        }
        let application = store.application;
        let granter = &mut office.granters[from];
        if granter.is_anothers(now, host) {
            return Some((tenure, None, BTreeSet::new()));
        }
        let has_it = application.granted_to == from && application.epoch >= seen;
        let granted = granter.answer(now, host, has_it.then_some(application.epoch));
        if granted.is_some() {
            store.attended[from] = Some(host);
        }
        office.heard[from] = Some((now, server));
        let others = (0..office.heard.len()).filter(|cell| *cell != from);
        let known: BTreeSet<usize> = match others.clone().all(|cell| office.heard[cell].is_some()) {
            true => others.collect(),
            false => BTreeSet::new(),
        };
        let pleads = [said.clone(), known.clone()];
        store.pleads[from] = pleads.into_iter().filter(|set| !set.is_empty()).collect();
        Some((tenure, granted, known))
    }

    fn store_said(&mut self, at: usize, now: Moment, sent: Moment, said: Said) {
        let (planted, counts) = (self.planted, (self.agents.len(), self.proxies.len()));
        let node = &mut self.nodes[at];
        if node.asked != Some(sent) {
            // It was given up.
            return;
        }
        node.asked = None;
        let mut takes = None;
        match (&mut node.role, said) {
            (Role::Candidate(candidate), Said::Seat { tenure, sight }) => {
                let may = candidate.sees(sight, now) || planted == Some(Planted::SeatTakenEarly);
                if may {
                    let revision = sight.map_or(0, |sight| sight.revision);
                    takes = Some(Operation::Take { revision, next: tenure.next(0) });
                }
            }
            (Role::Candidate(_), Said::Taken(tenure)) => {
                let sitting = Sitting::new(tenure, SEAT, sent);
                let office = Office::new(sitting, now, counts, planted);
                node.role = Role::Control(Box::new(office));
                self.summary.tenures += 1;
            }
            (Role::Control(office), Said::Beaten) => office.sitting.has_beaten(sent),
            (Role::Control(office), Said::Granted) => {
                office.is_done = true;
                let is_planned = match office.step {
                    Step::Grant { from, .. } => self.agents[from].is_fenced,
                    _ => false,
                };
                match is_planned {
                    true => self.summary.switchovers += 1,
                    false => self.summary.failovers += 1,
                }
            }
            (Role::Control(_), Said::Lost) => node.crash(),
            _ => (),
        }
        if let Some(operation) = takes {
            node.asked = Some(now);
            let question = Message::Ask { from: at, sent: now, operation };
            self.send(Place::Node(at), Place::Store, question);
        }
    }

    pub(crate) fn was_fenced(&mut self, at: usize, tenure: Tenure, is_fenced: bool) {
        let Role::Control(office) = &mut self.nodes[at].role else { return };
        let is_wanted = match office.step {
            Step::Fence { .. } => is_fenced,
            Step::Unfence { .. } => !is_fenced,
            _ => false,
        };
        office.is_done |= is_wanted && tenure == office.sitting.tenure;
    }

    pub(crate) fn was_promoted(&mut self, at: usize, tenure: Tenure) {
        let Role::Control(office) = &mut self.nodes[at].role else { return };
        if tenure == office.sitting.tenure && matches!(office.step, Step::Promote { .. }) {
            office.is_done = true;
        }
    }
}

enum Act {
    Order {
        to: usize,
        id: u64,
        epoch: Epoch,
        what: Task,
    },
    Promote(usize),
    Fence {
        cell: usize,
        is_fenced: bool,
    },
    Ask(Operation),
    LeaveOff,
    /// Records which failover is under way, or that none is.
    Note(Option<(usize, usize)>),
}

impl Office {
    /// It is time to do again what is done until it has succeeded.
    fn is_due(&mut self, true_now: u64) -> bool {
        let is_due = self.order.is_none_or(|(_, next)| true_now >= next);
        if is_due {
            self.order = Some((0, true_now + AGAIN));
        }
        is_due
    }

    /// Gives an order, again and again until it is carried out.
    fn order(&mut self, true_now: u64, to: usize, epoch: Epoch, what: Task) -> Option<Act> {
        let id = match self.order {
            Some((_, next)) if true_now < next => return None,
            Some((id, _)) => id,
            None => {
                self.next_id += 1;
                self.next_id
            }
        };
        self.order = Some((id, true_now + AGAIN));
        Some(Act::Order { to, id, epoch, what })
    }
}
