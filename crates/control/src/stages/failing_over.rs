//! Another server takes the place of one that is lost.
//!
//! The lost one is proven dead before anybody gets its grant: its processes are ended where Holdfast may do that, or a
//! person has said so. What only its disk has is read from there, if the disk can be read: then nothing is lost at all.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use model::Lsn;
use model::barrier::Order;
use model::cell::CellState;
use model::durability::Protection;
use model::failover::{Answer, Candidate, Known, LossPolicy, Process, check_chosen, most_advanced};
use model::lost::Tail;
use model::persisted::{Execution, LostTail, Pleads};
use model::region::Region;
use model::switchover::Kind;
use pg::ConnectError;
use pg::admin::Admin;
use tokio::time::timeout;
use wire::sqlstate::SqlState;

use super::salvage::{Salvage, Way, can_salvage, end_salvage, tail_around};
use super::{Done, admin, admin_at_once, chain, release, reported};
use crate::config::{AppServers, CellServer};
use crate::control::Control;
use crate::following;
use crate::member::Member;
use crate::records;

/// A server that answers does so at once.
const PROBE_MAX: Duration = Duration::from_secs(1);

/// Asks a server what it is.
pub(crate) async fn probe(server: &CellServer) -> (Answer, Option<Admin>) {
    let ask = async {
        let mut admin = match Admin::connect(&server.target, &server.admin).await {
            Ok(admin) => admin,
            Err(ConnectError::Refused { sqlstate: SqlState::CANNOT_CONNECT_NOW, .. }) => {
                return (Answer::NotReady, None);
            }
            Err(ConnectError::Refused { .. }) => return (Answer::Refuses, None),
            Err(_) => return (Answer::Nothing, None),
        };
        match admin.value("SELECT pg_is_in_recovery()").await {
            Ok(Some(in_recovery)) if in_recovery == "t" => (Answer::Standby, Some(admin)),
            Ok(Some(_)) => (Answer::Primary, Some(admin)),
            _ => (Answer::Nothing, None),
        }
    };
    timeout(PROBE_MAX, ask).await.unwrap_or((Answer::Nothing, None))
}

/// It answers as a primary.
pub(crate) async fn is_primary(server: &CellServer) -> bool {
    matches!(probe(server).await, (Answer::Primary, _))
}

/// What became of a server's process, where Holdfast can see that.
pub(crate) async fn process_of(server: &CellServer) -> Option<Process> {
    server.member.as_ref()?.process().await
}

/// Which system the servers of an application are of, by the files of one.
async fn system_of(server: &CellServer) -> Option<String> {
    server.member.as_ref()?.look().await.ok()?.system_identifier
}

/// The standbys that answer, but for that of `from`, whose place is to be taken.
pub(crate) async fn candidates(servers: &AppServers, from: &str) -> Vec<Candidate> {
    let mut found = Vec::new();
    let system = match servers.cells.get(from) {
        Some(server) => system_of(server).await,
        None => None,
    };
    for (cell, server) in servers.cells.iter().filter(|(cell, _)| *cell != from) {
        let (Answer::Standby, Some(mut admin)) = probe(server).await else { continue };
        // One that freezes now is none.
        admin.wait = super::HELD_WAIT;
        let status = admin.status().await;
        if system.is_some() && status.ok().map(|status| status.system_identifier) != system {
            tracing::warn!(cell, ?system, "its server is of another system");
            continue;
        }
        if let Ok(Position { timeline, received, is_sure }) = position(&mut admin).await {
            found.push(Candidate { cell: cell.clone(), timeline, received, is_sure });
        }
    }
    found
}

/// What a standby has.
pub(crate) struct Position {
    pub(crate) timeline: u64,
    pub(crate) received: Lsn,
    is_sure: bool,
}

/// What a standby has. Until it has asked for more since its start, which it does at the end of its own log, it may have
/// more than it says (`pg_last_wal_receive_lsn` is null; `WaitForWALToBecomeAvailable`).
pub(crate) async fn position(admin: &mut Admin) -> Result<Position, String> {
    let question = "SELECT GREATEST(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()), \
        GREATEST((SELECT received_tli FROM pg_stat_wal_receiver), timeline_id, \
        (SELECT ('x' || max(left(name, 8)))::bit(32)::int FROM pg_ls_waldir() WHERE name ~ '^[0-9A-F]{24}$')), \
        pg_last_wal_receive_lsn() IS NOT NULL FROM pg_control_checkpoint()";
    let rows = admin.rows(question).await.map_err(chain)?;
    let cell = |at: usize| rows.first().and_then(|row| row.get(at)).and_then(Option::as_deref);
    let received = cell(0).and_then(Lsn::read).ok_or("it says no position")?;
    let timeline = cell(1).and_then(|text| text.parse().ok()).unwrap_or(0);
    Ok(Position { timeline, received, is_sure: cell(2) == Some("t") })
}

/// The standby that is to take the place, if nobody has said which: of those that could at all, and are `within` a region if
/// one was named. Of several that have as much, it is the nearest.
pub(crate) async fn choose(
    control: &Control,
    servers: &AppServers,
    (app, from): (&str, &str),
    within: Option<&Region>,
) -> Result<String, String> {
    let pleads = records::pleads(&*control.store, app, from).map_err(chain)?;
    let mut all = candidates(servers, from).await;
    all.retain(|one| within.is_none_or(|region| servers.is_within(&one.cell, region)));
    all.sort_by_key(|one| std::cmp::Reverse(servers.shared(&one.cell, from)));
    for one in &all {
        // Control may have begun a moment ago.
        if let Some(member) = servers.cells.get(&one.cell).and_then(|one| one.member.as_ref()) {
            let _ = member.must_be_heard().await;
        }
    }
    let mut why = None;
    let application = control.application(app).map_err(chain)?;
    all.retain(|one| {
        let state = application.cells.get(&one.cell);
        if state != Some(&CellState::Passive) {
            let state = state.map_or("unknown", |state| state.name());
            why.get_or_insert_with(|| format!("cell `{}` is {state}, and was to follow", one.cell));
            return false;
        }
        let member = servers.cells.get(&one.cell).and_then(|server| server.member.as_ref());
        let may = may_be_promoted(&one.cell, member)
            .and_then(|()| ends_pledges(&pleads, &one.cell, member, from));
        why = why.take().or(may.as_ref().err().cloned());
        may.is_ok()
    });
    let chosen = most_advanced(&all).map(|one| one.cell.clone());
    chosen.ok_or_else(|| {
        why.unwrap_or_else(|| match within {
            Some(region) => format!("no standby in `{region}` answers"),
            None => "no standby answers".into(),
        })
    })
}

/// Whoever is beside the server is there to hold the lease that a primary needs.
fn may_be_promoted(cell: &str, member: Option<&Member>) -> Result<(), String> {
    match member {
        Some(member) if !member.is_heard() => Err(format!(
            "the agent of `{cell}` is not heard, which would have to hold its lease: start it"
        )),
        Some(member) if member.is_out_of_hand() => Err(format!(
            "the agent of `{cell}` cannot see or end its server, and would get no lease: its log says why"
        )),
        _ => Ok(()),
    }
}

/// That the agent of `cell` pledges no more is enough: the lease of the lost cell does not go on.
fn ends_pledges(
    pleads: &Pleads,
    cell: &str,
    member: Option<&Member>,
    lost: &str,
) -> Result<(), String> {
    match pleads.all_need(cell, member.and_then(Member::directory)) {
        true => Ok(()),
        false => Err(format!(
            "the lease of `{lost}` may go on by pledges of which the agent of `{cell}` knows nothing: it is another than that of which `{lost}` was told"
        )),
    }
}

fn loss_policy(execution: &Execution, servers: &AppServers) -> LossPolicy {
    LossPolicy { allowed: execution.allow_data_loss, max: servers.now().failover.loss_max }
}

fn or_allow(execution: &Execution, reason: &str) -> String {
    let Execution { app, to, .. } = execution;
    format!(
        "{reason}; `holdfast failover {app} --to {to} --allow-data-loss` gives up what it lacks"
    )
}

pub(super) async fn assess(
    control: &Control,
    execution: &Execution,
    servers: &AppServers,
    (from, to): (&CellServer, &CellServer),
) -> Done {
    let Execution { app, from: from_name, to: to_name, .. } = execution;
    let process = process_of(from).await;
    let (answer, _) = probe(from).await;
    match answer {
        Answer::Primary => {
            return Err(format!(
                "the server of `{from_name}` answers as a primary; `holdfast switchover {app} --to {to_name}` loses nothing"
            ));
        }
        Answer::Standby => {
            return Err(format!(
                "the server of `{from_name}` is a standby, of which nothing is lost"
            ));
        }
        Answer::Refuses => {
            return Err(format!(
                "the server of `{from_name}` lives, and refuses the login of `{}`",
                from.admin.user
            ));
        }
        Answer::NotReady | Answer::Nothing => (),
    }
    if from.member.is_none() && !execution.allow_data_loss {
        return Err(format!(
            "nobody can say that the server of `{from_name}` is dead, as it has no data_dir; if you know it, `holdfast failover {app} --to {to_name} --allow-data-loss` says so"
        ));
    }
    if from.member.as_ref().is_some_and(Member::is_out_of_hand) && !execution.allow_data_loss {
        return Err(format!(
            "the agent of `{from_name}` cannot see or end its server; if you know that it is dead, `holdfast failover {app} --to {to_name} --allow-data-loss` says so"
        ));
    }
    // Nobody can say that this does not matter: after the grant there is no way back.
    if let Some(member) = &to.member {
        member.must_be_heard().await?;
        may_be_promoted(to_name, Some(member))?;
    }
    let all = candidates(servers, from_name).await;
    let chosen = check_chosen(&electable(control, execution, &all)?, to_name)
        .map_err(|why| format!("`{to_name}` cannot take its place: {why}"))?;
    let last_seen = control.last_seen(app);
    // What can be read from its disk is looked at once it has been. Where its host lives, its agent starts it again in place of
    // that, unless somebody asks, or what may be lost is little enough.
    let is_looked_at = match can_salvage(from, to).map(|salvage| salvage.way) {
        Some(Way::Disk(_)) => true,
        Some(Way::Handed(_)) => !execution.is_automatic,
        None => false,
    };
    if !is_looked_at {
        check_history(control, execution, from, &chosen).await?;
        let known = match covers(control, app, &all)? {
            Some(_) => Known::All,
            None => Known::of(last_seen, chosen.received),
        };
        loss_policy(execution, servers)
            .permits(known)
            .map_err(|why| or_allow(execution, &format!("`{to_name}`: {why}")))?;
    }
    let process = match process {
        Some(Process::Lives) => "its process lives",
        Some(Process::Crashed) => "its process is gone",
        Some(Process::ShutDown) => "it was shut down",
        None => "of its process nothing is known",
    };
    let seen = last_seen.map_or("nowhere".to_owned(), |lsn| lsn.to_string());
    let Candidate { received, timeline, .. } = chosen;
    Ok(format!(
        "`{from_name}` does not answer, {process}; seen last at {seen}; `{to_name}` has {received} of timeline {timeline}"
    ))
}

/// What the lost server was seen to have, and the standby has not.
fn beyond(control: &Control, app: &str, received: Lsn) -> String {
    match control.last_seen(app) {
        Some(seen) if seen > received => format!(
            "; the lost server was seen at {seen}: a commit behind {received} was acknowledged only if its wait was cancelled"
        ),
        _ => String::new(),
    }
}

/// Whether the furthest of these has every commit that was acknowledged, in words.
fn covers(control: &Control, app: &str, all: &[Candidate]) -> Result<Option<String>, String> {
    let application = control.application(app).map_err(chain)?;
    let protection = application.protected.filter(|_| !control.is_older(app));
    let Some(protection) = protection else { return Ok(None) };
    let sure: Vec<&Candidate> = all.iter().filter(|one| one.is_sure).collect();
    let is_covered = protection.is_covered_by(sure.iter().map(|one| one.cell.as_str()));
    let Protection { acks, standbys } = &protection;
    let (known, of) = (sure.len(), standbys.len());
    Ok(is_covered
        .then(|| format!("a commit had to be on {acks} of {of} standbys, and {known} are known")))
}

/// Those of which one may be chosen. Somebody who gives up what others have may choose beside one that nobody can.
fn electable(
    control: &Control,
    execution: &Execution,
    all: &[Candidate],
) -> Result<Vec<Candidate>, String> {
    let application = control.application(&execution.app).map_err(chain)?;
    let is_passive = |one: &&Candidate| {
        application
            .cells
            .get(&one.cell)
            .is_some_and(|state| matches!(state, CellState::Passive | CellState::Promoting))
    };
    let passive = || all.iter().filter(is_passive).cloned().collect();
    Ok(if execution.allow_data_loss { passive() } else { all.to_vec() })
}

/// A standby that was a primary meanwhile, or has not followed, has another history.
async fn check_history(
    control: &Control,
    execution: &Execution,
    from: &CellServer,
    chosen: &Candidate,
) -> Result<(), String> {
    let lost = match &from.member {
        Some(member) => member.look().await.ok().and_then(|condition| condition.timeline),
        None => None,
    };
    // What it was seen to write, where nothing of it can be read.
    let seen = control.application(&execution.app).map_err(chain)?.timeline;
    let lost = lost.or(Some(seen).filter(|seen| *seen > 0));
    match lost.filter(|timeline| *timeline != chosen.timeline && !execution.allow_data_loss) {
        Some(lost) => Err(or_allow(
            execution,
            &format!(
                "`{}` is on timeline {}, and the lost server was on {lost}",
                chosen.cell, chosen.timeline
            ),
        )),
        None => Ok(()),
    }
}

pub(super) async fn cut(control: &Control, execution: &Execution) -> Done {
    let report = reported(control.order(Order::Cut { app: execution.app.clone() }).await)?;
    control.note_late(&execution.app);
    let (sessions, told) = (report.sessions, report.told);
    let mut text = format!("{} of {sessions} sessions go on without it, {told} ended", report.done);
    if !report.missing.is_empty() {
        text.push_str(&format!("; {}", report.missing.join(", ")));
    }
    Ok(text)
}

/// No lease of the lost cell goes on by pledges any more. Gives since when none does, if any could.
async fn pledges_over(
    control: &Control,
    execution: &Execution,
    to: &CellServer,
) -> Result<Option<Duration>, String> {
    let Execution { app, from: lost, to: next, .. } = execution;
    let pleads = records::pleads(&*control.store, app, lost).map_err(chain)?;
    if pleads.0.is_empty() {
        return Ok(None);
    }
    let member = to.member.as_ref();
    ends_pledges(&pleads, next, member, lost).map_err(|why| {
        format!(
            "{why}; if you know that the server of `{lost}` is dead, `holdfast failover {app} --to {next} --allow-data-loss` says so"
        )
    })?;
    match member {
        Some(member) => member.end_pledges().await.map(Some),
        None => Ok(None),
    }
}

pub(super) async fn isolate(
    control: &Control,
    execution: &Execution,
    (from, to): (&CellServer, &CellServer),
) -> Done {
    let Some(member) = &from.member else {
        return Ok(format!("somebody has said that the server of `{}` is dead", execution.from));
    };
    let is_attended = control.is_attended(&execution.app, &execution.from);
    let overruled = Mutex::new(None);
    let end_pledges = async {
        match pledges_over(control, execution, to).await {
            // Whoever says so has seen to it.
            Err(why) if execution.allow_data_loss => {
                *overruled.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
                Ok(())
            }
            over => over.map(drop),
        }
    };
    let isolated = member.isolate(is_attended, end_pledges).await;
    let overruled = overruled.into_inner().unwrap_or_else(PoisonError::into_inner);
    match (isolated, overruled) {
        (Ok(_), Some(why)) => Ok(format!("{why}; somebody has said that it is dead")),
        (Err(why), _) if (!is_attended || member.is_out_of_hand()) && execution.allow_data_loss => {
            Ok(format!("{why}; somebody has said that it is dead"))
        }
        (isolated, _) => isolated,
    }
}

pub(super) async fn recruit(
    control: &Control,
    execution: &mut Execution,
    servers: &AppServers,
    (from, to): (&CellServer, &CellServer),
) -> Done {
    let mut new = admin_at_once(to).await?;
    let Position { received, .. } = position(&mut new).await?;
    let mut salvage = can_salvage(from, to);
    if matches!(salvage, Some(Salvage { way: Way::Handed(_), .. })) {
        // It takes a while, and need not be where others prove that nothing is lacking.
        let all = candidates(servers, &execution.from).await;
        salvage = salvage.filter(|_| !matches!(covers(control, &execution.app, &all), Ok(Some(_))));
    }
    let salvaged = match salvage {
        Some(salvage) => {
            let salvaged = salvage.run(control, &execution.app, (&mut new, received)).await;
            // On a connection of its own: that one may have still to answer.
            let ended = match admin_at_once(to).await {
                Ok(mut fresh) => end_salvage(&mut fresh).await,
                Err(error) => Err(error),
            };
            if let Err(error) = ended {
                // It would be used again whenever that server is a standby.
                return Err(format!(
                    "`restore_command` of `{}` cannot be put back: {error}",
                    execution.to
                ));
            }
            if let Way::Handed(member) = salvage.way
                && let Err(error) = member.unstage().await
            {
                tracing::warn!(error, "what was handed over is not removed");
            }
            salvaged
        }
        None => Err("its disk cannot be read from here".into()),
    };
    // Another may have received more since it was assessed.
    let deadline = Instant::now() + RENAMED_MAX;
    let (all, chosen) = loop {
        let all = candidates(servers, &execution.from).await;
        let checked = match check_chosen(&electable(control, execution, &all)?, &execution.to) {
            Ok(chosen) => check_history(control, execution, from, &chosen).await.map(|()| chosen),
            Err(why) => Err(why),
        };
        match checked {
            Ok(chosen) => break (all, chosen),
            Err(why) if salvaged.is_err() || Instant::now() > deadline => return Err(why),
            Err(_) => tokio::time::sleep(RENAMED_PAUSE).await,
        }
    };
    let (known, how) = match (salvaged, covers(control, &execution.app, &all)?) {
        (Ok(how), _) => (Known::All, how),
        (Err(_), Some(how)) => (Known::All, how + &beyond(control, &execution.app, received)),
        (Err(why), None) => {
            // What it wrote by pledges, while control was not there, nobody has seen.
            let over = pledges_over(control, execution, to).await.unwrap_or(Some(Duration::ZERO));
            let seen = control.last_seen_since(&execution.app, over);
            (Known::of(seen, received), why)
        }
    };
    loss_policy(execution, servers)
        .permits(known)
        .map_err(|why| or_allow(execution, &format!("`{}`: {why} ({how})", execution.to)))?;
    execution.lsn = Some(chosen.received);
    Ok(match known {
        Known::All => format!("`{}` has all up to {}: {how}", execution.to, chosen.received),
        Known::Lacks(bytes) => format!("`{}` lacks at least {bytes} bytes: {how}", execution.to),
        Known::Perhaps | Known::Nothing => {
            format!("`{}` may lack the last commits: {how}", execution.to)
        }
    })
}

/// A file that was restored takes the name of the one before it, which is removed first (`KeepFileRestoredFromArchive`):
/// for as long as that takes, the newest file of a log is not there.
const RENAMED_MAX: Duration = Duration::from_secs(2);
const RENAMED_PAUSE: Duration = Duration::from_millis(50);

/// Why a server may not be the newest.
pub(crate) struct Doubt {
    pub(crate) why: String,
    /// Its log was read, and is shorter than what was seen.
    is_proven: bool,
}

/// What a server that has ended has on its disk is as much as was seen of it, and as others have: not that of a machine
/// that was made from an older copy.
pub(crate) async fn check_is_newest(
    control: &Control,
    servers: &AppServers,
    (app, cell): (&str, &str),
    member: &Member,
) -> Result<(), Doubt> {
    let doubt = |why: String| Doubt { why, is_proven: false };
    let condition = member.look().await.map_err(doubt)?;
    let timeline = condition.timeline;
    let timeline = timeline.ok_or_else(|| doubt("of its log nothing can be read".into()))?;
    let others = candidates(servers, cell).await;
    if let Some(other) = others.iter().find(|other| other.timeline > timeline) {
        let Candidate { cell: other, timeline: theirs, .. } = other;
        return Err(doubt(format!("it is on timeline {timeline}, and `{other}` on {theirs}")));
    }
    let same = others.iter().filter(|other| other.timeline == timeline);
    let seen = same.map(|other| other.received).chain(control.last_seen(app)).max();
    let Some(seen) = seen.filter(|_| condition.reads_wal) else { return Ok(()) };
    let (ends, is_proven) = match tail_around(member, timeline, seen).await {
        Ok(tail) if tail.reaches(seen) => return Ok(()),
        Ok(tail) => match tail.end.max(tail.last) {
            Some(end) => (format!("ends at {end}"), true),
            None => ("ends before".to_owned(), false),
        },
        Err(error) => (format!("cannot be read there ({error})"), false),
    };
    let why = format!(
        "{seen} was seen, and its log {ends}: it may be an older copy; start it by hand, without `standby.signal`, if it is what you want"
    );
    Err(Doubt { why, is_proven })
}

/// The lost server takes up its work again, if it can; whoever waits for it goes on waiting.
pub(super) async fn revert(
    control: &Control,
    execution: &Execution,
    (from, to): (&CellServer, &CellServer),
) -> Done {
    // What it was to lose may be lost there already, by its disk.
    let started = match &from.member {
        Some(member) => {
            let servers = control.servers(&execution.app).map_err(chain)?;
            let at = (&*execution.app, &*execution.from);
            match check_is_newest(control, servers, at, member).await {
                Err(Doubt { why, is_proven: true }) => Err(why),
                _ => member.start_again(execution.epoch).await,
            }
        }
        None => Ok(()),
    };
    if let Ok(mut new) = admin_at_once(to).await
        && let Err(error) = end_salvage(&mut new).await
    {
        tracing::warn!(error, "`restore_command` cannot be put back");
    }
    if let Some(Salvage { way: Way::Handed(member), .. }) = can_salvage(from, to) {
        let _ = member.unstage().await;
    }
    if super::is_fenced(control, execution)? {
        // A switchover that was cut off may have left it uncovered. One that does not run is covered once it does.
        let covered = match &started {
            Ok(()) => super::fencing::cover(control, execution, from).await,
            Err(_) => Ok(()),
        };
        let released = release(control, execution, &execution.from, CellState::Fenced).await?;
        started.and(covered)?;
        return Ok(released);
    }
    let released = release(control, execution, &execution.from, CellState::Active).await?;
    // Clients wait for it as before, and what to do next is in the reason.
    Ok(match started {
        Ok(()) => released,
        Err(why) => format!("{released}; the lost server does not start: {why}"),
    })
}

fn kept_name(execution: &Execution) -> String {
    format!("{}-{}", execution.app, execution.id)
}

/// What of the lost server is kept, row by row as soon as it can be read, which is before it is rewound.
pub(super) fn tail_of(execution: &Execution) -> Option<Tail> {
    let lost = execution.lost.as_ref().filter(|lost| !lost.kept_in.is_empty())?;
    Some(Tail { timeline: lost.timeline?, from: lost.from, name: kept_name(execution) })
}

/// Looks at what only the lost server had, before that is gone, and keeps it for people.
pub(super) async fn keep_tail(
    control: &Control,
    execution: &mut Execution,
    (from, to): (&CellServer, &CellServer),
) -> Result<String, String> {
    let unknown = || "what the lost server alone had is not known".to_owned();
    let lost = from.member.as_ref().ok_or_else(unknown)?;
    // Before the other is ended, which may be all that is left if this one is gone.
    let mut new = admin(to).await?;
    let history = following::history(&mut new).await?;
    // Whatever somebody has started writes to it no more.
    lost.end().await?;
    let condition = lost.look().await?;
    let timeline = condition.timeline.filter(|_| condition.reads_wal).ok_or_else(unknown)?;
    let nothing = || "the lost server had nothing that is not here".to_owned();
    // Of the same number it may be another, of two servers that were promoted apart.
    let Some(fork) = history.left(timeline) else {
        let now = history.timeline;
        if timeline == now && execution.kind == Kind::Rejoin {
            return Err("it was on the same timeline, and nobody can compare what it had".into());
        }
        return Err(format!("it was on timeline {timeline}, which {now} has not left"));
    };
    let around = tail_around(lost, timeline, fork).await?;
    let last = around.last.ok_or("nothing of its log can be read there")?;
    // What was found on it must be found again.
    let strayed = execution.lsn.filter(|_| execution.kind == Kind::Rejoin);
    if strayed.is_some_and(|at| around.end.max(Some(last)) < Some(at) && last < fork) {
        return Err(format!("it had {}, and its log ends before", strayed.unwrap_or_default()));
    }
    if last < fork {
        execution.lost = Some(LostTail { from: fork, to: fork, ..LostTail::default() });
        return Ok(nothing());
    }
    let tail = lost.read_tail(timeline, fork).await?;
    let last = tail.last.ok_or("nothing of its log can be read there")?;
    let kept_in = lost.keep_tail(Tail { timeline, from: fork, name: kept_name(execution) }).await?;
    let text = format!(
        "{} commits, {} bytes from {fork} to {last}, were only on the lost server; kept in {kept_in}",
        tail.commits,
        last.bytes_since(fork)
    );
    let (transactions, timeline) = (tail.commits, Some(timeline));
    execution.lost =
        Some(LostTail { from: fork, to: last, transactions, kept_in, timeline, rows: None });
    control.save(execution).map_err(chain)?;
    Ok(text)
}

/// Has a standby that is promoted now write a timeline that no other has written, though it has heard nothing of some: it takes
/// the first number of which it finds no history (`findNewestTimeLine`). What is put there names no timeline that it came from, so
/// that nothing is recovered along it.
pub(crate) async fn pass_over_timelines(standby: &mut Admin, highest: u64) -> Result<(), String> {
    /// As many failovers without a standby that follows there will not be.
    const PASSED_MAX: u64 = 100;
    let Position { timeline, .. } = position(standby).await?;
    let passed = (timeline + 1)..=highest;
    if highest.saturating_sub(timeline) > PASSED_MAX {
        return Err(format!("it is on timeline {timeline}, and {highest} was written"));
    }
    for timeline in passed {
        let file = format!("pg_wal/{timeline:08X}.history");
        let sql = format!(
            "SELECT current_setting('data_directory'), \
            ((pg_stat_file('{file}', true)).size IS NOT NULL)::text"
        );
        let rows = standby.rows(&sql).await.map_err(chain)?;
        let value = |at: usize| rows.first().and_then(|row| row.get(at)).and_then(Option::as_deref);
        if value(1) == Some("true") {
            continue;
        }
        let path = format!("{}/{file}", value(0).ok_or("it says no data directory")?);
        let sql = format!(
            "COPY (SELECT '# written by a server that was lost') TO '{}'",
            path.replace('\'', "''")
        );
        standby.rows(&sql).await.map_err(chain)?;
        tracing::warn!(timeline, "a timeline is passed over, as a lost server has written it");
    }
    Ok(())
}

/// What would be done, for `--dry-run`.
pub(crate) fn describe(servers: &AppServers, execution: &Execution) -> Vec<String> {
    let Execution { from, to, .. } = execution;
    let cell = |name: &str| servers.cells.get(name);
    let salvages = cell(from).zip(cell(to)).is_some_and(|(a, b)| can_salvage(a, b).is_some());
    let managed = cell(from).is_some_and(|server| server.member.is_some());
    let mut steps = BTreeMap::new();
    let mut step = |text: String| drop(steps.insert(steps.len(), text));
    step(format!(
        "cut: sessions are taken from `{from}`; those with state there are told, the others wait"
    ));
    step(match managed {
        true => format!("isolate: every process of `{from}` is ended"),
        false => format!("isolate: `{from}` has no data_dir, so its death is yours to vouch for"),
    });
    step(match salvages {
        true => format!("recruit: `{to}` reads from the disk of `{from}` what it lacks"),
        false => format!("recruit: `{to}` must have what may not be lost"),
    });
    step(format!("grant: `{to}` is given the next epoch; the point of no return"));
    step(format!("promote: `{to}` becomes a primary"));
    step("release: sessions go on".into());
    step(match managed {
        true => format!(
            "rejoin: what only `{from}` has is kept aside, then it becomes a standby of `{to}`"
        ),
        false => format!("rejoin: `{from}` stays as it is for you to rejoin"),
    });
    steps.into_values().collect()
}
