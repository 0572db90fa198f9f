//! Watches that outlive their connections.

use std::time::Duration;

use sds::meta::{MetaStore, Txn, WATCH_LAG_MAX, WatchError};
use tokio::time::{sleep, timeout};

use super::support::{Etcd, ctl};
use super::{client, next, put, put_at_last, run};

#[test]
fn a_watch_and_a_lease_survive_a_kill() {
    let mut etcd = Etcd::start(1);
    run(async {
        let store = client(&etcd);
        let lease = store.lease_grant(Duration::from_secs(5)).await.expect("it works");
        let first = put(&store, "/w/a", 0).await;
        let mut watch = store.watch("/w/", first).await.expect("it works");
        assert_eq!(next(&mut watch).await, Ok((first, vec!["/w/a".into()])));
        store.txn(Txn::new().put_leased("/w/l", "1", lease)).await.expect("it works");
        assert_eq!(next(&mut watch).await, Ok((first + 1, vec!["/w/l".into()])));
        let mut expected = first + 2;
        for _ in 0..4 {
            etcd.kill(0);
            sleep(Duration::from_millis(300)).await;
            // What happens before the watch has a connection again.
            etcd.unseen(|address| drop(ctl(address, &["put", "/w/unseen", "x"])));
            etcd.restart(0);
            assert_eq!(put(&store, "/w/a", "after").await, expected + 1);
            store.lease_keep_alive(lease).await.expect("a restart gives the whole time again");
            for key in ["/w/unseen", "/w/a"] {
                assert_eq!(next(&mut watch).await, Ok((expected, vec![key.into()])));
                expected += 1;
            }
        }
        assert_eq!(next(&mut watch).await, Ok((expected, vec!["/w/l".into()])), "it expires");
    });
}

#[test]
fn compaction_ends_a_watch_only_where_it_hides_something() {
    let mut etcd = Etcd::start(1);
    run(async {
        let store = client(&etcd);
        let last = put(&store, "/w/a", 0).await;
        let mut watch = store.watch("/w/", 0).await.expect("it works");
        let deletion = put(&store, "/w/b", 0).await + 1;
        assert_eq!(next(&mut watch).await, Ok((last + 1, vec!["/w/b".into()])));

        // All that was compacted was delivered.
        etcd.stop(0);
        etcd.unseen(|address| drop(ctl(address, &["compact", &(deletion - 1).to_string()])));
        etcd.restart(0);
        assert_eq!(put(&store, "/w/c", 1).await, deletion);
        assert_eq!(next(&mut watch).await, Ok((deletion, vec!["/w/c".into()])), "it goes on");

        // A deletion is compacted at its very revision.
        etcd.stop(0);
        etcd.unseen(|address| {
            ctl(address, &["del", "/w/c"]);
            ctl(address, &["compact", &(deletion + 1).to_string()]);
        });
        etcd.restart(0);
        assert_eq!(next(&mut watch).await, Err(WatchError::Compacted(deletion + 1)));
        let mut late = store.watch("/w/", last).await.expect("it works");
        assert_eq!(next(&mut late).await, Err(WatchError::Compacted(deletion + 1)));
        let listing = store.list("/w/").await.expect("it works");
        let mut again = store.watch("/w/", listing.revision + 1).await.expect("it works");
        let revision = put(&store, "/w/d", 1).await;
        assert_eq!(next(&mut again).await, Ok((revision, vec!["/w/d".into()])));
    });
}

#[test]
fn large_transactions_arrive_whole() {
    let etcd = Etcd::start(1);
    run(async {
        let store = client(&etcd);
        let from = put(&store, "/w/start", 0).await;
        let mut live = store.watch("/w/", 0).await.expect("it works");
        // Each close to the bound of a response, all together far beyond.
        for round in 0..20 {
            let txn = (0..100)
                .fold(Txn::new(), |txn, key| txn.put(format!("/w/{key:02}"), vec![round; 9_000]));
            store.txn(txn).await.expect("it works");
        }
        let mut late = store.watch("/w/", from + 1).await.expect("it works");
        for watch in [&mut live, &mut late] {
            for round in 1..=20 {
                let (revision, keys) = next(watch).await.expect("it goes on");
                assert_eq!((revision, keys.len()), (from + round, 100), "a whole transaction");
            }
        }
    });
}

#[test]
fn a_watch_goes_on_at_another_member() {
    let mut etcd = Etcd::start(3);
    run(async {
        let store = client(&etcd);
        let mut revision = put(&store, "/w/a", 0).await;
        let mut watch = store.watch("/w/", 0).await.expect("it works");
        for round in 0..6 {
            let member = round % 3;
            // The second time it neither answers nor hangs up: pings tell.
            if round < 3 {
                etcd.kill(member);
            } else {
                etcd.pause(member);
            }
            put_at_last(&store, "/w/a").await;
            let newest = store.list("/w/").await.expect("two members answer").revision;
            while revision < newest {
                revision += 1;
                assert_eq!(next(&mut watch).await, Ok((revision, vec!["/w/a".into()])));
            }
            if round < 3 {
                etcd.restart(member);
            } else {
                etcd.resume(member);
            }
        }
    });
}

#[test]
fn a_watch_that_is_dropped_and_one_that_lags() {
    let etcd = Etcd::start(1);
    run(async {
        let store = client(&etcd);
        drop(store.watch("/w/", 0).await.expect("it works"));
        let mut slow = store.watch("/w/", 0).await.expect("it works");
        let first = put(&store, "/w/a", 0).await;
        for round in 0..=WATCH_LAG_MAX {
            put(&store, "/w/a", round).await;
        }
        sleep(Duration::from_millis(500)).await;
        for revision in first..first + WATCH_LAG_MAX as u64 {
            assert_eq!(next(&mut slow).await, Ok((revision, vec!["/w/a".into()])));
        }
        assert_eq!(next(&mut slow).await, Err(WatchError::Lagged));
        // More than may be at once, one after the other.
        for _ in 0..1100 {
            let mut watch = store.watch("/w/", 0).await.expect("the earlier ones are gone");
            assert!(timeout(Duration::ZERO, watch.next()).await.is_err());
        }
    });
}
