//! An etcd that an old copy was restored to, or that was emptied.

use sds::env::Env;
use sds::id::ClusterId;
use sds::meta::etcd::EtcdStore;
use sds::meta::record::{self, ClusterRecord};
use sds::meta::schema::CLUSTER_KEY;
use sds::meta::{MetaError, MetaStore, Txn, WatchError};

use super::support::Etcd;
use super::{client, next, notice, options, put, run};

fn restored(token: Option<&str>) {
    let mut etcd = Etcd::start(1);
    run(async {
        let store = client(&etcd);
        assert_eq!(store.identity().await, Err(MetaError::Uninitialised));
        let cluster = ClusterRecord { id: ClusterId::from_bytes([3; 16]), incarnation: 2 };
        let value = record::encode(&cluster).expect("a record");
        store.txn(Txn::new().put(CLUSTER_KEY, value)).await.expect("it works");
        let old = store.identity().await.expect("it is there");
        assert_eq!((old.cluster, old.incarnation), (cluster.id, 2));
        let snapshot = etcd.snapshot();
        let mut watch = store.watch("/", 0).await.expect("it works");
        for round in 0..5 {
            let revision = put(&store, "/a", round).await;
            assert_eq!(next(&mut watch).await, Ok((revision, vec!["/a".into()])));
        }
        etcd.stop(0);
        etcd.restore(&snapshot, token);
        notice().await;

        let why = |error: &MetaError| match error {
            MetaError::Unavailable(why) => why.clone(),
            error => panic!("{error}"),
        };
        let said = why(&store.txn(Txn::new().put("/a", "x")).await.expect_err("replaced"));
        assert!(said.contains("its content was replaced"), "{said}");
        assert_eq!(next(&mut watch).await, Err(WatchError::Closed));
        why(&store.get("/a").await.expect_err("replaced"));
        why(&store.list("").await.expect_err("replaced"));
        why(&store.watch("", 0).await.map(|_| ()).expect_err("replaced"));
        assert_eq!(store.identity().await.expect("readable").revision, old.revision);
        // It stays so when the old copy's revision comes up again.
        let fresh = EtcdStore::new(&options(&etcd), Env::from_seed(1)).expect("good options");
        assert_eq!(fresh.get("/a").await, Ok(None), "what was refused was not made");
        assert_eq!(fresh.identity().await.expect("readable").revision, old.revision);
        for round in 0..9 {
            put(&fresh, "/a", round).await;
        }
        why(&store.txn(Txn::new().put("/a", "x")).await.expect_err("replaced"));
    });
}

#[test]
fn an_older_copy_is_noticed() {
    restored(None);
}

#[test]
fn an_older_copy_that_is_another_etcd_is_noticed() {
    restored(Some("second"));
}
