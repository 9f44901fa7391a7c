//! Has commits of the active cell wait for standbys, as far as the policy says, and records what is proven of it.
//!
//! **Invariant:** the store says that commits wait only while they do: it is recorded after the proof, and taken back before
//! they go on alone.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use model::Lsn;
use model::cell::{CellState, Epoch};
use model::chain;
use model::durability::{Durability, Follower, Keeper, Protection, Step, standby_name};
use pg::admin::Admin;

use crate::config::AppServers;
use crate::control::Control;
use crate::following::tell;
use crate::records::{self, RecordError};
use crate::stages::{admin, reload};

/// How long standbys may take to have what was written before commits waited for them.
const CATCH_UP_MAX: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(5);

/// Looks at the active cell's server, and gives what is to be done.
pub(crate) async fn look(
    control: &Control,
    servers: &AppServers,
    (app, cell): (&str, &str),
    active: &mut Admin,
    keeper: &mut Keeper,
) -> Result<Step, String> {
    let application = control.application(app).map_err(|error| chain(&error))?;
    let recorded = application.protected.as_ref();
    let asked = "SELECT current_setting('synchronous_standby_names'), pg_current_wal_flush_lsn()::text, \
        (SELECT coalesce(json_agg(json_build_array(application_name, flush_lsn::text)), '[]')::text \
        FROM pg_stat_replication WHERE state = 'streaming'), \
        (SELECT setting FROM pg_file_settings WHERE name = 'synchronous_standby_names' AND applied)";
    let rows = active.rows(asked).await.map_err(|error| chain(&error))?;
    let value = |at: usize| rows.first().and_then(|row| row.get(at)).and_then(Option::as_deref);
    let listed: Vec<(String, Option<String>)> = serde_json::from_str(value(2).unwrap_or("[]"))
        .map_err(|error| format!("standbys: {error}"))?;
    let others: BTreeSet<String> =
        servers.cells.keys().filter(|other| *other != cell).cloned().collect();
    let of_cell = |other: &String| {
        let mut named = listed.iter().filter(|(name, _)| *name == standby_name(other));
        // Of two by one name nobody knows which it was that has acknowledged.
        let (_, flushed) = named.next().filter(|_| named.next().is_none())?;
        let flushed = flushed.as_deref().and_then(Lsn::read).unwrap_or_default();
        Some(Follower { cell: other.clone(), flushed })
    };
    let mut listed: Vec<Follower> = others.iter().filter_map(of_cell).collect();
    let written = value(1).and_then(Lsn::read).unwrap_or_default();
    if listed.iter().any(|one| one.flushed > written) {
        // It may have been written since. Who has more than that has it from elsewhere, and says nothing of what is here.
        let now = active.value("SELECT pg_current_wal_insert_lsn()::text").await;
        let now = now.map_err(|error| chain(&error))?.as_deref().and_then(Lsn::read);
        listed.retain(|one| Some(one.flushed) <= now);
    }
    let streaming = keeper.follow(Instant::now(), written, &listed);
    // What an earlier control has asked for may have come late, and counts from the next start of the server on.
    let (runs, written_down) = (value(0).unwrap_or_default(), value(3).unwrap_or_default());
    let configured = match Protection::is_ours(runs) && runs != written_down {
        true => "",
        false => runs,
    };
    let policy = servers.now().durability;
    if policy.acks > 0
        && let Err(why) = check_commits(active).await
    {
        // It may have been otherwise when that was recorded.
        return Ok(recorded.map_or(Step::Nothing, |_| Step::Unprotect(why)));
    }
    Ok(keeper.next(Instant::now(), policy, recorded, configured, (&streaming, &others)))
}

/// Commits have to wait for standbys if they are told to.
async fn check_commits(active: &mut Admin) -> Result<(), String> {
    // What this connection has is its own; what a role or database has by default is theirs.
    let sql = "SELECT setting FROM pg_file_settings WHERE name = 'synchronous_commit' AND applied";
    let setting = active.value(sql).await.map_err(|error| chain(&error))?;
    match setting.filter(|setting| setting != "on" && setting != "remote_apply") {
        Some(setting) => Err(format!("`synchronous_commit` is `{setting}`, `on` is needed")),
        None => Ok(()),
    }
}

/// Gives standbys their names, by which commits wait for them.
pub(crate) async fn name_standbys(control: &Control, servers: &AppServers, app: &str) {
    let Ok(application) = control.application(app) else { return };
    // Of others something is being done.
    let is_standby = |cell: &String| application.cells.get(cell) == Some(&CellState::Passive);
    for (cell, server) in servers.cells.iter().filter(|(cell, _)| is_standby(cell)) {
        let name = async {
            let mut standby = admin(server).await?;
            let sql = "SELECT current_setting('primary_conninfo') WHERE pg_is_in_recovery()";
            let conninfo = standby.value(sql).await.map_err(|error| chain(&error))?;
            let Some(conninfo) = conninfo.filter(|conninfo| !conninfo.is_empty()) else {
                return Ok(());
            };
            let named = named(&conninfo, cell);
            if named == conninfo {
                return Ok(());
            }
            tell(&mut standby, Some(&named), None).await
        };
        if let Err(error) = name.await {
            tracing::warn!(cell, error, "the standby cannot be given its name");
        }
    }
}

/// A connection string by which a standby of `cell` says whose it is.
pub(crate) fn named(conninfo: &str, cell: &str) -> String {
    let name = standby_name(cell);
    if conninfo.starts_with("postgres://") || conninfo.starts_with("postgresql://") {
        let name = name.bytes().map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'-' | b'.' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        });
        let setting = format!("application_name={}", name.collect::<String>());
        if conninfo.ends_with(&setting) {
            return conninfo.to_owned();
        }
        let before = if conninfo.contains('?') { '&' } else { '?' };
        return format!("{conninfo}{before}{setting}");
    }
    // The last of several counts (`conninfo_parse`).
    let setting =
        format!(" application_name='{}'", name.replace('\\', "\\\\").replace('\'', "\\'"));
    if conninfo.ends_with(&setting) { conninfo.to_owned() } else { format!("{conninfo}{setting}") }
}

/// Has commits wait, proves that they do, and records it, unless something else has changed the application meanwhile.
pub(crate) async fn protect(
    control: &Control,
    servers: &AppServers,
    (app, cell): (&str, &str),
    protection: Protection,
) -> Result<(), String> {
    let server = servers.cells.get(cell).ok_or("it is not configured")?;
    let epoch = control.record_protection(app, cell, None, None)?;
    let mut active = admin(server).await?;
    check_commits(&mut active).await?;
    wait_for(&mut active, Some(&protection)).await?;
    // Once the second reload is heard of, the first was sent to every process. The checkpointer, which tells all others that
    // they have to wait (`SyncRepUpdateSyncStandbysDefined`), has taken it up once it has begun another checkpoint after one.
    reload(&mut active).await?;
    for _ in 0..2 {
        active.rows("CHECKPOINT").await.map_err(|error| chain(&error))?;
    }
    let text = active.value("SELECT pg_current_wal_insert_lsn()").await;
    let written = text.map_err(|error| chain(&error))?.unwrap_or_default();
    let names: Vec<String> = protection.standbys.iter().map(|cell| standby_name(cell)).collect();
    let list = names.iter().map(|name| format!("'{}'", name.replace('\'', "''")));
    let list = list.collect::<Vec<_>>().join(", ");
    let have = format!(
        "SELECT count(DISTINCT application_name) FROM pg_stat_replication \
         WHERE application_name IN ({list}) AND flush_lsn >= '{written}'::pg_lsn AND flush_lsn <= pg_current_wal_insert_lsn() AND sync_state = 'quorum'"
    );
    let deadline = Instant::now() + CATCH_UP_MAX;
    loop {
        let count = active.value(&have).await.map_err(|error| chain(&error))?;
        let count: usize = count.and_then(|text| text.parse().ok()).unwrap_or(0);
        if count >= protection.acks {
            break;
        }
        if Instant::now() > deadline {
            return Err(format!("{count} standbys have {written} after {CATCH_UP_MAX:?}"));
        }
        tokio::time::sleep(POLL).await;
    }
    let text = protection.names();
    control.record_protection(app, cell, Some(epoch), Some(protection))?;
    tracing::info!(app, cell, standbys = text, "commits wait for standbys");
    Ok(())
}

/// Records that commits are acknowledged by one server alone, and has them wait no longer.
pub(crate) async fn unprotect(
    control: &Control,
    servers: &AppServers,
    (app, cell): (&str, &str),
    why: &str,
) -> Result<(), String> {
    let server = servers.cells.get(cell).ok_or("it is not configured")?;
    control.record_protection(app, cell, None, None)?;
    tracing::warn!(app, cell, why, "commits wait for standbys no longer");
    let mut active = admin(server).await?;
    wait_for(&mut active, None).await
}

/// Has commits wait, from the next reload on which this includes.
async fn wait_for(server: &mut Admin, protection: Option<&Protection>) -> Result<(), String> {
    let set = match protection {
        Some(protection) => {
            let literal = protection.names().replace('\'', "''");
            format!("ALTER SYSTEM SET synchronous_standby_names = '{literal}'")
        }
        None => "ALTER SYSTEM RESET synchronous_standby_names".to_owned(),
    };
    server.rows(&set).await.map_err(|error| chain(&error))?;
    reload(server).await
}

/// Before a standby becomes the primary: whether its commits wait from the first on. Where the policy is not strict they do
/// once another server is its standby.
pub(crate) async fn before_promotion(
    policy: Durability,
    servers: &AppServers,
    cell: &str,
    standby: &mut Admin,
) -> Result<(), String> {
    let now = standby.value("SHOW synchronous_standby_names").await;
    let now = now.map_err(|error| chain(&error))?.unwrap_or_default();
    let standbys = servers.cells.keys().filter(|other| *other != cell).cloned().collect();
    if policy.acks == 0 && !Protection::is_ours(&now) {
        return Ok(());
    }
    let waits = policy.acks > 0 && policy.is_strict;
    let wanted = waits.then_some(Protection { acks: policy.acks, standbys });
    if now == wanted.as_ref().map(Protection::names).unwrap_or_default() {
        return Ok(());
    }
    wait_for(standby, wanted.as_ref()).await
}

impl Control {
    /// Records what is proven of the commits of the active cell, in `epoch` if one is given; gives the epoch. Where nothing is
    /// proven, also while an execution runs.
    /// Remembers the highest timeline that the active cell's server was seen to write.
    pub(crate) fn note_timeline(&self, app: &str, cell: &str, timeline: u64) {
        let note = || -> Result<(), RecordError> {
            let _writing = self.write_alone();
            let seen = records::application(&*self.store, app)?;
            let mut application = seen.application;
            if application.active() != Some(cell) || application.timeline >= timeline {
                return Ok(());
            }
            application.timeline = timeline;
            let text = format!("`{cell}` writes timeline {timeline}");
            let draft = records::own(app, "timeline", application.epoch, "what is seen", text);
            records::update(&*self.store, app, seen.revision, &application, draft)?;
            Ok(())
        };
        if let Err(error) = note() {
            tracing::debug!(app, cell, error = chain(&error), "its timeline is not recorded");
        }
    }

    pub(crate) fn record_protection(
        &self,
        app: &str,
        cell: &str,
        epoch: Option<Epoch>,
        protected: Option<Protection>,
    ) -> Result<Epoch, String> {
        let _writing = self.write_alone();
        let seen = records::application(&*self.store, app).map_err(|error| chain(&error))?;
        let mut application = seen.application;
        let is_other = application.active() != Some(cell)
            || !self.is_settled_but_for(app, &application, None)
            || epoch.is_some_and(|epoch| epoch != application.epoch);
        if is_other {
            return Err("the application is being changed".into());
        }
        let epoch = application.epoch;
        if application.protected != protected {
            let text = match &protected {
                Some(one) => {
                    format!("{} of {} standbys have each commit", one.acks, one.standbys.len())
                }
                None => "commits may be acknowledged by one server alone".to_owned(),
            };
            application.protected = protected;
            let draft = records::own(app, "protect", epoch, "what standbys do", text);
            records::update(&*self.store, app, seen.revision, &application, draft)
                .map_err(|error| chain(&error))?;
        }
        Ok(epoch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standby_says_whose_it_is() {
        let text = named("host=a port=1", "b");
        assert_eq!(text, "host=a port=1 application_name='holdfast_b'");
        assert_eq!(named(&text, "b"), text);
        assert_eq!(named("host=a", "it's"), "host=a application_name='holdfast_it\\'s'");
        let uri = named("postgresql://h/db?sslmode=require", "b c");
        assert_eq!(uri, "postgresql://h/db?sslmode=require&application_name=holdfast_b%20c");
        assert_eq!(named(&uri, "b c"), uri);
    }
}
