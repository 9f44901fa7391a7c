//! What the command policy makes of every command of the manual, beside what a server makes of it in a read-only
//! transaction: it may refuse more, and never less. The table is `docs/command-policy.md`.

use std::fmt::Write;

use model::cell::CellState;
use model::policy::rules::Asked;
use model::policy::{Catalog, Command, Disposition, Policy, QUESTION, Transaction};

use crate::support::{Installation, other_bin_dir, run};

/// Commands of the manual ("SQL Commands"), each with one statement.
const MANUAL: &[(&str, &str)] = &[
    ("ABORT", "ABORT"),
    ("ALTER AGGREGATE", "ALTER AGGREGATE total(int) RENAME TO sums"),
    ("ALTER COLLATION", "ALTER COLLATION c RENAME TO d"),
    ("ALTER CONVERSION", "ALTER CONVERSION c RENAME TO d"),
    ("ALTER DATABASE", "ALTER DATABASE postgres SET work_mem = '5MB'"),
    ("ALTER DEFAULT PRIVILEGES", "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC"),
    ("ALTER DOMAIN", "ALTER DOMAIN d SET NOT NULL"),
    ("ALTER EVENT TRIGGER", "ALTER EVENT TRIGGER e DISABLE"),
    ("ALTER EXTENSION", "ALTER EXTENSION plpgsql UPDATE"),
    ("ALTER FOREIGN DATA WRAPPER", "ALTER FOREIGN DATA WRAPPER w NO VALIDATOR"),
    ("ALTER FOREIGN TABLE", "ALTER FOREIGN TABLE f ADD COLUMN n int"),
    ("ALTER FUNCTION", "ALTER FUNCTION f() STABLE"),
    ("ALTER GROUP", "ALTER GROUP g RENAME TO h"),
    ("ALTER INDEX", "ALTER INDEX i RENAME TO j"),
    ("ALTER LANGUAGE", "ALTER LANGUAGE plpgsql OWNER TO postgres"),
    ("ALTER LARGE OBJECT", "ALTER LARGE OBJECT 1 OWNER TO postgres"),
    ("ALTER MATERIALIZED VIEW", "ALTER MATERIALIZED VIEW m RENAME TO n"),
    ("ALTER OPERATOR", "ALTER OPERATOR + (int, int) OWNER TO postgres"),
    ("ALTER OPERATOR CLASS", "ALTER OPERATOR CLASS o USING btree RENAME TO p"),
    ("ALTER OPERATOR FAMILY", "ALTER OPERATOR FAMILY o USING btree RENAME TO p"),
    ("ALTER POLICY", "ALTER POLICY p ON t RENAME TO q"),
    ("ALTER PROCEDURE", "ALTER PROCEDURE p() OWNER TO postgres"),
    ("ALTER PUBLICATION", "ALTER PUBLICATION p ADD TABLE t"),
    ("ALTER ROLE", "ALTER ROLE postgres CONNECTION LIMIT 5"),
    ("ALTER ROUTINE", "ALTER ROUTINE f() OWNER TO postgres"),
    ("ALTER RULE", "ALTER RULE r ON t RENAME TO s"),
    ("ALTER SCHEMA", "ALTER SCHEMA s RENAME TO u"),
    ("ALTER SEQUENCE", "ALTER SEQUENCE s RESTART"),
    ("ALTER SERVER", "ALTER SERVER s VERSION '2'"),
    ("ALTER STATISTICS", "ALTER STATISTICS s SET STATISTICS 5"),
    ("ALTER SUBSCRIPTION", "ALTER SUBSCRIPTION s DISABLE"),
    ("ALTER SYSTEM", "ALTER SYSTEM SET work_mem = '4MB'"),
    ("ALTER TABLE", "ALTER TABLE t ADD COLUMN more int"),
    ("ALTER TABLESPACE", "ALTER TABLESPACE s RENAME TO u"),
    ("ALTER TEXT SEARCH CONFIGURATION", "ALTER TEXT SEARCH CONFIGURATION c RENAME TO d"),
    ("ALTER TEXT SEARCH DICTIONARY", "ALTER TEXT SEARCH DICTIONARY d (StopWords = x)"),
    ("ALTER TEXT SEARCH PARSER", "ALTER TEXT SEARCH PARSER p RENAME TO q"),
    ("ALTER TEXT SEARCH TEMPLATE", "ALTER TEXT SEARCH TEMPLATE p RENAME TO q"),
    ("ALTER TRIGGER", "ALTER TRIGGER x ON t RENAME TO y"),
    ("ALTER TYPE", "ALTER TYPE e ADD VALUE 'x'"),
    ("ALTER USER", "ALTER USER postgres CONNECTION LIMIT 5"),
    ("ALTER USER MAPPING", "ALTER USER MAPPING FOR postgres SERVER s OPTIONS (SET u 'x')"),
    ("ALTER VIEW", "ALTER VIEW v RENAME TO w"),
    ("ANALYZE", "ANALYZE t"),
    ("BEGIN", "BEGIN"),
    ("CALL", "CALL p()"),
    ("CHECKPOINT", "CHECKPOINT"),
    ("CLOSE", "CLOSE ALL"),
    ("CLUSTER", "CLUSTER t USING t_n"),
    ("COMMENT", "COMMENT ON TABLE t IS 'x'"),
    ("COMMIT", "COMMIT"),
    ("COMMIT PREPARED", "COMMIT PREPARED 'x'"),
    ("COPY", "COPY t FROM STDIN"),
    ("CREATE ACCESS METHOD", "CREATE ACCESS METHOD h TYPE TABLE HANDLER heap_tableam_handler"),
    ("CREATE AGGREGATE", "CREATE AGGREGATE sums(int) (SFUNC = int4pl, STYPE = int)"),
    ("CREATE CAST", "CREATE CAST (int AS point) WITH INOUT"),
    ("CREATE COLLATION", "CREATE COLLATION c FROM \"C\""),
    ("CREATE CONVERSION", "CREATE CONVERSION c FOR 'UTF8' TO 'LATIN1' FROM utf8_to_iso8859_1"),
    ("CREATE DATABASE", "CREATE DATABASE other"),
    ("CREATE DOMAIN", "CREATE DOMAIN d AS int"),
    ("CREATE EVENT TRIGGER", "CREATE EVENT TRIGGER e ON sql_drop EXECUTE FUNCTION f()"),
    ("CREATE EXTENSION", "CREATE EXTENSION hstore"),
    ("CREATE FOREIGN DATA WRAPPER", "CREATE FOREIGN DATA WRAPPER w"),
    ("CREATE FOREIGN TABLE", "CREATE FOREIGN TABLE f (n int) SERVER s"),
    ("CREATE FUNCTION", "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'"),
    ("CREATE GROUP", "CREATE GROUP g"),
    ("CREATE INDEX", "CREATE INDEX ON t (n)"),
    ("CREATE LANGUAGE", "CREATE LANGUAGE plperl"),
    ("CREATE MATERIALIZED VIEW", "CREATE MATERIALIZED VIEW m AS SELECT 1"),
    ("CREATE OPERATOR", "CREATE OPERATOR === (LEFTARG = int, RIGHTARG = int, FUNCTION = int4eq)"),
    ("CREATE OPERATOR CLASS", "CREATE OPERATOR CLASS o FOR TYPE int USING btree AS OPERATOR 1 <"),
    ("CREATE OPERATOR FAMILY", "CREATE OPERATOR FAMILY o USING btree"),
    ("CREATE POLICY", "CREATE POLICY p ON t"),
    ("CREATE PROCEDURE", "CREATE PROCEDURE p() LANGUAGE sql AS 'SELECT 1'"),
    ("CREATE PUBLICATION", "CREATE PUBLICATION p"),
    ("CREATE ROLE", "CREATE ROLE r"),
    ("CREATE RULE", "CREATE RULE r AS ON DELETE TO t DO NOTHING"),
    ("CREATE SCHEMA", "CREATE SCHEMA s"),
    ("CREATE SEQUENCE", "CREATE SEQUENCE u"),
    ("CREATE SERVER", "CREATE SERVER s FOREIGN DATA WRAPPER w"),
    ("CREATE STATISTICS", "CREATE STATISTICS ON n, x FROM t"),
    (
        "CREATE SUBSCRIPTION",
        "CREATE SUBSCRIPTION s CONNECTION '' PUBLICATION p WITH (connect = false)",
    ),
    ("CREATE TABLE", "CREATE TABLE u (n int)"),
    ("CREATE TABLE AS", "CREATE TABLE u AS SELECT 1"),
    ("CREATE TABLESPACE", "CREATE TABLESPACE s LOCATION '/nowhere'"),
    ("CREATE TEXT SEARCH CONFIGURATION", "CREATE TEXT SEARCH CONFIGURATION c (COPY = simple)"),
    ("CREATE TEXT SEARCH DICTIONARY", "CREATE TEXT SEARCH DICTIONARY d (TEMPLATE = simple)"),
    ("CREATE TEXT SEARCH PARSER", "CREATE TEXT SEARCH PARSER p (START = prsd_start)"),
    ("CREATE TEXT SEARCH TEMPLATE", "CREATE TEXT SEARCH TEMPLATE p (LEXIZE = dsimple_lexize)"),
    (
        "CREATE TRANSFORM",
        "CREATE TRANSFORM FOR int LANGUAGE plpgsql (FROM SQL WITH FUNCTION f(internal))",
    ),
    ("CREATE TRIGGER", "CREATE TRIGGER x BEFORE UPDATE ON t EXECUTE FUNCTION f()"),
    ("CREATE TYPE", "CREATE TYPE e AS ENUM ('a')"),
    ("CREATE USER", "CREATE USER u"),
    ("CREATE USER MAPPING", "CREATE USER MAPPING FOR postgres SERVER s"),
    ("CREATE VIEW", "CREATE VIEW v AS SELECT 1"),
    ("DEALLOCATE", "DEALLOCATE ALL"),
    ("DECLARE", "DECLARE c CURSOR WITH HOLD FOR SELECT 1"),
    ("DELETE", "DELETE FROM t"),
    ("DISCARD", "DISCARD ALL"),
    ("DO", "DO 'BEGIN END'"),
    ("DROP ACCESS METHOD", "DROP ACCESS METHOD h"),
    ("DROP AGGREGATE", "DROP AGGREGATE sums(int)"),
    ("DROP CAST", "DROP CAST (int AS point)"),
    ("DROP COLLATION", "DROP COLLATION c"),
    ("DROP CONVERSION", "DROP CONVERSION c"),
    ("DROP DATABASE", "DROP DATABASE other"),
    ("DROP DOMAIN", "DROP DOMAIN d"),
    ("DROP EVENT TRIGGER", "DROP EVENT TRIGGER e"),
    ("DROP EXTENSION", "DROP EXTENSION hstore"),
    ("DROP FOREIGN DATA WRAPPER", "DROP FOREIGN DATA WRAPPER w"),
    ("DROP FOREIGN TABLE", "DROP FOREIGN TABLE f"),
    ("DROP FUNCTION", "DROP FUNCTION f()"),
    ("DROP GROUP", "DROP GROUP g"),
    ("DROP INDEX", "DROP INDEX i"),
    ("DROP LANGUAGE", "DROP LANGUAGE plperl"),
    ("DROP MATERIALIZED VIEW", "DROP MATERIALIZED VIEW m"),
    ("DROP OPERATOR", "DROP OPERATOR === (int, int)"),
    ("DROP OPERATOR CLASS", "DROP OPERATOR CLASS o USING btree"),
    ("DROP OPERATOR FAMILY", "DROP OPERATOR FAMILY o USING btree"),
    ("DROP OWNED", "DROP OWNED BY postgres"),
    ("DROP POLICY", "DROP POLICY p ON t"),
    ("DROP PROCEDURE", "DROP PROCEDURE p()"),
    ("DROP PUBLICATION", "DROP PUBLICATION p"),
    ("DROP ROLE", "DROP ROLE r"),
    ("DROP ROUTINE", "DROP ROUTINE f()"),
    ("DROP RULE", "DROP RULE r ON t"),
    ("DROP SCHEMA", "DROP SCHEMA s"),
    ("DROP SEQUENCE", "DROP SEQUENCE u"),
    ("DROP SERVER", "DROP SERVER s"),
    ("DROP STATISTICS", "DROP STATISTICS s"),
    ("DROP SUBSCRIPTION", "DROP SUBSCRIPTION s"),
    ("DROP TABLE", "DROP TABLE u"),
    ("DROP TABLESPACE", "DROP TABLESPACE s"),
    ("DROP TEXT SEARCH CONFIGURATION", "DROP TEXT SEARCH CONFIGURATION c"),
    ("DROP TEXT SEARCH DICTIONARY", "DROP TEXT SEARCH DICTIONARY d"),
    ("DROP TEXT SEARCH PARSER", "DROP TEXT SEARCH PARSER p"),
    ("DROP TEXT SEARCH TEMPLATE", "DROP TEXT SEARCH TEMPLATE p"),
    ("DROP TRANSFORM", "DROP TRANSFORM FOR int LANGUAGE plpgsql"),
    ("DROP TRIGGER", "DROP TRIGGER x ON t"),
    ("DROP TYPE", "DROP TYPE e"),
    ("DROP USER", "DROP USER u"),
    ("DROP USER MAPPING", "DROP USER MAPPING FOR postgres SERVER s"),
    ("DROP VIEW", "DROP VIEW v"),
    ("END", "END"),
    ("EXECUTE", "EXECUTE p"),
    ("EXPLAIN", "EXPLAIN DELETE FROM t"),
    ("FETCH", "FETCH c"),
    ("GRANT", "GRANT SELECT ON t TO PUBLIC"),
    ("IMPORT FOREIGN SCHEMA", "IMPORT FOREIGN SCHEMA x FROM SERVER s INTO public"),
    ("INSERT", "INSERT INTO t VALUES (1)"),
    ("LISTEN", "LISTEN a"),
    ("LOAD", "LOAD 'auto_explain'"),
    ("LOCK", "LOCK TABLE t IN ACCESS EXCLUSIVE MODE"),
    ("MERGE", "MERGE INTO t USING (SELECT 1 AS n) s ON t.n = s.n WHEN MATCHED THEN DELETE"),
    ("MOVE", "MOVE c"),
    ("NOTIFY", "NOTIFY a"),
    ("PREPARE", "PREPARE q AS DELETE FROM t"),
    ("PREPARE TRANSACTION", "PREPARE TRANSACTION 'x'"),
    ("REASSIGN OWNED", "REASSIGN OWNED BY nobody TO postgres"),
    ("REFRESH MATERIALIZED VIEW", "REFRESH MATERIALIZED VIEW m"),
    ("REINDEX", "REINDEX TABLE t"),
    ("RELEASE SAVEPOINT", "RELEASE SAVEPOINT a"),
    ("RESET", "RESET work_mem"),
    ("REVOKE", "REVOKE SELECT ON t FROM PUBLIC"),
    ("ROLLBACK", "ROLLBACK"),
    ("ROLLBACK PREPARED", "ROLLBACK PREPARED 'x'"),
    ("ROLLBACK TO SAVEPOINT", "ROLLBACK TO SAVEPOINT a"),
    ("SAVEPOINT", "SAVEPOINT a"),
    ("SECURITY LABEL", "SECURITY LABEL ON TABLE t IS 'x'"),
    ("SELECT", "SELECT * FROM t"),
    ("SELECT INTO", "SELECT 1 INTO u"),
    ("SET", "SET work_mem = '5MB'"),
    ("SET CONSTRAINTS", "SET CONSTRAINTS ALL IMMEDIATE"),
    ("SET ROLE", "SET ROLE postgres"),
    ("SET SESSION AUTHORIZATION", "SET SESSION AUTHORIZATION postgres"),
    ("SET TRANSACTION", "SET TRANSACTION READ WRITE"),
    ("SHOW", "SHOW work_mem"),
    ("START TRANSACTION", "START TRANSACTION READ WRITE"),
    ("TABLE", "TABLE t"),
    ("TRUNCATE", "TRUNCATE t"),
    ("UNLISTEN", "UNLISTEN *"),
    ("UPDATE", "UPDATE t SET n = 2"),
    ("VACUUM", "VACUUM t"),
    ("VALUES", "VALUES (1)"),
    ("WITH", "WITH x AS (SELECT 1) SELECT * FROM x"),
];

/// Writes and other effects that do not show at first sight.
const HIDDEN: &[&str] = &[
    "WITH d AS (DELETE FROM t RETURNING *) SELECT * FROM d",
    "SELECT * FROM t FOR UPDATE",
    "SELECT * FROM (SELECT * FROM t FOR KEY SHARE) x",
    "EXPLAIN ANALYZE DELETE FROM t",
    "EXPLAIN ANALYZE SELECT * FROM t",
    "SELECT nextval('s')",
    "SELECT setval('s', 7)",
    "SELECT currval('s')",
    "SELECT lo_create(0)",
    "SELECT lo_from_bytea(0, 'x')",
    "SELECT pg_notify('a', 'b')",
    "SELECT pg_advisory_lock(1)",
    "SELECT writes()",
    "SELECT reads()",
    "SELECT * FROM seems_harmless",
    "SELECT 1 <!> 2",
    "SELECT set_config('transaction_read_only', 'off', false)",
    "SELECT pg_terminate_backend(0)",
    "SELECT pg_reload_conf()",
    "SELECT random(), clock_timestamp(), now(), upper('x')",
    "SELECT txid_current()",
    "SELECT dblink_exec('', 'DELETE FROM t')",
    "COPY (DELETE FROM t RETURNING *) TO STDOUT",
    "COPY (SELECT 1) TO PROGRAM 'cat'",
    "COPY t TO STDOUT",
    "SET default_transaction_read_only = off",
    "SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE",
    "BEGIN READ ONLY",
    "CREATE TEMP TABLE x (n int)",
    "DECLARE c CURSOR WITH HOLD FOR SELECT writes()",
    "TRUNCATE t; SELECT 1",
    "SELECT 1; SELECT 2",
    "nonsense",
];

const SET_UP: &str = "CREATE TABLE t (n int PRIMARY KEY, x text); CREATE SEQUENCE s; \
    CREATE FUNCTION writes() RETURNS int LANGUAGE sql AS 'INSERT INTO t VALUES (1) RETURNING n'; \
    CREATE FUNCTION reads() RETURNS int STABLE LANGUAGE sql AS 'SELECT 1'; \
    CREATE VIEW seems_harmless AS SELECT writes() AS n; \
    CREATE FUNCTION compares(int, int) RETURNS bool LANGUAGE sql AS 'SELECT writes() = 1'; \
    CREATE OPERATOR <!> (LEFTARG = int, RIGHTARG = int, FUNCTION = compares); \
    CREATE PROCEDURE p() LANGUAGE sql AS 'INSERT INTO t VALUES (1)'";

/// What the default policy makes of a text.
fn verdict(sql: &str, state: CellState, catalog: &Catalog) -> (String, bool) {
    let transaction = Transaction::default();
    let asked = Asked { state, role: "app", database: "postgres", transaction };
    let policy = Policy::default();
    let Ok(commands) = grammar::commands(sql.as_bytes(), true) else {
        let rule = policy.rule(model::policy::Class::Unknown, &asked);
        return ("unknown".into(), rule.1 == Disposition::Accept);
    };
    let classes_of = |command: &Command| {
        let name = command.name;
        command.classes_with(Some(catalog)).map(move |class| (name, class)).collect::<Vec<_>>()
    };
    let classes: Vec<(&'static str, model::policy::Class)> =
        commands.iter().flat_map(classes_of).collect();
    let names: Vec<&str> = classes.iter().map(|(_, class)| class.name()).collect();
    (names.join(", "), policy.judge(classes, &asked, |_, _| ()).is_ok())
}

#[tokio::test]
async fn every_command_of_the_manual_has_its_verdict() {
    let installation = Installation::start("policy");
    let mut admin = installation.direct("a").await;
    run(&mut admin, SET_UP).await;
    let rows = admin.query(QUESTION).await.unwrap().remove(0).rows;
    let row = |row: &Vec<Option<String>>| (row[0].clone().unwrap(), row[1].clone().unwrap());
    let rows: Vec<(String, String)> = rows.iter().map(row).collect();
    let rows = rows.iter().map(|(kind, name)| (kind.as_str(), name.as_str()));
    let catalog = Catalog::read(rows).unwrap();
    let mut text = String::from(
        "# What cells make of commands\n\
         By the default policy, from `e2e::policy`, beside what PostgreSQL 15 itself says with `default_transaction_read_only = on`. A fenced cell\n\
         may refuse more than a read-only server, and never less. `otherwise` fails there for another reason.\n\n\
         | command | statement | class | active | fenced | passive | read-only server |\n|---|---|---|---|---|---|---|\n",
    );
    let manual = MANUAL.iter().map(|(name, sql)| (*name, *sql));
    for (name, sql) in manual.chain(HIDDEN.iter().map(|sql| ("", *sql))) {
        let mut session = installation.direct("a").await;
        run(&mut session, "PREPARE p AS DELETE FROM t; DECLARE c CURSOR WITH HOLD FOR SELECT 1")
            .await;
        run(&mut session, "SET default_transaction_read_only = on; SET statement_timeout = '5s'")
            .await;
        let server = match session.query(sql).await {
            Ok(_) => "accepts",
            Err(error) if error.sqlstate().is_some_and(|code| code.to_string() == "25006") => {
                "refuses"
            }
            Err(_) => "otherwise",
        };
        let says = |state| verdict(sql, state, &catalog);
        let shown = |accepts: bool| if accepts { "accepts" } else { "refuses" };
        let (class, active) = says(CellState::Active);
        let (fenced, passive) = (says(CellState::Fenced).1, says(CellState::Passive).1);
        assert!(active, "{sql}");
        assert!(
            !(fenced && server == "refuses") || class == "execute",
            "{sql}: a read-only server refuses it"
        );
        let sql = sql.replace('|', "\\|");
        writeln!(
            text,
            "| {name} | `{sql}` | {class} | {} | {} | {} | {server} |",
            shown(active),
            shown(fenced),
            shown(passive)
        )
        .unwrap();
    }
    if other_bin_dir().is_some() {
        return;
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/command-policy.md");
    if std::env::var_os("HOLDFAST_BLESS").is_some() {
        std::fs::write(path, &text).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        committed == text,
        "`docs/command-policy.md` is another; write it with HOLDFAST_BLESS=1"
    );
    let port = installation.facts.servers["a"].to_string();
    let args = ["-X", "-h", "127.0.0.1", "-p", &port, "-U", "postgres", "-c", "\\h", "postgres"];
    let help = std::process::Command::new("psql").args(args).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    assert!(help.lines().count() > 60, "{help}");
    for line in help.lines().skip(1) {
        // Names that fill their column have one space behind them.
        let mut rest = line.trim();
        while !rest.is_empty() {
            let names = MANUAL.iter().map(|(name, _)| *name);
            let is_next = |name: &&str| {
                rest.strip_prefix(*name)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
            };
            let name = names.filter(is_next).max_by_key(|name| name.len());
            rest = rest[name.unwrap_or_else(|| panic!("no statement here: {rest}")).len()..].trim();
        }
    }
}
