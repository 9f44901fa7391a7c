//! Plans over HTTP: what there are, how their executions go, and what people say to them.

use axum::extract::{Json, Path, Query, State as Extract};
use axum::http::{HeaderMap, StatusCode};
use control::config::AppServers;
use control::plans::{PlanRequest, Say};
use model::plan::run::PlanExecution;
use model::plan::{Action, Mode, Plan, What};
use serde::{Deserialize, Serialize};

use super::access::Role;
use super::{ApiError, Queried, State};

/// What is said, and to which step or mode.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Said {
    #[serde(default)]
    pub(crate) step: Option<String>,
    #[serde(default)]
    pub(crate) mode: Option<Mode>,
}

pub(super) async fn list(
    Extract(state): Extract<State>,
    Path(app): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Vec<Plan>>, ApiError> {
    state.access.now().allow(&headers, Role::Viewer)?;
    state.control.application(&app)?;
    let settings = state.control.config.apps.get(&app).map(AppServers::now);
    let plans = settings.as_ref().map(|settings| settings.plans.values());
    Ok(Json(plans.into_iter().flatten().cloned().collect()))
}

pub(super) async fn executions(
    Extract(state): Extract<State>,
    headers: HeaderMap,
) -> Result<Json<Vec<PlanExecution>>, ApiError> {
    state.access.now().allow(&headers, Role::Viewer)?;
    let mut all = Vec::new();
    for app in state.control.config.apps.keys() {
        all.extend(state.control.plan_executions(app)?);
    }
    Ok(Json(all))
}

pub(super) async fn one(
    Extract(state): Extract<State>,
    Path((app, id)): Path<(String, u64)>,
    headers: HeaderMap,
) -> Result<Json<PlanExecution>, ApiError> {
    state.access.now().allow(&headers, Role::Viewer)?;
    Ok(Json(state.control.plan_execution(&app, id)?))
}

/// A plan that may give up what is lost, in the mode in which it may.
fn gives_up(plan: &Plan, mode: Mode) -> bool {
    mode == Mode::Ungraceful
        && plan.all_steps().iter().any(|step| {
            matches!(&step.what, What::Do(Action::Activate { allow_data_loss: true, .. }))
        })
}

fn role_for(plan: &Plan, mode: Mode) -> Role {
    if gives_up(plan, mode) { Role::Admin } else { Role::Operator }
}

pub(super) async fn execute(
    Extract(state): Extract<State>,
    Path((app, plan)): Path<(String, String)>,
    Query(query): Queried,
    headers: HeaderMap,
    Json(request): Json<PlanRequest>,
) -> Result<axum::response::Response, ApiError> {
    use axum::response::IntoResponse;
    let settings = state.control.config.apps.get(&app).map(AppServers::now);
    let known = settings.as_ref().and_then(|settings| settings.plans.get(&plan));
    let role = known.map_or(Role::Operator, |plan| role_for(plan, request.mode));
    let asking = state.access.now().asking(&headers, &query, role)?;
    if request.dry_run {
        return Ok(Json(state.control.plan_dry_run(&app, &plan, &request).await?).into_response());
    }
    Ok(Json(state.control.begin_plan(&app, &plan, &request, &asking)?).into_response())
}

pub(super) async fn say(
    Extract(state): Extract<State>,
    Path((app, id, verb)): Path<(String, u64, String)>,
    Query(query): Queried,
    headers: HeaderMap,
    Json(said): Json<Said>,
) -> Result<Json<PlanExecution>, ApiError> {
    // Whoever may say nothing learns nothing.
    state.access.now().allow(&headers, Role::Viewer)?;
    let wrong = |text: String| ApiError(StatusCode::BAD_REQUEST, text);
    let Said { step, mode } = said;
    let of_step = |say: fn(String) -> Say| {
        step.clone().map(say).ok_or_else(|| wrong(format!("`{verb}` needs a `step`")))
    };
    let say = match verb.as_str() {
        "approve" => of_step(Say::Approve)?,
        "decline" => of_step(Say::Decline)?,
        "retry" => of_step(Say::Retry)?,
        "skip" => of_step(Say::Skip)?,
        "pause" => Say::Pause,
        "resume" => Say::Resume,
        "cancel" => Say::Cancel,
        "mode" => Say::Switch(mode.ok_or_else(|| wrong("`mode` needs a `mode`".into()))?),
        _ => {
            let known = "approve, decline, retry, skip, pause, resume, cancel, mode";
            let text = format!("nobody can `{verb}` an execution: known are {known}");
            return Err(ApiError(StatusCode::NOT_FOUND, text));
        }
    };
    let role = match &say {
        Say::Approve(_) | Say::Decline(_) => Role::Approver,
        Say::Switch(mode) => role_for(&state.control.plan_execution(&app, id)?.plan, *mode),
        // Whatever it does then may be what only an admin could begin.
        Say::Retry(_) | Say::Resume => {
            let execution = state.control.plan_execution(&app, id)?;
            role_for(&execution.plan, execution.mode)
        }
        Say::Skip(_) | Say::Pause | Say::Cancel => Role::Operator,
    };
    let asking = state.access.now().asking(&headers, &query, role)?;
    Ok(Json(state.control.say_to_plan(&app, id, &say, &asking)?))
}
