//! Alarms: what is looked at again and again, so that a plan may begin by it.

use serde::{Deserialize, Serialize};

use super::Action;

/// Alarms of one application.
pub const ALARMS_MAX: usize = 50;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alarm {
    pub name: String,
    /// An HTTP call, a program, or SQL.
    pub check: Action,
    pub every_ms: u64,
    /// Of one check.
    pub timeout_ms: u64,
    /// How many checks in a row have to say so.
    pub red_after: u32,
    pub green_after: u32,
    /// A check without an answer says that it is red; otherwise it says nothing.
    pub is_red_unanswered: bool,
}

/// What a check has said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checked {
    Good,
    Bad,
    /// Nobody has answered, or it could not be asked.
    Unanswered,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Colour {
    #[default]
    Unknown,
    Green,
    Red,
}

impl Colour {
    pub fn name(self) -> &'static str {
        match self {
            Colour::Unknown => "unknown",
            Colour::Green => "green",
            Colour::Red => "red",
        }
    }
}

/// What an alarm is, and what its last checks have said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    pub colour: Colour,
    /// The last checks that have said the same, and whether that is good.
    row: Option<(bool, u32)>,
}

impl Standing {
    /// What is not known is neither red nor green: where nobody answers, checks are counted anew.
    #[must_use]
    pub fn hear(self, alarm: &Alarm, checked: Checked) -> Standing {
        let is_good = match checked {
            Checked::Good => true,
            Checked::Bad => false,
            Checked::Unanswered if alarm.is_red_unanswered => false,
            Checked::Unanswered => return Standing::default(),
        };
        let count = match self.row {
            Some((before, count)) if before == is_good => count.saturating_add(1),
            _ => 1,
        };
        let row = Some((is_good, count));
        let colour = match is_good {
            true if count >= alarm.green_after => Colour::Green,
            false if count >= alarm.red_after => Colour::Red,
            _ => self.colour,
        };
        Standing { colour, row }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alarm(is_red_unanswered: bool) -> Alarm {
        Alarm {
            name: "x".into(),
            check: Action::Exec { argv: vec!["/bin/true".into()] },
            every_ms: 1_000,
            timeout_ms: 1_000,
            red_after: 3,
            green_after: 2,
            is_red_unanswered,
        }
    }

    fn colours(alarm: &Alarm, checks: &str) -> String {
        let mut standing = Standing::default();
        let each = checks.chars().map(|check| {
            standing = standing.hear(
                alarm,
                match check {
                    '+' => Checked::Good,
                    '-' => Checked::Bad,
                    _ => Checked::Unanswered,
                },
            );
            &standing.colour.name()[..1]
        });
        each.collect()
    }

    #[test]
    fn it_changes_when_enough_checks_in_a_row_say_so() {
        assert_eq!(colours(&alarm(false), "++--+---+-++"), "uggggggrrrrg");
        assert_eq!(colours(&alarm(false), "---"), "uur");
    }

    #[test]
    fn what_is_not_known_is_neither_red_nor_green() {
        assert_eq!(colours(&alarm(false), "---?--?-"), "uuruuuuu");
        assert_eq!(colours(&alarm(false), "++?+"), "uguu");
        assert_eq!(colours(&alarm(true), "++-?-"), "ugggr");
    }
}
