//! The checksum area: salted CRCs of the blocks of sealed shards, in pages that name their shard.
//!
//! The disk stores and returns the CRCs; it does not compare them with the data. A page that is
//! torn, misplaced, of a slot's earlier tenant or lost is noticed by its own CRC and identity.

use std::num::NonZeroUsize;
use std::rc::Rc;

use lru::LruCache;

use crate::buffer::AlignedBuf;
use crate::disk::Disk;
use crate::disk::format::{CRCS_PER_PAGE, ChecksumPage, decode_page, encode_page};
use crate::disk::stats::add;
use crate::id::{BLOCK_SIZE, DiskId};
use crate::shard::{ShardError, ShardResult, ShardSpec};

/// Checksum pages kept in memory, per disk: 1 MiB, for about 1 GiB of sealed data.
const CACHED_PAGES: usize = 256;

/// Whose checksums a page holds: no two sealed shards of a disk are ever equal in all of these.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tenant {
    volume: [u8; 16],
    segment: u64,
    creation: u64,
    blocks: u32,
}

impl Tenant {
    pub(super) fn new(spec: &ShardSpec, blocks: u32) -> Self {
        let volume = spec.volume.to_bytes();
        Self { volume, segment: spec.segment.0, creation: spec.creation, blocks }
    }
}

/// The checksums in the page of this number, if they are the tenant's; or why they are not.
pub(super) fn decode(
    buf: &[u8],
    disk: DiskId,
    number: u64,
    tenant: &Tenant,
) -> Result<Vec<u32>, String> {
    let page = decode_page::<ChecksumPage>(buf, disk, number).map_err(|fault| fault.to_string())?;
    let found = Tenant {
        volume: page.volume,
        segment: page.segment.get(),
        creation: page.creation.get(),
        blocks: page.blocks.get(),
    };
    if found != *tenant {
        return Err("it is of another shard".into());
    }
    Ok(page.crcs.iter().map(|crc| crc.get()).collect())
}

struct CachedPage {
    tenant: Tenant,
    crcs: Vec<u32>,
}

/// Checksum pages by their number in the area.
pub(super) struct Cache(LruCache<u64, Rc<CachedPage>>);

impl Default for Cache {
    fn default() -> Self {
        Self(LruCache::new(NonZeroUsize::new(CACHED_PAGES).expect("not zero")))
    }
}

impl Disk {
    /// Stores the checksums of a shard about to be sealed, durably.
    pub(super) async fn write_checksums(
        self: &Rc<Self>,
        slot: u32,
        tenant: &Tenant,
        crcs: &[u32],
    ) -> ShardResult<()> {
        if crcs.is_empty() {
            return Ok(());
        }
        let first = self.geometry.checksum_page(slot);
        let chunks = crcs.chunks(CRCS_PER_PAGE);
        let mut buf = AlignedBuf::new(chunks.len() * BLOCK_SIZE);
        for (number, (page, crcs)) in
            (first..).zip(buf.chunks_exact_mut(BLOCK_SIZE).zip(chunks.clone()))
        {
            encode_page(page, self.id, number, 0, |page: &mut ChecksumPage| {
                page.volume = tenant.volume;
                page.segment = tenant.segment.into();
                page.creation = tenant.creation.into();
                page.blocks = tenant.blocks.into();
                for (stored, crc) in page.crcs.iter_mut().zip(crcs) {
                    *stored = (*crc).into();
                }
            });
        }
        let bytes = buf.len();
        let running = self.stats.table_writes.start();
        let offset = self.geometry.checksum_page_offset(first);
        let result = self.write_device(offset, Rc::from([buf.freeze()])).await;
        running.finish(bytes, result.is_ok());
        result.map_err(|error| self.data_error(&error))?;
        for (number, crcs) in (first..).zip(chunks) {
            let page = CachedPage { tenant: tenant.clone(), crcs: crcs.to_vec() };
            self.checksums.borrow_mut().0.put(number, Rc::new(page));
        }
        Ok(())
    }

    /// The stored checksums of `count` blocks from `block` of a sealed shard.
    pub(super) async fn read_checksums(
        &self,
        slot: u32,
        tenant: &Tenant,
        block: u32,
        count: u32,
    ) -> ShardResult<Vec<u32>> {
        let (start, end) = (block as usize, block as usize + count as usize);
        let mut crcs = Vec::with_capacity(count as usize);
        for page in start / CRCS_PER_PAGE..=(end - 1) / CRCS_PER_PAGE {
            let number = self.geometry.checksum_page(slot) + page as u64;
            let cached = self.checksum_page(number, tenant).await?;
            let base = page * CRCS_PER_PAGE;
            let range = start.max(base) - base..end.min(base + CRCS_PER_PAGE) - base;
            crcs.extend_from_slice(&cached.crcs[range]);
        }
        Ok(crcs)
    }

    /// Has the next reader of these checksums read them from the medium.
    pub(super) fn forget_checksums(&self, slot: u32, block: u32, count: u32) {
        let (start, end) = (block as usize, block as usize + count as usize);
        let mut cache = self.checksums.borrow_mut();
        for page in start / CRCS_PER_PAGE..=(end - 1) / CRCS_PER_PAGE {
            cache.0.pop(&(self.geometry.checksum_page(slot) + page as u64));
        }
    }

    async fn checksum_page(&self, number: u64, tenant: &Tenant) -> ShardResult<Rc<CachedPage>> {
        if let Some(page) = self.checksums.borrow_mut().0.get(&number)
            && page.tenant == *tenant
        {
            return Ok(page.clone());
        }
        let running = self.stats.table_reads.start();
        let offset = self.geometry.checksum_page_offset(number);
        let result = self.device.read(offset, AlignedBuf::new(BLOCK_SIZE)).await;
        running.finish(BLOCK_SIZE, result.is_ok());
        let buf = result.map_err(|error| self.data_error(&error))?;
        let crcs = decode(&buf, self.id, number, tenant)
            .map_err(|reason| self.damaged_checksums(number, &reason))?;
        let page = Rc::new(CachedPage { tenant: tenant.clone(), crcs });
        self.checksums.borrow_mut().0.put(number, page.clone());
        Ok(page)
    }

    fn damaged_checksums(&self, number: u64, reason: &str) -> ShardError {
        add(&self.stats.damaged_pages, 1);
        ShardError::Damaged(format!("checksum page {number}: {reason}"))
    }
}
