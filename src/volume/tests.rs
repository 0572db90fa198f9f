//! A head in a simulated world, without faults but those that a test asks for.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::dense::{Payload, Stream};
use super::head::{HeadConfig, Op};
use super::overlay::Target;
use super::root::Root;
use super::swap::mirror;
use super::target::HeadTarget;
use crate::buffer::AlignedBuf;
use crate::env::Env;
use crate::export::{BlockTarget, TargetError};
use crate::id::{BLOCK_BYTES, BLOCK_SIZE, Epoch, HeadId, SegmentId, VolumeId};
use crate::meta::{MetaStore, Txn, schema};
use crate::segment::BlockAddr;
use crate::segment::checksum::raw_crcs;
use crate::segment::fetch::{Finding, Problem};
use crate::segment::record::Entry;
use crate::shard::{Authority, Scheme, SegmentKind, ShardError, ShardSpec, SlotClass};
use crate::sim::device::SimDevice;
use crate::sim::simulate;
use crate::sim::world::{Node, Running, World, WorldConfig};

fn config() -> WorldConfig {
    WorldConfig {
        scheme: Scheme::replicated(2),
        disks: 4,
        spares: 0,
        disk_bytes: 24 << 20,
        slot_bytes: 128 << 10,
        volume_bytes: 1 << 20,
        neighbour_bytes: None,
        overcommitted: false,
        log_disks: 4,
        min_size: 1,
        latency: Duration::from_micros(50)..Duration::from_millis(2),
        head: HeadConfig { overlay_extents_max: 32, ..HeadConfig::default() },
    }
}

/// Runs `body` with a head that has just taken a fresh volume over.
fn with_head(body: impl AsyncFnOnce(&World, &Running)) {
    simulate(async {
        let world = World::create(config(), Env::from_seed(1)).await;
        world.open_disks().await;
        let node: Rc<Node> = world.node();
        let running = world.take_over(&node).await.expect("nothing is wrong");
        body(&world, &running).await;
    });
}

/// Writes one block; gives up when the head does not take it for a minute.
async fn write(running: &Running, lba: u64, byte: u8) {
    let data = Bytes::from(vec![byte; BLOCK_SIZE]);
    let target = HeadTarget(running.head.clone());
    let written = timeout(Duration::from_mins(1), target.write(lba * BLOCK_BYTES, data)).await;
    assert_eq!(written.ok(), Some(Ok(())), "block {lba} is not written");
}

async fn stored_root(world: &World) -> Root {
    let stored = world.store.get(&schema::root_key(world.volume.id)).await.expect("no faults here");
    Root::decode(&stored.expect("there is a root").value).expect("a valid root")
}

/// Sequence of the checkpoint that the root names.
async fn named(world: &World) -> u64 {
    stored_root(world).await.checkpoint.map_or(0, |c| c.place.sequence)
}

#[test]
fn a_head_writes_and_makes_checkpoints_while_its_swap_is_in_doubt() {
    with_head(async |world, running| {
        let before = named(world).await;
        running.node.faults.unknown_lost.set(1000);
        // Every other block: each is an extent of its own, far more than the overlay holds.
        for n in 0..300_u64 {
            write(running, n * 2 % 256, 1).await;
        }
        let made = running.head.report().checkpoint_sequence;
        assert!(made >= before + 4, "{made} checkpoints, {before} before");
        assert_eq!(named(world).await, before, "no swap can have been made");
        running.node.heal();
        sleep(Duration::from_secs(5)).await;
        let made = running.head.report().checkpoint_sequence;
        assert_eq!(named(world).await, made, "the root names the newest checkpoint by itself");
        running.head.checkpoint().await.expect("nothing is wrong");
        running.head.check_leaks(&BTreeSet::new()).await.expect("what was freed is deleted");
    });
}

#[test]
fn while_the_store_is_away_only_the_swap_is_tried_again() {
    with_head(async |world, running| {
        running.node.faults.unavailable.set(true);
        write(running, 0, 1).await;
        running.head.checkpoint_wanted.notify_one();
        sleep(Duration::from_secs(1)).await;
        let made = running.head.stats.checkpoints.get();
        for second in 0..60 {
            running.head.checkpoint_wanted.notify_one();
            // The log set is to be renewed too, which takes a checkpoint.
            if second >= 10 {
                running.head.disk_lost(world.ids[0]);
            }
            sleep(Duration::from_secs(1)).await;
        }
        assert_eq!(running.head.stats.checkpoints.get(), made, "tables are written in vain");
        running.node.heal();
        sleep(Duration::from_secs(5)).await;
        assert!(running.head.stats.checkpoints.get() > made, "the one that waited is made");
        assert_eq!(named(world).await, running.head.report().checkpoint_sequence);
        let set = stored_root(world).await.set;
        assert!(set.domain_of(world.ids[0]).is_none(), "then the set is renewed: {set:?}");
    });
}

#[test]
fn a_head_that_stops_leaves_a_swap_in_doubt() {
    with_head(async |_, running| {
        running.node.faults.unknown_lost.set(1000);
        let head = running.head.clone();
        let swap = tokio::task::spawn_local(async move {
            head.describe(serde_json::json!("new")).await.map_err(|error| error.to_string())
        });
        sleep(Duration::from_secs(10)).await;
        assert!(!swap.is_finished(), "its outcome is not known");
        running.head.abandon("deleted");
        let ended = timeout(Duration::from_millis(1), swap).await.expect("it ends at once");
        assert_eq!(ended.expect("no panic"), Err("the head stopped: deleted".into()));
    });
}

#[test]
fn a_swap_of_a_deleted_volume_says_so() {
    with_head(async |world, running| {
        let gone = Txn::new().delete(schema::root_key(world.volume.id));
        world.store.txn(gone).await.expect("no faults here");
        let error = running.head.describe(serde_json::json!("new")).await.expect_err("no root");
        assert_eq!(error.to_string(), "the head stopped: the volume was deleted");
    });
}

#[test]
fn a_swap_whose_caller_is_gone_keeps_its_sequence() {
    with_head(async |world, running| {
        let before = stored_root(world).await;
        // Swapped, but mirrored on a single disk of two that are needed.
        world.devices.borrow()[1..].iter().for_each(SimDevice::hang);
        let first = running.head.describe(serde_json::json!("first"));
        assert!(timeout(Duration::from_secs(1), first).await.is_err(), "it cannot be in force");
        assert_eq!(stored_root(world).await.sequence, before.sequence + 1);
        world.devices.borrow().iter().for_each(SimDevice::heal);
        running.head.describe(serde_json::json!("second")).await.expect("nothing is wrong");
        let root = stored_root(world).await;
        assert_eq!(root.sequence, before.sequence + 2);
        assert_eq!(root.description, "second");
        for index in 0..world.ids.len() {
            let held = world.disk(index).expect("open").list(world.volume.id).expect("readable");
            let mirror = held.mirror.expect("mirrored");
            assert_eq!(Root::decode(&mirror.data).expect("a root"), root, "on disk {index}");
        }
    });
}

#[test]
fn without_disks_reads_fail_in_the_end_as_writes_do() {
    with_head(async |world, running| {
        write(running, 0, 1).await;
        world.ids.iter().for_each(|disk| running.node.registry.remove(*disk));
        let target = HeadTarget(running.head.clone());
        // The lease that is held runs out first.
        sleep(Duration::from_secs(2)).await;
        let since = Instant::now();
        let read = timeout(Duration::from_mins(5), target.read(0, BLOCK_SIZE)).await;
        assert!(matches!(read, Ok(Err(TargetError::Io(_)))), "{read:?}");
        let patience = HeadConfig::default().io_timeout;
        assert!(since.elapsed() >= patience && since.elapsed() < patience * 2);
        (0..world.ids.len()).for_each(|index| world.connect(&running.node, index));
        assert_eq!(target.read(0, BLOCK_SIZE).await.expect("served again").concat()[0], 1);
    });
}

#[test]
fn a_checkpoint_without_its_root_keeps_the_reserve_from_others_for_a_while_only() {
    with_head(async |_, running| {
        let head = &running.head;
        write(running, 0, 1).await;
        running.node.faults.unavailable.set(true);
        head.store_checkpoint().await.expect("the disks are there");
        head.take_checkpoint_reserve().await;
        let reserve = running.node.registry.checkpoint_reserve();
        let permit = timeout(Duration::from_secs(30), reserve).await;
        drop(permit.expect("another volume gets it"));
        head.store_checkpoint().await.expect_err("it would take of the reserve once more");
        running.node.heal();
        head.checkpoint().await.expect("nothing is wrong");
    });
}

#[test]
fn a_disk_that_cannot_be_emptied_costs_no_segments() {
    with_head(async |world, running| {
        // Two copies, and two disks of four are all there is.
        for disk in &world.ids[2..] {
            running.node.registry.remove(*disk);
            running.head.disk_lost(*disk);
        }
        for lba in 0..8 {
            write(running, lba, 1).await;
        }
        let leaving = world.ids[0];
        running.node.registry.set_draining(leaving, true);
        let opened = || running.head.state.borrow().next_segment;
        let before = opened();
        for second in 0..60 {
            running.head.disk_lost(leaving);
            write(running, second % 8, 2).await;
            sleep(Duration::from_secs(1)).await;
        }
        assert!(opened() - before < 20, "{} segments were opened", opened() - before);
        // With a third disk in the log set it is left.
        running.node.registry.set_draining(leaving, false);
        world.connect(&running.node, 2);
        for disk in [0, 2] {
            running.head.disk_returned(world.ids[disk]).await;
        }
        sleep(Duration::from_secs(20)).await;
        running.node.registry.set_draining(leaving, true);
        for second in 0..60 {
            running.head.disk_lost(leaving);
            write(running, second % 8, 3).await;
            sleep(Duration::from_secs(1)).await;
        }
        assert!(!running.head.uses_disk(leaving), "the disk is not emptied");
    });
}

/// Takes every free slot of the disks for another volume.
async fn fill_disks(world: &World, running: &Running) {
    let volume = VolumeId::from_bytes([9; 16]);
    let authority = Authority { volume, epoch: Epoch(1), head: HeadId::from_bytes([9; 16]) };
    for disk in &world.ids {
        let client = running.node.registry.client(*disk).expect("up");
        client.fence(authority, None).await.expect("nobody else has it");
        let mut segment = 0;
        loop {
            segment += 1;
            let spec = ShardSpec {
                volume,
                segment: SegmentId(segment),
                creation: 1,
                kind: SegmentKind::Log,
                scheme: Scheme::replicated(1),
                index: 0,
                members: vec![*disk],
            };
            match client.create(authority, spec, SlotClass::Checkpoint).await {
                Ok(()) => {}
                Err(ShardError::NoSpace) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn what_has_its_place_in_the_log_is_answered_where_there_is_no_space() {
    with_head(async |world, running| {
        write(running, 0, 1).await;
        fill_disks(world, running).await;
        let member = running.head.state.borrow().log.as_ref().expect("open").shards[0].disk;
        let index = world.ids.iter().position(|id| *id == member).expect("ours");
        // The append lags, the log fails over, and finds no slot. A trim waits behind it.
        world.devices.borrow()[index].hang();
        let target = HeadTarget(running.head.clone());
        let data = Bytes::from(vec![2; BLOCK_SIZE]);
        let both = async {
            let trim = async {
                sleep(Duration::from_secs(2)).await;
                target.zero(0, BLOCK_BYTES, true).await
            };
            tokio::join!(target.write(BLOCK_BYTES, data), trim)
        };
        let (written, trimmed) =
            timeout(Duration::from_mins(5), both).await.expect("both are answered");
        assert_eq!(written, Err(TargetError::NoSpace));
        assert_eq!(trimmed, Err(TargetError::NoSpace));
    });
}

#[test]
fn a_finding_counts_for_the_shard_it_names_only() {
    with_head(async |_, running| {
        let head = &running.head;
        write(running, 0, 1).await;
        head.checkpoint().await.expect("nothing is wrong");
        let (segment, members) = {
            let state = head.state.borrow();
            let sealed = state.table.segments.values().find(|s| s.sealed && s.live > 0);
            let segment = sealed.or_else(|| state.table.segments.values().find(|s| s.live > 0));
            let segment = segment.expect("something was written");
            (segment.id, segment.members.clone())
        };
        head.state.borrow_mut().table.segments.get_mut(&segment).expect("it is there").sealed =
            true;
        let missing = || head.state.borrow().table.segments[&segment].missing;
        let finding = |disk, creation| Finding {
            segment,
            disk,
            creation,
            problem: Problem::Disk(ShardError::Gone),
        };
        let [first, second] = members[..] else { panic!("two copies") };
        // The shard that was read has been replaced by another on the same disk, or elsewhere.
        head.note_findings(&[finding(second.disk, second.creation ^ 1)]);
        head.note_findings(&[finding(crate::id::DiskId::default(), second.creation)]);
        assert_eq!(missing(), 0);
        head.note_findings(&[finding(second.disk, second.creation)]);
        assert_eq!(missing(), 0b10, "of {first:?} and {second:?}");
    });
}

#[test]
fn a_read_looks_again_when_its_shards_were_replaced() {
    with_head(async |_, running| {
        write(running, 7, 9).await;
        let target = HeadTarget(running.head.clone());
        running.node.link.reads_cut.set(true);
        let read = target.read(7 * BLOCK_BYTES, BLOCK_SIZE);
        let replace = async {
            // Longer than the read waits until it asks another disk too, shorter than for any.
            sleep(Duration::from_millis(300)).await;
            for segment in running.head.state.borrow_mut().table.segments.values_mut() {
                segment.members.iter_mut().for_each(|member| member.creation ^= 1);
            }
            sleep(Duration::from_millis(400)).await;
            running.node.heal();
        };
        let (read, ()) = tokio::join!(read, replace);
        assert_eq!(read.expect("it is read in the end").concat(), vec![9; BLOCK_SIZE]);
    });
}

#[test]
fn a_read_waits_for_disks_that_do_not_answer() {
    with_head(async |_, running| {
        write(running, 7, 9).await;
        let target = HeadTarget(running.head.clone());
        running.node.link.reads_cut.set(true);
        let read = target.read(7 * BLOCK_BYTES, BLOCK_SIZE);
        let heal = async {
            sleep(Duration::from_secs(10)).await;
            running.node.heal();
        };
        let (read, ()) = tokio::join!(read, heal);
        assert_eq!(read.expect("it is read in the end").concat(), vec![9; BLOCK_SIZE]);
        // For ever is too long.
        running.node.link.reads_cut.set(true);
        let since = Instant::now();
        let read = target.read(7 * BLOCK_BYTES, BLOCK_SIZE).await;
        assert!(matches!(read, Err(TargetError::Io(_))), "{read:?}");
        let waited = since.elapsed();
        let patience = HeadConfig::default().io_timeout;
        assert!(waited >= patience && waited < patience + Duration::from_secs(5), "{waited:?}");
        running.node.heal();
    });
}

#[test]
fn a_write_behind_a_stale_move_that_does_not_fit_the_segment_goes_to_the_next() {
    with_head(async |_, running| {
        let target = HeadTarget(running.head.clone());
        let large = Bytes::from(vec![3; 8 * BLOCK_SIZE]);
        for n in 0..40 {
            for lba in 0..n % 3 {
                write(running, lba, 1).await;
            }
            let nowhere = BlockAddr { segment: SegmentId(1 << 30), block: 0 };
            let stale = Entry::Move { lba: 200, blocks: 1, from: nowhere, to: nowhere };
            let generation = running.head.state.borrow().generation + 1;
            running.head.enqueue(Op {
                entries: vec![stale],
                payload: Vec::new(),
                crcs: Vec::new(),
                class: SlotClass::Gc,
                generation,
                done: None,
            });
            let written = target.write(100 * BLOCK_BYTES, large.clone()).await;
            assert_eq!(written, Ok(()), "write {n}");
        }
    });
}

/// Hands an operation of garbage collection to the log; the receiver tells when it is durable.
fn log_for_gc(
    running: &Running,
    entries: Vec<Entry>,
) -> oneshot::Receiver<Result<(), TargetError>> {
    let (done, durable) = oneshot::channel();
    let generation = running.head.state.borrow().generation;
    running.head.enqueue(Op {
        entries,
        payload: Vec::new(),
        crcs: Vec::new(),
        class: SlotClass::Gc,
        generation,
        done: Some(done),
    });
    durable
}

/// Ends the head as a process ends, and takes the volume over on another node.
async fn take_over_again(world: &World, running: &Running) -> Rc<Running> {
    running.head.abandon("the process ends");
    world.stop_devices(false);
    world.open_disks().await;
    world.take_over(&world.node()).await.expect("nothing is wrong")
}

async fn read(running: &Running, lba: u64) -> Vec<u8> {
    let target = HeadTarget(running.head.clone());
    target.read(lba * BLOCK_BYTES, BLOCK_SIZE).await.expect("it is read").concat()
}

#[test]
fn a_data_segment_whose_last_record_is_referred_to_in_part_stays_whole() {
    with_head(async |world, running| {
        let data = AlignedBuf::copy_of(&[5; 3 * BLOCK_SIZE]).freeze();
        let crcs = raw_crcs(&data).collect();
        let scheme = config().scheme;
        let payload = Payload { scheme, runs: vec![(0, 3)], data: vec![data], crcs };
        let written =
            running.head.write_dense(Rc::new(payload), SlotClass::Gc, Stream::Moved).await;
        let (placed, mut entries, _) = written.unwrap_or_else(|error| panic!("{error}"));
        // The other two were overwritten meanwhile.
        entries.push(Entry::Place { lba: 0, blocks: 1, addr: placed[0].2 });
        let durable = log_for_gc(running, entries).await.expect("it is answered");
        assert_eq!(durable, Ok(()));
        let running = take_over_again(world, running).await;
        assert_eq!(read(&running, 0).await, vec![5; BLOCK_SIZE]);
        assert_eq!(running.head.reduced().0, 0, "no shard is missing");
    });
}

#[test]
fn a_move_that_the_head_did_not_apply_is_not_replayed_onto_a_segment_that_is_gone() {
    with_head(async |world, running| {
        write(running, 0, 7).await;
        // It is in the index now, and not among what the log says is newer.
        running.head.checkpoint().await.expect("nothing is wrong");
        let found = running.head.resolve(0, 1).await.unwrap_or_else(|error| panic!("{error}"));
        let Target::Data(from) = found[0].target else { panic!("it was written") };
        // It held nothing but what was moved there, so it was freed.
        let to = BlockAddr { segment: SegmentId(1 << 30), block: 0 };
        let durable = log_for_gc(running, vec![Entry::Move { lba: 0, blocks: 1, from, to }]);
        while running.head.state.borrow().flights.is_empty() {
            tokio::task::yield_now().await;
        }
        // A checkpoint changes the index before the record is durable.
        running.head.state.borrow_mut().generation += 1;
        assert_eq!(durable.await.expect("it is answered"), Ok(()));
        assert_eq!(read(running, 0).await, vec![7; BLOCK_SIZE]);
        let running = take_over_again(world, running).await;
        assert_eq!(read(&running, 0).await, vec![7; BLOCK_SIZE]);
    });
}

#[test]
fn a_mirror_refused_by_a_later_epoch_tells_it() {
    with_head(async |world, running| {
        let root = running.head.state.borrow().root.clone();
        let own = running.head.authority;
        let later = Authority { epoch: own.epoch.next(), head: HeadId::default(), ..own };
        let members: BTreeSet<_> = root.set.members().iter().map(|member| member.disk).collect();
        assert_eq!(mirror(&running.head.disks, own, &root).await, Ok(members));
        let client = running.head.disks.client(world.ids[1]).expect("it is up");
        client.fence(later, None).await.expect("nothing is wrong");
        assert_eq!(mirror(&running.head.disks, own, &root).await, Err(later.epoch));
    });
}

#[test]
fn a_volume_is_released_though_a_disk_fails_under_its_last_checkpoint() {
    for index in 0..config().disks {
        with_head(async |world, running| {
            for lba in 0..20 {
                write(running, lba, 8).await;
            }
            world.devices.borrow()[index].fail_writes(0..config().disk_bytes);
            let released = timeout(Duration::from_mins(1), running.head.release()).await;
            let released = released.expect("in time");
            assert!(released.is_ok(), "disk {index}: {:?}", released.err().map(|e| e.to_string()));
            assert!(stored_root(world).await.released, "disk {index}");
            world.devices.borrow()[index].end_faults();
            let running = take_over_again(world, running).await;
            for lba in 0..20 {
                assert_eq!(read(&running, lba).await, vec![8; BLOCK_SIZE], "disk {index}");
            }
        });
    }
}

#[test]
fn a_checkpoint_whose_caller_is_gone_loses_nothing() {
    with_head(async |world, running| {
        write(running, 13, 1).await;
        running.head.checkpoint().await.expect("nothing is wrong");
        write(running, 13, 2).await;
        // It has begun, and waits for its disks.
        let mut begun = Box::pin(running.head.checkpoint());
        timeout(Duration::from_micros(20), &mut begun).await.expect_err("it takes longer");
        drop(begun);
        assert_eq!(read(running, 13).await[0], 2);
        running.head.release().await.expect("nothing is wrong");
        let next = take_over_again(world, running).await;
        assert_eq!(read(&next, 13).await[0], 2, "what was acknowledged is there");
    });
}
