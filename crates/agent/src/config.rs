//! Which server, and where control is.

use std::net::SocketAddr;
use std::path::PathBuf;

use pg::Address;
use pg::instance::Instance;
use tls::mutual::Mutual;

#[derive(Debug, Clone)]
pub struct AgentConfig {
    pub app: String,
    pub cell: String,
    pub instance: Instance,
    /// Where nodes of control listen for agents; one of them is control.
    pub control: Vec<Address>,
    /// Where other agents of the application ask this one for pledges, and reach it.
    pub listen: Option<SocketAddr>,
    /// None: control is on this machine.
    pub tls: Option<Mutual>,
    /// Keeps the highest epoch that was seen, the guard's socket, and what a lost server alone had.
    pub state_dir: PathBuf,
    /// Ends the server when the lease is over, as `guard` does: a program and its arguments.
    pub guard: Vec<String>,
}
