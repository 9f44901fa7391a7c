//! What agents ask of control.

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Json, State as Extract};
use axum::routing::post;
use control::Control;
use model::agent::{Fetch, Fetched, Finished, Renew, Renewed};
use serde_json::json;

use super::ApiError;

/// Longest question of an agent.
const QUESTION_LEN_MAX: usize = 4 * 1024 * 1024;

pub(crate) fn routes(control: Arc<Control>) -> Router {
    Router::new()
        .route("/v1/agents/renew", post(renew))
        .route("/v1/agents/orders", post(orders))
        .route("/v1/agents/finished", post(finished))
        .layer(DefaultBodyLimit::max(QUESTION_LEN_MAX))
        .with_state(control)
}

async fn renew(
    Extract(control): Extract<Arc<Control>>,
    Json(asked): Json<Renew>,
) -> Result<Json<Renewed>, ApiError> {
    Ok(Json(control.renew(&asked)?))
}

async fn orders(
    Extract(control): Extract<Arc<Control>>,
    Json(asked): Json<Fetch>,
) -> Result<Json<Fetched>, ApiError> {
    Ok(Json(control.fetch(&asked).await?))
}

async fn finished(
    Extract(control): Extract<Arc<Control>>,
    Json(finished): Json<Finished>,
) -> Result<Json<serde_json::Value>, ApiError> {
    control.finished(finished)?;
    Ok(Json(json!({})))
}
