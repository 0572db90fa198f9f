//! The way from one head to one disk, with the faults that a network has.
//!
//! Requests of one head to one disk arrive in the order they were sent, as over a connection, but
//! as late as the [`Link`] says, or not at all; answers may be lost likewise. What was delayed is
//! delivered later even if nobody waits for it any more: that is how a head that lost its volume
//! still sends appends. Reads take a way of their own and keep no order.

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::disk::Disk;
use crate::env::Env;
use crate::id::{DiskId, SegmentId, VolumeId};
use crate::shard::{
    Append, Authority, Catalog, DiskInfo, LocalFuture, Mirror, ReadReply, SealedShard, ShardClient,
    ShardError, ShardResult, ShardSpec, SlotClass, VolumeFence, VolumeOnDisk,
};

/// A delay that is none to speak of.
const SOON: Duration = Duration::from_millis(20);

/// What happens to the requests of one head on their way to all disks.
#[derive(Default)]
pub struct Link {
    /// Requests other than reads do not arrive until healed.
    pub control_cut: Cell<bool>,
    /// Reads do not arrive until healed.
    pub reads_cut: Cell<bool>,
    /// Answers do not come back until healed.
    pub mute: Cell<bool>,
    /// Longest delay of a request, and of an answer.
    pub delay: Cell<Duration>,
    /// The longest delay while nothing is wrong.
    pub usual_delay: Cell<Duration>,
    /// Of what was held back, half is lost when the link heals.
    pub lossy: Cell<bool>,
    healed: Notify,
}

impl Link {
    /// Everything passes at once again.
    pub fn heal(&self) {
        self.control_cut.set(false);
        self.reads_cut.set(false);
        self.mute.set(false);
        self.delay.set(self.usual_delay.get());
        self.healed.notify_waiters();
    }

    /// Whether everything passes, and soon.
    pub fn is_well(&self) -> bool {
        let cut = self.control_cut.get() || self.reads_cut.get() || self.mute.get();
        !cut && self.delay.get() <= SOON
    }

    async fn wait_while(&self, held: impl Fn(&Self) -> bool) -> bool {
        let mut waited = false;
        loop {
            let healed = self.healed.notified();
            if !held(self) {
                return waited;
            }
            waited = true;
            healed.await;
        }
    }
}

type Answer<T> = Pin<Box<dyn Future<Output = ShardResult<T>>>>;

/// The order of the requests to one disk.
#[derive(Default)]
struct Line {
    next: Cell<u64>,
    served: Cell<u64>,
    moved: Notify,
}

struct Way {
    disk: Rc<Disk>,
    link: Rc<Link>,
    env: Env,
    line: Line,
}

impl Way {
    fn lost(&self) -> bool {
        self.link.lossy.get() && self.env.chance(1, 2)
    }

    async fn delay(&self) {
        let most = u64::try_from(self.link.delay.get().as_millis()).unwrap_or(0);
        if most > 0 {
            sleep(Duration::from_millis(self.env.random_below(most + 1))).await;
        }
    }

    async fn answer<T>(&self, answer: Answer<T>) -> ShardResult<T> {
        let result = answer.await;
        self.delay().await;
        if self.link.wait_while(|link| link.mute.get()).await && self.lost() {
            return Err(ShardError::Unreachable);
        }
        result
    }

    async fn read<T>(
        self: Rc<Self>,
        request: impl FnOnce(Rc<Disk>) -> Answer<T>,
    ) -> ShardResult<T> {
        self.delay().await;
        if self.link.wait_while(|link| link.reads_cut.get()).await && self.lost() {
            return Err(ShardError::Unreachable);
        }
        let disk = self.disk.clone();
        self.answer(request(disk)).await
    }

    /// Delivers a request in its turn.
    async fn deliver<T>(
        self: Rc<Self>,
        ticket: u64,
        request: impl FnOnce(Rc<Disk>) -> Answer<T>,
    ) -> ShardResult<T> {
        self.delay().await;
        let held = self.link.wait_while(|link| link.control_cut.get()).await;
        loop {
            let moved = self.line.moved.notified();
            if self.line.served.get() == ticket {
                break;
            }
            moved.await;
        }
        let lost = held && self.lost();
        let disk = self.disk.clone();
        let answer = (!lost).then(|| request(disk));
        self.line.served.set(ticket + 1);
        self.line.moved.notify_waiters();
        match answer {
            Some(answer) => self.answer(answer).await,
            None => Err(ShardError::Unreachable),
        }
    }
}

/// A disk as one head sees it, over a [`Link`].
pub struct FaultyClient {
    id: DiskId,
    way: Rc<Way>,
}

impl FaultyClient {
    /// A client of this disk over `link`.
    pub fn new(disk: Rc<Disk>, link: Rc<Link>, env: Env) -> Self {
        let id = disk.id();
        let way = Way { disk, link, env, line: Line::default() };
        Self { id, way: Rc::new(way) }
    }

    fn send<T: 'static>(
        &self,
        request: impl FnOnce(Rc<Disk>) -> Answer<T> + 'static,
    ) -> LocalFuture<'static, ShardResult<T>> {
        let way = self.way.clone();
        let ticket = way.line.next.get();
        way.line.next.set(ticket + 1);
        let link = &way.link;
        let idle = way.line.served.get() == ticket;
        if idle && !link.control_cut.get() && !link.mute.get() && link.delay.get().is_zero() {
            // At once, as a disk of the same core would take it.
            let disk = way.disk.clone();
            let answer = request(disk);
            way.line.served.set(ticket + 1);
            return Box::pin(async move { way.answer(answer).await });
        }
        let task = tokio::task::spawn_local(way.deliver(ticket, request));
        Box::pin(async move { task.await.unwrap_or(Err(ShardError::Unreachable)) })
    }

    fn ask<T: 'static>(
        &self,
        request: impl FnOnce(Rc<Disk>) -> Answer<T> + 'static,
    ) -> LocalFuture<'static, ShardResult<T>> {
        Box::pin(self.way.clone().read(request))
    }
}

fn ready<T: 'static>(answer: ShardResult<T>) -> Answer<T> {
    Box::pin(std::future::ready(answer))
}

impl ShardClient for FaultyClient {
    fn disk(&self) -> DiskId {
        self.id
    }

    fn info(&self) -> LocalFuture<'_, ShardResult<DiskInfo>> {
        self.ask(|disk| ready(disk.info()))
    }

    fn fence(
        &self,
        authority: Authority,
        mirror: Option<Mirror>,
    ) -> LocalFuture<'_, ShardResult<VolumeOnDisk>> {
        self.send(move |disk| disk.fence(authority, mirror))
    }

    fn probe(&self, authority: Authority) -> LocalFuture<'_, ShardResult<()>> {
        self.send(move |disk| ready(disk.probe(authority)))
    }

    fn mirror(&self, authority: Authority, mirror: Mirror) -> LocalFuture<'_, ShardResult<()>> {
        self.send(move |disk| disk.mirror(authority, mirror))
    }

    fn create(
        &self,
        authority: Authority,
        spec: ShardSpec,
        class: SlotClass,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.send(move |disk| disk.create(authority, spec, class))
    }

    fn append(&self, append: Append) -> LocalFuture<'_, ShardResult<()>> {
        self.send(move |disk| disk.append(append))
    }

    fn seal(
        &self,
        authority: Authority,
        segment: SegmentId,
        blocks: u32,
        crcs: Option<Rc<[u32]>>,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.send(move |disk| disk.seal(authority, segment, blocks, crcs))
    }

    fn delete(
        &self,
        authority: Authority,
        segment: SegmentId,
        creation: u64,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.send(move |disk| disk.delete(authority, segment, creation))
    }

    fn read(
        &self,
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        self.ask(move |disk| {
            Box::pin(async move { disk.read(volume, segment, block, count).await })
        })
    }

    fn read_raw(
        &self,
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        self.ask(move |disk| {
            Box::pin(async move { disk.read_raw(volume, segment, block, count).await })
        })
    }

    fn read_sealed(
        &self,
        shard: SealedShard,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        self.ask(move |disk| Box::pin(async move { disk.read_sealed(shard, block, count).await }))
    }

    fn mend(
        &self,
        authority: Authority,
        shard: SealedShard,
        block: u32,
        data: Bytes,
        crc: u32,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.send(move |disk| disk.mend(authority, shard, block, data, crc))
    }

    fn list(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<VolumeOnDisk>> {
        self.ask(move |disk| ready(disk.list(volume)))
    }

    fn volumes(&self) -> LocalFuture<'_, ShardResult<Vec<VolumeFence>>> {
        self.ask(|disk| ready(disk.volumes()))
    }

    fn drop_volume(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<()>> {
        self.send(move |disk| disk.drop_volume(volume))
    }

    fn forget_volume(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<()>> {
        self.send(move |disk| disk.forget_volume(volume))
    }

    fn put_catalog(&self, catalog: Catalog) -> LocalFuture<'_, ShardResult<()>> {
        self.send(move |disk| disk.put_catalog(catalog))
    }

    fn exercise(&self, write: bool) -> LocalFuture<'_, ShardResult<()>> {
        self.ask(move |disk| disk.exercise(write))
    }

    fn get_catalog(&self) -> LocalFuture<'_, ShardResult<Catalog>> {
        self.ask(|disk| ready(disk.get_catalog()))
    }
}
