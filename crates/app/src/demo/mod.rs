//! A whole installation on this machine: two servers, the proxy, control, and clients that work all the time.

use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use control::SwitchoverRequest;
use model::persisted::Execution;
use pg::Port;
use pg::instance::{self, Instance, RunAs};

mod tour;
mod workload;

use crate::cli::{Global, client, hangups, log_to_stderr, runtime, shutdown_signal};
use crate::config::{Roles, chain};
use crate::run::Running;

#[derive(Args)]
pub(crate) struct DemoArgs {
    /// Start everything and leave it running, without the tour.
    #[arg(long)]
    no_tour: bool,
    /// Where the servers' data is kept while the demo runs.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Client sessions of the workload.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u16).range(0..=2000))]
    sessions: u16,
    /// Let sessions share so many server connections.
    #[arg(long, value_name = "SIZE")]
    pool: Option<u16>,
    /// Leave it to you to fail over when a server is lost.
    #[arg(long)]
    no_failover: bool,
    /// Have commits wait for so many standbys.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=4))]
    acks: u8,
    /// Cells, each with a server.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=5))]
    cells: u8,
    /// Put an agent beside each server, as where servers are on other machines.
    #[arg(long)]
    agents: bool,
    /// Serve clients by so many proxies, each in a process of its own but the first.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    proxies: u8,
    /// Have so many nodes of which one is control, each in a process of its own; their store is etcd. Proxies and agents
    /// are processes of their own then as well.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=5))]
    controls: u8,
    /// Directory of PostgreSQL's programs.
    #[arg(long, value_name = "DIR")]
    bindir: Option<PathBuf>,
}

pub(crate) const APP: &str = "shop";
const CELLS: [&str; 5] = ["a", "b", "c", "d", "e"];
const SUPERUSER: &str = "postgres";

pub(crate) fn main(args: DemoArgs) -> Result<ExitCode, String> {
    log_to_stderr("warn");
    runtime()?.block_on(async {
        let stop = shutdown_signal();
        tokio::pin!(stop);
        let mut demo = tokio::select! {
            demo = Box::pin(Demo::start(&args)) => demo?,
            signal = &mut stop => return signal.map(|()| ExitCode::FAILURE),
        };
        let result = if args.no_tour {
            demo.print_invitation();
            let workload =
                workload::Workload::start(&demo.dsn(), usize::from(args.sessions)).await?;
            stop.await?;
            workload.stop().await;
            Ok(ExitCode::SUCCESS)
        } else {
            tokio::select! {
                result = Box::pin(tour::run(&demo, usize::from(args.sessions))) => result,
                _ = &mut stop => Ok(ExitCode::FAILURE),
            }
        };
        demo.stop().await;
        result
    })
}

/// Prints a step and how long it took.
pub(crate) struct Progress(Instant);

impl Progress {
    pub(crate) fn begin(text: &str) -> Progress {
        print!("  {text} ... ");
        let _ = std::io::stdout().flush();
        Progress(Instant::now())
    }

    pub(crate) fn end(self) {
        println!("{:.1} s", self.0.elapsed().as_secs_f64());
    }
}

pub(crate) struct Demo {
    dir: PathBuf,
    remove: bool,
    instances: Vec<Instance>,
    ports: Vec<u16>,
    /// All that are given out, kept from other demos until the end.
    reserved: Vec<Port>,
    pool: Option<u16>,
    fails_over: bool,
    has_agents: bool,
    acks: u8,
    agents: Vec<Child>,
    /// Those of other processes, and their ports.
    proxies: Vec<(Child, u16)>,
    more_proxies: u8,
    /// Nodes of which one is control, and where the API of each is.
    controls: Vec<Child>,
    apis: Vec<u16>,
    etcd: Option<Child>,
    running: Option<Running>,
}

impl Demo {
    async fn start(args: &DemoArgs) -> Result<Demo, String> {
        println!("starting PostgreSQL servers, a proxy and their control on this machine");
        let bin_dir = args.bindir.clone().or_else(instance::find_bin_dir).ok_or(
            "PostgreSQL is not installed: `apt-get install postgresql`, or `--bindir` says where it is",
        )?;
        let (dir, remove) = directory(args.dir.as_deref())?;
        let run_as = unprivileged(&dir)?;
        let (instances, ports) = (Vec::new(), Vec::new());
        let (pool, fails_over) = (args.pool, !args.no_failover);
        let has_agents = args.agents || args.controls > 1;
        let (acks, agents) = (args.acks, Vec::new());
        let mut demo = Demo {
            dir,
            remove,
            instances,
            ports,
            reserved: Vec::new(),
            pool,
            fails_over,
            has_agents,
            acks,
            agents,
            proxies: Vec::new(),
            more_proxies: args.proxies.saturating_sub(1),
            controls: Vec::new(),
            apis: Vec::new(),
            etcd: None,
            running: None,
        };
        // From here on whatever was started is stopped, also if something fails.
        match Box::pin(demo.start_all(&bin_dir, run_as, args)).await {
            Ok(()) => Ok(demo),
            Err(error) => {
                demo.stop().await;
                Err(error)
            }
        }
    }

    async fn start_all(
        &mut self,
        bin_dir: &Path,
        run_as: Option<RunAs>,
        args: &DemoArgs,
    ) -> Result<(), String> {
        for cell in CELLS.into_iter().take(args.cells.into()) {
            let data_dir = self.dir.join(cell);
            make_directory(&data_dir, run_as)?;
            let port = self.free_port()?;
            let sockets = self.dir.join("sockets");
            make_directory(&sockets, run_as)?;
            let options = vec![
                format!("-p {port}"),
                "-c listen_addresses=127.0.0.1".into(),
                format!("-c unix_socket_directories={}", sockets.display()),
            ];
            self.ports.push(port);
            self.instances.push(Instance {
                bin_dir: bin_dir.to_owned(),
                data_dir,
                run_as,
                options,
                shared: Arc::default(),
            });
        }
        let [primary, standbys @ ..] = self.instances.as_slice() else {
            return Err("cells are needed".into());
        };
        let step = Progress::begin(&format!(
            "initialising cell {} (primary, port {})",
            CELLS[0], self.ports[0]
        ));
        primary.init(SUPERUSER).await.map_err(|e| chain(&e))?;
        let conf = primary.data_dir.join("postgresql.conf");
        let mut text = std::fs::read_to_string(&conf).map_err(|e| e.to_string())?;
        text.push_str(SETTINGS);
        // Each session, and whoever looks on.
        let connections = (u32::from(args.sessions) + 100).max(700);
        text.push_str(&format!("max_connections = {connections}\n"));
        primary.write(&conf, text.as_bytes()).map_err(|e| chain(&e))?;
        primary.start(Duration::from_secs(60)).await.map_err(|e| chain(&e))?;
        step.end();
        let conninfo = conninfo(self.ports[0]);
        for (standby, (cell, port)) in standbys.iter().zip(CELLS.iter().zip(&self.ports).skip(1)) {
            let step =
                Progress::begin(&format!("copying it to cell {cell} (standby, port {port})"));
            if standby.has("pg_basebackup") {
                standby.clone_from(&conninfo).await.map_err(|e| chain(&e))?;
            } else {
                copy_stopped(primary, standby, &conninfo).await?;
            }
            standby.start(Duration::from_secs(60)).await.map_err(|e| chain(&e))?;
            step.end();
        }
        if args.controls > 1 {
            let step = Progress::begin("starting etcd, nodes of control, agents and proxies");
            let controls = self.start_controls(args.controls, bin_dir).await?;
            for number in 1..=self.more_proxies + 1 {
                self.start_proxy(number, &controls, bin_dir).await?;
            }
            workload::create_tables(&self.dsn()).await?;
            self.write_facts()?;
            step.end();
            return Ok(());
        }
        let step = Progress::begin("starting proxy and control");
        let path = self.dir.join("holdfast.toml");
        let agents = self.free_port()?;
        let (port, api) = (self.free_port()?, self.free_port()?);
        let text = self.config_text(port, api, agents, bin_dir);
        std::fs::write(&path, text).map_err(|e| e.to_string())?;
        if self.has_agents {
            self.start_agents(&[agents], bin_dir)?;
        }
        let (roles, text) = Roles::load_with_text(&path).map_err(|e| chain(&e))?;
        let config = roles.into_config()?;
        let loaded = Arc::new(config.loaded((&path, &text)));
        let loaded = Some((loaded, hangups()?));
        self.running = Some(Running::start(config, loaded).await.map_err(|e| chain(&e))?);
        self.apis.push(api);
        workload::create_tables(&self.dsn()).await?;
        for number in 2..=self.more_proxies + 1 {
            self.start_proxy(number, &[agents], bin_dir).await?;
        }
        self.write_facts()?;
        step.end();
        Ok(())
    }

    /// Gives where agents and proxies find each node.
    async fn start_controls(&mut self, count: u8, bin_dir: &Path) -> Result<Vec<u16>, String> {
        const START_MAX: Duration = Duration::from_secs(60);
        let (client, peer) = (self.free_port()?, self.free_port()?);
        let (client, peer) =
            (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
        let log = std::fs::File::create(self.dir.join("etcd.log")).map_err(|e| e.to_string())?;
        let etcd = Command::new("etcd")
            .arg("--data-dir")
            .arg(self.dir.join("etcd"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn();
        let etcd = etcd.map_err(|e| {
            format!("`etcd`: {e}; nodes of control need it: `apt-get install etcd-server`")
        })?;
        self.etcd = Some(etcd);
        let mut agents = Vec::new();
        for number in 1..=count {
            let (api, port) = (self.free_port()?, self.free_port()?);
            let text = format!(
                "[control]\nlisten = \"127.0.0.1:{api}\"\n\n\
                 [control.agents]\nlisten = \"127.0.0.1:{port}\"\n\n\
                 [control.etcd]\nnode = \"c{number}\"\nendpoints = \"{client}\"\n\n{}",
                self.app_text(bin_dir)
            );
            self.write_config(&format!("control-{number}"), &text)?;
            self.apis.push(api);
            agents.push(port);
        }
        self.start_agents(&agents, bin_dir)?;
        let deadline = Instant::now() + START_MAX;
        // It may be too early for etcd.
        for number in 1..=count {
            let child = self.spawn(&format!("control-{number}"))?;
            self.controls.push(child);
        }
        let global = self.global();
        loop {
            let global = global.clone();
            let asked = tokio::task::spawn_blocking(move || {
                client::get::<serde_json::Value>(&global, "/v1/status")
            });
            match asked.await.map_err(|e| e.to_string())? {
                Ok(_) => return Ok(agents),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// What the command line goes by.
    fn global(&self) -> Global {
        Global::of(self.apis.iter().map(|api| format!("http://127.0.0.1:{api}")).collect())
    }

    /// Switches over as the command line does.
    async fn switch_over(&self, request: SwitchoverRequest) -> Result<Execution, String> {
        let global = self.global();
        let path = format!("/v1/applications/{APP}/switchover");
        let asked = tokio::task::spawn_blocking(move || client::post(&global, &path, &request));
        asked.await.map_err(|e| e.to_string())?
    }

    fn free_port(&mut self) -> Result<u16, String> {
        let port = Port::reserve().map_err(|e| format!("no port is free: {e}"))?;
        let number = port.number();
        self.reserved.push(port);
        Ok(number)
    }

    fn write_config(&self, name: &str, text: &str) -> Result<(), String> {
        let path = self.dir.join(format!("{name}.toml"));
        std::fs::write(&path, format!("# Written by `holdfast demo`.\n{text}"))
            .map_err(|e| e.to_string())
    }

    /// Runs this program with a configuration in the demo's directory, in a process of its own.
    fn spawn(&self, name: &str) -> Result<Child, String> {
        let own = std::env::current_exe().map_err(|e| e.to_string())?;
        let path = self.dir.join(format!("{name}.toml"));
        let log = std::fs::File::create(self.dir.join(format!("{name}.log")))
            .map_err(|e| e.to_string())?;
        Command::new(&own)
            .args(["run", "-c"])
            .arg(&path)
            .stdin(Stdio::null())
            .stderr(log)
            .process_group(0)
            .spawn()
            .map_err(|e| format!("`{}`: {e}", own.display()))
    }

    async fn start_proxy(
        &mut self,
        number: u8,
        controls: &[u16],
        bin_dir: &Path,
    ) -> Result<(), String> {
        const START_MAX: Duration = Duration::from_secs(30);
        let port = self.free_port()?;
        let text = format!(
            "{}\n[proxy.control]\nname = \"p{number}\"\naddress = {}\n\n{}",
            proxy_text(port),
            addresses(controls),
            self.app_text(bin_dir)
        );
        self.write_config(&format!("proxy-{number}"), &text)?;
        let child = self.spawn(&format!("proxy-{number}"))?;
        self.proxies.push((child, port));
        let deadline = Instant::now() + START_MAX;
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            if Instant::now() > deadline {
                return Err(format!("proxy p{number} does not start"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Each in a process of its own, as on a machine of its own.
    fn start_agents(&mut self, controls: &[u16], bin_dir: &Path) -> Result<(), String> {
        for (at, cell) in CELLS.iter().take(self.ports.len()).enumerate() {
            let port = self.free_port()?;
            let text = format!(
                "[agent]\napp = \"{APP}\"\ncell = \"{cell}\"\ncontrol = {}\nlisten = \"127.0.0.1:{port}\"\n\
                 state_dir = \"{}\"\n{}",
                addresses(controls),
                self.dir.join(format!("agent-{cell}")).display(),
                self.instance_text(at, bin_dir),
            );
            self.write_config(&format!("agent-{cell}"), &text)?;
            let agent = self.spawn(&format!("agent-{cell}"))?;
            self.agents.push(agent);
        }
        Ok(())
    }

    fn instance_text(&self, at: usize, bin_dir: &Path) -> String {
        let options: Vec<String> =
            self.instances[at].options.iter().map(|o| format!("\"{o}\"")).collect();
        format!(
            "data_dir = \"{}\"\nbin_dir = \"{}\"\nserver_options = [{}]\n",
            self.instances[at].data_dir.display(),
            bin_dir.display(),
            options.join(", ")
        )
    }

    fn config_text(&self, port: u16, api: u16, agents: u16, bin_dir: &Path) -> String {
        format!(
            "# Written by `holdfast demo`.\n{}\n\
             [control]\nlisten = \"127.0.0.1:{api}\"\nstate_dir = \"{}\"\n\n{}{}",
            proxy_text(port),
            self.dir.join("state").display(),
            if self.has_agents || self.more_proxies > 0 {
                format!("[control.agents]\nlisten = \"127.0.0.1:{agents}\"\n\n")
            } else {
                String::new()
            },
            self.app_text(bin_dir)
        )
    }

    fn app_text(&self, bin_dir: &Path) -> String {
        let mut text =
            format!("[[app]]\nname = \"{APP}\"\nauth = \"trust\"\nsslmode = \"disable\"\n");
        if let Some(size) = self.pool {
            text.push_str(&format!("pool = \"transaction\"\npool_size = {size}\n"));
        }
        text.push_str(&format!("\n[app.durability]\nacks = {}\n", self.acks));
        text.push_str(&format!("\n[app.failover]\nautomatic = {}\n", self.fails_over));
        for (at, cell) in CELLS.iter().take(self.ports.len()).enumerate() {
            text.push_str(&format!(
                "\n[[app.cell]]\nname = \"{cell}\"\nserver = \"127.0.0.1:{}\"\nactive = {}\n",
                self.ports[at],
                at == 0,
            ));
            match self.has_agents {
                true => text.push_str("agent = true\n"),
                false => text.push_str(&self.instance_text(at, bin_dir)),
            }
        }
        text
    }

    /// The connection string of clients: through the proxy.
    pub(crate) fn dsn(&self) -> Dsn {
        let address =
            self.running.as_ref().and_then(|running| running.proxy.addresses().first().copied());
        let elsewhere = self.proxies.first().map_or(0, |(_, port)| *port);
        Dsn { port: address.map_or(elsewhere, |address| address.port()) }
    }

    pub(crate) fn server_dsn(&self, cell: &str) -> Option<Dsn> {
        let at = CELLS.iter().position(|name| *name == cell)?;
        self.ports.get(at).map(|port| Dsn { port: *port })
    }

    fn write_facts(&self) -> Result<(), String> {
        let pids: Vec<u32> = self.instances.iter().filter_map(Instance::pid).collect();
        let agents: Vec<u32> = self.agents.iter().map(Child::id).collect();
        let proxies: Vec<String> =
            self.proxies.iter().map(|(_, port)| Dsn { port: *port }.to_string()).collect();
        let etcd = self.etcd.as_ref().map(Child::id);
        let controls: Vec<u32> = self.controls.iter().map(Child::id).collect();
        let proxy_pids: Vec<u32> = self.proxies.iter().map(|(child, _)| child.id()).collect();
        let servers: std::collections::BTreeMap<&str, String> = CELLS
            .iter()
            .copied()
            .zip(self.ports.iter().map(|port| Dsn { port: *port }.to_string()))
            .collect();
        let facts = serde_json::json!({
            "dsn": self.dsn().to_string(),
            "api": self.global().api(),
            "app": APP,
            "active": CELLS[0],
            "passive": CELLS[1],
            "servers": servers,
            "proxies": proxies,
            "pids": { "holdfast": std::process::id(), "servers": pids, "agents": agents, "proxies": proxy_pids, "controls": controls, "etcd": etcd },
        });
        let text = serde_json::to_string_pretty(&facts).map_err(|e| e.to_string())?;
        std::fs::write(self.dir.join("demo.json"), text).map_err(|e| e.to_string())
    }

    fn print_invitation(&self) {
        let global = self.global();
        let api = global.api();
        println!("\neverything runs; SIGINT (Ctrl-C) ends it. Try, in another terminal:");
        println!("  psql '{}'", self.dsn());
        let others = self.proxies.iter().filter(|(_, port)| *port != self.dsn().port);
        for (_, port) in others {
            println!("  psql '{}'", Dsn { port: *port });
        }
        println!("  holdfast --api {api} status");
        println!("  holdfast --api {api} switchover {APP} --to {}", CELLS[1]);
        println!("facts for scripts are in {}", self.dir.join("demo.json").display());
    }

    async fn stop(&mut self) {
        for (proxy, _) in &mut self.proxies {
            stop_process(proxy).await;
        }
        if let Some(running) = self.running.take() {
            running.stop().await;
        }
        for control in &mut self.controls {
            stop_process(control).await;
        }
        for agent in &mut self.agents {
            stop_process(agent).await;
        }
        for instance in self.instances.iter().rev() {
            if let Err(error) = instance.stop("fast", Duration::from_secs(30)).await {
                eprintln!("holdfast: {}", chain(&error));
            }
        }
        if let Some(etcd) = &mut self.etcd {
            stop_process(etcd).await;
        }
        if self.remove {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

const SETTINGS: &str = "\n# holdfast demo\nwal_log_hints = on\nwal_keep_size = 512MB\n\
    shared_buffers = 128MB\nwal_retrieve_retry_interval = 100ms\nmax_prepared_transactions = 10\n\
    log_min_messages = warning\n";

/// One address, or a list of them, as the configuration has it.
fn addresses(ports: &[u16]) -> String {
    let all: Vec<String> = ports.iter().map(|port| format!("\"127.0.0.1:{port}\"")).collect();
    match all.as_slice() {
        [one] => one.clone(),
        all => format!("[{}]", all.join(", ")),
    }
}

fn proxy_text(port: u16) -> String {
    format!("[proxy]\nlisten = [\"127.0.0.1:{port}\"]\nadmin_users = [\"{SUPERUSER}\"]\n")
}

fn conninfo(port: u16) -> String {
    format!("host=127.0.0.1 port={port} user={SUPERUSER} dbname=postgres")
}

/// An agent stops its server first, a proxy its sessions.
async fn stop_process(process: &mut Child) {
    const STOP_MAX: Duration = Duration::from_secs(30);
    let Ok(pid) = i32::try_from(process.id()) else { return };
    if let Some(pid) = rustix::process::Pid::from_raw(pid) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let deadline = Instant::now() + STOP_MAX;
    while matches!(process.try_wait(), Ok(None)) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A connection string on this machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dsn {
    pub(crate) port: u16,
}

impl std::fmt::Display for Dsn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "host=127.0.0.1 port={} user={SUPERUSER} dbname=postgres", self.port)
    }
}

/// Copies a server of a distribution that has no pg_basebackup: while it stands still.
async fn copy_stopped(from: &Instance, to: &Instance, conninfo: &str) -> Result<(), String> {
    const LIMIT: Duration = Duration::from_secs(60);
    from.stop("fast", LIMIT).await.map_err(|e| chain(&e))?;
    let copied = tokio::process::Command::new("cp")
        .args(["-aT", "--"])
        .args([&from.data_dir, &to.data_dir])
        .status()
        .await
        .map_err(|e| format!("cp: {e}"))?;
    if !copied.success() {
        return Err(format!("copying `{}` failed: {copied}", from.data_dir.display()));
    }
    to.make_standby(conninfo).map_err(|e| chain(&e))?;
    from.start(LIMIT).await.map_err(|e| chain(&e))
}

/// The directory to work in, and whether to remove it at the end.
fn directory(given: Option<&Path>) -> Result<(PathBuf, bool), String> {
    let (dir, remove) = match given {
        Some(dir) => (dir.to_owned(), false),
        None => (std::env::temp_dir().join(format!("holdfast-demo-{}", std::process::id())), true),
    };
    std::fs::create_dir_all(&dir).map_err(|e| format!("`{}`: {e}", dir.display()))?;
    let dir = dir.canonicalize().map_err(|e| format!("`{}`: {e}", dir.display()))?;
    for cell in CELLS {
        if dir.join(cell).join("PG_VERSION").exists() {
            return Err(format!(
                "`{}` holds a demo already; remove it or name another with --dir",
                dir.display()
            ));
        }
    }
    // The servers' user must be able to get into it.
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o755))
        .map_err(|e| e.to_string())?;
    Ok((dir, remove))
}

/// As root, the user that the servers run as: `postgres`, which the package makes.
fn unprivileged(dir: &Path) -> Result<Option<RunAs>, String> {
    let me = std::fs::metadata("/proc/self").map_err(|e| e.to_string())?;
    if me.uid() != 0 {
        return Ok(None);
    }
    let passwd = std::fs::read_to_string("/etc/passwd").map_err(|e| e.to_string())?;
    let entry = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|f| f.first() == Some(&"postgres"));
    let ids = entry.and_then(|fields| {
        let number = |at: usize| fields.get(at)?.parse().ok();
        Some(RunAs { uid: number(2)?, gid: number(3)? })
    });
    let _ = dir;
    ids.map(Some).ok_or_else(|| "there is no user `postgres` to run the servers as".into())
}

fn make_directory(path: &Path, owner: Option<RunAs>) -> Result<(), String> {
    let error = |e: std::io::Error| format!("`{}`: {e}", path.display());
    std::fs::create_dir_all(path).map_err(error)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700)).map_err(error)?;
    match owner {
        Some(RunAs { uid, gid }) => {
            std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(error)
        }
        None => Ok(()),
    }
}
