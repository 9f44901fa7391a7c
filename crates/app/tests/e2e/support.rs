//! Starts the demo's installation for a test, speaks to it, and ends it, whatever happens.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use pg::connect::Login;
use pg::stream::Keepalive;
use pg::{Address, ConnectError, Connection, Port, Target};
use tls::{ClientTls, SslMode};
use wire::scram::{Credential, Secret};

pub(crate) const HOLDFAST: &str = env!("CARGO_BIN_EXE_holdfast");
const START_MAX: Duration = Duration::from_secs(120);

/// What `demo.json` says.
pub(crate) struct Facts {
    pub(crate) port: u16,
    pub(crate) api: String,
    pub(crate) servers: BTreeMap<String, u16>,
    /// Pids, if there are agents.
    agents: BTreeMap<String, u32>,
    /// Ports and pids of proxies of other processes.
    pub(crate) proxies: Vec<(u16, u32)>,
    /// Pids of nodes of control, if there are several, and of the etcd that is their store.
    pub(crate) controls: Vec<u32>,
    pub(crate) etcd: Option<u32>,
}

/// An installation: servers `a` and `b`, proxy and control in one process.
pub(crate) struct Installation {
    pub(crate) dir: PathBuf,
    pub(crate) facts: Facts,
    child: Child,
    /// Agents that were started here, in place of those of the demo.
    agents: BTreeMap<String, Child>,
}

/// Another PostgreSQL than the system's, as `cargo xtask majors` gives it.
pub(crate) fn other_bin_dir() -> Option<PathBuf> {
    std::env::var_os("HOLDFAST_TEST_BINDIR").map(PathBuf::from)
}

/// Cells to switch to, one after the other. A distribution without pg_rewind cannot take the old server back.
pub(crate) fn there_and_back() -> &'static [&'static str] {
    let one_way = other_bin_dir().is_some_and(|bin_dir| !bin_dir.join("pg_rewind").exists());
    if one_way { &["b"] } else { &["b", "a"] }
}

fn port_of(dsn: &str) -> u16 {
    dsn.split("port=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + START_MAX;
    while !done() {
        assert!(Instant::now() < deadline, "waited {START_MAX:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Installation {
    pub(crate) fn start(name: &str) -> Installation {
        Installation::start_with(name, &[])
    }

    /// Its sessions share so many server connections.
    pub(crate) fn start_pooled(name: &str, size: u16) -> Installation {
        Installation::start_with(name, &["--pool", &size.to_string()])
    }

    /// Its sessions share servers, and it fails over by itself.
    pub(crate) fn start_failing_over(name: &str) -> Installation {
        Installation::start_on(name, &["--pool", "8"], other_bin_dir())
    }

    /// Its sessions share servers, beside each of which is an agent, and it fails over by itself.
    pub(crate) fn start_with_agents(name: &str) -> Installation {
        Installation::start_on(name, &["--pool", "8", "--agents"], other_bin_dir())
    }

    /// On the system's PostgreSQL, whichever the tests are for.
    pub(crate) fn start_on_system(name: &str) -> Installation {
        Installation::start_on(name, &["--no-failover"], None)
    }

    /// Clients are served by two proxies.
    pub(crate) fn start_proxied(name: &str, args: &[&str]) -> Installation {
        Installation::start_on(name, &[args, &["--proxies", "2"]].concat(), other_bin_dir())
    }

    /// Three cells, of which each commit is on two.
    pub(crate) fn start_of_three(name: &str, args: &[&str]) -> Installation {
        let three = ["--pool", "8", "--cells", "3", "--acks", "1"];
        let mut installation =
            Installation::start_on(name, &[args, &three].concat(), other_bin_dir());
        // Several are lost within minutes.
        let often = "automatic = true\nblock = \"0s\"";
        installation.reconfigure(|text| text.replacen("automatic = true", often, 1));
        installation
    }

    /// Three nodes of which one is control, with etcd; two proxies; agents.
    pub(crate) fn start_nodes(name: &str, args: &[&str]) -> Installation {
        let nodes = ["--pool", "8", "--controls", "3", "--proxies", "2"];
        Installation::start_on(name, &[args, &nodes].concat(), other_bin_dir())
    }

    fn start_with(name: &str, args: &[&str]) -> Installation {
        Installation::start_on(name, &[args, &["--no-failover"]].concat(), other_bin_dir())
    }

    fn start_on(name: &str, args: &[&str], bin_dir: Option<PathBuf>) -> Installation {
        let dir = std::env::temp_dir().join(format!("holdfast-e2e-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        let mut command = Command::new(HOLDFAST);
        if let Some(bin_dir) = bin_dir {
            command.arg("demo").arg("--bindir").arg(bin_dir);
        } else {
            command.arg("demo");
        }
        let child = command
            .args(["--no-tour", "--sessions", "0", "--dir"])
            .arg(&dir)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (servers, agents, proxies, controls) = Default::default();
        let api = String::new();
        let facts = Facts { port: 0, api, servers, agents, proxies, controls, etcd: None };
        let mut installation = Installation { dir, facts, child, agents: BTreeMap::new() };
        let path = installation.dir.join("demo.json");
        wait_until("demo.json", || {
            assert!(installation.child.try_wait().unwrap().is_none(), "the demo has ended");
            std::fs::read(&path)
                .is_ok_and(|text| serde_json::from_slice::<serde_json::Value>(&text).is_ok())
        });
        let text = std::fs::read(&path).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let pid = |value: &serde_json::Value| u32::try_from(value.as_u64().unwrap()).unwrap();
        installation.facts = Facts {
            port: port_of(&text(&json["dsn"])),
            api: text(&json["api"]),
            servers: json["servers"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(name, dsn)| (name.clone(), port_of(&text(dsn))))
                .collect(),
            agents: ["a", "b"]
                .into_iter()
                .zip(json["pids"]["agents"].as_array().unwrap())
                .map(|(name, value)| (name.to_owned(), pid(value)))
                .collect(),
            proxies: json["proxies"]
                .as_array()
                .unwrap()
                .iter()
                .zip(json["pids"]["proxies"].as_array().unwrap())
                .map(|(dsn, value)| (port_of(&text(dsn)), pid(value)))
                .collect(),
            controls: json["pids"]["controls"].as_array().unwrap().iter().map(pid).collect(),
            etcd: json["pids"]["etcd"].as_u64().and_then(|etcd| u32::try_from(etcd).ok()),
        };
        installation
    }

    /// Runs the command line against this installation.
    pub(crate) fn holdfast(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// It waits for nobody who has crashed, unless another may take his place.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(HOLDFAST);
        let patience = if self.facts.controls.is_empty() { "0s" } else { "30s" };
        command.args(["--api", &self.facts.api, "--patience", patience]).args(args);
        command.stdin(Stdio::null());
        command
    }

    /// As [`Installation::holdfast`], while the test goes on.
    pub(crate) fn holdfast_in_background(&self, args: &[&str]) -> tokio::task::JoinHandle<Output> {
        let mut command = self.command(args);
        tokio::task::spawn_blocking(move || command.output().unwrap())
    }

    /// A switchover that must complete.
    pub(crate) fn switch_to(&self, cell: &str) -> String {
        let output = self.holdfast(&["switchover", "shop", "--to", cell, "--deadline", "10s"]);
        let text = shown(&output);
        let switched = output.status.success()
            || (there_and_back().len() == 1 && text.contains("has no pg_basebackup"));
        assert!(switched, "{text}");
        text
    }

    /// The active cell.
    pub(crate) fn active(&self) -> String {
        let text = shown(&self.holdfast(&["status", "shop"]));
        let (_, rest) = text.split_once("active cell ").unwrap_or_else(|| panic!("{text}"));
        rest.split(',').next().unwrap().to_owned()
    }

    /// Begins a switchover to `b` that a busy session keeps waiting, and waits until it holds.
    pub(crate) async fn switch_until_it_holds(&self) -> tokio::task::JoinHandle<Output> {
        let args = ["switchover", "shop", "--to", "b", "--deadline", "20s"];
        let switch = self.holdfast_in_background(&args);
        while !shown(&self.holdfast(&["executions", "1"])).contains("hold     runs") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        switch
    }

    /// Clients that connect through the proxy, as the superuser.
    pub(crate) async fn connect(&self) -> Connection {
        connect(self.facts.port, "postgres", None).await.unwrap()
    }

    /// Clients of the second proxy.
    pub(crate) async fn connect_elsewhere(&self) -> Connection {
        connect(self.facts.proxies[0].0, "postgres", None).await.unwrap()
    }

    pub(crate) async fn direct(&self, cell: &str) -> Connection {
        connect(self.facts.servers[cell], "postgres", None).await.unwrap()
    }

    /// Starts a server that is ending or has ended.
    pub(crate) async fn start_server(&self, cell: &str) {
        let bin_dir = other_bin_dir().or_else(pg::instance::find_bin_dir).unwrap();
        let mut instance = pg::instance::Instance::of(&bin_dir, &self.dir.join(cell)).unwrap();
        instance.options = vec![
            format!("-p {}", self.facts.servers[cell]),
            format!("-c unix_socket_directories={}", self.dir.join("sockets").display()),
        ];
        wait_until("the server's end", || !instance.is_running());
        instance.start(START_MAX).await.unwrap();
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.dir.join("holdfast.toml")
    }

    /// Sends a signal to the postmaster of a server.
    pub(crate) fn signal_server(&self, cell: &str, name: &str) {
        let pid = std::fs::read_to_string(self.dir.join(cell).join("postmaster.pid")).unwrap();
        signal(pid.lines().next().unwrap().parse().unwrap(), name);
    }

    pub(crate) fn agent(&self, cell: &str) -> u32 {
        self.agents.get(cell).map_or_else(|| self.facts.agents[cell], Child::id)
    }

    /// The process that ends the server when its lease is over.
    pub(crate) fn guard(&self, cell: &str) -> Option<u32> {
        let dir = self.dir.join(cell);
        processes()
            .into_iter()
            .find(|(_, command)| {
                command.contains("__guard") && command.contains(&format!("{}\0", dir.display()))
            })
            .map(|(pid, _)| pid)
    }

    /// Starts the agent of a cell, whose last one has ended.
    pub(crate) fn start_agent(&mut self, cell: &str) {
        let child = Command::new(HOLDFAST)
            .args(["run", "-c"])
            .arg(self.dir.join(format!("agent-{cell}.toml")))
            .env("HOLDFAST_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        if let Some(mut before) = self.agents.insert(cell.into(), child) {
            let _ = before.wait();
        }
    }

    /// Waits until the process of proxy and control has ended by itself.
    pub(crate) fn wait_crashed(&mut self) {
        let child = &mut self.child;
        wait_until("the crash", || child.try_wait().unwrap().is_some());
    }

    /// Starts proxy and control, and waits until they have crashed at a point on the way.
    pub(crate) fn crash_at_start(&mut self, point: &str) {
        self.child = Command::new(HOLDFAST)
            .args(["run", "-c"])
            .arg(self.config())
            .env("HOLDFAST_CRASH_AT", point)
            .env("HOLDFAST_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        self.wait_crashed();
    }

    /// Kills proxy and control, and starts them with another configuration.
    pub(crate) fn reconfigure(&mut self, change: impl FnOnce(String) -> String) {
        signal(self.pid(), "KILL");
        self.wait_crashed();
        let text = std::fs::read_to_string(self.config()).unwrap();
        std::fs::write(self.config(), change(text)).unwrap();
        self.restart(&[]);
    }

    /// Starts proxy and control again, with the same state, after a crash.
    pub(crate) fn restart(&mut self, env: &[(&str, &str)]) {
        self.child = Command::new(HOLDFAST)
            .args(["run", "-c"])
            .arg(self.config())
            .envs(env.iter().copied())
            .env("HOLDFAST_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let api = self.facts.api.strip_prefix("http://").unwrap().to_owned();
        let child = &mut self.child;
        wait_until("the API", || {
            assert!(child.try_wait().unwrap().is_none(), "holdfast has ended");
            std::net::TcpStream::connect(&api).is_ok()
        });
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

pub(crate) fn shown(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// What is killed has no port any more afterwards: the next of its kind may listen there at once.
pub(crate) fn signal(pid: u32, name: &str) {
    let _ = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    let deadline = Instant::now() + Duration::from_secs(10);
    while name == "KILL" && holds_files(pid) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Files of a process are closed before its last thread is gone, or waits for its parent only.
fn holds_files(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let states = threads.map(|thread| std::fs::read_to_string(thread.path().join("stat")));
    states.flatten().any(|stat| !stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z')))
}

/// Processes of this machine, and their command lines.
fn processes() -> Vec<(u32, String)> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&command).into_owned()))
    })
    .collect()
}

impl Drop for Installation {
    fn drop(&mut self) {
        signal(self.child.id(), "INT");
        let _ = self.child.wait();
        // After a crash agents are still there, each in a process that works for this directory.
        let of_this = ["agent-", "proxy-", "control-", "etcd"];
        let of_this = of_this.map(|name| format!("{}/{name}", self.dir.display()));
        for (pid, command) in processes() {
            if of_this.iter().any(|dir| command.contains(dir)) {
                signal(pid, "KILL");
            }
        }
        for child in self.agents.values_mut() {
            let _ = child.wait();
        }
        // After a crash the servers are still there: they are ended by their own pid files.
        for cell in self.facts.servers.keys() {
            let pid = std::fs::read_to_string(self.dir.join(cell).join("postmaster.pid"))
                .unwrap_or_default();
            if let Some(Ok(pid)) = pid.lines().next().map(str::parse::<u32>) {
                signal(pid, "QUIT");
                let process = format!("/proc/{pid}");
                let deadline = Instant::now() + Duration::from_secs(20);
                while Path::new(&process).exists() && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

/// Logs in to a port of this machine.
/// Sends a cancel request, as a client does.
pub(crate) async fn cancel(port: u16, pid: i32, secret: &[u8]) {
    let tls = ClientTls::load(SslMode::Disable, None, None).unwrap();
    let address = Address { host: "127.0.0.1".into(), port };
    let timeout = Duration::from_secs(20);
    let target = Target { address, tls, keepalive: Keepalive::default(), timeout };
    target.cancel(pid, secret).await.unwrap();
}

pub(crate) async fn connect(
    port: u16,
    user: &str,
    password: Option<&str>,
) -> Result<Connection, ConnectError> {
    let tls = ClientTls::load(SslMode::Disable, None, None).unwrap();
    login(port, user, password, tls, &[]).await
}

pub(crate) async fn login(
    port: u16,
    user: &str,
    password: Option<&str>,
    tls: ClientTls,
    more: &[(&str, &str)],
) -> Result<Connection, ConnectError> {
    let address = Address { host: "127.0.0.1".into(), port };
    let target =
        Target { address, tls, keepalive: Keepalive::default(), timeout: Duration::from_secs(20) };
    let param = |name: &str, value: &str| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
    let mut params = vec![param("user", user), param("database", "postgres")];
    params.extend(more.iter().map(|(name, value)| param(name, value)));
    let credential = password.map(|text| Credential::Password(Secret::new(text)));
    target.login(&Login { params, credential }).await
}

/// The first column of the first row, which must be there.
pub(crate) async fn value(connection: &mut Connection, sql: &str) -> String {
    match connection.value(sql).await {
        Ok(value) => value.unwrap_or_else(|| "(null)".into()),
        Err(error) => panic!("{sql}: {error}"),
    }
}

pub(crate) async fn run(connection: &mut Connection, sql: &str) {
    if let Err(error) = connection.query(sql).await {
        panic!("{sql}: {error}");
    }
}

/// Sends messages of the extended protocol and gives the values of the first row of each answer.
pub(crate) async fn extended(connection: &mut Connection, messages: &[u8]) -> Vec<Option<String>> {
    connection.send(messages).await.unwrap();
    let answers = connection.answers().await.unwrap();
    answers
        .into_iter()
        .map(|a| a.rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten())
        .collect()
}

/// The error that ends a connection: its code and its detail.
pub(crate) async fn last_words(
    connection: &mut Connection,
) -> (Option<wire::sqlstate::SqlState>, String) {
    let message = connection.receive().await.unwrap();
    match message.view().unwrap() {
        wire::backend::Backend::Error(fields) => (
            fields.sqlstate(),
            String::from_utf8_lossy(fields.field(b'D').unwrap_or_default()).into_owned(),
        ),
        wire::backend::Backend::Notice(_) => (None, String::new()),
        other => panic!("{other:?}"),
    }
}

/// A proxy beside that of an installation, of its own configuration.
pub(crate) struct Second {
    child: Child,
    pub(crate) port: u16,
    pub(crate) api: String,
    _reserved: [Port; 2],
}

impl Second {
    /// `proxy` and `app` are lines of those sections of the configuration, `servers` the ports of cells `a`, which is active,
    /// and `b`.
    pub(crate) fn start(dir: &Path, proxy: &str, app: &str, [a, b]: [u16; 2]) -> Second {
        let reserved = [Port::reserve().unwrap(), Port::reserve().unwrap()];
        let [port, api] = reserved.each_ref().map(Port::number);
        std::fs::create_dir_all(dir).unwrap();
        let text = format!(
            "[proxy]\nlisten = [\"127.0.0.1:{port}\"]\n{proxy}\n[control]\nlisten = \"127.0.0.1:{api}\"\n\
             state_dir = \"{}\"\n[[app]]\nname = \"shop\"\n{app}\n\
             [[app.cell]]\nname = \"a\"\nserver = \"127.0.0.1:{a}\"\nactive = true\n\
             [[app.cell]]\nname = \"b\"\nserver = \"127.0.0.1:{b}\"\n",
            dir.join("state").display()
        );
        let path = dir.join("holdfast.toml");
        std::fs::write(&path, text).unwrap();
        let child = Command::new(HOLDFAST)
            .args(["run", "-c"])
            .arg(&path)
            .env("HOLDFAST_LOG", "warn")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let api = format!("http://127.0.0.1:{api}");
        let second = Second { child, port, api, _reserved: reserved };
        let deadline = Instant::now() + Duration::from_secs(30);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "the second proxy does not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        second
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        signal(self.child.id(), "TERM");
        let _ = self.child.wait();
    }
}

/// A client of the admin database.
pub(crate) async fn console(installation: &Installation) -> Connection {
    let tls = ClientTls::load(SslMode::Disable, None, None).unwrap();
    let more = [("database", "holdfast")];
    login(installation.facts.port, "postgres", None, tls, &more).await.unwrap()
}

/// A client that gives itself a name.
pub(crate) async fn named(installation: &Installation, name: &str) -> Connection {
    let tls = ClientTls::load(SslMode::Disable, None, None).unwrap();
    let more = [("application_name", name)];
    login(installation.facts.port, "postgres", None, tls, &more).await.unwrap()
}

/// The answer of the API at an address, with its head.
pub(crate) fn http_get(address: &str, path: &str) -> String {
    use std::io::{Read, Write};
    let mut socket = std::net::TcpStream::connect(address).unwrap();
    write!(socket, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    text
}
