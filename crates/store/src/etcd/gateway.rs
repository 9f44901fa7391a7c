//! Requests to etcd's members, each with its deadline, and what a failure says.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, RootCerts, TlsConfig, parse_pem};

use super::wire::{Answer, LoginAnswer, LoginQuestion, Refusal};
use super::{EtcdConfig, EtcdLogin, EtcdTls};
use crate::StoreError;

/// Largest answer that is read.
const ANSWER_LEN_MAX: u64 = 256 * 1024 * 1024;
const HTTP_OK: u16 = 200;
/// Codes of gRPC with which etcd says that it has not done it, and will not.
const INVALID_ARGUMENT: u32 = 3;
const PERMISSION_DENIED: u32 = 7;
const RESOURCE_EXHAUSTED: u32 = 8;
/// The token is over, or was never one.
const UNAUTHENTICATED: u32 = 16;

/// Why there is no answer, and what that says of the request.
#[derive(Debug)]
pub(super) enum Failure {
    /// No member has got it.
    NotSent(String),
    /// It may have been carried out, or may be yet.
    Unknown(String),
    /// It was not carried out, and asking again does not change that.
    Refused(String),
    /// What answers is not the store that was opened; nothing was written.
    Replaced(String),
}

#[derive(Debug)]
pub(super) struct Gateway {
    agent: ureq::Agent,
    endpoints: Vec<String>,
    /// The member that has answered last.
    at: AtomicUsize,
    login: Option<EtcdLogin>,
    token: Mutex<Option<String>>,
    /// The cluster that was found first; 0 before that.
    cluster: AtomicU64,
    /// The highest revision that was seen.
    revision: AtomicU64,
}

impl Gateway {
    pub(super) fn new(config: &EtcdConfig) -> Result<Gateway, StoreError> {
        let mut agent = ureq::Agent::config_builder()
            .timeout_global(Some(config.attempt_max))
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(None)
            .max_idle_age(Duration::from_secs(30));
        if let Some(tls) = &config.tls {
            agent = agent.tls_config(load(tls)?);
        }
        Ok(Gateway {
            agent: agent.build().into(),
            endpoints: config.endpoints.clone(),
            at: AtomicUsize::new(0),
            login: config.login.clone(),
            token: Mutex::new(None),
            cluster: AtomicU64::new(0),
            revision: AtomicU64::new(0),
        })
    }

    /// Asks one member; the next time another, if it does not answer.
    pub(super) fn ask<Q: Serialize, A: DeserializeOwned + Answer>(
        &self,
        path: &str,
        question: &Q,
    ) -> Result<A, Failure> {
        let at = self.at.load(Ordering::Relaxed);
        let before = self.revision.load(Ordering::Acquire);
        let answer = self.ask_logged_in::<Q, A>(at, path, question);
        if !matches!(answer, Ok(_) | Err(Failure::Refused(_))) {
            let _ = self.at.compare_exchange(
                at,
                at.wrapping_add(1),
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
        let answer = answer?;
        let header = answer.header();
        // What writes may have been carried out there.
        let replaced = |why: String| match path {
            "kv/range" => Failure::Replaced(why),
            _ => Failure::Unknown(why),
        };
        let cluster = self.cluster.compare_exchange(
            0,
            header.cluster_id,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        if let Err(known) = cluster
            && known != header.cluster_id
        {
            return Err(replaced(format!(
                "`{}` is of cluster {:x}, {known:x} was found before; if etcd was restored, start Holdfast again",
                self.endpoint(at),
                header.cluster_id
            )));
        }
        if header.revision < before {
            return Err(replaced(format!(
                "`{}` is at revision {}, {before} was seen before: etcd was restored from an older copy; start Holdfast again",
                self.endpoint(at),
                header.revision
            )));
        }
        self.revision.fetch_max(header.revision, Ordering::AcqRel);
        Ok(answer)
    }

    fn endpoint(&self, at: usize) -> &str {
        self.endpoints.get(at % self.endpoints.len().max(1)).map_or("", String::as_str)
    }

    fn token(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask_logged_in<Q: Serialize, A: DeserializeOwned>(
        &self,
        at: usize,
        path: &str,
        question: &Q,
    ) -> Result<A, Failure> {
        let Some(EtcdLogin { user, password }) = &self.login else {
            return self.post(at, path, question, None).map_err(|(failure, _)| failure);
        };
        let known = self.token().clone();
        let token = match known {
            Some(token) => token,
            None => {
                let question = LoginQuestion { name: user, password };
                let answer = self.post::<_, LoginAnswer>(at, "auth/authenticate", &question, None);
                // Whatever became of it, nothing was asked yet.
                let LoginAnswer { token } = answer.map_err(|(failure, _)| match failure {
                    Failure::Unknown(why) => Failure::NotSent(why),
                    other => other,
                })?;
                *self.token() = Some(token.clone());
                token
            }
        };
        self.post(at, path, question, Some(&token)).map_err(|(failure, code)| {
            if code != UNAUTHENTICATED {
                return failure;
            }
            *self.token() = None;
            match failure {
                Failure::Refused(why) => Failure::NotSent(why),
                other => other,
            }
        })
    }

    fn post<Q: Serialize, A: DeserializeOwned>(
        &self,
        at: usize,
        path: &str,
        question: &Q,
        token: Option<&str>,
    ) -> Result<A, (Failure, u32)> {
        let endpoint = self.endpoint(at);
        let refused = |text: String| (Failure::Refused(format!("etcd at `{endpoint}`: {text}")), 0);
        let unknown = |text: String| (Failure::Unknown(format!("etcd at `{endpoint}`: {text}")), 0);
        let body = serde_json::to_vec(question).map_err(|error| refused(error.to_string()))?;
        let mut request = self.agent.post(format!("{endpoint}/v3/{path}"));
        if let Some(token) = token {
            request = request.header("authorization", token);
        }
        let mut response = request.send(&body).map_err(|error| {
            let text = format!("etcd at `{endpoint}`: {error}");
            match is_unsent(&error) {
                true => (Failure::NotSent(text), 0),
                false => (Failure::Unknown(text), 0),
            }
        })?;
        let status = response.status().as_u16();
        let text = response.body_mut().with_config().limit(ANSWER_LEN_MAX).read_to_vec();
        let text = text.map_err(|error| unknown(error.to_string()))?;
        if status == HTTP_OK {
            return serde_json::from_slice(&text).map_err(|error| unknown(error.to_string()));
        }
        let refusal: Refusal = serde_json::from_slice(&text).unwrap_or_default();
        let why = if refusal.message.is_empty() { refusal.error } else { refusal.message };
        let why = format!("etcd at `{endpoint}`: {why} (HTTP {status}, code {})", refusal.code);
        let failure = match refusal.code {
            // It is busy (`ErrTooManyRequests`), and was not asked.
            RESOURCE_EXHAUSTED if why.contains("too many requests") => Failure::NotSent(why),
            INVALID_ARGUMENT | PERMISSION_DENIED | RESOURCE_EXHAUSTED | UNAUTHENTICATED => {
                Failure::Refused(why)
            }
            _ => Failure::Unknown(why),
        };
        Err((failure, refusal.code))
    }
}

/// Nothing of the request has left this host.
fn is_unsent(error: &ureq::Error) -> bool {
    match error {
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::BadUri(_)
        | ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => true,
        ureq::Error::Io(error) => error.kind() == std::io::ErrorKind::ConnectionRefused,
        _ => false,
    }
}

fn load(tls: &EtcdTls) -> Result<TlsConfig, StoreError> {
    let read = |path: &std::path::Path| {
        let file = |source| StoreError::File { path: path.to_owned(), what: "read", source };
        std::fs::read(path).map_err(file)
    };
    let certificates = |path: &std::path::Path| -> Result<Vec<Certificate<'static>>, StoreError> {
        let text = read(path)?;
        let all = parse_pem(&text).filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        });
        let all: Vec<_> = all.collect();
        match all.is_empty() {
            true => Err(StoreError::Refused(format!("`{}` holds no certificate", path.display()))),
            false => Ok(all),
        }
    };
    let mut config = TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&certificates(&tls.ca)?))
        .unversioned_rustls_crypto_provider(std::sync::Arc::new(
            rustls::crypto::ring::default_provider(),
        ));
    if let Some((cert, key)) = &tls.identity {
        let key_of = |text: &[u8]| PrivateKey::from_pem(text);
        let private = key_of(&read(key)?).map_err(|error| {
            StoreError::Refused(format!("`{}` holds no key: {error}", key.display()))
        })?;
        config =
            config.client_cert(Some(ClientCert::new_with_certs(&certificates(cert)?, private)));
    }
    Ok(config.build())
}
