//! Connections to control: by TLS, on which both sides show who they are, or plain on this machine.

use std::io;
use std::time::Duration;

use pg::Address;
use tls::mutual::{H2, Mutual, server_name};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// How long a handshake may take.
const HANDSHAKE_MAX: Duration = Duration::from_secs(2);

pub trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

pub type Stream = Box<dyn Io>;

/// What is spoken on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    /// Many questions at a time.
    Http2,
}

impl Protocol {
    /// What both sides have settled on; the older where they have not.
    fn of(settled: Option<&[u8]>) -> Protocol {
        match settled {
            Some(H2) => Protocol::Http2,
            _ => Protocol::Http1,
        }
    }
}

/// Who is on the other side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// Somebody on this machine.
    Here,
    /// The common name of its certificate, which our authority has signed.
    Named(String),
}

impl Peer {
    /// It may speak for whoever has this name.
    pub fn is(&self, name: &str) -> bool {
        match self {
            Peer::Here => true,
            Peer::Named(shown) => shown == name,
        }
    }
}

/// # Errors
/// Nobody is there, or it is not who it should be.
pub async fn connect(address: &Address, tls: Option<&Mutual>) -> io::Result<(Stream, Protocol)> {
    let socket = TcpStream::connect((address.host.as_str(), address.port)).await?;
    socket.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok((Box::new(socket), Protocol::Http1)) };
    let name = server_name(&address.host).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "a certificate cannot have this host's name")
    })?;
    let stream = TlsConnector::from(tls.client.clone()).connect(name, socket).await?;
    let protocol = Protocol::of(stream.get_ref().1.alpn_protocol());
    Ok((Box::new(stream), protocol))
}

/// # Errors
/// It shows no certificate that our authority has signed, or takes too long.
pub async fn accept(
    socket: TcpStream,
    tls: Option<&Mutual>,
) -> io::Result<(Stream, Protocol, Peer)> {
    socket.set_nodelay(true)?;
    let Some(tls) = tls else { return Ok((Box::new(socket), Protocol::Http1, Peer::Here)) };
    let accepted = TlsAcceptor::from(tls.server.clone()).accept(socket);
    let stream = timeout(HANDSHAKE_MAX, accepted).await.map_err(|_| io::ErrorKind::TimedOut)??;
    let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let name = shown.and_then(|cert| tls::certificate::common_name(cert));
    let name = name.ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "its certificate has no common name")
    })?;
    let protocol = Protocol::of(stream.get_ref().1.alpn_protocol());
    Ok((Box::new(stream), protocol, Peer::Named(name)))
}
