//! Temporary objects, as statements that make them again.
//!
//! The server tells all of it but one thing, whether a table deletes its rows at commit; that is found out by
//! [`PROBE`]. What the server cannot tell as a statement pins.

use std::collections::{BTreeMap, BTreeSet};

use super::capture::{Row, Unreadable, text};
use super::pin::Pin;

/// Everything that is in the session's temporary schema or hangs on it. To be asked of the session itself, under
/// `search_path = pg_catalog, pg_temp`.
pub const QUESTION: &str = include_str!("temporary.sql");

/// To be run in a transaction of its own that may write, before [`EMPTY_FILES`] is asked. Tables of which nothing
/// can be said come as INFO messages, for [`read_unclear`].
pub const PROBE: &str = include_str!("temporary_probe.sql");

/// Tables that delete their rows at commit, after [`PROBE`].
pub const EMPTY_FILES: &str = "SELECT format('pg_temp.%I', relname) FROM pg_class \
    WHERE relnamespace = pg_my_temp_schema() AND relkind = 'r' AND pg_relation_size(oid) = 0";

/// Temporary relations that have the name of a permanent one: a statement that names it means one or the other, by when
/// it was prepared.
pub const SHADOWING: &str = "SELECT relname::text FROM pg_class t WHERE relnamespace = pg_my_temp_schema() \
    AND relkind IN ('r', 'v') AND EXISTS (SELECT FROM pg_class p WHERE p.relname = t.relname \
    AND p.relkind IN ('r', 'v', 'm', 'f', 'p') AND p.relpersistence <> 't')";

/// Settings under which rows are written as text that reads back as the same values. Compiling the questions would
/// take longer than they do.
pub const FORMATS: &str = "SELECT pg_catalog.set_config(n, v, true) FROM (VALUES \
    ('DateStyle', 'ISO'), ('IntervalStyle', 'postgres'), ('extra_float_digits', '3'), ('bytea_output', 'hex'), \
    ('lc_monetary', 'C'), ('xmloption', 'content'), ('array_nulls', 'on'), ('idle_in_transaction_session_timeout', '0'), ('search_path', 'pg_catalog, pg_temp'), ('jit', 'off'), \
    ('standard_conforming_strings', 'on'), ('quote_all_identifiers', 'off'), ('check_function_bodies', 'off'), ('temp_tablespaces', ''), ('client_min_messages', 'error')) x (n, v)";

/// Longest text of a statement that a difference shows.
const SHOWN_LEN_MAX: usize = 120;

/// The same where they are read. What only writing looks at is left as the session has it: generated columns and
/// indexes are computed under it.
pub const READ_FORMATS: &str = "SELECT pg_catalog.set_config(n, v, true) FROM (VALUES \
    ('DateStyle', 'ISO'), ('IntervalStyle', 'postgres'), ('lc_monetary', 'C'), ('xmloption', 'content'), \
    ('idle_in_transaction_session_timeout', '0'), \
    ('array_nulls', 'on'), ('search_path', 'pg_catalog, pg_temp'), ('jit', 'off'), \
    ('standard_conforming_strings', 'on'), ('quote_all_identifiers', 'off'), ('check_function_bodies', 'off'), \
    ('temp_tablespaces', ''), ('client_min_messages', 'error')) x (n, v)";

const PRESERVE: &str = " ON COMMIT PRESERVE ROWS";
const DELETE: &str = " ON COMMIT DELETE ROWS";

/// A statement, and the role that runs it: the owner of what it is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    pub owner: String,
    pub sql: String,
}

/// A table whose rows are carried, by its quoted name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    pub owner: String,
    pub name: String,
}

/// Where a sequence stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    pub owner: String,
    pub last_value: i64,
    pub is_called: bool,
}

/// The temporary objects of a session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Temporary {
    /// What is made before there are rows.
    pub first: Vec<Statement>,
    pub tables: Vec<Table>,
    /// By quoted name.
    pub sequences: BTreeMap<String, Position>,
    /// What is made once the rows are there.
    pub then: Vec<Statement>,
}

/// What was found besides the objects.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Aside {
    pub pins: Vec<Pin>,
    /// Bytes of all tables.
    pub size: u64,
    /// Tables of which the planner has statistics, by quoted name.
    pub analyzed: BTreeSet<String>,
}

impl Temporary {
    pub fn is_empty(&self) -> bool {
        self.first.is_empty()
    }

    /// Reads the answer to [`QUESTION`].
    ///
    /// # Errors
    /// A column is missing or is not what was asked for.
    pub fn read(rows: &[Row]) -> Result<(Temporary, Aside), Unreadable> {
        let (mut temporary, mut aside) = (Temporary::default(), Aside::default());
        for row in rows {
            let (owner, sql) = (text(row, 1)?.to_owned(), text(row, 2)?.to_owned());
            match text(row, 0)? {
                "0" => aside.pins.push(Pin::Temporary { what: sql }),
                "1" => temporary.first.push(Statement { owner, sql }),
                "2" => {
                    let mut words = sql.splitn(3, ' ');
                    let (size, analyzed, name) = (words.next(), words.next(), words.next());
                    let name = name.ok_or(Unreadable("name of a table"))?.to_owned();
                    let size = size.and_then(|size| size.parse().ok()).unwrap_or(u64::MAX);
                    aside.size = aside.size.saturating_add(size);
                    if analyzed == Some("analyzed") {
                        aside.analyzed.insert(name.clone());
                    }
                    temporary.tables.push(Table { owner, name });
                }
                "3" => {
                    let position = Position { owner, last_value: 0, is_called: false };
                    temporary.sequences.insert(sql, position);
                }
                "4" | "5" => temporary.then.push(Statement { owner, sql }),
                _ => return Err(Unreadable("known phase")),
            }
        }
        Ok((temporary, aside))
    }

    /// The first thing in which `there` is not the same.
    pub(super) fn differences(
        &self,
        there: &Temporary,
        differs: &mut impl FnMut(String, Option<String>, Option<String>),
    ) {
        let statements = |one: &Temporary| -> Vec<String> {
            let all = one.first.iter().chain(&one.then);
            let tables = one.tables.iter().map(|table| (&table.owner, &table.name));
            all.map(|one| (&one.owner, &one.sql))
                .chain(tables)
                .map(|(owner, sql)| {
                    format!("{} of {owner}", crate::sql::shown(sql.as_bytes(), SHOWN_LEN_MAX))
                })
                .collect()
        };
        let (mine, theirs) = (statements(self), statements(there));
        let len = mine.len().max(theirs.len());
        if let Some(at) = (0..len).find(|at| mine.get(*at) != theirs.get(*at)) {
            let what = "a temporary object".to_owned();
            differs(what, mine.get(at).cloned(), theirs.get(at).cloned());
        } else if self.first != there.first || self.then != there.then {
            let what = "a temporary object".to_owned();
            differs(what, Some("one text".into()), Some("another".into()));
        }
        for (name, position) in &self.sequences {
            let shown = |position: &Position| {
                format!("{} {} of {}", position.last_value, position.is_called, position.owner)
            };
            let other = there.sequences.get(name).map(shown);
            differs(format!("temporary sequence {name}"), Some(shown(position)), other);
        }
    }

    /// Whether a table has generated columns that are stored, or may have.
    pub fn generates(&self, table: &str) -> bool {
        let begins = format!("CREATE TEMP TABLE {table} (");
        self.first.iter().any(|one| one.sql.starts_with(&begins) && one.sql.contains(" STORED"))
    }

    /// The question where the sequences stand; none if there are none.
    pub fn sequences_question(&self) -> Option<String> {
        let one = |name: &String| {
            let literal = crate::sql::quote_literal(name);
            format!("SELECT {literal}, last_value::text, is_called::text FROM {name}")
        };
        let all: Vec<String> = self.sequences.keys().map(one).collect();
        (!all.is_empty()).then(|| all.join(" UNION ALL "))
    }

    /// Reads the answer to [`Temporary::sequences_question`].
    ///
    /// # Errors
    /// As [`Temporary::read`].
    pub fn read_sequences(&mut self, rows: &[Row]) -> Result<(), Unreadable> {
        for row in rows {
            let position =
                self.sequences.get_mut(text(row, 0)?).ok_or(Unreadable("known sequence"))?;
            position.last_value = text(row, 1)?.parse().map_err(|_| Unreadable("last value"))?;
            position.is_called = matches!(text(row, 2)?, "true" | "t");
        }
        Ok(())
    }

    /// Says of tables that they delete their rows at commit, by the answer to [`EMPTY_FILES`]. Of those in `unclear`
    /// it says nothing.
    ///
    /// # Errors
    /// As [`Temporary::read`].
    pub fn read_empty_files(
        &mut self,
        rows: &[Row],
        unclear: &BTreeSet<String>,
    ) -> Result<(), Unreadable> {
        for row in rows {
            let name = text(row, 0)?;
            if unclear.contains(name) {
                continue;
            }
            let begins = format!("CREATE TEMP TABLE {name} (");
            let statement = self.first.iter_mut().find(|one| one.sql.starts_with(&begins));
            let statement = statement.ok_or(Unreadable("known table"))?;
            // The last one: behind it there is nothing but the name of a tablespace.
            let at = statement.sql.rfind(PRESERVE).ok_or(Unreadable("commit action"))?;
            statement.sql.replace_range(at..at + PRESERVE.len(), DELETE);
        }
        Ok(())
    }
}

/// Reads the name of a table from an INFO message of [`PROBE`].
pub fn read_unclear(info: &str) -> Option<String> {
    info.strip_prefix("holdfast: unclear ").map(str::to_owned)
}

/// Why such a table cannot be made again.
pub fn unclear(name: &str) -> Pin {
    Pin::Temporary { what: format!("{name} is empty, and may delete its rows at commit") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[&str]) -> Row {
        cells.iter().map(|cell| Some((*cell).to_owned())).collect()
    }

    #[test]
    fn objects_are_read_phase_by_phase() {
        let rows = [
            row(&["0", "app", "pg_temp.p inherits"]),
            row(&[
                "1",
                "app",
                "CREATE TEMP TABLE pg_temp.t (n integer) USING heap ON COMMIT PRESERVE ROWS",
            ]),
            row(&["2", "app", "8192 analyzed pg_temp.\"odd name\""]),
            row(&["3", "app", "pg_temp.s"]),
            row(&["4", "app", "CREATE INDEX i ON pg_temp.t USING btree (n)"]),
        ];
        let (mut temporary, aside) = Temporary::read(&rows).unwrap();
        assert_eq!(aside.pins, [Pin::Temporary { what: "pg_temp.p inherits".into() }]);
        assert_eq!((aside.size, aside.analyzed.len()), (8192, 1));
        assert_eq!(temporary.tables[0].name, "pg_temp.\"odd name\"");
        let question = temporary.sequences_question().unwrap();
        assert_eq!(
            question,
            "SELECT 'pg_temp.s', last_value::text, is_called::text FROM pg_temp.s"
        );
        temporary.read_sequences(&[row(&["pg_temp.s", "7", "true"])]).unwrap();
        assert_eq!(temporary.sequences["pg_temp.s"].last_value, 7);
        assert!(temporary.read_sequences(&[row(&["pg_temp.x", "7", "true"])]).is_err());
    }

    #[test]
    fn a_table_whose_file_is_empty_deletes_its_rows() {
        let sql = "CREATE TEMP TABLE pg_temp.t (n text GENERATED ALWAYS AS (' ON COMMIT PRESERVE ROWS') STORED) \
            USING heap ON COMMIT PRESERVE ROWS TABLESPACE x";
        let (mut temporary, _) = Temporary::read(&[row(&["1", "app", sql])]).unwrap();
        let unclear = BTreeSet::from(["pg_temp.u".to_owned()]);
        let rows = [row(&["pg_temp.t"]), row(&["pg_temp.u"])];
        temporary.read_empty_files(&rows, &unclear).unwrap();
        assert!(temporary.first[0].sql.ends_with("USING heap ON COMMIT DELETE ROWS TABLESPACE x"));
        assert!(temporary.read_empty_files(&[row(&["pg_temp.other"])], &unclear).is_err());
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        assert!(Temporary::read(&[row(&["9", "app", "x"])]).is_err());
        assert!(Temporary::read(&[row(&["1"])]).is_err());
        assert!(Temporary::read(&[row(&["2", "app", "8192"])]).is_err());
    }
}
