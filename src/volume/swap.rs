//! Swapping the root: compare-and-swap with outcomes that may be unknown, and being in force.
//!
//! One swap is under way at a time, and it is not begun anew before its outcome is known, however
//! long that takes. Nothing else waits for it: the head goes on writing and making checkpoints, and
//! only what a checkpoint frees stays until the root names it.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::head::{Head, HeadError, State};
use super::root::Root;
use super::rules::{self, LogSet};
use super::segtab::ShardRef;
use crate::id::{DiskId, Epoch, SegmentId};
use crate::limits::SEGMENT_RANGE;
use crate::meta::{Condition, MetaError, MetaStore, Txn, TxnOutcome, schema};
use crate::planted::{Bug, bug};
use crate::shard::disks::Disks;
use crate::shard::{Authority, MIRROR_BYTES_MAX, ShardError};

/// Pause before a request to the store is tried again.
const RETRY: Duration = Duration::from_millis(100);
/// Longest pause between two swaps while the store is away.
const RETRY_MAX: Duration = Duration::from_secs(2);
/// How long a mirror may take.
const MIRROR_PATIENCE: Duration = Duration::from_secs(2);

/// How a swap of the root ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Swapped {
    /// The root is the new one, at this revision.
    Ours(u64),
    /// Somebody else changed it.
    Lost,
    /// There is none any more: the volume was deleted.
    Gone,
}

/// Swaps the root from `revision` to `new`, until the outcome is known.
///
/// After an unknown outcome the same swap is tried again: it succeeds if the first did not, and
/// conflicts otherwise; then the token tells whose the root is. Reading the old revision proves
/// nothing, because the first swap may still be under way.
///
/// # Errors
/// [`MetaError::Unavailable`] when the swap was definitely not made and nothing is in doubt.
pub(super) async fn swap(
    store: &dyn MetaStore,
    new: &Root,
    revision: u64,
) -> Result<Swapped, MetaError> {
    let key = schema::root_key(new.volume);
    let mut in_doubt = false;
    loop {
        let txn =
            Txn::new().when(Condition::KeyAt(key.clone(), revision)).put(key.clone(), new.encode());
        match store.txn(txn).await {
            Ok(TxnOutcome::Committed { revision }) => return Ok(Swapped::Ours(revision)),
            Ok(TxnOutcome::Conflict) => match store.get(&key).await {
                Ok(Some(found)) => {
                    let ours = Root::decode(&found.value).is_ok_and(|r| r.token() == new.token());
                    return Ok(if ours { Swapped::Ours(found.revision) } else { Swapped::Lost });
                }
                Ok(None) => return Ok(Swapped::Gone),
                Err(_) => in_doubt = true,
            },
            Err(MetaError::Unavailable(why)) if !in_doubt => {
                return Err(MetaError::Unavailable(why));
            }
            Err(MetaError::Unavailable(_)) => {}
            Err(MetaError::Unknown(_)) => {
                if bug(Bug::BelieveFailedSwap) {
                    return Ok(Swapped::Ours(revision));
                }
                in_doubt = true;
            }
            Err(error) if !in_doubt => return Err(error),
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Mirrors a root on the disks of its set and of former sets; the disks that have it.
///
/// # Errors
/// The epoch of a later head, which swapped the root before it fenced a disk.
pub(super) async fn mirror(
    disks: &Disks,
    authority: Authority,
    root: &Root,
) -> Result<BTreeSet<DiskId>, Epoch> {
    let mirror = root.mirror();
    let members: BTreeSet<DiskId> = std::iter::once(&root.set)
        .chain(&root.former)
        .flat_map(|set| set.members().iter().map(|m| m.disk))
        .collect();
    let requests = members.into_iter().filter_map(|disk| {
        let client = disks.client(disk)?;
        let mirror = mirror.clone();
        Some(async move {
            let request = async {
                match client.mirror(authority, mirror.clone()).await {
                    // It came after the take-over: it is fenced, and the mirror with it.
                    Err(ShardError::Gone | ShardError::Invalid(_)) => {
                        client.fence(authority, Some(mirror)).await.map(|_| ())
                    }
                    result => result,
                }
            };
            match tokio::time::timeout(MIRROR_PATIENCE, request).await {
                Ok(Ok(())) => Some(Ok(disk)),
                Ok(Err(ShardError::Fenced(epoch))) if epoch > authority.epoch => Some(Err(epoch)),
                _ => None,
            }
        })
    });
    join_all(requests).await.into_iter().flatten().collect()
}

/// What the swaps of a head's root share.
#[derive(Default)]
pub(super) struct Swaps {
    /// Held from the capture of a root until it is in force.
    lock: tokio::sync::Mutex<()>,
    /// Held while what a swap freed is deleted.
    deleting: tokio::sync::Mutex<()>,
    /// Wakes the task that makes the root name the newest checkpoint.
    pub(super) wanted: Notify,
    /// A checkpoint was wanted that can wait until the root names the last one.
    deferred: Cell<bool>,
    /// The last swap that was tried was not made.
    failed: Cell<bool>,
}

/// Makes the root name the newest checkpoint whenever there is one, until the head stops. While
/// the store is away this alone is tried again: no checkpoint is made anew for it.
pub(super) async fn run(head: Rc<Head>) {
    let mut pause = RETRY;
    loop {
        head.swaps.wanted.notified().await;
        if !head.is_serving() {
            return;
        }
        match head.publish().await {
            Ok(()) => pause = RETRY,
            Err(error) => {
                if pause == RETRY {
                    tracing::warn!(volume = %head.volume, %error, "the root cannot be swapped, will be tried again");
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
                head.swaps.wanted.notify_one();
            }
        }
    }
}

impl Head {
    /// Swaps the root to the newest checkpoint (and a longer range of numbers where they run
    /// short) unless it names it already, and deletes what that checkpoint lists as freed.
    ///
    /// # Errors
    /// [`HeadError::Meta`] while the store is away; [`HeadError::Stopped`] when the volume was
    /// lost.
    pub(super) async fn publish(self: &Rc<Self>) -> Result<(), HeadError> {
        self.publish_with(None::<fn(&mut Root)>).await
    }

    /// The same with a change of the root besides, which is swapped in in any case.
    ///
    /// # Errors
    /// As [`Head::publish`], and [`HeadError::Set`] where the change may not be made.
    pub(super) async fn publish_with(
        self: &Rc<Self>,
        change: Option<impl FnOnce(&mut Root) + 'static>,
    ) -> Result<(), HeadError> {
        if bug(Bug::FreeBeforeSwap) {
            let listed = self.state.borrow().listed.clone();
            self.delete_freed(&listed).await;
        }
        let head = self.clone();
        let swapped = self.in_task(async move { head.swap_steps(change).await }).await;
        self.swaps.failed.set(matches!(swapped, Err(HeadError::Meta(_))));
        let mut listed = swapped?;
        // Who comes when the swap was made waits for what it freed.
        let deleting = self.swaps.deleting.lock().await;
        listed.retain(|shard| self.state.borrow().table.freed.contains(shard));
        self.delete_freed(&listed).await;
        drop(deleting);
        if !listed.is_empty() {
            self.tell_of_freed(&listed);
        }
        self.published();
        self.gc_wanted.notify_one();
        if self.swaps.deferred.take() {
            self.checkpoint_wanted.notify_one();
        }
        Ok(())
    }

    /// Tells those who wait for slots, and who counts on them, that these came back.
    #[expect(clippy::cast_precision_loss, reason = "a few slots")]
    fn tell_of_freed(&self, freed: &[(SegmentId, ShardRef)]) {
        let emptied = self.space.emptying.borrow();
        let emptied = freed.iter().filter(|(id, _)| emptied.contains(id)).count();
        self.disks.promise.came(emptied as f64 / self.disks.ids().len().max(1) as f64);
        self.space.freed.notify_waiters();
    }

    /// Whether a checkpoint that is wanted may wait because the root does not name the last one
    /// yet, and neither overlay nor log have grown since. It is made when the root does.
    pub(super) fn defers_checkpoint(&self) -> bool {
        let state = self.state.borrow();
        let grown = state.overlay.len() >= self.overlay_extents_max(&state) / 2
            || state.log_blocks >= self.config.checkpoint_log_blocks;
        let waits = state.checkpoint != state.root.checkpoint && !grown;
        if waits {
            self.swaps.deferred.set(true);
            self.swaps.wanted.notify_one();
        }
        waits
    }

    /// Whether the root cannot be swapped now, and does not name the newest checkpoint: another one
    /// would be made in vain.
    pub(super) fn swaps_in_vain(&self) -> bool {
        let state = self.state.borrow();
        self.swaps.failed.get() && state.checkpoint != state.root.checkpoint
    }

    /// Swaps the root with a change of its own; it names the newest checkpoint besides, and is in
    /// force on return.
    ///
    /// # Errors
    /// [`HeadError::Meta`] while the store is away; [`HeadError::Stopped`] when the volume was
    /// lost.
    pub(super) async fn swap_root(
        self: &Rc<Self>,
        change: impl FnOnce(&mut Root) + 'static,
    ) -> Result<(), HeadError> {
        let head = self.clone();
        self.in_task(async move { head.swap_steps(Some(change)).await.map(|_| ()) }).await
    }

    /// Swaps the root to the set that `set` tells once nobody else swaps it; nothing if it tells
    /// none. Gives the set.
    ///
    /// # Errors
    /// As [`Head::swap_root`], and [`HeadError::Set`] where that set may not be had.
    pub(super) async fn swap_root_if(
        self: &Rc<Self>,
        set: impl FnOnce(&Self) -> Option<LogSet> + 'static,
    ) -> Result<Option<LogSet>, HeadError> {
        let head = self.clone();
        let swapped = async move {
            let _lock = head.swaps.lock.lock().await;
            let Some(set) = set(&head) else { return Ok(None) };
            head.swap_once(|root| root.set = set.clone()).await?;
            head.settle_root().await?;
            Ok(Some(set))
        };
        self.in_task(swapped).await
    }

    /// What may not be given up half-way goes on to its end when its caller is gone: a swap, whose
    /// sequence would be used for another root, and the one be taken for the other; a checkpoint. Only
    /// a head that stops for good leaves it.
    pub(super) async fn in_task<T: 'static>(
        self: &Rc<Self>,
        steps: impl Future<Output = Result<T, HeadError>> + 'static,
    ) -> Result<T, HeadError> {
        let head = self.clone();
        let task = tokio::task::spawn_local(async move {
            tokio::select! {
                biased;
                why = head.until_stopped() => Err(HeadError::Stopped(why)),
                result = steps => result,
            }
        });
        match task.await {
            Ok(result) => result,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(HeadError::Stopped("the process ends".into())),
        }
    }

    /// Returns when the head has stopped, and why.
    async fn until_stopped(&self) -> String {
        loop {
            let changed = self.applied.notified();
            if let Some(why) = self.stopped() {
                return why;
            }
            changed.await;
        }
    }

    /// One swap, alone; gives what the checkpoint that the root names now lists as freed. Without a
    /// change nothing is done where nothing is new.
    async fn swap_steps(
        self: &Rc<Self>,
        change: Option<impl FnOnce(&mut Root)>,
    ) -> Result<Vec<(SegmentId, ShardRef)>, HeadError> {
        let _lock = self.swaps.lock.lock().await;
        let listed = {
            let state = self.state.borrow();
            if change.is_none()
                && state.pending_root.is_none()
                && !state.is_short_of_numbers()
                && state.checkpoint == state.root.checkpoint
            {
                return Ok(state.listed.clone());
            }
            // Of the checkpoint that the next root names: nothing comes between here and its
            // capture.
            state.listed.clone()
        };
        let change = |root: &mut Root| {
            if let Some(change) = change {
                change(root);
            }
        };
        self.swap_once(change).await?;
        self.settle_root().await?;
        Ok(listed)
    }

    /// The next root, the revision that it replaces, and where replay begins from its checkpoint. A
    /// set that differs is wanted from here on:
    /// together with what [`State::pairs`] says this is the capture.
    fn next_root(
        &self,
        change: impl FnOnce(&mut Root),
    ) -> Result<(Root, u64, SegmentId), HeadError> {
        let mut state = self.state.borrow_mut();
        let known_in_force = state.pending_root.is_none() && state.root_in_force;
        let base = state.pending_root.as_ref().unwrap_or(&state.root);
        let mut new = base.clone();
        change(&mut new);
        new.former = rules::former_sets(&base.set, &base.former, known_in_force)
            .into_iter()
            .filter(|set| *set != new.set)
            .collect();
        new.sequence += 1;
        new.checkpoint.clone_from(&state.checkpoint);
        if state.is_short_of_numbers() {
            new.range.1 += SEGMENT_RANGE;
        }
        if new.set != base.set {
            let open = state.unsealed_sets();
            if !rules::may_swap_set(&base.set, &new.set, &open)
                && !bug(Bug::WidthIgnoresOpenSegments)
            {
                return Err(HeadError::Set("a log segment would be missed"));
            }
            if new.encode().len() > MIRROR_BYTES_MAX {
                return Err(HeadError::Set("the root would be too large"));
            }
            state.wanted = Some(new.set.clone());
        }
        Ok((new, state.root_revision, state.checkpoint_log))
    }

    /// Swaps the root once; what is swapped in is pending until it is in force.
    async fn swap_once(&self, change: impl FnOnce(&mut Root)) -> Result<(), HeadError> {
        let (new, revision, log) = self.next_root(change)?;
        let swapped = swap(&*self.store, &new, revision).await;
        let mut state = self.state.borrow_mut();
        // Known not to have been made, or bound by the pending root from now on.
        state.wanted = None;
        match swapped? {
            Swapped::Lost => {
                drop(state);
                self.stop("another head swapped the root");
                Err(HeadError::Stopped("another head swapped the root".into()))
            }
            Swapped::Gone => {
                drop(state);
                self.abandon("the volume was deleted");
                Err(HeadError::Stopped("the volume was deleted".into()))
            }
            Swapped::Ours(revision) => {
                state.root_revision = revision;
                state.pending_log = log;
                state.pending_root = Some(new);
                Ok(())
            }
        }
    }

    /// Waits until a swapped root is in force, then uses it. Where too many of its disks stay away
    /// it is followed by a narrower one.
    async fn settle_root(self: &Rc<Self>) -> Result<(), HeadError> {
        let since = Instant::now();
        loop {
            if let Some(why) = self.stopped() {
                return Err(HeadError::Stopped(why));
            }
            let pending = self.state.borrow().pending_root.clone();
            let Some(new) = pending else { return Ok(()) };
            let mirrored = match mirror(&self.disks, self.authority, &new).await {
                Ok(mirrored) => mirrored,
                Err(epoch) => {
                    self.stop(&format!("fenced by epoch {epoch}"));
                    continue;
                }
            };
            let in_force = rules::in_force(&new.set, &new.former, &mirrored);
            if in_force || bug(Bug::SkipFence) {
                self.use_root(new);
                return Ok(());
            }
            let narrower = (since.elapsed() >= self.config.shrink_after)
                .then(|| self.narrower(&mirrored))
                .flatten();
            if let Some(set) = narrower {
                tracing::warn!(volume = %self.volume, ?set, "a root that is not in force is followed by a narrower one");
                // If it is not made, the one that is pending may still come into force.
                if let Err(error @ HeadError::Stopped(_)) =
                    self.swap_once(|root| root.set = set).await
                {
                    return Err(error);
                }
            }
            tokio::time::sleep(RETRY).await;
        }
    }

    fn use_root(&self, new: Root) {
        let mut state = self.state.borrow_mut();
        state.root = new;
        state.root_in_force = true;
        state.pending_root = None;
        let log = state.pending_log;
        state.root_log = log;
        state.open_sets.retain(|id, _| *id >= log);
        drop(state);
        self.wake.notify_one();
        // While it was pending, the set was not looked at.
        self.width_wanted.notify_waiters();
    }

    /// What the newest root's set can shrink to if only these disks are reachable.
    pub(super) fn narrower(&self, reachable: &BTreeSet<DiskId>) -> Option<LogSet> {
        let state = self.state.borrow();
        let known_in_force = state.pending_root.is_none() && state.root_in_force;
        let base = state.pending_root.as_ref().unwrap_or(&state.root);
        let former = rules::former_sets(&base.set, &base.former, known_in_force);
        rules::shrunk(&base.set, &former, reachable, Some(&state.unsealed_sets()))
    }
}

impl State {
    /// Write sets of the log segments that the newest checkpoint does not list as sealed with all
    /// that they hold.
    pub(super) fn unsealed_sets(&self) -> Vec<BTreeSet<DiskId>> {
        self.open_sets.range(self.checkpoint_log..).map(|(_, set)| set.clone()).collect()
    }

    /// Whether the next root grants more segment numbers.
    fn is_short_of_numbers(&self) -> bool {
        let range = self.pending_root.as_ref().unwrap_or(&self.root).range;
        self.next_segment + SEGMENT_RANGE / 4 > range.1
    }
}
