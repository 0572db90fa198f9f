//! Disks: append-only shards in slots of a block device, and the fences that govern them.
//!
//! Knows shards as arrays of 4 KiB blocks and volumes as fences; knows nothing of what the blocks
//! or root mirrors mean, of heads, or of other disks. Everything it promises is in the rules of
//! [`crate::shard`].
//!
//! Invariants ([`Disk::check`] tests them):
//!
//! - a (volume, segment) is in one slot at most, also across a crash: a shard is forgotten only
//!   when its cleared entry is durable, and only then can it be created again;
//! - an answer follows the durable write it speaks of; the tables in memory run ahead of the
//!   device, never behind;
//! - a slot is free only when its cleared entry is durable and no I/O on it is under way;
//! - an open shard has the epoch of its volume's fence;
//! - what an unreadable table page might say is answered with [`ShardError::Damaged`].
//!
//! Requests that change something run as tasks of their own: a dropped future does not stop one
//! half-way. Everything must run inside a [`tokio::task::LocalSet`].

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use tokio::sync::{Mutex, Notify};

use crate::id::{ClusterId, DiskId};
use crate::shard::{Catalog, DiskInfo, LocalFuture, ShardError, ShardResult};

mod catalog;
mod check;
mod checksums;
mod commit;
#[cfg(test)]
pub mod conformance;
pub mod device;
mod exercise;
pub mod format;
pub mod geometry;
mod inspect;
mod open;
mod shards;
mod stats;
mod tables;
pub mod uring;
mod volumes;
mod writer;

pub use geometry::{Geometry, GeometryError};
pub use inspect::{
    Inspection, PageFinding, ShardReader, SuperblockCopy, inspect, superblock_copies,
};
pub use open::{
    DiskFormatError, DiskOpenError, FormatOptions, SuperblockInfo, newer_copy, probe_superblock,
    trial_write,
};
pub use stats::{DiskStats, OperationStats, SlotCounts};

use commit::Commit;
use device::{BlockDevice, DeviceError};
use tables::{TablePage, Tables};

/// An opened disk.
pub struct Disk {
    device: Rc<dyn BlockDevice>,
    id: DiskId,
    cluster: ClusterId,
    geometry: Geometry,
    tables: RefCell<Tables>,
    commits: RefCell<BTreeMap<TablePage, Commit>>,
    checksums: RefCell<checksums::Cache>,
    catalog: RefCell<ShardResult<Catalog>>,
    /// Held while the catalog is written; the sequence of the last write.
    catalog_write: Mutex<u64>,
    /// Why the disk refuses everything, once it does.
    offline: RefCell<Option<String>>,
    writes_in_flight: Cell<u64>,
    writes_ended: Notify,
    stats: DiskStats,
    exercise: RefCell<exercise::Exercise>,
}

impl Disk {
    /// Identity of the disk.
    pub fn id(&self) -> DiskId {
        self.id
    }

    /// Where everything lies on it.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Counters since it was opened.
    pub fn stats(&self) -> &DiskStats {
        &self.stats
    }

    /// Slots by state.
    pub fn slot_counts(&self) -> SlotCounts {
        self.tables.borrow().slot_counts()
    }

    /// Volumes with a fence on the disk, and how many it has room for.
    pub fn volume_counts(&self) -> (usize, u32) {
        (self.tables.borrow().volumes.len(), self.geometry.volumes_max)
    }

    /// Why the disk is offline; none if it is not.
    pub fn offline_reason(&self) -> Option<String> {
        self.offline.borrow().clone()
    }

    /// Makes the disk refuse every request from now on. What is under way still ends by itself.
    /// The first reason stays.
    pub fn set_offline(&self, reason: &str) {
        let mut offline = self.offline.borrow_mut();
        if offline.is_none() {
            tracing::info!(disk = %self.id, reason, "disk goes offline");
            *offline = Some(reason.to_owned());
        }
    }

    /// Takes the disk offline and waits until every write to the device has ended. Only then may
    /// the device be opened again by this process: a late write would hit a slot's next tenant.
    pub async fn close(&self, reason: &str) {
        self.set_offline(reason);
        loop {
            let ended = self.writes_ended.notified();
            if self.writes_in_flight.get() == 0 {
                return;
            }
            ended.await;
        }
    }

    /// Identity and fill. [`ShardError::Offline`] if the disk is offline.
    pub fn info(&self) -> ShardResult<DiskInfo> {
        self.check_online()?;
        let free = self.tables.borrow().free.len();
        Ok(DiskInfo {
            id: self.id,
            cluster: self.cluster,
            slot_bytes: self.geometry.slot_bytes,
            slots: self.geometry.slots,
            slots_free: u32::try_from(free).unwrap_or(u32::MAX),
        })
    }

    fn check_online(&self) -> ShardResult<()> {
        match &*self.offline.borrow() {
            None => Ok(()),
            Some(reason) => Err(ShardError::Offline(reason.clone())),
        }
    }

    fn offline_error(&self) -> ShardError {
        let reason = self.offline_reason();
        ShardError::Offline(reason.unwrap_or_else(|| "the node is stopping".into()))
    }

    /// Durable write, handed to the device by the call itself. The future must be awaited in a
    /// task that nobody drops, so that the end of the write is noticed.
    fn write_device(
        self: &Rc<Self>,
        offset: u64,
        data: Rc<[Bytes]>,
    ) -> impl Future<Output = Result<(), DeviceError>> + 'static {
        let disk = self.clone();
        disk.writes_in_flight.set(disk.writes_in_flight.get() + 1);
        let append = offset >= disk.geometry.block_offset(0, 0);
        let durable = !(append && crate::planted::bug(crate::planted::Bug::DropDurability));
        let write = disk.device.write(offset, data, durable);
        async move {
            let result = write.await;
            disk.writes_in_flight.set(disk.writes_in_flight.get() - 1);
            if disk.writes_in_flight.get() == 0 {
                disk.writes_ended.notify_waiters();
            }
            if result == Err(DeviceError::Gone) {
                disk.set_offline("the device is gone");
            }
            result
        }
    }

    /// Durable write to a table; takes the disk offline if it fails.
    async fn write_table(self: &Rc<Self>, offset: u64, data: Rc<[Bytes]>) -> ShardResult<()> {
        self.check_online()?;
        let bytes = data.iter().map(Bytes::len).sum();
        let running = self.stats.table_writes.start();
        let result = self.write_device(offset, data).await;
        running.finish(bytes, result.is_ok());
        result.map_err(|error| {
            self.set_offline(&format!("writing its tables failed: {error}"));
            self.offline_error()
        })
    }

    /// The answer to a request whose data could not be read or written.
    fn data_error(&self, error: &DeviceError) -> ShardError {
        if *error == DeviceError::Gone {
            self.set_offline("the device is gone");
            return self.offline_error();
        }
        ShardError::Io(error.to_string())
    }
}

/// Runs a request as a task of its own and gives a future of its answer. Dropping the future
/// leaves the request running.
fn detached<T: 'static>(
    request: impl Future<Output = ShardResult<T>> + 'static,
) -> LocalFuture<'static, ShardResult<T>> {
    let task = tokio::task::spawn_local(request);
    Box::pin(async move {
        match task.await {
            Ok(answer) => answer,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(ShardError::Unreachable),
        }
    })
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod crash_tests;
