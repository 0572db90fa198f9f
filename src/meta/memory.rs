//! A metadata store in memory, for the simulation: same rules as every backend, with faults.
//!
//! As with [etcd](super::etcd), a client whose store was replaced ([`MemoryStore::restore`], [`MemoryStore::wipe`])
//! refuses everything but [`MetaStore::identity`].
//!
//! Several clients ([`MemoryStore::client`]) may share one content, each with its own faults, as
//! nodes share an etcd. Faults are drawn from the seeded [`Env`]; a client without faults draws
//! nothing and never waits. A change that is under way goes on when its future is dropped, and a
//! change whose outcome was reported unknown may still be made later.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

use super::state::{Content, Outlet, State};
use super::{
    LeaseId, Listing, LocalFuture, MetaError, MetaResult, MetaStore, StoreIdentity, Txn,
    TxnOutcome, Versioned, Watch, WatchError,
};
use crate::env::Env;

/// Denominator of all chances in [`Faults`].
pub const CHANCE_ONE: u64 = 1000;

/// Faults between one client and the store. All off by default.
#[derive(Debug, Default)]
pub struct Faults {
    /// Every request is refused, definitely not done.
    pub unavailable: Cell<bool>,
    /// Chance, in thousandths, that a change is made but its outcome reported as unknown.
    pub unknown_applied: Cell<u64>,
    /// Chance that a change is not made and its outcome reported as unknown.
    pub unknown_lost: Cell<u64>,
    /// Chance that a change's outcome is reported as unknown and the change is made later, if its
    /// conditions still hold then: up to [`Faults::late`] after the report.
    pub unknown_late: Cell<u64>,
    /// How late a late change may be.
    pub late: Cell<Duration>,
    /// Least and greatest time that a request takes; half of it passes before the change.
    pub delay: Cell<(Duration, Duration)>,
    /// Watches that are begun hear nothing while the store is unavailable, and end when
    /// [`Faults::lose_watches`] says so. Otherwise they always hear everything at once.
    pub watches_suffer: Cell<bool>,
    watches_lost: Cell<u64>,
    watches_told: Notify,
}

impl Faults {
    /// Ends all watches, as if the store had compacted what they missed.
    pub fn lose_watches(&self) {
        self.watches_lost.set(self.watches_lost.get() + 1);
        self.watches_told.notify_waiters();
    }

    /// The store goes away from this client, or is back.
    pub fn set_unavailable(&self, unavailable: bool) {
        self.unavailable.set(unavailable);
        self.watches_told.notify_waiters();
    }

    /// Hands changes on while the store is there, until nobody listens or the watch is lost.
    async fn relay(&self, mut watch: Watch, outlet: Outlet) {
        let lost = self.watches_lost.get();
        loop {
            let told = self.watches_told.notified();
            if self.watches_lost.get() != lost {
                return outlet.end(WatchError::Compacted(0));
            }
            let there = !self.unavailable.get();
            tokio::select! {
                biased;
                () = outlet.closed() => return,
                () = told => {}
                changes = watch.next(), if there => match changes {
                    Ok(changes) if outlet.send(&changes) => {}
                    Ok(_) => return,
                    Err(error) => return outlet.end(error),
                },
            }
        }
    }

    /// Switches all faults and delays off.
    pub fn heal(&self) {
        self.set_unavailable(false);
        self.unknown_applied.set(0);
        self.unknown_lost.set(0);
        self.unknown_late.set(0);
        self.late.set(Duration::ZERO);
        self.delay.set((Duration::ZERO, Duration::ZERO));
    }
}

/// The content of a store at some time.
#[derive(Debug, Clone)]
pub struct Snapshot(Content);

#[derive(Default)]
struct Shared {
    state: RefCell<State>,
    /// Raised when the content is replaced: what was sent to the old content is void.
    generation: Cell<u64>,
    /// Whether a task waits for the next lease to end.
    expiring: Cell<bool>,
}

/// What becomes of a change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Done,
    UnknownApplied,
    UnknownLost,
    UnknownLate(Duration),
}

/// A client of a store in memory. Must run within a [`tokio::task::LocalSet`].
pub struct MemoryStore {
    shared: Rc<Shared>,
    faults: Rc<Faults>,
    env: Env,
    /// Which content it first asked for something.
    known: Cell<Option<u64>>,
}

impl MemoryStore {
    /// An empty store, and a client without faults.
    pub fn new(env: Env) -> Self {
        Self { shared: Rc::default(), faults: Rc::default(), env, known: Cell::default() }
    }

    /// Another client of the same store, with faults of its own.
    #[must_use]
    pub fn client(&self, faults: Rc<Faults>) -> Self {
        let (shared, env) = (Rc::clone(&self.shared), self.env.clone());
        Self { shared, faults, env, known: Cell::default() }
    }

    /// The faults of this client.
    pub fn faults(&self) -> &Rc<Faults> {
        &self.faults
    }

    /// What the store holds now.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.with(|state| Snapshot(state.content().clone()))
    }

    /// Puts an older content back, revision and all; watches end, and what is under way is lost.
    /// Leases go on with the deadlines they had when the snapshot was made.
    pub fn restore(&self, snapshot: &Snapshot) {
        self.shared.replace(State::new(snapshot.0.clone()));
        self.shared.expire_in_background();
    }

    /// Ends the lease that a key is bound to, if there is one: as if its holder had not renewed it.
    pub fn end_lease_of(&self, key: &str) {
        self.shared.with(|state| {
            let lease = state.content().entries.get(key).and_then(|entry| entry.lease);
            // It was just seen.
            lease.is_some_and(|lease| state.lease_revoke(lease).is_ok())
        });
        self.shared.publish();
    }

    /// Ends the leases whose time is over, and tells watchers. Otherwise that happens when somebody
    /// asks for something.
    pub fn tick(&self) {
        self.shared.with(|_| ());
        self.shared.publish();
    }

    /// The value of a key as it is now, past all faults.
    pub fn peek(&self, key: &str) -> Option<Versioned> {
        self.shared.with(|state| state.get(key)).ok().flatten()
    }

    /// Loses everything.
    pub fn wipe(&self) {
        self.shared.replace(State::default());
    }

    fn time(&self) -> (Duration, Duration) {
        let (least, greatest) = self.faults.delay.get();
        let total = least + self.random_duration(greatest.saturating_sub(least));
        (total / 2, total.saturating_sub(total / 2))
    }

    fn random_duration(&self, max: Duration) -> Duration {
        let nanos = u64::try_from(max.as_nanos()).unwrap_or(u64::MAX);
        if nanos == 0 { Duration::ZERO } else { Duration::from_nanos(self.env.random_below(nanos)) }
    }

    fn fate(&self) -> Fate {
        let hit = |chance: u64| chance > 0 && self.env.chance(chance, CHANCE_ONE);
        if hit(self.faults.unknown_applied.get()) {
            Fate::UnknownApplied
        } else if hit(self.faults.unknown_lost.get()) {
            Fate::UnknownLost
        } else if hit(self.faults.unknown_late.get()) {
            Fate::UnknownLate(self.random_duration(self.faults.late.get()))
        } else {
            Fate::Done
        }
    }

    fn check_available(&self) -> MetaResult<()> {
        if self.faults.unavailable.get() {
            return Err(MetaError::Unavailable("no connection".into()));
        }
        Ok(())
    }

    fn check_usable(&self) -> MetaResult<()> {
        self.check_available()?;
        let now = self.shared.generation.get();
        if self.known.get().unwrap_or(now) != now {
            return Err(MetaError::Unavailable("its content was replaced".into()));
        }
        self.known.set(Some(now));
        Ok(())
    }

    fn read<T: 'static>(
        &self,
        request: impl FnOnce(&mut State) -> MetaResult<T> + 'static,
    ) -> LocalFuture<'_, MetaResult<T>> {
        Box::pin(async move {
            self.check_usable()?;
            let answer = self.read_whatever(request).await;
            self.check_usable()?;
            answer
        })
    }

    async fn read_whatever<T: 'static>(
        &self,
        request: impl FnOnce(&mut State) -> MetaResult<T> + 'static,
    ) -> MetaResult<T> {
        self.check_available()?;
        let (before, after) = self.time();
        pause(before).await;
        let answer = self.shared.with(request);
        pause(after).await;
        self.check_available()?;
        answer
    }

    /// Makes a change, which goes on in a task of its own as soon as it takes time.
    fn change<T: 'static>(
        &self,
        request: impl FnOnce(&mut State) -> MetaResult<T> + 'static,
    ) -> LocalFuture<'_, MetaResult<T>> {
        Box::pin(async move {
            self.check_usable()?;
            let (before, after) = self.time();
            let fate = self.fate();
            let shared = Rc::clone(&self.shared);
            let generation = shared.generation.get();
            let late =
                if let Fate::UnknownLate(late) = fate { after + late } else { Duration::ZERO };
            let apply = async move {
                pause(before + late).await;
                if fate == Fate::UnknownLost || shared.generation.get() != generation {
                    return Err(MetaError::Unknown("no answer".into()));
                }
                let answer = shared.with(request);
                shared.publish();
                answer
            };
            let answer = if (before + late).is_zero() {
                apply.await
            } else {
                let task = tokio::task::spawn_local(apply);
                if let Fate::UnknownLate(_) = fate {
                    pause(before + after).await;
                    return Err(MetaError::Unknown("no answer".into()));
                }
                task.await.unwrap_or_else(|_| Err(MetaError::Unknown("no answer".into())))
            };
            pause(after).await;
            if fate != Fate::Done {
                return Err(MetaError::Unknown("no answer".into()));
            }
            if self.faults.unavailable.get() {
                return Err(MetaError::Unknown("the connection broke".into()));
            }
            answer
        })
    }
}

async fn pause(time: Duration) {
    if !time.is_zero() {
        sleep(time).await;
    }
}

impl Shared {
    fn with<T>(&self, request: impl FnOnce(&mut State) -> T) -> T {
        let answer = {
            let mut state = self.state.borrow_mut();
            state.expire(Instant::now());
            state.publish();
            request(&mut state)
        };
        // A backend that has a file would write here what is dirty.
        self.state.borrow_mut().take_dirty();
        answer
    }

    fn publish(&self) {
        self.state.borrow_mut().publish();
    }

    fn replace(&self, state: State) {
        self.generation.set(self.generation.get() + 1);
        *self.state.borrow_mut() = state;
    }

    /// Ends leases when their time is over, so that watchers hear of it.
    fn expire_in_background(self: &Rc<Self>) {
        if self.expiring.replace(true) {
            return;
        }
        let shared = Rc::downgrade(self);
        tokio::task::spawn_local(async move {
            while let Some(deadline) = next_deadline(&shared) {
                sleep_until(deadline).await;
            }
        });
    }
}

/// Ends what is over and gives the next deadline; none when no lease or no store is left.
fn next_deadline(shared: &Weak<Shared>) -> Option<Instant> {
    let shared = shared.upgrade()?;
    let deadline = shared.with(|state| state.next_deadline());
    if deadline.is_none() {
        shared.expiring.set(false);
    }
    deadline
}

impl MetaStore for MemoryStore {
    fn get(&self, key: &str) -> LocalFuture<'_, MetaResult<Option<Versioned>>> {
        let key = key.to_owned();
        self.read(move |state| state.get(&key))
    }

    fn list(&self, prefix: &str) -> LocalFuture<'_, MetaResult<Listing>> {
        let prefix = prefix.to_owned();
        self.read(move |state| state.list(&prefix))
    }

    fn txn(&self, txn: Txn) -> LocalFuture<'_, MetaResult<TxnOutcome>> {
        self.change(move |state| state.txn(txn))
    }

    fn watch(&self, prefix: &str, from: u64) -> LocalFuture<'_, MetaResult<Watch>> {
        let prefix = prefix.to_owned();
        let watch = self.read(move |state| state.watch(&prefix, from));
        if !self.faults.watches_suffer.get() {
            return watch;
        }
        let faults = self.faults.clone();
        Box::pin(async move {
            let inner = watch.await?;
            let (outlet, outer) = Outlet::new();
            tokio::task::spawn_local(async move { faults.relay(inner, outlet).await });
            Ok(outer)
        })
    }

    fn lease_grant(&self, ttl: Duration) -> LocalFuture<'_, MetaResult<LeaseId>> {
        let shared = Rc::clone(&self.shared);
        let grant = self.change(move |state| state.lease_grant(ttl, Instant::now()));
        Box::pin(async move {
            let lease = grant.await;
            shared.expire_in_background();
            lease
        })
    }

    fn lease_keep_alive(&self, lease: LeaseId) -> LocalFuture<'_, MetaResult<Duration>> {
        self.change(move |state| state.lease_keep_alive(lease, Instant::now()))
    }

    fn lease_revoke(&self, lease: LeaseId) -> LocalFuture<'_, MetaResult<()>> {
        self.change(move |state| state.lease_revoke(lease))
    }

    fn identity(&self) -> LocalFuture<'_, MetaResult<StoreIdentity>> {
        Box::pin(self.read_whatever(|state| state.identity()))
    }
}

#[cfg(test)]
#[path = "memory_tests.rs"]
mod tests;
