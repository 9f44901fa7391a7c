//! Runs a program.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use model::plan::run::Outcome;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::timeout;

use super::{Doing, SAID_LEN_MAX, said};

/// After its own limit.
const LATE: Duration = Duration::from_secs(2);
/// A shell says by an exit code of this and more that what it ran was ended by a signal.
const KILLED: i32 = 129;

/// Reads all, and keeps the begin.
async fn read_begin(from: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut part = [0; 4096];
    while let Ok(len @ 1..) = from.read(&mut part).await {
        if kept.len() < SAID_LEN_MAX * 4 {
            kept.extend_from_slice(&part[..len]);
        }
    }
}

/// Ends a process and what it has started, unless it has ended by itself.
struct Group(Option<rustix::process::Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}

/// A program that is there to be run.
fn is_there(program: &str) -> bool {
    if program.contains('/') {
        return Path::new(program).is_file();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// It runs beneath `timeout` of GNU coreutils, which ends it in time also if control has gone before.
pub(super) async fn run(doing: &Doing, argv: &[String], limit: Duration) -> Outcome {
    let Some(program) = argv.first() else {
        return Outcome::NotDone("there is no program".into());
    };
    if !is_there(program) {
        return Outcome::NotDone(format!("there is no program `{program}`"));
    }
    let spawned = Command::new("timeout")
        .arg("--signal=KILL")
        .arg(format!("{}.{:03}", limit.as_secs(), limit.subsec_millis()))
        .args(argv)
        .env("HOLDFAST_APP", &doing.app)
        .env("HOLDFAST_PLAN", &doing.plan)
        .env("HOLDFAST_EXECUTION", doing.execution.to_string())
        .env("HOLDFAST_STEP", &doing.step)
        .env("HOLDFAST_KEY", &doing.key)
        .env("HOLDFAST_MODE", doing.mode.name())
        .env("HOLDFAST_UNDO", if doing.is_undo { "1" } else { "0" })
        .env("HOLDFAST_ACTIVE", doing.active.as_deref().unwrap_or_default())
        .env("HOLDFAST_EPOCH", doing.epoch.to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return Outcome::NotDone(format!("`timeout` cannot be started: {error}")),
    };
    let group = child.id().and_then(|id| rustix::process::Pid::from_raw(id.try_into().ok()?));
    let mut group = Group(group);
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (mut said_out, mut said_err) = (Vec::new(), Vec::new());
    let wait = async {
        let says =
            async { tokio::join!(read_begin(out, &mut said_out), read_begin(err, &mut said_err)) };
        tokio::pin!(says);
        tokio::select! {
            status = child.wait() => {
                // What it has started itself may hold these open after its end.
                const REST_MAX: Duration = Duration::from_millis(500);
                let _ = timeout(REST_MAX, says).await;
                status
            }
            _ = &mut says => child.wait().await,
        }
    };
    let status = match timeout(limit + LATE, wait).await {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => return Outcome::Unknown(format!("`{program}`: {error}")),
        Err(_) => return Outcome::Unknown(format!("`{program}` does not end: killed")),
    };
    // Whatever it leaves behind is meant to be left.
    group.0 = None;
    let [out, err] = [said_out, said_err].map(|text| said(&String::from_utf8_lossy(&text)));
    let says = if err.is_empty() { &out } else { &err };
    match (status.code(), status.signal()) {
        (Some(0), _) => Outcome::Done(out),
        (Some(code), None) if code < KILLED => {
            Outcome::Failed(format!("`{program}`: {status}: {says}"))
        }
        // In the middle of whatever it did, by its time limit or by somebody.
        _ => {
            Outcome::Unknown(format!("`{program}` was ended, its time limit is {limit:?}: {says}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::doing;
    use super::*;

    async fn sh(text: &str, limit_ms: u64) -> Outcome {
        let argv = ["/bin/sh", "-c", text].map(str::to_owned);
        run(&doing(), &argv, Duration::from_millis(limit_ms)).await
    }

    #[tokio::test]
    async fn a_program_is_told_what_is_done_and_its_end_is_told() {
        let long = 60_000;
        let says = "echo $HOLDFAST_APP $HOLDFAST_STEP $HOLDFAST_KEY $HOLDFAST_ACTIVE";
        assert_eq!(sh(says, long).await, Outcome::Done("shop s k a".into()));
        let failed = sh("echo out; echo why >&2; exit 3", long).await;
        assert!(matches!(&failed, Outcome::Failed(text) if text.ends_with("exit status: 3: why")));
        let much = sh("yes | head -c 1000000", long).await;
        assert!(matches!(&much, Outcome::Done(text) if text.len() < 600));
        assert!(matches!(sh("sleep 600", 50).await, Outcome::Unknown(_)));
        assert!(matches!(sh("kill -9 $$", long).await, Outcome::Unknown(_)));
        let escapes = sh("printf 'a\\033[31mb\\nc'", long).await;
        assert_eq!(escapes, Outcome::Done("a [31mb c".into()));
        // One that it leaves behind is not waited for.
        assert_eq!(sh("sleep 600 & echo x", long).await, Outcome::Done("x".into()));
        // Who gives it up ends all of it.
        let file = std::env::temp_dir().join(format!("holdfast-dropped-{}", std::process::id()));
        let text = format!("(sleep 1; touch {}) & sleep 600", file.display());
        assert!(timeout(Duration::from_millis(200), sh(&text, long)).await.is_err());
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        assert!(!file.exists());
        let missing = run(&doing(), &["/no/such".to_owned()], Duration::from_secs(1)).await;
        assert!(matches!(missing, Outcome::NotDone(_)));
    }
}
