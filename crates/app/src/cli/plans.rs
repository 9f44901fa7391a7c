//! Plans on the command line: an execution is followed until it ends, or needs a person.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use control::plans::{PlanDryRun, PlanRequest};
use model::objectives::Verdict;
use model::persisted::Execution;
use model::plan::run::{DRILL_OVER, PlanEnding, PlanExecution, StepState};
use model::plan::{Mode, Plan, SEPARATOR, What};

use super::show::{Done, json, table};
use super::{Global, client};
use crate::api::plans::Said;

/// Between two looks at one that is followed.
const LOOK: Duration = Duration::from_millis(200);

pub(super) fn list(global: &Global, app: &str) -> Done {
    let plans: Vec<Plan> = client::get(global, &format!("/v1/applications/{app}/plans"))?;
    if global.json {
        json(&plans)?;
        return Ok(ExitCode::SUCCESS);
    }
    if plans.is_empty() {
        say!("application `{app}` has no plans; [[app.plan]] in its configuration makes one");
    }
    for plan in &plans {
        let objective =
            plan.objective_ms.map_or(String::new(), |ms| format!(", within {}", took(ms)));
        say!("{}{objective}:", plan.name);
        let rows: Vec<Vec<String>> = plan
            .all_steps()
            .iter()
            .map(|step| vec![indented(&step.name), step.says(), conditions(step)])
            .collect();
        table(&["step", "does", "only if"], &rows);
    }
    Ok(ExitCode::SUCCESS)
}

/// Its last part, as far in as it is deep.
fn indented(name: &str) -> String {
    let depth = name.matches(SEPARATOR).count();
    let last = name.rsplit(SEPARATOR).next().unwrap_or(name);
    format!("{:depth$}{last}", "", depth = depth * 2)
}

fn conditions(step: &model::plan::Step) -> String {
    let mut all = Vec::new();
    if let Some(mode) = step.mode {
        all.push(mode.name().to_owned());
    }
    for condition in &step.only_if {
        let states = condition.states.iter().map(ToString::to_string).collect::<Vec<_>>();
        all.push(format!("{} {}", condition.cell, states.join(" or ")));
    }
    all.join(", ")
}

pub(super) fn took(ms: u64) -> String {
    humantime::format_duration(Duration::from_millis(ms)).to_string()
}

pub(super) fn execute(
    global: &Global,
    app: &str,
    plan: &str,
    request: &PlanRequest,
    detach: bool,
) -> Done {
    let path = format!("/v1/applications/{app}/plans/{plan}/execute");
    if request.dry_run {
        let dry: PlanDryRun = client::post(global, &path, request)?;
        return dry_run(global, &dry);
    }
    let execution: PlanExecution = client::change(global, &path, request)?;
    if detach {
        if global.json {
            json(&execution)?;
        } else {
            say!("{} has begun: holdfast executions {}", execution.says(), execution.id);
        }
        return Ok(ExitCode::SUCCESS);
    }
    follow(global, execution)
}

fn dry_run(global: &Global, dry: &PlanDryRun) -> Done {
    if global.json {
        json(dry)?;
    } else {
        say!("plan {} of {} would:", dry.plan, dry.app);
        let rows: Vec<Vec<String>> = dry
            .steps
            .iter()
            .map(|line| vec![format!("  {}", line.step), line.text.clone()])
            .collect();
        table(&["", ""], &rows);
        dry.refusals.iter().for_each(|reason| say!("! {reason}"));
    }
    Ok(if dry.refusals.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints each step as it changes, until nothing changes by itself any more.
fn follow(global: &Global, mut execution: PlanExecution) -> Done {
    let id = execution.id;
    if !global.json {
        say!("{}", execution.says());
    }
    let mut shown: BTreeMap<String, (StepState, u32)> = BTreeMap::new();
    loop {
        if !global.json {
            for step in execution.plan.all_steps() {
                let progress = execution.progress(&step.name);
                let now = (progress.state, progress.tries);
                let is_group = matches!(step.what, What::Sequence(_) | What::Parallel(_));
                if progress.state == StepState::Pending
                    || is_group
                    || shown.insert(step.name.clone(), now) == Some(now)
                {
                    continue;
                }
                let text = match progress.state {
                    StepState::Running | StepState::Asking => step.says(),
                    StepState::Undoing => {
                        execution.undo_of(step).map_or(String::new(), |undo| undo.says())
                    }
                    _ => progress.text.clone(),
                };
                say!("{:<24} {:<8} {text}", step.name, progress.state.name());
            }
        }
        if execution.ending.is_some() || needs_somebody(&execution) {
            return end(global, &execution);
        }
        std::thread::sleep(LOOK);
        let path = format!("/v1/applications/{}/plan-executions/{id}", execution.app);
        execution = client::get(global, &path)?;
    }
}

/// Nothing goes on until a person says something.
fn needs_somebody(execution: &PlanExecution) -> bool {
    let steps = execution.plan.all_steps();
    let goes_on = steps.iter().any(|step| {
        let state = execution.progress(&step.name).state;
        matches!(step.what, What::Do(_)) && matches!(state, StepState::Running | StepState::Undoing)
    });
    let is_undone_next = execution.plan.on_failure == model::plan::OnFailure::Undo
        && !execution.goes_back
        && execution.stuck().iter().all(|step| execution.progress(step).state == StepState::Failed);
    !goes_on && (execution.is_paused || (!execution.stuck().is_empty() && !is_undone_next))
}

fn end(global: &Global, execution: &PlanExecution) -> Done {
    if global.json {
        json(execution)?;
    } else {
        print_end(execution);
    }
    let is_fine = match execution.ending {
        Some(PlanEnding::Completed) => true,
        // As it was to be; not, if it broke off.
        Some(PlanEnding::Undone) => {
            execution.is_drill && execution.reason.as_deref() == Some(DRILL_OVER)
        }
        Some(PlanEnding::UndoneInPart) | None => false,
    };
    Ok(if is_fine { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// How long it took, beside how long it was to take.
pub(super) fn objective_of(execution: &PlanExecution) -> String {
    let (ms, limit) = (execution.took_ms(now_ms()), execution.plan.objective_ms);
    let objective = limit.map_or(String::new(), |limit| {
        format!(", objective {}: {}", took(limit), Verdict::of(Some(ms), Some(limit)).name())
    });
    format!("{} without approvals{objective}", took(ms))
}

fn print_end(execution: &PlanExecution) {
    let ending = execution.ending.map_or("under way", PlanEnding::name);
    let paused = if execution.is_paused { ", paused" } else { "" };
    say!("{ending}{paused}, {}", objective_of(execution));
    if let Some(reason) = &execution.reason {
        say!("reason: {reason}");
    }
    if execution.ending == Some(PlanEnding::UndoneInPart) {
        say!("left as they are: {}", execution.left().join(", "));
    }
    let id = execution.id;
    if execution.ending.is_some() {
        return;
    }
    if execution.is_paused {
        say!("next: holdfast resume {id}");
    }
    for step in execution.stuck() {
        match execution.progress(step).state {
            StepState::Asking => say!("next: holdfast approve {id} {step} (or decline)"),
            StepState::NotUndone => {
                say!("next: holdfast retry {id} {step} (or skip, which leaves it as it is)");
            }
            _ => say!("next: holdfast retry {id} {step} (or skip, or cancel {id})"),
        }
    }
}

pub(super) fn step_rows(execution: &PlanExecution) -> Vec<Vec<String>> {
    execution
        .plan
        .all_steps()
        .iter()
        .map(|step| {
            let progress = execution.progress(&step.name);
            let ms = progress.began_at_ms.zip(progress.ended_at_ms);
            let ms = ms.map_or(String::new(), |(from, to)| took(to.saturating_sub(from)));
            let text = if progress.text.is_empty() { step.says() } else { progress.text };
            vec![indented(&step.name), progress.state.to_string(), ms, text]
        })
        .collect()
}

pub(super) fn print(execution: &PlanExecution) {
    say!("{}", execution.says());
    table(&["step", "", "took", ""], &step_rows(execution));
    print_end(execution);
}

/// What one number stands for.
pub(super) enum Found {
    Cells(Box<Execution>),
    Plan(Box<PlanExecution>),
}

/// Looks for an execution; where two applications have one of this number, `app` says which is meant.
pub(super) fn find_any(global: &Global, id: u64, app: Option<&str>) -> Result<Found, String> {
    let cells: Vec<Execution> = client::get(global, "/v1/executions")?;
    let plans: Vec<PlanExecution> = client::get(global, "/v1/plan-executions")?;
    let is_meant = |of: &str, number: u64| number == id && app.is_none_or(|app| app == of);
    let cells = cells
        .into_iter()
        .filter(|one| is_meant(&one.app, one.id))
        .map(|one| Found::Cells(one.into()));
    let plans = plans.into_iter().filter(|one| is_meant(&one.app, one.id));
    let mut found: Vec<Found> = cells.chain(plans.map(|one| Found::Plan(one.into()))).collect();
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(one),
        (Some(_), false) => {
            Err(format!("several applications have an execution {id}: `--app` says which is meant"))
        }
        (None, _) => Err(format!("no execution {id}")),
    }
}

fn find_plan(global: &Global, id: u64, app: Option<&str>) -> Result<PlanExecution, String> {
    match find_any(global, id, app)? {
        Found::Plan(execution) => Ok(*execution),
        Found::Cells(execution) => Err(format!("{}: it carries out no plan", execution.says())),
    }
}

/// The step that is meant: the one that is named, or the only one of which something can be said now.
fn meant(
    execution: &PlanExecution,
    step: Option<String>,
    states: &[StepState],
) -> Result<String, String> {
    if let Some(step) = step {
        return Ok(step);
    }
    let stuck: Vec<&str> = execution
        .stuck()
        .into_iter()
        .filter(|step| states.contains(&execution.progress(step).state))
        .collect();
    match stuck[..] {
        [one] => Ok(one.to_owned()),
        [] => Err(format!("{}: no step waits for that", execution.says())),
        _ => Err(format!("several steps wait: say which of {}", stuck.join(", "))),
    }
}

/// Which execution, and of which application.
#[derive(clap::Args, Clone)]
pub(super) struct Which {
    /// As `holdfast executions` numbers it.
    pub(super) id: u64,
    /// Where two applications have one of this number.
    #[arg(long)]
    pub(super) app: Option<String>,
}

pub(super) fn say(
    global: &Global,
    which: &Which,
    verb: &str,
    step: Option<String>,
    mode: Option<Mode>,
) -> Done {
    let execution = find_plan(global, which.id, which.app.as_deref())?;
    say_to(global, &execution, verb, step, mode)
}

pub(super) fn say_to(
    global: &Global,
    execution: &PlanExecution,
    verb: &str,
    step: Option<String>,
    mode: Option<Mode>,
) -> Done {
    let step = match verb {
        "approve" | "decline" => Some(meant(execution, step, &[StepState::Asking])?),
        "retry" | "skip" => {
            Some(meant(execution, step, &[StepState::Failed, StepState::NotUndone])?)
        }
        _ => None,
    };
    let path =
        format!("/v1/applications/{}/plan-executions/{}/{verb}", execution.app, execution.id);
    let said: PlanExecution = client::post(global, &path, &Said { step, mode })?;
    if global.json {
        json(&said)?;
    } else {
        print(&said);
    }
    Ok(ExitCode::SUCCESS)
}
