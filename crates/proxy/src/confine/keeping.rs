//! What names stand for, while commands are judged and somebody may define others: looked at every second.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::session::landscape;
use pg::admin::{Admin, AdminLogin};
use tokio::time::timeout;

use crate::app::{App, Cell};

const PAUSE: Duration = Duration::from_secs(1);
/// Asking is this part of the time at most.
const ASKING_PART: u32 = 10;

/// After a database could not be asked, as one that was dropped.
const FAILED_PAUSE: Duration = Duration::from_secs(30);

/// What is known of a database. No connection to it is kept: it may be dropped.
#[derive(Default)]
struct Kept {
    /// What was learned was so when this was said.
    mark: Option<String>,
    failed: Option<Instant>,
}

/// Runs until the task is dropped.
pub(crate) async fn watch(app: Arc<App>) {
    let mut kept: BTreeMap<String, Kept> = BTreeMap::new();
    let mut of: Option<(u64, String)> = None;
    let mut took = Duration::ZERO;
    loop {
        tokio::time::sleep(PAUSE.max(took * ASKING_PART)).await;
        let began = Instant::now();
        let regime = app.regime(None).filter(|regime| regime.state.takes_writes());
        let Some((regime, cell)) = regime.zip(app.active()) else {
            (kept, of) = Default::default();
            continue;
        };
        let now = Some((regime.number, cell.name.clone()));
        if of != now {
            // What was learned since may be older than the next mark.
            (kept, of) = (BTreeMap::new(), now);
        }
        kept.retain(|database, _| regime.catalogs.contains_key(database));
        for database in regime.catalogs.keys() {
            let known = kept.entry(database.clone()).or_default();
            if known.failed.is_some_and(|at| at.elapsed() < FAILED_PAUSE) {
                continue;
            }
            let mark = timeout(app.moves.answer_timeout, mark(&app, &cell, database)).await;
            known.failed = None;
            let Ok(Ok(mark)) = mark else {
                // It goes by what was learned before.
                known.failed = Some(Instant::now());
                continue;
            };
            if known.mark.as_ref() != Some(&mark)
                && app.learn_catalog_anew(&regime, &cell, database).await
            {
                known.mark = Some(mark);
            }
        }
        took = began.elapsed();
    }
}

/// Changes with whatever is defined in a database.
async fn mark(app: &App, cell: &Cell, database: &str) -> Result<String, String> {
    let login = AdminLogin { database: database.to_owned(), ..app.admin.clone() };
    let admin = Admin::connect(&cell.target, &login).await;
    let mut admin = admin.map_err(|error| model::chain(&error))?;
    let rows = admin.rows(landscape::CHANGED_QUESTION).await;
    let rows = rows.map_err(|error| model::chain(&error))?;
    Ok(rows.into_iter().flatten().flatten().next().unwrap_or_default())
}
