//! A copy of the keys with some prefixes, kept up to date: what a node knows of its cluster.
//!
//! One task per prefix lists, watches from there on, and begins again whenever the watch ends. While the
//! store is away the copy stays as it was, and says since when it may be old.
//!
//! # Invariants
//!
//! - The keys of one prefix are those of one revision; different prefixes may be of different ones.
//! - A copy that lacks a prefix altogether says so ([`Follower::is_complete`]): what is not there is not
//!   known to be missing.
//! - A store that went back, is another one or was rebuilt is not followed any more, for good: the copy stays as it
//!   was, and for whoever asks the store does not answer ([`Follower::replaced`] says why).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::schema::CLUSTER_KEY;
use super::{MetaError, MetaResult, MetaStore, StoreIdentity, Versioned, WatchError};

/// Pause after the store did not answer.
const PAUSE: Duration = Duration::from_millis(200);
/// How often a store that has nothing to tell is asked whether it is there.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long the store may take to answer that.
const LOOK_PATIENCE: Duration = Duration::from_secs(2);
/// So many refusals on end are no coincidence of a store that went away between two requests.
const REFUSALS: u32 = 3;

fn is_away(error: &MetaError) -> bool {
    matches!(error, MetaError::Unavailable(_) | MetaError::Unknown(_))
}

/// The copy.
pub struct Follower {
    keys: RefCell<BTreeMap<String, Versioned>>,
    listed: RefCell<BTreeMap<&'static str, bool>>,
    /// Since when the store has answered without a break.
    answers_since: Cell<Option<Instant>>,
    /// Newest that was seen of the store.
    newest: Cell<Option<StoreIdentity>>,
    replaced: RefCell<Option<String>>,
    /// How often on end it said who it is, and refused to tell anything else.
    refusals: Cell<u32>,
    /// Told whenever a key changes.
    pub changed: Notify,
}

impl Follower {
    /// Follows `prefixes` of `store` until the copy is dropped.
    pub fn follow(store: &Rc<dyn MetaStore>, prefixes: &[&'static str]) -> Rc<Self> {
        let copy = Rc::new(Self {
            keys: RefCell::default(),
            listed: RefCell::new(prefixes.iter().map(|prefix| (*prefix, false)).collect()),
            answers_since: Cell::default(),
            newest: Cell::default(),
            replaced: RefCell::default(),
            refusals: Cell::default(),
            changed: Notify::new(),
        });
        for &prefix in prefixes {
            let (weak, store) = (Rc::downgrade(&copy), store.clone());
            tokio::task::spawn_local(async move {
                while weak.upgrade().is_some_and(|copy| copy.replaced().is_none()) {
                    if let Err(error) = Self::follow_once(&weak, &*store, prefix).await {
                        tracing::debug!(prefix, %error, "the store is not followed");
                    }
                    sleep(PAUSE).await;
                }
            });
        }
        let (weak, store) = (Rc::downgrade(&copy), store.clone());
        tokio::task::spawn_local(async move {
            while let Some(copy) = weak.upgrade() {
                let look = timeout(LOOK_PATIENCE, copy.look(&*store)).await;
                copy.note_answer(look.unwrap_or(false));
                drop(copy);
                sleep(LOOK_EVERY).await;
            }
        });
        copy
    }

    fn note_answer(&self, answered: bool) {
        let since = self.answers_since.get();
        self.answers_since.set(answered.then(|| since.unwrap_or_else(Instant::now)));
    }

    /// Whether the store answers, and is the one that is known.
    async fn look(&self, store: &dyn MetaStore) -> bool {
        let before = self.newest.get();
        let there = match store.identity().await {
            Ok(identity) => self.note_identity(before, identity),
            Err(MetaError::Uninitialised) => before.is_none(),
            Err(error) => !is_away(&error),
        };
        // A client that knows its store to be replaced tells who it is, and nothing else.
        let refusal = store.get(CLUSTER_KEY).await.err().filter(|error| there && is_away(error));
        let Some(refusal) = refusal else {
            self.refusals.set(0);
            return there;
        };
        self.refusals.set(self.refusals.get() + 1);
        if self.refusals.get() >= REFUSALS && self.replaced().is_none() {
            self.give_up(refusal.to_string());
        }
        false
    }

    fn give_up(&self, why: String) {
        tracing::error!(why, "the metadata store was replaced: what is in it is not believed");
        *self.replaced.borrow_mut() = Some(why);
    }

    /// Compares what a store says to be with what was known before it was asked; whether it is the same one.
    fn note_identity(&self, before: Option<StoreIdentity>, now: StoreIdentity) -> bool {
        let Some(before) = before else {
            self.newest.set(Some(now));
            return true;
        };
        let why = if before.cluster != now.cluster {
            format!("it is that of cluster {}, not {}", now.cluster, before.cluster)
        } else if before.incarnation != now.incarnation {
            format!("it was rebuilt (incarnation {}, not {})", now.incarnation, before.incarnation)
        } else if now.revision < before.revision {
            format!("it went back from revision {} to {}", before.revision, now.revision)
        } else {
            let known = self.newest.get().map_or(0, |newest| newest.revision);
            self.newest.set(Some(StoreIdentity { revision: now.revision.max(known), ..now }));
            return self.replaced().is_none();
        };
        if self.replaced().is_none() {
            self.give_up(why);
        }
        false
    }

    /// Notes a revision that an answer shows; whether it may be that of the store that was known `before` it
    /// was asked.
    fn note_revision(&self, before: Option<StoreIdentity>, revision: u64) -> bool {
        match before {
            Some(before) => self.note_identity(Some(before), StoreIdentity { revision, ..before }),
            None => self.replaced().is_none(),
        }
    }

    /// Why the store is not followed any more; none while it is.
    pub fn replaced(&self) -> Option<String> {
        self.replaced.borrow().clone()
    }

    async fn follow_once(
        weak: &std::rc::Weak<Self>,
        store: &dyn MetaStore,
        prefix: &'static str,
    ) -> MetaResult<()> {
        let before = weak.upgrade().and_then(|copy| copy.newest.get());
        let listing = store.list(prefix).await?;
        if !weak.upgrade().is_some_and(|copy| copy.note_revision(before, listing.revision)) {
            return Ok(());
        }
        let mut watch = store.watch(prefix, listing.revision + 1).await?;
        {
            let Some(copy) = weak.upgrade() else { return Ok(()) };
            let mut keys = copy.keys.borrow_mut();
            keys.retain(|key, _| !key.starts_with(prefix));
            keys.extend(listing.entries);
            drop(keys);
            copy.listed.borrow_mut().insert(prefix, true);
            copy.changed.notify_waiters();
        }
        loop {
            let changes = match watch.next().await {
                Ok(changes) => changes,
                Err(WatchError::Lagged | WatchError::Compacted(_) | WatchError::Closed) => {
                    return Ok(());
                }
            };
            let Some(copy) = weak.upgrade() else { return Ok(()) };
            let first = copy.newest.get().map(|newest| StoreIdentity { revision: 0, ..newest });
            if !copy.note_revision(first, changes.revision) {
                return Ok(());
            }
            let mut keys = copy.keys.borrow_mut();
            for event in &changes.events {
                match &event.value {
                    Some(value) => {
                        let new = Versioned { value: value.clone(), revision: changes.revision };
                        keys.insert(event.key.clone(), new);
                    }
                    None => drop(keys.remove(&event.key)),
                }
            }
            drop(keys);
            copy.changed.notify_waiters();
        }
    }

    /// Whether every prefix was listed at least once.
    pub fn is_complete(&self) -> bool {
        self.listed.borrow().values().all(|listed| *listed)
    }

    /// How long the store has answered without a break; none while it does not.
    pub fn answers_for(&self) -> Option<Duration> {
        self.answers_since.get().map(|since| since.elapsed())
    }

    /// Calls `each` with the keys that start with `prefix`, without it, sorted.
    pub fn each(&self, prefix: &str, mut each: impl FnMut(&str, &Versioned)) {
        let keys = self.keys.borrow();
        let from = keys.range(prefix.to_owned()..);
        for (key, found) in from.take_while(|(key, _)| key.starts_with(prefix)) {
            each(&key[prefix.len()..], found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::Env;
    use crate::id::ClusterId;
    use crate::meta::Txn;
    use crate::meta::memory::MemoryStore;
    use crate::meta::record::ClusterRecord;
    use tokio::task::LocalSet;

    fn names(copy: &Follower, prefix: &str) -> Vec<(String, Vec<u8>)> {
        let mut found = Vec::new();
        copy.each(prefix, |key, value| found.push((key.to_owned(), value.value.to_vec())));
        found
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_was_replaced_is_not_followed() {
        let local = LocalSet::new();
        local
            .run_until(async {
                let memory = MemoryStore::new(Env::from_seed(1));
                let store: Rc<dyn MetaStore> = Rc::new(memory.client(Rc::default()));
                let record = ClusterRecord { id: ClusterId::from_bytes([7; 16]), incarnation: 1 };
                let record = crate::meta::record::encode(&record).expect("a record");
                let txn = Txn::new().put(CLUSTER_KEY, record).put("/a/1", "x");
                store.txn(txn).await.expect("made");
                let old = memory.snapshot();
                let copy = Follower::follow(&store, &["/a/"]);
                store.txn(Txn::new().put("/a/2", "y")).await.expect("made");
                sleep(Duration::from_secs(3)).await;
                assert!(copy.answers_for().is_some() && copy.replaced().is_none());
                memory.restore(&old);
                sleep(Duration::from_secs(6)).await;
                assert!(copy.answers_for().is_none() && copy.replaced().is_some());
                assert_eq!(names(&copy, "/a/").len(), 2, "it stays as it was");
            })
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_copy_is_what_the_store_holds() {
        let local = LocalSet::new();
        local
            .run_until(async {
                let memory = MemoryStore::new(Env::from_seed(1));
                let store: Rc<dyn MetaStore> = Rc::new(memory.client(Rc::default()));
                store.txn(Txn::new().put("/a/1", "x").put("/b/1", "y")).await.expect("made");
                let copy = Follower::follow(&store, &["/a/", "/b/"]);
                assert!(!copy.is_complete());
                sleep(Duration::from_secs(3)).await;
                assert!(copy.is_complete() && copy.answers_for().is_some());
                let txn = Txn::new().put("/a/2", "z").delete("/b/1").put("/c/1", "not followed");
                store.txn(txn).await.expect("made");
                sleep(Duration::from_secs(1)).await;
                assert_eq!(
                    names(&copy, "/a/"),
                    [("1".into(), b"x".to_vec()), ("2".into(), b"z".to_vec())]
                );
                assert!(names(&copy, "/b/").is_empty() && names(&copy, "/c/").is_empty());
            })
            .await;
    }
}
