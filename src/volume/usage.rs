//! What the slots of a volume are for, by disk.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::head::{Head, State};
use super::segtab::Segment;
use crate::id::{BLOCK_BYTES, DiskId};

/// What slots are for, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Slots that are taken, whole.
    pub used: u64,
    /// Of them: what the index or newer writes refer to, pages of the index and its newest tables.
    pub live: u64,
    /// Of them: the unwritten rest of those that are being written to.
    pub open: u64,
    /// Of them: all else.
    pub reclaimable: u64,
}

impl Usage {
    /// Adds another.
    pub fn add(&mut self, other: Self) {
        self.used += other.used;
        self.live += other.live;
        self.open += other.open;
        self.reclaimable += other.reclaimable;
    }
}

/// What one shard of a segment takes in a slot of `slot` blocks: a segment that a take-over found in
/// the log does not say how large its slots are. Of `extra` blocks it is known besides that they are
/// needed.
fn shard(segment: &Segment, slot: u32, extra: u32) -> Usage {
    let blocks = |n: u32| u64::from(n) * BLOCK_BYTES;
    let references = u64::from(segment.live) + u64::from(segment.recent);
    let each = references.div_ceil(segment.scheme.data.into()) + u64::from(extra);
    let used = blocks(slot);
    let written = blocks(segment.blocks).min(used);
    let live = (each * BLOCK_BYTES).min(written);
    let open = if segment.sealed { 0 } else { used - written };
    Usage { used, live, open, reclaimable: used - live - open }
}

impl State {
    /// Blocks of a segment that hold the table of the newest checkpoint, or the root's.
    fn table_blocks(&self, segment: &Segment) -> u32 {
        let mut tables: Vec<_> = [&self.checkpoint, &self.root.checkpoint]
            .into_iter()
            .flatten()
            .filter(|checkpoint| checkpoint.place.segment == segment.id)
            .map(|checkpoint| (checkpoint.place.block, checkpoint.place.blocks))
            .collect();
        tables.sort_unstable();
        tables.dedup();
        tables.into_iter().map(|(_, blocks)| blocks).sum()
    }
}

impl Head {
    /// What the volume's slots are for, on each disk. Shards that are missing take none; those that
    /// are freed do until their disk has confirmed it.
    pub fn usage(&self) -> BTreeMap<DiskId, Usage> {
        let state = self.state.borrow();
        let mut usage: BTreeMap<DiskId, Usage> = BTreeMap::new();
        let smallest = self.disks.slot_blocks_min();
        let slot = |disk| self.disks.slot_blocks(disk).unwrap_or(smallest);
        for segment in state.table.segments.values() {
            let table = state.table_blocks(segment);
            for (index, member) in segment.members.iter().enumerate() {
                let there = segment.missing >> index & 1 == 0 || segment.is_damaged(index);
                if there && !member.disk.is_nil() {
                    let each = shard(segment, slot(member.disk), table);
                    usage.entry(member.disk).or_default().add(each);
                }
            }
        }
        for (_, freed) in &state.table.freed {
            let used = u64::from(slot(freed.disk)) * BLOCK_BYTES;
            let each = Usage { used, reclaimable: used, ..Usage::default() };
            usage.entry(freed.disk).or_default().add(each);
        }
        for disk in self.moves_begun() {
            let used = u64::from(slot(disk)) * BLOCK_BYTES;
            usage.entry(disk).or_default().add(Usage { used, open: used, ..Usage::default() });
        }
        usage
    }
}
