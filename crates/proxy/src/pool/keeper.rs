//! Opens servers for pools, looks at what sessions have left on theirs, and learns what names stand for.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use model::session::footprint::{Leaves, decides_compiling};
use model::session::{Facts, Landscape, Snapshot, landscape};
use pg::admin::{Admin, AdminLogin};
use pg::connect::{ConnectError, Login};
use pg::connection::{Connection, QueryError, Row};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout};
use wire::frame::Side;
use wire::sqlstate::SqlState;

use super::{Beyond, Database, Here, Keeps, NotOpened, Pool, Recent, Server, Welcome, lock};
use crate::app::{App, Cell};
use crate::carry;
use crate::engine::{Command, EngineHandle};
use crate::proxy::Shared;
use crate::session::{Identity, Leg, Session, terminate};

/// What an engine has done for it.
pub(crate) enum Job {
    /// Open a server.
    Open { app: Arc<App>, pool: Arc<Pool>, engine: Arc<EngineHandle> },
    /// Look at what a session has left.
    Look(Box<Session>),
}

/// Servers that are opened, and sessions that are looked at, at the same time.
const AT_ONCE: usize = 16;
/// Of the time that asking takes, so many times as much passes until the next.
const ASKING_PART: u32 = 10;
/// A setting of whatever name takes more.
const UNNAMED_BYTES_MIN: u64 = 100;
const LEARN_TRIES: usize = 4;
/// Whoever waits for a server is told of the failure by then, and another is tried.
const OPEN_MAX: Duration = Duration::from_secs(30);
/// Between two questions whether anything was defined anew.
const CHANGED_PAUSE: Duration = Duration::from_secs(1);
/// What was learned for looks holds for so long.
const FACTS_AGE_MAX: Duration = Duration::from_secs(5);

/// What a fenced server says of all its sessions. It is no state of theirs.
pub(crate) const FENCE: &str = "default_transaction_read_only";

/// Custom settings that roles or databases have by default, and that the session has as well.
const CUSTOM_DEFAULTS: &str = "SELECT DISTINCT pg_catalog.lower(name) FROM (SELECT pg_catalog.split_part(c, '=', 1) AS name \
    FROM pg_catalog.pg_db_role_setting, pg_catalog.unnest(setconfig) c) n \
    WHERE pg_catalog.strpos(name, '.') OPERATOR(pg_catalog.>) 0 AND pg_catalog.current_setting(name, true) IS NOT NULL";

/// Runs until the task is dropped. Of jobs there is at most one for each session and each server that limits allow.
pub(crate) async fn run(shared: Arc<Shared>, mut jobs: mpsc::UnboundedReceiver<Job>) {
    let (opens, looks) = (Arc::new(Semaphore::new(AT_ONCE)), Arc::new(Semaphore::new(AT_ONCE)));
    while let Some(job) = jobs.recv().await {
        let (shared, opens, looks) = (shared.clone(), opens.clone(), looks.clone());
        tokio::spawn(async move {
            match job {
                Job::Open { app, pool, engine } => {
                    let result = loop {
                        // While it is held there is nothing to open; once it is released nobody waits for the next tick.
                        // Whoever is to be looked at does not wait behind it.
                        let _ = timeout(OPEN_MAX, app.pass_gate()).await;
                        let _place = opens.acquire().await;
                        if let Some(result) = open(&app, &pool).await {
                            break result;
                        }
                    };
                    if let Err(NotOpened { error, .. }) = &result {
                        tracing::warn!(
                            app = app.name,
                            error,
                            "a server connection cannot be opened"
                        );
                    }
                    engine.send(Command::Opened(pool, result));
                }
                Job::Look(session) => {
                    let _place = looks.acquire().await;
                    look(&shared, session).await;
                }
            }
        });
    }
}

/// What a login gives.
pub(crate) enum Learned {
    /// What the sessions of the pool have.
    Same(Arc<Welcome>),
    /// Its sessions have logged in to another server, where it was something else.
    Other { here: Arc<Welcome>, before: Arc<Welcome> },
}

/// None if the application goes on elsewhere meanwhile, where another is to be opened.
async fn open(app: &App, pool: &Pool) -> Option<Result<Box<Server>, NotOpened>> {
    let Some(cell) = app.active() else {
        return Some(Err(NotOpened::new("the application is held")));
    };
    let opened = timeout(OPEN_MAX, app.while_at(&cell, log_in(app, pool, cell.clone()))).await;
    opened.unwrap_or_else(|_| {
        Some(Err(NotOpened::new(format!("it is not open within {OPEN_MAX:?}"))))
    })
}

async fn log_in(app: &App, pool: &Pool, cell: Arc<Cell>) -> Result<Box<Server>, NotOpened> {
    let identity = pool.identity().ok_or_else(|| NotOpened::new("nobody has logged in"))?;
    let login = Login { params: identity.params.clone(), credential: identity.credential.clone() };
    if pool.is_lost.load(Ordering::Relaxed) {
        let error = "roles and the configuration have changed since the session's login";
        return Err(NotOpened { error: error.into(), refused: Some(SqlState::ADMIN_SHUTDOWN) });
    }
    let before = pool.welcome(&cell);
    let mut opened = match &before {
        Some(old) if pool.is_retired.load(Ordering::Relaxed) => {
            Some(as_before(old, (&cell, &old.facts), &identity, app).await?)
        }
        _ => None,
    };
    if opened.is_none() {
        let connection = cell.target.login(&login).await.map_err(|error| {
            let state = match &error {
                ConnectError::Refused { sqlstate, .. } => Some(*sqlstate),
                _ => None,
            };
            // Of who logs in, and where to: classes 28 and 3D, and rights.
            let refused = state.filter(|state| {
                let code = state.to_string();
                code.starts_with("28") || code.starts_with("3D") || code == "42501"
            });
            NotOpened { error: model::chain(&error), refused }
        })?;
        ask_marks(app, &cell).await.map_err(NotOpened::new)?;
        opened = match &before {
            // Since the last look roles or their defaults have changed: this is not what its sessions had.
            Some(old) if pool.is_retired.load(Ordering::Relaxed) => {
                Some(as_before(old, (&cell, &old.facts), &identity, app).await?)
            }
            _ => Some(connection),
        };
    }
    let Some(mut connection) = opened else { return Err(NotOpened::new("it is not open")) };
    let welcome = {
        let _one = pool.welcoming.lock().await;
        match pool.learn(app, &cell, &identity, &mut connection).await.map_err(NotOpened::new)? {
            Learned::Same(welcome) => welcome,
            Learned::Other { here, before } => {
                // Its sessions keep what they had on the other server.
                app.pools.retire_one(pool);
                connection = as_before(&before, (&cell, &here.facts), &identity, app).await?;
                load_library(&mut connection).await.map_err(NotOpened::new)?;
                let asked = pool.ask(app, &cell, &identity, &mut connection).await;
                let welcome = asked.map_err(NotOpened::new)?;
                pool.rebase(before, &welcome);
                welcome
            }
        }
    };
    let params = app.share(std::mem::take(&mut connection.params));
    if app.lifts_fence(&params).await {
        let error = "its role or database sets `default_transaction_read_only` to off, and the cell takes no writes";
        return Err(NotOpened::new(error));
    }
    let (pid, secret) = (connection.pid, std::mem::take(&mut connection.secret).into());
    let parted = connection.into_stream();
    let (stream, unread) = parted.map_err(|error| NotOpened::new(error.to_string()))?;
    let leg = Leg::new(
        stream.into_parts().map_err(|error| NotOpened::new(error.to_string()))?,
        unread,
        Side::Backend,
    );
    let here = Here { params: Some(params), ..Here::default() };
    Ok(Box::new(Server { leg, pid, secret, cell: welcome.cell.clone(), here }))
}

/// A login of now may give something else.
async fn as_before(
    old: &Welcome,
    (cell, facts): (&Cell, &Facts),
    identity: &Identity,
    app: &App,
) -> Result<Connection, NotOpened> {
    let opened = carry::login_as_before(old, (cell, facts), identity, app.moves).await;
    let mut connection = opened.map_err(|reason| NotOpened::new(reason.to_string()))?;
    // A custom setting that has a default by now cannot be taken away from a login.
    let rows = connection.rows(CUSTOM_DEFAULTS).await;
    let rows = rows.map_err(|error| NotOpened::new(model::chain(&error)))?;
    let is_new = |name: &String| {
        !old.fresh.custom.contains_key(name) && !old.fresh.settings.contains_key(name)
    };
    match rows.into_iter().flatten().flatten().find(is_new) {
        Some(name) => {
            let error = format!("since the session's login `{name}` has a default");
            Err(NotOpened { error, refused: Some(SqlState::ADMIN_SHUTDOWN) })
        }
        None => Ok(connection),
    }
}

/// A look at a session loads this library, whose settings are there from then on: so they always are. Where the language is
/// missing, they never are.
async fn load_library(connection: &mut Connection) -> Result<(), String> {
    match connection.rows("DO LANGUAGE plpgsql 'BEGIN END'").await {
        Ok(_) | Err(QueryError::Server { .. }) => Ok(()),
        Err(error) => Err(model::chain(&error)),
    }
}

/// The two marks of an answer.
fn marks_of(rows: Vec<Row>) -> (String, String) {
    let mut marks = rows.into_iter().next().unwrap_or_default().into_iter();
    let mut next = || marks.next().flatten().unwrap_or_default();
    (next(), next())
}

/// Whether logins that are known still hold.
async fn ask_marks(app: &App, cell: &Cell) -> Result<(), String> {
    let say = |error: &dyn std::error::Error| model::chain(error);
    let mut admin = Admin::connect(&cell.target, &app.admin).await.map_err(|error| say(&error))?;
    let rows = admin.rows(landscape::LOGINS_QUESTION).await.map_err(|error| say(&error))?;
    let (loaded, logins) = marks_of(rows);
    app.pools.mark(&cell.name, &loaded, &logins);
    Ok(())
}

impl Pool {
    /// Makes `connection`, a fresh login, what every server of the pool is, and finds out what that gives, unless it is
    /// known. The caller is [the only one](Pool::welcoming).
    ///
    /// # Errors
    /// The server does not answer as it should, in words.
    pub(crate) async fn learn(
        &self,
        app: &App,
        cell: &Arc<Cell>,
        identity: &Identity,
        connection: &mut Connection,
    ) -> Result<Learned, String> {
        load_library(connection).await?;
        if let Some(known) = self.welcome(cell) {
            return Ok(Learned::Same(known));
        }
        let here = self.ask(app, cell, identity, connection).await?;
        match self.elsewhere().filter(|before| !here.is_as(before)) {
            Some(before) => {
                let (app, cell) = (&app.name, &cell.name);
                tracing::info!(
                    app,
                    cell,
                    "a login gives something else than where sessions were before"
                );
                Ok(Learned::Other { here, before })
            }
            None => {
                self.know(&here);
                Ok(Learned::Same(here))
            }
        }
    }

    /// From now on a login gives this.
    pub(crate) fn know(&self, welcome: &Arc<Welcome>) {
        let mut known = lock(&self.known);
        (known.welcome, known.elsewhere) = (Some(welcome.clone()), None);
    }

    async fn ask(
        &self,
        app: &App,
        cell: &Arc<Cell>,
        identity: &Identity,
        connection: &mut Connection,
    ) -> Result<Arc<Welcome>, String> {
        let facts = app
            .learn_facts(cell, &self.database.name)
            .await
            .map_err(|reason| reason.to_string())?;
        if self.database.landscape().is_none() {
            renew(app, cell, &self.database, &mut None).await?;
        }
        let mut fresh = carry::fresh(connection, identity, &facts, app.moves)
            .await
            .map_err(|reason| reason.to_string())?;
        let source = connection.value(carry::FENCE_SOURCE).await;
        let source = source.map_err(|error| model::chain(&error))?.unwrap_or_default();
        // What the fence says of every login is not the login's own.
        if app.is_fenced() && !carry::is_own_source(&source) {
            fresh.settings.insert(FENCE.into(), "off".into());
            if let Some(beneath) = &mut fresh.beneath {
                beneath.remove(FENCE);
            }
        }
        let params = app.share(connection.params.clone());
        Ok(Arc::new(Welcome { cell: cell.clone(), params, facts, fresh }))
    }
}

/// Learns what names stand for, if anything has changed.
async fn renew(
    app: &App,
    cell: &Cell,
    database: &Database,
    kept: &mut Option<Admin>,
) -> Result<(), String> {
    let say = |error: &dyn std::error::Error| model::chain(error);
    let (mut before, doubts) = {
        let state = lock(&database.state);
        (state.redefined, state.doubts)
    };
    let ask = async {
        let mut admin = match kept.take() {
            Some(admin) => admin,
            None => {
                let login = AdminLogin { database: database.name.clone(), ..app.admin.clone() };
                let mut admin =
                    Admin::connect(&cell.target, &login).await.map_err(|error| say(&error))?;
                // Somebody may hold what is to be described, while everybody waits for that.
                let soon = "SET lock_timeout = '100ms'";
                admin.rows(soon).await.map_err(|error| say(&error))?;
                admin
            }
        };
        let rows = admin.rows(landscape::CHANGED_QUESTION).await.map_err(|error| say(&error))?;
        let mark = rows.into_iter().flatten().flatten().next().unwrap_or_default();
        if !lock(&database.state).is_at(&mark) {
            let mut rows = admin.rows(landscape::QUESTION).await;
            for _ in 1..LEARN_TRIES {
                // Something was dropped while it was described.
                let Err(QueryError::Server { .. }) = rows else { break };
                rows = admin.rows(landscape::QUESTION).await;
            }
            let rows = rows.map_err(|error| say(&error))?;
            let learned = Landscape::read(&rows).map_err(|error| error.to_string())?;
            let mut state = lock(&database.state);
            let is_first = state.landscape.is_none();
            (state.landscape, state.mark) = (Some(Arc::new(learned)), mark);
            if state.redefined == before && !is_first {
                // By somebody else.
                state.redefined += 1;
                before += 1;
            }
            // Something may have been defined while it was learned.
            state.is_stale = state.redefined != before;
        }
        // What is doubted since may not be in the mark.
        lock(&database.state).settled = doubts;
        *kept = Some(admin);
        Ok(())
    };
    let wait_max = app.moves.answer_timeout;
    timeout(wait_max, ask).await.unwrap_or_else(|_| Err(format!("no answer within {wait_max:?}")))
}

/// Asks every second, and whenever a session has defined something, what names stand for by now.
pub(crate) async fn watch(shared: Arc<Shared>, app: Arc<App>) {
    let mut kept: HashMap<(String, String), Option<Admin>> = HashMap::new();
    let mut took = Duration::ZERO;
    loop {
        // However much there is to ask, it is a small part of the time; unless somebody waits for the answer.
        let pause = CHANGED_PAUSE.max(took * ASKING_PART);
        let _ = timeout(pause, app.pools.changed.notified()).await;
        let began = Instant::now();
        let Some(cell) = app.active() else {
            kept.clear();
            for database in app.pools.databases() {
                // A session in a transaction must come to its end.
                tell_learned(&shared, &app, &database, false);
            }
            continue;
        };
        kept.retain(|(of_cell, _), _| *of_cell == cell.name);
        for database in app.pools.databases() {
            let admin = kept.entry((cell.name.clone(), database.name.clone())).or_default();
            let Some(renewed) = app.while_at(&cell, renew(&app, &cell, &database, admin)).await
            else {
                // Whoever waits asks again there.
                app.pools.ask_now();
                break;
            };
            tell_learned(&shared, &app, &database, renewed.is_ok());
            if let Err(error) = renewed {
                // Nothing is known of what may have been defined since.
                lock(&database.state).is_stale = true;
                tracing::warn!(
                    app = app.name,
                    database = database.name,
                    error,
                    "names cannot be learned"
                );
                continue;
            }
            // It is put back once it has answered.
            let Some(mut asked) = admin.take() else { continue };
            let wait_max = app.moves.answer_timeout;
            let ask = timeout(wait_max, asked.rows(landscape::LOGINS_QUESTION));
            let Some(Ok(Ok(rows))) = app.while_at(&cell, ask).await else {
                // Whatever has changed meanwhile shows beside the marks of before, to the next who asks.
                continue;
            };
            let (loaded, logins) = marks_of(rows);
            let read = (asked.connection.pid, loaded);
            *admin = Some(asked);
            app.pools.mark_logins(&cell.name, &logins);
            if app.pools.knows_read(&cell.name, &database.name, &read) {
                continue;
            }
            let fresh = timeout(wait_max, ask_marks(&app, &cell));
            if let Some(Ok(Ok(()))) = app.while_at(&cell, fresh).await {
                app.pools.note_read(&cell.name, &database.name, read);
            }
        }
        took = began.elapsed();
    }
}

/// Whoever waits for names goes on, whether they are known or not.
fn tell_learned(shared: &Shared, app: &Arc<App>, database: &Database, is_learned: bool) {
    let was_waited_for = {
        let mut state = lock(&database.state);
        state.failures = if is_learned { 0 } else { state.failures.saturating_add(1) };
        std::mem::take(&mut state.is_waited_for)
    };
    if was_waited_for {
        for engine in &shared.engines {
            engine.send(Command::Resume(app.clone()));
        }
    }
}

/// Looks at what a session has left on its server, and gives it back to its engine.
async fn look(shared: &Shared, mut session: Box<Session>) {
    let (app, cell) = (session.app.clone(), session.cell.clone());
    let found = match app.while_at(&cell, Box::pin(find(&mut session))).await {
        Some(found) => found,
        None => {
            // It may have been asked something that it has not answered.
            carry::cut(&mut session);
            Err("its server is lost".into())
        }
    };
    if let Ok(state) = &found {
        session.on_state(state);
    }
    if let Some(sharing) = &mut session.sharing {
        // Whatever it was, it is known by now.
        sharing.assigned.clear();
        sharing.has_set = false;
        sharing.is_unsettled = false;
        match found {
            Ok(state) => {
                sharing.here.state = state.clone();
                sharing.state = state;
                sharing.keeps = None;
            }
            Err(why) => {
                sharing.keeps =
                    Some(Keeps { leaves: Leaves::SOMETHING, why, is_new: false, passes: false })
            }
        }
    }
    shared.give(session);
}

/// What the session has beyond a login, if that can be given to other servers; otherwise why not.
async fn find(session: &mut Session) -> Result<super::State, String> {
    let sharing = session.sharing.as_ref().ok_or("it does not share servers")?;
    let pool = sharing.pool.clone();
    if pool.welcome(&session.cell).is_none() {
        // Since a reload nobody has logged in.
        let opened = open(&session.app, &pool).await.ok_or("its server is lost")?;
        let mut server = opened.map_err(|failure| failure.error)?;
        terminate(&mut server.leg);
    }
    let welcome = pool.welcome(&session.cell).ok_or("nothing is known of its server")?;
    let facts = pool.recent_facts(&session.app, &session.cell).await?;
    carry::forget_foreign(session).await.map_err(|reason| reason.to_string())?;
    let mut captured = carry::look(session, &facts).await.map_err(|reason| reason.to_string())?;
    captured.complete(&facts, session.backend_pid);
    let is_of_fence = session.app.is_fenced()
        && !carry::only_reads_by_itself(session).await.map_err(|reason| reason.to_string())?;
    if is_of_fence {
        // It has set nothing by itself, so it is what a login gives.
        let given = welcome.fresh.settings.get(FENCE);
        captured.snapshot.settings.extend(given.map(|value| (FENCE.to_owned(), value.clone())));
    }
    if let Some(pin) = captured.pins.first().or(captured.snapshot.may_have_unnamed.as_ref()) {
        return Err(pin.to_string());
    }
    let snapshot = captured.snapshot;
    let bytes = |of: &Snapshot| of.setting_bytes.unwrap_or(0);
    let may_hide = session.sharing.as_ref().and_then(|sharing| sharing.keeps.as_ref());
    let may_hide = may_hide.is_some_and(|keeps| keeps.leaves.something);
    if may_hide && bytes(&snapshot).abs_diff(bytes(&welcome.fresh)) >= UNNAMED_BYTES_MIN {
        // It has settings, perhaps some that nobody has named. A copy of what is known must take as much.
        carry::prove_settings(session, &snapshot, &facts)
            .await
            .map_err(|reason| reason.to_string())?;
    }
    let is_own = |name: &&String| snapshot.custom.get(*name) != welcome.fresh.custom.get(*name);
    let mut named = snapshot.custom.keys().filter(is_own).chain(&session.hints.custom);
    if let Some(name) = named.find(|name| decides_compiling(name)) {
        return Err(format!("functions are compiled under its `{name}`"));
    }
    let names = session.sharing.as_ref().map(|sharing| sharing.server_names()).unwrap_or_default();
    if let Some(name) = snapshot.prepared.keys().find(|name| !names.contains(name.as_bytes())) {
        return Err(format!("it has prepared `{name}`"));
    }
    let rest = Snapshot {
        settings: Default::default(),
        custom: Default::default(),
        prepared: Default::default(),
        beneath: None,
        setting_bytes: None,
        may_have_unnamed: None,
        session_user: String::new(),
        role: String::new(),
        ..snapshot.clone()
    };
    let kinds = [
        ("libraries that it has loaded", !rest.libraries.is_empty()),
        ("temporary objects", !rest.temporary.is_empty()),
        ("cursors", !rest.cursors.is_empty()),
        ("advisory locks", !rest.locks.is_empty()),
        ("channels that it listens to", !rest.channels.is_empty()),
        ("values of sequences", !rest.sequences.is_empty() || rest.last_value.is_some()),
    ];
    if let Some((what, _)) = kinds.iter().find(|(_, is_there)| *is_there) {
        return Err(format!("it has {what}"));
    }
    if rest != Snapshot::default() {
        return Err("it has what is not known to be nothing".into());
    }
    Ok(pool.state(Beyond::of(&snapshot), &welcome.fresh))
}

impl Pool {
    /// What is the same for all sessions, not older than a few seconds.
    async fn recent_facts(&self, app: &App, cell: &Cell) -> Result<Arc<Facts>, String> {
        let mut recent = self.recent.lock().await;
        let redefined = self.database.redefined();
        let reloads = self.reloads.load(Ordering::SeqCst);
        if let Some(known) = &*recent
            && known.at.elapsed() < FACTS_AGE_MAX
            && known.cell == cell.name
            && known.redefined == redefined
            && known.reloads == reloads
        {
            return Ok(known.facts.clone());
        }
        let at = Instant::now();
        let facts = app
            .learn_facts(cell, &self.database.name)
            .await
            .map_err(|reason| reason.to_string())?;
        *recent =
            Some(Recent { at, cell: cell.name.clone(), redefined, reloads, facts: facts.clone() });
        Ok(facts)
    }
}
