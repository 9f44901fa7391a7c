//! The questions put to a session's server, and the snapshot read from the answers.
//!
//! The questions are asked inside the client's own session, so they leave nothing behind:
//! - by the extended protocol under a name of ours, because a simple query, or a Parse without a name, would
//!   destroy the client's unnamed statement;
//! - in a transaction of their own, READ ONLY and READ COMMITTED, because a bare SELECT under a default of
//!   SERIALIZABLE DEFERRABLE can wait for another session;
//! - without the session's timeouts, `search_path`, client encoding and role, each put aside for the
//!   transaction only. Until then everything is named in full.

use std::collections::{BTreeMap, BTreeSet};

use super::pin::Pin;
use super::snapshot::{AdvisoryLock, ENTRIES_MAX, Prepared, Setting, Snapshot};
use crate::sql;

/// The name under which Holdfast prepares its own statements in a client's session.
pub const STATEMENT_NAME: &str = "_holdfast capture 7f3a9c41";

/// Settings that the capture's own transaction changes; they are read before it changes them.
const PUT_ASIDE: [&str; 6] = [
    "statement_timeout",
    "lock_timeout",
    "search_path",
    "row_security",
    "exit_on_error",
    "client_encoding",
];

/// Settings that are no state of the session: of the transaction, of the server, or told elsewhere.
const NOT_STATE: &str = "'transaction_isolation','transaction_read_only','transaction_deferrable',\
    'in_hot_standby','is_superuser','session_authorization','role','client_encoding','seed'";

/// The version of a server as `server_version_num`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServerVersion(pub u32);

impl ServerVersion {
    /// Reads the reported `server_version`, such as `15.20 (Debian 15.20-0+deb12u1)`.
    pub fn read(text: &str) -> Option<ServerVersion> {
        let digits = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>();
        let (major, rest) = text.split_once('.').unwrap_or((text, "0"));
        let major: u32 = digits(major).parse().ok()?;
        Some(ServerVersion(major * 10_000 + digits(rest).parse().unwrap_or(0)))
    }

    pub fn major(self) -> u32 {
        self.0 / 10_000
    }
}

/// The statements of a capture in order. Each runs by itself; the last ends the transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Questions(pub Vec<String>);

/// Which of the answers is which.
pub const ANSWER_PUT_ASIDE: usize = 1;
pub const ANSWER_STATE: usize = 2;

/// Locks held more than once are not told apart by `pg_locks`; counting them lets go of them for a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CountLocks {
    /// Nobody else can take them meanwhile: every client is held and the server is fenced.
    Alone,
    /// Each is taken to be held once, and a doubt is a pin.
    Shared,
}

/// What is asked of a session on a server of `version`, for custom settings of these names.
pub fn questions(version: ServerVersion, custom: &BTreeSet<String>) -> Questions {
    let put_aside = PUT_ASIDE.iter().map(|name| format!("pg_catalog.current_setting('{name}')"));
    let put_aside: Vec<String> = put_aside.collect();
    let timeout = if version.major() >= 17 {
        ", pg_catalog.set_config('transaction_timeout', '0', true)"
    } else {
        ""
    };
    Questions(vec![
        "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY NOT DEFERRABLE".into(),
        format!(
            "SELECT {}, pg_catalog.current_setting('role'), SESSION_USER::pg_catalog.text, \
             pg_catalog.set_config('client_encoding', 'UTF8', true), \
             pg_catalog.set_config('statement_timeout', '0', true), \
             pg_catalog.set_config('lock_timeout', '10s', true), \
             pg_catalog.set_config('row_security', 'off', true), \
             pg_catalog.set_config('exit_on_error', 'off', true), \
             pg_catalog.set_config('role', 'none', true), \
             pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true){timeout}",
            put_aside.join(", ")
        ),
        state_question(custom),
        ASIDE_QUESTION.into(),
        "COMMIT".into(),
    ])
}

/// What is told about sequences and origins comes as messages of level INFO, which reach the client whatever its
/// settings and stay out of the server's log; asking `lastval()` plainly would log an error each time. The
/// question about origins is put only to those who may ask it: rights are checked even in a branch that is not
/// taken, so it must be text until then.
const ASIDE_QUESTION: &str = "DO LANGUAGE plpgsql $holdfast$ DECLARE yes boolean; BEGIN \
    IF NOT pg_is_in_recovery() AND \
    has_function_privilege('pg_replication_origin_session_is_setup()', 'execute') THEN \
    EXECUTE 'SELECT pg_replication_origin_session_is_setup()' INTO yes; \
    IF yes THEN RAISE INFO 'holdfast: replication origin'; END IF; END IF; \
    BEGIN PERFORM pg_catalog.lastval(); RAISE INFO 'holdfast: sequence values'; \
    EXCEPTION WHEN object_not_in_prerequisite_state OR undefined_table THEN \
    IF SQLERRM NOT LIKE '%lastval%' THEN RAISE INFO 'holdfast: sequence values'; END IF; END; \
    END $holdfast$";

/// The text of the INFO message that says that the session acts for a replication origin.
pub const ORIGIN_TOLD: &str = "holdfast: replication origin";

/// The text of the INFO message that says that `currval` or `lastval` have values.
pub const SEQUENCES_TOLD: &str = "holdfast: sequence values";

fn state_question(custom: &BTreeSet<String>) -> String {
    let put_aside: Vec<String> = PUT_ASIDE.iter().map(|name| format!("'{name}'")).collect();
    let mut parts = vec![
        format!(
            "SELECT 'setting', name, setting, source, NULL FROM pg_settings \
             WHERE source IN ('session','client','user','database','database user','global') \
             AND name NOT IN ({NOT_STATE},{},'transaction_timeout')",
            put_aside.join(",")
        ),
        format!(
            "SELECT 'prepared', name, statement, from_sql::text, \
             parameter_types::oid[]::text FROM pg_prepared_statements WHERE name <> '{STATEMENT_NAME}'"
        ),
        "SELECT 'cursor', name, NULL, NULL, NULL FROM pg_cursors WHERE is_holdable".into(),
        "SELECT 'channel', c, NULL, NULL, NULL FROM pg_listening_channels() c".into(),
        "SELECT 'lock', classid::text, objid::text, objsubid::text, mode FROM pg_locks \
         WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted \
         AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
            .into(),
        "SELECT 'temporary', count(*)::text, min(relname)::text, NULL, NULL FROM (\
         SELECT relname FROM pg_class WHERE relnamespace = pg_my_temp_schema() AND relkind <> 'i' \
         UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = pg_my_temp_schema() \
         UNION ALL SELECT typname FROM pg_type WHERE typnamespace = pg_my_temp_schema() AND typrelid = 0 \
         AND typelem = 0 \
         ) o WHERE pg_my_temp_schema() <> 0 HAVING count(*) > 0"
            .into(),
        "SELECT 'slot', slot_name, NULL, NULL, NULL FROM pg_replication_slots \
         WHERE temporary AND active_pid = pg_backend_pid()"
            .into(),
        "SELECT 'language', lanname, NULL, NULL, NULL FROM pg_language l \
         WHERE lanname IN ('plperl','plperlu','plpython3u','pltcl','pltclu','plv8','plr','pllua') \
         AND EXISTS (SELECT FROM pg_proc WHERE prolang = l.oid)"
            .into(),
        // Names that functions of this database set, and names that defaults of databases, roles and functions
        // hold: a session may have them without ever having said so.
        "SELECT 'custom', n, current_setting(n, true), NULL, NULL FROM (\
         SELECT m[1] FROM pg_proc, regexp_matches(prosrc, $$set_config\\s*\\(\\s*'([^'.]+\\.[^']+)'$$, 'gi') m \
         WHERE oid >= 16384 UNION \
         SELECT m[1] FROM pg_proc, regexp_matches(prosrc, \
         $$\\mset\\s+(?:local\\s+|session\\s+)?([a-z_]\\w*\\.\\w+)\\s*(?:=|to\\M)$$, 'gi') m WHERE oid >= 16384 UNION \
         SELECT split_part(c, '=', 1) FROM pg_db_role_setting, unnest(setconfig) c WHERE c ~ '^[^=]*[.]' UNION \
         SELECT split_part(c, '=', 1) FROM pg_proc, unnest(proconfig) c WHERE oid >= 16384 AND c ~ '^[^=]*[.]'\
         ) names (n) WHERE current_setting(n, true) IS NOT NULL"
            .into(),
        // A function that computes such a name leaves no way to find it.
        "SELECT 'computes', proname::text, NULL, NULL, NULL FROM pg_proc WHERE oid >= 16384 \
         AND prosrc ~* $$set_config\\s*\\(\\s*[^'\\s]$$"
            .into(),
    ];
    for name in custom {
        let literal = sql::quote_literal(name);
        parts.push(format!(
            "SELECT 'custom', {literal}, current_setting({literal}, true), NULL, NULL \
             WHERE current_setting({literal}, true) IS NOT NULL"
        ));
    }
    parts.join(" UNION ALL ")
}

/// One row of an answer, as text.
pub type Row = Vec<Option<String>>;

/// What was found: the part that can be carried, and all that cannot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Captured {
    pub snapshot: Snapshot,
    pub pins: Vec<Pin>,
}

/// The answers are not what the questions ask for: the server is not the PostgreSQL it says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server's answer to a capture has no {0}")]
pub struct Unreadable(&'static str);

/// Reads the answers: the row of settings put aside, and the rows of state.
///
/// # Errors
/// A column is missing or is not what was asked for.
pub fn read(
    put_aside: &[Row],
    state: &[Row],
    sequences_told: bool,
) -> Result<Captured, Unreadable> {
    let mut captured = Captured::default();
    let first = put_aside.first().ok_or(Unreadable("settings"))?;
    let snapshot = &mut captured.snapshot;
    for (at, name) in PUT_ASIDE.iter().enumerate() {
        let value = text(first, at)?.to_owned();
        snapshot.settings.insert((*name).into(), Setting { value, set_in_session: true });
    }
    snapshot.role = text(first, PUT_ASIDE.len())?.to_owned();
    snapshot.session_user = text(first, PUT_ASIDE.len() + 1)?.to_owned();
    for row in state {
        read_row(row, &mut captured)?;
    }
    if sequences_told {
        captured.pins.push(Pin::Sequences);
    }
    let size = captured.snapshot.len();
    if size > ENTRIES_MAX {
        let (size, max) = (as_u64(size), as_u64(ENTRIES_MAX));
        captured.pins.push(Pin::TooLarge { what: "session state".into(), size, max });
    }
    captured.pins.sort();
    Ok(captured)
}

fn as_u64(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

fn read_row(row: &Row, captured: &mut Captured) -> Result<(), Unreadable> {
    let snapshot = &mut captured.snapshot;
    match text(row, 0)? {
        "setting" => {
            let set_in_session = text(row, 3)? == "session";
            // A setting without a value is an empty text (`pg_settings.setting` of an unset string).
            let value = optional(row, 2).unwrap_or_default().to_owned();
            snapshot.settings.insert(text(row, 1)?.to_owned(), Setting { value, set_in_session });
        }
        "custom" => {
            snapshot.custom.insert(text(row, 1)?.to_owned(), text(row, 2)?.to_owned());
        }
        "prepared" => {
            let prepared = Prepared {
                text: text(row, 2)?.to_owned(),
                from_sql: matches!(text(row, 3)?, "true" | "t"),
                types: oids(text(row, 4)?).ok_or(Unreadable("parameter types"))?,
            };
            let name = text(row, 1)?.to_owned();
            if let Some(why) = not_repeatable(&prepared) {
                captured.pins.push(Pin::Prepared { name: name.clone(), why: why.into() });
            }
            snapshot.prepared.insert(name, prepared);
        }
        "cursor" => captured.pins.push(Pin::HoldCursor { name: text(row, 1)?.to_owned() }),
        "channel" => drop(snapshot.channels.insert(text(row, 1)?.to_owned())),
        "lock" => {
            let number = |at, what| text(row, at)?.parse::<u32>().map_err(|_| Unreadable(what));
            let lock = AdvisoryLock {
                classid: number(1, "lock class")?,
                objid: number(2, "lock object")?,
                objsubid: text(row, 3)?.parse().map_err(|_| Unreadable("lock kind"))?,
                shared: text(row, 4)? == "ShareLock",
            };
            snapshot.locks.insert(lock, 1);
        }
        "temporary" => captured.pins.push(Pin::Temporary {
            objects: text(row, 1)?.parse().map_err(|_| Unreadable("count of temporary objects"))?,
            example: text(row, 2)?.to_owned(),
        }),
        "slot" => captured.pins.push(Pin::TemporarySlot { slot: text(row, 1)?.to_owned() }),
        "computes" => {
            let statement = format!("function {}", text(row, 1)?);
            captured.pins.push(Pin::CustomSettings { statement });
        }
        "language" => {
            captured.pins.push(Pin::StatefulLanguage { language: text(row, 1)?.to_owned() })
        }
        _ => return Err(Unreadable("known kind of row")),
    }
    Ok(())
}

/// Why a statement that was prepared by SQL cannot be prepared again by running its text.
fn not_repeatable(prepared: &Prepared) -> Option<&'static str> {
    if !prepared.from_sql {
        return None;
    }
    // For a query string of several statements the catalog holds the whole string: running it again would run
    // the other statements again. Inside a DO block or a function the text is clean.
    let text = prepared.text.as_bytes();
    let begins = sql::Tokens::new(text).next().is_some_and(|token| token.is_word("prepare"));
    match sql::statement_count(text) {
        Some(1) if begins => None,
        Some(1) => Some("was prepared inside another statement"),
        Some(_) => Some("was prepared together with other statements in one string"),
        None => Some("has a text that cannot be told apart without its settings"),
    }
}

fn optional(row: &Row, at: usize) -> Option<&str> {
    row.get(at).and_then(Option::as_deref)
}

fn text(row: &Row, at: usize) -> Result<&str, Unreadable> {
    optional(row, at).ok_or(Unreadable("text in a column"))
}

/// `{23,25}`
fn oids(text: &str) -> Option<Vec<u32>> {
    let inner = text.strip_prefix('{')?.strip_suffix('}')?;
    inner.split(',').filter(|part| !part.is_empty()).map(|part| part.parse().ok()).collect()
}

/// Counts how often each lock is held, by letting go of it until it is gone, and takes it again as often.
/// Only for [`CountLocks::Alone`]. The counts come as INFO messages, in the order of the locks.
pub fn count_locks_question(locks: &BTreeMap<AdvisoryLock, u32>) -> Option<String> {
    if locks.is_empty() {
        return None;
    }
    let mut body = String::from("DECLARE n pg_catalog.int4; BEGIN ");
    for lock in locks.keys() {
        let (mode, suffix) =
            if lock.shared { ("ShareLock", "_shared") } else { ("ExclusiveLock", "") };
        let arguments = lock.arguments();
        let held = format!(
            "EXISTS (SELECT FROM pg_catalog.pg_locks WHERE locktype OPERATOR(pg_catalog.=) 'advisory' \
             AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid() \
             AND classid::pg_catalog.text OPERATOR(pg_catalog.=) '{}' \
             AND objid::pg_catalog.text OPERATOR(pg_catalog.=) '{}' \
             AND objsubid OPERATOR(pg_catalog.=) {} AND mode OPERATOR(pg_catalog.=) '{mode}')",
            lock.classid, lock.objid, lock.objsubid
        );
        body.push_str(&format!(
            "n := 0; WHILE {held} LOOP PERFORM pg_catalog.pg_advisory_unlock{suffix}({arguments}); \
             n := n OPERATOR(pg_catalog.+) 1; END LOOP; \
             FOR i IN 1..n LOOP IF NOT pg_catalog.pg_try_advisory_lock{suffix}({arguments}) THEN \
             RAISE EXCEPTION 'advisory lock was taken meanwhile'; END IF; END LOOP; \
             RAISE INFO 'holdfast: lock held %', n; "
        ));
    }
    Some(format!("DO LANGUAGE plpgsql $holdfast$ {body} END $holdfast$"))
}

/// What Holdfast runs before and after statements of its own in a session whose settings may be in the way.
pub fn protect() -> String {
    "SELECT pg_catalog.set_config('statement_timeout', '0', true), \
     pg_catalog.set_config('lock_timeout', '0', true), \
     pg_catalog.set_config('client_encoding', 'UTF8', true)"
        .into()
}

/// Begins a transaction that no default of the session can delay or refuse, also on a standby.
pub const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED NOT DEFERRABLE";

/// Reads one count from the text of an INFO message of [`count_locks_question`].
pub fn read_lock_count(message: &str) -> Option<u32> {
    message.strip_prefix("holdfast: lock held ")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[&str]) -> Row {
        cells.iter().map(|cell| (!cell.is_empty()).then(|| (*cell).to_owned())).collect()
    }

    fn put_aside() -> Vec<Row> {
        vec![row(&["0", "0", "\"$user\", public", "on", "off", "UTF8", "none", "app"])]
    }

    #[test]
    fn versions_are_read_as_servers_report_them() {
        let read = |text| ServerVersion::read(text).map(|version| version.0);
        assert_eq!(read("15.20 (Debian 15.20-0+deb12u1)"), Some(150_020));
        assert_eq!(read("18beta1"), Some(180_000));
        assert_eq!(read("x"), None);
    }

    #[test]
    fn answers_become_a_snapshot() {
        let state = [
            row(&["setting", "work_mem", "8192", "session"]),
            row(&["setting", "application_name", "psql", "client"]),
            row(&["prepared", "p1", "select $1", "false", "{23}"]),
            row(&["channel", "jobs"]),
            row(&["lock", "0", "42", "1", "ExclusiveLock"]),
            row(&["custom", "app.user", "7"]),
        ];
        let captured = read(&put_aside(), &state, false).unwrap();
        assert_eq!(captured.pins, []);
        let snapshot = captured.snapshot;
        assert_eq!(snapshot.settings["work_mem"].value, "8192");
        assert!(!snapshot.settings["application_name"].set_in_session);
        assert_eq!(snapshot.prepared["p1"].types, [23]);
        assert_eq!(snapshot.custom["app.user"], "7");
        assert_eq!(snapshot.locks.len(), 1);
        assert_eq!((snapshot.role.as_str(), snapshot.session_user.as_str()), ("none", "app"));
    }

    #[test]
    fn what_cannot_be_carried_pins() {
        let state = [
            row(&["cursor", "c"]),
            row(&["temporary", "2", "t"]),
            row(&["slot", "s"]),
            row(&["language", "plperl"]),
            row(&["prepared", "a", "select 1; prepare a as select 2", "true", "{}"]),
            row(&["prepared", "b", "PREPARE b AS select 2", "true", "{}"]),
        ];
        let captured = read(&put_aside(), &state, true).unwrap();
        let codes: Vec<&str> = captured.pins.iter().map(Pin::code).collect();
        assert_eq!(
            codes,
            [
                "hold_cursor",
                "prepared",
                "sequences",
                "stateful_language",
                "temporary",
                "temporary_slot"
            ]
        );
    }

    #[test]
    fn a_server_that_answers_otherwise_is_an_error() {
        assert!(read(&[], &[], false).is_err());
        assert!(read(&put_aside(), &[row(&["surprise"])], false).is_err());
        assert!(read(&put_aside(), &[row(&["prepared", "p", "x", "true", "{a}"])], false).is_err());
        assert!(read(&put_aside(), &[row(&["lock", "x", "1", "1", "ShareLock"])], false).is_err());
    }

    #[test]
    fn counts_of_locks_are_read_from_their_messages() {
        assert_eq!(read_lock_count("holdfast: lock held 3"), Some(3));
        assert_eq!(read_lock_count("something else"), None);
        assert_eq!(count_locks_question(&BTreeMap::new()), None);
    }
}
