//! What becomes of what a session asks for, by the rules and by what it has prepared and bound.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use model::policy::rules::Transaction;
use model::policy::{Asked, Catalog, Class, Command, Disposition, Refusal};

use super::texts::Text;
use super::{Kind, Regime};
use crate::pool::sharing::cut;
use crate::pool::statement::SERVER_NAME;
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

/// What SQL's PREPARE may have prepared, whatever it was: it takes nothing else (`PREPARE`).
const PREPARED_BY_SQL: [Class; 4] = [Class::Read, Class::RowLock, Class::Write, Class::Code];

type Judged = Vec<(&'static str, Class)>;
/// All that one command does.
type Classes = BTreeSet<Class>;

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
        let conforms = self.confined.as_ref().and_then(|confined| confined.conforms);
        let modes = text.modes();
        for conforming in modes
            .iter()
            .filter(|mode| modes.len() == 1 || conforms.is_none_or(|conforms| conforms == **mode))
        {
            // That our grammar cannot read it does not say that the server cannot: it has more of a stack, and another version.
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
                let prepares: Classes = prepares(command, catalog).collect();
                if !prepares.is_empty() {
                    here.entry(prepared).or_insert_with(Classes::new).extend(prepares);
                }
                let mut classes: Classes = command.classes_with(catalog).collect();
                if classes.remove(&Class::Execute) {
                    classes.extend(self.classes_of_prepared(prepared, here.get(prepared), catalog));
                }
                if let Some(cursor) = &command.cursor {
                    classes.extend(self.classes_of_cursor(cursor, catalog));
                }
                judged.extend(classes.into_iter().map(|class| (command.name, class)));
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
            match (&command.prepared, &command.prepares) {
                // Which of two it has prepared hangs on a setting.
                (_, Some(_)) if modes.len() > 1 => {
                    confined.had_prepared = true;
                    (self.has_prepared_by_sql, self.had_deallocated) = (true, true);
                }
                (Some(name), Some(_)) => confined.prepares.push_back((name.clone(), text.clone())),
                _ => (),
            }
        }
    }

    /// Which statements names of the protocol stand for is not known: SQL may have given them anew.
    pub(super) fn may_be_replaced(&self) -> bool {
        self.had_hidden_code || (self.had_deallocated && self.has_prepared_by_sql)
    }

    /// The same of one name, with what is on its way. Where servers are shared the server knows it by one of ours, which SQL can
    /// give as well.
    pub(super) fn may_be_another(&self, name: &[u8]) -> bool {
        let is_given = |given: &str| match self.sharing {
            None => cut(given.as_bytes()) == cut(name),
            Some(_) => given.as_bytes().starts_with(SERVER_NAME),
        };
        let by_sql = self.confined.as_ref().is_some_and(|confined| {
            let mut given = confined.prepares.iter().map(|(given, _)| given);
            given.any(|given| is_given(given)) || confined.prepared.keys().any(|one| is_given(one))
        });
        !name.is_empty() && (by_sql || self.may_be_replaced())
    }

    /// What EXECUTE of a name does. `here` was prepared by the same text.
    fn classes_of_prepared(
        &self,
        name: &str,
        here: Option<&Classes>,
        catalog: Option<&Catalog>,
    ) -> Classes {
        let unknown = || Classes::from([Class::Unknown]);
        let Some(confined) = &self.confined else { return unknown() };
        // Both kinds of PREPARE give names in one place.
        let left = self.sharing.as_ref().is_some_and(|sharing| !sharing.left.is_empty());
        if self.has_lost_names || left {
            return unknown();
        }
        let mut classes = here.cloned().unwrap_or_default();
        if confined.had_prepared || self.may_be_replaced() {
            classes.extend(PREPARED_BY_SQL);
        }
        // What is on its way may have the name by then, or not.
        let pending = confined.prepares.iter().filter(|(given, _)| is_one_name(given, name));
        let known = confined.prepared.get(name);
        for text in pending.map(|(_, text)| text).chain(known) {
            let commands = text.modes().iter().filter_map(|mode| text.commands(*mode)).flatten();
            let its = commands.filter(|command| {
                command.prepared.as_deref().is_some_and(|given| is_one_name(given, name))
            });
            classes.extend(its.flat_map(|command| prepares(command, catalog)));
        }
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
        if let Some(text) = by_protocol {
            classes.extend(classes_of(text.as_deref(), catalog));
        }
        if classes.is_empty() { unknown() } else { classes }
    }

    /// What FETCH or MOVE runs, if the protocol has bound it; what SQL has declared was judged then.
    fn classes_of_cursor(&self, name: &str, catalog: Option<&Catalog>) -> Classes {
        let one = |class| Classes::from([class]);
        let Some(confined) = &self.confined else { return one(Class::Unknown) };
        match confined.portals.get(cut(name.as_bytes())) {
            None if confined.lost_portals => one(Class::Unknown),
            None => one(Class::Read),
            Some(text) => classes_of(text.as_deref(), catalog),
        }
    }
}

fn is_one_name(one: &str, other: &str) -> bool {
    cut(one.as_bytes()) == cut(other.as_bytes())
}

/// What the one command of a text does, if that hangs on nothing else.
fn classes_of(text: Option<&Text>, catalog: Option<&Catalog>) -> Classes {
    let commands = text.and_then(|text| match text.modes() {
        [mode] => text.commands(*mode),
        _ => None,
    });
    match commands {
        Some([command])
            if !command.own_classes().contains(&Class::Execute) && command.cursor.is_none() =>
        {
            command.classes_with(catalog).collect()
        }
        _ => Classes::from([Class::Unknown]),
    }
}

/// What PREPARE prepares does.
fn prepares(command: &Command, catalog: Option<&Catalog>) -> impl Iterator<Item = Class> + use<> {
    let all = command.prepares.iter().flatten();
    let each = all.map(|class| Command { class: *class, ..command.clone() });
    let classes = each.map(|prepared| prepared.classes_with(catalog).collect::<Vec<_>>());
    classes.collect::<Vec<_>>().into_iter().flatten()
}
