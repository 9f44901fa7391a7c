//! Orders for somebody in another process, who asks for them, and what became of them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use model::agent::ORDERS_MAX;
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

/// Between two looks whether somebody who has an order is still there.
const LOOK: Duration = Duration::from_millis(50);

/// Which of several that go by one name.
pub(crate) type Identity = (u64, u64);

/// An order, and how long whoever has given it waits for what becomes of it.
#[derive(Debug)]
pub(crate) struct Posted<O> {
    pub(crate) id: u64,
    pub(crate) wait_max: Duration,
    pub(crate) what: O,
}

#[derive(Debug)]
pub(crate) struct Mailbox<O, R> {
    /// For errors.
    whose: String,
    /// Who is silent for longer is not there.
    silence_max: Duration,
    state: Mutex<State<O, R>>,
    /// An order waits.
    ordered: Notify,
    /// No two orders are given at once.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State<O, R> {
    heard: Option<(Instant, Identity)>,
    next_id: u64,
    waiting: VecDeque<Posted<O>>,
    under_way: BTreeMap<u64, oneshot::Sender<Result<R, String>>>,
}

impl<O, R> Mailbox<O, R> {
    pub(crate) fn new(whose: String, silence_max: Duration) -> Mailbox<O, R> {
        let state = State {
            heard: None,
            // What is said of an order of an earlier control is not taken for an answer to one of this.
            next_id: u64::try_from(pg::clock::now().0.as_nanos()).unwrap_or(1),
            waiting: VecDeque::new(),
            under_way: BTreeMap::new(),
        };
        let (ordered, turn) = (Notify::new(), tokio::sync::Mutex::default());
        Mailbox { whose, silence_max, state: Mutex::new(state), ordered, turn }
    }

    fn state(&self) -> MutexGuard<'_, State<O, R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It has said something.
    pub(crate) fn hear(&self, from: Identity) {
        let mut state = self.state();
        let before = state.heard.replace((Instant::now(), from));
        if before.is_some_and(|(_, before)| before != from) {
            tracing::warn!("{} was started again", self.whose);
            // What it was doing, nobody knows; it may be asked again.
            state.waiting.clear();
            for (_, asked) in std::mem::take(&mut state.under_way) {
                let _ = asked.send(Err(format!("{} was started again", self.whose)));
            }
        }
    }

    /// It has said that it ends.
    pub(crate) fn forget(&self) {
        self.state().heard = None;
    }

    /// Who was heard last, if that is not longer ago than `silence_max`.
    pub(crate) fn heard_within(&self, silence_max: Duration) -> Option<Identity> {
        let heard = self.state().heard.filter(|(at, _)| at.elapsed() < silence_max);
        heard.map(|(_, who)| who)
    }

    pub(crate) fn heard(&self) -> Option<Identity> {
        self.heard_within(self.silence_max)
    }

    /// Orders, for whom asks for them; waits for one so long.
    pub(crate) async fn fetch(&self, from: Identity, wait_max: Duration) -> Vec<Posted<O>> {
        let take = || {
            let mut state = self.state();
            // Of one that was started again meanwhile: the question is from before.
            let is_current = state.heard.is_some_and(|(_, who)| who == from);
            if is_current { state.waiting.drain(..).collect() } else { Vec::new() }
        };
        let ordered = self.ordered.notified();
        let mut orders: Vec<Posted<O>> = take();
        if orders.is_empty() && timeout(wait_max, ordered).await.is_ok() {
            orders = take();
        }
        orders
    }

    pub(crate) fn finished(&self, from: Identity, id: u64, result: Result<R, String>) {
        let mut state = self.state();
        let is_current = state.heard.is_some_and(|(_, who)| who == from);
        if let Some(asked) = state.under_way.remove(&id).filter(|_| is_current) {
            // Whoever has asked may wait no longer.
            let _ = asked.send(result);
        }
    }

    /// Gives an order, and waits for what becomes of it.
    pub(crate) async fn ask(&self, limit: Duration, what: impl FnOnce() -> O) -> Result<R, String> {
        let whose = &self.whose;
        let busy = |_| format!("{whose} is busy for longer than {limit:?}");
        let _turn = timeout(limit, self.turn.lock()).await.map_err(busy)?;
        if self.heard().is_none() {
            return Err(format!("{whose} is not heard"));
        }
        let (tx, rx) = oneshot::channel();
        let what = what();
        let id = {
            let mut state = self.state();
            if state.waiting.len() >= ORDERS_MAX {
                return Err(format!("{whose} fetches no orders"));
            }
            let id = state.next_id;
            state.next_id += 1;
            state.waiting.push_back(Posted { id, wait_max: limit, what });
            state.under_way.insert(id, tx);
            id
        };
        self.ordered.notify_one();
        let silent = async {
            // A long order is waited for only while whoever has it is there.
            while self.heard().is_some() {
                tokio::time::sleep(LOOK).await;
            }
        };
        let answer = tokio::select! {
            answer = timeout(limit, rx) => match answer {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(format!("{whose} was lost")),
                Err(_) => Err(format!("{whose} is not done within {limit:?}")),
            },
            () = silent => Err(format!("{whose} is not heard any more")),
        };
        let mut state = self.state();
        state.under_way.remove(&id);
        state.waiting.retain(|order| order.id != id);
        answer
    }
}
