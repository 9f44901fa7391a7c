//! Real processes on hosts of their own, which are network namespaces, while everything between them fails:
//! `torture/torture.py` says how.

use std::path::Path;
use std::process::Command;

use crate::bench::{open_to_all, scratch};
use crate::{Done, build_release, root, run as run_program, setup};

/// `args`: for how many seconds, and which seed.
pub(crate) fn run(args: &[String]) -> Done {
    setup::servers()?;
    let needs = [
        ("/usr/bin/etcd", "etcd-server"),
        ("/usr/bin/openssl", "openssl"),
        ("/usr/sbin/ip", "iproute2"),
        ("/usr/lib/python3/dist-packages/psycopg", "python3-psycopg"),
    ];
    let missing = needs.iter().filter(|(path, _)| !Path::new(path).exists());
    setup::install(missing.map(|(_, package)| *package).collect())?;
    let dir = scratch().join("torture");
    std::fs::create_dir_all(&dir).map_err(|error| format!("`{}`: {error}", dir.display()))?;
    open_to_all(&dir)?;
    let binary = build_release()?;
    run_program(
        Command::new("/usr/bin/python3")
            .arg(root().join("crates/xtask/torture/torture.py"))
            .arg(&binary)
            .arg(dir.join("run"))
            .args(args),
    )
}
