//! The loop that moves bytes. A thread owns the sockets of its sessions and asks nobody.
//!
//! Sessions come in by [`EngineHandle::add`] and go out when they end, or when somebody [wants](Want) them and
//! they are at a safe point.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use model::barrier::SessionView;
use tokio::sync::{mpsc, oneshot};
use wire::backend::Report;

use crate::app::{App, Cell};
use crate::pool::keeper::Job;
use crate::pool::{NotOpened, Pool, Server};
use crate::session::Session;

pub use lending::PoolView;

mod leg;
mod lending;
mod poll;
mod pooling;
#[allow(unsafe_code)]
mod sys;

/// Raises the limit of open descriptors as far as allowed, and gives it.
pub fn raise_descriptor_limit() -> u64 {
    sys::raise_descriptor_limit()
}

/// Which sessions are wanted.
#[derive(Debug, Clone)]
pub enum Want {
    App(Arc<App>),
    One(u64),
}

/// Where a cancel request goes.
#[derive(Debug)]
pub struct CancelTo {
    pub cell: Arc<Cell>,
    pub pid: i32,
    pub secret: Box<[u8]>,
    pub under_way: Arc<AtomicU32>,
}

pub type Out = mpsc::UnboundedSender<Box<Session>>;

/// What an engine is asked to do. The queue holds at most a command a session and a few of operators.
pub(crate) enum Command {
    Add(Box<Session>),
    /// Hand out sessions at their next safe point. At most one taker at a time.
    Want(Want, Out),
    /// Nobody wants them any more.
    Unwant(Want),
    /// Take the sessions of an application from their servers, which are lost.
    Cut(Arc<App>),
    /// End sessions with this report, whatever they are doing.
    End(Want, Report),
    /// Forward a cancel request if something is running.
    Cancel(u64, oneshot::Sender<Option<CancelTo>>),
    Views(oneshot::Sender<Vec<SessionView>>),
    Pools(oneshot::Sender<Vec<PoolView>>),
    /// Sessions that wait until names are known may go on.
    Resume(Arc<App>),
    /// A server that was asked for, or why it cannot be opened.
    Opened(Arc<Pool>, Result<Box<Server>, NotOpened>),
    Stop,
}

/// Counted by the engine, read by whoever wants to know.
#[derive(Debug, Default)]
pub struct Counters {
    pub bytes_in: AtomicU64,
    pub bytes_out: AtomicU64,
    pub requests: AtomicU64,
    pub ended: AtomicU64,
    pub lost_server: AtomicU64,
    /// Sessions that went on although their server was lost.
    pub outlived: AtomicU64,
    pub protocol_errors: AtomicU64,
}

pub struct EngineHandle {
    queue: Mutex<VecDeque<Command>>,
    wake: OwnedFd,
    pub counters: Counters,
    /// Who opens servers and looks at sessions.
    keeper: OnceLock<mpsc::UnboundedSender<Job>>,
}

impl EngineHandle {
    /// Starts an engine thread.
    ///
    /// # Errors
    /// The system gives no thread or no descriptors.
    pub fn start(
        name: &str,
        idle_timeout_s: u32,
        clock: Clock,
    ) -> io::Result<(Arc<EngineHandle>, std::thread::JoinHandle<()>)> {
        let wake = sys::eventfd()?;
        let handle = Arc::new(EngineHandle {
            queue: Mutex::default(),
            wake,
            counters: Counters::default(),
            keeper: OnceLock::new(),
        });
        let poll = poll::Engine::new(handle.clone(), idle_timeout_s, clock)?;
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || poll.run())?;
        Ok((handle, thread))
    }

    pub(crate) fn send(&self, command: Command) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(command);
        sys::notify(self.wake.as_raw_fd());
    }

    pub fn add(&self, session: Box<Session>) {
        self.send(Command::Add(session));
    }

    pub(crate) fn take(&self) -> VecDeque<Command> {
        std::mem::take(&mut *self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set_keeper(&self, keeper: mpsc::UnboundedSender<Job>) {
        // It is set once, before there is a session.
        let _ = self.keeper.set(keeper);
    }

    pub async fn pools(&self) -> Vec<PoolView> {
        let (tx, rx) = oneshot::channel();
        self.send(Command::Pools(tx));
        rx.await.unwrap_or_default()
    }

    pub async fn views(&self) -> Vec<SessionView> {
        let (tx, rx) = oneshot::channel();
        self.send(Command::Views(tx));
        rx.await.unwrap_or_default()
    }
}

/// Seconds since the proxy started, kept by a single ticker so that nobody asks the system for each message.
#[derive(Debug, Clone)]
pub struct Clock(Arc<AtomicU32>);

impl Clock {
    pub fn new() -> Clock {
        Clock(Arc::new(AtomicU32::new(0)))
    }

    pub fn seconds(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    pub fn set(&self, seconds: u32) {
        self.0.store(seconds, Ordering::Relaxed);
    }
}

impl Default for Clock {
    fn default() -> Clock {
        Clock::new()
    }
}
