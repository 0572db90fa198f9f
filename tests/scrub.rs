//! Scrub on simulated disks: what was hurt is found and repaired, and clients notice nothing.
#![cfg(feature = "simulation")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use sds::disk::inspect;
use sds::env::Env;
use sds::export::{BlockTarget, TargetError};
use sds::id::{BLOCK_BYTES, BLOCK_SIZE, SegmentId};
use sds::meta::{MetaStore, schema};
use sds::shard::{Scheme, ShardInfo, ShardState};
use sds::sim::world::{Running, World, WorldConfig};
use sds::volume::ScrubReport;
use sds::volume::head::HeadConfig;
use sds::volume::target::HeadTarget;
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep};

/// Bytes of a large write, which goes to data segments in stripes.
const PIECE: usize = 1 << 20;
const SECOND: Duration = Duration::from_secs(1);

fn config() -> WorldConfig {
    WorldConfig {
        scheme: Scheme { data: 4, parity: 2 },
        disks: 7,
        spares: 0,
        disk_bytes: 28 << 20,
        slot_bytes: 512 << 10,
        volume_bytes: 256 << 20,
        neighbour_bytes: None,
        overcommitted: true,
        log_disks: 7,
        min_size: 1,
        latency: Duration::from_micros(20)..Duration::from_micros(400),
        // Shards stay where the tests look for them.
        head: HeadConfig { unix_seconds: || 77, balance_every: None, ..HeadConfig::default() },
    }
}

/// Runs `body` with a head that has just taken a fresh volume over.
fn with_head(config: WorldConfig, body: impl AsyncFnOnce(&World, &Rc<Running>)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, async {
        let world = World::create(config, Env::from_seed(1)).await;
        world.open_disks().await;
        let node = world.node();
        let running = world.take_over(&node).await.unwrap();
        body(&world, &running).await;
    });
}

/// What the client wrote at a block.
fn content(lba: u64) -> Vec<u8> {
    let word = (lba + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
    word.iter().copied().cycle().take(BLOCK_SIZE).collect()
}

async fn write(running: &Running, lba: u64, blocks: u64) -> Result<(), TargetError> {
    let data: Vec<u8> = (lba..lba + blocks).flat_map(content).collect();
    HeadTarget(running.head.clone()).write(lba * BLOCK_BYTES, Bytes::from(data)).await
}

/// Reads and compares.
async fn check(running: &Running, lba: u64, blocks: u64) {
    let bytes = usize::try_from(blocks).unwrap() * BLOCK_SIZE;
    let read = HeadTarget(running.head.clone()).read(lba * BLOCK_BYTES, bytes).await;
    let expected: Vec<u8> = (lba..lba + blocks).flat_map(content).collect();
    assert!(read.unwrap().concat() == expected, "blocks {lba} to {}", lba + blocks);
}

/// Fills the volume, up to `pieces`, and leaves it alone with a checkpoint; the blocks written.
async fn fill(running: &Running, pieces: u64) -> u64 {
    let step = PIECE as u64 / BLOCK_BYTES;
    let mut blocks = 0;
    for piece in 0..pieces {
        match write(running, piece * step, step).await {
            Ok(()) => blocks += step,
            Err(TargetError::NoSpace) => break,
            Err(error) => panic!("{error}"),
        }
    }
    // Small ones, which stay in the log; not all may find room.
    for lba in (0..blocks).step_by(37).take(100) {
        if write(running, lba, 1).await.is_err() {
            break;
        }
    }
    sleep(10 * SECOND).await;
    running.head.checkpoint().await.unwrap();
    sleep(10 * SECOND).await;
    blocks
}

/// A sealed shard that counts, and where its slot begins on its disk, bytes.
struct Shard {
    disk: usize,
    info: ShardInfo,
    offset: u64,
}

/// All shards that count, by segment.
async fn shards(world: &World, running: &Running) -> BTreeMap<SegmentId, Vec<Shard>> {
    let mut found: BTreeMap<SegmentId, Vec<Shard>> = BTreeMap::new();
    for disk in 0..world.ids.len() {
        let device = world.devices.borrow()[disk].clone();
        let inspection = inspect(&device).await.unwrap();
        let geometry = *world.disk(disk).unwrap().geometry();
        for info in world.disk(disk).unwrap().list(world.volume.id).unwrap().shards {
            if info.state != ShardState::Sealed || !running.head.counts_on(world.ids[disk], &info) {
                continue;
            }
            let shard = inspection.shard(&device, world.volume.id, info.spec.segment).unwrap();
            let offset = geometry.block_offset(shard.slot(), 0);
            found.entry(info.spec.segment).or_default().push(Shard { disk, info, offset });
        }
    }
    found
}

async fn scrub(running: &Running) -> ScrubReport {
    assert!(running.head.scrub_to_end().await);
    running.head.scrub_report()
}

/// A scrub that finds nothing.
async fn scrub_clean(running: &Running) {
    for _ in 0..40 {
        if running.head.reduced().0 == 0 {
            break;
        }
        sleep(SECOND).await;
    }
    assert_eq!(running.head.reduced(), (0, None));
    let report = scrub(running).await;
    assert_eq!(
        (report.found, report.unrepairable, report.unchecked_bytes),
        (0, 0, 0),
        "a scrub after a scrub"
    );
}

/// A bit of the medium that was flipped: disk, byte, and what the whole block was before.
type Flipped = BTreeMap<(usize, u64), Vec<u8>>;

/// Flips bits, at random over all shards, in at most two shards of each row of blocks.
fn flip_bits(world: &World, env: &Env, shards: &BTreeMap<SegmentId, Vec<Shard>>) -> Flipped {
    let all: Vec<&Shard> = shards.values().flatten().filter(|s| s.info.blocks > 0).collect();
    let mut rows: BTreeMap<(SegmentId, u32), BTreeSet<usize>> = BTreeMap::new();
    let mut flipped = Flipped::new();
    let pick = |n: usize| usize::try_from(env.random_below(n as u64)).unwrap();
    let mut bits = 0;
    while bits < 10_000 {
        let shard = all[pick(all.len())];
        let block = u32::try_from(env.random_below(shard.info.blocks.into())).unwrap();
        let row = rows.entry((shard.info.spec.segment, block)).or_default();
        if row.len() == 2 && !row.contains(&shard.disk) {
            continue;
        }
        row.insert(shard.disk);
        let device = world.devices.borrow()[shard.disk].clone();
        let at = shard.offset + u64::from(block) * BLOCK_BYTES;
        flipped.entry((shard.disk, at)).or_insert_with(|| device.peek(at, BLOCK_SIZE));
        device.flip_bit(at + pick(BLOCK_SIZE) as u64, u8::try_from(pick(8)).unwrap());
        bits += 1;
    }
    // Two flips of the same bit are none.
    flipped.retain(|(disk, at), before| {
        world.devices.borrow()[*disk].peek(*at, BLOCK_SIZE) != *before
    });
    flipped
}

#[test]
fn ten_thousand_flipped_bits_are_found_and_repaired_and_clients_see_none() {
    with_head(config(), async |world, running| {
        let blocks = fill(running, 256).await;
        assert!(blocks * BLOCK_BYTES > 64 << 20, "{blocks} blocks fit");
        let env = Env::from_seed(7);
        let flipped = flip_bits(world, &env, &shards(world, running).await);
        let hurt = flipped.len() as u64;
        assert!(hurt > 5000, "{hurt} blocks are hurt");
        let done = std::cell::Cell::new(false);
        let client = async {
            let mut reads = 0;
            while !done.get() {
                let count = 1 + env.random_below(64);
                check(running, env.random_below(blocks - count), count).await;
                reads += 1;
                sleep(Duration::from_millis(env.random_below(20))).await;
            }
            reads
        };
        let round = async {
            let report = scrub(running).await;
            done.set(true);
            report
        };
        let (report, reads) = tokio::join!(round, client);
        assert!(reads > 100, "{reads} reads meanwhile");
        // Where a read of the client and the round met the same block, both count it.
        assert!(report.found >= hurt, "{report:?}, {hurt} blocks hurt");
        assert_eq!((report.found, report.unrepairable), (report.repaired, 0), "{report:?}");
        for ((disk, at), before) in &flipped {
            let now = world.devices.borrow()[*disk].peek(*at, BLOCK_SIZE);
            assert!(now == *before, "disk {disk}, byte {at}");
        }
        scrub_clean(running).await;
        for lba in (0..blocks).step_by(256) {
            check(running, lba, 256).await;
        }
        running.head.check_shards(&std::collections::BTreeSet::new()).await.unwrap();
    });
}

/// A data segment's shards, those of the widest one.
fn widest(shards: &BTreeMap<SegmentId, Vec<Shard>>) -> &[Shard] {
    shards.values().max_by_key(|s| (s.len(), s[0].info.blocks)).unwrap()
}

#[test]
fn a_bad_block_that_a_client_reads_is_mended_at_once() {
    with_head(config(), async |world, running| {
        let blocks = fill(running, 8).await;
        let shards = shards(world, running).await;
        let mut before = Vec::new();
        for shard in &widest(&shards)[..2] {
            let device = world.devices.borrow()[shard.disk].clone();
            for block in 0..shard.info.blocks {
                let at = shard.offset + u64::from(block) * BLOCK_BYTES;
                before.push((shard.disk, at, device.peek(at, BLOCK_SIZE)));
                device.flip_bit(at + 99, 3);
            }
        }
        for lba in (0..blocks).step_by(64) {
            check(running, lba, 64).await;
        }
        sleep(SECOND).await;
        let report = running.head.scrub_report();
        assert_eq!((report.rounds, report.running), (0, false), "nobody asked for a round");
        assert!(report.found > 0 && report.found == report.repaired, "{report:?}");
        assert_eq!(running.head.stats.rebuilt_shards.get(), 0, "in place");
        let right = before
            .iter()
            .filter(|(disk, at, was)| world.devices.borrow()[*disk].peek(*at, BLOCK_SIZE) == *was);
        assert!(right.count() > before.len() / 3, "those of data shards are");
        scrub(running).await;
        scrub_clean(running).await;
    });
}

#[test]
fn a_shard_that_is_gone_or_lost_its_checksums_is_built_anew() {
    with_head(config(), async |world, running| {
        fill(running, 8).await;
        let shards = shards(world, running).await;
        let [gone, unread, blind, ..] = widest(&shards) else { panic!("six shards") };
        let spec = &gone.info.spec;
        let disk = world.disk(gone.disk).unwrap();
        disk.delete(running.head.authority, spec.segment, spec.creation).await.unwrap();
        // The three are of one segment, so one after the other.
        let report = scrub(running).await;
        assert_eq!(report.found, 1, "{report:?}");
        scrub_clean(running).await;
        let device = world.devices.borrow()[unread.disk].clone();
        device.latent_error(unread.offset..unread.offset + 3 * BLOCK_BYTES);
        let disk = world.disk(blind.disk).unwrap();
        let geometry = *disk.geometry();
        let slot = (blind.offset - geometry.block_offset(0, 0)) / geometry.slot_bytes;
        let page = geometry.checksum_page(u32::try_from(slot).unwrap());
        let device = world.devices.borrow()[blind.disk].clone();
        device.flip_bit(geometry.checksum_page_offset(page) + 200, 1);
        let report = scrub(running).await;
        assert_eq!(report.found, 4, "three blocks and a shard: {report:?}");
        sleep(10 * SECOND).await;
        let report = running.head.scrub_report();
        assert_eq!((report.repaired, report.unrepairable), (4, 0), "{report:?}");
        scrub_clean(running).await;
    });
}

#[test]
fn what_nobody_can_repair_is_counted_until_it_is_gone() {
    with_head(config(), async |world, running| {
        let blocks = fill(running, 8).await;
        let shards = shards(world, running).await;
        for shard in &widest(&shards)[..3] {
            let device = world.devices.borrow()[shard.disk].clone();
            let at = shard.offset + u64::from(shard.info.blocks - 1) * BLOCK_BYTES;
            device.flip_bit(at + 5, 5);
        }
        let report = scrub(running).await;
        assert_eq!((report.found, report.repaired, report.unrepairable), (3, 0, 3), "{report:?}");
        // Nothing but writing it again, or trimming it, helps.
        let target = HeadTarget(running.head.clone());
        target.zero(0, blocks * BLOCK_BYTES, true).await.unwrap();
        for _ in 0..3 {
            running.head.checkpoint().await.unwrap();
        }
        sleep(SECOND).await;
        assert_eq!(running.head.scrub_report().unrepairable, 0);
        scrub_clean(running).await;
    });
}

#[test]
fn a_round_makes_way_for_clients() {
    with_head(config(), async |_, running| {
        fill(running, 32).await;
        let begun = Instant::now();
        scrub(running).await;
        let idle = begun.elapsed();
        let done = std::cell::Cell::new(false);
        let client = async {
            while !done.get() {
                check(running, 0, 8).await;
            }
        };
        let begun = Instant::now();
        let round = async {
            scrub(running).await;
            done.set(true);
        };
        tokio::join!(client, round);
        let busy = begun.elapsed();
        assert!(busy > 10 * idle, "{idle:?} alone, {busy:?} with a client");
    });
}

#[test]
fn rounds_come_with_their_period_and_the_next_head_knows_of_the_last() {
    let mut config = config();
    config.head.scrub_period = Some(Duration::from_hours(1));
    with_head(config, async |world, running| {
        fill(running, 4).await;
        assert_eq!(running.head.scrub_report().rounds, 0);
        sleep(Duration::from_mins(61)).await;
        let report = running.head.scrub_report();
        assert_eq!((report.rounds, report.finished_at), (1, Some(77)));
        sleep(Duration::from_mins(40)).await;
        running.head.release().await.unwrap();
        let next = world.take_over(&running.node).await.unwrap();
        sleep(SECOND).await;
        let report = next.head.scrub_report();
        assert_eq!((report.rounds, report.finished_at), (0, Some(77)));
        sleep(Duration::from_mins(22)).await;
        assert_eq!(next.head.scrub_report().rounds, 1, "the period goes on over take-overs");
        next.head.release().await.unwrap();
        // The next one goes on where a round was cut short.
        let key = schema::scrub_key(world.volume.id);
        let kept = world.store.get(&key).await.unwrap().unwrap();
        let text = String::from_utf8(kept.value.to_vec()).unwrap();
        assert!(text.contains("\"position\":null"), "{text}");
        let cut = text.replace("null", "1");
        world.store.txn(sds::meta::Txn::new().put(key, cut)).await.unwrap();
        let last = world.take_over(&running.node).await.unwrap();
        sleep(20 * SECOND).await;
        assert_eq!(last.head.scrub_report().rounds, 1);
    });
}
