//! A socket, plain or TLS, that can be taken apart into its descriptor and its TLS state and put together again.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use tls::{Handshake, Opened, Progress, Record};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::address::Address;

/// Bytes asked of the socket at once.
const READ_LEN: usize = 16 * 1024;

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    async fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        buffer.reserve(READ_LEN);
        match self {
            Socket::Tcp(socket) => socket.read_buf(buffer).await,
            Socket::Unix(socket) => socket.read_buf(buffer).await,
        }
    }

    async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Socket::Tcp(socket) => socket.write_all(bytes).await,
            Socket::Unix(socket) => socket.write_all(bytes).await,
        }
    }
}

/// A connected socket, plain or TLS.
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
    tls: Option<Box<Record>>,
    /// Ciphertext that is not a whole record yet.
    cipher: Vec<u8>,
    closed: bool,
}

/// What a stream is made of. Nothing is lost by taking one apart: unread bytes go along.
#[derive(Debug)]
pub struct Parts {
    pub fd: OwnedFd,
    pub is_unix: bool,
    pub tls: Option<Box<Record>>,
    pub cipher: Vec<u8>,
}

/// TCP settings of one leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keepalive {
    pub idle: Duration,
    pub interval: Duration,
    pub count: u32,
    /// How long sent bytes may stay unacknowledged (`TCP_USER_TIMEOUT`).
    pub user_timeout: Duration,
}

impl Default for Keepalive {
    fn default() -> Keepalive {
        let seconds = Duration::from_secs;
        Keepalive { idle: seconds(60), interval: seconds(10), count: 6, user_timeout: seconds(120) }
    }
}

impl Keepalive {
    /// # Errors
    /// The system refuses an option.
    pub fn apply(&self, socket: &TcpStream) -> io::Result<()> {
        socket.set_nodelay(true)?;
        let socket = socket2::SockRef::from(socket);
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(self.idle)
            .with_interval(self.interval)
            .with_retries(self.count);
        socket.set_tcp_keepalive(&keepalive)?;
        socket.set_tcp_user_timeout(Some(self.user_timeout))
    }
}

impl Stream {
    /// Connects, without a deadline: the caller has one.
    ///
    /// # Errors
    /// As the system says.
    pub async fn connect(address: &Address, keepalive: &Keepalive) -> io::Result<Stream> {
        let socket = match address.socket_path() {
            Some(path) => Socket::Unix(UnixStream::connect(path).await?),
            None => {
                let socket = TcpStream::connect((address.host.as_str(), address.port)).await?;
                keepalive.apply(&socket)?;
                Socket::Tcp(socket)
            }
        };
        Ok(Stream::plain(socket))
    }

    fn plain(socket: Socket) -> Stream {
        Stream { socket, tls: None, cipher: Vec::new(), closed: false }
    }

    pub fn from_tcp(socket: TcpStream) -> Stream {
        Stream::plain(Socket::Tcp(socket))
    }

    /// Puts a stream together again, on the runtime of the caller.
    ///
    /// # Errors
    /// The descriptor cannot be registered.
    pub fn from_parts(parts: Parts) -> io::Result<Stream> {
        let socket = if parts.is_unix {
            Socket::Unix(UnixStream::from_std(parts.fd.into())?)
        } else {
            Socket::Tcp(TcpStream::from_std(parts.fd.into())?)
        };
        Ok(Stream { socket, tls: parts.tls, cipher: parts.cipher, closed: false })
    }

    /// Takes the stream apart.
    ///
    /// # Errors
    /// The descriptor cannot be taken back from the runtime.
    pub fn into_parts(self) -> io::Result<Parts> {
        let (fd, is_unix) = match self.socket {
            Socket::Tcp(socket) => (OwnedFd::from(socket.into_std()?), false),
            Socket::Unix(socket) => (OwnedFd::from(socket.into_std()?), true),
        };
        Ok(Parts { fd, is_unix, tls: self.tls, cipher: self.cipher })
    }

    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Passes the TLS handshake and goes on encrypted. `early` gets what came together with its end; the
    /// peer's certificate and whether it named PostgreSQL by ALPN are given back.
    ///
    /// # Errors
    /// The handshake is refused on either side, or the peer goes away.
    pub async fn handshake(
        &mut self,
        mut handshake: Box<Handshake>,
        received: Vec<u8>,
        early: &mut Vec<u8>,
    ) -> Result<(Option<Vec<u8>>, bool), TlsError> {
        let mut input = received;
        loop {
            let mut out = Vec::new();
            let progress = handshake.advance(&input, &mut out);
            if !out.is_empty() {
                self.socket.write_all(&out).await.map_err(TlsError::Io)?;
            }
            match progress.map_err(TlsError::Handshake)? {
                Progress::Done(done) => {
                    early.extend_from_slice(&done.early);
                    self.cipher = done.unread;
                    self.tls = Some(Box::new(done.record));
                    return Ok((done.peer_certificate, done.alpn));
                }
                Progress::Pending(pending) => handshake = pending,
            }
            input.clear();
            if self.socket.read(&mut input).await.map_err(TlsError::Io)? == 0 {
                return Err(TlsError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    /// Appends what the peer sent to `buffer`; 0 means that it will send no more.
    ///
    /// # Errors
    /// The socket failed, or a TLS record is forged.
    pub async fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        if self.tls.is_none() {
            return self.socket.read(buffer).await;
        }
        loop {
            let got = self.open_records(buffer).await?;
            if got > 0 || self.closed {
                return Ok(got);
            }
            if self.socket.read(&mut self.cipher).await? == 0 {
                return Ok(0);
            }
        }
    }

    async fn open_records(&mut self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else { return Ok(0) };
        let (mut at, mut got, mut reply) = (0, 0, Vec::new());
        while !self.closed {
            let rest = self.cipher.get_mut(at..).unwrap_or_default();
            match tls.open(rest, &mut reply).map_err(io::Error::other)? {
                Opened::Incomplete => break,
                Opened::Control { consumed } => at += consumed,
                Opened::Closed { consumed } => {
                    at += consumed;
                    self.closed = true;
                }
                Opened::Data { consumed, start, len } => {
                    buffer.extend_from_slice(rest.get(start..start + len).unwrap_or_default());
                    at += consumed;
                    got += len;
                }
            }
        }
        self.cipher.drain(..at);
        if !reply.is_empty() {
            self.socket.write_all(&reply).await?;
        }
        Ok(got)
    }

    /// Sends all of `bytes`.
    ///
    /// # Errors
    /// The socket failed.
    pub async fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.tls {
            None => self.socket.write_all(bytes).await,
            Some(tls) => {
                let mut sealed = Vec::with_capacity(Record::sealed_len_max(bytes.len()));
                tls.seal(bytes, &mut sealed).map_err(io::Error::other)?;
                self.socket.write_all(&sealed).await
            }
        }
    }

    /// Says goodbye where TLS wants it; the socket closes when this is dropped.
    pub async fn close(&mut self) {
        if let Some(tls) = &mut self.tls {
            let mut out = Vec::new();
            if tls.seal_close(&mut out).is_ok() {
                // The peer may be gone already; that is what closing is about.
                let _ = self.socket.write_all(&out).await;
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error(transparent)]
    Handshake(tls::HandshakeError),
    #[error("connection was lost during the TLS handshake")]
    Io(#[source] io::Error),
}
