//! A server takes no more writes, from whomever; and takes them again.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use model::Lsn;
use model::barrier::{Order, Report};
use model::failover::Process;
use model::persisted::Execution;
use pg::admin::Admin;
use tokio::time::timeout;

use super::failing_over::process_of;
use super::{Done, POLL, admin_at_once, again, chain, reported, taken_part};
use crate::config::{AppServers, CellServer};
use crate::control::Control;
use crate::hba;
use crate::member::Member;
use crate::runner::crash_point_named;

/// How long taking the fence back is tried. Then clients go on all the same.
const UNFENCE_MAX: Duration = Duration::from_secs(10);
/// How long ended backends may take to go.
const TERMINATE_MAX: Duration = Duration::from_secs(5);

pub(super) async fn hba_file(admin: &mut Admin) -> Result<PathBuf, String> {
    Ok(admin.value("SHOW hba_file").await.map_err(chain)?.unwrap_or_default().into())
}

/// Reloads the configuration and waits until this connection, and so every other, has been told.
pub(crate) async fn reload(admin: &mut Admin) -> Result<(), String> {
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
pub(super) enum Logins {
    /// Nobody.
    Closed,
    /// Whoever comes from where the proxy is.
    OfProxy,
}

pub(super) async fn fence(
    control: &Control,
    execution: &mut Execution,
    from: &CellServer,
    logins: Logins,
) -> Done {
    let mut old = admin_at_once(from).await?;
    check_subscribes_to_nothing(&mut old, &execution.from).await?;
    let report = reported(control.order(Order::Backends { app: execution.app.clone() }).await)?;
    taken_part(&report, execution.on_timeout)?;
    let own = own_of(&report);
    let login = match &from.member {
        Some(member) => {
            let proxies = match logins {
                Logins::Closed => BTreeSet::new(),
                Logins::OfProxy => proxies_of(control, execution, &mut old, &own).await?,
            };
            let admitted = hba::Admitted { admin: &from.admin.user, proxies: &proxies };
            close_hba(&mut old, member, &admitted).await?;
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
    let may_come = logins == Logins::OfProxy || from.member.is_none();
    let mut ended = end_outsiders(&mut old, &own, may_come).await?;
    check_kept(&mut old).await?;
    let mut waited = String::new();
    if may_come {
        // Clients of those that do not take part could log in and lift the fence.
        let late = control.outwait(&execution.app).await.map_err(chain)?;
        if !late.is_empty() {
            waited = format!(", waited for {}", late.join(", "));
            // What they have begun meanwhile would go on.
            ended += end_outsiders(&mut old, &own, may_come).await?;
        }
    } else {
        control.note_late(&execution.app);
    }
    // Somebody who is gone by now may have enabled one since.
    check_subscribes_to_nothing(&mut old, &execution.from).await?;
    // A record that is written and flushed: whatever was written before it is flushed, too.
    old.rows("SELECT pg_logical_emit_message(true, 'holdfast', 'fenced')").await.map_err(chain)?;
    let lsn = old.value("SELECT pg_current_wal_flush_lsn()").await.map_err(chain)?;
    let lsn = lsn.as_deref().and_then(Lsn::read).ok_or("the server gives no position")?;
    execution.lsn = Some(lsn);
    Ok(format!("read-only at {lsn}, {login}, {ended} other connections ended{waited}"))
}

/// What a subscription brings is written past every fence (`apply_handle_insert` asks nobody), and acknowledged to where it comes
/// from: what came after the position that the target waits for would be lost.
///
/// # Errors
/// One is enabled, in words.
pub(super) async fn check_subscribes_to_nothing(
    admin: &mut Admin,
    cell: &str,
) -> Result<(), String> {
    let enabled = "SELECT quote_ident(s.subname), d.datname FROM pg_subscription s \
        JOIN pg_database d ON d.oid = s.subdbid WHERE s.subenabled LIMIT 1";
    let rows = admin.rows(enabled).await.map_err(chain)?;
    let Some(row) = rows.first() else { return Ok(()) };
    let value = |at: usize| row.get(at).and_then(Option::as_deref).unwrap_or_default();
    let (name, database) = (value(0), value(1));
    Err(format!(
        "subscription `{name}` in database `{database}` of `{cell}` writes whatever the state of the cell; `ALTER SUBSCRIPTION {name} DISABLE` there first, and ENABLE where it is active then"
    ))
}

/// A statement of an earlier way back, whose connection was given up, may have reached the server before that connection was
/// ended just now: the fence would be gone with the next reload, whoever asks for it.
async fn check_kept(old: &mut Admin) -> Result<(), String> {
    let kept = "SELECT setting FROM pg_file_settings WHERE name = 'default_transaction_read_only' \
                ORDER BY seqno DESC LIMIT 1";
    let setting = old.value(kept).await.map_err(chain)?;
    match setting.as_deref() {
        Some("on") => Ok(()),
        found => Err(format!(
            "the fence was taken back meanwhile: `default_transaction_read_only` is {}",
            found.unwrap_or("not set")
        )),
    }
}

/// The server of a fenced cell says of every session that its transactions only read, which is no state of the session: it says
/// so no more while all are held and read. Before that logins are closed to all but Holdfast, and whoever else is connected is
/// ended; the fence comes back before anybody goes on.
pub(super) async fn uncover(
    control: &Control,
    execution: &mut Execution,
    server: &CellServer,
) -> Result<(), String> {
    fence(control, execution, server, Logins::Closed).await?;
    let mut admin = admin_at_once(server).await?;
    admin.rows("ALTER SYSTEM RESET default_transaction_read_only").await.map_err(chain)?;
    reload(&mut admin).await
}

/// A fenced cell hands over only where nobody can log in meanwhile.
///
/// # Errors
/// Somebody can.
pub(crate) fn check_closes(cell: &str, server: &CellServer) -> Result<(), String> {
    match server.member {
        Some(_) => Ok(()),
        None => Err(format!(
            "`{cell}` is fenced, and logins to its server cannot be closed while it hands over, as Holdfast does not manage its files; unfence it first"
        )),
    }
}

/// The fence of a fenced cell comes back, as it was, whatever of it is there. While it was not, nobody was connected but Holdfast
/// and those who are held ([`uncover`]), and it is back before anybody else may log in.
pub(super) async fn cover(
    control: &Control,
    execution: &Execution,
    from: &CellServer,
) -> Result<(), String> {
    let mut old = admin_at_once(from).await?;
    let own =
        own_of(&reported(control.order(Order::Backends { app: execution.app.clone() }).await)?);
    let proxies = proxies_of(control, execution, &mut old, &own).await?;
    // Whatever of it an earlier try has done.
    old.rows("ALTER SYSTEM SET default_transaction_read_only = on").await.map_err(chain)?;
    crash_point_named("cover:set");
    let mut was_uncovered = false;
    if let Some(member) = &from.member {
        let path = hba_file(&mut old).await?;
        let nobody = BTreeSet::new();
        let closed = hba::Admitted { admin: &from.admin.user, proxies: &nobody };
        let is_open = !member.are_logins_closed(&path).await?;
        if is_open || hba::is_fenced(&hba_rules(&mut old).await?, &closed) {
            // Proxies were left out meanwhile. Only from the whole file the server says what rules there are, so it stands there
            // for a moment, and is not loaded by us.
            was_uncovered = true;
            member.open_logins(&path).await?;
            crash_point_named("cover:opened");
            close_hba(&mut old, member, &hba::Admitted { proxies: &proxies, ..closed }).await?;
        }
    }
    // Both at once, and only now: an open file of an earlier try is never loaded.
    reload(&mut old).await?;
    crash_point_named("cover:narrowed");
    if was_uncovered {
        // The server may have been started meanwhile, or somebody has had the open file loaded.
        end_outsiders(&mut old, &own, true).await?;
    }
    check_kept(&mut old).await
}

fn own_of(report: &Report) -> String {
    report.backends.iter().map(i32::to_string).collect::<Vec<_>>().join(",")
}

/// Where proxies come from, as the server sees it.
async fn proxies_of(
    control: &Control,
    execution: &Execution,
    old: &mut Admin,
    own: &str,
) -> Result<BTreeSet<hba::Peer>, String> {
    let mut all = addresses_of(old, own).await?;
    // One that has no session here at the moment.
    all.extend(control.holders(&execution.app).into_iter().map(hba::Peer::Host));
    Ok(all)
}

/// Ends whoever is connected but for the backends `own` and ourselves, and waits until they have gone. Gives how many there
/// were.
async fn end_outsiders(old: &mut Admin, own: &str, may_come: bool) -> Result<usize, String> {
    // Backends of held sessions stay: their state is still to be read, and they can go back to work. Sessions
    // that were ended for being busy are outsiders now, so nothing of theirs can be acknowledged after this.
    // Whoever replicates logically is in a database, and may run any SQL; what replicates the log alone is in none.
    let outsiders = format!(
        "FROM pg_stat_activity WHERE (backend_type = 'client backend' \
         OR backend_type = 'walsender' AND datid <> 0 OR backend_type LIKE 'logical replication %worker') \
         AND pid <> pg_backend_pid() AND NOT pid = ANY ('{{{own}}}'::int4[])"
    );
    let ended = old
        .rows(&format!("SELECT pid::text, pg_terminate_backend(pid)::text {outsiders}"))
        .await
        .map_err(chain)?;
    let pids = ended.iter().filter_map(|row| row.first()?.clone()).collect::<Vec<_>>();
    // Where others may still log in, those are not waited for who came after.
    let left = match may_come {
        true => format!("{outsiders} AND pid = ANY ('{{{}}}'::int4[])", pids.join(",")),
        false => outsiders,
    };
    let deadline = Instant::now() + TERMINATE_MAX;
    while old.value(&format!("SELECT count(*) {left}")).await.map_err(chain)?.as_deref()
        != Some("0")
    {
        if Instant::now() > deadline {
            return Err("connections beside the proxy's do not end".into());
        }
        tokio::time::sleep(POLL).await;
    }
    Ok(pids.len())
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
pub(super) async fn hba_rules(admin: &mut Admin) -> Result<Vec<hba::Rule>, String> {
    hba::read(&admin.rows(hba::QUESTION).await.map_err(chain)?)
}

async fn close_hba(
    old: &mut Admin,
    member: &Member,
    admitted: &hba::Admitted<'_>,
) -> Result<(), String> {
    let path = hba_file(old).await?;
    let rules = hba_rules(old).await?;
    if !member.are_logins_closed(&path).await? || !hba::is_fenced(&rules, admitted) {
        // The server would not load a file with an error in it, and go on with what it has loaded before.
        member.close_logins(&path, hba::fenced(&rules, admitted)?).await?;
    }
    if hba::is_fenced(&hba_rules(old).await?, admitted) {
        return Ok(());
    }
    let (path, admin) = (path.display(), admitted.admin);
    Err(format!("`{path}` cannot be narrowed to `{admin}`, replication and the proxy"))
}

pub(super) async fn unfence_in_time(server: &CellServer) -> Result<(), String> {
    let deadline = Instant::now() + UNFENCE_MAX;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let address = &server.target.address;
        let late = |_| format!("`{address}` is not unfenced within {UNFENCE_MAX:?}");
        match timeout(left, unfence(server)).await.map_err(late).flatten() {
            // Whoever can do something about it waits for this to be over.
            Err(failure) if process_of(server).await == Some(Process::Crashed) => {
                return Err(failure);
            }
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
            // Its agent starts it.
            Err(_) if name == cell && is_down(server).await => (),
            Err(error) if name == cell => return Err(error),
            Err(error) => {
                tracing::warn!(cell = name, error, "it cannot be asked whether it is a primary");
            }
        }
    }
    Ok(())
}

async fn is_down(server: &CellServer) -> bool {
    match &server.member {
        Some(member) => member.is_down().await,
        None => false,
    }
}

/// The cell has the grant; its server is to take writes again.
pub(super) async fn regrant(control: &Control, execution: &Execution, to: &CellServer) -> Done {
    let epoch = control.application(&execution.app).map_err(chain)?.epoch;
    if let Some(member) = &to.member {
        member.hold_lease(epoch).await?;
        if member.is_down().await {
            member.start_again(epoch).await?;
        }
    }
    check_alone(control.servers(&execution.app).map_err(chain)?, &execution.to).await?;
    unfence_in_time(to).await?;
    Ok(format!("epoch {epoch} is `{}`'s, its server takes writes", execution.to))
}

async fn unfence(server: &CellServer) -> Result<(), String> {
    let mut old = admin_at_once(server).await?;
    if let Some(member) = &server.member {
        let path = hba_file(&mut old).await?;
        member.open_logins(&path).await?;
    }
    old.rows("ALTER SYSTEM RESET default_transaction_read_only").await.map_err(chain)?;
    reload(&mut old).await
}
