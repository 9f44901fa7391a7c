//! A session whose server is lost, and that goes on with another one.
//!
//! It stays with its client if nothing of it was on that server but its transaction. Whatever it had asked for and not
//! been answered has failed; a transaction that was open is open no more, which the client is told before anything else
//! it sends is run.

use model::session::flight::{Flight, Lost};
use model::session::protocol::{Own, Reply};
use model::sql::{Kind, Token, Tokens};
use wire::backend::{self, Report, TxStatus};
use wire::frame::{HEADER_LEN, Header};
use wire::frontend;
use wire::sqlstate::SqlState;

use super::sharing::{TEXT_LEN_MAX, Turn, cut};
use super::{Asked, Here};
use crate::relay::Edit;
use crate::session::{Leg, Session};

/// A transaction that was lost with its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LostBlock {
    /// The client does not know.
    Untold,
    /// It was told, and has not ended its transaction.
    Told,
}

/// What fails a transaction on a server, as it has failed for its client.
const FAILS: &str = "RESET holdfast_says_the_transaction_was_lost_with_its_server";

fn report(lost: Lost) -> Report {
    match lost {
        Lost::RolledBack => Report::error(
            SqlState::SERIALIZATION_FAILURE,
            "the transaction was rolled back, because its server was lost",
        )
        .hint("the session goes on with another server: run the transaction again"),
        Lost::InDoubt => Report::error(
            SqlState::TRANSACTION_RESOLUTION_UNKNOWN,
            "it is not known whether the transaction was committed, because its server was lost",
        )
        .hint("the session goes on with another server: look whether its changes are there before it is run again"),
    }
}

/// The server ends for reasons of its own, not of the session.
pub(crate) fn is_shutdown(state: SqlState) -> bool {
    matches!(state, SqlState::ADMIN_SHUTDOWN | SqlState::CRASH_SHUTDOWN)
}

/// A simple query is a ROLLBACK and nothing else: that is what has happened.
fn rolls_back(body: &[u8]) -> bool {
    let mut tokens = Tokens::new(body.strip_suffix(&[0]).unwrap_or(body));
    let verb = tokens.next();
    let is_verb = verb.is_some_and(|token| token.is_word("rollback") || token.is_word("abort"));
    let mut rest = tokens.skip_while(|token| {
        token.kind == Kind::Semicolon || token.is_word("work") || token.is_word("transaction")
    });
    is_verb && rest.next().is_none()
}

impl Session {
    /// Why it cannot go on without the server that it stands on, if that is lost. None if it can.
    pub(crate) fn needs_its_server(&self) -> Option<String> {
        let Some(sharing) = &self.sharing else { return Some("it shares no servers".into()) };
        if let Some(keeps) = &sharing.keeps
            && !keeps.passes
        {
            return Some(keeps.why.clone());
        }
        let asks = |asked: &Asked| matches!(asked, Asked::Setting { .. });
        // Also where all is answered and its batch has not come to an end.
        let is_open = self.protocol.is_running() || self.protocol.has_open_batch();
        let is_in_doubt = is_open && sharing.flight.lost().0 == Lost::InDoubt;
        let may_have_set = is_in_doubt && !sharing.assigned.is_empty();
        let is_told = !sharing.told.is_empty() || sharing.asked.iter().any(asks);
        if sharing.has_set || may_have_set || is_told {
            return Some("it has set something of which nobody knows yet what it is".into());
        }
        if !self.protocol.may_lose_server() {
            return Some("its answers are out of step".into());
        }
        if !self.server.scanner.at_boundary() {
            return Some("its client has part of an answer".into());
        }
        None
    }

    /// It goes on if its server is lost.
    pub(crate) fn may_outlive(&self) -> bool {
        !self.client_gone && !self.server_said_why && self.needs_its_server().is_none()
    }

    /// Its server is lost, and it does not need it: the client is told what has become of what it had asked for, and the
    /// session stands on no server.
    pub(crate) fn lose_server(&mut self) {
        let before = self.protocol.status();
        let is_resting = self.protocol.is_quiet();
        let Some(sharing) = &mut self.sharing else { return };
        let flight = if is_resting { Flight::at_rest(before) } else { sharing.flight };
        let (lost, mut status) = flight.lost();
        if self.protocol.has_open_batch() && sharing.may_begin {
            // What follows in its batch is skipped, and what comes then must not be run without it.
            status = TxStatus::Failed;
        }
        if self.protocol.is_running() || sharing.redefines || sharing.doubts {
            // Nobody will hear what it has defined.
            sharing.pool.database.doubt();
        }
        let replies = self.protocol.on_server_lost(status);
        sharing.on_named(self.protocol.take_named());
        sharing.lost = match status {
            TxStatus::Idle => None,
            // It had failed before, and its client was told why.
            _ if is_resting && before == TxStatus::Failed && sharing.lost.is_none() => {
                Some(LostBlock::Told)
            }
            _ if is_resting => Some(LostBlock::Untold),
            _ => Some(LostBlock::Told),
        };
        sharing.swallows = !self.client.scanner.at_boundary();
        sharing.here = Here::default();
        sharing.flight = Flight::at_rest(status);
        (sharing.is_unsettled, sharing.repaths, sharing.rereads) = (false, false, false);
        (sharing.restyles, sharing.sets_styles, sharing.clears) = (false, false, false);
        (sharing.redefines, sharing.doubts, sharing.has_values) = (false, false, false);
        (sharing.judged_at, sharing.last_named) = (None, None);
        sharing.deallocates.clear();
        sharing.assigned.clear();
        sharing.asked.clear();
        sharing.told.clear();
        sharing.taken.clear();
        self.hints.on_error();
        self.long = None;
        if let Some(confined) = &mut self.confined {
            confined.on_error();
            confined.on_ready(status == TxStatus::Idle);
        }
        self.server = Leg::vacant();
        (self.backend_pid, self.backend_secret) = (0, Box::default());
        (self.server_gone, self.server_said_why) = (false, false);
        self.tell(&replies, lost);
        self.carry_waits = true;
    }

    fn tell(&mut self, replies: &[Reply], lost: Lost) {
        let mut out = Vec::new();
        for reply in replies {
            match reply {
                Reply::Error => report(lost).write_error(&mut out),
                Reply::Ready(status) => backend::ready(&mut out, *status),
            }
        }
        self.client.push(&out);
    }

    /// A message of a client whose server was lost, and that stands on none: it may be answered without one. None if it is
    /// as any other.
    pub(crate) fn on_lost_message(
        &mut self,
        header: Header,
        at: usize,
        body: &[u8],
    ) -> Option<Turn> {
        let body_len = usize::try_from(header.body_len).unwrap_or(usize::MAX);
        let is_whole = body.len() >= body_len;
        let body = body.get(..body_len).unwrap_or(body);
        let replies = if self.protocol.is_skipping() {
            match header.tag {
                b'X' => return None,
                b'S' => self.protocol.sync_alone(),
                b'P' | b'B' if self.may_begin(header.tag, body) => {
                    self.protocol.fail_alone();
                    self.sharing.as_mut()?.lost = Some(LostBlock::Told);
                    Vec::new()
                }
                _ => Vec::new(),
            }
        } else {
            let is_untold = self.sharing.as_ref()?.lost == Some(LostBlock::Untold);
            match header.tag {
                // Of a COPY that has failed; and nothing is on its way that could be flushed.
                b'd' | b'c' | b'f' | b'H' => Vec::new(),
                b'S' if is_untold => self.sync_untold(),
                b'Q' | b'P' if is_untold && !is_whole && body_len <= TEXT_LEN_MAX => {
                    return Some(Turn::Wait);
                }
                b'Q' | b'F' | b'P' | b'B' | b'D' | b'E' | b'C' if is_untold => {
                    let rolls_back = header.tag == b'Q' && rolls_back(body);
                    self.sharing.as_mut()?.lost = Some(LostBlock::Told);
                    if rolls_back {
                        return None;
                    }
                    if header.tag == b'P' && body.first() == Some(&0) {
                        self.protocol.drop_unnamed();
                    }
                    self.protocol.refuse_alone(header.tag)
                }
                _ => return None,
            }
        };
        self.sharing.as_mut()?.swallows = !is_whole;
        self.tell(&replies, Lost::RolledBack);
        self.edits.push(Edit { at, skip: HEADER_LEN + body.len(), insert: Vec::new() });
        Some(Turn::Done)
    }

    /// As far as the client knows its transaction is open, and it will be told with the next statement.
    fn sync_untold(&self) -> Vec<Reply> {
        vec![Reply::Ready(TxStatus::InTransaction)]
    }

    /// A message that is skipped would, or might, have begun a block.
    fn may_begin(&self, tag: u8, body: &[u8]) -> bool {
        let Ok((_, second)) = frontend::parse_head(body) else { return true };
        let sql = match tag {
            b'P' => Some(second),
            // A Bind begins with two names.
            _ => {
                let sharing = self.sharing.as_ref();
                let known = sharing.and_then(|sharing| sharing.names.find(cut(second)));
                known.map(|statement| statement.sql())
            }
        };
        let begins = |token: Token<'_>| token.is_word("begin") || token.is_word("start");
        // An unnamed one was sent in this batch, and looked at.
        sql.is_some_and(|sql| Tokens::new(sql).any(begins))
    }

    /// It is attached to another server: there its transaction has to have failed as well. Gives what to send.
    pub(crate) fn fail_again(&mut self) -> Vec<u8> {
        let mut out = Vec::new();
        let Some(sharing) = self.sharing.as_mut().filter(|sharing| sharing.lost.is_some()) else {
            return out;
        };
        sharing.lost = None;
        for (sql, asked) in [("BEGIN", Asked::Nothing), (FAILS, Asked::Failing)] {
            frontend::query(&mut out, sql.as_bytes());
            self.protocol.on_own(Own::Query);
            sharing.asked.push_back(asked);
        }
        out
    }
}
