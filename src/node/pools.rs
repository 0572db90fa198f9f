//! Pools, and the orders of an operator about disks.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::Node;
use super::disks::DiskSlot;
use super::opener::OpenFailure;
use super::volumes::{VolumeSlot, api_error};
use crate::admin::error::ApiError;
use crate::admin::types::{
    AddDisk, CreatePool, Disk, DiskState as Shown, FailureDomain as Wanted, Pool, PoolScheme,
    Removed,
};
use crate::disk::{DiskOpenError, Geometry};
use crate::id::{BLOCK_BYTES, DiskId, PoolId};
use crate::meta::record::{DiskRecord, DiskState, FailureDomain, PoolRecord};
use crate::shard::Scheme;

/// How long an order to remove a disk waits until the disk is empty: less than a command may take.
const EMPTY_PATIENCE: Duration = Duration::from_secs(20);
/// Pause between two looks whether it is.
const EMPTY_POLL: Duration = Duration::from_millis(200);

/// The scheme as segments have it.
pub(super) fn scheme_of(scheme: PoolScheme) -> Scheme {
    match scheme {
        PoolScheme::Ec { data, parity } => Scheme { data, parity },
        PoolScheme::Replicas { copies } => Scheme::replicated(copies),
    }
}

/// The scheme as people write it.
pub(super) fn shown_scheme(scheme: Scheme) -> PoolScheme {
    match scheme {
        Scheme { data: 1, parity } => PoolScheme::Replicas { copies: parity + 1 },
        Scheme { data, parity } => PoolScheme::Ec { data, parity },
    }
}

impl Node {
    /// Creates a pool over all disks of the node.
    pub(super) async fn create_pool(&self, request: CreatePool) -> Result<Pool, ApiError> {
        request.check()?;
        let _lock = self.changes.lock().await;
        self.check_slot_sizes()?;
        let failure_domain = match request.failure_domain {
            Wanted::Disk => FailureDomain::Disk,
            Wanted::Node => FailureDomain::Node,
            Wanted::Rack => FailureDomain::Rack,
        };
        self.check_width(request.scheme, failure_domain)?;
        let record = PoolRecord {
            id: PoolId::from_bytes(self.options.env.random_bytes()),
            min_size: request.effective_min_size(),
            scheme: scheme_of(request.scheme),
            failure_domain,
            name: request.name,
        };
        self.schema.create_pool(&record).await.map_err(api_error)?;
        self.pools.borrow_mut().insert(record.name.clone(), record.clone());
        self.mirror_catalog().await;
        self.view_pool(&record.name)
    }

    /// Refuses a pool that is wider than there are failure domains.
    fn check_width(&self, scheme: PoolScheme, domain: FailureDomain) -> Result<(), ApiError> {
        let (width, have) = (usize::from(scheme.width()), self.domain_count(domain));
        if width <= have {
            return Ok(());
        }
        Err(match (domain, &self.cluster) {
            (FailureDomain::Disk, None) => {
                ApiError::no_space(format!("{scheme} needs {width} disks, the node has {have}"))
                    .with_hint("add disks, or choose a narrower scheme")
            }
            (_, None) => ApiError::no_space(format!(
                "{scheme} over failure domains of kind {domain} needs {width} of them, and this \
                 cluster is one node"
            ))
            .with_hint("use --failure-domain disk"),
            (_, Some(_)) => ApiError::no_space(format!(
                "{scheme} over failure domains of kind {domain} needs {width} of them, and the \
                 cluster has disks in {have}"
            ))
            .with_hint("add some, or choose a narrower scheme or --failure-domain disk"),
        })
    }

    /// Failure domains of a kind that have disks.
    pub(super) fn domain_count(&self, domain: FailureDomain) -> usize {
        let own = self.slots().into_iter().map(|slot| self.domains_of(&slot.record.borrow()));
        let far = self.far_disks();
        let far = far.iter().map(|disk| self.domains_of(&disk.record.borrow()));
        let numbers = own.chain(far).map(|domains| domains.at(domain.into()));
        numbers.collect::<BTreeSet<u32>>().len()
    }

    /// Refuses a pool over disks whose slots differ: a shard is moved to any of them. A node does
    /// not take in such disks, but one that was set up before may have them.
    fn check_slot_sizes(&self) -> Result<(), ApiError> {
        let mut sizes: Vec<u64> =
            self.slots().iter().map(|slot| slot.record.borrow().slot_bytes).collect();
        sizes.sort_unstable();
        sizes.dedup();
        if sizes.len() > 1 {
            return Err(ApiError::conflict(format!(
                "the disks have slots of different sizes ({sizes:?} bytes), and those of a pool \
                 must be alike"
            ))
            .with_hint("remove the disks that differ, and add them again"));
        }
        Ok(())
    }

    /// Removes an empty pool.
    pub(super) async fn remove_pool(&self, name: &str) -> Result<Removed, ApiError> {
        let _lock = self.changes.lock().await;
        self.schema.remove_pool(name).await.map_err(api_error)?;
        self.pools.borrow_mut().remove(name);
        self.mirror_catalog().await;
        Ok(Removed { kind: "pool".into(), name: name.to_owned() })
    }

    /// Formats a device and takes it in.
    pub(super) async fn add_disk(self: &Rc<Self>, request: AddDisk) -> Result<Disk, ApiError> {
        request.check()?;
        let _lock = self.changes.lock().await;
        let path = request.path;
        if let Some(size) = request.size.filter(|size| !size.is_multiple_of(BLOCK_BYTES)) {
            return Err(ApiError::invalid(format!("{size} bytes are no multiple of 4096")));
        }
        if let Some(slot) = self.slots().iter().find(|slot| slot.path() == path) {
            return Err(ApiError::conflict(format!("{path} is disk {} already", slot.id)));
        }
        if let Some(Err(why)) = request.size.map(Geometry::plan) {
            return Err(ApiError::no_space(format!("{path} cannot be formatted: {why}")));
        }
        let device = self.options.opener.open(&path, request.size).map_err(|error| {
            let text = error.to_string();
            match error {
                OpenFailure::NotFound(_) if request.size.is_some() => ApiError::not_found(format!(
                    "{path} cannot be made: its directory is not there"
                )),
                OpenFailure::NotFound(_) => ApiError::not_found(text)
                    .with_hint("to make a file, say how large it shall be: --size 10G"),
                OpenFailure::InUse(_) => ApiError::conflict(text),
                OpenFailure::Other(_) => ApiError::invalid(text),
            }
        })?;
        if let Some(size) = request.size.filter(|size| *size != device.size()) {
            return Err(ApiError::conflict(format!(
                "{path} is there already and has {} bytes, not {size}",
                device.size()
            ))
            .with_hint("leave --size out to use it as it is"));
        }
        let confirm = |what: String| {
            ApiError::confirmation_required(format!("{path} {what}"))
                .with_hint("repeat with --yes to format it; what is on it is lost")
        };
        let known = |id: DiskId| self.disks.borrow().contains_key(&id);
        match self.probe(&*device).await {
            Ok(info) if known(info.disk) => {
                return Err(ApiError::conflict(format!(
                    "{path} has the identity of disk {}, which the node has already",
                    info.disk
                )));
            }
            Ok(info) if !request.force => {
                return Err(confirm(format!("is disk {} of cluster {}", info.disk, info.cluster)));
            }
            Err(DiskOpenError::NotFormatted | DiskOpenError::HalfFormatted) | Ok(_) => {}
            Err(DiskOpenError::Device(error)) => {
                return Err(ApiError::internal(format!("{path}: {error}")));
            }
            Err(error) if !request.force => {
                return Err(confirm(format!("carries something: {error}")));
            }
            Err(_) => {}
        }
        let probe = self
            .format(&*device, request.force)
            .await
            .map_err(|why| ApiError::no_space(format!("{path} cannot be formatted: {why}")))?;
        self.take_in(&path, device, probe)
            .await
            .map_err(|(_, why)| ApiError::internal(format!("{path}: {why}")))?;
        self.mirror_catalog().await;
        self.show_disk(probe.disk)
    }

    pub(super) fn show_disk(&self, id: DiskId) -> Result<Disk, ApiError> {
        self.find_disk(id).map(|slot| self.view_disk(&slot))
    }

    pub(super) fn find_disk(&self, id: DiskId) -> Result<Rc<DiskSlot>, ApiError> {
        self.disks.borrow().get(&id).cloned().ok_or_else(|| {
            ApiError::not_found(format!("no such disk: {id}"))
                .with_hint("`sdsctl disk ls` lists them")
        })
    }

    pub(super) async fn set_disk_state(
        &self,
        id: DiskId,
        state: DiskState,
    ) -> Result<(), ApiError> {
        self.update_disk(id, |record| {
            record.state = state;
            // Who takes a disk out of service that is being removed does not want it back.
            record.removing &= state == DiskState::Offline;
            record.heir = record.heir.filter(|_| record.removing);
        })
        .await?;
        let slot = self.disks.borrow().get(&id).cloned();
        let heir = slot.and_then(|slot| slot.record.borrow().heir);
        self.registry.set_heir(id, heir);
        Ok(())
    }

    pub(super) async fn update_disk(
        &self,
        id: DiskId,
        change: impl Fn(&mut DiskRecord),
    ) -> Result<(), ApiError> {
        let change = |record: &mut DiskRecord| {
            change(record);
            Ok(())
        };
        let record = self.schema.update_disk(id, change).await.map_err(api_error)?;
        if let Some(slot) = self.disks.borrow().get(&id) {
            *slot.record.borrow_mut() = record;
        }
        Ok(())
    }

    /// Takes a disk out of service.
    pub(super) async fn disk_offline(self: &Rc<Self>, id: DiskId) -> Result<Disk, ApiError> {
        let _lock = self.changes.lock().await;
        let slot = self.find_disk(id)?;
        self.set_disk_state(id, DiskState::Offline).await?;
        if slot.is_online() {
            self.take_down(&slot, Shown::Offline, "taken out of service by an operator");
        } else {
            slot.state.set(Shown::Offline);
            *slot.reason.borrow_mut() = Some("taken out of service by an operator".into());
        }
        self.tell_lost(id);
        self.mirror_catalog().await;
        Ok(self.view_disk(&slot))
    }

    /// Has every volume leave a disk, which stays in the node; over restarts, until it is put online.
    pub(super) async fn disk_drain(self: &Rc<Self>, id: DiskId) -> Result<Disk, ApiError> {
        let _lock = self.changes.lock().await;
        let slot = self.find_disk(id)?;
        if !slot.is_online() {
            return Err(ApiError::conflict(format!(
                "disk {id} is {}: nothing can be moved from it",
                slot.state.get()
            ))
            .with_hint("what is on it is rebuilt from other disks while it is away"));
        }
        self.update_disk(id, |record| record.state = DiskState::Draining).await?;
        self.begin_draining(&slot);
        self.tell_lost(id);
        self.mirror_catalog().await;
        Ok(self.view_disk(&slot))
    }

    /// Puts a disk into service again.
    pub(super) async fn disk_online(self: &Rc<Self>, id: DiskId) -> Result<Disk, ApiError> {
        let _lock = self.changes.lock().await;
        let slot = self.find_disk(id)?;
        self.set_disk_state(id, DiskState::Online).await?;
        slot.sickness.forgive();
        if slot.state.get() == Shown::Draining {
            slot.state.set(Shown::Online);
            slot.reason.borrow_mut().take();
            self.registry.set_draining(id, false);
            self.tell_returned(id);
        }
        if !slot.is_online() {
            self.reopen(&slot).await.map_err(|(state, why)| {
                let text = format!("{} stays {state}: {why}", slot.path());
                slot.state.set(state);
                *slot.reason.borrow_mut() = Some(why);
                if state == Shown::Missing {
                    ApiError::not_found(text)
                } else {
                    ApiError::conflict(text)
                }
            })?;
        }
        self.mirror_catalog().await;
        Ok(self.view_disk(&slot))
    }

    /// Takes a disk out of the node for good, once what was on it is rebuilt on the others.
    pub(super) async fn remove_disk(
        self: &Rc<Self>,
        id: DiskId,
        force: bool,
    ) -> Result<Removed, ApiError> {
        if !self.disks.borrow().contains_key(&id) && self.removed.borrow().contains(&id) {
            // It was being emptied when it was last asked for, and is gone since.
            return Ok(Removed { kind: "disk".into(), name: id.to_string() });
        }
        let slot = self.find_disk(id)?;
        let holds = slot.disk().is_none_or(|disk| disk.volume_counts().0 > 0);
        if holds && !force {
            return Err(ApiError::confirmation_required(format!(
                "disk {id} at {} holds data, or cannot say that it does not",
                slot.path()
            )));
        }
        {
            let _lock = self.changes.lock().await;
            self.check_removable(id)?;
        }
        self.empty_disk(&slot).await?;
        if self.cluster.is_some() && !self.users_everywhere(id).await?.is_empty() {
            self.mark_removing(&slot).await?;
            return Err(ApiError::conflict(format!(
                "disk {id} still has data of volumes of other nodes, which is being rebuilt elsewhere"
            ))
            .with_hint(format!(
                "it is removed as soon as it is empty; `sdsctl disk online {id}` keeps the disk"
            )));
        }
        let _lock = self.changes.lock().await;
        self.finish_removal(&slot).await?;
        Ok(Removed { kind: "disk".into(), name: id.to_string() })
    }

    /// Removes a disk that nobody needs. The caller holds the lock on changes.
    async fn finish_removal(self: &Rc<Self>, slot: &Rc<DiskSlot>) -> Result<(), ApiError> {
        let id = slot.id;
        if self.removed.borrow().contains(&id) {
            return Ok(());
        }
        self.check_removable(id)?;
        self.set_disk_state(id, DiskState::Removed).await?;
        self.removed.borrow_mut().insert(id);
        if slot.is_online() {
            self.take_down(slot, Shown::Offline, "removed by an operator");
        }
        self.disks.borrow_mut().remove(&id);
        self.registry.forget(id);
        self.tell_removed(id);
        self.mirror_catalog().await;
        Ok(())
    }

    /// Removes the disks that are empty by now of those that an operator wants to be removed.
    pub(super) fn go_on_removing(self: &Rc<Self>) {
        for slot in self.slots() {
            if !slot.record.borrow().removing || !self.users_of(slot.id).is_empty() {
                continue;
            }
            let node = self.clone();
            tokio::task::spawn_local(async move {
                if !matches!(node.users_everywhere(slot.id).await, Ok(users) if users.is_empty()) {
                    return;
                }
                // Whoever changes something now leaves it for the next look.
                let Ok(_lock) = node.changes.try_lock() else { return };
                let wanted = slot.record.borrow().removing && node.users_of(slot.id).is_empty();
                if wanted && let Err(error) = node.finish_removal(&slot).await {
                    tracing::debug!(disk = %slot.id, %error, "not removed yet");
                }
            });
        }
    }

    /// The volumes that need a disk, as far as they can tell.
    pub(super) fn users_of(&self, disk: DiskId) -> Vec<String> {
        let volumes = self.volumes.borrow();
        let uses =
            |volume: &&Rc<VolumeSlot>| volume.serving().is_none_or(|head| head.uses_disk(disk));
        volumes.values().filter(uses).map(|volume| volume.name()).collect()
    }

    /// Has every volume leave a disk that is to be removed, and waits for it. If that takes too long
    /// it goes on, over restarts too, until the disk is gone or put online again.
    async fn empty_disk(self: &Rc<Self>, slot: &Rc<DiskSlot>) -> Result<(), ApiError> {
        let users = || self.users_of(slot.id);
        let drained = !users().is_empty();
        if drained {
            self.mark_removing(slot).await?;
        }
        let empty = async {
            while !users().is_empty() && slot.record.borrow().removing {
                self.tell_lost(slot.id);
                sleep(EMPTY_POLL).await;
            }
        };
        let ended = timeout(EMPTY_PATIENCE, empty).await.is_ok();
        let given_up = drained && {
            let removed = self.removed.borrow().contains(&slot.id);
            !(removed || slot.record.borrow().removing)
        };
        if ended && !given_up {
            return Ok(());
        }
        if given_up {
            return Err(ApiError::conflict(format!("disk {} was put online again", slot.id)));
        }
        Err(ApiError::conflict(format!(
            "disk {} still has data of {}, which is being rebuilt on the other disks",
            slot.id,
            users().join(", ")
        ))
        .with_hint(format!(
            "it is removed as soon as it is empty; if no other disk can take the data, add one \
             first; `sdsctl disk online {}` keeps the disk",
            slot.id
        )))
    }

    /// Notes that a disk is to be removed once it is empty.
    async fn mark_removing(self: &Rc<Self>, slot: &Rc<DiskSlot>) -> Result<(), ApiError> {
        let _lock = self.changes.lock().await;
        self.update_disk(slot.id, |record| {
            record.removing = true;
            if record.state == DiskState::Online {
                record.state = DiskState::Draining;
            }
        })
        .await?;
        if slot.is_online() {
            self.begin_draining(slot);
        } else {
            self.registry.forget(slot.id);
        }
        Ok(())
    }

    /// Refuses to remove a disk while a volume is not served, or would lose data with it: its head
    /// alone knows what needs the disk.
    pub(super) fn check_removable(&self, id: DiskId) -> Result<(), ApiError> {
        let slots: Vec<_> = self.volumes.borrow().values().cloned().collect();
        for slot in slots {
            let name = slot.name();
            let head = slot.serving().ok_or_else(|| {
                ApiError::conflict(format!("volume {name} is not served: {}", slot.why_not()))
            })?;
            if head.uses_disk(id) && !head.bears_loss_of(&BTreeSet::from([id])) {
                return Err(ApiError::conflict(format!(
                    "volume {name} has segments without redundancy; wait until they are rebuilt"
                )));
            }
        }
        Ok(())
    }
}
