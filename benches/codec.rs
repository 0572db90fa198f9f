//! All candidates for the erasure code, encoding and rebuilding data shards.
//!
//! The throughput is that of the data shards (`k` times the shard). Rebuilding loses as many data
//! shards as there is parity. `reed-solomon-simd` computes another code, and is here for speed
//! only. `used` is the codec behind [`sds::segment::codec`], which keeps its last decode plan; the
//! bare libraries derive the decode matrix each time.

#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use reed_solomon_erasure::galois_8::ReedSolomon;
use rusty_erasure::{Coder, compat, kernels_named};
use sds::segment::codec::codec;
use sds::shard::Scheme;

const SCHEMES: [(u8, u8); 4] = [(2, 1), (4, 2), (8, 3), (16, 4)];
const SHARD_BYTES: [usize; 3] = [4 << 10, 64 << 10, 1 << 20];

/// A stripe, data first; the parity is right.
fn stripe(scheme: Scheme, len: usize) -> Vec<Vec<u8>> {
    let mut shards: Vec<Vec<u8>> = (0..scheme.width())
        .map(|shard| (0..=250).cycle().skip(shard * 37).take(len).collect())
        .collect();
    let (data, parity) = shards.split_at_mut(scheme.data.into());
    codec(scheme).expect("a good scheme").encode(&slices(data), &mut slices_mut(parity));
    shards
}

fn slices(shards: &[Vec<u8>]) -> Vec<&[u8]> {
    shards.iter().map(Vec::as_slice).collect()
}

fn slices_mut(shards: &mut [Vec<u8>]) -> Vec<&mut [u8]> {
    shards.iter_mut().map(Vec::as_mut_slice).collect()
}

fn coder(scheme: Scheme, kernels: &str) -> Option<Coder> {
    let matrix =
        compat::reed_solomon_erasure_matrix(scheme.data.into(), scheme.parity.into()).ok()?;
    Coder::with_kernels(matrix, kernels_named(kernels)?).ok()
}

fn for_all(criterion: &mut Criterion, what: &str, run: fn(&mut Criterion, &str, Scheme, usize)) {
    for (data, parity) in SCHEMES {
        for len in SHARD_BYTES {
            let name = format!("codec/{what}/{data}+{parity}/{}KiB", len >> 10);
            run(criterion, &name, Scheme { data, parity }, len);
        }
    }
}

fn encode_one(criterion: &mut Criterion, name: &str, scheme: Scheme, len: usize) {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes(u64::from(scheme.data) * len as u64));
    let shards = stripe(scheme, len);
    let (data, parity) = shards.split_at(scheme.data.into());
    let data = slices(data);
    let mut parity = parity.to_vec();
    let mut parity = slices_mut(&mut parity);
    let used = codec(scheme).expect("a good scheme");
    group.bench_function("used", |bencher| bencher.iter(|| used.encode(&data, &mut parity)));
    for kernels in ["gfni", "avx2", "ssse3", "scalar"] {
        let Some(coder) = coder(scheme, kernels) else { continue };
        let id = BenchmarkId::new("rusty_erasure", kernels);
        group.bench_function(id, |bencher| {
            bencher.iter(|| coder.encode(&data, &mut parity).expect("good shards"));
        });
    }
    let (k, m) = (usize::from(scheme.data), usize::from(scheme.parity));
    let erasure = ReedSolomon::new(k, m).expect("a good scheme");
    group.bench_function("reed-solomon-erasure", |bencher| {
        bencher.iter(|| erasure.encode_sep(&data, &mut parity).expect("good shards"));
    });
    let mut leopard = reed_solomon_simd::ReedSolomonEncoder::new(k, m, len).expect("good sizes");
    group.bench_function("reed-solomon-simd", |bencher| {
        bencher.iter(|| {
            for shard in &data {
                leopard.add_original_shard(shard).expect("a shard");
            }
            let recovered = leopard.encode().expect("all shards");
            parity.iter_mut().zip(recovered.recovery_iter()).for_each(|(out, shard)| {
                out.copy_from_slice(shard);
            });
        });
    });
    group.finish();
}

fn rebuild_one(criterion: &mut Criterion, name: &str, scheme: Scheme, len: usize) {
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes(u64::from(scheme.data) * len as u64));
    let shards = stripe(scheme, len);
    let lost = usize::from(scheme.parity).min(scheme.data.into());
    let wanted: Vec<usize> = (0..lost).collect();
    let given: Vec<Option<&[u8]>> = (0..)
        .zip(&shards)
        .map(|(index, shard)| (index >= lost).then_some(shard.as_slice()))
        .collect();
    let mut out = vec![vec![0; len]; lost];
    let mut out = slices_mut(&mut out);
    let used = codec(scheme).expect("a good scheme");
    group.bench_function("used", |bencher| {
        bencher.iter(|| used.reconstruct(&given, &wanted, &mut out).expect("enough shards"));
    });
    for kernels in ["gfni", "avx2", "ssse3", "scalar"] {
        let Some(coder) = coder(scheme, kernels) else { continue };
        let id = BenchmarkId::new("rusty_erasure", kernels);
        group.bench_function(id, |bencher| {
            bencher.iter(|| coder.recover(&given, &wanted, &mut out).expect("enough shards"));
        });
    }
    let (k, m) = (usize::from(scheme.data), usize::from(scheme.parity));
    let erasure = ReedSolomon::new(k, m).expect("a good scheme");
    let mut owned = shards.clone();
    group.bench_function("reed-solomon-erasure", |bencher| {
        bencher.iter(|| {
            let mut all: Vec<(&mut [u8], bool)> = (0..)
                .zip(&mut owned)
                .map(|(index, shard)| (shard.as_mut_slice(), index >= lost))
                .collect();
            erasure.reconstruct_data(&mut all).expect("enough shards");
        });
    });
    let mut leopard = reed_solomon_simd::ReedSolomonEncoder::new(k, m, len).expect("good sizes");
    shards[..k].iter().for_each(|shard| leopard.add_original_shard(shard).expect("a shard"));
    let parity: Vec<Vec<u8>> =
        leopard.encode().expect("all shards").recovery_iter().map(<[u8]>::to_vec).collect();
    let mut leopard = reed_solomon_simd::ReedSolomonDecoder::new(k, m, len).expect("good sizes");
    group.bench_function("reed-solomon-simd", |bencher| {
        bencher.iter(|| {
            for (index, shard) in shards.iter().enumerate().take(k).skip(lost) {
                leopard.add_original_shard(index, shard).expect("a shard");
            }
            for (index, shard) in parity.iter().enumerate().take(lost) {
                leopard.add_recovery_shard(index, shard).expect("a shard");
            }
            let recovered = leopard.decode().expect("enough shards");
            recovered.restored_original_iter().for_each(|(i, shard)| out[i].copy_from_slice(shard));
        });
    });
    group.finish();
}

fn encode(criterion: &mut Criterion) {
    for_all(criterion, "encode", encode_one);
}

fn rebuild(criterion: &mut Criterion) {
    for_all(criterion, "rebuild", rebuild_one);
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(300));
    targets = encode, rebuild
}
criterion_main!(benches);
