//! Speaks the PostgreSQL protocol to clients and servers, and owns the sessions between them.
//!
//! Two worlds meet here. The **engine** is one thread (or a few) that owns the sockets of every session while
//! bytes pass: no task, no lock, no allocation a message. Everything that has to wait and to think (logging
//! in, reading a session's state, attaching it elsewhere) is ordinary async code, which is handed the session
//! as a value and hands it back.
//!
//! # Layout, in reading order
//! - [`config`]: limits and addresses, validated before they get here.
//! - [`app`]: an application: its cells, which of them is served, and the gate before it.
//! - [`session`]: the session as a value, with its two sockets.
//! - [`relay`]: what is done with bytes on their way. Pure.
//! - [`engine`]: the loop that moves them.
//! - `listener`, `login`, `auth`: from a new socket to a session.
//! - `carry`: reading a session's state, and attaching it to another server.
//! - [`pool`]: server connections that sessions share.
//! - [`mover`]: obeys the orders of a switchover.
//! - `console`: the admin database.
//! - [`metrics`]: what is counted.
//!
//! **Architecture Invariant:** a session is in exactly one place: in an engine, or in the hands of one task.

#![deny(unsafe_code)]

pub mod app;
mod auth;
mod carry;
pub mod config;
mod confine;
mod console;
pub mod engine;
mod listener;
mod login;
pub mod metrics;
pub mod mover;
pub mod pool;
mod proxy;
pub mod relay;
pub mod session;

pub use config::ProxyConfig;
pub use proxy::{Proxy, Reread, Rereads, StartError};
