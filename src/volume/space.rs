//! Space: what a head does while free slots run short.
//!
//! Which slots there are for whom, and why there is always room for what frees space, is in
//! [`crate::shard::reserve`]. Here is the head's part in it. With `h` the *headroom*, the number of
//! log segments that clients can surely still open:
//!
//! - from [`slow_from`] down, writes of clients are delayed ([`super::throttle`]); a checkpoint
//!   and garbage collection are asked for with each segment that is opened; an overlay counts as
//!   full at this volume's share of what the checkpoints' reserve can hold; sparse meta segments
//!   are rewritten by every checkpoint. Garbage collection begins at one and a half times that: the later it
//!   comes, the more is dead by itself. The other heads that share the disks are *called* too: what
//!   an idle volume trimmed or overwrote is freed by its own checkpoint, and nobody else's;
//! - at zero, a write waits until a *round* has ended in vain that began after it came: a
//!   checkpoint, and a pass of garbage collection that found nothing to gain, and all other heads
//!   have answered a call. Then it fails with "no space". Trims, zeroes and moves wait for nothing here: the log takes them from the
//!   reserve of their class.
//!
//! Nothing waits here that has a place in the queue of the log, so that no write holds up what
//! would make room for it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::future::select;
use tokio::sync::{Notify, OwnedSemaphorePermit};
use tokio::time::Instant;

use super::head::{Head, State};
use super::throttle::slow_from;
use crate::export::TargetError;
use crate::id::{BLOCK_BYTES, Lsn, SegmentId};

/// How often a write that waits for space looks whether there is some.
const POLL: Duration = Duration::from_millis(100);
/// Headroom from which on garbage collection keeps apart what it moves.
const SEPARATE_FROM: u32 = 2;
/// Extents that an overlay may always have.
const EXTENTS_MIN: usize = 8;
/// How long a write waits for other heads to answer its call.
const OTHERS_PATIENCE: Duration = Duration::from_secs(5);
/// How long a head works on a call before it counts as answered.
const CALL_PATIENCE: Duration = Duration::from_secs(10);
/// How long a checkpoint that used the reserve may wait for its root while others wait for it.
const RESERVE_PATIENCE: Duration = Duration::from_secs(10);
/// How often a write that was refused space is tried again while there seems to be some.
pub(super) const TRIES: usize = 8;

/// Headroom, and where delays begin.
#[derive(Clone, Copy)]
struct Known {
    /// The version of the disks' fill and the width of the log that it holds for.
    at: (u64, u8),
    headroom: u32,
    slow: u32,
}

/// What a head remembers of space.
#[derive(Default)]
pub(super) struct Space {
    /// Rounds that ended.
    rounds: Cell<u64>,
    ended: Notify,
    /// Segments that a pass of garbage collection empties.
    pub(super) emptying: RefCell<BTreeSet<SegmentId>>,
    /// Told when slots came back.
    pub(super) freed: Notify,
    /// When it last called for space though there was some.
    pub(super) called: Cell<Option<Instant>>,
    /// What the heads had acknowledged, and the version of the disks' fill, when a round last ended in
    /// vain.
    vain: Cell<Option<(u64, u64)>>,
    /// Where the log stood, and the same version, when a round last ended.
    barren: Cell<Option<(Lsn, u64)>>,
    known: Cell<Option<Known>>,
    /// The newest log segment when a checkpoint was last asked for.
    pub(super) asked: Cell<Option<SegmentId>>,
    /// An append to a meta segment failed: the next one is opened where the disks are sound, with the
    /// checkpoints' reserve, though clients' slots may be free on those that are not.
    pub(super) meta_failed: Cell<bool>,
    /// Meta segments that the checkpoint under way has opened.
    pub(super) opened: RefCell<Vec<SegmentId>>,
    /// Held while a checkpoint uses the checkpoints' reserve, until the root names it and what it
    /// freed is deleted, or that has taken longer than others are to wait.
    pub(super) reserve: RefCell<Option<OwnedSemaphorePermit>>,
    /// Counts how often it was taken.
    grants: Cell<u64>,
    /// Whether a checkpoint has used the reserve that no root names yet.
    owes: Cell<bool>,
    /// Whether a checkpoint is being made.
    making: Cell<bool>,
}

impl Head {
    /// Log segments that clients can surely still open, and from how many on there is no hurry.
    /// While too few domains are up, space is not what is wanting.
    pub(super) fn headroom(&self, state: &State) -> (u32, u32) {
        let set = &state.root.set;
        let at = (self.disks.version(), set.width());
        let known = match self.space.known.get() {
            Some(known) if known.at == at => (known.headroom, known.slow),
            _ => {
                // The log may be narrower than the pool asks for.
                let width = usize::from(set.width()).min(self.pool.log_scheme().width());
                let allowed = |disk| set.domain_of(disk).is_some();
                let (headroom, slow) = match self.disks.headroom(width, allowed) {
                    Some((headroom, slots)) => (headroom, slow_from(slots)),
                    None => (u32::MAX, 0),
                };
                self.space.known.set(Some(Known { at, headroom, slow }));
                (headroom, slow)
            }
        };
        if self.table_is_large(state) { (0, known.1.max(1)) } else { known }
    }

    /// Whether the table of segments might soon not fit into one segment.
    fn table_is_large(&self, state: &State) -> bool {
        let per_segment = 40 + 12 * self.pool.scheme.width();
        let bytes = state.table.segments.len() * per_segment + state.table.freed.len() * 20;
        bytes as u64 > u64::from(self.disks.slot_blocks_min()) * BLOCK_BYTES / 4 * 3
    }

    /// Whether clients may open no further segment.
    pub(super) fn is_full(&self, state: &State) -> bool {
        self.headroom(state).0 == 0
    }

    /// Whether there are slots enough for garbage collection to fill two data segments by turns.
    pub(super) fn may_separate(&self) -> bool {
        self.headroom(&self.state.borrow()).0 >= SEPARATE_FROM
    }

    /// Whether free slots run short.
    pub(super) fn is_tight(&self, state: &State) -> bool {
        let (headroom, slow) = self.headroom(state);
        headroom < slow
    }

    /// Whether so few slots are free that garbage collection has to make room: some more than
    /// where writes begin to be delayed.
    pub(super) fn wants_space(&self, state: &State) -> bool {
        let (headroom, slow) = self.headroom(state);
        headroom < slow.saturating_add(slow / 2)
    }

    /// Extents at which the overlay is full: while space is short, no more than change the index
    /// pages that this volume's share of the checkpoints' reserve holds.
    pub(super) fn overlay_extents_max(&self, state: &State) -> usize {
        let most = self.config.overlay_extents_max;
        if !self.is_tight(state) {
            return most;
        }
        let height = u64::from(state.tree.height);
        let leaves = state.reach.div_ceil(512 * BLOCK_BYTES);
        let share = self.disks.checkpoint_pages() / u64::from(self.disks.heads());
        if leaves + leaves / 511 + height <= share {
            return most;
        }
        // An extent meets two leaves at most, or more that are full of it and so need log space.
        let extents = usize::try_from(share / (2 * height)).unwrap_or(most);
        extents.clamp(EXTENTS_MIN.min(most), most)
    }

    /// Waits until there is space for clients.
    ///
    /// # Errors
    /// [`TargetError::NoSpace`] when a round ended in vain, or none ended in time.
    pub(super) async fn reclaim(&self) -> Result<(), TargetError> {
        if self.space.vain.get() == Some(self.disks.progress()) {
            return Err(TargetError::NoSpace);
        }
        let since = Instant::now();
        let call = self.member.call_for_space();
        let from = self.space.rounds.get();
        let mut asked = None;
        loop {
            let (ended, freed) = (self.space.ended.notified(), self.space.freed.notified());
            if !self.takes_requests() {
                return Err(TargetError::Stopped);
            }
            if !self.is_full(&self.state.borrow()) {
                return Ok(());
            }
            // The first round that ends may have begun before this write came.
            let waited = since.elapsed();
            let others = self.disks.is_answered(call) || waited >= OTHERS_PATIENCE;
            let vain = self.space.rounds.get() >= from + 2 && others;
            if vain || waited >= self.config.io_timeout {
                return Err(TargetError::NoSpace);
            }
            if asked.replace(self.space.rounds.get()) != Some(self.space.rounds.get()) {
                self.checkpoint_wanted.notify_one();
            }
            // Whichever comes first is a reason to look again.
            drop(tokio::time::timeout(POLL, select(pin!(ended), pin!(freed))).await);
        }
    }

    /// Whether a checkpoint of this volume may free something; whether a pass of garbage collection
    /// may.
    fn has_to_give(&self) -> (bool, bool) {
        let state = self.state.borrow();
        if self.space.barren.get() == Some((state.acked, self.disks.version())) {
            return (false, false);
        }
        let dirty = !state.overlay.is_empty()
            || state.frozen.is_some()
            || state.checkpoint != state.root.checkpoint;
        drop(state);
        (dirty, !dirty && !self.victims().is_empty())
    }

    /// Gives back what this volume does not need, because somebody calls for space.
    async fn give(&self) {
        let since = Instant::now();
        let from = self.space.rounds.get();
        let mut asked = None;
        // The first round that ends may have begun before the call.
        while self.is_serving()
            && self.space.rounds.get() < from + 2
            && since.elapsed() < CALL_PATIENCE
        {
            let ended = self.space.ended.notified();
            let (dirty, garbage) = self.has_to_give();
            if !dirty && !garbage {
                return;
            }
            if asked.replace(self.space.rounds.get()) != Some(self.space.rounds.get()) {
                (if dirty { &self.checkpoint_wanted } else { &self.gc_wanted }).notify_one();
            }
            // Whichever comes first; either is a reason to look again.
            drop(tokio::time::timeout(POLL, ended).await);
        }
    }

    /// Whether a write of a client would get no space now.
    pub fn is_out_of_space(&self) -> bool {
        let vain = self.space.vain.get() == Some(self.disks.progress());
        vain && self.is_full(&self.state.borrow())
    }

    /// A pass of garbage collection found nothing to gain.
    pub(super) fn round_ended(&self) {
        let full = self.is_full(&self.state.borrow());
        self.space.vain.set(full.then(|| self.disks.progress()));
        self.space.barren.set(Some((self.state.borrow().acked, self.disks.version())));
        self.space.rounds.set(self.space.rounds.get() + 1);
        self.space.ended.notify_waiters();
    }

    /// Gets the permit to use the checkpoints' reserve, for the checkpoint under way.
    pub(super) async fn take_checkpoint_reserve(&self) {
        if self.space.reserve.borrow().is_none() {
            let permit = self.disks.checkpoint_reserve().await;
            *self.space.reserve.borrow_mut() = permit;
            self.space.owes.set(true);
            let grant = self.space.grants.get() + 1;
            self.space.grants.set(grant);
            tokio::task::spawn_local(lend(self.this.clone(), grant));
        }
    }

    /// Whether the last checkpoint has used the checkpoints' reserve and no root names it yet.
    pub(super) fn owes_reserve(&self) -> bool {
        self.space.owes.get()
    }

    /// What the last checkpoint took of the checkpoints' reserve is back.
    pub(super) fn reserve_is_back(&self) {
        self.space.owes.set(false);
        self.space.reserve.borrow_mut().take();
    }

    /// A checkpoint begins. Tells the number of the newest durable one.
    pub(super) fn begin_checkpoint(&self) -> u64 {
        self.space.making.set(true);
        self.space.opened.borrow_mut().clear();
        self.state.borrow().checkpoint_place().sequence
    }

    /// A checkpoint ended. If it failed, the segments that it opened and that nothing refers to are
    /// given back.
    pub(super) fn end_checkpoint(&self, before: u64) {
        self.space.making.set(false);
        let opened = std::mem::take(&mut *self.space.opened.borrow_mut());
        if self.state.borrow().checkpoint_place().sequence != before {
            return;
        }
        let mut unused = Vec::new();
        {
            let mut state = self.state.borrow_mut();
            for id in opened {
                let referred = state.table.segments.get(&id).is_none_or(|s| s.live > 0);
                if referred {
                    continue;
                }
                state.meta.take_if(|meta| meta.id == id);
                if let Some(segment) = state.table.segments.remove(&id) {
                    unused.extend(segment.members.into_iter().map(|member| (id, member)));
                }
            }
        }
        self.discard(unused);
        self.reserve_is_back();
    }

    /// The root names a checkpoint, and what that freed is deleted: if none is newer, the
    /// checkpoints' reserve is as it was.
    pub(super) fn published(&self) {
        let newest = {
            let state = self.state.borrow();
            state.checkpoint == state.root.checkpoint
        };
        if newest && self.checkpoint_lock.try_lock().is_ok() {
            self.reserve_is_back();
        }
    }
}

/// Answers calls for space until the head stops.
pub(super) async fn run_calls(head: Rc<Head>) {
    head.member.take_part();
    loop {
        let wanted = head.disks.space_wanted.notified();
        if !head.is_serving() {
            head.member.answer(u64::MAX);
            return;
        }
        let Some(call) = head.member.called() else {
            wanted.await;
            continue;
        };
        head.give().await;
        head.member.answer(call);
    }
}

/// Lets others have the checkpoints' reserve when a checkpoint is made but its root does not come into
/// force: one volume that cannot reach its disks or the store must not stop all. Until it does, this
/// head makes no other checkpoint, so that it takes no more of the reserve than this once.
async fn lend(head: Weak<Head>, grant: u64) {
    loop {
        tokio::time::sleep(RESERVE_PATIENCE).await;
        let Some(head) = head.upgrade() else { return };
        if head.space.grants.get() != grant || head.space.reserve.borrow().is_none() {
            return;
        }
        if !head.space.making.get() {
            tracing::warn!(volume = %head.volume, "the root does not name a checkpoint that used the reserve");
            head.space.reserve.borrow_mut().take();
            return;
        }
    }
}
