//! What every backend of [`MetaStore`] must do. A backend's tests call [`run`] with a factory of
//! fresh, empty stores; each check gets one of its own. Checks panic with what was violated.

use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{sleep, timeout};

use super::{
    Condition, KEY_BYTES_MAX, MetaError, MetaStore, TXN_OPS_MAX, Txn, TxnOutcome, VALUE_BYTES_MAX,
    WATCH_LAG_MAX, Watch, WatchError,
};

/// How long a watcher may take to hear of a change.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs all checks. `lease_ttl` is the shortest lease that the backend tells apart.
pub async fn run<F>(fresh: impl Fn() -> F, lease_ttl: Duration)
where
    F: Future<Output = Rc<dyn MetaStore>>,
{
    revisions(&*fresh().await).await;
    conditions(&*fresh().await).await;
    atomicity(&*fresh().await).await;
    races(&*fresh().await).await;
    prefixes(&*fresh().await).await;
    bounds(&*fresh().await).await;
    watches(&*fresh().await).await;
    watch_of_the_past(&*fresh().await).await;
    lagging_watch(&*fresh().await).await;
    leases(&*fresh().await, lease_ttl).await;
    lease_keys(&*fresh().await, lease_ttl).await;
    uninitialised(&*fresh().await).await;
}

async fn commit(store: &dyn MetaStore, txn: Txn) -> u64 {
    store.txn(txn).await.expect("the store works").committed().expect("no condition fails")
}

async fn value(store: &dyn MetaStore, key: &str) -> Option<Bytes> {
    store.get(key).await.expect("the store works").map(|found| found.value)
}

async fn keys(store: &dyn MetaStore, prefix: &str) -> Vec<String> {
    let listing = store.list(prefix).await.expect("the store works");
    listing.entries.into_iter().map(|(key, _)| key).collect()
}

/// The next changes as text: `revision key=value key-`.
async fn next(watch: &mut Watch) -> String {
    let next = timeout(PATIENCE, watch.next()).await.expect("a watcher hears of changes in time");
    let changes = next.expect("the watch goes on");
    let mut text = changes.revision.to_string();
    for event in &changes.events {
        text += " ";
        text += &event.key;
        match &event.value {
            Some(value) => {
                text += "=";
                text += &String::from_utf8_lossy(value);
            }
            None => text += "-",
        }
    }
    text
}

async fn revisions(store: &dyn MetaStore) {
    assert_eq!(store.get("/a").await, Ok(None));
    let first = commit(store, Txn::new().put("/a", "1").put("/b", "1")).await;
    let second = commit(store, Txn::new().put("/a", "2")).await;
    assert_eq!(second, first + 1, "a transaction raises the revision by one");
    let listing = store.list("/").await.expect("the store works");
    assert_eq!(listing.revision, second);
    let revisions: Vec<u64> = listing.entries.iter().map(|(_, found)| found.revision).collect();
    assert_eq!(revisions, [second, first], "a key has the revision of its own last write");
    let again = commit(store, Txn::new().put("/a", "2")).await;
    assert_eq!(again, second + 1, "writing the same value is a change");
    assert_eq!(commit(store, Txn::new().delete("/c")).await, again, "deleting nothing is none");
    assert_eq!(commit(store, Txn::new()).await, again);
    assert_eq!(commit(store, Txn::new().delete("/a")).await, again + 1);
    assert_eq!(value(store, "/a").await, None);
}

async fn conditions(store: &dyn MetaStore) {
    let first = commit(store, Txn::new().put("/a", "1")).await;
    let second = commit(store, Txn::new().put("/a", "2")).await;
    let key = |key: &str| key.to_owned();
    for (holds, condition) in [
        (false, Condition::KeyMissing(key("/a"))),
        (true, Condition::KeyMissing(key("/b"))),
        (true, Condition::KeyExists(key("/a"))),
        (false, Condition::KeyExists(key("/b"))),
        (false, Condition::KeyAt(key("/a"), first)),
        (true, Condition::KeyAt(key("/a"), second)),
        (false, Condition::KeyAt(key("/a"), second + 1)),
        (false, Condition::KeyAt(key("/b"), second)),
        (false, Condition::PrefixEmpty(key("/"))),
        (false, Condition::PrefixEmpty(key("/a"))),
        (true, Condition::PrefixEmpty(key("/a/"))),
    ] {
        let outcome = store.txn(Txn::new().when(condition.clone())).await.expect("it works");
        assert_eq!(outcome.committed().is_some(), holds, "{condition:?}");
    }
}

async fn atomicity(store: &dyn MetaStore) {
    commit(store, Txn::new().put("/a", "1")).await;
    let before = store.list("").await;
    let txn = Txn::new()
        .when(Condition::KeyExists("/a".into()))
        .when(Condition::KeyExists("/b".into()))
        .put("/c", "1")
        .delete("/a");
    assert_eq!(store.txn(txn).await, Ok(TxnOutcome::Conflict));
    let twice = Txn::new().put("/c", "1").delete("/c");
    assert!(matches!(store.txn(twice).await, Err(MetaError::Invalid(_))));
    assert_eq!(store.list("").await, before, "what was refused left nothing");
}

async fn races(store: &dyn MetaStore) {
    let mut revision = commit(store, Txn::new().put("/a", "0")).await;
    for round in 0..5 {
        let swap = |who: u32| {
            let condition = Condition::KeyAt("/a".into(), revision);
            store.txn(Txn::new().when(condition).put("/a", format!("{round}.{who}")))
        };
        let outcomes = futures_util::future::join_all((0..20).map(swap)).await;
        let winners: Vec<u64> =
            outcomes.into_iter().filter_map(|o| o.expect("it works").committed()).collect();
        assert_eq!(winners, [revision + 1], "exactly one of many swaps wins");
        revision += 1;
    }
}

async fn prefixes(store: &dyn MetaStore) {
    let all = ["/a", "/a/", "/a/b", "/a/b/c", "/a0", "/b", "/\u{10ffff}", "/\u{10ffff}x"];
    let txn = all.iter().fold(Txn::new(), |txn, key| txn.put(*key, "x"));
    commit(store, txn).await;
    assert_eq!(keys(store, "").await, all, "sorted by bytes");
    assert_eq!(keys(store, "/a/").await, ["/a/", "/a/b", "/a/b/c"]);
    assert_eq!(keys(store, "/a").await, ["/a", "/a/", "/a/b", "/a/b/c", "/a0"]);
    assert_eq!(keys(store, "/a/b/c").await, ["/a/b/c"]);
    assert_eq!(keys(store, "/\u{10ffff}").await, ["/\u{10ffff}", "/\u{10ffff}x"]);
    assert!(keys(store, "/c").await.is_empty());
}

async fn bounds(store: &dyn MetaStore) {
    let large = Bytes::from(vec![7; VALUE_BYTES_MAX]);
    commit(store, Txn::new().put("/large", large.clone())).await;
    assert_eq!(value(store, "/large").await, Some(large.clone()));
    let before = store.list("").await;
    let mut larger = large.to_vec();
    larger.push(7);
    let many = |count| (0..count).fold(Txn::new(), |txn, i| txn.put(format!("/{i:04}"), "x"));
    for txn in [
        Txn::new().put("/a", larger),
        Txn::new().put("/a", large.clone()).put("/b", large),
        Txn::new().put("k".repeat(KEY_BYTES_MAX + 1), "x"),
        many(TXN_OPS_MAX + 1),
    ] {
        assert!(matches!(store.txn(txn).await, Err(MetaError::TooLarge { .. })));
    }
    for txn in [
        Txn::new().put("", "x"),
        Txn::new().put("/a\0b", "x"),
        Txn::new().when(Condition::KeyAt("/a".into(), 0)),
        Txn::new().when(Condition::PrefixEmpty(String::new())),
    ] {
        assert!(matches!(store.txn(txn).await, Err(MetaError::Invalid(_))));
    }
    assert!(matches!(store.get("").await, Err(MetaError::Invalid(_))));
    assert_eq!(store.list("").await, before);
    commit(store, many(TXN_OPS_MAX)).await;
    commit(store, Txn::new().put("k".repeat(KEY_BYTES_MAX), "").put("/empty", "")).await;
    assert_eq!(value(store, "/empty").await, Some(Bytes::new()), "an empty value is a value");
}

async fn watches(store: &dyn MetaStore) {
    let r = commit(store, Txn::new().put("/w/a", "0")).await;
    let mut watch = store.watch("/w/", 0).await.expect("it works");
    let mut other = store.watch("/x/", 0).await.expect("it works");
    commit(store, Txn::new().put("/w/a", "1").put("/x/a", "1").put("/w/b", "1")).await;
    commit(store, Txn::new().put("/y", "1")).await;
    commit(store, Txn::new().delete("/w/a").delete("/w/none")).await;
    commit(store, Txn::new().put("/x/b", "1")).await;
    assert_eq!(next(&mut watch).await, format!("{} /w/a=1 /w/b=1", r + 1));
    assert_eq!(next(&mut watch).await, format!("{} /w/a-", r + 3));
    assert_eq!(next(&mut other).await, format!("{} /x/a=1", r + 1));
    assert_eq!(next(&mut other).await, format!("{} /x/b=1", r + 4));
    let more = timeout(Duration::from_millis(20), watch.next()).await;
    assert!(more.is_err(), "a watcher hears of its own prefix only");
}

async fn watch_of_the_past(store: &dyn MetaStore) {
    commit(store, Txn::new().put("/a", "1")).await;
    let listing = store.list("/").await.expect("it works");
    commit(store, Txn::new().put("/a", "2")).await;
    let mut watch = store.watch("/", listing.revision + 1).await.expect("it works");
    let mut future = store.watch("/", listing.revision + 3).await.expect("it works");
    commit(store, Txn::new().put("/a", "3")).await;
    commit(store, Txn::new().put("/a", "4")).await;
    for (step, text) in [(1, "2"), (2, "3"), (3, "4")] {
        let expected = format!("{} /a={text}", listing.revision + step);
        assert_eq!(next(&mut watch).await, expected, "list, then watch, misses nothing");
    }
    assert_eq!(next(&mut future).await, format!("{} /a=4", listing.revision + 3));
}

async fn lagging_watch(store: &dyn MetaStore) {
    let first = commit(store, Txn::new().put("/a", "first")).await;
    let mut slow = store.watch("/a", 0).await.expect("it works");
    for i in 0..2 * WATCH_LAG_MAX {
        commit(store, Txn::new().put("/a", i.to_string())).await;
    }
    let mut expected = first;
    let error = loop {
        match timeout(PATIENCE, slow.next()).await.expect("a slow watcher is told") {
            Ok(changes) => {
                expected += 1;
                assert_eq!(changes.revision, expected, "no gap before the end of a watch");
            }
            Err(error) => break error,
        }
    };
    assert_eq!(error, WatchError::Lagged);
    assert_eq!(slow.next().await, Err(WatchError::Lagged), "the end of a watch is final");
    let mut late = store.watch("/a", first).await.expect("it works");
    match timeout(PATIENCE, late.next()).await.expect("a late watcher is told") {
        Err(error) => assert!(matches!(error, WatchError::Compacted(_)), "{error:?}"),
        Ok(changes) => assert_eq!(changes.revision, first, "a longer memory has all from there"),
    }
}

async fn leases(store: &dyn MetaStore, ttl: Duration) {
    let lease = store.lease_grant(ttl).await.expect("it works");
    let revision = commit(store, Txn::new().put_leased("/l/a", "1", lease)).await;
    commit(store, Txn::new().put_leased("/l/b", "1", lease)).await;
    let mut watch = store.watch("/l/", 0).await.expect("it works");
    for _ in 0..4 {
        sleep(ttl / 2).await;
        assert!(store.lease_keep_alive(lease).await.expect("it lives") >= ttl);
    }
    assert_eq!(keys(store, "/l/").await, ["/l/a", "/l/b"], "a lease kept alive lives on");
    let expected = format!("{} /l/a- /l/b-", revision + 2);
    assert_eq!(next(&mut watch).await, expected, "one that is not ends by itself");
    assert!(keys(store, "/l/").await.is_empty());
    assert_eq!(store.lease_keep_alive(lease).await, Err(MetaError::LeaseNotFound(lease)));
    let late = Txn::new().put_leased("/l/c", "1", lease);
    assert_eq!(store.txn(late).await, Err(MetaError::LeaseNotFound(lease)));
    assert_eq!(value(store, "/l/c").await, None);
}

async fn lease_keys(store: &dyn MetaStore, ttl: Duration) {
    assert!(matches!(store.lease_grant(Duration::ZERO).await, Err(MetaError::Invalid(_))));
    let ttl = ttl + Duration::from_mins(1);
    let first = store.lease_grant(ttl).await.expect("it works");
    let second = store.lease_grant(ttl).await.expect("it works");
    assert_ne!(first, second);
    let mut txn = Txn::new();
    for key in ["/kept", "/moved", "/gone", "/deleted"] {
        txn = txn.put_leased(key, "1", first);
    }
    commit(store, txn).await;
    commit(store, Txn::new().put("/kept", "2").put_leased("/moved", "2", second)).await;
    let before = commit(store, Txn::new().delete("/deleted")).await;
    store.lease_revoke(first).await.expect("it lives");
    assert_eq!(keys(store, "").await, ["/kept", "/moved"], "a put without lease detaches the key");
    let after = store.list("").await.expect("it works").revision;
    assert_eq!(after, before + 1, "the end of a lease is one transaction");
    assert_eq!(store.lease_revoke(first).await, Err(MetaError::LeaseNotFound(first)));
    store.lease_revoke(second).await.expect("it lives");
    assert_eq!(keys(store, "").await, ["/kept"]);
}

async fn uninitialised(store: &dyn MetaStore) {
    assert_eq!(store.identity().await, Err(MetaError::Uninitialised));
    commit(store, Txn::new().put(super::schema::CLUSTER_KEY, "junk")).await;
    assert!(matches!(store.identity().await, Err(MetaError::Corrupt(_))));
}
