//! Whoever has a server's programs and files at hand, and may be asked to work on them.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::Lsn;
use model::agent::Task;
use model::cell::Epoch;
use model::failover::Process;
use model::lost::{LostRows, Tail};
use model::member::{Condition, Done, LogFile, PIECE_LEN, Piece, WalTail, Work};
use pg::member::Local;

use crate::agents::Link;

#[derive(Debug, Clone)]
pub enum Member {
    /// This process.
    Here(Local),
    /// An agent beside the server.
    Agent(Arc<Link>),
}

fn unexpected<T>(done: Done) -> Result<T, String> {
    Err(format!("the answer is of another kind: {done:?}"))
}

impl Member {
    async fn ask(&self, work: Work) -> Result<Done, String> {
        match self {
            Member::Here(local) => local.carry_out(&work).await,
            Member::Agent(link) => link.ask(Task::Work(work)).await,
        }
    }

    async fn text(&self, work: Work) -> Result<String, String> {
        match self.ask(work).await? {
            Done::Text(text) => Ok(text),
            other => unexpected(other),
        }
    }

    async fn nothing(&self, work: Work) -> Result<(), String> {
        match self.ask(work).await? {
            Done::Nothing => Ok(()),
            other => unexpected(other),
        }
    }

    /// # Errors
    /// Nobody is there who could be asked, in words.
    pub(crate) async fn must_be_heard(&self) -> Result<(), String> {
        match self {
            Member::Here(_) => Ok(()),
            Member::Agent(link) => link.must_be_heard().await,
        }
    }

    pub(crate) async fn look(&self) -> Result<Condition, String> {
        match self.ask(Work::Look).await? {
            Done::Condition(condition) => Ok(condition),
            other => unexpected(other),
        }
    }

    /// What became of the server's process; none if that cannot be seen.
    pub(crate) async fn process(&self) -> Option<Process> {
        match self {
            // One that lives is not asked more.
            Member::Agent(link) if link.process() != Some(Process::Crashed) => link.process(),
            _ => self.look().await.ok().map(|condition| condition.process),
        }
    }

    /// Resolves when the process that runs now is gone, as far as that can be seen.
    pub(crate) async fn gone(&self) {
        /// Between two looks at a process, which cost next to nothing.
        const GLANCE: Duration = Duration::from_millis(20);
        match self {
            Member::Here(local) => {
                let was_running = local.instance.is_running();
                while !was_running || local.instance.is_running() {
                    tokio::time::sleep(GLANCE).await;
                }
            }
            Member::Agent(link) => link.changed().await,
        }
    }

    /// Ends every process of the server, and has whoever starts it start a standby. Gives what was done.
    pub(crate) async fn end(&self) -> Result<String, String> {
        match self.ask(Work::Isolate).await? {
            Done::Ended(0) => Ok("its processes are gone".to_owned()),
            Done::Ended(count) => Ok(format!("{count} processes of it ended")),
            other => unexpected(other),
        }
    }

    /// From here on nobody's write is acknowledged by the server any more: its processes are ended, or the lease that control
    /// gave is over, if it `is_attended` by a guard, and what it goes on by is ended by `end_pledges`. Gives how that is known.
    pub(crate) async fn isolate(
        &self,
        is_attended: bool,
        end_pledges: impl Future<Output = Result<(), String>>,
    ) -> Result<String, String> {
        let Member::Agent(link) = self else { return self.end().await };
        // It is not renewed from here on, whatever the agent answers.
        let over = async {
            tokio::time::sleep(link.revoke()).await;
            // A timer may be early, the lease is not.
            while !link.is_over() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        if !is_attended {
            link.revoke();
            return self.end().await;
        }
        tokio::pin!(over);
        let why = tokio::select! {
            ended = self.end() => match ended {
                Ok(ended) => return Ok(ended),
                Err(why) => {
                    over.await;
                    why
                }
            },
            () = &mut over => "its agent has not answered".to_owned(),
        };
        if link.is_out_of_hand() {
            return Err(why);
        }
        end_pledges.await?;
        Ok(format!("{why}; its lease is over, so its guard has ended it"))
    }

    /// Whoever is beside the server says that he cannot end it.
    pub(crate) fn is_out_of_hand(&self) -> bool {
        matches!(self, Member::Agent(link) if link.is_out_of_hand())
    }

    /// Somebody is there who could work on it.
    pub(crate) fn is_attended(&self) -> bool {
        match self {
            Member::Here(_) => true,
            Member::Agent(link) => link.process().is_some(),
        }
    }

    /// Somebody is there who could be asked.
    pub(crate) fn is_heard(&self) -> bool {
        match self {
            Member::Here(_) => true,
            Member::Agent(link) => link.is_heard(),
        }
    }

    /// An agent is there, and the server is not.
    pub(crate) async fn is_down(&self) -> bool {
        matches!(self, Member::Agent(link) if link.process() == Some(Process::Crashed))
    }

    /// Its lease is over; if it has a guard, that has ended it, whatever is heard of it.
    pub(crate) fn is_lease_over(&self) -> bool {
        match self {
            Member::Here(_) => false,
            Member::Agent(link) => link.is_over(),
        }
    }

    /// Whoever is beside the server pledges nothing any more, so that no other's lease goes on. Gives since when.
    pub(crate) async fn end_pledges(&self) -> Result<Duration, String> {
        let Member::Agent(link) = self else {
            return Err("there is no agent any more who could end its pledges".into());
        };
        let directory =
            link.directory().ok_or("the agent is not heard, which could end its pledges")?;
        match link.ask(Task::EndPledges { directory }).await? {
            Done::PledgesOver(ago) => Ok(ago),
            other => unexpected(other),
        }
    }

    /// That of the agent which is heard beside the server.
    pub(crate) fn directory(&self) -> Option<u64> {
        match self {
            Member::Here(_) => None,
            Member::Agent(link) => link.directory(),
        }
    }

    /// The server is about to be a primary in this epoch, for which it needs the lease.
    pub(crate) async fn hold_lease(&self, epoch: Epoch) -> Result<(), String> {
        let Member::Agent(link) = self else { return Ok(()) };
        link.restore();
        link.see(epoch);
        link.ask(Task::HoldLease).await.map(drop)
    }

    /// Starts the server as a standby, if it does not run.
    pub(crate) async fn start_standby(&self) -> Result<(), String> {
        self.nothing(Work::StartStandby).await
    }

    /// Starts the server as the primary that it was, in the epoch that it has still.
    pub(crate) async fn start_again(&self, epoch: Epoch) -> Result<(), String> {
        self.hold_lease(epoch).await?;
        self.nothing(Work::StartAgain).await
    }

    pub(crate) async fn are_logins_closed(&self, hba_file: &Path) -> Result<bool, String> {
        match self.ask(Work::AreLoginsClosed { hba_file: hba_file.into() }).await? {
            Done::Flag(flag) => Ok(flag),
            other => unexpected(other),
        }
    }

    pub(crate) async fn close_logins(&self, hba_file: &Path, rules: String) -> Result<(), String> {
        self.nothing(Work::CloseLogins { hba_file: hba_file.into(), rules }).await
    }

    pub(crate) async fn open_logins(&self, hba_file: &Path) -> Result<(), String> {
        self.nothing(Work::OpenLogins { hba_file: hba_file.into() }).await
    }

    /// See [`Work::Rejoin`]; gives how it was done, and what only this one had if that was asked for.
    pub(crate) async fn rejoin(
        &self,
        work: Work,
    ) -> Result<(String, Option<Result<LostRows, String>>), String> {
        match self.ask(work).await? {
            Done::Text(how) => Ok((how, None)),
            Done::Rejoined { how, rows } => Ok((how, Some(rows))),
            other => unexpected(other),
        }
    }

    pub(crate) async fn read_tail(&self, timeline: u64, from: Lsn) -> Result<WalTail, String> {
        match self.ask(Work::ReadTail { timeline, from }).await? {
            Done::Tail(tail) => Ok(tail),
            other => unexpected(other),
        }
    }

    /// Gives where it is kept.
    pub(crate) async fn keep_tail(&self, tail: Tail) -> Result<String, String> {
        self.text(Work::KeepTail(tail)).await
    }

    /// Hands log over to the host of another, who has replayed up to `from`. Gives the directory that it is in there.
    pub(crate) async fn hand_over(
        &self,
        to: &Member,
        timeline: u64,
        (from, end): (Lsn, Lsn),
        deadline: Instant,
    ) -> Result<String, String> {
        to.unstage().await?;
        let files = match self.ask(Work::ListLog { timeline, from, to: end }).await? {
            Done::LogFiles(files) => files,
            other => return unexpected(other),
        };
        let mut dir = None;
        for LogFile { name, len, used } in files {
            for offset in (0..used.min(len)).step_by(PIECE_LEN as usize) {
                if Instant::now() > deadline {
                    return Err("its log is not here in time".into());
                }
                let base64 = self.text(Work::ReadLog { name: name.clone(), offset }).await?;
                let piece = Piece { name: name.clone(), offset, len, base64 };
                dir = Some(to.text(Work::StageLog(piece)).await?);
            }
        }
        dir.ok_or_else(|| "there is nothing of its log that is wanted".to_owned())
    }

    /// Removes what was handed over.
    pub(crate) async fn unstage(&self) -> Result<(), String> {
        self.nothing(Work::UnstageLog).await
    }
}
