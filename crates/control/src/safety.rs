//! Safety rules are looked at where a change of cells is recorded: when it begins, and at its point of no return.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use model::audit::{Asking, Draft};
use model::cell::Application;
use model::persisted::Execution;
use model::safety::{Change, Rule, Violated, check};
use serde::{Deserialize, Serialize};

use crate::control::{Control, now_ms};
use crate::records;
use crate::requests::{ControlError, Unsafe};

/// By application and rule: how often it was in the way, and how often somebody went on in spite of it.
pub type Counts = BTreeMap<(String, String), (u64, u64)>;

/// What of an application's safety there is to see.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Safety {
    pub rules: Vec<Rule>,
    /// Gates that rules name, and whether each is open.
    pub gates: BTreeMap<String, bool>,
}

impl Control {
    /// # Errors
    /// There is no such application, or the store cannot be read.
    pub fn safety(&self, app: &str) -> Result<Safety, ControlError> {
        let open = self.application(app)?.gates;
        let rules = self.servers(app)?.now().rules.clone();
        let named = rules.iter().flat_map(|rule| rule.require.gates());
        let gates = named.map(|gate| (gate.to_owned(), open.contains(gate))).collect();
        Ok(Safety { rules, gates })
    }

    /// Whoever calls this writes the application as it was read, or not at all.
    pub(crate) fn check_safety(
        &self,
        application: &Application,
        execution: &Execution,
    ) -> Result<(), ControlError> {
        let Err(refusal) = self.look_at_safety(application, execution)? else { return Ok(()) };
        let (app, Unsafe { rule, why }) = (&execution.app, &refusal);
        self.count(app, rule, |(refused, _)| *refused += 1);
        tracing::warn!(app, rule, why, "a safety rule is in the way");
        Err(refusal.into())
    }

    /// The same, of what is not done.
    pub(crate) fn look_at_safety(
        &self,
        application: &Application,
        execution: &Execution,
    ) -> Result<Result<(), Unsafe>, ControlError> {
        let Execution { app, kind, from, to, asked, .. } = execution;
        let change = Change { application, kind: *kind, from, to, now_ms: now_ms() };
        let settings = self.servers(app)?.now();
        let rules = &settings.rules;
        let checked = check(rules, &change, &asked.overrides);
        Ok(checked.map_err(|Violated { rule, why }| Unsafe { rule, why }))
    }

    /// Rules that are gone on in spite of are named, and there is a reason.
    pub(crate) fn check_overrides(&self, app: &str, asking: &Asking) -> Result<(), ControlError> {
        let settings = self.servers(app)?.now();
        let rules = &settings.rules;
        for name in &asking.overrides {
            if !rules.iter().any(|rule| rule.name == *name) {
                let known = rules.iter().map(|rule| rule.name.clone()).collect::<Vec<_>>();
                let (app, rule, known) = (app.to_owned(), name.clone(), known.join(", "));
                return Err(ControlError::NoRule { app, rule, known });
            }
        }
        if !asking.overrides.is_empty() && asking.reason.is_none() {
            return Err(ControlError::NoReason);
        }
        Ok(())
    }

    pub(crate) fn count_overrides(&self, app: &str, asking: &Asking) {
        for name in &asking.overrides {
            self.count(app, name, |(_, overridden)| *overridden += 1);
        }
    }

    fn count(&self, app: &str, rule: &str, add: impl FnOnce(&mut (u64, u64))) {
        let mut counts = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
        add(counts.entry((app.to_owned(), rule.to_owned())).or_default());
    }

    /// How often rules were in the way since this process has begun to be control.
    pub fn safety_counts(&self) -> Counts {
        self.refusals.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Opens or closes a gate. Gives whether it was otherwise before.
    ///
    /// # Errors
    /// No rule names it, or the store cannot be written.
    pub fn set_gate(
        &self,
        app: &str,
        gate: &str,
        is_open: bool,
        asking: &Asking,
    ) -> Result<bool, ControlError> {
        let known = self.safety(app)?.gates;
        if !known.contains_key(gate) {
            let known = known.into_keys().collect::<Vec<_>>().join(", ");
            return Err(ControlError::NoGate { app: app.into(), gate: gate.into(), known });
        }
        let _writing = self.write_alone();
        let seen = records::application(&*self.store, app)?;
        let mut application = seen.application;
        let has_changed = match is_open {
            true => application.gates.insert(gate.to_owned()),
            false => application.gates.remove(gate),
        };
        if !has_changed {
            return Ok(false);
        }
        let (by, reason, epoch) = (asking.by.clone(), asking.reason.clone(), application.epoch.0);
        let text = format!("gate `{gate}` is {}", if is_open { "open" } else { "closed" });
        let draft = Draft { by, did: "gate", app: app.into(), epoch, reason, text };
        records::update(&*self.store, app, seen.revision, &application, draft)?;
        Ok(true)
    }
}
