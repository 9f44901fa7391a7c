//! Drives rustls until both directions have their keys, then takes the secrets out and lets rustls go.

use std::sync::{Arc, Mutex};

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{CommonState, KeyLog};
use thiserror::Error;
use zeroize::Zeroize;

use crate::config::{ClientTls, ServerTls};
use crate::record::Record;

/// A handshake that needs more bytes than this is refused; a chain of large certificates stays far below.
const HANDSHAKE_LEN_MAX: usize = 256 * 1024;

#[derive(Debug, Error)]
pub enum HandshakeError {
    #[error("TLS handshake was refused")]
    Refused(#[source] rustls::Error),
    #[error("`{0}` is not a host name or an address")]
    HostName(String),
    #[error("TLS handshake is longer than {HANDSHAKE_LEN_MAX} bytes")]
    TooLong,
    #[error("TLS handshake reached the unexpected state `{0}`")]
    Unexpected(String),
    #[error("TLS secrets do not belong to the negotiated keys")]
    Secrets,
}

/// Traffic secrets of one connection, which rustls shows only to a key log. They are what key updates grow from.
#[derive(Debug, Default)]
struct Secrets(Mutex<TrafficSecrets>);

#[derive(Default)]
struct TrafficSecrets {
    client: Vec<u8>,
    server: Vec<u8>,
}

impl std::fmt::Debug for TrafficSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TrafficSecrets(..)")
    }
}

impl Drop for TrafficSecrets {
    fn drop(&mut self) {
        self.client.zeroize();
        self.server.zeroize();
    }
}

impl KeyLog for Secrets {
    fn log(&self, label: &str, _client_random: &[u8], secret: &[u8]) {
        let Ok(mut secrets) = self.0.lock() else { return };
        match label {
            "CLIENT_TRAFFIC_SECRET_0" => secrets.client = secret.to_vec(),
            "SERVER_TRAFFIC_SECRET_0" => secrets.server = secret.to_vec(),
            _ => (),
        }
    }

    fn will_log(&self, label: &str) -> bool {
        label.ends_with("_TRAFFIC_SECRET_0")
    }
}

enum Connection {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

/// A handshake under way.
pub struct Handshake {
    connection: Connection,
    secrets: Arc<Secrets>,
    input: Vec<u8>,
    early: Vec<u8>,
    received: usize,
}

/// How far a handshake got.
pub enum Progress {
    /// The peer's bytes are needed.
    Pending(Box<Handshake>),
    Done(Box<Established>),
}

/// A connection after its handshake.
pub struct Established {
    pub record: Record,
    /// Plaintext that came together with the end of the handshake.
    pub early: Vec<u8>,
    /// Ciphertext after that, not yet opened.
    pub unread: Vec<u8>,
    /// The peer's certificate, if it showed one, in DER.
    pub peer_certificate: Option<Vec<u8>>,
    /// Whether the peer named PostgreSQL by ALPN, as direct TLS must.
    pub alpn: bool,
}

impl Handshake {
    /// Begins as the server.
    ///
    /// # Errors
    /// The configuration does not work.
    pub fn server(tls: &ServerTls) -> Result<Handshake, HandshakeError> {
        let secrets = Arc::new(Secrets::default());
        let mut config = (*tls.config).clone();
        config.key_log = secrets.clone();
        let connection =
            UnbufferedServerConnection::new(Arc::new(config)).map_err(HandshakeError::Refused)?;
        Ok(Handshake::new(Connection::Server(Box::new(connection)), secrets))
    }

    /// Begins as a client of `host`, a name or an address.
    ///
    /// # Errors
    /// The host cannot be named in TLS, or the configuration does not work.
    pub fn client(tls: &ClientTls, host: &str) -> Result<Handshake, HandshakeError> {
        let secrets = Arc::new(Secrets::default());
        let mut config = (*tls.config).clone();
        config.key_log = secrets.clone();
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| HandshakeError::HostName(host.to_owned()))?;
        let connection = UnbufferedClientConnection::new(Arc::new(config), name)
            .map_err(HandshakeError::Refused)?;
        Ok(Handshake::new(Connection::Client(Box::new(connection)), secrets))
    }

    fn new(connection: Connection, secrets: Arc<Secrets>) -> Handshake {
        Handshake { connection, secrets, input: Vec::new(), early: Vec::new(), received: 0 }
    }

    /// Takes bytes of the peer and appends what is to be sent to `out`, an alert included when this fails.
    ///
    /// # Errors
    /// The peer's bytes are refused, or too many.
    pub fn advance(mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Progress, HandshakeError> {
        self.received += input.len();
        if self.received > HANDSHAKE_LEN_MAX {
            return Err(HandshakeError::TooLong);
        }
        self.input.extend_from_slice(input);
        loop {
            let turn = match &mut self.connection {
                Connection::Client(c) => {
                    turn(c.process_tls_records(&mut self.input), &mut self.early, out)
                }
                Connection::Server(c) => {
                    turn(c.process_tls_records(&mut self.input), &mut self.early, out)
                }
            };
            self.input.drain(..turn.discard);
            match turn.next {
                Ok(Next::Again) => (),
                Ok(Next::Read) => return Ok(Progress::Pending(Box::new(self))),
                Ok(Next::Done) => {
                    return self.establish().map(|done| Progress::Done(Box::new(done)));
                }
                Err(error) => {
                    self.write_alert(out);
                    return Err(error);
                }
            }
        }
    }

    /// After an error rustls still holds the alert that tells the peer why.
    fn write_alert(&mut self, out: &mut Vec<u8>) {
        let (mut input, mut early) = ([], Vec::new());
        // The answer is the same error again; all that is wanted are the bytes.
        let _ = match &mut self.connection {
            Connection::Client(c) => turn(c.process_tls_records(&mut input), &mut early, out).next,
            Connection::Server(c) => turn(c.process_tls_records(&mut input), &mut early, out).next,
        };
    }

    fn establish(self) -> Result<Established, HandshakeError> {
        let common: &CommonState = match &self.connection {
            Connection::Client(c) => c,
            Connection::Server(c) => c,
        };
        let peer_certificate =
            common.peer_certificates().and_then(|chain| chain.first()).map(|cert| cert.to_vec());
        let alpn = common.alpn_protocol().is_some();
        let version = common.protocol_version().ok_or(HandshakeError::Secrets)?;
        let suite = common.negotiated_cipher_suite().ok_or(HandshakeError::Secrets)?.suite();
        let (is_client, secrets) = match self.connection {
            Connection::Client(c) => {
                (true, c.dangerous_into_kernel_connection().map(|(secrets, _)| secrets))
            }
            Connection::Server(c) => {
                (false, c.dangerous_into_kernel_connection().map(|(secrets, _)| secrets))
            }
        };
        let secrets = secrets.map_err(HandshakeError::Refused)?;
        let mut traffic = self.secrets.0.lock().map_err(|_| HandshakeError::Secrets)?;
        let traffic = std::mem::take(&mut *traffic);
        let (tx, rx) = if is_client {
            (&traffic.client, &traffic.server)
        } else {
            (&traffic.server, &traffic.client)
        };
        let record =
            Record::from_secrets(version, suite, secrets, tx, rx).ok_or(HandshakeError::Secrets)?;
        Ok(Established { record, early: self.early, unread: self.input, peer_certificate, alpn })
    }
}

struct Turn {
    discard: usize,
    next: Result<Next, HandshakeError>,
}

enum Next {
    Again,
    Read,
    Done,
}

/// Does what one state of rustls asks for.
fn turn<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    early: &mut Vec<u8>,
    out: &mut Vec<u8>,
) -> Turn {
    let UnbufferedStatus { mut discard, state, .. } = status;
    let next = match state {
        Err(error) => Err(HandshakeError::Refused(error)),
        Ok(ConnectionState::EncodeTlsData(mut data)) => {
            let start = out.len();
            out.resize(start + 4096, 0);
            let mut encoded = data.encode(&mut out[start..]);
            if let Err(EncodeError::InsufficientSize(size)) = &encoded {
                out.resize(start + size.required_size, 0);
                encoded = data.encode(&mut out[start..]);
            }
            out.truncate(start + *encoded.as_ref().unwrap_or(&0));
            match encoded {
                Ok(_) => Ok(Next::Again),
                Err(error) => Err(HandshakeError::Unexpected(error.to_string())),
            }
        }
        // The bytes are in `out`, which the caller sends before it waits for the peer.
        Ok(ConnectionState::TransmitTlsData(data)) => {
            data.done();
            Ok(Next::Again)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Next::Read),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Next::Done),
        Ok(ConnectionState::ReadTraffic(mut traffic)) => {
            let mut result = Ok(Next::Again);
            while let Some(record) = traffic.next_record() {
                match record {
                    Ok(record) => {
                        discard += record.discard;
                        early.extend_from_slice(record.payload);
                    }
                    Err(error) => {
                        result = Err(HandshakeError::Refused(error));
                        break;
                    }
                }
            }
            result
        }
        Ok(other) => Err(HandshakeError::Unexpected(format!("{other:?}"))),
    };
    Turn { discard, next }
}

#[cfg(test)]
mod tests;
