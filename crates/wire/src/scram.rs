//! SCRAM-SHA-256 and SCRAM-SHA-256-PLUS (RFC 5802, RFC 7677, RFC 5929 `tls-server-end-point`), both sides.
//!
//! The server side checks a client against a verifier and thereby learns the client key, with which the client
//! side can log in to any server that holds the same verifier: that is how Holdfast passes a login through
//! without ever holding a password.

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ring::{digest, hmac, pbkdf2, rand::SecureRandom};
use std::num::NonZeroU32;
use thiserror::Error;
use zeroize::{Zeroize, ZeroizeOnDrop};

pub const MECHANISM: &str = "SCRAM-SHA-256";
pub const MECHANISM_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// Bytes of a SHA-256 digest, and of every key here.
pub const KEY_LEN: usize = 32;

/// A verifier with more iterations is refused: it would let a server burn the proxy's CPU.
const ITERATIONS_MAX: u32 = 1_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum ScramError {
    #[error("malformed SCRAM message: {0}")]
    Malformed(&'static str),
    #[error("SCRAM nonce does not match")]
    Nonce,
    #[error("SCRAM channel binding check failed")]
    ChannelBinding,
    #[error("password authentication failed")]
    WrongPassword,
    #[error("server signature is wrong: it does not hold this role's verifier")]
    ServerSignature,
    #[error("server refused the SCRAM exchange")]
    Refused,
    #[error("server asks for {0} iterations, at most {ITERATIONS_MAX} are done")]
    Iterations(u32),
    #[error("no random numbers are available")]
    Random,
}

/// What a role's password is stored as: `SCRAM-SHA-256$iterations:salt$StoredKey:ServerKey`.
#[derive(Clone, PartialEq, Eq, ZeroizeOnDrop)]
pub struct Verifier {
    pub iterations: u32,
    pub salt: Vec<u8>,
    pub stored_key: [u8; KEY_LEN],
    pub server_key: [u8; KEY_LEN],
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verifier(..)")
    }
}

impl Verifier {
    /// Reads a verifier as `pg_authid.rolpassword` holds it; none if it is not one (for example MD5).
    pub fn read(text: &str) -> Option<Verifier> {
        let (head, keys) = text.strip_prefix("SCRAM-SHA-256$")?.split_once('$')?;
        let (iterations, salt) = head.split_once(':')?;
        let (stored_key, server_key) = keys.split_once(':')?;
        let verifier = Verifier {
            iterations: iterations.parse().ok()?,
            salt: BASE64.decode(salt).ok()?,
            stored_key: BASE64.decode(stored_key).ok()?.try_into().ok()?,
            server_key: BASE64.decode(server_key).ok()?.try_into().ok()?,
        };
        (1..=ITERATIONS_MAX).contains(&verifier.iterations).then_some(verifier)
    }

    /// The verifier of a password, with a salt of one's own.
    pub fn of_password(password: &str, salt: &[u8], iterations: NonZeroU32) -> Verifier {
        let keys = Keys::of_password(password, salt, iterations);
        Verifier {
            iterations: iterations.get(),
            salt: salt.to_vec(),
            stored_key: sha256(&keys.client_key),
            server_key: keys.server_key,
        }
    }

    /// A verifier that no password meets, always the same for the same user, so that an unknown user cannot be
    /// told from a wrong password by its salt.
    pub fn mock(secret: &[u8], user: &[u8]) -> Verifier {
        let salt = hmac_sha256(secret, user);
        Verifier {
            iterations: 4096,
            salt: salt.iter().take(16).copied().collect(),
            stored_key: hmac_sha256(secret, &salt),
            server_key: hmac_sha256(&salt, secret),
        }
    }
}

impl std::fmt::Display for Verifier {
    /// The form that `pg_authid.rolpassword` holds. A secret: for files and servers, never for logs.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [salt, stored, server] =
            [&self.salt[..], &self.stored_key, &self.server_key].map(|bytes| BASE64.encode(bytes));
        write!(f, "SCRAM-SHA-256${}:{salt}${stored}:{server}", self.iterations)
    }
}

/// What logs in without the password, for one salt: the client key and the server key.
#[derive(Clone, PartialEq, Eq, ZeroizeOnDrop)]
pub struct Keys {
    pub client_key: [u8; KEY_LEN],
    pub server_key: [u8; KEY_LEN],
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys(..)")
    }
}

impl Keys {
    pub fn of_password(password: &str, salt: &[u8], iterations: NonZeroU32) -> Keys {
        // A password that SASLprep refuses is used as it is, as `pg_saslprep` callers do.
        let prepared = stringprep::saslprep(password).unwrap_or(password.into());
        let mut salted = [0; KEY_LEN];
        let algorithm = pbkdf2::PBKDF2_HMAC_SHA256;
        pbkdf2::derive(algorithm, iterations, salt, prepared.as_bytes(), &mut salted);
        let keys = Keys {
            client_key: hmac_sha256(&salted, b"Client Key"),
            server_key: hmac_sha256(&salted, b"Server Key"),
        };
        salted.zeroize();
        keys
    }
}

/// What a client proves itself with.
#[derive(Debug, Clone)]
pub enum Credential {
    Password(Secret),
    Keys(Keys),
}

/// Text that is never printed and is wiped when dropped.
#[derive(Clone, PartialEq, Eq, ZeroizeOnDrop)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Secret {
        Secret(text.into())
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// How the channel takes part, from the client's view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Binding {
    /// No TLS, or a server that offers no -PLUS on a channel without it.
    None,
    /// TLS, but the server offered no -PLUS: a server that could have is then warned by flag `y`.
    Unoffered,
    /// The hash of the server's certificate.
    EndPoint(Vec<u8>),
}

impl Binding {
    fn gs2_header(&self) -> &'static str {
        match self {
            Binding::None => "n,,",
            Binding::Unoffered => "y,,",
            Binding::EndPoint(_) => "p=tls-server-end-point,,",
        }
    }

    fn input(&self) -> Vec<u8> {
        let mut input = self.gs2_header().as_bytes().to_vec();
        if let Binding::EndPoint(hash) = self {
            input.extend_from_slice(hash);
        }
        input
    }
}

/// Makes a nonce of 18 random bytes, as `SCRAM_RAW_NONCE_LEN`.
///
/// # Errors
/// The system gives no random numbers.
pub fn nonce() -> Result<String, ScramError> {
    let mut bytes = [0; 18];
    ring::rand::SystemRandom::new().fill(&mut bytes).map_err(|_| ScramError::Random)?;
    Ok(BASE64.encode(bytes))
}

/// A client that has sent its first message and awaits the server's.
#[derive(Debug)]
pub struct ClientFirst {
    credential: Credential,
    binding: Binding,
    first_bare: String,
    nonce: String,
}

/// A client that has sent its proof and awaits the server's signature.
#[derive(Debug)]
pub struct ClientFinal {
    keys: Keys,
    auth_message: String,
}

impl ClientFirst {
    /// Begins: the mechanism to ask for, the first message, and what to await.
    pub fn start(
        credential: Credential,
        binding: Binding,
        nonce: String,
    ) -> (&'static str, String, ClientFirst) {
        // PostgreSQL takes the user from the startup packet and ignores this one, so it stays empty.
        let first_bare = format!("n=,r={nonce}");
        let message = format!("{}{first_bare}", binding.gs2_header());
        let mechanism = match binding {
            Binding::EndPoint(_) => MECHANISM_PLUS,
            Binding::None | Binding::Unoffered => MECHANISM,
        };
        (mechanism, message, ClientFirst { credential, binding, first_bare, nonce })
    }

    /// Takes the server's first message and answers with the proof.
    ///
    /// # Errors
    /// The message is malformed, its nonce does not continue ours, or it asks for too many iterations.
    pub fn on_server_first(self, message: &[u8]) -> Result<(String, ClientFinal), ScramError> {
        let message = text(message)?;
        let mut parts = message.split(',');
        let nonce = attribute(parts.next(), "r=")?;
        let salt = decode(attribute(parts.next(), "s=")?)?;
        let iterations: u32 = attribute(parts.next(), "i=")?
            .parse()
            .map_err(|_| ScramError::Malformed("iteration count"))?;
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() {
            return Err(ScramError::Nonce);
        }
        let count = NonZeroU32::new(iterations).filter(|count| count.get() <= ITERATIONS_MAX);
        let count = count.ok_or(ScramError::Iterations(iterations))?;
        let keys = match self.credential {
            Credential::Password(password) => Keys::of_password(password.expose(), &salt, count),
            Credential::Keys(keys) => keys,
        };
        let without_proof = format!("c={},r={nonce}", BASE64.encode(self.binding.input()));
        let auth_message = format!("{},{message},{without_proof}", self.first_bare);
        let signature = hmac_sha256(&sha256(&keys.client_key), auth_message.as_bytes());
        let proof = xor(&keys.client_key, &signature);
        let message = format!("{without_proof},p={}", BASE64.encode(proof));
        Ok((message, ClientFinal { keys, auth_message }))
    }
}

impl ClientFinal {
    /// Checks the server's signature.
    ///
    /// # Errors
    /// The server refused, or does not hold the role's verifier.
    pub fn on_server_final(self, message: &[u8]) -> Result<(), ScramError> {
        let message = text(message)?;
        if message.starts_with("e=") {
            return Err(ScramError::Refused);
        }
        let signature = decode(attribute(message.split(',').next(), "v=")?)?;
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.keys.server_key);
        hmac::verify(&key, self.auth_message.as_bytes(), &signature)
            .map_err(|_| ScramError::ServerSignature)
    }
}

/// A server that awaits the client's first message.
#[derive(Debug)]
pub struct ServerStart {
    verifier: Verifier,
    nonce: String,
    /// The hash of our certificate, where the channel has one.
    end_point: Option<Vec<u8>>,
}

/// A server that has sent its challenge and awaits the proof.
#[derive(Debug)]
pub struct ServerChallenge {
    verifier: Verifier,
    binding: Vec<u8>,
    nonce: String,
    messages: String,
}

impl ServerStart {
    pub fn new(verifier: Verifier, nonce: String, end_point: Option<Vec<u8>>) -> ServerStart {
        ServerStart { verifier, nonce, end_point }
    }

    /// Takes the client's first message and answers with the challenge.
    ///
    /// # Errors
    /// The message is malformed, or its channel binding does not suit the mechanism or the channel.
    pub fn on_client_first(
        self,
        mechanism: &[u8],
        message: &[u8],
    ) -> Result<(String, ServerChallenge), ScramError> {
        let message = text(message)?;
        let mut parts = message.splitn(3, ',');
        let flag = parts.next().ok_or(ScramError::Malformed("channel binding flag"))?;
        let authzid = parts.next().ok_or(ScramError::Malformed("authorization identity"))?;
        let bare = parts.next().ok_or(ScramError::Malformed("user name"))?;
        if !authzid.is_empty() {
            return Err(ScramError::Malformed("authorization identity is not supported"));
        }
        let plus = mechanism == MECHANISM_PLUS.as_bytes();
        if !plus && mechanism != MECHANISM.as_bytes() {
            return Err(ScramError::Malformed("mechanism"));
        }
        let mut binding = format!("{flag},,").into_bytes();
        match (flag, plus, &self.end_point) {
            ("p=tls-server-end-point", true, Some(hash)) => binding.extend_from_slice(hash),
            // `y` says that the client could bind and saw no offer; we offer whenever we can, so a `y` on a
            // channel with a certificate means that somebody took the offer away.
            ("n", false, _) | ("y", false, None) => (),
            _ => return Err(ScramError::ChannelBinding),
        }
        let mut attributes = bare.split(',');
        attribute(attributes.next(), "n=")?;
        let client_nonce = attribute(attributes.next(), "r=")?;
        if client_nonce.is_empty() || !client_nonce.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(ScramError::Malformed("nonce"));
        }
        let nonce = format!("{client_nonce}{}", self.nonce);
        let challenge = format!(
            "r={nonce},s={},i={}",
            BASE64.encode(&self.verifier.salt),
            self.verifier.iterations
        );
        let messages = format!("{bare},{challenge}");
        Ok((challenge, ServerChallenge { verifier: self.verifier, binding, nonce, messages }))
    }
}

impl ServerChallenge {
    /// Takes the proof; answers with the signature, and the keys that the proof revealed.
    ///
    /// # Errors
    /// The message is malformed, does not belong to this exchange, or the proof is wrong.
    pub fn on_client_final(self, message: &[u8]) -> Result<(String, Keys), ScramError> {
        let message = text(message)?;
        let (without_proof, proof) =
            message.rsplit_once(",p=").ok_or(ScramError::Malformed("proof"))?;
        let mut parts = without_proof.split(',');
        let binding = decode(attribute(parts.next(), "c=")?)?;
        let nonce = attribute(parts.next(), "r=")?;
        if nonce != self.nonce {
            return Err(ScramError::Nonce);
        }
        if binding != self.binding {
            return Err(ScramError::ChannelBinding);
        }
        let proof: [u8; KEY_LEN] =
            decode(proof)?.try_into().map_err(|_| ScramError::Malformed("proof"))?;
        let auth_message = format!("{},{without_proof}", self.messages);
        let signature = hmac_sha256(&self.verifier.stored_key, auth_message.as_bytes());
        let client_key = xor(&proof, &signature);
        // Both sides are digests of secrets, so comparing them in variable time tells nothing of use.
        if sha256(&client_key) != self.verifier.stored_key {
            return Err(ScramError::WrongPassword);
        }
        let answer = hmac_sha256(&self.verifier.server_key, auth_message.as_bytes());
        let keys = Keys { client_key, server_key: self.verifier.server_key };
        Ok((format!("v={}", BASE64.encode(answer)), keys))
    }
}

fn text(message: &[u8]) -> Result<&str, ScramError> {
    std::str::from_utf8(message).map_err(|_| ScramError::Malformed("not UTF-8"))
}

fn attribute<'a>(part: Option<&'a str>, name: &'static str) -> Result<&'a str, ScramError> {
    part.and_then(|part| part.strip_prefix(name)).ok_or(ScramError::Malformed(name))
}

fn decode(text: &str) -> Result<Vec<u8>, ScramError> {
    BASE64.decode(text).map_err(|_| ScramError::Malformed("base64"))
}

fn sha256(bytes: &[u8]) -> [u8; KEY_LEN] {
    fixed(digest::digest(&digest::SHA256, bytes).as_ref())
}

fn hmac_sha256(key: &[u8], bytes: &[u8]) -> [u8; KEY_LEN] {
    fixed(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), bytes).as_ref())
}

fn fixed(bytes: &[u8]) -> [u8; KEY_LEN] {
    bytes.try_into().expect("SHA-256 gives 32 bytes")
}

fn xor(a: &[u8; KEY_LEN], b: &[u8; KEY_LEN]) -> [u8; KEY_LEN] {
    let mut out = *a;
    out.iter_mut().zip(b).for_each(|(a, b)| *a ^= b);
    out
}

#[cfg(test)]
mod tests;
