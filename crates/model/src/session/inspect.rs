//! What statement text and command tags hint at.
//!
//! Most state is read from the server's catalogs when a session is captured, whatever put it there. This file
//! is about the little that no catalog shows: custom settings, whose names must be known to be asked for, and
//! things inside the server process. A hint never decides that a session is clean by itself; it names what to
//! ask for, or pins.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use aho_corasick::{AhoCorasick, MatchKind};

use super::pin::Pin;
use crate::sql::{self, Kind, Token, Tokens};

/// Longest statement text that a pin shows.
const SHOWN_LEN_MAX: usize = 80;
/// Custom settings that one session may be known to use.
pub const CUSTOM_NAMES_MAX: usize = 256;
/// Longest custom name that is believed.
const NAME_LEN_MAX: usize = 128;

/// Libraries that keep nothing for their session but settings and what they can find out anew, by their sources. Others
/// may hold connections, keys or random seeds.
const LIBRARIES: [&str; 10] = [
    "auth_delay",
    "auto_explain",
    "citext",
    "hstore",
    "ltree",
    "passwordcheck",
    "pg_hint_plan",
    "pg_trgm",
    "plpgsql",
    "unaccent",
];

/// Words that raise a question, in the order of [`Word`].
const WORDS: [&str; 13] = [
    "set_config",
    "setseed",
    "setval",
    "dblink",
    "pg_backup_start",
    "pg_start_backup",
    "pg_replication_origin_session_setup",
    "load",
    "isolation",
    "deferrable",
    "only",
    "write",
    // Code in a literal, for a function that runs it.
    "'set",
];

static FINDER: LazyLock<AhoCorasick> = LazyLock::new(|| {
    AhoCorasick::builder()
        .ascii_case_insensitive(true)
        .match_kind(MatchKind::LeftmostLongest)
        .build(WORDS)
        .expect("a few short words make an automaton")
});

/// Bytes of a long text that are looked at again with its next part, so that no word hides at the seam.
pub const OVERLAP: usize = 64;

/// What a session's statements hint at. Empty for almost every session, and then without memory.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hints {
    /// Custom settings that were named.
    pub custom: BTreeSet<String>,
    /// Pins that only text can show; they stay until the session ends.
    pub pins: BTreeSet<Pin>,
    /// `setval` was named, so `currval` may have a value where `lastval` has none.
    pub setval: bool,
    /// Transactions were given modes of their own, which a chained one inherits.
    pub modes: bool,
    /// The search path was named: prepared statements may be read anew when they are used next.
    pub paths: bool,
    /// Libraries loaded by LOAD, of those that keep nothing for their session but settings.
    pub libraries: BTreeSet<String>,
    /// Named by a LOAD that has not completed yet.
    loading: BTreeSet<String>,
}

/// How much of a statement a text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extent {
    Whole,
    /// What it says may go on beyond its end.
    Part,
}

/// Where a text stands that is looked at.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// The statement as it was sent. Only that may be shown: what stands inside a literal may be a secret.
    statement: &'a [u8],
    extent: Extent,
    /// Bodies within bodies.
    depth: usize,
}

impl Place<'_> {
    fn shown(self) -> String {
        match self.extent {
            Extent::Whole => sql::shown(self.statement, SHOWN_LEN_MAX),
            // It may begin inside a literal.
            Extent::Part => "a long statement".into(),
        }
    }
}

/// Bodies within bodies that are looked into; deeper ones pin.
const DEPTH_MAX: usize = 8;
/// Pins that one session may have by its texts.
const PINS_MAX: usize = 64;

/// Functions of PostgreSQL that leave what no catalog shows, by OID (`pg_proc.dat`), for those who call them by
/// the function call protocol.
const SET_CONFIG_OID: u32 = 2078;
const SETSEED_OID: u32 = 1599;
const SETVAL_OIDS: [u32; 2] = [1576, 1765];

impl Hints {
    pub fn is_empty(&self) -> bool {
        *self == Hints::default()
    }

    /// The number of pins is bounded: one is enough to hold a session.
    fn pin(&mut self, pin: Pin) {
        if self.pins.len() < PINS_MAX {
            self.pins.insert(pin);
        }
    }

    fn pin_custom(&mut self, place: Place<'_>) {
        self.pin(Pin::CustomSettings { statement: place.shown() });
    }

    fn learn(&mut self, name: String, place: Place<'_>) {
        if self.custom.len() < CUSTOM_NAMES_MAX && name.len() <= NAME_LEN_MAX {
            self.custom.insert(name);
        } else {
            self.pin_custom(place);
        }
    }

    /// Looks at the text of a statement.
    #[inline]
    pub fn on_statement(&mut self, sql: &[u8]) {
        if begins_with_set(sql) || (FINDER.is_match(sql) | has_several(sql) | quotes_set(sql)) {
            self.look_closely(sql, Place { statement: sql, extent: Extent::Whole, depth: 0 });
        }
    }

    /// Looks at a part of a long statement. A name that may go on in the next part pins.
    #[cold]
    pub fn on_part(&mut self, sql: &[u8]) {
        if FINDER.is_match(sql) || contains_set(sql) {
            self.look_closely(sql, Place { statement: sql, extent: Extent::Part, depth: 0 });
        }
    }

    /// A function is called by the function call protocol, by its OID.
    #[cold]
    pub fn on_function_call(&mut self, oid: u32) {
        let statement = || format!("function call {oid}");
        match oid {
            SET_CONFIG_OID => {
                self.pin(Pin::CustomSettings { statement: statement() });
            }
            SETSEED_OID => self.pin(Pin::Seed { statement: statement() }),
            oid if SETVAL_OIDS.contains(&oid) => self.setval = true,
            _ => (),
        }
    }

    /// A command has completed. LOAD leaves nothing in any catalog before PostgreSQL 18.
    #[inline]
    pub fn on_command_tag(&mut self, tag: &[u8]) {
        if tag.starts_with(b"LOAD") {
            if self.loading.is_empty() {
                self.pin(Pin::Library { name: "(not seen)".into() });
            }
            self.libraries.append(&mut self.loading);
        }
    }

    /// The server has refused something, perhaps a LOAD.
    #[inline]
    pub fn on_error(&mut self) {
        self.loading.clear();
    }

    /// `LOAD 'name'`, a statement of its own.
    fn on_load(&mut self, tokens: &[Token<'_>], at: usize, place: Place<'_>) {
        let begins = at.checked_sub(1).and_then(|before| tokens.get(before));
        let ends = tokens.get(at + 2);
        let is_end = |token: Option<&Token<'_>>| token.is_none_or(|t| t.kind == Kind::Semicolon);
        let is_whole =
            place.depth == 0 && place.extent == Extent::Whole && is_end(begins) && is_end(ends);
        let name = tokens.get(at + 1).and_then(sql::literal_of);
        match name.filter(|name| is_whole && LIBRARIES.contains(&library(name))) {
            Some(name) => drop(self.loading.insert(name)),
            None => self.pin(Pin::Library { name: place.shown() }),
        }
    }

    #[cold]
    fn look_closely(&mut self, sql: &[u8], place: Place<'_>) {
        if place.depth > DEPTH_MAX {
            return self.pin_custom(place);
        }
        let tokens: Vec<Token<'_>> = Tokens::new(sql).collect();
        let shown = || place.shown();
        // In a part the rest may come.
        let calls = |at: usize| {
            tokens.get(at + 1).map_or(place.extent == Extent::Part, |next| next.is_other(b'('))
        };
        for (at, token) in tokens.iter().enumerate() {
            if token.is_word("set") || token.is_word("reset") {
                self.on_set(&tokens[at + 1..], place);
            }
            if token.kind == Kind::Text || token.kind == Kind::Unclear {
                // A function body, a DO block or a text that cannot be read: words inside count, too.
                self.on_opaque(*token, place);
            }
            let Some(name) = sql::name_of(token) else { continue };
            match name.as_str() {
                "set_config" => self.on_set_config(&tokens[at + 1..], place),
                "setval" => self.setval = true,
                "isolation" | "deferrable" => self.modes = true,
                "only" | "write" if at > 0 && tokens[at - 1].is_word("read") => self.modes = true,
                "setseed" if calls(at) => self.pin(Pin::Seed { statement: shown() }),
                "pg_backup_start" | "pg_start_backup" => {
                    self.pin(Pin::BackupMode { statement: shown() });
                }
                "pg_replication_origin_session_setup" => {
                    self.pin(Pin::ReplicationOrigin);
                }
                "load" if tokens.get(at + 1).is_some_and(|next| next.kind == Kind::Text) => {
                    self.on_load(&tokens, at, place);
                }
                // Code in a literal, whose rest is computed: `'load ' || name`, `format('load %L', name)`.
                "load" if at == 0 && place.depth > 0 && is_cut_off(sql, tokens.get(1)) => {
                    self.pin(Pin::Library { name: shown() });
                }
                name if name.starts_with("dblink") && calls(at) => {
                    self.pin(Pin::Dblink { statement: shown() });
                }
                _ => (),
            }
        }
    }

    /// `SET [SESSION | LOCAL] a.b { = | TO } ...`: a name with a dot is a custom setting. RESET makes one, too.
    fn on_set(&mut self, after: &[Token<'_>], place: Place<'_>) {
        let keyword = |at: usize| {
            let is_name = after.get(at + 1).is_some_and(|next| next.is_other(b'.'));
            !is_name && after.get(at).is_some_and(|t| t.is_word("session") || t.is_word("local"))
        };
        let name = after.get(usize::from(keyword(0))..).unwrap_or_default();
        let Some(first) = name.first() else {
            // `'set ' || name`, to be executed.
            return self.pin_custom(place);
        };
        if first.is_other(b'%') || first.is_other(b'\'') || first.kind == Kind::Unclear {
            return self.pin_custom(place);
        }
        self.paths |= sql::name_of(first)
            .is_some_and(|name| matches!(name.as_str(), "search_path" | "schema"));
        if sql::name_of(first).is_some_and(|name| name == "seed") {
            return self.pin(Pin::Seed { statement: place.shown() });
        }
        // One quoted word can hold the dot: `SET "app.x"`.
        if first.kind == Kind::Quoted
            && let Some(name) = sql::name_of(first).filter(|name| name.contains('.'))
        {
            return self.learn(name, place);
        }
        let [first, dot, rest @ ..] = name else {
            if place.extent == Extent::Part {
                self.pin_custom(place);
            }
            return;
        };
        if !dot.is_other(b'.') {
            return;
        }
        let mut parts = vec![sql::name_of(first)];
        let mut rest = std::iter::once(dot).chain(rest).peekable();
        while rest.next_if(|token| token.is_other(b'.')).is_some() {
            parts.push(rest.next().and_then(sql::name_of));
        }
        let ends_here = rest.next().is_none() && place.extent == Extent::Part;
        match parts.into_iter().collect::<Option<Vec<String>>>() {
            Some(parts) if !ends_here => self.learn(parts.join("."), place),
            _ => self.pin_custom(place),
        }
    }

    /// `set_config('a.b', ...)`: a literal name is learned, a name without a dot is in the catalogs.
    fn on_set_config(&mut self, after: &[Token<'_>], place: Place<'_>) {
        let [open, name, rest @ ..] = after else {
            if place.extent == Extent::Part {
                self.pin_custom(place);
            }
            return;
        };
        if !open.is_other(b'(') {
            return;
        }
        // The literal alone, or with a cast: whatever else stands there computes the name.
        let is_whole = match rest {
            [comma, ..] if comma.is_other(b',') => true,
            [a, b, kind, comma, ..] if a.is_other(b':') && b.is_other(b':') => {
                kind.kind == Kind::Word && comma.is_other(b',')
            }
            _ => false,
        };
        match sql::literal_of(name).filter(|_| is_whole) {
            // PostgreSQL compares names of settings without the case of ASCII letters (`guc_name_compare`).
            Some(name) if name.contains('.') => self.learn(name.to_ascii_lowercase(), place),
            Some(name) if name.eq_ignore_ascii_case("seed") => {
                self.pin(Pin::Seed { statement: place.shown() });
            }
            Some(name) => self.paths |= name.eq_ignore_ascii_case("search_path"),
            None => self.pin_custom(place),
        }
    }

    fn on_opaque(&mut self, token: Token<'_>, place: Place<'_>) {
        let text = token.text;
        let body = match text {
            [b'$', ..] if token.kind == Kind::Text => {
                let tag_len = text[1..].iter().position(|b| *b == b'$').map_or(0, |at| at + 2);
                text.get(tag_len..text.len().saturating_sub(tag_len)).unwrap_or_default()
            }
            // The text of a plain literal is code only for EXECUTE; words in it are hints all the same.
            [b'\'', body @ .., b'\''] if token.kind == Kind::Text => body,
            _ => {
                if FINDER.is_match(text) || contains_set(text) {
                    self.pin_custom(place);
                }
                return;
            }
        };
        if FINDER.is_match(body) || contains_set(body) {
            self.look_closely(body, Place { depth: place.depth + 1, ..place });
        }
    }
}

/// What stands behind the first word comes from elsewhere.
fn is_cut_off(sql: &[u8], next: Option<&Token<'_>>) -> bool {
    match next {
        None => sql.last().is_some_and(u8::is_ascii_whitespace),
        Some(next) => next.is_other(b'%'),
    }
}

/// A library's name without where it is: the target has it in its own directories.
fn library(name: &str) -> &str {
    let name = name.strip_prefix("$libdir/").unwrap_or(name);
    let name = name.strip_prefix("plugins/").unwrap_or(name);
    name.strip_suffix(".so").unwrap_or(name)
}

/// The first word is SET or RESET, after white space, comments or semicolons.
#[inline]
fn begins_with_set(sql: &[u8]) -> bool {
    // As the server's lexer, which counts the vertical tab among blanks.
    let blank = |b: &u8| b.is_ascii_whitespace() || *b == 0x0b;
    let start = sql.iter().position(|b| !blank(b)).unwrap_or(sql.len());
    match sql.get(start..) {
        Some([b's' | b'S', b'e' | b'E', b't' | b'T', next, ..]) => !next.is_ascii_alphanumeric(),
        Some([b'r' | b'R', b'e' | b'E', set @ ..]) => begins_with_set(set),
        Some([b'-', b'-', ..] | [b'/', b'*', ..] | [b';', ..]) => contains_set(&sql[start..]),
        _ => false,
    }
}

/// The text may hold a SET behind its first statement or in a body, next to a name with a dot.
#[inline]
fn has_several(sql: &[u8]) -> bool {
    sql.iter().any(|b| matches!(b, b';' | b'$')) && contains_set(sql)
}

/// A literal begins with SET or RESET, after blanks: code, for a function that runs it.
#[inline]
fn quotes_set(sql: &[u8]) -> bool {
    let mut rest = sql;
    while let Some(at) = rest.iter().position(|b| *b == b'\'') {
        rest = rest.get(at + 1..).unwrap_or_default();
        let mut code = rest;
        while let [b' ' | b'\t' | b'\n' | b'\r', after @ ..]
        | [b'\\', b'n' | b't' | b'r', after @ ..] = code
        {
            code = after;
        }
        let code = match code {
            [b'r' | b'R', b'e' | b'E', after @ ..] => after,
            _ => code,
        };
        if let [b's' | b'S', b'e' | b'E', b't' | b'T', next, ..] = code
            && !next.is_ascii_alphanumeric()
            && *next != b'_'
        {
            return true;
        }
    }
    false
}

fn contains_set(sql: &[u8]) -> bool {
    sql.windows(4).any(|w| {
        w[..3].eq_ignore_ascii_case(b"set") && !w[3].is_ascii_alphanumeric() && w[3] != b'_'
    })
}

#[cfg(test)]
mod tests;
