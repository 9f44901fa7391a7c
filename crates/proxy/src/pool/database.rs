//! What names stand for in a database, and whether that still holds.

use std::sync::{Arc, Mutex};

use model::session::Landscape;
use model::session::command::ends_transaction;
use model::session::footprint::{Footprint, Leaves};
use tokio::sync::Notify;

use super::{Bound, lock};

/// So often learning fails before nobody waits for it any more.
const FAILURES_MAX: u32 = 2;

/// What names stand for in one database of an application, and whether that still holds.
#[derive(Debug)]
pub struct Database {
    pub name: String,
    pub(super) state: Mutex<DatabaseState>,
    /// Wakes whoever learns anew.
    pub(super) changed: Arc<Notify>,
}

#[derive(Debug, Default)]
pub(super) struct DatabaseState {
    pub(super) landscape: Option<Arc<Landscape>>,
    /// What `landscape::CHANGED_QUESTION` gave when it was learned.
    pub(super) mark: String,
    /// Something was created or altered since.
    pub(super) is_stale: bool,
    /// How often something may have been, by code that nobody has seen, and of how many of these the mark has told.
    pub(super) doubts: u64,
    pub(super) settled: u64,
    /// How often that has happened.
    pub(super) redefined: u64,
    /// What it is could not be learned, so often one after the other. Once may be the end of a server whose sessions do
    /// not know it yet.
    pub(super) failures: u32,
    /// Sessions wait until it is.
    pub(super) is_waited_for: bool,
}

impl DatabaseState {
    fn is_sure(&self) -> bool {
        !self.is_stale && self.doubts == self.settled
    }

    /// It was learned when the mark was this, and nothing has changed.
    pub(super) fn is_at(&self, mark: &str) -> bool {
        self.landscape.is_some() && self.mark == mark && !self.is_stale
    }
}

impl Database {
    /// What a statement may leave, and why that cannot be told otherwise.
    pub(super) fn footprint(&self, sql: &[u8]) -> Footprint {
        match self.landscape() {
            Some(landscape) => landscape.of_text(sql),
            // It is run also while names are being learned, as it means the same whatever they stand for.
            None if ends_transaction(sql) => Landscape::default().of_text(sql),
            None => Footprint::of(Leaves::ANYTHING),
        }
    }

    /// It is being learned what was defined anew: a moment later more is known.
    pub(super) fn is_being_learned(&self) -> bool {
        let mut state = lock(&self.state);
        let waits = !state.is_sure() && state.failures < FAILURES_MAX;
        state.is_waited_for |= waits;
        if waits {
            // It may have been asked for before there was anybody to ask.
            self.changed.notify_one();
        }
        waits
    }

    /// What its functions are bound to; if nothing is known of them, to everything.
    pub(crate) fn bound(&self) -> Bound {
        match &lock(&self.state).landscape {
            Some(landscape) => Bound { depends: landscape.depends_on_path, folds: landscape.folds },
            None => Bound { depends: true, folds: true },
        }
    }

    /// Why every statement may leave something.
    pub(super) fn refused(&self) -> Option<String> {
        lock(&self.state).landscape.as_ref()?.refused.clone()
    }

    /// How often something was defined anew, as far as is known.
    pub(super) fn redefined(&self) -> u64 {
        lock(&self.state).redefined
    }

    /// Something was defined anew: until it is known what, every statement may leave something.
    pub(super) fn mark_stale(&self) {
        let mut state = lock(&self.state);
        state.is_stale = true;
        state.redefined += 1;
        drop(state);
        self.changed.notify_one();
    }

    /// Something may have been defined anew: until it is known, every statement may leave something.
    pub(crate) fn doubt(&self) {
        lock(&self.state).doubts += 1;
        self.changed.notify_one();
    }

    pub(super) fn landscape(&self) -> Option<Arc<Landscape>> {
        let state = lock(&self.state);
        state.landscape.clone().filter(|_| state.is_sure())
    }
}
