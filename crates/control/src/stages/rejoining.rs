//! The old server becomes a standby of the new one.

use std::time::{Duration, Instant};

use model::lost::{LostRows, Tail};
use model::member::Work;

use super::fencing::hba_file;
use super::{Done, admin, chain, position};
use crate::config::CellServer;
use crate::durability::named;
use crate::following;

const STREAM_MAX: Duration = Duration::from_secs(60);

/// A rejoin of the server was broken off: of what it had, nothing can be told any more.
pub(super) async fn has_begun(server: &CellServer) -> bool {
    let Some(member) = &server.member else { return false };
    member.look().await.is_ok_and(|condition| condition.is_rejoining)
}

/// It is a standby that streams: an earlier try has come to its end.
pub(super) async fn is_done(server: &CellServer, primary: &CellServer) -> bool {
    if has_begun(server).await {
        return false;
    }
    let Ok(mut admin) = admin(server).await else { return false };
    following::follows(&mut admin, primary).await == Ok(true)
}

/// It is a standby on this timeline, and nothing was broken off.
pub(crate) async fn follows_timeline(server: &CellServer, timeline: u64) -> bool {
    if has_begun(server).await {
        return false;
    }
    let Ok(mut standby) = admin(server).await else { return false };
    let is_standby = standby.status().await.is_ok_and(|status| status.in_recovery);
    is_standby && position(&mut standby).await.is_ok_and(|at| at.timeline == timeline)
}

/// Makes the old server a standby of the new one, and starts it. What only it has may go if that `is_kept`, and of the `tail` that
/// is, rows are kept as well. Gives how.
pub(super) async fn rejoin(
    (cell, from): (&str, &CellServer),
    to: &CellServer,
    (is_kept, tail): (bool, Option<Tail>),
) -> Result<(String, Option<Result<LostRows, String>>), String> {
    let Some(member) = &from.member else {
        return Err(format!(
            "`{}` is not managed (no data_dir); stop it and make it a standby of `{}`",
            from.target.address, to.target.address
        ));
    };
    // A stopped server cannot say where its file is.
    let hba_file = match admin(from).await {
        Ok(mut old) => Some(hba_file(&mut old).await?),
        Err(_) => None,
    };
    // Until its first checkpoint the new primary's control file names the old timeline, and pg_rewind would find
    // nothing to do.
    let mut new = admin(to).await?;
    new.rows("CHECKPOINT").await.map_err(chain)?;
    let timeline = new.value("SELECT timeline_id::text FROM pg_control_checkpoint()").await;
    let timeline = timeline.map_err(chain)?.and_then(|text| text.parse().ok());
    let (conninfo, standby_conninfo) = (to.conninfo.clone(), named(&to.conninfo, cell));
    let work = Work::Rejoin { conninfo, standby_conninfo, timeline, hba_file, is_kept, tail };
    member.rejoin(work).await
}

/// Until the one follows the other, of which it was made a standby. `how` that was done, and when it began.
pub(super) async fn wait_streaming(
    (from, to): (&CellServer, &CellServer),
    how: &str,
    began: Instant,
) -> Done {
    let mut old = admin(from).await?;
    let deadline = Instant::now() + STREAM_MAX;
    while !following::follows(&mut old, to).await? {
        if Instant::now() > deadline {
            return Err(format!("it does not stream from the new primary after {STREAM_MAX:?}"));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(format!("{how}, streams as a standby after {:.1} s", began.elapsed().as_secs_f64()))
}
