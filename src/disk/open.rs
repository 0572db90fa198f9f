//! Formatting, probing and opening a disk.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use tokio::sync::{Mutex, Notify};

use crate::buffer::AlignedBuf;
use crate::disk::device::{BlockDevice, DeviceError};
use crate::disk::format::{
    ENTRIES_PER_PAGE, Page, PageFault, ShardRecord, SlotPage, Superblock, VolumePage, VolumeRecord,
    decode_page, encode_page,
};
use crate::disk::geometry::{Geometry, GeometryError, SUPERBLOCK_OFFSETS};
use crate::disk::stats::add;
use crate::disk::tables::Tables;
use crate::disk::{Disk, DiskStats, catalog, checksums};
use crate::id::{BLOCK_BYTES, BLOCK_SIZE, ClusterId, DiskId};
use crate::shard::Catalog;

/// Bytes at the start of a device that must be zero for it to count as blank.
const BLANK_BYTES: u64 = 1 << 20;
/// Bytes of tables read or written at once.
pub(super) const CHUNK_BYTES: usize = 1 << 20;

/// Why a disk was not opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DiskOpenError {
    /// The device is blank.
    #[error("the device is blank: format it first")]
    NotFormatted,
    /// The device carries something else.
    #[error("the device carries something that is not ours")]
    Foreign,
    /// A newer version of the software wrote it.
    #[error("the disk has format version {0}, which is newer than this software knows")]
    NewerVersion(u32),
    /// Formatting was interrupted: format again, nothing is on it.
    #[error("formatting of the disk was interrupted: format it again")]
    HalfFormatted,
    /// The device is shorter than the disk was when it was formatted.
    #[error("the device has {actual} bytes, but the disk was formatted with {expected}")]
    TooShort {
        /// Bytes of the disk.
        expected: u64,
        /// Bytes of the device.
        actual: u64,
    },
    /// Both copies of the superblock are unreadable.
    #[error("both superblocks are damaged: {0}")]
    SuperblockDamaged(String),
    /// The device failed.
    #[error("the device failed: {0}")]
    Device(#[from] DeviceError),
    /// The tables are valid but contradict each other: a defect, or two writers.
    #[error("the tables contradict each other: {0}")]
    Inconsistent(String),
}

/// Why a disk was not formatted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DiskFormatError {
    /// It is a disk of ours already.
    #[error("the device is disk {0} already")]
    Formatted(DiskId),
    /// It carries something; formatting needs force.
    #[error("the device is not blank: {0}")]
    NotBlank(DiskOpenError),
    /// No geometry fits.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// The device failed.
    #[error("the device failed: {0}")]
    Device(#[from] DeviceError),
}

/// How to format a disk.
#[derive(Debug, Clone, Copy)]
pub struct FormatOptions {
    /// Its identity from now on: random, never used before.
    pub disk: DiskId,
    /// The cluster it is for.
    pub cluster: ClusterId,
    /// Size of a slot in bytes; none to choose by the size of the device.
    pub slot_bytes: Option<u64>,
    /// Volumes to provide for; none to choose by the size of the device.
    pub volumes_max: Option<u32>,
    /// Format even if the device carries something.
    pub force: bool,
}

/// Identity of a disk as its superblock tells it, without opening it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SuperblockInfo {
    /// The disk.
    pub disk: DiskId,
    /// The cluster it was formatted for.
    pub cluster: ClusterId,
    /// Where everything lies.
    pub geometry: Geometry,
}

/// Reads the superblock: who is this disk? Two reads; used to notice one identity on two devices.
pub async fn probe_superblock(device: &dyn BlockDevice) -> Result<SuperblockInfo, DiskOpenError> {
    let (superblock, _) = read_superblock(device).await?;
    let Superblock { disk, cluster, geometry, .. } = superblock;
    Ok(SuperblockInfo { disk, cluster, geometry })
}

/// Writes one superblock anew, as it is: whether the device can still be written to. Whoever has
/// the disk open may ask.
///
/// # Errors
/// [`DiskOpenError`] of reading the superblock; [`DiskOpenError::Device`] if it cannot be written.
pub async fn trial_write(device: &dyn BlockDevice) -> Result<(), DiskOpenError> {
    let (superblock, _) = read_superblock(device).await?;
    Ok(write_superblocks(device, &superblock, [false, true]).await?)
}

pub(super) type CopyFault = Result<PageFault, DeviceError>;

pub(super) async fn read_copy(
    device: &dyn BlockDevice,
    offset: u64,
) -> Result<Superblock, CopyFault> {
    let buf = device.read(offset, AlignedBuf::new(BLOCK_SIZE)).await.map_err(Err)?;
    Superblock::decode(&buf).map_err(Ok)
}

/// The valid superblock, and which copies are not up to date with it.
pub(super) async fn read_superblock(
    device: &dyn BlockDevice,
) -> Result<(Superblock, [bool; 2]), DiskOpenError> {
    if device.size() < SUPERBLOCK_OFFSETS[1] + BLOCK_BYTES {
        if let Ok(first) = read_copy(device, SUPERBLOCK_OFFSETS[0]).await {
            let (expected, actual) = (first.geometry.size_bytes, device.size());
            return Err(DiskOpenError::TooShort { expected, actual });
        }
        return Err(blank_or(device, DiskOpenError::Foreign).await?);
    }
    let [first, second] = SUPERBLOCK_OFFSETS;
    let copies = [read_copy(device, first).await, read_copy(device, second).await];
    for copy in &copies {
        if let Err(Ok(PageFault::Newer(version))) = copy {
            return Err(DiskOpenError::NewerVersion(*version));
        }
    }
    let newest = copies.iter().flatten().max_by_key(|superblock| superblock.sequence).cloned();
    let Some(superblock) = newest else {
        return Err(no_superblock(device, copies).await?);
    };
    if !superblock.complete {
        return Err(DiskOpenError::HalfFormatted);
    }
    let expected = superblock.geometry.size_bytes;
    if device.size() < expected {
        return Err(DiskOpenError::TooShort { expected, actual: device.size() });
    }
    let stale = copies.map(|copy| copy.as_ref() != Ok(&superblock));
    Ok((superblock, stale))
}

async fn no_superblock(
    device: &dyn BlockDevice,
    copies: [Result<Superblock, CopyFault>; 2],
) -> Result<DiskOpenError, DiskOpenError> {
    let faults = copies.map(Result::err);
    if faults.iter().all(|fault| *fault == Some(Ok(PageFault::Magic))) {
        return blank_or(device, DiskOpenError::Foreign).await;
    }
    for fault in &faults {
        if let Some(Err(error)) = fault
            && *error == DeviceError::Gone
        {
            return Ok(DiskOpenError::Device(error.clone()));
        }
    }
    let texts = faults.into_iter().flatten().map(|fault| match fault {
        Ok(fault) => fault.to_string(),
        Err(error) => error.to_string(),
    });
    Ok(DiskOpenError::SuperblockDamaged(texts.collect::<Vec<_>>().join("; ")))
}

/// [`DiskOpenError::NotFormatted`] if the device begins with zeroes only, else `otherwise`.
async fn blank_or(
    device: &dyn BlockDevice,
    otherwise: DiskOpenError,
) -> Result<DiskOpenError, DiskOpenError> {
    let bytes = device.size().min(BLANK_BYTES) / BLOCK_BYTES * BLOCK_BYTES;
    let bytes = usize::try_from(bytes).unwrap_or(0);
    if bytes == 0 {
        return Ok(DiskOpenError::NotFormatted);
    }
    let buf = device.read(0, AlignedBuf::new(bytes)).await?;
    let blank = buf.iter().all(|byte| *byte == 0);
    Ok(if blank { DiskOpenError::NotFormatted } else { otherwise })
}

impl Disk {
    /// Writes an empty disk onto the device. Refuses a device that carries anything (but a format
    /// that was interrupted) unless forced. The superblocks say "complete" only when everything
    /// else is durable.
    pub async fn format(
        device: &dyn BlockDevice,
        options: FormatOptions,
    ) -> Result<(), DiskFormatError> {
        let FormatOptions { disk, cluster, slot_bytes, volumes_max, force } = options;
        let geometry = Geometry::plan_with(device.size(), slot_bytes, volumes_max)?;
        if !force {
            check_blank(device).await?;
        }
        let mut sequence = 0;
        for offset in SUPERBLOCK_OFFSETS {
            if let Ok(old) = read_copy(device, offset).await {
                sequence = sequence.max(old.sequence);
            }
        }
        sequence += 1;
        let mut superblock = Superblock { disk, cluster, complete: false, sequence, geometry };
        write_superblocks(device, &superblock, [true; 2]).await?;
        for copy in 0..2 {
            let (slots, volumes) =
                (geometry.slot_page_offset(0, copy), geometry.volume_page_offset(0, copy));
            write_empty::<SlotPage>(device, disk, slots, geometry.slot_pages()).await?;
            write_empty::<VolumePage>(device, disk, volumes, geometry.volumes_max).await?;
            let area = catalog::encode(disk, 1, &Catalog::default()).freeze();
            device.write(geometry.catalog_offset(copy), Rc::from([area]), false).await?;
        }
        device.flush().await?;
        superblock.complete = true;
        superblock.sequence += 1;
        write_superblocks(device, &superblock, [true; 2]).await?;
        Ok(())
    }

    /// Opens a formatted disk: reads its tables, mends copies of pages that a crash or the medium
    /// damaged, and closes all open shards. Bounded by the geometry: about 200 bytes a slot and
    /// 4 KiB a volume.
    pub async fn open(device: Rc<dyn BlockDevice>) -> Result<Rc<Self>, DiskOpenError> {
        let (superblock, stale) = read_superblock(&*device).await?;
        write_superblocks(&*device, &superblock, stale).await?;
        let Superblock { disk: id, cluster, geometry, .. } = superblock;
        let stats = DiskStats::default();
        let mut tables = Tables::new(id, geometry);
        load_slots(&*device, &mut tables, &stats).await?;
        load_volumes(&*device, &mut tables, &stats).await?;
        let (sequence, catalog) = catalog::load(&*device, id, &geometry).await;
        if catalog.is_err() {
            add(&stats.damaged_pages, 1);
        }
        let disk = Rc::new(Self {
            device,
            id,
            cluster,
            geometry,
            tables: RefCell::new(tables),
            commits: RefCell::new(BTreeMap::new()),
            checksums: RefCell::new(checksums::Cache::default()),
            catalog: RefCell::new(catalog),
            catalog_write: Mutex::new(sequence),
            offline: RefCell::new(None),
            writes_in_flight: Cell::new(0),
            writes_ended: Notify::new(),
            stats,
            exercise: RefCell::default(),
        });
        disk.check().map_err(DiskOpenError::Inconsistent)?;
        Ok(disk)
    }
}

async fn check_blank(device: &dyn BlockDevice) -> Result<(), DiskFormatError> {
    match probe_superblock(device).await {
        Ok(info) => Err(DiskFormatError::Formatted(info.disk)),
        Err(DiskOpenError::NotFormatted | DiskOpenError::HalfFormatted) => Ok(()),
        Err(DiskOpenError::Device(error)) => Err(error.into()),
        Err(other) => Err(DiskFormatError::NotBlank(other)),
    }
}

async fn write_superblocks(
    device: &dyn BlockDevice,
    superblock: &Superblock,
    which: [bool; 2],
) -> Result<(), DeviceError> {
    for (offset, wanted) in SUPERBLOCK_OFFSETS.into_iter().zip(which) {
        if wanted {
            let page = superblock.encode().freeze();
            device.write(offset, Rc::from([page]), true).await?;
        }
    }
    Ok(())
}

async fn write_empty<P: Page>(
    device: &dyn BlockDevice,
    disk: DiskId,
    mut offset: u64,
    pages: u32,
) -> Result<(), DeviceError> {
    let mut first = 0;
    while first < u64::from(pages) {
        let left = usize::try_from(u64::from(pages) - first).unwrap_or(usize::MAX);
        let count = left.min(CHUNK_BYTES / BLOCK_SIZE);
        let mut buf = AlignedBuf::new(count * BLOCK_SIZE);
        for (index, page) in (first..).zip(buf.chunks_exact_mut(BLOCK_SIZE)) {
            encode_page(page, disk, index, 1, |_: &mut P| {});
        }
        let bytes = buf.len() as u64;
        device.write(offset, Rc::from([buf.freeze()]), false).await?;
        offset += bytes;
        first += count as u64;
    }
    Ok(())
}

/// One copy of `count` pages. Where the device cannot read all at once, each page is read by
/// itself, and one that cannot be read is none.
pub(super) async fn read_pages(
    device: &dyn BlockDevice,
    offset: u64,
    count: usize,
) -> Result<Vec<Option<Bytes>>, DeviceError> {
    let whole = device.read(offset, AlignedBuf::new(count * BLOCK_SIZE)).await;
    if let Ok(buf) = whole {
        let buf = buf.freeze();
        return Ok((0..count)
            .map(|n| Some(buf.slice(n * BLOCK_SIZE..(n + 1) * BLOCK_SIZE)))
            .collect());
    }
    let mut pages = Vec::with_capacity(count);
    for number in 0..count {
        let offset = offset + (number * BLOCK_SIZE) as u64;
        match device.read(offset, AlignedBuf::new(BLOCK_SIZE)).await {
            Ok(buf) => pages.push(Some(buf.freeze())),
            Err(DeviceError::Gone) => return Err(DeviceError::Gone),
            Err(_) => pages.push(None),
        }
    }
    Ok(pages)
}

/// Which of two copies of a page counts, by the sequences of those that are valid.
pub fn newer_copy(sequences: [Option<u64>; 2]) -> Option<usize> {
    let [first, second] = sequences;
    first.max(second).map(|_| usize::from(second > first))
}

/// Reads both copies of a table, gives the newer valid copy of each page (or none) to `load` in
/// order, and rewrites the other copy where it is not as new.
async fn load_table<P: Page>(
    device: &dyn BlockDevice,
    disk: DiskId,
    stats: &DiskStats,
    pages: u32,
    offset_of: impl Fn(u32, u32) -> u64,
    mut load: impl FnMut(u32, Option<&P>) -> Result<bool, DiskOpenError>,
) -> Result<(), DiskOpenError> {
    let mut first = 0;
    while first < pages {
        let left = (pages - first) as usize;
        let count = left.min(CHUNK_BYTES / BLOCK_SIZE);
        let copies = [
            read_pages(device, offset_of(first, 0), count).await?,
            read_pages(device, offset_of(first, 1), count).await?,
        ];
        for (index, (a, b)) in (first..).zip(copies[0].iter().zip(&copies[1])) {
            let valid = |copy: &Option<Bytes>| -> Option<u64> {
                let page = decode_page::<P>(copy.as_ref()?, disk, index.into()).ok()?;
                Some(page.header().sequence.get())
            };
            let sequences = [valid(a), valid(b)];
            let (best, other) = if newer_copy(sequences) == Some(1) { (b, 0) } else { (a, 1) };
            let best = best.as_ref().filter(|_| newer_copy(sequences).is_some());
            let page = best.and_then(|bytes| decode_page::<P>(bytes, disk, index.into()).ok());
            if !load(index, page)? {
                add(&stats.damaged_pages, 1);
            } else if sequences[0] != sequences[1]
                && let Some(best) = best
            {
                let page = AlignedBuf::copy_of(best).freeze();
                device.write(offset_of(index, other), Rc::from([page]), true).await?;
                add(&stats.repaired_pages, 1);
            }
        }
        first += u32::try_from(count).expect("a chunk has few pages");
    }
    Ok(())
}

async fn load_slots(
    device: &dyn BlockDevice,
    tables: &mut Tables,
    stats: &DiskStats,
) -> Result<(), DiskOpenError> {
    let (disk, geometry) = (tables.disk, tables.geometry);
    let offset = |page, copy| geometry.slot_page_offset(page, copy);
    load_table(device, disk, stats, geometry.slot_pages(), offset, |_, page: Option<&SlotPage>| {
        let left = geometry.slots as usize - tables.slots.len();
        let count = left.min(ENTRIES_PER_PAGE);
        let records: Option<Vec<_>> = page.and_then(|page| {
            let entries = page.entries.iter().take(count);
            entries.map(ShardRecord::decode).collect::<Result<_, _>>().ok()
        });
        tables.slot_sequences.push(page.map_or(0, |page| page.header.sequence.get()));
        let Some(records) = records else {
            tables.load_damaged_slots(count);
            return Ok(false);
        };
        for record in records {
            tables.load_slot(record).map_err(DiskOpenError::Inconsistent)?;
        }
        Ok(true)
    })
    .await
}

async fn load_volumes(
    device: &dyn BlockDevice,
    tables: &mut Tables,
    stats: &DiskStats,
) -> Result<(), DiskOpenError> {
    let (disk, geometry) = (tables.disk, tables.geometry);
    let offset = |page, copy| geometry.volume_page_offset(page, copy);
    let pages = geometry.volumes_max;
    load_table(device, disk, stats, pages, offset, |index, page: Option<&VolumePage>| {
        let record = page.ok_or(()).and_then(|page| VolumeRecord::decode(page).map_err(drop));
        let valid = record.is_ok();
        tables.volume_sequences.push(page.map_or(0, |page| page.header.sequence.get()));
        tables.load_volume(index, record).map_err(DiskOpenError::Inconsistent)?;
        Ok(valid)
    })
    .await
}
