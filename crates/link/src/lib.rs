//! Connections between the processes of an installation: an agent or a proxy asks, control answers.
//!
//! # Layout, in reading order
//! - [`transport`]: connections, by TLS on which both sides show who they are, or plain on this machine.
//! - [`client`]: questions, each with its deadline.
//! - [`server`]: connections that others make, and answers.
//!
//! Whose certificate is which is said by its common name: [`agent_name`], [`proxy_name`].

#![forbid(unsafe_code)]

pub mod client;
pub mod server;
#[cfg(test)]
mod tests;
pub mod transport;

pub use client::{Client, ClientError, Controls};
pub use server::Who;
pub use transport::{Peer, Protocol, Stream};

/// Which control an answer is of: the number of its tenure (`model::seat`).
pub const TENURE_HEADER: &str = "holdfast-tenure";

/// What the certificate of a cell's agent is made out to.
pub fn agent_name(app: &str, cell: &str) -> String {
    format!("{app}/{cell}")
}

/// What the certificate of a proxy is made out to. Its name has no `/`, so it is no agent's.
pub fn proxy_name(name: &str) -> String {
    format!("proxy:{name}")
}
