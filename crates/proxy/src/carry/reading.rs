//! Reading the state of a session on its own server.

use std::collections::{BTreeMap, BTreeSet};

use model::barrier::Reason;
use model::session::capture::{self, Captured, STATEMENT_NAME, ServerVersion, Subject};
use model::session::protocol::Unnamed;
use model::session::snapshot::AdvisoryLock;
use model::session::{Facts, Pin, Snapshot};
use pg::connection::{Answer, Connection, QueryError};
use tokio::time::timeout;
use wire::frontend;
use wire::sqlstate::SqlState;

use super::{ANSWER_MAX, borrow, exchange, failed, give_back};
use crate::session::{Identity, Session};

/// A late cancel request may hit a capture; it is tried again this often.
const CAPTURE_TRIES: usize = 3;

/// What a session's captures are about, whichever server it stands on.
pub(super) struct Kind<'a> {
    pub(super) identity: &'a Identity,
    pub(super) custom: BTreeSet<String>,
    pub(super) setval: bool,
    /// Nobody else tells what its backend holds.
    pub(super) alone: bool,
    /// The configuration of the server that the session comes from.
    pub(super) reference: &'a Facts,
}

impl Kind<'_> {
    pub(super) async fn capture(
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
            alone: self.alone,
            in_recovery: connection.params.get("in_hot_standby").is_some_and(|value| value == "on"),
        };
        capture_on(connection, &subject).await
    }

    /// The same for a copy of `snapshot`, whose custom settings are all asked for.
    pub(super) fn of_copy(&self, snapshot: &Snapshot) -> Kind<'_> {
        let custom = self.custom.iter().chain(snapshot.custom.keys()).cloned().collect();
        Kind { custom, ..*self }
    }
}

/// Reads the state of a session on its own server, of which `facts` were learned. The session must be at a safe
/// point.
pub(crate) async fn capture(
    session: &mut Session,
    facts: &Facts,
    alone: bool,
) -> Result<Captured, Reason> {
    let mut connection = borrow(session).map_err(failed)?;
    let identity = session.identity.clone();
    let kind = Kind {
        identity: &identity,
        custom: session.hints.custom.clone(),
        setval: session.hints.setval,
        alone,
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
        let why = "was prepared under another DateStyle, TimeZone, IntervalStyle or standard_conforming_strings";
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
