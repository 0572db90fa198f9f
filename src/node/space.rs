//! Space of disks, pools and volumes: figures, levels and forecasts.
//!
//! All of it follows from what the disks and the heads say at this moment; kept are only the level that
//! a pool has reached, because it is left a little below where it begins, and the history behind the
//! forecast.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::Node;
use super::forecast::History;
use crate::admin::types::{Disk, Fill, HealthLevel, RepairProgress, Space};
use crate::id::{DiskId, VolumeId};
use crate::meta::record::PoolRecord;
use crate::shard::domain::Level;
use crate::shard::{SlotClass, reserve};
use crate::volume::usage::Usage;

/// Pause between two looks at the pools.
const WATCH_EVERY: Duration = Duration::from_secs(10);
/// How far below a level a pool must be to leave it, percent.
const HYSTERESIS_PERCENT: u64 = 2;
/// Of what is taken by what is live, so much cannot be given back, percent: garbage collection does not
/// move segments in which more is live.
const LIVE_PERCENT_MAX: u64 = 90;

/// From when on pools are reported to fill up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaceLevels {
    /// Percent of what clients may take at which it is a warning.
    pub warning_percent: u64,
    /// The same at which it is critical.
    pub critical_percent: u64,
    /// Sizes of the volumes together, percent of what the pool holds, above which it is a warning; 0
    /// never.
    pub overcommit_percent: u64,
}

impl Default for SpaceLevels {
    fn default() -> Self {
        Self { warning_percent: 80, critical_percent: 90, overcommit_percent: 200 }
    }
}

impl SpaceLevels {
    /// The level of a pool that is so full and was at `before`.
    fn level(self, before: HealthLevel, percent: u64) -> HealthLevel {
        let reached = |level, from: u64| {
            percent >= if before >= level { from.saturating_sub(HYSTERESIS_PERCENT) } else { from }
        };
        if reached(HealthLevel::Critical, self.critical_percent) {
            HealthLevel::Critical
        } else if reached(HealthLevel::Warning, self.warning_percent) {
            HealthLevel::Warning
        } else {
            HealthLevel::Ok
        }
    }
}

/// What the heads say of the slots of their volumes, by disk.
pub(super) type Usages = BTreeMap<VolumeId, BTreeMap<DiskId, Usage>>;

/// What a node's heads say of the slots they use: of their own volumes alone, or, added up, of those of
/// all nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sums {
    pub(super) disks: BTreeMap<DiskId, Usage>,
    pub(super) pools: BTreeMap<String, PoolSum>,
}

/// The same of the volumes of one pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PoolSum {
    pub(super) usage: Usage,
    /// Sizes of the volumes.
    provisioned: u64,
    /// Whether one has no room for what it is to store.
    full: bool,
    /// What clients have stored.
    pub(super) stored: u64,
    pub(super) volumes: u32,
    pub(super) repair: Option<RepairProgress>,
    #[serde(default)]
    pub(super) balance: Option<RepairProgress>,
}

impl Sums {
    /// Adds those of another node.
    pub(super) fn add(&mut self, other: &Self) {
        for (disk, usage) in &other.disks {
            self.disks.entry(*disk).or_default().add(*usage);
        }
        for (name, sum) in &other.pools {
            let pool = self.pools.entry(name.clone()).or_default();
            pool.usage.add(sum.usage);
            pool.provisioned += sum.provisioned;
            pool.full |= sum.full;
            pool.stored += sum.stored;
            pool.volumes += sum.volumes;
            pool.repair = together(pool.repair, sum.repair);
            pool.balance = together(pool.balance, sum.balance);
        }
    }

    fn known(&self) -> Usage {
        let mut sum = Usage::default();
        self.disks.values().for_each(|usage| sum.add(*usage));
        sum
    }
}

/// Two repairs as one.
pub(super) fn together(
    a: Option<RepairProgress>,
    b: Option<RepairProgress>,
) -> Option<RepairProgress> {
    let (Some(a), Some(b)) = (a, b) else { return a.or(b) };
    Some(RepairProgress {
        bytes_done: a.bytes_done + b.bytes_done,
        bytes_total: a.bytes_total + b.bytes_total,
        bytes_per_second: a.bytes_per_second + b.bytes_per_second,
        eta_s: a.eta_s.zip(b.eta_s).map(|(a, b)| a.max(b)),
        // Each node has its own.
        limit_bytes_per_second: a.limit_bytes_per_second.max(b.limit_bytes_per_second),
    })
}

/// What is kept of a pool.
#[derive(Debug, Default)]
pub(super) struct PoolWatch {
    level: HealthLevel,
    history: History,
}

fn space(usage: Usage) -> Space {
    let Usage { used, live, open, reclaimable } = usage;
    Space { used, live, reserved: open, reclaimable }
}

/// How many segments of `width` shards find a slot each in different domains with so many slots.
fn segments(domains: &[u64], width: u64) -> u64 {
    let fit =
        |count: u64| domains.iter().map(|slots| count.min(*slots)).sum::<u64>() >= count * width;
    let (mut least, mut most) = (0, domains.iter().sum::<u64>() / width.max(1));
    while least < most {
        let middle = least + (most - least).div_ceil(2);
        if fit(middle) { least = middle } else { most = middle - 1 }
    }
    least
}

/// Slots of the disks that are online, for clients.
#[derive(Default)]
struct Slots {
    /// By domain: all, and those that are free.
    domains: BTreeMap<u32, (u64, u64)>,
    slot_bytes: u64,
    /// Bytes of all of them, of those that are taken, and of the free ones that are kept back.
    bytes: u64,
    used_bytes: u64,
    kept_bytes: u64,
}

impl Slots {
    /// Bytes of clients that fit into all slots, and into those that are free.
    fn room(&self, pool: &PoolRecord) -> (u64, u64) {
        let (data, width) = (u64::from(pool.scheme.data), pool.scheme.width() as u64);
        let (all, free): (Vec<u64>, Vec<u64>) = self.domains.values().copied().unzip();
        let bytes = |domains: &[u64]| {
            let each = data.saturating_mul(self.slot_bytes);
            segments(domains, width).saturating_mul(each)
        };
        (bytes(&all), bytes(&free))
    }
}

impl Node {
    /// What the volumes that are served use.
    pub(super) fn usages(&self) -> Usages {
        let volumes = self.volumes.borrow();
        let served = volumes.values().filter_map(|slot| Some((slot.id, slot.serving()?.usage())));
        served.collect()
    }

    /// What the heads of this node say of the slots.
    pub(super) fn sums(&self, usages: &Usages) -> Sums {
        let mut sums = Sums::default();
        for (disk, usage) in usages.values().flatten() {
            sums.disks.entry(*disk).or_default().add(*usage);
        }
        for volume in self.volumes.borrow().values() {
            let pool = sums.pools.entry(volume.pool.name.clone()).or_default();
            for usage in usages.get(&volume.id).into_iter().flat_map(BTreeMap::values) {
                pool.usage.add(*usage);
            }
            let head = volume.serving();
            pool.provisioned += volume.record.borrow().size_bytes;
            pool.full |= head.as_ref().is_some_and(|head| head.is_out_of_space());
            pool.stored += head.map_or(0, |head| head.report().allocated_bytes);
            pool.volumes += 1;
        }
        for (name, pool) in &mut sums.pools {
            pool.repair = self.repair_progress(Some(name));
            pool.balance = self.balance_progress(Some(name));
        }
        sums
    }

    /// What the slots of a disk are for; `used` and `free` of them.
    pub(super) fn disk_space(sum: Usage, slot_bytes: u64, used: u32, free: u32) -> Space {
        let kept = free.min(reserve::floor(SlotClass::Client, used + free));
        let mut space = space(sum);
        space.used = u64::from(used) * slot_bytes;
        space.reserved += u64::from(kept) * slot_bytes;
        space
    }

    /// What the slots of a volume that is served are for.
    pub(super) fn volume_space(usages: &Usages, volume: VolumeId) -> Space {
        let mut sum = Usage::default();
        usages.get(&volume).into_iter().flat_map(BTreeMap::values).for_each(|u| sum.add(*u));
        space(sum)
    }

    /// What the slots of a deleted volume are for: nothing any more.
    pub(super) fn tombstone_space(&self, volume: VolumeId) -> Space {
        let mut used = 0;
        for slot in self.slots() {
            let held = slot.disk().and_then(|disk| disk.list(volume).ok());
            let count = held.map_or(0, |held| held.shards.len() as u64);
            used += count * slot.record.borrow().slot_bytes;
        }
        Space { used, reclaimable: used, ..Space::default() }
    }

    fn client_slots(&self, disks: &[Disk], level: Level) -> Slots {
        let mut sum = Slots::default();
        for disk in disks.iter().filter(|disk| disk.state.is_online()) {
            let Some(domain) = self.domain_of(disk.id, level) else { continue };
            let (all, free) = (disk.slots, disk.slots - disk.slots_used);
            let floor = reserve::floor(SlotClass::Client, all);
            let bytes = |slots: u32| u64::from(slots) * disk.slot_bytes;
            let domain = sum.domains.entry(domain).or_default();
            domain.0 += u64::from(all.saturating_sub(floor));
            domain.1 += u64::from(free.saturating_sub(floor));
            sum.slot_bytes = disk.slot_bytes;
            sum.bytes += bytes(all.saturating_sub(floor));
            sum.used_bytes += bytes(all.saturating_sub(free));
            sum.kept_bytes += bytes(free.min(floor));
        }
        sum
    }

    /// The failure domain of a disk on a level, wherever it is.
    fn domain_of(&self, disk: DiskId, level: Level) -> Option<u32> {
        if let Some(slot) = self.disks.borrow().get(&disk) {
            return Some(self.domains_of(&slot.record.borrow()).at(level));
        }
        let far = self.far_disks().into_iter().find(|far| far.id == disk)?;
        let record = far.record.borrow();
        Some(self.domains_of(&record).at(level))
    }

    /// Failure domains of a pool with a disk that is online.
    pub(super) fn domains_online(&self, pool: &PoolRecord, disks: &[Disk]) -> u32 {
        let online = disks.iter().filter(|disk| disk.state.is_online());
        let level = pool.failure_domain.into();
        let domains: BTreeSet<u32> =
            online.filter_map(|disk| self.domain_of(disk.id, level)).collect();
        u32::try_from(domains.len()).unwrap_or(u32::MAX)
    }

    /// Space of a pool, how full it is, and bytes that clients could store in all.
    pub(super) fn pool_space(
        &self,
        pool: &PoolRecord,
        disks: &[Disk],
        sums: &Sums,
    ) -> (Space, Fill, u64) {
        let slots = self.client_slots(disks, pool.failure_domain.into());
        let known = sums.known();
        let PoolSum { usage: own, provisioned, full, .. } =
            sums.pools.get(&pool.name).copied().unwrap_or_default();
        let (usable, writable) = slots.room(pool);
        let unknown = slots.used_bytes.saturating_sub(known.used);
        let needed =
            (known.live.saturating_mul(100) / LIVE_PERCENT_MAX + known.open).min(known.used);
        let taken = needed + unknown;
        let percent = if full { 100 } else { taken.saturating_mul(100) / slots.bytes.max(1) };
        let mut watches = self.pool_watches.borrow_mut();
        let watch = watches.entry(pool.name.clone()).or_default();
        let levels = self.options.space;
        watch.level = levels.level(watch.level, percent);
        watch.history.note(Instant::now(), taken);
        let thin_percent = provisioned.saturating_mul(100) / usable.max(1);
        let fill = Fill {
            percent,
            level: watch.level,
            full,
            writable,
            provisioned,
            thin_percent,
            overcommitted: levels.overcommit_percent > 0
                && thin_percent > levels.overcommit_percent,
            forecast: watch.history.forecast(slots.bytes.saturating_sub(taken)),
        };
        let mut own = space(own);
        own.reserved += slots.kept_bytes;
        (own, fill, usable)
    }

    /// Takes the samples of the pools, whoever asks for them or not.
    pub(super) fn watch_space(self: &Rc<Self>) {
        // The figures of a large node take a while.
        let soon = self.space_watched.get().is_some_and(|at| at.elapsed() < WATCH_EVERY);
        if soon || !self.is_manager() {
            return;
        }
        self.space_watched.set(Some(Instant::now()));
        let node = self.clone();
        tokio::task::spawn_local(async move { drop(node.gather().await) });
        let names = self.pools.borrow();
        self.pool_watches.borrow_mut().retain(|name, _| names.contains_key(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_left_below_where_it_begins() {
        let levels = SpaceLevels::default();
        let mut level = HealthLevel::Ok;
        let expected = [
            (79, HealthLevel::Ok),
            (80, HealthLevel::Warning),
            (79, HealthLevel::Warning),
            (78, HealthLevel::Warning),
            (77, HealthLevel::Ok),
            (79, HealthLevel::Ok),
            (91, HealthLevel::Critical),
            (89, HealthLevel::Critical),
            (87, HealthLevel::Warning),
            (89, HealthLevel::Warning),
            (10, HealthLevel::Ok),
        ];
        for (percent, wanted) in expected {
            level = levels.level(level, percent);
            assert_eq!(level, wanted, "{percent} %");
        }
    }

    #[test]
    fn segments_take_one_slot_of_a_domain_each() {
        assert_eq!(segments(&[10, 10, 10], 3), 10);
        assert_eq!(segments(&[10, 10, 10, 10], 2), 20);
        // One domain is much larger: the others have no partners for all of it.
        assert_eq!(segments(&[100, 10, 10], 2), 20);
        assert_eq!(segments(&[100, 10], 3), 0);
        assert_eq!(segments(&[], 2), 0);
    }
}
