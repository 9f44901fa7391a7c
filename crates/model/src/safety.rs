//! Safety rules: what must hold for a change of cells, whoever asks for it. They are looked at in the transaction that makes the
//! change; who goes on in spite of one names it, and says why.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::cell::{Application, CellState};
use crate::switchover::Kind;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    pub name: String,
    /// Changes that it is about.
    pub kinds: BTreeSet<Kind>,
    pub require: Require,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Require {
    /// After the change so many of these cells are in one of these states.
    AtLeast {
        count: usize,
        of: BTreeSet<String>,
        is: BTreeSet<CellState>,
    },
    /// A gate is open: somebody lets changes through.
    Gate(String),
    /// So many milliseconds have passed since cells were changed last.
    Waited(u64),
    All(Vec<Require>),
    Any(Vec<Require>),
}

/// What a change is looked at by.
#[derive(Debug, Clone, Copy)]
pub struct Change<'a> {
    pub application: &'a Application,
    pub kind: Kind,
    pub from: &'a str,
    pub to: &'a str,
    pub now_ms: u64,
}

/// A rule does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violated {
    pub rule: String,
    pub why: String,
}

impl Change<'_> {
    /// The states of cells once it has come about.
    pub fn after(&self) -> BTreeMap<String, CellState> {
        let mut cells = self.application.cells.clone();
        let mut set = |cell: &str, state| {
            if let Some(found) = cells.get_mut(cell) {
                *found = state;
            }
        };
        match self.kind {
            Kind::Switchover => {
                set(self.from, CellState::Passive);
                set(self.to, CellState::Active);
            }
            Kind::Failover => {
                // Its server is lost.
                set(self.from, CellState::Fenced);
                set(self.to, CellState::Active);
            }
            Kind::Fence => set(self.from, CellState::Fenced),
            Kind::FenceAll => set(self.from, CellState::Passive),
            Kind::Unfence => set(self.to, CellState::Active),
            Kind::Rejoin => (),
        }
        cells
    }
}

impl Require {
    /// # Errors
    /// It does not hold, in words.
    fn check(&self, change: &Change<'_>) -> Result<(), String> {
        match self {
            Require::AtLeast { count, of, is } => {
                let after = change.after();
                let fits =
                    |cell: &&String| after.get(*cell).is_some_and(|state| is.contains(state));
                let found = of.iter().filter(fits).count();
                if found >= *count {
                    return Ok(());
                }
                let of = of.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                let is = is.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
                Err(format!("{found} of {of} would be {is}, at least {count} must be"))
            }
            Require::Gate(gate) if change.application.gates.contains(gate) => Ok(()),
            Require::Gate(gate) => Err(format!("gate `{gate}` is closed")),
            Require::Waited(wait_ms) => {
                let Some(at_ms) = change.application.changed_at_ms else { return Ok(()) };
                // A clock that was put back has not waited.
                let passed_ms = change.now_ms.saturating_sub(at_ms);
                if passed_ms >= *wait_ms {
                    return Ok(());
                }
                let (passed, wait) = (passed_ms / 1_000, wait_ms / 1_000);
                Err(format!("cells were changed {passed} s ago, {wait} s must have passed"))
            }
            Require::All(all) => all.iter().try_for_each(|one| one.check(change)),
            Require::Any(any) => {
                let mut whys = Vec::new();
                for one in any {
                    match one.check(change) {
                        Ok(()) => return Ok(()),
                        Err(why) => whys.push(why),
                    }
                }
                Err(whys.join(", and "))
            }
        }
    }

    /// Gates that it names.
    pub fn gates(&self) -> BTreeSet<&str> {
        match self {
            Require::Gate(gate) => [gate.as_str()].into(),
            Require::All(all) | Require::Any(all) => all.iter().flat_map(Require::gates).collect(),
            Require::AtLeast { .. } | Require::Waited(_) => BTreeSet::new(),
        }
    }

    /// Cells that it names.
    pub fn cells(&self) -> BTreeSet<&str> {
        match self {
            Require::AtLeast { of, .. } => of.iter().map(String::as_str).collect(),
            Require::All(all) | Require::Any(all) => all.iter().flat_map(Require::cells).collect(),
            Require::Gate(_) | Require::Waited(_) => BTreeSet::new(),
        }
    }
}

impl std::fmt::Display for Require {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let put = |all: &[Require], word: &str| {
            let all: Vec<String> = all.iter().map(|one| format!("({one})")).collect();
            all.join(word)
        };
        match self {
            Require::AtLeast { count, of, is } => {
                let of = of.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
                let is = is.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ");
                write!(f, "at least {count} of {of} {is}")
            }
            Require::Gate(gate) => write!(f, "gate {gate} open"),
            Require::Waited(ms) => write!(f, "{} s since the last change", ms / 1_000),
            Require::All(all) => f.write_str(&put(all, " and ")),
            Require::Any(any) => f.write_str(&put(any, " or ")),
        }
    }
}

impl Rule {
    /// # Errors
    /// It is about this change, and does not hold.
    pub fn check(&self, change: &Change<'_>) -> Result<(), Violated> {
        if !self.kinds.contains(&change.kind) {
            return Ok(());
        }
        self.require.check(change).map_err(|why| Violated { rule: self.name.clone(), why })
    }
}

/// The first rule in the way of a change, but for those that somebody goes on in spite of.
///
/// # Errors
/// The rule, and why.
pub fn check(
    rules: &[Rule],
    change: &Change<'_>,
    overridden: &BTreeSet<String>,
) -> Result<(), Violated> {
    let all = rules.iter().filter(|rule| !overridden.contains(&rule.name));
    all.into_iter().try_for_each(|rule| rule.check(change))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn application() -> Application {
        Application::new("a", ["a", "b", "c"].map(str::to_owned))
    }

    fn change<'a>(application: &'a Application, kind: Kind, to: &'static str) -> Change<'a> {
        Change { application, kind, from: "a", to, now_ms: 100_000 }
    }

    fn rule(kinds: &[Kind], require: Require) -> Rule {
        Rule { name: "r".into(), kinds: kinds.iter().copied().collect(), require }
    }

    fn at_least(count: usize, of: &[&str], is: CellState) -> Require {
        let of = of.iter().map(|cell| (*cell).to_owned()).collect();
        Require::AtLeast { count, of, is: [is].into() }
    }

    #[test]
    fn what_would_be_is_looked_at_not_what_is() {
        let application = application();
        let active =
            rule(&[Kind::Fence, Kind::Switchover], at_least(1, &["a", "b"], CellState::Active));
        assert_eq!(active.check(&change(&application, Kind::Switchover, "b")), Ok(()));
        let error = active.check(&change(&application, Kind::Switchover, "c")).unwrap_err();
        assert_eq!(error.why, "0 of a, b would be active, at least 1 must be");
        assert!(active.check(&change(&application, Kind::Fence, "a")).is_err());
        // It is not about this one.
        assert_eq!(active.check(&change(&application, Kind::FenceAll, "a")), Ok(()));
        let passive = rule(
            &[Kind::Switchover, Kind::Failover],
            at_least(2, &["a", "b", "c"], CellState::Passive),
        );
        assert_eq!(passive.check(&change(&application, Kind::Switchover, "b")), Ok(()));
        assert!(passive.check(&change(&application, Kind::Failover, "b")).is_err());
    }

    #[test]
    fn gates_waits_and_how_they_are_put_together() {
        let mut application = application();
        let gate = || Require::Gate("window".into());
        let waited = || Require::Waited(60_000);
        let all = rule(&[Kind::Switchover], Require::All(vec![gate(), waited()]));
        let any = rule(&[Kind::Switchover], Require::Any(vec![gate(), waited()]));
        let both = |application: &Application| {
            let change = change(application, Kind::Switchover, "b");
            (all.check(&change).is_ok(), any.check(&change).is_ok())
        };
        assert_eq!(both(&application), (false, true), "nothing was ever changed");
        application.changed_at_ms = Some(90_000);
        assert_eq!(both(&application), (false, false));
        let error = any.check(&change(&application, Kind::Switchover, "b")).unwrap_err();
        assert_eq!(
            error.why,
            "gate `window` is closed, and cells were changed 10 s ago, 60 s must have passed"
        );
        application.gates.insert("window".into());
        assert_eq!(both(&application), (false, true));
        application.changed_at_ms = Some(40_000);
        assert_eq!(both(&application), (true, true));
        // A clock that was put back.
        application.changed_at_ms = Some(200_000);
        assert_eq!(both(&application), (false, true));
    }

    #[test]
    fn who_goes_on_in_spite_of_a_rule_names_it() {
        let application = application();
        let one = rule(&[Kind::Fence], Require::Gate("g".into()));
        let rules = [one.clone(), Rule { name: "s".into(), ..one }];
        let change = change(&application, Kind::Fence, "a");
        let checked = |names: &[&str]| {
            let names = names.iter().map(|name| (*name).to_owned()).collect();
            check(&rules, &change, &names).map_err(|violated| violated.rule)
        };
        assert_eq!(checked(&[]), Err("r".into()));
        assert_eq!(checked(&["r"]), Err("s".into()));
        assert_eq!(checked(&["r", "s"]), Ok(()));
    }
}
