//! Applications, their cells, the states of cells, and the epoch.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::durability::Protection;

/// The number of a grant to take writes. It only grows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    pub fn next(self) -> Epoch {
        Epoch(self.0.checked_add(1).expect("2^64 grants are never given"))
    }
}

impl std::fmt::Display for Epoch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// By so much the epoch grows when a store is restored: more switchovers than this since its copy nobody has done.
const RESTORE_JUMP: u64 = 1_000;

/// What a cell may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CellState {
    /// Reads and writes.
    Active,
    /// Still active, taking no new work: running transactions end.
    Draining,
    /// Reads only.
    Fenced,
    /// Fenced, and being made a standby of the active cell.
    Recovering,
    /// Neither reads nor writes; monitoring and replication by rule.
    Passive,
    /// Passive, and being made the primary.
    Promoting,
}

impl CellState {
    pub const ALL: [CellState; 6] = [
        CellState::Active,
        CellState::Draining,
        CellState::Fenced,
        CellState::Recovering,
        CellState::Passive,
        CellState::Promoting,
    ];

    pub fn name(self) -> &'static str {
        match self {
            CellState::Active => "active",
            CellState::Draining => "draining",
            CellState::Fenced => "fenced",
            CellState::Recovering => "recovering",
            CellState::Passive => "passive",
            CellState::Promoting => "promoting",
        }
    }

    /// Whether the cell may take writes in its epoch.
    pub fn takes_writes(self) -> bool {
        matches!(self, CellState::Active | CellState::Draining)
    }

    /// It stays so until somebody wants it otherwise.
    pub fn is_settled(self) -> bool {
        matches!(self, CellState::Active | CellState::Passive)
    }

    /// The only way from one state to another.
    ///
    /// # Errors
    /// There is no such way; above all none from fenced to active.
    pub fn become_state(self, next: CellState) -> Result<CellState, IllegalChange> {
        use CellState::{Active, Draining, Fenced, Passive, Promoting, Recovering};
        match (self, next) {
            (Active, Draining | Fenced)
            // A switchover that is given up before its point of no return.
            | (Draining, Active | Fenced)
            | (Fenced, Recovering)
            | (Recovering, Passive)
            // Its server has gone another way than the active one's.
            | (Passive, Promoting | Recovering)
            | (Promoting, Active | Fenced) => Ok(next),
            (from, to) => Err(IllegalChange { from, to }),
        }
    }
}

impl std::fmt::Display for CellState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a cell that is {from} cannot become {to}")]
pub struct IllegalChange {
    pub from: CellState,
    pub to: CellState,
}

/// An application's cells as the store holds them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Application {
    pub epoch: Epoch,
    pub cells: BTreeMap<String, CellState>,
    /// The cell that was given the last grant. What it holds is the newest, also once it is fenced.
    #[serde(default)]
    pub granted_to: Option<String>,
    /// The execution that is changing it; at most one at a time.
    pub execution: Option<u64>,
    /// The execution of a plan that is under way; at most one at a time.
    #[serde(default)]
    pub plan: Option<u64>,
    /// Gates that somebody has opened.
    #[serde(default)]
    pub gates: BTreeSet<String>,
    /// When cells were changed last, in milliseconds since 1970.
    #[serde(default)]
    pub changed_at_ms: Option<u64>,
    /// Grows with each change: whoever has seen a higher one knows of something that this record does not.
    #[serde(default)]
    pub version: u64,
    /// What is proven of commits in this epoch. None: they may be acknowledged by one server alone.
    #[serde(default)]
    pub protected: Option<Protection>,
    /// The highest timeline that a server has written as the active cell's, as far as is known; 0 if nothing is. No other may
    /// ever have this number.
    #[serde(default)]
    pub timeline: u64,
    /// Executions that have left a cell without its rejoin, by cell.
    #[serde(default)]
    pub lacking: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum CellError {
    #[error("application has no cell `{cell}`; its cells are {known}")]
    Unknown { cell: String, known: String },
    #[error(transparent)]
    Illegal(#[from] IllegalChange),
    #[error("cell `{active}` takes writes in epoch {epoch}, so `{cell}` cannot become {to}")]
    TwoActive { active: String, cell: String, to: CellState, epoch: Epoch },
}

impl Application {
    /// A new application: one active cell, the others passive, the first epoch.
    pub fn new(active: &str, cells: impl IntoIterator<Item = String>) -> Application {
        let state =
            |name: &str| if name == active { CellState::Active } else { CellState::Passive };
        let cells = cells.into_iter().map(|name| (name.clone(), state(&name))).collect();
        let granted_to = Some(active.to_owned());
        Application {
            epoch: Epoch(1),
            cells,
            granted_to,
            execution: None,
            plan: None,
            gates: BTreeSet::new(),
            changed_at_ms: None,
            version: 1,
            protected: None,
            timeline: 0,
            lacking: BTreeMap::new(),
        }
    }

    /// Cells that were configured since it was new; they have to become standbys. Whether there were any.
    pub fn adopt<'a>(&mut self, cells: impl IntoIterator<Item = &'a String>) -> bool {
        let before = self.cells.len();
        for cell in cells {
            self.cells.entry(cell.clone()).or_insert(CellState::Passive);
        }
        self.cells.len() > before
    }

    /// An application whose record is old: what has happened since is not known, so nobody holds the grant, and the next
    /// is of an epoch that nobody can have seen. A person says which cell goes on.
    pub fn restored(mut self) -> Application {
        self.epoch = Epoch(self.epoch.0.saturating_add(RESTORE_JUMP));
        self.version = self.version.saturating_add(RESTORE_JUMP * RESTORE_JUMP);
        self.cells.values_mut().for_each(|state| *state = CellState::Passive);
        (self.granted_to, self.execution, self.protected) = (None, None, None);
        // Who has closed one since the copy, nobody knows.
        self.gates.clear();
        self
    }

    /// The cell that clients are attached to, and its state: the one that takes writes, or was the last that did.
    pub fn served(&self) -> Option<(&str, CellState)> {
        let name = self.active().or(self.granted_to.as_deref())?;
        self.cells.get(name).map(|state| (name, *state))
    }

    /// The cell that takes writes, if one does.
    pub fn active(&self) -> Option<&str> {
        self.cells.iter().find(|(_, state)| state.takes_writes()).map(|(name, _)| name.as_str())
    }

    /// # Errors
    /// There is no such cell.
    pub fn state(&self, cell: &str) -> Result<CellState, CellError> {
        self.cells.get(cell).copied().ok_or_else(|| {
            let known: Vec<&str> = self.cells.keys().map(String::as_str).collect();
            CellError::Unknown { cell: cell.into(), known: known.join(", ") }
        })
    }

    /// Changes one cell's state. A new grant to take writes begins a new epoch.
    ///
    /// # Errors
    /// The change is illegal, or another cell takes writes.
    pub fn change(&mut self, cell: &str, to: CellState) -> Result<(), CellError> {
        let from = self.state(cell)?;
        let next = from.become_state(to)?;
        // From `promoting` on a cell holds the grant, so no other may hold it from then on.
        let grants = |state: CellState| state.takes_writes() || state == CellState::Promoting;
        let other = self.cells.iter().find(|(name, state)| *name != cell && grants(**state));
        if let (true, Some((active, _))) = (grants(next), other) {
            let (active, cell) = (active.clone(), cell.to_owned());
            return Err(CellError::TwoActive { active, cell, to, epoch: self.epoch });
        }
        if grants(next) && !grants(from) {
            self.epoch = self.epoch.next();
            self.granted_to = Some(cell.into());
            self.protected = None;
        }
        self.cells.insert(cell.into(), next);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A new state or a new way between states shows here as a changed table.
    #[test]
    fn the_ways_between_states_are_these() {
        let mut table = String::new();
        for from in CellState::ALL {
            for to in CellState::ALL {
                table.push(if from.become_state(to).is_ok() { 'x' } else { '.' });
            }
            table.push_str(&format!(" {from}\n"));
        }
        assert_eq!(
            table,
            "\
.xx... active
x.x... draining
...x.. fenced
....x. recovering
...x.x passive
x.x... promoting
"
        );
    }

    #[test]
    fn a_switchover_gives_the_next_epoch() {
        let mut app = Application::new("a", ["a".into(), "b".into()]);
        app.change("a", CellState::Draining).unwrap();
        let error = app.change("b", CellState::Promoting).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cell `a` takes writes in epoch 1, so `b` cannot become promoting"
        );
        app.change("a", CellState::Fenced).unwrap();
        app.change("b", CellState::Promoting).unwrap();
        app.change("b", CellState::Active).unwrap();
        assert_eq!((app.epoch, app.active()), (Epoch(2), Some("b")));
        assert_eq!(app.served(), Some(("b", CellState::Active)));
        app.change("b", CellState::Fenced).unwrap();
        assert_eq!((app.active(), app.served()), (None, Some(("b", CellState::Fenced))));
        assert!(app.change("a", CellState::Active).is_err());
    }

    #[test]
    fn a_cell_that_is_configured_later_is_passive() {
        let mut app = Application::new("a", ["a".to_owned(), "b".to_owned()]);
        app.cells.insert("b".into(), CellState::Recovering);
        let cells = ["a", "b", "c"].map(str::to_owned);
        assert!(app.adopt(&cells) && !app.adopt(&cells));
        assert_eq!(app.cells["b"], CellState::Recovering);
        assert_eq!(app.cells["c"], CellState::Passive);
    }

    #[test]
    fn after_a_restore_nobody_holds_the_grant() {
        let mut app = Application::new("a", ["a".into(), "b".into()]);
        app.execution = Some(7);
        app.change("a", CellState::Draining).unwrap();
        let mut app = app.restored();
        assert_eq!((app.served(), app.epoch, app.execution), (None, Epoch(1_001), None));
        assert!(app.cells.values().all(|state| *state == CellState::Passive));
        app.change("b", CellState::Promoting).unwrap();
        assert_eq!(app.epoch, Epoch(1_002));
    }

    proptest! {
        #[test]
        fn at_most_one_cell_takes_writes_and_epochs_only_grow(
            changes in proptest::collection::vec((0usize..3, 0usize..6), 0..200)
        ) {
            let names = ["a", "b", "c"];
            let mut app = Application::new("a", names.map(String::from));
            for (cell, state) in changes {
                let before = app.clone();
                let result = app.change(names[cell], CellState::ALL[state]);
                prop_assert!(app.epoch >= before.epoch);
                prop_assert!(app.cells.values().filter(|state| state.takes_writes()).count() <= 1);
                if result.is_err() {
                    prop_assert_eq!(&app, &before);
                }
                let granted = |app: &Application| app.cells.iter().find(|(_, s)| s.takes_writes()
                    || **s == CellState::Promoting).map(|(n, _)| n.clone());
                if granted(&app).is_some() && granted(&app) != granted(&before) {
                    prop_assert!(app.epoch > before.epoch);
                }
            }
        }
    }
}
