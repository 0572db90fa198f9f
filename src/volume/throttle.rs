//! Writes of clients slow smoothly as space runs out.
//!
//! From [`slow_from`] free log segments down, writes are admitted one after the other, as fast as space
//! comes back ([`crate::shard::pace`]). What counts as free is finer than segments, or the pace
//! would go in steps: the rest of the open segment counts, and what the pass of garbage collection that
//! runs has earned ([`crate::shard::promise`]). So clients and garbage collection come to a balance in
//! which each write waits about as long as the one before.

use std::time::Duration;

use tokio::time::Instant;

use super::head::{Head, State};
use crate::export::TargetError;
use crate::shard::Scheme;
use crate::shard::pace::Free;

/// Headroom from which on writes are slowed, at least.
const SLOW_FROM_MIN: u32 = 8;
/// It is three times what a pass of garbage collection takes for itself, where disks are large enough
/// for that, …
const SLOW_FROM: u32 = 24;
/// … that is, of their slots this is at most one in so many.
const SLOW_FROM_PART: u32 = 32;
/// The same, percent of a disk's slots.
const SLOW_FROM_PERCENT: u32 = 1;
/// How often a head calls for space while there is some.
const CALL_EVERY: Duration = Duration::from_secs(1);

/// Headroom from which on writes are slowed, where a domain has so many slots.
pub(super) const fn slow_from(slots: u32) -> u32 {
    let most = slots / SLOW_FROM_PART;
    let most = if most > SLOW_FROM { SLOW_FROM } else { most };
    let part = slots / 100 * SLOW_FROM_PERCENT;
    let part = if part > most { part } else { most };
    if part > SLOW_FROM_MIN { part } else { SLOW_FROM_MIN }
}

impl Head {
    /// Lets a write of a client, of so many blocks in the log, wait while space runs short.
    ///
    /// # Errors
    /// [`TargetError::NoSpace`] when there is none and none can be gained.
    pub(super) async fn admit_write(&self, blocks: u64) -> Result<(), TargetError> {
        let (headroom, slow) = self.headroom(&self.state.borrow());
        if headroom >= slow {
            return Ok(());
        }
        if headroom == 0 {
            return self.reclaim().await;
        }
        let newest = self.state.borrow().log.as_ref().map(|log| log.id);
        if self.space.asked.replace(newest) != newest {
            self.checkpoint_wanted.notify_one();
            // Most of what there is to be had comes with the first call.
            if self.space.called.get().is_none_or(|at| at.elapsed() >= CALL_EVERY) {
                self.space.called.set(Some(Instant::now()));
                self.member.call_for_space();
            }
        }
        let free = self.free(&self.state.borrow(), headroom, slow);
        if let Some(wait) = self.disks.pace.admit(Instant::now(), free, blocks) {
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }

    /// The headroom with what is left of the open segment and what is being freed.
    fn free(&self, state: &State, headroom: u32, slow_from: u32) -> Free {
        let (rest, each) = match &state.log {
            Some(log) => (log.shard_blocks - log.next.get(), log.shard_blocks),
            None => (0, self.disks.slot_blocks_min()),
        };
        let each = f64::from(each.max(1));
        let at_once = ((f64::from(headroom) - 1.0) * each + f64::from(rest)).max(0.0);
        Free {
            head: self.member.number(),
            blocks: at_once + self.disks.promise.slots() * each,
            at_once,
            slow_from: f64::from(slow_from) * each,
        }
    }

    /// Blocks of the log that take as much of the disks as so many in stripes.
    pub(super) fn log_equivalent(&self, blocks: u32, scheme: Scheme) -> u64 {
        let shards = |scheme: Scheme| u64::try_from(scheme.width()).expect("at most 20");
        let log = shards(self.pool.log_scheme()) * u64::from(scheme.data);
        (u64::from(blocks) * shards(scheme)).div_ceil(log)
    }
}
