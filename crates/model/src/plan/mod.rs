//! Plans: steps that change an application and what hangs on it, written down before they are needed.
//!
//! - here: what a plan is.
//! - [`trigger`]: when one begins by itself.
//! - [`alarm`]: what is looked at for that, besides servers.
//! - [`run`]: one execution of a plan, and what is to be done next in it.
//!
//! A plan is copied into each execution of it, so that what runs is what was there when it began.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::cell::{Application, CellState};
use crate::switchover::OnTimeout;

pub mod alarm;
pub mod run;
pub mod trigger;

/// Steps of one plan, those in groups and child plans included.
pub const STEPS_MAX: usize = 200;
/// Between the name of a group or child plan and that of a step in it.
pub const SEPARATOR: char = '/';

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub name: String,
    pub steps: Vec<Step>,
    #[serde(default)]
    pub on_failure: OnFailure,
    /// How long it may take, without what people were waited for. It is compared, and ends nothing.
    #[serde(default)]
    pub objective_ms: Option<u64>,
    #[serde(default)]
    pub triggers: Vec<trigger::Trigger>,
}

/// What becomes of an execution of which a step has failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnFailure {
    /// It stands still until a person says what to do.
    #[default]
    Stop,
    /// What was done is undone.
    Undo,
}

/// Which of two ways a plan goes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Both cells are there: nothing is lost.
    #[default]
    Graceful,
    /// The active cell is lost: another takes its place.
    Ungraceful,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Mode::Graceful => "graceful",
            Mode::Ungraceful => "ungraceful",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// No two of a plan are the same. In a group it begins with the group's.
    pub name: String,
    pub what: What,
    /// All must hold when it begins; otherwise it is skipped.
    #[serde(default)]
    pub only_if: Vec<Condition>,
    /// It is skipped in the other mode.
    #[serde(default)]
    pub mode: Option<Mode>,
    /// How often it is tried, at least once.
    pub tries: u32,
    /// Between two tries.
    pub pause_ms: u64,
    /// Of one try, or of an approval.
    pub timeout_ms: u64,
    #[serde(default)]
    pub undo: Option<Undo>,
    /// Done twice it is as done once, so it is done again if nobody knows whether it was.
    #[serde(default)]
    pub idempotent: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    Do(Action),
    /// A person says that it may go on. `by_other`: not the one who has begun it.
    Approval {
        by_other: bool,
    },
    /// One after the other.
    Sequence(Vec<Step>),
    /// At the same time.
    Parallel(Vec<Step>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Undo {
    Do(Action),
    /// Of a switchover: the cell becomes active that was before. Of a fence: it takes writes again.
    Back,
}

/// What a step does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// A cell becomes the active one: by a switchover, or in the other mode by a failover.
    Activate {
        app: String,
        to: String,
        deadline_ms: u64,
        on_timeout: OnTimeout,
        allow_data_loss: bool,
    },
    /// A cell takes no more writes, or nothing at all.
    Fence {
        app: String,
        cell: String,
        all: bool,
        deadline_ms: u64,
        on_timeout: OnTimeout,
    },
    Unfence {
        app: String,
        cell: String,
    },
    Http(Http),
    /// A program and its arguments; no shell.
    Exec {
        argv: Vec<String>,
    },
    /// One text of SQL, at a cell's server or that of the active one.
    Sql {
        app: String,
        cell: Option<String>,
        database: String,
        text: String,
    },
    /// One command to the runtime API of an HAProxy, at a socket's path or host and port.
    Haproxy {
        address: String,
        command: String,
    },
    Dns(Dns),
    Wait {
        ms: u64,
    },
}

/// The records of a name, of one type, become these (RFC 2136).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// The primary server of the zone, host and port.
    pub server: String,
    pub zone: String,
    pub name: String,
    /// A, AAAA or CNAME.
    pub kind: String,
    pub values: Vec<String>,
    pub ttl_s: u32,
    /// A file with the key as `tsig-keygen` writes it; the key itself is nowhere kept.
    pub key_file: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Http {
    pub method: String,
    pub url: String,
    /// None: what is being done, as JSON.
    pub body: Option<String>,
    /// A file with the bearer token; the token itself is nowhere kept.
    pub token_file: Option<String>,
}

impl Http {
    /// Without what a query may hold that is nobody's business.
    pub fn shown_url(&self) -> String {
        match self.url.split_once('?') {
            Some((url, _)) => format!("{url}?..."),
            None => self.url.clone(),
        }
    }
}

impl Action {
    /// What it does, in words.
    pub fn says(&self) -> String {
        match self {
            Action::Activate { app, to, .. } => format!("`{to}` of `{app}` becomes active"),
            Action::Fence { app, cell, all: false, .. } => format!("`{cell}` of `{app}` is fenced"),
            Action::Fence { app, cell, .. } => format!("`{cell}` of `{app}` becomes passive"),
            Action::Unfence { app, cell } => format!("`{cell}` of `{app}` takes writes again"),
            Action::Http(http) => format!("{} {}", http.method, http.shown_url()),
            Action::Exec { argv } => format!("run {}", argv.join(" ")),
            Action::Sql { app, cell, .. } => match cell {
                Some(cell) => format!("SQL at `{cell}` of `{app}`"),
                None => format!("SQL at the active cell of `{app}`"),
            },
            Action::Haproxy { address, command } => format!("HAProxy at {address}: {command}"),
            Action::Dns(Dns { name, kind, values, .. }) => {
                format!("DNS: {name} {kind} becomes {}", values.join(", "))
            }
            Action::Wait { ms } => format!("wait {ms} ms"),
        }
    }

    /// It is an execution of its own, of which the store knows what became.
    pub fn is_own_execution(&self) -> bool {
        matches!(self, Action::Activate { .. } | Action::Fence { .. } | Action::Unfence { .. })
    }

    /// It leaves nothing behind that could be undone.
    pub fn leaves_nothing(&self) -> bool {
        matches!(self, Action::Wait { .. })
    }

    /// The application whose cells it changes or speaks to.
    pub fn app(&self) -> Option<&str> {
        match self {
            Action::Activate { app, .. }
            | Action::Fence { app, .. }
            | Action::Unfence { app, .. }
            | Action::Sql { app, .. } => Some(app),
            Action::Http(_)
            | Action::Exec { .. }
            | Action::Haproxy { .. }
            | Action::Dns(_)
            | Action::Wait { .. } => None,
        }
    }
}

/// One of these is the state of a cell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    pub app: String,
    pub cell: String,
    pub states: BTreeSet<CellState>,
}

/// Applications as the store has them.
pub type World = BTreeMap<String, Application>;

impl Condition {
    /// # Errors
    /// It does not hold, in words.
    pub fn check(&self, world: &World) -> Result<(), String> {
        let Condition { app, cell, states } = self;
        let found = world.get(app).and_then(|application| application.cells.get(cell));
        match found {
            Some(state) if states.contains(state) => Ok(()),
            Some(state) => Err(format!("`{cell}` of `{app}` is {state}, not {}", one_of(states))),
            None => Err(format!("`{cell}` of `{app}` is not known")),
        }
    }
}

fn one_of(states: &BTreeSet<CellState>) -> String {
    states.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
}

impl Plan {
    /// All steps, each before those in it.
    pub fn all_steps(&self) -> Vec<&Step> {
        let mut all = Vec::new();
        fn add<'a>(steps: &'a [Step], all: &mut Vec<&'a Step>) {
            for step in steps {
                all.push(step);
                add(step.children(), all);
            }
        }
        add(&self.steps, &mut all);
        all
    }

    pub fn step(&self, name: &str) -> Option<&Step> {
        self.all_steps().into_iter().find(|step| step.name == name)
    }
}

impl Step {
    pub fn children(&self) -> &[Step] {
        match &self.what {
            What::Sequence(steps) | What::Parallel(steps) => steps,
            What::Do(_) | What::Approval { .. } => &[],
        }
    }

    /// What it does, in words.
    pub fn says(&self) -> String {
        match &self.what {
            What::Do(action) => action.says(),
            What::Approval { by_other: false } => "a person approves".into(),
            What::Approval { by_other: true } => "another person approves".into(),
            What::Sequence(steps) => format!("{} steps, one after the other", steps.len()),
            What::Parallel(steps) => format!("{} steps at the same time", steps.len()),
        }
    }
}
