//! What a statement may leave in its session beyond the end of its transaction, told by its text before it is sent.
//!
//! A server connection is shared only among sessions that leave nothing there, so the lists are closed: a statement
//! is harmless if its first word is known to be, and if every name in it is. Whatever cannot be told leaves something.

use super::landscape::{Landscape, Meaning};
use crate::sql::{Kind, Token, Tokens};

/// What may be left, from the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leaves {
    /// Settings, the user and the role: what can be given to another server connection.
    Settings,
    /// Values of sequences, as `currval` and `lastval` give them.
    Values,
    Something,
}

/// Names and keywords that say more than where they stand.
pub(super) const WORDS: [(&str, Leaves); 5] = [
    ("set_config", Leaves::Settings),
    ("nextval", Leaves::Values),
    ("currval", Leaves::Values),
    ("lastval", Leaves::Values),
    ("setval", Leaves::Values),
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

/// Longest name that is looked up; PostgreSQL cuts names at 63 bytes.
const NAME_LEN_MAX: usize = 128;

impl Landscape {
    /// What the statements of a text may leave.
    pub fn of_text(&self, sql: &[u8]) -> Option<Leaves> {
        if self.refused.is_some() {
            return Some(Leaves::Something);
        }
        let mut found = None;
        let mut before = Before::default();
        let mut verb = Verb::None;
        let mut tokens = Tokens::new(sql).peekable();
        while let Some(token) = tokens.next() {
            let leaves = match token.kind {
                Kind::Unclear => return Some(Leaves::Something),
                Kind::Semicolon => {
                    (before, verb) = (Before::default(), Verb::None);
                    continue;
                }
                Kind::Word | Kind::Quoted => {
                    let mut place = [0; NAME_LEN_MAX];
                    let Some(name) = folded(&token, &mut place) else {
                        return Some(Leaves::Something);
                    };
                    let meaning = self.meaning(name);
                    let is_word = token.kind == Kind::Word;
                    let leaves = match verb {
                        Verb::None => {
                            let read = if is_word { Verb::read(name) } else { None };
                            let Some(read) = read else { return Some(Leaves::Something) };
                            verb = read;
                            None
                        }
                        Verb::Set if is_word => {
                            verb = Verb::Other;
                            match name {
                                b"local" => {
                                    verb = Verb::SetLocal;
                                    None
                                }
                                b"transaction" | b"constraints" => None,
                                _ => Some(Leaves::Settings),
                            }
                        }
                        Verb::Set => Some(Leaves::Settings),
                        // A custom setting stays behind, empty, when its value is gone.
                        Verb::SetLocal => {
                            verb = Verb::Other;
                            let dotted = name.contains(&b'.')
                                || tokens.peek().is_some_and(|next| next.is_other(b'.'));
                            dotted.then_some(Leaves::Settings)
                        }
                        Verb::Explain
                            if is_word && matches!(name, b"execute" | b"create" | b"declare") =>
                        {
                            return Some(Leaves::Something);
                        }
                        Verb::Explain | Verb::Other => word_leaves(name, &before),
                    };
                    let calls = tokens.peek().is_some_and(|next| next.is_other(b'('));
                    let unknown = calls && !meaning.is_known && !before.names_something;
                    before = Before::word(name, is_word, meaning, &before);
                    let unknown = unknown.then_some(Leaves::Something);
                    leaves.max(meaning.leaves).max(unknown)
                }
                _ => {
                    // A statement may begin with a parenthesis, and nothing else but a word.
                    if verb == Verb::None && !token.is_other(b'(') {
                        return Some(Leaves::Something);
                    }
                    before = Before { names_something: token.is_other(b')'), ..before };
                    before.word = Word::Other;
                    None
                }
            };
            found = found.max(leaves);
        }
        found
    }

    /// What a function's body, or an expression of a relation, may leave where it is run.
    pub(super) fn of_body(&self, body: &[u8]) -> Option<Leaves> {
        let mut found = None;
        let mut before = Before { word: Word::Start, ..Before::default() };
        for token in Tokens::new(body) {
            match token.kind {
                Kind::Unclear => return Some(Leaves::Something),
                Kind::Semicolon => before = Before { word: Word::Start, ..Before::default() },
                Kind::Word | Kind::Quoted => {
                    let mut place = [0; NAME_LEN_MAX];
                    let Some(name) = folded(&token, &mut place) else {
                        return Some(Leaves::Something);
                    };
                    let (meaning, is_word) = (self.meaning(name), token.kind == Kind::Word);
                    let leaves = match name {
                        _ if !is_word => None,
                        b"execute" | b"discard" | b"listen" | b"unlisten" | b"deallocate"
                        | b"load" => Some(Leaves::Something),
                        b"prepare" if before.word == Word::Start => Some(Leaves::Something),
                        b"set" | b"reset" if before.word == Word::Start => Some(Leaves::Settings),
                        _ => word_leaves(name, &before),
                    };
                    found = found.max(leaves).max(meaning.leaves);
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
            _ => Word::Other,
        };
        let updates = before.updates || word == Word::Update;
        let names =
            matches!(name, b"as" | b"with" | b"recursive" | b"into" | b"ordinality" | b"copy");
        Before { word, names_something: !is_word || names || !meaning.begins, updates }
    }
}

/// What a word leaves by standing where it stands.
fn word_leaves(name: &[u8], before: &Before) -> Option<Leaves> {
    match name {
        b"hold" if before.word == Word::With => Some(Leaves::Something),
        b"temp" | b"temporary" if before.word == Word::Into => Some(Leaves::Something),
        // An update of it sets.
        b"pg_settings" if before.updates => Some(Leaves::Settings),
        // Its rows are those of the server connection.
        b"pg_prepared_statements" | b"pg_my_temp_schema" => Some(Leaves::Something),
        _ if name.starts_with(b"pg_temp") || name.starts_with(b"pg_toast_temp") => {
            Some(Leaves::Something)
        }
        _ => None,
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
mod tests {
    use super::*;

    fn landscape() -> Landscape {
        let rows = [
            ("known", "lower", ""),
            ("known", "count", ""),
            ("known", "now", ""),
            ("known", "sum", ""),
            ("volatile", "set_config", ""),
            ("volatile", "nextval", ""),
            ("volatile", "lastval", ""),
            ("volatile", "random", ""),
            ("volatile", "setseed", ""),
            ("volatile", "pg_advisory_lock", ""),
            ("volatile", "pg_sleep", ""),
            ("opaque", "dblink_connect", ""),
            ("relation", "plain", ""),
            ("relation", "weather", ""),
            ("relation", "orders", "nextval('orders_id_seq'::regclass)"),
            ("relation", "customers", "orders"),
            ("relation", "audited", "audit"),
            ("relation", "busy", "select f.x from audited f"),
            (
                "function",
                "audit",
                "begin perform set_config('app.who', 'x', true); return new; end",
            ),
            ("function", "runs", "begin execute 'select 1'; end"),
            ("function", "calls", "begin perform runs(); end"),
            ("function", "fine", "begin update plain set a = 1; return lower('X'); end"),
            ("function", "tempts", "begin create temp table t (a int); end"),
        ];
        let cell = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let rows: Vec<_> = rows.iter().map(|(a, b, c)| vec![cell(a), cell(b), cell(c)]).collect();
        Landscape::read(&rows).unwrap()
    }

    fn leaves(sql: &str) -> Option<Leaves> {
        landscape().of_text(sql.as_bytes())
    }

    #[test]
    fn everyday_statements_leave_nothing() {
        for sql in [
            "",
            "begin; select 1; commit",
            "SELECT lower(a), \"count\"(*) FROM plain WHERE b IN (1, 2) AND (c = 'set_config(') GROUP BY 1",
            "insert into plain (a, b) values (1, $2) on conflict (a) do update set b = excluded.b returning a",
            "insert into plain(a) select x from (values (1)) v(x)",
            "with a (x) as (select 1), b as materialized (select * from a) select sum(x) over (order by x) from b",
            "update plain set a = fine() where exists (select 1)",
            "select * from unnest(array[1]) with ordinality as u(a, b), generate(1) g(i)",
            "copy plain (a, b) from stdin",
            "(select 1) union (select 2)",
            "select temp from weather",
            "set local statement_timeout = '1s'",
            "set transaction isolation level serializable",
            "fetch all from c",
            "declare c cursor for select 1",
            "select random(), pg_sleep(0)",
            "select x::numeric(10, 2), cast(y as varchar(20)) from plain p (x, y)",
            "explain (analyze, costs off) select 1",
        ] {
            let found = leaves(sql);
            let only_unknown = sql.contains("generate(");
            assert_eq!(found.is_some(), only_unknown, "{sql}: {found:?}");
        }
    }

    #[test]
    fn settings_can_be_given_to_another_server() {
        for sql in [
            "set search_path = a, b",
            "reset all",
            "set role x",
            "SET SESSION app.user TO 7",
            "set local app.user = 7",
            "set local \"app.user\" = 7",
            "select set_config('app.x', '1', true)",
            "select 1; set a = 1",
            "update pg_settings set setting = 'x' where name = 'y'",
            "insert into audited values (1)",
            "select * from busy",
        ] {
            assert_eq!(leaves(sql), Some(Leaves::Settings), "{sql}");
        }
    }

    #[test]
    fn values_of_sequences_are_told_apart() {
        for sql in [
            "select nextval('s')",
            "insert into orders default values",
            "delete from customers",
            "select lastval()",
        ] {
            assert_eq!(leaves(sql), Some(Leaves::Values), "{sql}");
        }
    }

    #[test]
    fn whatever_cannot_be_told_leaves_something() {
        for sql in [
            "listen a",
            "create table t (a int)",
            "select setseed(1)",
            "select pg_advisory_lock(1)",
            "SELECT public.Dblink_Connect('x')",
            "select calls()",
            "select runs from plain",
            "select tempts()",
            "select never_heard_of(1)",
            "select * into temp t from plain",
            "select * into local temporary t from plain",
            "declare c cursor with hold for select 1",
            "select * from pg_temp.t",
            "select * from pg_temp_3.t",
            "prepare a as select 1",
            "explain analyze execute a",
            "select 'a\\'",
            "select U&\"!0061\" uescape '!'",
            "discard all",
            "select 1; do $$ $$",
            "$1",
            "\"select\" 1",
        ] {
            assert_eq!(leaves(sql), Some(Leaves::Something), "{sql}");
        }
    }

    #[test]
    fn what_is_used_without_a_name_refuses_the_database() {
        let row = |a: &str, b: &str, c: &str| {
            vec![Some(a.to_owned()), Some(b.to_owned()), Some(c.to_owned())]
        };
        let rows =
            [row("function", "runs", "begin execute 'x'; end"), row("everywhere", "+++", "runs")];
        let landscape = Landscape::read(&rows).unwrap();
        assert!(landscape.refused.is_some());
        assert_eq!(landscape.of_text(b"select 1"), Some(Leaves::Something));
    }
}
