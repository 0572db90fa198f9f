//! Reading a disk as it lies there, without opening it: for whoever looks, and for tests.
//!
//! Changes nothing and works beside a running process, whose latest changes may then be missing.
//! It tells more than opening does (both copies of a page, shards that are open) and goes on where
//! opening refuses: tables that contradict each other or a device that was cut are findings here.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::buffer::AlignedBuf;
use crate::disk::checksums::{self, Tenant};
use crate::disk::device::{BlockDevice, DeviceError};
use crate::disk::format::{
    ENTRIES_PER_PAGE, Page, PageFault, ShardRecord, SlotPage, Superblock, VolumePage, VolumeRecord,
    decode_page,
};
use crate::disk::geometry::{Geometry, SUPERBLOCK_OFFSETS};
use crate::disk::open::{CHUNK_BYTES, newer_copy, read_copy, read_pages, read_superblock};
use crate::disk::{DiskOpenError, SuperblockInfo, catalog};
use crate::id::{BLOCK_SIZE, DiskId, SegmentId, VolumeId};
use crate::shard::{Catalog, ShardResult, ShardState, VolumeFence};

/// One of the two superblocks.
#[derive(Debug, Clone)]
pub struct SuperblockCopy {
    /// Where it lies, bytes.
    pub offset: u64,
    /// What it says, or why it does not count.
    pub found: Result<Superblock, String>,
}

/// A page of a table that is not the same in both copies, or readable in neither.
#[derive(Debug, Clone)]
pub struct PageFinding {
    /// `slot` or `volume`.
    pub table: &'static str,
    /// Its number in the table.
    pub page: u32,
    /// The sequence of each copy, or why it does not count.
    pub copies: [Result<u64, String>; 2],
    /// Neither copy counts.
    pub damaged: bool,
}

/// What a disk holds, as [`inspect`] finds it.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// Identity and layout.
    pub superblock: SuperblockInfo,
    /// Slots that hold a shard, as their entries say.
    pub slots: Vec<(u32, ShardRecord)>,
    /// Slots of which nothing is known: their page is unreadable.
    pub slots_unreadable: u32,
    /// Fences and root mirrors, by their place in the table.
    pub volumes: Vec<VolumeFence>,
    /// The catalog, or why it cannot be told.
    pub catalog: ShardResult<Catalog>,
    /// Pages that are not as they should be.
    pub pages: Vec<PageFinding>,
    /// What contradicts itself, a sentence each: the disk cannot be opened as it is.
    pub contradictions: Vec<String>,
}

/// Both superblocks, whatever they are.
pub async fn superblock_copies(device: &dyn BlockDevice) -> [SuperblockCopy; 2] {
    let copy = async |offset| SuperblockCopy {
        offset,
        found: read_copy(device, offset).await.map_err(|fault| match fault {
            Ok(fault) => fault.to_string(),
            Err(error) => error.to_string(),
        }),
    };
    let [first, second] = SUPERBLOCK_OFFSETS;
    [copy(first).await, copy(second).await]
}

/// Reads what a disk holds. Bounded by the geometry, as opening it is.
///
/// # Errors
/// [`DiskOpenError`] where there is no finished superblock to go by, or the device is gone. A
/// device that is too short is a contradiction of the result instead: much may still be told.
pub async fn inspect(device: &dyn BlockDevice) -> Result<Inspection, DiskOpenError> {
    let mut contradictions = Vec::new();
    let superblock = match read_superblock(device).await {
        Ok((superblock, _)) => superblock,
        Err(error @ DiskOpenError::TooShort { .. }) => {
            contradictions.push(error.to_string());
            let copies = superblock_copies(device).await.into_iter();
            let newest = copies.filter_map(|copy| copy.found.ok()).max_by_key(|s| s.sequence);
            newest.ok_or(error)?
        }
        Err(error) => return Err(error),
    };
    let Superblock { disk, cluster, geometry, .. } = superblock;
    let mut scan = Scan {
        device,
        disk,
        geometry,
        slots: Vec::new(),
        slots_unreadable: 0,
        volumes: Vec::new(),
        pages: Vec::new(),
    };
    scan.slot_table().await?;
    scan.volume_table().await?;
    let Scan { slots, slots_unreadable, volumes, pages, .. } = scan;
    find_contradictions(&geometry, &slots, &volumes, &mut contradictions);
    let (_, catalog) = catalog::load(device, disk, &geometry).await;
    let superblock = SuperblockInfo { disk, cluster, geometry };
    Ok(Inspection { superblock, slots, slots_unreadable, volumes, catalog, pages, contradictions })
}

fn find_contradictions(
    geometry: &Geometry,
    slots: &[(u32, ShardRecord)],
    volumes: &[VolumeFence],
    contradictions: &mut Vec<String>,
) {
    let mut seen = BTreeMap::new();
    for (slot, record) in slots {
        if record.blocks > geometry.slot_blocks() {
            contradictions.push(format!("slot {slot}: length beyond the slot"));
        }
        let key = (record.spec.volume, record.spec.segment);
        if let Some(other) = seen.insert(key, slot) {
            contradictions.push(format!("slots {other} and {slot} hold the same shard"));
        }
    }
    let mut seen = BTreeSet::new();
    for fence in volumes {
        if !seen.insert(fence.volume) {
            contradictions.push(format!("volume {} has two pages", fence.volume));
        }
    }
}

/// Tables as far as they were read.
struct Scan<'a> {
    device: &'a dyn BlockDevice,
    disk: DiskId,
    geometry: Geometry,
    slots: Vec<(u32, ShardRecord)>,
    slots_unreadable: u32,
    volumes: Vec<VolumeFence>,
    pages: Vec<PageFinding>,
}

impl Scan<'_> {
    async fn slot_table(&mut self) -> Result<(), DiskOpenError> {
        let geometry = self.geometry;
        let per_page = u32::try_from(ENTRIES_PER_PAGE).expect("a small constant");
        let offset = |page, copy| geometry.slot_page_offset(page, copy);
        self.table(
            "slot",
            geometry.slot_pages(),
            offset,
            |scan, number, page: Option<&SlotPage>| {
                let slots = number * per_page..((number + 1) * per_page).min(geometry.slots);
                let count = slots.end - slots.start;
                let decode = |page: &SlotPage| -> Result<Vec<_>, PageFault> {
                    let entries = slots.zip(&page.entries);
                    entries.map(|(slot, entry)| Ok((slot, ShardRecord::decode(entry)?))).collect()
                };
                match page.map(decode) {
                    Some(Ok(found)) => {
                        let used = found.into_iter();
                        scan.slots.extend(used.filter_map(|(slot, record)| Some((slot, record?))));
                        Ok(())
                    }
                    undecoded => {
                        scan.slots_unreadable += count;
                        undecoded.map_or(Ok(()), |result| result.map(drop))
                    }
                }
            },
        )
        .await
    }

    async fn volume_table(&mut self) -> Result<(), DiskOpenError> {
        let geometry = self.geometry;
        let offset = |page, copy| geometry.volume_page_offset(page, copy);
        self.table("volume", geometry.volumes_max, offset, |scan, _, page: Option<&VolumePage>| {
            let Some(page) = page else { return Ok(()) };
            if let Some(record) = VolumeRecord::decode(page)? {
                let VolumeRecord { volume, epoch, head, mirror } = record;
                scan.volumes.push(VolumeFence { volume, epoch, head, mirror });
            }
            Ok(())
        })
        .await
    }

    /// Gives the copy that counts of each page to `take` (none: neither does), and notes pages
    /// that are not as they should be.
    async fn table<P: Page>(
        &mut self,
        table: &'static str,
        pages: u32,
        offset_of: impl Fn(u32, u32) -> u64,
        mut take: impl FnMut(&mut Self, u32, Option<&P>) -> Result<(), PageFault>,
    ) -> Result<(), DiskOpenError> {
        let mut first = 0;
        while first < pages {
            let count = ((pages - first) as usize).min(CHUNK_BYTES / BLOCK_SIZE);
            let copies = [
                read_pages(self.device, offset_of(first, 0), count).await?,
                read_pages(self.device, offset_of(first, 1), count).await?,
            ];
            for (number, pair) in (first..).zip(copies[0].iter().zip(&copies[1])) {
                let disk = self.disk;
                let decode = |copy: &'_ Option<Bytes>| -> Result<u64, String> {
                    let bytes = copy.as_ref().ok_or("it cannot be read")?;
                    let page = decode_page::<P>(bytes, disk, number.into());
                    page.map(|p| p.header().sequence.get()).map_err(|fault| fault.to_string())
                };
                let mut copies = [decode(pair.0), decode(pair.1)];
                let sequences = [&copies[0], &copies[1]].map(|copy| copy.as_ref().ok().copied());
                let counts = newer_copy(sequences);
                let bytes = counts.and_then(|i| if i == 0 { pair.0 } else { pair.1 }.as_ref());
                let page = bytes.and_then(|b| decode_page::<P>(b, disk, number.into()).ok());
                let mut damaged = page.is_none();
                if let Err(fault) = take(self, number, page) {
                    damaged = true;
                    copies[counts.unwrap_or(0)] = Err(fault.to_string());
                }
                if damaged || sequences[0] != sequences[1] {
                    self.pages.push(PageFinding { table, page: number, copies, damaged });
                }
            }
            first += u32::try_from(count).expect("a chunk has few pages");
        }
        Ok(())
    }
}

impl Inspection {
    /// The shard of a segment, to read from; the first, if there are contradictions.
    pub fn shard<'a>(
        &self,
        device: &'a dyn BlockDevice,
        volume: VolumeId,
        segment: SegmentId,
    ) -> Option<ShardReader<'a>> {
        let SuperblockInfo { disk, geometry, .. } = self.superblock;
        let is_it = |r: &ShardRecord| r.spec.volume == volume && r.spec.segment == segment;
        let (slot, record) = self.slots.iter().find(|(_, record)| is_it(record))?;
        Some(ShardReader { device, disk, geometry, slot: *slot, record: record.clone() })
    }
}

/// Reads one shard of an inspected disk.
pub struct ShardReader<'a> {
    device: &'a dyn BlockDevice,
    disk: DiskId,
    geometry: Geometry,
    slot: u32,
    record: ShardRecord,
}

impl ShardReader<'_> {
    /// The slot that holds the shard.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// What its entry says.
    pub fn record(&self) -> &ShardRecord {
        &self.record
    }

    /// Blocks that may hold something of the shard: its sealed length, or those of the slot.
    pub fn blocks_max(&self) -> u32 {
        match self.record.state {
            ShardState::Sealed => self.record.blocks.min(self.geometry.slot_blocks()),
            _ => self.geometry.slot_blocks(),
        }
    }

    /// Blocks of the shard as they lie there; `block + count` must be within the slot.
    ///
    /// # Errors
    /// Those of the device.
    pub async fn read(&self, block: u32, count: u32) -> Result<Bytes, DeviceError> {
        let offset = self.geometry.block_offset(self.slot, block);
        let buf = AlignedBuf::new(count as usize * BLOCK_SIZE);
        self.device.read(offset, buf).await.map(AlignedBuf::freeze)
    }

    /// The stored (salted) checksum of each block of a sealed shard, none where it is unreadable,
    /// and a sentence for each page that does not count. Nothing for a shard that is not sealed.
    pub async fn checksums(&self) -> (Vec<Option<u32>>, Vec<String>) {
        let (mut crcs, mut faults) = (Vec::new(), Vec::new());
        if self.record.state != ShardState::Sealed {
            return (crcs, faults);
        }
        let tenant = Tenant::new(&self.record.spec, self.record.blocks);
        let blocks = self.blocks_max() as usize;
        let mut number = self.geometry.checksum_page(self.slot);
        while crcs.len() < blocks {
            let offset = self.geometry.checksum_page_offset(number);
            let read = self.device.read(offset, AlignedBuf::new(BLOCK_SIZE)).await;
            let decoded = read
                .map_err(|error| error.to_string())
                .and_then(|buf| checksums::decode(&buf, self.disk, number, &tenant));
            match decoded {
                Ok(page) => crcs.extend(page.into_iter().map(Some)),
                Err(reason) => {
                    faults.push(format!("checksum page {number}: {reason}"));
                    crcs.resize(crcs.len() + crate::disk::format::CRCS_PER_PAGE, None);
                }
            }
            number += 1;
        }
        crcs.truncate(blocks);
        (crcs, faults)
    }
}
