//! Where cells are. A region may be within another: `eu/frankfurt/a` is in `eu/frankfurt`, and that in `eu`.

use serde::{Deserialize, Serialize};

/// Between a region and one within it.
const WITHIN: char = '/';
const LEVELS_MAX: usize = 5;
const NAME_LEN_MAX: usize = 63;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Region(String);

impl Region {
    /// # Errors
    /// It is no region, in words.
    pub fn read(text: &str) -> Result<Region, String> {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let is_name = |name: &str| {
            !name.is_empty() && name.len() <= NAME_LEN_MAX && name.chars().all(is_plain)
        };
        let names: Vec<&str> = text.split(WITHIN).collect();
        match names.len() <= LEVELS_MAX && names.iter().all(|name| is_name(name)) {
            true => Ok(Region(text.to_owned())),
            false => Err(format!(
                "a region is such as \"eu/frankfurt/a\": at most {LEVELS_MAX} names of at most {NAME_LEN_MAX} letters, digits, `-`, `_` and `.`, it is `{text}`"
            )),
        }
    }

    /// Whether the other is this one, or is within it.
    pub fn holds(&self, other: &Region) -> bool {
        let rest = other.0.strip_prefix(&self.0);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(WITHIN))
    }

    /// How many levels they share: the more, the nearer.
    pub fn shared(&self, other: &Region) -> usize {
        let names = self.0.split(WITHIN).zip(other.0.split(WITHIN));
        names.take_while(|(one, other)| one == other).count()
    }
}

impl TryFrom<String> for Region {
    type Error = String;

    fn try_from(text: String) -> Result<Region, String> {
        Region::read(&text)
    }
}

impl From<Region> for String {
    fn from(region: Region) -> String {
        region.0
    }
}

impl std::fmt::Display for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(text: &str) -> Region {
        Region::read(text).unwrap()
    }

    #[test]
    fn one_is_within_another_by_its_names() {
        let frankfurt = region("eu/frankfurt");
        for (text, is_held) in [
            ("eu/frankfurt", true),
            ("eu/frankfurt/a", true),
            ("eu/frankfurt-2", false),
            ("eu", false),
            ("us/frankfurt", false),
        ] {
            assert_eq!(frankfurt.holds(&region(text)), is_held, "{text}");
        }
        assert_eq!(region("eu/frankfurt/a").shared(&region("eu/frankfurt/b")), 2);
        assert_eq!(region("eu/a").shared(&region("us/a")), 0);
    }

    #[test]
    fn what_is_no_region_is_said() {
        for text in ["", "/", "eu/", "/eu", "eu//a", "eu a", "a/b/c/d/e/f", &"x".repeat(64)] {
            assert!(Region::read(text).unwrap_err().contains("is such as"), "{text}");
        }
    }
}
