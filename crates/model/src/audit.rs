//! What was done, by whom and why: records that are only ever added, each with the digest of the one before it, so that
//! nobody changes or removes one unseen.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

pub const HEAD_KEY: &str = "audit-head";

/// Records sort by their number.
pub fn record_key(number: u64) -> String {
    format!("{}{number:020}", record_prefix())
}

pub fn record_prefix() -> &'static str {
    "audit/"
}

/// Longest reason and longest name of somebody.
pub const TEXT_LEN_MAX: usize = 1_000;

/// Whoever asks for a change, why, and on what condition.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asking {
    /// The name of the token; `holdfast` if nobody has asked.
    pub by: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whoever asks again with the same key is told what became of it, and nothing is done twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Only in this epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub if_epoch: Option<u64>,
    /// Safety rules that it is done in spite of.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub overrides: BTreeSet<String>,
}

impl Asking {
    /// Of nobody: Holdfast does it by itself, for this reason.
    pub fn own(reason: &str) -> Asking {
        let (by, reason) = ("holdfast".to_owned(), Some(reason.to_owned()));
        Asking { by, reason, ..Asking::default() }
    }
}

/// A change that is to be recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    pub by: String,
    pub did: &'static str,
    pub app: String,
    /// After it.
    pub epoch: u64,
    pub reason: Option<String>,
    /// In words.
    pub text: String,
}

/// What was recorded last.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    pub number: u64,
    /// Of that record; empty before the first.
    pub digest: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub number: u64,
    /// Milliseconds since 1970, for people.
    pub at_ms: u64,
    pub by: String,
    pub did: String,
    pub app: String,
    pub epoch: u64,
    pub reason: Option<String>,
    pub text: String,
    /// SHA-256 of the bytes of the record before it, in hexadecimal digits.
    pub previous: String,
}

impl Draft {
    /// The record that follows `head`.
    pub fn after(self, head: &Head, at_ms: u64) -> Record {
        let Draft { by, did, app, epoch, reason, text } = self;
        let (number, previous) = (head.number.saturating_add(1), head.digest.clone());
        Record { number, at_ms, by, did: did.into(), app, epoch, reason, text, previous }
    }
}

/// Where a chain is broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    pub number: u64,
    pub what: &'static str,
}

/// Looks whether `records`, each with the digest of its bytes, are all that were ever added, in their order, up to `head`.
///
/// # Errors
/// Where they are not.
pub fn verify<'a>(
    records: impl IntoIterator<Item = (&'a Record, String)>,
    head: &Head,
) -> Result<(), Broken> {
    let mut last = Head::default();
    for (record, digest) in records {
        if record.number != last.number + 1 {
            return Err(Broken { number: last.number + 1, what: "is missing" });
        }
        if record.previous != last.digest {
            return Err(Broken { number: last.number, what: "was changed" });
        }
        last = Head { number: record.number, digest };
    }
    match last {
        last if last == *head => Ok(()),
        last if last.number < head.number => {
            Err(Broken { number: last.number + 1, what: "is missing" })
        }
        last => Err(Broken { number: last.number, what: "was changed" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(record: &Record) -> String {
        // Any function of all of it will do here.
        format!("{record:?}")
    }

    fn chain(count: u64) -> (Vec<Record>, Head) {
        let (mut records, mut head) = (Vec::new(), Head::default());
        for n in 0..count {
            let (by, app, text) = ("alice".to_owned(), "shop".to_owned(), format!("n {n}"));
            let draft = Draft { by, did: "switchover", app, epoch: n, reason: None, text };
            let record = draft.after(&head, n);
            head = Head { number: record.number, digest: digest(&record) };
            records.push(record);
        }
        (records, head)
    }

    fn check(records: &[Record], head: &Head) -> Result<(), Broken> {
        verify(records.iter().map(|record| (record, digest(record))), head)
    }

    #[test]
    fn whatever_is_changed_or_removed_is_found() {
        let (records, head) = chain(5);
        assert_eq!(check(&records, &head), Ok(()));
        assert_eq!(check(&[], &Head::default()), Ok(()));
        for at in 0..5 {
            let mut changed = records.clone();
            changed[at].by = "mallory".into();
            let number = u64::try_from(at).unwrap() + 1;
            assert_eq!(check(&changed, &head), Err(Broken { number, what: "was changed" }));
            let mut removed = records.clone();
            removed.remove(at);
            assert_eq!(check(&removed, &head), Err(Broken { number, what: "is missing" }));
        }
        // Also if the end was taken off, and its head was left.
        assert!(check(&records[..3], &head).is_err());
        assert!(check(&records, &chain(4).1).is_err());
    }
}
