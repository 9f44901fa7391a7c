//! Failover beside Patroni with HAProxy and etcd, in rotation in one run: `failover/compare.py` says how.

use std::path::Path;
use std::process::Command;

use crate::bench::{open_to_all, scratch};
use crate::{Done, build_release, root, run as run_program, setup};

const PATRONI: &str = "4.1.5";

/// `args`: how many rounds, and which scenarios.
pub(crate) fn run(args: &[String]) -> Done {
    setup::servers()?;
    let needs = [
        ("/usr/bin/etcd", "etcd-server"),
        ("/usr/sbin/haproxy", "haproxy"),
        ("/usr/share/doc/python3-venv", "python3-venv"),
    ];
    let missing = needs.iter().filter(|(path, _)| !Path::new(path).exists());
    setup::install(missing.map(|(_, package)| *package).collect())?;
    let dir = scratch().join("failover");
    let venv = dir.join("venv");
    let python = venv.join("bin/python");
    if !venv.join("bin/patroni").exists() {
        std::fs::create_dir_all(&dir).map_err(|error| format!("`{}`: {error}", dir.display()))?;
        // Debian's, as the servers' user has to get at it.
        run_program(Command::new("/usr/bin/python3").args(["-m", "venv"]).arg(&venv))?;
        let patroni = format!("patroni[etcd3]=={PATRONI}");
        let install = ["-m", "pip", "install", "-q", &patroni, "psycopg[binary]"];
        run_program(Command::new(&python).args(install))?;
        open_to_all(&dir)?;
    }
    let binary = build_release()?;
    let rounds = args.first().map_or("5", String::as_str);
    run_program(
        Command::new(&python)
            .arg(root().join("crates/xtask/failover/compare.py"))
            .arg(&binary)
            .arg(dir.join("runs"))
            .arg(rounds)
            .args(args.get(1..).unwrap_or_default()),
    )
}
