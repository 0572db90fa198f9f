//! Writes of clients slow smoothly as space runs out.
//!
//! A write waits for a time that grows quadratically from nothing, at [`slow_from`] free log segments,
//! to [`DELAY_MAX`], at none. What counts as free is finer than segments, or the delay would go
//! in steps: the rest of the open segment counts, and what the pass of garbage collection that runs has
//! earned ([`crate::shard::promise`]). So clients and garbage collection come to a balance in which
//! each write waits about as long as the one before.
//!
//! Writes that wait are let go together, at instants as far apart as they wait: the log then makes one
//! record of them, where single ones would spend as many blocks on headers as on data, just when there
//! is no space to spend.

use std::time::Duration;

use tokio::time::Instant;

use super::head::{Head, State};
use crate::export::TargetError;

/// Longest delay of a write of a client for want of space.
const DELAY_MAX: Duration = Duration::from_millis(50);
/// Shorter ones are none: timers are no finer.
const DELAY_MIN: Duration = Duration::from_micros(500);
/// Headroom from which on writes are delayed, at least.
const SLOW_FROM_MIN: u32 = 8;
/// The same, percent of a disk's slots.
const SLOW_FROM_PERCENT: u32 = 1;
/// How often a head calls for space while there is some.
const CALL_EVERY: Duration = Duration::from_secs(1);

/// Headroom from which on writes are delayed, where a domain has so many slots.
pub(super) const fn slow_from(slots: u32) -> u32 {
    let part = slots / 100 * SLOW_FROM_PERCENT;
    if part > SLOW_FROM_MIN { part } else { SLOW_FROM_MIN }
}

/// How long a write waits: nothing at `slow_from`, and quadratically more towards zero.
fn delay(headroom: f64, slow_from: u32) -> Duration {
    let lack = 1.0 - headroom / f64::from(slow_from);
    let lack = lack.clamp(0.0, 1.0);
    DELAY_MAX.mul_f64(lack * lack)
}

/// How long to wait at `now`, a time since whatever all use, so that those who are to wait for about
/// `delay` end together.
fn until_together(now: Duration, delay: Duration) -> Duration {
    let millis = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX).max(1);
    let grid = Duration::from_millis(1 << millis.ilog2()).as_micros();
    let earliest = (now + delay / 2).as_micros();
    let instant = earliest.div_ceil(grid) * grid;
    Duration::from_micros(u64::try_from(instant - now.as_micros()).unwrap_or(0))
}

impl Head {
    /// Lets a write of a client wait while space runs short.
    ///
    /// # Errors
    /// [`TargetError::NoSpace`] when there is none and none can be gained.
    pub(super) async fn admit_write(&self) -> Result<(), TargetError> {
        let (headroom, slow) = self.headroom(&self.state.borrow());
        if headroom >= slow {
            return Ok(());
        }
        if headroom == 0 {
            return self.reclaim().await;
        }
        if self.space.asked.replace(self.disks.version()) != self.disks.version() {
            self.checkpoint_wanted.notify_one();
            // Most of what there is to be had comes with the first call.
            if self.space.called.get().is_none_or(|at| at.elapsed() >= CALL_EVERY) {
                self.space.called.set(Some(Instant::now()));
                self.member.call_for_space();
            }
        }
        let delay = delay(self.fine_headroom(&self.state.borrow(), headroom), slow);
        if delay >= DELAY_MIN {
            tokio::time::sleep(until_together(self.started.elapsed(), delay)).await;
        }
        Ok(())
    }

    /// The headroom with what is left of the open segment and what is being freed.
    fn fine_headroom(&self, state: &State, headroom: u32) -> f64 {
        let rest = state.log.as_ref().map_or(0.0, |log| {
            f64::from(log.shard_blocks - log.next.get()) / f64::from(log.shard_blocks.max(1))
        });
        f64::from(headroom) - 1.0 + rest + self.disks.promise.slots()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_slow_smoothly() {
        let slow = slow_from(64);
        let delays: Vec<Duration> =
            (0..=slow * 16).map(|part| delay(f64::from(part) / 16.0, slow)).collect();
        assert_eq!((delays[0], delays[delays.len() - 1]), (DELAY_MAX, Duration::ZERO));
        assert!(delays.is_sorted_by(|a, b| a > b), "{delays:?}");
        let step = delays.windows(2).map(|pair| pair[0].saturating_sub(pair[1])).max();
        let step = step.expect("there are some");
        assert!(step <= DELAY_MAX / 50, "{step:?}");
        assert_eq!(delay(f64::from(u32::MAX), slow), Duration::ZERO);
    }

    #[test]
    fn those_who_wait_about_as_long_end_together() {
        let ms = Duration::from_millis;
        for delay in [ms(1), ms(3), ms(8), ms(50)] {
            let mut ends = std::collections::BTreeSet::new();
            for now in (0..100).map(|n| ms(1000) + Duration::from_micros(n * 77)) {
                let wait = until_together(now, delay);
                assert!(wait * 2 >= delay && wait <= delay * 2, "{delay:?}: {wait:?}");
                ends.insert(now + wait);
            }
            let span = Duration::from_micros(7700);
            let most = span.as_micros() / (delay.as_micros() / 2) + 2;
            assert!(ends.len() as u128 <= most, "{delay:?}: {ends:?}");
        }
    }
}
