//! The record: the one format of everything that lies in a shard.
//!
//! ```text
//! block 0             RecordHeader (128 bytes) | entries (32 bytes each) | CRCs (4 bytes each)
//! [block 1]           … the header goes on, zero-padded
//! payload_blocks      payload
//! ```
//!
//! A log segment is a sequence of records of increasing LSN, the same bytes on every member; each
//! starts with an *opening* record (LSN 0) that tells how earlier log segments ended. A data or
//! meta segment is a sequence of records with LSN 0; every shard has records of the same shape
//! at the same blocks, with the payload (and so the CRCs) of its own.
//!
//! The header names its place (volume, segment, shard, block), so a record read from elsewhere is
//! refused; the CRCs of the payload are salted with it ([`super::checksum`]).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::BlockAddr;
use crate::buffer::AlignedBuf;
use crate::id::{BLOCK_SIZE, DiskId, Epoch, HeadId, Lsn, SegmentId, VolumeId};
use crate::limits::{
    DATA_SHARDS_MAX, PARITY_SHARDS_MAX, RECORD_ENTRIES_MAX, RECORD_HEADER_BLOCKS_MAX,
    RECORD_PAYLOAD_BLOCKS_MAX, SEGMENT_BLOCK_BITS,
};
use crate::shard::SegmentKind;

/// `SDSR`, little-endian.
pub const RECORD_MAGIC: u32 = u32::from_le_bytes(*b"SDSR");
/// Version of the format.
pub const RECORD_VERSION: u16 = 1;

/// Fixed part of a record's header.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    /// CRC-32 of all header blocks with this field zero.
    crc: U32,
    version: U16,
    kind: u8,
    shard: u8,
    header_blocks: U16,
    entry_count: U16,
    payload_blocks: U32,
    block: U32,
    volume: [u8; 16],
    segment: U64,
    epoch: U64,
    head: [u8; 16],
    lsn: U64,
    acked: U64,
    checkpoint: RawPlace,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawPlace {
    sequence: U64,
    lsn: U64,
    segment: U64,
    block: U32,
    blocks: U32,
    crc: U32,
    reserved: U32,
}

/// One entry as stored.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawEntry {
    kind: u8,
    flags: u8,
    reserved: U16,
    blocks: U32,
    lba: U64,
    a: U64,
    b: U64,
}

const HEADER_BYTES: usize = size_of::<RawHeader>();
const ENTRY_BYTES: usize = size_of::<RawEntry>();
const _: () = assert!(HEADER_BYTES == 128 && ENTRY_BYTES == 32);
const _: () = assert!(
    HEADER_BYTES + ENTRY_BYTES * RECORD_ENTRIES_MAX + 4 * RECORD_PAYLOAD_BLOCKS_MAX
        <= RECORD_HEADER_BLOCKS_MAX * BLOCK_SIZE
);

/// Where a checkpoint lies: `blocks` blocks of records from `block` on in a meta segment.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize, Hash,
)]
pub struct CheckpointPlace {
    /// Number of the checkpoint in its volume, increasing; 0 means none.
    pub sequence: u64,
    /// The checkpoint holds everything up to this LSN.
    pub lsn: Lsn,
    /// The segment.
    pub segment: SegmentId,
    /// First block in each of its shards.
    pub block: u32,
    /// Blocks.
    pub blocks: u32,
    /// CRC-32 of its content.
    pub crc: u32,
}

impl CheckpointPlace {
    /// Whether it lies within a segment.
    pub fn is_possible(&self) -> bool {
        self.block.checked_add(self.blocks).is_some_and(|end| end <= 1 << SEGMENT_BLOCK_BITS)
    }
}

/// What a record says. `lba` counts logical blocks, `blocks` blocks of 4 KiB.
#[allow(missing_docs, reason = "the fields are what the variant's sentence names")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Entry {
    /// The next `blocks` payload blocks are the content of `lba ..`.
    Write { lba: u64, blocks: u32 },
    /// `lba ..` reads as zeroes; `allocated` tells that it counts as allocated all the same.
    Zero { lba: u64, blocks: u64, allocated: bool },
    /// The content of `lba ..` lies at `addr ..` of a data segment.
    Place { lba: u64, blocks: u32, addr: BlockAddr },
    /// The content of `lba ..` was moved from `from ..` to `to ..`; applies block by block, where
    /// the index still points to the old place.
    Move { lba: u64, blocks: u32, from: BlockAddr, to: BlockAddr },
    /// A log segment ended at `blocks`; bit `i` of `bad` is set for members that failed.
    Closed { segment: SegmentId, blocks: u32, bad: u32 },
    /// A data segment was opened; as many [`Entry::Member`] as its scheme is wide follow.
    Opened { segment: SegmentId, data: u8, parity: u8, shard_blocks: u32, creation: u64 },
    /// A member of the segment opened before.
    Member { index: u8, disk: DiskId },
    /// A page of the index, in a meta segment: its level (0 = leaf) and number in the level.
    Page { level: u8, number: u64 },
    /// A piece of a checkpoint's table, in a meta segment: payload blocks.
    Table { blocks: u32 },
}

impl Entry {
    fn encode(self) -> RawEntry {
        let raw = |kind: u8, flags: u8, blocks: u32, lba: u64, a: u64, b: u64| RawEntry {
            kind,
            flags,
            reserved: U16::ZERO,
            blocks: blocks.into(),
            lba: lba.into(),
            a: a.into(),
            b: b.into(),
        };
        match self {
            Self::Write { lba, blocks } => raw(1, 0, blocks, lba, 0, 0),
            Self::Zero { lba, blocks, allocated } => raw(2, u8::from(allocated), 0, lba, blocks, 0),
            Self::Place { lba, blocks, addr } => raw(3, 0, blocks, lba, addr.pack(), 0),
            Self::Move { lba, blocks, from, to } => raw(4, 0, blocks, lba, from.pack(), to.pack()),
            Self::Closed { segment, blocks, bad } => raw(5, 0, blocks, 0, segment.0, bad.into()),
            Self::Opened { segment, data, parity, shard_blocks, creation } => {
                raw(6, data, shard_blocks, parity.into(), segment.0, creation)
            }
            Self::Member { index, disk } => {
                let (a, b) = disk.0.as_u64_pair();
                raw(7, index, 0, 0, a, b)
            }
            Self::Page { level, number } => raw(8, level, 1, number, 0, 0),
            Self::Table { blocks } => raw(9, 0, blocks, 0, 0, 0),
        }
    }

    fn decode(raw: &RawEntry) -> Result<Self, RecordError> {
        let (blocks, lba, a, b) = (raw.blocks.get(), raw.lba.get(), raw.a.get(), raw.b.get());
        let address = |bits: u64| {
            if bits >> 56 == 0 { Ok(BlockAddr::unpack(bits)) } else { Err(RecordError::Entry) }
        };
        let narrow = |value: u64| u32::try_from(value).map_err(|_| RecordError::Entry);
        let tiny = |value: u64| u8::try_from(value).map_err(|_| RecordError::Entry);
        let end = match raw.kind {
            2 => lba.checked_add(a),
            _ => lba.checked_add(blocks.into()),
        };
        if end.is_none_or(|end| end > 1 << 52) {
            return Err(RecordError::Entry);
        }
        let entry = match raw.kind {
            1 => Self::Write { lba, blocks },
            2 => Self::Zero { lba, blocks: a, allocated: raw.flags & 1 != 0 },
            3 => Self::Place { lba, blocks, addr: address(a)? },
            4 => Self::Move { lba, blocks, from: address(a)?, to: address(b)? },
            5 => Self::Closed { segment: SegmentId(a), blocks, bad: narrow(b)? },
            6 => {
                let parity = tiny(lba)?;
                let width = (1..=DATA_SHARDS_MAX).contains(&usize::from(raw.flags))
                    && usize::from(parity) <= PARITY_SHARDS_MAX;
                if !width || !(1..=1 << SEGMENT_BLOCK_BITS).contains(&blocks) {
                    return Err(RecordError::Entry);
                }
                let segment = SegmentId(a);
                Self::Opened { segment, data: raw.flags, parity, shard_blocks: blocks, creation: b }
            }
            7 => Self::Member { index: raw.flags, disk: DiskId(uuid::Uuid::from_u64_pair(a, b)) },
            8 => Self::Page { level: raw.flags, number: lba },
            9 => Self::Table { blocks },
            _ => return Err(RecordError::Entry),
        };
        // What this version does not use is zero.
        if entry.encode().as_bytes() == raw.as_bytes() {
            Ok(entry)
        } else {
            Err(RecordError::Entry)
        }
    }

    /// Blocks of the record's payload that belong to the entry.
    pub fn payload_blocks(&self) -> u32 {
        match self {
            Self::Write { blocks, .. } | Self::Table { blocks } => *blocks,
            Self::Page { .. } => 1,
            _ => 0,
        }
    }
}

/// Why bytes are not a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// No magic: nothing was written here, or something else.
    #[error("no record starts here")]
    NoRecord,
    /// Written by a newer version.
    #[error("record of format version {0}, this program knows {RECORD_VERSION}")]
    Version(u16),
    /// A count is beyond its bound, or the bytes end too early.
    #[error("the record's header has impossible counts")]
    Counts,
    /// The header's checksum does not match.
    #[error("the record's header is damaged")]
    Checksum,
    /// An entry of unknown kind or with impossible numbers.
    #[error("the record has an impossible entry")]
    Entry,
}

/// A record's header, decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// What the segment is for.
    pub kind: SegmentKind,
    /// Index of the shard (0 for copies).
    pub shard: u8,
    /// Blocks of the header.
    pub header_blocks: u32,
    /// Blocks of payload in this shard.
    pub payload_blocks: u32,
    /// Place of the header in the shard, blocks.
    pub block: u32,
    /// The volume.
    pub volume: VolumeId,
    /// The segment.
    pub segment: SegmentId,
    /// Epoch of the head that wrote it.
    pub epoch: Epoch,
    /// That head.
    pub head: HeadId,
    /// Number in the log; 0 outside it.
    pub lsn: Lsn,
    /// Highest LSN acknowledged when the record was formed.
    pub acked: Lsn,
    /// Newest checkpoint when the record was formed.
    pub checkpoint: CheckpointPlace,
    /// What it says.
    pub entries: Vec<Entry>,
    /// Salted CRC of each payload block.
    pub crcs: Vec<u32>,
}

/// CRC-32 of a header, its own field taken as zero.
fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[..4]);
    crc.update(&[0; 4]);
    crc.update(&bytes[8..]);
    crc.finalize()
}

/// Blocks that the header of a record with these counts takes.
pub fn header_blocks(entries: usize, payload_blocks: usize) -> u32 {
    let bytes = HEADER_BYTES + ENTRY_BYTES * entries + 4 * payload_blocks;
    u32::try_from(bytes.div_ceil(BLOCK_SIZE)).expect("bounded by the counts")
}

impl Header {
    /// Blocks of header and payload together.
    pub fn blocks(&self) -> u32 {
        self.header_blocks + self.payload_blocks
    }

    /// The header as it is stored; `header_blocks` must be what [`header_blocks`] gives.
    pub fn encode(&self) -> AlignedBuf {
        assert!(self.entries.len() <= RECORD_ENTRIES_MAX, "too many entries for a record");
        assert_eq!(self.crcs.len(), self.payload_blocks as usize);
        assert_eq!(self.header_blocks, header_blocks(self.entries.len(), self.crcs.len()));
        let mut buf = AlignedBuf::new(self.header_blocks as usize * BLOCK_SIZE);
        let raw = RawHeader {
            magic: RECORD_MAGIC.into(),
            crc: U32::ZERO,
            version: RECORD_VERSION.into(),
            kind: self.kind as u8,
            shard: self.shard,
            header_blocks: u16::try_from(self.header_blocks).expect("bounded").into(),
            entry_count: u16::try_from(self.entries.len()).expect("bounded").into(),
            payload_blocks: self.payload_blocks.into(),
            block: self.block.into(),
            volume: self.volume.to_bytes(),
            segment: self.segment.0.into(),
            epoch: self.epoch.0.into(),
            head: self.head.to_bytes(),
            lsn: self.lsn.0.into(),
            acked: self.acked.0.into(),
            checkpoint: RawPlace {
                sequence: self.checkpoint.sequence.into(),
                lsn: self.checkpoint.lsn.0.into(),
                segment: self.checkpoint.segment.0.into(),
                block: self.checkpoint.block.into(),
                blocks: self.checkpoint.blocks.into(),
                crc: self.checkpoint.crc.into(),
                reserved: U32::ZERO,
            },
        };
        buf[..HEADER_BYTES].copy_from_slice(raw.as_bytes());
        let mut at = HEADER_BYTES;
        for entry in &self.entries {
            buf[at..at + ENTRY_BYTES].copy_from_slice(entry.encode().as_bytes());
            at += ENTRY_BYTES;
        }
        for crc in &self.crcs {
            buf[at..at + 4].copy_from_slice(&crc.to_le_bytes());
            at += 4;
        }
        buf[at..].fill(0);
        let crc = crc32fast::hash(&buf);
        buf[4..8].copy_from_slice(&crc.to_le_bytes());
        buf
    }

    /// Reads the header that starts at `bytes`; the caller compares the place it names with the
    /// place it was read from ([`Header::is_at`]).
    ///
    /// # Errors
    /// [`RecordError::Counts`] also means that more than one block is needed: callers pass
    /// [`RECORD_HEADER_BLOCKS_MAX`] blocks where the shard has them.
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let (raw, _) = RawHeader::read_from_prefix(bytes).map_err(|_| RecordError::NoRecord)?;
        if raw.magic.get() != RECORD_MAGIC {
            return Err(RecordError::NoRecord);
        }
        // A newer version is one that says so behind a right checksum: where nothing was written
        // yet, a slot may hold anything. Magic, checksum, version, size, and what [`Header::claims`]
        // compares keep their places in every version.
        let blocks = usize::from(raw.header_blocks.get());
        if raw.version.get() != RECORD_VERSION {
            let whole = (1..=RECORD_HEADER_BLOCKS_MAX).contains(&blocks)
                && bytes.get(..blocks * BLOCK_SIZE).is_some_and(|b| checksum(b) == raw.crc.get());
            let version = RecordError::Version(raw.version.get());
            return Err(if whole { version } else { RecordError::Checksum });
        }
        let entry_count = usize::from(raw.entry_count.get());
        let payload = usize::try_from(raw.payload_blocks.get()).unwrap_or(usize::MAX);
        if entry_count > RECORD_ENTRIES_MAX
            || payload > RECORD_PAYLOAD_BLOCKS_MAX
            || header_blocks(entry_count, payload) as usize != blocks
            || bytes.len() < blocks * BLOCK_SIZE
        {
            return Err(RecordError::Counts);
        }
        let bytes = &bytes[..blocks * BLOCK_SIZE];
        if checksum(bytes) != raw.crc.get() {
            return Err(RecordError::Checksum);
        }
        let kind = match raw.kind {
            1 => SegmentKind::Log,
            2 => SegmentKind::Data,
            3 => SegmentKind::Meta,
            _ => return Err(RecordError::Counts),
        };
        let entries_end = HEADER_BYTES + entry_count * ENTRY_BYTES;
        let entries = bytes[HEADER_BYTES..entries_end]
            .chunks_exact(ENTRY_BYTES)
            .map(|chunk| {
                Entry::decode(&RawEntry::read_from_bytes(chunk).map_err(|_| RecordError::Entry)?)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let crcs = bytes[entries_end..entries_end + payload * 4]
            .chunks_exact(4)
            .map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]]))
            .collect();
        let checkpoint = CheckpointPlace {
            sequence: raw.checkpoint.sequence.get(),
            lsn: Lsn(raw.checkpoint.lsn.get()),
            segment: SegmentId(raw.checkpoint.segment.get()),
            block: raw.checkpoint.block.get(),
            blocks: raw.checkpoint.blocks.get(),
            crc: raw.checkpoint.crc.get(),
        };
        if !checkpoint.is_possible() || raw.block.get() >= 1 << SEGMENT_BLOCK_BITS {
            return Err(RecordError::Counts);
        }
        Ok(Self {
            kind,
            shard: raw.shard,
            header_blocks: raw.header_blocks.get().into(),
            payload_blocks: raw.payload_blocks.get(),
            block: raw.block.get(),
            volume: VolumeId::from_bytes(raw.volume),
            segment: SegmentId(raw.segment.get()),
            epoch: Epoch(raw.epoch.get()),
            head: HeadId::from_bytes(raw.head),
            lsn: Lsn(raw.lsn.get()),
            acked: Lsn(raw.acked.get()),
            checkpoint,
            entries,
            crcs,
        })
    }

    /// Whether bytes that do not decode say that they are the header of this place of this
    /// segment, whatever their version.
    pub fn claims(bytes: &[u8], volume: VolumeId, segment: SegmentId, block: u32) -> bool {
        let raw = RawHeader::read_from_prefix(bytes);
        raw.is_ok_and(|(raw, _)| {
            raw.magic.get() == RECORD_MAGIC
                && raw.volume == volume.to_bytes()
                && raw.segment.get() == segment.0
                && raw.block.get() == block
        })
    }

    /// Whether the header says that it lies where it was read.
    pub fn is_at(&self, volume: VolumeId, segment: SegmentId, shard: u8, block: u32) -> bool {
        self.volume == volume
            && self.segment == segment
            && self.shard == shard
            && self.block == block
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample(entries: Vec<Entry>, payload: u32) -> Header {
        Header {
            kind: SegmentKind::Log,
            shard: 0,
            header_blocks: header_blocks(entries.len(), payload as usize),
            payload_blocks: payload,
            block: 17,
            volume: VolumeId::from_bytes([1; 16]),
            segment: SegmentId(99),
            epoch: Epoch::new(1, 2),
            head: HeadId::from_bytes([3; 16]),
            lsn: Lsn(5),
            acked: Lsn(4),
            checkpoint: CheckpointPlace { sequence: 8, ..CheckpointPlace::default() },
            entries,
            crcs: (0..payload).collect(),
        }
    }

    fn entry() -> impl Strategy<Value = Entry> {
        let addr = (0u64..1 << 36, 0u32..1 << 20)
            .prop_map(|(s, block)| BlockAddr { segment: SegmentId(s), block });
        let lba = 0u64..1 << 40;
        prop_oneof![
            (lba.clone(), any::<u32>()).prop_map(|(lba, blocks)| Entry::Write { lba, blocks }),
            (lba.clone(), 0u64..1 << 40, any::<bool>())
                .prop_map(|(lba, blocks, allocated)| Entry::Zero { lba, blocks, allocated }),
            (lba.clone(), any::<u32>(), addr.clone())
                .prop_map(|(lba, blocks, addr)| Entry::Place { lba, blocks, addr }),
            (lba.clone(), any::<u32>(), addr.clone(), addr)
                .prop_map(|(lba, blocks, from, to)| Entry::Move { lba, blocks, from, to }),
            (any::<u64>(), any::<u32>(), any::<u32>()).prop_map(|(s, blocks, bad)| {
                Entry::Closed { segment: SegmentId(s), blocks, bad }
            }),
            (any::<u64>(), 1u8..=16, 0u8..=4, 1u32..=1 << 20, any::<u64>()).prop_map(
                |(s, data, parity, shard_blocks, creation)| Entry::Opened {
                    segment: SegmentId(s),
                    data,
                    parity,
                    shard_blocks,
                    creation
                }
            ),
            (any::<u8>(), any::<[u8; 16]>())
                .prop_map(|(index, id)| Entry::Member { index, disk: DiskId::from_bytes(id) }),
            (any::<u8>(), lba).prop_map(|(level, number)| Entry::Page { level, number }),
        ]
    }

    #[test]
    fn what_an_entry_does_not_use_is_zero() {
        let mut bytes = sample(vec![Entry::Page { level: 1, number: 1 << 52 }], 1).encode();
        assert_eq!(Header::decode(&bytes), Err(RecordError::Entry), "one page too far");
        bytes = sample(vec![Entry::Page { level: 1, number: 7 }], 1).encode();
        assert!(Header::decode(&bytes).is_ok());
        for at in [HEADER_BYTES + 2, HEADER_BYTES + ENTRY_BYTES - 1] {
            let mut changed = bytes.to_vec();
            changed[at] = 1;
            changed[4..8].fill(0);
            let crc = crc32fast::hash(&changed);
            changed[4..8].copy_from_slice(&crc.to_le_bytes());
            assert_eq!(Header::decode(&changed), Err(RecordError::Entry), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn round_trip(entries in prop::collection::vec(entry(), 0..RECORD_ENTRIES_MAX), payload in 0u32..512) {
            let header = sample(entries, payload);
            let bytes = header.encode();
            prop_assert_eq!(Header::decode(&bytes).unwrap(), header);
        }

        #[test]
        fn any_flipped_bit_is_noticed(payload in 0u32..512, at in any::<prop::sample::Index>(), bit in 0..8) {
            let mut bytes = sample(vec![Entry::Write { lba: 1, blocks: payload }], payload).encode();
            let at = at.index(bytes.len());
            bytes[at] ^= 1u8 << bit;
            prop_assert!(Header::decode(&bytes).is_err());
        }

        #[test]
        fn garbage_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..9000), magic in any::<bool>()) {
            if magic && bytes.len() >= 10 {
                bytes[..4].copy_from_slice(&RECORD_MAGIC.to_le_bytes());
                bytes[8..10].copy_from_slice(&RECORD_VERSION.to_le_bytes());
            }
            prop_assert!(Header::decode(&bytes).is_err());
        }
    }
}
