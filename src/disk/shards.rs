//! Create, append, seal, delete and read shards.

use std::rc::Rc;

use bytes::Bytes;
use futures_util::future;
use tokio::sync::{Mutex, oneshot};

use crate::buffer::{AlignedBuf, is_aligned};
use crate::disk::checksums::Tenant;
use crate::disk::format::{ShardRecord, check_spec};
use crate::disk::stats::add;
use crate::disk::tables::{Phase, Placed, page_of_slot};
use crate::disk::writer::Writer;
use crate::disk::{Disk, detached};
use crate::id::{BLOCK_SIZE, SegmentId, VolumeId};
use crate::planted::{Bug, bug};
use crate::shard::{
    Append, Authority, LocalFuture, ReadReply, SealedShard, ShardError, ShardResult, ShardSpec,
    ShardState, SlotClass,
};

/// Keeps a slot from being reused while I/O on it is under way; travels with the operation.
pub(super) struct Pin {
    disk: Rc<Disk>,
    slot: u32,
}

impl Pin {
    fn new(disk: &Rc<Disk>, slot: u32) -> Self {
        disk.tables.borrow_mut().slots[slot as usize].pins += 1;
        Self { disk: disk.clone(), slot }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut tables = self.disk.tables.borrow_mut();
        let pins = &mut tables.slots[self.slot as usize].pins;
        *pins = if bug(Bug::ReuseBeforeReap) { pins.saturating_sub(1) } else { *pins - 1 };
        tables.release_if_idle(self.slot);
    }
}

impl Disk {
    /// See [`crate::shard::ShardClient::create`].
    pub fn create(
        self: &Rc<Self>,
        authority: Authority,
        spec: ShardSpec,
        class: SlotClass,
    ) -> LocalFuture<'static, ShardResult<()>> {
        let disk = self.clone();
        detached(async move { disk.run_create(authority, spec, class).await })
    }

    async fn run_create(
        self: Rc<Self>,
        authority: Authority,
        spec: ShardSpec,
        class: SlotClass,
    ) -> ShardResult<()> {
        self.check_online()?;
        check_spec(&spec).map_err(|reason| ShardError::Invalid(reason.into()))?;
        if spec.volume != authority.volume || spec.members[usize::from(spec.index)] != self.id {
            let reason = "the shard is of another volume or for another disk";
            return Err(ShardError::Invalid(reason.into()));
        }
        self.raise(authority, None).await?;
        let number = loop {
            let placed = self.tables.borrow_mut().place(authority, &spec, class)?;
            match placed {
                Placed::At(number) => break number,
                Placed::After(leaving) => {
                    self.settled(page_of_slot(leaving)).await?;
                    tokio::task::yield_now().await;
                }
            }
        };
        let _pin = Pin::new(&self, number);
        self.commit(page_of_slot(number)).await?;
        let mut tables = self.tables.borrow_mut();
        let slot = &mut tables.slots[number as usize];
        if slot.phase == Phase::Creating {
            slot.phase = Phase::Live;
        }
        if slot.record.as_ref().is_none_or(|record| record.state != ShardState::Open) {
            // A newer head was faster.
            tables.authorize(authority)?;
        }
        add(&self.stats.creates, 1);
        Ok(())
    }

    /// See [`crate::shard::ShardClient::append`]. The append is taken up by the call itself, not
    /// when the future is first polled.
    pub fn append(self: &Rc<Self>, append: Append) -> LocalFuture<'static, ShardResult<()>> {
        match self.begin_append(append) {
            Ok(answer) => {
                Box::pin(async move { answer.await.unwrap_or(Err(ShardError::Unreachable)) })
            }
            Err(error) => Box::pin(future::ready(Err(error))),
        }
    }

    fn begin_append(
        self: &Rc<Self>,
        append: Append,
    ) -> ShardResult<oneshot::Receiver<ShardResult<()>>> {
        self.check_online()?;
        let bytes: usize = append.data.iter().map(Bytes::len).sum();
        let aligned = append.data.iter().all(|piece| is_aligned(piece));
        if bytes == 0 || !aligned || bytes != append.crcs.len() * BLOCK_SIZE {
            let reason = "an append needs aligned whole blocks with a checksum each";
            return Err(ShardError::Invalid(reason.into()));
        }
        let Append { authority, segment, block, data, crcs } = append;
        let (number, writer, answer) = {
            let tables = self.tables.borrow();
            tables.authorize(authority)?;
            let (number, slot, record) = tables.find(authority.volume, segment)?;
            if record.state != ShardState::Open {
                return Err(ShardError::WrongState(record.state));
            }
            if record.epoch != authority.epoch || slot.phase != Phase::Live {
                let reason = "only the epoch that created the shard may append, and not before";
                return Err(ShardError::Invalid(reason.into()));
            }
            let writer = slot.writer.clone().expect("an open shard has a writer");
            let answer = writer.begin(block, &crcs, self.geometry.slot_blocks())?;
            (number, writer, answer)
        };
        let pin = Pin::new(self, number);
        let write = self.write_device(self.geometry.block_offset(number, block), data);
        tokio::task::spawn_local(async move {
            let running = pin.disk.stats.appends.start();
            let result = write.await;
            running.finish(bytes, result.is_ok());
            writer.complete(block, result.map_err(|error| error.to_string()));
        });
        Ok(answer)
    }

    /// See [`crate::shard::ShardClient::seal`].
    pub fn seal(
        self: &Rc<Self>,
        authority: Authority,
        segment: SegmentId,
        blocks: u32,
        crcs: Option<Rc<[u32]>>,
    ) -> LocalFuture<'static, ShardResult<()>> {
        let disk = self.clone();
        detached(async move { disk.run_seal(authority, segment, blocks, crcs).await })
    }

    async fn run_seal(
        self: Rc<Self>,
        authority: Authority,
        segment: SegmentId,
        blocks: u32,
        crcs: Option<Rc<[u32]>>,
    ) -> ShardResult<()> {
        self.check_online()?;
        self.raise(authority, None).await?;
        let (creation, lock) = {
            let mut tables = self.tables.borrow_mut();
            let (number, _, record) = tables.find(authority.volume, segment)?;
            let creation = record.spec.creation;
            let lock = &mut tables.slots[number as usize].seal_lock;
            (creation, lock.get_or_insert_with(|| Rc::new(Mutex::new(()))).clone())
        };
        let _one_at_a_time = lock.lock().await;
        let (number, record, writer) = self.find_to_seal(authority, segment, creation)?;
        match record.state {
            ShardState::Sealed if record.blocks == blocks => {
                return self.settled(page_of_slot(number)).await;
            }
            ShardState::Sealed => return Err(ShardError::WrongState(ShardState::Sealed)),
            _ if blocks > self.geometry.slot_blocks() => {
                return Err(ShardError::WrongLength(self.geometry.slot_blocks()));
            }
            _ => {}
        }
        let pin = Pin::new(&self, number);
        let crcs = checksums_to_seal(&record, writer.as_deref(), blocks, crcs).await?;
        let tenant = Tenant::new(&record.spec, blocks);
        if !bug(Bug::SkipChecksumAreaOnSeal) {
            self.write_checksums(number, &tenant, &crcs).await?;
        }
        let (_, record, _) = self.find_to_seal(authority, segment, creation)?;
        let sealed = ShardRecord { state: ShardState::Sealed, blocks, ..(*record).clone() };
        {
            let slot = &mut self.tables.borrow_mut().slots[number as usize];
            slot.record = Some(Rc::new(sealed));
            slot.writer = None;
        }
        self.commit(page_of_slot(number)).await?;
        add(&self.stats.seals, 1);
        drop(pin);
        Ok(())
    }

    /// The shard's slot, record and writer, if `authority` may seal it and it is still the same.
    fn find_to_seal(
        &self,
        authority: Authority,
        segment: SegmentId,
        creation: u64,
    ) -> ShardResult<(u32, Rc<ShardRecord>, Option<Rc<Writer>>)> {
        let tables = self.tables.borrow();
        tables.authorize(authority)?;
        let (number, slot, record) = tables.find(authority.volume, segment)?;
        if record.spec.creation != creation {
            return Err(ShardError::Gone);
        }
        if slot.phase == Phase::Creating {
            return Err(ShardError::Invalid("the shard is still being created".into()));
        }
        Ok((number, record.clone(), slot.writer.clone()))
    }

    /// See [`crate::shard::ShardClient::delete`].
    pub fn delete(
        self: &Rc<Self>,
        authority: Authority,
        segment: SegmentId,
        creation: u64,
    ) -> LocalFuture<'static, ShardResult<()>> {
        let disk = self.clone();
        detached(async move {
            disk.check_online()?;
            disk.raise(authority, None).await?;
            disk.tables.borrow().authorize(authority)?;
            disk.remove(authority.volume, segment, creation).await
        })
    }

    /// Deletes a shard, durably.
    pub(super) async fn remove(
        self: &Rc<Self>,
        volume: VolumeId,
        segment: SegmentId,
        creation: u64,
    ) -> ShardResult<()> {
        let key = (volume, segment);
        let (number, first) = {
            let mut tables = self.tables.borrow_mut();
            let Some(number) = tables.shards.get(&key).copied() else {
                return tables.find(volume, segment).map(|_| ());
            };
            let slot = &mut tables.slots[number as usize];
            if slot.record.as_ref().is_none_or(|record| record.spec.creation != creation) {
                return Err(ShardError::Gone);
            }
            let first = slot.phase != Phase::Deleting;
            slot.phase = Phase::Deleting;
            (number, first)
        };
        let page = page_of_slot(number);
        if !first {
            return self.settled(page).await;
        }
        self.commit(page).await?;
        let mut tables = self.tables.borrow_mut();
        tables.shards.remove(&key);
        let slot = &mut tables.slots[number as usize];
        slot.phase = Phase::Freed;
        (slot.record, slot.writer, slot.seal_lock) = (None, None, None);
        tables.release_if_idle(number);
        add(&self.stats.deletes, 1);
        Ok(())
    }

    /// See [`crate::shard::ShardClient::read`].
    pub async fn read(
        self: &Rc<Self>,
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    ) -> ShardResult<ReadReply> {
        let (pin, record, crcs) = {
            let (number, record, writer) = self.find_to_read(volume, segment)?;
            let crcs = match record.state {
                ShardState::Closed => return Err(ShardError::WrongState(ShardState::Closed)),
                ShardState::Sealed => {
                    check_range(block, count, record.blocks)?;
                    None
                }
                ShardState::Open => {
                    let writer = writer.expect("an open shard has a writer");
                    check_range(block, count, writer.durable())?;
                    writer.crcs(block, count)
                }
            };
            (Pin::new(self, number), record, crcs)
        };
        if let Some(crcs) = crcs {
            let data = self.read_blocks(&pin, block, count).await?;
            return Ok(ReadReply { data, crcs });
        }
        let tenant = Tenant::new(&record.spec, record.blocks);
        let stored = self.read_checksums(pin.slot, &tenant, block, count);
        let (data, crcs) = future::join(self.read_blocks(&pin, block, count), stored).await;
        Ok(ReadReply { data: data?, crcs: crcs? })
    }

    /// See [`crate::shard::ShardClient::read_raw`].
    pub async fn read_raw(
        self: &Rc<Self>,
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    ) -> ShardResult<ReadReply> {
        let pin = {
            let (number, _, _) = self.find_to_read(volume, segment)?;
            check_range(block, count, self.geometry.slot_blocks())?;
            Pin::new(self, number)
        };
        let data = self.read_blocks(&pin, block, count).await?;
        Ok(ReadReply { data, crcs: Vec::new() })
    }

    /// See [`crate::shard::ShardClient::read_sealed`].
    pub async fn read_sealed(
        self: &Rc<Self>,
        shard: SealedShard,
        block: u32,
        count: u32,
    ) -> ShardResult<ReadReply> {
        let (pin, tenant) = self.find_sealed(shard, block, count)?;
        self.forget_checksums(pin.slot, block, count);
        let stored = self.read_checksums(pin.slot, &tenant, block, count);
        let (data, crcs) = future::join(self.read_blocks(&pin, block, count), stored).await;
        // Which of them failed matters: without checksums, no block of the shard can be judged.
        let crcs = crcs?;
        Ok(ReadReply { data: data?, crcs })
    }

    /// See [`crate::shard::ShardClient::mend`].
    pub fn mend(
        self: &Rc<Self>,
        authority: Authority,
        shard: SealedShard,
        block: u32,
        data: Bytes,
        crc: u32,
    ) -> LocalFuture<'static, ShardResult<()>> {
        let disk = self.clone();
        detached(async move { disk.run_mend(authority, shard, block, data, crc).await })
    }

    async fn run_mend(
        self: Rc<Self>,
        authority: Authority,
        shard: SealedShard,
        block: u32,
        data: Bytes,
        crc: u32,
    ) -> ShardResult<()> {
        self.tables.borrow().authorize(authority)?;
        if data.len() != BLOCK_SIZE || !is_aligned(&data) || authority.volume != shard.volume {
            return Err(ShardError::Invalid("one aligned block of a shard is mended".into()));
        }
        let (pin, tenant) = self.find_sealed(shard, block, 1)?;
        let lock = {
            let mut tables = self.tables.borrow_mut();
            let lock = &mut tables.slots[pin.slot as usize].seal_lock;
            lock.get_or_insert_with(|| Rc::new(Mutex::new(()))).clone()
        };
        // Two writes to one place at once could leave either.
        let _one_at_a_time = lock.lock().await;
        self.tables.borrow().authorize(authority)?;
        self.find_sealed(shard, block, 1)?;
        if self.read_checksums(pin.slot, &tenant, block, 1).await? != [crc] {
            return Err(ShardError::Invalid("it is not what was sealed".into()));
        }
        let running = self.stats.appends.start();
        let offset = self.geometry.block_offset(pin.slot, block);
        let result = self.write_device(offset, Rc::from([data])).await;
        running.finish(BLOCK_SIZE, result.is_ok());
        result.map_err(|error| self.data_error(&error))
    }

    /// The slot of exactly this sealed shard, kept from being reused, if the blocks lie in it.
    fn find_sealed(
        self: &Rc<Self>,
        shard: SealedShard,
        block: u32,
        count: u32,
    ) -> ShardResult<(Pin, Tenant)> {
        let (number, record, _) = self.find_to_read(shard.volume, shard.segment)?;
        if record.spec.creation != shard.creation {
            return Err(ShardError::Gone);
        }
        if record.state != ShardState::Sealed {
            return Err(ShardError::WrongState(record.state));
        }
        if record.blocks != shard.blocks {
            return Err(ShardError::WrongLength(record.blocks));
        }
        check_range(block, count, record.blocks)?;
        Ok((Pin::new(self, number), Tenant::new(&record.spec, record.blocks)))
    }

    fn find_to_read(
        &self,
        volume: VolumeId,
        segment: SegmentId,
    ) -> ShardResult<(u32, Rc<ShardRecord>, Option<Rc<Writer>>)> {
        self.check_online()?;
        let tables = self.tables.borrow();
        let (number, slot, record) = tables.find(volume, segment)?;
        Ok((number, record.clone(), slot.writer.clone()))
    }

    async fn read_blocks(&self, pin: &Pin, block: u32, count: u32) -> ShardResult<Bytes> {
        let bytes = count as usize * BLOCK_SIZE;
        let running = self.stats.reads.start();
        let offset = self.geometry.block_offset(pin.slot, block);
        let result = self.device.read(offset, AlignedBuf::new(bytes)).await;
        running.finish(bytes, result.is_ok());
        result.map(AlignedBuf::freeze).map_err(|error| self.data_error(&error))
    }
}

fn check_range(block: u32, count: u32, blocks: u32) -> ShardResult<()> {
    if count == 0 {
        return Err(ShardError::Invalid("a read of no blocks".into()));
    }
    match block.checked_add(count) {
        Some(end) if end <= blocks => Ok(()),
        _ => Err(ShardError::WrongLength(blocks)),
    }
}

/// The checksums that a seal at `blocks` stores: from memory for an open shard, else as given.
async fn checksums_to_seal(
    record: &ShardRecord,
    writer: Option<&Writer>,
    blocks: u32,
    given: Option<Rc<[u32]>>,
) -> ShardResult<Vec<u32>> {
    if record.state == ShardState::Open {
        if given.is_some() {
            return Err(ShardError::Invalid("the shard is open: it has its checksums".into()));
        }
        return writer.expect("an open shard has a writer").begin_seal(blocks);
    }
    // Writes of the epoch that was fenced must not change what is about to become immutable.
    if let Some(writer) = writer {
        writer.wait_reaped().await;
    }
    match given {
        None if blocks > 0 => Err(ShardError::WrongState(record.state)),
        None => Ok(Vec::new()),
        Some(crcs) if crcs.len() == blocks as usize => Ok(crcs.to_vec()),
        Some(_) => Err(ShardError::Invalid("a closed shard needs a checksum per block".into())),
    }
}
