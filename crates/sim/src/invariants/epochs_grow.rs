//! I2: what a host has seen of epochs, and the store's, only grows, also over crashes.

use crate::world::World;

pub(super) fn check(world: &mut World) -> Result<(), String> {
    let store = world.store.application.epoch;
    if store < world.past.epoch {
        return Err(format!("the store goes from epoch {} to {store}", world.past.epoch));
    }
    world.past.epoch = store;
    for (cell, agent) in world.agents.iter().enumerate() {
        let Some(holder) = &agent.holder else { continue };
        let (seen, before) = (holder.seen(), &mut world.past.seen[cell]);
        if seen < *before {
            return Err(format!("cell {cell} goes from epoch {before} to {seen}"));
        }
        *before = seen;
    }
    Ok(())
}
