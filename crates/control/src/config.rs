//! Applications, their cells, and how each server is reached.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use model::durability::Durability;
use model::lease::Terms;
use model::objectives::Objectives;
use model::plan::Plan;
use model::plan::alarm::Alarm;
use model::region::Region;
use model::safety::Rule;
use pg::Target;
use pg::admin::AdminLogin;

use crate::agents::Link;
use crate::live::Live;
use crate::member::Member;

#[derive(Debug, Clone)]
pub struct ControlConfig {
    pub apps: BTreeMap<String, AppServers>,
    /// Where the store is kept.
    pub state_dir: PathBuf,
    /// Of agents and of proxies of other processes, if there are to be any.
    pub terms: Option<Terms>,
}

impl ControlConfig {
    /// The same, of a control that has heard nobody yet.
    pub fn anew(&self) -> ControlConfig {
        let mut config = self.clone();
        let Some(terms) = config.terms else { return config };
        for (app, servers) in &mut config.apps {
            for (cell, server) in &mut servers.cells {
                if let Some(Member::Agent(link)) = &mut server.member {
                    *link = Arc::new(Link::new(app, cell, terms));
                }
            }
        }
        config
    }
}

#[derive(Debug, Clone)]
pub struct AppServers {
    /// The cell that is active when the application is first seen.
    pub first_active: String,
    pub cells: BTreeMap<String, CellServer>,
    /// Applications that this one needs.
    pub depends_on: BTreeSet<String>,
    pub settings: Live<AppSettings>,
}

impl AppServers {
    /// What holds now; whoever looks at more than one of them takes them once.
    pub fn now(&self) -> Arc<AppSettings> {
        self.settings.now()
    }

    /// The region that somebody means who names where an application is to go, if that is no cell.
    pub fn region(&self, to: &str) -> Option<Region> {
        let region = Region::read(to).ok().filter(|_| !self.cells.contains_key(to))?;
        self.cells.keys().any(|cell| self.is_within(cell, &region)).then_some(region)
    }

    pub fn is_within(&self, cell: &str, region: &Region) -> bool {
        let at = self.cells.get(cell).and_then(|server| server.region.as_ref());
        at.is_some_and(|at| region.holds(at))
    }

    /// Whether a cell is the one that is named, or one of the region that is.
    pub fn is_meant(&self, cell: &str, to: &str) -> bool {
        cell == to || self.region(to).is_some_and(|region| self.is_within(cell, &region))
    }

    /// How many levels of their regions two cells share.
    pub(crate) fn shared(&self, one: &str, other: &str) -> usize {
        let region = |cell: &str| self.cells.get(cell).and_then(|server| server.region.as_ref());
        region(one).zip(region(other)).map_or(0, |(one, other)| one.shared(other))
    }
}

/// What of an application can be taken up anew while it is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppSettings {
    pub failover: FailoverConfig,
    pub durability: Durability,
    pub objectives: Objectives,
    /// Servers keep WAL for standbys of other cells by slots.
    pub slots: bool,
    /// By name.
    pub plans: BTreeMap<String, Plan>,
    /// By name.
    pub alarms: BTreeMap<String, Alarm>,
    pub rules: Vec<Rule>,
}

/// When another cell takes the place of one whose server is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailoverConfig {
    /// Nobody has to ask for it.
    pub automatic: bool,
    /// Bytes of WAL that may be lost without asking anybody. None: nothing may be.
    pub loss_max: Option<u64>,
    /// After an automatic one there is no other for so long.
    pub block: Duration,
}

impl Default for FailoverConfig {
    fn default() -> FailoverConfig {
        FailoverConfig { automatic: false, loss_max: None, block: Duration::from_secs(600) }
    }
}

/// One server.
#[derive(Debug, Clone)]
pub struct CellServer {
    pub region: Option<Region>,
    pub target: Target,
    pub admin: AdminLogin,
    /// Whoever may stop, rewind and start it. Without one the old server of a switchover stays fenced until somebody makes
    /// it a standby.
    pub member: Option<Member>,
    /// How a standby and pg_rewind reach this server, as a libpq connection string.
    pub conninfo: String,
}
