//! The record layer against a peer who holds the keys and keeps to nothing, and against one in the middle who
//! does not hold them: what comes out is what the peer sealed, in its order, and never more.

#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use ring::aead;
use rustls::crypto::ring::cipher_suite::{
    TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, TLS13_AES_128_GCM_SHA256,
    TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
};
use rustls::crypto::{CryptoProvider, ring as provider};
use rustls::pki_types::CertificateDer;
use rustls::{ClientConfig, ClientConnection, ConnectionTrafficSecrets, RootCertStore};
use tls::config::ClientCert;
use tls::record::{PLAIN_LEN_MAX, RECORD_LEN_MAX};
use tls::{Handshake, Opened, Progress, Record, ServerTls};

const HEADER_LEN: usize = 5;
const APPLICATION_DATA: u8 = 23;
/// What one record of the peer may make Holdfast answer: an alert or a key update.
const REPLY_LEN_MAX: usize = 64;

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    suite: u8,
    steps: Vec<Step<'a>>,
    piece_len: u16,
}

#[derive(Debug, Arbitrary)]
enum Step<'a> {
    Data {
        plain: &'a [u8],
        times: u8,
    },
    /// Any content that a record may announce, padded where the version can.
    Content {
        content: u8,
        plain: &'a [u8],
        padding: u8,
    },
    /// Compatibility with middleboxes: not protected, and without meaning in TLS 1.3.
    ChangeCipherSpec,
    /// From here on somebody in the middle.
    Bytes(&'a [u8]),
    Flip {
        at: u16,
        bits: u8,
    },
    Again,
    Lost(&'a [u8]),
    Cut(u8),
}

/// One server identity, and a client for each suite.
struct Setup {
    server: ServerTls,
    clients: Vec<Arc<ClientConfig>>,
}

static SETUP: LazyLock<Setup> = LazyLock::new(|| {
    let dir = std::env::temp_dir().join(format!("holdfast-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory for the certificate");
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(vec!["localhost".into()]).expect("a certificate");
    let (cert_path, key_path) = (dir.join("cert.pem"), dir.join("key.pem"));
    std::fs::write(&cert_path, cert.pem()).expect("the certificate is written");
    std::fs::write(&key_path, signing_key.serialize_pem()).expect("the key is written");
    let server = ServerTls::load(&cert_path, &key_path, None, ClientCert::Optional)
        .expect("the certificate is of use");
    let _ = std::fs::remove_dir_all(&dir);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(cert.der().to_vec())).expect("an authority");
    let suites = [
        TLS13_AES_128_GCM_SHA256,
        TLS13_AES_256_GCM_SHA384,
        TLS13_CHACHA20_POLY1305_SHA256,
        TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    ];
    let client = |suite: rustls::SupportedCipherSuite| {
        let provider =
            CryptoProvider { cipher_suites: vec![suite], ..provider::default_provider() };
        let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[suite.version()])
            .expect("a suite has its version")
            .with_root_certificates(roots.clone())
            .with_no_client_auth();
        config.enable_secret_extraction = true;
        Arc::new(config)
    };
    Setup { server, clients: suites.map(client).to_vec() }
});

/// The peer's sending half, with which it can seal whatever it likes.
struct Peer {
    tls13: bool,
    /// In TLS 1.2, AES-GCM carries part of its nonce in the record.
    explicit_nonce: bool,
    key: aead::LessSafeKey,
    iv: [u8; 12],
    seq: u64,
}

impl Peer {
    fn seal(&mut self, content: u8, plain: &[u8], padding: u8) -> Vec<u8> {
        let mut nonce = self.iv;
        nonce[4..].iter_mut().zip(self.seq.to_be_bytes()).for_each(|(n, s)| *n ^= s);
        let mut body = plain.to_vec();
        let outer = if self.tls13 { APPLICATION_DATA } else { content };
        let mut record = vec![outer, 3, 3, 0, 0];
        let mut aad = Vec::new();
        if self.tls13 {
            body.push(content);
            body.resize(body.len() + usize::from(padding), 0);
        } else {
            aad.extend_from_slice(&self.seq.to_be_bytes());
        }
        if self.explicit_nonce {
            record.extend_from_slice(&nonce[4..]);
        }
        let sealed_len = record.len() - HEADER_LEN + body.len() + aead::MAX_TAG_LEN;
        let len = |len: usize| u16::try_from(len).expect("an input is short").to_be_bytes();
        record[3..HEADER_LEN].copy_from_slice(&len(sealed_len));
        aad.extend_from_slice(&record[..HEADER_LEN]);
        if !self.tls13 {
            let at = aad.len() - 2;
            aad[at..].copy_from_slice(&len(body.len()));
        }
        let nonce = aead::Nonce::assume_unique_for_key(nonce);
        self.key
            .seal_in_place_append_tag(nonce, aead::Aad::from(aad), &mut body)
            .expect("a record is short");
        self.seq += 1;
        record.extend_from_slice(&body);
        record
    }
}

fn connect(suite: usize) -> (Peer, Record) {
    let name = "localhost".try_into().expect("a host name");
    let config = SETUP.clients[suite].clone();
    let mut client = ClientConnection::new(config, name).expect("a client");
    let mut server = Some(Handshake::server(&SETUP.server).expect("a server"));
    let mut established = None;
    while client.is_handshaking() || established.is_none() {
        let mut sent = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut sent).expect("memory can be written");
        }
        let mut answer = Vec::new();
        match server.take().map(|server| server.advance(&sent, &mut answer)) {
            Some(Ok(Progress::Pending(pending))) => server = Some(*pending),
            Some(Ok(Progress::Done(done))) => established = Some(done),
            Some(Err(error)) => panic!("an honest handshake fails: {error}"),
            None => (),
        }
        let mut answer = &answer[..];
        while !answer.is_empty() {
            client.read_tls(&mut answer).expect("memory can be read");
            client.process_new_packets().expect("an honest handshake");
        }
    }
    let tls13 = client.protocol_version() == Some(rustls::ProtocolVersion::TLSv1_3);
    let secrets = client.dangerous_extract_secrets().expect("secrets may be extracted");
    let (seq, keys) = secrets.tx;
    let (algorithm, key, iv) = match &keys {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
            (&aead::CHACHA20_POLY1305, key, iv)
        }
        _ => panic!("a suite that was not offered"),
    };
    let explicit_nonce = !tls13 && algorithm != &aead::CHACHA20_POLY1305;
    let key = &key.as_ref()[..algorithm.key_len()];
    let key = aead::UnboundKey::new(algorithm, key).expect("a key of its length");
    let iv = iv.as_ref().try_into().expect("12 bytes");
    let key = aead::LessSafeKey::new(key);
    let established = established.expect("the loop ends with it");
    assert!(established.early.is_empty() && established.unread.is_empty());
    (Peer { tls13, explicit_nonce, key, iv, seq }, established.record)
}

/// What is on the wire, and all data that was sealed for it.
struct Wire {
    bytes: Vec<u8>,
    /// Where the last record begins.
    last: usize,
    plain: Vec<u8>,
    /// Nothing but data, unchanged: all of it must come out.
    only_data: bool,
}

impl Wire {
    fn push(&mut self, record: &[u8]) {
        self.last = self.bytes.len();
        self.bytes.extend_from_slice(record);
    }

    /// No two records hold the same, so that one out of its place is noticed.
    fn seal(&mut self, peer: &mut Peer, plain: &[u8], padding: u8) -> Vec<u8> {
        let plain = [&peer.seq.to_be_bytes(), plain].concat();
        self.plain.extend_from_slice(&plain);
        peer.seal(APPLICATION_DATA, &plain, padding)
    }

    fn take(&mut self, step: &Step<'_>, peer: &mut Peer) {
        self.only_data &= matches!(step, Step::Data { .. });
        match *step {
            Step::Data { plain, times } => {
                let mut plain = plain.repeat(usize::from(times));
                plain.truncate(PLAIN_LEN_MAX - 8);
                let record = self.seal(peer, &plain, 0);
                self.push(&record);
            }
            Step::Content { content, plain, padding } => {
                // Half of them of the kinds that exist.
                let content = if content < 128 { 20 + content % 4 } else { content };
                let record = match content {
                    APPLICATION_DATA => self.seal(peer, plain, padding),
                    content => peer.seal(content, plain, padding),
                };
                self.push(&record);
            }
            Step::ChangeCipherSpec => self.push(&[20, 3, 3, 0, 1, 1]),
            Step::Bytes(bytes) => self.push(bytes),
            Step::Flip { at, bits } => {
                let len = self.bytes.len() - self.last;
                if let Some(byte) = self.bytes.get_mut(self.last + usize::from(at) % len.max(1)) {
                    *byte ^= bits;
                }
            }
            Step::Again => {
                let again = self.bytes[self.last..].to_vec();
                self.push(&again);
            }
            Step::Lost(plain) => drop(self.seal(peer, plain, 0)),
            Step::Cut(len) => {
                self.bytes.truncate(self.bytes.len().saturating_sub(usize::from(len)));
                self.last = self.last.min(self.bytes.len());
            }
        }
    }
}

fuzz_target!(|input: Input<'_>| {
    let (mut peer, mut record) = connect(usize::from(input.suite) % SETUP.clients.len());
    let mut wire = Wire { bytes: Vec::new(), last: 0, plain: Vec::new(), only_data: true };
    for step in &input.steps {
        wire.take(step, &mut peer);
    }

    let (mut buffer, mut got, mut reply) = (Vec::new(), Vec::new(), Vec::new());
    'wire: for piece in wire.bytes.chunks(usize::from(input.piece_len).max(1)) {
        buffer.extend_from_slice(piece);
        let mut at = 0;
        loop {
            let replied = reply.len();
            let opened = record.open(&mut buffer[at..], &mut reply);
            assert!(reply.len() - replied <= REPLY_LEN_MAX);
            match opened {
                Ok(Opened::Incomplete) => break,
                Ok(Opened::Control { consumed }) => at += consumed,
                Ok(Opened::Data { consumed, start, len }) => {
                    assert!(len > 0 && len <= PLAIN_LEN_MAX && start + len <= consumed);
                    got.extend_from_slice(&buffer[at + start..at + start + len]);
                    at += consumed;
                }
                Ok(Opened::Closed { .. }) => break 'wire,
                Err(error) => {
                    assert!(!wire.only_data, "honest records are refused: {error}");
                    break 'wire;
                }
            }
        }
        buffer.drain(..at);
        assert!(buffer.len() < RECORD_LEN_MAX, "more than a record is waited for");
    }
    assert!(wire.plain.starts_with(&got), "data that the peer did not seal");
    assert!(!wire.only_data || got == wire.plain, "data was lost");
});
