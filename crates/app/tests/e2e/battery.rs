//! What becomes of each kind of state, by each way to move, and how long it is held: the table of `docs/battery.md`,
//! which `cargo xtask battery` writes.

use std::fmt::Write as _;

use pg::Connection;

use crate::kinds::{KINDS, ROLES};
use crate::pins::{PINNED, is_reason, set_up};
use crate::support::{Installation, run, shown, value};

/// One session of a kind.
struct Subject {
    name: &'static str,
    look: &'static str,
    before: String,
    connection: Connection,
    id: u64,
}

async fn id_of(installation: &Installation, connection: &mut Connection) -> u64 {
    let pid = value(connection, "SELECT pg_backend_pid()").await;
    let output = installation.holdfast(&["--json", "sessions", "shop"]);
    let all: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let pid: u64 = pid.parse().unwrap();
    let of_pid = |one: &&serde_json::Value| one["backend_pid"].as_u64() == Some(pid);
    all.as_array().unwrap().iter().find(of_pid).unwrap()["id"].as_u64().unwrap()
}

/// How long it was held by a move of its own, or why it stays.
fn move_alone(installation: &Installation, id: u64) -> Result<f64, String> {
    let id = id.to_string();
    let args = ["--json", "move", "shop", "--session", &id, "--to", "a", "--deadline", "2s"];
    let output = installation.holdfast(&args);
    let report: model::barrier::Report = serde_json::from_slice(&output.stdout).unwrap();
    match report.pauses {
        Some(pauses) => Ok(pauses.max),
        None => Err(report.blockers[0].reasons[0].to_string()),
    }
}

#[tokio::test]
#[ignore = "it writes a table: cargo xtask battery"]
async fn the_battery() {
    let installation = Installation::start("battery");
    let mut first = installation.connect().await;
    run(&mut first, ROLES).await;
    let major =
        value(&mut first, "SELECT current_setting('server_version_num')::int / 10000").await;
    let mut table = String::new();
    let mut subjects = Vec::new();
    for (name, statements, look) in KINDS {
        let mut connection = installation.connect().await;
        for sql in *statements {
            run(&mut connection, sql).await;
        }
        let before = value(&mut connection, look).await;
        let id = id_of(&installation, &mut connection).await;
        subjects.push(Subject { name, look, before, connection, id });
    }
    let mut alone = Vec::new();
    for subject in &mut subjects {
        let mut pauses = Vec::new();
        let mut outcome = String::new();
        for _ in 0..5 {
            match move_alone(&installation, subject.id) {
                Ok(pause) => pauses.push(pause),
                Err(reason) => outcome = format!("stays: {reason}"),
            }
            let now = value(&mut subject.connection, subject.look).await;
            if now != subject.before {
                outcome = format!("DIFFERENT: {now}");
            }
        }
        pauses.sort_by(f64::total_cmp);
        if outcome.is_empty() {
            outcome = format!("same, {:.0} ms", pauses[pauses.len() / 2]);
        }
        alone.push(outcome);
    }
    installation.switch_to("b");
    for (subject, alone) in subjects.iter_mut().zip(alone) {
        let same = value(&mut subject.connection, subject.look).await == subject.before;
        let switched = if same { "same" } else { "DIFFERENT" };
        let _ = writeln!(table, "carried\t{}\t{major}\t{alone}\t{switched}", subject.name);
        assert!(same && !alone.contains("DIFFERENT"), "{}: {alone}, {switched}", subject.name);
    }
    drop(subjects);
    for (name, outcome) in crate::pools::every_kind().await {
        let _ = writeln!(table, "pooled\t{name}\t{major}\t{outcome}");
    }
    let installation = Installation::start("battery-pins");
    set_up(&installation).await;
    for (sql, reason, _) in PINNED {
        let mut session = installation.connect().await;
        run(&mut session, sql).await;
        let id = id_of(&installation, &mut session).await;
        let stays = move_alone(&installation, id).unwrap_err();
        assert!(is_reason(&stays, reason), "{sql}: {stays}");
        let _ = writeln!(table, "pinned\t{sql}\t{major}\t{stays}");
    }
    let output = shown(&installation.holdfast(&["sessions", "shop", "--pinned"]));
    assert!(output.contains("0 of 0 sessions"), "{output}");
    let path = std::env::var("HOLDFAST_BATTERY").unwrap();
    std::fs::write(path, table).unwrap();
}
