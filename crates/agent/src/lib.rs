//! Stands beside one PostgreSQL server: holds the lease by which it may be the primary, ends the server when that is over,
//! and works on its programs and files as control asks.
//!
//! # Layout, in reading order
//! - [`config`]: which server, and where control is.
//! - `beside`: the agent: renews, watches, obeys.
//! - `pledging`: how the lease goes on while control is gone.
//! - [`guard`]: another process that ends the server when the lease is over and the agent has not.
//!
//! **Architecture Invariant:** whatever becomes of the agent, a server that takes writes is ended before its lease could be
//! another's (`model::lease`). What a host has once seen of epochs is on its disk before it counts.

#![forbid(unsafe_code)]

mod beside;
pub mod config;
mod epoch;
pub mod guard;
mod pledging;

pub use beside::{Agent, AgentError};
pub use config::AgentConfig;
