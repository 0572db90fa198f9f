//! Rebuilding a lost metadata store from what the disks mirror (design 6, "The store can be lost").
//!
//! # The argument
//!
//! A root is in force only once `w` domains of its `D` have its mirror. Who has heard every disk of
//! every `D` that he finds, but for fewer than `w` domains of each, has therefore heard of the
//! newest root in force. The store that is made has an incarnation above everything that any disk
//! has seen, and every fence is raised to it before the store exists: no head of an earlier
//! incarnation can write or hold a lease once a volume is served again.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytes::Bytes;
use serde::Deserialize;

use crate::env::Env;
use crate::id::{ClusterId, DiskId, Epoch, HeadId, VolumeId};
use crate::meta::catalog;
use crate::meta::record::{
    self, ClusterRecord, DiskRecord, DiskState, PoolRecord, Record, VolumeNameRecord, VolumeRecord,
    VolumeState,
};
use crate::meta::schema::{
    CLUSTER_KEY, DISK_PREFIX, POOL_PREFIX, VOLUME_PREFIX, disk_key, pool_key, root_key, volume_key,
    volume_name_key,
};
use crate::shard::{Authority, Catalog, ShardClient, VolumeFence};
use crate::volume::root::Root;
use crate::volume::rules::{self, LogSet, Member};

/// Why the store was not rebuilt; nothing but fences was changed.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// No disk was given, or none can be read.
    #[error(
        "no disk of a cluster was found: name one at least (`disks` in the configuration); it \
         knows where the others were"
    )]
    NoDisks,
    /// Disks of two clusters.
    #[error("disk {disk} belongs to cluster {found}, others to {expected}: leave it out")]
    Clusters {
        /// The disk.
        disk: DiskId,
        /// Its cluster.
        found: ClusterId,
        /// That of the first disk.
        expected: ClusterId,
    },
    /// Disks that have to be heard were not given.
    #[error(
        "these disks are needed and were not found: {}; if one is gone for good, say so with \
         --missing-disk ID", list(.0)
    )]
    DisksMissing(Vec<DiskId>),
    /// The operator's word is not enough.
    #[error(
        "volume {volume}: with {} missing, newer data may exist that nobody else knows of; it \
         cannot be recovered without them", list(.missing)
    )]
    TooManyMissing {
        /// The volume.
        volume: VolumeId,
        /// Disks of its log set that are not there.
        missing: Vec<DiskId>,
    },
    /// A disk cannot tell what it holds.
    #[error(
        "disk {disk}: {why}; if it is gone for good, leave it out and say --missing-disk {disk}"
    )]
    Disk {
        /// The disk.
        disk: DiskId,
        /// What it answered.
        why: String,
    },
    /// A mirrored root or record cannot be understood.
    #[error("{what} cannot be understood: {why}")]
    Record {
        /// Which.
        what: String,
        /// What is wrong with it.
        why: String,
    },
}

fn list(disks: &[DiskId]) -> String {
    disks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// What was found, and what the new store holds.
#[derive(Debug)]
pub struct Rebuilt {
    /// Keys and values of the new store.
    pub content: Vec<(String, Bytes)>,
    /// Its incarnation.
    pub incarnation: u32,
    /// Names of the volumes that are back.
    pub volumes: Vec<String>,
    /// What an operator should know of.
    pub notes: Vec<String>,
}

/// A disk that takes part: how to reach it and where it is.
pub struct Found {
    /// The disk.
    pub client: Rc<dyn ShardClient>,
    /// Its path.
    pub path: String,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// Size of a slot, bytes.
    pub slot_bytes: u64,
}

/// What a root says of its volume.
#[derive(Deserialize)]
struct Description {
    volume: VolumeRecord,
    pool: PoolRecord,
}

/// What the disks say, put together.
#[derive(Default)]
struct Evidence {
    cluster: ClusterId,
    incarnation: u64,
    catalog: Catalog,
    disks: BTreeMap<DiskId, DiskRecord>,
    pools: BTreeMap<String, PoolRecord>,
    volumes: BTreeMap<VolumeId, VolumeRecord>,
    roots: BTreeMap<VolumeId, Root>,
    deleted: BTreeSet<VolumeId>,
    notes: Vec<String>,
}

/// Paths of the disks that the newest catalog on the given disks names.
pub async fn listed_paths(found: &BTreeMap<DiskId, Found>) -> Vec<String> {
    let catalog = newest_catalog(found).await;
    let entries = catalog::decode(&catalog.data).unwrap_or_default();
    let disks = entries.iter().filter(|(key, _)| key.starts_with(DISK_PREFIX));
    disks.filter_map(|(_, value)| Some(record::decode::<DiskRecord>(value).ok()?.path)).collect()
}

async fn newest_catalog(found: &BTreeMap<DiskId, Found>) -> Catalog {
    let mut newest = Catalog::default();
    for disk in found.values() {
        if let Ok(catalog) = disk.client.get_catalog().await
            && (catalog.incarnation, catalog.revision) > (newest.incarnation, newest.revision)
        {
            newest = catalog;
        }
    }
    newest
}

/// Rebuilds the content of a lost store. `missing`: disks that are gone, by an operator's word.
/// Raises every fence; changes nothing else.
///
/// # Errors
/// [`RecoverError`].
pub async fn rebuild(
    env: &Env,
    found: &BTreeMap<DiskId, Found>,
    missing: &BTreeSet<DiskId>,
) -> Result<Rebuilt, RecoverError> {
    let mut evidence = gather(found).await?;
    evidence.check_complete(found, missing)?;
    evidence.describe_volumes();
    evidence.add_unknown_disks(found);
    let incarnation = u32::try_from(evidence.incarnation + 1).unwrap_or(u32::MAX);
    evidence.add_fresh_roots(found, missing);
    raise_fences(env, found, &evidence, incarnation).await?;
    evidence.into_content(incarnation)
}

async fn gather(found: &BTreeMap<DiskId, Found>) -> Result<Evidence, RecoverError> {
    let mut evidence = Evidence::default();
    for (&disk, there) in found {
        let failed =
            |why: crate::shard::ShardError| RecoverError::Disk { disk, why: why.to_string() };
        let cluster = there.client.info().await.map_err(failed)?.cluster;
        if evidence.cluster.is_nil() {
            evidence.cluster = cluster;
        } else if evidence.cluster != cluster {
            let expected = evidence.cluster;
            return Err(RecoverError::Clusters { disk, found: cluster, expected });
        }
    }
    if evidence.cluster.is_nil() {
        return Err(RecoverError::NoDisks);
    }
    evidence.catalog = newest_catalog(found).await;
    evidence.incarnation = evidence.catalog.incarnation.into();
    evidence.read_catalog()?;
    for (&disk, there) in found {
        if evidence.is_removed(disk) {
            evidence.notes.push(format!("disk {disk} was removed; what it says does not count"));
            continue;
        }
        let fences = there.client.volumes().await;
        let fences = fences.map_err(|why| RecoverError::Disk { disk, why: why.to_string() })?;
        for fence in fences {
            evidence.hear(disk, fence)?;
        }
    }
    Ok(evidence)
}

fn decode<R: Record>(key: &str, value: &[u8]) -> Result<R, RecoverError> {
    record::decode(value)
        .map_err(|why| RecoverError::Record { what: key.to_owned(), why: why.to_string() })
}

impl Evidence {
    fn is_removed(&self, disk: DiskId) -> bool {
        self.disks.get(&disk).is_some_and(|record| record.state == DiskState::Removed)
    }

    fn read_catalog(&mut self) -> Result<(), RecoverError> {
        if self.catalog.revision == 0 {
            self.notes.push("no disk has a catalog: pools come from the volumes' roots".into());
            return Ok(());
        }
        let entries = catalog::decode(&self.catalog.data).map_err(|why| RecoverError::Record {
            what: "the catalog".into(),
            why: why.to_string(),
        })?;
        for (key, value) in entries {
            if key.starts_with(DISK_PREFIX) {
                let record: DiskRecord = decode(&key, &value)?;
                self.disks.insert(record.id, record);
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

    /// Takes in what one disk says of one volume: the newest root counts.
    fn hear(&mut self, disk: DiskId, fence: VolumeFence) -> Result<(), RecoverError> {
        let volume = fence.volume;
        if fence.epoch == Epoch::TOMBSTONE {
            self.deleted.insert(volume);
            return Ok(());
        }
        self.incarnation = self.incarnation.max(fence.epoch.incarnation());
        let Some(mirror) = fence.mirror else { return Ok(()) };
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

    /// Whether every disk that may know something newer was heard, or declared missing.
    fn check_complete(
        &self,
        found: &BTreeMap<DiskId, Found>,
        missing: &BTreeSet<DiskId>,
    ) -> Result<(), RecoverError> {
        let heard: BTreeSet<DiskId> =
            found.keys().copied().filter(|disk| !self.is_removed(*disk)).collect();
        let roots = || self.roots.iter().filter(|(id, _)| !self.deleted.contains(id));
        let sets = || roots().flat_map(|(_, root)| std::iter::once(&root.set).chain(&root.former));
        let mut needed: BTreeSet<DiskId> =
            sets().flat_map(|set| set.members().iter().map(|member| member.disk)).collect();
        needed.extend(self.disks.keys());
        needed.retain(|disk| {
            !heard.contains(disk) && !missing.contains(disk) && !self.is_removed(*disk)
        });
        if !needed.is_empty() {
            return Err(RecoverError::DisksMissing(needed.into_iter().collect()));
        }
        for (&volume, root) in roots() {
            for set in std::iter::once(&root.set).chain(&root.former) {
                if !rules::fenced_enough(set, &heard) {
                    let members = set.members().iter().map(|member| member.disk);
                    let missing = members.filter(|disk| !heard.contains(disk)).collect();
                    return Err(RecoverError::TooManyMissing { volume, missing });
                }
            }
        }
        Ok(())
    }

    /// Puts the volumes' records together from the catalog and from what their roots say.
    fn describe_volumes(&mut self) {
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
        let known = &self.volumes;
        self.roots.retain(|id, _| known.contains_key(id));
        for (id, record) in &mut self.volumes {
            if self.deleted.contains(id) || record.state == VolumeState::Deleting {
                record.state = VolumeState::Deleting;
                self.roots.remove(id);
            }
        }
    }

    fn add_unknown_disks(&mut self, found: &BTreeMap<DiskId, Found>) {
        let mut next = self.disks.values().map(|record| record.domain + 1).max().unwrap_or(0);
        let sets = self.roots.values().map(|root| &root.set);
        let domains: BTreeMap<DiskId, u32> = sets
            .flat_map(super::super::volume::rules::LogSet::members)
            .map(|m| (m.disk, m.domain))
            .collect();
        next = domains.values().map(|domain| domain + 1).max().unwrap_or(0).max(next);
        for (&id, there) in found {
            if let Some(record) = self.disks.get_mut(&id) {
                record.path.clone_from(&there.path);
                continue;
            }
            let domain = domains.get(&id).copied().unwrap_or_else(|| {
                next += 1;
                next - 1
            });
            let record = DiskRecord {
                id,
                path: there.path.clone(),
                node: "node0".into(),
                domain,
                slot_bytes: there.slot_bytes,
                size_bytes: there.size_bytes,
                state: DiskState::Online,
                added_at_unix_s: 0,
                removing: false,
                heir: None,
            };
            self.disks.insert(id, record);
        }
    }

    /// A volume that the catalog names and no disk has heard of was never served: it starts anew,
    /// unless a disk that is missing may know better.
    fn add_fresh_roots(&mut self, found: &BTreeMap<DiskId, Found>, missing: &BTreeSet<DiskId>) {
        let active = self.volumes.values().filter(|record| record.state == VolumeState::Active);
        let rootless: Vec<VolumeRecord> =
            active.filter(|record| !self.roots.contains_key(&record.id)).cloned().collect();
        for record in rootless {
            let id = record.id;
            let fresh = self.pools.get(&record.pool).filter(|_| missing.is_empty());
            let fresh = fresh.and_then(|pool| {
                let members = found.keys().filter_map(|disk| {
                    Some(Member { disk: *disk, domain: self.disks.get(disk)?.domain })
                });
                let parity = pool.scheme.parity;
                let members = members.take(2 * usize::from(parity) + 4).collect();
                let set = LogSet::new(members, parity + 1).ok()?;
                Some(Root::fresh(id, set, super::volumes::description(&record, pool)))
            });
            if let Some(root) = fresh {
                drop(self.roots.insert(id, root));
            } else {
                let name = format!("{}/{}", record.pool, record.name);
                self.notes.push(format!("volume {name} has no root on any disk: left out"));
                self.volumes.remove(&id);
            }
        }
    }

    fn into_content(mut self, incarnation: u32) -> Result<Rebuilt, RecoverError> {
        let mut content = Vec::new();
        let cluster = ClusterRecord { id: self.cluster, incarnation };
        put(&mut content, CLUSTER_KEY.into(), &cluster)?;
        for (id, disk) in &self.disks {
            put(&mut content, disk_key(*id), disk)?;
        }
        for (name, pool) in &self.pools {
            put(&mut content, pool_key(name), pool)?;
        }
        let mut names = BTreeSet::new();
        for (id, record) in &mut self.volumes {
            if record.state == VolumeState::Active {
                if !names.insert((record.pool.clone(), record.name.clone())) {
                    let old = format!("{}/{}", record.pool, record.name);
                    let short: String = id.to_string().chars().take(8).collect();
                    record.name = format!("{}-{short}", record.name.get(..50).unwrap_or("vol"));
                    let new = &record.name;
                    self.notes.push(format!("two volumes are named {old}: one is now {new}"));
                    names.insert((record.pool.clone(), record.name.clone()));
                }
                let key = volume_name_key(&record.pool, &record.name);
                put(&mut content, key, &VolumeNameRecord { id: *id })?;
            }
            put(&mut content, volume_key(*id), record)?;
        }
        for (id, root) in &mut self.roots {
            // Whoever had the volume last may still believe in its lease.
            root.released = root.sequence == 0;
            content.push((root_key(*id), root.encode()));
        }
        let volumes = names.into_iter().map(|(pool, name)| format!("{pool}/{name}")).collect();
        Ok(Rebuilt { content, incarnation, volumes, notes: self.notes })
    }
}

fn put<R: Record>(
    content: &mut Vec<(String, Bytes)>,
    key: String,
    record: &R,
) -> Result<(), RecoverError> {
    let value = record::encode(record)
        .map_err(|why| RecoverError::Record { what: key.clone(), why: why.to_string() })?;
    content.push((key, value.into()));
    Ok(())
}

/// Raises the fence of every volume on every disk to the new incarnation.
async fn raise_fences(
    env: &Env,
    found: &BTreeMap<DiskId, Found>,
    evidence: &Evidence,
    incarnation: u32,
) -> Result<(), RecoverError> {
    if incarnation >= 1 << 24 {
        let why = format!("incarnation {incarnation} does not fit an epoch");
        return Err(RecoverError::Record { what: "the store's incarnation".into(), why });
    }
    for (&volume, root) in evidence.roots.iter().filter(|(_, root)| root.sequence > 0) {
        let head = HeadId::from_bytes(env.random_bytes());
        let authority = Authority { volume, epoch: Epoch::new(incarnation, 0), head };
        for (&disk, there) in found {
            if evidence.is_removed(disk) {
                continue;
            }
            match there.client.fence(authority, None).await {
                Ok(_) => {}
                // A full table refuses what it never heard of; there is nothing to fence then.
                Err(crate::shard::ShardError::NoSpace) if root.set.domain_of(disk).is_none() => {}
                Err(why) => return Err(RecoverError::Disk { disk, why: why.to_string() }),
            }
        }
    }
    Ok(())
}
