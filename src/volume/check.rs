//! The invariants of a head as functions that tests and the simulation call.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use super::head::Head;
use super::index::count_all;
use super::overlay::Target;
use super::rules;
use super::segtab::ShardRef;
use crate::id::{BLOCK_BYTES, DiskId, SegmentId};
use crate::shard::{SegmentKind, ShardInfo, ShardState};

impl Head {
    /// Checks that who fences the log set meets every log segment that the root in force does not
    /// list as sealed, and that the set is not wider than the pool asks for. May be called at any
    /// time.
    ///
    /// # Errors
    /// The invariant that does not hold, in words.
    pub fn check_log_set(&self) -> Result<(), String> {
        let state = self.state.borrow();
        let set = &state.root.set;
        for (id, write_set) in &state.open_sets {
            if !rules::write_set_ok(set, write_set) {
                return Err(format!(
                    "log segment {id} on {write_set:?} would be missed by {set:?}"
                ));
            }
        }
        let uncovered = |id: &SegmentId| !state.is_covered(*id);
        let logs = state.table.segments.values().filter(|s| s.kind == SegmentKind::Log);
        let mut unknown = logs.map(|s| s.id).filter(|id| uncovered(id));
        if let Some(id) = unknown.find(|id| !state.open_sets.contains_key(id))
            && state.root_log != SegmentId::default()
        {
            return Err(format!("log segment {id} does not bind the log set"));
        }
        if set.width() > self.pool.scheme.parity + 1 {
            return Err(format!("the log is {} wide", set.width()));
        }
        Ok(())
    }

    /// What the log set is, and what keeps it so, for the report of a failure.
    pub fn explain_log_set(&self) -> String {
        let state = self.state.borrow();
        let down: Vec<DiskId> = (state.root.set.members().iter().map(|member| member.disk))
            .filter(|disk| !self.disks.is_healthy(*disk))
            .collect();
        format!(
            "{:?}, not healthy {down:?}, lost {:?}, away {:?}, pending {:?}, wanted {:?}, planned {:?}",
            state.root.set,
            state.lost,
            state.away.keys(),
            state.pending_root.as_ref().map(|root| &root.set),
            state.wanted,
            state.planned,
        )
    }

    /// Checks the table, and the counters against a full walk of the index. Nothing may be written
    /// meanwhile.
    ///
    /// # Errors
    /// The invariant that does not hold, in words.
    pub async fn check(self: &Rc<Self>) -> Result<(), String> {
        let _lock = self.checkpoint_lock.lock().await;
        self.state.borrow().table.check()?;
        self.check_log_set()?;
        let tree = self.state.borrow().tree;
        let counted = count_all(&**self, tree).await.map_err(|e| format!("index: {e}"))?;
        let state = self.state.borrow();
        let mut recent: BTreeMap<SegmentId, u64> = BTreeMap::new();
        let overlays = std::iter::once(&state.overlay).chain(state.frozen.as_deref());
        for extent in overlays.flat_map(super::overlay::Overlay::iter) {
            if let Target::Data(addr) = extent.target {
                *recent.entry(addr.segment).or_default() += extent.len;
            }
        }
        for (id, segment) in &state.table.segments {
            let live = counted.get(id).copied().unwrap_or(0);
            if i64::from(segment.live) != live {
                return Err(format!("segment {id} counts {} live, a walk {live}", segment.live));
            }
            let overlay = recent.get(id).copied().unwrap_or(0);
            if u64::from(segment.recent) != overlay {
                return Err(format!(
                    "segment {id} counts {} recent, the overlays {overlay}",
                    segment.recent
                ));
            }
        }
        let known = |id: &SegmentId| state.table.segments.contains_key(id);
        match counted.keys().chain(recent.keys()).find(|id| !known(id)) {
            Some(id) => Err(format!("the index refers to segment {id}, which is not listed")),
            None => Ok(()),
        }
    }

    /// Checks that every shard which counts as whole is on its disk, sealed at the length of its
    /// segment; on disks of `but` they need not be. Nothing may be written meanwhile.
    ///
    /// # Errors
    /// A shard that is not, in words.
    pub async fn check_shards(self: &Rc<Self>, but: &BTreeSet<DiskId>) -> Result<(), String> {
        let _lock = self.checkpoint_lock.lock().await;
        let mut held: BTreeMap<(DiskId, SegmentId, u64), (ShardState, u32)> = BTreeMap::new();
        for disk in self.disks.ids().into_iter().filter(|disk| !but.contains(disk)) {
            let Some(client) = self.disks.client(disk) else { continue };
            let found = client.list(self.volume).await.map_err(|e| format!("list {disk}: {e}"))?;
            held.extend(found.shards.into_iter().map(|info| {
                ((disk, info.spec.segment, info.spec.creation), (info.state, info.blocks))
            }));
        }
        let state = self.state.borrow();
        for segment in state.table.segments.values().filter(|s| s.sealed) {
            for (index, member) in segment.members.iter().enumerate() {
                let found = held.get(&(member.disk, segment.id, member.creation));
                let whole = found == Some(&(ShardState::Sealed, segment.blocks));
                let counts = segment.missing >> index & 1 == 0 && !but.contains(&member.disk);
                if counts && !whole {
                    return Err(format!(
                        "shard {index} of segment {} counts as whole, {} blocks long, but disk {} has {found:?}",
                        segment.id, segment.blocks, member.disk,
                    ));
                }
            }
        }
        Ok(())
    }

    /// Checks that the figures of space agree with what the disks hold, those of `but` excepted. The
    /// counters behind them are compared with a walk by [`Head::check`]. Nothing may be written
    /// meanwhile.
    ///
    /// # Errors
    /// A figure that is wrong, in words.
    pub async fn check_usage(self: &Rc<Self>, but: &BTreeSet<DiskId>) -> Result<(), String> {
        let _lock = self.checkpoint_lock.lock().await;
        let usage = self.usage();
        for disk in self.disks.ids().into_iter().filter(|disk| !but.contains(disk)) {
            let Some(client) = self.disks.client(disk) else { continue };
            let held = client.list(self.volume).await.map_err(|e| format!("list {disk}: {e}"))?;
            let blocks = u64::from(self.disks.slot_blocks(disk).unwrap_or(0));
            let taken = held.shards.len() as u64 * blocks * BLOCK_BYTES;
            let told = usage.get(&disk).copied().unwrap_or_default();
            if told.used != taken {
                return Err(format!("{taken} bytes of disk {disk} are used, told is {told:?}"));
            }
            if told.live + told.open + told.reclaimable != told.used {
                return Err(format!("disk {disk}: the parts do not make the whole: {told:?}"));
            }
        }
        Ok(())
    }

    /// Whether a shard on a disk counts as whole, of a segment that is sealed and needed.
    pub fn counts_on(&self, disk: DiskId, info: &ShardInfo) -> bool {
        let state = self.state.borrow();
        let there = ShardRef { disk, creation: info.spec.creation };
        self.is_needed(&state, info.spec.segment)
            && state.table.segments.get(&info.spec.segment).is_some_and(|segment| {
                let index = segment.members.iter().position(|member| *member == there);
                segment.sealed && index.is_some_and(|index| segment.missing >> index & 1 == 0)
            })
    }

    /// Checks that the disks, those of `but` excepted, hold exactly the shards that the table lists.
    /// Nothing may be written meanwhile.
    ///
    /// # Errors
    /// A shard too many or too few, in words.
    pub async fn check_leaks(self: &Rc<Self>, but: &BTreeSet<DiskId>) -> Result<(), String> {
        let _lock = self.checkpoint_lock.lock().await;
        let mut listed: BTreeSet<(DiskId, SegmentId, u64)> = BTreeSet::new();
        {
            let state = self.state.borrow();
            for segment in state.table.segments.values() {
                listed.extend(segment.members.iter().map(|m| (m.disk, segment.id, m.creation)));
            }
            listed.extend(state.table.freed.iter().map(|(id, s)| (s.disk, *id, s.creation)));
        }
        for disk in self.disks.ids().into_iter().filter(|disk| !but.contains(disk)) {
            let Some(client) = self.disks.client(disk) else { continue };
            let held = client.list(self.volume).await.map_err(|e| format!("list {disk}: {e}"))?;
            for info in held.shards {
                let shard = (disk, info.spec.segment, info.spec.creation);
                if !listed.contains(&shard) {
                    return Err(format!("disk {disk} holds a shard that nobody knows: {info:?}"));
                }
            }
        }
        let state = self.state.borrow();
        let mut freed = state.table.freed.iter().filter(|(_, shard)| !but.contains(&shard.disk));
        if let Some(first) = freed.next() {
            return Err(format!("{} shards stay freed, such as {first:?}", 1 + freed.count()));
        }
        let dead: Vec<SegmentId> =
            state.table.segments.keys().copied().filter(|id| state.table.is_dead(*id)).collect();
        // The newest tables are kept, and the log segment that replay would begin with.
        if dead.len() > 4 {
            return Err(format!("segments {dead:?} are dead but not freed"));
        }
        Ok(())
    }
}
