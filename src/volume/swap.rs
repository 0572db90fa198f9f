//! Swapping the root: compare-and-swap with outcomes that may be unknown, and being in force.
//!
//! One swap is under way at a time, and it is not begun anew before its outcome is known, however
//! long that takes. Nothing else waits for it: the head goes on writing and making checkpoints, and
//! only what a checkpoint frees stays until the root names it.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Notify;

use super::head::{Head, HeadError};
use super::root::Root;
use super::rules;
use super::segtab::ShardRef;
use crate::id::{DiskId, SegmentId};
use crate::limits::SEGMENT_RANGE;
use crate::meta::{Condition, MetaError, MetaStore, Txn, TxnOutcome, schema};
use crate::planted::{Bug, bug};
use crate::shard::disks::Disks;
use crate::shard::{Authority, ShardError};

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
                Ok(None) => return Ok(Swapped::Lost),
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
pub(super) async fn mirror(disks: &Disks, authority: Authority, root: &Root) -> BTreeSet<DiskId> {
    let mirror = root.mirror();
    let members: BTreeSet<DiskId> = std::iter::once(&root.set)
        .chain(&root.former)
        .flat_map(|set| set.members().iter().map(|m| m.disk))
        .collect();
    let requests = members.into_iter().filter_map(|disk| {
        let client = disks.client(disk)?;
        let mirror = mirror.clone();
        Some(async move {
            let request = client.mirror(authority, mirror);
            match tokio::time::timeout(MIRROR_PATIENCE, request).await {
                Ok(Ok(())) => Some(disk),
                Ok(Err(error @ ShardError::Fenced(_))) => {
                    tracing::debug!(%disk, %error, "mirror refused");
                    None
                }
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
    /// Wakes the task that makes the root name the newest checkpoint.
    pub(super) wanted: Notify,
    /// A checkpoint was wanted that can wait until the root names the last one.
    deferred: Cell<bool>,
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
        if bug(Bug::FreeBeforeSwap) {
            let listed = self.state.borrow().listed.clone();
            self.delete_freed(&listed).await;
        }
        let mut listed = self.swap_in_task(None::<fn(&mut Root)>).await?;
        listed.retain(|shard| self.state.borrow().table.freed.contains(shard));
        self.delete_freed(&listed).await;
        self.gc_wanted.notify_one();
        if self.swaps.deferred.take() {
            self.checkpoint_wanted.notify_one();
        }
        Ok(())
    }

    /// Whether a checkpoint that is wanted may wait because the root does not name the last one
    /// yet, and neither overlay nor log have grown since. It is made when the root does.
    pub(super) fn defers_checkpoint(&self) -> bool {
        let state = self.state.borrow();
        let grown = state.overlay.len() >= self.config.overlay_extents_max / 2
            || state.log_blocks >= self.config.checkpoint_log_blocks;
        let waits = state.checkpoint != state.root.checkpoint && !grown;
        if waits {
            self.swaps.deferred.set(true);
            self.swaps.wanted.notify_one();
        }
        waits
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
        self.swap_in_task(Some(change)).await.map(|_| ())
    }

    /// A swap goes on to its end when its caller is gone: given up half-way, its sequence would be
    /// used for another root, and the one be taken for the other. Only a head that stops for good
    /// leaves it.
    async fn swap_in_task(
        self: &Rc<Self>,
        change: Option<impl FnOnce(&mut Root) + 'static>,
    ) -> Result<Vec<(SegmentId, ShardRef)>, HeadError> {
        let head = self.clone();
        let task = tokio::task::spawn_local(async move {
            tokio::select! {
                biased;
                why = head.until_stopped() => Err(HeadError::Stopped(why)),
                result = head.swap_steps(change) => result,
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
        let (new, revision, listed) = {
            let state = self.state.borrow();
            let short = state.next_segment + SEGMENT_RANGE / 4 > state.root.range.1;
            if change.is_none() && !short && state.checkpoint == state.root.checkpoint {
                return Ok(state.listed.clone());
            }
            let mut new = state.root.clone();
            if let Some(change) = change {
                change(&mut new);
            }
            new.former =
                rules::former_sets(&state.root.set, &state.root.former, state.root_in_force)
                    .into_iter()
                    .filter(|set| *set != new.set)
                    .collect();
            new.sequence += 1;
            new.checkpoint.clone_from(&state.checkpoint);
            if short {
                new.range.1 += SEGMENT_RANGE;
            }
            (new, state.root_revision, state.listed.clone())
        };
        match swap(&*self.store, &new, revision).await? {
            Swapped::Lost => {
                self.stop("another head swapped the root");
                return Err(HeadError::Stopped("another head swapped the root".into()));
            }
            Swapped::Ours(revision) => {
                let mut state = self.state.borrow_mut();
                state.root_revision = revision;
                state.pending_root = Some(new.clone());
            }
        }
        self.settle_root(new).await;
        Ok(listed)
    }

    /// Waits until a swapped root is in force, then uses it.
    async fn settle_root(&self, new: Root) {
        loop {
            let mirrored = mirror(&self.disks, self.authority, &new).await;
            let in_force = rules::in_force(&new.set, &new.former, &mirrored);
            if in_force || bug(Bug::SkipFence) {
                break;
            }
            tokio::time::sleep(RETRY).await;
        }
        let mut state = self.state.borrow_mut();
        state.root = new;
        state.root_in_force = true;
        state.pending_root = None;
    }
}
