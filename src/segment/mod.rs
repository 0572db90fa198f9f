//! Segments: append-only byte ranges spread over `k + m` shards.
//!
//! Knows records, schemes, checksums and how to write to and read from a set of shards. Knows
//! nothing of volumes: which block of a disk a virtual disk's block lies in is the head's
//! business.

pub mod checksum;

pub mod codec;
pub mod fetch;
pub mod open;
pub mod record;
pub mod stripe;

use crate::id::{BLOCK_BYTES, SegmentId};
use crate::limits::{SEGMENT_BLOCK_BITS, SEGMENT_ID_BITS};

/// Place of a 4 KiB block: a segment and the block in it. Block `b` of data shard `i` of a
/// segment whose shards hold `c` blocks has the address `i * c + b`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct BlockAddr {
    /// The segment.
    pub segment: SegmentId,
    /// The block in it, below 2^20.
    pub block: u32,
}

impl BlockAddr {
    /// 56 bits: segment, then block.
    pub fn pack(self) -> u64 {
        debug_assert!(self.segment.0 < 1 << SEGMENT_ID_BITS);
        debug_assert!(self.block < 1 << SEGMENT_BLOCK_BITS);
        (self.segment.0 << SEGMENT_BLOCK_BITS) | u64::from(self.block)
    }

    /// The inverse of [`BlockAddr::pack`]; bits above the 56th must be zero.
    pub fn unpack(bits: u64) -> Self {
        let block = u32::try_from(bits & ((1 << SEGMENT_BLOCK_BITS) - 1)).expect("20 bits");
        Self { segment: SegmentId(bits >> SEGMENT_BLOCK_BITS), block }
    }

    /// The block `n` after this one.
    #[must_use]
    pub fn plus(self, n: u32) -> Self {
        Self { segment: self.segment, block: self.block + n }
    }
}

/// Blocks of a slot of `slot_bytes`.
pub fn slot_blocks(slot_bytes: u64) -> u32 {
    u32::try_from(slot_bytes / BLOCK_BYTES).unwrap_or(1 << 16).min(1 << 16)
}
