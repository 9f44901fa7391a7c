//! What an agent, which is beside a server, and control say to each other. The agent asks, control answers: an agent renews
//! its lease, fetches orders and brings what became of them.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cell::Epoch;
use crate::failover::Process;
use crate::lease::Terms;
use crate::member::{Done, Work};
use crate::pledge::Neighbour;

/// Orders that an agent may be given at once.
pub const ORDERS_MAX: usize = 16;

/// Whom a message is from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sender {
    pub app: String,
    pub cell: String,
    /// Which of several it is, by the number in its state directory: another one may not hold the lease at the same time.
    pub host: u64,
    /// The number alone: what is in the directory outlives the boot of the host, which `host` does not.
    pub directory: u64,
    /// Another number each time the agent is started.
    pub run: u64,
}

/// Asks for the lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renew {
    pub sender: Sender,
    /// The highest epoch that this host has seen.
    pub seen: Epoch,
    /// The highest version of the application that it has seen (`model::cell`).
    #[serde(default)]
    pub seen_version: u64,
    pub process: Process,
    /// The agent could see and end the server's processes, if there are any. Without it, it gets no lease.
    pub is_in_hand: bool,
    /// Which server it has in hand: another number for another data directory, host, or boot of it.
    #[serde(default)]
    pub place: Option<u64>,
    /// What its lock file says, by which control sees whether this is the server that it reaches.
    #[serde(default)]
    pub postmaster: Option<Postmaster>,
    /// Where others ask it for pledges.
    pub listens: Option<String>,
    /// Whom it would ask for pledges, as it was told last.
    pub neighbours: BTreeMap<String, u64>,
}

/// The first and the third line of `postmaster.pid` (`pidfile.h`): a process, and when it was started, in seconds of Unix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Postmaster {
    pub pid: u32,
    pub started: u64,
}

impl Postmaster {
    pub fn read(text: &str) -> Option<Postmaster> {
        let mut lines = text.lines().map(str::trim);
        let pid = lines.next()?.parse().ok()?;
        let started = lines.nth(1)?.parse().ok()?;
        Some(Postmaster { pid, started })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewed {
    /// None: another may have it.
    pub granted: Option<Epoch>,
    /// Of the application: one that is lower than what was seen is of a store that was restored, which nobody goes by.
    #[serde(default)]
    pub version: u64,
    pub terms: Terms,
    /// All other agents of the application. None of them if not all are known: a lease cannot go on by pledges then.
    pub neighbours: Vec<Neighbour>,
}

/// Asks for orders, and waits a while for one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetch {
    pub sender: Sender,
    /// The last order that has arrived, or 0; later ones are given again.
    pub last: u64,
}

/// What an agent is to do, and in which epoch: one that has seen a higher one refuses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    pub id: u64,
    pub epoch: Epoch,
    /// What has not begun after so long is not done any more: nobody waits for it.
    pub wait_max: Duration,
    pub what: Task,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    Work(Work),
    /// Renews the lease until it is of the order's epoch, so that the server may become a primary.
    HoldLease,
    /// Pledges nothing any more for leases of the order's epoch, and waits until what it has pledged is over.
    EndPledges {
        /// Of the agent that is meant: another one has not pledged what this one has.
        directory: u64,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fetched {
    pub orders: Vec<Order>,
}

/// What became of an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finished {
    pub sender: Sender,
    pub id: u64,
    pub result: Result<Done, String>,
}
