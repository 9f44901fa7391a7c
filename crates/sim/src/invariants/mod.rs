//! What must never be so, a file each.

mod epochs_grow;
mod healthy_goes_on;
mod one_control;
mod one_primary;
mod proxies_follow;
mod recovers;
mod seat_writes;

use crate::world::World;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub invariant: &'static str,
    /// True time, in milliseconds.
    pub at: u64,
    pub what: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {} ms: {}", self.invariant, self.at, self.what)
    }
}

type Check = fn(&mut World) -> Result<(), String>;

/// After each event.
const ALWAYS: [(&str, Check); 6] = [
    ("one_primary", one_primary::check),
    ("proxies_follow", proxies_follow::check),
    ("one_control", one_control::check),
    ("seat_writes", seat_writes::check),
    ("epochs_grow", epochs_grow::check),
    ("healthy_goes_on", healthy_goes_on::check),
];

/// Once everything was well for a while.
const IN_THE_END: [(&str, Check); 1] = [("recovers", recovers::check)];

fn all(world: &mut World, checks: &[(&'static str, Check)]) -> Result<(), Violation> {
    for (invariant, check) in checks {
        check(world).map_err(|what| Violation { invariant, at: world.now, what })?;
    }
    Ok(())
}

pub(crate) fn always(world: &mut World) -> Result<(), Violation> {
    all(world, &ALWAYS)
}

pub(crate) fn in_the_end(world: &mut World) -> Result<(), Violation> {
    all(world, &IN_THE_END)
}
