use super::*;

fn landscape() -> Landscape {
    let rows = [
        ("known", "lower", ""),
        ("known", "count", ""),
        ("known", "now", ""),
        ("known", "sum", ""),
        ("volatile", "set_config", ""),
        ("volatile", "nextval", ""),
        ("volatile", "lastval", ""),
        ("volatile", "random", ""),
        ("volatile", "setseed", ""),
        ("volatile", "pg_advisory_lock", ""),
        ("volatile", "pg_sleep", ""),
        ("opaque", "dblink_connect", ""),
        ("relation", "plain", ""),
        ("relation", "weather", ""),
        ("relation", "orders", "nextval('orders_id_seq'::regclass)"),
        ("relation", "customers", "orders"),
        ("relation", "audited", "audit"),
        ("relation", "busy", "select f.x from audited f"),
        ("function", "audit", "begin perform set_config('app.who', 'x', true); return new; end"),
        ("function", "runs", "begin execute 'select 1'; end"),
        ("function", "calls", "begin perform runs(); end"),
        ("function", "fine", "begin update plain set a = 1; return lower('X'); end"),
        ("function", "tempts", "begin create temp table t (a int); end"),
        ("function", "both", "begin perform nextval('s'), set_config('a.b', 'c', false); end"),
    ];
    let cell = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let rows: Vec<_> = rows.iter().map(|(a, b, c)| vec![cell(a), cell(b), cell(c)]).collect();
    Landscape::read(&rows).unwrap()
}

fn leaves(sql: &str) -> Leaves {
    let found = landscape().of_text(sql.as_bytes());
    assert!(found.sets.is_empty(), "{sql}: {found:?}");
    found.leaves
}

#[test]
fn plain_settings_are_named() {
    let sets = |sql: &str| {
        let found = landscape().of_text(sql.as_bytes());
        assert_eq!(found.leaves, Leaves::NOTHING, "{sql}");
        let shown =
            |one: &Assigned| format!("{}{}", if one.is_local { "local " } else { "" }, one.name);
        found.sets.iter().map(shown).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(sets("set search_path = a, b"), "search_path");
    assert_eq!(sets("SET SESSION App.User TO 7; reset datestyle"), "app.user DateStyle");
    assert_eq!(sets("begin; set local app.user = 7; select 1"), "local app.user");
    assert_eq!(sets("set local \"app.user\" = 7"), "local app.user");
    assert_eq!(sets("set local statement_timeout = 7"), "");
    assert_eq!(sets("set time zone 'UTC'"), "TimeZone");
    assert_eq!(sets("select set_config('app.x', '1', true)"), "local app.x");
    assert_eq!(
        sets(
            "select set_config('work_mem', lower('1MB'), true), set_config('work_mem', $1, false)"
        ),
        "work_mem"
    );
}

#[test]
fn everyday_statements_leave_nothing() {
    for sql in [
        "",
        "begin; select 1; commit",
        "SELECT lower(a), \"count\"(*) FROM plain WHERE b IN (1, 2) AND (c = 'set_config(') GROUP BY 1",
        "insert into plain (a, b) values (1, $2) on conflict (a) do update set b = excluded.b returning a",
        "insert into plain(a) select x from (values (1)) v(x)",
        "with a (x) as (select 1), b as materialized (select * from a) select sum(x) over (order by x) from b",
        "update plain set a = fine() where exists (select 1)",
        "select * from unnest(array[1]) with ordinality as u(a, b), generate(1) g(i)",
        "copy plain (a, b) from stdin",
        "(select 1) union (select 2)",
        "select temp from weather",
        "set local statement_timeout = '1s'",
        "set transaction isolation level serializable",
        "fetch all from c",
        "declare c cursor for select 1",
        "select random(), pg_sleep(0)",
        "select x::numeric(10, 2), cast(y as varchar(20)) from plain p (x, y)",
        "explain (analyze, costs off) select 1",
    ] {
        let found = leaves(sql);
        let only_unknown = sql.contains("generate(");
        assert_eq!(!found.is_nothing(), only_unknown, "{sql}: {found:?}");
    }
}

#[test]
fn settings_can_be_given_to_another_server() {
    for sql in [
        "reset all",
        "set role x",
        "set session authorization x",
        "set names 'x'",
        "set search_path from current",
        "set local \"App.user\" = 7",
        "set \"App\".user = 7",
        "select set_config('app.' || $1, '1', true)",
        "select set_config('app.x', '1', $1)",
        "select set_config(n, '1', true) from plain",
        "select 1; set geqo = 1",
        "update pg_settings set setting = 'x' where name = 'y'",
        "insert into audited values (1)",
        "select * from busy",
    ] {
        assert_eq!(leaves(sql), Leaves::SETTINGS, "{sql}");
    }
}

#[test]
fn what_plans_depend_on_is_told() {
    let found = |sql: &str| {
        let found = landscape().of_text(sql.as_bytes());
        (found.sets_any, found.restyles)
    };
    assert_eq!(found("select 1; begin; set transaction read only; commit"), (false, false));
    assert_eq!(found("insert into orders default values"), (false, false));
    assert_eq!(found("set local search_path = a"), (true, false));
    assert_eq!(found("set local app.x = a; select set_config('app.y', 'b', true)"), (true, false));
    assert_eq!(found("set local datestyle = a"), (true, true));
    assert_eq!(found("set time zone 'UTC'"), (true, true));
    assert_eq!(found("select set_config('timezone', 'b', true)"), (true, true));
    assert_eq!(found("select set_config($1, 'b', true)"), (true, true));
    assert_eq!(found("insert into audited values (1)"), (true, true));
}

#[test]
fn values_of_sequences_are_told_apart() {
    for sql in [
        "select nextval('s')",
        "insert into orders default values",
        "delete from customers",
        "select lastval()",
    ] {
        assert_eq!(leaves(sql), Leaves::VALUES, "{sql}");
    }
}

#[test]
fn whatever_cannot_be_told_leaves_something() {
    for sql in [
        "listen a",
        "create table t (a int)",
        "select setseed(1)",
        "select pg_advisory_lock(1)",
        "SELECT public.Dblink_Connect('x')",
        "select calls()",
        "select runs from plain",
        "select tempts()",
        "select never_heard_of(1)",
        "select * into temp t from plain",
        "select a into t from plain",
        "with a as (select 1) select * into t from a",
        "select * from pg_prepared_statement()",
        "select * into local temporary t from plain",
        "declare c cursor with hold for select 1",
        "select * from pg_temp.t",
        "select * from pg_temp_3.t",
        "prepare a as select 1",
        "explain analyze execute a",
        "select 'a\\'",
        "select U&\"!0061\" uescape '!'",
        "discard all",
        "select 1; do $$ $$",
        "$1",
        "\"select\" 1",
    ] {
        assert!(leaves(sql).something, "{sql}");
    }
}

#[test]
fn what_may_define_something_out_of_sight_is_told() {
    for sql in ["select runs from plain", "select never_heard_of(1)", "explain analyze execute a"] {
        assert!(leaves(sql).defines, "{sql}");
    }
    for sql in ["select 1", "select pg_advisory_lock(1)", "select * into temp t from plain"] {
        assert!(!leaves(sql).defines, "{sql}");
    }
}

#[test]
fn one_thing_does_not_hide_another() {
    let both = Leaves::SETTINGS.and(Leaves::VALUES);
    for sql in ["set role x; select nextval('s')", "select both()"] {
        assert_eq!(leaves(sql), both, "{sql}");
    }
}

#[test]
fn what_is_used_without_a_name_refuses_the_database() {
    let row = |a: &str, b: &str, c: &str| {
        vec![Some(a.to_owned()), Some(b.to_owned()), Some(c.to_owned())]
    };
    let rows =
        [row("function", "runs", "begin execute 'x'; end"), row("everywhere", "+++", "runs")];
    let landscape = Landscape::read(&rows).unwrap();
    assert!(landscape.refused.is_some());
    assert_eq!(landscape.of_text(b"select 1").leaves, Leaves::SOMETHING);
}

#[test]
fn what_a_text_does_to_its_block() {
    use super::Block::{self, Begins, Commits, MayCommit, RollsBack, Stays};
    let block = |sql: &str| -> Block { landscape().of_text(sql.as_bytes()).block };
    for (sql, expected) in [
        ("select 1; select 2", Stays),
        ("insert into plain values (case when true then 1 end)", Stays),
        ("begin", Begins),
        ("START TRANSACTION ISOLATION LEVEL SERIALIZABLE;", Begins),
        ("begin; select 1", MayCommit),
        ("rollback", RollsBack),
        ("ABORT WORK;", RollsBack),
        ("rollback to savepoint a", Stays),
        ("rollback transaction to a", Stays),
        ("rollback and chain", MayCommit),
        ("rollback; select 1", MayCommit),
        ("rollback prepared 'x'", MayCommit),
        ("commit", Commits),
        ("END TRANSACTION;", Commits),
        ("commit and chain", MayCommit),
        ("commit prepared 'x'", MayCommit),
        ("select 1; end", MayCommit),
        ("prepare transaction 'x'", MayCommit),
        ("do $$ begin commit; end $$", MayCommit),
        ("", Stays),
    ] {
        assert_eq!(block(sql), expected, "{sql}");
    }
}
