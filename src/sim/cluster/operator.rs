//! What an operator does to the simulated cluster: restarts all nodes one after the other, adds nodes,
//! drains some, takes some out.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::clients;
use super::context::{Context, Tested};
use super::host::Host;
use super::nemesis::{Busy, millis};
use crate::admin::backend::{Command, Reply};
use crate::admin::types::CreateVolume;
use crate::id::{BLOCK_BYTES, DiskId};

/// How long a node may take to answer an order.
const PATIENCE: Duration = Duration::from_mins(1);
/// How long an operator waits for a node to be empty before he takes it back.
const EMPTY_PATIENCE: Duration = Duration::from_secs(40);
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(250);

/// Gives an order to a node.
///
/// # Errors
/// What the node said, or that it did not answer.
pub(super) async fn order<T: 'static>(
    host: &Host,
    make: impl FnOnce(Reply<T>) -> Command + 'static,
) -> Result<T, String> {
    let (reply, answer) = oneshot::channel();
    let ordered = host.run(move |node| async move { node.order(make(reply)).await });
    let answered = timeout(PATIENCE, async {
        ordered.await;
        answer.await
    });
    match answered.await {
        Ok(Ok(answer)) => answer.map_err(|error| error.to_string()),
        Ok(Err(_)) => Err("the node is gone".into()),
        Err(_) => Err("the node does not answer".into()),
    }
}

/// Has an operator do something, if none is at work.
pub(super) fn strike(context: &Rc<Context>) {
    if context.operator.replace(true) {
        return;
    }
    let task = context.clone();
    context.spawn(async move {
        let context = task;
        match context.env.random_below(7) {
            0 => rolling_restart(&context).await,
            1 => join(&context),
            2 => create(&context).await,
            _ => drain(&context).await,
        }
        context.operator.set(false);
    });
}

/// Waits until a node has started and sees all disks that are there, but not for ever.
async fn until_back(context: &Context, host: &Host) {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(10) {
        let all: usize = context.town.nodes().iter().map(|node| node.own_disks().len()).sum();
        if host.node().is_some_and(|node| node.disks_in_use().len() >= all) {
            return;
        }
        sleep(LOOK).await;
    }
}

async fn rolling_restart(context: &Rc<Context>) {
    context.cover_noted("all nodes are restarted one after the other");
    for index in context.members() {
        let Some(busy) = Busy::claim(context, index) else { continue };
        context.note(&busy.host().name);
        context.town.stop(&busy.host()).await;
        sleep(millis(context, 1000)).await;
        context.town.start(&busy.host());
        until_back(context, &busy.host()).await;
    }
}

/// A machine is added that was not part of the cluster.
fn join(context: &Rc<Context>) {
    let spare = context.spares.borrow_mut().pop();
    let Some(index) = spare else { return };
    context.cover_noted("a node joins");
    context.absent.borrow_mut().remove(&index);
    context.town.start(&context.host(index));
}

/// A volume is created. If nobody says that it was, it may be there all the same, and nobody uses it.
async fn create(context: &Rc<Context>) {
    let volumes = context.volumes();
    let (Some(like), Some(host)) = (volumes.first(), other(context, usize::MAX)) else { return };
    let pool = like.name.split('/').next().unwrap_or_default();
    let name = format!("{pool}/new{}", context.pick(1000));
    let bytes = BLOCK_BYTES * (32 + context.env.random_below(64));
    let request = CreateVolume { name: name.clone(), size: bytes };
    let made = order(&host, |reply| Command::VolumeCreate { request, reply }).await;
    context.note(&format!("{name}: {:?}", made.as_ref().map(|made| made.id)));
    if let Ok(made) = made {
        context.cover("a volume is created while faults strike");
        let tested = Tested::new(made.id, name, like.scheme, bytes);
        context.volumes.borrow_mut().push(tested.clone());
        tokio::task::spawn_local(clients::run(context.clone(), tested, 0));
    }
}

/// Whether the others can take what a node holds.
fn spared(context: &Context, index: usize) -> bool {
    let drained = context.drained.borrow();
    let widest = context.volumes().iter().map(|v| v.scheme.width()).max().unwrap_or(0);
    let others = context.members().into_iter().filter(|other| {
        let host = context.host(*other);
        let serves = host.node().is_some_and(|node| !node.own_disks().is_empty());
        *other != index && !drained.contains(other) && serves
    });
    others.count() >= widest
}

/// A node other than this one to give orders to.
fn other(context: &Context, index: usize) -> Option<Rc<Host>> {
    let mut members = context.members();
    members.retain(|other| *other != index && context.host(*other).node().is_some());
    members.get(context.pick(members.len())).map(|other| context.host(*other))
}

/// Whether a node serves nothing and nothing needs its disks.
pub(super) fn is_empty(context: &Context, index: usize, disks: &[DiskId]) -> bool {
    context.volumes().iter().all(|volume| {
        let heads = context.heads_of(volume.id);
        let newest = context.epoch(volume.id);
        let [(at, head)] = &heads[..] else { return false };
        let current = *at != index && head.authority.epoch == newest;
        current && disks.iter().all(|disk| !head.uses_disk(*disk))
    })
}

async fn drain(context: &Rc<Context>) {
    let members = context.members();
    let index = members[context.pick(members.len())];
    let Some(node) = context.host(index).node() else { return };
    if !spared(context, index) {
        return;
    }
    let disks: Vec<DiskId> = node.own_disks().into_iter().map(|(_, id)| id).collect();
    let (name, begun) = (context.host(index).name.clone(), Instant::now());
    drop(node);
    let Some(host) = other(context, index) else { return };
    context.cover_noted("a node is drained");
    context.note(&name);
    context.drained.borrow_mut().insert(index);
    let told = name.clone();
    let drained = order(&host, |reply| Command::NodeDrain { node: told, reply }).await;
    context.note(&format!("{drained:?}"));
    // Who does not wait leaves it to the nodes to refuse.
    let hasty = context.env.chance(1, 2);
    let mut empty = false;
    while !hasty && begun.elapsed() < EMPTY_PATIENCE && !empty {
        sleep(LOOK).await;
        empty = is_empty(context, index, &disks);
    }
    if empty {
        context.cover_noted("a drained node is empty");
    }
    let removes = hasty || (empty && context.env.chance(2, 3));
    if removes && remove(context, index, &disks).await {
        return;
    }
    undrain(context, index).await;
}

/// What was ordered while faults struck may or may not have been done: now it is, or is taken back.
pub(super) async fn finish(context: &Rc<Context>) {
    let drained = context.drained.borrow().clone();
    for index in drained {
        let again = context.env.chance(1, 2) || !spared(context, index);
        for _ in 0..50 {
            let done = if again {
                undrain(context, index).await
            } else if let Some(host) = other(context, index) {
                let node = context.host(index).name.clone();
                order(&host, |reply| Command::NodeDrain { node, reply }).await.is_ok()
            } else {
                false
            };
            if done {
                break;
            }
            sleep(LOOK).await;
        }
    }
    for _ in 0..50 {
        let drained = context.drained.borrow().clone();
        if context.leaving.borrow().iter().all(|(index, _)| drained.contains(index)) {
            break;
        }
        keep_disks(context).await;
        sleep(LOOK).await;
    }
    go_on_removing(context).await;
}

/// Uses a drained node again.
async fn undrain(context: &Rc<Context>, index: usize) -> bool {
    let Some(host) = other(context, index) else { return false };
    let node = context.host(index).name.clone();
    let answer = order(&host, |reply| Command::NodeUndrain { node, reply }).await;
    context.note(&format!("undrained: {:?}", answer.as_ref().map(|_| ())));
    let done = answer.is_ok();
    if done {
        context.cover("a drained node is used again");
        context.drained.borrow_mut().remove(&index);
        keep_disks(context).await;
    }
    done
}

/// Takes back what was ordered of disks that could not be removed yet, of nodes that are used again: otherwise they
/// go as soon as they are empty.
async fn keep_disks(context: &Rc<Context>) {
    let leaving = context.leaving.borrow().clone();
    for (index, disk) in leaving {
        if context.drained.borrow().contains(&index) {
            continue;
        }
        let Some(host) = other(context, usize::MAX) else { return };
        let kept = order(&host, move |reply| Command::DiskOnline { disk, reply }).await;
        context.note(&format!("disk {disk} is to stay: {:?}", kept.as_ref().map(|_| ())));
        if kept.is_ok() || context.gone().contains(&disk) {
            context.leaving.borrow_mut().remove(&(index, disk));
        }
    }
}

/// A disk was removed: no head may need it. (One that is not the newest does not know better.)
fn check_unneeded(context: &Context, disk: DiskId) {
    for volume in context.volumes() {
        let newest = context.epoch(volume.id);
        for (_, head) in context.heads_of(volume.id) {
            if head.authority.epoch == newest && head.uses_disk(disk) {
                context
                    .fail(format!("disk {disk} is removed, and volume {} needs it", volume.name));
            }
        }
    }
}

/// Takes a drained node out: its disks, then itself. What was on it is no more.
async fn remove(context: &Rc<Context>, index: usize, disks: &[DiskId]) -> bool {
    let Some(busy) = Busy::claim(context, index) else { return false };
    for disk in disks.iter().copied() {
        let mut done = false;
        for _ in 0..10 {
            let Some(host) = other(context, index) else { return false };
            let make = move |reply| Command::DiskRemove { disk, force: true, reply };
            match order(&host, make).await {
                Ok(_) => {
                    done = true;
                    break;
                }
                Err(why) => {
                    context.leaving.borrow_mut().insert((index, disk));
                    context.note(&why);
                }
            }
            sleep(LOOK).await;
        }
        if !done {
            context.cover("a disk of an empty node is not removed");
            return false;
        }
        check_unneeded(context, disk);
        context.leaving.borrow_mut().remove(&(index, disk));
        context.lost.borrow_mut().insert(disk);
    }
    context.cover_noted("the disks of a node are removed");
    context.town.stop(&busy.host()).await;
    // All that was on it is gone, whoever may still think of it.
    busy.host().devices.0.borrow_mut().clear();
    context.absent.borrow_mut().insert(index);
    context.drained.borrow_mut().remove(&index);
    context.removed.borrow_mut().push(busy.host().name.clone());
    go_on_removing(context).await;
    true
}

/// Has nodes forgotten that are taken out, as far as somebody answers.
async fn go_on_removing(context: &Rc<Context>) {
    for _ in 0..5 {
        let Some(node) = context.removed.borrow().first().cloned() else { return };
        let Some(host) = other(context, usize::MAX) else { return };
        match order(&host, |reply| Command::NodeRemove { node, reply }).await {
            Ok(_) => {
                context.cover_noted("a node is removed");
                context.removed.borrow_mut().remove(0);
            }
            Err(why) => {
                context.note(&why);
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}
