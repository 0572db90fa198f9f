//! Clusters that grow and shrink: what moves, how much of it, and what clients notice.

use super::*;
use crate::id::BLOCK_SIZE;
use crate::placement::balance::{START, is_even};

/// Volumes, and pieces of each.
const VOLUMES: u64 = 6;
const PIECES: u64 = 256;
/// Bytes of a slot of these disks.
const SLOT_BYTES: u64 = 1 << 20;

/// What clients noticed.
#[derive(Default)]
struct Noticed {
    longest: Cell<Duration>,
    requests: Cell<u64>,
    stop: Cell<bool>,
}

async fn make_volumes(town: &Town, scheme: PoolScheme, domain: FailureDomain) {
    let pool = CreatePool { name: "p".into(), scheme, failure_domain: domain, min_size: None };
    town.node(0).create_pool(pool).await.expect("there are domains enough");
    for number in 0..VOLUMES {
        let name = format!("p/v{number}");
        let volume = CreateVolume { name, size: PIECES * PIECE as u64 };
        let node = town.node(usize::try_from(number % 4).expect("small"));
        node.create_volume(volume).await.expect("there is room");
    }
}

async fn export(town: &Town, number: u64) -> Rc<dyn BlockTarget> {
    Exports(town.node(0)).open(&format!("p/v{number}")).await.expect("it is exported")
}

/// Overwrites the first block of pieces here and there, and reads what was written, until it is told to stop.
async fn load(target: Rc<dyn BlockTarget>, noticed: Rc<Noticed>, env: Env) {
    let mut versions = vec![0; usize::try_from(PIECES).expect("small")];
    while !noticed.stop.get() {
        let number = env.random_below(PIECES);
        let index = usize::try_from(number).expect("small");
        let started = Instant::now();
        let at = number * PIECE as u64;
        if env.chance(1, 2) {
            versions[index] += 1;
            let block = piece(number, versions[index]).slice(..BLOCK_SIZE);
            target.write(at, block).await.expect("written");
        } else {
            let data = target.read(at, 2 * BLOCK_SIZE).await.expect("read").concat();
            let (first, second) = data.split_at(BLOCK_SIZE);
            assert!(*first == piece(number, versions[index])[..BLOCK_SIZE], "piece {number}");
            assert!(*second == piece(number, 0)[BLOCK_SIZE..2 * BLOCK_SIZE], "piece {number}");
        }
        noticed.longest.set(noticed.longest.get().max(started.elapsed()));
        noticed.requests.set(noticed.requests.get() + 1);
        sleep(Duration::from_millis(200)).await;
    }
}

async fn fill(target: &Rc<dyn BlockTarget>) {
    for number in 0..PIECES {
        target.write(number * PIECE as u64, piece(number, 0)).await.expect("written");
    }
}

/// Slots in use and all slots of each disk, by host.
fn fills(town: &Town) -> Vec<(usize, u32, u32)> {
    let mut fills = Vec::new();
    for (index, host) in town.hosts.iter().enumerate() {
        let node = host.node.borrow().clone();
        for slot in node.iter().flat_map(|node| node.slots()) {
            let Some(disk) = slot.disk() else { continue };
            let info = disk.info().expect("it is online");
            fills.push((index, info.slots - info.slots_free, info.slots));
        }
    }
    fills
}

fn moved(town: &Town) -> u64 {
    town.nodes().iter().map(|node| node.registry.balanced_bytes.get()).sum()
}

fn rebuilt(town: &Town) -> u64 {
    town.nodes().iter().map(|node| node.registry.rebuilt_bytes.get()).sum()
}

/// Waits until nothing has moved for a while; largest difference from the mean, percent of it.
async fn until_balanced(town: &Town, hosts: std::ops::Range<usize>) -> f64 {
    let even = || {
        let fills = fills(town).into_iter().filter(|(host, ..)| hosts.contains(host));
        let fills: Vec<_> = fills.map(|(_, used, slots)| (used, slots)).collect();
        is_even(fills.iter().copied(), START)
    };
    let waits = async {
        while !even() {
            sleep(Duration::from_millis(500)).await;
        }
    };
    let found = timeout(Duration::from_mins(5), waits).await;
    assert!(found.is_ok(), "the disks are not filled alike: {:?}", fills(town));
    let (mut before, mut quiet) = (moved(town), 0);
    while quiet < 10 {
        sleep(Duration::from_secs(2)).await;
        quiet = if moved(town) == before { quiet + 1 } else { 0 };
        before = moved(town);
    }
    let fills = fills(town).into_iter().filter(|(host, ..)| hosts.contains(host));
    let used: Vec<f64> = fills.map(|(_, used, _)| f64::from(used)).collect();
    let mean = used.iter().sum::<f64>() / used.len() as f64;
    used.iter().map(|used| (used - mean).abs() / mean * 100.0).fold(0.0, f64::max)
}

#[test]
fn four_nodes_grow_to_eight_under_load_and_two_are_drained_and_removed() {
    run(async || {
        let mut town = Town::new(4, 1).await;
        town.start_all().await;
        make_volumes(&town, PoolScheme::Replicas { copies: 3 }, FailureDomain::Node).await;
        let noticed: Rc<Noticed> = Rc::default();
        let mut loads = Vec::new();
        for number in 0..VOLUMES {
            let target = export(&town, number).await;
            fill(&target).await;
            let env = Env::from_seed(number);
            loads.push(tokio::task::spawn_local(load(target, noticed.clone(), env)));
        }
        sleep(Duration::from_secs(20)).await;
        let before = fills(&town);
        println!("before: {before:?}");

        for index in 4..8 {
            town.add_host(1);
            town.start(index);
        }
        town.until_met(8).await;
        let begun = Instant::now();
        let spread = until_balanced(&town, 0..8).await;
        let now = fills(&town);
        let new: u64 =
            now.iter().filter(|(host, ..)| *host >= 4).map(|(_, used, _)| u64::from(*used)).sum();
        let shards = moved(&town);
        println!(
            "after {:?}: {now:?}, off by {spread:.1} %, {shards} bytes moved, {} new",
            begun.elapsed(),
            new * SLOT_BYTES
        );
        println!("longest {:?} of {}", noticed.longest.get(), noticed.requests.get());
        // Each slot that the new nodes hold came by a move or by a write, and none twice.
        assert!(spread <= 10.0, "{spread}");
        assert!(shards <= new * SLOT_BYTES * 115 / 100, "{shards} bytes moved");

        let held: u64 = now
            .iter()
            .filter(|(host, ..)| [2, 5].contains(host))
            .map(|(_, used, _)| u64::from(*used))
            .sum();
        let refused = town.node(0).remove_node("n2").await.expect_err("it is in use");
        assert!(refused.to_string().contains("is in use"), "{refused}");
        let (moves, rebuilds) = (moved(&town), rebuilt(&town));
        for name in ["n2", "n5"] {
            town.node(0).drain_node(name, true).await.expect("there are others");
        }
        let refused = town.node(0).remove_node("n2").await.expect_err("it holds data");
        assert!(refused.to_string().contains("still has data of"), "{refused}");
        let empty = || {
            let fills = fills(&town);
            fills.iter().filter(|(host, ..)| [2, 5].contains(host)).all(|(_, used, _)| *used == 0)
        };
        until("the drained nodes are empty", Duration::from_mins(10), empty).await;
        let (moves, rebuilds) = (moved(&town) - moves, rebuilt(&town) - rebuilds);
        println!("drained: held {}, rebuilt {rebuilds}, moved {moves}", held * SLOT_BYTES);
        assert!(
            moves + rebuilds <= held * SLOT_BYTES * 115 / 100,
            "{moves} and {rebuilds} of {held}"
        );
        let refused = town.node(0).remove_node("n5").await.expect_err("it runs");
        assert!(refused.to_string().contains("runs"), "{refused}");
        for (index, name) in [(2, "n2"), (5, "n5")] {
            let node = town.node(index);
            node.stop().await;
            town.kill(index);
            town.node(0).remove_node(name).await.expect("it is empty and does not run");
        }
        let spread = until_balanced(&town, 0..8).await;
        println!("after rm: off by {spread:.1} %, {:?}", fills(&town));
        assert!(spread <= 10.0, "{spread}");
        noticed.stop.set(true);
        for load in loads {
            load.await.expect("no error");
        }
        println!("longest {:?} of {}", noticed.longest.get(), noticed.requests.get());
        assert!(noticed.longest.get() < Duration::from_millis(500), "{:?}", noticed.longest.get());
        let views = town.node(0).gather().await;
        assert_eq!((views.disks.len(), town.node(0).list_nodes().await.len()), (6, 6));
    });
}
