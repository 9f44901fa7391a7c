//! `[control.agents]`, and the configuration of an agent.

use std::net::SocketAddr;
use std::time::Duration;

use agent::config::AgentConfig;
use model::lease::Terms;

use super::read_instance;
use super::reader::{Mistakes, Table};

/// Where agents find control, and how long a lease is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Agents {
    pub(super) listen: SocketAddr,
    pub(super) terms: Terms,
}

const LEASE: Duration = Duration::from_millis(2_500);

/// An address on this machine: agents elsewhere need TLS.
fn read_address(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    key: &'static str,
) -> Option<SocketAddr> {
    let span = table.span_of(key);
    let text = table.text(mistakes, key).unwrap_or_else(|| "127.0.0.1:7433".into());
    match text.parse::<SocketAddr>() {
        Ok(address) if address.ip().is_loopback() => Some(address),
        Ok(address) => {
            let text = format!(
                "`{key}` is `{address}`; as agents do not speak TLS yet, it has to be a loopback address"
            );
            mistakes.add(span, text);
            None
        }
        Err(_) => {
            let text =
                format!("`{key}` must be an address such as \"127.0.0.1:7433\", it is `{text}`");
            mistakes.add(span, text);
            None
        }
    }
}

/// `[control.agents]`
pub(super) fn read_control(control: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<Agents> {
    let mut table = control.table(mistakes, "agents")?;
    let listen = read_address(&mut table, mistakes, "listen");
    let length = table.duration(mistakes, "lease").unwrap_or(LEASE);
    if !Terms::LENGTHS.contains(&length) {
        let (min, max) = (Terms::LENGTHS.start(), Terms::LENGTHS.end());
        let text = format!(
            "`control.agents.lease` is {length:?}, between {min:?} and {max:?} is accepted"
        );
        mistakes.add(table.span_of("lease"), text);
    }
    table.end(mistakes);
    Some(Agents { listen: listen?, terms: Terms { length } })
}

/// `[agent]`, which is a file of its own.
pub(super) fn read(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<AgentConfig> {
    let app = table.required_text(mistakes, "app");
    let cell = table.required_text(mistakes, "cell");
    let control = read_address(table, mistakes, "control");
    let state_dir =
        table.path(mistakes, "state_dir").unwrap_or_else(|| "/var/lib/holdfast-agent".into());
    if !table.has("data_dir") {
        mistakes.add(table.span(), "`agent.data_dir` is needed");
    }
    let instance = read_instance(table, mistakes);
    let (instance, control) = (instance?, control?);
    Some(AgentConfig { app, cell, instance, control, state_dir, guard: Vec::new() })
}
