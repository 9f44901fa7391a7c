//! Every decision of Holdfast, pure: events in, actions out.
//!
//! This crate does no I/O, reads no clock and starts no task; its Cargo.toml could not let it, and its
//! `clippy.toml` bans what the standard library would offer. Whatever runs here can be recorded and replayed.
//!
//! # Layout, in reading order
//! - [`session`]: the session as a value: where its protocol stands, what its snapshot holds, what pins it,
//!   how it is replayed.
//! - [`sql`]: the little that is read from statement text.
//! - [`cell`]: applications, cells, their states and the epoch.
//! - [`region`], [`dependency`]: where cells are, and which applications need which.
//! - [`switchover`]: a planned switchover, step by step, and how a crashed one goes on.
//! - [`failover`]: whether a server is lost, and whether another may take its place.
//! - [`lost`]: what a lost server alone had.
//! - [`following`]: whether a standby is told to follow another server.
//! - [`member`]: what control asks of whoever has a server's files at hand.
//! - [`lease`]: the right to be the primary, for a time.
//! - [`pledge`]: how that goes on while control is gone.
//! - [`agent`]: what an agent and control say to each other.
//! - [`durability`]: on how many servers a commit is before it is acknowledged.
//! - [`plan`]: steps that change an application and what hangs on it, and what is to be done next in them.
//! - [`safety`]: what must hold for a change of cells.
//! - [`slots`], [`settings`]: what servers keep for standbys, and what a failover hangs on.
//! - [`objectives`]: how long clients may be without service and what may be lost, and what it was.
//! - [`barrier`]: what control asks of proxies, and what they answer.
//! - [`proxies`]: what proxies of other processes and control say to each other, and what they make of it.
//! - [`seat`]: which of several control nodes is control.
//! - [`audit`]: what was done, by whom and why.
//! - [`policy`]: what commands do, and what the state of a cell makes of it.
//! - [`persisted`]: the shapes that the store keeps.

#![forbid(unsafe_code)]

pub mod agent;
pub mod audit;
pub mod barrier;
pub mod cell;
pub mod dependency;
pub mod durability;
pub mod error_chain;
pub mod failover;
pub mod following;
pub mod lease;
pub mod lost;
pub mod lsn;
pub mod member;
pub mod objectives;
pub mod persisted;
pub mod plan;
pub mod pledge;
pub mod policy;
pub mod proxies;
pub mod region;
pub mod safety;
pub mod seat;
pub mod session;
pub mod settings;
pub mod slots;
pub mod sql;
pub mod switchover;

pub use error_chain::chain;
pub use lsn::Lsn;
