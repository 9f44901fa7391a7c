//! The little that is read from statement text: where statements end and which words stand where.
//!
//! This is a lexer by the rules of `src/backend/parser/scan.l`, not a parser: enough to tell one statement from
//! several, to find names, and to show a statement without its literals. What it cannot tell for sure it says.

/// One token: what it is and where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token<'a> {
    pub kind: Kind,
    pub text: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A keyword or a name without quotes.
    Word,
    /// A name in double quotes.
    Quoted,
    /// A string literal of any kind.
    Text,
    Number,
    /// `$1`
    Param,
    Semicolon,
    /// Any other single character, and `..`.
    Other,
    /// A comment or a quote that does not end, or a backslash whose meaning hangs on a setting.
    Unclear,
}

impl Token<'_> {
    pub fn is_word(&self, word: &str) -> bool {
        self.kind == Kind::Word && self.text.eq_ignore_ascii_case(word.as_bytes())
    }

    pub fn is_other(&self, byte: u8) -> bool {
        self.kind == Kind::Other && self.text == [byte]
    }
}

/// The tokens of a text, without white space and comments.
#[derive(Debug, Clone)]
pub struct Tokens<'a> {
    rest: &'a [u8],
}

impl<'a> Tokens<'a> {
    pub fn new(sql: &'a [u8]) -> Tokens<'a> {
        Tokens { rest: sql }
    }

    fn take(&mut self, kind: Kind, len: usize) -> Token<'a> {
        let (text, rest) = self.rest.split_at(len.min(self.rest.len()));
        self.rest = rest;
        Token { kind, text }
    }

    fn unclear(&mut self) -> Token<'a> {
        self.take(Kind::Unclear, usize::MAX)
    }

    /// Passes white space and comments; false if a comment does not end.
    fn skip_blank(&mut self) -> bool {
        loop {
            match self.rest {
                [b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c, ..] => self.rest = &self.rest[1..],
                [b'-', b'-', ..] => {
                    let end = self.rest.iter().position(|b| matches!(b, b'\n' | b'\r'));
                    self.rest = &self.rest[end.unwrap_or(self.rest.len())..];
                }
                [b'/', b'*', ..] => match comment_len(self.rest) {
                    Some(len) => self.rest = &self.rest[len..],
                    None => return false,
                },
                _ => return true,
            }
        }
    }
}

impl<'a> Iterator for Tokens<'a> {
    type Item = Token<'a>;

    fn next(&mut self) -> Option<Token<'a>> {
        if !self.skip_blank() {
            return Some(self.unclear());
        }
        let rest = self.rest;
        let token = match rest {
            [] => return None,
            [b';', ..] => self.take(Kind::Semicolon, 1),
            [b'\'', ..] => match string_len(rest, 0, Escapes::Plain) {
                Some(len) => self.take(Kind::Text, len),
                None => self.unclear(),
            },
            [b'e' | b'E', b'\'', ..] => match string_len(rest, 1, Escapes::Backslash) {
                Some(len) => self.take(Kind::Text, len),
                None => self.unclear(),
            },
            [b'b' | b'B' | b'x' | b'X' | b'n' | b'N', b'\'', ..] => {
                match string_len(rest, 1, Escapes::Plain) {
                    Some(len) => self.take(Kind::Text, len),
                    None => self.unclear(),
                }
            }
            [b'u' | b'U', b'&', b'\'', ..] => match string_len(rest, 2, Escapes::Unicode) {
                Some(len) => self.take(Kind::Text, len),
                None => self.unclear(),
            },
            // The name under U&"..." depends on an escape character that may follow.
            [b'u' | b'U', b'&', b'"', ..] => self.unclear(),
            [b'"', ..] => match quoted_len(rest) {
                Some(len) => self.take(Kind::Quoted, len),
                None => self.unclear(),
            },
            [b'$', b'0'..=b'9', ..] => {
                let digits = rest[1..].iter().take_while(|b| b.is_ascii_digit()).count();
                self.take(Kind::Param, 1 + digits)
            }
            [b'$', ..] => match dollar_len(rest) {
                Some(len) => self.take(Kind::Text, len),
                None => self.unclear(),
            },
            [first, ..] if is_word_start(*first) => {
                let len = rest.iter().take_while(|b| is_word_part(**b)).count();
                self.take(Kind::Word, len)
            }
            // Of ranges in PL/pgSQL.
            [b'.', b'.', ..] => self.take(Kind::Other, 2),
            [b'0'..=b'9', ..] | [b'.', b'0'..=b'9', ..] => match number_len(rest) {
                Some(len) => self.take(Kind::Number, len),
                None => self.unclear(),
            },
            _ => self.take(Kind::Other, 1),
        };
        Some(token)
    }
}

fn is_word_start(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80
}

fn is_word_part(byte: u8) -> bool {
    is_word_start(byte) || byte.is_ascii_digit() || byte == b'$'
}

/// The length of the number that `text` begins with. None if a name follows at once, which no server takes from 15 on.
fn number_len(text: &[u8]) -> Option<usize> {
    let digits = |from: usize, is_digit: fn(&u8) -> bool| {
        let rest = text.get(from..).unwrap_or_default();
        from + rest.iter().take_while(|byte| is_digit(byte) || **byte == b'_').count()
    };
    let mut len = match text {
        [b'0', b'x' | b'X' | b'o' | b'O' | b'b' | b'B', ..] => digits(2, u8::is_ascii_hexdigit),
        _ => {
            let mut len = digits(0, u8::is_ascii_digit);
            // `1..n` of PL/pgSQL are two numbers, or one and a name.
            if text.get(len) == Some(&b'.') && text.get(len + 1) != Some(&b'.') {
                len = digits(len + 1, u8::is_ascii_digit);
            }
            len
        }
    };
    if let Some(b'e' | b'E') = text.get(len) {
        let sign = usize::from(matches!(text.get(len + 1), Some(b'+' | b'-')));
        text.get(len + 1 + sign).filter(|byte| byte.is_ascii_digit())?;
        len = digits(len + 1 + sign, u8::is_ascii_digit);
    }
    let goes_on = text.get(len).is_some_and(|byte| is_word_part(*byte));
    (!goes_on).then_some(len)
}

/// Comments nest, as the standard and `xcstart` say.
fn comment_len(text: &[u8]) -> Option<usize> {
    let (mut depth, mut at) = (0, 0);
    while at < text.len() {
        match text.get(at..at + 2) {
            Some(b"/*") => {
                depth += 1;
                at += 2;
            }
            Some(b"*/") => {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => at += 1,
        }
    }
    None
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Escapes {
    /// A backslash means itself if `standard_conforming_strings` is on, which is not known here.
    Plain,
    Backslash,
    Unicode,
}

fn string_len(text: &[u8], quote: usize, escapes: Escapes) -> Option<usize> {
    let mut at = quote + 1;
    loop {
        match (text.get(at)?, escapes) {
            (b'\'', _) if text.get(at + 1) == Some(&b'\'') => at += 2,
            (b'\'', _) => return Some(at + 1),
            (b'\\', Escapes::Backslash) => at += 2,
            (b'\\', Escapes::Plain) => return None,
            _ => at += 1,
        }
    }
}

fn quoted_len(text: &[u8]) -> Option<usize> {
    let mut at = 1;
    loop {
        match text.get(at)? {
            b'"' if text.get(at + 1) == Some(&b'"') => at += 2,
            b'"' => return Some(at + 1),
            _ => at += 1,
        }
    }
}

fn dollar_len(text: &[u8]) -> Option<usize> {
    let tag_len = text[1..].iter().take_while(|b| is_word_part(**b) && **b != b'$').count();
    if text.get(1 + tag_len) != Some(&b'$') {
        return None;
    }
    let tag = &text[..tag_len + 2];
    let body = &text[tag.len()..];
    let end = body.windows(tag.len()).position(|window| window == tag)?;
    Some(tag.len() + end + tag.len())
}

/// The statements of a text, without the semicolons between them; empty ones are left out. None if the text does not
/// tell without knowing the session's settings, or may hold a body in SQL, whose semicolons end no statement.
pub fn statements(sql: &[u8]) -> Option<Vec<&[u8]>> {
    let (mut statements, mut begin, mut end, mut depth) = (Vec::new(), None, 0, 0_i64);
    for token in Tokens::new(sql) {
        // A token is a part of the text, so this is where it stands in it.
        let at = (token.text.as_ptr() as usize).checked_sub(sql.as_ptr() as usize)?;
        match token.kind {
            Kind::Unclear => return None,
            Kind::Semicolon if depth == 0 => {
                statements.extend(begin.take().and_then(|begin: usize| sql.get(begin..end)));
                continue;
            }
            _ if token.is_word("atomic") => return None,
            // A rule's actions stand in parentheses.
            _ if token.is_other(b'(') => depth += 1,
            _ if token.is_other(b')') => depth -= 1,
            _ => (),
        }
        begin.get_or_insert(at);
        end = at + token.text.len();
    }
    statements.extend(begin.and_then(|begin| sql.get(begin..end)));
    Some(statements)
}

/// The one statement of a text that prepares `name`.
pub fn prepare_of<'a>(sql: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let prepares = |statement: &&&[u8]| {
        let mut tokens = Tokens::new(statement);
        tokens.next().is_some_and(|token| token.is_word("prepare"))
            && tokens.next().and_then(|token| name_of(&token)).is_some_and(|found| found == name)
    };
    let statements = statements(sql)?;
    let mut found = statements.iter().filter(prepares);
    match (found.next(), found.next()) {
        (Some(one), None) => Some(one),
        _ => None,
    }
}

/// The text that a name stands for: folded to lower case, or unquoted.
pub fn name_of(token: &Token<'_>) -> Option<String> {
    let text = std::str::from_utf8(token.text).ok()?;
    match token.kind {
        Kind::Word => Some(text.to_ascii_lowercase()),
        Kind::Quoted => Some(text[1..text.len() - 1].replace("\"\"", "\"")),
        _ => None,
    }
}

/// The text that a plain literal stands for, `'it''s'`. None for literals with escapes.
pub fn literal_of(token: &Token<'_>) -> Option<String> {
    let text = std::str::from_utf8(token.text).ok()?;
    let inner = text.strip_prefix('\'')?.strip_suffix('\'')?;
    (token.kind == Kind::Text).then(|| inner.replace("''", "'"))
}

/// Quotes a name for use in SQL.
pub fn quote_name(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quotes a value for use in SQL, whatever `standard_conforming_strings` says.
pub fn quote_literal(value: &str) -> String {
    let quoted = value.replace('\'', "''");
    if quoted.contains('\\') {
        format!("E'{}'", quoted.replace('\\', "\\\\"))
    } else {
        format!("'{quoted}'")
    }
}

/// An element of an array in text form.
pub fn array_element(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// A statement as it may be shown: literals replaced, at most `len_max` characters. Statements hold secrets.
pub fn shown(sql: &[u8], len_max: usize) -> String {
    let mut out = String::new();
    let mut before = Kind::Other;
    for token in Tokens::new(sql) {
        let glued = matches!(token.kind, Kind::Other | Kind::Semicolon) || before == Kind::Other;
        if !out.is_empty() && !glued {
            out.push(' ');
        }
        match token.kind {
            Kind::Text => out.push_str("'?'"),
            Kind::Number => out.push('?'),
            Kind::Unclear => out.push('…'),
            _ => out.push_str(&String::from_utf8_lossy(token.text)),
        }
        before = token.kind;
        if out.chars().count() > len_max {
            out = out.chars().take(len_max).collect();
            out.push('…');
            break;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn count(sql: &str) -> Option<usize> {
        statements(sql.as_bytes()).map(|all| all.len())
    }

    #[test]
    fn statements_are_counted_outside_quotes_and_comments() {
        assert_eq!(count(""), Some(0));
        assert_eq!(count(" ; ;; -- nothing"), Some(0));
        assert_eq!(count("select 1"), Some(1));
        assert_eq!(count("select 1; prepare s as select 2; select 3"), Some(3));
        assert_eq!(count("select ';' /* ; /* ; */ ; */ || $a$;$a$ || $$;$$, \";\""), Some(1));
        assert_eq!(count("select e'\\';' ; select 2"), Some(2));
        assert_eq!(count("select 'it''s;' ; select $1"), Some(2));
    }

    #[test]
    fn what_hangs_on_settings_is_unclear() {
        assert_eq!(count("select 'a\\'; select 2"), None);
        assert_eq!(count("select 'open"), None);
        assert_eq!(count("select 1 /* open"), None);
        assert_eq!(count("select $a$ open"), None);
    }

    #[test]
    fn semicolons_that_end_no_statement_are_seen() {
        assert_eq!(
            count("create rule r as on delete to t do (select 1; select 2); select 3"),
            Some(2)
        );
        let body = "create function f() returns int begin atomic select 1; end";
        assert_eq!(count(body), None);
    }

    #[test]
    fn a_prepare_is_cut_out_of_its_string() {
        let cut = |sql: &'static str, name| {
            prepare_of(sql.as_bytes(), name).map(|own| std::str::from_utf8(own).unwrap())
        };
        let sql = "select 1; /* x */ PREPARE \"A b\" (int) AS select $1 || ';' -- y\n; prepare c as select 2 ;";
        assert_eq!(cut(sql, "A b"), Some("PREPARE \"A b\" (int) AS select $1 || ';'"));
        assert_eq!(cut(sql, "c"), Some("prepare c as select 2"));
        assert_eq!(cut(sql, "d"), None);
        assert_eq!(cut("prepare a as select 1; deallocate a; prepare a as select 2", "a"), None);
        assert_eq!(cut("select 'a\\'; prepare a as select 2", "a"), None);
    }

    #[test]
    fn names_and_literals_give_what_they_stand_for() {
        let tokens: Vec<Token<'_>> = Tokens::new(b"SET App.\"User\"\"s\" = 'it''s'").collect();
        assert!(tokens[0].is_word("set"));
        assert_eq!(name_of(&tokens[1]), Some("app".into()));
        assert!(tokens[2].is_other(b'.'));
        assert_eq!(name_of(&tokens[3]), Some("User\"s".into()));
        assert_eq!(literal_of(&tokens[5]), Some("it's".into()));
    }

    #[test]
    fn quoting_survives_backslashes_and_quotes() {
        assert_eq!(quote_name("a\"b"), "\"a\"\"b\"");
        assert_eq!(quote_literal("it's"), "'it''s'");
        assert_eq!(quote_literal("a\\'b"), "E'a\\\\''b'");
    }

    #[test]
    fn a_shown_statement_has_no_literals() {
        let sql = b"select dblink_connect('x', 'password=sesame'), 42, $1";
        assert_eq!(shown(sql, 80), "select dblink_connect('?','?'),?,$1");
        assert_eq!(shown(b"select 'a\\'b', 'secret'", 80), "select …");
        assert_eq!(shown(b"select aaaa, bbbb", 8), "select a…");
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(sql in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (statements(&sql), prepare_of(&sql, "a"), shown(&sql, 20));
        }

        #[test]
        fn tokens_always_get_on(sql in "[a-zA-Z'\"$;/*\\-\\\\ 0-9.]{0,60}") {
            let total: usize = Tokens::new(sql.as_bytes()).map(|token| {
                assert!(!token.text.is_empty());
                token.text.len()
            }).sum();
            prop_assert!(total <= sql.len());
        }
    }
}
