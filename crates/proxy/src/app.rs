//! An application: its cells, which of them is served, and the gate before it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use model::barrier::Reason;
use model::cell::{CellState, Epoch};
use model::lease::Moment;
use model::policy::{self, Catalog};
use model::session::facts::{self, Facts};
use pg::Target;
use pg::admin::{Admin, AdminLogin};
use pg::clock;
use pg::connect::ConnectError;
use pg::connection::Connection;
use tokio::sync::watch;
use wire::sqlstate::SqlState;

use crate::auth::Authenticator;
use crate::carry::Prepared;
use crate::config::{AppConfig, MoveLimits, PolicyConfig, PoolLimits};
use crate::confine::texts::Texts;
use crate::confine::{Regime, Rules};
use crate::pool::Pools;

/// How often, and how long after each other, it is looked whether a fence is being taken back.
const FENCE_LOOKS: u32 = 40;
const FENCE_PAUSE: Duration = Duration::from_millis(50);
/// How long a database may be missing on a standby to which it comes.
const DATABASE_LATE_MAX: Duration = Duration::from_secs(2);
/// So long other orders wait for what names stand for under new rules.
const LEARN_MAX: Duration = Duration::from_secs(1);
/// Databases of which it is known what their names stand for.
const CATALOGS_MAX: usize = 1_000;
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

/// What is known of a database, or why it is not.
type Learned = Result<Arc<Facts>, Reason>;

#[derive(Debug)]
pub struct App {
    pub name: String,
    pub databases: Vec<String>,
    pub moves: MoveLimits,
    /// Sessions share servers, within these limits.
    pub pool: Option<PoolLimits>,
    pub pools: Pools,
    /// Bytes that are held of temporary tables and cursors.
    pub temporary: Arc<AtomicU64>,
    pub cells: BTreeMap<String, Arc<Cell>>,
    pub auth: Authenticator,
    /// How Holdfast itself logs in.
    pub admin: AdminLogin,
    /// The rules by which commands are judged.
    rules: Mutex<Arc<Rules>>,
    pub(crate) texts: Texts,
    regime: Mutex<Arc<Regime>>,
    /// The version of the regime, or 0 while there is nothing to judge in the state of the cell.
    judged_by: AtomicU64,
    /// Nothing of a client reaches a server from then on, in nanoseconds since the host was booted.
    passes_until: AtomicU64,
    /// How often its sessions were to be cut from their servers.
    cuts: AtomicU64,
    gate: watch::Sender<Gate>,
    /// Sessions are to be handed out at their next safe point. Set with the gate.
    pub holding: AtomicBool,
    /// The cell whose server is lost: whoever still stands on it is taken from it.
    lost: Mutex<Option<Arc<Cell>>>,
    /// Sessions that have passed the gate and not ended, wherever they are.
    pub sessions: AtomicUsize,
    /// Sessions attached beforehand to another cell.
    prepared: Mutex<HashMap<u64, Prepared>>,
    /// Copies that wait on the servers of sessions.
    stages: Mutex<HashMap<u64, Connection>>,
    /// What was learned of servers and databases since the last preparation, by cell and database.
    facts: Mutex<HashMap<(String, String), Learned>>,
    params: Mutex<BTreeSet<Params>>,
}

impl App {
    pub fn new(config: AppConfig, active: &str) -> App {
        let cell =
            |(name, target): (String, Target)| (name.clone(), Arc::new(Cell { name, target }));
        let cells: BTreeMap<String, Arc<Cell>> = config.cells.into_iter().map(cell).collect();
        let rules = Arc::new(Rules::new(config.policy));
        let gate = cells.get(active).map_or(Gate::Held, |cell| Gate::Open(cell.clone()));
        App {
            name: config.name,
            databases: config.databases,
            moves: config.moves,
            pool: config.pool,
            pools: Pools::default(),
            temporary: Arc::default(),
            cells,
            auth: Authenticator::new(config.auth, config.admin.clone()),
            admin: config.admin,
            rules: Mutex::new(rules.clone()),
            texts: Texts::default(),
            regime: Mutex::new(Arc::new(Regime {
                cell: active.to_owned(),
                rules,
                ..Regime::default()
            })),
            judged_by: AtomicU64::new(0),
            passes_until: AtomicU64::new(u64::MAX),
            cuts: AtomicU64::new(0),
            gate: watch::Sender::new(gate),
            holding: AtomicBool::new(false),
            lost: Mutex::default(),
            sessions: AtomicUsize::new(0),
            prepared: Mutex::default(),
            stages: Mutex::default(),
            facts: Mutex::default(),
            params: Mutex::default(),
        }
    }

    pub(crate) fn set_passes_until(&self, moment: Moment) {
        let until = u64::try_from(moment.0.as_nanos()).unwrap_or(u64::MAX);
        self.passes_until.store(until, Ordering::Release);
    }

    /// It is not proven any more that its sessions stand where they may. Asked at each message, as a process that was stopped
    /// goes on with whatever it was about to do, and only later looks at the time.
    #[inline]
    pub(crate) fn is_unproven(&self) -> bool {
        match self.passes_until.load(Ordering::Acquire) {
            u64::MAX => false,
            until => clock::now().0.as_nanos() >= u128::from(until),
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

    /// The state in which commands are judged, unless everything is accepted. `known` is what it was last.
    #[inline]
    pub(crate) fn regime(&self, known: Option<&Arc<Regime>>) -> Option<Arc<Regime>> {
        // Whoever changes it sees to it that what was passed before does not count any more.
        match (self.judged_by.load(Ordering::Acquire), known) {
            (0, _) => None,
            (version, Some(known)) if known.version == version => Some(known.clone()),
            _ => Some(self.regime_now()),
        }
    }

    #[cold]
    pub(crate) fn regime_now(&self) -> Arc<Regime> {
        self.regime.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The rules by which commands are judged.
    pub(crate) fn rules_now(&self) -> Arc<Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a configuration has other rules.
    pub(crate) fn has_other_rules(&self, config: &PolicyConfig) -> bool {
        self.rules_now().config != *config
    }

    fn set_rules(&self, config: PolicyConfig) {
        let rules = Arc::new(Rules::new(config));
        *self.rules.lock().unwrap_or_else(PoisonError::into_inner) = rules;
    }

    /// Why nobody can log in: the cell neither reads nor writes, and its server admits nobody.
    pub(crate) fn refuses_logins(&self) -> Option<String> {
        let regime = self.regime(None)?;
        let is_closed =
            !matches!(regime.state, CellState::Active | CellState::Draining | CellState::Fenced);
        is_closed
            .then(|| format!("cell `{}` is {} and takes no clients", regime.cell, regime.state))
    }

    /// The cell takes no writes.
    pub(crate) fn is_fenced(&self) -> bool {
        self.regime(None).is_some_and(|regime| !regime.state.takes_writes())
    }

    /// A login of these parameters would write although its cell is fenced. A fence that is being taken back is waited for.
    pub(crate) async fn lifts_fence(&self, params: &Params) -> bool {
        let is_off =
            params.get("default_transaction_read_only").is_some_and(|value| value == "off");
        for _ in 0..FENCE_LOOKS {
            if !is_off || self.regime(None).is_none_or(|regime| regime.state.takes_writes()) {
                return false;
            }
            tokio::time::sleep(FENCE_PAUSE).await;
        }
        true
    }

    /// From here on the cell is in this state, and commands are judged in it. What the names of `databases` stand for is
    /// learned before, where that matters.
    pub(crate) async fn confine(
        &self,
        cell: &Cell,
        state: CellState,
        epoch: Epoch,
        databases: &BTreeSet<String>,
    ) {
        let rules = self.rules_now();
        let is_confined = !rules.config.policy.accepts_all(state);
        let mut catalogs = BTreeMap::new();
        if is_confined {
            // Clients are held meanwhile. Of what is not learned in time nothing is known.
            let deadline = Instant::now() + self.moves.answer_timeout;
            for database in databases {
                if Instant::now() > deadline {
                    tracing::warn!(app = self.name, database, "functions are not learned in time");
                    continue;
                }
                if let Some(catalog) = self.catalog(cell, database).await {
                    catalogs.insert(database.clone(), Arc::new(catalog));
                }
            }
        }
        let mut regime = self.regime.lock().unwrap_or_else(PoisonError::into_inner);
        let cell = cell.name.clone();
        let before = &**regime;
        let (number, version) = (before.number + 1, before.version + 1);
        let keys = Default::default();
        *regime = Arc::new(Regime { number, version, cell, state, epoch, rules, catalogs, keys });
        self.judged_by.store(if is_confined { version } else { 0 }, Ordering::Release);
    }

    /// From here on commands are judged by these rules, in the state that the cell is in. Gives the databases of which is not
    /// known what names stand for.
    pub(crate) async fn take_up(
        &self,
        config: PolicyConfig,
        databases: &BTreeSet<String>,
    ) -> BTreeSet<String> {
        let before = self.regime(None).filter(|now| now.rules.config.reading == config.reading);
        self.set_rules(config);
        let rules = self.rules_now();
        let judges = |state| !rules.config.policy.accepts_all(state);
        // What was learned before may be old, and is better than nothing if it was judged by all the time.
        let mut catalogs = before.map(|before| before.catalogs.clone()).unwrap_or_default();
        let mut missing = BTreeSet::new();
        if let Some(cell) = self.active().filter(|_| judges(self.regime_now().state)) {
            // Other orders wait.
            let deadline = Instant::now() + LEARN_MAX;
            for database in databases {
                let left = deadline.saturating_duration_since(Instant::now());
                match tokio::time::timeout(left, self.catalog(&cell, database)).await {
                    Ok(Some(catalog)) => {
                        catalogs.insert(database.clone(), Arc::new(catalog));
                    }
                    _ if catalogs.contains_key(database) => (),
                    _ => drop(missing.insert(database.clone())),
                }
            }
        }
        let mut regime = self.regime.lock().unwrap_or_else(PoisonError::into_inner);
        let Regime { number, version, state, epoch, .. } = **regime;
        let (number, version) = (number + 1, version + 1);
        let (cell, keys) = (regime.cell.clone(), Default::default());
        let is_confined = judges(state);
        *regime = Arc::new(Regime { number, version, cell, state, epoch, rules, catalogs, keys });
        self.judged_by.store(if is_confined { version } else { 0 }, Ordering::Release);
        missing
    }

    /// Learns what the names of a database stand for, if commands are judged and nobody has before.
    pub(crate) async fn learn_catalog(&self, cell: &Cell, database: &str) {
        let Some(regime) = self.regime(None) else { return };
        if regime.catalogs.contains_key(database) || regime.catalogs.len() >= CATALOGS_MAX {
            return;
        }
        self.learn_catalog_anew(&regime, cell, database).await;
    }

    /// Gives whether it was learned, and counts from now on.
    pub(crate) async fn learn_catalog_anew(
        &self,
        regime: &Regime,
        cell: &Cell,
        database: &str,
    ) -> bool {
        let Some(catalog) = self.catalog(cell, database).await else { return false };
        let mut now = self.regime.lock().unwrap_or_else(PoisonError::into_inner);
        // The state may have changed meanwhile.
        let is_same = now.number == regime.number;
        if is_same {
            let mut catalogs = now.catalogs.clone();
            catalogs.insert(database.to_owned(), Arc::new(catalog));
            let Regime { number, state, epoch, .. } = **now;
            let (cell, version) = (now.cell.clone(), now.version + 1);
            let rules = now.rules.clone();
            let keys = Default::default();
            *now = Arc::new(Regime { number, version, cell, state, epoch, rules, catalogs, keys });
            self.judged_by.store(version, Ordering::Release);
        }
        is_same
    }

    async fn catalog(&self, cell: &Cell, database: &str) -> Option<Catalog> {
        let login = AdminLogin { database: database.to_owned(), ..self.admin.clone() };
        let ask = async {
            let mut admin =
                Admin::connect(&cell.target, &login).await.map_err(|error| model::chain(&error))?;
            let rows = admin.rows(policy::QUESTION).await.map_err(|error| model::chain(&error))?;
            let cell = |row: &'_ Vec<Option<String>>, at: usize| row.get(at).cloned().flatten();
            let rows: Option<Vec<(String, String)>> =
                rows.iter().map(|row| cell(row, 0).zip(cell(row, 1))).collect();
            let rows = rows.unwrap_or_default();
            Catalog::read(rows.iter().map(|(kind, name)| (kind.as_str(), name.as_str())))
                .ok_or_else(|| "the catalogs are of another shape".to_owned())
        };
        let wait_max = self.moves.answer_timeout;
        let late = |_| format!("no answer in {wait_max:?}");
        match tokio::time::timeout(wait_max, ask).await.map_err(late).flatten() {
            Ok(mut catalog) => {
                catalog.reading.extend(self.rules_now().config.reading.iter().cloned());
                Some(catalog)
            }
            Err(error) => {
                // Whatever calls something is refused then.
                tracing::warn!(app = self.name, database, error, "functions are not known");
                None
            }
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

    /// Does something at a cell's server. None if the application goes on elsewhere meanwhile: a server that is lost may never
    /// answer.
    pub(crate) async fn while_at<T>(
        &self,
        cell: &Arc<Cell>,
        what: impl Future<Output = T>,
    ) -> Option<T> {
        let mut gate = self.gate.subscribe();
        let is_left = |gate: &Gate| match gate {
            Gate::Open(open) => !Arc::ptr_eq(open, cell),
            Gate::Held => self.is_lost(cell),
        };
        tokio::select! {
            biased;
            done = what => Some(done),
            _ = gate.wait_for(is_left) => None,
        }
    }

    /// The same, of what may be done at a cell that is not served.
    pub(crate) async fn unless_lost<T>(
        &self,
        cell: &Arc<Cell>,
        what: impl Future<Output = T>,
    ) -> Option<T> {
        let mut gate = self.gate.subscribe();
        tokio::select! {
            biased;
            done = what => Some(done),
            _ = gate.wait_for(|_| self.is_lost(cell)) => None,
        }
    }

    pub fn hold(&self) {
        self.holding.store(true, Ordering::SeqCst);
        self.gate.send_replace(Gate::Held);
    }

    /// The served cell's server is lost. Gives the cell, if there is one.
    pub fn lose(&self) -> Option<Arc<Cell>> {
        let cell = self.active();
        if cell.is_some() {
            self.lost.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&cell);
        }
        self.hold();
        self.cuts.fetch_add(1, Ordering::SeqCst);
        cell
    }

    #[inline]
    pub(crate) fn cuts(&self) -> u64 {
        self.cuts.load(Ordering::SeqCst)
    }

    pub fn is_lost(&self, cell: &Arc<Cell>) -> bool {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        lost.as_ref().is_some_and(|lost| Arc::ptr_eq(lost, cell))
    }

    pub fn open(&self, cell: Arc<Cell>) {
        if self.pool.is_some() {
            self.pools.moved(&cell);
        }
        if self.is_lost(&cell) {
            *self.lost.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        self.holding.store(false, Ordering::SeqCst);
        self.gate.send_replace(Gate::Open(cell));
        self.pools.ask_now();
    }

    /// Asks a server for what is the same for all sessions of a database, and remembers it.
    pub async fn learn(&self, cell: &Cell, database: &str) {
        let learned = self.learn_facts(cell, database).await;
        let mut all = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert((cell.name.clone(), database.to_owned()), learned);
    }

    /// Asks a server for what is the same for all sessions of a database.
    ///
    /// # Errors
    /// It does not tell.
    pub async fn learn_facts(&self, cell: &Cell, database: &str) -> Learned {
        let began = Instant::now();
        let login = AdminLogin { database: database.to_owned(), ..self.admin.clone() };
        let failed = |error: &dyn std::error::Error| Reason::Failed {
            error: format!("Holdfast's own login to `{database}`: {}", model::chain(error)),
        };
        let ask = async {
            let mut admin = loop {
                match Admin::connect(&cell.target, &login).await {
                    // One that was made just now comes to a standby a little later.
                    Err(ConnectError::Refused { sqlstate, .. })
                        if sqlstate == SqlState::INVALID_CATALOG_NAME
                            && began.elapsed() < DATABASE_LATE_MAX =>
                    {
                        tokio::time::sleep(FENCE_PAUSE).await;
                    }
                    admin => break admin.map_err(|error| failed(&error))?,
                }
            };
            // A library's settings are there only once it is loaded, as every capture loads this one.
            admin.rows("DO LANGUAGE plpgsql 'BEGIN END'").await.map_err(|error| failed(&error))?;
            let mut answers = Vec::new();
            for question in facts::QUESTIONS {
                answers.push(admin.rows(question).await.map_err(|error| failed(&error))?);
            }
            Facts::read(&answers).map(Arc::new).map_err(|error| failed(&error))
        };
        let wait_max = self.moves.answer_timeout;
        let late = || {
            let error = format!("database `{database}` did not tell what it holds in {wait_max:?}");
            Err(Reason::Failed { error })
        };
        let learned = tokio::time::timeout(wait_max, ask).await.unwrap_or_else(|_| late());
        tracing::debug!(cell = cell.name, database, took = ?began.elapsed(), "learned of a database");
        learned
    }

    /// What was learned of a database on a cell's server.
    ///
    /// # Errors
    /// Nothing was, and why.
    pub fn facts(&self, cell: &Cell, database: &str) -> Learned {
        let all = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        let unknown = || Reason::Failed {
            error: format!("nothing is known of database `{database}` in `{}`", cell.name),
        };
        let learned = all.get(&(cell.name.clone(), database.to_owned())).cloned();
        learned.unwrap_or_else(|| Err(unknown()))
    }

    /// The copy of a session that was made beforehand.
    pub(crate) fn take_prepared(&self, session: u64) -> Option<Prepared> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).remove(&session)
    }

    fn stages(&self) -> MutexGuard<'_, HashMap<u64, Connection>> {
        self.stages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn keep_stage(&self, session: u64, stage: Connection) {
        self.stages().insert(session, stage);
    }

    pub(crate) fn take_stage(&self, session: u64) -> Option<Connection> {
        self.stages().remove(&session)
    }

    /// Processes of servers that are ours besides those of sessions.
    pub(crate) fn stage_pids(&self) -> Vec<i32> {
        self.stages().values().map(|stage| stage.pid).collect()
    }

    pub(crate) fn keep_prepared(&self, session: u64, copy: Prepared) {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).insert(session, copy);
    }

    /// Forgets copies of sessions and what was learned of servers.
    pub fn forget(&self) {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.stages().clear();
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).clear();
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
