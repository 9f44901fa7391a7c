//! Durable keys behind one small trait: read, list, and a transaction that compares before it writes.
//!
//! - [`memory`]: for tests and simulation.
//! - [`embedded`]: one directory, no service; the default.
//! - [`etcd`]: for several control nodes.
//!
//! All pass one suite, `tests/it`.

#![forbid(unsafe_code)]

use thiserror::Error;

pub mod embedded;
pub mod etcd;
pub mod memory;

/// Largest value of a key.
pub const VALUE_LEN_MAX: usize = 4 * 1024 * 1024;

/// A number that grows with every transaction of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(pub u64);

/// A value, and the transaction that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned {
    pub value: Vec<u8>,
    pub revision: Revision,
}

/// Writes that happen all together, and only if every key is still as it was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    conditions: Vec<(String, Option<Revision>)>,
    writes: Vec<(String, Option<Vec<u8>>)>,
}

impl Txn {
    /// `key` must have been written last by `seen`, or not exist.
    pub fn expect(mut self, key: impl Into<String>, seen: Option<Revision>) -> Txn {
        self.conditions.push((key.into(), seen));
        self
    }

    pub fn put(mut self, key: impl Into<String>, value: Vec<u8>) -> Txn {
        self.writes.push((key.into(), Some(value)));
        self
    }

    pub fn delete(mut self, key: impl Into<String>) -> Txn {
        self.writes.push((key.into(), None));
        self
    }
}

#[derive(Debug, Error)]
pub enum StoreError {
    #[error("`{key}` was changed by somebody else: revision {found:?} where {expected:?} was seen")]
    Conflict { key: String, expected: Option<Revision>, found: Option<Revision> },
    #[error("value of `{key}` is {len} bytes, at most {VALUE_LEN_MAX} are kept")]
    TooLarge { key: String, len: usize },
    #[error("store `{path}` is in use by another process")]
    InUse { path: std::path::PathBuf },
    #[error("store `{path}` cannot be {what}")]
    File { path: std::path::PathBuf, what: &'static str, source: std::io::Error },
    #[error("store `{path}` is damaged: {problem}")]
    Damaged { path: std::path::PathBuf, problem: String },
    #[error("the store does not answer: {0}")]
    Unreachable(String),
    #[error("nobody knows whether the store was written: {0}")]
    Unknown(String),
    #[error("the store is another than it was: {0}")]
    Replaced(String),
    #[error("another process goes by the name of node `{0}`")]
    Taken(String),
    #[error("the store refuses: {0}")]
    Refused(String),
    #[error("store cannot be used")]
    Sqlite(#[from] rusqlite::Error),
}

/// Durable keys. When [`Store::commit`] returns, the writes survive a crash of the machine.
pub trait Store: Send + Sync {
    /// # Errors
    /// The store cannot be read. That says nothing about the key.
    fn get(&self, key: &str) -> Result<Option<Versioned>, StoreError>;

    /// Keys that begin with `prefix`, in order.
    ///
    /// # Errors
    /// The store cannot be read.
    fn list(&self, prefix: &str) -> Result<Vec<(String, Versioned)>, StoreError>;

    /// # Errors
    /// A condition does not hold, and then nothing was written; or the store cannot be written. Only [`StoreError::Unknown`]
    /// leaves open whether it was.
    fn commit(&self, txn: &Txn) -> Result<Revision, StoreError>;
}

fn check_sizes(txn: &Txn) -> Result<(), StoreError> {
    for (key, value) in &txn.writes {
        let len = value.as_ref().map_or(0, Vec::len);
        if len > VALUE_LEN_MAX {
            return Err(StoreError::TooLarge { key: key.clone(), len });
        }
    }
    Ok(())
}
