//! A small read or durable write that changes nothing: how long does the device take now?

use std::rc::Rc;

use bytes::Bytes;

use crate::disk::geometry::SUPERBLOCK_OFFSETS;
use crate::disk::open::read_copy;
use crate::disk::{Disk, detached};
use crate::shard::{LocalFuture, ShardError, ShardResult};

/// What is written: the second copy of the superblock, as it is.
#[derive(Default)]
pub(super) struct Exercise {
    page: Option<Bytes>,
    running: bool,
}

impl Disk {
    /// See [`crate::shard::ShardClient::exercise`].
    pub fn exercise(self: &Rc<Self>, write: bool) -> LocalFuture<'static, ShardResult<()>> {
        let disk = self.clone();
        detached(async move {
            disk.check_online()?;
            if std::mem::replace(&mut disk.exercise.borrow_mut().running, true) {
                return Err(ShardError::Unreachable);
            }
            let result = disk.exercise_alone(write).await;
            disk.exercise.borrow_mut().running = false;
            result
        })
    }

    async fn exercise_alone(self: &Rc<Self>, write: bool) -> ShardResult<()> {
        let page = self.exercise.borrow().page.clone();
        let page = match page {
            Some(page) if write => page,
            _ => {
                let offset = SUPERBLOCK_OFFSETS[usize::from(write)];
                let superblock = read_copy(&*self.device, offset).await.map_err(|e| match e {
                    Ok(fault) => ShardError::Damaged(format!("its superblock: {fault}")),
                    Err(error) => self.data_error(&error),
                })?;
                if !write {
                    return Ok(());
                }
                let page = superblock.encode().freeze();
                self.exercise.borrow_mut().page = Some(page.clone());
                page
            }
        };
        // Only the second copy: the first is whole, whatever becomes of the write.
        self.check_online()?;
        let written = self.write_device(SUPERBLOCK_OFFSETS[1], Rc::from([page])).await;
        written.map_err(|error| self.data_error(&error))
    }
}
