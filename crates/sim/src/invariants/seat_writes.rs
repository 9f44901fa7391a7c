//! I3: nothing is written by a node whose seat another has.

use crate::world::World;

pub(super) fn check(world: &mut World) -> Result<(), String> {
    match world.store.late_write.take() {
        Some((by, seat)) => Err(format!("a write of tenure {} under tenure {}", by.0, seat.0)),
        None => Ok(()),
    }
}
