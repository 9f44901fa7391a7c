#!/bin/sh
# Conformance program for pgbench; see README.md for the contract. Only facts
# that do not depend on speed are printed.
set -u
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 2
export LC_ALL=C.UTF-8 PGCONNECT_TIMEOUT=10
schema=drv_pgbench
failed=0

clean() {
    PGOPTIONS='-c client_min_messages=warning' timeout 20 psql -Xqc "drop schema if exists $schema cascade"
}

# bench NAME [pgbench arguments]: one bounded pgbench with the same random numbers.
bench() {
    echo "case: $1"
    shift
    timeout 20 pgbench --random-seed=42 -n "$@" >out 2>err
    status=$?
    grep -E '^(transaction type|scaling factor|query mode|number of (clients|transactions (per|actually)|failed))' out
    if [ "$status" -ne 0 ]; then
        echo "unexpected exit status $status"
        grep -E 'ERROR|FATAL|error:|aborted' err | sort -u | head -5
        failed=$((failed + 1))
    fi
}

sums() {
    timeout 20 psql -XAtc "select (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers),
        (select sum(bbalance) from pgbench_branches), (select count(*) from pgbench_history), (select sum(delta) from pgbench_history)"
}

clean || exit 2
timeout 20 psql -Xqc "create schema $schema" || exit 2
export PGOPTIONS="-c search_path=$schema"

echo 'case: init'
timeout 20 pgbench -i -q -s 1 >/dev/null 2>&1 || failed=$((failed + 1))
timeout 20 psql -XAtc 'select (select count(*) from pgbench_accounts), (select count(*) from pgbench_tellers)'

for mode in simple extended prepared; do
    bench "tpcb_$mode" -M "$mode" -c 4 -j 2 -t 50
    # The order of the clients varies, but what they add up to does not.
    sums
    bench "select_only_$mode" -M "$mode" -S -c 8 -j 2 -t 100
done
bench connect_each_time -M simple -S -C -c 4 -j 2 -t 25
bench connect_each_time_prepared -M prepared -C -c 2 -t 25
sums

cat >pipeline.sql <<'SQL'
\set aid random(1, 100000)
\startpipeline
begin;
update pgbench_accounts set abalance = abalance + 1 where aid = :aid;
select abalance from pgbench_accounts where aid = :aid;
insert into pgbench_history (tid, bid, aid, delta, mtime) values (1, 1, :aid, 1, now());
commit;
\endpipeline
select 1 as one \gset
\startpipeline
select :one;
select generate_series(1, 200);
\endpipeline
SQL
for mode in extended prepared; do
    bench "pipeline_$mode" -M "$mode" -f pipeline.sql -c 4 -j 2 -t 50
    sums
done

cat >failing.sql <<'SQL'
\startpipeline
select 1;
select 1/0;
select 2;
\endpipeline
SQL
echo 'case: pipeline_error'
timeout 20 pgbench -n -M extended -f failing.sql -c 1 -t 3 >out 2>err
echo "exit status $?"
grep -oE 'ERROR: .*|client 0 aborted.*' err | sort -u
grep -E '^number of (transactions|failed)' out

# Serialization failures are retried; in the end each transaction is done.
cat >retry.sql <<'SQL'
begin isolation level repeatable read;
update pgbench_branches set bbalance = bbalance + 1;
commit;
SQL
bench retries -M prepared -f retry.sql -c 4 -j 2 -t 20 --max-tries=10000
sums

unset PGOPTIONS
clean || failed=$((failed + 1))
echo "done, unexpected failures: $failed"
[ "$failed" -eq 0 ]
