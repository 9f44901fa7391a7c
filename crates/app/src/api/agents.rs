//! What agents ask of control.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use agent::transport::{Peer, Stream, accept};
use axum::Router;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Json, State as Extract};
use axum::http::StatusCode;
use axum::routing::post;
use axum::serve::IncomingStream;
use control::Control;
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
                Ok((stream, peer)) => drop(taken.send((stream, Who { peer })).await),
                Err(error) => tracing::debug!(%address, %error, "whoever connects is no agent"),
            }
        });
        handshakes.push_back(handshake.abort_handle());
    }
}

/// Who has connected.
#[derive(Debug, Clone)]
struct Who {
    peer: Peer,
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
        Ok(Who { peer: Peer::Named(self.address.to_string()) })
    }
}

fn routes(control: Arc<Control>) -> Router {
    Router::new()
        .route("/v1/agents/renew", post(renew))
        .route("/v1/agents/orders", post(orders))
        .route("/v1/agents/finished", post(finished))
        .layer(DefaultBodyLimit::max(QUESTION_LEN_MAX))
        .with_state(control)
}

/// An agent speaks for its cell and for no other.
fn check(who: &Who, Sender { app, cell, .. }: &Sender) -> Result<(), ApiError> {
    if who.peer.is_agent_of(app, cell) {
        return Ok(());
    }
    let name = match &who.peer {
        Peer::Named(name) => name,
        Peer::Here => "",
    };
    let text = format!("the certificate of `{name}` is not that of the agent `{app}/{cell}`");
    Err(ApiError(StatusCode::FORBIDDEN, text))
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
