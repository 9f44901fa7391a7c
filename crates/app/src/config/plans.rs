//! `[[app.plan]]`: steps that are written down before they are needed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use control::config::{AppServers, AppSettings};
use model::cell::CellState;
use model::failover::Analysis;
use model::plan::trigger::Trigger;
use model::plan::{
    Action, Condition, Dns, Http, Mode, OnFailure, Plan, SEPARATOR, STEPS_MAX, Step, Undo, What,
};
use model::region::Region;
use model::switchover::OnTimeout;

use super::reader::{Mistakes, Table};
use super::regions;

/// Of one try of a step, and of an approval.
const TIMEOUT: Duration = Duration::from_secs(30);
const APPROVAL_TIMEOUT: Duration = Duration::from_secs(3_600);
const PAUSE: Duration = Duration::from_secs(1);
const DNS_TTL: Duration = Duration::from_secs(5);
/// As of automatic failovers.
const TRIGGER_DELAY: Duration = Duration::from_secs(600);
const TRIGGERS_A_DAY: u64 = 3;
const DEADLINE: Duration = Duration::from_secs(30);
const NAME_LEN_MAX: usize = 64;
/// Groups and child plans in each other.
const DEPTH_MAX: usize = 8;
/// What a step may be, of which it is one.
const KINDS: [&str; 15] = [
    "activate",
    "fence",
    "fence_all",
    "unfence",
    "http",
    "exec",
    "sql",
    "haproxy",
    "dns",
    "wait",
    "approval",
    "plan",
    "steps",
    "parallel",
    "leave",
];
/// Those that do something.
const ACTIONS: usize = 10;
const METHODS: [&str; 5] = ["GET", "POST", "PUT", "PATCH", "DELETE"];

/// A plan as it is written: its child plans are named, not copied.
pub(super) struct Written {
    name: String,
    steps: Vec<WrittenStep>,
    on_failure: OnFailure,
    objective_ms: Option<u64>,
    triggers: Vec<Trigger>,
    span: Range<usize>,
}

struct WrittenStep {
    /// Its name is the last part only.
    step: Step,
    inner: Inner,
    span: Range<usize>,
}

/// What a step consists of.
enum Inner {
    Nothing,
    Steps(Vec<WrittenStep>),
    /// Those of another plan of the application.
    Plan(String),
    /// Every application whose active cell is in the region goes to another; each by such a step.
    Leave {
        region: Region,
        to: Region,
        each: Box<Step>,
    },
}

pub(super) fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) fn read(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>, app: &str) -> Vec<Written> {
    let mut plans = Vec::new();
    for mut plan in table.tables(mistakes, "plan") {
        let (span, name) = (plan.span(), read_name(&mut plan, mistakes));
        let words = ["stop", "undo"];
        let on_failure = plan.choice(mistakes, "on_failure", &words, |text| match text {
            "stop" => Some(OnFailure::Stop),
            "undo" => Some(OnFailure::Undo),
            _ => None,
        });
        let on_failure = on_failure.unwrap_or_default();
        let objective_ms = plan.duration(mistakes, "objective").map(ms);
        let triggers = read_triggers(&mut plan, mistakes);
        let steps = read_steps(&mut plan, mistakes, "step", app);
        if steps.is_empty() {
            mistakes.add(span.clone(), format!("plan `{name}` has no [[app.plan.step]]"));
        }
        plan.end(mistakes);
        plans.push(Written { name, steps, on_failure, objective_ms, triggers, span });
    }
    plans
}

fn read_triggers(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Vec<Trigger> {
    let mut triggers = Vec::new();
    for mut table in table.tables(mistakes, "trigger") {
        let mut on = BTreeSet::new();
        for (text, span) in table.texts(mistakes, "on").unwrap_or_default() {
            match Analysis::MATTERS.into_iter().find(|known| known.name() == text) {
                Some(analysis) => drop(on.insert(analysis)),
                None => {
                    let known = Analysis::MATTERS.map(Analysis::name).join(", ");
                    mistakes.add(span, format!("`on` must be of {known}, it is `{text}`"));
                }
            }
        }
        let alarms = table.texts(mistakes, "alarms").unwrap_or_default();
        let alarms: BTreeSet<String> = alarms.into_iter().map(|(name, _)| name).collect();
        if on.is_empty() && alarms.is_empty() {
            mistakes.add(
                table.span(),
                "a trigger needs `on`, what is the matter with the active cell, or `alarms` that are red",
            );
        }
        let after = table.duration(mistakes, "after").unwrap_or_default();
        let mode = read_mode(&mut table, mistakes).unwrap_or(Mode::Ungraceful);
        let min_delay = table.duration(mistakes, "min_delay").unwrap_or(TRIGGER_DELAY);
        let per_day = table.number(mistakes, "per_day", 1..1_001).unwrap_or(TRIGGERS_A_DAY);
        table.end(mistakes);
        let (after_ms, min_delay_ms) = (ms(after), ms(min_delay));
        let per_day = u32::try_from(per_day).unwrap_or(1);
        triggers.push(Trigger { on, alarms, after_ms, mode, min_delay_ms, per_day });
    }
    triggers
}

fn read_mode(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<Mode> {
    table.choice(mistakes, "mode", &["graceful", "ungraceful"], |text| match text {
        "graceful" => Some(Mode::Graceful),
        "ungraceful" => Some(Mode::Ungraceful),
        _ => None,
    })
}

pub(super) fn read_name(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> String {
    let span = table.span_of("name");
    let name = table.required_text(mistakes, "name");
    let is_plain = |c: char| c.is_alphanumeric() || "-_.".contains(c);
    if !name.is_empty() && (name.len() > NAME_LEN_MAX || !name.chars().all(is_plain)) {
        mistakes.add(
            span,
            format!("the name `{name}` must consist of at most {NAME_LEN_MAX} letters, digits, `-`, `_` and `.`"),
        );
    }
    name
}

fn read_steps(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    key: &'static str,
    app: &str,
) -> Vec<WrittenStep> {
    let mut steps = Vec::new();
    for mut table in table.tables(mistakes, key) {
        let span = table.span();
        let read = read_step(&mut table, mistakes, app);
        table.end(mistakes);
        if let Some((step, inner)) = read {
            steps.push(WrittenStep { step, inner, span });
        }
    }
    steps
}

fn read_step(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    own_app: &str,
) -> Option<(Step, Inner)> {
    let name = read_name(table, mistakes);
    let kinds: Vec<&str> = KINDS.into_iter().filter(|kind| table.has(kind)).collect();
    let [kind] = kinds[..] else {
        let found = if kinds.is_empty() { "none".into() } else { kinds.join(", ") };
        let text =
            format!("step `{name}` must have exactly one of {}, it has {found}", KINDS.join(", "));
        mistakes.add(table.span(), text);
        // Whatever it has is not looked at further.
        KINDS.iter().for_each(|kind| drop(table.text(&mut Mistakes::new(""), kind)));
        return None;
    };
    let mut inner = Inner::Nothing;
    let what = match kind {
        "approval" => {
            let by = table.choice(mistakes, "approval", &["anybody", "other"], |text| match text {
                "anybody" => Some(false),
                "other" => Some(true),
                _ => None,
            });
            What::Approval { by_other: by? }
        }
        "plan" => {
            inner = Inner::Plan(table.text(mistakes, "plan")?);
            What::Sequence(Vec::new())
        }
        "steps" => {
            inner = Inner::Steps(read_steps(table, mistakes, "steps", own_app));
            What::Sequence(Vec::new())
        }
        "parallel" => {
            inner = Inner::Steps(read_steps(table, mistakes, "parallel", own_app));
            What::Parallel(Vec::new())
        }
        "leave" => {
            inner = read_leave(table, mistakes, own_app)?;
            What::Sequence(Vec::new())
        }
        _ => What::Do(read_action(table, mistakes, own_app, kind, "POST")?),
    };
    let only_if = read_conditions(table, mistakes, own_app);
    let mode = read_mode(table, mistakes);
    let (mut tries, mut pause, mut idempotent, mut undo) = (1, PAUSE, false, None);
    let mut timeout = APPROVAL_TIMEOUT;
    match &what {
        What::Do(action) => {
            tries = table.number(mistakes, "tries", 1..1_001).unwrap_or(1);
            pause = table.duration(mistakes, "pause").unwrap_or(PAUSE);
            timeout = TIMEOUT;
            if !action.is_own_execution() && !action.leaves_nothing() {
                // Records that are replaced twice are as replaced once.
                let is_dns = matches!(action, Action::Dns(_));
                idempotent = table.flag(mistakes, "idempotent").unwrap_or(is_dns);
                timeout = table.duration(mistakes, "timeout").unwrap_or(TIMEOUT);
            }
            undo = read_undo(table, mistakes, own_app, action);
        }
        What::Approval { .. } => {
            timeout = table.duration(mistakes, "timeout").unwrap_or(APPROVAL_TIMEOUT);
        }
        What::Sequence(_) | What::Parallel(_) => (),
    }
    if timeout.is_zero() {
        mistakes.add(table.span_of("timeout"), "a step's `timeout` must be longer than 0");
    }
    let tries = u32::try_from(tries).unwrap_or(1);
    let (pause_ms, timeout_ms) = (ms(pause), ms(timeout));
    let step = Step { name, what, only_if, mode, tries, pause_ms, timeout_ms, undo, idempotent };
    Some((step, inner))
}

fn read_leave(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>, own_app: &str) -> Option<Inner> {
    let mut region = |table: &mut Table<'_>, key| {
        let (span, text) = (table.span_of(key), table.required_text(mistakes, key));
        Region::read(&text).map_err(|why| mistakes.add(span, why)).ok()
    };
    let (region, to) = (region(table, "leave"), region(table, "to"));
    let (app, name) = (own_app.to_owned(), String::new());
    let to_text = to.as_ref().map(ToString::to_string).unwrap_or_default();
    let action = read_activate(table, mistakes, app, to_text);
    let tries = table.number(mistakes, "tries", 1..1_001).unwrap_or(1);
    let pause = table.duration(mistakes, "pause").unwrap_or(PAUSE);
    let span = table.span_of("undo");
    let undo = read_undo(table, mistakes, own_app, &action);
    if matches!(undo, Some(Undo::Do(_))) {
        mistakes.add(span, "`leave` is done for each application, so it is undone by `back` alone");
    }
    let each = Step {
        name,
        what: What::Do(action),
        only_if: Vec::new(),
        mode: None,
        tries: u32::try_from(tries).unwrap_or(1),
        pause_ms: ms(pause),
        timeout_ms: ms(TIMEOUT),
        undo,
        idempotent: false,
    };
    let (region, to) = (region?, to?);
    if region.holds(&to) {
        let text = format!("`{to}` is in `{region}`, which is to be left");
        mistakes.add(table.span_of("to"), text);
    } else if to.holds(&region) {
        let text =
            format!("`{region}`, which is to be left, is in `{to}`: name a region beside it");
        mistakes.add(table.span_of("to"), text);
    }
    Some(Inner::Leave { region, to, each: each.into() })
}

/// How one is asked to leave its cell.
fn read_ending(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> (u64, OnTimeout) {
    let deadline = table.duration(mistakes, "deadline").unwrap_or(DEADLINE);
    let words = ["abort", "force"];
    let on_timeout = table.choice(mistakes, "on_timeout", &words, |text| match text {
        "abort" => Some(OnTimeout::Abort),
        "force" => Some(OnTimeout::Force),
        _ => None,
    });
    (ms(deadline), on_timeout.unwrap_or_default())
}

fn read_activate(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    app: String,
    to: String,
) -> Action {
    let (deadline_ms, on_timeout) = read_ending(table, mistakes);
    let allow_data_loss = table.flag(mistakes, "allow_data_loss").unwrap_or(false);
    Action::Activate { app, to, deadline_ms, on_timeout, allow_data_loss }
}

/// The application that a step is about: its plan's, unless it names another.
fn read_app(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>, own: &str) -> String {
    table.text(mistakes, "app").unwrap_or_else(|| own.to_owned())
}

/// `method`: of an HTTP call that names none.
pub(super) fn read_action(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    own_app: &str,
    kind: &str,
    method: &str,
) -> Option<Action> {
    Some(match kind {
        "activate" => {
            let app = read_app(table, mistakes, own_app);
            let to = table.text(mistakes, "activate")?;
            read_activate(table, mistakes, app, to)
        }
        "fence" | "fence_all" => {
            let all = kind == "fence_all";
            let app = read_app(table, mistakes, own_app);
            let cell = table.text(mistakes, if all { "fence_all" } else { "fence" })?;
            let (deadline_ms, on_timeout) = read_ending(table, mistakes);
            Action::Fence { app, cell, all, deadline_ms, on_timeout }
        }
        "unfence" => {
            let app = read_app(table, mistakes, own_app);
            Action::Unfence { app, cell: table.text(mistakes, "unfence")? }
        }
        "http" => {
            let mut table = table.table(mistakes, "http")?;
            let http = read_http(&mut table, mistakes, method);
            table.end(mistakes);
            Action::Http(http)
        }
        "exec" => {
            let argv: Vec<String> =
                table.texts(mistakes, "exec")?.into_iter().map(|(text, _)| text).collect();
            if argv.first().is_none_or(String::is_empty) {
                mistakes.add(table.span_of("exec"), "`exec` must begin with a program");
            }
            Action::Exec { argv }
        }
        "sql" => {
            let app = read_app(table, mistakes, own_app);
            let text = table.text(mistakes, "sql")?;
            let cell = table.text(mistakes, "cell");
            let database = table.text(mistakes, "database").unwrap_or_else(|| "postgres".into());
            Action::Sql { app, cell, database, text }
        }
        "haproxy" => {
            let mut table = table.table(mistakes, "haproxy")?;
            let address = table.required_text(mistakes, "address");
            let command = table.required_text(mistakes, "command");
            if command.contains(['\n', '\r', ';']) {
                let text = "`command` must be one command: a second one is a step of its own";
                mistakes.add(table.span_of("command"), text);
            }
            table.end(mistakes);
            Action::Haproxy { address, command }
        }
        "dns" => {
            let mut table = table.table(mistakes, "dns")?;
            let dns = read_dns(&mut table, mistakes);
            table.end(mistakes);
            Action::Dns(dns)
        }
        "wait" => Action::Wait { ms: ms(table.duration(mistakes, "wait")?) },
        _ => return None,
    })
}

fn read_dns(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Dns {
    let server = table.required_text(mistakes, "server");
    let zone = table.required_text(mistakes, "zone");
    let name = table.required_text(mistakes, "name");
    let kinds = ["A", "AAAA", "CNAME"];
    let kind = table
        .choice(mistakes, "type", &kinds, |text| kinds.contains(&text).then(|| text.to_owned()));
    let kind = kind.unwrap_or_else(|| "A".into());
    let span = table.span_of("value");
    let values: Vec<String> = table
        .texts(mistakes, "value")
        .unwrap_or_default()
        .into_iter()
        .map(|(text, _)| text)
        .collect();
    if values.is_empty() {
        mistakes.add(table.span(), "`dns` needs `value`: what the name leads to from then on");
    }
    let is_value = |value: &String| match kind.as_str() {
        "A" => value.parse::<std::net::Ipv4Addr>().is_ok(),
        "AAAA" => value.parse::<std::net::Ipv6Addr>().is_ok(),
        _ => !value.is_empty(),
    };
    if let Some(wrong) = values.iter().find(|value| !is_value(value)) {
        mistakes.add(span, format!("`{wrong}` is no value of a record of type {kind}"));
    }
    let is_in = |name: &str, zone: &str| {
        let (name, zone) = (name.trim_end_matches('.'), zone.trim_end_matches('.'));
        name == zone || name.strip_suffix(zone).is_some_and(|rest| rest.ends_with('.'))
    };
    if !is_in(&name, &zone) {
        mistakes.add(table.span_of("name"), format!("`{name}` is not in the zone `{zone}`"));
    }
    let ttl = table.duration(mistakes, "ttl").unwrap_or(DNS_TTL).as_secs();
    let key_file = table.text(mistakes, "key_file");
    let ttl_s = u32::try_from(ttl).unwrap_or(u32::MAX);
    Dns { server, zone, name, kind, values, ttl_s, key_file }
}

fn read_http(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>, default: &str) -> Http {
    let method = table.choice(mistakes, "method", &METHODS, |text| {
        METHODS.contains(&text).then(|| text.to_owned())
    });
    let span = table.span_of("url");
    let url = table.required_text(mistakes, "url");
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    let authority = rest.map(|rest| rest.split(['/', '?', '#']).next().unwrap_or_default());
    match authority {
        None if url.is_empty() => (),
        None | Some("") => {
            mistakes
                .add(span, format!("`url` must be such as \"https://host/path\", it is `{url}`"));
        }
        // It would be shown and stored.
        Some(authority) if authority.contains('@') => {
            mistakes.add(span, "`url` has a user in it: a token is kept in a `token_file`");
        }
        Some(_) => (),
    }
    let body = table.text(mistakes, "body");
    let token_file = table.text(mistakes, "token_file");
    let method = method.unwrap_or_else(|| default.to_owned());
    Http { method, url, body, token_file }
}

fn read_undo(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    own_app: &str,
    action: &Action,
) -> Option<Undo> {
    let span = table.span_of("undo");
    let mut undo = table.table(mistakes, "undo")?;
    let has_back = undo.flag(mistakes, "back") == Some(true);
    let kinds: Vec<&str> = KINDS[..ACTIONS].iter().copied().filter(|kind| undo.has(kind)).collect();
    let read = match (&kinds[..], has_back) {
        ([], true) => {
            let goes_back = matches!(action, Action::Activate { .. } | Action::Fence { .. });
            if !goes_back {
                mistakes.add(
                    span,
                    "`undo.back` is for `activate` and `fence`: say what else undoes it",
                );
            }
            goes_back.then_some(Undo::Back)
        }
        ([kind], false) => read_action(&mut undo, mistakes, own_app, kind, "POST").map(Undo::Do),
        _ => {
            let known = KINDS[..ACTIONS].join(", ");
            mistakes.add(span, format!("`undo` must have exactly one of back, {known}"));
            return None;
        }
    };
    undo.end(mistakes);
    read
}

/// States of which one is asked for.
pub(super) fn read_states(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
) -> BTreeSet<CellState> {
    let all = [
        ("active", CellState::Active),
        ("fenced", CellState::Fenced),
        ("passive", CellState::Passive),
    ];
    let mut states = BTreeSet::new();
    for (text, span) in table.texts(mistakes, "is").unwrap_or_default() {
        match all.iter().find(|(name, _)| *name == text) {
            Some((_, state)) => drop(states.insert(*state)),
            None => mistakes
                .add(span, format!("`is` must be of active, fenced, passive, it is `{text}`")),
        }
    }
    if states.is_empty() {
        mistakes.add(table.span(), "`is` is missing: one or more of active, fenced, passive");
    }
    states
}

fn read_conditions(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    own_app: &str,
) -> Vec<Condition> {
    let mut conditions = Vec::new();
    for mut table in table.tables(mistakes, "only_if") {
        let app = read_app(&mut table, mistakes, own_app);
        let cell = table.required_text(mistakes, "cell");
        let states = read_states(&mut table, mistakes);
        table.end(mistakes);
        conditions.push(Condition { app, cell, states });
    }
    conditions
}

/// Copies child plans into those that name them, and looks whether what steps name is there.
pub(super) fn settle(
    written: BTreeMap<String, Vec<Written>>,
    apps: &mut BTreeMap<String, AppServers>,
    has_tokens: bool,
    mistakes: &mut Mistakes<'_>,
) {
    let mut settled = BTreeMap::new();
    for (app, plans) in &written {
        let by_name: BTreeMap<&str, &Written> =
            plans.iter().map(|plan| (plan.name.as_str(), plan)).collect();
        if by_name.len() < plans.len() {
            let text = format!("application `{app}` has two plans of one name");
            mistakes.add(plans.last().map_or(0..0, |plan| plan.span.clone()), text);
        }
        let alarms = apps.get(app).map(|servers| servers.now().alarms.clone()).unwrap_or_default();
        let mut all = BTreeMap::new();
        for plan in plans {
            let named = plan.triggers.iter().flat_map(|trigger| &trigger.alarms);
            for name in named.filter(|name| !alarms.contains_key(*name)) {
                let plan_name = &plan.name;
                let text =
                    format!("plan `{plan_name}` begins by an alarm `{name}` that is not there");
                mistakes.add(plan.span.clone(), text);
            }
            let path = vec![plan.name.as_str()];
            let mut settling = Settling { plans: &by_name, apps, path, count: 0 };
            let steps = settling.steps(&plan.steps, "", mistakes);
            let count = settling.count;
            if count > STEPS_MAX {
                mistakes.add(
                    plan.span.clone(),
                    format!(
                        "plan `{}` has more than {STEPS_MAX} steps, those of its child plans included",
                        plan.name
                    ),
                );
            }
            let Written { on_failure, objective_ms, .. } = *plan;
            let name = plan.name.clone();
            let triggers = plan.triggers.clone();
            let read = Plan { name: name.clone(), steps, on_failure, objective_ms, triggers };
            check(&read, plan, apps, has_tokens, mistakes);
            all.insert(name, read);
        }
        settled.insert(app.clone(), all);
    }
    for (app, plans) in settled {
        if let Some(servers) = apps.get_mut(&app) {
            let settings = AppSettings { plans, ..(*servers.now()).clone() };
            servers.settings.set(Arc::new(settings));
        }
    }
}

/// Puts plans together.
struct Settling<'a, 'p> {
    plans: &'p BTreeMap<&'a str, &'a Written>,
    apps: &'p BTreeMap<String, AppServers>,
    /// Plans that are being put together, each in the one before.
    path: Vec<&'a str>,
    /// Steps so far.
    count: usize,
}

impl<'a> Settling<'a, '_> {
    fn steps(
        &mut self,
        steps: &'a [WrittenStep],
        prefix: &str,
        mistakes: &mut Mistakes<'_>,
    ) -> Vec<Step> {
        let mut settled = Vec::new();
        for written in steps {
            self.count += 1;
            if self.count > STEPS_MAX {
                return settled;
            }
            let mut step = written.step.clone();
            step.name = format!("{prefix}{}", step.name);
            let inner = format!("{}{SEPARATOR}", step.name);
            if inner.matches(SEPARATOR).count() > DEPTH_MAX {
                let text = format!("steps are nested deeper than {DEPTH_MAX}: `{}`", step.name);
                mistakes.add(written.span.clone(), text);
                return settled;
            }
            let children = match &written.inner {
                Inner::Nothing => Vec::new(),
                Inner::Steps(steps) => self.steps(steps, &inner, mistakes),
                Inner::Plan(child) => match self.child(child, written, &inner, mistakes) {
                    Some(children) => children,
                    None => continue,
                },
                Inner::Leave { region, to, each } => {
                    self.leave((region, to), each, (written, &inner), mistakes)
                }
            };
            match &mut step.what {
                What::Sequence(steps) | What::Parallel(steps) => *steps = children,
                What::Do(_) | What::Approval { .. } => (),
            }
            settled.push(step);
        }
        settled
    }

    /// Group by group, so that what others need goes first.
    fn leave(
        &mut self,
        (region, to): (&Region, &Region),
        each: &Step,
        (written, prefix): (&WrittenStep, &str),
        mistakes: &mut Mistakes<'_>,
    ) -> Vec<Step> {
        let mut groups = Vec::new();
        for group in regions::within(region, self.apps) {
            let mut steps = Vec::new();
            for (app, cells) in group {
                let is_there = self.apps.get(&app).is_some_and(|servers| {
                    servers.cells.keys().any(|cell| servers.is_within(cell, to))
                });
                if !is_there {
                    let text =
                        format!("application `{app}` has cells in `{region}`, and none in `{to}`");
                    mistakes.add(written.span.clone(), text);
                }
                let is_one = cells.len() == 1;
                for cell in cells {
                    let name = if is_one { app.clone() } else { format!("{app}.{cell}") };
                    let mut step = Step { name: format!("{prefix}{name}"), ..each.clone() };
                    if let What::Do(Action::Activate { app: its, .. }) = &mut step.what {
                        its.clone_from(&app);
                    }
                    let (app, states) = (app.clone(), BTreeSet::from([CellState::Active]));
                    step.only_if.push(Condition { app, cell, states });
                    self.count += 1;
                    steps.push(step);
                }
            }
            match steps.len() {
                1 => groups.append(&mut steps),
                _ => {
                    self.count += 1;
                    let name = format!("{prefix}group-{}", groups.len() + 1);
                    let what = What::Parallel(steps);
                    groups.push(Step { name, what, undo: None, ..each.clone() });
                }
            }
        }
        if groups.is_empty() {
            let text = format!("no application has a cell in `{region}`");
            mistakes.add(written.span.clone(), text);
        }
        groups
    }

    fn child(
        &mut self,
        child: &str,
        written: &WrittenStep,
        prefix: &str,
        mistakes: &mut Mistakes<'_>,
    ) -> Option<Vec<Step>> {
        let Some((known, plan)) = self.plans.get_key_value(child) else {
            let known = self.plans.keys().copied().collect::<Vec<_>>().join(", ");
            let text = format!("there is no plan `{child}`; plans are {known}");
            mistakes.add(written.span.clone(), text);
            return None;
        };
        if self.path.contains(known) {
            let path = self.path.join("` -> `");
            let text = format!("plans lead back to themselves: `{path}` -> `{child}`");
            mistakes.add(written.span.clone(), text);
            return None;
        }
        self.path.push(known);
        let steps = self.steps(&plan.steps, prefix, mistakes);
        self.path.pop();
        Some(steps)
    }
}

fn check(
    plan: &Plan,
    written: &Written,
    apps: &BTreeMap<String, AppServers>,
    has_tokens: bool,
    mistakes: &mut Mistakes<'_>,
) {
    let mut wrong = |text: String| mistakes.add(written.span.clone(), text);
    let steps = plan.all_steps();
    let mut names = BTreeSet::new();
    let is_there = |app: &str, cell: Option<&str>| -> Result<(), String> {
        let known = |names: Vec<&String>| {
            names.into_iter().map(String::as_str).collect::<Vec<_>>().join(", ")
        };
        let Some(servers) = apps.get(app) else {
            let known = known(apps.keys().collect());
            return Err(format!("there is no application `{app}`; there are {known}"));
        };
        match cell {
            Some(cell) if !servers.cells.contains_key(cell) => {
                let known = known(servers.cells.keys().collect());
                Err(format!("application `{app}` has no cell `{cell}`; its cells are {known}"))
            }
            _ => Ok(()),
        }
    };
    for step in steps {
        if !names.insert(step.name.as_str()) {
            wrong(format!("plan `{}` has two steps `{}`", plan.name, step.name));
        }
        if matches!(step.what, What::Approval { by_other: true }) && !has_tokens {
            wrong(format!(
                "step `{}`: `approval = \"other\"` needs [[control.token]], which tells one person from another",
                step.name
            ));
        }
        let mut found = Vec::new();
        for condition in &step.only_if {
            found.push(is_there(&condition.app, Some(&condition.cell)));
        }
        let own = match &step.what {
            What::Do(action) => Some(action),
            _ => None,
        };
        let undo = match &step.undo {
            Some(Undo::Do(action)) => Some(action),
            _ => None,
        };
        for action in own.into_iter().chain(undo) {
            let cell = match action {
                Action::Activate { app, to, .. } => {
                    let is_region = apps.get(app).is_some_and(|its| its.region(to).is_some());
                    (!is_region).then_some(to.as_str())
                }
                Action::Fence { cell, .. } | Action::Unfence { cell, .. } => Some(cell.as_str()),
                Action::Sql { cell, .. } => cell.as_deref(),
                Action::Http(_)
                | Action::Exec { .. }
                | Action::Haproxy { .. }
                | Action::Dns(_)
                | Action::Wait { .. } => None,
            };
            if let Some(app) = action.app() {
                found.push(is_there(app, cell));
            }
        }
        for why in found.into_iter().filter_map(Result::err) {
            wrong(format!("step `{}` of plan `{}`: {why}", step.name, plan.name));
        }
    }
}
