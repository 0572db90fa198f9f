//! Members that are killed, paused and cut off: what is said about changes is true, and in time.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use sds::meta::{Condition, MetaError, MetaStore, Txn, TxnOutcome};
use tokio::time::sleep;

use super::support::Etcd;
use super::{client, notice, put, put_at_last, run};

/// After an answer so long ago, a member is asked whether it is there before a change is sent.
const PROVEN_FOR: Duration = Duration::from_millis(300);
/// No request takes longer, whatever happens: a probe, the change, and some scheduling.
const BOUND: Duration = Duration::from_secs(13);

#[test]
fn a_stopped_etcd_refuses_and_a_paused_one_does_not_hang() {
    let mut etcd = Etcd::start(1);
    run(async {
        let store = client(&etcd);
        let revision = put(&store, "/a", 1).await;
        etcd.stop(0);
        notice().await;
        let start = Instant::now();
        let refused = store.txn(Txn::new().put("/a", "2")).await;
        assert!(
            matches!(&refused, Err(MetaError::Unavailable(why)) if why.contains("onnection refused")),
            "{refused:?}"
        );
        assert!(matches!(store.get("/a").await, Err(MetaError::Unavailable(_))));
        assert!(start.elapsed() < BOUND, "{:?}", start.elapsed());
        etcd.restart(0);
        assert_eq!(store.get("/a").await.expect("it is back").expect("there").revision, revision);

        sleep(PROVEN_FOR).await;
        etcd.pause(0);
        let start = Instant::now();
        let refused = store.txn(Txn::new().put("/a", "2")).await;
        assert!(matches!(refused, Err(MetaError::Unavailable(_))), "{refused:?}");
        assert!(start.elapsed() < BOUND, "{:?}", start.elapsed());
        let start = Instant::now();
        assert!(matches!(store.get("/a").await, Err(MetaError::Unavailable(_))));
        assert!(matches!(store.list("").await, Err(MetaError::Unavailable(_))));
        assert!(matches!(store.watch("", 0).await, Err(MetaError::Unavailable(_))));
        assert!(store.lease_grant(Duration::from_secs(9)).await.is_err());
        assert!(start.elapsed() < 4 * BOUND, "{:?}", start.elapsed());
        etcd.resume(0);
        assert_eq!(put(&store, "/a", 3).await, revision + 1, "nothing that was refused is made");

        // One that has just answered is sent the change, whose outcome nobody knows then.
        etcd.pause(0);
        let outcome = store.txn(Txn::new().put("/a", "4")).await;
        etcd.resume(0);
        let found = store.get("/a").await.expect("it is back").expect("it is there");
        match outcome {
            Err(MetaError::Unknown(_)) => {}
            Err(MetaError::Unavailable(_)) => assert_eq!(found.revision, revision + 1),
            outcome => panic!("{outcome:?}"),
        }
    });
}

#[test]
fn one_of_three_members_is_not_missed() {
    let mut etcd = Etcd::start(3);
    run(async {
        let store = client(&etcd);
        for member in 0..3 {
            etcd.kill(member);
            let start = Instant::now();
            put_at_last(&store, "/a").await;
            assert!(start.elapsed() < 2 * BOUND, "{:?}", start.elapsed());
            etcd.restart(member);
            etcd.pause(member);
            let start = Instant::now();
            store.get("/a").await.expect("two members answer");
            put_at_last(&store, "/a").await;
            assert!(start.elapsed() < 2 * BOUND, "{:?}", start.elapsed());
            etcd.resume(member);
        }
    });
}

#[test]
fn a_minority_refuses_in_time() {
    let etcd = Etcd::start(3);
    run(async {
        let store = client(&etcd);
        let revision = put(&store, "/a", 1).await;
        sleep(PROVEN_FOR).await;
        etcd.pause(1);
        etcd.pause(2);
        for _ in 0..2 {
            let start = Instant::now();
            let refused = store.txn(Txn::new().put("/a", "2")).await;
            assert!(matches!(refused, Err(MetaError::Unavailable(_))), "{refused:?}");
            assert!(matches!(store.get("/a").await, Err(MetaError::Unavailable(_))));
            assert!(start.elapsed() < 2 * BOUND, "{:?}", start.elapsed());
        }
        etcd.resume(1);
        etcd.resume(2);
        let back = async {
            loop {
                if let Ok(Some(found)) = store.get("/a").await {
                    return found.revision;
                }
            }
        };
        assert_eq!(back.await, revision, "what was refused was not made");
    });
}

/// Adds one by compare-and-swap until told to stop; what was said of each.
async fn count(
    store: &dyn MetaStore,
    stop: &Cell<bool>,
    (made, unknown): (&Cell<u64>, &Cell<u64>),
) {
    while !stop.get() {
        let Ok(found) = store.get("/count").await else { continue };
        let (condition, value) = match &found {
            None => (Condition::KeyMissing("/count".into()), 0),
            Some(found) => {
                let text = std::str::from_utf8(&found.value).expect("a number");
                let value: u64 = text.parse().expect("a number");
                (Condition::KeyAt("/count".into(), found.revision), value)
            }
        };
        let txn = Txn::new().when(condition).put("/count", (value + 1).to_string());
        match store.txn(txn).await {
            Ok(TxnOutcome::Committed { .. }) => made.set(made.get() + 1),
            Ok(TxnOutcome::Conflict) | Err(MetaError::Unavailable(_)) => {}
            Err(MetaError::Unknown(_)) => unknown.set(unknown.get() + 1),
            Err(error) => panic!("{error}"),
        }
    }
}

/// Counts with several clients through faults; how many were made, and in doubt.
async fn count_through(etcd: &RefCell<Etcd>, faults: impl Future<Output = ()>) -> (u64, u64) {
    let (made, unknown, stop) = (Cell::new(0), Cell::new(0), Cell::new(false));
    let stores: Vec<_> = (0..3).map(|_| client(&etcd.borrow())).collect();
    let counters = stores.iter().map(|store| count(store, &stop, (&made, &unknown)));
    let faults = async {
        faults.await;
        stop.set(true);
    };
    tokio::join!(faults, futures_util::future::join_all(counters));
    let found = stores[0].get("/count").await.expect("it is back").expect("it was counted");
    let value: u64 = std::str::from_utf8(&found.value).expect("text").parse().expect("a number");
    let (made, unknown) = (made.get(), unknown.get());
    assert!(
        (made..=made + unknown).contains(&value),
        "{value} is not within {made} and {unknown} more"
    );
    (made, unknown)
}

#[test]
fn every_increment_is_made_or_refused_or_in_doubt_while_etcd_is_killed() {
    let etcd = RefCell::new(Etcd::start(1));
    run(async {
        let faults = async {
            for round in 0..12 {
                sleep(Duration::from_millis(150 + round * 13)).await;
                etcd.borrow_mut().kill(0);
                sleep(Duration::from_millis(round * 20)).await;
                etcd.borrow_mut().restart(0);
            }
            sleep(Duration::from_millis(500)).await;
        };
        let (made, unknown) = count_through(&etcd, faults).await;
        assert!(made > 100, "only {made}");
        assert!(unknown <= 3 * 12, "{unknown} in doubt by 12 kills of 3 clients");
    });
}

#[test]
fn every_increment_is_made_or_refused_or_in_doubt_while_members_come_and_go() {
    let etcd = RefCell::new(Etcd::start(3));
    run(async {
        let faults = async {
            for round in 0..6 {
                sleep(Duration::from_millis(400 + 37 * round)).await;
                let member = usize::try_from(round % 3).expect("small");
                etcd.borrow_mut().kill(member);
                sleep(Duration::from_millis(1500)).await;
                etcd.borrow_mut().restart(member);
                let paused = (member + 1) % 3;
                etcd.borrow().pause(paused);
                sleep(Duration::from_millis(2500)).await;
                etcd.borrow().resume(paused);
            }
            sleep(Duration::from_secs(1)).await;
        };
        let (made, _) = count_through(&etcd, faults).await;
        assert!(made > 100, "only {made}");
    });
}
