//! What a head tells of itself: for status, metrics and the admin API.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use super::head::{Head, HeadError};
use crate::id::{BLOCK_BYTES, DiskId, Epoch};
use crate::shard::SegmentKind;

/// A head at a glance.
#[derive(Debug, Clone)]
pub struct HeadReport {
    /// Its epoch.
    pub epoch: Epoch,
    /// Bytes that have storage, before redundancy; what the newest checkpoint has not merged yet
    /// may be counted twice.
    pub allocated_bytes: u64,
    /// Sequence of the newest checkpoint.
    pub checkpoint_sequence: u64,
    /// For how long writes have been waiting for disks; none if they do not.
    pub stalled_for: Option<Duration>,
}

impl Head {
    /// What the head has to say of itself.
    pub fn report(&self) -> HeadReport {
        let state = self.state.borrow();
        let segments = || state.table.segments.values();
        let blocks: u64 = segments()
            .filter(|s| s.kind != SegmentKind::Meta)
            .map(|s| u64::from(s.live) + u64::from(s.recent))
            .sum();
        HeadReport {
            epoch: self.authority.epoch,
            allocated_bytes: (blocks * BLOCK_BYTES).min(state.size),
            checkpoint_sequence: state.checkpoint_place().sequence,
            stalled_for: state.stalled_since.map(|since| Instant::now() - since),
        }
    }

    /// Disks of the log set, sorted.
    pub fn log_disks(&self) -> Vec<DiskId> {
        self.state.borrow().root.set.members().iter().map(|member| member.disk).collect()
    }

    /// Stores a new description of the volume in its root, in force when it returns.
    ///
    /// # Errors
    /// [`HeadError::Meta`] while the store is away; [`HeadError::Stopped`].
    pub async fn describe(
        self: &Rc<Self>,
        description: serde_json::Value,
    ) -> Result<(), HeadError> {
        self.swap_root(move |root| root.description = description).await
    }

    /// Stops serving at once, without a last checkpoint: the volume was deleted.
    pub fn abandon(&self, why: &str) {
        self.state.borrow_mut().releasing = true;
        self.stop(why);
    }
}
