//! How far the repair of a volume is, and how fast it goes.
//!
//! A *round* begins when something is to be rebuilt and ends when nothing is. What is to be rebuilt
//! is what the segment table says, so that a head that takes over goes on where another one stopped;
//! its round counts from there. Knows bytes and times only.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use tokio::time::Instant;

/// Seconds over which the rate is taken.
const SECONDS: u64 = BUCKETS as u64;
const BUCKETS: usize = 10;

/// The repair of a volume at a glance.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RepairReport {
    /// Bytes rebuilt in this round.
    pub done_bytes: u64,
    /// Bytes of this round, those done included.
    pub total_bytes: u64,
    /// Bytes rebuilt a second, over the last seconds.
    pub bytes_per_second: u64,
}

impl RepairReport {
    /// Bytes that are still to be rebuilt.
    pub fn remaining_bytes(&self) -> u64 {
        self.total_bytes - self.done_bytes
    }

    /// Estimate of the time to the end; none while nothing is rebuilt.
    pub fn eta(&self) -> Option<Duration> {
        (self.bytes_per_second > 0)
            .then(|| Duration::from_secs(self.remaining_bytes().div_ceil(self.bytes_per_second)))
    }

    /// This and another volume's, together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            done_bytes: self.done_bytes + other.done_bytes,
            total_bytes: self.total_bytes + other.total_bytes,
            bytes_per_second: self.bytes_per_second + other.bytes_per_second,
        }
    }
}

/// What was written in each of the last seconds.
#[derive(Debug, Default)]
struct Meter {
    seconds: [u64; BUCKETS],
    /// Number of the newest second.
    newest: u64,
}

impl Meter {
    fn advance(&mut self, second: u64) {
        let passed = (second - self.newest).min(SECONDS);
        for n in 0..passed {
            self.seconds[usize::try_from((second - n) % SECONDS).expect("small")] = 0;
        }
        self.newest = second;
    }
}

/// The repair of a head.
pub(in crate::volume) struct Repair {
    begun: Instant,
    meter: RefCell<Meter>,
    /// When the round began, and the bytes rebuilt by then.
    round: Cell<Option<(Instant, u64)>>,
    /// Bytes written to shards that are not whole yet.
    partial: Cell<u64>,
}

impl Default for Repair {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            meter: RefCell::default(),
            round: Cell::default(),
            partial: Cell::default(),
        }
    }
}

/// What was written of the shards of one segment, until they are whole or given up.
pub(in crate::volume) struct Part<'a> {
    repair: &'a Repair,
    bytes: Cell<u64>,
}

impl Part<'_> {
    pub(in crate::volume) fn wrote(&self, bytes: u64) {
        self.bytes.set(self.bytes.get() + bytes);
        self.repair.partial.set(self.repair.partial.get() + bytes);
        let mut meter = self.repair.meter.borrow_mut();
        meter.advance(self.repair.begun.elapsed().as_secs());
        let newest = usize::try_from(meter.newest % SECONDS).expect("small");
        meter.seconds[newest] += bytes;
    }
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        self.repair.partial.set(self.repair.partial.get() - self.bytes.get());
    }
}

impl Repair {
    pub(in crate::volume) fn part(&self) -> Part<'_> {
        Part { repair: self, bytes: Cell::new(0) }
    }

    /// Where the round stands, with so many bytes to be rebuilt and so many rebuilt since the head
    /// began; none without one.
    pub(in crate::volume) fn report(&self, missing: u64, rebuilt: u64) -> Option<RepairReport> {
        if missing == 0 {
            self.round.set(None);
            return None;
        }
        let now = Instant::now();
        let (since, before) = self.round.get().unwrap_or((now, rebuilt));
        self.round.set(Some((since, before)));
        let partial = self.partial.get().min(missing);
        let done_bytes = rebuilt - before + partial;
        let mut meter = self.meter.borrow_mut();
        meter.advance(self.begun.elapsed().as_secs());
        let seconds = (now - since).as_secs().clamp(1, SECONDS);
        Some(RepairReport {
            done_bytes,
            total_bytes: done_bytes + (missing - partial),
            bytes_per_second: meter.seconds.iter().sum::<u64>() / seconds,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_round_goes_from_the_first_loss_to_the_last_rebuilt_byte() {
        let repair = Repair::default();
        assert_eq!(repair.report(0, 5_000), None);
        let begun = repair.report(1_000, 5_000).expect("something is missing");
        assert_eq!(begun, RepairReport { total_bytes: 1_000, ..RepairReport::default() });
        assert_eq!(begun.eta(), None, "there is no rate yet");
        let part = repair.part();
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            part.wrote(100);
        }
        let halfway = repair.report(1_000, 5_000).expect("something is missing");
        assert_eq!((halfway.done_bytes, halfway.total_bytes), (400, 1_000));
        assert_eq!((halfway.bytes_per_second, halfway.eta()), (100, Some(Duration::from_secs(6))));
        // The shard is whole: what was a part of it is rebuilt.
        drop(part);
        let later = repair.report(500, 5_500).expect("something is missing");
        assert_eq!((later.done_bytes, later.total_bytes), (500, 1_000));
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert_eq!(repair.report(500, 5_500).and_then(|r| r.eta()), None, "it stands still");
        assert_eq!(repair.report(0, 6_000), None);
        assert_eq!(repair.report(10, 6_000).map(|r| r.done_bytes), Some(0), "a new round");
    }
}
