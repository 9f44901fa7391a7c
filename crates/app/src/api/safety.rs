//! Safety rules and gates over HTTP.

use axum::extract::{Json, Path, Query, State as Extract};
use axum::http::HeaderMap;
use control::safety::Safety;
use serde::{Deserialize, Serialize};

use super::access::Role;
use super::{ApiError, Queried, State};

/// What a gate is to be.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Gate {
    pub(crate) open: bool,
}

pub(super) async fn show(
    Extract(state): Extract<State>,
    Path(app): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Safety>, ApiError> {
    state.access.now().allow(&headers, Role::Viewer)?;
    Ok(Json(state.control.safety(&app)?))
}

/// Whoever changes cells does not open the gate before them.
pub(super) async fn set_gate(
    Extract(state): Extract<State>,
    Path((app, gate)): Path<(String, String)>,
    Query(query): Queried,
    headers: HeaderMap,
    Json(request): Json<Gate>,
) -> Result<Json<Safety>, ApiError> {
    let asking = state.access.now().asking(&headers, &query, Role::Approver)?;
    state.control.set_gate(&app, &gate, request.open, &asking)?;
    Ok(Json(state.control.safety(&app)?))
}
