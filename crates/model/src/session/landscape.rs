//! What the names of a database stand for: which functions and relations may leave something in a session that uses
//! them, be it through a trigger, a view or a default.
//!
//! Names are taken without their schemas, so a harmless function that is called as a risky one counts as risky.
//! Each object has texts: a function its body, a relation the definitions of its triggers, rules, defaults, policies,
//! constraints and indexes, and the names of relations that are changed with it. An object whose text names a risky
//! one is risky itself.

use std::collections::BTreeMap;

use super::capture::{Row, Unreadable, optional, text};
use super::footprint::{self, Leaves};

/// Bytes of all texts that are looked through.
const TEXTS_LEN_MAX: usize = 64 * 1024 * 1024;

/// What a word of a statement may stand for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Meaning {
    pub(super) leaves: Leaves,
    /// A function or relation that is known, or a keyword, before a parenthesis.
    pub(super) is_known: bool,
    /// Behind this keyword an expression begins.
    pub(super) begins: bool,
}

/// Every word of every statement is looked up here, and nobody walks through it.
#[expect(clippy::disallowed_types, reason = "its order is never seen")]
type Words = std::collections::HashMap<Box<[u8]>, Meaning>;

/// The names of one database.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Landscape {
    words: Words,
    /// Why every statement may leave something.
    pub refused: Option<String>,
    /// There are functions whose compiled form depends on the search path: types of their variables are looked up
    /// once in a session.
    pub depends_on_path: bool,
    /// There are functions that are called immutable and read settings or the user: plans hold what they gave.
    pub folds: bool,
}

/// What Holdfast's own connection is asked, under `search_path = pg_catalog`. A row is a kind, a name and a text:
///
/// - `volatile`, `known`: functions of PostgreSQL, by whether they may do something.
/// - `opaque`: a function whose body cannot be read.
/// - `function`, `relation`: what may be risky, with a text of it.
/// - `path`, `repath`: a function whose compiled form depends on the search path, as types of one name are in several
///   schemas; and one that has a search path of its own then.
/// - `folds`: an immutable function that reads settings or the user.
/// - `everywhere`: what is used without being named, such as an operator or a cast, with its function's name.
pub const QUESTION: &str = "WITH own AS MATERIALIZED (SELECT p.oid, proname::text AS name, lanname::text AS language, \
     provolatile, proconfig, CASE WHEN prosqlbody IS NULL THEN prosrc ELSE pg_get_function_sqlbody(p.oid) END AS body, \
     (SELECT extname::text FROM pg_depend d JOIN pg_extension e ON e.oid = d.refobjid \
     WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e' LIMIT 1) AS extension \
     FROM pg_proc p JOIN pg_language l ON l.oid = prolang WHERE p.oid >= 16384) \
     SELECT DISTINCT CASE provolatile WHEN 'v' THEN 'volatile' ELSE 'known' END, proname::text, NULL FROM pg_proc \
     WHERE oid < 16384 AND prokind <> 'a' UNION ALL \
     SELECT DISTINCT 'known', proname::text, NULL FROM pg_proc WHERE oid < 16384 AND prokind = 'a' UNION ALL \
     SELECT CASE WHEN language IN ('sql','plpgsql') THEN 'function' \
     WHEN language = 'internal' AND EXISTS (SELECT FROM pg_proc b WHERE b.oid < 16384 AND b.prosrc = body \
     AND b.provolatile <> 'v') OR language = 'c' AND (provolatile <> 'v' OR extension IN ('uuid-ossp','pgcrypto',\
     'hstore','citext','ltree','intarray','cube','earthdistance','fuzzystrmatch','unaccent','btree_gin',\
     'btree_gist','postgis','vector','pg_stat_statements','postgres_fdw','file_fdw','lo','seg')) THEN 'known' \
     ELSE 'opaque' END, name, CASE WHEN language IN ('sql','plpgsql') THEN body END FROM own UNION ALL \
     SELECT 'opaque', name, NULL FROM own WHERE EXISTS (SELECT FROM unnest(proconfig) c \
     WHERE split_part(c, '=', 1) NOT IN ('application_name','client_min_messages','default_transaction_deferrable',\
     'default_transaction_isolation','default_transaction_read_only','idle_in_transaction_session_timeout','lock_timeout',\
     'maintenance_work_mem','role','search_path','statement_timeout','synchronous_commit','work_mem')) UNION ALL \
     SELECT 'opaque', name, NULL FROM own WHERE language = 'sql' AND body ~* $$\\minto\\M$$ \
     AND body !~* $$\\m(insert|merge)\\s+into\\M$$ UNION ALL \
     SELECT 'function', p.proname::text, pg_get_expr(p.proargdefaults, 0) FROM pg_proc p \
     WHERE p.oid >= 16384 AND p.proargdefaults IS NOT NULL UNION ALL \
     SELECT 'relation', c.relname::text, pg_get_expr(t.partexprs, t.partrelid) FROM pg_partitioned_table t \
     CROSS JOIN LATERAL pg_partition_tree(t.partrelid) r JOIN pg_class c ON c.oid = r.relid \
     WHERE t.partexprs IS NOT NULL UNION ALL \
     SELECT 'everywhere', p.proname::text, quote_ident(p.proname) FROM pg_amproc a \
     JOIN pg_proc p ON p.oid = a.amproc WHERE a.oid >= 16384 AND p.oid >= 16384 UNION ALL \
     SELECT CASE WHEN EXISTS (SELECT FROM unnest(proconfig) c WHERE c LIKE 'search_path=%') THEN 'repath' ELSE 'path' END, \
     name, NULL FROM own WHERE language IN ('sql','plpgsql') AND EXISTS (SELECT FROM pg_type t WHERE t.oid >= 16384 AND t.typelem = 0 \
     AND t.typnamespace IN (SELECT oid FROM pg_namespace WHERE nspname !~ '^pg_(toast|temp)') \
     AND EXISTS (SELECT FROM pg_type o WHERE o.typname = t.typname AND o.oid <> t.oid AND o.typelem = 0 \
     AND o.typnamespace IN (SELECT oid FROM pg_namespace WHERE nspname !~ '^pg_(toast|temp)'))) UNION ALL \
     SELECT 'folds', name, NULL FROM own WHERE provolatile = 'i' AND language IN ('sql','plpgsql') \
     AND body ~* $$\\m(current_setting|current_user|current_role|session_user|user|current_schemas?|set_config)\\M$$ UNION ALL \
     SELECT 'relation', relname::text, NULL FROM pg_class WHERE relkind IN ('r','v','m','p','f') UNION ALL \
     SELECT 'relation', c.relname::text, pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef d \
     JOIN pg_class c ON c.oid = d.adrelid WHERE c.relpersistence <> 't' UNION ALL \
     SELECT 'relation', c.relname::text, 'nextval' FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid \
     WHERE a.attidentity <> '' AND c.relpersistence <> 't' UNION ALL \
     SELECT 'relation', c.relname::text, quote_ident(p.proname) FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid \
     JOIN pg_proc p ON p.oid = t.tgfoid WHERE NOT t.tgisinternal UNION ALL \
     SELECT 'relation', c.relname::text, regexp_replace(pg_get_triggerdef(t.oid), \
     '^CREATE|EXECUTE (FUNCTION|PROCEDURE)', '', 'g') FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid \
     WHERE NOT t.tgisinternal AND t.tgqual IS NOT NULL UNION ALL \
     SELECT 'relation', c.relname::text, regexp_replace(pg_get_ruledef(r.oid), '^CREATE', '') FROM pg_rewrite r JOIN pg_class c ON c.oid = r.ev_class \
     WHERE r.oid >= 16384 UNION ALL \
     SELECT 'relation', c.relname::text, \
     concat_ws(' ', pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid)) \
     FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid UNION ALL \
     SELECT 'relation', c.relname::text, pg_get_constraintdef(k.oid) FROM pg_constraint k \
     JOIN pg_class c ON c.oid = k.conrelid WHERE k.contype = 'c' AND k.oid >= 16384 UNION ALL \
     SELECT 'everywhere', t.typname::text, pg_get_constraintdef(k.oid) FROM pg_constraint k \
     JOIN pg_type t ON t.oid = k.contypid WHERE k.oid >= 16384 UNION ALL \
     SELECT 'everywhere', typname::text, typdefault FROM pg_type \
     WHERE oid >= 16384 AND typtype = 'd' AND typdefault IS NOT NULL UNION ALL \
     SELECT 'relation', c.relname::text, concat_ws(' ', pg_get_expr(i.indexprs, i.indrelid), \
     pg_get_expr(i.indpred, i.indrelid)) FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid \
     WHERE i.indexrelid >= 16384 AND (i.indexprs IS NOT NULL OR i.indpred IS NOT NULL) UNION ALL \
     SELECT 'relation', parent.relname::text, quote_ident(child.relname) FROM pg_constraint k \
     JOIN pg_class child ON child.oid = k.conrelid JOIN pg_class parent ON parent.oid = k.confrelid \
     WHERE k.contype = 'f' UNION ALL \
     SELECT 'relation', parent.relname::text, quote_ident(child.relname) FROM pg_inherits i \
     JOIN pg_class child ON child.oid = i.inhrelid JOIN pg_class parent ON parent.oid = i.inhparent \
     WHERE child.relkind IN ('r','p','f') UNION ALL \
     SELECT 'everywhere', o.oprname::text, quote_ident(p.proname) FROM pg_operator o JOIN pg_proc p ON p.oid = o.oprcode \
     WHERE o.oid >= 16384 UNION ALL \
     SELECT 'everywhere', format_type(c.casttarget, NULL), quote_ident(p.proname) FROM pg_cast c \
     JOIN pg_proc p ON p.oid = c.castfunc WHERE c.oid >= 16384 UNION ALL \
     SELECT 'everywhere', t.typname::text, quote_ident(p.proname) FROM pg_type t \
     JOIN pg_proc p ON p.oid IN (t.typinput, t.typoutput, t.typreceive, t.typsend) WHERE t.oid >= 16384 \
     AND p.oid >= 16384 UNION ALL \
     SELECT 'everywhere', r.rngtypid::regtype::text, quote_ident(p.proname) FROM pg_range r \
     JOIN pg_proc p ON p.oid IN (r.rngsubdiff, r.rngcanonical) WHERE r.rngtypid >= 16384 UNION ALL \
     SELECT 'function', f.proname::text, quote_ident(p.proname) FROM pg_aggregate a JOIN pg_proc f ON f.oid = a.aggfnoid \
     JOIN pg_proc p ON p.oid IN (a.aggtransfn, a.aggfinalfn, a.aggcombinefn, a.aggserialfn, a.aggdeserialfn, a.aggmtransfn, \
     a.aggminvtransfn, a.aggmfinalfn) WHERE a.aggfnoid >= 16384";

/// A number that changes with anything that [`QUESTION`] reads, nearly always: cheap enough to be asked every second.
pub const CHANGED_QUESTION: &str = "WITH lasting AS MATERIALIZED \
     (SELECT oid FROM pg_class WHERE oid >= 16384 AND relpersistence <> 't') SELECT concat_ws(',', \
     (SELECT concat(count(*), '/', sum(hashtext(xmin::text)::bigint)) FROM pg_proc WHERE oid >= 16384), \
     (SELECT concat(count(*), '/', sum(hashtext(xmin::text)::bigint)) FROM pg_trigger), \
     (SELECT concat(count(*), '/', sum(hashtext(xmin::text)::bigint)) FROM pg_rewrite WHERE oid >= 16384), \
     (SELECT concat(count(*), '/', sum(hashtext(xmin::text)::bigint)) FROM pg_attrdef WHERE adrelid IN (SELECT oid FROM lasting)), \
     (SELECT concat(count(*), '/', sum(hashtext(xmin::text)::bigint)) FROM pg_constraint \
     WHERE conrelid = 0 OR conrelid IN (SELECT oid FROM lasting)), \
     (SELECT concat(count(*), '/', sum(hashtext(xmin::text)::bigint)) FROM pg_policy), \
     (SELECT concat(count(*), '/', sum(xmin::text::bigint)) FROM pg_class WHERE oid IN (SELECT oid FROM lasting)), \
     (SELECT concat(count(*), '/', sum(xmin::text::bigint)) FROM pg_attribute \
     WHERE attrelid IN (SELECT oid FROM lasting) AND attnum > 0), \
     (SELECT concat(count(*), '/', sum(xmin::text::bigint)) FROM pg_type WHERE oid >= 16384 \
     AND typnamespace IN (SELECT oid FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp')), (SELECT concat_ws('/', sum(xmin::text::bigint), count(*)) FROM pg_operator WHERE oid >= 16384), \
     (SELECT concat_ws('/', sum(xmin::text::bigint), count(*)) FROM pg_cast WHERE oid >= 16384), \
     (SELECT concat_ws('/', sum(xmin::text::bigint), count(*)) FROM pg_amproc WHERE oid >= 16384), \
     (SELECT concat_ws('/', sum(xmin::text::bigint), count(*)) FROM pg_inherits WHERE inhrelid IN (SELECT oid FROM lasting)))";

/// Two marks: one that changes when the server reads its configuration anew, and one that changes with roles, their
/// rights and defaults, and databases. To be asked as [`CHANGED_QUESTION`].
pub const LOGINS_QUESTION: &str = "SELECT pg_conf_load_time()::text, concat_ws(',', \
     (SELECT concat(count(*), '/', sum(xmin::text::bigint)) FROM pg_authid), \
     (SELECT concat(count(*), '/', sum(xmin::text::bigint)) FROM pg_auth_members), \
     (SELECT concat(count(*), '/', sum(xmin::text::bigint)) FROM pg_db_role_setting), \
     (SELECT concat(count(*), '/', sum(xmin::text::bigint)) FROM pg_database))";

/// Functions of PostgreSQL that are volatile and leave nothing in the session, by what their names begin with.
const HARMLESS: [&str; 45] = [
    "clock_timestamp",
    "gen_random_uuid",
    "lo_",
    "loread",
    "lowrite",
    "parse_ident",
    "pg_cancel_backend",
    "pg_column_",
    "pg_database_size",
    "pg_encoding_to_char",
    "pg_export_snapshot",
    "pg_get_",
    "pg_indexes_size",
    "pg_is_in_recovery",
    "pg_is_wal_replay_paused",
    "pg_isolation_test_session_is_blocked",
    "pg_jit_available",
    "pg_last_",
    "pg_lock_status",
    "pg_ls_",
    "pg_notify",
    "pg_notification_queue_usage",
    "pg_partition_",
    "pg_postmaster_start_time",
    "pg_prepared_xact",
    "pg_read_",
    "pg_relation_",
    "pg_safe_snapshot_blocking_pids",
    "pg_blocking_pids",
    "pg_show_",
    "pg_size_",
    "pg_sleep",
    "pg_stat_",
    "pg_table_size",
    "pg_tablespace_",
    "pg_terminate_backend",
    "pg_total_relation_size",
    "pg_wal_lsn_diff",
    "pg_walfile_name",
    "pg_current_wal_",
    "pg_current_xact_id",
    "random",
    "timeofday",
    "txid_",
    "uuidv",
];

/// Functions whose name begins like a harmless one.
const NOT_HARMLESS: [&str; 3] = ["pg_stat_reset", "lo_import", "pg_get_backend_memory"];

/// Keywords that may stand before a parenthesis, and those behind which an expression begins.
const BEFORE_PARENTHESIS: &str = "all and any array as asc by case cast char character coalesce conflict cross cube \
     current_date current_time current_timestamp dec decimal desc distinct else except exists extract filter float for \
     from full greatest group grouping having ilike in inner int intersect interval into is isnull join lateral left \
     like localtime localtimestamp natural nchar not notnull nullif numeric of offset limit on only or order outer over \
     overlay partition position precision range rollup row rows rows select set sets similar some substring table then \
     time timestamp trim treat union unnest update using values varchar varying when where window with within zone \
     tablesample bernoulli system repeatable xmlelement xmlforest xmlconcat xmlparse xmlpi xmlroot xmlserialize \
     xmlexists xmltable json json_object json_array json_objectagg json_arrayagg json_scalar json_serialize json_value \
     json_query json_exists json_table merge_action bit key do default format materialized between normalize nothing \
     columns passing columns returning explain analyze verbose copy force_quote force_null force_not_null begin";
const BEGINS: &str = "all and any as asc between by case desc distinct else except from having ilike in intersect is \
     join lateral like limit not offset on or returning select set similar some then union using values when where with \
     recursive materialized into default if";

impl Landscape {
    /// Reads the answer to [`QUESTION`].
    ///
    /// # Errors
    /// A column is missing or is not what was asked for.
    pub fn read(rows: &[Row]) -> Result<Landscape, Unreadable> {
        let mut landscape = Landscape::keywords();
        let mut texts: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut everywhere: Vec<(&str, &str)> = Vec::new();
        let mut len = 0;
        for row in rows {
            let (kind, name) = (text(row, 0)?, text(row, 1)?);
            let of_object = optional(row, 2).unwrap_or_default();
            len += of_object.len();
            match kind {
                "volatile" if !is_harmless(name) => {
                    let own = footprint::WORDS.iter().find(|(word, _)| *word == name);
                    let leaves = own.map_or(Leaves::SOMETHING, |(_, leaves)| *leaves);
                    landscape.add(name, leaves);
                }
                "volatile" | "known" => landscape.add(name, Leaves::NOTHING),
                "opaque" => landscape.add(name, Leaves::ANYTHING),
                "function" | "relation" => {
                    landscape.add(name, Leaves::NOTHING);
                    if !of_object.is_empty() {
                        texts.entry(name).or_default().push(of_object);
                    }
                }
                "everywhere" => everywhere.push((name, of_object)),
                "path" => landscape.depends_on_path = true,
                "folds" => landscape.folds = true,
                // What it calls is compiled under its search path.
                "repath" => landscape.add(name, Leaves::SOMETHING),
                _ => return Err(Unreadable("known kind of name")),
            }
        }
        if len > TEXTS_LEN_MAX {
            landscape.refused = Some(format!(
                "its functions and views have {len} bytes, at most {TEXTS_LEN_MAX} are read"
            ));
            return Ok(landscape);
        }
        landscape.spread(&texts);
        for (name, of_object) in everywhere {
            if !landscape.of_body(of_object.as_bytes()).is_nothing() {
                landscape
                    .refused
                    .get_or_insert(format!("`{name}` may leave something wherever it is used"));
            }
        }
        Ok(landscape)
    }

    /// The keywords alone: no function is known.
    fn keywords() -> Landscape {
        let mut landscape = Landscape::default();
        for word in BEFORE_PARENTHESIS.split_whitespace() {
            landscape.entry(word).is_known = true;
        }
        for word in BEGINS.split_whitespace() {
            landscape.entry(word).begins = true;
        }
        for (word, leaves) in footprint::WORDS {
            landscape.entry(word).leaves = leaves;
        }
        landscape
    }

    fn entry(&mut self, name: &str) -> &mut Meaning {
        self.words.entry(name.as_bytes().into()).or_default()
    }

    fn add(&mut self, name: &str, leaves: Leaves) {
        let meaning = self.entry(name);
        meaning.is_known = true;
        meaning.leaves = meaning.leaves.and(leaves);
    }

    /// Makes objects risky whose texts name risky ones, until nothing changes.
    fn spread(&mut self, texts: &BTreeMap<&str, Vec<&str>>) {
        loop {
            let mut has_changed = false;
            for (name, of_object) in texts {
                let before = self.meaning(name.as_bytes()).leaves;
                let of_texts = of_object.iter().map(|text| self.of_body(text.as_bytes()));
                let found = of_texts.fold(before, Leaves::and);
                if found != before {
                    self.entry(name).leaves = found;
                    has_changed = true;
                }
            }
            if !has_changed {
                return;
            }
        }
    }

    /// What a name in lower case stands for.
    pub(super) fn meaning(&self, name: &[u8]) -> Meaning {
        self.words.get(name).copied().unwrap_or_default()
    }
}

fn is_harmless(name: &str) -> bool {
    let begins = |list: &[&str]| list.iter().any(|prefix| name.starts_with(prefix));
    begins(&HARMLESS) && !begins(&NOT_HARMLESS)
}
