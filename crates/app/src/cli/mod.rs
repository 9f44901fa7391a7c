//! The command line. Exit codes: 0 done, 1 refused or failed with the reason, 2 wrong usage.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use model::lease::Moment;
use model::plan::Mode;
use model::switchover::OnTimeout;

/// Prints a line. Whoever has closed the other end of a pipe has seen enough.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write;
        if writeln!(std::io::stdout().lock(), $($text)*).is_err() {
            std::process::exit(0);
        }
    }};
}

pub(crate) mod client;
mod copies;
mod plans;
mod report;
pub(crate) mod show;

use crate::config::{NodeConfig, Roles, chain, read_duration};
use crate::loaded::{Loaded, Runs};
use crate::node::Node;
use crate::remote::{Remote, RemoteConfig};
use crate::run::Running;
use crate::{demo, run};
use agent::{Agent, AgentConfig};
use pg::instance::Instance;
use tokio::signal::unix::{Signal, SignalKind, signal};

#[derive(Parser)]
#[command(
    name = "holdfast",
    version,
    about = "Keeps PostgreSQL applications running, and their data right, while everything underneath changes"
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    #[command(flatten)]
    global: Global,
}

#[derive(Args, Clone)]
pub(crate) struct Global {
    /// Where the API of a running Holdfast is; of several nodes, each, with commas between.
    #[arg(long, global = true, env = "HOLDFAST_API", default_value = "http://127.0.0.1:7432")]
    api: String,
    /// File with the token of the API.
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Answer in JSON.
    #[arg(long, global = true)]
    json: bool,
    /// How long another node is looked for, and it is asked what became of a change whose answer was lost.
    #[arg(long, global = true, env = "HOLDFAST_PATIENCE", value_name = "DURATION", default_value = "30s", value_parser = duration)]
    patience: Duration,
    /// Why a change is asked for; it is recorded.
    #[arg(long, global = true, value_name = "TEXT")]
    reason: Option<String>,
    /// Change something only in this epoch.
    #[arg(long, global = true, value_name = "EPOCH")]
    if_epoch: Option<u64>,
    /// Change something in spite of this safety rule; takes a reason. Several are said one by one.
    #[arg(long = "override", global = true, value_name = "RULE")]
    overrides: Vec<String>,
    /// Asked again with the same key, a change is not made twice: you are told what became of it. One is made up for each
    /// command.
    #[arg(long, global = true, value_name = "KEY")]
    key: Option<String>,
}

impl Global {
    /// Of an installation whose API is at these addresses.
    pub(crate) fn of(apis: Vec<String>) -> Global {
        let (token_file, json, patience, reason, if_epoch, key) = Default::default();
        let (api, overrides) = (apis.join(","), Vec::new());
        Global { api, token_file, json, patience, reason, if_epoch, overrides, key }
    }

    pub(crate) fn api(&self) -> &str {
        &self.api
    }
}

#[derive(Subcommand)]
enum Verb {
    /// A whole local installation with a live workload, to watch a switchover.
    #[command(after_help = "Example: holdfast demo --no-tour --dir /tmp/holdfast-demo")]
    Demo(demo::DemoArgs),
    /// Run the roles that the configuration names, in one process.
    #[command(after_help = "Example: holdfast run -c holdfast.toml")]
    Run {
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Validate a configuration; every mistake is printed at once.
    #[command(after_help = "Example: holdfast check -c holdfast.toml")]
    Check {
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Cells, states, epochs, lag, sessions, what is wrong and what to type.
    #[command(after_help = "Example: holdfast status shop")]
    Status { app: Option<String> },
    /// Sessions, where they are attached, and what pins them.
    #[command(after_help = "Example: holdfast sessions shop --pinned")]
    Sessions {
        app: String,
        /// Ask every session's server, and list only those that could not be moved now.
        #[arg(long)]
        pinned: bool,
    },
    /// Make another cell the active one, with every session kept.
    #[command(
        after_help = "Example: holdfast switchover shop --to b --deadline 10s --on-timeout abort"
    )]
    Switchover {
        app: String,
        /// The cell that becomes active, or the region of which one does.
        #[arg(long, value_name = "CELL")]
        to: String,
        /// Change nothing; say what would be done and who would be in the way.
        #[arg(long)]
        dry_run: bool,
        /// How long running transactions may take to end.
        #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration_ms)]
        deadline: u64,
        /// What becomes of sessions that cannot be moved: give the switchover up, or end them with an error.
        #[arg(long, value_name = "abort|force", default_value = "abort", value_parser = on_timeout)]
        on_timeout: OnTimeout,
    },
    /// Have another cell take the place of the active one, whose server is lost.
    #[command(after_help = "Example: holdfast failover shop --to b --dry-run")]
    Failover {
        app: String,
        /// The cell that becomes active, or the region of which one does.
        #[arg(long, value_name = "CELL")]
        to: String,
        /// Give up what only the lost server has; and where Holdfast cannot see that it is dead, say so.
        #[arg(long)]
        allow_data_loss: bool,
        /// Change nothing; say what would be done, or why it would be refused.
        #[arg(long)]
        dry_run: bool,
    },
    /// Let the active cell take no more writes; clients stay connected and read.
    #[command(after_help = "Example: holdfast fence shop a --deadline 10s --on-timeout force")]
    Fence {
        app: String,
        cell: String,
        /// Refuse writes, and go on reading; this is the default.
        #[arg(long, conflicts_with = "all")]
        writes: bool,
        /// Refuse reads as well: the cell becomes passive.
        #[arg(long)]
        all: bool,
        /// How long running transactions may take to end.
        #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration_ms)]
        deadline: u64,
        /// What becomes of sessions whose transactions do not end: give the fence up, or end them with an error.
        #[arg(long, value_name = "abort|force", default_value = "abort", value_parser = on_timeout)]
        on_timeout: OnTimeout,
    },
    /// Give a fenced cell a new grant, in the next epoch: it takes writes again.
    #[command(after_help = "Example: holdfast unfence shop a")]
    Unfence { app: String, cell: String },
    /// Move sessions to fresh connections, while the application goes on.
    #[command(after_help = "Example: holdfast move shop --session 7 --to a")]
    Move {
        app: String,
        /// The session, as `holdfast sessions` numbers it.
        #[arg(long, value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
        session: Option<u64>,
        /// Every session of the application.
        #[arg(long)]
        all: bool,
        /// A cell whose server may serve them; the one where they stand gives each a fresh process.
        #[arg(long, value_name = "CELL")]
        to: String,
        /// How long running transactions may take to end.
        #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = duration_ms)]
        deadline: u64,
    },
    /// What was done: the newest executions, or one with its steps.
    #[command(after_help = "Example: holdfast executions 3 --report")]
    Executions {
        id: Option<u64>,
        /// One of them on a page, in Markdown.
        #[arg(long, requires = "id")]
        report: bool,
        /// Where two applications have one of this number.
        #[arg(long)]
        app: Option<String>,
    },
    /// What is different in the configuration file from what runs, and what of it could be taken up at once.
    #[command(after_help = "Example: holdfast diff")]
    Diff,
    /// Take up what can be of the configuration file, which is checked as a whole; nobody is disturbed.
    #[command(after_help = "Example: holdfast apply --reason 'two standbys from today on'")]
    Apply,
    /// Copies of the store, which holds the states of cells and what was done.
    #[command(subcommand)]
    Store(StoreVerb),
    /// Ends a server when its lease is over; an agent starts this.
    #[command(name = "__guard", hide = true)]
    Guard { bin_dir: PathBuf, data_dir: PathBuf, state_dir: PathBuf, kill_at_ns: u64 },
    /// What was done, by whom and why; whether any of it was changed since.
    #[command(after_help = "Example: holdfast audit")]
    Audit,
    /// Take up an execution that stands still, or a step of a plan that has failed.
    #[command(after_help = "Example: holdfast retry 3")]
    Retry {
        #[command(flatten)]
        which: plans::Which,
        /// Of a plan; not needed if only one has failed.
        step: Option<String>,
    },
    /// Safety rules of an application, and its gates.
    #[command(after_help = "Example: holdfast safety shop")]
    Safety { app: String },
    /// Open or close a gate, which safety rules look at.
    #[command(after_help = "Example: holdfast gate shop window open --reason 'patch day'")]
    Gate {
        app: String,
        gate: String,
        #[arg(value_name = "open|close", value_parser = is_open, action = clap::ArgAction::Set)]
        open: bool,
    },
    /// Plans of an application, and their steps.
    #[command(after_help = "Example: holdfast plans shop")]
    Plans { app: String },
    /// Carry out a plan, and follow it until it ends or needs a person.
    #[command(after_help = "Example: holdfast execute shop to-b --dry-run")]
    Execute {
        app: String,
        plan: String,
        /// Change nothing; say what would be done, and what is in the way.
        #[arg(long)]
        dry_run: bool,
        /// The active cell is lost: activate by failovers, and do the steps that are for this.
        #[arg(long)]
        ungraceful: bool,
        /// Undo all of it once it is done.
        #[arg(long)]
        drill: bool,
        /// Do not follow it.
        #[arg(long)]
        detach: bool,
    },
    /// Say that a plan may go on.
    #[command(after_help = "Example: holdfast approve 3 go")]
    Approve {
        #[command(flatten)]
        which: plans::Which,
        /// Not needed if only one is asked for.
        step: Option<String>,
    },
    /// Say that a plan may not go on: the step has failed.
    #[command(after_help = "Example: holdfast decline 3 go")]
    Decline {
        #[command(flatten)]
        which: plans::Which,
        step: Option<String>,
    },
    /// Leave a step out that has failed; or leave as it is what could not be undone.
    #[command(after_help = "Example: holdfast skip 3 announce")]
    Skip {
        #[command(flatten)]
        which: plans::Which,
        step: Option<String>,
    },
    /// Let no more steps of a plan begin; those that run go on.
    #[command(after_help = "Example: holdfast pause 3")]
    Pause {
        #[command(flatten)]
        which: plans::Which,
    },
    /// Let steps of a plan begin again.
    #[command(after_help = "Example: holdfast resume 3")]
    Resume {
        #[command(flatten)]
        which: plans::Which,
    },
    /// Undo what a plan has done, once what runs has ended.
    #[command(after_help = "Example: holdfast cancel 3 --reason 'wrong day'")]
    Cancel {
        #[command(flatten)]
        which: plans::Which,
    },
    /// Have the steps of a plan that begin from now on go the other way.
    #[command(after_help = "Example: holdfast mode 3 ungraceful")]
    Mode {
        #[command(flatten)]
        which: plans::Which,
        #[arg(value_name = "graceful|ungraceful", value_parser = mode)]
        mode: Mode,
    },
}

#[derive(Subcommand)]
enum StoreVerb {
    /// Write a copy of the store to a new file; a running Holdfast goes on.
    #[command(after_help = "Example: holdfast store backup -c holdfast.toml --to store.copy")]
    Backup {
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        #[arg(long, value_name = "FILE")]
        to: PathBuf,
    },
    /// Put a copy in the store's place. As it may be old, no cell is active afterwards: you say which goes on.
    #[command(after_help = "Example: holdfast store restore -c holdfast.toml --from store.copy")]
    Restore {
        #[arg(short, long, value_name = "FILE")]
        config: PathBuf,
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
    },
}

fn duration(text: &str) -> Result<Duration, String> {
    read_duration(text).ok_or_else(|| "a duration such as 500ms, 30s or 2m is needed".into())
}

fn duration_ms(text: &str) -> Result<u64, String> {
    u64::try_from(duration(text)?.as_millis()).map_err(|error| error.to_string())
}

fn on_timeout(text: &str) -> Result<OnTimeout, String> {
    match text {
        "abort" => Ok(OnTimeout::Abort),
        "force" => Ok(OnTimeout::Force),
        _ => Err("`abort` or `force` is needed".into()),
    }
}

fn is_open(text: &str) -> Result<bool, String> {
    match text {
        "open" => Ok(true),
        "close" => Ok(false),
        _ => Err("`open` or `close` is needed".into()),
    }
}

fn mode(text: &str) -> Result<Mode, String> {
    match text {
        "graceful" => Ok(Mode::Graceful),
        "ungraceful" => Ok(Mode::Ungraceful),
        _ => Err("`graceful` or `ungraceful` is needed".into()),
    }
}

pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.verb {
        Verb::Check { config } => check(&config),
        Verb::Run { config } => run_config(&config),
        Verb::Demo(args) => demo::main(args),
        Verb::Status { app } => show::status(&cli.global, app.as_deref()),
        Verb::Sessions { app, pinned } => show::sessions(&cli.global, &app, pinned),
        Verb::Switchover { app, to, dry_run, deadline, on_timeout } => {
            let request =
                control::SwitchoverRequest { to, dry_run, deadline_ms: deadline, on_timeout };
            show::switchover(&cli.global, &app, &request)
        }
        Verb::Failover { app, to, allow_data_loss, dry_run } => {
            let request = control::FailoverRequest { to, allow_data_loss, dry_run };
            show::failover(&cli.global, &app, &request)
        }
        Verb::Fence { app, cell, writes: _, all, deadline, on_timeout } => {
            let request = control::FenceRequest { all, deadline_ms: deadline, on_timeout };
            show::fence(&cli.global, &app, &cell, &request)
        }
        Verb::Unfence { app, cell } => show::unfence(&cli.global, &app, &cell),
        Verb::Move { app, session, all: _, to, deadline } => {
            let request = control::MoveRequest { session, to, deadline_ms: deadline };
            show::move_sessions(&cli.global, &app, &request)
        }
        Verb::Executions { id, report, app } => {
            show::executions(&cli.global, id, app.as_deref(), report)
        }
        Verb::Audit => show::audit(&cli.global),
        Verb::Diff => show::diff(&cli.global),
        Verb::Apply => show::apply(&cli.global),
        Verb::Retry { which, step } => show::retry(&cli.global, &which, step),
        Verb::Safety { app } => show::safety(&cli.global, &app),
        Verb::Gate { app, gate, open } => show::gate(&cli.global, &app, &gate, open),
        Verb::Plans { app } => plans::list(&cli.global, &app),
        Verb::Execute { app, plan, dry_run, ungraceful, drill, detach } => {
            let mode = if ungraceful { Mode::Ungraceful } else { Mode::Graceful };
            let request = control::plans::PlanRequest { mode, drill, dry_run };
            plans::execute(&cli.global, &app, &plan, &request, detach)
        }
        Verb::Approve { which, step } => plans::say(&cli.global, &which, "approve", step, None),
        Verb::Decline { which, step } => plans::say(&cli.global, &which, "decline", step, None),
        Verb::Skip { which, step } => plans::say(&cli.global, &which, "skip", step, None),
        Verb::Pause { which } => plans::say(&cli.global, &which, "pause", None, None),
        Verb::Resume { which } => plans::say(&cli.global, &which, "resume", None, None),
        Verb::Cancel { which } => plans::say(&cli.global, &which, "cancel", None, None),
        Verb::Mode { which, mode } => plans::say(&cli.global, &which, "mode", None, Some(mode)),
        Verb::Store(verb) => copies::run(&verb),
        Verb::Guard { bin_dir, data_dir, state_dir, kill_at_ns } => {
            let kill_at = Moment(Duration::from_nanos(kill_at_ns));
            run_guard(&bin_dir, &data_dir, &state_dir, kill_at)
        }
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("holdfast: {error}");
            ExitCode::FAILURE
        }
    }
}

fn check(path: &std::path::Path) -> Result<ExitCode, String> {
    let config = match Roles::load(path).map_err(|error| chain(&error))? {
        Roles::Here(config) => config,
        Roles::Node(config) => {
            let (node, apps) = (&config.node.etcd.node, config.control.apps.len());
            say!("{}: node `{node}` of control, {apps} applications", path.display());
            return Ok(ExitCode::SUCCESS);
        }
        Roles::Agent(agent) => {
            say!("{}: the agent of cell `{}` of `{}`", path.display(), agent.cell, agent.app);
            return Ok(ExitCode::SUCCESS);
        }
        Roles::Proxy(remote) => {
            let (name, apps) = (&remote.name, remote.proxy.apps.len());
            say!("{}: proxy `{name}`, {apps} applications", path.display());
            return Ok(ExitCode::SUCCESS);
        }
    };
    let cells: usize = config.control.apps.values().map(|app| app.cells.len()).sum();
    say!("{}: {} applications, {cells} cells", path.display(), config.control.apps.len());
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn log_to_stderr(default: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HOLDFAST_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
    // A second call, as in tests, leaves the first in place.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(ansi)
        .with_target(false)
        .try_init();
}

pub(crate) fn runtime() -> Result<tokio::runtime::Runtime, String> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(threads)
        .thread_name("holdfast")
        .enable_all()
        .build()
        .map_err(|error| format!("no runtime: {error}"))
}

fn run_config(path: &std::path::Path) -> Result<ExitCode, String> {
    log_to_stderr("info");
    let (roles, text) = Roles::load_with_text(path).map_err(|error| chain(&error))?;
    let config = match roles {
        Roles::Here(config) => *config,
        Roles::Node(config) => return run_node(*config, (path, &text)),
        Roles::Agent(agent) => return run_agent(*agent),
        Roles::Proxy(remote) => return run_remote(*remote, (path, &text)),
    };
    runtime()?.block_on(async {
        let hangups = hangups()?;
        let loaded = Arc::new(config.loaded((path, &text)));
        let running = Running::start(config, Some((loaded, hangups))).await;
        let running = running.map_err(|error: run::RunError| chain(&error))?;
        for address in running.proxy.addresses() {
            tracing::info!(%address, "clients are served");
        }
        tracing::info!(address = %running.api, "the API is served");
        shutdown_signal().await?;
        tracing::info!("shutting down");
        running.stop().await;
        Ok(ExitCode::SUCCESS)
    })
}

fn run_node(config: NodeConfig, file: (&std::path::Path, &str)) -> Result<ExitCode, String> {
    let (control, access) = (config.control.clone(), config.api.access.clone());
    let name = config.node.etcd.node.clone();
    let loaded = Arc::new(Loaded::new(file, control, access, Some(name)));
    runtime()?.block_on(async {
        let stop = shutdown_signal();
        tokio::pin!(stop);
        let hangups = hangups()?;
        let node = tokio::select! {
            node = Box::pin(Node::start(config, loaded, hangups)) => node.map_err(|error| chain(&error))?,
            signal = &mut stop => return signal.map(|()| ExitCode::SUCCESS),
        };
        tracing::info!(address = %node.api, "the API is served");
        Box::pin(node.run(stop)).await.map(|()| ExitCode::SUCCESS)
    })
}

fn run_remote(
    config: RemoteConfig,
    (path, text): (&std::path::Path, &str),
) -> Result<ExitCode, String> {
    let runs = Runs::new(path, text);
    runtime()?.block_on(async {
        let hangups = hangups()?;
        let stop = shutdown_signal();
        tokio::pin!(stop);
        let mut remote = tokio::select! {
            remote = Box::pin(Remote::start(config)) => remote.map_err(|error| chain(&error))?,
            signal = &mut stop => return signal.map(|()| ExitCode::SUCCESS),
        };
        remote.proxy.rereads_by(Box::new(move |app| runs.rules(app)));
        for address in remote.proxy.addresses() {
            tracing::info!(%address, "clients are served");
        }
        tokio::select! {
            stopped = &mut stop => stopped?,
            () = ignore_hangups(hangups, "rules for commands are taken up by `holdfast apply`") => (),
            () = remote.failed() => return Err("a part of the proxy has failed".into()),
        }
        tracing::info!("shutting down");
        remote.stop().await;
        Ok(ExitCode::SUCCESS)
    })
}

fn run_agent(config: AgentConfig) -> Result<ExitCode, String> {
    let own = std::env::current_exe().map_err(|error| format!("our own program: {error}"))?;
    let text = |path: &std::path::Path| path.display().to_string();
    let guard = vec![
        text(&own),
        "__guard".into(),
        text(&config.instance.bin_dir),
        text(&config.instance.data_dir),
        text(&config.state_dir),
    ];
    runtime()?.block_on(async {
        let hangups = hangups()?;
        let (app, cell) = (config.app.clone(), config.cell.clone());
        let agent = Agent::start(AgentConfig { guard, ..config }).await;
        let agent = agent.map_err(|error| chain(&error))?;
        tracing::info!(app, cell, "the agent runs");
        tokio::select! {
            stopped = shutdown_signal() => stopped?,
            () = ignore_hangups(hangups, "an agent reads its configuration at its start alone") => (),
        }
        tracing::info!("shutting down, the server as well");
        agent.stop().await;
        Ok(ExitCode::SUCCESS)
    })
}

/// Ends a server when its lease is over; an agent starts this.
fn run_guard(
    bin_dir: &std::path::Path,
    data_dir: &std::path::Path,
    state_dir: &std::path::Path,
    kill_at: Moment,
) -> Result<ExitCode, String> {
    log_to_stderr("info");
    let instance = Instance::of(bin_dir, data_dir).map_err(|error| chain(&error))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("no runtime: {error}"))?;
    let done = runtime.block_on(agent::guard::run(&instance, state_dir, kill_at));
    done.map(|()| ExitCode::SUCCESS).map_err(|error| format!("the guard's socket: {error}"))
}

/// SIGHUP, which ends this process from here on no more.
pub(crate) fn hangups() -> Result<Signal, String> {
    let error = |error: std::io::Error| format!("signals cannot be received: {error}");
    signal(SignalKind::hangup()).map_err(error)
}

/// Of this process nothing is taken up by that, and a reload of the service is not to end it.
async fn ignore_hangups(mut hangups: Signal, why: &str) {
    while hangups.recv().await.is_some() {
        tracing::warn!("SIGHUP: nothing is taken up: {why}");
    }
    std::future::pending().await
}

/// Waits for SIGINT or SIGTERM.
pub(crate) async fn shutdown_signal() -> Result<(), String> {
    let error = |error: std::io::Error| format!("signals cannot be received: {error}");
    let mut terminate = signal(SignalKind::terminate()).map_err(error)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(error)?;
    tokio::select! {
        _ = terminate.recv() => (),
        _ = interrupt.recv() => (),
    }
    Ok(())
}
