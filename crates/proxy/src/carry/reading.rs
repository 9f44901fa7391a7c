//! Reading the state of a session on its own server.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::barrier::Reason;
use model::session::capture::{
    self, BEGIN_READ, BEGIN_WRITE, Captured, STATEMENT_NAME, ServerVersion, Subject,
};
use model::session::protocol::Unnamed;
use model::session::snapshot::AdvisoryLock;
use model::session::statement;
use model::session::temporary::{self, Temporary};
use model::session::{Facts, Pin, Snapshot};
use pg::connection::{Answer, Connection, QueryError};
use tokio::time::timeout;
use wire::frontend;
use wire::sqlstate::SqlState;

use super::restoring::Model;
use super::{borrow, exchange, failed, give_back, roll_back};
use crate::config::MoveLimits;
use crate::session::{Identity, Session};

/// A late cancel request may hit a capture; it is tried again this often.
const CAPTURE_TRIES: usize = 3;

const RESTYLED: &str =
    "was prepared under another DateStyle, TimeZone, IntervalStyle or standard_conforming_strings";
const READ_ANEW: &str =
    "has a literal like a date, and its server may read it again, as the search path has changed";

/// What a session's captures are about, whichever server it stands on.
pub(super) struct Kind<'a> {
    pub(super) identity: &'a Identity,
    pub(super) custom: BTreeSet<String>,
    pub(super) libraries: BTreeSet<String>,
    pub(super) setval: bool,
    /// Nobody else tells what its backend holds.
    pub(super) alone: bool,
    /// What RESET would find is not known yet.
    pub(super) beneath: bool,
    pub(super) limits: MoveLimits,
    /// The configuration of the server that the session comes from.
    pub(super) reference: &'a Facts,
    /// Whether there are temporary objects is enough, they are not to be carried.
    pub(super) brief: bool,
}

impl<'a> Kind<'a> {
    pub(super) fn of(
        session: &Session,
        identity: &'a Identity,
        facts: &'a Facts,
        alone: bool,
    ) -> Kind<'a> {
        Kind {
            identity,
            custom: session.hints.custom.clone(),
            libraries: session.hints.libraries.clone(),
            setval: session.hints.setval,
            alone,
            beneath: session.beneath.is_none(),
            limits: session.app.moves,
            reference: facts,
            brief: false,
        }
    }

    pub(super) async fn capture(
        &self,
        connection: &mut Connection,
        facts: &Facts,
    ) -> Result<Captured, QueryError> {
        capture_on(connection, &self.subject(connection, facts), self.brief).await
    }

    pub(super) fn subject<'b>(&'b self, connection: &Connection, facts: &'b Facts) -> Subject<'b> {
        let version =
            connection.params.get("server_version").and_then(|text| ServerVersion::read(text));
        let authorization = connection.params.get("session_authorization");
        let other = authorization.is_some_and(|role| *role != self.identity.user);
        Subject {
            version: version.unwrap_or(ServerVersion(150_000)),
            custom: &self.custom,
            libraries: &self.libraries,
            login_role: other.then_some(self.identity.user.as_str()),
            setval: self.setval,
            facts,
            reference: self.reference,
            alone: self.alone,
            beneath: self.beneath,
            temporary_max: self.limits.temporary_max,
            in_recovery: connection.params.get("in_hot_standby").is_some_and(|value| value == "on"),
        }
    }

    pub(super) fn of_model(model: &Model<'a>) -> Kind<'a> {
        Kind {
            identity: model.identity,
            custom: model.custom.clone(),
            libraries: BTreeSet::new(),
            setval: false,
            alone: false,
            beneath: false,
            limits: model.limits,
            reference: model.here,
            brief: false,
        }
    }

    /// The same for a copy of `snapshot`, whose custom settings are all asked for.
    pub(super) fn of_copy(&self, snapshot: &Snapshot) -> Kind<'_> {
        let custom = self.custom.iter().chain(snapshot.custom.keys()).cloned().collect();
        Kind { custom, libraries: snapshot.libraries.clone(), ..*self }
    }
}

/// Reads the state of a session on its own server, of which `facts` were learned. The session must be at a safe
/// point.
pub(crate) async fn capture(
    session: &mut Session,
    facts: &Facts,
    alone: bool,
) -> Result<Captured, Reason> {
    read(session, facts, alone, false).await
}

/// The same, only to find out whether there is anything that must be carried.
pub(crate) async fn look(session: &mut Session, facts: &Facts) -> Result<Captured, Reason> {
    read(session, facts, true, true).await
}

async fn read(
    session: &mut Session,
    facts: &Facts,
    alone: bool,
    brief: bool,
) -> Result<Captured, Reason> {
    super::forget_foreign(session).await?;
    let mut connection = borrow(session).await?;
    let identity = session.identity.clone();
    let kind = Kind { brief, ..Kind::of(session, &identity, facts, alone) };
    if session.protocol.is_doubtful() {
        if let Err(error) = end_doubt(&mut connection).await {
            give_back(session, connection, false).await?;
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
    let in_step = is_in_step(&result);
    give_back(session, connection, in_step).await?;
    let mut captured = result.map_err(|error| match error.sqlstate() {
        // Such as a sequence that somebody is altering; it may be free the next time.
        Some(SqlState::LOCK_NOT_AVAILABLE) => Reason::Busy { what: error.to_string() },
        _ if in_step => failed(error),
        _ => Reason::ServerLost { error: model::chain(&error) },
    })?;
    match &captured.snapshot.beneath {
        // What a fence gives all sessions of its server is not beneath what they have, and is gone with it.
        Some(_) if !session.app.regime_now().state.takes_writes() => (),
        Some(beneath) => session.beneath = Some(Arc::new(beneath.clone())),
        None => captured.snapshot.beneath = session.beneath.as_deref().cloned(),
    }
    captured.pins.extend(session.known_pins());
    if session.restyled {
        let read = |text: &str| statement::has_literals(text.as_bytes());
        captured.pin_prepared(read, RESTYLED);
    }
    // Here the server may read such a statement anew, under what is set by then; elsewhere it has no reason to.
    let reads_anew = session.hints.paths || captured.temporary_schema != 0;
    if reads_anew && !session.restyled {
        let read = |text: &str| statement::is_read_by_settings(text.as_bytes());
        captured.pin_prepared(read, READ_ANEW);
    }
    if !captured.shadowing.is_empty() {
        let means_two = |(name, one): (&String, &model::session::snapshot::Prepared)| {
            let found = statement::names_one_of(one.text.as_bytes(), &captured.shadowing)?;
            let why = format!("names `{found}`, which is temporary and permanent");
            Some(Pin::Prepared { name: name.clone(), why })
        };
        let pins: Vec<Pin> = captured.snapshot.prepared.iter().filter_map(means_two).collect();
        captured.pins.extend(pins);
    }
    match session.protocol.unnamed() {
        Unnamed::Earlier => captured.pins.push(Pin::Unnamed),
        Unnamed::Last if session.unnamed_too_long => captured.pins.push(Pin::TooLarge {
            what: "the unnamed statement".into(),
            size: u64::MAX,
            max: u64::try_from(crate::relay::UNNAMED_LEN_MAX).unwrap_or(0),
        }),
        Unnamed::Last => {
            let body = session.unnamed.get(wire::frame::HEADER_LEN..).unwrap_or_default();
            let text = frontend::parse_head(body).map_or(body, |(_, sql)| sql);
            let why = if statement::holds_its_time(text) {
                "holds the time at which it was prepared"
            } else if statement::names_one_of(text, &captured.shadowing).is_some() {
                "names what is temporary and permanent"
            } else if session.unnamed_restyled && statement::has_literals(text) {
                RESTYLED
            } else if reads_anew && statement::is_read_by_settings(text) {
                READ_ANEW
            } else {
                return Ok(captured);
            };
            captured.pins.push(Pin::Prepared { name: "(unnamed)".into(), why: why.into() });
        }
        Unnamed::Absent => (),
    }
    Ok(captured)
}

/// What a fresh login gives, of which nobody has used anything.
pub(crate) async fn fresh(
    connection: &mut Connection,
    identity: &Identity,
    facts: &Facts,
    limits: MoveLimits,
) -> Result<Snapshot, Reason> {
    let custom = BTreeSet::new();
    let model = Model { identity, custom: &custom, limits, here: facts, there: facts };
    let kind = Kind { beneath: true, ..Kind::of_model(&model) };
    Ok(kind.capture(connection, facts).await.map_err(failed)?.snapshot)
}

/// Whether everything that was asked was answered, if only by an error.
pub(super) fn is_in_step<T>(result: &Result<T, QueryError>) -> bool {
    matches!(
        result,
        Ok(_) | Err(QueryError::Server { .. } | QueryError::NotText | QueryError::TooLong)
    )
}

/// Finds out whether the server has still to answer a Sync: what comes before the answer to our own question is
/// the client's.
async fn end_doubt(connection: &mut Connection) -> Result<(), QueryError> {
    let mut out = Vec::new();
    frontend::close(&mut out, frontend::Target::Statement(STATEMENT_NAME.as_bytes()));
    frontend::sync(&mut out);
    let wait_max = connection.answer_timeout;
    let ask = async {
        connection.ask(&out).await?;
        loop {
            let message = connection.receive().await?;
            match message.tag {
                b'3' => return connection.answers().await.map(drop),
                b'S' => (),
                _ => connection.aside.extend_from_slice(&message.raw()),
            }
        }
    };
    timeout(wait_max, ask).await.unwrap_or(Err(QueryError::Timeout(wait_max)))
}

/// Asks the fenced server once more: how often each advisory lock is held, and, by asking anything at all, for
/// notifications that were sent since the session was read. Nobody else may be able to take the locks: every client
/// is held. After an error the session has lost its server.
pub(crate) async fn hear_out(session: &mut Session, snapshot: &mut Snapshot) -> Result<(), Reason> {
    let mut connection = borrow(session).await?;
    let heard = if snapshot.locks.is_empty() {
        let mut out = Vec::new();
        frontend::sync(&mut out);
        exchange(&mut connection, &out).await.map(drop)
    } else {
        ask_counts(&mut connection, snapshot).await
    };
    give_back(session, connection, heard.is_ok()).await?;
    heard.map_err(failed)
}

async fn capture_on(
    connection: &mut Connection,
    subject: &Subject<'_>,
    brief: bool,
) -> Result<Captured, QueryError> {
    let mut out = Vec::new();
    for (question, params) in &capture::questions(subject).0 {
        let params: Vec<&str> = params.iter().map(String::as_str).collect();
        Connection::add_statement(&mut out, STATEMENT_NAME, question, &params);
    }
    frontend::sync(&mut out);
    let wait_max = connection.answer_timeout;
    let ask = async {
        connection.ask(&out).await?;
        connection.answers_of(|answer, row| capture::matters(subject, answer, row)).await
    };
    let answers = timeout(wait_max, ask).await.unwrap_or(Err(QueryError::Timeout(wait_max)));
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
        let asked =
            ask_aside(connection, subject, BEGIN_READ, &[capture::SEQUENCES.into()]).await?;
        infos.extend(infos_of(&asked));
    }
    let rows = |at: usize| answers.get(at).map(|answer| answer.rows.as_slice()).unwrap_or_default();
    let mut captured = capture::read(subject, rows, &infos).map_err(unreadable)?;
    if captured.temporary_schema != 0 && !subject.in_recovery {
        read_temporary(connection, subject, &mut captured, brief).await?;
    }
    Ok(captured)
}

fn unreadable(error: capture::Unreadable) -> QueryError {
    QueryError::Server { sqlstate: SqlState::INTERNAL_ERROR, message: error.to_string() }
}

/// Runs statements of ours in a transaction of their own, in a session whose settings, role and authorization are put
/// aside for it, and gives their answers.
pub(super) async fn ask_aside(
    connection: &mut Connection,
    subject: &Subject<'_>,
    begin: &str,
    statements: &[String],
) -> Result<Vec<Answer>, QueryError> {
    let mut out = Vec::new();
    let aside = capture::first_questions(subject).0;
    let before = [begin, aside.last().map_or("", |(question, _)| question), temporary::FORMATS];
    for sql in before.into_iter().chain(statements.iter().map(String::as_str)).chain(["COMMIT"]) {
        Connection::add_described(&mut out, STATEMENT_NAME, sql);
    }
    frontend::sync(&mut out);
    let answers = exchange(connection, &out).await?;
    Ok(answers.into_iter().skip(before.len()).take(statements.len()).collect())
}

/// Reads what the session has in its temporary schema.
async fn read_temporary(
    connection: &mut Connection,
    subject: &Subject<'_>,
    captured: &mut Captured,
    brief: bool,
) -> Result<(), QueryError> {
    let rows_of = |answer: Option<Answer>| answer.unwrap_or_default().rows;
    let answers = ask_aside(connection, subject, BEGIN_READ, &[temporary::QUESTION.into()]).await?;
    let rows = rows_of(answers.into_iter().next());
    let (mut found, aside) = Temporary::read(&rows).map_err(unreadable)?;
    if found.is_empty() && aside.pins.is_empty() {
        return Ok(());
    }
    let mut pins = aside.pins;
    if let Some(why) = &subject.facts.creating_refused {
        pins.push(Pin::Temporary { what: why.clone() });
    }
    if aside.size > subject.temporary_max {
        let (what, size, max) = ("temporary data".into(), aside.size, subject.temporary_max);
        pins.push(Pin::TooLarge { what, size, max });
    }
    let mut unclear = BTreeSet::new();
    let can_be_carried = pins.is_empty() && !brief;
    if can_be_carried && !found.tables.is_empty() {
        let answers =
            ask_aside(connection, subject, BEGIN_WRITE, &[temporary::PROBE.into()]).await?;
        let infos = answers.iter().flat_map(|answer| &answer.infos);
        unclear.extend(infos.filter_map(|info| temporary::read_unclear(info)));
        pins.extend(unclear.iter().map(|name| temporary::unclear(name)));
    }
    if can_be_carried {
        let mut questions = vec![temporary::EMPTY_FILES.into(), temporary::SHADOWING.into()];
        questions.extend(found.sequences_question());
        let mut answers = ask_aside(connection, subject, BEGIN_READ, &questions).await?.into_iter();
        let (files, shadowing) = (rows_of(answers.next()), rows_of(answers.next()));
        let names: BTreeSet<String> = shadowing.into_iter().flatten().flatten().collect();
        captured.shadowing = names;
        found.read_empty_files(&files, &unclear).map_err(unreadable)?;
        found.read_sequences(&rows_of(answers.next())).map_err(unreadable)?;
    }
    captured.snapshot.temporary = found;
    captured.analyzed = aside.analyzed;
    captured.pins.extend(pins);
    Ok(())
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
