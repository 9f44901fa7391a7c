#!/usr/bin/python3
"""Conformance program for psycopg 3 (libpq); see README.md for the contract.

Everything printed must be a fact of the protocol conversation that does not
change between two runs: no pids, clock readings, object OIDs or addresses.
"""

import datetime as dt
import decimal
import hashlib
import ipaddress
import os
import re
import signal
import sys
import threading
import traceback
import uuid

import psycopg
from psycopg import IsolationLevel, pq, sql
from psycopg.rows import dict_row
from psycopg.types.json import Json, Jsonb
from psycopg.types.range import Range

SCHEMA = "drv_psycopg"
CASE_SECONDS = 20
CASES = []


def case(fn):
    CASES.append(fn)
    return fn


def md5(data):
    if isinstance(data, str):
        data = data.encode()
    return hashlib.md5(data).hexdigest()


def connect(**kw):
    kw.setdefault("autocommit", True)
    kw.setdefault("connect_timeout", 10)
    conn = psycopg.connect(**kw)
    conn.execute(f"set search_path to {SCHEMA}, public")
    return conn


DIAG_FIELDS = (
    "severity", "severity_nonlocalized", "sqlstate", "message_primary",
    "message_detail", "message_hint", "statement_position",
    "internal_position", "internal_query", "context", "schema_name",
    "table_name", "column_name", "datatype_name", "constraint_name",
    "source_file", "source_line", "source_function",
)


def show_diag(label, diag):
    print(label)
    for field in DIAG_FIELDS:
        value = getattr(diag, field)
        if value is not None:
            print(f"  {field}: {value}")


def show_error(exc):
    show_diag(f"error {type(exc).__name__} {exc.sqlstate}", exc.diag)


def fails(fn, *args, **kw):
    """Run a call that must fail, and print every field of its error."""
    try:
        fn(*args, **kw)
    except psycopg.Error as exc:
        show_error(exc)
    else:
        print("no error, though one was expected")


def status(conn):
    return conn.info.transaction_status.name


@case
def startup_parameters(conn):
    for name in ("server_version", "server_encoding", "client_encoding",
                 "application_name", "is_superuser", "session_authorization",
                 "DateStyle", "IntervalStyle", "TimeZone",
                 "integer_datetimes", "standard_conforming_strings",
                 "default_transaction_read_only", "in_hot_standby"):
        print(name, "=", conn.info.parameter_status(name))
    print("protocol", conn.pgconn.protocol_version)
    print("status", conn.info.status.name, status(conn))
    # The cancel key itself is secret and random; that there is one is not.
    print("has backend key", conn.info.backend_pid > 0)


@case
def startup_options(conn):
    with connect(application_name="drv psycopg é",
                 options="-c statement_timeout=12345 -c geqo=off"
                         " -c DateStyle=German,\\ DMY"
                         " --work_mem=7MB") as other:
        print(repr(other.info.parameter_status("application_name")))
        for name in ("application_name", "statement_timeout", "geqo", "work_mem", "DateStyle"):
            print(name, other.execute(f"show {name}").fetchone())
        other.execute("reset all")
        for name in ("application_name", "statement_timeout", "DateStyle"):
            print("after reset all:", name, other.execute(f"show {name}").fetchone())
    with connect(client_encoding="LATIN1") as other:
        print(other.info.encoding, other.info.parameter_status("client_encoding"))


def connect_failure(**kw):
    try:
        psycopg.connect(connect_timeout=10, **kw).close()
    except psycopg.OperationalError as exc:
        # libpq puts the address into the text, and repeats the message when
        # it tries both with and without TLS, so only distinct tails are kept.
        for text in sorted(set(re.findall(r"(?:FATAL|ERROR): .*", str(exc)))):
            print(text)
    else:
        print("connected, though a failure was expected")


@case
def startup_failures(conn):
    connect_failure(dbname="drv_no_such_database")
    connect_failure(options="-c no_such_setting=1")
    connect_failure(options="-c work_mem=banana")
    if os.environ.get("PGPASSWORD"):
        connect_failure(password="drv-wrong-password")
        connect_failure(user="drv_no_such_user", password="x")


@case
def simple_query(conn):
    """Multi-statement strings, empty ones, and an error in the middle."""
    def raw(query):
        conn.pgconn.send_query(query.encode())
        while (res := conn.pgconn.get_result()) is not None:
            line = [pq.ExecStatus(res.status).name, res.command_status]
            if res.ntuples:
                line.append([[res.get_value(r, c) for c in range(res.nfields)]
                             for r in range(res.ntuples)])
            if res.status == pq.ExecStatus.FATAL_ERROR:
                line.append(res.error_field(pq.DiagnosticField.SQLSTATE))
            print(*line)
        print("then", pq.TransactionStatus(conn.pgconn.transaction_status).name)

    raw("")
    raw("   ;; -- nothing but a comment\n ; ")
    raw("select 1; select 'two', null; create temp table q(a int);"
        " insert into q values (1), (2); update q set a = a + 1;"
        " select * from q order by a; delete from q; drop table q")
    raw("create temp table q(a int); insert into q values (1); select 1/0;"
        " insert into q values (2)")
    # The implicit transaction took the table away with it.
    raw("select to_regclass('q')")
    raw("begin; select 1; select 1/0; select 2")
    raw("select 3")
    raw("rollback; select 4")
    raw("begin; select 5; commit; select 6")
    raw("select from generate_series(1, 3)")


@case
def extended_query(conn):
    cur = conn.execute("select %s::int + %s::int, %s::text", (2, 3, "x"))
    print(cur.fetchall(), cur.statusmessage, cur.rowcount)
    print([(c.name, c.type_code, c.internal_size, c.precision, c.scale)
           for c in conn.execute(
               "select 1::int2 a, 1.5::numeric(7,2) b, 'x'::varchar(9) c,"
               " now() d, %s::bytea e", (b"",)).description])
    cur = conn.cursor(row_factory=dict_row)
    print(cur.execute("select %(a)s::int a, %(b)s::text b", {"a": 1, "b": None}).fetchone())
    print(conn.execute("", prepare=False).statusmessage)
    res = conn.pgconn.exec_params(b"", [])
    print(pq.ExecStatus(res.status).name)
    cur = conn.execute("select %s::text from generate_series(1, 0)", ("none",))
    print(cur.rowcount, cur.fetchall())
    fails(conn.execute, "select %s::int; select 2", (1,))
    print(conn.execute("select %s", ("untyped",)).fetchone())
    # A thousand parameters make one long Bind.
    query = "select " + " + ".join(["%s::int8"] * 1000)
    print(conn.execute(query, list(range(1000))).fetchone())


@case
def prepared_statements(conn):
    for i in range(12):
        row = conn.execute("select %s::int * 2", (i,), prepare=True).fetchone()
        print(row[0], end=" ")
    print()
    listing = "select name, statement, parameter_types::text, from_sql" \
              " from pg_prepared_statements order by name"
    print(conn.execute(listing, prepare=False).fetchall())
    # By default psycopg prepares on the sixth use.
    for i in range(8):
        conn.execute("select %s::text || 'x'", (str(i),))
    print([r[0] for r in conn.execute(listing, prepare=False)])
    conn.execute("deallocate all")
    print(conn.execute(listing, prepare=False).fetchall())

    raw = conn.pgconn
    print(pq.ExecStatus(raw.prepare(b"st one", b"select $1::int, $2", [0, 25]).status).name)
    res = raw.describe_prepared(b"st one")
    print([res.param_type(i) for i in range(res.nparams)],
          [(res.fname(i), res.ftype(i)) for i in range(res.nfields)])
    for i in range(7):
        res = raw.exec_prepared(b"st one", [str(i).encode(), None], None, i % 2)
        print(res.get_value(0, 0), res.get_value(0, 1), res.fformat(0))
    for result in (raw.prepare(b"st one", b"select 1"),
                   raw.exec_prepared(b"missing", []),
                   raw.describe_prepared(b"missing"),
                   raw.describe_portal(b"missing"),
                   raw.exec_prepared(b"st one", [b"1"]),
                   raw.prepare(b"bad", b"selct 1")):
        print(result.error_field(pq.DiagnosticField.SQLSTATE),
              result.error_field(pq.DiagnosticField.MESSAGE_PRIMARY))
    conn.execute("prepare by_sql(int) as select $1 + 1")
    print(conn.execute("execute by_sql(41)").fetchone())
    print(raw.exec_prepared(b"by_sql", [b"1"]).get_value(0, 0))
    print(conn.execute('deallocate "st one"').statusmessage)
    fails(conn.execute, 'execute "st one"(1, 2)')


@case
def prepared_after_ddl(conn):
    """A cached plan whose result type changes fails once with 0A000."""
    conn.execute("create table plan_t(a int)")
    conn.execute("insert into plan_t values (1)")
    raw = conn.pgconn
    raw.prepare(b"p", b"select * from plan_t")
    print(raw.exec_prepared(b"p", []).get_value(0, 0))
    conn.execute("alter table plan_t alter a type text")
    res = raw.exec_prepared(b"p", [])
    print(res.error_field(pq.DiagnosticField.SQLSTATE),
          res.error_field(pq.DiagnosticField.MESSAGE_PRIMARY))
    conn.execute("drop table plan_t")


@case
def pipeline(conn):
    with conn.pipeline() as pipe:
        curs = [conn.execute("select %s::int", (i,)) for i in range(50)]
        pipe.sync()
        print(sum(c.fetchone()[0] for c in curs))
        cur = conn.execute("select 'after sync'")
        print(cur.fetchone())


@case
def pipeline_error(conn):
    conn.execute("create table pipe_t(a int primary key)")
    try:
        with conn.pipeline():
            conn.execute("insert into pipe_t values (1)")
            conn.execute("insert into pipe_t values (1)")
            conn.execute("insert into pipe_t values (2)")
    except psycopg.Error as exc:
        show_error(exc)
    # All three shared one implicit transaction, ended by one Sync.
    print(conn.execute("select count(*) from pipe_t").fetchone(), status(conn))
    with conn.pipeline() as pipe:
        conn.execute("insert into pipe_t values (10)")
        pipe.sync()
        bad = None
        try:
            conn.execute("insert into pipe_t values (10)")
            pipe.sync()
        except psycopg.Error as exc:
            bad = exc.sqlstate
        print("second segment", bad)
        conn.execute("insert into pipe_t values (11)")
        pipe.sync()
    print(conn.execute("select array_agg(a order by a) from pipe_t").fetchone())


@case
def pipeline_aborted_results(conn):
    """The raw libpq view: what each queued query answers after an error."""
    raw = conn.pgconn
    raw.enter_pipeline_mode()
    raw.send_query_params(b"select 1", [])
    raw.send_query_params(b"select 1/0", [])
    raw.send_query_params(b"select 2", [])
    raw.send_prepare(b"never", b"select 3")
    raw.pipeline_sync()
    raw.send_query_params(b"select 4", [])
    raw.send_flush_request()
    raw.send_describe_prepared(b"never")
    raw.pipeline_sync()
    raw.pipeline_sync()
    raw.flush()
    syncs = 0
    while syncs < 3:
        res = raw.get_result()
        if res is None:
            print("-")
            continue
        print(pq.ExecStatus(res.status).name, res.command_status,
              res.error_field(pq.DiagnosticField.SQLSTATE))
        syncs += res.status == pq.ExecStatus.PIPELINE_SYNC
    raw.exit_pipeline_mode()
    print(conn.execute("select 'usable'").fetchone())


@case
def pipeline_large(conn):
    """Many queries with big parameters, so both directions must flow at once."""
    blob = "y" * 20000
    with conn.pipeline():
        curs = [conn.execute("select %s::text || %s::text", (i, blob)) for i in range(300)]
        digest = hashlib.md5()
        for cur in curs:
            digest.update(cur.fetchone()[0].encode())
    print(digest.hexdigest())


@case
def executemany_returning(conn):
    conn.execute("create temp table em(a int, b text)")
    with conn.cursor() as cur:
        cur.executemany("insert into em values (%s, %s) returning a",
                        [(i, str(i)) for i in range(20)], returning=True)
        got = [cur.fetchone()[0]]
        while cur.nextset():
            got.append(cur.fetchone()[0])
        print(got)
        cur.executemany("insert into em values (%s, %s)", [(i, None) for i in range(500)])
        print(cur.rowcount)
    print(conn.execute("select count(*), count(b), sum(a) from em").fetchone())


UTC = dt.timezone.utc
VALUES = [
    ("bool", True), ("int2", -32768), ("int4", 2147483647), ("int8", -2**63),
    ("float4", 1.5), ("float8", 1e-300), ("float8", float("inf")), ("float8", float("nan")),
    ("numeric", decimal.Decimal("12345678901234567890.123456789")),
    ("numeric", decimal.Decimal("NaN")), ("numeric", decimal.Decimal("-0.000001")),
    ("text", "naïve 中文 🦀 'quoted' \\ \n"), ("text", ""), ("varchar(5)", "abcde"),
    ("char(5)", "ab"), ("name", "a_name"), ('"char"', "x"),
    ("bytea", bytes(range(256))), ("bytea", b""),
    ("date", dt.date(1999, 12, 31)), ("date", dt.date(1, 1, 1)),
    ("time", dt.time(23, 59, 59, 999999)),
    ("timetz", dt.time(1, 2, 3, tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30)))),
    ("timestamp", dt.datetime(2024, 2, 29, 12, 0, 0, 123456)),
    ("timestamptz", dt.datetime(2024, 2, 29, 12, tzinfo=UTC)),
    ("interval", dt.timedelta(days=-3, seconds=5, microseconds=7)),
    ("uuid", uuid.UUID("12345678-1234-5678-1234-567812345678")),
    ("inet", ipaddress.ip_interface("192.168.1.1/24")), ("inet", ipaddress.ip_address("::1")),
    ("cidr", ipaddress.ip_network("10.0.0.0/8")),
    ("json", Json({"a": [1, None, "x"]})), ("jsonb", Jsonb({"b": 1, "a": {"ü": True}})),
    ("int4range", Range(1, 10)), ("numrange", Range(None, decimal.Decimal("1.5"), "(]")),
    ("int4[]", [1, None, 3]), ("text[]", ["a,b", '"', "", None]), ("int8[]", []),
    ("int4[]", [[1, 2], [3, 4]]), ("bytea[]", [b"\x00", b"\xff"]),
    ("timestamptz[]", [dt.datetime(2000, 1, 1, tzinfo=UTC)]),
]


@case
def types_text_and_binary(conn):
    conn.execute("set time zone 'UTC'")
    for type_name, value in VALUES:
        for param in ("%t", "%b"):
            for binary in (False, True):
                try:
                    cur = conn.execute(f"select {param}::{type_name}", (value,), binary=binary)
                    got = cur.fetchone()[0]
                    print(type_name, param, binary, ascii(got))
                except psycopg.Error as exc:
                    print(type_name, param, binary, type(exc).__name__, exc.sqlstate)
    nulls = [t for t, _ in VALUES]
    row = conn.execute("select " + ", ".join(f"%s::{t}" for t in nulls),
                       [None] * len(nulls)).fetchone()
    print("nulls", len(row), set(row))


@case
def types_text_only(conn):
    """Types psycopg does not know come as text, which checks the raw bytes."""
    for expr in ("'(1,2)'::point", "'<(0,0),5>'::circle", "B'1010'::bit(4)",
                 "'08:00:2b:01:02:03'::macaddr", "'a:1 b:2'::tsvector", "'a & b'::tsquery",
                 "'{[1,3),[5,7)}'::int4multirange", "row(1, 'x', null)",
                 "'1 year 2 mons 3 days'::interval", "'infinity'::timestamptz::text",
                 "'0/16B3748'::pg_lsn", "'pg_class'::regclass", "'$.a'::jsonpath",
                 "interval '1 day'", "'12.34'::money::numeric"):
        print(expr, ascii(conn.execute(f"select {expr}").fetchone()[0]))


@case
def time_zones(conn):
    conn.execute("create temp table tz(t timestamptz)")
    conn.execute("insert into tz values ('2024-07-01 12:00:00+00')")
    for zone in ("UTC", "America/New_York", "Asia/Kolkata"):
        conn.execute(sql.SQL("set time zone {}").format(zone))
        print(conn.info.parameter_status("TimeZone"),
              conn.execute("select t::text from tz").fetchone()[0],
              conn.execute("select t from tz").fetchone()[0].isoformat(),
              conn.execute("select t from tz", binary=True).fetchone()[0].isoformat())
    conn.execute("set datestyle to 'German, DMY'")
    print(conn.info.parameter_status("DateStyle"),
          conn.execute("select t::text from tz").fetchone()[0])
    conn.execute("begin; set local time zone 'Asia/Tokyo'")
    print(conn.info.parameter_status("TimeZone"))
    conn.execute("rollback")
    print(conn.info.parameter_status("TimeZone"))


@case
def set_reset_show(conn):
    conn.execute("set application_name to 'first'")
    print(conn.info.parameter_status("application_name"))
    conn.execute("begin")
    conn.execute("set application_name to 'second'")
    print(conn.info.parameter_status("application_name"))
    conn.execute("rollback")
    print(conn.info.parameter_status("application_name"))
    conn.execute("reset application_name")
    print(repr(conn.info.parameter_status("application_name")))
    conn.execute("set work_mem to '5MB'")
    print(conn.execute("show work_mem").fetchone())
    conn.execute("set my.custom to 'kept'")
    print(conn.execute("select current_setting('my.custom')").fetchone())
    print(conn.execute("select set_config('my.custom', 'new', false)").fetchone())
    conn.execute("reset all")
    print(conn.execute("select current_setting('my.custom', true)").fetchone())
    fails(conn.execute, "set work_mem to 'nope'")
    fails(conn.execute, "show no_such_setting")
    conn.execute("set standard_conforming_strings to off")
    print(conn.info.parameter_status("standard_conforming_strings"))
    conn.execute("set intervalstyle to 'iso_8601'")
    print(conn.info.parameter_status("IntervalStyle"),
          conn.execute("select '1 day 2 hours'::interval::text").fetchone())


@case
def discard_all(conn):
    conn.execute("create temp table gone(a int)")
    conn.execute("prepare gone_st as select 1")
    conn.execute("declare gone_cur cursor with hold for select 1")
    conn.execute("listen gone_chan")
    conn.execute("select pg_advisory_lock(770001)")
    conn.execute("set work_mem to '9MB'")
    conn.execute("set application_name to 'gone'")
    count = """select to_regclass('gone') is not null,
        (select count(*) from pg_prepared_statements),
        (select count(*) from pg_cursors),
        (select count(*) from pg_listening_channels()),
        (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
        current_setting('work_mem'), current_setting('application_name')"""
    # Without prepare=False psycopg might hold a statement DISCARD ALL removes.
    print(conn.execute(count, prepare=False).fetchone())
    print(conn.execute("discard all").statusmessage)
    print(conn.execute(count, prepare=False).fetchone())
    conn.execute("begin")
    fails(conn.execute, "discard all")
    conn.execute("rollback")


@case
def encodings(conn):
    conn.execute("set client_encoding to latin1")
    print(conn.info.encoding, conn.info.parameter_status("client_encoding"))
    cur = conn.execute("select %s::text, length(%s::text), octet_length(%s::text)", ("é",) * 3)
    print(ascii(cur.fetchone()))
    res = conn.pgconn.exec_(b"select '\xe9t\xe9'")
    print(res.get_value(0, 0))
    fails(conn.execute, "select chr(8364)")
    res = conn.pgconn.exec_(b"select 1 as \xe9")
    print(res.fname(0))
    res = conn.pgconn.exec_(b"select \"no\xe9such\"")
    print(res.error_field(pq.DiagnosticField.MESSAGE_PRIMARY))
    conn.execute("set client_encoding to utf8")
    res = conn.pgconn.exec_(b"select '\xff\xfe'")
    print(res.error_field(pq.DiagnosticField.SQLSTATE),
          res.error_field(pq.DiagnosticField.MESSAGE_PRIMARY))
    conn.execute("set client_encoding to sql_ascii")
    print(conn.info.parameter_status("client_encoding"),
          conn.pgconn.exec_(b"select '\xff'").get_value(0, 0))


@case
def large_values(conn):
    blob = bytes(i * 7 % 251 for i in range(1 << 20))
    for fmt in ("%t", "%b"):
        for binary in (False, True):
            got = conn.execute(f"select {fmt}::bytea, length({fmt}::bytea)", (blob, blob),
                               binary=binary).fetchone()
            print(fmt, binary, got[1], md5(got[0]) == md5(blob), md5(got[0]))
    text = "z" * (2 << 20)
    print(conn.execute(f"select length('{text}'), md5('{text}')").fetchone())
    got = conn.execute("select repeat('abcdefgh', 2000000)").fetchone()[0]
    print(len(got), md5(got))
    # One wide row: the largest column count a target list can have.
    row = conn.execute("select " + ", ".join(f"{i} as c{i}" for i in range(1600))).fetchone()
    print(len(row), sum(row))


@case
def large_result(conn):
    # The driver decodes in Python, so its row objects are left out of the
    # biggest result, and libpq's buffers read instead.
    res = conn.pgconn.exec_(b"select md5(i::text) from generate_series(1, 200000) i")
    digest = hashlib.md5()
    for i in range(res.ntuples):
        digest.update(res.get_value(i, 0))
    print(res.ntuples, digest.hexdigest())
    query = "select i, md5(i::text) from generate_series(1, 20000) i"
    # The third is single-row mode, which never holds the whole result.
    for rows in (conn.execute(query), conn.execute(query, binary=True), conn.cursor().stream(query)):
        digest, count = hashlib.md5(), 0
        for a, b in rows:
            digest.update(f"{a}{b}".encode())
            count += 1
        print(count, digest.hexdigest())


@case
def copy_in(conn):
    conn.execute("create table copy_t(a int primary key, b text, c numeric)")
    cur = conn.cursor()
    with cur.copy("copy copy_t from stdin") as copy:
        for i in range(20000):
            copy.write_row((i, None if i % 3 == 0 else f"tab\there {i}", decimal.Decimal(i) / 4))
    print(cur.rowcount, cur.statusmessage)
    with cur.copy("copy copy_t (a, b) from stdin with (format csv, header)") as copy:
        copy.write("a,b\n100000,\"x,\"\"y\"\"\"\n100001,\n")
    print(cur.statusmessage)
    with cur.copy("copy copy_t (a, b, c) from stdin (format binary)") as copy:
        copy.set_types(["int4", "text", "numeric"])
        for i in range(200000, 200100):
            copy.write_row((i, "binary", decimal.Decimal("0.5")))
    print(cur.statusmessage)
    print(conn.execute("select count(*), count(b), sum(c), md5(string_agg(b, '' order by a))"
                       " from copy_t").fetchone())


@case
def copy_out(conn):
    cur = conn.cursor()
    for query in ("copy (select a, b, c from copy_t order by a) to stdout",
                  "copy (select a, b, c from copy_t order by a) to stdout (format csv, header)",
                  "copy (select a, b, c from copy_t order by a) to stdout (format binary)",
                  "copy (select 1 where false) to stdout"):
        digest, size = hashlib.md5(), 0
        with cur.copy(query) as copy:
            for data in copy:
                digest.update(data)
                size += len(data)
        print(size, digest.hexdigest(), cur.statusmessage)
    with cur.copy("copy (select a, b from copy_t where a < 4 order by a) to stdout") as copy:
        copy.set_types(["int4", "text"])
        print(list(copy.rows()))


@case
def copy_failures(conn):
    cur = conn.cursor()

    def copy(query, *chunks, fail=None):
        with cur.copy(query) as cp:
            for chunk in chunks:
                cp.write(chunk)
            if fail:
                raise fail

    # The server finds the bad row.
    fails(copy, "copy copy_t from stdin", "900001\tx\t1\n", "oops\ty\t2\n", "900002\tz\t3\n" * 5000)
    fails(copy, "copy copy_t from stdin", "900003\tx\t1\n900003\ty\t2\n")
    fails(copy, "copy copy_t from stdin", "900004\n")
    fails(copy, "copy copy_t from stdin (format binary)", b"not the signature")
    fails(copy, "copy no_such_table from stdin", "1\n")
    fails(copy, "copy (select 1/0) to stdout")
    # The client gives up, which sends CopyFail.
    try:
        copy("copy copy_t from stdin", "900005\tx\t1\n", fail=ValueError("client gave up"))
    except psycopg.errors.QueryCanceled as exc:
        show_error(exc)
    res = conn.pgconn.exec_(b"copy copy_t from stdin")
    print(pq.ExecStatus(res.status).name, res.nfields, res.binary_tuples)
    conn.pgconn.put_copy_data(b"900006\tx\t1\n")
    conn.pgconn.put_copy_end(b"said no")
    while (res := conn.pgconn.get_result()) is not None:
        print(res.error_field(pq.DiagnosticField.SQLSTATE),
              res.error_field(pq.DiagnosticField.MESSAGE_PRIMARY),
              res.error_field(pq.DiagnosticField.CONTEXT))
    print(conn.execute("select count(*) from copy_t where a >= 900000").fetchone(), status(conn))
    conn.execute("begin")
    fails(copy, "copy copy_t from stdin", "bad\n")
    print(status(conn))
    conn.execute("rollback")


@case
def copy_out_abandoned(conn):
    """Leaving early cancels the query; the connection must stay usable."""
    seen = 0
    try:
        with conn.cursor().copy("copy (select i from generate_series(1, 5000000) i) to stdout") as copy:
            for data in copy:
                seen += 1
                if seen == 3:
                    raise ValueError("client gave up")
    except ValueError as exc:
        print(exc)
    print(seen, conn.execute("select 'usable'").fetchone(), status(conn))


@case
def copy_inside_multi_statement(conn):
    raw = conn.pgconn
    raw.send_query(b"select 1; copy copy_t from stdin; select 2;"
                   b" copy (select 7) to stdout; select 3")
    while (res := raw.get_result()) is not None:
        kind = pq.ExecStatus(res.status)
        print(kind.name, res.command_status)
        if kind == pq.ExecStatus.COPY_IN:
            raw.put_copy_data(b"700000\tmulti\t1\n")
            raw.put_copy_end()
        elif kind == pq.ExecStatus.COPY_OUT:
            while True:
                size, data = raw.get_copy_data(0)
                if size < 0:
                    break
                print(bytes(data))
    conn.execute("delete from copy_t where a = 700000")


@case
def cursors(conn):
    with conn.transaction():
        with conn.cursor("named") as cur:
            cur.itersize = 100
            cur.execute("select i from generate_series(1, 1000) i")
            print(sum(r[0] for r in cur))
        with conn.cursor("scrolls", scrollable=True) as cur:
            cur.execute("select i from generate_series(1, 100) i")
            print(cur.fetchmany(3))
            cur.scroll(50, mode="absolute")
            print(cur.fetchone())
            cur.scroll(-10)
            print(cur.fetchone(), cur.fetchmany(2))
    held = conn.cursor("held", withhold=True)
    with conn.transaction():
        held.execute("select i from generate_series(1, 20) i")
        print(held.fetchmany(2))
    print(held.fetchmany(2), status(conn))
    print(conn.execute("select name, is_holdable, is_scrollable from pg_cursors").fetchall())
    held.close()
    print(conn.execute("select count(*) from pg_cursors").fetchone())
    fails(conn.execute, "fetch 1 from held")
    with conn.transaction():
        conn.execute("create temp table pos(a int) on commit drop")
        conn.execute("insert into pos values (1), (2), (3)")
        conn.execute("declare c cursor for select * from pos for update")
        print(conn.execute("fetch 2 from c").fetchall(), conn.execute("move 1 in c").statusmessage)
        conn.execute("update pos set a = 30 where current of c")
        print(conn.execute("select array_agg(a order by a) from pos").fetchone())


@case
def transactions(conn):
    conn.execute("create table tx_t(a int)")
    print(status(conn))
    conn.autocommit = False
    conn.execute("insert into tx_t values (1)")
    print(status(conn))
    conn.rollback()
    print(status(conn), conn.execute("select count(*) from tx_t").fetchone())
    conn.rollback()
    fails(conn.execute, "select 1/0")
    print(status(conn))
    fails(conn.execute, "select 1")
    conn.commit()
    print(status(conn))
    with conn.transaction():
        conn.execute("insert into tx_t values (2)")
        try:
            with conn.transaction("inner"):
                conn.execute("insert into tx_t values (3)")
                conn.execute("insert into no_such_table values (3)")
        except psycopg.errors.UndefinedTable as exc:
            print("rolled back to savepoint", exc.sqlstate, status(conn))
        with conn.transaction(force_rollback=True):
            conn.execute("insert into tx_t values (4)")
        conn.execute("insert into tx_t values (5)")
    conn.autocommit = True
    print(conn.execute("select array_agg(a order by a) from tx_t").fetchone())
    # A failed transaction answers COMMIT with ROLLBACK.
    conn.execute("begin")
    fails(conn.execute, "select * from no_such_table")
    print(conn.execute("commit").statusmessage)
    print(conn.execute("begin").statusmessage,
          conn.execute("insert into tx_t values (6)").statusmessage,
          conn.execute("commit and chain").statusmessage, status(conn),
          conn.execute("rollback").statusmessage, status(conn))
    fails(conn.execute, "savepoint s")
    conn.execute("begin")
    fails(conn.execute, "rollback to no_such_savepoint")
    conn.execute("rollback")


@case
def isolation_levels(conn):
    for level in IsolationLevel:
        conn.isolation_level = level
        with conn.transaction():
            print(level.name, conn.execute("show transaction_isolation").fetchone())
    conn.isolation_level = IsolationLevel.SERIALIZABLE
    conn.read_only = True
    conn.deferrable = True
    try:
        with conn.transaction():
            print(conn.execute("select current_setting('transaction_read_only'),"
                               " current_setting('transaction_deferrable')").fetchone())
            fails(conn.execute, "create table nope(a int)")
    except psycopg.Error as exc:
        show_error(exc)
    conn.isolation_level = conn.read_only = conn.deferrable = None
    conn.execute("set default_transaction_read_only to on")
    print(conn.info.parameter_status("default_transaction_read_only"))


@case
def serialization_failure(conn):
    conn.execute("create table ser_t(a int)")
    conn.execute("insert into ser_t values (1)")
    conn.execute("begin isolation level repeatable read")
    conn.execute("select * from ser_t")
    with connect() as other:
        other.execute("update ser_t set a = 2")
    fails(conn.execute, "update ser_t set a = 3")
    conn.execute("rollback")


@case
def two_phase_commit(conn):
    if conn.execute("show max_prepared_transactions").fetchone() == ("0",):
        print("skipped: max_prepared_transactions is 0")
        return
    conn.execute("create table tpc_t(a int)")
    mine = "select gid from pg_prepared_xacts where gid like '%drv_psycopg%' order by 1"
    for action in ("commit", "rollback"):
        with connect() as work:
            work.autocommit = False
            work.tpc_begin(work.xid(1, "drv_psycopg", action))
            work.execute("insert into tpc_t values (1)")
            work.tpc_prepare()
            print(status(work), len(conn.execute(mine).fetchall()))
            # Another session finishes it, as a coordinator after a crash would.
            xid = [x for x in conn.tpc_recover() if x.gtrid == "drv_psycopg"][0]
            print(xid.format_id, xid.gtrid, xid.bqual)
            work.close()
        getattr(conn, "tpc_" + action)(xid)
        print(conn.execute("select count(*) from tpc_t").fetchone(),
              len(conn.execute(mine).fetchall()))
    fails(conn.execute, "commit prepared 'drv_psycopg_missing'")


@case
def errors(conn):
    conn.execute("""create domain small as int constraint small_check check (value < 10);
        create table err_t(id int primary key, b text not null, c int check (c > 0),
                           d small, constraint pair unique (b, c));
        create table err_ref(id int references err_t on delete restrict);
        insert into err_t values (1, 'x', 1, 1); insert into err_ref values (1);
        create function err_raise() returns void language plpgsql as $$ begin
          raise exception 'custom %', 7 using errcode = 'HF001', detail = 'some detail',
            hint = 'some hint', column = 'col', constraint = 'cons', datatype = 'typ',
            table = 'tab', schema = 'sch'; end $$;
        create function err_inner() returns int language plpgsql as
          $$ begin execute 'select 1/0'; return 1; end $$""")
    for query in ("insert into err_t values (1, 'y', 2)", "insert into err_t values (2, null, 2)",
                  "insert into err_t values (2, 'y', -1)", "insert into err_t values (2, 'x', 1)",
                  "insert into err_t values (2, 'y', 1, 99)", "insert into err_ref values (99)",
                  "delete from err_t", "select * from no_such", "select no_such from err_t",
                  "select no_such()", "selct", "select 'a'::int", "select 1/0", "select 'x",
                  "select 300::int2 * 300::int2", "select err_raise()", "select err_inner()",
                  "select '{bad json'::json", "drop table err_t", "select 'héé' +",
                  "select count(*) from err_t e where eid = 1", "do $$ begin assert false; end $$",
                  "create table err_t(a int)", "set role no_such_role"):
        print("--", query)
        fails(conn.execute, query)
        fails(conn.execute, query.replace("%", "%%"), (), prepare=True)


@case
def notices(conn):
    conn.add_notice_handler(lambda diag: show_diag("notice", diag))
    conn.execute("""do $$ begin
        raise notice 'one %', 1; raise warning 'two' using hint = 'h', detail = 'd';
        raise info 'three'; raise debug 'hidden'; end $$""")
    conn.execute("drop table if exists no_such_table")
    conn.execute("set client_min_messages to error")
    conn.execute("do $$ begin raise warning 'hidden too'; end $$")
    conn.execute("set client_min_messages to debug1")
    conn.execute("do $$ begin raise debug 'shown'; end $$")
    conn.execute("reset client_min_messages")
    conn.execute("commit")
    conn.execute("do $$ begin for i in 1..3 loop raise notice '%', repeat('n', 9000 * i); end loop; end $$")


@case
def listen_notify(conn):
    conn.execute("listen drv_chan")
    conn.execute('listen "Drv Other"')
    print(conn.execute("select * from pg_listening_channels() order by 1").fetchall())
    with connect() as other:
        other.execute("notify drv_chan")
        other.execute("select pg_notify('drv_chan', %s)", ("päyload " * 880,))
        with other.transaction():
            other.execute("notify drv_chan, 'in transaction'")
            other.execute("notify drv_chan, 'in transaction'")
        with other.transaction(force_rollback=True):
            other.execute("notify drv_chan, 'never'")
        other.execute("notify unheard, 'x'")
        other.execute("notify \"Drv Other\", 'stop'")
        pid = other.execute("select pg_backend_pid()").fetchone()[0]
    for note in conn.notifies():
        print(note.channel, len(note.payload), md5(note.payload), note.pid == pid)
        if note.payload == "stop":
            break
    # Notifications of one's own come before the answer to the query is over.
    seen = []
    conn.add_notify_handler(lambda n: seen.append((n.channel, n.payload)))
    conn.execute("notify drv_chan, 'to myself'")
    conn.execute("select 1")
    print(seen)
    conn.execute("unlisten *")
    conn.execute("notify drv_chan, 'nobody'")
    conn.execute("select 1")
    print(seen)


def cancel_until_done(conn, fn):
    """Call fn while another thread asks for cancellation every 0.3 s.

    One request could come before the query has started on a slow machine, and
    the server ignores those; repeating keeps the transcript deterministic.
    """
    done = threading.Event()

    def worker():
        while not done.wait(0.3):
            conn.cancel()
    thread = threading.Thread(target=worker, daemon=True)
    thread.start()
    try:
        fails(fn)
    finally:
        done.set()
        thread.join(5)


@case
def cancel(conn):
    cancel_until_done(conn, lambda: conn.execute("select pg_sleep(30)"))
    print(conn.execute("select 'usable'").fetchone(), status(conn))
    conn.execute("begin")
    cancel_until_done(conn, lambda: conn.execute("select pg_sleep(30)", (), prepare=True))
    print(status(conn))
    conn.execute("rollback")
    # Cancelling an idle session does nothing.
    conn.cancel()
    print(conn.execute("select 'still usable'").fetchone())
    # Cancelling must hit the right session only.
    with connect() as other:
        other.cancel()
        cancel_until_done(conn, lambda: conn.execute("select pg_sleep(30)"))
        print(other.execute("select 'untouched'").fetchone())


@case
def cancel_while_waiting_for_lock(conn):
    conn.execute("create table lock_t(a int)")
    with connect() as other, other.transaction():
        other.execute("lock table lock_t")
        cancel_until_done(conn, lambda: conn.execute("select * from lock_t"))
        fails(conn.execute, "lock table lock_t nowait")
        conn.execute("set lock_timeout to '100ms'")
        fails(conn.execute, "select * from lock_t")
    print(conn.execute("select count(*) from lock_t").fetchone())


@case
def cancel_by_function(conn):
    pid = conn.execute("select pg_backend_pid()").fetchone()[0]
    done = threading.Event()

    def worker():
        with connect() as other:
            while not done.wait(0.3):
                other.execute("select pg_cancel_backend(%s)", (pid,))
    thread = threading.Thread(target=worker, daemon=True)
    thread.start()
    fails(conn.execute, "select pg_sleep(30)")
    done.set()
    thread.join(5)
    print(conn.execute("select 'usable'").fetchone())


@case
def timeouts(conn):
    conn.execute("set statement_timeout to '200ms'")
    fails(conn.execute, "select pg_sleep(30)")
    fails(conn.execute, "select pg_sleep(%s)", (30,))
    conn.execute("reset statement_timeout")
    print(conn.execute("select 'usable' from pg_sleep(0.25)").fetchone())


@case
def temp_tables(conn):
    conn.execute("create temp table t(a int) on commit delete rows")
    with conn.transaction():
        conn.execute("insert into t values (1)")
        print(conn.execute("select count(*) from t").fetchone())
    print(conn.execute("select count(*) from t").fetchone())
    with connect() as other:
        fails(other.execute, "select * from t")


@case
def advisory_locks(conn):
    with connect() as other:
        print(conn.execute("select pg_try_advisory_lock(770002)").fetchone())
        print(other.execute("select pg_try_advisory_lock(770002)").fetchone())
        conn.execute("select pg_advisory_unlock(770002)")
        print(other.execute("select pg_try_advisory_lock(770002)").fetchone())
        print(other.execute("select pg_advisory_unlock_all()").fetchone())
    holder = connect()
    holder.execute("select pg_advisory_lock(770003)")
    holder.close()
    # The lock goes with the session; the wait for it is bounded.
    conn.execute("set lock_timeout to '5s'")
    print(conn.execute("select pg_advisory_lock(770003) is not null").fetchone())


@case
def large_objects(conn):
    data = bytes(i % 256 for i in range(100000))
    with conn.transaction():
        oid = conn.execute("select lo_from_bytea(0, %b)", (data,)).fetchone()[0]
        conn.execute("select lo_put(%s, 99990, %b)", (oid, b"x" * 20))
        fd = conn.execute("select lo_open(%s, x'60000'::int)", (oid,)).fetchone()[0]
        print(fd, conn.execute("select lo_lseek(%s, 10, 0)", (fd,)).fetchone(),
              conn.execute("select loread(%s, 5)", (fd,)).fetchone())
        conn.execute("select lo_truncate(%s, 99995)", (fd,))
    print(md5(conn.execute("select lo_get(%s)", (oid,), binary=True).fetchone()[0]))
    print(conn.execute("select lo_unlink(%s)", (oid,)).fetchone())
    with conn.transaction(force_rollback=True):
        try:
            conn.execute("select lo_unlink(%s)", (oid,))
        except psycopg.errors.UndefinedObject as exc:
            # The message has the OID in it.
            print(type(exc).__name__, exc.sqlstate)


@case
def procedures_and_functions(conn):
    conn.execute("""create table proc_t(a int);
        create procedure proc_commits(inout n int) language plpgsql as $$ begin
          insert into proc_t values (n); commit; insert into proc_t values (n + 1); rollback;
          n := n * 2; end $$;
        create function proc_set() returns setof proc_t language sql as 'table proc_t';
        create function proc_ref() returns refcursor language plpgsql as $$ declare
          c refcursor := 'proc_cur'; begin open c for select 1 union all select 2; return c; end $$""")
    print(conn.execute("call proc_commits(%s)", (21,)).fetchone())
    print(conn.execute("select * from proc_set()").fetchall())
    with conn.transaction():
        print(conn.execute("select proc_ref()").fetchone(),
              conn.execute("fetch all from proc_cur").fetchall())
    conn.execute("begin")
    fails(conn.execute, "call proc_commits(1)")
    conn.execute("rollback")


@case
def many_connections(conn):
    """Short sessions one after another, and some at once."""
    for i in range(20):
        with connect() as other:
            other.execute("select %s::int", (i,))
    others = [connect(application_name=f"n{i}") for i in range(10)]
    print([o.execute("show application_name").fetchone()[0] for o in others])
    for other in others:
        other.close()
    print("closed", all(o.closed for o in others))


@case
def graceful_close(conn):
    name = "drv_psycopg_close"
    other = connect(application_name=name)
    count = "select count(*) from pg_stat_activity where application_name = %s"
    print(conn.execute(count, (name,)).fetchone())
    other.execute("begin; create table never_kept(a int)")
    other.close()
    fails(other.execute, "select 1")
    # The server notices Terminate a moment later.
    for _ in range(100):
        if conn.execute(count, (name,)).fetchone() == (0,):
            print("session gone")
            break
        conn.execute("select pg_sleep(0.05)")
    print(conn.execute("select to_regclass('never_kept')").fetchone())


def clean():
    with psycopg.connect(autocommit=True, connect_timeout=10) as conn:
        for (gid,) in conn.execute("select gid from pg_prepared_xacts where database ="
                                   " current_database() and gid like '%drv_psycopg%'").fetchall():
            conn.execute(sql.SQL("rollback prepared {}").format(gid))
        conn.execute("set client_min_messages to warning")
        conn.execute(f"drop schema if exists {SCHEMA} cascade")
        return conn.execute("select 1").fetchone()


def on_alarm(signum, frame):
    raise TimeoutError(f"case took over {CASE_SECONDS} s")


def main():
    # A thread backs up the alarm in case the main one is stuck in C code.
    watchdog = threading.Timer(60, lambda: (print("watchdog: over 60 s", flush=True), os._exit(3)))
    watchdog.daemon = True
    watchdog.start()
    signal.signal(signal.SIGALRM, on_alarm)
    clean()
    with psycopg.connect(autocommit=True, connect_timeout=10) as conn:
        conn.execute(f"create schema {SCHEMA}")
    failed = 0
    for fn in CASES:
        if sys.argv[1:] and fn.__name__ not in sys.argv[1:]:
            continue
        print(f"case: {fn.__name__}", flush=True)
        signal.alarm(CASE_SECONDS)
        conn = None
        try:
            conn = connect()
            fn(conn)
        except Exception as exc:
            failed += 1
            print("unexpected", type(exc).__name__, getattr(exc, "sqlstate", None))
            traceback.print_exc(file=sys.stderr)
        finally:
            signal.alarm(0)
            if conn is not None:
                conn.close()
    clean()
    print("done, unexpected failures:", failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
