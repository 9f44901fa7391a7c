//! The texts of statements, read once: which commands each holds.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use model::policy::{Catalog, Class, Command};

/// Bytes that all texts may take that are kept while nobody uses them.
const LEN_MAX: usize = 64 * 1024 * 1024;
/// A longer one is read each time.
pub(crate) const TEXT_LEN_MAX: usize = 16 * 1024;

/// What the commands of a text do: the number of each, its name, and a class.
pub(crate) type Classes = Arc<[(usize, &'static str, Class)]>;

/// The text of a statement, and what it holds once somebody has asked.
#[derive(Debug)]
pub(crate) struct Text {
    sql: Box<[u8]>,
    /// With `standard_conforming_strings` off and on. None if it is not in the grammar.
    commands: [OnceLock<Option<Vec<Command>>>; 2],
    /// By the catalog that told.
    classes: Mutex<Option<(Option<Arc<Catalog>>, Classes)>>,
    /// For whom it passed last, and by which rule. Only a text of one command that says all itself.
    passed: AtomicU64,
    rule: AtomicUsize,
}

impl PartialEq for Text {
    fn eq(&self, other: &Text) -> bool {
        self.sql == other.sql
    }
}

impl Eq for Text {}

impl Text {
    fn new(sql: &[u8]) -> Text {
        Text {
            sql: sql.into(),
            commands: Default::default(),
            classes: Default::default(),
            passed: AtomicU64::new(0),
            rule: AtomicUsize::new(0),
        }
    }

    /// The rule by which it has passed for those of this kind. Keys are never used again, so nothing here grows old.
    pub(crate) fn passed(&self, key: u64) -> Option<usize> {
        let rule = self.rule.load(Ordering::Acquire);
        (self.passed.load(Ordering::Acquire) == key).then_some(rule)
    }

    /// It has passed for those of this kind. Another kind at the same time may have it counted for its rule.
    pub(crate) fn set_passed(&self, key: u64, rule: usize) {
        self.rule.store(rule, Ordering::Release);
        self.passed.store(key, Ordering::Release);
    }

    /// Its commands. None if nothing is known of it.
    pub(crate) fn commands(&self, conforming: bool) -> Option<&[Command]> {
        let [old, new] = &self.commands;
        let place = if conforming { new } else { old };
        place.get_or_init(|| grammar::commands(&self.sql, conforming).ok()).as_deref()
    }

    /// Each of its commands and all that it does, given what names stand for: by its number, its name and a class. Where a
    /// backslash may be an escape or not, what it is either way.
    pub(crate) fn classes(&self, catalog: Option<&Arc<Catalog>>) -> Classes {
        let mut known = self.classes.lock().unwrap_or_else(PoisonError::into_inner);
        let is_same = |told: &Option<Arc<Catalog>>| match (told, catalog) {
            (Some(told), Some(catalog)) => Arc::ptr_eq(told, catalog),
            (None, None) => true,
            _ => false,
        };
        if let Some((told, classes)) = &*known
            && is_same(told)
        {
            return classes.clone();
        }
        let mut classes = Vec::new();
        for conforming in self.modes() {
            match self.commands(*conforming) {
                Some(commands) => {
                    for (at, command) in commands.iter().enumerate() {
                        let all = command.classes_with(catalog.map(|catalog| &**catalog));
                        classes.extend(all.map(|class| (at, command.name, class)));
                    }
                }
                None => classes.push((0, "unknown", Class::Unknown)),
            }
        }
        let classes: Classes = classes.into();
        *known = Some((catalog.cloned(), classes.clone()));
        classes
    }

    /// What `standard_conforming_strings` may be when the text is read, as far as it matters.
    pub(crate) fn modes(&self) -> &'static [bool] {
        if self.sql.contains(&b'\\') { &[true, false] } else { &[true] }
    }

    /// It runs what a cursor, or a portal, holds.
    pub(crate) fn has_cursor(&self) -> bool {
        let all = self.modes().iter().filter_map(|mode| self.commands(*mode));
        all.flatten().any(|command| command.cursor.is_some())
    }

    /// Bytes that it may take.
    pub(super) fn weight(&self) -> usize {
        let commands = self.sql.iter().filter(|byte| **byte == b';').count() + 1;
        self.sql.len().saturating_mul(8).saturating_add(commands.saturating_mul(512))
    }
}

/// A text, found by its bytes.
#[derive(Debug, PartialEq, Eq)]
struct Known(Arc<Text>);

impl std::hash::Hash for Known {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.0.sql.hash(state);
    }
}

impl std::borrow::Borrow<[u8]> for Known {
    fn borrow(&self) -> &[u8] {
        &self.0.sql
    }
}

/// Every statement is looked up here, and nobody walks through it but to throw out what nobody uses.
type Set = std::collections::HashSet<Known>;

#[derive(Debug, Default)]
struct Kept {
    texts: Set,
    len: usize,
    /// At this length those that nobody uses are thrown out.
    len_max: usize,
}

/// The texts of one application.
#[derive(Debug, Default)]
pub(crate) struct Texts(Mutex<Kept>);

impl Texts {
    /// The text of these bytes, of which there is one for as long as somebody uses it.
    pub(crate) fn get(&self, sql: &[u8]) -> Arc<Text> {
        if sql.len() > TEXT_LEN_MAX {
            return Arc::new(Text::new(sql));
        }
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kept.texts.get(sql) {
            return known.0.clone();
        }
        let text = Arc::new(Text::new(sql));
        if kept.len + text.weight() > kept.len_max.max(LEN_MAX) {
            kept.texts.retain(|known| Arc::strong_count(&known.0) > 1);
            kept.len = kept.texts.iter().map(|known| known.0.weight()).sum();
            kept.len_max = 2 * kept.len;
        }
        kept.len += text.weight();
        kept.texts.insert(Known(text.clone()));
        text
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_text_is_read_once_and_kept_while_it_is_used() {
        let texts = Texts::default();
        let one = texts.get(b"SELECT 1; DELETE FROM t");
        assert!(Arc::ptr_eq(&one, &texts.get(b"SELECT 1; DELETE FROM t")));
        // Without a catalog nothing is known of what it names.
        let all =
            [(0, "SELECT", Class::Read), (1, "DELETE", Class::Write), (1, "DELETE", Class::Code)];
        assert_eq!(*one.classes(None), all);
        assert!(Arc::ptr_eq(&one.classes(None), &one.classes(None)));
        let catalog = Arc::new(Catalog::default());
        let calls = texts.get(b"SELECT f()");
        assert_eq!(*calls.classes(Some(&catalog)), [(0, "SELECT", Class::Code)]);
        let knows = Catalog { reading: ["f".to_owned()].into(), ..Catalog::default() };
        assert_eq!(*calls.classes(Some(&Arc::new(knows))), [(0, "SELECT", Class::Read)]);
        assert_eq!(*texts.get(b"no SQL").classes(None), [(0, "unknown", Class::Unknown)]);
        // Either way counts where a backslash may be an escape.
        let either = texts.get(br"SELECT '\' , '; DELETE FROM t; --'");
        assert!(either.classes(Some(&catalog)).iter().any(|(_, _, class)| *class == Class::Write));
        for number in 0..2_000 {
            texts.get(format!("SELECT {number} /* {} */", "x".repeat(10_000)).as_bytes());
        }
        assert!(texts.0.lock().unwrap().len <= LEN_MAX);
        assert!(Arc::ptr_eq(&one, &texts.get(b"SELECT 1; DELETE FROM t")));
        let long = vec![b' '; TEXT_LEN_MAX + 1];
        assert!(!Arc::ptr_eq(&texts.get(&long), &texts.get(&long)));
    }
}
