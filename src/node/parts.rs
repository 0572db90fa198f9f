//! What each node knows of the cluster, and the whole of it: a node alone is a cluster of one.
//!
//! A node knows its own disks and the volumes that it serves. Who is asked for all of it asks every
//! node that answers, adds up what is counted, and says of the rest that nobody tells.

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::from_slice;

use super::Node;
use super::disks::DiskSlot;
use super::pools::shown_scheme;
use super::space::{Sums, together};
use super::views::{unserved_volume, unusable_disk};
use crate::admin::types::{
    Capacity, Disk, DiskState, FailureDomain as Shown, Pool, RepairProgress, Scrub, Volume,
};
use crate::meta::record::{FailureDomain, PoolRecord};
use crate::volume::usage::Usage;

/// How long another node may take to tell.
const PATIENCE: Duration = Duration::from_secs(2);

/// What one node knows.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Parts {
    disks: Vec<Disk>,
    volumes: Vec<Volume>,
    scrubs: Vec<Scrub>,
    sums: Sums,
}

/// All of it.
pub(super) struct Views {
    pub(super) disks: Vec<Disk>,
    pub(super) pools: Vec<Pool>,
    pub(super) volumes: Vec<Volume>,
    pub(super) scrubs: Vec<Scrub>,
    pub(super) repair: Option<RepairProgress>,
    pub(super) balance: Option<RepairProgress>,
}

impl Node {
    /// What this node knows.
    pub(super) fn parts(&self) -> Parts {
        let usages = self.usages();
        let sums = self.sums(&usages);
        let slots = self.slots();
        let view = |slot: &Rc<DiskSlot>| {
            let usage = sums.disks.get(&slot.id).copied().unwrap_or_default();
            self.view_disk_with(slot, usage)
        };
        let mut disks: Vec<Disk> = slots.iter().map(view).collect();
        let problems = self.problems.borrow();
        disks.extend(problems.iter().map(|(path, reason)| {
            let name = self.shown_node();
            Disk { node: name, ..unusable_disk(path, reason) }
        }));
        let volumes = self.own_volumes(&usages);
        Parts { disks, volumes, scrubs: self.list_scrubs(), sums }
    }

    /// Its name, where there are others.
    pub(super) fn shown_node(&self) -> String {
        self.cluster.as_ref().map_or_else(String::new, |_| self.options.name.clone())
    }

    /// All of it, as far as this node knows.
    pub(super) fn views(&self) -> Views {
        self.assemble(vec![self.parts()])
    }

    /// All of it, as far as the nodes tell that answer.
    pub(super) async fn gather(&self) -> Views {
        let mut parts = vec![self.parts()];
        parts.extend(self.ask_all().await);
        self.assemble(parts)
    }

    async fn ask_all(&self) -> Vec<Parts> {
        let Some(cluster) = self.cluster.as_ref() else { return Vec::new() };
        let question = super::relay::Ask::Parts.encode();
        let asked = cluster.others().into_iter().map(|(name, peer)| {
            let question = question.clone();
            async move {
                let answer = peer.ask(question, PATIENCE).await;
                let answer = answer.map_err(|error| error.to_string());
                let parts = answer.and_then(|bytes| from_slice(&bytes).map_err(|e| e.to_string()));
                if let Err(why) = &parts {
                    tracing::debug!(node = name, why, "a node does not tell what it knows");
                }
                parts.ok()
            }
        });
        join_all(asked).await.into_iter().flatten().collect()
    }

    fn assemble(&self, parts: Vec<Parts>) -> Views {
        let (mut disks, mut volumes, mut scrubs) = (Vec::new(), Vec::new(), Vec::new());
        let mut sums = Sums::default();
        for part in parts {
            disks.extend(part.disks);
            volumes.extend(part.volumes);
            scrubs.extend(part.scrubs);
            sums.add(&part.sums);
        }
        for disk in &mut disks {
            let sum = sums.disks.get(&disk.id).copied().unwrap_or_default();
            let free = disk.slots - disk.slots_used;
            disk.space = Self::disk_space(sum, disk.slot_bytes, disk.slots_used, free);
        }
        for far in self.far_disks() {
            if disks.iter().all(|disk| disk.id != far.id) {
                disks.push(far.view(sums.disks.get(&far.id).copied().unwrap_or_default()));
            }
        }
        if let Some(cluster) = self.cluster.as_ref() {
            let told: std::collections::BTreeSet<_> =
                volumes.iter().map(|volume: &Volume| volume.id).collect();
            let others = cluster.volumes().into_iter().filter(|v| !told.contains(&v.record.id));
            volumes.extend(others.map(|placed| unserved_volume(&placed.record, placed.node)));
        }
        disks.sort_by(|a, b| (&a.node, &a.path).cmp(&(&b.node, &b.path)));
        volumes.sort_by(|a, b| a.name.cmp(&b.name).then(a.id.cmp(&b.id)));
        scrubs.sort_by(|a, b| a.volume.cmp(&b.volume));
        let pools = self.pools.borrow();
        let pools = pools.values().map(|pool| self.view_pool_of(pool, &disks, &sums)).collect();
        let repair = sums.pools.values().fold(None, |sum, pool| together(sum, pool.repair));
        let balance = sums.pools.values().fold(None, |sum, pool| together(sum, pool.balance));
        Views { disks, pools, volumes, scrubs, repair, balance }
    }

    fn view_pool_of(&self, pool: &PoolRecord, disks: &[Disk], sums: &Sums) -> Pool {
        let mut capacity = Capacity::default();
        for disk in disks.iter().filter(|disk| disk.state.is_online()) {
            capacity.raw += u64::from(disk.slots) * disk.slot_bytes;
            capacity.used += u64::from(disk.slots_used) * disk.slot_bytes;
        }
        capacity.free = capacity.raw.saturating_sub(capacity.used);
        let sum = sums.pools.get(&pool.name).copied().unwrap_or_default();
        let (space, fill, usable) = self.pool_space(pool, disks, sums);
        Pool {
            id: pool.id,
            name: pool.name.clone(),
            scheme: shown_scheme(pool.scheme),
            failure_domain: match pool.failure_domain {
                FailureDomain::Disk => Shown::Disk,
                FailureDomain::Node => Shown::Node,
                FailureDomain::Rack => Shown::Rack,
            },
            min_size: pool.min_size,
            domains_online: self.domains_online(pool, disks),
            capacity,
            space,
            fill,
            usable,
            stored: sum.stored,
            volumes: sum.volumes,
            repair: sum.repair,
        }
    }
}

impl super::cluster::FarDisk {
    /// What is known of it while its node does not tell.
    fn view(&self, usage: Usage) -> Disk {
        let record = self.record.borrow();
        let reason = format!("node {} does not answer", record.node);
        Disk {
            id: self.id,
            node: record.node.clone(),
            state: DiskState::Missing,
            size: record.size_bytes,
            slot_bytes: record.slot_bytes,
            space: Node::disk_space(usage, record.slot_bytes, 0, 0),
            ..unusable_disk(&record.path, &reason)
        }
    }
}
