//! The way to control: one connection, one request at a time, each with its deadline.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use model::seat::Tenure;
use pg::Address;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tls::mutual::Mutual;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::TENURE_HEADER;
use crate::transport::connect;

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
}

impl Controls {
    pub fn new(addresses: Vec<Address>, tls: Option<Mutual>) -> Arc<Controls> {
        Arc::new(Controls {
            addresses,
            tls,
            at: watch::Sender::new(0),
            heard: Mutex::new(Tenure::default()),
        })
    }

    pub fn client(self: &Arc<Controls>) -> Client {
        Client { controls: self.clone(), at: 0, sender: None, tenure: Tenure::default() }
    }

    /// Whoever asks next asks the next node.
    pub fn turn(&self) {
        if self.addresses.len() > 1 {
            self.at.send_modify(|at| *at = at.wrapping_add(1));
        }
    }

    fn heard(&self) -> MutexGuard<'_, Tenure> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
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
    sender: Option<SendRequest<Full<Bytes>>>,
    tenure: Tenure,
}

impl Client {
    /// That of whoever has answered last.
    pub fn tenure(&self) -> Tenure {
        self.tenure
    }

    async fn connect(&self, address: &Address) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let stream = connect(address, self.controls.tls.as_ref()).await;
        let stream =
            stream.map_err(|source| ClientError::Connect { address: address.clone(), source })?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // It ends when the sender is dropped.
        tokio::spawn(connection);
        Ok(sender)
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
        let unreadable = |error: &dyn std::fmt::Display| ClientError::Unreadable(error.to_string());
        let body = serde_json::to_vec(question).map_err(|error| unreadable(&error))?;
        let request = hyper::Request::post(path)
            .header("host", address.to_string())
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| unreadable(&error))?;
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let tenure = answer.headers().get(TENURE_HEADER).and_then(|value| value.to_str().ok());
        let tenure = Tenure(tenure.and_then(|value| value.parse().ok()).unwrap_or(0));
        let body = Limited::new(answer.into_body(), ANSWER_LEN_MAX).collect().await;
        let body = body.map_err(|error| ClientError::Unreadable(error.to_string()))?.to_bytes();
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
