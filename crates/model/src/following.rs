//! Whether a standby is told to follow the active cell's server.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::Lsn;

/// A standby that has its own way to the active cell's server has so long to find it again.
const PATIENCE: Duration = Duration::from_secs(10);
/// One that follows another server, which it does not hear: whoever starts that again has so long.
const ELSEWHERE_PATIENCE: Duration = Duration::from_secs(2);

/// Where a standby is: the timeline that it asks for, and the end of what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    pub timeline: u64,
    pub has: Lsn,
}

/// The timelines that a server's comes from, and where it has left each (manual, section 26.3.6; `readTimeLineHistory`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    left: Vec<(u64, Lsn)>,
    /// Its own, and the end of what it has written.
    pub timeline: u64,
    pub end: Lsn,
}

/// Why a standby will not follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Astray {
    /// In words.
    pub why: String,
    /// It has more of the primary's own timeline than that has: the primary has lost log, of which this may be the only copy.
    pub is_ahead: bool,
}

impl History {
    /// What is in a history file; lines that are none of it are passed over, as the server does.
    pub fn read(text: &str, timeline: u64, end: Lsn) -> History {
        let line = |line: &str| {
            let mut words = line.split_whitespace();
            Some((words.next()?.parse().ok()?, Lsn::read(words.next()?)?))
        };
        History { left: text.lines().filter_map(line).collect(), timeline, end }
    }

    pub fn left(&self, timeline: u64) -> Option<Lsn> {
        self.left.iter().find(|(left, _)| *left == timeline).map(|(_, at)| *at)
    }

    /// # Errors
    /// A standby that was there before this was read has what is no part of it, and will not follow.
    pub fn check(&self, Position { timeline, has }: Position) -> Result<(), Astray> {
        let astray = |why: String| Err(Astray { why, is_ahead: false });
        if timeline > self.timeline {
            let now = self.timeline;
            return astray(format!("it is on timeline {timeline}, the active one on {now}"));
        }
        if timeline == self.timeline && has > self.end {
            let end = self.end;
            let why = format!(
                "it has {has} of timeline {timeline}, of which the active one has written {end}"
            );
            return Err(Astray { why, is_ahead: true });
        }
        match self.left(timeline) {
            Some(at) if has > at => {
                astray(format!("it has {has} of timeline {timeline}, which was left at {at}"))
            }
            _ => Ok(()),
        }
    }
}

/// For so long one is seen to have gone another way before anything is done about it.
const STRAYED_PATIENCE: Duration = Duration::from_secs(2);

/// What is seen of a standby.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standby<'a> {
    pub cell: &'a str,
    /// It receives from somebody.
    pub is_streaming: bool,
    /// The active cell's server knows it by its name.
    pub is_listed: bool,
    /// Its `primary_conninfo`, and what that would be.
    pub conninfo: &'a str,
    pub wanted: &'a str,
}

/// Since when standbys have not followed.
#[derive(Debug, Clone, Default)]
pub struct Followers {
    astray_since: BTreeMap<String, Instant>,
    /// Where they have been seen to have gone another way, since when and when last.
    strayed: BTreeMap<String, (Position, Instant, Instant)>,
    /// How each would follow the active cell's server, and how one that was active before.
    wanted: BTreeMap<String, (String, Option<String>)>,
}

impl Followers {
    /// Whether it is told now. `needs_all`: commits wait for standbys, which are to be known by their names.
    pub fn see(&mut self, now: Instant, standby: Standby<'_>, needs_all: bool) -> bool {
        let before = self.changes(standby);
        let follows = standby.is_listed || (standby.is_streaming && !needs_all);
        if follows || standby.conninfo == standby.wanted {
            self.astray_since.remove(standby.cell);
            return false;
        }
        let since = *self.astray_since.entry(standby.cell.to_owned()).or_insert(now);
        let patience = match (place(standby.conninfo), place(standby.wanted)) {
            // It is not active any more, and will not be heard.
            (here @ Some(_), _) if before.is_some_and(|before| place(&before) == here) => {
                Duration::ZERO
            }
            (Some(here), Some(there)) if here != there => ELSEWHERE_PATIENCE,
            _ => PATIENCE,
        };
        now.duration_since(since) >= patience
    }

    /// It has gone another way than the active cell's server, and will not follow. One that gets on, as from an archive, does.
    pub fn note_strayed(&mut self, now: Instant, cell: &str, position: Position) {
        let seen = self.strayed.entry(cell.to_owned()).or_insert((position, now, now));
        let (at, _, last) = seen;
        if *at != position || now.duration_since(*last) > STRAYED_PATIENCE * 2 {
            *seen = (position, now, now);
        }
        seen.2 = now;
    }

    /// One that has been seen so again and again, and not only while it turned.
    pub fn strayed(&self, now: Instant) -> Option<&str> {
        let mut strayed = self.strayed.iter().filter(|(_, (_, since, last))| {
            last.duration_since(*since) >= STRAYED_PATIENCE
                && now.duration_since(*last) < STRAYED_PATIENCE
        });
        strayed.next().map(|(cell, _)| cell.as_str())
    }

    /// How it would follow the server that was active before this one, if that is known.
    fn changes(&mut self, standby: Standby<'_>) -> Option<String> {
        let first = || (standby.wanted.to_owned(), None);
        let (wanted, before) = self.wanted.entry(standby.cell.to_owned()).or_insert_with(first);
        if *wanted != standby.wanted {
            *before = Some(std::mem::replace(wanted, standby.wanted.to_owned()));
        }
        before.clone()
    }
}

/// Whether two connection strings lead to one server, as far as that is known.
pub fn is_same_place(one: &str, other: &str) -> bool {
    place(one).is_some_and(|place_of_one| place(other) == Some(place_of_one))
}

/// Host and port of a connection string of keywords; of one that has them otherwise nothing is known.
fn place(conninfo: &str) -> Option<(&str, &str)> {
    let of = |keyword: &str| {
        let mut found = conninfo.split_ascii_whitespace().filter_map(|word| {
            let (name, value) = word.split_once('=')?;
            (name == keyword).then(|| value.trim_matches('\''))
        });
        found.next().filter(|value| !value.is_empty() && found.next().is_none())
    };
    Some((of("host")?, of("port").unwrap_or("5432")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::disallowed_methods)]

    use super::*;

    const A: &str = "host=h1 port=1 user=postgres";
    const B: &str = "host=h1 port=2 user=postgres application_name='holdfast_c'";

    fn standby(conninfo: &'static str) -> Standby<'static> {
        Standby { cell: "c", is_streaming: false, is_listed: false, conninfo, wanted: B }
    }

    /// After how many milliseconds it is told, if at all within a minute.
    fn told_after(standby: Standby<'_>, needs_all: bool) -> Option<u64> {
        let (mut followers, now) = (Followers::default(), Instant::now());
        let after = |ms: &u64| followers.see(now + Duration::from_millis(*ms), standby, needs_all);
        (0..60_000).step_by(500).find(after)
    }

    #[test]
    fn who_follows_a_server_that_is_gone_is_told_soon() {
        assert_eq!(told_after(standby(A), false), Some(2_000));
        assert_eq!(told_after(standby(""), false), Some(10_000), "whose way nobody knows");
        assert_eq!(told_after(standby("service=mine"), false), Some(10_000));
        assert_eq!(told_after(standby("host=h1 port=2 user=me"), false), Some(10_000));
        assert_eq!(told_after(standby(B), false), None, "it was told");
    }

    #[test]
    fn who_follows_what_was_active_is_told_at_once() {
        let (mut followers, now) = (Followers::default(), Instant::now());
        let before = Standby { is_streaming: true, wanted: A, ..standby(A) };
        assert!(!followers.see(now, before, false));
        assert!(followers.see(now, standby(A), false));
        assert!(!followers.see(now, standby("host=h1 port=3"), false), "a third");
    }

    #[test]
    fn who_has_what_is_no_part_of_the_history_has_strayed() {
        let text =
            "1\t0/40803C8\tno recovery target specified\n\n2\t0/5000000\tbefore 2026\n# 3 0/6\n";
        let history = History::read(text, 3, Lsn(0x0900_0000));
        let at = |timeline, has| history.check(Position { timeline, has: Lsn(has) });
        let why = "it has 0/4080440 of timeline 1, which was left at 0/40803C8".to_owned();
        assert_eq!(at(1, 0x0408_0440), Err(Astray { why, is_ahead: false }));
        assert_eq!((at(1, 0x0408_03C8), at(2, 0x0480_0000)), (Ok(()), Ok(())));
        assert!(at(2, 0x0500_0001).is_err() && at(3, 0x0900_0000).is_ok());
        let is_ahead = |at: Result<(), Astray>| at.unwrap_err().is_ahead;
        assert!(is_ahead(at(3, 0x0900_0001)), "more than the active one has written");
        assert!(!is_ahead(at(4, 0x0500_0000)), "a timeline of its own");
    }

    #[test]
    fn one_look_is_not_enough_to_have_strayed() {
        let (mut followers, now) = (Followers::default(), Instant::now());
        let at = |ms| now + Duration::from_millis(ms);
        let mut see = |ms, has| {
            let position = Position { timeline: 1, has: Lsn(has) };
            followers.note_strayed(at(ms), "c", position);
            followers.strayed(at(ms)).is_some()
        };
        assert!(!see(0, 1) && !see(10_000, 1), "it has followed meanwhile");
        assert!(!see(11_000, 1) && !see(12_000, 2), "it gets on");
        assert!(!see(13_000, 2) && see(14_000, 2));
        assert_eq!(followers.strayed(at(14_500)), Some("c"));
        assert_eq!(followers.strayed(at(17_000)), None, "seen no more");
    }

    #[test]
    fn who_hears_of_it_by_another_is_left_unless_commits_wait_for_it() {
        let cascades = Standby { is_streaming: true, ..standby(A) };
        assert_eq!(told_after(cascades, false), None);
        assert_eq!(told_after(cascades, true), Some(2_000));
        assert_eq!(told_after(Standby { is_listed: true, ..standby(A) }, true), None);
    }

    #[test]
    fn its_time_begins_anew_once_it_has_followed() {
        let (mut followers, now) = (Followers::default(), Instant::now());
        let at = |ms| now + Duration::from_millis(ms);
        assert!(!followers.see(at(0), standby(A), false));
        assert!(!followers.see(at(1_500), Standby { is_streaming: true, ..standby(A) }, false));
        assert!(!followers.see(at(2_500), standby(A), false));
        assert!(followers.see(at(4_500), standby(A), false));
    }
}
