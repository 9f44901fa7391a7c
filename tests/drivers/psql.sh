#!/bin/sh
# Conformance program for psql and libpq; see README.md for the contract.
set -u
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 2
# A fixed environment, so that nothing of the user's own settings shows.
export PSQLRC=/dev/null PSQL_HISTORY=/dev/null PAGER=cat LC_ALL=C.UTF-8 TZ=UTC
export PGTZ=UTC PGDATESTYLE=ISO PGCLIENTENCODING=UTF8 PGAPPNAME=drv_psql PGCONNECT_TIMEOUT=10 COLUMNS=100
schema=drv_psql
failed=0

# run NAME WANTED_STATUS [psql arguments]: one bounded psql, input from stdin.
run() {
    echo "case: $1"
    want=$2
    shift 2
    timeout 20 psql -X "$@" >out 2>&1
    got=$?
    # libpq names the address in connection errors, and psql the pid in
    # notifications; neither is kept.
    sed -e 's/^.*connection to server at .* failed: //' -e 's/ with PID [0-9]*\.$//' out
    if [ "$got" -ne "$want" ]; then
        echo "unexpected exit status $got"
        failed=$((failed + 1))
    fi
}

clean() {
    timeout 20 psql -XqAt <<SQL
set client_min_messages to warning;
drop schema if exists $schema cascade;
select lo_unlink(oid) is null from pg_largeobject_metadata where pg_catalog.obj_description(oid, 'pg_largeobject') = 'drv_psql';
SQL
}

clean >/dev/null || exit 2
timeout 20 psql -Xq -c "create schema $schema" || exit 2
export PGOPTIONS="-c search_path=$schema,public"

run startup 0 <<'SQL'
\echo :SERVER_VERSION_NAME :ENCODING
show search_path; show application_name; show timezone; show datestyle;
\encoding
\timing off
SQL

run describe 0 <<'SQL'
create table parent(id int primary key, name text not null default 'x', n numeric(5,2) check (n > 0));
create table child(id serial, parent_id int references parent on delete cascade, tags text[]);
create index on child using gin (tags);
create view v as select * from parent where id > 1;
create function f(a int, b text default 'x') returns int language sql as 'select a';
create type mood as enum ('sad', 'ok');
comment on table parent is 'a comment, naïve';
\d
\d parent
\d child
\d+ v
\dt drv_psql.*
\di
\ds
\df f
\sf f
\sv v
\dT+ mood
\dn drv_psql
\d no_such_table
SQL

run formats 0 <<'SQL'
\pset null '(null)'
select 1 as a, null as b, 'multi
line' as c, 'ünï' as d;
\x on
select 1 as a, null as b;
\x off
\a
\t
select 1, 2;
\pset format csv
select 'a,b', '"q"';
\pset format unaligned
select i, i * i from generate_series(1, 3) i \gx
select 'select ' || i || ' as g' from generate_series(1, 3) i \gexec
select 5 as five, 'x' as ex \gset got_
\echo :got_five :got_ex
select :got_five + 1;
select i % 2, i % 3, count(*) from generate_series(1, 12) i group by 1, 2 order by 1, 2 \crosstabview
SQL

run gdesc 0 <<'SQL'
select 1 as a, 'x'::varchar(5) as b, 1.5::numeric(7,2) as c, null as d \gdesc
select from generate_series(1, 3) \gdesc
create temp table never_run(a int) \gdesc
selct 1 \gdesc
select to_regclass('never_run');
SQL

run combined 0 <<'SQL'
select 1 \; select 2 \; create temp table q(a int) \; insert into q values (1), (2) \; select * from q;
insert into q values (3) \; select 1/0 \; insert into q values (4);
select count(*) from q;
begin \; insert into q values (5) \; commit \; insert into q values (6) \; select 1/0;
select array_agg(a order by a) from q;
;
\echo :ERROR :SQLSTATE :ROW_COUNT
select 1/0;
\echo :ERROR :SQLSTATE :LAST_ERROR_SQLSTATE :LAST_ERROR_MESSAGE
\set SHOW_ALL_RESULTS off
select 1 \; select 2;
SQL

run command_line 1 -v ON_ERROR_STOP=1 -c 'select 1; select 2' -c '\echo three' -c 'select 4; select 1/0; select 5' -c 'select 6'
run command_line_single_transaction 3 -v ON_ERROR_STOP=1 -1 -f - <<'SQL'
create table single_t(a int);
insert into single_t values (1);
select no_such;
insert into single_t values (2);
SQL
run single_transaction_left_nothing 0 -Atc "select to_regclass('single_t')"

run errors 0 <<'SQL'
\set VERBOSITY verbose
insert into parent values (1, 'x', 1), (2, 'y', 2);
insert into parent values (1, 'z', 3);
insert into parent values (3, null, 3);
insert into parent values (3, 'x', -1);
insert into child(parent_id) values (99);
select 'héé' + no_such from parent;
select nam from parent;
do $$ begin raise exception 'custom' using errcode = 'HF001', hint = 'some hint', detail = 'some detail'; end $$;
\set VERBOSITY terse
selct;
\errverbose
\set VERBOSITY sqlstate
select 1/0;
\set VERBOSITY default
do $$ begin raise notice 'a notice'; raise warning 'a warning' using hint = 'h'; raise info 'info'; end $$;
drop table if exists not_there;
commit;
\echo still :SERVER_VERSION_NUM
SQL

run transactions 0 <<'SQL'
\set ON_ERROR_ROLLBACK on
\set PROMPT1 ''
create temp table t(a int);
begin;
insert into t values (1);
select 1/0;
insert into t values (2);
savepoint mine;
insert into t values (3);
rollback to mine;
commit;
select array_agg(a order by a) from t;
\set ON_ERROR_ROLLBACK off
begin;
select no_such;
select 1;
commit;
\set AUTOCOMMIT off
insert into t values (4);
rollback;
insert into t values (5);
commit;
\set AUTOCOMMIT on
begin isolation level serializable read only deferrable;
show transaction_isolation;
create table nope(a int);
rollback;
select array_agg(a order by a) from t;
SQL

run prepared 0 <<'SQL'
prepare p(int, text) as select $1 + 1 as a, $2 as b;
execute p(1, 'x'); execute p(2, null); execute p(3, 'x'); execute p(4, 'x'); execute p(5, 'x'); execute p(6, 'x');
execute p(7, 'x');
select name, parameter_types, from_sql, generic_plans, custom_plans from pg_prepared_statements;
explain (costs off) execute p(1, 'x');
deallocate p;
execute p(1, 'x');
prepare p2 as select 1;
discard all;
execute p2;
SQL

run cursors 0 <<'SQL'
\set FETCH_COUNT 7
select i, i * i as sq from generate_series(1, 20) i;
select 10 / (12 - i) from generate_series(1, 20) i;
insert into parent select i from generate_series(50, 54) i returning id;
\set FETCH_COUNT 0
begin;
declare c scroll cursor for select i from generate_series(1, 10) i;
fetch 3 from c; fetch backward 1 from c; move absolute 8 in c; fetch all from c; fetch first from c;
declare h cursor with hold for select i from generate_series(1, 5) i;
commit;
fetch 2 from h;
select name, is_holdable from pg_cursors;
close h;
fetch 1 from h;
SQL

awk 'BEGIN { for (i = 0; i < 30000; i++) printf "%d\tname %d\t%s\n", i + 1000, i, i % 3 ? i / 4 + 1 : "\\N" }' >in.txt
printf '1,"a ""q"", b",\n' >one.csv
run copy 0 <<'SQL'
create table copy_t(a int primary key, b text, c numeric);
\copy copy_t from 'in.txt'
\copy copy_t from 'one.csv' with (format csv)
select count(*), count(c), sum(c) from copy_t;
\copy (select * from copy_t order by a) to 'out.txt'
\copy (select * from copy_t order by a) to 'out.csv' with (format csv, header)
\copy (select * from copy_t order by a) to 'out.bin' with (format binary)
\! md5sum out.txt out.csv out.bin
create table copy_b (like copy_t);
\copy copy_b from 'out.bin' with (format binary)
select count(*), sum(c) from copy_b;
copy copy_b from stdin;
-1	inline	\N
-2	inline	5
\.
copy (select * from copy_b where a < 0 order by a) to stdout;
copy (select 1) to stdout \; select 2 \; copy (select 3) to stdout;
\copy copy_t from 'in.txt'
copy copy_t from stdin;
oops	x	1
\.
copy copy_t from stdin;
7
\.
\copy copy_t from 'no_such_file'
\copy no_such_table from 'in.txt'
\copy (select 1/0) to 'never'
copy copy_t from '/no/such/file/on/the/server';
begin;
copy copy_t from stdin;
8	x
\.
select 1;
rollback;
select count(*) from copy_t;
truncate copy_t;
copy copy_t from program 'false_program_that_is_not_there';
SQL
# Input that ends before "\." is still a whole COPY.
printf 'copy copy_t from stdin;\n1\tx\t2\n' | run copy_cut_short 0
run copy_kept 0 -Atc 'select * from copy_t'

run large 0 -At <<'SQL'
\o large.txt
select i, md5(i::text) from generate_series(1, 200000) i;
select repeat('x', 20000000);
\o
\! md5sum large.txt; wc -l < large.txt
select count(*), md5(string_agg(b, '')) from (select repeat('abc', i) b from generate_series(1, 1000) i) s;
SQL
{ printf "select length('"; head -c 2097152 /dev/zero | tr '\0' z; printf "');\n"; } >big.sql
run large_query 0 -At -f big.sql

head -c 300000 in.txt >lo.txt
# \lo_ commands use the protocol's FunctionCall message.
run large_objects 0 -At <<'SQL'
\set QUIET on
\lo_import lo.txt drv_psql
\set oid :LASTOID
select length(lo_get(:oid)), md5(lo_get(:oid));
\lo_export :oid lo.out
\! cmp lo.txt lo.out && echo same
\lo_unlink :oid
select count(*) from pg_largeobject_metadata where oid = :oid;
SQL

run notify 0 <<'SQL'
listen drv_chan;
\! PGAPPNAME=other timeout 10 psql -Xqc "notify drv_chan, 'from another session'"
select pg_sleep(0.1) is null;
notify drv_chan, 'to myself';
unlisten *;
notify drv_chan, 'nobody';
SQL

run settings 0 <<'SQL'
set time zone 'Asia/Kolkata'; select '2024-07-01 12:00+00'::timestamptz;
begin; set local work_mem = '3MB'; show work_mem; rollback;
set client_encoding to latin1;
\encoding
select octet_length(convert_to('x' || chr(233), 'LATIN1'));
select chr(8364);
\encoding UTF8
select 'é';
set statement_timeout = '200ms'; select pg_sleep(20); reset statement_timeout;
set lock_timeout to 'nope';
set session authorization default; set role none; select current_user = session_user;
create temp table tmp(a int); select pg_try_advisory_lock(770041);
discard all;
select to_regclass('tmp'), (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid());
SQL

run reconnect 0 <<'SQL'
set work_mem = '3MB';
create temp table tmp(a int);
\set QUIET on
\c
select to_regclass('tmp'), current_setting('work_mem') = '3MB';
\c "application_name=second"
show application_name;
SQL

run two_phase 0 -At <<'SQL'
select current_setting('max_prepared_transactions')::int > 0 as can_prepare \gset
\if :can_prepare
begin; insert into parent values (900); prepare transaction 'drv_psql_1';
\c
commit prepared 'drv_psql_1';
select count(*) from parent where id = 900;
rollback prepared 'drv_psql_1';
\else
\echo skipped: max_prepared_transactions is 0
\endif
SQL

# An interrupt makes psql send a CancelRequest.
echo 'case: cancel'
# Without "timeout", which would deliver the signal twice.
psql -XAtc 'select pg_sleep(15)' >out 2>&1 &
pid=$!
i=0
# Waits for the query to run, so that the interrupt cannot come too early.
while [ $i -lt 50 ] && [ "$(PGAPPNAME=watch timeout 5 psql -XAtc "select count(*) from pg_stat_activity where application_name = 'drv_psql' and wait_event = 'PgSleep'")" != 1 ]; do
    i=$((i + 1)); sleep 0.1
done
kill -INT "$pid"
i=0
while [ $i -lt 50 ] && kill -0 "$pid" 2>/dev/null; do i=$((i + 1)); sleep 0.1; done
kill "$pid" 2>/dev/null
wait "$pid"
echo "exit status $?"
cat out

run startup_failures 2 -d drv_no_such_database -c 'select 1'
PGOPTIONS='-c no_such_setting=1' run startup_bad_option 2 -c 'select 1'
if [ -n "${PGPASSWORD:-}" ]; then
    PGPASSWORD=drv-wrong-password run startup_wrong_password 2 -w -c 'select 1'
fi

unset PGOPTIONS
clean >/dev/null || failed=$((failed + 1))
echo "done, unexpected failures: $failed"
[ "$failed" -eq 0 ]
