//! Garbage collection under endless overwriting: a volume in process is filled, then overwritten
//! ten times its size in 4 KiB blocks, uniformly and skewed (Zipf 0.99), at several utilisations.
//!
//! Utilisation is what `sdsctl status` tells: of the slots that clients may take, nine tenths can be
//! live, because garbage collection leaves segments in which more is. The reserves and that tenth are
//! what the engine keeps for itself, headers of records included.
//!
//! Printed for each: throughput, the spread of it over time, latency, and write amplification
//! against what greedy cleaning reaches at uniform load. `cargo bench --bench gc` does one case
//! briefly; `-- --full` does all, `--case WHAT` those whose name contains WHAT ("copies, zipf", "85 %"),
//! `--rounds N` overwrites so often, and `--plot FILE` draws throughput over time (SVG).
//! `SDS_BENCH_DIR` says where the files go (default: `target`); a directory in memory shows the
//! engine rather than the disk.

#![allow(clippy::print_stdout, reason = "a benchmark reports on its standard output")]

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use sds::buffer::AlignedBuf;
use sds::disk::uring::Ring;
use sds::env::Env;
use sds::export::BlockTarget;
use sds::id::BLOCK_SIZE;
use sds::shard::Scheme;
use sds::volume::head::HeadConfig;
use sds::volume::target::HeadTarget;
use tokio::task::LocalSet;

mod common;
#[path = "gc/plot.rs"]
mod plot;

use common::{DiskSize, Files, Pool};

/// Writes under way at once.
const DEPTH: u64 = 32;
/// Size of a disk and of its slots: as many slots as a disk of 4 TiB has of the usual size, / 16.
const DISK: DiskSize = DiskSize { bytes: 1 << 30, slot_bytes: Some(1 << 20) };
/// Of the slots that clients may take, so much can be live, percent.
const LIVE_PERCENT_MAX: u64 = 90;
/// The exponent of the skewed load.
const ZIPF: f64 = 0.99;

/// What is run.
#[derive(Clone, Copy)]
struct Case {
    scheme: Scheme,
    /// Size of the volume, percent of what clients may fill ([`LIVE_PERCENT_MAX`]).
    utilisation: u64,
    skewed: bool,
    /// How often the volume is overwritten.
    rounds: u64,
}

impl Case {
    fn load(self) -> String {
        let load = if self.skewed { "zipf 0.99" } else { "uniform" };
        match self.scheme {
            Scheme { data: 1, parity } => format!("{} copies, {load}", parity + 1),
            Scheme { data, parity } => format!("{data}+{parity}, {load}"),
        }
    }
}

impl Case {
    fn name(self) -> String {
        format!("{}, {} %", self.load(), self.utilisation)
    }
}

/// What came out.
struct Outcome {
    case: Case,
    /// Writes completed in each second.
    seconds: Vec<u64>,
    /// Sorted latencies, µs.
    latencies: Vec<u32>,
    /// Longest time in which nothing was completed.
    stall: Duration,
    /// Blocks that clients wrote and blocks that were moved, in the second half.
    client: u64,
    moved: u64,
}

impl Outcome {
    fn quantile(&self, permille: usize) -> u32 {
        self.latencies[(self.latencies.len() - 1) * permille / 1000]
    }

    fn amplification(&self) -> f64 {
        (self.client + self.moved) as f64 / self.client as f64
    }
}

/// Write amplification of greedy cleaning at uniform load: with `u` the share of space in use and
/// `a` the share of a victim that is live, `u = (a - 1) / ln a`, and each block written costs
/// `1 / (1 - a)` (Desnoyers, "Analytic Modeling of SSD Write Performance", SYSTOR 2012).
fn greedy(u: f64) -> f64 {
    let (mut low, mut high) = (1e-9, 1.0 - 1e-9);
    for _ in 0..100 {
        let a: f64 = f64::midpoint(low, high);
        if (a - 1.0) / a.ln() < u { low = a } else { high = a }
    }
    1.0 / (1.0 - low)
}

/// Draws blocks: uniformly, or by rank with Zipf's law, the ranks spread over the volume.
struct Draw {
    blocks: u64,
    /// Cumulated weight of the ranks; empty for a uniform load.
    cumulated: Vec<f64>,
}

impl Draw {
    fn new(blocks: u64, skewed: bool) -> Self {
        let mut sum = 0.0;
        let weight = |rank: u64| {
            sum += (rank as f64).powf(-ZIPF);
            sum
        };
        Self { blocks, cumulated: (1..=blocks * u64::from(skewed)).map(weight).collect() }
    }

    fn next(&self, env: &Env) -> u64 {
        let Some(sum) = self.cumulated.last() else { return env.random_below(self.blocks) };
        let at = env.random_below(1 << 53) as f64 / (1u64 << 53) as f64 * sum;
        let rank = self.cumulated.partition_point(|c| *c <= at) as u64;
        // A bijection only if the factor has no divisor in common with the number of blocks: it is
        // a prime larger than it.
        rank % self.blocks * 2_654_435_761 % self.blocks
    }
}

/// Progress of the writers.
struct Load {
    target: HeadTarget,
    draw: Draw,
    data: Bytes,
    left: Cell<u64>,
    begun: Instant,
    last: Cell<Instant>,
    stall: Cell<Duration>,
    seconds: RefCell<Vec<u64>>,
    latencies: RefCell<Vec<u32>>,
}

impl Load {
    #[expect(clippy::disallowed_methods, reason = "measures real time")]
    async fn write(&self, block: u64) {
        let begun = Instant::now();
        let offset = block * BLOCK_SIZE as u64;
        self.target.write(offset, self.data.clone()).await.expect("there is room");
        let now = Instant::now();
        let micros = u32::try_from((now - begun).as_micros()).unwrap_or(u32::MAX);
        self.latencies.borrow_mut().push(micros);
        self.stall.set(self.stall.get().max(now - self.last.replace(now)));
        let second = usize::try_from((now - self.begun).as_secs()).expect("not for ever");
        let mut seconds = self.seconds.borrow_mut();
        if seconds.len() <= second {
            seconds.resize(second + 1, 0);
        }
        seconds[second] += 1;
    }
}

#[expect(clippy::disallowed_methods, reason = "measures real time")]
async fn overwrite(target: HeadTarget, blocks: u64, case: Case) -> Outcome {
    let env = Env::from_seed(7);
    let mut noise = AlignedBuf::new(BLOCK_SIZE);
    noise.chunks_exact_mut(8).for_each(|w| w.copy_from_slice(&env.random_u64().to_le_bytes()));
    let data = noise.freeze();
    let large = AlignedBuf::zeroed(BLOCK_SIZE * 128).freeze();
    for block in (0..blocks).step_by(128) {
        let count = (blocks - block).min(128) as usize;
        let part = large.slice(..count * BLOCK_SIZE);
        target.write(block * BLOCK_SIZE as u64, part).await.expect("filled");
    }
    let now = Instant::now();
    let load = Rc::new(Load {
        target: HeadTarget(target.0.clone()),
        draw: Draw::new(blocks, case.skewed),
        data,
        left: Cell::new(blocks * case.rounds),
        begun: now,
        last: Cell::new(now),
        stall: Cell::default(),
        seconds: RefCell::default(),
        latencies: RefCell::default(),
    });
    let moved = |target: &HeadTarget| target.0.stats.moved_blocks.get();
    let half = Rc::new(Cell::new((0, 0)));
    let workers: Vec<_> = (0..DEPTH)
        .map(|seed| {
            let (load, half) = (load.clone(), half.clone());
            let env = Env::from_seed(seed);
            tokio::task::spawn_local(async move {
                let total = load.left.get();
                while let Some(rest) = load.left.get().checked_sub(1) {
                    load.left.set(rest);
                    if rest == total / 2 {
                        half.set((total - rest, moved(&load.target)));
                    }
                    load.write(load.draw.next(&env)).await;
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.expect("no panic");
    }
    let (at, moved_before) = half.get();
    let mut latencies = load.latencies.take();
    latencies.sort_unstable();
    Outcome {
        case,
        seconds: load.seconds.take(),
        latencies,
        stall: load.stall.get(),
        client: blocks * case.rounds - at,
        moved: moved(&load.target) - moved_before,
    }
}

fn run(case: Case) -> Outcome {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let local = LocalSet::new();
    let mut files = Files::new("gc");
    local.block_on(&runtime, async {
        let ring = Ring::new().expect("io_uring");
        let pool = Pool::new(&mut files, &ring, case.scheme, DISK).await;
        let blocks = pool.client_blocks() * LIVE_PERCENT_MAX / 100 * case.utilisation / 100;
        // What may wait for a checkpoint is in proportion to the disks, as it is at full size.
        let config = HeadConfig {
            overlay_extents_max: 4 << 10,
            checkpoint_log_blocks: 4 << 10,
            ..HeadConfig::default()
        };
        let target = pool.volume(blocks * BLOCK_SIZE as u64, config).await;
        overwrite(target, blocks, case).await
    })
}

fn print(outcome: &Outcome) {
    let seconds = &outcome.seconds[..outcome.seconds.len().saturating_sub(1).max(1)];
    let mean = seconds.iter().sum::<u64>() / seconds.len() as u64;
    let slowest = seconds.iter().min().copied().unwrap_or(0);
    let u = outcome.case.utilisation as f64 / 100.0;
    let (p50, p999) = (outcome.quantile(500), outcome.quantile(999));
    println!(
        "| {:<24} | {mean:>6} | {slowest:>6} | {p50:>6} | {p999:>6} | {:>5.1} | {:>6} | {:>5.2} | {:>5.2} |",
        outcome.case.name(),
        f64::from(p999) / f64::from(p50),
        outcome.stall.as_millis(),
        outcome.amplification(),
        greedy(u),
    );
}

fn main() {
    let (mut full, mut plot) = (false, None);
    let (mut only, mut rounds) = (String::new(), None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--full" => full = true,
            "--case" => (full, only) = (true, arguments.next().expect("--case WHAT")),
            "--rounds" => {
                let count = arguments.next().and_then(|count| count.parse().ok());
                rounds = Some(count.expect("--rounds N"));
            }
            "--plot" => plot = Some(PathBuf::from(arguments.next().expect("--plot FILE"))),
            // Given by cargo.
            _ => {}
        }
    }
    let copies = Scheme::replicated(3);
    let coded = Scheme { data: 4, parity: 2 };
    let mut cases = vec![Case { scheme: copies, utilisation: 70, skewed: false, rounds: 2 }];
    if full {
        cases.clear();
        for scheme in [copies, coded] {
            for skewed in [false, true] {
                let case = |utilisation| Case { scheme, utilisation, skewed, rounds: 10 };
                cases.extend([50, 70, 85, 90].map(case));
            }
        }
    }
    println!(
        "| load                  | writes/s | slowest s | p50 µs | p99.9 µs | p99.9/p50 | stall ms | WA | greedy |"
    );
    println!("| --- | --: | --: | --: | --: | --: | --: | --: | --: |");
    let mut outcomes = Vec::new();
    for mut case in cases.into_iter().filter(|case| case.name().contains(&only)) {
        case.rounds = rounds.unwrap_or(case.rounds);
        let outcome = run(case);
        print(&outcome);
        outcomes.push(outcome);
    }
    if let Some(path) = plot {
        plot::draw(&path, &outcomes);
    }
}
