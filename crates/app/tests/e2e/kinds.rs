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
        "prepared among other statements",
        &["SELECT 1; PREPARE among (int) AS SELECT $1 || ';'; SELECT nextval('s')"],
        "EXECUTE among (7)",
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
    (
        "temporary table",
        &[
            "CREATE TEMP TABLE mine (id int GENERATED BY DEFAULT AS IDENTITY (START 5) PRIMARY KEY, \
             a text DEFAULT 'x' COLLATE \"C\" UNIQUE, b serial, g int GENERATED ALWAYS AS (id * 2) STORED, \
             n numeric(10,2) NOT NULL DEFAULT 3 CHECK (n > 0), at timestamptz, i interval, f float8, raw bytea) \
             WITH (fillfactor = 70)",
            "CREATE INDEX odd ON mine (lower(a)) WHERE id > 3",
            "CREATE TEMP TABLE child (id int REFERENCES mine DEFERRABLE, x text)",
            "INSERT INTO mine (a, at, i, f, raw) VALUES ('one', '2024-02-29 12:00:00.123456+02', '1 mon 2 days 3.5 s', \
             0.1::float8 + 0.2, '\\x00ff5c'), (E'tab\\tnew\\nline\\\\', 'infinity', NULL, 'NaN', '')",
            "INSERT INTO child SELECT id, NULL FROM mine",
            "DELETE FROM mine WHERE id = 99",
            "COMMENT ON TABLE mine IS 'it''s'",
            "ALTER TABLE mine ALTER a SET STATISTICS 50",
            "GRANT SELECT, UPDATE (a) ON mine TO reader",
            "SET IntervalStyle = sql_standard",
        ],
        "SELECT (SELECT string_agg(mine::text, ' ' ORDER BY id) FROM mine) || (SELECT string_agg(child::text, '') FROM child) \
         || (SELECT string_agg(pg_get_indexdef(indexrelid), ' ' ORDER BY indexrelid::regclass::text) FROM pg_index WHERE indrelid = 'mine'::regclass) \
         || (SELECT string_agg(pg_get_constraintdef(oid), ' ' ORDER BY conname) FROM pg_constraint WHERE conrelid = 'mine'::regclass) \
         || (SELECT string_agg(concat_ws(' ', attname, attstattarget, attacl::text, pg_get_expr(adbin, adrelid)), ' ' ORDER BY attnum) \
            FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum WHERE attrelid = 'mine'::regclass) \
         || (SELECT concat_ws(' ', obj_description(oid), reloptions, relacl::text) FROM pg_class WHERE oid = 'mine'::regclass)",
    ),
    (
        "temporary table that deletes its rows",
        &[
            "CREATE TEMP TABLE fleeting (n int PRIMARY KEY CHECK (n > 0)) ON COMMIT DELETE ROWS",
            "CREATE TEMP TABLE lasting (n int PRIMARY KEY) ON COMMIT PRESERVE ROWS",
            "BEGIN; INSERT INTO fleeting VALUES (1); ROLLBACK",
        ],
        "WITH a AS (INSERT INTO fleeting VALUES (1) RETURNING n) \
         SELECT concat_ws(' ', (SELECT count(*) FROM fleeting), (SELECT count(*) FROM lasting), (SELECT n FROM a))",
    ),
    (
        "temporary types, functions, views and sequences",
        &[
            "CREATE TYPE pg_temp.kind AS ENUM ('x', 'y''z')",
            "CREATE TYPE pg_temp.pair AS (a int, b pg_temp.kind)",
            "CREATE DOMAIN pg_temp.positive AS int DEFAULT 5 NOT NULL CHECK (value > 0)",
            "CREATE FUNCTION pg_temp.f(k pg_temp.kind DEFAULT 'x') RETURNS text LANGUAGE sql AS $$SELECT 'f' || k$$",
            "CREATE TEMP SEQUENCE counter INCREMENT 3 START 10",
            "CREATE TEMP TABLE holds (p pg_temp.pair, d pg_temp.positive, k pg_temp.kind[], n bigint DEFAULT nextval('counter'))",
            "INSERT INTO holds VALUES ((1, 'y''z'), 7, ARRAY['x', 'y''z']::pg_temp.kind[])",
            "CREATE TEMP VIEW shows AS SELECT *, pg_temp.f() AS f FROM holds",
            "PREPARE on_temp AS SELECT count(*) FROM holds WHERE d = $1",
        ],
        "SELECT (SELECT string_agg(shows::text, '') FROM shows) || currval('counter') || lastval() || pg_temp.f('y''z')",
    ),
    (
        "trigger and rule of a temporary table",
        &[
            "CREATE TEMP TABLE noted (n int, by text)",
            "CREATE FUNCTION pg_temp.note() RETURNS trigger LANGUAGE plpgsql AS \
             $$BEGIN new.by = 'trigger'; RETURN new; END$$",
            "CREATE TRIGGER note BEFORE INSERT ON noted FOR EACH ROW EXECUTE FUNCTION pg_temp.note()",
            "CREATE RULE no_delete AS ON DELETE TO noted DO INSTEAD NOTHING",
            "INSERT INTO noted VALUES (1)",
        ],
        "SELECT string_agg(noted::text, ' ') || (SELECT string_agg(pg_get_triggerdef(oid), '') \
         FROM pg_trigger WHERE tgrelid = 'noted'::regclass) FROM noted",
    ),
    (
        "temporary objects of another role",
        &[
            "SET ROLE reader",
            "CREATE TEMP TABLE theirs AS SELECT 7 AS n",
            "RESET ROLE",
            "CREATE TEMP TABLE ours AS SELECT 8 AS n",
            "SET default_transaction_read_only = on",
        ],
        "SELECT string_agg(concat_ws(' ', relname, relowner::regrole), ' ' ORDER BY relname) FROM pg_class \
         WHERE relnamespace = pg_my_temp_schema() AND relkind = 'r'",
    ),
    (
        "statement prepared on a temporary table",
        &["CREATE TEMP TABLE under AS SELECT 42 AS n", "PREPARE over AS SELECT n FROM under"],
        "EXECUTE over",
    ),
    (
        "temporary tables side by side",
        &[
            "CREATE TEMP TABLE left_one (id serial PRIMARY KEY, u int UNIQUE WITH (fillfactor = 50))",
            "CREATE TEMP TABLE right_one (id serial PRIMARY KEY)",
            "CLUSTER left_one USING left_one_pkey",
            "COMMENT ON INDEX left_one_pkey IS 'mine'",
            "CREATE TEMP VIEW named (a, b) AS SELECT 1, 'x'::text",
            "SET array_nulls = off",
            "INSERT INTO right_one DEFAULT VALUES",
        ],
        "SELECT named.a || named.b || right_one.id || (SELECT string_agg(concat_ws(' ', relname, reloptions, \
         obj_description(oid, 'pg_class')), ',' ORDER BY relname) FROM pg_class \
         WHERE relnamespace = pg_my_temp_schema() AND relkind = 'i') FROM named, right_one",
    ),
    (
        "generated column that looks at a setting",
        &[
            "SET bytea_output = escape",
            "SET extra_float_digits = 0",
            "CREATE TEMP TABLE made (b bytea, f float8, g text GENERATED ALWAYS AS (b::text || f::text) STORED)",
            "INSERT INTO made (b, f) VALUES ('\\x01', 0.1::float8 + 0.2)",
            "CREATE INDEX ON made ((b::text))",
            "SET enable_seqscan = off",
        ],
        "SELECT g FROM made WHERE b::text = '\\001'",
    ),
    (
        "cursor of odd values",
        &[
            "SET array_nulls = off",
            "CREATE TYPE pg_temp.odd AS (a int, b text)",
            "DECLARE odd NO SCROLL CURSOR WITH HOLD FOR SELECT NULL AS n, '0'::regclass, 'x'::\"char\", ROW(1, 'NULL')::pg_temp.odd, \
             'NULL'::text, '(1,2),(3,4)'::box, ARRAY['a', NULL], 'a b'::varchar(5), 1.50::numeric(10,2) FROM generate_series(1, 2)",
            "FETCH odd",
        ],
        "SELECT count(*) FROM pg_cursors WHERE name = 'odd'",
    ),
    (
        "cursor that scrolls",
        &[
            "DECLARE c SCROLL CURSOR WITH HOLD FOR SELECT g, 'x' || g AS \"odd name\", NULL::numeric(10,2) \
             FROM generate_series(1, 2500) g",
            "FETCH 3 FROM c",
        ],
        "FETCH RELATIVE 0 FROM c",
    ),
    (
        "cursor behind its last row",
        &[
            "DECLARE c SCROLL CURSOR WITH HOLD FOR SELECT * FROM (VALUES (1), (2)) v",
            "MOVE ALL FROM c",
        ],
        "FETCH ABSOLUTE -1 FROM c",
    ),
    (
        "cursor that does not scroll",
        &[
            "DECLARE c NO SCROLL CURSOR WITH HOLD FOR SELECT g % 2, g FROM generate_series(1, 1500) g",
            "MOVE 600 FROM c",
        ],
        "SELECT string_agg(name || is_scrollable, ' ') FROM pg_cursors WHERE is_holdable",
    ),
    (
        "library",
        &["LOAD 'auto_explain'", "SET auto_explain.log_min_duration = 12345"],
        "SELECT setting || unit || vartype FROM pg_settings WHERE name = 'auto_explain.log_min_duration'",
    ),
    ("application name", &["SET application_name = 'it''s me'"], "SHOW application_name"),
];

/// What they stand on.
pub(crate) const ROLES: &str = "CREATE ROLE reader; CREATE ROLE writer; GRANT reader TO writer; \
    CREATE TABLE IF NOT EXISTS t (n int); \
    CREATE SEQUENCE s CACHE 5; CREATE TABLE counted (n int GENERATED ALWAYS AS IDENTITY); \
    GRANT CREATE ON SCHEMA public TO reader; \
    CREATE SCHEMA \"Odd schema\"; CREATE SEQUENCE \"Odd schema\".\"odd's\" INCREMENT -3; \
    GRANT USAGE ON SEQUENCE s TO reader";
