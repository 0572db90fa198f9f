//! The block device seam against a raw `io_uring` loop on the same file, in the same run.
//!
//! 4 KiB blocks at random addresses, durable writes and reads, at depth 1 and 32. Besides
//! criterion's report it prints wall and CPU time per request and the ratio of the two.
//! `SDS_BENCH_DIR` says where the file goes (default: `target`).

#![allow(clippy::print_stdout, reason = "a benchmark reports on its standard output")]
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use criterion::{BenchmarkId, Criterion, Throughput};
use io_uring::{IoUring, opcode, types::Fd};
use sds::buffer::AlignedBuf;
use sds::disk::device::BlockDevice;
use sds::disk::uring::{OpenOptions, Ring, UringDevice};
use sds::env::Env;
use sds::id::{BLOCK_BYTES, BLOCK_SIZE};
use tokio::task::LocalSet;

const FILE_BYTES: u64 = 256 << 20;
const DEPTHS: [u32; 2] = [1, 32];

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    Read,
    Write,
}

/// Wall and CPU time and requests, per operation, depth and contender.
type Totals = BTreeMap<(Operation, u32, &'static str), (Duration, Duration, u64)>;

fn main() {
    let dir = std::env::var_os("SDS_BENCH_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target"), PathBuf::from);
    let path = dir.join("bench-device.tmp");
    let mut criterion = Criterion::default().configure_from_args().sample_size(20);
    let mut totals = Totals::new();
    fill(&path);
    for operation in [Operation::Write, Operation::Read] {
        for depth in DEPTHS {
            compare(&mut criterion, &mut totals, &path, operation, depth);
        }
    }
    std::fs::remove_file(&path).expect("the benchmark's own file");
    report(&totals);
    criterion.final_summary();
}

/// Writes the file once, so that what is measured allocates nothing.
fn fill(path: &Path) {
    let noise = Env::from_seed(1);
    let mut data = AlignedBuf::new(1 << 20);
    let mut content = Vec::new();
    for _ in 0..FILE_BYTES >> 20 {
        data.chunks_exact_mut(8).for_each(|w| w.copy_from_slice(&noise.random_u64().to_le_bytes()));
        content.extend_from_slice(&data);
    }
    let file = std::fs::File::create(path).expect("a writable directory");
    std::io::Write::write_all(&mut &file, &content).expect("room for the file");
    file.sync_all().expect("room for the file");
}

fn compare(
    criterion: &mut Criterion,
    totals: &mut Totals,
    path: &Path,
    operation: Operation,
    depth: u32,
) {
    let name = match operation {
        Operation::Read => "device/read",
        Operation::Write => "device/write_durable",
    };
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes(BLOCK_BYTES));
    for contender in ["raw", "seam"] {
        group.bench_function(BenchmarkId::new(contender, depth), |bencher| {
            bencher.iter_custom(|count| {
                let count = count.max(u64::from(depth) * 16);
                let (wall, cpu) = match contender {
                    "raw" => raw(path, operation, depth, count),
                    _ => seam(path, operation, depth, count),
                };
                let total = totals.entry((operation, depth, contender)).or_default();
                *total = (total.0 + wall, total.1 + cpu, total.2 + count);
                wall
            });
        });
    }
    group.finish();
}

fn random_offset(env: &Env) -> u64 {
    env.random_below(FILE_BYTES / BLOCK_BYTES) * BLOCK_BYTES
}

#[expect(clippy::disallowed_methods, reason = "measures real time")]
fn measured<T>(work: impl FnOnce() -> T) -> (Duration, Duration) {
    let (wall, cpu) = (std::time::Instant::now(), cpu_time());
    work();
    (wall.elapsed(), cpu_time().saturating_sub(cpu))
}

/// CPU time of this thread in user and kernel space.
fn cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec of this frame.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    let seconds = u64::try_from(time.tv_sec).expect("a positive time");
    Duration::new(seconds, u32::try_from(time.tv_nsec).expect("less than a second"))
}

fn seam(path: &Path, operation: Operation, depth: u32, count: u64) -> (Duration, Duration) {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let local = LocalSet::new();
    let (ring, device) = local.block_on(&runtime, async {
        let ring = Ring::new().expect("io_uring");
        let device = UringDevice::open(path, &ring, OpenOptions::default()).expect("the file");
        assert!(device.is_direct());
        (ring, device)
    });
    let left = Rc::new(Cell::new(count));
    let measured = measured(|| {
        local.block_on(&runtime, async {
            let workers: Vec<_> = (0..depth)
                .map(|worker| {
                    let (device, left) = (device.clone(), left.clone());
                    tokio::task::spawn_local(work(device, operation, u64::from(worker), left))
                })
                .collect();
            for worker in workers {
                worker.await.expect("no panic");
            }
        });
    });
    drop((device, ring));
    measured
}

async fn work(device: UringDevice, operation: Operation, seed: u64, left: Rc<Cell<u64>>) {
    let env = Env::from_seed(seed);
    let data: Rc<[Bytes]> = Rc::from([AlignedBuf::zeroed(BLOCK_SIZE).freeze()]);
    while let Some(rest) = left.get().checked_sub(1) {
        left.set(rest);
        let offset = random_offset(&env);
        match operation {
            Operation::Write => device.write(offset, data.clone(), true).await.expect("written"),
            Operation::Read => {
                let buf = AlignedBuf::new(BLOCK_SIZE);
                drop(device.read(offset, buf).await.expect("read"));
            }
        }
    }
}

/// The floor: nothing but the ring, waiting in the kernel.
fn raw(path: &Path, operation: Operation, depth: u32, count: u64) -> (Duration, Duration) {
    let file = std::os::unix::fs::OpenOptionsExt::custom_flags(
        std::fs::OpenOptions::new().read(true).write(true),
        libc::O_DIRECT,
    )
    .open(path)
    .expect("the file");
    let mut ring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(64)
        .expect("a kernel of 6.1 or newer");
    let env = Env::from_seed(0);
    let mut buffers: Vec<AlignedBuf> = (0..depth).map(|_| AlignedBuf::zeroed(BLOCK_SIZE)).collect();
    let mut idle: Vec<u64> = (0..u64::from(depth)).collect();
    measured(|| {
        let (mut started, mut done) = (0, 0);
        while done < count {
            while started < count
                && let Some(index) = idle.pop()
            {
                let buffer = buffers[usize::try_from(index).expect("an index")].as_mut_ptr();
                let len = u32::try_from(BLOCK_SIZE).expect("small");
                let (fd, offset) = (Fd(file.as_raw_fd()), random_offset(&env));
                let entry = match operation {
                    Operation::Read => opcode::Read::new(fd, buffer, len).offset(offset).build(),
                    Operation::Write => opcode::Write::new(fd, buffer, len)
                        .offset(offset)
                        .rw_flags(libc::RWF_DSYNC)
                        .build(),
                };
                // SAFETY: each buffer outlives its request, which is reaped before the end.
                unsafe { ring.submission().push(&entry.user_data(index)) }.expect("room");
                started += 1;
            }
            ring.submit_and_wait(1).expect("submitted");
            for entry in ring.completion() {
                assert_eq!(usize::try_from(entry.result()), Ok(BLOCK_SIZE));
                idle.push(entry.user_data());
                done += 1;
            }
        }
    })
}

fn report(totals: &Totals) {
    println!("\n4 KiB, random      depth   raw us (CPU)      seam us (CPU)     ratio");
    for operation in [Operation::Write, Operation::Read] {
        for depth in DEPTHS {
            let per_request = |contender| {
                let (wall, cpu, count) = totals.get(&(operation, depth, contender))?;
                let micros = |time: &Duration| time.as_secs_f64() * 1e6 / *count as f64;
                Some((micros(wall), micros(cpu)))
            };
            if let (Some(raw), Some(seam)) = (per_request("raw"), per_request("seam")) {
                let name = if operation == Operation::Read { "read" } else { "write, durable" };
                println!(
                    "{name:<18} {depth:>5} {:>8.2} ({:>6.2}) {:>9.2} ({:>6.2}) {:>8.2}",
                    raw.0,
                    raw.1,
                    seam.0,
                    seam.1,
                    seam.0 / raw.0
                );
            }
        }
    }
}
