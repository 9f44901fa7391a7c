//! `[[app.safety]]`: what must hold for a change of cells.

use std::collections::{BTreeMap, BTreeSet};

use control::config::CellServer;
use model::safety::{Require, Rule};
use model::switchover::Kind;

use super::plans::{ms, read_name, read_states};
use super::reader::{Mistakes, Table};

const KINDS: [(&str, Kind); 5] = [
    ("switchover", Kind::Switchover),
    ("failover", Kind::Failover),
    ("fence", Kind::Fence),
    ("fence_all", Kind::FenceAll),
    ("unfence", Kind::Unfence),
];

pub(super) fn read(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    cells: &BTreeMap<String, CellServer>,
) -> Vec<Rule> {
    let mut rules: Vec<Rule> = Vec::new();
    for mut table in table.tables(mistakes, "safety") {
        let name = read_name(&mut table, mistakes);
        if rules.iter().any(|rule| rule.name == name) {
            mistakes.add(table.span(), format!("safety rule `{name}` is there twice"));
        }
        let mut kinds = BTreeSet::new();
        for (text, span) in table.texts(mistakes, "for").unwrap_or_default() {
            match KINDS.iter().find(|(known, _)| *known == text) {
                Some((_, kind)) => drop(kinds.insert(*kind)),
                None => {
                    let known = KINDS.map(|(known, _)| known).join(", ");
                    mistakes.add(span, format!("`for` must be of {known}, it is `{text}`"));
                }
            }
        }
        if kinds.is_empty() {
            // What is planned can wait; a server that is lost cannot, unless somebody says so.
            kinds = KINDS
                .iter()
                .map(|(_, kind)| *kind)
                .filter(|kind| *kind != Kind::Failover)
                .collect();
        }
        let require = table.table(mistakes, "require");
        if require.is_none() {
            mistakes.add(table.span(), format!("safety rule `{name}` needs `require`"));
        }
        let require = require.and_then(|mut table| {
            let read = read_require(&mut table, mistakes);
            table.end(mistakes);
            read
        });
        if let Some(require) = require {
            for cell in require.cells() {
                if !cells.contains_key(cell) {
                    let known = cells.keys().cloned().collect::<Vec<_>>().join(", ");
                    let text = format!(
                        "safety rule `{name}`: there is no cell `{cell}`; the application's cells are {known}"
                    );
                    mistakes.add(table.span(), text);
                }
            }
            rules.push(Rule { name, kinds, require });
        }
        table.end(mistakes);
    }
    rules
}

fn read_require(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<Require> {
    const ONE_OF: [&str; 5] = ["at_least", "gate", "waited", "all", "any"];
    let found: Vec<&str> = ONE_OF.into_iter().filter(|key| table.has(key)).collect();
    let [one] = found[..] else {
        let text = format!("a requirement must have exactly one of {}", ONE_OF.join(", "));
        mistakes.add(table.span(), text);
        return None;
    };
    match one {
        "at_least" => {
            let count = table.number(mistakes, "at_least", 1..1_000)?;
            let of: BTreeSet<String> = table
                .texts(mistakes, "of")
                .unwrap_or_default()
                .into_iter()
                .map(|(cell, _)| cell)
                .collect();
            let is = read_states(table, mistakes);
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            if of.len() < count {
                let cells = of.len();
                let text = format!("`at_least` is {count}, and `of` names {cells} cells");
                mistakes.add(table.span(), text);
            }
            Some(Require::AtLeast { count, of, is })
        }
        "gate" => Some(Require::Gate(table.text(mistakes, "gate")?)),
        "waited" => Some(Require::Waited(ms(table.duration(mistakes, "waited")?))),
        key => {
            let mut parts = Vec::new();
            for mut table in table.tables(mistakes, if key == "all" { "all" } else { "any" }) {
                parts.extend(read_require(&mut table, mistakes));
                table.end(mistakes);
            }
            Some(if key == "all" { Require::All(parts) } else { Require::Any(parts) })
        }
    }
}
