//! The processes of a server on this machine: which there are, and their end.
//!
//! That none is seen proves something only where all would be seen. A server of another PID namespace, or one whose
//! processes we have no right to look at, is not taken for gone.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use model::agent::Postmaster;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::instance::{Instance, InstanceError};

/// Between two looks whether a process has ended.
const LOOK: Duration = Duration::from_millis(2);
/// How often whoever serves unseen is looked for, and how long after another: longer than a process takes to end.
const UNSEEN_LOOKS: usize = 4;
const UNSEEN_PAUSE: Duration = Duration::from_millis(10);
/// On this machine whoever listens is reached at once.
const REACH_MAX: Duration = Duration::from_millis(50);

/// What `postmaster.pid` says (`pidfile.h`).
#[derive(Debug)]
pub(crate) struct LockFile {
    pid: u32,
    pub(crate) started: Option<SystemTime>,
    port: u16,
    sockets: String,
    listens: String,
    /// Key and number of its shared memory.
    memory: Option<(u64, u64)>,
}

fn number(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

impl Instance {
    pub(crate) fn lock_file(&self) -> Option<LockFile> {
        let text = std::fs::read_to_string(self.data_dir.join("postmaster.pid")).ok()?;
        let mut lines = text.lines().map(str::trim);
        let pid = lines.next()?.parse().ok()?;
        let started = lines.nth(1).and_then(|text| text.parse().ok());
        let started = started
            .and_then(|seconds| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
        let port = lines.next().and_then(|text| text.parse().ok()).unwrap_or(0);
        let mut text = || lines.next().unwrap_or_default().to_owned();
        let (sockets, listens, memory) = (text(), text(), text());
        let mut memory = memory.split_whitespace().map_while(|number| number.parse().ok());
        let memory = memory.next().zip(memory.next());
        Some(LockFile { pid, started, port, sockets, listens, memory })
    }

    /// The postmaster's pid, while it lives.
    pub fn pid(&self) -> Option<u32> {
        let lock = self.lock_file()?;
        // What cannot be seen may be it.
        let lives = self.owns(lock.pid).unwrap_or(true) || self.serves_unseen(&lock);
        lives.then_some(lock.pid)
    }

    /// Device and number of the data directory, also once its path leads nowhere; and those in which processes of it still
    /// are, if its path led there before.
    fn places(&self) -> Vec<(u64, u64)> {
        let mut known = self.shared.places.lock().unwrap_or_else(PoisonError::into_inner);
        let now = std::fs::metadata(&self.data_dir).ok().map(|dir| (dir.dev(), dir.ino()));
        if known.of.as_ref() != Some(&self.data_dir) {
            *known = Places { of: Some(self.data_dir.clone()), now, before: Vec::new() };
        }
        if let Some(now) = now
            && known.now != Some(now)
        {
            let before = known.now.replace(now);
            known.before.extend(before);
        }
        // Nobody else gets its number while somebody works there.
        if !known.before.is_empty() {
            let at_work = workplaces();
            known.before.retain(|place| at_work.contains(place));
        }
        known.now.into_iter().chain(known.before.iter().copied()).collect()
    }

    /// What the lock file says.
    pub fn postmaster(&self) -> Option<Postmaster> {
        Postmaster::read(&std::fs::read_to_string(self.data_dir.join("postmaster.pid")).ok()?)
    }

    /// The number of the server's data directory on this host, until that is booted again; none if it is not there.
    pub fn place(&self) -> Option<u64> {
        let dir = std::fs::metadata(&self.data_dir).ok()?;
        Some(crate::clock::boot_number() ^ dir.dev().rotate_left(32) ^ dir.ino())
    }

    /// A process of this number lives and is of the server; None if that cannot be seen. One that has ended and was not
    /// waited for works nowhere.
    fn owns(&self, pid: u32) -> Option<bool> {
        let path = PathBuf::from(format!("/proc/{pid}/cwd"));
        match std::fs::read_link(&path) {
            Ok(shown) => Some(match (std::fs::metadata(&path), self.places()) {
                (Ok(dir), places) if !places.is_empty() => places.contains(&(dir.dev(), dir.ino())),
                _ => shown == self.data_dir,
            }),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                // A server's processes run as the owner of its data (`checkDataDir`).
                let owner = |path: &Path| std::fs::metadata(path).map(|file| file.uid());
                let process = owner(Path::new(&format!("/proc/{pid}"))).ok()?;
                let data = owner(&self.data_dir).ok()?;
                (process != data).then_some(false)
            }
            Err(_) => Some(false),
        }
    }

    /// Somebody serves as the lock file says, although there is no such process here. A process that ends is seen no more a
    /// moment before its sockets and its shared memory are let go of (`do_exit` in Linux), so it must be so for longer.
    fn serves_unseen(&self, lock: &LockFile) -> bool {
        self.serves_unseen_through(lock, || std::thread::sleep(UNSEEN_PAUSE))
    }

    fn serves_unseen_through(&self, lock: &LockFile, mut pause: impl FnMut()) -> bool {
        let serves = || {
            self.is_reached(lock)
                || (is_attached(lock) && self.processes().is_ok_and(|seen| seen.own.is_empty()))
        };
        (0..UNSEEN_LOOKS).all(|look| {
            if look > 0 {
                pause();
            }
            serves()
        })
    }

    fn is_reached(&self, lock: &LockFile) -> bool {
        let socket = Path::new(&lock.sockets).join(format!(".s.PGSQL.{}", lock.port));
        if !lock.sockets.is_empty() && takes_connections(&socket) {
            return true;
        }
        let listens: IpAddr = match lock.listens.as_str() {
            "" => return false,
            text => text.parse().unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        };
        let listens = if listens.is_unspecified() { Ipv4Addr::LOCALHOST.into() } else { listens };
        let address = SocketAddr::new(listens, lock.port);
        lock.port != 0 && std::net::TcpStream::connect_timeout(&address, REACH_MAX).is_ok()
    }

    /// What the postmaster is, as far as it was ever seen: distributions give the program names of their own.
    fn program(&self) -> Option<(u64, u64)> {
        let mut known = self.shared.program.lock().unwrap_or_else(PoisonError::into_inner);
        let lock = self.lock_file().filter(|lock| self.owns(lock.pid) == Some(true));
        if let Some(program) = lock.and_then(|lock| program_of(lock.pid)) {
            *known = Some(program);
        }
        *known
    }

    /// The server's processes that live, the postmaster's and all others. Each works in the data directory.
    fn processes(&self) -> Result<Seen, InstanceError> {
        let error = |source| InstanceError::File { path: "/proc".into(), what: "read", source };
        let all = std::fs::read_dir("/proc").map_err(error)?;
        let pids = all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let program = self.program();
        let is_server = |pid: &u32| is_server(*pid, program);
        let mut seen = Seen::default();
        for pid in pids.filter(is_server) {
            match self.owns(pid) {
                Some(true) => seen.own.push(pid),
                Some(false) => (),
                None => seen.dark = Some(pid),
            }
        }
        Ok(seen)
    }

    /// There are processes of it.
    pub(crate) fn is_at_work(&self) -> bool {
        self.processes().is_ok_and(|seen| !seen.own.is_empty())
    }

    /// Whether the server that runs here, if one does, could be seen and ended: nobody else may be told that it will be.
    ///
    /// # Errors
    /// It could not be, or the data directory is not there.
    pub fn is_in_hand(&self) -> Result<(), InstanceError> {
        // While its files are made anew, they are under other names, and no server runs.
        let is_rejoining = crate::rejoin::Aside::of(self).is_there();
        let files = ["PG_VERSION", "global/pg_control"].map(|name| self.data_dir.join(name));
        for path in files.into_iter().filter(|_| !is_rejoining) {
            std::fs::metadata(&path).map_err(|source| InstanceError::File {
                path,
                what: "seen",
                source,
            })?;
        }
        // For as long as its path leads nowhere, from here on.
        if let [now, _, ..] = self.places().as_slice() {
            // A server of the directory that was here before: what control knows of it is not said of this one.
            let pid = self.processes()?.own.into_iter().find(|pid| workplace(*pid) != Some(*now));
            if let Some(pid) = pid {
                return Err(InstanceError::Unseen { pid });
            }
        }
        let Some(lock) = self.lock_file() else { return Ok(()) };
        let pid = lock.pid;
        let may_end = || number(pid).is_some_and(|pid| test_kill_process(pid).is_ok());
        match self.owns(pid) {
            // Where it is not known for what it is, others of it would not be either.
            Some(true) if may_end() && is_server(pid, self.program()) => Ok(()),
            Some(false) if !self.serves_unseen(&lock) => Ok(()),
            _ => Err(InstanceError::Unseen { pid }),
        }
    }

    /// Ends every process of the server at once, whatever it is doing, also if it was stopped. Gives how many there were.
    ///
    /// # Errors
    /// Some are still there after `limit`, or may be there unseen.
    pub async fn kill(&self, limit: Duration) -> Result<usize, InstanceError> {
        let deadline = Instant::now() + limit;
        let mut ended = BTreeSet::new();
        // The postmaster first, so that it begins no more.
        let postmaster = self.lock_file().map(|lock| lock.pid);
        let mut pids: Vec<u32> =
            postmaster.into_iter().filter(|pid| self.owns(*pid) == Some(true)).collect();
        loop {
            let seen = self.processes()?;
            pids.extend(seen.own);
            for pid in &pids {
                if let Some(pid) = number(*pid) {
                    // One that has ended meanwhile is not there any more.
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
            if pids.is_empty() {
                let unseen = || self.lock_file().filter(|lock| self.serves_unseen(lock));
                return match seen.dark.or_else(|| unseen().map(|lock| lock.pid)) {
                    Some(pid) => Err(InstanceError::Unseen { pid }),
                    None => {
                        self.remove_locks();
                        Ok(ended.len())
                    }
                };
            }
            if Instant::now() > deadline {
                let program = format!("process {} of the server", pids[0]);
                return Err(InstanceError::Timeout { program, limit });
            }
            ended.extend(pids.drain(..));
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Ends the server, and has whoever starts it again start a standby. The end does not wait for the disk, which may be
    /// slow; whoever has started it before the file was there is ended as well.
    ///
    /// # Errors
    /// As [`Instance::kill`], or the file is not written within `limit`.
    pub async fn end_as_standby(&self, limit: Duration) -> Result<usize, InstanceError> {
        let deadline = Instant::now() + limit;
        let writing = (!self.shared.is_writing.swap(true, Ordering::SeqCst)).then(|| {
            let instance = self.clone();
            tokio::task::spawn_blocking(move || {
                let written = instance.must_be_standby();
                instance.shared.is_writing.store(false, Ordering::SeqCst);
                written
            })
        });
        let mut ended = self.kill(limit).await;
        while self.shared.is_writing.load(Ordering::SeqCst) {
            if Instant::now() > deadline {
                let program = "writing `standby.signal`".to_owned();
                return Err(InstanceError::Timeout { program, limit });
            }
            tokio::time::sleep(LOOK).await;
            ended = and(ended, self.kill(limit).await);
        }
        let written = match writing {
            Some(writing) => writing.await.unwrap_or(Ok(())),
            None => Ok(()),
        };
        let ended = and(ended, self.kill(limit).await)?;
        written.map(|()| ended)
    }

    /// Removes the lock files of a server none of whose processes lives.
    pub(crate) fn remove_stale_locks(&self) {
        let seen = self.processes();
        if seen.is_ok_and(|seen| seen.own.is_empty() && seen.dark.is_none())
            && self.lock_file().is_some_and(|lock| !self.serves_unseen(&lock))
        {
            self.remove_locks();
        }
    }

    /// The server's lock files, once it is known that none of its processes lives. A process that nobody has waited for, or
    /// another of the same number, would keep it from starting (`CreateLockFile`).
    fn remove_locks(&self) {
        let Some(lock) = self.lock_file() else { return };
        let socket = Path::new(&lock.sockets).join(format!(".s.PGSQL.{}.lock", lock.port));
        let owner = std::fs::read_to_string(&socket).unwrap_or_default();
        if owner.lines().next().map(str::trim) == Some(&lock.pid.to_string()) {
            let _ = std::fs::remove_file(socket);
        }
        let _ = std::fs::remove_file(self.data_dir.join("postmaster.pid"));
    }
}

/// What is known of where a server's processes work.
#[derive(Debug, Default)]
pub(crate) struct Places {
    /// The path that this is known of.
    of: Option<PathBuf>,
    now: Option<(u64, u64)>,
    before: Vec<(u64, u64)>,
}

/// Device and number of the directory in which a process works.
fn workplace(pid: u32) -> Option<(u64, u64)> {
    std::fs::metadata(format!("/proc/{pid}/cwd")).ok().map(|dir| (dir.dev(), dir.ino()))
}

fn workplaces() -> BTreeSet<(u64, u64)> {
    let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(workplace).collect()
}

/// Device and number of the program that a process is.
fn program_of(pid: u32) -> Option<(u64, u64)> {
    std::fs::metadata(format!("/proc/{pid}/exe")).ok().map(|file| (file.dev(), file.ino()))
}

/// It is a server's by its name, or the program that the postmaster was.
fn is_server(pid: u32, program: Option<(u64, u64)>) -> bool {
    let named = |name: &str| name.contains("postgres") || name.contains("postmaster");
    std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| named(&name))
        || (program.is_some() && program_of(pid) == program)
}

/// What a later try has found counts, and what all have ended.
fn and(
    before: Result<usize, InstanceError>,
    now: Result<usize, InstanceError>,
) -> Result<usize, InstanceError> {
    now.map(|now| now + before.unwrap_or(0))
}

/// The server processes of this machine.
#[derive(Debug, Default)]
struct Seen {
    own: Vec<u32>,
    /// One of which it cannot be seen whose it is.
    dark: Option<u32>,
}

/// Somebody has the server's shared memory, wherever he is (`PGSharedMemoryIsInUse`).
fn is_attached(lock: &LockFile) -> bool {
    let Some((key, id)) = lock.memory else { return false };
    // A key is an `int`, which the one prints with its sign, and the other as a long without.
    let key = (key & u64::from(u32::MAX)).to_string();
    let unsigned =
        |text: &str| text.parse::<i64>().map(|key| (key as u64 & u64::from(u32::MAX)).to_string());
    let all = std::fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    all.lines().skip(1).any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        matches!(fields.as_slice(), [k, i, _, _, _, _, attached, ..]
            if unsigned(k).as_deref() == Ok(&*key) && *i == id.to_string() && *attached != "0")
    })
}

/// A Unix socket behind which somebody listens; one whose queue is full, too.
fn takes_connections(path: &Path) -> bool {
    let connect = || {
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.connect(&socket2::SockAddr::unix(path)?)
    };
    match connect() {
        Ok(()) => true,
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::instance::RunAs;

    /// A data directory of a server with this number, whose socket is in the directory as well.
    fn instance(dir: &Path, pid: u32, started: u64) -> Instance {
        let lock = format!("{pid}\n{0}\n{started}\n5432\n{0}\n\n  1 2\n", dir.display());
        std::fs::write(dir.join("postmaster.pid"), lock).unwrap();
        std::fs::create_dir(dir.join("global")).unwrap();
        let mut control = vec![0; 16];
        control.extend(6_u32.to_ne_bytes());
        std::fs::write(dir.join("global/pg_control"), control).unwrap();
        std::fs::write(dir.join("PG_VERSION"), "15\n").unwrap();
        let (bin_dir, data_dir) = (dir.join("bin"), dir.to_owned());
        let (run_as, options, shared) = Default::default();
        Instance { bin_dir, data_dir, run_as, options, shared }
    }

    /// No process has so high a number.
    const NOBODY: u32 = i32::MAX as u32;

    #[tokio::test]
    async fn a_server_of_another_namespace_is_not_taken_for_gone() {
        let dir = tempfile::tempdir().unwrap();
        let instance = instance(dir.path(), NOBODY, 0);
        let listener = UnixListener::bind(dir.path().join(".s.PGSQL.5432")).unwrap();
        assert_eq!(instance.pid(), Some(NOBODY));
        let in_hand = instance.is_in_hand();
        assert!(matches!(in_hand, Err(InstanceError::Unseen { pid: NOBODY })), "{in_hand:?}");
        let killed = instance.kill(Duration::from_secs(1)).await;
        assert!(matches!(killed, Err(InstanceError::Unseen { pid: NOBODY })), "{killed:?}");
        assert!(dir.path().join("postmaster.pid").exists());
        // It has ended.
        drop(listener);
        assert_eq!(instance.pid(), None);
        instance.is_in_hand().unwrap();
        assert_eq!(instance.kill(Duration::from_secs(1)).await.unwrap(), 0);
        assert!(!dir.path().join("postmaster.pid").exists());
    }

    #[test]
    fn a_server_that_is_ending_is_not_taken_for_one_of_another_namespace() {
        let dir = tempfile::tempdir().unwrap();
        let instance = instance(dir.path(), NOBODY, 0);
        let lock = instance.lock_file().unwrap();
        // Its process is seen no more, and its socket is closed a moment later.
        let mut listener = UnixListener::bind(dir.path().join(".s.PGSQL.5432")).ok();
        assert!(instance.serves_unseen_through(&lock, || ()));
        assert!(!instance.serves_unseen_through(&lock, || drop(listener.take())));
    }

    #[test]
    fn a_directory_that_is_gone_is_in_nobodys_hand() {
        let dir = tempfile::tempdir().unwrap();
        let instance = instance(dir.path(), NOBODY, 0);
        instance.is_in_hand().unwrap();
        dir.close().unwrap();
        assert!(instance.is_in_hand().is_err());
    }

    /// A process of any name whose working directory is this.
    fn at_work(dir: &Path, program: &str) -> std::process::Child {
        let copy = dir.join(program);
        std::fs::copy("/bin/sleep", &copy).unwrap();
        std::process::Command::new(copy).arg("600").current_dir(dir).spawn().unwrap()
    }

    #[tokio::test]
    async fn a_directory_that_another_takes_the_place_of_is_not_forgotten() {
        let outer = tempfile::tempdir().unwrap();
        let (dir, moved) = (outer.path().join("data"), outer.path().join("moved"));
        std::fs::create_dir(&dir).unwrap();
        let mut process = at_work(&dir, "postgres");
        let instance = instance(&dir, process.id(), 0);
        instance.is_in_hand().unwrap();
        std::fs::rename(&dir, &moved).unwrap();
        std::fs::create_dir(&dir).unwrap();
        // An empty one is nobody's, and one that looks like a server's is another's.
        assert!(instance.is_in_hand().is_err());
        std::fs::create_dir(dir.join("global")).unwrap();
        std::fs::write(dir.join("global/pg_control"), "").unwrap();
        std::fs::write(dir.join("PG_VERSION"), "15\n").unwrap();
        let in_hand = instance.is_in_hand();
        assert!(matches!(in_hand, Err(InstanceError::Unseen { pid }) if pid == process.id()));
        // Whoever is told to end it ends it.
        assert_eq!(instance.kill(Duration::from_secs(10)).await.unwrap(), 1);
        process.wait().unwrap();
        instance.is_in_hand().unwrap();
    }

    #[tokio::test]
    async fn a_program_is_a_servers_by_whatever_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut postmaster = at_work(dir.path(), "pgserver");
        let instance = instance(dir.path(), postmaster.id(), 0);
        instance.is_in_hand().unwrap();
        // A backend, which outlives it.
        let copy = dir.path().join("pgserver");
        let backend = std::process::Command::new(copy).arg("600").current_dir(dir.path()).spawn();
        let mut backend = backend.unwrap();
        postmaster.kill().unwrap();
        postmaster.wait().unwrap();
        assert_eq!(instance.kill(Duration::from_secs(10)).await.unwrap(), 1);
        backend.wait().unwrap();
    }

    #[test]
    fn a_signal_counts_that_was_there_before_the_start() {
        let dir = tempfile::tempdir().unwrap();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let instance = instance(dir.path(), std::process::id(), now + 60);
        assert!(instance.may_take_writes());
        instance.must_be_standby().unwrap();
        assert!(!instance.may_take_writes());
        // And one that came later does not, once the server had time to start.
        let lock = std::fs::read_to_string(dir.path().join("postmaster.pid")).unwrap();
        let earlier = lock.replace(&(now + 60).to_string(), &(now - 60).to_string());
        std::fs::write(dir.path().join("postmaster.pid"), earlier).unwrap();
        let file = std::fs::File::options().write(true).open(dir.path().join("postmaster.pid"));
        file.unwrap().set_modified(SystemTime::now() - Duration::from_secs(60)).unwrap();
        assert!(instance.may_take_writes());
    }

    #[test]
    fn our_rights_are_not_lent() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let other = RunAs { uid: 54_321, gid: 54_321 };
        let instance = Instance { run_as: Some(other), ..instance(dir.path(), NOBODY, 0) };
        let path = dir.path().join("pg_hba.conf");
        std::fs::write(&path, "secret").unwrap();
        let mode = |bits| std::fs::set_permissions(&path, PermissionsExt::from_mode(bits)).unwrap();
        mode(0o600);
        assert!(instance.read_own(&path).is_err());
        mode(0o644);
        assert_eq!(instance.read_own(&path).unwrap(), b"secret");
        assert!(instance.write(&path, b"other").unwrap_err().to_string().contains("written"));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "secret");
        // Nor is anything written by way of a link.
        let own = Instance { run_as: None, ..instance };
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
        own.write(&dir.path().join("link"), b"new").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "secret");
    }
}
