//! The suite under a paused clock, and the faults.

use tokio::task::LocalSet;
use tokio::time::timeout;

use super::*;
use crate::meta::{Condition, WatchError, conformance};

async fn local<T>(test: impl Future<Output = T>) -> T {
    LocalSet::new().run_until(test).await
}

#[tokio::test(start_paused = true)]
async fn conforms() {
    let fresh = || async { Rc::new(MemoryStore::new(Env::from_seed(1))) as Rc<dyn MetaStore> };
    local(conformance::run(fresh, Duration::from_secs(1))).await;
}

#[tokio::test(start_paused = true)]
async fn conforms_with_delays() {
    let fresh = || async {
        let store = MemoryStore::new(Env::from_seed(1));
        // Shorter than a quarter of the lease: keep-alives of the suite come in time.
        store.faults().delay.set((Duration::from_millis(1), Duration::from_millis(20)));
        Rc::new(store) as Rc<dyn MetaStore>
    };
    local(conformance::run(fresh, Duration::from_secs(1))).await;
}

async fn swap(store: &MemoryStore, revision: u64, value: &str) -> MetaResult<TxnOutcome> {
    let condition = if revision == 0 {
        Condition::KeyMissing("/a".into())
    } else {
        Condition::KeyAt("/a".into(), revision)
    };
    store.txn(Txn::new().when(condition).put("/a", value.to_owned())).await
}

#[tokio::test(start_paused = true)]
async fn unknown_outcomes() {
    local(async {
        let store = MemoryStore::new(Env::from_seed(1));
        let faults = store.faults();
        let unknown = Err(MetaError::Unknown("no answer".into()));
        faults.unknown_applied.set(CHANCE_ONE);
        assert_eq!(swap(&store, 0, "1").await, unknown);
        assert_eq!(store.get("/a").await.unwrap().unwrap().revision, 1);
        faults.heal();
        faults.unknown_lost.set(CHANCE_ONE);
        assert_eq!(swap(&store, 1, "2").await, unknown);
        assert_eq!(store.get("/a").await.unwrap().unwrap().revision, 1);
        faults.heal();

        // A late swap: reading the old revision proves nothing.
        faults.unknown_late.set(CHANCE_ONE);
        faults.late.set(Duration::from_secs(5));
        assert_eq!(swap(&store, 1, "late").await, unknown);
        assert_eq!(store.get("/a").await.unwrap().unwrap().revision, 1);
        sleep(Duration::from_secs(6)).await;
        assert_eq!(store.get("/a").await.unwrap().unwrap().value, "late");

        // One that is overtaken never happens.
        assert_eq!(swap(&store, 2, "never").await, unknown);
        faults.heal();
        assert!(swap(&store, 2, "winner").await.unwrap().committed().is_some());
        sleep(Duration::from_secs(6)).await;
        assert_eq!(store.get("/a").await.unwrap().unwrap().value, "winner");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn unavailable_means_not_done_and_is_per_client() {
    local(async {
        let store = MemoryStore::new(Env::from_seed(1));
        let other = store.client(Rc::default());
        store.faults().unavailable.set(true);
        assert!(matches!(swap(&store, 0, "1").await, Err(MetaError::Unavailable(_))));
        assert_eq!(other.get("/a").await, Ok(None));
        assert!(swap(&other, 0, "1").await.unwrap().committed().is_some());
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_dropped_change_still_happens() {
    local(async {
        let store = MemoryStore::new(Env::from_seed(1));
        store.faults().delay.set((Duration::from_secs(1), Duration::from_secs(2)));
        timeout(Duration::from_millis(1), swap(&store, 0, "1")).await.unwrap_err();
        store.faults().heal();
        assert_eq!(store.get("/a").await, Ok(None));
        sleep(Duration::from_secs(2)).await;
        assert_eq!(store.get("/a").await.unwrap().unwrap().value, "1");
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn restoring_and_wiping() {
    local(async {
        let store = MemoryStore::new(Env::from_seed(1));
        swap(&store, 0, "1").await.unwrap();
        let old = store.snapshot();
        swap(&store, 1, "2").await.unwrap();
        let mut watch = store.watch("/", 0).await.unwrap();
        store.faults().unknown_late.set(CHANCE_ONE);
        store.faults().late.set(Duration::from_secs(5));
        swap(&store, 1, "from another life").await.unwrap_err();
        store.faults().heal();

        store.restore(&old);
        assert_eq!(watch.next().await, Err(WatchError::Closed));
        sleep(Duration::from_secs(6)).await;
        let refused = store.list("").await;
        assert!(matches!(refused, Err(MetaError::Unavailable(_))), "what was replaced is not used");
        let after = store.client(Rc::default());
        assert_eq!(after.list("").await.unwrap().revision, 1, "an older store is behind");
        assert_eq!(after.get("/a").await.unwrap().unwrap().value, "1");
        store.wipe();
        assert_eq!(store.client(Rc::default()).list("").await.unwrap(), Listing::default());
    })
    .await;
}

#[test]
fn a_seed_gives_the_same_run() {
    let run = |seed| {
        crate::sim::simulate(async move {
            let store = MemoryStore::new(Env::from_seed(seed));
            let faults = store.faults();
            faults.delay.set((Duration::ZERO, Duration::from_millis(9)));
            faults.late.set(Duration::from_millis(50));
            faults.unknown_applied.set(100);
            faults.unknown_lost.set(100);
            faults.unknown_late.set(100);
            let mut trace = Vec::new();
            let start = Instant::now();
            for i in 0..100 {
                let outcome = store.txn(Txn::new().put(format!("/{}", i % 7), i.to_string())).await;
                trace.push(format!("{:?} {outcome:?}", start.elapsed()));
            }
            format!("{trace:?} {:?}", store.list("").await)
        })
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
