//! What agents ask of control.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Json, State as Extract};
use axum::http::StatusCode;
use axum::routing::post;
use axum::serve::IncomingStream;
use control::Control;
use link::{Peer, Stream, accept};
use model::agent::{Fetch, Fetched, Finished, Renew, Renewed, Sender};
use serde_json::json;
use tls::mutual::Mutual;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::ApiError;

/// Longest question of an agent.
const QUESTION_LEN_MAX: usize = 4 * 1024 * 1024;
/// Handshakes that may be under way.
const HANDSHAKES_MAX: usize = 256;
/// After a connection could not be taken.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves agents until the task is dropped.
pub(crate) async fn serve(
    listener: TcpListener,
    tls: Option<Mutual>,
    control: Arc<Control>,
) -> std::io::Result<()> {
    let (tx, accepted) = mpsc::channel(HANDSHAKES_MAX);
    let address = listener.local_addr()?;
    tokio::spawn(take(listener, tls, tx));
    let routes = routes(control).into_make_service_with_connect_info::<Who>();
    axum::serve(Accepted { accepted, address }, routes).await
}

type Taken = (Stream, Who);

/// Takes connections, each with its handshake in a task of its own. Whoever does not get on with it gives way to others: an
/// agent shakes hands in a few milliseconds.
async fn take(listener: TcpListener, tls: Option<Mutual>, taken: mpsc::Sender<Taken>) {
    let mut handshakes: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let (socket, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "an agent cannot be taken");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        handshakes.retain(|handshake| !handshake.is_finished());
        if handshakes.len() >= HANDSHAKES_MAX
            && let Some(oldest) = handshakes.pop_front()
        {
            oldest.abort();
        }
        let (tls, taken) = (tls.clone(), taken.clone());
        let handshake = tokio::spawn(async move {
            match accept(socket, tls.as_ref()).await {
                // The receiver takes all that come.
                Ok((stream, peer)) => drop(taken.send((stream, Who { peer, address })).await),
                Err(error) => tracing::debug!(%address, %error, "whoever connects is no agent"),
            }
        });
        handshakes.push_back(handshake.abort_handle());
    }
}

/// Who has connected.
#[derive(Debug, Clone)]
pub(super) struct Who {
    peer: Peer,
    pub(super) address: SocketAddr,
}

impl Who {
    /// Speaks for whoever has this name and for no other.
    pub(super) fn check(&self, name: &str) -> Result<(), ApiError> {
        if self.peer.is(name) {
            return Ok(());
        }
        let shown = match &self.peer {
            Peer::Named(name) => name,
            Peer::Here => "",
        };
        let text = format!("the certificate of `{shown}` is not that of `{name}`");
        Err(ApiError(StatusCode::FORBIDDEN, text))
    }
}

impl Connected<IncomingStream<'_, Accepted>> for Who {
    fn connect_info(stream: IncomingStream<'_, Accepted>) -> Who {
        stream.remote_addr().clone()
    }
}

/// Connections whose handshake is over.
struct Accepted {
    accepted: mpsc::Receiver<Taken>,
    address: SocketAddr,
}

impl axum::serve::Listener for Accepted {
    type Io = Stream;
    type Addr = Who;

    async fn accept(&mut self) -> Taken {
        match self.accepted.recv().await {
            Some(taken) => taken,
            // Nobody takes any more.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> std::io::Result<Who> {
        let address = self.address;
        Ok(Who { peer: Peer::Named(address.to_string()), address })
    }
}

fn routes(control: Arc<Control>) -> Router {
    Router::new()
        .route("/v1/agents/renew", post(renew))
        .route("/v1/agents/orders", post(orders))
        .route("/v1/agents/finished", post(finished))
        .merge(super::proxies::routes())
        .layer(DefaultBodyLimit::max(QUESTION_LEN_MAX))
        .with_state(control)
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
    Ok(Json(control.renew(&asked)?))
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
