//! One execution, stage by stage. What comes next is said by `model::switchover`; here it is recorded, done and
//! recorded again, so that whoever finds it after a crash knows where it stands.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use model::barrier::Order;
use model::persisted::{Execution, LogEntry, LogEvent};
use model::switchover::{Ending, Next, Outcome, Stage, next, resume};

use crate::control::{Control, now_ms};
use crate::records::{self, RecordError};
use crate::requests::ControlError;
use crate::stages;
use crate::verbs::Asked;

/// Whoever looks for what took long finds it.
const LONG: Duration = Duration::from_secs(5);

impl Control {
    /// Records a new execution and runs it to its end.
    pub(crate) async fn execute(
        &self,
        app: &str,
        seen: records::Seen,
        asked: Asked,
    ) -> Result<Execution, ControlError> {
        let kind = asked.kind;
        self.check_overrides(app, &asked.asking)?;
        if let Some(epoch) =
            asked.asking.if_epoch.filter(|epoch| *epoch != seen.application.epoch.0)
        {
            let found = seen.application.epoch.0;
            return Err(ControlError::OtherEpoch { app: app.into(), epoch, found });
        }
        let mut execution = asked.execution(app, 0, &seen.application);
        execution.objectives = self.servers(app)?.now().objectives;
        execution.heard_at_ms = self.heard_at_ms(app, &execution.from);
        {
            let _writing = self.write_alone();
            execution.id = records::next_id(&*self.store, app)?;
            let now = records::application(&*self.store, app)?;
            let mut application = now.application;
            // What is recorded of its commits may have changed since it was looked at, and is as good.
            if (application.epoch, &application.cells, application.execution)
                != (seen.application.epoch, &seen.application.cells, None)
            {
                let id = application.execution.unwrap_or(0);
                return Err(ControlError::UnderWay { app: app.into(), id });
            }
            self.check_safety(&application, &execution)?;
            application.execution = Some(execution.id);
            let mut says = execution.says();
            if !execution.asked.overrides.is_empty() {
                let rules: Vec<&str> =
                    execution.asked.overrides.iter().map(String::as_str).collect();
                says.push_str(&format!(", in spite of `{}`", rules.join("`, `")));
            }
            let draft = execution.draft(kind.name(), application.epoch, says);
            records::write(&*self.store, app, now.revision, &application, &execution, Some(draft))?;
        }
        self.count_overrides(app, &execution.asked);
        let (id, kind_name) = (execution.id, kind.name());
        let (from, to) = (&execution.from, &execution.to);
        tracing::info!(app, execution = id, from, to, kind = kind_name, "execution begins");
        Box::pin(self.run(execution, kind.first())).await
    }

    /// Applications, those first of which nothing was broken off.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn in_order(&self) -> Result<Vec<String>, ControlError> {
        let mut all = Vec::new();
        for app in self.config.apps.keys() {
            let application = records::application(&*self.store, app)?.application;
            all.push((application.execution.is_some(), app.clone()));
        }
        all.sort();
        Ok(all.into_iter().map(|(_, app)| app).collect())
    }

    /// Brings an execution to its end that a crash has left under way. To be called before clients of the application are
    /// served.
    ///
    /// # Errors
    /// The store cannot be read or written.
    pub async fn recover(&self, app: &str) -> Result<(), ControlError> {
        let _taken = self.take(app)?;
        let application = records::application(&*self.store, app)?.application;
        let Some(id) = application.execution else { return Ok(()) };
        let execution = self.execution(app, id)?;
        if execution.ending.is_some() {
            tracing::warn!(
                app,
                execution = id,
                "execution stands still; see `holdfast executions {id}`"
            );
            return Ok(());
        }
        let stage = resume(execution.kind, execution.stage, application.is_past(&execution));
        self.wait_for_proxies(app).await;
        tracing::warn!(app, execution = id, found = %execution.stage, goes_on = %stage, "execution was cut off");
        self.run(execution, stage).await.map(drop)
    }

    pub(crate) async fn run(
        &self,
        mut execution: Execution,
        mut stage: Stage,
    ) -> Result<Execution, ControlError> {
        loop {
            // Before anything is recorded: what proxies are told is read after.
            self.set_changing(&execution.app, stage.is_of_proxies());
            let began = Instant::now();
            let (outcome, text) = match self.begin(&mut execution, stage) {
                Err(ControlError::Unsafe(refusal)) => (Outcome::Refused, refusal.to_string()),
                Err(error) => return Err(error),
                Ok(()) => {
                    crash_point(stage, "begin");
                    let result = self.run_stage(&mut execution, stage).await;
                    crash_point(stage, "end");
                    match result {
                        Ok(text) => (Outcome::Done, text),
                        Err(text) => (Outcome::Failed, text),
                    }
                }
            };
            let took = began.elapsed();
            let after = next(execution.kind, stage, outcome);
            self.end(&mut execution, stage, outcome, text, took, after)?;
            match after {
                Next::Go(next) => stage = next,
                Next::End(ending) => {
                    let holds = ending == Ending::Stuck && stage.holds_clients();
                    self.set_changing(&execution.app, holds);
                    if holds {
                        // Clients are not left waiting for a person.
                        let app = execution.app.clone();
                        let report = self.order(Order::GiveUp { app }).await;
                        tracing::warn!(app = execution.app, told = report.told, "sessions ended");
                    }
                    return Ok(execution);
                }
            }
        }
    }

    async fn run_stage(&self, execution: &mut Execution, stage: Stage) -> Result<String, String> {
        let app = execution.app.clone();
        let given_up = self.rejoins_given_up.get(&app).filter(|_| stage == Stage::Rejoin);
        let Some(given_up) = given_up else { return stages::run(self, execution, stage).await };
        let mut given_up = given_up.subscribe();
        tokio::select! {
            biased;
            result = Box::pin(async {
                hold_point(stage).await;
                stages::run(self, execution, stage).await
            }) => result,
            // As after a crash, it is done again later.
            Ok(()) = given_up.changed() => Err("it was given up for what could not wait".into()),
        }
    }

    /// Records that a stage begins, with the change of cells that goes with it.
    fn begin(&self, execution: &mut Execution, stage: Stage) -> Result<(), ControlError> {
        let _writing = self.write_alone();
        let seen = records::application(&*self.store, &execution.app)?;
        let mut application = seen.application;
        if matches!(stage, Stage::Grant | Stage::Confine | Stage::Regrant)
            && !application.is_past(execution)
        {
            // A gate may have been closed since it began.
            self.check_safety(&application, execution)?;
            application.changed_at_ms = Some(now_ms());
        }
        application
            .enter(execution.kind, stage, &execution.from, &execution.to)
            .map_err(RecordError::Cell)?;
        execution.stage = stage;
        execution.record(LogEntry {
            at_ms: now_ms(),
            stage,
            event: LogEvent::Started,
            text: String::new(),
            took_ms: None,
        });
        // Between hold and release every write delays clients, so only those that recovery needs are made.
        if matters_after_a_crash(stage) {
            let (store, app) = (&*self.store, &execution.app);
            records::write(store, app, seen.revision, &application, execution, None)?;
        }
        Ok(())
    }

    fn end(
        &self,
        execution: &mut Execution,
        stage: Stage,
        outcome: Outcome,
        text: String,
        took: Duration,
        after: Next,
    ) -> Result<(), ControlError> {
        let _writing = self.write_alone();
        let seen = records::application(&*self.store, &execution.app)?;
        let mut application = seen.application;
        let (app, id) = (execution.app.clone(), execution.id);
        let took_ms = took.as_secs_f64() * 1_000.0;
        let event = match outcome {
            Outcome::Done => {
                application
                    .leave(stage, &execution.from, &execution.to)
                    .map_err(RecordError::Cell)?;
                match took > LONG {
                    true => {
                        tracing::warn!(app, execution = id, %stage, took_ms, text, "stage took long");
                    }
                    false => {
                        tracing::info!(app, execution = id, %stage, took_ms, text, "stage is done");
                    }
                }
                LogEvent::Done
            }
            Outcome::Failed | Outcome::Refused => {
                tracing::warn!(app, execution = id, %stage, took_ms, reason = text, "stage failed");
                execution.reason.get_or_insert_with(|| format!("{stage}: {text}"));
                LogEvent::Failed
            }
        };
        execution.record(LogEntry { at_ms: now_ms(), stage, event, text, took_ms: Some(took_ms) });
        application.timeline = application.timeline.max(execution.timeline.unwrap_or(0));
        execution.measured = execution.measure();
        if let Next::End(ending) = after {
            execution.ending = Some(ending);
            if ending != Ending::Stuck {
                application.execution = None;
            }
            if ending == Ending::CompletedWithoutRejoin {
                application.lacking.insert(execution.from.clone(), id);
            }
            tracing::info!(app, execution = id, ?ending, "execution has ended");
        }
        if matches!(after, Next::End(_))
            || matches!(stage, Stage::Promote | Stage::Regrant | Stage::Release)
            || outcome != Outcome::Done
        {
            let ended = |ending: Ending| {
                let why = execution.reason.as_ref().map_or(String::new(), |why| format!(": {why}"));
                let text = format!("{}: {}{why}", execution.says(), ending.name());
                execution.draft("end", application.epoch, text)
            };
            let draft = match after {
                Next::End(ending) => Some(ended(ending)),
                Next::Go(_) => None,
            };
            records::write(&*self.store, &app, seen.revision, &application, execution, draft)?;
        }
        Ok(())
    }

    /// Writes an execution as it is, between the begin and the end of a stage.
    pub(crate) fn save(&self, execution: &Execution) -> Result<(), ControlError> {
        let _writing = self.write_alone();
        let seen = records::application(&*self.store, &execution.app)?;
        let (store, app) = (&*self.store, &execution.app);
        records::write(store, app, seen.revision, &seen.application, execution, None)?;
        Ok(())
    }
}

/// Stages whose begin a crash must find in the store: those that change cells or servers.
fn matters_after_a_crash(stage: Stage) -> bool {
    match stage {
        Stage::Prepare
        | Stage::Hold
        | Stage::Grant
        | Stage::Promote
        | Stage::Rejoin
        | Stage::Confine
        | Stage::Regrant
        | Stage::Assess
        | Stage::Revert => true,
        // The fence is taken back by Revert, which follows every crash before the grant, and so is all that was done to a
        // lost server.
        Stage::Fence
        | Stage::Capture
        | Stage::CatchUp
        | Stage::Attach
        | Stage::Cut
        | Stage::Isolate
        | Stage::Recruit
        | Stage::Release => false,
    }
}

/// Tests kill the process here; a release build has no such point.
fn crash_point(stage: Stage, at: &str) {
    crash_point_named(&format!("{stage}:{at}"));
}

/// Tests have a stage take long here, once; a release build has no such point.
async fn hold_point(stage: Stage) {
    static HELD: AtomicBool = AtomicBool::new(false);
    let here = stage.to_string();
    let is_here = std::env::var("HOLDFAST_HOLD_AT").is_ok_and(|point| point == here);
    if cfg!(debug_assertions) && is_here && !HELD.swap(true, Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
}

pub(crate) fn crash_point_named(here: &str) {
    if cfg!(debug_assertions) && std::env::var("HOLDFAST_CRASH_AT").is_ok_and(|point| point == here)
    {
        eprintln!("holdfast: crash point {here}");
        std::process::abort();
    }
}
