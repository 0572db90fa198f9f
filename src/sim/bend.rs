//! Disks go for good from a pool that has no others, and come: data segments must follow.
//!
//! In the end of a run everything was seen to be whole. Then as many disks as the redundancy survives go for
//! good, where that leaves `m + 1`. The pool has fewer domains than it asks for, and health means: nothing lacks
//! a shard, and each set of `m` more disks could go. `m` more do, for a while: everything must be
//! readable, and can be written. When they are back and disks were added, all must be as wide as it was.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::sleep;

use super::ends::{overwrite, read_all};
use super::nemesis::{reopen, vanish};
use super::run::{Context, NEVER};
use super::world::{Running, WorldConfig};
use crate::id::DiskId;

/// How long segments may take to be moved, in looks.
const LOOKS: u32 = 400;
const LOOK: Duration = Duration::from_millis(250);

/// Whether disks go for good from such a world though no others can take their place.
pub(super) fn bends(config: &WorldConfig) -> bool {
    config.spares > 0 && config.scheme.data > 1 && config.head.narrow_after != NEVER
}

/// The disks that are there, by index.
pub(super) fn present(context: &Context) -> Vec<usize> {
    let retired = context.world.retired.borrow();
    (0..context.world.config.disks).filter(|index| !retired.contains(index)).collect()
}

/// Takes and gives disks while the heads of all volumes serve.
///
/// # Errors
/// What is not as it should be, in words.
pub(super) async fn spell(context: &Context, heads: &[Rc<Running>]) -> Result<(), String> {
    let scheme = context.world.config.scheme;
    let parity = usize::from(scheme.parity);
    let spare = present(context).len().saturating_sub(parity + 1).min(parity);
    if spare == 0 {
        context.cover("no disk can go for good in the end");
        return Ok(());
    }
    let gone = draw(context, spare);
    context.cover_noted("disks go for good in the end");
    for &index in &gone {
        go(context, heads, index);
    }
    until_whole(context, heads, &gone).await?;
    for &index in &gone {
        context.world.retired.borrow_mut().insert(index);
        context.world.disks.borrow_mut()[index] = None;
        for running in heads {
            running.head.disk_removed(context.world.ids[index]);
        }
    }
    let left: Vec<DiskId> =
        present(context).into_iter().map(|index| context.world.ids[index]).collect();
    if left.len() < scheme.width() {
        context.cover_noted("a pool has fewer domains than it asks for, and is healthy");
    }
    for running in heads {
        for set in subsets(&left, parity) {
            if !running.head.bears_loss_of(&set) {
                return Err(format!("with {left:?} left, data is lost with {set:?}"));
            }
        }
    }
    let away = draw(context, parity);
    for &index in &away {
        vanish(context, index);
    }
    context.note(&format!("disks {away:?} are away too"));
    for running in heads {
        read_all(context, running).await?;
    }
    if left.len() - parity >= usize::from(context.world.config.min_size) {
        overwrite(context, &heads[0]).await?;
    }
    for index in away {
        context.world.devices.borrow()[index].end_faults();
        reopen(context, index).await;
    }
    while let Some(index) = context.world.add_spare() {
        reopen(context, index).await;
        context.cover_noted("a disk is added");
    }
    until_whole(context, heads, &[]).await
}

/// Some of the disks that are there.
fn draw(context: &Context, count: usize) -> Vec<usize> {
    let mut there = present(context);
    let pick = |n: usize| usize::try_from(context.env.random_below(n as u64)).expect("a few disks");
    (0..count).map(|_| there.swap_remove(pick(there.len()))).collect()
}

/// A disk goes, and will not come back.
pub(super) fn go(context: &Context, heads: &[Rc<Running>], index: usize) {
    vanish(context, index);
    let id = context.world.ids[index];
    context.nodes.borrow().iter().for_each(|node| node.registry.forget(id));
    for running in heads {
        running.head.disk_lost(id);
    }
}

/// Whether data segments are as wide as so many domains carry, and no wider.
pub(super) fn fits(running: &Running, context: &Context, domains: usize) -> bool {
    let pool = context.world.config.scheme;
    let bending = running.head.bending();
    let wide = domains < pool.width() || bending.is_straight(pool);
    bending.domains == domains.min(pool.width()) && bending.to_narrow.0 == 0 && wide
}

async fn until_whole(
    context: &Context,
    heads: &[Rc<Running>],
    gone: &[usize],
) -> Result<(), String> {
    *context.world.waiting.borrow_mut() = "segments of another scheme".into();
    let domains = present(context).len() - gone.len();
    let whole = |running: &Rc<Running>| {
        let spared = gone.iter().all(|index| !running.head.uses_disk(context.world.ids[*index]));
        running.head.reduced().0 == 0 && spared && fits(running, context, domains)
    };
    for _ in 0..LOOKS {
        if heads.iter().all(whole) {
            return Ok(());
        }
        for running in heads {
            for index in gone {
                running.head.disk_lost(context.world.ids[*index]);
            }
        }
        sleep(LOOK).await;
    }
    let states: Vec<_> =
        heads.iter().map(|r| (r.head.reduced(), r.head.bending(), r.head.log_width())).collect();
    Err(format!("{domains} domains are left, {gone:?} gone, and this stays: {states:?}"))
}

/// All sets of `count` of these disks.
fn subsets(disks: &[DiskId], count: usize) -> Vec<BTreeSet<DiskId>> {
    let Some((first, others)) = disks.split_first().filter(|_| count > 0) else {
        return if count == 0 { vec![BTreeSet::new()] } else { Vec::new() };
    };
    let mut sets = subsets(others, count);
    sets.extend(subsets(others, count - 1).into_iter().map(|mut set| {
        set.insert(*first);
        set
    }));
    sets
}
