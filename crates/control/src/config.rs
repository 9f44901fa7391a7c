//! Applications, their cells, and how each server is reached.

use std::collections::BTreeMap;
use std::path::PathBuf;

use pg::Target;
use pg::admin::AdminLogin;
use pg::instance::Instance;

#[derive(Debug, Clone)]
pub struct ControlConfig {
    pub apps: BTreeMap<String, AppServers>,
    /// Where the store is kept.
    pub state_dir: PathBuf,
}

#[derive(Debug, Clone)]
pub struct AppServers {
    /// The cell that is active when the application is first seen.
    pub first_active: String,
    pub cells: BTreeMap<String, CellServer>,
}

/// One server.
#[derive(Debug, Clone)]
pub struct CellServer {
    pub target: Target,
    pub admin: AdminLogin,
    /// Its data directory on this machine, if Holdfast may stop, rewind and start it. Without one the old server
    /// of a switchover stays fenced until somebody makes it a standby.
    pub instance: Option<Instance>,
    /// How a standby and pg_rewind reach this server, as a libpq connection string.
    pub conninfo: String,
}
