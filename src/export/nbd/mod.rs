//! NBD server: fixed newstyle negotiation, structured replies, TLS.
//!
//! ```text
//!  listener ─► server ─► negotiate ─► session ─┬─ input ─► request ─► BlockTarget
//!              (limits)   (options)   (1 task) └─ reply ◄────┘
//! ```
//!
//! Knows volumes through [`super::BlockTarget`] only. Everything of one server runs on one thread.
//! Source of the protocol: `doc/proto.md` of the `NetworkBlockDevice` project.
//!
//! # Promises
//! - Bytes of a client never cause a panic, nor memory beyond the bounds of [`crate::limits`].
//! - A client that breaks the protocol is disconnected with a line in the log; nobody else notices.
//! - Several connections to one export are safe (`CAN_MULTI_CONN`): they share the target, whose
//!   writes are durable when they are answered.

mod input;
mod metrics;
mod negotiate;
mod permits;
mod reply;
mod request;
mod server;
mod session;
pub mod tls;
pub mod wire;

pub use metrics::{CommandMetrics, HISTOGRAM_BUCKETS, Histogram, NbdMetrics};
pub use server::{NbdConfig, Server, UnixSocket};
pub use tls::TlsMode;
