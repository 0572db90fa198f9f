//! Counters of a disk: plain cells, read by whoever exports metrics.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// Count, volume and time of one kind of operation since the disk was opened.
#[derive(Debug, Default)]
pub struct OperationStats {
    /// Operations that succeeded.
    pub count: Cell<u64>,
    /// Payload bytes of those.
    pub bytes: Cell<u64>,
    /// Operations that failed.
    pub errors: Cell<u64>,
    /// Sum of the durations of all, microseconds.
    pub latency_us_sum: Cell<u64>,
    /// Longest duration, microseconds.
    pub latency_us_max: Cell<u64>,
    /// Operations that run now.
    pub in_flight: Cell<u64>,
}

/// An operation under way; ends the count of those in flight when it is dropped.
pub(super) struct Running<'a> {
    stats: &'a OperationStats,
    started: Instant,
}

impl OperationStats {
    pub(super) fn start(&self) -> Running<'_> {
        add(&self.in_flight, 1);
        Running { stats: self, started: Instant::now() }
    }
}

impl Running<'_> {
    pub(super) fn finish(&self, bytes: usize, success: bool) {
        let micros = micros(self.started.elapsed());
        let stats = self.stats;
        add(&stats.latency_us_sum, micros);
        stats.latency_us_max.set(stats.latency_us_max.get().max(micros));
        if success {
            add(&stats.count, 1);
            add(&stats.bytes, bytes as u64);
        } else {
            add(&stats.errors, 1);
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.stats.in_flight.set(self.stats.in_flight.get() - 1);
    }
}

/// Counters of a disk since it was opened.
#[derive(Debug, Default)]
pub struct DiskStats {
    /// Appends to shards.
    pub appends: OperationStats,
    /// Reads of shards, raw ones too.
    pub reads: OperationStats,
    /// Writes of table pages, checksums and the catalog (each copy counts).
    pub table_writes: OperationStats,
    /// Reads of checksum pages.
    pub table_reads: OperationStats,
    /// Shards created.
    pub creates: Cell<u64>,
    /// Shards sealed.
    pub seals: Cell<u64>,
    /// Shards deleted.
    pub deletes: Cell<u64>,
    /// Fence requests answered.
    pub fences: Cell<u64>,
    /// Table or checksum pages found unreadable, while opening or since.
    pub damaged_pages: Cell<u64>,
    /// Copies of table pages that had to be rewritten while opening.
    pub repaired_pages: Cell<u64>,
}

impl DiskStats {
    /// Requests to the device of all kinds that failed.
    pub fn errors(&self) -> u64 {
        let all = [&self.appends, &self.reads, &self.table_writes, &self.table_reads];
        all.iter().map(|operation| operation.errors.get()).sum()
    }

    /// Writes of all kinds that failed.
    pub fn failed_writes(&self) -> u64 {
        self.appends.errors.get() + self.table_writes.errors.get()
    }
}

/// How many slots are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SlotCounts {
    /// In no use.
    pub free: u32,
    /// With an open shard.
    pub open: u32,
    /// With a closed shard.
    pub closed: u32,
    /// With a sealed shard.
    pub sealed: u32,
    /// Deleted, but not free before I/O on them has ended.
    pub freeing: u32,
    /// Unknown: the page of the slot table is unreadable.
    pub damaged: u32,
}

pub(super) fn add(cell: &Cell<u64>, amount: u64) {
    cell.set(cell.get().wrapping_add(amount));
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
