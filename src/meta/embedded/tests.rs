//! The suite over files, and what only a file can do wrong.

use std::cell::Cell;
use std::rc::Rc;

use redb::ReadableTable;
use tempfile::TempDir;

use super::*;
use crate::id::ClusterId;
use crate::meta::record::{self, ClusterRecord};
use crate::meta::{WatchError, conformance, schema};

fn fresh(folder: &TempDir) -> EmbeddedStore {
    EmbeddedStore::create(&folder.path().join("meta.redb"), Vec::new()).unwrap()
}

fn reopen(store: EmbeddedStore) -> EmbeddedStore {
    let path = store.path().to_owned();
    drop(store);
    EmbeddedStore::open(&path).unwrap()
}

#[tokio::test]
async fn conforms() {
    let folder = TempDir::new().unwrap();
    let count = Cell::new(0);
    let fresh = || async {
        count.set(count.get() + 1);
        let path = folder.path().join(format!("{}.redb", count.get()));
        Rc::new(EmbeddedStore::create(&path, Vec::new()).unwrap()) as Rc<dyn MetaStore>
    };
    conformance::run(fresh, Duration::from_secs(1)).await;
}

#[tokio::test]
async fn what_was_answered_survives() {
    let folder = TempDir::new().unwrap();
    let cluster = ClusterRecord { id: ClusterId::from_bytes([1; 16]), incarnation: 5 };
    let content =
        vec![(schema::CLUSTER_KEY.to_owned(), Bytes::from(record::encode(&cluster).unwrap()))];
    let path = folder.path().join("meta.redb");
    let store = EmbeddedStore::create(&path, content).unwrap();
    let short = store.lease_grant(Duration::from_secs(2)).await.unwrap();
    let long = store.lease_grant(Duration::from_mins(10)).await.unwrap();
    let txn = Txn::new().put("/a", "1").put_leased("/s", "1", short).put_leased("/l", "1", long);
    store.txn(txn).await.unwrap();
    store.txn(Txn::new().put("/b", "2").delete("/a")).await.unwrap();
    let before = store.list("").await.unwrap();

    let store = reopen(store);
    assert_eq!(store.list("").await.unwrap(), before);
    let identity = store.identity().await.unwrap();
    assert_eq!((identity.cluster, identity.incarnation, identity.revision), (cluster.id, 5, 3));
    let mut watch = store.watch("/", 2).await.unwrap();
    assert_eq!(watch.next().await, Err(WatchError::Compacted(4)), "no history in the file");
    let mut watch = store.watch("/", 4).await.unwrap();
    let changes = watch.next().await.unwrap();
    assert_eq!((changes.revision, &*changes.events[0].key), (4, "/s"), "leases go on");
    store.lease_revoke(long).await.unwrap();
    assert!(store.lease_grant(Duration::from_secs(1)).await.unwrap() > long, "ids are not reused");

    let store = reopen(store);
    let keys: Vec<_> = store.list("").await.unwrap().entries.into_iter().map(|e| e.0).collect();
    assert_eq!(keys, ["/b", schema::CLUSTER_KEY]);
}

#[tokio::test]
async fn a_dropped_request_is_made() {
    let folder = TempDir::new().unwrap();
    let store = fresh(&folder);
    for i in 0..200 {
        drop(store.txn(Txn::new().put(format!("/{i}"), "x")));
    }
    assert_eq!(reopen(store).list("").await.unwrap().entries.len(), 200);
}

#[test]
fn files_that_cannot_be_used_say_why() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("meta.redb");
    let open = |path: &Path| EmbeddedStore::open(path).map(|_| ()).unwrap_err();
    assert!(matches!(open(&path), OpenError::NotFound(_)));
    let store = fresh(&folder);
    assert!(matches!(open(&path), OpenError::Locked(_)), "{}", open(&path));
    let again = EmbeddedStore::create(&path, Vec::new()).map(|_| ()).unwrap_err();
    assert!(matches!(again, OpenError::Exists(_)));
    drop(store);
    EmbeddedStore::open(&path).unwrap();

    std::fs::write(folder.path().join("text"), "not a store of sds at all".repeat(500)).unwrap();
    assert!(matches!(open(&folder.path().join("text")), OpenError::Foreign(_)));
    std::fs::write(folder.path().join("empty"), "").unwrap();
    assert!(matches!(open(&folder.path().join("empty")), OpenError::Foreign(_)));
    drop(redb::Database::create(folder.path().join("other")).unwrap());
    assert!(matches!(open(&folder.path().join("other")), OpenError::Foreign(_)));
    assert!(matches!(open(folder.path()), OpenError::Io { .. }));
}

/// Writes a head row as it is.
fn set_head(path: &Path, change: impl Fn(&mut Vec<u8>)) {
    let database = redb::Database::open(path).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let mut table = transaction.open_table(format::STORE).unwrap();
        let mut head = table.get(format::HEAD).unwrap().unwrap().value().to_vec();
        change(&mut head);
        table.insert(format::HEAD, &*head).unwrap();
    }
    transaction.commit().unwrap();
}

#[test]
fn a_newer_format_is_refused_by_its_version() {
    let folder = TempDir::new().unwrap();
    let path = fresh(&folder).path().to_owned();
    set_head(&path, |head| head[8] = 9);
    let error = EmbeddedStore::open(&path).map(|_| ()).unwrap_err();
    assert!(matches!(error, OpenError::Version { found: 9, known: 1, .. }), "{error}");
    set_head(&path, |head| (head[8], head[20]) = (1, 0xff));
    let error = EmbeddedStore::open(&path).map(|_| ()).unwrap_err();
    assert!(matches!(error, OpenError::Corrupt(..)), "{error}");
}

#[tokio::test]
async fn damage_is_found_or_harmless() {
    let folder = TempDir::new().unwrap();
    let store = fresh(&folder);
    for i in 0..50 {
        store.txn(Txn::new().put(format!("/{i:02}"), vec![i; 300])).await.unwrap();
    }
    let good = store.list("").await.unwrap();
    let path = store.path().to_owned();
    drop(store);
    let bytes = std::fs::read(&path).unwrap();
    let env = crate::env::Env::from_seed(3);
    let mut refused = 0;
    for _ in 0..150 {
        let mut bad = bytes.clone();
        let at = usize::try_from(env.random_below(bytes.len() as u64 / 512)).unwrap() * 512;
        bad[at..at + 512].fill(0x5a);
        let copy = folder.path().join("copy");
        std::fs::write(&copy, &bad).unwrap();
        match EmbeddedStore::open(&copy) {
            Ok(store) => assert_eq!(store.list("").await.unwrap(), good, "512 bytes at {at}"),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 0, "some of the damage hits what is in use");
    for len in [0, 100, 4096, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..len]).unwrap();
        if let Ok(store) = EmbeddedStore::open(&path) {
            assert_eq!(store.list("").await.unwrap(), good, "cut to {len} bytes");
        }
    }
}
