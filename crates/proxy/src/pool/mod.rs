//! Server connections that sessions share, a transaction at a time.
//!
//! A session that leaves nothing behind on its server is detached at the end of each transaction, and attached to any
//! free server of its pool at the begin of the next. One that may leave something keeps its server from then on, until
//! a look at it shows that nothing is left, or nothing but settings, which are given to other servers.
//!
//! - here: what a pool is, and what a session and a server know of it.
//! - `sharing`: the messages of such sessions on their way; `answers`: those of their servers.
//! - `losing`: what becomes of one whose server is lost.
//! - `keeper`: opens servers, looks at sessions, and learns what names stand for.
//! - the engine attaches and detaches (`engine/pooling.rs`, `engine/lending.rs`).
//!
//! **Architecture Invariant:** a server that is shared holds nothing that a session could see of another, but
//! prepared statements, whose names no client knows.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use model::session::flight::{Block, Flight};
use model::session::footprint::{Footprint, Leaves};
use model::session::names::Names;
use model::session::{Facts, Snapshot};
use tokio::sync::Notify;
use wire::sqlstate::SqlState;

use crate::app::{Cell, Params};
use crate::config::PoolLimits;
use crate::session::{Identity, Leg};

mod answers;
mod database;
pub(crate) mod keeper;
mod losing;
pub(crate) mod sharing;
mod state;
pub(crate) mod statement;

pub use database::Database;
pub use losing::LostBlock;
pub(crate) use losing::is_shutdown;
pub use state::{Beyond, Bound, State};
pub(crate) use state::{reads_otherwise, same_state, transition};
pub use statement::Statement;
use statement::{SERVER_NAME, STYLES, StatementKey};

/// Statements that a server may have prepared; at more it is replaced when it is free.
const STATEMENTS_MAX: usize = 1_000;
/// Texts, and states, that a pool remembers while nobody uses them.
const UNUSED_MAX: usize = 1_000;
/// Settings that a session may set in a transaction without being looked at.
const ASSIGNED_MAX: usize = 8;
/// A pool that nobody has used for so long is given up, with its servers.
const UNUSED_PAUSE: Duration = Duration::from_secs(60);
/// Kinds of sessions that one application may have; more do not share.
const POOLS_MAX: usize = 1_000;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sessions that may share servers: they logged in alike.
#[derive(Debug)]
pub struct Pool {
    pub id: u64,
    pub user: String,
    pub database: Arc<Database>,
    known: Mutex<Known>,
    /// Roles or their defaults have changed since: it gets no more sessions, and those that it has keep what they had.
    is_retired: AtomicBool,
    /// No server can be given what its sessions had at their login.
    is_lost: AtomicBool,
    /// One at a time finds out what a fresh login gives.
    pub(crate) welcoming: tokio::sync::Mutex<()>,
    recent: tokio::sync::Mutex<Option<Recent>>,
    /// How often its server's configuration was read anew, as far as is known.
    reloads: AtomicU64,
    next_statement: AtomicU64,
    /// When somebody has logged in last.
    used_at: Mutex<Instant>,
}

#[derive(Debug, Default)]
struct Known {
    /// Who logged in last.
    identity: Option<Arc<Identity>>,
    welcome: Option<Arc<Welcome>>,
    /// The same of another cell, where its sessions have logged in.
    elsewhere: Option<Arc<Welcome>>,
    /// From where to where its sessions have come, if a login to the one gives something else than to the other. States of
    /// sessions are told beside what a login gives.
    bases: Vec<(Arc<Welcome>, Arc<Welcome>)>,
    statements: HashMap<StatementKey, Arc<Statement>>,
    states: BTreeSet<Arc<Beyond>>,
}

/// What was learned for looks, of which cell and when, and how often anything had been defined anew by then.
#[derive(Debug)]
struct Recent {
    at: tokio::time::Instant,
    cell: String,
    redefined: u64,
    reloads: u64,
    facts: Arc<Facts>,
}

/// What a fresh login to a cell's server gives.
#[derive(Debug)]
pub struct Welcome {
    pub cell: Arc<Cell>,
    pub params: Params,
    pub facts: Arc<Facts>,
    /// Also of a fenced server, what one gives that is not.
    pub fresh: Snapshot,
}

impl Welcome {
    /// A session finds the same here and there.
    fn is_as(&self, other: &Welcome) -> bool {
        Beyond::of(&self.fresh) == Beyond::of(&other.fresh)
            && other.facts.configured_otherwise(&self.facts).is_empty()
    }
}

/// Why a server could not be opened.
#[derive(Debug, Clone)]
pub struct NotOpened {
    pub error: String,
    /// The server refuses whoever logs in so: to wait is of no use.
    pub refused: Option<SqlState>,
}

impl NotOpened {
    fn new(error: impl Into<String>) -> NotOpened {
        NotOpened { error: error.into(), refused: None }
    }
}

static NEXT_POOL: AtomicU64 = AtomicU64::new(1);

impl Pool {
    fn new(user: &str, database: Arc<Database>) -> Pool {
        Pool {
            id: NEXT_POOL.fetch_add(1, Ordering::Relaxed),
            user: user.to_owned(),
            database,
            known: Mutex::default(),
            is_retired: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
            welcoming: tokio::sync::Mutex::default(),
            recent: tokio::sync::Mutex::default(),
            reloads: AtomicU64::new(0),
            next_statement: AtomicU64::new(1),
            used_at: Mutex::new(Instant::now()),
        }
    }

    /// What a fresh login gives, if that is known of `cell`.
    pub fn welcome(&self, cell: &Arc<Cell>) -> Option<Arc<Welcome>> {
        lock(&self.known).welcome.clone().filter(|known| Arc::ptr_eq(&known.cell, cell))
    }

    /// Its sessions have come from one server to another. What a login gives here was made what it is there.
    fn rebase(&self, before: Arc<Welcome>, here: &Arc<Welcome>) {
        lock(&self.known).bases.push((before, here.clone()));
        self.know(here);
    }

    /// How often that has happened.
    fn base(&self) -> usize {
        lock(&self.known).bases.len()
    }

    /// What `state`, which was told at the base of this number, is by now; and the number of now.
    pub(crate) fn state_now(&self, state: &State, base: usize) -> (State, usize) {
        let bases = match lock(&self.known).bases.get(base..) {
            None | Some([]) => return (state.clone(), base),
            Some(bases) => bases.to_vec(),
        };
        let now = bases.iter().fold(state.clone(), |state, (before, here)| {
            self.state(state::rebased(state.as_deref()?, before, here), &here.fresh)
        });
        (now, base + bases.len())
    }

    fn elsewhere(&self) -> Option<Arc<Welcome>> {
        lock(&self.known).elsewhere.clone()
    }

    fn identity(&self) -> Option<Arc<Identity>> {
        lock(&self.known).identity.clone()
    }

    /// Remembers who has logged in, for servers that are opened later.
    pub fn knows(&self, identity: &Arc<Identity>) {
        lock(&self.known).identity = Some(identity.clone());
        *lock(&self.used_at) = Instant::now();
    }

    /// The shared statement of a Parse whose body behind the name is `body`.
    fn statement(&self, body: &[u8], state: &State, params: &Params) -> Arc<Statement> {
        let styles =
            STYLES.map(|name| params.get(name).map(String::as_str).unwrap_or_default().into());
        let redefined = self.database.redefined();
        let key = StatementKey { body: body.into(), state: state.clone(), styles, redefined };
        let mut known = lock(&self.known);
        if let Some(statement) = known.statements.get(&key) {
            return statement.clone();
        }
        if known.statements.len() >= UNUSED_MAX {
            known.statements.retain(|_, statement| Arc::strong_count(statement) > 1);
        }
        let statement = self.own_statement(body);
        known.statements.insert(key, statement.clone());
        statement
    }

    /// A statement that is shared with nobody.
    fn own_statement(&self, body: &[u8]) -> Arc<Statement> {
        let id = self.next_statement.fetch_add(1, Ordering::Relaxed);
        let name = [SERVER_NAME, format!("{}_{id}", self.id).as_bytes()].concat().into();
        Arc::new(Statement::new(id, name, body))
    }

    /// The state that `state` becomes with these settings. None if nothing is known of the cell's server.
    fn with(
        &self,
        state: &State,
        cell: &Arc<Cell>,
        told: &[(String, Option<String>)],
    ) -> Option<State> {
        let welcome = self.welcome(cell)?;
        let mut beyond = match state {
            Some(state) => (**state).clone(),
            None => Beyond::of(&welcome.fresh),
        };
        for (name, value) in told {
            let by_login = welcome.fresh.settings.get(name);
            let settings =
                if name.contains('.') { &mut beyond.custom } else { &mut beyond.settings };
            // What it has not set is as a login gives it.
            match value.as_ref().or(by_login) {
                Some(value) => drop(settings.insert(name.clone(), value.clone())),
                None => drop(settings.remove(name)),
            }
        }
        Some(self.state(beyond, &welcome.fresh))
    }

    /// The one copy of a state.
    fn state(&self, beyond: Beyond, fresh: &Snapshot) -> State {
        if beyond == Beyond::of(fresh) {
            return None;
        }
        let mut known = lock(&self.known);
        if let Some(known) = known.states.get(&beyond) {
            return Some(known.clone());
        }
        if known.states.len() >= UNUSED_MAX {
            known.states.retain(|state| Arc::strong_count(state) > 1);
        }
        let state = Arc::new(beyond);
        known.states.insert(state.clone());
        Some(state)
    }
}

/// The pools of an application.
#[derive(Debug, Default)]
pub struct Pools {
    pools: Mutex<HashMap<PoolKey, Arc<Pool>>>,
    databases: Mutex<HashMap<String, Arc<Database>>>,
    changed: Arc<Notify>,
    /// `landscape::LOGINS_QUESTION`'s marks, as they were last.
    marks: Mutex<Marks>,
    /// Pools that get no new sessions.
    retired: Mutex<Vec<Weak<Pool>>>,
    /// Where sessions stand.
    cell: Mutex<Option<Arc<Cell>>>,
    /// Held by each session that has left its engine with its server.
    away: Arc<()>,
}

/// What was seen last of what logins depend on.
#[derive(Debug, Default)]
struct Marks {
    cell: String,
    /// When the configuration was read, as fresh connections have it: they have it of the postmaster, each the same.
    loaded: Option<String>,
    logins: Option<String>,
    /// When connections of ours that are kept have read it, each by itself and a little later, by database and process. That
    /// it has changed says only that a fresh one is to be asked.
    kept: HashMap<String, (i32, String)>,
}

impl Marks {
    fn of(&mut self, cell: &str) -> &mut Marks {
        if self.cell != cell {
            *self = Marks { cell: cell.to_owned(), ..Marks::default() };
        }
        self
    }

    /// Whether the configuration was read anew since a fresh connection was asked last.
    fn see_loaded(&mut self, loaded: &str) -> bool {
        self.loaded.replace(loaded.to_owned()).is_some_and(|before| before != loaded)
    }

    fn see_logins(&mut self, logins: &str) -> bool {
        self.logins.replace(logins.to_owned()).is_some_and(|before| before != logins)
    }
}

/// The startup parameters, by name: they hold the user and the database.
type PoolKey = BTreeMap<Vec<u8>, Vec<u8>>;

impl Pools {
    /// The pool of sessions that log in so. None if there are too many kinds.
    pub fn of(
        &self,
        user: &str,
        database: &str,
        params: &[(Vec<u8>, Vec<u8>)],
    ) -> Option<Arc<Pool>> {
        let key: PoolKey = params.iter().cloned().collect();
        let mut pools = lock(&self.pools);
        if let Some(pool) = pools.get(&key) {
            return Some(pool.clone());
        }
        if pools.len() >= POOLS_MAX {
            pools.retain(|_, pool| Arc::strong_count(pool) > 1);
        }
        if pools.len() >= POOLS_MAX {
            return None;
        }
        let mut databases = lock(&self.databases);
        let database = databases.entry(database.to_owned()).or_insert_with(|| {
            let changed = self.changed.clone();
            Arc::new(Database { name: database.to_owned(), state: Mutex::default(), changed })
        });
        let pool = Arc::new(Pool::new(user, database.clone()));
        pools.insert(key, pool.clone());
        Some(pool)
    }

    /// Those that are in use. Pools that nobody has used for a while are forgotten, and with them their databases.
    fn databases(&self) -> Vec<Arc<Database>> {
        // One is here, and one may be in an engine.
        lock(&self.pools).retain(|_, pool| {
            Arc::strong_count(pool) > 2 || lock(&pool.used_at).elapsed() < UNUSED_PAUSE
        });
        let mut databases = lock(&self.databases);
        databases.retain(|_, database| Arc::strong_count(database) > 1);
        databases.values().cloned().collect()
    }

    /// Server connections of sessions that have left their engine for a while.
    pub(crate) fn away(&self) -> usize {
        Arc::strong_count(&self.away) - 1
    }

    /// The configuration was read anew: what a fresh login gives is not known any more.
    fn reloaded(&self) {
        self.forget();
        // What a login gave before the roles changed cannot be told from what it gave before the configuration did.
        for pool in lock(&self.retired).drain(..).filter_map(|pool| pool.upgrade()) {
            pool.is_lost.store(true, Ordering::Relaxed);
        }
    }

    /// Sessions may wait until names are known again: that is not to take until the next look.
    pub(crate) fn ask_now(&self) {
        self.changed.notify_one();
    }

    /// What marks of logins are now, as a fresh connection has them. If they have changed, logins that are known do not hold
    /// any more.
    fn mark(&self, cell: &str, loaded: &str, logins: &str) {
        if lock(&self.marks).of(cell).see_loaded(loaded) {
            tracing::info!(cell, "the server has read its configuration anew");
            self.reloaded();
        }
        self.mark_logins(cell, logins);
    }

    /// The same of what all connections have alike.
    fn mark_logins(&self, cell: &str, logins: &str) {
        if lock(&self.marks).of(cell).see_logins(logins) {
            tracing::info!(cell, "roles or databases have changed");
            self.retire();
        }
    }

    /// Whether it is known that this connection, of this database and process, has read the configuration then.
    fn knows_read(&self, cell: &str, database: &str, read: &(i32, String)) -> bool {
        lock(&self.marks).of(cell).kept.get(database) == Some(read)
    }

    fn note_read(&self, cell: &str, database: &str, read: (i32, String)) {
        lock(&self.marks).of(cell).kept.insert(database.to_owned(), read);
    }

    /// Roles, their defaults or their rights have changed: the next login of each kind asks its server.
    fn retire(&self) {
        for (_, pool) in std::mem::take(&mut *lock(&self.pools)) {
            pool.is_retired.store(true, Ordering::Relaxed);
            let mut retired = lock(&self.retired);
            retired.retain(|pool| pool.strong_count() > 0);
            retired.push(Arc::downgrade(&pool));
        }
    }

    /// The pool gets no new sessions.
    pub(crate) fn retire_one(&self, pool: &Pool) {
        lock(&self.pools).retain(|_, one| {
            let is_it = one.id == pool.id;
            if is_it {
                lock(&self.retired).push(Arc::downgrade(one));
            }
            !is_it
        });
        pool.is_retired.store(true, Ordering::Relaxed);
    }

    /// Sessions stand on `cell` from now on. What a login gives there may be something else than where they have logged in.
    pub fn moved(&self, cell: &Arc<Cell>) {
        let retired = lock(&self.retired).iter().filter_map(Weak::upgrade).collect::<Vec<_>>();
        for pool in lock(&self.pools).values().chain(&retired) {
            let mut known = lock(&pool.known);
            if let Some(welcome) = known.welcome.take_if(|known| !Arc::ptr_eq(&known.cell, cell)) {
                known.elsewhere = Some(welcome);
            }
            known.welcome = None;
            pool.reloads.fetch_add(1, Ordering::SeqCst);
        }
        let before = lock(&self.cell).replace(cell.clone());
        if before.is_none_or(|before| Arc::ptr_eq(&before, cell)) {
            return;
        }
        // Of the other server nothing is known of what was defined last.
        for database in lock(&self.databases).values() {
            database.mark_stale();
        }
    }

    /// Nothing of what was learned of servers holds any more.
    pub fn forget(&self) {
        for pool in lock(&self.pools).values() {
            let mut known = lock(&pool.known);
            (known.welcome, known.elsewhere) = (None, None);
            pool.reloads.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// What a session that shares servers knows besides.
#[derive(Debug)]
pub struct Sharing {
    pub pool: Arc<Pool>,
    /// The client's names of prepared statements.
    pub names: Names<Arc<Statement>>,
    pub state: State,
    /// How often its pool's sessions had come from another server when that was told.
    pub base: usize,
    /// It keeps its server, or is to keep the next one.
    pub keeps: Option<Keeps>,
    /// Of the server that it is attached to.
    pub here: Here,
    /// The engine's number of that server.
    pub lent: Option<usize>,
    /// It has left its engine with its server, which counts all the same.
    away: Option<Arc<()>>,
    /// The client has sent something, and there is no server.
    pub needs: bool,
    /// It waits until names are known again.
    pub waits_for_names: bool,
    /// Since when it waits for one.
    pub waits_since: Option<Instant>,
    /// How often it was looked at, and when that was.
    pub looks: u32,
    pub looked_at: Option<Instant>,
    /// It has set something since it was attached, so what it prepares is its own.
    pub is_unsettled: bool,
    /// It has set the search path, if only for its transaction.
    pub repaths: bool,
    /// How often anything had been defined anew when its statements were looked at first since it was attached.
    pub judged_at: Option<u64>,
    /// A DEALLOCATE ALL is on its way in the open batch.
    pub clears: bool,
    /// The unnamed statement is one, or was prepared under settings of a transaction.
    pub unnamed_clears: bool,
    pub unnamed_unsettled: bool,
    /// Plans that the server keeps may hold literals and constants as its settings have them.
    pub restyles: bool,
    /// The settings of now may read literals otherwise than those that it had when it was attached.
    pub rereads: bool,
    /// What the unnamed statement may leave, and the name that it deallocates.
    pub unnamed: Footprint,
    /// How often anything had been defined anew when that was told.
    pub unnamed_judged_at: u64,
    pub unnamed_deallocates: Option<Box<[u8]>>,
    /// It may have used temporary objects, so what it defines may be seen by nobody else.
    pub names_temporary: bool,
    /// Definitions have changed in its transaction.
    pub redefines: bool,
    /// Its transaction has run code that may have done so.
    pub doubts: bool,
    /// The names in each DEALLOCATE that is running.
    pub deallocates: VecDeque<Box<[u8]>>,
    /// Settings that it may have set since it was attached.
    pub assigned: Vec<String>,
    /// Some of them in a transaction that has ended.
    pub has_set: bool,
    /// What would become of what is running, if its server were lost.
    pub flight: Flight,
    /// Something was bound that may end the transaction, in what is running, or before.
    pub binds_end: bool,
    /// The portal that begins a block when it is run, if it was bound in this batch.
    pub begins: Option<Box<[u8]>>,
    /// Something in the open batch may begin a block.
    pub may_begin: bool,
    /// The unnamed statement was sent in this batch.
    pub unnamed_in_batch: bool,
    pub may_commit_later: bool,
    /// Its transaction was lost with its server.
    pub lost: Option<LostBlock>,
    /// The rest of a message that is for nobody is still to come.
    pub swallows: bool,
    /// The open batch fails: something was sent in it that the server refuses.
    pub fails_batch: bool,
    /// It may have values of sequences, which are not kept for it.
    pub has_values: bool,
    /// Questions of ours on their way, before it is detached.
    pub asked: VecDeque<Asked>,
    pub told: Vec<(String, Option<String>)>,
    /// The statement that the client has named last, and its name for it.
    pub last_named: Option<Arc<Statement>>,
    pub last_name: Vec<u8>,
    /// What the server was sent in place of names that were taken, and those names.
    pub taken: Vec<(Arc<Statement>, Vec<u8>)>,
    /// Its transaction has set, in so many words, what decides how literals are read.
    pub sets_styles: bool,
    /// Names of the client that were left to the server.
    pub left: BTreeSet<Box<[u8]>>,
    /// Others wait for a server of its pool.
    pub others_wait: bool,
}

/// What a session is asked before it is detached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// The value of a setting, and the answer.
    Setting { name: String, value: Option<String> },
    /// Something is done, and that is all.
    Nothing,
    /// It is brought into the session's state, before something else is asked.
    State,
    /// Its transaction is made to fail.
    Failing,
}

/// Why a session keeps its server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keeps {
    pub leaves: Leaves,
    /// The statement, or what a look has found.
    pub why: String,
    /// It has not been looked at since.
    pub is_new: bool,
    /// Only for as long as it has a statement that cannot be prepared again.
    pub passes: bool,
}

/// Whose unnamed statement stands on a server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum UnnamedHere {
    /// Perhaps somebody else's: it is closed before anything else of the extended protocol.
    #[default]
    Foreign,
    /// None. If the session has one, it is prepared before it is used.
    Missing,
    /// What the client has sent since decides.
    Own,
}

/// What is known of a server, whoever is attached to it.
#[derive(Debug, Default)]
pub struct Here {
    /// Shared statements that are prepared there.
    pub statements: HashSet<Arc<Statement>>,
    pub unnamed: UnnamedHere,
    /// Somebody has prepared an unnamed statement there.
    pub has_unnamed: bool,
    /// A simple query is on its way, which drops it.
    pub drops_unnamed: bool,
    /// The session's is being prepared there anew.
    pub prepares_unnamed: bool,
    /// An error has come since something was sent that it may be skipped with.
    pub doubts_unnamed: bool,
    pub state: State,
    /// Parameters as it reported them last, while that is not what the client was told.
    pub params: Option<Params>,
    /// A session has been attached to it: functions may have been compiled.
    pub is_used: bool,
    /// Statements of others that were let go of, but for an error before that nobody has seen yet.
    pub closing: Vec<Arc<Statement>>,
    /// Statements that were perhaps not.
    pub perhaps: Vec<Arc<Statement>>,
    /// What is used in their place while the session's settings are of its transaction.
    pub aliases: HashMap<u64, Arc<Statement>>,
    /// Something other than settings may have been left there, so it is not shared again.
    pub is_tainted: bool,
}

impl Here {
    /// Statements that DISCARD PLANS would have read anew when they are next used, whatever is set by then. They are forgotten
    /// here, and are to be closed.
    pub(crate) fn take_read_by_settings(&mut self) -> Vec<Arc<Statement>> {
        let reads = |one: &Arc<Statement>| model::session::statement::has_literals(one.sql());
        self.statements.extract_if(reads).collect()
    }

    /// It has had enough.
    pub fn is_worn(&self) -> bool {
        self.is_tainted || self.statements.len() >= STATEMENTS_MAX
    }
}

impl Sharing {
    pub fn new(pool: Arc<Pool>) -> Sharing {
        Sharing {
            base: pool.base(),
            pool,
            names: Names::default(),
            state: None,
            keeps: None,
            here: Here::default(),
            lent: None,
            away: None,
            needs: false,
            waits_for_names: false,
            waits_since: None,
            looks: 0,
            looked_at: None,
            is_unsettled: false,
            repaths: false,
            judged_at: None,
            clears: false,
            unnamed_clears: false,
            unnamed_unsettled: false,
            restyles: false,
            rereads: false,
            unnamed: Footprint::default(),
            unnamed_judged_at: 0,
            unnamed_deallocates: None,
            names_temporary: false,
            redefines: false,
            doubts: false,
            deallocates: VecDeque::new(),
            assigned: Vec::new(),
            has_set: false,
            flight: Flight::default(),
            binds_end: false,
            begins: None,
            may_begin: false,
            unnamed_in_batch: false,
            may_commit_later: false,
            lost: None,
            swallows: false,
            fails_batch: false,
            has_values: false,
            asked: VecDeque::new(),
            told: Vec::new(),
            last_named: None,
            taken: Vec::new(),
            left: BTreeSet::new(),
            sets_styles: false,
            others_wait: false,
            last_name: Vec::new(),
        }
    }

    /// Its state beside what a login gives now.
    pub(crate) fn state_now(&self) -> State {
        self.pool.state_now(&self.state, self.base).0
    }

    /// The names by which the server knows the session's statements.
    fn server_names(&self) -> HashSet<Box<[u8]>> {
        self.names.statements().map(|statement| statement.name.clone()).collect()
    }

    /// Statements of other sessions on the server, which are forgotten here.
    pub(crate) fn take_foreign(&mut self) -> Vec<Arc<Statement>> {
        let own: HashSet<u64> = self.names.statements().map(|statement| statement.id).collect();
        let foreign = self.here.statements.extract_if(|statement| !own.contains(&statement.id));
        let mut foreign: Vec<Arc<Statement>> = foreign.collect();
        foreign.append(&mut self.here.perhaps);
        foreign
    }

    /// A text is sent to be run.
    fn runs(&mut self, block: Block) {
        self.flight.runs(block);
    }

    /// A statement is sent that may leave this.
    fn leave(&mut self, footprint: Footprint, limits: &PoolLimits, why: impl FnOnce() -> String) {
        self.is_unsettled |= footprint.sets_any;
        self.restyles |= footprint.restyles;
        self.rereads |= footprint.rereads;
        self.sets_styles |= footprint.rereads && !footprint.leaves.something;
        self.repaths |= footprint.sets_path;
        let mut leaves = footprint.leaves;
        self.doubts |= leaves.defines;
        if leaves.values && !limits.currval {
            (leaves.values, self.has_values) = (false, true);
        }
        if leaves.something
            && let Some(why) = self.pool.database.refused()
        {
            // No look could tell anything else.
            self.keep(leaves, String::new);
            self.keeps = Some(Keeps { leaves, why, is_new: false, passes: false });
            return;
        }
        if !leaves.is_nothing() {
            return self.keep(leaves, why);
        }
        for assigned in footprint.sets {
            let known = |state: &Arc<Beyond>| state.custom.contains_key(&assigned.name);
            if assigned.is_local && self.state.as_ref().is_some_and(known) {
                continue;
            }
            if !self.assigned.contains(&assigned.name) {
                self.assigned.push(assigned.name);
            }
        }
        if self.assigned.len() > ASSIGNED_MAX {
            self.keep(Leaves::SETTINGS, why);
        }
    }

    pub(crate) fn go_away(&mut self, pools: &Pools) {
        self.away = Some(pools.away.clone());
    }

    pub(crate) fn come_back(&mut self) {
        self.away = None;
    }

    /// What was defined anew since its statements were looked at may have made them leave something.
    pub(crate) fn notice_definitions(&mut self) {
        let now = self.pool.database.redefined();
        if self.judged_at.is_some_and(|then| then != now) {
            self.judged_at = Some(now);
            self.keep(Leaves::SOMETHING, || "definitions have changed meanwhile".into());
        }
    }

    /// From now on it keeps its server, until a look at it.
    fn keep(&mut self, leaves: Leaves, why: impl FnOnce() -> String) {
        self.here.is_tainted |= leaves.values || leaves.something;
        self.doubts |= leaves.defines;
        (self.is_unsettled, self.restyles, self.repaths, self.rereads) = (true, true, true, true);
        match &mut self.keeps {
            Some(keeps) => {
                keeps.leaves = keeps.leaves.and(leaves);
                (keeps.is_new, keeps.passes) = (true, false);
            }
            None => self.keeps = Some(Keeps { leaves, why: why(), is_new: true, passes: false }),
        }
    }
}

/// A server connection while no session is attached to it.
#[derive(Debug)]
pub struct Server {
    pub leg: Leg,
    pub pid: i32,
    pub secret: Box<[u8]>,
    pub cell: Arc<Cell>,
    pub here: Here,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_fresh_connections_have_is_compared() {
        let pools = Pools::default();
        let seen = |loaded: &str| lock(&pools.marks).of("a").see_loaded(loaded);
        assert!(!seen("09:00:00.0") && !seen("09:00:00.0"));
        // A kept one has read it a little later, and says nothing of it: a fresh one is asked once.
        let kept = (7, "10:00:00.7".to_owned());
        assert!(!pools.knows_read("a", "shop", &kept));
        assert!(seen("10:00:00.0"));
        pools.note_read("a", "shop", kept.clone());
        for _ in 0..3 {
            assert!(pools.knows_read("a", "shop", &kept) && !seen("10:00:00.0"));
        }
        assert!(!pools.knows_read("a", "shop", &(8, kept.1.clone())), "another connection");
        assert!(!pools.knows_read("b", "shop", &kept), "of another cell nothing was seen");
        assert!(!lock(&pools.marks).of("b").see_loaded("09:00"));
        let logins = |text: &str| lock(&pools.marks).of("b").see_logins(text);
        assert!(!logins("1") && !logins("1") && logins("2"));
    }
}
