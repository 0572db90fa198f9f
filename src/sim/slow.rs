//! A disk becomes a hundred times slower in the middle of a load: clients must not feel it for long.
//!
//! Virtual time is exact, so the bound is asserted: from [`GRACE`] after the strike on, nine of ten
//! requests take at most twice as long as nine of ten did before, and a little. Where slots run short
//! nothing is asserted: the disks are tiny, and what waits for space waits for the slow disk too.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::oracle::{Outcome, SECTOR};
use super::run::Context;
use super::world::Running;
use crate::export::{BlockTarget, TargetError};
use crate::id::{BLOCK_SIZE, DiskId};
use crate::volume::target::HeadTarget;

/// By how much the disk becomes slower.
const FACTOR: u32 = 100;
/// How long the load runs before.
const BEFORE: Duration = Duration::from_secs(2);
/// How long clients may feel it.
const GRACE: Duration = Duration::from_secs(5);
/// How long the load runs then.
const AFTER: Duration = Duration::from_secs(3);
/// Clients at once.
const CLIENTS: usize = 3;
/// What chance may add, and a tick of the clock.
const SLACK: Duration = Duration::from_millis(20);
/// How long repair and the log set may take before the spell.
const CALM_TRIES: usize = 40;

/// When a request began, and how long it took.
type Sample = (Instant, Duration);

struct Load {
    samples: RefCell<Vec<Sample>>,
    slow: DiskId,
    stop: Cell<bool>,
    /// Slots were short on other disks than the slow one.
    short: Cell<bool>,
    /// Another disk did not answer, of a write that is stuck since an earlier fault, and without both
    /// too few are left.
    alone: Cell<bool>,
    /// The log set has no others left to take the place of the slow disk.
    narrow: Cell<bool>,
    failure: RefCell<Option<String>>,
}

/// Has the volume under load while one of its disks is slow.
///
/// # Errors
/// A request failed, gave wrong data, or requests still take too long.
pub(super) async fn spell(context: &Rc<Context>, running: &Rc<Running>) -> Result<(), String> {
    *context.world.waiting.borrow_mut() = "calm before a disk is slow".into();
    let Some(index) = victim(context, running).await else {
        context.cover("no slow disk: the others do not suffice");
        return Ok(());
    };
    let load = Rc::new(Load {
        samples: RefCell::default(),
        slow: context.world.ids[index],
        stop: Cell::new(false),
        short: Cell::new(false),
        alone: Cell::new(false),
        narrow: Cell::new(false),
        failure: RefCell::default(),
    });
    let clients: Vec<_> = (0..CLIENTS)
        .map(|_| tokio::task::spawn_local(client(context.clone(), running.clone(), load.clone())))
        .collect();
    *context.world.waiting.borrow_mut() = "a load on a slow disk".into();
    sleep(BEFORE).await;
    if !others_suffice(context, running, index) {
        // It was renewed meanwhile, without a disk that is slow already.
        load.narrow.set(true);
    }
    let struck = Instant::now();
    context.cover_noted("a disk a hundred times slower under load");
    context.world.devices.borrow()[index].set_slow(FACTOR);
    sleep(GRACE).await;
    let slow = running.node.registry.is_slow(context.world.ids[index]);
    sleep(AFTER).await;
    context.world.devices.borrow()[index].set_slow(1);
    load.stop.set(true);
    for client in clients {
        client.await.map_err(|error| error.to_string())?;
    }
    if let Some(why) = load.failure.take() {
        return Err(format!("while a disk was slow: {why}"));
    }
    context.cover(if slow { "the slow disk is known" } else { "the slow disk is not noticed" });
    if load.narrow.get() {
        context.cover("the log set became too small to go without the slow disk");
        return Ok(());
    }
    if load.short.get() {
        context.cover("slots were short while a disk was slow");
        return Ok(());
    }
    if load.alone.get() {
        context.cover("too few other disks while one was slow");
        return Ok(());
    }
    judge(context, &load.samples.borrow(), struck)
}

/// Notes whether slots run short for clients, or disks.
fn look_at_space(context: &Context, running: &Running, load: &Load) {
    let width = usize::from(context.world.config.scheme.parity) + 1;
    let headroom = running.node.registry.headroom(width, |disk| disk != load.slow);
    if headroom.is_none_or(|(free, slots)| free < slots / 4) {
        load.short.set(true);
    }
    let disks = &running.node.registry;
    let others = disks.ids().into_iter().filter(|&disk| disk != load.slow && disks.rank(disk) == 0);
    if others.count() < width {
        load.alone.set(true);
    }
}

fn judge(context: &Context, samples: &[Sample], struck: Instant) -> Result<(), String> {
    let before = quantile(samples, |(at, took)| *at + *took <= struck);
    let during = quantile(samples, |(at, _)| *at > struck && *at < struck + GRACE);
    let after = quantile(samples, |(at, _)| *at >= struck + GRACE);
    context.note(&format!("nine of ten requests took {before:?}, {during:?}, {after:?}"));
    let (Some(before), Some(after)) = (before, after) else {
        return Err(format!("a disk is slow: requests took {before:?} and then {after:?}"));
    };
    if after > before * 2 + SLACK {
        return Err(format!(
            "{GRACE:?} after a disk became slow, nine of ten requests take up to {after:?}, before \
             {before:?}"
        ));
    }
    Ok(())
}

/// What nine of ten of the requests that `counts` admits do not exceed.
fn quantile(samples: &[Sample], counts: impl Fn(&Sample) -> bool) -> Option<Duration> {
    let mut took: Vec<Duration> = samples.iter().filter(|s| counts(s)).map(|s| s.1).collect();
    took.sort_unstable();
    took.get(took.len() * 9 / 10).copied()
}

/// A disk without which the log has enough others, once nothing is being repaired.
async fn victim(context: &Context, running: &Running) -> Option<usize> {
    let head = &running.head;
    for _ in 0..CALM_TRIES {
        let (healthy, width, full) = head.log_width();
        let calm = head.reduced().0 == 0 && width == full && healthy >= usize::from(width);
        if calm && running.node.registry.watch().slow().is_empty() {
            break;
        }
        sleep(Duration::from_millis(250)).await;
    }
    let up = up(context, running);
    let known = !running.node.registry.watch().slow().is_empty();
    if up.is_empty() || known || head.reduced().0 > 0 {
        return None;
    }
    let pick = context.env.random_below(up.len() as u64);
    let index = up[usize::try_from(pick).expect("small")];
    others_suffice(context, running, index).then_some(index)
}

/// The disks that are there to be used.
fn up(context: &Context, running: &Running) -> Vec<usize> {
    let retired = context.world.retired.borrow();
    let all = 0..context.world.config.disks;
    all.filter(|index| {
        !retired.contains(index) && running.node.registry.rank(id(context, *index)) == 0
    })
    .collect()
}

/// Whether the log set has enough disks without this one.
fn others_suffice(context: &Context, running: &Running, index: usize) -> bool {
    let log: BTreeSet<DiskId> = running.head.log_disks().into_iter().collect();
    let up = up(context, running);
    let others = up.iter().filter(|i| **i != index && log.contains(&id(context, **i))).count();
    others > usize::from(context.world.config.scheme.parity)
}

fn id(context: &Context, index: usize) -> DiskId {
    context.world.ids[index]
}

async fn client(context: Rc<Context>, running: Rc<Running>, load: Rc<Load>) {
    let target = HeadTarget(running.head.clone());
    let env = &context.env;
    while !load.stop.get() {
        let blocks = context.world.volume.sectors() * SECTOR as u64 / BLOCK_SIZE as u64;
        let first = env.random_below(blocks) * (BLOCK_SIZE / SECTOR) as u64;
        let write = env.chance(1, 2);
        let started = Instant::now();
        let done = if write {
            write_block(&context, &target, first).await
        } else {
            read_block(&context, &target, first).await
        };
        load.samples.borrow_mut().push((started, started.elapsed()));
        if let Err(why) = done {
            load.failure.borrow_mut().get_or_insert(why);
            return;
        }
        look_at_space(&context, &running, &load);
        sleep(Duration::from_millis(env.random_below(25))).await;
    }
}

async fn write_block(context: &Context, target: &HeadTarget, first: u64) -> Result<(), String> {
    let count = (BLOCK_SIZE / SECTOR) as u64;
    let write = context.world.volume.oracle.borrow_mut().begin(first, count, false);
    let data = Bytes::from(write.content());
    let result = target.write(first * SECTOR as u64, data).await;
    let outcome = if result.is_ok() { Outcome::Acknowledged } else { Outcome::InDoubt };
    context.world.volume.oracle.borrow_mut().end(write, outcome);
    match result {
        // The volume may be as large as the disks have room for.
        Ok(()) | Err(TargetError::NoSpace) => Ok(()),
        Err(error) => Err(format!("a write failed: {error}")),
    }
}

async fn read_block(context: &Context, target: &HeadTarget, first: u64) -> Result<(), String> {
    let start = context.world.volume.oracle.borrow_mut().begin_read();
    let pieces = target
        .read(first * SECTOR as u64, BLOCK_SIZE)
        .await
        .map_err(|error| format!("sector {first} cannot be read: {error}"))?;
    let data: Vec<u8> = pieces.iter().flat_map(|p| p.iter().copied()).collect();
    context.world.volume.oracle.borrow_mut().end_read(start, first, &data)
}
