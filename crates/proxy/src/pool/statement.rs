//! Prepared statements that sessions share by their text.

use std::sync::{Arc, Mutex};

use model::session::Landscape;
use model::session::footprint::Footprint;

use super::database::Database;
use super::lock;
use super::state::State;

/// The text and types of a Parse, and what it is read under.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct StatementKey {
    /// The body of the message behind the name.
    pub(super) body: Box<[u8]>,
    /// What its session has set: names and literals mean something else under other settings.
    pub(super) state: State,
    /// Parameters that a reload of the configuration may change, by which literals are read.
    pub(super) styles: [Box<str>; 5],
    /// A statement that is prepared after something was defined anew is prepared anew.
    pub(super) redefined: u64,
}

/// Parameters by which literals are read when a statement is prepared.
pub(super) const STYLES: [&str; 5] =
    ["DateStyle", "TimeZone", "IntervalStyle", "standard_conforming_strings", "client_encoding"];

/// What the names of statements on servers begin with.
pub(crate) const SERVER_NAME: &[u8] = b"holdfast_";

/// A prepared statement that sessions of a pool share.
#[derive(Debug)]
pub struct Statement {
    pub id: u64,
    /// The name that servers know it by.
    pub name: Box<[u8]>,
    /// The body of its Parse behind the name.
    pub body: Box<[u8]>,
    /// What it may leave, by the landscape that told.
    footprint: Mutex<Option<(Arc<Landscape>, Footprint)>>,
}

impl PartialEq for Statement {
    fn eq(&self, other: &Statement) -> bool {
        self.id == other.id
    }
}

impl Statement {
    pub(super) fn new(id: u64, name: Box<[u8]>, body: &[u8]) -> Statement {
        Statement { id, name, body: body.into(), footprint: Mutex::default() }
    }

    pub(crate) fn sql(&self) -> &[u8] {
        let end = self.body.iter().position(|byte| *byte == 0);
        self.body.get(..end.unwrap_or(self.body.len())).unwrap_or_default()
    }

    pub(super) fn footprint(&self, database: &Database) -> Footprint {
        let Some(now) = database.landscape() else { return database.footprint(self.sql()) };
        let mut known = lock(&self.footprint);
        match &*known {
            Some((landscape, footprint)) if Arc::ptr_eq(landscape, &now) => footprint.clone(),
            _ => {
                let footprint = now.of_text(self.sql());
                *known = Some((now, footprint.clone()));
                footprint
            }
        }
    }
}

impl std::hash::Hash for Statement {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.id.hash(state);
    }
}

impl Eq for Statement {}
