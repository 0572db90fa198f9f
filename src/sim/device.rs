//! A simulated block device: deterministic on tokio's clock and a seeded [`Env`], with the faults
//! that real devices have.
//!
//! A [`SimDevice`] is a handle of one "process" on a medium. [`SimDevice::crash`] and
//! [`SimDevice::power_cut`] end the process: its operations never complete and new ones fail;
//! [`SimDevice::reopen`] gives the next process a handle on what is left.
//!
//! Operations that are due are applied in order of time whenever anybody touches the device, so
//! nothing depends on who polls which future. Writes that are not durable stay volatile until a
//! flush that began later; a power cut keeps a random subset of their 512-byte sectors.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::buffer::AlignedBuf;
use crate::disk::device::{BlockDevice, DeviceError, LocalFuture};
use crate::env::Env;
use crate::id::{BLOCK_BYTES, BLOCK_SIZE};

/// Smallest unit that a write may be torn at, bytes.
const SECTOR_BYTES: usize = 512;
/// Error number of a failed operation.
const EIO: i32 = 5;

/// What a device is like.
#[derive(Debug, Clone)]
pub struct SimConfig {
    /// Size in bytes, a multiple of 4 KiB.
    pub size_bytes: u64,
    /// Time that an operation takes, uniformly distributed. (tokio's clock ticks in milliseconds.)
    pub latency: Range<Duration>,
}

impl Default for SimConfig {
    fn default() -> Self {
        let latency = Duration::from_micros(50)..Duration::from_millis(3);
        Self { size_bytes: 16 << 20, latency }
    }
}

/// How often each fault has struck: injected is not struck, except for what strikes at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// Reads that failed by [`SimDevice::fail_reads`] or on a latent error.
    pub read_errors: u64,
    /// Writes that failed.
    pub write_errors: u64,
    /// Bits flipped.
    pub bits_flipped: u64,
    /// Writes that went elsewhere and reported success.
    pub misdirected_writes: u64,
    /// Writes that went nowhere and reported success.
    pub lost_writes: u64,
    /// Writes of which only some sectors were left by a crash or power cut.
    pub torn_writes: u64,
    /// Volatile pages that a power cut took back, in part or whole.
    pub volatile_pages_lost: u64,
    /// Writes and flushes whose durability was dropped.
    pub durability_dropped: u64,
    /// Operations that were held by a hang.
    pub hung_operations: u64,
    /// Writes begun while another one to the same place was under way: what is left of them is
    /// anybody's guess. Not a fault but a mistake of whoever writes.
    pub overlapping_writes: u64,
    /// Power cuts.
    pub power_cuts: u64,
    /// Crashes of the process.
    pub crashes: u64,
    /// Times the device vanished.
    pub vanished: u64,
}

/// What becomes of the writes in flight when a process or the power ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InFlight {
    /// Each for itself is completed, torn or lost.
    #[default]
    Random,
    /// All are completed, though nobody hears of it.
    Completed,
    /// All are lost.
    Lost,
}

type Page = Box<[u8; BLOCK_SIZE]>;
/// Content of pages before a volatile write; none was never written.
type Images = BTreeMap<u64, Option<Page>>;
type Outcome = Rc<Cell<Option<Result<Option<AlignedBuf>, DeviceError>>>>;

enum Work {
    Read { offset: u64, buf: AlignedBuf },
    Write { offset: u64, data: Rc<[Bytes]>, durable: bool },
    Flush { images: Images },
}

struct Operation {
    work: Work,
    /// When it is applied; none while the device hangs.
    due: Option<Instant>,
    outcome: Outcome,
}

impl Operation {
    /// The bytes that it writes.
    fn range(&self) -> Option<Range<u64>> {
        match &self.work {
            Work::Write { offset, data, .. } => Some(range_of(*offset, data)),
            _ => None,
        }
    }
}

fn range_of(offset: u64, data: &[Bytes]) -> Range<u64> {
    offset..offset + data.iter().map(Bytes::len).sum::<usize>() as u64
}

struct Inner {
    size: u64,
    generation: u64,
    away: bool,
    hung: bool,
    slow: u32,
    drop_durability: bool,
    pages: BTreeMap<u64, Page>,
    volatile: Images,
    operations: BTreeMap<u64, Operation>,
    due: BTreeSet<(Instant, u64)>,
    operations_started: u64,
    read_errors: Vec<Range<u64>>,
    write_errors: Vec<Range<u64>>,
    latent_errors: BTreeSet<u64>,
    misdirect: Option<u64>,
    lose_writes: u64,
    /// Every write from this offset on takes so much longer.
    lag: Option<(u64, Duration)>,
    /// What becomes of writes in flight at the next end of a process.
    in_flight: InFlight,
    /// The next write from this offset on takes so much longer.
    stuck_write: Option<(u64, Duration)>,
    counts: FaultCounts,
}

struct Medium {
    env: Env,
    latency: Range<Duration>,
    changed: Notify,
    inner: RefCell<Inner>,
}

/// A handle on a simulated device. Clones are the same handle; faults strike the medium whatever
/// handle injects them.
#[derive(Clone)]
pub struct SimDevice {
    medium: Rc<Medium>,
    generation: u64,
}

impl SimDevice {
    /// A blank device.
    pub fn new(env: Env, config: SimConfig) -> Self {
        let inner = Inner {
            size: config.size_bytes / BLOCK_BYTES * BLOCK_BYTES,
            generation: 0,
            away: false,
            hung: false,
            slow: 1,
            drop_durability: false,
            pages: BTreeMap::new(),
            volatile: BTreeMap::new(),
            operations: BTreeMap::new(),
            due: BTreeSet::new(),
            operations_started: 0,
            read_errors: Vec::new(),
            write_errors: Vec::new(),
            latent_errors: BTreeSet::new(),
            misdirect: None,
            lose_writes: 0,
            lag: None,
            in_flight: InFlight::Random,
            stuck_write: None,
            counts: FaultCounts::default(),
        };
        let (changed, inner) = (Notify::new(), RefCell::new(inner));
        let medium = Medium { env, latency: config.latency, changed, inner };
        Self { medium: Rc::new(medium), generation: 0 }
    }

    /// Power fails: of what is in flight or volatile, a random subset of sectors is left. The
    /// process is dead.
    pub fn power_cut(&self) {
        self.with(|inner, env| {
            inner.counts.power_cuts += 1;
            let flushing = inner.end_process(env);
            let volatile = std::mem::take(&mut inner.volatile);
            inner.take_back(env, volatile);
            for images in flushing.into_iter().rev() {
                inner.take_back(env, images);
            }
        });
    }

    /// The process is killed: writes in flight are completed, torn or lost, each for itself; what
    /// had completed stays, volatile or not.
    pub fn crash(&self) {
        self.with(|inner, env| {
            inner.counts.crashes += 1;
            for images in inner.end_process(env).into_iter().rev() {
                inner.restore_volatile(images);
            }
        });
    }

    /// A handle for the next process. If the last one was not ended, it crashes now.
    #[must_use]
    pub fn reopen(&self) -> Self {
        if self.medium.inner.borrow().generation == self.generation {
            self.crash();
        }
        let generation = self.medium.inner.borrow().generation;
        Self { medium: self.medium.clone(), generation }
    }

    /// Reads that touch these bytes fail until [`SimDevice::clear_errors`].
    pub fn fail_reads(&self, range: Range<u64>) {
        self.with(|inner, _| inner.read_errors.push(range));
    }

    /// Writes that touch these bytes fail until [`SimDevice::clear_errors`], leaving any subset of
    /// their sectors. A flush fails if any write range is set.
    pub fn fail_writes(&self, range: Range<u64>) {
        self.with(|inner, _| inner.write_errors.push(range));
    }

    /// The pages of these bytes cannot be read until they are written again.
    pub fn latent_error(&self, range: Range<u64>) {
        let pages = range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES);
        self.with(|inner, _| inner.latent_errors.extend(pages));
    }

    /// Ends failing ranges and latent errors.
    pub fn clear_errors(&self) {
        self.with(|inner, _| {
            inner.read_errors.clear();
            inner.write_errors.clear();
            inner.latent_errors.clear();
        });
    }

    /// Flips one bit of the medium.
    pub fn flip_bit(&self, offset: u64, bit: u8) {
        self.with(|inner, _| {
            inner.counts.bits_flipped += 1;
            let page = inner.pages.entry(offset / BLOCK_BYTES).or_insert_with(blank);
            page[within_page(offset)] ^= 1 << (bit % 8);
        });
    }

    /// The next write goes to `offset` instead and reports success.
    pub fn misdirect_next_write(&self, offset: u64) {
        self.with(|inner, _| inner.misdirect = Some(offset / BLOCK_BYTES * BLOCK_BYTES));
    }

    /// The next `count` writes go nowhere and report success.
    pub fn lose_next_writes(&self, count: u64) {
        self.with(|inner, _| inner.lose_writes = count);
    }

    /// The next write at `from` or beyond takes `time` longer than it would.
    pub fn delay_next_write(&self, from: u64, time: Duration) {
        self.with(|inner, _| inner.stuck_write = Some((from, time)));
    }

    /// Writes at `from` or beyond take `time` longer until told otherwise.
    pub fn set_lag(&self, lag: Option<(u64, Duration)>) {
        self.with(|inner, _| inner.lag = lag);
    }

    /// What becomes of writes in flight at the next crash or power cut, instead of something at
    /// random.
    pub fn end_with(&self, in_flight: InFlight) {
        self.with(|inner, _| inner.in_flight = in_flight);
    }

    /// Operations that start from now on take `factor` times as long; 1 is normal.
    pub fn set_slow(&self, factor: u32) {
        self.with(|inner, _| inner.slow = factor.max(1));
    }

    /// Nothing completes until [`SimDevice::heal`].
    pub fn hang(&self) {
        self.with(|inner, _| {
            inner.hung = true;
            inner.due.clear();
            for operation in inner.operations.values_mut() {
                operation.due = None;
                inner.counts.hung_operations += 1;
            }
        });
    }

    /// Ends a hang: what waited completes soon.
    pub fn heal(&self) {
        let latency = || self.medium.draw_latency();
        let mut inner = self.medium.inner.borrow_mut();
        inner.hung = false;
        let now = Instant::now();
        let Inner { operations, due, slow, .. } = &mut *inner;
        for (id, operation) in operations.iter_mut().filter(|(_, o)| o.due.is_none()) {
            let at = now + latency() * *slow;
            operation.due = Some(at);
            due.insert((at, *id));
        }
        drop(inner);
        self.medium.changed.notify_waiters();
    }

    /// The device is pulled out: everything fails with [`DeviceError::Gone`] until
    /// [`SimDevice::bring_back`]. What was in flight is completed, torn or lost.
    pub fn vanish(&self) {
        self.with(|inner, env| {
            inner.counts.vanished += 1;
            inner.away = true;
            let outcomes: Vec<_> = inner.operations.values().map(|o| o.outcome.clone()).collect();
            for images in inner.end_operations(env, InFlight::Random).into_iter().rev() {
                inner.restore_volatile(images);
            }
            for outcome in outcomes {
                outcome.set(Some(Err(DeviceError::Gone)));
            }
        });
    }

    /// The device is back, with the content it had.
    pub fn bring_back(&self) {
        self.with(|inner, _| inner.away = false);
    }

    /// All faults of the device end but those of its content.
    pub fn end_faults(&self) {
        self.heal();
        self.clear_errors();
        self.bring_back();
        self.set_slow(1);
    }

    /// Whether writes and flushes only pretend to be durable: a planted bug.
    pub fn set_drop_durability(&self, drop_it: bool) {
        self.with(|inner, _| inner.drop_durability = drop_it);
    }

    /// Overwrites bytes with random ones, at once and durably.
    pub fn scribble(&self, range: Range<u64>) {
        self.with(|inner, env| {
            for offset in range {
                let page = inner.pages.entry(offset / BLOCK_BYTES).or_insert_with(blank);
                page[within_page(offset)] = env.random_u64().to_le_bytes()[0];
            }
        });
    }

    /// Changes the size; what lies beyond is lost.
    pub fn resize(&self, size_bytes: u64) {
        self.with(|inner, _| {
            inner.size = size_bytes / BLOCK_BYTES * BLOCK_BYTES;
            let end = inner.size / BLOCK_BYTES;
            drop(inner.pages.split_off(&end));
            drop(inner.volatile.split_off(&end));
        });
    }

    /// Content of the medium as the next read would give it, past all faults.
    pub fn peek(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.with(|inner, _| inner.copy_out(offset, &mut data));
        data
    }

    /// How often each fault has struck.
    pub fn fault_counts(&self) -> FaultCounts {
        self.medium.inner.borrow().counts
    }

    /// Operations under way.
    pub fn operations_in_flight(&self) -> usize {
        self.medium.inner.borrow().operations.len()
    }

    fn with<T>(&self, change: impl FnOnce(&mut Inner, &Env) -> T) -> T {
        self.medium.apply_due();
        let result = change(&mut self.medium.inner.borrow_mut(), &self.medium.env);
        self.medium.changed.notify_waiters();
        result
    }

    fn submit(&self, work: Work) -> LocalFuture<'static, Result<Option<AlignedBuf>, DeviceError>> {
        let medium = self.medium.clone();
        medium.apply_due();
        let latency = medium.draw_latency();
        let mut inner = medium.inner.borrow_mut();
        if inner.away || inner.generation != self.generation {
            return Box::pin(std::future::ready(Err(DeviceError::Gone)));
        }
        if let Work::Write { offset, data, .. } = &work {
            let written = inner.operations.values().filter_map(Operation::range);
            let range = range_of(*offset, data);
            let overlaps = written.filter(|r| r.start < range.end && range.start < r.end).count();
            inner.counts.overlapping_writes += overlaps as u64;
        }
        let id = inner.operations_started;
        inner.operations_started += 1;
        let outcome = Outcome::default();
        let stuck = match (&work, inner.stuck_write) {
            (Work::Write { offset, .. }, Some((from, time))) if *offset >= from => {
                inner.stuck_write = None;
                time
            }
            _ => Duration::ZERO,
        };
        let lag = match (&work, inner.lag) {
            (Work::Write { offset, .. }, Some((from, time))) if *offset >= from => time,
            _ => Duration::ZERO,
        };
        let due = (!inner.hung).then(|| Instant::now() + latency * inner.slow + stuck + lag);
        match due {
            Some(at) => drop(inner.due.insert((at, id))),
            None => inner.counts.hung_operations += 1,
        }
        inner.operations.insert(id, Operation { work, due, outcome: outcome.clone() });
        drop(inner);
        Box::pin(async move {
            loop {
                let changed = medium.changed.notified();
                medium.apply_due();
                if let Some(result) = outcome.take() {
                    return result;
                }
                let due = medium.inner.borrow().operations.get(&id).and_then(|o| o.due);
                match due {
                    None => changed.await,
                    Some(at) => tokio::select! {
                        biased;
                        () = changed => {}
                        () = sleep_until(at) => {}
                    },
                }
            }
        })
    }
}

impl Medium {
    fn draw_latency(&self) -> Duration {
        let span = self.latency.end.saturating_sub(self.latency.start).as_micros();
        let span = u64::try_from(span).unwrap_or(u64::MAX).max(1);
        self.latency.start + Duration::from_micros(self.env.random_below(span))
    }

    fn apply_due(&self) {
        let now = Instant::now();
        let mut inner = self.inner.borrow_mut();
        while let Some((at, id)) = inner.due.first().copied()
            && at <= now
        {
            inner.due.pop_first();
            let Some(operation) = inner.operations.remove(&id) else { continue };
            let result = inner.apply(&self.env, operation.work);
            operation.outcome.set(Some(result));
        }
    }
}

impl Inner {
    fn apply(&mut self, env: &Env, work: Work) -> Result<Option<AlignedBuf>, DeviceError> {
        match work {
            Work::Read { offset, mut buf } => {
                let len = buf.len() as u64;
                self.check_range("read", offset, len)?;
                let pages = offset / BLOCK_BYTES..(offset + len).div_ceil(BLOCK_BYTES);
                let latent = self.latent_errors.range(pages).next().is_some();
                if latent || touches(&self.read_errors, offset, len) {
                    self.counts.read_errors += 1;
                    return Err(DeviceError::Io { operation: "read", offset, len, errno: EIO });
                }
                self.copy_out(offset, &mut buf);
                Ok(Some(buf))
            }
            Work::Write { offset, data, durable } => {
                let Range { start, end } = range_of(offset, &data);
                let len = end - start;
                self.check_range("write", offset, len)?;
                if touches(&self.write_errors, offset, len) {
                    self.counts.write_errors += 1;
                    self.write_some_sectors(env, offset, &data, durable);
                    return Err(DeviceError::Io { operation: "write", offset, len, errno: EIO });
                }
                self.write(offset, len, &data, durable);
                Ok(None)
            }
            Work::Flush { images } => {
                if !self.write_errors.is_empty() {
                    self.counts.write_errors += 1;
                    self.restore_volatile(images);
                    return Err(DeviceError::Io {
                        operation: "flush",
                        offset: 0,
                        len: 0,
                        errno: EIO,
                    });
                }
                if self.drop_durability {
                    self.counts.durability_dropped += 1;
                    self.restore_volatile(images);
                }
                Ok(None)
            }
        }
    }

    fn check_range(
        &self,
        operation: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<(), DeviceError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(DeviceError::Short { operation, offset, len }),
        }
    }

    fn write(&mut self, offset: u64, len: u64, data: &[Bytes], durable: bool) {
        if self.lose_writes > 0 {
            self.lose_writes -= 1;
            self.counts.lost_writes += 1;
            return;
        }
        let mut offset = offset;
        if let Some(elsewhere) = self.misdirect.take() {
            self.counts.misdirected_writes += 1;
            offset = elsewhere.min(self.size - len);
        }
        let durable = durable && !self.drop_durability;
        if self.drop_durability {
            self.counts.durability_dropped += 1;
        }
        for (at, sector) in sectors(offset, data) {
            self.write_sector(at, sector, durable);
        }
    }

    /// Writes one sector and keeps what a power cut may bring back.
    fn write_sector(&mut self, at: u64, sector: &[u8], durable: bool) {
        let number = at / BLOCK_BYTES;
        self.latent_errors.remove(&number);
        if !durable && !self.volatile.contains_key(&number) {
            let before = self.pages.get(&number).cloned();
            self.volatile.insert(number, before);
        }
        let start = within_page(at);
        let page = self.pages.entry(number).or_insert_with(blank);
        page[start..start + sector.len()].copy_from_slice(sector);
        if !durable {
            return;
        }
        // The sector may no more be taken back.
        let flushing =
            self.operations.values_mut().filter_map(|operation| match &mut operation.work {
                Work::Flush { images } => Some(images),
                _ => None,
            });
        for images in flushing.chain([&mut self.volatile]) {
            if let Some(image) = images.get_mut(&number) {
                let image = image.get_or_insert_with(blank);
                image[start..start + sector.len()].copy_from_slice(sector);
            }
        }
    }

    fn copy_out(&self, offset: u64, buf: &mut [u8]) {
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let start = within_page(at);
            let count = (BLOCK_SIZE - start).min(buf.len() - done);
            match self.pages.get(&(at / BLOCK_BYTES)) {
                Some(page) => {
                    buf[done..done + count].copy_from_slice(&page[start..start + count]);
                }
                None => buf[done..done + count].fill(0),
            }
            done += count;
        }
    }

    /// Ends the process: its writes in flight are completed, torn or lost. Gives the images of
    /// the flushes under way, oldest first.
    fn end_process(&mut self, env: &Env) -> Vec<Images> {
        self.generation += 1;
        let in_flight = std::mem::take(&mut self.in_flight);
        self.end_operations(env, in_flight)
    }

    fn end_operations(&mut self, env: &Env, in_flight: InFlight) -> Vec<Images> {
        self.due.clear();
        let ids: Vec<u64> = self.operations.keys().copied().collect();
        for id in ids {
            let is_flush = matches!(self.operations[&id].work, Work::Flush { .. });
            let Some(operation) = (!is_flush).then(|| self.operations.remove(&id)).flatten() else {
                continue;
            };
            if let Work::Write { offset, data, durable } = operation.work {
                match in_flight {
                    InFlight::Random => self.write_some_sectors(env, offset, &data, durable),
                    InFlight::Completed => {
                        let durable = durable && !self.drop_durability;
                        sectors(offset, &data)
                            .for_each(|(at, sector)| self.write_sector(at, sector, durable));
                    }
                    InFlight::Lost => {}
                }
            }
        }
        let flushes = std::mem::take(&mut self.operations).into_values();
        let images = flushes.filter_map(|operation| match operation.work {
            Work::Flush { images } => Some(images),
            _ => None,
        });
        images.collect()
    }

    /// All, none, or a random subset of the sectors of a write.
    fn write_some_sectors(&mut self, env: &Env, offset: u64, data: &[Bytes], durable: bool) {
        let durable = durable && !self.drop_durability;
        let mode = env.random_below(3);
        self.counts.torn_writes += u64::from(mode == 2);
        for (at, sector) in sectors(offset, data) {
            let fits = at + SECTOR_BYTES as u64 <= self.size;
            if fits && (mode == 1 || (mode == 2 && env.chance(1, 2))) {
                self.write_sector(at, sector, durable);
            }
        }
    }

    /// Takes back a random subset of the sectors of these pages to what they were before.
    fn take_back(&mut self, env: &Env, images: Images) {
        for (number, image) in images {
            let image = image.unwrap_or_else(blank);
            let page = self.pages.entry(number).or_insert_with(blank);
            let mut lost = false;
            for (now, before) in page.chunks_mut(SECTOR_BYTES).zip(image.chunks(SECTOR_BYTES)) {
                if env.chance(1, 2) {
                    lost |= now != before;
                    now.copy_from_slice(before);
                }
            }
            self.counts.volatile_pages_lost += u64::from(lost);
        }
    }

    /// Makes pages volatile again whose flush did not happen.
    fn restore_volatile(&mut self, images: Images) {
        for (number, image) in images {
            self.volatile.insert(number, image);
        }
    }
}

fn blank() -> Page {
    Box::new([0; BLOCK_SIZE])
}

fn within_page(offset: u64) -> usize {
    usize::try_from(offset % BLOCK_BYTES).expect("less than a page")
}

fn touches(ranges: &[Range<u64>], offset: u64, len: u64) -> bool {
    ranges.iter().any(|range| offset < range.end && range.start < offset + len)
}

fn sectors(offset: u64, data: &[Bytes]) -> impl Iterator<Item = (u64, &[u8])> {
    let pieces = data.iter().flat_map(|piece| piece.chunks(SECTOR_BYTES));
    (offset..).step_by(SECTOR_BYTES).zip(pieces)
}

impl BlockDevice for SimDevice {
    fn size(&self) -> u64 {
        self.medium.inner.borrow().size
    }

    fn read(
        &self,
        offset: u64,
        buf: AlignedBuf,
    ) -> LocalFuture<'static, Result<AlignedBuf, DeviceError>> {
        let answer = self.submit(Work::Read { offset, buf });
        Box::pin(async move { answer.await?.ok_or(DeviceError::Gone) })
    }

    fn write(
        &self,
        offset: u64,
        data: Rc<[Bytes]>,
        durable: bool,
    ) -> LocalFuture<'static, Result<(), DeviceError>> {
        let answer = self.submit(Work::Write { offset, data, durable });
        Box::pin(async move { answer.await.map(|_| ()) })
    }

    fn flush(&self) -> LocalFuture<'static, Result<(), DeviceError>> {
        self.medium.apply_due();
        let images = {
            let mut inner = self.medium.inner.borrow_mut();
            let ours = !inner.away && inner.generation == self.generation;
            if ours { std::mem::take(&mut inner.volatile) } else { Images::new() }
        };
        let answer = self.submit(Work::Flush { images });
        Box::pin(async move { answer.await.map(|_| ()) })
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
