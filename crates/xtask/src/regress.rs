//! PostgreSQL's own regression suite, once directly and once through the proxy: the results must be the same.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::bench::{Cluster, Holdfast, scratch};
use crate::setup;
use crate::{Done, build_release, output, run as run_program};

/// A look loads `plpgsql`, whose settings `guc` counts (docs/known-gaps.md).
const KNOWN_IN_POOL: &[&str] = &["guc"];
const PGXS: &str = "/usr/lib/postgresql/15/lib/pgxs/src/test";

/// The verdict, and the names of the tests that failed.
fn run_suite(source: &Path, port: u16, name: &str) -> Result<(String, Vec<String>), String> {
    let out = scratch().join("regress").join(name);
    let _ = std::fs::remove_dir_all(&out);
    std::fs::create_dir_all(&out).map_err(|error| error.to_string())?;
    crate::bench::give_to_postgres(&out)?;
    let regress = source.join("src/test/regress");
    let mut command = crate::bench::as_postgres(&format!("{PGXS}/regress/pg_regress"));
    command
        .current_dir(&out)
        .arg("--bindir=/usr/lib/postgresql/15/bin")
        .args([
            "--host=127.0.0.1",
            "--user=postgres",
            "--dbname=regression",
            "--max-connections=20",
        ])
        .arg(format!("--port={port}"))
        .arg(format!("--inputdir={}", regress.display()))
        .arg(format!("--outputdir={}", out.display()))
        .arg(format!("--dlpath={}", regress.display()))
        .arg(format!("--schedule={}", regress.join("parallel_schedule").display()))
        .stdin(Stdio::null());
    let text = command.output().map_err(|error| format!("pg_regress cannot be run: {error}"))?;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    let verdict =
        text.lines().find(|line| line.contains("tests passed") || line.contains("tests failed"));
    let failed = |line: &str| {
        let (test, _) = line.split_once(" ... FAILED")?;
        test.split_whitespace().last().map(str::to_owned)
    };
    Ok((
        verdict.unwrap_or("no verdict").trim().to_owned(),
        text.lines().filter_map(failed).collect(),
    ))
}

/// Debian's source package of the installed version, and the library that the suite loads.
fn source() -> Result<PathBuf, String> {
    let dir = scratch().join("regress/source");
    let version =
        output(Command::new("dpkg-query").args(["-W", "-f", "${Version}", "postgresql-15"]))?;
    let upstream = version.split('-').next().unwrap_or_default().to_owned();
    let source = dir.join(format!("postgresql-{upstream}"));
    if source.join("src/test/regress/regress.so").exists() {
        return Ok(source);
    }
    std::fs::create_dir_all(&dir).map_err(|error| error.to_string())?;
    setup::install(vec!["bzip2"])?;
    let list = dir.join("source.list");
    std::fs::write(&list, "deb-src http://deb.debian.org/debian bookworm main\n")
        .map_err(|error| error.to_string())?;
    let lists = dir.join("lists");
    std::fs::create_dir_all(lists.join("partial")).map_err(|error| error.to_string())?;
    let options = [
        format!("Dir::Etc::SourceList={}", list.display()),
        "Dir::Etc::SourceParts=/dev/null".into(),
        format!("Dir::State::Lists={}", lists.display()),
    ];
    let apt = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        for option in &options {
            command.args(["-o", option]);
        }
        command.args(args).current_dir(&dir);
        command
    };
    run_program(&mut apt(&["update", "-q"]))?;
    run_program(&mut apt(&[
        "source",
        "-q",
        "--download-only",
        &format!("postgresql-15={version}"),
    ]))?;
    let tar = format!("postgresql-15_{upstream}.orig.tar.bz2");
    let part = format!("postgresql-{upstream}/src/test/regress");
    run_program(Command::new("tar").args(["-xjf", &tar, &part]).current_dir(&dir))?;
    // Only the headers of the development package are needed; the package itself wants clang and llvm.
    run_program(
        Command::new("apt-get")
            .args(["download", "-q", &format!("postgresql-server-dev-15={version}")])
            .current_dir(&dir),
    )?;
    let deb = std::fs::read_dir(&dir)
        .map_err(|error| error.to_string())?
        .flatten()
        .map(|entry| entry.path());
    let deb = deb
        .into_iter()
        .find(|path| path.extension().is_some_and(|e| e == "deb"))
        .ok_or("no headers")?;
    run_program(Command::new("dpkg").arg("-x").arg(&deb).arg(dir.join("headers")))?;
    let regress = source.join("src/test/regress");
    let include = dir.join("headers/usr/include/postgresql/15/server");
    run_program(
        Command::new("cc")
            .args(["-O2", "-fPIC", "-shared", "-D_GNU_SOURCE", "-DDLSUFFIX=\".so\"", "-I"])
            .arg(&include)
            .args(["-o", "regress.so", "regress.c"])
            .current_dir(&regress),
    )?;
    for library in ["refint.so", "autoinc.so"] {
        std::fs::copy(format!("/usr/lib/postgresql/15/lib/{library}"), regress.join(library))
            .map_err(|error| error.to_string())?;
    }
    Ok(source)
}

pub(crate) fn run() -> Done {
    setup::servers()?;
    let source = source()?;
    crate::bench::open_to_all(&source)?;
    let binary = build_release()?;
    let mut differs = Vec::new();
    for name in ["direct", "proxy", "pool"] {
        // Each on a fresh cluster: the suite counts objects and OIDs.
        let cluster = Cluster::start(&scratch().join("regress/cluster"), "")?;
        let proxy = Holdfast::start(
            &binary,
            &scratch().join("regress/holdfast"),
            cluster.port,
            "trust",
            "",
            // Fewer than there are tests at a time.
            if name == "pool" { "pool = \"transaction\"\npool_size = 6" } else { "" },
        )?;
        let port = if name == "direct" { cluster.port } else { proxy.port };
        let (verdict, failed) = run_suite(&source, port, name)?;
        println!("{name}: {verdict} {failed:?}");
        let known = if name == "pool" { KNOWN_IN_POOL } else { &[] };
        if !verdict.contains("tests") || failed != known {
            differs.push(name);
        }
    }
    match differs.as_slice() {
        [] => Ok(()),
        names => Err(format!("other results than expected: {}", names.join(", "))),
    }
}
