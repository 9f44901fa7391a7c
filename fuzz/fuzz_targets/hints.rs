//! What statement text hints at: nothing is lost by how a statement is written or cut, everything is bounded,
//! and no pin shows a literal.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use model::session::inspect::{CUSTOM_NAMES_MAX, Hints, OVERLAP};
use model::sql::{Token, Tokens};

#[derive(Debug, Arbitrary)]
enum Input<'a> {
    /// Any text, and blanks before it.
    Blank { blanks: Vec<u8>, sql: &'a [u8] },
    /// A statement that sets a custom setting, among others.
    Sets { before: Vec<Around>, set: Set, after: Vec<Around>, cut: Option<u16> },
    /// A long statement, which the relay sees in parts.
    Parts { before: &'a str, word: u8, after: &'a str, cut: u16 },
    /// Many statements of one session.
    Many { count: u8 },
    /// Bodies in bodies.
    Nested { depth: u16 },
}

/// Ways to set `app.x`, or `session.x`, which is the name of a custom setting too.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Set {
    Plain,
    Session,
    Local,
    Quoted,
    QuotedWhole,
    SessionName,
    LocalName,
    SessionSessionName,
    Function,
    FunctionCast,
    FunctionUpper,
    Block,
    BlockExecute,
}

/// What may stand before or after it in the same text.
#[derive(Debug, Clone, Copy, Arbitrary)]
enum Around {
    Comment,
    LineComment,
    Blank,
    Select,
    Path,
    Escaped,
    Dollars,
    Begin,
}

const BLANKS: [&str; 9] =
    [" ", "\t", "\n", "\r", "\x0b", "\x0c", "-- a 'b\n", "/* $a$ */", "/*/**/*/"];
/// Words that pin by themselves; each makes a pin of its own for another statement.
const WORDS: [&str; 4] = ["setseed", "dblink", "pg_backup_start", "set_config(a,"];
/// More than a person would read.
const PINS_MAX: usize = 2 * CUSTOM_NAMES_MAX;
/// An eighth of what the relay may see of a statement at once, and an eighth of the stack that an engine has.
const READ_LEN: usize = 64 * 1024 / 8;
const STACK_LEN: usize = 2 * 1024 * 1024 / 8;

fn hints(sql: &[u8]) -> Hints {
    let mut hints = Hints::default();
    hints.on_statement(sql);
    check(&hints);
    hints
}

/// A statement that comes in two parts, looked at as the relay does.
fn hints_of_parts(sql: &[u8], cut: u16) -> Hints {
    let (head, rest) = sql.split_at(usize::from(cut) % sql.len());
    let mut hints = Hints::default();
    hints.on_part(head);
    let mut seam = head[head.len().saturating_sub(OVERLAP)..].to_vec();
    seam.extend_from_slice(&rest[..rest.len().min(OVERLAP)]);
    hints.on_part(&seam);
    hints.on_part(rest);
    check(&hints);
    hints
}

fn check(hints: &Hints) {
    assert!(hints.custom.len() <= CUSTOM_NAMES_MAX);
    assert!(hints.custom.iter().all(|name| name.len() <= 128));
    assert!(hints.pins.len() <= PINS_MAX, "{} pins", hints.pins.len());
    assert!(hints.pins.iter().all(|pin| pin.to_string().chars().count() < 250));
}

impl Set {
    fn sql(self) -> &'static str {
        match self {
            Set::Plain => "set app.x = '1'",
            Set::Session => "SET SESSION app.x TO 1",
            Set::Local => "set/**/local app . x to 1",
            Set::Quoted => "set \"app\".\"x\" = 1",
            Set::QuotedWhole => "set \"app.x\" = 1",
            Set::SessionName => "set session.x = 1",
            Set::LocalName => "set local.x = 1",
            Set::SessionSessionName => "set session session.x = 1",
            Set::Function => "select pg_catalog.set_config ( 'app.x' , '1', false)",
            Set::FunctionCast => "select set_config('app.'::text || 'x', '1', false)",
            // Only ASCII is folded (`guc_name_compare`).
            Set::FunctionUpper => "select set_config('App.\u{c9}', '1', false)",
            Set::Block => "do $do$ begin set app.x = 1; end $do$",
            Set::BlockExecute => "do $do$ begin execute 'set app.x = ' || 1; end $do$",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Set::SessionName | Set::SessionSessionName => "session.x",
            Set::LocalName => "local.x",
            Set::FunctionUpper => "App.\u{c9}",
            _ => "app.x",
        }
    }
}

impl Around {
    fn sql(self) -> &'static str {
        match self {
            Around::Comment => "/* ' $a$ -- \" */",
            Around::LineComment => "-- it's\n",
            Around::Blank => "\x0b\x0c",
            Around::Select => "select 1, 'it''s', \"a\"\"b\";",
            // Literal as it stands, if `standard_conforming_strings` is on.
            Around::Path => "select 'C:\\dir\\';",
            Around::Escaped => "select e'\\'', U&'\\0061';",
            Around::Dollars => "select $a$ ' $a$, $1;",
            Around::Begin => "begin;",
        }
    }
}

/// As `guc_name_compare`: ASCII letters are the same in both cases, others are not.
fn is_known(hints: &Hints, name: &str) -> bool {
    !hints.pins.is_empty() || hints.custom.iter().any(|custom| custom.eq_ignore_ascii_case(name))
}

/// As many bodies in each other as one read can hold, or fewer.
fn nested(depth: u16) -> Vec<u8> {
    let depth = usize::from(depth) % (READ_LEN / 10 - 3) + 1;
    let letter = |n: usize| b'a' + u8::try_from(n % 26).expect("one of 26");
    let tag = |n: usize| [b'$', letter(n / 676), letter(n / 26), letter(n), b'$'];
    let (open, close) = ((0..depth).flat_map(tag), (0..depth).rev().flat_map(tag));
    b"do ".iter().copied().chain(open).chain(*b" set app.x = 1 ").chain(close).collect()
}

fuzz_target!(|input: Input<'_>| match input {
    Input::Blank { blanks, sql } => {
        // No statement begins with a word that only begins as SET does, so whether it is looked at is all one.
        let longer =
            |token: Token<'_>| token.text.len() > 3 && token.text[..3].eq_ignore_ascii_case(b"set");
        if Tokens::new(sql).next().is_some_and(longer) {
            return;
        }
        let bare = hints(sql);
        let mut text: Vec<u8> = Vec::new();
        for blank in blanks {
            text.extend_from_slice(BLANKS[usize::from(blank) % BLANKS.len()].as_bytes());
        }
        text.extend_from_slice(sql);
        let found = hints(&text);
        assert!(found.custom.is_superset(&bare.custom), "{:?}", text.escape_ascii().to_string());
        assert!(found.setval || !bare.setval);
        assert!(found.pins.is_superset(&bare.pins), "{:?}", text.escape_ascii().to_string());
    }
    Input::Sets { before, set, after, cut } => {
        let mut sql: String = before.iter().map(|around| around.sql()).collect();
        sql += set.sql();
        sql.push(';');
        sql.extend(after.iter().map(|around| around.sql()));
        let found = match cut {
            None => hints(sql.as_bytes()),
            Some(cut) => hints_of_parts(sql.as_bytes(), cut),
        };
        assert!(is_known(&found, set.name()), "{sql:?} cut at {cut:?}");
    }
    Input::Parts { before, word, after, cut } => {
        let word = WORDS[usize::from(word) % WORDS.len()];
        let quiet = |text: &str| text.replace(['\'', '\\', '\0'], "").repeat(8);
        let sql = format!("select 'sesame {} sesame {word} {}', 1", quiet(before), quiet(after));
        let hints = hints_of_parts(sql.as_bytes(), cut);
        for pin in &hints.pins {
            assert!(!pin.to_string().contains("sesame"), "{pin} is shown of {sql:?} cut at {cut}");
        }
    }
    Input::Many { count } => {
        let (words, mut hints) = (WORDS.join(" 1), "), Hints::default());
        for n in 0..count {
            let sql = format!("select a{n}, {words} 1); set app.x{n} = 1; set app.y{n} = 1");
            hints.on_statement(sql.as_bytes());
        }
        check(&hints);
    }
    Input::Nested { depth } => {
        let sql = nested(depth);
        let known = std::thread::Builder::new()
            .stack_size(STACK_LEN)
            .spawn(move || is_known(&hints(&sql), "app.x"))
            .expect("a thread can be started");
        assert!(known.join().expect("no panic"));
    }
});
