//! The simulated cluster: hosts on one network and one metadata store.
//!
//! Used by hand-written tests too: nothing strikes here by itself.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::host::Host;
use super::net::{Net, Pipes};
use crate::disk::{Disk, FormatOptions};
use crate::env::Env;
use crate::id::{ClusterId, DiskId, NodeId, VolumeId};
use crate::meta::memory::MemoryStore;
use crate::meta::record::ClusterRecord;
use crate::meta::schema::Schema;
use crate::node::cluster::ClusterOptions;
use crate::node::{Node, NodeOptions, care, space};
use crate::sim::device::{SimConfig, SimDevice};
use crate::volume::head::HeadConfig;

/// What all nodes are like.
#[derive(Debug, Clone)]
pub struct TownConfig {
    /// Size of each disk, bytes.
    pub disk_bytes: u64,
    /// Size of slots, bytes; the nodes choose it if there is none.
    pub slot_bytes: Option<u64>,
    /// How long operations of disks take.
    pub latency: Range<Duration>,
    /// Tuning of the heads.
    pub head: HeadConfig,
    /// How long a node may be silent before it counts as gone.
    pub lease: Duration,
    /// How long a node may be away before what is on its disks is rebuilt.
    pub out_after: Duration,
}

impl Default for TownConfig {
    fn default() -> Self {
        Self {
            disk_bytes: 512 << 20,
            slot_bytes: None,
            latency: SimConfig::default().latency,
            head: HeadConfig::default(),
            lease: Duration::from_secs(2),
            out_after: Duration::from_secs(20),
        }
    }
}

/// A cluster.
pub struct Town {
    /// Randomness of everything.
    pub env: Env,
    /// What all nodes are like.
    pub config: TownConfig,
    /// The cluster.
    pub cluster: ClusterId,
    /// The store that all share.
    pub store: MemoryStore,
    /// The network.
    pub net: Rc<Net>,
    hosts: RefCell<Vec<Rc<Host>>>,
}

impl Town {
    /// A cluster without hosts.
    pub async fn new(env: Env, config: TownConfig) -> Self {
        let store = MemoryStore::new(env.clone());
        let cluster = ClusterId::from_bytes(env.random_bytes());
        let record = ClusterRecord { id: cluster, incarnation: 1 };
        let schema = Schema::new(Rc::new(store.client(Rc::default())));
        schema.initialise(&record).await.expect("the store is empty");
        Self { env, config, cluster, store, net: Rc::default(), hosts: RefCell::default() }
    }

    /// Adds a machine with so many disks. No process runs on it yet.
    pub async fn add_host(&self, disks: usize) -> Rc<Host> {
        let name = format!("n{}", self.hosts.borrow().len());
        let mut devices = BTreeMap::new();
        for number in 0..disks {
            devices.insert(format!("/{name}d{number}"), self.new_device().await);
        }
        let id = NodeId::from_bytes(self.env.random_bytes());
        let host = Rc::new(Host::new(name, id, devices));
        self.hosts.borrow_mut().push(host.clone());
        host
    }

    /// A disk that holds nothing.
    pub async fn new_device(&self) -> SimDevice {
        let TownConfig { disk_bytes, latency, slot_bytes, .. } = &self.config;
        let config = SimConfig { size_bytes: *disk_bytes, latency: latency.clone() };
        let device = SimDevice::new(self.env.clone(), config);
        if slot_bytes.is_some() {
            let options = FormatOptions {
                disk: DiskId::from_bytes(self.env.random_bytes()),
                cluster: self.cluster,
                slot_bytes: *slot_bytes,
                volumes_max: Some(16),
                force: false,
            };
            Disk::format(&device, options).await.expect("a blank disk of a sensible size");
        }
        device
    }

    /// All machines.
    pub fn hosts(&self) -> Vec<Rc<Host>> {
        self.hosts.borrow().clone()
    }

    /// A machine.
    pub fn host(&self, index: usize) -> Rc<Host> {
        self.hosts.borrow()[index].clone()
    }

    /// What the node of a machine is started with.
    pub fn options(&self, host: &Host) -> impl Fn() -> NodeOptions + use<> {
        let (env, config, net) = (self.env.clone(), self.config.clone(), self.net.clone());
        let (id, name, devices) = (host.id, host.name.clone(), host.devices.clone());
        let (store, faults) = (self.store.client(Rc::default()), host.store.clone());
        move || NodeOptions {
            name: name.clone(),
            env: env.clone(),
            store: Rc::new(store.client(faults.clone())),
            opener: devices.clone(),
            cluster: Some(ClusterOptions {
                id,
                host: name.clone(),
                rack: "r".into(),
                address: name.clone(),
                admin: format!("{name}:1"),
                exports: vec![],
                wire: Rc::new(Pipes { net: net.clone(), env: env.clone() }),
                lease: config.lease,
                out_after: config.out_after,
            }),
            head: config.head.clone(),
            index_cache_bytes: 16 << 20,
            // Asking devices for SMART data takes threads.
            care: care::Care { smart_every: Duration::ZERO, ..care::Care::default() },
            space: space::SpaceLevels::default(),
            unix_seconds: || 0,
        }
    }

    /// Starts the process of a machine.
    pub fn start(&self, host: &Host) {
        host.start(&self.net, self.cluster, self.options(host));
    }

    /// The process of a machine dies at once, or the machine loses its power.
    pub async fn kill(&self, host: &Host, power_cut: bool) {
        host.kill(&self.net, power_cut).await;
    }

    /// Stops the process of a machine in order.
    pub async fn stop(&self, host: &Host) {
        host.close_exports();
        let stopped = host.run(|node| async move { node.stop().await });
        // It may be killed meanwhile.
        stopped.await;
        host.kill(&self.net, false).await;
    }

    /// The nodes that have started.
    pub fn nodes(&self) -> Vec<Rc<Node>> {
        self.hosts.borrow().iter().filter_map(|host| host.node()).collect()
    }

    /// Waits until so many nodes run and each sees the disks of all of them.
    ///
    /// # Panics
    /// They do not within 20 seconds.
    pub async fn until_met(&self, nodes: usize) {
        let met = || {
            let hosts = self.hosts.borrow();
            let running: Vec<_> = hosts.iter().filter(|host| host.node().is_some()).collect();
            let disks: usize = running.iter().map(|host| host.devices.0.borrow().len()).sum();
            let sees = |node: &Rc<Node>| node.disks_in_use().len() == disks;
            running.len() >= nodes && self.nodes().iter().all(sees)
        };
        until("all disks are met", Duration::from_secs(20), met).await;
    }

    /// The machine whose node serves a volume, if one does.
    pub fn serves(&self, volume: VolumeId) -> Option<usize> {
        let serves = |node: Rc<Node>| node.served().iter().any(|(id, _)| *id == volume);
        self.hosts.borrow().iter().position(|host| host.node().is_some_and(serves))
    }
}

/// Waits until something holds.
///
/// # Panics
/// It does not in time.
pub async fn until(what: &str, patience: Duration, holds: impl Fn() -> bool) {
    let waits = async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(patience, waits).await.is_ok(), "{what}");
}
