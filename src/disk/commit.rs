//! Durable writes of table pages, with one writer and group commit per page.
//!
//! A page has two copies. Both are written before a change counts as durable, one after the
//! other: whatever a crash tears, one copy is whole, and whatever a medium loses of one copy
//! afterwards, the other is not older. (Writing only the older copy would let a single lost write
//! or flipped bit bring back an old fence.)

use std::rc::Rc;

use bytes::Bytes;
use tokio::sync::oneshot;

use crate::buffer::AlignedBuf;
use crate::disk::Disk;
use crate::disk::tables::TablePage;
use crate::id::BLOCK_SIZE;
use crate::shard::ShardResult;

/// Requests that wait for a page.
#[derive(Default)]
pub(super) struct Commit {
    /// Those whose change is in the write that is running.
    current: Vec<oneshot::Sender<ShardResult<()>>>,
    /// Those whose change came later.
    next: Vec<oneshot::Sender<ShardResult<()>>>,
}

impl Disk {
    /// Writes the page as it is now, and waits until that is durable. The change must have been
    /// made in the tables before the call. Requests that come while a write runs share the next.
    pub(super) async fn commit(self: &Rc<Self>, page: TablePage) -> ShardResult<()> {
        let (reply, answer) = oneshot::channel();
        {
            let mut commits = self.commits.borrow_mut();
            let idle = !commits.contains_key(&page);
            commits.entry(page).or_default().next.push(reply);
            if idle {
                let disk = self.clone();
                tokio::task::spawn_local(async move { disk.run_commits(page).await });
            }
        }
        answer.await.unwrap_or_else(|_| Err(self.offline_error()))
    }

    /// Waits until all changes made to the page so far are durable. [`ShardError::Offline`] if one
    /// of them may never be: whatever fails to be written takes the disk offline.
    ///
    /// [`ShardError::Offline`]: crate::shard::ShardError::Offline
    pub(super) async fn settled(self: &Rc<Self>, page: TablePage) -> ShardResult<()> {
        let (reply, answer) = oneshot::channel();
        match self.commits.borrow_mut().get_mut(&page) {
            None => return self.check_online(),
            Some(commit) if commit.next.is_empty() => commit.current.push(reply),
            Some(commit) => commit.next.push(reply),
        }
        answer.await.unwrap_or_else(|_| Err(self.offline_error()))
    }

    async fn run_commits(self: Rc<Self>, page: TablePage) {
        loop {
            let mut buf = AlignedBuf::new(BLOCK_SIZE);
            {
                let mut commits = self.commits.borrow_mut();
                let commit = commits.get_mut(&page).expect("removed only below");
                if commit.next.is_empty() {
                    commits.remove(&page);
                    return;
                }
                commit.current = std::mem::take(&mut commit.next);
                self.tables.borrow_mut().encode(page, &mut buf);
            }
            let result = self.write_both(page, buf.freeze()).await;
            let mut commits = self.commits.borrow_mut();
            let commit = commits.get_mut(&page).expect("removed only here");
            let mut waiting = std::mem::take(&mut commit.current);
            if result.is_err() {
                // The disk is offline now: nothing later will be written either.
                waiting.append(&mut commit.next);
            }
            for reply in waiting {
                drop(reply.send(result.clone()));
            }
        }
    }

    async fn write_both(self: &Rc<Self>, page: TablePage, data: Bytes) -> ShardResult<()> {
        for copy in 0..2 {
            let offset = match page {
                TablePage::Slots(number) => self.geometry.slot_page_offset(number, copy),
                TablePage::Volumes(number) => self.geometry.volume_page_offset(number, copy),
            };
            self.write_table(offset, Rc::from([data.clone()])).await?;
        }
        Ok(())
    }
}
