//! What each stage does to real servers. Every stage can be done again: after a crash it is.

use std::time::{Duration, Instant};

use model::barrier::{Blocker, Order, Report};
use model::cell::CellState;
use model::failover::Process;
use model::persisted::Execution;
use model::session::facts::{self, Facts};
use model::switchover::{Kind, OnTimeout, Stage};
use pg::admin::Admin;
use tokio::time::timeout;

use crate::config::{AppServers, CellServer};
use crate::control::Control;
use crate::durability::before_promotion;
use crate::following;
use crate::requests::SwitchoverRequest;

/// A standby further behind is refused before anybody is held.
const LAG_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// How long the target may take to have all, once nobody writes.
const CATCH_UP_MAX: Duration = Duration::from_secs(10);
const PROMOTE_MAX: Duration = Duration::from_secs(30);
/// Longest wait for one answer while clients are held.
const HELD_WAIT: Duration = Duration::from_secs(5);
/// Between two tries of what must be done.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Between looks at a server during the pause (`pg_promote(true)` itself would look every 100 ms).
const POLL: Duration = Duration::from_millis(2);

mod failing_over;
mod fencing;
mod rejoining;
mod salvage;

use fencing::{
    Logins, check_subscribes_to_nothing, cover, fence, hba_rules, regrant, uncover, unfence_in_time,
};
use rejoining::rejoin;

pub(crate) use failing_over::{
    Position, check_is_newest, choose, describe as describe_failover, is_primary, position, probe,
    process_of,
};
pub(crate) use fencing::{check_alone, check_closes, reload};
pub(crate) use rejoining::follows_timeline;

/// Done with a line for the log, or failed with a reason.
type Done = Result<String, String>;

pub(crate) async fn run(control: &Control, execution: &mut Execution, stage: Stage) -> Done {
    let servers = control.servers(&execution.app).map_err(chain)?;
    let server = |name: &str| {
        servers.cells.get(name).ok_or_else(|| format!("cell `{name}` is not configured"))
    };
    let (from, to) = (server(&execution.from)?, server(&execution.to)?);
    match stage {
        Stage::Prepare => prepare(control, execution, servers).await,
        Stage::Hold => hold(control, execution).await,
        Stage::Fence if execution.kind == Kind::Fence => {
            fence(control, execution, from, Logins::OfProxy).await
        }
        Stage::Fence => fence(control, execution, from, Logins::Closed).await,
        Stage::Capture => {
            if is_fenced(control, execution)? {
                check_closes(&execution.from, from)?;
                uncover(control, execution, from).await?;
            }
            capture(control, execution).await
        }
        Stage::CatchUp => catch_up(execution, to).await,
        // The grant is the transaction that records the begin of this stage; if it is written, it is given.
        Stage::Grant => Ok(format!("epoch {} is `{}`'s", execution.epoch.next(), execution.to)),
        Stage::Promote => promote(control, execution, to).await,
        Stage::Attach => attach(control, execution).await,
        Stage::Release => {
            let state = match execution.kind {
                Kind::Switchover | Kind::Unfence | Kind::Failover | Kind::Rejoin => {
                    CellState::Active
                }
                Kind::Fence => CellState::Fenced,
                Kind::FenceAll => CellState::Passive,
            };
            release(control, execution, &execution.to, state).await
        }
        Stage::Rejoin => {
            let retire = Order::Retire { app: execution.app.clone() };
            reported(control.order(retire).await)?;
            // Done late, it is another by now that is followed.
            let application = control.application(&execution.app).map_err(chain)?;
            let active = application.active().filter(|active| *active != execution.from);
            let active = active.ok_or("no other cell is active")?.to_owned();
            let to = server(&active)?;
            if rejoining::is_done(from, to).await {
                return Ok("streams as a standby already".into());
            }
            // A standby takes logins: nobody is to come who takes it for what it was.
            let late = control.outwait_late(&execution.app).await.map_err(chain)?;
            if !late.is_empty() {
                tracing::warn!(app = execution.app, ?late, "proxies were waited for");
            }
            let is_planned = !matches!(execution.kind, Kind::Failover | Kind::Rejoin);
            if is_planned {
                following::turn(control, servers, &execution.app, &active).await;
            }
            let kept = match rejoining::has_begun(from).await {
                // What became of it since, nobody knows, so what is left of the directory is kept.
                true => Err("an earlier try was broken off".to_owned()),
                false if is_planned => Ok("nothing was lost".to_owned()),
                false if execution.lost.is_some() => {
                    Ok("what was lost was looked at before".to_owned())
                }
                false if execution.is_kept_whole => Ok("it was kept as a whole before".to_owned()),
                false => failing_over::keep_tail(control, execution, (from, to)).await,
            };
            let began = Instant::now();
            let tail = failing_over::tail_of(execution).filter(|_| kept.is_ok());
            let (how, rows) = rejoin((&execution.from, from), to, (kept.is_ok(), tail)).await?;
            let of_rows = match rows {
                Some(Ok(ref rows)) => Some(rows.says()),
                Some(Err(ref why)) => Some(format!("its rows cannot be read: {why}")),
                None => None,
            };
            if let (Some(lost), Some(Ok(rows))) = (&mut execution.lost, rows) {
                lost.rows = Some(rows);
                control.save(execution).map_err(chain)?;
            }
            if kept.is_err() {
                // Done again, it would keep the copy as well.
                execution.is_kept_whole = true;
                control.save(execution).map_err(chain)?;
            }
            let rejoined = rejoining::wait_streaming((from, to), &how, began).await?;
            Ok(match kept {
                Ok(_) if is_planned => rejoined,
                Ok(kept) => match of_rows {
                    Some(rows) => format!("{rejoined}; {kept}; {rows}"),
                    None => format!("{rejoined}; {kept}"),
                },
                Err(why) => format!("{rejoined}; what was lost is not known: {why}"),
            })
        }
        Stage::Revert if execution.kind == Kind::Failover => {
            failing_over::revert(control, execution, (from, to)).await
        }
        Stage::Assess => failing_over::assess(control, execution, servers, (from, to)).await,
        Stage::Cut => failing_over::cut(control, execution).await,
        Stage::Isolate => failing_over::isolate(control, execution, (from, to)).await,
        Stage::Recruit => failing_over::recruit(control, execution, servers, (from, to)).await,
        Stage::Revert if is_fenced(control, execution)? => {
            let covered = cover(control, execution, from).await;
            let released = release(control, execution, &execution.from, CellState::Fenced).await?;
            covered?;
            Ok(released)
        }
        Stage::Revert => revert(control, execution, from).await,
        // The record of its begin has made the cell what it is now.
        Stage::Confine => {
            Ok(format!("`{}` takes no writes, in epoch {}", execution.from, execution.epoch))
        }
        Stage::Regrant => regrant(control, execution, to).await,
    }
}

fn chain(error: impl std::error::Error) -> String {
    model::chain(&error)
}

pub(crate) async fn admin(server: &CellServer) -> Result<Admin, String> {
    Admin::connect(&server.target, &server.admin).await.map_err(chain)
}

/// For questions while clients are held, which a server answers at once.
async fn admin_at_once(server: &CellServer) -> Result<Admin, String> {
    let login = Admin::connect(&server.target, &server.admin);
    let late = |_| format!("`{}` takes no login within {HELD_WAIT:?}", server.target.address);
    let mut admin = timeout(HELD_WAIT, login).await.map_err(late)?.map_err(chain)?;
    admin.wait = HELD_WAIT;
    Ok(admin)
}

/// Whether what must be done, and may be done twice, is tried once more after a pause: there is no way back from here.
async fn again(deadline: Instant, failure: &str) -> bool {
    let goes_on = Instant::now() + RETRY_PAUSE < deadline;
    if goes_on {
        tracing::warn!(failure, "trying again");
        tokio::time::sleep(RETRY_PAUSE).await;
    }
    goes_on
}

/// What would be done, for `--dry-run`.
pub(crate) fn describe(
    servers: &AppServers,
    from: &str,
    request: &SwitchoverRequest,
) -> Vec<String> {
    let to = &request.to;
    let address = |cell: &str| {
        servers.cells.get(cell).map(|server| server.target.address.to_string()).unwrap_or_default()
    };
    let (from_at, to_at) = (address(from), address(to));
    let leftover = match request.on_timeout {
        OnTimeout::Abort => "give up if one is left",
        OnTimeout::Force => "end those that are left with an error",
    };
    let managed = servers.cells.get(from).is_some_and(|server| server.member.is_some());
    vec![
        format!(
            "prepare: check {from_at} and {to_at}, checkpoint both, attach a copy of every session to {to_at}"
        ),
        format!(
            "hold: hold new work, let transactions end for {} ms, {leftover}",
            request.deadline_ms
        ),
        "capture: read the state of every session".into(),
        format!(
            "fence: {from_at} becomes read-only, admits only Holdfast, and ends other connections"
        ),
        format!("catch_up: wait until {to_at} has all that {from_at} wrote"),
        format!("grant: `{to}` is given the next epoch; the point of no return"),
        format!("promote: {to_at} becomes a primary"),
        format!("attach: every session is attached to {to_at} and compared"),
        "release: held work goes on".into(),
        if managed {
            format!(
                "rejoin: {from_at} is stopped, rewound if need be, and started as a standby of {to_at}"
            )
        } else {
            format!(
                "rejoin: {from_at} has no data_dir in the configuration, so it stays fenced for you to rejoin"
            )
        },
    ]
}

/// Both servers must be what the state says they are, of one system, and close together.
pub(crate) async fn check_servers(
    servers: &AppServers,
    from: &str,
    to: &str,
) -> Result<(Admin, Admin, u64), String> {
    let server = |name: &str| {
        servers.cells.get(name).ok_or_else(|| format!("cell `{name}` is not configured"))
    };
    let (mut old, mut new) = (admin(server(from)?).await?, admin(server(to)?).await?);
    let (a, b) = (old.status().await.map_err(chain)?, new.status().await.map_err(chain)?);
    if a.in_recovery {
        return Err(format!("cell `{from}` is active by its state, but its server is in recovery"));
    }
    if !b.in_recovery {
        return Err(format!("cell `{to}` is passive by its state, but its server is a primary"));
    }
    if a.system_identifier != b.system_identifier {
        let (a, b) = (a.system_identifier, b.system_identifier);
        return Err(format!(
            "`{to}` is not a copy of `{from}`: system identifiers are {b} and {a}"
        ));
    }
    if !b.streaming {
        return Err(format!("`{to}` does not stream from `{from}`"));
    }
    check_subscribes_to_nothing(&mut old, from).await?;
    if server(from)?.member.is_some() {
        hba_rules(&mut old).await.map_err(|error| format!("`{from}` cannot be fenced: {error}"))?;
    }
    let lag = a.lsn.bytes_since(b.lsn);
    if lag > LAG_BYTES_MAX {
        return Err(format!(
            "`{to}` is {lag} bytes behind `{from}`, at most {LAG_BYTES_MAX} are waited for"
        ));
    }
    Ok((old, new, lag))
}

/// Settings that sessions find otherwise on the two servers, because their own files say so.
pub(crate) async fn differences(old: &mut Admin, new: &mut Admin) -> Result<Vec<String>, String> {
    let [question, ..] = facts::QUESTIONS;
    let here = Facts::of_settings(&old.rows(question).await.map_err(chain)?).map_err(chain)?;
    let there = Facts::of_settings(&new.rows(question).await.map_err(chain)?).map_err(chain)?;
    Ok(here.configured_otherwise(&there))
}

pub(crate) fn describe_blockers(blockers: &[Blocker]) -> String {
    const SHOWN: usize = 3;
    let one = |blocker: &Blocker| {
        let reasons: Vec<String> = blocker.reasons.iter().map(ToString::to_string).collect();
        format!("session {} ({}): {}", blocker.session.id, blocker.session.user, reasons.join("; "))
    };
    let mut text = blockers.iter().take(SHOWN).map(one).collect::<Vec<_>>().join(", ");
    if blockers.len() > SHOWN {
        text.push_str(&format!(", and {} more", blockers.len() - SHOWN));
    }
    text
}

fn reported(report: Report) -> Result<Report, String> {
    match report.error.clone() {
        Some(error) => Err(error),
        None => Ok(report),
    }
}

async fn prepare(control: &Control, execution: &Execution, servers: &AppServers) -> Done {
    let (mut old, mut new, lag) = check_servers(servers, &execution.from, &execution.to).await?;
    let otherwise = differences(&mut old, &mut new).await?;
    if let Some(from) = servers.cells.get(&execution.from)
        && is_fenced(control, execution)?
    {
        check_closes(&execution.from, from)?;
    }
    // Clients are not held for somebody who is not there.
    for cell in [&execution.from, &execution.to] {
        if let Some(member) = servers.cells.get(cell).and_then(|server| server.member.as_ref()) {
            member.must_be_heard().await?;
            if member.is_out_of_hand() {
                return Err(format!(
                    "the agent of `{cell}` cannot see or end its server, and would get no lease: its log says why"
                ));
            }
        }
    }
    // What is written out now need not be during the pause, nor when the old server is rewound.
    old.rows("CHECKPOINT").await.map_err(chain)?;
    new.rows("CHECKPOINT").await.map_err(chain)?;
    let app = execution.app.clone();
    let order = match is_fenced(control, execution)? {
        // What the fence says of sessions would become their own.
        true => Order::Inspect { app },
        false => Order::Prepare { app, to: execution.to.clone() },
    };
    let report = reported(control.order(order).await)?;
    taken_part(&report, execution.on_timeout)?;
    let pinned: Vec<Blocker> = report.blockers.iter().filter(|b| is_pinned(b)).cloned().collect();
    if execution.on_timeout == OnTimeout::Abort && !pinned.is_empty() {
        return Err(format!(
            "{} sessions are pinned: {}",
            pinned.len(),
            describe_blockers(&pinned)
        ));
    }
    let (sessions, done) = (report.sessions, report.done);
    let mut text = format!("lag {lag} bytes; {done} of {sessions} sessions prepared");
    if !otherwise.is_empty() {
        let otherwise = otherwise.join(", ");
        text.push_str(&format!("; configured otherwise: {otherwise}, sessions keep theirs"));
    }
    if done < sessions {
        // They are read and attached during the pause, which makes it longer.
        text.push_str(&format!(", not {}", describe_blockers(&report.blockers)));
    }
    Ok(text)
}

/// A planned change that is not to end anybody goes by itself only if every proxy takes part.
fn taken_part(report: &Report, on_timeout: OnTimeout) -> Result<(), String> {
    if report.missing.is_empty() {
        return Ok(());
    }
    let missing = report.missing.join(", ");
    tracing::warn!(missing, "a proxy does not take part");
    match on_timeout {
        OnTimeout::Force => Ok(()),
        OnTimeout::Abort => Err(format!(
            "not every proxy takes part: {missing}; `--on-timeout force` goes on without"
        )),
    }
}

fn is_pinned(blocker: &Blocker) -> bool {
    // A busy session may be free by the time it is held; nothing else gets better by waiting.
    blocker.reasons.iter().any(|reason| !matches!(reason, model::barrier::Reason::Busy { .. }))
}

async fn hold(control: &Control, execution: &Execution) -> Done {
    let Execution { deadline_ms, on_timeout, .. } = *execution;
    let order = Order::Hold { app: execution.app.clone(), deadline_ms, on_timeout };
    let report = reported(control.order(order).await)?;
    taken_part(&report, on_timeout)?;
    if execution.on_timeout == OnTimeout::Abort && report.done < report.sessions {
        let busy = report.sessions - report.done;
        let shown = describe_blockers(&report.blockers);
        return Err(format!(
            "{busy} sessions did not come to a safe point in {} ms: {shown}",
            execution.deadline_ms
        ));
    }
    Ok(format!("{} of {} sessions held, {} ended", report.done, report.sessions, report.told))
}

async fn capture(control: &Control, execution: &Execution) -> Done {
    let order = Order::Capture {
        app: execution.app.clone(),
        to: execution.to.clone(),
        on_timeout: execution.on_timeout,
    };
    let report = reported(control.order(order).await)?;
    taken_part(&report, execution.on_timeout)?;
    if execution.on_timeout == OnTimeout::Abort && !report.blockers.is_empty() {
        let shown = describe_blockers(&report.blockers);
        return Err(format!("{} sessions cannot be moved: {shown}", report.blockers.len()));
    }
    Ok(format!("{} of {} sessions read, {} ended", report.done, report.sessions, report.told))
}

async fn catch_up(execution: &Execution, to: &CellServer) -> Done {
    let lsn = execution.lsn.ok_or("the fence has given no position")?;
    let mut new = admin_at_once(to).await?;
    let deadline = Instant::now() + CATCH_UP_MAX;
    loop {
        let replayed = new.replayed_lsn().await.map_err(chain)?;
        if replayed >= lsn {
            return Ok(format!("replayed {replayed}"));
        }
        if Instant::now() > deadline {
            return Err(format!(
                "the target has replayed {replayed}, not {lsn}, after {CATCH_UP_MAX:?}"
            ));
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn promote(control: &Control, execution: &mut Execution, to: &CellServer) -> Done {
    // While the target is promoted, which is mostly waiting. Who loses its server by it is told, before the grant
    // or after.
    reported(control.order(Order::HearOut { app: execution.app.clone() }).await)?;
    let epoch = control.application(&execution.app).map_err(chain)?.epoch;
    let deadline = Instant::now() + PROMOTE_MAX;
    if let Some(member) = &to.member {
        while let Err(failure) = member.hold_lease(epoch).await {
            if !again(deadline, &failure).await {
                return Err(failure);
            }
        }
    }
    loop {
        match promote_server(control, execution, to, deadline).await {
            Err(failure) if again(deadline, &failure).await => start_target(to).await,
            done => return done,
        }
    }
}

/// The target's server may have been ended by its guard, promoted or not, while its agent did not reach control. As a standby
/// it can be promoted from either; as a primary it might be one of the old timeline.
async fn start_target(to: &CellServer) {
    let Some(member) = &to.member else { return };
    if matches!(member.process().await, Some(Process::Crashed | Process::ShutDown))
        && let Err(failure) = member.start_standby().await
    {
        tracing::warn!(failure, "the target does not start");
    }
}

async fn promote_server(
    control: &Control,
    execution: &mut Execution,
    to: &CellServer,
    deadline: Instant,
) -> Done {
    let mut new = admin_at_once(to).await?;
    let servers = control.servers(&execution.app).map_err(chain)?;
    before_promotion(servers.now().durability, servers, &execution.to, &mut new).await?;
    if new.value("SELECT pg_is_in_recovery()").await.map_err(chain)?.as_deref() == Some("t") {
        // The target of a switchover has followed to the last; its log is not listed while clients wait.
        if execution.kind == Kind::Failover {
            let highest = control.application(&execution.app).map_err(chain)?.timeline;
            failing_over::pass_over_timelines(&mut new, highest).await?;
        }
        new.value("SELECT pg_promote(false)").await.map_err(chain)?;
        while new.value("SELECT pg_is_in_recovery()").await.map_err(chain)?.as_deref() != Some("f")
        {
            if Instant::now() > deadline {
                return Err(format!("the server is still in recovery after {PROMOTE_MAX:?}"));
            }
            tokio::time::sleep(POLL).await;
        }
    }
    // It is a primary whether or not that can be read.
    let history = following::history(&mut new).await;
    execution.timeline = history.ok().map(|history| history.timeline);
    Ok(match execution.timeline {
        Some(timeline) => format!("primary, on timeline {timeline}"),
        None => "primary".to_owned(),
    })
}

async fn attach(control: &Control, execution: &Execution) -> Done {
    let (app, to) = (execution.app.clone(), execution.to.clone());
    let first = reported(control.order(Order::AttachFirst { app, to }).await)?;
    let order = Order::Attach { app: execution.app.clone(), to: execution.to.clone() };
    let report = reported(control.order(order).await)?;
    let (ended, blockers) = (first.told + report.told, [first.blockers, report.blockers].concat());
    let mut text = format!("{} of {} sessions moved", report.done, report.sessions + first.told);
    if !blockers.is_empty() {
        text.push_str(&format!(", {ended} ended: {}", describe_blockers(&blockers)));
    }
    let missing = [first.missing, report.missing].concat();
    if !missing.is_empty() {
        text.push_str(&format!("; not those of {}", missing.join(", ")));
    }
    Ok(text)
}

async fn release(control: &Control, execution: &Execution, to: &str, state: CellState) -> Done {
    let epoch = control.application(&execution.app).map_err(chain)?.epoch;
    let order = Order::Release { app: execution.app.clone(), to: to.to_owned(), state, epoch };
    let report = reported(control.order(order).await)?;
    Ok(match report.pauses {
        Some(pauses) => format!("{} sessions go on; held {pauses}", report.done),
        None => format!("{} sessions go on", report.done),
    })
}

/// The cell was fenced before this switchover, or failover, and is fenced until the grant.
fn is_fenced(control: &Control, execution: &Execution) -> Result<bool, String> {
    let application = control.application(&execution.app).map_err(chain)?;
    let is_before = !application.is_past(execution);
    Ok(is_before && application.state(&execution.from).map_err(chain)? == CellState::Fenced)
}

/// Takes the fence back. Also right when there was none.
async fn revert(control: &Control, execution: &Execution, from: &CellServer) -> Done {
    let unfenced = unfence_in_time(from).await;
    // Clients go on also where the server could not be asked: it may not have been fenced at all.
    let released = release(control, execution, &execution.from, CellState::Active).await?;
    unfenced?;
    Ok(released)
}
