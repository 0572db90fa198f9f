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
    node(town, 0).create_pool(pool).await.expect("there are domains enough");
    for number in 0..VOLUMES {
        let name = format!("p/v{number}");
        let volume = CreateVolume { name, size: PIECES * PIECE as u64 };
        let node = node(town, usize::try_from(number % 4).expect("small"));
        node.create_volume(volume).await.expect("there is room");
    }
}

async fn export(town: &Town, number: u64) -> Rc<dyn BlockTarget> {
    Exports(node(town, 0)).open(&format!("p/v{number}")).await.expect("it is exported")
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
    for (index, host) in town.hosts().iter().enumerate() {
        let node = host.node();
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

/// Waits until a node is not removed for this reason; whatever the reason, it must not be removed.
async fn until_refused(town: &Town, name: &str, why: &str) {
    for _ in 0..200 {
        let refused = node(town, 0).remove_node(name).await.expect_err("it must not be removed");
        if refused.to_string().contains(why) {
            return;
        }
        sleep(Duration::from_millis(50)).await;
    }
    panic!("it is never refused because it {why}");
}

/// Slots in use on some hosts, bytes.
fn held(town: &Town, hosts: &[usize]) -> u64 {
    let fills = fills(town).into_iter().filter(|(host, ..)| hosts.contains(host));
    fills.map(|(_, used, _)| u64::from(used) * SLOT_BYTES).sum()
}

/// As many nodes come as there are.
async fn grow(town: &Town) {
    for _ in 4..8 {
        let host = town.add_host(1).await;
        town.start(&host);
    }
    town.until_met(8).await;
    let begun = Instant::now();
    let spread = until_balanced(town, 0..8).await;
    let (new, moved) = (held(town, &[4, 5, 6, 7]), moved(town));
    println!("{moved} bytes moved in {:?}, the new nodes hold {new}", begun.elapsed());
    println!("off by {spread:.1} %: {:?}", fills(town));
    // What the new nodes hold came by a move or by a write, and little of it twice.
    assert!(spread <= 10.0, "{spread}");
    assert!(moved <= new * 115 / 100 && moved > new / 2, "{moved} bytes moved, {new} are new");
}

/// Two nodes are emptied, stopped and removed.
async fn shrink(town: &Town) {
    let gone = [2, 5];
    until_refused(town, "n2", "is in use").await;
    let (held_there, before) = (held(town, &gone), moved(town) + rebuilt(town));
    for index in gone {
        node(town, 0).drain_node(&format!("n{index}"), true).await.expect("there are others");
    }
    until_refused(town, "n2", "still has data of").await;
    let empty = || held(town, &gone) == 0;
    until("the drained nodes are empty", Duration::from_mins(10), empty).await;
    let moved = moved(town) + rebuilt(town) - before;
    println!("drained: {held_there} bytes of slots, {moved} bytes moved or rebuilt");
    assert!(moved <= held_there * 115 / 100, "{moved} of {held_there}");
    until_refused(town, "n5", "runs").await;
    for index in gone {
        node(town, index).stop().await;
        kill(town, index).await;
        sleep(Duration::from_secs(3)).await;
        let removed = node(town, 0).remove_node(&format!("n{index}")).await;
        removed.expect("it is empty and does not run");
    }
    let spread = until_balanced(town, 0..8).await;
    println!("off by {spread:.1} %: {:?}", fills(town));
    assert!(spread <= 10.0, "{spread}");
    let views = node(town, 0).gather().await;
    assert_eq!((views.disks.len(), node(town, 0).list_nodes().await.len()), (6, 6));
}

#[test]
fn four_nodes_grow_to_eight_under_load_and_two_are_drained_and_removed() {
    run(async || {
        let town = town(4, 1).await;
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
        grow(&town).await;
        shrink(&town).await;
        noticed.stop.set(true);
        for load in loads {
            load.await.expect("no error");
        }
        let longest = noticed.longest.get();
        println!("longest of {} requests: {longest:?}", noticed.requests.get());
        assert!(longest < Duration::from_millis(200), "{longest:?}");
    });
}
