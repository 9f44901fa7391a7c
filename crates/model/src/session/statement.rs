//! What the text of a prepared statement tells: whether it can be prepared again, and as the same.

use std::collections::BTreeSet;

use super::snapshot::Prepared;
use crate::sql;

/// Leaves of a statement's text what prepares it again, or says why nothing does. For a query string of several
/// statements the catalog holds the whole string: running it again would run the others again. Inside a DO block or a
/// function the text is clean.
pub(super) fn repeatable(name: &str, prepared: &mut Prepared) -> Result<(), &'static str> {
    if prepared.from_sql {
        let sql = prepared.text.as_bytes();
        let own = match sql::statements(sql) {
            None => return Err("has a text that cannot be told apart without its settings"),
            Some(statements) if statements.len() > 1 => sql::prepare_of(sql, name)
                .ok_or("was prepared together with others of its name in one string")?,
            Some(_) if sql::Tokens::new(sql).next().is_some_and(|t| t.is_word("prepare")) => sql,
            Some(_) => return Err("was prepared inside another statement"),
        };
        prepared.text = String::from_utf8_lossy(own).into_owned();
    }
    match holds_its_time(prepared.text.as_bytes()) {
        true => Err("holds the time at which it was prepared"),
        false => Ok(()),
    }
}

/// Whether a statement holds a literal that is read once, when it is prepared (manual, "Special Values" of dates),
/// also next to a time. Every kind of literal is looked at.
pub fn holds_its_time(sql: &[u8]) -> bool {
    const NOW: [&str; 5] = ["now", "today", "tomorrow", "yesterday", "allballs"];
    // `Wed tomorrow 08:00 pm America/New_York` has as many as there can be; a list or a range has more of them.
    const PARTS_MAX: usize = 5;
    let is_list = |text: &str| text.trim_start().starts_with(['{', '[', '(']);
    let mut before = sql::Kind::Other;
    sql::Tokens::new(sql).any(|token| {
        let continues = std::mem::replace(&mut before, token.kind) == sql::Kind::Text;
        if token.kind != sql::Kind::Text {
            return false;
        }
        let text = String::from_utf8_lossy(token.text).to_ascii_lowercase();
        let inner = match text.strip_prefix('$').and_then(|rest| rest.split_once('$')) {
            Some((tag, body)) => body.get(..body.len().saturating_sub(tag.len() + 2)),
            None => text.split_once('\'').map(|(_, rest)| rest.trim_end_matches('\'')),
        };
        // Code that asks for the time does so when it runs.
        let inner = &inner.unwrap_or_default().replace("now(", "(");
        // A word that is put together from parts or from codes is not read here.
        let is_coded = continues || (!text.starts_with('\'') && inner.contains('\\'));
        let words = || inner.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
        let is_short = || inner.split_whitespace().count() <= PARTS_MAX || is_list(inner);
        is_coded || (words().any(|word| NOW.contains(&word)) && is_short())
    })
}

/// Whether the meaning of a statement may hang on how literals are read.
pub fn has_literals(sql: &[u8]) -> bool {
    sql::Tokens::new(sql).any(|token| matches!(token.kind, sql::Kind::Text | sql::Kind::Unclear))
}

/// Whether settings decide what a literal of the statement is. DateStyle, TimeZone and IntervalStyle decide only about
/// literals with digits, of which those of up to three digits, alone or behind a word, are no date and no time of day; array_nulls about lists;
/// others about a backslash, XML, or letters that hang on the encoding.
pub fn is_read_by_settings(sql: &[u8]) -> bool {
    let mut has_text = false;
    let mut names_xml = false;
    let reads = sql::Tokens::new(sql).any(|token| match token.kind {
        sql::Kind::Unclear => true,
        sql::Kind::Text => {
            has_text = true;
            let quoted = token.text.iter().filter(|byte| !matches!(byte, b'\'' | b'$'));
            let digits = quoted.skip_while(|byte| byte.is_ascii_alphabetic() || **byte == b'_');
            let is_short = digits.clone().all(u8::is_ascii_digit) && digits.count() <= 3;
            let is_odd = |byte: &u8| matches!(byte, b'\\' | b'<' | b'{') || byte.is_ascii_digit();
            !is_short && token.text.iter().any(is_odd)
        }
        sql::Kind::Word => {
            names_xml |= token.text.get(..3).is_some_and(|word| word.eq_ignore_ascii_case(b"xml"));
            false
        }
        _ => false,
    });
    reads || !sql.is_ascii() || (has_text && names_xml)
}

/// A name in a statement that is in `names`.
pub fn names_one_of(sql: &[u8], names: &BTreeSet<String>) -> Option<String> {
    let named = sql::Tokens::new(sql).filter_map(|token| sql::name_of(&token));
    named.into_iter().find(|name| names.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_literal_of_now_is_seen_in_every_quote() {
        for sql in [
            "'now'",
            "$$now$$",
            "$a$ today $a$",
            "E'now'",
            "'tomorrow 08:00'",
            "n'yesterday'",
            "'{now}'",
            "'[now,)'",
            "'[now,infinity)'",
            "'{now,infinity}'",
            "'today Europe/Berlin'",
            "'tomorrow 08:00 America/New_York'",
            "'allballs'",
            "E'\\x6eow'",
            "U&'n\\006fw'",
            "'no'\n'w'",
        ] {
            assert!(holds_its_time(format!("select {sql}::timestamptz").as_bytes()), "{sql}");
        }
        for sql in [
            "'01/02/2024'",
            "$$2024-01-02$$",
            "E'10:00'",
            "'Jan 2 2024'",
            "'20240102'",
            "'1000'",
            "'J2451187'",
            "'y2001m02d04'",
            "'-1 day 2 hours'",
            "'{a,NULL}'",
            "'abc'::xml",
            "'\\x00'",
        ] {
            assert!(is_read_by_settings(format!("select {sql}").as_bytes()), "{sql}");
        }
        for sql in ["now()", "'active'", "'5'", "'123'", "'s1'", "'a_b12'", "1 / 2 - 3", "$1"] {
            assert!(!is_read_by_settings(format!("select {sql}").as_bytes()), "{sql}");
        }
        for sql in ["now()", "'now or never, said the president'", "$$SELECT now()$$", "'nowhere'"]
        {
            assert!(!holds_its_time(format!("select {sql}").as_bytes()), "{sql}");
        }
    }
}
