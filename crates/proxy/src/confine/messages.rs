//! The messages of clients whose commands are judged.
//!
//! Query, Execute and FunctionCall are judged when they are to be passed; Parse and Bind only tell what will be
//! executed. A refused message is replaced by one that the server refuses as well, and the text of that error by
//! ours: so the server itself fails the transaction and skips to the Sync, and no state of the protocol is kept here.
//!
//! One request is passed at a time, so that all that it has changed is known before the next is judged.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::policy::Refusal;
use model::session::protocol::{Protocol, Unnamed};
use wire::backend::{self, TxStatus};
use wire::frame::{HEADER_LEN, Header};
use wire::frontend;

use super::judging::{Verdict, What};
use super::texts::Text;
use super::{Confined, PORTALS_MAX, PREFIX, REFUSALS_MAX, Regime};
use crate::pool::sharing::{HEAD_LEN_MAX, TEXT_LEN_MAX, Turn, cut, has_odd_letters};
use crate::relay::Edit;
use crate::session::Session;

/// So long a session whose server says that it may write waits for whoever takes the fence back.
const LIFTED_MAX: Duration = Duration::from_secs(5);

/// Something may have been bound, or declared, that is still there.
fn is_open(protocol: &Protocol) -> bool {
    protocol.status() != TxStatus::Idle || protocol.has_open_batch()
}

impl Session {
    /// A message of the client begins at `at`, whose body, as far as it has arrived, is `body`.
    pub(crate) fn on_confined_message(
        &mut self,
        regime: &Arc<Regime>,
        header: Header,
        at: usize,
        body: &[u8],
    ) -> Turn {
        let is_vacant = self.server.is_vacant();
        let is_judged = matches!(header.tag, b'Q' | b'F' | b'P' | b'B' | b'E');
        if !is_vacant && (!is_judged || self.protocol.is_skipping()) {
            return Turn::Pass;
        }
        match &mut self.confined {
            Some(confined) if confined.regime.version == regime.version => (),
            // More is known of some database.
            Some(confined) if confined.regime.number == regime.number => {
                (confined.regime, confined.kind) = (regime.clone(), None);
            }
            Some(confined) => {
                let is_open = is_open(&self.protocol);
                confined.renew(regime, is_open);
            }
            None => {
                let had_prepared = self.has_prepared_by_sql || self.may_be_replaced();
                let mut confined = Confined::new(regime, had_prepared);
                confined.had_portals = is_open(&self.protocol);
                self.confined = Some(Box::new(confined));
            }
        }
        let body_len = usize::try_from(header.body_len).unwrap_or(usize::MAX);
        let is_whole = body.len() >= body_len;
        let body = body.get(..body_len).unwrap_or(body);
        if is_vacant {
            return self.on_confined_alone(regime, header, at, body, is_whole);
        }
        if self.protocol.awaits_ready() || self.waits_for_its_fence(regime) {
            return Turn::Wait;
        }
        let what = match header.tag {
            b'Q' | b'P' if !is_whole && body_len <= TEXT_LEN_MAX => return Turn::Wait,
            _ if self.identity.replication => What::Replication,
            b'P' => match self.on_confined_parse(regime, body, is_whole) {
                Some(what) => what,
                None => return Turn::Pass,
            },
            b'Q' if !is_whole => What::Unknown,
            b'Q' => self.what_of(body.strip_suffix(&[0]).unwrap_or(body)),
            b'F' => What::FunctionCall,
            b'B' => match self.on_confined_bind(regime, body, is_whole) {
                Ok(what) => what,
                Err(turn) => return turn,
            },
            _ if !is_whole && body.len() < HEAD_LEN_MAX => return Turn::Wait,
            _ => {
                let portal = body.split(|byte| *byte == 0).next().unwrap_or_default();
                let confined = self.confined.as_ref().filter(|confined| !confined.has_ended);
                let bound = confined.and_then(|confined| match portal {
                    [] => Some(confined.unnamed.clone())
                        .filter(|_| confined.bound_unnamed || !confined.had_portals),
                    portal => confined.portals.get(cut(portal)).cloned(),
                });
                match bound {
                    Some(text) => text.map_or(What::Unknown, What::Text),
                    None if confined
                        .is_some_and(|known| known.had_portals && !known.lost_portals) =>
                    {
                        What::Reading
                    }
                    None => What::Unknown,
                }
            }
        };
        let conforms = self.conforms(header.tag);
        if let Some(confined) = &mut self.confined {
            confined.conforms = conforms;
        }
        if let What::Text(text) = &what
            && self.has_passed(regime, text)
        {
            return Turn::Pass;
        }
        match self.verdict(regime, &what) {
            Verdict::Passes => {
                self.on_passed(regime, header.tag, &what);
                Turn::Pass
            }
            Verdict::Waits => Turn::Wait,
            // It was only to wait here: what is refused is refused when it is executed.
            Verdict::Refused(_)
                if matches!(
                    (header.tag, &what),
                    (b'P', What::Text(_) | What::Unknown) | (b'B', What::Text(_))
                ) =>
            {
                Turn::Pass
            }
            Verdict::Refused(_) if self.has_many_refusals() => Turn::Wait,
            Verdict::Refused(refusal) => {
                self.refuse(regime, header, at, body, is_whole, &refusal);
                Turn::Done
            }
        }
    }

    /// How the server reads the literals of a text that it is given now: a query, while nothing is under way, is read by what it
    /// has reported last (`standard_conforming_strings` is, `GUC_REPORT`).
    fn conforms(&self, tag: u8) -> Option<bool> {
        let reported = self.params.get("standard_conforming_strings").map(String::as_str);
        let is_known = tag == b'Q' && self.protocol.is_quiet() && !self.server.is_vacant();
        match reported.filter(|_| is_known) {
            Some("on") => Some(true),
            Some("off") => Some(false),
            _ => None,
        }
    }

    /// Its server says that it may write, though it is fenced: either the fence is being taken back, which will show in a
    /// moment, or the session has lifted it, and is ended by then.
    fn waits_for_its_fence(&mut self, regime: &Regime) -> bool {
        let is_lifted = self.has_lifted_fence && !regime.state.takes_writes();
        if let Some(confined) = self.confined.as_mut().filter(|_| is_lifted) {
            confined.held_since.get_or_insert_with(Instant::now);
        }
        is_lifted
    }

    /// It has lifted its fence, and that was no passing thing.
    pub(crate) fn is_without_fence(&self) -> bool {
        let since = self.confined.as_ref().and_then(|confined| confined.held_since);
        self.has_lifted_fence && since.is_some_and(|since| since.elapsed() >= LIFTED_MAX)
    }

    /// The session stands on no server. In a state that lets it do nothing at all it is told here, as it would get none.
    fn on_confined_alone(
        &mut self,
        regime: &Regime,
        header: Header,
        at: usize,
        body: &[u8],
        is_whole: bool,
    ) -> Turn {
        if self.skips_alone() {
            return self.on_skipped(header, at, body, is_whole);
        }
        let is_request = matches!(header.tag, b'Q' | b'F' | b'P' | b'B' | b'E' | b'D' | b'C');
        if !is_request || !self.kind(regime).refuses_reading {
            return Turn::Pass;
        }
        let Verdict::Refused(refusal) = self.verdict(regime, &What::Reading) else {
            return Turn::Pass;
        };
        let mut out = Vec::new();
        let report = regime.report(&self.app.name, &refusal);
        report.write_error(&mut out);
        let is_batch = !matches!(header.tag, b'Q' | b'F');
        if !is_batch {
            backend::ready(&mut out, TxStatus::Idle);
        }
        if let Some(confined) = &mut self.confined {
            (confined.skips, confined.swallows) = (is_batch, !is_whole);
        }
        self.client.push(&out);
        self.edits.push(Edit { at, skip: HEADER_LEN + body.len(), insert: Vec::new() });
        Turn::Done
    }

    /// Everything is accepted by now: nothing of it waits by a rule any more.
    pub(crate) fn end_hold(&mut self) {
        if let Some(confined) = &mut self.confined {
            confined.held_since = None;
        }
    }

    /// It was told an error by us, and what follows up to its Sync is for nobody, whatever holds by then.
    pub(crate) fn skips_alone(&self) -> bool {
        self.confined.as_ref().is_some_and(|confined| confined.skips)
    }

    pub(crate) fn on_skipped(
        &mut self,
        header: Header,
        at: usize,
        body: &[u8],
        is_whole: bool,
    ) -> Turn {
        if header.tag == b'X' {
            return Turn::Pass;
        }
        if let Some(confined) = &mut self.confined {
            (confined.skips, confined.swallows) = (header.tag != b'S', !is_whole);
        }
        if header.tag == b'S' {
            let mut out = Vec::new();
            backend::ready(&mut out, TxStatus::Idle);
            self.client.push(&out);
        }
        self.edits.push(Edit { at, skip: HEADER_LEN + body.len(), insert: Vec::new() });
        Turn::Done
    }

    fn has_many_refusals(&self) -> bool {
        self.confined.as_ref().is_some_and(|confined| confined.refusals.len() >= REFUSALS_MAX)
    }

    pub(super) fn what_of(&self, sql: &[u8]) -> What {
        let has_set = self.confined.as_ref().is_some_and(|confined| confined.has_set);
        if has_odd_letters(&self.params, sql) || (has_set && !sql.is_ascii()) {
            // Parts of a letter may be a quote to the grammar.
            return What::Unknown;
        }
        What::Text(self.app.texts.get(sql))
    }

    /// A Parse is to be passed. What has to be judged before it is, if anything has.
    fn on_confined_parse(&mut self, regime: &Regime, body: &[u8], is_whole: bool) -> Option<What> {
        let head = frontend::parse_head(body).ok().filter(|_| is_whole);
        let what = head.map_or(What::Unknown, |(_, sql)| self.what_of(sql));
        let is_unnamed = body.first() == Some(&0);
        if let Some(confined) = self.confined.as_mut().filter(|_| is_unnamed) {
            confined.statement = Some(match &what {
                What::Text(text) => Some(text.clone()),
                _ => None,
            });
        }
        if self.kind(regime).refuses_reading {
            // Types of parameters may run code when it is bound, and there is nothing to read.
            return Some(What::Reading);
        }
        // A transaction that begins here is of the state of now: what is to wait waits before it.
        self.kind(regime).holds.then_some(what)
    }

    /// The same for a Bind, whose portal is remembered.
    fn on_confined_bind(
        &mut self,
        regime: &Regime,
        body: &[u8],
        is_whole: bool,
    ) -> Result<What, Turn> {
        // A Bind begins with two names, as a Parse with a name and a text.
        let Ok((portal, name)) = frontend::parse_head(body) else {
            return Err(match is_whole {
                // The server refuses it.
                true => Turn::Pass,
                false if body.len() < HEAD_LEN_MAX => Turn::Wait,
                false => Turn::Refuse,
            });
        };
        if portal.starts_with(PREFIX.as_bytes()) {
            return Ok(What::Unknown);
        }
        if self.kind(regime).refuses_reading {
            return Ok(What::Reading);
        }
        let is_doubtful = self.may_be_another(name);
        let text = self.text_of_statement(name).filter(|_| !is_doubtful);
        let holds = self.kind(regime).holds;
        let Some(confined) = &mut self.confined else { return Err(Turn::Pass) };
        let portal = cut(portal);
        if portal.is_empty() {
            (confined.unnamed, confined.bound_unnamed) = (text.clone(), true);
        } else {
            if confined.portals.len() >= PORTALS_MAX && !confined.portals.contains_key(portal) {
                (confined.portals, confined.lost_portals) = (BTreeMap::new(), true);
            }
            confined.portals.insert(portal.into(), text.clone());
        }
        match text.filter(|_| holds) {
            Some(text) => Ok(What::Text(text)),
            None => Err(Turn::Pass),
        }
    }

    /// The text of a prepared statement by the time the server reads what is sent now.
    fn text_of_statement(&mut self, name: &[u8]) -> Option<Arc<Text>> {
        let of = |session: &Session, sql: &[u8]| match session.what_of(sql) {
            What::Text(text) => Some(text),
            _ => None,
        };
        if name.is_empty() {
            let is_last =
                self.protocol.parses_unnamed() || self.protocol.unnamed() == Unnamed::Last;
            if !is_last || self.unnamed_too_long {
                return None;
            }
            if let Some(text) =
                self.confined.as_ref().and_then(|confined| confined.statement.clone())
            {
                return text;
            }
            // It was prepared before.
            let (_, sql) = frontend::parse_head(self.unnamed.get(HEADER_LEN..)?).ok()?;
            let text = if sql.len() > TEXT_LEN_MAX { None } else { of(self, sql) };
            self.confined.as_mut()?.statement = Some(text.clone());
            return text;
        }
        match &self.sharing {
            Some(sharing) => of(self, sharing.names.find(cut(name))?.sql()),
            None => self.names.find(cut(name)).cloned().flatten(),
        }
    }

    /// The server is sent what it refuses as well.
    fn refuse(
        &mut self,
        regime: &Regime,
        header: Header,
        at: usize,
        body: &[u8],
        is_whole: bool,
        refusal: &Refusal,
    ) {
        let report = regime.report(&self.app.name, refusal);
        let Some(confined) = &mut self.confined else { return };
        let is_query = matches!(header.tag, b'Q' | b'F');
        let mark = confined.refuse(report, is_query);
        confined.swallows = !is_whole;
        let mut insert = Vec::new();
        if !is_query {
            frontend::execute(&mut insert, mark.as_bytes(), 0);
            self.protocol.on_frontend(b'E', None, None);
        } else {
            // No SQL, and the server's log says what it stands for.
            let text = format!(
                "\"{}\" /* {} refused by holdfast: cell {} is {} */",
                mark,
                refusal.command,
                regime.cell.replace(['*', '/'], "_"),
                regime.state
            );
            frontend::query(&mut insert, text.as_bytes());
            self.protocol.on_frontend(b'Q', None, None);
            if let Some(sharing) = &mut self.sharing {
                sharing.on_query_sent();
            }
        }
        self.edits.push(Edit { at, skip: HEADER_LEN + body.len(), insert });
    }

    /// More of a message that is not passed stands at `at`.
    #[cold]
    pub(crate) fn swallow(&mut self, at: usize, len: usize) {
        self.edits.push(Edit { at, skip: len, insert: Vec::new() });
        let remaining = usize::try_from(self.client.scanner.remaining()).unwrap_or(usize::MAX);
        if let Some(confined) = &mut self.confined
            && remaining == len
        {
            confined.swallows = false;
        }
        if let Some(sharing) = &mut self.sharing
            && remaining == len
        {
            sharing.swallows = false;
        }
    }

    /// A command of its client waits, by a rule.
    pub(crate) fn is_held_by_rule(&self) -> bool {
        self.confined.as_ref().is_some_and(|confined| confined.held_since.is_some())
    }

    pub(crate) fn swallows(&self) -> bool {
        self.confined.as_ref().is_some_and(|confined| confined.swallows)
            || self.sharing.as_ref().is_some_and(|sharing| sharing.swallows)
    }
}
