//! Whoever has a server's programs and files at hand, and may be asked to work on them.

use std::path::Path;

use model::Lsn;
use model::failover::Process;
use model::member::{Condition, Done, WalTail, Work};
use pg::member::Local;

#[derive(Debug, Clone)]
pub enum Member {
    /// This process.
    Here(Local),
}

fn unexpected<T>(done: Done) -> Result<T, String> {
    Err(format!("the answer is of another kind: {done:?}"))
}

impl Member {
    async fn ask(&self, work: Work) -> Result<Done, String> {
        match self {
            Member::Here(local) => local.carry_out(&work).await,
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

    pub(crate) async fn look(&self) -> Result<Condition, String> {
        match self.ask(Work::Look).await? {
            Done::Condition(condition) => Ok(condition),
            other => unexpected(other),
        }
    }

    /// What became of the server's process; none if that cannot be seen.
    pub(crate) async fn process(&self) -> Option<Process> {
        self.look().await.ok().map(|condition| condition.process)
    }

    /// Costs next to nothing.
    pub(crate) fn is_running(&self) -> bool {
        match self {
            Member::Here(local) => local.instance.is_running(),
        }
    }

    /// Ends every process of the server, and gives how many there were.
    pub(crate) async fn isolate(&self) -> Result<usize, String> {
        match self.ask(Work::Isolate).await? {
            Done::Ended(count) => Ok(count),
            other => unexpected(other),
        }
    }

    pub(crate) async fn start_again(&self) -> Result<(), String> {
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

    /// See [`Work::Rejoin`]; gives how it was done.
    pub(crate) async fn rejoin(&self, work: Work) -> Result<String, String> {
        self.text(work).await
    }

    pub(crate) async fn read_tail(&self, timeline: u64, from: Lsn) -> Result<WalTail, String> {
        match self.ask(Work::ReadTail { timeline, from }).await? {
            Done::Tail(tail) => Ok(tail),
            other => unexpected(other),
        }
    }

    /// Gives where it is kept.
    pub(crate) async fn keep_tail(
        &self,
        timeline: u64,
        from: Lsn,
        name: String,
    ) -> Result<String, String> {
        self.text(Work::KeepTail { timeline, from, name }).await
    }
}
