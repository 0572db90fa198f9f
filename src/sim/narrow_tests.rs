//! Tests of narrowing in small worlds: disks go for good, data segments follow, and are wide again when
//! others come.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{sleep, timeout};

use super::width_tests::{bring_back, config, in_world, serve, until, vanish};
use super::world::{Running, World, WorldConfig};
use crate::export::BlockTarget;
use crate::id::DiskId;
use crate::shard::Scheme;
use crate::volume::head::HeadConfig;
use crate::volume::target::HeadTarget;

const POOL: Scheme = Scheme { data: 4, parity: 2 };
const STEP: usize = 64 << 10;
const STEPS: u64 = 16;

fn coded(disks: usize, spares: usize) -> WorldConfig {
    let base = config(3, disks, 4);
    let head = HeadConfig {
        narrow_after: Duration::from_secs(3),
        large_write_blocks: 8,
        replace_after: Duration::from_secs(1),
        ..base.head
    };
    WorldConfig { scheme: POOL, spares, head, ..base }
}

fn content(step: u64, version: u64) -> Bytes {
    let blocks = (0..STEP as u64 / 8).map(|i| (step << 40 | version << 32 | i).to_le_bytes());
    blocks.flatten().collect::<Vec<u8>>().into()
}

/// Writes every `every`th piece.
async fn fill(running: &Running, version: u64, every: usize) {
    let target = HeadTarget(running.head.clone());
    for step in (0..STEPS).step_by(every) {
        let written = target.write(step * STEP as u64, content(step, version)).await;
        assert_eq!(written, Ok(()), "piece {step}");
    }
}

async fn assert_content(running: &Running, version: impl Fn(u64) -> u64) {
    let target = HeadTarget(running.head.clone());
    for step in 0..STEPS {
        let read = timeout(Duration::from_mins(1), target.read(step * STEP as u64, STEP)).await;
        let data = read.expect("in time").expect("readable").concat();
        assert!(data == content(step, version(step)), "piece {step} is other");
    }
}

fn lose(world: &World, running: &Running, index: usize) {
    vanish(world, running, index);
    running.head.disk_lost(world.ids[index]);
}

async fn add_spare(world: &World, running: &Running) {
    let index = world.add_spare().expect("there is one");
    bring_back(world, running, index).await;
}

fn scheme(running: &Running) -> (u8, u8) {
    let Scheme { data, parity } = running.head.bending().scheme;
    (data, parity)
}

async fn until_whole(running: &Running, wanted: (u8, u8)) {
    let whole = || {
        let bending = running.head.bending();
        let settled = bending.to_narrow.0 == 0 && (wanted != (4, 2) || bending.is_straight(POOL));
        scheme(running) == wanted && settled && running.head.reduced().0 == 0
    };
    for _ in 0..600 {
        if whole() {
            break;
        }
        sleep(Duration::from_millis(100)).await;
    }
    let (bending, reduced) = (running.head.bending(), running.head.reduced());
    assert!(whole(), "{wanted:?}: {bending:?}, {reduced:?}, {:?}", running.head.log_width());
    running.head.check().await.expect("the invariants hold");
}

fn pairs(disks: &[DiskId]) -> impl Iterator<Item = BTreeSet<DiskId>> {
    let first = move |i: usize| disks[i + 1..].iter().map(move |b| BTreeSet::from([disks[i], *b]));
    (0..disks.len()).flat_map(first)
}

#[test]
fn a_coded_pool_heals_by_narrowing_survives_as_many_losses_again_and_widens() {
    in_world(coded(8, 2), |world: Rc<World>| async move {
        let running = serve(&world).await;
        fill(&running, 1, 1).await;
        fill(&running, 2, 3).await;
        let version = |step: u64| if step.is_multiple_of(3) { 2 } else { 1 };
        assert!(running.head.bending().is_straight(POOL));
        lose(&world, &running, 1);
        lose(&world, &running, 4);
        sleep(Duration::from_secs(2)).await;
        assert_eq!(scheme(&running), (4, 2), "they may come back");
        until_whole(&running, (2, 2)).await;
        let left: Vec<DiskId> = [0, 2, 3, 5].map(|index| world.ids[index]).into();
        for pair in pairs(&left) {
            assert!(running.head.bears_loss_of(&pair), "without {pair:?}");
        }
        let narrow = running.head.bending().narrow;
        assert!(narrow.0 > 0 && narrow.1 > 0, "{narrow:?}");
        lose(&world, &running, 0);
        lose(&world, &running, 5);
        assert_content(&running, version).await;
        fill(&running, 3, 4).await;
        let version = |step: u64| if step.is_multiple_of(4) { 3 } else { version(step) };
        assert_content(&running, version).await;
        until("what is left of stripes is copied", || {
            scheme(&running) == (1, 2) && running.head.bending().to_narrow.0 == 0
        })
        .await;
        assert_content(&running, version).await;
        let third = BTreeSet::from([world.ids[2]]);
        until("each of the two has all", || running.head.bears_loss_of(&third)).await;
        bring_back(&world, &running, 0).await;
        bring_back(&world, &running, 5).await;
        until_whole(&running, (2, 2)).await;
        add_spare(&world, &running).await;
        add_spare(&world, &running).await;
        until_whole(&running, (4, 2)).await;
        assert_content(&running, version).await;
        for index in [1, 4] {
            running.head.disk_removed(world.ids[index]);
        }
        running.head.checkpoint().await.expect("a checkpoint");
        running.head.check_leaks(&BTreeSet::new()).await.expect("no leaks");
    });
}

#[test]
fn a_blip_narrows_nothing_and_a_removed_disk_does_at_once() {
    in_world(coded(6, 0), |world: Rc<World>| async move {
        let running = serve(&world).await;
        fill(&running, 1, 1).await;
        let moved = running.head.stats.moved_blocks.get();
        for _ in 0..4 {
            lose(&world, &running, 3);
            sleep(Duration::from_secs(2)).await;
            bring_back(&world, &running, 3).await;
            sleep(Duration::from_secs(2)).await;
        }
        assert_eq!(running.head.stats.moved_blocks.get(), moved);
        assert!(running.head.bending().is_straight(POOL));
        lose(&world, &running, 3);
        running.node.registry.forget(world.ids[3]);
        sleep(Duration::from_millis(100)).await;
        assert_eq!(scheme(&running), (3, 2));
        until_whole(&running, (3, 2)).await;
        assert_content(&running, |_| 1).await;
    });
}

#[test]
fn copies_are_cleaned_with_a_domain_too_few() {
    in_world(config(3, 3, 3), |world: Rc<World>| async move {
        let running = serve(&world).await;
        lose(&world, &running, 2);
        let target = HeadTarget(running.head.clone());
        let block = |lba: u64, byte: u64| {
            let data = Bytes::from(vec![u8::try_from(byte % 251).expect("small"); 4096]);
            target.write(lba * 4096, data)
        };
        // In each segment of the log, something stays.
        for cold in 8..248_u64 {
            block(cold, cold).await.expect("written");
            for n in 0..30 {
                block(n % 8, cold + n).await.expect("there is room once segments were cleaned");
            }
        }
        assert!(running.head.stats.moved_blocks.get() > 0);
        for cold in 8..248_u64 {
            let read = target.read(cold * 4096, 4096).await.expect("readable").concat();
            assert!(read == vec![u8::try_from(cold % 251).expect("small"); 4096], "block {cold}");
        }
        bring_back(&world, &running, 2).await;
        until("whole again", || running.head.reduced().0 == 0).await;
        running.head.check().await.expect("the invariants hold");
    });
}
