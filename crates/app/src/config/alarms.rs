//! `[[app.alarm]]`: what is looked at again and again, so that a plan may begin by it.

use std::collections::BTreeMap;
use std::time::Duration;

use control::config::CellServer;
use model::plan::Action;
use model::plan::alarm::{ALARMS_MAX, Alarm};

use super::plans::{ms, read_action, read_name};
use super::reader::{Mistakes, Table};

const KINDS: [&str; 3] = ["http", "exec", "sql"];
const EVERY: Duration = Duration::from_secs(10);
const EVERY_MIN: Duration = Duration::from_millis(100);
const TIMEOUT: Duration = Duration::from_secs(5);
const RED_AFTER: u64 = 3;
const GREEN_AFTER: u64 = 2;

pub(super) fn read(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    app: &str,
    cells: &BTreeMap<String, CellServer>,
) -> BTreeMap<String, Alarm> {
    let mut alarms = BTreeMap::new();
    for mut table in table.tables(mistakes, "alarm") {
        let (span, name) = (table.span(), read_name(&mut table, mistakes));
        let alarm = read_one(&mut table, mistakes, app, &name);
        table.end(mistakes);
        let Some(alarm) = alarm else { continue };
        if let Action::Sql { app: asked, cell, .. } = &alarm.check {
            if asked != app {
                let text = format!("alarm `{name}` of `{app}` cannot ask a server of `{asked}`");
                mistakes.add(span.clone(), text);
            } else if let Some(cell) = cell.as_ref().filter(|cell| !cells.contains_key(*cell)) {
                let text = format!("alarm `{name}` names a cell `{cell}` that is not there");
                mistakes.add(span.clone(), text);
            }
        }
        if alarms.insert(name.clone(), alarm).is_some() {
            mistakes.add(span.clone(), format!("alarm `{name}` is there twice"));
        }
        if alarms.len() > ALARMS_MAX {
            let text = format!("application `{app}` has more than {ALARMS_MAX} alarms");
            mistakes.add(span, text);
            break;
        }
    }
    alarms
}

fn read_one(
    table: &mut Table<'_>,
    mistakes: &mut Mistakes<'_>,
    app: &str,
    name: &str,
) -> Option<Alarm> {
    let span = table.span_of("every");
    let every = table.duration(mistakes, "every").unwrap_or(EVERY);
    if every < EVERY_MIN {
        mistakes.add(span, format!("`every` is at least {EVERY_MIN:?}, it is {every:?}"));
    }
    let timeout = table.duration(mistakes, "timeout").unwrap_or(TIMEOUT);
    let mut count = |key, default| {
        let count = table.number(mistakes, key, 1..1_001).unwrap_or(default);
        u32::try_from(count).unwrap_or(u32::MAX)
    };
    let (red_after, green_after) =
        (count("red_after", RED_AFTER), count("green_after", GREEN_AFTER));
    let words = ["unknown", "red"];
    let unanswered = table.choice(mistakes, "unanswered", &words, |text| {
        words.contains(&text).then(|| text == "red")
    });
    let kinds: Vec<&str> = KINDS.into_iter().filter(|kind| table.has(kind)).collect();
    let [kind] = kinds[..] else {
        let (known, found) = (KINDS.join(", "), kinds.join(", "));
        let found = if found.is_empty() { "none" } else { &found };
        let text = format!("alarm `{name}` asks one of {known}; found {found}");
        mistakes.add(table.span(), text);
        return None;
    };
    Some(Alarm {
        name: name.to_owned(),
        check: read_action(table, mistakes, app, kind, "GET")?,
        every_ms: ms(every),
        timeout_ms: ms(timeout),
        red_after,
        green_after,
        is_red_unanswered: unanswered.unwrap_or(false),
    })
}
