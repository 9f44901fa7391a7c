//! Bytes that no honest client sends. Each is answered by a proper error where the protocol allows, the
//! connection is closed, and everybody else goes on.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use wire::frontend;

use crate::support::{Installation, run, value};

/// Sends bytes and gives all that comes back until the connection is closed.
fn answer_to(port: u16, bytes: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    // The proxy may close while this is still sending.
    let _ = socket.write_all(bytes);
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    answer
}

fn startup(params: &[(&str, &str)]) -> Vec<u8> {
    let mut out = Vec::new();
    let params = params.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes()));
    wire::startup::startup_message(&mut out, wire::startup::Version::V3_0, params);
    out
}

#[track_caller]
fn assert_told(answer: &[u8], state: &str) {
    let text = String::from_utf8_lossy(answer);
    assert!(text.contains(&format!("C{state}")), "no {state} in {text:?}");
}

#[tokio::test]
async fn hostile_bytes_are_refused_and_others_go_on() {
    let installation = Installation::start("hostile");
    let port = installation.facts.port;
    let mut witness = installation.connect().await;
    run(&mut witness, "SET work_mem = '7MB'").await;
    let user = [("user", "postgres")];

    // Before the login.
    assert_told(&answer_to(port, &[0xff; 64]), "08P01");
    assert_told(&answer_to(port, b"GET / HTTP/1.1\r\n\r\n"), "08P01");
    assert_told(&answer_to(port, &[0, 0, 0, 7, 0, 3, 0, 0]), "08P01");
    assert_told(&answer_to(port, &[0, 0, 0, 9, 0, 2, 0, 0, 0]), "08P01");
    assert_told(&answer_to(port, &startup(&[])), "28000");
    assert_told(
        &answer_to(port, &startup(&[("user", "postgres"), ("database", "no such one")])),
        "3D000",
    );
    assert_told(&answer_to(port, &startup(&[("user", "nobody at all")])), "28000");
    let mut unterminated = startup(&user);
    unterminated.pop();
    let len = u32::try_from(unterminated.len()).unwrap();
    unterminated[..4].copy_from_slice(&len.to_be_bytes());
    assert_told(&answer_to(port, &unterminated), "08P01");

    // After the login: an unknown message, lengths that lie, a message that belongs to the other side.
    for bad in [
        &b"\x00\x00\x00\x00\x04"[..],
        b"Q\x00\x00\x00\x03",
        b"S\x7f\xff\xff\xff",
        b"Q\xff\xff\xff\xff",
        b"Z\x00\x00\x00\x05I",
    ] {
        let mut bytes = startup(&user);
        bytes.extend_from_slice(bad);
        assert_told(&answer_to(port, &bytes), "08P01");
    }
    // A cancel request for nobody is silently closed, as the server does.
    let mut cancel = Vec::new();
    wire::startup::cancel_request(&mut cancel, 1, &[1, 2, 3, 4]);
    assert_eq!(answer_to(port, &cancel), b"");

    assert_eq!(value(&mut witness, "SHOW work_mem").await, "7MB");
}

#[tokio::test]
async fn a_huge_announced_length_costs_no_memory() {
    let installation = Installation::start("announced");
    let before = rss_kib(installation.pid());
    let mut sockets = Vec::new();
    for _ in 0..50 {
        let mut socket = TcpStream::connect(("127.0.0.1", installation.facts.port)).unwrap();
        socket.write_all(&startup(&[("user", "postgres")])).unwrap();
        // A query of a gigabyte is announced; a few bytes of it come.
        socket.write_all(b"Q\x3f\xff\xff\xf0select").unwrap();
        sockets.push(socket);
    }
    let mut witness = installation.connect().await;
    assert_eq!(value(&mut witness, "SELECT 1").await, "1");
    let grown = rss_kib(installation.pid()) - before;
    assert!(grown < 20 * 1024, "{grown} KiB for 50 clients");
}

fn rss_kib(pid: u32) -> i64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn messages_cut_at_every_byte_arrive_whole() {
    let installation = Installation::start("cut");
    let mut messages = startup(&[("user", "postgres"), ("database", "postgres")]);
    let login_len = messages.len();
    frontend::query(&mut messages, b"select 'simple'");
    frontend::parse(&mut messages, b"s", b"select $1::text", &[]);
    frontend::bind_text(&mut messages, b"", b"s", &[Some(b"extended")]);
    frontend::describe(&mut messages, frontend::Target::Statement(b"s"));
    frontend::execute(&mut messages, b"", 0);
    frontend::close(&mut messages, frontend::Target::Statement(b"s"));
    frontend::sync(&mut messages);
    frontend::terminate(&mut messages);
    let mut expected = None;
    for cut in (login_len + 1)..messages.len() {
        let mut socket = TcpStream::connect(("127.0.0.1", installation.facts.port)).unwrap();
        socket.set_nodelay(true).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.write_all(&messages[..cut]).unwrap();
        std::thread::sleep(Duration::from_millis(3));
        socket.write_all(&messages[cut..]).unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).unwrap();
        // The login's part differs in its key; the rest must not differ.
        let ready = answer.windows(6).position(|window| window == b"Z\0\0\0\x05I").unwrap();
        let rest = answer.split_off(ready);
        let text = String::from_utf8_lossy(&rest);
        assert!(text.contains("simple") && text.contains("extended"), "cut at {cut}: {text:?}");
        assert_eq!(*expected.get_or_insert(rest.clone()), rest, "cut at {cut}");
    }
}

#[tokio::test]
async fn clients_that_vanish_leave_nothing_behind() {
    let installation = Installation::start("vanish");
    let mut witness = installation.connect().await;
    for _ in 0..20 {
        let mut socket = TcpStream::connect(("127.0.0.1", installation.facts.port)).unwrap();
        socket.write_all(&startup(&[("user", "postgres")])).unwrap();
        let mut first = [0; 64];
        let _ = socket.read(&mut first).unwrap();
        let mut query = Vec::new();
        frontend::query(&mut query, b"select pg_sleep(0.01)");
        socket.write_all(&query).unwrap();
        let _ = socket.shutdown(Shutdown::Both);
    }
    let left = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()";
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while value(&mut witness, left).await != "0" {
        assert!(std::time::Instant::now() < deadline, "backends are left over");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let files = std::fs::read_dir(format!("/proc/{}/fd", installation.pid())).unwrap().count();
    assert!(files < 60, "{files} descriptors are open");
}

#[tokio::test]
async fn a_pipeline_longer_than_the_queue_of_requests_is_answered_whole() {
    let installation = Installation::start("pipeline");
    let mut session = installation.connect().await;
    let syncs = 70_000;
    let mut out = Vec::new();
    frontend::query(&mut out, b"select pg_sleep(0.3)");
    (0..syncs).for_each(|_| frontend::sync(&mut out));
    session.send(&out).await.unwrap();
    for answered in 0..=syncs {
        let answer = tokio::time::timeout(Duration::from_secs(20), session.answers()).await;
        assert!(answer.is_ok(), "{answered} of {} were answered", syncs + 1);
        answer.unwrap().unwrap();
    }
}
