//! The battery: kinds of session state, for every way to move.

/// Each kind of state: how it is set up, how it is looked at, and what must be seen there for ever.
pub(crate) const KINDS: &[(&str, &[&str], &str)] = &[
    ("setting in units", &["SET work_mem = '12345kB'"], "SHOW work_mem"),
    (
        "search_path with quotes",
        &["SET search_path = \"$user\", \"odd\"\"name\", public"],
        "SHOW search_path",
    ),
    ("time zone that is no name", &["SET TIME ZONE '<+02:30>-02:30'"], "SHOW TimeZone"),
    (
        "empty list",
        &["SET temp_tablespaces = ''"],
        "SELECT '[' || current_setting('temp_tablespaces') || ']'",
    ),
    (
        "date style and interval style",
        &["SET DateStyle = 'SQL, DMY'", "SET IntervalStyle = iso_8601"],
        "SELECT date '2020-02-01' || ' ' || interval '1 day 2 hours'",
    ),
    ("float digits", &["SET extra_float_digits = -3"], "SELECT 1.0::float8/3"),
    (
        "isolation and read only",
        &[
            "SET default_transaction_isolation = serializable",
            "SET default_transaction_read_only = on",
            "SET default_transaction_deferrable = on",
        ],
        "SELECT concat_ws(' ', current_setting('transaction_isolation'), current_setting('transaction_read_only'))",
    ),
    (
        "tiny timeouts",
        &[
            "SET statement_timeout = '2s'",
            "SET lock_timeout = 1",
            "SET idle_in_transaction_session_timeout = 0",
        ],
        "SELECT concat_ws(' ', current_setting('statement_timeout'), current_setting('lock_timeout'))",
    ),
    ("row security", &["SET row_security = off"], "SHOW row_security"),
    (
        "replication role",
        &["SET session_replication_role = replica"],
        "SHOW session_replication_role",
    ),
    (
        "planner settings",
        &["SET enable_seqscan = off", "SET random_page_cost = 1.1"],
        "SELECT current_setting('enable_seqscan') || current_setting('random_page_cost')",
    ),
    (
        "custom settings",
        &[
            "SET app.user_id = '7'",
            "SELECT set_config('app.tenant', 'it''s', false)",
            "SET my.\"Odd\" = 'x'",
        ],
        "SELECT concat_ws('|', current_setting('app.user_id'), current_setting('app.tenant'))",
    ),
    (
        "role",
        &["SET ROLE reader"],
        "SELECT current_user || ' ' || session_user || ' ' || current_setting('role')",
    ),
    (
        "session authorization",
        &["SET SESSION AUTHORIZATION writer"],
        "SELECT current_user || ' ' || session_user",
    ),
    (
        "both",
        &["SET SESSION AUTHORIZATION writer", "SET ROLE reader"],
        "SELECT current_user || ' ' || session_user || ' ' || current_setting('role')",
    ),
    (
        "setting that only a superuser sees, then a role",
        &["SET log_min_duration_statement = 54321", "SET ROLE reader"],
        "SELECT current_user",
    ),
    (
        "prepared by SQL",
        &["PREPARE \"odd \"\"name\" (int, text) AS SELECT $1 || $2"],
        "EXECUTE \"odd \"\"name\" (1, 'x')",
    ),
    (
        "prepared inside a block",
        &["DO $$ BEGIN EXECUTE 'PREPARE inner_one AS SELECT 42'; END $$"],
        "EXECUTE inner_one",
    ),
    (
        "locks of every form",
        &[
            "SELECT pg_advisory_lock(-9223372036854775808), pg_advisory_lock(42), pg_advisory_lock(42)",
            "SELECT pg_advisory_lock_shared(42), pg_advisory_lock(-1, 2147483647), pg_advisory_lock_shared(7, -7)",
        ],
        "SELECT string_agg(concat_ws(':', classid, objid, objsubid, mode), ' ' ORDER BY classid, objid, mode) \
         FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    ),
    (
        "channels",
        &["LISTEN jobs", "LISTEN \"Odd \"\" channel\""],
        "SELECT string_agg(c, ',' ORDER BY c) FROM pg_listening_channels() c",
    ),
    (
        "values of sequences",
        &["SELECT nextval('s'), nextval('s')", "INSERT INTO counted DEFAULT VALUES"],
        "SELECT concat_ws(' ', currval('s'), currval('counted_n_seq'), lastval())",
    ),
    (
        "values of sequences, the other way",
        &["INSERT INTO counted DEFAULT VALUES", "SELECT nextval('\"Odd schema\".\"odd''s\"')"],
        "SELECT concat_ws(' ', currval('\"Odd schema\".\"odd''s\"'), currval('counted_n_seq'), lastval())",
    ),
    ("a value by setval", &["SELECT setval('s', 700)"], "SELECT currval('s')"),
    (
        "a value under another authorization",
        &["SET SESSION AUTHORIZATION reader", "SELECT nextval('s')"],
        "SELECT currval('s') = lastval()",
    ),
    (
        "a value under another role",
        &["SELECT nextval('s')", "SET ROLE reader"],
        "SELECT lastval() IS NULL",
    ),
    ("client encoding", &["SET client_encoding = LATIN1"], "SHOW client_encoding"),
    ("application name", &["SET application_name = 'it''s me'"], "SHOW application_name"),
];

/// What they stand on.
pub(crate) const ROLES: &str = "CREATE ROLE reader; CREATE ROLE writer; GRANT reader TO writer; \
    CREATE TABLE IF NOT EXISTS t (n int); \
    CREATE SEQUENCE s CACHE 5; CREATE TABLE counted (n int GENERATED ALWAYS AS IDENTITY); \
    CREATE SCHEMA \"Odd schema\"; CREATE SEQUENCE \"Odd schema\".\"odd's\" INCREMENT -3; \
    GRANT USAGE ON SEQUENCE s TO reader";
