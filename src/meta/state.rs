//! The content of a store in memory: the rules of transactions, leases and watches, once for all
//! backends that run in this process. It does no I/O and reads no clock.
//!
//! # Invariants (checked by [`State::check`])
//!
//! - A key's revision is at most the store's.
//! - A key has a lease if and only if the lease has the key.
//! - `bytes` is the sum of all keys and values.
//! - Changes reach watchers only through [`State::publish`], which a backend calls once they are
//!   durable.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{
    Changes, Condition, Event, KEY_BYTES_MAX, LEASE_TTL_MAX, LEASES_MAX, LeaseId, Listing,
    MetaError, MetaResult, Op, STORE_BYTES_MAX, StoreIdentity, TXN_BYTES_MAX, TXN_OPS_MAX, Txn,
    TxnOutcome, VALUE_BYTES_MAX, Versioned, WATCH_LAG_MAX, WATCHERS_MAX, Watch, WatchError, record,
    schema,
};

/// Transactions whose changes are kept for watchers that come late.
const HISTORY_MAX: usize = WATCH_LAG_MAX;
/// Keys and values that the history holds at most, bytes.
const HISTORY_BYTES_MAX: usize = 8 << 20;

/// A key's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) value: Bytes,
    pub(super) revision: u64,
    pub(super) lease: Option<LeaseId>,
}

#[derive(Debug, Clone)]
pub(super) struct Lease {
    pub(super) ttl: Duration,
    deadline: Instant,
    keys: BTreeSet<String>,
}

#[derive(Debug)]
struct Watcher {
    prefix: String,
    from: u64,
    outlet: Outlet,
}

/// The store's end of a [`Watch`].
#[derive(Debug)]
pub(super) struct Outlet(mpsc::Sender<Result<Arc<Changes>, WatchError>>);

impl Outlet {
    /// Both ends.
    pub(super) fn new() -> (Self, Watch) {
        // One place more than the lag allowed: the last one is for the reason of the end.
        let (sender, receiver) = mpsc::channel(WATCH_LAG_MAX + 1);
        (Self(sender), Watch { receiver, ended: None })
    }

    /// Hands changes over; whether the watch goes on.
    pub(super) fn send(&self, changes: &Arc<Changes>) -> bool {
        if self.0.capacity() <= 1 {
            self.end(WatchError::Lagged);
            return false;
        }
        self.0.try_send(Ok(Arc::clone(changes))).is_ok()
    }

    /// Says why the watch ends, after which nothing may follow.
    pub(super) fn end(&self, error: WatchError) {
        // It fails only if the watcher is gone, who then needs no reason.
        self.0.try_send(Err(error)).ok();
    }

    fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Returns when nobody listens any more.
    pub(super) async fn closed(&self) {
        self.0.closed().await;
    }
}

/// What a snapshot keeps: all but watchers, history and what is under way.
#[derive(Debug, Clone, Default)]
pub(super) struct Content {
    pub(super) revision: u64,
    pub(super) entries: BTreeMap<String, Entry>,
    pub(super) leases: BTreeMap<LeaseId, Lease>,
    pub(super) lease_last: u64,
}

/// What changed since the backend last asked, to be made durable.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    pub(super) keys: BTreeSet<String>,
    pub(super) leases: BTreeSet<LeaseId>,
}

impl Dirty {
    pub(super) fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.leases.is_empty()
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    content: Content,
    bytes: usize,
    dirty: Dirty,
    unpublished: Vec<Changes>,
    history: VecDeque<Arc<Changes>>,
    history_bytes: usize,
    /// Changes of this revision and older are not in the history.
    compacted: u64,
    watchers: Vec<Watcher>,
}

impl State {
    /// A store with this content and no history.
    pub(super) fn new(content: Content) -> Self {
        let bytes = content.entries.iter().map(|(key, entry)| key.len() + entry.value.len()).sum();
        let compacted = content.revision;
        Self { content, bytes, compacted, ..Self::default() }
    }

    /// Restores the links and clocks of leases that come from a file: each has its whole time.
    pub(super) fn link_leases(content: &mut Content) {
        for (key, entry) in &mut content.entries {
            let Some(id) = entry.lease else { continue };
            match content.leases.get_mut(&id) {
                Some(lease) => {
                    lease.keys.insert(key.clone());
                }
                None => entry.lease = None,
            }
        }
    }

    pub(super) fn lease_from_file(ttl: Duration, now: Instant) -> Lease {
        Lease { ttl, deadline: now + ttl, keys: BTreeSet::new() }
    }

    pub(super) fn content(&self) -> &Content {
        &self.content
    }

    pub(super) fn take_dirty(&mut self) -> Dirty {
        std::mem::take(&mut self.dirty)
    }

    pub(super) fn get(&self, key: &str) -> MetaResult<Option<Versioned>> {
        check_key(key)?;
        Ok(self.content.entries.get(key).map(Entry::versioned))
    }

    pub(super) fn list(&self, prefix: &str) -> MetaResult<Listing> {
        check_prefix(prefix)?;
        let entries =
            self.range(prefix).map(|(key, entry)| (key.clone(), entry.versioned())).collect();
        Ok(Listing { revision: self.content.revision, entries })
    }

    fn range<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a String, &'a Entry)> {
        self.content
            .entries
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
    }

    pub(super) fn identity(&self) -> MetaResult<StoreIdentity> {
        let entry =
            self.content.entries.get(schema::CLUSTER_KEY).ok_or(MetaError::Uninitialised)?;
        identity_of(&entry.value, self.content.revision)
    }

    /// Makes the changes if the conditions hold. On an error nothing changed.
    pub(super) fn txn(&mut self, txn: Txn) -> MetaResult<TxnOutcome> {
        check_txn(&txn)?;
        if !txn.conditions.iter().all(|condition| self.holds(condition)) {
            return Ok(TxnOutcome::Conflict);
        }
        let mut added = 0;
        for op in &txn.ops {
            if let Op::Put { key, value, lease } = op {
                if let Some(lease) = lease
                    && !self.content.leases.contains_key(lease)
                {
                    return Err(MetaError::LeaseNotFound(*lease));
                }
                added += key.len() + value.len();
            }
        }
        check_size("a store, in bytes,", self.bytes + added, STORE_BYTES_MAX)?;
        self.apply(txn.ops);
        Ok(TxnOutcome::Committed { revision: self.content.revision })
    }

    fn holds(&self, condition: &Condition) -> bool {
        let entries = &self.content.entries;
        match condition {
            Condition::KeyMissing(key) => !entries.contains_key(key),
            Condition::KeyExists(key) => entries.contains_key(key),
            Condition::KeyAt(key, revision) => {
                entries.get(key).is_some_and(|entry| entry.revision == *revision)
            }
            Condition::PrefixEmpty(prefix) => self.range(prefix).next().is_none(),
        }
    }

    pub(super) fn apply(&mut self, ops: Vec<Op>) {
        let revision = self.content.revision + 1;
        let mut events = Vec::new();
        for op in ops {
            match op {
                Op::Put { key, value, lease } => {
                    self.remove(&key);
                    self.bytes += key.len() + value.len();
                    if let Some(lease) = lease.and_then(|id| self.content.leases.get_mut(&id)) {
                        lease.keys.insert(key.clone());
                    }
                    self.dirty.keys.insert(key.clone());
                    events.push(Event { key: key.clone(), value: Some(value.clone()) });
                    self.content.entries.insert(key, Entry { value, revision, lease });
                }
                Op::Delete(key) => {
                    if self.remove(&key) {
                        self.dirty.keys.insert(key.clone());
                        events.push(Event { key, value: None });
                    }
                }
            }
        }
        if !events.is_empty() {
            self.content.revision = revision;
            self.unpublished.push(Changes { revision, events });
        }
    }

    fn remove(&mut self, key: &str) -> bool {
        let Some(old) = self.content.entries.remove(key) else { return false };
        self.bytes -= key.len() + old.value.len();
        if let Some(lease) = old.lease.and_then(|id| self.content.leases.get_mut(&id)) {
            lease.keys.remove(key);
        }
        true
    }

    pub(super) fn lease_grant(&mut self, ttl: Duration, now: Instant) -> MetaResult<LeaseId> {
        check_ttl(ttl)?;
        check_size("leases", self.content.leases.len() + 1, LEASES_MAX)?;
        self.content.lease_last += 1;
        let id = LeaseId(self.content.lease_last);
        self.content.leases.insert(id, Self::lease_from_file(ttl, now));
        self.dirty.leases.insert(id);
        Ok(id)
    }

    /// Must follow [`State::expire`] with the same `now`.
    pub(super) fn lease_keep_alive(&mut self, id: LeaseId, now: Instant) -> MetaResult<Duration> {
        let lease = self.content.leases.get_mut(&id).ok_or(MetaError::LeaseNotFound(id))?;
        lease.deadline = now + lease.ttl;
        Ok(lease.ttl)
    }

    pub(super) fn lease_revoke(&mut self, id: LeaseId) -> MetaResult<()> {
        let lease = self.content.leases.remove(&id).ok_or(MetaError::LeaseNotFound(id))?;
        self.dirty.leases.insert(id);
        self.apply(lease.keys.into_iter().map(Op::Delete).collect());
        Ok(())
    }

    /// Ends the leases whose time is over.
    pub(super) fn expire(&mut self, now: Instant) {
        let over = |lease: &Lease| lease.deadline <= now;
        let ids: Vec<LeaseId> =
            self.content.leases.iter().filter(|(_, l)| over(l)).map(|(id, _)| *id).collect();
        for id in ids {
            self.lease_revoke(id).expect("the lease was just seen");
        }
    }

    /// When the next lease ends, if none is kept alive before.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.content.leases.values().map(|lease| lease.deadline).min()
    }

    pub(super) fn watch(&mut self, prefix: &str, from: u64) -> MetaResult<Watch> {
        check_prefix(prefix)?;
        self.watchers.retain(|watcher| !watcher.outlet.is_closed());
        check_size("watchers", self.watchers.len() + 1, WATCHERS_MAX)?;
        let (outlet, watch) = Outlet::new();
        let from = if from == 0 { self.content.revision + 1 } else { from };
        let watcher = Watcher { prefix: prefix.to_owned(), from, outlet };
        if from <= self.compacted {
            watcher.outlet.end(WatchError::Compacted(self.compacted + 1));
        } else if self.history.iter().all(|changes| watcher.send(changes)) {
            self.watchers.push(watcher);
        }
        Ok(watch)
    }

    /// Tells watchers what changed; to be called when it is durable.
    pub(super) fn publish(&mut self) {
        for changes in std::mem::take(&mut self.unpublished) {
            let changes = Arc::new(changes);
            self.watchers.retain(|watcher| watcher.send(&changes));
            self.history_bytes += changes_bytes(&changes);
            self.history.push_back(changes);
            while self.history.len() > HISTORY_MAX || self.history_bytes > HISTORY_BYTES_MAX {
                let Some(oldest) = self.history.pop_front() else { break };
                self.history_bytes -= changes_bytes(&oldest);
                self.compacted = oldest.revision;
            }
        }
    }

    /// Panics if an invariant of the module does not hold.
    #[cfg(test)]
    pub(super) fn check(&self) {
        let content = &self.content;
        let bytes: usize = content.entries.iter().map(|(k, e)| k.len() + e.value.len()).sum();
        assert_eq!(bytes, self.bytes, "sum of keys and values");
        for (key, entry) in &content.entries {
            assert!(entry.revision <= content.revision, "{key} is of the future");
            if let Some(lease) = entry.lease {
                assert!(content.leases[&lease].keys.contains(key), "{key} has a lease");
            }
        }
        for (id, lease) in &content.leases {
            for key in &lease.keys {
                assert_eq!(content.entries[key].lease, Some(*id), "lease {id} has {key}");
            }
        }
    }
}

impl Entry {
    fn versioned(&self) -> Versioned {
        Versioned { value: self.value.clone(), revision: self.revision }
    }
}

impl Watcher {
    /// Whether the watch goes on.
    fn send(&self, changes: &Arc<Changes>) -> bool {
        if changes.revision < self.from {
            return true;
        }
        let seen = |event: &&Event| event.key.starts_with(&self.prefix);
        let events: Vec<Event> = changes.events.iter().filter(seen).cloned().collect();
        if events.is_empty() {
            return !self.outlet.is_closed();
        }
        let changes = if events.len() == changes.events.len() {
            Arc::clone(changes)
        } else {
            Arc::new(Changes { revision: changes.revision, events })
        };
        self.outlet.send(&changes)
    }
}

fn changes_bytes(changes: &Changes) -> usize {
    let bytes = |event: &Event| event.key.len() + event.value.as_ref().map_or(0, Bytes::len);
    changes.events.iter().map(bytes).sum()
}

/// Whether something is within its bound.
pub(super) fn check_size(what: &'static str, size: usize, max: usize) -> MetaResult<()> {
    if size > max { Err(MetaError::TooLarge { what, size, max }) } else { Ok(()) }
}

pub(super) fn check_prefix(prefix: &str) -> MetaResult<()> {
    check_size("a key, in bytes,", prefix.len(), KEY_BYTES_MAX)?;
    if prefix.contains('\0') {
        return Err(MetaError::Invalid(format!("the key {prefix:?} contains a NUL")));
    }
    Ok(())
}

pub(super) fn check_key(key: &str) -> MetaResult<()> {
    if key.is_empty() {
        return Err(MetaError::Invalid("the key is empty".into()));
    }
    check_prefix(key)
}

/// Whether a lease may last so long.
pub(super) fn check_ttl(ttl: Duration) -> MetaResult<()> {
    if ttl.is_zero() || ttl > LEASE_TTL_MAX {
        return Err(MetaError::Invalid(format!("a lease of {ttl:?}")));
    }
    Ok(())
}

/// The identity of a store at `revision` whose cluster key has this value.
pub(super) fn identity_of(value: &[u8], revision: u64) -> MetaResult<StoreIdentity> {
    let cluster: record::ClusterRecord = record::decode(value)
        .map_err(|error| MetaError::Corrupt(format!("{}: {error}", schema::CLUSTER_KEY)))?;
    Ok(StoreIdentity { cluster: cluster.id, incarnation: cluster.incarnation, revision })
}

/// Whether a transaction is within all bounds and makes sense.
pub(super) fn check_txn(txn: &Txn) -> MetaResult<()> {
    check_size("conditions", txn.conditions.len(), TXN_OPS_MAX)?;
    check_size("changes", txn.ops.len(), TXN_OPS_MAX)?;
    let mut bytes = 0;
    for condition in &txn.conditions {
        let (Condition::KeyMissing(key)
        | Condition::KeyExists(key)
        | Condition::KeyAt(key, _)
        | Condition::PrefixEmpty(key)) = condition;
        check_key(key)?;
        bytes += key.len();
        if matches!(condition, Condition::KeyAt(_, 0)) {
            return Err(MetaError::Invalid(format!("no key is at revision 0: {key}")));
        }
    }
    let mut changed = BTreeSet::new();
    for op in &txn.ops {
        let (key, value_bytes) = match op {
            Op::Put { key, value, .. } => (key, value.len()),
            Op::Delete(key) => (key, 0),
        };
        check_key(key)?;
        check_size("a value, in bytes,", value_bytes, VALUE_BYTES_MAX)?;
        bytes += key.len() + value_bytes;
        if !changed.insert(key) {
            return Err(MetaError::Invalid(format!("a transaction changes {key} twice")));
        }
    }
    check_size("a transaction, in bytes,", bytes, TXN_BYTES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Put(u8, u8, Option<u8>),
        Delete(u8),
        Swap(u8, u8),
        Grant,
        Revoke(u8),
        Advance(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..6_u8, any::<u8>(), prop::option::of(1..4_u8))
                .prop_map(|(k, v, l)| Step::Put(k, v, l)),
            (0..6_u8).prop_map(Step::Delete),
            (0..6_u8, any::<u8>()).prop_map(|(k, v)| Step::Swap(k, v)),
            Just(Step::Grant),
            (1..4_u8).prop_map(Step::Revoke),
            (0..5_u8).prop_map(Step::Advance),
        ]
    }

    proptest! {
        #[test]
        fn invariants_hold_and_revisions_count_changes(
            steps in prop::collection::vec(step(), 0..60)
        ) {
            let mut now = Instant::now();
            let mut state = State::default();
            let mut watch = state.watch("", 0).unwrap();
            let key = |k: u8| format!("/k{k}");
            for step in steps {
                state.expire(now);
                let before = state.content.revision;
                match step {
                    Step::Put(k, v, lease) => {
                        let lease = lease.map(|l| LeaseId(l.into()));
                        let known = lease.is_none_or(|l| state.content.leases.contains_key(&l));
                        let value = Bytes::copy_from_slice(&[v]);
                        let op = Op::Put { key: key(k), value, lease };
                        let done = state.txn(Txn { conditions: vec![], ops: vec![op] });
                        prop_assert_eq!(done.is_ok(), known);
                        prop_assert_eq!(state.content.revision, before + u64::from(known));
                    }
                    Step::Delete(k) => {
                        let there = state.get(&key(k)).unwrap().is_some();
                        state.txn(Txn::new().delete(key(k))).unwrap();
                        prop_assert_eq!(state.content.revision, before + u64::from(there));
                    }
                    Step::Swap(k, v) => {
                        let Some(old) = state.get(&key(k)).unwrap() else { continue };
                        let swap = Txn::new()
                            .when(Condition::KeyAt(key(k), old.revision))
                            .put(key(k), vec![v]);
                        prop_assert!(state.txn(swap.clone()).unwrap().committed().is_some());
                        prop_assert_eq!(state.txn(swap).unwrap(), TxnOutcome::Conflict);
                    }
                    Step::Grant => {
                        state.lease_grant(Duration::from_secs(3), now).unwrap();
                    }
                    Step::Revoke(l) => {
                        let id = LeaseId(l.into());
                        let known = state.content.leases.contains_key(&id);
                        prop_assert_eq!(state.lease_revoke(id).is_ok(), known);
                    }
                    Step::Advance(seconds) => now += Duration::from_secs(seconds.into()),
                }
                state.publish();
                state.check();
            }
            // The last step may have ended leases and then done nothing that would tell of it.
            state.publish();
            // A mirror built from the events alone equals the store.
            let mut mirror = BTreeMap::new();
            let mut last = 0;
            while let Ok(Ok(changes)) = watch.receiver.try_recv() {
                prop_assert!(changes.revision == last + 1);
                last = changes.revision;
                for event in &changes.events {
                    match &event.value {
                        Some(value) => mirror.insert(event.key.clone(), value.clone()),
                        None => mirror.remove(&event.key),
                    };
                }
            }
            let content: BTreeMap<_, _> =
                state.content.entries.iter().map(|(k, e)| (k.clone(), e.value.clone())).collect();
            prop_assert_eq!(mirror, content);
        }
    }
}
