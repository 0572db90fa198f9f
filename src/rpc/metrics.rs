//! What both sides count. Plain cells, since a connection lives on one thread; whoever exports
//! them reads them there.

use std::cell::Cell;
use std::time::Duration;

/// Counts of a connection to one core of another node, over all its reconnects.
#[derive(Debug, Default)]
pub struct PeerMetrics {
    /// Requests under way now.
    pub in_flight: Cell<u64>,
    /// Requests made.
    pub requests: Cell<u64>,
    /// Of these, answered by [`crate::shard::ShardError::Unreachable`] because of the connection
    /// or the deadline.
    pub unreachable: Cell<u64>,
    /// Bytes sent.
    pub sent_bytes: Cell<u64>,
    /// Bytes received.
    pub received_bytes: Cell<u64>,
    /// Connections made.
    pub connects: Cell<u64>,
    /// Attempts to connect that failed.
    pub connects_failed: Cell<u64>,
    /// Connections given up because the peer broke the protocol.
    pub violations: Cell<u64>,
    /// Round trip of pings, smoothed over the last eight; none before the first.
    pub round_trip: Cell<Option<Duration>>,
}

impl PeerMetrics {
    /// Takes the time of one ping.
    pub(super) fn pinged(&self, took: Duration) {
        let smooth = |old: Duration| (old * 7 + took) / 8;
        self.round_trip.set(Some(self.round_trip.get().map_or(took, smooth)));
    }
}

/// Counts of a [`super::Server`].
#[derive(Debug, Default)]
pub struct ServerMetrics {
    /// Connections now.
    pub connections: Cell<u64>,
    /// Connections taken.
    pub accepted: Cell<u64>,
    /// Connections refused, or whose handshake failed.
    pub refused: Cell<u64>,
    /// Requests that run now, also those of connections that ended.
    pub running: Cell<u64>,
    /// Requests answered.
    pub requests: Cell<u64>,
    /// Of these, answered by an error.
    pub errors: Cell<u64>,
    /// Bytes sent.
    pub sent_bytes: Cell<u64>,
    /// Bytes received.
    pub received_bytes: Cell<u64>,
    /// Connections closed because the peer broke the protocol.
    pub violations: Cell<u64>,
    /// Bytes of all windows that are given.
    pub window_bytes: Cell<u64>,
}

/// Counts up.
pub(super) fn add(counter: &Cell<u64>, more: u64) {
    counter.set(counter.get().saturating_add(more));
}
