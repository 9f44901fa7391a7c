//! `[app.policy]`: the rules by which commands are judged.

use std::collections::BTreeSet;

use model::cell::CellState;
use model::policy::{Class, Disposition, Policy, Rule};
use proxy::config::PolicyConfig;

use super::reader::{Mistakes, Table};

/// Rules that one application may have.
const RULES_MAX: usize = 1_000;

/// Reads the rules; they stand before the built-in ones, which nobody can take away.
pub(super) fn read(app: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> PolicyConfig {
    let default = PolicyConfig::default();
    let Some(mut table) = app.table(mistakes, "policy") else { return default };
    let version = table.number(mistakes, "version", 1..u64::MAX).unwrap_or(default.policy.version);
    let shadow = table.flag(mistakes, "shadow").unwrap_or(default.shadow);
    let hold_max = table.duration(mistakes, "hold_max").unwrap_or(default.hold_max);
    let reading = table.texts(mistakes, "reading").unwrap_or_default();
    let mut rules = Vec::new();
    for mut rule in table.tables(mistakes, "rule") {
        let span = rule.span();
        let read = read_rule(&mut rule, mistakes);
        rule.end(mistakes);
        if rules.iter().chain(&default.policy.rules).any(|one: &Rule| one.name == read.name)
            || Policy::BUILT_IN.contains(&read.name.as_str())
        {
            let text = format!("rule `{}` is there twice, or is one that is built in", read.name);
            mistakes.add(span, text);
        }
        rules.push(read);
    }
    if rules.len() > RULES_MAX {
        let text = format!("there are {} rules, at most {RULES_MAX} are read", rules.len());
        mistakes.add(table.span(), text);
    }
    table.end(mistakes);
    rules.extend(default.policy.rules);
    PolicyConfig {
        policy: Policy { version, rules },
        shadow,
        hold_max,
        reading: reading.into_iter().map(|(name, _)| name.to_lowercase()).collect(),
    }
}

fn read_rule(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Rule {
    let name = table.required_text(mistakes, "name");
    let states: Vec<&str> = CellState::ALL.iter().map(|state| state.name()).collect();
    let state = |text: &str| CellState::ALL.into_iter().find(|state| state.name() == text);
    let states = words(table, mistakes, "states", &states, state);
    let classes: Vec<&str> = Class::ALL.iter().map(|class| class.name()).collect();
    let classes: BTreeSet<Class> =
        words(table, mistakes, "classes", &classes, Class::read).into_iter().collect();
    let mut names = |key| {
        let names = table.texts(mistakes, key).unwrap_or_default();
        names.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
    };
    let (roles, databases) = (names("roles"), names("databases"));
    let accepted: Vec<&str> = Disposition::ALL.iter().map(|one| one.name()).collect();
    let has = table.has("disposition");
    let disposition = table.choice(mistakes, "disposition", &accepted, Disposition::read);
    if !has {
        mistakes.add(table.span(), format!("`app.policy.rule.disposition` of `{name}` is missing"));
    }
    let disposition = disposition.unwrap_or(Disposition::Refuse);
    Rule { name, states, classes, roles, databases, disposition }
}

/// A list of words, each of them one of `accepted`.
fn words<T>(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    key: &'static str,
    accepted: &[&str],
    read: impl Fn(&str) -> Option<T>,
) -> Vec<T> {
    let mut found = Vec::new();
    for (text, span) in table.texts(mistakes, key).unwrap_or_default() {
        match read(&text) {
            Some(one) => found.push(one),
            None => {
                let accepted = accepted.join(", ");
                let text = format!("`app.policy.rule.{key}` may hold {accepted}, `{text}` is none");
                mistakes.add(span, text);
            }
        }
    }
    found
}
