//! The messages of a session that shares servers: each statement is looked at before it is sent, and the names of
//! prepared statements are those of the server.

use model::session::footprint::{Footprint, Leaves};
use model::session::protocol::{Given, Own, Unnamed};
use model::session::statement;
use model::sql::{self, Tokens};
use wire::backend::{self, Backend, TxStatus};
use wire::frame::{HEADER_LEN, Header};
use wire::frontend::{self, Target};

use super::{Asked, SERVER_NAME, Sharing, UnnamedHere};
use crate::relay::Edit;
use crate::session::Session;

/// A statement up to this length is waited for, to be looked at.
const TEXT_LEN_MAX: usize = 100 * 1024;
/// Names of portals and statements up to this length are looked for.
const HEAD_LEN_MAX: usize = 8 * 1024;

/// Longest name of a statement that a server does not cut (`NAMEDATALEN`).
const NAME_LEN_MAX: usize = 63;
/// Longest statement that is shown as a reason.
const SHOWN_LEN_MAX: usize = 80;

/// What becomes of a message of the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It must wait: for a server, for its rest, or for an answer.
    Wait,
    /// It is looked at as any other.
    Pass,
    /// Everything was done that there is to do but to pass on what the edits say.
    Done,
}

impl Session {
    /// A message of the client begins at `at`, whose body, as far as it has arrived, is `body`.
    pub(crate) fn on_shared_message(&mut self, header: Header, at: usize, body: &[u8]) -> Turn {
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        if header.tag == b'X' {
            let ends = self.protocol.is_running() || self.protocol.is_idle();
            if sharing.keeps.is_none() && !self.server.is_vacant() && ends {
                // The server stays.
                self.edits.push(Edit { at, skip: HEADER_LEN, insert: Vec::new() });
                return Turn::Done;
            }
            return Turn::Pass;
        }
        if self.server.is_vacant() {
            sharing.needs = true;
            return Turn::Wait;
        }
        if self.protocol.runs_own() {
            return Turn::Wait;
        }
        if self.protocol.is_skipping() && header.tag != b'S' {
            return Turn::Pass;
        }
        if matches!(header.tag, b'Q' | b'P' | b'B') {
            if sharing.pool.database.is_being_learned() && !ends_transaction(header.tag, body) {
                sharing.waits_for_names = true;
                return Turn::Wait;
            }
            sharing.judged_at.get_or_insert_with(|| sharing.pool.database.redefined());
        }
        let begins = !self.protocol.has_open_batch();
        if sharing.others_wait && begins && self.protocol.is_running() {
            // It may have a turn of one transaction, not of all that it has sent.
            return Turn::Wait;
        }
        let body_len = usize::try_from(header.body_len).unwrap_or(usize::MAX);
        let is_whole = body.len() >= body_len;
        let body = body.get(..body_len).unwrap_or(body);
        match header.tag {
            b'Q' if !is_whole && body_len <= TEXT_LEN_MAX => Turn::Wait,
            b'Q' => self.on_shared_query(at, body, is_whole),
            b'P' if !is_whole && body_len <= TEXT_LEN_MAX => Turn::Wait,
            b'P' => self.on_shared_parse(at, body, is_whole),
            b'B' if !is_whole && body.len() < HEAD_LEN_MAX => Turn::Wait,
            b'B' | b'D' | b'C' | b'E' if sharing.here.unnamed == UnnamedHere::Foreign => {
                self.close_unnamed(at);
                self.on_shared_extended(header, at, body, body_len, is_whole)
            }
            b'B' | b'D' | b'C' => self.on_shared_extended(header, at, body, body_len, is_whole),
            b'F' => {
                sharing.keep(Leaves::SOMETHING, || "a function call".into());
                Turn::Pass
            }
            _ => Turn::Pass,
        }
    }

    fn on_shared_extended(
        &mut self,
        header: Header,
        at: usize,
        body: &[u8],
        body_len: usize,
        is_whole: bool,
    ) -> Turn {
        match header.tag {
            b'B' => self.on_shared_bind(at, body, body_len),
            b'D' | b'C' if !is_whole => Turn::Wait,
            b'D' | b'C' => match body.split_first() {
                Some((b'S', name)) => {
                    let name = name.strip_suffix(&[0]).unwrap_or(name);
                    if header.tag == b'D' {
                        self.on_shared_describe(at, name, body_len)
                    } else {
                        self.on_shared_close(at, name, body_len)
                    }
                }
                _ => Turn::Pass,
            },
            _ => Turn::Pass,
        }
    }

    fn on_shared_query(&mut self, at: usize, body: &[u8], is_whole: bool) -> Turn {
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        if !is_whole {
            sharing.keep(Leaves::SOMETHING, || "a long statement".into());
            return Turn::Pass;
        }
        sharing.here.drops_unnamed = true;
        if sharing.here.unnamed == UnnamedHere::Missing {
            sharing.here.unnamed = UnnamedHere::Own;
        }
        let sql = body.strip_suffix(&[0]).unwrap_or(body);
        match deallocation(sql) {
            Some(Deallocation::All) => return Turn::Pass,
            Some(Deallocation::One { name, start, end }) => {
                if let Some(statement) = sharing.names.find(&name).cloned() {
                    if self.protocol.is_running() && !self.protocol.has_open_batch() {
                        return Turn::Wait;
                    }
                    let mut text = sql.get(..start).unwrap_or_default().to_vec();
                    text.extend_from_slice(&statement.name);
                    text.extend_from_slice(sql.get(end..).unwrap_or_default());
                    let mut insert = Vec::new();
                    if !sharing.has(&statement) {
                        // There must be something that can be deallocated.
                        let mut made = b"PREPARE ".to_vec();
                        made.extend_from_slice(&statement.name);
                        made.extend_from_slice(b" AS SELECT 1");
                        frontend::query(&mut insert, &made);
                        self.protocol.on_own(Own::Query);
                        sharing.asked.push_back(Asked::Nothing);
                    }
                    frontend::query(&mut insert, &text);
                    self.edits.push(Edit { at, skip: HEADER_LEN + body.len(), insert });
                    sharing.deallocates.push_back(name);
                    self.protocol.on_frontend(b'Q', None, None);
                    return Turn::Done;
                }
            }
            None => (),
        }
        let footprint = sharing.pool.database.footprint(sql);
        if footprint.leaves.something {
            self.close_foreign(at);
        }
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        if !footprint.is_empty() {
            sharing.names_temporary |= names_temporary(&footprint, sql);
            sharing.leave(footprint, &self.app.pool.unwrap_or_default(), || shown(sql));
        }
        Turn::Pass
    }

    /// From here on the server is the session's own: statements of others are let go of before it can meet them.
    fn close_foreign(&mut self, at: usize) {
        let Some(sharing) = &mut self.sharing else { return };
        let mut insert = Vec::new();
        for statement in sharing.take_foreign() {
            frontend::close(&mut insert, Target::Statement(&statement.name));
            self.protocol.on_own(Own::Close);
        }
        if !insert.is_empty() {
            self.edits.push(Edit { at, skip: 0, insert });
        }
    }

    fn on_shared_parse(&mut self, at: usize, body: &[u8], is_whole: bool) -> Turn {
        let is_foreign = |sharing: &Sharing| sharing.here.unnamed == UnnamedHere::Foreign;
        if self.sharing.as_deref().is_some_and(is_foreign) {
            self.close_unnamed(at);
        }
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        let head = frontend::parse_head(body).ok();
        let Some((name, sql)) = head.filter(|_| is_whole) else {
            // Too long to be looked at, or malformed.
            sharing.keep(Leaves::SOMETHING, || "a long statement".into());
            match body.first() {
                Some(0) => sharing.on_unnamed_sent(),
                _ => sharing.names.unknown(),
            }
            sharing.unnamed = Footprint::of(Leaves::SOMETHING);
            return Turn::Pass;
        };
        let holds = statement::holds_its_time(sql);
        if name.is_empty() {
            if let Some(Deallocation::One { name, start, end }) = deallocation(sql)
                && let Some(statement) = sharing.names.find(&name).cloned()
            {
                let mut text = sql.get(..start).unwrap_or_default().to_vec();
                text.extend_from_slice(&statement.name);
                text.extend_from_slice(sql.get(end..).unwrap_or_default());
                let mut insert = Vec::new();
                frontend::parse(&mut insert, b"", &text, &[]);
                (self.unnamed, self.unnamed_too_long) = (insert.clone(), false);
                if !sharing.has(&statement) {
                    let mut before = Vec::new();
                    insert_parse(&mut before, &statement.name, &statement.body);
                    sharing.names.own(statement.clone());
                    self.protocol.on_own(Own::Parse);
                    insert.splice(0..0, before);
                }
                self.edits.push(Edit { at, skip: HEADER_LEN + body.len(), insert });
                (sharing.unnamed, sharing.unnamed_deallocates) = (Footprint::default(), Some(name));
                sharing.on_unnamed_sent();
                self.protocol.on_frontend(b'P', Some(0), None);
                return Turn::Done;
            }
            // What it does it does when it is run; but a Parse alone already means settings as they are now.
            sharing.unnamed_clears = deallocation(sql) == Some(Deallocation::All);
            sharing.unnamed = if sharing.unnamed_clears {
                Footprint::default()
            } else {
                sharing.pool.database.footprint(sql)
            };
            // Whatever it reads under settings of the transaction it would read otherwise elsewhere.
            sharing.unnamed_unsettled =
                sharing.repaths || (sharing.restyles && statement::has_literals(sql));
            sharing.unnamed_deallocates = None;
            sharing.names_temporary |= names_temporary(&sharing.unnamed, sql);
            if sharing.unnamed.leaves.something {
                self.close_foreign(at);
            }
            let Some(sharing) = &mut self.sharing else { return Turn::Pass };
            if holds {
                sharing.keep(Leaves::SOMETHING, || "a statement that holds its time".into());
            }
            sharing.on_unnamed_sent();
            return Turn::Pass;
        }
        if self.protocol.awaits_ready() {
            // What the name, or the transaction, is by then is not known.
            return Turn::Wait;
        }
        if holds || sharing.names.is_full() || name.len() > NAME_LEN_MAX {
            sharing.keep(Leaves::SOMETHING, || "a prepared statement of its own".into());
            sharing.names.unknown();
            return Turn::Pass;
        }
        self.hints.on_statement(sql);
        let rest = body.get(name.len() + 1..).unwrap_or_default();
        // Prepared under settings of the transaction, it cannot be prepared again as the same.
        self.restyled |= sharing.repaths || (sharing.restyles && statement::has_literals(sql));
        let statement = if sharing.is_unsettled || sharing.keeps.is_some() || sharing.clears {
            sharing.pool.own_statement(rest)
        } else {
            sharing.pool.statement(rest, &sharing.state, &self.params)
        };
        let mut insert = Vec::new();
        if sharing.names.find(name).is_some() && !sharing.clears {
            // The server is to refuse a name that is taken, so it is taken there, too.
            let taken = sharing.pool.own_statement(b"\0\0\0");
            insert_parse(&mut insert, &taken.name, &taken.body);
            self.protocol.on_own(Own::Parse);
            insert_parse(&mut insert, &taken.name, rest);
            self.protocol.on_frontend(b'P', Some(1), None);
            sharing.taken = Some((taken.clone(), name.to_vec()));
            sharing.names.own(taken);
            sharing.names.unknown();
        } else if sharing.has(&statement) && self.protocol.status() != TxStatus::Failed {
            if self.protocol.status() == TxStatus::InTransaction {
                // A Parse takes the snapshot of a transaction that has none yet.
                insert_parse(&mut insert, b"holdfast", b"SELECT 1\0\0\0");
                frontend::close(&mut insert, Target::Statement(b"holdfast"));
                sharing.names.unknown();
                self.protocol.on_own(Own::Parse);
                self.protocol.on_own(Own::Close);
            }
            sharing.names.parse(name, statement, false);
            self.protocol.on_given(Given::ParseComplete);
        } else {
            insert_parse(&mut insert, &statement.name, rest);
            sharing.names.parse(name, statement, true);
            self.protocol.on_frontend(b'P', Some(1), None);
        }
        self.edits.push(Edit { at, skip: HEADER_LEN + body.len(), insert });
        self.give();
        Turn::Done
    }

    fn on_shared_bind(&mut self, at: usize, body: &[u8], body_len: usize) -> Turn {
        // A Bind begins with two names, as a Parse with a name and a text.
        let Ok((portal, name)) = frontend::parse_head(body) else { return Turn::Pass };
        let head_len = portal.len() + 1 + name.len() + 1;
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        if self.protocol.awaits_ready() && sharing.names.has_pending() {
            return Turn::Wait;
        }
        if name.is_empty() {
            if sharing.unnamed_deallocates.is_some() && self.protocol.awaits_ready() {
                return Turn::Wait;
            }
            sharing.clears |= sharing.unnamed_clears;
            if !sharing.unnamed.is_empty() {
                let footprint = sharing.unnamed.clone();
                let limits = self.app.pool.unwrap_or_default();
                let something = footprint.leaves.something;
                sharing.leave(footprint, &limits, || "its unnamed statement".into());
                if something {
                    self.close_foreign(at);
                }
            }
            let Some(sharing) = &mut self.sharing else { return Turn::Pass };
            sharing.deallocates.extend(sharing.unnamed_deallocates.clone());
            self.ensure_unnamed(at);
            return Turn::Pass;
        }
        let Some(statement) = sharing.names.find(name).cloned() else {
            return self.on_unknown_name(b'B', at, portal, name, body_len);
        };
        let footprint = statement.footprint(&sharing.pool.database);
        if !footprint.is_empty() {
            let limits = self.app.pool.unwrap_or_default();
            let something = footprint.leaves.something;
            sharing.leave(footprint, &limits, || shown(statement.sql()));
            if something {
                self.close_foreign(at);
            }
        }
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        sharing.name(&statement, name);
        let mut insert = Vec::new();
        self.ensure(&statement, &mut insert);
        let rest = body_len - head_len;
        insert_header(&mut insert, b'B', portal.len() + 1 + statement.name.len() + 1 + rest);
        insert.extend_from_slice(portal);
        insert.push(0);
        insert.extend_from_slice(&statement.name);
        insert.push(0);
        self.edits.push(Edit { at, skip: HEADER_LEN + head_len, insert });
        self.protocol.on_frontend(b'B', None, None);
        Turn::Done
    }

    fn on_shared_describe(&mut self, at: usize, name: &[u8], body_len: usize) -> Turn {
        if name.is_empty() {
            self.ensure_unnamed(at);
            return Turn::Pass;
        }
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        if self.protocol.awaits_ready() && sharing.names.has_pending() {
            return Turn::Wait;
        }
        let Some(statement) = sharing.names.find(name).cloned() else {
            return self.on_unknown_name(b'D', at, b"", name, body_len);
        };
        sharing.name(&statement, name);
        let mut insert = Vec::new();
        self.ensure(&statement, &mut insert);
        frontend::describe(&mut insert, Target::Statement(&statement.name));
        self.edits.push(Edit { at, skip: HEADER_LEN + body_len, insert });
        self.protocol.on_frontend(b'D', Some(b'S'), Some(1));
        Turn::Done
    }

    fn on_shared_close(&mut self, at: usize, name: &[u8], body_len: usize) -> Turn {
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        if name.is_empty() {
            sharing.here.unnamed = UnnamedHere::Own;
            return Turn::Pass;
        }
        if self.protocol.awaits_ready() {
            return Turn::Wait;
        }
        if sharing.names.find(name).is_none() {
            return self.on_unknown_name(b'C', at, b"", name, body_len);
        }
        // Others go on using it.
        sharing.names.close(name);
        self.protocol.on_given(Given::CloseComplete);
        self.edits.push(Edit { at, skip: HEADER_LEN + body_len, insert: Vec::new() });
        self.give();
        Turn::Done
    }

    /// A name that the client has not given. It must not be one that the server has for others.
    fn on_unknown_name(
        &mut self,
        tag: u8,
        at: usize,
        portal: &[u8],
        name: &[u8],
        body_len: usize,
    ) -> Turn {
        if !name.starts_with(SERVER_NAME) {
            return Turn::Pass;
        }
        let mut head = if tag == b'B' { portal.to_vec() } else { vec![b'S'] };
        if tag == b'B' {
            head.push(0);
        }
        let skip = head.len() + name.len() + 1;
        // Nobody has this one.
        head.push(b'_');
        head.extend_from_slice(name);
        head.push(0);
        let mut insert = Vec::new();
        insert_header(&mut insert, tag, head.len() + (body_len - skip));
        insert.extend_from_slice(&head);
        self.edits.push(Edit { at, skip: HEADER_LEN + skip, insert });
        self.protocol.on_frontend(tag, Some(b'S'), Some(1));
        Turn::Done
    }

    /// Sees to it that the server has a statement before what is sent next.
    fn ensure(&mut self, statement: &std::sync::Arc<super::Statement>, insert: &mut Vec<u8>) {
        let Some(sharing) = &mut self.sharing else { return };
        if !sharing.has(statement) {
            insert_parse(insert, &statement.name, &statement.body);
            sharing.names.own(statement.clone());
            self.protocol.on_own(Own::Parse);
        }
    }

    /// Before anything of the extended protocol: an unnamed statement of somebody else must not be met, whatever of the
    /// client's is skipped behind an error.
    fn close_unnamed(&mut self, at: usize) {
        let Some(sharing) = &mut self.sharing else { return };
        let drops = sharing.here.drops_unnamed;
        sharing.here.unnamed = if drops { UnnamedHere::Own } else { UnnamedHere::Missing };
        if !std::mem::take(&mut sharing.here.has_unnamed) {
            return;
        }
        let mut insert = Vec::new();
        frontend::close(&mut insert, Target::Statement(b""));
        self.protocol.on_own(Own::Close);
        self.edits.push(Edit { at, skip: 0, insert });
    }

    /// The unnamed statement is used: if it was prepared on another server, it is prepared here.
    fn ensure_unnamed(&mut self, at: usize) {
        let Some(sharing) = &mut self.sharing else { return };
        if sharing.here.unnamed != UnnamedHere::Missing {
            return;
        }
        sharing.here.unnamed = UnnamedHere::Own;
        if self.protocol.unnamed() == Unnamed::Last && !self.unnamed_too_long {
            sharing.here.has_unnamed = true;
            sharing.names.unknown();
            self.protocol.on_own(Own::Parse);
            self.edits.push(Edit { at, skip: 0, insert: self.unnamed.clone() });
        }
    }

    /// Gives the client the answers whose turn it is.
    fn give(&mut self) {
        let mut out = Vec::new();
        self.take_given(&mut out);
        if !out.is_empty() {
            self.client.push(&out);
        }
    }

    fn take_given(&mut self, out: &mut Vec<u8>) {
        let Some(sharing) = &mut self.sharing else { return };
        while let Some(given) = self.protocol.next_given() {
            match given {
                Given::ParseComplete => backend::parse_complete(out),
                Given::CloseComplete => backend::close_complete(out),
            }
        }
        sharing.on_named(self.protocol.take_named());
    }

    /// An error that names a statement as the server knows it, as the client does.
    #[cold]
    pub(crate) fn as_client_names(&self, body: &[u8]) -> Option<Vec<u8>> {
        let sharing = self.sharing.as_deref()?;
        let at_all = |part: &[u8]| part.windows(SERVER_NAME.len()).any(|part| part == SERVER_NAME);
        if !at_all(body) {
            return None;
        }
        let last = sharing.last_named.as_ref().map(|statement| (&*sharing.last_name, statement));
        let mut text = body.to_vec();
        let taken = sharing.taken.as_ref().map(|(statement, name)| (&**name, statement));
        for (name, statement) in last.into_iter().chain(taken).chain(sharing.names.iter()) {
            let mut quoted = |quote: &[u8]| {
                let from = [quote, &statement.name, quote].concat();
                let to = [quote, name, quote].concat();
                while let Some(at) = text.windows(from.len()).position(|part| part == from) {
                    text.splice(at..at + from.len(), to.iter().copied());
                }
            };
            // As messages quote names.
            quoted(b"\"");
        }
        let mut message = Vec::new();
        insert_header(&mut message, b'E', text.len());
        message.extend_from_slice(&text);
        Some(message)
    }

    /// A message of the server has been counted; what we answer in its place comes behind it, at `end`.
    #[inline]
    pub(crate) fn after_shared_answer(&mut self, tag: u8, end: usize) {
        let Some(sharing) = &mut self.sharing else { return };
        let here = &mut sharing.here;
        if tag == b'Z' && self.protocol.is_quiet() {
            here.drops_unnamed = false;
        }
        match tag {
            b'C' | b'I' if here.unnamed == UnnamedHere::Foreign => {
                // A simple query was read, and has dropped it (`exec_simple_query`).
                (here.unnamed, here.has_unnamed) = (UnnamedHere::Missing, false);
            }
            b'E' => here.doubts_unnamed = true,
            b'Z' if self.protocol.is_quiet()
                && std::mem::take(&mut here.doubts_unnamed)
                && here.unnamed == UnnamedHere::Own =>
            {
                // Ours may have been skipped; to prepare the same again does no harm.
                here.unnamed = UnnamedHere::Missing;
            }
            _ => (),
        }
        if tag == b'E' || tag == b'Z' {
            // What was to be deallocated behind an error was not; and what comes next has waited for this.
            sharing.deallocates.clear();
            sharing.clears = false;
        }
        if tag == b'Z' && sharing.redefines && self.protocol.is_idle() {
            sharing.redefines = false;
            sharing.pool.database.mark_stale();
        }
        sharing.on_named(self.protocol.take_named());
        if !self.server.scanner.at_boundary() {
            return;
        }
        let mut insert = Vec::new();
        self.take_given(&mut insert);
        if !insert.is_empty() {
            self.edits.push(Edit { at: end, skip: 0, insert });
        }
    }

    /// Asks, before the session is detached, for the settings that it has set, and has its values of sequences forgotten.
    /// False if there is nothing to ask.
    pub(crate) fn ask_before_detached(&mut self) -> bool {
        let Some(sharing) = &mut self.sharing else { return false };
        let is_clean = sharing.assigned.is_empty() && !sharing.has_values && !sharing.restyles;
        if !sharing.asked.is_empty() || is_clean {
            sharing.is_unsettled &= !sharing.asked.is_empty();
            sharing.repaths &= !sharing.asked.is_empty();
            return !sharing.asked.is_empty();
        }
        (sharing.is_unsettled, sharing.repaths) = (false, false);
        let mut out = Vec::new();
        for name in sharing.assigned.drain(..) {
            let literal = sql::quote_literal(&name);
            let text = if name.contains('.') {
                format!("SELECT pg_catalog.current_setting({literal}, true)")
            } else {
                // What is set to the value that it has anyway is set all the same.
                format!(
                    "SELECT pg_catalog.current_setting(name) FROM pg_catalog.pg_settings \
                     WHERE name OPERATOR(pg_catalog.=) {literal} \
                     AND source OPERATOR(pg_catalog.=) 'session'"
                )
            };
            frontend::query(&mut out, text.as_bytes());
            self.protocol.on_own(Own::Query);
            sharing.asked.push_back(Asked::Setting { name, value: None });
        }
        if std::mem::take(&mut sharing.has_values) {
            frontend::query(&mut out, b"DISCARD SEQUENCES");
            self.protocol.on_own(Own::Query);
            sharing.asked.push_back(Asked::Nothing);
        }
        if std::mem::take(&mut sharing.restyles) {
            // Plans of functions hold literals and constants as they were read under other settings.
            frontend::query(&mut out, b"DISCARD PLANS");
            self.protocol.on_own(Own::Query);
            sharing.asked.push_back(Asked::Nothing);
        }
        sharing.here.unnamed = UnnamedHere::Missing;
        self.server.push(&out);
        true
    }

    /// Part of the answer to one of these questions. False if none was asked.
    pub(crate) fn on_asked(&mut self, answer: &Backend<'_>) -> bool {
        let Some(sharing) = &mut self.sharing else { return false };
        match (answer, sharing.asked.front_mut()) {
            (_, None) | (Backend::ParameterStatus { .. }, _) => return false,
            (Backend::DataRow(values), Some(Asked::Setting { value, .. })) => {
                let text = values.first().copied().flatten();
                let is_utf8 = self.params.get("client_encoding").is_some_and(|name| name == "UTF8");
                if !is_utf8 && text.is_some_and(|text| !text.is_ascii()) {
                    sharing.keep(Leaves::SETTINGS, || "a setting in another encoding".into());
                    return true;
                }
                *value = text.map(|text| String::from_utf8_lossy(text).into_owned());
            }
            (Backend::Error(_), _) => {
                self.protocol.forgive_own();
                sharing.keep(Leaves::SETTINGS, || "a setting cannot be read".into());
            }
            (Backend::Ready(_), Some(_)) => {
                if let Some(Asked::Setting { name, value }) = sharing.asked.pop_front() {
                    sharing.told.push((name, value));
                }
                if sharing.asked.is_empty() && !sharing.told.is_empty() {
                    let told = std::mem::take(&mut sharing.told);
                    match sharing.pool.with(&sharing.state, &self.cell, &told) {
                        Some(state) => {
                            self.on_state(&state);
                            let Some(sharing) = &mut self.sharing else { return false };
                            sharing.here.state = state.clone();
                            sharing.state = state;
                        }
                        None => sharing.keep(Leaves::SETTINGS, || "its settings".into()),
                    }
                }
                return self.sharing.as_ref().is_some_and(|sharing| !sharing.asked.is_empty());
            }
            _ => (),
        }
        true
    }

    /// Its state is to be this one. Statements that were prepared under another cannot be prepared again as the same.
    pub(crate) fn on_state(&mut self, state: &super::State) {
        let Some(sharing) = &self.sharing else { return };
        if !super::reads_otherwise(&sharing.state, state) {
            return;
        }
        let reads = |one: &std::sync::Arc<super::Statement>| statement::has_literals(one.sql());
        self.restyled |= sharing.names.statements().any(reads);
        let body = self.unnamed.get(HEADER_LEN..).unwrap_or_default();
        let text = frontend::parse_head(body).map_or(body, |(_, sql)| sql);
        let is_there = self.protocol.unnamed() != Unnamed::Absent;
        self.unnamed_restyled |= is_there && statement::has_literals(text);
    }

    /// A command has completed.
    pub(crate) fn on_shared_tag(&mut self, tag: &[u8]) {
        let Some(sharing) = &mut self.sharing else { return };
        let tag = tag.strip_suffix(&[0]).unwrap_or(tag);
        match tag {
            b"DEALLOCATE" => {
                if let Some(name) = sharing.deallocates.pop_front() {
                    if let Some(statement) = sharing.names.find(&name).cloned() {
                        sharing.here.statements.remove(&statement);
                    }
                    sharing.names.remove(&name);
                }
            }
            b"DEALLOCATE ALL" | b"DISCARD ALL" => {
                sharing.names.clear();
                sharing.here.statements.clear();
            }
            _ if sharing.names_temporary && (is_of_relation(tag) || tag == b"DO") => {
                sharing.pool.database.ask_soon();
            }
            // What a block or a procedure does is not known.
            b"DO" | b"CALL" => sharing.redefines = true,
            _ => sharing.redefines |= redefines(tag),
        }
    }
}

impl Sharing {
    /// The server has a statement, or will have it by the time it reads what is sent next.
    fn has(&self, statement: &std::sync::Arc<super::Statement>) -> bool {
        self.here.statements.contains(statement) || self.names.is_under_way(statement)
    }

    /// The client has named a statement.
    fn name(&mut self, statement: &std::sync::Arc<super::Statement>, name: &[u8]) {
        self.last_named = Some(statement.clone());
        self.last_name.clear();
        self.last_name.extend_from_slice(name);
    }

    fn on_unnamed_sent(&mut self) {
        (self.here.unnamed, self.here.has_unnamed) = (UnnamedHere::Own, true);
    }

    fn on_named(&mut self, named: model::session::protocol::Named) {
        for _ in 0..named.answered {
            self.here.statements.extend(self.names.answered());
        }
        self.names.skipped(named.skipped);
    }
}

/// What such a command defines may be temporary.
fn is_of_relation(tag: &[u8]) -> bool {
    let object = tag.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
    matches!(object, b"TABLE" | b"VIEW" | b"SEQUENCE" | b"INDEX" | b"TYPE")
}

/// Something that other sessions' statements may use is made, changed or gone.
fn redefines(tag: &[u8]) -> bool {
    let verb = [b"CREATE ".as_slice(), b"ALTER ", b"DROP ", b"IMPORT "];
    let by_itself = [
        b"TABLE AS".as_slice(),
        b"INDEX",
        b"ROLE",
        b"DATABASE",
        b"PUBLICATION",
        b"SUBSCRIPTION",
        b"STATISTICS",
    ];
    verb.iter().any(|verb| {
        tag.strip_prefix(*verb)
            .is_some_and(|object| !by_itself.iter().any(|one| object.starts_with(one)))
    })
}

fn shown(sql: &[u8]) -> String {
    sql::shown(sql, SHOWN_LEN_MAX)
}

fn insert_header(out: &mut Vec<u8>, tag: u8, body_len: usize) {
    out.push(tag);
    out.extend_from_slice(&u32::try_from(body_len + 4).unwrap_or(u32::MAX).to_be_bytes());
}

/// A Parse of which everything behind the name is at hand.
fn insert_parse(out: &mut Vec<u8>, name: &[u8], rest: &[u8]) {
    insert_header(out, b'P', name.len() + 1 + rest.len());
    out.extend_from_slice(name);
    out.push(0);
    out.extend_from_slice(rest);
}

/// The message ends a transaction, whatever names mean: somebody may wait for that.
fn ends_transaction(tag: u8, body: &[u8]) -> bool {
    let text = if tag == b'Q' { body } else { body.get(1..).unwrap_or_default() };
    let is_end = |word: &[u8]| {
        text.get(..word.len()).is_some_and(|part| part.eq_ignore_ascii_case(word))
            && !text.get(word.len()).is_some_and(|byte| byte.is_ascii_alphanumeric())
    };
    let ends = [&b"commit"[..], b"end", b"rollback", b"abort"].iter().any(|word| is_end(word));
    ends && !text.contains(&b';') && tag != b'B'
}

fn names_temporary(footprint: &Footprint, sql: &[u8]) -> bool {
    footprint.leaves.something && sql.windows(4).any(|part| part.eq_ignore_ascii_case(b"temp"))
}

/// What a text deallocates, if that is all it does.
#[derive(Debug, PartialEq, Eq)]
enum Deallocation {
    All,
    /// The name, which stands between two places of the text.
    One {
        name: Box<[u8]>,
        start: usize,
        end: usize,
    },
}

fn deallocation(sql: &[u8]) -> Option<Deallocation> {
    let mut tokens = Tokens::new(sql).filter(|token| token.kind != sql::Kind::Semicolon);
    tokens.next().filter(|token| token.is_word("deallocate"))?;
    let mut name = tokens.next()?;
    if name.is_word("prepare") {
        name = tokens.next()?;
    }
    if tokens.next().is_some() {
        return None;
    }
    if name.is_word("all") {
        return Some(Deallocation::All);
    }
    let start = (name.text.as_ptr() as usize).checked_sub(sql.as_ptr() as usize)?;
    let end = start + name.text.len();
    let name = sql::name_of(&name)?.into_bytes().into();
    Some(Deallocation::One { name, start, end })
}
