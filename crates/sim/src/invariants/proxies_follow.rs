//! I4, and what is said of proxies: none goes by what was before a grant for longer than its lease; its clock may count slower.

use crate::world::{Place, TERMS, World};

/// The slowest clock of a world, with what a proxy needs to look.
const SLOWEST: u64 = 975;

pub(super) fn check(world: &mut World) -> Result<(), String> {
    let longest = u64::try_from(TERMS.length.as_millis()).unwrap_or(u64::MAX) * 1_000 / SLOWEST;
    let since = world.now - world.past.granted_at;
    let application = world.store.application;
    for (at, proxy) in world.proxies.iter().enumerate() {
        if !world.is_awake(Place::Proxy(at)) {
            continue;
        }
        let Some(open) = proxy.passing(world.clock_of_proxy(at), world.planted) else { continue };
        let is_current =
            open.epoch == application.epoch && open.cell == application.granted_to.to_string();
        if !is_current && (since > longest || open.epoch > application.epoch) {
            return Err(format!(
                "proxy {at} passes commands to cell {} of epoch {}, {since} ms after cell {} was granted epoch {}",
                open.cell, open.epoch, application.granted_to, application.epoch
            ));
        }
    }
    Ok(())
}
