//! What strikes the simulated cluster.
//!
//! # The budget
//!
//! A process that is killed, a machine without power, a cut network, a store that is away take nothing
//! away that was acknowledged: however many of them there are at once, waiting and errors are the only
//! answers allowed, and all must be well once they end. So they are limited only to keep runs
//! interesting: mostly to as many machines as the least redundant pool survives, sometimes to none.
//!
//! What hurts content (a lost disk, flipped bits) strikes one machine of a run only, and only while every
//! volume is whole on all its domains ([`Context::ailing`]): then each block lies on `m + 1` machines or in a
//! stripe that survives the loss of `m`, and `m` is 1 at least.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::sleep;

use super::context::Context;
use super::host::Host;
use super::{network, operator, storage, usurp};

/// Something is being done to a machine until this is dropped.
pub(super) struct Busy {
    context: Rc<Context>,
    pub(super) index: usize,
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.context.busy.borrow_mut().remove(&self.index);
    }
}

impl Busy {
    /// Claims a machine.
    pub(super) fn claim(context: &Rc<Context>, index: usize) -> Option<Self> {
        let free = context.busy.borrow_mut().insert(index);
        free.then(|| Self { context: context.clone(), index })
    }

    pub(super) fn host(&self) -> Rc<Host> {
        self.context.host(self.index)
    }
}

/// A random machine of the cluster that nothing is being done to, if another one may be struck.
pub(super) fn victim(context: &Rc<Context>) -> Option<Busy> {
    let least = context.volumes().iter().map(|v| usize::from(v.scheme.parity)).min();
    let most = if context.env.chance(1, 8) { usize::MAX } else { least.unwrap_or(1) };
    if context.busy.borrow().len() >= most {
        return None;
    }
    let members = context.members();
    Busy::claim(context, members[context.pick(members.len())])
}

pub(super) fn millis(context: &Context, most: u64) -> Duration {
    Duration::from_millis(context.env.random_below(most))
}

/// A time that is mostly short, but long enough now and then for others to go on without.
pub(super) fn a_while(context: &Context) -> Duration {
    let most = [300, 3000, 9000][context.pick(3)];
    Duration::from_millis(10 + context.env.random_below(most))
}

/// Strikes at random until the faults end.
pub(super) async fn run(context: Rc<Context>) {
    while !context.calm.get() {
        sleep(Duration::from_millis(50 + context.env.random_below(1500))).await;
        match context.env.random_below(28) {
            0..=3 => crash(&context),
            4..=5 => stop(&context),
            6..=8 => pause(&context),
            9..=12 => network::strike(&context),
            13..=16 => storage::strike_store(&context),
            17..=19 => storage::strike_disk(&context),
            20 => blackout(&context),
            21..=24 => usurp::strike(&context),
            _ => operator::strike(&context),
        }
    }
}

/// A process is killed, or its machine loses its power; it is started again.
fn crash(context: &Rc<Context>) {
    let Some(busy) = victim(context) else { return };
    let task = context.clone();
    context.spawn(async move {
        let context = task;
        let power = context.env.chance(1, 3);
        let name = if power { "a machine loses its power" } else { "a process is killed" };
        context.cover_noted(name);
        context.note(&busy.host().name);
        context.town.kill(&busy.host(), power).await;
        sleep(a_while(&context)).await;
        if context.env.chance(1, 4) && busy.host().devices.swap(context.pick(3), context.pick(3)) {
            context.cover_noted("disks are found at other paths");
        }
        context.town.start(&busy.host());
    });
}

/// A process is stopped in order, and started again.
fn stop(context: &Rc<Context>) {
    let Some(busy) = victim(context) else { return };
    let task = context.clone();
    context.spawn(async move {
        let context = task;
        context.cover_noted("a process is stopped");
        context.note(&busy.host().name);
        context.town.stop(&busy.host()).await;
        sleep(a_while(&context)).await;
        context.town.start(&busy.host());
    });
}

/// A process is held for a while.
fn pause(context: &Rc<Context>) {
    let Some(busy) = victim(context) else { return };
    let task = context.clone();
    context.spawn(async move {
        let context = task;
        context.cover_noted("a process is held");
        context.note(&busy.host().name);
        busy.host().pause(true);
        sleep(a_while(&context)).await;
        busy.host().pause(false);
    });
}

/// The power fails everywhere, once in a while.
fn blackout(context: &Rc<Context>) {
    if context.env.chance(3, 4) {
        return;
    }
    let task = context.clone();
    context.spawn(async move {
        let context = task;
        context.cover_noted("the power fails everywhere");
        let struck = context.members();
        for index in &struck {
            context.town.kill(&context.host(*index), true).await;
        }
        for index in struck {
            sleep(millis(&context, 1500)).await;
            // It may have been taken out meanwhile.
            if context.members().contains(&index) {
                context.town.start(&context.host(index));
            }
        }
    });
}
