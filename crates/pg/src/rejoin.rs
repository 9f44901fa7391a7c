//! A server becomes a standby of another, so that a crash in between is found and nothing is lost by it.
//!
//! **Invariant:** under the name of its data directory there is at any moment nothing, or a server that whoever starts it
//! starts as a standby. What is rewound or copied is made ready under another name.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use model::lost::{LostRows, Tail};

use crate::instance::Instance;
use crate::lost_rows;
use crate::member::{KILL_MAX, START_MAX, chain};

const STOP_MAX: Duration = Duration::from_secs(60);

/// Files that belong to one server and not to its data. They are put aside before anything is overwritten.
const OWN_FILES: [&str; 4] =
    ["postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf"];

/// Of a data directory that a rejoin has moved away, and a crash has kept from putting back.
pub(crate) fn what_is_left(data_dir: &Path) -> Option<std::fs::Metadata> {
    ["old", "rewinding"].iter().find_map(|what| std::fs::metadata(beside(data_dir, what)).ok())
}

/// A place beside the data directory.
pub(crate) fn beside(data_dir: &Path, what: &str) -> PathBuf {
    let mut name = data_dir.as_os_str().to_owned();
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
        Aside { instance, dir: beside(&instance.data_dir, "rejoin") }
    }

    pub(crate) fn is_there(&self) -> bool {
        self.dir.join("complete").exists()
    }

    fn put(&self) -> Result<(), String> {
        let io = |error: std::io::Error| format!("`{}`: {error}", self.dir.display());
        std::fs::create_dir_all(&self.dir).map_err(io)?;
        self.instance.own_dir(&self.dir).map_err(chain)?;
        for name in OWN_FILES {
            let path = self.instance.data_dir.join(name);
            match path.metadata() {
                Ok(_) => {
                    let bytes = self.instance.read_own(&path).map_err(chain)?;
                    self.instance.write(&self.dir.join(name), &bytes).map_err(chain)?;
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => (),
                Err(error) => return Err(io(error)),
            }
        }
        self.instance.write(&self.dir.join("complete"), b"").map_err(chain)
    }

    /// Into what is to become the data directory, and is whole by now.
    fn put_back(&self, made: &Instance) -> Result<(), String> {
        for name in OWN_FILES {
            if let Ok(bytes) = self.instance.read_own(&self.dir.join(name)) {
                made.write(&made.data_dir.join(name), &bytes).map_err(chain)?;
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

/// What of a server is in another place, so that it may go here.
pub(crate) enum Kept<'a> {
    Nothing,
    /// All that it alone has, if that is anything.
    Enough,
    /// The log of this tail, in this directory. Its rows are wanted there, too.
    WithRows(&'a Tail, PathBuf),
}

type Rows = Option<Result<LostRows, String>>;

/// Makes a server a standby of another, which is on `timeline`. Gives how it was done, and the rows that only it had, if they were
/// wanted and could be looked for.
///
/// # Errors
/// In words; asked again, it goes on.
pub(crate) async fn rejoin(
    instance: &Instance,
    (conninfo, standby_conninfo): (&str, &str),
    timeline: Option<u64>,
    kept: Kept<'_>,
) -> Result<(String, Rows), String> {
    let aside = Aside::of(instance);
    let names = Names::of(instance);
    if instance.data_dir.exists() {
        check_movable(&instance.data_dir)?;
        instance.must_be_standby().map_err(chain)?;
        instance.stop("fast", STOP_MAX).await.map_err(chain)?;
        // None of its processes writes to what is moved away now.
        instance.kill(KILL_MAX).await.map_err(chain)?;
    }
    let is_broken = aside.is_there();
    if !is_broken {
        aside.put()?;
    }
    let mut rows = None;
    let kept = if is_broken { Kept::Nothing } else { kept };
    let how = match names.old.exists() && instance.data_dir.exists() {
        // The copy had taken its place already; the primary may be another by now.
        true => {
            instance.make_standby(standby_conninfo).map_err(chain)?;
            names.end(&kept)?
        }
        false => {
            let ready = |made: &Instance| -> Result<(), String> {
                aside.put_back(made)?;
                made.make_standby(standby_conninfo).map_err(chain)
            };
            make(instance, &names, conninfo, timeline, (&kept, &mut rows), ready).await?
        }
    };
    aside.forget()?;
    instance.start(START_MAX).await.map_err(chain)?;
    Ok((how, rows))
}

/// Rewinds the server, or copies the other in its place; what was made is made `ready` before it gets its name.
async fn make(
    instance: &Instance,
    names: &Names,
    conninfo: &str,
    timeline: Option<u64>,
    (kept, rows): (&Kept<'_>, &mut Rows),
    ready: impl Fn(&Instance) -> Result<(), String>,
) -> Result<String, String> {
    // On the new history already, it has nothing to come back from, and would write to that what nobody else has.
    let follows = instance.last_timeline().ok() == timeline;
    if !matches!(kept, Kept::Nothing) && !follows && instance.data_dir.exists() {
        let rewound = names.rewound(instance);
        rename(&instance.data_dir, &rewound.data_dir)?;
        // It has to end as a primary first, if it has not (`ensureCleanShutdown`).
        rewound.may_be_primary().map_err(chain)?;
        if let Kept::WithRows(tail, dir) = kept {
            let made = beside(&instance.data_dir, "rows");
            *rows = Some(lost_rows::keep(&rewound, tail, (&made, dir)).await);
        }
        match rewound.rewind(conninfo).await {
            Ok(_) => {
                ready(&rewound)?;
                rename(&rewound.data_dir, &instance.data_dir)?;
                return Ok("rewound".into());
            }
            Err(error) => {
                tracing::warn!(error = chain(error), "rewinding did not succeed, copying anew");
            }
        }
    }
    if !instance.has("pg_basebackup") {
        // What was rewound in part is put back, so that whoever looks finds it. It is a standby of nobody.
        if names.rewinding.exists() && !instance.data_dir.exists() {
            names.rewound(instance).must_be_standby().map_err(chain)?;
            rename(&names.rewinding, &instance.data_dir)?;
        }
        return Err(format!("`{}` has no pg_basebackup", instance.bin_dir.display()));
    }
    let copied = names.copied(instance)?;
    copied.clone_from(conninfo).await.map_err(chain)?;
    ready(&copied)?;
    let old = if instance.data_dir.exists() { &instance.data_dir } else { &names.rewinding };
    if old.exists() && !names.old.exists() {
        rename(old, &names.old)?;
    }
    rename(&copied.data_dir, &instance.data_dir)?;
    names.end(kept)
}

/// Places beside the data directory.
struct Names {
    /// A server that is rewound.
    rewinding: PathBuf,
    /// What was there before the copy.
    old: PathBuf,
    /// Where it is kept if nobody knows what it alone has.
    lost: PathBuf,
    /// Copies; a name of its own for each, as a program that a crash has left behind may still work on the last one.
    copies: PathBuf,
}

impl Names {
    fn of(instance: &Instance) -> Names {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        Names {
            rewinding: beside(&instance.data_dir, "rewinding"),
            old: beside(&instance.data_dir, "old"),
            lost: beside(&instance.data_dir, &format!("lost-{now}")),
            copies: beside(&instance.data_dir, "new-"),
        }
    }

    fn rewound(&self, instance: &Instance) -> Instance {
        Instance { data_dir: self.rewinding.clone(), ..instance.clone() }
    }

    /// An empty directory for a copy; those of earlier tries go.
    fn copied(&self, instance: &Instance) -> Result<Instance, String> {
        let mut data_dir = self.copies.clone();
        let parent = data_dir.parent().map(PathBuf::from).unwrap_or_default();
        let begin = data_dir.file_name().unwrap_or_default().to_owned();
        let io = |path: &Path| {
            let path = path.display().to_string();
            move |error: std::io::Error| format!("`{path}`: {error}")
        };
        for entry in std::fs::read_dir(&parent).map_err(io(&parent))?.flatten() {
            let is_copy =
                entry.file_name().as_encoded_bytes().starts_with(begin.as_encoded_bytes());
            if is_copy {
                std::fs::remove_dir_all(entry.path()).map_err(io(&entry.path()))?;
            }
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        data_dir.as_mut_os_string().push(now.to_string());
        std::fs::create_dir(&data_dir).map_err(io(&data_dir))?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        std::fs::set_permissions(&data_dir, mode).map_err(io(&data_dir))?;
        if let Some(owner) = instance.run_as {
            std::os::unix::fs::chown(&data_dir, Some(owner.uid), Some(owner.gid))
                .map_err(io(&data_dir))?;
        }
        Ok(Instance { data_dir, ..instance.clone() })
    }

    /// The copy is in its place: what was there before goes, or is kept if nobody knows what it alone has.
    fn end(&self, enough: &Kept<'_>) -> Result<String, String> {
        let mut kept = Vec::new();
        for (number, old) in [&self.old, &self.rewinding].into_iter().enumerate() {
            if !old.exists() {
                continue;
            }
            if !matches!(enough, Kept::Nothing) {
                std::fs::remove_dir_all(old)
                    .map_err(|error| format!("`{}`: {error}", old.display()))?;
                continue;
            }
            let mut lost = self.lost.clone();
            if number > 0 {
                lost.as_mut_os_string().push("-rewound");
            }
            rename(old, &lost)?;
            kept.push(format!("`{}`", lost.display()));
        }
        Ok(match kept.is_empty() {
            true => "copied anew".into(),
            false => format!("copied anew, what it had is kept in {}", kept.join(" and ")),
        })
    }
}

/// Else a rejoin would copy a whole server in vain, again and again.
fn check_movable(data_dir: &Path) -> Result<(), String> {
    let device = |path: &Path| std::fs::metadata(path).map(|dir| dir.dev()).ok();
    let parent = data_dir.parent().and_then(device);
    if parent.is_some() && parent == device(data_dir) {
        return Ok(());
    }
    Err(format!(
        "`{}` is on another device than the directory above it, so it cannot be renamed, as a rejoin does; put it one level beneath its mount point",
        data_dir.display()
    ))
}

fn rename(from: &Path, to: &Path) -> Result<(), String> {
    let failed = |error| format!("`{}` cannot become `{}`: {error}", from.display(), to.display());
    std::fs::rename(from, to).map_err(failed)?;
    // So that it is so after a crash of the machine as well.
    match to.parent() {
        Some(dir) => std::fs::File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_point_is_not_renamed() {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("data");
        std::fs::create_dir(&data_dir).unwrap();
        check_movable(&data_dir).unwrap();
        // It is one on every Linux.
        let error = check_movable(Path::new("/proc")).unwrap_err();
        assert!(error.contains("one level beneath"), "{error}");
    }
}
