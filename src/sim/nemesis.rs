//! What strikes a simulated node while it works.
//!
//! At most `m` disks are hurt at a time, counted until repair has made their content whole again,
//! so that what strikes never exceeds what the redundancy must survive.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::sleep;

use super::rivals::restart_disks;
use super::run::Context;
use crate::disk::Geometry;

/// Strikes at random until the life ends.
pub(super) async fn run(context: Rc<Context>) {
    let env = context.env.clone();
    while !context.stop.get() {
        sleep(Duration::from_millis(20 + env.random_below(400))).await;
        if context.stop.get() {
            return;
        }
        match env.random_below(32) {
            0..=4 => store(&context),
            5..=11 => heal(&context).await,
            12 if context.faulty.borrow().is_empty() => restart_disks(&context, None).await,
            13 => go_beyond(&context).await,
            _ => strike(&context),
        }
    }
}

fn pick(context: &Context, n: usize) -> usize {
    usize::try_from(context.env.random_below(n as u64)).expect("small")
}

/// Faults between a node and the metadata store.
fn store(context: &Context) {
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

/// Disks that may still be struck.
fn victims(context: &Context) -> Option<usize> {
    let parity = usize::from(context.world.config.scheme.parity);
    let mut struck = context.faulty.borrow().clone();
    struck.extend(context.hurt.borrow().iter().copied());
    if struck.len() < parity {
        return Some(pick(context, context.world.config.disks));
    }
    let again: Vec<usize> = struck.into_iter().collect();
    (!again.is_empty()).then(|| again[pick(context, again.len())])
}

/// A random place where the device holds data; the tables lie in the first quarter.
fn place(context: &Context) -> u64 {
    let size = context.world.config.disk_bytes;
    size / 4 + context.env.random_below((size - size / 4) / 4096) * 4096
}

fn strike(context: &Context) {
    let Some(index) = victims(context) else { return };
    let what = if context.gentle || context.env.chance(1, 2) {
        stall(context, index)
    } else {
        hurt(context, index)
    };
    let reduced = context.heads.borrow().last().is_some_and(|r| r.head.reduced().0 > 0);
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
    context.faulty.borrow_mut().insert(index);
    what
}

fn vanish(context: &Context, index: usize) {
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
        if context.env.chance(1, 2) {
            context.world.devices.borrow()[index].hang();
        } else {
            vanish(context, index);
        }
        context.faulty.borrow_mut().insert(index);
        sleep(Duration::from_millis(context.env.random_below(50))).await;
    }
    sleep(Duration::from_millis(context.env.random_below(3000))).await;
    heal(context).await;
}

/// All faults of the disks end; disks that failed are opened again and their content repaired.
pub(super) async fn heal(context: &Context) {
    let faulty: Vec<usize> = context.faulty.borrow().iter().copied().collect();
    for &index in &faulty {
        let device = context.world.devices.borrow()[index].clone();
        device.heal();
        device.clear_errors();
        device.bring_back();
        device.set_slow(1);
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

async fn reopen(context: &Context, index: usize) {
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
    let heads = context.heads.borrow().clone();
    for running in heads {
        running.head.disk_returned(id).await;
    }
    context.cover_noted("disk returned");
}
