//! A position in PostgreSQL's write-ahead log.

use serde::{Deserialize, Serialize};

/// Bytes since the beginning of the log, written as `pg_lsn` writes it: `16/B374D848`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Lsn(pub u64);

/// The smallest size of a segment.
const SEGMENT_MIN: u64 = 1024 * 1024;

impl Lsn {
    /// Reads the form of `pg_lsn`; none if it is another.
    pub fn read(text: &str) -> Option<Lsn> {
        let (high, low) = text.split_once('/')?;
        let part = |text: &str| u32::from_str_radix(text, 16).ok().map(u64::from);
        Some(Lsn(part(high)? << 32 | part(low)?))
    }

    /// Nothing but the header of a segment is before it there, whatever the segment's size (`XLogLongPageHeaderData`).
    pub fn is_at_begin_of_segment(self) -> bool {
        self.0 % SEGMENT_MIN <= 64
    }

    /// Within the segment before, or where that begins, for those of the usual size.
    pub fn before_segment(self) -> Lsn {
        const SEGMENT: u64 = 16 * 1024 * 1024;
        Lsn((self.0 / SEGMENT_MIN * SEGMENT_MIN).saturating_sub(SEGMENT))
    }

    /// Bytes from `earlier` to here; 0 if this is the earlier one.
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl std::fmt::Display for Lsn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_reads_back_what_it_writes() {
        for text in ["0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"] {
            assert_eq!(Lsn::read(text).unwrap().to_string(), text);
        }
        assert_eq!(Lsn::read("16"), None);
        assert_eq!(Lsn::read("16/1B374D848"), None);
    }

    #[test]
    fn a_segment_begins_with_a_header() {
        let at = |text: &str| Lsn::read(text).unwrap();
        assert!(
            at("0/4000028").is_at_begin_of_segment() && !at("0/4000060").is_at_begin_of_segment()
        );
        assert_eq!(at("0/4000028").before_segment(), at("0/3000000"));
    }
}
