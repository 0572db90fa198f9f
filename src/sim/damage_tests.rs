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
use crate::segment::record::Header;
use crate::volume::target::HeadTarget;

/// Longer than a take-over takes that does not wait for ever.
const LONG: Duration = Duration::from_mins(1);
/// Records that clients were told are durable.
const RECORDS: u8 = 10;
/// The one that is damaged.
const DAMAGED: u8 = 5;

/// Flips a bit in the block before or of the payload of the damaged record, wherever it lies on a
/// device.
fn damage(world: &World, index: usize, header: bool) {
    let device = world.devices.borrow()[index].clone();
    let mut last = false;
    for at in (0..world.config.disk_bytes).step_by(BLOCK_SIZE) {
        let block = device.peek(at, BLOCK_SIZE);
        if last && block.iter().all(|byte| *byte == DAMAGED) {
            device.flip_bit(if header { at - BLOCK_BYTES + 20 } else { at + 100 }, 3);
            return;
        }
        last = Header::decode(&block).is_ok();
    }
    panic!("the record is not there");
}

/// Writes records, loses one of two disks for good, damages a record on the other, and compares
/// what a take-over then serves with what was acknowledged.
async fn lose_and_damage(world: Rc<World>, header: bool) {
    let running = serve(&world).await;
    let target = HeadTarget(running.head.clone());
    for byte in 1..=RECORDS {
        let data = Bytes::from(vec![byte; BLOCK_SIZE]);
        target.write(u64::from(byte) * BLOCK_BYTES, data).await.expect("written");
    }
    running.head.abandon("the process ends");
    world.stop_devices(false);
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
