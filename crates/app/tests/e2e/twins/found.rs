//! What review has found in sessions that share servers: each case is run by two of them, and by their twins.

use wire::frontend::{self, Target};

use super::vocabulary::Step;
use super::{Difference, Twins, connect, first_difference};
use crate::support::Installation;

fn q(sql: &str) -> Step {
    batch(1, |out| frontend::query(out, sql.as_bytes()))
}

/// Several messages in one write, with so many answers of ReadyForQuery.
fn batch(readies: usize, write: impl FnOnce(&mut Vec<u8>)) -> Step {
    let mut bytes = Vec::new();
    write(&mut bytes);
    Step::Send { shown: format!("{:?}", String::from_utf8_lossy(&bytes)), bytes, readies }
}

fn parse(out: &mut Vec<u8>, name: &str, sql: &str) {
    frontend::parse(out, name.as_bytes(), sql.as_bytes(), &[]);
}

fn run(out: &mut Vec<u8>, name: &str, params: &[Option<&[u8]>]) {
    frontend::bind_text(out, b"", name.as_bytes(), params);
    frontend::execute(out, b"", 0);
}

/// Parse and Sync.
fn prepare(name: &str, sql: &str) -> Step {
    batch(1, |out| {
        parse(out, name, sql);
        frontend::sync(out);
    })
}

/// Bind, Execute and Sync.
fn execute(name: &str, params: &[Option<&[u8]>]) -> Step {
    batch(1, |out| {
        run(out, name, params);
        frontend::sync(out);
    })
}

/// Parse, Bind, Execute and Sync.
fn whole(name: &str, sql: &str) -> Step {
    batch(1, |out| {
        parse(out, name, sql);
        run(out, name, &[]);
        frontend::sync(out);
    })
}

fn close(out: &mut Vec<u8>, name: &str) {
    frontend::close(out, Target::Statement(name.as_bytes()));
}

const SCHEMA: &str = "SET check_function_bodies = off; CREATE SCHEMA s1; CREATE SCHEMA s2; CREATE TABLE s1.typed (a int); CREATE TABLE s2.typed (a text); \
    CREATE TABLE log (n int); CREATE TABLE plain (a int); CREATE TABLE ser (id serial, a text); \
    CREATE FUNCTION lk() RETURNS int LANGUAGE plpgsql AS \
    $$BEGIN PERFORM set_config('app.leak', 'leaked', false); RETURN 1; END$$; \
    CREATE FUNCTION lks(a int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS \
    $$BEGIN PERFORM set_config('app.leak', 'leaked', false); RETURN a; END$$; \
    CREATE FUNCTION \"Audit\"() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN PERFORM lk(); RETURN new; END$$; \
    CREATE TABLE audited (a int); CREATE TRIGGER x BEFORE INSERT ON audited FOR EACH ROW EXECUTE FUNCTION \"Audit\"(); \
    CREATE FUNCTION by_default(a int DEFAULT lk()) RETURNS int LANGUAGE sql AS 'SELECT a'; \
    CREATE TABLE parted (a int) PARTITION BY RANGE (lks(a)); \
    CREATE TABLE part PARTITION OF parted FOR VALUES FROM (0) TO (1000); \
    CREATE VIEW seen AS SELECT lk() AS x; CREATE VIEW settings AS SELECT * FROM pg_settings; \
    CREATE VIEW prepared AS SELECT * FROM pg_prepared_statements; CREATE TABLE public.typed (a text); \
    GRANT ALL ON SCHEMA s1 TO s1; GRANT ALL ON s1.typed TO s1; \
    CREATE TABLE child (a int REFERENCES refd); \
    CREATE FUNCTION frozen() RETURNS text LANGUAGE plpgsql AS \
    $$BEGIN RETURN ('2020-01-01 00:00'::timestamptz AT TIME ZONE 'UTC')::text || (1::float8/3)::text; END$$; \
    CREATE FUNCTION compiled() RETURNS text LANGUAGE plpgsql AS \
    $$DECLARE r typed%rowtype; BEGIN r.a := '7'; RETURN pg_typeof(r.a); END$$";

const LEAK: &str = "SELECT current_setting('app.leak', true)";

/// A name, and what the two sessions do in turn.
fn cases() -> Vec<(&'static str, Vec<(usize, Step)>)> {
    let both = |steps: Vec<Step>| steps.into_iter().map(|step| (0, step)).collect::<Vec<_>>();
    let then = |mut steps: Vec<(usize, Step)>, more: Vec<(usize, Step)>| {
        steps.extend(more);
        steps
    };
    let leaks = |sql: &str| vec![(0, q(sql)), (1, q(LEAK)), (0, q(LEAK))];
    let mut cases = vec![
        (
            "an unnamed statement is bound again",
            then(
                both(vec![prepare("", "SET search_path = s2"), execute("", &[])]),
                vec![(1, q("SHOW search_path")), (0, q("SHOW search_path"))],
            ),
        ),
        (
            "the unnamed statement of somebody else",
            vec![
                (0, whole("", "SELECT 'secret'")),
                (
                    1,
                    batch(2, |out| {
                        frontend::bind_text(out, b"", b"none", &[]);
                        parse(out, "", "SELECT 'own'");
                        frontend::sync(out);
                        run(out, "", &[]);
                        frontend::sync(out);
                    }),
                ),
            ],
        ),
        (
            "an unnamed statement that was closed",
            both(vec![
                prepare("", "INSERT INTO log VALUES (1)"),
                batch(1, |out| {
                    close(out, "");
                    run(out, "", &[]);
                    frontend::sync(out);
                }),
                prepare("", "INSERT INTO log VALUES (2)"),
                batch(2, |out| {
                    frontend::query(out, b"SELECT 2");
                    run(out, "", &[]);
                    frontend::sync(out);
                }),
                q("SELECT count(*) FROM log"),
            ]),
        ),
        (
            "SELECT INTO under a search path of literals",
            vec![
                (0, q("SET search_path = 'pg_temp', 'public'")),
                (0, q("SELECT 'secret' AS s INTO priv")),
                (1, q("SELECT * FROM priv")),
                (0, q("SELECT * FROM priv")),
            ],
        ),
        (
            "statements of others are not shown",
            vec![
                (0, prepare("a", "SELECT 'secret'")),
                (1, q("SELECT count(*) FROM pg_prepared_statement()")),
                (1, whole("", "SELECT count(*) FROM pg_prepared_statements")),
                (0, execute("a", &[])),
            ],
        ),
        (
            "the same text under another search path",
            vec![
                (0, q("SET search_path = s1")),
                (1, q("SET search_path = s2")),
                (0, prepare("i", "INSERT INTO typed VALUES ($1)")),
                (1, prepare("i", "INSERT INTO typed VALUES ($1)")),
                (0, execute("i", &[Some(b"1")])),
                (1, execute("i", &[Some(b"007")])),
                (1, whole("s", "SELECT * FROM typed")),
                (0, whole("s", "SELECT * FROM typed")),
            ],
        ),
        (
            "the same text under a search path of the transaction",
            vec![
                (0, q("SET search_path = s1")),
                (1, q("SET search_path = s1")),
                (
                    0,
                    prepare(
                        "i",
                        "SELECT pg_typeof(a) FROM (SELECT 1) o LEFT JOIN typed ON true LIMIT 1",
                    ),
                ),
                (1, q("BEGIN; SET LOCAL search_path = s2")),
                (
                    1,
                    whole(
                        "i",
                        "SELECT pg_typeof(a) FROM (SELECT 1) o LEFT JOIN typed ON true LIMIT 1",
                    ),
                ),
                (1, q("COMMIT")),
                (0, execute("i", &[])),
            ],
        ),
        (
            "a setting in the same write, before a Parse",
            vec![
                (0, whole("z", "SELECT '2020-01-01 00:00'::timestamptz AT TIME ZONE 'UTC'")),
                (
                    1,
                    batch(2, |out| {
                        frontend::query(out, b"SET TimeZone = 'Asia/Tokyo'");
                        parse(
                            out,
                            "z",
                            "SELECT '2020-01-01 00:00'::timestamptz AT TIME ZONE 'UTC'",
                        );
                        run(out, "z", &[]);
                        frontend::sync(out);
                    }),
                ),
            ],
        ),
        (
            "settings by which texts are read",
            vec![
                (0, whole("x", "SELECT '<a/><b/>'::xml")),
                (1, q("SET xmloption = document")),
                (1, whole("x", "SELECT '<a/><b/>'::xml")),
                (0, q("SET extra_float_digits = 0")),
                (0, whole("f", "SELECT (1::float8/3)::text")),
                (1, whole("f", "SELECT (1::float8/3)::text")),
            ],
        ),
        (
            "plans of functions hold literals",
            vec![
                (0, q("SET TimeZone = 'Asia/Tokyo'; SET extra_float_digits = 0")),
                (0, q("SELECT frozen()")),
                (1, q("SELECT frozen()")),
            ],
        ),
        (
            "plans of functions hold literals of a transaction",
            vec![
                (0, q("BEGIN; SET LOCAL TimeZone = 'Asia/Tokyo'; SELECT frozen(); ROLLBACK")),
                (1, q("SELECT frozen()")),
            ],
        ),
        (
            "functions are compiled under a search path",
            vec![
                (0, q("SET search_path = s1, public")),
                (0, q("SELECT compiled()")),
                (1, q("SET search_path = s2, public")),
                (1, q("SELECT compiled()")),
            ],
        ),
        (
            "DEALLOCATE in pieces",
            vec![
                (0, prepare("d", "SELECT 1")),
                (1, prepare("d", "SELECT 1")),
                (0, prepare("", "DEALLOCATE d")),
                (0, execute("", &[])),
                (1, execute("d", &[])),
                (0, execute("d", &[])),
                (
                    1,
                    batch(2, |out| {
                        frontend::query(out, b"DEALLOCATE ALL");
                        parse(out, "d", "SELECT 2");
                        run(out, "d", &[]);
                        frontend::sync(out);
                    }),
                ),
                (1, prepare("e", "SELECT 3")),
                (
                    1,
                    batch(1, |out| {
                        for name in ["DEALLOCATE d", "DEALLOCATE e"] {
                            parse(out, "", name);
                            run(out, "", &[]);
                        }
                        frontend::sync(out);
                    }),
                ),
                (1, execute("d", &[])),
            ],
        ),
        (
            "names behind errors in one write",
            both(vec![
                prepare("n", "SELECT 1"),
                batch(2, |out| {
                    parse(out, "m", "SELECT FROM FROM");
                    close(out, "n");
                    frontend::sync(out);
                    parse(out, "m", "SELECT 2");
                    run(out, "m", &[]);
                    run(out, "n", &[]);
                    frontend::sync(out);
                }),
                prepare("n", "SELECT 2"),
                batch(3, |out| {
                    frontend::query(out, b"BEGIN");
                    frontend::query(out, b"SELECT 1/0");
                    parse(out, "k", "SELECT 1");
                    frontend::sync(out);
                }),
                q("ROLLBACK"),
                execute("k", &[]),
            ]),
        ),
        (
            "a Parse takes the snapshot",
            vec![
                (0, prepare("c", "SELECT count(*) FROM plain")),
                (1, q("BEGIN ISOLATION LEVEL REPEATABLE READ")),
                (1, prepare("c", "SELECT count(*) FROM plain")),
                (0, q("INSERT INTO plain VALUES (1)")),
                (1, execute("c", &[])),
                (1, q("COMMIT")),
            ],
        ),
        (
            "a view of the settings",
            vec![
                (0, q("UPDATE settings SET setting = '2048' WHERE name = 'work_mem'")),
                (1, q("SHOW work_mem")),
                (0, q("SHOW work_mem")),
            ],
        ),
        (
            "statements of others by a named one, by a view and by EXECUTE",
            vec![
                (0, prepare("a", "SELECT 'secret'")),
                (
                    1,
                    whole(
                        "n",
                        "SELECT count(*) FROM pg_prepared_statements WHERE statement = $$SELECT 'secret'$$",
                    ),
                ),
                (1, q("SELECT count(*) FROM prepared WHERE statement = $$SELECT 'secret'$$")),
                (1, q("EXECUTE holdfast_0_0")),
                (0, execute("a", &[])),
            ],
        ),
        (
            "statements are shown behind others in one batch",
            vec![
                (0, prepare("a", "SELECT 'secret'")),
                (
                    1,
                    batch(1, |out| {
                        parse(out, "", "SELECT 1");
                        run(out, "", &[]);
                        parse(
                            out,
                            "",
                            "SELECT count(*) FROM pg_prepared_statement() WHERE statement = $$SELECT 'secret'$$",
                        );
                        run(out, "", &[]);
                        frontend::sync(out);
                    }),
                ),
            ],
        ),
        (
            "DEALLOCATE ALL and a Parse in one batch",
            vec![
                (0, prepare("a", "SELECT 'a'")),
                (1, prepare("a", "SELECT 'a'")),
                (
                    0,
                    batch(1, |out| {
                        parse(out, "", "DEALLOCATE ALL");
                        run(out, "", &[]);
                        parse(out, "a", "SELECT 'a'");
                        run(out, "a", &[]);
                        frontend::sync(out);
                    }),
                ),
                (0, execute("a", &[])),
                (1, execute("a", &[])),
            ],
        ),
        (
            "a DEALLOCATE that fails before another",
            vec![
                (0, prepare("a", "SELECT 'a'")),
                (0, prepare("b", "SELECT 'b'")),
                (1, prepare("a", "SELECT 'a'")),
                (
                    0,
                    batch(5, |out| {
                        for sql in
                            ["BEGIN", "SELECT 1/0", "DEALLOCATE a", "ROLLBACK", "DEALLOCATE b"]
                        {
                            frontend::query(out, sql.as_bytes());
                        }
                    }),
                ),
                (0, execute("a", &[])),
                (0, execute("b", &[])),
                (1, execute("a", &[])),
            ],
        ),
        (
            "a statement prepared under settings of a transaction",
            vec![
                (0, q("BEGIN; SET LOCAL TimeZone = 'Asia/Tokyo'")),
                (0, prepare("z", "SELECT '2020-01-01 00:00'::timestamptz AT TIME ZONE 'UTC'")),
                (0, prepare("", "SELECT '2020-01-01 00:00'::timestamptz AT TIME ZONE 'UTC'")),
                (0, q("COMMIT")),
                (1, q("SELECT 1")),
                (0, execute("z", &[])),
            ],
        ),
        (
            "a name that is taken, on a server that is kept",
            vec![
                (0, q("SELECT pg_try_advisory_lock_shared(8)")),
                (0, prepare("n", "SELECT 1")),
                (0, prepare("n", "SELECT 2")),
                (
                    0,
                    batch(1, |out| {
                        close(out, "n");
                        frontend::sync(out);
                    }),
                ),
                (0, execute("n", &[])),
                (0, q("SELECT pg_advisory_unlock_all()")),
            ],
        ),
        (
            "types that a role decides",
            vec![(0, q("SET ROLE s1")), (0, q("SELECT compiled()")), (1, q("SELECT compiled()"))],
        ),
    ];
    for (name, sql) in [
        ("a trigger with a quoted name", "INSERT INTO audited VALUES (1)"),
        ("a default of an argument", "SELECT by_default()"),
        ("an expression of a partition key", "INSERT INTO parted VALUES (1)"),
        (
            "a function that reads what a literal names",
            "SELECT table_to_xml('seen', true, false, '') IS NULL",
        ),
        ("a view", "SELECT x FROM seen"),
        (
            "one thing that hides another",
            "SELECT set_config('app.' || 'leak', 'leaked', false), nextval('ser_id_seq') > 0",
        ),
    ] {
        cases.push((name, leaks(sql)));
    }
    cases
}

/// Functions by which plans and compiled code are bound to settings, so that more is done for them than elsewhere.
const BOUND: &str = "CREATE TABLE log (n int); CREATE TABLE tenants (t text, n int); \
    INSERT INTO tenants VALUES ('A', 1), ('B', 2); CREATE TABLE tt (a int, b text DEFAULT 'x'); CREATE DOMAIN public.money AS text; \
    CREATE FUNCTION isetc(text, text, bool) RETURNS text LANGUAGE internal AS 'set_config_by_name'; \
    CREATE FUNCTION made() RETURNS int LANGUAGE sql AS 'SELECT 1'; \
    CREATE FUNCTION makes() RETURNS int LANGUAGE plpgsql AS $f$BEGIN \
    EXECUTE 'CREATE OR REPLACE FUNCTION made() RETURNS int LANGUAGE sql AS $b$SELECT length(set_config(''app.leak'', ''leaked'', false))$b$'; \
    RETURN 1; END$f$; \
    CREATE FUNCTION tenantp() RETURNS text IMMUTABLE LANGUAGE plpgsql AS $f$BEGIN RETURN current_setting('app.tenant'); END$f$; \
    CREATE FUNCTION tenant_rows() RETURNS bigint LANGUAGE plpgsql AS \
    $f$BEGIN RETURN (SELECT sum(n) FROM tenants WHERE t = tenantp()); END$f$; \
    CREATE FUNCTION rm() RETURNS text LANGUAGE plpgsql AS $f$DECLARE x money := '1'; BEGIN RETURN x::text; END$f$";

fn bound_cases() -> Vec<(&'static str, Vec<(usize, Step)>)> {
    let leaked = "SELECT current_setting('app.leak', true), current_setting('work_mem')";
    let in_path = "BEGIN; SET LOCAL search_path = public, pg_catalog; SELECT rm(); COMMIT";
    vec![
        (
            "a function of the server itself by another name",
            vec![
                (0, q("SELECT isetc('app.leak', 'A', false), isetc('work_mem', '77MB', false)")),
                (1, q(leaked)),
                (0, q(leaked)),
            ],
        ),
        (
            "a definition out of sight",
            vec![
                (1, q("SELECT made()")),
                (0, q("SELECT makes()")),
                (1, q("SELECT made()")),
                (0, q(leaked)),
                (0, q("CREATE OR REPLACE FUNCTION made() RETURNS int LANGUAGE sql AS 'SELECT 1'")),
            ],
        ),
        (
            "a definition by a session that has used temporary tables",
            vec![
                (0, q("CREATE TEMP TABLE zz (a int); DROP TABLE zz")),
                (1, q("INSERT INTO tt (a) VALUES (1)")),
                (0, q("ALTER TABLE tt ALTER b SET DEFAULT set_config('app.leak', 'A', false)")),
                (1, q("INSERT INTO tt (a) VALUES (2) RETURNING b")),
                (0, q(leaked)),
                (0, q("ALTER TABLE tt ALTER b SET DEFAULT 'x'")),
            ],
        ),
        (
            "functions that are called immutable and are not",
            vec![
                (0, q("SET app.tenant = 'A'")),
                (0, q("SELECT tenant_rows()")),
                (1, q("SET app.tenant = 'B'")),
                (1, q("SELECT tenant_rows()")),
                (0, q("SELECT tenant_rows()")),
                (1, prepare("p", "SELECT sum(n) FROM tenants WHERE t = tenantp()")),
                (0, prepare("p", "SELECT sum(n) FROM tenants WHERE t = tenantp()")),
                (1, execute("p", &[])),
                (0, execute("p", &[])),
            ],
        ),
        (
            "a literal that was read before its session set how",
            vec![
                (1, q("PREPARE dated AS SELECT '01/02/2024'::date")),
                (0, q("SELECT 1")),
                (1, q("SET DateStyle = 'German'")),
                (0, q("SELECT 1")),
                (1, q("EXECUTE dated")),
            ],
        ),
        (
            "a type of the server's by another path",
            vec![(0, q(in_path)), (1, q("SELECT rm()")), (0, q("SELECT rm()"))],
        ),
        (
            "the seed of random numbers, for a transaction only",
            vec![
                (0, q("BEGIN; SET LOCAL seed = 0.5; COMMIT")),
                (1, q("SELECT random() = 0.9851677175347999")),
                (0, q("SELECT random()")),
                (0, q("SELECT set_config('seed', '0.5', true)")),
                (1, q("SELECT random() = 0.9851677175347999")),
                (0, q("SELECT random()")),
            ],
        ),
        (
            "a name that is taken, and what follows in its batch",
            vec![
                (0, prepare("x", "SELECT '01/02/2024'::date")),
                (0, q("SET standard_conforming_strings = on")),
                (1, q("SELECT 1")),
                (0, whole("x", "SELECT 1")),
                (1, q("CREATE TEMP TABLE kept AS SELECT 1")),
                (1, prepare("x", "SELECT '01/02/2024'::date")),
                (1, whole("x", "SELECT 1")),
            ],
        ),
        (
            "an unnamed statement whose first Bind fails",
            vec![
                (0, q("SET standard_conforming_strings = on")),
                (
                    0,
                    batch(1, |out| {
                        parse(out, "", "SELECT '01/02/2024'::date");
                        run(out, "", &[Some(b"1")]);
                        frontend::sync(out);
                    }),
                ),
                (0, execute("", &[])),
            ],
        ),
    ]
}

#[tokio::test]
async fn what_review_has_found_in_sharing_stays_mended() {
    let schema = ["CREATE TABLE refd (n int PRIMARY KEY)", SCHEMA];
    nothing_differs("pooled-found", &schema, cases()).await;
}

#[tokio::test]
async fn what_is_bound_to_settings_stays_with_them() {
    nothing_differs("pooled-bound", &[BOUND], bound_cases()).await;
}

async fn nothing_differs(
    name: &str,
    schema: &[&str],
    cases: Vec<(&'static str, Vec<(usize, Step)>)>,
) {
    let twins = Twins::start_in(Installation::start_pooled(name, 2)).await;
    let servers = &twins.installation.facts.servers;
    let mut admin = connect(servers["a"], "postgres", "postgres").await;
    admin.query("CREATE ROLE s1").await.unwrap();
    for database in ["moved", "twin"] {
        let mut one = connect(servers["a"], "postgres", database).await;
        for sql in schema {
            one.query(sql).await.unwrap();
        }
    }
    let mut found = Vec::new();
    for (name, steps) in cases {
        let (mut pooled, mut alone) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            pooled.push(connect(twins.installation.facts.port, "postgres", "moved").await);
            alone.push(connect(servers["a"], "postgres", "twin").await);
        }
        for one in pooled.iter_mut().chain(&mut alone) {
            one.query("DO LANGUAGE plpgsql 'BEGIN END'").await.unwrap();
        }
        let steps = steps.iter().map(|(side, step)| (*side, step));
        let shown = match first_difference(pooled, alone, steps).await {
            Difference::None => continue,
            Difference::Told => "it was told that a statement cannot be prepared".to_owned(),
            Difference::Silent(shown) => shown,
        };
        eprintln!("{name}:\n{shown}\n");
        found.push(name);
    }
    assert!(found.is_empty(), "{found:?}");
}
