//! What the disks say, put together: the newest catalog, the newest root of each volume, and whether
//! all were heard that may know better.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::{Found, Named, Plan, RecoverError};
use crate::id::{ClusterId, DiskId, Epoch, VolumeId};
use crate::meta::catalog;
use crate::meta::members::{MEMBER_PREFIX, MemberRecord};
use crate::meta::record::{
    self, DiskRecord, DiskState, PoolRecord, Record, VolumeRecord, VolumeState,
};
use crate::meta::schema::{DISK_PREFIX, POOL_PREFIX, VOLUME_PREFIX};
use crate::shard::{Catalog, VolumeFence};
use crate::volume::root::Root;
use crate::volume::rules;

/// What a root says of its volume.
#[derive(Deserialize)]
struct Description {
    volume: VolumeRecord,
    pool: PoolRecord,
}

/// What the disks say, put together.
pub(super) struct Evidence {
    pub(super) cluster: ClusterId,
    /// The highest that anything was seen of.
    pub(super) incarnation: u64,
    pub(super) disks: BTreeMap<DiskId, DiskRecord>,
    pub(super) members: BTreeMap<String, MemberRecord>,
    pub(super) pools: BTreeMap<String, PoolRecord>,
    pub(super) volumes: BTreeMap<VolumeId, VolumeRecord>,
    pub(super) roots: BTreeMap<VolumeId, Root>,
    /// Volumes that a disk has a fence of, and on how many.
    pub(super) known: BTreeMap<VolumeId, usize>,
    pub(super) deleted: BTreeSet<VolumeId>,
    pub(super) notes: Vec<String>,
}

/// Disks of a node as a catalog has them; of all nodes without a name.
pub(super) fn listed_paths(catalog: &Catalog, node: Option<&str>) -> Vec<String> {
    let entries = catalog::decode(&catalog.data).unwrap_or_default();
    let disks = entries.iter().filter(|(key, _)| key.starts_with(DISK_PREFIX));
    let disks = disks.filter_map(|(_, value)| record::decode::<DiskRecord>(value).ok());
    disks.filter(|disk| node.is_none_or(|node| disk.node == node)).map(|disk| disk.path).collect()
}

fn decode<R: Record>(key: &str, value: &[u8]) -> Result<R, RecoverError> {
    record::decode(value)
        .map_err(|why| RecoverError::Record { what: key.to_owned(), why: why.to_string() })
}

impl Evidence {
    /// What a catalog says.
    ///
    /// # Errors
    /// [`RecoverError::Record`].
    pub(super) fn new(cluster: ClusterId, catalog: &Catalog) -> Result<Self, RecoverError> {
        let mut evidence = Self {
            cluster,
            incarnation: catalog.incarnation.into(),
            disks: BTreeMap::new(),
            members: BTreeMap::new(),
            pools: BTreeMap::new(),
            volumes: BTreeMap::new(),
            roots: BTreeMap::new(),
            known: BTreeMap::new(),
            deleted: BTreeSet::new(),
            notes: Vec::new(),
        };
        evidence.read_catalog(catalog)?;
        Ok(evidence)
    }

    fn read_catalog(&mut self, catalog: &Catalog) -> Result<(), RecoverError> {
        if catalog.revision == 0 {
            self.notes.push("no disk has a catalog: pools come from the volumes' roots".into());
            return Ok(());
        }
        let entries = catalog::decode(&catalog.data).map_err(|why| RecoverError::Record {
            what: "the catalog".into(),
            why: why.to_string(),
        })?;
        for (key, value) in entries {
            if key.starts_with(DISK_PREFIX) {
                let record: DiskRecord = decode(&key, &value)?;
                self.disks.insert(record.id, record);
            } else if key.starts_with(MEMBER_PREFIX) {
                let record: MemberRecord = decode(&key, &value)?;
                self.members.insert(record.name.clone(), record);
            } else if key.starts_with(POOL_PREFIX) {
                let record: PoolRecord = decode(&key, &value)?;
                self.pools.insert(record.name.clone(), record);
            } else if key.starts_with(VOLUME_PREFIX) {
                let record: VolumeRecord = decode(&key, &value)?;
                self.volumes.insert(record.id, record);
            }
        }
        Ok(())
    }

    pub(super) fn is_removed(&self, disk: DiskId) -> bool {
        self.disks.get(&disk).is_some_and(|record| record.state == DiskState::Removed)
    }

    /// Takes in what one disk says of one volume: the newest root counts.
    ///
    /// # Errors
    /// [`RecoverError::Record`].
    pub(super) fn hear(&mut self, disk: DiskId, fence: &VolumeFence) -> Result<(), RecoverError> {
        let volume = fence.volume;
        if fence.epoch == Epoch::TOMBSTONE {
            self.deleted.insert(volume);
            return Ok(());
        }
        *self.known.entry(volume).or_default() += 1;
        self.incarnation = self.incarnation.max(fence.epoch.incarnation());
        let Some(mirror) = &fence.mirror else { return Ok(()) };
        let root = Root::decode(&mirror.data).map_err(|why| RecoverError::Record {
            what: format!("the root of volume {volume} on disk {disk}"),
            why: why.to_string(),
        })?;
        self.incarnation = self.incarnation.max(root.epoch.incarnation());
        let revision = (root.epoch, root.sequence);
        let known = self.roots.get(&volume).map(|known| (known.epoch, known.sequence));
        if known.is_none_or(|known| revision > known) {
            self.roots.insert(volume, root);
        }
        Ok(())
    }

    fn named(&self, disk: DiskId) -> Named {
        let place = self.disks.get(&disk).map(|record| format!("{}:{}", record.node, record.path));
        Named { disk, place }
    }

    /// Whether every disk that may know something newer was heard, or declared missing.
    ///
    /// # Errors
    /// [`RecoverError::DisksMissing`], [`RecoverError::TooManyMissing`].
    pub(super) fn check_complete(
        &self,
        found: &BTreeMap<DiskId, Found>,
        plan: &Plan<'_>,
    ) -> Result<(), RecoverError> {
        let heard: BTreeSet<DiskId> =
            found.keys().copied().filter(|disk| !self.is_removed(*disk)).collect();
        let roots = || self.roots.iter().filter(|(id, _)| !self.deleted.contains(id));
        let sets = || roots().flat_map(|(_, root)| std::iter::once(&root.set).chain(&root.former));
        let mut needed: BTreeSet<DiskId> =
            sets().flat_map(|set| set.members().iter().map(|member| member.disk)).collect();
        needed.extend(self.disks.keys());
        needed.retain(|disk| {
            !heard.contains(disk) && !plan.missing.contains(disk) && !self.is_removed(*disk)
        });
        if !needed.is_empty() {
            let disks = needed.into_iter().map(|disk| self.named(disk)).collect();
            return Err(RecoverError::DisksMissing { disks, clustered: plan.clustered });
        }
        for (&volume, root) in roots() {
            for set in std::iter::once(&root.set).chain(&root.former) {
                if !rules::fenced_enough(set, &heard) {
                    let members = set.members().iter().map(|member| member.disk);
                    let missing = members.filter(|disk| !heard.contains(disk));
                    let missing = missing.map(|disk| self.named(disk)).collect();
                    return Err(RecoverError::TooManyMissing { volume, missing });
                }
            }
        }
        Ok(())
    }

    /// Puts the volumes' records together from the catalog and from what their roots say.
    pub(super) fn describe_volumes(&mut self) {
        for (id, root) in &self.roots {
            let description = Description::deserialize(&root.description);
            let Ok(Description { volume, pool }) = description else {
                if !self.volumes.contains_key(id) {
                    self.notes.push(format!("volume {id} has a root but no name: left out"));
                }
                continue;
            };
            self.pools.entry(volume.pool.clone()).or_insert(pool);
            let known = self.volumes.entry(*id).or_insert_with(|| volume.clone());
            // Which of them is newer is not known: too large shows zeroes, too small hides what was
            // written.
            known.size_bytes = known.size_bytes.max(volume.size_bytes);
        }
        for record in self.volumes.values_mut() {
            // It may have ended since, and the volume have grown over it: it must not be done again.
            if let Some(old) = record.cut_from_bytes.take() {
                record.size_bytes = record.size_bytes.max(old);
                self.notes.push(format!(
                    "volume {}/{} was being made smaller: it has its old size, and some of its end may read \
                     as zeroes",
                    record.pool, record.name
                ));
            }
        }
        for (id, disks) in &self.known {
            if !self.roots.contains_key(id) && !self.deleted.contains(id) {
                self.notes.push(format!(
                    "volume {id} is known to {disks} disks, but no root of it was found: what they hold \
                     of it is kept, and served by nobody"
                ));
            }
        }
        let volumes = &self.volumes;
        self.roots.retain(|id, _| volumes.contains_key(id));
        for (id, record) in &mut self.volumes {
            if self.deleted.contains(id) || record.state == VolumeState::Deleting {
                record.state = VolumeState::Deleting;
                self.roots.remove(id);
            }
        }
    }
}
