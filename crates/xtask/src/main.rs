//! `cargo xtask VERB`: what is done to the project itself. Depends on nothing but the standard library, because
//! it is built first, on a machine that may have nothing else yet.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

mod bench;
mod failover;
mod majors;
mod regress;
mod setup;
mod torture;

const HELP: &str = "\
cargo xtask demo [ARGS]    install what is missing, build, and run `holdfast demo ARGS`
cargo xtask test [FILTER]  install what is missing, check format and lints, and pass every test
cargo xtask check          format, lints and documentation only
cargo xtask bench [KIND]   compare with direct connections and pgbouncer: pgbench (default), bulk, idle, login, pause,
                           pool, policy; failover [ROUNDS] [SCENARIO...] beside Patroni, HAProxy and etcd
cargo xtask sim [N] [FIRST] so many seeded worlds (10000) of leases, pledges, seats, epochs and proxies
cargo xtask torture [SECONDS] [SEED]  three servers, two proxies, three nodes and etcd on hosts of their own, while
                           processes, hosts and the network between them fail; as root, in network namespaces
cargo xtask regress        PostgreSQL's own regression suite, direct and through the proxy
cargo xtask majors [MAJOR] the tests of moves and pins on PostgreSQL 16, 17 and 18, which it fetches
cargo xtask battery        each kind of session state by each way to move on 15 to 18, into docs/battery.md
cargo xtask setup          only install what is missing";

pub(crate) type Done = Result<(), String>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let rest = args.get(1..).unwrap_or_default();
    let done = match args.first().map(String::as_str) {
        Some("demo") => demo(rest),
        Some("test") => test(rest),
        Some("check") => check(),
        Some("bench") if rest.first().is_some_and(|kind| kind == "failover") => {
            failover::run(rest.get(1..).unwrap_or_default())
        }
        Some("bench") => bench::run(rest),
        Some("majors") => majors::run(rest),
        Some("battery") => majors::battery(),
        Some("sim") => sim(rest),
        Some("torture") => torture::run(rest),
        Some("regress") => regress::run(),
        Some("setup") => setup::servers().and_then(|()| setup::drivers()),
        _ => {
            eprintln!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Optimised, as it is nothing but computation.
fn sim(args: &[String]) -> Done {
    let mut command = cargo(&["run", "--release", "-q", "-p", "sim", "--"]);
    match args {
        [] => run(command.arg("10000")),
        args => run(command.args(args)),
    }
}

pub(crate) fn root() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest.ancestors().nth(2).map_or(manifest.clone(), PathBuf::from)
}

pub(crate) fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Runs a program to its end, with what it prints shown.
pub(crate) fn run(command: &mut Command) -> Done {
    let shown = format!("{command:?}");
    match command.stdin(Stdio::null()).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{shown} ended with {status}")),
        Err(error) => Err(format!("{shown} cannot be run: {error}")),
    }
}

/// The output of a program that must succeed.
pub(crate) fn output(command: &mut Command) -> Result<String, String> {
    let shown = format!("{command:?}");
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{shown} cannot be run: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!(
            "{shown} ended with {}: {text}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ))
    }
}

pub(crate) fn cargo(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    // What cargo told this program about itself would look like a change to build scripts that watch it.
    for (name, _) in std::env::vars_os() {
        let shown = name.to_string_lossy();
        if shown.starts_with("CARGO_PKG_") || shown.starts_with("CARGO_MANIFEST") {
            command.env_remove(&name);
        }
    }
    command
}

/// Builds the binary as it is shipped.
pub(crate) fn build_release() -> Result<PathBuf, String> {
    println!("building holdfast (release); the first time takes some minutes");
    run(&mut cargo(&["build", "--release", "--package", "app"]))?;
    Ok(target().join("release/holdfast"))
}

fn demo(args: &[String]) -> Done {
    setup::servers()?;
    let binary = build_release()?;
    // Ctrl-C goes to the demo as well, which ends what it started; this process only waits for it.
    let status = Command::new(&binary).arg("demo").args(args).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("the demo ended with {status}")),
        Err(error) => Err(format!("`{}` cannot be run: {error}", binary.display())),
    }
}

fn check() -> Done {
    run(&mut cargo(&["fmt", "--all", "--check"]))?;
    run(&mut cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ]))?;
    run(cargo(&["doc", "--workspace", "--no-deps", "--quiet"]).env("RUSTDOCFLAGS", "-D warnings"))
}

fn test(args: &[String]) -> Done {
    setup::servers()?;
    setup::drivers()?;
    println!("checking format, lints and documentation");
    check()?;
    println!("running the tests");
    let nextest =
        cargo(&["nextest", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    let mut command = if nextest.is_ok_and(|status| status.success()) {
        cargo(&["nextest", "run", "--workspace", "--no-fail-fast"])
    } else {
        cargo(&["test", "--workspace", "--no-fail-fast"])
    };
    run(command.args(args))
}
