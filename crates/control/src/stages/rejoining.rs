//! The old server becomes a standby of the new one.

use std::time::{Duration, Instant};

use pg::instance::Instance;

use super::fencing::{Hba, open_hba};
use super::{Done, START_MAX, admin, chain};
use crate::config::CellServer;

const STOP_MAX: Duration = Duration::from_secs(60);
const STREAM_MAX: Duration = Duration::from_secs(60);

/// Makes the old server a standby of the new one.
pub(super) async fn rejoin(from: &CellServer, to: &CellServer) -> Done {
    let Some(instance) = &from.instance else {
        return Err(format!(
            "`{}` is not managed (no data_dir); stop it and make it a standby of `{}`",
            from.target.address, to.target.address
        ));
    };
    let began = Instant::now();
    // Before the rewind, which would remove the saved file. A stopped server cannot say where its file is.
    let path = match admin(from).await {
        Ok(mut old) => {
            old.value("SHOW hba_file").await.map_err(chain)?.map(std::path::PathBuf::from)
        }
        Err(_) => None,
    };
    let path = path.unwrap_or_else(|| instance.data_dir.join("pg_hba.conf"));
    open_hba(instance, &Hba { saved: path.with_extension("conf.holdfast"), path })?;
    instance.stop("fast", STOP_MAX).await.map_err(chain)?;
    // Until its first checkpoint the new primary's control file names the old timeline, and pg_rewind would find
    // nothing to do.
    admin(to).await?.rows("CHECKPOINT").await.map_err(chain)?;
    let rewound = instance.rewind(&to.conninfo).await;
    let how = match &rewound {
        Ok(_) => "rewound",
        Err(error) => {
            tracing::warn!(
                error = error as &dyn std::error::Error,
                "rewinding did not succeed, copying anew"
            );
            clone_anew(instance, &to.conninfo).await?;
            "copied anew"
        }
    };
    instance.make_standby(&to.conninfo).map_err(chain)?;
    instance.start(START_MAX).await.map_err(chain)?;
    let mut old = admin(from).await?;
    let deadline = Instant::now() + STREAM_MAX;
    while !old.status().await.map_err(chain)?.streaming {
        if Instant::now() > deadline {
            return Err(format!("it does not stream from the new primary after {STREAM_MAX:?}"));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(format!("{how}, streams as a standby after {:.1} s", began.elapsed().as_secs_f64()))
}

/// Copies the new primary in place of the old data, which is kept aside until the copy is whole.
async fn clone_anew(instance: &Instance, conninfo: &str) -> Result<(), String> {
    if !instance.has("pg_basebackup") {
        return Err(format!("`{}` has no pg_basebackup", instance.bin_dir.display()));
    }
    let aside = instance.data_dir.with_extension("holdfast-old");
    let io = |error: std::io::Error| format!("`{}`: {error}", instance.data_dir.display());
    if aside.exists() {
        std::fs::remove_dir_all(&aside).map_err(io)?;
    }
    std::fs::rename(&instance.data_dir, &aside).map_err(io)?;
    std::fs::create_dir(&instance.data_dir).map_err(io)?;
    std::fs::set_permissions(
        &instance.data_dir,
        std::os::unix::fs::PermissionsExt::from_mode(0o700),
    )
    .map_err(io)?;
    if let Some(owner) = instance.run_as {
        std::os::unix::fs::chown(&instance.data_dir, Some(owner.uid), Some(owner.gid))
            .map_err(io)?;
    }
    instance.clone_from(conninfo).await.map_err(chain)?;
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        if let Ok(bytes) = std::fs::read(aside.join(name)) {
            instance.write(&instance.data_dir.join(name), &bytes).map_err(chain)?;
        }
    }
    std::fs::remove_dir_all(&aside).map_err(io)
}
