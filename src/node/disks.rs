//! The disks of a node: opened, watched, taken out and put back.
//!
//! A disk is what its superblock says it is, wherever it is found. Disks that cannot be used are
//! told of in status with the reason, and never used: of another cluster, with the identity of
//! another disk, shorter than they were, not formatted.
//!
//! A disk that fails is taken out of the registry at once; heads are told to rebuild what was on
//! it after [`LOST_AFTER`]. A disk that comes back is opened anew and offered to every head, but not
//! before it has proven that it can be written to; one that keeps failing comes back ever later, so
//! that what was on it is rebuilt meanwhile.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout};

use super::care::Sickness;
use super::counts::DiskCounts;
use super::opener::{Detachable, OpenFailure, open_patiently};
use super::{Node, NodeError};
use crate::admin::types::DiskState as Shown;
use crate::disk::device::BlockDevice;
use crate::disk::{
    Disk, DiskOpenError, FormatOptions, Geometry, SuperblockInfo, probe_superblock, trial_write,
};
use crate::id::DiskId;
use crate::meta::record::{DiskRecord, DiskState};
use crate::shard::domain::Domains;
use crate::shard::local::LocalClient;
use crate::shard::reserve;

/// How long a failed disk may be away before what was on it is rebuilt elsewhere.
pub(super) const LOST_AFTER: Duration = Duration::from_secs(2);
/// A disk that fails sooner than this after it came up counts as one that keeps failing.
const STEADY_AFTER: Duration = Duration::from_secs(30);
/// Longest time until a disk that keeps failing is tried again.
const RETRY_MAX: Duration = Duration::from_mins(1);
/// How long a disk may take to tell its superblock, or to write it.
const PROBE_PATIENCE: Duration = Duration::from_secs(5);

/// How long a disk may take to tell its tables.
const OPEN_PATIENCE: Duration = Duration::from_mins(1);

/// A disk of the node, open or not.
pub(super) struct DiskSlot {
    pub(super) id: DiskId,
    pub(super) record: RefCell<DiskRecord>,
    pub(super) state: Cell<Shown>,
    pub(super) reason: RefCell<Option<String>>,
    pub(super) geometry: Cell<Option<Geometry>>,
    client: RefCell<Option<Rc<LocalClient>>>,
    device: RefCell<Option<Rc<Detachable>>>,
    /// Being opened, or its last requests are still under way.
    busy: Cell<bool>,
    down_since: Cell<Instant>,
    pub(super) up_since: Cell<Instant>,
    told_lost: Cell<bool>,
    /// How often in a row it failed soon after it came up.
    short_lives: Cell<u32>,
    /// Failed writes that were looked into.
    failed_writes: Cell<u64>,
    /// What it counted the other times it was open.
    past: Cell<DiskCounts>,
    pub(super) sickness: Sickness,
}

impl DiskSlot {
    fn new(record: DiskRecord) -> Self {
        let now = Instant::now();
        Self {
            id: record.id,
            record: RefCell::new(record),
            state: Cell::new(Shown::Missing),
            reason: RefCell::default(),
            geometry: Cell::new(None),
            client: RefCell::default(),
            device: RefCell::default(),
            busy: Cell::new(false),
            down_since: Cell::new(now),
            up_since: Cell::new(now),
            told_lost: Cell::new(false),
            short_lives: Cell::new(0),
            failed_writes: Cell::new(0),
            past: Cell::default(),
            sickness: Sickness::default(),
        }
    }

    /// How long it stays down at least, by how often it has failed.
    fn retry_after(&self) -> Duration {
        match self.short_lives.get() {
            0 | 1 => Duration::ZERO,
            lives => (LOST_AFTER * 2_u32.saturating_pow(lives.min(10) - 1)).min(RETRY_MAX),
        }
    }

    /// The disk, if it serves.
    pub(super) fn disk(&self) -> Option<Rc<Disk>> {
        self.client.borrow().as_ref().filter(|_| self.is_online()).map(|client| client.current())
    }

    /// The disk as it was last open, for its counters.
    pub(super) fn last_disk(&self) -> Option<Rc<Disk>> {
        self.client.borrow().as_ref().map(|client| client.current())
    }

    /// What it has counted since the node started.
    pub(super) fn counted(&self) -> DiskCounts {
        let past = self.past.get();
        self.last_disk().map_or(past, |disk| past.and(&disk))
    }

    pub(super) fn is_online(&self) -> bool {
        self.state.get().is_online()
    }

    pub(super) fn path(&self) -> String {
        self.record.borrow().path.clone()
    }

    pub(super) fn down(&self, state: Shown, reason: &str) {
        self.state.set(state);
        *self.reason.borrow_mut() = Some(reason.to_owned());
    }
}

/// Why a disk is not in use: how it is shown, and the sentence.
pub(super) type Refusal = (Shown, String);

fn refused<T>(state: Shown, reason: impl Into<String>) -> Result<T, Refusal> {
    Err((state, reason.into()))
}

fn refusal(error: OpenFailure) -> Refusal {
    match error {
        OpenFailure::NotFound(_) => (Shown::Missing, error.to_string()),
        other => (Shown::Failed, other.to_string()),
    }
}

impl Node {
    pub(super) fn slots(&self) -> Vec<Rc<DiskSlot>> {
        self.disks.borrow().values().cloned().collect()
    }

    /// Opens all disks that the store knows or `paths` lists. Blank devices of `paths` are
    /// formatted, and formatted ones of this cluster that hold nothing yet are taken in.
    pub(super) async fn open_disks(self: &Rc<Self>, paths: &[String]) -> Result<(), NodeError> {
        for stored in self.schema.disks().await? {
            let record = stored.record;
            let next = self.next_domain.get().max(record.domain + 1);
            self.next_domain.set(next);
            if record.state == DiskState::Removed {
                self.removed.borrow_mut().insert(record.id);
                continue;
            }
            self.registry.set_heir(record.id, record.heir);
            let slot = Rc::new(DiskSlot::new(record));
            self.disks.borrow_mut().insert(slot.id, slot);
        }
        let mut all: Vec<String> = self.slots().into_iter().map(|slot| slot.path()).collect();
        all.extend(paths.iter().cloned());
        let mut seen = std::collections::BTreeSet::new();
        all.retain(|path| seen.insert(path.clone()));
        for path in all {
            let Err((state, reason)) = self.open_at_start(&path, paths.contains(&path)).await
            else {
                continue;
            };
            tracing::warn!(path, reason, "disk not used");
            let slot = self.slots().into_iter().find(|s| s.path() == path && !s.is_online());
            match slot {
                Some(slot) => slot.down(state, &reason),
                None => drop(self.problems.borrow_mut().insert(path, reason)),
            }
        }
        for slot in self.slots().into_iter().filter(|slot| !slot.is_online()) {
            if slot.reason.borrow().is_none() {
                slot.down(Shown::Missing, "it was not found at any path");
            }
            let record = slot.record.borrow();
            if record.state != DiskState::Draining && !record.removing {
                self.registry.expect(slot.id, Domains::of_one_node(record.domain));
            }
        }
        Ok(())
    }

    async fn open_at_start(self: &Rc<Self>, path: &str, listed: bool) -> Result<(), Refusal> {
        let owner = self.slots().into_iter().find(|slot| slot.path() == path);
        if let Some(owner) = &owner
            && owner.record.borrow().state.is_out()
        {
            return match owner.record.borrow().state {
                DiskState::SetAside => {
                    refused(Shown::SetAside, "it was slow or failing before the last start")
                }
                _ => refused(Shown::Offline, "taken out of service by an operator"),
            };
        }
        let device = open_patiently(&*self.options.opener, path).await.map_err(refusal)?;
        let probe = match self.probe(&*device).await {
            Ok(probe) => probe,
            Err(DiskOpenError::NotFormatted | DiskOpenError::HalfFormatted)
                if listed && owner.is_none() =>
            {
                self.format(&*device, false).await.map_err(|reason| (Shown::Failed, reason))?
            }
            Err(error) => return refused(Shown::Failed, error.to_string()),
        };
        if probe.cluster != self.identity.cluster {
            return refused(
                Shown::Failed,
                format!("disk {} belongs to another cluster, {}", probe.disk, probe.cluster),
            );
        }
        if self.removed.borrow().contains(&probe.disk) {
            return refused(Shown::Failed, "the disk was removed: add it again to use it anew");
        }
        let slot = self.disks.borrow().get(&probe.disk).cloned();
        let Some(slot) = slot else {
            if !listed {
                return refused(Shown::Failed, format!("disk {} is at its path", probe.disk));
            }
            return self.take_in(path, device, probe).await;
        };
        if slot.is_online() {
            let reason =
                format!("it has the identity of disk {} at {}: a copy?", slot.id, slot.path());
            return refused(Shown::Failed, reason);
        }
        if slot.path() != path {
            self.moved(&slot, path).await?;
        }
        self.bring_up(&slot, device).await
    }

    async fn moved(&self, slot: &DiskSlot, path: &str) -> Result<(), Refusal> {
        tracing::info!(disk = %slot.id, from = slot.path(), to = path, "disk found elsewhere");
        let update = |record: &mut DiskRecord| {
            path.clone_into(&mut record.path);
            Ok(())
        };
        let record = self.schema.update_disk(slot.id, update).await;
        let record = record.map_err(|error| (Shown::Failed, error.to_string()))?;
        *slot.record.borrow_mut() = record;
        Ok(())
    }

    fn open_device(&self, path: &str) -> Result<Rc<dyn BlockDevice>, Refusal> {
        self.options.opener.open(path, None).map_err(refusal)
    }

    pub(super) async fn probe(
        &self,
        device: &dyn BlockDevice,
    ) -> Result<SuperblockInfo, DiskOpenError> {
        match timeout(PROBE_PATIENCE, probe_superblock(device)).await {
            Ok(result) => result,
            Err(_) => Err(DiskOpenError::SuperblockDamaged("the device does not answer".into())),
        }
    }

    /// Size of the slots of the disks there are; none if there are none.
    fn slot_bytes(&self) -> Option<u64> {
        self.slots().first().map(|slot| slot.record.borrow().slot_bytes)
    }

    /// Whether a disk of this geometry can be used with disks that have slots of `slot_bytes`: a
    /// shard is moved to any disk, so all slots are of one size, and a disk has more of them than
    /// are reserved.
    ///
    /// # Errors
    /// Why not.
    fn check_geometry(geometry: &Geometry, slot_bytes: Option<u64>) -> Result<(), String> {
        let (slots, own) = (geometry.slots, geometry.slot_bytes);
        if let Some(wanted) = slot_bytes.filter(|wanted| *wanted != own) {
            return Err(format!(
                "its slots have {own} bytes, those of the other disks {wanted}: all must be alike"
            ));
        }
        if slots < reserve::SLOTS_MIN {
            return Err(format!(
                "it has room for {slots} slots of {own} bytes, but {} are needed at least: a \
                 larger disk is needed",
                reserve::SLOTS_MIN
            ));
        }
        Ok(())
    }

    /// Whether a device can be written to; the error is a sentence.
    async fn try_to_write(&self, device: &dyn BlockDevice) -> Result<(), String> {
        match timeout(PROBE_PATIENCE, trial_write(device)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(format!("it cannot be written to: {error}")),
            Err(_) => Err("it cannot be written to: the device does not answer".into()),
        }
    }

    /// Formats a device as a new disk of this cluster.
    pub(super) async fn format(
        &self,
        device: &dyn BlockDevice,
        force: bool,
    ) -> Result<SuperblockInfo, String> {
        let slot_bytes = self.slot_bytes();
        let geometry = Geometry::plan_with(device.size(), slot_bytes, None);
        Self::check_geometry(&geometry.map_err(|error| error.to_string())?, slot_bytes)?;
        let options = FormatOptions {
            disk: DiskId::from_bytes(self.options.env.random_bytes()),
            cluster: self.identity.cluster,
            slot_bytes,
            volumes_max: None,
            force,
        };
        Disk::format(device, options).await.map_err(|error| error.to_string())?;
        self.probe(device).await.map_err(|error| error.to_string())
    }

    /// Takes in a disk of this cluster that the store does not know and that holds nothing: one
    /// that was formatted just before a crash.
    pub(super) async fn take_in(
        self: &Rc<Self>,
        path: &str,
        device: Rc<dyn BlockDevice>,
        probe: SuperblockInfo,
    ) -> Result<(), Refusal> {
        let failed = |error: String| (Shown::Failed, error);
        let detachable = Rc::new(Detachable::new(device));
        let disk = Disk::open(detachable.clone()).await.map_err(|e| failed(e.to_string()))?;
        if disk.volume_counts().0 > 0 {
            let reason = "the metadata store does not know this disk, and it holds volumes";
            return refused(Shown::Failed, reason);
        }
        Self::check_geometry(&probe.geometry, self.slot_bytes()).map_err(failed)?;
        let domain = self.next_domain.get();
        let record = DiskRecord {
            id: probe.disk,
            path: path.to_owned(),
            node: self.options.name.clone(),
            domain,
            slot_bytes: probe.geometry.slot_bytes,
            size_bytes: probe.geometry.size_bytes,
            state: DiskState::Online,
            added_at_unix_s: (self.options.unix_seconds)(),
            removing: false,
            heir: None,
        };
        self.schema.add_disk(&record).await.map_err(|e| failed(e.to_string()))?;
        self.next_domain.set(domain + 1);
        let slot = Rc::new(DiskSlot::new(record));
        self.disks.borrow_mut().insert(slot.id, slot.clone());
        self.problems.borrow_mut().remove(path);
        self.serve_disk(&slot, disk, detachable)
    }

    /// Opens the disk of a slot on a device that says to be it.
    async fn bring_up(
        self: &Rc<Self>,
        slot: &Rc<DiskSlot>,
        device: Rc<dyn BlockDevice>,
    ) -> Result<(), Refusal> {
        let detachable = Rc::new(Detachable::new(device));
        match timeout(OPEN_PATIENCE, Disk::open(detachable.clone())).await {
            Ok(Ok(disk)) => self.serve_disk(slot, disk, detachable),
            Ok(Err(error)) => refused(Shown::Failed, error.to_string()),
            Err(_) => refused(Shown::Failed, "its tables cannot be read: it does not answer"),
        }
    }

    fn serve_disk(
        self: &Rc<Self>,
        slot: &Rc<DiskSlot>,
        disk: Rc<Disk>,
        device: Rc<Detachable>,
    ) -> Result<(), Refusal> {
        let failed = |error: crate::shard::ShardError| (Shown::Failed, error.to_string());
        let info = disk.info().map_err(failed)?;
        slot.geometry.set(Some(*disk.geometry()));
        let known = slot.client.borrow().clone();
        let client = match known {
            Some(client) => {
                let before = client.current();
                client.replace(disk).map_err(failed)?;
                slot.past.set(slot.past.get().and(&before));
                client
            }
            None => Rc::new(LocalClient::new(disk)),
        };
        *slot.client.borrow_mut() = Some(client.clone());
        *slot.device.borrow_mut() = Some(device);
        slot.state.set(Shown::Online);
        slot.reason.borrow_mut().take();
        slot.up_since.set(Instant::now());
        slot.told_lost.set(false);
        slot.failed_writes.set(0);
        let domain = slot.record.borrow().domain;
        self.registry.add(client, Domains::of_one_node(domain), info);
        tracing::info!(disk = %slot.id, path = slot.path(), domain, "disk online");
        if slot.record.borrow().state == DiskState::Draining {
            self.begin_draining(slot);
        }
        Ok(())
    }

    /// Has a disk that is up avoided and emptied.
    pub(super) fn begin_draining(&self, slot: &DiskSlot) {
        let removing = slot.record.borrow().removing;
        let why = match slot.record.borrow().heir {
            Some(heir) => format!("an operator replaces it by disk {heir}"),
            None if removing => "an operator removes it".to_owned(),
            None => "an operator empties it".to_owned(),
        };
        slot.state.set(Shown::Draining);
        *slot.reason.borrow_mut() = Some(why);
        self.registry.set_draining(slot.id, true);
    }

    /// Tries to bring a disk back that is down; then offers it to every head.
    ///
    /// # Errors
    /// Why it stays down.
    pub(super) async fn reopen(self: &Rc<Self>, slot: &Rc<DiskSlot>) -> Result<(), Refusal> {
        if slot.busy.replace(true) {
            return refused(slot.state.get(), "its last requests are still under way");
        }
        let result = self.reopen_unguarded(slot).await;
        slot.busy.set(false);
        if result.is_ok() {
            self.tell_returned(slot.id);
            self.mirror_catalog().await;
        }
        result
    }

    async fn reopen_unguarded(self: &Rc<Self>, slot: &Rc<DiskSlot>) -> Result<(), Refusal> {
        let device = self.open_device(&slot.path())?;
        let probe = match self.probe(&*device).await {
            Ok(probe) => probe,
            Err(error) => return refused(Shown::Failed, error.to_string()),
        };
        if probe.disk != slot.id {
            return refused(Shown::Failed, format!("disk {} is at its path now", probe.disk));
        }
        if probe.cluster != self.identity.cluster {
            return refused(Shown::Failed, "the disk belongs to another cluster now");
        }
        self.try_to_write(&*device).await.map_err(|reason| (Shown::Failed, reason))?;
        self.bring_up(slot, device).await
    }

    /// Takes a disk out of use. Its device is let go of once its last requests have ended.
    pub(super) fn take_down(self: &Rc<Self>, slot: &Rc<DiskSlot>, state: Shown, reason: &str) {
        tracing::warn!(disk = %slot.id, path = slot.path(), reason, "disk {state}");
        self.registry.remove(slot.id);
        let disk = slot.last_disk();
        slot.down(state, reason);
        slot.down_since.set(Instant::now());
        let short = slot.up_since.get().elapsed() < STEADY_AFTER && state == Shown::Failed;
        slot.short_lives.set(if short { slot.short_lives.get() + 1 } else { 0 });
        let device = slot.device.borrow_mut().take();
        let (Some(disk), Some(device)) = (disk, device) else { return };
        slot.busy.set(true);
        let (slot, reason) = (slot.clone(), reason.to_owned());
        tokio::task::spawn_local(async move {
            disk.close(&reason).await;
            device.detach();
            slot.busy.set(false);
        });
    }

    /// Tells every head that a disk came back. What the heads then ask of it waits for nobody: it
    /// may hang.
    pub(super) fn tell_returned(&self, disk: DiskId) {
        for head in self.heads() {
            tokio::task::spawn_local(async move { head.disk_returned(disk).await });
        }
    }

    /// Tells every head that what was on a disk is to be rebuilt.
    pub(super) fn tell_lost(&self, disk: DiskId) {
        for head in self.heads() {
            head.disk_lost(disk);
        }
    }

    /// Tells every head that a disk will never be asked again.
    pub(super) fn tell_removed(&self, disk: DiskId) {
        for head in self.heads() {
            head.disk_removed(disk);
        }
    }

    /// Looks after every disk once.
    pub(super) async fn watch_disks(self: &Rc<Self>) {
        join_all(self.slots().iter().map(|slot| self.watch_disk(slot))).await;
        for disk in self.removed.borrow().iter() {
            self.tell_removed(*disk);
        }
        self.go_on_removing();
        self.registry.refresh().await;
    }

    async fn watch_disk(self: &Rc<Self>, slot: &Rc<DiskSlot>) {
        if slot.is_online() {
            if slot.state.get() == Shown::Draining {
                self.tell_lost(slot.id);
            }
            if let Some(reason) = self.ill(slot).await
                && slot.is_online()
            {
                self.take_down(slot, Shown::Failed, &reason);
            }
            return;
        }
        if slot.down_since.get().elapsed() >= LOST_AFTER {
            if !slot.told_lost.replace(true) {
                tracing::warn!(disk = %slot.id, "what was on the disk is rebuilt elsewhere");
            }
            // Again and again, because segments are sealed meanwhile.
            self.tell_lost(slot.id);
        }
        if slot.record.borrow().state.is_out() || slot.busy.get() {
            return;
        }
        if slot.down_since.get().elapsed() < slot.retry_after() {
            return;
        }
        // No other disk waits for this one.
        let (node, slot) = (self.clone(), slot.clone());
        tokio::task::spawn_local(async move {
            if let Err((state, reason)) = node.reopen(&slot).await
                && !slot.is_online()
                && slot.record.borrow().state != DiskState::Offline
            {
                slot.down(state, &reason);
            }
        });
    }

    /// Why a disk that is online cannot stay so.
    async fn ill(&self, slot: &DiskSlot) -> Option<String> {
        let disk = slot.disk()?;
        if let Some(reason) = disk.offline_reason() {
            return Some(reason);
        }
        let size = disk.geometry().size_bytes;
        if let Err(reason) = self.options.opener.check(&slot.path(), size) {
            return Some(reason);
        }
        let device = slot.device.borrow().clone()?;
        match self.probe(&*device).await {
            Ok(probe) if probe.disk == slot.id => {
                // A failed write is looked into once.
                let failed = disk.stats().failed_writes();
                if slot.failed_writes.replace(failed) == failed {
                    return None;
                }
                self.try_to_write(&*device).await.err()
            }
            Ok(probe) => Some(format!("it says to be disk {} now", probe.disk)),
            Err(error) => Some(format!("its superblock cannot be read any more: {error}")),
        }
    }

    /// Closes all disks; the last thing that a node does.
    pub(super) async fn close_disks(&self) {
        let closing = self.slots().into_iter().filter_map(|slot| {
            let disk = slot.disk()?;
            self.registry.remove(slot.id);
            Some(async move { disk.close("the node stops").await })
        });
        if timeout(LOST_AFTER, join_all(closing)).await.is_err() {
            tracing::warn!("writes to a disk are still under way");
        }
    }
}
