//! What the admin API shows of disks, pools and volumes.

use std::rc::Rc;

use super::Node;
use super::cluster::Cluster;
use super::counts::DiskCounts;
use super::disks::DiskSlot;
use super::parts::Views;
use super::pools::shown_scheme;
use super::space::Usages;
use super::volumes::VolumeSlot;
use crate::admin::error::ApiError;
use crate::admin::health;
use crate::admin::types::{
    Disk, DiskErrors, DiskLatency, DiskState, DiskTiming, Health, Narrowed, Pool, Reason,
    Redundancy, RepairProgress, Space, Status, Volume, VolumeState,
};
use crate::id::DiskId;
use crate::meta::record::VolumeRecord;
use crate::shard::Scheme;
use crate::volume::RepairReport;
use crate::volume::head::Head;
use crate::volume::usage::Usage;

impl Node {
    pub(super) fn status(&self, views: &Views) -> Status {
        let uptime = self.started.elapsed().as_secs();
        let going = (views.repair, views.balance);
        let status = health::status(&views.disks, &views.pools, &views.volumes, going, uptime);
        let moves = self.options.head.balance_every.is_some() && views.balance.is_none();
        let waits = self.registry.balance_waits().filter(|_| moves);
        let Health { health, reasons } = self.health(views);
        Status { balance_waits: waits.map(str::to_owned), health, reasons, ..status }
    }

    pub(super) fn health(&self, views: &Views) -> Health {
        let mut health = health::assess(&views.disks, &views.pools, &views.volumes);
        let trouble = self.cluster.as_ref().and_then(Cluster::store_trouble);
        if let Some((level, message)) = trouble {
            let subject = "metadata store".to_owned();
            health.reasons.insert(0, Reason { level, subject, message });
            health.reasons.sort_by_key(|reason| std::cmp::Reverse(reason.level));
            health.health = health.health.max(level);
        }
        health
    }

    pub(super) fn view_disk(&self, slot: &Rc<DiskSlot>) -> Disk {
        let usages = self.usages();
        let mut usage = Usage::default();
        usages.values().filter_map(|disks| disks.get(&slot.id)).for_each(|u| usage.add(*u));
        self.view_disk_with(slot, usage)
    }

    pub(super) fn view_disk_with(&self, slot: &Rc<DiskSlot>, usage: Usage) -> Disk {
        let record = slot.record.borrow();
        let geometry = slot.geometry.get();
        let slots = geometry.map_or(0, |geometry| geometry.slots);
        let last = slot.last_disk();
        let free = last.as_ref().map_or(0, |disk| disk.slot_counts().free);
        let used = slots.saturating_sub(free);
        let counted = slot.counted();
        let since_open =
            last.as_ref().map(|disk| DiskCounts::default().and(disk)).unwrap_or_default();
        let errors = |counted: &DiskCounts| DiskErrors {
            io: counted.io_errors,
            checksum: counted.damaged_pages,
            timeout: 0,
        };
        let latency =
            DiskLatency { append_us: counted.appends.mean_us(), read_us: counted.reads.mean_us() };
        // Being drained says more than being slow does.
        let slow = (slot.state.get() == DiskState::Online).then(|| self.slowness(slot)).flatten();
        Disk {
            id: slot.id,
            node: self.shown_node(),
            path: record.path.clone(),
            state: if slow.is_some() { DiskState::Slow } else { slot.state.get() },
            state_reason: slow.or_else(|| {
                slot.reason.borrow().as_ref().map(|reason| match slot.state.get() {
                    DiskState::Draining if used == 0 => format!("{reason}; it is empty"),
                    DiskState::Draining => format!("{reason}; {used} slots are still in use"),
                    _ => reason.clone(),
                })
            }),
            size: record.size_bytes,
            slot_bytes: record.slot_bytes,
            slots,
            slots_used: used,
            used: u64::from(used) * record.slot_bytes,
            space: Self::disk_space(usage, record.slot_bytes, used, slots - used),
            errors: errors(&counted),
            recent_errors: errors(&since_open),
            latency,
            timing: self.timing(slot.id),
            smart: slot.sickness.smart.borrow().clone(),
        }
    }

    /// One pool, as far as this node knows.
    pub(super) fn view_pool(&self, name: &str) -> Result<Pool, ApiError> {
        one_pool(self.views(), name)
    }

    /// The volumes of a pool, or of all, as far as this node knows.
    #[cfg(test)]
    pub(super) fn list_volumes(&self, pool: Option<&str>) -> Result<Vec<Volume>, ApiError> {
        self.volumes_of(self.views(), pool)
    }

    /// Of all volumes those of a pool, or all.
    pub(super) fn volumes_of(
        &self,
        views: Views,
        pool: Option<&str>,
    ) -> Result<Vec<Volume>, ApiError> {
        let Some(name) = pool else { return Ok(views.volumes) };
        if !self.pools.borrow().contains_key(name) {
            return Err(no_such_pool(name));
        }
        let of_pool = |volume: &Volume| volume.name.split('/').next() == Some(name);
        Ok(views.volumes.into_iter().filter(of_pool).collect())
    }

    /// The volumes that this node serves, and the deleted ones that it drops.
    pub(super) fn own_volumes(&self, usages: &Usages) -> Vec<Volume> {
        let volumes = self.volumes.borrow();
        let mut list: Vec<Volume> =
            volumes.values().map(|slot| self.view_volume_with(slot, usages)).collect();
        let deleting = self.deleting.borrow();
        list.extend(deleting.values().map(|record| self.view_tombstone(record)));
        list
    }

    pub(super) fn view_volume(&self, slot: &VolumeSlot) -> Volume {
        self.view_volume_with(slot, &self.usages())
    }

    fn view_volume_with(&self, slot: &VolumeSlot, usages: &Usages) -> Volume {
        let record = slot.record.borrow();
        let head = slot.serving();
        let report = head.as_ref().map(|head| head.report());
        let width = head.as_ref().map(|head| head.log_width());
        let narrow = width.filter(|(_, width, full)| width < full);
        let redundancy = match head.as_ref().map(|head| head.reduced()) {
            Some((segments @ 1.., tolerates)) => Redundancy::Reduced {
                segments: segments as u64,
                tolerates: u8::try_from(tolerates.unwrap_or(0)).unwrap_or(u8::MAX),
            },
            _ => match narrow {
                Some((_, width, _)) => {
                    Redundancy::Reduced { segments: 0, tolerates: width.saturating_sub(1) }
                }
                None => Redundancy::Full,
            },
        };
        let mut failures: Vec<String> = slot.why.borrow().iter().cloned().collect();
        failures.extend(narrow.map(|(_, width, full)| {
            format!("too few failure domains: new writes may have {width} instead of {full} copies")
        }));
        let state = match &report {
            None if slot.failed.get() => VolumeState::Failed,
            None => VolumeState::Opening,
            Some(report) => match report.stalled_for {
                Some(time) => {
                    failures.push(format!("writes have been waiting for {} s", time.as_secs()));
                    VolumeState::Stalled
                }
                None => VolumeState::Online,
            },
        };
        let names = Self::export_names(&record.pool, &record.name);
        let exports = self
            .export_uris
            .borrow()
            .iter()
            .map(|(before, after)| format!("{before}{}{after}", names[0]))
            .collect();
        Volume {
            id: slot.id,
            node: self.shown_node(),
            name: format!("{}/{}", record.pool, record.name),
            size: head.as_ref().map_or(record.size_bytes, |head| head.size_bytes()),
            cutting: record.cut_from_bytes.map_or(0, |from| from - record.size_bytes),
            allocated: report.as_ref().map_or(0, |report| report.allocated_bytes),
            space: Self::volume_space(usages, slot.id),
            epoch: report.as_ref().map_or_else(String::new, |report| report.epoch.to_string()),
            redundancy,
            exports,
            state,
            failures,
            unrepairable: head.as_ref().map_or(0, |head| head.scrub_report().unrepairable),
            narrowed: head.as_ref().and_then(|head| view_narrowed(head, slot.pool.scheme)),
            repair: head
                .as_ref()
                .and_then(|head| head.repair_report())
                .map(|r| self.view_repair(&r)),
            balance: head
                .as_ref()
                .and_then(|head| head.balance_report())
                .map(|r| self.view_repair(&r)),
        }
    }

    /// How far repair is, over all volumes of a pool, or of all pools.
    pub(super) fn repair_progress(&self, pool: Option<&str>) -> Option<RepairProgress> {
        let volumes = self.volumes.borrow();
        let wanted = volumes.values().filter(|slot| pool.is_none_or(|pool| slot.pool.name == pool));
        let reports = wanted.filter_map(|slot| slot.serving()?.repair_report());
        reports.reduce(RepairReport::and).map(|report| self.view_repair(&report))
    }

    /// How far balance is, over all volumes of a pool, or of all pools.
    pub(super) fn balance_progress(&self, pool: Option<&str>) -> Option<RepairProgress> {
        let volumes = self.volumes.borrow();
        let wanted = volumes.values().filter(|slot| pool.is_none_or(|pool| slot.pool.name == pool));
        let reports = wanted.filter_map(|slot| slot.serving()?.balance_report());
        reports.reduce(RepairReport::and).map(|report| self.view_repair(&report))
    }

    fn view_repair(&self, report: &RepairReport) -> RepairProgress {
        RepairProgress {
            bytes_done: report.done_bytes,
            bytes_total: report.total_bytes,
            bytes_per_second: report.bytes_per_second,
            eta_s: report.eta().map(|eta| eta.as_secs()),
            limit_bytes_per_second: self.registry.budget.report().limit,
        }
    }

    /// Has every volume notice when a round of repair or balance begins and ends.
    pub(super) fn note_repair(&self) {
        for head in self.heads() {
            head.repair_report();
            head.balance_report();
        }
    }
}

/// One pool of all.
pub(super) fn one_pool(views: Views, name: &str) -> Result<Pool, ApiError> {
    let pool = views.pools.into_iter().find(|pool| pool.name == name);
    pool.ok_or_else(|| no_such_pool(name))
}

fn no_such_pool(name: &str) -> ApiError {
    ApiError::not_found(format!("no such pool: {name}")).with_hint("`sdsctl pool ls` lists them")
}

/// A path that cannot be used, as a disk without an identity.
pub(super) fn unusable_disk(path: &str, reason: &str) -> Disk {
    Disk {
        id: DiskId::default(),
        node: String::new(),
        path: path.to_owned(),
        state: DiskState::Failed,
        state_reason: Some(reason.to_owned()),
        size: 0,
        slot_bytes: 0,
        slots: 0,
        slots_used: 0,
        used: 0,
        space: Space::default(),
        errors: DiskErrors::default(),
        recent_errors: DiskErrors::default(),
        latency: DiskLatency::default(),
        timing: DiskTiming::default(),
        smart: None,
    }
}

fn view_narrowed(head: &Head, pool: Scheme) -> Option<Narrowed> {
    let bending = head.bending();
    if bending.is_straight(pool) {
        return None;
    }
    Some(Narrowed {
        scheme: shown_scheme(bending.scheme),
        domains: u32::try_from(bending.domains).unwrap_or(u32::MAX),
        narrow_bytes: bending.narrow.1,
        to_narrow_bytes: bending.to_narrow.1,
        tolerates: u8::try_from(head.tolerates()).unwrap_or(u8::MAX),
    })
}

/// A volume that no node tells of.
pub(super) fn unserved_volume(record: &VolumeRecord, node: Option<String>) -> Volume {
    let why = match &node {
        Some(node) => format!("node {node}, which is to serve it, does not tell of it"),
        None => "no node is to serve it yet".to_owned(),
    };
    Volume {
        node: node.unwrap_or_default(),
        state: VolumeState::Opening,
        failures: vec![why],
        size: record.size_bytes,
        ..tombstone(record, Space::default())
    }
}

impl Node {
    fn view_tombstone(&self, record: &VolumeRecord) -> Volume {
        let space = self.tombstone_space(record.id);
        Volume { node: self.shown_node(), ..tombstone(record, space) }
    }
}

fn tombstone(record: &VolumeRecord, space: Space) -> Volume {
    Volume {
        id: record.id,
        node: String::new(),
        name: format!("{}/{}", record.pool, record.name),
        size: record.size_bytes,
        cutting: 0,
        allocated: 0,
        space,
        epoch: String::new(),
        redundancy: Redundancy::Full,
        exports: Vec::new(),
        state: VolumeState::Deleting,
        failures: Vec::new(),
        unrepairable: 0,
        narrowed: None,
        repair: None,
        balance: None,
    }
}
