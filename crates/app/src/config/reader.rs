//! Reads tables of a TOML file and collects every mistake with its line, instead of stopping at the first.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One mistake, as the user is told.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mistake {
    pub(crate) line: usize,
    pub(crate) text: String,
}

/// Mistakes collected so far, and the text that lines are counted in.
pub(crate) struct Mistakes<'a> {
    source: &'a str,
    found: BTreeSet<Mistake>,
}

impl<'a> Mistakes<'a> {
    pub(crate) fn new(source: &'a str) -> Mistakes<'a> {
        Mistakes { source, found: BTreeSet::new() }
    }

    pub(crate) fn add(&mut self, span: Range<usize>, text: impl Into<String>) {
        let before = self.source.get(..span.start).unwrap_or(self.source);
        let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
        self.found.insert(Mistake { line, text: text.into() });
    }

    pub(crate) fn into_found(self) -> Vec<Mistake> {
        self.found.into_iter().collect()
    }
}

/// A table that is being read. Keys that are never asked for are mistakes.
pub(crate) struct Table<'a> {
    name: String,
    span: Range<usize>,
    entries: Vec<(String, &'a Spanned<DeValue<'a>>, Range<usize>)>,
    asked: Vec<&'static str>,
}

impl<'a> Table<'a> {
    pub(crate) fn new(
        name: impl Into<String>,
        table: &'a DeTable<'a>,
        span: Range<usize>,
    ) -> Table<'a> {
        let entries = table
            .iter()
            .map(|(key, value)| (key.get_ref().to_string(), value, key.span()))
            .collect();
        Table { name: name.into(), span, entries, asked: Vec::new() }
    }

    pub(crate) fn empty(name: impl Into<String>) -> Table<'a> {
        Table { name: name.into(), span: 0..0, entries: Vec::new(), asked: Vec::new() }
    }

    pub(crate) fn span(&self) -> Range<usize> {
        self.span.clone()
    }

    fn find(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        self.asked.push(key);
        self.entries.iter().find(|(name, ..)| name == key).map(|(_, value, _)| *value)
    }

    pub(crate) fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|(name, ..)| name == key)
    }

    /// Where a key stands, or the table if it does not.
    pub(crate) fn span_of(&self, key: &str) -> Range<usize> {
        let found = self.entries.iter().find(|(name, ..)| name == key);
        found.map_or(self.span(), |(.., span)| span.clone())
    }

    fn wrong(
        &self,
        mistakes: &mut Mistakes<'_>,
        key: &str,
        wanted: &str,
        found: &Spanned<DeValue<'_>>,
    ) {
        let found_is = found.get_ref().type_str();
        mistakes.add(
            found.span(),
            format!("`{}{key}` must be {wanted}, it is a {found_is}", self.prefix()),
        );
    }

    fn prefix(&self) -> String {
        if self.name.is_empty() { String::new() } else { format!("{}.", self.name) }
    }

    pub(crate) fn text(
        &mut self,
        mistakes: &mut Mistakes<'_>,
        key: &'static str,
    ) -> Option<String> {
        let value = self.find(key)?;
        match value.get_ref() {
            DeValue::String(text) => Some(text.to_string()),
            _ => {
                self.wrong(mistakes, key, "a text", value);
                None
            }
        }
    }

    pub(crate) fn required_text(
        &mut self,
        mistakes: &mut Mistakes<'_>,
        key: &'static str,
    ) -> String {
        let has = self.has(key);
        let text = self.text(mistakes, key);
        if !has {
            mistakes.add(self.span(), format!("`{}{key}` is missing", self.prefix()));
        }
        text.unwrap_or_default()
    }

    pub(crate) fn path(
        &mut self,
        mistakes: &mut Mistakes<'_>,
        key: &'static str,
    ) -> Option<PathBuf> {
        self.text(mistakes, key).map(PathBuf::from)
    }

    pub(crate) fn flag(&mut self, mistakes: &mut Mistakes<'_>, key: &'static str) -> Option<bool> {
        let value = self.find(key)?;
        match value.get_ref() {
            DeValue::Boolean(flag) => Some(*flag),
            _ => {
                self.wrong(mistakes, key, "true or false", value);
                None
            }
        }
    }

    /// A whole number within bounds.
    pub(crate) fn number(
        &mut self,
        mistakes: &mut Mistakes<'_>,
        key: &'static str,
        bounds: Range<u64>,
    ) -> Option<u64> {
        let value = self.find(key)?;
        let number = match value.get_ref() {
            DeValue::Integer(number) => number.as_str().parse::<u64>().ok(),
            _ => None,
        };
        match number {
            Some(number) if bounds.contains(&number) => Some(number),
            Some(number) => {
                let text = format!(
                    "`{}{key}` must be from {} to {}, it is {number}",
                    self.prefix(),
                    bounds.start,
                    bounds.end - 1
                );
                mistakes.add(value.span(), text);
                None
            }
            None => {
                self.wrong(mistakes, key, "a whole number", value);
                None
            }
        }
    }

    /// A duration such as `"500ms"`, `"5s"`, `"2m"`, or `"0s"` for none.
    pub(crate) fn duration(
        &mut self,
        mistakes: &mut Mistakes<'_>,
        key: &'static str,
    ) -> Option<Duration> {
        let span = self.span_of(key);
        let text = self.text(mistakes, key)?;
        let duration = read_duration(&text);
        if duration.is_none() {
            let name = format!("{}{key}", self.prefix());
            mistakes.add(span, format!("`{name}` must be a duration such as \"500ms\", \"5s\" or \"2m\", it is `{text}`"));
        }
        duration
    }

    /// A size such as `"64MB"`, by PostgreSQL's units: kB, MB and GB are powers of 1024.
    pub(crate) fn size(&mut self, mistakes: &mut Mistakes<'_>, key: &'static str) -> Option<u64> {
        let span = self.span_of(key);
        let text = self.text(mistakes, key)?;
        let size = read_size(&text);
        if size.is_none() {
            let name = format!("{}{key}", self.prefix());
            mistakes.add(
                span,
                format!(
                    "`{name}` must be a size such as \"512kB\", \"64MB\" or \"1GB\", it is `{text}`"
                ),
            );
        }
        size
    }

    pub(crate) fn texts(
        &mut self,
        mistakes: &mut Mistakes<'_>,
        key: &'static str,
    ) -> Option<Vec<(String, Range<usize>)>> {
        let value = self.find(key)?;
        let array = match value.get_ref() {
            DeValue::Array(array) => array,
            // One needs no brackets.
            DeValue::String(text) => return Some(vec![(text.to_string(), value.span())]),
            _ => {
                self.wrong(mistakes, key, "a list of texts", value);
                return None;
            }
        };
        let mut texts = Vec::new();
        for item in array.iter() {
            match item.get_ref() {
                DeValue::String(text) => texts.push((text.to_string(), item.span())),
                _ => self.wrong(mistakes, key, "a list of texts", item),
            }
        }
        Some(texts)
    }

    /// One of a few words.
    pub(crate) fn choice<T>(
        &mut self,
        mistakes: &mut Mistakes<'_>,
        key: &'static str,
        accepted: &[&str],
        read: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let span = self.span_of(key);
        let text = self.text(mistakes, key)?;
        let choice = read(&text);
        if choice.is_none() {
            let name = format!("{}{key}", self.prefix());
            mistakes.add(
                span,
                format!("`{name}` must be one of {}, it is `{text}`", accepted.join(", ")),
            );
        }
        choice
    }

    pub(crate) fn table(
        &mut self,
        mistakes: &mut Mistakes<'_>,
        key: &'static str,
    ) -> Option<Table<'a>> {
        let value = self.find(key)?;
        match value.get_ref() {
            DeValue::Table(table) => {
                Some(Table::new(format!("{}{key}", self.prefix()), table, self.span_of(key)))
            }
            _ => {
                self.wrong(mistakes, key, "a table", value);
                None
            }
        }
    }

    /// The tables of `[[key]]`.
    pub(crate) fn tables(
        &mut self,
        mistakes: &mut Mistakes<'_>,
        key: &'static str,
    ) -> Vec<Table<'a>> {
        let Some(value) = self.find(key) else { return Vec::new() };
        let DeValue::Array(array) = value.get_ref() else {
            self.wrong(mistakes, key, "tables, written [[..]]", value);
            return Vec::new();
        };
        let mut tables = Vec::new();
        for item in array.iter() {
            match item.get_ref() {
                DeValue::Table(table) => {
                    tables.push(Table::new(format!("{}{key}", self.prefix()), table, item.span()));
                }
                _ => self.wrong(mistakes, key, "tables, written [[..]]", item),
            }
        }
        tables
    }

    /// Ends the reading: what was never asked for is unknown.
    pub(crate) fn end(self, mistakes: &mut Mistakes<'_>) {
        for (key, _, span) in &self.entries {
            if !self.asked.contains(&key.as_str()) {
                let mut known = self.asked.clone();
                known.sort_unstable();
                known.dedup();
                let text =
                    format!("`{}{key}` is unknown; known are {}", self.prefix(), known.join(", "));
                mistakes.add(span.clone(), text);
            }
        }
    }
}

/// `"512kB"`, `"64MB"`, `"1GB"`.
fn read_size(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text.get(..digits)?.parse().ok()?;
    let unit: u64 = match text.get(digits..)? {
        "B" => 1,
        "kB" => 1 << 10,
        "MB" => 1 << 20,
        "GB" => 1 << 30,
        _ => return None,
    };
    number.checked_mul(unit)
}

/// `"500ms"`, `"5s"`, `"2m"`, `"1h"`.
pub(crate) fn read_duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let number: u64 = text.get(..digits)?.parse().ok()?;
    let seconds = match text.get(digits..)? {
        "ms" => return Some(Duration::from_millis(number)),
        "s" => number,
        "m" => number.checked_mul(60)?,
        "h" => number.checked_mul(3_600)?,
        _ => return None,
    };
    Some(Duration::from_secs(seconds))
}
