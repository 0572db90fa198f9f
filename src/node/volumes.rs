//! The volumes of a node: taken over, served, created, resized, deleted.
//!
//! Each volume has one task that takes it over, again and again if need be, and waits while its
//! head serves. A deleted volume is a tombstone until every disk has confirmed that it dropped
//! the volume's shards.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use super::exports::{TargetStats, volume_label};
use super::{Node, NodeError};
use crate::admin::error::ApiError;
use crate::admin::types::{CreateVolume, DiskState, Removed, Volume, VolumeName};
use crate::id::{DiskId, VolumeId};
use crate::meta::record::{PoolRecord, VolumeRecord, VolumeState};
use crate::meta::schema::SchemaError;
use crate::shard::SlotClass;
use crate::volume::head::{Head, HeadContext, PoolPolicy};
use crate::volume::root::Root;
use crate::volume::rules::{LogSet, Member};
use crate::volume::takeover::take_over;

/// First and longest pause before a take-over that failed is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));
/// How long a new volume may take to be served before its creator is answered all the same.
const CREATE_PATIENCE: Duration = Duration::from_secs(20);
/// How long a head may take to release its volume.
const RELEASE_PATIENCE: Duration = Duration::from_secs(18);
/// Pause between two rounds of dropping a deleted volume.
const REAP_INTERVAL: Duration = Duration::from_secs(1);
/// How long one disk may take to drop a volume.
const DROP_PATIENCE: Duration = Duration::from_secs(10);
/// Least share of the index cache that a head gets, bytes.
const CACHE_BYTES_MIN: usize = 1 << 20;

/// What heads count, of all heads that a volume had.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counted {
    pub(super) records: u64,
    pub(super) failovers: u64,
}

impl Counted {
    fn and(self, head: &Head) -> Self {
        Self {
            records: self.records + head.stats.records.get(),
            failovers: self.failovers + head.stats.failovers.get(),
        }
    }
}

/// A volume that this node serves, or tries to.
pub(super) struct VolumeSlot {
    pub(super) id: VolumeId,
    pub(super) record: RefCell<VolumeRecord>,
    pub(super) pool: PoolRecord,
    pub(super) head: RefCell<Option<Rc<Head>>>,
    /// Whom the take-over waits for, or why it failed.
    pub(super) why: RefCell<Option<String>>,
    /// Whether the last take-over failed.
    pub(super) failed: Cell<bool>,
    /// Told whenever a head comes or goes.
    pub(super) changed: Notify,
    /// The volume is being released or deleted.
    pub(super) closing: Cell<bool>,
    /// Attached clients.
    pub(super) attached: Cell<u32>,
    pub(super) stats: TargetStats,
    /// What heads counted that are gone.
    past: Cell<Counted>,
    task: RefCell<Option<AbortHandle>>,
    /// What lies beyond the end is being cut off.
    pub(super) cutting: Cell<bool>,
}

impl VolumeSlot {
    fn new(record: VolumeRecord, pool: PoolRecord) -> Rc<Self> {
        Rc::new(Self {
            id: record.id,
            record: RefCell::new(record),
            pool,
            head: RefCell::default(),
            why: RefCell::default(),
            failed: Cell::new(false),
            changed: Notify::new(),
            closing: Cell::new(false),
            attached: Cell::new(0),
            stats: TargetStats::default(),
            past: Cell::default(),
            task: RefCell::default(),
            cutting: Cell::new(false),
        })
    }

    /// The head, if it serves.
    pub(super) fn serving(&self) -> Option<Rc<Head>> {
        self.head.borrow().clone().filter(|head| head.is_serving())
    }

    /// Why the volume is not served, in a sentence.
    pub(super) fn why_not(&self) -> String {
        self.why.borrow().clone().unwrap_or_else(|| "the volume is being taken over".into())
    }

    /// Lets go of a head that stopped, so that the volume is taken over again.
    pub(super) fn dismiss(&self, head: &Rc<Head>) {
        let mut current = self.head.borrow_mut();
        if current.as_ref().is_some_and(|there| Rc::ptr_eq(there, head)) && !head.is_serving() {
            current.take();
            drop(current);
            self.keep_counts(head);
            self.changed.notify_waiters();
        }
    }

    fn keep_counts(&self, gone: &Head) {
        self.past.set(self.past.get().and(gone));
    }

    /// What all heads of the volume have counted since the node started.
    pub(super) fn counted(&self) -> Counted {
        let past = self.past.get();
        self.head.borrow().as_ref().map_or(past, |head| past.and(head))
    }

    /// Looks whether the head still serves.
    pub(super) fn look(&self) {
        let head = self.head.borrow().clone();
        if let Some(head) = head
            && !self.closing.get()
        {
            self.dismiss(&head);
        }
    }

    pub(super) fn close(&self) -> Option<Rc<Head>> {
        self.closing.set(true);
        if let Some(task) = self.task.borrow_mut().take() {
            task.abort();
        }
        self.changed.notify_waiters();
        let head = self.head.borrow_mut().take();
        if let Some(head) = &head {
            self.keep_counts(head);
        }
        head
    }

    /// Stops serving in order.
    pub(super) async fn release(&self) {
        let Some(head) = self.close() else { return };
        match timeout(RELEASE_PATIENCE, head.release()).await {
            Ok(Ok(())) => tracing::info!(volume = %self.id, "released"),
            Ok(Err(error)) => tracing::warn!(volume = %self.id, %error, "not released"),
            Err(_) => tracing::warn!(volume = %self.id, "not released in time"),
        }
    }

    pub(super) fn name(&self) -> String {
        let record = self.record.borrow();
        format!("{}/{}", record.pool, record.name)
    }
}

/// What a root says of its volume, so that a lost store can be rebuilt. That it is being cut is left
/// out: it must not be cut again after it grew.
pub(super) fn description(volume: &VolumeRecord, pool: &PoolRecord) -> serde_json::Value {
    let volume = VolumeRecord { cut_from_bytes: None, ..volume.clone() };
    serde_json::json!({ "volume": volume, "pool": pool })
}

impl Node {
    pub(super) fn volume_named(&self, pool: &str, name: &str) -> Option<Rc<VolumeSlot>> {
        let volumes = self.volumes.borrow();
        let found = volumes.values().find(|slot| {
            let record = slot.record.borrow();
            record.pool == pool && record.name == name
        });
        found.cloned()
    }

    /// Begins to take over every active volume, and to drop every deleted one.
    pub(super) async fn load_volumes(self: &Rc<Self>) -> Result<(), NodeError> {
        for stored in self.schema.volumes().await? {
            let record = stored.record;
            if record.state == VolumeState::Deleting {
                self.reap(record);
                continue;
            }
            let pool = self.pools.borrow().get(&record.pool).cloned();
            if let Some(pool) = pool {
                self.adopt(record, pool);
            } else {
                tracing::error!(volume = record.name, pool = record.pool, "no such pool");
            }
        }
        Ok(())
    }

    /// Starts the task of a volume.
    pub(super) fn adopt(self: &Rc<Self>, record: VolumeRecord, pool: PoolRecord) {
        let slot = VolumeSlot::new(record, pool);
        self.volumes.borrow_mut().insert(slot.id, slot.clone());
        let task = tokio::task::spawn_local(self.clone().keep(slot.clone()));
        *slot.task.borrow_mut() = Some(task.abort_handle());
    }

    async fn keep(self: Rc<Self>, slot: Rc<VolumeSlot>) {
        let mut pause = RETRY.0;
        while !slot.closing.get() {
            let started = Instant::now();
            let size = slot.record.borrow().size_bytes;
            let waiting = |why: &str| {
                tracing::info!(volume = slot.name(), why, "take-over waits");
                *slot.why.borrow_mut() = Some(self.explain(why));
            };
            match take_over(self.head_context(&slot), slot.id, size, &waiting).await {
                Ok(head) => {
                    pause = RETRY.0;
                    tracing::info!(
                        volume = slot.name(), epoch = %head.authority.epoch,
                        after_ms = started.elapsed().as_millis(), "serving"
                    );
                    slot.why.borrow_mut().take();
                    slot.failed.set(false);
                    // It may have begun with another size.
                    head.resize(slot.record.borrow().size_bytes);
                    // First it is one of those that hear of disks, then it is told what it missed.
                    *slot.head.borrow_mut() = Some(head.clone());
                    slot.changed.notify_waiters();
                    self.tell_missed(&head, started);
                    drop(head);
                    self.go_on_cutting(&slot);
                    slot.gone().await;
                }
                Err(error) => {
                    tracing::warn!(volume = slot.name(), %error, "take-over failed");
                    *slot.why.borrow_mut() = Some(error.to_string());
                    slot.failed.set(true);
                    sleep(pause).await;
                    pause = (pause * 2).min(RETRY.1);
                }
            }
        }
    }

    /// Says which disks the failure domains of a message are.
    fn explain(&self, why: &str) -> String {
        let down: Vec<String> =
            self.slots()
                .iter()
                .filter(|slot| !slot.is_online())
                .map(|slot| format!("{} (domain {})", slot.path(), slot.record.borrow().domain))
                .chain(self.far_disks().iter().filter(|disk| !disk.is_up()).map(|disk| {
                    format!("{} (domain {})", disk.label(), disk.record.borrow().domain)
                }))
                .collect();
        if down.is_empty() { why.to_owned() } else { format!("{why}; down: {}", down.join(", ")) }
    }

    fn head_context(&self, slot: &VolumeSlot) -> HeadContext {
        let mut config = self.options.head.clone();
        let share = self.options.index_cache_bytes / self.volumes.borrow().len().max(1);
        config.cache_bytes = share.max(CACHE_BYTES_MIN);
        HeadContext {
            env: self.options.env.clone(),
            disks: self.registry.at(slot.pool.failure_domain.into()),
            store: self.options.store.clone(),
            config,
            pool: PoolPolicy { scheme: slot.pool.scheme, min_size: slot.pool.min_size },
        }
    }

    /// Tells a new head which disks went and came while it took over.
    fn tell_missed(&self, head: &Rc<Head>, since: Instant) {
        for slot in self.slots() {
            if !slot.is_online() || slot.state.get() == DiskState::Draining {
                head.disk_lost(slot.id);
            } else if slot.up_since.get() >= since {
                let (head, disk) = (head.clone(), slot.id);
                tokio::task::spawn_local(async move { head.disk_returned(disk).await });
            }
        }
        for disk in self.far_disks() {
            if !disk.is_up() || disk.is_draining() {
                head.disk_lost(disk.id);
            } else if disk.up_since.get() >= since {
                let (head, disk) = (head.clone(), disk.id);
                tokio::task::spawn_local(async move { head.disk_returned(disk).await });
            }
        }
    }

    /// Ids of all disks of the cluster, as far as is known.
    fn all_disks(&self) -> Vec<DiskId> {
        let own = self.slots().into_iter().map(|slot| slot.id);
        own.chain(self.far_disks().into_iter().map(|disk| disk.id)).collect()
    }

    /// Creates a volume and waits until it is served.
    pub(super) async fn create_volume(
        self: &Rc<Self>,
        request: CreateVolume,
    ) -> Result<Volume, ApiError> {
        let name: VolumeName = request.check()?;
        let slot = {
            let _lock = self.changes.lock().await;
            let pool = self.pools.borrow().get(&name.pool).cloned();
            let pool =
                pool.ok_or_else(|| ApiError::not_found(format!("no such pool: {}", name.pool)))?;
            let record = VolumeRecord {
                id: VolumeId::from_bytes(self.options.env.random_bytes()),
                name: name.name.clone(),
                pool: name.pool.clone(),
                size_bytes: request.size,
                cut_from_bytes: None,
                block_bytes: 512,
                state: VolumeState::Active,
                created_at_unix_s: (self.options.unix_seconds)(),
            };
            let set = self.new_log_set(&pool)?;
            let root = Root::fresh(record.id, set, description(&record, &pool));
            let (root, place) = (root.encode(), self.place_here());
            let made = self.schema.create_volume_at(&record, Some(&root), place.as_ref()).await;
            made.map_err(api_error)?;
            if !self.volumes.borrow().contains_key(&record.id) {
                self.adopt(record.clone(), pool);
            }
            self.mirror_catalog().await;
            self.volumes.borrow().get(&record.id).cloned()
        };
        let slot = slot.ok_or_else(|| ApiError::conflict("the volume was removed meanwhile"))?;
        let served = async {
            loop {
                let changed = slot.changed.notified();
                if slot.serving().is_some() || slot.closing.get() {
                    return;
                }
                changed.await;
            }
        };
        if timeout(CREATE_PATIENCE, served).await.is_err() {
            tracing::warn!(volume = slot.name(), "created, but not served yet");
        }
        Ok(self.view_volume(&slot))
    }

    /// Chooses the log set of a new volume: `2m + 4` domains, or as many as there are.
    fn new_log_set(&self, pool: &PoolRecord) -> Result<LogSet, ApiError> {
        let width = pool.scheme.parity + 1;
        let count = 2 * usize::from(pool.scheme.parity) + 4;
        let disks = self.registry.at(pool.failure_domain.into());
        let targets = disks.choose(&self.options.env, SlotClass::Client, count, &[], |_| true);
        let members = targets
            .iter()
            .filter_map(|t| Some(Member { disk: t.disk, domain: disks.domain(t.disk)? }))
            .collect();
        LogSet::new(members, width).map_err(|error| {
            ApiError::no_space(format!("the disks that are online cannot carry it: {error}"))
                .with_hint(format!("at least {width} disks must be online: see `sdsctl disk ls`"))
        })
    }

    pub(super) fn find_volume(&self, name: &VolumeName) -> Result<Rc<VolumeSlot>, ApiError> {
        self.volume_named(&name.pool, &name.name).ok_or_else(|| {
            ApiError::not_found(format!("no such volume: {name}"))
                .with_hint("`sdsctl volume ls` lists them")
        })
    }

    /// Removes a volume for good.
    pub(super) async fn remove_volume(
        self: &Rc<Self>,
        name: &VolumeName,
        force: bool,
    ) -> Result<Removed, ApiError> {
        let _lock = self.changes.lock().await;
        let slot = self.find_volume(name)?;
        let clients = slot.attached.get() + self.attached_elsewhere(slot.id).await;
        if clients > 0 {
            return Err(ApiError::conflict(format!(
                "volume {name} is attached by {clients} clients"
            ))
            .with_hint("detach them first"));
        }
        let holds = slot.serving().is_none_or(|head| head.report().allocated_bytes > 0);
        if holds && !force {
            return Err(ApiError::confirmation_required(format!("volume {name} holds data")));
        }
        let record = self.schema.delete_volume(slot.id).await.map_err(api_error)?;
        self.volumes.borrow_mut().remove(&slot.id);
        if let Some(head) = slot.close() {
            head.abandon("the volume was deleted");
        }
        self.mirror_catalog().await;
        self.reap(record);
        Ok(Removed { kind: "volume".into(), name: name.to_string() })
    }

    /// Drops a deleted volume from every disk, in the background.
    pub(super) fn reap(self: &Rc<Self>, record: VolumeRecord) {
        let id = record.id;
        self.deleting.borrow_mut().insert(id, record);
        let node = self.clone();
        tokio::task::spawn_local(async move { node.reap_until_done(id).await });
    }

    async fn reap_until_done(self: Rc<Self>, id: VolumeId) {
        let mut confirmed: Vec<DiskId> = Vec::new();
        loop {
            for disk in self.all_disks() {
                if confirmed.contains(&disk) {
                    continue;
                }
                let Some(client) = self.registry.client(disk) else { continue };
                match timeout(DROP_PATIENCE, client.drop_volume(id)).await {
                    Ok(Ok(())) => {
                        confirmed.push(disk);
                        // What came back is known to those who want space.
                        self.registry.refresh().await;
                    }
                    Ok(Err(error)) => {
                        tracing::debug!(%disk, volume = %id, %error, "not dropped");
                    }
                    Err(_) => {}
                }
            }
            if self.all_disks().iter().all(|disk| confirmed.contains(disk))
                && self.forget(id, &confirmed).await
            {
                let record = self.deleting.borrow_mut().remove(&id);
                if let Some(record) = record {
                    let label = volume_label(&record.pool, &record.name, id);
                    tracing::info!(volume = label, "deleted on every disk");
                }
                self.mirror_catalog().await;
                return;
            }
            sleep(REAP_INTERVAL).await;
            if self.stopping.get() {
                return;
            }
        }
    }

    async fn forget(&self, id: VolumeId, disks: &[DiskId]) -> bool {
        for disk in disks {
            let Some(client) = self.registry.client(*disk) else { return false };
            if let Err(error) = client.forget_volume(id).await {
                tracing::debug!(%disk, volume = %id, %error, "tombstone not forgotten");
                return false;
            }
        }
        match self.schema.forget_volume(id).await {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(volume = %id, %error, "tombstone kept");
                false
            }
        }
    }
}

impl VolumeSlot {
    /// Returns when the head is gone.
    async fn gone(&self) {
        loop {
            let changed = self.changed.notified();
            if self.head.borrow().is_none() {
                return;
            }
            changed.await;
        }
    }
}

/// A refusal of the store, for the admin API.
#[allow(clippy::needless_pass_by_value, reason = "the argument of map_err")]
pub(super) fn api_error(error: SchemaError) -> ApiError {
    use crate::meta::MetaError;
    let text = error.to_string();
    match error {
        SchemaError::Store(MetaError::Unavailable(_)) | SchemaError::Busy(_) => {
            ApiError::unavailable(text)
        }
        SchemaError::Store(MetaError::Unknown(_)) => ApiError::timeout(text),
        SchemaError::Store(_) | SchemaError::Record { .. } => ApiError::internal(text),
        SchemaError::Invalid(_) => ApiError::invalid(text),
        SchemaError::Exists(_) | SchemaError::PoolInUse(_) => ApiError::conflict(text),
        SchemaError::NotFound(_) => ApiError::not_found(text),
    }
}
