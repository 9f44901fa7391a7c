//! A cursor over one message body. Every read is checked; nothing is sized by what the peer announced.

use thiserror::Error;

/// The bytes are not the message that their tag announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    #[error("message ends before its {0}")]
    Short(&'static str),
    #[error("{0} is not terminated")]
    Unterminated(&'static str),
    #[error("{0} is not valid UTF-8")]
    NotUtf8(&'static str),
    #[error("`{value}` is not a valid {what}")]
    Value { what: &'static str, value: i64 },
    #[error("{0} bytes follow the end of the message")]
    Trailing(usize),
}

pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(body: &'a [u8]) -> Reader<'a> {
        Reader(body)
    }

    pub(crate) fn bytes(
        &mut self,
        count: usize,
        what: &'static str,
    ) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed::Short(what))?;
        self.0 = rest;
        Ok(taken)
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, Malformed> {
        let (first, rest) = self.0.split_first().ok_or(Malformed::Short(what))?;
        self.0 = rest;
        Ok(*first)
    }

    pub(crate) fn i16(&mut self, what: &'static str) -> Result<i16, Malformed> {
        let (bytes, rest) = self.0.split_first_chunk::<2>().ok_or(Malformed::Short(what))?;
        self.0 = rest;
        Ok(i16::from_be_bytes(*bytes))
    }

    pub(crate) fn i32(&mut self, what: &'static str) -> Result<i32, Malformed> {
        let (bytes, rest) = self.0.split_first_chunk::<4>().ok_or(Malformed::Short(what))?;
        self.0 = rest;
        Ok(i32::from_be_bytes(*bytes))
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        let (bytes, rest) = self.0.split_first_chunk::<4>().ok_or(Malformed::Short(what))?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*bytes))
    }

    /// Bytes up to a zero byte. Text of the protocol is in the session's client encoding, so it stays bytes.
    pub(crate) fn cstr(&mut self, what: &'static str) -> Result<&'a [u8], Malformed> {
        let end = self.0.iter().position(|b| *b == 0).ok_or(Malformed::Unterminated(what))?;
        let text = self.bytes(end, what)?;
        self.u8(what)?;
        Ok(text)
    }

    /// A value with an i32 length before it, -1 meaning NULL.
    pub(crate) fn value(&mut self, what: &'static str) -> Result<Option<&'a [u8]>, Malformed> {
        match self.i32(what)? {
            -1 => Ok(None),
            len => {
                let count = usize::try_from(len)
                    .map_err(|_| Malformed::Value { what, value: i64::from(len) })?;
                self.bytes(count, what).map(Some)
            }
        }
    }

    /// A count that must not be negative.
    pub(crate) fn count16(&mut self, what: &'static str) -> Result<usize, Malformed> {
        let count = self.i16(what)?;
        usize::try_from(count).map_err(|_| Malformed::Value { what, value: i64::from(count) })
    }

    pub(crate) fn end(self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed::Trailing(self.0.len())) }
    }
}
