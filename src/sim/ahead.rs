//! Lives that end between the members of an append: one disk has the last records, the others do
//! not yet, because their data (not their tables) lags behind.
//!
//! Then that disk may be away while the volume is taken over and goes on without it, and come back
//! for the life after that, with records that nobody has heard of since.

use std::time::Duration;

use tokio::time::sleep;

use super::device::InFlight;
use super::run::Context;
use crate::shard::{SegmentKind, ShardInfo, ShardState};

/// A disk with the end of the log on it that may be struck.
fn choose(context: &Context) -> Option<usize> {
    let world = &context.world;
    let mut struck = context.faulty.borrow().clone();
    struck.extend(context.hurt.borrow().iter().copied());
    let candidates: Vec<usize> = (0..world.config.disks)
        .filter(|index| {
            let more = usize::from(!struck.contains(index));
            struck.len() + more <= usize::from(world.config.scheme.parity)
        })
        .filter(|&index| {
            let held = world.disk(index).and_then(|disk| disk.list(world.volume.id).ok());
            let open = |info: &ShardInfo| {
                info.spec.kind == SegmentKind::Log && info.state == ShardState::Open
            };
            held.is_some_and(|held| held.shards.iter().any(open))
        })
        .collect();
    let draw = context.env.random_below(candidates.len().max(1) as u64);
    candidates.get(usize::try_from(draw).expect("a few disks")).copied()
}

/// Lets a disk get ahead: the others take longer for a moment, and what they are at when
/// the devices stop is lost.
pub(super) async fn get_ahead(context: &Context) -> Option<usize> {
    let env = &context.env;
    let index = choose(context)?;
    let devices = context.world.devices.borrow().clone();
    for (other, device) in devices.iter().enumerate() {
        let in_flight = if other == index { InFlight::Completed } else { InFlight::Lost };
        device.end_with(in_flight);
        if other != index {
            let time = Duration::from_millis(50 + env.random_below(1000));
            device.set_lag(Some((context.world.config.disk_bytes / 4, time)));
        }
    }
    // Mostly between two members of one append, sometimes after others were tried in vain.
    let most = if env.chance(1, 2) { 500 } else { 30 };
    sleep(Duration::from_millis(1 + env.random_below(most))).await;
    context.cover_noted("a disk is ahead of the others in the end");
    Some(index)
}

/// After the devices stopped: brings back the disk that was left behind a life ago, and may leave
/// this one.
pub(super) fn leave_behind(context: &Context, ahead: Option<usize>) {
    let env = &context.env;
    let devices = context.world.devices.borrow();
    if let Some(back) = context.behind.take() {
        // It may have been struck by something else in the life before it was left behind.
        devices[back].end_faults();
        context.faulty.borrow_mut().remove(&back);
        context.cover_noted("a disk that was left behind comes back");
    }
    let Some(index) = ahead else { return };
    devices.iter().for_each(|device| device.set_lag(None));
    if env.chance(3, 4) {
        devices[index].vanish();
        context.struck(index);
        context.behind.set(Some(index));
        context.cover_noted("the disk that was ahead is left behind");
    }
}
