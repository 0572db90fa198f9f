//! CRC-32 of blocks, as every block is checked where it enters, lands and is read.

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

fn checksum(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("checksum/crc32fast");
    for len in [512_usize, 4 << 10, 64 << 10, 1 << 20] {
        let data: Vec<u8> = (0..=250).cycle().take(len).collect();
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_with_input(BenchmarkId::from_parameter(len), &data, |bencher, data| {
            bencher.iter(|| crc32fast::hash(black_box(data)));
        });
    }
    group.finish();
}

criterion_group!(benches, checksum);
criterion_main!(benches);
