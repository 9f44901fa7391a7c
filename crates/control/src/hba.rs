//! Who may still log in to a fenced server: Holdfast, and replication.
//!
//! `default_transaction_read_only` alone is no fence, because a session can set it back. So while a server is
//! fenced its `pg_hba.conf` admits nobody else, and whoever is connected is ended. A server that goes on reading for clients
//! of the proxy admits those as well, from where the proxy is.
//!
//! The file is not read here but by the server that lives by it (`pg_hba_file_rules`, manual section 53.9): its
//! lists, quotes, continued lines and included files are its own. What is written is read back in the same way
//! before it counts.

use std::collections::BTreeSet;
use std::net::IpAddr;

use pg::connection::Row;
use pg::member::HBA_MARK as MARK;

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

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    /// A Unix socket.
    Local,
    Host(IpAddr),
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Peer::Local => f.write_str("the server's Unix socket"),
            Peer::Host(address) => address.fmt(f),
        }
    }
}

/// Who is still let in, besides replication.
#[derive(Debug, Clone, Copy)]
pub struct Admitted<'a> {
    /// Holdfast's own role, from wherever the rules let it in.
    pub admin: &'a str,
    /// Where everybody whom the rules let in may still come from.
    pub proxies: &'a BTreeSet<Peer>,
}

/// A file with those of `rules` that admit whom `admitted` names, for them alone, and those of replication.
///
/// # Errors
/// Whom a rule is about cannot be told here.
pub fn fenced(rules: &[Rule], admitted: &Admitted<'_>) -> Result<String, String> {
    let admin = admitted.admin;
    let mut out = format!("{MARK}\n");
    for rule in rules {
        let mut line = |databases: &str, users: &str, address: Option<String>| {
            out.push_str(&format!("{} {databases} {users}", rule.kind));
            let rest = address.into_iter().chain([rule.method.clone()]);
            for token in rest.chain(rule.options.iter().map(|option| quoted(option))) {
                out.push(' ');
                out.push_str(&token);
            }
            out.push('\n');
        };
        let address = || {
            let address = rule.address.as_ref().map(|address| address_token(address))?;
            let netmask = rule.netmask.as_ref().map(|netmask| format!(" {netmask}"));
            Some(address + &netmask.unwrap_or_default())
        };
        let (replication, databases): (Vec<&String>, Vec<&String>) =
            rule.databases.iter().partition(|name| *name == "replication");
        if !replication.is_empty() {
            line("replication", &list(rule.users.iter(), &["all"]), address());
        }
        if databases.is_empty() {
            continue;
        }
        // Whether Holdfast's role is in a group, or meant by a pattern, is the server's to know. Locking it out
        // would be worse than naming it where it was not.
        let admits = |name: &String| name == "all" || name == admin || name.starts_with(['+', '/']);
        let databases = list(databases.into_iter(), &["all", "sameuser", "samerole", "samegroup"]);
        if rule.users.iter().any(admits) {
            line(&databases, &quoted(admin), address());
        }
        // In the order of the file, and for one address at a time: the first that was about it is still the first.
        for peer in admitted.proxies {
            if rule.is_about(*peer)? {
                let address = match peer {
                    Peer::Local => None,
                    Peer::Host(address) => Some(whole(*address)),
                };
                line(&databases, &list(rule.users.iter(), &["all"]), address);
            }
        }
    }
    Ok(out)
}

/// An address and the netmask of it alone.
fn whole(address: IpAddr) -> String {
    let netmask = if address.is_ipv4() { "32" } else { "128" };
    format!("{address}/{netmask}")
}

impl Rule {
    /// It is about connections from there.
    fn is_about(&self, peer: Peer) -> Result<bool, String> {
        let Peer::Host(peer) = peer else { return Ok(self.kind == "local") };
        let Some(address) = self.address.as_deref().filter(|_| self.kind != "local") else {
            return Ok(false);
        };
        if address == "all" || (address == "samehost" && peer.is_loopback()) {
            return Ok(true);
        }
        let netmask = self.netmask.as_deref().and_then(|netmask| netmask.parse().ok());
        match (address.parse(), netmask, peer) {
            (Ok(IpAddr::V4(net)), Some(IpAddr::V4(mask)), IpAddr::V4(peer)) => {
                Ok(peer.to_bits() & mask.to_bits() == net.to_bits() & mask.to_bits())
            }
            (Ok(IpAddr::V6(net)), Some(IpAddr::V6(mask)), IpAddr::V6(peer)) => {
                Ok(peer.to_bits() & mask.to_bits() == net.to_bits() & mask.to_bits())
            }
            (Ok(_), Some(_), _) => Ok(false),
            _ => Err(format!(
                "whether `{address}` in pg_hba.conf means `{peer}` is the server's to know"
            )),
        }
    }
}

/// Whether the rules, as the server reads them, admit nobody but whom `admitted` names, and replication.
pub fn is_fenced(rules: &[Rule], admitted: &Admitted<'_>) -> bool {
    let is_alone = |rule: &Rule| match (rule.address.as_deref(), rule.netmask.as_deref()) {
        (None, _) => rule.kind == "local" && admitted.proxies.contains(&Peer::Local),
        (Some(address), netmask) => address.parse().is_ok_and(|address: IpAddr| {
            let ones = if address.is_ipv4() {
                "255.255.255.255"
            } else {
                "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
            };
            netmask == Some(ones) && admitted.proxies.contains(&Peer::Host(address))
        }),
    };
    rules.iter().all(|rule| {
        rule.users == [admitted.admin] || rule.databases == ["replication"] || is_alone(rule)
    })
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
        assert_eq!(fenced(&rules, &of(&BTreeSet::new())).unwrap(), expected);
    }

    fn of(proxies: &BTreeSet<Peer>) -> Admitted<'_> {
        Admitted { admin: "admin", proxies }
    }

    #[test]
    fn whoever_comes_from_where_the_proxy_is_meets_the_rules_that_it_met() {
        let net = |rule: Rule, address: &str, netmask: Option<&str>| Rule {
            address: Some(address.into()),
            netmask: netmask.map(str::to_owned),
            ..rule
        };
        let proxies: BTreeSet<Peer> =
            ["10.1.2.3", "::1"].map(|address| Peer::Host(address.parse().unwrap())).into();
        let rules = [
            rule("local", &["all"], &["all"], "trust"),
            net(rule("host", &["shop"], &["bad"], "reject"), "10.1.0.0", Some("255.255.0.0")),
            net(rule("host", &["shop"], &["app"], "md5"), "all", None),
            net(rule("host", &["shop"], &["app"], "trust"), "10.2.0.0", Some("255.255.0.0")),
            net(rule("host", &["all"], &["app"], "md5"), "samehost", None),
        ];
        // It cannot be told whether an address of another host is one of the server's own.
        assert!(fenced(&rules, &of(&proxies)).unwrap_err().contains("`samehost`"));
        let expected = format!(
            "{MARK}
local all \"admin\" trust
host \"shop\" \"bad\" 10.1.2.3/32 reject
host \"shop\" \"app\" 10.1.2.3/32 md5
host \"shop\" \"app\" ::1/128 md5
"
        );
        assert_eq!(fenced(&rules[..4], &of(&proxies)).unwrap(), expected);
        let alone =
            net(rule("host", &["shop"], &["app"], "md5"), "10.1.2.3", Some("255.255.255.255"));
        assert!(is_fenced(std::slice::from_ref(&alone), &of(&proxies)));
        assert!(!is_fenced(std::slice::from_ref(&alone), &of(&BTreeSet::new())));
        assert!(!is_fenced(&rules[..1], &of(&proxies)));
        assert!(is_fenced(&rules[..1], &of(&[Peer::Local].into())));
        assert!(!is_fenced(&rules[1..2], &of(&proxies)));
    }

    #[test]
    fn what_the_server_reads_decides() {
        let none = BTreeSet::new();
        assert!(is_fenced(&[rule("host", &["shop"], &["admin"], "md5")], &of(&none)));
        assert!(is_fenced(&[rule("host", &["replication"], &["all"], "md5")], &of(&none)));
        // As the server reads `host shop, "postgres" all 10.0.0.0/8 md5`.
        let admitted = Admitted { admin: "postgres", proxies: &none };
        assert!(!is_fenced(&[rule("host", &["shop", "postgres"], &["all"], "md5")], &admitted));
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
