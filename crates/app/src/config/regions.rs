//! `region` of a cell, and `depends_on` of an application.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use control::config::{AppServers, CellServer};
use model::dependency::{self, Needs};
use model::region::Region;

use super::reader::{Mistakes, Table};

pub(super) fn read(table: &mut Table<'_>, mistakes: &mut Mistakes<'_>) -> Option<Region> {
    let span = table.span_of("region");
    let text = table.text(mistakes, "region")?;
    Region::read(&text).map_err(|why| mistakes.add(span, why)).ok()
}

/// Whoever names one of them must be understood.
pub(super) fn check_names(
    cells: &BTreeMap<String, CellServer>,
    span: &Range<usize>,
    mistakes: &mut Mistakes<'_>,
) {
    for name in cells.keys() {
        let Ok(as_region) = Region::read(name) else { continue };
        let is_in =
            |server: &CellServer| server.region.as_ref().is_some_and(|at| as_region.holds(at));
        if let Some((other, _)) = cells.iter().find(|(_, server)| is_in(server)) {
            let text = format!("`{name}` is a cell, and a region in which cell `{other}` is");
            mistakes.add(span.clone(), text);
        }
    }
}

/// Applications that one needs, and where that is said.
pub(super) type Needed = Vec<(String, Range<usize>)>;

pub(super) fn check(
    said: &BTreeMap<String, Needed>,
    apps: &BTreeMap<String, AppServers>,
    mistakes: &mut Mistakes<'_>,
) {
    for (needed, span) in said.values().flatten() {
        if !apps.contains_key(needed) {
            let known = apps.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let text =
                format!("`app.depends_on`: there is no application `{needed}`; there are {known}");
            mistakes.add(span.clone(), text);
        }
    }
    if let Err(way) = dependency::groups(&needs(apps)) {
        let of = way.first().and_then(|app| said.get(app)).and_then(|all| all.first());
        let span = of.map_or(0..0, |(_, span)| span.clone());
        let text = format!("`app.depends_on` leads back to itself: `{}`", way.join("` -> `"));
        mistakes.add(span, text);
    }
}

fn needs(apps: &BTreeMap<String, AppServers>) -> Needs {
    let of = |servers: &AppServers| -> BTreeSet<String> {
        servers.depends_on.iter().filter(|needed| apps.contains_key(*needed)).cloned().collect()
    };
    apps.iter().map(|(app, servers)| (app.clone(), of(servers))).collect()
}

/// Applications that have a cell in a region, with those cells; what others need comes first.
pub(super) fn within(
    region: &Region,
    apps: &BTreeMap<String, AppServers>,
) -> Vec<Vec<(String, Vec<String>)>> {
    // Where they lead back to themselves is said elsewhere.
    let groups = dependency::groups(&needs(apps)).unwrap_or_default();
    let cells = |app: String| {
        let servers = apps.get(&app)?;
        let is_in = |cell: &&String| servers.is_within(cell, region);
        let cells: Vec<String> = servers.cells.keys().filter(is_in).cloned().collect();
        (!cells.is_empty()).then_some((app, cells))
    };
    let groups = groups.into_iter().map(|group| group.into_iter().filter_map(cells).collect());
    groups.filter(|group: &Vec<_>| !group.is_empty()).collect()
}
