//! TLS negotiation and login, as a client of a server.

use std::io;
use std::time::Duration;

use thiserror::Error;
use tls::certificate::end_point_hash;
use tls::{ClientTls, Handshake, SslMode, SslNegotiation};
use tokio::time::timeout;
use wire::backend::{self, Authentication, Backend, Fields};
use wire::frontend;
use wire::scram::{self, Binding, ClientFirst, Credential, ScramError};
use wire::sqlstate::SqlState;
use wire::startup::{self, Version};

use crate::address::Address;
use crate::connection::{Connection, Message, QueryError};
use crate::stream::{Keepalive, Stream, TlsError};

/// A server and how to reach it.
#[derive(Debug, Clone)]
pub struct Target {
    pub address: Address,
    pub tls: ClientTls,
    pub keepalive: Keepalive,
    /// For connecting and logging in together.
    pub timeout: Duration,
}

/// Who logs in, with which startup parameters. The parameters hold the user and the database.
#[derive(Debug, Clone)]
pub struct Login {
    pub params: Vec<(Vec<u8>, Vec<u8>)>,
    pub credential: Option<Credential>,
}

#[derive(Debug, Error)]
pub enum ConnectError {
    #[error("cannot connect to `{address}`")]
    Io { address: Address, source: io::Error },
    #[error("`{address}` did not answer within {timeout:?}")]
    Timeout { address: Address, timeout: Duration },
    #[error("`{address}` does not offer TLS, which `sslmode` asks for")]
    NoTls { address: Address },
    #[error(
        "`{address}` does not say that it speaks `postgresql`, which `sslnegotiation = \"direct\"` needs"
    )]
    NoAlpn { address: Address },
    #[error("TLS to `{address}` cannot be set up")]
    Tls { address: Address, source: TlsError },
    #[error("`{address}` refuses the login: {message} ({sqlstate})")]
    Refused {
        address: Address,
        sqlstate: SqlState,
        message: String,
        raw: Vec<u8>,
        authenticated: bool,
    },
    #[error("`{address}` asks for {what}, for which no credential is at hand")]
    NoCredential { address: Address, what: &'static str },
    #[error("SCRAM with `{address}` did not succeed")]
    Scram { address: Address, source: ScramError },
    #[error("`{address}` does not speak the PostgreSQL protocol")]
    Protocol { address: Address, source: QueryError },
}

impl ConnectError {
    /// The server refused after it had said that the client is who it is.
    pub fn after_authentication(&self) -> bool {
        matches!(self, ConnectError::Refused { authenticated: true, .. })
    }

    /// The server's own error message, to be passed on as it is.
    pub fn raw_error(&self) -> Option<&[u8]> {
        match self {
            ConnectError::Refused { raw, .. } => Some(raw),
            _ => None,
        }
    }
}

impl Target {
    /// Connects and logs in.
    ///
    /// # Errors
    /// See [`ConnectError`]; all of it within the target's timeout.
    pub async fn login(&self, login: &Login) -> Result<Connection, ConnectError> {
        let attempt = async {
            let connection = self.negotiate().await?;
            Box::pin(self.authenticate(connection, login)).await
        };
        match timeout(self.timeout, attempt).await {
            Ok(result) => result,
            Err(_) => {
                Err(ConnectError::Timeout { address: self.address.clone(), timeout: self.timeout })
            }
        }
    }

    /// Sends a cancel request and waits until the server has taken it, which it shows by closing.
    ///
    /// # Errors
    /// The server cannot be reached in time.
    pub async fn cancel(&self, pid: i32, secret: &[u8]) -> Result<(), ConnectError> {
        let attempt = async {
            let mut connection = self.negotiate().await?;
            let mut out = Vec::new();
            startup::cancel_request(&mut out, pid, secret);
            connection.send(&out).await.map_err(|source| self.protocol(source))?;
            connection.wait_closed().await;
            Ok(())
        };
        match timeout(self.timeout, attempt).await {
            Ok(result) => result,
            Err(_) => {
                Err(ConnectError::Timeout { address: self.address.clone(), timeout: self.timeout })
            }
        }
    }

    fn protocol(&self, source: QueryError) -> ConnectError {
        ConnectError::Protocol { address: self.address.clone(), source }
    }

    async fn negotiate(&self) -> Result<Connection, ConnectError> {
        let address = || self.address.clone();
        let io = |source| ConnectError::Io { address: address(), source };
        let mut stream = Stream::connect(&self.address, &self.keepalive).await.map_err(io)?;
        // As libpq: no TLS over a Unix socket.
        if self.tls.mode == SslMode::Disable || self.address.socket_path().is_some() {
            return Ok(Connection::new(stream, Vec::new(), None));
        }
        if self.tls.negotiation == SslNegotiation::Direct {
            return self.start_tls(stream).await;
        }
        let mut out = Vec::new();
        startup::ssl_request(&mut out);
        stream.write_all(&out).await.map_err(io)?;
        let mut answer = Vec::new();
        if stream.read(&mut answer).await.map_err(io)? == 0 {
            return Err(io(io::ErrorKind::UnexpectedEof.into()));
        }
        match answer.as_slice() {
            // More than one byte in the clear would be the injection of CVE-2021-23222.
            [b'S'] => self.start_tls(stream).await,
            [b'N'] if self.tls.mode == SslMode::Prefer => {
                Ok(Connection::new(stream, Vec::new(), None))
            }
            [b'N'] => Err(ConnectError::NoTls { address: address() }),
            _ => Err(io(io::Error::new(
                io::ErrorKind::InvalidData,
                "unexpected answer to an SSLRequest",
            ))),
        }
    }

    async fn start_tls(&self, mut stream: Stream) -> Result<Connection, ConnectError> {
        let tls = |source| ConnectError::Tls { address: self.address.clone(), source };
        let handshake = Handshake::client(&self.tls, &self.address.host)
            .map_err(|source| tls(TlsError::Handshake(source)))?;
        let mut early = Vec::new();
        let handshake = stream.handshake(Box::new(handshake), Vec::new(), &mut early);
        let (certificate, alpn) = Box::pin(handshake).await.map_err(tls)?;
        // Without it, what answered may be a server of another protocol that was talked into this one.
        if self.tls.negotiation == SslNegotiation::Direct && !alpn {
            return Err(ConnectError::NoAlpn { address: self.address.clone() });
        }
        let end_point = certificate.as_deref().and_then(end_point_hash);
        Ok(Connection::new(stream, early, end_point))
    }

    async fn authenticate(
        &self,
        mut connection: Connection,
        login: &Login,
    ) -> Result<Connection, ConnectError> {
        let mut out = Vec::new();
        let params = login.params.iter().map(|(name, value)| (name.as_slice(), value.as_slice()));
        startup::startup_message(&mut out, Version::V3_0, params);
        connection.send(&out).await.map_err(|source| self.protocol(source))?;
        let mut scram = None;
        loop {
            let message = connection.receive().await.map_err(|source| self.protocol(source))?;
            let view = message.view().map_err(|source| self.protocol(source))?;
            match view {
                Backend::Authentication(Authentication::Ok) => break,
                Backend::Authentication(Authentication::CleartextPassword) => {
                    let Some(Credential::Password(password)) = &login.credential else {
                        return Err(self.no_credential("a password"));
                    };
                    let mut out = Vec::new();
                    frontend::password(&mut out, password.expose().as_bytes());
                    connection.send(&out).await.map_err(|source| self.protocol(source))?;
                }
                Backend::Authentication(Authentication::Sasl { mechanisms }) => {
                    let credential = login.credential.clone();
                    let credential = credential.ok_or_else(|| self.no_credential("SCRAM"))?;
                    let binding = self.binding(&connection, &mechanisms);
                    let nonce = scram::nonce().map_err(|source| self.scram(source))?;
                    let (mechanism, first, state) = ClientFirst::start(credential, binding, nonce);
                    let mut out = Vec::new();
                    frontend::sasl_initial(&mut out, mechanism.as_bytes(), first.as_bytes());
                    connection.send(&out).await.map_err(|source| self.protocol(source))?;
                    scram = Some(ScramState::First(state));
                }
                Backend::Authentication(Authentication::SaslContinue(challenge)) => {
                    let Some(ScramState::First(state)) = scram.take() else {
                        return Err(self.scram(ScramError::Malformed("challenge")));
                    };
                    let (proof, state) =
                        state.on_server_first(challenge).map_err(|source| self.scram(source))?;
                    let mut out = Vec::new();
                    frontend::sasl_response(&mut out, proof.as_bytes());
                    connection.send(&out).await.map_err(|source| self.protocol(source))?;
                    scram = Some(ScramState::Final(state));
                }
                Backend::Authentication(Authentication::SaslFinal(signature)) => {
                    let Some(ScramState::Final(state)) = scram.take() else {
                        return Err(self.scram(ScramError::Malformed("signature")));
                    };
                    state.on_server_final(signature).map_err(|source| self.scram(source))?;
                    scram = Some(ScramState::Done);
                }
                Backend::Authentication(Authentication::Md5Password { .. }) => {
                    return Err(self.no_credential("MD5, which Holdfast does not do"));
                }
                Backend::Authentication(Authentication::Other(_)) => {
                    return Err(self.no_credential("GSSAPI or SSPI"));
                }
                Backend::Error(fields) => return Err(self.refused(&fields, &message, false)),
                Backend::Notice(_) => connection.keep_notice(&message),
                Backend::NegotiateVersion { .. } => (),
                _ => return Err(self.protocol(QueryError::Unexpected(message.tag))),
            }
        }
        // A server that stops half-way has not proven that it holds the verifier.
        if let Some(ScramState::First(_) | ScramState::Final(_)) = scram {
            return Err(self.scram(ScramError::ServerSignature));
        }
        self.until_ready(connection).await
    }

    async fn until_ready(&self, mut connection: Connection) -> Result<Connection, ConnectError> {
        loop {
            let message = connection.receive().await.map_err(|source| self.protocol(source))?;
            match message.view().map_err(|source| self.protocol(source))? {
                Backend::Ready(_) => return Ok(connection),
                Backend::KeyData { pid, secret } => {
                    connection.pid = pid;
                    connection.secret = secret.to_vec();
                }
                Backend::Error(fields) => return Err(self.refused(&fields, &message, true)),
                Backend::Notice(_) => connection.keep_notice(&message),
                // Kept by the connection itself.
                Backend::ParameterStatus { .. } => (),
                _ => return Err(self.protocol(QueryError::Unexpected(message.tag))),
            }
        }
    }

    fn binding(&self, connection: &Connection, mechanisms: &[&[u8]]) -> Binding {
        let offered = mechanisms.contains(&scram::MECHANISM_PLUS.as_bytes());
        match (&connection.end_point, offered) {
            (Some(hash), true) => Binding::EndPoint(hash.clone()),
            (Some(_), false) => Binding::Unoffered,
            (None, _) => Binding::None,
        }
    }

    fn refused(&self, fields: &Fields<'_>, message: &Message, authenticated: bool) -> ConnectError {
        ConnectError::Refused {
            address: self.address.clone(),
            sqlstate: fields.sqlstate().unwrap_or(SqlState::INTERNAL_ERROR),
            message: fields.message(),
            raw: message.raw(),
            authenticated,
        }
    }

    fn no_credential(&self, what: &'static str) -> ConnectError {
        ConnectError::NoCredential { address: self.address.clone(), what }
    }

    fn scram(&self, source: ScramError) -> ConnectError {
        ConnectError::Scram { address: self.address.clone(), source }
    }
}

enum ScramState {
    First(ClientFirst),
    Final(scram::ClientFinal),
    Done,
}

/// Reads a message body's view; a helper of both this file and [`crate::connection`].
pub(crate) fn view(tag: u8, body: &[u8]) -> Result<Backend<'_>, QueryError> {
    backend::read(tag, body).map_err(QueryError::Malformed)
}
