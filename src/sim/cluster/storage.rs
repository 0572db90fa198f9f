//! Faults of the metadata store and of disks.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::sleep;

use super::context::Context;
use super::nemesis::{a_while, victim};
use crate::disk::Geometry;
use crate::id::BLOCK_BYTES;
use crate::meta::members::{MANAGER_KEY, alive_key};
use crate::sim::device::SimDevice;

/// Something happens to the ways to the store.
pub(super) fn strike_store(context: &Rc<Context>) {
    let members = context.members();
    let hosts = if context.env.chance(1, 4) {
        members.iter().map(|index| context.host(*index)).collect()
    } else {
        vec![context.host(members[context.pick(members.len())])]
    };
    let (kind, chance) = (context.env.random_below(9), 200 + context.env.random_below(800));
    let what = match kind {
        0..=2 => "the store is away",
        3 => "changes of the store are made, their outcome unknown",
        4 => "changes of the store are not made, their outcome unknown",
        5 => "changes of the store are made late, their outcome unknown",
        6 => "the store is slow",
        7 => "watches are lost",
        _ => "leases are lost",
    };
    context.cover_noted(what);
    for host in &hosts {
        context.note(&host.name);
        match kind {
            0..=2 => host.store.set_unavailable(true),
            3 => host.store.unknown_applied.set(chance),
            4 => host.store.unknown_lost.set(chance),
            5 => {
                host.store.unknown_late.set(chance);
                host.store.late.set(Duration::from_millis(1 + context.env.random_below(1500)));
            }
            6 => {
                let most = Duration::from_millis(1 + context.env.random_below(1500));
                host.store.delay.set((Duration::ZERO, most));
            }
            7 => host.store.lose_watches(),
            _ => context.town.store.end_lease_of(&alive_key(&host.name)),
        }
    }
    if kind == 8 && context.env.chance(1, 2) {
        context.town.store.end_lease_of(MANAGER_KEY);
    }
    let task = context.clone();
    context.spawn(async move {
        sleep(a_while(&task)).await;
        for host in &hosts {
            host.store.heal();
        }
    });
}

/// Something happens to a disk.
pub(super) fn strike_disk(context: &Rc<Context>) {
    if context.env.chance(1, 3) {
        return hurt(context);
    }
    let Some(busy) = victim(context) else { return };
    let devices = busy.host().devices.all();
    let Some(device) = devices.get(context.pick(devices.len())).cloned() else { return };
    let what = match context.env.random_below(6) {
        0..=1 => {
            device.set_slow(2 + u32::try_from(context.pick(200)).unwrap_or(0));
            "a disk is slow"
        }
        2 => {
            device.hang();
            "a disk hangs"
        }
        3 => {
            device.vanish();
            "a disk vanishes"
        }
        4 => {
            device.fail_writes(0..u64::MAX);
            "writes to a disk fail"
        }
        _ => {
            let from = context.env.random_below(context.town.config.disk_bytes);
            device.fail_reads(from..from + 64 * BLOCK_BYTES);
            "reads of a disk fail"
        }
    };
    context.cover_noted(what);
    context.note(&busy.host().name);
    let task = context.clone();
    context.spawn(async move {
        sleep(a_while(&task)).await;
        device.end_faults();
        drop(busy);
    });
}

/// Hurts the content of a disk, if the budget has room: see [`super::nemesis`].
fn hurt(context: &Rc<Context>) {
    if context.ailing().is_some() || !context.busy.borrow().is_empty() {
        return;
    }
    let members = context.members();
    let any = members[context.pick(members.len())];
    let index = context.hurt.get().unwrap_or(any);
    if !members.contains(&index) {
        return;
    }
    let host = context.host(index);
    let paths = host.devices.paths();
    let Some(path) = paths.get(context.pick(paths.len())).cloned() else { return };
    let Some(device) = host.devices.0.borrow().get(&path).cloned() else { return };
    context.hurt.set(Some(index));
    // One that is the last of its node may not go where the pools need all nodes.
    let domains = members.iter().filter(|index| !context.host(**index).devices.paths().is_empty());
    let left = domains.count() - context.drained.borrow().len() - usize::from(paths.len() == 1);
    let widest = context.volumes().iter().map(|v| v.scheme.width()).max().unwrap_or(0);
    let known = host.node().map(|node| node.own_disks()).unwrap_or_default();
    let id = known.iter().find(|(at, _)| *at == path).map(|(_, id)| *id);
    if let Some(id) = id
        && left >= widest
        && context.lost.borrow().is_empty()
        && context.env.chance(1, 2)
    {
        context.cover_noted("a disk is lost for good");
        context.note(&path);
        host.devices.0.borrow_mut().remove(&path);
        device.vanish();
        context.lost.borrow_mut().insert(id);
        return;
    }
    context.cover_noted("bits flip");
    context.note(&path);
    rot(context, &device);
}

/// Flips some bits in the slots of a disk.
fn rot(context: &Context, device: &SimDevice) {
    let config = &context.town.config;
    let Some(slot_bytes) = config.slot_bytes else { return };
    let Ok(geometry) = Geometry::plan_with(config.disk_bytes, Some(slot_bytes), Some(16)) else {
        return;
    };
    for _ in 0..=context.env.random_below(40) {
        let slot = context.env.random_below(u64::from(geometry.slots / 3));
        let at = geometry.data + slot * slot_bytes + context.env.random_below(slot_bytes);
        device.flip_bit(at, context.env.random_u64().to_le_bytes()[0]);
    }
}
