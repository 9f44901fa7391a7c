//! An application: its cells, which of them is served, and the gate before it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use pg::Target;
use tokio::sync::watch;

use crate::auth::Authenticator;
use crate::carry::Prepared;
use crate::config::AppConfig;

/// Parameter sets that are kept for sharing; sessions with rarer ones have their own.
const PARAM_SETS_MAX: usize = 256;

/// A cell as the proxy sees it: a name and a server.
#[derive(Debug)]
pub struct Cell {
    pub name: String,
    pub target: Target,
}

/// What new logins meet.
#[derive(Debug, Clone)]
pub enum Gate {
    /// Sessions are attached to this cell.
    Open(Arc<Cell>),
    /// Nobody gets in until the switch is over; logins wait.
    Held,
}

/// Reported parameters. Most sessions of an application have the same, and share one set.
pub type Params = Arc<BTreeMap<String, String>>;

#[derive(Debug)]
pub struct App {
    pub name: String,
    pub databases: Vec<String>,
    pub cells: BTreeMap<String, Arc<Cell>>,
    pub auth: Authenticator,
    gate: watch::Sender<Gate>,
    /// Sessions are to be handed out at their next safe point. Set with the gate.
    pub holding: AtomicBool,
    /// Sessions that have passed the gate and not ended, wherever they are.
    pub sessions: AtomicUsize,
    /// Sessions attached beforehand to another cell.
    pub prepared: Mutex<HashMap<u64, Prepared>>,
    params: Mutex<BTreeSet<Params>>,
}

impl App {
    pub fn new(config: AppConfig, active: &str) -> App {
        let cell =
            |(name, target): (String, Target)| (name.clone(), Arc::new(Cell { name, target }));
        let cells: BTreeMap<String, Arc<Cell>> = config.cells.into_iter().map(cell).collect();
        let gate = cells.get(active).map_or(Gate::Held, |cell| Gate::Open(cell.clone()));
        App {
            name: config.name,
            databases: config.databases,
            cells,
            auth: Authenticator::new(config.auth, config.admin),
            gate: watch::Sender::new(gate),
            holding: AtomicBool::new(false),
            sessions: AtomicUsize::new(0),
            prepared: Mutex::default(),
            params: Mutex::default(),
        }
    }

    pub fn serves(&self, database: &str) -> bool {
        self.databases.is_empty() || self.databases.iter().any(|name| name == database)
    }

    /// The cell that is served, if the gate is open.
    pub fn active(&self) -> Option<Arc<Cell>> {
        match &*self.gate.borrow() {
            Gate::Open(cell) => Some(cell.clone()),
            Gate::Held => None,
        }
    }

    /// Waits until the gate is open. The caller has a deadline.
    pub async fn pass_gate(&self) -> Option<Arc<Cell>> {
        let mut gate = self.gate.subscribe();
        let open = gate.wait_for(|gate| matches!(gate, Gate::Open(_))).await.ok()?.clone();
        match open {
            Gate::Open(cell) => Some(cell),
            Gate::Held => None,
        }
    }

    pub fn hold(&self) {
        self.holding.store(true, Ordering::SeqCst);
        self.gate.send_replace(Gate::Held);
    }

    pub fn open(&self, cell: Arc<Cell>) {
        self.holding.store(false, Ordering::SeqCst);
        self.gate.send_replace(Gate::Open(cell));
    }

    /// The shared copy of a set of parameters.
    pub fn share(&self, params: BTreeMap<String, String>) -> Params {
        let params = Arc::new(params);
        let mut sets = self.params.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shared) = sets.get(&params) {
            return shared.clone();
        }
        if sets.len() >= PARAM_SETS_MAX {
            // Those that nobody uses any more make room.
            sets.retain(|set| Arc::strong_count(set) > 1);
        }
        if sets.len() < PARAM_SETS_MAX {
            sets.insert(params.clone());
        }
        params
    }
}
