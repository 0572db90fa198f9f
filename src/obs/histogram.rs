//! A latency histogram for the data path: plain cells, no atomics, fixed buckets.

use std::cell::Cell;
use std::time::Duration;

/// Upper bounds of the buckets, microseconds, inclusive; a last bucket takes the rest. Powers of
/// two from a fast local write to a stall that a client notices.
pub const BUCKET_BOUNDS_US: [u64; 16] = [
    32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072, 524_288,
    2_097_152, 8_388_608,
];

/// Number of buckets, the last without a bound.
pub const BUCKETS: usize = BUCKET_BOUNDS_US.len() + 1;

/// Counts latencies on one core; not `Sync`.
#[derive(Debug, Default)]
pub struct LatencyHistogram {
    buckets: [Cell<u64>; BUCKETS],
    sum_us: Cell<u64>,
}

impl LatencyHistogram {
    /// Counts one request that took `latency`.
    pub fn observe(&self, latency: Duration) {
        let us = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
        let bucket = &self.buckets[BUCKET_BOUNDS_US.partition_point(|bound| *bound < us)];
        bucket.set(bucket.get() + 1);
        self.sum_us.set(self.sum_us.get().saturating_add(us));
    }

    /// The counts so far.
    pub fn snapshot(&self) -> LatencySample {
        LatencySample {
            buckets: std::array::from_fn(|i| self.buckets[i].get()),
            sum_us: self.sum_us.get(),
        }
    }
}

/// Counts of a [`LatencyHistogram`] at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LatencySample {
    /// Requests per bucket, not cumulative.
    pub buckets: [u64; BUCKETS],
    /// Sum of all latencies, microseconds.
    pub sum_us: u64,
}

impl LatencySample {
    /// All requests.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Mean latency, microseconds; 0 without a request.
    pub fn mean_us(&self) -> u64 {
        self.sum_us.checked_div(self.count()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_inclusive_and_nothing_is_lost() {
        let histogram = LatencyHistogram::default();
        for us in [0, 32, 33, 8_388_608, 8_388_609] {
            histogram.observe(Duration::from_micros(us));
        }
        histogram.observe(Duration::MAX);
        let sample = histogram.snapshot();
        assert_eq!(sample.buckets[..2], [2, 1]);
        assert_eq!(sample.buckets[BUCKETS - 2..], [1, 2]);
        assert_eq!(sample.count(), 6);
        assert_eq!(sample.sum_us, u64::MAX, "the sum saturates");
    }

    #[test]
    fn bounds_ascend() {
        assert!(BUCKET_BOUNDS_US.is_sorted_by(|a, b| a < b));
    }
}
