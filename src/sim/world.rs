//! A simulated cluster: disks, metadata store, one or two volumes, the nodes that run their heads,
//! and what the oracle knows of them.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use super::client::{FaultyClient, Link};
use super::device::{SimConfig, SimDevice};
use super::oracle::{Oracle, SECTOR};
use super::wire::Wires;
use crate::disk::Disk;
use crate::disk::FormatOptions;
use crate::disk::device::BlockDevice;
use crate::env::Env;
use crate::id::{ClusterId, DiskId, VolumeId};
use crate::meta::memory::{Faults, MemoryStore};
use crate::meta::record::ClusterRecord;
use crate::meta::{MetaStore, Txn, schema};
use crate::shard::disks::Disks;
use crate::shard::domain::Domains;
use crate::shard::{Scheme, ShardClient};
use crate::volume::head::{Head, HeadConfig, HeadContext, PoolPolicy};
use crate::volume::root::Root;
use crate::volume::rules::{LogSet, Member, log_domains};
use crate::volume::takeover::{TakeOverError, take_over};

/// When the log shrinks once nothing is struck any more.
const SHRINK_AFTER_IN_THE_END: Duration = Duration::from_millis(500);

/// How often a node asks its disks how full they are.
const FILL_EVERY: Duration = Duration::from_millis(250);

/// What a simulated world is made of.
#[derive(Debug, Clone)]
pub struct WorldConfig {
    /// Scheme of the pool.
    pub scheme: Scheme,
    /// Disks, each a failure domain.
    pub disks: usize,
    /// Of these, the last ones: they are not there until they are added.
    pub spares: usize,
    /// Size of each disk, bytes.
    pub disk_bytes: u64,
    /// Size of a slot, bytes.
    pub slot_bytes: u64,
    /// Size of the volume, bytes.
    pub volume_bytes: u64,
    /// Size of a second volume on the same disks, bytes.
    pub neighbour_bytes: Option<u64>,
    /// The volume is larger than the disks.
    pub overcommitted: bool,
    /// Disks of the first log set, at most.
    pub log_disks: usize,
    /// Copies below which writes wait.
    pub min_size: u8,
    /// Time that an operation of a disk takes.
    pub latency: Range<Duration>,
    /// Tuning of the head.
    pub head: HeadConfig,
}

/// A volume of a world.
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// Its size as the store has it, bytes.
    pub bytes: Cell<u64>,
    /// Its largest size, bytes.
    pub bytes_max: u64,
    /// While what lies beyond its size is being cut off: the size that it had before, bytes.
    pub cut_from: Cell<Option<u64>>,
    /// Somebody cuts it off.
    pub cutting: Cell<bool>,
    /// Counts the changes of its size.
    pub resizes: Cell<u64>,
    /// What its sectors may contain.
    pub oracle: RefCell<Oracle>,
}

impl Volume {
    /// Its size in sectors.
    pub fn sectors(&self) -> u64 {
        self.bytes.get() / SECTOR as u64
    }
}

/// A simulated cluster. Devices, store and oracle outlive its crashes.
pub struct World {
    /// What it is made of.
    pub config: WorldConfig,
    /// Randomness.
    pub env: Env,
    /// The media.
    pub devices: RefCell<Vec<SimDevice>>,
    /// Id of each disk.
    pub ids: Vec<DiskId>,
    /// The metadata store's content.
    pub store: MemoryStore,
    /// Held by whoever opens the disk of a device: two at once would hurt each other.
    opening: Vec<tokio::sync::Mutex<()>>,
    /// Its open disks, by the index of the device.
    pub disks: RefCell<Vec<Option<Rc<Disk>>>>,
    /// The volume.
    pub volume: Rc<Volume>,
    /// Another one on the same disks.
    pub neighbour: Option<Rc<Volume>>,
    /// Disks that are gone for good, or not there yet.
    pub retired: RefCell<BTreeSet<usize>>,
    /// Of these, the ones that were not there yet.
    pub spares: RefCell<Vec<usize>>,
    /// Nothing is struck any more: the log may shrink although content was hurt.
    pub ending: Cell<bool>,
    /// What is being waited for, should it be for ever.
    pub waiting: RefCell<String>,
    /// Disks are reached through the RPC; what is random there comes from here.
    pub wires: Option<Env>,
    cluster: ClusterId,
}

/// What one node reaches: disks and store, each over a way of its own.
#[derive(Default)]
pub struct Node {
    /// The registry its head uses.
    pub registry: Rc<Disks>,
    /// Faults between its head and the disks.
    pub link: Rc<Link>,
    /// Faults between its head and the store.
    pub faults: Rc<Faults>,
    /// The way to the disks, where they are on other nodes.
    pub wires: Option<Wires>,
    /// When each disk was connected last.
    connected: RefCell<BTreeMap<DiskId, Instant>>,
}

impl Node {
    /// All its ways work again.
    pub fn heal(&self) {
        self.link.heal();
        self.faults.heal();
        self.wires.iter().for_each(Wires::heal);
    }

    fn connected_since(&self, since: Instant) -> Vec<DiskId> {
        let connected = self.connected.borrow();
        connected.iter().filter(|(_, at)| **at > since).map(|(id, _)| *id).collect()
    }
}

/// A head that serves, or did until another took its volume.
pub struct Running {
    /// Of which volume.
    pub volume: Rc<Volume>,
    /// Where it runs.
    pub node: Rc<Node>,
    /// The head.
    pub head: Rc<Head>,
}

/// Creates a volume whose log set is the first of these members.
async fn create_volume(
    config: &WorldConfig,
    env: &Env,
    store: &MemoryStore,
    mut members: Vec<Member>,
    bytes: u64,
) -> Rc<Volume> {
    let id = VolumeId::from_bytes(env.random_bytes());
    members.truncate(config.log_disks.min(log_domains(config.scheme.parity)));
    let set = LogSet::new(members, config.scheme.parity + 1).expect("a valid log set");
    let root = Root::fresh(id, set, serde_json::Value::Null);
    let put = Txn::new().put(schema::root_key(id), root.encode());
    store.txn(put).await.expect("no faults yet");
    Rc::new(Volume {
        id,
        bytes: Cell::new(bytes),
        bytes_max: bytes,
        cut_from: Cell::default(),
        cutting: Cell::default(),
        resizes: Cell::default(),
        oracle: RefCell::default(),
    })
}

/// Asks the disks how full they are, again and again, as a node does.
async fn watch_fill(disks: std::rc::Weak<Disks>) {
    while let Some(disks) = disks.upgrade() {
        disks.refresh().await;
        drop(disks);
        tokio::time::sleep(FILL_EVERY).await;
    }
}

impl World {
    /// Formats the disks and creates the volumes. Must run inside a `LocalSet`.
    pub async fn create(config: WorldConfig, env: Env) -> Self {
        let cluster = ClusterId::from_bytes(env.random_bytes());
        let mut devices = Vec::new();
        let mut ids = Vec::new();
        for _ in 0..config.disks {
            let sim = SimConfig { size_bytes: config.disk_bytes, latency: config.latency.clone() };
            let device = SimDevice::new(env.clone(), sim);
            let disk = DiskId::from_bytes(env.random_bytes());
            let options = FormatOptions {
                disk,
                cluster,
                slot_bytes: Some(config.slot_bytes),
                volumes_max: Some(8),
                force: false,
            };
            Disk::format(&device, options).await.expect("a blank disk of a sensible size");
            devices.push(device);
            ids.push(disk);
        }
        let store = MemoryStore::new(env.clone());
        let schema = schema::Schema::new(Rc::new(store.client(Rc::default())));
        let record = ClusterRecord { id: cluster, incarnation: 1 };
        schema.initialise(&record).await.expect("the store is empty");
        let mut members: Vec<Member> =
            (0u32..).zip(&ids).map(|(domain, &disk)| Member { disk, domain }).collect();
        members.truncate(config.disks - config.spares);
        let bytes = config.volume_bytes;
        let volume = create_volume(&config, &env, &store, members.clone(), bytes).await;
        // Its log begins on the other end of the disks.
        members.reverse();
        let mut neighbour = None;
        if let Some(bytes) = config.neighbour_bytes {
            neighbour = Some(create_volume(&config, &env, &store, members, bytes).await);
        }
        let disks = config.disks;
        let spares: Vec<usize> = (disks - config.spares..disks).collect();
        Self {
            config,
            env,
            devices: RefCell::new(devices),
            ids,
            store,
            opening: (0..disks).map(|_| tokio::sync::Mutex::default()).collect(),
            disks: RefCell::new(vec![None; disks]),
            volume,
            neighbour,
            retired: RefCell::new(spares.iter().copied().collect()),
            spares: RefCell::new(spares),
            ending: Cell::new(false),
            waiting: RefCell::default(),
            wires: None,
            cluster,
        }
    }

    /// Opens the disks that can be opened. Must run inside the `LocalSet` that is the process.
    pub async fn open_disks(&self) {
        for index in 0..self.ids.len() {
            self.ensure_open(index).await;
        }
    }

    /// Opens a disk, if it can be opened and is not open already.
    pub async fn ensure_open(&self, index: usize) {
        let _alone = self.opening[index].lock().await;
        if let Some(disk) = self.disk(index) {
            if disk.offline_reason().is_none() {
                return;
            }
            disk.close("to be opened again").await;
        }
        let disk = self.open_disk(index).await;
        self.disks.borrow_mut()[index] = disk;
    }

    /// A node that reaches every open disk.
    pub fn node(&self) -> Rc<Node> {
        let fork = |env: &Env| Wires::new(Env::from_seed(env.random_u64()), self.cluster);
        let wires = self.wires.as_ref().map(fork);
        let node = Rc::new(Node { wires, ..Node::default() });
        if self.env.chance(1, 3) {
            node.link.usual_delay.set(Duration::from_millis(1 + self.env.random_below(15)));
            node.link.heal();
        }
        if self.env.chance(1, 5) {
            // From the first swap on, the outcome of some is not known.
            let chance = 200 + self.env.random_below(600);
            match self.env.random_below(4) {
                0 => node.faults.unknown_applied.set(chance),
                1 => {
                    node.faults.unknown_late.set(chance);
                    node.faults.late.set(Duration::from_millis(300));
                }
                _ => node.faults.unknown_lost.set(chance),
            }
        }
        (0..self.ids.len()).for_each(|index| self.connect(&node, index));
        self.expect_others(&node);
        tokio::task::spawn_local(node.registry.clone().exercise());
        tokio::task::spawn_local(watch_fill(Rc::downgrade(&node.registry)));
        node
    }

    /// Registers an open disk with a node.
    pub fn connect(&self, node: &Node, index: usize) {
        let Some(disk) = self.disk(index) else { return };
        let Ok(info) = disk.info() else { return };
        let domain = u32::try_from(index).expect("a few disks");
        let client: Rc<dyn ShardClient> =
            Rc::new(FaultyClient::new(disk, node.link.clone(), self.env.clone()));
        let client = match &node.wires {
            Some(wires) => wires.reach(client),
            None => client,
        };
        node.registry.add(client, Domains::of_one_node(domain), info);
        node.connected.borrow_mut().insert(self.ids[index], Instant::now());
    }

    /// Disks that are down now, but not for good, are expected by a node.
    pub fn expect_others(&self, node: &Node) {
        let retired = self.retired.borrow();
        for (domain, id) in
            (0u32..).zip(&self.ids).filter(|(d, _)| !retired.contains(&(*d as usize)))
        {
            node.registry.expect(*id, Domains::of_one_node(domain));
        }
    }

    /// Adds a disk that was not there; none if there is no other. It is to be connected then.
    pub fn add_spare(&self) -> Option<usize> {
        let index = self.spares.borrow_mut().pop()?;
        self.retired.borrow_mut().remove(&index);
        Some(index)
    }

    /// The volumes.
    pub fn volumes(&self) -> impl Iterator<Item = &Rc<Volume>> {
        std::iter::once(&self.volume).chain(&self.neighbour)
    }

    /// Takes over the (first) volume on a node.
    ///
    /// # Errors
    /// As [`World::take_over_volume`].
    pub async fn take_over(&self, node: &Rc<Node>) -> Result<Rc<Running>, TakeOverError> {
        self.take_over_volume(node, &self.volume).await
    }

    /// Takes over a volume on a node.
    ///
    /// # Errors
    /// Why the take-over failed; it may be tried again.
    pub async fn take_over_volume(
        &self,
        node: &Rc<Node>,
        volume: &Rc<Volume>,
    ) -> Result<Rc<Running>, TakeOverError> {
        let mut config = self.config.head.clone();
        if self.ending.get() {
            config.shrink_after = config.shrink_after.min(SHRINK_AFTER_IN_THE_END);
        }
        let context = HeadContext {
            env: self.env.clone(),
            disks: node.registry.clone(),
            store: Rc::new(self.store.client(node.faults.clone())),
            config,
            pool: PoolPolicy { scheme: self.config.scheme, min_size: self.config.min_size },
        };
        let wait = |why: &str| *self.waiting.borrow_mut() = format!("the take-over: {why}");
        wait("it does not end");
        let since = Instant::now();
        let head = take_over(context, volume.id, volume.bytes.get(), &wait).await?;
        // As a node does: it may have begun with another size.
        head.resize(volume.bytes.get());
        volume.oracle.borrow_mut().recovered();
        self.retired.borrow().iter().for_each(|index| head.disk_removed(self.ids[*index]));
        // As a node does: disks that came back meanwhile may not have been heard.
        let missed = node.connected_since(since);
        let told = head.clone();
        tokio::task::spawn_local(async move {
            for disk in missed {
                told.disk_returned(disk).await;
            }
        });
        Ok(Rc::new(Running { volume: volume.clone(), node: node.clone(), head }))
    }

    /// The open disk of a device.
    pub fn disk(&self, index: usize) -> Option<Rc<Disk>> {
        self.disks.borrow()[index].clone()
    }

    /// Opens one disk; none if it cannot be opened now.
    pub async fn open_disk(&self, index: usize) -> Option<Rc<Disk>> {
        if self.retired.borrow().contains(&index) {
            return None;
        }
        let device: Rc<dyn BlockDevice> = Rc::new(self.devices.borrow()[index].clone());
        match Disk::open(device).await {
            Ok(disk) => Some(disk),
            Err(error) => {
                tracing::debug!(index, %error, "disk cannot be opened");
                None
            }
        }
    }

    /// Ends every disk's process: in-flight operations end as a crash or a power cut leaves them.
    pub fn stop_devices(&self, power_cut: bool) {
        for device in self.devices.borrow_mut().iter_mut() {
            if power_cut {
                device.power_cut();
            } else {
                device.crash();
            }
            *device = device.reopen();
        }
        self.disks.borrow_mut().fill(None);
    }
}
