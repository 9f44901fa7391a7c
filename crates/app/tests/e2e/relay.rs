//! Stands between Holdfast and its servers, and strikes at a message.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::timeout;
use wire::frame::{self, HEADER_LEN, Side};
use wire::frontend;

use crate::support::Installation;

/// Longer than anything that Holdfast itself asks a server may wait for its answer.
const HANG_MAX: Duration = Duration::from_secs(25);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The connection is cut.
    Cut,
    /// Nothing comes any more, and after a while the kernel gives the connection up.
    Hang,
    /// A statement is answered by an error.
    Refuse,
    /// A bit of an answer is another.
    Lie,
}

#[derive(Debug, Clone, Copy)]
struct Armed {
    fault: Fault,
    /// Messages that pass before.
    left: u64,
    /// The first connection that may be hit.
    from: u64,
}

/// Stands between Holdfast and its servers.
#[derive(Clone)]
pub(crate) struct Relay {
    armed: Arc<Mutex<Option<Armed>>>,
    hit: Arc<Mutex<Option<u64>>>,
    pub(crate) connections: Arc<AtomicU64>,
    /// Connections by the port from which they reach the server.
    pub(crate) ports: Arc<Mutex<HashMap<String, u64>>>,
    /// What hangs ends when this changes.
    release: Arc<watch::Sender<u64>>,
}

impl Relay {
    /// Restarts an installation so that the proxy and the control reach the servers through a relay. `own` are lines of
    /// the application's configuration.
    pub(crate) async fn before(installation: &mut Installation, own: &str) -> Relay {
        let relay = Relay {
            armed: Arc::default(),
            hit: Arc::default(),
            connections: Arc::default(),
            ports: Arc::default(),
            release: Arc::new(watch::Sender::new(0)),
        };
        let servers = installation.facts.servers.clone();
        let mut ports = HashMap::new();
        for (name, server) in servers {
            ports.insert(name, (server, relay.stand_before(server).await));
        }
        installation.reconfigure(|config| {
            let config = ports.values().fold(config, |config, (server, port)| {
                let (from, to) =
                    (format!("\"127.0.0.1:{server}\""), format!("\"127.0.0.1:{port}\""));
                config.replacen(&format!("server = {from}"), &format!("server = {to}"), 1)
            });
            config.replacen("[[app]]", &format!("[[app]]\n{own}"), 1)
        });
        relay
    }

    async fn stand_before(&self, server: u16) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let own = self.clone();
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { continue };
                let id = own.connections.fetch_add(1, Ordering::SeqCst);
                let port = server.local_addr().unwrap().port().to_string();
                own.ports.lock().unwrap().insert(port, id);
                tokio::spawn(own.clone().carry(id, client, server));
            }
        });
        port
    }

    async fn carry(self, id: u64, mut client: TcpStream, server: TcpStream) {
        // PostgreSQL's own programs ask for encryption first (`NEGOTIATE_SSL_CODE`, `NEGOTIATE_GSS_CODE`).
        let mut head = [0; 8];
        while let Ok(8) = client.peek(&mut head).await
            && matches!(head[4..], [0x04, 0xd2, 0x16, 0x2f | 0x30])
        {
            client.read_exact(&mut head).await.unwrap();
            client.write_all(b"N").await.unwrap();
        }
        client.set_nodelay(true).unwrap();
        server.set_nodelay(true).unwrap();
        let ((from_client, to_client), (from_server, to_server)) =
            (client.into_split(), server.into_split());
        tokio::select! {
            () = self.pass(id, from_client, to_server, Side::Frontend) => (),
            () = self.pass(id, from_server, to_client, Side::Backend) => (),
        }
    }

    async fn pass(&self, id: u64, mut from: OwnedReadHalf, mut to: OwnedWriteHalf, side: Side) {
        let (mut bytes, mut is_startup) = (Vec::new(), side == Side::Frontend);
        loop {
            let len = if is_startup {
                let len = bytes.first_chunk::<4>().map(|len| u32::from_be_bytes(*len));
                len.and_then(|len| usize::try_from(len).ok()).filter(|len| bytes.len() >= *len)
            } else {
                frame::whole(side, &bytes).unwrap().map(|(_, _, len)| len)
            };
            let Some(len) = len else {
                match from.read_buf(&mut bytes).await {
                    Ok(read) if read > 0 => continue,
                    _ => return,
                }
            };
            let mut message: Vec<u8> = bytes.drain(..len).collect();
            if !std::mem::take(&mut is_startup) {
                match self.fault_at(id, side, &message) {
                    None => (),
                    Some(Fault::Cut) => return,
                    Some(Fault::Hang) => {
                        let _ = timeout(HANG_MAX, self.release.subscribe().changed()).await;
                        return;
                    }
                    Some(Fault::Refuse) => {
                        let name = message[HEADER_LEN..].split(|byte| *byte == 0).next().unwrap();
                        let mut refused = Vec::new();
                        frontend::parse(&mut refused, name, b"SELECT 1/0", &[]);
                        message = refused;
                    }
                    Some(Fault::Lie) => {
                        if let Some(last) = message.get_mut(HEADER_LEN..).and_then(<[u8]>::last_mut)
                        {
                            *last ^= 1;
                        }
                    }
                }
            }
            if to.write_all(&message).await.is_err() {
                return;
            }
        }
    }

    fn fault_at(&self, id: u64, side: Side, message: &[u8]) -> Option<Fault> {
        let mut place = self.armed.lock().unwrap();
        let armed = place.as_mut()?;
        let counts = match (armed.fault, side, message[0]) {
            (Fault::Refuse, Side::Frontend, b'P') => true,
            // Most rows are of settings, one like the other.
            (Fault::Cut | Fault::Hang, Side::Backend, tag) => !matches!(tag, b'D' | b'S' | b'd'),
            // Rows of three columns are of SHOW ALL.
            (Fault::Lie, Side::Backend, b'D') => message.get(5..7) != Some(&[0, 3]),
            (Fault::Lie, Side::Backend, tag) => matches!(tag, b'C' | b'Z'),
            _ => false,
        };
        if !counts || id < armed.from {
            return None;
        }
        if armed.left > 0 {
            armed.left -= 1;
            return None;
        }
        let fault = armed.fault;
        *place = None;
        *self.hit.lock().unwrap() = Some(id);
        Some(fault)
    }

    /// The fault strikes once, after so many messages.
    pub(crate) fn arm(&self, fault: Fault, left: u64, from: u64) {
        *self.hit.lock().unwrap() = None;
        *self.armed.lock().unwrap() = Some(Armed { fault, left, from });
    }

    /// Gives the connection that was hit.
    pub(crate) fn disarm(&self) -> Option<u64> {
        *self.armed.lock().unwrap() = None;
        self.release.send_modify(|count| *count += 1);
        self.hit.lock().unwrap().take()
    }
}
