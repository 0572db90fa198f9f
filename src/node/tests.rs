//! A node on simulated devices, in virtual time: what becomes of its disks.

use std::cell::RefCell;
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
    AddDisk, CreatePool, CreateVolume, DiskState as Shown, FailureDomain, PoolScheme, Redundancy,
    VolumeName,
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

mod balance;
mod resize;
mod space;

/// Devices by path.
struct Devices(RefCell<BTreeMap<String, SimDevice>>);

impl DeviceOpener for Devices {
    fn open(&self, path: &str, _: Option<u64>) -> Result<Rc<dyn BlockDevice>, OpenFailure> {
        let device = self.0.borrow().get(path).cloned();
        Ok(Rc::new(device.ok_or_else(|| OpenFailure::NotFound(path.to_owned()))?))
    }

    fn check(&self, _: &str, _: u64) -> Result<(), String> {
        Ok(())
    }
}

fn device_config() -> SimConfig {
    SimConfig { size_bytes: 512 << 20, ..SimConfig::default() }
}

/// What a node is started on.
struct Machine {
    env: Env,
    store: MemoryStore,
    devices: Rc<Devices>,
    /// Pause between rounds of balance; none in tests of other things.
    balance_every: Option<Duration>,
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
        let config = || SimConfig { size_bytes, ..device_config() };
        let device = |index| (format!("/disk{index}"), SimDevice::new(env.clone(), config()));
        let devices = Rc::new(Devices(RefCell::new((0..disks).map(device).collect())));
        Self { env, store, devices, balance_every: None }
    }

    async fn start(&self) -> Rc<Node> {
        let disks = self.devices.0.borrow().len();
        self.start_with(disks).await
    }

    /// Starts the node with its first disks.
    async fn start_with(&self, disks: usize) -> Rc<Node> {
        let options = NodeOptions {
            name: "node0".into(),
            env: self.env.clone(),
            store: Rc::new(self.store.client(Rc::default())),
            opener: self.devices.clone(),
            cluster: None,
            head: HeadConfig { balance_every: self.balance_every, ..HeadConfig::default() },
            index_cache_bytes: 16 << 20,
            care: super::care::Care::default(),
            space: super::space::SpaceLevels::default(),
            unix_seconds: || 0,
        };
        let paths: Vec<String> = self.devices.0.borrow().keys().take(disks).cloned().collect();
        Node::start(options, &paths).await.expect("nothing is wrong")
    }

    fn device(&self, index: usize) -> SimDevice {
        self.devices.0.borrow()[&format!("/disk{index}")].clone()
    }

    /// Another device is plugged in where one was.
    fn exchange(&self, index: usize) {
        let device = SimDevice::new(self.env.clone(), device_config());
        self.devices.0.borrow_mut().insert(format!("/disk{index}"), device);
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
    create_volume_in(node, PoolScheme::Replicas { copies: 2 }).await
}

async fn create_volume_in(node: &Rc<Node>, scheme: PoolScheme) -> VolumeName {
    let pool = CreatePool {
        name: "p".into(),
        scheme,
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

/// Content of a piece of a volume.
fn piece(number: u64, version: u64) -> Bytes {
    let words = (0..PIECE as u64 / 8).map(|i| (number << 40 | version << 32 | i).to_le_bytes());
    words.flatten().collect::<Vec<u8>>().into()
}

const PIECE: usize = 1 << 20;

async fn write_pieces(node: &Rc<Node>, pieces: impl Iterator<Item = u64>, version: u64) {
    let target = node_target(node).await;
    for number in pieces {
        let written = target.write(number * PIECE as u64, piece(number, version)).await;
        written.unwrap_or_else(|error| panic!("piece {number}: {error}"));
    }
}

async fn assert_pieces(node: &Rc<Node>, version: impl Fn(u64) -> u64) {
    let target = node_target(node).await;
    for number in 0..12 {
        let read = target.read(number * PIECE as u64, PIECE).await;
        let data = read.unwrap_or_else(|error| panic!("piece {number}: {error}")).concat();
        assert!(data == piece(number, version(number)), "piece {number} is other");
    }
}

async fn until_healed(node: &Rc<Node>, data: u8) {
    let heads = || node.heads();
    let healed = || {
        heads().iter().all(|head| {
            let bending = head.bending();
            let straight = data != 4 || bending.narrow.0 == 0;
            (bending.scheme.data, bending.to_narrow.0) == (data, 0)
                && straight
                && head.reduced().0 == 0
        })
    };
    until(&format!("{data}+2 and whole"), Duration::from_mins(20), healed).await;
}

#[test]
fn a_coded_pool_of_six_disks_loses_two_and_two_more_and_is_as_before_with_others() {
    run(async || {
        let machine = Machine::new(10).await;
        let node = machine.start_with(6).await;
        create_volume_in(&node, PoolScheme::Ec { data: 4, parity: 2 }).await;
        write_pieces(&node, 0..12, 1).await;
        for index in [1, 4] {
            let id = disk(&node, index).id;
            node.remove_disk(id, true).await.expect("it is emptied first");
        }
        until_healed(&node, 2).await;
        for index in [0, 5] {
            machine.device(index).vanish();
        }
        write_pieces(&node, (0..12).step_by(3), 2).await;
        let version = |number: u64| if number.is_multiple_of(3) { 2 } else { 1 };
        assert_pieces(&node, version).await;
        let status = node.list_volumes(None).expect("there is a pool");
        assert_ne!(status[0].redundancy, Redundancy::Full);
        for index in 6..10 {
            let path = format!("/disk{index}");
            let disk = AddDisk { path, size: None, force: false };
            node.add_disk(disk).await.expect("it is blank");
        }
        until_healed(&node, 4).await;
        assert_pieces(&node, version).await;
        let status = node.list_volumes(None).expect("there is a pool");
        assert_eq!(status[0].redundancy, Redundancy::Full);
    });
}

#[test]
fn a_disk_is_replaced_dead_or_alive_and_nothing_is_narrowed() {
    run(async || {
        let machine = Machine::new(8).await;
        let node = machine.start_with(6).await;
        create_volume_in(&node, PoolScheme::Ec { data: 4, parity: 2 }).await;
        write_pieces(&node, 0..12, 1).await;
        let request =
            |index: usize| AddDisk { path: format!("/disk{index}"), size: None, force: false };
        let alive = disk(&node, 2).id;
        node.replace_disk(alive, request(2)).await.expect_err("it is the disk itself");
        let held = disk(&node, 2).disk().expect("online").slot_counts();
        node.replace_disk(alive, request(6)).await.expect("the new one is blank");
        let gone = |id| node.disks.borrow().get(&id).is_none();
        until("the one that is alive is removed", Duration::from_mins(5), || gone(alive)).await;
        let holds = disk(&node, 6).disk().expect("online").slot_counts();
        assert!(holds.sealed > 0, "{held:?} before, {holds:?} now");
        let dead = disk(&node, 3).id;
        machine.device(3).vanish();
        until("it is down", Duration::from_mins(1), || !disk(&node, 3).is_online()).await;
        write_pieces(&node, 3..5, 2).await;
        node.replace_disk(dead, request(7)).await.expect("the new one is blank");
        until("the dead one is removed", Duration::from_mins(5), || gone(dead)).await;
        until_healed(&node, 4).await;
        assert_pieces(&node, |number| if (3..5).contains(&number) { 2 } else { 1 }).await;
        let moved: u64 = node.heads().iter().map(|head| head.stats.moved_blocks.get()).sum();
        assert_eq!(moved, 0, "nothing was narrowed");
    });
}

#[test]
fn a_dead_disk_is_replaced_by_one_at_its_path_over_a_restart() {
    run(async || {
        let machine = Machine::new(3).await;
        let node = machine.start().await;
        create_volume(&node).await;
        write_pieces(&node, 0..12, 1).await;
        let dead = disk(&node, 1).id;
        machine.device(1).vanish();
        until("it is down", Duration::from_mins(1), || !disk(&node, 1).is_online()).await;
        let request = AddDisk { path: "/disk1".into(), size: None, force: true };
        node.replace_disk(dead, request.clone()).await.expect_err("nothing is there");
        assert_eq!(disk(&node, 1).id, dead, "it keeps its path");
        machine.exchange(1);
        let new = node.replace_disk(dead, request).await.expect("it is blank");
        assert_ne!(new.id, dead);
        node.stop().await;
        let node = machine.start().await;
        let gone = || node.disks.borrow().get(&dead).is_none();
        until("the dead one is removed", Duration::from_mins(5), gone).await;
        assert_eq!(disk(&node, 1).id, new.id);
        let served = || node.volumes.borrow().values().all(|slot| slot.serving().is_some());
        until("served", Duration::from_mins(1), served).await;
        assert_pieces(&node, |_| 1).await;
    });
}
