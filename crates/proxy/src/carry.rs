//! Reading a session's state, and attaching it to another server.
//!
//! The order never changes: capture, attach, replay, capture again, compare, swap. Until the swap the session
//! stays on its old server, untouched, and whatever goes wrong there ends nothing but the attempt.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use model::barrier::Reason;
use model::session::capture::{self, Captured, STATEMENT_NAME, ServerVersion, Subject};
use model::session::protocol::Unnamed;
use model::session::replay::{self, Phase, Step};
use model::session::snapshot::AdvisoryLock;
use model::session::{Facts, Pin, Snapshot};
use pg::connect::Login;
use pg::connection::{Answer, Connection, QueryError};
use pg::stream::{Parts, Stream};
use tokio::time::timeout;
use wire::frame::Side;
use wire::frontend;
use wire::sqlstate::SqlState;

use crate::app::Cell;
use crate::session::{Identity, Leg, Session};

/// A late cancel request may hit a capture; it is tried again this often.
const CAPTURE_TRIES: usize = 3;
/// The longest wait for one answer of a server during a move.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// A session attached beforehand to another cell.
#[derive(Debug)]
pub struct Prepared {
    pub cell: String,
    connection: Connection,
    /// What was restored: everything but what must wait for the switch.
    snapshot: Snapshot,
    /// The unnamed statement that stands there, as it was sent.
    unnamed: Vec<u8>,
}

/// What the new server is asked for once the session stands there.
pub(crate) struct Attached {
    connection: Connection,
}

fn failed(error: impl std::error::Error) -> Reason {
    Reason::Failed { error: model::chain(&error) }
}

/// Borrows the session's server socket as a connection. It must be given back by [`give_back`].
fn borrow(session: &mut Session) -> std::io::Result<Connection> {
    let server = &mut session.server;
    let parts = Parts {
        fd: server.fd.try_clone()?,
        is_unix: server.is_unix,
        tls: server.tls.take(),
        cipher: std::mem::take(&mut server.cipher),
    };
    let stream = match Stream::from_parts(parts) {
        Ok(stream) => stream,
        Err(error) => {
            // Its TLS state is gone with it; in the clear it must not go on.
            cut(session);
            return Err(error);
        }
    };
    let mut connection = Connection::new(stream, Vec::new(), None);
    connection.pid = session.backend_pid;
    connection.params = (*session.params).clone();
    Ok(connection)
}

/// Ends the server connection, because what it would send next is an answer to us. The engine then tells the
/// client that its server is gone, which is true: better than somebody else's answers.
fn cut(session: &mut Session) {
    let _ = socket2::SockRef::from(&session.server.fd).shutdown(std::net::Shutdown::Both);
    session.server.carry.clear();
}

/// Gives the socket back. `in_step` says that every question of ours was answered.
fn give_back(session: &mut Session, connection: Connection, in_step: bool) -> std::io::Result<()> {
    if !in_step {
        cut(session);
        return Ok(());
    }
    let mut params = connection.params.clone();
    // The fence of a switchover sets this on the old server. It is no state of the session, and by the time the
    // client may ask, it stands on a server that is not fenced.
    let fence = "default_transaction_read_only";
    if let Some(told) = session.params.get(fence) {
        params.insert(fence.into(), told.clone());
    }
    let mut aside = connection.aside.clone();
    let (stream, unread) = connection.into_stream();
    let parts = stream.into_parts()?;
    session.server.tls = parts.tls;
    session.server.cipher = parts.cipher;
    session.server.carry.extend_from_slice(&unread);
    session.know_pids(&mut aside);
    session.client.push(&aside);
    // Parameters that changed under our questions, such as by a reload, are the client's to know.
    session.tell_params(&params);
    Ok(())
}

/// What a session's captures are about, whichever server it stands on.
struct Kind<'a> {
    identity: &'a Identity,
    custom: BTreeSet<String>,
    setval: bool,
    /// The configuration of the server that the session comes from.
    reference: &'a Facts,
}

impl Kind<'_> {
    async fn capture(
        &self,
        connection: &mut Connection,
        facts: &Facts,
    ) -> Result<Captured, QueryError> {
        let version =
            connection.params.get("server_version").and_then(|text| ServerVersion::read(text));
        let authorization = connection.params.get("session_authorization");
        let other = authorization.is_some_and(|role| *role != self.identity.user);
        let subject = Subject {
            version: version.unwrap_or(ServerVersion(150_000)),
            custom: &self.custom,
            login_role: other.then_some(self.identity.user.as_str()),
            setval: self.setval,
            facts,
            reference: self.reference,
            in_recovery: connection.params.get("in_hot_standby").is_some_and(|value| value == "on"),
        };
        capture_on(connection, &subject).await
    }

    /// The same for a copy of `snapshot`, whose custom settings are all asked for.
    fn of_copy(&self, snapshot: &Snapshot) -> Kind<'_> {
        let custom = self.custom.iter().chain(snapshot.custom.keys()).cloned().collect();
        Kind { custom, identity: self.identity, setval: self.setval, reference: self.reference }
    }
}

/// Reads the state of a session on its own server, of which `facts` were learned. The session must be at a safe
/// point.
pub(crate) async fn capture(session: &mut Session, facts: &Facts) -> Result<Captured, Reason> {
    let mut connection = borrow(session).map_err(failed)?;
    let identity = session.identity.clone();
    let kind = Kind {
        identity: &identity,
        custom: session.hints.custom.clone(),
        setval: session.hints.setval,
        reference: facts,
    };
    if session.protocol.is_doubtful() {
        if let Err(error) = end_doubt(&mut connection).await {
            give_back(session, connection, false).map_err(failed)?;
            return Err(Reason::ServerLost { error: model::chain(&error) });
        }
        session.protocol.end_doubt();
    }
    let mut result = kind.capture(&mut connection, facts).await;
    for _ in 1..CAPTURE_TRIES {
        match &result {
            Err(error) if error.sqlstate() == Some(SqlState::QUERY_CANCELED) => {
                result = kind.capture(&mut connection, facts).await;
            }
            _ => break,
        }
    }
    let in_step = matches!(&result, Ok(_) | Err(QueryError::Server { .. }));
    give_back(session, connection, in_step).map_err(failed)?;
    let mut captured = result.map_err(|error| match error.sqlstate() {
        // Such as a sequence that somebody is altering; it may be free the next time.
        Some(SqlState::LOCK_NOT_AVAILABLE) => Reason::Busy { what: error.to_string() },
        _ if in_step => failed(error),
        _ => Reason::ServerLost { error: model::chain(&error) },
    })?;
    captured.pins.extend(session.known_pins());
    if session.restyled {
        let why = "was prepared under another DateStyle, TimeZone or IntervalStyle";
        let pins = captured.snapshot.prepared.iter().filter(|(_, p)| p.text.contains('\''));
        let pins = pins.map(|(name, _)| Pin::Prepared { name: name.clone(), why: why.into() });
        let pins: Vec<Pin> = pins.collect();
        captured.pins.extend(pins);
    }
    match session.protocol.unnamed() {
        Unnamed::Earlier => captured.pins.push(Pin::Unnamed),
        Unnamed::Last if session.unnamed_too_long => captured.pins.push(Pin::TooLarge {
            what: "the unnamed statement".into(),
            size: u64::MAX,
            max: u64::try_from(crate::relay::UNNAMED_LEN_MAX).unwrap_or(0),
        }),
        Unnamed::Last | Unnamed::Absent => (),
    }
    Ok(captured)
}

/// Finds out whether the server has still to answer a Sync: what comes before the answer to our own question is
/// the client's.
async fn end_doubt(connection: &mut Connection) -> Result<(), QueryError> {
    let mut out = Vec::new();
    frontend::close(&mut out, frontend::Target::Statement(STATEMENT_NAME.as_bytes()));
    frontend::sync(&mut out);
    let ask = async {
        connection.send(&out).await?;
        loop {
            let message = connection.receive().await?;
            match message.tag {
                b'3' => return connection.answers().await.map(drop),
                b'S' => (),
                _ => connection.aside.extend_from_slice(&message.raw()),
            }
        }
    };
    timeout(ANSWER_MAX, ask).await.unwrap_or(Err(QueryError::Timeout(ANSWER_MAX)))
}

/// Asks the fenced server once more: how often each advisory lock is held, and, by asking anything at all, for
/// notifications that were sent since the session was read. Nobody else may be able to take the locks: every client
/// is held. After an error the session has lost its server.
pub(crate) async fn hear_out(session: &mut Session, snapshot: &mut Snapshot) -> Result<(), Reason> {
    let mut connection = borrow(session).map_err(failed)?;
    let heard = if snapshot.locks.is_empty() {
        let mut out = Vec::new();
        frontend::sync(&mut out);
        exchange(&mut connection, &out).await.map(drop)
    } else {
        ask_counts(&mut connection, snapshot).await
    };
    give_back(session, connection, heard.is_ok()).map_err(failed)?;
    heard.map_err(failed)
}

/// Sends what is in `out` and reads the answers up to the last ReadyForQuery of `syncs`.
async fn exchange(connection: &mut Connection, out: &[u8]) -> Result<Vec<Answer>, QueryError> {
    let ask = async {
        connection.send(out).await?;
        connection.answers().await
    };
    timeout(ANSWER_MAX, ask).await.unwrap_or(Err(QueryError::Timeout(ANSWER_MAX)))
}

async fn capture_on(
    connection: &mut Connection,
    subject: &Subject<'_>,
) -> Result<Captured, QueryError> {
    let mut out = Vec::new();
    for (question, params) in &capture::questions(subject).0 {
        let params: Vec<&str> = params.iter().map(String::as_str).collect();
        Connection::add_statement(&mut out, STATEMENT_NAME, question, &params);
    }
    frontend::sync(&mut out);
    let ask = async {
        connection.send(&out).await?;
        connection.answers_of(|answer, row| capture::matters(subject, answer, row)).await
    };
    let answers = timeout(ANSWER_MAX, ask).await.unwrap_or(Err(QueryError::Timeout(ANSWER_MAX)));
    let answers = match answers {
        Ok(answers) => answers,
        Err(error) => {
            roll_back(connection).await?;
            return Err(error);
        }
    };
    let infos_of = |answers: &[Answer]| -> Vec<String> {
        answers.iter().flat_map(|answer| &answer.infos).cloned().collect()
    };
    let mut infos = infos_of(&answers);
    if capture::asks_sequences(subject, &infos) {
        let mut out = Vec::new();
        for (question, _) in &capture::first_questions(subject).0 {
            Connection::add_statement(&mut out, STATEMENT_NAME, question, &[]);
        }
        Connection::add_statement(&mut out, STATEMENT_NAME, capture::SEQUENCES, &[]);
        Connection::add_statement(&mut out, STATEMENT_NAME, "COMMIT", &[]);
        frontend::sync(&mut out);
        match exchange(connection, &out).await {
            Ok(answers) => infos.extend(infos_of(&answers)),
            Err(error) => {
                roll_back(connection).await?;
                return Err(error);
            }
        }
    }
    let rows = |at: usize| answers.get(at).map(|answer| answer.rows.as_slice()).unwrap_or_default();
    capture::read(subject, rows, &infos).map_err(|error| QueryError::Server {
        sqlstate: SqlState::INTERNAL_ERROR,
        message: error.to_string(),
    })
}

/// Locks are let go of and taken again here, which no rollback takes back. So the session's timeouts are put
/// aside, and an error that is left leaves a session that must not go on as if nothing had happened.
async fn ask_counts(
    connection: &mut Connection,
    snapshot: &mut Snapshot,
) -> Result<(), QueryError> {
    let mut out = Vec::new();
    let ours = "SELECT pg_catalog.set_config('search_path', 'pg_catalog', true)";
    for sql in [capture::BEGIN, capture::PROTECT, ours, capture::COUNT_LOCKS, "COMMIT"] {
        Connection::add_statement(&mut out, STATEMENT_NAME, sql, &[]);
    }
    frontend::sync(&mut out);
    let answers = exchange(connection, &out).await.map_err(|error| {
        tracing::error!(%error, "counting advisory locks broke off");
        QueryError::Unexpected(b'E')
    })?;
    let infos = answers.iter().flat_map(|answer| &answer.infos);
    let counted: BTreeMap<AdvisoryLock, u32> =
        infos.filter_map(|info| capture::read_lock_count(info)).collect();
    if !counted.keys().eq(snapshot.locks.keys()) {
        return Err(QueryError::Unexpected(b'D'));
    }
    snapshot.locks = counted;
    Ok(())
}

/// After a refused statement our transaction is failed; the client's session must not see it.
async fn roll_back(connection: &mut Connection) -> Result<(), QueryError> {
    if connection.status == wire::backend::TxStatus::Idle {
        // The statement's name may be left behind by an error between its Parse and its Close.
        let mut out = Vec::new();
        frontend::close(&mut out, frontend::Target::Statement(STATEMENT_NAME.as_bytes()));
        frontend::sync(&mut out);
        return exchange(connection, &out).await.map(drop);
    }
    let mut out = Vec::new();
    frontend::close(&mut out, frontend::Target::Statement(STATEMENT_NAME.as_bytes()));
    Connection::add_statement(&mut out, STATEMENT_NAME, "ROLLBACK", &[]);
    frontend::sync(&mut out);
    exchange(connection, &out).await.map(drop)
}

/// What making a copy of a session takes.
pub(crate) struct Model<'a> {
    pub(crate) identity: &'a Identity,
    pub(crate) custom: &'a BTreeSet<String>,
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
    let login = Login {
        params: model.identity.params.clone(),
        credential: model.identity.credential.clone(),
    };
    let mut connection = cell.target.login(&login).await.map_err(failed)?;
    let snapshot = snapshot.beforehand();
    restore(&mut connection, model, &snapshot).await?;
    Ok(Prepared { cell: cell.name.clone(), connection, snapshot, unnamed: Vec::new() })
}

/// Makes a fresh server session equal to `snapshot`, and proves it by a second capture.
async fn restore(
    connection: &mut Connection,
    model: &Model<'_>,
    snapshot: &Snapshot,
) -> Result<(), Reason> {
    let kind = Kind {
        identity: model.identity,
        custom: model.custom.clone(),
        setval: false,
        reference: model.here,
    };
    let kind = kind.of_copy(snapshot);
    let look = async |connection: &mut Connection| {
        let captured = kind.capture(connection, model.there).await.map_err(failed)?;
        Ok(captured.snapshot.without_settings_of_server(snapshot, model.there))
    };
    let fresh = look(connection).await?;
    let steps = replay::steps(&fresh, snapshot, Phase::Standby, model.here);
    run_steps(connection, &steps, "COMMIT").await?;
    let again = look(connection).await?.beforehand();
    match snapshot.differences(&again).into_iter().next() {
        None => Ok(()),
        Some(pin) => Err(Reason::Pinned(pin)),
    }
}

/// Runs each step by itself, so that a refusal names what was refused; all of them in one transaction, under
/// settings that are in nobody's way. What the steps set stays when it is committed.
async fn run_steps(connection: &mut Connection, steps: &[Step], end: &str) -> Result<(), Reason> {
    if steps.is_empty() {
        return Ok(());
    }
    let mut out = Vec::new();
    let ours = |sql: &str, params: &[&str], out: &mut Vec<u8>| {
        Connection::add_statement(out, STATEMENT_NAME, sql, params);
        frontend::sync(out);
    };
    ours(capture::BEGIN, &[], &mut out);
    ours(capture::PROTECT, &[], &mut out);
    for step in steps {
        match step {
            Step::Run { sql, params, .. } => {
                let params: Vec<&str> = params.iter().map(String::as_str).collect();
                ours(sql, &params, &mut out);
            }
            Step::Prepare { sql, .. } => frontend::query(&mut out, sql.as_bytes()),
            Step::Parse { name, sql, types } => {
                frontend::parse(&mut out, name.as_bytes(), sql.as_bytes(), types);
                frontend::sync(&mut out);
            }
        }
    }
    ours(end, &[], &mut out);
    let ask = async {
        connection.send(&out).await?;
        let mut results = Vec::new();
        for _ in 0..steps.len() + 3 {
            results.push(connection.answers().await);
        }
        Ok::<_, QueryError>(results)
    };
    let results = timeout(ANSWER_MAX, ask).await.unwrap_or(Err(QueryError::Timeout(ANSWER_MAX)));
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

fn refused(step: &Step, error: &QueryError) -> Reason {
    let error = error.to_string();
    Reason::Pinned(match step {
        Step::Run { what, .. } => Pin::Refused { what: what.clone(), error },
        Step::Prepare { name, .. } | Step::Parse { name, .. } => {
            Pin::Prepared { name: name.clone(), why: format!("cannot be prepared again: {error}") }
        }
    })
}

/// Attaches the session to a primary, where its copy stands that was made beforehand.
pub(crate) async fn attach(
    session: &Session,
    snapshot: &Snapshot,
    prepared: Prepared,
    there: &Facts,
    here: &Facts,
) -> Result<Attached, Reason> {
    let Prepared { mut connection, snapshot: from, .. } = prepared;
    let steps = replay::steps(&from, snapshot, Phase::Primary, here);
    run_steps(&mut connection, &steps, "COMMIT").await?;
    if !snapshot.sequences.is_empty() {
        restore_sequences(&mut connection, session, snapshot, there, here).await?;
    }
    last_look(&mut connection, snapshot).await?;
    Ok(Attached { connection })
}

/// Gives `currval` and `lastval` their values, and asks for them again.
async fn restore_sequences(
    connection: &mut Connection,
    session: &Session,
    snapshot: &Snapshot,
    there: &Facts,
    here: &Facts,
) -> Result<(), Reason> {
    // The owner's rights may be the login's and not those of the role that the session has taken.
    let as_login = "SELECT pg_catalog.set_config('session_authorization', $1, true), \
        pg_catalog.set_config('role', 'none', true)";
    let as_login = Step::Run {
        what: "the session's login role".into(),
        sql: as_login.into(),
        params: vec![session.identity.user.clone()],
    };
    for group in replay::sequence_steps(snapshot) {
        let mut steps = vec![as_login.clone()];
        steps.extend(group);
        run_steps(connection, &steps, "ROLLBACK").await?;
    }
    let kind = Kind {
        identity: &session.identity,
        custom: session.hints.custom.clone(),
        setval: true,
        reference: here,
    };
    let mut again = kind.capture(connection, there).await.map_err(failed)?;
    again.name_sequences(here);
    let again = again.snapshot;
    let only = |from: &Snapshot| Snapshot {
        sequences: from.sequences.clone(),
        last_value: from.last_value,
        ..Snapshot::default()
    };
    match only(snapshot).differences(&only(&again)).into_iter().next() {
        None => Ok(()),
        Some(pin) => Err(Reason::Pinned(pin)),
    }
}

/// The server must be a primary and listen to what the session listens to. This is also the round trip in which parameters that changed at the promotion arrive.
async fn last_look(connection: &mut Connection, snapshot: &Snapshot) -> Result<(), Reason> {
    if snapshot.channels.is_empty() {
        // The server reports the end of its recovery by itself, with the answer to any message.
        let mut out = Vec::new();
        frontend::sync(&mut out);
        exchange(connection, &out).await.map_err(failed)?;
        if connection.params.get("in_hot_standby").map(String::as_str) != Some("off") {
            return Err(Reason::Failed { error: "the server is still in recovery".into() });
        }
        return Ok(());
    }
    let mut out = Vec::new();
    let question = "SELECT pg_catalog.pg_is_in_recovery()::pg_catalog.text UNION ALL \
        SELECT c FROM pg_catalog.pg_listening_channels() c";
    for sql in [capture::BEGIN, capture::PROTECT, question, "COMMIT"] {
        Connection::add_statement(&mut out, STATEMENT_NAME, sql, &[]);
    }
    frontend::sync(&mut out);
    let answers = exchange(connection, &out).await.map_err(failed)?;
    let rows = answers.into_iter().nth(2).unwrap_or_default().rows;
    let mut cells = rows.into_iter().filter_map(|row| row.into_iter().next().flatten());
    if cells.next().as_deref() != Some("false") {
        return Err(Reason::Failed { error: "the server is still in recovery".into() });
    }
    let channels: BTreeSet<String> = cells.collect();
    if channels != snapshot.channels {
        let error = "the server does not listen to the session's channels".into();
        return Err(Reason::Failed { error });
    }
    Ok(())
}

/// Parses the unnamed statement, as the client sent it. From then on everything of ours has a name and leaves it
/// alone.
async fn parse_unnamed(prepared: &mut Prepared, session: &Session) -> Result<(), Reason> {
    if session.protocol.unnamed() != Unnamed::Last || session.unnamed == prepared.unnamed {
        return Ok(());
    }
    // In a transaction of ours, as a standby refuses one of an isolation level that the session may have by default.
    let mut out = Vec::new();
    Connection::add_statement(&mut out, STATEMENT_NAME, capture::BEGIN, &[]);
    frontend::sync(&mut out);
    out.extend_from_slice(&session.unnamed);
    frontend::sync(&mut out);
    Connection::add_statement(&mut out, STATEMENT_NAME, "COMMIT", &[]);
    frontend::sync(&mut out);
    let connection = &mut prepared.connection;
    let ask = async {
        connection.send(&out).await?;
        connection.answers().await?;
        let parsed = connection.answers().await;
        connection.answers().await?;
        parsed
    };
    match timeout(ANSWER_MAX, ask).await.unwrap_or(Err(QueryError::Timeout(ANSWER_MAX))) {
        Ok(_) => {
            prepared.unnamed.clone_from(&session.unnamed);
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
/// its unnamed statement can be prepared there.
pub(crate) async fn ensure(
    session: &Session,
    snapshot: &Snapshot,
    prepared: Option<Prepared>,
    cell: &Cell,
    here: &Facts,
    there: &Facts,
) -> Result<Prepared, Reason> {
    let fits = prepared.filter(|prepared| {
        prepared.cell == cell.name && prepared.snapshot == snapshot.beforehand()
    });
    let mut prepared = match fits {
        Some(prepared) => prepared,
        None => {
            let custom = &session.hints.custom;
            let model = Model { identity: &session.identity, custom, here, there };
            prepare(&model, snapshot, cell).await?
        }
    };
    parse_unnamed(&mut prepared, session).await?;
    Ok(prepared)
}

impl Session {
    /// Swaps the server: from here on the session stands on the new one. Gives the old connection.
    pub(crate) fn swap(
        &mut self,
        attached: Attached,
        cell: std::sync::Arc<Cell>,
    ) -> std::io::Result<Leg> {
        let mut connection = attached.connection;
        let params: BTreeMap<String, String> = std::mem::take(&mut connection.params);
        let aside = std::mem::take(&mut connection.aside);
        let (pid, secret) = (connection.pid, std::mem::take(&mut connection.secret));
        let (stream, unread) = connection.into_stream();
        let server = Leg::new(stream.into_parts()?, unread, Side::Backend);
        let old = std::mem::replace(&mut self.server, server);
        self.backend_pid = pid;
        self.backend_secret = secret.into();
        self.cell = cell;
        self.moves += 1;
        // Every statement was prepared anew, under the settings of now.
        self.restyled = false;
        self.client.push(&aside);
        self.tell_params(&params);
        Ok(old)
    }

    /// Puts the pid that the client knows into notifications of its own backend.
    fn know_pids(&self, messages: &mut [u8]) {
        let mut at = 0;
        while let Some(rest) = messages.get_mut(at..)
            && let Ok(Some((tag, _, len))) = wire::frame::whole(Side::Backend, rest)
        {
            if tag == b'A' {
                self.on_notification(
                    rest.get_mut(wire::frame::HEADER_LEN..len).unwrap_or_default(),
                );
            }
            at += len;
        }
    }
}
