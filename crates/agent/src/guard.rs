//! A process of its own that ends the server when its lease is over, so that it happens also if the agent hangs, was killed or
//! has no memory left.
//!
//! The agent sends a datagram of eight bytes after each renewal: when to end the server, in nanoseconds of [`pg::clock::now`], and
//! gets it back. The guard outlives the agent, and the next one finds it by its socket.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use model::lease::Moment;
use pg::clock;
use pg::instance::Instance;
use tokio::net::UnixDatagram;
use tokio::time::{sleep, timeout};

/// Says that there is nothing to guard any more.
const END: u64 = u64::MAX;
/// Between two looks while there is no lease.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
const KILL_MAX: Duration = Duration::from_secs(2);
/// How long the guard may take to answer.
const ANSWER_MAX: Duration = Duration::from_millis(250);
const START_MAX: Duration = Duration::from_secs(2);

fn socket_of(state_dir: &Path) -> PathBuf {
    state_dir.join("guard.sock")
}

fn to_ns(moment: Moment) -> u64 {
    u64::try_from(moment.0.as_nanos()).unwrap_or(END - 1)
}

/// Runs until the agent says that it is enough.
///
/// # Errors
/// The socket cannot be made.
pub async fn run(instance: &Instance, state_dir: &Path, kill_at: Moment) -> std::io::Result<()> {
    let path = socket_of(state_dir);
    // In its place at once: the one before does not find that there is none.
    let new = path.with_extension("new");
    let _ = std::fs::remove_file(&new);
    let socket = UnixDatagram::bind(&new)?;
    std::fs::set_permissions(&new, PermissionsExt::from_mode(0o600))?;
    let own = std::fs::metadata(&new)?.ino();
    std::fs::rename(&new, &path)?;
    let mut kill_at = kill_at;
    let mut bytes = [0; 8];
    loop {
        let left = kill_at.from(clock::now());
        // A timer may stand still while the host sleeps, so it is looked at the clock again and again.
        let wait = if left.is_zero() { LOOK_PAUSE } else { left.min(LOOK_PAUSE) };
        match timeout(wait, socket.recv_from(&mut bytes)).await {
            Ok(Ok((8, from))) => {
                let ns = u64::from_le_bytes(bytes);
                if ns == END {
                    let _ = std::fs::remove_file(&path);
                    return Ok(());
                }
                kill_at = Moment(Duration::from_nanos(ns));
                // Whoever could not end it does not say that he will.
                let is_in_hand = instance.is_in_hand();
                if let Err(error) = &is_in_hand {
                    tracing::error!(error = model::chain(error), "the server is not in hand");
                }
                if let Some(from) = from.as_pathname().filter(|_| is_in_hand.is_ok()) {
                    // Whoever has asked and is gone needs no answer.
                    let _ = socket.try_send_to(&bytes, from);
                }
            }
            Ok(Ok(_)) => (),
            Ok(Err(error)) => {
                tracing::error!(%error, "the guard cannot hear the agent");
                sleep(LOOK_PAUSE).await;
            }
            Err(_) => (),
        }
        if kill_at.from(clock::now()).is_zero() {
            if is_anothers(&path, own) {
                // The agent has not heard of this one for too long and has another now, which knows of a later time.
                return Ok(());
            }
            if instance.may_take_writes() {
                end(instance).await;
            }
        }
    }
}

/// Another guard listens there. That nothing can be seen of the place says nothing: a directory may be removed, or covered.
fn is_anothers(path: &Path, own: u64) -> bool {
    let is_other = std::fs::metadata(path).is_ok_and(|socket| socket.ino() != own);
    let listens = || std::os::unix::net::UnixDatagram::unbound()?.connect(path);
    is_other && listens().is_ok()
}

async fn end(instance: &Instance) {
    match instance.end_as_standby(KILL_MAX).await {
        Ok(0) => (),
        Ok(count) => tracing::error!(count, "the lease is over: the guard has ended the server"),
        Err(error) => tracing::error!(error = model::chain(&error), "the server does not end"),
    }
}

/// The agent's way to its guard.
pub(crate) struct Guard {
    state_dir: PathBuf,
    command: Vec<String>,
    socket: UnixDatagram,
    /// So that one that has ended is waited for.
    child: Option<tokio::process::Child>,
}

impl Guard {
    pub(crate) fn new(state_dir: &Path, command: &[String]) -> std::io::Result<Guard> {
        let own = state_dir.join("agent.sock");
        let _ = std::fs::remove_file(&own);
        let socket = UnixDatagram::bind(&own)?;
        std::fs::set_permissions(&own, PermissionsExt::from_mode(0o600))?;
        let (state_dir, command) = (state_dir.to_owned(), command.to_vec());
        Ok(Guard { state_dir, command, socket, child: None })
    }

    async fn tell(&self, ns: u64) -> bool {
        let bytes = ns.to_le_bytes();
        if self.socket.try_send_to(&bytes, socket_of(&self.state_dir)).is_err() {
            return false;
        }
        let heard = async {
            let mut answer = [0; 8];
            // An answer to what was sent before may still be on its way.
            while self.socket.recv(&mut answer).await.is_ok() {
                if answer == bytes {
                    return;
                }
            }
        };
        timeout(ANSWER_MAX, heard).await.is_ok()
    }

    /// Has the guard end the server at `kill_at`, and starts one if there is none.
    ///
    /// # Errors
    /// There is none: the server may not be a primary.
    pub(crate) async fn extend(&mut self, kill_at: Moment) -> Result<(), String> {
        let ns = to_ns(kill_at);
        if self.tell(ns).await {
            return Ok(());
        }
        tracing::warn!("the guard does not answer, starting one");
        let [program, args @ ..] = self.command.as_slice() else {
            return Err("there is no guard to start".into());
        };
        let started = tokio::process::Command::new(program)
            .args(args)
            // So that it knows also if nobody tells it any more.
            .arg(ns.to_string())
            .stdin(Stdio::null())
            .process_group(0)
            .spawn()
            .map_err(|error| format!("the guard `{program}` cannot be started: {error}"))?;
        self.child = Some(started);
        let began = clock::now();
        while Moment(began.0 + START_MAX).from(clock::now()) > Duration::ZERO {
            sleep(Duration::from_millis(20)).await;
            if self.tell(ns).await {
                return Ok(());
            }
        }
        Err(format!("the guard does not answer within {START_MAX:?}"))
    }

    /// There is nothing to guard any more.
    pub(crate) fn dismiss(&self) {
        let _ = self.socket.try_send_to(&END.to_le_bytes(), socket_of(&self.state_dir));
    }
}
