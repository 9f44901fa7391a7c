//! The session as a value. A server connection is only where it happens to be attached.
//!
//! - [`protocol`]: counts what was asked and what was answered, and so knows when nothing is under way.
//! - [`inspect`]: what statement text and command tags hint at; hints raise questions, catalogs give answers.
//! - [`command`]: what a command does to what sessions share.
//! - [`cursor`], [`temporary`]: what a session has besides, and the statements that make it again.
//! - [`facts`]: what is the same for all sessions of a database, asked once.
//! - [`capture`]: the questions put to the server, and the snapshot read from the answers.
//! - [`snapshot`]: the captured state, and what differs between two of them.
//! - [`names`]: the names of prepared statements, where servers have others.
//! - [`landscape`], [`footprint`]: what names stand for, and what a statement may leave in its session.
//! - [`flight`]: what would become of what is running if its server were lost.
//! - [`statement`]: whether the text of a statement prepares it again.
//! - [`replay`]: the statements that make a fresh server session equal to a snapshot.
//! - [`pin`]: why a session cannot be moved, in words.

pub mod capture;
pub mod command;
pub mod cursor;
pub mod facts;
pub mod flight;
pub mod footprint;
pub mod inspect;
pub mod landscape;
pub mod names;
pub mod pin;
pub mod protocol;
pub mod replay;
pub mod snapshot;
pub mod statement;
pub mod temporary;

pub use facts::Facts;
pub use landscape::Landscape;
pub use pin::Pin;
pub use protocol::Protocol;
pub use snapshot::Snapshot;
