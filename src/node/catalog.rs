//! The keys of the store, mirrored to every disk.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use super::{Node, NodeError};
use crate::meta::catalog;
use crate::meta::schema::{VOLUME_NAME_PREFIX, VOLUME_PREFIX};
use crate::shard::{CATALOG_BYTES_MAX, Catalog};

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

    /// A store that is older than what a disk has seen counts as lost.
    pub(super) fn check_store_is_newest(&self) -> Result<(), NodeError> {
        let found = (self.identity.incarnation, self.identity.revision);
        for slot in self.slots() {
            let Some(disk) = slot.disk() else { continue };
            let Ok(catalog) = disk.get_catalog() else { continue };
            let seen = (catalog.incarnation, catalog.revision);
            if seen > found {
                return Err(NodeError::StoreBehind { found, seen, disk: slot.id });
            }
        }
        Ok(())
    }
}
