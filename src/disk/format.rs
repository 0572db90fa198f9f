//! Every byte of a disk but the content of its slots, declared once.
//!
//! All structures are pages of 4 KiB, little-endian, and open with a [`PageHeader`] whose magic,
//! version and CRC have the same place in every version of the format. A page names the disk and
//! its own place in its table, so that a misdirected write or a page of an earlier format of the
//! disk never verifies. The decoders here trust nothing: a page that is not right in every field
//! is an error.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::buffer::AlignedBuf;
use crate::disk::geometry::Geometry;
use crate::id::{BLOCK_SIZE, ClusterId, DiskId, Epoch, HeadId, SegmentId, VolumeId};
use crate::limits::{
    DATA_SHARDS_MAX, PARITY_SHARDS_MAX, SEGMENT_ID_BITS, SHARDS_MAX, SLOT_BYTES_MAX,
};
use crate::shard::{
    CATALOG_BYTES_MAX, MIRROR_BYTES_MAX, Mirror, Scheme, SegmentKind, ShardSpec, ShardState,
};

/// Version of the format that this code writes.
pub const VERSION: u32 = 1;
/// Slot entries in a page of the slot table.
pub const ENTRIES_PER_PAGE: usize = 8;
/// Checksums in a checksum page.
pub const CRCS_PER_PAGE: usize = 992;
/// Bytes of one copy of the catalog: a page that describes it, and the data.
pub const CATALOG_AREA_BYTES: usize = BLOCK_SIZE + CATALOG_BYTES_MAX;

/// First bytes of every page. Its first 16 bytes are the same in all versions.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct PageHeader {
    /// Kind of the page.
    pub magic: [u8; 8],
    /// [`VERSION`] of the writer.
    pub version: U32,
    /// CRC-32 of the page with this field zero.
    pub crc: U32,
    /// The disk.
    pub disk: [u8; 16],
    /// Place of the page in its table.
    pub index: U64,
    /// Number of the write; of two copies the higher counts.
    pub sequence: U64,
    /// Zero.
    pub reserved: [u8; 16],
}

/// The first page of a disk.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SuperblockPage {
    /// Magic `sdsSUPER`, index 0.
    pub header: PageHeader,
    /// The cluster that formatted the disk.
    pub cluster: [u8; 16],
    /// 1 while formatting is under way, 2 when it was finished.
    pub state: U32,
    /// [`Geometry::slots`].
    pub slots: U32,
    /// [`Geometry::volumes_max`].
    pub volumes_max: U32,
    /// Zero.
    pub reserved: U32,
    /// [`Geometry::size_bytes`].
    pub size_bytes: U64,
    /// [`Geometry::slot_bytes`].
    pub slot_bytes: U64,
    /// [`Geometry::slot_table`].
    pub slot_table: U64,
    /// [`Geometry::volume_table`].
    pub volume_table: U64,
    /// [`Geometry::catalog`].
    pub catalog: U64,
    /// [`Geometry::checksums`].
    pub checksums: U64,
    /// [`Geometry::data`].
    pub data: U64,
    /// Zero.
    pub padding: [u8; 3944],
}

/// What a slot holds.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SlotEntry {
    /// The volume.
    pub volume: [u8; 16],
    /// The segment.
    pub segment: U64,
    /// [`ShardSpec::creation`].
    pub creation: U64,
    /// Epoch that created it.
    pub epoch: U64,
    /// Length in blocks if sealed, else zero.
    pub blocks: U32,
    /// 0 free, else a [`ShardState`].
    pub state: u8,
    /// [`SegmentKind`].
    pub kind: u8,
    /// [`Scheme::data`].
    pub data: u8,
    /// [`Scheme::parity`].
    pub parity: u8,
    /// [`ShardSpec::index`].
    pub index: u8,
    /// Zero.
    pub reserved: [u8; 7],
    /// The write set; zero beyond the width of the scheme.
    pub members: [[u8; 16]; SHARDS_MAX],
    /// Zero.
    pub padding: [u8; 128],
}

/// A page of the slot table.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SlotPage {
    /// Magic `sdsSLOTS`.
    pub header: PageHeader,
    /// Slots `8 × index` and on.
    pub entries: [SlotEntry; ENTRIES_PER_PAGE],
}

/// A page of the volume table: one volume's fence and root mirror.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct VolumePage {
    /// Magic `sdsVOLUM`.
    pub header: PageHeader,
    /// The volume; nil if the page is free.
    pub volume: [u8; 16],
    /// Lowest epoch accepted.
    pub epoch: U64,
    /// The head of that epoch.
    pub head: [u8; 16],
    /// Epoch of the mirror's revision.
    pub mirror_epoch: U64,
    /// Sequence of the mirror's revision.
    pub mirror_sequence: U64,
    /// Length of the mirror in bytes.
    pub mirror_bytes: U32,
    /// 1 if there is a mirror.
    pub mirror_present: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// The mirror, zero beyond its length.
    pub mirror: [u8; MIRROR_BYTES_MAX],
    /// Zero.
    pub padding: [u8; 128],
}

/// Checksums of blocks of one sealed shard.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChecksumPage {
    /// Magic `sdsCHECK`.
    pub header: PageHeader,
    /// Volume of the shard.
    pub volume: [u8; 16],
    /// Its segment.
    pub segment: U64,
    /// Its creation.
    pub creation: U64,
    /// Sealed length in blocks.
    pub blocks: U32,
    /// Zero.
    pub reserved: [u8; 28],
    /// CRCs of the blocks that this page covers, zero beyond the sealed length.
    pub crcs: [U32; CRCS_PER_PAGE],
}

/// First page of a catalog area; the data follows it.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct CatalogPage {
    /// Magic `sdsCATLG`, index 0.
    pub header: PageHeader,
    /// Revision of the store.
    pub revision: U64,
    /// Its incarnation.
    pub incarnation: U32,
    /// Length of the data.
    pub bytes: U32,
    /// CRC-32 of the data.
    pub data_crc: U32,
    /// Zero.
    pub padding: [u8; 4012],
}

const _: () = assert!(size_of::<PageHeader>() == 64);
const _: () = assert!(size_of::<SlotEntry>() == 504);
const _: () = assert!(size_of::<SuperblockPage>() == BLOCK_SIZE);
const _: () = assert!(size_of::<SlotPage>() == BLOCK_SIZE);
const _: () = assert!(size_of::<VolumePage>() == BLOCK_SIZE);
const _: () = assert!(size_of::<ChecksumPage>() == BLOCK_SIZE);
const _: () = assert!(size_of::<CatalogPage>() == BLOCK_SIZE);
const _: () = assert!(CATALOG_AREA_BYTES.is_multiple_of(BLOCK_SIZE));

/// Why a page does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageFault {
    /// It does not begin with the magic of its kind.
    #[error("wrong magic")]
    Magic,
    /// Its checksum does not match.
    #[error("wrong checksum")]
    Checksum,
    /// It was written by a newer version, given here.
    #[error("written in format version {0}, newer than {VERSION}")]
    Newer(u32),
    /// It belongs to another disk or another place.
    #[error("belongs to another place")]
    Misplaced,
    /// A field makes no sense.
    #[error("{0}")]
    Content(&'static str),
}

/// A structure of one page.
pub trait Page: FromBytes + IntoBytes + Immutable + KnownLayout + Unaligned {
    /// Magic of this kind of page.
    const MAGIC: [u8; 8];
    /// Its header.
    fn header(&self) -> &PageHeader;
    /// Its header, to be written.
    fn header_mut(&mut self) -> &mut PageHeader;
}

macro_rules! page {
    ($name:ident, $magic:literal) => {
        impl Page for $name {
            const MAGIC: [u8; 8] = *$magic;
            fn header(&self) -> &PageHeader {
                &self.header
            }
            fn header_mut(&mut self) -> &mut PageHeader {
                &mut self.header
            }
        }
    };
}
page!(SuperblockPage, b"sdsSUPER");
page!(SlotPage, b"sdsSLOTS");
page!(VolumePage, b"sdsVOLUM");
page!(ChecksumPage, b"sdsCHECK");
page!(CatalogPage, b"sdsCATLG");

fn page_crc(page: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&page[..12]);
    hasher.update(&[0; 4]);
    hasher.update(&page[16..]);
    hasher.finalize()
}

/// Zeroes `buf` (4 KiB), lets `fill` write the page's fields, then completes header and CRC.
pub fn encode_page<P: Page>(
    buf: &mut [u8],
    disk: DiskId,
    index: u64,
    sequence: u64,
    fill: impl FnOnce(&mut P),
) {
    buf.fill(0);
    let page = P::mut_from_bytes(buf).expect("a buffer of one page");
    fill(page);
    let header = page.header_mut();
    header.magic = P::MAGIC;
    header.version = VERSION.into();
    header.disk = disk.to_bytes();
    header.index = index.into();
    header.sequence = sequence.into();
    header.crc = 0.into();
    let crc = page_crc(buf);
    buf[12..16].copy_from_slice(&crc.to_le_bytes());
}

/// The page in `buf`, if magic, CRC and version are right. Whose it is, is not checked.
pub fn decode_any<P: Page>(buf: &[u8]) -> Result<&P, PageFault> {
    let page = P::ref_from_bytes(buf).map_err(|_| PageFault::Content("not one page"))?;
    let header = page.header();
    if header.magic != P::MAGIC {
        return Err(PageFault::Magic);
    }
    if header.crc.get() != page_crc(buf) {
        return Err(PageFault::Checksum);
    }
    match header.version.get() {
        VERSION => Ok(page),
        0 => Err(PageFault::Content("version 0")),
        newer => Err(PageFault::Newer(newer)),
    }
}

/// The page in `buf`, if it is valid and belongs to this place of this disk.
pub fn decode_page<P: Page>(buf: &[u8], disk: DiskId, index: u64) -> Result<&P, PageFault> {
    let page = decode_any::<P>(buf)?;
    let header = page.header();
    if header.disk != disk.to_bytes() || header.index.get() != index {
        return Err(PageFault::Misplaced);
    }
    Ok(page)
}

/// What a superblock says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// The disk.
    pub disk: DiskId,
    /// The cluster that formatted it.
    pub cluster: ClusterId,
    /// Whether formatting was finished.
    pub complete: bool,
    /// Number of the write; the higher of two counts.
    pub sequence: u64,
    /// Where everything lies.
    pub geometry: Geometry,
}

impl Superblock {
    /// The page to write.
    pub fn encode(&self) -> AlignedBuf {
        let mut buf = AlignedBuf::new(BLOCK_SIZE);
        let g = &self.geometry;
        encode_page(&mut buf, self.disk, 0, self.sequence, |page: &mut SuperblockPage| {
            page.cluster = self.cluster.to_bytes();
            page.state = if self.complete { 2 } else { 1 }.into();
            page.slots = g.slots.into();
            page.volumes_max = g.volumes_max.into();
            page.size_bytes = g.size_bytes.into();
            page.slot_bytes = g.slot_bytes.into();
            page.slot_table = g.slot_table.into();
            page.volume_table = g.volume_table.into();
            page.catalog = g.catalog.into();
            page.checksums = g.checksums.into();
            page.data = g.data.into();
        });
        buf
    }

    /// The superblock in a page.
    pub fn decode(buf: &[u8]) -> Result<Self, PageFault> {
        let page = decode_any::<SuperblockPage>(buf)?;
        let complete = match page.state.get() {
            1 => false,
            2 => true,
            _ => return Err(PageFault::Content("unknown state of the superblock")),
        };
        let (size, slot) = (page.size_bytes.get(), page.slot_bytes.get());
        let geometry = Geometry::lay_out(size, slot, page.volumes_max.get())
            .map_err(|_| PageFault::Content("impossible geometry"))?;
        let stored = Geometry {
            size_bytes: size,
            slot_bytes: slot,
            slots: page.slots.get(),
            volumes_max: page.volumes_max.get(),
            slot_table: page.slot_table.get(),
            volume_table: page.volume_table.get(),
            catalog: page.catalog.get(),
            checksums: page.checksums.get(),
            data: page.data.get(),
        };
        if stored != geometry {
            return Err(PageFault::Content("the geometry contradicts itself"));
        }
        Ok(Self {
            disk: DiskId::from_bytes(page.header.disk),
            cluster: ClusterId::from_bytes(page.cluster),
            complete,
            sequence: page.header.sequence.get(),
            geometry,
        })
    }
}

/// What the slot table says of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardRecord {
    /// As created.
    pub spec: ShardSpec,
    /// Epoch that created it.
    pub epoch: Epoch,
    /// Its state.
    pub state: ShardState,
    /// Sealed length in blocks; 0 unless sealed.
    pub blocks: u32,
}

impl ShardRecord {
    /// Writes the record into a zeroed entry. The spec must be valid (see [`check_spec`]).
    pub fn encode(&self, entry: &mut SlotEntry) {
        let spec = &self.spec;
        entry.volume = spec.volume.to_bytes();
        entry.segment = spec.segment.0.into();
        entry.creation = spec.creation.into();
        entry.epoch = self.epoch.0.into();
        entry.blocks = self.blocks.into();
        entry.state = self.state as u8;
        entry.kind = spec.kind as u8;
        entry.data = spec.scheme.data;
        entry.parity = spec.scheme.parity;
        entry.index = spec.index;
        for (slot, member) in entry.members.iter_mut().zip(&spec.members) {
            *slot = member.to_bytes();
        }
    }

    /// The record in an entry; none if the slot is free.
    pub fn decode(entry: &SlotEntry) -> Result<Option<Self>, PageFault> {
        let state = match entry.state {
            0 => return Ok(None),
            1 => ShardState::Open,
            2 => ShardState::Closed,
            3 => ShardState::Sealed,
            _ => return Err(PageFault::Content("unknown state of a shard")),
        };
        let kind = match entry.kind {
            1 => SegmentKind::Log,
            2 => SegmentKind::Data,
            3 => SegmentKind::Meta,
            _ => return Err(PageFault::Content("unknown kind of segment")),
        };
        let scheme = Scheme { data: entry.data, parity: entry.parity };
        let members = entry.members.iter().take(scheme.width());
        let spec = ShardSpec {
            volume: VolumeId::from_bytes(entry.volume),
            segment: SegmentId(entry.segment.get()),
            creation: entry.creation.get(),
            kind,
            scheme,
            index: entry.index,
            members: members.map(|member| DiskId::from_bytes(*member)).collect(),
        };
        check_spec(&spec).map_err(PageFault::Content)?;
        let blocks = entry.blocks.get();
        if u64::from(blocks) > SLOT_BYTES_MAX / BLOCK_SIZE as u64 {
            return Err(PageFault::Content("sealed length beyond any slot"));
        }
        Ok(Some(Self { spec, epoch: Epoch(entry.epoch.get()), state, blocks }))
    }
}

/// Whether a slot entry can hold the spec; the error says what is wrong with it.
pub fn check_spec(spec: &ShardSpec) -> Result<(), &'static str> {
    let scheme = spec.scheme;
    if scheme.data == 0 || usize::from(scheme.data) > DATA_SHARDS_MAX {
        return Err("number of data shards out of range");
    }
    if usize::from(scheme.parity) > PARITY_SHARDS_MAX {
        return Err("number of parity shards out of range");
    }
    if spec.members.len() != scheme.width() || usize::from(spec.index) >= scheme.width() {
        return Err("write set, shard index and scheme do not fit each other");
    }
    if spec.volume.is_nil() || spec.segment.0 >> SEGMENT_ID_BITS != 0 {
        return Err("volume or segment out of range");
    }
    Ok(())
}

/// What the volume table says of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRecord {
    /// The volume.
    pub volume: VolumeId,
    /// Lowest epoch accepted.
    pub epoch: Epoch,
    /// The head of that epoch.
    pub head: HeadId,
    /// The newest root.
    pub mirror: Option<Mirror>,
}

impl VolumeRecord {
    /// Writes the record into a zeroed page. A mirror must have at most [`MIRROR_BYTES_MAX`] bytes.
    pub fn encode(&self, page: &mut VolumePage) {
        page.volume = self.volume.to_bytes();
        page.epoch = self.epoch.0.into();
        page.head = self.head.to_bytes();
        if let Some(mirror) = &self.mirror {
            page.mirror_present = 1;
            page.mirror_epoch = mirror.revision.0.0.into();
            page.mirror_sequence = mirror.revision.1.into();
            page.mirror_bytes = u32::try_from(mirror.data.len()).expect("a small mirror").into();
            page.mirror[..mirror.data.len()].copy_from_slice(&mirror.data);
        }
    }

    /// The record in a page; none if the page is free.
    pub fn decode(page: &VolumePage) -> Result<Option<Self>, PageFault> {
        let volume = VolumeId::from_bytes(page.volume);
        if volume.is_nil() {
            return Ok(None);
        }
        let mirror = match page.mirror_present {
            0 => None,
            1 => {
                let bytes = usize::try_from(page.mirror_bytes.get()).unwrap_or(usize::MAX);
                let data = page.mirror.get(..bytes).ok_or(PageFault::Content("mirror too long"))?;
                Some(Mirror {
                    revision: (Epoch(page.mirror_epoch.get()), page.mirror_sequence.get()),
                    data: data.to_vec().into(),
                })
            }
            _ => return Err(PageFault::Content("neither a mirror nor none")),
        };
        let head = HeadId::from_bytes(page.head);
        Ok(Some(Self { volume, epoch: Epoch(page.epoch.get()), head, mirror }))
    }
}

/// A zeroed slot entry: a free slot.
pub fn free_entry() -> SlotEntry {
    SlotEntry::new_zeroed()
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
