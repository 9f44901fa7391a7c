//! One execution of a plan: where each step stands, what happens to it, and what is to be done next.
//!
//! Whoever carries it out records each deed before it is done and each outcome after. Found after a crash, a step is
//! running of which nobody knows the outcome: it is done again only where the store or the receiver can tell.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{Action, Mode, OnFailure, Plan, Step, Undo, What, World};
use crate::audit::{Asking, Draft};
use crate::cell::{CellState, Epoch};

/// Longest text that is kept of what became of a step.
pub const TEXT_LEN_MAX: usize = 600;
/// Why a drill goes back.
pub const DRILL_OVER: &str = "the drill is over";
/// How much later than its time limit a step may still run of which nobody knows: clocks differ.
const LATE_MS: u64 = 5_000;

/// Executions of plans sort by their number.
pub fn plan_execution_key(app: &str, id: u64) -> String {
    format!("{}{id:020}", plan_execution_prefix(app))
}

pub fn plan_execution_prefix(app: &str) -> String {
    format!("plan-execution/{app}/")
}

/// Where a step stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepState {
    /// It has not begun, or is to be tried again.
    #[default]
    Pending,
    Running,
    /// A person is asked.
    Asking,
    Done,
    /// It is not tried again by itself.
    Failed,
    /// It was left out.
    Skipped,
    Undoing,
    Undone,
    /// What it has done could not be undone.
    NotUndone,
    /// Somebody has said that what it has done is left as it is.
    Left,
}

/// What happens to a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Begin,
    Ask,
    /// It has ended, or its undoing has.
    Ended(Outcome),
    Approve(String),
    Decline(String),
    /// A person has it tried again.
    Retry,
    /// A person, or what it is conditional on, leaves it out.
    Skip(String),
    Undo,
}

/// How one try ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Done(String),
    /// It was as it is to be already: there is nothing to undo.
    Already(String),
    /// Nothing of it was done.
    NotDone(String),
    /// It says that it has failed, and may have done a part.
    Failed(String),
    /// Nobody knows whether it was done.
    Unknown(String),
}

impl Outcome {
    pub fn is_done(&self) -> bool {
        matches!(self, Outcome::Done(_) | Outcome::Already(_))
    }

    pub fn text(&self) -> &str {
        match self {
            Outcome::Done(text)
            | Outcome::Already(text)
            | Outcome::NotDone(text)
            | Outcome::Failed(text)
            | Outcome::Unknown(text) => text,
        }
    }
}

impl StepState {
    pub const ALL: [StepState; 10] = [
        StepState::Pending,
        StepState::Running,
        StepState::Asking,
        StepState::Done,
        StepState::Failed,
        StepState::Skipped,
        StepState::Undoing,
        StepState::Undone,
        StepState::NotUndone,
        StepState::Left,
    ];

    pub fn name(self) -> &'static str {
        match self {
            StepState::Pending => "pending",
            StepState::Running => "running",
            StepState::Asking => "asking",
            StepState::Done => "done",
            StepState::Failed => "failed",
            StepState::Skipped => "skipped",
            StepState::Undoing => "undoing",
            StepState::Undone => "undone",
            StepState::NotUndone => "not undone",
            StepState::Left => "left",
        }
    }

    /// What it becomes. `goes_on`: another try is left. None: that cannot happen to it now.
    fn after(self, event: &Event, goes_on: bool) -> Option<StepState> {
        use StepState::{Asking, Done, Failed, Left, NotUndone, Pending};
        use StepState::{Running, Skipped, Undoing, Undone};
        match (self, event) {
            (Pending, Event::Begin) => Some(Running),
            (Pending, Event::Ask) => Some(Asking),
            (Pending | Failed, Event::Skip(_)) => Some(Skipped),
            (Asking, Event::Approve(_)) => Some(Done),
            (Asking, Event::Decline(_)) => Some(Failed),
            (Running, Event::Ended(outcome)) if outcome.is_done() => Some(Done),
            // Somebody does not wait for it any more.
            (Running, Event::Skip(_)) => Some(Skipped),
            (Running, Event::Ended(_)) if goes_on => Some(Pending),
            (Running, Event::Ended(_)) => Some(Failed),
            (Failed, Event::Retry) => Some(Pending),
            (Pending | Done | Failed | Skipped, Event::Undo) => Some(Undoing),
            (Undoing, Event::Ended(outcome)) if outcome.is_done() => Some(Undone),
            (Undoing, Event::Skip(_)) => Some(Left),
            (Undoing, Event::Ended(_)) => Some(NotUndone),
            // It is undone once more.
            (NotUndone, Event::Retry) => Some(Done),
            (NotUndone, Event::Skip(_)) => Some(Left),
            (
                Pending | Running | Asking | Done | Failed | Skipped | Undoing | Undone | NotUndone
                | Left,
                _,
            ) => None,
        }
    }
}

impl std::fmt::Display for StepState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What has happened to a step so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub state: StepState,
    /// Tries so far, undoing included.
    pub tries: u32,
    /// Of the key by which whoever it is sent to knows it: the next one once it is known what became of the last.
    #[serde(default)]
    pub key: u32,
    /// In which it has begun.
    #[serde(default)]
    pub mode: Mode,
    /// The number of its end in the execution: what ended last is undone first, whatever clocks say.
    #[serde(default)]
    pub ended_as: u64,
    /// Of these, since a person has it tried again.
    #[serde(default)]
    pub tries_anew: u32,
    pub began_at_ms: Option<u64>,
    pub ended_at_ms: Option<u64>,
    /// How it ended last, or who approved.
    pub text: String,
    /// The cell of its application that was active when it began first.
    #[serde(default)]
    pub before: Option<String>,
    /// Something that it has done may still be there.
    #[serde(default)]
    pub may_have_done: bool,
}

/// How an execution of a plan ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlanEnding {
    Completed,
    /// All that was done was undone.
    Undone,
    /// Something that was done is left.
    UndoneInPart,
}

impl PlanEnding {
    pub fn name(self) -> &'static str {
        match self {
            PlanEnding::Completed => "completed",
            PlanEnding::Undone => "undone",
            PlanEnding::UndoneInPart => "undone in part",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanExecution {
    pub id: u64,
    pub app: String,
    /// Of the keys of its steps, which nobody else knows.
    #[serde(default)]
    pub nonce: String,
    /// As it was when this began.
    pub plan: Plan,
    pub mode: Mode,
    /// It is undone once it is done.
    pub is_drill: bool,
    /// Nobody has asked for it.
    #[serde(default)]
    pub is_triggered: bool,
    pub asked: Asking,
    pub started_at_ms: u64,
    #[serde(default)]
    pub ended_at_ms: Option<u64>,
    pub steps: BTreeMap<String, Progress>,
    /// A person lets nothing begin.
    #[serde(default)]
    pub is_paused: bool,
    /// It goes back: what was done is being undone.
    #[serde(default)]
    pub goes_back: bool,
    /// Why it goes back.
    #[serde(default)]
    pub reason: Option<String>,
    #[serde(default)]
    pub ending: Option<PlanEnding>,
}

/// What is to be done next, each recorded by [`PlanExecution::on`] or as it says before it is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deed {
    /// To be done, after [`Event::Begin`] or [`Event::Undo`] was recorded.
    Step {
        step: String,
        event: Event,
        action: Option<Action>,
    },
    /// What was done is undone from now on.
    GoBack(String),
    End(PlanEnding),
}

#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PlanError {
    #[error("execution {id} has no step `{step}`; its steps are {known}")]
    NoStep { id: u64, step: String, known: String },
    #[error("step `{step}` is {state}: it cannot be {asked}")]
    NotNow { step: String, state: StepState, asked: &'static str },
    #[error("execution {id} has ended: {}", .ending.name())]
    Ended { id: u64, ending: PlanEnding },
    #[error("execution {id} is {what} already")]
    Already { id: u64, what: &'static str },
    #[error("`{by}` has begun execution {id}: another person approves step `{step}`")]
    Own { id: u64, step: String, by: String },
}

/// Nobody else's key begins so.
pub const KEY_PREFIX: &str = "plan:";

/// What becomes of a step that was being done by somebody who is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// Something of it may still be going on.
    Wait,
    /// It is done again, by the same key.
    Again,
    Lost(Outcome),
}

/// How far a step has come, with all in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stand {
    /// It is passed.
    Over,
    /// Something in it goes on or may begin.
    Open,
    /// It cannot go on by itself.
    Still,
}

impl PlanExecution {
    pub fn progress(&self, step: &str) -> Progress {
        self.steps.get(step).cloned().unwrap_or_default()
    }

    fn state(&self, step: &str) -> StepState {
        self.steps.get(step).map_or(StepState::Pending, |progress| progress.state)
    }

    fn has(&self, states: &[StepState]) -> bool {
        self.steps.values().any(|progress| states.contains(&progress.state))
    }

    /// Steps that cannot go on by themselves.
    pub fn stuck(&self) -> Vec<&str> {
        let is_stuck =
            |state| matches!(state, StepState::Failed | StepState::NotUndone | StepState::Asking);
        let stuck = self.steps.iter().filter(|(_, progress)| is_stuck(progress.state));
        // One that failed needs nobody any more once all goes back.
        let counts =
            |progress: &Progress| !self.goes_back || progress.state == StepState::NotUndone;
        stuck.filter(|(_, progress)| counts(progress)).map(|(name, _)| name.as_str()).collect()
    }

    fn known_step(&self, step: &str) -> Result<&Step, PlanError> {
        self.plan.step(step).ok_or_else(|| PlanError::NoStep {
            id: self.id,
            step: step.into(),
            known: self
                .plan
                .all_steps()
                .iter()
                .map(|step| step.name.as_str())
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    /// Something happens to a step.
    ///
    /// # Errors
    /// It cannot, as the step stands.
    pub fn on(
        &mut self,
        step: &str,
        event: &Event,
        now_ms: u64,
        world: &World,
    ) -> Result<(), PlanError> {
        let known = self.known_step(step)?;
        let mut progress = self.progress(step);
        let is_certain = !matches!(event, Event::Ended(Outcome::Unknown(_)));
        let goes_on = progress.tries_anew < known.tries && (is_certain || known.idempotent);
        let after = progress.state.after(event, goes_on).ok_or_else(|| PlanError::NotNow {
            step: step.into(),
            state: progress.state,
            asked: asked(event),
        })?;
        let ended_as = self.steps.values().map(|one| one.ended_as).max().unwrap_or(0) + 1;
        let was = std::mem::replace(&mut progress.state, after);
        match event {
            Event::Begin | Event::Undo | Event::Ask => {
                progress.tries = progress.tries.saturating_add(1);
                progress.tries_anew = progress.tries_anew.saturating_add(1);
                if *event == Event::Undo {
                    progress.tries_anew = 1;
                }
                if let (Event::Begin, What::Do(action)) = (event, &known.what) {
                    progress.mode = self.mode;
                    progress.before = progress.before.or_else(|| active_of(world, action));
                }
                progress.began_at_ms = Some(now_ms);
                progress.ended_at_ms = None;
            }
            Event::Retry => progress.tries_anew = 0,
            Event::Ended(outcome) => {
                (progress.ended_at_ms, progress.ended_as) = (Some(now_ms), ended_as);
                // An answer that was lost may be asked for again.
                if matches!(outcome, Outcome::NotDone(_) | Outcome::Failed(_)) {
                    progress.key = progress.key.saturating_add(1);
                }
                match (was, outcome) {
                    (StepState::Running, Outcome::Already(_) | Outcome::NotDone(_)) => (),
                    (StepState::Running, _) => progress.may_have_done = true,
                    (_, outcome) if outcome.is_done() => progress.may_have_done = false,
                    _ => (),
                }
                progress.text = cut(outcome.text());
            }
            Event::Approve(text) | Event::Decline(text) | Event::Skip(text) => {
                // What it does meanwhile, nobody is told.
                progress.may_have_done |= was == StepState::Running;
                (progress.ended_at_ms, progress.ended_as) = (Some(now_ms), ended_as);
                progress.text = cut(text);
            }
        }
        self.steps.insert(step.to_owned(), progress);
        Ok(())
    }

    /// A person approves, or declines.
    ///
    /// # Errors
    /// It is not asked for, or not of this one.
    pub fn answer(
        &mut self,
        step: &str,
        is_approved: bool,
        by: &str,
        now_ms: u64,
    ) -> Result<(), PlanError> {
        self.must_go_on()?;
        if self.goes_back {
            return Err(PlanError::Already { id: self.id, what: "going back" });
        }
        let by_other = matches!(self.known_step(step)?.what, What::Approval { by_other: true });
        if is_approved && by_other && self.asked.by == by {
            return Err(PlanError::Own { id: self.id, step: step.into(), by: by.into() });
        }
        let event = match is_approved {
            true => Event::Approve(format!("approved by {by}")),
            false => Event::Decline(format!("declined by {by}")),
        };
        self.on(step, &event, now_ms, &World::new())
    }

    /// A person leaves a step out, or has it tried again.
    ///
    /// # Errors
    /// It does not stand still.
    pub fn resolve(&mut self, step: &str, event: &Event, now_ms: u64) -> Result<(), PlanError> {
        self.must_go_on()?;
        let state = self.state(step);
        let is_skip = matches!(event, Event::Skip(_));
        let is_meant = match (self.goes_back, &self.known_step(step)?.what) {
            // Nobody gets round an approval: it is asked for again.
            (_, What::Approval { .. }) => state == StepState::Failed && !is_skip,
            (_, What::Sequence(_) | What::Parallel(_)) => false,
            // What the store knows the outcome of is waited for.
            (_, What::Do(action)) if is_skip && !action.is_own_execution() => matches!(
                state,
                StepState::Failed | StepState::Running | StepState::Undoing | StepState::NotUndone
            ),
            (true, What::Do(_)) => state == StepState::NotUndone,
            (false, What::Do(_)) => state == StepState::Failed,
        };
        if !is_meant {
            return Err(PlanError::NotNow { step: step.into(), state, asked: asked(event) });
        }
        self.on(step, event, now_ms, &World::new())
    }

    /// # Errors
    /// It has ended.
    pub fn must_go_on(&self) -> Result<(), PlanError> {
        match self.ending {
            Some(ending) => Err(PlanError::Ended { id: self.id, ending }),
            None => Ok(()),
        }
    }

    /// Nothing begins until it is resumed; what is being done goes on.
    ///
    /// # Errors
    /// It is so already, or has ended.
    pub fn pause(&mut self, is_paused: bool) -> Result<(), PlanError> {
        self.must_go_on()?;
        if self.is_paused == is_paused {
            let what = if is_paused { "paused" } else { "going on" };
            return Err(PlanError::Already { id: self.id, what });
        }
        self.is_paused = is_paused;
        Ok(())
    }

    /// What was done is undone, once what is being done has ended.
    ///
    /// # Errors
    /// It goes back already, or has ended.
    pub fn cancel(&mut self, reason: String) -> Result<(), PlanError> {
        self.must_go_on()?;
        if self.goes_back {
            return Err(PlanError::Already { id: self.id, what: "going back" });
        }
        (self.goes_back, self.reason, self.is_paused) = (true, Some(cut(&reason)), false);
        Ok(())
    }

    /// Nobody knows what has become of it since it was read last: nothing goes on before a person says so.
    pub fn lose(&mut self, why: &str) {
        for progress in self.steps.values_mut() {
            let lost = match progress.state {
                StepState::Running => StepState::Failed,
                StepState::Undoing => StepState::NotUndone,
                _ => continue,
            };
            (progress.state, progress.text, progress.may_have_done) = (lost, cut(why), true);
        }
        // Groups are not done by anybody.
        for step in self.plan.all_steps() {
            if matches!(step.what, What::Sequence(_) | What::Parallel(_))
                && let Some(progress) = self.steps.get_mut(&step.name)
                && progress.state == StepState::Failed
            {
                progress.state = StepState::Running;
            }
        }
        self.is_paused = true;
    }

    /// From now on steps begin in this mode.
    ///
    /// # Errors
    /// It is in it already, or has ended.
    pub fn switch(&mut self, mode: Mode) -> Result<(), PlanError> {
        self.must_go_on()?;
        if self.mode == mode {
            return Err(PlanError::Already { id: self.id, what: mode.name() });
        }
        self.mode = mode;
        // Whoever has approved has approved something else.
        for step in self.plan.all_steps() {
            if let What::Approval { .. } = step.what
                && let Some(progress) = self.steps.get_mut(&step.name)
                && matches!(progress.state, StepState::Done | StepState::Asking)
            {
                *progress = Progress { tries: progress.tries, ..Progress::default() };
            }
        }
        Ok(())
    }

    /// It has ended.
    pub fn end(&mut self, ending: PlanEnding, now_ms: u64) {
        (self.ending, self.ended_at_ms) = (Some(ending), Some(now_ms));
    }

    /// What is to be done now. Nothing: what is being done has to end first, time to pass, or a person to say something.
    pub fn next(&self, world: &World, now_ms: u64) -> Vec<Deed> {
        if self.ending.is_some() {
            return Vec::new();
        }
        let mut deeds = self.expired(now_ms);
        deeds.extend(self.waited(now_ms));
        if self.is_paused || !deeds.is_empty() {
            return deeds;
        }
        if self.goes_back {
            return self.next_back();
        }
        let stand = self.advance_all(&self.plan.steps, world, now_ms, &mut deeds);
        if !deeds.is_empty() {
            return deeds;
        }
        match stand {
            Stand::Over if self.is_drill => vec![Deed::GoBack(DRILL_OVER.into())],
            Stand::Over => vec![Deed::End(PlanEnding::Completed)],
            Stand::Still if self.plan.on_failure == OnFailure::Undo => {
                let failed =
                    self.steps.iter().find(|(_, progress)| progress.state == StepState::Failed);
                let why = failed
                    .map(|(name, progress)| format!("step `{name}` failed: {}", progress.text));
                vec![Deed::GoBack(why.unwrap_or_default())]
            }
            Stand::Still | Stand::Open => Vec::new(),
        }
    }

    /// Approvals that nobody gives in time are declined.
    fn expired(&self, now_ms: u64) -> Vec<Deed> {
        let mut deeds = Vec::new();
        for step in self.plan.all_steps() {
            let progress = self.progress(&step.name);
            let since = progress.began_at_ms.unwrap_or(now_ms);
            if progress.state == StepState::Asking
                && !self.goes_back
                && now_ms.saturating_sub(since) >= step.timeout_ms
            {
                let why = format!("nobody has approved within {} s", step.timeout_ms / 1_000);
                deeds.push(deed(step, Event::Decline(why), None));
            }
        }
        deeds
    }

    /// Waits that are over; all of them are once it goes back.
    fn waited(&self, now_ms: u64) -> Vec<Deed> {
        let mut deeds = Vec::new();
        for step in self.plan.all_steps() {
            let What::Do(Action::Wait { ms }) = &step.what else { continue };
            let progress = self.progress(&step.name);
            let began = progress.began_at_ms.unwrap_or(now_ms);
            let is_over = now_ms.saturating_sub(began) >= *ms || self.goes_back;
            if progress.state == StepState::Running && is_over {
                deeds.push(deed(step, Event::Ended(Outcome::Done(String::new())), None));
            }
        }
        deeds
    }

    fn advance_all(
        &self,
        steps: &[Step],
        world: &World,
        now_ms: u64,
        deeds: &mut Vec<Deed>,
    ) -> Stand {
        for step in steps {
            match self.advance(step, world, now_ms, deeds) {
                Stand::Over => (),
                stand => return stand,
            }
        }
        Stand::Over
    }

    fn advance(&self, step: &Step, world: &World, now_ms: u64, deeds: &mut Vec<Deed>) -> Stand {
        match self.state(&step.name) {
            StepState::Done | StepState::Skipped => Stand::Over,
            StepState::Failed => Stand::Still,
            // Where something has failed, nobody waits for an approval of something else.
            StepState::Asking if self.has(&[StepState::Failed]) => Stand::Still,
            StepState::Asking => Stand::Open,
            StepState::Pending => self.begin(step, now_ms, world, deeds),
            StepState::Running => {
                let stand = match &step.what {
                    What::Do(_) | What::Approval { .. } => return Stand::Open,
                    What::Sequence(steps) => self.advance_all(steps, world, now_ms, deeds),
                    What::Parallel(steps) => {
                        let stands: Vec<Stand> = steps
                            .iter()
                            .map(|step| self.advance(step, world, now_ms, deeds))
                            .collect();
                        let has = |stand| stands.contains(&stand);
                        match (has(Stand::Open), has(Stand::Still)) {
                            (true, _) => Stand::Open,
                            (false, true) => Stand::Still,
                            (false, false) => Stand::Over,
                        }
                    }
                };
                if stand == Stand::Over {
                    let done = Event::Ended(Outcome::Done(String::new()));
                    deeds.push(deed(step, done, None));
                    return Stand::Open;
                }
                stand
            }
            StepState::Undoing | StepState::Undone | StepState::NotUndone | StepState::Left => {
                Stand::Still
            }
        }
    }

    fn begin(&self, step: &Step, now_ms: u64, world: &World, deeds: &mut Vec<Deed>) -> Stand {
        // Where something has failed, nothing else begins: somebody says first what becomes of that.
        if self.has(&[StepState::Failed]) {
            return Stand::Still;
        }
        let progress = self.progress(&step.name);
        if let Some(ended) = progress.ended_at_ms.filter(|_| progress.tries_anew > 0) {
            // A clock that was put back does not make anybody wait for longer.
            let waited = now_ms.checked_sub(ended).unwrap_or(step.pause_ms);
            if waited < step.pause_ms {
                return Stand::Open;
            }
        }
        // What was tried before is not left out for what has become of the cells since.
        let is_first = progress.tries == 0;
        if let Some(mode) = step.mode.filter(|mode| is_first && *mode != self.mode) {
            deeds.push(deed(step, Event::Skip(format!("it is for {} ones", mode.name())), None));
            return Stand::Open;
        }
        let mut conditions = step.only_if.iter().filter(|_| is_first);
        if let Some(why) = conditions.find_map(|condition| condition.check(world).err()) {
            deeds.push(deed(step, Event::Skip(why), None));
            return Stand::Open;
        }
        deeds.push(match &step.what {
            // It is looked at, not done.
            What::Do(Action::Wait { .. }) => deed(step, Event::Begin, None),
            What::Do(action) => deed(step, Event::Begin, Some(action.clone())),
            What::Approval { .. } => deed(step, Event::Ask, None),
            What::Sequence(_) | What::Parallel(_) => deed(step, Event::Begin, None),
        });
        Stand::Open
    }

    /// What a step does to undo what it has done. None if nothing can.
    pub fn undo_of(&self, step: &Step) -> Option<Action> {
        let What::Do(action) = &step.what else { return None };
        let default = (self.is_drill && action.is_own_execution()).then_some(Undo::Back);
        match (step.undo.clone().or(default)?, action) {
            (Undo::Do(undo), _) => Some(undo),
            (Undo::Back, Action::Activate { app, deadline_ms, on_timeout, .. }) => {
                Some(Action::Activate {
                    app: app.clone(),
                    to: self.progress(&step.name).before?,
                    deadline_ms: *deadline_ms,
                    on_timeout: *on_timeout,
                    allow_data_loss: false,
                })
            }
            (Undo::Back, Action::Fence { app, cell, .. }) => {
                Some(Action::Unfence { app: app.clone(), cell: cell.clone() })
            }
            (Undo::Back, _) => None,
        }
    }

    /// Whether a step may have done something that is still there.
    fn may_have_done(&self, step: &Step) -> bool {
        let progress = self.progress(&step.name);
        let What::Do(action) = &step.what else { return false };
        progress.may_have_done && !action.leaves_nothing()
    }

    fn next_back(&self) -> Vec<Deed> {
        if self.has(&[StepState::Undoing, StepState::NotUndone]) {
            return Vec::new();
        }
        let steps = self.plan.all_steps();
        let goes_on = steps.iter().any(|step| {
            matches!(step.what, What::Do(_)) && self.state(&step.name) == StepState::Running
        });
        if goes_on {
            return Vec::new();
        }
        let is_undoable = |step: &&&Step| {
            let state = self.state(&step.name);
            let has_ended = matches!(
                state,
                StepState::Done | StepState::Failed | StepState::Skipped | StepState::Pending
            );
            has_ended && self.may_have_done(step) && self.undo_of(step).is_some()
        };
        // What was done last is undone first.
        let last =
            steps.iter().filter(is_undoable).max_by_key(|step| self.progress(&step.name).ended_as);
        if let Some(step) = last {
            return vec![deed(step, Event::Undo, self.undo_of(step))];
        }
        let is_left = steps.iter().any(|step| self.may_have_done(step));
        vec![Deed::End(if is_left { PlanEnding::UndoneInPart } else { PlanEnding::Undone })]
    }

    /// What was done and is still there, once it has gone back.
    pub fn left(&self) -> Vec<String> {
        let steps = self.plan.all_steps();
        steps.iter().filter(|step| self.may_have_done(step)).map(|step| step.name.clone()).collect()
    }

    /// A step that is being done, or undone, and by what: whoever finds it with nobody who does it asks what becomes of it.
    pub fn being_done(&self, step: &Step) -> Option<Action> {
        match (&step.what, self.state(&step.name)) {
            (What::Do(Action::Wait { .. }), _) => None,
            (What::Do(action), StepState::Running) => Some(action.clone()),
            (_, StepState::Undoing) => self.undo_of(step),
            _ => None,
        }
    }

    /// What becomes of a step that is found being done by nobody.
    pub fn found(&self, step: &Step, action: &Action, now_ms: u64) -> Found {
        if action.is_own_execution() {
            return Found::Again;
        }
        let began = self.progress(&step.name).began_at_ms.unwrap_or(now_ms);
        // It may be done to its time limit, by a process that nobody sees. A clock that was put back waits anew.
        let over = began.saturating_add(step.timeout_ms).saturating_add(LATE_MS);
        if now_ms < over && now_ms >= began {
            return Found::Wait;
        }
        if step.idempotent {
            return Found::Again;
        }
        let what = "control ended while it was being done: look whether it was";
        Found::Lost(Outcome::Unknown(what.into()))
    }

    /// By this whoever a step is sent to knows it, however often it is sent.
    pub fn key_of(&self, step: &str) -> String {
        let progress = self.progress(step);
        let what = if progress.state == StepState::Undoing { "undo" } else { "do" };
        format!("{KEY_PREFIX}{}/{step}/{what}/{}", self.nonce, progress.key)
    }

    /// How long it took, without what people were waited for.
    pub fn took_ms(&self, now_ms: u64) -> u64 {
        let total = self.ended_at_ms.unwrap_or(now_ms).saturating_sub(self.started_at_ms);
        let asked = self.plan.all_steps().into_iter().filter_map(|step| {
            let progress = self.progress(&step.name);
            let began =
                progress.began_at_ms.filter(|_| matches!(step.what, What::Approval { .. }))?;
            Some(progress.ended_at_ms.unwrap_or(now_ms).saturating_sub(began))
        });
        total.saturating_sub(asked.sum())
    }

    /// The record of what happens to it.
    pub fn draft(&self, did: &'static str, epoch: Epoch, text: String) -> Draft {
        let Asking { by, reason, .. } = self.asked.clone();
        Draft { by, did, app: self.app.clone(), epoch: epoch.0, reason, text }
    }

    /// What it does, in words.
    pub fn says(&self) -> String {
        let PlanExecution { id, app, plan, mode, is_drill, .. } = self;
        let drill = if *is_drill { ", a drill" } else { "" };
        format!("execution {id}: plan `{}` of `{app}`, {}{drill}", plan.name, mode.name())
    }
}

fn deed(step: &Step, event: Event, action: Option<Action>) -> Deed {
    Deed::Step { step: step.name.clone(), event, action }
}

fn active_of(world: &World, action: &Action) -> Option<String> {
    world.get(action.app()?)?.active().map(str::to_owned)
}

fn asked(event: &Event) -> &'static str {
    match event {
        Event::Begin => "begun",
        Event::Ask => "asked",
        Event::Ended(_) => "ended",
        Event::Approve(_) => "approved",
        Event::Decline(_) => "declined",
        Event::Retry => "tried again",
        Event::Skip(_) => "skipped",
        Event::Undo => "undone",
    }
}

fn cut(text: &str) -> String {
    text.chars().take(TEXT_LEN_MAX).collect()
}

/// One line of what would be done, for a dry run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreseen {
    pub step: String,
    pub text: String,
    /// What it does, if it does something.
    pub action: Option<Action>,
}

impl PlanExecution {
    /// What would be done if every step came about and every person approved, by the same decisions.
    pub fn foresee(mut self, mut world: World) -> Vec<Foreseen> {
        let mut lines = Vec::new();
        let mut now_ms = self.started_at_ms;
        // Each step has a handful of deeds, so this ends.
        while self.ending.is_none() && lines.len() < super::STEPS_MAX * 4 {
            let deeds = self.next(&world, now_ms);
            if deeds.is_empty() {
                break;
            }
            for deed in deeds {
                now_ms += 1;
                match deed {
                    Deed::GoBack(why) => {
                        let _ = self.cancel(why);
                    }
                    Deed::End(ending) => self.end(ending, now_ms),
                    Deed::Step { step, event, action } => {
                        let Ok(says) = self.known_step(&step).map(Step::says) else { break };
                        if self.on(&step, &event, now_ms, &world).is_err() {
                            break;
                        }
                        let text = match (&event, &action) {
                            (Event::Skip(why), _) => format!("skipped: {why}"),
                            (Event::Undo, Some(action)) => format!("undo: {}", action.says()),
                            (Event::Ended(_), _) => continue,
                            _ => says,
                        };
                        if let Some(action) = &action {
                            foreseen(&mut world, action);
                        }
                        let is_group = event == Event::Begin && action.is_none();
                        let is_wait = self
                            .plan
                            .step(&step)
                            .is_some_and(|step| matches!(step.what, What::Do(Action::Wait { .. })));
                        let done = Event::Ended(Outcome::Done(String::new()));
                        let ended = match event {
                            Event::Ask => {
                                self.on(&step, &Event::Approve(String::new()), now_ms, &world)
                            }
                            Event::Begin | Event::Undo if !is_group || is_wait => {
                                self.on(&step, &done, now_ms, &world)
                            }
                            _ => Ok(()),
                        };
                        lines.push(Foreseen { step, text, action });
                        if ended.is_err() {
                            return lines;
                        }
                    }
                }
            }
        }
        lines
    }
}

/// What an action makes of the cells.
fn foreseen(world: &mut World, action: &Action) {
    let Some(application) = action.app().and_then(|app| world.get_mut(app)) else { return };
    let served = application.served().map(|(cell, _)| cell.to_owned());
    let (cell, state) = match action {
        Action::Activate { to, .. } => {
            if let Some(served) = served.and_then(|served| application.cells.get_mut(&served)) {
                *served = CellState::Passive;
            }
            (to, CellState::Active)
        }
        Action::Fence { cell, all: true, .. } => (cell, CellState::Passive),
        Action::Fence { cell, .. } => (cell, CellState::Fenced),
        Action::Unfence { cell, .. } => (cell, CellState::Active),
        Action::Http(_)
        | Action::Exec { .. }
        | Action::Sql { .. }
        | Action::Haproxy { .. }
        | Action::Dns(_)
        | Action::Wait { .. } => return,
    };
    if let Some(found) = application.cells.get_mut(cell) {
        *found = state;
    }
}

#[cfg(test)]
mod tests;
