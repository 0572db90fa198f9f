//! The metadata store: few, small keys that change rarely (disks, pools, volumes, roots).
//!
//! [`MetaStore`] is the seam. Its semantics are those of etcd, so that a backend for etcd is a
//! translation and nothing more; [`embedded`] keeps the keys of one node in a file, [`etcd`] those
//! of a cluster in one, [`memory`] is the simulation's. [`conformance`] holds what every backend must do. The typed records that sds
//! keeps in a store are in [`schema`], the bytes around each of them in [`envelope`].
//!
//! # Invariants
//!
//! - One counter, the revision, for the whole store. A transaction that changes anything raises
//!   it by one, and every key it wrote carries the new revision. It never goes back, unless the
//!   store was lost: that is what [`StoreIdentity`] is for.
//! - A transaction is all or nothing, and durable when it is answered.
//! - [`MetaError::Unknown`] is the only error after which a change may have happened, or may still
//!   happen later; every other error means that nothing changed.
//! - A watcher sees every change of its prefix, in order, a transaction's changes together, or is
//!   told that it did not.
//!
//! # Must not know
//!
//! A backend knows nothing of what its keys mean, but for [`schema::CLUSTER_KEY`], which says
//! whose store it is. The data path never waits for a store.

pub mod catalog;
pub mod conformance;
pub mod embedded;
pub mod envelope;
pub mod etcd;
pub mod follow;
pub mod members;
pub mod memory;
pub mod record;
pub mod schema;
mod state;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::id::ClusterId;

/// A future that stays on its core.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Longest key, bytes.
pub const KEY_BYTES_MAX: usize = 512;
/// Largest value, bytes.
pub const VALUE_BYTES_MAX: usize = 1 << 20;
/// Largest sum of keys and values of a transaction, bytes: below the 1.5 MiB that etcd takes.
pub const TXN_BYTES_MAX: usize = VALUE_BYTES_MAX + (64 << 10);
/// Conditions of a transaction at most, and likewise changes: what etcd takes.
pub const TXN_OPS_MAX: usize = 128;
/// Sum of all keys and values that a backend which keeps them in memory takes, bytes.
pub const STORE_BYTES_MAX: usize = 256 << 20;
/// Transactions that a watcher may lag behind before it is told to list again.
pub const WATCH_LAG_MAX: usize = 256;
/// Watchers of one store.
pub const WATCHERS_MAX: usize = 1024;
/// Leases of one store.
pub const LEASES_MAX: usize = 1 << 16;
/// Longest time to live of a lease.
pub const LEASE_TTL_MAX: Duration = Duration::from_hours(24);

const _: () = assert!(VALUE_BYTES_MAX + KEY_BYTES_MAX < TXN_BYTES_MAX);

/// Why the store did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// The store cannot be reached or refuses work. The change was definitely not made.
    #[error("the metadata store is unavailable: {0}")]
    Unavailable(String),
    /// The outcome is unknown: the change was made, was not, or still will be.
    #[error("the metadata store did not answer in time ({0}): the change may or may not be made")]
    Unknown(String),
    /// What the store holds is damaged.
    #[error("the metadata store is damaged: {0}")]
    Corrupt(String),
    /// A key, value, transaction or the whole store exceeds its bound, both in the unit named.
    #[error("{what} of {size} exceeds the bound of {max}")]
    TooLarge {
        /// What is too large, and its unit.
        what: &'static str,
        /// How large it is.
        size: usize,
        /// How large it may be.
        max: usize,
    },
    /// The request makes no sense; a defect of the caller.
    #[error("invalid request to the metadata store: {0}")]
    Invalid(String),
    /// The lease expired, was revoked or never existed.
    #[error("there is no lease {0}")]
    LeaseNotFound(LeaseId),
    /// The store holds no cluster record: it is empty, or is not a store of sds.
    #[error("the metadata store holds no cluster")]
    Uninitialised,
}

/// Result of a request to the store.
pub type MetaResult<T> = Result<T, MetaError>;

/// A value and when it was last written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned {
    /// The value.
    pub value: Bytes,
    /// Revision of the transaction that wrote it last.
    pub revision: u64,
}

/// Answer to a list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing {
    /// Revision of the store that the list shows; a watch from the next one misses nothing.
    pub revision: u64,
    /// The keys with the prefix and their values, sorted by the bytes of the key.
    pub entries: Vec<(String, Versioned)>,
}

/// What must hold for a transaction to commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// The key does not exist.
    KeyMissing(String),
    /// The key exists.
    KeyExists(String),
    /// The key was last written at this revision, which is not zero.
    KeyAt(String, u64),
    /// No key starts with this prefix, which is not empty.
    PrefixEmpty(String),
}

/// A change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes the key, whether it exists or not.
    Put {
        /// The key.
        key: String,
        /// Its value.
        value: Bytes,
        /// Deletes the key when this lease ends; none detaches it from any lease.
        lease: Option<LeaseId>,
    },
    /// Deletes the key if it exists.
    Delete(String),
}

/// A transaction: if all conditions hold, all changes are made. A key may be changed once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Txn {
    /// What must hold; at most [`TXN_OPS_MAX`].
    pub conditions: Vec<Condition>,
    /// What is changed; at most [`TXN_OPS_MAX`].
    pub ops: Vec<Op>,
}

impl Txn {
    /// A transaction without conditions or changes.
    pub fn new() -> Self {
        Self::default()
    }
    /// Adds a condition.
    #[must_use]
    pub fn when(mut self, condition: Condition) -> Self {
        self.conditions.push(condition);
        self
    }
    /// Adds a write.
    #[must_use]
    pub fn put(mut self, key: impl Into<String>, value: impl Into<Bytes>) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into(), lease: None });
        self
    }
    /// Adds a write of a key that vanishes with `lease`.
    #[must_use]
    pub fn put_leased(
        mut self,
        key: impl Into<String>,
        value: impl Into<Bytes>,
        lease: LeaseId,
    ) -> Self {
        self.ops.push(Op::Put { key: key.into(), value: value.into(), lease: Some(lease) });
        self
    }
    /// Adds a deletion.
    #[must_use]
    pub fn delete(mut self, key: impl Into<String>) -> Self {
        self.ops.push(Op::Delete(key.into()));
        self
    }
}

/// How a transaction ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TxnOutcome {
    /// All changes were made, at this revision of the store. (One that changes nothing, say by
    /// deleting a key that is not there, does not raise the revision.)
    Committed {
        /// Revision of the store after the transaction.
        revision: u64,
    },
    /// A condition did not hold; nothing changed.
    Conflict,
}

impl TxnOutcome {
    /// The revision, if it was committed.
    pub const fn committed(self) -> Option<u64> {
        match self {
            Self::Committed { revision } => Some(revision),
            Self::Conflict => None,
        }
    }
}

/// A lease: its keys vanish when it is not kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

impl std::fmt::Display for LeaseId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Whose store it is, and which of its lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreIdentity {
    /// The cluster.
    pub cluster: ClusterId,
    /// How often the store was rebuilt; raised each time. Less than 2^24.
    pub incarnation: u32,
    /// Newest revision of the store.
    pub revision: u64,
}

/// A change that a watcher sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The key.
    pub key: String,
    /// Its new value; none when it was deleted.
    pub value: Option<Bytes>,
}

/// The changes of one transaction, in the order of its operations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// Revision of the transaction.
    pub revision: u64,
    /// What it changed under the watcher's prefix; not empty.
    pub events: Vec<Event>,
}

/// Why a watch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// The watcher was slower than the changes: list, and watch again.
    #[error("the watcher lags behind the store")]
    Lagged,
    /// The store no longer has the changes from the wanted revision on: list, and watch again.
    #[error("the store has no record of changes before revision {0}")]
    Compacted(u64),
    /// The store went away, or its content was replaced: list, and watch again.
    #[error("the metadata store closed the watch")]
    Closed,
}

/// Changes of the keys with a prefix. Dropping it ends the watch.
#[derive(Debug)]
pub struct Watch {
    receiver: tokio::sync::mpsc::Receiver<Result<Arc<Changes>, WatchError>>,
    ended: Option<WatchError>,
}

impl Watch {
    /// The next changes, in order of their revisions. Cancel-safe.
    ///
    /// # Errors
    /// Any [`WatchError`]: it comes after all changes that were seen in time, and ends the watch;
    /// further calls repeat it.
    pub async fn next(&mut self) -> Result<Arc<Changes>, WatchError> {
        if let Some(ended) = self.ended {
            return Err(ended);
        }
        let next = self.receiver.recv().await.unwrap_or(Err(WatchError::Closed));
        self.ended = next.as_ref().err().copied();
        next
    }
}

/// A metadata store. Object-safe. A dropped future leaves the outcome of a change unknown.
///
/// Keys are UTF-8 without NUL, 1 to [`KEY_BYTES_MAX`] bytes.
pub trait MetaStore {
    /// The key's value; none if it does not exist. Linearizable: it shows every transaction that
    /// was answered before the call.
    ///
    /// # Errors
    /// [`MetaError::Unavailable`], [`MetaError::Corrupt`], [`MetaError::Invalid`] for a bad key.
    fn get(&self, key: &str) -> LocalFuture<'_, MetaResult<Option<Versioned>>>;

    /// All keys that start with `prefix`, which may be empty; a snapshot of one revision.
    ///
    /// # Errors
    /// As [`MetaStore::get`].
    fn list(&self, prefix: &str) -> LocalFuture<'_, MetaResult<Listing>>;

    /// Makes all changes, durably, if all conditions hold.
    ///
    /// # Errors
    /// All of [`MetaError`] but `Uninitialised`.
    fn txn(&self, txn: Txn) -> LocalFuture<'_, MetaResult<TxnOutcome>>;

    /// Watches the keys that start with `prefix` for changes of revision `from` or later; 0 means
    /// from now on. At most [`WATCH_LAG_MAX`] transactions are kept for a slow watcher.
    ///
    /// # Errors
    /// [`MetaError::Unavailable`], [`MetaError::Invalid`], [`MetaError::TooLarge`] with more than
    /// [`WATCHERS_MAX`] watchers. A `from` that is too old ends the watch itself.
    fn watch(&self, prefix: &str, from: u64) -> LocalFuture<'_, MetaResult<Watch>>;

    /// A lease that ends `ttl` after it was last kept alive, or somewhat later, never earlier. A
    /// store that restarts gives each lease its whole time again. `ttl` is more than zero and at
    /// most [`LEASE_TTL_MAX`]; a backend may round it up to whole seconds.
    ///
    /// # Errors
    /// All of [`MetaError`] but `Uninitialised`; after `Unknown`, a lease without keys may be left,
    /// which expires.
    fn lease_grant(&self, ttl: Duration) -> LocalFuture<'_, MetaResult<LeaseId>>;

    /// Gives the lease its whole time again, counted from when the store gets the request, and
    /// returns that time.
    ///
    /// # Errors
    /// [`MetaError::LeaseNotFound`], [`MetaError::Unavailable`], [`MetaError::Unknown`].
    fn lease_keep_alive(&self, lease: LeaseId) -> LocalFuture<'_, MetaResult<Duration>>;

    /// Ends the lease and deletes its keys, in one transaction.
    ///
    /// # Errors
    /// As [`MetaStore::lease_keep_alive`].
    fn lease_revoke(&self, lease: LeaseId) -> LocalFuture<'_, MetaResult<()>>;

    /// Whose store it is, with its newest revision.
    ///
    /// # Errors
    /// [`MetaError::Uninitialised`], [`MetaError::Corrupt`], [`MetaError::Unavailable`].
    fn identity(&self) -> LocalFuture<'_, MetaResult<StoreIdentity>>;
}
