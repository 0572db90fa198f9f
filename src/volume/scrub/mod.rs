//! Scrub: every sealed shard is read and compared with its checksums, again and again.
//!
//! A *round* goes through the sealed segments of the volume by number, a window of a few blocks of
//! all shards at a time. A bad block is written again in place, from the other shards; what cannot
//! be mended so (a shard that is gone, too short, not sealed, or has lost its checksums) is marked
//! and built anew by [`super::repair`]. Records, copies and parity are compared with each other
//! too ([`layout`]). Bad blocks that reads of clients meet are mended by the same code at once.
//!
//! Invariants:
//!
//! - Nothing but the very content that was sealed is ever written to a sealed shard: the disk
//!   compares the checksum. So two heads may mend the same block, in any order.
//! - Checksums are read from the medium, never from a cache.
//! - At most one round of a volume runs, and one window of a node is looked at, at a time.
//! - A round may be dropped at any await. It goes on at its position, which the metadata store
//!   keeps, roughly: some segments may be read twice.
//! - A shard that was not read because its disk is away counts as unchecked, never as good.
//! - A window waits for the budget of the node ([`crate::shard::budget`]), but no longer than the
//!   round can afford if it is to end within its period.

mod layout;
mod window;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::Instant;

use self::layout::Layout;
use self::window::{Reason, Suspects};
use super::head::{Head, add};
use super::segtab::Segment;
use crate::id::{BLOCK_BYTES, SegmentId};
use crate::meta::{Condition, MetaError, Txn, TxnOutcome, schema};
use crate::planted::{Bug, bug};
use crate::shard::activity::Working;
use crate::shard::budget::Urgency;

/// How long a round may take if nothing else is said, and when the next one begins.
pub const DEFAULT_PERIOD: Duration = Duration::from_hours(7 * 24);
/// Blocks of each shard that are read at a time.
const WINDOW_BLOCKS: u32 = 64;
/// How long one disk may take for its part of a window.
const SHARD_PATIENCE: Duration = Duration::from_secs(2);
/// Windows that reads found bad and that wait to be looked at; what is found beyond that is built
/// anew.
const SUSPECTS_MAX: usize = 4096;
/// Places that are remembered as lost; of more, only so many are counted.
const LOST_MAX: usize = 4096;
/// How often the position is kept, and the time since the last round.
const KEEP_EVERY: Duration = Duration::from_mins(1);
/// Pause before a head that has just begun to serve goes on with a round.
const RESUME_AFTER: Duration = Duration::from_secs(10);

/// A block of a shard; of no shard, where the shard is as large as there are shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    segment: SegmentId,
    shard: usize,
    block: u32,
}

/// What is kept of the scrub of a volume in the metadata store. Nothing depends on it but which
/// segment is read next.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Kept {
    /// The first segment that the round has not read; none between two rounds.
    position: Option<u64>,
    /// Seconds that heads have served since the last round ended.
    waited_s: u64,
    /// When the last round ended, seconds since 1970: to be shown only.
    finished_at: Option<u64>,
}

/// The present round.
#[derive(Debug, Clone)]
struct Round {
    begun: Instant,
    /// Bytes of the round when it began, of those before its position, and those read since.
    total_bytes: u64,
    skipped_bytes: u64,
    done_bytes: u64,
}

/// The scrub of a head.
#[derive(Default)]
pub(super) struct Scrub {
    /// Wakes the task of the rounds.
    pub(super) wanted: Notify,
    /// Wakes the task that mends what reads found.
    pub(super) found: Notify,
    /// A round is to begin now.
    asked: Cell<bool>,
    round: RefCell<Option<Round>>,
    /// Rounds that came to their end.
    rounds: Cell<u64>,
    /// Told when a round ends.
    ended: Notify,
    kept: RefCell<Kept>,
    unchecked_bytes: Cell<u64>,
    /// What had been found and repaired when the present or last round began.
    base: Cell<(u64, u64)>,
    suspects: RefCell<Suspects>,
    lost: RefCell<BTreeSet<Place>>,
    /// Shards that are being built anew, by the creation that was bad and how much was found in it.
    awaited: RefCell<BTreeMap<(SegmentId, usize), (u64, u64)>>,
}

/// The scrub of a volume at a glance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ScrubReport {
    /// Whether a round is under way.
    pub running: bool,
    /// Rounds that this head has ended.
    pub rounds: u64,
    /// Bytes of the present or last round that are done.
    pub done_bytes: u64,
    /// Bytes of the present or last round.
    pub total_bytes: u64,
    /// Bytes of it that could not be checked, because their disk was away.
    pub unchecked_bytes: u64,
    /// Estimate of the time to the end of the round; none before there is a rate to judge by.
    pub eta: Option<Duration>,
    /// When the last round ended, seconds since 1970.
    pub finished_at: Option<u64>,
    /// Bad blocks and bad shards found since the present or last round began.
    pub found: u64,
    /// Of them, those mended or built anew.
    pub repaired: u64,
    /// Places at which no combination of shards yields what was written, as far as known.
    pub unrepairable: u64,
}

impl Scrub {
    /// Notes that nobody yields a block. Tells whether that is new.
    fn note_lost(&self, place: Place) -> bool {
        let mut lost = self.lost.borrow_mut();
        lost.len() < LOST_MAX && lost.insert(place)
    }

    /// Has the tasks notice that the head stopped.
    pub(super) fn stop(&self) {
        self.wanted.notify_one();
        self.found.notify_one();
        self.ended.notify_waiters();
    }

    /// Has a window looked at in which a read found a bad block; false if too many wait.
    pub(super) fn suspect(&self, segment: SegmentId, block: u32) -> bool {
        let mut suspects = self.suspects.borrow_mut();
        let window = (segment, block / WINDOW_BLOCKS * WINDOW_BLOCKS);
        if suspects.len() >= SUSPECTS_MAX && !suspects.contains(&window) {
            return false;
        }
        suspects.insert(window);
        self.found.notify_one();
        true
    }
}

/// Mends what reads find, until the head stops.
pub(super) async fn run_mends(head: Rc<Head>) {
    while head.is_serving() {
        head.mend_suspects().await;
        if head.is_serving() {
            head.scrub.found.notified().await;
        }
    }
}

/// Makes a round in each period, and whenever one is asked for, until the head stops.
pub(super) async fn run_rounds(head: Rc<Head>) {
    let scrub = &head.scrub;
    head.load_kept().await;
    let mut resume = scrub.kept.borrow().position.is_some();
    while head.is_serving() {
        let waited = Duration::from_secs(scrub.kept.borrow().waited_s);
        let left = match head.config.scrub_period {
            _ if scrub.asked.get() => Duration::ZERO,
            None => KEEP_EVERY,
            Some(_) if resume => RESUME_AFTER,
            Some(period) => period.saturating_sub(waited),
        };
        let step = left.min(KEEP_EVERY);
        if !step.is_zero() {
            let since = Instant::now();
            // Whichever comes first; either is a reason to look.
            drop(tokio::time::timeout(step, scrub.wanted.notified()).await);
            scrub.kept.borrow_mut().waited_s += since.elapsed().as_secs();
            let due = step == left && since.elapsed() >= step && head.config.scrub_period.is_some();
            if !due && !scrub.asked.get() {
                head.keep().await;
                continue;
            }
        }
        if !head.is_serving() {
            return;
        }
        resume = false;
        scrub.asked.set(false);
        head.scrub_round().await;
    }
}

impl Head {
    /// Has a round begin now. False if one is under way.
    pub fn start_scrub(&self) -> bool {
        if self.scrub.round.borrow().is_some() {
            return false;
        }
        self.scrub.asked.set(true);
        self.scrub.wanted.notify_one();
        true
    }

    /// Makes a whole round, after the one that may be under way. False if the head stops.
    pub async fn scrub_to_end(&self) -> bool {
        let mut begun = false;
        loop {
            let ended = self.scrub.ended.notified();
            let rounds = self.scrub.rounds.get();
            if !self.is_serving() {
                return false;
            }
            begun |= self.start_scrub();
            ended.await;
            if begun && self.scrub.rounds.get() > rounds {
                return true;
            }
        }
    }

    /// The scrub at a glance.
    pub fn scrub_report(&self) -> ScrubReport {
        self.settle_awaited();
        self.forget_freed();
        let scrub = &self.scrub;
        let (found, repaired) = scrub.base.get();
        let round = scrub.round.borrow();
        let mut report = ScrubReport {
            running: round.is_some(),
            rounds: scrub.rounds.get(),
            unchecked_bytes: scrub.unchecked_bytes.get(),
            finished_at: scrub.kept.borrow().finished_at,
            found: self.stats.scrub_found.get() - found,
            repaired: self.stats.scrub_repaired.get() - repaired,
            unrepairable: scrub.lost.borrow().len() as u64,
            ..ScrubReport::default()
        };
        if let Some(round) = &*round {
            let done = round.skipped_bytes + round.done_bytes;
            report.total_bytes = round.total_bytes;
            report.done_bytes = done.min(round.total_bytes);
            let left = report.total_bytes - report.done_bytes;
            let elapsed = Instant::now() - round.begun;
            if round.done_bytes > 0 {
                let nanos = elapsed.as_nanos() * u128::from(left) / u128::from(round.done_bytes);
                report.eta = u64::try_from(nanos).ok().map(Duration::from_nanos);
            }
        }
        report
    }

    /// A segment that is sealed and that anything still needs.
    fn sealed_segment(&self, id: SegmentId) -> Option<Segment> {
        let state = self.state.borrow();
        let segment = state.table.segments.get(&id).filter(|s| s.sealed)?;
        self.is_needed(&state, id).then(|| segment.clone())
    }

    /// Reads every sealed shard once, from the position on.
    async fn scrub_round(&self) {
        let scrub = &self.scrub;
        let from = SegmentId(scrub.kept.borrow().position.unwrap_or(0));
        let plan: Vec<(SegmentId, u64)> = {
            let state = self.state.borrow();
            let sealed = state.table.segments.values().filter(|s| s.sealed);
            let sealed = sealed.filter(|s| self.is_needed(&state, s.id));
            sealed.map(|s| (s.id, bytes_of(s))).collect()
        };
        let bytes = |done: bool| -> u64 {
            plan.iter().filter(|(id, _)| (*id < from) == done).map(|(_, bytes)| bytes).sum()
        };
        let (skipped_bytes, left) = (bytes(true), bytes(false));
        *scrub.round.borrow_mut() = Some(Round {
            begun: Instant::now(),
            total_bytes: skipped_bytes + left,
            skipped_bytes,
            done_bytes: 0,
        });
        // A round that is given up leaves no trace but its position.
        let guard = RoundGuard(scrub);
        self.settle_awaited();
        scrub.base.set((self.stats.scrub_found.get(), self.stats.scrub_repaired.get()));
        scrub.unchecked_bytes.set(0);
        tracing::debug!(volume = %self.volume, segments = plan.len(), bytes = left, "scrub begins");
        let mut kept_at = Instant::now();
        let mut before = 0;
        for (id, bytes) in plan.iter().copied().filter(|(id, _)| *id >= from) {
            if !self.is_serving() {
                return;
            }
            scrub.kept.borrow_mut().position = Some(id.0);
            if kept_at.elapsed() >= KEEP_EVERY {
                self.keep().await;
                kept_at = Instant::now();
            }
            if !(bug(Bug::ScrubSkips) && id.0 % 3 == 0) {
                self.scrub_segment(id).await;
            }
            before += bytes;
            if let Some(round) = scrub.round.borrow_mut().as_mut() {
                round.done_bytes = before;
            }
        }
        self.settle_awaited();
        self.forget_freed();
        *scrub.kept.borrow_mut() =
            Kept { finished_at: Some((self.config.unix_seconds)()), ..Kept::default() };
        drop(guard);
        scrub.rounds.set(scrub.rounds.get() + 1);
        let report = self.scrub_report();
        tracing::info!(
            volume = %self.volume, bytes = left, unchecked = report.unchecked_bytes,
            found = report.found, repaired = report.repaired, unrepairable = report.unrepairable,
            "scrubbed",
        );
        self.keep().await;
        scrub.ended.notify_waiters();
    }

    async fn scrub_segment(&self, id: SegmentId) {
        let scrub = &self.scrub;
        scrub.lost.borrow_mut().retain(|place| place.segment != id);
        let mut layout = Layout::default();
        let mut at = 0;
        while self.is_serving() {
            // It may be freed, or a shard of it replaced, at any time.
            let Some(segment) = self.sealed_segment(id).filter(|s| at < s.blocks) else { return };
            let count = WINDOW_BLOCKS.min(segment.blocks - at);
            let _permit = self.disks.activity.scrub_permit().await;
            let _working = self.window_turn(&segment, count).await;
            let (end, unchecked) =
                self.scrub_window(&segment, (at, count), Some(&mut layout), Reason::Round).await;
            let read = u64::from(end - at) * segment.present() as u64 * BLOCK_BYTES;
            add(&self.stats.scrub_bytes, read);
            let unchecked = scrub.unchecked_bytes.get() + unchecked * BLOCK_BYTES;
            scrub.unchecked_bytes.set(unchecked);
            if let Some(round) = scrub.round.borrow_mut().as_mut() {
                round.done_bytes += read;
            }
            at = end;
            tokio::task::yield_now().await;
        }
    }

    /// Waits until a window may be read: until the budget allows it, or the round cannot afford to
    /// wait any longer.
    async fn window_turn(&self, segment: &Segment, count: u32) -> Working {
        let budget = &self.disks.budget;
        let bytes = u64::from(count) * segment.present() as u64 * BLOCK_BYTES;
        let take = budget.take(bytes, Urgency::Patient);
        let Some(wait) = self.affords(bytes) else { return take.await };
        match tokio::time::timeout(wait, take).await {
            Ok(working) => working,
            Err(_) => budget.work(),
        }
    }

    /// How long a window of so many bytes may wait, so that the round ends within its period; none
    /// if there is no period.
    fn affords(&self, bytes: u64) -> Option<Duration> {
        let period = self.config.scrub_period?;
        let round = self.scrub.round.borrow();
        let round = round.as_ref()?;
        let left = (round.total_bytes - round.skipped_bytes).saturating_sub(round.done_bytes);
        let windows = u32::try_from(left / bytes.max(1) + 1).unwrap_or(u32::MAX);
        // Half of the time is for reading.
        Some(period.saturating_sub(round.begun.elapsed()) / windows / 2)
    }

    /// Counts the shards that were built anew since they were found bad.
    fn settle_awaited(&self) {
        let state = self.state.borrow();
        let mut repaired = 0;
        self.scrub.awaited.borrow_mut().retain(|(id, index), (creation, found)| {
            let waits = state.table.segments.get(id).is_some_and(|segment| {
                segment.members[*index].creation == *creation && segment.missing >> index & 1 == 1
            });
            repaired += if waits { 0 } else { *found };
            waits
        });
        add(&self.stats.scrub_repaired, repaired);
    }

    /// What is lost of segments that nothing needs any more matters to nobody.
    fn forget_freed(&self) {
        let state = self.state.borrow();
        self.scrub.lost.borrow_mut().retain(|place| {
            state.table.segments.contains_key(&place.segment)
                && self.is_needed(&state, place.segment)
        });
    }

    /// Reads what earlier heads kept of their scrub.
    async fn load_kept(&self) {
        let key = schema::scrub_key(self.volume);
        while self.is_serving() {
            match self.store.get(&key).await {
                Ok(found) => {
                    let kept = found.and_then(|found| serde_json::from_slice(&found.value).ok());
                    *self.scrub.kept.borrow_mut() = kept.unwrap_or_default();
                    return;
                }
                Err(error) => tracing::debug!(volume = %self.volume, %error, "scrub waits"),
            }
            // A round that is asked for begins anew.
            drop(tokio::time::timeout(RESUME_AFTER, self.scrub.wanted.notified()).await);
            if self.scrub.asked.get() {
                return;
            }
        }
    }

    /// Keeps position and time for the next head, if the store is there.
    async fn keep(&self) {
        if !self.is_serving() {
            return;
        }
        let kept = serde_json::to_vec(&*self.scrub.kept.borrow()).unwrap_or_default();
        let txn = Txn::new()
            .when(Condition::KeyExists(schema::root_key(self.volume)))
            .put(schema::scrub_key(self.volume), Bytes::from(kept));
        match self.store.txn(txn).await {
            Ok(TxnOutcome::Committed { .. } | TxnOutcome::Conflict)
            | Err(MetaError::Unavailable(_) | MetaError::Unknown(_)) => {}
            Err(error) => tracing::warn!(volume = %self.volume, %error, "scrub is not kept"),
        }
    }
}

/// Ends the round that it was made for.
struct RoundGuard<'a>(&'a Scrub);

impl Drop for RoundGuard<'_> {
    fn drop(&mut self) {
        self.0.round.borrow_mut().take();
    }
}

/// Bytes of all shards of a segment that are there.
fn bytes_of(segment: &Segment) -> u64 {
    u64::from(segment.blocks) * segment.present() as u64 * BLOCK_BYTES
}
