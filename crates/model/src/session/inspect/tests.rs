use super::*;

fn hints(sql: &str) -> Hints {
    let mut hints = Hints::default();
    hints.on_statement(sql.as_bytes());
    hints
}

#[track_caller]
fn learns(sql: &str, names: &[&str]) {
    let hints = hints(sql);
    assert_eq!(hints.custom.iter().map(String::as_str).collect::<Vec<_>>(), names, "{sql}");
    assert!(hints.pins.is_empty(), "{sql}: {:?}", hints.pins);
}

#[track_caller]
fn pins(sql: &str, code: &str) {
    let hints = hints(sql);
    let codes: Vec<_> = hints.pins.iter().map(Pin::code).collect();
    assert_eq!(codes, [code], "{sql}");
}

#[test]
fn ordinary_statements_hint_at_nothing() {
    learns("select abalance from pgbench_accounts where aid = 1", &[]);
    learns("update t set a.b = 1", &[]);
    learns("set search_path = a, b; select 1", &[]);
    learns("select * from a.setup where x = 'set'", &[]);
    learns("select upload, payload from downloads", &[]);
    learns("insert into t values ('The options are set ''wrong''; please fix')", &[]);
    learns("insert into dblink_jobs values ('dblink is nice', 'setseed, too')", &[]);
}

#[test]
fn names_of_custom_settings_are_learned() {
    learns("set app.user_id = '7'", &["app.user_id"]);
    learns("  SET SESSION App.User TO 7", &["app.user"]);
    learns("/* tag */ set local \"App\".x = 1", &["App.x"]);
    learns("begin; set a.b.c = 1; commit", &["a.b.c"]);
    learns("select set_config('app.tenant', $1, false)", &["app.tenant"]);
    learns("select pg_catalog.set_config('app.tenant'::text, $1, false)", &["app.tenant"]);
    learns("select set_config('work_mem', '1MB', false)", &[]);
    learns(
        "do $$ begin set app.x = 1; perform set_config('app.y', '1', false); end $$",
        &["app.x", "app.y"],
    );
    learns("do 'begin set app.x = 1; end'", &["app.x"]);
    learns("select run_sql('set dyn.x = 1')", &["dyn.x"]);
    learns("select run_sql('  set dyn.x = 1')", &["dyn.x"]);
    learns("select 'setup', 'sets of plates'", &[]);
    learns("Reset app.x", &["app.x"]);
    learns("do $$ begin reset app.x; end $$", &["app.x"]);
}

#[test]
fn setval_is_remembered_wherever_it_stands() {
    assert!(hints("select setval('s', 5)").setval);
    assert!(hints("do $$ begin perform pg_catalog.setval('s', 5); end $$").setval);
    assert!(!hints("select setvalue from t").setval);
}

#[test]
fn modes_of_transactions_are_remembered() {
    for sql in ["begin read /* x */\n only", "START TRANSACTION ISOLATION LEVEL SERIALIZABLE"] {
        assert!(hints(sql).modes, "{sql}");
    }
    assert!(!hints("select only from write where rewrite").modes);
}

#[test]
fn a_name_at_the_end_of_a_part_pins() {
    for part in ["x; set app.us", "x; set app", "x, set_config('app.", "y, set_config("] {
        let mut hints = Hints::default();
        hints.on_part(part.as_bytes());
        assert_eq!(hints.pins.len(), 1, "{part}");
        assert!(hints.custom.is_empty(), "{part}");
    }
    let mut hints = Hints::default();
    hints.on_part(b"values (1); set app.user = 7; insert into t");
    assert_eq!(hints.custom.len(), 1);
    assert!(hints.pins.is_empty());
}

#[test]
fn function_calls_leave_what_they_leave_elsewhere() {
    let mut hints = Hints::default();
    hints.on_function_call(957);
    assert!(hints.is_empty());
    hints.on_function_call(1576);
    assert!(hints.setval && hints.pins.is_empty());
    hints.on_function_call(2078);
    hints.on_function_call(1599);
    assert_eq!(hints.pins.len(), 2);
}

#[test]
fn computed_names_pin() {
    pins("select set_config($1, $2, false)", "custom_settings");
    pins("select run_sql(E'\\nset dyn.x = 1')", "custom_settings");
    pins("select set_config('app.' || name, '1', false) from t", "custom_settings");
    pins("select 'a\\', set_config(x, y, false)", "custom_settings");
}

#[test]
fn state_inside_the_server_pins() {
    pins("select setseed(0.5)", "seed");
    pins("SELECT public.dblink_connect('c', 'dbname=x')", "dblink");
    pins("select pg_backup_start('x')", "backup_mode");
    pins("select pg_replication_origin_session_setup('x')", "replication_origin");
    pins("LOAD 'postgres_fdw'", "library");
    pins("LOAD '/tmp/auto_explain'", "library");
    pins("DO $$ BEGIN LOAD 'auto_explain'; END $$", "library");
    pins("DO $$ BEGIN EXECUTE format('load %L', 'auto_explain'); END $$", "library");
    pins("DO $$ BEGIN EXECUTE 'LOAD ' || quote_literal('x'); END $$", "library");
}

#[test]
fn a_command_tag_of_load_pins_wherever_it_ran() {
    let mut hints = Hints::default();
    hints.on_command_tag(b"SELECT 1");
    assert!(hints.is_empty());
    hints.on_command_tag(b"LOAD");
    assert_eq!(hints.pins.len(), 1);
}

#[test]
fn libraries_of_which_all_is_known_are_carried() {
    let mut hints =
        hints("/* x */ LOAD 'auto_explain'; SELECT 1; load '$libdir/plugins/pg_trgm.so'");
    assert!(hints.pins.is_empty() && hints.libraries.is_empty());
    hints.on_command_tag(b"LOAD");
    assert!(hints.pins.is_empty());
    let loaded: Vec<&str> = hints.libraries.iter().map(String::as_str).collect();
    assert_eq!(loaded, ["$libdir/plugins/pg_trgm.so", "auto_explain"]);
    hints.on_statement(b"LOAD 'hstore'");
    hints.on_error();
    hints.on_statement(b"SELECT 'load'");
    assert!(hints.pins.is_empty());
    // Prepared before, or by whatever: it is not known what that was.
    hints.on_command_tag(b"LOAD");
    assert_eq!((hints.pins.len(), hints.libraries.len()), (1, 2));
}

#[test]
fn a_search_path_is_noticed() {
    for sql in [
        "SET search_path = a",
        "set local schema 'a'",
        "SELECT set_config('Search_Path', '', false)",
    ] {
        assert!(hints(sql).paths, "{sql}");
    }
    assert!(!hints("SET work_mem = '1MB'").paths);
}

#[test]
fn a_pin_does_not_show_the_secrets_of_its_statement() {
    let hints = hints("select dblink_connect('host=x password=sesame')");
    assert!(!format!("{hints:?}").contains("sesame"));
}

/// What fuzzing has found.
#[test]
fn odd_texts_are_neither_lost_nor_shown() {
    learns("set local.x = 1", &["local.x"]);
    learns("set session.x = 1", &["session.x"]);
    learns("set local app.x = 1", &["app.x"]);
    learns("\x0bset a.b = 1", &["a.b"]);
    pins("select set_config('app.'::text || n, '1', false)", "custom_settings");
    pins("select 'C:\\tmp\\', set_config('app.x','1',false), 'b'", "custom_settings");
    let shown = hints("select 'my password sesame is for dblink() at work'");
    assert!(!format!("{shown:?}").contains("sesame"));
    let mut part = Hints::default();
    part.on_part(b"the secret sesame dblink() word', 'x')");
    assert!(!part.pins.is_empty() && !format!("{part:?}").contains("sesame"));
}

#[test]
fn bodies_within_bodies_end() {
    let mut sql = "set a.b = 1".to_owned();
    for depth in 0..5_000 {
        sql = format!("do $a{depth}$ {sql} $a{depth}$");
    }
    pins(&sql, "custom_settings");
}

#[test]
fn pins_are_limited() {
    let mut hints = Hints::default();
    for n in 0..10_000 {
        hints.on_statement(format!("select setseed(a{n})").as_bytes());
    }
    assert_eq!(hints.pins.len(), PINS_MAX);
}

#[test]
fn names_are_limited() {
    let mut hints = Hints::default();
    for n in 0..CUSTOM_NAMES_MAX {
        hints.on_statement(format!("set a.n{n} = 1").as_bytes());
    }
    assert!(hints.pins.is_empty());
    hints.on_statement(b"set a.one_too_many = 1");
    assert_eq!((hints.custom.len(), hints.pins.len()), (CUSTOM_NAMES_MAX, 1));
}
