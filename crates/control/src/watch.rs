//! Looks at the active cell's server of each application again and again, and fails over by itself where that is
//! asked for.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use model::Lsn;
use model::audit::Asking;
use model::cell::{Application, CellState};
use model::durability::{Keeper, Step};
use model::failover::{Analysis, Answer, Detector, Process, Sight};
use model::following::Followers;
use model::persisted::Execution;
use model::switchover::{Ending, Kind};
use pg::admin::Admin;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::config::{AppServers, CellServer};
use crate::control::{Control, now_ms};
use crate::durability;
use crate::following;
use crate::member::Member;
use crate::plans::By;
use crate::requests::{ControlError, FailoverRequest};
use crate::stages;

/// Between two questions to the server.
const PAUSE: Duration = Duration::from_millis(250);
/// How long a server that answers may take to say more.
const LOOK_MAX: Duration = Duration::from_secs(2);
/// Between two looks whether standbys follow.
const FOLLOW_PAUSE: Duration = Duration::from_secs(1);
/// Between two tries of what did not succeed, which double each time, and the longest. After that it is new.
const TRY_PAUSE: Duration = Duration::from_secs(5);
const TRY_PAUSE_MAX: Duration = Duration::from_secs(300);
/// A server that is to be a primary may be a standby for so long, as when somebody promotes it.
const IN_RECOVERY_MAX: Duration = Duration::from_secs(5);
/// After a failover that did not come about, until the next is tried.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// What was seen of an application's active cell.
#[derive(Debug, Clone)]
pub struct Seen {
    pub cell: String,
    pub analysis: Analysis,
    /// The end of its WAL, when it has answered last, and when that was.
    pub lsn: Option<Lsn>,
    pub answered: Option<Instant>,
    /// Why no failover came about.
    pub blocked: Option<String>,
    /// The analysis has been so since then.
    pub since: Instant,
    /// Why a plan does not begin by itself that is for this.
    pub held_back: Option<String>,
    /// What was found on servers that a failover or a standby hangs on.
    pub notices: Vec<String>,
}

/// Runs until the task is dropped.
pub async fn run(control: Arc<Control>, app: String) {
    let mut detector = Detector::default();
    let mut looked_at: Option<String> = None;
    let mut tried: Option<Instant> = None;
    let mut rejoins = Patience::default();
    let mut strays = Patience::default();
    let mut reverts = Patience::default();
    let mut forwards = Patience::default();
    let mut orphans = Patience::default();
    let mut recoveries = Patience::default();
    let mut keeping: Option<JoinHandle<()>> = None;
    let mut following: Option<JoinHandle<Followers>> = None;
    let mut followers = Followers::default();
    let mut followed_at: Option<Instant> = None;
    let mut keeper = Keeper::default();
    loop {
        wait(&control, &app, looked_at.as_deref()).await;
        let Ok(application) = control.watched(&app) else { continue };
        if application.execution.is_none()
            && rejoins.may_try(Instant::now())
            // Whoever would be copied from has to be there, and may have to be started again.
            && control.seen(&app).is_some_and(|seen| seen.analysis == Analysis::NoProblem)
            && let Some(id) = control.may_rejoin(&app, &application)
        {
            rejoins.tries(Instant::now());
            let (control, app) = (control.clone(), app.clone());
            // It may have to copy a whole server.
            tokio::spawn(async move {
                let asking = Asking::own("the old server is there again");
                if let Err(error) = control.retry(&app, id, asking).await {
                    tracing::warn!(app, execution = id, error = model::chain(&error), "no rejoin");
                }
            });
            continue;
        }
        if control.is_orphaned(&app, &application) && orphans.may_try(Instant::now()) {
            orphans.tries(Instant::now());
            let (cut_off, its) = (control.clone(), app.clone());
            let recovery = async move {
                if let Err(error) = cut_off.recover(&its).await {
                    let error = model::chain(&error);
                    tracing::warn!(app = its, error, "what was cut off stands still");
                }
            };
            until_rejoin(&control, &app, recovery).await;
            continue;
        }
        if let Some(id) = control.stuck_after(&app)
            && forwards.may_try(Instant::now())
        {
            forwards.tries(Instant::now());
            let asking = Asking::own("it can only go forward");
            let (stuck, its) = (control.clone(), app.clone());
            // What it says is in its log.
            let retry = async move { drop(stuck.retry(&its, id, asking).await) };
            until_rejoin(&control, &app, retry).await;
            continue;
        }
        // Nobody looks whether the server of a fenced cell is there, and its fence may be short of something.
        if application.served().is_some_and(|(_, state)| state == CellState::Fenced)
            && let Some(id) = control.stuck_before(&app)
            && reverts.may_try(Instant::now())
        {
            reverts.tries(Instant::now());
            let asking = Asking::own("its cell is fenced");
            let (stuck, its) = (control.clone(), app.clone());
            let retry = async move { drop(stuck.retry(&its, id, asking).await) };
            until_rejoin(&control, &app, retry).await;
            continue;
        }
        // While the old server becomes a standby, which may take long, the new one is watched as ever.
        let is_watched = control.is_settled_but_for(&app, &application, None);
        let active = application.active().filter(|_| is_watched);
        let Some(cell) = active.map(str::to_owned) else {
            detector = Detector::default();
            followed_at = None;
            continue;
        };
        if looked_at.as_ref() != Some(&cell) {
            (detector, looked_at) = (Detector::default(), Some(cell.clone()));
            control.forget_seen(&app);
        }
        let Ok(servers) = control.servers(&app) else { continue };
        let (analysis, admin) = look(&control, servers, &app, &cell, &mut detector).await;
        control.trigger_plans(&app, By::Analysis);
        if let Some(mut admin) = admin
            && keeping.as_ref().is_none_or(JoinHandle::is_finished)
        {
            let at = (&*app, &*cell);
            let looked = durability::look(&control, servers, at, &mut admin, &mut keeper);
            match timeout(LOOK_MAX, looked).await {
                Ok(Ok(step)) => keeping = keep(&control, &app, &cell, step),
                Ok(Err(error)) => tracing::warn!(app, cell, error, "standbys cannot be asked for"),
                Err(_) => tracing::warn!(app, cell, "standbys cannot be asked for in {LOOK_MAX:?}"),
            }
        }
        if let Some(task) = following.take_if(|task| task.is_finished()) {
            followers = task.await.unwrap_or_default();
            if let Some(cell) = followers.strayed(Instant::now())
                && application.execution.is_none()
                && application.plan.is_none()
                && strays.may_try(Instant::now())
            {
                strays.tries(Instant::now());
                let asking = Asking::own("it has gone another way than the active cell's server");
                let (control, app, cell) = (control.clone(), app.clone(), cell.to_owned());
                tokio::spawn(async move {
                    if let Err(error) = control.rejoin(&app, &cell, asking).await {
                        tracing::warn!(app, cell, error = model::chain(&error), "no rejoin");
                    }
                });
            }
        }
        if analysis == Analysis::NoProblem
            && following.is_none()
            && followed_at.is_none_or(|at| at.elapsed() >= FOLLOW_PAUSE)
        {
            followed_at = Some(Instant::now());
            let (control, app, cell) = (control.clone(), app.clone(), cell.clone());
            let mut followers = std::mem::take(&mut followers);
            // Some may not answer, and the server is watched all the same.
            following = Some(tokio::spawn(async move {
                if let Ok(servers) = control.servers(&app) {
                    following::follow(&control, servers, (&app, &cell), &mut followers).await;
                }
                followers
            }));
        }
        if analysis == Analysis::PrimaryInRecovery
            && control.seen(&app).is_some_and(|seen| seen.since.elapsed() >= IN_RECOVERY_MAX)
            && is_supervised(servers, &cell)
            && recoveries.may_try(Instant::now())
            && let Some(member) = servers.cells.get(&cell).and_then(|one| one.member.as_ref())
        {
            recoveries.tries(Instant::now());
            // Somebody has started what was to be started as the primary that it was, and by control.
            let started = control.start_again(&app, &cell, member).await;
            match &started {
                Ok(()) => tracing::warn!(app, cell, "the server was in recovery, and is a primary"),
                Err(error) => tracing::error!(app, cell, error, "the server stays in recovery"),
            }
            control.note_seen(&app, |seen| seen.blocked = started.err());
            continue;
        }
        if !analysis.calls_for_failover() {
            if analysis == Analysis::NoProblem
                && reverts.may_try(Instant::now())
                && let Some(id) = control.stuck_before(&app)
            {
                reverts.tries(Instant::now());
                // What it says is in its log.
                let asking = Asking::own("its server answers again");
                let _ = control.retry(&app, id, asking).await;
            }
            continue;
        }
        let is_early = tried.is_some_and(|at| at.elapsed() < RETRY_PAUSE);
        if is_early || !(servers.now().failover.automatic || is_supervised(servers, &cell)) {
            continue;
        }
        tried = Some(Instant::now());
        tracing::error!(app, cell, %analysis, "{}", analysis.says());
        if !servers.now().failover.automatic {
            let started = start_again(&control, servers, &app, &cell).await;
            control.note_seen(&app, |seen| seen.blocked = started.err());
            continue;
        }
        let failover = fail_over(control.clone(), app.clone(), cell);
        until_rejoin(&control, &app, failover).await;
    }
}

/// Has another server take the place of the lost one, or says why none does, and has that one started again.
async fn fail_over(control: Arc<Control>, app: String, cell: String) {
    let Ok(servers) = control.servers(&app) else { return };
    let why = match begin(&control, servers, &app, &cell).await {
        Ok(execution) if execution.ending == Some(Ending::Aborted) => execution.reason,
        Ok(_) => None,
        Err(why) => Some(why),
    };
    let Some(why) = why else { return };
    tracing::error!(app, cell, reason = why, "no failover");
    let started = start_again(&control, servers, &app, &cell).await;
    let blocked = match started {
        Ok(()) => why,
        Err(error) => format!("{why}; {error}"),
    };
    control.note_seen(&app, |seen| seen.blocked = Some(blocked));
}

/// Until it is done, or nothing is left of it but a rejoin, which goes on by itself.
async fn until_rejoin(
    control: &Control,
    app: &str,
    work: impl Future<Output = ()> + Send + 'static,
) {
    let mut task = tokio::spawn(work);
    while timeout(PAUSE, &mut task).await.is_err() {
        let application = control.watched(app);
        if application.is_ok_and(|application| control.rejoining(app, &application).is_some()) {
            return;
        }
    }
}

/// When to try again.
#[derive(Debug, Clone, Copy, Default)]
struct Patience {
    tried: Option<(Instant, Duration)>,
}

impl Patience {
    fn may_try(&self, now: Instant) -> bool {
        self.tried.is_none_or(|(at, pause)| now.duration_since(at) > pause)
    }

    fn tries(&mut self, now: Instant) {
        let pause = match self.tried {
            Some((at, pause)) if now.duration_since(at) < pause * 2 + TRY_PAUSE => pause * 2,
            _ => TRY_PAUSE,
        };
        self.tried = Some((now, pause.min(TRY_PAUSE_MAX)));
    }
}

/// Until the next question; not so long if the server's process is gone.
async fn wait(control: &Control, app: &str, cell: Option<&str>) {
    let servers = control.servers(app).ok();
    let server = servers.zip(cell).and_then(|(servers, cell)| servers.cells.get(cell));
    let member = server.and_then(|server| server.member.as_ref());
    match member {
        // It is over either way.
        Some(member) => drop(timeout(PAUSE, member.gone()).await),
        None => tokio::time::sleep(PAUSE).await,
    }
}

/// Carries out what is to be done for commits. That takes its time, in which the server is watched all the same.
fn keep(control: &Arc<Control>, app: &str, cell: &str, step: Step) -> Option<JoinHandle<()>> {
    /// After something that did not succeed.
    const PAUSE: Duration = Duration::from_secs(2);
    if step == Step::Nothing {
        return None;
    }
    let (control, app, cell) = (control.clone(), app.to_owned(), cell.to_owned());
    Some(tokio::spawn(async move {
        let Ok(servers) = control.servers(&app) else { return };
        let at = (&*app, &*cell);
        let done = match step {
            Step::Nothing => Ok(()),
            Step::Protect(protection) => {
                durability::protect(&control, servers, at, protection).await
            }
            Step::Unprotect(why) => durability::unprotect(&control, servers, at, &why).await,
            Step::Name => {
                durability::name_standbys(&control, servers, &app).await;
                tokio::time::sleep(PAUSE).await;
                Ok(())
            }
        };
        if let Err(error) = done {
            tracing::warn!(app, cell, error, "commits do not wait for standbys as they should");
            tokio::time::sleep(PAUSE).await;
        }
    }))
}

/// An agent is there to keep the server running.
fn is_supervised(servers: &AppServers, cell: &str) -> bool {
    let server = servers.cells.get(cell);
    matches!(server.and_then(|server| server.member.as_ref()), Some(Member::Agent(_)))
}

/// The server whose place nobody takes is started again by its agent, if it is one that has one.
///
/// # Errors
/// Why it is not, for people.
async fn start_again(
    control: &Control,
    servers: &AppServers,
    app: &str,
    cell: &str,
) -> Result<(), String> {
    let Some(member) = servers.cells.get(cell).and_then(|server| server.member.as_ref()) else {
        return Ok(());
    };
    if !is_supervised(servers, cell) || member.process().await != Some(Process::Crashed) {
        return Ok(());
    }
    match control.start_again(app, cell, member).await {
        Ok(()) => {
            tracing::warn!(app, cell, "the server was started again");
            Ok(())
        }
        Err(error) => {
            tracing::error!(app, cell, error, "the server is not started again");
            Err(format!("its server is not started again: {error}"))
        }
    }
}

async fn look(
    control: &Control,
    servers: &AppServers,
    app: &str,
    cell: &str,
    detector: &mut Detector,
) -> (Analysis, Option<Admin>) {
    let Some(server) = servers.cells.get(cell) else { return (Analysis::NoProblem, None) };
    let (answer, mut admin) = stages::probe(server).await;
    let mut lsn = None;
    if let (Answer::Primary, Some(asked)) = (answer, &mut admin) {
        let ask = async {
            lsn = asked.flush_lsn().await.ok();
            compare(server, asked).await;
        };
        // One that is frozen meanwhile is looked at again, not waited for.
        if timeout(LOOK_MAX, ask).await.is_err() {
            admin = None;
        }
    }
    let (mut process, mut streams, mut is_lease_over) = (None, None, false);
    if answer == Answer::Nothing {
        process = stages::process_of(server).await;
        is_lease_over = control.is_attended(app, cell)
            && server.member.as_ref().is_some_and(Member::is_lease_over);
        if process.is_none() {
            streams = streams_from(servers, cell).await;
        }
    }
    let analysis = detector.see(Instant::now(), Sight { process, answer, streams, is_lease_over });
    control.note_seen(app, |seen| {
        cell.clone_into(&mut seen.cell);
        if std::mem::replace(&mut seen.analysis, analysis) != analysis {
            (seen.since, seen.held_back) = (Instant::now(), None);
        }
        seen.lsn = lsn.max(seen.lsn);
        if lsn.is_some() {
            seen.answered = Some(Instant::now());
        }
        if analysis == Analysis::NoProblem {
            seen.blocked = None;
        }
    });
    (analysis, admin.filter(|_| answer == Answer::Primary))
}

/// Looks whether the agent is beside the server that answers here.
async fn compare(server: &CellServer, admin: &mut Admin) {
    let Some(Member::Agent(link)) = &server.member else { return };
    let Ok(Some(found)) = admin.postmaster().await else { return };
    link.compare(found);
}

/// Whether a standby hears of the active cell's server.
async fn streams_from(servers: &AppServers, active: &str) -> Option<bool> {
    let mut streams = None;
    for (_, server) in servers.cells.iter().filter(|(cell, _)| *cell != active) {
        let (Answer::Standby, Some(mut admin)) = stages::probe(server).await else { continue };
        let Ok(status) = admin.status().await else { continue };
        streams = Some(streams.unwrap_or(false) || status.streaming);
    }
    streams
}

fn check_not_older(control: &Control, app: &str) -> Result<(), String> {
    match control.is_older(app) {
        true => {
            Err("an agent has seen a later store than this one: `holdfast status` says what to do"
                .into())
        }
        false => Ok(()),
    }
}

async fn begin(
    control: &Control,
    servers: &AppServers,
    app: &str,
    cell: &str,
) -> Result<Execution, String> {
    let recent = control.executions(app).map_err(|error| model::chain(&error))?;
    let block = servers.now().failover.block;
    let block_ms = u64::try_from(block.as_millis()).unwrap_or(u64::MAX);
    let is_recent = |one: &&Execution| {
        one.kind == Kind::Failover
            && one.is_automatic
            && one.ending != Some(Ending::Aborted)
            && now_ms().saturating_sub(one.started_at_ms) < block_ms
    };
    check_not_older(control, app)?;
    // A standby may have come to follow without a record of it.
    if let Err(error) = control.settle_followers(app).await {
        tracing::warn!(app, error = model::chain(&error), "standbys are not settled");
    }
    let to = stages::choose(control, servers, (app, cell), None).await?;
    // Soon after control has begun, agents are heard only there.
    check_not_older(control, app)?;
    if let Some(one) = recent.iter().find(is_recent) {
        return Err(format!(
            "execution {} failed over less than {block:?} ago; `holdfast failover {app} --to {to}` does it again",
            one.id
        ));
    }
    let request = FailoverRequest { to, allow_data_loss: false, dry_run: false };
    let analysis = control.seen(app).map_or(Analysis::NoProblem, |seen| seen.analysis);
    let asking = Asking::own(analysis.says());
    if control.seen(app).is_some_and(|seen| seen.blocked.is_some()) {
        // The same refusal again and again is no execution.
        let watched = control.watched(app).map_err(|error| model::chain(&error))?;
        let alone = Application { execution: None, ..watched };
        let would = control.would_fail_over(app, &alone, (&request.to, false), &asking).await;
        would.map_err(|error| model::chain(&error))?;
    }
    let done = control.fail_over(app, request, true, asking).await;
    done.map_err(|error| model::chain(&error))
}

impl Control {
    /// Where the active cell's server was seen last.
    pub(crate) fn last_seen(&self, app: &str) -> Option<Lsn> {
        self.seen(app)?.lsn
    }

    /// The same, unless it was before `over` ago: until then the server may have gone on unseen.
    pub(crate) fn last_seen_since(&self, app: &str, over: Option<Duration>) -> Option<Lsn> {
        let seen = self.seen(app)?;
        let is_late = over.is_some_and(|over| seen.answered.is_none_or(|at| at.elapsed() > over));
        seen.lsn.filter(|_| !is_late)
    }

    /// What was seen last of the active cell's server.
    pub fn seen(&self, app: &str) -> Option<Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(app).cloned()
    }

    pub(crate) fn forget_seen(&self, app: &str) {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).remove(app);
    }

    pub(crate) fn note_seen(&self, app: &str, note: impl FnOnce(&mut Seen)) {
        let mut all = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        note(all.entry(app.to_owned()).or_insert_with(|| Seen {
            cell: String::new(),
            analysis: Analysis::NoProblem,
            lsn: None,
            answered: None,
            blocked: None,
            since: Instant::now(),
            held_back: None,
            notices: Vec::new(),
        }));
    }

    /// The execution that has left a cell without its rejoin.
    ///
    /// # Errors
    /// There is no such application, or the store cannot be read.
    pub fn lacks_rejoin(&self, app: &str, cell: &str) -> Result<Option<Execution>, ControlError> {
        let lacks = |one: &Execution| {
            one.from == cell && one.ending == Some(Ending::CompletedWithoutRejoin)
        };
        Ok(self.executions(app)?.into_iter().find(lacks))
    }

    /// An execution that lacks its rejoin, if somebody is there who could do it.
    fn may_rejoin(&self, app: &str, application: &Application) -> Option<u64> {
        let servers = self.servers(app).ok()?;
        let short = application.cells.iter().filter(|(_, state)| !state.is_settled());
        let attended = short.map(|(cell, _)| cell).filter(|cell| {
            let server = servers.cells.get(*cell);
            server.and_then(|server| server.member.as_ref()).is_some_and(Member::is_attended)
        });
        attended.filter_map(|cell| self.lacks_rejoin(app, cell).ok()?).map(|one| one.id).next()
    }

    /// The execution that stands still before its point of no return: its way back is tried again once the server answers.
    pub(crate) fn stuck_before(&self, app: &str) -> Option<u64> {
        self.stands_in_the_way(app).ok().flatten().map(|(execution, _)| execution.id)
    }

    /// An execution is under way that nobody runs: what it was to write could not be written.
    fn is_orphaned(&self, app: &str, application: &Application) -> bool {
        let execution = application.execution.and_then(|id| self.execution(app, id).ok());
        execution.is_some_and(|one| one.ending.is_none()) && self.take(app).is_ok()
    }

    /// The execution that stands still beyond its point of no return: nobody is active until it goes on.
    fn stuck_after(&self, app: &str) -> Option<u64> {
        let application = self.application(app).ok()?;
        let execution = self.execution(app, application.execution?).ok()?;
        let is_stuck = execution.ending == Some(Ending::Stuck) && application.is_past(&execution);
        is_stuck.then_some(execution.id)
    }

    /// When the server of the active cell has answered last.
    pub(crate) fn heard_at_ms(&self, app: &str, cell: &str) -> Option<u64> {
        let answered = self.seen(app).filter(|seen| seen.cell == cell)?.answered?;
        let ago = u64::try_from(answered.elapsed().as_millis()).unwrap_or(u64::MAX);
        Some(now_ms().saturating_sub(ago))
    }

    /// Has the agent of the active cell start its server again, if nothing is changing the application.
    pub(crate) async fn start_again(
        &self,
        app: &str,
        cell: &str,
        member: &Member,
    ) -> Result<(), String> {
        let _taken = self.take(app).map_err(|error| model::chain(&error))?;
        // One that stands still before its point of no return is in nobody's way.
        let application = self.watched(app).map_err(|error| model::chain(&error))?;
        if application.active() != Some(cell) || application.execution.is_some() {
            return Err(format!("`{cell}` is not the active cell any more"));
        }
        let servers = self.servers(app).map_err(|error| model::chain(&error))?;
        for (other, server) in servers.cells.iter().filter(|(other, _)| *other != cell) {
            if stages::is_primary(server).await {
                return Err(format!("the server of `{other}` is a primary, too: stop one of them"));
            }
        }
        let newest = stages::check_is_newest(self, servers, (app, cell), member).await;
        newest.map_err(|doubt| doubt.why)?;
        member.start_again(application.epoch).await
    }
}
