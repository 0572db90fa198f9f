//! Swapping the root: compare-and-swap with outcomes that may be unknown, and being in force.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;

use super::head::{Head, HeadError};
use super::root::Root;
use super::rules;
use crate::id::DiskId;
use crate::limits::SEGMENT_RANGE;
use crate::meta::{Condition, MetaError, MetaStore, Txn, TxnOutcome, schema};
use crate::planted::{Bug, bug};
use crate::shard::disks::Disks;
use crate::shard::{Authority, ShardError};

/// Pause before a request to the store is tried again.
const RETRY: Duration = Duration::from_millis(100);
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

impl Head {
    /// Swaps the root to the newest checkpoint (and a longer range of numbers where they run
    /// short) and waits until it is in force.
    ///
    /// # Errors
    /// [`HeadError::Meta`] while the store is away; [`HeadError::Stopped`] when the volume was
    /// lost.
    pub(super) async fn swap_checkpoint(self: &Rc<Self>) -> Result<(), HeadError> {
        self.swap_root(|_| ()).await
    }

    /// Swaps the root with a change of its own besides the checkpoint.
    pub(super) async fn swap_root(
        self: &Rc<Self>,
        change: impl FnOnce(&mut Root),
    ) -> Result<(), HeadError> {
        let (new, revision) = {
            let state = self.state.borrow();
            let mut new = state.root.clone();
            change(&mut new);
            new.former =
                rules::former_sets(&state.root.set, &state.root.former, state.root_in_force)
                    .into_iter()
                    .filter(|set| *set != new.set)
                    .collect();
            new.sequence += 1;
            new.checkpoint.clone_from(&state.checkpoint);
            if state.next_segment + SEGMENT_RANGE / 4 > new.range.1 {
                new.range.1 += SEGMENT_RANGE;
            }
            (new, state.root_revision)
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
        self.settle_root(new).await
    }

    /// Waits until a swapped root is in force, then uses it.
    async fn settle_root(self: &Rc<Self>, new: Root) -> Result<(), HeadError> {
        loop {
            if let Some(why) = self.stopped() {
                return Err(HeadError::Stopped(why));
            }
            let mirrored = mirror(&self.disks, self.authority, &new).await;
            if rules::in_force(&new.set, &new.former, &mirrored) {
                break;
            }
            tokio::time::sleep(RETRY).await;
        }
        let mut state = self.state.borrow_mut();
        state.root = new;
        state.root_in_force = true;
        state.pending_root = None;
        Ok(())
    }
}
