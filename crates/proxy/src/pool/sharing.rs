//! The messages of clients that share servers: each statement is looked at before it is sent, and the names of
//! prepared statements are those of the server.

use std::sync::Arc;

use model::session::command::{Deallocation, deallocation, ends_transaction};
use model::session::flight::Block;
use model::session::footprint::{Footprint, Leaves};
use model::session::protocol::{Given, Own, Unnamed};
use model::session::{names, statement};
use model::sql;
use wire::backend::TxStatus;
use wire::frame::{HEADER_LEN, Header};
use wire::frontend::{self, Target};

use super::{Asked, SERVER_NAME, Sharing, Statement, UnnamedHere};
use crate::relay::Edit;
use crate::session::Session;

/// A statement up to this length is waited for, to be looked at.
pub(crate) const TEXT_LEN_MAX: usize = 100 * 1024;
/// Names of portals and statements together may have this length.
pub(crate) const HEAD_LEN_MAX: usize = 64 * 1024;

/// Longest name of a statement that a server tells from others (`NAMEDATALEN`); the rest is not looked at.
const NAME_LEN_MAX: usize = 63;
/// A prepared statement up to this length is shared; its text is kept for as long as the client has it.
const SHARED_LEN_MAX: usize = 16 * 1024;
/// Names that were refused as taken, of which errors may speak.
const TAKEN_MAX: usize = 16;
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
    /// Its names are too long to be looked at.
    Refuse,
    /// What it is about cannot be prepared again as it was.
    Lost,
}

/// Letters that are others in the client's encoding than in ours, or parts of them that look like a quote or an escape.
pub(crate) fn has_odd_letters(params: &crate::app::Params, sql: &[u8]) -> bool {
    let is_plain = |name: &String| matches!(name.as_str(), "UTF8" | "SQL_ASCII");
    !sql.is_ascii() && !params.get("client_encoding").is_some_and(is_plain)
}

/// The name of a Parse is there as a whole.
fn names_end(body: &[u8]) -> bool {
    body.iter().take(HEAD_LEN_MAX).any(|byte| *byte == 0)
}

fn wait_for_names(body: &[u8]) -> Turn {
    if body.len() < HEAD_LEN_MAX { Turn::Wait } else { Turn::Refuse }
}

/// As the server takes it for its table of names.
pub(crate) fn cut(name: &[u8]) -> &[u8] {
    name.get(..NAME_LEN_MAX).unwrap_or(name)
}

impl Session {
    /// A message of the client begins at `at`, whose body, as far as it has arrived, is `body`.
    pub(crate) fn on_shared_message(&mut self, header: Header, at: usize, body: &[u8]) -> Turn {
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        let body_len = usize::try_from(header.body_len).unwrap_or(usize::MAX);
        let is_whole = body.len() >= body_len;
        if header.tag == b'X' {
            let ends = body_len == 0 && self.protocol.comes_to_an_end();
            if sharing.keeps.is_none() && !self.server.is_vacant() && ends {
                // The server stays.
                self.edits.push(Edit { at, skip: HEADER_LEN, insert: Vec::new() });
                return Turn::Done;
            }
            return Turn::Pass;
        }
        if self.server.is_vacant() {
            // Half a message keeps nobody waiting but its client.
            sharing.needs = is_whole || body_len > TEXT_LEN_MAX;
            return Turn::Wait;
        }
        if self.protocol.runs_own() {
            return Turn::Wait;
        }
        if self.protocol.is_skipping() && header.tag != b'S' {
            return Turn::Pass;
        }
        if matches!(header.tag, b'Q' | b'P' | b'B') {
            let text = || match header.tag {
                b'Q' => body.split(|byte| *byte == 0).next(),
                b'P' => frontend::parse_head(body).ok().map(|(_, sql)| sql),
                _ => None,
            };
            if sharing.pool.database.is_being_learned() && !text().is_some_and(ends_transaction) {
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
        let body = body.get(..body_len).unwrap_or(body);
        match header.tag {
            b'Q' if !is_whole && body_len <= TEXT_LEN_MAX => Turn::Wait,
            b'Q' => self.on_shared_query(at, body, is_whole),
            b'P' if !is_whole && body_len <= TEXT_LEN_MAX => Turn::Wait,
            b'P' if names_end(body) || is_whole => self.on_shared_parse(at, body, body_len),
            b'P' => wait_for_names(body),
            b'B' if !is_whole && frontend::parse_head(body).is_err() => wait_for_names(body),
            b'B' | b'D' | b'C' | b'E' if sharing.here.unnamed == UnnamedHere::Foreign => {
                self.close_unnamed(at);
                self.on_shared_extended(header, at, body, body_len, is_whole)
            }
            b'B' | b'D' | b'C' => self.on_shared_extended(header, at, body, body_len, is_whole),
            b'E' => {
                let portal = body.split(|byte| *byte == 0).next();
                if sharing.begins.as_deref() == portal && sharing.begins.is_some() {
                    sharing.runs(Block::Begins);
                }
                if sharing.may_commit_later {
                    sharing.runs(Block::MayCommit);
                }
                Turn::Pass
            }
            b'S' => {
                sharing.ends_batch();
                Turn::Pass
            }
            b'F' => {
                sharing.runs(Block::Stays);
                sharing.keep(Leaves::ANYTHING, || "a function call".into());
                self.close_foreign(at);
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
                // Without its end, or with more behind it, it is for the server to refuse.
                Some((b'S', name)) => match name.split_last() {
                    Some((0, name)) if name.contains(&0) => Turn::Pass,
                    Some((0, name)) if header.tag == b'D' => {
                        self.on_shared_describe(at, name, body_len)
                    }
                    Some((0, name)) => self.on_shared_close(at, name, body_len),
                    _ => Turn::Pass,
                },
                _ => Turn::Pass,
            },
            _ => Turn::Pass,
        }
    }

    fn on_shared_query(&mut self, at: usize, body: &[u8], is_whole: bool) -> Turn {
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        if !is_whole {
            sharing.runs(Block::MayCommit);
            sharing.keep(Leaves::ANYTHING, || "a long statement".into());
            self.close_foreign(at);
            return Turn::Pass;
        }
        sharing.on_query_sent();
        let sql = body.strip_suffix(&[0]).unwrap_or(body);
        let is_odd = has_odd_letters(&self.params, sql) || self.may_be_odd(sql);
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        match deallocation(sql) {
            Some(Deallocation::All) => {
                sharing.runs(Block::Stays);
                return Turn::Pass;
            }
            Some(Deallocation::One { name, start, end }) => {
                if let Some(statement) = sharing.names.find(cut(&name)).cloned() {
                    if self.protocol.is_running() && !self.protocol.has_open_batch() {
                        return Turn::Wait;
                    }
                    let mut text = sql.get(..start).unwrap_or_default().to_vec();
                    text.extend_from_slice(&statement.name);
                    text.extend_from_slice(sql.get(end..).unwrap_or_default());
                    let mut insert = Vec::new();
                    if !sharing.has(&statement) {
                        // There must be something that can be deallocated.
                        if self.protocol.has_open_batch() {
                            // Behind an error both are skipped.
                            insert_parse(&mut insert, &statement.name, b"SELECT 1\0\0\0");
                            sharing.names.own(statement.clone());
                            self.protocol.on_own(Own::Parse);
                            // It is not what its name says.
                            sharing.here.is_tainted = true;
                        } else {
                            let mut made = b"PREPARE ".to_vec();
                            made.extend_from_slice(&statement.name);
                            made.extend_from_slice(b" AS SELECT 1");
                            frontend::query(&mut insert, &made);
                            self.protocol.on_own(Own::Query);
                            sharing.asked.push_back(Asked::Nothing);
                        }
                    }
                    frontend::query(&mut insert, &text);
                    self.edits.push(Edit { at, skip: HEADER_LEN + body.len(), insert });
                    sharing.deallocates.push_back(name);
                    sharing.runs(Block::Stays);
                    self.protocol.on_frontend(b'Q', None, None);
                    return Turn::Done;
                }
            }
            None => (),
        }
        let footprint = if is_odd {
            Footprint::of(Leaves::ANYTHING)
        } else {
            sharing.pool.database.footprint(sql)
        };
        if footprint.leaves.something {
            self.close_foreign(at);
        }
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        sharing.runs(footprint.block);
        sharing.ends_batch();
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
            sharing.here.closing.push(statement);
        }
        if !insert.is_empty() {
            self.edits.push(Edit { at, skip: 0, insert });
        }
    }

    fn on_shared_parse(&mut self, at: usize, body: &[u8], body_len: usize) -> Turn {
        let is_foreign = |sharing: &Sharing| sharing.here.unnamed == UnnamedHere::Foreign;
        if self.sharing.as_deref().is_some_and(is_foreign) {
            self.close_unnamed(at);
        }
        let is_whole = body.len() >= body_len;
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        let head = frontend::parse_head(body).ok();
        let Some((name, sql)) = head.filter(|_| is_whole) else {
            // Too long to be looked at, or malformed.
            sharing.keep(Leaves::ANYTHING, || "a long statement".into());
            match body.iter().position(|byte| *byte == 0) {
                Some(0) => {
                    sharing.on_unnamed_sent();
                    sharing.unnamed = Footprint::of(Leaves::ANYTHING);
                }
                Some(len) => {
                    let name = body.get(..len).unwrap_or_default();
                    return self.on_own_parse(at, cut(name), len, body_len);
                }
                // No name ends: it is for the server to refuse.
                None => sharing.names.unknown(),
            }
            return Turn::Pass;
        };
        let name_len = name.len();
        let name = cut(name);
        let holds = statement::holds_its_time(sql);
        let is_odd = has_odd_letters(&self.params, sql) || self.may_be_odd(sql);
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        if name.is_empty() {
            if let Some(Deallocation::One { name, start, end }) = deallocation(sql)
                && let Some(statement) = sharing.names.find(cut(&name)).cloned()
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
            sharing.unnamed_judged_at = sharing.pool.database.redefined();
            sharing.unnamed = if sharing.unnamed_clears {
                Footprint::default()
            } else if is_odd {
                Footprint::of(Leaves::ANYTHING)
            } else {
                sharing.pool.database.footprint(sql)
            };
            // Whatever it reads under settings of the transaction it would read otherwise elsewhere.
            sharing.unnamed_unsettled =
                sharing.repaths || (sharing.rereads && statement::has_literals(sql));
            sharing.unnamed_deallocates = None;
            sharing.may_begin |= !matches!(sharing.unnamed.block, Block::Stays | Block::Commits);
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
        let is_own = holds || sharing.names.is_full() || sharing.left.contains(name);
        let is_own = is_own || is_odd;
        if is_own || body.len() > SHARED_LEN_MAX {
            sharing.keep(Leaves::ANYTHING, || "a prepared statement of its own".into());
            return self.on_own_parse(at, name, name_len, body_len);
        }
        self.hints.on_statement(sql);
        let rest = body.get(name_len + 1..).unwrap_or_default();
        let is_taken = sharing.names.find(name).is_some() && !sharing.clears;
        if !is_taken {
            // Prepared under settings of the transaction, it cannot be prepared again as the same.
            self.restyled |= sharing.repaths || (sharing.rereads && statement::has_literals(sql));
        }
        let statement = if sharing.is_unsettled || sharing.keeps.is_some() || sharing.clears {
            sharing.pool.own_statement(rest)
        } else {
            sharing.pool.statement(rest, &sharing.state, &self.params)
        };
        let mut insert = Vec::new();
        if is_taken {
            let taken = self.take_name(name, &mut insert);
            insert_parse(&mut insert, &taken, rest);
            self.protocol.on_frontend(b'P', Some(1), None);
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

    /// The server is to refuse a name that is taken, so it is taken there, too. Gives the name there.
    fn take_name(&mut self, name: &[u8], insert: &mut Vec<u8>) -> Box<[u8]> {
        let Some(sharing) = &mut self.sharing else { return name.into() };
        let taken = sharing.pool.own_statement(b"\0\0\0");
        insert_parse(insert, &taken.name, &taken.body);
        self.protocol.on_own(Own::Parse);
        sharing.fails_batch = true;
        if sharing.taken.len() < TAKEN_MAX {
            sharing.taken.push((taken.clone(), name.to_vec()));
        }
        sharing.names.own(taken.clone());
        sharing.names.unknown();
        taken.name.clone()
    }

    /// A Parse whose name is left to the server that the session keeps. `name_len` is how long the name is before it is
    /// cut.
    fn on_own_parse(&mut self, at: usize, name: &[u8], name_len: usize, body_len: usize) -> Turn {
        if self.protocol.awaits_ready() {
            return Turn::Wait;
        }
        // It is run without being looked at again.
        self.close_foreign(at);
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        if sharing.names.find(name).is_none() || sharing.clears {
            sharing.names.unknown();
            if sharing.left.len() < names::NAMES_MAX {
                sharing.left.insert(name.into());
            }
            return Turn::Pass;
        }
        let mut insert = Vec::new();
        let taken = self.take_name(name, &mut insert);
        insert_header(&mut insert, b'P', body_len - name_len + taken.len());
        insert.extend_from_slice(&taken);
        insert.push(0);
        self.protocol.on_frontend(b'P', Some(1), None);
        self.edits.push(Edit { at, skip: HEADER_LEN + name_len + 1, insert });
        Turn::Done
    }

    fn on_shared_bind(&mut self, at: usize, body: &[u8], body_len: usize) -> Turn {
        // A Bind begins with two names, as a Parse with a name and a text.
        let Ok((portal, name)) = frontend::parse_head(body) else { return Turn::Pass };
        let head_len = portal.len() + 1 + name.len() + 1;
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        let changes = sharing.names.has_pending() || !sharing.deallocates.is_empty();
        if self.protocol.awaits_ready() && changes {
            return Turn::Wait;
        }
        if name.is_empty() {
            if sharing.unnamed_deallocates.is_some() && self.protocol.awaits_ready() {
                return Turn::Wait;
            }
            let is_last =
                self.protocol.unnamed() == Unnamed::Last && !self.protocol.parses_unnamed();
            if !sharing.unnamed_in_batch && !is_last && self.protocol.unnamed() != Unnamed::Absent {
                // The server may still have the one before.
                sharing.unnamed = Footprint::of(Leaves::ANYTHING);
            }
            sharing.clears |= sharing.unnamed_clears;
            sharing.binds(portal, sharing.unnamed.block);
            let is_sql = !sharing.unnamed_clears && sharing.unnamed_deallocates.is_none();
            if is_sql && sharing.unnamed_judged_at != sharing.pool.database.redefined() {
                // What it calls may be something else by now.
                sharing.unnamed = Footprint::of(Leaves::ANYTHING);
            }
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
            // There must be something that can be deallocated, on whichever server the session stands by now.
            let gone = sharing.unnamed_deallocates.as_ref();
            if let Some(statement) = gone.and_then(|name| sharing.names.find(cut(name))).cloned() {
                let mut insert = Vec::new();
                if !sharing.has(&statement) {
                    insert_parse(&mut insert, &statement.name, &statement.body);
                    sharing.names.own(statement);
                    self.protocol.on_own(Own::Parse);
                }
                if !insert.is_empty() {
                    self.edits.push(Edit { at, skip: 0, insert });
                }
            }
            return if self.ensure_unnamed(at) { Turn::Pass } else { self.cannot_be_prepared() };
        }
        let Some(statement) = sharing.names.find(cut(name)).cloned() else {
            sharing.binds(portal, Block::MayCommit);
            return self.on_unknown_name(b'B', at, portal, name, body_len);
        };
        let footprint = statement.footprint(&sharing.pool.database);
        sharing.binds(portal, footprint.block);
        if !footprint.is_empty() {
            let limits = self.app.pool.unwrap_or_default();
            let something = footprint.leaves.something;
            sharing.leave(footprint, &limits, || shown(statement.sql()));
            if something {
                self.close_foreign(at);
            }
        }
        let mut insert = Vec::new();
        let Some(statement) = self.ensure(&statement, &mut insert) else {
            return self.cannot_be_prepared();
        };
        if let Some(sharing) = &mut self.sharing {
            sharing.name(&statement, name);
        }
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
            return if self.ensure_unnamed(at) { Turn::Pass } else { self.cannot_be_prepared() };
        }
        let Some(sharing) = &mut self.sharing else { return Turn::Pass };
        if self.protocol.awaits_ready() && sharing.names.has_pending() {
            return Turn::Wait;
        }
        let Some(statement) = sharing.names.find(cut(name)).cloned() else {
            return self.on_unknown_name(b'D', at, b"", name, body_len);
        };
        let mut insert = Vec::new();
        let Some(statement) = self.ensure(&statement, &mut insert) else {
            return self.cannot_be_prepared();
        };
        if let Some(sharing) = &mut self.sharing {
            sharing.name(&statement, name);
        }
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
        let cut_name = cut(name);
        if sharing.names.find(cut_name).is_none() {
            return self.on_unknown_name(b'C', at, b"", name, body_len);
        }
        // Others go on using it.
        sharing.names.close(cut_name);
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

    /// Something that was sent, and is not answered, may have set another encoding.
    fn may_be_odd(&self, sql: &[u8]) -> bool {
        let sets = self.sharing.as_ref().is_some_and(|sharing| sharing.is_unsettled);
        sets && !sql.is_ascii() && self.protocol.is_running()
    }

    /// Sees to it that the server has a statement before what is sent next, and gives it as the server knows it.
    /// None if it would not be the same: settings by which its literals are read have changed since.
    fn ensure(
        &mut self,
        statement: &Arc<Statement>,
        insert: &mut Vec<u8>,
    ) -> Option<Arc<Statement>> {
        let sharing = self.sharing.as_mut()?;
        // After DEALLOCATE ALL it is for the server to refuse.
        if sharing.has(statement) || sharing.clears {
            return Some(statement.clone());
        }
        let is_unsettled = sharing.is_unsettled || sharing.repaths;
        let alias = sharing.here.aliases.get(&statement.id).filter(|_| is_unsettled).cloned();
        if let Some(alias) = alias.filter(|alias| sharing.has(alias)) {
            return Some(alias);
        }
        let is_other = self.restyled || sharing.sets_styles;
        if is_other && statement::is_read_by_settings(statement.sql()) {
            return None;
        }
        let mut made = statement.clone();
        if is_unsettled {
            // Prepared under settings of this transaction it is not what others mean by its name.
            made = sharing.pool.own_statement(&statement.body);
            sharing.here.aliases.insert(statement.id, made.clone());
        }
        if sharing.here.perhaps.contains(&made) || sharing.here.closing.contains(&made) {
            // What was to be let go of may be there still.
            frontend::close(insert, Target::Statement(&made.name));
            self.protocol.on_own(Own::Close);
        }
        insert_parse(insert, &made.name, &made.body);
        sharing.names.own(made.clone());
        self.protocol.on_own(Own::Parse);
        Some(made)
    }

    /// What is used cannot be prepared again as it was; unless that is skipped behind an error anyway.
    fn cannot_be_prepared(&self) -> Turn {
        match &self.sharing {
            Some(sharing) if sharing.fails_batch => Turn::Pass,
            _ => Turn::Lost,
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
    /// False if it would not be the same.
    fn ensure_unnamed(&mut self, at: usize) -> bool {
        let Some(sharing) = &mut self.sharing else { return true };
        if sharing.here.unnamed != UnnamedHere::Missing {
            return true;
        }
        sharing.here.unnamed = UnnamedHere::Own;
        if self.protocol.unnamed() == Unnamed::Last && !self.unnamed_too_long {
            let text = self.unnamed.get(HEADER_LEN..).unwrap_or_default();
            let text = frontend::parse_head(text).map_or(text, |(_, sql)| sql);
            let is_other = self.unnamed_restyled || sharing.sets_styles;
            if sharing.unnamed_unsettled || (is_other && statement::is_read_by_settings(text)) {
                return false;
            }
            (sharing.here.has_unnamed, sharing.here.prepares_unnamed) = (true, true);
            sharing.names.unknown();
            self.protocol.on_own(Own::Parse);
            self.edits.push(Edit { at, skip: 0, insert: self.unnamed.clone() });
        }
        true
    }
}

impl Sharing {
    /// A portal is made of a statement, and is most likely run in this batch.
    fn binds(&mut self, portal: &[u8], block: Block) {
        self.flight.binds(block);
        self.may_begin |= block == Block::Begins;
        if block == Block::Begins {
            self.begins = Some(portal.into());
        } else if self.begins.as_deref() == Some(portal) {
            self.begins = None;
        }
        self.binds_end |= !matches!(block, Block::Stays | Block::Begins);
    }

    /// A simple query, or the Sync of a batch, is sent.
    fn ends_batch(&mut self) {
        self.flight.ends_batch();
        (self.begins, self.may_begin, self.unnamed_in_batch) = (None, false, false);
    }

    /// The server has a statement, or will have it by the time it reads what is sent next.
    fn has(&self, statement: &Arc<Statement>) -> bool {
        self.here.statements.contains(statement) || self.names.is_under_way(statement)
    }

    /// The client has named a statement.
    fn name(&mut self, statement: &Arc<Statement>, name: &[u8]) {
        self.last_named = Some(statement.clone());
        self.last_name.clear();
        self.last_name.extend_from_slice(name);
    }

    /// A simple query drops the unnamed statement.
    pub(crate) fn on_query_sent(&mut self) {
        self.here.drops_unnamed = true;
        if self.here.unnamed == UnnamedHere::Missing {
            self.here.unnamed = UnnamedHere::Own;
        }
    }

    fn on_unnamed_sent(&mut self) {
        (self.here.unnamed, self.here.has_unnamed) = (UnnamedHere::Own, true);
        self.unnamed_in_batch = true;
    }
}

fn shown(sql: &[u8]) -> String {
    sql::shown(sql, SHOWN_LEN_MAX)
}

pub(super) fn insert_header(out: &mut Vec<u8>, tag: u8, body_len: usize) {
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

fn names_temporary(footprint: &Footprint, sql: &[u8]) -> bool {
    footprint.leaves.something && sql.windows(4).any(|part| part.eq_ignore_ascii_case(b"temp"))
}
