//! What a lost server alone had, as people are told.

use serde::{Deserialize, Serialize};

use crate::Lsn;

/// What a server has written that nobody follows: from where on, and the name under which it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tail {
    pub timeline: u64,
    pub from: Lsn,
    pub name: String,
}

/// A table of which rows were changed there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostTable {
    pub database: String,
    /// With its schema; as the log names it, if it was gone in the end.
    pub table: String,
    /// What committed transactions have done.
    pub inserted: u64,
    pub updated: u64,
    pub deleted: u64,
    /// Rows as they were in the end, and the file that has them. None if they could not be read.
    #[serde(default)]
    pub rows: Option<(u64, String)>,
    /// Why not.
    #[serde(default)]
    pub reason: Option<String>,
}

/// All that could be decoded.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostRows {
    /// Those with the most changes first, no more than [`TABLES_MAX`].
    pub tables: Vec<LostTable>,
    /// Changes of catalogs: definitions of objects, large objects.
    pub catalogs: u64,
    /// Changes that were too many to be looked at.
    pub beyond: u64,
    /// Transactions that began before the log that was read, and may have changed more than is here.
    pub cut: u64,
}

/// Tables that are named.
pub const TABLES_MAX: usize = 100;

impl LostRows {
    /// In one line.
    pub fn says(&self) -> String {
        let kept: u64 = self.tables.iter().filter_map(|one| Some(one.rows.as_ref()?.0)).sum();
        let unread = self.tables.iter().filter(|one| one.rows.is_none()).count();
        let mut text = format!("{kept} rows of {} tables are kept", self.tables.len() - unread);
        let mut add = |count: u64, what: &str| {
            if count > 0 {
                text.push_str(&format!(", {count} {what}"));
            }
        };
        add(self.tables.iter().map(|one| one.deleted).sum(), "were deleted");
        add(unread as u64, "tables could not be read");
        add(self.catalogs, "changes of catalogs");
        add(self.beyond, "changes were too many to look at");
        add(
            self.cut,
            "transactions may have changed more, as they began before the log that is left",
        );
        text
    }
}

impl LostTable {
    /// In one line.
    pub fn says(&self) -> String {
        let LostTable { database, table, inserted, updated, deleted, rows, reason } = self;
        let changes = format!("{inserted} inserted, {updated} updated, {deleted} deleted");
        let kept = match (rows, reason) {
            (Some((rows, file)), _) => format!("{rows} rows in {file}"),
            (None, Some(reason)) => format!("not read: {reason}"),
            (None, None) => "not read".into(),
        };
        format!("{} of {}: {changes}; {}", plain(table), plain(database), plain(&kept))
    }
}

/// Names may have letters in them that a terminal obeys.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() {
            true => plain.extend(c.escape_default()),
            false => plain.push(c),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_and_what_is_not_is_said() {
        let table = |rows| LostTable {
            database: "shop".into(),
            table: "public.t".into(),
            inserted: 3,
            updated: 1,
            deleted: 2,
            rows,
            reason: Some("it is gone".into()),
        };
        let read = table(Some((4, "rows-1.csv".into())));
        let named = LostTable { table: "\"a\u{1b}[31m\"".into(), ..read.clone() };
        assert!(named.says().starts_with("\"a\\u{1b}[31m\" of shop: "), "{}", named.says());
        assert_eq!(
            read.says(),
            "public.t of shop: 3 inserted, 1 updated, 2 deleted; 4 rows in rows-1.csv"
        );
        let rows = LostRows { tables: vec![read, table(None)], cut: 1, ..LostRows::default() };
        let text = rows.says();
        assert!(
            text.starts_with("4 rows of 1 tables are kept, 4 were deleted, 1 tables"),
            "{text}"
        );
        assert!(text.contains("1 transactions may have changed more"), "{text}");
        assert!(table(None).says().ends_with("not read: it is gone"));
    }
}
