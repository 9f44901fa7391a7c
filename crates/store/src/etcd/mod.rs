//! The store of several control nodes: etcd 3.4 or later, by the JSON gateway that every member has.
//!
//! One transaction of etcd compares and writes. Its locks and leases are not used: whoever writes says what must be so, and a
//! pause between two requests changes nothing (what Jepsen found of etcd 3.4.3).
//!
//! A transaction whose answer is lost may have been carried out, or may be yet. So each writes a mark of its own, under a key
//! that belongs to one node, and compares that this mark is still the one before. Whoever wants to know what became of it
//! writes the next mark: if that succeeds, the transaction never happens; if it does not, the mark that is there says whose
//! it is.

mod gateway;
mod wire;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::{Revision, Store, StoreError, Txn, Versioned, check_sizes};
use gateway::{Failure, Gateway};
use wire::{Compare, KeyValue, Operation, RangeAnswer, TxnAnswer, TxnQuestion};

/// Between two tries.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Keys that are asked for at once.
const PAGE: usize = 500;

/// Where etcd is, and by what it knows us.
#[derive(Debug, Clone)]
pub struct EtcdConfig {
    /// `http://` or `https://`, host and port of each member.
    pub endpoints: Vec<String>,
    /// Begins every key.
    pub prefix: String,
    /// The name of this node, which no other has.
    pub node: String,
    pub tls: Option<EtcdTls>,
    pub login: Option<EtcdLogin>,
    /// How long one member may take to answer.
    pub attempt_max: Duration,
    /// How long a question is asked again and again.
    pub total_max: Duration,
}

/// Files in PEM.
#[derive(Debug, Clone)]
pub struct EtcdTls {
    pub ca: PathBuf,
    /// What we show, and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

#[derive(Clone)]
pub struct EtcdLogin {
    pub user: String,
    pub password: String,
}

impl std::fmt::Debug for EtcdLogin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdLogin").field("user", &self.user).finish_non_exhaustive()
    }
}

#[derive(Debug)]
pub struct EtcdStore {
    gateway: Gateway,
    prefix: String,
    node: String,
    total_max: Duration,
    marks: Mutex<Marks>,
}

/// What the key of our marks holds.
#[derive(Debug)]
struct Marks {
    /// Begins ours: another number each time the store is opened.
    run: u64,
    next: u64,
    /// The transaction that wrote the last one.
    last: Option<Revision>,
    /// One whose transaction nobody knows the end of.
    pending: Option<String>,
}

/// What became of a mark.
enum Outcome {
    Written(Revision),
    Never,
}

impl EtcdStore {
    /// Opens the store and makes its marks ours: what an earlier process of this node has under way does not happen any more.
    /// `run` is another number each time.
    ///
    /// # Errors
    /// A file of `config` cannot be used, or etcd does not answer.
    pub fn open(config: EtcdConfig, run: u64) -> Result<EtcdStore, StoreError> {
        let gateway = Gateway::new(&config)?;
        let EtcdConfig { prefix, node, total_max, .. } = config;
        let marks = Marks { run, next: 1, last: None, pending: None };
        let store = EtcdStore { gateway, prefix, node, total_max, marks: Mutex::new(marks) };
        let mut marks = store.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = store.deadline();
        let found = store.until(deadline, || store.find(&store.mark_key()))?;
        marks.last = found.map(|found| found.revision);
        store.settle(&mut marks, deadline)?;
        drop(marks);
        Ok(store)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.total_max
    }

    fn full(&self, key: &str) -> Vec<u8> {
        format!("{}{key}", self.prefix).into_bytes()
    }

    fn mark_key(&self) -> String {
        format!("node/{}", self.node)
    }

    /// Tries what may be done twice.
    fn until<T>(
        &self,
        deadline: Instant,
        mut act: impl FnMut() -> Result<T, Failure>,
    ) -> Result<T, StoreError> {
        loop {
            match act() {
                Ok(done) => return Ok(done),
                Err(Failure::Refused(why)) => return Err(StoreError::Refused(why)),
                Err(Failure::Replaced(why)) => return Err(StoreError::Replaced(why)),
                Err(Failure::NotSent(why) | Failure::Unknown(why)) => {
                    if Instant::now() >= deadline {
                        return Err(StoreError::Unreachable(why));
                    }
                    std::thread::sleep(RETRY_PAUSE);
                }
            }
        }
    }

    fn find(&self, key: &str) -> Result<Option<Versioned>, Failure> {
        let question =
            wire::RangeQuestion { key: self.full(key), ..wire::RangeQuestion::default() };
        let answer: RangeAnswer = self.gateway.ask("kv/range", &question)?;
        Ok(answer.kvs.into_iter().next().map(versioned))
    }

    /// Writes the next mark beside `writes`, if `conditions` hold and the mark is as it was.
    fn send(
        &self,
        last: Option<Revision>,
        mark: &str,
        conditions: &[(String, Option<Revision>)],
        writes: &[(String, Option<Vec<u8>>)],
    ) -> Result<TxnAnswer, Failure> {
        let own = self.mark_key();
        let compare = |key: &str, seen: Option<Revision>| Compare::revision(self.full(key), seen);
        let mut question = TxnQuestion {
            compare: vec![compare(&own, last)],
            success: vec![Operation::put(self.full(&own), mark.as_bytes().to_vec())],
            failure: vec![Operation::get(self.full(&own))],
        };
        for (key, seen) in conditions {
            question.compare.push(compare(key, *seen));
            question.failure.push(Operation::get(self.full(key)));
        }
        // etcd refuses two writes of one key; the last one counts.
        let writes: BTreeMap<&String, &Option<Vec<u8>>> =
            writes.iter().map(|(key, value)| (key, value)).collect();
        for (key, value) in writes {
            question.success.push(match value {
                Some(value) => Operation::put(self.full(key), value.clone()),
                None => Operation::delete(self.full(key)),
            });
        }
        self.gateway.ask("kv/txn", &question)
    }

    /// Sees to it that no transaction of this node is under way. Gives what became of the one that was.
    fn settle(&self, marks: &mut Marks, deadline: Instant) -> Result<Outcome, StoreError> {
        let own = format!("{}-", marks.run);
        let outcome = loop {
            let mark = marks.mark();
            let answer = self.until(deadline, || self.send(marks.last, &mark, &[], &[]))?;
            if answer.succeeded {
                marks.last = Some(answer.revision());
                break Outcome::Never;
            }
            let found = answer.found(0).map(versioned);
            marks.last = found.as_ref().map(|found| found.revision);
            let value = found.as_ref().map(|found| String::from_utf8_lossy(&found.value));
            let is_pending = value.is_some() && value.as_deref() == marks.pending.as_deref();
            match found {
                Some(found) if is_pending => break Outcome::Written(found.revision),
                // One of those with which this was tried: its answer was lost.
                Some(_) if value.is_some_and(|value| value.starts_with(&own)) => {
                    break Outcome::Never;
                }
                _ if marks.pending.is_none() => (),
                _ => return Err(self.taken()),
            }
        };
        marks.pending = None;
        Ok(outcome)
    }

    fn taken(&self) -> StoreError {
        StoreError::Taken(self.node.clone())
    }

    fn commit_marked(&self, marks: &mut Marks, txn: &Txn) -> Result<Revision, StoreError> {
        let deadline = self.deadline();
        if marks.pending.is_some() {
            // Whoever asked for it has been told that nobody knows.
            self.settle(marks, deadline)?;
        }
        loop {
            let mark = marks.mark();
            let why = match self.send(marks.last, &mark, &txn.conditions, &txn.writes) {
                Ok(answer) if answer.succeeded => {
                    marks.last = Some(answer.revision());
                    return Ok(answer.revision());
                }
                Ok(answer) => return Err(self.refused(marks, txn, &answer)),
                Err(Failure::Refused(why)) => return Err(StoreError::Refused(why)),
                Err(Failure::NotSent(why) | Failure::Replaced(why)) => why,
                Err(Failure::Unknown(why)) => {
                    marks.pending = Some(mark);
                    match self.settle(marks, deadline) {
                        Ok(Outcome::Written(revision)) => return Ok(revision),
                        Ok(Outcome::Never) => why,
                        Err(error) => return Err(StoreError::Unknown(format!("{why}; {error}"))),
                    }
                }
            };
            if Instant::now() >= deadline {
                return Err(StoreError::Unreachable(why));
            }
            std::thread::sleep(RETRY_PAUSE);
        }
    }

    /// Why a transaction was not carried out.
    fn refused(&self, marks: &Marks, txn: &Txn, answer: &TxnAnswer) -> StoreError {
        let found = |at: usize| answer.found(at).map(|found| Revision(found.mod_revision));
        let changed = (txn.conditions.iter().zip(1..))
            .map(|((key, expected), at)| (key, *expected, found(at)))
            .find(|(_, expected, found)| expected != found);
        match changed {
            _ if found(0) != marks.last => self.taken(),
            Some((key, expected, found)) => {
                StoreError::Conflict { key: key.clone(), expected, found }
            }
            None => StoreError::Refused("etcd refuses what it has found to be so".into()),
        }
    }
}

impl Marks {
    fn mark(&mut self) -> String {
        let mark = format!("{}-{}", self.run, self.next);
        self.next += 1;
        mark
    }
}

fn versioned(found: KeyValue) -> Versioned {
    Versioned { revision: Revision(found.mod_revision), value: found.value }
}

/// Whoever asks waits; on a runtime of several threads, others go on meanwhile.
fn blocking<T>(act: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(act),
        _ => act(),
    }
}

impl Store for EtcdStore {
    fn get(&self, key: &str) -> Result<Option<Versioned>, StoreError> {
        blocking(|| self.until(self.deadline(), || self.find(key)))
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, Versioned)>, StoreError> {
        blocking(|| {
            let deadline = self.deadline();
            let begin = self.full(prefix);
            let mut question = wire::RangeQuestion {
                range_end: wire::end_of(&begin),
                key: begin,
                limit: PAGE,
                revision: 0,
            };
            let mut all = Vec::new();
            loop {
                let answer: RangeAnswer =
                    self.until(deadline, || self.gateway.ask("kv/range", &question))?;
                // The pages are of one moment.
                question.revision = answer.header.revision;
                let last = answer.kvs.last().map(|found| found.key.clone());
                for found in answer.kvs {
                    let key = found.key.get(self.prefix.len()..).unwrap_or_default();
                    let key = String::from_utf8(key.to_vec()).map_err(|_| {
                        StoreError::Refused("a key in etcd is no text; who wrote it?".into())
                    })?;
                    all.push((key, versioned(found)));
                }
                match last.filter(|_| answer.more) {
                    Some(mut last) => {
                        last.push(0);
                        question.key = last;
                    }
                    None => break,
                }
            }
            // Those that are no record of anybody's.
            all.retain(|(key, _)| !key.starts_with("node/"));
            Ok(all)
        })
    }

    fn commit(&self, txn: &Txn) -> Result<Revision, StoreError> {
        check_sizes(txn)?;
        blocking(|| {
            let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
            self.commit_marked(&mut marks, txn)
        })
    }
}
