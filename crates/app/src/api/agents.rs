//! What agents ask of control.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Json, Request, State as Extract};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::serve::IncomingStream;
use control::Control;
use link::{Peer, Protocol, Stream};
use model::agent::{Fetch, Fetched, Finished, Renew, Renewed, Sender};
use serde_json::json;
use tls::mutual::Mutual;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::ApiError;

/// Longest question of an agent.
const QUESTION_LEN_MAX: usize = 4 * 1024 * 1024;

/// Serves agents and proxies until the task is dropped.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Option<Mutual>,
    control: Arc<Control>,
) -> std::io::Result<()> {
    let address = listener.local_addr()?;
    let accepted = link::server::take(listener, tls);
    let routes = routes(control).into_make_service_with_connect_info::<Who>();
    axum::serve(Accepted { accepted, address }, routes).await
}

/// Who has connected.
#[derive(Debug, Clone)]
pub(super) struct Who(pub(super) link::Who);

impl Who {
    /// Speaks for whoever has this name and for no other.
    pub(super) fn check(&self, name: &str) -> Result<(), ApiError> {
        self.0.check(name).map_err(|text| ApiError(StatusCode::FORBIDDEN, text))
    }
}

impl Connected<IncomingStream<'_, Accepted>> for Who {
    fn connect_info(stream: IncomingStream<'_, Accepted>) -> Who {
        stream.remote_addr().clone()
    }
}

/// Connections whose handshake is over.
struct Accepted {
    accepted: mpsc::Receiver<(Stream, link::Who)>,
    address: SocketAddr,
}

impl axum::serve::Listener for Accepted {
    type Io = Stream;
    type Addr = Who;

    async fn accept(&mut self) -> (Stream, Who) {
        match self.accepted.recv().await {
            Some((stream, who)) => (stream, Who(who)),
            // Nobody takes any more.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<Who> {
        let address = self.address;
        let peer = Peer::Named(address.to_string());
        Ok(Who(link::Who { peer, address, protocol: Protocol::Http1 }))
    }
}

fn routes(control: Arc<Control>) -> Router {
    Router::new()
        .route("/v1/agents/renew", post(renew))
        .route("/v1/agents/orders", post(orders))
        .route("/v1/agents/finished", post(finished))
        .merge(super::proxies::routes())
        .layer(DefaultBodyLimit::max(QUESTION_LEN_MAX))
        .layer(middleware::from_fn_with_state(control.clone(), by_the_seat))
        .with_state(control)
}

/// Whoever is not control any more answers nothing: what is asked here is counted from when it was asked, so a seat that was
/// valid since then is enough. Each answer says whose it is.
async fn by_the_seat(
    Extract(control): Extract<Arc<Control>>,
    request: Request,
    next: Next,
) -> Response {
    let is_over = || {
        let text = "this node is not control any more".into();
        ApiError(StatusCode::SERVICE_UNAVAILABLE, text).into_response()
    };
    if !control.seat.is_valid() {
        return is_over();
    }
    let mut response = next.run(request).await;
    // Orders that were waited for.
    if !control.seat.is_valid() {
        return is_over();
    }
    let tenure = HeaderValue::from(control.seat.tenure().0);
    response.headers_mut().insert(link::TENURE_HEADER, tenure);
    response
}

/// An agent speaks for its cell and for no other.
fn check(who: &Who, Sender { app, cell, .. }: &Sender) -> Result<(), ApiError> {
    who.check(&link::agent_name(app, cell))
}

async fn renew(
    Extract(control): Extract<Arc<Control>>,
    ConnectInfo(who): ConnectInfo<Who>,
    Json(asked): Json<Renew>,
) -> Result<Json<Renewed>, ApiError> {
    check(&who, &asked.sender)?;
    Ok(Json(control.renew(&asked).await?))
}

async fn orders(
    Extract(control): Extract<Arc<Control>>,
    ConnectInfo(who): ConnectInfo<Who>,
    Json(asked): Json<Fetch>,
) -> Result<Json<Fetched>, ApiError> {
    check(&who, &asked.sender)?;
    Ok(Json(control.fetch(&asked).await?))
}

async fn finished(
    Extract(control): Extract<Arc<Control>>,
    ConnectInfo(who): ConnectInfo<Who>,
    Json(finished): Json<Finished>,
) -> Result<Json<serde_json::Value>, ApiError> {
    check(&who, &finished.sender)?;
    control.finished(finished)?;
    Ok(Json(json!({})))
}
