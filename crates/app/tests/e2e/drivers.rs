//! Real drivers, once directly and once through the proxy: what they print must be the same to the byte.
//! The programs are in `tests/drivers`; `cargo xtask setup` installs what they need.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::{Installation, run, shown};

fn programs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/drivers")
}

fn compare(name: &str, program: &str, args: &[&str]) {
    let installation = Installation::start(name);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let sql = "CREATE ROLE drv LOGIN PASSWORD 'drv'";
        run(&mut installation.direct("a").await, sql).await;
        run(&mut installation.direct("a").await, "CREATE DATABASE drv OWNER drv").await;
    });
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"), PathBuf::from);
    let transcript = |port: u16| {
        let output = Command::new(program)
            .args(args)
            .current_dir(programs())
            .env("PGHOST", "127.0.0.1")
            .env("PGPORT", port.to_string())
            .env("PGUSER", "drv")
            .env("PGDATABASE", "drv")
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .env("NODE_PATH", target.join("drivers/node/usr/share/nodejs"))
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|error| panic!("{program}: {error}; `cargo xtask setup` installs it"));
        assert!(output.status.success(), "{name}: {}", shown(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let (direct, proxied) =
        (transcript(installation.facts.servers["a"]), transcript(installation.facts.port));
    assert!(direct.lines().count() > 20, "{direct}");
    for (at, (a, b)) in direct.lines().zip(proxied.lines()).enumerate() {
        assert_eq!(a, b, "line {} of {name}", at + 1);
    }
    assert_eq!(direct.lines().count(), proxied.lines().count());
}

#[test]
fn psycopg_sees_no_difference() {
    compare("psycopg", "/usr/bin/python3", &["psycopg_driver.py"]);
}

#[test]
fn asyncpg_sees_no_difference() {
    compare("asyncpg", "/usr/bin/python3", &["asyncpg_driver.py"]);
}

#[test]
fn node_postgres_sees_no_difference() {
    compare("node", "node", &["node_pg.js"]);
}

#[test]
fn jdbc_sees_no_difference() {
    compare("jdbc", "java", &["-cp", "/usr/share/java/postgresql.jar", "Jdbc.java"]);
}

#[test]
fn psql_sees_no_difference() {
    compare("psql", "sh", &["psql.sh"]);
}

#[test]
fn pgbench_sees_no_difference() {
    compare("pgbench", "sh", &["pgbench.sh"]);
}

#[tokio::test]
async fn tokio_postgres_works_through_a_switchover() {
    let installation = Installation::start("tokio");
    let dsn =
        format!("host=127.0.0.1 port={} user=postgres dbname=postgres", installation.facts.port);
    let (client, connection) = tokio_postgres::connect(&dsn, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    let statement = client.prepare("SELECT $1::int8 + 1").await.unwrap();
    for cell in ["b", "a"] {
        let row = client.query_one(&statement, &[&41i64]).await.unwrap();
        assert_eq!(row.get::<_, i64>(0), 42);
        installation.switch_to(cell);
    }
    let row = client.query_one(&statement, &[&1i64]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 2);
}
