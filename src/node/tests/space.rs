//! Volumes filled to the brim, deleted, and what comes back.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;

use super::{Machine, run, until};
use crate::admin::types::{
    CreatePool, CreateVolume, FailureDomain, HealthLevel, PoolScheme, VolumeName, VolumeState,
};
use crate::export::{BlockTarget, ExportDirectory, TargetError};
use crate::node::Node;
use crate::node::exports::Exports;

/// Size of the disks.
const DISK_BYTES: u64 = 24 << 20;
/// Size of a volume: one alone is larger than all disks together.
const VOLUME_BYTES: u64 = 128 << 20;
/// Written at once.
const PIECE: usize = 256 << 10;

fn content(volume: usize, piece: u64) -> Bytes {
    let mut x = (piece + 1) * 0x9e37_79b9 + volume as u64;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    };
    (0..PIECE / 8).flat_map(|_| next().to_le_bytes()).collect()
}

async fn target(node: &Rc<Node>, volume: usize) -> Rc<dyn BlockTarget> {
    Exports(node.clone()).open(&format!("p/v{volume}")).await.expect("it is exported")
}

fn name(volume: usize) -> VolumeName {
    format!("p/v{volume}").parse().expect("a name")
}

/// Slots in use of each disk.
fn used(node: &Node) -> Vec<u32> {
    node.slots().iter().map(|slot| node.view_disk(slot).slots_used).collect()
}

/// Writes a piece to each volume in turn until there is no space for any; what was written.
async fn fill(targets: &BTreeMap<usize, Rc<dyn BlockTarget>>, written: &mut BTreeMap<usize, u64>) {
    let mut full = 0;
    while full < targets.len() {
        full = 0;
        for (&volume, target) in targets {
            let pieces = written.entry(volume).or_default();
            match target.write(*pieces * PIECE as u64, content(volume, *pieces)).await {
                Ok(()) => *pieces += 1,
                Err(TargetError::NoSpace) => full += 1,
                Err(error) => panic!("volume {volume}, piece {pieces}: {error}"),
            }
        }
    }
}

async fn check(targets: &BTreeMap<usize, Rc<dyn BlockTarget>>, written: &BTreeMap<usize, u64>) {
    for (&volume, target) in targets {
        for piece in 0..written[&volume] {
            let read = target.read(piece * PIECE as u64, PIECE).await.expect("readable");
            assert!(read.concat() == content(volume, piece), "volume {volume}, piece {piece}");
        }
    }
}

/// The figures of disks, pools and volumes agree with each other and with the disks' tables.
async fn check_figures(node: &Node) {
    for head in node.heads() {
        head.check_usage(&BTreeSet::new()).await.expect("right");
    }
    let super::super::parts::Views { disks, pools, volumes, .. } = node.views();
    let mut sums = (0, 0, 0);
    for disk in &disks {
        sums.0 += disk.space.used;
        sums.1 += disk.space.live;
        sums.2 += disk.space.reclaimable;
        assert_eq!(disk.space.used, u64::from(disk.slots_used) * disk.slot_bytes);
    }
    let used: u64 = volumes.iter().map(|volume| volume.space.used).sum();
    assert_eq!((sums.0, sums.0), (used, pools[0].capacity.used));
    let space = pools[0].space;
    let served = volumes.iter().filter(|volume| volume.state != VolumeState::Deleting);
    assert_eq!(space.used, served.map(|volume| volume.space.used).sum::<u64>());
    assert_eq!((space.live, space.reclaimable), (sums.1, sums.2));
}

fn volumes_filled_to_the_brim_come_back(scheme: PoolScheme) {
    run(async || {
        let machine = Machine::with_disks_of(4, DISK_BYTES).await;
        let node = machine.start().await;
        let pool = CreatePool {
            name: "p".into(),
            scheme,
            failure_domain: FailureDomain::Disk,
            min_size: None,
        };
        node.create_pool(pool).await.expect("there are disks enough");
        assert_eq!(used(&node), [0; 4]);
        let mut targets = BTreeMap::new();
        for volume in 0..4 {
            let request = CreateVolume { name: format!("p/v{volume}"), size: VOLUME_BYTES };
            node.create_volume(request).await.expect("thin volumes take no room");
            targets.insert(volume, target(&node, volume).await);
        }
        let empty = node.view_pool("p").expect("it is there");
        assert_eq!((empty.fill.level, empty.fill.full), (HealthLevel::Ok, false), "{empty:?}");
        assert!(empty.fill.thin_percent > 500 && empty.fill.overcommitted, "{empty:?}");
        let mut written = BTreeMap::new();
        fill(&targets, &mut written).await;
        let all: u64 = written.values().sum();
        assert!(all * PIECE as u64 > DISK_BYTES, "{written:?}");
        check(&targets, &written).await;
        // What was said to be writable was, within the overhead and what the reserves give.
        let fits = empty.fill.writable * 4 / 5..empty.fill.writable * 11 / 10;
        assert!(fits.contains(&(all * PIECE as u64)), "{all} pieces, {fits:?}");
        let full = node.view_pool("p").expect("it is there");
        assert!(full.fill.level == HealthLevel::Critical && full.fill.percent > 95, "{full:?}");
        check_figures(&node).await;

        // What is deleted makes room for the others.
        let before: u32 = used(&node).iter().sum();
        for volume in [0, 1] {
            targets.remove(&volume);
            node.remove_volume(&name(volume), true).await.expect("nobody is attached");
        }
        let listed = || node.list_volumes(Some("p")).expect("the pool is there").len();
        until("two are gone", Duration::from_secs(10), || listed() == 2).await;
        check_figures(&node).await;
        assert!(used(&node).iter().sum::<u32>() < before * 3 / 4, "{:?}", used(&node));
        let had = written.clone();
        fill(&targets, &mut written).await;
        for volume in [2, 3] {
            assert!(written[&volume] > had[&volume] + had[&0] / 2, "{had:?} {written:?}");
        }
        // So does a trim, while everything is full.
        targets[&2].zero(0, VOLUME_BYTES, true).await.expect("trims go on");
        written.insert(2, 0);
        let had = written.clone();
        let only = BTreeMap::from([(3, targets[&3].clone())]);
        fill(&only, &mut written).await;
        assert!(written[&3] > had[&3] * 5 / 4, "{had:?} {written:?}");
        check(&targets, &written).await;

        targets.clear();
        drop(only);
        for volume in [2, 3] {
            node.remove_volume(&name(volume), true).await.expect("nobody is attached");
        }
        until("all are gone", Duration::from_secs(10), || listed() == 0).await;
        assert_eq!(used(&node), [0; 4], "slots leak");
        let empty = node.view_pool("p").expect("it is there");
        assert_eq!((empty.fill.level, empty.space.used), (HealthLevel::Ok, 0), "{empty:?}");
        for slot in node.slots() {
            let disk = slot.disk().expect("online");
            disk.check().expect("its tables are consistent");
            assert_eq!(disk.volume_counts().0, 0);
        }
    });
}

#[test]
fn volumes_of_replicas_filled_to_the_brim_come_back() {
    volumes_filled_to_the_brim_come_back(PoolScheme::Replicas { copies: 2 });
}

#[test]
fn coded_volumes_filled_to_the_brim_come_back() {
    volumes_filled_to_the_brim_come_back(PoolScheme::Ec { data: 2, parity: 1 });
}
