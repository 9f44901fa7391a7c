//! Where a session's protocol stands: every request that the server will answer, in order, one byte each.
//!
//! A session may be taken from its server only where nothing is under way. Looking at the last ReadyForQuery is
//! not enough: with pipelining it may answer an earlier Sync, and after an error the server skips messages that
//! were sent before it. So each request is queued when it is passed on and taken off when it is answered, and
//! an error takes off all that the server skips (manual, "Extended Query" and "Pipelining").

use std::collections::VecDeque;

use wire::backend::TxStatus;
use wire::sqlstate::SqlState;

/// Requests that may await an answer. At this many the client is not read until the server has answered some.
pub const REQUESTS_MAX: usize = 65_536;

/// A request that the server has not answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Request {
    Query,
    FunctionCall,
    Sync,
    ParseNamed,
    ParseUnnamed,
    Bind,
    DescribeStatement,
    DescribePortal,
    Execute,
    Close,
    CloseUnnamed,
    /// CopyDone or CopyFail, which end a COPY FROM STDIN and are not answered themselves.
    CopyEnd,
    /// Requests of ours, whose answers are not for the client.
    OwnQuery,
    OwnParse,
    OwnClose,
    /// Requests of the client that were not passed on: we answer them once it is their turn.
    GivenParse,
    GivenClose,
}

impl Request {
    /// It changes the name of a prepared statement, or a server's statements, see [`super::names`].
    fn is_about_names(self) -> bool {
        use Request::{GivenClose, GivenParse, OwnParse, ParseNamed};
        matches!(self, ParseNamed | OwnParse | GivenParse | GivenClose)
    }
}

/// What becomes of a message of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Pass,
    /// It answers a request of ours.
    Keep,
}

/// What we answer in the server's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Given {
    ParseComplete,
    CloseComplete,
}

/// A request of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Own {
    Query,
    Parse,
    /// Of a statement.
    Close,
}

/// What became of requests that change names: so many were answered, then so many skipped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Named {
    pub answered: usize,
    pub skipped: usize,
}

/// What the server keeps under the empty statement name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unnamed {
    Absent,
    /// The last Parse without a name that was passed on.
    Last,
    /// An earlier one: a later Parse was skipped after an error. Its text is no longer known.
    Earlier,
}

/// What an error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ErrorOrigin {
    /// The message could not be read, so nothing of it was done.
    Message,
    Statement,
}

/// What the relay must do after a message of the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Note {
    Nothing,
    /// Keep the text of this Parse: it is the unnamed statement if it succeeds.
    KeepUnnamed,
}

/// Where a session's protocol stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Protocol {
    requests: VecDeque<Request>,
    status: TxStatus,
    unnamed: Unnamed,
    /// Extended-query messages were passed on since the last Sync.
    batch_open: bool,
    /// The server ignores everything until the next Sync.
    skipping: bool,
    copy_in: bool,
    /// Syncs that the server may have read as part of a COPY that failed, and then ignored, or not: so many more
    /// ReadyForQuery may come. The next answer tells.
    doubtful: usize,
    out_of_step: bool,
    /// The running simple query may not have been read by the server, so that nothing of it was done.
    query_unread: bool,
    /// The open transaction has savepoints, so a failed one can still go on.
    savepoints: bool,
    named: Named,
    /// A query of ours was refused.
    own_refused: bool,
    /// An error was passed on, and the ReadyForQuery behind it was not.
    error_told: bool,
}

impl Default for Protocol {
    fn default() -> Protocol {
        Protocol::new()
    }
}

impl Protocol {
    /// A session right after its login.
    pub fn new() -> Protocol {
        Protocol {
            requests: VecDeque::new(),
            status: TxStatus::Idle,
            unnamed: Unnamed::Absent,
            batch_open: false,
            skipping: false,
            copy_in: false,
            doubtful: 0,
            out_of_step: false,
            query_unread: false,
            savepoints: false,
            named: Named::default(),
            own_refused: false,
            error_told: false,
        }
    }

    /// A request of ours is passed on. The client's wait until a query of ours is answered.
    pub fn on_own(&mut self, own: Own) {
        self.requests.push_back(match own {
            Own::Query => Request::OwnQuery,
            Own::Parse => Request::OwnParse,
            Own::Close => Request::OwnClose,
        });
        // A Close begins nothing on the server.
        self.batch_open |= own == Own::Parse;
    }

    /// A request of the client is not passed on, because its answer is known. The batch is open all the same.
    pub fn on_given(&mut self, given: Given) {
        self.requests.push_back(match given {
            Given::ParseComplete => Request::GivenParse,
            Given::CloseComplete => Request::GivenClose,
        });
        self.batch_open = true;
    }

    /// The answer that is to be given now, if it is the turn of one.
    #[inline]
    pub fn next_given(&mut self) -> Option<Given> {
        let given = match self.requests.front()? {
            Request::GivenParse => Given::ParseComplete,
            Request::GivenClose => Given::CloseComplete,
            _ => return None,
        };
        self.requests.pop_front();
        self.named.answered += 1;
        Some(given)
    }

    /// What has become of requests about names since this was asked last.
    #[inline]
    pub fn take_named(&mut self) -> Named {
        std::mem::take(&mut self.named)
    }

    /// A query of ours is running.
    #[inline]
    pub fn runs_own(&self) -> bool {
        self.requests.front() == Some(&Request::OwnQuery)
    }

    /// A query of ours was refused: nothing of the client may follow it.
    pub fn own_refused(&self) -> bool {
        self.own_refused
    }

    /// What was refused was only a question.
    pub fn forgive_own(&mut self) {
        self.own_refused = false;
    }

    /// The server ignores what it is sent up to the next Sync.
    pub fn is_skipping(&self) -> bool {
        self.skipping
    }

    /// Nothing is under way and no transaction is open that could still do anything: the session may be taken from
    /// its server.
    #[inline]
    pub fn is_safe_point(&self) -> bool {
        self.is_quiet() && self.is_at_rest()
    }

    /// Nothing is under way and no transaction is open.
    pub fn is_idle(&self) -> bool {
        self.is_quiet() && self.status == TxStatus::Idle
    }

    /// No transaction is open, or one that has failed and has no savepoint to go back to.
    #[inline]
    fn is_at_rest(&self) -> bool {
        match self.status {
            TxStatus::Idle => true,
            TxStatus::Failed => !self.savepoints,
            TxStatus::InTransaction => false,
        }
    }

    /// A SAVEPOINT has completed.
    pub fn on_savepoint(&mut self) {
        self.savepoints = true;
    }

    /// Nothing is under way; a transaction may be open.
    #[inline]
    pub fn is_quiet(&self) -> bool {
        self.requests.is_empty() && !self.batch_open && !self.skipping && !self.out_of_step
    }

    /// While a move is wanted, whether a message with `tag` must wait at its boundary: nothing new is begun, and
    /// a pipeline is let run dry, because its end may be a safe point.
    #[inline]
    pub fn must_wait(&self, tag: u8) -> bool {
        let begins = matches!(tag, b'Q' | b'P' | b'B' | b'E' | b'D' | b'C' | b'F' | b'S' | b'H');
        let between = !self.batch_open && !self.skipping && !self.copy_in;
        begins && between && (!self.requests.is_empty() || self.is_at_rest())
    }

    /// What is under way, in words, for those who wait for it.
    pub fn occupation(&self) -> &'static str {
        match (
            self.out_of_step,
            self.requests.is_empty(),
            self.batch_open || self.skipping,
            self.status,
        ) {
            (true, ..) => "answers are out of step",
            (_, false, ..) => "a request is running",
            (_, _, true, _) => "a pipeline is open without its Sync",
            _ if self.doubtful > 0 => {
                "a COPY has failed, and only the next answer tells where it stands"
            }
            (_, _, _, TxStatus::InTransaction) => "a transaction is open",
            (_, _, _, TxStatus::Failed) => "a failed transaction is open",
            (_, _, _, TxStatus::Idle) => "idle",
        }
    }

    /// Something that was sent before the open batch has still to be answered: whether it succeeds is not known.
    pub fn awaits_ready(&self) -> bool {
        use Request::{FunctionCall, Query, Sync};
        self.requests.iter().any(|request| matches!(request, FunctionCall | Query | Sync))
    }

    /// A batch has begun whose Sync was not sent.
    pub fn has_open_batch(&self) -> bool {
        self.batch_open || self.copy_in
    }

    /// The server waits for data of the client.
    pub fn is_copying_in(&self) -> bool {
        self.copy_in
    }

    /// Without another word of the client everything is answered: it has not left in the middle of a batch, which would
    /// wait for its Sync.
    pub fn comes_to_an_end(&self) -> bool {
        !self.batch_open && !self.skipping && !self.copy_in && !self.out_of_step
    }

    /// A request is running, so that a cancel request has something to cancel.
    pub fn is_running(&self) -> bool {
        !self.requests.is_empty()
    }

    /// The queue of requests is at its limit.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.requests.len() >= REQUESTS_MAX
    }

    /// One more ReadyForQuery may be on its way, for a Sync that the server may have ignored. Whoever takes the
    /// session must ask for something else first: what comes before that answer is the client's.
    pub fn is_doubtful(&self) -> bool {
        self.doubtful > 0
    }

    /// Whoever asked has seen that nothing more is on its way.
    pub fn end_doubt(&mut self) {
        self.doubtful = 0;
    }

    /// The server answered what was not asked, so the count is worth nothing from then on.
    pub fn is_out_of_step(&self) -> bool {
        self.out_of_step
    }

    pub fn status(&self) -> TxStatus {
        self.status
    }

    /// A Parse without a name is on its way.
    pub fn parses_unnamed(&self) -> bool {
        self.requests.contains(&Request::ParseUnnamed)
    }

    pub fn unnamed(&self) -> Unnamed {
        self.unnamed
    }

    /// A message of the client is passed on. `first` is the first byte of its body: the kind of a Describe or
    /// Close, or the zero that ends an empty name. `second` is the byte after it.
    #[inline]
    pub fn on_frontend(&mut self, tag: u8, first: Option<u8>, second: Option<u8>) -> Note {
        if self.skipping && tag != b'S' {
            // Whether the server skips it hangs on a Sync that it may have ignored.
            let asks = matches!(tag, b'Q' | b'F' | b'P' | b'B' | b'D' | b'E' | b'C');
            self.out_of_step |= asks && self.doubtful > 0;
            return Note::Nothing;
        }
        let request = match tag {
            b'Q' => Request::Query,
            b'F' => Request::FunctionCall,
            b'S' => {
                self.batch_open = false;
                self.skipping = false;
                self.requests.push_back(Request::Sync);
                return Note::Nothing;
            }
            b'P' if first == Some(0) => Request::ParseUnnamed,
            b'P' => Request::ParseNamed,
            b'B' => Request::Bind,
            b'D' if first == Some(b'S') => Request::DescribeStatement,
            b'D' => Request::DescribePortal,
            b'E' => Request::Execute,
            b'C' if first == Some(b'S') && second == Some(0) => Request::CloseUnnamed,
            b'C' => Request::Close,
            // They may come before the server has said that it copies; without a COPY they mean nothing.
            b'c' | b'f' => {
                if !self.requests.is_empty() {
                    self.requests.push_back(Request::CopyEnd);
                }
                return Note::Nothing;
            }
            // Data is part of a COPY; Flush asks for answers and has none; Terminate ends everything.
            _ => return Note::Nothing,
        };
        self.batch_open |= !matches!(request, Request::Query | Request::FunctionCall);
        self.requests.push_back(request);
        if request == Request::ParseUnnamed { Note::KeepUnnamed } else { Note::Nothing }
    }

    /// A message of the server arrives. `status` is the byte of a ReadyForQuery.
    #[inline]
    pub fn on_backend(&mut self, tag: u8, status: Option<TxStatus>) -> Fate {
        match self.requests.front() {
            // A notification is never ours.
            Some(Request::OwnQuery) if tag != b'A' => {
                self.on_own_answer(tag, status);
                return Fate::Keep;
            }
            Some(Request::OwnParse) if tag == b'1' => {
                self.answered();
                return Fate::Keep;
            }
            Some(Request::OwnClose) if tag == b'3' => {
                self.answered();
                return Fate::Keep;
            }
            _ => (),
        }
        self.on_answer(tag, status);
        Fate::Pass
    }

    #[cold]
    fn on_own_answer(&mut self, tag: u8, status: Option<TxStatus>) {
        match tag {
            b'E' => self.own_refused = true,
            b'Z' => {
                self.answered();
                self.take_status(status);
            }
            _ => (),
        }
    }

    #[inline]
    fn on_answer(&mut self, tag: u8, status: Option<TxStatus>) {
        // Rows, notices, parameters and notifications answer nothing by themselves.
        if matches!(tag, b'D' | b'd' | b'N' | b'S' | b'A' | b't' | b'c' | b'K' | b'V') {
            return;
        }
        if !self.copy_in {
            self.pass_copy_ends();
        }
        if !matches!(tag, b'Z' | b'E') {
            // A ReadyForQuery that was due would have come before this.
            self.doubtful = 0;
        }
        match tag {
            b'Z' => self.on_ready(status),
            b'1' => match self.requests.front() {
                Some(Request::ParseNamed) => self.answered(),
                Some(Request::ParseUnnamed) => {
                    self.answered();
                    // If another is on its way, that one's text was kept over this one's.
                    let last = !self.requests.contains(&Request::ParseUnnamed);
                    self.unnamed = if last { Unnamed::Last } else { Unnamed::Earlier };
                }
                _ => self.out_of_step = true,
            },
            b'2' => self.answers(Request::Bind),
            b'3' => match self.requests.front() {
                Some(Request::Close) => self.answered(),
                Some(Request::CloseUnnamed) => {
                    self.answered();
                    self.unnamed = Unnamed::Absent;
                }
                _ => self.out_of_step = true,
            },
            b'T' | b'n' => match self.requests.front() {
                Some(Request::DescribeStatement | Request::DescribePortal) => self.answered(),
                Some(Request::Query) => (),
                _ => self.out_of_step = true,
            },
            b'C' | b'I' | b's' => match self.requests.front() {
                Some(Request::Execute) => {
                    self.answered();
                    self.end_copy_in();
                }
                Some(Request::Query) => self.copy_in = false,
                _ => self.out_of_step = true,
            },
            b'G' => match self.requests.front() {
                Some(Request::Execute | Request::Query) => self.copy_in = true,
                _ => self.out_of_step = true,
            },
            b'E' => self.on_error(ErrorOrigin::Statement),
            _ => (),
        }
    }

    /// An error of the server is passed on, with its code. A Parse whose bytes could not be decoded was not
    /// carried out at all, so the unnamed statement before it lives on (`exec_parse_message` drops it only once
    /// the message is read).
    #[inline]
    pub fn on_backend_error(&mut self, state: Option<SqlState>) -> Fate {
        if self.runs_own() {
            return self.on_backend(b'E', None);
        }
        self.on_error(match state {
            Some(
                SqlState::CHARACTER_NOT_IN_REPERTOIRE
                | SqlState::UNTRANSLATABLE_CHARACTER
                | SqlState::PROTOCOL_VIOLATION,
            ) => ErrorOrigin::Message,
            _ => ErrorOrigin::Statement,
        });
        Fate::Pass
    }

    fn answered(&mut self) {
        let answered = self.requests.pop_front();
        self.named.answered += usize::from(answered.is_some_and(Request::is_about_names));
    }

    /// Ends of a COPY that was none are read and ignored.
    fn pass_copy_ends(&mut self) {
        while self.requests.front() == Some(&Request::CopyEnd) {
            self.answered();
        }
    }

    fn answers(&mut self, request: Request) {
        if self.requests.front() == Some(&request) {
            self.answered();
        } else {
            self.out_of_step = true;
        }
    }

    fn on_ready(&mut self, status: Option<TxStatus>) {
        self.error_told = false;
        // One more than was certain. A Sync alone gets one that looks the same, so it stays in doubt.
        if self.doubtful > 0 && self.requests.front() != Some(&Request::Sync) {
            self.doubtful -= 1;
            self.skipping = false;
            self.take_status(status);
            return;
        }
        match self.requests.front() {
            Some(Request::Query) => {
                self.answered();
                // A simple query drops the unnamed statement before it runs (`exec_simple_query`).
                let unread = std::mem::take(&mut self.query_unread);
                let lives_on = unread && self.unnamed != Unnamed::Absent;
                self.unnamed = if lives_on { Unnamed::Earlier } else { Unnamed::Absent };
            }
            Some(Request::FunctionCall | Request::Sync) => self.answered(),
            _ => self.out_of_step = true,
        }
        // A COPY that failed under a simple query leaves its end unanswered.
        self.pass_copy_ends();
        self.copy_in = false;
        self.take_status(status);
    }

    fn take_status(&mut self, status: Option<TxStatus>) {
        match status {
            Some(status) => {
                self.status = status;
                self.savepoints &= status != TxStatus::Idle;
            }
            None => self.out_of_step = true,
        }
    }

    /// A COPY FROM STDIN of the extended protocol has ended. The server ignored each Sync that came before its
    /// end (`CopyGetData`), so those are answered by nothing.
    fn end_copy_in(&mut self) {
        if !self.copy_in {
            return;
        }
        self.copy_in = false;
        if let Some(end) = self.requests.iter().position(|request| *request == Request::CopyEnd) {
            self.requests.drain(..=end);
        }
        // The client owes a Sync that the server does not ignore; or has begun another batch behind it.
        self.batch_open |= !self.requests.contains(&Request::Sync);
    }

    fn on_error(&mut self, origin: ErrorOrigin) {
        self.error_told = true;
        if !self.copy_in {
            self.pass_copy_ends();
        }
        if !matches!(self.requests.front(), None | Some(Request::Sync)) {
            // It is about what was asked later than any Sync in doubt; one of those may fail as well.
            self.doubtful = 0;
        }
        match self.requests.front() {
            // The ReadyForQuery that follows answers these. With none, the error ends the connection.
            None | Some(Request::Query | Request::FunctionCall | Request::Sync) => {
                let query = self.requests.front() == Some(&Request::Query);
                self.query_unread = query && origin == ErrorOrigin::Message;
                self.copy_in = false;
                return;
            }
            Some(Request::ParseUnnamed) => {
                let lives_on = origin == ErrorOrigin::Message && self.unnamed != Unnamed::Absent;
                self.unnamed = if lives_on { Unnamed::Earlier } else { Unnamed::Absent };
            }
            Some(_) => (),
        }
        if std::mem::take(&mut self.copy_in) {
            // A Sync before the end of the data was ignored if the server has read that far (`CopyGetData`). If it
            // failed before, such as in a trigger, it is still to be answered.
            let end = self.requests.iter().position(|request| *request == Request::CopyEnd);
            let in_copy = end.unwrap_or(self.requests.len());
            let before = self.requests.len();
            // Anything else inside a COPY is refused, or done after it: a client that sends it is not counted on.
            let odd = |request: &Request| !matches!(request, Request::Sync);
            self.out_of_step |= self.requests.iter().take(in_copy).skip(1).any(odd);
            let mut at = 0;
            self.requests.retain(|request| {
                at += 1;
                at > in_copy || *request != Request::Sync
            });
            self.doubtful += before - self.requests.len();
        }
        while let Some(request) = self.requests.pop_front() {
            self.named.skipped += usize::from(request.is_about_names());
            match request {
                Request::Sync => {
                    self.requests.push_front(Request::Sync);
                    return;
                }
                Request::ParseUnnamed if self.unnamed != Unnamed::Absent => {
                    self.unnamed = Unnamed::Earlier;
                }
                _ => (),
            }
        }
        self.skipping = true;
    }

    /// Memory of the queue is given back once a session is idle.
    pub fn shrink(&mut self) {
        if self.requests.is_empty() && self.requests.capacity() > 64 {
            self.requests = VecDeque::new();
        }
    }
}

mod lost;
#[cfg(test)]
mod tests;

pub use lost::Reply;
