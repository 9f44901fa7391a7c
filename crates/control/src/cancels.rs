//! Cancel requests that have come to another proxy than that of their session. They are told to all others, once; like any
//! cancel request one may be lost, and comes too late for what has ended.

use std::time::{Duration, Instant};

use model::lease::Terms;
use model::proxies::{CANCEL_MAX, CANCELS_MAX, Cancel, FetchCancels, FetchedCancels, Stray};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{Mutex, broadcast, mpsc};
use tokio::time::timeout;

use crate::control::Control;
use crate::requests::ControlError;

/// A cancel request, who has it from its client, and since when.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    /// The name of a proxy; empty for that of this process.
    by: String,
    cancel: Cancel,
    at: Instant,
}

pub(crate) fn channel() -> broadcast::Sender<Told> {
    broadcast::Sender::new(CANCELS_MAX)
}

/// What of it a proxy has still to hear.
#[derive(Debug)]
pub(crate) struct Hearing(Mutex<broadcast::Receiver<Told>>);

impl Hearing {
    pub(crate) fn of(told: &broadcast::Sender<Told>) -> Hearing {
        Hearing(Mutex::new(told.subscribe()))
    }

    /// Waits so long for one. Who has missed some as there were too many goes on with those that are left.
    async fn hear(&self, name: &str, wait_max: Duration) -> Vec<Cancel> {
        let mut all = Vec::new();
        let wait = async {
            let mut receiver = self.0.lock().await;
            let is_meant = |told: &Told| told.by != name && told.at.elapsed() < CANCEL_MAX;
            while all.is_empty() {
                match receiver.recv().await {
                    Ok(told) if is_meant(&told) => all.push(told.cancel),
                    Ok(_) | Err(RecvError::Lagged(_)) => (),
                    Err(RecvError::Closed) => return,
                }
            }
            while all.len() < CANCELS_MAX {
                match receiver.try_recv() {
                    Ok(told) if is_meant(&told) => all.push(told.cancel),
                    Ok(_) | Err(TryRecvError::Lagged(_)) => (),
                    Err(TryRecvError::Empty | TryRecvError::Closed) => return,
                }
            }
        };
        let _ = timeout(wait_max, wait).await;
        all
    }
}

impl Control {
    /// Tells all other proxies of a cancel request for none of the sessions of the proxy of this process.
    pub fn cancel_elsewhere(&self, cancel: Cancel) {
        self.tell_of_cancel(String::new(), cancel);
    }

    /// The same, of another proxy.
    ///
    /// # Errors
    /// There is no such proxy.
    pub fn cancel_strayed(&self, Stray { sender, cancel }: Stray) -> Result<(), ControlError> {
        let remote = self.remote(&sender)?;
        self.tell_of_cancel(remote.name().to_owned(), cancel);
        Ok(())
    }

    fn tell_of_cancel(&self, by: String, cancel: Cancel) {
        // Nobody may be there.
        let _ = self.cancels.send(Told { by, cancel, at: Instant::now() });
    }

    /// Those that others have told of, for a proxy, which waits for some a while.
    ///
    /// # Errors
    /// There is no such proxy.
    pub async fn cancels_for_proxy(
        &self,
        asked: &FetchCancels,
    ) -> Result<FetchedCancels, ControlError> {
        let remote = self.remote(&asked.sender)?;
        let wait_max = self.config.terms.map_or(Duration::ZERO, Terms::renew_every);
        Ok(FetchedCancels { cancels: remote.cancels().hear(remote.name(), wait_max).await })
    }

    /// Gives those that others tell of to the proxy of this process, until that takes no more.
    pub async fn hear_cancels(&self, proxy: mpsc::Sender<Cancel>) {
        const WAIT: Duration = Duration::from_secs(60);
        let hearing = Hearing::of(&self.cancels);
        while !proxy.is_closed() {
            for cancel in hearing.hear("", WAIT).await {
                let _ = proxy.send(cancel).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(by: &str, pid: i32, ago: Duration) -> Told {
        let cancel = Cancel { pid, secret: vec![7; 32] };
        Told { by: by.into(), cancel, at: Instant::now().checked_sub(ago).unwrap() }
    }

    #[tokio::test]
    async fn all_others_hear_of_it_once_and_not_too_late() {
        let sender = channel();
        let (here, there) = (Hearing::of(&sender), Hearing::of(&sender));
        let soon = Duration::from_millis(20);
        sender.send(told("p1", 1, Duration::ZERO)).unwrap();
        sender.send(told("p2", 2, Duration::ZERO)).unwrap();
        sender.send(told("p2", 3, CANCEL_MAX)).unwrap();
        let pids = |all: Vec<Cancel>| all.into_iter().map(|one| one.pid).collect::<Vec<_>>();
        assert_eq!(pids(here.hear("p1", soon).await), [2]);
        assert_eq!(pids(there.hear("p2", soon).await), [1]);
        assert!(here.hear("p1", soon).await.is_empty());
        // More than anybody keeps: the newest are left.
        for pid in 0..1_000 {
            sender.send(told("p2", pid, Duration::ZERO)).unwrap();
        }
        let left = pids(here.hear("p1", soon).await);
        assert_eq!((left.len(), left.last()), (CANCELS_MAX, Some(&999)));
        let shown = format!("{:?}", told("p1", 1, Duration::ZERO).cancel);
        assert_eq!(shown, "Cancel { pid: 1, .. }");
    }
}
