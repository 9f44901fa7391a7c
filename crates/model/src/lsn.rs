//! A position in PostgreSQL's write-ahead log.

use serde::{Deserialize, Serialize};

/// Bytes since the beginning of the log, written as `pg_lsn` writes it: `16/B374D848`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Lsn(pub u64);

impl Lsn {
    /// Reads the form of `pg_lsn`; none if it is another.
    pub fn read(text: &str) -> Option<Lsn> {
        let (high, low) = text.split_once('/')?;
        let part = |text: &str| u32::from_str_radix(text, 16).ok().map(u64::from);
        Some(Lsn(part(high)? << 32 | part(low)?))
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
}
