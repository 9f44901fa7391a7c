//! Liveness: once everything is well again, a node is control, the cell with the grant takes writes by a lease, and every proxy
//! serves it.

use crate::node::Role;
use crate::world::World;

pub(super) fn check(world: &mut World) -> Result<(), String> {
    let is_control = |node: &crate::node::Node| matches!(node.role, Role::Control(_));
    if !world.nodes.iter().any(is_control) {
        return Err("no node is control".into());
    }
    let cell = world.store.application.granted_to;
    let now = world.clock(cell);
    let agent = &world.agents[cell];
    let has_lease = agent.holder.as_ref().is_some_and(|holder| holder.epoch(now).is_some());
    if !has_lease || !agent.server.is_running || !agent.server.is_primary || agent.is_fenced {
        let office = world.nodes.iter().find_map(|node| match &node.role {
            Role::Control(office) => Some(format!("{:?}", office.step)),
            Role::Candidate(_) => None,
        });
        return Err(format!(
            "cell {cell} of epoch {} takes no writes: lease {has_lease}, {:?}, control {office:?}",
            world.store.application.epoch, agent.server
        ));
    }
    for (at, proxy) in world.proxies.iter().enumerate() {
        let open = proxy.passing(world.clock_of_proxy(at), None);
        if open.is_none_or(|open| open.cell != cell.to_string()) {
            return Err(format!(
                "proxy {at} serves {open:?}, cell {cell} has the grant: {proxy:?}"
            ));
        }
    }
    Ok(())
}
