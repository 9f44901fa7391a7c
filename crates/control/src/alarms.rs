//! Looks at what alarms ask, again and again.
//!
//! What was seen is in nobody's store: whoever is control anew begins with what is unknown, and no plan begins by that.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use model::plan::Mode;
use model::plan::alarm::{Alarm, Checked, Colour, Standing};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::actions::{Doing, check};
use crate::control::{Control, now_ms};
use crate::plans::By;

/// Between two looks whether a check is due.
const LOOK: Duration = Duration::from_millis(100);
/// Between two looks whether a plan begins by what is red.
const TRIGGER_PAUSE: Duration = Duration::from_secs(1);
/// After an action's own limit.
const LATE: Duration = Duration::from_secs(5);

/// What an alarm is, and what was seen of it.
#[derive(Debug, Clone)]
pub struct Seen {
    alarm: Alarm,
    standing: Standing,
    /// It has had its colour since then.
    since: Instant,
    /// When it was checked last, or is.
    checked: Option<Instant>,
    is_checked_now: bool,
    /// What the last check has said.
    said: String,
}

impl Seen {
    fn new(alarm: &Alarm) -> Seen {
        Seen {
            alarm: alarm.clone(),
            standing: Standing::default(),
            since: Instant::now(),
            checked: None,
            is_checked_now: false,
            said: "it was not looked at yet".into(),
        }
    }

    pub fn colour(&self) -> Colour {
        self.standing.colour
    }

    pub fn said(&self) -> &str {
        &self.said
    }

    /// For how long it has had its colour.
    pub fn held(&self) -> Duration {
        self.since.elapsed()
    }

    fn is_due(&self) -> bool {
        let every = Duration::from_millis(self.alarm.every_ms);
        !self.is_checked_now && self.checked.is_none_or(|at| at.elapsed() >= every)
    }
}

/// Runs until the task is dropped.
pub async fn run(control: Arc<Control>, app: String) {
    // One for each alarm at most.
    let mut checks = JoinSet::new();
    let mut triggered = Instant::now();
    loop {
        for (alarm, number) in control.due_alarms(&app) {
            let (control, app) = (control.clone(), app.clone());
            checks.spawn(async move {
                let limit = Duration::from_millis(alarm.timeout_ms);
                let doing = control.doing_check(&app, &alarm, number);
                let checked = check(&control, &doing, &alarm.check, limit);
                let late = || (Checked::Unanswered, "it is not answered in time".to_owned());
                let checked = timeout(limit + LATE, checked).await.unwrap_or_else(|_| late());
                control.hear_alarm(&app, &alarm, checked);
            });
        }
        if triggered.elapsed() >= TRIGGER_PAUSE {
            triggered = Instant::now();
            control.trigger_plans(&app, By::Alarms);
        }
        tokio::time::sleep(LOOK).await;
        while checks.try_join_next().is_some() {}
    }
}

impl Control {
    fn with_alarms<T>(&self, act: impl FnOnce(&mut BTreeMap<(String, String), Seen>) -> T) -> T {
        act(&mut self.alarms.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Those of an application, by name.
    pub fn alarms(&self, app: &str) -> BTreeMap<String, Seen> {
        self.with_alarms(|all| {
            let its = all.iter().filter(|((of, _), _)| of == app);
            its.map(|((_, name), seen)| (name.clone(), seen.clone())).collect()
        })
    }

    /// For how long an alarm has been red, if it is, and is still this one.
    pub(crate) fn red_ms(&self, app: &str, alarm: &Alarm) -> Option<u64> {
        self.with_alarms(|all| {
            let seen = all.get(&(app.to_owned(), alarm.name.clone()))?;
            let is_red = seen.colour() == Colour::Red && seen.alarm == *alarm;
            is_red.then(|| u64::try_from(seen.held().as_millis()).unwrap_or(u64::MAX))
        })
    }

    /// Alarms that are to be checked now, each with a number that no other check of it has. What is not configured any more,
    /// or otherwise, is forgotten.
    fn due_alarms(&self, app: &str) -> Vec<(Alarm, u64)> {
        let Ok(servers) = self.servers(app) else { return Vec::new() };
        let settings = servers.now();
        self.with_alarms(|all| {
            all.retain(|(of, name), seen| {
                of != app || settings.alarms.get(name) == Some(&seen.alarm)
            });
            let mut due = Vec::new();
            for (name, alarm) in &settings.alarms {
                let key = (app.to_owned(), name.clone());
                let seen = all.entry(key).or_insert_with(|| Seen::new(alarm));
                if seen.is_due() {
                    (seen.checked, seen.is_checked_now) = (Some(Instant::now()), true);
                    due.push((alarm.clone(), now_ms()));
                }
            }
            due
        })
    }

    fn doing_check(&self, app: &str, alarm: &Alarm, number: u64) -> Doing {
        let application = self.application(app).ok();
        let active = application.as_ref().and_then(|one| one.active().map(str::to_owned));
        let Alarm { name, .. } = alarm;
        Doing {
            app: app.to_owned(),
            plan: String::new(),
            execution: 0,
            step: name.clone(),
            key: format!("alarm-{app}-{name}-{number}"),
            mode: Mode::Graceful,
            is_undo: false,
            active,
            epoch: application.map_or(0, |one| one.epoch.0),
            by: "holdfast".into(),
            overrides: Default::default(),
        }
    }

    fn hear_alarm(&self, app: &str, alarm: &Alarm, (checked, said): (Checked, String)) {
        let key = (app.to_owned(), alarm.name.clone());
        self.with_alarms(|all| {
            // It may be another one by now.
            let Some(seen) = all.get_mut(&key).filter(|seen| seen.alarm == *alarm) else { return };
            let before = seen.colour();
            seen.standing = seen.standing.hear(alarm, checked);
            (seen.is_checked_now, seen.said) = (false, said);
            let (name, now, said) = (&alarm.name, seen.standing.colour, &seen.said);
            if now != before {
                seen.since = Instant::now();
                match now {
                    Colour::Green => tracing::info!(app, alarm = name, said, "an alarm is green"),
                    Colour::Red => tracing::warn!(app, alarm = name, said, "an alarm is red"),
                    Colour::Unknown => {
                        tracing::warn!(app, alarm = name, said, "of an alarm nothing is known");
                    }
                }
            }
        });
    }
}
