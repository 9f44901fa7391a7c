//! Installs what is missing, by Debian's packages, and says what it does.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Done, output, root, run, target};

/// One thing that is needed: how to see that it is there, and the package that brings it.
struct Need {
    path: &'static str,
    package: &'static str,
}

const SERVERS: [Need; 4] = [
    Need { path: "/usr/bin/cc", package: "build-essential" },
    // The grammar's crate asks clang for the shapes of its C functions, which takes its library and its own headers.
    Need { path: "/usr/lib/llvm-14/lib/libclang.so.1", package: "libclang1-14" },
    Need { path: "/usr/lib/llvm-14/lib/clang", package: "libclang-common-14-dev" },
    Need { path: "/usr/lib/postgresql/15/bin/pg_ctl", package: "postgresql" },
];

const DRIVERS: [Need; 8] = [
    Need { path: "/usr/lib/python3/dist-packages/psycopg", package: "python3-psycopg" },
    Need { path: "/usr/lib/python3/dist-packages/asyncpg", package: "python3-asyncpg" },
    Need { path: "/usr/share/java/postgresql.jar", package: "libpostgresql-jdbc-java" },
    Need { path: "/usr/bin/javac", package: "openjdk-17-jdk-headless" },
    Need { path: "/usr/bin/node", package: "nodejs" },
    // What control nodes share.
    Need { path: "/usr/bin/etcd", package: "etcd-server" },
    // What steps of plans speak to.
    Need { path: "/usr/sbin/haproxy", package: "haproxy" },
    Need { path: "/usr/sbin/knotd", package: "knot" },
];

/// What node-pg is made of. It is unpacked, not installed: Debian's package wants Debian's node, and any will do.
const NODE_PACKAGES: [&str; 8] = [
    "node-pg",
    "node-split2",
    "node-readable-stream",
    "node-xtend",
    "node-inherits",
    "node-util-deprecate",
    "node-string-decoder",
    "node-safe-buffer",
];

/// What a demo needs: a compiler for the few C parts, and PostgreSQL.
pub(crate) fn servers() -> Done {
    // Another major, or a PostgreSQL elsewhere on the PATH, serves as well.
    let needs = SERVERS.iter().filter(|need| !Path::new(need.path).exists());
    let needs = needs.filter(|need| need.package != "postgresql" || !has_postgresql());
    install(needs.map(|need| need.package).collect())
}

fn has_postgresql() -> bool {
    let majors = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    majors.into_iter().any(|major| major.path().join("bin/initdb").exists())
}

/// What the tests need besides: the drivers that applications use, and etcd.
pub(crate) fn drivers() -> Done {
    let needs = DRIVERS.iter().filter(|need| !Path::new(need.path).exists());
    install(needs.map(|need| need.package).collect())?;
    let dir = node_dir();
    if dir.join("usr/share/nodejs/pg").exists() {
        return Ok(());
    }
    println!("unpacking Debian's node-pg into {}", dir.display());
    std::fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
    let download = |dir: &Path| {
        run(Command::new("apt-get").args(["download", "-q"]).args(NODE_PACKAGES).current_dir(dir))
    };
    if download(&dir).is_err() {
        update()?;
        download(&dir)?;
    }
    let files = std::fs::read_dir(&dir).map_err(|error| error.to_string())?;
    for file in files.flatten().map(|entry| entry.path()) {
        if file.extension().is_some_and(|extension| extension == "deb") {
            run(Command::new("dpkg").arg("-x").arg(&file).arg(&dir))?;
        }
    }
    Ok(())
}

/// Where node finds its driver: `NODE_PATH` is `usr/share/nodejs` in here.
pub(crate) fn node_dir() -> PathBuf {
    target().join("drivers/node")
}

pub(crate) fn is_root() -> bool {
    output(Command::new("id").arg("-u")).is_ok_and(|uid| uid.trim() == "0")
}

fn apt(args: &[&str]) -> Command {
    let mut command = if is_root() {
        Command::new("apt-get")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "apt-get"]);
        sudo
    };
    command.args(args).env("DEBIAN_FRONTEND", "noninteractive").current_dir(root());
    command
}

fn update() -> Done {
    run(&mut apt(&["update", "-q"]))
}

pub(crate) fn install(packages: Vec<&str>) -> Done {
    if packages.is_empty() {
        return Ok(());
    }
    println!("installing from Debian: {}", packages.join(" "));
    let mut args = vec!["install", "-q", "-y", "--no-install-recommends"];
    args.extend(&packages);
    // An old list of packages names versions that are gone.
    let installed = run(&mut apt(&args)).or_else(|_| update().and_then(|()| run(&mut apt(&args))));
    installed.map_err(|error| {
        format!("{error}\ninstall them by hand: apt-get install {}", packages.join(" "))
    })
}
