//! One execution on a page, for whoever was not there: Markdown.

use std::time::{Duration, UNIX_EPOCH};

use model::audit::Asking;
use model::objectives::Verdict;
use model::persisted::Execution;
use model::plan::run::{PlanEnding, PlanExecution};
use model::switchover::Kind;

use super::plans::{objective_of, step_rows, took};
use super::show::{ending, stage_rows};

/// What a change of cells has cost, in words, as far as there is something to say.
pub(super) fn costs(execution: &Execution) -> Vec<(&'static str, String)> {
    let (measured, objectives) = (execution.measured, execution.objectives);
    let said = |measured: Option<u64>, objective: Option<u64>, shown: &dyn Fn(u64) -> String| {
        let beside = match objective {
            Some(limit) => {
                let verdict = Verdict::of(measured, objective).name();
                format!(", objective {}: {verdict}", shown(limit))
            }
            None => String::new(),
        };
        let is_worth_saying = measured.is_some() || objective.is_some();
        is_worth_saying.then(|| format!("{}{beside}", measured.map_or("not known".into(), shown)))
    };
    let mut costs = Vec::new();
    if matches!(execution.kind, Kind::Switchover | Kind::Failover) {
        let without = said(measured.without_ms, objectives.rto_ms, &took);
        costs.extend(without.map(|text| ("without service", text)));
    }
    if execution.kind == Kind::Failover {
        let bytes = |bytes: u64| format!("{bytes} bytes");
        let lost = said(measured.lost_bytes, objectives.rpo_bytes, &bytes);
        costs.extend(lost.map(|text| ("lost", text)));
    }
    costs
}

fn at(ms: u64) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(ms)).to_string()
}

fn asked(asking: &Asking) -> String {
    match &asking.reason {
        Some(reason) => format!("{}: {reason}", asking.by),
        None => asking.by.clone(),
    }
}

pub(super) fn of_cells(execution: &Execution) -> String {
    let Execution { id, kind, app, from, to, .. } = execution;
    let what = match from == to {
        true => format!("cell {to}"),
        false => format!("from {from} to {to}"),
    };
    let title = format!("{} of {app}, {what}: {}", kind.name(), ending(execution));
    let mut facts = vec![
        ("execution", id.to_string()),
        ("began", at(execution.started_at_ms)),
        ("asked for by", asked(&execution.asked)),
        ("epoch before", execution.epoch.to_string()),
    ];
    if !execution.asked.overrides.is_empty() {
        let rules: Vec<&str> = execution.asked.overrides.iter().map(String::as_str).collect();
        facts.push(("in spite of", rules.join(", ")));
    }
    facts.extend(costs(execution));
    if let Some(lost) = execution.lost.as_ref().filter(|lost| !lost.kept_in.is_empty()) {
        let text = format!("{} commits, kept in {}", lost.transactions, lost.kept_in);
        facts.push(("on the lost server alone", text));
        let rows = lost.rows.iter();
        facts.extend(rows.clone().map(|rows| ("row by row", rows.says())));
        facts.extend(rows.flat_map(|rows| &rows.tables).map(|table| ("", table.says())));
    }
    facts.extend(execution.reason.clone().map(|reason| ("reason", reason)));
    page(&title, &facts, ["stage", "", "took", ""], &stage_rows(execution))
}

pub(super) fn of_plan(execution: &PlanExecution) -> String {
    let PlanExecution { id, app, plan, mode, .. } = execution;
    let ending = execution.ending.map_or("under way", PlanEnding::name);
    let drill = if execution.is_drill { "drill of " } else { "" };
    let title = format!("{drill}plan {} of {app}, {}: {ending}", plan.name, mode.name());
    let mut facts = vec![
        ("execution", id.to_string()),
        ("began", at(execution.started_at_ms)),
        ("asked for by", asked(&execution.asked)),
        ("took", objective_of(execution)),
    ];
    facts.extend(execution.ended_at_ms.map(|ms| ("ended", at(ms))));
    facts.extend(execution.reason.clone().map(|reason| ("reason", reason)));
    page(&title, &facts, ["step", "", "took", ""], &step_rows(execution))
}

fn page(
    title: &str,
    facts: &[(&'static str, String)],
    header: [&str; 4],
    rows: &[Vec<String>],
) -> String {
    let mut text = format!("# {title}\n\n| | |\n|---|---|\n");
    let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ");
    for (name, value) in facts {
        text.push_str(&format!("| {name} | {} |\n", cell(value)));
    }
    text.push_str(&format!("\n| {} |\n|---|---|---|---|\n", header.join(" | ")));
    for row in rows {
        let row: Vec<String> = row.iter().map(|text| cell(text)).collect();
        text.push_str(&format!("| {} |\n", row.join(" | ")));
    }
    text
}
