//! What people ask for: each is refused at once, or becomes an execution that runs to its end.

use std::time::Duration;

use model::Lsn;
use model::audit::{Asking, Draft};
use model::barrier::{Order, Report};
use model::cell::{Application, CellState};
use model::following::Astray;
use model::objectives::{Measured, Objectives};
use model::persisted::Execution;
use model::switchover::{Ending, Kind, OnTimeout, Stage, resume};
use tokio::time::timeout;

use crate::control::{Control, now_ms};
use crate::following;
use crate::member::Member;
use crate::records::{self, RecordError};
use crate::requests::{
    ControlError, DryRun, FailoverRequest, FenceRequest, MoveRequest, SwitchoverRequest,
};
use crate::stages;

/// What an execution is asked to be.
pub(crate) struct Asked {
    pub(crate) kind: Kind,
    from: String,
    to: String,
    deadline_ms: u64,
    on_timeout: OnTimeout,
    allow_data_loss: bool,
    is_automatic: bool,
    lsn: Option<Lsn>,
    pub(crate) asking: Asking,
}

impl Asked {
    fn new(kind: Kind, from: String, to: String, asking: Asking) -> Asked {
        let on_timeout = OnTimeout::Abort;
        let (allow_data_loss, is_automatic) = (false, false);
        let (deadline_ms, lsn) = (0, None);
        Asked {
            kind,
            from,
            to,
            deadline_ms,
            on_timeout,
            allow_data_loss,
            is_automatic,
            lsn,
            asking,
        }
    }

    pub(crate) fn execution(self, app: &str, id: u64, application: &Application) -> Execution {
        let Asked { kind, from, to, deadline_ms, on_timeout, .. } = self;
        Execution {
            id,
            app: app.into(),
            kind,
            from,
            to,
            epoch: application.epoch,
            deadline_ms,
            on_timeout,
            allow_data_loss: self.allow_data_loss,
            is_automatic: self.is_automatic,
            asked: self.asking,
            started_at_ms: now_ms(),
            stage: kind.first(),
            lsn: self.lsn,
            lost: None,
            is_kept_whole: false,
            timeline: None,
            heard_at_ms: None,
            objectives: Objectives::default(),
            measured: Measured::default(),
            ending: None,
            reason: None,
            log: Vec::new(),
        }
    }
}

/// Between two looks at an execution that somebody else waits for.
const LOOK: Duration = Duration::from_millis(100);
/// How long it may take to see that a standby follows.
const SETTLE_MAX: Duration = Duration::from_secs(2);

impl Control {
    /// Does what is asked, or waits for what became of it if it was asked before with the same key, of whichever control.
    ///
    /// # Errors
    /// As `act`, or the key is of another request.
    pub async fn once(
        &self,
        app: &str,
        key: Option<&str>,
        is_same: impl Fn(&Execution) -> bool,
        act: impl Future<Output = Result<Execution, ControlError>>,
    ) -> Result<Execution, ControlError> {
        let Some(key) = key else { return act.await };
        let asked = || {
            let all = records::executions(&*self.store, app)?;
            let found = all.into_iter().find(|one| one.asked.key.as_deref() == Some(key));
            match found {
                Some(found) if !is_same(&found) => {
                    let (key, says) = (key.to_owned(), found.says());
                    Err(ControlError::OtherRequest { key, says })
                }
                found => Ok(found),
            }
        };
        let mut found = asked()?;
        if found.is_none() {
            match act.await {
                // It may be the same, asked at the same time.
                Err(ControlError::UnderWay { app, id }) => {
                    tokio::time::sleep(LOOK).await;
                    found = asked()?;
                    if found.is_none() {
                        return Err(ControlError::UnderWay { app, id });
                    }
                }
                done => return done,
            }
        }
        let Some(mut execution) = found else { return Err(ControlError::NoExecution(0)) };
        while execution.ending.is_none() {
            tokio::time::sleep(LOOK).await;
            execution = self.execution(app, execution.id)?;
        }
        Ok(execution)
    }

    /// Whether a cell is where an application was to go.
    pub fn is_meant(&self, app: &str, cell: &str, to: &str) -> bool {
        self.servers(app).is_ok_and(|servers| servers.is_meant(cell, to))
    }

    /// The cell where an application is to go: the one that is named, or of a region the one that would be chosen.
    async fn aim(&self, app: &str, to: &str, kind: Kind) -> Result<String, ControlError> {
        let servers = self.servers(app)?;
        let Some(region) = servers.region(to) else { return Ok(to.to_owned()) };
        self.settle_followers(app).await?;
        let application = self.application(app)?;
        let active = application.active().filter(|cell| servers.is_within(cell, &region));
        // Of a region whose server is lost another cell is meant.
        let stays = match active.and_then(|cell| servers.cells.get(cell)) {
            Some(server) if kind == Kind::Failover => stages::is_primary(server).await,
            _ => true,
        };
        if let Some(cell) = active.filter(|_| stays) {
            let (cell, epoch) = (cell.to_owned(), application.epoch.0);
            return Err(ControlError::AlreadyActive { cell, epoch });
        }
        let from = application.active().or(application.served().map(|(cell, _)| cell));
        let from = from.ok_or_else(|| ControlError::NoActive { app: app.into() })?;
        let chosen = stages::choose(self, servers, (app, from), Some(&region)).await;
        chosen.map_err(|why| ControlError::Refused(format!("no cell of `{region}` can be: {why}")))
    }

    fn check(
        &self,
        app: &str,
        application: &Application,
        to: &str,
    ) -> Result<String, ControlError> {
        self.check_cell(app, to)?;
        if let Some(id) = application.execution {
            return Err(ControlError::UnderWay { app: app.into(), id });
        }
        let fenced = application.served().filter(|(_, state)| *state == CellState::Fenced);
        let fenced = fenced.map(|(cell, _)| cell);
        let from = application.active().or(fenced);
        let from = from.ok_or_else(|| ControlError::NoActive { app: app.into() })?;
        if from == to && fenced.is_none() {
            return Err(ControlError::AlreadyActive {
                cell: to.into(),
                epoch: application.epoch.0,
            });
        }
        match application.cells.get(to) {
            Some(CellState::Passive) => Ok(from.to_owned()),
            state => Err(ControlError::NotPassive {
                cell: to.into(),
                state: state.copied().unwrap_or(CellState::Fenced),
            }),
        }
    }

    /// Looks at everything a switchover would need, and changes nothing.
    ///
    /// # Errors
    /// It would be refused at once.
    pub async fn dry_run(
        &self,
        app: &str,
        request: &SwitchoverRequest,
    ) -> Result<DryRun, ControlError> {
        let application = self.application(app)?;
        let to = self.aim(app, &request.to, Kind::Switchover).await?;
        let request = &SwitchoverRequest { to, ..request.clone() };
        let from = self.check(app, &application, &request.to)?;
        let servers = self.servers(app)?;
        let mut refusals = Vec::new();
        let mut configured_otherwise = Vec::new();
        match stages::check_servers(servers, &from, &request.to).await {
            Err(refusal) => refusals.push(refusal),
            Ok((mut old, mut new, _)) => match stages::differences(&mut old, &mut new).await {
                Err(refusal) => refusals.push(refusal),
                Ok(names) => configured_otherwise = names,
            },
        }
        if application.active().is_none()
            && let Some(server) = servers.cells.get(&from)
        {
            refusals.extend(stages::check_closes(&from, server).err());
        }
        let asked =
            Asked::new(Kind::Switchover, from.clone(), request.to.clone(), Asking::default());
        let execution = asked.execution(app, 0, &application);
        let refused = self.look_at_safety(&application, &execution)?.err();
        refusals.extend(refused.map(|refused| refused.to_string()));
        let report = self.order(Order::Inspect { app: app.into() }).await;
        if request.on_timeout == OnTimeout::Abort {
            refusals.extend(report.missing);
        }
        Ok(DryRun {
            app: app.into(),
            to: request.to.clone(),
            steps: stages::describe(servers, &from, request),
            from,
            sessions: report.sessions,
            movable: report.done,
            blockers: report.blockers,
            refusals,
            configured_otherwise,
        })
    }

    /// Begins a switchover and runs it to its end.
    ///
    /// # Errors
    /// It is refused before anything was done. How it went otherwise is in the execution.
    pub async fn switchover(
        &self,
        app: &str,
        request: SwitchoverRequest,
        asking: Asking,
    ) -> Result<Execution, ControlError> {
        self.give_up_rejoin_of_standby(app).await?;
        let _taken = self.take_in_turn(app).await?;
        let to = self.aim(app, &request.to, Kind::Switchover).await?;
        let seen = records::application(&*self.store, app)?;
        let from = self.check(app, &seen.application, &to)?;
        let SwitchoverRequest { deadline_ms, on_timeout, .. } = request;
        let asked = Asked::new(Kind::Switchover, from, to, asking);
        self.execute(app, seen, Asked { deadline_ms, on_timeout, ..asked }).await
    }

    /// Looks at everything a failover would need, and changes nothing.
    ///
    /// # Errors
    /// It would be refused at once.
    pub async fn failover_dry_run(
        &self,
        app: &str,
        request: &FailoverRequest,
    ) -> Result<DryRun, ControlError> {
        let application = self.application(app)?;
        let to = self.aim(app, &request.to, Kind::Failover).await?;
        let request = &FailoverRequest { to, ..request.clone() };
        let from = self.check(app, &application, &request.to)?;
        let servers = self.servers(app)?;
        let asked = Asked::new(Kind::Failover, from.clone(), request.to.clone(), Asking::default());
        let asked = Asked { allow_data_loss: request.allow_data_loss, ..asked };
        let mut execution = asked.execution(app, 0, &application);
        let assessed = stages::run(self, &mut execution, Stage::Assess).await;
        let refused = self.look_at_safety(&application, &execution)?.err();
        let refused = refused.map(|refused| refused.to_string());
        let report = self.order(Order::Inspect { app: app.into() }).await;
        Ok(DryRun {
            app: app.into(),
            to: request.to.clone(),
            steps: stages::describe_failover(servers, &execution),
            from,
            sessions: report.sessions,
            movable: report.done,
            blockers: report.blockers,
            refusals: assessed.err().into_iter().chain(refused).collect(),
            configured_otherwise: Vec::new(),
        })
    }

    /// Has another cell take the place of the active one, whose server is lost, and runs that to its end.
    ///
    /// # Errors
    /// It is refused before anything was done. How it went otherwise is in the execution.
    pub async fn fail_over(
        &self,
        app: &str,
        request: FailoverRequest,
        is_automatic: bool,
        asking: Asking,
    ) -> Result<Execution, ControlError> {
        let FailoverRequest { to, allow_data_loss, .. } = request;
        let to = self.aim(app, &to, Kind::Failover).await?;
        let application = self.application(app)?;
        if self.rejoining(app, &application).is_some() {
            // A copy of hours is given up only for one that would come about.
            let alone = Application { execution: None, ..application };
            self.would_fail_over(app, &alone, (&to, allow_data_loss), &asking).await?;
            self.give_up_rejoin(app).await?;
        }
        let _taken = self.take_in_turn(app).await?;
        self.settle_followers(app).await?;
        if let Some((stuck, application)) = self.stands_in_the_way(app)? {
            // It may have left its server fenced, so it goes only if this one comes about.
            self.would_fail_over(app, &application, (&to, allow_data_loss), &asking).await?;
            self.supersede(app, stuck, &asking)?;
        }
        let seen = records::application(&*self.store, app)?;
        let from = self.check(app, &seen.application, &to)?;
        let asked = Asked::new(Kind::Failover, from, to, asking);
        self.execute(app, seen, Asked { allow_data_loss, is_automatic, ..asked }).await
    }

    /// # Errors
    /// A failover would be refused at once.
    pub(crate) async fn would_fail_over(
        &self,
        app: &str,
        application: &Application,
        (to, allow_data_loss): (&str, bool),
        asking: &Asking,
    ) -> Result<(), ControlError> {
        let from = self.check(app, application, to)?;
        let asked = Asked::new(Kind::Failover, from, to.to_owned(), asking.clone());
        let asked = Asked { allow_data_loss, ..asked };
        let mut provisional = asked.execution(app, 0, application);
        let assess = stages::run(self, &mut provisional, Stage::Assess);
        Box::pin(assess).await.map(drop).map_err(ControlError::Refused)
    }

    /// Standbys that follow by now, though nobody has recorded that their rejoin has come to its end, are standbys: they are
    /// on the timeline that was the active one's, which nobody else has written.
    pub(crate) async fn settle_followers(&self, app: &str) -> Result<(), ControlError> {
        let servers = self.servers(app)?;
        let application = self.application(app)?;
        let states = application.cells.iter();
        for (cell, _) in states.filter(|(_, state)| **state == CellState::Recovering) {
            let Some(server) = servers.cells.get(cell) else { continue };
            // Whoever is beside it may be at work on it for long, and clients wait for who follows already.
            let follows = stages::follows_timeline(server, application.timeline);
            if application.timeline == 0 || timeout(SETTLE_MAX, follows).await != Ok(true) {
                continue;
            }
            let _writing = self.write_alone();
            let seen = records::application(&*self.store, app)?;
            let mut application = seen.application;
            let is_other = application.execution.is_some()
                || application.cells.get(cell) != Some(&CellState::Recovering);
            if is_other {
                continue;
            }
            application.change(cell, CellState::Passive).map_err(RecordError::Cell)?;
            application.lacking.remove(cell);
            let text = format!("`{cell}` follows on timeline {}", application.timeline);
            tracing::warn!(app, cell, "{text}");
            let draft = records::own(app, "settle", application.epoch, "it follows", text);
            records::update(&*self.store, app, seen.revision, &application, draft)?;
        }
        Ok(())
    }

    /// The application as it is watched over: an execution that stands still before its point of no return is in the way of
    /// nobody who fails over.
    ///
    /// # Errors
    /// There is no such application, or the store cannot be read.
    pub fn watched(&self, app: &str) -> Result<Application, ControlError> {
        match self.stands_in_the_way(app)? {
            Some((_, application)) => Ok(application),
            None => self.application(app),
        }
    }

    /// An execution that stands still before its point of no return, and the application without it.
    pub(crate) fn stands_in_the_way(
        &self,
        app: &str,
    ) -> Result<Option<(Execution, Application)>, ControlError> {
        let mut application = self.application(app)?;
        let Some(id) = application.execution else { return Ok(None) };
        let execution = self.execution(app, id)?;
        if !execution.is_stuck_before(&application) {
            return Ok(None);
        }
        application.execution = None;
        Ok(Some((execution, application)))
    }

    /// A failover takes the place of an execution that stands still.
    fn supersede(
        &self,
        app: &str,
        mut execution: Execution,
        asking: &Asking,
    ) -> Result<(), ControlError> {
        let _writing = self.write_alone();
        let mut seen = records::application(&*self.store, app)?;
        execution.ending = Some(Ending::Aborted);
        if seen.application.state(&execution.from).map_err(RecordError::Cell)?
            == CellState::Draining
        {
            let from = execution.from.clone();
            seen.application.change(&from, CellState::Active).map_err(RecordError::Cell)?;
        }
        seen.application.execution = None;
        let text = format!("{}: a failover takes its place", execution.says());
        let draft = execution.draft("supersede", seen.application.epoch, text);
        let draft = Draft { by: asking.by.clone(), reason: asking.reason.clone(), ..draft };
        let (store, revision) = (&*self.store, seen.revision);
        records::write(store, app, revision, &seen.application, &execution, Some(draft))?;
        Ok(())
    }

    /// Fences the active cell and runs that to its end. Clients stay, and read.
    ///
    /// # Errors
    /// It is refused before anything was done. How it went otherwise is in the execution.
    pub async fn fence(
        &self,
        app: &str,
        cell: &str,
        request: FenceRequest,
        asking: Asking,
    ) -> Result<Execution, ControlError> {
        self.give_up_rejoin_of_standby(app).await?;
        let _taken = self.take_in_turn(app).await?;
        let (seen, state) = self.see(app, cell)?;
        if state != CellState::Active {
            return Err(ControlError::NotActive { cell: cell.into(), state });
        }
        let kind = if request.all { Kind::FenceAll } else { Kind::Fence };
        let asked = Asked::new(kind, cell.to_owned(), cell.to_owned(), asking);
        let FenceRequest { deadline_ms, on_timeout, .. } = request;
        self.execute(app, seen, Asked { deadline_ms, on_timeout, ..asked }).await
    }

    /// Gives a fenced cell a new grant and runs that to its end.
    ///
    /// # Errors
    /// It is refused before anything was done. How it went otherwise is in the execution.
    pub async fn unfence(
        &self,
        app: &str,
        cell: &str,
        asking: Asking,
    ) -> Result<Execution, ControlError> {
        let _taken = self.take_in_turn(app).await?;
        let (seen, state) = self.see(app, cell)?;
        match seen.application.served() {
            Some((newest, _)) if newest != cell => {
                let (app, newest) = (app.to_owned(), newest.to_owned());
                return Err(ControlError::NotNewest { app, cell: cell.into(), state, newest });
            }
            Some((_, CellState::Fenced | CellState::Recovering | CellState::Passive)) => (),
            // The store was restored: whoever asks says that this is the newest.
            None if !state.takes_writes() => (),
            _ => return Err(ControlError::NotFenced { cell: cell.into(), state }),
        }
        stages::check_alone(self.servers(app)?, cell).await.map_err(ControlError::Refused)?;
        let asked = Asked::new(Kind::Unfence, cell.to_owned(), cell.to_owned(), asking);
        self.execute(app, seen, asked).await
    }

    /// Makes a standby one anew that has gone another way than the active cell's server.
    ///
    /// # Errors
    /// It has not, or nobody can, or it is refused. How it went otherwise is in the execution.
    pub(crate) async fn rejoin(
        &self,
        app: &str,
        cell: &str,
        asking: Asking,
    ) -> Result<Execution, ControlError> {
        let _taken = self.take(app)?;
        let (seen, state) = self.see(app, cell)?;
        let refused = |why: &str| ControlError::Refused(format!("`{cell}` {why}"));
        let active = seen.application.active().filter(|_| state == CellState::Passive);
        let active = active.ok_or_else(|| refused("is no standby of an active cell"))?.to_owned();
        let servers = self.servers(app)?;
        let strayed = following::strayed(servers, (cell, &active)).await;
        let strayed = strayed.map_err(ControlError::Refused)?;
        let (position, Astray { why, is_ahead }) =
            strayed.ok_or_else(|| refused("has not gone another way"))?;
        if is_ahead {
            return Err(refused(&format!("has what only it may have: {why}")));
        }
        tracing::warn!(app, cell, active, why, "the standby has gone another way");
        let member = servers.cells.get(cell).and_then(|server| server.member.as_ref());
        if !member.is_some_and(Member::is_attended) {
            return Err(refused("has nobody beside it who could make it a standby again"));
        }
        let asked = Asked::new(Kind::Rejoin, cell.to_owned(), active, asking);
        self.execute(app, seen, Asked { lsn: Some(position.has), ..asked }).await
    }

    /// An application that nothing is changing, and the state of one of its cells.
    fn see(&self, app: &str, cell: &str) -> Result<(records::Seen, CellState), ControlError> {
        self.check_cell(app, cell)?;
        let seen = records::application(&*self.store, app)?;
        if let Some(id) = seen.application.execution {
            return Err(ControlError::UnderWay { app: app.into(), id });
        }
        let state = seen.application.state(cell).map_err(RecordError::Cell)?;
        Ok((seen, state))
    }

    /// Moves sessions to fresh connections, while the application goes on.
    ///
    /// # Errors
    /// Another change of the application is under way, or there is no such cell.
    pub async fn move_sessions(
        &self,
        app: &str,
        request: MoveRequest,
        asking: Asking,
    ) -> Result<Report, ControlError> {
        let _taken = self.take(app)?;
        self.check_cell(app, &request.to)?;
        let application = records::application(&*self.store, app)?.application;
        if application.active().is_none() {
            // What a fenced server says of all its sessions would become their own.
            return Err(ControlError::NoActive { app: app.into() });
        }
        let MoveRequest { session, to, deadline_ms } = request;
        let which = session.map_or("all sessions".to_owned(), |id| format!("session {id}"));
        let (by, reason, epoch) = (asking.by, asking.reason, application.epoch.0);
        let text = format!("{which} to `{to}`");
        self.note(Draft { by, did: "move", app: app.into(), epoch, reason, text })?;
        Ok(self.order(Order::Move { app: app.into(), session, to, deadline_ms }).await)
    }

    /// Whether proxies have other rules for commands in their files than they go by: how many, if any.
    ///
    /// # Errors
    /// One of them cannot say.
    pub async fn other_rules(&self, app: &str) -> Result<u64, ControlError> {
        let report = self.order(Order::Compare { app: app.into() }).await;
        let missing = report.missing.into_iter().next();
        match report.error.or(missing) {
            Some(error) => Err(ControlError::Refused(error)),
            None => Ok(report.done),
        }
    }

    /// Has proxies take up the rules in their files, if there are others. Nobody waits: each session goes by them from its next
    /// command on. Gives how many proxies have.
    ///
    /// # Errors
    /// A proxy cannot, or does not answer; others may have. It is asked for again.
    pub async fn reload_rules(&self, app: &str) -> Result<u64, ControlError> {
        let report = self.order(Order::Reload { app: app.into() }).await;
        let missing = report.missing.into_iter().next();
        match report.error.or(missing) {
            Some(error) if report.done > 0 => Err(ControlError::Refused(format!(
                "{error}; {} proxies have taken them up",
                report.done
            ))),
            Some(error) => Err(ControlError::Refused(error)),
            None => Ok(report.done),
        }
    }

    /// Takes up an execution that stands still.
    ///
    /// # Errors
    /// There is none, or it does not stand still.
    pub async fn retry(
        &self,
        app: &str,
        id: u64,
        asking: Asking,
    ) -> Result<Execution, ControlError> {
        let _taken = self.take(app)?;
        let mut execution = self.execution(app, id)?;
        let seen = records::application(&*self.store, app)?;
        let stage = match execution.ending {
            Some(Ending::CompletedWithoutRejoin) if seen.application.execution.is_none() => {
                Stage::Rejoin
            }
            Some(Ending::Stuck) => {
                resume(execution.kind, execution.stage, seen.application.is_past(&execution))
            }
            ending => return Err(ControlError::NotRetryable { id, ending }),
        };
        execution.ending = None;
        execution.reason = None;
        {
            let _writing = self.write_alone();
            let seen = records::application(&*self.store, app)?;
            let mut application = seen.application;
            application.execution = Some(id);
            let draft = execution.draft("retry", application.epoch, execution.says());
            let draft = Draft { by: asking.by, reason: asking.reason, ..draft };
            let (store, revision) = (&*self.store, seen.revision);
            records::write(store, app, revision, &application, &execution, Some(draft))?;
        }
        self.run(execution, stage).await
    }
}
