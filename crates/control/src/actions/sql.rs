//! Runs a statement at a cell's server, as a client would: where it takes no writes, neither does this write.

use std::time::Duration;

use model::cell::{CellState, Epoch};
use model::plan::run::Outcome;
use pg::admin::AdminLogin;
use pg::connection::QueryError;
use tokio::time::timeout;

use super::said;
use crate::control::Control;

/// After the server's own limit.
const LATE: Duration = Duration::from_secs(1);

pub(super) async fn ask(
    control: &Control,
    (app, cell): (&str, Option<&str>),
    database: &str,
    text: &str,
    limit: Duration,
) -> Outcome {
    let (cell, before) = match place(control, app, cell) {
        Ok(place) => place,
        Err(why) => return Outcome::NotDone(why),
    };
    let server = control.servers(app).ok().and_then(|servers| servers.cells.get(&cell));
    let Some(server) = server else {
        return Outcome::NotDone(format!("cell `{cell}` of `{app}` is not configured"));
    };
    let login = AdminLogin { database: database.to_owned(), ..server.admin.clone() };
    let login = login.login_as_client(limit);
    let mut connection = match timeout(limit, server.target.login(&login)).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => return Outcome::NotDone(model::chain(&error)),
        Err(_) => return Outcome::NotDone(format!("`{cell}` takes no login within {limit:?}")),
    };
    let done = match timeout(limit + LATE, connection.rows(text)).await {
        Ok(done) => done,
        Err(_) => return Outcome::Unknown(format!("`{cell}` has not answered within {limit:?}")),
    };
    let rows = match done {
        Ok(rows) => rows,
        Err(error) => return failed(&error),
    };
    let first = rows.first().map(|row| {
        let values = row.iter().map(|value| value.as_deref().unwrap_or("NULL"));
        values.collect::<Vec<_>>().join(" | ")
    });
    let text = said(&first.unwrap_or_default());
    // What was written there while another took its place may not be anywhere.
    match place(control, app, Some(&cell)) {
        Ok((_, after)) if after == before => Outcome::Done(text),
        _ => Outcome::Unknown(format!(
            "`{app}` was changed meanwhile: look whether it is there ({text})"
        )),
    }
}

/// A cell, and what is known of it. Without a name, the active one.
fn place(
    control: &Control,
    app: &str,
    cell: Option<&str>,
) -> Result<(String, (Epoch, Option<CellState>)), String> {
    let application = control.application(app).map_err(|error| model::chain(&error))?;
    let cell = match (cell, application.active()) {
        (Some(cell), _) => cell.to_owned(),
        (None, Some(active)) => active.to_owned(),
        (None, None) => return Err(format!("application `{app}` has no active cell")),
    };
    let state = application.cells.get(&cell).copied();
    Ok((cell, (application.epoch, state)))
}

fn failed(error: &QueryError) -> Outcome {
    let text = model::chain(error);
    let state = error.sqlstate().map(|state| state.to_string()).unwrap_or_default();
    // The server was going, or lost the connection: as without an answer (PostgreSQL manual, appendix A).
    let is_lost = state.starts_with("57P") || state.starts_with("08") || state == "40003";
    match error {
        QueryError::Server { .. } if !is_lost => Outcome::Failed(text),
        _ => Outcome::Unknown(text),
    }
}
