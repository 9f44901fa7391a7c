//! The PostgreSQL frontend/backend protocol (3.0, and the negotiation of 3.2) as bytes in, bytes out.
//!
//! This crate knows no socket, no clock and no runtime: it is handed bytes and answers with borrowed views of
//! them, or it appends encoded messages to a buffer. Every length that a peer announces is checked against a
//! limit before anything is sized by it, so nothing here allocates by announced length.
//!
//! # Layout, in reading order
//! - [`frame`]: the tag and the length; stepping over messages in place. The relay's hot path.
//! - [`startup`]: what a client sends before the first tagged message.
//! - [`frontend`], [`backend`]: every message of either side, as a view and as an encoder.
//! - [`scram`]: SCRAM-SHA-256 and -PLUS, both sides.
//! - [`sqlstate`]: the error codes that Holdfast itself answers with.
//!
//! Source of truth: PostgreSQL manual, chapter "Frontend/Backend Protocol", and `src/backend/libpq/pqcomm.c`,
//! `src/backend/tcop/postgres.c` for the limits.

#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::as_conversions)]

mod read;
mod write;

pub mod backend;
pub mod frame;
pub mod frontend;
pub mod scram;
pub mod sqlstate;
pub mod startup;

pub use read::Malformed;
