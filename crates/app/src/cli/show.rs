//! What the verbs print: tables for people, JSON for scripts.

use std::process::ExitCode;
use std::time::Duration;

use control::requests::DryRun;
use control::safety::Safety;
use control::{FailoverRequest, FenceRequest, MoveRequest, SwitchoverRequest};
use model::audit::Record;
use model::barrier::{Blocker, Report, SessionView};
use model::persisted::{Execution, LogEvent};
use model::plan::run::{PlanEnding, PlanExecution};
use model::switchover::{Ending, Kind};
use serde::Serialize;

use super::plans::{Found, Which};
use super::{Global, client, plans, report};
use crate::api::{AlarmStatus, Audit, Needed, ProxyStatus, Status};
use crate::loaded::{Changes, Takes};

pub(super) type Done = Result<ExitCode, String>;

pub(super) fn json(value: &impl Serialize) -> Result<(), String> {
    let text = serde_json::to_string_pretty(value).map_err(|error| error.to_string())?;
    say!("{text}");
    Ok(())
}

/// Prints rows in columns as wide as they need to be.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>]) {
    let width = |at: usize| {
        let cells = rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count());
        cells.chain(header.get(at).map(|name| name.len())).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let print = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        say!("{}", padded.collect::<Vec<_>>().join("  ").trim_end());
    };
    print(header.to_vec());
    for row in rows {
        print(row.iter().map(String::as_str).collect());
    }
}

pub(super) fn status(global: &Global, app: Option<&str>) -> Done {
    let mut status: Status = client::get(global, "/v1/status")?;
    if let Some(app) = app {
        status.apps.retain(|found| found.name == app);
        if status.apps.is_empty() {
            return Err(format!("there is no application `{app}`"));
        }
    }
    if global.json {
        json(&status)?;
        return Ok(ExitCode::SUCCESS);
    }
    for (at, app) in status.apps.iter().enumerate() {
        if at > 0 {
            say!();
        }
        let active = app.active.as_deref().unwrap_or("none");
        say!("{}: active cell {active}, epoch {}, {} sessions", app.name, app.epoch, app.sessions);
        let has_regions = app.cells.iter().any(|cell| cell.region.is_some());
        let mut rows: Vec<Vec<String>> = app
            .cells
            .iter()
            .map(|cell| {
                let lag = cell.lag_bytes.map_or("-".into(), |bytes| format!("{bytes} B"));
                let lsn = cell.lsn.clone().unwrap_or_else(|| "-".into());
                let streaming = if cell.streaming { "yes" } else { "-" };
                vec![
                    cell.name.clone(),
                    cell.region.clone().unwrap_or_else(|| "-".into()),
                    cell.state.to_string(),
                    cell.server.clone(),
                    cell.role.clone(),
                    lsn,
                    lag,
                    streaming.into(),
                ]
            })
            .collect();
        let mut head = vec!["cell", "region", "state", "server", "role", "lsn", "lag", "streams"];
        if !has_regions {
            head.remove(1);
            rows.iter_mut().for_each(|row| drop(row.remove(1)));
        }
        table(&head, &rows);
        for Needed { app, active, region } in &app.needs {
            let cell = active.as_deref().unwrap_or("none");
            let at = region.as_ref().map_or(String::new(), |region| format!(", in {region}"));
            say!("needs {app}: active cell {cell}{at}");
        }
        if app.proxies.len() > 1 {
            let own = |name: &str| if name.is_empty() { "(own)".into() } else { name.to_owned() };
            let row = |p: &ProxyStatus| vec![own(&p.name), p.state.clone(), p.sessions.to_string()];
            let rows: Vec<Vec<String>> = app.proxies.iter().map(row).collect();
            table(&["proxy", "state", "sessions"], &rows);
        }
        if !app.alarms.is_empty() {
            let row = |one: &AlarmStatus| {
                vec![
                    one.name.clone(),
                    one.colour.clone(),
                    format!("{} s", one.held_s),
                    one.said.clone(),
                ]
            };
            let rows: Vec<Vec<String>> = app.alarms.iter().map(row).collect();
            table(&["alarm", "colour", "for", "said"], &rows);
        }
        for problem in &app.problems {
            say!("! {problem}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn print_blockers(blockers: &[Blocker]) {
    let rows: Vec<Vec<String>> = blockers
        .iter()
        .map(|blocker| {
            let session = &blocker.session;
            let reasons: Vec<String> = blocker.reasons.iter().map(ToString::to_string).collect();
            let name = session.application_name.clone();
            vec![
                session.id.to_string(),
                session.user.clone(),
                session.database.clone(),
                name,
                reasons.join("; "),
            ]
        })
        .collect();
    table(&["session", "user", "database", "application", "reason"], &rows);
}

pub(super) fn sessions(global: &Global, app: &str, pinned: bool) -> Done {
    if pinned {
        let report: Report =
            client::get(global, &format!("/v1/applications/{app}/sessions?pinned"))?;
        if global.json {
            json(&report)?;
            return Ok(ExitCode::SUCCESS);
        }
        say!("{} of {} sessions could be moved now", report.done, report.sessions);
        if !report.blockers.is_empty() {
            print_blockers(&report.blockers);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let sessions: Vec<SessionView> =
        client::get(global, &format!("/v1/applications/{app}/sessions"))?;
    if global.json {
        json(&sessions)?;
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<Vec<String>> = sessions
        .into_iter()
        .map(|v| {
            vec![
                v.id.to_string(),
                v.user,
                v.database,
                v.application_name,
                v.client,
                v.cell,
                v.backend_pid.to_string(),
                v.state,
                format!("{} s", v.idle_s),
                v.moves.to_string(),
                v.pins.join("; "),
                v.pool,
            ]
        })
        .collect();
    let header = [
        "session",
        "user",
        "database",
        "application",
        "client",
        "cell",
        "pid",
        "state",
        "idle",
        "moves",
        "pins",
        "pool",
    ];
    table(&header, &rows);
    Ok(ExitCode::SUCCESS)
}

pub(super) fn switchover(global: &Global, app: &str, request: &SwitchoverRequest) -> Done {
    let path = format!("/v1/applications/{app}/switchover");
    if request.dry_run {
        let dry: DryRun = client::post(global, &path, request)?;
        return dry_run(global, "switchover", &dry);
    }
    let execution: Execution = client::change(global, &path, request)?;
    ended(global, &execution)
}

pub(super) fn failover(global: &Global, app: &str, request: &FailoverRequest) -> Done {
    let path = format!("/v1/applications/{app}/failover");
    if request.dry_run {
        let dry: DryRun = client::post(global, &path, request)?;
        return dry_run(global, "failover", &dry);
    }
    let execution: Execution = client::change(global, &path, request)?;
    ended(global, &execution)
}

fn dry_run(global: &Global, what: &str, dry: &DryRun) -> Done {
    let refused = !dry.refusals.is_empty();
    if global.json {
        json(dry)?;
    } else {
        say!("{what} of {} from {} to {} would:", dry.app, dry.from, dry.to);
        dry.steps.iter().for_each(|step| say!("  {step}"));
        if what == "switchover" {
            say!("{} of {} sessions could be moved now", dry.movable, dry.sessions);
        }
        if !dry.blockers.is_empty() {
            print_blockers(&dry.blockers);
        }
        dry.configured_otherwise.iter().for_each(|setting| {
            say!("- the servers' configurations differ, sessions keep what they have: {setting}");
        });
        dry.refusals.iter().for_each(|reason| say!("! it would be refused: {reason}"));
    }
    Ok(if refused { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

pub(super) fn fence(global: &Global, app: &str, cell: &str, request: &FenceRequest) -> Done {
    let path = format!("/v1/applications/{app}/cells/{cell}/fence");
    let execution: Execution = client::change(global, &path, request)?;
    ended(global, &execution)
}

pub(super) fn unfence(global: &Global, app: &str, cell: &str) -> Done {
    let path = format!("/v1/applications/{app}/cells/{cell}/unfence");
    let execution: Execution = client::change(global, &path, &serde_json::json!({}))?;
    ended(global, &execution)
}

pub(super) fn retry(global: &Global, which: &Which, step: Option<String>) -> Done {
    let id = which.id;
    let found = match plans::find_any(global, id, which.app.as_deref())? {
        Found::Cells(found) => found,
        Found::Plan(plan) => return plans::say_to(global, &plan, "retry", step, None),
    };
    if let Some(step) = step {
        return Err(format!("{}: it has no step `{step}`, it is retried as a whole", found.says()));
    }
    let path = format!("/v1/applications/{}/executions/{id}/retry", found.app);
    let execution: Execution = client::post(global, &path, &serde_json::json!({}))?;
    ended(global, &execution)
}

fn ended(global: &Global, execution: &Execution) -> Done {
    if global.json {
        json(execution)?;
    } else {
        print_execution(execution);
    }
    let fine = matches!(execution.ending, Some(Ending::Completed | Ending::CompletedWithoutRejoin));
    Ok(if fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(super) fn ending(execution: &Execution) -> &'static str {
    execution.ending.map_or("under way", Ending::name)
}

pub(crate) fn print_execution(execution: &Execution) {
    let (id, app, from, to) = (execution.id, &execution.app, &execution.from, &execution.to);
    let ending = ending(execution);
    match execution.kind {
        kind @ (Kind::Switchover | Kind::Failover | Kind::Rejoin) => {
            let kind = kind.name();
            say!("execution {id}: {kind} of {app} from {from} to {to}: {ending}");
        }
        kind => say!("execution {id}: {} of {app}, cell {to}: {ending}", kind.name()),
    }
    if let Some(reason) = &execution.reason {
        say!("reason: {reason}");
    }
    table(&["stage", "", "took", ""], &stage_rows(execution));
    for (what, text) in report::costs(execution) {
        say!("{what}: {text}");
    }
    if let Some(Ending::Stuck | Ending::CompletedWithoutRejoin) = execution.ending {
        say!("next: holdfast retry {id}");
    }
}

/// A stage is shown when it has ended; the last one also while it runs.
pub(super) fn stage_rows(execution: &Execution) -> Vec<Vec<String>> {
    let last = execution.log.len().saturating_sub(1);
    let shown = |at: usize, event| event != LogEvent::Started || at == last;
    execution
        .log
        .iter()
        .enumerate()
        .filter(|(at, entry)| shown(*at, entry.event))
        .map(|(_, entry)| entry)
        .map(|entry| {
            let took = entry.took_ms.map_or(String::new(), |ms| format!("{ms:.1} ms"));
            let event = match entry.event {
                LogEvent::Started => "runs",
                LogEvent::Done => "done",
                LogEvent::Failed => "failed",
            };
            vec![entry.stage.to_string(), event.into(), took, entry.text.clone()]
        })
        .collect()
}

pub(super) fn safety(global: &Global, app: &str) -> Done {
    print_safety(global, &client::get(global, &format!("/v1/applications/{app}/safety"))?)
}

pub(super) fn gate(global: &Global, app: &str, gate: &str, open: bool) -> Done {
    let path = format!("/v1/applications/{app}/gates/{gate}");
    print_safety(global, &client::post(global, &path, &crate::api::safety::Gate { open })?)
}

fn print_safety(global: &Global, safety: &Safety) -> Done {
    if global.json {
        json(safety)?;
        return Ok(ExitCode::SUCCESS);
    }
    if safety.rules.is_empty() {
        say!("there are no safety rules; [[app.safety]] in the configuration makes one");
        return Ok(ExitCode::SUCCESS);
    }
    let rows: Vec<Vec<String>> = safety
        .rules
        .iter()
        .map(|rule| {
            let kinds = rule.kinds.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ");
            vec![rule.name.clone(), rule.require.to_string(), kinds]
        })
        .collect();
    table(&["rule", "requires", "for"], &rows);
    if !safety.gates.is_empty() {
        let state = |open| if open { "open" } else { "closed" };
        let rows = safety.gates.iter().map(|(gate, open)| vec![gate.clone(), state(*open).into()]);
        table(&["gate", ""], &rows.collect::<Vec<_>>());
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn diff(global: &Global) -> Done {
    print_changes(global, &client::get(global, "/v1/configuration/diff")?)
}

pub(super) fn apply(global: &Global) -> Done {
    print_changes(global, &client::post(global, "/v1/configuration/apply", &serde_json::json!({}))?)
}

fn print_changes(global: &Global, found: &Changes) -> Done {
    if global.json {
        json(found)?;
        return Ok(ExitCode::SUCCESS);
    }
    if found.is_empty() {
        say!("configuration {} runs, nothing is different", found.version);
        return Ok(ExitCode::SUCCESS);
    }
    let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
    let rows: Vec<Vec<String>> = found
        .changes
        .iter()
        .map(|change| {
            let takes = match change.takes {
                Takes::Now => "at once",
                Takes::Later => "not yet",
                Takes::Restart => "at a restart",
                Takes::Elsewhere => "in the files of proxies",
            };
            vec![change.setting.clone(), value(&change.from), value(&change.to), takes.into()]
        })
        .collect();
    if !rows.is_empty() {
        table(&["setting", "from", "to", "taken up"], &rows);
    }
    for line in &found.notes {
        say!("{line}");
    }
    if let Some(node) = &found.node {
        say!("! this is node `{node}`: each of the others takes up its own file at a SIGHUP");
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn audit(global: &Global) -> Done {
    let audit: Audit = client::get(global, "/v1/audit")?;
    let code = if audit.broken.is_some() { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    if global.json {
        json(&audit)?;
        return Ok(code);
    }
    let rows: Vec<Vec<String>> = audit
        .records
        .iter()
        .map(|record| {
            let Record { number, at_ms, by, did, app, epoch, reason, text, .. } = record;
            let reason = reason.clone().unwrap_or_default();
            let (number, epoch) = (number.to_string(), epoch.to_string());
            vec![
                number,
                utc(*at_ms),
                by.clone(),
                did.clone(),
                app.clone(),
                epoch,
                text.clone(),
                reason,
            ]
        })
        .collect();
    table(&["", "at", "by", "did", "app", "epoch", "what", "why"], &rows);
    match (&audit.broken, audit.verified) {
        (Some(broken), _) => say!("! the audit is not what it was: {broken}"),
        (None, count) => say!("{} records, each as it was written", count.unwrap_or(0)),
    }
    Ok(code)
}

fn utc(at_ms: u64) -> String {
    let at = std::time::UNIX_EPOCH.checked_add(Duration::from_millis(at_ms));
    at.map_or(String::new(), |at| humantime::format_rfc3339_seconds(at).to_string())
}

pub(super) fn move_sessions(global: &Global, app: &str, request: &MoveRequest) -> Done {
    let report: Report = client::post(global, &format!("/v1/applications/{app}/move"), request)?;
    if let Some(error) = report.error {
        return Err(error);
    }
    let code = if report.done == report.sessions { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if global.json {
        json(&report)?;
        return Ok(code);
    }
    let held = report.pauses.map_or(String::new(), |pauses| format!("; held {pauses}"));
    say!("{} of {} sessions moved to `{}`{held}", report.done, report.sessions, request.to);
    if !report.blockers.is_empty() {
        print_blockers(&report.blockers);
    }
    Ok(code)
}

pub(super) fn executions(
    global: &Global,
    id: Option<u64>,
    app: Option<&str>,
    is_report: bool,
) -> Done {
    if let Some(id) = id {
        match (plans::find_any(global, id, app)?, global.json) {
            (Found::Cells(found), true) => json(&[found])?,
            (Found::Plan(found), true) => json(&[found])?,
            (Found::Cells(found), false) if is_report => say!("{}", report::of_cells(&found)),
            (Found::Plan(found), false) if is_report => say!("{}", report::of_plan(&found)),
            (Found::Cells(found), false) => print_execution(&found),
            (Found::Plan(found), false) => plans::print(&found),
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut cells: Vec<Execution> = client::get(global, "/v1/executions")?;
    let mut plans: Vec<PlanExecution> = client::get(global, "/v1/plan-executions")?;
    if let Some(app) = app {
        cells.retain(|one| one.app == app);
        plans.retain(|one| one.app == app);
    }
    if global.json {
        let value = |error: serde_json::Error| error.to_string();
        let mut all = Vec::new();
        for one in &cells {
            all.push(serde_json::to_value(one).map_err(value)?);
        }
        for one in &plans {
            all.push(serde_json::to_value(one).map_err(value)?);
        }
        json(&all)?;
        return Ok(ExitCode::SUCCESS);
    }
    let of_cells = cells.iter().map(|one| {
        let what = format!("{}: {} to {}", one.kind.name(), one.from, one.to);
        let what = if one.from == one.to { one.kind.name().to_owned() } else { what };
        (one.started_at_ms, one.id, &one.app, what, ending(one), &one.reason)
    });
    let of_plans = plans.iter().map(|one| {
        let ending = one.ending.map_or("under way", PlanEnding::name);
        let what = format!("plan {}", one.plan.name);
        (one.started_at_ms, one.id, &one.app, what, ending, &one.reason)
    });
    let mut all: Vec<_> = of_cells.chain(of_plans).collect();
    all.sort_by_key(|(at_ms, id, ..)| std::cmp::Reverse((*at_ms, *id)));
    let rows: Vec<Vec<String>> = all
        .into_iter()
        .map(|(_, id, app, what, ending, reason)| {
            let reason = reason.clone().unwrap_or_default();
            vec![id.to_string(), app.clone(), what, ending.into(), reason]
        })
        .collect();
    table(&["id", "app", "what", "ended", "reason"], &rows);
    Ok(ExitCode::SUCCESS)
}
