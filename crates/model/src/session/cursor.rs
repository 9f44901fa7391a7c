//! Cursors WITH HOLD: their rows are read, and declared again from a parameter.

use crate::sql;

/// What `pg_cursors` tells that matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor {
    pub is_scrollable: bool,
}

/// A column of a cursor: its name, and its type with its modifier as SQL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    pub name: String,
    pub sql_type: String,
}

/// A cursor's rows as text, and where it stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    pub columns: Vec<Column>,
    /// All rows of a cursor that scrolls; of another those that are left.
    pub rows: Vec<Vec<Option<String>>>,
    /// 0: before the first row; 1: on the first; and so on.
    pub position: u64,
}

/// Types whose text is not what a cast from text reads.
const NOT_BY_CAST: [&str; 2] = ["record", "\"char\""];

impl Contents {
    /// Bytes of all values, about.
    pub fn size(&self) -> u64 {
        let of_row = |row: &Vec<Option<String>>| {
            row.iter().flatten().map(String::len).sum::<usize>() + 24 * row.len()
        };
        u64::try_from(self.rows.iter().map(of_row).sum::<usize>()).unwrap_or(u64::MAX)
    }

    /// The first column's type that cannot be declared again.
    pub fn refused(&self) -> Option<&str> {
        let types = self.columns.iter().map(|column| column.sql_type.as_str());
        types.into_iter().find(|name| NOT_BY_CAST.contains(&name.trim_end_matches("[]")))
    }

    /// The statements that make the cursor again, with their parameters: one array of text a column. The values are
    /// expressions, so the columns have no table that they come from.
    pub fn declare(&self, name: &str, cursor: Cursor) -> Vec<(String, Vec<String>)> {
        let name = sql::quote_name(name);
        let scroll = if cursor.is_scrollable { "SCROLL" } else { "NO SCROLL" };
        let column = |(at, column): (usize, &Column)| {
            format!("c{at}::{} AS {}", column.sql_type, sql::quote_name(&column.name))
        };
        let columns: Vec<String> = self.columns.iter().enumerate().map(column).collect();
        let (from, params) = if columns.is_empty() {
            (format!("generate_series(1, {})", self.rows.len()), Vec::new())
        } else {
            let names: Vec<String> = (0..columns.len()).map(|at| format!("c{at}")).collect();
            let arrays: Vec<String> =
                (1..=columns.len()).map(|at| format!("${at}::text[]")).collect();
            let from = format!("unnest({}) u ({})", arrays.join(", "), names.join(", "));
            (from, (0..columns.len()).map(|at| self.array(at)).collect())
        };
        let select = format!("SELECT {} FROM {from}", columns.join(", "));
        let declare = format!("DECLARE {name} {scroll} CURSOR WITH HOLD FOR {select}");
        let mut statements = vec![(declare, params)];
        if self.position > 0 {
            let position = self.position;
            statements.push((format!("MOVE ABSOLUTE {position} FROM {name}"), Vec::new()));
        }
        statements
    }

    fn array(&self, at: usize) -> String {
        let element = |row: &Vec<Option<String>>| {
            row.get(at).and_then(Option::as_deref).map_or("NULL".into(), sql::array_element)
        };
        let elements: Vec<String> = self.rows.iter().map(element).collect();
        format!("{{{}}}", elements.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, sql_type: &str) -> Column {
        Column { name: name.into(), sql_type: sql_type.into() }
    }

    #[test]
    fn a_cursor_is_declared_from_its_rows() {
        let contents = Contents {
            columns: vec![column("n", "integer"), column("odd \" name", "character varying(5)")],
            rows: vec![
                vec![Some("1".into()), Some("a\"\\b".into())],
                vec![None, Some(String::new())],
            ],
            position: 2,
        };
        let statements = contents.declare("c 1", Cursor { is_scrollable: true });
        let (sql, params) = &statements[0];
        assert_eq!(
            sql,
            "DECLARE \"c 1\" SCROLL CURSOR WITH HOLD FOR SELECT c0::integer AS \"n\", \
             c1::character varying(5) AS \"odd \"\" name\" FROM unnest($1::text[], $2::text[]) u (c0, c1)"
        );
        assert_eq!(params, &["{\"1\",NULL}", "{\"a\\\"\\\\b\",\"\"}"]);
        assert_eq!(statements[1].0, "MOVE ABSOLUTE 2 FROM \"c 1\"");
    }

    #[test]
    fn rows_without_columns_are_counted() {
        let contents =
            Contents { columns: vec![], rows: vec![vec![], vec![], vec![]], position: 0 };
        let statements = contents.declare("c", Cursor { is_scrollable: false });
        let sql = "DECLARE \"c\" NO SCROLL CURSOR WITH HOLD FOR SELECT  FROM generate_series(1, 3)";
        assert_eq!(statements, [(sql.to_owned(), vec![])]);
    }

    #[test]
    fn types_that_no_cast_reads_are_named() {
        let with = |name| Contents { columns: vec![column("x", name)], ..Contents::default() };
        assert_eq!(with("record[]").refused(), Some("record[]"));
        assert_eq!(with("\"char\"").refused(), Some("\"char\""));
        assert_eq!(with("integer").refused(), None);
    }
}
