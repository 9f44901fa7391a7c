//! The messages of a session that shares servers: each statement is looked at before it is sent, and the names of
//! prepared statements are those of the server.

use model::session::footprint::Leaves;
use model::session::protocol::{Given, Own, Unnamed};
use model::session::statement;
use model::sql::{self, Tokens};
use wire::backend::{self, Backend, TxStatus};
use wire::frame::{HEADER_LEN, Header};
use wire::frontend::{self, Target};

use super::{Asked, Sharing, UnnamedHere};
use crate::relay::Edit;
use crate::session::Session;

/// A statement up to this length is waited for, to be looked at.
const TEXT_LEN_MAX: usize = 100 * 1024;
/// Names of portals and statements up to this length are looked for.
const HEAD_LEN_MAX: usize = 8 * 1024;

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
        let body_len = usize::try_from(header.body_len).unwrap_or(usize::MAX);
        let is_whole = body.len() >= body_len;
        let body = body.get(..body_len).unwrap_or(body);
        match header.tag {
            b'Q' if !is_whole && body_len <= TEXT_LEN_MAX => Turn::Wait,
            b'Q' => self.on_shared_query(at, body, is_whole),
            b'P' if !is_whole && body_len <= TEXT_LEN_MAX => Turn::Wait,
            b'P' => self.on_shared_parse(at, body, is_whole),
            b'B' if !is_whole && body.len() < HEAD_LEN_MAX => Turn::Wait,
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
            b'F' => {
                sharing.keep(Leaves::Something, || "a function call".into());
                Turn::Pass
            }
            _ => Turn::Pass,
        }
    }

    fn on_shared_query(&mut self, at: usize, body: &[u8], is_whole: bool) -> Turn {
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        if !is_whole {
            sharing.keep(Leaves::Something, || "a long statement".into());
            return Turn::Pass;
        }
        let sql = body.strip_suffix(&[0]).unwrap_or(body);
        match deallocation(sql) {
            Some(Deallocation::All) => return Turn::Pass,
            Some(Deallocation::One { name, start, end }) => {
                if let Some(statement) = sharing.names.find(&name).cloned() {
                    if sharing.deallocates.is_some() {
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
                    sharing.deallocates = Some(name);
                    self.protocol.on_frontend(b'Q', None, None);
                    return Turn::Done;
                }
            }
            None => (),
        }
        let footprint = sharing.pool.database.footprint(sql);
        if !footprint.is_empty() {
            sharing.leave(footprint, &self.app.pool.unwrap_or_default(), || shown(sql));
        }
        Turn::Pass
    }

    fn on_shared_parse(&mut self, at: usize, body: &[u8], is_whole: bool) -> Turn {
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        let head = frontend::parse_head(body).ok();
        let Some((name, sql)) = head.filter(|_| is_whole) else {
            // Too long to be looked at, or malformed.
            sharing.keep(Leaves::Something, || "a long statement".into());
            match body.first() {
                Some(0) => sharing.on_unnamed_sent(),
                _ => sharing.names.unknown(),
            }
            return Turn::Pass;
        };
        let holds = statement::holds_its_time(sql);
        if name.is_empty() {
            if let Some(Deallocation::One { name, start, end }) = deallocation(sql)
                && let Some(statement) = sharing.names.find(&name).cloned()
            {
                if sharing.deallocates.is_some() {
                    return Turn::Wait;
                }
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
                sharing.deallocates = Some(name);
                sharing.on_unnamed_sent();
                self.protocol.on_frontend(b'P', Some(0), None);
                return Turn::Done;
            }
            if deallocation(sql) != Some(Deallocation::All) {
                let footprint = sharing.pool.database.footprint(sql);
                if !footprint.is_empty() {
                    sharing.leave(footprint, &self.app.pool.unwrap_or_default(), || shown(sql));
                }
            }
            if holds {
                sharing.keep(Leaves::Something, || "a statement that holds its time".into());
            }
            sharing.on_unnamed_sent();
            return Turn::Pass;
        }
        if holds || sharing.names.is_full() {
            sharing.keep(Leaves::Something, || "a prepared statement of its own".into());
            sharing.names.unknown();
            return Turn::Pass;
        }
        self.hints.on_statement(sql);
        let rest = body.get(name.len() + 1..).unwrap_or_default();
        let statement = sharing.pool.statement(rest, &self.params);
        let mut insert = Vec::new();
        if sharing.names.find(name).is_some() {
            // The server is to refuse a name that is taken, so it is taken there, too.
            insert_parse(&mut insert, name, b"\0\0\0");
            self.protocol.on_own(Own::Parse);
            insert_parse(&mut insert, name, rest);
            self.protocol.on_frontend(b'P', Some(1), None);
            sharing.names.unknown();
            sharing.names.unknown();
            sharing.here.is_tainted = true;
        } else if sharing.has(&statement) && self.protocol.status() != TxStatus::Failed {
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
        if name.is_empty() {
            self.ensure_unnamed(at);
            return Turn::Pass;
        }
        let Some(statement) = sharing.names.find(name).cloned() else { return Turn::Pass };
        let footprint = statement.footprint(&sharing.pool.database);
        if !footprint.is_empty() {
            let limits = self.app.pool.unwrap_or_default();
            sharing.leave(footprint, &limits, || shown(statement.sql()));
        }
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
        let Some(statement) = sharing.names.find(name).cloned() else { return Turn::Pass };
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
        if name.is_empty() || sharing.names.find(name).is_none() {
            return Turn::Pass;
        }
        // Others go on using it.
        sharing.names.close(name);
        self.protocol.on_given(Given::CloseComplete);
        self.edits.push(Edit { at, skip: HEADER_LEN + body_len, insert: Vec::new() });
        self.give();
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

    /// Sees to it that the unnamed statement on the server is the session's, or none.
    fn ensure_unnamed(&mut self, at: usize) {
        let Some(sharing) = &mut self.sharing else { return };
        if sharing.here.unnamed != UnnamedHere::Foreign {
            return;
        }
        sharing.here.unnamed = UnnamedHere::Sent;
        let mut insert = Vec::new();
        match self.protocol.unnamed() {
            Unnamed::Last if !self.unnamed_too_long => {
                insert.extend_from_slice(&self.unnamed);
                sharing.names.unknown();
                self.protocol.on_own(Own::Parse);
            }
            // Of an earlier one the text is lost. The server says that there is none.
            _ => {
                frontend::close(&mut insert, Target::Statement(b""));
                self.protocol.on_own(Own::Close);
            }
        }
        self.edits.push(Edit { at, skip: 0, insert });
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
        let statement = sharing.last_named.as_ref()?;
        let mut rest = body;
        let mut out = Vec::new();
        while let Some(at) =
            rest.windows(statement.name.len()).position(|part| *part == *statement.name)
        {
            let (before, after) = rest.split_at(at);
            out.extend_from_slice(before);
            out.extend_from_slice(&sharing.last_name);
            rest = after.get(statement.name.len()..).unwrap_or_default();
        }
        if rest.len() == body.len() {
            return None;
        }
        out.extend_from_slice(rest);
        let mut message = Vec::new();
        insert_header(&mut message, b'E', out.len());
        message.extend_from_slice(&out);
        Some(message)
    }

    /// A message of the server has been counted; what we answer in its place comes behind it, at `end`.
    #[inline]
    pub(crate) fn after_shared_answer(&mut self, tag: u8, end: usize) {
        let Some(sharing) = &mut self.sharing else { return };
        match (tag, sharing.here.unnamed) {
            (b'Z', UnnamedHere::Sent) if self.protocol.is_quiet() => {
                sharing.here.unnamed = UnnamedHere::Own;
            }
            // What was sent may have been skipped. If it was not, it is sent once more.
            (b'E', _) => sharing.here.unnamed = UnnamedHere::Foreign,
            _ => (),
        }
        if tag == b'E' || tag == b'Z' {
            sharing.deallocates = None;
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
        if !sharing.asked.is_empty() || (sharing.assigned.is_empty() && !sharing.has_values) {
            return !sharing.asked.is_empty();
        }
        let mut out = Vec::new();
        for name in sharing.assigned.drain(..) {
            let literal = sql::quote_literal(&name);
            let text = format!("SELECT pg_catalog.current_setting({literal}, true)");
            frontend::query(&mut out, text.as_bytes());
            self.protocol.on_own(Own::Query);
            sharing.asked.push_back(Asked::Setting { name, value: None });
        }
        if std::mem::take(&mut sharing.has_values) {
            frontend::query(&mut out, b"DISCARD SEQUENCES");
            self.protocol.on_own(Own::Query);
            sharing.asked.push_back(Asked::Nothing);
        }
        sharing.here.unnamed = UnnamedHere::Foreign;
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
                    sharing.keep(Leaves::Settings, || "a setting in another encoding".into());
                    return true;
                }
                *value = text.map(|text| String::from_utf8_lossy(text).into_owned());
            }
            (Backend::Error(_), _) => {
                self.protocol.forgive_own();
                sharing.keep(Leaves::Settings, || "a setting cannot be read".into());
            }
            (Backend::Ready(_), Some(_)) => {
                if let Some(Asked::Setting { name, value }) = sharing.asked.pop_front() {
                    sharing.told.push((name, value));
                }
                if sharing.asked.is_empty() && !sharing.told.is_empty() {
                    let told = std::mem::take(&mut sharing.told);
                    match sharing.pool.with(&sharing.state, &self.cell, &told) {
                        Some(state) => {
                            sharing.here.state = state.clone();
                            sharing.state = state;
                        }
                        None => sharing.keep(Leaves::Settings, || "its settings".into()),
                    }
                }
                return !sharing.asked.is_empty();
            }
            _ => (),
        }
        true
    }

    /// A command has completed.
    pub(crate) fn on_shared_tag(&mut self, tag: &[u8]) {
        let Some(sharing) = &mut self.sharing else { return };
        let tag = tag.strip_suffix(&[0]).unwrap_or(tag);
        match tag {
            b"DEALLOCATE" => {
                if let Some(name) = sharing.deallocates.take() {
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
        if self.here.unnamed == UnnamedHere::Foreign {
            self.here.unnamed = UnnamedHere::Sent;
        }
    }

    fn on_named(&mut self, named: model::session::protocol::Named) {
        for _ in 0..named.answered {
            self.here.statements.extend(self.names.answered());
        }
        self.names.skipped(named.skipped);
    }
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
