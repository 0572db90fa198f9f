//! What the admin API shows of disks, pools and volumes.

use std::rc::Rc;

use super::Node;
use super::counts::DiskCounts;
use super::disks::DiskSlot;
use super::pools::shown_scheme;
use super::space::Usages;
use super::volumes::VolumeSlot;
use crate::admin::error::ApiError;
use crate::admin::health;
use crate::admin::types::{
    Capacity, Disk, DiskErrors, DiskLatency, DiskState, DiskTiming, FailureDomain as Shown,
    Narrowed, Pool, Redundancy, RepairProgress, Space, Status, Volume, VolumeState,
};
use crate::id::DiskId;
use crate::meta::record::{FailureDomain, PoolRecord, VolumeRecord};
use crate::shard::Scheme;
use crate::volume::RepairReport;
use crate::volume::head::Head;

impl Node {
    pub(super) fn status(&self) -> Status {
        let (disks, pools, volumes) = self.views();
        let uptime = self.started.elapsed().as_secs();
        health::status(&disks, &pools, &volumes, self.repair_progress(None), uptime)
    }

    /// All disks by path, pools by name and volumes by name.
    pub(super) fn views(&self) -> (Vec<Disk>, Vec<Pool>, Vec<Volume>) {
        let usages = self.usages();
        let slots = self.slots();
        let mut disks: Vec<Disk> =
            slots.iter().map(|slot| self.view_disk_with(slot, &usages)).collect();
        let problems = self.problems.borrow();
        disks.extend(problems.iter().map(|(path, reason)| unusable_disk(path, reason)));
        disks.sort_by(|a, b| a.path.cmp(&b.path));
        let pools = self.pools.borrow();
        let pools = pools.values().map(|pool| self.view_pool_with(pool, &usages)).collect();
        let volumes = self.list_volumes_with(None, &usages).unwrap_or_default();
        (disks, pools, volumes)
    }

    pub(super) fn view_disk(&self, slot: &Rc<DiskSlot>) -> Disk {
        self.view_disk_with(slot, &self.usages())
    }

    pub(super) fn view_disk_with(&self, slot: &Rc<DiskSlot>, usages: &Usages) -> Disk {
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
            space: Self::disk_space(slot, usages, used, slots - used),
            errors: errors(&counted),
            recent_errors: errors(&since_open),
            latency,
            timing: self.timing(slot.id),
            smart: slot.sickness.smart.borrow().clone(),
        }
    }

    pub(super) fn show_pool(&self, name: &str) -> Result<Pool, ApiError> {
        match self.pools.borrow().get(name) {
            Some(pool) => Ok(self.view_pool(pool)),
            None => Err(no_such_pool(name)),
        }
    }

    pub(super) fn view_pool(&self, pool: &PoolRecord) -> Pool {
        self.view_pool_with(pool, &self.usages())
    }

    fn view_pool_with(&self, pool: &PoolRecord, usages: &Usages) -> Pool {
        let mut capacity = Capacity::default();
        let mut online = 0;
        for slot in self.slots() {
            let Some(disk) = slot.last_disk().filter(|_| slot.state.get().is_online()) else {
                continue;
            };
            online += 1;
            let slots = slot.geometry.get().map_or(0, |geometry| geometry.slots);
            let used = slots.saturating_sub(disk.slot_counts().free);
            let slot_bytes = slot.record.borrow().slot_bytes;
            capacity.raw += u64::from(slots) * slot_bytes;
            capacity.used += u64::from(used) * slot_bytes;
        }
        capacity.free = capacity.raw.saturating_sub(capacity.used);
        let (mut stored, mut volumes) = (0, 0);
        for slot in self.volumes.borrow().values().filter(|slot| slot.pool.name == pool.name) {
            volumes += 1;
            stored += slot.serving().map_or(0, |head| head.report().allocated_bytes);
        }
        let scheme = pool.scheme;
        let (space, fill, usable) = self.pool_space(pool, usages);
        Pool {
            id: pool.id,
            name: pool.name.clone(),
            scheme: shown_scheme(scheme),
            failure_domain: match pool.failure_domain {
                FailureDomain::Disk => Shown::Disk,
                FailureDomain::Node => Shown::Node,
                FailureDomain::Rack => Shown::Rack,
            },
            min_size: pool.min_size,
            domains_online: if pool.failure_domain == FailureDomain::Disk {
                online
            } else {
                online.min(1)
            },
            capacity,
            space,
            fill,
            usable,
            stored,
            volumes,
            repair: self.repair_progress(Some(&pool.name)),
        }
    }

    pub(super) fn list_volumes(&self, pool: Option<&str>) -> Result<Vec<Volume>, ApiError> {
        self.list_volumes_with(pool, &self.usages())
    }

    fn list_volumes_with(
        &self,
        pool: Option<&str>,
        usages: &Usages,
    ) -> Result<Vec<Volume>, ApiError> {
        if let Some(name) = pool
            && !self.pools.borrow().contains_key(name)
        {
            return Err(no_such_pool(name));
        }
        let wanted = |name: &str| pool.is_none_or(|pool| pool == name);
        let volumes = self.volumes.borrow();
        let active = volumes.values().filter(|slot| wanted(&slot.pool.name));
        let mut list: Vec<Volume> =
            active.map(|slot| self.view_volume_with(slot, usages)).collect();
        let deleting = self.deleting.borrow();
        let deleted = deleting.values().filter(|r| wanted(&r.pool));
        list.extend(deleted.map(|record| self.view_tombstone(record)));
        list.sort_by(|a, b| a.name.cmp(&b.name).then(a.id.cmp(&b.id)));
        Ok(list)
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
        }
    }

    /// How far repair is, over all volumes of a pool, or of all pools.
    pub(super) fn repair_progress(&self, pool: Option<&str>) -> Option<RepairProgress> {
        let volumes = self.volumes.borrow();
        let wanted = volumes.values().filter(|slot| pool.is_none_or(|pool| slot.pool.name == pool));
        let reports = wanted.filter_map(|slot| slot.serving()?.repair_report());
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

    /// Has every volume notice when a round of repair begins and ends.
    pub(super) fn note_repair(&self) {
        for head in self.heads() {
            head.repair_report();
        }
    }
}

fn no_such_pool(name: &str) -> ApiError {
    ApiError::not_found(format!("no such pool: {name}")).with_hint("`sdsctl pool ls` lists them")
}

/// A path that cannot be used, as a disk without an identity.
fn unusable_disk(path: &str, reason: &str) -> Disk {
    Disk {
        id: DiskId::default(),
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

impl Node {
    fn view_tombstone(&self, record: &VolumeRecord) -> Volume {
        Volume {
            id: record.id,
            name: format!("{}/{}", record.pool, record.name),
            size: record.size_bytes,
            cutting: 0,
            allocated: 0,
            space: self.tombstone_space(record.id),
            epoch: String::new(),
            redundancy: Redundancy::Full,
            exports: Vec::new(),
            state: VolumeState::Deleting,
            failures: Vec::new(),
            unrepairable: 0,
            narrowed: None,
            repair: None,
        }
    }
}
