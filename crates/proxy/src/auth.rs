//! Who a client is: the verifier it is checked against, and what the server is shown in its place.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use pg::Target;
use pg::admin::{Admin, AdminLogin};
use thiserror::Error;
use wire::scram::{Secret, Verifier};

use crate::config::AuthConfig;

/// How long a verifier is believed. A password that was changed meanwhile fails at the server, so this bounds
/// only how soon a new one is known.
const VERIFIER_AGE_MAX: Duration = Duration::from_secs(30);
/// Verifiers that are kept.
const VERIFIERS_MAX: usize = 10_000;

/// How one client is checked.
#[derive(Debug)]
pub enum Check {
    Trust,
    /// By SCRAM. A password, where the file has one, logs in to the server.
    Scram {
        verifier: Verifier,
        password: Option<Secret>,
    },
}

#[derive(Debug, Error)]
pub enum AuthError {
    #[error("password file `{path}` cannot be read")]
    File { path: std::path::PathBuf, source: std::io::Error },
    #[error("verifiers cannot be read from the server")]
    Server(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("its server was lost meanwhile")]
    Lost,
    #[error("no random numbers are available")]
    Random,
}

pub struct Authenticator {
    config: AuthConfig,
    login: AdminLogin,
    /// Makes the salts of users who do not exist.
    mock_secret: [u8; 32],
    verifiers: Mutex<BTreeMap<String, (Verifier, Instant)>>,
    admin: tokio::sync::Mutex<Option<(String, Admin)>>,
}

impl std::fmt::Debug for Authenticator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authenticator(..)")
    }
}

impl Authenticator {
    pub fn new(config: AuthConfig, login: AdminLogin) -> Authenticator {
        let mut mock_secret = [0; 32];
        // Without random numbers nothing can be checked; `check` then fails at its own nonce.
        let _ = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut mock_secret);
        Authenticator {
            config,
            login,
            mock_secret,
            verifiers: Mutex::default(),
            admin: tokio::sync::Mutex::default(),
        }
    }

    /// How `user` is to be checked. An unknown user gets a check that fails.
    ///
    /// # Errors
    /// The file or the server cannot be read.
    pub async fn check(&self, user: &str, server: &Target) -> Result<Check, AuthError> {
        let mock = || Verifier::mock(&self.mock_secret, user.as_bytes());
        match &self.config {
            AuthConfig::Trust => Ok(Check::Trust),
            AuthConfig::File(path) => {
                let (verifier, password) = match from_file(path, user)? {
                    Some(Entry::Verifier(verifier)) => (verifier, None),
                    Some(Entry::Password(password)) => {
                        let salt = Verifier::mock(&self.mock_secret, user.as_bytes()).salt.clone();
                        let iterations =
                            std::num::NonZeroU32::new(4096).ok_or(AuthError::Random)?;
                        (
                            Verifier::of_password(password.expose(), &salt, iterations),
                            Some(password),
                        )
                    }
                    None => (mock(), None),
                };
                Ok(Check::Scram { verifier, password })
            }
            AuthConfig::Scram { query } => {
                if let Some(verifier) = self.cached(user) {
                    return Ok(Check::Scram { verifier, password: None });
                }
                let found = self.ask(query, user, server).await?;
                if let Some(verifier) = &found {
                    let mut cache = self.verifiers.lock().unwrap_or_else(PoisonError::into_inner);
                    if cache.len() >= VERIFIERS_MAX {
                        cache.clear();
                    }
                    cache.insert(user.to_owned(), (verifier.clone(), Instant::now()));
                }
                Ok(Check::Scram { verifier: found.unwrap_or_else(mock), password: None })
            }
        }
    }

    fn cached(&self, user: &str) -> Option<Verifier> {
        let cache = self.verifiers.lock().unwrap_or_else(PoisonError::into_inner);
        let (verifier, since) = cache.get(user)?;
        (since.elapsed() < VERIFIER_AGE_MAX).then(|| verifier.clone())
    }

    /// A login failed, so what is known of the user may be old.
    pub fn forget(&self, user: &str) {
        self.verifiers.lock().unwrap_or_else(PoisonError::into_inner).remove(user);
    }

    async fn ask(
        &self,
        query: &str,
        user: &str,
        server: &Target,
    ) -> Result<Option<Verifier>, AuthError> {
        let mut slot = self.admin.lock().await;
        let address = server.address.to_string();
        // The connection may have died since it was used; then a fresh one is asked once. Whoever gives up meanwhile takes it
        // along: what it answers late is about somebody else.
        if let Some((at, mut admin)) = slot.take()
            && at == address
            && let Ok(found) = admin.verifier(query, user).await
        {
            *slot = Some((address, admin));
            return Ok(found);
        }
        let mut admin = Admin::connect(server, &self.login)
            .await
            .map_err(|error| AuthError::Server(Box::new(error)))?;
        let found = admin
            .verifier(query, user)
            .await
            .map_err(|error| AuthError::Server(Box::new(error)))?;
        *slot = Some((address, admin));
        Ok(found)
    }
}

enum Entry {
    Password(Secret),
    Verifier(Verifier),
}

/// Lines of `user:password` or `user:SCRAM-SHA-256$...`; the last one of a user counts.
fn from_file(path: &Path, user: &str) -> Result<Option<Entry>, AuthError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| AuthError::File { path: path.to_owned(), source })?;
    let line =
        text.lines().rev().filter_map(|line| line.split_once(':')).find(|(name, _)| *name == user);
    Ok(line.map(|(_, secret)| match Verifier::read(secret) {
        Some(verifier) => Entry::Verifier(verifier),
        None => Entry::Password(Secret::new(secret)),
    }))
}
