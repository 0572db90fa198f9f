//! The segment table: every segment of a volume, where its shards lie and what still refers to it.
//!
//! Invariants ([`SegmentTable::check`]):
//! - `live` is the number of references from the index as of the newest merge: blocks for log and
//!   data segments, pages for meta segments. It never drifts from a full walk.
//! - `recent` is the number of blocks that overlays (newer than the index) refer to.
//! - A segment may be freed only when it is sealed, both are zero, and neither the newest
//!   checkpoint nor the replay from it needs it.

use std::collections::{BTreeMap, BTreeSet};

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::id::{BLOCK_SIZE, DiskId, Epoch, Lsn, SegmentId, VolumeId};
use crate::limits::{DATA_SHARDS_MAX, PARITY_SHARDS_MAX};
use crate::planted::{Bug, bug};
use crate::shard::{Scheme, SegmentKind};

/// One shard of a segment: which disk, and which creation on it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
pub struct ShardRef {
    /// The disk.
    pub disk: DiskId,
    /// As in [`crate::shard::ShardSpec::creation`].
    pub creation: u64,
}

/// A segment of the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its number.
    pub id: SegmentId,
    /// What it is for.
    pub kind: SegmentKind,
    /// Its scheme.
    pub scheme: Scheme,
    /// Epoch of the head that opened it.
    pub epoch: Epoch,
    /// Its shards, by index; `scheme.width()` of them. The nil disk is that of a shard that was
    /// never created, because too few domains were left.
    pub members: Vec<ShardRef>,
    /// Blocks that each shard may hold.
    pub shard_blocks: u32,
    /// Whether it takes no more appends.
    pub sealed: bool,
    /// Length of each shard in blocks; for an open segment, what is committed.
    pub blocks: u32,
    /// Bit `i`: shard `i` is not on its disk, or not whole; repair builds it anew.
    pub missing: u32,
    /// Bit `i`, of those missing: shard `i` is on its disk, but some of its content is bad; that
    /// its disk holds it at the right length makes it no better.
    pub damaged: u32,
    /// References from the index.
    pub live: u32,
    /// Blocks that overlays refer to.
    pub recent: u32,
    /// Appends to it whose references are not applied yet; it is not freed meanwhile.
    pub pins: u32,
}

impl Segment {
    /// Notes that shard `index` is there and whole.
    pub fn note_whole(&mut self, index: usize) {
        self.missing &= !(1 << index);
        self.damaged &= !(1 << index);
    }

    /// Whether the content of shard `index` was found bad.
    pub fn is_damaged(&self, index: usize) -> bool {
        self.damaged >> index & 1 == 1
    }

    /// Whether one of its shards lies on this disk.
    pub fn lies_on(&self, disk: DiskId) -> bool {
        self.members.iter().any(|member| member.disk == disk)
    }

    /// Shards that are there.
    pub fn present(&self) -> usize {
        self.scheme.width() - self.missing.count_ones() as usize
    }

    /// Blocks of payload that it could hold, for the share that is live.
    pub fn capacity_blocks(&self) -> u64 {
        u64::from(self.blocks) * u64::from(self.scheme.data)
    }
}

/// The segments of a volume, and the shards that are to be deleted.
#[derive(Debug, Clone, Default)]
pub struct SegmentTable {
    /// By number.
    pub segments: BTreeMap<SegmentId, Segment>,
    /// Shards that nothing refers to any more, listed until their disk confirms the deletion.
    pub freed: BTreeSet<(SegmentId, ShardRef)>,
}

/// What a checkpoint stores besides the pages of the index.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The volume.
    pub volume: VolumeId,
    /// Epoch of the head that wrote it.
    pub epoch: Epoch,
    /// Number of the checkpoint.
    pub sequence: u64,
    /// Everything up to here is in the index.
    pub lsn: Lsn,
    /// Entry of the index's root page.
    pub root: u64,
    /// Height of the index.
    pub height: u8,
    /// Where the record after `lsn` lies, or will: log segment and block.
    pub log: Option<(SegmentId, u32)>,
    /// The table.
    pub table: SegmentTable,
}

/// `SDSC`, little-endian.
const MAGIC: u32 = u32::from_le_bytes(*b"SDSC");
const VERSION: u16 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSnapshot {
    magic: U32,
    /// CRC-32 of all bytes with this field zero.
    crc: U32,
    version: U16,
    height: u8,
    has_log: u8,
    disks: U32,
    bytes: U64,
    volume: [u8; 16],
    epoch: U64,
    sequence: U64,
    lsn: U64,
    root: U64,
    log_segment: U64,
    log_block: U32,
    segments: U32,
    freed: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSegment {
    id: U64,
    epoch: U64,
    kind: u8,
    data: u8,
    parity: u8,
    sealed: u8,
    shard_blocks: U32,
    blocks: U32,
    missing: U32,
    live: U32,
    /// Zero where a version wrote it that did not know of damaged shards.
    damaged: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawShard {
    creation: U64,
    disk: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFreed {
    segment: U64,
    shard: RawShard,
}

const _: () = assert!(
    size_of::<RawSnapshot>() == 96
        && size_of::<RawSegment>() == 40
        && size_of::<RawShard>() == 12
        && size_of::<RawFreed>() == 20
);

/// Why bytes are not a checkpoint's table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// No magic, or too short.
    #[error("no checkpoint is stored here")]
    NotOne,
    /// Written by a newer version.
    #[error("checkpoint of format version {0}, this program knows {VERSION}")]
    Version(u16),
    /// The checksum does not match.
    #[error("the checkpoint is damaged")]
    Checksum,
    /// Counts or fields are impossible.
    #[error("the checkpoint has impossible numbers")]
    Numbers,
}

impl Snapshot {
    /// The bytes to store: a multiple of the block size.
    pub fn encode(&self) -> Vec<u8> {
        let mut disks: BTreeMap<DiskId, u32> = BTreeMap::new();
        let shards = self.table.segments.values().flat_map(|s| &s.members);
        for shard in shards.chain(self.table.freed.iter().map(|(_, shard)| shard)) {
            disks.insert(shard.disk, 0);
        }
        for (number, index) in (0u32..).zip(disks.values_mut()) {
            *index = number;
        }
        let raw_shard = |shard: &ShardRef| RawShard {
            creation: shard.creation.into(),
            disk: disks[&shard.disk].into(),
        };
        let mut out = vec![0; size_of::<RawSnapshot>()];
        for disk in disks.keys() {
            out.extend_from_slice(&disk.to_bytes());
        }
        for s in self.table.segments.values() {
            let raw = RawSegment {
                id: s.id.0.into(),
                epoch: s.epoch.0.into(),
                kind: s.kind as u8,
                data: s.scheme.data,
                parity: s.scheme.parity,
                sealed: s.sealed.into(),
                shard_blocks: s.shard_blocks.into(),
                blocks: s.blocks.into(),
                missing: s.missing.into(),
                live: s.live.into(),
                damaged: s.damaged.into(),
            };
            out.extend_from_slice(raw.as_bytes());
            for member in &s.members {
                out.extend_from_slice(raw_shard(member).as_bytes());
            }
        }
        for (segment, shard) in &self.table.freed {
            let raw = RawFreed { segment: segment.0.into(), shard: raw_shard(shard) };
            out.extend_from_slice(raw.as_bytes());
        }
        let bytes = out.len();
        out.resize(bytes.next_multiple_of(BLOCK_SIZE), 0);
        let count = |n: usize| U32::new(u32::try_from(n).expect("bounded by the slots there are"));
        let (log_segment, log_block) = self.log.unwrap_or_default();
        let header = RawSnapshot {
            magic: MAGIC.into(),
            crc: U32::ZERO,
            version: VERSION.into(),
            height: self.height,
            has_log: self.log.is_some().into(),
            disks: count(disks.len()),
            bytes: (out.len() as u64).into(),
            volume: self.volume.to_bytes(),
            epoch: self.epoch.0.into(),
            sequence: self.sequence.into(),
            lsn: self.lsn.0.into(),
            root: self.root.into(),
            log_segment: log_segment.0.into(),
            log_block: log_block.into(),
            segments: count(self.table.segments.len()),
            freed: count(self.table.freed.len()),
            reserved: U32::ZERO,
        };
        out[..size_of::<RawSnapshot>()].copy_from_slice(header.as_bytes());
        let crc = crc32fast::hash(&out);
        out[4..8].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads what [`Snapshot::encode`] made.
    ///
    /// # Errors
    /// [`SnapshotError`]: whatever the bytes are, nothing panics.
    pub fn decode(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let (raw, mut rest) =
            RawSnapshot::ref_from_prefix(bytes).map_err(|_| SnapshotError::NotOne)?;
        if raw.magic.get() != MAGIC {
            return Err(SnapshotError::NotOne);
        }
        if raw.version.get() != VERSION {
            return Err(SnapshotError::Version(raw.version.get()));
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(&bytes[..4]);
        crc.update(&[0; 4]);
        crc.update(&bytes[8..]);
        if crc.finalize() != raw.crc.get() || raw.bytes.get() != bytes.len() as u64 {
            return Err(SnapshotError::Checksum);
        }
        let mut disks = Vec::new();
        for _ in 0..raw.disks.get() {
            let (id, tail) =
                <[u8; 16]>::read_from_prefix(rest).map_err(|_| SnapshotError::Numbers)?;
            disks.push(DiskId::from_bytes(id));
            rest = tail;
        }
        let mut table = SegmentTable::default();
        for _ in 0..raw.segments.get() {
            let segment = read_segment(&mut rest, &disks)?;
            table.segments.insert(segment.id, segment);
        }
        for _ in 0..raw.freed.get() {
            let (freed, tail) =
                RawFreed::ref_from_prefix(rest).map_err(|_| SnapshotError::Numbers)?;
            let shard = shard_ref(&freed.shard, &disks)?;
            table.freed.insert((SegmentId(freed.segment.get()), shard));
            rest = tail;
        }
        Ok(Self {
            volume: VolumeId::from_bytes(raw.volume),
            epoch: Epoch(raw.epoch.get()),
            sequence: raw.sequence.get(),
            lsn: Lsn(raw.lsn.get()),
            root: raw.root.get(),
            height: raw.height,
            log: (raw.has_log != 0)
                .then(|| (SegmentId(raw.log_segment.get()), raw.log_block.get())),
            table,
        })
    }
}

fn shard_ref(raw: &RawShard, disks: &[DiskId]) -> Result<ShardRef, SnapshotError> {
    let index = usize::try_from(raw.disk.get()).unwrap_or(usize::MAX);
    let disk = *disks.get(index).ok_or(SnapshotError::Numbers)?;
    Ok(ShardRef { disk, creation: raw.creation.get() })
}

fn read_segment(rest: &mut &[u8], disks: &[DiskId]) -> Result<Segment, SnapshotError> {
    let (raw, mut tail) = RawSegment::ref_from_prefix(rest).map_err(|_| SnapshotError::Numbers)?;
    let scheme = Scheme { data: raw.data, parity: raw.parity };
    if !(1..=DATA_SHARDS_MAX).contains(&usize::from(raw.data))
        || usize::from(raw.parity) > PARITY_SHARDS_MAX
        || raw.blocks.get() > raw.shard_blocks.get()
    {
        return Err(SnapshotError::Numbers);
    }
    let kind = match raw.kind {
        1 => SegmentKind::Log,
        2 => SegmentKind::Data,
        3 => SegmentKind::Meta,
        _ => return Err(SnapshotError::Numbers),
    };
    let mut members = Vec::with_capacity(scheme.width());
    for _ in 0..scheme.width() {
        let (shard, next) = RawShard::ref_from_prefix(tail).map_err(|_| SnapshotError::Numbers)?;
        members.push(shard_ref(shard, disks)?);
        tail = next;
    }
    let segment = Segment {
        id: SegmentId(raw.id.get()),
        kind,
        scheme,
        epoch: Epoch(raw.epoch.get()),
        members,
        shard_blocks: raw.shard_blocks.get(),
        sealed: raw.sealed != 0,
        blocks: raw.blocks.get(),
        missing: raw.missing.get(),
        damaged: raw.damaged.get() & raw.missing.get(),
        live: raw.live.get(),
        recent: 0,
        pins: 0,
    };
    *rest = tail;
    Ok(segment)
}

impl SegmentTable {
    /// Counts `blocks` more (or fewer) recent references to a segment.
    pub fn add_recent(&mut self, segment: SegmentId, blocks: i64) {
        if let Some(s) = self.segments.get_mut(&segment) {
            let sum = i64::from(s.recent) + blocks;
            debug_assert!(sum >= 0, "segment {segment} has {sum} recent references");
            s.recent = u32::try_from(sum).unwrap_or(0);
        }
    }

    /// Whether nothing refers to a segment any more.
    pub fn is_dead(&self, id: SegmentId) -> bool {
        self.segments
            .get(&id)
            .is_some_and(|s| s.sealed && s.live == 0 && s.recent == 0 && s.pins == 0)
    }

    /// Applies what a merge changed.
    pub fn add_live(&mut self, deltas: &super::index::Deltas) {
        for (id, delta) in deltas {
            if let Some(s) = self.segments.get_mut(id) {
                let miscounted = i64::from(*delta < -1 && bug(Bug::MiscountLive));
                let delta = delta + miscounted;
                let sum = i64::from(s.live) + delta;
                debug_assert!(sum >= 0, "segment {id} has {sum} references");
                s.live = u32::try_from(sum).unwrap_or(0);
            }
        }
    }

    /// Takes a segment out and lists its shards as freed.
    pub fn free(&mut self, id: SegmentId) {
        if let Some(segment) = self.segments.remove(&id) {
            // A missing shard may turn up again with its disk: it is freed as well.
            for shard in segment.members.into_iter().filter(|shard| !shard.disk.is_nil()) {
                self.freed.insert((id, shard));
            }
        }
    }

    /// The invariants that hold at any time.
    ///
    /// # Errors
    /// Which invariant is broken, in words.
    pub fn check(&self) -> Result<(), String> {
        for (id, s) in &self.segments {
            if s.id != *id || s.members.len() != s.scheme.width() || s.blocks > s.shard_blocks {
                return Err(format!("segment {id} is malformed: {s:?}"));
            }
            if s.damaged & !s.missing != 0 {
                return Err(format!("segment {id} has a damaged shard that counts: {s:?}"));
            }
            let mut disks: Vec<DiskId> =
                s.members.iter().map(|m| m.disk).filter(|disk| !disk.is_nil()).collect();
            let count = disks.len();
            disks.sort_unstable();
            disks.dedup();
            if disks.len() != count {
                return Err(format!("segment {id} has two shards on one disk: {s:?}"));
            }
            let nowhere = |(index, member): (usize, &ShardRef)| {
                member.disk.is_nil() && s.missing >> index & 1 == 0
            };
            if s.members.iter().enumerate().any(nowhere) {
                return Err(format!("segment {id} lacks a shard that it does not miss: {s:?}"));
            }
            for member in &s.members {
                if self.freed.contains(&(*id, *member)) {
                    return Err(format!("segment {id} lists {member:?} as freed too"));
                }
            }
            let payload = u64::from(s.live) + u64::from(s.recent);
            if s.sealed && payload > 2 * s.capacity_blocks() {
                return Err(format!("segment {id} has more references than blocks: {s:?}"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(ids: &[u64]) -> Snapshot {
        let mut table = SegmentTable::default();
        for &id in ids {
            let members = (1..7u8)
                .map(|i| ShardRef { disk: DiskId::from_bytes([i; 16]), creation: id + 77 })
                .collect();
            let segment = Segment {
                id: SegmentId(id),
                kind: SegmentKind::Data,
                scheme: Scheme { data: 4, parity: 2 },
                epoch: Epoch::new(0, 3),
                members,
                shard_blocks: 512,
                sealed: id % 2 == 0,
                blocks: 100,
                missing: 2,
                damaged: 2,
                live: 17,
                recent: 0,
                pins: 0,
            };
            table.segments.insert(segment.id, segment);
        }
        let gone = ShardRef { disk: DiskId::from_bytes([9; 16]), creation: 4 };
        table.freed.insert((SegmentId(1), gone));
        Snapshot {
            volume: VolumeId::from_bytes([3; 16]),
            epoch: Epoch::new(0, 3),
            sequence: 12,
            lsn: Lsn(99),
            root: 0x1234_5601,
            height: 3,
            log: Some((SegmentId(7), 55)),
            table,
        }
    }

    proptest! {
        #[test]
        fn round_trip(ids in prop::collection::btree_set(2u64..1 << 30, 0..200)) {
            let snapshot = sample(&ids.into_iter().collect::<Vec<_>>());
            let bytes = snapshot.encode();
            prop_assert!(bytes.len().is_multiple_of(BLOCK_SIZE));
            let back = Snapshot::decode(&bytes).unwrap();
            prop_assert_eq!(format!("{back:?}"), format!("{snapshot:?}"));
            back.table.check().unwrap();
        }

        #[test]
        fn damage_is_noticed(at in any::<prop::sample::Index>(), bit in 0..8) {
            let mut bytes = sample(&[2, 3, 4]).encode();
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            prop_assert!(Snapshot::decode(&bytes).is_err());
        }
    }
}
