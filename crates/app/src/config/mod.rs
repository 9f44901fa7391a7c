//! The configuration file. It is read as a whole: every mistake is named with its line and what is accepted,
//! and nothing starts while there is one.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent::config::AgentConfig;
use control::agents::Link;
use control::config::{AppServers, AppSettings, CellServer, FailoverConfig};
use control::live::Live;
use control::{ControlConfig, Member};
pub(crate) use model::chain;
use model::durability::Durability;
use model::lease::Terms;
use model::objectives::Objectives;
use pg::admin::AdminLogin;
use pg::instance::{self, Instance};
use pg::member::Local;
use pg::stream::Keepalive;
use pg::{Address, Target};
use proxy::ProxyConfig;
use proxy::config::{AUTH_QUERY, AppConfig, AuthConfig, Limits, MoveLimits, PoolLimits};
use thiserror::Error;
use tls::config::ClientCert;
use tls::{ClientTls, ServerTls, SslMode, SslNegotiation};
use toml::de::DeTable;
use wire::scram::{Credential, Secret};

mod agents;
mod alarms;
mod node;
mod plans;
mod policy;
mod reader;
mod regions;
mod safety;

use crate::api::access::{Access, Role, Token};
use crate::loaded::Loaded;
use crate::remote::RemoteConfig;
pub(crate) use agents::Agents;
pub(crate) use node::Node;
pub(crate) use reader::{Mistake, read_duration};
use reader::{Mistakes, Table};

/// Largest configuration file.
const FILE_LEN_MAX: u64 = 1024 * 1024;

/// Everything that the file says.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) proxy: ProxyConfig,
    pub(crate) control: ControlConfig,
    pub(crate) api: ApiConfig,
    /// Where agents find control, if there are to be any.
    pub(crate) agents: Option<Agents>,
}

impl Config {
    /// What runs, to be compared with its file.
    pub(crate) fn loaded(&self, file: (&Path, &str)) -> Loaded {
        Loaded::new(file, self.control.clone(), self.api.access.clone(), None)
    }
}

/// What one of several nodes of control needs.
#[derive(Debug, Clone)]
pub(crate) struct NodeConfig {
    pub(crate) node: Node,
    pub(crate) control: ControlConfig,
    pub(crate) api: ApiConfig,
    pub(crate) agents: Agents,
}

/// What a process is.
#[derive(Debug, Clone)]
pub(crate) enum Roles {
    /// Proxy and control.
    Here(Box<Config>),
    /// One of several nodes, of which one is control.
    Node(Box<NodeConfig>),
    Agent(Box<AgentConfig>),
    /// A proxy whose control is elsewhere.
    Proxy(Box<RemoteConfig>),
}

#[derive(Debug, Clone)]
pub(crate) struct ApiConfig {
    pub(crate) listen: SocketAddr,
    pub(crate) access: Live<Access>,
}

#[derive(Debug, Error)]
pub(crate) enum ConfigError {
    #[error("`{path}` cannot be read")]
    File { path: PathBuf, source: std::io::Error },
    #[error("{}", shown(.path, .mistakes))]
    Mistakes { path: PathBuf, mistakes: Vec<Mistake> },
}

fn shown(path: &Path, mistakes: &[Mistake]) -> String {
    let lines = mistakes.iter().map(|m| format!("\n{}:{}: {}", path.display(), m.line, m.text));
    let count = mistakes.len();
    format!(
        "configuration has {count} mistake{}:{}",
        if count == 1 { "" } else { "s" },
        lines.collect::<String>()
    )
}

impl Roles {
    /// Of proxy and control, which this is to be about.
    ///
    /// # Errors
    /// It is an agent's.
    pub(crate) fn into_config(self) -> Result<Config, String> {
        match self {
            Roles::Here(config) => Ok(*config),
            Roles::Agent(agent) => Err(format!(
                "the file configures the agent of cell `{}`, that of proxy and control is needed",
                agent.cell
            )),
            Roles::Node(node) => Err(format!(
                "the file configures node `{}`, whose store is etcd; that of proxy and control is needed",
                node.node.etcd.node
            )),
            Roles::Proxy(proxy) => Err(format!(
                "the file configures proxy `{}`, that of control is needed",
                proxy.name
            )),
        }
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// It cannot be read, or has mistakes; all of them are named.
    pub(crate) fn load(path: &Path) -> Result<Roles, ConfigError> {
        Roles::load_with_text(path).map(|(roles, _)| roles)
    }

    /// The text as well.
    ///
    /// # Errors
    /// As `load`.
    pub(crate) fn load_with_text(path: &Path) -> Result<(Roles, String), ConfigError> {
        let file = |source| ConfigError::File { path: path.to_owned(), source };
        // Anything else, such as a pipe, might keep everybody waiting.
        if !std::fs::metadata(path).map_err(file)?.is_file() {
            return Err(file(std::io::Error::other("it is no regular file")));
        }
        let mut text = String::new();
        let open = std::fs::File::open(path).map_err(file)?;
        open.take(FILE_LEN_MAX + 1).read_to_string(&mut text).map_err(file)?;
        if u64::try_from(text.len()).unwrap_or(u64::MAX) > FILE_LEN_MAX {
            return Err(file(std::io::ErrorKind::FileTooLarge.into()));
        }
        let roles = Roles::read(&text)
            .map_err(|mistakes| ConfigError::Mistakes { path: path.to_owned(), mistakes })?;
        Ok((roles, text))
    }

    /// Reads and checks the text of a file.
    ///
    /// # Errors
    /// Every mistake.
    pub(crate) fn read(text: &str) -> Result<Roles, Vec<Mistake>> {
        let mut mistakes = Mistakes::new(text);
        let (document, errors) = DeTable::parse_recoverable(text);
        for error in errors {
            mistakes.add(error.span().unwrap_or(0..0), error.message().to_owned());
        }
        let mut root = Table::new("", document.get_ref(), 0..0);
        let config = match root.table(&mut mistakes, "agent") {
            Some(mut table) => {
                let read =
                    agents::read(&mut table, &mut mistakes).map(|agent| Roles::Agent(agent.into()));
                table.end(&mut mistakes);
                read
            }
            None => read_root(&mut root, &mut mistakes),
        };
        root.end(&mut mistakes);
        let found = mistakes.into_found();
        match config {
            Some(config) if found.is_empty() => Ok(config),
            _ => Err(found),
        }
    }
}

fn read_root(root: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<Roles> {
    let mut proxy = root.table(mistakes, "proxy").unwrap_or(Table::empty("proxy"));
    let elsewhere = proxy.table(mistakes, "control").map(|mut table| {
        let read = agents::read_proxy(&mut table, mistakes);
        table.end(mistakes);
        read
    });
    if elsewhere.is_some() && root.has("control") {
        let span = root.span_of("control");
        mistakes.add(
            span,
            "`[proxy.control]` says that control is elsewhere, so there is no `[control]` here",
        );
    }
    let has_proxy = root.has("proxy");
    let mut control = root.table(mistakes, "control").unwrap_or(Table::empty("control"));
    let listen = read_addresses(&mut proxy, mistakes);
    let admin_users = proxy.texts(mistakes, "admin_users").unwrap_or_default();
    let limits = read_limits(&mut proxy, mistakes);
    let keepalive = read_keepalive(&mut proxy, mistakes);
    let engines = proxy.number(mistakes, "engines", 1..65).unwrap_or(1);
    let connect_timeout =
        proxy.duration(mistakes, "connect_timeout").unwrap_or(Duration::from_secs(10));
    let (tls, tls_required) = match proxy.table(mistakes, "tls") {
        Some(mut table) => {
            let read = read_server_tls(&mut table, mistakes);
            table.end(mistakes);
            read
        }
        None => (None, false),
    };
    proxy.end(mistakes);
    let api = read_api(&mut control, mistakes);
    let state_dir =
        control.path(mistakes, "state_dir").unwrap_or_else(|| "/var/lib/holdfast".into());
    let agents = agents::read_control(&mut control, mistakes);
    let node = node::read(&mut control, mistakes);
    if node.is_some() && has_proxy {
        let text = "where the store is etcd, proxies are processes of their own, each with `[proxy.control]`: there is no `[proxy]` here";
        mistakes.add(control.span_of("etcd"), text);
    }
    if node.is_some() && agents.is_none() {
        let text = "`[control.etcd]` needs `[control.agents]`, which says where agents and proxies find control";
        mistakes.add(control.span_of("etcd"), text);
    }
    control.end(mistakes);

    let common = Common {
        keepalive,
        timeout: connect_timeout,
        state_dir: state_dir.clone(),
        // Where control is elsewhere, so are the cells' members.
        lease: agents
            .as_ref()
            .map(|agents| agents.terms)
            .or(elsewhere.is_some().then_some(agents::TERMS)),
    };
    let (mut apps, mut servers) = (Vec::new(), BTreeMap::new());
    let (mut plans, mut needs) = (BTreeMap::new(), BTreeMap::new());
    let tables = root.tables(mistakes, "app");
    if tables.is_empty() {
        mistakes.add(0..0, "there is no [[app]]; at least one is needed");
    }
    for mut table in tables {
        let (span, read) = (table.span(), read_app(&mut table, mistakes, &common));
        let name = read.as_ref().map_or("", |(app, ..)| app.name.as_str());
        let its_plans = plans::read(&mut table, mistakes, name);
        table.end(mistakes);
        let Some((app, its_servers, its_needs)) = read else { continue };
        needs.insert(app.name.clone(), its_needs);
        plans.insert(app.name.clone(), its_plans);
        if servers.insert(app.name.clone(), its_servers).is_some() {
            mistakes.add(span, format!("application `{}` is there twice", app.name));
        }
        apps.push(app);
    }
    check_databases(&apps, mistakes);
    regions::check(&needs, &servers, mistakes);
    let has_tokens = api.as_ref().is_some_and(|api| !api.access.now().tokens.is_empty());
    // A proxy whose control is elsewhere does not know who may approve there.
    plans::settle(plans, &mut servers, has_tokens || elsewhere.is_some(), mistakes);
    let proxy = ProxyConfig {
        listen,
        tls,
        tls_required,
        limits,
        keepalive,
        apps,
        admin_users: admin_users.into_iter().map(|(user, _)| user).collect(),
        engines: usize::try_from(engines).unwrap_or(1),
        first_id: 1,
    };
    if let Some(elsewhere) = elsewhere {
        let agents::Elsewhere { name, control, tls, health } = elsewhere?;
        return Some(Roles::Proxy(RemoteConfig { name, control, tls, health, proxy }.into()));
    }
    let terms = agents.as_ref().map(|agents| agents.terms);
    let control = ControlConfig { apps: servers, state_dir, terms };
    if let Some(node) = node {
        let here = |server: &CellServer| matches!(server.member, Some(Member::Here(_)));
        if control.apps.values().any(|app| app.cells.values().any(here)) {
            let text = "where there are several nodes, none has a server's `data_dir` for itself: a cell has an agent";
            mistakes.add(0..0, text);
        }
        let (api, agents) = (api?, agents?);
        return Some(Roles::Node(NodeConfig { node, control, api, agents }.into()));
    }
    Some(Roles::Here(Config { proxy, control, api: api?, agents }.into()))
}

fn read_addresses(proxy: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Vec<SocketAddr> {
    let Some(texts) = proxy.texts(mistakes, "listen") else {
        return vec![SocketAddr::from(([127, 0, 0, 1], 6432))];
    };
    let mut addresses = Vec::new();
    for (text, span) in texts {
        match text.parse() {
            Ok(address) => addresses.push(address),
            Err(_) => mistakes.add(span, format!("`proxy.listen` must hold addresses such as \"127.0.0.1:6432\", `{text}` is none")),
        }
    }
    addresses
}

fn read_limits(proxy: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Limits {
    let default = Limits::default();
    let mut count = |mistakes: &mut Mistakes<'_>, key, default: usize| {
        let read = proxy.number(mistakes, key, 1..1_000_001);
        read.and_then(|number| usize::try_from(number).ok()).unwrap_or(default)
    };
    Limits {
        clients_max: count(mistakes, "clients_max", default.clients_max),
        logins_max: count(mistakes, "logins_max", default.logins_max),
        moves_at_once: count(mistakes, "moves_at_once", default.moves_at_once),
        login_timeout: proxy.duration(mistakes, "login_timeout").unwrap_or(default.login_timeout),
        idle_timeout: proxy.duration(mistakes, "idle_timeout").unwrap_or(default.idle_timeout),
    }
}

fn read_keepalive(proxy: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Keepalive {
    let default = Keepalive::default();
    Keepalive {
        idle: proxy.duration(mistakes, "keepalive_idle").unwrap_or(default.idle),
        interval: proxy.duration(mistakes, "keepalive_interval").unwrap_or(default.interval),
        user_timeout: proxy.duration(mistakes, "tcp_user_timeout").unwrap_or(default.user_timeout),
        count: default.count,
    }
}

fn read_server_tls(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
) -> (Option<ServerTls>, bool) {
    let cert = table.required_text(mistakes, "cert");
    let key = table.required_text(mistakes, "key");
    let client_ca = table.path(mistakes, "client_ca");
    let modes = ["optional", "verify-ca", "verify-full"];
    let client_cert = table.choice(mistakes, "client_cert", &modes, |text| match text {
        "optional" => Some(ClientCert::Optional),
        "verify-ca" => Some(ClientCert::VerifyCa),
        "verify-full" => Some(ClientCert::VerifyFull),
        _ => None,
    });
    if client_cert.is_some() && client_ca.is_none() {
        mistakes.add(table.span_of("client_cert"), "`proxy.tls.client_cert` needs `client_ca`");
    }
    let required = table.flag(mistakes, "required").unwrap_or(false);
    let client_cert = client_cert.unwrap_or(ClientCert::Optional);
    if cert.is_empty() || key.is_empty() {
        return (None, required);
    }
    match ServerTls::load(Path::new(&cert), Path::new(&key), client_ca.as_deref(), client_cert) {
        Ok(tls) => (Some(tls), required),
        Err(error) => {
            mistakes.add(table.span(), chain(&error));
            (None, required)
        }
    }
}

fn read_api(control: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<ApiConfig> {
    let span = control.span_of("listen");
    let listen = control.text(mistakes, "listen").unwrap_or_else(|| "127.0.0.1:7432".into());
    let token_span = control.span_of("token_file");
    let token = control
        .path(mistakes, "token_file")
        .and_then(|path| secret_file(&path, token_span, mistakes));
    let admin = |secret| Token { name: "token".into(), role: Role::Admin, secret };
    let mut tokens: Vec<Token> = token.map(admin).into_iter().collect();
    for mut table in control.tables(mistakes, "token") {
        tokens.extend(read_token(&mut table, mistakes));
        table.end(mistakes);
    }
    let mut names: Vec<&str> = tokens.iter().map(|token| &*token.name).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|two| two[0] == two[1]) {
        mistakes.add(control.span_of("token"), format!("token `{}` is there twice", twice[0]));
    }
    let is_private = control.flag(mistakes, "private").unwrap_or(false);
    if is_private && tokens.is_empty() {
        mistakes.add(
            control.span_of("private"),
            "`control.private` needs tokens, which say who may look",
        );
    }
    let Ok(address) = listen.parse::<SocketAddr>() else {
        mistakes.add(
            span,
            format!(
                "`control.listen` must be an address such as \"127.0.0.1:7432\", it is `{listen}`"
            ),
        );
        return None;
    };
    if !address.ip().is_loopback() && tokens.is_empty() {
        let text = format!(
            "`control.listen` is `{address}`, which others can reach, so `token_file` or [[control.token]] is needed"
        );
        mistakes.add(span, text);
    }
    let access = Live::new(Access { tokens, is_private });
    Some(ApiConfig { listen: address, access })
}

fn read_token(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<Token> {
    let name = table.required_text(mistakes, "name");
    let role =
        table.choice(mistakes, "role", &["viewer", "approver", "operator", "admin"], Role::read);
    let span = table.span_of("file");
    let file = table.path(mistakes, "file");
    if !table.has("role") || file.is_none() {
        mistakes.add(table.span(), "a token needs `name`, `role` and `file`");
        return None;
    }
    let secret = secret_file(&file?, span, mistakes)?;
    Some(Token { name, role: role?, secret })
}

fn secret_file(
    path: &Path,
    span: std::ops::Range<usize>,
    mistakes: &mut Mistakes<'_>,
) -> Option<Secret> {
    match std::fs::read_to_string(path) {
        Ok(text) if !text.trim().is_empty() => Some(Secret::new(text.trim())),
        Ok(_) => {
            mistakes.add(span, format!("`{}` is empty", path.display()));
            None
        }
        Err(error) => {
            mistakes.add(span, format!("`{}` cannot be read: {error}", path.display()));
            None
        }
    }
}

fn read_moves(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> MoveLimits {
    let default = MoveLimits::default();
    let (one, all) = ("temporary_max", "temporary_total_max");
    let answer_timeout = table.duration(mistakes, "move_answer_timeout");
    MoveLimits {
        temporary_max: table.size(mistakes, one).unwrap_or(default.temporary_max),
        temporary_total_max: table.size(mistakes, all).unwrap_or(default.temporary_total_max),
        answer_timeout: answer_timeout.unwrap_or(default.answer_timeout),
    }
}

/// `pool = "transaction"` and its limits.
fn read_pool(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<PoolLimits> {
    let default = PoolLimits::default();
    let modes = ["session", "transaction"];
    let shares = table.choice(mistakes, "pool", &modes, |text| match text {
        "session" => Some(false),
        "transaction" => Some(true),
        _ => None,
    });
    let keys = ["pool_size", "pool_kept_max", "pool_wait_max", "pool_currval"];
    if shares != Some(true)
        && let Some(key) = keys.iter().find(|key| table.has(key))
    {
        mistakes.add(table.span_of(key), format!("`app.{key}` needs `pool = \"transaction\"`"));
    }
    let mut count = |key, range: std::ops::Range<u64>, default: usize| {
        let read = table.number(mistakes, key, range);
        read.and_then(|number| usize::try_from(number).ok()).unwrap_or(default)
    };
    let size = count("pool_size", 1..100_001, default.size);
    let kept_max = count("pool_kept_max", 0..100_001, default.kept_max);
    let wait_max = table.duration(mistakes, "pool_wait_max").unwrap_or(default.wait_max);
    let currval = table.flag(mistakes, "pool_currval").unwrap_or(default.currval);
    (shares == Some(true)).then_some(PoolLimits { size, kept_max, wait_max, currval })
}

/// `[app.durability]`
fn read_durability(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Durability {
    let Some(mut table) = table.table(mistakes, "durability") else { return Durability::default() };
    let acks = table.number(mistakes, "acks", 0..100).unwrap_or(0);
    let is_strict = table.flag(mistakes, "strict").unwrap_or(false);
    table.end(mistakes);
    Durability { acks: usize::try_from(acks).unwrap_or(0), is_strict }
}

/// `[app.objectives]`
fn read_objectives(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Objectives {
    let Some(mut table) = table.table(mistakes, "objectives") else { return Objectives::default() };
    let rto = table.duration(mistakes, "rto");
    let rto_ms = rto.map(|rto| u64::try_from(rto.as_millis()).unwrap_or(u64::MAX));
    let rpo_bytes = table.size(mistakes, "rpo");
    table.end(mistakes);
    Objectives { rto_ms, rpo_bytes }
}

/// `[app.failover]`
fn read_failover(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> FailoverConfig {
    let default = FailoverConfig::default();
    let Some(mut table) = table.table(mistakes, "failover") else { return default };
    let read = FailoverConfig {
        automatic: table.flag(mistakes, "automatic").unwrap_or(default.automatic),
        loss_max: table.size(mistakes, "loss_max"),
        block: table.duration(mistakes, "block").unwrap_or(default.block),
    };
    table.end(mistakes);
    read
}

/// What is said once for all servers.
struct Common {
    keepalive: Keepalive,
    timeout: Duration,
    state_dir: PathBuf,
    /// None: agents find nobody.
    lease: Option<Terms>,
}

fn read_app(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    common: &Common,
) -> Option<(AppConfig, AppServers, regions::Needed)> {
    let name = table.required_text(mistakes, "name");
    let databases = table.texts(mistakes, "databases").unwrap_or_default();
    let moves = read_moves(table, mistakes);
    let pool = read_pool(table, mistakes);
    let policy = policy::read(table, mistakes);
    let failover = read_failover(table, mistakes);
    let durability = read_durability(table, mistakes);
    let objectives = read_objectives(table, mistakes);
    let slots = table.flag(mistakes, "slots").unwrap_or(false);
    let needs = table.texts(mistakes, "depends_on").unwrap_or_default();
    let auth = read_auth(table, mistakes);
    let admin = read_admin(table, mistakes);
    let sslmode = table.choice(mistakes, "sslmode", &SslMode::NAMES, SslMode::from_name);
    let root = table.path(mistakes, "sslrootcert");
    let (cert, key) = (table.path(mistakes, "sslcert"), table.path(mistakes, "sslkey"));
    if cert.is_some() != key.is_some() {
        mistakes.add(table.span(), "`app.sslcert` and `app.sslkey` go together");
    }
    let identity = cert.as_deref().zip(key.as_deref());
    let tls = ClientTls::load(sslmode.unwrap_or(SslMode::Prefer), root.as_deref(), identity);
    let tls = tls.map_err(|error| mistakes.add(table.span(), chain(&error))).ok();
    let names = &SslNegotiation::NAMES;
    let negotiation = table.choice(mistakes, "sslnegotiation", names, SslNegotiation::from_name);
    let negotiation = negotiation.unwrap_or_default();
    if negotiation == SslNegotiation::Direct && sslmode.is_none_or(|mode| mode < SslMode::Require) {
        // As libpq: a mode that may go without TLS has nothing to fall back to.
        mistakes.add(
            table.span(),
            "`app.sslnegotiation = \"direct\"` needs `app.sslmode` to be require, verify-ca or verify-full",
        );
    }
    let tls = tls.map(|mut tls| {
        tls.negotiation = negotiation;
        tls
    });

    let mut cells = BTreeMap::new();
    let mut active = Vec::new();
    for mut cell in table.tables(mistakes, "cell") {
        let span = cell.span();
        let (cell_name, server, first) =
            read_cell(&mut cell, mistakes, &name, &admin, tls.clone(), common);
        cell.end(mistakes);
        if first {
            active.push(cell_name.clone());
        }
        if let Some(server) = server
            && cells.insert(cell_name.clone(), server).is_some()
        {
            mistakes.add(span, format!("cell `{cell_name}` is there twice"));
        }
    }
    if cells.len() < 2 {
        let text = format!("application `{name}` has {} cells, at least 2 are needed", cells.len());
        mistakes.add(table.span(), text);
    }
    if active.len() != 1 {
        let text = format!(
            "application `{name}` has {} cells with `active = true`, exactly 1 is needed",
            active.len()
        );
        mistakes.add(table.span(), text);
    }
    regions::check_names(&cells, &table.span(), mistakes);
    let first_active = active.pop()?;
    let targets =
        cells.iter().map(|(name, server)| (name.clone(), server.target.clone())).collect();
    let databases =
        databases.into_iter().map(|(name, _)| name).filter(|name| name != "*").collect();
    let app = AppConfig { name, databases, moves, pool, policy, cells: targets, auth, admin };
    if failover.automatic && cells.values().any(|server| server.member.is_none()) {
        let text = "`app.failover.automatic` needs a `data_dir` or an agent for each cell: without one nobody can say that a server is dead";
        mistakes.add(table.span_of("failover"), text);
    }
    let rules = safety::read(table, mistakes, &cells);
    let others = cells.len().saturating_sub(1);
    if durability.acks > others {
        let acks = durability.acks;
        let text = format!("`app.durability.acks` is {acks}, and there are {others} other cells");
        mistakes.add(table.span_of("durability"), text);
    }
    let alarms = alarms::read(table, mistakes, &app.name, &cells);
    let plans = BTreeMap::new();
    let settings = AppSettings { failover, durability, objectives, slots, plans, alarms, rules };
    let depends_on = needs.iter().map(|(app, _)| app.clone()).collect();
    let settings = Live::new(settings);
    Some((app, AppServers { first_active, cells, depends_on, settings }, needs))
}

fn read_auth(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> AuthConfig {
    let accepted = ["scram", "trust", "file"];
    let kind = table
        .choice(mistakes, "auth", &accepted, |text| accepted.iter().position(|name| *name == text));
    let query = table.text(mistakes, "auth_query");
    let file = table.path(mistakes, "auth_file");
    match (kind.unwrap_or(0), file) {
        (1, _) => AuthConfig::Trust,
        (2, Some(path)) => {
            if let Err(error) = std::fs::metadata(&path) {
                mistakes.add(
                    table.span_of("auth_file"),
                    format!("`{}` cannot be read: {error}", path.display()),
                );
            }
            AuthConfig::File(path)
        }
        (2, None) => {
            mistakes.add(table.span_of("auth"), "`app.auth = \"file\"` needs `auth_file`");
            AuthConfig::Trust
        }
        _ => AuthConfig::Scram { query: query.unwrap_or_else(|| AUTH_QUERY.into()) },
    }
}

fn read_admin(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> AdminLogin {
    let user = table.text(mistakes, "admin_user").unwrap_or_else(|| "postgres".into());
    let database = table.text(mistakes, "admin_database").unwrap_or_else(|| "postgres".into());
    let span = table.span_of("admin_password_file");
    let password = table.path(mistakes, "admin_password_file");
    let credential =
        password.and_then(|path| secret_file(&path, span, mistakes)).map(Credential::Password);
    AdminLogin { user, database, credential }
}

fn read_cell(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    app: &str,
    admin: &AdminLogin,
    tls: Option<ClientTls>,
    common: &Common,
) -> (String, Option<CellServer>, bool) {
    let name = table.required_text(mistakes, "name");
    let span = table.span_of("server");
    let server = table.required_text(mistakes, "server");
    let region = regions::read(table, mistakes);
    let active = table.flag(mistakes, "active").unwrap_or(false);
    let address = Address::read(&server);
    if address.is_none() && !server.is_empty() {
        mistakes.add(span, format!("`app.cell.server` must be `host:port` or `/socket/directory:port`, it is `{server}`"));
    }
    let instance = read_instance(table, mistakes);
    let has_agent = table.flag(mistakes, "agent").unwrap_or(false);
    if has_agent && instance.is_some() {
        let text = "`app.cell.agent` and `data_dir` exclude each other: where there is an agent, its configuration has the directory";
        mistakes.add(table.span_of("agent"), text);
    }
    if has_agent && common.lease.is_none() {
        let text =
            "`app.cell.agent` needs `[control.agents]`, which says where agents find control";
        mistakes.add(table.span_of("agent"), text);
    }
    let conninfo = table.text(mistakes, "conninfo");
    let (Some(address), Some(tls)) = (address, tls) else { return (name, None, active) };
    let conninfo = conninfo.unwrap_or_else(|| {
        format!(
            "host={} port={} user={} dbname={}",
            address.host, address.port, admin.user, admin.database
        )
    });
    let Common { keepalive, timeout, ref state_dir, lease } = *common;
    let target = Target { address, tls, keepalive, timeout };
    let member = match (instance, lease.filter(|_| has_agent)) {
        (Some(instance), _) => {
            Some(Member::Here(Local { instance, lost_dir: state_dir.join("lost") }))
        }
        (None, Some(terms)) => Some(Member::Agent(Arc::new(Link::new(app, &name, terms)))),
        (None, None) => None,
    };
    (name, Some(CellServer { region, target, admin: admin.clone(), member, conninfo }), active)
}

/// A server whose programs and files are on this machine.
fn read_instance(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<Instance> {
    let data_dir = table.path(mistakes, "data_dir");
    let bin_dir = table.path(mistakes, "bin_dir");
    let options = table.texts(mistakes, "server_options").unwrap_or_default();
    let data_dir = data_dir?;
    let Some(bin_dir) = bin_dir.or_else(instance::find_bin_dir) else {
        mistakes.add(
            table.span(),
            "PostgreSQL's programs are not on this machine; `bin_dir` says where they are",
        );
        return None;
    };
    match Instance::of(&bin_dir, &data_dir) {
        Ok(instance) => {
            let options = options.into_iter().map(|(option, _)| option).collect();
            Some(Instance { options, ..instance })
        }
        Err(error) => {
            mistakes.add(table.span_of("data_dir"), chain(&error));
            None
        }
    }
}

/// A database must lead to one application.
fn check_databases(apps: &[AppConfig], mistakes: &mut Mistakes<'_>) {
    let mut seen = BTreeSet::new();
    for app in apps {
        let names =
            if app.databases.is_empty() { vec!["*".to_owned()] } else { app.databases.clone() };
        for name in names {
            if !seen.insert(name.clone()) {
                mistakes
                    .add(0..0, format!("database `{name}` belongs to more than one application"));
            }
        }
    }
}

#[cfg(test)]
mod tests;
