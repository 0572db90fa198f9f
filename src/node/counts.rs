//! Counters of a disk over all the times it was opened.
//!
//! A disk counts from when it was opened. What is shown to people and scraped counts from the start of
//! the node: it must not fall back to zero because a disk failed and came back, least of all the
//! errors. Knows nothing of what the numbers mean to anybody.

use crate::disk::{Disk, OperationStats};

/// One kind of operation.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct OperationCounts {
    /// Operations that succeeded.
    pub(super) count: u64,
    /// Operations that failed.
    pub(super) errors: u64,
    /// Payload bytes.
    pub(super) bytes: u64,
    /// Time of all, microseconds.
    pub(super) latency_us: u64,
}

impl OperationCounts {
    fn add(&mut self, stats: &OperationStats) {
        self.count += stats.count.get();
        self.errors += stats.errors.get();
        self.bytes += stats.bytes.get();
        self.latency_us += stats.latency_us_sum.get();
    }

    /// Mean latency, microseconds; 0 before the first.
    pub(super) fn mean_us(&self) -> u64 {
        self.latency_us / (self.count + self.errors).max(1)
    }
}

/// What a disk has counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct DiskCounts {
    pub(super) appends: OperationCounts,
    pub(super) reads: OperationCounts,
    /// Operations of all kinds that failed.
    pub(super) io_errors: u64,
    /// Pages of tables and checksums found unreadable.
    pub(super) damaged_pages: u64,
}

impl DiskCounts {
    /// These and what `disk` has counted since it was opened.
    pub(super) fn and(mut self, disk: &Disk) -> Self {
        let stats = disk.stats();
        self.appends.add(&stats.appends);
        self.reads.add(&stats.reads);
        let kinds = [&stats.appends, &stats.reads, &stats.table_writes, &stats.table_reads];
        self.io_errors += kinds.iter().map(|kind| kind.errors.get()).sum::<u64>();
        self.damaged_pages += stats.damaged_pages.get();
        self
    }
}
