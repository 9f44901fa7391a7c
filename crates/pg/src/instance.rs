//! A server's programs and its data directory on this machine.
//!
//! PostgreSQL refuses to run as root, so as root everything here runs as the owner of the data directory.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use thiserror::Error;
use tokio::process::Command;
use tokio::time::timeout;

/// Output of a program that is kept for its error.
const OUTPUT_LEN_MAX: u64 = 8_000;

#[derive(Debug, Error)]
pub enum InstanceError {
    #[error("`{program}` is not in `{bin_dir}`")]
    NoProgram { program: &'static str, bin_dir: PathBuf },
    #[error("`{program}` cannot be run")]
    Run { program: String, source: std::io::Error },
    #[error("`{program}` did not end within {limit:?}")]
    Timeout { program: String, limit: Duration },
    #[error("`{program}` ended with {status}: {output}")]
    Failed { program: String, status: String, output: String },
    #[error(
        "it cannot be seen whose process {pid} is; Holdfast has to run as the server's owner, or with the right to trace (CAP_SYS_PTRACE)"
    )]
    Unseen { pid: u32 },
    #[error("`{path}` cannot be {what}")]
    File { path: PathBuf, what: &'static str, source: std::io::Error },
}

/// The uid and gid that programs run as; none to stay who we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunAs {
    pub uid: u32,
    pub gid: u32,
}

/// What `pg_controldata` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlData {
    pub system_identifier: String,
    /// It is a primary that has ended as it should.
    pub is_shut_down: bool,
}

/// States of a control file (`DBState`).
const SHUT_DOWN_IN_RECOVERY: u32 = 2;
const IN_ARCHIVE_RECOVERY: u32 = 5;

/// A server that this process may start and stop.
#[derive(Debug, Clone)]
pub struct Instance {
    pub bin_dir: PathBuf,
    pub data_dir: PathBuf,
    pub run_as: Option<RunAs>,
    /// Further options of the server's command line.
    pub options: Vec<String>,
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0)
}

fn same_dir(one: &Path, other: &Path) -> bool {
    let id = |path: &Path| std::fs::metadata(path).map(|dir| (dir.dev(), dir.ino()));
    match (id(one), id(other)) {
        (Ok(one), Ok(other)) => one == other,
        _ => one == other,
    }
}

/// The directory of the newest server programs on this machine: Debian's layout, or what is on the PATH.
pub fn find_bin_dir() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok().into_iter().flatten().flatten();
    let mut found: Vec<(u32, PathBuf)> = versions
        .filter_map(|entry| {
            let major = entry.file_name().to_str()?.parse().ok()?;
            let bin = entry.path().join("bin");
            bin.join("pg_ctl").exists().then_some((major, bin))
        })
        .collect();
    found.sort();
    let on_path = || {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path)
            .find(|dir| dir.join("pg_ctl").exists() && dir.join("initdb").exists())
    };
    found.pop().map(|(_, bin)| bin).or_else(on_path)
}

impl Instance {
    /// A server by its directories. As root its programs run as the owner of the data directory.
    ///
    /// # Errors
    /// The data directory does not exist, and no rejoin has moved it away.
    pub fn of(bin_dir: &Path, data_dir: &Path) -> Result<Instance, InstanceError> {
        let owner = std::fs::metadata(data_dir)
            .or_else(|error| crate::rejoin::what_is_left(data_dir).ok_or(error))
            .map_err(|source| InstanceError::File {
                path: data_dir.to_owned(),
                what: "read",
                source,
            })?;
        let run_as = is_root().then(|| RunAs { uid: owner.uid(), gid: owner.gid() });
        Ok(Instance {
            bin_dir: bin_dir.to_owned(),
            data_dir: data_dir.to_owned(),
            run_as,
            options: Vec::new(),
        })
    }

    /// Whether the distribution has this program; those for embedding have only the server.
    pub fn has(&self, program: &str) -> bool {
        self.bin_dir.join(program).exists()
    }

    /// Runs one of the server's programs to its end.
    ///
    /// # Errors
    /// It is missing, takes longer than `limit`, or fails; then with the end of its output.
    pub async fn run(
        &self,
        program: &'static str,
        args: &[&str],
        limit: Duration,
    ) -> Result<String, InstanceError> {
        let (status, mut output) = self.run_into_file(program, args, limit).await?;
        let len = output.metadata().map_or(0, |file| file.len());
        let start = len.saturating_sub(OUTPUT_LEN_MAX);
        let mut text = Vec::new();
        let read = output.seek(SeekFrom::Start(start)).and_then(|_| output.read_to_end(&mut text));
        read.map_err(|source| InstanceError::Run { program: program.into(), source })?;
        let output = String::from_utf8_lossy(&text).trim().to_owned();
        if status.success() {
            return Ok(output);
        }
        let program = format!("{program} {}", args.first().copied().unwrap_or_default());
        Err(InstanceError::Failed { program, status: status.to_string(), output })
    }

    /// The same, with how it ended and all that it has said.
    pub(crate) async fn run_into_file(
        &self,
        program: &'static str,
        args: &[&str],
        limit: Duration,
    ) -> Result<(ExitStatus, File), InstanceError> {
        let path = self.bin_dir.join(program);
        if !path.exists() {
            return Err(InstanceError::NoProgram { program, bin_dir: self.bin_dir.clone() });
        }
        let shown = || format!("{program} {}", args.first().copied().unwrap_or_default());
        let mut command = Command::new(path);
        command.args(args).stdin(Stdio::null()).kill_on_drop(true).current_dir("/");
        // libpq's variables of whoever started us have no business here.
        command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C");
        if let Some(RunAs { uid, gid }) = self.run_as {
            command.uid(uid).gid(gid);
        }
        // A server started by pg_ctl would keep a pipe open for ever, so output goes to a file.
        let run = |source| InstanceError::Run { program: shown(), source };
        let output = tempfile::tempfile().map_err(run)?;
        let (out, err) = (output.try_clone().map_err(run)?, output.try_clone().map_err(run)?);
        command.stdout(out).stderr(err);
        match timeout(limit, command.status()).await {
            Ok(ended) => Ok((ended.map_err(run)?, output)),
            Err(_) => Err(InstanceError::Timeout { program: shown(), limit }),
        }
    }

    fn data(&self) -> &str {
        self.data_dir.to_str().unwrap_or_default()
    }

    /// Starts the server and waits until it accepts connections. Nothing happens if it runs.
    ///
    /// # Errors
    /// It does not start within `limit`.
    pub async fn start(&self, limit: Duration) -> Result<(), InstanceError> {
        if self.is_running() {
            return Ok(());
        }
        if self.processes().is_ok_and(|pids| pids.is_empty()) {
            self.remove_locks();
        }
        let log = self.data_dir.join("server.log");
        let seconds = limit.as_secs().max(1).to_string();
        let options = self.options.join(" ");
        let log = log.to_str().unwrap_or_default().to_owned();
        let mut args = vec!["start", "-D", self.data(), "-w", "-t", &seconds, "-l", &log];
        if !options.is_empty() {
            args.extend(["-o", &options]);
        }
        self.run("pg_ctl", &args, limit + Duration::from_secs(5)).await.map(drop)
    }

    /// Stops the server and waits for it: `fast` ends sessions, `immediate` as a crash would.
    ///
    /// # Errors
    /// It does not stop within `limit`.
    pub async fn stop(&self, mode: &str, limit: Duration) -> Result<(), InstanceError> {
        if !self.is_running() {
            return Ok(());
        }
        let seconds = limit.as_secs().max(1).to_string();
        let args = ["stop", "-D", self.data(), "-w", "-t", &seconds, "-m", mode];
        self.run("pg_ctl", &args, limit + Duration::from_secs(5)).await.map(drop)
    }

    /// The postmaster's pid, while it lives.
    pub fn pid(&self) -> Option<u32> {
        let text = std::fs::read_to_string(self.data_dir.join("postmaster.pid")).ok()?;
        let pid: u32 = text.lines().next()?.trim().parse().ok()?;
        // What cannot be seen may be it.
        self.owns(pid).unwrap_or(true).then_some(pid)
    }

    /// A process of this number lives and is of the server; None if that cannot be seen. One that has ended and was not
    /// waited for works nowhere.
    fn owns(&self, pid: u32) -> Option<bool> {
        match std::fs::read_link(format!("/proc/{pid}/cwd")) {
            Ok(dir) => Some(same_dir(&dir, &self.data_dir)),
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

    /// The server's processes that live, the postmaster's and all others. Each works in the data directory.
    ///
    /// # Errors
    /// Of some it cannot be seen whose they are: which is no proof that there are none.
    fn processes(&self) -> Result<Vec<u32>, InstanceError> {
        let error = |source| InstanceError::File { path: "/proc".into(), what: "read", source };
        let all = std::fs::read_dir("/proc").map_err(error)?;
        let pids = all.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let is_server = |pid: &u32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|name| matches!(name.trim_end(), "postgres" | "postmaster"))
        };
        let mut own = Vec::new();
        for pid in pids.filter(is_server) {
            match self.owns(pid) {
                Some(true) => own.push(pid),
                Some(false) => (),
                None => return Err(InstanceError::Unseen { pid }),
            }
        }
        Ok(own)
    }

    /// Ends every process of the server at once, whatever it is doing, also if it was stopped. Gives how many there were.
    ///
    /// # Errors
    /// Some are still there after `limit`.
    pub async fn kill(&self, limit: Duration) -> Result<usize, InstanceError> {
        let deadline = std::time::Instant::now() + limit;
        let mut ended = std::collections::BTreeSet::new();
        // The postmaster first, so that it begins no more.
        let is_own = |pid: &u32| self.owns(*pid) == Some(true);
        let mut pids: Vec<u32> = self.pid().into_iter().filter(is_own).collect();
        loop {
            pids.extend(self.processes()?);
            if pids.is_empty() {
                self.remove_locks();
                return Ok(ended.len());
            }
            if std::time::Instant::now() > deadline {
                let program = format!("process {} of the server", pids[0]);
                return Err(InstanceError::Timeout { program, limit });
            }
            for pid in pids.drain(..) {
                let number = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
                if let Some(number) = number {
                    // One that has ended meanwhile is not there any more.
                    let _ = rustix::process::kill_process(number, rustix::process::Signal::KILL);
                }
                ended.insert(pid);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// The server's lock files, once it is known that none of its processes lives. A process that nobody has waited for, or
    /// another of the same number, would keep it from starting (`CreateLockFile`).
    fn remove_locks(&self) {
        let path = self.data_dir.join("postmaster.pid");
        let Ok(text) = std::fs::read_to_string(&path) else { return };
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        if let [pid, _, _, port, sockets, ..] = lines.as_slice() {
            let lock = Path::new(sockets).join(format!(".s.PGSQL.{port}.lock"));
            let owner = std::fs::read_to_string(&lock).unwrap_or_default();
            if owner.lines().next().map(str::trim) == Some(*pid) {
                let _ = std::fs::remove_file(lock);
            }
        }
        let _ = std::fs::remove_file(path);
    }

    pub fn is_running(&self) -> bool {
        self.pid().is_some()
    }

    /// A standby whose process is gone, and which was not shut down.
    pub fn is_crashed_standby(&self) -> bool {
        let is_recovering = self.state() == Some(IN_ARCHIVE_RECOVERY);
        is_recovering && self.is_standby() && !self.is_running()
    }

    /// What the control file says, whose beginning is the same from 15 to 18 (`ControlFileData`, `DBState`).
    fn state(&self) -> Option<u32> {
        let mut begin = [0; 20];
        let mut control = File::open(self.data_dir.join("global/pg_control")).ok()?;
        control.read_exact(&mut begin).ok()?;
        let [.., a, b, c, d] = begin;
        Some(u32::from_ne_bytes([a, b, c, d]))
    }

    /// Whether what runs here, if anything does, may take writes: only what is known to be a standby does not. As the control
    /// file says.
    pub fn may_take_writes(&self) -> bool {
        /// A standby that was copied from a primary, or was one, says so for a moment after its start.
        const STANDBY_START_MAX: Duration = Duration::from_secs(5);
        if !self.data_dir.exists() {
            return false;
        }
        if matches!(self.state(), Some(SHUT_DOWN_IN_RECOVERY | IN_ARCHIVE_RECOVERY)) {
            return false;
        }
        let started = std::fs::metadata(self.data_dir.join("postmaster.pid"))
            .and_then(|file| file.modified())
            .ok();
        let age = started.and_then(|started| started.elapsed().ok());
        let is_starting = age.is_some_and(|age| age < STANDBY_START_MAX);
        !(self.is_standby() && is_starting)
    }

    /// Makes a new data directory.
    ///
    /// # Errors
    /// initdb fails.
    pub async fn init(&self, superuser: &str) -> Result<(), InstanceError> {
        let args = [
            "-D",
            self.data(),
            "-U",
            superuser,
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--data-checksums",
        ];
        self.run("initdb", &args, Duration::from_secs(120)).await.map(drop)
    }

    /// Copies a running server as a standby of it.
    ///
    /// # Errors
    /// pg_basebackup fails.
    pub async fn clone_from(&self, primary_conninfo: &str) -> Result<(), InstanceError> {
        let args = ["-D", self.data(), "-d", primary_conninfo, "-R", "-X", "stream", "-c", "fast"];
        self.run("pg_basebackup", &args, Duration::from_secs(3_600)).await.map(drop)
    }

    /// Takes back what was written after the histories parted. The server's own files become those of the source.
    ///
    /// # Errors
    /// pg_rewind fails; then the directory may be unusable and must be copied anew.
    pub async fn rewind(&self, source_conninfo: &str) -> Result<String, InstanceError> {
        let args = ["-D", self.data(), "--source-server", source_conninfo];
        self.run("pg_rewind", &args, Duration::from_secs(3_600)).await
    }

    /// Whoever starts the server from now on starts a standby, which takes no writes, unless [`Instance::may_be_primary`]
    /// was called.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn must_be_standby(&self) -> Result<(), InstanceError> {
        self.write(&self.data_dir.join("standby.signal"), b"")
    }

    /// Its next start, or the last one, is that of a standby.
    pub fn is_standby(&self) -> bool {
        self.data_dir.join("standby.signal").exists()
    }

    /// Takes [`Instance::must_be_standby`] back.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn may_be_primary(&self) -> Result<(), InstanceError> {
        let path = self.data_dir.join("standby.signal");
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(InstanceError::File { path, what: "removed", source })
            }
            _ => Ok(()),
        }
    }

    /// What the control file of the server says, whether it runs or not.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn control_data(&self) -> Result<ControlData, InstanceError> {
        let text =
            self.run("pg_controldata", &["-D", self.data()], Duration::from_secs(10)).await?;
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.map(str::trim).unwrap_or_default().to_owned()
        };
        Ok(ControlData {
            system_identifier: value("Database system identifier"),
            is_shut_down: value("Database cluster state") == "shut down",
        })
    }

    /// Tells the server to be a standby of `primary_conninfo` from its next start.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn make_standby(&self, primary_conninfo: &str) -> Result<(), InstanceError> {
        let auto = self.data_dir.join("postgresql.auto.conf");
        let text = std::fs::read_to_string(&auto).unwrap_or_default();
        let kept = text.lines().filter(|line| {
            let name = line.split('=').next().unwrap_or_default().trim();
            !matches!(name, "primary_conninfo" | "default_transaction_read_only")
        });
        let mut text: String = kept.map(|line| format!("{line}\n")).collect();
        let quoted = primary_conninfo.replace('\'', "''");
        text.push_str(&format!("primary_conninfo = '{quoted}'\n"));
        self.write(&auto, text.as_bytes())?;
        self.write(&self.data_dir.join("standby.signal"), b"")
    }

    /// Replaces a file as a whole, durably, owned by the server's user.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path, bytes: &[u8]) -> Result<(), InstanceError> {
        use std::io::Write;
        let error = |source| InstanceError::File { path: path.to_owned(), what: "written", source };
        let temporary = path.with_extension("holdfast-new");
        let mut file = File::create(&temporary).map_err(error)?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(error)?;
        std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))
            .map_err(error)?;
        if let Some(RunAs { uid, gid }) = self.run_as {
            std::os::unix::fs::chown(&temporary, Some(uid), Some(gid)).map_err(error)?;
        }
        std::fs::rename(&temporary, path).map_err(error)?;
        File::open(&self.data_dir).and_then(|dir| dir.sync_all()).map_err(error)
    }
}
