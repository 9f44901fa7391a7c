//! What is different in the configuration file, and taking it up.

use axum::extract::{Json, Query, State as Extract};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;

use super::access::Role;
use super::{ApiError, Queried, State, to_its_end};
use crate::loaded::{self, Changes, Loaded};

fn loaded(state: &State) -> Result<&Loaded, ApiError> {
    state.loaded.as_deref().ok_or_else(|| {
        let text = "this process was started without a configuration file";
        ApiError(StatusCode::NOT_FOUND, text.into())
    })
}

fn refused(why: String) -> ApiError {
    ApiError(StatusCode::BAD_REQUEST, why)
}

pub(super) async fn diff(
    Extract(state): Extract<State>,
    headers: HeaderMap,
) -> Result<Json<Changes>, ApiError> {
    state.access.now().allow(&headers, Role::Operator)?;
    Ok(Json(loaded::diff(loaded(&state)?, &state.control).await.map_err(refused)?))
}

pub(super) async fn apply(
    Extract(state): Extract<State>,
    Query(query): Queried,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let asking = state.access.now().asking(&headers, &query, Role::Admin)?;
    // Clients may be held meanwhile.
    to_its_end(async move {
        let changes = loaded::take_up(loaded(&state)?, &state.control).await.map_err(refused)?;
        tracing::info!(by = asking.by, "{}", changes.says());
        state.control.note_configuration(asking, changes.says())?;
        Ok::<Changes, ApiError>(changes)
    })
    .await
}
