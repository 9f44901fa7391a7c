//! What a statement may leave in its session beyond the end of its transaction, told by its text before it is sent.
//!
//! A server connection is shared only among sessions that leave nothing there, so the lists are closed: a statement
//! is harmless if its first word is known to be, and if every name in it is. Whatever cannot be told leaves something.

use super::flight::Block;
use super::landscape::{Landscape, Meaning};
use crate::sql::{Kind, Token, Tokens};

/// What may be left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Leaves {
    /// Settings, the user and the role: what can be given to another server connection.
    pub settings: bool,
    /// Values of sequences, as `currval` and `lastval` give them.
    pub values: bool,
    /// Anything.
    pub something: bool,
    /// It may define something anew, which its command tag does not say. What others may leave hangs on it.
    pub defines: bool,
}

impl Leaves {
    pub const NOTHING: Leaves =
        Leaves { settings: false, values: false, something: false, defines: false };
    pub const SETTINGS: Leaves = Leaves { settings: true, ..Leaves::NOTHING };
    pub const VALUES: Leaves = Leaves { values: true, ..Leaves::NOTHING };
    pub const SOMETHING: Leaves = Leaves { something: true, ..Leaves::NOTHING };
    /// Nothing is known of it.
    pub const ANYTHING: Leaves = Leaves { defines: true, ..Leaves::SOMETHING };

    pub fn and(self, other: Leaves) -> Leaves {
        Leaves {
            settings: self.settings || other.settings,
            values: self.values || other.values,
            something: self.something || other.something,
            defines: self.defines || other.defines,
        }
    }

    /// Nothing is left in its session.
    pub fn is_nothing(self) -> bool {
        !(self.settings || self.values || self.something)
    }
}

/// What a text may leave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Footprint {
    pub leaves: Leaves,
    /// Settings that it sets, besides.
    pub sets: Vec<Assigned>,
    /// It sets something, if only for its transaction.
    pub sets_any: bool,
    /// It sets the search path.
    pub sets_path: bool,
    /// What it sets may decide how literals are read or constants are computed, which plans of functions remember.
    pub restyles: bool,
    /// What it sets may decide how literals of later statements are read.
    pub rereads: bool,
    /// What it does to the block of its transaction.
    pub block: Block,
}

impl Footprint {
    pub fn of(leaves: Leaves) -> Footprint {
        Footprint {
            leaves,
            sets: Vec::new(),
            sets_any: true,
            sets_path: true,
            restyles: true,
            rereads: true,
            block: Block::MayCommit,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.leaves.is_nothing() && self.sets.is_empty() && !self.sets_any
    }

    /// `folds`: see [`Landscape::folds`].
    fn set(&mut self, name: Option<&str>, folds: bool) {
        self.sets_any = true;
        // The role, and the user, decide what `$user` in it is.
        let of_path = |name| {
            matches!(name, "search_path" | "role" | "authorization" | "session_authorization")
        };
        self.sets_path |= name.is_none_or(of_path);
        self.rereads |= name.is_none_or(is_sensitive);
        self.restyles |= folds || name.is_none_or(is_sensitive);
        // Functions stay as they were compiled under it, and the seed of random numbers cannot be read.
        self.leaves.something |= name.is_some_and(|name| decides_compiling(name) || name == "seed");
    }
}

/// A setting that is set, by the name that `pg_settings` gives it. What it is then can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assigned {
    pub name: String,
    /// Only for its transaction. A custom setting is there from then on, empty.
    pub is_local: bool,
}

impl Assigned {
    pub fn is_custom(&self) -> bool {
        self.name.contains('.')
    }
}

/// Settings whose values SHOW gives as they are, and that change nothing but themselves.
const PLAIN: [&str; 26] = [
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
    "application_name",
    "bytea_output",
    "client_min_messages",
    "default_transaction_deferrable",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "enable_hashjoin",
    "enable_mergejoin",
    "enable_nestloop",
    "enable_seqscan",
    "extra_float_digits",
    "idle_in_transaction_session_timeout",
    "jit",
    "lock_timeout",
    "maintenance_work_mem",
    "plan_cache_mode",
    "row_security",
    "search_path",
    "standard_conforming_strings",
    "statement_timeout",
    "synchronous_commit",
    "tcp_user_timeout",
    "work_mem",
];

/// Settings that no plan depends on, or that the server itself makes plans anew for.
pub const INSENSITIVE: [&str; 16] = [
    "application_name",
    "client_min_messages",
    "default_transaction_deferrable",
    "default_transaction_isolation",
    "default_transaction_read_only",
    "idle_in_transaction_session_timeout",
    "idle_session_timeout",
    "lock_timeout",
    "maintenance_work_mem",
    "role",
    "search_path",
    "statement_timeout",
    "synchronous_commit",
    "tcp_user_timeout",
    "transaction_timeout",
    "work_mem",
];

/// Plans that are kept depend on this setting, by the literals in them.
pub fn is_sensitive(name: &str) -> bool {
    !name.contains('.') && !INSENSITIVE.iter().any(|one| one.eq_ignore_ascii_case(name))
}

/// A setting by which PL/pgSQL compiles functions, once a session.
pub fn decides_compiling(name: &str) -> bool {
    name.starts_with("plpgsql.")
}

/// Names and keywords that say more than where they stand.
pub(super) const WORDS: [(&str, Leaves); 5] = [
    ("set_config", Leaves::SETTINGS),
    ("nextval", Leaves::VALUES),
    ("currval", Leaves::VALUES),
    ("lastval", Leaves::VALUES),
    ("setval", Leaves::VALUES),
];

/// The first words of statements that leave nothing by themselves.
const VERBS: [&str; 27] = [
    "abort",
    "begin",
    "call",
    "close",
    "commit",
    "copy",
    "declare",
    "delete",
    "end",
    "explain",
    "fetch",
    "insert",
    "lock",
    "merge",
    "move",
    "notify",
    "release",
    "rollback",
    "savepoint",
    "select",
    "show",
    "start",
    "table",
    "truncate",
    "update",
    "values",
    "with",
];

/// Longest name that is looked up; PostgreSQL cuts longer ones (`NAMEDATALEN`).
const NAME_LEN_MAX: usize = 63;

impl Landscape {
    /// What the statements of a text may leave.
    pub fn of_text(&self, sql: &[u8]) -> Footprint {
        if self.refused.is_some() {
            return Footprint::of(Leaves::SOMETHING);
        }
        let mut found = Footprint::default();
        let mut before = Before::default();
        let mut verb = Verb::None;
        let mut block: Option<Block> = None;
        let mut tokens = Tokens::new(sql).peekable();
        while let Some(token) = tokens.next() {
            let leaves = match token.kind {
                Kind::Unclear => return Footprint::of(Leaves::ANYTHING),
                Kind::Semicolon => {
                    (before, verb) = (Before::default(), Verb::None);
                    continue;
                }
                Kind::Word | Kind::Quoted => {
                    let mut place = [0; NAME_LEN_MAX];
                    let Some(name) = folded(&token, &mut place) else {
                        return Footprint::of(Leaves::ANYTHING);
                    };
                    let mut meaning = self.meaning(name);
                    let is_word = token.kind == Kind::Word;
                    let leaves = match verb {
                        Verb::None => {
                            let read = if is_word { Verb::read(name) } else { None };
                            let Some(read) = read else {
                                return Footprint::of(Leaves::ANYTHING);
                            };
                            verb = read;
                            let this = Block::read(name, tokens.clone());
                            block = Some(block.map_or(this, |before| before.and(this)));
                            if verb == Verb::Set {
                                match target(tokens.clone()) {
                                    Target::Transaction => (),
                                    Target::Setting(name) => found.set(name.as_deref(), self.folds),
                                }
                            }
                            if verb == Verb::Set
                                && let Some(assigned) = assignment(tokens.clone(), name == b"reset")
                            {
                                found.sets.push(assigned);
                                verb = Verb::Other;
                            }
                            Leaves::NOTHING
                        }
                        Verb::Set if is_word => {
                            verb = Verb::Other;
                            match name {
                                b"local" => {
                                    verb = Verb::SetLocal;
                                    Leaves::NOTHING
                                }
                                b"transaction" | b"constraints" => Leaves::NOTHING,
                                _ => Leaves::SETTINGS,
                            }
                        }
                        Verb::Set => Leaves::SETTINGS,
                        // A custom setting stays behind, empty, when its value is gone.
                        Verb::SetLocal => {
                            verb = Verb::Other;
                            let dotted = name.contains(&b'.')
                                || tokens.peek().is_some_and(|next| next.is_other(b'.'));
                            if dotted { Leaves::SETTINGS } else { Leaves::NOTHING }
                        }
                        Verb::Explain
                            if is_word && matches!(name, b"execute" | b"create" | b"declare") =>
                        {
                            return Footprint::of(Leaves::ANYTHING);
                        }
                        // It makes a table, a temporary one where the search path says so.
                        Verb::Explain | Verb::Other
                            if is_word && name == b"into" && before.word != Word::Insert =>
                        {
                            Leaves::SOMETHING
                        }
                        Verb::Explain | Verb::Other => word_leaves(name, &before),
                    };
                    if name == b"set_config"
                        && meaning.leaves == Leaves::SETTINGS
                        && let Some(assigned) = configuration(tokens.clone())
                    {
                        meaning.leaves = Leaves::NOTHING;
                        found.set(Some(&assigned.name), self.folds);
                        if assigned.is_custom() || !assigned.is_local {
                            found.sets.push(assigned);
                        }
                    }
                    if name == b"set_config" && sets_seed(tokens.clone()) {
                        meaning.leaves = Leaves::SOMETHING;
                    }
                    let calls = tokens.peek().is_some_and(|next| next.is_other(b'('));
                    let unknown = calls && !meaning.is_known && !before.names_something;
                    before = Before::word(name, is_word, meaning, &before);
                    let unknown = if unknown { Leaves::ANYTHING } else { Leaves::NOTHING };
                    leaves.and(meaning.leaves).and(unknown)
                }
                _ => {
                    // A statement may begin with a parenthesis, and nothing else but a word.
                    if verb == Verb::None && !token.is_other(b'(') {
                        return Footprint::of(Leaves::ANYTHING);
                    }
                    before = Before { names_something: token.is_other(b')'), ..before };
                    before.word = Word::Other;
                    Leaves::NOTHING
                }
            };
            found.leaves = found.leaves.and(leaves);
        }
        if found.leaves.settings || found.leaves.something {
            found.set(None, self.folds);
        }
        // Functions that are called under another search path stay as they were compiled there.
        found.leaves.something |= self.depends_on_path && found.sets_path;
        found.block = block.unwrap_or_default();
        found
    }

    /// What a function's body, or an expression of a relation, may leave where it is run.
    pub(super) fn of_body(&self, body: &[u8]) -> Leaves {
        let mut found = Leaves::NOTHING;
        let mut before = Before { word: Word::Start, ..Before::default() };
        for token in Tokens::new(body) {
            match token.kind {
                Kind::Unclear => return Leaves::ANYTHING,
                Kind::Semicolon => before = Before { word: Word::Start, ..Before::default() },
                Kind::Word | Kind::Quoted => {
                    let mut place = [0; NAME_LEN_MAX];
                    let Some(name) = folded(&token, &mut place) else {
                        return Leaves::ANYTHING;
                    };
                    let (meaning, is_word) = (self.meaning(name), token.kind == Kind::Word);
                    let leaves = match name {
                        // Quoted or not.
                        b"pg_settings" => Leaves::SETTINGS,
                        _ if !is_word => word_leaves(name, &before),
                        // Its code is in a literal.
                        b"do" | b"alter" | b"drop" | b"comment" | b"grant" | b"revoke"
                        | b"import" | b"reassign" | b"security"
                            if before.word == Word::Start =>
                        {
                            Leaves::ANYTHING
                        }
                        b"execute" | b"create" => Leaves::ANYTHING,
                        b"discard" | b"listen" | b"unlisten" | b"deallocate" | b"load" => {
                            Leaves::SOMETHING
                        }
                        b"prepare" if before.word == Word::Start => Leaves::SOMETHING,
                        b"set" | b"reset" if before.word == Word::Start => Leaves::SETTINGS,
                        _ => word_leaves(name, &before),
                    };
                    found = found.and(leaves).and(meaning.leaves);
                    before = Before::word(name, is_word, meaning, &before);
                }
                _ => {
                    before.word = if token.is_other(b'>') { Word::Start } else { Word::Other };
                }
            }
        }
        found
    }
}

/// What stands behind SET or RESET.
enum Target {
    /// Modes of the transaction, or its constraints.
    Transaction,
    /// A setting, by the first part of its name; None if it is not told.
    Setting(Option<String>),
}

fn target<'a>(mut tokens: impl Iterator<Item = Token<'a>>) -> Target {
    let mut first = tokens.next();
    // `SET LOCAL SESSION AUTHORIZATION` has both.
    for word in ["local", "session"] {
        if first.is_some_and(|token| token.is_word(word)) {
            first = tokens.next();
        }
    }
    let Some(first) = first else { return Target::Setting(None) };
    if first.is_word("transaction") || first.is_word("constraints") {
        return Target::Transaction;
    }
    let dotted = tokens.next().is_some_and(|token| token.is_other(b'.'));
    // Names of settings have no case, even quoted.
    let name = crate::sql::name_of(&first).map(|name| name.to_ascii_lowercase());
    Target::Setting(name.map(|name| match name.as_str() {
        _ if dotted => name + ".",
        "schema" => "search_path".into(),
        _ => name,
    }))
}

/// The setting that is set behind SET or RESET, if that is a plain or a custom one.
fn assignment<'a>(mut tokens: impl Iterator<Item = Token<'a>>, resets: bool) -> Option<Assigned> {
    let mut first = tokens.next()?;
    let is_local = first.is_word("local");
    if is_local || first.is_word("session") {
        first = tokens.next()?;
    }
    let mut name = setting_name(&first)?;
    let mut next = tokens.next();
    if name == "time" && next.is_some_and(|token| token.is_word("zone")) {
        return (!resets).then(|| Assigned { name: "TimeZone".into(), is_local });
    }
    while next.is_some_and(|token| token.is_other(b'.')) {
        name.push('.');
        name.push_str(&setting_name(&tokens.next()?)?);
        next = tokens.next();
    }
    let ends = match next {
        None => resets,
        Some(token) if token.kind == Kind::Semicolon => resets,
        Some(token) => !resets && (token.is_other(b'=') || token.is_word("to")),
    };
    // What is local and not custom leaves nothing; that is told elsewhere.
    let name =
        if name.contains('.') { name } else { plain(&name).filter(|_| !is_local)?.to_owned() };
    ends.then_some(Assigned { name, is_local })
}

/// The setting that a call of `set_config` sets, if the call tells: its name and whether it is local are literals.
fn configuration<'a>(mut tokens: impl Iterator<Item = Token<'a>>) -> Option<Assigned> {
    tokens.next().filter(|token| token.is_other(b'('))?;
    let name = crate::sql::literal_of(&tokens.next()?)?.to_ascii_lowercase();
    let (mut depth, mut commas, mut last, mut words) = (1, 0, None, 0);
    for token in tokens {
        match token.text {
            b"(" => depth += 1,
            b")" => depth -= 1,
            b"," if depth == 1 => {
                commas += 1;
                words = 0;
                continue;
            }
            _ => (),
        }
        if depth == 0 {
            break;
        }
        words += 1;
        if commas == 0 {
            // A cast would do, but nothing that computes.
            return None;
        }
        last = Some(token);
    }
    let last = last.filter(|_| depth == 0 && commas == 2 && words == 1)?;
    let is_local = match (last.is_word("true"), last.is_word("false")) {
        (true, _) => true,
        (_, true) => false,
        _ => return None,
    };
    let custom = name.contains('.') && name.bytes().all(is_plain_byte);
    let name = if custom { name } else { plain(&name)?.to_owned() };
    Some(Assigned { name, is_local })
}

/// A call of `set_config` sets the seed of random numbers, if only for its transaction: they go on from there.
fn sets_seed<'a>(mut tokens: impl Iterator<Item = Token<'a>>) -> bool {
    let name = tokens.nth(1).and_then(|token| crate::sql::literal_of(&token));
    name.is_some_and(|name| name.eq_ignore_ascii_case("seed"))
}

fn is_plain_byte(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'_' | b'.')
}

fn setting_name(token: &Token<'_>) -> Option<String> {
    crate::sql::name_of(token).filter(|name| name.bytes().all(is_plain_byte))
}

fn plain(name: &str) -> Option<&'static str> {
    PLAIN.into_iter().find(|plain| plain.eq_ignore_ascii_case(name))
}

/// How a statement begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    None,
    Set,
    SetLocal,
    Explain,
    Other,
}

impl Verb {
    fn read(name: &[u8]) -> Option<Verb> {
        match name {
            b"set" | b"reset" => Some(Verb::Set),
            b"explain" => Some(Verb::Explain),
            _ => VERBS.iter().any(|verb| verb.as_bytes() == name).then_some(Verb::Other),
        }
    }
}

/// The word before another, as far as it matters.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Word {
    /// A statement begins behind it.
    Start,
    With,
    Into,
    /// What is put into is there already.
    Insert,
    Update,
    #[default]
    Other,
}

#[derive(Debug, Clone, Copy, Default)]
struct Before {
    word: Word,
    /// A name follows and no call: behind `AS`, another name, or a parenthesis that closes.
    names_something: bool,
    /// `UPDATE` has been said.
    updates: bool,
}

impl Before {
    fn word(name: &[u8], is_word: bool, meaning: Meaning, before: &Before) -> Before {
        let word = match name {
            _ if !is_word => Word::Other,
            b"with" => Word::With,
            b"into" | b"create" => Word::Into,
            // `INTO LOCAL TEMP`, `CREATE OR REPLACE TEMP VIEW`
            b"local" | b"global" | b"or" | b"replace" if before.word == Word::Into => Word::Into,
            b"begin" | b"then" | b"else" | b"loop" => Word::Start,
            b"update" => Word::Update,
            b"insert" | b"merge" => Word::Insert,
            _ => Word::Other,
        };
        let updates = before.updates || word == Word::Update;
        let names =
            matches!(name, b"as" | b"with" | b"recursive" | b"into" | b"ordinality" | b"copy");
        Before { word, names_something: !is_word || names || !meaning.begins, updates }
    }
}

/// Functions that run what they are told, by what their names begin with.
const RUNS_SQL: [&[u8]; 12] = [
    // Declared IMMUTABLE, and yet it sets.
    b"isn_weak",
    b"connectby",
    b"crosstab",
    b"cursor_to_xml",
    b"database_to_xml",
    b"dblink",
    b"query_to_xml",
    b"schema_to_xml",
    b"table_to_xml",
    b"ts_rewrite",
    b"ts_stat",
    b"xpath_table",
];

/// What a word leaves by standing where it stands.
fn word_leaves(name: &[u8], before: &Before) -> Leaves {
    match name {
        b"hold" if before.word == Word::With => Leaves::SOMETHING,
        b"temp" | b"temporary" if before.word == Word::Into => Leaves::SOMETHING,
        // An update of it sets.
        b"pg_settings" if before.updates => Leaves::SETTINGS,
        // Its rows are those of the server connection.
        b"pg_prepared_statements"
        | b"pg_prepared_statement"
        | b"pg_my_temp_schema"
        | b"pg_backend_memory_contexts"
        | b"pg_get_backend_memory_contexts" => Leaves::SOMETHING,
        // They run SQL of their own, or read what is named in a literal.
        _ if RUNS_SQL.iter().any(|prefix| name.starts_with(prefix)) => Leaves::SOMETHING,
        _ if name.starts_with(b"pg_temp") || name.starts_with(b"pg_toast_temp") => {
            Leaves::SOMETHING
        }
        _ => Leaves::NOTHING,
    }
}

/// The name that a word or a quoted name stands for. None if it is longer than any.
fn folded<'a>(token: &Token<'_>, place: &'a mut [u8; NAME_LEN_MAX]) -> Option<&'a [u8]> {
    let text = token.text;
    if token.kind == Kind::Word {
        let name = place.get_mut(..text.len())?;
        name.copy_from_slice(text);
        name.make_ascii_lowercase();
        return Some(name);
    }
    let inner = text.get(1..text.len().checked_sub(1)?)?;
    let mut len = 0;
    let mut bytes = inner.iter();
    while let Some(byte) = bytes.next() {
        *place.get_mut(len)? = *byte;
        len += 1;
        if *byte == b'"' {
            bytes.next();
        }
    }
    place.get(..len)
}

#[cfg(test)]
mod tests;
