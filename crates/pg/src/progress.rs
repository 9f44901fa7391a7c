//! Whether a program goes on: how much it and the programs that it runs have read and written (`/proc/PID/io`, proc(5)).

use std::time::{Duration, Instant};

const LOOK: Duration = Duration::from_secs(5);
/// Processes that are looked at.
const PROCESSES_MAX: usize = 100;

/// Ends when the process and the programs that it runs have neither read nor written anything for so long; never where that may
/// not be seen.
pub(crate) async fn stands_still(pid: Option<u32>, limit: Duration) {
    let Some(pid) = pid else { return std::future::pending().await };
    let mut before = Vec::new();
    let mut since = Instant::now();
    loop {
        let now = bytes(pid);
        let is_seen = now.first().is_some_and(|(_, asked)| asked.is_some());
        if now != before || !is_seen {
            (before, since) = (now, Instant::now());
        } else if since.elapsed() >= limit {
            return;
        }
        tokio::time::sleep(LOOK.min(limit / 4)).await;
    }
}

/// What the process, and the programs that it and they run, have read and written so far. A part of itself may be in touch with
/// the other side while nothing comes (the receiver of `pg_basebackup -X stream`).
fn bytes(pid: u32) -> Vec<(u32, Option<String>)> {
    let name = |pid: u32| std::fs::read_to_string(format!("/proc/{pid}/comm")).ok();
    let own = name(pid);
    let (mut found, mut next) = (Vec::new(), vec![pid]);
    while let Some(pid) = next.pop()
        && found.len() < PROCESSES_MAX
    {
        let io = std::fs::read_to_string(format!("/proc/{pid}/io")).ok();
        // `rchar` and `wchar`: what was asked of the kernel, whether a disk or a socket had to do with it.
        let asked = io.map(|text| text.lines().take(2).collect());
        found.push((pid, asked));
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        let children = children.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok());
        next.extend(children.filter(|child| name(*child) != own));
    }
    found
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    const LIMIT: Duration = Duration::from_millis(1_500);

    fn shell(script: &str) -> Child {
        Command::new("sh").args(["-c", script]).spawn().unwrap()
    }

    async fn is_still(child: &Child) -> bool {
        tokio::time::timeout(2 * LIMIT, stands_still(Some(child.id()), LIMIT)).await.is_ok()
    }

    #[tokio::test]
    async fn only_what_does_nothing_stands_still() {
        let sleeps = "sleep 20; true";
        let writes = "while sleep 0.05; do echo x > /dev/null; done";
        let runs = format!("bash -c '{writes}'; true");
        for (script, wanted) in
            [(sleeps, true), (writes, false), (&runs, false), (&format!("({writes}); true"), true)]
        {
            let mut child = shell(script);
            assert_eq!(is_still(&child).await, wanted, "{script}");
            let children = format!("/proc/{0}/task/{0}/children", child.id());
            let children = std::fs::read_to_string(children).unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            for pid in children.split_whitespace() {
                let _ = Command::new("kill").arg(pid).status();
            }
        }
    }
}
