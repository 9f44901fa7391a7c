//! What a step of a plan does, outside of the store: each with its deadline, and with an outcome that says what is known.

use std::collections::BTreeSet;
use std::time::Duration;

use model::audit::Asking;
use model::cell::CellState;
use model::persisted::Execution;
use model::plan::alarm::Checked;
use model::plan::run::Outcome;
use model::plan::{Action, Mode};
use model::switchover::{Ending, Kind};
use serde::Serialize;

use crate::control::Control;
use crate::requests::{ControlError, FailoverRequest, FenceRequest, SwitchoverRequest};

mod dns;
mod haproxy;
mod http;
mod program;
mod sql;

pub(crate) use dns::key_of;

/// Characters that are kept of what a program or a server says.
const SAID_LEN_MAX: usize = 500;
/// Largest file with a secret.
const SECRET_LEN_MAX: u64 = 16 * 1024;

/// What is being done, for whoever it is done by.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Doing {
    pub(crate) app: String,
    pub(crate) plan: String,
    pub(crate) execution: u64,
    pub(crate) step: String,
    /// The same, however often it is sent: what is known by it was done already.
    pub(crate) key: String,
    pub(crate) mode: Mode,
    /// It undoes what the step has done.
    pub(crate) is_undo: bool,
    /// The cell that is active now, and the epoch.
    pub(crate) active: Option<String>,
    pub(crate) epoch: u64,
    #[serde(skip)]
    pub(crate) by: String,
    /// Safety rules that are gone on in spite of.
    #[serde(skip)]
    pub(crate) overrides: BTreeSet<String>,
}

pub(crate) async fn perform(
    control: &Control,
    doing: &Doing,
    action: &Action,
    limit: Duration,
) -> Outcome {
    match action {
        Action::Activate { .. } | Action::Fence { .. } | Action::Unfence { .. } => {
            execute(control, doing, action).await
        }
        Action::Http(http) => http::call(doing, http, limit).await,
        Action::Exec { argv } => program::run(doing, argv, limit).await,
        Action::Sql { app, cell, database, text } => {
            sql::ask(control, (app, cell.as_deref()), database, text, limit).await
        }
        Action::Haproxy { address, command } => haproxy::tell(address, command, limit).await,
        Action::Dns(update) => dns::update(update, limit).await,
        Action::Wait { .. } => Outcome::NotDone("the plan itself waits".into()),
    }
}

/// Asks what an alarm asks. Gives what was said, for people.
pub(crate) async fn check(
    control: &Control,
    doing: &Doing,
    action: &Action,
    limit: Duration,
) -> (Checked, String) {
    if let Action::Http(http) = action {
        return http::check(doing, http, limit).await;
    }
    match (perform(control, doing, action, limit).await, action) {
        // What a boolean is to PostgreSQL's clients.
        (Outcome::Done(text), Action::Sql { .. }) => match text.as_str() {
            "t" => (Checked::Good, text),
            "f" => (Checked::Bad, text),
            _ => (Checked::Unanswered, format!("it says `{text}`, not true or false")),
        },
        (Outcome::Done(text) | Outcome::Already(text), _) => (Checked::Good, text),
        (Outcome::Failed(text), Action::Exec { .. }) => (Checked::Bad, text),
        (Outcome::Failed(text) | Outcome::NotDone(text) | Outcome::Unknown(text), _) => {
            (Checked::Unanswered, text)
        }
    }
}

/// An execution of its own, found again by its key.
async fn execute(control: &Control, doing: &Doing, action: &Action) -> Outcome {
    let reason = format!("step `{}` of execution {}", doing.step, doing.execution);
    let (by, key) = (doing.by.clone(), Some(doing.key.clone()));
    let overrides = doing.overrides.clone();
    let asking = Asking { by, reason: Some(reason), key: key.clone(), if_epoch: None, overrides };
    let key = key.as_deref();
    // Asked again after a crash, it is told what became of it, whatever state its cells are in by now.
    let done = match action {
        Action::Activate { app, to, deadline_ms, on_timeout, allow_data_loss } => {
            match doing.mode {
                Mode::Graceful => {
                    let (to, deadline_ms, on_timeout) = (to.clone(), *deadline_ms, *on_timeout);
                    let is_same = |one: &Execution| {
                        one.kind == Kind::Switchover && control.is_meant(app, &one.to, &to)
                    };
                    let request = SwitchoverRequest {
                        to: to.clone(),
                        dry_run: false,
                        deadline_ms,
                        on_timeout,
                    };
                    let act = control.switchover(app, request, asking);
                    control.once(app, key, is_same, act).await
                }
                Mode::Ungraceful => {
                    let (to, allow_data_loss) = (to.clone(), *allow_data_loss);
                    let is_same = |one: &Execution| {
                        one.kind == Kind::Failover && control.is_meant(app, &one.to, &to)
                    };
                    let request =
                        FailoverRequest { to: to.clone(), allow_data_loss, dry_run: false };
                    let act = control.fail_over(app, request, false, asking);
                    control.once(app, key, is_same, act).await
                }
            }
        }
        Action::Fence { app, cell, all, deadline_ms, on_timeout } => {
            let (all, deadline_ms, on_timeout) = (*all, *deadline_ms, *on_timeout);
            let kind = if all { Kind::FenceAll } else { Kind::Fence };
            let is_same = |one: &Execution| (one.kind, &one.to) == (kind, cell);
            let request = FenceRequest { all, deadline_ms, on_timeout };
            control.once(app, key, is_same, control.fence(app, cell, request, asking)).await
        }
        Action::Unfence { app, cell } => {
            let is_same = |one: &Execution| (one.kind, &one.to) == (Kind::Unfence, cell);
            control.once(app, key, is_same, control.unfence(app, cell, asking)).await
        }
        Action::Http(_)
        | Action::Exec { .. }
        | Action::Sql { .. }
        | Action::Haproxy { .. }
        | Action::Dns(_)
        | Action::Wait { .. } => {
            return Outcome::NotDone("it is no execution of its own".into());
        }
    };
    outcome_of(action, done)
}

fn outcome_of(action: &Action, done: Result<Execution, ControlError>) -> Outcome {
    match done {
        Ok(execution) => {
            let why = execution.reason.clone().map_or(String::new(), |why| format!(": {why}"));
            let ending = execution.ending.map_or("under way", Ending::name);
            let text = format!("{}: {ending}{why}", execution.says());
            match execution.ending {
                Some(Ending::Completed | Ending::CompletedWithoutRejoin) => Outcome::Done(text),
                Some(Ending::Aborted) => Outcome::NotDone(text),
                Some(Ending::Stuck) | None => Outcome::Unknown(text),
            }
        }
        // It is what it was to become.
        Err(error @ ControlError::AlreadyActive { .. }) => Outcome::Already(error.to_string()),
        Err(error @ ControlError::NotActive { state, .. })
            if matches!(
                (action, state),
                (Action::Fence { all: false, .. }, CellState::Fenced)
                    | (Action::Fence { all: true, .. }, CellState::Passive)
            ) =>
        {
            Outcome::Already(error.to_string())
        }
        Err(error @ ControlError::NotFenced { state: CellState::Active, .. }) => {
            Outcome::Already(error.to_string())
        }
        Err(error @ (ControlError::Record(_) | ControlError::OtherRequest { .. })) => {
            Outcome::Unknown(model::chain(&error))
        }
        Err(error) => Outcome::NotDone(model::chain(&error)),
    }
}

fn said(text: &str) -> String {
    // It is shown on terminals, in tables.
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let text = text.trim();
    match text.char_indices().nth(SAID_LEN_MAX) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}

/// What a file with a secret holds.
///
/// # Errors
/// It cannot be read.
pub(crate) fn secret_of(path: &str) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("`{path}`: {error}");
    let len = std::fs::metadata(path).map_err(failed)?.len();
    if len > SECRET_LEN_MAX {
        return Err(format!("`{path}` has {len} bytes, at most {SECRET_LEN_MAX}"));
    }
    let text = std::fs::read_to_string(path).map_err(failed)?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
fn doing() -> Doing {
    Doing {
        app: "shop".into(),
        plan: "p".into(),
        execution: 7,
        step: "s".into(),
        key: "k".into(),
        mode: Mode::Graceful,
        is_undo: false,
        active: Some("a".into()),
        epoch: 3,
        by: "alice".into(),
        overrides: BTreeSet::new(),
    }
}
