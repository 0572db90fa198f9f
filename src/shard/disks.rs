//! The disks that a node can reach, and what it thinks of them.
//!
//! Heads look disks up by id and choose where new segments go. A disk that failed a request is
//! avoided for a while ("suspect"); one that is down is not asked at all.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::{DiskInfo, ShardClient, ShardError};
use crate::env::Env;
use crate::id::DiskId;

/// How long a disk that failed a request is avoided for new segments.
pub const SUSPECT_FOR: Duration = Duration::from_secs(5);
/// How long a disk may take to tell its fill.
const INFO_PATIENCE: Duration = Duration::from_secs(1);

struct Entry {
    client: Rc<dyn ShardClient>,
    domain: u32,
    suspect_until: Option<Instant>,
    info: DiskInfo,
}

/// The disks of a node (later: of the cluster), shared by its heads.
#[derive(Default)]
pub struct Disks {
    disks: RefCell<BTreeMap<DiskId, Entry>>,
    /// Told whenever a disk comes, goes or recovers.
    pub changed: Notify,
}

/// A disk chosen for a shard.
#[derive(Clone)]
pub struct Target {
    /// The disk.
    pub disk: DiskId,
    /// How to reach it.
    pub client: Rc<dyn ShardClient>,
    /// Its slot size, bytes.
    pub slot_bytes: u64,
}

impl Disks {
    /// Adds a disk in a failure domain, or replaces its client.
    pub fn add(&self, client: Rc<dyn ShardClient>, domain: u32, info: DiskInfo) {
        let entry = Entry { client, domain, suspect_until: None, info };
        self.disks.borrow_mut().insert(entry.info.id, entry);
        self.changed.notify_waiters();
    }

    /// Takes a disk out: it is down until added again.
    pub fn remove(&self, disk: DiskId) {
        self.disks.borrow_mut().remove(&disk);
        self.changed.notify_waiters();
    }

    /// The client of a disk; none if it is down.
    pub fn client(&self, disk: DiskId) -> Option<Rc<dyn ShardClient>> {
        self.disks.borrow().get(&disk).map(|entry| entry.client.clone())
    }

    /// Whether the disk is up and failed nothing lately.
    pub fn is_healthy(&self, disk: DiskId) -> bool {
        self.disks.borrow().get(&disk).is_some_and(Entry::healthy)
    }

    /// The failure domain of a disk that is up.
    pub fn domain(&self, disk: DiskId) -> Option<u32> {
        self.disks.borrow().get(&disk).map(|entry| entry.domain)
    }

    /// Ids of all disks that are up, sorted.
    pub fn ids(&self) -> Vec<DiskId> {
        self.disks.borrow().keys().copied().collect()
    }

    /// Notes that a request to a disk failed; the disk is avoided for a while.
    pub fn report(&self, disk: DiskId, error: &ShardError) {
        let grave = matches!(
            error,
            ShardError::Io(_)
                | ShardError::Damaged(_)
                | ShardError::Offline(_)
                | ShardError::Unreachable
        );
        if !grave {
            return;
        }
        if let Some(entry) = self.disks.borrow_mut().get_mut(&disk) {
            if entry.healthy() {
                tracing::warn!(%disk, %error, "disk is suspect");
            }
            entry.suspect_until = Some(Instant::now() + SUSPECT_FOR);
        }
    }

    /// Asks every disk for its fill, for the next choices. A disk that does not tell in time
    /// keeps the fill it told last.
    pub async fn refresh(&self) {
        let asked = self.ids().into_iter().filter_map(|disk| {
            let client = self.client(disk)?;
            Some(async move {
                let info = tokio::time::timeout(INFO_PATIENCE, client.info()).await;
                (disk, info)
            })
        });
        for (disk, info) in join_all(asked).await {
            if let Ok(Ok(info)) = info
                && let Some(entry) = self.disks.borrow_mut().get_mut(&disk)
            {
                entry.info = info;
            }
        }
    }

    /// Free and all slots of the disks that are up.
    pub fn fill(&self) -> (u64, u64) {
        let disks = self.disks.borrow();
        let sum = |f: fn(&DiskInfo) -> u32| disks.values().map(|e| u64::from(f(&e.info))).sum();
        (sum(|i| i.slots_free), sum(|i| i.slots))
    }

    /// Chooses up to `count` disks in different domains by weighted random draw (weight: free
    /// slots), healthy ones first, out of those that `allowed` admits, avoiding the domains in
    /// `taken`. Fewer are returned when there are no more.
    pub fn choose(
        &self,
        env: &Env,
        count: usize,
        taken: &[u32],
        allowed: impl Fn(DiskId) -> bool,
    ) -> Vec<Target> {
        let disks = self.disks.borrow();
        let mut taken = taken.to_vec();
        let mut chosen = Vec::with_capacity(count);
        for healthy in [true, false] {
            let mut pool: Vec<&Entry> =
                disks.values().filter(|e| e.healthy() == healthy && allowed(e.info.id)).collect();
            while chosen.len() < count {
                pool.retain(|e| !taken.contains(&e.domain));
                let weight = |e: &Entry| u64::from(e.info.slots_free) + 1;
                let total: u64 = pool.iter().map(|e| weight(e)).sum();
                if total == 0 {
                    break;
                }
                let mut draw = env.random_below(total);
                let index = pool
                    .iter()
                    .position(|e| {
                        let hit = draw < weight(e);
                        draw = draw.wrapping_sub(weight(e));
                        hit
                    })
                    .expect("the draw is below the sum of the weights");
                let entry = pool.swap_remove(index);
                taken.push(entry.domain);
                chosen.push(Target {
                    disk: entry.info.id,
                    client: entry.client.clone(),
                    slot_bytes: entry.info.slot_bytes,
                });
            }
        }
        chosen
    }

    /// Domains that have at least one healthy disk.
    pub fn healthy_domains(&self) -> usize {
        let disks = self.disks.borrow();
        let domains: std::collections::BTreeSet<u32> =
            disks.values().filter(|e| e.healthy()).map(|e| e.domain).collect();
        domains.len()
    }
}

impl Entry {
    fn healthy(&self) -> bool {
        self.suspect_until.is_none_or(|until| until <= Instant::now())
    }
}
