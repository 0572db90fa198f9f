//! The etcd backend of the metadata store against a real etcd, and what can happen to one.

#![allow(clippy::disallowed_methods, reason = "these tests live in real time")]

#[path = "etcd/faults.rs"]
mod faults;
#[path = "nbd_threaded/identity.rs"]
mod identity;
#[path = "etcd/replaced.rs"]
mod replaced;
#[path = "etcd/rules.rs"]
mod rules;
#[path = "etcd_support/mod.rs"]
mod support;
#[path = "etcd/watches.rs"]
mod watches;

use std::time::Duration;

use sds::env::Env;
use sds::meta::etcd::{EtcdOptions, EtcdStore};
use sds::meta::{MetaError, MetaStore, Txn, Watch, WatchError};
use tokio::task::LocalSet;
use tokio::time::timeout;

use self::support::Etcd;

/// How long a watcher may take to hear of something, outages included.
const PATIENCE: Duration = Duration::from_secs(40);

/// Runs a test as a node runs: on one thread.
fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    LocalSet::new().block_on(&runtime.expect("a runtime"), test);
}

fn options(etcd: &Etcd) -> EtcdOptions {
    EtcdOptions { endpoints: etcd.urls(), ..EtcdOptions::default() }
}

/// A client of all members that asks the first one first.
fn client(etcd: &Etcd) -> EtcdStore {
    let first = |seed: &u64| {
        let members = etcd.urls().len() as u64;
        Env::from_seed(*seed).random_below(members) == 0
    };
    let seed = (0..1000).find(first).expect("a seed");
    EtcdStore::new(&options(etcd), Env::from_seed(seed)).expect("good options")
}

async fn put(store: &EtcdStore, key: &str, value: impl ToString) -> u64 {
    let txn = Txn::new().put(key, value.to_string());
    store.txn(txn).await.expect("it works").committed().expect("no condition")
}

/// Writes a key until it is said to be written: a change that was sent on to a leader who is gone
/// is in doubt.
async fn put_at_last(store: &EtcdStore, key: &str) {
    let start = std::time::Instant::now();
    while let Err(error) = store.txn(Txn::new().put(key, "x")).await {
        let expected = matches!(error, MetaError::Unavailable(_) | MetaError::Unknown(_));
        assert!(expected && start.elapsed() < PATIENCE, "{error}");
    }
}

/// Lets the client notice that a member hung up: what it sends before that is in doubt.
async fn notice() {
    tokio::time::sleep(Duration::from_millis(50)).await;
}

/// Revision and keys of the next changes.
async fn next(watch: &mut Watch) -> Result<(u64, Vec<String>), WatchError> {
    let changes = timeout(PATIENCE, watch.next()).await.expect("a watcher is told in time")?;
    Ok((changes.revision, changes.events.iter().map(|event| event.key.clone()).collect()))
}
