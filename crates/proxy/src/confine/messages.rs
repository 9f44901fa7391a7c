//! The messages of clients whose commands are judged.
//!
//! Query, Execute and FunctionCall are judged when they are to be passed; Parse and Bind only tell what will be
//! executed. A refused message is replaced by one that the server refuses as well, and the text of that error by
//! ours: so the server itself fails the transaction and skips to the Sync, and no state of the protocol is kept here.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use model::policy::rules::Transaction;
use model::policy::{Asked, Class, Disposition, Refusal};
use model::session::protocol::Unnamed;
use wire::backend::{self, TxStatus};
use wire::frame::{HEADER_LEN, Header};
use wire::frontend;

use super::texts::Text;
use super::{Confined, PORTALS_MAX, PREPARED_MAX, REFUSALS_MAX, Regime, mark};
use crate::pool::sharing::{HEAD_LEN_MAX, TEXT_LEN_MAX, Turn, cut, has_odd_letters};
use crate::relay::Edit;
use crate::session::Session;

/// What is to be executed.
enum What {
    Text(Arc<Text>),
    FunctionCall,
    Replication,
    Unknown,
}

/// What becomes of it.
enum Verdict {
    Passes,
    Waits,
    Refused(Refusal),
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
        let is_told = self.server.is_vacant();
        if !is_told
            && (!matches!(header.tag, b'Q' | b'F' | b'B' | b'E') || self.protocol.is_skipping())
        {
            return Turn::Pass;
        }
        match &mut self.confined {
            Some(confined) if confined.regime.version == regime.version => (),
            // More is known of some database.
            Some(confined) if confined.regime.number == regime.number => {
                (confined.regime, confined.key) = (regime.clone(), None);
            }
            _ => {
                self.confined = Some(Box::new(Confined::new(regime, self.has_prepared_by_sql)));
            }
        }
        let body_len = usize::try_from(header.body_len).unwrap_or(usize::MAX);
        let is_whole = body.len() >= body_len;
        let body = body.get(..body_len).unwrap_or(body);
        if is_told {
            return self.on_confined_alone(regime, header, at, body, is_whole);
        }
        if self.protocol.awaits_ready() && matches!(header.tag, b'B' | b'E') {
            // What names and portals stand for by then is not known.
            return Turn::Wait;
        }
        let what = match header.tag {
            b'Q' if !is_whole && body_len <= TEXT_LEN_MAX => return Turn::Wait,
            _ if self.identity.replication => What::Replication,
            b'Q' if !is_whole => What::Unknown,
            b'Q' => self.what_of(body.strip_suffix(&[0]).unwrap_or(body)),
            b'F' => What::FunctionCall,
            b'B' => return self.on_confined_bind(body, is_whole),
            _ if !is_whole && body.len() < HEAD_LEN_MAX => return Turn::Wait,
            _ => {
                let portal = body.split(|byte| *byte == 0).next().unwrap_or_default();
                let text = self.confined.as_ref().and_then(|confined| match portal {
                    [] => confined.unnamed.clone(),
                    portal => confined.portals.get(cut(portal)).cloned().flatten(),
                });
                text.map_or(What::Unknown, What::Text)
            }
        };
        if let What::Text(text) = &what
            && self.has_passed(text)
        {
            return Turn::Pass;
        }
        match self.verdict(regime, &what) {
            Verdict::Passes => Turn::Pass,
            Verdict::Waits => Turn::Wait,
            Verdict::Refused(_) if self.has_many_refusals() => Turn::Wait,
            Verdict::Refused(refusal) => {
                self.refuse(regime, header, at, body, is_whole, &refusal);
                Turn::Done
            }
        }
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
        let skips = self.confined.as_ref().is_some_and(|confined| confined.skips);
        let asked = self.asked(regime);
        let (_, of_reading) = self.app.policy.policy.rule(Class::Read, &asked);
        if !skips && (of_reading != Disposition::Refuse || self.app.policy.shadow) {
            return Turn::Pass;
        }
        let mut out = Vec::new();
        match header.tag {
            b'S' => backend::ready(&mut out, TxStatus::Idle),
            b'Q' | b'F' | b'P' | b'B' | b'E' | b'D' | b'C' if !skips => {
                let what = What::Text(self.app.texts.get(b"SELECT"));
                let Verdict::Refused(refusal) = self.verdict(regime, &what) else {
                    return Turn::Pass;
                };
                let report = regime.report(&self.app.name, &self.app.policy.policy, &refusal);
                report.write_error(&mut out);
                if matches!(header.tag, b'Q' | b'F') {
                    backend::ready(&mut out, TxStatus::Idle);
                }
            }
            b'Q' | b'F' | b'P' | b'B' | b'E' | b'D' | b'C' | b'H' | b'd' | b'c' | b'f' => (),
            _ => return Turn::Pass,
        }
        if let Some(confined) = &mut self.confined {
            confined.skips = match header.tag {
                b'S' => false,
                b'Q' | b'F' => skips,
                b'P' | b'B' | b'E' | b'D' | b'C' => true,
                _ => skips,
            };
            confined.swallows = !is_whole;
        }
        self.client.push(&out);
        self.edits.push(Edit { at, skip: HEADER_LEN + body.len(), insert: Vec::new() });
        Turn::Done
    }

    /// Who the session is judged like.
    fn key(&mut self) -> Option<u64> {
        let confined = self.confined.as_mut()?;
        if let Some((params, key)) = &confined.key
            && Arc::ptr_eq(params, &self.params)
        {
            return *key;
        }
        let conforming = self.params.get("standard_conforming_strings").is_none_or(|v| v == "on");
        let key = confined.regime.key(&self.identity.user, &self.identity.database, conforming);
        confined.key = Some((self.params.clone(), key));
        key
    }

    /// Nothing has to be judged again, but for the count.
    fn has_passed(&mut self, text: &Text) -> bool {
        let Some(key) = self.key() else { return false };
        let Some(rule) = text.passed(key).filter(|_| !self.is_held_by_rule()) else { return false };
        if let Some(counts) = self.app.policy_counts.get(rule) {
            counts.count(Disposition::Accept, false);
        }
        true
    }

    fn asked<'a>(&'a self, regime: &Regime) -> Asked<'a> {
        Asked {
            state: regime.state,
            role: &self.identity.user,
            database: &self.identity.database,
            transaction: Transaction::default(),
        }
    }

    fn has_many_refusals(&self) -> bool {
        self.confined.as_ref().is_some_and(|confined| confined.refusals.len() >= REFUSALS_MAX)
    }

    fn what_of(&self, sql: &[u8]) -> What {
        if has_odd_letters(&self.params, sql) {
            // Parts of a letter may be a quote to the grammar.
            return What::Unknown;
        }
        What::Text(self.app.texts.get(sql))
    }

    fn on_confined_bind(&mut self, body: &[u8], is_whole: bool) -> Turn {
        // A Bind begins with two names, as a Parse with a name and a text.
        let Ok((portal, name)) = frontend::parse_head(body) else {
            return match is_whole {
                // The server refuses it.
                true => Turn::Pass,
                false if body.len() < HEAD_LEN_MAX => Turn::Wait,
                false => Turn::Refuse,
            };
        };
        let text = self.text_of_statement(name);
        let Some(confined) = &mut self.confined else { return Turn::Pass };
        let portal = cut(portal);
        if portal.is_empty() {
            confined.unnamed = text;
            return Turn::Pass;
        }
        if confined.portals.len() >= PORTALS_MAX && !confined.portals.contains_key(portal) {
            confined.portals.clear();
        }
        confined.portals.insert(portal.into(), text);
        Turn::Pass
    }

    /// The text of a prepared statement by the time the server reads what is sent now.
    fn text_of_statement(&self, name: &[u8]) -> Option<Arc<Text>> {
        let of = |sql: &[u8]| match self.what_of(sql) {
            What::Text(text) => Some(text),
            _ => None,
        };
        if name.is_empty() {
            let is_last =
                self.protocol.parses_unnamed() || self.protocol.unnamed() == Unnamed::Last;
            if !is_last || self.unnamed_too_long {
                return None;
            }
            let (_, sql) = frontend::parse_head(self.unnamed.get(HEADER_LEN..)?).ok()?;
            return of(sql);
        }
        match &self.sharing {
            Some(sharing) => of(sharing.names.find(cut(name))?.sql()),
            None => self.names.find(cut(name)).cloned().flatten(),
        }
    }

    fn verdict(&mut self, regime: &Regime, what: &What) -> Verdict {
        let conforming = self.params.get("standard_conforming_strings").is_none_or(|v| v == "on");
        let catalog = regime.catalogs.get(&self.identity.database);
        let mut classes: Arc<[(&'static str, Class)]> = match what {
            What::Text(text) => text.classes(conforming, catalog),
            What::FunctionCall => [("a function call", Class::FunctionCall)].into(),
            What::Replication => [("a replication command", Class::Replication)].into(),
            What::Unknown => [("unknown", Class::Unknown)].into(),
        };
        if let What::Text(text) = what
            && classes.iter().any(|(_, class)| *class == Class::Execute)
        {
            // What was prepared counts, also by a command before it.
            let commands = text.commands(conforming).unwrap_or_default();
            let mut here = BTreeMap::new();
            let judged = classes.iter().zip(commands).map(|((name, class), command)| {
                let prepared = command.prepared.as_deref().unwrap_or_default();
                if let Some(prepares) = command.prepares {
                    let known = here.entry(prepared).or_insert(prepares);
                    *known = prepares.max(*known);
                }
                let class = match class {
                    Class::Execute => {
                        let here = here.get(prepared).copied();
                        self.class_of_prepared(prepared, here, conforming, regime)
                    }
                    class => *class,
                };
                (*name, class)
            });
            classes = judged.collect();
        }
        let asked = self.asked(regime);
        let policy = &self.app.policy;
        let shadow = policy.shadow;
        let is_held = self.is_held_by_rule();
        let count = |rule: usize, disposition: Disposition| {
            if is_held && disposition == Disposition::Hold {
                return;
            }
            if let Some(counts) = self.app.policy_counts.get(rule) {
                counts.count(disposition, shadow);
            }
        };
        let waits = |confined: &Option<Box<Confined>>| {
            let since = confined.as_ref().and_then(|confined| confined.held_since);
            since.is_none_or(|since| since.elapsed() < policy.hold_max)
        };
        let judged = policy.policy.judge(classes.iter().copied(), &asked, count);
        let alone = match *classes {
            [(_, class)] if judged.is_ok() => Some(policy.policy.rule(class, &asked).0),
            _ => None,
        };
        let verdict = match judged {
            Ok(()) => Verdict::Passes,
            Err(refusal) if shadow => {
                tracing::info!(
                    session = self.id, app = self.app.name, command = refusal.command, class = refusal.class.name(),
                    rule = policy.policy.name_of(refusal.rule), state = %regime.state, epoch = regime.epoch.0,
                    "would not pass"
                );
                Verdict::Passes
            }
            Err(refusal) if refusal.disposition == Disposition::Hold && waits(&self.confined) => {
                Verdict::Waits
            }
            Err(refusal) => {
                tracing::info!(
                    session = self.id, app = self.app.name, command = refusal.command, class = refusal.class.name(),
                    rule = policy.policy.name_of(refusal.rule), state = %regime.state, epoch = regime.epoch.0,
                    "refused"
                );
                Verdict::Refused(refusal)
            }
        };
        let Some(confined) = &mut self.confined else { return verdict };
        match verdict {
            Verdict::Waits => {
                confined.held_since.get_or_insert_with(Instant::now);
            }
            _ => confined.held_since = None,
        }
        if let (Verdict::Passes, What::Text(text)) = (&verdict, what) {
            let commands = text.commands(conforming).unwrap_or_default();
            // What PREPARE and EXECUTE do hangs on the session.
            if let (Some(rule), [command]) = (alone, commands)
                && command.prepared.is_none()
                && let Some(Some(key)) = confined.key.as_ref().map(|(_, key)| *key)
            {
                text.set_passed(key, rule);
            }
            for command in text.commands(conforming).unwrap_or_default() {
                let Some((name, class)) = command.prepared.clone().zip(command.prepares) else {
                    continue;
                };
                // If there is one of that name already, that one stays: the worse of both counts.
                if confined.prepared.len() < PREPARED_MAX || confined.prepared.contains_key(&name) {
                    let calls = command.class_with(catalog.map(|catalog| &**catalog));
                    let class = if calls == Class::Code { Class::Code } else { class };
                    let known = confined.prepared.entry(name).or_insert(class);
                    *known = class.max(*known);
                }
            }
        }
        verdict
    }

    /// What EXECUTE of a name does at most. `here` was prepared by the same text.
    fn class_of_prepared(
        &self,
        name: &str,
        here: Option<Class>,
        conforming: bool,
        regime: &Regime,
    ) -> Class {
        let catalog = regime.catalogs.get(&self.identity.database);
        let Some(confined) = &self.confined else { return Class::Unknown };
        // Both kinds of PREPARE give names in one place, and what this session did before it was confined is not known.
        if confined.had_prepared {
            return Class::Unknown;
        }
        let by_sql = confined.prepared.get(name).copied().max(here);
        let by_protocol = self.text_of_statement(name.as_bytes()).map(|text| {
            let classes = text.classes(conforming, catalog);
            match *classes {
                [(_, class)] if class != Class::Execute => class,
                _ => Class::Unknown,
            }
        });
        by_sql.max(by_protocol).unwrap_or(Class::Unknown)
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
        let report = regime.report(&self.app.name, &self.app.policy.policy, refusal);
        let Some(confined) = &mut self.confined else { return };
        let number = confined.refuse(report);
        confined.swallows = !is_whole;
        let mut insert = Vec::new();
        if header.tag == b'E' {
            frontend::execute(&mut insert, mark(number).as_bytes(), 0);
            self.protocol.on_frontend(b'E', None, None);
        } else {
            // No SQL, and the server's log says what it stands for.
            let text = format!(
                "\"{}\" /* {} refused by holdfast: cell {} is {} */",
                mark(number),
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
    }

    /// A command of its client waits, by a rule.
    pub(crate) fn is_held_by_rule(&self) -> bool {
        self.confined.as_ref().is_some_and(|confined| confined.held_since.is_some())
    }

    pub(crate) fn swallows(&self) -> bool {
        self.confined.as_ref().is_some_and(|confined| confined.swallows)
    }
}
