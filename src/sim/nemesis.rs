//! What strikes a simulated node while it works.
//!
//! At most `m` disks are hurt at a time, counted until repair has made their content whole again,
//! so that what strikes never exceeds what the redundancy must survive.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::rivals::{challenge, restart_disks};
use super::run::Context;
use super::world::Running;
use crate::disk::Geometry;

/// Strikes at random until the life ends.
pub(super) async fn run(context: Rc<Context>) {
    let env = context.env.clone();
    while !context.stop.get() {
        sleep(Duration::from_millis(20 + env.random_below(400))).await;
        if context.stop.get() || context.calm.get() {
            return;
        }
        context.note_rebuilt().await;
        if check_sets(&context) && env.chance(1, 2) {
            turn_round(&context).await;
            continue;
        }
        match env.random_below(40) {
            0..=4 => store(&context),
            5..=11 => heal(&context).await,
            12 if context.faulty.borrow().is_empty() => restart_disks(&context, None).await,
            13 => go_beyond(&context).await,
            14 => go_for_long(&context),
            15 => retire(&context).await,
            16 => give_up(&context),
            34..=36 => scrub(&context),
            37 => add_disk(&context).await,
            38.. => super::resize::resize(&context),
            _ => strike(&context),
        }
    }
}

/// The log sets of all heads that serve keep their rule at any time. Tells whether the log is wide
/// again after it was narrow.
fn check_sets(context: &Context) -> bool {
    for running in context.all_heads().iter().filter(|running| running.head.is_serving()) {
        if let Err(why) = running.head.check_log_set() {
            context.fail(why);
        }
    }
    let Some(running) = context.heads.borrow().last().cloned() else { return false };
    let (healthy, width, full) = running.head.log_width();
    if width < full {
        *context.narrow_disks.borrow_mut() = running.head.log_disks();
        context.cover(&format!("the log is {width} of {full} wide"));
    }
    if healthy < usize::from(width) {
        context.cover("fewer healthy domains than the log is wide");
    }
    width == full && !context.narrow_disks.borrow().is_empty()
}

/// The disks that the log had while it was narrow go away just after it became wide again, and
/// another head takes the volume.
async fn turn_round(context: &Rc<Context>) {
    let narrow = std::mem::take(&mut *context.narrow_disks.borrow_mut());
    let ids = &context.world.ids;
    let indices: Vec<usize> =
        (0..ids.len()).filter(|&index| narrow.contains(&ids[index])).collect();
    let mut struck = context.faulty.borrow().clone();
    struck.extend(context.hurt.borrow().iter().copied());
    struck.extend(&indices);
    let newest = context.heads.borrow().last().cloned();
    let Some(old) = newest else { return };
    if struck.len() > usize::from(context.world.config.scheme.parity) {
        return;
    }
    sleep(Duration::from_millis(context.env.random_below(100))).await;
    context.cover_noted("the disks of a narrow log go when it is wide again");
    // Cut off first, it cannot go on elsewhere and leave a trace of what is missing.
    old.node.link.control_cut.set(context.env.chance(2, 3));
    for index in indices {
        vanish(context, index);
        context.struck(index);
    }
    challenge(context, &old).await;
}

/// A disk is away for long: the log shrinks, or another disk takes its place.
fn go_for_long(context: &Context) {
    let Some(index) = victims(context) else { return };
    context.cover_noted("disk away for long");
    vanish(context, index);
    context.struck(index);
    context.long.borrow_mut().insert(index);
    if context.env.chance(1, 2) {
        tell_lost(context, index);
    }
}

fn tell_lost(context: &Context, index: usize) {
    let id = context.world.ids[index];
    context.all_heads().iter().for_each(|running| running.head.disk_lost(id));
}

/// Early in a life a disk goes for good, though the pool has no others.
pub(super) async fn go_for_good(context: Rc<Context>) {
    sleep(Duration::from_millis(context.env.random_below(500))).await;
    retire(&context).await;
}

/// A disk is added that was not there before.
async fn add_disk(context: &Context) {
    let config = &context.world.config;
    let fewer = super::bend::present(context).len() < config.scheme.width();
    let wanted = fewer || !super::bend::bends(config);
    if !wanted || context.env.chance(1, 2) {
        return;
    }
    if let Some(index) = context.world.add_spare() {
        context.cover_noted("a disk is added");
        context.disturbed();
        reopen(context, index).await;
    }
}

/// A disk goes for good where others can take its place, or data segments can bend: once nothing is
/// left that needs it, it counts no more.
async fn retire(context: &Context) {
    let config = &context.world.config;
    let left = super::bend::present(context).len();
    let bends = super::bend::bends(config) && left > usize::from(config.scheme.parity) + 1;
    let enough = left > config.scheme.width() || bends;
    let well = context.faulty.borrow().is_empty() && context.hurt.borrow().is_empty();
    let heads = context.newest_heads();
    let serving = heads.len() == context.world.volumes().count()
        && heads.iter().all(|running| running.head.is_serving());
    if !enough || !well || !serving {
        return;
    }
    let Some(index) = victims(context) else { return };
    context.cover_noted("disk is to go for good");
    super::bend::go(context, &heads, index);
    context.struck(index);
    context.long.borrow_mut().insert(index);
    let id = context.world.ids[index];
    for _ in 0..100 {
        tell_lost(context, index);
        let newest = context.newest_heads();
        let same = newest.iter().zip(&heads).all(|(newest, head)| Rc::ptr_eq(newest, head));
        if context.stop.get() || !same || !heads.iter().all(|r| r.head.is_serving()) {
            return;
        }
        let spared = |r: &Rc<Running>| !r.head.uses_disk(id) && r.head.reduced().0 == 0;
        if heads.iter().all(spared) {
            // The root that lists it no more must be the one that a take-over begins with.
            for running in &heads {
                if running.head.checkpoint().await.is_err() {
                    return;
                }
            }
            if heads.iter().any(|running| running.head.uses_disk(id)) {
                return;
            }
            context.world.retired.borrow_mut().insert(index);
            context.faulty.borrow_mut().remove(&index);
            context.long.borrow_mut().remove(&index);
            for running in &heads {
                running.head.disk_removed(id);
            }
            context.cover_noted("disk is gone for good");
            if left - 1 < config.scheme.width() {
                context.cover("a pool bends for good");
            }
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
}

fn pick(context: &Context, n: usize) -> usize {
    usize::try_from(context.env.random_below(n as u64)).expect("small")
}

/// Faults between a node and the metadata store.
fn store(context: &Context) {
    context.disturbed();
    let nodes = context.nodes.borrow().clone();
    let faults = &nodes[pick(context, nodes.len())].faults;
    let env = &context.env;
    if env.chance(1, 2) {
        faults.heal();
        return;
    }
    let chance = 200 + env.random_below(800);
    match env.random_below(4) {
        0 => {
            context.cover_noted("store away");
            faults.unavailable.set(true);
        }
        1 => {
            context.cover_noted("store outcome unknown, applied");
            faults.unknown_applied.set(chance);
        }
        2 => {
            context.cover_noted("store outcome unknown, lost");
            faults.unknown_lost.set(chance);
        }
        _ => {
            context.cover_noted("store outcome unknown, late");
            faults.unknown_late.set(chance);
            faults.late.set(Duration::from_millis(500));
        }
    }
}

/// Somebody asks for a checkpoint and does not wait for its end.
fn give_up(context: &Context) {
    let Some(running) = context.heads.borrow().last().cloned() else { return };
    context.cover_noted("who asked for a checkpoint goes away");
    let patience = Duration::from_micros(context.env.random_below(20_000));
    // Neither its end nor its failure concerns anybody.
    tokio::task::spawn_local(
        async move { drop(timeout(patience, running.head.checkpoint()).await) },
    );
}

/// Not a fault, but it runs while they strike.
fn scrub(context: &Context) {
    let newest = context.heads.borrow().last().cloned();
    if newest.is_some_and(|running| running.head.start_scrub()) {
        context.cover_noted("a scrub begins");
    }
}

/// Disks that may still be struck.
fn victims(context: &Context) -> Option<usize> {
    let parity = usize::from(context.world.config.scheme.parity);
    let mut struck = context.faulty.borrow().clone();
    struck.extend(context.hurt.borrow().iter().copied());
    let retired = context.world.retired.borrow();
    if struck.len() < parity {
        let index = pick(context, context.world.config.disks);
        return (!retired.contains(&index)).then_some(index);
    }
    let again: Vec<usize> = struck.into_iter().collect();
    (!again.is_empty()).then(|| again[pick(context, again.len())])
}

/// A random place where the device holds data; the tables lie in the first quarter.
fn place(context: &Context) -> u64 {
    let size = context.world.config.disk_bytes;
    size / 4 + context.env.random_below((size - size / 4) / 4096) * 4096
}

/// Content is not hurt while a rival takes over: of the last record it may have found a single copy,
/// which it makes whole on other disks in the end only (docs/simulation.md, known open). Nor is it
/// while some segment survives no further loss: that would be beyond its redundancy.
fn strike(context: &Context) {
    let Some(index) = victims(context) else { return };
    let heads = context.heads.borrow().clone();
    let bare = |running: &Rc<Running>| running.head.reduced().1 == Some(0);
    let gentle = context.gentle || context.taking_over.get() > 0 || heads.last().is_some_and(bare);
    let what = if gentle || context.env.chance(1, 2) {
        stall(context, index)
    } else {
        hurt(context, index)
    };
    let reduced = heads.last().is_some_and(|r| r.head.reduced().0 > 0);
    let state = if reduced { "reduced" } else { "full" };
    context.cover_noted(&format!("{what} while {state}"));
}

/// Faults that leave the content alone.
fn stall(context: &Context, index: usize) -> &'static str {
    let (env, size) = (&context.env, context.world.config.disk_bytes);
    let device = context.world.devices.borrow()[index].clone();
    let place = place(context);
    let what = match env.random_below(6) {
        0 => {
            device.set_slow(20 + u32::try_from(env.random_below(200)).expect("small"));
            "slow disk"
        }
        1 => {
            device.hang();
            "hung disk"
        }
        2 => {
            device.fail_writes(place..size);
            "write errors"
        }
        3 => {
            device.fail_reads(place..(place + (256 << 10)).min(size));
            "read errors"
        }
        4 => {
            device.delay_next_write(size / 4, Duration::from_millis(200 + env.random_below(4000)));
            return "stuck write";
        }
        _ => {
            vanish(context, index);
            "disk vanishes"
        }
    };
    context.struck(index);
    what
}

pub(super) fn vanish(context: &Context, index: usize) {
    context.world.devices.borrow()[index].vanish();
    for node in context.nodes.borrow().iter() {
        node.registry.remove(context.world.ids[index]);
    }
}

/// Faults that hurt the content: the disk counts as struck to the end of the run.
fn hurt(context: &Context, index: usize) -> &'static str {
    let (env, size) = (&context.env, context.world.config.disk_bytes);
    let device = context.world.devices.borrow()[index].clone();
    let place = place(context);
    context.hurt.borrow_mut().insert(index);
    context.disturbed();
    match env.random_below(6) {
        0 => {
            device.latent_error(place..place + 4096);
            "latent sector error"
        }
        1 => {
            for _ in 0..20 {
                let at = size / 4 + env.random_below(size - size / 4);
                device.flip_bit(at, u8::try_from(env.random_below(8)).expect("small"));
            }
            "bit rot"
        }
        2 => {
            device.lose_next_writes(1);
            "lost write"
        }
        3 => {
            device.misdirect_next_write(place);
            "misdirected write"
        }
        n => {
            let Some(disk) = context.world.disk(index) else { return "nothing" };
            let at = table_page(context, disk.geometry(), u32::try_from(index % 2).expect("bit"));
            if n == 4 {
                device.latent_error(at..at + 4096);
                return "latent sector error in a table";
            }
            device.flip_bit(at + env.random_below(4096), 3);
            "bit rot in a table"
        }
    }
}

/// A page of the tables: always of the same copy, so that the other one survives.
fn table_page(context: &Context, geometry: &Geometry, copy: u32) -> u64 {
    let page = |pages: u32| u32::try_from(context.env.random_below(pages.into())).expect("a page");
    match context.env.random_below(3) {
        0 => geometry.volume_page_offset(page(geometry.volumes_max), copy),
        1 => geometry.slot_page_offset(page(geometry.slot_pages()), copy),
        _ => {
            let pages = geometry.slots * geometry.checksum_pages_per_slot();
            geometry.checksum_page_offset(u64::from(page(pages)))
        }
    }
}

/// One step beyond what the redundancy survives, with disks that come back as they were: waiting
/// and errors are the only answers.
async fn go_beyond(context: &Context) {
    if !context.faulty.borrow().is_empty() || !context.hurt.borrow().is_empty() {
        return;
    }
    context.cover_noted("more disks away than the redundancy survives");
    let (count, parity) = (context.world.config.disks, context.world.config.scheme.parity);
    let away = usize::from(parity) + 1 + pick(context, count - usize::from(parity));
    let first = pick(context, count);
    for index in (first..first + away).map(|index| index % count) {
        if context.world.retired.borrow().contains(&index) {
            continue;
        }
        if context.env.chance(1, 2) {
            context.world.devices.borrow()[index].hang();
        } else {
            vanish(context, index);
        }
        context.struck(index);
        sleep(Duration::from_millis(context.env.random_below(50))).await;
    }
    sleep(Duration::from_millis(context.env.random_below(3000))).await;
    heal(context).await;
}

/// All faults of the disks end; disks that failed are opened again and their content repaired.
pub(super) async fn heal(context: &Context) {
    if context.env.chance(1, 6) {
        context.long.borrow_mut().clear();
    }
    let faulty: Vec<usize> =
        (&*context.faulty.borrow() - &*context.long.borrow()).into_iter().collect();
    for &index in &faulty {
        let device = context.world.devices.borrow()[index].clone();
        device.end_faults();
    }
    for index in faulty {
        reopen(context, index).await;
        context.faulty.borrow_mut().remove(&index);
        if context.behind.get() == Some(index) {
            context.behind.set(None);
        }
        context.cover_noted("healed");
    }
}

/// Opens a disk again unless it is open and registered with all nodes, and tells the heads.
pub(super) async fn reopen(context: &Context, index: usize) {
    let id = context.world.ids[index];
    let nodes = context.nodes.borrow().clone();
    let registered = nodes.iter().all(|node| node.registry.client(id).is_some());
    let open = context.world.disk(index).filter(|disk| disk.offline_reason().is_none());
    if registered && open.is_some() {
        return;
    }
    context.world.ensure_open(index).await;
    for node in context.nodes.borrow().iter() {
        node.registry.remove(id);
        context.world.connect(node, index);
    }
    for running in context.all_heads() {
        running.head.disk_returned(id).await;
    }
    context.cover_noted("disk returned");
}
