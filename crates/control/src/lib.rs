//! Carries out changes of applications: durably, step by step, so that a crash at any point finds its way.
//!
//! # Layout, in reading order
//! - [`config`]: applications, their cells, and how each server is reached.
//! - [`member`]: whoever has a server's files at hand.
//! - [`agents`]: what control knows of those beside servers elsewhere.
//! - `mailbox`: orders for another process, and what became of them.
//! - [`proxies`]: orders for all proxies, those of other processes too.
//! - [`cancels`]: cancel requests that have come to another proxy than that of their session.
//! - [`seat`]: what makes one of several nodes control.
//! - [`audit`]: what was done, by whom and why.
//! - [`records`]: the application and its executions in the store.
//! - [`requests`]: what it is asked for, and what it answers.
//! - [`control`]: what it has. `verbs`: what people ask for.
//! - `runner`: one execution, stage by stage, as `model::switchover` says.
//! - `stages`: what each stage does to real servers.
//! - [`plans`]: executions of plans. `actions`: what their steps do elsewhere.
//! - [`alarms`]: what is looked at, besides servers, so that a plan may begin by it.
//! - [`safety`]: rules that are in the way of changes, and gates.
//! - [`watch`]: looks at the active cells, and fails over.
//! - `following`: has standbys follow the active cell's server.
//! - `durability`: has commits wait for standbys.
//! - [`hba`]: who may still log in to a fenced server.
//!
//! **Architecture Invariant:** control never sees a proxy. It sends orders and reads reports.

#![forbid(unsafe_code)]

use model::barrier::{Order, Report};
use tokio::sync::{mpsc, oneshot};

mod actions;
pub mod agents;
pub mod alarms;
pub mod audit;
pub mod cancels;
pub mod config;
pub mod control;
mod durability;
mod following;
pub mod hba;
pub mod live;
mod mailbox;
pub mod member;
pub mod plans;
pub mod proxies;
pub mod records;
pub mod requests;
mod runner;
pub mod safety;
pub mod seat;
mod slots;
mod stages;
mod verbs;
pub mod watch;

pub use config::ControlConfig;
pub use control::Control;
pub use member::Member;
pub use requests::{
    ControlError, FailoverRequest, FenceRequest, MoveRequest, Served, SwitchoverRequest,
};
pub use seat::Seated;

/// An order and where its report goes.
pub type Ask = (Order, oneshot::Sender<Report>);

/// The way to the proxy of this process, if it has one.
pub type Proxies = Option<mpsc::Sender<Ask>>;
