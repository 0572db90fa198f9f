//! What a volume that became smaller had beyond its new end is cut off: gone for good, and its space
//! comes back as it goes.
//!
//! The order, and why a crash at any point leaves neither old content that shows again nor space that
//! nobody frees:
//!
//! 1. Whoever runs the head stores the new size together with the old one ("cut from"), in one
//!    transaction. From here on every head begins with the new size, so nobody reaches what is beyond.
//! 2. The head's size is changed. The end is looked at where an operation gets its place in the queue
//!    of the log, so nothing that was under way is queued beyond it from now on; what was queued
//!    before is applied before the barrier with which [`Head::cut_off`] begins.
//! 3. The blocks beyond are trimmed by ordinary records, piece by piece, a checkpoint after each that
//!    held something: its slots come back then. Each piece is durable by itself.
//! 4. When nothing is mapped beyond the end, the store is told that the cut is done. A head that takes
//!    over before begins anew with 2; what is gone already is passed over.
//!
//! The volume may grow again only after 4, so it shows zeroes there. Garbage collection brings nothing
//! back: a move applies only to what is still mapped.

use std::rc::Rc;

use tokio::sync::oneshot;

use super::head::{Head, HeadError, Op};
use super::overlay::Target;
use super::target::wait;
use crate::id::BLOCK_BYTES;
use crate::planted::{Bug, bug};
use crate::segment::record::Entry;
use crate::shard::SlotClass;

impl Head {
    /// Deletes whatever is mapped from the volume's size up to `from` bytes, the size it had before.
    /// Returns when that is durable and the freed segments are deleted. May be called again at any
    /// time; requests go on meanwhile.
    ///
    /// # Errors
    /// [`HeadError`]: some of it may be there still.
    pub async fn cut_off(self: &Rc<Self>, from: u64) -> Result<(), HeadError> {
        let failed = |_| HeadError::Append;
        let mut at = self.size_bytes().div_ceil(BLOCK_BYTES);
        let end = from.div_ceil(BLOCK_BYTES);
        {
            let mut state = self.state.borrow_mut();
            state.reach = state.reach.max(from);
        }
        if bug(Bug::ForgetCut) {
            return Ok(());
        }
        self.barrier(SlotClass::Trim).await.map_err(failed)?;
        while at < end {
            // In steps that end at even places, so that whole pages of the index go.
            let step = self.config.cut_blocks;
            let blocks = (step - at % step).min(end - at);
            self.ensure_lease().await.map_err(failed)?;
            let mapped = self.resolve(at, blocks).await?;
            if mapped.iter().any(|extent| extent.target != Target::Hole) {
                wait(self.trim_beyond(at, blocks)).await.map_err(failed)?;
                self.checkpoint().await?;
            }
            at += blocks;
            tokio::task::yield_now().await;
        }
        let mut state = self.state.borrow_mut();
        state.reach = state.size;
        Ok(())
    }

    /// Queues a trim of blocks beyond the end, where nothing of clients is queued.
    fn trim_beyond(
        &self,
        lba: u64,
        blocks: u64,
    ) -> oneshot::Receiver<Result<(), crate::export::TargetError>> {
        let (done, receiver) = oneshot::channel();
        let entries = vec![Entry::Zero { lba, blocks, allocated: false }];
        self.update_chains(&entries, &[]);
        self.enqueue(Op {
            entries,
            payload: vec![],
            crcs: vec![],
            class: SlotClass::Trim,
            generation: 0,
            done: Some(done),
        });
        receiver
    }

    /// Bytes that are mapped from `from` to `to`, bytes both.
    ///
    /// # Errors
    /// [`HeadError`] if the index cannot be read.
    pub async fn mapped_bytes(&self, from: u64, to: u64) -> Result<u64, HeadError> {
        let (mut at, end) = (from.div_ceil(BLOCK_BYTES), to.div_ceil(BLOCK_BYTES));
        let mut blocks = 0;
        while at < end {
            let step = self.config.cut_blocks.min(end - at);
            let mapped = self.resolve(at, step).await?;
            let used = mapped.iter().filter(|extent| extent.target != Target::Hole);
            blocks += used.map(|extent| extent.len).sum::<u64>();
            at += step;
            tokio::task::yield_now().await;
        }
        Ok(blocks * BLOCK_BYTES)
    }
}
