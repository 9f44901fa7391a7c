//! The seat: what makes one of several nodes control, and ends what it does when it has it no more. `model::seat` says when
//! it may be taken and for how long it is counted on.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::lease::{Moment, Terms};
use model::seat::{BEAT_KEY, Beat, Candidate, SEAT_KEY, Seat, Sight, Sitting, Tenure};
use pg::clock;
use store::{Revision, Store, StoreError, Txn, Versioned};
use tokio::sync::watch;
use tokio::time::sleep;

use crate::control::now_ms;
use crate::records::{RecordError, decode, encode};

/// Between two looks of a node that is not control, for each length of the seat.
const LOOKS: u32 = 8;

/// The store as whoever has the seat reads and writes it: each transaction compares the seat.
pub struct Seated {
    store: Arc<dyn Store>,
    /// The transaction that has taken it.
    revision: Revision,
    tenure: Tenure,
    /// None: nobody else can take it.
    sitting: Option<Mutex<Sitting>>,
    count: Mutex<u64>,
    /// Why it is lost, once it is.
    lost: watch::Sender<Option<String>>,
}

/// Who has the seat, and its beat, of one moment or not: whoever takes it compares both.
fn read(store: &dyn Store) -> Result<Option<Read>, RecordError> {
    let Some(seat) = store.get(SEAT_KEY)? else { return Ok(None) };
    let beat = store.get(BEAT_KEY)?;
    let record = decode::<Seat>(SEAT_KEY, &seat.value)?;
    let says = beat.as_ref().map(|beat| decode::<Beat>(BEAT_KEY, &beat.value)).transpose()?;
    Ok(Some(Read {
        revisions: (seat.revision, beat.as_ref().map(|beat| beat.revision)),
        sight: Sight {
            revision: beat.map_or(seat.revision.0, |beat| beat.revision.0),
            length: record.length,
            is_over: says.is_some_and(|says| says.is_over),
        },
        seat: record,
    }))
}

struct Read {
    seat: Seat,
    sight: Sight,
    revisions: (Revision, Option<Revision>),
}

fn take_it(
    store: &dyn Store,
    node: &str,
    length: Duration,
    before: Option<&Read>,
) -> Result<(Tenure, Revision), RecordError> {
    let tenure = before.map_or(Tenure(0), |before| before.seat.tenure).next(now_ms());
    let seat = Seat { tenure, node: node.into(), length };
    let beat = Beat { count: 0, is_over: false };
    let (seen, beaten) =
        before.map_or((None, None), |before| (Some(before.revisions.0), before.revisions.1));
    let txn = Txn::default()
        .expect(SEAT_KEY, seen)
        .expect(BEAT_KEY, beaten)
        .put(SEAT_KEY, encode(SEAT_KEY, &seat)?)
        .put(BEAT_KEY, encode(BEAT_KEY, &beat)?);
    Ok((tenure, store.commit(&txn)?))
}

impl Seated {
    /// Of a store that one process has for itself.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub fn alone(store: Arc<dyn Store>) -> Result<Arc<Seated>, RecordError> {
        let before = read(&*store)?;
        let (tenure, revision) = take_it(&*store, "", Duration::ZERO, before.as_ref())?;
        let (sitting, count, lost) = (None, Mutex::new(0), watch::Sender::new(None));
        Ok(Arc::new(Seated { store, revision, tenure, sitting, count, lost }))
    }

    /// Waits until the seat is free, and takes it.
    ///
    /// # Errors
    /// Another process goes by the name of this node, or the store is not the one that was opened.
    pub async fn take(
        store: Arc<dyn Store>,
        node: &str,
        terms: Terms,
    ) -> Result<Arc<Seated>, StoreError> {
        let mut candidate = Candidate::default();
        let mut said: Option<String> = None;
        loop {
            let looked = Seated::look(&store, node, terms, &mut candidate);
            let (found, pause) = match looked {
                Ok(Ok(seated)) => return Ok(seated),
                Err(RecordError::Store(
                    gone @ (StoreError::Taken(_) | StoreError::Replaced(_)),
                )) => return Err(gone),
                Ok(Err(before)) => {
                    (format!("node `{}` is control", before.seat.node), before.sight.length)
                }
                Err(error) => {
                    (format!("the store cannot be used: {}", model::chain(&error)), terms.length)
                }
            };
            if said.as_ref() != Some(&found) {
                tracing::info!(node, "{found}");
                said = Some(found);
            }
            sleep(pause.min(terms.length) / LOOKS).await;
        }
    }

    /// Looks once, and takes the seat if that may be; otherwise gives what was found.
    fn look(
        store: &Arc<dyn Store>,
        node: &str,
        terms: Terms,
        candidate: &mut Candidate,
    ) -> Result<Result<Arc<Seated>, Read>, RecordError> {
        let before = read(&**store)?;
        let may = candidate.sees(before.as_ref().map(|before| before.sight), clock::now());
        match before {
            Some(before) if !may => Ok(Err(before)),
            before => {
                let sent = clock::now();
                let (tenure, revision) = take_it(&**store, node, terms.length, before.as_ref())?;
                let sitting = Some(Mutex::new(Sitting::new(tenure, terms, sent)));
                let (count, lost) = (Mutex::new(0), watch::Sender::new(None));
                let store = store.clone();
                Ok(Ok(Arc::new(Seated { store, revision, tenure, sitting, count, lost })))
            }
        }
    }

    pub fn tenure(&self) -> Tenure {
        self.tenure
    }

    fn sitting(&self) -> Option<MutexGuard<'_, Sitting>> {
        let sitting = self.sitting.as_ref()?;
        Some(sitting.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Nobody else has the seat at this moment.
    pub fn is_valid(&self) -> bool {
        self.lost.borrow().is_none()
            && self.sitting().is_none_or(|sitting| sitting.is_valid(clock::now()))
    }

    fn lose(&self, why: &str) {
        self.lost.send_if_modified(|lost| {
            let is_first = lost.is_none();
            lost.get_or_insert_with(|| why.to_owned());
            is_first
        });
    }

    fn beat(&self, is_over: bool) -> Result<(), RecordError> {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count += 1;
        let beat = Beat { count: *count, is_over };
        self.commit(&Txn::default().put(BEAT_KEY, encode(BEAT_KEY, &beat)?))?;
        Ok(())
    }

    /// Writes the beat again and again. Gives why the seat is lost, once it is.
    pub async fn hold(self: &Arc<Self>) -> String {
        let (Some(until), mut lost) = (self.until(), self.lost.subscribe()) else {
            return std::future::pending().await;
        };
        let mut until = until;
        let beats = tokio::spawn(self.clone().beat_on());
        let why = loop {
            if let Some(why) = lost.borrow_and_update().clone() {
                break why;
            }
            let left = until.from(clock::now());
            if left.is_zero() {
                break "its beat was not written in time".to_owned();
            }
            tokio::select! {
                () = sleep(left) => until = self.until().unwrap_or(until),
                // Its sender is ours.
                _ = lost.changed() => (),
            }
        };
        beats.abort();
        self.lose(&why);
        why
    }

    fn until(&self) -> Option<Moment> {
        self.sitting().map(|sitting| sitting.until())
    }

    async fn beat_on(self: Arc<Self>) {
        let every = self.sitting().map_or(Duration::ZERO, |sitting| sitting.beats_every());
        loop {
            sleep(every).await;
            let (own, sent) = (self.clone(), clock::now());
            // A store that does not answer keeps nobody from seeing that the seat is over.
            match tokio::task::spawn_blocking(move || own.beat(false)).await {
                Ok(Ok(())) => {
                    if let Some(mut sitting) = self.sitting() {
                        sitting.has_beaten(sent);
                    }
                }
                Ok(Err(error)) => {
                    tracing::warn!(error = model::chain(&error), "the seat's beat is not written");
                }
                Err(_) => return,
            }
        }
    }

    /// Leaves the seat, so that nobody waits for its end. Nothing of it may be going on any more.
    pub fn leave(&self) {
        if let Err(error) = self.beat(true) {
            tracing::warn!(
                error = model::chain(&error),
                "the seat is not left, others wait for its end"
            );
        }
        self.lose("it was left");
    }
}

impl Store for Seated {
    fn get(&self, key: &str) -> Result<Option<Versioned>, StoreError> {
        self.store.get(key)
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, Versioned)>, StoreError> {
        self.store.list(prefix)
    }

    fn commit(&self, txn: &Txn) -> Result<Revision, StoreError> {
        let done = self.store.commit(&txn.clone().expect(SEAT_KEY, Some(self.revision)));
        match &done {
            Err(StoreError::Conflict { key, .. }) if key == SEAT_KEY => {
                self.lose("another node has taken it");
            }
            // What it has begun is gone on with as after a crash.
            Err(
                error
                @ (StoreError::Unreachable(_) | StoreError::Unknown(_) | StoreError::Taken(_)),
            ) => self.lose(&format!("the store could not be written: {error}")),
            _ => (),
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use store::memory::MemoryStore;

    use super::*;

    const TERMS: Terms = Terms { length: Duration::from_secs(2) };

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_seat_is_taken_when_its_holder_is_silent() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let first = Seated::take(store.clone(), "a", TERMS).await.unwrap();
        assert!(first.is_valid());
        first.commit(&Txn::default().put("k", vec![1])).unwrap();
        // It writes, and does not beat: which is what counts.
        let second = Seated::take(store.clone(), "b", TERMS).await.unwrap();
        assert!(!first.is_valid() && second.is_valid());
        assert!(second.tenure() > first.tenure());
        let late = first.commit(&Txn::default().put("k", vec![2]));
        assert!(matches!(late, Err(StoreError::Conflict { .. })));
        assert_eq!(first.hold().await, "another node has taken it");
        second.leave();
        assert!(!second.is_valid());
        let third = Seated::take(store.clone(), "a", TERMS).await.unwrap();
        assert!(third.is_valid());
        let held = third.clone();
        let holds = tokio::spawn(async move { held.hold().await });
        // Longer than anybody would wait.
        let fourth =
            tokio::time::timeout(TERMS.length * 2, Seated::take(store.clone(), "b", TERMS));
        assert!(fourth.await.is_err() && third.is_valid());
        holds.abort();
    }

    #[test]
    fn who_is_alone_has_a_higher_tenure_each_time() {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::default());
        let first = Seated::alone(store.clone()).unwrap();
        let second = Seated::alone(store).unwrap();
        assert!(second.tenure() > first.tenure() && second.is_valid());
        assert!(first.commit(&Txn::default().put("k", vec![2])).is_err());
    }
}
