//! Where everything lies on a disk.
//!
//! [`Geometry::lay_out`] is part of the on-disk format: a superblock holds its arguments and its
//! result, and opening checks that they agree. [`Geometry::plan`] is only a choice of arguments.
//!
//! ```text
//! 0        32 KiB   64 KiB
//! ├─ super ─┼─ super ─┼─ slot table ×2 ─┼─ volume table ×2 ─┼─ catalog ×2 ─┼─ checksums ─┼─ slots …
//! ```

use serde::Serialize;

use crate::disk::format::{CATALOG_AREA_BYTES, CRCS_PER_PAGE, ENTRIES_PER_PAGE};
use crate::id::{BLOCK_BYTES, BLOCK_SIZE};
use crate::limits::{SLOT_BYTES_MAX, SLOT_BYTES_MIN};

/// Byte offsets of the two copies of the superblock.
pub const SUPERBLOCK_OFFSETS: [u64; 2] = [0, 32 << 10];
/// Byte offset of the first table.
const TABLES_OFFSET: u64 = 64 << 10;
/// Slots a disk should have at least when it is large enough for slots of [`PLAN_SLOT_BYTES`].
const PLAN_SLOTS_MIN: u32 = 1024;
/// Slots are not planned smaller than this where [`PLAN_SLOTS_MIN`] of them fit.
const PLAN_SLOT_BYTES: u64 = 1 << 20;
/// Slots that a small disk should have at least.
const PLAN_SLOTS_SMALL: u32 = 64;
/// One volume is provided for per this many bytes of disk.
const PLAN_BYTES_PER_VOLUME: u64 = 16 << 20;
/// Volumes that a planned disk has room for, at least and at most.
const PLAN_VOLUMES: (u64, u64) = (16, 4096);
/// A disk must have this many slots: the reserves of the slot classes and one to use.
const SLOTS_MIN: u32 = 8;
/// Volumes that a disk may have room for, whoever says so.
pub const VOLUMES_MAX: u32 = 4096;

/// Why no geometry fits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The slot size is not a power of two within the limits.
    #[error("a slot of {0} bytes: not a power of two from {SLOT_BYTES_MIN} to {SLOT_BYTES_MAX}")]
    SlotBytes(u64),
    /// The number of volumes is zero or beyond [`VOLUMES_MAX`].
    #[error("room for {0} volumes: not between 1 and {VOLUMES_MAX}")]
    Volumes(u32),
    /// The disk is too small.
    #[error("{size_bytes} bytes hold fewer than {SLOTS_MIN} slots of {slot_bytes} bytes")]
    TooSmall {
        /// Size of the disk.
        size_bytes: u64,
        /// Size of a slot.
        slot_bytes: u64,
    },
}

/// Sizes and offsets of a disk; all offsets and sizes are in bytes. Its fields are those of `layout`
/// in what `sdsctl inspect disk` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Geometry {
    /// Bytes used of the device.
    pub size_bytes: u64,
    /// Size of a slot: a power of two.
    pub slot_bytes: u64,
    /// Number of slots.
    pub slots: u32,
    /// Number of volume pages.
    pub volumes_max: u32,
    /// Offset of the slot table: all first copies, then all second copies.
    pub slot_table: u64,
    /// Offset of the volume table, laid out alike.
    pub volume_table: u64,
    /// Offset of the first of two catalog areas.
    pub catalog: u64,
    /// Offset of the checksum area.
    pub checksums: u64,
    /// Offset of slot 0.
    pub data: u64,
}

impl Geometry {
    /// A sensible geometry for a disk of `size_bytes`: as large slots as leave at least 1,024 of
    /// them, but no smaller than 1 MiB unless the disk is tiny.
    pub fn plan(size_bytes: u64) -> Result<Self, GeometryError> {
        Self::plan_with(size_bytes, None, None)
    }

    /// As [`Geometry::plan`], with what is given taken as it is.
    pub fn plan_with(
        size_bytes: u64,
        slot_bytes: Option<u64>,
        volumes_max: Option<u32>,
    ) -> Result<Self, GeometryError> {
        let (least, most) = PLAN_VOLUMES;
        let planned = (size_bytes / PLAN_BYTES_PER_VOLUME).clamp(least, most);
        let volumes_max =
            volumes_max.unwrap_or_else(|| u32::try_from(planned).unwrap_or(VOLUMES_MAX));
        if let Some(slot_bytes) = slot_bytes {
            return Self::lay_out(size_bytes, slot_bytes, volumes_max);
        }
        let mut slot_bytes = SLOT_BYTES_MAX;
        loop {
            let wanted =
                if slot_bytes > PLAN_SLOT_BYTES { PLAN_SLOTS_MIN } else { PLAN_SLOTS_SMALL };
            match Self::lay_out(size_bytes, slot_bytes, volumes_max) {
                Ok(geometry) if geometry.slots >= wanted => return Ok(geometry),
                result if slot_bytes == SLOT_BYTES_MIN => return result,
                _ => slot_bytes /= 2,
            }
        }
    }

    /// The layout that the arguments give; part of the on-disk format.
    pub fn lay_out(
        size_bytes: u64,
        slot_bytes: u64,
        volumes_max: u32,
    ) -> Result<Self, GeometryError> {
        let allowed = SLOT_BYTES_MIN..=SLOT_BYTES_MAX;
        if !slot_bytes.is_power_of_two() || !allowed.contains(&slot_bytes) {
            return Err(GeometryError::SlotBytes(slot_bytes));
        }
        if volumes_max == 0 || volumes_max > VOLUMES_MAX {
            return Err(GeometryError::Volumes(volumes_max));
        }
        let size_bytes = size_bytes - size_bytes % BLOCK_BYTES;
        let too_small = GeometryError::TooSmall { size_bytes, slot_bytes };
        let mut slots = u32::try_from(size_bytes / slot_bytes).unwrap_or(u32::MAX);
        while slots >= SLOTS_MIN {
            let geometry = Self::with_slots(size_bytes, slot_bytes, volumes_max, slots);
            let end = geometry.data + u64::from(slots) * slot_bytes;
            if end <= size_bytes {
                return Ok(geometry);
            }
            // At least one slot has to go, and as many as the missing bytes are worth.
            let missing = (end - size_bytes).div_ceil(2 * slot_bytes).max(1);
            slots = slots.saturating_sub(u32::try_from(missing).unwrap_or(u32::MAX));
        }
        Err(too_small)
    }

    fn with_slots(size_bytes: u64, slot_bytes: u64, volumes_max: u32, slots: u32) -> Self {
        let mut geometry = Self {
            size_bytes,
            slot_bytes,
            slots,
            volumes_max,
            slot_table: TABLES_OFFSET,
            volume_table: 0,
            catalog: 0,
            checksums: 0,
            data: 0,
        };
        let pages = |count: u64| count * BLOCK_BYTES;
        geometry.volume_table = geometry.slot_table + 2 * pages(geometry.slot_pages().into());
        geometry.catalog = geometry.volume_table + 2 * pages(volumes_max.into());
        geometry.checksums = geometry.catalog + 2 * CATALOG_AREA_BYTES as u64;
        let end = geometry.checksums
            + pages(u64::from(slots) * u64::from(geometry.checksum_pages_per_slot()));
        geometry.data = end.next_multiple_of(slot_bytes.min(1 << 20));
        geometry
    }

    /// Blocks of a slot.
    pub fn slot_blocks(&self) -> u32 {
        u32::try_from(self.slot_bytes / BLOCK_BYTES).expect("a slot has at most 256 MiB")
    }

    /// Pages of the slot table (of one copy).
    pub fn slot_pages(&self) -> u32 {
        self.slots.div_ceil(u32::try_from(ENTRIES_PER_PAGE).expect("a small constant"))
    }

    /// Checksum pages that a slot has.
    pub fn checksum_pages_per_slot(&self) -> u32 {
        self.slot_blocks().div_ceil(u32::try_from(CRCS_PER_PAGE).expect("a small constant"))
    }

    /// Offset of a copy (0 or 1) of a page of the slot table.
    pub fn slot_page_offset(&self, page: u32, copy: u32) -> u64 {
        debug_assert!(page < self.slot_pages() && copy < 2);
        self.slot_table + BLOCK_BYTES * u64::from(copy * self.slot_pages() + page)
    }

    /// Offset of a copy (0 or 1) of a page of the volume table.
    pub fn volume_page_offset(&self, page: u32, copy: u32) -> u64 {
        debug_assert!(page < self.volumes_max && copy < 2);
        self.volume_table + BLOCK_BYTES * u64::from(copy * self.volumes_max + page)
    }

    /// Offset of a copy (0 or 1) of the catalog area.
    pub fn catalog_offset(&self, copy: u32) -> u64 {
        debug_assert!(copy < 2);
        self.catalog + u64::from(copy) * CATALOG_AREA_BYTES as u64
    }

    /// Number of the first checksum page of a slot among all checksum pages.
    pub fn checksum_page(&self, slot: u32) -> u64 {
        u64::from(slot) * u64::from(self.checksum_pages_per_slot())
    }

    /// Offset of a checksum page, by its number among all.
    pub fn checksum_page_offset(&self, page: u64) -> u64 {
        self.checksums + page * BLOCK_SIZE as u64
    }

    /// Offset of a block of a slot.
    pub fn block_offset(&self, slot: u32, block: u32) -> u64 {
        debug_assert!(slot < self.slots && block <= self.slot_blocks());
        self.data + u64::from(slot) * self.slot_bytes + u64::from(block) * BLOCK_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn plans_of_common_sizes() {
        let plan = |size: u64| {
            let g = Geometry::plan(size).expect("a size that works");
            (g.slot_bytes >> 10, g.slots, g.volumes_max)
        };
        assert_eq!(plan(4 << 30), (2048, 2041, 256));
        assert_eq!(plan(16 << 20), (128, 117, 16));
        assert_eq!(plan(1 << 40), (256 << 10, 4091, 4096));
        assert!(Geometry::plan(1 << 20).is_err());
        assert!(Geometry::plan(0).is_err());
        let small = Geometry::plan_with(4 << 20, Some(64 << 10), None).expect("fits");
        assert!(small.slots >= 40, "{small:?}");
    }

    proptest! {
        #[test]
        fn areas_follow_each_other(size in (4u64 << 20)..(64 << 40), volumes in 1u32..=4096) {
            let Ok(g) = Geometry::plan_with(size, None, Some(volumes)) else { return Ok(()) };
            prop_assert!(SUPERBLOCK_OFFSETS[1] + BLOCK_BYTES <= g.slot_table);
            prop_assert!(g.slot_page_offset(g.slot_pages() - 1, 1) < g.volume_table);
            prop_assert!(g.volume_page_offset(volumes - 1, 1) < g.catalog);
            prop_assert!(g.catalog_offset(1) + (CATALOG_AREA_BYTES as u64) <= g.checksums);
            let pages = g.checksum_page(g.slots - 1) + u64::from(g.checksum_pages_per_slot());
            prop_assert!(g.checksum_page_offset(pages) <= g.data);
            prop_assert!(g.block_offset(g.slots - 1, g.slot_blocks()) <= size);
            prop_assert_eq!(Geometry::lay_out(g.size_bytes, g.slot_bytes, volumes), Ok(g));
        }
    }
}
