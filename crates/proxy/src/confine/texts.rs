//! The texts of statements, read once: which commands each holds.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use model::policy::{Catalog, Class, Command};

/// Bytes of all texts that are kept while nobody uses them.
const LEN_MAX: usize = 8 * 1024 * 1024;
/// A longer one is read each time.
pub(crate) const TEXT_LEN_MAX: usize = 16 * 1024;

/// What a text is, by the catalog that told.
type Classes = (Option<Arc<Catalog>>, Arc<[(&'static str, Class)]>);

/// The text of a statement, and what it holds once somebody has asked.
#[derive(Debug)]
pub(crate) struct Text {
    sql: Box<[u8]>,
    /// With `standard_conforming_strings` off and on. None if it is not in the grammar.
    commands: [OnceLock<Option<Vec<Command>>>; 2],
    classes: [Mutex<Option<Classes>>; 2],
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

    /// The names of its commands and what each does at most, given what names stand for.
    pub(crate) fn classes(
        &self,
        conforming: bool,
        catalog: Option<&Arc<Catalog>>,
    ) -> Arc<[(&'static str, Class)]> {
        let [old, new] = &self.classes;
        let place = if conforming { new } else { old };
        let mut known = place.lock().unwrap_or_else(PoisonError::into_inner);
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
        let class = |command: &Command| (command.name, command.class_with(catalog.map(|c| &**c)));
        let classes: Arc<[_]> = match self.commands(conforming) {
            Some(commands) => commands.iter().map(class).collect(),
            None => [("unknown", Class::Unknown)].into(),
        };
        *known = Some((catalog.cloned(), classes.clone()));
        classes
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
        if kept.len + sql.len() > kept.len_max.max(LEN_MAX) {
            kept.texts.retain(|known| Arc::strong_count(&known.0) > 1);
            kept.len = kept.texts.iter().map(|known| known.0.sql.len()).sum();
            kept.len_max = 2 * kept.len;
        }
        let text = Arc::new(Text::new(sql));
        kept.len += sql.len();
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
        assert_eq!(*one.classes(true, None), [("SELECT", Class::Read), ("DELETE", Class::Write)]);
        assert!(Arc::ptr_eq(&one.classes(true, None), &one.classes(true, None)));
        let catalog = Arc::new(Catalog::default());
        let calls = texts.get(b"SELECT f()");
        assert_eq!(*calls.classes(true, Some(&catalog)), [("SELECT", Class::Code)]);
        let knows = Catalog { reading: ["f".to_owned()].into(), ..Catalog::default() };
        assert_eq!(*calls.classes(true, Some(&Arc::new(knows))), [("SELECT", Class::Read)]);
        assert_eq!(*texts.get(b"no SQL").classes(true, None), [("unknown", Class::Unknown)]);
        for number in 0..2_000 {
            texts.get(format!("SELECT {number} /* {} */", "x".repeat(10_000)).as_bytes());
        }
        assert!(texts.0.lock().unwrap().len <= LEN_MAX);
        assert!(Arc::ptr_eq(&one, &texts.get(b"SELECT 1; DELETE FROM t")));
        let long = vec![b' '; TEXT_LEN_MAX + 1];
        assert!(!Arc::ptr_eq(&texts.get(&long), &texts.get(&long)));
    }
}
