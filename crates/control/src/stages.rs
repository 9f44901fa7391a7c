//! What each stage does to real servers. Every stage can be done again: after a crash it is.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use model::Lsn;
use model::barrier::{Blocker, Order, Report};
use model::cell::CellState;
use model::persisted::Execution;
use model::session::facts::{self, Facts};
use model::switchover::{Kind, OnTimeout, Stage};
use pg::admin::Admin;
use pg::instance::Instance;
use tokio::time::timeout;

use crate::config::{AppServers, CellServer};
use crate::hba;
use crate::runner::{Control, SwitchoverRequest};

/// A standby further behind is refused before anybody is held.
const LAG_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// How long the target may take to have all, once nobody writes.
const CATCH_UP_MAX: Duration = Duration::from_secs(10);
const PROMOTE_MAX: Duration = Duration::from_secs(30);
/// Longest wait for one answer while clients are held.
const HELD_WAIT: Duration = Duration::from_secs(5);
/// Between two tries of what must be done.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// How long taking the fence back is tried. Then clients go on all the same.
const UNFENCE_MAX: Duration = Duration::from_secs(10);
/// Between looks at a server during the pause (`pg_promote(true)` itself would look every 100 ms).
const POLL: Duration = Duration::from_millis(2);
/// How long ended backends may take to go.
const TERMINATE_MAX: Duration = Duration::from_secs(5);
const STOP_MAX: Duration = Duration::from_secs(60);
const START_MAX: Duration = Duration::from_secs(120);
const STREAM_MAX: Duration = Duration::from_secs(60);

/// Done with a line for the log, or failed with a reason.
type Done = Result<String, String>;

pub(crate) async fn run(control: &Control, execution: &mut Execution, stage: Stage) -> Done {
    let servers = control.servers(&execution.app).map_err(chain)?;
    let server = |name: &str| {
        servers.cells.get(name).ok_or_else(|| format!("cell `{name}` is not configured"))
    };
    let (from, to) = (server(&execution.from)?, server(&execution.to)?);
    match stage {
        Stage::Prepare => prepare(control, execution, servers).await,
        Stage::Hold => hold(control, execution).await,
        Stage::Fence if execution.kind == Kind::Fence => {
            fence(control, execution, from, Logins::OfProxy).await
        }
        Stage::Fence => fence(control, execution, from, Logins::Closed).await,
        Stage::Capture => capture(control, execution).await,
        Stage::CatchUp => catch_up(execution, to).await,
        // The grant is the transaction that records the begin of this stage; if it is written, it is given.
        Stage::Grant => Ok(format!("epoch {} is `{}`'s", execution.epoch.next(), execution.to)),
        Stage::Promote => promote(control, execution, to).await,
        Stage::Attach => attach(control, execution).await,
        Stage::Release => {
            let state = match execution.kind {
                Kind::Switchover | Kind::Unfence => CellState::Active,
                Kind::Fence => CellState::Fenced,
                Kind::FenceAll => CellState::Passive,
            };
            release(control, execution, &execution.to, state).await
        }
        Stage::Rejoin => {
            let retire = Order::Retire { app: execution.app.clone() };
            reported(control.order(retire).await)?;
            rejoin(from, to).await
        }
        Stage::Revert => revert(control, execution, from).await,
        // The record of its begin has made the cell what it is now.
        Stage::Confine => {
            Ok(format!("`{}` takes no writes, in epoch {}", execution.from, execution.epoch))
        }
        Stage::Regrant => regrant(control, execution, to).await,
    }
}

fn chain(error: impl std::error::Error) -> String {
    model::chain(&error)
}

async fn admin(server: &CellServer) -> Result<Admin, String> {
    Admin::connect(&server.target, &server.admin).await.map_err(chain)
}

/// For questions while clients are held, which a server answers at once.
async fn admin_at_once(server: &CellServer) -> Result<Admin, String> {
    let login = Admin::connect(&server.target, &server.admin);
    let late = |_| format!("`{}` takes no login within {HELD_WAIT:?}", server.target.address);
    let mut admin = timeout(HELD_WAIT, login).await.map_err(late)?.map_err(chain)?;
    admin.wait = HELD_WAIT;
    Ok(admin)
}

/// Whether what must be done, and may be done twice, is tried once more after a pause: there is no way back from here.
async fn again(deadline: Instant, failure: &str) -> bool {
    let goes_on = Instant::now() + RETRY_PAUSE < deadline;
    if goes_on {
        tracing::warn!(failure, "trying again");
        tokio::time::sleep(RETRY_PAUSE).await;
    }
    goes_on
}

/// What would be done, for `--dry-run`.
pub(crate) fn describe(
    servers: &AppServers,
    from: &str,
    request: &SwitchoverRequest,
) -> Vec<String> {
    let to = &request.to;
    let address = |cell: &str| {
        servers.cells.get(cell).map(|server| server.target.address.to_string()).unwrap_or_default()
    };
    let (from_at, to_at) = (address(from), address(to));
    let leftover = match request.on_timeout {
        OnTimeout::Abort => "give up if one is left",
        OnTimeout::Force => "end those that are left with an error",
    };
    let managed = servers.cells.get(from).is_some_and(|server| server.instance.is_some());
    vec![
        format!(
            "prepare: check {from_at} and {to_at}, checkpoint both, attach a copy of every session to {to_at}"
        ),
        format!(
            "hold: hold new work, let transactions end for {} ms, {leftover}",
            request.deadline_ms
        ),
        "capture: read the state of every session".into(),
        format!(
            "fence: {from_at} becomes read-only, admits only Holdfast, and ends other connections"
        ),
        format!("catch_up: wait until {to_at} has all that {from_at} wrote"),
        format!("grant: `{to}` is given the next epoch; the point of no return"),
        format!("promote: {to_at} becomes a primary"),
        format!("attach: every session is attached to {to_at} and compared"),
        "release: held work goes on".into(),
        if managed {
            format!(
                "rejoin: {from_at} is stopped, rewound if need be, and started as a standby of {to_at}"
            )
        } else {
            format!(
                "rejoin: {from_at} has no data_dir in the configuration, so it stays fenced for you to rejoin"
            )
        },
    ]
}

/// Both servers must be what the state says they are, of one system, and close together.
pub(crate) async fn check_servers(
    servers: &AppServers,
    from: &str,
    to: &str,
) -> Result<(Admin, Admin, u64), String> {
    let server = |name: &str| {
        servers.cells.get(name).ok_or_else(|| format!("cell `{name}` is not configured"))
    };
    let (mut old, mut new) = (admin(server(from)?).await?, admin(server(to)?).await?);
    let (a, b) = (old.status().await.map_err(chain)?, new.status().await.map_err(chain)?);
    if a.in_recovery {
        return Err(format!("cell `{from}` is active by its state, but its server is in recovery"));
    }
    if !b.in_recovery {
        return Err(format!("cell `{to}` is passive by its state, but its server is a primary"));
    }
    if a.system_identifier != b.system_identifier {
        let (a, b) = (a.system_identifier, b.system_identifier);
        return Err(format!(
            "`{to}` is not a copy of `{from}`: system identifiers are {b} and {a}"
        ));
    }
    if !b.streaming {
        return Err(format!("`{to}` does not stream from `{from}`"));
    }
    if server(from)?.instance.is_some() {
        hba_rules(&mut old).await.map_err(|error| format!("`{from}` cannot be fenced: {error}"))?;
    }
    let lag = a.lsn.bytes_since(b.lsn);
    if lag > LAG_BYTES_MAX {
        return Err(format!(
            "`{to}` is {lag} bytes behind `{from}`, at most {LAG_BYTES_MAX} are waited for"
        ));
    }
    Ok((old, new, lag))
}

/// Settings that sessions find otherwise on the two servers, because their own files say so.
pub(crate) async fn differences(old: &mut Admin, new: &mut Admin) -> Result<Vec<String>, String> {
    let [question, ..] = facts::QUESTIONS;
    let here = Facts::of_settings(&old.rows(question).await.map_err(chain)?).map_err(chain)?;
    let there = Facts::of_settings(&new.rows(question).await.map_err(chain)?).map_err(chain)?;
    Ok(here.configured_otherwise(&there))
}

fn describe_blockers(blockers: &[Blocker]) -> String {
    const SHOWN: usize = 3;
    let one = |blocker: &Blocker| {
        let reasons: Vec<String> = blocker.reasons.iter().map(ToString::to_string).collect();
        format!("session {} ({}): {}", blocker.session.id, blocker.session.user, reasons.join("; "))
    };
    let mut text = blockers.iter().take(SHOWN).map(one).collect::<Vec<_>>().join(", ");
    if blockers.len() > SHOWN {
        text.push_str(&format!(", and {} more", blockers.len() - SHOWN));
    }
    text
}

fn reported(report: Report) -> Result<Report, String> {
    match report.error.clone() {
        Some(error) => Err(error),
        None => Ok(report),
    }
}

async fn prepare(control: &Control, execution: &Execution, servers: &AppServers) -> Done {
    let (mut old, mut new, lag) = check_servers(servers, &execution.from, &execution.to).await?;
    let otherwise = differences(&mut old, &mut new).await?;
    // What is written out now need not be during the pause, nor when the old server is rewound.
    old.rows("CHECKPOINT").await.map_err(chain)?;
    new.rows("CHECKPOINT").await.map_err(chain)?;
    let order = Order::Prepare { app: execution.app.clone(), to: execution.to.clone() };
    let report = reported(control.order(order).await)?;
    let pinned: Vec<Blocker> = report.blockers.iter().filter(|b| is_pinned(b)).cloned().collect();
    if execution.on_timeout == OnTimeout::Abort && !pinned.is_empty() {
        return Err(format!(
            "{} sessions are pinned: {}",
            pinned.len(),
            describe_blockers(&pinned)
        ));
    }
    let (sessions, done) = (report.sessions, report.done);
    let mut text = format!("lag {lag} bytes; {done} of {sessions} sessions prepared");
    if !otherwise.is_empty() {
        let otherwise = otherwise.join(", ");
        text.push_str(&format!("; configured otherwise: {otherwise}, sessions keep theirs"));
    }
    if done < sessions {
        // They are read and attached during the pause, which makes it longer.
        text.push_str(&format!(", not {}", describe_blockers(&report.blockers)));
    }
    Ok(text)
}

fn is_pinned(blocker: &Blocker) -> bool {
    // A busy session may be free by the time it is held; nothing else gets better by waiting.
    blocker.reasons.iter().any(|reason| !matches!(reason, model::barrier::Reason::Busy { .. }))
}

async fn hold(control: &Control, execution: &Execution) -> Done {
    let Execution { deadline_ms, on_timeout, .. } = *execution;
    let order = Order::Hold { app: execution.app.clone(), deadline_ms, on_timeout };
    let report = reported(control.order(order).await)?;
    if execution.on_timeout == OnTimeout::Abort && report.done < report.sessions {
        let busy = report.sessions - report.done;
        let shown = describe_blockers(&report.blockers);
        return Err(format!(
            "{busy} sessions did not come to a safe point in {} ms: {shown}",
            execution.deadline_ms
        ));
    }
    Ok(format!("{} of {} sessions held, {} ended", report.done, report.sessions, report.told))
}

/// The old server's `pg_hba.conf` and where its original is kept.
struct Hba {
    path: std::path::PathBuf,
    saved: std::path::PathBuf,
}

async fn hba_of(server: &CellServer, admin: &mut Admin) -> Result<Option<(Instance, Hba)>, String> {
    let Some(instance) = &server.instance else { return Ok(None) };
    let path = admin.value("SHOW hba_file").await.map_err(chain)?.unwrap_or_default();
    let path = std::path::PathBuf::from(path);
    let saved = path.with_extension("conf.holdfast");
    Ok(Some((instance.clone(), Hba { path, saved })))
}

/// Reloads the configuration and waits until this connection, and so every other, has been told.
async fn reload(admin: &mut Admin) -> Result<(), String> {
    let loaded = "SELECT pg_conf_load_time()::text";
    let before = admin.value(loaded).await.map_err(chain)?;
    admin.value("SELECT pg_reload_conf()").await.map_err(chain)?;
    let deadline = Instant::now() + TERMINATE_MAX;
    while admin.value(loaded).await.map_err(chain)? == before {
        if Instant::now() > deadline {
            return Err("the server does not reload its configuration".into());
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(())
}

/// Who may still log in to a fenced server, besides Holdfast and replication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Logins {
    /// Nobody.
    Closed,
    /// Whoever comes from where the proxy is.
    OfProxy,
}

async fn fence(
    control: &Control,
    execution: &mut Execution,
    from: &CellServer,
    logins: Logins,
) -> Done {
    let mut old = admin_at_once(from).await?;
    let report = control.order(Order::Backends { app: execution.app.clone() }).await;
    let own: Vec<String> = reported(report)?.backends.iter().map(i32::to_string).collect();
    let own = own.join(",");
    let hba = hba_of(from, &mut old).await?;
    let login = match &hba {
        Some((instance, hba)) => {
            let proxies = match logins {
                Logins::Closed => BTreeSet::new(),
                Logins::OfProxy => addresses_of(&mut old, &own).await?,
            };
            let admitted = hba::Admitted { admin: &from.admin.user, proxies: &proxies };
            close_hba(&mut old, instance, hba, &admitted).await?;
            let shown: Vec<String> = proxies.iter().map(ToString::to_string).collect();
            match shown.as_slice() {
                [] => "logins closed".to_owned(),
                shown => format!("logins only from {}, where the proxy is", shown.join(", ")),
            }
        }
        None => "logins open, as Holdfast does not manage its files".to_owned(),
    };
    old.rows("ALTER SYSTEM SET default_transaction_read_only = on").await.map_err(chain)?;
    reload(&mut old).await?;
    // Backends of held sessions stay: their state is still to be read, and they can go back to work. Sessions
    // that were ended for being busy are outsiders now, so nothing of theirs can be acknowledged after this.
    let outsiders = format!(
        "FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() \
         AND NOT pid = ANY ('{{{own}}}'::int4[])"
    );
    let ended = old
        .value(&format!("SELECT count(pg_terminate_backend(pid)) {outsiders}"))
        .await
        .map_err(chain)?
        .unwrap_or_default();
    let deadline = Instant::now() + TERMINATE_MAX;
    while old.value(&format!("SELECT count(*) {outsiders}")).await.map_err(chain)?.as_deref()
        != Some("0")
    {
        if Instant::now() > deadline {
            return Err("connections beside the proxy's do not end".into());
        }
        tokio::time::sleep(POLL).await;
    }
    // A record that is written and flushed: whatever was written before it is flushed, too.
    old.rows("SELECT pg_logical_emit_message(true, 'holdfast', 'fenced')").await.map_err(chain)?;
    let lsn = old.value("SELECT pg_current_wal_flush_lsn()").await.map_err(chain)?;
    let lsn = lsn.as_deref().and_then(Lsn::read).ok_or("the server gives no position")?;
    execution.lsn = Some(lsn);
    Ok(format!("read-only at {lsn}, {login}, {ended} other connections ended"))
}

/// Where Holdfast's connections come from, as the server sees it: its own one, and those of the proxy.
async fn addresses_of(old: &mut Admin, pids: &str) -> Result<BTreeSet<hba::Peer>, String> {
    let rows = old
        .rows(&format!(
            "SELECT DISTINCT host(client_addr) FROM pg_stat_activity \
             WHERE pid = pg_backend_pid() OR pid = ANY ('{{{pids}}}'::int4[])"
        ))
        .await
        .map_err(chain)?;
    let peer = |row: Vec<Option<String>>| match row.into_iter().next().flatten() {
        None => Ok(hba::Peer::Local),
        Some(text) => {
            text.parse().map(hba::Peer::Host).map_err(|_| format!("`{text}` is no address"))
        }
    };
    rows.into_iter().map(peer).collect()
}

/// What the server makes of its `pg_hba.conf`.
async fn hba_rules(admin: &mut Admin) -> Result<Vec<hba::Rule>, String> {
    hba::read(&admin.rows(hba::QUESTION).await.map_err(chain)?)
}

async fn close_hba(
    old: &mut Admin,
    instance: &Instance,
    hba: &Hba,
    admitted: &hba::Admitted<'_>,
) -> Result<(), String> {
    let io = |error: std::io::Error| format!("`{}`: {error}", hba.path.display());
    let text = std::fs::read(&hba.path).map_err(io)?;
    if !text.starts_with(hba::MARK.as_bytes()) {
        // The server would not load a file with an error in it, and go on with what it has loaded before.
        let fenced = hba::fenced(&hba_rules(old).await?, admitted)?;
        instance.write(&hba.saved, &text).map_err(chain)?;
        instance.write(&hba.path, fenced.as_bytes()).map_err(chain)?;
    }
    if hba::is_fenced(&hba_rules(old).await?, admitted) {
        return Ok(());
    }
    let (path, admin) = (hba.path.display(), admitted.admin);
    Err(format!("`{path}` cannot be narrowed to `{admin}`, replication and the proxy"))
}

/// Puts the original back, if the file is ours.
fn open_hba(instance: &Instance, hba: &Hba) -> Result<(), String> {
    let fenced = std::fs::read_to_string(&hba.path).is_ok_and(|text| text.starts_with(hba::MARK));
    if !fenced {
        return Ok(());
    }
    let text =
        std::fs::read(&hba.saved).map_err(|error| format!("`{}`: {error}", hba.saved.display()))?;
    instance.write(&hba.path, &text).map_err(chain)
}

async fn capture(control: &Control, execution: &Execution) -> Done {
    let order = Order::Capture {
        app: execution.app.clone(),
        to: execution.to.clone(),
        on_timeout: execution.on_timeout,
    };
    let report = reported(control.order(order).await)?;
    if execution.on_timeout == OnTimeout::Abort && !report.blockers.is_empty() {
        let shown = describe_blockers(&report.blockers);
        return Err(format!("{} sessions cannot be moved: {shown}", report.blockers.len()));
    }
    Ok(format!("{} of {} sessions read, {} ended", report.done, report.sessions, report.told))
}

async fn catch_up(execution: &Execution, to: &CellServer) -> Done {
    let lsn = execution.lsn.ok_or("the fence has given no position")?;
    let mut new = admin_at_once(to).await?;
    let deadline = Instant::now() + CATCH_UP_MAX;
    loop {
        let replayed = new.replayed_lsn().await.map_err(chain)?;
        if replayed >= lsn {
            return Ok(format!("replayed {replayed}"));
        }
        if Instant::now() > deadline {
            return Err(format!(
                "the target has replayed {replayed}, not {lsn}, after {CATCH_UP_MAX:?}"
            ));
        }
        tokio::time::sleep(POLL).await;
    }
}

async fn promote(control: &Control, execution: &Execution, to: &CellServer) -> Done {
    // While the target is promoted, which is mostly waiting. Who loses its server by it is told, before the grant
    // or after.
    reported(control.order(Order::HearOut { app: execution.app.clone() }).await)?;
    let deadline = Instant::now() + PROMOTE_MAX;
    loop {
        match promote_server(to, deadline).await {
            Err(failure) if again(deadline, &failure).await => (),
            done => return done,
        }
    }
}

async fn promote_server(to: &CellServer, deadline: Instant) -> Done {
    let mut new = admin_at_once(to).await?;
    if new.value("SELECT pg_is_in_recovery()").await.map_err(chain)?.as_deref() == Some("t") {
        new.value("SELECT pg_promote(false)").await.map_err(chain)?;
        while new.value("SELECT pg_is_in_recovery()").await.map_err(chain)?.as_deref() != Some("f")
        {
            if Instant::now() > deadline {
                return Err(format!("the server is still in recovery after {PROMOTE_MAX:?}"));
            }
            tokio::time::sleep(POLL).await;
        }
    }
    let timeline =
        new.value("SELECT timeline_id FROM pg_control_checkpoint()").await.map_err(chain)?;
    Ok(format!("primary, after timeline {}", timeline.unwrap_or_default()))
}

async fn attach(control: &Control, execution: &Execution) -> Done {
    let order = Order::Attach { app: execution.app.clone(), to: execution.to.clone() };
    let report = reported(control.order(order).await)?;
    let mut text = format!("{} of {} sessions moved", report.done, report.sessions);
    if !report.blockers.is_empty() {
        text.push_str(&format!(", {} ended: {}", report.told, describe_blockers(&report.blockers)));
    }
    Ok(text)
}

async fn release(control: &Control, execution: &Execution, to: &str, state: CellState) -> Done {
    let epoch = control.application(&execution.app).map_err(chain)?.epoch;
    let order = Order::Release { app: execution.app.clone(), to: to.to_owned(), state, epoch };
    let report = reported(control.order(order).await)?;
    Ok(match report.pauses {
        Some(pauses) => format!("{} sessions go on; held {pauses}", report.done),
        None => format!("{} sessions go on", report.done),
    })
}

/// Takes the fence back. Also right when there was none.
async fn revert(control: &Control, execution: &Execution, from: &CellServer) -> Done {
    let unfenced = unfence_in_time(from).await;
    // Clients go on also where the server could not be asked: it may not have been fenced at all.
    let released = release(control, execution, &execution.from, CellState::Active).await?;
    unfenced?;
    Ok(released)
}

async fn unfence_in_time(server: &CellServer) -> Result<(), String> {
    let deadline = Instant::now() + UNFENCE_MAX;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let address = &server.target.address;
        let late = |_| format!("`{address}` is not unfenced within {UNFENCE_MAX:?}");
        match timeout(left, unfence(server)).await.map_err(late).flatten() {
            Err(failure) if again(deadline, &failure).await => (),
            done => return done,
        }
    }
}

/// The cell's server is a primary, and no other is: two primaries are two histories, of which a person has to choose one.
pub(crate) async fn check_alone(servers: &AppServers, cell: &str) -> Result<(), String> {
    for (name, server) in &servers.cells {
        let status = match admin_at_once(server).await {
            Ok(mut admin) => admin.status().await.map_err(chain),
            Err(error) => Err(error),
        };
        match status {
            Ok(status) if name == cell && status.in_recovery => {
                return Err(format!("the server of `{cell}` is in recovery, not a primary"));
            }
            Ok(status) if name != cell && !status.in_recovery => {
                return Err(format!("the server of `{name}` is a primary, too: stop one of them"));
            }
            Ok(_) => (),
            Err(error) if name == cell => return Err(error),
            Err(error) => {
                tracing::warn!(cell = name, error, "it cannot be asked whether it is a primary");
            }
        }
    }
    Ok(())
}

/// The cell has the grant; its server is to take writes again.
async fn regrant(control: &Control, execution: &Execution, to: &CellServer) -> Done {
    check_alone(control.servers(&execution.app).map_err(chain)?, &execution.to).await?;
    unfence_in_time(to).await?;
    let epoch = control.application(&execution.app).map_err(chain)?.epoch;
    Ok(format!("epoch {epoch} is `{}`'s, its server takes writes", execution.to))
}

async fn unfence(server: &CellServer) -> Result<(), String> {
    let mut old = admin_at_once(server).await?;
    if let Some((instance, hba)) = hba_of(server, &mut old).await? {
        open_hba(&instance, &hba)?;
    }
    old.rows("ALTER SYSTEM RESET default_transaction_read_only").await.map_err(chain)?;
    reload(&mut old).await
}

/// Makes the old server a standby of the new one.
async fn rejoin(from: &CellServer, to: &CellServer) -> Done {
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
