//! Who may still log in to a fenced server: Holdfast, and replication.
//!
//! `default_transaction_read_only` alone is no fence, because a session can set it back. So while a server is
//! fenced its `pg_hba.conf` admits nobody else, and whoever is connected is ended.
//!
//! The file is not read here but by the server that lives by it (`pg_hba_file_rules`, manual section 53.9): its
//! lists, quotes, continued lines and included files are its own. What is written is read back in the same way
//! before it counts.

use pg::connection::Row;

/// The first line of a file that was written by this module.
pub const MARK: &str =
    "# holdfast: this server is fenced; the file before it is pg_hba.conf.holdfast";

/// Asks a server for the rules of its file as it stands on disk.
pub const QUESTION: &str = "SELECT type, array_to_json(database)::text, array_to_json(user_name)::text, address, \
    netmask, auth_method, array_to_json(options)::text, error, line_number::text FROM pg_hba_file_rules";

/// One rule, as the server reads it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    pub kind: String,
    pub databases: Vec<String>,
    pub users: Vec<String>,
    pub address: Option<String>,
    pub netmask: Option<String>,
    pub method: String,
    pub options: Vec<String>,
}

/// Reads the answer to [`QUESTION`].
///
/// # Errors
/// The server cannot read a line of the file. It then keeps to the file that it has read before.
pub fn read(rows: &[Row]) -> Result<Vec<Rule>, String> {
    let mut rules = Vec::new();
    for row in rows {
        let cell = |at: usize| row.get(at).and_then(Option::as_deref);
        if let Some(error) = cell(7) {
            let line = cell(8).unwrap_or("?");
            return Err(format!("line {line} of pg_hba.conf: {error}"));
        }
        let list = |at: usize| -> Result<Vec<String>, String> {
            let text = cell(at).unwrap_or("[]");
            serde_json::from_str(text).map_err(|error| format!("rules of pg_hba.conf: {error}"))
        };
        let text = |at: usize| cell(at).map(str::to_owned);
        rules.push(Rule {
            kind: text(0).unwrap_or_default(),
            databases: list(1)?,
            users: list(2)?,
            address: text(3),
            netmask: text(4),
            method: text(5).unwrap_or_default(),
            options: list(6)?,
        });
    }
    Ok(rules)
}

/// A file with those of `rules` that admit `admin`, for it alone, and those of replication.
pub fn fenced(rules: &[Rule], admin: &str) -> String {
    let mut out = format!("{MARK}\n");
    for rule in rules {
        let mut line = |databases: &str, users: &str| {
            out.push_str(&format!("{} {databases} {users}", rule.kind));
            let address = rule.address.iter().map(|address| address_token(address));
            let rest = address.chain(rule.netmask.iter().cloned());
            let rest = rest.chain([rule.method.clone()]);
            for token in rest.chain(rule.options.iter().map(|option| quoted(option))) {
                out.push(' ');
                out.push_str(&token);
            }
            out.push('\n');
        };
        let (replication, databases): (Vec<&String>, Vec<&String>) =
            rule.databases.iter().partition(|name| *name == "replication");
        if !replication.is_empty() {
            line("replication", &list(rule.users.iter(), &["all"]));
        }
        // Whether Holdfast's role is in a group, or meant by a pattern, is the server's to know. Locking it out
        // would be worse than naming it where it was not.
        let admits = |name: &String| name == "all" || name == admin || name.starts_with(['+', '/']);
        if !databases.is_empty() && rule.users.iter().any(admits) {
            let keywords = ["all", "sameuser", "samerole", "samegroup"];
            line(&list(databases.into_iter(), &keywords), &quoted(admin));
        }
    }
    out
}

/// Whether the rules, as the server reads them, admit nobody but `admin` and replication.
pub fn is_fenced(rules: &[Rule], admin: &str) -> bool {
    rules.iter().all(|rule| rule.users == [admin] || rule.databases == ["replication"])
}

fn list<'a>(names: impl Iterator<Item = &'a String>, keywords: &[&str]) -> String {
    let one = |name: &String| {
        // A group or a pattern is one only without quotes before it (`hba.c`).
        if keywords.contains(&name.as_str()) {
            name.clone()
        } else if let Some(group) = name.strip_prefix('+') {
            format!("+{}", quoted(group))
        } else {
            quoted(name)
        }
    };
    names.map(one).collect::<Vec<_>>().join(",")
}

fn address_token(address: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || ".:_-%".contains(c);
    if address.chars().all(plain) { address.to_owned() } else { quoted(address) }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(kind: &str, databases: &[&str], users: &[&str], method: &str) -> Rule {
        let list = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Rule {
            kind: kind.into(),
            databases: list(databases),
            users: list(users),
            method: method.into(),
            ..Rule::default()
        }
    }

    #[test]
    fn only_holdfast_and_replication_are_left() {
        let mut cert = rule("hostssl", &["shop"], &["+dba"], "cert");
        cert.address = Some("10.1.0.0".into());
        cert.netmask = Some("255.255.0.0".into());
        cert.options = vec!["map=a b".into()];
        let rules = [
            rule("local", &["all"], &["all"], "peer"),
            rule("host", &["shop", "postgres"], &["app", "admin"], "md5"),
            rule("host", &["shop"], &["app"], "md5"),
            rule("local", &["all", "replication"], &["all"], "trust"),
            rule("host", &["replication"], &["repl", "+standby"], "md5"),
            cert,
        ];
        let expected = format!(
            "{MARK}
local all \"admin\" peer
host \"shop\",\"postgres\" \"admin\" md5
local replication all trust
local all \"admin\" trust
host replication \"repl\",+\"standby\" md5
hostssl \"shop\" \"admin\" 10.1.0.0 255.255.0.0 cert \"map=a b\"
"
        );
        assert_eq!(fenced(&rules, "admin"), expected);
    }

    #[test]
    fn what_the_server_reads_decides() {
        assert!(is_fenced(&[rule("host", &["shop"], &["admin"], "md5")], "admin"));
        assert!(is_fenced(&[rule("host", &["replication"], &["all"], "md5")], "admin"));
        // As the server reads `host shop, "postgres" all 10.0.0.0/8 md5`.
        assert!(!is_fenced(&[rule("host", &["shop", "postgres"], &["all"], "md5")], "postgres"));
    }

    #[test]
    fn a_line_that_the_server_cannot_read_is_an_error() {
        let text = |text: &str| Some(text.to_owned());
        let mut row = vec![text("host"), text("[\"a,b\"]"), text("[\"x\\\"y\"]"), None, None];
        row.extend([text("trust"), None, None, text("3")]);
        let rules = read(std::slice::from_ref(&row)).unwrap();
        assert_eq!((rules[0].databases[0].as_str(), rules[0].users[0].as_str()), ("a,b", "x\"y"));
        row[7] = text("end-of-line before role specification");
        let error = read(&[row]).unwrap_err();
        assert_eq!(error, "line 3 of pg_hba.conf: end-of-line before role specification");
    }
}
