//! What random sessions are made of. The names are few, so that statements meet.

use std::fmt;

use wire::frontend::{self, Target};

/// A step of a session.
#[derive(Clone)]
pub(super) enum Step {
    Move,
    Send { shown: String, bytes: Vec<u8>, readies: usize },
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Move => f.write_str("-- move"),
            Step::Send { shown, .. } => f.write_str(shown),
        }
    }
}

/// SplitMix64: the same numbers from the same seed, everywhere.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).unwrap();
        usize::try_from(self.next() % limit).unwrap()
    }

    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.below(of.len())]
    }
}

pub(super) const ROLES: &str = "CREATE ROLE reader; CREATE ROLE guest LOGIN; GRANT reader TO guest; \
    ALTER ROLE guest SET work_mem = '3MB'; ALTER ROLE guest SET app.role = 'of the role'; \
    ALTER DATABASE moved SET geqo_effort = 7; ALTER DATABASE twin SET geqo_effort = 7; \
    ALTER DATABASE moved SET app.database = 'd'; ALTER DATABASE twin SET app.database = 'd'";

/// What both databases hold.
pub(super) const SCHEMA: &str = "GRANT CREATE ON SCHEMA public TO guest; \
    CREATE SCHEMA one; CREATE SCHEMA two; GRANT USAGE ON SCHEMA one, two TO PUBLIC; \
    CREATE TABLE one.t AS SELECT 1 AS n; CREATE TABLE two.t AS SELECT 'two' AS n; \
    CREATE TABLE public.t (n int, x text); INSERT INTO public.t SELECT g, 'x' || g FROM generate_series(1, 50) g; \
    CREATE SEQUENCE s1; CREATE SEQUENCE s2 INCREMENT -2; CREATE SEQUENCE s3 START 100 CACHE 1; \
    CREATE TABLE counted (n int GENERATED ALWAYS AS IDENTITY, x text); \
    ALTER SEQUENCE s1 OWNER TO guest; ALTER SEQUENCE s2 OWNER TO guest; ALTER TABLE counted OWNER TO guest; \
    GRANT ALL ON ALL TABLES IN SCHEMA public, one, two TO PUBLIC; GRANT ALL ON SEQUENCE s3 TO PUBLIC; \
    GRANT SELECT ON pg_backend_memory_contexts TO PUBLIC; \
    GRANT EXECUTE ON FUNCTION pg_get_backend_memory_contexts() TO PUBLIC; \
    CREATE FUNCTION set_app(v text) RETURNS text LANGUAGE plpgsql AS \
    $$BEGIN RETURN set_config('app.inner', v, false); END$$; \
    CREATE FUNCTION prepare_it() RETURNS void LANGUAGE plpgsql AS \
    $$BEGIN EXECUTE 'PREPARE p2 AS SELECT 42, current_setting(''work_mem'')'; END$$; \
    CREATE FUNCTION set_any(n text, v text) RETURNS text LANGUAGE plpgsql AS \
    $$BEGIN EXECUTE 'SE' || 'T ' || n || ' = ' || quote_literal(v); RETURN n; END$$";

const SETTINGS: &[(&str, &[&str])] = &[
    ("work_mem", &["'1MB'", "'12345kB'", "4096", "DEFAULT"]),
    (
        "search_path",
        &["one", "two, public", "'\"odd \"\"x\", public'", "''", "public, one", "DEFAULT"],
    ),
    ("DateStyle", &["'ISO, DMY'", "'SQL, MDY'", "'German'", "DEFAULT"]),
    ("IntervalStyle", &["iso_8601", "postgres_verbose", "DEFAULT"]),
    ("TimeZone", &["'Europe/Berlin'", "'<+02:30>-02:30'", "3", "DEFAULT"]),
    ("extra_float_digits", &["-3", "3", "0"]),
    ("bytea_output", &["escape", "hex"]),
    ("application_name", &["'it''s me'", "''", "DEFAULT"]),
    ("client_min_messages", &["error", "log", "notice"]),
    ("default_transaction_isolation", &["serializable", "'read committed'"]),
    ("default_transaction_read_only", &["on", "off"]),
    ("statement_timeout", &["'20s'", "0", "DEFAULT"]),
    ("lock_timeout", &["'1ms'", "0"]),
    ("enable_seqscan", &["off", "on", "DEFAULT"]),
    ("random_page_cost", &["1.1", "2.5", "DEFAULT"]),
    ("standard_conforming_strings", &["off", "on"]),
    ("escape_string_warning", &["off", "on"]),
    ("row_security", &["off", "on"]),
    ("plan_cache_mode", &["force_generic_plan", "DEFAULT"]),
    ("transform_null_equals", &["on", "off"]),
    ("xmloption", &["document", "content"]),
    ("client_encoding", &["LATIN1", "UTF8", "DEFAULT"]),
    ("default_text_search_config", &["'pg_catalog.german'", "DEFAULT"]),
    ("geqo_effort", &["3", "7", "DEFAULT"]),
    ("app.uid", &["'7'", "'it''s'", "''", "DEFAULT"]),
    ("app.tenant", &["8", "'x y'"]),
    ("app.role", &["'mine'", "DEFAULT"]),
    ("app.database", &["'mine'", "DEFAULT"]),
    ("auto_explain.log_min_duration", &["9999", "'soon'", "DEFAULT"]),
];

const QUERIES: &[&str] = &[
    "SELECT 1",
    "SELECT n, x FROM public.t WHERE n < 3 ORDER BY n",
    "SELECT n FROM t ORDER BY n LIMIT 2",
    "SELECT '01/02/2024'::date, '1 day 2 hours'::interval, 1.0::float8/3, '\\xff00'::bytea",
    "SELECT current_setting('app.uid', true), current_setting('app.inner', true), current_setting('app.role', true)",
    "SELECT current_user, session_user, current_schemas(false)",
    "SELECT now() IS NOT NULL, timestamptz '2024-01-01 00:00:00+00'",
    "SELECT NULL = NULL, 'a\\b'",
    "SELECT count(*) FROM counted",
    "SELECT to_tsvector('cats')",
    "SELECT 1/0",
    "SELECT missing FROM nowhere",
    "SELECT lastval()",
    "SELECT currval('s1')",
    "SELECT currval('s3')",
];

const STATEMENTS: &[&str] = &[
    "RESET ALL",
    "RESET app.uid",
    "LOAD 'auto_explain'",
    "LOAD 'nowhere'",
    "SHOW auto_explain.log_min_duration",
    "RESET search_path",
    "SET ROLE reader",
    "SET ROLE NONE",
    "RESET ROLE",
    "SET SESSION AUTHORIZATION reader",
    "RESET SESSION AUTHORIZATION",
    "SELECT set_config('app.uid', 'by function', false)",
    "SELECT set_config('work_mem', '7MB', false)",
    "SELECT set_config('app.local', 'x', true)",
    "SELECT set_app('inner')",
    "DO $$ BEGIN SET app.tenant = 'block'; PERFORM set_config('geqo', 'off', false); END $$",
    "SELECT nextval('s1')",
    "SELECT nextval('s2'), nextval('s2')",
    "SELECT nextval('s3')",
    "SELECT setval('s1', 500)",
    "SELECT setval('s2', -70, false)",
    "INSERT INTO counted (x) VALUES ('a') RETURNING n",
    "INSERT INTO counted (x) VALUES ('b')",
    "DISCARD ALL",
    "DISCARD SEQUENCES",
    "DISCARD PLANS",
    "DISCARD TEMP",
    "LISTEN jobs",
    "LISTEN \"Odd \"\" one\"",
    "UNLISTEN jobs",
    "UNLISTEN *",
    "NOTIFY jobs, 'hello'",
    "PREPARE p1 AS SELECT n FROM t ORDER BY n LIMIT 1",
    "PREPARE p2 (int, text) AS SELECT $1 + 1, $2 || 'x'",
    "PREPARE p3 AS SELECT '01/02/2024'::date",
    "PREPARE p1 AS INSERT INTO counted (x) VALUES ('p') RETURNING x",
    "SELECT 1; PREPARE p1 AS SELECT 'several'; SELECT 2",
    "SELECT prepare_it()",
    "EXECUTE p1",
    "EXECUTE p2 (1, 'y')",
    "EXECUTE p2",
    "EXECUTE p3",
    "DEALLOCATE p1",
    "DEALLOCATE p2",
    "DEALLOCATE ALL",
    "SELECT 1; SELECT 1/0; SET app.tenant = 'never'",
    "BEGIN; SET LOCAL app.uid = 'local'; SET app.tenant = 'kept'; COMMIT",
    "BEGIN; SET work_mem = '9MB'; SET app.uid = 'gone'; ROLLBACK",
    "BEGIN; SELECT nextval('s1'); PREPARE p1 AS SELECT 'rolled back'; ROLLBACK",
    "BEGIN; SAVEPOINT a; SET app.uid = 'inside'; ROLLBACK TO a; SET app.uid = 'after'; COMMIT",
    "SELECT pg_advisory_lock(7)",
    "SELECT pg_advisory_unlock_all()",
    "COMMENT ON TABLE counted IS 'changed'",
    "CREATE TEMP TABLE t (n int PRIMARY KEY, x text DEFAULT 'temp')",
    "CREATE TEMP TABLE IF NOT EXISTS u (id serial, d date DEFAULT '2024-02-01', k int CHECK (k > 0))",
    "CREATE TEMP TABLE gone (n int NOT NULL) ON COMMIT DELETE ROWS",
    "CREATE TEMP TABLE dropped ON COMMIT DROP AS SELECT 1",
    "CREATE TEMP TABLE made AS SELECT g AS n, 'x' || g AS x, now() - now() AS i FROM generate_series(1, 3) g",
    "SELECT n INTO TEMP u FROM public.t WHERE n < 4",
    "INSERT INTO t VALUES (1), (2)",
    "INSERT INTO t (n) VALUES (7)",
    "INSERT INTO u (k) VALUES (5)",
    "INSERT INTO u (k) VALUES (-5)",
    "BEGIN; INSERT INTO gone VALUES (1); SELECT count(*) FROM gone; COMMIT",
    "BEGIN; INSERT INTO gone VALUES (1); ROLLBACK",
    "SELECT count(*) FROM gone",
    "UPDATE t SET x = 'changed' WHERE n = 1",
    "DELETE FROM t WHERE n = 2",
    "TRUNCATE u RESTART IDENTITY",
    "ALTER TABLE t ADD COLUMN more int DEFAULT 9",
    "ALTER TABLE t RENAME COLUMN x TO y",
    "CREATE INDEX ON t (x)",
    "DROP TABLE IF EXISTS pg_temp.t",
    "DROP TABLE IF EXISTS pg_temp.u, pg_temp.gone CASCADE",
    "CREATE TEMP VIEW v AS SELECT count(*) AS c FROM t",
    "SELECT * FROM v",
    "SELECT * FROM u",
    "SELECT * FROM made ORDER BY n",
    "CREATE TEMP SEQUENCE ts INCREMENT 3",
    "SELECT nextval('ts')",
    "SELECT currval('ts')",
    "SELECT setval('ts', 100, false)",
    "CREATE TYPE pg_temp.kind AS ENUM ('a', 'b')",
    "CREATE TEMP TABLE kinds (k pg_temp.kind[])",
    "INSERT INTO kinds VALUES ('{a,b}')",
    "SELECT k FROM kinds",
    "CREATE FUNCTION pg_temp.f(int) RETURNS int LANGUAGE sql AS 'SELECT $1 + 40'",
    "SELECT pg_temp.f(2)",
    "CREATE TEMP TABLE heir () INHERITS (t)",
    "COMMENT ON TABLE t IS 'mine'",
    "PREPARE p1 AS SELECT * FROM u",
    "ANALYZE t",
    "DECLARE c1 SCROLL CURSOR WITH HOLD FOR SELECT n, x FROM public.t ORDER BY n",
    "DECLARE c1 CURSOR WITH HOLD FOR SELECT n FROM t",
    "DECLARE c2 NO SCROLL CURSOR WITH HOLD FOR SELECT n, '1 day'::interval * n FROM public.t ORDER BY n",
    "DECLARE c3 CURSOR WITH HOLD FOR SELECT k FROM kinds",
    "DECLARE c2 BINARY CURSOR WITH HOLD FOR SELECT 1",
    "FETCH c1",
    "FETCH 3 FROM c1",
    "FETCH PRIOR FROM c1",
    "FETCH ABSOLUTE 5 FROM c1",
    "FETCH LAST FROM c1",
    "MOVE ALL FROM c1",
    "MOVE BACKWARD ALL FROM c1",
    "FETCH RELATIVE 0 FROM c1",
    "FETCH 2 FROM c2",
    "FETCH ALL FROM c2",
    "FETCH ALL FROM c3",
    "CLOSE c1",
    "CLOSE ALL",
];

/// What only the memory of settings shows, from PostgreSQL 16.
const COMPUTED: &[&str] =
    &["SELECT set_any('app.' || 'computed', 'x')", "SELECT set_any('work' || '_mem', '8MB')"];

fn simple(sql: &str) -> Step {
    let mut bytes = Vec::new();
    frontend::query(&mut bytes, sql.as_bytes());
    Step::Send { shown: format!("{sql};"), bytes, readies: 1 }
}

/// One batch of the extended protocol.
fn extended(random: &mut Random) -> Step {
    let (mut bytes, mut shown) = (Vec::new(), Vec::new());
    let name = random.one(&["", "", "x1", "x2"]);
    let parse = |random: &mut Random, bytes: &mut Vec<u8>, shown: &mut Vec<String>| {
        let sql = if random.below(3) == 0 {
            random.one(&["SELECT $1::int + 1", "SELECT n FROM t WHERE n::text = $1", "SELECT $1"])
        } else {
            random.one(QUERIES)
        };
        frontend::parse(bytes, name.as_bytes(), sql.as_bytes(), &[]);
        shown.push(format!("Parse {name:?} {sql}"));
    };
    let run = |random: &mut Random, bytes: &mut Vec<u8>, shown: &mut Vec<String>| {
        let one: &[Option<&[u8]>] = &[Some(b"2")];
        let params = if random.below(3) == 0 { one } else { &[] };
        frontend::bind_text(bytes, b"", name.as_bytes(), params);
        frontend::describe(bytes, Target::Portal(b""));
        frontend::execute(bytes, b"", 0);
        shown.push(format!("Bind {name:?} with {} parameters, Describe, Execute", params.len()));
    };
    match random.below(5) {
        0 => parse(random, &mut bytes, &mut shown),
        1 => run(random, &mut bytes, &mut shown),
        2 => {
            frontend::close(&mut bytes, Target::Statement(name.as_bytes()));
            shown.push(format!("Close {name:?}"));
        }
        3 => {
            frontend::describe(&mut bytes, Target::Statement(name.as_bytes()));
            shown.push(format!("Describe {name:?}"));
        }
        _ => {
            parse(random, &mut bytes, &mut shown);
            run(random, &mut bytes, &mut shown);
        }
    }
    frontend::sync(&mut bytes);
    Step::Send { shown: format!("-- {}, Sync", shown.join(", ")), bytes, readies: 1 }
}

fn step(random: &mut Random) -> Step {
    match random.below(12) {
        0..=2 => Step::Move,
        3 | 4 => {
            let (name, values) = SETTINGS[random.below(SETTINGS.len())];
            let local = random.one(&["", "", "", "LOCAL "]);
            simple(&format!("SET {local}{name} = {}", random.one(values)))
        }
        5 => {
            let (name, _) = SETTINGS[random.below(SETTINGS.len())];
            simple(&format!("{} {name}", random.one(&["RESET", "SHOW", "SHOW"])))
        }
        6 => simple(random.one(QUERIES)),
        7 | 8 => extended(random),
        9 if random.below(10) == 0 && crate::support::other_bin_dir().is_some() => {
            simple(random.one(COMPUTED))
        }
        _ => simple(random.one(STATEMENTS)),
    }
}

/// A session of some steps. A move comes last, so that whatever it did is seen.
pub(super) fn session(random: &mut Random) -> Vec<Step> {
    let len = 3 + random.below(16);
    let mut steps: Vec<Step> = (0..len).map(|_| step(random)).collect();
    steps.push(Step::Move);
    steps
}

/// What another session does meanwhile that shares its servers: nothing that would keep the first one waiting, or wake
/// it at a time that nobody knows.
pub(super) fn beside(random: &mut Random) -> Vec<Step> {
    let waits = |step: &Step| match step {
        Step::Move => true,
        Step::Send { shown, .. } => shown.contains("advisory_lock") || shown.contains("NOTIFY"),
    };
    let len = 3 + random.below(12);
    (0..len).map(|_| step(random)).filter(|step| !waits(step)).collect()
}

/// What is looked at in the end: everything that can be seen, and what lies beneath it.
pub(super) fn final_looks() -> Vec<Step> {
    let settings = "SELECT string_agg(name || '=' || setting, ' ' ORDER BY name) FROM pg_settings \
        WHERE context IN ('user', 'superuser') AND name NOT LIKE 'transaction%'";
    let custom = "SELECT current_setting('app.uid', true), current_setting('app.tenant', true), \
        current_setting('app.inner', true), current_setting('app.local', true), current_setting('app.role', true), \
        current_setting('app.database', true), current_setting('app.computed', true)";
    let temporary = "SELECT relname, relkind, pg_get_userbyid(relowner), relacl::text, \
        (SELECT string_agg(concat_ws(' ', attname, format_type(atttypid, atttypmod), attnotnull), ',' ORDER BY attname) \
        FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped), obj_description(oid, 'pg_class') \
        FROM pg_class c WHERE relnamespace = pg_my_temp_schema() ORDER BY relname";
    [
        "SELECT current_user, session_user, current_setting('role')",
        custom,
        "SELECT name, CASE WHEN from_sql THEN NULL ELSE statement END, parameter_types, from_sql FROM pg_prepared_statements ORDER BY name",
        "SELECT c FROM pg_listening_channels() c ORDER BY c",
        "SELECT lastval()",
        "SELECT currval('s1')",
        "SELECT currval('s2')",
        "SELECT currval('s3')",
        "SELECT currval('counted_n_seq')",
        "SELECT name, is_holdable, is_scrollable FROM pg_cursors ORDER BY name",
        "SELECT * FROM t ORDER BY 1 LIMIT 5",
        "SELECT * FROM u ORDER BY 1 LIMIT 5",
        temporary,
        "INSERT INTO gone VALUES (5)",
        "SELECT count(*) FROM gone",
        "INSERT INTO u DEFAULT VALUES",
        "FETCH c1",
        "FETCH BACKWARD 2 FROM c1",
        "FETCH 3 FROM c2",
        "SELECT currval('ts')",
        "SELECT nextval('ts')",
        settings,
        "EXECUTE p1",
        "EXECUTE p3",
        "ROLLBACK",
        "RESET ROLE",
        "RESET SESSION AUTHORIZATION",
        "RESET ALL",
        "SET client_min_messages = notice",
        settings,
        custom,
        "SELECT current_user, session_user, current_setting('role')",
    ]
    .iter()
    .map(|sql| simple(sql))
    .collect()
}
