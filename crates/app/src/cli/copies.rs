//! Copies of the store: one file, whichever store it is of, and into whichever it is put.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use control::Seated;
use model::seat::{BEAT_KEY, SEAT_KEY};
use pg::clock;
use store::embedded::EmbeddedStore;
use store::etcd::EtcdStore;
use store::{Store, Txn};
use tokio::time::timeout;

use super::{StoreVerb, runtime};
use crate::config::{NodeConfig, Roles, chain};

/// Writes of one transaction; etcd takes 128.
const WRITES_MAX: usize = 100;

pub(super) fn run(verb: &StoreVerb) -> Result<ExitCode, String> {
    let (StoreVerb::Backup { config, .. } | StoreVerb::Restore { config, .. }) = verb;
    let roles = Roles::load(config).map_err(|error| chain(&error))?;
    let apps = match (roles, verb) {
        (Roles::Node(node), StoreVerb::Backup { to, .. }) => {
            back_up(&node, to)?;
            None
        }
        (Roles::Node(node), StoreVerb::Restore { from, .. }) => Some(restore(*node, from)?),
        (roles, StoreVerb::Backup { to, .. }) => {
            let dir = roles.into_config()?.control.state_dir;
            EmbeddedStore::backup(&dir, to).map_err(|error| chain(&error))?;
            None
        }
        (roles, StoreVerb::Restore { from, .. }) => {
            let dir = roles.into_config()?.control.state_dir;
            let store = EmbeddedStore::restore(&dir, from).map_err(|error| chain(&error))?;
            Some(control::records::after_restore(&store).map_err(|error| chain(&error))?)
        }
    };
    if let StoreVerb::Backup { to, .. } = verb {
        say!("the store is copied to `{}`", to.display());
    }
    for (app, epoch) in apps.into_iter().flatten() {
        say!("{app}: epoch {epoch}, no cell is active");
        say!(
            "next: start Holdfast, and say which cell has the newest data: holdfast unfence {app} CELL"
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// A store of its own, beside `beside`, that is removed in the end.
fn scratch(beside: &Path) -> Result<tempfile::TempDir, String> {
    let dir = beside.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    tempfile::TempDir::new_in(dir).map_err(|error| format!("`{}`: {error}", dir.display()))
}

/// As another node than those that run: whoever goes by a name that another has ends it.
fn open(node: &NodeConfig) -> Result<EtcdStore, String> {
    let mut etcd = node.node.etcd.clone();
    etcd.node = format!("{}.copy", etcd.node);
    EtcdStore::open(etcd, clock::boot_number() ^ u64::from(std::process::id()))
        .map_err(|error| chain(&error))
}

fn back_up(node: &NodeConfig, to: &Path) -> Result<(), String> {
    // Of one moment.
    let all = open(node)?.list("").map_err(|error| chain(&error))?;
    let dir = scratch(to)?;
    let copy = EmbeddedStore::open(dir.path()).map_err(|error| chain(&error))?;
    let txn = all.into_iter().fold(Txn::default(), |txn, (key, found)| txn.put(key, found.value));
    copy.commit(&txn).map_err(|error| chain(&error))?;
    EmbeddedStore::backup(dir.path(), to).map_err(|error| chain(&error))
}

/// Puts a copy into etcd while no node is control. What is broken off leaves a mark by which no node takes it for whole.
fn restore(node: NodeConfig, from: &Path) -> Result<Vec<(String, model::cell::Epoch)>, String> {
    let dir = scratch(from)?;
    let copy = EmbeddedStore::restore(dir.path(), from).map_err(|error| chain(&error))?;
    let apps = control::records::after_restore(&copy).map_err(|error| chain(&error))?;
    let is_of_seat =
        |key: &str| [SEAT_KEY, BEAT_KEY, control::records::RESTORING_KEY].contains(&key);
    let mut wanted = copy.list("").map_err(|error| chain(&error))?;
    wanted.retain(|(key, _)| !is_of_seat(key));
    runtime()?.block_on(async {
        let store: Arc<dyn Store> = Arc::new(open(&node)?);
        let terms = node.node.terms;
        let take = Seated::take(store, "restore", terms);
        let seat = timeout(terms.length * 3, take)
            .await
            .map_err(|_| "a node is control: end every node, and restore then".to_owned())?
            .map_err(|error| chain(&error))?;
        let holding = seat.clone();
        let holding = tokio::spawn(async move { holding.hold().await });
        let put = put_all(&*seat, wanted);
        holding.abort();
        seat.leave();
        put.map(|()| apps)
    })
}

fn put_all(store: &dyn Store, wanted: Vec<(String, store::Versioned)>) -> Result<(), String> {
    let commit = |txn: &Txn| store.commit(txn).map(drop).map_err(|error| chain(&error));
    let mark = control::records::RESTORING_KEY;
    commit(&Txn::default().put(mark, Vec::new()))?;
    let before = store.list("").map_err(|error| chain(&error))?;
    let is_of_seat = |key: &str| [SEAT_KEY, BEAT_KEY, mark].contains(&key);
    let gone = before.into_iter().map(|(key, _)| key).filter(|key| !is_of_seat(key));
    let gone: Vec<String> = gone.collect();
    for keys in gone.chunks(WRITES_MAX) {
        commit(&keys.iter().fold(Txn::default(), |txn, key| txn.delete(key)))?;
    }
    for keys in wanted.chunks(WRITES_MAX) {
        let txn =
            keys.iter().fold(Txn::default(), |txn, (key, found)| txn.put(key, found.value.clone()));
        commit(&txn)?;
    }
    commit(&Txn::default().delete(mark))
}
