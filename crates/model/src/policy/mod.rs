//! The command policy: what a command does, and what the state of a cell makes of it.
//!
//! - here: commands, and what is known of functions, operators and views that they use.
//! - [`rules`]: the rules, and the verdict on a request.
//!
//! A request passes only if each of its commands does. What a text holds is read by PostgreSQL's own grammar; what is not
//! known is refused. The policy is the first line: a fenced server takes no writes by itself either.

use std::collections::BTreeSet;

pub mod rules;

pub use rules::{Asked, Disposition, Policy, Refusal, Rule, Transaction};

/// What a command does, at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Gives rows, or moves in a cursor, and changes nothing.
    Read,
    /// Changes the session and nothing else: settings, prepared statements, channels, portals.
    Session,
    /// Begins a transaction that does not ask to write.
    Begin,
    /// Ends a transaction and keeps what it has done.
    Commit,
    /// Ends a transaction, or a part of one, and keeps nothing, or marks a point in it.
    Rollback,
    /// Runs what was prepared by SQL: that counts.
    Execute,
    /// Locks rows, which writes to them.
    RowLock,
    /// Changes rows.
    Write,
    /// Changes what there is: tables, functions, roles.
    Definition,
    /// Runs code that the text does not show all of: `DO`, `CALL`, functions that may write.
    Code,
    /// Asks for leave to write, whatever the server's default is.
    Unfence,
    /// Wakes other sessions.
    Notify,
    /// Locks tables.
    Lock,
    /// Rewrites, or keeps the books of, what there is: `VACUUM`, `ANALYZE`, `REINDEX`, `CLUSTER`, `CHECKPOINT`.
    Maintenance,
    /// Prepares a transaction to be committed later, by whomever, or does that.
    TwoPhase,
    /// Reads or writes the server's files, runs its programs, or changes its configuration.
    Server,
    /// A function called by its OID, by the function call protocol.
    FunctionCall,
    /// A command of a replication connection.
    Replication,
    /// Nothing is known of it.
    Unknown,
}

impl Class {
    pub const ALL: [Class; 19] = [
        Class::Read,
        Class::Session,
        Class::Begin,
        Class::Commit,
        Class::Rollback,
        Class::Execute,
        Class::RowLock,
        Class::Write,
        Class::Definition,
        Class::Code,
        Class::Unfence,
        Class::Notify,
        Class::Lock,
        Class::Maintenance,
        Class::TwoPhase,
        Class::Server,
        Class::FunctionCall,
        Class::Replication,
        Class::Unknown,
    ];

    /// Those that write nothing by themselves.
    pub const READING: [Class; 6] =
        [Class::Read, Class::Session, Class::Begin, Class::Commit, Class::Rollback, Class::Execute];

    /// As rules and messages name it.
    pub fn name(self) -> &'static str {
        match self {
            Class::Read => "read",
            Class::Session => "session",
            Class::Begin => "begin",
            Class::Commit => "commit",
            Class::Rollback => "rollback",
            Class::Execute => "execute",
            Class::RowLock => "row_lock",
            Class::Write => "write",
            Class::Definition => "definition",
            Class::Code => "code",
            Class::Unfence => "unfence",
            Class::Notify => "notify",
            Class::Lock => "lock",
            Class::Maintenance => "maintenance",
            Class::TwoPhase => "two_phase",
            Class::Server => "server",
            Class::FunctionCall => "function_call",
            Class::Replication => "replication",
            Class::Unknown => "unknown",
        }
    }

    pub fn read(name: &str) -> Option<Class> {
        Class::ALL.into_iter().find(|class| class.name() == name)
    }
}

/// One command of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// As the manual names it, such as `SELECT`; several that are defined alike share one name.
    pub name: &'static str,
    pub class: Class,
    /// What it does besides: a command may define and write in one.
    pub also: BTreeSet<Class>,
    /// Functions that it calls, without their schemas.
    pub functions: BTreeSet<String>,
    pub operators: BTreeSet<String>,
    /// Relations that it names, which may be views over functions.
    pub relations: BTreeSet<String>,
    /// Types that it casts to, which may run code.
    pub types: BTreeSet<String>,
    /// Names of columns, which may be functions of the row.
    pub columns: BTreeSet<String>,
    /// What later versions have a syntax for, and an earlier server knows as functions, if anybody has made them.
    pub syntax: BTreeSet<String>,
    /// The statement that `EXECUTE` runs, or that `PREPARE` prepares.
    pub prepared: Option<String>,
    /// What `PREPARE` prepares does this.
    pub prepares: Option<BTreeSet<Class>>,
    /// The cursor, or portal, that `FETCH` or `MOVE` runs.
    pub cursor: Option<String>,
}

impl Command {
    pub fn new(name: &'static str, class: Class) -> Command {
        Command {
            name,
            class,
            also: BTreeSet::new(),
            functions: BTreeSet::new(),
            operators: BTreeSet::new(),
            relations: BTreeSet::new(),
            types: BTreeSet::new(),
            columns: BTreeSet::new(),
            syntax: BTreeSet::new(),
            prepared: None,
            prepares: None,
            cursor: None,
        }
    }

    /// It calls what may do more than read. Without a catalog nothing is known.
    pub fn calls(&self, catalog: Option<&Catalog>) -> bool {
        let Some(catalog) = catalog else {
            let names =
                [&self.functions, &self.operators, &self.relations, &self.types, &self.syntax];
            return names.iter().any(|names| !names.is_empty());
        };
        let named = |names: &BTreeSet<String>, of: &BTreeSet<String>| {
            names.iter().any(|name| of.contains(name))
        };
        self.functions.iter().any(|name| catalog.function(name) == Effect::Unknown)
            || named(&self.operators, &catalog.operators)
            || named(&self.relations, &catalog.views)
            || named(&self.types, &catalog.types)
            || named(&self.columns, &catalog.attributes)
            || named(&self.syntax, &catalog.attributes)
    }

    /// What it does once it is known what it calls: each of these has to be accepted.
    pub fn classes_with(&self, catalog: Option<&Catalog>) -> impl Iterator<Item = Class> {
        let calls = self.calls(catalog);
        // What only reads is code then, and nothing else.
        let own =
            (!calls || !matches!(self.class, Class::Read | Class::Session)).then_some(self.class);
        own.into_iter().chain(self.also.iter().copied()).chain(calls.then_some(Class::Code))
    }

    /// All that it does by itself.
    pub fn own_classes(&self) -> BTreeSet<Class> {
        self.also.iter().copied().chain([self.class]).collect()
    }
}

/// What a function may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    Reads,
    Unknown,
}

/// What names stand for in a database, as far as the policy is concerned. Names are without their schemas: which one is
/// meant hangs on the search path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Catalog {
    /// Functions of that name are all immutable or stable, or volatile and known to be harmless.
    pub reading: BTreeSet<String>,
    /// Operators of which one runs a volatile function.
    pub operators: BTreeSet<String>,
    /// Views that call a function that is not among the reading ones, also by other views.
    pub views: BTreeSet<String>,
    /// Domains and types with casts that call such a function.
    pub types: BTreeSet<String>,
    /// Functions that are not among the reading ones and not PostgreSQL's own: of a row they may be written as a column.
    pub attributes: BTreeSet<String>,
}

impl Catalog {
    fn function(&self, name: &str) -> Effect {
        if self.reading.contains(name) { Effect::Reads } else { Effect::Unknown }
    }
}

/// Asks for [`Catalog`]: kinds and names. A function counts as reading if everything of its name is declared so, or is
/// PostgreSQL's own and harmless: random numbers, clocks, sleeping, and what only the session sees.
pub const QUESTION: &str = "\
    WITH harmless (name) AS (SELECT pg_catalog.unnest(ARRAY['random', 'random_normal', 'clock_timestamp', \
        'timeofday', 'gen_random_uuid', 'uuidv4', 'uuidv7', 'pg_sleep', 'pg_sleep_for', 'pg_sleep_until', 'currval', \
        'lastval', 'pg_is_in_recovery', 'pg_last_wal_receive_lsn', 'pg_last_wal_replay_lsn', \
        'pg_last_xact_replay_timestamp', 'pg_relation_size', 'pg_table_size', 'pg_total_relation_size', \
        'pg_indexes_size', 'pg_database_size', 'pg_tablespace_size', 'pg_relation_filepath', 'pg_lock_status', \
        'pg_show_all_settings', 'pg_timezone_names', 'pg_timezone_abbrevs', 'pg_cursor', 'pg_prepared_statement', \
        'pg_prepared_xact', 'pg_notification_queue_usage', 'pg_listening_channels', 'pg_blocking_pids', \
        'pg_safe_snapshot_blocking_pids', 'pg_isolation_test_session_is_blocked', 'pg_current_wal_lsn', \
        'pg_current_wal_insert_lsn', 'pg_current_wal_flush_lsn', 'pg_get_backend_memory_contexts', \
        'pg_control_checkpoint', 'pg_control_system', 'pg_control_init', 'pg_control_recovery', 'pg_stat_get_activity'])), \
    components AS (SELECT a.aggfnoid::pg_catalog.oid AS oid FROM pg_catalog.pg_aggregate a JOIN pg_catalog.pg_proc p \
        ON p.oid OPERATOR(pg_catalog.=) ANY (ARRAY[a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggserialfn, \
            a.aggdeserialfn, a.aggmtransfn, a.aggminvtransfn, a.aggmfinalfn]::pg_catalog.oid[]) \
        WHERE p.provolatile OPERATOR(pg_catalog.=) 'v'), \
    proc AS (SELECT p.oid, p.proname, p.provolatile OPERATOR(pg_catalog.<>) 'v' \
            AND p.proname OPERATOR(pg_catalog.!~) '_to_xml' AND NOT (l.lanname OPERATOR(pg_catalog.=) 'c' \
                AND p.prosrc OPERATOR(pg_catalog.~) '^(crosstab|connectby|xpath_table|dblink)') AND NOT p.oid OPERATOR(pg_catalog.=) ANY (SELECT oid FROM components) \
            OR (p.pronamespace OPERATOR(pg_catalog.=) 'pg_catalog'::pg_catalog.regnamespace \
                AND p.proname OPERATOR(pg_catalog.=) ANY (SELECT name FROM harmless)) AS reads \
        FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_language l ON l.oid OPERATOR(pg_catalog.=) p.prolang \
        WHERE p.prokind OPERATOR(pg_catalog.<>) 'p'), \
    functions AS (SELECT proname, pg_catalog.bool_and(reads) AS reads FROM proc GROUP BY proname), \
    rewritten AS (SELECT r.ev_class, pg_catalog.regexp_matches(r.ev_action::pg_catalog.text, \
            ':(funcid|opfuncid|aggfnoid|winfnoid|opno|relid|resulttype) ([0-9]+)', 'g') AS found \
        FROM pg_catalog.pg_rewrite r JOIN pg_catalog.pg_class c ON c.oid OPERATOR(pg_catalog.=) r.ev_class \
        WHERE c.relkind OPERATOR(pg_catalog.=) 'v' AND r.ev_type OPERATOR(pg_catalog.=) '1'), \
    parts AS (SELECT DISTINCT ev_class, found[1] AS kind, found[2]::pg_catalog.oid AS oid FROM rewritten), \
    domains AS (WITH RECURSIVE within (oid) AS (SELECT t.oid FROM pg_catalog.pg_type t \
            WHERE t.typtype OPERATOR(pg_catalog.=) 'd' AND t.oid OPERATOR(pg_catalog.>=) 16384 AND EXISTS (SELECT FROM \
                pg_catalog.pg_constraint k WHERE k.contypid OPERATOR(pg_catalog.=) t.oid AND k.contype OPERATOR(pg_catalog.=) 'c') \
        UNION SELECT over.oid FROM within JOIN (SELECT t.typbasetype AS of, t.oid FROM pg_catalog.pg_type t \
                WHERE t.typbasetype OPERATOR(pg_catalog.<>) 0 \
            UNION ALL SELECT t.typelem, t.oid FROM pg_catalog.pg_type t WHERE t.typelem OPERATOR(pg_catalog.<>) 0 \
            UNION ALL SELECT g.rngsubtype, g.rngtypid FROM pg_catalog.pg_range g \
            UNION ALL SELECT g.rngtypid, g.rngmultitypid FROM pg_catalog.pg_range g \
            UNION ALL SELECT a.atttypid, c.reltype FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c \
                ON c.oid OPERATOR(pg_catalog.=) a.attrelid WHERE a.attnum OPERATOR(pg_catalog.>) 0 AND NOT a.attisdropped \
                AND c.reltype OPERATOR(pg_catalog.<>) 0) over ON over.of OPERATOR(pg_catalog.=) within.oid) \
        SELECT t.oid, t.typname FROM within JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) within.oid), \
    guarded AS (SELECT p.polrelid, found[1]::pg_catalog.text AS kind, found[2]::pg_catalog.oid AS oid FROM pg_catalog.pg_policy p JOIN pg_catalog.pg_class c \
        ON c.oid OPERATOR(pg_catalog.=) p.polrelid AND c.relrowsecurity, \
        pg_catalog.regexp_matches(pg_catalog.concat(p.polqual, p.polwithcheck), ':(funcid|opfuncid|opno) ([0-9]+)', 'g') AS found), \
    risky AS (SELECT ev_class AS oid FROM parts p JOIN proc f ON f.oid OPERATOR(pg_catalog.=) p.oid \
            WHERE p.kind OPERATOR(pg_catalog.=) ANY (ARRAY['funcid', 'opfuncid', 'aggfnoid', 'winfnoid']) AND NOT f.reads \
        UNION SELECT ev_class FROM parts p JOIN pg_catalog.pg_operator o ON o.oid OPERATOR(pg_catalog.=) p.oid \
            JOIN proc f ON f.oid OPERATOR(pg_catalog.=) o.oprcode WHERE p.kind OPERATOR(pg_catalog.=) 'opno' AND NOT f.reads \
        UNION SELECT ev_class FROM parts p JOIN domains d ON d.oid OPERATOR(pg_catalog.=) p.oid \
            WHERE p.kind OPERATOR(pg_catalog.=) 'resulttype' \
        UNION SELECT polrelid FROM guarded g LEFT JOIN pg_catalog.pg_operator o \
            ON g.kind OPERATOR(pg_catalog.=) 'opno' AND o.oid OPERATOR(pg_catalog.=) g.oid JOIN proc f \
            ON f.oid OPERATOR(pg_catalog.=) COALESCE(o.oprcode::pg_catalog.oid, g.oid) WHERE NOT f.reads) \
    SELECT 'function', proname::pg_catalog.text FROM functions WHERE reads \
    UNION ALL SELECT DISTINCT 'attribute', proname::pg_catalog.text FROM proc WHERE oid OPERATOR(pg_catalog.>=) 16384 AND NOT reads \
    UNION ALL SELECT DISTINCT 'operator', o.oprname::pg_catalog.text FROM pg_catalog.pg_operator o \
        JOIN proc f ON f.oid OPERATOR(pg_catalog.=) o.oprcode WHERE NOT f.reads \
    UNION ALL SELECT DISTINCT 'type', typname::pg_catalog.text FROM domains \
    UNION ALL SELECT DISTINCT 'type', t.typname::pg_catalog.text FROM pg_catalog.pg_cast c \
        JOIN pg_catalog.pg_type t ON t.oid OPERATOR(pg_catalog.=) c.casttarget \
        JOIN proc f ON f.oid OPERATOR(pg_catalog.=) c.castfunc WHERE NOT f.reads \
    UNION ALL SELECT DISTINCT 'view', c.relname::pg_catalog.text FROM pg_catalog.pg_class c WHERE c.oid OPERATOR(pg_catalog.=) ANY ( \
        WITH RECURSIVE over (oid) AS (SELECT oid FROM risky UNION SELECT p.ev_class FROM parts p \
            JOIN over ON over.oid OPERATOR(pg_catalog.=) p.oid WHERE p.kind OPERATOR(pg_catalog.=) 'relid') SELECT oid FROM over)";

impl Catalog {
    /// Reads the answer to [`QUESTION`]. None if it is of another shape.
    pub fn read<'a>(rows: impl IntoIterator<Item = (&'a str, &'a str)>) -> Option<Catalog> {
        let mut catalog = Catalog::default();
        for (kind, name) in rows {
            let names = match kind {
                "function" => &mut catalog.reading,
                "operator" => &mut catalog.operators,
                "view" => &mut catalog.views,
                "type" => &mut catalog.types,
                "attribute" => &mut catalog.attributes,
                _ => return None,
            };
            names.insert(name.to_owned());
        }
        Some(catalog)
    }
}
