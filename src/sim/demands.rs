//! What the node must manage whatever strikes: take-overs and orderly ends that have no excuse.
//!
//! A take-over has an excuse while more disks are away, hurt or not yet rebuilt than the redundancy
//! bears, while too few disks of its log set are reached for its root to come into force, and when
//! anything struck since it began. Without one it must neither find the volume damaged nor take
//! long. What passes by itself (the store, another head) may be tried again.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::nemesis::reopen;
use super::run::{Context, heal_all};
use super::world::{Node, Running, Volume};
use crate::id::DiskId;
use crate::meta::{MetaStore, schema};
use crate::volume::root::Root;
use crate::volume::rules;
use crate::volume::takeover::TakeOverError;

/// Virtual time within which a take-over without an excuse ends.
const TAKE_OVER_MAX: Duration = Duration::from_secs(30);
/// Virtual time within which a head without faults releases its volume, and each client
/// ends beyond what an answer may take.
const END_MAX: Duration = Duration::from_secs(30);
/// Take-overs of one node that may fail before all faults end.
const TRIES: u32 = 20;

impl Context {
    /// A disk is struck: it counts until it is healed.
    pub(super) fn struck(&self, index: usize) {
        self.faulty.borrow_mut().insert(index);
        self.stale.borrow_mut().insert(index);
        self.disturbed();
    }

    /// Take-overs that are under way have an excuse.
    pub(super) fn disturbed(&self) {
        self.strikes.set(self.strikes.get() + 1);
    }

    /// Disks that are away or hurt.
    pub(super) fn ailing(&self) -> BTreeSet<usize> {
        &*self.faulty.borrow() | &*self.hurt.borrow()
    }

    /// Looks whether disks that were struck have all again: the head finds nothing missing, and the
    /// root names a checkpoint made since.
    pub(super) async fn note_rebuilt(&self) {
        let heads = self.newest_heads();
        if heads.len() < self.world.volumes().count() || !heads.iter().all(is_whole) {
            self.whole_since.take();
            return;
        }
        let strikes = self.strikes.get();
        let seen = self.whole_since.borrow().clone().filter(|(at, _)| *at == strikes);
        let Some((_, made)) = seen else {
            let made = heads.iter().map(|running| running.head.report().checkpoint_sequence);
            *self.whole_since.borrow_mut() = Some((strikes, made.collect()));
            return;
        };
        for (running, made) in heads.iter().zip(made) {
            let named = stored_root(self, &running.volume).await.and_then(|root| root.checkpoint);
            // Two more, so that one was begun since.
            if named.is_none_or(|named| named.place.sequence < made + 2) {
                return;
            }
        }
        if strikes == self.strikes.get() {
            *self.stale.borrow_mut() = self.ailing();
        }
    }
}

/// Whether a head serves and finds nothing missing.
fn is_whole(running: &Rc<Running>) -> bool {
    let (healthy, width, full) = running.head.log_width();
    let wide = width == full && healthy >= usize::from(full);
    running.head.is_serving() && running.head.reduced().0 == 0 && wide
}

async fn stored_root(context: &Context, volume: &Volume) -> Option<Root> {
    let stored = context.world.store.get(&schema::root_key(volume.id)).await;
    Root::decode(&stored.ok()??.value).ok()
}

/// Why a take-over on this node may wait or fail; none if it may not.
async fn excuse(context: &Context, node: &Node, volume: &Volume) -> Option<String> {
    if !node.link.is_well() {
        return Some("the node is cut off".into());
    }
    let parity = usize::from(context.world.config.scheme.parity);
    let ailing = context.ailing();
    let lacking = &ailing | &*context.stale.borrow();
    if !ailing.is_empty() && lacking.len() > parity {
        return Some(format!("disks {ailing:?} are away or hurt, {lacking:?} lack something"));
    }
    let retired = context.world.retired.borrow().clone();
    let up = |index: &usize| {
        let disk = context.world.disk(*index);
        !ailing.contains(index)
            && !retired.contains(index)
            && disk.is_some_and(|disk| disk.offline_reason().is_none())
            && node.registry.client(context.world.ids[*index]).is_some()
    };
    let reached: BTreeSet<DiskId> =
        (0..context.world.config.disks).filter(up).map(|index| context.world.ids[index]).collect();
    let all = context.world.config.disks - retired.len();
    if reached.len() + parity < all {
        return Some("the node reaches few disks".into());
    }
    let Some(root) = stored_root(context, volume).await else {
        return Some("there is no root".into());
    };
    let enough = rules::fenced_enough(&root.set, &reached)
        && rules::in_force(&root.set, &root.former, &reached);
    (!enough).then(|| format!("too few of {:?} are up", root.set))
}

/// Counts a take-over as long as this lives.
struct TakingOver<'a>(&'a Context);

impl<'a> TakingOver<'a> {
    fn new(context: &'a Context) -> Self {
        context.taking_over.set(context.taking_over.get() + 1);
        Self(context)
    }
}

impl Drop for TakingOver<'_> {
    fn drop(&mut self) {
        self.0.taking_over.set(self.0.taking_over.get() - 1);
    }
}

/// Takes a volume over on a node. Fails the run if it does not succeed though nothing excuses it.
///
/// # Errors
/// Why it failed; it may be tried again.
pub(super) async fn take_over(
    context: &Context,
    node: &Rc<Node>,
    volume: &Rc<Volume>,
) -> Result<Rc<Running>, String> {
    let strikes = context.strikes.get();
    let excuse = excuse(context, node, volume).await;
    let due = || excuse.is_none() && context.strikes.get() == strikes;
    context.cover(if due() { "take-over that must succeed" } else { "take-over with an excuse" });
    let _counted = TakingOver::new(context);
    let mut attempt = std::pin::pin!(context.world.take_over_volume(node, volume));
    let result = if let Ok(result) = timeout(TAKE_OVER_MAX, &mut attempt).await {
        result
    } else {
        if due() && !node.faults.unavailable.get() {
            let waiting = context.world.waiting.borrow().clone();
            context.fail(format!("a take-over lasts longer than {TAKE_OVER_MAX:?}: {waiting}"));
        }
        context.note(&format!("a take-over lasts: {excuse:?}"));
        attempt.await
    };
    if let Err(
        error @ (TakeOverError::Damaged { .. }
        | TakeOverError::Unread(_)
        | TakeOverError::NoCheckpoint { .. }),
    ) = &result
    {
        context.note(&format!("excuse: {excuse:?}"));
        if due() {
            context.fail(format!("the volume cannot be taken over: {error}"));
        }
    }
    result.map_err(|error| error.to_string())
}

/// Takes a volume over on a node, as often as it takes; none if the life ends before. Where it is in
/// vain for long, all faults end; the run fails if that does not help.
pub(super) async fn take_over_at_last(
    context: &Context,
    node: &Rc<Node>,
    volume: &Rc<Volume>,
) -> Option<Rc<Running>> {
    for tries in 0..3 * TRIES {
        if context.stop.get() {
            return None;
        }
        if tries == TRIES {
            context.cover_noted("all faults end for a take-over");
            calm(context).await;
        }
        match take_over(context, node, volume).await {
            Ok(running) => return Some(running),
            Err(error) => context.note(&format!("the take-over: {error}")),
        }
        sleep(Duration::from_millis(50)).await;
    }
    context.fail("a volume cannot be taken over though all faults have ended".into());
    None
}

/// Nothing strikes from now on, and all faults end.
pub(super) async fn calm(context: &Context) {
    context.calm.set(true);
    heal_all(context);
    let retired = context.world.retired.borrow().clone();
    for index in (0..context.world.config.disks).filter(|index| !retired.contains(index)) {
        reopen(context, index).await;
    }
}

/// Ends a life in order: its tasks end, and the newest heads release their volumes. Fails the run if
/// they do not though all faults have ended, unless the head was overtaken.
pub(super) async fn end_in_order(context: &Rc<Context>) {
    context.stop.set(true);
    calm(context).await;
    let patience = context.world.config.head.io_timeout + END_MAX;
    while let Some(task) = context.next_task() {
        // A client that panicked has reported its failure.
        if timeout(patience, task).await.is_err() {
            context.fail("a client or a rival does not end though all faults have".into());
            return;
        }
        calm(context).await;
    }
    for running in context.newest_heads() {
        release(context, &running).await;
    }
}

async fn release(context: &Context, running: &Running) {
    let release = timeout(END_MAX, running.head.release()).await;
    let root = stored_root(context, &running.volume).await;
    let overtaken = root.is_none_or(|root| root.head != running.head.authority.head);
    match release {
        Ok(Ok(())) => context.cover_noted("stopped in order"),
        _ if overtaken => context.cover_noted("overtaken before it could release the volume"),
        Ok(Err(error)) => context.fail(format!("the volume cannot be released: {error}")),
        Err(_) => context.fail(format!("a release lasts longer than {END_MAX:?}")),
    }
}
