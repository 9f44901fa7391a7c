//! While control is gone: asks the other agents for pledges, and answers theirs.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use link::server::Bytes;
use link::{Client, Who, agent_name};
use model::cell::Epoch;
use model::lease::{Moment, Terms};
use model::pledge::{Neighbour, Plea, Pledged, Pledger, Situation};
use pg::{Address, clock};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::beside::{Beside, write_durably};

pub(crate) const PATH: &str = "/v1/pledge";

/// What was pledged, on disk.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    pledger: Pledger,
    /// The boot by whose clock, and the longest that it may last from any moment.
    boot: String,
    terms: Terms,
}

/// What this host has pledged, also before it was started again.
#[derive(Debug)]
pub(crate) struct Pledges {
    path: PathBuf,
    pledger: Pledger,
    terms: Terms,
}

impl Pledges {
    /// # Errors
    /// What was pledged cannot be read.
    pub(crate) fn read(dir: &Path) -> std::io::Result<Pledges> {
        let path = dir.join("pledges");
        let terms = Terms { length: Duration::ZERO };
        let (pledger, terms) = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                (Pledger::default(), terms)
            }
            Err(error) => return Err(error),
            Ok(bytes) => {
                let Kept { pledger, boot, terms } = serde_json::from_slice(&bytes)?;
                let is_same = boot == clock::boot();
                (if is_same { pledger } else { pledger.after_boot(clock::now(), terms) }, terms)
            }
        };
        Ok(Pledges { path, pledger, terms })
    }

    fn keep(&self) -> std::io::Result<()> {
        let kept = Kept { pledger: self.pledger, boot: clock::boot(), terms: self.terms };
        write_durably(&self.path, &serde_json::to_vec(&kept)?)
    }

    /// Pledges, if that may be, and remembers it before it is said.
    fn pledge(&mut self, epoch: Epoch, at: Situation) -> std::io::Result<bool> {
        let (before, terms) = (self.pledger, self.terms);
        let is_pledged = self.pledger.pledge(epoch, at);
        if is_pledged {
            self.terms.length = terms.length.max(at.terms.length);
            if let Err(error) = self.keep() {
                (self.pledger, self.terms) = (before, terms);
                return Err(error);
            }
        }
        Ok(is_pledged)
    }

    fn refuse(&mut self, epoch: Epoch) -> std::io::Result<Moment> {
        let until = self.pledger.refuse(epoch);
        self.keep().map(|()| until)
    }
}

impl Beside {
    fn with_pledges<T>(&self, act: impl FnOnce(&mut Pledges) -> T) -> T {
        act(&mut self.pledges.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Answers other agents until the task is dropped.
    pub(crate) async fn answer_pleas(self: Arc<Self>, listener: TcpListener) {
        let tls = self.config.tls.clone();
        let answer = move |who: Who, text: Bytes| {
            let beside = self.clone();
            async move {
                let plea: Plea = serde_json::from_slice(&text)
                    .map_err(|error| format!("the plea cannot be read: {error}"))?;
                let answer = beside.hear(&who, &plea)?;
                serde_json::to_vec(&answer).map_err(|error| error.to_string())
            }
        };
        link::server::answer(listener, tls, PATH, answer).await;
    }

    fn hear(&self, who: &Who, plea: &Plea) -> Result<Pledged, String> {
        let Plea { sender, epoch, terms } = plea;
        who.check(&agent_name(&sender.app, &sender.cell))?;
        if sender.app != self.config.app || sender.cell == self.config.cell {
            return Err(format!("`{}/{}` is no neighbour", sender.app, sender.cell));
        }
        if !Terms::LENGTHS.contains(&terms.length) {
            return Err(format!("{:?} is no length of a lease", terms.length));
        }
        let now = clock::now();
        let at = Situation {
            now,
            hears_control: self.hears_control(now),
            has_lease: self.lease().is_some(),
            seen: self.with_holder(|holder| holder.seen()),
            terms: *terms,
        };
        let pledged = self.with_pledges(|pledges| pledges.pledge(*epoch, at));
        let is_pledged = pledged.map_err(|error| format!("the pledge cannot be kept: {error}"))?;
        Ok(Pledged { is_pledged })
    }

    /// Asks all other agents for their pledges, so that the lease, which still lasts, goes on.
    pub(crate) async fn plead(&self) {
        let (neighbours, sent) = (self.neighbours(), clock::now());
        let lease = self.with_holder(|holder| holder.epoch(sent).zip(holder.terms()));
        let Some((epoch, terms)) = lease.filter(|_| !neighbours.is_empty()) else { return };
        let plea = Plea { sender: self.sender.clone(), epoch, terms };
        let mut asked = JoinSet::new();
        for Neighbour { cell, address } in neighbours {
            let (plea, tls) = (plea.clone(), self.config.tls.clone());
            asked.spawn(async move {
                let Some(address) = Address::read(&address) else {
                    return Err(format!("`{cell}`: `{address}` is no address"));
                };
                let mut client = Client::new(address, tls);
                let answer = client.post::<_, Pledged>(PATH, &plea, terms.renew_every() / 2).await;
                match answer {
                    Ok(Pledged { is_pledged: true }) => Ok(()),
                    Ok(Pledged { is_pledged: false }) => Err(format!("`{cell}` does not pledge")),
                    Err(error) => Err(format!("`{cell}`: {}", model::chain(&error))),
                }
            });
        }
        while let Some(answer) = asked.join_next().await {
            if let Err(why) = answer.map_err(|error| error.to_string()).flatten() {
                tracing::warn!(why, "the lease does not go on by pledges");
                return;
            }
        }
        match self.prepare_for(epoch, terms.kill_at(sent)).await {
            Ok(()) => self.with_holder(|holder| holder.granted(sent, terms, epoch)),
            Err(error) => tracing::error!(error, "the lease cannot be held"),
        }
    }

    /// Pledges nothing any more for leases up to `epoch`, and waits until all that was pledged is over.
    pub(crate) async fn end_pledges(&self, epoch: Epoch) -> Result<(), String> {
        let until = self.with_pledges(|pledges| pledges.refuse(epoch));
        let until = until.map_err(|error| format!("the refusal cannot be kept: {error}"))?;
        loop {
            let left = until.from(clock::now());
            if left.is_zero() {
                return Ok(());
            }
            sleep(left).await;
        }
    }
}
