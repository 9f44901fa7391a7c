//! The names that a client gives its prepared statements, where servers know them by other names.
//!
//! A name changes hands when its Parse or Close is answered, and not at all if the server skips it after an error.
//! Until then it is pending: what the client sends behind it already means the new statement.

use std::collections::{BTreeMap, VecDeque};

/// Statements that one client may name; one more is left to the server.
pub const NAMES_MAX: usize = 10_000;

/// A request that was sent, or that we answer ourselves, and that changes a name or a server's statements.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Pending<T> {
    /// The client prepares `name`. `sent` if the server is to prepare it as well.
    Parse {
        name: Box<[u8]>,
        statement: T,
        sent: bool,
    },
    Close {
        name: Box<[u8]>,
    },
    /// The server is to prepare a statement that the client has named before.
    Own(T),
    /// A name that is left to the server.
    Unknown,
}

/// Which statement each name stands for.
#[derive(Debug, Clone)]
pub struct Names<T> {
    known: BTreeMap<Box<[u8]>, T>,
    pending: VecDeque<Pending<T>>,
}

impl<T> Default for Names<T> {
    fn default() -> Names<T> {
        Names { known: BTreeMap::new(), pending: VecDeque::new() }
    }
}

impl<T: Clone + PartialEq> Names<T> {
    /// What a name means to the server by the time it reads what the client sends now.
    pub fn find(&self, name: &[u8]) -> Option<&T> {
        for pending in self.pending.iter().rev() {
            match pending {
                Pending::Parse { name: named, statement, .. } if **named == *name => {
                    return Some(statement);
                }
                Pending::Close { name: named } if **named == *name => return None,
                _ => (),
            }
        }
        self.known.get(name)
    }

    /// The server is on its way to have a statement.
    pub fn is_under_way(&self, statement: &T) -> bool {
        self.pending.iter().any(|pending| match pending {
            Pending::Parse { statement: one, sent, .. } => *sent && one == statement,
            Pending::Own(one) => one == statement,
            _ => false,
        })
    }

    /// What has been sent may change what names mean.
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.known.len() + self.pending.len() >= NAMES_MAX
    }

    pub fn parse(&mut self, name: &[u8], statement: T, sent: bool) {
        self.pending.push_back(Pending::Parse { name: name.into(), statement, sent });
    }

    pub fn close(&mut self, name: &[u8]) {
        self.pending.push_back(Pending::Close { name: name.into() });
    }

    /// A Parse of ours.
    pub fn own(&mut self, statement: T) {
        self.pending.push_back(Pending::Own(statement));
    }

    /// A Parse whose name is left to the server.
    pub fn unknown(&mut self) {
        self.pending.push_back(Pending::Unknown);
    }

    /// The oldest pending request was answered. Gives the statement that the server now has.
    pub fn answered(&mut self) -> Option<T> {
        match self.pending.pop_front()? {
            Pending::Parse { name, statement, sent } => {
                self.known.insert(name, statement.clone());
                sent.then_some(statement)
            }
            Pending::Close { name } => {
                self.known.remove(&name);
                None
            }
            Pending::Own(statement) => Some(statement),
            Pending::Unknown => None,
        }
    }

    /// So many of the oldest were skipped.
    pub fn skipped(&mut self, count: usize) {
        self.pending.drain(..count.min(self.pending.len()));
    }

    /// DEALLOCATE ALL.
    pub fn clear(&mut self) {
        self.known = BTreeMap::new();
    }

    pub fn remove(&mut self, name: &[u8]) {
        self.known.remove(name);
    }

    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &T)> {
        self.known.iter().map(|(name, statement)| (&**name, statement))
    }

    pub fn statements(&self) -> impl Iterator<Item = &T> {
        self.known.values()
    }

    pub fn is_empty(&self) -> bool {
        self.known.is_empty() && self.pending.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_means_what_was_sent_last() {
        let mut names = Names::default();
        names.parse(b"a", 1, true);
        assert_eq!(names.find(b"a"), Some(&1));
        names.close(b"a");
        assert_eq!(names.find(b"a"), None);
        names.parse(b"a", 2, false);
        assert_eq!(names.find(b"a"), Some(&2));
        assert!(names.is_under_way(&1) && !names.is_under_way(&2));
        assert_eq!(names.answered(), Some(1));
        assert_eq!(names.answered(), None);
        assert_eq!(names.answered(), None);
        assert_eq!(names.find(b"a"), Some(&2));
        assert!(names.answered().is_none() && names.pending.is_empty());
    }

    #[test]
    fn what_is_skipped_has_not_happened() {
        let mut names = Names::default();
        names.parse(b"a", 1, true);
        names.answered();
        names.close(b"a");
        names.parse(b"a", 2, true);
        names.own(3);
        names.skipped(3);
        assert_eq!(names.find(b"a"), Some(&1));
        assert!(!names.is_under_way(&2) && !names.is_under_way(&3));
    }
}
