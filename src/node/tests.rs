//! A node on simulated devices, in virtual time: what becomes of its disks.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::LocalSet;
use tokio::time::{sleep, timeout};

use super::disks::DiskSlot;
use super::exports::Exports;
use super::opener::{DeviceOpener, OpenFailure};
use super::{Node, NodeOptions};
use crate::admin::types::{
    CreatePool, CreateVolume, DiskState as Shown, FailureDomain, PoolScheme, VolumeName,
};
use crate::disk::device::BlockDevice;
use crate::env::Env;
use crate::export::ExportDirectory;
use crate::id::{BLOCK_SIZE, ClusterId};
use crate::meta::memory::MemoryStore;
use crate::meta::record::ClusterRecord;
use crate::meta::schema::Schema;
use crate::sim::device::{SimConfig, SimDevice};
use crate::volume::head::HeadConfig;

mod resize;
mod space;

/// Devices by path.
struct Devices(BTreeMap<String, SimDevice>);

impl DeviceOpener for Devices {
    fn open(&self, path: &str, _: Option<u64>) -> Result<Rc<dyn BlockDevice>, OpenFailure> {
        let device = self.0.get(path).ok_or_else(|| OpenFailure::NotFound(path.to_owned()))?;
        Ok(Rc::new(device.clone()))
    }

    fn check(&self, _: &str, _: u64) -> Result<(), String> {
        Ok(())
    }
}

/// What a node is started on.
struct Machine {
    env: Env,
    store: MemoryStore,
    devices: Rc<Devices>,
}

impl Machine {
    async fn new(disks: usize) -> Self {
        Self::with_disks_of(disks, 512 << 20).await
    }

    async fn with_disks_of(disks: usize, size_bytes: u64) -> Self {
        let env = Env::from_seed(3);
        let store = MemoryStore::new(env.clone());
        let record = ClusterRecord { id: ClusterId::from_bytes([7; 16]), incarnation: 1 };
        let schema = Schema::new(Rc::new(store.client(Rc::default())));
        schema.initialise(&record).await.expect("the store is empty");
        let config = || SimConfig { size_bytes, ..SimConfig::default() };
        let device = |index| (format!("/disk{index}"), SimDevice::new(env.clone(), config()));
        let devices = Rc::new(Devices((0..disks).map(device).collect()));
        Self { env, store, devices }
    }

    async fn start(&self) -> Rc<Node> {
        let options = NodeOptions {
            name: "node0".into(),
            env: self.env.clone(),
            store: Rc::new(self.store.client(Rc::default())),
            opener: self.devices.clone(),
            head: HeadConfig::default(),
            index_cache_bytes: 16 << 20,
            care: super::care::Care::default(),
            space: super::space::SpaceLevels::default(),
            unix_seconds: || 0,
        };
        let paths: Vec<String> = self.devices.0.keys().cloned().collect();
        Node::start(options, &paths).await.expect("nothing is wrong")
    }

    fn device(&self, index: usize) -> &SimDevice {
        &self.devices.0[&format!("/disk{index}")]
    }
}

fn disk(node: &Node, index: usize) -> Rc<DiskSlot> {
    let path = format!("/disk{index}");
    node.slots().into_iter().find(|slot| slot.path() == path).expect("it is there")
}

async fn until(what: &str, patience: Duration, holds: impl Fn() -> bool) {
    let waits = async {
        while !holds() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(timeout(patience, waits).await.is_ok(), "{what}");
}

async fn create_volume(node: &Rc<Node>) -> VolumeName {
    let pool = CreatePool {
        name: "p".into(),
        scheme: PoolScheme::Replicas { copies: 2 },
        failure_domain: FailureDomain::Disk,
        min_size: None,
    };
    node.create_pool(pool).await.expect("there are disks enough");
    let volume = CreateVolume { name: "p/v".into(), size: 16 << 20 };
    node.create_volume(volume).await.expect("there is room");
    "p/v".parse().expect("a name")
}

fn run(test: impl AsyncFnOnce()) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, test());
}

#[test]
fn a_disk_that_returns_and_hangs_is_watched_like_all_others() {
    run(async || {
        let machine = Machine::new(4).await;
        let node = machine.start().await;
        create_volume(&node).await;
        let target = node_target(&node).await;
        let data = Bytes::from(vec![1; BLOCK_SIZE]);
        target.write(0, data.clone()).await.expect("written");
        let first = disk(&node, 0);
        let counted = first.counted();
        machine.device(0).vanish();
        until("it is taken out", Duration::from_secs(10), || !first.is_online()).await;
        machine.device(0).bring_back();
        until("it is back", Duration::from_secs(10), || first.is_online()).await;
        assert!(first.counted().io_errors >= counted.io_errors, "errors are forgotten");
        assert!(first.counted().appends.count >= counted.appends.count);
        machine.device(0).hang();
        sleep(Duration::from_secs(1)).await;
        // Others are looked after meanwhile, and so is this one.
        machine.device(1).vanish();
        let second = disk(&node, 1);
        until("another is seen to go", Duration::from_secs(15), || !second.is_online()).await;
        until("it is seen to hang", Duration::from_secs(15), || !first.is_online()).await;
        let written = timeout(Duration::from_mins(1), target.write(0, data)).await;
        assert_eq!(written, Ok(Ok(())), "two disks are left");
    });
}

async fn node_target(node: &Rc<Node>) -> Rc<dyn crate::export::BlockTarget> {
    Exports(node.clone()).open("p/v").await.expect("it is exported")
}

#[test]
fn a_disk_stays_draining_over_restarts_and_is_removed_once_it_is_empty() {
    run(async || {
        let machine = Machine::new(3).await;
        let node = machine.start().await;
        create_volume(&node).await;
        let target = node_target(&node).await;
        let data = Bytes::from(vec![1; 1 << 20]);
        target.write(0, data.clone()).await.expect("written");
        drop(target);
        let id = disk(&node, 0).id;
        node.disk_drain(id).await.expect("it is online");
        node.stop().await;
        let node = machine.start().await;
        assert_eq!(disk(&node, 0).state.get(), Shown::Draining);
        node.disk_online(id).await.expect("it is there");
        assert_eq!(disk(&node, 0).state.get(), Shown::Online);
        // Whoever asked for its removal is gone before it is done.
        let served = || node.volumes.borrow().values().all(|slot| slot.serving().is_some());
        until("served", Duration::from_mins(1), served).await;
        let removal = node.remove_disk(id, true);
        drop(timeout(Duration::from_millis(50), removal).await);
        assert!(disk(&node, 0).record.borrow().removing);
        node.stop().await;
        let node = machine.start().await;
        let gone = || !node.disks.borrow().contains_key(&id);
        until("removed", Duration::from_mins(2), gone).await;
        node.remove_disk(id, true).await.expect("it may be asked for again");
        let read = node_target(&node).await.read(0, 1 << 20).await.expect("readable");
        assert!(read.concat() == data, "other content");
    });
}
