//! Messages and queries on a logged-in connection.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use thiserror::Error;
use wire::Malformed;
use wire::backend::{Backend, TxStatus};
use wire::frame::{FrameError, HEADER_LEN, Side};
use wire::frontend::{self, Target};
use wire::sqlstate::SqlState;

use crate::connect::view;
use crate::stream::Stream;

/// Largest single message that is read whole. Rows of ours are far smaller; statement texts may not be.
pub const MESSAGE_LEN_MAX: usize = 64 * 1024 * 1024;
/// Notifications that are kept for the client; at more the connection is given up, never a notification.
const NOTIFICATIONS_LEN_MAX: usize = 16 * 1024 * 1024;
/// Notices that are kept for the client; more are dropped.
const NOTICES_LEN_MAX: usize = 64 * 1024;
/// Rows are sent in messages of this length.
const COPY_PART_LEN: usize = 64 * 1024;
/// What one COPY TO STDOUT may give.
const COPIED_LEN_MAX: usize = 256 * 1024 * 1024;

#[derive(Debug, Error)]
pub enum QueryError {
    #[error("connection was lost")]
    Io(#[source] io::Error),
    #[error("server sent what is not the protocol")]
    Frame(#[source] FrameError),
    #[error("server sent a malformed message")]
    Malformed(#[source] Malformed),
    #[error("server sent an unexpected message `{}`", char::from(*.0))]
    Unexpected(u8),
    #[error("server sent a message of more than {MESSAGE_LEN_MAX} bytes, or too many of them")]
    TooLong,
    #[error("server sent text that is not UTF-8")]
    NotText,
    #[error("{message} ({sqlstate})")]
    Server { sqlstate: SqlState, message: String },
    #[error("{what} was lost: {error}")]
    Lost { what: String, error: String },
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("the server has still to answer what was asked before")]
    OutOfStep,
    #[error("server's answer is of another shape")]
    Shape,
}

impl QueryError {
    pub fn sqlstate(&self) -> Option<SqlState> {
        match self {
            QueryError::Server { sqlstate, .. } => Some(*sqlstate),
            _ => None,
        }
    }
}

/// One message of the server, whole.
#[derive(Debug, Clone)]
pub struct Message {
    pub tag: u8,
    pub body: Vec<u8>,
}

impl Message {
    /// # Errors
    /// The body is not what the tag announces.
    pub fn view(&self) -> Result<Backend<'_>, QueryError> {
        view(self.tag, &self.body)
    }

    /// The message as it came.
    pub fn raw(&self) -> Vec<u8> {
        let len = u32::try_from(self.body.len() + 4).unwrap_or(u32::MAX);
        let mut raw = vec![self.tag];
        raw.extend_from_slice(&len.to_be_bytes());
        raw.extend_from_slice(&self.body);
        raw
    }
}

/// A row as text; binary results are never asked for.
pub type Row = Vec<Option<String>>;

/// The answer to one statement.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Answer {
    pub rows: Vec<Row>,
    pub tag: String,
    /// Texts of INFO messages.
    pub infos: Vec<String>,
    /// What was described: each column's name, type and its modifier.
    pub columns: Vec<(String, u32, i32)>,
    /// What COPY TO STDOUT gave.
    pub copied: Vec<u8>,
}

/// A logged-in connection.
#[derive(Debug)]
pub struct Connection {
    pub stream: Stream,
    /// Plaintext that is not a whole message yet.
    buffer: Vec<u8>,
    at: usize,
    pub pid: i32,
    pub secret: Vec<u8>,
    /// Parameters as the server reported them last.
    pub params: BTreeMap<String, String>,
    /// The hash that SCRAM binds to, of the server's certificate.
    pub end_point: Option<Vec<u8>>,
    /// Messages for the client that came while we asked for something else: notices and notifications.
    pub aside: Vec<u8>,
    pub status: TxStatus,
    /// How long its user waits for one answer.
    pub answer_timeout: Duration,
    /// Questions that were asked and are not answered to their end: whoever was to read on has given up. What comes next is the
    /// answer to nothing else.
    owed: usize,
}

const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

impl Connection {
    pub fn new(stream: Stream, received: Vec<u8>, end_point: Option<Vec<u8>>) -> Connection {
        Connection {
            stream,
            buffer: received,
            at: 0,
            pid: 0,
            secret: Vec::new(),
            params: BTreeMap::new(),
            end_point,
            aside: Vec::new(),
            status: TxStatus::Idle,
            answer_timeout: ANSWER_TIMEOUT,
            owed: 0,
        }
    }

    /// Takes the connection apart: the stream, and bytes that were received and not looked at.
    ///
    /// # Errors
    /// Something that was asked is not answered: whoever has the stream would read that as the answer to something else.
    pub fn into_stream(self) -> Result<(Stream, Vec<u8>), QueryError> {
        if self.owed > 0 {
            return Err(QueryError::OutOfStep);
        }
        let unread = self.buffer.get(self.at..).unwrap_or_default().to_vec();
        Ok((self.stream, unread))
    }

    /// Sends whole messages whose answers are read to their end before anything else is asked.
    ///
    /// # Errors
    /// The connection is lost, or answers to something before are still to come.
    pub async fn ask(&mut self, bytes: &[u8]) -> Result<(), QueryError> {
        if self.owed > 0 {
            return Err(QueryError::OutOfStep);
        }
        self.owed = frontend::answers_to(bytes);
        self.send(bytes).await
    }

    /// # Errors
    /// The connection is lost.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), QueryError> {
        self.stream.write_all(bytes).await.map_err(QueryError::Io)
    }

    /// The next message. Parameters are noted on the way.
    ///
    /// # Errors
    /// The connection is lost or does not carry the protocol.
    pub async fn receive(&mut self) -> Result<Message, QueryError> {
        let (tag, len) = self.arrived().await?;
        let body = self.buffer.get(self.at + HEADER_LEN..self.at + len).unwrap_or_default();
        let message = Message { tag, body: body.to_vec() };
        self.pass(len);
        self.note(&message)?;
        Ok(message)
    }

    /// Goes on behind a message of `len` bytes.
    fn pass(&mut self, len: usize) {
        self.at += len;
        if self.at == self.buffer.len() {
            self.buffer.clear();
            self.at = 0;
        }
    }

    /// Waits until the next message is here as a whole; gives its tag, and its length with its header. One that is too
    /// long is passed over, and is an error.
    async fn arrived(&mut self) -> Result<(u8, usize), QueryError> {
        loop {
            let rest = self.buffer.get(self.at..).unwrap_or_default();
            let header = Side::Backend.header(rest).map_err(QueryError::Frame)?;
            let body_len = header.map_or(0, |header| header.body_len);
            let len = HEADER_LEN + usize::try_from(body_len).unwrap_or(usize::MAX - HEADER_LEN);
            if let Some(header) = header.filter(|_| rest.len() >= len && len <= MESSAGE_LEN_MAX) {
                return Ok((header.tag, len));
            }
            if len > MESSAGE_LEN_MAX {
                let here = len.min(rest.len());
                let mut left = len - here;
                self.buffer.drain(..self.at + here);
                self.at = 0;
                while left > 0 {
                    self.read_more().await?;
                    let passed = left.min(self.buffer.len());
                    self.buffer.drain(..passed);
                    left -= passed;
                }
                return Err(QueryError::TooLong);
            }
            self.buffer.drain(..self.at);
            self.at = 0;
            self.read_more().await?;
        }
    }

    async fn read_more(&mut self) -> Result<(), QueryError> {
        if self.stream.read(&mut self.buffer).await.map_err(QueryError::Io)? == 0 {
            return Err(QueryError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(())
    }

    fn note(&mut self, message: &Message) -> Result<(), QueryError> {
        match message.tag {
            b'S' => {
                if let Backend::ParameterStatus { name, value } = message.view()? {
                    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                    self.params.insert(text(name), text(value));
                }
            }
            b'Z' => {
                if let Backend::Ready(status) = message.view()? {
                    self.status = status;
                    self.owed = self.owed.saturating_sub(1);
                }
            }
            _ => (),
        }
        Ok(())
    }

    pub(crate) fn keep_notice(&mut self, message: &Message) {
        if self.aside.len() + message.body.len() <= NOTICES_LEN_MAX {
            self.aside.extend_from_slice(&message.raw());
        }
    }

    pub(crate) async fn wait_closed(&mut self) {
        let mut ignored = Vec::new();
        while self.stream.read(&mut ignored).await.is_ok_and(|len| len > 0) {
            ignored.clear();
        }
    }

    /// Runs a simple query and gives the answer of each of its statements.
    ///
    /// # Errors
    /// The connection is lost, or the server refuses a statement; the others have been run or skipped as it
    /// does.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Answer>, QueryError> {
        let mut out = Vec::new();
        frontend::query(&mut out, sql.as_bytes());
        self.ask(&out).await?;
        self.answers().await
    }

    /// Rows of a query of one statement.
    ///
    /// # Errors
    /// As [`Connection::query`].
    pub async fn rows(&mut self, sql: &str) -> Result<Vec<Row>, QueryError> {
        Ok(self.query(sql).await?.into_iter().next().unwrap_or_default().rows)
    }

    /// The first column of the first row.
    ///
    /// # Errors
    /// As [`Connection::query`].
    pub async fn value(&mut self, sql: &str) -> Result<Option<String>, QueryError> {
        let rows = self.rows(sql).await?;
        Ok(rows.into_iter().next().and_then(|row| row.into_iter().next()).flatten())
    }

    /// Answers up to ReadyForQuery. On an error the rest is read as well, so that the connection is in step.
    ///
    /// # Errors
    /// As [`Connection::query`].
    pub async fn answers(&mut self) -> Result<Vec<Answer>, QueryError> {
        self.read_answers(|_, _| true, false).await
    }

    /// As [`Connection::answers`], to statements that the rows of a COPY FROM STDIN were sent for already.
    ///
    /// # Errors
    /// As [`Connection::query`].
    pub async fn answers_to_copies(&mut self) -> Result<Vec<Answer>, QueryError> {
        self.read_answers(|_, _| true, true).await
    }

    /// As [`Connection::answers`], with those rows only for which `wanted` says so, by the number of their answer
    /// and their values.
    ///
    /// # Errors
    /// As [`Connection::query`].
    pub async fn answers_of(
        &mut self,
        wanted: impl Fn(usize, &[Option<&[u8]>]) -> bool,
    ) -> Result<Vec<Answer>, QueryError> {
        self.read_answers(wanted, false).await
    }

    async fn read_answers(
        &mut self,
        wanted: impl Fn(usize, &[Option<&[u8]>]) -> bool,
        is_fed: bool,
    ) -> Result<Vec<Answer>, QueryError> {
        let (mut answers, mut current, mut error) = (Vec::new(), Answer::default(), None);
        loop {
            let (tag, len) = match self.arrived().await {
                Err(QueryError::TooLong) => {
                    error = error.or(Some(QueryError::TooLong));
                    continue;
                }
                other => other?,
            };
            if tag == b'D' {
                // Rows are most of what comes, so they are looked at where they lie.
                let body = self.buffer.get(self.at + HEADER_LEN..self.at + len).unwrap_or_default();
                if let Backend::DataRow(values) = view(tag, body)?
                    && wanted(answers.len(), &values)
                {
                    // Never anything else than what was sent: it may be sent back.
                    let text = |value: Option<&[u8]>| {
                        value.map(|bytes| std::str::from_utf8(bytes).map(str::to_owned)).transpose()
                    };
                    match values.into_iter().map(text).collect() {
                        Ok(row) => current.rows.push(row),
                        Err(_) => error = error.or(Some(QueryError::NotText)),
                    }
                }
                self.pass(len);
                continue;
            }
            let message = self.receive().await?;
            match message.view()? {
                Backend::CommandComplete { tag } => {
                    current.tag = String::from_utf8_lossy(tag).into_owned();
                    answers.push(std::mem::take(&mut current));
                }
                Backend::EmptyQuery => answers.push(std::mem::take(&mut current)),
                // Of statements of ours; logins have theirs kept.
                Backend::Notice(fields) if fields.field(b'V') == Some(b"INFO") => {
                    current.infos.push(fields.message());
                }
                // Never dropped: the client was promised every one.
                Backend::Notification { .. } if self.aside.len() > NOTIFICATIONS_LEN_MAX => {
                    return Err(QueryError::TooLong);
                }
                Backend::Notification { .. } => self.aside.extend_from_slice(&message.raw()),
                Backend::Error(fields) => {
                    let sqlstate = fields.sqlstate().unwrap_or(SqlState::INTERNAL_ERROR);
                    error.get_or_insert(QueryError::Server { sqlstate, message: fields.message() });
                }
                Backend::Ready(_) => return error.map_or(Ok(answers), Err),
                Backend::RowDescription(columns) => {
                    let text = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
                    let column =
                        |c: &wire::backend::Column<'_>| (text(c.name), c.type_oid, c.type_modifier);
                    current.columns = columns.iter().map(column).collect();
                }
                Backend::CopyData(data) => {
                    if current.copied.len() + data.len() > COPIED_LEN_MAX {
                        error = error.or(Some(QueryError::TooLong));
                    } else {
                        current.copied.extend_from_slice(data);
                    }
                }
                Backend::CopyIn(_) if is_fed => (),
                Backend::CopyIn(_) | Backend::CopyBoth(_) => {
                    return Err(QueryError::Unexpected(message.tag));
                }
                _ => (),
            }
        }
    }

    /// The columns that a statement would give: each one's name, type and its modifier. It is not run.
    ///
    /// # Errors
    /// As [`Connection::query`].
    pub async fn columns_of(
        &mut self,
        name: &str,
        sql: &str,
    ) -> Result<Vec<(String, u32, i32)>, QueryError> {
        let (mut out, statement) = (Vec::new(), Target::Statement(name.as_bytes()));
        frontend::parse(&mut out, name.as_bytes(), sql.as_bytes(), &[]);
        frontend::describe(&mut out, statement);
        frontend::close(&mut out, statement);
        // An empty statement has an answer, which is the one that the columns are part of.
        Connection::add_statement(&mut out, name, "", &[]);
        frontend::sync(&mut out);
        self.ask(&out).await?;
        let answers = self.answers().await?;
        Ok(answers.into_iter().next().unwrap_or_default().columns)
    }

    /// Appends a COPY FROM STDIN and its rows, as [`Connection::add_statement`].
    pub fn add_copy(out: &mut Vec<u8>, name: &str, sql: &str, rows: &[u8]) {
        let name = name.as_bytes();
        frontend::parse(out, name, sql.as_bytes(), &[]);
        frontend::bind_text(out, b"", name, &[]);
        frontend::execute(out, b"", 0);
        for part in rows.chunks(COPY_PART_LEN) {
            frontend::copy_data(out, part);
        }
        frontend::copy_done(out);
        frontend::close(out, Target::Statement(name));
    }

    /// As [`Connection::add_statement`], with a description of the columns.
    pub fn add_described(out: &mut Vec<u8>, name: &str, sql: &str) {
        let name = name.as_bytes();
        frontend::parse(out, name, sql.as_bytes(), &[]);
        frontend::describe(out, Target::Statement(name));
        frontend::bind_text(out, b"", name, &[]);
        frontend::execute(out, b"", 0);
        frontend::close(out, Target::Statement(name));
    }

    /// Appends one statement to a pipeline, under a name so that the unnamed statement is left alone.
    pub fn add_statement(out: &mut Vec<u8>, name: &str, sql: &str, params: &[&str]) {
        let name = name.as_bytes();
        frontend::parse(out, name, sql.as_bytes(), &[]);
        let params: Vec<Option<&[u8]>> =
            params.iter().map(|param| Some(param.as_bytes())).collect();
        frontend::bind_text(out, b"", name, &params);
        frontend::execute(out, b"", 0);
        frontend::close(out, Target::Statement(name));
    }
}
