//! Deleting shards from disks: bounded, and believed only when a disk confirms it.
//!
//! A trim of a large volume frees thousands of shards at once, and a take-over may find as many. Knows
//! nothing of why a shard may go: that is its caller's.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::pin::pin;

use futures_util::stream::{self, StreamExt};

use super::segtab::ShardRef;
use crate::id::SegmentId;
use crate::segment::open::CONTROL_PATIENCE;
use crate::shard::disks::{DELETES_MAX, Disks};
use crate::shard::{Authority, ShardClient, ShardError};

/// Deletes shards, a bounded number at a time, and hears which of them are surely gone. A disk that
/// does not answer one in time is asked for no more of them.
pub(super) async fn delete_shards(
    disks: &Disks,
    authority: Authority,
    shards: Vec<(SegmentId, ShardRef)>,
    mut confirmed: impl FnMut((SegmentId, ShardRef)),
) {
    let silent = RefCell::new(BTreeSet::new());
    let deletes = stream::iter(shards).map(|(segment, shard)| {
        let silent = &silent;
        async move {
            let _permit = disks.delete_permit().await;
            let gone = match disks.client(shard.disk) {
                Some(client) if !silent.borrow().contains(&shard.disk) => {
                    delete_shard(disks, &*client, authority, segment, shard).await
                }
                _ => Some(false),
            };
            if gone.is_none() {
                silent.borrow_mut().insert(shard.disk);
            }
            (gone == Some(true)).then_some((segment, shard))
        }
    });
    let mut deletes = pin!(deletes.buffer_unordered(DELETES_MAX));
    while let Some(shard) = deletes.next().await {
        shard.into_iter().for_each(&mut confirmed);
    }
}

/// Deletes one shard. True if it is surely gone, none if the disk does not answer in time.
async fn delete_shard(
    disks: &Disks,
    client: &dyn ShardClient,
    authority: Authority,
    segment: SegmentId,
    shard: ShardRef,
) -> Option<bool> {
    let delete = client.delete(authority, segment, shard.creation);
    match tokio::time::timeout(CONTROL_PATIENCE, delete).await {
        Ok(Ok(())) => {
            disks.gave(shard.disk);
            Some(true)
        }
        Ok(Err(ShardError::Gone)) => Some(true),
        Ok(Err(_)) => Some(false),
        Err(_) => {
            tracing::debug!(%segment, disk = %shard.disk, "not deleted yet");
            None
        }
    }
}
