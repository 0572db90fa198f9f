//! Checksums of blocks.
//!
//! The CRC-32 of a block is computed where the data enters the system ("raw"). What is stored and
//! compared is that value `XORed` with a salt made of (volume, segment, shard, block), so that a
//! block of another place, or of a slot's earlier tenant, never verifies; moving a block needs no
//! second pass over its data. Copies (`k = 1`) are the same bytes on every member and share the
//! salt of shard 0.

use crate::id::{BLOCK_SIZE, SegmentId, VolumeId};
use crate::shard::Scheme;

/// CRC-32 (IEEE) of a block of 4 KiB of zeroes.
pub const ZERO_BLOCK_CRC: u32 = 0xc71c_0011;

/// CRC-32 (IEEE 802.3) of `data`.
pub fn raw_crc(data: &[u8]) -> u32 {
    crc32fast::hash(data)
}

/// CRC-32 of each block of `data`, whose length is a multiple of the block size.
pub fn raw_crcs(data: &[u8]) -> impl Iterator<Item = u32> + '_ {
    debug_assert!(data.len().is_multiple_of(BLOCK_SIZE));
    data.chunks_exact(BLOCK_SIZE).map(raw_crc)
}

/// The salts of one shard.
#[derive(Debug, Clone, Copy)]
pub struct Salt(u64);

/// The finaliser of splitmix64: a bijection that spreads every input bit.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Salt {
    /// The salt of shard `index` of a segment with this scheme.
    pub fn new(volume: VolumeId, segment: SegmentId, scheme: Scheme, index: usize) -> Self {
        let shard = if scheme.data == 1 { 0 } else { index as u64 };
        let (high, low) = volume.0.as_u64_pair();
        Self(mix(mix(mix(high) ^ low) ^ segment.0).wrapping_add(mix(shard + 1)))
    }

    /// The salt of one block of the shard.
    pub fn of(self, block: u32) -> u32 {
        let mixed = mix(self.0 ^ (u64::from(block) << 1 | 1));
        u32::try_from(mixed >> 32).expect("32 bits")
    }

    /// Salts a raw checksum, or takes the salt off a stored one.
    pub fn apply(self, block: u32, crc: u32) -> u32 {
        crc ^ self.of(block)
    }

    /// The first block of `data` (blocks from `first` on) that does not match its stored
    /// checksum in `crcs`; none if all match.
    pub fn verify(self, first: u32, data: &[u8], crcs: &[u32]) -> Option<u32> {
        debug_assert_eq!(data.len(), crcs.len() * BLOCK_SIZE);
        if crate::planted::bug(crate::planted::Bug::IgnoreCrc) {
            return None;
        }
        (first..)
            .zip(raw_crcs(data).zip(crcs))
            .find(|(block, (raw, stored))| self.apply(*block, *raw) != **stored)
            .map(|(block, _)| block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_block() {
        assert_eq!(raw_crc(&[0; BLOCK_SIZE]), ZERO_BLOCK_CRC);
    }

    #[test]
    fn a_block_of_another_place_never_verifies() {
        let volume = VolumeId::from_bytes([7; 16]);
        let scheme = Scheme { data: 4, parity: 2 };
        let data = [5u8; BLOCK_SIZE];
        let here = Salt::new(volume, SegmentId(3), scheme, 1);
        let stored = here.apply(9, raw_crc(&data));
        assert_eq!(here.verify(9, &data, &[stored]), None);
        for (other, block) in [
            (here, 10),
            (Salt::new(volume, SegmentId(4), scheme, 1), 9),
            (Salt::new(volume, SegmentId(3), scheme, 2), 9),
            (Salt::new(VolumeId::from_bytes([8; 16]), SegmentId(3), scheme, 1), 9),
        ] {
            assert_eq!(other.verify(block, &data, &[stored]), Some(block));
        }
        let copies = Scheme::replicated(3);
        assert_eq!(
            Salt::new(volume, SegmentId(3), copies, 0).of(1),
            Salt::new(volume, SegmentId(3), copies, 2).of(1),
            "copies share their salt"
        );
    }
}
