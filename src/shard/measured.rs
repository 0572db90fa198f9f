//! A disk whose requests are timed: what heads get from the registry.
//!
//! Passes everything on, at once and unchanged. Reads, appends and changes of tables are timed from
//! the call to the answer; one that is given up before counts by the time it had. Requests that
//! do no I/O (probe, info, list) say nothing of a disk and are not timed, nor are the rare ones
//! that take as long as there is to do (fence, raw reads, dropping a volume).

use std::rc::Rc;

use bytes::Bytes;
use tokio::time::Instant;

use super::latency::{Class, Gauge, Watch};
use super::{
    Append, Authority, Catalog, DiskInfo, LocalFuture, Mirror, ReadReply, SealedShard, ShardClient,
    ShardError, ShardResult, ShardSpec, SlotClass, VolumeFence, VolumeOnDisk,
};
use crate::id::{BLOCK_SIZE, DiskId, SegmentId, VolumeId};

/// Times the requests to another client.
pub(super) struct MeasuredClient {
    inner: Rc<dyn ShardClient>,
    watch: Rc<Watch>,
    gauge: Rc<Gauge>,
}

/// A request under way.
struct Running<'a> {
    client: &'a MeasuredClient,
    class: Class,
    blocks: u32,
    started: Instant,
    answered: bool,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let took = self.started.elapsed();
        let MeasuredClient { watch, gauge, .. } = self.client;
        if self.answered {
            watch.answered(gauge, self.class, took, self.blocks);
        } else {
            watch.given_up(gauge, self.class, took, self.blocks);
        }
    }
}

impl Running<'_> {
    /// A refusal is an answer too; a disk that does not answer is as one that was given up.
    fn note<T>(&mut self, result: &ShardResult<T>) {
        self.answered = !matches!(result, Err(ShardError::Unreachable));
    }
}

impl MeasuredClient {
    pub(super) fn new(inner: Rc<dyn ShardClient>, watch: Rc<Watch>, gauge: Rc<Gauge>) -> Self {
        Self { inner, watch, gauge }
    }

    fn timed<'a, T: 'a>(
        &'a self,
        class: Class,
        blocks: u32,
        request: LocalFuture<'a, ShardResult<T>>,
    ) -> LocalFuture<'a, ShardResult<T>> {
        let started = Instant::now();
        let mut running = Running { client: self, class, blocks, started, answered: false };
        Box::pin(async move {
            let result = request.await;
            running.note(&result);
            result
        })
    }
}

impl ShardClient for MeasuredClient {
    fn disk(&self) -> DiskId {
        self.inner.disk()
    }

    fn info(&self) -> LocalFuture<'_, ShardResult<DiskInfo>> {
        self.inner.info()
    }

    fn fence(
        &self,
        authority: Authority,
        mirror: Option<Mirror>,
    ) -> LocalFuture<'_, ShardResult<VolumeOnDisk>> {
        self.inner.fence(authority, mirror)
    }

    fn probe(&self, authority: Authority) -> LocalFuture<'_, ShardResult<()>> {
        self.inner.probe(authority)
    }

    fn mirror(&self, authority: Authority, mirror: Mirror) -> LocalFuture<'_, ShardResult<()>> {
        self.timed(Class::Control, 1, self.inner.mirror(authority, mirror))
    }

    fn create(
        &self,
        authority: Authority,
        spec: ShardSpec,
        class: SlotClass,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.timed(Class::Control, 1, self.inner.create(authority, spec, class))
    }

    fn append(&self, append: Append) -> LocalFuture<'_, ShardResult<()>> {
        let bytes: usize = append.data.iter().map(bytes::Bytes::len).sum();
        let blocks = u32::try_from(bytes / BLOCK_SIZE).unwrap_or(u32::MAX);
        self.timed(Class::Append, blocks, self.inner.append(append))
    }

    fn seal(
        &self,
        authority: Authority,
        segment: SegmentId,
        blocks: u32,
        crcs: Option<Rc<[u32]>>,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.timed(Class::Control, 1, self.inner.seal(authority, segment, blocks, crcs))
    }

    fn delete(
        &self,
        authority: Authority,
        segment: SegmentId,
        creation: u64,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.timed(Class::Control, 1, self.inner.delete(authority, segment, creation))
    }

    fn read(
        &self,
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        self.timed(Class::Read, count, self.inner.read(volume, segment, block, count))
    }

    fn read_raw(
        &self,
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        self.inner.read_raw(volume, segment, block, count)
    }

    fn read_sealed(
        &self,
        shard: SealedShard,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        self.inner.read_sealed(shard, block, count)
    }

    fn mend(
        &self,
        authority: Authority,
        shard: SealedShard,
        block: u32,
        data: Bytes,
        crc: u32,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.inner.mend(authority, shard, block, data, crc)
    }

    fn list(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<VolumeOnDisk>> {
        self.inner.list(volume)
    }

    fn volumes(&self) -> LocalFuture<'_, ShardResult<Vec<VolumeFence>>> {
        self.inner.volumes()
    }

    fn drop_volume(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<()>> {
        self.inner.drop_volume(volume)
    }

    fn forget_volume(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<()>> {
        self.inner.forget_volume(volume)
    }

    fn put_catalog(&self, catalog: Catalog) -> LocalFuture<'_, ShardResult<()>> {
        self.inner.put_catalog(catalog)
    }

    fn get_catalog(&self) -> LocalFuture<'_, ShardResult<Catalog>> {
        self.inner.get_catalog()
    }

    fn exercise(&self, write: bool) -> LocalFuture<'_, ShardResult<()>> {
        let class = if write { Class::Append } else { Class::Read };
        self.timed(class, 1, self.inner.exercise(write))
    }
}
