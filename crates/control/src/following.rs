//! Standbys of other cells follow the active one's server, whichever that is by now.

use std::time::{Duration, Instant};

use model::Lsn;
use model::cell::CellState;
use model::durability::standby_name;
use model::following::{Followers, History, Position, Standby};
use pg::admin::Admin;
use tokio::time::timeout;

use crate::config::{AppServers, CellServer};
use crate::control::Control;
use crate::durability::named;
use crate::stages::{admin, reload};

/// How long one standby may take.
const ASK_MAX: Duration = Duration::from_secs(5);
/// How long one may take to leave the server that it has followed.
const TURN_MAX: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(10);

/// Tells those to follow that do not.
pub(crate) async fn follow(
    control: &Control,
    servers: &AppServers,
    (app, active): (&str, &str),
    followers: &mut Followers,
) {
    let Ok(application) = control.application(app) else { return };
    let Some(primary) = servers.cells.get(active) else { return };
    let ask = timeout(ASK_MAX, listed(primary));
    let Ok(Ok(listed)) = ask.await else { return };
    for (cell, server) in servers.cells.iter().filter(|(cell, _)| *cell != active) {
        // Of others something is being done, or a person has to.
        let is_standby = application.cells.get(cell) == Some(&CellState::Passive);
        let is_left = !control.is_settled_but_for(app, &application, Some(cell));
        if is_left || application.active() != Some(active) || !is_standby {
            continue;
        }
        let wanted = named(&primary.conninfo, cell);
        let is_listed = listed.contains(&standby_name(cell));
        let needs_all = servers.durability.acks > 0;
        let look = async {
            let mut standby = admin(server).await?;
            let Some((is_streaming, conninfo)) = receives(&mut standby).await? else {
                return Ok::<(), String>(());
            };
            let conninfo = conninfo.as_str();
            let seen = Standby { cell, is_streaming, is_listed, conninfo, wanted: &wanted };
            if !followers.see(Instant::now(), seen, needs_all) {
                if !(is_listed && is_streaming)
                    && let Some((position, _)) = has_strayed(&mut standby, primary).await?
                {
                    followers.note_strayed(Instant::now(), cell, position);
                }
                return Ok(());
            }
            // The application may have been changed since it was looked at.
            let now = control.application(app).map_err(|error| model::chain(&error))?;
            if now.version != application.version {
                return Ok(());
            }
            tell(&mut standby, &wanted).await?;
            tracing::warn!(app, cell, active, "the standby is told to follow");
            Ok(())
        };
        match timeout(ASK_MAX, look).await {
            Ok(Ok(())) => (),
            Ok(Err(error)) => tracing::debug!(app, cell, error, "the standby cannot be asked"),
            Err(_) => tracing::debug!(app, cell, "the standby does not answer in {ASK_MAX:?}"),
        }
    }
}

/// Has a standby follow whom this connection string names.
pub(crate) async fn tell(standby: &mut Admin, conninfo: &str) -> Result<(), String> {
    let literal = conninfo.replace('\'', "''");
    let set = format!("ALTER SYSTEM SET primary_conninfo = '{literal}'");
    // Its text is not for a log: it may hold a password.
    standby.rows(&set).await.map_err(|_| "`primary_conninfo` cannot be set".to_owned())?;
    reload(standby).await
}

/// Names of standbys that stream from a server.
async fn listed(server: &CellServer) -> Result<Vec<String>, String> {
    let sql =
        "SELECT application_name FROM pg_catalog.pg_stat_replication WHERE state = 'streaming'";
    let rows = admin(server).await?.rows(sql).await.map_err(|error| model::chain(&error))?;
    Ok(rows.into_iter().flatten().flatten().collect())
}

/// Whether a standby receives, and by which `primary_conninfo`. None if it is none.
async fn receives(standby: &mut Admin) -> Result<Option<(bool, String)>, String> {
    let sql = "SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_wal_receiver WHERE status = 'streaming')::text, \
        pg_catalog.current_setting('primary_conninfo') WHERE pg_catalog.pg_is_in_recovery()";
    let rows = standby.rows(sql).await.map_err(|error| model::chain(&error))?;
    let Some(row) = rows.into_iter().next() else { return Ok(None) };
    let mut values = row.into_iter().map(Option::unwrap_or_default);
    let is_streaming = values.next().as_deref() == Some("true");
    Ok(Some((is_streaming, values.next().unwrap_or_default())))
}

/// The timeline that a primary writes, and those that it comes from.
pub(crate) async fn history(primary: &mut Admin) -> Result<(u64, History), String> {
    // The control file names it from the next checkpoint on only.
    let question = "SELECT timeline, pg_read_file('pg_wal/' || timeline || '.history', 0, 1048576, true) \
        FROM substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) timeline";
    let rows = primary.rows(question).await.map_err(|error| model::chain(&error))?;
    let mut row = rows.into_iter().flatten();
    let timeline = row.next().flatten().and_then(|text| u64::from_str_radix(&text, 16).ok());
    let timeline = timeline.ok_or("its timeline cannot be read")?;
    let text = row.next().flatten().unwrap_or_default();
    if text.is_empty() && timeline > 1 {
        return Err(format!("the history of timeline {timeline} cannot be read"));
    }
    Ok((timeline, History::read(&text)))
}

/// Where a standby is that asks another server for WAL. None if it asks nobody, or is no standby.
async fn position(standby: &mut Admin) -> Result<Option<Position>, String> {
    let sql = "SELECT received_tli::text, \
        greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())::text \
        FROM pg_stat_wal_receiver WHERE pg_is_in_recovery()";
    let rows = standby.rows(sql).await.map_err(|error| model::chain(&error))?;
    let mut row = rows.into_iter().flatten();
    let timeline = row.next().flatten().and_then(|text| text.parse().ok());
    let has = row.next().flatten().as_deref().and_then(Lsn::read);
    Ok(timeline.zip(has).map(|(timeline, has)| Position { timeline, has }))
}

/// Where a standby is that has gone another way than the primary, and why it will not follow.
async fn has_strayed(
    standby: &mut Admin,
    primary: &CellServer,
) -> Result<Option<(Position, String)>, String> {
    let Some(position) = position(standby).await? else { return Ok(None) };
    let (_, history) = history(&mut admin(primary).await?).await?;
    Ok(history.check(position).err().map(|why| (position, why)))
}

/// Why the standby of a cell will not follow the active one's server, if so.
pub(crate) async fn strayed(
    servers: &AppServers,
    (cell, active): (&str, &str),
) -> Result<Option<String>, String> {
    let server = servers.cells.get(cell).zip(servers.cells.get(active));
    let (standby, primary) = server.ok_or_else(|| format!("cell `{cell}` is not configured"))?;
    let strayed = has_strayed(&mut admin(standby).await?, primary).await?;
    Ok(strayed.map(|(_, why)| why))
}

/// Whether a standby streams, and has not gone another way than the primary.
pub(crate) async fn follows(standby: &mut Admin, primary: &CellServer) -> Result<bool, String> {
    if !standby.status().await.map_err(|error| model::chain(&error))?.streaming {
        return Ok(false);
    }
    Ok(position(standby).await?.is_some() && has_strayed(standby, primary).await?.is_none())
}

/// Has standbys follow the active cell's server before the one that they have followed is stopped: the last that this
/// writes, which nobody else has, they are not to get.
pub(crate) async fn turn(control: &Control, servers: &AppServers, app: &str, active: &str) {
    let Ok(application) = control.application(app) else { return };
    let Some(primary) = servers.cells.get(active) else { return };
    for (cell, server) in &servers.cells {
        if application.cells.get(cell) != Some(&CellState::Passive) {
            continue;
        }
        let wanted = named(&primary.conninfo, cell);
        let turned = async {
            let mut standby = admin(server).await?;
            let Some((_, conninfo)) = receives(&mut standby).await? else { return Ok(()) };
            if conninfo == wanted {
                return Ok(());
            }
            let receiver = "SELECT pid::text FROM pg_stat_wal_receiver";
            let before = standby.value(receiver).await.map_err(|error| model::chain(&error))?;
            tell(&mut standby, &wanted).await?;
            let is_same = async |standby: &mut Admin| {
                let now = standby.value(receiver).await.map_err(|error| model::chain(&error))?;
                Ok::<bool, String>(before.is_some() && now == before)
            };
            while is_same(&mut standby).await? {
                tokio::time::sleep(POLL).await;
            }
            Ok::<(), String>(())
        };
        // It is found to have gone another way otherwise, and is made a standby anew.
        match timeout(TURN_MAX, turned).await {
            Ok(Ok(())) => (),
            Ok(Err(error)) => tracing::warn!(app, cell, error, "the standby cannot be turned"),
            Err(_) => tracing::warn!(app, cell, "the standby is not turned in {TURN_MAX:?}"),
        }
    }
}
