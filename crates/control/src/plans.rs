//! Executions of plans. What is to be done next is said by `model::plan`; here it is recorded, done, and recorded again.
//! Whoever finds one after a crash knows which steps had begun, and of those that are executions of their own what became.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use model::audit::{Asking, Draft};
use model::failover::Analysis;
use model::plan::alarm::Alarm;
use model::plan::run::{
    Deed, Event, Foreseen, Found, Outcome, PlanEnding, PlanExecution, StepState,
};
use model::plan::trigger::{Fires, Trigger};
use model::plan::{Action, Mode, Plan, World};
use serde::{Deserialize, Serialize};
use store::Revision;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::actions::{self, Doing};
use crate::control::{Control, EXECUTIONS_SHOWN_MAX, now_ms};
use crate::records::{self, RecordError};
use crate::requests::{ControlError, SwitchoverRequest};

/// Between two looks at an execution that goes on, and at an application without one.
const PAUSE: Duration = Duration::from_millis(200);
const PAUSE_IDLE: Duration = Duration::from_secs(2);
/// Between two tries to record what was done.
const RECORD_PAUSE: Duration = Duration::from_secs(1);

/// What plans begin by, by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// What is the matter with the active cell.
    Analysis,
    Alarms,
}

/// Which plan is to be carried out, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanRequest {
    #[serde(default)]
    pub mode: Mode,
    /// What was done is undone once all is done.
    #[serde(default)]
    pub drill: bool,
    #[serde(default)]
    pub dry_run: bool,
}

/// What a dry run of a plan found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanDryRun {
    pub app: String,
    pub plan: String,
    pub steps: Vec<Foreseen>,
    /// Why it would not go; empty if it would, as far as that can be seen now.
    pub refusals: Vec<String>,
}

/// What a person says to an execution that is under way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Say {
    Approve(String),
    Decline(String),
    Retry(String),
    Skip(String),
    Pause,
    Resume,
    Cancel,
    Switch(Mode),
}

impl Say {
    fn name(&self) -> &'static str {
        match self {
            Say::Approve(_) => "approve",
            Say::Decline(_) => "decline",
            Say::Retry(_) => "retry",
            Say::Skip(_) => "skip",
            Say::Pause => "pause",
            Say::Resume => "resume",
            Say::Cancel => "cancel",
            Say::Switch(_) => "mode",
        }
    }

    fn step(&self) -> Option<&str> {
        match self {
            Say::Approve(step) | Say::Decline(step) | Say::Retry(step) | Say::Skip(step) => {
                Some(step)
            }
            Say::Pause | Say::Resume | Say::Cancel | Say::Switch(_) => None,
        }
    }
}

/// Steps that are being done, by name.
type Going = BTreeMap<String, JoinHandle<()>>;

/// Carries out the plans of an application. Runs until the task is dropped.
pub async fn run(control: Arc<Control>, app: String) {
    let mut going = Going::new();
    loop {
        let pause = match control.conduct(&app, &mut going) {
            Ok(true) => PAUSE,
            Ok(false) => PAUSE_IDLE,
            Err(error) => {
                tracing::warn!(app, error = model::chain(&error), "a plan stands still");
                PAUSE_IDLE
            }
        };
        let _ = timeout(pause, control.stirred(&app).notified()).await;
    }
}

/// An execution of a plan as it was read.
struct Read {
    execution: PlanExecution,
    revision: Revision,
}

impl Control {
    fn stirred(&self, app: &str) -> &Notify {
        self.stirred.get(app).unwrap_or(&self.never)
    }

    fn plan(&self, app: &str, name: &str) -> Result<Plan, ControlError> {
        let settings = self.servers(app)?.now();
        let plans = &settings.plans;
        plans.get(name).cloned().ok_or_else(|| {
            let known = plans.keys().cloned().collect::<Vec<_>>().join(", ");
            ControlError::NoPlan { app: app.into(), plan: name.into(), known }
        })
    }

    fn world(&self) -> Result<World, ControlError> {
        let read = |app: &String| Ok((app.clone(), self.application(app)?));
        self.config.apps.keys().map(read).collect()
    }

    fn read_plan(&self, app: &str, id: u64) -> Result<Read, ControlError> {
        let found = records::plan_execution(&*self.store, app, id)?;
        let (execution, revision) = found.ok_or(ControlError::NoExecution(id))?;
        Ok(Read { execution, revision })
    }

    /// # Errors
    /// The store cannot be read, or has no such execution.
    pub fn plan_execution(&self, app: &str, id: u64) -> Result<PlanExecution, ControlError> {
        self.servers(app)?;
        Ok(self.read_plan(app, id)?.execution)
    }

    /// The newest executions of plans of an application, newest first.
    ///
    /// # Errors
    /// There is no such application, or the store cannot be read.
    pub fn plan_executions(&self, app: &str) -> Result<Vec<PlanExecution>, ControlError> {
        self.servers(app)?;
        let mut all = records::plan_executions(&*self.store, app)?;
        all.reverse();
        all.truncate(EXECUTIONS_SHOWN_MAX);
        Ok(all)
    }

    /// The execution of a plan that is under way.
    ///
    /// # Errors
    /// There is no such application, or the store cannot be read.
    pub fn plan_under_way(&self, app: &str) -> Result<Option<PlanExecution>, ControlError> {
        let under_way = self.application(app)?.plan;
        under_way.map(|id| self.plan_execution(app, id)).transpose()
    }

    fn new_plan(
        &self,
        app: &str,
        name: &str,
        request: &PlanRequest,
        asking: &Asking,
    ) -> Result<PlanExecution, ControlError> {
        Ok(PlanExecution {
            id: 0,
            app: app.into(),
            nonce: nonce()?,
            plan: self.plan(app, name)?,
            mode: request.mode,
            is_drill: request.drill,
            is_triggered: false,
            asked: asking.clone(),
            started_at_ms: now_ms(),
            ended_at_ms: None,
            steps: BTreeMap::new(),
            is_paused: false,
            goes_back: false,
            reason: None,
            ending: None,
        })
    }

    /// What a plan would do, by the same decisions, and what of it is seen to be in the way now. Changes nothing.
    ///
    /// # Errors
    /// There is no such application or plan, or the store cannot be read.
    pub async fn plan_dry_run(
        &self,
        app: &str,
        name: &str,
        request: &PlanRequest,
    ) -> Result<PlanDryRun, ControlError> {
        let execution = self.new_plan(app, name, request, &Asking::default())?;
        let mut refusals = Vec::new();
        if let Some(id) = self.application(app)?.plan {
            refusals.push(ControlError::PlanUnderWay { app: app.into(), id }.to_string());
        }
        let steps = execution.foresee(self.world()?);
        // What comes after the first change of cells cannot be looked at before.
        let mut is_as_now = true;
        for line in &steps {
            let Some(action) = &line.action else { continue };
            for why in self.foreseen(action, request.mode, is_as_now).await {
                refusals.push(format!("step `{}`: {why}", line.step));
            }
            is_as_now &= !action.is_own_execution();
        }
        Ok(PlanDryRun { app: app.into(), plan: name.into(), steps, refusals })
    }

    async fn foreseen(&self, action: &Action, mode: Mode, is_as_now: bool) -> Vec<String> {
        match action {
            Action::Activate { app, to, deadline_ms, on_timeout, allow_data_loss } if is_as_now => {
                let (to, deadline_ms, on_timeout) = (to.clone(), *deadline_ms, *on_timeout);
                let found = match mode {
                    Mode::Graceful => {
                        let request =
                            SwitchoverRequest { to, dry_run: true, deadline_ms, on_timeout };
                        self.dry_run(app, &request).await
                    }
                    Mode::Ungraceful => {
                        let allow_data_loss = *allow_data_loss;
                        let request = crate::FailoverRequest { to, allow_data_loss, dry_run: true };
                        self.failover_dry_run(app, &request).await
                    }
                };
                match found {
                    Ok(found) => found.refusals,
                    Err(ControlError::AlreadyActive { .. }) => Vec::new(),
                    Err(error) => vec![model::chain(&error)],
                }
            }
            Action::Exec { argv } => {
                let program = argv.first().map(String::as_str).unwrap_or_default();
                let is_missing = program.contains('/') && !Path::new(program).is_file();
                is_missing.then(|| format!("there is no program `{program}`")).into_iter().collect()
            }
            Action::Http(http) => {
                let token = http.token_file.as_deref().map(actions::secret_of);
                token.and_then(Result::err).into_iter().collect()
            }
            Action::Dns(dns) => {
                let key = dns.key_file.as_deref().map(actions::key_of);
                key.and_then(Result::err).into_iter().collect()
            }
            _ => Vec::new(),
        }
    }

    /// Begins a plan, which goes on by itself from then on.
    ///
    /// # Errors
    /// There is no such plan, another is under way, or the store cannot be written.
    pub fn begin_plan(
        &self,
        app: &str,
        name: &str,
        request: &PlanRequest,
        asking: &Asking,
    ) -> Result<PlanExecution, ControlError> {
        let execution = self.new_plan(app, name, request, asking)?;
        self.check_overrides(app, asking)?;
        self.record_new_plan(app, execution)
    }

    fn record_new_plan(
        &self,
        app: &str,
        mut execution: PlanExecution,
    ) -> Result<PlanExecution, ControlError> {
        records::check_plan(&execution).map_err(|why| {
            ControlError::Refused(format!(
                "plan `{}` cannot be carried out: {why}",
                execution.plan.name
            ))
        })?;
        let asking = execution.asked.clone();
        let _writing = self.write_alone();
        if let Some(key) = &asking.key {
            let all = records::plan_executions(&*self.store, app)?;
            let found = all.into_iter().find(|one| one.asked.key.as_ref() == Some(key));
            if let Some(found) = found {
                // The mode may have been changed since.
                let is_same = (&found.plan.name, found.is_drill)
                    == (&execution.plan.name, execution.is_drill);
                let (key, says) = (key.clone(), found.says());
                return match is_same {
                    true => Ok(found),
                    false => Err(ControlError::OtherRequest { key, says }),
                };
            }
        }
        let seen = records::application(&*self.store, app)?;
        let mut application = seen.application;
        if let Some(epoch) = asking.if_epoch.filter(|epoch| *epoch != application.epoch.0) {
            let found = application.epoch.0;
            return Err(ControlError::OtherEpoch { app: app.into(), epoch, found });
        }
        if let Some(id) = application.plan {
            return Err(ControlError::PlanUnderWay { app: app.into(), id });
        }
        execution.id = records::next_id(&*self.store, app)?;
        application.plan = Some(execution.id);
        let draft = execution.draft("plan", application.epoch, execution.says());
        let changed = Some((seen.revision, &application));
        records::write_plan(&*self.store, app, changed, (None, &execution), Some(draft))?;
        tracing::info!(app, execution = execution.id, plan = execution.plan.name, "plan begins");
        self.stirred(app).notify_one();
        Ok(execution)
    }

    /// Begins plans that are for what is the matter. Those that are by alarms alone begin also where no cell is active.
    pub(crate) fn trigger_plans(&self, app: &str, by: By) {
        let Ok(servers) = self.servers(app) else { return };
        let now = servers.now();
        let seen = match (self.seen(app), by) {
            (Some(seen), _) => (seen.analysis, seen.since.elapsed()),
            (None, By::Alarms) => (Analysis::NoProblem, Duration::ZERO),
            (None, By::Analysis) => return,
        };
        let is_by = |trigger: &&Trigger| trigger.on.is_empty() == (by == By::Alarms);
        for plan in now.plans.values() {
            for trigger in plan.triggers.iter().filter(is_by) {
                if let Err(error) = self.trigger_plan(app, (plan, trigger), &now.alarms, seen) {
                    let error = model::chain(&error);
                    tracing::warn!(app, plan = plan.name, error, "a plan does not begin");
                }
            }
        }
    }

    fn trigger_plan(
        &self,
        app: &str,
        (plan, trigger): (&Plan, &Trigger),
        alarms: &BTreeMap<String, Alarm>,
        (analysis, held): (Analysis, Duration),
    ) -> Result<(), ControlError> {
        let held_ms = u64::try_from(held.as_millis()).unwrap_or(u64::MAX);
        let red_ms = |name: &str| self.red_ms(app, alarms.get(name)?);
        let held_ms = trigger.held_ms((analysis, held_ms), red_ms);
        if trigger.fires(held_ms, &[], now_ms()) == Fires::No {
            let begins = format!("plan `{}` ", plan.name);
            let is_its = |text: &String| text.starts_with(&begins) && plan.triggers.len() == 1;
            if self.seen(app).and_then(|seen| seen.held_back).is_some_and(|text| is_its(&text)) {
                self.note_seen(app, |seen| seen.held_back = None);
            }
            return Ok(());
        }
        if self.application(app)?.plan.is_some() {
            return Ok(());
        }
        let begun: Vec<u64> = records::plan_executions(&*self.store, app)?
            .iter()
            .filter(|one| one.plan.name == plan.name && one.is_triggered)
            .map(|one| one.started_at_ms)
            .collect();
        match trigger.fires(held_ms, &begun, now_ms()) {
            Fires::No => Ok(()),
            Fires::HeldBack(why) => {
                let text = format!("plan `{}` does not begin by itself: {why}", plan.name);
                self.note_seen(app, |seen| {
                    if seen.held_back.as_ref() != Some(&text) {
                        tracing::warn!(app, why = text, "a plan is held back");
                        seen.held_back = Some(text);
                    }
                });
                Ok(())
            }
            Fires::Yes => {
                let matter =
                    (!trigger.on.is_empty()).then(|| format!("{} ({analysis})", analysis.says()));
                let red = trigger.alarms.iter().map(|alarm| format!("alarm `{alarm}` is red"));
                let says = matter.into_iter().chain(red).collect::<Vec<_>>().join(", ");
                tracing::error!(app, plan = plan.name, "a plan begins by itself: {says}");
                let request = PlanRequest { mode: trigger.mode, ..PlanRequest::default() };
                let asking = Asking::own(&says);
                let mut execution = self.new_plan(app, &plan.name, &request, &asking)?;
                execution.is_triggered = true;
                self.record_new_plan(app, execution).map(drop)
            }
        }
    }

    /// A person says something to an execution that is under way.
    ///
    /// # Errors
    /// It cannot be said as it stands, or the store cannot be written.
    pub fn say_to_plan(
        &self,
        app: &str,
        id: u64,
        say: &Say,
        asking: &Asking,
    ) -> Result<PlanExecution, ControlError> {
        self.servers(app)?;
        let _writing = self.write_alone();
        let Read { mut execution, revision } = self.read_plan(app, id)?;
        let found = records::application(&*self.store, app)?.application.epoch.0;
        if let Some(epoch) = asking.if_epoch.filter(|epoch| *epoch != found) {
            return Err(ControlError::OtherEpoch { app: app.into(), epoch, found });
        }
        let (now, by) = (now_ms(), &asking.by);
        let because = asking.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
        let skipped = Event::Skip(format!("skipped by {by}{because}"));
        match say {
            Say::Approve(step) => execution.answer(step, true, by, now)?,
            Say::Decline(step) => execution.answer(step, false, by, now)?,
            Say::Retry(step) => execution.resolve(step, &Event::Retry, now)?,
            Say::Skip(step) => execution.resolve(step, &skipped, now)?,
            Say::Pause => execution.pause(true)?,
            Say::Resume => execution.pause(false)?,
            Say::Cancel => execution.cancel(format!("cancelled by {by}{because}"))?,
            Say::Switch(mode) => execution.switch(*mode)?,
        }
        let what = say.step().map_or(String::new(), |step| format!(", step `{step}`"));
        let text = format!("{}{what}", execution.says());
        let epoch = records::application(&*self.store, app)?.application.epoch;
        let draft = execution.draft(say.name(), epoch, text);
        let draft = Draft { by: by.clone(), reason: asking.reason.clone(), ..draft };
        let written = (Some(revision), &execution);
        records::write_plan(&*self.store, app, None, written, Some(draft))?;
        self.stirred(app).notify_one();
        Ok(execution)
    }

    /// Goes on with the execution that is under way, as far as it goes now. Gives whether one is.
    fn conduct(self: &Arc<Control>, app: &str, going: &mut Going) -> Result<bool, ControlError> {
        loop {
            let Some(id) = self.application(app)?.plan else {
                going.clear();
                return Ok(false);
            };
            going.retain(|_, handle| !handle.is_finished());
            let (execution, begun, world) = {
                let _writing = self.write_alone();
                let Read { mut execution, revision } = self.read_plan(app, id)?;
                let world = self.world()?;
                let before = execution.clone();
                self.take_in_hand(&mut execution, &world, going)?;
                let deeds = execution.next(&world, now_ms());
                let begun = follow(&mut execution, deeds, &world)?;
                if execution == before {
                    return Ok(true);
                }
                self.record_plan(app, &before, (revision, &execution), &begun.text)?;
                (execution, begun, world)
            };
            crash_point("begin");
            for (step, action) in begun.actions {
                self.begin_step(&execution, &step, action, &world, going);
            }
            if begun.has_ended {
                going.clear();
                return Ok(false);
            }
        }
    }

    /// Steps that are found running by nobody: control has ended since they began, or a person does not wait for them.
    fn take_in_hand(
        self: &Arc<Control>,
        execution: &mut PlanExecution,
        world: &World,
        going: &mut Going,
    ) -> Result<(), ControlError> {
        let app = execution.app.clone();
        for step in execution.plan.clone().all_steps() {
            let Some(action) = execution.being_done(step) else {
                if let Some(task) = going.remove(&step.name) {
                    task.abort();
                }
                continue;
            };
            if going.contains_key(&step.name) {
                continue;
            }
            match execution.found(step, &action, now_ms()) {
                Found::Wait => (),
                Found::Lost(outcome) => {
                    tracing::warn!(app, step = step.name, "a step was cut off");
                    execution.on(&step.name, &Event::Ended(outcome), now_ms(), world)?;
                }
                Found::Again if execution.is_paused && !action.is_own_execution() => (),
                Found::Again => {
                    tracing::warn!(app, step = step.name, "a step that was cut off goes on");
                    self.begin_step(execution, &step.name, action, world, going);
                }
            }
        }
        Ok(())
    }

    fn record_plan(
        &self,
        app: &str,
        before: &PlanExecution,
        (revision, execution): (Revision, &PlanExecution),
        text: &str,
    ) -> Result<(), ControlError> {
        let seen = records::application(&*self.store, app)?;
        let mut application = seen.application;
        let ended = execution.ending.filter(|_| before.ending.is_none());
        if ended.is_some() {
            application.plan = None;
        }
        let text = format!("{}: {text}", execution.says());
        let did = if ended.is_some() { "plan ends" } else { "step" };
        let own = Asking::own("the plan says so");
        let draft = execution.draft(did, application.epoch, text);
        let draft = Draft { by: own.by, reason: own.reason, ..draft };
        let changed = ended.is_some().then_some((seen.revision, &application));
        let written = (Some(revision), execution);
        records::write_plan(&*self.store, app, changed, written, Some(draft))?;
        Ok(())
    }

    fn begin_step(
        self: &Arc<Control>,
        execution: &PlanExecution,
        step: &str,
        action: Action,
        world: &World,
        going: &mut Going,
    ) {
        let progress = execution.progress(step);
        let is_undo = progress.state == StepState::Undoing;
        let (id, app) = (execution.id, execution.app.clone());
        let here = world.get(&app);
        let doing = Doing {
            plan: execution.plan.name.clone(),
            execution: id,
            step: step.to_owned(),
            key: execution.key_of(step),
            // What is taken back is taken back with both cells there.
            mode: if is_undo { Mode::Graceful } else { progress.mode },
            is_undo,
            active: here.and_then(|here| here.active()).map(str::to_owned),
            epoch: here.map_or(0, |here| here.epoch.0),
            by: execution.asked.by.clone(),
            overrides: execution.asked.overrides.clone(),
            app,
        };
        let limit = execution.plan.step(step).map_or(0, |step| step.timeout_ms);
        let control = self.clone();
        let task = tokio::spawn(async move {
            let limit = Duration::from_millis(limit);
            let outcome = actions::perform(&control, &doing, &action, limit).await;
            crash_point("end");
            control.record_outcome(&doing.app, id, &doing.step, outcome).await;
        });
        going.insert(step.to_owned(), task);
    }

    /// Records how a step has ended, as soon as that can be done.
    async fn record_outcome(&self, app: &str, id: u64, step: &str, outcome: Outcome) {
        let text = outcome.text().to_owned();
        let is_done = outcome.is_done();
        tracing::info!(app, execution = id, step, is_done, "step has ended");
        let event = Event::Ended(outcome);
        loop {
            match self.try_record_outcome(app, id, step, &event, &text) {
                Err(ControlError::Record(RecordError::Store(error))) => {
                    let error = model::chain(&error);
                    tracing::warn!(app, execution = id, step, error, "not recorded yet");
                    tokio::time::sleep(RECORD_PAUSE).await;
                }
                Ok(()) => break,
                // It is known by now.
                Err(error) => {
                    let error = model::chain(&error);
                    tracing::warn!(app, execution = id, step, error, "not recorded");
                    break;
                }
            }
        }
        self.stirred(app).notify_one();
    }

    fn try_record_outcome(
        &self,
        app: &str,
        id: u64,
        step: &str,
        event: &Event,
        text: &str,
    ) -> Result<(), ControlError> {
        let _writing = self.write_alone();
        let Read { mut execution, revision } = self.read_plan(app, id)?;
        let before = execution.clone();
        execution.on(step, event, now_ms(), &World::new())?;
        let state = execution.progress(step).state;
        let text = format!("step `{step}` is {state}: {text}");
        self.record_plan(app, &before, (revision, &execution), &text)
    }
}

/// What nobody else knows.
fn nonce() -> Result<String, ControlError> {
    let mut bytes = [0; 12];
    ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes)
        .map_err(|_| ControlError::Refused("this system gives no random numbers".into()))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What has begun, and what is said of it.
#[derive(Default)]
struct Begun {
    actions: Vec<(String, Action)>,
    text: String,
    has_ended: bool,
}

fn follow(
    execution: &mut PlanExecution,
    deeds: Vec<Deed>,
    world: &World,
) -> Result<Begun, ControlError> {
    let mut begun = Begun::default();
    let mut texts = Vec::new();
    for deed in deeds {
        match deed {
            Deed::GoBack(why) => {
                texts.push(format!("goes back: {why}"));
                execution.cancel(why)?;
            }
            Deed::End(ending) => {
                let left = execution.left();
                texts.push(match ending {
                    PlanEnding::Completed | PlanEnding::Undone => ending.name().to_owned(),
                    PlanEnding::UndoneInPart => {
                        format!("{}; left as they are: {}", ending.name(), left.join(", "))
                    }
                });
                execution.end(ending, now_ms());
                begun.has_ended = true;
            }
            Deed::Step { step, event, action } => {
                execution.on(&step, &event, now_ms(), world)?;
                let state = execution.progress(&step).state;
                texts.push(format!("step `{step}` is {state}"));
                if let Some(action) = action {
                    begun.actions.push((step, action));
                }
            }
        }
    }
    begun.text = texts.join("; ");
    Ok(begun)
}

/// Tests kill the process here; a release build has no such point.
fn crash_point(at: &str) {
    crate::runner::crash_point_named(&format!("plan:{at}"));
}
