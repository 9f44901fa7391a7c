//! Server connections that sessions share, a transaction at a time.
//!
//! A session that leaves nothing behind on its server is detached at the end of each transaction, and attached to any
//! free server of its pool at the begin of the next. One that may leave something keeps its server from then on, until
//! a look at it shows that nothing is left, or nothing but settings, which are given to other servers.
//!
//! - here: what a pool is, and what a session and a server know of it.
//! - [`sharing`]: the messages of such sessions on their way.
//! - [`keeper`]: opens servers, looks at sessions, and learns what names stand for.
//! - the engine attaches and detaches (`engine/lending.rs`).
//!
//! **Architecture Invariant:** a server that is shared holds nothing that a session could see of another, but
//! prepared statements, whose names no client knows.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use model::session::footprint::{Footprint, Leaves};
use model::session::names::Names;
use model::session::{Facts, Landscape, Snapshot};
use tokio::sync::Notify;

use crate::app::{Cell, Params};
use crate::config::PoolLimits;
use crate::session::{Identity, Leg};

pub(crate) mod keeper;
pub(crate) mod sharing;

/// Statements that a server may have prepared; at more it is replaced when it is free.
const STATEMENTS_MAX: usize = 1_000;
/// Texts, and states, that a pool remembers while nobody uses them.
const UNUSED_MAX: usize = 1_000;
/// Settings that a session may set in a transaction without being looked at.
const ASSIGNED_MAX: usize = 8;
/// Kinds of sessions that one application may have; more do not share.
const POOLS_MAX: usize = 1_000;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What names stand for in one database of an application, and whether that still holds.
#[derive(Debug)]
pub struct Database {
    pub name: String,
    state: Mutex<DatabaseState>,
    /// Wakes whoever learns anew.
    changed: Arc<Notify>,
}

#[derive(Debug, Default)]
struct DatabaseState {
    landscape: Option<Arc<Landscape>>,
    /// What `landscape::CHANGED_QUESTION` gave when it was learned.
    mark: String,
    /// Something was created or altered since.
    is_stale: bool,
    /// How often that has happened.
    redefined: u64,
}

impl DatabaseState {
    /// It was learned when the mark was this, and nothing has changed.
    fn is_at(&self, mark: &str) -> bool {
        self.landscape.is_some() && self.mark == mark && !self.is_stale
    }
}

impl Database {
    /// What a statement may leave, and why that cannot be told otherwise.
    fn footprint(&self, sql: &[u8]) -> Footprint {
        match self.landscape() {
            Some(landscape) => landscape.of_text(sql),
            None => Footprint { leaves: Some(Leaves::Something), sets: Vec::new() },
        }
    }

    /// Something was defined anew: until it is known what, every statement may leave something.
    fn mark_stale(&self) {
        let mut state = lock(&self.state);
        state.is_stale = true;
        state.redefined += 1;
        drop(state);
        self.changed.notify_one();
    }

    fn landscape(&self) -> Option<Arc<Landscape>> {
        let state = lock(&self.state);
        state.landscape.clone().filter(|_| !state.is_stale)
    }
}

/// Sessions that may share servers: they logged in alike.
#[derive(Debug)]
pub struct Pool {
    pub id: u64,
    pub user: String,
    pub database: Arc<Database>,
    known: Mutex<Known>,
    /// One at a time finds out what a fresh login gives.
    pub(crate) welcoming: tokio::sync::Mutex<()>,
    /// When, of which cell, and what was learned for looks.
    recent: tokio::sync::Mutex<Option<(tokio::time::Instant, String, Arc<Facts>)>>,
    next_statement: AtomicU64,
}

#[derive(Debug, Default)]
struct Known {
    /// Who logged in last.
    identity: Option<Arc<Identity>>,
    welcome: Option<Arc<Welcome>>,
    statements: HashMap<StatementKey, Arc<Statement>>,
    states: BTreeSet<Arc<Beyond>>,
}

/// What a fresh login to a cell's server gives.
#[derive(Debug)]
pub struct Welcome {
    pub cell: Arc<Cell>,
    pub params: Params,
    pub facts: Arc<Facts>,
    pub fresh: Snapshot,
}

/// What a session has beyond a fresh login, and can be given anywhere: settings, its user and its role.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Beyond {
    pub settings: BTreeMap<String, String>,
    pub custom: BTreeMap<String, String>,
    pub session_user: String,
    pub role: String,
}

impl Beyond {
    fn of(snapshot: &Snapshot) -> Beyond {
        Beyond {
            settings: snapshot.settings.clone(),
            custom: snapshot.custom.clone(),
            session_user: snapshot.session_user.clone(),
            role: snapshot.role.clone(),
        }
    }

    fn to_snapshot(&self) -> Snapshot {
        Snapshot {
            settings: self.settings.clone(),
            custom: self.custom.clone(),
            session_user: self.session_user.clone(),
            role: self.role.clone(),
            ..Snapshot::default()
        }
    }
}

/// None for what a fresh login gives.
pub type State = Option<Arc<Beyond>>;

/// Whether two states are the same one: a pool has each once.
pub(crate) fn same_state(a: &State, b: &State) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        _ => false,
    }
}

/// The text and types of a Parse, and what it is read under.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct StatementKey {
    /// The body of the message behind the name.
    body: Box<[u8]>,
    styles: [Box<str>; 4],
}

/// Parameters by which literals are read when a statement is prepared.
pub(crate) const STYLES: [&str; 4] =
    ["DateStyle", "TimeZone", "IntervalStyle", "standard_conforming_strings"];

/// A prepared statement that sessions of a pool share.
#[derive(Debug)]
pub struct Statement {
    pub id: u64,
    /// The name that servers know it by.
    pub name: Box<[u8]>,
    /// The body of its Parse behind the name.
    pub body: Box<[u8]>,
    /// What it may leave, by the landscape that told.
    footprint: Mutex<Option<(Arc<Landscape>, Footprint)>>,
}

impl PartialEq for Statement {
    fn eq(&self, other: &Statement) -> bool {
        self.id == other.id
    }
}

impl Statement {
    fn sql(&self) -> &[u8] {
        let end = self.body.iter().position(|byte| *byte == 0);
        self.body.get(..end.unwrap_or(self.body.len())).unwrap_or_default()
    }

    fn footprint(&self, database: &Database) -> Footprint {
        let Some(now) = database.landscape() else { return database.footprint(self.sql()) };
        let mut known = lock(&self.footprint);
        match &*known {
            Some((landscape, footprint)) if Arc::ptr_eq(landscape, &now) => footprint.clone(),
            _ => {
                let footprint = now.of_text(self.sql());
                *known = Some((now, footprint.clone()));
                footprint
            }
        }
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
            welcoming: tokio::sync::Mutex::default(),
            recent: tokio::sync::Mutex::default(),
            next_statement: AtomicU64::new(1),
        }
    }

    /// What a fresh login gives, if that is known of `cell`.
    pub fn welcome(&self, cell: &Arc<Cell>) -> Option<Arc<Welcome>> {
        lock(&self.known).welcome.clone().filter(|known| Arc::ptr_eq(&known.cell, cell))
    }

    fn identity(&self) -> Option<Arc<Identity>> {
        lock(&self.known).identity.clone()
    }

    /// Remembers who has logged in, for servers that are opened later.
    pub fn knows(&self, identity: &Arc<Identity>) {
        lock(&self.known).identity = Some(identity.clone());
    }

    /// The shared statement of a Parse whose body behind the name is `body`.
    fn statement(&self, body: &[u8], params: &Params) -> Arc<Statement> {
        let styles =
            STYLES.map(|name| params.get(name).map(String::as_str).unwrap_or_default().into());
        let key = StatementKey { body: body.into(), styles };
        let mut known = lock(&self.known);
        if let Some(statement) = known.statements.get(&key) {
            return statement.clone();
        }
        if known.statements.len() >= UNUSED_MAX {
            known.statements.retain(|_, statement| Arc::strong_count(statement) > 1);
        }
        let id = self.next_statement.fetch_add(1, Ordering::Relaxed);
        let name = format!("holdfast_{}_{id}", self.id).into_bytes().into();
        let statement =
            Arc::new(Statement { id, name, body: body.into(), footprint: Mutex::default() });
        known.statements.insert(key, statement.clone());
        statement
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
            let configured = welcome.facts.configured.get(name).map(|one| &one.value);
            let settings =
                if name.contains('.') { &mut beyond.custom } else { &mut beyond.settings };
            match value {
                Some(value) if configured != Some(value) => {
                    settings.insert(name.clone(), value.clone());
                }
                _ => drop(settings.remove(name)),
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
    /// Held by each session that has left its engine with its server.
    away: Arc<()>,
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

    fn databases(&self) -> Vec<Arc<Database>> {
        lock(&self.databases).values().cloned().collect()
    }

    /// Server connections of sessions that have left their engine for a while.
    pub(crate) fn away(&self) -> usize {
        Arc::strong_count(&self.away) - 1
    }

    /// Nothing of what was learned of servers holds any more.
    pub fn forget(&self) {
        for pool in lock(&self.pools).values() {
            lock(&pool.known).welcome = None;
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
    /// Since when it waits for one.
    pub waits_since: Option<Instant>,
    /// How often it was looked at, and when that was.
    pub looks: u32,
    pub looked_at: Option<Instant>,
    /// Definitions have changed in its transaction.
    pub redefines: bool,
    /// The name in a DEALLOCATE that is running.
    pub deallocates: Option<Box<[u8]>>,
    /// Settings that it may have set since it was attached.
    pub assigned: Vec<String>,
    /// It may have values of sequences, which are not kept for it.
    pub has_values: bool,
    /// Questions of ours on their way, before it is detached.
    pub asked: VecDeque<Asked>,
    pub told: Vec<(String, Option<String>)>,
    /// The statement that the client has named last, and its name for it.
    pub last_named: Option<Arc<Statement>>,
    pub last_name: Vec<u8>,
}

/// What a session is asked before it is detached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// The value of a setting, and the answer.
    Setting { name: String, value: Option<String> },
    /// Something is done, and that is all.
    Nothing,
}

/// Why a session keeps its server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keeps {
    pub leaves: Leaves,
    /// The statement, or what a look has found.
    pub why: String,
    /// It has not been looked at since.
    pub is_new: bool,
}

/// Whose unnamed statement stands on a server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum UnnamedHere {
    /// Somebody else's, or none.
    #[default]
    Foreign,
    /// The session's, if what was sent succeeds.
    Sent,
    Own,
}

/// What is known of a server, whoever is attached to it.
#[derive(Debug, Default)]
pub struct Here {
    /// Shared statements that are prepared there.
    pub statements: HashSet<Arc<Statement>>,
    pub unnamed: UnnamedHere,
    pub state: State,
    /// Parameters as it reported them last, while that is not what the client was told.
    pub params: Option<Params>,
    /// Something other than settings may have been left there, so it is not shared again.
    pub is_tainted: bool,
}

impl std::hash::Hash for Statement {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.id.hash(state);
    }
}

impl Eq for Statement {}

impl Here {
    /// It has had enough.
    pub fn is_worn(&self) -> bool {
        self.is_tainted || self.statements.len() >= STATEMENTS_MAX
    }
}

impl Sharing {
    pub fn new(pool: Arc<Pool>) -> Sharing {
        Sharing {
            pool,
            names: Names::default(),
            state: None,
            keeps: None,
            here: Here::default(),
            lent: None,
            away: None,
            needs: false,
            waits_since: None,
            looks: 0,
            looked_at: None,
            redefines: false,
            deallocates: None,
            assigned: Vec::new(),
            has_values: false,
            asked: VecDeque::new(),
            told: Vec::new(),
            last_named: None,
            last_name: Vec::new(),
        }
    }

    /// The names by which the server knows the session's statements.
    fn server_names(&self) -> HashSet<Box<[u8]>> {
        self.names.statements().map(|statement| statement.name.clone()).collect()
    }

    /// Statements of other sessions on the server, which are forgotten here.
    pub(crate) fn take_foreign(&mut self) -> Vec<Arc<Statement>> {
        let own: HashSet<u64> = self.names.statements().map(|statement| statement.id).collect();
        let foreign = self.here.statements.extract_if(|statement| !own.contains(&statement.id));
        foreign.collect()
    }

    /// A statement is sent that may leave this.
    fn leave(&mut self, footprint: Footprint, limits: &PoolLimits, why: impl FnOnce() -> String) {
        match footprint.leaves {
            None => (),
            Some(Leaves::Values) if !limits.currval => self.has_values = true,
            Some(leaves) => return self.keep(leaves, why),
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
            self.keep(Leaves::Settings, why);
        }
    }

    pub(crate) fn go_away(&mut self, pools: &Pools) {
        self.away = Some(pools.away.clone());
    }

    pub(crate) fn come_back(&mut self) {
        self.away = None;
    }

    /// From now on it keeps its server, until a look at it.
    fn keep(&mut self, leaves: Leaves, why: impl FnOnce() -> String) {
        self.here.is_tainted |= leaves > Leaves::Settings;
        match &mut self.keeps {
            Some(keeps) => {
                keeps.leaves = keeps.leaves.max(leaves);
                keeps.is_new = true;
            }
            None => self.keeps = Some(Keeps { leaves, why: why(), is_new: true }),
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

/// The statements that take a server from one state to another, as one text. None if there is no way.
///
/// A custom setting cannot be removed from a server, so a session without it is not given to one that has it.
pub(crate) fn transition(from: &State, to: &State, welcome: &Welcome) -> Option<String> {
    use model::session::replay::{self, Phase, Step};
    let snapshot = |state: &State| match state {
        Some(beyond) => beyond.to_snapshot(),
        None => Beyond::of(&welcome.fresh).to_snapshot(),
    };
    let (from, to) = (snapshot(from), snapshot(to));
    if from.custom.keys().any(|name| !to.custom.contains_key(name)) {
        return None;
    }
    if from.session_user != to.session_user && from.session_user != welcome.fresh.session_user {
        // Whoever it is now may not become another.
        return None;
    }
    let mut text = String::new();
    // A role may not be allowed to change what its user is.
    if from.role != "none" && (from.role != to.role || from.session_user != to.session_user) {
        text.push_str("SET ROLE NONE;");
    }
    let from =
        Snapshot { role: if text.is_empty() { from.role.clone() } else { "none".into() }, ..from };
    for step in replay::steps(&from, &to, Phase::Standby, &welcome.facts) {
        let Step::Run { params, .. } = step else { return None };
        let [name, value] = params.as_slice() else { return None };
        let (name, value) = (model::sql::quote_literal(name), model::sql::quote_literal(value));
        text.push_str(&format!("SELECT pg_catalog.set_config({name},{value},false) IS NULL;"));
    }
    let encoding = from.settings.get("client_encoding").or(welcome.params.get("client_encoding"));
    (text.is_ascii() || encoding.is_some_and(|name| name == "UTF8")).then_some(text)
}
