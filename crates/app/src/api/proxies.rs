//! What proxies of other processes ask of control.

use std::sync::Arc;

use axum::Router;
use axum::extract::{ConnectInfo, Json, State as Extract};
use axum::routing::post;
use control::Control;
use model::proxies::{
    Bye, Fetch, FetchCancels, Fetched, FetchedCancels, Finished, Renew, Renewed, Sender, Stray,
};
use serde_json::json;

use super::ApiError;
use super::agents::Who;

type Heard = Json<serde_json::Value>;

pub(super) fn routes() -> Router<Arc<Control>> {
    Router::new()
        .route("/v1/proxies/renew", post(renew))
        .route("/v1/proxies/orders", post(orders))
        .route("/v1/proxies/finished", post(finished))
        .route("/v1/proxies/cancel", post(cancel))
        .route("/v1/proxies/cancels", post(cancels))
        .route("/v1/proxies/bye", post(bye))
}

/// A proxy speaks for itself and for no other.
fn check(who: &Who, sender: &Sender) -> Result<(), ApiError> {
    who.check(&link::proxy_name(&sender.name))
}

async fn renew(
    Extract(control): Extract<Arc<Control>>,
    ConnectInfo(who): ConnectInfo<Who>,
    Json(asked): Json<Renew>,
) -> Result<Json<Renewed>, ApiError> {
    check(&who, &asked.sender)?;
    Ok(Json(control.renew_proxy(asked, who.0.address.ip())?))
}

async fn orders(
    Extract(control): Extract<Arc<Control>>,
    ConnectInfo(who): ConnectInfo<Who>,
    Json(asked): Json<Fetch>,
) -> Result<Json<Fetched>, ApiError> {
    check(&who, &asked.sender)?;
    Ok(Json(control.fetch_for_proxy(&asked).await?))
}

async fn finished(
    Extract(control): Extract<Arc<Control>>,
    ConnectInfo(who): ConnectInfo<Who>,
    Json(finished): Json<Finished>,
) -> Result<Heard, ApiError> {
    check(&who, &finished.sender)?;
    control.proxy_finished(finished)?;
    Ok(Json(json!({})))
}

async fn cancel(
    Extract(control): Extract<Arc<Control>>,
    ConnectInfo(who): ConnectInfo<Who>,
    Json(stray): Json<Stray>,
) -> Result<Heard, ApiError> {
    check(&who, &stray.sender)?;
    control.cancel_strayed(stray)?;
    Ok(Json(json!({})))
}

async fn cancels(
    Extract(control): Extract<Arc<Control>>,
    ConnectInfo(who): ConnectInfo<Who>,
    Json(asked): Json<FetchCancels>,
) -> Result<Json<FetchedCancels>, ApiError> {
    check(&who, &asked.sender)?;
    Ok(Json(control.cancels_for_proxy(&asked).await?))
}

async fn bye(
    Extract(control): Extract<Arc<Control>>,
    ConnectInfo(who): ConnectInfo<Who>,
    Json(bye): Json<Bye>,
) -> Result<Heard, ApiError> {
    check(&who, &bye.sender)?;
    control.proxy_ends(&bye)?;
    Ok(Json(json!({})))
}
