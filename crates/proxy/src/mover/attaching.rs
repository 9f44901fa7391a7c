//! Attaching held sessions to the server that they go on with.

use std::sync::Arc;

use model::barrier::{Blocker, Reason, Report};
use tokio::task::JoinSet;

use super::held::attach_one;
use super::{Held, Mover, all, count, each, forced};
use crate::app::{App, Cell};
use crate::engine::{Command, Want};
use crate::session::Leg;

impl Mover {
    /// Attaches those held sessions to `to` that others can see. They stay held.
    pub(super) async fn attach_first(&mut self, app: &str, to: &str) -> Result<Report, String> {
        let app = self.app(app)?;
        let cell = Mover::cell(&app, to)?;
        let holding = self.holdings.entry(app.name.clone()).or_default();
        let lost = holding.settle().await?;
        let held = std::mem::take(&mut holding.sessions);
        let mut report = Report { sessions: count(held.len() + lost.len()), ..Report::default() };
        self.end_lost(lost, &mut report);
        let (first, then): (Vec<Held>, Vec<Held>) =
            held.into_iter().partition(|held| held.read.is_seen_by_others());
        let mut failed = Vec::new();
        let attached = all(self.attach_all(first, &app, &cell)).await?;
        let holding = self.holdings.entry(app.name.clone()).or_default();
        holding.sessions = then;
        for (held, result) in attached {
            match result {
                Ok(old) => {
                    self.retired.entry(app.name.clone()).or_default().push(old);
                    holding.attached.push(held);
                }
                Err(reason) => failed.push((held, reason)),
            }
        }
        self.end_failed(failed, &mut report);
        Ok(report)
    }

    fn attach_all(
        &self,
        held: Vec<Held>,
        app: &Arc<App>,
        cell: &Arc<Cell>,
    ) -> JoinSet<(Held, Result<Leg, Reason>)> {
        each(held, self.shared.config.limits.moves_at_once, |mut held| {
            let (app, cell) = (app.clone(), cell.clone());
            async move {
                let result = attach_one(&mut held, &app, cell).await;
                (held, result)
            }
        })
    }

    /// Ends sessions that cannot go back any more.
    fn end_failed(&self, failed: Vec<(Held, Reason)>, report: &mut Report) {
        for (held, reason) in failed {
            report.told += 1;
            let reasons = vec![reason];
            self.shared.metrics.count_move("failed", &reasons);
            let why = reasons.iter().map(Reason::to_string).collect::<Vec<_>>().join("; ");
            report.blockers.push(Blocker { session: held.session.named(), reasons });
            held.session.tell_and_end(&forced(&why));
        }
    }

    /// Lets those go on that stand on `to` already, and attaches every other held session to it. One for which that fails
    /// cannot go back any more and is told.
    pub(super) async fn attach(&mut self, app: &str, to: &str) -> Result<Report, String> {
        let app = self.app(app)?;
        let cell = Mover::cell(&app, to)?;
        let holding = self.holdings.entry(app.name.clone()).or_default();
        let lost = holding.settle().await?;
        let (first, then) =
            (std::mem::take(&mut holding.attached), std::mem::take(&mut holding.sessions));
        let mut report =
            Report { sessions: count(first.len() + then.len() + lost.len()), ..Report::default() };
        self.end_lost(lost, &mut report);
        for engine in &self.shared.engines {
            engine.send(Command::Unwant(Want::App(app.clone())));
        }
        let mut attaching = self.attach_all(then, &app, &cell);
        let holding = self.holdings.entry(app.name.clone()).or_default();
        let retired = self.retired.entry(app.name.clone()).or_default();
        report.done += count(first.len());
        for held in first {
            self.shared.go_on(held.session, &mut holding.pauses);
        }
        let mut failed = Vec::new();
        while let Some(attached) = attaching.join_next().await {
            let (held, result) =
                attached.map_err(|error| format!("attaching a session broke off: {error}"))?;
            match result {
                Ok(old) => {
                    retired.push(old);
                    report.done += 1;
                    self.shared.go_on(held.session, &mut holding.pauses);
                }
                Err(reason) => failed.push((held, reason)),
            }
        }
        for _ in 0..report.done {
            self.shared.metrics.count_move("moved", &[]);
        }
        self.end_failed(failed, &mut report);
        Ok(report)
    }
}
