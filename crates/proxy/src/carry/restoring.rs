//! Making a fresh server session equal to a snapshot, and proving it.

use std::collections::{BTreeMap, BTreeSet};

use model::barrier::Reason;
use model::session::capture::{BEGIN, BEGIN_WRITE, PROTECT, STATEMENT_NAME};
use model::session::protocol::Unnamed;
use model::session::replay::{self, Phase, Step};
use model::session::temporary;
use model::session::{Facts, Pin, Snapshot};
use pg::connect::Login;
use pg::connection::{Connection, QueryError};
use tokio::time::timeout;
use wire::frontend;

use super::belongings::{Belongings, Carried, open_cursors, read_rows, same_cursors};
use super::reading::Kind;
use super::{exchange, failed};
use crate::app::Cell;
use crate::config::MoveLimits;
use crate::pool::Welcome;
use crate::session::{Identity, Session};

/// A session attached beforehand to another cell.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(super) cell: String,
    pub(super) connection: Connection,
    /// What was restored: everything but what must wait for the switch.
    pub(super) snapshot: Snapshot,
    /// The unnamed statement that stands there, as it was sent.
    pub(super) unnamed: Vec<u8>,
    /// What was made elsewhere, and proven, of what only a primary can make.
    rehearsed: Option<Snapshot>,
}

/// What making a copy of a session takes.
#[derive(Clone, Copy)]
pub(crate) struct Model<'a> {
    pub(crate) identity: &'a Identity,
    pub(crate) custom: &'a BTreeSet<String>,
    pub(crate) limits: MoveLimits,
    /// Of the server that the session stands on, and of the one where the copy shall stand.
    pub(crate) here: &'a Facts,
    pub(crate) there: &'a Facts,
}

/// Attaches a copy of the session to `cell`, which may be a standby, and proves that it is the same except for
/// what only a primary allows. The session itself is not needed: its client goes on meanwhile.
pub(crate) async fn prepare(
    model: &Model<'_>,
    snapshot: &Snapshot,
    cell: &Cell,
) -> Result<Prepared, Reason> {
    let connection = copy(model, snapshot, cell, Vec::new()).await?;
    let (cell, snapshot, unnamed) = (cell.name.clone(), snapshot.beforehand(), Vec::new());
    Ok(Prepared { cell, connection, snapshot, unnamed, rehearsed: None })
}

/// A login that gives what a login gave when `welcome` was learned.
pub(crate) async fn login_as_before(
    welcome: &Welcome,
    (cell, there): (&Cell, &Facts),
    identity: &Identity,
    limits: MoveLimits,
) -> Result<Connection, Reason> {
    let custom = BTreeSet::new();
    let here = &*welcome.facts;
    let model = Model { identity, custom: &custom, limits, here, there };
    // So that RESET finds it.
    let mut wanted = welcome.fresh.clone();
    let beneath = wanted.beneath.get_or_insert_default();
    let mut params = Vec::new();
    for (name, value) in here.given_otherwise(there) {
        let value = beneath.entry(name.clone()).or_insert(value);
        params.push((name.into_bytes(), value.clone().into_bytes()));
    }
    // What the other server's configuration gives as well is not beneath anything there.
    beneath.retain(|name, value| there.resets.get(name) != Some(value));
    let mut connection = copy(&model, &wanted, cell, params).await?;
    let steps = replay::idle_timeout_steps(&welcome.fresh, here);
    run_steps(&mut connection, BEGIN, &steps, "COMMIT").await?;
    Ok(connection)
}

/// Proves that the settings of `snapshot` are all that the session has, by a copy of them.
pub(crate) async fn prove_settings(
    session: &Session,
    snapshot: &Snapshot,
    facts: &Facts,
) -> Result<(), Reason> {
    let custom = session.hints.custom.iter().chain(snapshot.custom.keys()).cloned().collect();
    let (identity, limits) = (&session.identity, session.app.moves);
    let model = Model { identity, custom: &custom, limits, here: facts, there: facts };
    let settings = Snapshot {
        settings: snapshot.settings.clone(),
        custom: snapshot.custom.clone(),
        libraries: snapshot.libraries.clone(),
        beneath: snapshot.beneath.clone(),
        setting_bytes: snapshot.setting_bytes,
        may_have_unnamed: snapshot.may_have_unnamed.clone(),
        session_user: snapshot.session_user.clone(),
        role: snapshot.role.clone(),
        ..Snapshot::default()
    };
    copy(&model, &settings, &session.cell, Vec::new()).await.map(drop)
}

async fn copy(
    model: &Model<'_>,
    snapshot: &Snapshot,
    cell: &Cell,
    params: Vec<(Vec<u8>, Vec<u8>)>,
) -> Result<Connection, Reason> {
    let snapshot = snapshot.beforehand();
    let (identity, stay) = (model.identity, replay::STAY.into());
    let stay = [Step::Run { what: "waiting".into(), sql: stay, params: Vec::new() }];
    let mut login =
        Login { params: identity.params.clone(), credential: identity.credential.clone() };
    login.params.extend(params);
    let mut connection = cell.target.login(&login).await.map_err(failed)?;
    connection.answer_timeout = model.limits.answer_timeout;
    run_steps(&mut connection, BEGIN, &stay, "COMMIT").await?;
    let mut fresh = look(&mut connection, model, &snapshot, true).await?;
    let beneath = replay::login_params(&fresh, &snapshot, model.there);
    if !beneath.is_empty() {
        // Defaults of its role or database have changed since the session logged in: it brings its own.
        login.params.extend(beneath);
        connection = cell.target.login(&login).await.map_err(failed)?;
        connection.answer_timeout = model.limits.answer_timeout;
        run_steps(&mut connection, BEGIN, &stay, "COMMIT").await?;
        fresh = look(&mut connection, model, &snapshot, true).await?;
    }
    restore(&mut connection, model, &snapshot, fresh).await?;
    Ok(connection)
}

/// What a copy of `snapshot` is so far.
async fn look(
    connection: &mut Connection,
    model: &Model<'_>,
    snapshot: &Snapshot,
    beneath: bool,
) -> Result<Snapshot, Reason> {
    let kind = Kind::of_model(model);
    let kind = Kind { beneath, ..kind.of_copy(snapshot) };
    let captured = kind.capture(connection, model.there).await.map_err(failed)?.snapshot;
    Ok(captured.beforehand().without_settings_of_server(snapshot, model.here, model.there))
}

/// A copy that waits on the session's own server for [`rehearse`], where nobody can log in by then. None if nothing of the session
/// is rehearsed.
pub(crate) async fn stage(
    model: &Model<'_>,
    snapshot: &Snapshot,
    cell: &Cell,
) -> Result<Option<Connection>, Reason> {
    match snapshot.temporary.is_empty() {
        true => Ok(None),
        false => copy(model, snapshot, cell, Vec::new()).await.map(Some),
    }
}

/// Proves that temporary objects, and what is prepared on them, can be made again, on the session's own server: its
/// standby can make none of them. It is done with the rows that are there, as a constraint may refuse one by now; on a `stage`,
/// if there is one, whatever the session has set since.
pub(crate) async fn rehearse(
    model: &Model<'_>,
    carried: &Carried,
    cell: &Cell,
    prepared: &mut Prepared,
    stage: Option<Connection>,
) -> Result<(), Reason> {
    if carried.snapshot.temporary.is_empty()
        || (carried.belongings.is_empty() && prepared.rehearsed.as_ref() == Some(&carried.snapshot))
    {
        return Ok(());
    }
    let here = Model { there: model.here, ..*model };
    let mut connection = match stage {
        Some(connection) => connection,
        None => copy(&here, &carried.snapshot, cell, Vec::new()).await?,
    };
    make(&mut connection, &here, carried).await?;
    prepared.rehearsed = Some(carried.snapshot.clone());
    Ok(())
}

/// Makes what could not be made beforehand, and proves it: temporary objects with their rows, statements that may be
/// about them, and cursors.
pub(super) async fn make(
    connection: &mut Connection,
    model: &Model<'_>,
    carried: &Carried,
) -> Result<(), Reason> {
    let Carried { snapshot, belongings } = carried;
    let Belongings { rows, whole, analyzed, cursors, .. } = belongings;
    if !snapshot.temporary.is_empty() {
        let formats = Step::Run {
            what: "formats".into(),
            sql: temporary::READ_FORMATS.into(),
            params: Vec::new(),
        };
        let mut steps = vec![as_login(model.identity), formats];
        steps.extend(replay::temporary_steps(&snapshot.temporary, rows, analyzed));
        run_steps(connection, BEGIN_WRITE, &steps, "COMMIT").await?;
        let steps = replay::prepared_steps(&Snapshot::default(), snapshot);
        run_steps(connection, BEGIN, &steps, "COMMIT").await?;
    }
    let opened = cursors.iter().filter_map(|(name, contents)| {
        snapshot.cursors.get(name).map(|cursor| contents.declare(name, *cursor))
    });
    let opened: Vec<_> = opened.flatten().collect();
    let kind = Kind::of_model(model);
    let subject = kind.subject(connection, model.there);
    if let Err(error) = open_cursors(connection, &subject, &opened).await {
        let names = cursors.keys().cloned().collect::<Vec<_>>().join(", ");
        let why = format!("cannot be opened again: {error}");
        return Err(Reason::Pinned(Pin::HoldCursor { name: names, why }));
    }
    if snapshot.temporary.is_empty() && cursors.is_empty() {
        return Ok(());
    }
    let again = kind.capture(connection, model.there).await.map_err(failed)?.snapshot;
    let only = |from: &Snapshot| Snapshot {
        prepared: from.prepared.clone(),
        temporary: from.temporary.clone(),
        cursors: from.cursors.clone(),
        ..Snapshot::default()
    };
    let mut wanted = only(snapshot);
    wanted.cursors.retain(|name, _| cursors.contains_key(name));
    if let Some(pin) = wanted.differences(&only(&again)).into_iter().next() {
        return Err(Reason::Pinned(pin));
    }
    if !rows.is_empty() {
        let found = read_rows(connection, &subject, &snapshot.temporary).await.map_err(failed)?;
        let plain = rows.iter().find(|(name, rows)| found[0].get(*name) != Some(*rows));
        let whole = || whole.iter().find(|(name, rows)| found[1].get(*name) != Some(*rows));
        if let Some((name, _)) = plain.or_else(whole) {
            let what = format!("the rows of {name} are not the same on the other server");
            return Err(Reason::Pinned(Pin::Temporary { what }));
        }
    }
    same_cursors(connection, &subject, snapshot, belongings).await
}

/// The owner's rights may be the login's and not those of the role that the session has taken.
pub(super) fn as_login(identity: &Identity) -> Step {
    let sql = "SELECT pg_catalog.set_config('session_authorization', $1, true), \
        pg_catalog.set_config('role', 'none', true)";
    Step::Run {
        what: "the session's login role".into(),
        sql: sql.into(),
        params: vec![identity.user.clone()],
    }
}

/// Makes a server session that is `fresh` equal to `snapshot`, and proves it by a second capture.
async fn restore(
    connection: &mut Connection,
    model: &Model<'_>,
    snapshot: &Snapshot,
    fresh: Snapshot,
) -> Result<(), Reason> {
    let steps = replay::steps(&fresh, snapshot, Phase::Standby, model.here);
    run_steps(connection, BEGIN, &steps, "COMMIT").await?;
    let mut again = look(connection, model, snapshot, false).await?;
    again.beneath = fresh.beneath;
    match snapshot.differences(&again).into_iter().next() {
        None => Ok(()),
        Some(pin) => Err(Reason::Pinned(pin)),
    }
}

/// Runs each step by itself, so that a refusal names what was refused; all of them in one transaction, under
/// settings that are in nobody's way. What the steps set stays when it is committed.
pub(super) async fn run_steps(
    connection: &mut Connection,
    begin: &str,
    steps: &[Step],
    end: &str,
) -> Result<(), Reason> {
    if steps.is_empty() {
        return Ok(());
    }
    let types = types_there(connection, steps).await?;
    let mut out = Vec::new();
    let ours = |sql: &str, params: &[&str], out: &mut Vec<u8>| {
        Connection::add_statement(out, STATEMENT_NAME, sql, params);
        frontend::sync(out);
    };
    ours(begin, &[], &mut out);
    ours(PROTECT, &[], &mut out);
    for step in steps {
        match step {
            Step::Run { sql, params, .. } => {
                let params: Vec<&str> = params.iter().map(String::as_str).collect();
                ours(sql, &params, &mut out);
            }
            Step::Prepare { sql, .. } => frontend::query(&mut out, sql.as_bytes()),
            Step::Parse { name, sql, types: named } => {
                let oid = |name: &String| name.parse().ok().or_else(|| types.get(name).copied());
                let oids: Vec<u32> = named.iter().map(|name| oid(name).unwrap_or(0)).collect();
                frontend::parse(&mut out, name.as_bytes(), sql.as_bytes(), &oids);
                frontend::sync(&mut out);
            }
            Step::Copy { sql, rows, .. } => {
                Connection::add_copy(&mut out, STATEMENT_NAME, sql, rows);
                frontend::sync(&mut out);
            }
        }
    }
    ours(end, &[], &mut out);
    let wait_max = connection.answer_timeout;
    let ask = async {
        connection.ask(&out).await?;
        let mut results = Vec::new();
        for _ in 0..steps.len() + 3 {
            results.push(connection.answers_to_copies().await);
        }
        Ok::<_, QueryError>(results)
    };
    let results = timeout(wait_max, ask).await.unwrap_or(Err(QueryError::Timeout(wait_max)));
    let mut results = results.map_err(failed)?.into_iter();
    for _ in 0..2 {
        if let Some(Err(error)) = results.next() {
            return Err(failed(error));
        }
    }
    for (step, result) in steps.iter().zip(results) {
        if let Err(error) = result {
            return Err(refused(step, &error));
        }
    }
    Ok(())
}

/// The OIDs on this server of the types that statements name. One that is missing here refuses its statement.
async fn types_there(
    connection: &mut Connection,
    steps: &[Step],
) -> Result<BTreeMap<String, u32>, Reason> {
    let mut found = BTreeMap::new();
    for step in steps {
        let Step::Parse { name: statement, types, .. } = step else { continue };
        for name in types.iter().filter(|name| name.parse::<u32>().is_err()) {
            if found.contains_key(name) {
                continue;
            }
            let mut out = Vec::new();
            let sql = "SELECT pg_catalog.to_regtype($1)::pg_catalog.oid";
            Connection::add_statement(&mut out, STATEMENT_NAME, sql, &[name]);
            frontend::sync(&mut out);
            let answers = exchange(connection, &out).await.map_err(failed)?;
            let first =
                answers.into_iter().next().and_then(|answer| answer.rows.into_iter().next());
            let oid = first.into_iter().flatten().flatten().next();
            let Some(oid) = oid.and_then(|oid| oid.parse().ok()) else {
                let why = format!("takes type `{name}`, which the other server does not have");
                return Err(Reason::Pinned(Pin::Prepared { name: statement.clone(), why }));
            };
            found.insert(name.clone(), oid);
        }
    }
    Ok(found)
}

fn refused(step: &Step, error: &QueryError) -> Reason {
    let error = error.to_string();
    Reason::Pinned(match step {
        Step::Run { what, .. } | Step::Copy { what, .. } => {
            Pin::Refused { what: what.clone(), error }
        }
        Step::Prepare { name, .. } | Step::Parse { name, .. } => {
            Pin::Prepared { name: name.clone(), why: format!("cannot be prepared again: {error}") }
        }
    })
}

/// Parses the unnamed statement, as the client sent it. From then on everything of ours has a name and leaves it
/// alone.
pub(super) async fn parse_unnamed(
    connection: &mut Connection,
    stands: &mut Vec<u8>,
    session: &Session,
) -> Result<(), Reason> {
    if session.protocol.unnamed() != Unnamed::Last || session.unnamed == *stands {
        return Ok(());
    }
    // In a transaction of ours, as a standby refuses one of an isolation level that the session may have by default.
    let mut out = Vec::new();
    Connection::add_statement(&mut out, STATEMENT_NAME, BEGIN, &[]);
    frontend::sync(&mut out);
    out.extend_from_slice(&session.unnamed);
    frontend::sync(&mut out);
    Connection::add_statement(&mut out, STATEMENT_NAME, "COMMIT", &[]);
    frontend::sync(&mut out);
    let wait_max = connection.answer_timeout;
    let ask = async {
        connection.ask(&out).await?;
        connection.answers().await?;
        let parsed = connection.answers().await;
        connection.answers().await?;
        parsed
    };
    match timeout(wait_max, ask).await.unwrap_or(Err(QueryError::Timeout(wait_max))) {
        Ok(_) => {
            stands.clone_from(&session.unnamed);
            Ok(())
        }
        Err(error @ QueryError::Server { .. }) => {
            let why = format!("cannot be prepared again: {error}");
            Err(Reason::Pinned(Pin::Prepared { name: "(unnamed)".into(), why }))
        }
        Err(error) => Err(failed(error)),
    }
}

/// Before the point of no return: a copy of the session as it is now stands on the standby, or is made there, and
/// what the standby cannot make is rehearsed, but for a session that can go back (`may_fail`).
pub(crate) async fn ensure(
    session: &Session,
    carried: &Carried,
    (prepared, stage): (Option<Prepared>, Option<Connection>),
    cell: &Cell,
    model: &Model<'_>,
    may_fail: bool,
) -> Result<Prepared, Reason> {
    let snapshot = &carried.snapshot;
    let fits = prepared.filter(|prepared| {
        prepared.cell == cell.name && prepared.snapshot == snapshot.beforehand()
    });
    let mut prepared = match fits {
        Some(prepared) => prepared,
        None => prepare(model, snapshot, cell).await?,
    };
    if snapshot.temporary.is_empty() {
        let Prepared { connection, unnamed, .. } = &mut prepared;
        parse_unnamed(connection, unnamed, session).await?;
        make(connection, model, carried).await?;
    } else if !may_fail {
        rehearse(model, carried, &session.cell, &mut prepared, stage).await?;
    }
    Ok(prepared)
}
