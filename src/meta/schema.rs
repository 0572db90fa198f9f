//! The keys of sds and what may be done with them, each as one transaction.
//!
//! | key | record |
//! | --- | --- |
//! | `/sds/cluster` | [`ClusterRecord`] |
//! | `/sds/node` | [`NodeRecord`](record::NodeRecord): the one node that uses the store, if that is shared |
//! | `/sds/disk/<disk id>` | [`DiskRecord`] |
//! | `/sds/pool/<name>` | [`PoolRecord`] |
//! | `/sds/volume/<volume id>` | [`VolumeRecord`]; in state `deleting` the volume's tombstone |
//! | `/sds/volume-name/<pool>/<name>` | [`VolumeNameRecord`] |
//! | `/sds/root/<volume id>` | the volume's root, opaque |
//! | `/sds/scrub/<volume id>` | where the volume's scrub stands, opaque; may be missing |
//!
//! # Invariants
//!
//! - A name key exists if and only if its volume is active; its pool exists then.
//! - A root exists only while its volume is active: deleting the volume deletes the root with
//!   it, after which no head can swap one in.
//! - A volume's record is there from its creation until every disk confirmed the deletion.

use std::rc::Rc;

use bytes::Bytes;

use super::envelope::EnvelopeError;
use super::members::{PlaceRecord, place_key};
use super::record::{
    self, ClusterRecord, DiskRecord, PoolRecord, Record, VolumeNameRecord, VolumeRecord,
    VolumeState,
};
use super::{Condition, MetaError, MetaStore, Txn};
use crate::id::{DiskId, VolumeId};

/// Key of the [`ClusterRecord`].
pub const CLUSTER_KEY: &str = "/sds/cluster";
/// Key of the [`NodeRecord`](record::NodeRecord).
pub const NODE_KEY: &str = "/sds/node";
/// Prefix of the keys of disks.
pub const DISK_PREFIX: &str = "/sds/disk/";
/// Prefix of the keys of pools.
pub const POOL_PREFIX: &str = "/sds/pool/";
/// Prefix of the keys of volumes.
pub const VOLUME_PREFIX: &str = "/sds/volume/";
/// Prefix of the keys of volumes' names.
pub const VOLUME_NAME_PREFIX: &str = "/sds/volume-name/";
/// Prefix of the keys of roots.
pub const ROOT_PREFIX: &str = "/sds/root/";

/// Prefix of the keys of scrubs.
pub const SCRUB_PREFIX: &str = "/sds/scrub/";

/// How often a change is tried again when another one came between.
pub(super) const TRIES_MAX: usize = 16;

/// Key of a disk.
pub fn disk_key(id: DiskId) -> String {
    format!("{DISK_PREFIX}{id}")
}
/// Key of a pool.
pub fn pool_key(name: &str) -> String {
    format!("{POOL_PREFIX}{name}")
}
/// Key of a volume.
pub fn volume_key(id: VolumeId) -> String {
    format!("{VOLUME_PREFIX}{id}")
}
/// Key of a volume's name.
pub fn volume_name_key(pool: &str, name: &str) -> String {
    format!("{VOLUME_NAME_PREFIX}{pool}/{name}")
}
/// Key of a volume's root.
pub fn root_key(id: VolumeId) -> String {
    format!("{ROOT_PREFIX}{id}")
}

/// Key of where a volume's scrub stands.
pub fn scrub_key(id: VolumeId) -> String {
    format!("{SCRUB_PREFIX}{id}")
}

/// Why something could not be looked up or changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchemaError {
    /// The store failed; see [`MetaError`] for whether the change was made.
    #[error(transparent)]
    Store(#[from] MetaError),
    /// A record of the store cannot be understood.
    #[error("{key}: {source}")]
    Record {
        /// Its key.
        key: String,
        /// What is wrong.
        source: EnvelopeError,
    },
    /// What is asked for is not allowed; the sentence says why.
    #[error("{0}")]
    Invalid(String),
    /// There is one already.
    #[error("{0} exists already")]
    Exists(String),
    /// There is none.
    #[error("there is no {0}")]
    NotFound(String),
    /// A pool that holds volumes is not removed.
    #[error("pool '{0}' holds volumes: remove them first")]
    PoolInUse(String),
    /// Others changed the same keys again and again.
    #[error("{0} is being changed by others: try again")]
    Busy(String),
}

/// Result of a request.
pub type SchemaResult<T> = Result<T, SchemaError>;

/// A record and the revision to name when changing it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored<R> {
    /// The record.
    pub record: R,
    /// Revision of the transaction that wrote it.
    pub revision: u64,
}

/// The store, as records.
#[derive(Clone)]
pub struct Schema {
    store: Rc<dyn MetaStore>,
}

fn encode<R: Record>(record: &R) -> SchemaResult<Bytes> {
    match record::encode(record) {
        Ok(bytes) => Ok(bytes.into()),
        Err(EnvelopeError::Payload { reason, .. }) => Err(SchemaError::Invalid(reason)),
        Err(error) => Err(SchemaError::Invalid(error.to_string())),
    }
}

fn decode<R: Record>(key: &str, bytes: &[u8]) -> SchemaResult<R> {
    record::decode(bytes).map_err(|source| SchemaError::Record { key: key.into(), source })
}

impl Schema {
    /// The records in `store`.
    pub fn new(store: Rc<dyn MetaStore>) -> Self {
        Self { store }
    }

    /// The store.
    pub fn store(&self) -> &Rc<dyn MetaStore> {
        &self.store
    }

    pub(super) async fn read<R: Record>(&self, key: &str) -> SchemaResult<Option<Stored<R>>> {
        let Some(found) = self.store.get(key).await? else { return Ok(None) };
        Ok(Some(Stored { record: decode(key, &found.value)?, revision: found.revision }))
    }

    async fn read_all<R: Record>(&self, prefix: &str) -> SchemaResult<Vec<Stored<R>>> {
        let listing = self.store.list(prefix).await?;
        let stored = |(key, found): &(String, super::Versioned)| {
            Ok(Stored { record: decode(key, &found.value)?, revision: found.revision })
        };
        listing.entries.iter().map(stored).collect()
    }

    /// Whether the transaction was committed.
    pub(super) async fn commit(&self, txn: Txn) -> SchemaResult<bool> {
        Ok(self.store.txn(txn).await?.committed().is_some())
    }

    /// Makes an empty store the store of a cluster.
    ///
    /// # Errors
    /// [`SchemaError::Exists`] if it is a cluster's already, [`SchemaError::Store`].
    pub async fn initialise(&self, cluster: &ClusterRecord) -> SchemaResult<()> {
        let txn = Txn::new()
            .when(Condition::KeyMissing(CLUSTER_KEY.into()))
            .put(CLUSTER_KEY, encode(cluster)?);
        if self.commit(txn).await? { Ok(()) } else { Err(SchemaError::Exists("a cluster".into())) }
    }

    /// All disks, sorted by id; removed ones too.
    ///
    /// # Errors
    /// [`SchemaError::Store`], [`SchemaError::Record`].
    pub async fn disks(&self) -> SchemaResult<Vec<Stored<DiskRecord>>> {
        self.read_all(DISK_PREFIX).await
    }

    /// Adds a disk.
    ///
    /// # Errors
    /// [`SchemaError::Exists`], [`SchemaError::Invalid`], [`SchemaError::Store`].
    pub async fn add_disk(&self, disk: &DiskRecord) -> SchemaResult<()> {
        let key = disk_key(disk.id);
        let txn = Txn::new().when(Condition::KeyMissing(key.clone())).put(key, encode(disk)?);
        if self.commit(txn).await? {
            return Ok(());
        }
        Err(SchemaError::Exists(format!("disk {}", disk.id)))
    }

    /// Changes a disk: `change` may run several times and refuses with a sentence. Gives the
    /// record as it is then.
    ///
    /// # Errors
    /// [`SchemaError::NotFound`], [`SchemaError::Invalid`], [`SchemaError::Busy`],
    /// [`SchemaError::Store`], [`SchemaError::Record`].
    pub async fn update_disk(
        &self,
        id: DiskId,
        change: impl Fn(&mut DiskRecord) -> Result<(), String>,
    ) -> SchemaResult<DiskRecord> {
        self.update(&disk_key(id), || format!("disk {id}"), change).await
    }

    pub(super) async fn update<R: Record + Clone + PartialEq>(
        &self,
        key: &str,
        name: impl Fn() -> String,
        change: impl Fn(&mut R) -> Result<(), String>,
    ) -> SchemaResult<R> {
        for _ in 0..TRIES_MAX {
            let old: Stored<R> =
                self.read(key).await?.ok_or_else(|| SchemaError::NotFound(name()))?;
            let mut new = old.record.clone();
            change(&mut new).map_err(SchemaError::Invalid)?;
            if new == old.record {
                return Ok(new);
            }
            let txn =
                Txn::new().when(Condition::KeyAt(key.into(), old.revision)).put(key, encode(&new)?);
            if self.commit(txn).await? {
                return Ok(new);
            }
        }
        Err(SchemaError::Busy(name()))
    }

    /// All pools, sorted by name.
    ///
    /// # Errors
    /// [`SchemaError::Store`], [`SchemaError::Record`].
    pub async fn pools(&self) -> SchemaResult<Vec<Stored<PoolRecord>>> {
        self.read_all(POOL_PREFIX).await
    }

    /// The pool with this name.
    ///
    /// # Errors
    /// [`SchemaError::NotFound`], [`SchemaError::Store`], [`SchemaError::Record`].
    pub async fn pool(&self, name: &str) -> SchemaResult<Stored<PoolRecord>> {
        record::check_name("pool", name).map_err(SchemaError::Invalid)?;
        let found = self.read(&pool_key(name)).await?;
        found.ok_or_else(|| SchemaError::NotFound(format!("pool '{name}'")))
    }

    /// Creates a pool. Whether the disks can carry it is for the caller to know.
    ///
    /// # Errors
    /// [`SchemaError::Exists`], [`SchemaError::Invalid`], [`SchemaError::Store`].
    pub async fn create_pool(&self, pool: &PoolRecord) -> SchemaResult<()> {
        let key = pool_key(&pool.name);
        let txn = Txn::new().when(Condition::KeyMissing(key.clone())).put(key, encode(pool)?);
        if self.commit(txn).await? {
            return Ok(());
        }
        Err(SchemaError::Exists(format!("pool '{}'", pool.name)))
    }

    /// Removes a pool without active volumes.
    ///
    /// # Errors
    /// [`SchemaError::NotFound`], [`SchemaError::PoolInUse`], [`SchemaError::Busy`],
    /// [`SchemaError::Store`].
    pub async fn remove_pool(&self, name: &str) -> SchemaResult<()> {
        for _ in 0..TRIES_MAX {
            let pool = self.pool(name).await?;
            let volumes = volume_name_key(name, "");
            let txn = Txn::new()
                .when(Condition::KeyAt(pool_key(name), pool.revision))
                .when(Condition::PrefixEmpty(volumes.clone()))
                .delete(pool_key(name));
            if self.commit(txn).await? {
                return Ok(());
            }
            if !self.store.list(&volumes).await?.entries.is_empty() {
                return Err(SchemaError::PoolInUse(name.into()));
            }
        }
        Err(SchemaError::Busy(format!("pool '{name}'")))
    }

    /// All volumes, tombstones too, sorted by id.
    ///
    /// # Errors
    /// [`SchemaError::Store`], [`SchemaError::Record`].
    pub async fn volumes(&self) -> SchemaResult<Vec<Stored<VolumeRecord>>> {
        self.read_all(VOLUME_PREFIX).await
    }

    /// The volume with this id, in whatever state; none if it never was or is gone altogether.
    ///
    /// # Errors
    /// [`SchemaError::Store`], [`SchemaError::Record`].
    pub async fn volume(&self, id: VolumeId) -> SchemaResult<Option<Stored<VolumeRecord>>> {
        self.read(&volume_key(id)).await
    }

    /// The active volume with this name.
    ///
    /// # Errors
    /// [`SchemaError::NotFound`], [`SchemaError::Invalid`], [`SchemaError::Store`],
    /// [`SchemaError::Record`].
    pub async fn volume_by_name(
        &self,
        pool: &str,
        name: &str,
    ) -> SchemaResult<Stored<VolumeRecord>> {
        record::check_name("pool", pool).map_err(SchemaError::Invalid)?;
        record::check_name("volume", name).map_err(SchemaError::Invalid)?;
        let missing = || SchemaError::NotFound(format!("volume '{pool}/{name}'"));
        let named: Option<Stored<VolumeNameRecord>> =
            self.read(&volume_name_key(pool, name)).await?;
        let id = named.ok_or_else(missing)?.record.id;
        // Between the two reads it may have been deleted.
        let volume = self.volume(id).await?.filter(|v| v.record.state == VolumeState::Active);
        volume.ok_or_else(missing)
    }

    /// Creates a volume, its name and, if given, its root (in its own envelope).
    ///
    /// # Errors
    /// [`SchemaError::Exists`], [`SchemaError::NotFound`] without the pool,
    /// [`SchemaError::Invalid`], [`SchemaError::Store`].
    pub async fn create_volume(
        &self,
        volume: &VolumeRecord,
        root: Option<&[u8]>,
    ) -> SchemaResult<()> {
        self.create_volume_at(volume, root, None).await
    }

    /// The same, and says where its head is to be, for the nodes of a cluster.
    ///
    /// # Errors
    /// As [`Schema::create_volume`].
    pub async fn create_volume_at(
        &self,
        volume: &VolumeRecord,
        root: Option<&[u8]>,
        place: Option<&PlaceRecord>,
    ) -> SchemaResult<()> {
        let name = volume_name_key(&volume.pool, &volume.name);
        let mut txn = Txn::new()
            .when(Condition::KeyExists(pool_key(&volume.pool)))
            .when(Condition::KeyMissing(name.clone()))
            .when(Condition::KeyMissing(volume_key(volume.id)))
            .when(Condition::KeyMissing(root_key(volume.id)))
            .put(name, encode(&VolumeNameRecord { id: volume.id })?)
            .put(volume_key(volume.id), encode(volume)?);
        if let Some(root) = root {
            txn = txn.put(root_key(volume.id), Bytes::copy_from_slice(root));
        }
        if let Some(place) = place {
            txn = txn.put(place_key(volume.id), encode(place)?);
        }
        if volume.state != VolumeState::Active {
            return Err(SchemaError::Invalid("a volume is created active".into()));
        }
        if self.commit(txn).await? {
            return Ok(());
        }
        self.pool(&volume.pool).await?;
        Err(SchemaError::Exists(format!("volume '{}/{}'", volume.pool, volume.name)))
    }

    /// Changes an active volume's size. Where it becomes smaller, the record says from which size on
    /// until [`Schema::finish_cut`]; it does not grow before.
    ///
    /// # Errors
    /// [`SchemaError::NotFound`], [`SchemaError::Invalid`], [`SchemaError::Busy`],
    /// [`SchemaError::Store`], [`SchemaError::Record`].
    pub async fn resize_volume(&self, id: VolumeId, size_bytes: u64) -> SchemaResult<VolumeRecord> {
        let change = |volume: &mut VolumeRecord| {
            let name = || format!("volume '{}/{}'", volume.pool, volume.name);
            if volume.state != VolumeState::Active {
                return Err(format!("{} is deleted", name()));
            }
            if size_bytes > volume.size_bytes && volume.cut_from_bytes.is_some() {
                return Err(format!("what was cut off {} is still being deleted", name()));
            }
            if size_bytes < volume.size_bytes {
                volume.cut_from_bytes.get_or_insert(volume.size_bytes);
            }
            volume.size_bytes = size_bytes;
            Ok(())
        };
        self.update(&volume_key(id), || format!("volume {id}"), change).await
    }

    /// Notes that what a shrink to `size_bytes` cut off is gone; nothing if the volume has another
    /// size by now, or is deleted.
    ///
    /// # Errors
    /// As [`Schema::resize_volume`].
    pub async fn finish_cut(&self, id: VolumeId, size_bytes: u64) -> SchemaResult<VolumeRecord> {
        let change = |volume: &mut VolumeRecord| {
            if volume.size_bytes == size_bytes && volume.state == VolumeState::Active {
                volume.cut_from_bytes = None;
            }
            Ok(())
        };
        self.update(&volume_key(id), || format!("volume {id}"), change).await
    }

    /// Turns a volume into a tombstone: its name is free at once, its root is gone, and its
    /// shards may be dropped. Deleting a tombstone again succeeds.
    ///
    /// # Errors
    /// [`SchemaError::NotFound`], [`SchemaError::Busy`], [`SchemaError::Store`],
    /// [`SchemaError::Record`].
    pub async fn delete_volume(&self, id: VolumeId) -> SchemaResult<VolumeRecord> {
        for _ in 0..TRIES_MAX {
            let found = self.volume(id).await?;
            let old = found.ok_or_else(|| SchemaError::NotFound(format!("volume {id}")))?;
            let tombstone = VolumeRecord { state: VolumeState::Deleting, ..old.record.clone() };
            if tombstone == old.record {
                return Ok(tombstone);
            }
            let txn = Txn::new()
                .when(Condition::KeyAt(volume_key(id), old.revision))
                .put(volume_key(id), encode(&tombstone)?)
                .delete(volume_name_key(&tombstone.pool, &tombstone.name))
                .delete(root_key(id))
                .delete(place_key(id))
                .delete(scrub_key(id));
            if self.commit(txn).await? {
                return Ok(tombstone);
            }
        }
        Err(SchemaError::Busy(format!("volume {id}")))
    }

    /// Forgets a tombstone, once every disk confirmed the deletion.
    ///
    /// # Errors
    /// [`SchemaError::Invalid`] for an active volume, [`SchemaError::Store`],
    /// [`SchemaError::Record`]. One that is gone already is no error.
    pub async fn forget_volume(&self, id: VolumeId) -> SchemaResult<()> {
        let Some(old) = self.volume(id).await? else { return Ok(()) };
        if old.record.state != VolumeState::Deleting {
            return Err(SchemaError::Invalid(format!("volume {id} is not deleted")));
        }
        let txn =
            Txn::new().when(Condition::KeyAt(volume_key(id), old.revision)).delete(volume_key(id));
        if self.commit(txn).await? {
            Ok(())
        } else {
            Err(SchemaError::Busy(format!("volume {id}")))
        }
    }

    /// A volume's root, as its owner encoded it; none if it has none.
    ///
    /// # Errors
    /// [`SchemaError::Store`].
    pub async fn root(&self, id: VolumeId) -> SchemaResult<Option<Stored<Bytes>>> {
        let found = self.store.get(&root_key(id)).await?;
        Ok(found.map(|found| Stored { record: found.value, revision: found.revision }))
    }
}

#[cfg(test)]
#[path = "schema_tests.rs"]
mod tests;
