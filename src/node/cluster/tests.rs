//! Several nodes on one store, in virtual time.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, LocalSet};
use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::admin::types::{CreatePool, CreateVolume, FailureDomain, PoolScheme};
use crate::disk::device::BlockDevice;
use crate::env::Env;
use crate::export::{BlockTarget, ExportDirectory};
use crate::meta::memory::{Faults, MemoryStore};
use crate::meta::record::ClusterRecord;
use crate::meta::schema::Schema;
use crate::node::exports::{Exports, LocalExports};
use crate::node::opener::{DeviceOpener, OpenFailure};
use crate::node::{NodeOptions, care, space};
use crate::rpc::handshake::Target;
use crate::rpc::{Dial, RpcConfig, Server};
use crate::shard::LocalFuture;
use crate::sim::device::{SimConfig, SimDevice};
use crate::sim::pipe::{PipeEnd, PipeFaults, pipe};
use crate::volume::head::HeadConfig;

mod balance;
mod recover;

/// The network: who listens, and which ways are cut.
#[derive(Default)]
struct Net {
    listeners: RefCell<BTreeMap<String, mpsc::UnboundedSender<PipeEnd>>>,
    cut: RefCell<BTreeSet<(String, String)>>,
    pipes: RefCell<Vec<(String, String, Rc<PipeFaults>)>>,
}

impl Net {
    fn is_cut(&self, a: &str, b: &str) -> bool {
        let cut = self.cut.borrow();
        cut.contains(&(a.to_owned(), b.to_owned())) || cut.contains(&(b.to_owned(), a.to_owned()))
    }

    /// Nothing passes between two nodes any more, and neither is told.
    fn cut(&self, a: &str, b: &str) {
        self.cut.borrow_mut().insert((a.to_owned(), b.to_owned()));
        for (from, to, faults) in &*self.pipes.borrow() {
            if (from == a && to == b) || (from == b && to == a) {
                faults.hold(true);
            }
        }
    }

    fn heal(&self) {
        self.cut.borrow_mut().clear();
        for (.., faults) in &*self.pipes.borrow() {
            faults.cut();
        }
        self.pipes.borrow_mut().clear();
    }
}

/// Connects one node to another.
struct Way {
    net: Rc<Net>,
    from: String,
    to: String,
}

impl Dial for Way {
    type Stream = PipeEnd;

    fn dial(&self) -> LocalFuture<'_, io::Result<PipeEnd>> {
        Box::pin(async move {
            if self.net.is_cut(&self.from, &self.to) {
                std::future::pending::<()>().await;
            }
            let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
            let listener = self.net.listeners.borrow().get(&self.to).cloned();
            let faults = Rc::new(PipeFaults::default());
            faults.delay.set(Duration::from_micros(100));
            let (ours, theirs) = pipe(&faults);
            listener.ok_or_else(refused)?.send(theirs).map_err(|_| refused())?;
            self.net.pipes.borrow_mut().push((self.from.clone(), self.to.clone(), faults));
            Ok(ours)
        })
    }
}

struct Pipes {
    net: Rc<Net>,
    env: Env,
}

impl Wire for Pipes {
    fn connect(&self, own: Identity, target: NodeId, label: &str, address: &str) -> Peer {
        let way = Way { net: self.net.clone(), from: own.name.clone(), to: address.to_owned() };
        let target = Target { node: Some(target), core: 0 };
        Peer::spawn(label, own, target, way, RpcConfig::default(), self.env.clone())
    }
}

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

/// A machine, and the process on it.
struct Host {
    name: String,
    id: NodeId,
    devices: Rc<Devices>,
    process: RefCell<Option<JoinHandle<()>>>,
    node: Rc<RefCell<Option<Rc<Node>>>>,
}

/// All of it.
pub(super) struct Town {
    env: Env,
    store: MemoryStore,
    /// Of all nodes' ways to the store.
    store_faults: Rc<Faults>,
    net: Rc<Net>,
    hosts: Vec<Host>,
}

const DISK_BYTES: u64 = 512 << 20;

impl Town {
    async fn new(nodes: usize, disks: usize) -> Self {
        let env = Env::from_seed(3);
        let store = MemoryStore::new(env.clone());
        let record = ClusterRecord { id: ClusterId::from_bytes([7; 16]), incarnation: 1 };
        let schema = Schema::new(Rc::new(store.client(Rc::default())));
        schema.initialise(&record).await.expect("the store is empty");
        let mut town =
            Self { env, store, store_faults: Rc::default(), net: Rc::default(), hosts: Vec::new() };
        for _ in 0..nodes {
            town.add_host(disks);
        }
        town
    }

    fn add_host(&mut self, disks: usize) {
        let index = self.hosts.len();
        let config = || SimConfig { size_bytes: DISK_BYTES, ..SimConfig::default() };
        let device =
            |disk| (format!("/n{index}d{disk}"), SimDevice::new(self.env.clone(), config()));
        let devices = Rc::new(Devices(RefCell::new((0..disks).map(device).collect())));
        self.hosts.push(Host {
            name: format!("n{index}"),
            id: NodeId::from_bytes(self.env.random_bytes()),
            devices,
            process: RefCell::default(),
            node: Rc::default(),
        });
    }

    fn start(&self, index: usize) {
        let host = &self.hosts[index];
        let wire = Rc::new(Pipes { net: self.net.clone(), env: self.env.clone() });
        let cluster = ClusterOptions {
            id: host.id,
            host: host.name.clone(),
            rack: "r".into(),
            address: host.name.clone(),
            admin: format!("{}:1", host.name),
            exports: vec![],
            wire,
            lease: Duration::from_secs(2),
            out_after: Duration::from_secs(20),
        };
        let options = NodeOptions {
            name: host.name.clone(),
            env: self.env.clone(),
            store: Rc::new(self.store.client(self.store_faults.clone())),
            opener: host.devices.clone(),
            cluster: Some(cluster),
            head: HeadConfig::default(),
            index_cache_bytes: 16 << 20,
            care: care::Care::default(),
            space: space::SpaceLevels::default(),
            unix_seconds: || 0,
        };
        let paths: Vec<String> = host.devices.0.borrow().keys().cloned().collect();
        let (sender, mut receiver) = mpsc::unbounded_channel();
        self.net.listeners.borrow_mut().insert(host.name.clone(), sender);
        let own = Identity {
            cluster: ClusterId::from_bytes([7; 16]),
            node: host.id,
            name: host.name.clone(),
            core: 0,
        };
        let place = host.node.clone();
        let process = LocalSet::new();
        process.spawn_local(async move {
            let node = Node::start(options, &paths).await.expect("nothing is wrong");
            let (_stop, stopped) = watch::channel(false);
            let served = directories(&node);
            let server = Server::new(own, served, RpcConfig::default(), stopped);
            *place.borrow_mut() = Some(node);
            while let Some(stream) = receiver.recv().await {
                let server = server.clone();
                tokio::task::spawn_local(async move {
                    server.serve_stream(stream, "pipe").await;
                });
            }
        });
        let running = tokio::task::spawn_local(async move {
            process.await;
        });
        *host.process.borrow_mut() = Some(running);
    }

    async fn start_all(&self) {
        for index in 0..self.hosts.len() {
            self.start(index);
        }
        self.until_met(self.hosts.len()).await;
    }

    /// Waits until every node that runs sees the disks of so many nodes.
    async fn until_met(&self, nodes: usize) {
        let disks = self.hosts[0].devices.0.borrow().len();
        let met = || {
            let running: Vec<_> = self.nodes();
            running.len() >= nodes
                && running.iter().all(|node| node.registry.ids().len() == disks * nodes)
        };
        until("all disks are met", Duration::from_secs(20), met).await;
    }

    fn nodes(&self) -> Vec<Rc<Node>> {
        self.hosts.iter().filter_map(|host| host.node.borrow().clone()).collect()
    }

    fn node(&self, index: usize) -> Rc<Node> {
        self.hosts[index].node.borrow().clone().expect("it runs")
    }

    /// The process dies at once, its devices with what they had in flight.
    fn kill(&self, index: usize) {
        let host = &self.hosts[index];
        self.net.listeners.borrow_mut().remove(&host.name);
        host.node.borrow_mut().take();
        if let Some(process) = host.process.borrow_mut().take() {
            process.abort();
        }
        for device in host.devices.0.borrow_mut().values_mut() {
            device.crash();
            *device = device.reopen();
        }
    }

    fn store_away(&self, away: bool) {
        self.store_faults.unavailable.set(away);
    }

    /// The node that serves a volume, once one does.
    async fn server_of(&self, volume: VolumeId) -> usize {
        let found = Cell::new(None);
        let serves = || {
            found.set(self.hosts.iter().position(|host| {
                let node = host.node.borrow().clone();
                node.is_some_and(|node| {
                    let slot = node.volumes.borrow().get(&volume).cloned();
                    slot.is_some_and(|slot| slot.serving().is_some())
                })
            }));
            found.get().is_some()
        };
        until("somebody serves it", Duration::from_secs(30), serves).await;
        found.get().expect("somebody does")
    }
}

async fn until(what: &str, patience: Duration, holds: impl Fn() -> bool) {
    let waits = async {
        while !holds() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(timeout(patience, waits).await.is_ok(), "{what}");
}

fn run(test: impl AsyncFnOnce()) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, test());
}

async fn create(node: &Rc<Node>, scheme: PoolScheme) -> VolumeId {
    let pool = CreatePool {
        name: "p".into(),
        scheme,
        failure_domain: FailureDomain::Disk,
        min_size: None,
    };
    node.create_pool(pool).await.expect("there are disks enough");
    let volume = CreateVolume { name: "p/v".into(), size: 16 << 20 };
    node.create_volume(volume).await.expect("there is room").id
}

async fn target(node: &Rc<Node>) -> Rc<dyn BlockTarget> {
    Exports(node.clone()).open("p/v").await.expect("it is exported")
}

const PIECE: usize = 64 << 10;

fn piece(number: u64, version: u64) -> Bytes {
    let words = (0..PIECE as u64 / 8).map(|i| (number << 40 | version << 32 | i).to_le_bytes());
    words.flatten().collect::<Vec<u8>>().into()
}

async fn write(target: &Rc<dyn BlockTarget>, version: u64) {
    for number in 0..32 {
        let written = target.write(number * PIECE as u64, piece(number, version)).await;
        written.unwrap_or_else(|error| panic!("piece {number}: {error}"));
    }
}

async fn check(target: &Rc<dyn BlockTarget>, version: u64) {
    for number in 0..32 {
        let read = target.read(number * PIECE as u64, PIECE).await;
        let data = read.unwrap_or_else(|error| panic!("piece {number}: {error}")).concat();
        assert!(data == piece(number, version), "piece {number} is other");
    }
}

#[test]
fn a_volume_lies_on_all_nodes_and_another_one_takes_over_from_a_node_that_dies() {
    run(async || {
        let town = Town::new(4, 2).await;
        town.start_all().await;
        let volume = create(&town.node(0), PoolScheme::Replicas { copies: 3 }).await;
        let first = town.server_of(volume).await;
        let before = target(&town.node(first)).await;
        write(&before, 1).await;
        check(&before, 1).await;
        let died = Instant::now();
        town.kill(first);
        drop(before);
        let second = town.server_of(volume).await;
        assert_ne!(first, second);
        let took = died.elapsed();
        assert!(took < Duration::from_secs(5), "{took:?}");
        let after = target(&town.node(second)).await;
        check(&after, 1).await;
        write(&after, 2).await;
        town.start(first);
        town.until_met(4).await;
        check(&after, 2).await;
        let whole = || town.node(second).heads().iter().all(|head| head.reduced().0 == 0);
        until("it is whole again", Duration::from_mins(2), whole).await;
    });
}

#[test]
fn any_node_exports_a_volume_and_follows_its_head() {
    run(async || {
        let town = Town::new(4, 2).await;
        town.start_all().await;
        let volume = create(&town.node(0), PoolScheme::Ec { data: 4, parity: 2 }).await;
        let first = town.server_of(volume).await;
        let client = (first + 1) % 4;
        let export = target(&town.node(client)).await;
        write(&export, 1).await;
        check(&export, 1).await;
        let listed = || async {
            let views = town.node(client).gather().await;
            assert_eq!((views.disks.len(), views.volumes.len()), (8, 1));
            (views.volumes[0].node.clone(), views.pools[0].domains_online)
        };
        assert_eq!(listed().await, (town.hosts[first].name.clone(), 8));
        // The head dies under the client, which notices nothing but a pause.
        town.kill(first);
        let started = Instant::now();
        write(&export, 2).await;
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        check(&export, 2).await;
        assert_eq!(listed().await.1, 6);
        town.start(first);
        town.until_met(4).await;
        // An operator drains the node of the head: it moves in order.
        let second = town.server_of(volume).await;
        let name = town.hosts[second].name.clone();
        let schema = town.node(client).schema.clone();
        let drained = schema.set_member_state(&name, MemberState::Draining);
        drained.await.expect("it is there");
        let longest = Cell::new(Duration::ZERO);
        let moved = async {
            let mut number = 0;
            while town.server_of(volume).await == second || number % 32 != 0 {
                let started = Instant::now();
                export.write(number % 32 * PIECE as u64, piece(number % 32, 3)).await.expect("ok");
                longest.set(longest.get().max(started.elapsed()));
                number += 1;
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_mins(1), moved).await.expect("it moves");
        assert!(longest.get() < Duration::from_millis(500), "{:?}", longest.get());
        check(&export, 3).await;
    });
}

#[test]
fn a_volume_is_deleted_everywhere_and_by_any_node() {
    run(async || {
        let town = Town::new(3, 1).await;
        town.start_all().await;
        let volume = create(&town.node(0), PoolScheme::Replicas { copies: 3 }).await;
        let first = town.server_of(volume).await;
        let export = target(&town.node((first + 1) % 3)).await;
        write(&export, 1).await;
        let order = |node: usize| {
            let node = town.node(node);
            async move {
                let (reply, answer) = tokio::sync::oneshot::channel();
                let volume = "p/v".parse().expect("a name");
                node.answer(crate::admin::backend::Command::VolumeRemove {
                    volume,
                    force: true,
                    reply,
                })
                .await;
                answer.await.expect("answered")
            }
        };
        let error = order((first + 2) % 3).await.expect_err("a client of another node is attached");
        assert_eq!(error.code, crate::admin::error::ErrorCode::Conflict, "{error}");
        drop(export);
        order((first + 2) % 3).await.expect("nobody is attached");
        let empty = || {
            let nodes = town.nodes();
            nodes.iter().all(|node| {
                let slots = node.slots();
                slots.iter().all(|slot| slot.disk().expect("online").slot_counts().sealed == 0)
            })
        };
        until("its slots are free", Duration::from_mins(1), empty).await;
        let forgotten = || town.nodes().iter().all(|node| node.deleting.borrow().is_empty());
        until("nobody drops it any more", Duration::from_mins(1), forgotten).await;
        assert!(town.node(0).gather().await.volumes.is_empty());
    });
}

#[test]
fn a_head_that_is_cut_off_from_all_others_never_serves_old_data() {
    run(async || {
        let town = Town::new(5, 1).await;
        town.start_all().await;
        let volume = create(&town.node(0), PoolScheme::Replicas { copies: 3 }).await;
        let first = town.server_of(volume).await;
        let (near, far) =
            (target(&town.node(first)).await, target(&town.node((first + 1) % 5)).await);
        write(&near, 1).await;
        check(&far, 1).await;
        let own = town.hosts[first].name.clone();
        for host in town.hosts.iter().filter(|host| host.name != own) {
            town.net.cut(&own, &host.name);
        }
        let cut = Instant::now();
        // Nobody but the store is reached by it; a client of it waits.
        let stuck = near.clone();
        let late = tokio::task::spawn_local(async move { stuck.write(0, piece(0, 2)).await });
        write(&far, 3).await;
        assert!(cut.elapsed() < Duration::from_secs(15), "{:?}", cut.elapsed());
        for number in 0..32 {
            let read = near.read(number * PIECE as u64, PIECE);
            let read = timeout(Duration::from_millis(500), read).await;
            if let Ok(Ok(data)) = read {
                assert!(data.concat() == piece(number, 3), "piece {number} is old");
            }
        }
        check(&far, 3).await;
        town.net.heal();
        let _either = timeout(Duration::from_mins(1), late).await.expect("it ends");
        town.until_met(5).await;
        // What was written beside it may have come before or after.
        let first_piece = far.read(0, PIECE).await.expect("readable").concat();
        assert!([piece(0, 2), piece(0, 3)].iter().any(|piece| *piece == first_piece));
        write(&near, 4).await;
        check(&far, 4).await;
    });
}

#[test]
fn without_the_store_a_cluster_serves_on_and_nobody_is_judged() {
    run(async || {
        let town = Town::new(4, 1).await;
        town.start_all().await;
        let volume = create(&town.node(0), PoolScheme::Replicas { copies: 3 }).await;
        let first = town.server_of(volume).await;
        let export = target(&town.node((first + 1) % 4)).await;
        write(&export, 1).await;
        town.store_away(true);
        for round in 0..10 {
            sleep(Duration::from_mins(1)).await;
            write(&export, round).await;
            check(&export, round).await;
        }
        town.store_away(false);
        sleep(Duration::from_secs(30)).await;
        assert_eq!(town.server_of(volume).await, first, "nobody was taken for dead");
        check(&export, 9).await;
        let whole = || town.node(first).heads().iter().all(|head| head.reduced().0 == 0);
        until("it is whole", Duration::from_mins(2), whole).await;
    });
}

#[test]
fn a_node_that_stops_in_order_is_followed_at_once() {
    run(async || {
        let town = Town::new(4, 1).await;
        town.start_all().await;
        let volume = create(&town.node(0), PoolScheme::Replicas { copies: 3 }).await;
        let first = town.server_of(volume).await;
        let export = target(&town.node((first + 1) % 4)).await;
        write(&export, 1).await;
        let node = town.node(first);
        let stops = tokio::task::spawn_local(async move { node.stop().await });
        let started = Instant::now();
        write(&export, 2).await;
        let took = started.elapsed();
        assert!(took < Duration::from_millis(500), "{took:?}");
        check(&export, 2).await;
        stops.await.expect("it stops");
        town.kill(first);
        town.start(first);
        town.until_met(4).await;
        check(&export, 2).await;
    });
}

#[test]
fn a_head_comes_to_a_client_on_a_node_without_disks_and_leaves_after_it() {
    run(async || {
        let mut town = Town::new(3, 2).await;
        town.start_all().await;
        let volume = create(&town.node(0), PoolScheme::Replicas { copies: 3 }).await;
        town.add_host(0);
        town.start(3);
        let knows = |host: &Host| {
            let node = host.node.borrow().clone();
            node.is_some_and(|node| node.registry.ids().len() == 6)
        };
        until("the gateway knows all disks", Duration::from_secs(20), || knows(&town.hosts[3]))
            .await;
        // Nothing comes there by itself.
        sleep(Duration::from_secs(20)).await;
        assert_ne!(town.server_of(volume).await, 3);

        let open = || async {
            LocalExports(town.node(3)).open("p/v").await.expect("it is exported there too")
        };
        let export = open().await;
        let longest = Cell::new(Duration::ZERO);
        let comes = async {
            let mut number = 0;
            while town.server_of(volume).await != 3 || number % 32 != 0 {
                let started = Instant::now();
                export.write(number % 32 * PIECE as u64, piece(number % 32, 1)).await.expect("ok");
                longest.set(longest.get().max(started.elapsed()));
                number += 1;
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(20), comes).await.expect("it comes");
        assert!(longest.get() < Duration::from_millis(200), "{:?}", longest.get());
        check(&export, 1).await;
        sleep(Duration::from_secs(30)).await;
        assert_eq!(town.server_of(volume).await, 3, "it stays with its client");

        // A second client elsewhere does not draw it away, and it leaves when its own is gone.
        let other = LocalExports(town.node(0)).open("p/v").await.expect("it is exported");
        sleep(Duration::from_secs(10)).await;
        assert_eq!(town.server_of(volume).await, 3);
        drop(export);
        let back = async {
            while town.server_of(volume).await != 0 {
                sleep(Duration::from_millis(100)).await;
            }
        };
        timeout(Duration::from_mins(2), back).await.expect("it goes to the client that is left");
        check(&other, 1).await;
    });
}
