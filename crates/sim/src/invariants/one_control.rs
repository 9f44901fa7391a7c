//! I8: no two nodes count on the seat at a time, by whichever clocks.

use crate::node::Role;
use crate::world::World;

pub(super) fn check(world: &mut World) -> Result<(), String> {
    let counts = |at: &usize| match &world.nodes[*at].role {
        Role::Control(office) => office.sitting.is_valid(world.clock_of_node(*at)),
        Role::Candidate(_) => false,
    };
    let all: Vec<usize> = (0..world.nodes.len()).filter(counts).collect();
    match all.len() {
        0 | 1 => Ok(()),
        _ => Err(format!("nodes {all:?} count on the seat")),
    }
}
