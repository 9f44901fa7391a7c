//! What is done with bytes on their way: headers are stepped over in place, and the same buffer goes on.
//!
//! Both functions take the bytes that have arrived and say how many of them may be passed on; the rest waits
//! for more, or for the end of a hold. Only what a move must know is looked at.

use model::session::inspect::OVERLAP;
use model::session::protocol::{Fate, Note};
use thiserror::Error;
use wire::backend::{self, Backend, TxStatus};
use wire::frame::{FrameError, HEADER_LEN, Header, Step};
use wire::frontend;
use wire::sqlstate::SqlState;

use crate::confine::texts;
use crate::pool::is_shutdown;
use crate::pool::sharing::{HEAD_LEN_MAX, Turn, cut, has_odd_letters};
use crate::session::Session;

/// A statement up to this length is looked at as a whole; a longer one while it passes.
const INSPECT_LEN_MAX: usize = 32 * 1024;
/// A message of the server that must be seen whole, such as a parameter, is waited for up to this length.
const WHOLE_LEN_MAX: usize = 64 * 1024;
/// The longest unnamed statement that is kept for a move.
pub const UNNAMED_LEN_MAX: usize = 1024 * 1024;

/// A long statement on its way.
#[derive(Debug, Default)]
pub struct LongText {
    /// The end of what has passed, so that no word hides at the seam.
    tail: Vec<u8>,
    /// It is an unnamed Parse, whose text is kept.
    keep: bool,
}

/// A change to bytes on their way: at this place so many are left out, and others are put in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    pub at: usize,
    pub skip: usize,
    pub insert: Vec<u8>,
}

/// What passes of `bytes`, with the edits made in it, which are in order.
pub fn edited(bytes: &[u8], edits: &[Edit], out: &mut Vec<u8>) {
    let mut at = 0;
    for edit in edits {
        out.extend_from_slice(bytes.get(at..edit.at).unwrap_or_default());
        out.extend_from_slice(&edit.insert);
        at = edit.at + edit.skip;
    }
    out.extend_from_slice(bytes.get(at..).unwrap_or_default());
}

/// What to do after some bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    /// So many bytes may be passed on.
    pub len: usize,
    /// The client has said goodbye.
    pub terminated: bool,
}

/// The stream cannot be understood any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Fault {
    #[error("{0}")]
    Client(FrameError),
    #[error("server sent what is not the protocol: {0}")]
    Server(FrameError),
    #[error("a prepared statement cannot be prepared again as it was")]
    Settings,
    #[error(
        "the session has set `default_transaction_read_only` to off in a cell that takes no writes"
    )]
    Unfenced,
}

fn usize_of(len: u32) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

impl Session {
    /// Bytes of the client stand in `bytes`.
    ///
    /// # Errors
    /// They are not the protocol.
    pub fn on_client_bytes(&mut self, bytes: &[u8]) -> Result<Pass, Fault> {
        let mut at = 0;
        let known = self.confined.as_ref().map(|confined| &confined.regime);
        let regime = self.app.regime(known);
        if regime.is_none() {
            if let Some(confined) = &mut self.confined {
                confined.was_free = true;
            }
            self.end_hold();
        }
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            match self.client.scanner.peek(rest).map_err(Fault::Client)? {
                Step::Incomplete => break,
                Step::Body(len) => {
                    if self.long.is_some() {
                        self.on_long_text(rest.get(..len).unwrap_or_default());
                    }
                    if self.swallows() {
                        self.swallow(at, len);
                    }
                    self.client.scanner.pass(len);
                    at += len;
                }
                Step::Frame(header) => {
                    if self.protocol.is_full()
                        || (self.wanted && self.protocol.must_wait(header.tag))
                    {
                        break;
                    }
                    if header.tag == b'H' && header.body_len > 0 {
                        // The server would answer by an error and skip what follows, which nobody has asked for.
                        let len = header.body_len;
                        return Err(Fault::Client(FrameError::Length { tag: b'H', len, max: 0 }));
                    }
                    let body = rest.get(HEADER_LEN..).unwrap_or_default();
                    let lost = match self.sharing {
                        Some(_) if self.server.is_vacant() => {
                            self.on_lost_message(header, at, body)
                        }
                        _ => None,
                    };
                    let turn = match &regime {
                        _ if lost.is_some() => Turn::Pass,
                        // Its own question goes first.
                        Some(_) if self.is_without_fence() => return Err(Fault::Unfenced),
                        Some(regime) if !self.protocol.runs_own() => {
                            self.on_confined_message(regime, header, at, body)
                        }
                        None if self.skips_alone() => {
                            let len = usize_of(header.body_len);
                            let is_whole = body.len() >= len;
                            let body = body.get(..len).unwrap_or(body);
                            self.on_skipped(header, at, body, is_whole)
                        }
                        _ => Turn::Pass,
                    };
                    let turn = match self.sharing {
                        _ if let Some(lost) = lost => lost,
                        Some(_) if turn == Turn::Pass => self.on_shared_message(header, at, body),
                        _ => turn,
                    };
                    match turn {
                        Turn::Wait => break,
                        Turn::Lost => return Err(Fault::Settings),
                        Turn::Refuse => {
                            let (tag, len) = (header.tag, header.body_len);
                            let max = u32::try_from(HEAD_LEN_MAX).unwrap_or(u32::MAX);
                            return Err(Fault::Client(FrameError::Length { tag, len, max }));
                        }
                        Turn::Pass if !self.on_client_message(header, rest, body) => break,
                        Turn::Pass | Turn::Done => (),
                    }
                    self.client.scanner.enter(header);
                    at += HEADER_LEN;
                    if header.tag == b'X' {
                        return Ok(Pass { len: at, terminated: true });
                    }
                    let len = usize_of(header.body_len).min(body.len());
                    self.client.scanner.pass(len);
                    at += len;
                }
            }
        }
        Ok(Pass { len: at, terminated: false })
    }

    /// Looks at a message that begins; false if more of it must be there first.
    #[inline]
    fn on_client_message(&mut self, header: Header, message: &[u8], body: &[u8]) -> bool {
        let body_len = usize_of(header.body_len);
        match header.tag {
            b'Q' | b'P' => {
                // Of a long one the first byte at least: it tells a statement with a name from one without.
                if body.len() < body_len && (body_len <= INSPECT_LEN_MAX || body.is_empty()) {
                    return false;
                }
                let is_read = !self.protocol.is_skipping();
                let note = self.protocol.on_frontend(header.tag, body.first().copied(), None);
                self.has_prepared |= header.tag == b'P' && body.first().is_some_and(|b| *b != 0);
                let whole = body.len() >= body_len;
                let body = body.get(..body_len).unwrap_or(body);
                if !whole {
                    self.hints.on_part(body);
                } else if header.tag == b'Q' {
                    self.hints.on_statement(body.strip_suffix(&[0]).unwrap_or(body));
                } else {
                    let (name, text) = frontend::parse_head(body).unwrap_or((b"", body));
                    self.hints.on_statement(text);
                    if !name.is_empty() && is_read && self.sharing.is_none() {
                        self.on_named_parse(name, Some(text));
                    }
                }
                let is_named = header.tag == b'P' && body.first().is_some_and(|b| *b != 0);
                if is_named && is_read && !whole && self.sharing.is_none() {
                    let name = body.split(|byte| *byte == 0).next().unwrap_or_default();
                    self.on_named_parse(name, None);
                }
                if note == Note::KeepUnnamed {
                    self.unnamed_restyled = false;
                    self.unnamed.clear();
                    self.unnamed_too_long = body_len > UNNAMED_LEN_MAX;
                    if !self.unnamed_too_long {
                        let whole = HEADER_LEN + body_len;
                        self.unnamed.extend_from_slice(message.get(..whole).unwrap_or(message));
                    }
                }
                if body.len() < body_len {
                    let keep = note == Note::KeepUnnamed && !self.unnamed_too_long;
                    let tail =
                        body.get(body.len().saturating_sub(OVERLAP)..).unwrap_or_default().to_vec();
                    self.long = Some(Box::new(LongText { tail, keep }));
                }
            }
            b'D' | b'C' => {
                if body.len() < body_len.min(2) {
                    return false;
                }
                if header.tag == b'C' && body.first() == Some(&b'S') && self.sharing.is_none() {
                    let name = body.get(1..body_len.min(body.len())).unwrap_or_default();
                    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                    self.names.forget(cut(name));
                }
                self.protocol.on_frontend(header.tag, body.first().copied(), body.get(1).copied());
            }
            b'F' => {
                if body.len() < body_len.min(4) {
                    return false;
                }
                // One that is too short to name a function is the server's to refuse.
                if let Some(oid) = body.first_chunk::<4>().filter(|_| body_len >= 4) {
                    self.hints.on_function_call(u32::from_be_bytes(*oid));
                }
                self.protocol.on_frontend(b'F', None, None);
            }
            tag => {
                self.protocol.on_frontend(tag, None, None);
            }
        }
        true
    }

    /// A Parse with a name is passed. What it is will count if it succeeds.
    #[cold]
    fn on_named_parse(&mut self, name: &[u8], sql: Option<&[u8]>) {
        let name = cut(name);
        let sql = sql.filter(|sql| sql.len() <= texts::TEXT_LEN_MAX);
        let sql = sql.filter(|sql| !has_odd_letters(&self.params, sql));
        if self.names.is_full() {
            self.names.forget(name);
            self.names.unknown();
            self.has_lost_names = true;
            return;
        }
        let text = sql.map(|sql| self.app.texts.get(sql));
        self.has_lost_names |= text.is_none();
        self.names.parse(name, text, true);
    }

    /// What has become of statements with a name, if that is not counted with the server's.
    #[inline]
    fn after_own_answer(&mut self) {
        if self.sharing.is_none() && self.names.has_pending() {
            let named = self.protocol.take_named();
            for _ in 0..named.answered {
                self.names.answered();
            }
            self.names.skipped(named.skipped);
        }
    }

    /// The server has answered with an error or is ready.
    #[cold]
    fn after_confined_answer(&mut self, tag: u8) {
        let Some(confined) = &mut self.confined else { return };
        if tag == b'E' {
            confined.on_error();
        } else if self.protocol.is_quiet() {
            confined.on_ready(self.protocol.is_idle());
        }
    }

    #[cold]
    fn on_long_text(&mut self, part: &[u8]) {
        let Some(mut long) = self.long.take() else { return };
        if long.keep {
            self.unnamed.extend_from_slice(part);
        }
        let mut seam = std::mem::take(&mut long.tail);
        seam.extend_from_slice(part.get(..OVERLAP.min(part.len())).unwrap_or_default());
        self.hints.on_part(&seam);
        self.hints.on_part(part);
        let ends = usize_of(self.client.scanner.remaining()) == part.len();
        if !ends {
            let from = if part.len() >= OVERLAP { part } else { &seam };
            long.tail = from.get(from.len().saturating_sub(OVERLAP)..).unwrap_or_default().to_vec();
            self.long = Some(long);
        }
    }

    /// Bytes of the server stand in `bytes`; the pid of a notification may be changed in place.
    ///
    /// # Errors
    /// They are not the protocol.
    pub fn on_server_bytes(&mut self, bytes: &mut [u8]) -> Result<usize, Fault> {
        let mut at = 0;
        loop {
            if self.server.scanner.at_boundary() && !self.protocol.runs_own() {
                at += wire::frame::data_len(bytes.get(at..).unwrap_or_default());
            }
            let rest = bytes.get_mut(at..).unwrap_or_default();
            match self.server.scanner.peek(rest).map_err(Fault::Server)? {
                Step::Incomplete => break,
                Step::Body(len) => {
                    self.server.scanner.pass(len);
                    at += len;
                    if self.sharing.is_some() {
                        self.after_shared_answer(0, at);
                    }
                }
                Step::Frame(header) => {
                    let body_len = usize_of(header.body_len);
                    let body = rest.get_mut(HEADER_LEN..).unwrap_or_default();
                    let whole = body.len() >= body_len;
                    if self.protocol.runs_own() && header.tag != b'A' {
                        if !whole {
                            break;
                        }
                        self.on_own_answer(header.tag, body.get(..body_len).unwrap_or_default());
                        self.edits.push(Edit {
                            at,
                            skip: HEADER_LEN + body_len,
                            insert: Vec::new(),
                        });
                        at += HEADER_LEN + body_len;
                        continue;
                    }
                    let (mut fate, mut insert) = (Fate::Pass, None);
                    match header.tag {
                        b'Z' | b'S' | b'C' | b'A' | b'E' if !whole && body_len <= WHOLE_LEN_MAX => {
                            break;
                        }
                        b'Z' => {
                            self.requests += 1;
                            let status = body.first().and_then(|byte| TxStatus::from_byte(*byte));
                            self.protocol.on_backend(b'Z', status);
                            if self.confined.is_some() {
                                self.after_confined_answer(b'Z');
                            }
                        }
                        b'N' if whole && self.sharing.is_some() => {
                            if read_error(body.get(..body_len).unwrap_or_default())
                                .1
                                .is_some_and(is_shutdown)
                                && self.may_outlive()
                            {
                                // That its connection is terminated, which it is not.
                                insert = Some(Vec::new());
                            }
                        }
                        b'S' => self.on_parameter(body.get(..body_len).unwrap_or_default()),
                        b'A' => self.on_notification(body),
                        b'C' => {
                            self.hints.on_command_tag(body);
                            let prepares = body.starts_with(b"PREPARE\0");
                            self.has_prepared |= prepares;
                            self.has_prepared_by_sql |= prepares;
                            if prepares && let Some(confined) = &mut self.confined {
                                confined.on_prepared();
                            }
                            // Which name is gone is not known; nor what code has done.
                            let is_own = self
                                .sharing
                                .as_ref()
                                .is_some_and(|sharing| !sharing.deallocates.is_empty());
                            self.had_deallocated |= body.starts_with(b"DEALLOCATE\0") && !is_own;
                            self.had_hidden_code |=
                                body.starts_with(b"DO\0") || body.starts_with(b"CALL\0");
                            if body.starts_with(b"SAVEPOINT\0") {
                                self.protocol.on_savepoint();
                            }
                            if body.starts_with(b"DEALLOCATE ALL\0")
                                || body.starts_with(b"DISCARD ALL\0")
                            {
                                (self.has_prepared, self.restyled) = (false, false);
                                (self.has_prepared_by_sql, self.has_lost_names) = (false, false);
                                (self.had_deallocated, self.had_hidden_code) = (false, false);
                                if let Some(confined) = &mut self.confined {
                                    confined.on_discarded();
                                }
                                self.names.clear();
                            }
                            self.on_shared_tag(body.get(..body_len).unwrap_or_default());
                            self.protocol.on_backend(b'C', None);
                        }
                        b'E' => {
                            let body = body.get(..body_len).unwrap_or(body);
                            let (fatal, state) = read_error(body);
                            if fatal && state.is_some_and(is_shutdown) && self.may_outlive() {
                                // It goes on with another server once this one has closed.
                                let skip = HEADER_LEN + body_len;
                                self.edits.push(Edit { at, skip, insert: Vec::new() });
                                at += skip;
                                self.server.shut_down(std::net::Shutdown::Both);
                                (self.server.readable, self.server.eof) = (true, true);
                                continue;
                            }
                            self.server_said_why |= fatal;
                            if whole && self.sharing.is_some() {
                                self.hints.on_error();
                                insert = self.as_client_names(body);
                            }
                            if whole && let Some(confined) = &mut self.confined {
                                insert = confined.told(body).or(insert);
                            }
                            self.protocol.on_backend_error(state);
                            if self.confined.is_some() {
                                self.after_confined_answer(b'E');
                            }
                        }
                        tag => fate = self.protocol.on_backend(tag, None),
                    }
                    self.server.scanner.enter(header);
                    let len = body_len.min(rest.len() - HEADER_LEN);
                    self.server.scanner.pass(len);
                    if fate == Fate::Keep {
                        // These have no body.
                        self.edits.push(Edit { at, skip: HEADER_LEN + len, insert: Vec::new() });
                    }
                    if let Some(insert) = insert {
                        self.edits.push(Edit { at, skip: HEADER_LEN + len, insert });
                    }
                    at += HEADER_LEN + len;
                    self.after_own_answer();
                    if self.sharing.is_some() {
                        self.after_shared_answer(header.tag, at);
                    }
                }
            }
        }
        Ok(at)
    }

    /// Part of the answer to a query of ours.
    #[cold]
    fn on_own_answer(&mut self, tag: u8, body: &[u8]) {
        if tag == b'E' && read_error(body).0 {
            // The server closes.
            return;
        }
        let status = body.first().and_then(|byte| TxStatus::from_byte(*byte));
        self.protocol.on_backend(tag, status.filter(|_| tag == b'Z'));
        let answer = backend::read(tag, body);
        if let Ok(answer) = &answer
            && self.on_asked(answer)
        {
            return;
        }
        let Some(sharing) = &mut self.sharing else { return };
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match answer {
            Ok(Backend::ParameterStatus { name, value }) => {
                let now = sharing.here.params.get_or_insert_with(|| self.params.clone());
                let mut now = (**now).clone();
                now.insert(text(name), text(value));
                sharing.here.params = Some(self.app.share(now));
            }
            Ok(Backend::Error(fields)) => {
                // What it says may hold the value of a setting.
                tracing::error!(
                    session = self.id,
                    sqlstate = fields.sqlstate().map(tracing::field::display),
                    "a state cannot be given to a server"
                );
            }
            _ if tag == b'Z' => {
                if let Some(now) = sharing.here.params.take() {
                    self.tell_params(&now);
                }
            }
            _ => (),
        }
    }

    #[cold]
    fn on_parameter(&mut self, body: &[u8]) {
        if let Ok(Backend::ParameterStatus { name, value }) = backend::read(b'S', body) {
            let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
            let mut params = (*self.params).clone();
            let style = matches!(
                name,
                b"DateStyle" | b"TimeZone" | b"IntervalStyle" | b"standard_conforming_strings"
            );
            if name == b"default_transaction_read_only" {
                self.has_lifted_fence = value == b"off";
            }
            let before = params.insert(text(name), text(value));
            let restyles = style && before.is_none_or(|b| b.as_bytes() != value);
            self.restyled |= restyles && self.has_prepared;
            self.unnamed_restyled |= restyles;
            self.params = self.app.share(params);
        }
    }

    /// A notification of the session's own backend carries the pid that the client knows it by.
    pub(crate) fn on_notification(&self, body: &mut [u8]) {
        if self.backend_pid == self.client_pid {
            return;
        }
        if let Some(pid) = body.first_chunk_mut::<4>()
            && *pid == self.backend_pid.to_be_bytes()
        {
            *pid = self.client_pid.to_be_bytes();
        }
    }

    /// Gives back memory that an idle session does not need.
    pub fn shrink(&mut self) {
        self.protocol.shrink();
        if self.unnamed.capacity() > 2 * self.unnamed.len() + 4 * 1024 {
            self.unnamed.shrink_to_fit();
        }
    }

    /// Tells the client of parameters in which `now` differs from what it knows.
    pub fn tell_params(&mut self, now: &std::collections::BTreeMap<String, String>) {
        if *self.params == *now {
            return;
        }
        let mut out = Vec::new();
        for (name, value) in now {
            if self.params.get(name) != Some(value) {
                backend::parameter_status(&mut out, name.as_bytes(), value.as_bytes());
            }
        }
        self.client.push(&out);
        self.params = self.app.share(now.clone());
    }
}

/// Whether an error ends the connection, by its severity that is not translated, and its code.
#[cold]
fn read_error(body: &[u8]) -> (bool, Option<SqlState>) {
    match backend::read(b'E', body) {
        Ok(Backend::Error(fields)) => {
            (matches!(fields.field(b'V'), Some(b"FATAL" | b"PANIC")), fields.sqlstate())
        }
        _ => (false, None),
    }
}
