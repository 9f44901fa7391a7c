//! Runs a program.

use std::process::Stdio;
use std::time::Duration;

use model::plan::run::Outcome;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::time::timeout;

use super::{Doing, SAID_LEN_MAX, said};

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

pub(super) async fn run(doing: &Doing, argv: &[String], limit: Duration) -> Outcome {
    let Some((program, args)) = argv.split_first() else {
        return Outcome::NotDone("there is no program".into());
    };
    let spawned = Command::new(program)
        .args(args)
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
        .kill_on_drop(true)
        .process_group(0)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => return Outcome::NotDone(format!("`{program}` cannot be started: {error}")),
    };
    let group = child.id().and_then(|id| rustix::process::Pid::from_raw(id.try_into().ok()?));
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
    let status = match timeout(limit, wait).await {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => return Outcome::Unknown(format!("`{program}`: {error}")),
        Err(_) => {
            // What it has started goes with it.
            if let Some(group) = group {
                let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            }
            let _ = child.kill().await;
            return Outcome::Unknown(format!("`{program}` has not ended within {limit:?}: killed"));
        }
    };
    let says = [said_out, said_err].map(|text| said(&String::from_utf8_lossy(&text)));
    match (status.success(), says) {
        (true, [out, _]) => Outcome::Done(out),
        (false, [out, err]) => {
            let says = if err.is_empty() { out } else { err };
            Outcome::Failed(format!("`{program}`: {status}: {says}"))
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
        // One that it leaves behind is not waited for.
        assert_eq!(sh("sleep 600 & echo x", long).await, Outcome::Done("x".into()));
        let missing = run(&doing(), &["/no/such".to_owned()], Duration::from_secs(1)).await;
        assert!(matches!(missing, Outcome::NotDone(_)));
    }
}
