//! What control knows of agents: what each has said last, the lease that it was answered, and the orders that it has not
//! brought back yet.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::agent::{Fetch, Fetched, Finished, Order, Postmaster, Renew, Renewed, Sender, Task};
use model::cell::Epoch;
use model::failover::Process;
use model::lease::{Granter, Moment, Terms};
use model::member::{Done, Work};
use model::persisted::{Attended, Pleads, attended_key, pleads_key};
use model::pledge::Neighbour;
use tokio::sync::Notify;

use crate::config::CellServer;
use crate::control::Control;
use crate::mailbox::{Identity, Mailbox, Posted};
use crate::member::Member;
use crate::records;
use crate::requests::ControlError;

/// How long an agent's question for orders waits for one.
const FETCH_MAX: Duration = Duration::from_secs(10);
/// How long control waits for what is done at once.
const SHORT_MAX: Duration = Duration::from_secs(15);
/// How long a server may take to be started, or to stop.
const START_MAX: Duration = Duration::from_secs(150);
/// How long reading a log may take.
const READ_MAX: Duration = Duration::from_secs(150);
/// What was pledged is over after the longest lease.
const PLEDGE_MAX: Duration = Duration::from_secs(65);
/// How long a copy of a server may take that goes on.
const COPY_MAX: Duration = Duration::from_secs(3 * 24 * 3_600);

/// What the store says where a lease is asked for.
pub(crate) struct Found {
    epoch: Epoch,
    version: u64,
    /// The cell has the grant.
    has_it: bool,
    /// Who had the lease last.
    before: Option<Attended>,
}

/// What became of the lease that another host of a cell had.
enum Ghost {
    None,
    /// It is over, and so is what was pledged for it.
    Ended(Attended),
    /// Why it may go on, for people.
    Remains(String),
}

/// The agent of one cell.
#[derive(Debug)]
pub struct Link {
    app: String,
    cell: String,
    mailbox: Mailbox<(Epoch, Task), Done>,
    state: Mutex<State>,
    /// The agent has said something that was not so before.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    granter: Granter,
    /// That of the store, as it was seen last.
    epoch: Epoch,
    /// What the agent has said last.
    process: Option<Process>,
    is_in_hand: bool,
    /// It has seen a later store than ours.
    is_ahead: bool,
    /// What it says of the server that it has in hand.
    postmaster: Option<Postmaster>,
    /// Since when that is another server than the one that control reaches.
    differs_since: Option<Moment>,
    /// Where it answers other agents.
    listens: Option<String>,
    directory: Option<u64>,
    /// What is recorded of whom it may ask for pledges.
    pleads: Option<Pleads>,
    /// Why somebody who asks gets no lease although it is the cell's, and when he has asked last.
    ghost: Option<(String, Moment)>,
    /// Which run was heard before the one that is heard; if that is heard again, there are two.
    before: Option<Identity>,
    /// How often two took turns, and until when they count as two.
    turns: u32,
    twins_until: Moment,
}

impl State {
    /// It has had the time to say so if its server was started again.
    fn is_another(&self) -> bool {
        let length = self.granter.terms().length;
        self.differs_since.is_some_and(|since| since.plus(length).from(now()).is_zero())
    }

    /// Two agents have the number of one host, and take turns.
    fn has_twin(&mut self, last: Option<Identity>, who: Identity, now: Moment) -> bool {
        /// One that was started again may be heard after its successor once.
        const TURNS_MAX: u32 = 4;
        if now >= self.twins_until {
            self.turns = 0;
        }
        if last.is_some_and(|last| last != who) {
            if self.before == Some(who) {
                self.turns += 1;
                self.twins_until = self.granter.terms().free_at(now);
            }
            self.before = last;
        }
        self.turns >= TURNS_MAX
    }
}

fn identity(sender: &Sender) -> Identity {
    (sender.host, sender.run)
}

/// The host's time, sleep included.
fn now() -> Moment {
    pg::clock::now()
}

impl Link {
    pub fn new(app: &str, cell: &str, terms: Terms) -> Link {
        let granter = Granter::new(now(), terms);
        Link {
            app: app.into(),
            cell: cell.into(),
            mailbox: Mailbox::new(format!("the agent of `{cell}`"), terms.length),
            state: Mutex::new(State {
                granter,
                epoch: Epoch(0),
                process: None,
                is_in_hand: true,
                is_ahead: false,
                postmaster: None,
                differs_since: None,
                listens: None,
                directory: None,
                pleads: None,
                ghost: None,
                before: None,
                turns: 0,
                twins_until: Moment(Duration::ZERO),
            }),
            changed: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers an agent that asks for the lease. `read` gives the epoch by the store, whether this cell has it, and who had the
    /// lease; it is read while nobody can revoke that. `settled` is whose pledges were ended, `attend` records who has it from
    /// now on.
    pub(crate) fn renew<E>(
        &self,
        asked: &Renew,
        settled: Option<Attended>,
        read: impl FnOnce() -> Result<Found, E>,
        attend: impl FnOnce(Attended) -> Result<(), E>,
    ) -> Result<Renewed, E> {
        let mut state = self.state();
        let Found { epoch, version, has_it, before } = read()?;
        state.is_ahead = asked.seen_version > version || asked.seen > epoch;
        if let Some(Attended { host, length, .. }) = before {
            state.granter.remember(host, length);
        }
        let host = asked.sender.host;
        // What it says of a server is not said of the one that may be the primary.
        let is_another = self.mailbox.heard().is_some_and(|(other, _)| other != host)
            || state.granter.is_anothers(now(), host);
        if is_another {
            let (app, cell) = (&self.app, &self.cell);
            tracing::error!(app, cell, host, "another agent speaks for the cell already");
            let terms = state.granter.terms();
            return Ok(Renewed { granted: None, version, terms, neighbours: Vec::new() });
        }
        // What this one says of its server is not said of the other's.
        if before.is_some_and(|before| {
            before.may_go_on(epoch, asked.sender.directory, asked.place) && settled != Some(before)
        }) {
            let terms = state.granter.terms();
            return Ok(Renewed { granted: None, version, terms, neighbours: Vec::new() });
        }
        let has_twin = state.has_twin(self.mailbox.heard_last(), identity(&asked.sender), now());
        if has_twin {
            let (app, cell) = (&self.app, &self.cell);
            tracing::error!(
                app,
                cell,
                host,
                "two agents speak for the cell by one state directory: neither gets a lease"
            );
        }
        // What is not recorded is not given: a later control has to know of it.
        let mut granter = state.granter;
        let is_its = has_it;
        let has_it = has_it && asked.is_in_hand && !state.is_another() && !has_twin;
        let granted = granter.answer(now(), host, has_it.then_some(epoch));
        let mut length = granter.terms().length;
        if let Some(before) = before
            && !granter.is_settled(now(), before.length)
        {
            length = length.max(before.length);
        }
        let directory = asked.sender.directory;
        let attended = Attended { host, directory, epoch, length, place: asked.place };
        if granted.is_some() && before != Some(attended) {
            attend(attended)?;
        }
        state.granter = granter;
        state.epoch = epoch;
        self.mailbox.hear(identity(&asked.sender));
        if state.process.replace(asked.process) != Some(asked.process) {
            self.changed.notify_waiters();
        }
        if std::mem::replace(&mut state.is_in_hand, asked.is_in_hand) && !asked.is_in_hand {
            let (app, cell) = (&self.app, &self.cell);
            tracing::error!(app, cell, "the agent cannot see or end its server: it gets no lease");
        }
        state.listens.clone_from(&asked.listens);
        state.directory = Some(asked.sender.directory);
        // What was compared was another one, or is no primary any more.
        if state.postmaster != asked.postmaster || asked.process != Process::Lives || !is_its {
            state.differs_since = None;
        }
        state.postmaster = asked.postmaster;
        let terms = state.granter.terms();
        Ok(Renewed { granted, version, terms, neighbours: Vec::new() })
    }

    fn haunt(&self, ghost: Option<String>) {
        let ghost = ghost.map(|why| (why, now()));
        let before = std::mem::replace(&mut self.state().ghost, ghost.clone());
        if let Some((why, _)) = ghost.filter(|_| before.is_none()) {
            tracing::error!(app = self.app, cell = self.cell, why, "the agent gets no lease");
        }
    }

    /// Why somebody who asks for the lease at the moment does not get it.
    fn haunted(&self) -> Option<String> {
        let state = self.state();
        let (why, at) = state.ghost.as_ref()?;
        (now() < state.granter.terms().free_at(*at)).then(|| why.clone())
    }

    /// Records whom the agent may ask for pledges from now on, before it knows, if that is not recorded yet.
    fn pleads<E>(
        &self,
        pleads: Pleads,
        record: impl FnOnce(&Pleads) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut state = self.state();
        if state.pleads.as_ref() != Some(&pleads) {
            record(&pleads)?;
            state.pleads = Some(pleads);
        }
        Ok(())
    }

    /// What an earlier control has recorded.
    pub(crate) fn remember(&self, Attended { host, length, .. }: Attended) {
        self.state().granter.remember(host, length);
    }

    /// Orders for an agent that asks for them.
    pub(crate) async fn fetch(&self, Fetch { sender, last }: &Fetch) -> Fetched {
        let posted = self.mailbox.fetch(identity(sender), *last, FETCH_MAX).await;
        let order =
            |Posted { id, wait_max, what: (epoch, what) }| Order { id, epoch, wait_max, what };
        Fetched { orders: posted.into_iter().map(order).collect() }
    }

    pub(crate) fn finished(&self, finished: Finished) {
        self.mailbox.finished(identity(&finished.sender), finished.id, finished.result);
    }

    /// What the agent says of the server's process, if it is heard.
    pub(crate) fn process(&self) -> Option<Process> {
        let state = self.state();
        // Two renewals may be lost.
        let recent = state.granter.terms().length * 3 / 4;
        state.process.filter(|_| self.mailbox.heard_within(recent).is_some())
    }

    /// The agent is heard, and cannot see or end its server, as it says or by what control has found.
    pub(crate) fn is_out_of_hand(&self) -> bool {
        let state = self.state();
        (!state.is_in_hand || state.is_another()) && self.mailbox.heard().is_some()
    }

    pub(crate) fn is_ahead(&self) -> bool {
        self.state().is_ahead
    }

    /// Whether the server that control reaches is the one that the agent has in hand.
    pub(crate) fn compare(&self, found: Postmaster) {
        let mut state = self.state();
        let before = state.is_another();
        // Of one that was not heard yet, or has none at the moment, this says nothing.
        state.differs_since = match state.postmaster {
            Some(said) if said != found => Some(state.differs_since.unwrap_or_else(now)),
            _ => None,
        };
        if state.is_another() && !before {
            let (app, cell) = (&self.app, &self.cell);
            tracing::error!(
                app,
                cell,
                "the agent's data directory is not that of the server that is reached: it gets no lease; look at `data_dir` and `server`"
            );
        }
    }

    /// That of the agent which is heard.
    pub(crate) fn directory(&self) -> Option<u64> {
        self.state().directory.filter(|_| self.is_heard())
    }

    pub(crate) async fn must_be_heard(&self) -> Result<(), String> {
        self.mailbox.must_be_heard().await.map(drop)
    }

    pub(crate) fn is_heard(&self) -> bool {
        self.mailbox.heard().is_some()
    }

    /// Resolves when the agent says something else of the process.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Nobody is given the lease again until [`Link::restore`]. Gives how long it may still be held.
    pub(crate) fn revoke(&self) -> Duration {
        self.state().granter.revoke().from(now())
    }

    pub(crate) fn restore(&self) {
        self.state().granter.restore();
    }

    /// The lease is over, as nobody has asked for it for so long.
    pub(crate) fn is_over(&self) -> bool {
        self.state().granter.free_at().from(now()).is_zero()
    }

    /// Orders are of this epoch from now on.
    pub(crate) fn see(&self, epoch: Epoch) {
        let mut state = self.state();
        state.epoch = state.epoch.max(epoch);
    }

    pub(crate) async fn ask(&self, what: Task) -> Result<Done, String> {
        let limit = match &what {
            Task::Work(Work::Rejoin { .. }) => COPY_MAX,
            Task::EndPledges { .. } => PLEDGE_MAX,
            Task::Work(Work::StartAgain | Work::StartStandby) => START_MAX,
            Task::Work(Work::ReadTail { .. } | Work::KeepTail { .. }) => READ_MAX,
            _ => SHORT_MAX,
        };
        self.mailbox.ask(limit, || (self.state().epoch, what)).await
    }
}

impl Control {
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
    pub async fn renew(&self, asked: &Renew) -> Result<Renewed, ControlError> {
        let Sender { app, cell, .. } = &asked.sender;
        let read = || {
            let application = records::application(&*self.store, app)?.application;
            let (epoch, version, seen) = (application.epoch, application.version, asked.seen);
            if epoch < seen || version < asked.seen_version {
                tracing::error!(app, cell, %epoch, %seen, version, asked.seen_version, "the store is older than what the agent has seen; `holdfast store restore` says what to do");
            }
            let is_older = epoch < seen || version < asked.seen_version;
            let has_it = application.granted_to.as_ref() == Some(cell) && !is_older;
            let before = records::attended(&*self.store, app, cell)?;
            Ok(Found { epoch, version, has_it, before })
        };
        let attend =
            |attended| Ok(records::put(&*self.store, &attended_key(app, cell), &attended)?);
        let link = self.link(&asked.sender)?;
        let (settled, ghost) = match self.end_ghost(link, asked).await? {
            Ghost::None => (None, None),
            Ghost::Ended(attended) => (Some(attended), None),
            Ghost::Remains(why) => (None, Some(why)),
        };
        link.haunt(ghost);
        let renewed = link.renew::<ControlError>(asked, settled, read, attend)?;
        if link.mailbox.heard_last() != Some(identity(&asked.sender)) {
            return Ok(renewed);
        }
        let neighbours = self.neighbours(app, cell)?;
        let answered = neighbours.iter().map(|one| (one.cell.clone(), one.directory)).collect();
        let pleads = Pleads::of(asked.neighbours.clone(), answered);
        link.pleads(pleads, |pleads| records::put(&*self.store, &pleads_key(app, cell), pleads))?;
        Ok(Renewed { neighbours, ..renewed })
    }

    /// The lease that another host of the cell had in this epoch may go on by pledges, though control has given none for long:
    /// it is ended before this one gets it.
    async fn end_ghost(&self, link: &Link, asked: &Renew) -> Result<Ghost, ControlError> {
        let Sender { app, cell, directory, .. } = &asked.sender;
        let attended = records::attended(&*self.store, app, cell)?;
        let application = records::application(&*self.store, app)?.application;
        let goes_on = |one: &Attended| one.may_go_on(application.epoch, *directory, asked.place);
        let Some(attended) = attended.filter(goes_on) else { return Ok(Ghost::None) };
        if application.granted_to.as_ref() != Some(cell) {
            return Ok(Ghost::None);
        }
        if records::pleads(&*self.store, app, cell)?.0.is_empty() {
            return Ok(Ghost::Ended(attended));
        }
        let why = |why: String| {
            Ghost::Remains(format!(
                "the lease that another agent of `{cell}` had may go on by pledges: {why}"
            ))
        };
        if !link.is_over() {
            return Ok(why("it is not over yet".into()));
        }
        let pleads = records::pleads(&*self.store, app, cell)?;
        let servers = self.servers(app)?;
        let others = servers.cells.iter().filter(|(other, _)| *other != cell);
        let mut members = others.filter_map(|(other, server)| {
            let member = server.member.as_ref()?;
            pleads.all_need(other, member.directory()).then_some(member)
        });
        let Some(member) = members.next() else {
            return Ok(why("no agent is heard that could end them".into()));
        };
        Ok(match member.end_pledges().await {
            Ok(_) => Ghost::Ended(attended),
            Err(error) => why(error),
        })
    }

    /// The agents of all other cells, if all are known: each of them could become the primary.
    fn neighbours(&self, app: &str, cell: &str) -> Result<Vec<Neighbour>, ControlError> {
        let others = self.servers(app)?.cells.iter().filter(|(other, _)| *other != cell);
        let neighbour = |(other, server): (&String, &CellServer)| match &server.member {
            Some(Member::Agent(link)) => {
                let state = link.state();
                let (address, directory) = (state.listens.clone()?, state.directory?);
                Some(Neighbour { cell: other.clone(), directory, address })
            }
            _ => None,
        };
        Ok(others.map(neighbour).collect::<Option<_>>().unwrap_or_default())
    }

    /// An agent has seen more of an application than the store knows: that was restored from a copy, or is new. Nothing that it
    /// says of commits is relied on.
    pub(crate) fn is_older(&self, app: &str) -> bool {
        let is_ahead = |server: &CellServer| matches!(&server.member, Some(Member::Agent(link)) if link.is_ahead());
        self.servers(app).is_ok_and(|servers| servers.cells.values().any(is_ahead))
    }

    /// What is wrong with the agents of an application.
    ///
    /// # Errors
    /// There is no such application.
    pub fn troubled_agents(&self, app: &str) -> Result<Vec<String>, ControlError> {
        let trouble = |(cell, server): (&String, &CellServer)| match &server.member {
            Some(Member::Agent(link)) if link.is_ahead() => Some(format!(
                "the agent of `{cell}` has seen a later store than this one, which goes by nothing of it: `holdfast store backup`, and then `store restore` of that copy, makes this the newest"
            )),
            Some(Member::Agent(link)) if link.haunted().is_some() => link.haunted(),
            Some(Member::Agent(link)) if !link.is_heard() => {
                Some(format!("the agent of `{cell}` is not heard: start it, or look at its log"))
            }
            Some(Member::Agent(link)) if link.is_out_of_hand() => Some(format!(
                "the agent of `{cell}` cannot see or end its server, and gets no lease: its log says why"
            )),
            _ => None,
        };
        Ok(self.servers(app)?.cells.iter().filter_map(trouble).collect())
    }

    /// Orders for an agent, which waits for some a while.
    ///
    /// # Errors
    /// There is to be no such agent.
    pub async fn fetch(&self, asked: &Fetch) -> Result<Fetched, ControlError> {
        Ok(self.link(&asked.sender)?.fetch(asked).await)
    }

    /// What an agent says of an order.
    ///
    /// # Errors
    /// There is to be no such agent.
    pub fn finished(&self, finished: Finished) -> Result<(), ControlError> {
        self.link(&finished.sender)?.finished(finished);
        Ok(())
    }
}
