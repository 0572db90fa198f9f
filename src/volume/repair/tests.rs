//! Repair in a simulated world: what is read and written, in which order, and after a restart.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::env::Env;
use crate::export::BlockTarget;
use crate::id::BLOCK_SIZE;
use crate::shard::Scheme;
use crate::sim::simulate;
use crate::sim::world::{Node, Running, World, WorldConfig};
use crate::volume::head::HeadConfig;
use crate::volume::target::HeadTarget;

/// Blocks of one write: a row of stripes in a data segment.
const PIECE: u64 = 1024;
const LONG: Duration = Duration::from_mins(2);

fn config() -> WorldConfig {
    WorldConfig {
        scheme: Scheme { data: 4, parity: 2 },
        disks: 8,
        spares: 0,
        disk_bytes: 64 << 20,
        slot_bytes: 512 << 10,
        volume_bytes: 64 << 20,
        neighbour_bytes: None,
        overcommitted: false,
        log_disks: 8,
        min_size: 1,
        latency: Duration::from_micros(50)..Duration::from_micros(500),
        head: HeadConfig {
            // Not a divisor of anything, so that records and headers lie across its windows.
            repair_window_blocks: 37,
            scrub_period: None,
            ..HeadConfig::default()
        },
    }
}

fn in_world(config: WorldConfig, body: impl AsyncFnOnce(&World, &Rc<Running>)) {
    simulate(async {
        let world = World::create(config, Env::from_seed(3)).await;
        world.open_disks().await;
        let running = serve(&world).await;
        fill(&running).await;
        body(&world, &running).await;
    });
}

async fn serve(world: &World) -> Rc<Running> {
    let node = Rc::new(Node::default());
    (0..world.ids.len()).for_each(|index| world.connect(&node, index));
    timeout(LONG, world.take_over(&node)).await.expect("in time").expect("taken over")
}

fn content(lba: u64) -> Vec<u8> {
    let word = (lba + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    word.iter().copied().cycle().take(BLOCK_SIZE).collect()
}

async fn write(running: &Running, lba: u64, blocks: u64) {
    let data: Vec<u8> = (lba..lba + blocks).flat_map(content).collect();
    let target = HeadTarget(running.head.clone());
    target.write(lba * BLOCK_BYTES, Bytes::from(data)).await.expect("written");
}

/// Large and small writes, of which some segments are sealed.
async fn fill(running: &Running) {
    for piece in 0..12 {
        write(running, piece * PIECE, PIECE).await;
    }
    for lba in 0..600 {
        write(running, lba * 7, 1).await;
    }
    running.head.checkpoint().await.expect("nothing is wrong");
}

async fn check(running: &Running) {
    for piece in 0..12 {
        let (lba, bytes) = (piece * PIECE, usize::try_from(PIECE * BLOCK_BYTES).expect("small"));
        let read = HeadTarget(running.head.clone()).read(lba * BLOCK_BYTES, bytes).await;
        let expected: Vec<u8> = (lba..lba + PIECE).flat_map(content).collect();
        assert!(read.expect("readable").concat() == expected, "piece {piece}");
    }
}

fn lose(world: &World, running: &Running, index: usize) {
    world.devices.borrow()[index].vanish();
    running.node.registry.remove(world.ids[index]);
    running.head.disk_lost(world.ids[index]);
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let waits = async {
        while !holds() {
            sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(timeout(LONG, waits).await.is_ok(), "{what}");
}

/// Bytes of a segment's shards.
fn shard_bytes(running: &Running, counts: impl Fn(&Segment) -> u64) -> u64 {
    let state = running.head.state.borrow();
    let needed = state.table.segments.values().filter(|s| s.sealed);
    needed.map(|s| counts(s) * u64::from(s.blocks) * BLOCK_BYTES).sum()
}

#[test]
fn all_that_a_segment_lacks_is_rebuilt_from_one_reading() {
    in_world(config(), async |world, running| {
        let head = &running.head;
        lose(world, running, 0);
        lose(world, running, 1);
        let (missing, twice) = {
            let state = head.state.borrow();
            let needed = |s: &&Segment| s.sealed && s.missing != 0 && head.is_needed(&state, s.id);
            let segments = || state.table.segments.values().filter(needed);
            let bytes = |s: &Segment| u64::from(s.blocks) * BLOCK_BYTES;
            let missing: u64 =
                segments().map(|s| bytes(s) * u64::from(s.missing.count_ones())).sum();
            let read: u64 = segments().map(|s| bytes(s) * u64::from(s.scheme.data)).sum();
            assert!(segments().any(|s| s.missing.count_ones() == 2), "some lack two");
            (missing, read)
        };
        let report = head.repair_report().expect("there is something to repair");
        assert_eq!((report.done_bytes, report.total_bytes), (0, missing));
        until("rebuilt", || head.repair_report().is_none()).await;
        assert!(head.stats.rebuilt_bytes.get() >= missing);
        // Hedges, headers across windows, and what was sealed since come on top.
        let read = head.stats.repair_read_bytes.get();
        assert!(read <= twice * 13 / 10, "{read} bytes were read, {twice} are needed");
        check(running).await;
        let gone = BTreeSet::from([world.ids[0], world.ids[1]]);
        head.check().await.expect("the invariants hold");
        head.check_shards(&gone).await.expect("every shard that counts is whole");
        assert!(shard_bytes(running, |s| u64::from(s.missing.count_ones())) == 0);
    });
}

#[test]
fn what_survives_the_fewest_losses_comes_first_also_when_a_disk_dies_on_the_way() {
    let slow = Duration::from_millis(20)..Duration::from_millis(40);
    in_world(WorldConfig { latency: slow, ..config() }, async |world, running| {
        let head = &running.head;
        lose(world, running, 0);
        until("it has begun", || head.stats.rebuilt_shards.get() >= 2).await;
        lose(world, running, 1);
        let of = |lost: u32| {
            let state = head.state.borrow();
            let needed = |s: &&Segment| s.sealed && head.is_needed(&state, s.id);
            let data = state.table.segments.values().filter(|s| s.scheme.data > 1).filter(needed);
            data.filter(|s| s.missing.count_ones() == lost).count()
        };
        let worst = of(2);
        assert!(worst > 0 && of(1) > REPAIR_SEGMENTS_MAX, "{worst} and {}", of(1));
        until("the worst are repaired", || of(2) == 0).await;
        // Those that were under way when the second disk died, and begun when the last of the
        // worst was, may have been finished, and no others.
        assert!(of(1) > 0, "they waited for the worst");
        until("all are repaired", || head.repair_report().is_none()).await;
        check(running).await;
    });
}

#[test]
fn several_segments_are_repaired_at_once() {
    let slow = Duration::from_millis(20)..Duration::from_millis(40);
    in_world(WorldConfig { latency: slow, ..config() }, async |world, running| {
        let head = &running.head;
        let permits = limits::REPAIR_BYTES_MAX / BLOCK_SIZE;
        let begun = Instant::now();
        lose(world, running, 0);
        let free = || running.node.registry.repair_blocks_free();
        until("memory is taken", || free() < permits).await;
        let one = limits::repair_blocks(4, 1).max(limits::repair_blocks(1, 1));
        until("for more than one", || free() < permits - one).await;
        until("all are repaired", || head.repair_report().is_none()).await;
        assert_eq!(free(), permits, "and given back");
        assert!(begun.elapsed() < LONG, "{:?}", begun.elapsed());
    });
}

#[test]
fn after_a_restart_it_goes_on_where_it_stopped() {
    let slow = Duration::from_millis(20)..Duration::from_millis(40);
    in_world(WorldConfig { latency: slow, ..config() }, async |world, running| {
        let head = &running.head;
        lose(world, running, 0);
        let total = head.repair_report().expect("there is something to repair").total_bytes;
        until("most is rebuilt", || {
            head.repair_report().is_none_or(|r| r.remaining_bytes() < total / 4)
        })
        .await;
        // What is rebuilt while the checkpoint is being made may not be part of it.
        let left = head.repair_report().expect("the rest").remaining_bytes();
        head.checkpoint().await.expect("nothing is wrong");
        // The process ends; the disk stays away.
        head.abandon("killed");
        world.stop_devices(false);
        world.devices.borrow()[0].vanish();
        world.open_disks().await;
        let again = serve(world).await;
        again.head.disk_lost(world.ids[0]);
        until("all is repaired", || again.head.repair_report().is_none()).await;
        let rebuilt = again.head.stats.rebuilt_bytes.get();
        // What was written of shards that were not whole yet is lost.
        let partial = REPAIR_SEGMENTS_MAX as u64 * world.config.slot_bytes;
        assert!(left + partial < total * 3 / 4, "{left} of {total} were left");
        assert!(rebuilt <= left + partial, "{rebuilt} bytes were rebuilt, {left} were left");
        check(&again).await;
    });
}

#[test]
fn a_window_that_nobody_holds_whole_is_read_record_by_record() {
    in_world(config(), async |world, running| {
        let head = &running.head;
        let segment = {
            let state = head.state.borrow();
            let dense = state.table.segments.values().find(|s| s.sealed && s.scheme.data > 1);
            dense.expect("large writes went there").clone()
        };
        // Four of six are needed; each of the three others of the first window lacks another block.
        let index = world.ids.iter().position(|id| *id == segment.members[0].disk).expect("known");
        for (shard, block) in [(1, 3), (2, 9), (3, 20)] {
            let disk = world.ids.iter().position(|id| *id == segment.members[shard].disk);
            let device = world.devices.borrow()[disk.expect("known")].clone();
            let inspection = crate::disk::inspect(&device).await.expect("readable");
            let found = inspection.shard(&device, world.volume.id, segment.id).expect("there");
            let geometry = *world.disk(disk.expect("known")).expect("open").geometry();
            device.flip_bit(geometry.block_offset(found.slot(), block), 1);
        }
        lose(world, running, index);
        until("all is repaired", || head.repair_report().is_none()).await;
        check(running).await;
        head.check_shards(&BTreeSet::from([world.ids[index]])).await.expect("whole");
    });
}
