// Conformance program for pgjdbc; see README.md for the contract: the
// transcript holds only facts that do not change between two runs.

import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.InputStream;
import java.io.StringReader;
import java.math.BigDecimal;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.sql.*;
import java.time.LocalDate;
import java.time.LocalDateTime;
import java.time.LocalTime;
import java.time.OffsetDateTime;
import java.time.ZoneOffset;
import java.util.*;
import java.util.concurrent.*;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;
import org.postgresql.PGStatement;
import org.postgresql.copy.CopyIn;
import org.postgresql.copy.CopyManager;
import org.postgresql.copy.CopyOut;
import org.postgresql.largeobject.LargeObject;
import org.postgresql.largeobject.LargeObjectManager;
import org.postgresql.util.PGobject;
import org.postgresql.util.PSQLException;
import org.postgresql.util.ServerErrorMessage;

public class Jdbc {
    static final String SCHEMA = "drv_jdbc";
    static final int CASE_SECONDS = 20;

    interface Case { void run(Connection c) throws Exception; }
    interface Action { void run() throws Exception; }

    static final Map<String, Case> CASES = new LinkedHashMap<>();

    static String env(String name, String fallback) {
        String v = System.getenv(name);
        return v == null || v.isEmpty() ? fallback : v;
    }

    static Connection connect(String... extra) throws SQLException {
        return connectTo(env("PGDATABASE", "postgres"), extra);
    }

    static Connection connectTo(String database, String... extra) throws SQLException {
        Properties p = new Properties();
        p.setProperty("user", env("PGUSER", "postgres"));
        p.setProperty("password", env("PGPASSWORD", ""));
        p.setProperty("sslmode", env("PGSSLMODE", "disable"));
        if (System.getenv("PGSSLROOTCERT") != null) p.setProperty("sslrootcert", System.getenv("PGSSLROOTCERT"));
        p.setProperty("connectTimeout", "10");
        p.setProperty("loginTimeout", "10");
        p.setProperty("currentSchema", SCHEMA + ",public");
        for (int i = 0; i < extra.length; i += 2) p.setProperty(extra[i], extra[i + 1]);
        return DriverManager.getConnection("jdbc:postgresql://" + env("PGHOST", "localhost") + ":"
            + env("PGPORT", "5432") + "/" + database, p);
    }

    static String md5(byte[] data) throws Exception {
        StringBuilder s = new StringBuilder();
        for (byte b : MessageDigest.getInstance("MD5").digest(data)) s.append(String.format("%02x", b));
        return s.toString();
    }

    static void show(Object... items) {
        StringBuilder s = new StringBuilder();
        for (Object o : items) {
            if (s.length() > 0) s.append(' ');
            s.append(text(o));
        }
        System.out.println(s);
    }

    static String text(Object o) {
        try {
            if (o instanceof byte[]) return "bytes " + ((byte[]) o).length + " " + md5((byte[]) o);
            if (o instanceof java.sql.Array) return Arrays.deepToString((Object[]) ((java.sql.Array) o).getArray());
            if (o instanceof int[]) return Arrays.toString((int[]) o);
            if (o instanceof SQLXML) return ((SQLXML) o).getString();
            return String.valueOf(o);
        } catch (Exception e) {
            return "unprintable " + e;
        }
    }

    static void showServerError(String label, ServerErrorMessage m) {
        show(label, m.getSeverity(), m.getSQLState());
        Object[] f = {"message", m.getMessage(), "detail", m.getDetail(), "hint", m.getHint(),
            "position", m.getPosition(), "internal position", m.getInternalPosition(),
            "internal query", m.getInternalQuery(), "where", m.getWhere(), "schema", m.getSchema(),
            "table", m.getTable(), "column", m.getColumn(), "datatype", m.getDatatype(),
            "constraint", m.getConstraint(), "file", m.getFile(), "line", m.getLine(), "routine", m.getRoutine()};
        for (int i = 0; i < f.length; i += 2)
            if (f[i + 1] != null && !f[i + 1].equals(0)) show("  " + f[i] + ":", f[i + 1]);
    }

    static void showError(SQLException e) {
        show("error", e.getClass().getSimpleName(), e.getSQLState());
        ServerErrorMessage m = e instanceof PSQLException ? ((PSQLException) e).getServerErrorMessage() : null;
        if (m != null) showServerError(" server", m);
        if (e.getNextException() != null) {
            show("next");
            showError(e.getNextException());
        }
    }

    static void fails(Action a) throws Exception {
        try {
            a.run();
        } catch (SQLException e) {
            showError(e);
            return;
        }
        show("no error, though one was expected");
    }

    static void exec(Connection c, String query) throws SQLException {
        try (Statement s = c.createStatement()) { s.execute(query); }
    }

    static List<Object> row(ResultSet r) throws SQLException {
        List<Object> out = new ArrayList<>();
        for (int i = 1; i <= r.getMetaData().getColumnCount(); i++) out.add(text(r.getObject(i)));
        return out;
    }

    static List<Object> rows(ResultSet r) throws SQLException {
        List<Object> out = new ArrayList<>();
        while (r.next()) out.add(row(r));
        return out;
    }

    static List<Object> query(Connection c, String query, Object... params) throws SQLException {
        try (PreparedStatement s = c.prepareStatement(query)) {
            for (int i = 0; i < params.length; i++) s.setObject(i + 1, params[i]);
            return rows(s.executeQuery());
        }
    }

    /** Asks again every 0.3 s, since a request that comes before the query is ignored. */
    static void cancelled(Action ask, Action query) throws Exception {
        ScheduledExecutorService timer = Executors.newSingleThreadScheduledExecutor();
        try {
            timer.scheduleWithFixedDelay(() -> {
                try { ask.run(); } catch (Exception e) { e.printStackTrace(); }
            }, 300, 300, TimeUnit.MILLISECONDS);
            fails(query);
        } finally {
            timer.shutdown();
            timer.awaitTermination(5, TimeUnit.SECONDS);
        }
    }

    static void startup(Connection c) throws Exception {
        for (Map.Entry<String, String> e : new TreeMap<>(c.unwrap(PGConnection.class).getParameterStatuses()).entrySet())
            show(e.getKey(), "=", e.getValue());
        DatabaseMetaData m = c.getMetaData();
        show(m.getDatabaseProductName(), m.getDatabaseProductVersion(), m.getDriverVersion());
        show("has pid", c.unwrap(PGConnection.class).getBackendPID() > 0);
        try (Connection o = connect("ApplicationName", "drv jdbc", "options", "-c geqo=off -c statement_timeout=12345")) {
            for (String n : List.of("application_name", "geqo", "statement_timeout", "search_path", "extra_float_digits"))
                show(n, query(o, "show " + n));
            exec(o, "reset all");
            show(query(o, "show geqo"), query(o, "show application_name"));
        }
    }

    static void startupFailures(Connection c) throws Exception {
        fails(() -> connectTo("drv_no_such_database").close());
        fails(() -> connect("options", "-c no_such_setting=1").close());
        if (System.getenv("PGPASSWORD") != null) {
            fails(() -> connect("password", "drv-wrong-password").close());
            fails(() -> connect("user", "drv_no_such_user").close());
        }
    }

    static void queryModes(Connection c) throws Exception {
        for (String mode : List.of("simple", "extended", "extendedForPrepared", "extendedCacheEverything")) {
            try (Connection o = connect("preferQueryMode", mode)) {
                show(mode, query(o, "select ?::int + 1, ?::text", 1, "it's \\ ünï"));
                try (Statement s = o.createStatement()) {
                    boolean rs = s.execute("select 1; create temp table q(a int); insert into q values (1), (2); select * from q");
                    while (true) {
                        if (rs) show(rows(s.getResultSet()));
                        else if (s.getUpdateCount() == -1) break;
                        else show("updated", s.getUpdateCount());
                        rs = s.getMoreResults();
                    }
                    show("empty", s.execute(""), s.execute(" ; "));
                    fails(() -> s.execute("insert into q values (3); select 1/0; insert into q values (4)"));
                    show(query(o, "select count(*) from q"));
                }
                for (int i = 0; i < 8; i++) query(o, "select ?::int", i);
                show(query(o, "select count(*) > 0 from pg_prepared_statements"));
            }
        }
    }

    static void prepared(Connection c) throws Exception {
        for (int threshold : new int[] {0, 1, 5, -1}) {
            try (PreparedStatement s = c.prepareStatement("select ?::int4 as a, ?::text as b, ?::numeric, ?::timestamptz")) {
                s.unwrap(PGStatement.class).setPrepareThreshold(threshold);
                for (int i = 0; i < 8; i++) {
                    s.setInt(1, i);
                    s.setString(2, i % 2 == 0 ? null : "x" + i);
                    s.setBigDecimal(3, new BigDecimal("1.50"));
                    s.setObject(4, OffsetDateTime.of(2024, 2, 29, 12, 0, 0, 0, ZoneOffset.UTC));
                    try (ResultSet r = s.executeQuery()) {
                        r.next();
                        show(threshold, r.getInt(1), r.getString(2), r.getBigDecimal(3),
                            r.getObject(4, OffsetDateTime.class), s.unwrap(PGStatement.class).isUseServerPrepare());
                    }
                }
            }
        }
        try (PreparedStatement s = c.prepareStatement("select ?::int as a, ?::varchar(7) as b, 1.5::numeric(8,3) as c")) {
            ParameterMetaData p = s.getParameterMetaData();
            ResultSetMetaData m = s.getMetaData();
            for (int i = 1; i <= p.getParameterCount(); i++) show(p.getParameterTypeName(i));
            for (int i = 1; i <= m.getColumnCount(); i++)
                show(m.getColumnName(i), m.getColumnTypeName(i), m.getPrecision(i), m.getScale(i));
        }
        // Behind the driver's back: it prepares again, as autocommit lets it.
        exec(c, "create table plan_t(a int); insert into plan_t values (1)");
        for (int i = 0; i < 8; i++) query(c, "select * from plan_t");
        exec(c, "alter table plan_t add b int default 2");
        show(query(c, "select * from plan_t"));
        exec(c, "deallocate all");
        show(query(c, "select * from plan_t"));
        exec(c, "discard all");
        show(query(c, "select count(*) from drv_jdbc.plan_t"));
    }

    static void types(Connection c) throws Exception {
        exec(c, "set time zone 'UTC'");
        String[] exprs = {"true", "'-32768'::int2", "2147483647", "'-9223372036854775808'::int8", "1.5::float4",
            "1e-300::float8", "'Infinity'::float8", "'NaN'::float8", "12345678901234567890.123456789",
            "'NaN'::numeric::text", "'naïve 中文 🦀'", "''", "'ab'::char(5)", "'n'::name", "'\\x00ff10'::bytea",
            "'1999-12-31'::date::text", "'23:59:59.999'::time::text", "'2024-02-29 12:00'::timestamptz::text",
            "'1 year 2 days 03:04:05'::interval", "'12345678-1234-5678-1234-567812345678'::uuid",
            "'192.168.1.1/24'::inet", "'{\"a\": [1, null]}'::json", "'{\"b\":1}'::jsonb", "'(1,2)'::point",
            "'<(0,0),5>'::circle", "int4range(1, 10)", "'{1,NULL,3}'::int4[]", "'{\"a,b\",\"\",NULL}'::text[]",
            "'{{1,2},{3,4}}'::int4[]", "'{t,f}'::bool[]", "'{1.5}'::float8[]", "'1010'::bit(4)",
            "'a:1'::tsvector", "row(1, null, 'x')", "'pg_class'::regclass", "'<a>b</a>'::xml"};
        for (String e : exprs) {
            // Text first, then as a prepared statement, which turns on binary transfer.
            try (PreparedStatement s = c.prepareStatement("select " + e + ", null::int")) {
                List<String> seen = new ArrayList<>();
                for (int threshold : new int[] {0, -1, -1}) {
                    s.unwrap(PGStatement.class).setPrepareThreshold(threshold);
                    try (ResultSet r = s.executeQuery()) {
                        r.next();
                        Object v = r.getObject(1);
                        seen.add(text(v));
                        r.getInt(2);
                        if (!r.wasNull()) show("null lost");
                    }
                }
                show(e, seen);
            }
        }
        try (PreparedStatement s = c.prepareStatement(
                "select ?::bool, ?::int2, ?::int8, ?::float4, ?::float8, ?::numeric, ?::bytea, ?::date::text,"
                + " ?::time::text, ?::timestamp::text, ?::uuid, ?::jsonb, ?::int4[], ?::text[], ?::xml")) {
            for (int i = 0; i < 7; i++) {
                s.setBoolean(1, true); s.setShort(2, (short) -1); s.setLong(3, Long.MIN_VALUE);
                s.setFloat(4, 1.25f); s.setDouble(5, 1e-9); s.setBigDecimal(6, new BigDecimal("-0.0001"));
                s.setBytes(7, new byte[] {0, -1, 92}); s.setObject(8, LocalDate.of(1, 1, 1));
                s.setObject(9, LocalTime.of(23, 59, 59)); s.setObject(10, LocalDateTime.of(2024, 2, 29, 1, 2, 3, 4000));
                s.setObject(11, UUID.fromString("12345678-1234-5678-1234-567812345678"));
                PGobject j = new PGobject(); j.setType("jsonb"); j.setValue("{\"a\": 1}"); s.setObject(12, j);
                s.setArray(13, c.createArrayOf("int4", new Integer[] {1, null}));
                s.setArray(14, c.createArrayOf("text", new String[] {"a\"b", null, ""}));
                SQLXML x = c.createSQLXML(); x.setString("<a/>"); s.setSQLXML(15, x);
                List<Object> got = rows(s.executeQuery());
                if (i == 0 || i == 6) show(got);
                for (int k = 1; k <= 15; k++) s.setNull(k, Types.NULL);
                if (i == 6) show(rows(s.executeQuery()));
                s.clearParameters();
            }
        }
        // The server answers a changed TimeZone with a ParameterStatus.
        for (String zone : List.of("America/New_York", "Asia/Kolkata")) {
            exec(c, "set time zone '" + zone + "'");
            show(c.unwrap(PGConnection.class).getParameterStatus("TimeZone"),
                query(c, "select '2024-07-01 12:00:00+00'::timestamptz::text"));
        }
        // The driver insists on UTF8 and closes a session that leaves it.
        try (Connection o = connect()) { fails(() -> exec(o, "set client_encoding to latin1")); show(o.isClosed()); }
        try (Connection o = connect("allowEncodingChanges", "true")) {
            exec(o, "set client_encoding to latin1");
            show(query(o, "select 'é', ?::text", "ü"));
            fails(() -> query(o, "select chr(8364)"));
        }
    }

    static void large(Connection c) throws Exception {
        byte[] blob = new byte[1 << 20];
        for (int i = 0; i < blob.length; i++) blob[i] = (byte) (i * 7 % 251);
        try (PreparedStatement s = c.prepareStatement("select ?::bytea, length(?::bytea)")) {
            for (int i = 0; i < 7; i++) {
                s.setBytes(1, blob);
                s.setBinaryStream(2, new ByteArrayInputStream(blob), blob.length);
                List<Object> got = rows(s.executeQuery());
                if (i % 3 == 0) show(got);
            }
        }
        String text = "z".repeat(2 << 20);
        show(query(c, "select length('" + text + "'), md5('" + text + "')"));
        try (Statement s = c.createStatement()) {
            for (int fetch : new int[] {0, 1000}) {
                c.setAutoCommit(false);
                s.setFetchSize(fetch);
                MessageDigest d = MessageDigest.getInstance("MD5");
                int count = 0;
                try (ResultSet r = s.executeQuery("select i, md5(i::text) from generate_series(1, 200000) i")) {
                    while (r.next()) {
                        d.update((r.getInt(1) + r.getString(2)).getBytes());
                        count++;
                    }
                }
                show(fetch, count, Base64.getEncoder().encodeToString(d.digest()));
                c.commit();
            }
        }
    }

    static void batch(Connection c) throws Exception {
        exec(c, "create table b(a int primary key, t text)");
        for (String rewrite : List.of("false", "true")) {
            try (Connection o = connect("reWriteBatchedInserts", rewrite)) {
                try (PreparedStatement s = o.prepareStatement("insert into b values (?, ?)")) {
                    for (int i = 0; i < 3000; i++) { s.setInt(1, i); s.setString(2, "t" + i); s.addBatch(); }
                    // A rewritten batch reports "unknown" counts.
                    show(rewrite, Arrays.stream(s.executeBatch()).sum(), query(o, "select count(*), sum(a) from b"));
                    for (int i = 0; i < 10; i++) { s.setInt(1, 5000 + (i == 5 ? 0 : i)); s.setString(2, null); s.addBatch(); }
                    try {
                        s.executeBatch();
                    } catch (BatchUpdateException e) {
                        show(e.getUpdateCounts());
                        show(e.getSQLState(), ((PSQLException) e.getNextException()).getServerErrorMessage().getConstraint());
                    }
                    show(query(o, "select count(*) from b"));
                }
                exec(o, "truncate b");
            }
        }
        try (Statement s = c.createStatement()) {
            for (int i = 0; i < 5; i++) s.addBatch("insert into b values (" + i + ", 'x')");
            s.addBatch("update b set t = 'y' where a > 2");
            s.addBatch("delete from b where a = 0");
            show(s.executeBatch());
        }
        try (PreparedStatement s = c.prepareStatement("insert into b values (?, ?) returning a", Statement.RETURN_GENERATED_KEYS)) {
            for (int i = 100; i < 105; i++) { s.setInt(1, i); s.setString(2, "r"); s.addBatch(); }
            s.executeBatch();
            show(rows(s.getGeneratedKeys()));
        }
    }

    static void copy(Connection c) throws Exception {
        exec(c, "create table copy_t(a int primary key, b text)");
        CopyManager m = c.unwrap(PGConnection.class).getCopyAPI();
        StringBuilder data = new StringBuilder();
        for (int i = 0; i < 50000; i++) data.append(i).append('\t').append(i % 3 == 0 ? "\\N" : "x" + i).append('\n');
        show(m.copyIn("copy copy_t from stdin", new StringReader(data.toString())));
        for (String format : List.of("text", "csv", "binary")) {
            ByteArrayOutputStream out = new ByteArrayOutputStream();
            show(m.copyOut("copy (select * from copy_t order by a) to stdout (format " + format + ")", out), out.toByteArray());
        }
        fails(() -> m.copyIn("copy copy_t from stdin", new StringReader("60000\tx\noops\ty\n")));
        fails(() -> m.copyIn("copy copy_t from stdin", new StringReader(data.toString())));
        fails(() -> m.copyIn("copy no_such from stdin", new StringReader("1\n")));
        fails(() -> m.copyOut("copy (select 1/0) to stdout", new ByteArrayOutputStream()));
        // cancelCopy sends CopyFail, and expects the error it causes.
        CopyIn in = m.copyIn("copy copy_t from stdin");
        byte[] line = "70000\tx\n".getBytes();
        in.writeToCopy(line, 0, line.length);
        in.cancelCopy();
        show(in.isActive(), query(c, "select count(*), max(a) from copy_t"));
        // Row by row. Leaving early is not tried here: this driver's cancel can
        // come late and hit the next query.
        CopyOut out = m.copyOut("copy (select i from generate_series(1, 5) i) to stdout");
        for (byte[] b; (b = out.readFromCopy()) != null; ) show(new String(b).trim());
        show(out.getHandledRowCount(), query(c, "select 'usable'"));
    }

    static void cursors(Connection c) throws Exception {
        c.setAutoCommit(false);
        try (PreparedStatement s = c.prepareStatement("select i from generate_series(1, ?) i")) {
            s.setInt(1, 1000);
            s.setFetchSize(70);
            for (int round = 0; round < 7; round++) {
                long total = 0;
                try (ResultSet r = s.executeQuery()) { while (r.next()) total += r.getInt(1); }
                if (round % 3 == 0) show(total);
            }
            // Two portals in turns, and one closed while suspended.
            try (ResultSet a = s.executeQuery(); Statement s2 = c.createStatement()) {
                s2.setFetchSize(3);
                ResultSet b = s2.executeQuery("select -i from generate_series(1, 20) i");
                long total = 0;
                for (int i = 0; i < 10; i++) { a.next(); b.next(); total += a.getInt(1) * 100 + b.getInt(1); }
                show(total);
            }
        }
        try (Statement s = c.createStatement()) {
            s.setFetchSize(2);
            ResultSet r = s.executeQuery("select 10 / (5 - i) from generate_series(1, 9) i");
            fails(() -> { while (r.next()) show(r.getInt(1)); });
        }
        c.rollback();
        try (Statement s = c.createStatement(ResultSet.TYPE_SCROLL_INSENSITIVE, ResultSet.CONCUR_READ_ONLY,
                ResultSet.HOLD_CURSORS_OVER_COMMIT)) {
            ResultSet r = s.executeQuery("select i from generate_series(1, 10) i");
            r.absolute(5); show(r.getInt(1));
            c.commit();
            r.last(); show(r.getInt(1));
        }
        exec(c, "declare held cursor with hold for select generate_series(1, 10)");
        c.commit();
        show(query(c, "fetch 3 from held"));
        exec(c, "close held");
        exec(c, "create function ref() returns refcursor language plpgsql as $$ declare r refcursor; begin"
            + " open r for select 1 union all select 2; return r; end $$");
        try (CallableStatement s = c.prepareCall("{? = call ref()}")) {
            s.registerOutParameter(1, Types.OTHER);
            s.execute();
            show(rows((ResultSet) s.getObject(1)));
        }
        exec(c, "create procedure twice(inout n int) language plpgsql as $$ begin n := n * 2; end $$");
        c.commit();
        try (Connection o = connect("escapeSyntaxCallMode", "callIfNoReturn"); CallableStatement s = o.prepareCall("{call twice(?)}")) {
            s.setInt(1, 21);
            s.registerOutParameter(1, Types.INTEGER);
            s.execute();
            show(s.getInt(1));
        }
    }

    static void transactions(Connection c) throws Exception {
        exec(c, "create table tx_t(a int)");
        c.setAutoCommit(false);
        exec(c, "insert into tx_t values (1)");
        Savepoint s = c.setSavepoint("sp");
        fails(() -> query(c, "select 1/?::int", 0));
        fails(() -> query(c, "select 1"));
        c.rollback(s);
        exec(c, "insert into tx_t values (2)");
        c.releaseSavepoint(s);
        c.commit();
        show(query(c, "select array_agg(a order by a) from tx_t"));
        fails(() -> exec(c, "select no_such"));
        // The server answers ROLLBACK to this.
        try { c.commit(); show("commit returned"); } catch (SQLException e) { showError(e); }
        c.rollback();
        for (int level : new int[] {1, 2, 4, 8}) {
            c.setTransactionIsolation(level);
            show(level, query(c, "show transaction_isolation"));
            c.rollback();
        }
        c.setReadOnly(true);
        fails(() -> exec(c, "insert into tx_t values (9)"));
        c.rollback();
        c.setReadOnly(false);
        c.setTransactionIsolation(Connection.TRANSACTION_REPEATABLE_READ);
        query(c, "select * from tx_t");
        try (Connection o = connect()) { exec(o, "update tx_t set a = a + 100"); }
        fails(() -> exec(c, "update tx_t set a = a + 1"));
        c.rollback();
        try (Connection o = connect("autosave", "always")) {
            o.setAutoCommit(false);
            exec(o, "insert into tx_t values (5)");
            fails(() -> exec(o, "select 1/0"));
            o.commit();
        }
        show(query(c, "select array_agg(a order by a) from tx_t"));
        c.rollback();
        c.setAutoCommit(true);
        if (query(c, "show max_prepared_transactions").toString().equals("[[0]]")) {
            show("two-phase commit skipped: max_prepared_transactions is 0");
            return;
        }
        for (String end : List.of("commit", "rollback")) {
            try (Connection o = connect()) {
                o.setAutoCommit(false);
                exec(o, "insert into tx_t values (7)");
                exec(o, "prepare transaction 'drv_jdbc_" + end + "'");
            }
            exec(c, end + " prepared 'drv_jdbc_" + end + "'");
            show(query(c, "select count(*) from tx_t"));
        }
    }

    static void errors(Connection c) throws Exception {
        exec(c, "create table err_t(id int primary key, b text not null, c int check (c > 0));"
            + " insert into err_t values (1, 'x', 1);"
            + " create function err_raise() returns void language plpgsql as $$ begin raise exception 'custom %', 7"
            + " using errcode = 'HF001', detail = 'some detail', hint = 'some hint', column = 'col',"
            + " constraint = 'cons', datatype = 'typ', table = 'tab', schema = 'sch'; end $$");
        for (String q : List.of("insert into err_t values (1, 'y', 2)", "insert into err_t values (2, null, 2)",
                "insert into err_t values (2, 'y', -1)", "select err_raise()", "selct", "select no_such from err_t",
                "select 1/0", "select 'a'::int", "select 'héé' +")) {
            show("--", q);
            fails(() -> exec(c, q));
            fails(() -> query(c, q));
        }
        try (Statement s = c.createStatement()) {
            s.execute("do $$ begin raise notice 'one'; raise warning 'two' using hint = 'h', detail = 'd'; end $$");
            for (SQLWarning w = s.getWarnings(); w != null; w = w.getNextWarning())
                showServerError("notice", ((org.postgresql.util.PSQLWarning) w).getServerErrorMessage());
            s.execute("drop table if exists no_such_table");
            show(s.getWarnings().getMessage(), s.getWarnings().getSQLState());
        }
    }

    static void listenNotify(Connection c) throws Exception {
        PGConnection p = c.unwrap(PGConnection.class);
        exec(c, "listen drv_chan");
        try (Connection o = connect()) {
            exec(o, "notify drv_chan");
            query(o, "select pg_notify('drv_chan', ?)::text", "long ".repeat(1500));
            exec(o, "notify drv_chan, 'stop'");
        }
        boolean stop = false;
        for (int i = 0; i < 50 && !stop; i++) {
            PGNotification[] got = p.getNotifications(100);
            if (got != null) for (PGNotification n : got) {
                show(n.getName(), n.getParameter().length(), md5(n.getParameter().getBytes()));
                stop |= n.getParameter().equals("stop");
            }
        }
        exec(c, "notify drv_chan, 'to myself'");
        for (PGNotification n : p.getNotifications()) show(n.getName(), n.getParameter());
        exec(c, "unlisten *");
        exec(c, "notify drv_chan, 'nobody'");
        show(p.getNotifications() == null || p.getNotifications().length == 0);
    }

    static void cancel(Connection c) throws Exception {
        try (Statement s = c.createStatement(); PreparedStatement ps = c.prepareStatement("select pg_sleep(?)")) {
            cancelled(s::cancel, () -> s.execute("select pg_sleep(30)"));
            show(query(c, "select 'usable'"));
            ps.setInt(1, 30);
            cancelled(ps::cancel, ps::execute);
            // The driver's own timer sends the CancelRequest here.
            s.setQueryTimeout(1);
            fails(() -> s.execute("select pg_sleep(30)"));
            s.setQueryTimeout(0);
            c.setAutoCommit(false);
            cancelled(s::cancel, () -> s.execute("select pg_sleep(30)"));
            fails(() -> query(c, "select 1"));
            c.rollback();
            c.setAutoCommit(true);
            int pid = Integer.parseInt(query(c, "select pg_backend_pid()").toString().replaceAll("\\D", ""));
            try (Connection o = connect()) {
                cancelled(() -> query(o, "select pg_cancel_backend(?)", pid), () -> s.execute("select pg_sleep(30)"));
            }
            s.execute("set statement_timeout to '200ms'");
            fails(() -> s.execute("select pg_sleep(30)"));
            s.execute("reset statement_timeout");
            show(query(c, "select 'usable' from pg_sleep(0.25)"), c.isValid(5));
        }
    }

    /** The driver uses the protocol's old FunctionCall message for these. */
    static void largeObjects(Connection c) throws Exception {
        LargeObjectManager m = c.unwrap(PGConnection.class).getLargeObjectAPI();
        fails(() -> m.createLO());
        c.setAutoCommit(false);
        long oid = m.createLO();
        byte[] data = new byte[300000];
        for (int i = 0; i < data.length; i++) data[i] = (byte) (i % 251);
        LargeObject o = m.open(oid, LargeObjectManager.READWRITE);
        o.write(data);
        o.seek(100);
        show(o.read(5), o.tell(), o.size());
        o.truncate(250000);
        o.seek(0);
        show(o.read(1 << 20), o.size64());
        try (InputStream in = o.getInputStream()) { show(in.read()); }
        o.close();
        c.commit();
        m.delete(oid);
        c.commit();
        try {
            m.open(oid);
            show("opened a deleted object");
        } catch (SQLException e) {
            // The message has the OID in it.
            show(e.getSQLState());
        }
        c.rollback();
        show(query(c, "select 'usable'"));
    }

    static void sessions(Connection c) throws Exception {
        try (Connection o = connect()) {
            show(query(c, "select pg_try_advisory_lock(770031)"), query(o, "select pg_try_advisory_lock(770031)"));
            exec(c, "create temp table mine(a int)");
            fails(() -> query(o, "select * from mine"));
            exec(c, "set work_mem to '5MB'");
            exec(c, "discard all");
            show(query(c, "select to_regclass('mine'), current_setting('work_mem') = '5MB'"),
                query(o, "select pg_try_advisory_lock(770031)"));
        }
        DatabaseMetaData m = c.getMetaData();
        exec(c, "create table " + SCHEMA + ".meta_t(id serial primary key, v varchar(9) not null default 'x', n numeric(5,2)[])");
        try (ResultSet r = m.getColumns(null, SCHEMA, "meta_t", null)) {
            while (r.next()) show(r.getString("COLUMN_NAME"), r.getString("TYPE_NAME"), r.getInt("COLUMN_SIZE"), r.getString("COLUMN_DEF"));
        }
        try (ResultSet r = m.getPrimaryKeys(null, SCHEMA, "meta_t")) { while (r.next()) show(r.getString("COLUMN_NAME"), r.getString("PK_NAME")); }
        String count = "select count(*) from pg_stat_activity where application_name = ?";
        Connection o = connect("ApplicationName", "drv_jdbc_close");
        show(query(c, count, "drv_jdbc_close"));
        o.close();
        // The server notices Terminate a moment later.
        boolean gone = false;
        for (int i = 0; i < 100 && !gone; i++) {
            gone = query(c, count, "drv_jdbc_close").toString().equals("[[0]]");
            if (!gone) Thread.sleep(50);
        }
        show("session gone", gone);
        // Several at once, from several threads.
        ExecutorService pool = Executors.newFixedThreadPool(8);
        List<Future<Object>> all = new ArrayList<>();
        for (int i = 0; i < 40; i++) {
            int n = i;
            all.add(pool.submit(() -> { try (Connection x = connect()) { return query(x, "select ?::int", n); } }));
        }
        StringBuilder s = new StringBuilder();
        for (Future<Object> f : all) s.append(f.get(10, TimeUnit.SECONDS));
        pool.shutdown();
        show(s);
    }

    static void clean(boolean create) throws Exception {
        try (Connection c = connect()) {
            for (Object gid : query(c, "select gid from pg_prepared_xacts where database = current_database() and gid like 'drv_jdbc%'"))
                exec(c, "rollback prepared '" + ((List<?>) gid).get(0) + "'");
            exec(c, "set client_min_messages to warning");
            exec(c, "drop schema if exists " + SCHEMA + " cascade");
            if (create) exec(c, "create schema " + SCHEMA);
        }
    }

    public static void main(String[] args) throws Exception {
        // Output must not depend on the machine's zone, language or charset.
        TimeZone.setDefault(TimeZone.getTimeZone("UTC"));
        Locale.setDefault(Locale.ROOT);
        System.setOut(new java.io.PrintStream(new java.io.FileOutputStream(java.io.FileDescriptor.out), true, StandardCharsets.UTF_8));
        CASES.put("startup", Jdbc::startup);
        CASES.put("startup_failures", Jdbc::startupFailures);
        CASES.put("query_modes", Jdbc::queryModes);
        CASES.put("prepared", Jdbc::prepared);
        CASES.put("types", Jdbc::types);
        CASES.put("large", Jdbc::large);
        CASES.put("batch", Jdbc::batch);
        CASES.put("copy", Jdbc::copy);
        CASES.put("cursors", Jdbc::cursors);
        CASES.put("transactions", Jdbc::transactions);
        CASES.put("errors", Jdbc::errors);
        CASES.put("listen_notify", Jdbc::listenNotify);
        CASES.put("cancel", Jdbc::cancel);
        CASES.put("large_objects", Jdbc::largeObjects);
        CASES.put("sessions", Jdbc::sessions);
        Thread watchdog = new Thread(() -> {
            try { Thread.sleep(60000); } catch (InterruptedException e) { return; }
            show("watchdog: over 60 s");
            Runtime.getRuntime().halt(3);
        });
        watchdog.setDaemon(true);
        watchdog.start();
        ExecutorService runner = Executors.newCachedThreadPool(r -> { Thread t = new Thread(r); t.setDaemon(true); return t; });
        clean(true);
        int failed = 0;
        for (Map.Entry<String, Case> e : CASES.entrySet()) {
            if (args.length > 0 && !Arrays.asList(args).contains(e.getKey())) continue;
            show("case:", e.getKey());
            try (Connection c = connect()) {
                runner.submit(() -> { e.getValue().run(c); return null; }).get(CASE_SECONDS, TimeUnit.SECONDS);
            } catch (Exception x) {
                failed++;
                Throwable t = x instanceof ExecutionException ? x.getCause() : x;
                show("unexpected", t.getClass().getSimpleName(), t instanceof SQLException ? ((SQLException) t).getSQLState() : "");
                t.printStackTrace();
            }
        }
        clean(false);
        show("done, unexpected failures:", failed);
        System.exit(failed > 0 ? 1 : 0);
    }
}
