//! The rules, and the verdict on a request.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::Class;
use crate::cell::{CellState, Epoch};

/// What becomes of a request that a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Disposition {
    Accept,
    /// The client is told.
    Refuse,
    /// It waits until the state changes, for a time, and is refused then.
    Hold,
}

impl Disposition {
    pub const ALL: [Disposition; 3] = [Disposition::Accept, Disposition::Refuse, Disposition::Hold];

    /// As the configuration and counters name it.
    pub fn name(self) -> &'static str {
        match self {
            Disposition::Accept => "accept",
            Disposition::Refuse => "refuse",
            Disposition::Hold => "hold",
        }
    }

    pub fn read(name: &str) -> Option<Disposition> {
        Disposition::ALL.into_iter().find(|disposition| disposition.name() == name)
    }
}

/// What one rule is about. An empty list is about everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// As refusals and counters name it.
    pub name: String,
    pub states: Vec<CellState>,
    pub classes: BTreeSet<Class>,
    pub roles: Vec<String>,
    pub databases: Vec<String>,
    pub disposition: Disposition,
}

/// The rules of an application, of which the first that is about a command counts. What none is about is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    pub version: u64,
    pub rules: Vec<Rule>,
}

/// What matters of the session's transaction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transaction {
    /// It may have written, and when it first might have, this was the epoch.
    pub wrote_in: Option<Epoch>,
    /// The lease covers this moment, and its epoch.
    pub lease: Option<Epoch>,
}

/// Who asks, and where.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    pub state: CellState,
    pub role: &'a str,
    pub database: &'a str,
    pub transaction: Transaction,
}

/// Why a request does not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Of the first command that does not.
    pub command: &'static str,
    pub class: Class,
    /// By its number, see [`Policy::name_of`].
    pub rule: usize,
    pub disposition: Disposition,
    pub state: CellState,
}

/// The rule by which a commit is refused whose transaction wrote under a grant that does not hold any more.
pub const COMMIT_RULE: &str = "commit-needs-grant";
/// What is refused because no rule is about it.
pub const DEFAULT_RULE: &str = "default";

impl Rule {
    fn is_about(&self, class: Class, asked: &Asked<'_>) -> bool {
        let is_one = |list: &[String], one: &str| list.is_empty() || list.iter().any(|x| x == one);
        (self.states.is_empty() || self.states.contains(&asked.state))
            && (self.classes.is_empty() || self.classes.contains(&class))
            && is_one(&self.roles, asked.role)
            && is_one(&self.databases, asked.database)
    }
}

impl Default for Policy {
    /// Active: everything. Fenced: what reads, and what is of the session only. Passive: the end of a transaction that
    /// keeps nothing. Nothing else, anywhere.
    fn default() -> Policy {
        let rule = |name: &str, states: &[CellState], classes: &[Class]| Rule {
            name: name.into(),
            states: states.to_vec(),
            classes: classes.iter().copied().collect(),
            roles: Vec::new(),
            databases: Vec::new(),
            disposition: Disposition::Accept,
        };
        Policy {
            version: 1,
            rules: vec![
                rule("active-all", &[CellState::Active, CellState::Draining], &[]),
                rule("fenced-reads", &[CellState::Fenced], &Class::READING),
                rule("end-of-transaction", &[], &[Class::Rollback]),
            ],
        }
    }
}

impl Policy {
    /// The rules that stand where none of the list is about a command, behind which the list is numbered on.
    pub const BUILT_IN: [&'static str; 2] = [DEFAULT_RULE, COMMIT_RULE];

    /// The rule of that number, as [`Policy::judge`] counts them.
    pub fn name_of(&self, rule: usize) -> &str {
        match self.rules.get(rule) {
            Some(rule) => &rule.name,
            None => Policy::BUILT_IN.get(rule - self.rules.len()).copied().unwrap_or_default(),
        }
    }

    /// Whether a cell in this state takes everything from everybody, so that nothing need be judged.
    pub fn accepts_all(&self, state: CellState) -> bool {
        let about = |rule: &&Rule| rule.states.is_empty() || rule.states.contains(&state);
        for rule in self.rules.iter().filter(about) {
            if rule.disposition != Disposition::Accept {
                return false;
            }
            if rule.classes.is_empty() && rule.roles.is_empty() && rule.databases.is_empty() {
                return true;
            }
        }
        false
    }

    /// There is a rule by which commands wait.
    pub fn holds(&self) -> bool {
        self.rules.iter().any(|rule| rule.disposition == Disposition::Hold)
    }

    /// The first rule about one command, by its number.
    ///
    /// What nothing is known of may be of any class: unless a rule names it, it passes where each of them would.
    pub fn rule(&self, class: Class, asked: &Asked<'_>) -> (usize, Disposition) {
        let (at, disposition) = self.first(class, asked);
        let names_it = |rule: &Rule| rule.classes.contains(&Class::Unknown);
        let is_meant = self.rules.get(at).is_some_and(names_it);
        if class != Class::Unknown || disposition == Disposition::Refuse || is_meant {
            return (at, disposition);
        }
        let each = || Class::ALL.into_iter().map(|class| self.first(class, asked));
        let first = |which| each().find(|(_, disposition)| *disposition == which);
        first(Disposition::Refuse).or_else(|| first(Disposition::Hold)).unwrap_or((at, disposition))
    }

    fn first(&self, class: Class, asked: &Asked<'_>) -> (usize, Disposition) {
        let grant_lost = class == Class::Commit
            && asked
                .transaction
                .wrote_in
                .is_some_and(|epoch| asked.transaction.lease != Some(epoch));
        let count = self.rules.len();
        if grant_lost {
            return (count + 1, Disposition::Refuse);
        }
        let mut rules = self.rules.iter().enumerate();
        let first = rules.find(|(_, rule)| rule.is_about(class, asked));
        first.map_or((count, Disposition::Refuse), |(at, rule)| (at, rule.disposition))
    }

    /// What becomes of a request of these commands, each with its name and its class: it passes if each of them does. Each
    /// rule that was about one is counted by its number.
    ///
    /// # Errors
    /// The first command that does not pass, and by which rule.
    pub fn judge(
        &self,
        commands: impl IntoIterator<Item = (&'static str, Class)>,
        asked: &Asked<'_>,
        mut count: impl FnMut(usize, Disposition),
    ) -> Result<(), Refusal> {
        for (command, class) in commands {
            let (rule, disposition) = self.rule(class, asked);
            count(rule, disposition);
            if disposition != Disposition::Accept {
                let state = asked.state;
                return Err(Refusal { command, class, rule, disposition, state });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(state: CellState) -> Asked<'static> {
        Asked { state, role: "app", database: "shop", transaction: Transaction::default() }
    }

    fn passes(class: Class, state: CellState) -> bool {
        Policy::default().rule(class, &asked(state)).1 == Disposition::Accept
    }

    #[test]
    fn states_mean_what_they_say() {
        for class in Class::ALL {
            assert!(passes(class, CellState::Active), "{}", class.name());
            let reads = Class::READING;
            assert_eq!(
                passes(class, CellState::Fenced),
                reads.contains(&class),
                "{}",
                class.name()
            );
            for state in [CellState::Passive, CellState::Promoting, CellState::Recovering] {
                assert_eq!(passes(class, state), class == Class::Rollback, "{}", class.name());
            }
        }
    }

    #[test]
    fn one_command_that_does_not_pass_is_enough() {
        let commands = [("SELECT", Class::Read), ("DELETE", Class::Write)];
        let policy = Policy::default();
        let mut counted = Vec::new();
        let count = |rule, disposition| counted.push((rule, disposition));
        let refusal = policy.judge(commands, &asked(CellState::Fenced), count).unwrap_err();
        assert_eq!((refusal.command, policy.name_of(refusal.rule)), ("DELETE", DEFAULT_RULE));
        assert_eq!(counted, [(1, Disposition::Accept), (3, Disposition::Refuse)]);
        assert_eq!(policy.judge(commands, &asked(CellState::Active), |_, _| ()), Ok(()));
        let one = commands.into_iter().take(1);
        assert_eq!(policy.judge(one, &asked(CellState::Fenced), |_, _| ()), Ok(()));
    }

    #[test]
    fn a_commit_needs_the_grant_under_which_its_transaction_wrote() {
        let policy = Policy::default();
        let commit = |state, wrote_in, lease| {
            let transaction = Transaction { wrote_in, lease };
            policy.rule(Class::Commit, &Asked { transaction, ..asked(state) }).1
        };
        let (one, two) = (Some(Epoch(1)), Some(Epoch(2)));
        for state in [CellState::Active, CellState::Draining, CellState::Fenced] {
            assert_eq!(commit(state, None, None), Disposition::Accept);
            assert_eq!(commit(state, one, one), Disposition::Accept);
            assert_eq!(commit(state, one, two), Disposition::Refuse);
            assert_eq!(commit(state, one, None), Disposition::Refuse);
        }
    }

    #[test]
    fn what_nothing_is_known_of_passes_where_everything_does() {
        let rule = |class: Class, disposition| Rule {
            name: class.name().into(),
            states: Vec::new(),
            classes: [class].into(),
            roles: vec!["app".into()],
            databases: Vec::new(),
            disposition,
        };
        let mut policy = Policy::default();
        let unknown = |policy: &Policy, role| {
            policy.rule(Class::Unknown, &Asked { role, ..asked(CellState::Active) }).1
        };
        policy.rules.insert(0, rule(Class::Write, Disposition::Hold));
        assert_eq!(unknown(&policy, "app"), Disposition::Hold);
        policy.rules.insert(1, rule(Class::Definition, Disposition::Refuse));
        assert_eq!(unknown(&policy, "app"), Disposition::Refuse);
        assert_eq!(unknown(&policy, "another"), Disposition::Accept);
        // Somebody has said so.
        policy.rules.insert(2, rule(Class::Unknown, Disposition::Accept));
        assert_eq!(unknown(&policy, "app"), Disposition::Accept);
    }

    #[test]
    fn the_first_rule_counts_and_is_about_whom_it_names() {
        let mut policy = Policy::default();
        policy.rules.insert(
            0,
            Rule {
                name: "monitoring".into(),
                states: vec![CellState::Passive],
                classes: [Class::Read].into(),
                roles: vec!["monitor".into()],
                databases: Vec::new(),
                disposition: Disposition::Accept,
            },
        );
        let by = |role| {
            let (rule, disposition) =
                policy.rule(Class::Read, &Asked { role, ..asked(CellState::Passive) });
            (policy.name_of(rule), disposition)
        };
        assert_eq!(by("monitor"), ("monitoring", Disposition::Accept));
        assert_eq!(by("app"), (DEFAULT_RULE, Disposition::Refuse));
    }

    #[test]
    fn nothing_is_judged_where_everything_is_accepted() {
        let mut policy = Policy::default();
        assert!(policy.accepts_all(CellState::Active));
        assert!(!policy.accepts_all(CellState::Fenced));
        let mut rule = policy.rules[0].clone();
        rule.disposition = Disposition::Refuse;
        rule.classes = [Class::Definition].into();
        policy.rules.insert(0, rule);
        assert!(!policy.accepts_all(CellState::Active));
    }
}
