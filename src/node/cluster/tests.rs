//! Several nodes on one store, in virtual time.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep, timeout};

use super::*;
use crate::admin::types::{CreatePool, CreateVolume, FailureDomain, PoolScheme};
use crate::env::Env;
use crate::export::{BlockTarget, ExportDirectory};
use crate::node::exports::{Exports, LocalExports};
use crate::sim::cluster::town::{Town, TownConfig, until};

mod balance;
mod recover;

/// A cluster of so many nodes, all of which run.
async fn town(nodes: usize, disks: usize) -> Town {
    let town = Town::new(Env::from_seed(3), TownConfig::default()).await;
    for _ in 0..nodes {
        let host = town.add_host(disks).await;
        town.start(&host);
    }
    town.until_met(nodes).await;
    town
}

fn node(town: &Town, index: usize) -> Rc<Node> {
    town.host(index).node().expect("it runs")
}

async fn kill(town: &Town, index: usize) {
    town.kill(&town.host(index), false).await;
}

async fn start_again(town: &Town, index: usize) {
    town.start(&town.host(index));
    town.until_met(town.hosts().len()).await;
}

fn store_away(town: &Town, away: bool) {
    town.hosts().iter().for_each(|host| host.store.set_unavailable(away));
}

/// The node that serves a volume, once one does.
async fn server_of(town: &Town, volume: VolumeId) -> usize {
    until("somebody serves it", Duration::from_secs(30), || town.serves(volume).is_some()).await;
    town.serves(volume).expect("somebody does")
}

fn run(test: impl AsyncFnOnce()) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, test());
}

async fn create(node: &Rc<Node>, scheme: PoolScheme) -> VolumeId {
    let pool = CreatePool {
        name: "p".into(),
        scheme,
        failure_domain: FailureDomain::Disk,
        min_size: None,
    };
    node.create_pool(pool).await.expect("there are disks enough");
    let volume = CreateVolume { name: "p/v".into(), size: 16 << 20 };
    node.create_volume(volume).await.expect("there is room").id
}

async fn target(node: &Rc<Node>) -> Rc<dyn BlockTarget> {
    Exports(node.clone()).open("p/v").await.expect("it is exported")
}

const PIECE: usize = 64 << 10;

fn piece(number: u64, version: u64) -> Bytes {
    let words = (0..PIECE as u64 / 8).map(|i| (number << 40 | version << 32 | i).to_le_bytes());
    words.flatten().collect::<Vec<u8>>().into()
}

async fn write(target: &Rc<dyn BlockTarget>, version: u64) {
    for number in 0..32 {
        let written = target.write(number * PIECE as u64, piece(number, version)).await;
        written.unwrap_or_else(|error| panic!("piece {number}: {error}"));
    }
}

async fn check(target: &Rc<dyn BlockTarget>, version: u64) {
    for number in 0..32 {
        let read = target.read(number * PIECE as u64, PIECE).await;
        let data = read.unwrap_or_else(|error| panic!("piece {number}: {error}")).concat();
        assert!(data == piece(number, version), "piece {number} is other");
    }
}

#[test]
fn a_volume_lies_on_all_nodes_and_another_one_takes_over_from_a_node_that_dies() {
    run(async || {
        let town = town(4, 2).await;
        let volume = create(&node(&town, 0), PoolScheme::Replicas { copies: 3 }).await;
        let first = server_of(&town, volume).await;
        let before = target(&node(&town, first)).await;
        write(&before, 1).await;
        check(&before, 1).await;
        let died = Instant::now();
        kill(&town, first).await;
        drop(before);
        let second = server_of(&town, volume).await;
        assert_ne!(first, second);
        let took = died.elapsed();
        assert!(took < Duration::from_secs(5), "{took:?}");
        let after = target(&node(&town, second)).await;
        check(&after, 1).await;
        write(&after, 2).await;
        start_again(&town, first).await;
        check(&after, 2).await;
        let whole = || node(&town, second).heads().iter().all(|head| head.reduced().0 == 0);
        until("it is whole again", Duration::from_mins(2), whole).await;
    });
}

#[test]
fn any_node_exports_a_volume_and_follows_its_head() {
    run(async || {
        let town = town(4, 2).await;
        let volume = create(&node(&town, 0), PoolScheme::Ec { data: 4, parity: 2 }).await;
        let first = server_of(&town, volume).await;
        let client = (first + 1) % 4;
        let export = target(&node(&town, client)).await;
        write(&export, 1).await;
        check(&export, 1).await;
        let listed = || async {
            let views = node(&town, client).gather().await;
            assert_eq!((views.disks.len(), views.volumes.len()), (8, 1));
            (views.volumes[0].node.clone(), views.pools[0].domains_online)
        };
        assert_eq!(listed().await, (town.host(first).name.clone(), 8));
        // The head dies under the client, which notices nothing but a pause.
        kill(&town, first).await;
        let started = Instant::now();
        write(&export, 2).await;
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        check(&export, 2).await;
        assert_eq!(listed().await.1, 6);
        start_again(&town, first).await;
        // An operator drains the node of the head: it moves in order.
        let second = server_of(&town, volume).await;
        let name = town.host(second).name.clone();
        let schema = node(&town, client).schema.clone();
        let drained = schema.drain_member(&name, true);
        drained.await.expect("it is there");
        let longest = Cell::new(Duration::ZERO);
        let moved = async {
            let mut number = 0;
            while server_of(&town, volume).await == second || number % 32 != 0 {
                let started = Instant::now();
                export.write(number % 32 * PIECE as u64, piece(number % 32, 3)).await.expect("ok");
                longest.set(longest.get().max(started.elapsed()));
                number += 1;
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_mins(1), moved).await.expect("it moves");
        assert!(longest.get() < Duration::from_millis(500), "{:?}", longest.get());
        check(&export, 3).await;
    });
}

#[test]
fn a_volume_is_deleted_everywhere_and_by_any_node() {
    run(async || {
        let town = town(3, 1).await;
        let volume = create(&node(&town, 0), PoolScheme::Replicas { copies: 3 }).await;
        let first = server_of(&town, volume).await;
        let export = target(&node(&town, (first + 1) % 3)).await;
        write(&export, 1).await;
        let order = |which: usize| {
            let node = node(&town, which);
            async move {
                let (reply, answer) = tokio::sync::oneshot::channel();
                let volume = "p/v".parse().expect("a name");
                node.answer(crate::admin::backend::Command::VolumeRemove {
                    volume,
                    force: true,
                    reply,
                })
                .await;
                answer.await.expect("answered")
            }
        };
        let error = order((first + 2) % 3).await.expect_err("a client of another node is attached");
        assert_eq!(error.code, crate::admin::error::ErrorCode::Conflict, "{error}");
        drop(export);
        order((first + 2) % 3).await.expect("nobody is attached");
        let empty = || {
            let nodes = town.nodes();
            nodes.iter().all(|node| {
                let slots = node.slots();
                slots.iter().all(|slot| slot.disk().expect("online").slot_counts().sealed == 0)
            })
        };
        until("its slots are free", Duration::from_mins(1), empty).await;
        let forgotten = || town.nodes().iter().all(|node| node.deleting.borrow().is_empty());
        until("nobody drops it any more", Duration::from_mins(1), forgotten).await;
        assert!(node(&town, 0).gather().await.volumes.is_empty());
    });
}

#[test]
fn a_head_that_is_cut_off_from_all_others_never_serves_old_data() {
    run(async || {
        let town = town(5, 1).await;
        let volume = create(&node(&town, 0), PoolScheme::Replicas { copies: 3 }).await;
        let first = server_of(&town, volume).await;
        let (near, far) =
            (target(&node(&town, first)).await, target(&node(&town, (first + 1) % 5)).await);
        write(&near, 1).await;
        check(&far, 1).await;
        let own = town.host(first).name.clone();
        for host in town.hosts().iter().filter(|host| host.name != own) {
            town.net.cut(&own, &host.name);
        }
        let cut = Instant::now();
        // Nobody but the store is reached by it; a client of it waits.
        let stuck = near.clone();
        let late = tokio::task::spawn_local(async move { stuck.write(0, piece(0, 2)).await });
        write(&far, 3).await;
        assert!(cut.elapsed() < Duration::from_secs(15), "{:?}", cut.elapsed());
        for number in 0..32 {
            let read = near.read(number * PIECE as u64, PIECE);
            let read = timeout(Duration::from_millis(500), read).await;
            if let Ok(Ok(data)) = read {
                assert!(data.concat() == piece(number, 3), "piece {number} is old");
            }
        }
        check(&far, 3).await;
        town.net.heal(true);
        let _either = timeout(Duration::from_mins(1), late).await.expect("it ends");
        town.until_met(5).await;
        // What was written beside it may have come before or after.
        let first_piece = far.read(0, PIECE).await.expect("readable").concat();
        assert!([piece(0, 2), piece(0, 3)].iter().any(|piece| *piece == first_piece));
        write(&near, 4).await;
        check(&far, 4).await;
    });
}

#[test]
fn without_the_store_a_cluster_serves_on_and_nobody_is_judged() {
    run(async || {
        let town = town(4, 1).await;
        let volume = create(&node(&town, 0), PoolScheme::Replicas { copies: 3 }).await;
        let first = server_of(&town, volume).await;
        let export = target(&node(&town, (first + 1) % 4)).await;
        write(&export, 1).await;
        store_away(&town, true);
        for round in 0..10 {
            sleep(Duration::from_mins(1)).await;
            write(&export, round).await;
            check(&export, round).await;
        }
        store_away(&town, false);
        sleep(Duration::from_secs(30)).await;
        assert_eq!(server_of(&town, volume).await, first, "nobody was taken for dead");
        check(&export, 9).await;
        let whole = || node(&town, first).heads().iter().all(|head| head.reduced().0 == 0);
        until("it is whole", Duration::from_mins(2), whole).await;
    });
}

#[test]
fn a_node_that_stops_in_order_is_followed_at_once() {
    run(async || {
        let town = town(4, 1).await;
        let volume = create(&node(&town, 0), PoolScheme::Replicas { copies: 3 }).await;
        let first = server_of(&town, volume).await;
        let export = target(&node(&town, (first + 1) % 4)).await;
        write(&export, 1).await;
        let node = node(&town, first);
        let stops = tokio::task::spawn_local(async move { node.stop().await });
        let started = Instant::now();
        write(&export, 2).await;
        let took = started.elapsed();
        assert!(took < Duration::from_millis(500), "{took:?}");
        check(&export, 2).await;
        stops.await.expect("it stops");
        kill(&town, first).await;
        start_again(&town, first).await;
        check(&export, 2).await;
    });
}

#[test]
fn a_head_comes_to_a_client_on_a_node_without_disks_and_leaves_after_it() {
    run(async || {
        let town = town(3, 2).await;
        let volume = create(&node(&town, 0), PoolScheme::Replicas { copies: 3 }).await;
        let gateway = town.add_host(0).await;
        town.start(&gateway);
        town.until_met(4).await;
        // Nothing comes there by itself.
        sleep(Duration::from_secs(20)).await;
        assert_ne!(server_of(&town, volume).await, 3);

        let open = LocalExports(node(&town, 3));
        let export = open.open("p/v").await.expect("it is exported there too");
        let longest = Cell::new(Duration::ZERO);
        let comes = async {
            let mut number = 0;
            while server_of(&town, volume).await != 3 || number % 32 != 0 {
                let started = Instant::now();
                export.write(number % 32 * PIECE as u64, piece(number % 32, 1)).await.expect("ok");
                longest.set(longest.get().max(started.elapsed()));
                number += 1;
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(Duration::from_secs(20), comes).await.expect("it comes");
        assert!(longest.get() < Duration::from_millis(200), "{:?}", longest.get());
        check(&export, 1).await;
        sleep(Duration::from_secs(30)).await;
        assert_eq!(server_of(&town, volume).await, 3, "it stays with its client");

        // A second client elsewhere does not draw it away, and it leaves when its own is gone.
        let other = LocalExports(node(&town, 0)).open("p/v").await.expect("it is exported");
        sleep(Duration::from_secs(10)).await;
        assert_eq!(server_of(&town, volume).await, 3);
        drop(export);
        let back = async {
            while server_of(&town, volume).await != 0 {
                sleep(Duration::from_millis(100)).await;
            }
        };
        timeout(Duration::from_mins(2), back).await.expect("it goes to the client that is left");
        check(&other, 1).await;
    });
}
