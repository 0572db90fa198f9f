//! The catalog: keys of the cluster mirrored on the disk, in two copies of one area.

use std::rc::Rc;

use bytes::Bytes;

use crate::buffer::AlignedBuf;
use crate::disk::device::BlockDevice;
use crate::disk::format::{CATALOG_AREA_BYTES, CatalogPage, PageFault, decode_page, encode_page};
use crate::disk::geometry::Geometry;
use crate::disk::{Disk, detached};
use crate::id::{BLOCK_SIZE, DiskId};
use crate::shard::{CATALOG_BYTES_MAX, Catalog, LocalFuture, ShardError, ShardResult};

/// The bytes of a catalog area, as long as the data needs.
pub(super) fn encode(disk: DiskId, sequence: u64, catalog: &Catalog) -> AlignedBuf {
    let bytes = catalog.data.len();
    let mut buf = AlignedBuf::zeroed(BLOCK_SIZE + bytes.next_multiple_of(BLOCK_SIZE));
    let (page, data) = buf.split_at_mut(BLOCK_SIZE);
    encode_page(page, disk, 0, sequence, |page: &mut CatalogPage| {
        page.revision = catalog.revision.into();
        page.incarnation = catalog.incarnation.into();
        page.bytes = u32::try_from(bytes).expect("at most 256 KiB").into();
        page.data_crc = crc32fast::hash(&catalog.data).into();
    });
    data[..bytes].copy_from_slice(&catalog.data);
    buf
}

fn decode(disk: DiskId, area: &[u8]) -> Result<(u64, Catalog), PageFault> {
    let (page, data) = area.split_at(BLOCK_SIZE);
    let page = decode_page::<CatalogPage>(page, disk, 0)?;
    let bytes = usize::try_from(page.bytes.get()).unwrap_or(usize::MAX);
    let data = data.get(..bytes).ok_or(PageFault::Content("catalog too long"))?;
    if crc32fast::hash(data) != page.data_crc.get() {
        return Err(PageFault::Checksum);
    }
    let catalog = Catalog {
        incarnation: page.incarnation.get(),
        revision: page.revision.get(),
        data: Bytes::copy_from_slice(data),
    };
    Ok((page.header.sequence.get(), catalog))
}

/// Reads both copies; the newer valid one counts.
pub(super) async fn load(
    device: &dyn BlockDevice,
    disk: DiskId,
    geometry: &Geometry,
) -> (u64, ShardResult<Catalog>) {
    let mut newest = None;
    for copy in 0..2 {
        let buf = AlignedBuf::new(CATALOG_AREA_BYTES);
        let Ok(buf) = device.read(geometry.catalog_offset(copy), buf).await else { continue };
        let Ok((sequence, catalog)) = decode(disk, &buf) else { continue };
        if newest.as_ref().is_none_or(|(best, _)| sequence > *best) {
            newest = Some((sequence, catalog));
        }
    }
    match newest {
        Some((sequence, catalog)) => (sequence, Ok(catalog)),
        None => (0, Err(ShardError::Damaged("both copies of the catalog are unreadable".into()))),
    }
}

impl Disk {
    /// See [`crate::shard::ShardClient::get_catalog`].
    pub fn get_catalog(&self) -> ShardResult<Catalog> {
        self.check_online()?;
        self.catalog.borrow().clone()
    }

    /// See [`crate::shard::ShardClient::put_catalog`]. Replaces a damaged catalog, whatever its
    /// revision was.
    pub fn put_catalog(self: &Rc<Self>, catalog: Catalog) -> LocalFuture<'static, ShardResult<()>> {
        let disk = self.clone();
        detached(async move {
            if catalog.data.len() > CATALOG_BYTES_MAX {
                return Err(ShardError::Invalid("the catalog is too long".into()));
            }
            let mut sequence = disk.catalog_write.lock().await;
            disk.check_online()?;
            if let Ok(known) = &*disk.catalog.borrow()
                && (known.incarnation, known.revision) >= (catalog.incarnation, catalog.revision)
            {
                return Ok(());
            }
            *sequence += 1;
            let area = encode(disk.id, *sequence, &catalog).freeze();
            for copy in 0..2 {
                let offset = disk.geometry.catalog_offset(copy);
                disk.write_table(offset, Rc::from([area.clone()])).await?;
            }
            *disk.catalog.borrow_mut() = Ok(catalog);
            Ok(())
        })
    }
}
