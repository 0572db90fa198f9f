//! How fast clients may write while free slots run short: as fast as slots come back.
//!
//! Garbage collection frees much at once, at the end of a pass, so whoever slows writes by what is free
//! at the moment lets them go fast and crawl in turns. Here the rate `r` that space comes back with is
//! measured, in blocks that clients write, and writes are admitted one after the other at `r f(h)`:
//!
//! ```text
//! h      what is free, as a share of where writes begin to be slowed; no more than what is free at
//!        once is of a quarter of that
//! f(h) = h / (1 - h)      so that where half of that is free, as much is written as comes back
//! r      what was written, and by how much what is free grew, against the time that took
//! ```
//!
//! It settles by itself: where `r` is thought too large, `h` falls, and where it is thought too small
//! `h` rises until writes are not slowed, and `r` is what they reach then.
//!
//! All heads that share the disks have one pace, and are admitted in the order of asking.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

/// Longest time that a write waits when nothing is free; where `h` is, `(1 - h)²` of it.
pub const WAIT_MAX: Duration = Duration::from_millis(100);
/// What was not written may be written later, up to so much time's worth; less is not waited for,
/// because timers are no finer.
const GRAIN: Duration = Duration::from_millis(1);
/// Time between two measurements at least, unless so much of what clients may write from where they
/// begin to be slowed was written: one part in so many.
const SAMPLE_EVERY: Duration = Duration::from_millis(50);
const SAMPLE_PART: f64 = 8.0;
/// After so long without a write that was slowed, what was measured before is forgotten.
const FORGET_AFTER: Duration = Duration::from_secs(2);
/// A measurement counts for as much as it is of what clients may write from where they begin to be
/// slowed, or of so many seconds.
const SETTLE: f64 = 30.0;
/// Bounds of `f`.
const FACTOR: std::ops::RangeInclusive<f64> = 0.01..=100.0;

/// What is free for clients, as one head sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Free {
    /// Which head.
    pub head: u64,
    /// Blocks of the log that it can still write, with what garbage collection has promised …
    pub blocks: f64,
    /// … and without.
    pub at_once: f64,
    /// Blocks from which on writes are slowed.
    pub slow_from: f64,
}

/// A measurement that has begun.
#[derive(Debug, Clone, Copy)]
struct Sample {
    since: Instant,
    free: Free,
    taken: u64,
}

/// The pace of clients of a node.
#[derive(Debug, Default)]
pub struct Pace {
    /// Blocks that clients were let write.
    taken: Cell<u64>,
    sample: Cell<Option<Sample>>,
    /// Blocks a second with which space comes back.
    rate: Cell<Option<f64>>,
    /// When the next write may go.
    next: Cell<Option<Instant>>,
}

impl Pace {
    /// For how long a write of so many blocks is to wait, if it waits at all; it counts as done.
    pub fn admit(&self, now: Instant, free: Free, blocks: u64) -> Option<Duration> {
        self.taken.set(self.taken.get() + blocks);
        self.measure(now, free);
        let rate = self.rate.get()?;
        let share = (free.blocks.min(4.0 * free.at_once) / free.slow_from).clamp(0.0, 1.0);
        let factor = (share / (1.0 - share)).clamp(*FACTOR.start(), *FACTOR.end());
        #[expect(clippy::cast_precision_loss, reason = "a few hundred blocks")]
        let takes = Duration::from_secs_f64((blocks as f64 / (rate * factor)).min(1.0));
        let earliest = now.checked_sub(GRAIN).unwrap_or(now);
        let latest = now + WAIT_MAX.mul_f64((1.0 - share) * (1.0 - share));
        let turn = self.next.get().map_or(earliest, |next| next.min(latest).max(earliest));
        self.next.set(Some(turn + takes));
        let wait = turn.saturating_duration_since(now);
        (wait >= GRAIN / 2).then_some(wait)
    }

    /// Blocks a second with which space comes back, if that is known.
    pub fn rate(&self) -> Option<f64> {
        self.rate.get()
    }

    fn measure(&self, now: Instant, free: Free) {
        let Some(sample) = self.sample.get() else {
            self.begin(now, free);
            return;
        };
        let elapsed = now - sample.since;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let taken = (self.taken.get() - sample.taken) as f64;
        let much = taken * SAMPLE_PART >= free.slow_from && elapsed >= GRAIN;
        if elapsed < SAMPLE_EVERY && !much {
            return;
        }
        self.begin(now, free);
        if elapsed >= FORGET_AFTER {
            self.rate.set(None);
            return;
        }
        // Another head may see other disks.
        let grown =
            if sample.free.head == free.head { free.blocks - sample.free.blocks } else { 0.0 };
        let seconds = elapsed.as_secs_f64();
        let came = ((taken + grown) / seconds).max(0.0);
        let weight = (taken / free.slow_from).max(seconds / SETTLE).min(1.0);
        let rate = match self.rate.get() {
            Some(rate) => rate + (came - rate) * weight,
            None => taken / seconds,
        };
        self.rate.set(Some(rate.max(1.0)));
    }

    fn begin(&self, now: Instant, free: Free) {
        self.sample.set(Some(Sample { since: now, free, taken: self.taken.get() }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW_FROM: f64 = 2560.0;

    fn free(blocks: f64) -> Free {
        Free { head: 1, blocks, at_once: blocks, slow_from: SLOW_FROM }
    }

    /// Clients write as fast as they may, `depth` at once, each in at least a tenth of a millisecond;
    /// every `cycle` ms so many blocks come back at once. What each write took, in ms, of the second half.
    fn run(depth: usize, came: f64, cycle: u64, millis: u64) -> (Vec<f64>, f64) {
        let pace = Pace::default();
        let start = Instant::now();
        let mut left = SLOW_FROM;
        let mut writers = vec![Duration::ZERO; depth];
        let (mut took, mut next_cycle) = (Vec::new(), Duration::from_millis(cycle));
        loop {
            let at = writers.iter().enumerate().min_by_key(|(_, at)| **at).map(|(n, _)| n);
            let at = at.expect("there are writers");
            let now = writers[at];
            if now >= Duration::from_millis(millis) {
                return (took, left);
            }
            while next_cycle <= now {
                left = (left + came).min(SLOW_FROM);
                next_cycle += Duration::from_millis(cycle);
            }
            if left < 1.0 {
                // At first nothing is known of what comes back.
                assert!(now < Duration::from_secs(2), "nothing is left after {now:?}");
                writers[at] = next_cycle;
                continue;
            }
            let wait = pace.admit(start + now, free(left), 1).unwrap_or_default();
            left -= 1.0;
            let all = wait + Duration::from_micros(100);
            writers[at] = now + all;
            if now.as_millis() > u128::from(millis) / 2 {
                took.push(all.as_secs_f64() * 1e3);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn writes_go_as_fast_as_space_comes_back_and_evenly() {
        // 10,000 blocks a second, in pieces of a fraction of what is free.
        for (came, cycle) in [(500.0, 50), (1000.0, 100)] {
            let (mut took, left) = run(32, came, cycle, 20_000);
            let rate = took.len() as f64 / 10.0;
            assert!((9_500.0..10_500.0).contains(&rate), "{rate} a second");
            took.sort_by(f64::total_cmp);
            let at = |permille| took[(took.len() - 1) * permille / 1000];
            assert!(at(999) <= at(500) * 5.0, "{} and {} ms", at(500), at(999));
            assert!(left > SLOW_FROM / 10.0, "{left} blocks are left");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_for_less_than_comes_back_does_not_wait() {
        let pace = Pace::default();
        let mut now = Instant::now();
        for _ in 0..10_000 {
            let wait = pace.admit(now, free(SLOW_FROM * 0.6), 1);
            assert_eq!(wait, None);
            now += Duration::from_millis(1);
        }
        assert!((900.0..1100.0).contains(&pace.rate().expect("measured")));
    }

    #[tokio::test(start_paused = true)]
    async fn no_write_waits_for_ever() {
        let pace = Pace::default();
        let mut now = Instant::now();
        // Nothing comes back until nothing is left.
        for left in (0..2560).rev() {
            let wait = pace.admit(now, free(f64::from(left)), 1).unwrap_or_default();
            assert!(wait <= WAIT_MAX, "{wait:?}");
            now += wait + Duration::from_micros(100);
        }
    }
}
