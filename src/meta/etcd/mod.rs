//! The metadata store of a cluster: an etcd of its own or of others, spoken to by API v3.
//!
//! The semantics of [`MetaStore`] are etcd's, so that this is a translation ([`request`], [`list`]),
//! and what a client in the face of failures adds to it: which member is asked and for how long
//! ([`link`]), what an error says about the change ([`failure`]), watches that outlive their
//! connections ([`watch`]). Revisions are etcd's, of all that it holds: where others use the same
//! etcd they pass by more quickly. All keys carry a prefix, which is mostly empty, since those of
//! sds begin with `/sds/` of themselves.
//!
//! # Invariants
//!
//! - Reads are linearizable, and so are transactions that change nothing.
//! - All requests end in a bounded time; a watch that was begun goes on through any outage.
//! - A store that was replaced by an old copy while this one is open (its revision went back, or
//!   it is another etcd) refuses everything but [`MetaStore::identity`], which tells what is there
//!   now, and ends its watches. One that is opened later is judged by its identity: see
//!   [`crate::node`].
//!
//! It runs on the thread and runtime of its owner and never blocks, except that names of hosts are
//! resolved on tokio's own threads. It must run within a [`tokio::task::LocalSet`]. The simulation
//! uses [`super::memory`].

mod failure;
mod link;
mod list;
mod options;
mod request;
mod watch;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use etcd_client::{Client, Error, GetOptions, GetResponse};

use self::failure::Failure;
use self::link::{Link, unsigned};
use self::list::ANSWER_BYTES_MAX;
pub use self::options::{
    ENDPOINTS_MAX, EtcdOptions, OptionsError, PREFIX_BYTES_MAX, check_endpoint,
};
use self::request::{Keys, lease_id};
use self::watch::Pump;
use super::schema::CLUSTER_KEY;
use super::state::{
    Outlet, check_key, check_prefix, check_size, check_ttl, check_txn, identity_of,
};
use super::{
    LeaseId, Listing, LocalFuture, MetaError, MetaResult, MetaStore, StoreIdentity, Txn,
    TxnOutcome, Versioned, WATCHERS_MAX, Watch,
};
use crate::env::Env;

/// What requests and watches of a store share.
struct Shared {
    link: Link,
    keys: Keys,
    watchers: Cell<usize>,
}

/// A client of an etcd.
pub struct EtcdStore {
    shared: Rc<Shared>,
}

/// One of the watchers, as long as it lives.
struct WatcherCount {
    shared: Rc<Shared>,
}

impl WatcherCount {
    fn new(shared: &Rc<Shared>) -> MetaResult<Self> {
        let count = shared.watchers.get() + 1;
        check_size("watchers", count, WATCHERS_MAX)?;
        shared.watchers.set(count);
        Ok(Self { shared: Rc::clone(shared) })
    }
}

impl Drop for WatcherCount {
    fn drop(&mut self) {
        self.shared.watchers.update(|count| count - 1);
    }
}

impl EtcdStore {
    /// A client with these options. Reads the files they name, which blocks; asks nothing of etcd.
    ///
    /// # Errors
    /// [`OptionsError`].
    pub fn new(options: &EtcdOptions, env: Env) -> Result<Self, OptionsError> {
        let connect = options.load()?;
        let keys = Keys::new(&options.prefix);
        let link = Link::new(&options.endpoints, connect, env, keys.key(CLUSTER_KEY));
        Ok(Self { shared: Rc::new(Shared { link, keys, watchers: Cell::new(0) }) })
    }
}

/// The error of a change.
fn change_error(failure: Failure, lease: Option<LeaseId>) -> MetaError {
    match failure {
        Failure::Elsewhere(why) | Failure::Refused(why) => MetaError::Unavailable(why),
        Failure::LeaseNotFound => MetaError::LeaseNotFound(lease.unwrap_or(LeaseId(0))),
        Failure::Compacted => MetaError::Unavailable(failure.text()),
        Failure::Unknown(why) => MetaError::Unknown(why),
    }
}

impl Shared {
    /// Asks for a key as it is now.
    fn get_request(&self, key: &str) -> impl AsyncFn(Client) -> Result<GetResponse, Error> {
        let key = self.keys.key(key);
        async move |client: Client| {
            let mut kv = client.kv_client().max_decoding_message_size(ANSWER_BYTES_MAX);
            kv.get(&*key, Some(GetOptions::new())).await
        }
    }

    async fn get(&self, key: &str) -> MetaResult<Option<Versioned>> {
        check_key(key)?;
        let answer = self.link.read_newest(self.get_request(key)).await;
        Ok(versioned(answer.map_err(|failure| failure.of_read())?))
    }

    async fn identity(&self) -> MetaResult<StoreIdentity> {
        let answer = self.link.read_whatever(self.get_request(CLUSTER_KEY)).await;
        let answer = answer.map_err(|failure| failure.of_read())?;
        let revision = answer.header().map_or(0, |header| unsigned(header.revision()));
        let found = versioned(answer).ok_or(MetaError::Uninitialised)?;
        identity_of(&found.value, revision)
    }

    async fn txn(&self, txn: Txn) -> MetaResult<TxnOutcome> {
        check_txn(&txn)?;
        let request = self.keys.txn(&txn)?;
        let send = async |client: Client| client.kv_client().txn(request.clone()).await;
        let lease = txn.ops.iter().find_map(|op| match op {
            super::Op::Put { lease, .. } => *lease,
            super::Op::Delete(_) => None,
        });
        // One that changes nothing cannot be in doubt.
        let answer = if txn.ops.is_empty() {
            self.link.read_newest(send).await.map_err(|failure| failure.of_read())?
        } else {
            let answer = self.link.change_at(send).await;
            answer.map_err(|failure| change_error(failure, lease))?
        };
        if !answer.succeeded() {
            return Ok(TxnOutcome::Conflict);
        }
        let revision = answer.header().map_or(0, |header| unsigned(header.revision()));
        Ok(TxnOutcome::Committed { revision })
    }

    async fn watch(self: &Rc<Self>, prefix: &str, from: u64) -> MetaResult<Watch> {
        check_prefix(prefix)?;
        let count = WatcherCount::new(self)?;
        let from =
            if from == 0 { self.link.prove().await.map_err(|f| f.of_read())? + 1 } else { from };
        let (outlet, watch) = Outlet::new();
        let pump = Pump::new(Rc::clone(self), prefix, from, outlet, count);
        let stream = pump.connect().await.map_err(|failure| failure.of_read())?;
        tokio::task::spawn_local(pump.run(stream));
        Ok(watch)
    }

    async fn lease_grant(&self, ttl: Duration) -> MetaResult<LeaseId> {
        check_ttl(ttl)?;
        let up = u64::from(ttl.subsec_nanos() > 0);
        let seconds = i64::try_from(ttl.as_secs() + up).unwrap_or(i64::MAX);
        let grant = async |client: Client| client.lease_client().grant(seconds, None).await;
        let answer = self.link.change(grant).await;
        let answer = answer.map_err(|failure| change_error(failure, None))?;
        Ok(LeaseId(unsigned(answer.id())))
    }

    async fn lease_keep_alive(&self, lease: LeaseId) -> MetaResult<Duration> {
        let id = lease_id(lease)?;
        let keep = async |client: Client| {
            let (mut keeper, mut answers) = client.lease_client().keep_alive(id).await?;
            // The client keeps the first answer for itself, and with it the time.
            keeper.keep_alive().await?;
            let ended = || Error::LeaseKeepAliveError("etcd ended the stream".into());
            Ok(answers.message().await?.ok_or_else(ended)?.ttl())
        };
        let ttl = self.link.change(keep).await.map_err(|f| change_error(f, Some(lease)))?;
        if ttl <= 0 {
            return Err(MetaError::LeaseNotFound(lease));
        }
        Ok(Duration::from_secs(unsigned(ttl)))
    }

    async fn lease_revoke(&self, lease: LeaseId) -> MetaResult<()> {
        let id = lease_id(lease)?;
        let revoke = async |client: Client| client.lease_client().revoke(id).await;
        let answer = self.link.change(revoke).await;
        answer.map(|_| ()).map_err(|failure| change_error(failure, Some(lease)))
    }
}

/// The key that was asked for.
fn versioned(mut answer: GetResponse) -> Option<Versioned> {
    let kv = answer.take_kvs().pop()?;
    let revision = unsigned(kv.mod_revision());
    Some(Versioned { value: Bytes::from(kv.into_key_value().1), revision })
}

impl MetaStore for EtcdStore {
    fn get(&self, key: &str) -> LocalFuture<'_, MetaResult<Option<Versioned>>> {
        let key = key.to_owned();
        Box::pin(async move { self.shared.get(&key).await })
    }

    fn list(&self, prefix: &str) -> LocalFuture<'_, MetaResult<Listing>> {
        let prefix = prefix.to_owned();
        Box::pin(async move {
            check_prefix(&prefix)?;
            self.shared.list(&prefix).await
        })
    }

    fn txn(&self, txn: Txn) -> LocalFuture<'_, MetaResult<TxnOutcome>> {
        Box::pin(self.shared.txn(txn))
    }

    fn watch(&self, prefix: &str, from: u64) -> LocalFuture<'_, MetaResult<Watch>> {
        let prefix = prefix.to_owned();
        Box::pin(async move { self.shared.watch(&prefix, from).await })
    }

    fn lease_grant(&self, ttl: Duration) -> LocalFuture<'_, MetaResult<LeaseId>> {
        Box::pin(self.shared.lease_grant(ttl))
    }

    fn lease_keep_alive(&self, lease: LeaseId) -> LocalFuture<'_, MetaResult<Duration>> {
        Box::pin(self.shared.lease_keep_alive(lease))
    }

    fn lease_revoke(&self, lease: LeaseId) -> LocalFuture<'_, MetaResult<()>> {
        Box::pin(self.shared.lease_revoke(lease))
    }

    fn identity(&self) -> LocalFuture<'_, MetaResult<StoreIdentity>> {
        Box::pin(self.shared.identity())
    }
}
