//! What the proxy is told. The binary validates it; here everything is what it says.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use model::policy::Policy;
use pg::Target;
use pg::admin::AdminLogin;
use pg::stream::Keepalive;
use tls::ServerTls;

#[derive(Debug, Clone)]
pub struct ProxyConfig {
    pub listen: Vec<SocketAddr>,
    /// None: clients are answered `N` when they ask for TLS.
    pub tls: Option<ServerTls>,
    /// Clients without TLS are refused.
    pub tls_required: bool,
    pub limits: Limits,
    pub keepalive: Keepalive,
    pub apps: Vec<AppConfig>,
    /// Users who may open the admin database; they prove themselves as everywhere.
    pub admin_users: Vec<String>,
    /// Engine threads. One is the leanest; more are for many cores.
    pub engines: usize,
    /// The id of the first session; other proxies' begin elsewhere.
    pub first_id: u64,
}

/// Every queue and every wait has an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Clients at once; one more is refused (53300).
    pub clients_max: usize,
    /// Logins under way at once; more wait in the listener's backlog.
    pub logins_max: usize,
    /// From the first byte to the first ReadyForQuery.
    pub login_timeout: Duration,
    /// A session that sends nothing for so long is ended (57P05); zero for never.
    pub idle_timeout: Duration,
    /// Sessions that are read or attached at the same time during a move.
    pub moves_at_once: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            clients_max: 10_000,
            logins_max: 256,
            login_timeout: Duration::from_secs(60),
            idle_timeout: Duration::ZERO,
            moves_at_once: 16,
        }
    }
}

/// What moves of an application's sessions may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoveLimits {
    /// Bytes of temporary tables, or of cursors, that one session may have.
    pub temporary_max: u64,
    /// The same of all sessions that are held at the same time.
    pub temporary_total_max: u64,
    /// The longest wait for one answer of a server.
    pub answer_timeout: Duration,
}

impl Default for MoveLimits {
    fn default() -> MoveLimits {
        MoveLimits {
            temporary_max: 64 << 20,
            temporary_total_max: 1 << 30,
            answer_timeout: Duration::from_secs(10),
        }
    }
}

/// How sessions of an application share servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolLimits {
    /// Server connections that sessions share.
    pub size: usize,
    /// Those that sessions keep for themselves, besides. With more, as many fewer are shared.
    pub kept_max: usize,
    /// The longest wait of a session for a server connection.
    pub wait_max: Duration,
    /// Sessions that have used sequences keep their server, for `currval` and `lastval`. Otherwise values are forgotten
    /// at the end of each transaction.
    pub currval: bool,
}

impl Default for PoolLimits {
    fn default() -> PoolLimits {
        PoolLimits { size: 20, kept_max: 100, wait_max: Duration::from_secs(30), currval: true }
    }
}

/// The rules of an application, and how they are applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyConfig {
    pub policy: Policy,
    /// What would be refused is counted and logged, and passes.
    pub shadow: bool,
    /// The longest wait of a command by a rule that holds.
    pub hold_max: Duration,
    /// Functions that change nothing, whatever the catalog says of them.
    pub reading: Vec<String>,
}

impl Default for PolicyConfig {
    fn default() -> PolicyConfig {
        PolicyConfig {
            policy: Policy::default(),
            shadow: false,
            hold_max: Duration::from_secs(30),
            reading: Vec::new(),
        }
    }
}

#[derive(Debug, Clone)]
pub struct AppConfig {
    pub name: String,
    /// Databases that belong to it; empty for all.
    pub databases: Vec<String>,
    pub moves: MoveLimits,
    /// None: each session has a server of its own.
    pub pool: Option<PoolLimits>,
    pub policy: PolicyConfig,
    pub cells: BTreeMap<String, Target>,
    pub auth: AuthConfig,
    /// How Holdfast itself logs in, for the verifiers of clients.
    pub admin: AdminLogin,
}

#[derive(Debug, Clone)]
pub enum AuthConfig {
    /// SCRAM against the verifier that this query reads from the server.
    Scram { query: String },
    /// Nobody is checked. For development.
    Trust,
    /// Users and passwords, or verifiers, in a file. For development.
    File(PathBuf),
}

/// Reads a verifier by the user's name; needs a role that may read `pg_authid`.
pub const AUTH_QUERY: &str = "SELECT rolname, CASE WHEN rolvaliduntil < pg_catalog.now() THEN NULL \
    ELSE rolpassword END FROM pg_catalog.pg_authid \
    WHERE rolname OPERATOR(pg_catalog.=) $1::pg_catalog.text";
