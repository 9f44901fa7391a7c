//! A lease that goes on although control is gone: every other host that could be a primary promises to become none meanwhile.
//!
//! A host promises only if it does not hear control either. So where control is gone nothing changes, and where only the holder
//! is cut off its lease ends. As all others have to promise, control needs the word of a single one that it promises no more,
//! and the end of what it has promised, to know that the lease is over (`model::lease`).

use serde::{Deserialize, Serialize};

use crate::agent::Sender;
use crate::cell::Epoch;
use crate::lease::{Moment, Terms};

/// Another agent of the application, and where it listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    pub cell: String,
    /// That of the agent which is meant: another one of the cell knows nothing of what this one has promised.
    pub directory: u64,
    pub address: String,
}

/// Asks a neighbour to promise that it becomes no primary for the length of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plea {
    pub sender: Sender,
    /// Whom it is for.
    pub directory: u64,
    /// The epoch of the lease that is to go on, and how long it goes on by one promise.
    pub epoch: Epoch,
    pub terms: Terms,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pledged {
    pub is_pledged: bool,
}

/// What a host has promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pledger {
    /// Until then it may not become a primary.
    until: Moment,
    /// Nothing is promised for leases of this epoch or an earlier one.
    refused: Option<Epoch>,
}

/// What a host knows when it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Situation {
    pub now: Moment,
    pub hears_control: bool,
    pub has_lease: bool,
    pub seen: Epoch,
    pub terms: Terms,
}

impl Default for Pledger {
    fn default() -> Pledger {
        Pledger { until: Moment(std::time::Duration::ZERO), refused: None }
    }
}

impl Pledger {
    /// What was promised before a restart holds for `terms` at most, which is the longest that was ever promised.
    pub fn after_start(self, now: Moment, terms: Terms) -> Pledger {
        Pledger { until: terms.free_at(now), ..self }
    }

    /// Answers a plea for a lease of `epoch`.
    pub fn pledge(&mut self, epoch: Epoch, at: Situation) -> bool {
        let is_over = epoch < at.seen || self.refused.is_some_and(|refused| epoch <= refused);
        if at.hears_control || at.has_lease || is_over {
            return false;
        }
        self.until = self.until.max(at.terms.free_at(at.now));
        true
    }

    /// Promises nothing any more for leases up to `epoch`. Gives when all that was promised is over.
    pub fn refuse(&mut self, epoch: Epoch) -> Moment {
        self.refused = self.refused.max(Some(epoch));
        self.until
    }

    /// How long ago the last promise was over; none while it holds.
    pub fn over_since(&self, now: Moment) -> Option<std::time::Duration> {
        now.0.checked_sub(self.until.0)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::lease::{Granter, Holder};

    const TERMS: Terms = Terms { length: Duration::from_millis(2_500) };

    fn ms(ms: u64) -> Moment {
        Moment(Duration::from_millis(ms))
    }

    fn alone(now: u64) -> Situation {
        Situation {
            now: ms(now),
            hears_control: false,
            has_lease: false,
            seen: Epoch(3),
            terms: TERMS,
        }
    }

    #[test]
    fn only_who_is_alone_promises() {
        let mut pledger = Pledger::default();
        assert!(!pledger.pledge(Epoch(3), Situation { hears_control: true, ..alone(0) }));
        assert!(!pledger.pledge(Epoch(3), Situation { has_lease: true, ..alone(0) }));
        assert!(!pledger.pledge(Epoch(2), alone(0)));
        assert_eq!(pledger, Pledger::default());
        assert!(pledger.pledge(Epoch(3), alone(1_000)));
        assert_eq!(pledger.refuse(Epoch(3)), ms(3_600));
        assert!(!pledger.pledge(Epoch(3), alone(1_001)));
        assert!(pledger.pledge(Epoch(4), alone(1_001)));
        assert_eq!(Pledger::default().after_start(ms(5), TERMS).refuse(Epoch(1)), ms(2_605));
    }

    proptest! {
        /// The holder is cut off from control, or control is gone, at any time for either host; questions and answers take
        /// long or are lost; clocks drift. Once control has the other's word, and what that promised is over, and the lease
        /// that control gave is, the holder has stopped.
        #[test]
        fn never_two(
            drift in 950u64..1_050,
            offset in 0u64..1_000_000,
            ends_at in 0u64..20_000,
            asks in proptest::collection::vec(
                (0u64..2_000, 0u64..1_500, 0u64..1_500, any::<bool>(), any::<bool>(), any::<bool>()), 1..60),
        ) {
            let theirs = |at: u64| ms(offset + at * drift / 1_000);
            let (mut granter, mut holder) = (Granter::new(ms(0), TERMS), Holder::new(Epoch(1)));
            // The other's clock is control's, as only its own lengths count.
            let (mut pledger, mut refused) = (Pledger::default(), None);
            let (mut at, mut last_stop) = (0, 0);
            for (wait, there, back, is_lost, to_control, hears_control) in asks {
                at += wait;
                let sent = theirs(at);
                let asked = at + there;
                if asked >= ends_at && refused.is_none() {
                    let over = granter.revoke().max(pledger.refuse(Epoch(1)));
                    refused = Some(over);
                }
                let granted = match to_control {
                    true => granter.answer(ms(asked), 7, Some(Epoch(1))),
                    // Who holds no lease any more asks for none.
                    false if holder.epoch(sent).is_some() => {
                        let situation = Situation { hears_control, seen: Epoch(1), ..alone(asked) };
                        pledger.pledge(Epoch(1), situation).then_some(Epoch(1))
                    }
                    false => None,
                };
                at = asked + back;
                if let Some(epoch) = granted.filter(|_| !is_lost) {
                    holder.granted(sent, TERMS, epoch);
                }
                if let Some(kill_at) = holder.kill_at() {
                    let kill_at = u64::try_from(kill_at.0.as_millis()).unwrap();
                    last_stop = last_stop.max((kill_at.saturating_sub(offset) * 1_000).div_ceil(drift));
                }
            }
            let over = refused.unwrap_or_else(|| granter.revoke().max(pledger.refuse(Epoch(1))));
            let over = u64::try_from(over.0.as_millis()).unwrap();
            prop_assert!(last_stop <= over, "{last_stop} {over}");
        }
    }
}
