//! The way to control: one connection, one request at a time, each with its deadline.

use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use pg::Address;
use serde::Serialize;
use serde::de::DeserializeOwned;
use thiserror::Error;
use tls::mutual::Mutual;
use tokio::time::timeout;

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
}

pub struct Client {
    address: Address,
    tls: Option<Mutual>,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Client {
    pub fn new(address: Address, tls: Option<Mutual>) -> Client {
        Client { address, tls, sender: None }
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let stream = connect(&self.address, self.tls.as_ref()).await;
        let stream = stream
            .map_err(|source| ClientError::Connect { address: self.address.clone(), source })?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // It ends when the sender is dropped.
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn post_at_leisure<Q: Serialize, A: DeserializeOwned>(
        &mut self,
        path: &str,
        question: &Q,
    ) -> Result<A, ClientError> {
        let mut sender = match self.sender.take() {
            Some(sender) if !sender.is_closed() => sender,
            _ => self.connect().await?,
        };
        let unreadable = |error: &dyn std::fmt::Display| ClientError::Unreadable(error.to_string());
        let body = serde_json::to_vec(question).map_err(|error| unreadable(&error))?;
        let request = hyper::Request::post(path)
            .header("host", self.address.to_string())
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| unreadable(&error))?;
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_LEN_MAX).collect().await;
        let body = body.map_err(|error| ClientError::Unreadable(error.to_string()))?.to_bytes();
        self.sender = Some(sender);
        if !status.is_success() {
            return Err(ClientError::Refused(String::from_utf8_lossy(&body).into_owned()));
        }
        serde_json::from_slice(&body).map_err(|error| unreadable(&error))
    }

    /// Sends a question, on a new connection if the last one failed.
    pub async fn post<Q: Serialize, A: DeserializeOwned>(
        &mut self,
        path: &str,
        question: &Q,
        limit: Duration,
    ) -> Result<A, ClientError> {
        match timeout(limit, self.post_at_leisure(path, question)).await {
            Ok(answer) => answer,
            Err(_) => Err(ClientError::Late { address: self.address.clone(), limit }),
        }
    }
}
