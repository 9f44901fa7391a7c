//! Adds to the audit in the transaction of what it records, and reads it.

use model::audit::{
    Asking, Broken, Draft, HEAD_KEY, Head, Record, record_key, record_prefix, verify,
};
use ring::digest::{SHA256, digest};
use store::{Store, Txn};

use crate::control::{Control, now_ms};
use crate::records::{RecordError, decode, encode};
use crate::requests::ControlError;

/// Records that are read at once.
pub const RECORDS_MAX: usize = 1_000;

/// SHA-256, in hexadecimal digits.
pub fn digest_of(bytes: &[u8]) -> String {
    digest(&SHA256, bytes).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The transaction, and what it records besides. Whoever calls it adds nothing else meanwhile.
pub(crate) fn noting(store: &dyn Store, txn: Txn, draft: Draft) -> Result<Txn, RecordError> {
    let found = store.get(HEAD_KEY)?;
    let head: Head = match &found {
        Some(found) => decode(HEAD_KEY, &found.value)?,
        None => Head::default(),
    };
    let record = draft.after(&head, now_ms());
    let key = record_key(record.number);
    let bytes = encode(&key, &record)?;
    let head = Head { number: record.number, digest: digest_of(&bytes) };
    Ok(txn
        .expect(HEAD_KEY, found.map(|found| found.revision))
        .expect(&key, None)
        .put(&key, bytes)
        .put(HEAD_KEY, encode(HEAD_KEY, &head)?))
}

impl Control {
    /// Records that configuration was taken up.
    ///
    /// # Errors
    /// The store cannot be written.
    pub fn note_configuration(&self, asking: Asking, text: String) -> Result<(), ControlError> {
        let Asking { by, reason, .. } = asking;
        self.note(Draft { by, did: "apply", app: String::new(), epoch: 0, reason, text })
    }

    /// Records what changes nothing in the store.
    pub(crate) fn note(&self, draft: Draft) -> Result<(), ControlError> {
        let _writing = self.write_alone();
        let txn = noting(&*self.store, Txn::default(), draft)?;
        self.store.commit(&txn).map_err(RecordError::Store)?;
        Ok(())
    }

    /// The newest records, oldest first.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn audit(&self) -> Result<Vec<Record>, ControlError> {
        let all = self.store.list(record_prefix()).map_err(RecordError::Store)?;
        let from = all.len().saturating_sub(RECORDS_MAX);
        let read = all.iter().skip(from).map(|(key, found)| decode(key, &found.value));
        Ok(read.collect::<Result<_, _>>()?)
    }

    /// Records were added since this was the head.
    fn has_grown(&self, head: &Head) -> Result<bool, ControlError> {
        let now = self.store.get(HEAD_KEY).map_err(RecordError::Store)?;
        let now: Option<Head> = now.map(|now| decode(HEAD_KEY, &now.value)).transpose()?;
        Ok(now.is_some_and(|now| now.number > head.number))
    }

    /// Looks whether all records are there and as they were. Gives how many there are.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn verify_audit(&self) -> Result<Result<u64, Broken>, ControlError> {
        // What is added after this was read is not looked at: nobody who writes waits for whoever looks.
        let head = self.store.get(HEAD_KEY).map_err(RecordError::Store)?;
        let all = self.store.list(record_prefix()).map_err(RecordError::Store)?;
        let head: Head = match head {
            Some(head) => decode(HEAD_KEY, &head.value)?,
            None => Head::default(),
        };
        let mut records = Vec::new();
        for (key, found) in &all {
            records.push((decode::<Record>(key, &found.value)?, digest_of(&found.value)));
        }
        if let Some((next, _)) =
            records.iter().enumerate().find(|(_, (one, _))| one.number > head.number)
            && self.has_grown(&head)?
        {
            records.truncate(next);
        }
        let chain = records.iter().map(|(record, digest)| (record, digest.clone()));
        Ok(verify(chain, &head).map(|()| head.number))
    }
}

#[cfg(test)]
mod tests {
    use store::memory::MemoryStore;

    use super::*;

    #[test]
    fn a_record_is_written_with_what_it_records_or_not_at_all() {
        let store = MemoryStore::default();
        let draft = || Draft {
            by: "alice".into(),
            did: "switchover",
            app: "shop".into(),
            epoch: 2,
            reason: None,
            text: "to b".into(),
        };
        let put = |key: &str| Txn::default().expect(key, None).put(key, vec![1]);
        store.commit(&noting(&store, put("a"), draft()).unwrap()).unwrap();
        assert!(store.commit(&noting(&store, put("a"), draft()).unwrap()).is_err());
        let late = noting(&store, put("b"), draft()).unwrap();
        store.commit(&noting(&store, put("c"), draft()).unwrap()).unwrap();
        assert!(store.commit(&late).is_err(), "another record came between");
        assert_eq!(store.list(record_prefix()).unwrap().len(), 2);
        let second: Record =
            serde_json::from_slice(&store.get(&record_key(2)).unwrap().unwrap().value).unwrap();
        let first = store.get(&record_key(1)).unwrap().unwrap().value;
        assert_eq!(second.previous, digest_of(&first));
    }
}
