//! The names that a client gives its prepared statements, where servers know them by other names.
//!
//! A name changes hands when its Parse or Close is answered, and not at all if the server skips it after an error.
//! Until then it is pending: what the client sends behind it already means the new statement.

use std::collections::{BTreeMap, VecDeque};

/// Statements that one client may name; one more is left to the server.
pub const NAMES_MAX: usize = 1_000;

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

    /// The name may be gone: nothing is known of it until it is prepared again.
    pub fn forget(&mut self, name: &[u8]) {
        self.known.remove(name);
        for pending in &mut self.pending {
            if matches!(pending, Pending::Parse { name: named, .. } if **named == *name) {
                *pending = Pending::Unknown;
            }
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

/// A message of the server in which names that begin with `prefix` are those that the client gave, where `name_of` knows
/// them. Names are looked for where messages quote them. None if there are none.
pub fn with_client_names<'a>(
    message: &'a [u8],
    prefix: &[u8],
    name_of: impl Fn(&[u8]) -> Option<&'a [u8]>,
) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let mut rest = message;
    let mut is_changed = false;
    while let Some(at) = rest.iter().position(|byte| *byte == b'"') {
        let (before, quoted) = rest.split_at_checked(at + 1)?;
        out.extend_from_slice(before);
        let len = quoted.iter().position(|byte| *byte == b'"').unwrap_or(quoted.len());
        let name = quoted.get(..len).unwrap_or_default();
        // One that nobody has, sent as such.
        let unknown = name.strip_prefix(b"_").filter(|rest| rest.starts_with(prefix));
        let known = if name.starts_with(prefix) { name_of(name) } else { unknown };
        rest = quoted;
        if let Some(known) = known {
            is_changed = true;
            out.extend_from_slice(known);
            // Its closing quote opens nothing.
            let closed = (len + 1).min(quoted.len());
            out.extend_from_slice(quoted.get(len..closed)?);
            rest = quoted.get(closed..)?;
        }
    }
    out.extend_from_slice(rest);
    is_changed.then_some(out)
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
    fn a_forgotten_name_is_not_known_until_it_is_prepared_again() {
        let mut names = Names::default();
        names.parse(b"a", 1, true);
        names.answered();
        names.parse(b"b", 2, true);
        names.forget(b"a");
        names.forget(b"b");
        assert_eq!((names.find(b"a"), names.find(b"b")), (None, None));
        assert_eq!(names.answered(), None);
        assert!(names.find(b"b").is_none() && names.is_empty());
        names.parse(b"b", 3, true);
        assert_eq!(names.find(b"b"), Some(&3));
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

    #[test]
    fn errors_say_the_names_of_the_client() {
        let name_of = |name: &[u8]| match name {
            b"s_1" => Some(b"mine".as_slice()),
            b"s_2" => Some(b"s_2".as_slice()),
            b"s_3" => Some(b"s_1".as_slice()),
            _ => None,
        };
        let said = |text: &'static str| {
            let said = with_client_names(text.as_bytes(), b"s_", name_of)?;
            Some(String::from_utf8(said).unwrap())
        };
        assert_eq!(said("nothing \"s\" here"), None);
        assert_eq!(said("\"s_9\" is of nobody"), None);
        assert_eq!(said("a \"s_1\" b \"s_2\"\0\0").unwrap(), "a \"mine\" b \"s_2\"\0\0");
        // Called as a server would call another: each is replaced once.
        assert_eq!(said("\"s_3\" \"s_1").unwrap(), "\"s_1\" \"mine");
        assert_eq!(said("\"_s_7\" is not there").unwrap(), "\"s_7\" is not there");
        assert_eq!(said("an odd \" and \"s_1\"").unwrap(), "an odd \" and \"mine\"");
    }
}
