//! The session as a value, with its two sockets. It is in exactly one place at a time.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use model::barrier::{NamedSession, SessionView};
use model::session::inspect::Hints;
use model::session::names::Names;
use model::session::replay::Step;
use model::session::{Pin, Protocol};
use pg::stream::Parts;
use tls::Record;
use wire::backend::Report;
use wire::frame::{Scanner, Side};
use wire::scram::Credential;

use crate::app::{App, Cell, Params};
use crate::confine::Confined;
use crate::confine::texts::Text;
use crate::pool::Sharing;
use crate::proxy::Place;
use crate::relay::{Edit, LongText};

/// One of a session's two connections.
#[derive(Debug)]
pub struct Leg {
    /// None while the session shares servers with others and is attached to none.
    pub fd: Option<OwnedFd>,
    pub is_unix: bool,
    pub tls: Option<Box<Record>>,
    /// Received ciphertext that is not a whole record.
    pub cipher: Vec<u8>,
    /// Received plaintext that has not been passed on: part of a message, or what is held.
    pub carry: Vec<u8>,
    /// What the socket would not take yet, as it goes on the wire.
    pub out: Vec<u8>,
    /// How much of `out` is sent.
    pub sent: usize,
    /// Where the bytes received from this leg stand between messages.
    pub scanner: Scanner,
    pub readable: bool,
    pub eof: bool,
}

impl Leg {
    pub fn new(parts: Parts, carry: Vec<u8>, side: Side) -> Leg {
        Leg {
            fd: Some(parts.fd),
            is_unix: parts.is_unix,
            tls: parts.tls,
            cipher: parts.cipher,
            carry,
            out: Vec::new(),
            sent: 0,
            scanner: Scanner::new(side),
            readable: true,
            eof: false,
        }
    }

    /// The server's side of a session that is attached to none.
    pub fn vacant() -> Leg {
        Leg {
            fd: None,
            is_unix: false,
            tls: None,
            cipher: Vec::new(),
            carry: Vec::new(),
            out: Vec::new(),
            sent: 0,
            scanner: Scanner::new(Side::Backend),
            readable: false,
            eof: false,
        }
    }

    pub fn is_vacant(&self) -> bool {
        self.fd.is_none()
    }

    /// The descriptor for system calls, which refuse the one of a vacant leg.
    pub fn raw(&self) -> RawFd {
        self.fd.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    /// Ends the connection in one direction or both.
    pub fn shut_down(&self, how: std::net::Shutdown) {
        if let Some(fd) = &self.fd {
            let _ = socket2::SockRef::from(fd).shutdown(how);
        }
    }

    pub fn has_out(&self) -> bool {
        self.sent < self.out.len()
    }

    /// Adds plaintext to what is to be sent.
    pub fn push(&mut self, bytes: &[u8]) {
        match &mut self.tls {
            None => self.out.extend_from_slice(bytes),
            // Sealing fails only when 2^64 records are used up; the peer then misses its end and closes.
            Some(tls) => drop(tls.seal(bytes, &mut self.out)),
        }
    }
}

/// Who logged in, and what it takes to log in as them again.
#[derive(Debug)]
pub struct Identity {
    pub user: String,
    pub database: String,
    /// The startup packet's parameters, as the client sent them.
    pub params: Vec<(Vec<u8>, Vec<u8>)>,
    pub credential: Option<Credential>,
    pub peer: String,
    pub tls: bool,
    pub replication: bool,
}

#[derive(Debug)]
pub struct Session {
    pub id: u64,
    pub app: Arc<App>,
    pub cell: Arc<Cell>,
    pub identity: Arc<Identity>,
    pub client: Leg,
    pub server: Leg,
    pub protocol: Protocol,
    /// Parameters as the client was told them last.
    pub params: Params,
    pub hints: Hints,
    /// The last unnamed Parse as it was sent, header included. What the protocol says of it decides its worth.
    pub unnamed: Vec<u8>,
    /// The unnamed statement was longer than is kept.
    pub unnamed_too_long: bool,
    /// It has had statements with a name.
    pub has_prepared: bool,
    /// What its named statements are, if it shares no servers.
    pub(crate) names: Names<Option<Arc<Text>>>,
    /// SQL's PREPARE has been run.
    pub has_prepared_by_sql: bool,
    /// There may be statements with a name of which nothing is known.
    pub has_lost_names: bool,
    /// SQL has taken names away, or code that nobody has seen may have, and given them anew.
    pub had_deallocated: bool,
    pub had_hidden_code: bool,
    /// Its client has closed, and what it sent before is still to pass.
    pub has_closed: bool,
    /// How often its application was cut from its servers, when its engine last did that.
    pub cuts_seen: u64,
    /// Its server has reported that its transactions may write, by themselves.
    pub has_lifted_fence: bool,
    /// What is known of it while its commands are judged.
    pub(crate) confined: Option<Box<Confined>>,
    /// Since it has, a setting has changed by which the server reads literals when it prepares a statement.
    pub restyled: bool,
    /// What RESET finds, once it was asked: it stays the same wherever the session goes.
    pub beneath: Option<Arc<BTreeMap<String, String>>>,
    /// The same since the unnamed statement was prepared.
    pub unnamed_restyled: bool,
    /// A long statement is passing.
    pub long: Option<Box<LongText>>,
    /// What the client knows: the pid of its first backend, and a secret of ours.
    pub client_pid: i32,
    pub client_secret: Box<[u8]>,
    pub backend_pid: i32,
    pub backend_secret: Box<[u8]>,
    /// The client sends no more; what it asked for may still be answered.
    pub client_gone: bool,
    /// The server was told so.
    pub goodbye_said: bool,
    /// What is carried of the client may be able to pass by now.
    pub carry_waits: bool,
    /// The server has closed; the client has not taken all of its last words.
    pub server_gone: bool,
    /// The server's last words were a fatal error, which says why it closes.
    pub server_said_why: bool,
    /// Cancel requests that are on their way to the server.
    pub cancels: Arc<AtomicU32>,
    /// Hand the session out at its next safe point.
    pub wanted: bool,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub requests: u64,
    /// Seconds since the proxy started.
    pub connected_at: u32,
    pub active_at: u32,
    /// How often it was attached to another server.
    pub moves: u32,
    /// What gives it its `idle_session_timeout` again, which it must not meet while it is held.
    pub stilled: Vec<Step>,
    /// When it was handed out, while it is held.
    pub held_since: Option<std::time::Instant>,
    /// Its place among the clients, and its cancel key.
    pub place: Place,
    /// It shares servers with others.
    pub sharing: Option<Box<Sharing>>,
    /// Changes to the bytes that were looked at last.
    pub edits: Vec<Edit>,
}

impl Session {
    pub fn named(&self) -> NamedSession {
        NamedSession {
            id: self.id,
            user: self.identity.user.clone(),
            database: self.identity.database.clone(),
            application_name: self.params.get("application_name").cloned().unwrap_or_default(),
        }
    }

    /// Pins that are known without asking the server.
    pub fn known_pins(&self) -> Vec<Pin> {
        let mut pins: Vec<Pin> = self.hints.pins.iter().cloned().collect();
        if self.identity.replication {
            pins.push(Pin::Replication);
        }
        if self.protocol.is_out_of_step() {
            pins.push(Pin::OutOfStep);
        }
        pins
    }

    /// Nothing is under way in either direction, so the session can be taken from its server.
    pub fn is_at_safe_point(&self) -> bool {
        self.protocol.is_safe_point()
            && (self.protocol.is_idle() || !self.hints.modes)
            && self.client.scanner.at_boundary()
            && self.server.scanner.at_boundary()
            && self.server.carry.is_empty()
            && !self.client.has_out()
            && !self.server.has_out()
    }

    /// It stands on no server, and there is nothing of it anywhere but here.
    pub fn is_detached(&self) -> bool {
        self.server.is_vacant()
    }

    pub fn cancels_under_way(&self) -> bool {
        self.cancels.load(Ordering::Acquire) > 0
    }

    /// Tells the client why it ends, as far as its socket takes it at once, and ends the session.
    pub fn tell_and_end(mut self: Box<Self>, report: &Report) {
        let mut out = Vec::new();
        report.write_error(&mut out);
        self.client.push(&out);
        if let Some(tls) = &mut self.client.tls {
            let _ = tls.seal_close(&mut self.client.out);
        }
        write_some(&mut self.client);
        terminate(&mut self.server);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.app.sessions.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Sends what the socket takes without waiting. An error shows at the next read.
pub fn write_some(leg: &mut Leg) {
    while leg.has_out() {
        let Some(fd) = &leg.fd else { return };
        let socket = socket2::SockRef::from(fd);
        match socket.send(leg.out.get(leg.sent..).unwrap_or_default()) {
            Ok(0) | Err(_) => return,
            Ok(len) => leg.sent += len,
        }
    }
    leg.out = Vec::new();
    leg.sent = 0;
}

/// Tells the server that the session has ended, so that it does not log a lost connection.
pub fn terminate(server: &mut Leg) {
    if server.scanner.at_boundary() && !server.has_out() {
        let mut out = Vec::new();
        wire::frontend::terminate(&mut out);
        server.push(&out);
        write_some(server);
    }
}

impl Session {
    pub fn view(&self, now: u32) -> SessionView {
        let named = self.named();
        SessionView {
            id: self.id,
            app: self.app.name.clone(),
            user: named.user,
            database: named.database,
            application_name: named.application_name,
            client: self.identity.peer.clone(),
            tls: self.identity.tls,
            cell: self.cell.name.clone(),
            server: if self.is_detached() {
                String::new()
            } else {
                self.cell.target.address.to_string()
            },
            backend_pid: self.backend_pid,
            state: self.protocol.occupation().to_owned(),
            connected_s: u64::from(now.saturating_sub(self.connected_at)),
            idle_s: u64::from(now.saturating_sub(self.active_at)),
            bytes_in: self.bytes_in,
            bytes_out: self.bytes_out,
            requests: self.requests,
            moves: self.moves,
            pins: self.known_pins().iter().map(Pin::to_string).collect(),
            pool: match self.sharing.as_deref() {
                None => String::new(),
                Some(Sharing { keeps: Some(keeps), .. }) => {
                    format!("keeps its server: {}", keeps.why)
                }
                Some(Sharing { waits_since: Some(_), .. }) => "waits".into(),
                Some(_) => "shared".into(),
            },
        }
    }
}
