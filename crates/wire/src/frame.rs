//! A message is a tag, a length and a body. This file steps over messages in place, without a copy.

use thiserror::Error;

/// Bytes of a tagged message before its body: the tag, and the length that counts itself.
pub const HEADER_LEN: usize = 5;

/// Largest body of messages that carry data, as `PQ_LARGE_MESSAGE_LIMIT` in `src/include/libpq/libpq.h`.
pub const LARGE_LEN_MAX: u32 = 0x3fff_fffe;

/// Largest body of messages that carry none, as `PQ_SMALL_MESSAGE_LIMIT`.
pub const SMALL_LEN_MAX: u32 = 10_000;

/// Largest body of a password or SASL message, as `PG_MAX_AUTH_TOKEN_LENGTH`.
pub const AUTH_LEN_MAX: u32 = 65_535;

/// The peer sent bytes that cannot be a message. Nothing after them can be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FrameError {
    #[error("invalid message type {tag}")]
    Tag { tag: u8 },
    #[error("invalid length {len} of message `{}`, at most {max} is allowed", char::from(*tag))]
    Length { tag: u8, len: u32, max: u32 },
}

/// One message's tag and the length of its body in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub tag: u8,
    pub body_len: u32,
}

/// Who sent the bytes: it decides which tags exist and how long their bodies may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Frontend,
    Backend,
}

impl Side {
    /// The largest body of a message with this tag, or none if this side has no such message.
    fn body_len_max(self, tag: u8) -> Option<u32> {
        match (self, tag) {
            (Side::Frontend, b'Q' | b'P' | b'B' | b'F' | b'd') => Some(LARGE_LEN_MAX),
            (Side::Frontend, b'p') => Some(AUTH_LEN_MAX),
            (Side::Frontend, b'E' | b'D' | b'C' | b'f') => Some(SMALL_LEN_MAX),
            (Side::Frontend, b'S' | b'H' | b'c' | b'X') => Some(SMALL_LEN_MAX),
            (
                Side::Backend,
                b'R' | b'K' | b'S' | b'E' | b'N' | b'A' | b'Z' | b'T' | b't' | b'D' | b'C' | b'I'
                | b'1' | b'2' | b'3' | b'n' | b's' | b'G' | b'H' | b'W' | b'd' | b'c' | b'V' | b'v',
            ) => Some(LARGE_LEN_MAX),
            _ => None,
        }
    }

    /// Reads the header at the start of `bytes`; `Ok(None)` if fewer than [`HEADER_LEN`] bytes are there.
    ///
    /// # Errors
    /// The tag does not exist on this side, or the length is below 4 or above the tag's limit.
    #[inline]
    pub fn header(self, bytes: &[u8]) -> Result<Option<Header>, FrameError> {
        let Some(&[tag, a, b, c, d]) = bytes.first_chunk::<HEADER_LEN>() else {
            // A wrong tag is refused at its first byte, so that garbage is not waited out.
            return match bytes.first() {
                Some(&tag) if self.body_len_max(tag).is_none() => Err(FrameError::Tag { tag }),
                _ => Ok(None),
            };
        };
        let max = self.body_len_max(tag).ok_or(FrameError::Tag { tag })?;
        let len = u32::from_be_bytes([a, b, c, d]);
        match len.checked_sub(4) {
            Some(body_len) if body_len <= max => Ok(Some(Header { tag, body_len })),
            _ => Err(FrameError::Length { tag, len, max }),
        }
    }
}

/// What stands at a position of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// So many bytes of a body whose header was passed before.
    Body(usize),
    /// A header; its body has not been passed.
    Frame(Header),
    /// Too few bytes to tell, or none.
    Incomplete,
}

/// Where one direction of a stream stands between messages. Eight bytes a direction, no buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scanner {
    side: Side,
    remaining: u32,
}

impl Scanner {
    pub fn new(side: Side) -> Scanner {
        Scanner { side, remaining: 0 }
    }

    /// What stands at the start of `bytes`. Does not move: call [`Scanner::enter`] to pass a header.
    ///
    /// # Errors
    /// See [`Side::header`].
    #[inline]
    pub fn peek(&self, bytes: &[u8]) -> Result<Step, FrameError> {
        if self.remaining > 0 {
            let len = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(bytes.len());
            return Ok(if len == 0 { Step::Incomplete } else { Step::Body(len) });
        }
        Ok(match self.side.header(bytes)? {
            Some(header) => Step::Frame(header),
            None => Step::Incomplete,
        })
    }

    /// Passes a header that `peek` showed; the body follows as [`Step::Body`].
    #[inline]
    pub fn enter(&mut self, header: Header) {
        assert!(self.remaining == 0, "a message is entered only at a boundary");
        self.remaining = header.body_len;
    }

    /// Passes `len` bytes of the body.
    #[inline]
    pub fn pass(&mut self, len: usize) {
        let len = u32::try_from(len).expect("a pass is at most one body");
        assert!(len <= self.remaining, "a pass never leaves its body");
        self.remaining -= len;
    }

    /// Nothing of a message has been passed, or all of it.
    #[inline]
    pub fn at_boundary(&self) -> bool {
        self.remaining == 0
    }

    /// Bytes of the current body that have not been passed.
    pub fn remaining(&self) -> u32 {
        self.remaining
    }
}

/// The length of all whole messages with data (DataRow, CopyData) at the start of `bytes`. They answer nothing and
/// say nothing but their content, and a bulk stream consists of little else.
#[inline]
pub fn data_len(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(&[b'D' | b'd', a, b, c, d]) =
        bytes.get(at..).and_then(<[u8]>::first_chunk::<HEADER_LEN>)
    {
        let len = u32::from_be_bytes([a, b, c, d]);
        let Some(end) = usize::try_from(len).ok().and_then(|len| at.checked_add(len + 1)) else {
            break;
        };
        // What is cut off, or no message at all, is for the scanner to say.
        if len < 4 || len - 4 > LARGE_LEN_MAX || end > bytes.len() {
            break;
        }
        at = end;
    }
    at
}

/// A whole message: its tag, its body and its length in all.
pub type Whole<'a> = (u8, &'a [u8], usize);

/// Splits one whole message off the start of `bytes`.
/// `Ok(None)` while it is not whole.
///
/// # Errors
/// See [`Side::header`].
pub fn whole(side: Side, bytes: &[u8]) -> Result<Option<Whole<'_>>, FrameError> {
    let Some(header) = side.header(bytes)? else { return Ok(None) };
    let end = HEADER_LEN + usize::try_from(header.body_len).unwrap_or(usize::MAX - HEADER_LEN);
    Ok(bytes.get(HEADER_LEN..end).map(|body| (header.tag, body, end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_below_four_is_refused() {
        let error = Side::Frontend.header(&[b'Q', 0, 0, 0, 3]).unwrap_err();
        assert_eq!(error, FrameError::Length { tag: b'Q', len: 3, max: LARGE_LEN_MAX });
    }

    #[test]
    fn a_sync_that_announces_a_gigabyte_is_refused() {
        let error = Side::Frontend.header(&[b'S', 0x3f, 0xff, 0xff, 0xff]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "invalid length 1073741823 of message `S`, at most 10000 is allowed"
        );
    }

    #[test]
    fn an_unknown_tag_is_refused_at_its_first_byte() {
        assert_eq!(Side::Frontend.header(b"G"), Err(FrameError::Tag { tag: b'G' }));
        assert_eq!(Side::Backend.header(b"G"), Ok(None));
    }

    #[test]
    fn data_is_stepped_over_up_to_what_is_not_whole() {
        let mut stream = Vec::new();
        crate::frontend::copy_data(&mut stream, &[7; 300]);
        crate::frontend::copy_data(&mut stream, &[]);
        let whole = stream.len();
        assert_eq!(data_len(&stream), whole);
        crate::frontend::sync(&mut stream);
        assert_eq!(data_len(&stream), whole);
        assert_eq!(data_len(&stream[..whole - 1]), 305);
        assert_eq!(data_len(b""), 0);
        assert_eq!(data_len(&[b'D', 0, 0, 0, 3, 0]), 0);
        assert_eq!(data_len(&[b'D', 0xff, 0xff, 0xff, 0xff, 0]), 0);
    }

    #[test]
    fn a_scanner_finds_the_same_messages_at_every_split() {
        let mut stream = Vec::new();
        crate::frontend::query(&mut stream, b"select 1");
        crate::frontend::sync(&mut stream);
        crate::frontend::copy_data(&mut stream, &[7; 300]);
        let tags = |chunks: &[&[u8]]| {
            let (mut scanner, mut carry, mut tags) =
                (Scanner::new(Side::Frontend), Vec::new(), Vec::new());
            for chunk in chunks {
                carry.extend_from_slice(chunk);
                let mut at = 0;
                loop {
                    match scanner.peek(&carry[at..]).unwrap() {
                        Step::Incomplete => break,
                        Step::Frame(header) => {
                            tags.push((header.tag, header.body_len));
                            scanner.enter(header);
                            at += HEADER_LEN;
                        }
                        Step::Body(len) => {
                            scanner.pass(len);
                            at += len;
                        }
                    }
                }
                carry.drain(..at);
            }
            assert!(scanner.at_boundary() && carry.is_empty());
            tags
        };
        let expected = vec![(b'Q', 9), (b'S', 0), (b'd', 300)];
        for split in 0..=stream.len() {
            let (a, b) = stream.split_at(split);
            assert_eq!(tags(&[a, b]), expected, "split at {split}");
        }
        let bytes: Vec<&[u8]> = stream.chunks(1).collect();
        assert_eq!(tags(&bytes), expected);
    }
}
