//! Carries out what is asked of a server whose programs and files are on this machine.

use std::path::{Path, PathBuf};
use std::time::Duration;

use model::failover::Process;
use model::lost::Tail;
use model::member::{Condition, Done, Work};

use crate::instance::{Instance, InstanceError};
use crate::rejoin::{Aside, Kept, rejoin};

pub(crate) const KILL_MAX: Duration = Duration::from_secs(10);
pub const START_MAX: Duration = Duration::from_secs(120);

/// The first line of a `pg_hba.conf` of ours.
pub const HBA_MARK: &str =
    "# holdfast: this server is fenced; the file before it is pg_hba.conf.holdfast";

/// A server whose programs and files are here.
#[derive(Debug, Clone)]
pub struct Local {
    pub instance: Instance,
    /// Where what a lost server alone had is kept for people.
    pub lost_dir: PathBuf,
}

pub(crate) fn chain(error: InstanceError) -> String {
    model::chain(&error)
}

fn saved_beside(hba_file: &Path) -> PathBuf {
    hba_file.with_extension("conf.holdfast")
}

impl Local {
    /// # Errors
    /// In words. It may have been done in part; asked again, the rest is done.
    pub async fn carry_out(&self, work: &Work) -> Result<Done, String> {
        let instance = &self.instance;
        Ok(match work {
            Work::Look => Done::Condition(self.condition().await),
            Work::Isolate => Done::Ended(instance.end_as_standby(KILL_MAX).await.map_err(chain)?),
            Work::StartAgain => {
                if instance.is_running() && instance.is_standby() {
                    // Somebody has started it while it was to be none but a standby.
                    instance.kill(KILL_MAX).await.map_err(chain)?;
                }
                instance.may_be_primary().map_err(chain)?;
                instance.start(START_MAX).await.map_err(chain)?;
                Done::Nothing
            }
            Work::StartStandby => {
                if !instance.is_running() {
                    instance.must_be_standby().map_err(chain)?;
                    instance.start(START_MAX).await.map_err(chain)?;
                }
                Done::Nothing
            }
            Work::AreLoginsClosed { hba_file } => Done::Flag(self.is_closed(hba_file)),
            Work::CloseLogins { hba_file, rules } => {
                // Closed to fewer than before, it is the first that is put back.
                if !self.is_closed(hba_file) {
                    let text = instance.read_own(hba_file).map_err(chain)?;
                    instance.write(&saved_beside(hba_file), &text).map_err(chain)?;
                }
                instance.write(hba_file, rules.as_bytes()).map_err(chain)?;
                Done::Nothing
            }
            Work::OpenLogins { hba_file } => {
                self.open_logins(hba_file)?;
                Done::Nothing
            }
            Work::Rejoin { conninfo, standby_conninfo, timeline, hba_file, is_kept, tail } => {
                // Rewound in part, it would be taken for a server of the new history (`pg_rewind`, "Warnings").
                if !Aside::of(instance).is_there() {
                    // It is no fence any more: whoever starts the server starts a standby.
                    instance.must_be_standby().map_err(chain)?;
                    // Before the rewind, which would remove the saved file.
                    let default = instance.data_dir.join("pg_hba.conf");
                    self.open_logins(hba_file.as_deref().unwrap_or(&default))?;
                }
                let ways = (&**conninfo, &**standby_conninfo);
                let kept = match tail {
                    Some(tail) => Kept::WithRows(tail, self.lost_dir.join(&tail.name)),
                    None if *is_kept => Kept::Enough,
                    None => Kept::Nothing,
                };
                let (how, rows) = rejoin(instance, ways, *timeline, kept).await?;
                match rows {
                    Some(rows) => Done::Rejoined { how, rows },
                    None => Done::Text(how),
                }
            }
            Work::ReadTail { timeline, from } => {
                Done::Tail(instance.wal_tail(*timeline, *from).await.map_err(chain)?.0)
            }
            Work::KeepTail(Tail { timeline, from, name }) => {
                let dir = self.lost_dir.join(name);
                instance.keep_wal(*timeline, *from, &dir).await.map_err(chain)?;
                Done::Text(dir.display().to_string())
            }
            Work::ListLog { timeline, from, to } => {
                Done::LogFiles(instance.list_log(*timeline, *from, *to)?)
            }
            Work::ReadLog { name, offset } => Done::Text(instance.read_log(name, *offset)?),
            Work::StageLog(piece) => Done::Text(instance.stage_log(piece)?.display().to_string()),
            Work::UnstageLog => {
                instance.unstage_log()?;
                Done::Nothing
            }
        })
    }

    async fn condition(&self) -> Condition {
        let instance = &self.instance;
        let control = instance.control_data().await;
        if let Err(error) = &control {
            tracing::warn!(error = model::chain(error), "the control file says nothing");
        }
        let control = control.ok();
        let process = match &control {
            _ if instance.is_running() => Process::Lives,
            Some(control) if control.is_shut_down => Process::ShutDown,
            _ => Process::Crashed,
        };
        Condition {
            process,
            system_identifier: control.map(|control| control.system_identifier),
            timeline: instance.last_timeline().ok(),
            is_rejoining: Aside::of(instance).is_there(),
            reads_wal: instance.has("pg_waldump"),
        }
    }

    fn open_logins(&self, hba_file: &Path) -> Result<(), String> {
        if !self.is_closed(hba_file) {
            return Ok(());
        }
        let saved = saved_beside(hba_file);
        let text = self.instance.read_own(&saved).map_err(chain)?;
        self.instance.write(hba_file, &text).map_err(chain)
    }

    fn is_closed(&self, hba_file: &Path) -> bool {
        self.instance.read_own(hba_file).is_ok_and(|text| text.starts_with(HBA_MARK.as_bytes()))
    }
}
