//! The numbers that the node hands over when it is scraped: plain copies of its own counters.
//!
//! Counters count since the node started (or since the thing appeared) and never fall while it
//! exists; labels come from names and paths, so there are as many series as things, never as
//! many as requests.

use super::histogram::LatencySample;
use crate::admin::types::{DiskState, DiskTiming, Fill, HealthLevel, Space};

/// Everything.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// The node.
    pub node: NodeSample,
    /// Each disk.
    pub disks: Vec<DiskSample>,
    /// Each pool.
    pub pools: Vec<PoolSample>,
    /// Each volume.
    pub volumes: Vec<VolumeSample>,
    /// The NBD server.
    pub nbd: NbdSample,
    /// Connections to cores of other nodes.
    pub rpc_peers: Vec<RpcPeerSample>,
    /// The server of disks for other nodes.
    pub rpc_server: RpcServerSample,
}

/// The node.
#[derive(Debug, Clone)]
pub struct NodeSample {
    /// Seconds since it started.
    pub uptime_seconds: f64,
    /// Its health.
    pub health: HealthLevel,
    /// Bytes of the current repair that are done; 0 without one.
    pub repair_done_bytes: u64,
    /// Bytes of the current repair in all; 0 without one.
    pub repair_total_bytes: u64,
    /// Bytes that it rebuilds a second.
    pub repair_bytes_per_second: u64,
    /// Bytes that the heads on it rebuilt.
    pub rebuilt_bytes: u64,
    /// Bytes of the current balance that are done; 0 without one.
    pub balance_done_bytes: u64,
    /// Bytes of the current balance in all; 0 without one.
    pub balance_total_bytes: u64,
    /// Bytes that it moves a second.
    pub balance_bytes_per_second: u64,
    /// Bytes that the heads on it moved to where there is room.
    pub balanced_bytes: u64,
    /// Bytes a second that repair and scrub may read and write; none while there is no limit.
    pub background_limit_bytes_per_second: Option<u64>,
    /// What requests of clients take against what they take without that work, per mille.
    pub client_slowdown_per_mille: Option<u64>,
}

impl Default for NodeSample {
    fn default() -> Self {
        Self {
            uptime_seconds: 0.0,
            health: HealthLevel::Ok,
            repair_done_bytes: 0,
            repair_total_bytes: 0,
            repair_bytes_per_second: 0,
            rebuilt_bytes: 0,
            balance_done_bytes: 0,
            balance_total_bytes: 0,
            balance_bytes_per_second: 0,
            balanced_bytes: 0,
            background_limit_bytes_per_second: None,
            client_slowdown_per_mille: None,
        }
    }
}

/// One disk.
#[derive(Debug, Clone)]
pub struct DiskSample {
    /// Its id: label `disk`.
    pub disk: String,
    /// Its path: label `path`.
    pub path: String,
    /// Its state.
    pub state: DiskState,
    /// All slots.
    pub slots: u64,
    /// Slots in use.
    pub slots_used: u64,
    /// Size of a slot, bytes.
    pub slot_bytes: u64,
    /// What the slots are for.
    pub space: Space,
    /// I/O errors.
    pub io_errors: u64,
    /// Checksum mismatches.
    pub checksum_errors: u64,
    /// Time-outs.
    pub timeout_errors: u64,
    /// Appends.
    pub appends: u64,
    /// Bytes of them.
    pub append_bytes: u64,
    /// Sum of their latencies, microseconds.
    pub append_us: u64,
    /// Reads.
    pub reads: u64,
    /// Bytes of them.
    pub read_bytes: u64,
    /// Sum of their latencies, microseconds.
    pub read_us: u64,
    /// Flushes of the device.
    pub flushes: u64,
    /// Latest latencies, and those of its peers.
    pub timing: DiskTiming,
}

/// One pool.
#[derive(Debug, Clone, Default)]
pub struct PoolSample {
    /// Its name: label `pool`.
    pub pool: String,
    /// Raw space, bytes.
    pub raw_bytes: u64,
    /// Of it in use, bytes.
    pub used_bytes: u64,
    /// Of it free, bytes.
    pub free_bytes: u64,
    /// What clients stored, before redundancy, bytes.
    pub stored_bytes: u64,
    /// What clients could store in all, bytes.
    pub usable_bytes: u64,
    /// What its volumes' slots are for.
    pub space: Space,
    /// How full it is.
    pub fill: Fill,
    /// Still to be rebuilt, bytes.
    pub repair_remaining_bytes: u64,
}

/// One volume.
#[derive(Debug, Clone, Default)]
pub struct VolumeSample {
    /// `pool/name`: label `volume`.
    pub volume: String,
    /// Size that clients see, bytes.
    pub size_bytes: u64,
    /// Bytes that have storage.
    pub allocated_bytes: u64,
    /// What its slots are for.
    pub space: Space,
    /// Bytes of reads.
    pub read_bytes: u64,
    /// Bytes of writes.
    pub write_bytes: u64,
    /// Latencies of reads; their count is the count of reads.
    pub read_latency: LatencySample,
    /// Latencies of writes, trims and zeroes; their count is the count of writes.
    pub write_latency: LatencySample,
    /// Log records written.
    pub log_records: u64,
    /// Sequence of the newest checkpoint.
    pub checkpoint_sequence: u64,
    /// Log segments left because a shard failed.
    pub failovers: u64,
    /// Segments that lack shards.
    pub reduced_segments: u64,
    /// Still to be rebuilt, bytes.
    pub repair_remaining_bytes: u64,
    /// Rebuilt by its head, bytes.
    pub rebuilt_bytes: u64,
    /// Its scrub.
    pub scrub: ScrubSample,
}

/// The scrub of one volume.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScrubSample {
    /// Whether a round is under way.
    pub running: bool,
    /// Bytes read by scrubs.
    pub read_bytes: u64,
    /// Bad blocks and shards found.
    pub found: u64,
    /// Of them repaired.
    pub repaired: u64,
    /// Bytes of the present round that are done.
    pub done_bytes: u64,
    /// Bytes of the present round.
    pub total_bytes: u64,
    /// Bytes of the present or last round that could not be checked.
    pub unchecked_bytes: u64,
    /// Places that cannot be repaired.
    pub unrepairable: u64,
    /// When the last round ended, seconds since 1970; 0 if none has.
    pub finished_at_seconds: u64,
}

/// The NBD server.
#[derive(Debug, Clone, Copy, Default)]
pub struct NbdSample {
    /// Connections now.
    pub connections: u64,
    /// Connections since the start.
    pub connections_accepted: u64,
    /// Requests.
    pub requests: u64,
    /// Requests answered with an error.
    pub request_errors: u64,
    /// Connections that broke the protocol.
    pub protocol_errors: u64,
}

/// The connection to one core of another node.
#[derive(Debug, Clone, Default)]
pub struct RpcPeerSample {
    /// Name of the node, and the core: label `peer`.
    pub peer: String,
    /// Whether requests pass.
    pub up: bool,
    /// Requests under way.
    pub in_flight: u64,
    /// Requests made.
    pub requests: u64,
    /// Of these, those whose outcome stayed unknown.
    pub unreachable: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Connections made.
    pub connects: u64,
    /// Connections given up because the peer broke the protocol.
    pub violations: u64,
    /// Round trip of pings, microseconds; none before the first.
    pub round_trip_us: Option<u64>,
}

impl RpcPeerSample {
    /// What a connection counts now.
    pub fn of(peer: &crate::rpc::Peer) -> Self {
        let counts = peer.metrics();
        let us = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Self {
            peer: peer.label().to_owned(),
            up: matches!(*peer.connection().borrow(), crate::rpc::ConnectionState::Up { .. }),
            in_flight: counts.in_flight.get(),
            requests: counts.requests.get(),
            unreachable: counts.unreachable.get(),
            sent_bytes: counts.sent_bytes.get(),
            received_bytes: counts.received_bytes.get(),
            connects: counts.connects.get(),
            violations: counts.violations.get(),
            round_trip_us: counts.round_trip.get().map(us),
        }
    }
}

/// The server of disks for other nodes.
#[derive(Debug, Clone, Copy, Default)]
pub struct RpcServerSample {
    /// Connections now.
    pub connections: u64,
    /// Connections refused.
    pub refused: u64,
    /// Requests that run.
    pub running: u64,
    /// Requests answered.
    pub requests: u64,
    /// Of these, by an error.
    pub errors: u64,
    /// Connections closed because the peer broke the protocol.
    pub violations: u64,
}

impl RpcServerSample {
    /// What a server counts now.
    pub fn of(counts: &crate::rpc::ServerMetrics) -> Self {
        Self {
            connections: counts.connections.get(),
            refused: counts.refused.get(),
            running: counts.running.get(),
            requests: counts.requests.get(),
            errors: counts.errors.get(),
            violations: counts.violations.get(),
        }
    }
}
