//! Faults of the network between nodes.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::sleep;

use super::context::Context;
use super::nemesis::{a_while, victim};

/// Two machines of the cluster.
fn pair(context: &Context) -> Option<(String, String)> {
    let members = context.members();
    let a = members[context.pick(members.len())];
    let b = members[context.pick(members.len())];
    (a != b).then(|| (context.host(a).name.clone(), context.host(b).name.clone()))
}

/// Something happens to the network.
pub(super) fn strike(context: &Rc<Context>) {
    match context.env.random_below(8) {
        0..=1 => cut_pair(context),
        2..=3 => isolate(context),
        4 => split(context),
        5..=6 => tear(context),
        _ => slow_down(context),
    }
}

/// Cuts ways for a while.
fn cut(context: &Rc<Context>, what: &'static str, ways: Vec<(String, String)>) {
    let task = context.clone();
    context.cover_noted(what);
    context.spawn(async move {
        let context = task;
        let net = &context.town.net;
        for (from, to) in &ways {
            context.note(&format!("nothing passes from {from} to {to}"));
            net.cut_way(from, to);
        }
        sleep(a_while(&context)).await;
        let torn = context.env.chance(1, 2);
        for (from, to) in &ways {
            net.mend_way(from, to);
            if torn {
                net.tear(from, to, None);
            }
        }
        context.note("the ways are mended");
    });
}

fn cut_pair(context: &Rc<Context>) {
    let Some((a, b)) = pair(context) else { return };
    if context.env.chance(1, 2) {
        cut(context, "one way between two nodes is cut", vec![(a, b)]);
    } else {
        cut(context, "two nodes are cut off from each other", vec![(a.clone(), b.clone()), (b, a)]);
    }
}

/// One node is cut off from all others, or most, in one direction or both; sometimes from the store too.
fn isolate(context: &Rc<Context>) {
    let Some(busy) = victim(context) else { return };
    let own = busy.host();
    let (out, inward) = [(true, true), (true, true), (true, false), (false, true)][context.pick(4)];
    let all = context.env.chance(2, 3);
    let mut ways = Vec::new();
    for index in context.members() {
        let other = context.host(index).name.clone();
        if other == own.name || !(all || context.env.chance(1, 2)) {
            continue;
        }
        if out {
            ways.push((own.name.clone(), other.clone()));
        }
        if inward {
            ways.push((other, own.name.clone()));
        }
    }
    let store = context.env.chance(1, 3);
    let what =
        if store { "a node is cut off from nodes and the store" } else { "a node is cut off" };
    cut(context, what, ways);
    let task = context.clone();
    context.spawn(async move {
        own.store.set_unavailable(store);
        sleep(a_while(&task)).await;
        own.store.set_unavailable(false);
        drop(busy);
    });
}

/// The cluster falls into two parts.
fn split(context: &Rc<Context>) {
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for index in context.members() {
        let part = if context.env.chance(1, 2) { &mut left } else { &mut right };
        part.push(context.host(index).name.clone());
    }
    let mut ways = Vec::new();
    for a in &left {
        for b in &right {
            ways.push((a.clone(), b.clone()));
            ways.push((b.clone(), a.clone()));
        }
    }
    cut(context, "the cluster falls into two parts", ways);
}

fn tear(context: &Rc<Context>) {
    let Some((a, b)) = pair(context) else { return };
    context.cover_noted("connections are torn");
    let after = context.env.chance(1, 2).then(|| 1 + context.env.random_below(60_000));
    context.town.net.tear(&a, &b, after);
}

fn slow_down(context: &Rc<Context>) {
    let Some((a, b)) = pair(context) else { return };
    context.cover_noted("the way between two nodes is slow");
    let delay = Duration::from_millis(1 + context.env.random_below(60));
    context.town.net.slow_down(&a, &b, delay);
    let task = context.clone();
    context.spawn(async move {
        let context = task;
        sleep(a_while(&context)).await;
        context.town.net.slow_down(&a, &b, Duration::from_micros(100));
    });
}
