//! What servers answer to sessions that share them, and what is asked before one is detached.

use model::session::command::{is_of_relation, redefines};
use model::session::flight::Flight;
use model::session::footprint::Leaves;
use model::session::protocol::{Given, Named, Own, Unnamed};
use model::session::{names, statement};
use model::sql;
use wire::backend::{self, Backend, TxStatus};
use wire::frame::HEADER_LEN;
use wire::frontend;

use super::sharing::insert_header;
use super::{Asked, SERVER_NAME, Sharing, UnnamedHere};
use crate::relay::Edit;
use crate::session::Session;

impl Session {
    /// Gives the client the answers whose turn it is.
    pub(super) fn give(&mut self) {
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
        let name_of = |server_name: &[u8]| {
            let last = sharing.last_named.as_ref().map(|known| (&*sharing.last_name, known));
            let taken = sharing.taken.iter().rev().map(|(known, name)| (&**name, known));
            let mut known = last.into_iter().chain(taken).chain(sharing.names.iter());
            known.find(|(_, known)| &*known.name == server_name).map(|(name, _)| name)
        };
        let text = names::with_client_names(body, SERVER_NAME, name_of)?;
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
            sharing.taken.clear();
        }
        if tag == b'E' {
            // What was to be let go of behind it may be there still.
            let closing = std::mem::take(&mut here.closing);
            here.perhaps.extend(closing);
        } else if tag == b'Z' && self.protocol.is_quiet() {
            here.closing.clear();
        }
        match tag {
            b'C' | b'I' if here.unnamed == UnnamedHere::Foreign => {
                // A simple query was read, and has dropped it (`exec_simple_query`).
                (here.unnamed, here.has_unnamed) = (UnnamedHere::Missing, false);
            }
            b'E' => here.doubts_unnamed = true,
            b'Z' if self.protocol.is_quiet() => {
                let prepares = std::mem::take(&mut here.prepares_unnamed);
                let doubts = std::mem::take(&mut here.doubts_unnamed);
                if prepares && doubts && here.unnamed == UnnamedHere::Own {
                    // Ours may have been skipped; to prepare the same again does no harm.
                    here.unnamed = UnnamedHere::Missing;
                }
            }
            _ => (),
        }
        if tag == b'Z' && self.protocol.is_quiet() {
            let status = self.protocol.status();
            sharing.flight = Flight::at_rest(status);
            sharing.may_commit_later |= std::mem::take(&mut sharing.binds_end);
            sharing.may_commit_later &= status != TxStatus::Idle;
        }
        // Also if more is under way, or another block has begun.
        if tag == b'Z' && self.protocol.status() == TxStatus::Idle {
            sharing.has_set |= !sharing.assigned.is_empty();
        }
        if tag == b'E' || tag == b'Z' {
            sharing.fails_batch = false;
            // What was to be deallocated behind an error was not; and what comes next has waited for this.
            sharing.deallocates.clear();
            sharing.clears = false;
        }
        if tag == b'Z' && self.protocol.is_idle() {
            if std::mem::take(&mut sharing.redefines) {
                sharing.pool.database.mark_stale();
            }
            if std::mem::take(&mut sharing.doubts) {
                sharing.pool.database.doubt();
            }
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
        sharing.sets_styles = false;
        let is_clean = sharing.assigned.is_empty() && !sharing.has_values && !sharing.restyles;
        if !sharing.asked.is_empty() || is_clean {
            sharing.is_unsettled &= !sharing.asked.is_empty();
            sharing.repaths &= !sharing.asked.is_empty();
            sharing.rereads &= !sharing.asked.is_empty();
            return !sharing.asked.is_empty();
        }
        (sharing.is_unsettled, sharing.repaths, sharing.rereads) = (false, false, false);
        let mut out = Vec::new();
        sharing.has_set = false;
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
            for statement in sharing.here.take_read_by_settings() {
                frontend::close(&mut out, frontend::Target::Statement(&statement.name));
                self.protocol.on_own(Own::Close);
            }
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
            (Backend::Error(_), Some(Asked::State)) => return false,
            (Backend::Error(_), Some(Asked::Failing)) => self.protocol.forgive_own(),
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
        let welcome = sharing.pool.welcome(&self.cell);
        let is_same = |welcome: std::sync::Arc<super::Welcome>| {
            !super::reads_otherwise(&sharing.state, state, &welcome.fresh)
        };
        if welcome.is_some_and(is_same) {
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
        if matches!(tag, b"COMMIT" | b"PREPARE TRANSACTION") {
            sharing.has_set |= !sharing.assigned.is_empty();
        }
        match tag {
            b"DEALLOCATE" => {
                if let Some(name) = sharing.deallocates.pop_front() {
                    let name = name.get(..63).unwrap_or(&name);
                    if let Some(statement) = sharing.names.find(name).cloned() {
                        sharing.here.statements.remove(&statement);
                    }
                    sharing.names.remove(name);
                }
            }
            b"DEALLOCATE ALL" | b"DISCARD ALL" => {
                sharing.names.clear();
                sharing.left.clear();
                sharing.here.statements.clear();
            }
            // What a block or a procedure does is not known, nor whether what is temporary is all.
            b"DO" | b"CALL" => sharing.doubts = true,
            _ if sharing.names_temporary && is_of_relation(tag) => sharing.doubts = true,
            _ => sharing.redefines |= redefines(tag),
        }
    }
}

impl Sharing {
    pub(super) fn on_named(&mut self, named: Named) {
        for _ in 0..named.answered {
            self.here.statements.extend(self.names.answered());
        }
        self.names.skipped(named.skipped);
    }
}
