//! One step beyond what the redundancy survives: content is hurt on all disks that are left. Then a
//! take-over may wait or fail and a read may fail, but nothing acknowledged is lost in silence.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::width_tests::{config, in_world, plain_node, serve};
use super::world::World;
use crate::export::BlockTarget;
use crate::id::{BLOCK_BYTES, BLOCK_SIZE};
use crate::segment::record::{Header, RecordError};
use crate::volume::takeover::TakeOverError;
use crate::volume::target::HeadTarget;

/// Longer than a take-over takes that does not wait for ever.
const LONG: Duration = Duration::from_mins(1);
/// Records that clients were told are durable: all lie in one segment, so that only what lies behind
/// a damaged record tells that the log goes on.
const RECORDS: u8 = 6;
/// The one that is damaged.
const DAMAGED: u8 = 3;

/// Where the payload of the record to be damaged lies on a device, wherever that is, in bytes; its
/// header is the block before.
fn find(world: &World, index: usize) -> u64 {
    let device = world.devices.borrow()[index].clone();
    let mut last = false;
    for at in (0..world.config.disk_bytes).step_by(BLOCK_SIZE) {
        let block = device.peek(at, BLOCK_SIZE);
        if last && block.iter().all(|byte| *byte == DAMAGED) {
            return at;
        }
        last = Header::decode(&block).is_ok();
    }
    panic!("the record is not there");
}

/// Flips a bit in the header or the payload of the record.
fn damage(world: &World, index: usize, header: bool) {
    let at = find(world, index);
    let device = world.devices.borrow()[index].clone();
    device.flip_bit(if header { at - BLOCK_BYTES + 20 } else { at + 100 }, 3);
}

/// Changes the bytes at `at` of a device.
fn patch(world: &World, index: usize, at: u64, bytes: &[u8]) {
    let device = world.devices.borrow()[index].clone();
    let old = device.peek(at, bytes.len());
    for (offset, (old, new)) in (at..).zip(old.iter().zip(bytes)) {
        let differing = (0..8).filter(|bit| (old ^ new) >> bit & 1 == 1);
        differing.for_each(|bit| device.flip_bit(offset, bit));
    }
}

/// Makes the record one of the next version, as a newer sds would have written it.
fn modernise(world: &World, index: usize) {
    let at = find(world, index) - BLOCK_BYTES;
    let mut block = world.devices.borrow()[index].peek(at, BLOCK_SIZE);
    block[8] += 1;
    block[4..8].fill(0);
    let crc = crc32fast::hash(&block).to_le_bytes();
    block[4..8].copy_from_slice(&crc);
    assert!(matches!(Header::decode(&block), Err(RecordError::Version(_))), "it says so");
    patch(world, index, at, &block);
}

/// Writes the records, each of one block; then the process ends.
async fn write_records(world: &World) {
    let running = serve(world).await;
    let target = HeadTarget(running.head.clone());
    for byte in 1..=RECORDS {
        let data = Bytes::from(vec![byte; BLOCK_SIZE]);
        target.write(u64::from(byte) * BLOCK_BYTES, data).await.expect("written");
    }
    running.head.abandon("the process ends");
    world.stop_devices(false);
}

/// Writes records, loses one of two disks for good, damages a record on the other, and compares
/// what a take-over then serves with what was acknowledged.
async fn lose_and_damage(world: Rc<World>, header: bool) {
    write_records(&world).await;
    world.devices.borrow()[0].vanish();
    damage(&world, 1, header);
    world.open_disks().await;
    let node = plain_node(&world);
    // It may find the damage, or wait for the disk that is away.
    let Ok(Ok(running)) = timeout(LONG, world.take_over(&node)).await else { return };
    let target = HeadTarget(running.head.clone());
    for byte in 1..=RECORDS {
        let read = target.read(u64::from(byte) * BLOCK_BYTES, BLOCK_SIZE);
        if let Ok(Ok(pieces)) = timeout(LONG, read).await {
            let data = pieces.concat();
            assert!(data.iter().all(|b| *b == byte), "acknowledged record {byte} is lost");
        }
    }
}

#[test]
fn records_beyond_one_with_a_damaged_payload_are_not_lost_in_silence() {
    in_world(config(2, 2, 2), |world| lose_and_damage(world, false));
}

#[test]
fn records_beyond_one_with_a_damaged_header_are_not_lost_in_silence() {
    in_world(config(2, 2, 2), |world| lose_and_damage(world, true));
}

#[test]
fn a_log_that_goes_on_with_a_newer_version_is_refused() {
    in_world(config(2, 2, 2), |world| async move {
        write_records(&world).await;
        (0..2).for_each(|index| modernise(&world, index));
        world.open_disks().await;
        let refused = timeout(LONG, world.take_over(&plain_node(&world))).await;
        let Err(error) = refused.expect("in time") else { panic!("it serves a part of the log") };
        assert!(matches!(error, TakeOverError::Newer { .. }), "{error}");
    });
}
