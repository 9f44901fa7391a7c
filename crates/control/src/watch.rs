//! Looks at the active cell's server of each application again and again, and fails over by itself where that is
//! asked for.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::Lsn;
use model::failover::{Analysis, Answer, Detector, Sight};
use model::persisted::Execution;
use model::switchover::{Ending, Kind};

use crate::config::AppServers;
use crate::member::Member;
use crate::runner::{Control, FailoverRequest, now_ms};
use crate::stages;

/// Between two questions to the server.
const PAUSE: Duration = Duration::from_millis(250);
/// Between two looks at its process, which cost next to nothing.
const GLANCE: Duration = Duration::from_millis(20);
/// After a failover that did not come about, until the next is tried.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// What was seen of an application's active cell.
#[derive(Debug, Clone)]
pub struct Seen {
    pub cell: String,
    pub analysis: Analysis,
    /// The end of its WAL, when it has answered last.
    pub lsn: Option<Lsn>,
    /// Why no failover came about.
    pub blocked: Option<String>,
}

/// Runs until the task is dropped.
pub async fn run(control: Arc<Control>, app: String) {
    let mut detector = Detector::default();
    let mut looked_at: Option<String> = None;
    let mut tried: Option<Instant> = None;
    loop {
        wait(&control, &app, looked_at.as_deref()).await;
        let Ok(application) = control.application(&app) else { continue };
        let active = application.active().filter(|_| application.execution.is_none());
        let Some(cell) = active.map(str::to_owned) else {
            detector = Detector::default();
            continue;
        };
        if looked_at.as_ref() != Some(&cell) {
            (detector, looked_at) = (Detector::default(), Some(cell.clone()));
            control.forget_seen(&app);
        }
        let Ok(servers) = control.servers(&app) else { continue };
        let analysis = look(&control, servers, &app, &cell, &mut detector).await;
        if !analysis.calls_for_failover() {
            continue;
        }
        let is_early = tried.is_some_and(|at| at.elapsed() < RETRY_PAUSE);
        if !servers.failover.automatic || is_early {
            continue;
        }
        tried = Some(Instant::now());
        tracing::error!(app, cell, %analysis, "{}", analysis.says());
        let blocked = match begin(&control, servers, &app, &cell).await {
            Ok(execution) if execution.ending == Some(Ending::Aborted) => execution.reason,
            Ok(_) => None,
            Err(why) => Some(why),
        };
        if let Some(why) = &blocked {
            tracing::error!(app, cell, reason = why, "no failover");
        }
        control.note_seen(&app, |seen| seen.blocked = blocked);
    }
}

/// Until the next question; not so long if the server's process is gone.
async fn wait(control: &Control, app: &str, cell: Option<&str>) {
    let servers = control.servers(app).ok();
    let server = servers.zip(cell).and_then(|(servers, cell)| servers.cells.get(cell));
    let member = server.and_then(|server| server.member.as_ref());
    let was_running = member.is_some_and(Member::is_running);
    let until = Instant::now() + PAUSE;
    while Instant::now() < until {
        tokio::time::sleep(GLANCE).await;
        if was_running && member.is_some_and(|member| !member.is_running()) {
            return;
        }
    }
}

async fn look(
    control: &Control,
    servers: &AppServers,
    app: &str,
    cell: &str,
    detector: &mut Detector,
) -> Analysis {
    let Some(server) = servers.cells.get(cell) else { return Analysis::NoProblem };
    let (answer, admin) = stages::probe(server).await;
    let mut lsn = None;
    if let (Answer::Primary, Some(mut admin)) = (answer, admin) {
        lsn = admin.flush_lsn().await.ok();
    }
    let (mut process, mut streams) = (None, None);
    if answer == Answer::Nothing {
        process = stages::process_of(server).await;
        if process.is_none() {
            streams = streams_from(servers, cell).await;
        }
    }
    let analysis = detector.see(Instant::now(), Sight { process, answer, streams });
    control.note_seen(app, |seen| {
        cell.clone_into(&mut seen.cell);
        seen.analysis = analysis;
        seen.lsn = lsn.max(seen.lsn);
        if analysis == Analysis::NoProblem {
            seen.blocked = None;
        }
    });
    analysis
}

/// Whether a standby hears of the active cell's server.
async fn streams_from(servers: &AppServers, active: &str) -> Option<bool> {
    let mut streams = None;
    for (_, server) in servers.cells.iter().filter(|(cell, _)| *cell != active) {
        let (Answer::Standby, Some(mut admin)) = stages::probe(server).await else { continue };
        let Ok(status) = admin.status().await else { continue };
        streams = Some(streams.unwrap_or(false) || status.streaming);
    }
    streams
}

async fn begin(
    control: &Control,
    servers: &AppServers,
    app: &str,
    cell: &str,
) -> Result<Execution, String> {
    let recent = control.executions(app).map_err(|error| model::chain(&error))?;
    let block_ms = u64::try_from(servers.failover.block.as_millis()).unwrap_or(u64::MAX);
    let is_recent = |one: &&Execution| {
        one.kind == Kind::Failover
            && one.is_automatic
            && one.ending != Some(Ending::Aborted)
            && now_ms().saturating_sub(one.started_at_ms) < block_ms
    };
    let to = stages::choose(servers, cell).await?;
    if let Some(one) = recent.iter().find(is_recent) {
        return Err(format!(
            "execution {} failed over less than {:?} ago; `holdfast failover {app} --to {to}` does it again",
            one.id, servers.failover.block
        ));
    }
    let request = FailoverRequest { to, allow_data_loss: false, dry_run: false };
    control.fail_over(app, request, true).await.map_err(|error| model::chain(&error))
}
