//! `[control.agents]`, and the configuration of an agent.

use std::net::SocketAddr;
use std::time::Duration;

use agent::config::AgentConfig;
use model::lease::Terms;
use pg::Address;
use tls::mutual::Mutual;

use super::reader::{Mistakes, Table};
use super::{chain, read_instance};

/// Where agents find control, and how long a lease is.
#[derive(Debug, Clone)]
pub(crate) struct Agents {
    pub(crate) listen: SocketAddr,
    pub(crate) tls: Option<Mutual>,
    pub(super) terms: Terms,
}

/// Unless it is said otherwise.
pub(super) const TERMS: Terms = Terms { length: Duration::from_millis(2_500) };
const PORT: u16 = 7433;

/// The certificate that we show, its key, and the authority of all others.
fn read_tls(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    is_elsewhere: bool,
) -> Option<Mutual> {
    let files = ["cert", "key", "ca"].map(|key| table.path(mistakes, key));
    let [Some(cert), Some(key), Some(ca)] = &files else {
        if files.iter().any(Option::is_some) {
            mistakes.add(table.span(), "`cert`, `key` and `ca` go together");
        } else if is_elsewhere {
            let text =
                "between machines control is spoken to by TLS, which needs `cert`, `key` and `ca`";
            mistakes.add(table.span(), text);
        }
        return None;
    };
    Mutual::load(cert, key, ca).map_err(|error| mistakes.add(table.span(), chain(&error))).ok()
}

/// `[control.agents]`
pub(super) fn read_control(control: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<Agents> {
    let mut table = control.table(mistakes, "agents")?;
    let span = table.span_of("listen");
    let text = table.text(mistakes, "listen").unwrap_or_else(|| format!("127.0.0.1:{PORT}"));
    let listen = text.parse::<SocketAddr>();
    if listen.is_err() {
        let text = format!(
            "`control.agents.listen` must be an address such as \"127.0.0.1:{PORT}\", it is `{text}`"
        );
        mistakes.add(span, text);
    }
    let is_elsewhere = listen.as_ref().is_ok_and(|address| !address.ip().is_loopback());
    let tls = read_tls(&mut table, mistakes, is_elsewhere);
    let length = table.duration(mistakes, "lease").unwrap_or(TERMS.length);
    if !Terms::LENGTHS.contains(&length) {
        let (min, max) = (Terms::LENGTHS.start(), Terms::LENGTHS.end());
        let text = format!(
            "`control.agents.lease` is {length:?}, between {min:?} and {max:?} is accepted"
        );
        mistakes.add(table.span_of("lease"), text);
    }
    table.end(mistakes);
    Some(Agents { listen: listen.ok()?, tls, terms: Terms { length } })
}

/// Where nodes of control are, and what is shown to them.
fn read_way(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    name: &'static str,
) -> (Vec<Address>, Option<Mutual>) {
    let key = name.rsplit('.').next().unwrap_or(name);
    let span = table.span_of(key);
    let texts = table.texts(mistakes, key);
    let texts = texts.unwrap_or_else(|| vec![(format!("127.0.0.1:{PORT}"), span.clone())]);
    if texts.is_empty() {
        mistakes.add(span, format!("`{name}` holds no address"));
    }
    let mut controls = Vec::new();
    for (text, span) in texts {
        match Address::read(&text).filter(|address| address.socket_path().is_none()) {
            Some(address) => controls.push(address),
            None => mistakes.add(span, format!("`{name}` must be `host:port`, it is `{text}`")),
        }
    }
    let is_here = |address: &Address| {
        let ip = address.host.parse::<std::net::IpAddr>();
        address.host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
    };
    let is_elsewhere = controls.iter().any(|address| !is_here(address));
    let tls = read_tls(table, mistakes, is_elsewhere);
    (controls, tls)
}

/// What a proxy needs to know of a control that is elsewhere.
#[derive(Debug)]
pub(super) struct Elsewhere {
    pub(super) name: String,
    pub(super) control: Vec<Address>,
    pub(super) tls: Option<Mutual>,
    pub(super) health: Option<SocketAddr>,
}

/// `[proxy.control]`
pub(super) fn read_proxy(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<Elsewhere> {
    let span = table.span_of("name");
    let name = table.required_text(mistakes, "name");
    if !name.is_empty() && !model::proxies::is_name(&name) {
        let text = format!(
            "`proxy.control.name` is made of letters, digits, `-`, `_` and `.`, it is `{name}`"
        );
        mistakes.add(span, text);
    }
    let (control, tls) = read_way(table, mistakes, "proxy.control.address");
    let span = table.span_of("health");
    let health = table.text(mistakes, "health").map(|text| {
        let address = text.parse::<SocketAddr>();
        let text = || format!("`proxy.control.health` must be an address such as \"127.0.0.1:7434\", it is `{text}`");
        address.map_err(|_| mistakes.add(span, text()))
    });
    let health = health.transpose().ok()?;
    Some(Elsewhere { name, control, tls, health })
}

/// `[agent]`, which is a file of its own.
pub(super) fn read(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<AgentConfig> {
    let app = table.required_text(mistakes, "app");
    let cell = table.required_text(mistakes, "cell");
    let (control, tls) = read_way(table, mistakes, "agent.control");
    let span = table.span_of("listen");
    let listen = match table.text(mistakes, "listen").map(|text| text.parse::<SocketAddr>()) {
        Some(Ok(address)) if address.ip().is_unspecified() => {
            mistakes.add(
                span,
                "`agent.listen` is where other agents reach this one, so it must be one address",
            );
            None
        }
        Some(Ok(address)) if tls.is_none() && !address.ip().is_loopback() => {
            mistakes.add(
                span,
                "`agent.listen` is not on this machine only, so `cert`, `key` and `ca` are needed",
            );
            None
        }
        Some(Ok(address)) => Some(Some(address)),
        Some(Err(_)) => {
            mistakes.add(
                span,
                format!("`agent.listen` must be an address such as \"10.0.0.1:{PORT}\""),
            );
            None
        }
        None => Some(None),
    };
    let state_dir =
        table.path(mistakes, "state_dir").unwrap_or_else(|| "/var/lib/holdfast-agent".into());
    if !table.has("data_dir") {
        mistakes.add(table.span(), "`agent.data_dir` is needed");
    }
    let instance = read_instance(table, mistakes);
    let (instance, listen) = (instance?, listen?);
    Some(AgentConfig { app, cell, instance, control, listen, tls, state_dir, guard: Vec::new() })
}
