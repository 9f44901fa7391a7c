//! What a command does to what sessions share: by its text before it is sent, and by its tag when it has completed.

use crate::sql::{self, Tokens};

/// What such a command defines may be temporary.
pub fn is_of_relation(tag: &[u8]) -> bool {
    let object = tag.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
    matches!(object, b"TABLE" | b"VIEW" | b"SEQUENCE" | b"INDEX" | b"TYPE")
}

/// Something that other sessions' statements may use is made, changed or gone.
pub fn redefines(tag: &[u8]) -> bool {
    let verb = [b"CREATE ".as_slice(), b"ALTER ", b"DROP ", b"IMPORT ", b"COMMIT PREPARED"];
    let by_itself = [
        b"TABLE AS".as_slice(),
        b"INDEX",
        b"ROLE",
        b"DATABASE",
        b"PUBLICATION",
        b"SUBSCRIPTION",
        b"STATISTICS",
    ];
    verb.iter().any(|verb| {
        tag.strip_prefix(*verb)
            .is_some_and(|object| !by_itself.iter().any(|one| object.starts_with(one)))
    })
}

/// The text does nothing but to end a transaction, whatever names mean: somebody may wait for that.
pub fn ends_transaction(sql: &[u8]) -> bool {
    let mut tokens = Tokens::new(sql);
    let ends = |token: sql::Token<'_>| {
        ["commit", "end", "rollback", "abort"].iter().any(|word| token.is_word(word))
    };
    tokens.next().is_some_and(ends)
        && !tokens.skip_while(|token| token.kind != sql::Kind::Semicolon).any(|token| {
            // Nothing behind it.
            token.kind != sql::Kind::Semicolon
        })
}

/// What a text deallocates, if that is all it does.
#[derive(Debug, PartialEq, Eq)]
pub enum Deallocation {
    All,
    /// The name, which stands between two places of the text.
    One {
        name: Box<[u8]>,
        start: usize,
        end: usize,
    },
}

pub fn deallocation(sql: &[u8]) -> Option<Deallocation> {
    let mut tokens = Tokens::new(sql).filter(|token| token.kind != sql::Kind::Semicolon);
    tokens.next().filter(|token| token.is_word("deallocate"))?;
    let mut name = tokens.next()?;
    // `DEALLOCATE prepare` is about a statement of that name.
    if name.is_word("prepare")
        && let Some(next) = tokens.next()
    {
        name = next;
    }
    if tokens.next().is_some() {
        return None;
    }
    if name.is_word("all") {
        return Some(Deallocation::All);
    }
    let start = (name.text.as_ptr() as usize).checked_sub(sql.as_ptr() as usize)?;
    let end = start + name.text.len();
    let name = sql::name_of(&name)?.into_bytes().into();
    Some(Deallocation::One { name, start, end })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_is_defined_for_others_is_told_from_the_rest() {
        for tag in [
            "CREATE TABLE",
            "ALTER FUNCTION",
            "DROP VIEW",
            "IMPORT FOREIGN SCHEMA",
            "COMMIT PREPARED",
        ] {
            assert!(redefines(tag.as_bytes()), "{tag}");
        }
        for tag in ["CREATE INDEX", "ALTER ROLE", "SELECT 1", "COMMIT", "CREATE DATABASE"] {
            assert!(!redefines(tag.as_bytes()), "{tag}");
        }
        assert!(is_of_relation(b"CREATE TABLE") && !is_of_relation(b"CREATE FUNCTION"));
    }

    #[test]
    fn the_end_of_a_transaction_is_alone() {
        for sql in ["commit", "COMMIT;", " /* x */ END ;;", "rollback to a", "abort and chain"] {
            assert!(ends_transaction(sql.as_bytes()), "{sql}");
        }
        for sql in ["", "commitment", "commit; select f()", "select 1; commit", "begin"] {
            assert!(!ends_transaction(sql.as_bytes()), "{sql}");
        }
    }

    #[test]
    fn a_deallocation_says_where_its_name_is() {
        let sql = b"DEALLOCATE PREPARE \"A b\" ;";
        let Some(Deallocation::One { name, start, end }) = deallocation(sql) else { panic!() };
        assert_eq!((&*name, &sql[start..end]), (b"A b".as_slice(), b"\"A b\"".as_slice()));
        assert_eq!(deallocation(b"deallocate all"), Some(Deallocation::All));
        assert!(matches!(deallocation(b"DEALLOCATE \"all\""), Some(Deallocation::One { .. })));
        assert!(matches!(deallocation(b"DEALLOCATE prepare"), Some(Deallocation::One { .. })));
        for sql in ["DEALLOCATE", "DEALLOCATE a; SELECT 1", "SELECT 1", "DEALLOCATE a b"] {
            assert_eq!(deallocation(sql.as_bytes()), None, "{sql}");
        }
    }
}
