//! HTTP for people and scripts: JSON under `/v1`, Prometheus under `/metrics`, health for load balancers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use access::{Access, Role};
use axum::Router;
use axum::extract::{Json, Path, Query, State as Extract};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use control::config::AppServers;
use control::live::Live;
use control::{
    Control, ControlError, FailoverRequest, FenceRequest, MoveRequest, SwitchoverRequest,
};
use model::audit::Record;
use model::cell::CellState;
use model::failover::Analysis;
use model::objectives::{Measured, Objectives};
use model::persisted::Execution;
use model::plan::run::{PlanError, PlanExecution, StepState};
use model::switchover::Kind;
use pg::admin::Admin;
use proxy::Proxy;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::timeout;

use crate::loaded::Loaded;

/// How long one server may take to say where it stands.
const STATUS_MAX: Duration = Duration::from_secs(2);

pub(crate) mod access;
pub(crate) mod agents;
mod configuration;
pub(crate) mod plans;
mod proxies;
pub(crate) mod safety;

#[derive(Clone)]
pub(crate) struct State {
    /// That of this process, if it has one.
    proxy: Option<Arc<Proxy>>,
    control: Arc<Control>,
    access: Live<Access>,
    loaded: Option<Arc<Loaded>>,
}

impl State {
    pub(crate) fn new(
        proxy: Option<Arc<Proxy>>,
        control: Arc<Control>,
        access: Live<Access>,
        loaded: Option<Arc<Loaded>>,
    ) -> State {
        State { proxy, control, access, loaded }
    }
}

pub(crate) fn routes(state: State) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/applications/{app}/sessions", get(sessions))
        .route("/v1/applications/{app}/switchover", post(switchover))
        .route("/v1/applications/{app}/failover", post(failover))
        .route("/v1/applications/{app}/move", post(move_sessions))
        .route("/v1/applications/{app}/cells/{cell}/fence", post(fence))
        .route("/v1/applications/{app}/cells/{cell}/unfence", post(unfence))
        .route("/v1/applications/{app}/executions/{id}/retry", post(retry))
        .route("/v1/applications/{app}/plans", get(plans::list))
        .route("/v1/applications/{app}/plans/{plan}/execute", post(plans::execute))
        .route("/v1/applications/{app}/plan-executions/{id}/{verb}", post(plans::say))
        .route("/v1/applications/{app}/plan-executions/{id}", get(plans::one))
        .route("/v1/plan-executions", get(plans::executions))
        .route("/v1/applications/{app}/safety", get(safety::show))
        .route("/v1/applications/{app}/gates/{gate}", post(safety::set_gate))
        .route("/v1/executions", get(executions))
        .route("/v1/configuration/diff", get(configuration::diff))
        .route("/v1/configuration/apply", post(configuration::apply))
        .route("/v1/audit", get(audit))
        .route("/v1/openapi.json", get(openapi))
        .route("/metrics", get(metrics))
        .route("/liveness", get(|| async { "alive\n" }))
        .route("/health", get(|| async { "healthy\n" }))
        .route("/readiness", get(primary))
        .route("/primary", get(primary))
        .route("/read-write", get(primary))
        .route("/read-only", get(read_only))
        .with_state(state)
}

/// What there is to ask for, as OpenAPI has it.
const OPENAPI: &str = include_str!("api/openapi.json");

async fn openapi() -> Response {
    ([("content-type", "application/json")], OPENAPI).into_response()
}

/// What went wrong, as clients of the API see it.
pub(crate) struct ApiError(pub(crate) StatusCode, pub(crate) String);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

impl From<ControlError> for ApiError {
    fn from(error: ControlError) -> ApiError {
        let status = match &error {
            ControlError::NoApp { .. }
            | ControlError::NoCell { .. }
            | ControlError::NoAgent { .. }
            | ControlError::NoPlan { .. }
            | ControlError::NoGate { .. }
            | ControlError::NoRule { .. }
            | ControlError::Plan(PlanError::NoStep { .. })
            | ControlError::NoExecution(_) => StatusCode::NOT_FOUND,
            ControlError::Plan(PlanError::Own { .. }) => StatusCode::FORBIDDEN,
            ControlError::AlreadyActive { .. }
            | ControlError::NotPassive { .. }
            | ControlError::UnderWay { .. }
            | ControlError::NoActive { .. }
            | ControlError::NotActive { .. }
            | ControlError::NotFenced { .. }
            | ControlError::Refused(_)
            | ControlError::NotNewest { .. }
            | ControlError::PlanUnderWay { .. }
            | ControlError::Plan(_)
            | ControlError::NotRetryable { .. } => StatusCode::CONFLICT,
            ControlError::OtherEpoch { .. } => StatusCode::PRECONDITION_FAILED,
            ControlError::Unsafe(_) => StatusCode::LOCKED,
            ControlError::NoReason => StatusCode::BAD_REQUEST,
            ControlError::OtherRequest { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            ControlError::Record(_) => StatusCode::INTERNAL_SERVER_ERROR,
        };
        ApiError(status, crate::config::chain(&error))
    }
}

type Queried = Query<BTreeMap<String, String>>;

/// `holdfast status` shows this.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) apps: Vec<AppStatus>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct AppStatus {
    pub(crate) name: String,
    pub(crate) epoch: u64,
    pub(crate) active: Option<String>,
    pub(crate) execution: Option<u64>,
    pub(crate) sessions: u64,
    pub(crate) cells: Vec<CellStatus>,
    #[serde(default)]
    pub(crate) needs: Vec<Needed>,
    #[serde(default)]
    pub(crate) proxies: Vec<ProxyStatus>,
    #[serde(default)]
    pub(crate) alarms: Vec<AlarmStatus>,
    /// What is wrong, each with what to type next.
    pub(crate) problems: Vec<String>,
}

/// An alarm, as it was seen last.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct AlarmStatus {
    pub(crate) name: String,
    /// unknown, green or red
    pub(crate) colour: String,
    /// For how long it has been so.
    pub(crate) held_s: u64,
    /// What the last check has said.
    pub(crate) said: String,
}

/// An application that another needs, and where it is.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Needed {
    pub(crate) app: String,
    pub(crate) active: Option<String>,
    pub(crate) region: Option<String>,
}

/// One proxy, in one application.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ProxyStatus {
    /// Empty for that of control's own process.
    pub(crate) name: String,
    /// `serves`, `silent`, or `out`: it has ended, or nobody waits for it.
    pub(crate) state: String,
    pub(crate) sessions: u64,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CellStatus {
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) region: Option<String>,
    pub(crate) state: CellState,
    pub(crate) server: String,
    /// `primary`, `standby`, or why it cannot be said.
    pub(crate) role: String,
    pub(crate) lsn: Option<String>,
    pub(crate) lag_bytes: Option<u64>,
    pub(crate) streaming: bool,
}

async fn status(
    Extract(state): Extract<State>,
    headers: HeaderMap,
) -> Result<Json<Status>, ApiError> {
    state.access.now().allow(&headers, Role::Viewer)?;
    let mut apps = Vec::new();
    for name in state.control.config.apps.keys() {
        apps.push(app_status(&state, name).await?);
    }
    Ok(Json(Status { apps }))
}

/// Where the applications are that one needs.
fn needs_of(control: &Control, name: &str) -> Result<Vec<Needed>, ApiError> {
    let mut needs = Vec::new();
    for app in &control.config.apps[name].depends_on {
        let active = control.application(app)?.active().map(str::to_owned);
        let cells = &control.config.apps[app].cells;
        let server = active.as_ref().and_then(|cell| cells.get(cell));
        let region = server.and_then(|server| server.region.as_ref()).map(ToString::to_string);
        needs.push(Needed { app: app.clone(), active, region });
    }
    Ok(needs)
}

async fn app_status(state: &State, name: &str) -> Result<AppStatus, ApiError> {
    let application = state.control.application(name)?;
    let servers = &state.control.config.apps[name].cells;
    let asked = servers.iter().map(|(cell, server)| async move {
        let ask = async {
            let mut admin = Admin::connect(&server.target, &server.admin)
                .await
                .map_err(|e| crate::config::chain(&e))?;
            admin.status().await.map_err(|e| crate::config::chain(&e))
        };
        let found = timeout(STATUS_MAX, ask).await;
        (cell.clone(), found.unwrap_or_else(|_| Err(format!("no answer within {STATUS_MAX:?}"))))
    });
    let mut found = BTreeMap::new();
    for ask in asked {
        let (cell, status) = ask.await;
        found.insert(cell, status);
    }
    let mut problems = Vec::new();
    let proxies = proxies(state, name, &mut problems);
    problems.extend(state.control.troubled_agents(name)?);
    let active = application.active().map(str::to_owned);
    let active_lsn = active
        .as_ref()
        .and_then(|cell| found.get(cell))
        .and_then(|s| s.as_ref().ok())
        .map(|s| s.lsn);
    let mut cells = Vec::new();
    for (cell, status) in &found {
        let cell_state = application.cells.get(cell).copied().unwrap_or(CellState::Passive);
        let mut shown = CellStatus {
            name: cell.clone(),
            region: servers[cell].region.as_ref().map(ToString::to_string),
            state: cell_state,
            server: servers[cell].target.address.to_string(),
            role: String::new(),
            lsn: None,
            lag_bytes: None,
            streaming: false,
        };
        match status {
            Ok(status) => {
                shown.role = if status.in_recovery { "standby" } else { "primary" }.into();
                shown.lsn = Some(status.lsn.to_string());
                shown.streaming = status.streaming;
                shown.lag_bytes = active_lsn
                    .filter(|_| status.in_recovery)
                    .map(|lsn| lsn.bytes_since(status.lsn));
                match (cell_state, status.in_recovery) {
                    (CellState::Active, true) => {
                        problems.push(format!(
                            "cell `{cell}` is active, but its server is in recovery"
                        ));
                    }
                    (CellState::Passive, false)
                        if application.served().is_none_or(|(one, _)| one != cell) =>
                    {
                        problems
                            .push(format!("cell `{cell}` is passive, but its server is a primary"));
                    }
                    (CellState::Passive, true) if !status.streaming => {
                        problems
                            .push(format!("cell `{cell}` does not stream from the active cell"));
                    }
                    _ => (),
                }
            }
            Err(error) => {
                shown.role = "unknown".into();
                problems.push(format!("cell `{cell}` cannot be asked: {error}"));
            }
        }
        cells.push(shown);
    }
    if let (Some(cell), Some(seen)) = (&active, state.control.seen(name))
        && state.control.is_settled_but_for(name, &state.control.watched(name)?, None)
        && seen.cell == *cell
        && seen.analysis != Analysis::NoProblem
    {
        let mut standbys = application.cells.iter().filter(|(_, at)| **at == CellState::Passive);
        let to = standbys.next().map(|(other, _)| other);
        let next = match (&seen.blocked, to) {
            (Some(why), _) => why.clone(),
            (None, Some(to)) => format!("holdfast failover {name} --to {to}"),
            (None, None) => "there is no other cell with a standby".into(),
        };
        let (analysis, says) = (seen.analysis, seen.analysis.says());
        problems.push(format!("cell `{cell}`: {says} ({analysis}): {next}"));
    }
    if let Some(seen) = state.control.seen(name) {
        problems.extend(seen.held_back.into_iter().chain(seen.notices));
    }
    let alarms: Vec<AlarmStatus> = alarms_of(&state.control, name).collect();
    for AlarmStatus { name, held_s, said, .. } in alarms.iter().filter(|one| one.colour == "red") {
        problems.push(format!("alarm `{name}` is red for {held_s} s: {said}"));
    }
    let acks = state.control.config.apps[name].now().durability.acks;
    if acks > 0 && application.protected.is_none() && active.is_some() {
        problems.push(format!(
            "commits are acknowledged by one server alone, {acks} others are asked for: look whether the standbys stream, and `synchronous_commit` is on"
        ));
    }
    if let Some(id) = application.execution {
        let does = match state.control.rejoining(name, &application) {
            Some(execution) => format!("makes `{}` a standby", execution.from),
            None => "is under way or stuck".into(),
        };
        problems.push(format!("execution {id} {does}: holdfast executions {id}"));
    }
    // Whatever becomes of a plan is in no cell's way.
    match state.control.plan_under_way(name) {
        Ok(execution) => problems.extend(execution.iter().flat_map(troubles_of)),
        Err(error) => {
            problems.push(format!("a plan stands still: {}", crate::config::chain(&error)))
        }
    }
    let served = application.served().map(|(cell, _)| cell);
    if served.is_none() {
        let next = format!("holdfast unfence {name} CELL");
        problems
            .push(format!("the store was restored, say which cell has the newest data: {next}"));
    }
    for (cell, cell_state) in &application.cells {
        if served.is_none() {
            continue;
        }
        if Some(cell.as_str()) == served && application.execution.is_none() {
            if !cell_state.takes_writes() {
                let next = format!("holdfast unfence {name} {cell}");
                problems
                    .push(format!("cell `{cell}` is {cell_state}, nothing takes writes: {next}"));
            }
            continue;
        }
        if matches!(cell_state, CellState::Fenced | CellState::Recovering)
            && application.execution.is_none()
        {
            let next = match state.control.lacks_rejoin(name, cell)? {
                Some(execution) => format!("holdfast retry {}", execution.id),
                None => "make it a standby of the active cell".into(),
            };
            problems.push(format!("cell `{cell}` is {cell_state}, there is no standby: {next}"));
        }
    }
    Ok(AppStatus {
        name: name.into(),
        epoch: application.epoch.0,
        active,
        execution: application.execution,
        sessions: proxies.iter().map(|proxy| proxy.sessions).sum(),
        cells,
        needs: needs_of(&state.control, name)?,
        proxies,
        alarms,
        problems,
    })
}

fn alarms_of(control: &Control, app: &str) -> impl Iterator<Item = AlarmStatus> {
    control.alarms(app).into_iter().map(|(name, seen)| AlarmStatus {
        name,
        colour: seen.colour().name().into(),
        held_s: seen.held().as_secs(),
        said: seen.said().into(),
    })
}

/// What of a plan waits for a person.
fn troubles_of(execution: &PlanExecution) -> Vec<String> {
    let (id, plan) = (execution.id, &execution.plan.name);
    if execution.is_paused {
        return vec![format!("plan `{plan}` is paused: holdfast resume {id}")];
    }
    let trouble = |step: &str| {
        let progress = execution.progress(step);
        let (state, text) = (progress.state, progress.text);
        let next = match state {
            StepState::Asking => format!("holdfast approve {id} {step}"),
            StepState::Running | StepState::Undoing => format!("holdfast skip {id} {step}"),
            _ => format!("holdfast retry {id} {step}"),
        };
        let why = if text.is_empty() { String::new() } else { format!(" ({text})") };
        format!("plan `{plan}`: step `{step}` is {state}{why}: {next}")
    };
    let mut stuck = execution.stuck();
    if execution.goes_back {
        // Nothing is undone before these have ended.
        let steps = execution.plan.all_steps().into_iter();
        let going = steps.filter(|step| execution.being_done(step).is_some());
        stuck.extend(going.map(|step| step.name.as_str()));
    }
    stuck.into_iter().map(trouble).collect()
}

fn proxies(state: &State, app: &str, problems: &mut Vec<String>) -> Vec<ProxyStatus> {
    let mut all = Vec::new();
    if let Some(proxy) = &state.proxy {
        let sessions = u64::try_from(proxy.session_count(app)).unwrap_or(0);
        all.push(ProxyStatus { name: String::new(), state: "serves".into(), sessions });
    }
    for proxy in state.control.proxies() {
        let shown = match (proxy.is_out || proxy.out_of.contains(app), proxy.is_heard) {
            (true, _) => "out",
            (false, true) => "serves",
            (false, false) => "silent",
        };
        if proxy.ghosts.contains(app) {
            problems.push(format!(
                "another process of proxy `{}`, on another host, may still serve: end it, and let the next change wait for it by `--on-timeout force`",
                proxy.name
            ));
        }
        if shown == "silent" {
            problems.push(format!(
                "proxy `{}` is silent: start it, or let a change go on without it by `--on-timeout force`",
                proxy.name
            ));
        }
        let sessions = proxy.sessions.get(app).copied().unwrap_or(0);
        all.push(ProxyStatus { name: proxy.name, state: shown.into(), sessions });
    }
    all
}

async fn sessions(
    Extract(state): Extract<State>,
    Path(app): Path<String>,
    Query(query): Queried,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    state.access.now().allow(&headers, Role::Viewer)?;
    state.control.application(&app)?;
    if query.get("pinned").is_some_and(|value| value != "false") {
        state.access.now().allow(&headers, Role::Operator)?;
        // Asks every session's server, as a switchover would.
        let report = state.control.order(model::barrier::Order::Inspect { app }).await;
        return Ok(Json(report).into_response());
    }
    let report = state.control.order(model::barrier::Order::List { app }).await;
    Ok(Json(report.listed).into_response())
}

async fn switchover(
    Extract(state): Extract<State>,
    Path(app): Path<String>,
    Query(query): Queried,
    headers: HeaderMap,
    Json(request): Json<SwitchoverRequest>,
) -> Result<Response, ApiError> {
    let asking = state.access.now().asking(&headers, &query, Role::Operator)?;
    state.control.application(&app)?;
    if request.dry_run {
        return Ok(Json(state.control.dry_run(&app, &request).await?).into_response());
    }
    let control = state.control.clone();
    to_its_end(async move {
        let (key, to) = (asking.key.clone(), request.to.clone());
        let is_same =
            |one: &Execution| one.kind == Kind::Switchover && control.is_meant(&app, &one.to, &to);
        let act = control.switchover(&app, request, asking);
        control.once(&app, key.as_deref(), is_same, act).await
    })
    .await
}

async fn failover(
    Extract(state): Extract<State>,
    Path(app): Path<String>,
    Query(query): Queried,
    headers: HeaderMap,
    Json(request): Json<FailoverRequest>,
) -> Result<Response, ApiError> {
    let role = if request.allow_data_loss { Role::Admin } else { Role::Operator };
    let asking = state.access.now().asking(&headers, &query, role)?;
    state.control.application(&app)?;
    if request.dry_run {
        return Ok(Json(state.control.failover_dry_run(&app, &request).await?).into_response());
    }
    let control = state.control.clone();
    to_its_end(async move {
        let (key, to) = (asking.key.clone(), request.to.clone());
        let is_same =
            |one: &Execution| one.kind == Kind::Failover && control.is_meant(&app, &one.to, &to);
        let act = control.fail_over(&app, request, false, asking);
        control.once(&app, key.as_deref(), is_same, act).await
    })
    .await
}

async fn move_sessions(
    Extract(state): Extract<State>,
    Path(app): Path<String>,
    Query(query): Queried,
    headers: HeaderMap,
    Json(request): Json<MoveRequest>,
) -> Result<Response, ApiError> {
    let asking = state.access.now().asking(&headers, &query, Role::Operator)?;
    let control = state.control.clone();
    to_its_end(async move { control.move_sessions(&app, request, asking).await }).await
}

async fn fence(
    Extract(state): Extract<State>,
    Path((app, cell)): Path<(String, String)>,
    Query(query): Queried,
    headers: HeaderMap,
    Json(request): Json<FenceRequest>,
) -> Result<Response, ApiError> {
    let asking = state.access.now().asking(&headers, &query, Role::Operator)?;
    let control = state.control.clone();
    to_its_end(async move {
        let kind = if request.all { Kind::FenceAll } else { Kind::Fence };
        let is_same = |one: &Execution| (one.kind, &one.to) == (kind, &cell);
        let key = asking.key.clone();
        let act = control.fence(&app, &cell, request, asking);
        control.once(&app, key.as_deref(), is_same, act).await
    })
    .await
}

async fn unfence(
    Extract(state): Extract<State>,
    Path((app, cell)): Path<(String, String)>,
    Query(query): Queried,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let asking = state.access.now().asking(&headers, &query, Role::Operator)?;
    let control = state.control.clone();
    to_its_end(async move {
        let is_same = |one: &Execution| (one.kind, &one.to) == (Kind::Unfence, &cell);
        let key = asking.key.clone();
        let act = control.unfence(&app, &cell, asking);
        control.once(&app, key.as_deref(), is_same, act).await
    })
    .await
}

async fn retry(
    Extract(state): Extract<State>,
    Path((app, id)): Path<(String, u64)>,
    Query(query): Queried,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let asking = state.access.now().asking(&headers, &query, Role::Operator)?;
    let control = state.control.clone();
    to_its_end(async move { control.retry(&app, id, asking).await }).await
}

/// What is asked for runs to its end also if whoever asked for it hangs up.
async fn to_its_end<T: Serialize + Send + 'static, E: Into<ApiError> + Send + 'static>(
    act: impl Future<Output = Result<T, E>> + Send + 'static,
) -> Result<Response, ApiError> {
    match tokio::spawn(act).await {
        Ok(done) => Ok(Json(done.map_err(Into::into)?).into_response()),
        Err(error) => Err(ApiError(StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    }
}

/// `holdfast audit` shows this.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Audit {
    /// The newest, oldest first.
    pub(crate) records: Vec<Record>,
    /// How many there are; none if not all are there as they were.
    pub(crate) verified: Option<u64>,
    /// Where they are not.
    pub(crate) broken: Option<String>,
}

async fn audit(
    Extract(state): Extract<State>,
    headers: HeaderMap,
) -> Result<Json<Audit>, ApiError> {
    state.access.now().allow(&headers, Role::Viewer)?;
    let records = state.control.audit()?;
    let (verified, broken) = match state.control.verify_audit()? {
        Ok(count) => (Some(count), None),
        Err(broken) => (None, Some(format!("record {} {}", broken.number, broken.what))),
    };
    Ok(Json(Audit { records, verified, broken }))
}

async fn executions(
    Extract(state): Extract<State>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    state.access.now().allow(&headers, Role::Viewer)?;
    let mut all = Vec::new();
    for app in state.control.config.apps.keys() {
        all.extend(state.control.executions(app)?);
    }
    Ok(Json(all).into_response())
}

async fn metrics(Extract(state): Extract<State>) -> Response {
    let mut out = String::new();
    if let Some(proxy) = &state.proxy {
        proxy.write_metrics(&mut out);
    }
    for name in state.control.config.apps.keys() {
        if let Ok(application) = state.control.application(name) {
            let line = |value| vec![(format!("{{app=\"{name}\"}}"), value)];
            let help = "Number of the grant to take writes.";
            proxy::metrics::write_metric(
                &mut out,
                "holdfast_epoch",
                "gauge",
                help,
                &line(application.epoch.0),
            );
        }
    }
    write_costs(&state, &mut out);
    let apps = state.control.config.apps.keys();
    let alarms: Vec<(String, u64)> = apps
        .flat_map(|app| {
            let line = |AlarmStatus { name, colour, .. }| {
                (format!("{{app=\"{app}\",alarm=\"{name}\",colour=\"{colour}\"}}"), 1)
            };
            alarms_of(&state.control, app).map(line).collect::<Vec<_>>()
        })
        .collect();
    let help = "Alarms, each with what it is now.";
    proxy::metrics::write_metric(&mut out, "holdfast_alarm", "gauge", help, &alarms);
    let counts = state.control.safety_counts();
    let lines = |which: &dyn Fn(&(u64, u64)) -> u64| -> Vec<(String, u64)> {
        let line = |((app, rule), counts): (&(String, String), &(u64, u64))| {
            (format!("{{app=\"{app}\",rule=\"{rule}\"}}"), which(counts))
        };
        counts.iter().map(line).collect()
    };
    let name = "holdfast_safety_rule_blocked_total";
    let help = "Changes that a safety rule was in the way of.";
    proxy::metrics::write_metric(&mut out, name, "counter", help, &lines(&|counts| counts.0));
    let name = "holdfast_safety_rule_override_total";
    let help = "Changes that were begun in spite of a safety rule.";
    proxy::metrics::write_metric(&mut out, name, "counter", help, &lines(&|counts| counts.1));
    ([("content-type", "text/plain; version=0.0.4")], out).into_response()
}

/// What the newest changes of cells have cost, and what they were to cost at most.
fn write_costs(state: &State, out: &mut String) {
    let mut write = |name, help, lines: &[(String, u64)]| {
        proxy::metrics::write_metric(out, name, "gauge", help, lines);
    };
    let apps = &state.control.config.apps;
    let objective = |of: fn(&Objectives) -> Option<u64>| -> Vec<(String, u64)> {
        let line = |(app, servers): (&String, &AppServers)| {
            Some((format!("{{app=\"{app}\"}}"), of(&servers.now().objectives)?))
        };
        apps.iter().filter_map(line).collect()
    };
    let newest: Vec<Execution> = apps
        .keys()
        .filter_map(|app| state.control.executions(app).ok())
        .flat_map(|all| {
            let of =
                |kind| all.iter().find(|one| one.kind == kind && one.ending.is_some()).cloned();
            [of(Kind::Switchover), of(Kind::Failover)].into_iter().flatten().collect::<Vec<_>>()
        })
        .collect();
    let measured = |of: fn(&Measured) -> Option<u64>| -> Vec<(String, u64)> {
        let line = |one: &Execution| {
            let labels = format!("{{app=\"{}\",kind=\"{}\"}}", one.app, one.kind.name());
            Some((labels, of(&one.measured)?))
        };
        newest.iter().filter_map(line).collect()
    };
    let help = "Milliseconds without service by the newest change of cells.";
    write("holdfast_recovery_ms", help, &measured(|one| one.without_ms));
    let help = "Milliseconds that a change of cells may take at most, as an objective.";
    write("holdfast_recovery_objective_ms", help, &objective(|one| one.rto_ms));
    let help = "Bytes of WAL that were on the lost server alone at the newest change of cells.";
    write("holdfast_loss_bytes", help, &measured(|one| one.lost_bytes));
    let help = "Bytes of WAL that may be lost at most, as an objective.";
    write("holdfast_loss_objective_bytes", help, &objective(|one| one.rpo_bytes));
}

/// 200 while every application is served by an active cell.
async fn primary(Extract(state): Extract<State>) -> (StatusCode, String) {
    served(&state, "primary", CellState::takes_writes)
}

/// 200 while every application is served by a cell that reads.
async fn read_only(Extract(state): Extract<State>) -> (StatusCode, String) {
    served(&state, "read-only", |state| state.takes_writes() || state == CellState::Fenced)
}

fn served(state: &State, what: &str, does: impl Fn(CellState) -> bool) -> (StatusCode, String) {
    match state.control.served_cells() {
        Ok(all) => {
            let lacks = all
                .iter()
                .find(|(_, served)| !served.as_ref().is_some_and(|served| does(served.state)));
            match lacks {
                None => (StatusCode::OK, format!("{what}\n")),
                Some((app, Some(served))) => {
                    let text = format!("cell `{}` of `{app}` is {}\n", served.cell, served.state);
                    (StatusCode::SERVICE_UNAVAILABLE, text)
                }
                Some((app, None)) => {
                    let text = format!("application `{app}` has no active cell\n");
                    (StatusCode::SERVICE_UNAVAILABLE, text)
                }
            }
        }
        Err(error) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("{}\n", crate::config::chain(&error)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    /// Whatever is served is written down, and nothing else is.
    #[test]
    fn the_document_has_every_route() {
        let document: serde_json::Value = serde_json::from_str(super::OPENAPI).unwrap();
        let written: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, item)| {
                let methods = item.as_object().unwrap().keys().cloned();
                methods.map(|method| (path.clone(), method)).collect::<Vec<_>>()
            })
            .collect();
        let source = include_str!("api.rs");
        let begin = source.find("Router::new()").unwrap();
        let routes = &source[begin..source[begin..].find(".with_state").unwrap() + begin];
        let served: BTreeSet<(String, String)> = routes
            .split(".route(\"")
            .skip(1)
            .map(|text| {
                let (path, rest) = text.split_once("\", ").unwrap();
                let (method, _) = rest.split_once('(').unwrap();
                (path.to_owned(), method.to_owned())
            })
            .collect();
        assert!(served.len() > 10);
        assert_eq!(served, written);
        // Every reference leads somewhere.
        for reference in super::OPENAPI.split("\"#").skip(1) {
            let path = reference.split('"').next().unwrap();
            assert!(document.pointer(path).is_some(), "{path}");
        }
    }
}
