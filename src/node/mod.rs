//! A node: its disks, its metadata store, its volumes' heads, and what an operator asks of it.
//!
//! ```text
//!  admin commands ──► commands ──► disks ──► registry ─┐
//!  NBD clients ─────► exports ───► volumes ──► heads ──┴─► shards
//! ```
//!
//! Everything of a [`Node`] runs on one core, through the seams only: devices come from a
//! [`opener::DeviceOpener`], so the simulation can run a node too. [`daemon`] is the process around
//! it (files, signals, sockets, the admin thread).
//!
//! # Invariants
//!
//! - One volume that cannot be served keeps nothing else from being served; its state and the
//!   reason show in status.
//! - A disk is used only after its superblock said that it is the one meant, and one identity is
//!   open once.
//! - What the store says is changed first; then disks and heads follow, again at the next start
//!   if need be. The keys are mirrored to the disks after each change.
//! - A node whose disks have seen a newer state of the store than the store has does not start, and leaves no trace in it.

pub mod care;
mod catalog;
pub mod cluster;
mod commands;
mod counts;
pub mod daemon;
mod descriptors;
pub mod dev;
mod disks;
mod events;
mod exports;
mod forecast;
pub mod opener;
mod parts;
mod pools;
#[cfg(any(test, feature = "simulation"))]
mod probe;
pub mod recover;
mod relay;
mod replace;
mod resize;
mod samples;
mod scrubs;
mod smart;
pub mod space;
mod store;
#[cfg(test)]
mod tests;
mod views;
mod volumes;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use self::cluster::{Cluster, ClusterOptions};
use self::disks::DiskSlot;
use self::opener::DeviceOpener;
use self::volumes::VolumeSlot;
use crate::admin::backend::Command;
use crate::env::Env;
use crate::export::nbd::NbdMetrics;
use crate::id::{DiskId, VolumeId};
use crate::meta::record::{PoolRecord, VolumeRecord};
use crate::meta::schema::{Schema, SchemaError};
use crate::meta::{MetaError, MetaStore, StoreIdentity};
use crate::obs::metrics::Metrics;
use crate::rpc::ServerMetrics;
use crate::shard::disks::Disks;
use crate::volume::head::{Head, HeadConfig};

pub use self::exports::{DEFAULT_POOL, Exports, LocalExports};

/// Pause between two looks at disks and heads.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// How long the heads may take to release their volumes when the node stops.
const RELEASE_PATIENCE: Duration = Duration::from_secs(20);

/// What a node is made with.
pub struct NodeOptions {
    /// Its name.
    pub name: String,
    /// Randomness.
    pub env: Env,
    /// The metadata store.
    pub store: Rc<dyn MetaStore>,
    /// Opens its devices.
    pub opener: Rc<dyn DeviceOpener>,
    /// The cluster that it is a node of; none if it is alone with its store.
    pub cluster: Option<ClusterOptions>,
    /// Tuning of the heads.
    pub head: HeadConfig,
    /// What is done for sick disks.
    pub care: care::Care,
    /// From when on pools are reported to fill up.
    pub space: space::SpaceLevels,
    /// Bytes of all heads' index caches together.
    pub index_cache_bytes: usize,
    /// Seconds since 1970, for records that people read.
    pub unix_seconds: fn() -> u64,
}

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The metadata store failed.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// A record of the store cannot be used, or a change was refused.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// A disk has seen a newer state of the store.
    #[error(
        "the metadata store is at revision {found:?} (incarnation, count), but disk {disk} has \
         seen {seen:?}: the store is an old copy, which is not believed; put the newest one in its place, or \
         remove it and run `sdsd recover` (docs/cluster.md, \"When etcd is lost\")"
    )]
    StoreBehind {
        /// The store's incarnation and revision.
        found: (u32, u64),
        /// What the disk has seen.
        seen: (u32, u64),
        /// That disk.
        disk: DiskId,
    },
    /// A disk knows more of a volume than the store.
    #[error(
        "disk {disk} has seen {seen} of volume {volume}, but the metadata store has {found}: the store is an \
         old copy, which is not believed; put the newest one in its place, or remove it and run `sdsd recover` \
         (docs/cluster.md, \"When etcd is lost\")"
    )]
    RootBehind {
        /// The disk.
        disk: DiskId,
        /// The volume.
        volume: VolumeId,
        /// What the disk has seen.
        seen: String,
        /// What the store has.
        found: String,
    },
}

/// A node. Lives on one thread, within a [`tokio::task::LocalSet`].
pub struct Node {
    options: NodeOptions,
    schema: Schema,
    identity: StoreIdentity,
    registry: Rc<Disks>,
    cluster: Option<Cluster>,
    disks: RefCell<BTreeMap<DiskId, Rc<DiskSlot>>>,
    /// Disks that were removed; what was on them is rebuilt.
    removed: RefCell<BTreeSet<DiskId>>,
    /// Paths that cannot be used, with the reason.
    problems: RefCell<BTreeMap<String, String>>,
    next_domain: Cell<u32>,
    /// Size of the slots of some disk of the cluster.
    slot_bytes: Cell<Option<u64>>,
    pools: RefCell<BTreeMap<String, PoolRecord>>,
    volumes: RefCell<BTreeMap<VolumeId, Rc<VolumeSlot>>>,
    deleting: RefCell<BTreeMap<VolumeId, VolumeRecord>>,
    /// Where NBD is served, as prefixes and suffixes of URIs around the name of an export.
    export_uris: RefCell<Vec<(String, String)>>,
    nbd: RefCell<Option<Rc<NbdMetrics>>>,
    rpc: RefCell<Option<Rc<ServerMetrics>>>,
    metrics: Metrics,
    /// Held by whoever changes what the store says.
    changes: tokio::sync::Mutex<()>,
    started: Instant,
    stopping: Cell<bool>,
    /// How full pools were, by name.
    pool_watches: RefCell<BTreeMap<String, space::PoolWatch>>,
    /// When they were last looked at.
    space_watched: Cell<Option<Instant>>,
}

impl Node {
    /// Opens the disks and begins to take over all volumes, which goes on in the background.
    /// `paths`: devices to use besides those that the store knows; blank ones are formatted.
    ///
    /// # Errors
    /// [`NodeError`]. Disks and volumes that cannot be used are no error.
    pub async fn start(mut options: NodeOptions, paths: &[String]) -> Result<Rc<Self>, NodeError> {
        let identity = options.store.identity().await?;
        let schema = Schema::new(options.store.clone());
        let cluster = match options.cluster.take() {
            None => None,
            Some(cluster) => {
                let now = (options.unix_seconds)();
                let (id, name) = (identity.cluster, &options.name);
                Some(Cluster::join(cluster, &schema, id, name, now).await?)
            }
        };
        let node = Rc::new(Self {
            schema,
            identity,
            options,
            cluster,
            registry: Rc::default(),
            disks: RefCell::default(),
            removed: RefCell::default(),
            problems: RefCell::default(),
            next_domain: Cell::new(0),
            slot_bytes: Cell::default(),
            pools: RefCell::default(),
            volumes: RefCell::default(),
            deleting: RefCell::default(),
            export_uris: RefCell::default(),
            nbd: RefCell::default(),
            rpc: RefCell::default(),
            metrics: Metrics::new(),
            changes: tokio::sync::Mutex::new(()),
            started: Instant::now(),
            stopping: Cell::new(false),
            pool_watches: RefCell::default(),
            space_watched: Cell::default(),
        });
        node.open_disks(paths).await?;
        node.check_store_is_newest().await?;
        for pool in node.schema.pools().await? {
            node.pools.borrow_mut().insert(pool.record.name.clone(), pool.record);
        }
        if node.cluster.is_none() {
            node.load_volumes().await?;
        }
        node.start_cluster();
        node.mirror_catalog().await;
        tokio::task::spawn_local(node.clone().watch());
        tokio::task::spawn_local(node.registry.clone().exercise());
        tokio::task::spawn_local(node.clone().watch_smart());
        Ok(node)
    }

    /// Tells where NBD is served: around the name of an export, the text before and after it.
    pub fn set_exports(&self, uris: Vec<(String, String)>, metrics: Rc<NbdMetrics>) {
        *self.export_uris.borrow_mut() = uris;
        *self.nbd.borrow_mut() = Some(metrics);
    }

    /// Answers commands until the channel closes.
    pub async fn serve(self: Rc<Self>, mut commands: mpsc::Receiver<Command>) {
        while let Some(command) = commands.recv().await {
            let node = self.clone();
            tokio::task::spawn_local(async move { node.answer(command).await });
        }
    }

    /// Stops in order: every head releases its volume, as far as the disks allow.
    pub async fn stop(self: &Rc<Self>) {
        self.stopping.set(true);
        let slots: Vec<Rc<VolumeSlot>> = self.volumes.borrow().values().cloned().collect();
        let numbered = slots.iter().enumerate();
        let releases = numbered.map(|(number, slot)| self.part_with(slot, number));
        let all = futures_util::future::join_all(releases);
        if tokio::time::timeout(RELEASE_PATIENCE, all).await.is_err() {
            tracing::warn!("not every volume was released in time: the next start recovers them");
        }
        self.leave().await;
        self.close_disks().await;
    }

    /// The heads that serve.
    fn heads(&self) -> Vec<Rc<Head>> {
        self.volumes.borrow().values().filter_map(|slot| slot.serving()).collect()
    }

    async fn watch(self: Rc<Self>) {
        while !self.stopping.get() {
            tokio::time::sleep(WATCH_INTERVAL).await;
            self.watch_disks().await;
            self.care_for_disks().await;
            for slot in self.volumes.borrow().values() {
                slot.look();
            }
            self.note_repair();
            self.watch_space();
        }
    }
}
