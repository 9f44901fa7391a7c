//! An agent, its guard and its server, on one host.

use std::collections::BTreeSet;
use std::time::Duration;

use model::cell::Epoch;
use model::lease::{Holder, Moment, Terms};
use model::pledge::{Pledger, Situation};
use model::seat::Tenure;

use crate::planted::Planted;
use crate::world::{Message, Place, TERMS, World};

/// Between two looks of an agent.
const TICK: u64 = 20;
const RETRY: u64 = 200;
/// A server that was found takes so long until it has its first lease, at most.
const FIRST_MAX: Duration = Duration::from_secs(3);

#[derive(Debug, Clone, Copy, Default)]
pub struct Server {
    pub is_running: bool,
    pub is_primary: bool,
    /// It has crashed as a standby, and is started again as one.
    pub is_crashed_standby: bool,
}

impl Server {
    pub const PRIMARY: Server =
        Server { is_running: true, is_primary: true, is_crashed_standby: false };
    pub const STANDBY: Server =
        Server { is_running: true, is_primary: false, is_crashed_standby: false };

    pub fn crash(&mut self) {
        let is_crashed_standby = self.is_crashed_standby || (self.is_running && !self.is_primary);
        *self = Server { is_running: false, is_primary: false, is_crashed_standby };
    }
}

/// What outlives the process.
#[derive(Debug, Clone, Copy)]
pub struct Disk {
    pub seen: Epoch,
    pub pledger: Pledger,
    pub pledged: Terms,
    /// Until when the server may run without a lease, if that was written since the boot.
    pub lease: Option<Moment>,
}

/// An agent ends in the midst of what it is told next: what it writes is on disk, and nobody is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Torn {
    /// And nothing of it is done.
    Written,
    /// And it is done.
    Done,
}

#[derive(Debug)]
pub struct Agent {
    pub torn: Option<Torn>,
    pub server: Server,
    /// It takes no writes, whatever it is; said in its files.
    pub is_fenced: bool,
    pub timeline: u32,
    /// When the last fence ended all other connections, with what was on its way by them.
    pub outsiders_ended: u64,
    /// Another number each time the server is started: connections do not outlive it.
    pub run: u64,
    pub disk: Disk,
    /// The guard's time, if there is a guard.
    pub guard: Option<Moment>,
    /// None: the process does not run.
    pub holder: Option<Holder>,
    pub pledger: Pledger,
    heard: Option<Moment>,
    tenure: Tenure,
    /// The node that is asked.
    at: usize,
    asked: Option<(Moment, u64)>,
    /// True time of the next renewal, and of the next plea.
    renew_at: u64,
    plead_at: u64,
    neighbours: BTreeSet<usize>,
    plea: Option<(Moment, Epoch, BTreeSet<usize>)>,
    patience: Moment,
}

impl Agent {
    pub fn new(is_primary: bool) -> Agent {
        let terms = Terms { length: Duration::ZERO };
        let (seen, pledger) = (Epoch(0), Pledger::default());
        Agent {
            torn: None,
            server: if is_primary { Server::PRIMARY } else { Server::STANDBY },
            is_fenced: false,
            timeline: 1,
            outsiders_ended: 0,
            run: 1,
            disk: Disk { seen, pledger, pledged: terms, lease: None },
            guard: None,
            holder: None,
            pledger,
            heard: None,
            tenure: Tenure::default(),
            at: 0,
            asked: None,
            renew_at: 0,
            plead_at: 0,
            neighbours: BTreeSet::new(),
            plea: None,
            patience: Moment(Duration::ZERO),
        }
    }

    pub fn start(&mut self, now: Moment) {
        self.torn = None;
        self.holder = Some(Holder::new(self.disk.seen));
        self.pledger = self.disk.pledger.after_start(now, self.disk.pledged);
        (self.heard, self.tenure, self.asked, self.plea) = (None, Tenure::default(), None, None);
        self.neighbours.clear();
        let first = now.plus(FIRST_MAX);
        self.patience = self.disk.lease.map_or(first, |lease| lease.min(first));
        // One that does not run, and would be a primary, starts as a standby.
        if !self.server.is_running {
            self.start_server(Server::STANDBY);
        }
    }

    fn hears_control(&self, now: Moment) -> bool {
        self.heard.is_some_and(|sent| now < sent.plus(TERMS.renew_every() * 2))
    }

    fn see(&mut self, epoch: Epoch, planted: Option<Planted>) -> bool {
        let Some(holder) = &mut self.holder else { return false };
        if holder.see(epoch).is_err() {
            return false;
        }
        if planted != Some(Planted::EpochNotKept) {
            self.disk.seen = self.disk.seen.max(epoch);
        }
        true
    }

    /// As `prepare_for` and `granted` of the agent.
    fn hold(&mut self, sent: Moment, epoch: Epoch, planted: Option<Planted>) {
        self.disk.lease = Some(TERMS.kill_at(sent));
        self.guard = self.guard.max(Some(TERMS.kill_at(sent)));
        if self.see(epoch, planted)
            && let Some(holder) = &mut self.holder
        {
            holder.granted(sent, TERMS, epoch);
        }
    }

    fn start_server(&mut self, server: Server) {
        self.server = server;
        self.run += 1;
    }

    fn end(&mut self) {
        self.server = Server::default();
    }
}

/// What an agent is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    Isolate,
    EndPledges,
    HoldLease,
    StartAgain,
    StartStandby,
    Rejoin,
}

impl World {
    /// A lease has ended, and its server by that.
    fn note_end(&mut self, cell: usize) {
        self.summary.ended += 1;
        if cell != self.store.application.granted_to {
            // It is over for it.
            return;
        }
        let mut others = (0..self.agents.len()).filter(|other| *other != cell);
        let is_heard = others.any(|other| self.agents[other].hears_control(self.clock(other)));
        self.past.ended_unheard |= !is_heard;
    }

    pub(crate) fn tick_agent(&mut self, cell: usize) {
        self.again(TICK, Place::Agent(cell));
        let (now, true_now, planted) = (self.clock(cell), self.now, self.planted);
        let count = self.nodes.len();
        let agent = &mut self.agents[cell];
        let Some(holder) = agent.holder else { return };
        let (mut renews, mut pleads) = (false, None);
        match agent.asked {
            Some((_, deadline)) if true_now >= deadline => {
                (agent.asked, agent.heard) = (None, None);
                agent.at = (agent.at + 1) % count;
                agent.renew_at = true_now + RETRY / 2;
            }
            None if true_now >= agent.renew_at => renews = true,
            _ => (),
        }
        if agent.server.is_crashed_standby {
            agent.start_server(Server::STANDBY);
        }
        let lease = holder.epoch(now);
        let is_late =
            holder.sent().is_some_and(|sent| now >= sent.plus(TERMS.renew_every() * 5 / 4));
        if let Some(epoch) = lease.filter(|_| is_late && planted != Some(Planted::NobodyPleads))
            && true_now >= agent.plead_at
            && !agent.neighbours.is_empty()
        {
            agent.plea = Some((now, epoch, agent.neighbours.clone()));
            agent.plead_at = true_now + 50;
            pleads = Some((epoch, agent.neighbours.clone()));
        }
        let is_patient = now < agent.patience;
        if lease.is_none() && !is_patient && agent.server.is_running && agent.server.is_primary {
            agent.end();
            self.note_end(cell);
        }
        if let Some((epoch, neighbours)) = pleads {
            for other in neighbours {
                let plea = Message::Plea { from: cell, sent: now, epoch };
                self.send(Place::Agent(cell), Place::Agent(other), plea);
            }
        }
        if renews {
            self.renew(cell, now);
        }
    }

    fn renew(&mut self, cell: usize, now: Moment) {
        let (deadline, boot) = (self.now + 625, self.hosts[cell].boot);
        let agent = &mut self.agents[cell];
        let Some(holder) = &agent.holder else { return };
        agent.asked = Some((now, deadline));
        let question = Message::Renew {
            from: cell,
            host: boot * 16 + cell as u64,
            sent: now,
            seen: holder.seen(),
            server: agent.server,
            neighbours: agent.neighbours.clone(),
        };
        let to = Place::Node(agent.at);
        self.send(Place::Agent(cell), to, question);
    }

    pub(crate) fn tick_guard(&mut self, cell: usize) {
        self.again(crate::world::GUARD_LOOK, Place::Guard(cell));
        let now = self.clock(cell);
        let agent = &mut self.agents[cell];
        let is_over = agent.guard.is_some_and(|kill_at| now >= kill_at);
        if is_over && agent.server.is_running && agent.server.is_primary {
            agent.end();
            self.note_end(cell);
        }
    }

    pub(crate) fn agent_hears(&mut self, cell: usize, message: Message) {
        let Some(torn) = self.agents[cell].torn.take() else {
            return self.agent_hears_all(cell, message);
        };
        let Agent { server, run, is_fenced, .. } = self.agents[cell];
        self.silent = Some(Place::Agent(cell));
        self.agent_hears_all(cell, message);
        self.silent = None;
        let agent = &mut self.agents[cell];
        if torn == Torn::Written {
            (agent.server, agent.run, agent.is_fenced) = (server, run, is_fenced);
        }
        agent.holder = None;
    }

    fn agent_hears_all(&mut self, cell: usize, message: Message) {
        let (now, planted) = (self.clock(cell), self.planted);
        let agent = &mut self.agents[cell];
        let Some(holder) = agent.holder else { return };
        match message {
            Message::Refused { sent } if agent.asked.is_some_and(|(asked, _)| asked == sent) => {
                (agent.asked, agent.heard) = (None, None);
                agent.at = (agent.at + 1) % self.nodes.len();
                agent.renew_at = self.now + RETRY / 2;
            }
            Message::Renewed { tenure, sent, granted, neighbours } => {
                if tenure < agent.tenure {
                    return;
                }
                if agent.asked.is_some_and(|(asked, _)| asked == sent) {
                    agent.asked = None;
                    agent.renew_at = self.now + 625;
                }
                (agent.tenure, agent.heard) = (tenure, agent.heard.max(Some(sent)));
                if !neighbours.is_empty() {
                    agent.neighbours = neighbours;
                }
                let is_new = granted.is_some_and(|epoch| epoch > holder.seen());
                let has_pledges = agent.pledger.over_since(sent).is_none();
                if let Some(epoch) = granted.filter(|_| !(is_new && has_pledges)) {
                    agent.hold(sent, epoch, planted);
                }
            }
            Message::Plea { from, sent, epoch } => {
                let at = Situation {
                    now,
                    hears_control: agent.hears_control(now),
                    has_lease: holder.epoch(now).is_some(),
                    seen: holder.seen(),
                    terms: TERMS,
                };
                agent.disk.pledged.length = agent.disk.pledged.length.max(TERMS.length);
                if agent.pledger.pledge(epoch, at) {
                    let pledged = Message::Pledged { from: cell, sent, epoch };
                    self.send(Place::Agent(cell), Place::Agent(from), pledged);
                }
            }
            Message::Pledged { from, sent, epoch } => {
                let Some((asked, of, missing)) = &mut agent.plea else { return };
                if (*asked, *of) != (sent, epoch) {
                    return;
                }
                missing.remove(&from);
                if missing.is_empty() {
                    agent.plea = None;
                    if holder.epoch(now) == Some(epoch) {
                        agent.hold(sent, epoch, planted);
                        self.summary.pledges += 1;
                    }
                }
            }
            Message::Order { from, tenure, id, epoch, what } => {
                let is_current = tenure >= agent.tenure && agent.hears_control(now);
                if is_current && agent.see(epoch, planted) {
                    self.obey(cell, from, tenure, id, epoch, what);
                }
            }
            _ => (),
        }
    }

    fn obey(
        &mut self,
        cell: usize,
        from: usize,
        tenure: Tenure,
        id: u64,
        epoch: Epoch,
        what: Task,
    ) {
        let now = self.clock(cell);
        let agent = &mut self.agents[cell];
        let Some(holder) = &mut agent.holder else { return };
        let is_done = match what {
            Task::Isolate => {
                holder.give_up(now);
                agent.end();
                true
            }
            Task::EndPledges => {
                agent.pledger.refuse(epoch);
                agent.disk.pledger = agent.pledger;
                // It is asked again until it is.
                agent.pledger.over_since(now).is_some()
            }
            Task::HoldLease => holder.epoch(now) == Some(epoch),
            Task::StartAgain => {
                let has_it = holder.epoch(now) == Some(epoch);
                if has_it {
                    agent.start_server(Server::PRIMARY);
                }
                has_it
            }
            Task::StartStandby => {
                if !agent.server.is_running {
                    agent.start_server(Server::STANDBY);
                }
                true
            }
            Task::Rejoin => {
                agent.is_fenced = false;
                agent.start_server(Server::STANDBY);
                true
            }
        };
        if is_done {
            let done = Message::Finished { from: cell, tenure, id };
            self.send(Place::Agent(cell), Place::Node(from), done);
        }
    }
}
