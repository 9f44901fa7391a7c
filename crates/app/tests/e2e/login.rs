//! SCRAM passed through without a password, TLS of every mode, cancel requests, limits.

use std::collections::BTreeSet;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tls::{ClientTls, SslMode};
use wire::frontend;
use wire::sqlstate::SqlState;

use crate::support::{
    HOLDFAST, Installation, Second, cancel, connect, extended, login, run, shown, value,
};

/// A second proxy before the same servers, with a configuration of its own.
fn second(installation: &Installation, name: &str, proxy: &str, app: &str) -> Second {
    let servers = ["a", "b"].map(|name| installation.facts.servers[name]);
    Second::start(&installation.dir.join(name), proxy, app, servers)
}

/// Makes server `a` ask roles other than the superuser for SCRAM, and gives it a role.
async fn ask_for_scram(installation: &Installation) {
    let path = installation.dir.join("a/pg_hba.conf");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("host all app 127.0.0.1/32 scram-sha-256\n{text}")).unwrap();
    let sql = "CREATE ROLE app LOGIN PASSWORD 'sesame'; SELECT pg_reload_conf()";
    run(&mut installation.direct("a").await, sql).await;
}

#[tokio::test]
async fn scram_is_passed_through_without_a_password() {
    let installation = Installation::start("scram");
    ask_for_scram(&installation).await;
    let proxy = second(&installation, "scram", "", "auth = \"scram\"\nsslmode = \"disable\"");
    let mut session = connect(proxy.port, "app", Some("sesame")).await.unwrap();
    assert_eq!(value(&mut session, "SELECT current_user").await, "app");
    for (user, password) in [("app", "simsim"), ("nobody", "sesame"), ("postgres", "")] {
        let error = connect(proxy.port, user, Some(password)).await.unwrap_err();
        let raw = String::from_utf8_lossy(error.raw_error().unwrap()).into_owned();
        assert!(raw.contains("C28P01"), "{user}: {raw}");
        assert!(
            raw.contains(&format!("password authentication failed for user \"{user}\"")),
            "{raw}"
        );
    }
    // A new password counts at once: the old one fails at the server, whatever is remembered here.
    run(&mut installation.direct("a").await, "ALTER ROLE app PASSWORD 'new'").await;
    assert!(connect(proxy.port, "app", Some("sesame")).await.is_err());
    assert!(connect(proxy.port, "app", Some("new")).await.is_ok());
}

/// Whoever gives up waiting for an answer does not get it as that to another question.
#[tokio::test]
async fn a_connection_that_owes_an_answer_is_asked_nothing_else() {
    let installation = Installation::start("out-of-step");
    let mut direct = installation.direct("a").await;
    let soon = Duration::from_millis(100);
    assert!(tokio::time::timeout(soon, direct.value("SELECT pg_sleep(1)")).await.is_err());
    let error = direct.value("SELECT 1").await.unwrap_err();
    assert!(matches!(error, pg::connection::QueryError::OutOfStep), "{error}");
    assert!(direct.into_stream().is_err());
}

#[tokio::test]
async fn what_is_answered_late_is_about_nobody_else() {
    let installation = Installation::start("late-verifier");
    ask_for_scram(&installation).await;
    let mut direct = installation.direct("a").await;
    run(
        &mut direct,
        "CREATE ROLE slow LOGIN PASSWORD 'slow'; CREATE ROLE other LOGIN PASSWORD 'other'",
    )
    .await;
    let limits = "login_timeout = \"1s\"";
    let proxy = second(&installation, "late", limits, "auth = \"scram\"\nsslmode = \"disable\"");
    drop(connect(proxy.port, "app", Some("sesame")).await.unwrap());
    // The connection on which secrets are asked for.
    let asks = "SELECT pid FROM pg_stat_activity WHERE query LIKE '%rolpassword%' AND pid <> pg_backend_pid()";
    let pid: u32 = value(&mut direct, asks).await.parse().unwrap();
    crate::support::signal(pid, "STOP");
    let given_up = connect(proxy.port, "slow", Some("slow")).await;
    crate::support::signal(pid, "CONT");
    assert!(given_up.is_err());
    let mut session = connect(proxy.port, "other", Some("other")).await.unwrap();
    assert_eq!(value(&mut session, "SELECT current_user").await, "other");
}

#[tokio::test]
async fn a_password_file_serves_development() {
    let installation = Installation::start("file");
    ask_for_scram(&installation).await;
    let file = installation.dir.join("users");
    std::fs::write(&file, "app:sesame\n").unwrap();
    let app = format!("auth = \"file\"\nauth_file = \"{}\"\nsslmode = \"disable\"", file.display());
    let proxy = second(&installation, "file", "", &app);
    let mut session = connect(proxy.port, "app", Some("sesame")).await.unwrap();
    assert_eq!(value(&mut session, "SELECT current_user").await, "app");
    assert!(connect(proxy.port, "app", Some("simsim")).await.is_err());
}

/// A certificate for `localhost` and `127.0.0.1`, and its key.
fn certificate(installation: &Installation) -> (PathBuf, PathBuf) {
    let names = vec!["localhost".into(), "127.0.0.1".into()];
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(names).unwrap();
    let (cert_path, key_path) =
        (installation.dir.join("cert.pem"), installation.dir.join("key.pem"));
    std::fs::write(&cert_path, cert.pem()).unwrap();
    std::fs::write(&key_path, signing_key.serialize_pem()).unwrap();
    (cert_path, key_path)
}

#[tokio::test]
async fn tls_of_every_mode_with_the_channel_bound() {
    let installation = Installation::start("tls");
    ask_for_scram(&installation).await;
    let (cert, key) = certificate(&installation);
    let section = format!(
        "[proxy.tls]\ncert = \"{}\"\nkey = \"{}\"\nrequired = true\n",
        cert.display(),
        key.display()
    );
    let proxy = second(&installation, "tls", &section, "auth = \"scram\"\nsslmode = \"disable\"");
    for mode in [SslMode::Require, SslMode::VerifyCa, SslMode::VerifyFull] {
        let tls = ClientTls::load(mode, Some(&cert), None).unwrap();
        let mut session = login(proxy.port, "app", Some("sesame"), tls, &[]).await.unwrap();
        // Answers of all sizes: many records, and one that fills several.
        for len in [1, 100, 16_384, 300_000] {
            let text = value(&mut session, &format!("SELECT repeat('x', {len})")).await;
            assert_eq!(text.len(), len);
        }
    }
    let error = connect(proxy.port, "app", Some("sesame")).await.unwrap_err();
    assert!(error.to_string().contains("TLS is required"), "{error}");
    // As PostgreSQL 17 and its clients: no SSLRequest. The client of this test is the one that servers see.
    let mut tls = ClientTls::load(SslMode::VerifyFull, Some(&cert), None).unwrap();
    tls.negotiation = tls::SslNegotiation::Direct;
    let mut session = login(proxy.port, "app", Some("sesame"), tls, &[]).await.unwrap();
    assert_eq!(value(&mut session, "SELECT current_user").await, "app");
    // OpenSSL's view of the same, with channel binding demanded, and a client that speaks TLS 1.2 at most.
    for options in ["channel_binding=require", "ssl_max_protocol_version=TLSv1.2"] {
        let dsn = format!(
            "host=localhost port={} user=app dbname=postgres sslmode=verify-full sslrootcert={} {options}",
            proxy.port,
            cert.display()
        );
        let output = Command::new("psql")
            .args(["-X", "-A", "-t", "-c", "SELECT length(repeat('y', 100000))", &dsn])
            .env("PGPASSWORD", "sesame")
            .output()
            .unwrap();
        assert_eq!(shown(&output).trim(), "100000", "{options}");
    }
}

/// An application's pools live in one of the threads that move bytes, and TLS on both sides is nobody's concern.
#[tokio::test]
async fn sessions_share_servers_behind_tls_and_on_two_engines() {
    let installation = Installation::start("tls-pool");
    ask_for_scram(&installation).await;
    let (cert, key) = certificate(&installation);
    let data = installation.dir.join("a");
    let owner = std::fs::metadata(&data).unwrap();
    for (from, name) in [(&cert, "server.crt"), (&key, "server.key")] {
        let to = data.join(name);
        std::fs::copy(from, &to).unwrap();
        std::fs::set_permissions(&to, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::os::unix::fs::chown(&to, Some(owner.uid()), Some(owner.gid())).unwrap();
    }
    let mut direct = installation.direct("a").await;
    run(&mut direct, "ALTER SYSTEM SET ssl = on").await;
    run(&mut direct, "SELECT pg_reload_conf()").await;
    let section = format!(
        "engines = 2\n[proxy.tls]\ncert = \"{}\"\nkey = \"{}\"\nrequired = true\n",
        cert.display(),
        key.display()
    );
    let app = format!(
        "auth = \"scram\"\nsslmode = \"verify-full\"\nsslrootcert = \"{}\"\npool = \"transaction\"\npool_size = 2",
        cert.display()
    );
    let proxy = second(&installation, "tls-pool", &section, &app);
    let mut sessions = Vec::new();
    for n in 0..12 {
        let tls = ClientTls::load(SslMode::VerifyFull, Some(&cert), None).unwrap();
        let mut session = login(proxy.port, "app", Some("sesame"), tls, &[]).await.unwrap();
        run(&mut session, &format!("SET app.number = '{n}'; SET lock_timeout = '{n}s'")).await;
        let mut out = Vec::new();
        let sql = b"SELECT current_setting('app.number') || $1 || ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        frontend::parse(&mut out, b"mine", sql, &[]);
        frontend::sync(&mut out);
        extended(&mut session, &out).await;
        sessions.push(session);
    }
    let mut pids = BTreeSet::new();
    for round in 0..4 {
        for (n, session) in sessions.iter_mut().enumerate() {
            let mut out = Vec::new();
            frontend::bind_text(&mut out, b"", b"mine", &[Some(format!(" {round} ").as_bytes())]);
            frontend::execute(&mut out, b"", 0);
            frontend::sync(&mut out);
            let found = extended(session, &out).await;
            assert_eq!(found, [Some(format!("{n} {round} true"))]);
            assert_eq!(
                value(session, "SHOW lock_timeout").await,
                if n == 0 { "0".into() } else { format!("{n}s") }
            );
            let long = value(session, "SELECT repeat('x', 200000)").await;
            assert_eq!(long.len(), 200_000);
            pids.insert(value(session, "SELECT pg_backend_pid()").await);
        }
    }
    // Custom settings cannot be taken from a server, so servers come and go, but no more than two are there.
    let servers = "SELECT count(*) FROM pg_stat_activity WHERE usename = 'app'";
    let servers: usize = value(&mut direct, servers).await.parse().unwrap();
    assert!(servers <= 2 && pids.len() >= 2, "{servers} servers, {}", pids.len());
}

#[tokio::test]
async fn a_cancel_request_reaches_its_query_and_no_other() {
    let installation = Installation::start("cancel");
    let mut session = installation.connect().await;
    let (pid, secret) = (session.pid, session.secret.clone());
    let cancel = async |secret: &[u8]| cancel(installation.facts.port, pid, secret).await;
    for cell in ["a", "b"] {
        if cell == "b" {
            installation.switch_to("b");
        }
        // With nothing running, and with a wrong secret, nothing happens.
        cancel(&secret).await;
        cancel(&[0; 4]).await;
        assert_eq!(value(&mut session, "SELECT 1").await, "1");
        let asked = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            cancel(&secret).await;
        };
        let (result, ()) = tokio::join!(session.query("SELECT pg_sleep(60)"), asked);
        assert_eq!(result.unwrap_err().sqlstate(), Some(SqlState::QUERY_CANCELED), "on {cell}");
        assert_eq!(value(&mut session, "SELECT 2").await, "2");
    }
}

#[tokio::test]
async fn one_client_too_many_is_told_and_idle_ones_are_ended() {
    let installation = Installation::start("limits");
    let limits = "clients_max = 2\nidle_timeout = \"1s\"";
    let proxy = second(&installation, "limits", limits, "auth = \"trust\"\nsslmode = \"disable\"");
    let mut first = connect(proxy.port, "postgres", None).await.unwrap();
    let _second = connect(proxy.port, "postgres", None).await.unwrap();
    let error = connect(proxy.port, "postgres", None).await.unwrap_err();
    assert!(error.to_string().contains("53300"), "{error}");
    let message = first.receive().await.unwrap();
    let wire::backend::Backend::Error(fields) = message.view().unwrap() else {
        panic!("{message:?}")
    };
    assert_eq!(fields.sqlstate(), Some(SqlState::IDLE_SESSION_TIMEOUT));
}

#[tokio::test]
async fn a_wrong_configuration_starts_nothing() {
    let path = std::env::temp_dir().join(format!("holdfast-wrong-{}.toml", std::process::id()));
    std::fs::write(&path, "[proxy]\nlisten = [\"x\"]\ncolour = 1\n").unwrap();
    for verb in ["check", "run"] {
        let output = Command::new(HOLDFAST).args([verb, "-c"]).arg(&path).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = shown(&output);
        assert!(text.contains("configuration has 3 mistakes"), "{text}");
        assert!(text.contains(":2: ") && text.contains(":3: `proxy.colour` is unknown"), "{text}");
    }
    std::fs::remove_file(&path).unwrap();
    assert_eq!(Command::new(HOLDFAST).arg("nonsense").output().unwrap().status.code(), Some(2));
}
