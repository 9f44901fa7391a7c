//! Which server goes to which session. A pool's servers are lent to one session at a time, the rest of the time they
//! are idle; sessions that find none wait in line.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::app::App;
use crate::config::PoolLimits;
use crate::pool::{Pool, Server, State, same_state, transition};

/// So much longer a session must have waited for a server to be closed for it that others of their kind wait for.
const OTHER_KIND_WAIT: Duration = Duration::from_millis(100);

/// A server's place in the table, for as long as its connection lasts.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) pool: u64,
    /// The slot of the session that it is lent to.
    pub(super) lent_to: Option<usize>,
    /// While it is lent to nobody.
    pub(super) idle: Option<Box<Server>>,
    /// The session keeps it.
    pub(super) is_kept: bool,
}

/// A pool as its engine sees it.
#[derive(Debug)]
struct InLine {
    app: Arc<App>,
    pool: Arc<Pool>,
    /// The one that was idle last is lent first: the others may become superfluous.
    idle: Vec<usize>,
    /// Slots, the ids of the sessions there, and since when they wait.
    waiting: VecDeque<(usize, u64, Instant)>,
    opening: usize,
    /// Why the last server could not be opened.
    failure: Option<String>,
}

/// What a session that needs a server gets.
#[derive(Debug)]
pub(super) enum Lent {
    /// This one, after these statements if there are any.
    Server(usize, Box<Server>, Option<String>),
    /// It waits in line; so many servers are to be opened.
    Wait,
}

/// What has to be done besides.
#[derive(Debug, Default)]
pub(super) struct Chores {
    pub(super) open: Vec<(Arc<App>, Arc<Pool>)>,
    /// Servers that nobody needs any more.
    pub(super) close: Vec<(usize, Box<Server>)>,
}

#[derive(Debug, Default)]
pub(super) struct Lending {
    entries: Vec<Option<Entry>>,
    /// Generations tell an event of a server from one of its successor in the same place.
    generations: Vec<u32>,
    free: Vec<usize>,
    pools: HashMap<u64, InLine>,
    counts: Vec<(Arc<App>, Count)>,
}

/// How many servers of an application there are. Those that are being opened count as shared.
#[derive(Debug, Clone, Copy, Default)]
struct Count {
    shared: usize,
    kept: usize,
}

impl Count {
    fn of(&mut self, is_kept: bool) -> &mut usize {
        if is_kept { &mut self.kept } else { &mut self.shared }
    }

    fn less(&mut self, is_kept: bool) {
        let count = self.of(is_kept);
        *count = count.saturating_sub(1);
    }

    /// There may be no more. `away` are those of sessions that have left the engine for a while.
    fn is_full(self, limits: PoolLimits, away: usize) -> bool {
        let total = self.shared + self.kept + away;
        self.shared >= limits.size || total >= limits.size + limits.kept_max
    }
}

impl Lending {
    pub(super) fn generation(&self, at: usize) -> u32 {
        self.generations.get(at).copied().unwrap_or(0)
    }

    pub(super) fn entry(&mut self, at: usize) -> Option<&mut Entry> {
        self.entries.get_mut(at)?.as_mut()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pools.is_empty()
    }

    fn line(&mut self, app: &Arc<App>, pool: &Arc<Pool>) -> &mut InLine {
        self.pools.entry(pool.id).or_insert_with(|| InLine {
            app: app.clone(),
            pool: pool.clone(),
            idle: Vec::new(),
            waiting: VecDeque::new(),
            opening: 0,
            failure: None,
        })
    }

    /// Takes a server into the table that a session has brought, or that is to be idle.
    pub(super) fn admit(
        &mut self,
        app: &Arc<App>,
        pool: &Arc<Pool>,
        lent_to: Option<usize>,
    ) -> usize {
        self.line(app, pool);
        self.count(app).shared += 1;
        let at = self.free.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.generations.push(0);
            self.entries.len() - 1
        });
        let entry = Entry { pool: pool.id, lent_to, idle: None, is_kept: false };
        if let Some(place) = self.entries.get_mut(at) {
            *place = Some(entry);
        }
        at
    }

    /// Forgets a server, which is closed or goes with its session.
    pub(super) fn dismiss(&mut self, at: usize) -> Option<Box<Server>> {
        let entry = self.entries.get_mut(at)?.take()?;
        if let Some(generation) = self.generations.get_mut(at) {
            *generation = generation.wrapping_add(1);
        }
        self.free.push(at);
        if let Some(line) = self.pools.get_mut(&entry.pool) {
            line.idle.retain(|idle| *idle != at);
            let app = line.app.clone();
            self.count(&app).less(entry.is_kept);
        }
        entry.idle
    }

    /// The session that has a server keeps it, or does so no more.
    pub(super) fn set_kept(&mut self, at: usize, is_kept: bool) {
        let Some(entry) = self.entry(at) else { return };
        let was_kept = std::mem::replace(&mut entry.is_kept, is_kept);
        let pool = entry.pool;
        if was_kept != is_kept
            && let Some(line) = self.pools.get(&pool)
        {
            let app = line.app.clone();
            let count = self.count(&app);
            count.less(was_kept);
            *count.of(is_kept) += 1;
        }
    }

    /// There are more servers than may be shared, such as after a look: one that is free is given up.
    pub(super) fn is_over(&mut self, app: &Arc<App>) -> bool {
        let count = *self.count(app);
        let over = |limits: PoolLimits| {
            count.shared > limits.size || count.shared + count.kept > limits.size + limits.kept_max
        };
        app.pool.is_some_and(over)
    }

    fn count(&mut self, app: &Arc<App>) -> &mut Count {
        let known = self.counts.iter().position(|(one, _)| Arc::ptr_eq(one, app));
        let at = known.unwrap_or_else(|| {
            self.counts.push((app.clone(), Count::default()));
            self.counts.len() - 1
        });
        &mut self.counts[at].1
    }

    /// Gives the session in `slot` a server, or a place in line.
    pub(super) fn ask(
        &mut self,
        app: &Arc<App>,
        pool: &Arc<Pool>,
        state: &State,
        (slot, id): (usize, u64),
        chores: &mut Chores,
    ) -> Lent {
        let line = self.line(app, pool);
        // Those who wait have come before.
        if line.waiting.is_empty()
            && let Some((at, text)) = self.fitting(pool, state)
            && let Some(server) = self.take_idle(at, slot)
        {
            return Lent::Server(at, server, text);
        }
        self.line(app, pool).waiting.push_back((slot, id, Instant::now()));
        self.provide(app, pool, chores);
        Lent::Wait
    }

    /// An idle server that is in `state`, or can be brought there.
    fn fitting(&self, pool: &Pool, state: &State) -> Option<(usize, Option<String>)> {
        let line = self.pools.get(&pool.id)?;
        let idle = |at: &usize| self.entries.get(*at)?.as_ref()?.idle.as_deref();
        let is_same =
            |at: &&usize| idle(at).is_some_and(|server| same_state(&server.here.state, state));
        if let Some(at) = line.idle.iter().rev().find(is_same) {
            return Some((*at, None));
        }
        line.idle.iter().rev().find_map(|at| {
            let server = idle(at)?;
            let welcome = pool.welcome(&server.cell)?;
            let bound = pool.database.bound().of(server.here.is_used);
            Some((*at, Some(transition(&server.here.state, state, &welcome, bound)?)))
        })
    }

    fn take_idle(&mut self, at: usize, slot: usize) -> Option<Box<Server>> {
        let entry = self.entry(at)?;
        let server = entry.idle.take()?;
        entry.lent_to = Some(slot);
        let pool = entry.pool;
        if let Some(line) = self.pools.get_mut(&pool) {
            line.idle.retain(|idle| *idle != at);
        }
        Some(server)
    }

    /// Sees to it that servers are opened for those who wait, as far as the limits go. If they do not go that far, an
    /// idle server that does not fit makes room.
    pub(super) fn provide(&mut self, app: &Arc<App>, pool: &Arc<Pool>, chores: &mut Chores) {
        let Some(limits) = app.pool else { return };
        let (needed, failed) = match self.pools.get(&pool.id) {
            Some(line) => (line.waiting.len(), line.failure.is_some()),
            None => return,
        };
        // After a failure one is tried at a time.
        let at_once = if failed { 1 } else { needed };
        while self.pools.get(&pool.id).is_some_and(|line| line.opening < at_once) {
            if self.count(app).is_full(limits, app.pools.away()) {
                let Some(at) = self.superfluous(app, pool) else { return };
                if let Some(server) = self.dismiss(at) {
                    chores.close.push((at, server));
                }
            }
            self.line(app, pool).opening += 1;
            self.count(app).shared += 1;
            chores.open.push((app.clone(), pool.clone()));
        }
    }

    /// An idle server that nobody waits for: of another pool, or in a state that those who wait have no use for.
    fn superfluous(&self, app: &Arc<App>, pool: &Pool) -> Option<usize> {
        let others = self.pools.values().filter(|line| Arc::ptr_eq(&line.app, app));
        let others = others.filter(|line| line.pool.id != pool.id && line.waiting.is_empty());
        let mut idle = others.filter_map(|line| line.idle.first().copied());
        idle.next().or_else(|| self.pools.get(&pool.id)?.idle.first().copied())
    }

    /// A server is free. It goes to whoever waits first, or is kept idle. If it cannot be what the first needs, another
    /// is opened in its place.
    pub(super) fn put_back(
        &mut self,
        at: usize,
        server: Box<Server>,
        state_of: impl Fn(usize, u64) -> Option<State>,
        chores: &mut Chores,
    ) -> Option<(usize, Box<Server>, Option<String>)> {
        let pool = self.entry(at)?.pool;
        let line = self.pools.get_mut(&pool)?;
        line.failure = None;
        let first = loop {
            let Some((slot, id, since)) = line.waiting.pop_front() else { break None };
            // One that has ended, or is held, has left the line.
            if let Some(state) = state_of(slot, id) {
                break Some((slot, id, since, state));
            }
        };
        let app = line.app.clone();
        if let Some(other) = self.longer_waiting(&app, pool, first.as_ref().map(|first| first.2)) {
            // Of another kind: a server of this one makes room.
            if let Some((slot, id, since, _)) = first {
                self.line_of(pool)?.waiting.push_front((slot, id, since));
            }
            self.dismiss(at);
            chores.close.push((at, server));
            self.provide(&app, &other, chores);
            return None;
        }
        let line = self.pools.get_mut(&pool)?;
        let Some((slot, id, since, state)) = first else {
            line.idle.push(at);
            let entry = self.entry(at)?;
            entry.lent_to = None;
            entry.idle = Some(server);
            return None;
        };
        let text = if same_state(&server.here.state, &state) {
            Some(None)
        } else {
            let welcome = line.pool.welcome(&server.cell);
            let bound = line.pool.database.bound().of(server.here.is_used);
            let text =
                welcome.and_then(|welcome| transition(&server.here.state, &state, &welcome, bound));
            text.map(Some)
        };
        match text {
            Some(text) => {
                let entry = self.entry(at)?;
                entry.lent_to = Some(slot);
                Some((slot, server, text))
            }
            None => {
                line.waiting.push_front((slot, id, since));
                let (app, pool) = (line.app.clone(), line.pool.clone());
                self.dismiss(at);
                chores.close.push((at, server));
                self.provide(&app, &pool, chores);
                None
            }
        }
    }

    fn line_of(&mut self, pool: u64) -> Option<&mut InLine> {
        self.pools.get_mut(&pool)
    }

    /// The pool whose first in line has waited for noticeably longer, while no server may be opened for it.
    fn longer_waiting(
        &mut self,
        app: &Arc<App>,
        pool: u64,
        than: Option<Instant>,
    ) -> Option<Arc<Pool>> {
        let limits = app.pool?;
        if !self.count(app).is_full(limits, app.pools.away()) {
            return None;
        }
        let others = self
            .pools
            .iter()
            .filter(|(id, line)| **id != pool && Arc::ptr_eq(&line.app, app) && line.opening == 0);
        let firsts = others.filter_map(|(_, line)| Some((line.waiting.front()?.2, &line.pool)));
        let (since, other) = firsts.min_by_key(|(since, _)| *since)?;
        let is_longer = than.is_none_or(|than| since + OTHER_KIND_WAIT < than);
        is_longer.then(|| other.clone())
    }

    pub(super) fn someone_waits(&self, pool: u64) -> bool {
        self.pools.get(&pool).is_some_and(|line| !line.waiting.is_empty())
    }

    /// A server was to be opened, and that has ended. Gives the application if the pool is known.
    pub(super) fn opened(
        &mut self,
        pool: u64,
        failure: Option<String>,
    ) -> Option<(Arc<App>, Arc<Pool>)> {
        let line = self.pools.get_mut(&pool)?;
        line.opening = line.opening.saturating_sub(1);
        line.failure = failure;
        let known = (line.app.clone(), line.pool.clone());
        self.count(&known.0).less(false);
        Some(known)
    }

    /// Those who wait, with why servers cannot be opened.
    pub(super) fn waiting(&self) -> Vec<(usize, u64, Option<String>)> {
        let lines = self.pools.values();
        let of_line = |line: &InLine| -> Vec<_> {
            line.waiting.iter().map(|(slot, id, _)| (*slot, *id, line.failure.clone())).collect()
        };
        lines.flat_map(of_line).collect()
    }

    pub(super) fn waiting_in(&self, pool: u64) -> Vec<(usize, u64)> {
        let line = self.pools.get(&pool).into_iter();
        line.flat_map(|line| line.waiting.iter().map(|(slot, id, _)| (*slot, *id))).collect()
    }

    pub(super) fn leave_line(&mut self, pool: u64, id: u64) {
        if let Some(line) = self.pools.get_mut(&pool) {
            line.waiting.retain(|(_, waits, _)| *waits != id);
        }
    }

    /// Tries again for those who still wait.
    pub(super) fn retry(&mut self, chores: &mut Chores) {
        let lines: Vec<_> = self
            .pools
            .values()
            .filter(|line| !line.waiting.is_empty() && line.opening == 0)
            .map(|line| (line.app.clone(), line.pool.clone()))
            .collect();
        for (app, pool) in lines {
            if app.active().is_some() {
                self.provide(&app, &pool, chores);
            }
        }
    }

    /// Forgets pools that no session has any more and that get no new ones.
    pub(super) fn forget_unused(&mut self, chores: &mut Chores) {
        let unused = |line: &InLine| Arc::strong_count(&line.pool) == 1 && line.opening == 0;
        let lines = self.pools.iter().filter(|(_, line)| unused(line));
        let unused: Vec<u64> = lines.map(|(id, _)| *id).collect();
        for id in unused {
            let idle = self.pools.get(&id).map(|line| line.idle.clone()).unwrap_or_default();
            for at in idle {
                chores.close.extend(self.dismiss(at).map(|server| (at, server)));
            }
            self.pools.remove(&id);
        }
    }

    /// Idle servers of an application, which are given up.
    pub(super) fn give_up_idle(&mut self, app: &Arc<App>) -> Vec<(usize, Box<Server>)> {
        let lines = self.pools.values().filter(|line| Arc::ptr_eq(&line.app, app));
        let idle: Vec<usize> = lines.flat_map(|line| line.idle.iter().copied()).collect();
        idle.into_iter().filter_map(|at| Some((at, self.dismiss(at)?))).collect()
    }

    /// For tables: application, user, database, and servers that are idle, lent, kept and being opened, and sessions
    /// that wait.
    pub(super) fn views(&self) -> Vec<PoolView> {
        let view = |(id, line): (&u64, &InLine)| {
            let of_pool = self.entries.iter().flatten().filter(|entry| entry.pool == *id);
            let (kept, lent): (Vec<_>, Vec<_>) =
                of_pool.filter(|entry| entry.lent_to.is_some()).partition(|entry| entry.is_kept);
            PoolView {
                app: line.app.name.clone(),
                user: line.pool.user.clone(),
                database: line.pool.database.name.clone(),
                idle: line.idle.len(),
                lent: lent.len(),
                kept: kept.len(),
                opening: line.opening,
                waiting: line.waiting.len(),
                failure: line.failure.clone().unwrap_or_default(),
            }
        };
        let mut views: Vec<PoolView> = self.pools.iter().map(view).collect();
        views.sort_by(|a, b| (&a.app, &a.database, &a.user).cmp(&(&b.app, &b.database, &b.user)));
        views
    }
}

/// A pool, for tables.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct PoolView {
    pub app: String,
    pub user: String,
    pub database: String,
    pub idle: usize,
    pub lent: usize,
    pub kept: usize,
    pub opening: usize,
    pub waiting: usize,
    pub failure: String,
}
