//! What becomes of what a session asks for, by the rules and by what it has prepared and bound.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use model::policy::rules::Transaction;
use model::policy::{Asked, Catalog, Class, Command, Disposition, Refusal};

use super::texts::Text;
use super::{Kind, Regime};
use crate::pool::sharing::cut;
use crate::session::Session;

/// What is to be executed.
pub(super) enum What {
    Text(Arc<Text>),
    FunctionCall,
    Replication,
    /// Nothing yet, where not even reading is accepted.
    Reading,
    Unknown,
}

/// What becomes of it.
pub(super) enum Verdict {
    Passes,
    Waits,
    Refused(Refusal),
}

type Judged = Vec<(&'static str, Class)>;

/// A command ends its transaction.
fn ends_transaction(command: &Command) -> bool {
    command.class == Class::Commit || command.name == "ROLLBACK"
}

impl Session {
    /// How the session is judged, which is asked once in a regime.
    pub(super) fn kind(&mut self, regime: &Regime) -> Kind {
        if let Some(kind) = self.confined.as_ref().and_then(|confined| confined.kind) {
            return kind;
        }
        let policy = &regime.rules.config;
        let (_, of_reading) = policy.policy.rule(Class::Read, &self.asked(regime));
        let kind = Kind {
            key: regime.key(&self.identity.user, &self.identity.database),
            refuses_reading: of_reading == Disposition::Refuse && !policy.shadow,
            holds: policy.policy.holds(),
        };
        if let Some(confined) = &mut self.confined {
            confined.kind = Some(kind);
        }
        kind
    }

    /// Nothing has to be judged again, but for the count.
    pub(super) fn has_passed(&mut self, regime: &Regime, text: &Text) -> bool {
        let Some(key) = self.kind(regime).key else { return false };
        let Some(rule) = text.passed(key).filter(|_| !self.is_held_by_rule()) else { return false };
        if let Some(counts) = regime.rules.counts.get(rule) {
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

    /// All that a text does, with what this session has prepared and bound.
    fn judged(&self, text: &Text, catalog: Option<&Catalog>) -> Judged {
        let mut judged = Vec::new();
        for conforming in text.modes() {
            let Some(commands) = text.commands(*conforming) else {
                judged.push(("unknown", Class::Unknown));
                continue;
            };
            let (mut here, mut has_ended) = (BTreeMap::new(), false);
            for command in commands {
                if has_ended {
                    // It would be in a transaction of its own, which the server may let write by now.
                    judged.push((command.name, Class::Unknown));
                }
                has_ended |= ends_transaction(command);
                let prepared = command.prepared.as_deref().unwrap_or_default();
                if let Some(class) = prepares(command, catalog) {
                    let known = here.entry(prepared).or_insert(class);
                    *known = class.max(*known);
                }
                for class in command.classes_with(catalog) {
                    judged.push((
                        command.name,
                        match class {
                            Class::Execute => {
                                self.class_of_prepared(prepared, here.get(prepared), catalog)
                            }
                            class => class,
                        },
                    ));
                }
                if let Some(cursor) = &command.cursor {
                    judged.push((command.name, self.class_of_cursor(cursor, catalog)));
                }
            }
        }
        judged
    }

    pub(super) fn verdict(&mut self, regime: &Regime, what: &What) -> Verdict {
        let catalog = regime.catalogs.get(&self.identity.database);
        let judged: Judged = match what {
            What::Text(text) => {
                let classes = text.classes(catalog);
                let is_plain = |(_, _, class): &(usize, &str, Class)| {
                    !matches!(class, Class::Execute | Class::Session)
                };
                match &*classes {
                    // What one command is by itself is known.
                    [one] if is_plain(one) && !text.has_cursor() => vec![(one.1, one.2)],
                    _ => self.judged(text, catalog.map(|catalog| &**catalog)),
                }
            }
            What::FunctionCall => vec![("a function call", Class::FunctionCall)],
            What::Replication => vec![("a replication command", Class::Replication)],
            What::Reading => vec![("anything", Class::Read)],
            What::Unknown => vec![("unknown", Class::Unknown)],
        };
        let asked = self.asked(regime);
        let policy = &regime.rules.config;
        let shadow = policy.shadow;
        let is_held = self.is_held_by_rule();
        let count = |rule: usize, disposition: Disposition| {
            if is_held && disposition == Disposition::Hold {
                return;
            }
            if let Some(counts) = regime.rules.counts.get(rule) {
                counts.count(disposition, shadow);
            }
        };
        let since = self.confined.as_ref().and_then(|confined| confined.held_since);
        let may_wait = since.is_none_or(|since| since.elapsed() < policy.hold_max);
        let verdict = match policy.policy.judge(judged.iter().copied(), &asked, count) {
            Ok(()) => Verdict::Passes,
            Err(refusal) => {
                let waits = refusal.disposition == Disposition::Hold && may_wait && !shadow;
                if !waits {
                    tracing::info!(
                        session = self.id,
                        app = self.app.name,
                        command = refusal.command,
                        class = refusal.class.name(),
                        rule = policy.policy.name_of(refusal.rule),
                        state = %regime.state,
                        epoch = regime.epoch.0,
                        passes = shadow,
                        "refused"
                    );
                }
                match (shadow, waits) {
                    (true, _) => Verdict::Passes,
                    (false, true) => Verdict::Waits,
                    (false, false) => Verdict::Refused(refusal),
                }
            }
        };
        if let Some(confined) = &mut self.confined {
            match verdict {
                Verdict::Waits => {
                    confined.held_since.get_or_insert_with(Instant::now);
                }
                _ => confined.held_since = None,
            }
        }
        verdict
    }

    /// Something is passed: what it changes of what is known.
    pub(super) fn on_passed(&mut self, regime: &Regime, tag: u8, what: &What) {
        let What::Text(text) = what else { return };
        if !matches!(tag, b'Q' | b'E') {
            return;
        }
        let catalog = regime.catalogs.get(&self.identity.database);
        let key = self.kind(regime).key;
        let rule_of = |class: Class| regime.rules.config.policy.rule(class, &self.asked(regime));
        let classes = text.classes(catalog);
        // What others do hangs on the session, or changes it.
        if let ([(_, _, class @ (Class::Read | Class::Begin))], Some(key), false) =
            (&*classes, key, text.has_cursor())
            && let (rule, Disposition::Accept) = rule_of(*class)
        {
            text.set_passed(key, rule);
            return;
        }
        let Some(confined) = &mut self.confined else { return };
        let modes = text.modes();
        for command in modes.iter().filter_map(|mode| text.commands(*mode)).flatten() {
            confined.has_ended |= tag == b'E' && ends_transaction(command);
            confined.has_set |= command.class == Class::Session;
            match prepares(command, catalog.map(|catalog| &**catalog)) {
                // Which of two it has prepared hangs on a setting.
                Some(_) if modes.len() > 1 => confined.had_prepared = true,
                class => confined.prepares.extend(command.prepared.clone().zip(class)),
            }
        }
    }

    /// What EXECUTE of a name does at most. `here` was prepared by the same text.
    fn class_of_prepared(
        &self,
        name: &str,
        here: Option<&Class>,
        catalog: Option<&Catalog>,
    ) -> Class {
        let Some(confined) = &self.confined else { return Class::Unknown };
        // Both kinds of PREPARE give names in one place, and what this session did before it was confined is not known.
        let left = self.sharing.as_ref().is_some_and(|sharing| !sharing.left.is_empty());
        if confined.had_prepared || self.has_lost_names || left {
            return Class::Unknown;
        }
        let by_sql = confined.prepared.get(name).copied().max(here.copied());
        let name = name.as_bytes();
        let by_protocol = match &self.sharing {
            Some(sharing) => {
                sharing.names.find(cut(name)).map(|one| match self.what_of(one.sql()) {
                    What::Text(text) => Some(text),
                    _ => None,
                })
            }
            None => self.names.find(cut(name)).cloned(),
        };
        let of_text = |text: Option<Arc<Text>>| {
            let commands = text.as_ref().and_then(|text| match text.modes() {
                [mode] => text.commands(*mode),
                _ => None,
            });
            match commands {
                Some([command]) if command.class != Class::Execute && command.cursor.is_none() => {
                    command.classes_with(catalog).max().unwrap_or(Class::Unknown)
                }
                _ => Class::Unknown,
            }
        };
        by_sql.max(by_protocol.map(of_text)).unwrap_or(Class::Unknown)
    }

    /// What FETCH or MOVE runs, if the protocol has bound it; what SQL has declared was judged then.
    fn class_of_cursor(&self, name: &str, catalog: Option<&Catalog>) -> Class {
        let Some(confined) = &self.confined else { return Class::Unknown };
        match confined.portals.get(cut(name.as_bytes())) {
            None if confined.lost_portals => Class::Unknown,
            None => Class::Read,
            Some(None) => Class::Unknown,
            Some(Some(text)) => match (text.modes(), text.commands(true)) {
                ([_], Some([command])) if command.cursor.is_none() => {
                    let class = command.classes_with(catalog).max().unwrap_or(Class::Unknown);
                    if class == Class::Execute { Class::Unknown } else { class }
                }
                _ => Class::Unknown,
            },
        }
    }
}

/// What PREPARE prepares does, at most.
fn prepares(command: &Command, catalog: Option<&Catalog>) -> Option<Class> {
    let class = command.prepares?;
    Some(if command.calls(catalog) { class.max(Class::Code) } else { class })
}
