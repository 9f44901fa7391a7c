//! Reading and writing one of a session's two sockets, in the clear or under TLS, without waiting.

use std::io;

use tls::Opened;

use super::sys;
use crate::session::Leg;

/// Bytes read at once; also what one session may move before the others have their turn.
const READ_LEN: usize = 64 * 1024;
/// Room for a carried part of a message before what is read.
pub(super) const BUFFER_LEN: usize = 4 * READ_LEN;

/// Shared by all sessions of the engine, so that an idle one has none.
pub(super) struct Buffers {
    pub(super) plain: Vec<u8>,
    pub(super) cipher: Vec<u8>,
    pub(super) sealed: Vec<u8>,
    /// Where bytes are put together that are not passed on as they came.
    pub(super) scratch: Vec<u8>,
}

impl Buffers {
    pub(super) fn new() -> Buffers {
        Buffers {
            plain: vec![0; BUFFER_LEN],
            cipher: vec![0; BUFFER_LEN],
            sealed: Vec::new(),
            scratch: Vec::new(),
        }
    }
}

pub(super) fn flush(leg: &mut Leg) -> io::Result<()> {
    while leg.has_out() {
        match sys::send(leg.raw(), leg.out.get(leg.sent..).unwrap_or_default()) {
            Ok(len) => leg.sent += len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
    }
    leg.out = Vec::new();
    leg.sent = 0;
    Ok(())
}

/// Reads into `plain`, behind what was carried. Gives how much stands there, and whether the peer has closed.
pub(super) fn fill(
    leg: &mut Leg,
    plain: &mut [u8],
    cipher: &mut [u8],
    sealed: &mut Vec<u8>,
) -> io::Result<(usize, bool)> {
    let carried = leg.carry.len();
    plain.get_mut(..carried).ok_or(io::ErrorKind::OutOfMemory)?.copy_from_slice(&leg.carry);
    let room = plain.get_mut(carried..).unwrap_or_default();
    let fd = leg.raw();
    let Some(tls) = &mut leg.tls else {
        let room = room.get_mut(..READ_LEN).ok_or(io::ErrorKind::OutOfMemory)?;
        return match sys::receive(fd, room) {
            Ok(0) => Ok((carried, true)),
            Ok(len) => {
                // A peer that has closed is read until it says so: no edge comes for that any more.
                leg.readable = len == room.len() || leg.eof;
                Ok((carried + len, false))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                leg.readable = false;
                Ok((carried, false))
            }
            Err(error) => Err(error),
        };
    };
    let kept = leg.cipher.len();
    cipher.get_mut(..kept).ok_or(io::ErrorKind::OutOfMemory)?.copy_from_slice(&leg.cipher);
    let into = cipher.get_mut(kept..kept + READ_LEN).ok_or(io::ErrorKind::OutOfMemory)?;
    let mut closed = false;
    let received = match sys::receive(fd, into) {
        Ok(0) => {
            closed = true;
            0
        }
        Ok(len) => {
            leg.readable = len == READ_LEN || leg.eof;
            len
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            leg.readable = false;
            0
        }
        Err(error) => return Err(error),
    };
    let whole = cipher.get_mut(..kept + received).unwrap_or_default();
    let (mut at, mut filled) = (0, 0);
    sealed.clear();
    loop {
        let rest = whole.get_mut(at..).unwrap_or_default();
        match tls.open(rest, sealed).map_err(io::Error::other)? {
            Opened::Incomplete => break,
            Opened::Control { consumed } => at += consumed,
            Opened::Closed { consumed } => {
                at += consumed;
                closed = true;
                break;
            }
            Opened::Data { consumed, start, len } => {
                let text = rest.get(start..start + len).unwrap_or_default();
                room.get_mut(filled..filled + len)
                    .ok_or(io::ErrorKind::OutOfMemory)?
                    .copy_from_slice(text);
                filled += len;
                at += consumed;
            }
        }
    }
    keep(&mut leg.cipher, whole.get(at..).unwrap_or_default());
    if !sealed.is_empty() {
        leg.out.extend_from_slice(sealed);
        flush(leg)?;
    }
    Ok((carried + filled, closed))
}

/// Keeps what is left over; almost always nothing, and then no memory.
pub(super) fn keep(place: &mut Vec<u8>, rest: &[u8]) {
    place.clear();
    if rest.is_empty() {
        if place.capacity() > 0 {
            *place = Vec::new();
        }
    } else {
        place.extend_from_slice(rest);
    }
}

/// Sends at once what the socket takes, and keeps the rest.
pub(super) fn pass_on(leg: &mut Leg, bytes: &[u8], sealed: &mut Vec<u8>) -> io::Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    let bytes = match &mut leg.tls {
        None => bytes,
        Some(tls) => {
            sealed.clear();
            tls.seal(bytes, sealed).map_err(io::Error::other)?;
            sealed.as_slice()
        }
    };
    let mut sent = 0;
    if !leg.has_out() {
        sent = match sys::send(leg.raw(), bytes) {
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(error),
        };
    }
    if sent < bytes.len() {
        leg.out.extend_from_slice(bytes.get(sent..).unwrap_or_default());
    }
    Ok(())
}
