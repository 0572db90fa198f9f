//! Changing the size of a volume: it grows online, and shrinks while nobody is attached.
//!
//! The store says the new size first. What a shrink cuts off is deleted in the background by whichever
//! head serves, over restarts too (`src/volume/shrink.rs`); until that is done the volume does not grow.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::Node;
use super::volumes::{VolumeSlot, api_error, description};
use crate::admin::error::ApiError;
use crate::admin::types::{ResizeVolume, Volume, VolumeName};
use crate::meta::MetaError;
use crate::meta::record::VolumeRecord;
use crate::meta::schema::SchemaError;
use crate::units::ByteSize;
use crate::volume::head::Head;

/// How long the answer to a shrink waits for what is cut off to be gone.
const CUT_PATIENCE: Duration = Duration::from_secs(10);
/// How long it is counted what would be cut off, to tell.
const COUNT_PATIENCE: Duration = Duration::from_secs(2);
/// Pause before a cut that failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often a change of the store with unknown outcome is tried again.
const STORE_TRIES: u32 = 5;

impl Node {
    /// Changes a volume's size.
    pub(super) async fn resize_volume(
        self: &Rc<Self>,
        name: &VolumeName,
        request: ResizeVolume,
    ) -> Result<Volume, ApiError> {
        let slot = {
            let _lock = self.changes.lock().await;
            let slot = self.find_volume(name)?;
            let head = slot.serving().ok_or_else(|| {
                ApiError::unavailable(format!("volume {name} is not served: {}", slot.why_not()))
            })?;
            let old = slot.record.borrow().size_bytes;
            if request.size < old {
                check_shrink(name, &slot, &head, old, request).await?;
            }
            if request.size > old && slot.record.borrow().cut_from_bytes.is_some() {
                return Err(ApiError::unavailable(format!(
                    "what was cut off volume {name} is still being deleted"
                ))
                .with_hint("try again when `sdsctl volume show` has no \"cutting\" any more"));
            }
            let record = self.store_size(&slot, request.size).await?;
            *slot.record.borrow_mut() = record.clone();
            // Another head may serve by now: it began with one of the two sizes.
            for head in slot.serving().into_iter().chain([head]) {
                head.resize(request.size);
            }
            let current = slot.serving();
            if let Some(head) = current
                && let Err(error) = head.describe(description(&record, &slot.pool)).await
            {
                tracing::warn!(volume = slot.name(), %error, "the root keeps the old size");
            }
            self.mirror_catalog().await;
            slot
        };
        self.go_on_cutting(&slot);
        let cut = async {
            loop {
                let changed = slot.changed.notified();
                if slot.record.borrow().cut_from_bytes.is_none() || slot.closing.get() {
                    return;
                }
                changed.await;
            }
        };
        // It goes on in the background; the answer tells.
        drop(timeout(CUT_PATIENCE, cut).await);
        Ok(self.view_volume(&slot))
    }

    /// Stores a size. After an unknown outcome it is tried again: when a later try succeeds or finds
    /// the size, an earlier one can change nothing any more.
    async fn store_size(&self, slot: &VolumeSlot, size: u64) -> Result<VolumeRecord, ApiError> {
        let mut tries = 1;
        loop {
            match self.schema.resize_volume(slot.id, size).await {
                Err(SchemaError::Store(MetaError::Unknown(_))) if tries < STORE_TRIES => {
                    tries += 1;
                }
                Err(error @ SchemaError::Store(MetaError::Unknown(_))) => {
                    // If it was stored after all, nothing may be written beyond the new end.
                    if let Some(head) = slot.serving().filter(|head| head.size_bytes() > size) {
                        head.resize(size);
                    }
                    return Err(api_error(error).with_hint("repeat it until it succeeds"));
                }
                result => return result.map_err(api_error),
            }
        }
    }

    /// Goes on with the cut of a volume, if one is not done.
    pub(super) fn go_on_cutting(self: &Rc<Self>, slot: &Rc<VolumeSlot>) {
        if slot.record.borrow().cut_from_bytes.is_none() || slot.cutting.replace(true) {
            return;
        }
        let (node, slot) = (self.clone(), slot.clone());
        tokio::task::spawn_local(async move {
            node.cut_until_done(&slot).await;
            slot.cutting.set(false);
        });
    }

    async fn cut_until_done(&self, slot: &VolumeSlot) {
        while !slot.closing.get() && !self.stopping.get() {
            let (size, from) = {
                let record = slot.record.borrow();
                (record.size_bytes, record.cut_from_bytes)
            };
            let Some(from) = from else { return };
            // Each head that comes begins anew.
            let Some(head) = slot.serving() else { return };
            match head.cut_off(from).await {
                Ok(()) => {
                    let _lock = self.changes.lock().await;
                    match self.schema.finish_cut(slot.id, size).await {
                        Ok(record) => {
                            *slot.record.borrow_mut() = record;
                            slot.changed.notify_waiters();
                            self.mirror_catalog().await;
                            continue;
                        }
                        Err(error) => {
                            tracing::warn!(volume = slot.name(), %error, "the store does not know that the cut is done");
                        }
                    }
                }
                Err(error) => {
                    tracing::warn!(volume = slot.name(), %error, "what was cut off is not deleted yet");
                }
            }
            drop(head);
            sleep(RETRY).await;
        }
    }
}

/// Whether a volume may become smaller.
async fn check_shrink(
    name: &VolumeName,
    slot: &VolumeSlot,
    head: &Head,
    old: u64,
    request: ResizeVolume,
) -> Result<(), ApiError> {
    let clients = slot.attached.get();
    if request.force && clients > 0 {
        return Err(ApiError::conflict(format!("volume {name} is attached by {clients} clients"))
            .with_hint("detach them first: they would go on with the old size"));
    }
    if request.force {
        return Ok(());
    }
    let counted = timeout(COUNT_PATIENCE, head.mapped_bytes(request.size, old)).await;
    let used = match counted {
        Ok(Ok(0)) => "nothing was written there".into(),
        Ok(Ok(bytes)) => format!("{} of it hold data", ByteSize(bytes)),
        _ => "it may hold data".into(),
    };
    Err(ApiError::confirmation_required(format!(
        "volume {name} has {}: to make it {} cuts off its last {}; {used}",
        ByteSize(old),
        ByteSize(request.size),
        ByteSize(old - request.size),
    )))
}
