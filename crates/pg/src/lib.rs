//! What several shells need from a real PostgreSQL server.
//!
//! # Layout, in reading order
//! - [`address`]: where a server listens.
//! - [`stream`]: a socket, plain or TLS, that can be taken apart and put together again.
//! - [`connect`]: TLS negotiation and login.
//! - [`connection`]: messages and queries on a connection.
//! - [`admin`]: Holdfast's own connection to a server: safe `search_path`, own timeouts.
//! - [`clock`]: the host's time, sleep included.
//! - [`instance`]: a server's programs and its data directory on this machine.
//! - [`member`]: what is asked of whoever has those at hand.
//! - [`port`]: a port that is kept for a server that is started later.
//! - [`wal`]: what a server that has ended has left in its log; `handover`: how another host gets that; `touched`, `lost_rows`: and which rows those are.
//!
//! Every wait has a deadline that the caller gives. SQL of ours names everything in full or runs with
//! `search_path = pg_catalog`.

#![forbid(unsafe_code)]

pub mod address;
pub mod admin;
pub mod clock;
pub mod connect;
pub mod connection;
mod handover;
pub mod instance;
mod lost_rows;
pub mod member;
pub mod port;
mod processes;
mod progress;
mod rejoin;
pub mod stream;
mod touched;
pub mod wal;

pub use address::Address;
pub use connect::{ConnectError, Login, Target};
pub use connection::{Connection, QueryError};
pub use port::Port;
pub use stream::Stream;
