//! Both ends of a connection in memory: handshake, records, key updates, and what a hostile peer may try.

use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::config::{ClientCert, SslMode};
use crate::record::{Opened, RecordError};

struct Files {
    dir: PathBuf,
}

impl Files {
    /// A certificate for `localhost` and its key, signed by itself.
    fn new(name: &str) -> Files {
        let dir = std::env::temp_dir().join(format!("holdfast-tls-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        std::fs::write(dir.join("cert.pem"), cert.pem()).unwrap();
        std::fs::write(dir.join("key.pem"), signing_key.serialize_pem()).unwrap();
        Files { dir }
    }

    fn cert(&self) -> PathBuf {
        self.dir.join("cert.pem")
    }

    fn server(&self) -> ServerTls {
        let key = self.dir.join("key.pem");
        ServerTls::load(&self.cert(), &key, None, ClientCert::Optional).unwrap()
    }

    fn client(&self, mode: SslMode) -> ClientTls {
        ClientTls::load(mode, Some(&self.cert()), None).unwrap()
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn handshake(
    client: &ClientTls,
    server: &ServerTls,
    host: &str,
    chunk: usize,
) -> Result<(Established, Established), HandshakeError> {
    let mut ends = [Some(Handshake::client(client, host)?), Some(Handshake::server(server)?)];
    let mut done: [Option<Established>; 2] = [None, None];
    let mut wires: [Vec<u8>; 2] = [Vec::new(), Vec::new()];
    // The client speaks first; afterwards each end reads what the other wrote, `chunk` bytes at a time.
    let mut out = Vec::new();
    if let Progress::Pending(handshake) = ends[0].take().unwrap().advance(&[], &mut out)? {
        ends[0] = Some(*handshake);
    }
    wires[1] = out;
    for _ in 0..100_000 {
        for end in 0..2 {
            let taken: Vec<u8> = {
                let len = wires[end].len().min(chunk);
                wires[end].drain(..len).collect()
            };
            if taken.is_empty() {
                continue;
            }
            if let Some(established) = &mut done[end] {
                established.unread.extend_from_slice(&taken);
                continue;
            }
            let mut out = Vec::new();
            let progress = ends[end].take().unwrap().advance(&taken, &mut out)?;
            wires[1 - end].extend_from_slice(&out);
            match progress {
                Progress::Pending(handshake) => ends[end] = Some(*handshake),
                Progress::Done(established) => done[end] = Some(*established),
            }
        }
        if let [Some(_), Some(_)] = &done
            && wires.iter().all(Vec::is_empty)
        {
            let [client, server] = done;
            return Ok((client.unwrap(), server.unwrap()));
        }
    }
    panic!("the handshake does not end");
}

/// Sends `plain` from one end to the other and gives back what arrived.
fn pass(from: &mut Record, to: &mut Established, plain: &[u8], reply: &mut Vec<u8>) -> Vec<u8> {
    let mut wire = std::mem::take(&mut to.unread);
    from.seal(plain, &mut wire).unwrap();
    open_all(&mut to.record, &mut wire, reply).unwrap()
}

fn open_all(
    record: &mut Record,
    wire: &mut [u8],
    reply: &mut Vec<u8>,
) -> Result<Vec<u8>, RecordError> {
    let (mut at, mut got) = (0, Vec::new());
    loop {
        match record.open(&mut wire[at..], reply)? {
            Opened::Incomplete => return Ok(got),
            Opened::Control { consumed } => at += consumed,
            Opened::Closed { .. } => return Ok(got),
            Opened::Data { consumed, start, len } => {
                got.extend_from_slice(&wire[at + start..at + start + len]);
                at += consumed;
            }
        }
    }
}

#[test]
fn data_passes_both_ways_after_a_handshake_in_pieces_of_any_size() {
    let files = Files::new("pieces");
    for chunk in [1, 7, 100, 100_000] {
        let (mut client, mut server) =
            handshake(&files.client(SslMode::VerifyFull), &files.server(), "localhost", chunk)
                .unwrap();
        assert!(client.alpn && server.alpn);
        let big: Vec<u8> = (0..100_000u32).map(|n| n.to_le_bytes()[0]).collect();
        let mut reply = Vec::new();
        for text in [&b"select 1"[..], &big] {
            assert_eq!(pass(&mut client.record, &mut server, text, &mut reply), text);
            assert_eq!(pass(&mut server.record, &mut client, text, &mut reply), text);
        }
        assert!(reply.is_empty());
    }
}

#[test]
fn keys_are_updated_and_both_ends_follow() {
    let files = Files::new("update");
    let (mut client, mut server) =
        handshake(&files.client(SslMode::Require), &files.server(), "localhost", 4096).unwrap();
    client.record.limit_records_per_key(3);
    server.record.limit_records_per_key(2);
    let mut reply = Vec::new();
    for round in 0..50u8 {
        assert_eq!(pass(&mut client.record, &mut server, &[round; 9], &mut reply), [round; 9]);
        assert_eq!(pass(&mut server.record, &mut client, &[round; 9], &mut reply), [round; 9]);
    }
    assert!(format!("{:?}", client.record).contains("tx 2"), "{:?}", client.record);
}

#[test]
fn a_forged_record_is_refused() {
    let files = Files::new("forged");
    let (mut client, mut server) =
        handshake(&files.client(SslMode::Require), &files.server(), "localhost", 4096).unwrap();
    let mut wire = Vec::new();
    client.record.seal(b"select 1", &mut wire).unwrap();
    *wire.last_mut().unwrap() ^= 1;
    let result = open_all(&mut server.record, &mut wire, &mut Vec::new());
    assert_eq!(result, Err(RecordError::Forged));
}

#[test]
fn a_close_is_told_from_a_cut() {
    let files = Files::new("close");
    let (mut client, mut server) =
        handshake(&files.client(SslMode::Require), &files.server(), "localhost", 4096).unwrap();
    let mut wire = std::mem::take(&mut server.unread);
    client.record.seal_close(&mut wire).unwrap();
    let opened = server.record.open(&mut wire, &mut Vec::new()).unwrap();
    assert_eq!(opened, Opened::Closed { consumed: wire.len() });
}

#[test]
fn a_peer_that_sends_only_empty_records_is_refused() {
    let files = Files::new("idle");
    let (_, mut server) =
        handshake(&files.client(SslMode::Require), &files.server(), "localhost", 4096).unwrap();
    let mut wire: Vec<u8> = [20, 3, 3, 0, 1, 1].repeat(100);
    assert_eq!(open_all(&mut server.record, &mut wire, &mut Vec::new()), Err(RecordError::Idle));
}

#[test]
fn a_record_that_announces_too_much_is_refused_at_its_header() {
    let files = Files::new("long");
    let (_, mut server) =
        handshake(&files.client(SslMode::Require), &files.server(), "localhost", 4096).unwrap();
    let result = open_all(&mut server.record, &mut [23, 3, 3, 0xff, 0xff], &mut Vec::new());
    assert_eq!(result, Err(RecordError::TooLong(0xffff + 5)));
}

#[test]
fn modes_check_as_much_as_they_say() {
    let (ours, other) = (Files::new("modes"), Files::new("other"));
    let connect =
        |tls: &ClientTls, host: &str| handshake(tls, &ours.server(), host, 4096).map(|_| ());
    assert!(connect(&ours.client(SslMode::VerifyFull), "localhost").is_ok());
    assert!(connect(&ours.client(SslMode::VerifyFull), "db.example").is_err());
    assert!(connect(&ours.client(SslMode::VerifyCa), "db.example").is_ok());
    assert!(connect(&other.client(SslMode::VerifyCa), "localhost").is_err());
    assert!(connect(&other.client(SslMode::Require), "db.example").is_ok());
}

#[test]
fn a_required_client_certificate_is_required() {
    let files = Files::new("clientcert");
    let key = files.dir.join("key.pem");
    let server =
        ServerTls::load(&files.cert(), &key, Some(&files.cert()), ClientCert::VerifyCa).unwrap();
    let without = files.client(SslMode::Require);
    let result = handshake(&without, &server, "localhost", 4096);
    assert!(matches!(result, Err(HandshakeError::Refused(_))));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn garbage_instead_of_a_hello_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        thread_local!(static SERVER: ServerTls = Files::new("garbage").server());
        SERVER.with(|server| {
            let mut out = Vec::new();
            let _ = Handshake::server(server).unwrap().advance(&bytes, &mut out);
        });
    }
}
