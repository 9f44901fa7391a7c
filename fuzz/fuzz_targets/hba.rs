//! A fenced `pg_hba.conf`, read as `src/backend/libpq/hba.c` splits it: every record has a database, a user, and
//! what its kind needs, and names only the admin user or is for replication only.

#![no_main]

use control::hba::{MARK, fenced};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

const ADMIN: &str = "admin";

/// What files are made of, so that the fuzzer writes records and not noise.
const PIECES: [&str; 30] = [
    " ",
    "\n",
    "\t",
    ",",
    ", ",
    "\"",
    "\\\n",
    "#",
    "@",
    "+",
    "host",
    "local",
    "hostssl",
    "all",
    "replication",
    "admin",
    "\"admin\"",
    "app",
    "shop",
    "\"a b\"",
    "\"x#y\"",
    "10.0.0.0/8",
    "127.0.0.1 255.0.0.0",
    "trust",
    "scram-sha-256",
    "ldap ldapserver=x",
    "include",
    "samerole",
    "/^a",
    "\u{3000}",
];

#[derive(Debug, Arbitrary)]
enum Input<'a> {
    Text(&'a str),
    Pieces(Vec<u8>),
    Records(Vec<(Piece<'a>, Piece<'a>)>),
}

/// The databases or the users of a record that a server accepts.
#[derive(Debug, Arbitrary)]
enum Piece<'a> {
    Words(Vec<u8>),
    Spaced(Vec<u8>),
    Quoted(&'a str),
}

impl Piece<'_> {
    fn write(&self, words: &[&str], out: &mut String) {
        let list = |choices: &[u8], between: &str| {
            let word = |n: &u8| words[usize::from(*n) % words.len()];
            let list: Vec<&str> = choices.iter().take(3).map(word).collect();
            if list.is_empty() { "all".to_owned() } else { list.join(between) }
        };
        match self {
            Piece::Words(choices) => *out += &list(choices, ","),
            Piece::Spaced(choices) => *out += &list(choices, ", "),
            Piece::Quoted(name) => {
                let plain = |c: char| c == '#' || c == ' ' || c.is_ascii_alphanumeric();
                let name: String = name.chars().filter(|c| plain(*c)).take(8).collect();
                *out += &format!("\"q{name}\"");
            }
        }
    }
}

fn text(input: &Input<'_>) -> String {
    let mut out = String::new();
    match input {
        Input::Text(text) => out += text,
        Input::Pieces(pieces) => {
            out.extend(pieces.iter().map(|n| PIECES[usize::from(*n) % PIECES.len()]));
        }
        Input::Records(records) => {
            for (databases, users) in records {
                out += "host ";
                databases.write(&["all", "replication", "shop", "admin"], &mut out);
                out.push(' ');
                users.write(&["all", "admin", "app", "repl"], &mut out);
                out += " 10.0.0.0/8 scram-sha-256\n";
            }
        }
    }
    out
}

/// One field: its items, and whether each was quoted at its begin, which takes its meaning away.
type Field = Vec<(String, bool)>;

/// Splits a file into records as `tokenize_auth_file` and `next_token` do.
fn records(text: &str) -> Vec<Vec<Field>> {
    let mut records = Vec::new();
    let mut lines = text.split('\n');
    while let Some(line) = lines.next() {
        let mut line = line.trim_end_matches('\r').to_owned();
        while line.ends_with('\\') {
            line.pop();
            line += lines.next().unwrap_or_default().trim_end_matches('\r');
        }
        let fields = fields(&line);
        if !fields.is_empty() {
            records.push(fields);
        }
    }
    records
}

fn fields(line: &str) -> Vec<Field> {
    let mut fields: Vec<Field> = Vec::new();
    let (mut item, mut quoted, mut begun) = (String::new(), false, false);
    let (mut in_quote, mut was_quote, mut list) = (false, false, false);
    for c in line.chars().map(Some).chain([None]) {
        let end = c.is_none() || (c == Some('#') && !in_quote);
        let comma = c == Some(',') && !in_quote;
        let blank = matches!(c, Some(' ' | '\t' | '\r')) && !in_quote;
        if (end || comma || blank) && begun {
            let done = (std::mem::take(&mut item), quoted);
            match fields.last_mut() {
                Some(field) if list => field.push(done),
                _ => fields.push(vec![done]),
            }
            (begun, quoted, was_quote, list) = (false, false, false, comma);
        }
        let Some(c) = c.filter(|_| !end) else { break };
        if comma || blank {
            continue;
        }
        begun = true;
        if c != '"' || was_quote {
            item.push(c);
        }
        was_quote = in_quote && c == '"' && !was_quote;
        if c == '"' {
            in_quote = !in_quote;
            quoted |= item.is_empty();
        }
    }
    fields
}

/// Whether a record has what its kind needs. One that has not makes the server refuse the whole file, and keep
/// to what it read before.
fn is_whole(record: &[Field]) -> bool {
    let one = |at: usize| match record.get(at).map(Vec::as_slice) {
        Some([(text, _)]) => text.as_str(),
        _ => "",
    };
    let method = |at: usize| ["trust", "scram-sha-256", "peer", "ldap"].contains(&one(at));
    let address = one(3);
    match one(0) {
        "local" => method(3),
        "host" | "hostssl" if address.contains('/') => method(4),
        "host" | "hostssl" => address.contains('.') && one(4).contains('.') && method(5),
        _ => false,
    }
}

fn has(record: &[Field], at: usize, text: &str, quoted: Option<bool>) -> bool {
    let is = |(item, its): &(String, bool)| item == text && quoted.is_none_or(|q| q == *its);
    record.get(at).is_some_and(|field| field.iter().any(is))
}

fn is_for_replication(record: &[Field]) -> bool {
    has(record, 1, "replication", Some(false))
}

fn admits_admin(record: &[Field]) -> bool {
    let only_replication = record[1].iter().all(|(item, quoted)| item == "replication" && !quoted);
    !only_replication && (has(record, 2, "all", Some(false)) || has(record, 2, ADMIN, None))
}

fuzz_target!(|input: Input<'_>| {
    let text = text(&input);
    let Some(out) = fenced(&text, ADMIN) else { return };
    assert!(out.starts_with(MARK));
    let shown = || format!("{text:?} became {out:?}");
    let (before, after) = (records(&text), records(&out));
    let sound = before.iter().all(|record| is_whole(record));
    if !after.iter().all(|record| is_whole(record)) {
        assert!(!sound, "refused by the server, so nothing is fenced: {}", shown());
        return;
    }
    for record in &after {
        let only = |at: usize| record[at].len() == 1;
        let replication = only(1) && is_for_replication(record);
        let admin = only(2) && has(record, 2, ADMIN, None);
        assert!(replication || admin, "admits others: {}", shown());
    }
    let count = |records: &[Vec<Field>], is: fn(&[Field]) -> bool| {
        records.iter().filter(|record| is(record)).count()
    };
    for is in [is_for_replication, admits_admin] {
        assert!(!sound || count(&after, is) >= count(&before, is), "locks out: {}", shown());
    }
});
