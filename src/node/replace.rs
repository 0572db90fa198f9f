//! A disk is replaced by another: the new one is taken in, what the old one holds is rebuilt there
//! first of all, and the old one is removed when nothing needs it.
//!
//! The order is kept with the old disk's record, so it outlives restarts: the disk is to be removed, and
//! who its *heir* is. It goes on as for any disk that is to be removed ([`super::pools`]); putting the old disk
//! online again ends it. The heir is a preference of repair only ([`Disks::heir`]): what cannot go there goes
//! elsewhere. The old disk may be dead, and the new one may be at its path.
//!
//! [`Disks::heir`]: crate::shard::disks::Disks::heir

use std::rc::Rc;

use super::Node;
use super::disks::DiskSlot;
use crate::admin::error::ApiError;
use crate::admin::types::{AddDisk, Disk, DiskState as Shown};
use crate::id::DiskId;
use crate::meta::record::DiskState;

impl Node {
    /// Has a disk at a path take the place of another; the new one is shown. Returns when the order is
    /// noted; the old disk is removed once it is empty.
    pub(super) async fn replace_disk(
        self: &Rc<Self>,
        id: DiskId,
        request: AddDisk,
    ) -> Result<Disk, ApiError> {
        request.check()?;
        let old = self.find_disk(id)?;
        self.check_removable(id)?;
        let heir = self.heir_at(&old, request).await?;
        let _lock = self.changes.lock().await;
        // What needs the old disk may have changed while the new one was formatted.
        self.check_removable(id)?;
        self.update_disk(id, |record| {
            record.removing = true;
            record.heir = Some(heir.id);
            record.state = match record.state {
                DiskState::Online => DiskState::Draining,
                DiskState::SetAside => DiskState::Offline,
                state => state,
            };
        })
        .await?;
        self.registry.set_heir(id, Some(heir.id));
        if old.is_online() {
            self.begin_draining(&old);
        } else {
            self.registry.forget(id);
        }
        self.tell_lost(id);
        self.mirror_catalog().await;
        Ok(self.view_disk(&heir))
    }

    /// The disk at the path that is asked for: one that serves already, or a new one.
    async fn heir_at(
        self: &Rc<Self>,
        old: &Rc<DiskSlot>,
        request: AddDisk,
    ) -> Result<Rc<DiskSlot>, ApiError> {
        let path = request.path.clone();
        let there = self.slots().into_iter().find(|slot| slot.path() == path);
        match there {
            Some(slot) if slot.id != old.id && slot.state.get() == Shown::Online => Ok(slot),
            Some(slot) if slot.id != old.id => Err(ApiError::conflict(format!(
                "disk {} at {path} is {}: it cannot take the place of another",
                slot.id,
                slot.state.get()
            ))),
            Some(_) if old.is_online() => {
                Err(ApiError::conflict(format!("{path} is disk {} itself", old.id)))
            }
            Some(_) => {
                // The new one is in the old one's place, which will not be found there again.
                let moved = format!("{path} (replaced)");
                self.update_disk(old.id, |record| record.path.clone_from(&moved)).await?;
                let added = self.add_disk(request).await;
                if added.is_err() {
                    self.update_disk(old.id, |record| record.path.clone_from(&path)).await?;
                }
                self.find_disk(added?.id)
            }
            None => {
                let added = self.add_disk(request).await?;
                self.find_disk(added.id)
            }
        }
    }
}
