//! A second head takes the volume while the first still runs.
//!
//! The first is cut off in one of several ways, or not at all, and its clients go on: what they are
//! told must be right, or an error. Its requests arrive late, its answers get lost, and when its
//! ways heal it wakes up as if nothing had happened.

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::sleep;

use super::demands::take_over_at_last;
use super::run::{Context, spawn_clients};
use super::world::{Node, Running};

/// Starts rivals until the life ends.
pub(super) async fn run(context: Rc<Context>) {
    let env = context.env.clone();
    for _ in 0..=env.random_below(2) {
        sleep(Duration::from_millis(30 + env.random_below(1200))).await;
        let newest = context.heads.borrow().last().cloned();
        let Some(old) = newest.filter(|_| !context.stop.get()) else { return };
        challenge(&context, &old).await;
    }
}

/// Cuts a head off, in one of several ways.
fn cut_off(context: &Context, old: &Running) {
    let (env, link) = (&context.env, &old.node.link);
    let lease = context.world.config.head.lease;
    link.lossy.set(env.chance(1, 2));
    context.disturbed();
    let what = match env.random_below(6) {
        0 => "nothing",
        1 => {
            link.control_cut.set(true);
            "requests"
        }
        2 => {
            link.mute.set(true);
            "answers"
        }
        3 => {
            link.control_cut.set(true);
            link.reads_cut.set(true);
            "everything"
        }
        4 => {
            link.delay.set(lease / 8);
            "delay"
        }
        _ => {
            link.delay.set(lease);
            "long delay"
        }
    };
    context.cover_noted(&format!("rival head; the old one is cut off from: {what}"));
    if env.chance(1, 2) {
        if env.chance(1, 2) {
            context.cover_noted("the old head loses the store");
            old.node.faults.unavailable.set(true);
        } else {
            context.cover_noted("what the old head tells the store is lost");
            old.node.faults.unknown_lost.set(1000);
        }
    }
}

/// Another head takes the volume of `old`.
pub(super) async fn challenge(context: &Rc<Context>, old: &Rc<Running>) {
    let env = &context.env;
    let lease = u64::try_from(context.world.config.head.lease.as_millis()).expect("short");
    // Clients of the old head that only read do not make it notice.
    let quiet = env.chance(1, 2);
    cut_off(context, old);
    if quiet {
        context.quiet_below.set(context.heads.borrow().len());
    }
    sleep(Duration::from_millis(env.random_below(2) * env.random_below(lease))).await;
    let node = context.world.node();
    context.nodes.borrow_mut().push(node.clone());
    if env.chance(1, 3) {
        node.link.delay.set(Duration::from_millis(env.random_below(20)));
    }
    if env.chance(1, 3) {
        reach_few(context, &node);
    }
    let Some(running) = take_over_at_last(context, &node, &context.world.volume).await else {
        old.node.heal();
        return;
    };
    context.cover_noted("a rival serves");
    context.heads.borrow_mut().push(running.clone());
    spawn_clients(context, &running);
    sleep(Duration::from_millis(env.random_below(lease))).await;
    if env.chance(1, 2) && context.faulty.borrow().is_empty() {
        restart_disks(context, Some(&old.node)).await;
    }
    old.node.heal();
    sleep(Duration::from_millis(env.random_below(2 * lease))).await;
    context.quiet_below.set(0);
}

/// For a while the rival reaches so few disks that it has to wait.
fn reach_few(context: &Rc<Context>, node: &Rc<Node>) {
    let (env, config) = (&context.env, &context.world.config);
    let least = usize::from(config.scheme.parity) + 1;
    let Some(most) = config.disks.checked_sub(least).filter(|most| *most > 0) else { return };
    let pick = |n: usize| usize::try_from(env.random_below(n as u64)).expect("a few disks");
    let reached = 1 + pick(most);
    let first = pick(config.disks);
    let away: Vec<usize> =
        (first + reached..first + config.disks).map(|index| index % config.disks).collect();
    context.cover_noted("a rival reaches few disks");
    for &index in &away {
        node.registry.remove(context.world.ids[index]);
    }
    let (context, node) = (context.clone(), node.clone());
    let time = Duration::from_millis(env.random_below(1000));
    tokio::task::spawn_local(async move {
        sleep(time).await;
        for &index in &away {
            context.world.connect(&node, index);
        }
        let heads = context.heads.borrow().clone();
        for running in heads.iter().filter(|running| Rc::ptr_eq(&running.node, &node)) {
            for &index in &away {
                running.head.disk_returned(context.world.ids[index]).await;
            }
        }
    });
}

/// All disks restart at once; `first` hears of them first and is reached again.
pub(super) async fn restart_disks(context: &Context, first: Option<&Rc<Node>>) {
    context.cover_noted("all disks restart");
    context.disturbed();
    let count = context.world.config.disks;
    let open: Vec<_> = (0..count).filter_map(|index| context.world.disk(index)).collect();
    join_all(open.iter().map(|disk| disk.close("restart"))).await;
    for index in 0..count {
        context.world.ensure_open(index).await;
    }
    if let Some(node) = first {
        (0..count).for_each(|index| context.world.connect(node, index));
        node.heal();
        sleep(Duration::from_millis(context.env.random_below(100))).await;
    }
    let nodes = context.nodes.borrow().clone();
    for node in nodes {
        (0..count).for_each(|index| context.world.connect(&node, index));
    }
    for running in context.all_heads() {
        for &id in &context.world.ids {
            running.head.disk_returned(id).await;
        }
    }
}
