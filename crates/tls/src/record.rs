//! The record layer: seals and opens TLS records from plain state (RFC 8446, 5.2 and 7.2; RFC 5246, 6.2.3.3;
//! RFC 7905). The state is small, holds no buffer, and can be continued by another process.

use ring::{aead, hkdf};
use rustls::{CipherSuite, ConnectionTrafficSecrets, ExtractedSecrets, ProtocolVersion};
use thiserror::Error;
use zeroize::Zeroize;

/// Bytes before the protected part of a record.
const HEADER_LEN: usize = 5;
/// Largest plaintext of one record (RFC 8446, 5.1).
pub const PLAIN_LEN_MAX: usize = 16_384;
/// Largest record that is accepted, header and expansion included (RFC 5246 allows 2,048 bytes of expansion).
pub const RECORD_LEN_MAX: usize = HEADER_LEN + PLAIN_LEN_MAX + 2_048;
/// Records sealed under one TLS 1.3 key; half of what AES-GCM allows at 2^24.5 (RFC 8446, 5.5).
const RECORDS_PER_KEY_MAX: u64 = 1 << 23;
/// Records without data that a peer may send in a row: key updates, empty records, tickets.
const RECORDS_WITHOUT_DATA_MAX: u32 = 32;
/// Largest post-handshake message; tickets are far smaller.
const HANDSHAKE_LEN_MAX: usize = 64 * 1024;

const TAG_LEN: usize = 16;
const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;
const ALERT_NO_RENEGOTIATION: u8 = 100;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RecordError {
    #[error("TLS record of {0} bytes is longer than {RECORD_LEN_MAX}")]
    TooLong(usize),
    #[error("TLS record cannot be opened")]
    Forged,
    #[error("TLS peer sent the alert {0}")]
    Alert(u8),
    #[error("TLS peer sent {RECORDS_WITHOUT_DATA_MAX} records without data in a row")]
    Idle,
    #[error("TLS peer sent an unexpected {0}")]
    Unexpected(&'static str),
    #[error("TLS records are exhausted for this key")]
    Exhausted,
}

/// What [`Record::open`] found at the start of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opened {
    /// The record is not whole yet.
    Incomplete,
    /// Plaintext stands at `start..start + len`; the record took `consumed` bytes.
    Data { consumed: usize, start: usize, len: usize },
    /// A record without data.
    Control { consumed: usize },
    /// The peer will send no more.
    Closed { consumed: usize },
}

/// One direction's keys. Only ever in one process: a nonce used twice gives the key away.
struct Direction {
    key: aead::LessSafeKey,
    iv: [u8; 12],
    seq: u64,
    /// TLS 1.3: the traffic secret that the next key grows from. Empty in TLS 1.2, which has no key update.
    secret: Vec<u8>,
}

impl Drop for Direction {
    fn drop(&mut self) {
        self.secret.zeroize();
        self.iv.zeroize();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    Tls12,
    Tls13,
}

/// Both directions of a connection after its handshake.
pub struct Record {
    version: Version,
    hkdf: hkdf::Algorithm,
    gcm: bool,
    tx: Direction,
    rx: Direction,
    /// Part of a post-handshake message that spans records.
    handshake: Vec<u8>,
    without_data: u32,
    records_per_key_max: u64,
}

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Record({:?}, tx {}, rx {})", self.version, self.tx.seq, self.rx.seq)
    }
}

impl Record {
    /// Continues where rustls left. None if the logged traffic secrets are not those of the extracted keys.
    pub(crate) fn from_secrets(
        version: ProtocolVersion,
        suite: CipherSuite,
        secrets: ExtractedSecrets,
        tx_secret: &[u8],
        rx_secret: &[u8],
    ) -> Option<Record> {
        let version = match version {
            ProtocolVersion::TLSv1_3 => Version::Tls13,
            ProtocolVersion::TLSv1_2 => Version::Tls12,
            _ => return None,
        };
        let hkdf = match suite {
            CipherSuite::TLS13_AES_256_GCM_SHA384 => hkdf::HKDF_SHA384,
            _ => hkdf::HKDF_SHA256,
        };
        let gcm = !matches!(secrets.tx.1, ConnectionTrafficSecrets::Chacha20Poly1305 { .. });
        let direction = |(seq, keys): (u64, ConnectionTrafficSecrets), secret: &[u8]| {
            let (algorithm, key, iv) = raw(&keys)?;
            if version == Version::Tls13 {
                let (expected_key, expected_iv) = keys_of(hkdf, secret, algorithm)?;
                if expected_key != key || expected_iv != iv {
                    return None;
                }
            }
            let secret = if version == Version::Tls13 { secret.to_vec() } else { Vec::new() };
            Some(Direction { key: less_safe(algorithm, key)?, iv, seq, secret })
        };
        Some(Record {
            version,
            hkdf,
            gcm,
            tx: direction(secrets.tx, tx_secret)?,
            rx: direction(secrets.rx, rx_secret)?,
            handshake: Vec::new(),
            without_data: 0,
            records_per_key_max: RECORDS_PER_KEY_MAX,
        })
    }

    /// Bytes that sealing `len` bytes of plaintext takes at most.
    pub fn sealed_len_max(len: usize) -> usize {
        len + (len / PLAIN_LEN_MAX + 2) * (HEADER_LEN + 8 + 1 + TAG_LEN)
    }

    /// Appends `plain` as records.
    ///
    /// # Errors
    /// TLS 1.2 has used up its sequence numbers.
    pub fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<(), RecordError> {
        for chunk in plain.chunks(PLAIN_LEN_MAX) {
            if self.version == Version::Tls13 && self.tx.seq >= self.records_per_key_max {
                self.update_tx_key(out)?;
            }
            self.seal_record(APPLICATION_DATA, chunk, out)?;
        }
        Ok(())
    }

    /// Appends the alert that ends this direction.
    ///
    /// # Errors
    /// As [`Record::seal`].
    pub fn seal_close(&mut self, out: &mut Vec<u8>) -> Result<(), RecordError> {
        self.seal_record(ALERT, &[1, 0], out)
    }

    fn seal_record(
        &mut self,
        content: u8,
        plain: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), RecordError> {
        let seq = self.tx.seq;
        self.tx.seq = seq.checked_add(1).ok_or(RecordError::Exhausted)?;
        let nonce = nonce(&self.tx.iv, seq);
        let explicit_nonce = self.version == Version::Tls12 && self.gcm;
        let inner_len = match self.version {
            Version::Tls13 => plain.len() + 1,
            Version::Tls12 if explicit_nonce => plain.len() + 8,
            Version::Tls12 => plain.len(),
        };
        let outer = if self.version == Version::Tls13 { APPLICATION_DATA } else { content };
        let header = header(outer, inner_len + TAG_LEN);
        out.extend_from_slice(&header);
        if explicit_nonce {
            out.extend_from_slice(&nonce[4..]);
        }
        let start = out.len();
        out.extend_from_slice(plain);
        let tag = match self.version {
            Version::Tls13 => {
                out.push(content);
                let nonce = aead::Nonce::assume_unique_for_key(nonce);
                self.tx.key.seal_in_place_separate_tag(
                    nonce,
                    aead::Aad::from(header),
                    &mut out[start..],
                )
            }
            Version::Tls12 => {
                let aad = aead::Aad::from(aad_tls12(seq, content, plain.len()));
                let nonce = aead::Nonce::assume_unique_for_key(nonce);
                self.tx.key.seal_in_place_separate_tag(nonce, aad, &mut out[start..])
            }
        };
        // ring refuses only plaintext of many gigabytes, which a record never holds.
        let tag = tag.map_err(|_| RecordError::Exhausted)?;
        out.extend_from_slice(tag.as_ref());
        Ok(())
    }

    /// Tells the peer that the next records use the next key, and uses it (RFC 8446, 4.6.3).
    fn update_tx_key(&mut self, out: &mut Vec<u8>) -> Result<(), RecordError> {
        self.seal_record(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 0], out)?;
        next_key(self.hkdf, &mut self.tx)
    }

    /// Opens the first record of `bytes` in place. What the protocol wants answered is appended to `reply`,
    /// as ciphertext.
    ///
    /// # Errors
    /// The record is forged, too long, an alert, or nothing that may come now. The connection is then unusable.
    pub fn open(&mut self, bytes: &mut [u8], reply: &mut Vec<u8>) -> Result<Opened, RecordError> {
        let Some(&[outer, _, _, high, low]) = bytes.first_chunk::<HEADER_LEN>() else {
            return Ok(Opened::Incomplete);
        };
        let len = usize::from(u16::from_be_bytes([high, low]));
        let consumed = HEADER_LEN + len;
        if consumed > RECORD_LEN_MAX {
            return Err(RecordError::TooLong(consumed));
        }
        let Some(record) = bytes.get_mut(..consumed) else { return Ok(Opened::Incomplete) };
        if self.version == Version::Tls13 && outer == CHANGE_CIPHER_SPEC {
            // Middlebox compatibility; it is not protected and has no number.
            self.count_without_data()?;
            return Ok(Opened::Control { consumed });
        }
        let (content, start, len) = self.open_record(outer, record)?;
        match content {
            APPLICATION_DATA if len > 0 => {
                self.without_data = 0;
                return Ok(Opened::Data { consumed, start, len });
            }
            APPLICATION_DATA => (),
            ALERT => match record.get(start..start + len) {
                // close_notify, and user_canceled which a close follows.
                Some([_, 0]) => return Ok(Opened::Closed { consumed }),
                Some([_, 90]) => (),
                Some([_, alert]) => return Err(RecordError::Alert(*alert)),
                _ => return Err(RecordError::Unexpected("alert")),
            },
            HANDSHAKE if self.version == Version::Tls13 => {
                let message = record.get(start..start + len).unwrap_or_default();
                if self.handshake.len() + message.len() > HANDSHAKE_LEN_MAX {
                    return Err(RecordError::Unexpected("length of a handshake message"));
                }
                self.handshake.extend_from_slice(message);
                self.on_handshake(reply)?;
            }
            // A renegotiation is declined by a warning; the peer may go on without it.
            HANDSHAKE => self.seal_record(ALERT, &[1, ALERT_NO_RENEGOTIATION], reply)?,
            _ => return Err(RecordError::Unexpected("content type")),
        }
        self.count_without_data()?;
        Ok(Opened::Control { consumed })
    }

    fn count_without_data(&mut self) -> Result<(), RecordError> {
        self.without_data += 1;
        if self.without_data > RECORDS_WITHOUT_DATA_MAX { Err(RecordError::Idle) } else { Ok(()) }
    }

    /// Opens one whole record: its content type, and where its plaintext stands.
    fn open_record(
        &mut self,
        outer: u8,
        record: &mut [u8],
    ) -> Result<(u8, usize, usize), RecordError> {
        let seq = self.rx.seq;
        self.rx.seq = seq.checked_add(1).ok_or(RecordError::Exhausted)?;
        match self.version {
            Version::Tls13 => {
                if outer != APPLICATION_DATA {
                    return Err(RecordError::Unexpected("unprotected record"));
                }
                let (head, body) = record.split_at_mut(HEADER_LEN);
                let aad: [u8; HEADER_LEN] = (&*head).try_into().map_err(|_| RecordError::Forged)?;
                let nonce = aead::Nonce::assume_unique_for_key(nonce(&self.rx.iv, seq));
                let plain = self
                    .rx
                    .key
                    .open_in_place(nonce, aead::Aad::from(aad), body)
                    .map_err(|_| RecordError::Forged)?;
                let end = plain.iter().rposition(|byte| *byte != 0);
                let end = end.ok_or(RecordError::Unexpected("record without content type"))?;
                if end > PLAIN_LEN_MAX {
                    return Err(RecordError::TooLong(end));
                }
                Ok((plain[end], HEADER_LEN, end))
            }
            Version::Tls12 => {
                let start = if self.gcm { HEADER_LEN + 8 } else { HEADER_LEN };
                if record.len() < start + TAG_LEN {
                    return Err(RecordError::Forged);
                }
                let (head, body) = record.split_at_mut(start);
                let mut nonce = nonce(&self.rx.iv, seq);
                if self.gcm {
                    nonce = self.rx.iv;
                    nonce[4..].copy_from_slice(&head[HEADER_LEN..]);
                }
                let aad = aead::Aad::from(aad_tls12(seq, outer, body.len() - TAG_LEN));
                let nonce = aead::Nonce::assume_unique_for_key(nonce);
                let plain =
                    self.rx.key.open_in_place(nonce, aad, body).map_err(|_| RecordError::Forged)?;
                if plain.len() > PLAIN_LEN_MAX {
                    return Err(RecordError::TooLong(plain.len()));
                }
                Ok((outer, start, plain.len()))
            }
        }
    }

    fn on_handshake(&mut self, reply: &mut Vec<u8>) -> Result<(), RecordError> {
        while let Some(&[kind, a, b, c]) = self.handshake.first_chunk::<4>() {
            let end =
                4 + usize::try_from(u32::from_be_bytes([0, a, b, c])).unwrap_or(usize::MAX - 4);
            if end > HANDSHAKE_LEN_MAX {
                return Err(RecordError::Unexpected("length of a handshake message"));
            }
            let Some(message) = self.handshake.get(4..end) else { return Ok(()) };
            match (kind, message) {
                // Nothing is resumed, so tickets are of no use.
                (NEW_SESSION_TICKET, _) => (),
                (KEY_UPDATE, [request @ (0 | 1)]) if self.handshake.len() == end => {
                    let request = *request;
                    next_key(self.hkdf, &mut self.rx)?;
                    if request == 1 {
                        self.update_tx_key(reply)?;
                    }
                }
                _ => return Err(RecordError::Unexpected("handshake message")),
            }
            self.handshake.drain(..end);
        }
        if self.handshake.is_empty() {
            self.handshake = Vec::new();
        }
        Ok(())
    }

    /// Sets how many records one key seals, so that tests see updates.
    #[cfg(test)]
    pub(crate) fn limit_records_per_key(&mut self, max: u64) {
        self.records_per_key_max = max;
    }
}

fn header(content: u8, len: usize) -> [u8; HEADER_LEN] {
    let [high, low] =
        u16::try_from(len).expect("a record is at most 16 KiB and its expansion").to_be_bytes();
    [content, 3, 3, high, low]
}

fn nonce(iv: &[u8; 12], seq: u64) -> [u8; 12] {
    let mut nonce = *iv;
    nonce[4..].iter_mut().zip(seq.to_be_bytes()).for_each(|(n, s)| *n ^= s);
    nonce
}

fn aad_tls12(seq: u64, content: u8, len: usize) -> [u8; 13] {
    let mut aad = [0; 13];
    aad[..8].copy_from_slice(&seq.to_be_bytes());
    aad[8..].copy_from_slice(&header(content, len));
    aad
}

type Raw<'a> = (&'static aead::Algorithm, &'a [u8], [u8; 12]);

fn raw(keys: &ConnectionTrafficSecrets) -> Option<Raw<'_>> {
    let (algorithm, key, iv) = match keys {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&aead::AES_128_GCM, key, iv),
        ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&aead::AES_256_GCM, key, iv),
        ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => {
            (&aead::CHACHA20_POLY1305, key, iv)
        }
        _ => return None,
    };
    let key = key.as_ref().get(..algorithm.key_len())?;
    Some((algorithm, key, iv.as_ref().try_into().ok()?))
}

fn less_safe(algorithm: &'static aead::Algorithm, key: &[u8]) -> Option<aead::LessSafeKey> {
    aead::UnboundKey::new(algorithm, key).ok().map(aead::LessSafeKey::new)
}

struct Len(usize);

impl hkdf::KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-Expand-Label with an empty context (RFC 8446, 7.1).
fn expand_label(hkdf: hkdf::Algorithm, secret: &[u8], label: &str, len: usize) -> Option<Vec<u8>> {
    let prk = hkdf::Prk::new_less_safe(hkdf, secret);
    let label = format!("tls13 {label}");
    let lens = (u16::try_from(len).ok()?.to_be_bytes(), [u8::try_from(label.len()).ok()?]);
    let info: [&[u8]; 4] = [&lens.0, &lens.1, label.as_bytes(), &[0]];
    let mut out = vec![0; len];
    prk.expand(&info, Len(len)).ok()?.fill(&mut out).ok()?;
    Some(out)
}

fn keys_of(
    hkdf: hkdf::Algorithm,
    secret: &[u8],
    algorithm: &aead::Algorithm,
) -> Option<(Vec<u8>, [u8; 12])> {
    let key = expand_label(hkdf, secret, "key", algorithm.key_len())?;
    let iv = expand_label(hkdf, secret, "iv", 12)?;
    Some((key, iv.try_into().ok()?))
}

/// Moves a direction to the next generation of its traffic secret (RFC 8446, 7.2).
fn next_key(hkdf: hkdf::Algorithm, direction: &mut Direction) -> Result<(), RecordError> {
    let algorithm = direction.key.algorithm();
    let next = || {
        let secret = expand_label(hkdf, &direction.secret, "traffic upd", direction.secret.len())?;
        let (mut key, iv) = keys_of(hkdf, &secret, algorithm)?;
        let sealed = less_safe(algorithm, &key);
        key.zeroize();
        Some((secret, sealed?, iv))
    };
    let (secret, key, iv) = next().ok_or(RecordError::Exhausted)?;
    direction.secret.zeroize();
    *direction = Direction { key, iv, seq: 0, secret };
    Ok(())
}
