//! Switches over there and back again under a live workload, and prints what the clients saw.

use std::process::ExitCode;
use std::time::Duration;

use control::SwitchoverRequest;
use model::barrier::Pauses;
use model::persisted::Execution;
use model::switchover::{Ending, OnTimeout, Stage};

use super::workload::{Workload, commits_on};
use super::{CELLS, Demo, Progress};
use crate::cli::show::{print_execution, table};

/// How long clients work between two switches.
const WORK: Duration = Duration::from_secs(2);

pub(super) async fn run(demo: &Demo, sessions: usize) -> Result<ExitCode, String> {
    let step = Progress::begin(&format!(
        "connecting {sessions} clients: writers, settings, prepared statements, listeners, locks, transactions"
    ));
    let workload = Workload::start(&demo.dsn(), sessions).await?;
    step.end();
    println!("\n  psql '{}'   # works all the time, try it\n", demo.dsn());
    tokio::time::sleep(WORK).await;
    let mut rows = Vec::new();
    let mut fine = true;
    for to in [CELLS[1], CELLS[0]] {
        workload.take_gaps().await;
        println!("switchover to cell {to}");
        let request = SwitchoverRequest {
            to: to.into(),
            dry_run: false,
            deadline_ms: 10_000,
            on_timeout: OnTimeout::Abort,
        };
        let execution = demo.switch_over(request).await?;
        print_execution(&execution);
        println!();
        fine &= execution.ending == Some(Ending::Completed);
        tokio::time::sleep(Duration::from_millis(500)).await;
        let gaps = Pauses::of(workload.take_gaps().await).unwrap_or_default();
        rows.push(vec![
            format!("to {to}"),
            moved(&execution),
            format!("{:.0} / {:.0} / {:.0} ms", gaps.p50, gaps.p99, gaps.max),
            workload.errors().to_string(),
        ]);
        tokio::time::sleep(WORK).await;
    }
    let connected = workload.sessions;
    let summary = workload.stop().await;
    println!(
        "what {connected} clients saw (longest gap between two answers, a client works every 5 ms):"
    );
    table(&["switchover", "sessions", "gap p50 / p99 / max", "errors so far"], &rows);
    let found = commits_on(&demo.dsn()).await?;
    println!();
    let counts = [
        ("statements", summary.statements),
        ("notifications received", summary.notifications),
        ("commits acknowledged", summary.commits),
        ("commits found", found),
        ("errors", u64::try_from(summary.errors.len()).unwrap_or(u64::MAX)),
    ];
    table(&["", "count"], &counts.map(|(name, count)| vec![name.into(), count.to_string()]));
    summary.errors.iter().take(10).for_each(|error| println!("! {error}"));
    fine &= summary.errors.is_empty() && found == summary.commits;
    // The copy must have it all, too: it was the active cell for a while.
    let passive = demo.server_dsn(CELLS[1]).ok_or("no such cell")?;
    let copied = wait_for_commits(&passive, found).await?;
    println!("\n{} of {found} commits are on the standby", copied);
    fine &= copied == found;
    println!(
        "{}",
        if fine { "\neverything held fast" } else { "\nsomething went wrong, see above" }
    );
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn moved(execution: &Execution) -> String {
    let attach = execution
        .log
        .iter()
        .rev()
        .find(|entry| entry.stage == Stage::Attach && entry.took_ms.is_some());
    attach.map_or("none moved".into(), |entry| entry.text.clone())
}

async fn wait_for_commits(dsn: &super::Dsn, expected: u64) -> Result<u64, String> {
    let mut found = 0;
    for _ in 0..100 {
        found = commits_on(dsn).await?;
        if found >= expected {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(found)
}
