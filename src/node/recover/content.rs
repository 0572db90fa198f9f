//! The keys of the new store.
//!
//! Nodes, disks, pools and volumes are as the newest catalog and the roots have them. Where heads are to be is
//! decided anew, and who runs says so itself.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::evidence::Evidence;
use super::survey::Fences;
use super::{Found, Plan, Rebuilt, RecoverError};
use crate::id::DiskId;
use crate::meta::members::{fold, member_key};
use crate::meta::record::{
    self, ClusterRecord, DiskRecord, DiskState, PoolRecord, Record, VolumeNameRecord, VolumeRecord,
    VolumeState,
};
use crate::meta::schema::{CLUSTER_KEY, disk_key, pool_key, root_key, volume_key, volume_name_key};
use crate::node::cluster::domains;
use crate::volume::root::Root;
use crate::volume::rules::{self, LogSet, Member};

impl Evidence {
    /// Takes in disks that no catalog names, and where the others are now.
    pub(super) fn add_unknown_disks(&mut self, found: &BTreeMap<DiskId, Found>, clustered: bool) {
        let taken = self.disks.values().map(|record| record.domain.saturating_add(1));
        let mut next = taken.max().unwrap_or(0);
        let sets = self.roots.values().map(|root| &root.set);
        let numbers: BTreeMap<DiskId, u32> =
            sets.flat_map(LogSet::members).map(|m| (m.disk, m.domain)).collect();
        next = numbers.values().map(|domain| domain.saturating_add(1)).max().unwrap_or(0).max(next);
        for (&id, there) in found {
            if let Some(record) = self.disks.get_mut(&id) {
                record.path.clone_from(&there.path);
                record.node.clone_from(&there.node);
                continue;
            }
            // In a cluster the number in a log set may be that of a node or a rack.
            let known = numbers.get(&id).copied().filter(|_| !clustered);
            let domain = known.unwrap_or_else(|| {
                if clustered {
                    return fold(&id.to_bytes());
                }
                let free = next;
                next = next.saturating_add(1);
                free
            });
            let record = DiskRecord {
                id,
                path: there.path.clone(),
                node: there.node.clone(),
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
    pub(super) fn add_fresh_roots(&mut self, found: &BTreeMap<DiskId, Found>, plan: &Plan<'_>) {
        let active = self.volumes.values().filter(|record| record.state == VolumeState::Active);
        let rootless: Vec<VolumeRecord> =
            active.filter(|record| !self.roots.contains_key(&record.id)).cloned().collect();
        for record in rootless {
            let id = record.id;
            let surely_new = plan.missing.is_empty() && !self.known.contains_key(&id);
            let pool = self.pools.get(&record.pool).filter(|_| surely_new);
            let set = pool.and_then(|pool| Some((pool, self.fresh_set(found, plan, pool)?)));
            if let Some((pool, set)) = set {
                let description = crate::node::volumes::description(&record, pool);
                self.roots.insert(id, Root::fresh(id, set, description));
            } else {
                let name = format!("{}/{}", record.pool, record.name);
                self.notes.push(format!("volume {name} has no root on any disk: left out"));
                self.volumes.remove(&id);
            }
        }
    }

    /// A log set of as many failure domains as there are, up to the usual number.
    fn fresh_set(
        &self,
        found: &BTreeMap<DiskId, Found>,
        plan: &Plan<'_>,
        pool: &PoolRecord,
    ) -> Option<LogSet> {
        let mut members: BTreeMap<u32, Member> = BTreeMap::new();
        for disk in found.keys().copied() {
            let Some(record) = self.disks.get(&disk).filter(|disk| !disk.state.is_out()) else {
                continue;
            };
            let domain = if plan.clustered {
                domains(record, self.members.get(&record.node)).at(pool.failure_domain.into())
            } else {
                record.domain
            };
            members.entry(domain).or_insert(Member { disk, domain });
        }
        let parity = pool.scheme.parity;
        let members = members.into_values().take(rules::log_domains(parity)).collect();
        LogSet::new(members, parity + 1).ok()
    }

    /// All keys and values.
    ///
    /// # Errors
    /// [`RecoverError::Record`].
    pub(super) fn into_content(mut self, fences: &Fences) -> Result<Rebuilt, RecoverError> {
        let mut content = Vec::new();
        let incarnation = fences.incarnation;
        let cluster = ClusterRecord { id: self.cluster, incarnation };
        put(&mut content, CLUSTER_KEY.into(), &cluster)?;
        for (name, member) in &self.members {
            put(&mut content, member_key(name), member)?;
        }
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
            // Newer than every mirror, be it on a disk that was declared missing and comes back.
            if let Some(head) = fences.heads.get(id) {
                (root.epoch, root.head) = (fences.epoch(), *head);
            }
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
