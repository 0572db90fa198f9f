//! The RPC between nodes: disks of other nodes as [`crate::shard::ShardClient`], heads of other nodes as
//! [`crate::export::BlockTarget`], and questions to them, over a byte stream.
//!
//! ```text
//!    head ──► RemoteDisk ────┐                        ┌──► DiskDirectory ──► ShardClient of a disk
//!  export ──► RemoteVolume ──┼─ Peer ══ stream ══ Server ─► VolumeDirectory ──► BlockTarget of a head
//!    node ──► Peer::ask ─────┘(client/)         (server/)└─► Questions
//! ```
//!
//! - `frame.rs` declares every byte on the wire, `request.rs`, `message.rs` (disks), `volume.rs` and `fields.rs`
//!   what is in requests and replies, `handshake.rs` how a connection begins;
//! - `input.rs`, `output.rs` and `link.rs` move frames, the same on both sides;
//! - `client/` keeps one connection to a core of another node, `remote.rs` is a disk behind it,
//!   `remote_volume.rs` a head, `forward.rs` a volume wherever its head runs;
//! - `server/` serves the disks and volumes of this core; `tcp.rs` makes and prepares sockets, `tls.rs` has
//!   both ends prove which node they are.
//!
//! Knows disks and volumes by their ids, heads by their epochs, and what they are asked as numbers; knows nothing of
//! what blocks mean, of how a head does what it is asked, or of who belongs to a cluster. It works on any stream: TCP, TLS on it, or pipes in memory.
//!
//! # What it promises
//!
//! - A request is sent once. If its connection breaks, or its deadline passes, it is answered with
//!   [`crate::shard::ShardError::Unreachable`]: its outcome is unknown. It is never sent again (but by `forward.rs`).
//! - Requests about one volume to one disk that change something arrive in the order in which they
//!   were made, also across connections: before a connection is taken, the one before it of the same
//!   process is cut, and what it had not delivered by then never will be.
//! - A change to a volume whose outcome is unknown is over before the next one of this process begins
//!   (`remote_volume.rs` says how); `forward.rs` may therefore repeat it.
//! - A request to a disk is sent as soon as it is made, not when its future is polled; a dropped future leaves it running.
//! - No request hangs: while there is no connection, requests fail after [`RpcConfig::down_patience`]; or
//!   earlier, when the connection broke and the node then refused others: its process died.
//! - A disk that does not answer holds up no other one: the window of a connection is shared so that a
//!   part of it is always left to the others.
//! - Memory is bounded on both sides; a peer that breaks the protocol is told so, counted, and its
//!   connection is closed.

mod client;
mod fields;
mod forward;
pub mod frame;
pub mod handshake;
mod input;
mod link;
pub mod message;
mod metrics;
mod output;
mod planted;
mod remote;
mod remote_volume;
pub mod request;
mod server;
pub mod tcp;
#[cfg(test)]
mod tests;
pub mod tls;
pub mod volume;
mod window;

use std::ops::RangeInclusive;
use std::time::Duration;

pub use client::{AskError, ConnectionState, Dial, Peer};
pub use forward::{ForwardConfig, Forwarder, Locate};
pub use handshake::{HandshakeError, Identity, PeerIdentity};
pub use link::LinkEnd;
pub use metrics::{PeerMetrics, ServerMetrics};
pub use remote::RemoteDisk;
pub use remote_volume::RemoteVolume;
pub use server::{Directories, DiskDirectory, Questions, Refuses, Served, Server, VolumeDirectory};

use crate::limits::{RPC_REQUESTS_MAX, RPC_SERVER_BYTES_MAX, RPC_WINDOW_BYTES_MAX};

/// How both sides behave. [`Default`] is what a node without configuration runs with.
#[derive(Debug, Clone)]
pub struct RpcConfig {
    /// Versions of the frames that may be agreed on.
    pub versions: RangeInclusive<u16>,
    /// Time for a connection and its handshake.
    pub connect_timeout: Duration,
    /// Longest time between attempts to connect.
    pub backoff_max: Duration,
    /// How long requests wait for a connection that is down, at most.
    pub down_patience: Duration,
    /// Time after which a request is given up. Far longer than callers wait who know better.
    pub deadline: Duration,
    /// The same for what takes as long as there is to do: dropping a volume.
    pub long_deadline: Duration,
    /// Time between pings.
    pub ping_interval: Duration,
    /// A connection on which nothing is heard for so long is given up.
    pub silence: Duration,
    /// A server closes a connection on which nothing is heard, or that takes no replies, for so long.
    pub idle_timeout: Duration,
    /// Time that running requests get when the server stops.
    pub drain_timeout: Duration,
    /// Checksums on the wire also for payload that has its own.
    pub checked_payload: bool,
    /// Requests of a connection under way at once, on the server's side.
    pub requests_max: u32,
    /// Bytes of a connection under way at once, on the server's side.
    pub window_bytes: usize,
    /// Bytes of all windows that a server gives.
    pub server_bytes: usize,
}

impl Default for RpcConfig {
    fn default() -> Self {
        Self {
            versions: frame::VERSION_MIN..=frame::VERSION_MAX,
            connect_timeout: Duration::from_secs(3),
            backoff_max: Duration::from_secs(5),
            down_patience: Duration::from_secs(2),
            deadline: Duration::from_secs(30),
            long_deadline: Duration::from_mins(5),
            ping_interval: Duration::from_millis(500),
            silence: Duration::from_secs(2),
            idle_timeout: Duration::from_secs(15),
            drain_timeout: Duration::from_secs(10),
            checked_payload: false,
            requests_max: RPC_REQUESTS_MAX,
            window_bytes: RPC_WINDOW_BYTES_MAX,
            server_bytes: RPC_SERVER_BYTES_MAX,
        }
    }
}
