//! Attaching sessions that share servers, and detaching them again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use model::session::footprint::Leaves;
use model::session::protocol::{Own, Unnamed};
use wire::backend::{Backend, Report};
use wire::frame::{HEADER_LEN, Side};
use wire::frontend;
use wire::sqlstate::SqlState;

use super::leg::{fill, flush};
use super::lending::{Chores, Lent};
use super::poll::{End, Engine, POOLED, Slot};
use super::sys::Event;
use crate::app::App;
use crate::pool::keeper::Job;
use crate::pool::{Asked, Keeps, NotOpened, Pool, Server, State};
use crate::session::{Leg, Session, terminate};

/// So many looks at a session come at once: clients set something when they begin. From then on there are pauses, each
/// twice as long as the one before.
const LOOKS_AT_ONCE: u32 = 4;
const LOOK_PAUSE: Duration = Duration::from_secs(1);
const LOOK_DOUBLINGS_MAX: u32 = 6;

fn server_token(at: usize, generation: u32) -> u64 {
    POOLED | u64::try_from(at).unwrap_or(0) << 32 | u64::from(generation & 0x7fff_ffff) << 1
}

impl Engine {
    /// A session comes in. If it shares servers and has brought one, that is in the table from now on.
    pub(super) fn admit(&mut self, session: &mut Session, slot: usize) -> Option<u64> {
        let app = session.app.clone();
        let sharing = session.sharing.as_mut()?;
        (sharing.needs, sharing.waits_since) = (false, None);
        sharing.come_back();
        if session.server.is_vacant() {
            return None;
        }
        let at = self.lending.admit(&app, &sharing.pool, Some(slot));
        sharing.lent = Some(at);
        self.lending.set_kept(at, sharing.keeps.is_some());
        Some(server_token(at, self.lending.generation(at)))
    }

    /// The server of the session in `slot` is lost. Whether the session goes on without.
    pub(super) fn outlive(&mut self, slot: usize) -> bool {
        let Some(Some(entry)) = self.slots.get_mut(slot) else { return false };
        let session = &mut entry.session;
        if !session.may_outlive() {
            return false;
        }
        let app = session.app.clone();
        let Some(sharing) = session.sharing.as_mut() else { return false };
        let Some(at) = sharing.lent.take() else { return false };
        let pool = sharing.pool.clone();
        self.epoll.remove(session.server.raw());
        session.lose_server();
        self.handle.counters.outlived.fetch_add(1, Ordering::Relaxed);
        if !entry.queued {
            entry.queued = true;
            self.ready.push(slot);
        }
        self.lending.dismiss(at);
        let mut chores = Chores::default();
        self.lending.provide(&app, &pool, &mut chores);
        self.do_chores(chores);
        true
    }

    /// Tries again to open servers for those who wait.
    pub(super) fn retry(&mut self) {
        let mut chores = Chores::default();
        self.lending.retry(&mut chores);
        self.do_chores(chores);
    }

    /// A session leaves, and its server with it.
    pub(super) fn dismiss(&mut self, session: &mut Session) {
        let Some(sharing) = session.sharing.as_mut() else { return };
        match sharing.lent.take() {
            Some(at) => {
                sharing.go_away(&session.app.pools);
                if session.protocol.is_running() {
                    // Nobody will hear what it has defined.
                    sharing.pool.database.doubt();
                }
                self.lending.dismiss(at);
                let mut chores = Chores::default();
                self.lending.provide(&session.app, &sharing.pool, &mut chores);
                self.do_chores(chores);
            }
            None => self.lending.leave_line(sharing.pool.id, session.id),
        }
        (sharing.needs, sharing.waits_since) = (false, None);
    }

    pub(super) fn on_server_event(&mut self, event: Event) {
        let at = usize::try_from((event.token & !POOLED) >> 32).unwrap_or(usize::MAX);
        let generation = u32::try_from(event.token >> 1 & 0x7fff_ffff).unwrap_or(0);
        if self.lending.generation(at) & 0x7fff_ffff != generation {
            return;
        }
        let Some(entry) = self.lending.entry(at) else { return };
        if let Some(slot) = entry.lent_to {
            let Some(Some(entry)) = self.slots.get_mut(slot) else { return };
            entry.session.server.readable |= event.readable;
            entry.session.server.eof |= event.closing;
            if !entry.queued {
                entry.queued = true;
                self.ready.push(slot);
            }
            return;
        }
        let Some(server) = &mut entry.idle else { return };
        server.leg.readable |= event.readable;
        server.leg.eof |= event.closing;
        let buffers = &mut self.buffers;
        if !hear_idle(server, &mut buffers.plain, &mut buffers.cipher, &mut buffers.sealed)
            && let Some(server) = self.lending.dismiss(at)
        {
            tracing::debug!(pid = server.pid, "an idle server connection has ended");
            self.epoll.remove(server.leg.raw());
        }
    }

    /// Attaches or detaches the session in `slot` if it is time to.
    pub(super) fn settle(&mut self, slot: usize) {
        let Some(Some(Slot { session, .. })) = self.slots.get_mut(slot) else { return };
        let Some(sharing) = &mut session.sharing else { return };
        if session.server.is_vacant() {
            if sharing.needs && sharing.waits_since.is_none() && !session.wanted {
                sharing.waits_since = Some(Instant::now());
                self.ask(slot);
            }
            return;
        }
        if session.protocol.own_refused() {
            let report = Report::fatal(
                SqlState::ADMIN_SHUTDOWN,
                "terminating connection due to administrator command",
            )
            .detail("the session's settings could not be given to another server")
            .hint("connect again; the session's settings are lost");
            if let Some(entry) = self.take_out(slot) {
                entry.session.tell_and_end(&report);
            }
            return;
        }
        if let Some(at) = sharing.lent {
            self.lending.set_kept(at, sharing.keeps.is_some());
        }
        if !may_be_detached(session) {
            return;
        }
        match keeps(session) {
            None if session.ask_before_detached() => {
                if flush(&mut session.server).is_err() {
                    session.server.readable = true;
                }
            }
            None => {
                let has_left = session.client_gone;
                self.detach(slot);
                if has_left {
                    self.end(slot, End::Client);
                }
            }
            Some((true, pause)) if !session.wanted && !session.client_gone => {
                let sharing = session.sharing.as_deref();
                let due = sharing
                    .and_then(|sharing| sharing.looked_at)
                    .is_none_or(|at| at.elapsed() >= pause);
                if due {
                    self.look(slot);
                }
            }
            // What it has left goes with its server.
            Some(_) if session.client_gone => self.end(slot, End::Client),
            Some(_) => (),
        }
    }

    /// Has somebody look at what a session has left on its server.
    fn look(&mut self, slot: usize) {
        let Some(mut entry) = self.take_out(slot) else { return };
        if let Some(sharing) = &mut entry.session.sharing {
            sharing.looks += 1;
            sharing.looked_at = Some(Instant::now());
        }
        let Some(keeper) = self.handle.keeper.get() else { return };
        if let Err(error) = keeper.send(Job::Look(entry.session))
            && let Job::Look(session) = error.0
        {
            // The proxy is stopping.
            drop(session);
        }
    }

    fn ask(&mut self, slot: usize) {
        let Some(Some(Slot { session, .. })) = self.slots.get_mut(slot) else { return };
        let Some(sharing) = &session.sharing else { return };
        let (app, pool, state, id) =
            (session.app.clone(), sharing.pool.clone(), sharing.state_now(), session.id);
        let mut chores = Chores::default();
        let lent = self.lending.ask(&app, &pool, &state, (slot, id), &mut chores);
        self.do_chores(chores);
        if let Lent::Server(at, server, text) = lent {
            self.attach(slot, at, server, text);
        }
    }

    /// Servers passed by whoever was wanted meanwhile: it asks anew.
    pub(super) fn ask_again(&mut self, slot: usize) {
        let Some(Some(Slot { session, .. })) = self.slots.get_mut(slot) else { return };
        let Some(sharing) = session.sharing.as_mut().filter(|_| session.server.is_vacant()) else {
            return;
        };
        sharing.waits_since = None;
        self.lending.leave_line(sharing.pool.id, session.id);
    }

    fn do_chores(&mut self, chores: Chores) {
        for (_, mut server) in chores.close {
            self.epoll.remove(server.leg.raw());
            terminate(&mut server.leg);
        }
        for (app, pool) in chores.open {
            let Some(keeper) = self.handle.keeper.get() else { return };
            let _ = keeper.send(Job::Open { app, pool, engine: self.handle.clone() });
        }
    }

    /// Puts the session in `slot` on a server. What it has sent goes on once the statements in `text` have run.
    fn attach(&mut self, slot: usize, at: usize, server: Box<Server>, text: Option<String>) {
        let Some(Some(entry)) = self.slots.get_mut(slot) else {
            self.give_back(at, server);
            return;
        };
        let session = &mut *entry.session;
        let Some(sharing) = &mut session.sharing else { return };
        let Server { leg, pid, secret, cell, mut here } = *server;
        session.server = leg;
        (session.backend_pid, session.backend_secret, session.cell) = (pid, secret, cell);
        (sharing.needs, sharing.waits_since, sharing.lent) = (false, None, Some(at));
        sharing.judged_at = None;
        (sharing.state, sharing.base) = sharing.pool.state_now(&sharing.state, sharing.base);
        here.state = sharing.state.clone();
        (here.unnamed, here.is_used) = (Default::default(), true);
        (here.drops_unnamed, here.doubts_unnamed) = (false, false);
        here.prepares_unnamed = false;
        // What was prepared under settings of a transaction is of no use to anybody.
        let mut closes = Vec::new();
        for (_, alias) in std::mem::take(&mut here.aliases) {
            if here.statements.remove(&alias) {
                frontend::close(&mut closes, frontend::Target::Statement(&alias.name));
                session.protocol.on_own(Own::Close);
            }
        }
        if text.as_ref().is_some_and(|text| text.contains("DISCARD PLANS")) {
            for statement in here.take_read_by_settings() {
                frontend::close(&mut closes, frontend::Target::Statement(&statement.name));
                session.protocol.on_own(Own::Close);
            }
        }
        session.server.push(&closes);
        let params = here.params.take();
        sharing.here = here;
        let mut out = Vec::new();
        match text.filter(|text| !text.is_empty()) {
            Some(text) => {
                frontend::query(&mut out, text.as_bytes());
                session.protocol.on_own(Own::Query);
                if sharing.lost.is_some() {
                    sharing.asked.push_back(Asked::State);
                }
                sharing.here.params = params;
            }
            None => {
                if let Some(params) = params
                    && !Arc::ptr_eq(&params, &session.params)
                {
                    session.tell_params(&params);
                }
            }
        }
        out.extend(session.fail_again());
        if !out.is_empty() {
            session.server.push(&out);
            if flush(&mut session.server).is_err() {
                session.server.readable = true;
            }
        }
        session.carry_waits = true;
        // What was left unread when it had closed.
        session.client.readable |= session.client.eof;
        if !entry.queued {
            entry.queued = true;
            self.ready.push(slot);
        }
    }

    /// Takes the session in `slot` from its server, which is free from now on.
    fn detach(&mut self, slot: usize) {
        let Some(Some(entry)) = self.slots.get_mut(slot) else { return };
        if !entry.session.client.carry.is_empty() && !entry.queued {
            // It goes to the end of the line.
            (entry.queued, entry.session.carry_waits) = (true, true);
            self.ready.push(slot);
        }
        let session = &mut entry.session;
        let Some(sharing) = &mut session.sharing else { return };
        let Some(at) = sharing.lent.take() else { return };
        let mut here = std::mem::take(&mut sharing.here);
        here.params = Some(session.params.clone());
        here.is_used |= session.requests > 0;
        let server = Box::new(Server {
            leg: std::mem::replace(&mut session.server, Leg::vacant()),
            pid: std::mem::take(&mut session.backend_pid),
            secret: std::mem::take(&mut session.backend_secret),
            cell: session.cell.clone(),
            here,
        });
        let serves = session.app.active().is_some_and(|cell| Arc::ptr_eq(&cell, &server.cell));
        let is_over = self.lending.is_over(&session.app);
        if serves && !is_over && !server.here.is_worn() && !server.leg.eof {
            self.give_back(at, server);
        } else {
            let (app, pool) = (session.app.clone(), sharing.pool.clone());
            tracing::debug!(
                pid = server.pid,
                serves,
                is_over,
                is_worn = server.here.is_worn(),
                has_ended = server.leg.eof,
                "a server connection is not shared again"
            );
            self.discard(at, server);
            let mut chores = Chores::default();
            self.lending.provide(&app, &pool, &mut chores);
            self.do_chores(chores);
        }
    }

    /// A server is free.
    fn give_back(&mut self, at: usize, server: Box<Server>) {
        let slots = &self.slots;
        let state_of = |slot: usize, id: u64| -> Option<State> {
            let session = &slots.get(slot)?.as_ref()?.session;
            let sharing = session.sharing.as_deref().filter(|sharing| sharing.needs)?;
            (session.id == id && !session.wanted).then(|| sharing.state_now())
        };
        let mut chores = Chores::default();
        let next = self.lending.put_back(at, server, state_of, &mut chores);
        self.do_chores(chores);
        if let Some((slot, server, text)) = next {
            self.attach(slot, at, server, text);
        }
    }

    fn discard(&mut self, at: usize, mut server: Box<Server>) {
        self.epoll.remove(server.leg.raw());
        self.lending.dismiss(at);
        terminate(&mut server.leg);
    }

    /// The sessions of an application are to be held: servers that nobody uses are of no use any more.
    pub(super) fn give_up_idle(&mut self, app: &Arc<App>) {
        let close = self.lending.give_up_idle(app);
        self.do_chores(Chores { close, ..Chores::default() });
    }

    /// A server was opened, or could not be.
    pub(super) fn on_opened(&mut self, pool: &Arc<Pool>, result: Result<Box<Server>, NotOpened>) {
        let failure = result.as_ref().err().map(|failure| failure.error.clone());
        let Some((app, pool)) = self.lending.opened(pool.id, failure) else { return };
        if let Err(NotOpened { error, refused: Some(state) }) = &result {
            let report =
                Report::fatal(*state, "no server connection can be opened for the session")
                    .detail(error.clone());
            for (slot, id) in self.lending.waiting_in(pool.id) {
                let is_it = |slot: &Slot| slot.session.id == id;
                if self.slots.get(slot).and_then(Option::as_ref).is_some_and(is_it)
                    && let Some(entry) = self.take_out(slot)
                {
                    entry.session.tell_and_end(&report);
                }
            }
        }
        let Ok(mut server) = result else { return };
        if !app.active().is_some_and(|cell| Arc::ptr_eq(&cell, &server.cell)) {
            terminate(&mut server.leg);
            return;
        }
        let at = self.lending.admit(&app, &pool, None);
        let token = server_token(at, self.lending.generation(at));
        if let Err(error) = self.epoll.add(server.leg.raw(), token) {
            tracing::warn!(%error, "a server connection cannot be watched");
            self.lending.dismiss(at);
            return;
        }
        self.give_back(at, server);
    }

    /// A cancel request for a session that waits for a server: what it has sent last is not carried out.
    pub(super) fn cancel_in_line(&mut self, slot: usize) {
        let Some(Some(Slot { session, .. })) = self.slots.get_mut(slot) else { return };
        let Some(sharing) = &mut session.sharing else { return };
        if !session.server.is_vacant() || !sharing.needs {
            return;
        }
        let mut len = 0;
        loop {
            let rest = session.client.carry.get(len..).unwrap_or_default();
            // Of a batch that has not arrived as a whole, the rest would still be carried out.
            let Ok(Some((tag, _, message))) = wire::frame::whole(Side::Frontend, rest) else {
                return;
            };
            len += message;
            if matches!(tag, b'Q' | b'S' | b'F') {
                break;
            }
        }
        session.client.carry.drain(..len);
        let mut out = Vec::new();
        Report::error(SqlState::QUERY_CANCELED, "canceling statement due to user request")
            .write_error(&mut out);
        wire::backend::ready(&mut out, session.protocol.status());
        session.client.push(&out);
        // An error shows at the next read.
        let _ = flush(&mut session.client);
        if session.client.carry.is_empty() {
            (sharing.needs, sharing.waits_since) = (false, None);
            self.lending.leave_line(sharing.pool.id, session.id);
            if session.has_closed {
                // There was nothing else that it has waited for.
                self.end(slot, End::Client);
            }
        }
    }

    /// What time brings: sessions that have waited too long, and others that may be looked at by now.
    pub(super) fn tick_pools(&mut self) {
        let now = Instant::now();
        for (slot, id, failure) in self.lending.waiting() {
            let Some(Some(Slot { session, .. })) = self.slots.get(slot) else { continue };
            let Some(limits) = session.app.pool.filter(|_| session.id == id) else { continue };
            let since = session.sharing.as_ref().and_then(|sharing| sharing.waits_since);
            // Nobody is told while an application is held.
            let is_late = since.is_some_and(|since| now.duration_since(since) >= limits.wait_max);
            if !is_late || session.wanted {
                continue;
            }
            let state = if failure.is_some() {
                SqlState::CANNOT_CONNECT_NOW
            } else {
                SqlState::TOO_MANY_CONNECTIONS
            };
            let detail = failure.unwrap_or_else(|| {
                format!(
                    "the application may have {} shared server connections, and {} that sessions keep",
                    limits.size, limits.kept_max
                )
            });
            let report =
                Report::fatal(state, format!("no server connection within {:?}", limits.wait_max))
                    .detail(detail)
                    .hint("SHOW POOLS in the admin database shows who has them; see `pool_size`");
            if let Some(entry) = self.take_out(slot) {
                entry.session.tell_and_end(&report);
            }
        }
        let mut chores = Chores::default();
        self.lending.retry(&mut chores);
        self.lending.forget_unused(&mut chores);
        self.do_chores(chores);
        for slot in 0..self.slots.len() {
            let attached =
                |slot: &Slot| slot.session.sharing.is_some() && !slot.session.is_detached();
            if self.slots.get(slot).and_then(Option::as_ref).is_some_and(attached) {
                // Whoever stands still in the middle of a message may have somebody wait meanwhile.
                if let Some(Some(Slot { session, .. })) = self.slots.get_mut(slot)
                    && let Some(sharing) = &mut session.sharing
                {
                    sharing.others_wait = self.lending.someone_waits(sharing.pool.id);
                }
                self.settle(slot);
            }
        }
    }
}

/// Nothing is under way that hangs on the server.
fn may_be_detached(session: &Session) -> bool {
    session.protocol.is_idle()
        && session.is_at_safe_point()
        && !session.protocol.is_doubtful()
        && (session.client.carry.is_empty()
            || session.wanted
            || session.sharing.as_ref().is_some_and(|sharing| sharing.others_wait))
        && !session.server_gone
        // Its server was told that nothing comes any more, and ends.
        && !session.goodbye_said
        && !session.cancels_under_way()
}

/// Whether the session keeps its server: if so, whether that is new, and how long a look at it has to wait.
fn keeps(session: &mut Session) -> Option<(bool, Duration)> {
    let lost_text = match session.protocol.unnamed() {
        Unnamed::Absent => false,
        Unnamed::Last => {
            let sharing = session.sharing.as_ref();
            session.unnamed_too_long
                || session.unnamed_restyled
                || sharing.is_some_and(|sharing| sharing.unnamed_unsettled)
        }
        Unnamed::Earlier => true,
    };
    let sharing = session.sharing.as_mut()?;
    sharing.notice_definitions();
    if sharing.keeps.as_ref().is_some_and(|keeps| keeps.passes) && !lost_text && !session.restyled {
        sharing.keeps = None;
    }
    if sharing.keeps.is_none() && (lost_text || session.restyled) {
        let why = if lost_text {
            "its unnamed statement cannot be prepared again"
        } else {
            "its statements were prepared under other settings"
        };
        let keeps =
            Keeps { leaves: Leaves::SETTINGS, why: why.into(), is_new: false, passes: true };
        sharing.keeps = Some(keeps);
    }
    let keeps = sharing.keeps.as_ref()?;
    let pause = match sharing.looks.checked_sub(LOOKS_AT_ONCE) {
        None => Duration::ZERO,
        Some(more) => LOOK_PAUSE * 2_u32.pow(more.min(LOOK_DOUBLINGS_MAX)),
    };
    Some((keeps.is_new, pause))
}

/// Reads what an idle server says by itself. False if it is of no use any more.
fn hear_idle(
    server: &mut Server,
    plain: &mut [u8],
    cipher: &mut [u8],
    sealed: &mut Vec<u8>,
) -> bool {
    while server.leg.readable {
        let Ok((filled, closed)) = fill(&mut server.leg, plain, cipher, sealed) else {
            return false;
        };
        let mut rest = plain.get(..filled).unwrap_or_default();
        while let Ok(Some((tag, body, len))) = wire::frame::whole(Side::Backend, rest) {
            match (tag, wire::backend::read(tag, body)) {
                (b'S', Ok(Backend::ParameterStatus { name, value })) => {
                    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                    let mut params = server.here.params.as_deref().cloned().unwrap_or_default();
                    params.insert(text(name), text(value));
                    server.here.params = Some(Arc::new(params));
                }
                (b'N', _) => (),
                _ => return false,
            }
            rest = rest.get(len.max(HEADER_LEN)..).unwrap_or_default();
        }
        // Part of a message: it is simpler to take another server than to wait for its end.
        if closed || !rest.is_empty() {
            return false;
        }
    }
    true
}
