//! Placement in a cluster of 60 nodes in 5 racks with 24 disks each and 700 volumes, 8 PB in all:
//! drawing a write set, building copysets, a head's part of what is to move.
//!
//! Besides the times it tells, as text, how many write sets there are and what that part is.

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]
#![allow(clippy::print_stdout, reason = "figures that are no times")]

use std::collections::BTreeSet;
use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use sds::env::Env;
use sds::id::{DiskId, VolumeId};
use sds::meta::members::PlaceRecord;
use sds::placement::balance::{Disk, Part};
use sds::placement::choose::{Candidate, Request, choose};
use sds::placement::copysets::{Copysets, Domain, SCATTER_WIDTH};
use sds::placement::heads::{Seat, plan};
use sds::shard::domain::{Domains, Level};

const RACKS: u32 = 5;
const NODES: u32 = 60;
/// Disks of a node.
const DISKS: u32 = 24;
const VOLUMES: u32 = 700;
/// 8 PB over 1,440 disks in slots of 1 GiB.
const SLOTS: u32 = 5_174;
/// Slots in use, percent.
const FILL: u32 = 60;

fn domains(disk: u32) -> Domains {
    let node = disk / DISKS;
    Domains { disk, node, rack: node % RACKS }
}

fn candidates() -> Vec<Candidate> {
    let free = |disk: u32| SLOTS - (SLOTS * (FILL - 5 + disk * 7 % 11) / 100);
    let candidate = |disk| Candidate {
        domains: domains(disk),
        rank: 0,
        free: free(disk),
        slots: SLOTS,
        load: 0,
    };
    (0..NODES * DISKS).map(candidate).collect()
}

fn nodes() -> Vec<Domain> {
    (0..NODES)
        .map(|number| Domain { number, wider: number % RACKS, weight: (DISKS * SLOTS).into() })
        .collect()
}

fn id(number: u32) -> [u8; 16] {
    u128::from(number + 1).to_be_bytes()
}

/// Of all triples of nodes, the percentage that `lost` of some set are: their loss loses data.
fn fatal_percent(sets: &Copysets, lost: usize) -> f64 {
    assert_eq!(lost, 3, "triples");
    let mut fatal = BTreeSet::new();
    for (set, _) in sets.sets() {
        let mut set = set.to_vec();
        set.sort_unstable();
        for a in 0..set.len() {
            for b in a + 1..set.len() {
                fatal.extend(set[b + 1..].iter().map(|c| (set[a], set[b], *c)));
            }
        }
    }
    let all = f64::from(NODES * (NODES - 1) * (NODES - 2) / 6);
    100.0 * f64::from(u32::try_from(fatal.len()).expect("fewer than all")) / all
}

fn bench_sets(c: &mut Criterion) {
    let (nodes, env) = (nodes(), Env::from_seed(1));
    let disks: Vec<Domain> = (0..NODES * DISKS)
        .map(|disk| Domain { number: disk, wider: disk / DISKS, weight: SLOTS.into() })
        .collect();
    let candidates = candidates();
    for width in [3, 6] {
        let build = |of: &[Domain]| Copysets::build(of, width, SCATTER_WIDTH, 1).expect("enough");
        c.bench_function(&format!("copysets of {width} nodes"), |b| b.iter(|| build(&nodes)));
        c.bench_function(&format!("copysets of {width} disks"), |b| b.iter(|| build(&disks)));
        let sets = build(&nodes);
        println!(
            "{} copysets of {width} nodes; three nodes lost at once hit three of a set in {:.2} % \
             of all cases",
            sets.sets().count(),
            fatal_percent(&sets, 3)
        );
        for (name, copysets) in [("any", None), ("a copyset", Some(&sets))] {
            let request = Request { level: Level::Node, count: width, taken: &[], copysets };
            c.bench_function(&format!("choose {width} disks, {name}"), |b| {
                b.iter(|| choose(black_box(&candidates), request, &env));
            });
        }
    }
}

/// The last two nodes are new and empty: the part of one head.
fn bench_balance(c: &mut Criterion) {
    let used = |disk: u32| if disk < (NODES - 2) * DISKS { SLOTS * FILL / 100 } else { 0 };
    let disk = |number: u32| Disk {
        id: DiskId::from_bytes(id(number)),
        slots: SLOTS,
        used: used(number),
        own: used(number) * u32::from(number.is_multiple_of(3)) / (VOLUMES / 3),
        leaving: 0,
    };
    let disks: Vec<Disk> = (0..NODES * DISKS).map(disk).collect();
    let part = Part::of(&disks);
    println!("a head's part of balance: {:.1} slots from {} disks", part.slots(), part.give.len());
    c.bench_function("part of balance", |b| b.iter(|| Part::of(black_box(&disks))));
}

/// What the manager works out four times a second: with nothing to do, and when a node is gone.
fn bench_heads(c: &mut Criterion) {
    let names: Vec<String> = (0..NODES).map(|node| format!("node{node:02}")).collect();
    let seat = |number: u32| Seat {
        volume: VolumeId::from_bytes(id(number)),
        place: Some((PlaceRecord::on(&names[(number % NODES) as usize]), 1)),
    };
    let seats: Vec<Seat> = (0..VOLUMES).map(seat).collect();
    assert!(plan(&seats, &names, |_| true, true).is_empty(), "they are spread already");
    c.bench_function("manager, nothing to do", |b| {
        b.iter(|| plan(black_box(&seats), &names, |_| true, true));
    });
    let up = |node: &str| node != "node07";
    let left: Vec<String> = names.iter().filter(|name| up(name)).cloned().collect();
    println!("a node is gone: {} volumes get another one", plan(&seats, &left, up, true).len());
    c.bench_function("manager, a node is gone", |b| {
        b.iter(|| plan(black_box(&seats), &left, up, true));
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    targets = bench_sets, bench_balance, bench_heads
}
criterion_main!(benches);
