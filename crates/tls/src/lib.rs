//! TLS 1.2 and 1.3 for both legs of the proxy, as bytes in, bytes out.
//!
//! rustls does the handshake and nothing else: right after it, the traffic secrets are taken out and the record
//! layer of this crate goes on. Its whole state is a value of a few hundred bytes, so a live connection can
//! later be handed to another process, and there is one code path, which every test exercises, instead of one
//! for normal life and one for the hand-over. An idle connection costs its keys and no buffer.
//!
//! # Layout, in reading order
//! - [`config`]: certificates, keys and modes, as libpq names them.
//! - [`handshake`]: drives rustls until the secrets are out.
//! - [`mutual`]: TLS between the parts of Holdfast, which is never handed over: rustls as it is.
//! - [`record`]: sealing and opening records, key updates, alerts.
//! - [`certificate`]: the two facts that PostgreSQL takes out of a certificate.
//!
//! **Architecture Invariant:** no socket and no clock here; no other crate sets rustls up.

#![forbid(unsafe_code)]
#![deny(clippy::unwrap_used)]

pub mod certificate;
pub mod config;
pub mod handshake;
pub mod mutual;
pub mod record;

pub use config::{ClientTls, ServerTls, SslMode, SslNegotiation, TlsConfigError};
pub use handshake::{Established, Handshake, HandshakeError, Progress};
pub use record::{Opened, Record, RecordError};
