//! A server becomes a standby of another, so that a crash in between is found and nothing is lost by it.

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::instance::Instance;
use crate::member::{START_MAX, chain};

const STOP_MAX: Duration = Duration::from_secs(60);

/// Files that belong to one server and not to its data. They are put aside before anything is overwritten.
const OWN_FILES: [&str; 4] =
    ["postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"];

/// A place beside the data directory.
fn beside(instance: &Instance, what: &str) -> PathBuf {
    let mut name = instance.data_dir.as_os_str().to_owned();
    name.push(format!(".holdfast-{what}"));
    name.into()
}

/// The server's own files, kept while its data is rewound or copied. As long as they are there, the data is neither what it
/// was nor what it is to be.
pub(crate) struct Aside<'a> {
    instance: &'a Instance,
    dir: PathBuf,
}

impl<'a> Aside<'a> {
    pub(crate) fn of(instance: &'a Instance) -> Aside<'a> {
        Aside { instance, dir: beside(instance, "rejoin") }
    }

    pub(crate) fn is_there(&self) -> bool {
        self.dir.join("complete").exists()
    }

    fn put(&self) -> Result<(), String> {
        let io = |error: std::io::Error| format!("`{}`: {error}", self.dir.display());
        std::fs::create_dir_all(&self.dir).map_err(io)?;
        for name in OWN_FILES {
            match std::fs::read(self.instance.data_dir.join(name)) {
                Ok(bytes) => {
                    self.instance.write(&self.dir.join(name), &bytes).map_err(chain)?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => (),
                Err(error) => return Err(io(error)),
            }
        }
        self.instance.write(&self.dir.join("complete"), b"").map_err(chain)
    }

    /// Into the data directory, which is whole by now.
    fn put_back(&self) -> Result<(), String> {
        for name in OWN_FILES {
            if let Ok(bytes) = std::fs::read(self.dir.join(name)) {
                self.instance.write(&self.instance.data_dir.join(name), &bytes).map_err(chain)?;
            }
        }
        Ok(())
    }

    fn forget(&self) -> Result<(), String> {
        let io = |error: std::io::Error| format!("`{}`: {error}", self.dir.display());
        std::fs::remove_file(self.dir.join("complete")).map_err(io)?;
        std::fs::remove_dir_all(&self.dir).map_err(io)
    }
}

/// Makes a server a standby of another, which is on `timeline`. What only it has may go if that `is_kept`. Gives how it was
/// done.
///
/// # Errors
/// In words; asked again, it goes on.
pub(crate) async fn rejoin(
    instance: &Instance,
    conninfo: &str,
    timeline: Option<u64>,
    is_kept: bool,
) -> Result<String, String> {
    let aside = Aside::of(instance);
    let is_broken = aside.is_there();
    instance.stop("fast", STOP_MAX).await.map_err(chain)?;
    if !is_broken {
        aside.put()?;
    }
    // On the new history already, it has nothing to come back from, and would write to that what nobody else has.
    let follows = instance.last_timeline().ok() == timeline;
    let rewound = match is_broken || !is_kept || follows {
        true => Err("it is not to be rewound".to_owned()),
        false => {
            // It has to end as a primary first, if it has not (`ensureCleanShutdown`).
            instance.may_be_primary().map_err(chain)?;
            instance.rewind(conninfo).await.map_err(chain)
        }
    };
    let how = match &rewound {
        Ok(_) => "rewound".to_owned(),
        Err(error) => {
            tracing::warn!(error, "rewinding did not succeed, copying anew");
            clone_anew(instance, conninfo, is_kept).await?
        }
    };
    aside.put_back()?;
    instance.make_standby(conninfo).map_err(chain)?;
    aside.forget()?;
    instance.start(START_MAX).await.map_err(chain)?;
    Ok(how)
}

fn unix_ms() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()
}

/// Copies the new primary in place of the old data, which is kept until the copy is whole, and after that if nobody knows
/// what it alone has.
async fn clone_anew(instance: &Instance, conninfo: &str, is_kept: bool) -> Result<String, String> {
    if !instance.has("pg_basebackup") {
        return Err(format!("`{}` has no pg_basebackup", instance.bin_dir.display()));
    }
    let old = beside(instance, "old");
    let io = |error: std::io::Error| format!("`{}`: {error}", instance.data_dir.display());
    if old.exists() {
        // What stands in its place is a copy that was broken off.
        match std::fs::remove_dir_all(&instance.data_dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(io(error)),
            _ => (),
        }
    } else {
        std::fs::rename(&instance.data_dir, &old).map_err(io)?;
    }
    std::fs::create_dir(&instance.data_dir).map_err(io)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&instance.data_dir, mode).map_err(io)?;
    if let Some(owner) = instance.run_as {
        std::os::unix::fs::chown(&instance.data_dir, Some(owner.uid), Some(owner.gid))
            .map_err(io)?;
    }
    instance.clone_from(conninfo).await.map_err(chain)?;
    if is_kept {
        std::fs::remove_dir_all(&old).map_err(io)?;
        return Ok("copied anew".into());
    }
    let lost = beside(instance, &format!("lost-{}", unix_ms()));
    std::fs::rename(&old, &lost).map_err(io)?;
    Ok(format!("copied anew, what it had is kept in `{}`", lost.display()))
}
