//! A cluster whose metadata store is lost, or goes back.

use std::collections::BTreeSet;

use super::*;
use crate::disk::Disk;
use crate::id::{Epoch, HeadId, SegmentId};
use crate::meta::memory::Snapshot;
use crate::meta::{MetaStore, Txn};
use crate::node::recover::{Found, Plan, Rebuilt, rebuild};
use crate::node::store::put_content;
use crate::shard::local::LocalClient;
use crate::shard::{Authority, Scheme, SegmentKind, ShardSpec, SlotClass};

impl Town {
    async fn kill_all(&self) {
        for host in self.hosts() {
            self.kill(&host, false).await;
        }
    }

    /// Opens the disks of all nodes, none of which runs.
    async fn lend_all(&self) -> BTreeMap<DiskId, Found> {
        let mut found = BTreeMap::new();
        for host in self.hosts() {
            let devices = host.devices.0.borrow().clone();
            for (path, device) in devices {
                let disk = Disk::open(Rc::new(device)).await.expect("it is a disk");
                let (size_bytes, slot_bytes) =
                    (disk.geometry().size_bytes, disk.geometry().slot_bytes);
                let id = disk.id();
                let client = Rc::new(LocalClient::new(disk));
                let node = host.name.clone();
                found.insert(id, Found { client, node, path, size_bytes, slot_bytes });
            }
        }
        found
    }

    /// Rebuilds the store, which is empty, from the disks of nodes that do not run.
    async fn recover(&self) -> Rebuilt {
        let found = self.lend_all().await;
        let plan = Plan { missing: &BTreeSet::new(), clustered: true, progress: &|_| {} };
        let rebuilt = rebuild(&self.env, &found, &plan).await.expect("all disks are there");
        drop(found);
        let store = self.store.client(Rc::default());
        put_content(&store, rebuilt.content.clone()).await.expect("the store is empty");
        self.kill_all().await;
        rebuilt
    }

    /// Starts a node that may refuse.
    async fn try_start(&self, index: usize) -> Result<(), String> {
        let host = self.host(index);
        let paths: Vec<String> = host.devices.0.borrow().keys().cloned().collect();
        let started = Node::start(self.options(&host)(), &paths).await;
        started.map(|_| ()).map_err(|error| error.to_string())
    }

    async fn start_all(&self) {
        for host in self.hosts() {
            self.start(&host);
        }
        self.until_met(self.hosts().len()).await;
    }

    async fn checkpoint(&self, volume: VolumeId) {
        let node = node(self, server_of(self, volume).await);
        let slot = node.volumes.borrow()[&volume].clone();
        slot.serving().expect("it serves").checkpoint().await.expect("the store is there");
    }

    async fn revision(&self) -> u64 {
        let store = self.store.client(Rc::default());
        store.list("").await.expect("it is there").revision
    }
}

/// A shard of a volume that nobody knows.
async fn stray(disk: &Rc<Disk>) -> VolumeId {
    let volume = VolumeId::from_bytes([66; 16]);
    let head = HeadId::from_bytes([1; 16]);
    let authority = Authority { volume, epoch: Epoch::new(1, 1), head };
    let spec = ShardSpec {
        volume,
        segment: SegmentId(1),
        creation: 1,
        kind: SegmentKind::Log,
        scheme: Scheme::replicated(2),
        index: 0,
        members: vec![disk.id(), DiskId::default()],
    };
    disk.create(authority, spec, SlotClass::Client).await.expect("there is room");
    volume
}

#[test]
fn a_lost_store_is_rebuilt_from_the_disks_of_all_nodes() {
    run(async || {
        let town = town(4, 2).await;
        let volume = create(&node(&town, 0), PoolScheme::Replicas { copies: 3 }).await;
        let first = server_of(&town, volume).await;
        let export = target(&node(&town, (first + 1) % 4)).await;
        write(&export, 1).await;
        let disks = node(&town, 0).schema.disks().await.expect("listed");
        let disks: Vec<_> = disks.into_iter().map(|disk| disk.record).collect();
        let pools = node(&town, 0).pools.borrow().clone();
        // Clients go on while the store is away; what they write no store knows of.
        store_away(&town, true);
        town.store.wipe();
        store_away(&town, false);
        write(&export, 2).await;
        sleep(Duration::from_mins(1)).await;
        write(&export, 3).await;
        assert_eq!(server_of(&town, volume).await, first, "an empty store is not believed");
        assert_eq!(town.revision().await, 0, "nothing is written into it");
        let unknown = stray(&node(&town, 2).slots()[0].disk().expect("online")).await;
        drop(export);
        town.kill_all().await;

        let rebuilt = town.recover().await;
        assert_eq!((rebuilt.incarnation, &*rebuilt.volumes), (2, &["p/v".to_owned()][..]));
        assert!(rebuilt.notes.iter().any(|note| note.contains(&unknown.to_string())));
        town.start_all().await;
        let second = server_of(&town, volume).await;
        let export = target(&node(&town, (second + 1) % 4)).await;
        check(&export, 3).await;
        write(&export, 4).await;
        check(&export, 4).await;
        let again = node(&town, 0).schema.disks().await.expect("listed");
        assert_eq!(again.into_iter().map(|disk| disk.record).collect::<Vec<_>>(), disks);
        assert_eq!(*node(&town, 3).pools.borrow(), pools);
        let kept = node(&town, 2).slots()[0].disk().expect("online").list(unknown).expect("listed");
        assert_eq!(kept.shards.len(), 1, "absence deletes nothing");
        let whole = || node(&town, second).heads().iter().all(|head| head.reduced().0 == 0);
        until("it is whole", Duration::from_mins(2), whole).await;
    });
}

/// The store as it was when the volume was elsewhere and its root older, and the node that serves it now.
async fn moved_on(
    town: &Town,
    volume: VolumeId,
    export: &Rc<dyn BlockTarget>,
) -> (Snapshot, usize) {
    town.checkpoint(volume).await;
    let first = server_of(town, volume).await;
    let snapshot = town.store.snapshot();
    let schema = node(town, first).schema.clone();
    let name = town.host(first).name.clone();
    let drained = schema.drain_member(&name, true);
    drained.await.expect("it is there");
    let moved = || {
        let node = node(town, first);
        let there = node.volumes.borrow().contains_key(&volume);
        !there
    };
    until("it moves", Duration::from_mins(1), moved).await;
    let second = server_of(town, volume).await;
    assert_ne!(first, second);
    for version in 2..5 {
        write(export, version).await;
        town.checkpoint(volume).await;
    }
    (snapshot, second)
}

#[test]
fn nodes_believe_no_old_copy_of_the_store() {
    run(async || {
        let town = town(4, 1).await;
        let volume = create(&node(&town, 0), PoolScheme::Replicas { copies: 3 }).await;
        let export = target(&node(&town, 0)).await;
        write(&export, 1).await;
        let (old, second) = moved_on(&town, volume, &export).await;
        town.store.restore(&old);
        // Those that run serve on as they are, and give no orders.
        for version in 5..17 {
            sleep(Duration::from_secs(5)).await;
            write(&export, version).await;
            check(&export, version).await;
        }
        assert_eq!(server_of(&town, volume).await, second, "old places are not believed");
        let told =
            |node: &Rc<Node>| node.cluster.as_ref().is_some_and(|c| c.keys.replaced().is_some());
        assert!(town.nodes().iter().all(told), "every node knows");

        // One that starts refuses, however new the old copy has become since, and leaves no trace in it.
        let other = (second + 1) % 4;
        drop(export);
        kill(&town, other).await;
        let before = town.revision().await;
        for _ in 0..5 {
            let why = town.try_start(other).await.expect_err("it is an old copy");
            assert!(why.contains("the store is an old copy"), "{why}");
            kill(&town, other).await;
        }
        assert_eq!(town.revision().await, before);
        let stranger = town.store.client(Rc::default());
        for number in 0..200 {
            let put = Txn::new().put("/other", format!("{number}"));
            stranger.txn(put).await.expect("an etcd is shared with others");
        }
        let why = town.try_start(other).await.expect_err("it is an old copy");
        assert!(why.contains("has seen root") && why.contains("sdsd recover"), "{why}");

        town.kill_all().await;
        town.store.wipe();
        town.recover().await;
        town.start_all().await;
        check(&target(&node(&town, 0)).await, 16).await;
    });
}
