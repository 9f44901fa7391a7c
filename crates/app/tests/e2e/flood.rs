//! A client that sends more than anybody reads.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use wire::backend::{self, Backend};
use wire::frame::{self, Side};
use wire::frontend;

use crate::support::{Installation, run, shown};

fn resident_bytes(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4_096
}

/// What a client sends while it is held stays with the client, but for a buffer's worth, and is all answered afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_floods_while_it_is_held_is_answered_afterwards() {
    const STATEMENTS: usize = 50_000;
    let installation = Installation::start("flood");
    let mut busy = installation.connect().await;
    let mut flood =
        tokio::net::TcpStream::connect(("127.0.0.1", installation.facts.port)).await.unwrap();
    let mut out = Vec::new();
    let user = [(b"user".as_slice(), b"postgres".as_slice())];
    wire::startup::startup_message(&mut out, wire::startup::Version::V3_0, user);
    flood.write_all(&out).await.unwrap();
    let (mut from, mut to) = flood.into_split();
    let mut reader = FrameReader::default();
    while reader.next(&mut from).await.0 != b'Z' {}
    run(&mut busy, "BEGIN; SELECT 1").await;
    let before = resident_bytes(installation.pid());
    let switch = installation.switch_until_it_holds().await;
    let padding = "x".repeat(1_000);
    let sent = tokio::spawn(async move {
        for n in 0..STATEMENTS {
            let mut out = Vec::new();
            frontend::query(&mut out, format!("SELECT {n} /* {padding} */").as_bytes());
            to.write_all(&out).await.unwrap();
        }
        to
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!sent.is_finished());
    let more = resident_bytes(installation.pid()).saturating_sub(before);
    assert!(more < 16 << 20, "{more} bytes more");
    run(&mut busy, "COMMIT").await;
    let mut expected = 0;
    while expected < STATEMENTS {
        let (tag, body) = reader.next(&mut from).await;
        if tag == b'D' {
            let Backend::DataRow(values) = backend::read(tag, &body).unwrap() else { panic!() };
            assert_eq!(values[0], Some(expected.to_string().as_bytes()));
            expected += 1;
        }
        assert_ne!(tag, b'E', "{}", String::from_utf8_lossy(&body));
    }
    let output = switch.await.unwrap();
    assert!(output.status.success(), "{}", shown(&output));
    drop(sent.await.unwrap());
}

/// Messages of a socket, one by one.
#[derive(Default)]
struct FrameReader {
    bytes: Vec<u8>,
    at: usize,
}

impl FrameReader {
    async fn next(&mut self, from: &mut tokio::net::tcp::OwnedReadHalf) -> (u8, Vec<u8>) {
        loop {
            let rest = &self.bytes[self.at..];
            if let Some((tag, body, len)) = frame::whole(Side::Backend, rest).unwrap() {
                let message = (tag, body.to_vec());
                self.at += len;
                return message;
            }
            self.bytes.drain(..std::mem::take(&mut self.at));
            assert!(from.read_buf(&mut self.bytes).await.unwrap() > 0);
        }
    }
}
