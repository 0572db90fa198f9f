//! The keys of the store, mirrored to every disk; and whether the store is as new as the disks are.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use super::{Node, NodeError};
use crate::id::{DiskId, Epoch};
use crate::meta::envelope::EnvelopeError;
use crate::meta::schema::{ROOT_PREFIX, VOLUME_NAME_PREFIX, VOLUME_PREFIX, root_key, volume_key};
use crate::meta::{Versioned, catalog};
use crate::shard::{CATALOG_BYTES_MAX, Catalog, VolumeFence};
use crate::volume::root::Root;

/// How long one disk may take to store the catalog.
const PATIENCE: Duration = Duration::from_secs(2);

impl Node {
    /// Stores the keys on every disk that is online. A disk that fails here has them the next
    /// time.
    pub(super) async fn mirror_catalog(&self) {
        let (revision, mut entries) = match catalog::collect(&**self.schema.store()).await {
            Ok(collected) => collected,
            Err(error) => {
                tracing::warn!(%error, "the store's keys are not mirrored to the disks");
                return;
            }
        };
        let bytes = |entries: &[(String, bytes::Bytes)]| -> usize {
            entries.iter().map(|(key, value)| key.len() + value.len() + 6).sum()
        };
        if bytes(&entries) > CATALOG_BYTES_MAX - 64 {
            // Each volume's own record is in its root, which is mirrored too.
            entries.retain(|(key, _)| {
                !key.starts_with(VOLUME_PREFIX) && !key.starts_with(VOLUME_NAME_PREFIX)
            });
        }
        let data = match catalog::encode(&entries) {
            Ok(data) => data,
            Err(error) => {
                tracing::error!(%error, "the store's keys cannot be mirrored to the disks");
                return;
            }
        };
        let incarnation = self.identity.incarnation;
        let puts = self.registry.ids().into_iter().filter_map(|disk| {
            let client = self.registry.client(disk)?;
            let catalog = Catalog { incarnation, revision, data: data.clone() };
            Some(async move {
                match timeout(PATIENCE, client.put_catalog(catalog)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::warn!(%disk, %error, "catalog not stored"),
                    Err(_) => tracing::warn!(%disk, "the disk does not store the catalog"),
                }
            })
        });
        join_all(puts).await;
    }

    /// A store that is older than what a disk has seen counts as lost. Disks are read before the store,
    /// and nobody else reaches those of this node yet.
    pub(super) async fn check_store_is_newest(&self) -> Result<(), NodeError> {
        let found = (self.identity.incarnation, self.identity.revision);
        let mut fences = Vec::new();
        for slot in self.slots() {
            let Some(disk) = slot.disk() else { continue };
            fences.extend(disk.volumes().unwrap_or_default().into_iter().map(|f| (slot.id, f)));
            let Ok(catalog) = disk.get_catalog() else { continue };
            let seen = (catalog.incarnation, catalog.revision);
            if seen > found {
                return Err(NodeError::StoreBehind { found, seen, disk: slot.id });
            }
        }
        fences.retain(|(_, fence)| fence.epoch != Epoch::TOMBSTONE);
        if fences.is_empty() {
            return Ok(());
        }
        let store = self.schema.store();
        let (roots, volumes) = (store.list(ROOT_PREFIX).await?, store.list(VOLUME_PREFIX).await?);
        let roots: BTreeMap<&str, &Versioned> =
            roots.entries.iter().map(|(key, found)| (key.as_str(), found)).collect();
        let known: BTreeSet<&str> = volumes.entries.iter().map(|(key, _)| key.as_str()).collect();
        for (disk, fence) in fences {
            let (root, record) = (root_key(fence.volume), volume_key(fence.volume));
            let root = roots.get(root.as_str()).map(|found| Root::decode(&found.value));
            self.check_root_is_newest(disk, &fence, root, known.contains(record.as_str()))?;
        }
        Ok(())
    }

    /// Compares what a disk remembers of a volume with the store. Roots are mirrored when they are the store's, and a
    /// volume that is deleted stays in the store until every disk confirmed that.
    fn check_root_is_newest(
        &self,
        disk: DiskId,
        fence: &VolumeFence,
        root: Option<Result<Root, EnvelopeError>>,
        known: bool,
    ) -> Result<(), NodeError> {
        let volume = fence.volume;
        let behind =
            |seen: String, found: String| Err(NodeError::RootBehind { disk, volume, seen, found });
        let told = |(epoch, sequence): (Epoch, u64)| format!("root {epoch}.{sequence}");
        match (root, fence.mirror.as_ref().map(|mirror| mirror.revision)) {
            (Some(Ok(root)), Some(seen)) if seen > (root.epoch, root.sequence) => {
                behind(told(seen), told((root.epoch, root.sequence)))
            }
            (None, _) if !known => {
                let own = fence.epoch.incarnation() == u64::from(self.identity.incarnation);
                // The fence of a recovery, which left the volume out, has no count.
                if own && fence.epoch.count() > 0 {
                    return behind(format!("epoch {}", fence.epoch), "never heard of it".into());
                }
                tracing::warn!(%disk, %volume, "the store does not know the volume: what the disk holds of it is kept");
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
