//! The engine on epoll: one registration a socket, edge-triggered; a short read means that no more is there.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use wire::backend::Report;
use wire::sqlstate::SqlState;

use super::leg::{BUFFER_LEN, Buffers, fill, flush, keep, pass_on};
use super::lending::Lending;
use super::sys::{self, Epoll, Event};
use super::{CancelTo, Clock, Command, EngineHandle, Out, Want};
use crate::app::App;
use crate::relay::{Fault, edited};
use crate::session::{Session, terminate, write_some};

/// Turns of one session before the others have theirs.
const TURNS_MAX: usize = 4;
/// Between looks whether parked sessions may go on.
const PARKED_MS: i32 = 5;
/// Between looks at idle sessions.
const TICK_MS: i32 = 1_000;
const WAKE: u64 = u64::MAX;
/// Tokens of servers that are shared.
pub(super) const POOLED: u64 = 1 << 63;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

pub(super) struct Slot {
    pub(super) session: Box<Session>,
    /// Who wants the session.
    out: Option<Out>,
    /// It is in the list of sessions that have more to do.
    pub(super) queued: bool,
}

pub(super) struct Engine {
    pub(super) handle: Arc<EngineHandle>,
    pub(super) epoll: Epoll,
    pub(super) slots: Vec<Option<Slot>>,
    /// Generations tell an event of a session from one of its successor in the same slot.
    generations: Vec<u32>,
    free: Vec<usize>,
    by_id: HashMap<u64, usize>,
    pub(super) ready: Vec<usize>,
    /// Sessions of which nothing passes until it is proven again where they stand.
    parked: Vec<usize>,
    pub(super) buffers: Buffers,
    idle_timeout_s: u32,
    clock: Clock,
    last_tick: u32,
    /// Applications whose sessions are wanted, those included that come in later.
    wants: Vec<(Arc<App>, Out)>,
    /// Servers that sessions share.
    pub(super) lending: Lending,
}

/// Why a session leaves the engine.
pub(super) enum End {
    Client,
    Server,
    Fault(Fault),
    Lost(io::Error),
}

fn token(slot: usize, generation: u32, side: Side) -> u64 {
    let side = u64::from(side == Side::Server);
    u64::try_from(slot).unwrap_or(0) << 32 | u64::from(generation & 0x7fff_ffff) << 1 | side
}

impl Engine {
    pub(super) fn new(
        handle: Arc<EngineHandle>,
        idle_timeout_s: u32,
        clock: Clock,
    ) -> io::Result<Engine> {
        let epoll = Epoll::new()?;
        epoll.add(handle.wake.as_raw_fd(), WAKE)?;
        Ok(Engine {
            handle,
            epoll,
            slots: Vec::new(),
            generations: Vec::new(),
            free: Vec::new(),
            by_id: HashMap::new(),
            ready: Vec::new(),
            parked: Vec::new(),
            buffers: Buffers::new(),
            idle_timeout_s,
            clock,
            last_tick: 0,
            wants: Vec::new(),
            lending: Lending::default(),
        })
    }

    pub(super) fn run(mut self) {
        let mut events: Vec<Event> = Vec::with_capacity(sys::EVENTS_MAX);
        loop {
            let timeout = match (self.ready.is_empty(), self.parked.is_empty()) {
                (false, _) => 0,
                (true, false) => PARKED_MS,
                (true, true) => TICK_MS,
            };
            if let Err(error) = self.epoll.wait(timeout, &mut events) {
                tracing::error!(%error, "epoll does not work, the engine ends");
                return;
            }
            for event in events.drain(..) {
                if event.token == WAKE {
                    sys::drain(self.handle.wake.as_raw_fd());
                } else {
                    self.on_event(event);
                }
            }
            self.ready.append(&mut self.parked);
            for slot in std::mem::take(&mut self.ready) {
                if let Some(Some(entry)) = self.slots.get_mut(slot) {
                    entry.queued = false;
                    self.drive(slot);
                }
            }
            for command in self.handle.take() {
                if !self.on_command(command) {
                    return;
                }
            }
            self.tick();
        }
    }

    fn on_event(&mut self, event: Event) {
        if event.token & POOLED != 0 {
            return self.on_server_event(event);
        }
        let slot = usize::try_from(event.token >> 32).unwrap_or(usize::MAX);
        let generation = u32::try_from(event.token >> 1 & 0x7fff_ffff).unwrap_or(0);
        if self.generations.get(slot).is_none_or(|current| current & 0x7fff_ffff != generation) {
            return;
        }
        let Some(Some(entry)) = self.slots.get_mut(slot) else { return };
        let leg = if event.token & 1 == 1 {
            &mut entry.session.server
        } else {
            &mut entry.session.client
        };
        leg.readable |= event.readable;
        leg.eof |= event.closing;
        if !entry.queued {
            entry.queued = true;
            self.ready.push(slot);
        }
    }

    fn on_command(&mut self, command: Command) -> bool {
        match command {
            Command::Add(session) => self.add(session),
            Command::Want(want, out) => {
                if let Want::App(app) = &want {
                    self.wants.push((app.clone(), out.clone()));
                    self.give_up_idle(app);
                }
                for slot in self.matching(&want) {
                    if let Some(Some(entry)) = self.slots.get_mut(slot) {
                        entry.session.wanted = true;
                        entry.out = Some(out.clone());
                        self.settle(slot);
                        self.hand_out(slot);
                    }
                }
            }
            Command::Unwant(want) => {
                if let Want::App(app) = &want {
                    self.wants.retain(|(wanted, _)| !Arc::ptr_eq(wanted, app));
                }
                for slot in self.matching(&want) {
                    if let Some(Some(entry)) = self.slots.get_mut(slot) {
                        entry.session.wanted = false;
                        entry.out = None;
                        entry.session.client.readable = true;
                        entry.session.carry_waits = true;
                        self.ask_again(slot);
                        self.drive(slot);
                    }
                }
            }
            Command::Cut(app) => {
                let cuts = app.cuts();
                self.give_up_idle(&app);
                for slot in self.matching(&Want::App(app)) {
                    if let Some(Some(entry)) = self.slots.get_mut(slot) {
                        cut(&mut entry.session);
                        entry.session.cuts_seen = cuts;
                        self.drive(slot);
                    }
                }
            }
            Command::End(want, report) => {
                for slot in self.matching(&want) {
                    if let Some(entry) = self.take_out(slot) {
                        entry.session.tell_and_end(&report);
                    }
                }
            }
            Command::Cancel(id, reply) => {
                if let Some(slot) = self.by_id.get(&id).copied() {
                    self.cancel_in_line(slot);
                }
                let slot = self.by_id.get(&id).and_then(|slot| self.slots.get(*slot)?.as_ref());
                let running = slot.filter(|entry| entry.session.protocol.is_running());
                let to = running.map(|entry| {
                    let session = &entry.session;
                    session.cancels.fetch_add(1, Ordering::AcqRel);
                    CancelTo {
                        cell: session.cell.clone(),
                        pid: session.backend_pid,
                        secret: session.backend_secret.clone(),
                        under_way: session.cancels.clone(),
                    }
                });
                // Whoever asked has gone only if its own deadline has passed; then nothing is under way.
                if let Err(Some(to)) = reply.send(to) {
                    to.under_way.fetch_sub(1, Ordering::AcqRel);
                }
            }
            Command::Views(reply) => {
                let now = self.clock.seconds();
                let views =
                    self.slots.iter().flatten().map(|entry| entry.session.view(now)).collect();
                let _ = reply.send(views);
            }
            Command::Pools(reply) => drop(reply.send(self.lending.views())),
            Command::Resume(app) => {
                self.retry();
                for slot in self.matching(&Want::App(app)) {
                    let Some(Some(entry)) = self.slots.get_mut(slot) else { continue };
                    let sharing = entry.session.sharing.as_mut();
                    let waits_for_names =
                        sharing.is_some_and(|sharing| std::mem::take(&mut sharing.waits_for_names));
                    if waits_for_names || entry.session.is_held_by_rule() {
                        entry.session.carry_waits = true;
                        self.drive(slot);
                    }
                }
            }
            Command::Opened(pool, result) => self.on_opened(&pool, result),
            Command::Stop => return false,
        }
        true
    }

    fn matching(&self, want: &Want) -> Vec<usize> {
        match want {
            Want::One(id) => self.by_id.get(id).copied().into_iter().collect(),
            Want::App(app) => {
                let of_app = |(at, slot): (usize, &Option<Slot>)| {
                    slot.as_ref()
                        .is_some_and(|entry| Arc::ptr_eq(&entry.session.app, app))
                        .then_some(at)
                };
                self.slots.iter().enumerate().filter_map(of_app).collect()
            }
        }
    }

    pub(super) fn add(&mut self, mut session: Box<Session>) {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.generations.push(0);
            self.slots.len() - 1
        });
        session.client.readable = true;
        session.server.readable = !session.server_gone && !session.is_detached();
        session.carry_waits = true;
        session.active_at = self.clock.seconds();
        session.cuts_seen = session.app.cuts();
        if session.app.is_lost(&session.cell) {
            cut(&mut session);
        }
        let generation = self.generations.get(slot).copied().unwrap_or(0);
        let of_server = match self.admit(&mut session, slot) {
            Some(token) => token,
            None => token(slot, generation, Side::Server),
        };
        let mut registered =
            self.epoll.add(session.client.raw(), token(slot, generation, Side::Client));
        if !session.is_detached() {
            registered = registered.and_then(|()| self.epoll.add(session.server.raw(), of_server));
        }
        self.by_id.insert(session.id, slot);
        let out = self
            .wants
            .iter()
            .find(|(app, _)| Arc::ptr_eq(app, &session.app))
            .map(|(_, out)| out.clone());
        session.wanted = out.is_some();
        let entry = Slot { session, out, queued: false };
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(entry);
        }
        match registered {
            Ok(()) => self.drive(slot),
            Err(error) => self.end(slot, End::Lost(error)),
        }
    }

    /// Takes a session out of its slot and its sockets out of epoll.
    pub(super) fn take_out(&mut self, slot: usize) -> Option<Slot> {
        let mut entry = self.slots.get_mut(slot)?.take()?;
        self.dismiss(&mut entry.session);
        self.epoll.remove(entry.session.client.raw());
        self.epoll.remove(entry.session.server.raw());
        self.by_id.remove(&entry.session.id);
        if let Some(generation) = self.generations.get_mut(slot) {
            *generation = generation.wrapping_add(1);
        }
        self.free.push(slot);
        Some(entry)
    }

    /// Hands a wanted session out if nothing is under way.
    fn hand_out(&mut self, slot: usize) {
        let Some(Some(entry)) = self.slots.get(slot) else { return };
        if !entry.session.wanted || !entry.session.is_at_safe_point() {
            return;
        }
        let Some(entry) = self.take_out(slot) else { return };
        let mut session = entry.session;
        session.wanted = false;
        // A taker that has gone away lets the session go on.
        let back = match entry.out {
            Some(out) => out.send(session).err().map(|error| error.0),
            None => Some(session),
        };
        if let Some(session) = back {
            self.wants.retain(|(app, _)| !Arc::ptr_eq(app, &session.app));
            self.add(session);
        }
    }

    fn tick(&mut self) {
        let now = self.clock.seconds();
        if now == self.last_tick {
            return;
        }
        self.last_tick = now;
        if !self.lending.is_empty() {
            self.tick_pools();
        }
        for slot in 0..self.slots.len() {
            let Some(Some(entry)) = self.slots.get_mut(slot) else { continue };
            if entry.session.is_held_by_rule() {
                // Its time may be over.
                entry.session.carry_waits = true;
                self.drive(slot);
                continue;
            }
            if self.idle_timeout_s == 0 {
                continue;
            }
            let session = &entry.session;
            if session.protocol.is_idle()
                && now.saturating_sub(session.active_at) > self.idle_timeout_s
            {
                let report = Report::fatal(
                    SqlState::IDLE_SESSION_TIMEOUT,
                    format!("session was idle for more than {} s", self.idle_timeout_s),
                )
                .hint("`idle_timeout` of the proxy ends idle sessions");
                if let Some(entry) = self.take_out(slot) {
                    entry.session.tell_and_end(&report);
                }
            }
        }
    }

    /// Moves what can be moved for one session, then lets the others have their turn.
    pub(super) fn drive(&mut self, slot: usize) {
        let now = self.clock.seconds();
        let Some(Some(entry)) = self.slots.get_mut(slot) else { return };
        let session = &mut *entry.session;
        // Of a server that is cut off, what it has answered is read, and nothing reaches it.
        let is_cut = session.is_detached() || session.server_gone || session.server.eof;
        let is_to_be_cut = session.cuts_seen != session.app.cuts();
        if !is_cut && (is_to_be_cut || session.app.is_unproven()) {
            if !entry.queued {
                entry.queued = true;
                self.parked.push(slot);
            }
            return;
        }
        let before = (session.bytes_in, session.bytes_out, session.requests);
        if let Some(sharing) = &mut session.sharing {
            sharing.others_wait = self.lending.someone_waits(sharing.pool.id);
        }
        let mut outcome = Ok(true);
        for turns in 0..TURNS_MAX {
            // Each reads what has come meanwhile.
            if turns > 0 && !is_cut && session.app.is_unproven() {
                break;
            }
            outcome = turn(session, &mut self.buffers);
            if !matches!(outcome, Ok(true)) {
                break;
            }
        }
        let counters = &self.handle.counters;
        if session.bytes_in != before.0 || session.bytes_out != before.1 {
            session.active_at = now;
            counters.bytes_in.fetch_add(session.bytes_in - before.0, Ordering::Relaxed);
            counters.bytes_out.fetch_add(session.bytes_out - before.1, Ordering::Relaxed);
            counters.requests.fetch_add(session.requests - before.2, Ordering::Relaxed);
        }
        match outcome {
            Ok(more) => {
                if more && !entry.queued {
                    entry.queued = true;
                    self.ready.push(slot);
                }
                let (shares, wanted) = (entry.session.sharing.is_some(), entry.session.wanted);
                if shares {
                    self.settle(slot);
                }
                if wanted {
                    self.hand_out(slot);
                }
            }
            Err(End::Server | End::Lost(_)) if self.outlive(slot) => (),
            Err(end) => self.end(slot, end),
        }
    }

    pub(super) fn end(&mut self, slot: usize, end: End) {
        let Some(mut entry) = self.take_out(slot) else { return };
        let session = &mut entry.session;
        let counters = &self.handle.counters;
        counters.ended.fetch_add(1, Ordering::Relaxed);
        let told = match end {
            End::Client => {
                if session.protocol.is_quiet() {
                    terminate(&mut session.server);
                }
                None
            }
            End::Server => {
                counters.lost_server.fetch_add(1, Ordering::Relaxed);
                let lost = server_lost(session, "server closed the connection");
                (!session.server_said_why).then_some(lost)
            }
            End::Fault(Fault::Settings) => {
                let lost = Report::fatal(SqlState::ADMIN_SHUTDOWN, Fault::Settings.to_string())
                    .detail("settings by which its literals are read have changed, and its server serves others")
                    .hint("connect again; prepare it after the settings, or give it parameters");
                Some(lost)
            }
            End::Fault(Fault::Unfenced) => {
                let told = Report::fatal(SqlState::ADMIN_SHUTDOWN, Fault::Unfenced.to_string())
                    .hint("connect again; the server of a fenced cell lets nobody write");
                Some(told)
            }
            End::Fault(fault) => {
                counters.protocol_errors.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(session = session.id, %fault, "session ended");
                let state = match fault {
                    Fault::Client(_) => SqlState::PROTOCOL_VIOLATION,
                    Fault::Server(_) | Fault::Settings | Fault::Unfenced => {
                        SqlState::CONNECTION_FAILURE
                    }
                };
                Some(Report::fatal(state, fault.to_string()))
            }
            End::Lost(error) => {
                tracing::debug!(session = session.id, %error, "session ended");
                let lost = server_lost(session, "connection to the server was lost");
                (!session.server_said_why).then_some(lost)
            }
        };
        // An error in the middle of a message would be read as part of it, and one who has left reads none.
        if let Some(report) = told
            && !session.client_gone
            && session.server.scanner.at_boundary()
            && session.server.carry.is_empty()
        {
            let mut out = Vec::new();
            report.write_error(&mut out);
            session.client.push(&out);
            write_some(&mut session.client);
        }
        if let Some(tls) = &mut session.client.tls {
            let _ = tls.seal_close(&mut session.client.out);
            write_some(&mut session.client);
        }
    }
}

/// The server is lost. What it has answered is still read.
fn cut(session: &mut Session) {
    if !session.is_detached() {
        session.server.shut_down(std::net::Shutdown::Both);
        (session.server.readable, session.server.eof) = (true, true);
    }
}

/// What the client is told whose session cannot go on without its server.
fn server_lost(session: &Session, what: &str) -> Report {
    let report = Report::fatal(SqlState::CONNECTION_FAILURE, what);
    match session.needs_its_server().filter(|_| session.sharing.is_some()) {
        Some(why) => report
            .detail(format!("the session cannot go on with another server: {why}"))
            .hint("connect again; the session's temporary state is lost"),
        None => report,
    }
}

/// One turn in both directions; whether more can be done at once.
fn turn(session: &mut Session, buffers: &mut Buffers) -> Result<bool, End> {
    if session.client.has_out() {
        flush(&mut session.client).map_err(|_| End::Client)?;
    }
    if session.server.has_out() {
        let flushed = flush(&mut session.server);
        written(session, flushed);
    }
    if session.server_gone && !session.client.has_out() {
        return Err(End::Server);
    }
    if session.server.readable && !session.client.has_out() && !session.server_gone {
        from_server(session, buffers)?;
    }
    if !session.server.has_out() {
        if may_read(session) {
            from_client(session, buffers, Source::Socket)?;
        } else if session.carry_waits && !session.client.carry.is_empty() {
            // What was read before and had to wait: for an answer, or for the end of a hold.
            from_client(session, buffers, Source::Carry)?;
        }
        if session.client_gone && !session.server.has_out() && session.client.carry.is_empty() {
            if session.is_detached() {
                return Err(End::Client);
            }
            if !leaves_its_server(session) {
                say_goodbye(session);
            }
        }
    }
    if session.client.has_out() && session.sharing.is_some() {
        // What we have answered in the server's place.
        flush(&mut session.client).map_err(|_| End::Client)?;
    }
    let more_client = !session.server.has_out() && may_read(session);
    let more_server = session.server.readable && !session.client.has_out() && !session.server_gone;
    Ok(more_client || more_server)
}

/// The client is not read once it has said goodbye, and while much of what it sent before has to wait.
fn may_read(session: &Session) -> bool {
    let waits = session.client.carry.len() >= BUFFER_LEN / 2
        || session.sharing.as_ref().is_some_and(|sharing| sharing.needs)
        || (session.wanted && session.is_at_safe_point());
    session.client.readable && !session.client_gone && !waits
}

/// The client sends no more. The server is told so and may answer what it was asked; its close ends the session.
fn say_goodbye(session: &mut Session) {
    if !session.goodbye_said {
        session.goodbye_said = true;
        session.server.shut_down(std::net::Shutdown::Write);
    }
}

/// The client has left, and its server can be shared on once it has answered.
fn leaves_its_server(session: &Session) -> bool {
    let shares = session.sharing.as_ref().is_some_and(|sharing| sharing.keeps.is_none());
    let protocol = &session.protocol;
    let ends = protocol.comes_to_an_end() && session.client.scanner.at_boundary();
    shares && ends && (protocol.is_running() || protocol.is_idle())
}

/// A server that takes no more may still have said why: it is read to its end before the session ends.
fn written(session: &mut Session, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(session = session.id, %error, "server takes no more");
        session.server.out = Vec::new();
        session.server.sent = 0;
        session.server.readable = true;
        session.server.eof = true;
    }
}

/// Where bytes of the client are taken from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Socket,
    Carry,
}

fn from_client(session: &mut Session, buffers: &mut Buffers, source: Source) -> Result<(), End> {
    let Buffers { plain, cipher, sealed, scratch } = buffers;
    let (filled, closed) = match source {
        Source::Socket => {
            fill(&mut session.client, plain, cipher, sealed).map_err(|_| End::Client)?
        }
        Source::Carry => {
            let carried = session.client.carry.len();
            let place = plain.get_mut(..carried).ok_or(End::Client)?;
            place.copy_from_slice(&session.client.carry);
            (carried, false)
        }
    };
    session.carry_waits = false;
    let bytes = plain.get(..filled).unwrap_or_default();
    session.edits.clear();
    let pass = session.on_client_bytes(bytes);
    let pass = pass.map_err(End::Fault)?;
    session.bytes_in += u64::try_from(pass.len).unwrap_or(0);
    keep(&mut session.client.carry, bytes.get(pass.len..).unwrap_or_default());
    let passing = bytes.get(..pass.len).unwrap_or_default();
    let passed = if session.is_detached() {
        // At most a goodbye.
        Ok(())
    } else if session.edits.is_empty() {
        pass_on(&mut session.server, passing, sealed)
    } else {
        scratch.clear();
        edited(passing, &session.edits, scratch);
        pass_on(&mut session.server, scratch, sealed)
    };
    written(session, passed);
    let mut waits = session.wanted;
    let mut closed = closed;
    if session.sharing.is_some() || session.confined.is_some() {
        // A whole message that has not passed waits for something.
        let message = wire::frame::whole(wire::frame::Side::Frontend, &session.client.carry);
        waits |= matches!(message, Ok(Some(_))) && !session.is_held_by_rule();
    }
    waits |= session.sharing.as_ref().is_some_and(|sharing| sharing.needs);
    session.has_closed |= closed;
    closed = session.has_closed;
    if closed && waits && !session.client.carry.is_empty() {
        // It goes as soon as what it sent may pass.
        session.client.readable = false;
        return Ok(());
    }
    if pass.terminated || closed {
        session.client_gone = true;
        session.client.carry = Vec::new();
    }
    Ok(())
}

fn from_server(session: &mut Session, buffers: &mut Buffers) -> Result<(), End> {
    let Buffers { plain, cipher, sealed, scratch } = buffers;
    let (filled, closed) = fill(&mut session.server, plain, cipher, sealed).map_err(End::Lost)?;
    let bytes = plain.get_mut(..filled).unwrap_or_default();
    session.edits.clear();
    let len = session.on_server_bytes(bytes).map_err(End::Fault)?;
    session.bytes_out += u64::try_from(len).unwrap_or(0);
    session.carry_waits = true;
    keep(&mut session.server.carry, bytes.get(len..).unwrap_or_default());
    let passing = bytes.get(..len).unwrap_or_default();
    let passed = if session.edits.is_empty() {
        pass_on(&mut session.client, passing, sealed)
    } else {
        scratch.clear();
        edited(passing, &session.edits, scratch);
        pass_on(&mut session.client, scratch, sealed)
    };
    passed.map_err(|_| End::Client)?;
    if closed {
        // What a slow client has not taken yet is still its due.
        session.server_gone = true;
        session.server.readable = false;
        return if session.client.has_out() { Ok(()) } else { Err(End::Server) };
    }
    if session.protocol.is_safe_point() {
        session.shrink();
    }
    Ok(())
}
