//! A volume in process, from its target down to files through `io_uring`, against one such file
//! alone in the same run: 4 KiB at random addresses at depth 1 and 32, and 1 MiB in sequence.
//!
//! Besides criterion's report it prints the time per request and its ratio to the device.
//! `SDS_BENCH_DIR` says where the files go (default: `target`).

#![allow(clippy::print_stdout, reason = "a benchmark reports on its standard output")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput};
use sds::buffer::AlignedBuf;
use sds::disk::device::BlockDevice;
use sds::disk::uring::{Ring, UringDevice};
use sds::env::Env;
use sds::export::BlockTarget;
use sds::id::BLOCK_SIZE;
use sds::shard::Scheme;
use sds::volume::head::HeadConfig;
use sds::volume::target::HeadTarget;
use tokio::runtime::Runtime;
use tokio::task::LocalSet;

mod common;

use common::{DiskSize, Files, Pool};

const DISK_BYTES: u64 = 1 << 30;
const VOLUME_BYTES: u64 = 256 << 20;

/// One kind of traffic.
#[derive(Clone, Copy)]
struct Work {
    name: &'static str,
    write: bool,
    bytes: usize,
    depth: u64,
    random: bool,
}

const WORKS: [Work; 6] = [
    // The first fills the volume.
    Work { name: "write 1 MiB", write: true, bytes: 1 << 20, depth: 4, random: false },
    Work { name: "read 1 MiB", write: false, bytes: 1 << 20, depth: 4, random: false },
    Work { name: "write 4 KiB", write: true, bytes: 4 << 10, depth: 1, random: true },
    Work { name: "write 4 KiB", write: true, bytes: 4 << 10, depth: 32, random: true },
    Work { name: "read 4 KiB", write: false, bytes: 4 << 10, depth: 1, random: true },
    Work { name: "read 4 KiB", write: false, bytes: 4 << 10, depth: 32, random: true },
];

/// What traffic goes to.
#[derive(Clone)]
enum Contender {
    Device(UringDevice),
    Volume(Rc<HeadTarget>),
}

impl Contender {
    async fn write(&self, offset: u64, data: Bytes) {
        match self {
            Self::Device(device) => {
                device.write(offset, Rc::from([data]), true).await.expect("written");
            }
            Self::Volume(target) => target.write(offset, data).await.expect("written"),
        }
    }

    async fn read(&self, offset: u64, len: usize) {
        match self {
            Self::Device(device) => {
                drop(device.read(offset, AlignedBuf::new(len)).await.expect("read"));
            }
            Self::Volume(target) => drop(target.read(offset, len).await.expect("read")),
        }
    }
}

async fn worker(contender: Contender, work: Work, seed: u64, left: Rc<Cell<u64>>) {
    let env = Env::from_seed(seed);
    let mut noise = AlignedBuf::new(work.bytes);
    noise.chunks_exact_mut(8).for_each(|w| w.copy_from_slice(&env.random_u64().to_le_bytes()));
    let data = noise.freeze();
    let places = VOLUME_BYTES / work.bytes as u64;
    while let Some(rest) = left.get().checked_sub(1) {
        left.set(rest);
        let place = if work.random { env.random_below(places) } else { rest % places };
        let offset = place * work.bytes as u64;
        if work.write {
            contender.write(offset, data.clone()).await;
        } else {
            contender.read(offset, work.bytes).await;
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "measures real time")]
fn run(
    (runtime, local): (&Runtime, &LocalSet),
    contender: &Contender,
    work: Work,
    count: u64,
) -> Duration {
    let left = Rc::new(Cell::new(count));
    local.block_on(runtime, async {
        let start = std::time::Instant::now();
        let workers: Vec<_> = (0..work.depth)
            .map(|seed| {
                tokio::task::spawn_local(worker(contender.clone(), work, seed, left.clone()))
            })
            .collect();
        for worker in workers {
            worker.await.expect("no panic");
        }
        start.elapsed()
    })
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args().sample_size(10);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let local = LocalSet::new();
    let mut files = Files::new("volume");
    let contenders = local.block_on(&runtime, async {
        let ring = Ring::new().expect("io_uring");
        let device = files.device(&ring, VOLUME_BYTES);
        let size = DiskSize { bytes: DISK_BYTES, slot_bytes: None };
        let mut volumes = Vec::new();
        for scheme in [Scheme::replicated(3), Scheme { data: 4, parity: 2 }] {
            let pool = Pool::new(&mut files, &ring, scheme, size).await;
            volumes.push(Rc::new(pool.volume(VOLUME_BYTES, HeadConfig::default()).await));
        }
        [
            ("device", Contender::Device(device)),
            ("3 copies", Contender::Volume(volumes[0].clone())),
            ("4+2", Contender::Volume(volumes[1].clone())),
        ]
    });
    let mut totals: BTreeMap<(usize, &str), (Duration, u64)> = BTreeMap::new();
    for (number, work) in WORKS.into_iter().enumerate() {
        let mut group = criterion.benchmark_group(format!("volume/{}", work.name));
        group.throughput(Throughput::Bytes(work.bytes as u64));
        for (name, contender) in &contenders {
            if work.write && !work.random {
                run((&runtime, &local), contender, work, VOLUME_BYTES / work.bytes as u64);
            }
            group.bench_function(BenchmarkId::new(*name, work.depth), |bencher| {
                bencher.iter_custom(|count| {
                    let count = count.max(work.depth * 8);
                    let wall = run((&runtime, &local), contender, work, count);
                    let total = totals.entry((number, *name)).or_default();
                    *total = (total.0 + wall, total.1 + count);
                    wall
                });
            });
        }
        group.finish();
    }
    report(&totals);
    drop(contenders);
    drop(local);
    drop(files);
    criterion.final_summary();
}

fn report(totals: &BTreeMap<(usize, &str), (Duration, u64)>) {
    println!("\nµs per request   depth     device   3 copies  ratio        4+2  ratio");
    for (number, work) in WORKS.iter().enumerate() {
        let micros = |name: &'static str| {
            let (wall, count) = totals.get(&(number, name))?;
            Some(wall.as_secs_f64() * 1e6 / *count as f64)
        };
        if let (Some(device), Some(copies), Some(coded)) =
            (micros("device"), micros("3 copies"), micros("4+2"))
        {
            println!(
                "{:<16} {:>5} {device:>10.2} {copies:>10.2} {:>6.2} {coded:>10.2} {:>6.2}",
                work.name,
                work.depth,
                copies / device,
                coded / device,
            );
        }
    }
}

// The block size is what the volume's own requests are made of.
const _: () = assert!((4 << 10) == BLOCK_SIZE);
