//! A fenced `pg_hba.conf`, split as `src/backend/libpq/hba.c` splits it: every record names only the admin user, or
//! is for replication only, whatever names the server has read.

#![no_main]

use control::hba::{MARK, Rule, fenced};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

const ADMIN: &str = "admin";

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    rules: Vec<(Vec<&'a str>, Vec<&'a str>, Option<&'a str>, Vec<&'a str>)>,
}

/// A name as it can stand on a line.
fn name(text: &&str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

/// The fields of a line: split at blanks and commas outside quotes, commas kept with their list.
fn fields(line: &str) -> Vec<String> {
    let (mut all, mut field, mut quote) = (Vec::new(), String::new(), false);
    for c in line.chars() {
        quote ^= c == '"';
        if !quote && matches!(c, ' ' | '\t') {
            all.push(std::mem::take(&mut field));
        } else {
            field.push(c);
        }
    }
    assert!(!quote, "an open quote: {line}");
    all.push(field);
    all
}

fuzz_target!(|input: Input<'_>| {
    let rules: Vec<Rule> = input
        .rules
        .iter()
        .map(|(databases, users, address, options)| Rule {
            kind: "host".into(),
            databases: databases.iter().map(name).collect(),
            users: users.iter().map(name).collect(),
            address: address.as_ref().map(name),
            netmask: None,
            method: "trust".into(),
            options: options.iter().map(name).collect(),
        })
        .collect();
    let text = fenced(&rules, ADMIN);
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some(MARK));
    for line in lines {
        let fields = fields(line);
        assert!(fields.len() >= 4, "{line}");
        assert!(fields[1] == "replication" || fields[2] == "\"admin\"", "{line}");
    }
});
