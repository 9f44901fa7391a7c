//! What a lost server's disk has is replayed by the standby that is to take its place, so that nothing is lost.
//!
//! A disk may lie: a log that ends before what was seen of it, or before what the standby has, proves nothing of what was
//! acknowledged. What the standby has itself it replays first, and nothing is put in the place of that.

use std::path::Path;
use std::time::{Duration, Instant};

use model::Lsn;
use model::member::WalTail;
use pg::admin::Admin;

use super::fencing::reload;
use super::{POLL, chain};
use crate::config::CellServer;
use crate::control::Control;
use crate::member::Member;

/// How long what was read from the lost server's disk may take to be replayed.
const SALVAGE_MAX: Duration = Duration::from_secs(60);
/// Longest record, of which it is not told where it ends: longer ones are no server's but in theory.
const RECORD_MAX: u64 = 16 << 20;
/// Of a segment that is larger, so much before a position is read.
const READ_BEFORE_MAX: u64 = 64 << 20;
/// Ends a `restore_command` of ours; what it was before stands before it.
const MARK: &str = "# holdfast";

/// How a standby can read what a lost server has left.
pub(super) struct Salvage<'a> {
    lost: &'a Member,
    pub(super) way: Way<'a>,
}

#[derive(Clone, Copy)]
pub(super) enum Way<'a> {
    /// Both servers' files are here: the data directory of the lost one.
    Disk(&'a Path),
    /// Whoever is beside it hands its log over to this one.
    Handed(&'a Member),
}

pub(super) fn can_salvage<'a>(from: &'a CellServer, to: &'a CellServer) -> Option<Salvage<'a>> {
    let (lost, to) = (from.member.as_ref()?, to.member.as_ref()?);
    let (can, way) = match (lost, to) {
        (Member::Here(local), Member::Here(_)) => {
            (local.instance.has("pg_waldump"), Way::Disk(&local.instance.data_dir))
        }
        (Member::Here(local), Member::Agent(_)) => {
            (local.instance.has("pg_waldump"), Way::Handed(to))
        }
        (Member::Agent(link), _) => (link.is_heard() && !lost.is_out_of_hand(), Way::Handed(to)),
    };
    can.then_some(Salvage { lost, way })
}

impl Salvage<'_> {
    /// Has the standby replay what the lost server's disk has beyond `received`.
    ///
    /// # Errors
    /// It may lack something, in words.
    pub(super) async fn run(
        &self,
        control: &Control,
        app: &str,
        (new, received): (&mut Admin, Lsn),
    ) -> Result<String, String> {
        let Salvage { lost, way } = *self;
        let deadline = Instant::now() + SALVAGE_MAX;
        // Replay that somebody has stopped would be waited for.
        new.rows("SELECT pg_wal_replay_resume()").await.map_err(chain)?;
        // What was received may end within a record, what is replayed does not.
        let replayed = replays_its_own(new, deadline).await?;
        let timeline = lost.look().await?.timeline.ok_or("of its log nothing can be read")?;
        let segment = "SELECT setting FROM pg_settings WHERE name = 'wal_segment_size'";
        let segment = new.value(segment).await.map_err(chain)?;
        let segment = segment.and_then(|text| text.parse().ok()).unwrap_or(READ_BEFORE_MAX);
        // A file takes the place of the standby's own as a whole.
        let begin = replayed.0 - replayed.0 % u64::min(segment, READ_BEFORE_MAX).max(1);
        let tail = match lost.read_tail(timeline, Lsn(begin)).await {
            Ok(tail) if tail.last.is_some() => tail,
            _ => tail_around(lost, timeline, replayed).await?,
        };
        let last = tail.last.ok_or("nothing of its log can be read there")?;
        let ends = || tail.end.unwrap_or(last);
        let is_short = match tail.end {
            Some(end) => end < replayed,
            None => !tail.reaches(replayed),
        };
        if is_short {
            return Err(format!("it has {replayed}, and the lost server's log ends at {}", ends()));
        }
        if let Some(seen) = control.last_seen(app).filter(|seen| !tail.reaches(*seen)) {
            return Err(format!(
                "{seen} was seen of the lost server, whose log ends at {}",
                ends()
            ));
        }
        if last < replayed {
            return Ok("the lost server's disk has no more".into());
        }
        let dir = match way {
            Way::Disk(data_dir) => data_dir.join("pg_wal"),
            Way::Handed(to) => {
                let end = tail.end.unwrap_or(Lsn(last.0.saturating_add(RECORD_MAX)));
                lost.hand_over(to, timeline, (replayed, end), deadline).await?.into()
            }
        };
        let dir = dir.to_str().filter(|dir| !dir.contains(['\'', '"', '\\', '%', '$', '`']));
        let dir = dir.ok_or("the name of its directory has letters that a command cannot have")?;
        // Read by the standby itself, by the way it knows (manual, "Archive Recovery Settings").
        let own = format!("cp \"{dir}/%f\" \"%p\"");
        let before = new.value("SHOW restore_command").await.map_err(chain)?.unwrap_or_default();
        let command = match before.as_str() {
            "" => format!("{own} {MARK}"),
            before => format!("{own} || {before} {MARK}"),
        };
        set_restore_command(new, &command).await?;
        reload(new).await?;
        // Behind the last whole record.
        while new.replayed_lsn().await.map_err(chain)? <= last {
            if Instant::now() > deadline {
                return Err(format!("what is on its disk is not replayed after {SALVAGE_MAX:?}"));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(match last.bytes_since(received) {
            0 => "the lost server's disk has no more".into(),
            bytes => format!("about {bytes} bytes were read from the lost server's disk"),
        })
    }
}

/// Waits until a standby has replayed all that it has received. Gives the end of that.
async fn replays_its_own(new: &mut Admin, deadline: Instant) -> Result<Lsn, String> {
    // It waits for more, so it has read what is there (`WaitForWALToBecomeAvailable`).
    let question = "SELECT pg_last_wal_replay_lsn()::text, \
        COALESCE(pg_last_wal_receive_lsn() <= pg_last_wal_replay_lsn(), false)::text, \
        COALESCE((SELECT wait_event FROM pg_stat_activity WHERE backend_type = 'startup') \
        IN ('RecoveryWalStream', 'RecoveryRetrieveRetryInterval'), false)::text";
    let mut waited_at = None;
    loop {
        let rows = new.rows(question).await.map_err(chain)?;
        let value = |at: usize| rows.first().and_then(|row| row.get(at)).and_then(Option::as_deref);
        let replayed = value(0).and_then(Lsn::read).ok_or("it says no position")?;
        let waits = value(2) == Some("true");
        if value(1) == Some("true") || (waits && waited_at == Some(replayed)) {
            return Ok(replayed);
        }
        waited_at = waits.then_some(replayed);
        if Instant::now() > deadline {
            return Err(format!("what it has received is not replayed after {SALVAGE_MAX:?}"));
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn set_restore_command(new: &mut Admin, command: &str) -> Result<(), String> {
    let literal = command.replace('\'', "''");
    let set = format!("ALTER SYSTEM SET restore_command = '{literal}'");
    new.rows(&set).await.map_err(chain).map(drop)
}

/// Puts the `restore_command` of before back, if there is one of ours.
pub(super) async fn end_salvage(new: &mut Admin) -> Result<(), String> {
    let now = new.value("SHOW restore_command").await.map_err(chain)?.unwrap_or_default();
    let Some(now) = now.strip_suffix(MARK) else { return Ok(()) };
    match now.split_once(" || ") {
        Some((_, before)) => set_restore_command(new, before.trim()).await?,
        None => drop(new.rows("ALTER SYSTEM RESET restore_command").await.map_err(chain)?),
    }
    reload(new).await
}

/// What a lost server has around a position, of which some records before it are read as well: where none can be, the
/// position is of another history, or beyond the end.
pub(super) async fn tail_around(
    lost: &Member,
    timeline: u64,
    position: Lsn,
) -> Result<WalTail, String> {
    const BEFORE: u64 = 64 * 1024;
    // No segment is smaller; the one before may be gone.
    const SEGMENT_MIN: u64 = 1024 * 1024;
    let far = position.0.saturating_sub(BEFORE);
    let near = far.max(position.0 / SEGMENT_MIN * SEGMENT_MIN);
    // The segment before may end with nothing, where somebody has switched to the next.
    let before = position.is_at_begin_of_segment().then(|| position.before_segment());
    let mut tail = lost.read_tail(timeline, Lsn(near)).await;
    for from in [Some(Lsn(far)), before].into_iter().flatten() {
        if tail.as_ref().is_ok_and(|tail| tail.last.is_some()) {
            break;
        }
        tail = lost.read_tail(timeline, from).await;
    }
    tail
}
