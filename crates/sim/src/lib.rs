//! A seeded world for what the model decides of leases, pledges, seats, epochs and proxies: hosts whose clocks differ and drift, that
//! freeze, crash, also in the midst of what they do and write, and are booted again; messages that are late, lost, doubled or cut off; a store that is gone or loses answers.
//!
//! # Layout, in reading order
//! - [`chance`]: what happens, by a seed.
//! - [`world`]: hosts, time, the network; what goes wrong.
//! - [`agent`]: an agent, its guard and its server, by `model::lease` and `model::pledge`.
//! - [`node`]: a node of control, by `model::seat` and `model::lease`.
//! - [`proxy`]: a proxy, by `model::proxies`.
//! - [`invariants`]: what must never be so, a file each.
//! - [`planted`]: faults of ours, by which each invariant is seen to fire.
//!
//! The decisions are those of the product; the shells around them are written here a second time, so a world says nothing of
//! theirs. Those are tried on real processes (`crates/app/tests/e2e`).

#![forbid(unsafe_code)]

pub mod agent;
pub mod chance;
pub mod invariants;
pub mod node;
pub mod planted;
pub mod proxy;
pub mod world;

pub use invariants::Violation;
pub use planted::Planted;
pub use world::{Weather, World};

/// Runs one world to its end. Gives what was found.
///
/// # Errors
/// The first invariant that does not hold.
pub fn run(seed: u64, weather: Weather, planted: Option<Planted>) -> Result<Summary, Violation> {
    World::new(seed, weather, planted).run()
}

/// What has happened in a world.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    pub events: u64,
    pub failovers: u64,
    pub switchovers: u64,
    pub tenures: u64,
    /// Renewals by pledges alone.
    pub pledges: u64,
    pub ended: u64,
}

impl Summary {
    #[must_use]
    pub fn and(self, other: Summary) -> Summary {
        Summary {
            events: self.events + other.events,
            failovers: self.failovers + other.failovers,
            switchovers: self.switchovers + other.switchovers,
            tenures: self.tenures + other.tenures,
            pledges: self.pledges + other.pledges,
            ended: self.ended + other.ended,
        }
    }
}
