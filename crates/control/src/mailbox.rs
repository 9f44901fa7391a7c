//! Orders for somebody in another process, who asks for them, and what became of them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use model::agent::ORDERS_MAX;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

/// Between two looks whether somebody who has an order is still there.
const LOOK: Duration = Duration::from_millis(50);

/// Which of several that go by one name.
pub(crate) type Identity = (u64, u64);

/// An order, and how long whoever has given it waits for what becomes of it.
#[derive(Debug, Clone)]
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
    /// Since when somebody is listened for.
    opened: Instant,
    state: Mutex<State<O, R>>,
    /// Counts questions for orders, and orders: whoever waits looks again.
    stirred: watch::Sender<u64>,
    /// No two orders are given at once.
    turn: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State<O, R> {
    heard: Option<(Instant, Identity)>,
    next_id: u64,
    /// Questions for orders; the last one counts.
    fetches: u64,
    /// What was not finished, and whether somebody has fetched it.
    orders: VecDeque<(Posted<O>, bool)>,
    under_way: BTreeMap<u64, oneshot::Sender<Result<R, String>>>,
}

impl<O: Clone, R> Mailbox<O, R> {
    pub(crate) fn new(whose: String, silence_max: Duration) -> Mailbox<O, R> {
        let state = State {
            heard: None,
            // What is said of an order of an earlier control is not taken for an answer to one of this.
            next_id: u64::try_from(pg::clock::now().0.as_nanos()).unwrap_or(1),
            fetches: 0,
            orders: VecDeque::new(),
            under_way: BTreeMap::new(),
        };
        let (stirred, turn) = (watch::Sender::new(0), tokio::sync::Mutex::default());
        let (opened, state) = (Instant::now(), Mutex::new(state));
        Mailbox { whose, silence_max, opened, state, stirred, turn }
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
            state.orders.clear();
            for (_, asked) in std::mem::take(&mut state.under_way) {
                let _ = asked.send(Err(format!("{} was started again", self.whose)));
            }
        }
    }

    /// It has said that it ends.
    pub(crate) fn forget(&self) {
        self.state().heard = None;
    }

    /// Who was heard last, however long ago.
    pub(crate) fn heard_last(&self) -> Option<Identity> {
        self.state().heard.map(|(_, who)| who)
    }

    /// Who was heard last, if that is not longer ago than `silence_max`.
    pub(crate) fn heard_within(&self, silence_max: Duration) -> Option<Identity> {
        let heard = self.state().heard.filter(|(at, _)| at.elapsed() < silence_max);
        heard.map(|(_, who)| who)
    }

    pub(crate) fn heard(&self) -> Option<Identity> {
        self.heard_within(self.silence_max)
    }

    /// Whoever is there; soon after control has begun, it may be that nobody had the time to say so.
    ///
    /// # Errors
    /// Nobody is, in words.
    pub(crate) async fn must_be_heard(&self) -> Result<Identity, String> {
        loop {
            if let Some(who) = self.heard() {
                return Ok(who);
            }
            if self.heard_last().is_some() || self.opened.elapsed() >= self.silence_max {
                return Err(format!("{} is not heard", self.whose));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Orders, for whom asks for them and has those up to `last`; waits for one so long, or until it asks again: its question
    /// may have come by a connection that is broken.
    pub(crate) async fn fetch(
        &self,
        from: Identity,
        last: u64,
        wait_max: Duration,
    ) -> Vec<Posted<O>> {
        let mut stirred = self.stirred.subscribe();
        let own = {
            let mut state = self.state();
            state.fetches += 1;
            state.fetches
        };
        self.stirred.send_modify(|count| *count += 1);
        let look = || {
            let mut state = self.state();
            // Of one that was started again meanwhile: the question is from before.
            let is_current = state.heard.is_some_and(|(_, who)| who == from);
            if !is_current || state.fetches != own {
                return Some(Vec::new());
            }
            // What an earlier control gave is not what this one did.
            let last = if last >= state.next_id { 0 } else { last };
            let wanted =
                |(order, is_fetched): &&mut (Posted<O>, bool)| !*is_fetched || order.id > last;
            let orders: Vec<Posted<O>> = state
                .orders
                .iter_mut()
                .filter(wanted)
                .map(|(order, is_fetched)| {
                    *is_fetched = true;
                    order.clone()
                })
                .collect();
            (!orders.is_empty()).then_some(orders)
        };
        let waited = timeout(wait_max, async {
            loop {
                if let Some(orders) = look() {
                    return orders;
                }
                if stirred.changed().await.is_err() {
                    return Vec::new();
                }
            }
        });
        waited.await.unwrap_or_default()
    }

    pub(crate) fn finished(&self, from: Identity, id: u64, result: Result<R, String>) {
        let mut state = self.state();
        let is_current = state.heard.is_some_and(|(_, who)| who == from);
        if is_current && let Some(asked) = state.under_way.remove(&id) {
            // Whoever has asked may wait no longer.
            let _ = asked.send(result);
        }
    }

    /// Gives an order, and waits for what becomes of it.
    pub(crate) async fn ask(&self, limit: Duration, what: impl FnOnce() -> O) -> Result<R, String> {
        let whose = &self.whose;
        let busy = |_| format!("{whose} is busy for longer than {limit:?}");
        let _turn = timeout(limit, self.turn.lock()).await.map_err(busy)?;
        self.must_be_heard().await?;
        let (tx, rx) = oneshot::channel();
        let what = what();
        let id = {
            let mut state = self.state();
            if state.orders.len() >= ORDERS_MAX {
                return Err(format!("{whose} fetches no orders"));
            }
            let id = state.next_id;
            state.next_id += 1;
            state.orders.push_back((Posted { id, wait_max: limit, what }, false));
            state.under_way.insert(id, tx);
            id
        };
        self.stirred.send_modify(|count| *count += 1);
        // Also if whoever asks is gone before there is an answer.
        let _given_up = GivenUp { mailbox: self, id };
        let silent = async {
            // A long order is waited for only while whoever has it is there.
            while self.heard().is_some() {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            answer = timeout(limit, rx) => match answer {
                Ok(Ok(result)) => result,
                Ok(Err(_)) => Err(format!("{whose} was lost")),
                Err(_) => Err(format!("{whose} is not done within {limit:?}")),
            },
            () = silent => Err(format!("{whose} is not heard any more")),
        }
    }
}

/// Nobody waits for an order any more.
struct GivenUp<'a, O: Clone, R> {
    mailbox: &'a Mailbox<O, R>,
    id: u64,
}

impl<O: Clone, R> Drop for GivenUp<'_, O, R> {
    fn drop(&mut self) {
        let mut state = self.mailbox.state();
        state.under_way.remove(&self.id);
        state.orders.retain(|(order, _)| order.id != self.id);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    const LONG: Duration = Duration::from_secs(5);
    const WHO: Identity = (1, 2);

    #[tokio::test]
    async fn an_order_is_not_lost_to_a_broken_connection() {
        let mailbox = Arc::new(Mailbox::<&str, u8>::new("the agent of `a`".into(), LONG));
        mailbox.hear(WHO);
        let broken = tokio::spawn({
            let mailbox = mailbox.clone();
            async move { mailbox.fetch(WHO, 0, LONG).await }
        });
        tokio::task::yield_now().await;
        let asked = tokio::spawn({
            let mailbox = mailbox.clone();
            async move {
                // Whoever asks again ends the question before.
                assert!(broken.await.unwrap().is_empty());
                mailbox.ask(LONG, || "isolate").await
            }
        });
        let orders = mailbox.fetch(WHO, 0, LONG).await;
        let [order] = orders.as_slice() else { panic!("{orders:?}") };
        assert_eq!(order.what, "isolate");
        // The answer has not arrived, so it is given again; once it has, it is not.
        assert_eq!(mailbox.fetch(WHO, 0, LONG).await.len(), 1);
        assert!(mailbox.fetch(WHO, order.id, Duration::from_millis(10)).await.is_empty());
        mailbox.finished((1, 3), order.id, Ok(0));
        mailbox.finished(WHO, order.id, Ok(7));
        assert_eq!(asked.await.unwrap(), Ok(7));
        assert!(mailbox.fetch(WHO, 0, Duration::from_millis(10)).await.is_empty());
    }

    #[tokio::test]
    async fn nobody_is_asked_who_is_silent_or_was_started_again() {
        let mailbox = Arc::new(Mailbox::<&str, u8>::new("proxy `p2`".into(), LONG));
        assert_eq!(mailbox.ask(LONG, || "hold").await, Err("proxy `p2` is not heard".into()));
        mailbox.hear(WHO);
        let asked = tokio::spawn({
            let mailbox = mailbox.clone();
            async move { mailbox.ask(LONG, || "hold").await }
        });
        assert_eq!(mailbox.fetch(WHO, 0, LONG).await.len(), 1);
        mailbox.hear((1, 3));
        assert_eq!(asked.await.unwrap(), Err("proxy `p2` was started again".into()));
        assert!(mailbox.fetch(WHO, 0, LONG).await.is_empty());
    }
}
