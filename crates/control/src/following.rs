//! Standbys of other cells follow the active one's server, whichever that is by now.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use model::Lsn;
use model::cell::CellState;
use model::durability::standby_name;
use model::following::{Astray, Followers, History, Position, Standby, is_same_place};
use model::settings::{self, ASKED, Setting};
use model::slots::slot_name;
use pg::admin::Admin;
use tokio::time::timeout;

use crate::config::{AppServers, CellServer};
use crate::control::Control;
use crate::durability::named;
use crate::slots;
use crate::stages::{self, admin, reload};

/// How long one standby may take.
const ASK_MAX: Duration = Duration::from_secs(5);
/// How long one may take to leave the server that it has followed.
const TURN_MAX: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(10);

/// What is found where the active cell's server is.
struct AtPrimary {
    /// Names of standbys that stream from it.
    listed: Vec<String>,
    /// Slots by which standbys may receive. None: that is not known now.
    slots: Option<BTreeSet<String>>,
    history: History,
}

/// Names of slots of this application's standbys, on whichever server.
fn slots_of(servers: &AppServers) -> BTreeSet<String> {
    servers.cells.keys().filter_map(|cell| slot_name(cell)).collect()
}

/// Tells those to follow that do not, keeps their slots, and finds settings that are in the way.
pub(crate) async fn follow(
    control: &Control,
    servers: &AppServers,
    (app, active): (&str, &str),
    followers: &mut Followers,
) {
    let Ok(application) = control.application(app) else { return };
    let Some(primary) = servers.cells.get(active) else { return };
    let mut notices = Vec::new();
    let look = look_at_primary(servers, active, &mut notices);
    let at_primary = match timeout(ASK_MAX, look).await {
        Ok(Ok(at_primary)) => at_primary,
        Ok(Err(error)) => return tracing::debug!(app, active, error, "it cannot be asked"),
        Err(_) => return tracing::debug!(app, active, "it does not answer in {ASK_MAX:?}"),
    };
    control.note_timeline(app, active, at_primary.history.timeline);
    for (cell, server) in servers.cells.iter().filter(|(cell, _)| *cell != active) {
        // Of others something is being done, or a person has to.
        let is_standby = application.cells.get(cell) == Some(&CellState::Passive);
        let is_left = !control.is_settled_but_for(app, &application, Some(cell));
        if is_left || application.active() != Some(active) || !is_standby {
            continue;
        }
        let wanted = named(&primary.conninfo, cell);
        let is_listed = at_primary.listed.contains(&standby_name(cell));
        let needs_all = servers.now().durability.acks > 0;
        let look = async {
            let mut standby = admin(server).await?;
            let Some(Receiver { is_streaming, conninfo, slot }) = receives(&mut standby).await?
            else {
                return Ok::<(), String>(());
            };
            let ours = slots_of(servers);
            let (_, failed) = slots::keep(&mut standby, &BTreeSet::new(), &ours).await?;
            notices.extend(failed.iter().map(|why| format!("cell `{cell}`: {why}")));
            check_settings(&mut standby, (cell, server), false, &mut notices).await?;
            // Somebody else's is theirs. One that is not there would keep it from streaming.
            let other_slot = at_primary.slots.as_ref().and_then(|slots| {
                let wanted =
                    slot_name(cell).filter(|name| slots.contains(name)).unwrap_or_default();
                (slot != wanted && (slot.is_empty() || ours.contains(&slot))).then_some(wanted)
            });
            let conninfo = conninfo.as_str();
            let seen = Standby { cell, is_streaming, is_listed, conninfo, wanted: &wanted };
            let turns = followers.see(Instant::now(), seen, needs_all);
            let follows = is_listed && is_streaming;
            let may_have_strayed = !follows
                || position(&mut standby)
                    .await
                    .is_ok_and(|at| at_primary.history.check(at).is_err());
            if !turns
                && may_have_strayed
                && let Some((position, Astray { why, is_ahead })) =
                    has_strayed(&mut standby, primary).await?
            {
                let next = match is_ahead {
                    true => {
                        ": that one has lost log, of which this may be the only copy; look at it, and make it a standby by hand"
                    }
                    false => "",
                };
                notices.push(format!("cell `{cell}` will not follow: {why}{next}"));
                if !is_ahead {
                    followers.note_strayed(Instant::now(), cell, position);
                }
            }
            let is_there = is_listed || is_same_place(conninfo, &wanted);
            if !(turns || (other_slot.is_some() && is_there)) {
                return Ok(());
            }
            // The application may have been changed since it was looked at.
            let now = control.application(app).map_err(|error| model::chain(&error))?;
            if now.version != application.version {
                return Ok(());
            }
            let conninfo = turns.then_some(&*wanted);
            tell(&mut standby, conninfo, other_slot.as_deref()).await?;
            if turns {
                tracing::warn!(app, cell, active, "the standby is told to follow");
            } else {
                tracing::info!(app, cell, slot = other_slot, "the standby is told its slot");
            }
            Ok(())
        };
        match timeout(ASK_MAX, look).await {
            Ok(Ok(())) => (),
            Ok(Err(error)) => tracing::debug!(app, cell, error, "the standby cannot be asked"),
            Err(_) => tracing::debug!(app, cell, "the standby does not answer in {ASK_MAX:?}"),
        }
    }
    control.note_seen(app, |seen| seen.notices = notices);
}

async fn look_at_primary(
    servers: &AppServers,
    active: &str,
    notices: &mut Vec<String>,
) -> Result<AtPrimary, String> {
    let server = servers.cells.get(active).ok_or("it is not configured")?;
    let mut primary = admin(server).await?;
    let others = servers.cells.keys().filter(|cell| *cell != active);
    let has_slots = servers.now().slots;
    let wanted = match has_slots && is_bounded(&mut primary).await? {
        true => others.filter_map(|cell| slot_name(cell)).collect(),
        false => BTreeSet::new(),
    };
    // Standbys are told to follow without, too.
    let slots = match slots::keep(&mut primary, &wanted, &slots_of(servers)).await {
        Ok((there, failed)) => {
            notices.extend(failed.iter().map(|why| format!("cell `{active}`: {why}")));
            Some(there)
        }
        Err(error) => {
            notices.push(format!("slots of cell `{active}` cannot be looked at: {error}"));
            None
        }
    };
    let history = history(&mut primary).await?;
    check_settings(&mut primary, (active, server), has_slots, notices).await?;
    Ok(AtPrimary { listed: listed(&mut primary).await?, slots, history })
}

/// What slots keep has a limit: a standby that is gone does not fill the disk.
async fn is_bounded(primary: &mut Admin) -> Result<bool, String> {
    let sql = "SELECT (setting::bigint >= 0)::text FROM pg_settings WHERE name = 'max_slot_wal_keep_size'";
    let value = primary.value(sql).await.map_err(|error| model::chain(&error))?;
    Ok(value.as_deref() == Some("true"))
}

/// Notes what is in the way of a failover, and puts right what nobody has chosen to be so.
async fn check_settings(
    server: &mut Admin,
    (cell, of): (&str, &CellServer),
    has_slots: bool,
    notices: &mut Vec<String>,
) -> Result<(), String> {
    let names: Vec<String> = ASKED.iter().map(|name| format!("'{name}'")).collect();
    let sql = format!(
        "SELECT name, setting, (source = 'default')::text FROM pg_settings WHERE name IN ({})",
        names.join(", ")
    );
    let rows = server.rows(&sql).await.map_err(|error| model::chain(&error))?;
    let setting = |row: Vec<Option<String>>| {
        let mut row = row.into_iter().map(Option::unwrap_or_default);
        let (name, value) = (row.next()?, row.next()?);
        Some((name, Setting { value, is_default: row.next()? == "true" }))
    };
    let settings = rows.into_iter().filter_map(setting).collect();
    for finding in settings::check(&settings, has_slots) {
        let may = finding.is_default && of.member.is_some();
        match finding.to.filter(|_| may) {
            Some((name, value)) => {
                let set = format!("ALTER SYSTEM SET {name} = '{value}'");
                server.rows(&set).await.map_err(|error| model::chain(&error))?;
                reload(server).await?;
                tracing::info!(cell, name, value, "a setting that nobody has chosen is changed");
            }
            None => notices.push(format!("cell `{cell}`: {}", finding.says)),
        }
    }
    Ok(())
}

/// Has a standby follow whom this connection string names, or by this slot: by none if that is empty.
pub(crate) async fn tell(
    standby: &mut Admin,
    conninfo: Option<&str>,
    slot: Option<&str>,
) -> Result<(), String> {
    if let Some(conninfo) = conninfo {
        let literal = conninfo.replace('\'', "''");
        let set = format!("ALTER SYSTEM SET primary_conninfo = '{literal}'");
        // Its text is not for a log: it may hold a password.
        standby.rows(&set).await.map_err(|_| "`primary_conninfo` cannot be set".to_owned())?;
    }
    if let Some(slot) = slot {
        let set = format!("ALTER SYSTEM SET primary_slot_name = '{slot}'");
        standby.rows(&set).await.map_err(|error| model::chain(&error))?;
    }
    reload(standby).await
}

/// Names of standbys that stream from a server.
async fn listed(primary: &mut Admin) -> Result<Vec<String>, String> {
    let sql =
        "SELECT application_name FROM pg_catalog.pg_stat_replication WHERE state = 'streaming'";
    let rows = primary.rows(sql).await.map_err(|error| model::chain(&error))?;
    Ok(rows.into_iter().flatten().flatten().collect())
}

/// Of a standby.
struct Receiver {
    is_streaming: bool,
    /// `primary_conninfo`, `primary_slot_name`.
    conninfo: String,
    slot: String,
}

/// Whether a standby receives, and how. None if it is none.
async fn receives(standby: &mut Admin) -> Result<Option<Receiver>, String> {
    let sql = "SELECT EXISTS (SELECT FROM pg_catalog.pg_stat_wal_receiver WHERE status = 'streaming')::text, \
        pg_catalog.current_setting('primary_conninfo'), pg_catalog.current_setting('primary_slot_name') \
        WHERE pg_catalog.pg_is_in_recovery()";
    let rows = standby.rows(sql).await.map_err(|error| model::chain(&error))?;
    let Some(row) = rows.into_iter().next() else { return Ok(None) };
    let mut values = row.into_iter().map(Option::unwrap_or_default);
    let is_streaming = values.next().as_deref() == Some("true");
    let (conninfo, slot) = (values.next().unwrap_or_default(), values.next().unwrap_or_default());
    Ok(Some(Receiver { is_streaming, conninfo, slot }))
}

/// The timeline that a primary writes, how far, and those that it comes from.
pub(crate) async fn history(primary: &mut Admin) -> Result<History, String> {
    // The control file names it from the next checkpoint on only.
    let question = "SELECT timeline, pg_read_file('pg_wal/' || timeline || '.history', 0, 1048576, true), \
        pg_current_wal_insert_lsn()::text \
        FROM substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8) timeline";
    let rows = primary.rows(question).await.map_err(|error| model::chain(&error))?;
    let mut row = rows.into_iter().flatten();
    let timeline = row.next().flatten().and_then(|text| u64::from_str_radix(&text, 16).ok());
    let timeline = timeline.ok_or("its timeline cannot be read")?;
    let text = row.next().flatten().unwrap_or_default();
    if text.is_empty() && timeline > 1 {
        return Err(format!("the history of timeline {timeline} cannot be read"));
    }
    let end = row.next().flatten().as_deref().and_then(Lsn::read).unwrap_or_default();
    Ok(History::read(&text, timeline, end))
}

/// Where a standby is.
async fn position(standby: &mut Admin) -> Result<Position, String> {
    let stages::Position { timeline, received, .. } = stages::position(standby).await?;
    Ok(Position { timeline, has: received })
}

/// Where a standby is that has gone another way than the primary, and why it will not follow.
async fn has_strayed(
    standby: &mut Admin,
    primary: &CellServer,
) -> Result<Option<(Position, Astray)>, String> {
    // In this order: what it has was written before.
    let position = position(standby).await?;
    let mut primary = admin(primary).await?;
    let history = history(&mut primary).await?;
    if let Err(astray) = history.check(position) {
        return Ok(Some((position, astray)));
    }
    let lacks = lacks_log(standby, &mut primary, position).await?;
    let why = lacks.then(|| {
        let Position { has, .. } = position;
        format!("it has up to {has}, and the active one has removed its log from there on")
    });
    Ok(why.map(|why| (position, Astray { why, is_ahead: false })))
}

/// A standby that does not stream asks for log that is not there any more, and has no archive where that could be.
async fn lacks_log(
    standby: &mut Admin,
    primary: &mut Admin,
    Position { has, .. }: Position,
) -> Result<bool, String> {
    let asked = "SELECT (current_setting('restore_command') = '' AND current_setting('primary_conninfo') <> '' \
        AND NOT EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming'))::text";
    let is_alone = standby.value(asked).await.map_err(|error| model::chain(&error))?;
    if is_alone.as_deref() != Some("true") {
        return Ok(false);
    }
    // From the begin of a segment on, of whichever timeline (`RequestXLogStreaming`).
    let asked = format!(
        "SELECT (NOT EXISTS (SELECT FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{{24}}$' \
        AND substr(name, 9) = substr(pg_walfile_name('{has}'::pg_lsn + 1), 9)))::text"
    );
    let is_gone = primary.value(&asked).await.map_err(|error| model::chain(&error))?;
    Ok(is_gone.as_deref() == Some("true"))
}

/// Why the standby of a cell will not follow the active one's server, if so.
pub(crate) async fn strayed(
    servers: &AppServers,
    (cell, active): (&str, &str),
) -> Result<Option<(Position, Astray)>, String> {
    let server = servers.cells.get(cell).zip(servers.cells.get(active));
    let (standby, primary) = server.ok_or_else(|| format!("cell `{cell}` is not configured"))?;
    has_strayed(&mut admin(standby).await?, primary).await
}

/// Whether a standby streams, and has not gone another way than the primary.
pub(crate) async fn follows(standby: &mut Admin, primary: &CellServer) -> Result<bool, String> {
    if !standby.status().await.map_err(|error| model::chain(&error))?.streaming {
        return Ok(false);
    }
    Ok(has_strayed(standby, primary).await?.is_none())
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
            let Some(receiver) = receives(&mut standby).await? else { return Ok(()) };
            if receiver.conninfo == wanted {
                return Ok(());
            }
            let asked = "SELECT pid::text FROM pg_stat_wal_receiver";
            let before = standby.value(asked).await.map_err(|error| model::chain(&error))?;
            // Its slot is made where it is to follow once that is looked at.
            let slot = slots_of(servers).contains(&receiver.slot).then_some("");
            tell(&mut standby, Some(&wanted), slot).await?;
            let is_same = async |standby: &mut Admin| {
                let now = standby.value(asked).await.map_err(|error| model::chain(&error))?;
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
