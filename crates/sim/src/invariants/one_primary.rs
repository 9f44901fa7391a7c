//! I1, S2: no two servers acknowledge writes at a time. One on a host that was frozen is ended within a look of its guard.

use crate::world::{GUARD_LOOK, World};

pub(super) fn check(world: &mut World) -> Result<(), String> {
    let acknowledges = |cell: &usize| {
        let (host, agent) = (&world.hosts[*cell], &world.agents[*cell]);
        let server = &agent.server;
        let is_awake = host.is_up && world.now >= host.frozen_until + 2 * GUARD_LOOK;
        is_awake && server.is_running && server.is_primary && !agent.is_fenced
    };
    let all: Vec<usize> = (0..world.agents.len()).filter(acknowledges).collect();
    match all.len() {
        0 | 1 => Ok(()),
        _ => Err(format!("cells {all:?} acknowledge writes")),
    }
}
