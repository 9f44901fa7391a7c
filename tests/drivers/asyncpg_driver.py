#!/usr/bin/python3
"""Conformance program for asyncpg (its own protocol code, binary throughout).

See README.md for the contract: the transcript holds only facts that do not
change between two runs.
"""

import asyncio
import datetime as dt
import decimal
import hashlib
import ipaddress
import json
import os
import sys
import traceback
import uuid

import asyncpg

SCHEMA = "drv_asyncpg"
CASE_SECONDS = 20
CASES = []


def case(fn):
    CASES.append(fn)
    return fn


def md5(data):
    if isinstance(data, str):
        data = data.encode()
    return hashlib.md5(data).hexdigest()


async def connect(**kw):
    kw.setdefault("timeout", 10)
    settings = {"search_path": f"{SCHEMA}, public"}
    settings.update(kw.pop("server_settings", {}))
    return await asyncpg.connect(server_settings=settings, **kw)


def show_error(exc, label="error"):
    print(label, type(exc).__name__)
    for key, value in sorted(exc.as_dict().items()):
        if value is not None:
            print(f"  {key}: {value}")


async def fails(awaitable):
    try:
        await awaitable
    except asyncpg.PostgresError as exc:
        show_error(exc)
    except asyncpg.InterfaceError as exc:
        print("interface error", type(exc).__name__)
    else:
        print("no error, though one was expected")


@case
async def startup_parameters(conn):
    settings = conn.get_settings()
    for name in ("server_version", "server_encoding", "client_encoding",
                 "application_name", "is_superuser", "session_authorization",
                 "DateStyle", "IntervalStyle", "TimeZone", "integer_datetimes",
                 "standard_conforming_strings", "default_transaction_read_only",
                 "in_hot_standby"):
        print(name, "=", getattr(settings, name, None))
    print(conn.get_server_version())
    print("has pid", conn.get_server_pid() > 0, "in transaction", conn.is_in_transaction())
    print(await conn.fetchval("show search_path"))


@case
async def startup_options(conn):
    other = await connect(server_settings={
        "application_name": "drv asyncpg", "statement_timeout": "12345",
        "TimeZone": "Asia/Tokyo", "options": "-c geqo=off"})
    print(other.get_settings().application_name, other.get_settings().TimeZone)
    for name in ("statement_timeout", "geqo", "application_name", "timezone"):
        print(name, await other.fetchval(f"show {name}"))
    await other.execute("reset all")
    print(await other.fetchval("show timezone"))
    await other.close()


@case
async def startup_failures(conn):
    await fails(connect(database="drv_no_such_database"))
    await fails(connect(server_settings={"no_such_setting": "1"}))
    await fails(connect(server_settings={"work_mem": "banana"}))
    if os.environ.get("PGPASSWORD"):
        await fails(connect(password="drv-wrong-password"))
        await fails(connect(user="drv_no_such_user", password="x"))


@case
async def simple_query(conn):
    print(await conn.execute("select 1; select 2"))
    # An empty query trips asyncpg itself; the session must survive that.
    for query in ("", ";; -- nothing"):
        try:
            print(await conn.execute(query))
        except AttributeError:
            print("empty query")
    print(await conn.execute("select 1; select 2; "))
    print(await conn.execute("create temp table q(a int); insert into q values (1), (2)"))
    await fails(conn.execute("insert into q values (3); select 1/0; insert into q values (4)"))
    print(await conn.fetchval("select count(*) from q"))
    print(await conn.execute("begin; insert into q values (5)"), conn.is_in_transaction())
    print(await conn.execute("rollback; select 1"), conn.is_in_transaction())


@case
async def extended_query(conn):
    print(await conn.fetchrow("select $1::int + $2::int as sum, $3::text as t", 2, 3, None))
    print(await conn.fetch("select i from generate_series(1, $1) i", 5))
    print(await conn.fetch("select 1 where false"), await conn.fetchrow("select 1 where false"))
    print(await conn.fetch(""))
    print(await conn.execute("create temp table e as select $1::int as a", 7))
    await fails(conn.fetch("select $1::int; select 2", 1))
    await fails(conn.fetch("select * from no_such_table where a = $1", 1))
    try:
        await conn.fetch("select $1::int", "not an int")
    except asyncpg.DataError as exc:
        print("refused by the client:", type(exc).__name__)
    total = " + ".join(f"${i}::int8" for i in range(1, 1001))
    print(await conn.fetchval("select " + total, *range(1000)))


@case
async def prepared_statements(conn):
    st = await conn.prepare("select $1::int as a, $2::text as b, now()::date is null as c")
    print([(p.name, p.oid) for p in st.get_parameters()])
    print([(a.name, a.type.name) for a in st.get_attributes()])
    for i in range(8):
        print(tuple(await st.fetchrow(i, str(i))), st.get_statusmsg(), end=" ")
    print()
    print(await conn.fetchval("select count(*) from pg_prepared_statements"
                              " where statement not like '%pg_prepared%'"))
    # A statement deallocated behind the driver's back.
    st = await conn.prepare("select 'soon gone'")
    await conn.execute("deallocate all")
    await fails(st.fetchval())
    await conn.reload_schema_state()
    uncached = await connect(statement_cache_size=0)
    for i in range(7):
        print(await uncached.fetchval("select $1::int", i), end=" ")
    print(await uncached.fetchval("select count(*) from pg_prepared_statements"))
    await uncached.close()


@case
async def prepared_after_ddl(conn):
    await conn.execute("create table plan_t(a int); insert into plan_t values (1)")
    print(await conn.fetch("select * from plan_t"))
    other = await connect()
    await other.execute("alter table plan_t add b text default 'new'")
    await other.close()
    # Outside a transaction asyncpg prepares again by itself.
    print(await conn.fetch("select * from plan_t"))
    async with conn.transaction():
        await conn.execute("alter table plan_t drop b")
        await fails(conn.fetch("select * from plan_t"))


@case
async def executemany(conn):
    await conn.execute("create table em(a int primary key, b text, c bytea)")
    await conn.executemany("insert into em values ($1, $2, $3)",
                           [(i, f"row {i}" if i % 2 else None, bytes([i % 256])) for i in range(5000)])
    print(await conn.fetchrow("select count(*), count(b), sum(a) from em"))
    # An error in the middle of the pipeline undoes all of it.
    await fails(conn.executemany("insert into em(a) values ($1)",
                                 [(10000 + (i if i != 700 else 5),) for i in range(1500)]))
    print(await conn.fetchval("select count(*) from em"))
    big = "p" * 50000
    await conn.executemany("insert into em values ($1, $2)", [(20000 + i, big) for i in range(200)])
    print(await conn.fetchval("select sum(length(b)) from em where a >= 20000"))


UTC = dt.timezone.utc
VALUES = [
    ("bool", True), ("int2", -32768), ("int4", 2147483647), ("int8", -2**63),
    ("float4", 1.5), ("float8", 1e-300), ("float8", float("inf")), ("float8", float("nan")),
    ("numeric", decimal.Decimal("12345678901234567890.123456789")),
    ("numeric", decimal.Decimal("NaN")), ("numeric", decimal.Decimal("-0.000001")),
    ("text", "naïve 中文 🦀"), ("text", ""), ("varchar", "abcde"), ("char(5)", "ab   "),
    ("name", "a_name"), ("bytea", bytes(range(256))),
    ("date", dt.date(1999, 12, 31)), ("date", dt.date.max),
    ("time", dt.time(23, 59, 59, 999999)),
    ("timetz", dt.time(1, 2, 3, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30)))),
    ("timestamp", dt.datetime(2024, 2, 29, 12, 0, 0, 123456)),
    ("timestamptz", dt.datetime(2024, 2, 29, 12, tzinfo=UTC)),
    ("interval", dt.timedelta(days=-3, seconds=5, microseconds=7)),
    ("uuid", uuid.UUID("12345678-1234-5678-1234-567812345678")),
    ("inet", ipaddress.ip_interface("192.168.1.1/24")), ("inet", ipaddress.ip_address("::1")),
    ("cidr", ipaddress.ip_network("10.0.0.0/8")), ("macaddr", "08:00:2b:01:02:03"),
    ("json", '{"a": [1, null]}'), ("jsonb", '{"b": 1}'), ("xid", 5), ("oid", 4294967295),
    ("bit(4)", asyncpg.BitString("1010")), ("varbit", asyncpg.BitString("101")),
    ("point", asyncpg.Point(1, 2)), ("box", asyncpg.Box((1, 2), (0, 0))),
    ("path", asyncpg.Path((0, 0), (1, 1))), ("circle", asyncpg.Circle((0, 0), 5)),
    ("int4range", asyncpg.Range(1, 10)), ("int4range", asyncpg.Range(empty=True)),
    ("int4[]", [1, None, 3]), ("text[]", ["a,b", '"', "", None]), ("int8[]", []),
    ("int4[]", [[1, 2], [3, 4]]), ("timestamptz[]", [dt.datetime(2000, 1, 1, tzinfo=UTC)]),
    ("tsvector", "'a' 'b'"), ("pg_lsn", 0x16B3748), ("money", "$12.34"),
]


@case
async def types(conn):
    for name, value in VALUES:
        got = await conn.fetchval(f"select $1::{name}", value)
        if isinstance(got, asyncpg.Path):
            # Its repr is an address.
            got = got.is_closed, list(got)
        print(name, ascii(got), await conn.fetchval(f"select $1::{name}", None))


@case
async def user_types(conn):
    """Types asyncpg has to look up in the catalogues first."""
    await conn.execute("""create type mood as enum ('sad', 'ok', 'happy');
        create type pair as (a int, b text[]); create domain small as int check (value < 10);
        create table ut(m mood, p pair, s small, ps pair[])""")
    await conn.execute("insert into ut values ($1, $2, $3, $4)", "ok", (1, ["x", None]), 5,
                       [(2, []), None])
    print(await conn.fetch("select * from ut"))
    await fails(conn.execute("insert into ut(s) values ($1)", 99))
    await fails(conn.execute("insert into ut(m) values ($1)", "unknown"))
    await conn.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
    print(await conn.fetchval("select $1::jsonb", {"a": [1, None]}))
    await conn.set_type_codec("numeric", encoder=str, decoder=str, schema="pg_catalog", format="text")
    print(await conn.fetchval("select $1::numeric * 2", "1.25"))


@case
async def settings(conn):
    await conn.execute("set time zone 'Asia/Kolkata'")
    print(conn.get_settings().TimeZone,
          await conn.fetchval("select '2024-07-01 12:00:00+00'::timestamptz::text"),
          await conn.fetchval("select '2024-07-01 12:00:00+00'::timestamptz"))
    async with conn.transaction():
        await conn.execute("set local application_name to 'local'")
        print(conn.get_settings().application_name)
    print(repr(conn.get_settings().application_name))
    await conn.execute("set client_encoding to latin1")
    print(conn.get_settings().client_encoding, ascii(await conn.fetchval("select chr(233)")))
    await fails(conn.fetchval("select chr(8364)"))
    await conn.execute("reset client_encoding")
    await fails(conn.execute("set work_mem to 'nope'"))
    await conn.execute("set work_mem to '5MB'; listen c")
    # The driver's own reset between two users of a pool.
    await conn.reset()
    print(await conn.fetchval("show work_mem") == "5MB", conn.get_settings().TimeZone != "Asia/Kolkata")
    await conn.execute("discard all")
    print(await conn.execute("select 'usable'"))


@case
async def large_values(conn):
    blob = bytes(i * 7 % 251 for i in range(1 << 20))
    got = await conn.fetchval("select $1::bytea", blob)
    print(len(got), got == blob, md5(got))
    text = "z" * (2 << 20)
    print(await conn.fetchval(f"select md5('{text}')"), await conn.execute(f"select '{text}'"))
    print(md5(await conn.fetchval("select repeat('abcdefgh', 2000000)")))
    rows = await conn.fetch("select $1::bytea from generate_series(1, 10)", blob)
    print(len(rows), {md5(r[0]) for r in rows})


@case
async def large_result(conn):
    rows = await conn.fetch("select i, md5(i::text) from generate_series(1, 200000) i")
    digest = hashlib.md5()
    for a, b in rows:
        digest.update(f"{a}{b}".encode())
    print(len(rows), digest.hexdigest())


@case
async def copy(conn):
    await conn.execute("create table copy_t(a int primary key, b text, c numeric)")
    print(await conn.copy_records_to_table(
        "copy_t", schema_name=SCHEMA,
        records=[(i, None if i % 3 == 0 else f"x{i}", decimal.Decimal(i) / 4) for i in range(20000)]))

    async def source(chunks, fail=None):
        for chunk in chunks:
            yield chunk
        if fail:
            raise fail
    print(await conn.copy_to_table("copy_t", source=source([b"100000,x,1\n", b"100001,\"y,\",2\n"]),
                                   format="csv"))
    for kw in ({}, {"format": "csv", "header": True}, {"format": "binary"}):
        digest = hashlib.md5()

        async def sink(data):
            digest.update(data)
        print(await conn.copy_from_query("select * from copy_t where a < $1 order by a", 1000000,
                                         output=sink, **kw), digest.hexdigest())
    print(await conn.copy_from_table("copy_t", output=os.devnull, columns=["a"]))
    await fails(conn.copy_to_table("copy_t", source=source([b"1000\tx\t1\n", b"oops\n"])))
    await fails(conn.copy_to_table("copy_t", source=source([b"500000\tx\t1\n", b"oops\ty\t1\n"] +
                                                           [b"9\tz\t1\n" * 10000] * 20)))
    await fails(conn.copy_records_to_table("copy_t", records=[(1, "x", None)]))
    await fails(conn.copy_from_query("select 1/0", output=os.devnull))
    try:
        await conn.copy_to_table("copy_t", source=source([b"600000\tx\t1\n"] * 2, ValueError("gave up")))
    except ValueError as exc:
        print("client error", exc)

    async def bad_sink(data):
        raise ValueError("sink gave up")
    try:
        await conn.copy_from_query("select generate_series(1, 100000)", output=bad_sink)
    except ValueError as exc:
        print("client error", exc)
    print(await conn.fetchrow("select count(*), max(a) from copy_t"), conn.is_in_transaction())


@case
async def cursors(conn):
    async with conn.transaction():
        total = 0
        async for record in conn.cursor("select generate_series(1, $1::int)", 1000, prefetch=50):
            total += record[0]
        print(total)
        cur = await conn.cursor("select i from generate_series(1, 100) i")
        print(await cur.fetch(3), await cur.forward(10), await cur.fetchrow())
        # Two portals, in turns.
        one = await conn.cursor("select 'one', generate_series(1, 9)")
        two = await conn.cursor("select 'two', generate_series(1, 9)")
        for _ in range(3):
            print(await one.fetchrow(), await two.fetch(2))
        await conn.execute("declare held cursor with hold for select generate_series(1, 10)")
        print(await conn.fetch("fetch 2 from held"))
    print(await conn.fetch("fetch 2 from held"), await conn.execute("close held"))
    await fails(conn.fetch("fetch 1 from held"))


@case
async def transactions(conn):
    await conn.execute("create table tx_t(a int)")
    async with conn.transaction():
        await conn.execute("insert into tx_t values (1)")
        try:
            async with conn.transaction():
                await conn.execute("insert into tx_t values (2)")
                await conn.execute("select 1/0")
        except asyncpg.DivisionByZeroError:
            print("savepoint rolled back", conn.is_in_transaction())
        async with conn.transaction():
            await conn.execute("insert into tx_t values (3)")
    print(await conn.fetchval("select array_agg(a order by a) from tx_t"))
    tr = conn.transaction()
    await tr.start()
    await fails(conn.execute("select no_such"))
    await fails(conn.execute("select 1"))
    await tr.rollback()
    for level in ("read_committed", "repeatable_read", "serializable"):
        async with conn.transaction(isolation=level, readonly=True, deferrable=level == "serializable"):
            print(await conn.fetchrow("select current_setting('transaction_isolation'),"
                                      " current_setting('transaction_read_only'),"
                                      " current_setting('transaction_deferrable')"))
            await fails(conn.execute("insert into tx_t values (9)"))
    other = await connect()
    tr = conn.transaction(isolation="repeatable_read")
    await tr.start()
    await conn.fetch("select * from tx_t")
    await other.execute("update tx_t set a = a + 100")
    await fails(conn.execute("update tx_t set a = a + 1"))
    await tr.rollback()
    await other.close()


@case
async def two_phase_commit(conn):
    if await conn.fetchval("show max_prepared_transactions") == "0":
        print("skipped: max_prepared_transactions is 0")
        return
    await conn.execute("create table tpc_t(a int)")
    for action in ("commit", "rollback"):
        other = await connect()
        await other.execute("begin; insert into tpc_t values (1)")
        print(await other.execute(f"prepare transaction 'drv_asyncpg_{action}'"), other.is_in_transaction())
        await other.close()
        print(await conn.execute(f"{action} prepared 'drv_asyncpg_{action}'"))
        print(await conn.fetchval("select count(*) from tpc_t"))
    await fails(conn.execute("commit prepared 'drv_asyncpg_missing'"))


@case
async def errors(conn):
    await conn.execute("""create table err_t(id int primary key, b text not null, c int check (c > 0));
        insert into err_t values (1, 'x', 1);
        create function err_raise() returns void language plpgsql as $$ begin
          raise exception 'custom %', 7 using errcode = 'HF001', detail = 'some detail',
            hint = 'some hint', column = 'col', constraint = 'cons', datatype = 'typ',
            table = 'tab', schema = 'sch'; end $$""")
    for query in ("insert into err_t values (1, 'y', 2)", "insert into err_t values (2, null, 2)",
                  "insert into err_t values (2, 'y', -1)", "select err_raise()", "selct",
                  "select no_such from err_t", "select 'x", "select 1/0", "select 'a'::int"):
        print("--", query)
        await fails(conn.execute(query))
        await fails(conn.fetch(query))
    await fails(conn.fetch("select 1/$1::int", 0))
    print(await conn.fetchval("select 'usable'"))


@case
async def notices(conn):
    arrived = asyncio.Queue()
    conn.add_log_listener(lambda _, msg: arrived.put_nowait(msg))
    await conn.execute("do $$ begin raise notice 'one'; raise warning 'two' using hint = 'h'; end $$")
    await conn.fetch("select set_config('client_min_messages', 'debug1', false)")
    await conn.execute("do $$ begin raise debug 'three'; end $$")
    for _ in range(3):
        show_error(await asyncio.wait_for(arrived.get(), 5), "notice")


@case
async def listen_notify(conn):
    arrived = asyncio.Queue()
    await conn.add_listener("drv_chan", lambda c, pid, chan, text: arrived.put_nowait((chan, text)))
    await conn.add_listener("Drv Other", lambda c, pid, chan, text: arrived.put_nowait((chan, text)))
    other = await connect()
    await other.execute("notify drv_chan")
    await other.execute("select pg_notify('drv_chan', $1)", "long " * 1500)
    async with other.transaction():
        await other.execute("notify drv_chan, 'same'")
        await other.execute("notify drv_chan, 'same'")
    await other.execute("notify \"Drv Other\", 'stop'")
    await other.close()
    # The session is idle meanwhile, so these come unasked for.
    while True:
        chan, text = await asyncio.wait_for(arrived.get(), 5)
        print(chan, len(text), md5(text))
        if text == "stop":
            break
    await conn.execute("notify drv_chan, 'to myself'")
    print(await asyncio.wait_for(arrived.get(), 5))
    await conn.reset()
    print(await conn.fetchval("select count(*) from pg_listening_channels()"))


@case
async def cancel(conn):
    for query, args in (("select pg_sleep(30)", ()), ("select pg_sleep($1)", (30,))):
        try:
            await conn.fetch(query, *args, timeout=0.3)
        except asyncio.TimeoutError:
            print("timed out")
        # The driver has sent a CancelRequest and waits for its effect here.
        print(await conn.fetchval("select 'usable'"))
    task = asyncio.create_task(conn.execute("select pg_sleep(30)"))
    await asyncio.sleep(0.3)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        print("cancelled")
    print(await conn.fetchval("select 'usable'"))
    # From another session, so that the error itself is seen.
    pid = await conn.fetchval("select pg_backend_pid()")
    other = await connect()

    async def canceller():
        while True:
            await asyncio.sleep(0.3)
            await other.execute("select pg_cancel_backend($1)", pid)
    task = asyncio.create_task(canceller())
    await fails(conn.execute("select pg_sleep(30)"))
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass
    print(await conn.fetchval("select 'usable'"))
    async with conn.transaction():
        try:
            async with conn.transaction():
                await conn.fetch("select pg_sleep(30)", timeout=0.3)
        except asyncio.TimeoutError:
            print("timed out in a savepoint")
        print(await conn.fetchval("select 'transaction goes on'"))
    await other.close()


@case
async def timeouts(conn):
    await conn.execute("set statement_timeout to '200ms'")
    await fails(conn.execute("select pg_sleep(30)"))
    await fails(conn.fetch("select pg_sleep(30)"))
    await conn.execute("reset statement_timeout")
    print(await conn.fetchval("select 'usable' from pg_sleep(0.25)"))


@case
async def locks_and_temp_tables(conn):
    other = await connect()
    print(await conn.fetchval("select pg_try_advisory_lock(770011)"),
          await other.fetchval("select pg_try_advisory_lock(770011)"))
    await conn.execute("create temp table mine(a int)")
    await fails(other.fetch("select * from mine"))
    await other.close()
    await conn.reset()
    print(await conn.fetchval("select count(*) from pg_locks where locktype = 'advisory'"
                              " and pid = pg_backend_pid()"))


@case
async def pool(conn):
    async with asyncpg.create_pool(min_size=3, max_size=5, timeout=10,
                                   server_settings={"search_path": SCHEMA}) as pool:
        async def work(i):
            async with pool.acquire(timeout=10) as c:
                await c.execute("set work_mem to '3MB'")
                return await c.fetchval("select $1::int * 2", i)
        print(await asyncio.gather(*(work(i) for i in range(60))))
        async with pool.acquire() as c:
            print(await c.fetchval("show work_mem") == "3MB")


@case
async def closing(conn):
    count = "select count(*) from pg_stat_activity where application_name = $1"
    for how in ("close", "terminate"):
        name = "drv_asyncpg_" + how
        other = await connect(server_settings={"application_name": name})
        await other.execute("begin; create table never_kept(a int)")
        print(await conn.fetchval(count, name))
        if how == "close":
            await other.close(timeout=5)
        else:
            other.terminate()
        # The server notices a moment later.
        for _ in range(100):
            if await conn.fetchval(count, name) == 0:
                print("session gone")
                break
            await asyncio.sleep(0.05)
        print(other.is_closed(), await conn.fetchval("select to_regclass('never_kept')"))


async def clean(create=False):
    conn = await asyncpg.connect(timeout=10)
    for row in await conn.fetch("select gid from pg_prepared_xacts where database ="
                                " current_database() and gid like 'drv_asyncpg%'"):
        await conn.execute(f"rollback prepared '{row[0]}'")
    await conn.execute("set client_min_messages to warning")
    await conn.execute(f"drop schema if exists {SCHEMA} cascade")
    if create:
        await conn.execute(f"create schema {SCHEMA}")
    await conn.close(timeout=5)


async def run():
    await clean(create=True)
    failed = 0
    for fn in CASES:
        if sys.argv[1:] and fn.__name__ not in sys.argv[1:]:
            continue
        print(f"case: {fn.__name__}", flush=True)
        conn = None
        try:
            conn = await connect()
            await asyncio.wait_for(fn(conn), CASE_SECONDS)
        except Exception as exc:
            failed += 1
            print("unexpected", type(exc).__name__, getattr(exc, "sqlstate", None))
            traceback.print_exc(file=sys.stderr)
        finally:
            if conn is not None and not conn.is_closed():
                try:
                    await conn.close(timeout=5)
                except Exception as exc:
                    failed += 1
                    print("unexpected at close", type(exc).__name__)
    await clean()
    print("done, unexpected failures:", failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(asyncio.wait_for(run(), 60)))
