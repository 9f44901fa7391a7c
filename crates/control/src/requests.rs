//! What control is asked for, and what it answers.

use model::barrier::Blocker;
use model::cell::{CellState, Epoch};
use model::switchover::{Ending, OnTimeout};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::records::RecordError;

/// What a switchover is asked to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchoverRequest {
    pub to: String,
    #[serde(default)]
    pub dry_run: bool,
    /// How long running transactions may take to end.
    #[serde(default = "default_deadline_ms")]
    pub deadline_ms: u64,
    #[serde(default)]
    pub on_timeout: OnTimeout,
}

fn default_deadline_ms() -> u64 {
    30_000
}

/// What a cell is to be fenced from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceRequest {
    /// From reads as well.
    #[serde(default)]
    pub all: bool,
    /// How long running transactions may take to end.
    #[serde(default = "default_deadline_ms")]
    pub deadline_ms: u64,
    #[serde(default)]
    pub on_timeout: OnTimeout,
}

/// Which cell is to take the place of one whose server is lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailoverRequest {
    pub to: String,
    /// What the lost server alone has may be given up; and where Holdfast cannot see it, it is dead: you say so.
    #[serde(default)]
    pub allow_data_loss: bool,
    #[serde(default)]
    pub dry_run: bool,
}

/// Which sessions are to be moved, and where to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveRequest {
    /// All of the application, if none is named.
    #[serde(default)]
    pub session: Option<u64>,
    /// A cell whose server may serve them, as the one where they stand.
    pub to: String,
    /// How long running transactions may take to end.
    #[serde(default = "default_deadline_ms")]
    pub deadline_ms: u64,
}

/// The cell that clients are attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    pub cell: String,
    pub state: CellState,
    pub epoch: Epoch,
}

/// What a dry run found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DryRun {
    pub app: String,
    pub from: String,
    pub to: String,
    pub steps: Vec<String>,
    pub sessions: u64,
    pub movable: u64,
    pub blockers: Vec<Blocker>,
    /// Why it would be refused; empty if it would go.
    pub refusals: Vec<String>,
    /// Settings that the two servers' own files give otherwise; sessions keep what they have.
    pub configured_otherwise: Vec<String>,
}

/// A safety rule is in the way.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("safety rule `{rule}`: {why}; `--override {rule} --reason TEXT` goes on in spite of it")]
pub struct Unsafe {
    pub rule: String,
    pub why: String,
}

#[derive(Debug, Error)]
pub enum ControlError {
    #[error("there is no application `{app}`; configured are {known}")]
    NoApp { app: String, known: String },
    #[error("application `{app}` has no cell `{cell}`; its cells are {known}")]
    NoCell { app: String, cell: String, known: String },
    #[error("cell `{cell}` is active already, in epoch {epoch}")]
    AlreadyActive { cell: String, epoch: u64 },
    #[error("cell `{cell}` is {state}, only a passive cell can become active")]
    NotPassive { cell: String, state: CellState },
    #[error("execution {id} is changing application `{app}`; see `holdfast executions {id}`")]
    UnderWay { app: String, id: u64 },
    #[error(
        "application `{app}` has no active cell, which this takes; see `holdfast status {app}`"
    )]
    NoActive { app: String },
    #[error("cell `{cell}` is {state}, only an active cell can be fenced")]
    NotActive { cell: String, state: CellState },
    #[error(
        "cell `{cell}` is {state}, only a cell that was fenced takes writes again by `unfence`"
    )]
    NotFenced { cell: String, state: CellState },
    #[error(
        "cell `{cell}` is {state}, but `{newest}` took writes after it; `holdfast unfence {app} {newest}`"
    )]
    NotNewest { app: String, cell: String, state: CellState, newest: String },
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Unsafe(#[from] Unsafe),
    #[error("application `{app}` has no safety rule `{rule}`; its rules are {known}")]
    NoRule { app: String, rule: String, known: String },
    #[error("application `{app}` has no gate `{gate}`; its rules name {known}")]
    NoGate { app: String, gate: String, known: String },
    #[error("a rule is gone on in spite of only for a `--reason`")]
    NoReason,
    #[error("application `{app}` is in epoch {found}, not {epoch}; see `holdfast status {app}`")]
    OtherEpoch { app: String, epoch: u64, found: u64 },
    #[error("the key `{key}` was used for another request: {says}")]
    OtherRequest { key: String, says: String },
    #[error("no execution {0}")]
    NoExecution(u64),
    #[error(
        "execution {id} has ended: {ending:?}; only one that is stuck or lacks its rejoin can be retried"
    )]
    NotRetryable { id: u64, ending: Option<Ending> },
    #[error("application `{app}` has no plan `{plan}`; its plans are {known}")]
    NoPlan { app: String, plan: String, known: String },
    #[error(
        "execution {id} carries out a plan of application `{app}`; see `holdfast executions {id}`"
    )]
    PlanUnderWay { app: String, id: u64 },
    #[error(transparent)]
    Plan(#[from] model::plan::run::PlanError),
    #[error("cell `{cell}` of application `{app}` has no agent by the configuration")]
    NoAgent { app: String, cell: String },
    #[error(transparent)]
    Record(#[from] RecordError),
}
