//! Taking connections, and answering questions.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
pub use hyper::body::Bytes;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tls::mutual::Mutual;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;

use crate::transport::{Peer, Protocol, Stream, accept};

/// Handshakes that may be under way, and connections that may wait to be taken.
const HANDSHAKES_MAX: usize = 256;
/// After a connection could not be taken.
const PAUSE: Duration = Duration::from_millis(100);
/// How long the head of a question may take to come.
const HEAD_MAX: Duration = Duration::from_secs(10);
/// Longest question of those that [`answer`] answers.
const QUESTION_LEN_MAX: usize = 64 * 1024;
/// Connections of those.
const CONNECTIONS_MAX: usize = 64;
/// Questions that one connection may ask at a time.
const STREAMS_MAX: u32 = 16;

/// Whoever has connected.
#[derive(Debug, Clone)]
pub struct Who {
    pub peer: Peer,
    pub address: SocketAddr,
    pub protocol: Protocol,
}

impl Who {
    /// # Errors
    /// It does not speak for whoever has this name.
    pub fn check(&self, name: &str) -> Result<(), String> {
        match &self.peer {
            peer if peer.is(name) => Ok(()),
            Peer::Named(shown) => {
                Err(format!("the certificate of `{shown}` is not that of `{name}`"))
            }
            Peer::Here => Ok(()),
        }
    }
}

/// Takes connections until the receiver is dropped.
pub fn take(listener: TcpListener, tls: Option<Mutual>) -> mpsc::Receiver<(Stream, Who)> {
    let (taken, accepted) = mpsc::channel(HANDSHAKES_MAX);
    tokio::spawn(run(listener, tls, taken));
    accepted
}

/// Each handshake is in a task of its own. Whoever does not get on with it gives way to others: one of ours takes a few
/// milliseconds.
async fn run(listener: TcpListener, tls: Option<Mutual>, taken: mpsc::Sender<(Stream, Who)>) {
    let mut handshakes: VecDeque<AbortHandle> = VecDeque::new();
    while !taken.is_closed() {
        let Ok((socket, address)) = listener.accept().await else {
            // Too many descriptors, for one.
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        handshakes.retain(|handshake| !handshake.is_finished());
        if handshakes.len() >= HANDSHAKES_MAX
            && let Some(oldest) = handshakes.pop_front()
        {
            oldest.abort();
        }
        let (tls, taken) = (tls.clone(), taken.clone());
        let handshake = tokio::spawn(async move {
            // Whoever shows no certificate of ours is nobody.
            if let Ok((stream, protocol, peer)) = accept(socket, tls.as_ref()).await {
                // The receiver takes all that come.
                let _ = taken.send((stream, Who { peer, address, protocol })).await;
            }
        });
        handshakes.push_back(handshake.abort_handle());
    }
}

/// Answers questions to `path`, each by its text, until the task is dropped. What `answer` refuses is refused with its reason.
pub async fn answer<F, A>(listener: TcpListener, tls: Option<Mutual>, path: &'static str, answer: F)
where
    F: Fn(Who, Bytes) -> A + Send + Sync + 'static,
    A: Future<Output = Result<Vec<u8>, String>> + Send + 'static,
{
    let answer = Arc::new(answer);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut accepted = take(listener, tls);
    while let Some((stream, who)) = accepted.recv().await {
        let Ok(place) = places.clone().try_acquire_owned() else { continue };
        let answer = answer.clone();
        tokio::spawn(async move {
            let _place = place;
            let (stream, protocol) = (TokioIo::new(stream), who.protocol);
            let service = service_fn(move |request: Request<Incoming>| {
                let (answer, who) = (answer.clone(), who.clone());
                async move { Ok::<_, Infallible>(respond(request, path, who, &*answer).await) }
            });
            let _ = match protocol {
                Protocol::Http1 => {
                    let mut builder = http1::Builder::new();
                    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_MAX);
                    builder.serve_connection(stream, service).await
                }
                Protocol::Http2 => {
                    let mut builder = http2::Builder::new(TokioExecutor::new());
                    builder.timer(TokioTimer::new()).max_concurrent_streams(STREAMS_MAX);
                    // One that is gone without a word has its place no longer.
                    builder.keep_alive_interval(HEAD_MAX).keep_alive_timeout(HEAD_MAX);
                    builder.serve_connection(stream, service).await
                }
            };
        });
    }
}

async fn respond<F, A>(
    request: Request<Incoming>,
    path: &str,
    who: Who,
    answer: &F,
) -> Response<Full<Bytes>>
where
    F: Fn(Who, Bytes) -> A,
    A: Future<Output = Result<Vec<u8>, String>>,
{
    let respond = |status: StatusCode, body: Vec<u8>| {
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = status;
        response
    };
    if request.method() != hyper::Method::POST || request.uri().path() != path {
        return respond(StatusCode::NOT_FOUND, Vec::new());
    }
    let body = Limited::new(request.into_body(), QUESTION_LEN_MAX).collect();
    let Ok(Ok(body)) = tokio::time::timeout(HEAD_MAX, body).await else {
        return respond(StatusCode::BAD_REQUEST, Vec::new());
    };
    match answer(who, body.to_bytes()).await {
        Ok(text) => respond(StatusCode::OK, text),
        Err(why) => respond(StatusCode::FORBIDDEN, why.into_bytes()),
    }
}
