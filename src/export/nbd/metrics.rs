//! What the NBD server counts. Plain cells, since a server lives on one thread; whoever exports
//! them reads them there.

use std::cell::Cell;
use std::time::Duration;

use super::wire::{Command, Errno};

/// Buckets of a [`Histogram`]: bucket `i` counts durations below `2^i` µs, the last all others.
pub const HISTOGRAM_BUCKETS: usize = 25;

/// Durations in buckets of powers of two of a microsecond, up to 8.4 s and beyond.
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Cell<u64>; HISTOGRAM_BUCKETS],
    sum_us: Cell<u64>,
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&self, duration: Duration) {
        let us = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = usize::try_from(u64::BITS - us.leading_zeros()).unwrap_or(usize::MAX);
        add(&self.buckets[bucket.min(HISTOGRAM_BUCKETS - 1)], 1);
        add(&self.sum_us, us);
    }

    /// For each bucket its upper bound in µs (exclusive; `u64::MAX` for the last) and its count.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> {
        self.buckets.iter().enumerate().map(|(i, count)| {
            (if i + 1 == HISTOGRAM_BUCKETS { u64::MAX } else { 1 << i }, count.get())
        })
    }

    /// All durations counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(Cell::get).sum()
    }

    /// Sum of all durations, µs.
    pub fn sum_us(&self) -> u64 {
        self.sum_us.get()
    }
}

/// Counts of one command.
#[derive(Debug, Default)]
pub struct CommandMetrics {
    /// Requests answered, with or without an error.
    pub requests: Cell<u64>,
    /// Bytes of the ranges of requests that succeeded.
    pub bytes: Cell<u64>,
    /// Time from the whole request received to its reply queued.
    pub latency: Histogram,
}

/// Counts of a [`super::Server`]. All but `connections` and `requests_running` only grow.
#[derive(Debug, Default)]
pub struct NbdMetrics {
    /// Connections open now.
    pub connections: Cell<u64>,
    /// Connections accepted.
    pub connections_total: Cell<u64>,
    /// Connections refused because there were too many.
    pub connections_refused: Cell<u64>,
    /// Connections that ended in the handshake: garbage, time-out, TLS failure.
    pub handshakes_failed: Cell<u64>,
    /// Connections closed because the client broke the protocol or stalled in a request.
    pub protocol_errors: Cell<u64>,
    /// Requests running now.
    pub requests_running: Cell<u64>,
    commands: [CommandMetrics; Command::ALL.len()],
    errors: [Cell<u64>; Errno::ALL.len()],
}

impl NbdMetrics {
    /// Counts of one command.
    pub fn command(&self, command: Command) -> &CommandMetrics {
        &self.commands[command as usize]
    }

    /// Error replies with this number.
    pub fn errors(&self, errno: Errno) -> u64 {
        self.errors[errno.index()].get()
    }

    pub(super) fn record(
        &self,
        command: Command,
        bytes: u64,
        result: Result<(), Errno>,
        elapsed: Duration,
    ) {
        let counts = self.command(command);
        add(&counts.requests, 1);
        counts.latency.record(elapsed);
        match result {
            Ok(()) => add(&counts.bytes, bytes),
            Err(errno) => self.record_error(errno),
        }
    }

    pub(super) fn record_error(&self, errno: Errno) {
        add(&self.errors[errno.index()], 1);
    }
}

pub(super) fn add(cell: &Cell<u64>, n: u64) {
    cell.set(cell.get().wrapping_add(n));
}

/// Counts one while it lives.
pub(super) struct Gauge<'a>(&'a Cell<u64>);

impl<'a> Gauge<'a> {
    pub(super) fn new(cell: &'a Cell<u64>) -> Self {
        add(cell, 1);
        Self(cell)
    }
}

impl Drop for Gauge<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histogram_puts_durations_below_their_bound() {
        let histogram = Histogram::default();
        for us in [0, 1, 3, 4, 1 << 40] {
            histogram.record(Duration::from_micros(us));
        }
        let filled: Vec<_> = histogram.buckets().filter(|&(_, count)| count > 0).collect();
        assert_eq!(filled, [(1, 1), (2, 1), (4, 1), (8, 1), (u64::MAX, 1)]);
        assert_eq!(histogram.count(), 5);
        assert_eq!(histogram.sum_us(), 8 + (1 << 40));
    }
}
