//! A disk of this core, as a head sees it.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::Bytes;

use crate::disk::Disk;
use crate::id::{DiskId, SegmentId, VolumeId};
use crate::shard::{
    Append, Authority, Catalog, DiskInfo, LocalFuture, Mirror, ReadReply, SealedShard, ShardClient,
    ShardError, ShardResult, ShardSpec, SlotClass, VolumeFence, VolumeOnDisk,
};

/// Calls a [`Disk`] directly. The disk can be exchanged for the same one opened anew.
pub struct LocalClient {
    id: DiskId,
    disk: RefCell<Rc<Disk>>,
}

impl LocalClient {
    /// A client of this disk.
    pub fn new(disk: Rc<Disk>) -> Self {
        Self { id: disk.id(), disk: RefCell::new(disk) }
    }

    /// The disk as it is open now.
    pub fn current(&self) -> Rc<Disk> {
        self.disk.borrow().clone()
    }

    /// From now on, requests go to `disk`: the same disk, opened again. The old one must have
    /// been closed ([`Disk::close`]). [`ShardError::Invalid`] if it is another disk.
    pub fn replace(&self, disk: Rc<Disk>) -> ShardResult<()> {
        if disk.id() != self.id {
            return Err(ShardError::Invalid(format!("{} is not disk {}", disk.id(), self.id)));
        }
        *self.disk.borrow_mut() = disk;
        Ok(())
    }
}

fn ready<'a, T: 'a>(answer: ShardResult<T>) -> LocalFuture<'a, ShardResult<T>> {
    Box::pin(std::future::ready(answer))
}

impl ShardClient for LocalClient {
    fn disk(&self) -> DiskId {
        self.id
    }

    fn info(&self) -> LocalFuture<'_, ShardResult<DiskInfo>> {
        ready(self.current().info())
    }

    fn fence(
        &self,
        authority: Authority,
        mirror: Option<Mirror>,
    ) -> LocalFuture<'_, ShardResult<VolumeOnDisk>> {
        self.current().fence(authority, mirror)
    }

    fn probe(&self, authority: Authority) -> LocalFuture<'_, ShardResult<()>> {
        ready(self.current().probe(authority))
    }

    fn mirror(&self, authority: Authority, mirror: Mirror) -> LocalFuture<'_, ShardResult<()>> {
        self.current().mirror(authority, mirror)
    }

    fn create(
        &self,
        authority: Authority,
        spec: ShardSpec,
        class: SlotClass,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.current().create(authority, spec, class)
    }

    fn append(&self, append: Append) -> LocalFuture<'_, ShardResult<()>> {
        self.current().append(append)
    }

    fn seal(
        &self,
        authority: Authority,
        segment: SegmentId,
        blocks: u32,
        crcs: Option<Rc<[u32]>>,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.current().seal(authority, segment, blocks, crcs)
    }

    fn delete(
        &self,
        authority: Authority,
        segment: SegmentId,
        creation: u64,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.current().delete(authority, segment, creation)
    }

    fn read(
        &self,
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        let disk = self.current();
        Box::pin(async move { disk.read(volume, segment, block, count).await })
    }

    fn read_raw(
        &self,
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        let disk = self.current();
        Box::pin(async move { disk.read_raw(volume, segment, block, count).await })
    }

    fn read_sealed(
        &self,
        shard: SealedShard,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        let disk = self.current();
        Box::pin(async move { disk.read_sealed(shard, block, count).await })
    }

    fn mend(
        &self,
        authority: Authority,
        shard: SealedShard,
        block: u32,
        data: Bytes,
        crc: u32,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.current().mend(authority, shard, block, data, crc)
    }

    fn list(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<VolumeOnDisk>> {
        ready(self.current().list(volume))
    }

    fn volumes(&self) -> LocalFuture<'_, ShardResult<Vec<VolumeFence>>> {
        ready(self.current().volumes())
    }

    fn drop_volume(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<()>> {
        self.current().drop_volume(volume)
    }

    fn forget_volume(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<()>> {
        self.current().forget_volume(volume)
    }

    fn put_catalog(&self, catalog: Catalog) -> LocalFuture<'_, ShardResult<()>> {
        self.current().put_catalog(catalog)
    }

    fn exercise(&self, write: bool) -> LocalFuture<'_, ShardResult<()>> {
        self.current().exercise(write)
    }

    fn get_catalog(&self) -> LocalFuture<'_, ShardResult<Catalog>> {
        ready(self.current().get_catalog())
    }
}
