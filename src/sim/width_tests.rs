//! Tests of the log set in small worlds: it shrinks, grows back, and takes new disks in.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout};

use super::simulate;
use super::world::{Node, Running, World, WorldConfig};
use crate::env::Env;
use crate::export::{BlockTarget, TargetError};
use crate::id::{Epoch, HeadId, SegmentId};
use crate::meta::record::{ClusterRecord, encode};
use crate::meta::{MetaStore, Txn, schema};
use crate::shard::domain::Domains;
use crate::shard::{Authority, Scheme, SegmentKind, ShardSpec, SlotClass};
use crate::volume::head::HeadConfig;
use crate::volume::takeover::TakeOverError;
use crate::volume::target::HeadTarget;

/// Long enough for any repair of these worlds.
const LONG: Duration = Duration::from_mins(1);

pub(super) fn config(copies: u8, disks: usize, log_disks: usize) -> WorldConfig {
    WorldConfig {
        scheme: Scheme::replicated(copies),
        disks,
        spares: 0,
        disk_bytes: 8 << 20,
        slot_bytes: 64 << 10,
        volume_bytes: 1 << 20,
        neighbour_bytes: None,
        overcommitted: false,
        log_disks,
        min_size: 1,
        latency: Duration::from_micros(100)..Duration::from_millis(1),
        head: HeadConfig {
            shrink_after: Duration::from_millis(300),
            replace_after: Duration::from_secs(2),
            io_timeout: Duration::from_secs(5),
            log_domains_max: log_disks,
            ..HeadConfig::default()
        },
    }
}

/// Runs a test in a world of its own, in virtual time.
pub(super) fn in_world<F: Future<Output = ()>>(
    config: WorldConfig,
    test: impl FnOnce(Rc<World>) -> F,
) {
    simulate(async {
        let world = Rc::new(World::create(config, Env::from_seed(7)).await);
        world.open_disks().await;
        test(world).await;
    });
}

/// A node with a link that is always the same.
pub(super) fn plain_node(world: &World) -> Rc<Node> {
    let node = Rc::new(Node::default());
    (0..world.ids.len()).for_each(|index| world.connect(&node, index));
    node
}

pub(super) async fn serve(world: &World) -> Rc<Running> {
    let taken = timeout(LONG, world.take_over(&plain_node(world))).await;
    taken.expect("in time").expect("taken over")
}

pub(super) fn vanish(world: &World, running: &Running, index: usize) {
    world.devices.borrow()[index].vanish();
    running.node.registry.remove(world.ids[index]);
}

pub(super) async fn bring_back(world: &World, running: &Running, index: usize) {
    world.devices.borrow()[index].bring_back();
    if let Some(disk) = world.disk(index) {
        disk.close("to be opened again").await;
    }
    let disk = world.open_disk(index).await;
    world.disks.borrow_mut()[index] = disk;
    world.connect(&running.node, index);
    running.head.disk_returned(world.ids[index]).await;
}

async fn write(running: &Running, byte: u8) -> Result<(), TargetError> {
    let target = HeadTarget(running.head.clone());
    target.write(0, Bytes::from(vec![byte; 8192])).await
}

async fn read(running: &Running) -> u8 {
    let target = HeadTarget(running.head.clone());
    let pieces = timeout(LONG, target.read(0, 8192)).await.expect("in time").expect("read");
    pieces[0][100]
}

pub(super) async fn until(what: &str, holds: impl Fn() -> bool) {
    let waits = async {
        while !holds() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(timeout(LONG, waits).await.is_ok(), "{what}");
}

#[test]
fn the_log_shrinks_to_one_of_two_copies_and_widens_again() {
    in_world(config(2, 2, 2), |world| async move {
        let running = serve(&world).await;
        write(&running, 1).await.expect("written");
        vanish(&world, &running, 1);
        let start = Instant::now();
        write(&running, 2).await.expect("written to one copy");
        assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
        assert_eq!(running.head.log_width(), (1, 1, 2));
        assert!(running.head.reduced().0 > 0, "it is told");
        assert_eq!(read(&running).await, 2);
        assert!(!running.head.bears_loss_of(&BTreeSet::from([world.ids[0]])));
        bring_back(&world, &running, 1).await;
        until("wide again", || running.head.log_width() == (2, 2, 2)).await;
        until("redundant again", || running.head.reduced().0 == 0).await;
        running.head.check().await.expect("the invariants hold");
        vanish(&world, &running, 0);
        assert_eq!(read(&running).await, 2, "it was rebuilt on the disk that returned");
    });
}

#[test]
fn a_take_over_with_one_disk_left_serves_all_that_was_acknowledged() {
    in_world(config(3, 3, 3), |world| async move {
        let running = serve(&world).await;
        vanish(&world, &running, 2);
        write(&running, 3).await.expect("written to two copies");
        assert_eq!(running.head.log_width(), (2, 2, 3));
        running.head.abandon("the process ends");
        world.devices.borrow()[0].vanish();
        world.open_disks().await;
        let running = serve(&world).await;
        assert_eq!(running.head.log_width(), (1, 1, 3));
        assert_eq!(read(&running).await, 3);
        write(&running, 4).await.expect("written to the last copy");
        bring_back(&world, &running, 0).await;
        bring_back(&world, &running, 2).await;
        until("wide again", || running.head.log_width() == (3, 3, 3)).await;
        until("redundant again", || running.head.reduced().0 == 0).await;
        assert_eq!(read(&running).await, 4);
        running.head.check().await.expect("the invariants hold");
    });
}

#[test]
fn below_min_size_writes_wait_and_fail_and_reads_go_on() {
    let config = WorldConfig { min_size: 2, ..config(2, 2, 2) };
    in_world(config, |world| async move {
        let running = serve(&world).await;
        write(&running, 1).await.expect("written");
        vanish(&world, &running, 0);
        let start = Instant::now();
        let error = write(&running, 2).await.expect_err("one copy is too few");
        assert!(start.elapsed() >= Duration::from_secs(5), "{error}");
        assert!(error.to_string().contains("1 of 2 failure domains"), "{error}");
        assert_eq!(read(&running).await, 1, "the lease needs one disk only");
        bring_back(&world, &running, 0).await;
        write(&running, 3).await.expect("written");
        assert_eq!(read(&running).await, 3);
    });
}

#[test]
fn another_disk_takes_the_place_of_one_that_stays_away() {
    in_world(config(2, 4, 3), |world| async move {
        let running = serve(&world).await;
        write(&running, 1).await.expect("written");
        assert_eq!(running.head.log_disks().len(), 3);
        let lost = running.head.log_disks()[1];
        let index = world.ids.iter().position(|id| *id == lost).expect("a disk");
        vanish(&world, &running, index);
        until("replaced", || !running.head.log_disks().contains(&lost)).await;
        assert_eq!((running.head.log_disks().len(), running.head.log_width().1), (3, 2));
        running.head.disk_lost(lost);
        until("nothing needs it", || !running.head.uses_disk(lost)).await;
        running.head.disk_removed(lost);
        assert_eq!(read(&running).await, 1);
        running.head.checkpoint().await.expect("a checkpoint");
        running
            .head
            .check_leaks(&BTreeSet::new())
            .await
            .expect("nothing is listed for a disk that is gone");
    });
}

#[test]
fn a_disk_that_is_up_can_be_emptied() {
    in_world(config(2, 4, 3), |world| async move {
        let running = serve(&world).await;
        for byte in 0..40 {
            write(&running, byte).await.expect("written");
        }
        let leaving = running.head.log_disks()[0];
        running.node.registry.set_draining(leaving, true);
        until("nothing needs it", || {
            running.head.disk_lost(leaving);
            !running.head.uses_disk(leaving)
        })
        .await;
        write(&running, 50).await.expect("written");
        assert!(!running.head.uses_disk(leaving), "it is not used anew");
        assert_eq!(read(&running).await, 50);
    });
}

#[test]
fn one_hung_disk_does_not_hold_up_the_lease() {
    let mut config = config(2, 3, 3);
    config.head.lease = Duration::from_secs(4);
    in_world(config, |world| async move {
        let running = serve(&world).await;
        write(&running, 1).await.expect("written");
        sleep(Duration::from_secs(20)).await;
        let disk = running.head.log_disks()[0];
        let index = world.ids.iter().position(|id| *id == disk).expect("a disk");
        // A node of its own for the slow way: only this disk's answers are late.
        let muted = Node::default();
        muted.link.mute.set(true);
        world.connect(&muted, index);
        let late = muted.registry.client(disk).expect("connected");
        let domain = running.node.registry.domain(disk).expect("known");
        let info = world.disk(index).expect("open").info().expect("online");
        running.node.registry.add(late, Domains::of_one_node(domain), info);
        let start = Instant::now();
        running.head.renew_lease().await.expect("two of three suffice");
        assert!(start.elapsed() < Duration::from_millis(500), "{:?}", start.elapsed());
    });
}

#[test]
fn what_heads_of_a_lost_store_left_is_never_deleted() {
    in_world(config(2, 2, 2), |world| async move {
        let running = serve(&world).await;
        write(&running, 1).await.expect("written");
        running.head.release().await.expect("released");
        // A head of the old store whose root was never found again.
        let head = HeadId::from_bytes([9; 16]);
        let (volume, epoch) = (world.volume.id, running.head.authority.epoch.next());
        let segment = SegmentId(70_000);
        let spec = ShardSpec {
            volume,
            segment,
            creation: 5,
            kind: SegmentKind::Log,
            scheme: Scheme::replicated(2),
            index: 0,
            members: world.ids.clone(),
        };
        let disk = world.disk(0).expect("open");
        let authority = Authority { volume, epoch, head };
        disk.create(authority, spec, SlotClass::Client).await.expect("created");
        // The store is rebuilt without it.
        let store = world.store.client(Rc::default());
        let cluster = store.identity().await.expect("reached").cluster;
        let record = ClusterRecord { id: cluster, incarnation: 2 };
        let put = Txn::new().put(schema::CLUSTER_KEY, encode(&record).expect("encodes"));
        store.txn(put).await.expect("no faults");
        for count in 1..4 {
            let running = serve(&world).await;
            assert_eq!(running.head.authority.epoch, Epoch::new(2, count));
            running.head.disk_returned(world.ids[0]).await;
            write(&running, 2).await.expect("written");
            running.head.checkpoint().await.expect("a checkpoint");
            let held = disk.list(volume).expect("listed");
            assert!(held.shards.iter().any(|s| s.spec.segment == segment), "take-over {count}");
            assert_eq!(read(&running).await, 2);
            running.head.release().await.expect("released");
        }
    });
}

#[test]
fn an_old_copy_of_the_store_is_not_believed_and_costs_nothing() {
    in_world(config(2, 4, 4), |world| async move {
        let running = serve(&world).await;
        write(&running, 1).await.expect("written");
        running.head.checkpoint().await.expect("a checkpoint");
        let old = world.store.snapshot();
        write(&running, 2).await.expect("written");
        running.head.checkpoint().await.expect("a checkpoint");
        write(&running, 3).await.expect("written");
        running.head.release().await.expect("released");
        let new = world.store.snapshot();
        let held = || -> Vec<_> {
            let disks = (0..4).filter_map(|index| world.disk(index));
            disks.map(|disk| disk.list(world.volume.id).expect("listed").shards).collect()
        };
        let before = held();

        // However often it is tried: the old root may not come to look new, or be mirrored over newer ones.
        world.store.restore(&old);
        for _ in 0..20 {
            let taken = timeout(LONG, world.take_over(&plain_node(&world))).await.expect("in time");
            let Err(error) = taken else { panic!("an old root is believed") };
            assert!(matches!(error, TakeOverError::StoreBehind { .. }), "{error}");
        }
        assert_eq!(held(), before, "nothing is deleted");
        world.store.restore(&new);
        let running = serve(&world).await;
        assert_eq!(read(&running).await, 3);
    });
}
