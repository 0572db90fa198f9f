//! Disks that go and come, and what that makes of the shards they hold.
//!
//! A disk that goes takes no more appends: open segments leave it, and while it is away for longer what it
//! holds of sealed segments counts as missing, so that repair ([`super::repair`]) rebuilds it elsewhere. A
//! disk that comes back is fenced before it is asked what it holds. What is whole there counts
//! again; what it closed while it held all of it is sealed; the rest stays missing. Shards that nothing
//! refers to are listed as freed only where they are of an earlier epoch's numbers.
//!
//! Builds nothing, and does not know where shards go.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use super::head::{Head, Op};
use super::segtab::ShardRef;
use super::walk;
use crate::id::{DiskId, SegmentId};
use crate::segment::open::{CONTROL_PATIENCE, OpenSegment};
use crate::segment::record::Entry;
use crate::shard::{ShardInfo, ShardState, SlotClass, VolumeOnDisk};

/// Pause between two looks whether a segment that was left is sealed.
const SEAL_POLL: Duration = Duration::from_millis(10);
/// Pauses between two attempts to ask a disk that came back what it holds: the first one and the longest.
const FENCE_PAUSE: Duration = Duration::from_millis(500);
const FENCE_PAUSE_MAX: Duration = Duration::from_secs(8);

impl Head {
    /// Leaves every open segment that has a shard on a disk which was or is away: the disk closed
    /// that shard, so that nothing can be appended to it nor read from it until it is sealed.
    fn leave(self: &Rc<Self>, disk: DiskId) {
        self.leave_dense(disk);
        self.leave_copies(disk);
    }

    /// The same of log and meta segments.
    fn leave_copies(self: &Rc<Self>, disk: DiskId) {
        let on_disk = |segment: &OpenSegment| segment.shards.iter().any(|s| s.disk == disk);
        // Whoever makes a checkpoint now notices by itself.
        self.leave_meta(disk);
        let log = self.state.borrow().log.as_ref().is_some_and(|log| on_disk(log));
        if log && self.nothing_queued() {
            // A record without content: its append fails, and the log goes on elsewhere.
            self.enqueue(Op {
                entries: vec![Entry::Zero { lba: 0, blocks: 0, allocated: false }],
                payload: vec![],
                crcs: vec![],
                class: SlotClass::Checkpoint,
                generation: 0,
                done: None,
            });
        }
    }

    /// Leaves the open meta segment if it has a shard on this disk and no checkpoint is being made.
    pub(super) fn leave_meta(self: &Rc<Self>, disk: DiskId) {
        let Ok(_lock) = self.checkpoint_lock.try_lock() else { return };
        let mut state = self.state.borrow_mut();
        let on_disk = |segment: &OpenSegment| segment.shards.iter().any(|s| s.disk == disk);
        if let Some(meta) = state.meta.take_if(|meta| on_disk(meta))
            && let Some(entry) = state.table.segments.get_mut(&meta.id)
        {
            entry.sealed = true;
            let blocks = entry.blocks;
            drop(state);
            self.seal_in_background(meta, blocks);
        }
    }

    /// Leaves the open segments of a disk and waits a while until they are sealed.
    async fn leave_and_wait(self: &Rc<Self>, disk: DiskId) {
        let open: Vec<SegmentId> = {
            let state = self.state.borrow();
            let open = state
                .table
                .segments
                .values()
                .filter(|s| !s.sealed && s.members.iter().any(|member| member.disk == disk));
            open.map(|s| s.id).collect()
        };
        self.leave(disk);
        let sealed = async {
            let is_open = |id: &SegmentId| {
                self.state.borrow().table.segments.get(id).is_some_and(|s| !s.sealed)
            };
            while open.iter().any(is_open) && self.is_serving() {
                tokio::time::sleep(SEAL_POLL).await;
            }
        };
        if tokio::time::timeout(CONTROL_PATIENCE, sealed).await.is_err() {
            tracing::debug!(volume = %self.volume, %disk, "segments of a disk are open still");
        }
    }

    /// Seals a shard that its disk closed, where it holds the whole segment; it counts again then.
    pub(super) async fn reseal(&self, id: SegmentId, index: usize) {
        let Some(segment) = self.state.borrow().table.segments.get(&id).cloned() else { return };
        let blocks = segment.blocks;
        // A shard that was given up may still be there under its old creation, to be deleted.
        let member = segment.members[index];
        let Some(client) = self.disks.client(member.disk) else { return };
        let held = tokio::time::timeout(CONTROL_PATIENCE, client.list(self.volume)).await;
        let there =
            |info: &ShardInfo| info.spec.segment == id && info.spec.creation == member.creation;
        if !matches!(held, Ok(Ok(held)) if held.shards.iter().any(there)) {
            return;
        }
        if !walk::seal_closed(&self.disks, self.authority, &segment, index, blocks, None).await {
            return;
        }
        let mut state = self.state.borrow_mut();
        if let Some(entry) = state.table.segments.get_mut(&id)
            && entry.members.get(index) == segment.members.get(index)
            && entry.blocks == blocks
            && !entry.is_damaged(index)
        {
            entry.note_whole(index);
        }
    }

    /// Hears that a disk came back: what it holds intact counts again; the rest is repaired. Ends
    /// early if it goes again; whoever sees it return tells of it anew.
    pub async fn disk_returned(self: &Rc<Self>, disk: DiskId) {
        let arrival = self.disks.arrival(disk);
        tracing::debug!(volume = %self.volume, %disk, "a disk came back");
        self.state.borrow_mut().lost.remove(&disk);
        self.width_wanted.notify_waiters();
        self.leave_and_wait(disk).await;
        let Some(held) = self.fence_returned(disk, arrival).await else { return };
        for (id, index) in self.take_stock(disk, &held) {
            if self.disks.arrival(disk) != arrival {
                return;
            }
            self.reseal(id, index).await;
        }
        self.repair_wanted.notify_one();
        self.checkpoint_wanted.notify_one();
        self.wake.notify_one();
    }

    /// Fences a disk that came back and asks what it holds, again while it does not answer; none
    /// if it goes again, or the head stops.
    async fn fence_returned(&self, disk: DiskId, arrival: Option<u64>) -> Option<VolumeOnDisk> {
        let mut pause = FENCE_PAUSE;
        loop {
            if self.disks.arrival(disk) != arrival {
                return None;
            }
            let client = self.disks.client(disk).filter(|_| self.is_serving())?;
            let mirror = self.state.borrow().root.mirror();
            let fence = client.fence(self.authority, Some(mirror));
            match tokio::time::timeout(CONTROL_PATIENCE, fence).await {
                Ok(Ok(held)) => return Some(held),
                Ok(Err(error)) => tracing::debug!(%disk, %error, "a disk that came back refuses"),
                Err(_) => tracing::debug!(%disk, "a disk that came back does not answer"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(FENCE_PAUSE_MAX);
        }
    }

    /// Compares what a disk holds with the table; the shards that it closed and may hold whole.
    fn take_stock(&self, disk: DiskId, held: &VolumeOnDisk) -> Vec<(SegmentId, usize)> {
        let mut closed = Vec::new();
        let mut state = self.state.borrow_mut();
        let own = state.root.range.0;
        for info in &held.shards {
            let there = ShardRef { disk, creation: info.spec.creation };
            let known = state.table.segments.get_mut(&info.spec.segment).and_then(|segment| {
                let index = segment.members.iter().position(|m| *m == there)?;
                Some((segment, index))
            });
            match known {
                Some((segment, index)) => {
                    let whole = segment.sealed
                        && !segment.is_damaged(index)
                        && info.state == ShardState::Sealed
                        && info.blocks == segment.blocks;
                    if whole {
                        segment.note_whole(index);
                    } else if segment.sealed {
                        segment.missing |= 1 << index;
                        if info.state == ShardState::Closed {
                            closed.push((segment.id, index));
                        }
                    }
                }
                None if info.spec.segment.0 < own
                    && info.epoch < self.authority.epoch
                    && info.epoch.incarnation() == self.authority.epoch.incarnation() =>
                {
                    tracing::debug!(volume = %self.volume, segment = %info.spec.segment, %disk, creation = info.spec.creation, "a shard that nothing refers to");
                    state.table.freed.insert((info.spec.segment, there));
                }
                None => {}
            }
        }
        // What the table says is on the disk but is not there.
        let present: BTreeSet<(SegmentId, u64)> =
            held.shards.iter().map(|i| (i.spec.segment, i.spec.creation)).collect();
        for segment in state.table.segments.values_mut().filter(|s| s.sealed) {
            for (index, member) in segment.members.iter().enumerate() {
                if member.disk == disk && !present.contains(&(segment.id, member.creation)) {
                    segment.missing |= 1 << index;
                }
            }
        }
        closed
    }

    /// Hears that a disk is gone for longer: its shards are rebuilt elsewhere. To be repeated while
    /// the disk is away, because segments are sealed meanwhile.
    pub fn disk_lost(self: &Rc<Self>, disk: DiskId) {
        // A disk that is up and only meant to go is left where others can take its place: the next
        // segments would lie there again, and there would be no end of it.
        let up = self.disks.client(disk).is_some();
        let elsewhere = || self.disks.domains_with_room(|other| other != disk);
        if !up || elsewhere() >= self.dense_scheme().width() {
            self.leave_dense(disk);
        }
        let leaves = !up || self.can_log_without(disk);
        if leaves {
            self.leave_copies(disk);
        }
        self.width_wanted.notify_waiters();
        let mut state = self.state.borrow_mut();
        state.lost.insert(disk);
        let there = |log: &Rc<OpenSegment>| log.shards.iter().any(|shard| shard.disk == disk);
        if leaves && state.log.as_ref().is_some_and(there) {
            // It may be up and only be meant to go.
            state.roll_log = true;
            self.wake.notify_one();
        }
        for segment in state.table.segments.values_mut() {
            for (index, member) in segment.members.iter().enumerate() {
                if member.disk == disk && segment.sealed {
                    segment.missing |= 1 << index;
                }
            }
        }
        drop(state);
        self.repair_wanted.notify_one();
    }

    /// Whether a log segment could be opened, as wide as it should be, on healthy disks that are not
    /// this one.
    fn can_log_without(&self, disk: DiskId) -> bool {
        let state = self.state.borrow();
        let least = usize::from(self.pool.min_size);
        state.pairs().into_iter().chain(&state.planned).all(|set| {
            let allowed = |other| other != disk && set.domain_of(other).is_some();
            self.disks.domains_with_room(allowed) >= least.max(set.width().into())
        })
    }
}
