//! The questions put to a session's server, and the snapshot read from the answers.
//!
//! The questions are asked inside the client's own session, so they leave nothing behind:
//! - by the extended protocol under a name of ours, because a simple query, or a Parse without a name, would
//!   destroy the client's unnamed statement;
//! - in a transaction of their own, READ ONLY and READ COMMITTED, because a bare SELECT under a default of
//!   SERIALIZABLE DEFERRABLE can wait for another session;
//! - without the session's timeouts, `search_path`, client encoding and role, each put aside for the
//!   transaction only. Until then everything is named in full.
//!
//! They are asked while clients wait, so they are few and small: a session is asked for what only itself can
//! tell, [`Facts`] hold the rest. SHOW ALL costs a third of `pg_settings` and is not planned.

use std::collections::{BTreeMap, BTreeSet};

use super::cursor::Cursor;
use super::facts::{Facts, OfBackend};
use super::pin::Pin;
use super::snapshot::{AdvisoryLock, ENTRIES_MAX, Prepared, Snapshot};
use super::statement;
use crate::sql;

/// The name under which Holdfast prepares its own statements in a client's session.
pub const STATEMENT_NAME: &str = "_holdfast capture 7f3a9c41";

/// Settings that the capture's own transaction changes; they are read before it changes them.
fn put_aside(version: ServerVersion) -> &'static [&'static str] {
    const ALL: [&str; 7] = [
        "statement_timeout",
        "lock_timeout",
        "search_path",
        "row_security",
        "exit_on_error",
        "client_encoding",
        "transaction_timeout",
    ];
    if version.major() >= 17 { &ALL } else { &ALL[..6] }
}

/// How long a capture waits for a lock, such as of a sequence that somebody is altering.
const LOCK_TIMEOUT: &str = "1s";

/// Settings that are no state of the session: of the transaction, of the server, or told elsewhere.
pub(super) const NOT_STATE: [&str; 8] = [
    "transaction_isolation",
    "transaction_read_only",
    "transaction_deferrable",
    "in_hot_standby",
    "is_superuser",
    "session_authorization",
    "role",
    "seed",
];

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

/// The statements of a capture in order, each with its parameters. Each runs by itself; the last ends the
/// transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Questions(pub Vec<(String, Vec<String>)>);

const ANSWER_PUT_ASIDE: usize = 1;
const ANSWER_SETTINGS: usize = 3;
const ANSWER_STATE: usize = 4;
const ANSWER_BENEATH: usize = 5;

/// What one capture is about.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    pub version: ServerVersion,
    /// Custom settings that the session may have.
    pub custom: &'a BTreeSet<String>,
    /// Libraries that it has loaded, which no catalog shows.
    pub libraries: &'a BTreeSet<String>,
    /// The role that logged in, if the session has another authorization: only it may see all settings.
    pub login_role: Option<&'a str>,
    /// The session may have used `setval`.
    pub setval: bool,
    /// Of the session's server and database.
    pub facts: &'a Facts,
    /// What settings are compared by: the configuration of the server where the session stands.
    pub reference: &'a Facts,
    /// Bytes of temporary tables that are carried at most.
    pub temporary_max: u64,
    /// The server is in recovery, so no sequence was used.
    pub in_recovery: bool,
    /// What RESET would find is asked as well. It does not change while a backend lives.
    pub beneath: bool,
    /// What its backend holds is asked as well; else [`Facts`] are to tell.
    pub alone: bool,
}

/// What is asked of a session.
pub fn questions(subject: &Subject<'_>) -> Questions {
    let aside = put_aside(subject.version);
    let mut parts: Vec<String> =
        aside.iter().map(|name| format!("pg_catalog.current_setting('{name}')")).collect();
    parts.extend([
        "pg_catalog.current_setting('role')".into(),
        "SESSION_USER::pg_catalog.text".into(),
        "pg_catalog.pg_my_temp_schema()".into(),
    ]);
    let mut set = |name: &str, value: &str| {
        let value = sql::quote_literal(value);
        parts.push(format!("pg_catalog.set_config('{name}', {value}, true)"));
    };
    set("client_encoding", "UTF8");
    set("statement_timeout", "0");
    // Well before an answer is given up, which would cost the session its server.
    set("lock_timeout", LOCK_TIMEOUT);
    if subject.version.major() >= 17 {
        set("transaction_timeout", "0");
    }
    set("row_security", "off");
    set("exit_on_error", "off");
    if let Some(role) = subject.login_role {
        set("session_authorization", role);
    }
    set("role", "none");
    set("search_path", "pg_catalog, pg_temp");
    let custom = subject.facts.custom.union(subject.custom);
    let custom: Vec<String> = custom.map(|name| sql::array_element(name)).collect();
    let plain = |sql: String| (sql, Vec::new());
    let mut questions = vec![
        plain(BEGIN_READ.into()),
        plain(format!("SELECT {}", parts.join(", "))),
        plain(aside_question(subject)),
        plain("SHOW ALL".into()),
        (state_question(subject), vec![format!("{{{}}}", custom.join(","))]),
    ];
    if subject.beneath {
        questions.push(plain(BENEATH_QUESTION.into()));
    }
    questions.push(plain("COMMIT".into()));
    Questions(questions)
}

fn state_question(subject: &Subject<'_>) -> String {
    format!("{STATE_QUESTION}{}", if subject.alone { BACKEND_QUESTION } else { "" })
}

const BENEATH_QUESTION: &str = "SELECT name, reset_val FROM pg_settings \
    WHERE context IN ('user', 'superuser') AND reset_val IS NOT NULL";

const STATE_QUESTION: &str = "SELECT 'prepared', name, statement, from_sql::text, \
    (SELECT coalesce(string_agg(CASE WHEN t < 16384::oid THEN t::text \
    ELSE regexp_replace(t::regtype::text, '^pg_temp_[0-9]+[.]', 'pg_temp.') END, chr(10) ORDER BY n), '') \
    FROM unnest(parameter_types::oid[]) WITH ORDINALITY u(t, n)) \
    FROM pg_prepared_statements WHERE name <> '_holdfast capture 7f3a9c41' UNION ALL \
    SELECT 'cursor', name, is_scrollable::text, is_binary::text, NULL FROM pg_cursors WHERE is_holdable UNION ALL \
    SELECT 'channel', c, NULL, NULL, NULL FROM pg_listening_channels() c UNION ALL \
    SELECT 'custom', n, current_setting(n, true), NULL, NULL FROM unnest($1::text[]) n \
    WHERE current_setting(n, true) IS NOT NULL";

/// What [`Facts`] tell of all backends, of the session's own.
const BACKEND_QUESTION: &str = " UNION ALL \
    SELECT 'lock', classid::text, objid::text, objsubid::text, mode FROM pg_locks \
    WHERE locktype = 'advisory' AND granted AND pid = pg_backend_pid() \
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) UNION ALL \
    SELECT 'slot', slot_name::text, NULL, NULL, NULL FROM pg_replication_slots \
    WHERE temporary AND active_pid = pg_backend_pid()";

/// What only a block can ask without logging an error comes as messages of level INFO, which reach the client
/// whatever its settings and stay out of the server's log. `lastval()` is an error where it has no value.
///
/// Whether the session acts for a replication origin is asked only of those who may ask: rights are checked even
/// in a branch that is not taken, so it must be text until then.
fn aside_question(subject: &Subject<'_>) -> String {
    // The memory that settings take shows those whose names are not known. Not everybody may see it.
    let memory = if subject.version.major() >= 16 {
        "BEGIN SELECT used_bytes INTO v FROM pg_backend_memory_contexts WHERE name = 'GUCMemoryContext'; \
         RAISE INFO 'holdfast: settings take %', v; EXCEPTION WHEN insufficient_privilege THEN NULL; END; "
    } else {
        ""
    };
    if subject.in_recovery {
        // It is asked all the same, because it loads the language, whose settings then appear.
        return format!(
            "DO LANGUAGE plpgsql $holdfast$ DECLARE v bigint; BEGIN {memory} END $holdfast$"
        );
    }
    let (declare, origin) = if subject.facts.origins {
        (
            "yes boolean; ",
            "IF has_function_privilege('pg_replication_origin_session_is_setup()', 'execute') THEN \
             EXECUTE 'SELECT pg_replication_origin_session_is_setup()' INTO yes; \
             IF yes THEN RAISE INFO 'holdfast: replication origin'; END IF; END IF; ",
        )
    } else {
        ("", "")
    };
    format!(
        "DO LANGUAGE plpgsql $holdfast$ DECLARE {declare}v bigint; BEGIN {memory}{origin}\
         v := lastval(); RAISE INFO 'holdfast: lastval %', v; \
         EXCEPTION WHEN object_not_in_prerequisite_state THEN NULL; \
         WHEN insufficient_privilege THEN RAISE INFO 'holdfast: lastval hidden'; END $holdfast$"
    )
}

/// Asks every sequence for the session's value, as INFO messages. To be asked after the other questions of a
/// session that has a last value, or may have used `setval`: most have not, and are spared it. That a sequence is
/// locked must come out, though its code is of the class that says that there is no value.
pub const SEQUENCES: &str = "DO LANGUAGE plpgsql $holdfast$ DECLARE v bigint; s record; BEGIN \
    FOR s IN SELECT c.oid, CASE relpersistence WHEN 't' THEN format('pg_temp.%I', relname) ELSE '' END AS temp, \
    pg_has_role(relowner, 'USAGE') AND has_schema_privilege(n.oid, 'USAGE') AS own \
    FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace \
    WHERE relkind = 'S' AND (relpersistence <> 't' OR relnamespace = pg_my_temp_schema()) LOOP \
    BEGIN v := currval(s.oid); RAISE INFO 'holdfast: currval % % % %', s.own, v, s.oid, s.temp; \
    EXCEPTION WHEN lock_not_available THEN RAISE; \
    WHEN object_not_in_prerequisite_state OR insufficient_privilege THEN NULL; END; \
    END LOOP; END $holdfast$";

/// Whether [`SEQUENCES`] are to be asked, by the INFO messages of the other questions.
pub fn asks_sequences(subject: &Subject<'_>, infos: &[String]) -> bool {
    !subject.facts.has_too_many_sequences() && may_have_sequences(subject, infos)
}

fn may_have_sequences(subject: &Subject<'_>, infos: &[String]) -> bool {
    let may = subject.setval || subject.facts.setval;
    !subject.in_recovery && (may || infos.iter().any(|info| info.starts_with("holdfast: lastval ")))
}

/// The beginning of [`questions`], up to the settings that are put aside: what [`SEQUENCES`] is asked under.
pub fn first_questions(subject: &Subject<'_>) -> Questions {
    let mut questions = questions(subject);
    questions.0.truncate(ANSWER_PUT_ASIDE + 1);
    questions
}

/// One row of an answer, as text.
pub type Row = Vec<Option<String>>;

/// What was found: the part that can be carried, and all that cannot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Captured {
    pub snapshot: Snapshot,
    pub pins: Vec<Pin>,
    /// The schema of its temporary objects, 0 if it never had one.
    pub temporary_schema: u32,
    /// Temporary tables of which the planner has statistics.
    pub analyzed: BTreeSet<String>,
    /// There are values of sequences that were not asked for, because there are too many sequences.
    pub unasked_sequences: bool,
    /// The values of sequences by their OIDs: others may give them new names while the session is held.
    pub sequences: BTreeMap<u32, SequenceValue>,
    /// Bytes that are carried at most.
    pub temporary_max: u64,
    /// Names of temporary relations that permanent ones have as well.
    pub shadowing: BTreeSet<String>,
    /// Bytes of memory that its settings take, if it may know.
    pub setting_bytes: Option<i64>,
    /// What its backend holds, if it was asked alone.
    pub backend: Option<OfBackend>,
}

/// What `currval` gives, and whether the login owns the sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceValue {
    pub value: i64,
    pub own: bool,
    /// The name of a temporary sequence, which no facts tell.
    pub temporary: Option<String>,
}

impl Captured {
    /// Pins for prepared statements whose text is so.
    pub fn pin_prepared(&mut self, is_so: impl Fn(&str) -> bool, why: &str) {
        let prepared = self.snapshot.prepared.iter().filter(|(_, one)| is_so(&one.text));
        let pin = |name: &String| Pin::Prepared { name: name.clone(), why: why.into() };
        self.pins.extend(prepared.map(|(name, _)| pin(name)));
    }

    /// Adds what the backend holds that is seen from outside. To be done once, by facts that were learned after
    /// the session's last request.
    pub fn complete(&mut self, facts: &Facts, backend_pid: i32) {
        self.name_sequences(facts);
        self.pin_sequences(facts);
        let backend = self.backend.take().or_else(|| facts.backends.get(&backend_pid).cloned());
        // One that does not scroll is read to its end, or not at all.
        let file_bytes = facts.backends.get(&backend_pid).map_or(0, |backend| backend.file_bytes);
        let has_such = self.snapshot.cursors.values().any(|cursor| !cursor.is_scrollable);
        if has_such && file_bytes > self.temporary_max {
            let (what, max) = ("temporary files, of a cursor,".into(), self.temporary_max);
            self.pins.push(Pin::TooLarge { what, size: file_bytes, max });
        }
        if let Some(OfBackend { locks, slots, .. }) = backend {
            self.snapshot.locks = locks;
            self.pins.extend(slots.into_iter().map(|slot| Pin::TemporarySlot { slot }));
        }
        let size = self.snapshot.len();
        if size > ENTRIES_MAX {
            let (size, max) = (as_u64(size), as_u64(ENTRIES_MAX));
            self.pins.push(Pin::TooLarge { what: "session state".into(), size, max });
        }
        if self.snapshot.setting_bytes.is_some() {
            let mut unnamed =
                self.pins.extract_if(.., |pin| matches!(pin, Pin::CustomSettings { .. }));
            self.snapshot.may_have_unnamed = unnamed.next();
            unnamed.for_each(drop);
        }
        self.pins.sort();
        self.pins.dedup();
    }

    /// Puts the values of sequences into the snapshot, under the names that they have by now. One that was dropped
    /// has no value any more.
    pub fn name_sequences(&mut self, facts: &Facts) {
        let named = self.sequences.iter().filter_map(|(oid, held)| {
            let known = || facts.sequences.get(oid).map(|sequence| sequence.name.clone());
            held.temporary.clone().or_else(known).map(|name| (name, held.value))
        });
        self.snapshot.sequences = named.collect();
    }

    fn pin_sequences(&mut self, facts: &Facts) {
        let mut pin = |why: String| self.pins.push(Pin::Sequences { why });
        if (self.unasked_sequences || !self.sequences.is_empty())
            && let Some(why) = &facts.sequences_refused
        {
            pin(why.clone());
        }
        for (oid, held) in &self.sequences {
            let Some(sequence) = facts.sequences.get(oid) else { continue };
            let name = &sequence.name;
            if !held.own {
                pin(format!("it takes the owner of `{name}`, which the session's user is not"));
            }
            if held.value < sequence.min || held.value > sequence.max {
                let (min, max) = (sequence.min, sequence.max);
                pin(format!("{} is not from {min} to {max}, the bounds of `{name}`", held.value));
            }
        }
        if let Some(last) = self.snapshot.last_value
            && !self.unasked_sequences
            && !self.snapshot.sequences.values().any(|value| *value == last)
        {
            pin("the session may not use the sequence of lastval any more".into());
        }
    }
}

/// The answers are not what the questions ask for: the server is not the PostgreSQL it says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server's answer to a capture has no {0}")]
pub struct Unreadable(pub(super) &'static str);

/// Whether a row of an answer to [`questions`] says anything: most settings are as they are configured, and there
/// are hundreds of them.
pub fn matters(subject: &Subject<'_>, answer: usize, row: &[Option<&[u8]>]) -> bool {
    if answer != ANSWER_SETTINGS && answer != ANSWER_BENEATH {
        return true;
    }
    let cell = |at: usize| row.get(at).copied().flatten().unwrap_or_default();
    let Ok(name) = std::str::from_utf8(cell(0)) else { return true };
    if answer == ANSWER_BENEATH {
        return subject.facts.resets.get(name).is_some_and(|reset| reset.as_bytes() != cell(1));
    }
    let configured = subject.reference.configured.get(name);
    !subject.facts.fixed.contains(name)
        && configured.is_none_or(|configured| configured.value.as_bytes() != cell(1))
}

/// Reads the answers to [`questions`], and the INFO messages that came with them.
///
/// # Errors
/// A column is missing or is not what was asked for.
pub fn read<'a>(
    subject: &Subject<'_>,
    rows: impl Fn(usize) -> &'a [Row],
    infos: &[String],
) -> Result<Captured, Unreadable> {
    let mut captured = Captured {
        pins: subject.facts.pins.clone(),
        temporary_max: subject.temporary_max,
        ..Captured::default()
    };
    let mut rounded = Vec::new();
    captured.snapshot.libraries = subject.libraries.clone();
    let snapshot = &mut captured.snapshot;
    let reference = &subject.reference.configured;
    let mut set = |name: &str, value: &str| {
        if name.contains('.') {
            // Of a library: on the other server it may not be loaded yet, and the setting a custom one.
            if reference.get(name).is_none_or(|configured| configured.value != value) {
                snapshot.custom.insert(name.into(), value.into());
            }
        } else if reference.get(name).is_none_or(|configured| configured.value != value) {
            snapshot.settings.insert(name.into(), value.into());
        }
    };
    let aside = put_aside(subject.version);
    for row in rows(ANSWER_SETTINGS) {
        let name = text(row, 0)?;
        if !aside.contains(&name)
            && !NOT_STATE.contains(&name)
            && !subject.facts.fixed.contains(name)
        {
            // A setting without a value is an empty text.
            let value = optional(row, 1).unwrap_or_default();
            if is_rounded(value)
                && reference.get(name).is_none_or(|configured| configured.value != value)
            {
                rounded.push(Pin::Refused {
                    what: format!("setting {name}"),
                    error: format!("its value is shown as {value}, with six digits at most"),
                });
            }
            set(name, value);
        }
    }
    let first = rows(ANSWER_PUT_ASIDE).first().ok_or(Unreadable("settings"))?;
    for (at, name) in aside.iter().enumerate() {
        set(name, text(first, at)?);
    }
    snapshot.role = text(first, aside.len())?.to_owned();
    snapshot.session_user = text(first, aside.len() + 1)?.to_owned();
    captured.temporary_schema =
        text(first, aside.len() + 2)?.parse().map_err(|_| Unreadable("temporary schema"))?;
    captured.pins.append(&mut rounded);
    captured.unasked_sequences =
        subject.facts.has_too_many_sequences() && may_have_sequences(subject, infos);
    captured.backend = subject.alone.then(OfBackend::default);
    for row in rows(ANSWER_STATE) {
        read_row(row, &mut captured)?;
    }
    if subject.beneath {
        let mut beneath = BTreeMap::new();
        for row in rows(ANSWER_BENEATH) {
            beneath.insert(text(row, 0)?.to_owned(), text(row, 1)?.to_owned());
        }
        captured.snapshot.beneath = Some(beneath);
    }
    for info in infos {
        read_info(info, &mut captured);
    }
    // The two servers' own settings take different memory; what a session adds is the same.
    let own = captured.setting_bytes.zip(subject.facts.setting_bytes);
    captured.snapshot.setting_bytes = own.map(|(bytes, of_server)| bytes - of_server);
    Ok(captured)
}

/// Whether a value may be a real number of more digits than SHOW gives (`%g`).
fn is_rounded(value: &str) -> bool {
    let mantissa = value.split(['e', 'E']).next().unwrap_or_default();
    let number = mantissa.trim_start_matches('-');
    let is_real = !number.is_empty()
        && (number.contains('.') || number.len() < value.trim_start_matches('-').len())
        && number.chars().all(|c| c.is_ascii_digit() || c == '.');
    let digits = number.chars().filter(char::is_ascii_digit).collect::<String>();
    is_real && value.parse::<f64>().is_ok() && digits.trim_start_matches('0').len() >= 6
}

fn read_info(info: &str, captured: &mut Captured) {
    let Some(told) = info.strip_prefix("holdfast: ") else { return };
    if told == "replication origin" {
        captured.pins.push(Pin::ReplicationOrigin);
    } else if let Some(bytes) = told.strip_prefix("settings take ") {
        captured.setting_bytes = bytes.parse().ok();
    } else if told == "lastval hidden" {
        let why = "the session's role may not ask for lastval".into();
        captured.pins.push(Pin::Sequences { why });
    } else if let Some(value) = told.strip_prefix("lastval ") {
        captured.snapshot.last_value = value.parse().ok();
    } else if let Some(rest) = told.strip_prefix("currval ") {
        let mut parts = rest.splitn(4, ' ');
        let (own, value, oid) = (parts.next(), parts.next(), parts.next());
        let (Some(own), Some(Ok(value)), Some(Ok(oid))) =
            (own, value.map(str::parse), oid.map(str::parse))
        else {
            return;
        };
        let temporary = parts.next().filter(|name| !name.is_empty()).map(str::to_owned);
        captured.sequences.insert(oid, SequenceValue { value, own: own == "t", temporary });
    }
}

fn as_u64(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

fn read_row(row: &Row, captured: &mut Captured) -> Result<(), Unreadable> {
    let snapshot = &mut captured.snapshot;
    match text(row, 0)? {
        "custom" => {
            snapshot.custom.insert(text(row, 1)?.to_owned(), text(row, 2)?.to_owned());
        }
        "prepared" => {
            let mut prepared = Prepared {
                text: text(row, 2)?.to_owned(),
                from_sql: matches!(text(row, 3)?, "true" | "t"),
                types: text(row, 4)?.lines().map(str::to_owned).collect(),
            };
            let name = text(row, 1)?.to_owned();
            let why = statement::repeatable(&name, &mut prepared).err().map(str::to_owned);
            captured.pins.extend(why.map(|why| Pin::Prepared { name: name.clone(), why }));
            snapshot.prepared.insert(name, prepared);
        }
        "cursor" => {
            let name = text(row, 1)?.to_owned();
            let yes = |at| Ok::<_, Unreadable>(matches!(text(row, at)?, "true" | "t"));
            if yes(3)? {
                let why = "its rows come in binary".into();
                captured.pins.push(Pin::HoldCursor { name: name.clone(), why });
            }
            snapshot.cursors.insert(name, Cursor { is_scrollable: yes(2)? });
        }
        "channel" => drop(snapshot.channels.insert(text(row, 1)?.to_owned())),
        kind => {
            let backend = captured.backend.as_mut().ok_or(Unreadable("known kind of row"))?;
            return backend.read(kind, row);
        }
    }
    Ok(())
}

pub(super) fn optional(row: &Row, at: usize) -> Option<&str> {
    row.get(at).and_then(Option::as_deref)
}

pub(super) fn text(row: &Row, at: usize) -> Result<&str, Unreadable> {
    optional(row, at).ok_or(Unreadable("text in a column"))
}

/// Counts how often each lock is held, by letting go of it until it is gone, and takes it again as often.
/// Only while nobody else can take it: every client is held and the server is fenced. To be asked under
/// `search_path = pg_catalog`. The counts come as INFO messages, for [`read_lock_count`].
pub const COUNT_LOCKS: &str = "DO LANGUAGE plpgsql $holdfast$ DECLARE l record; n int; two boolean; got boolean; a int; b int; \
    k bigint; BEGIN FOR l IN SELECT classid::bigint AS c, objid::bigint AS o, objsubid AS s, mode AS m \
    FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() LOOP \
    two := l.s = 2; k := (l.c << 32) | l.o; \
    a := ((l.c + 2147483648) % 4294967296 - 2147483648)::int; \
    b := ((l.o + 2147483648) % 4294967296 - 2147483648)::int; n := 0; \
    WHILE EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() \
    AND classid::bigint = l.c AND objid::bigint = l.o AND objsubid = l.s AND mode = l.m) LOOP \
    IF l.m = 'ShareLock' THEN \
    IF two THEN PERFORM pg_advisory_unlock_shared(a, b); ELSE PERFORM pg_advisory_unlock_shared(k); END IF; \
    ELSIF two THEN PERFORM pg_advisory_unlock(a, b); ELSE PERFORM pg_advisory_unlock(k); END IF; \
    n := n + 1; END LOOP; \
    FOR i IN 1..n LOOP got := CASE WHEN l.m = 'ShareLock' THEN \
    CASE WHEN two THEN pg_try_advisory_lock_shared(a, b) ELSE pg_try_advisory_lock_shared(k) END \
    WHEN two THEN pg_try_advisory_lock(a, b) ELSE pg_try_advisory_lock(k) END; IF NOT got THEN \
    RAISE EXCEPTION 'advisory lock was taken meanwhile'; END IF; END LOOP; \
    RAISE INFO 'holdfast: lock % % % % %', l.c, l.o, l.s, l.m, n; END LOOP; END $holdfast$";

/// What Holdfast runs before and after statements of its own in a session whose settings may be in the way.
pub const PROTECT: &str = "SELECT pg_catalog.set_config('statement_timeout', '0', true), \
     pg_catalog.set_config('lock_timeout', '0', true), \
     pg_catalog.set_config('idle_in_transaction_session_timeout', '0', true), \
     pg_catalog.set_config('client_encoding', 'UTF8', true)";

/// Begins the transaction of a capture.
pub const BEGIN_READ: &str = "BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY NOT DEFERRABLE";

/// Begins a transaction that no default of the session can delay or refuse, also on a standby.
pub const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED NOT DEFERRABLE";

/// The same where something is created, whatever the session's default.
pub const BEGIN_WRITE: &str = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE NOT DEFERRABLE";

/// Reads one lock and its count from the text of an INFO message of [`COUNT_LOCKS`].
pub fn read_lock_count(message: &str) -> Option<(AdvisoryLock, u32)> {
    let mut words = message.strip_prefix("holdfast: lock ")?.split(' ');
    let mut number = || words.next()?.parse::<u32>().ok();
    let (classid, objid, objsubid) = (number()?, number()?, u16::try_from(number()?).ok()?);
    let shared = words.next()? == "ShareLock";
    let count = words.next()?.parse().ok()?;
    Some((AdvisoryLock { classid, objid, objsubid, shared }, count))
}

#[cfg(test)]
mod tests;
