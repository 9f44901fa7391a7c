//! Hosts, time, the network and the store, and what goes wrong with them.

use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap};
use std::time::Duration;

use model::cell::Epoch;
use model::lease::{Moment, Terms};
use model::proxies::{Answer, Order, Route};
use model::seat::{Sight, Tenure};

use crate::Summary;
use crate::agent::{Agent, Server, Task, Torn};
use crate::chance::Chance;
use crate::invariants::{self, Violation};
use crate::node::Node;
use crate::planted::Planted;
use crate::proxy::Proxy;

pub(crate) const TERMS: Terms = Terms { length: Duration::from_millis(2_500) };
pub(crate) const SEAT: Terms = Terms { length: Duration::from_millis(2_000) };
pub(crate) const GUARD_LOOK: u64 = 100;
const CELLS: usize = 3;
const NODES: usize = 3;
const PROXIES: usize = 2;
/// Trouble for so long, in milliseconds; then all is well for as long as it takes to recover.
const TROUBLE: u64 = 60_000;
const PEACE: u64 = 60_000;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weather {
    /// Everything.
    Any,
    /// Only control and its store.
    ControlOnly,
    /// The same, and the network and proxies, while one switchover follows the other.
    Planned,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Agent(usize),
    Guard(usize),
    Server(usize),
    Node(usize),
    Proxy(usize),
    Store,
}

#[derive(Debug, Clone)]
pub struct Host {
    /// Of its clock, which begins anew at each boot.
    offset: u64,
    /// Thousandths of true time that it counts.
    drift: u64,
    pub frozen_until: u64,
    pub is_up: bool,
    pub boot: u64,
}

#[derive(Debug, Clone)]
pub enum Message {
    Renew {
        from: usize,
        host: u64,
        sent: Moment,
        seen: Epoch,
        server: Server,
        neighbours: BTreeSet<usize>,
    },
    Renewed {
        tenure: Tenure,
        sent: Moment,
        granted: Option<Epoch>,
        neighbours: BTreeSet<usize>,
    },
    Refused {
        sent: Moment,
    },
    Plea {
        from: usize,
        sent: Moment,
        epoch: Epoch,
    },
    Pledged {
        from: usize,
        sent: Moment,
        epoch: Epoch,
    },
    Order {
        from: usize,
        tenure: Tenure,
        id: u64,
        epoch: Epoch,
        what: Task,
    },
    Finished {
        from: usize,
        tenure: Tenure,
        id: u64,
    },
    /// By a connection to this run of the server.
    Promote {
        from: usize,
        tenure: Tenure,
        run: u64,
    },
    Promoted {
        tenure: Tenure,
    },
    /// The same: the server takes no writes, or takes them again.
    Fence {
        from: usize,
        tenure: Tenure,
        run: u64,
        /// True time at which it was sent.
        at: u64,
        is_fenced: bool,
    },
    Fenced {
        tenure: Tenure,
        is_fenced: bool,
    },
    RenewProxy {
        from: usize,
        run: u64,
        sent: Moment,
        holds: bool,
    },
    RenewedProxy {
        run: u64,
        tenure: Tenure,
        sent: Moment,
        route: Route,
    },
    Fetch {
        from: usize,
        run: u64,
        sent: Moment,
        last: u64,
    },
    Fetched {
        run: u64,
        tenure: Tenure,
        sent: Moment,
        order: Option<Order>,
    },
    Obeyed {
        from: usize,
        run: u64,
        tenure: Tenure,
        id: u64,
    },
    AskServer {
        from: usize,
        run: u64,
        sent: Moment,
    },
    ServerSaid {
        run: u64,
        sent: Moment,
        answer: Answer,
    },
    Ask {
        from: usize,
        sent: Moment,
        operation: Operation,
    },
    Said {
        sent: Moment,
        said: Said,
    },
}

#[derive(Debug, Clone, Copy)]
pub enum Operation {
    Look,
    Take { revision: u64, next: Tenure },
    Beat { tenure: Tenure },
    Grant { tenure: Tenure, from: usize, to: usize },
}

#[derive(Debug, Clone, Copy)]
pub enum Said {
    Seat {
        tenure: Tenure,
        sight: Option<Sight>,
    },
    Taken(Tenure),
    Beaten,
    Granted,
    /// Another has the seat.
    Lost,
}

#[derive(Debug, Clone, Copy)]
pub struct Application {
    pub epoch: Epoch,
    pub granted_to: usize,
}

#[derive(Debug)]
pub struct Store {
    pub is_up: bool,
    seat: Option<Tenure>,
    revision: u64,
    pub application: Application,
    /// The host that had each cell's lease last.
    pub attended: Vec<Option<u64>>,
    pub pleads: Vec<Vec<BTreeSet<usize>>>,
    /// From, to, and whether the grant is given.
    pub failover: Option<(usize, usize, bool)>,
    /// Who has written under whose seat, if that was not the same.
    pub late_write: Option<(Tenure, Tenure)>,
}

impl Store {
    /// A transaction compares the seat.
    pub fn may_write(&mut self, by: Tenure, planted: Option<Planted>) -> bool {
        let Some(seat) = self.seat else { return false };
        let may = seat == by || planted == Some(Planted::SeatNotCompared);
        if may && seat != by {
            self.late_write = Some((by, seat));
        }
        may
    }
}

/// What was so before.
#[derive(Debug)]
pub struct Past {
    pub epoch: Epoch,
    pub seen: Vec<Epoch>,
    /// A server was ended by the end of its lease while no other agent heard control.
    pub ended_unheard: bool,
    /// True time of the last grant.
    pub granted_at: u64,
}

#[derive(Debug)]
enum Event {
    Tick(Place),
    Deliver(Place, Place, Box<Message>),
    Trouble,
}

pub struct World {
    /// True time in milliseconds.
    pub now: u64,
    pub hosts: Vec<Host>,
    pub agents: Vec<Agent>,
    pub nodes: Vec<Node>,
    pub proxies: Vec<Proxy>,
    pub store: Store,
    pub past: Past,
    pub planted: Option<Planted>,
    pub weather: Weather,
    pub summary: Summary,
    chance: Chance,
    queue: BinaryHeap<Reverse<(u64, u64, usize)>>,
    events: Vec<Option<Event>>,
    free: Vec<usize>,
    count: u64,
    /// Hosts that do not reach each other, until then.
    cuts: Vec<(BTreeSet<usize>, u64)>,
    is_stormy: bool,
    /// Somebody asks for a switchover.
    pub(crate) is_asked: bool,
    /// Who ends just now: what it says is heard by nobody.
    pub(crate) silent: Option<Place>,
}

impl World {
    pub fn new(seed: u64, weather: Weather, planted: Option<Planted>) -> World {
        let mut chance = Chance::new(seed);
        let host = |chance: &mut Chance| Host {
            offset: chance.between(0, 1_000_000),
            drift: chance.between(976, 1_024),
            frozen_until: 0,
            is_up: true,
            boot: 1,
        };
        let hosts = (0..CELLS + NODES + PROXIES).map(|_| host(&mut chance)).collect();
        let mut world = World {
            now: 0,
            hosts,
            agents: (0..CELLS).map(|cell| Agent::new(cell == 0)).collect(),
            nodes: (0..NODES).map(|_| Node::new()).collect(),
            proxies: (0..PROXIES).map(|_| Proxy::new(1)).collect(),
            store: Store {
                is_up: true,
                seat: None,
                revision: 0,
                application: Application { epoch: Epoch(1), granted_to: 0 },
                attended: vec![None; CELLS],
                pleads: vec![Vec::new(); CELLS],
                failover: None,
                late_write: None,
            },
            past: Past {
                epoch: Epoch(1),
                seen: vec![Epoch(0); CELLS],
                ended_unheard: false,
                granted_at: 0,
            },
            planted,
            weather,
            summary: Summary::default(),
            chance,
            queue: BinaryHeap::new(),
            events: Vec::new(),
            free: Vec::new(),
            count: 0,
            cuts: Vec::new(),
            is_stormy: false,
            is_asked: false,
            silent: None,
        };
        for cell in 0..CELLS {
            let now = world.clock(cell);
            world.agents[cell].start(now);
            world.again(cell as u64 + 1, Place::Agent(cell));
            world.again(cell as u64 + 7, Place::Guard(cell));
        }
        for node in 0..NODES {
            world.again(node as u64 * 13, Place::Node(node));
        }
        for proxy in 0..PROXIES {
            world.again(proxy as u64 * 17, Place::Proxy(proxy));
        }
        world.push(8_000, Event::Trouble);
        world
    }

    /// # Errors
    /// The first invariant that does not hold.
    pub fn run(mut self) -> Result<Summary, Violation> {
        while let Some(Reverse((at, _, slot))) = self.queue.pop() {
            if at > TROUBLE + PEACE {
                break;
            }
            self.now = at;
            if self.is_stormy && at > TROUBLE {
                self.calm();
            }
            self.free.push(slot);
            if let Some(event) = self.events[slot].take() {
                self.handle(event);
                self.summary.events += 1;
                invariants::always(&mut self)?;
            }
        }
        invariants::in_the_end(&mut self)?;
        Ok(self.summary)
    }

    fn push(&mut self, at: u64, event: Event) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.events.push(None);
            self.events.len() - 1
        });
        self.events[slot] = Some(event);
        self.count += 1;
        self.queue.push(Reverse((at, self.count, slot)));
    }

    /// A look, after so long.
    pub(crate) fn again(&mut self, after: u64, place: Place) {
        let jitter = self.chance.between(0, 3);
        self.push(self.now + after + jitter, Event::Tick(place));
    }

    fn host_of(place: Place) -> Option<usize> {
        match place {
            Place::Agent(cell) | Place::Guard(cell) | Place::Server(cell) => Some(cell),
            Place::Node(node) => Some(CELLS + node),
            Place::Proxy(proxy) => Some(CELLS + NODES + proxy),
            Place::Store => None,
        }
    }

    fn clock_of(&self, host: usize) -> Moment {
        let host = &self.hosts[host];
        Moment(Duration::from_millis(host.offset + self.now * host.drift / 1_000))
    }

    pub fn clock(&self, cell: usize) -> Moment {
        self.clock_of(cell)
    }

    pub fn clock_of_node(&self, node: usize) -> Moment {
        self.clock_of(CELLS + node)
    }

    pub fn clock_of_proxy(&self, proxy: usize) -> Moment {
        self.clock_of(CELLS + NODES + proxy)
    }

    /// Its processes run.
    pub fn is_awake(&self, place: Place) -> bool {
        let host = World::host_of(place).map(|host| &self.hosts[host]);
        host.is_none_or(|host| host.is_up && self.now >= host.frozen_until)
    }

    /// What a proxy has to do with its sessions takes so long.
    pub(crate) fn how_long(&mut self) -> u64 {
        self.chance.between(1, 150)
    }

    fn reaches(&self, from: Place, to: Place) -> bool {
        let (Some(from), Some(to)) = (World::host_of(from), World::host_of(to)) else {
            return true;
        };
        let is_cut = |(one, until): &(BTreeSet<usize>, u64)| {
            self.now < *until && one.contains(&from) != one.contains(&to)
        };
        !self.cuts.iter().any(is_cut)
    }

    pub(crate) fn send(&mut self, from: Place, to: Place, message: Message) {
        if !self.reaches(from, to) || self.silent == Some(from) {
            return;
        }
        let is_rough = self.is_stormy && self.weather != Weather::ControlOnly;
        let is_of_store = from == Place::Store || to == Place::Store;
        let lossy = is_rough || (self.is_stormy && is_of_store);
        if lossy && self.chance.happens(30) {
            return;
        }
        let slow = lossy && self.chance.happens(30);
        let after = if slow { self.chance.between(50, 4_000) } else { self.chance.between(1, 20) };
        // A store carries out nothing twice: a doubled request finds another revision.
        // Nor does a server what came by one connection.
        let is_of_server = matches!(from, Place::Server(_)) || matches!(to, Place::Server(_));
        if is_rough && !is_of_store && !is_of_server && self.chance.happens(10) {
            let twice = self.chance.between(1, 3_000);
            self.push(self.now + twice, Event::Deliver(from, to, Box::new(message.clone())));
        }
        self.push(self.now + after, Event::Deliver(from, to, Box::new(message)));
    }

    /// The server of a cell answers a node's SQL, as a primary.
    pub(crate) fn answers(&self, node: usize, cell: usize) -> bool {
        let (host, server) = (&self.hosts[cell], self.agents[cell].server);
        let is_awake = host.is_up && self.now >= host.frozen_until;
        self.reaches(Place::Node(node), Place::Server(cell))
            && is_awake
            && server.is_running
            && server.is_primary
    }

    fn handle(&mut self, event: Event) {
        let place = match &event {
            Event::Tick(place) | Event::Deliver(_, place, _) => *place,
            Event::Trouble => return self.trouble(),
        };
        if let Some(host) = World::host_of(place) {
            let Host { frozen_until, is_up, .. } = self.hosts[host];
            if self.now < frozen_until {
                let later = frozen_until + self.chance.between(0, 20);
                return self.push(later, event);
            }
            if !is_up {
                // What looks again and again does so after the boot.
                if matches!(event, Event::Tick(_)) {
                    self.push(self.now + 100, event);
                }
                return;
            }
        }
        match event {
            Event::Tick(Place::Agent(cell)) => self.tick_agent(cell),
            Event::Tick(Place::Guard(cell)) => self.tick_guard(cell),
            Event::Tick(Place::Node(node)) => self.tick_node(node),
            Event::Tick(Place::Proxy(proxy)) => self.tick_proxy(proxy),
            Event::Deliver(from, to, message) => self.deliver(from, to, *message),
            Event::Tick(_) | Event::Trouble => (),
        }
    }

    fn deliver(&mut self, from: Place, to: Place, message: Message) {
        // A connection that is cut meanwhile brings nothing.
        if !self.reaches(from, to) {
            return;
        }
        match (to, message) {
            (Place::Agent(cell), message) => self.agent_hears(cell, message),
            (Place::Node(node), Message::Promoted { tenure }) => self.was_promoted(node, tenure),
            (Place::Node(node), Message::Fenced { tenure, is_fenced }) => {
                self.was_fenced(node, tenure, is_fenced);
            }
            (Place::Node(node), message) => self.node_hears(node, message),
            (Place::Proxy(proxy), message) => self.proxy_hears(proxy, message),
            (Place::Server(cell), Message::AskServer { from, run, sent }) => {
                self.server_answers(cell, from, run, sent);
            }
            (Place::Server(cell), Message::Fence { from, tenure, run, at, is_fenced }) => {
                let (now, planted) = (self.now, self.planted);
                let agent = &mut self.agents[cell];
                let is_ended = at < agent.outsiders_ended && planted != Some(Planted::LateSql);
                if agent.server.is_running && agent.run == run && !is_ended {
                    agent.is_fenced = is_fenced;
                    if is_fenced {
                        agent.outsiders_ended = now;
                    }
                    let done = Message::Fenced { tenure, is_fenced };
                    self.send(Place::Server(cell), Place::Node(from), done);
                }
            }
            (Place::Server(cell), Message::Promote { from, tenure, run }) => {
                let agent = &mut self.agents[cell];
                if agent.server.is_running && agent.run == run {
                    agent.server.is_primary = true;
                    agent.timeline = self.store.application.epoch.0 as u32;
                    let done = Message::Promoted { tenure };
                    self.send(Place::Server(cell), Place::Node(from), done);
                }
            }
            (Place::Store, Message::Ask { from, sent, operation }) if self.store.is_up => {
                let said = self.store_does(operation);
                self.send(Place::Store, Place::Node(from), Message::Said { sent, said });
            }
            _ => (),
        }
    }

    fn store_does(&mut self, operation: Operation) -> Said {
        let (store, planted) = (&mut self.store, self.planted);
        match operation {
            Operation::Look => Said::Seat {
                tenure: store.seat.unwrap_or_default(),
                sight: store.seat.map(|_| Sight {
                    revision: store.revision,
                    length: SEAT.length,
                    is_over: false,
                }),
            },
            Operation::Take { revision, next } if revision == store.revision => {
                store.revision += 1;
                store.seat = Some(next);
                Said::Taken(next)
            }
            Operation::Take { .. } => Said::Lost,
            Operation::Beat { tenure } if store.may_write(tenure, planted) => {
                store.revision += 1;
                Said::Beaten
            }
            Operation::Grant { tenure, from, to }
                if store.may_write(tenure, planted)
                    && store.failover == Some((from, to, false)) =>
            {
                let epoch = Epoch(store.application.epoch.0 + 1);
                store.application = Application { epoch, granted_to: to };
                store.failover = Some((from, to, true));
                self.past.granted_at = self.now;
                Said::Granted
            }
            Operation::Beat { .. } | Operation::Grant { .. } => Said::Lost,
        }
    }

    /// Something goes wrong, and the next comes later.
    fn trouble(&mut self) {
        if self.now > TROUBLE {
            return;
        }
        // Until here everybody had the time to begin.
        self.is_stormy = true;
        let next = self.now + self.chance.between(200, 6_000);
        self.push(next, Event::Trouble);
        let for_long = if self.chance.happens(300) { 8_000 } else { 2_000 };
        let until = self.now + self.chance.between(50, for_long);
        let (node, cell) = (self.chance.index(NODES), self.chance.index(CELLS));
        let proxy = self.chance.index(PROXIES);
        if self.weather != Weather::ControlOnly {
            let is_planned = self.weather == Weather::Planned;
            match self.chance.between(0, 9) {
                0 | 1 => self.freeze(CELLS + NODES + proxy, until),
                2 => {
                    let run = self.proxies[proxy].run + 1;
                    self.proxies[proxy] = Proxy::new(run);
                }
                3..6 if is_planned => self.cut_off(until),
                _ => (),
            }
        }
        let (switchovers, kinds) = match self.weather {
            Weather::Any => (100, 9),
            Weather::Planned => (800, 3),
            Weather::ControlOnly => (0, 3),
        };
        self.is_asked |= self.chance.happens(switchovers);
        match self.chance.between(0, kinds) {
            0 => self.nodes[node].crash(),
            1 => self.freeze(CELLS + node, until),
            2 => self.store.is_up = false,
            3 => self.store.is_up = true,
            // The agent's process; its guard and server go on.
            4 => {
                if self.agents[cell].holder.is_some() {
                    match self.chance.between(0, 4) {
                        0 => self.agents[cell].torn = Some(Torn::Written),
                        1 => self.agents[cell].torn = Some(Torn::Done),
                        _ => self.agents[cell].holder = None,
                    }
                } else {
                    let now = self.clock(cell);
                    self.agents[cell].start(now);
                }
            }
            5 => self.freeze(cell, until),
            6 => self.agents[cell].server.crash(),
            7 => match self.hosts[cell].is_up {
                true => self.shut_down(cell),
                false => self.boot(cell),
            },
            _ => self.cut_off(until),
        }
    }

    /// Some hosts do not reach the others.
    fn cut_off(&mut self, until: u64) {
        let one = (0..CELLS + NODES + PROXIES).filter(|_| self.chance.happens(400)).collect();
        self.cuts.retain(|(_, until)| self.now < *until);
        self.cuts.push((one, until));
    }

    fn freeze(&mut self, host: usize, until: u64) {
        let frozen_until = &mut self.hosts[host].frozen_until;
        *frozen_until = until.max(*frozen_until);
    }

    fn shut_down(&mut self, cell: usize) {
        self.hosts[cell].is_up = false;
        let agent = &mut self.agents[cell];
        agent.server.crash();
        (agent.guard, agent.holder) = (None, None);
        // Of another boot, it says nothing.
        agent.disk.lease = None;
    }

    fn boot(&mut self, cell: usize) {
        let now = self.now;
        let host = &mut self.hosts[cell];
        (host.is_up, host.boot) = (true, host.boot + 1);
        // Its clock begins anew; what is on disk of the one before is not compared with it.
        host.offset =
            self.chance.between(0, 1_000) + 1_000_000 * host.boot - now * host.drift / 1_000;
        let now = self.clock(cell);
        self.agents[cell].start(now);
    }

    /// From here on all is well.
    fn calm(&mut self) {
        self.is_stormy = false;
        self.store.is_up = true;
        self.cuts.clear();
        for cell in 0..CELLS {
            if !self.hosts[cell].is_up {
                self.boot(cell);
            } else if self.agents[cell].holder.is_none() {
                let now = self.clock(cell);
                self.agents[cell].start(now);
            }
        }
    }
}
