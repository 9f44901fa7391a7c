//! While control is gone: asks the other agents for pledges, and answers theirs.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use link::server::Bytes;
use link::{Controls, Who, agent_name};
use model::cell::Epoch;
use model::lease::{Moment, Terms};
use model::pledge::{Neighbour, Plea, Pledged, Pledger, Situation};
use pg::{Address, clock};
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::beside::{Beside, write_durably};

const PATH: &str = "/v1/pledge";
/// Between two looks whether the lease is renewed, and two pleas.
const PLEAD_PAUSE: Duration = Duration::from_millis(50);

/// What has to be known of pledges after a restart, on disk. The pledges themselves are not: who starts takes it that it has
/// pledged a moment ago, and a disk that is slow delays none.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    pledger: Pledger,
    /// The longest that a pledge may last.
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
                let Kept { pledger, terms } = serde_json::from_slice(&bytes)?;
                (pledger.after_start(clock::now(), terms), terms)
            }
        };
        Ok(Pledges { path, pledger, terms })
    }

    fn keep(&self) -> std::io::Result<()> {
        let kept = Kept { pledger: self.pledger, terms: self.terms };
        write_durably(&self.path, &serde_json::to_vec(&kept)?)
    }

    /// Pledges, if that may be. That it may last longer than any before is remembered first.
    fn pledge(&mut self, epoch: Epoch, at: Situation) -> std::io::Result<bool> {
        let before = self.terms;
        if at.terms.length > before.length {
            self.terms = at.terms;
            if let Err(error) = self.keep() {
                self.terms = before;
                return Err(error);
            }
        }
        Ok(self.pledger.pledge(epoch, at))
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
        let Plea { sender, directory, epoch, terms } = plea;
        who.check(&agent_name(&sender.app, &sender.cell))?;
        if sender.app != self.config.app || sender.cell == self.config.cell {
            return Err(format!("`{}/{}` is no neighbour", sender.app, sender.cell));
        }
        if *directory != self.sender.directory {
            return Err("it is for another agent of this cell".into());
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

    /// Sees to it that the lease goes on while it is not renewed, until the task is dropped.
    pub(crate) async fn plead_on(self: Arc<Self>) {
        loop {
            sleep(PLEAD_PAUSE).await;
            let now = clock::now();
            let sent = self.with_holder(|holder| holder.epoch(now).and(holder.sent()));
            let terms = self.with_holder(|holder| holder.terms());
            // A renewal that is on time needs no pledge.
            let is_late = |terms: Terms| {
                sent.is_some_and(|sent| now >= sent.plus(terms.renew_every() * 5 / 4))
            };
            if terms.is_some_and(is_late) {
                self.plead().await;
            }
        }
    }

    /// Asks all other agents for their pledges, so that the lease, which still lasts, goes on.
    async fn plead(&self) {
        let (neighbours, sent) = (self.neighbours(), clock::now());
        let lease = self.with_holder(|holder| holder.epoch(sent).zip(holder.terms()));
        let Some((epoch, terms)) = lease.filter(|_| !neighbours.is_empty()) else { return };
        let mut asked = JoinSet::new();
        for Neighbour { cell, directory, address } in neighbours {
            let plea = Plea { sender: self.sender.clone(), directory, epoch, terms };
            let tls = self.config.tls.clone();
            asked.spawn(async move {
                let Some(address) = Address::read(&address) else {
                    return Err(format!("`{cell}`: `{address}` is no address"));
                };
                let mut client = Controls::new(vec![address], tls).client();
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
                tracing::debug!(why, "the lease does not go on by pledges yet");
                return;
            }
        }
        match self.prepare_for(epoch, terms.kill_at(sent)).await {
            Ok(()) => self.with_holder(|holder| holder.granted(sent, terms, epoch)),
            Err(error) => tracing::error!(error, "the lease cannot be held"),
        }
    }

    /// Nothing that was pledged lasts.
    pub(crate) fn has_no_pledges(&self, now: Moment) -> bool {
        self.with_pledges(|pledges| pledges.pledger.over_since(now)).is_some()
    }

    /// Pledges nothing any more for leases up to `epoch`, and waits until all that was pledged is over. Gives since when it is.
    pub(crate) async fn end_pledges(&self, epoch: Epoch) -> Result<Duration, String> {
        let until = self.with_pledges(|pledges| pledges.refuse(epoch));
        let until = until.map_err(|error| format!("the refusal cannot be kept: {error}"))?;
        loop {
            let now = clock::now();
            if let Some(ago) = self.with_pledges(|pledges| pledges.pledger.over_since(now)) {
                return Ok(ago);
            }
            sleep(until.from(now)).await;
        }
    }
}
