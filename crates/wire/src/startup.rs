//! What a client sends before the first tagged message: encryption requests, a cancel request, or the startup
//! packet. Limits as in `src/backend/tcop/backend_startup.c`.

use crate::read::{Malformed, Reader};
use crate::write;
use thiserror::Error;

/// Largest startup packet, as `MAX_STARTUP_PACKET_LENGTH`.
pub const PACKET_LEN_MAX: u32 = 10_000;

/// Longest secret of a cancel request (protocol 3.2: up to 256 bytes).
pub const CANCEL_SECRET_LEN_MAX: usize = 256;

/// A protocol version: major in the high half, minor in the low half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl Version {
    pub const V3_0: Version = Version(3 << 16);
    pub const V3_2: Version = Version((3 << 16) | 2);

    pub fn major(self) -> u32 {
        self.0 >> 16
    }

    pub fn minor(self) -> u32 {
        self.0 & 0xffff
    }
}

const CANCEL_CODE: u32 = (1234 << 16) | 5678;
const SSL_CODE: u32 = (1234 << 16) | 5679;
const GSSENC_CODE: u32 = (1234 << 16) | 5680;

/// First byte of a TLS handshake record: a client that starts TLS directly (`sslnegotiation=direct`).
pub const TLS_HANDSHAKE_BYTE: u8 = 0x16;

/// The first packet of a connection, or the one after an encryption request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum First<'a> {
    Ssl,
    GssEnc,
    Cancel { pid: i32, secret: &'a [u8] },
    Startup(Startup<'a>),
}

/// The startup packet: a version and pairs of names and values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Startup<'a> {
    pub version: Version,
    pub params: Vec<(&'a [u8], &'a [u8])>,
}

impl<'a> Startup<'a> {
    /// The value of a parameter; the last one wins, as in the server.
    pub fn param(&self, name: &str) -> Option<&'a [u8]> {
        self.params.iter().rev().find(|(n, _)| *n == name.as_bytes()).map(|(_, v)| *v)
    }
}

/// The bytes cannot be a first packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum StartupError {
    #[error("invalid length {len} of startup packet, at most {PACKET_LEN_MAX} is allowed")]
    Length { len: u32 },
    #[error("unsupported frontend protocol {}.{}: this proxy supports 3.0 to 3.2", .0.major(), .0.minor())]
    Version(Version),
    #[error("invalid startup packet layout")]
    Layout(#[source] Malformed),
}

/// Splits the first packet off `bytes`: the packet and its length in all. `Ok(None)` while it is not whole.
///
/// # Errors
/// The packet is longer than allowed, of an unknown protocol, or not made of name and value pairs.
pub fn first(bytes: &[u8]) -> Result<Option<(First<'_>, usize)>, StartupError> {
    let Some(head) = bytes.first_chunk::<4>() else { return Ok(None) };
    let len = u32::from_be_bytes(*head);
    if !(8..=PACKET_LEN_MAX).contains(&len) {
        return Err(StartupError::Length { len });
    }
    let end = usize::try_from(len).unwrap_or(usize::MAX);
    let Some(packet) = bytes.get(4..end) else { return Ok(None) };
    let mut reader = Reader::new(packet);
    let code = reader.u32("protocol version").map_err(StartupError::Layout)?;
    let packet = match code {
        SSL_CODE => First::Ssl,
        GSSENC_CODE => First::GssEnc,
        CANCEL_CODE => {
            let pid = reader.i32("process id").map_err(StartupError::Layout)?;
            let secret = reader.rest();
            if secret.is_empty() || secret.len() > CANCEL_SECRET_LEN_MAX {
                return Err(StartupError::Length { len });
            }
            First::Cancel { pid, secret }
        }
        _ => First::Startup(startup(Version(code), reader)?),
    };
    Ok(Some((packet, end)))
}

fn startup(version: Version, mut reader: Reader<'_>) -> Result<Startup<'_>, StartupError> {
    // A newer minor version is answered with a negotiation, as the server does; another major is refused.
    if version.major() != 3 {
        return Err(StartupError::Version(version));
    }
    let mut params = Vec::new();
    loop {
        let name = reader.cstr("parameter name").map_err(StartupError::Layout)?;
        if name.is_empty() {
            break;
        }
        let value = reader.cstr("parameter value").map_err(StartupError::Layout)?;
        params.push((name, value));
    }
    reader.end().map_err(StartupError::Layout)?;
    Ok(Startup { version, params })
}

pub fn ssl_request(out: &mut Vec<u8>) {
    write::untagged(out, |out| out.extend_from_slice(&SSL_CODE.to_be_bytes()));
}

pub fn gssenc_request(out: &mut Vec<u8>) {
    write::untagged(out, |out| out.extend_from_slice(&GSSENC_CODE.to_be_bytes()));
}

pub fn cancel_request(out: &mut Vec<u8>, pid: i32, secret: &[u8]) {
    write::untagged(out, |out| {
        out.extend_from_slice(&CANCEL_CODE.to_be_bytes());
        out.extend_from_slice(&pid.to_be_bytes());
        out.extend_from_slice(secret);
    });
}

pub fn startup_message<'a>(
    out: &mut Vec<u8>,
    version: Version,
    params: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
) {
    write::untagged(out, |out| {
        out.extend_from_slice(&version.0.to_be_bytes());
        for (name, value) in params {
            write::cstr(out, name);
            write::cstr(out, value);
        }
        out.push(0);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut out = Vec::new();
        let params: [(&[u8], &[u8]); 2] = [(b"user", b"app"), (b"options", b"-c geqo=off")];
        startup_message(&mut out, Version::V3_0, params);
        out
    }

    #[test]
    fn a_startup_packet_is_whole_only_at_its_last_byte() {
        let bytes = sample();
        for end in 0..bytes.len() {
            assert_eq!(first(&bytes[..end]), Ok(None), "{end} bytes");
        }
        let (packet, len) = first(&bytes).unwrap().unwrap();
        assert_eq!(len, bytes.len());
        let First::Startup(startup) = packet else { panic!("{packet:?}") };
        assert_eq!(startup.param("user"), Some(&b"app"[..]));
        assert_eq!(startup.param("database"), None);
    }

    #[test]
    fn a_packet_that_announces_too_much_is_refused_at_four_bytes() {
        assert_eq!(first(&[0, 0, 0x27, 0x11]), Err(StartupError::Length { len: 10_001 }));
        assert_eq!(first(&[0, 0, 0, 7]), Err(StartupError::Length { len: 7 }));
    }

    #[test]
    fn a_packet_without_its_last_zero_is_refused() {
        let mut bytes = sample();
        bytes.pop();
        let len = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&len.to_be_bytes());
        assert!(matches!(first(&bytes), Err(StartupError::Layout(_))));
    }

    #[test]
    fn protocol_two_is_refused_and_a_later_minor_is_not() {
        let mut two = Vec::new();
        startup_message(&mut two, Version(2 << 16), []);
        assert_eq!(first(&two), Err(StartupError::Version(Version(2 << 16))));
        let mut later = Vec::new();
        startup_message(&mut later, Version(3 << 16 | 9999), []);
        assert!(first(&later).unwrap().is_some());
    }

    #[test]
    fn a_cancel_request_round_trips() {
        let mut bytes = Vec::new();
        cancel_request(&mut bytes, 42, &[9; 32]);
        assert_eq!(
            first(&bytes),
            Ok(Some((First::Cancel { pid: 42, secret: &[9; 32] }, bytes.len())))
        );
    }
}
