//! The right to be the primary, for a time that ends by itself.
//!
//! Who holds it counts from the moment in which it asked; who gives it counts from the moment in which it answered, which is
//! later. So the holder has stopped before anybody else is given it, whatever became of the answer, as long as the clocks of
//! the two run equally fast within a twentieth. Times are of one host's clock that goes on while the host sleeps
//! (`CLOCK_BOOTTIME`), and are never compared with another host's.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cell::Epoch;

/// Time since a host was booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Moment(pub Duration);

impl Moment {
    /// Later by so much, or as late as can be.
    pub fn plus(self, time: Duration) -> Moment {
        Moment(self.0.saturating_add(time))
    }

    /// How long until then; nothing if it is over.
    pub fn from(self, now: Moment) -> Duration {
        self.0.saturating_sub(now.0)
    }
}

/// How long a lease is, and what follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    pub length: Duration,
}

impl Terms {
    /// Shorter ones end by a busy moment, longer ones keep everybody waiting.
    pub const LENGTHS: std::ops::RangeInclusive<Duration> =
        Duration::from_secs(1)..=Duration::from_secs(60);
    /// Beyond the holder's time, for what is on its way.
    const GRACE: Duration = Duration::from_millis(100);
    const MARGIN_MIN: Duration = Duration::from_millis(250);

    /// By so much the holder stops before its time is over.
    fn margin(self) -> Duration {
        (self.length / 10).max(Terms::MARGIN_MIN)
    }

    /// Between two renewals.
    pub fn renew_every(self) -> Duration {
        self.length / 4
    }

    /// When the holder, which asked at `sent`, ends its server.
    pub fn stop_at(self, sent: Moment) -> Moment {
        sent.plus(self.length.saturating_sub(self.margin()))
    }

    /// When the guard ends it, if the holder has not.
    pub fn kill_at(self, sent: Moment) -> Moment {
        sent.plus(self.length.saturating_sub(self.margin() / 2))
    }

    /// When another may have it, after an answer at `answered`.
    pub fn free_at(self, answered: Moment) -> Moment {
        answered.plus(self.length).plus(Terms::GRACE)
    }
}

/// What a host knows of its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    held: Option<Held>,
    /// When it was given up: what was asked for before is not held any more, whenever it is answered.
    given_up: Option<Moment>,
    /// The highest epoch that was ever seen. It outlives the process.
    seen: Epoch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    epoch: Epoch,
    sent: Moment,
    terms: Terms,
}

impl Holder {
    pub fn new(seen: Epoch) -> Holder {
        Holder { held: None, given_up: None, seen }
    }

    pub fn seen(&self) -> Epoch {
        self.seen
    }

    /// Takes note of an epoch; one that is lower than what was seen is refused.
    ///
    /// # Errors
    /// The highest that was seen.
    pub fn see(&mut self, epoch: Epoch) -> Result<(), Epoch> {
        if epoch < self.seen {
            return Err(self.seen);
        }
        self.seen = epoch;
        Ok(())
    }

    /// The lease that was asked for at `sent`. Answers that come out of their order, or are of an epoch that is over, change
    /// nothing. One that was asked for before it was given up is none. One that is not renewed lasts to its end: nobody is given it before that without a proof that it is not needed.
    pub fn granted(&mut self, sent: Moment, terms: Terms, epoch: Epoch) {
        let is_old = self.held.is_some_and(|held| sent < held.sent)
            || self.given_up.is_some_and(|given_up| sent <= given_up);
        if !is_old && self.see(epoch).is_ok() {
            self.held = Some(Held { epoch, sent, terms });
        }
    }

    /// Nothing of it is left, nor of what is asked for by now.
    pub fn give_up(&mut self, now: Moment) {
        self.held = None;
        self.given_up = Some(now);
    }

    /// The epoch of the lease, while it lasts.
    pub fn epoch(&self, now: Moment) -> Option<Epoch> {
        let is_valid = |held: &&Held| now < held.terms.stop_at(held.sent);
        self.held.as_ref().filter(is_valid).map(|held| held.epoch)
    }

    /// When the lease was asked for, if there was one.
    pub fn sent(&self) -> Option<Moment> {
        self.held.map(|held| held.sent)
    }

    /// The terms of the lease, if there was one.
    pub fn terms(&self) -> Option<Terms> {
        self.held.map(|held| held.terms)
    }

    /// When the guard is to end the server, if there is a lease.
    pub fn kill_at(&self) -> Option<Moment> {
        self.held.map(|held| held.terms.kill_at(held.sent))
    }
}

/// What a granter knows of the lease of one cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Granter {
    terms: Terms,
    opened: Moment,
    /// When every lease that was ever given is over: a longer one may have been given before.
    free_at: Moment,
    /// Who was answered last, if that is known.
    holder: Option<u64>,
    is_revoked: bool,
}

impl Granter {
    /// What was answered before a restart is not known: so it was a moment ago.
    pub fn new(now: Moment, terms: Terms) -> Granter {
        let free_at = terms.free_at(now);
        Granter { terms, opened: now, free_at, holder: None, is_revoked: false }
    }

    /// Somebody remembers who it was, and for how long the lease may have been.
    pub fn remember(&mut self, holder: u64, length: Duration) {
        self.holder.get_or_insert(holder);
        self.free_at = self.free_at.max(Terms { length }.free_at(self.opened));
    }

    /// No lease of another length than ours lasts any more.
    pub fn is_settled(&self, now: Moment, length: Duration) -> bool {
        now >= Terms { length }.free_at(self.opened)
    }

    pub fn terms(&self) -> Terms {
        self.terms
    }

    /// Somebody else may hold it still.
    pub fn is_anothers(&self, now: Moment, holder: u64) -> bool {
        self.holder.is_some_and(|last| last != holder) && now < self.free_at
    }

    /// Answers a holder; `granted` is what the store says. Two that take themselves for the same do not hold it together.
    pub fn answer(&mut self, now: Moment, holder: u64, granted: Option<Epoch>) -> Option<Epoch> {
        let granted = granted.filter(|_| !self.is_revoked)?;
        if self.is_anothers(now, holder) {
            return None;
        }
        self.free_at = self.free_at.max(self.terms.free_at(now));
        self.holder = Some(holder);
        Some(granted)
    }

    /// From now on it is not renewed. Gives when it is over.
    pub fn revoke(&mut self) -> Moment {
        self.is_revoked = true;
        self.free_at()
    }

    /// Takes [`Granter::revoke`] back.
    pub fn restore(&mut self) {
        self.is_revoked = false;
    }

    /// When it is over, unless it is renewed.
    pub fn free_at(&self) -> Moment {
        self.free_at
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(ms: u64) -> Moment {
        Moment(Duration::from_millis(ms))
    }

    const TERMS: Terms = Terms { length: Duration::from_millis(2_500) };

    #[test]
    fn the_holder_stops_before_another_may_have_it() {
        assert_eq!(TERMS.stop_at(ms(0)), ms(2_250));
        assert_eq!(TERMS.kill_at(ms(0)), ms(2_375));
        assert_eq!(TERMS.free_at(ms(0)), ms(2_600));
        let mut holder = Holder::new(Epoch(0));
        assert_eq!(holder.epoch(ms(0)), None);
        holder.granted(ms(0), TERMS, Epoch(3));
        assert_eq!(holder.epoch(ms(2_249)), Some(Epoch(3)));
        assert_eq!(holder.epoch(ms(2_250)), None);
    }

    #[test]
    fn an_epoch_that_is_over_is_refused() {
        let mut holder = Holder::new(Epoch(5));
        holder.granted(ms(0), TERMS, Epoch(4));
        assert_eq!((holder.epoch(ms(1)), holder.see(Epoch(4))), (None, Err(Epoch(5))));
        holder.granted(ms(1), TERMS, Epoch(6));
        // An answer that was overtaken.
        holder.granted(ms(0), TERMS, Epoch(6));
        assert_eq!(holder.epoch(ms(2_250)), Some(Epoch(6)));
        holder.give_up(ms(3));
        assert_eq!(holder.epoch(ms(3)), None);
        // Asked for before, answered since.
        holder.granted(ms(2), TERMS, Epoch(6));
        assert_eq!(holder.epoch(ms(4)), None);
        holder.granted(ms(4), TERMS, Epoch(6));
        assert_eq!(holder.epoch(ms(5)), Some(Epoch(6)));
    }

    #[test]
    fn what_was_answered_before_a_restart_is_waited_for() {
        let mut granter = Granter::new(ms(1_000), TERMS);
        assert_eq!(granter.revoke(), ms(3_600));
        assert_eq!(granter.answer(ms(2_000), 7, Some(Epoch(1))), None);
        assert_eq!(granter.free_at(), ms(3_600));
        granter.restore();
        assert_eq!(granter.answer(ms(2_000), 7, Some(Epoch(1))), Some(Epoch(1)));
    }

    #[test]
    fn a_lease_of_another_length_is_waited_for() {
        let mut granter = Granter::new(ms(0), TERMS);
        granter.remember(7, Duration::from_secs(20));
        assert_eq!(granter.answer(ms(1), 7, Some(Epoch(1))), Some(Epoch(1)));
        assert_eq!(granter.revoke(), ms(20_100));
        assert!(!granter.is_settled(ms(20_099), Duration::from_secs(20)));
    }

    #[test]
    fn two_of_the_same_cell_do_not_hold_it_together() {
        let mut granter = Granter::new(ms(0), TERMS);
        granter.remember(7, TERMS.length);
        assert_eq!(granter.answer(ms(1), 8, Some(Epoch(1))), None);
        assert_eq!(granter.answer(ms(1_000), 7, Some(Epoch(1))), Some(Epoch(1)));
        assert_eq!(granter.answer(ms(3_599), 8, Some(Epoch(1))), None);
        assert_eq!(granter.answer(ms(3_600), 8, Some(Epoch(1))), Some(Epoch(1)));
        assert_eq!(granter.answer(ms(3_601), 7, Some(Epoch(1))), None);
    }

    proptest! {
        /// Two hosts whose clocks began at different times and drift, messages that take long or are lost: after the granter
        /// has said that the lease is over, neither the holder nor its guard lets the server run.
        #[test]
        fn never_two(
            length_ms in 1_000u64..60_000,
            offset_ms in 0u64..1_000_000,
            drift in 950u64..1_050,
            asks in proptest::collection::vec((0u64..3_000, 0u64..5_000, 0u64..5_000, any::<bool>()), 1..50),
        ) {
            let terms = Terms { length: Duration::from_millis(length_ms) };
            // True time in; what the holder's clock shows out. It is up to a twentieth slower or faster.
            let theirs = |at: u64| ms(offset_ms + at * drift / 1_000);
            let mut granter = Granter::new(ms(0), terms);
            let mut holder = Holder::new(Epoch(0));
            let mut at = 0;
            let mut last_stop = 0;
            for (wait, there, back, is_lost) in asks {
                at += wait;
                let sent = theirs(at);
                let answer = granter.answer(ms(at + there), 7, Some(Epoch(1)));
                at += there + back;
                if let Some(epoch) = answer.filter(|_| !is_lost) {
                    holder.granted(sent, terms, epoch);
                }
                if let Some(kill_at) = holder.kill_at() {
                    // In true time, rounded up.
                    let kill_at = u64::try_from(kill_at.0.as_millis()).unwrap();
                    last_stop = last_stop.max((kill_at.saturating_sub(offset_ms) * 1_000).div_ceil(drift));
                }
            }
            let free_at = u64::try_from(granter.revoke().0.as_millis()).unwrap();
            prop_assert!(last_stop <= free_at, "{last_stop} {free_at}");
        }
    }
}
