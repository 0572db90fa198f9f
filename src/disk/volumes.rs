//! Fences, root mirrors, tombstones, and lists of what the disk holds.

use std::rc::Rc;

use crate::disk::stats::add;
use crate::disk::tables::{TablePage, damaged};
use crate::disk::{Disk, detached};
use crate::id::{Epoch, VolumeId};
use crate::shard::{
    Authority, LocalFuture, MIRROR_BYTES_MAX, Mirror, ShardError, ShardResult, VolumeFence,
    VolumeOnDisk,
};

impl Disk {
    /// Raises the fence of the authority's volume to it, durably, and stores a newer mirror.
    pub(super) async fn raise(
        self: &Rc<Self>,
        authority: Authority,
        mirror: Option<Mirror>,
    ) -> ShardResult<()> {
        if authority.volume.is_nil() || authority.epoch == Epoch::TOMBSTONE {
            return Err(ShardError::Invalid("no head has this volume or epoch".into()));
        }
        if mirror.as_ref().is_some_and(|mirror| mirror.data.len() > MIRROR_BYTES_MAX) {
            return Err(ShardError::Invalid("the root mirror is too long".into()));
        }
        let (page, changed) = self.tables.borrow_mut().raise(authority, mirror)?;
        self.commit_or_settle(page, changed).await
    }

    async fn commit_or_settle(self: &Rc<Self>, page: TablePage, changed: bool) -> ShardResult<()> {
        if changed { self.commit(page).await } else { self.settled(page).await }
    }

    /// See [`crate::shard::ShardClient::fence`]. Appends of older epochs are refused from the
    /// call on.
    pub fn fence(
        self: &Rc<Self>,
        authority: Authority,
        mirror: Option<Mirror>,
    ) -> LocalFuture<'static, ShardResult<VolumeOnDisk>> {
        let disk = self.clone();
        detached(async move {
            disk.check_online()?;
            disk.raise(authority, mirror).await?;
            disk.wait_older_reaped(authority).await;
            disk.check_online()?;
            let tables = disk.tables.borrow();
            tables.authorize(authority)?;
            add(&disk.stats.fences, 1);
            tables.list(authority.volume)
        })
    }

    /// Waits for the appends of epochs before the authority's.
    async fn wait_older_reaped(&self, authority: Authority) {
        let writers: Vec<_> = {
            let tables = self.tables.borrow();
            let slots = tables.slots_of(authority.volume).into_iter();
            slots
                .map(|number| &tables.slots[number as usize])
                .filter(|slot| slot.record.as_ref().is_some_and(|r| r.epoch < authority.epoch))
                .filter_map(|slot| slot.writer.clone())
                .collect()
        };
        for writer in writers {
            writer.wait_reaped().await;
        }
    }

    /// See [`crate::shard::ShardClient::probe`].
    pub fn probe(&self, authority: Authority) -> ShardResult<()> {
        self.check_online()?;
        let tables = self.tables.borrow();
        if tables.fence_of(authority.volume)?.is_none() {
            return Err(ShardError::Gone);
        }
        tables.authorize(authority)
    }

    /// See [`crate::shard::ShardClient::mirror`].
    pub fn mirror(
        self: &Rc<Self>,
        authority: Authority,
        mirror: Mirror,
    ) -> LocalFuture<'static, ShardResult<()>> {
        let disk = self.clone();
        detached(async move {
            disk.check_online()?;
            {
                let tables = disk.tables.borrow();
                let Some(found) = tables.fence_of(authority.volume)? else {
                    return Err(ShardError::Gone);
                };
                tables.authorize(authority)?;
                if found.record.epoch != authority.epoch {
                    let reason = "the disk was not fenced by this epoch";
                    return Err(ShardError::Invalid(reason.into()));
                }
            }
            disk.raise(authority, Some(mirror)).await
        })
    }

    /// See [`crate::shard::ShardClient::list`].
    pub fn list(&self, volume: VolumeId) -> ShardResult<VolumeOnDisk> {
        self.check_online()?;
        self.tables.borrow().list(volume)
    }

    /// See [`crate::shard::ShardClient::volumes`].
    pub fn volumes(&self) -> ShardResult<Vec<VolumeFence>> {
        self.check_online()?;
        let tables = self.tables.borrow();
        if tables.damaged_volume_pages > 0 {
            return Err(damaged("volume", tables.damaged_volume_pages));
        }
        Ok(tables.fences())
    }

    /// See [`crate::shard::ShardClient::drop_volume`].
    pub fn drop_volume(self: &Rc<Self>, volume: VolumeId) -> LocalFuture<'static, ShardResult<()>> {
        let disk = self.clone();
        detached(async move {
            disk.check_online()?;
            if volume.is_nil() {
                return Err(ShardError::Invalid("no volume has this id".into()));
            }
            let (page, changed) = disk.tables.borrow_mut().bury(volume)?;
            disk.commit_or_settle(page, changed).await?;
            let shards: Vec<_> = {
                let tables = disk.tables.borrow();
                let slots = tables.slots_of(volume).into_iter();
                let records = slots.filter_map(|n| tables.slots[n as usize].record.clone());
                records.map(|record| (record.spec.segment, record.spec.creation)).collect()
            };
            // All at once: entries that share a page share its write.
            let removals = shards.iter().map(|(segment, creation)| {
                let disk = disk.clone();
                async move { disk.remove(volume, *segment, *creation).await }
            });
            for result in futures_util::future::join_all(removals).await {
                match result {
                    Ok(()) | Err(ShardError::Gone) => {}
                    Err(error) => return Err(error),
                }
            }
            disk.tables.borrow().list(volume).map(|_| ())
        })
    }

    /// See [`crate::shard::ShardClient::forget_volume`]. [`ShardError::Invalid`] if the volume
    /// was not dropped, or its shards are not deleted yet.
    pub fn forget_volume(
        self: &Rc<Self>,
        volume: VolumeId,
    ) -> LocalFuture<'static, ShardResult<()>> {
        let disk = self.clone();
        detached(async move {
            disk.check_online()?;
            let page = {
                let mut tables = disk.tables.borrow_mut();
                if tables.fence_of(volume)?.is_none() {
                    return Ok(());
                }
                let shards = !tables.slots_of(volume).is_empty();
                if shards || tables.damaged_slot_pages > 0 {
                    let reason = "shards of the volume are or may be left";
                    return Err(ShardError::Invalid(reason.into()));
                }
                let entry = tables.volumes.get_mut(&volume).expect("looked up above");
                if entry.record.epoch != Epoch::TOMBSTONE {
                    return Err(ShardError::Invalid("the volume is not deleted".into()));
                }
                entry.forgotten = true;
                entry.page
            };
            disk.commit(TablePage::Volumes(page)).await?;
            let mut tables = disk.tables.borrow_mut();
            if tables.volumes.get(&volume).is_some_and(|v| v.forgotten && v.page == page) {
                tables.volumes.remove(&volume);
                tables.volume_pages_free.insert(page);
            }
            Ok(())
        })
    }
}
