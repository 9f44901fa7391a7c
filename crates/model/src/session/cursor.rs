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
    pub shape: Shape,
    /// What stands between elements of its arrays (`typdelim`).
    pub delimiter: char,
}

/// How values of a type are given to the server as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// As elements of an array of the type: each is read by the type's own input function.
    Element,
    /// The same, but such an array would be unnested into the fields of its elements.
    Row,
    /// An array has no array of its own, so it is cast from text.
    Array,
    /// There is no way.
    None,
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

/// A type whose text has no input function.
const RECORD: &str = "record";

/// Bytes of a row's values, about.
pub fn size_of(row: &[Option<String>]) -> u64 {
    let len = row.iter().flatten().map(String::len).sum::<usize>() + 24 * row.len();
    u64::try_from(len).unwrap_or(u64::MAX)
}

impl Contents {
    /// The first column's type that cannot be declared again.
    pub fn refused(&self) -> Option<&str> {
        let refused = |column: &&Column| {
            column.shape == Shape::None || column.sql_type.trim_end_matches("[]") == RECORD
        };
        self.columns.iter().find(refused).map(|column| column.sql_type.as_str())
    }

    /// The statements that make the cursor again, with their parameters: one array of text a column. The values are
    /// expressions, so the columns have no table that they come from.
    pub fn declare(&self, name: &str, cursor: Cursor) -> Vec<(String, Vec<String>)> {
        let name = sql::quote_name(name);
        let scroll = if cursor.is_scrollable { "SCROLL" } else { "NO SCROLL" };
        let column = |(at, column): (usize, &Column)| {
            let (name, sql_type) = (sql::quote_name(&column.name), &column.sql_type);
            match column.shape {
                Shape::Row => format!("(${}::{sql_type}[])[i] AS {name}", at + 1),
                // Only the type's modifier is left to a cast from the type to itself.
                _ => format!("c{at}::{sql_type} AS {name}"),
            }
        };
        let columns: Vec<String> = self.columns.iter().enumerate().map(column).collect();
        let array = |(at, column): (usize, &Column)| {
            let number = at + 1;
            match column.shape {
                Shape::Row => None,
                Shape::Element => Some(format!("${number}::{}[]", column.sql_type)),
                Shape::Array | Shape::None => Some(format!("${number}::text[]")),
            }
        };
        let arrays: Vec<String> = self.columns.iter().enumerate().filter_map(array).collect();
        let unnested =
            |(at, column): (usize, &Column)| (column.shape != Shape::Row).then(|| format!("c{at}"));
        let mut names: Vec<String> = self.columns.iter().enumerate().filter_map(unnested).collect();
        names.push("i".into());
        let numbers = format!("generate_series(1, {})", self.rows.len());
        let rows = match arrays.is_empty() {
            true => numbers,
            false => format!("ROWS FROM (unnest({}), {numbers})", arrays.join(", ")),
        };
        let from = format!("{rows} u ({})", names.join(", "));
        let params = (0..columns.len()).map(|at| self.array(at)).collect();
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
        let delimiter = match self.columns.get(at) {
            Some(Column { shape: Shape::Element | Shape::Row, delimiter, .. }) => *delimiter,
            _ => ',',
        };
        format!("{{{}}}", elements.join(&delimiter.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, sql_type: &str) -> Column {
        Column {
            name: name.into(),
            sql_type: sql_type.into(),
            shape: Shape::Element,
            delimiter: ',',
        }
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
             c1::character varying(5) AS \"odd \"\" name\" FROM ROWS FROM (unnest($1::integer[], $2::character varying(5)[]), generate_series(1, 2)) u (c0, c1, i)"
        );
        assert_eq!(params, &["{\"1\",NULL}", "{\"a\\\"\\\\b\",\"\"}"]);
        assert_eq!(statements[1].0, "MOVE ABSOLUTE 2 FROM \"c 1\"");
    }

    #[test]
    fn rows_without_columns_are_counted() {
        let contents =
            Contents { columns: vec![], rows: vec![vec![], vec![], vec![]], position: 0 };
        let statements = contents.declare("c", Cursor { is_scrollable: false });
        let sql =
            "DECLARE \"c\" NO SCROLL CURSOR WITH HOLD FOR SELECT  FROM generate_series(1, 3) u (i)";
        assert_eq!(statements, [(sql.to_owned(), vec![])]);
    }

    #[test]
    fn types_that_no_cast_reads_are_named() {
        let with = |name| Contents { columns: vec![column("x", name)], ..Contents::default() };
        assert_eq!(with("record[]").refused(), Some("record[]"));
        let mut without = with("anyarray");
        without.columns[0].shape = Shape::None;
        assert_eq!(without.refused(), Some("anyarray"));
        assert_eq!(with("integer").refused(), None);
    }
}
