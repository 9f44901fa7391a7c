//! The way to control: one connection for all who ask where it speaks HTTP/2, else one for each, and a deadline for each question.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use model::seat::Tenure;
use pg::Address;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tls::mutual::Mutual;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::TENURE_HEADER;
use crate::transport::{Protocol, connect};

/// Longest answer.
const ANSWER_LEN_MAX: usize = 4 * 1024 * 1024;

#[derive(Debug, Error)]
pub enum ClientError {
    #[error("control at `{address}` cannot be reached")]
    Connect { address: Address, source: std::io::Error },
    #[error("control at `{address}` does not answer within {limit:?}")]
    Late { address: Address, limit: Duration },
    #[error("the connection to control is broken")]
    Http(#[from] hyper::Error),
    #[error("control's answer cannot be read: {0}")]
    Unreadable(String),
    #[error("control refuses: {0}")]
    Refused(String),
    #[error(
        "an earlier control answers at `{address}`: its tenure is {}, {} was heard", .found.0, .heard.0
    )]
    Earlier { address: Address, found: Tenure, heard: Tenure },
    #[error("control is at another address since it was asked")]
    Moved,
}

/// The nodes of which one is control, which of them that seems to be, and the highest tenure that was heard.
#[derive(Debug)]
pub struct Controls {
    addresses: Vec<Address>,
    tls: Option<Mutual>,
    at: watch::Sender<usize>,
    heard: Mutex<Tenure>,
    /// The connection that all share.
    shared: Mutex<Option<Shared>>,
}

/// A connection to one of the nodes.
#[derive(Debug, Clone)]
struct Shared {
    at: usize,
    sender: http2::SendRequest<Full<Bytes>>,
    /// All that use this connection have this one.
    mark: Arc<()>,
}

enum Sender {
    Own(http1::SendRequest<Full<Bytes>>),
    Shared(Shared),
}

impl Sender {
    fn is_closed(&self) -> bool {
        match self {
            Sender::Own(sender) => sender.is_closed(),
            Sender::Shared(shared) => shared.sender.is_closed(),
        }
    }

    fn mark(&self) -> Option<Arc<()>> {
        match self {
            Sender::Own(_) => None,
            Sender::Shared(shared) => Some(shared.mark.clone()),
        }
    }

    async fn send(
        &mut self,
        address: &Address,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, ClientError> {
        let request = Request::post(match self {
            Sender::Own(_) => path.to_owned(),
            // Whom it is for is in a field of its own there, which is taken from here (RFC 9113, 8.3.1).
            Sender::Shared(_) => format!("https://{address}{path}"),
        });
        let request = request.header("content-type", "application/json");
        let request = match self {
            Sender::Own(_) => request.header("host", address.to_string()),
            Sender::Shared(_) => request,
        };
        let request = request.body(Full::new(Bytes::from(body)));
        let request = request.map_err(|error| ClientError::Unreadable(error.to_string()))?;
        Ok(match self {
            Sender::Own(sender) => sender.send_request(request).await?,
            Sender::Shared(shared) => shared.sender.send_request(request).await?,
        })
    }
}

/// A question without an answer. If it stays so, nobody else asks on that connection.
struct Unanswered<'a> {
    controls: &'a Controls,
    mark: Option<Arc<()>>,
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        let Some(mark) = &self.mark else { return };
        let mut shared = self.controls.shared();
        if shared.as_ref().is_some_and(|shared| Arc::ptr_eq(&shared.mark, mark)) {
            *shared = None;
        }
    }
}

impl Controls {
    pub fn new(addresses: Vec<Address>, tls: Option<Mutual>) -> Arc<Controls> {
        Arc::new(Controls {
            addresses,
            tls,
            at: watch::Sender::new(0),
            heard: Mutex::new(Tenure::default()),
            shared: Mutex::new(None),
        })
    }

    pub fn client(self: &Arc<Controls>) -> Client {
        Client { controls: self.clone(), at: 0, sender: None, tenure: Tenure::default() }
    }

    /// Whoever asks next asks the next node.
    pub fn turn(&self) {
        if self.addresses.len() > 1 {
            self.shared().take();
            self.at.send_modify(|at| *at = at.wrapping_add(1));
        }
    }

    fn heard(&self) -> MutexGuard<'_, Tenure> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared(&self) -> MutexGuard<'_, Option<Shared>> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No later control was heard than the one of this tenure.
    pub fn is_latest(&self, tenure: Tenure) -> bool {
        *self.heard() <= tenure
    }

    fn address(&self, at: usize) -> Option<&Address> {
        self.addresses.get(at.checked_rem(self.addresses.len())?)
    }
}

impl std::fmt::Display for Controls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, address) in self.addresses.iter().enumerate() {
            write!(f, "{}{address}", if at == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

pub struct Client {
    controls: Arc<Controls>,
    at: usize,
    sender: Option<Sender>,
    tenure: Tenure,
}

impl Client {
    /// That of whoever has answered last.
    pub fn tenure(&self) -> Tenure {
        self.tenure
    }

    async fn connect(&self, address: &Address) -> Result<Sender, ClientError> {
        if let Some(shared) = &*self.controls.shared()
            && shared.at == self.at
            && !shared.sender.is_closed()
        {
            return Ok(Sender::Shared(shared.clone()));
        }
        let stream = connect(address, self.controls.tls.as_ref()).await;
        let (stream, protocol) =
            stream.map_err(|source| ClientError::Connect { address: address.clone(), source })?;
        // A connection ends when its senders are dropped.
        match protocol {
            Protocol::Http1 => {
                let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
                tokio::spawn(connection);
                Ok(Sender::Own(sender))
            }
            Protocol::Http2 => {
                let executor = TokioExecutor::new();
                let (sender, connection) = http2::handshake(executor, TokioIo::new(stream)).await?;
                tokio::spawn(connection);
                let shared = Shared { at: self.at, sender, mark: Arc::new(()) };
                *self.controls.shared() = Some(shared.clone());
                Ok(Sender::Shared(shared))
            }
        }
    }

    async fn post_at_leisure<Q: Serialize, A: DeserializeOwned>(
        &mut self,
        address: &Address,
        path: &str,
        question: &Q,
    ) -> Result<A, ClientError> {
        let mut sender = match self.sender.take() {
            Some(sender) if !sender.is_closed() => sender,
            _ => self.connect(address).await?,
        };
        let controls = self.controls.clone();
        let mut unanswered = Unanswered { controls: &controls, mark: sender.mark() };
        let unreadable = |error: &dyn std::fmt::Display| ClientError::Unreadable(error.to_string());
        let body = serde_json::to_vec(question).map_err(|error| unreadable(&error))?;
        let answer = sender.send(address, path, body).await?;
        let status = answer.status();
        let tenure = answer.headers().get(TENURE_HEADER).and_then(|value| value.to_str().ok());
        let tenure = Tenure(tenure.and_then(|value| value.parse().ok()).unwrap_or(0));
        let body = Limited::new(answer.into_body(), ANSWER_LEN_MAX).collect().await;
        let body = body.map_err(|error| ClientError::Unreadable(error.to_string()))?.to_bytes();
        unanswered.mark = None;
        self.sender = Some(sender);
        if !status.is_success() {
            return Err(ClientError::Refused(String::from_utf8_lossy(&body).into_owned()));
        }
        {
            let mut heard = self.controls.heard();
            if tenure < *heard {
                let address = address.clone();
                return Err(ClientError::Earlier { address, found: tenure, heard: *heard });
            }
            *heard = tenure;
        }
        self.tenure = tenure;
        serde_json::from_slice(&body).map_err(|error| unreadable(&error))
    }

    /// Sends a question, on a new connection if the last one failed or control is elsewhere since. An answer of an earlier
    /// control than was heard is none.
    pub async fn post<Q: Serialize, A: DeserializeOwned>(
        &mut self,
        path: &str,
        question: &Q,
        limit: Duration,
    ) -> Result<A, ClientError> {
        let mut moved = self.controls.at.subscribe();
        let at = *moved.borrow_and_update();
        if self.at != at {
            self.at = at;
            self.sender = None;
        }
        let Some(address) = self.controls.address(at).cloned() else {
            return Err(ClientError::Unreadable("there is no address of control".into()));
        };
        tokio::select! {
            answer = timeout(limit, self.post_at_leisure(&address, path, question)) => match answer {
                Ok(answer) => answer,
                Err(_) => Err(ClientError::Late { address, limit }),
            },
            // Its sender is in what this client has.
            _ = moved.changed() => Err(ClientError::Moved),
        }
    }
}
