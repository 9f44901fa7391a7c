//! Runs a statement at a cell's server.

use std::time::Duration;

use model::plan::run::Outcome;
use pg::admin::{Admin, AdminLogin};
use pg::connection::QueryError;
use tokio::time::timeout;

use super::said;
use crate::control::Control;

pub(super) async fn ask(
    control: &Control,
    (app, cell): (&str, Option<&str>),
    database: &str,
    text: &str,
    limit: Duration,
) -> Outcome {
    let cell = match (cell, control.application(app)) {
        (Some(cell), _) => cell.to_owned(),
        (None, Ok(application)) => match application.active() {
            Some(active) => active.to_owned(),
            None => return Outcome::NotDone(format!("application `{app}` has no active cell")),
        },
        (None, Err(error)) => return Outcome::NotDone(model::chain(&error)),
    };
    let server = control.servers(app).ok().and_then(|servers| servers.cells.get(&cell));
    let Some(server) = server else {
        return Outcome::NotDone(format!("cell `{cell}` of `{app}` is not configured"));
    };
    let login = AdminLogin { database: database.to_owned(), ..server.admin.clone() };
    let connect = timeout(limit, Admin::connect(&server.target, &login));
    let mut admin = match connect.await {
        Ok(Ok(admin)) => admin,
        Ok(Err(error)) => return Outcome::NotDone(model::chain(&error)),
        Err(_) => return Outcome::NotDone(format!("`{cell}` takes no login within {limit:?}")),
    };
    admin.wait = limit;
    let limit_it = format!("SET statement_timeout = {}", limit.as_millis());
    if let Err(error) = admin.rows(&limit_it).await {
        return Outcome::NotDone(model::chain(&error));
    }
    match admin.rows(text).await {
        Ok(rows) => {
            let first = rows.first().map(|row| {
                let values = row.iter().map(|value| value.as_deref().unwrap_or("NULL"));
                values.collect::<Vec<_>>().join(" | ")
            });
            Outcome::Done(said(&first.unwrap_or_default()))
        }
        // It may have committed before.
        Err(error @ QueryError::Server { .. }) => Outcome::Failed(model::chain(&error)),
        Err(error) => Outcome::Unknown(model::chain(&error)),
    }
}
