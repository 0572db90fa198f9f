//! How long each disk takes, against its peers: which one is slow, and when a read is overdue.
//!
//! Every request that a head sends is timed ([`super::measured`]) by tokio's clock. A disk has, for
//! each class of requests, an exponential average and two small histograms, of this window and the
//! one before: constant memory, whatever happens.
//!
//! A disk is *slow* while an average is [`SLOW_FACTOR`] times the median of its peers', and above
//! [`FLOOR`], for [`SLOW_AFTER`]. It is *well* again once its averages have been below
//! [`WELL_FACTOR`] times that for a while that doubles each time. A slow disk is avoided, so
//! it is exercised to see ([`super::disks::Disks::exercise`]).
//!
//! The peers of a disk are all other disks, of whatever node: where all disks of one node are slow, it
//! is those of the others that show it.
//!
//! Invariants: on no level do disks of more failure domains count as slow than the least redundant
//! volume with failure domains of that level can spare. To be slow is advice on where to place and from where to read; no disk is refused for it.
//! Knows nothing of segments, and nothing of errors.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::domain::{Domains, Level};
use crate::id::DiskId;
use crate::planted::{Bug, bug};

/// A slow disk takes so many times as long as the median of its peers.
pub const SLOW_FACTOR: u32 = 5;
/// … and longer than this.
pub const FLOOR: Duration = Duration::from_millis(2);
/// … for so long.
pub const SLOW_AFTER: Duration = Duration::from_millis(300);
/// … and so many requests, of which one that took [`VERY_LONG`] counts as all.
const SLOW_SAMPLES: u32 = 4;
/// What no healthy disk takes.
const VERY_LONG: Duration = Duration::from_millis(200);
/// A disk that takes less than so many times as long as the median of its peers is well.
pub const WELL_FACTOR: u32 = 3;
/// For how long it must be well until it is trusted; doubled each time it was slow.
pub const WELL_AFTER: Duration = Duration::from_secs(5);
/// The longest such time.
const WELL_AFTER_MAX: Duration = Duration::from_mins(5);
/// What was measured longer ago says nothing of a disk's present state.
const RECENT: Duration = Duration::from_secs(3);
/// Time between two judgements.
const JUDGE_EVERY: Duration = Duration::from_millis(50);
/// Time that a histogram counts.
const WINDOW: Duration = Duration::from_secs(5);
/// Requests without which an average says nothing.
const SAMPLES_MIN: u64 = 4;
/// Weight of a new request in the average: one in so many.
const WEIGHT: u64 = 8;
/// After so many requests in a row that are as with the peers, what was before counts no more.
const GOOD_RUN: u32 = 6;
/// Blocks that a request may have to count as one; longer ones count by the piece.
const PIECE_BLOCKS: u32 = 64;
/// A request that was given up counts as one of so many times the time it had: how long it would
/// have taken is not known.
const GIVEN_UP: u32 = 4;

/// A read is overdue after so many times the p99 of the peers.
const OVERDUE_FACTOR: u32 = 2;
/// Bounds of that, and what it is while nothing is known.
const OVERDUE: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(250));
const OVERDUE_UNKNOWN: Duration = Duration::from_millis(100);
/// Tokens that a read gives, that a hedge costs, and that are kept at most.
const TOKENS: (u32, u32, u32) = (1, 10, 200);

/// Two buckets for each power of two, from 16 µs on.
const BUCKETS: usize = 42;

/// Classes of requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Reads of blocks.
    Read = 0,
    /// Durable appends.
    Append = 1,
    /// What changes tables: create, seal, delete, mirror.
    Control = 2,
}

/// Number of classes.
const CLASSES: usize = 3;

#[derive(Debug, Clone, Copy)]
struct Histogram([u32; BUCKETS]);

impl Histogram {
    const EMPTY: Self = Self([0; BUCKETS]);

    fn bucket(us: u64) -> usize {
        let us = us.max(16);
        let octave = us.ilog2();
        let upper = us >> (octave - 1) & 1 == 1;
        ((octave as usize - 4) * 2 + usize::from(upper)).min(BUCKETS - 1)
    }

    /// Upper bound of a bucket, microseconds.
    fn bound(bucket: usize) -> u64 {
        let base = 16_u64 << (bucket / 2);
        if bucket.is_multiple_of(2) { base + base / 2 } else { base * 2 }
    }

    fn add(&mut self, us: u64) {
        let count = &mut self.0[Self::bucket(us)];
        *count = count.saturating_add(1);
    }
}

/// The requests of one class to one disk.
#[derive(Debug, Clone)]
struct Track {
    ewma_us: u64,
    samples: u64,
    /// Requests in a row that took no longer than with the peers.
    good_run: u32,
    last: Instant,
    window: Instant,
    now: Histogram,
    before: Histogram,
}

impl Track {
    fn new(now: Instant) -> Self {
        Self {
            ewma_us: 0,
            samples: 0,
            good_run: 0,
            last: now,
            window: now,
            now: Histogram::EMPTY,
            before: Histogram::EMPTY,
        }
    }

    fn add(&mut self, us: u64, well: u64, now: Instant) {
        let age = now - self.window;
        if age >= WINDOW {
            self.before = if age >= WINDOW * 2 { Histogram::EMPTY } else { self.now };
            self.now = Histogram::EMPTY;
            self.window = now;
        }
        self.now.add(us);
        // The first few are averaged plainly.
        let weight = WEIGHT.min(self.samples + 1);
        self.ewma_us = (self.ewma_us * (weight - 1) + us) / weight;
        self.good_run = if us > well { 0 } else { self.good_run.saturating_add(1) };
        if self.good_run == GOOD_RUN {
            self.ewma_us = self.ewma_us.min(well);
        }
        self.samples += 1;
        self.last = now;
    }

    /// The least time that `percent` of the requests did not exceed, microseconds.
    fn quantile(&self, percent: u64) -> Option<u64> {
        let counts = || self.now.0.iter().zip(&self.before.0).map(|(a, b)| u64::from(a + b));
        let total: u64 = counts().sum();
        let mut left = (total * percent).div_ceil(100);
        if total == 0 {
            return None;
        }
        for (bucket, count) in counts().enumerate() {
            if left <= count {
                return Some(Histogram::bound(bucket));
            }
            left -= count;
        }
        None
    }

    fn says_something(&self) -> bool {
        self.samples >= SAMPLES_MIN
    }
}

/// How a class of requests fares on a disk, and on its peers: microseconds, as bounds of buckets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Median of the last seconds with requests.
    pub p50_us: u64,
    /// 99th percentile of them.
    pub p99_us: u64,
    /// Median of the peers' medians.
    pub peers_p50_us: u64,
    /// Median of the peers' 99th percentiles.
    pub peers_p99_us: u64,
}

/// What is measured of one disk.
pub struct Gauge {
    domains: Domains,
    tracks: RefCell<[Track; CLASSES]>,
    /// What a request of a class must exceed to be slow, microseconds.
    limits: Cell<[u64; CLASSES]>,
    overdue: Cell<Duration>,
    suspected: Cell<Option<Instant>>,
    slow_samples: Cell<u32>,
    slow_since: Cell<Option<Instant>>,
    well_since: Cell<Option<Instant>>,
    times: Cell<u32>,
}

impl Gauge {
    fn new(domains: Domains) -> Self {
        let track = Track::new(Instant::now());
        Self {
            domains,
            tracks: RefCell::new([track.clone(), track.clone(), track]),
            limits: Cell::new([u64::MAX; CLASSES]),
            overdue: Cell::new(OVERDUE_UNKNOWN),
            suspected: Cell::new(None),
            slow_samples: Cell::new(0),
            slow_since: Cell::new(None),
            well_since: Cell::new(None),
            times: Cell::new(0),
        }
    }

    fn add(&self, class: Class, took: Duration, blocks: u32) {
        let us = micros(took) / u64::from(1 + blocks / PIECE_BLOCKS);
        let limit = self.limits.get()[class as usize];
        self.tracks.borrow_mut()[class as usize].add(us, well(limit), Instant::now());
        if us > limit {
            let weight = if us >= micros(VERY_LONG) { SLOW_SAMPLES } else { 1 };
            self.slow_samples.set(self.slow_samples.get().saturating_add(weight));
        }
    }

    fn trust(&self) {
        self.slow_since.set(None);
        self.well_since.set(None);
        self.suspected.set(None);
        self.slow_samples.set(0);
    }

    fn well_after(&self) -> Duration {
        let doubled = WELL_AFTER * 2_u32.saturating_pow(self.times.get().saturating_sub(1).min(10));
        doubled.min(WELL_AFTER_MAX)
    }

    /// By how many times the worst of its averages exceeds what is slow; none if none does.
    fn excess(&self, now: Instant) -> Option<u64> {
        let tracks = self.tracks.borrow();
        let limits = self.limits.get();
        let bad = |(track, limit): (&Track, u64)| {
            let counts = track.says_something() && now - track.last < RECENT;
            (counts && track.ewma_us > limit).then(|| track.ewma_us * 16 / limit.max(1))
        };
        tracks.iter().zip(limits).filter_map(bad).max()
    }

    /// Whether all that was measured lately is as with its peers.
    fn is_well(&self, now: Instant) -> bool {
        let tracks = self.tracks.borrow();
        let mut any = false;
        for (track, limit) in tracks.iter().zip(self.limits.get()) {
            if now - track.last >= RECENT {
                continue;
            }
            any = true;
            if track.ewma_us > well(limit) {
                return false;
            }
        }
        any
    }
}

/// What is measured of all disks of a node.
pub struct Watch {
    gauges: RefCell<BTreeMap<DiskId, Rc<Gauge>>>,
    judged: Cell<Instant>,
    /// Heads by the level of their pool's failure domains, and how many of them it may lose.
    spare: RefCell<BTreeMap<(Level, u8), u32>>,
    tokens: Cell<u32>,
    hedges: Cell<u64>,
    /// Told when a disk becomes slow, or well again.
    pub changed: Notify,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            gauges: RefCell::default(),
            judged: Cell::new(Instant::now()),
            spare: RefCell::default(),
            tokens: Cell::new(TOKENS.2),
            hedges: Cell::new(0),
            changed: Notify::new(),
        }
    }
}

impl Watch {
    /// Begins to measure a disk, anew if it was before.
    pub(super) fn add(&self, disk: DiskId, domains: Domains) -> Rc<Gauge> {
        let gauge = Rc::new(Gauge::new(domains));
        self.gauges.borrow_mut().insert(disk, gauge.clone());
        gauge
    }

    /// Forgets a disk.
    pub(super) fn remove(&self, disk: DiskId) {
        let old = self.gauges.borrow_mut().remove(&disk);
        if old.is_some_and(|gauge| gauge.slow_since.get().is_some()) {
            self.changed.notify_waiters();
        }
    }

    /// A volume that survives the loss of `parity` domains of this level is served.
    pub(super) fn join(&self, level: Level, parity: u8) {
        *self.spare.borrow_mut().entry((level, parity)).or_default() += 1;
    }

    /// … or no longer.
    pub(super) fn part(&self, level: Level, parity: u8) {
        let mut spare = self.spare.borrow_mut();
        if let Some(heads) = spare.get_mut(&(level, parity)) {
            *heads -= 1;
            if *heads == 0 {
                spare.remove(&(level, parity));
            }
        }
    }

    /// How many domains of each level that volumes use may be slow.
    fn spared(&self) -> Vec<(Level, u8)> {
        let spare = self.spare.borrow();
        let least = |level| {
            let mut heads = spare.range((level, 0)..=(level, u8::MAX));
            heads.next().map(|(least, _)| *least)
        };
        let spared: Vec<_> = Level::ALL.into_iter().filter_map(least).collect();
        if spared.is_empty() { vec![(Level::Disk, 1)] } else { spared }
    }

    /// Whether one more disk may count as slow. One that is only not trusted yet makes room for it.
    fn may_be_slow(&self, gauges: &BTreeMap<DiskId, Rc<Gauge>>, gauge: &Gauge) -> bool {
        for (level, spare) in self.spared() {
            let domain = gauge.domains.at(level);
            let slow = gauges.values().filter(|g| g.slow_since.get().is_some());
            let mut domains: BTreeSet<u32> = slow.map(|g| g.domains.at(level)).collect();
            domains.insert(domain);
            if domains.len() <= usize::from(spare) {
                continue;
            }
            let elsewhere = |g: &&Rc<Gauge>| g.domains.at(level) != domain;
            let yields = |g: &&Rc<Gauge>| elsewhere(g) && g.well_since.get().is_some();
            let Some(other) = gauges.values().find(yields) else { return false };
            other.trust();
            if domains.len() > usize::from(spare) + 1 {
                return false;
            }
        }
        true
    }

    /// Notes a request that was answered.
    pub(super) fn answered(&self, gauge: &Gauge, class: Class, took: Duration, blocks: u32) {
        gauge.add(class, took, blocks);
        self.judge();
    }

    /// Notes a request that was given up after `waited`. It says something only where others would
    /// have been answered.
    pub(super) fn given_up(&self, gauge: &Gauge, class: Class, waited: Duration, blocks: u32) {
        if waited >= gauge.overdue.get().max(FLOOR) {
            gauge.add(class, waited * GIVEN_UP, blocks);
            self.judge();
        }
    }

    /// Whether a disk is slow.
    pub fn is_slow(&self, disk: DiskId) -> bool {
        let slow = |gauge: &Rc<Gauge>| gauge.slow_since.get().is_some();
        self.gauges.borrow().get(&disk).is_some_and(slow) && !bug(Bug::NeverAvoidsSlow)
    }

    /// The slow disks.
    pub fn slow(&self) -> Vec<DiskId> {
        let gauges = self.gauges.borrow();
        gauges.keys().copied().filter(|disk| self.is_slow(*disk)).collect()
    }

    /// Since when a disk is slow; none if it is not.
    pub fn slow_since(&self, disk: DiskId) -> Option<Instant> {
        self.gauges.borrow().get(&disk)?.slow_since.get()
    }

    /// How long a read of a disk may take before it is tried elsewhere too.
    pub fn overdue_after(&self, disk: DiskId) -> Duration {
        self.gauges.borrow().get(&disk).map_or(OVERDUE_UNKNOWN, |gauge| gauge.overdue.get())
    }

    /// Notes a read, which pays for a part of a hedge.
    pub fn note_read(&self) {
        self.tokens.set((self.tokens.get() + TOKENS.0).min(TOKENS.2));
    }

    /// Whether `reads` more reads may be sent because `disk` does not answer: always if it is slow,
    /// otherwise as long as they are few.
    pub fn may_hedge(&self, disk: DiskId, reads: usize) -> bool {
        if !self.is_slow(disk) {
            let cost = u32::try_from(reads).unwrap_or(u32::MAX).saturating_mul(TOKENS.1);
            let Some(left) = self.tokens.get().checked_sub(cost) else { return false };
            self.tokens.set(left);
        }
        self.hedges.set(self.hedges.get() + 1);
        true
    }

    /// Reads that were tried elsewhere because a disk did not answer.
    pub fn hedges(&self) -> u64 {
        self.hedges.get()
    }

    /// How a class of requests fares on a disk; none before the first one.
    pub fn figures(&self, disk: DiskId, class: Class) -> Option<Figures> {
        let gauges = self.gauges.borrow();
        let quantile =
            |gauge: &Gauge, percent| gauge.tracks.borrow()[class as usize].quantile(percent);
        let own = gauges.get(&disk)?;
        let peers = |percent| {
            let others = gauges.iter().filter(|(id, _)| **id != disk);
            median(others.filter_map(|(_, gauge)| quantile(gauge, percent)).collect())
        };
        Some(Figures {
            p50_us: quantile(own, 50)?,
            p99_us: quantile(own, 99)?,
            peers_p50_us: peers(50).unwrap_or(0),
            peers_p99_us: peers(99).unwrap_or(0),
        })
    }

    /// Judges all disks, if it was not done a moment ago.
    fn judge(&self) {
        let now = Instant::now();
        if now - self.judged.get() < JUDGE_EVERY {
            return;
        }
        self.judged.set(now);
        let gauges = self.gauges.borrow();
        Self::set_limits(&gauges);
        let mut worst: Vec<(u64, DiskId)> = Vec::new();
        for (disk, gauge) in gauges.iter() {
            if gauge.slow_since.get().is_some() {
                self.judge_slow(*disk, gauge, now);
                continue;
            }
            if let Some(excess) = gauge.excess(now) {
                worst.push((excess, *disk));
            } else {
                gauge.suspected.set(None);
                gauge.slow_samples.set(0);
            }
        }
        worst.sort_unstable_by_key(|(excess, disk)| (std::cmp::Reverse(*excess), *disk));
        for (_, disk) in worst {
            self.judge_suspected(&gauges, disk, now);
        }
    }

    /// What counts as slow on each disk, and when a read of it is overdue.
    fn set_limits(gauges: &BTreeMap<DiskId, Rc<Gauge>>) {
        for (disk, gauge) in gauges {
            let peers = || {
                let others = gauges.iter().filter(|(id, _)| *id != disk);
                others.filter(|(_, g)| g.slow_since.get().is_none()).map(|(_, g)| g)
            };
            let limit = |class: usize| {
                let averages = peers().filter_map(|peer| {
                    let tracks = peer.tracks.borrow();
                    tracks[class].says_something().then_some(tracks[class].ewma_us)
                });
                let typical = median(averages.collect());
                typical.map_or(u64::MAX, |us| us.saturating_mul(SLOW_FACTOR.into()))
            };
            let limits = std::array::from_fn(limit);
            gauge.limits.set(limits.map(|limit| limit.max(micros(FLOOR))));
            let reads = peers().filter_map(|peer| {
                let tracks = peer.tracks.borrow();
                let reads = &tracks[Class::Read as usize];
                reads.says_something().then(|| reads.quantile(99)).flatten()
            });
            let overdue = median(reads.collect()).map_or(OVERDUE_UNKNOWN, |us| {
                Duration::from_micros(us).saturating_mul(OVERDUE_FACTOR).clamp(OVERDUE.0, OVERDUE.1)
            });
            gauge.overdue.set(overdue);
        }
    }

    fn judge_slow(&self, disk: DiskId, gauge: &Gauge, now: Instant) {
        if !gauge.is_well(now) {
            gauge.well_since.set(None);
            return;
        }
        let since = gauge.well_since.get().unwrap_or(now);
        gauge.well_since.set(Some(since));
        if now - since >= gauge.well_after() {
            tracing::info!(%disk, "disk is as fast as its peers again");
            gauge.trust();
            self.changed.notify_waiters();
        }
    }

    fn judge_suspected(&self, gauges: &BTreeMap<DiskId, Rc<Gauge>>, disk: DiskId, now: Instant) {
        let gauge = &gauges[&disk];
        let since = gauge.suspected.get().unwrap_or(now);
        gauge.suspected.set(Some(since));
        if now - since < SLOW_AFTER || gauge.slow_samples.get() < SLOW_SAMPLES {
            return;
        }
        if !self.may_be_slow(gauges, gauge) {
            return;
        }
        let average = gauge.tracks.borrow().each_ref().map(|track| track.ewma_us);
        tracing::warn!(%disk, average_us = ?average, limit_us = ?gauge.limits.get(),
            "disk is much slower than its peers: it is avoided");
        gauge.slow_since.set(Some(now));
        gauge.well_since.set(None);
        gauge.times.set(gauge.times.get() + 1);
        self.changed.notify_waiters();
    }
}

/// What a request of a disk that is well does not exceed, by what one of a slow disk does.
fn well(limit: u64) -> u64 {
    (limit / u64::from(SLOW_FACTOR) * u64::from(WELL_FACTOR)).max(micros(FLOOR))
}

/// The lower median; none of nothing.
fn median(mut values: Vec<u64>) -> Option<u64> {
    values.sort_unstable();
    let middle = values.len().checked_sub(1)? / 2;
    Some(values[middle])
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(5);

    fn id(number: u8) -> DiskId {
        DiskId::from_bytes([number; 16])
    }

    struct Bench {
        watch: Watch,
        gauges: Vec<Rc<Gauge>>,
    }

    impl Bench {
        fn new(disks: u8, spare: u8) -> Self {
            let watch = Watch::default();
            watch.join(Level::Disk, spare);
            let add = |n: u8| watch.add(id(n), Domains::of_one_node(n.into()));
            let gauges = (0..disks).map(add).collect();
            Self { watch, gauges }
        }

        /// Requests to all disks for a while; disk `n` takes `took[n]` microseconds.
        async fn run(&self, class: Class, time: Duration, took: &[u64]) {
            let end = Instant::now() + time;
            while Instant::now() < end {
                for (gauge, us) in self.gauges.iter().zip(took) {
                    self.watch.answered(gauge, class, Duration::from_micros(*us), 1);
                }
                tokio::time::sleep(STEP).await;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_disk_far_slower_than_its_peers_is_slow_until_it_is_well_for_a_while() {
        let bench = Bench::new(4, 1);
        let second = Duration::from_secs(1);
        bench.run(Class::Append, second, &[100, 120, 90, 100]).await;
        assert!(bench.watch.slow().is_empty());
        bench.run(Class::Append, second / 5, &[100, 120, 9_000, 100]).await;
        assert!(bench.watch.slow().is_empty(), "not before a while has passed");
        bench.run(Class::Append, second, &[100, 120, 9_000, 100]).await;
        assert_eq!(bench.watch.slow(), [id(2)]);
        let figures = bench.watch.figures(id(2), Class::Append).expect("measured");
        assert!((6_000..=12_288).contains(&figures.p99_us), "{figures:?}");
        assert!((64..=192).contains(&figures.peers_p50_us), "{figures:?}");
        bench.run(Class::Append, second * 4, &[100, 120, 100, 100]).await;
        assert_eq!(bench.watch.slow(), [id(2)], "it is not trusted at once");
        bench.run(Class::Append, second * 2, &[100, 120, 100, 100]).await;
        assert!(bench.watch.slow().is_empty());
        // The second time takes longer.
        bench.run(Class::Append, second, &[100, 120, 9_000, 100]).await;
        bench.run(Class::Append, WELL_AFTER + second, &[100, 120, 100, 100]).await;
        assert_eq!(bench.watch.slow(), [id(2)]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_below_the_floor_or_shared_by_all_is_not_slow() {
        let bench = Bench::new(4, 2);
        let second = Duration::from_secs(1);
        bench.run(Class::Read, second, &[20, 1_500, 20, 20]).await;
        assert!(bench.watch.slow().is_empty(), "below the floor");
        bench.run(Class::Read, second, &[20_000, 30_000, 25_000, 90_000]).await;
        assert!(bench.watch.slow().is_empty(), "all are slow");
    }

    #[tokio::test(start_paused = true)]
    async fn never_more_than_the_redundancy_spares_and_the_worst_first() {
        let bench = Bench::new(6, 1);
        let took = [100, 20_000, 80_000, 100, 100, 100];
        bench.run(Class::Append, Duration::from_secs(2), &took).await;
        assert_eq!(bench.watch.slow().len(), 1);
        let bench = Bench::new(6, 2);
        bench.run(Class::Append, Duration::from_secs(2), &took).await;
        assert_eq!(bench.watch.slow(), [id(1), id(2)]);
    }

    #[tokio::test(start_paused = true)]
    async fn disks_of_one_node_are_slow_together_where_volumes_spare_a_node() {
        let took = [20_000, 30_000, 100, 100, 100, 100, 25_000, 100];
        for (also, slow) in [(None, vec![id(0), id(1)]), (Some(Level::Disk), vec![id(1)])] {
            let watch = Watch::default();
            watch.join(Level::Node, 1);
            if let Some(level) = also {
                watch.join(level, 1);
            }
            let domains = |n: u8| Domains { disk: n.into(), node: u32::from(n) / 2, rack: 0 };
            let gauges = (0..8).map(|n| watch.add(id(n), domains(n))).collect();
            let bench = Bench { watch, gauges };
            bench.run(Class::Append, Duration::from_secs(2), &took).await;
            assert_eq!(bench.watch.slow(), slow, "{also:?}");
            if let Some(level) = also {
                bench.watch.part(level, 1);
            }
            bench.run(Class::Append, Duration::from_secs(1), &took).await;
            assert_eq!(bench.watch.slow(), [id(0), id(1)], "the strictest volume is gone");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_disk_that_never_answers_is_slow_by_what_was_given_up() {
        let bench = Bench::new(3, 1);
        let well = [100, 100, 100];
        bench.run(Class::Read, Duration::from_secs(1), &well).await;
        for _ in 0..4 {
            let waited = Duration::from_millis(100);
            bench.watch.given_up(&bench.gauges[0], Class::Read, waited, 1);
            bench.run(Class::Read, Duration::from_millis(200), &[]).await;
            bench.watch.answered(&bench.gauges[1], Class::Read, STEP / 50, 1);
        }
        assert_eq!(bench.watch.slow(), [id(0)]);
        bench.watch.given_up(&bench.gauges[1], Class::Read, Duration::from_micros(10), 1);
        let figures = bench.watch.figures(id(1), Class::Read).expect("measured");
        assert!(figures.p99_us <= 192, "a request given up early says nothing");
    }

    #[tokio::test(start_paused = true)]
    async fn a_tenth_of_the_reads_is_hedged_but_around_a_slow_disk_all() {
        let bench = Bench::new(3, 1);
        bench.run(Class::Read, Duration::from_secs(1), &[100, 100, 100]).await;
        let first = (0..100).filter(|_| bench.watch.may_hedge(id(0), 1)).count();
        assert_eq!(first, 20, "what was saved up");
        let hedged = |_: &u32| {
            bench.watch.note_read();
            bench.watch.may_hedge(id(0), 1)
        };
        assert_eq!((0..1_000).filter(hedged).count(), 100);
        bench.run(Class::Read, Duration::from_secs(1), &[50_000, 100, 100]).await;
        assert_eq!((0..1_000).filter(hedged).count(), 1_000);
        assert_eq!(bench.watch.overdue_after(id(0)), OVERDUE.0);
    }

    #[test]
    fn buckets_hold_what_they_say() {
        for us in [1, 16, 17, 23, 24, 100, 5_000, 1 << 24, u64::MAX] {
            let bucket = Histogram::bucket(us);
            assert!(us <= Histogram::bound(bucket) || bucket == BUCKETS - 1, "{us}");
            assert!(bucket == 0 || us >= Histogram::bound(bucket - 1), "{us}");
        }
    }
}
