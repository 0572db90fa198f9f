//! The index in memory: lookups of single blocks, and merges of random and of sequential extents
//! into a tree of 64 GiB.

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use futures_util::FutureExt;
use sds::env::Env;
use sds::id::SegmentId;
use sds::segment::BlockAddr;
use sds::volume::index::{Malformed, PageSink, Pages, Relocate, Tree, lookup, merge};
use sds::volume::overlay::{Extent, Overlay, Target};

/// Logical blocks of the volume: 64 GiB.
const BLOCKS: u64 = 16 << 20;
/// Extents of one merge.
const EXTENTS: u64 = 16 << 10;

/// Pages that are never forgotten.
#[derive(Clone, Default)]
struct Memory(Vec<Bytes>);

#[derive(Debug)]
struct Bad;

impl From<Malformed> for Bad {
    fn from(_: Malformed) -> Self {
        Self
    }
}

impl Pages for Memory {
    type Error = Bad;
    async fn load(&self, addr: BlockAddr) -> Result<Bytes, Bad> {
        Ok(self.0[addr.block as usize].clone())
    }
}

impl PageSink for Memory {
    async fn store(&mut self, _: u8, _: u64, page: Bytes) -> Result<BlockAddr, Bad> {
        let block = u32::try_from(self.0.len()).expect("few pages");
        self.0.push(page);
        Ok(BlockAddr { segment: SegmentId(1), block })
    }
}

fn now<T>(future: impl Future<Output = Result<T, Bad>>) -> T {
    future.now_or_never().expect("memory never waits").expect("a sound tree")
}

/// Extents of one block each, at random places or one after the other, each at a place of its own.
fn extents(env: &Env, random: bool) -> Vec<Extent> {
    let mut overlay = Overlay::default();
    for number in 0..EXTENTS {
        let lba = if random { env.random_below(BLOCKS) } else { number };
        // Every other block, so that neighbours do not continue each other.
        let block = u32::try_from(number * 2).expect("small");
        let target = Target::Data(BlockAddr { segment: SegmentId(7), block });
        overlay.insert(Extent { lba, len: 1, target }, |_| ());
    }
    overlay.iter().collect()
}

fn filled() -> (Memory, Tree) {
    let env = Env::from_seed(1);
    let mut pages = Memory::default();
    let mut tree = Tree::empty(BLOCKS);
    for _ in 0..4 {
        let extents = extents(&env, true);
        tree = now(merge(&mut pages, tree, BLOCKS, &extents, &Relocate::default())).0;
    }
    (pages, tree)
}

fn lookups(criterion: &mut Criterion) {
    let (pages, tree) = filled();
    let env = Env::from_seed(2);
    let mut group = criterion.benchmark_group("index/lookup");
    group.throughput(Throughput::Elements(1));
    group.bench_function("one block", |bencher| {
        bencher.iter(|| now(lookup(&pages, tree, env.random_below(BLOCKS), 1)));
    });
    group.bench_function("256 blocks", |bencher| {
        bencher.iter(|| now(lookup(&pages, tree, env.random_below(BLOCKS - 256), 256)));
    });
    group.finish();
}

fn merges(criterion: &mut Criterion) {
    let (pages, tree) = filled();
    let env = Env::from_seed(3);
    let mut group = criterion.benchmark_group("index/merge");
    group.sample_size(10);
    group.throughput(Throughput::Elements(EXTENTS));
    for (name, random) in [("random extents", true), ("sequential extents", false)] {
        let extents = extents(&env, random);
        group.bench_function(name, |bencher| {
            bencher.iter_batched(
                || pages.clone(),
                |mut pages| now(merge(&mut pages, tree, BLOCKS, &extents, &Relocate::default())),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

fn overlays(criterion: &mut Criterion) {
    let env = Env::from_seed(4);
    let mut group = criterion.benchmark_group("index/overlay");
    group.throughput(Throughput::Elements(EXTENTS));
    group.bench_function("random inserts", |bencher| bencher.iter(|| extents(&env, true)));
    group.finish();
}

criterion_group!(benches, lookups, merges, overlays);
criterion_main!(benches);
