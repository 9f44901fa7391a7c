//! Who may still log in to a fenced server: Holdfast, and replication.
//!
//! `default_transaction_read_only` alone is no fence, because a session can set it back. So while a server is
//! fenced its `pg_hba.conf` admits nobody else, and whoever is connected is ended.

/// The first line of a file that was written by this module.
pub const MARK: &str =
    "# holdfast: this server is fenced; the file before it is pg_hba.conf.holdfast";

/// The records of `text` narrowed to `admin` and to replication. None if the file includes others, which cannot
/// be narrowed.
pub fn fenced(text: &str, admin: &str) -> Option<String> {
    let mut out = format!("{MARK}\n");
    for line in text.lines() {
        let record = line.split('#').next().unwrap_or_default().trim();
        if record.is_empty() {
            continue;
        }
        let mut fields = record.split_whitespace();
        let (kind, databases, users) = (fields.next()?, fields.next()?, fields.next()?);
        if kind.starts_with("include") || databases.contains('@') || users.contains('@') {
            return None;
        }
        let rest: Vec<&str> = fields.collect();
        let rest = rest.join(" ");
        if databases.split(',').any(|name| name == "replication") {
            out.push_str(&format!("{kind} replication {users} {rest}\n"));
        }
        // Whether Holdfast's role is in a group is the server's to know. Locking it out would be worse than
        // naming it where it was not.
        let admits = users
            .split(',')
            .any(|name| name == "all" || name.starts_with('+') || name.trim_matches('"') == admin);
        if admits && databases != "replication" {
            out.push_str(&format!("{kind} {databases} \"{admin}\" {rest}\n"));
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_holdfast_and_replication_are_left() {
        let text = "\
# comment
local   all             all                                     peer
host    all             all             127.0.0.1/32            trust # why
host    shop            app,admin       10.0.0.0/8              scram-sha-256
host    shop            app             10.0.0.0/8              scram-sha-256
host    shop            +dba            10.1.0.0/8              cert
local   replication     all                                     trust
host    replication     repl            0.0.0.0/0               scram-sha-256
";
        let expected = format!(
            "{MARK}
local all \"admin\" peer
host all \"admin\" 127.0.0.1/32 trust
host shop \"admin\" 10.0.0.0/8 scram-sha-256
host shop \"admin\" 10.1.0.0/8 cert
local replication all trust
host replication repl 0.0.0.0/0 scram-sha-256
"
        );
        assert_eq!(fenced(text, "admin"), Some(expected));
    }

    #[test]
    fn a_file_that_includes_others_cannot_be_narrowed() {
        assert_eq!(fenced("include other.conf x y\n", "admin"), None);
        assert_eq!(fenced("host all @users 0.0.0.0/0 trust\n", "admin"), None);
        assert_eq!(fenced("host all\n", "admin"), None);
    }
}
