//! Which of several control nodes is control: whoever has the seat.
//!
//! The seat is a record in the store, and so is its beat, which whoever has it writes again and again. It counts on the seat
//! for a time from the moment in which it began to write; whoever wants it counts from the moment in which it has read what
//! was written, which is later, and takes it only by a transaction that finds the same beat still. So whoever had it has
//! stopped before another has it, under what `lease` says of clocks; and each transaction compares the seat, so that one
//! which comes late changes nothing.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::lease::{Moment, Terms};

pub const SEAT_KEY: &str = "seat";
pub const BEAT_KEY: &str = "beat";

/// Number of the seat: each that takes it has a higher one. Whoever has heard of one hears no lower one any more.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tenure(pub u64);

impl Tenure {
    /// The next. It is not below the time of day either, so that a store which was restored from a copy does not give
    /// numbers that were given before.
    pub fn next(self, unix_ms: u64) -> Tenure {
        Tenure(self.0.saturating_add(1).max(unix_ms))
    }
}

/// Who has the seat; written when it is taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    pub tenure: Tenure,
    pub node: String,
    /// For so long whoever has it counts on it after a beat.
    pub length: Duration,
}

/// Written again and again while somebody has the seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    pub count: u64,
    /// Whoever had it does not count on it any more: nobody has to wait.
    pub is_over: bool,
}

/// What was read of the seat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sight {
    /// The transaction that wrote the beat; another one each time.
    pub revision: u64,
    pub length: Duration,
    pub is_over: bool,
}

/// What somebody who wants the seat has seen of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Candidate {
    seen: Option<(u64, Moment)>,
}

impl Candidate {
    /// Whether to try to take it, after it was read at `now`, or later. The transaction that does finds the beat as it was seen.
    pub fn sees(&mut self, sight: Option<Sight>, now: Moment) -> bool {
        let Some(Sight { revision, length, is_over }) = sight else { return true };
        match self.seen {
            _ if is_over => true,
            Some((before, since)) if before == revision => now >= Terms { length }.free_at(since),
            _ => {
                self.seen = Some((revision, now));
                false
            }
        }
    }
}

/// What somebody who has the seat knows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sitting {
    pub tenure: Tenure,
    terms: Terms,
    sent: Moment,
}

impl Sitting {
    /// It was taken by a transaction that was begun at `sent`.
    pub fn new(tenure: Tenure, terms: Terms, sent: Moment) -> Sitting {
        Sitting { tenure, terms, sent }
    }

    /// A beat that was begun at `sent` is written.
    pub fn has_beaten(&mut self, sent: Moment) {
        self.sent = self.sent.max(sent);
    }

    /// Until then it may be counted on.
    pub fn until(&self) -> Moment {
        self.terms.stop_at(self.sent)
    }

    /// Between two beats.
    pub fn beats_every(&self) -> Duration {
        self.terms.renew_every()
    }

    pub fn is_valid(&self, now: Moment) -> bool {
        now < self.until()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(n: u64) -> Moment {
        Moment(Duration::from_millis(n))
    }

    #[test]
    fn tenures_grow_also_in_a_store_that_was_restored() {
        assert_eq!(Tenure(0).next(7), Tenure(7));
        assert_eq!(Tenure(9).next(7), Tenure(10));
        assert_eq!(Tenure(u64::MAX).next(7), Tenure(u64::MAX));
    }

    #[test]
    fn a_seat_is_waited_for_unless_it_was_left() {
        let length = Duration::from_secs(2);
        let sight = |revision| Some(Sight { revision, length, is_over: false });
        let mut candidate = Candidate::default();
        assert!(!candidate.sees(sight(1), ms(0)));
        assert!(!candidate.sees(sight(1), ms(2_099)));
        assert!(!candidate.sees(sight(2), ms(2_100)));
        assert!(!candidate.sees(sight(2), ms(4_199)));
        assert!(candidate.sees(sight(2), ms(4_200)));
        assert!(Candidate::default().sees(None, ms(0)));
        let left = Some(Sight { revision: 1, length, is_over: true });
        assert!(Candidate::default().sees(left, ms(0)));
    }

    /// One node: its clock, what it counts on, what it has seen.
    #[derive(Debug, Clone, Copy)]
    struct Node {
        offset: u64,
        drift: u64,
        length: u64,
        sitting: Option<Sitting>,
        candidate: Candidate,
    }

    impl Node {
        /// What its clock shows at a true time.
        fn clock(&self, at: u64) -> Moment {
            ms(self.offset + at * self.drift / 1_000)
        }
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        /// Reads, and takes the seat if it may, after pauses.
        Wants { reads: u64, decides: u64, writes: u64 },
        /// Beats, after a pause; the answer may be lost.
        Beats { writes: u64, is_lost: bool },
    }

    fn step() -> impl Strategy<Value = (u64, usize, Step)> {
        let pause = || prop_oneof![4 => 0u64..300, 1 => 0u64..4_000];
        let wants = (pause(), pause(), pause()).prop_map(|(reads, decides, writes)| Step::Wants {
            reads,
            decides,
            writes,
        });
        let beats =
            (pause(), any::<bool>()).prop_map(|(writes, is_lost)| Step::Beats { writes, is_lost });
        (pause(), 0usize..3, prop_oneof![wants, beats])
    }

    proptest! {
        /// Three nodes whose clocks differ and drift, pauses anywhere, answers that are lost: no two count on the seat at the
        /// same time, and only the one whose seat it is can write.
        #[test]
        fn never_two(
            clocks in proptest::collection::vec((0u64..1_000_000, 976u64..1_025, 1_000u64..5_000), 3),
            steps in proptest::collection::vec(step(), 1..200),
        ) {
            let mut nodes: Vec<Node> = clocks
                .into_iter()
                .map(|(offset, drift, length)| Node {
                    offset, drift, length, sitting: None, candidate: Candidate::default(),
                })
                .collect();
            // The store: tenure, length and revision of the seat.
            let (mut seat, mut revision): (Option<(u64, u64)>, u64) = (None, 0);
            let mut at = 0;
            for (wait, who, step) in steps {
                at += wait;
                match step {
                    Step::Wants { reads, decides, writes } => {
                        at += reads;
                        let sight = seat.map(|(_, length)| Sight {
                            revision, length: Duration::from_millis(length), is_over: false,
                        });
                        let found = revision;
                        at += decides;
                        let now = nodes[who].clock(at);
                        if nodes[who].candidate.sees(sight, now) {
                            let sent = nodes[who].clock(at);
                            at += writes;
                            // Nobody acts between in this world, so the comparison holds.
                            prop_assert_eq!(found, revision);
                            for (other, node) in nodes.iter().enumerate() {
                                let counts = node.sitting.is_some_and(|one| one.is_valid(node.clock(at)));
                                prop_assert!(other == who || !counts, "{other} counts on the seat that {who} takes");
                            }
                            let tenure = Tenure(seat.map_or(0, |(tenure, _)| tenure)).next(0);
                            revision += 1;
                            let terms = Terms { length: Duration::from_millis(nodes[who].length) };
                            seat = Some((tenure.0, nodes[who].length));
                            nodes[who].sitting = Some(Sitting::new(tenure, terms, sent));
                        }
                    }
                    Step::Beats { writes, is_lost } => {
                        let sent = nodes[who].clock(at);
                        at += writes;
                        let Some(sitting) = &mut nodes[who].sitting else { continue };
                        if seat.is_some_and(|(tenure, _)| tenure == sitting.tenure.0) {
                            revision += 1;
                            if !is_lost {
                                sitting.has_beaten(sent);
                            }
                        }
                    }
                }
            }
        }
    }
}
