//! What strikes a simulated node while it works.
//!
//! At most `m` disks are hurt at a time, counted until repair has made their content whole again,
//! so that what strikes never exceeds what the redundancy must survive.

use std::time::Duration;

use tokio::time::sleep;

use super::run::Nemesis;

/// Strikes at random until the life ends.
pub(super) async fn run(nemesis: Nemesis) {
    let env = nemesis.env().clone();
    while !nemesis.stopped() {
        sleep(Duration::from_millis(20 + env.random_below(400))).await;
        if nemesis.stopped() {
            return;
        }
        match env.random_below(8) {
            0 => store(&nemesis),
            1..=2 => heal(&nemesis).await,
            _ => strike(&nemesis),
        }
    }
}

fn pick(nemesis: &Nemesis, n: usize) -> usize {
    usize::try_from(nemesis.env().random_below(n as u64)).expect("small")
}

/// Faults of the metadata store.
fn store(nemesis: &Nemesis) {
    let faults = &nemesis.world().faults;
    let env = nemesis.env();
    if env.chance(1, 2) {
        faults.heal();
        return;
    }
    match env.random_below(4) {
        0 => {
            nemesis.cover("store away");
            faults.unavailable.set(true);
        }
        1 => {
            nemesis.cover("store outcome unknown, applied");
            faults.unknown_applied.set(300);
        }
        2 => {
            nemesis.cover("store outcome unknown, lost");
            faults.unknown_lost.set(300);
        }
        _ => {
            nemesis.cover("store outcome unknown, late");
            faults.unknown_late.set(300);
            faults.late.set(Duration::from_millis(500));
        }
    }
}

/// Disks that may still be struck.
fn victims(nemesis: &Nemesis) -> Option<usize> {
    let parity = usize::from(nemesis.world().config.scheme.parity);
    let mut struck = nemesis.faulty().borrow().clone();
    struck.extend(nemesis.hurt().borrow().iter().copied());
    let count = nemesis.world().config.disks;
    if struck.len() < parity {
        return Some(pick(nemesis, count));
    }
    let again: Vec<usize> = struck.into_iter().collect();
    (!again.is_empty()).then(|| again[pick(nemesis, again.len())])
}

fn strike(nemesis: &Nemesis) {
    let Some(index) = victims(nemesis) else { return };
    let env = nemesis.env();
    let device = nemesis.world().devices.borrow()[index].clone();
    let size = nemesis.world().config.disk_bytes;
    // The tables lie in the first tenth; what hurts them is a matter of the disk's own tests.
    let data = size / 4..size;
    let place = data.start + env.random_below((data.end - data.start) / 4096) * 4096;
    let state = if nemesis.running().head.reduced().0 > 0 { "reduced" } else { "full" };
    let what = match env.random_below(9) {
        0 => {
            device.set_slow(20 + u32::try_from(env.random_below(200)).expect("small"));
            nemesis.faulty().borrow_mut().insert(index);
            "slow disk"
        }
        1 => {
            device.hang();
            nemesis.faulty().borrow_mut().insert(index);
            "hung disk"
        }
        2 => {
            device.fail_writes(place..size);
            nemesis.faulty().borrow_mut().insert(index);
            "write errors"
        }
        3 => {
            device.fail_reads(place..(place + (256 << 10)).min(size));
            nemesis.faulty().borrow_mut().insert(index);
            "read errors"
        }
        4 => {
            device.latent_error(place..place + 4096);
            nemesis.hurt().borrow_mut().insert(index);
            "latent sector error"
        }
        5 => {
            for _ in 0..20 {
                let at = data.start + env.random_below(data.end - data.start);
                device.flip_bit(at, u8::try_from(env.random_below(8)).expect("small"));
            }
            nemesis.hurt().borrow_mut().insert(index);
            "bit rot"
        }
        6 => {
            device.lose_next_writes(1);
            nemesis.hurt().borrow_mut().insert(index);
            "lost write"
        }
        7 => {
            device.misdirect_next_write(place);
            nemesis.hurt().borrow_mut().insert(index);
            "misdirected write"
        }
        _ => {
            device.vanish();
            nemesis.running().registry.remove(nemesis.world().ids[index]);
            nemesis.faulty().borrow_mut().insert(index);
            "disk vanishes"
        }
    };
    nemesis.cover(&format!("{what} while {state}"));
}

/// All faults of the disks end; disks that failed are opened again and their content repaired.
async fn heal(nemesis: &Nemesis) {
    let faulty: Vec<usize> = nemesis.faulty().borrow().iter().copied().collect();
    for index in faulty {
        let device = nemesis.world().devices.borrow()[index].clone();
        device.heal();
        device.clear_errors();
        device.bring_back();
        reopen(nemesis, index).await;
        nemesis.faulty().borrow_mut().remove(&index);
        nemesis.cover("healed");
    }
}

async fn reopen(nemesis: &Nemesis, index: usize) {
    let running = nemesis.running();
    let id = nemesis.world().ids[index];
    let registered = running.registry.client(id).is_some();
    let offline = running.disk(index).is_some_and(|disk| disk.offline_reason().is_some());
    if registered && !offline {
        return;
    }
    if let Some(disk) = running.disk(index) {
        disk.close("to be opened again").await;
    }
    running.registry.remove(id);
    let disk = nemesis.world().open_disk(index, &running.registry).await;
    running.set_disk(index, disk);
    running.head.disk_returned(id).await;
    nemesis.cover("disk returned");
}
