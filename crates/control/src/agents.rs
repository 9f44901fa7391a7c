//! What control knows of agents: what each has said last, the lease that it was answered, and the orders that it has not
//! brought back yet.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use model::agent::{Fetch, Fetched, Finished, ORDERS_MAX, Order, Renew, Renewed, Sender, Task};
use model::cell::Epoch;
use model::failover::Process;
use model::lease::{Granter, Moment, Terms};
use model::member::{Done, Work};
use model::persisted::Attended;
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

use crate::control::Control;
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
/// How long a copy of a server may take.
const COPY_MAX: Duration = Duration::from_secs(2 * 3_600);

/// The agent of one cell.
#[derive(Debug)]
pub struct Link {
    app: String,
    cell: String,
    state: Mutex<State>,
    /// An order waits.
    ordered: Notify,
    /// The agent has said something that was not so before.
    changed: Notify,
    /// No two orders are given at once.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    granter: Granter,
    /// That of the store, as it was seen last.
    epoch: Epoch,
    heard: Option<Heard>,
    next_id: u64,
    waiting: VecDeque<Order>,
    under_way: BTreeMap<u64, oneshot::Sender<Result<Done, String>>>,
}

/// What an agent has said last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Heard {
    at: Instant,
    host: u64,
    run: u64,
    process: Process,
}

impl Heard {
    fn is_from(&self, sender: &Sender) -> bool {
        (self.host, self.run) == (sender.host, sender.run)
    }
}

/// The host's time, sleep included.
fn now() -> Moment {
    pg::clock::now()
}

impl Link {
    pub fn new(app: &str, cell: &str, terms: Terms) -> Link {
        let state = State {
            granter: Granter::new(now(), terms),
            epoch: Epoch(0),
            heard: None,
            // What an agent says of an order of an earlier control is not taken for an answer to one of this.
            next_id: u64::try_from(now().0.as_nanos()).unwrap_or(1),
            waiting: VecDeque::new(),
            under_way: BTreeMap::new(),
        };
        Link {
            app: app.into(),
            cell: cell.into(),
            state: Mutex::new(state),
            ordered: Notify::new(),
            changed: Notify::new(),
            turn: tokio::sync::Mutex::new(()),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers an agent that asks for the lease. `read` gives the epoch by the store, whether this cell has it, and who had the
    /// lease; it is read while nobody can revoke that. `attend` records who has it from now on.
    pub(crate) fn renew<E>(
        &self,
        asked: &Renew,
        read: impl FnOnce() -> Result<(Epoch, bool, Option<Attended>), E>,
        attend: impl FnOnce(Attended) -> Result<(), E>,
    ) -> Result<Renewed, E> {
        let mut state = self.state();
        let (epoch, has_it, before) = read()?;
        if let Some(Attended { host, length }) = before {
            state.granter.remember(host, length);
        }
        let host = asked.sender.host;
        let silence_max = state.granter.terms().length;
        let other = state.heard.filter(|heard| heard.host != host);
        if other.is_some_and(|other| other.at.elapsed() < silence_max) {
            let (app, cell) = (&self.app, &self.cell);
            tracing::error!(app, cell, host, "another agent speaks for the cell already");
            return Ok(Renewed { granted: None, terms: state.granter.terms() });
        }
        // What is not recorded is not given: a later control has to know of it.
        let mut granter = state.granter;
        let granted = granter.answer(now(), host, has_it.then_some(epoch));
        let mut length = granter.terms().length;
        if let Some(before) = before
            && !granter.is_settled(now(), before.length)
        {
            length = length.max(before.length);
        }
        let attended = Attended { host, length };
        if granted.is_some() && before != Some(attended) {
            attend(attended)?;
        }
        state.granter = granter;
        state.epoch = epoch;
        let Sender { run, .. } = asked.sender;
        let heard = Heard { at: Instant::now(), host, run, process: asked.process };
        let before = state.heard.replace(heard);
        if before.is_some_and(|before| before.run != heard.run) {
            tracing::warn!(app = self.app, cell = self.cell, "the agent was started again");
            // What it was doing, nobody knows; it may be asked again.
            state.waiting.clear();
            for (_, asked) in std::mem::take(&mut state.under_way) {
                let _ = asked.send(Err("the agent was started again".into()));
            }
        }
        if before.is_none_or(|before| before.process != heard.process) {
            self.changed.notify_waiters();
        }
        let terms = state.granter.terms();
        Ok(Renewed { granted, terms })
    }

    /// What an earlier control has recorded.
    pub(crate) fn remember(&self, Attended { host, length }: Attended) {
        self.state().granter.remember(host, length);
    }

    /// Orders for an agent that asks for them.
    pub(crate) async fn fetch(&self, sender: &Sender) -> Fetched {
        let take = || {
            let mut state = self.state();
            // Of one that was started again meanwhile: the question is from before.
            let is_current = state.heard.is_some_and(|heard| heard.is_from(sender));
            if is_current { state.waiting.drain(..).collect() } else { Vec::new() }
        };
        let ordered = self.ordered.notified();
        let mut orders: Vec<Order> = take();
        if orders.is_empty() && timeout(FETCH_MAX, ordered).await.is_ok() {
            orders = take();
        }
        Fetched { orders }
    }

    pub(crate) fn finished(&self, finished: Finished) {
        let mut state = self.state();
        let is_current = state.heard.is_some_and(|heard| heard.is_from(&finished.sender));
        let asked = state.under_way.remove(&finished.id).filter(|_| is_current);
        if let Some(asked) = asked {
            // Whoever has asked may wait no longer.
            let _ = asked.send(finished.result);
        }
    }

    /// How long an agent may be silent until it is taken for gone.
    fn silence_max(&self) -> Duration {
        self.state().granter.terms().length
    }

    /// What the agent has said last, if that is not long ago.
    fn heard(&self) -> Option<Heard> {
        let silence_max = self.silence_max();
        self.state().heard.filter(|heard| heard.at.elapsed() < silence_max)
    }

    /// What the agent says of the server's process, if it is heard.
    pub(crate) fn process(&self) -> Option<Process> {
        // Two renewals may be lost.
        let recent = self.silence_max() * 3 / 4;
        self.state().heard.filter(|heard| heard.at.elapsed() < recent).map(|heard| heard.process)
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
            Task::Work(Work::StartAgain) => START_MAX,
            Task::Work(Work::ReadTail { .. } | Work::KeepTail { .. }) => READ_MAX,
            _ => SHORT_MAX,
        };
        let busy = |_| format!("the agent of `{}` is busy for longer than {limit:?}", self.cell);
        let _turn = timeout(limit, self.turn.lock()).await.map_err(busy)?;
        if self.heard().is_none() {
            return Err(format!("the agent of `{}` is not heard", self.cell));
        }
        let (tx, rx) = oneshot::channel();
        let id = {
            let mut state = self.state();
            if state.waiting.len() >= ORDERS_MAX {
                return Err(format!("the agent of `{}` fetches no orders", self.cell));
            }
            let id = state.next_id;
            state.next_id += 1;
            let epoch = state.epoch;
            state.waiting.push_back(Order { id, epoch, wait_max: limit, what });
            state.under_way.insert(id, tx);
            id
        };
        self.ordered.notify_one();
        let silent = async {
            // A long order is waited for only while the agent is there.
            while self.heard().is_some() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let answer = tokio::select! {
            answer = timeout(limit, rx) => match answer {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(format!("the agent of `{}` was lost", self.cell)),
                Err(_) => Err(format!("the agent of `{}` is not done within {limit:?}", self.cell)),
            },
            () = silent => Err(format!("the agent of `{}` is not heard any more", self.cell)),
        };
        let mut state = self.state();
        state.under_way.remove(&id);
        state.waiting.retain(|order| order.id != id);
        answer
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
    pub fn renew(&self, asked: &Renew) -> Result<Renewed, ControlError> {
        let Sender { app, cell, .. } = &asked.sender;
        let read = || {
            let application = records::application(&*self.store, app)?.application;
            let (epoch, seen) = (application.epoch, asked.seen);
            if epoch < seen {
                tracing::error!(app, cell, %epoch, %seen, "the store is older than what the agent has seen; `holdfast store restore` says what to do");
            }
            let has_it = application.granted_to.as_ref() == Some(cell) && epoch >= seen;
            Ok((epoch, has_it, records::attended(&*self.store, app, cell)?))
        };
        let attend = |attended| Ok(records::attend(&*self.store, app, cell, attended)?);
        self.link(&asked.sender)?.renew(asked, read, attend)
    }

    /// Orders for an agent, which waits for some a while.
    ///
    /// # Errors
    /// There is to be no such agent.
    pub async fn fetch(&self, asked: &Fetch) -> Result<Fetched, ControlError> {
        Ok(self.link(&asked.sender)?.fetch(&asked.sender).await)
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
