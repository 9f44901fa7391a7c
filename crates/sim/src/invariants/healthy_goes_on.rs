//! I12: where only control and the store are in trouble, no server is ended while none of its neighbours hears control. (One
//! that does hear it pledges nothing: for all it knows, the holder of the lease is cut off.)

use crate::world::{Weather, World};

pub(super) fn check(world: &mut World) -> Result<(), String> {
    match world.past.ended_unheard && world.weather == Weather::ControlOnly {
        false => Ok(()),
        true => Err("a server was ended, though it and its neighbours were well".into()),
    }
}
