//! A store that forgets: for tests and simulation.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use crate::{Revision, Store, StoreError, Txn, Versioned, check_sizes};

#[derive(Debug, Default)]
pub struct MemoryStore(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    revision: u64,
    keys: BTreeMap<String, Versioned>,
}

impl Store for MemoryStore {
    fn get(&self, key: &str) -> Result<Option<Versioned>, StoreError> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(state.keys.get(key).cloned())
    }

    fn list(&self, prefix: &str) -> Result<Vec<(String, Versioned)>, StoreError> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let from = state.keys.range(prefix.to_owned()..);
        Ok(from
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect())
    }

    fn commit(&self, txn: &Txn) -> Result<Revision, StoreError> {
        check_sizes(txn)?;
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (key, expected) in &txn.conditions {
            let found = state.keys.get(key).map(|value| value.revision);
            if found != *expected {
                return Err(StoreError::Conflict { key: key.clone(), expected: *expected, found });
            }
        }
        state.revision += 1;
        let revision = Revision(state.revision);
        for (key, value) in &txn.writes {
            match value {
                Some(value) => {
                    state.keys.insert(key.clone(), Versioned { value: value.clone(), revision });
                }
                None => drop(state.keys.remove(key)),
            }
        }
        Ok(revision)
    }
}
