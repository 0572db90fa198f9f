//! Reading from segments: verified end to end, around shards that are missing, damaged or slow.
//!
//! A read that takes longer than the peers of its disk let expect is hedged: other shards are asked
//! too, and the first answer that suffices wins. Hedges are few while no disk is slow
//! ([`crate::shard::latency`]).

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::timeout;

use super::checksum::Salt;
use super::stripe;
use crate::buffer::AlignedBuf;
use crate::id::{BLOCK_SIZE, DiskId, SegmentId, VolumeId};
use crate::shard::disks::Disks;
use crate::shard::{Scheme, ShardError};

/// How long a read waits for one disk before it turns to others.
pub const READ_PATIENCE: Duration = Duration::from_millis(500);

/// A segment as a reader needs to know it.
#[derive(Debug, Clone)]
pub struct Source {
    /// The volume.
    pub volume: VolumeId,
    /// The segment.
    pub segment: SegmentId,
    /// Its scheme.
    pub scheme: Scheme,
    /// Disk of each shard.
    pub members: Vec<DiskId>,
    /// Creation of each shard.
    pub creations: Vec<u64>,
    /// Bit `i`: shard `i` is not there or not whole.
    pub missing: u32,
    /// Bit `i`: shard `i` is not read at all.
    pub without: u32,
}

/// A shard that did not deliver, for the one who repairs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The segment.
    pub segment: SegmentId,
    /// The disk that was asked for it.
    pub disk: DiskId,
    /// The creation that was looked for there: another one is another shard.
    pub creation: u64,
    /// What was wrong: the first bad block, or the disk's error.
    pub problem: Problem,
}

/// What is wrong with a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// The content of this block does not match its checksum.
    Corrupt(u32),
    /// The disk answered with an error.
    Disk(ShardError),
}

impl Problem {
    fn is_silence(&self) -> bool {
        *self == Self::Disk(ShardError::Unreachable)
    }

    /// Whether the shard is there but its content is not what was written.
    pub fn is_of_content(&self) -> bool {
        match self {
            Self::Corrupt(_) => true,
            Self::Disk(error) => matches!(error, ShardError::Io(_) | ShardError::Damaged(_)),
        }
    }
}

/// Why blocks cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// Every disk that was asked says that the shard does not exist: the segment was freed.
    #[error("segment {0} is gone")]
    Gone(SegmentId),
    /// Fewer shards deliver than the scheme needs.
    #[error("segment {segment}: {have} of {need} shards needed can be read ({problem})")]
    TooFew {
        /// The segment.
        segment: SegmentId,
        /// Shards that delivered.
        have: usize,
        /// Data shards of the scheme.
        need: usize,
        /// What the last of the others said.
        problem: String,
        /// Whether one did not answer in time: later it may.
        silent: bool,
    },
}

impl Source {
    fn is_missing(&self, shard: usize) -> bool {
        self.missing >> shard & 1 == 1
    }

    /// Blocks of one shard from its disk, verified; no way around a failure.
    async fn direct(
        &self,
        disks: &Disks,
        shard: usize,
        block: u32,
        count: u32,
    ) -> Result<Bytes, Problem> {
        let disk = self.members[shard];
        if disk.is_nil() {
            // It was never created.
            return Err(Problem::Disk(ShardError::Gone));
        }
        if self.without >> shard & 1 == 1 {
            return Err(Problem::Disk(ShardError::Offline("left out".into())));
        }
        let Some(client) = disks.client(disk) else {
            return Err(Problem::Disk(ShardError::Offline("down".into())));
        };
        let read = client.read(self.volume, self.segment, block, count);
        let reply = match tokio::time::timeout(READ_PATIENCE, read).await {
            Ok(Ok(reply)) => reply,
            Ok(Err(error)) => {
                disks.report(disk, &error);
                return Err(Problem::Disk(error));
            }
            Err(_) => {
                disks.report(disk, &ShardError::Unreachable);
                return Err(Problem::Disk(ShardError::Unreachable));
            }
        };
        let salt = Salt::new(self.volume, self.segment, self.scheme, shard);
        match salt.verify(block, &reply.data, &reply.crcs) {
            None => Ok(reply.data),
            Some(bad) => Err(Problem::Corrupt(bad)),
        }
    }

    /// Blocks of one shard from its own disk or not at all, verified.
    ///
    /// # Errors
    /// [`FetchError::TooFew`] with what was wrong.
    pub async fn read_one(
        &self,
        disks: &Disks,
        shard: usize,
        block: u32,
        count: u32,
    ) -> Result<Bytes, FetchError> {
        self.direct(disks, shard, block, count)
            .await
            .map_err(|problem| self.too_few(false, 0, (&problem, problem.is_silence())))
    }

    /// The same, for one who takes note of what is wrong.
    ///
    /// # Errors
    /// What is.
    pub async fn read_own(
        &self,
        disks: &Disks,
        shard: usize,
        block: u32,
        count: u32,
    ) -> Result<Bytes, Finding> {
        let found = |problem| Finding {
            segment: self.segment,
            disk: self.members[shard],
            creation: self.creations[shard],
            problem,
        };
        self.direct(disks, shard, block, count).await.map_err(found)
    }

    /// `count` blocks from `block` of data or parity shard `shard`, verified: from its disk, or
    /// from the others when it fails. `found` hears of every shard that did not deliver. Where no
    /// shard holds all of the blocks intact, each is read by itself, from whichever does.
    ///
    /// # Errors
    /// [`FetchError::Gone`]: look the place up again. [`FetchError::TooFew`]: wait, or fail.
    pub async fn read(
        &self,
        disks: &Disks,
        shard: usize,
        block: u32,
        count: u32,
        found: &mut dyn FnMut(Finding),
    ) -> Result<Bytes, FetchError> {
        let mut torn = false;
        let mut hear = |finding: Finding| {
            torn |= finding.problem.is_of_content();
            found(finding);
        };
        let error = match self.read_range(disks, shard, block, count, &mut hear).await {
            Err(error @ FetchError::TooFew { .. }) => error,
            other => return other,
        };
        if !torn || count == 1 {
            return Err(error);
        }
        let mut out = AlignedBuf::new(count as usize * BLOCK_SIZE);
        for (at, piece) in (block..).zip(out.chunks_exact_mut(BLOCK_SIZE)) {
            piece.copy_from_slice(&self.read_range(disks, shard, at, 1, found).await?);
        }
        Ok(out.freeze())
    }

    /// [`Source::read`] of all the blocks from the same shards.
    async fn read_range(
        &self,
        disks: &Disks,
        shard: usize,
        block: u32,
        count: u32,
        found: &mut dyn FnMut(Finding),
    ) -> Result<Bytes, FetchError> {
        disks.watch().note_read();
        let width = self.scheme.width();
        let avoid = |i: usize| (self.is_missing(i), disks.rank(self.members[i]));
        if self.scheme.data == 1 {
            // Copies: healthy disks first, starting at a place that spreads the load.
            let start = (block / 64) as usize % width;
            let mut order: Vec<usize> = (0..width).map(|i| (start + i) % width).collect();
            order.sort_by_cached_key(|&i| avoid(i));
            let race = Race { source: self, disks, wanted: None, block, count };
            return race.run(order.into(), found).await;
        }
        let mut order: Vec<usize> = (0..width).filter(|&i| i != shard).collect();
        order.sort_by_cached_key(|&i| avoid(i));
        // A shard on a disk that is avoided comes last: it may still deliver.
        let at = if avoid(shard) == (false, 0) { 0 } else { order.len() };
        order.insert(at, shard);
        let race = Race { source: self, disks, wanted: Some(shard), block, count };
        race.run(order.into(), found).await
    }

    /// The same `count` blocks from `block` of as many shards as the scheme needs, verified, by
    /// shard: those that are whole before those that are not, from `start` on, which spreads the
    /// load. `found` hears of every shard that did not deliver.
    ///
    /// # Errors
    /// As [`Source::read`].
    pub async fn gather(
        &self,
        disks: &Disks,
        start: usize,
        block: u32,
        count: u32,
        found: &mut dyn FnMut(Finding),
    ) -> Result<Vec<(usize, Bytes)>, FetchError> {
        disks.watch().note_read();
        let width = self.scheme.width();
        let mut order: Vec<usize> = (0..width).map(|i| (start + i) % width).collect();
        order.sort_by_cached_key(|&i| (self.is_missing(i), disks.rank(self.members[i])));
        Race { source: self, disks, wanted: None, block, count }.gather(order.into(), found).await
    }

    fn too_few(&self, gone: bool, have: usize, (last, silent): (&Problem, bool)) -> FetchError {
        if gone {
            return FetchError::Gone(self.segment);
        }
        FetchError::TooFew {
            segment: self.segment,
            have,
            need: self.scheme.data.into(),
            problem: match last {
                Problem::Corrupt(block) => format!("block {block} is corrupt"),
                Problem::Disk(error) => error.to_string(),
            },
            silent,
        }
    }
}

/// Blocks of one shard, read from as few disks as will do, and from more when those fail or are
/// overdue. The first answer that suffices wins: the wanted shard, or any `k` others.
struct Race<'a> {
    source: &'a Source,
    disks: &'a Disks,
    /// The shard that needs no others; none where each is as good.
    wanted: Option<usize>,
    block: u32,
    count: u32,
}

/// What a race has under way.
#[derive(Default)]
struct Field {
    /// Shards not asked yet, in the order in which they will be.
    left: VecDeque<usize>,
    running: Vec<usize>,
    have: Vec<(usize, Bytes)>,
    /// No more hedges: there is nobody left for one, or they were too many.
    patient: bool,
}

impl Race<'_> {
    /// The wanted shard, read or rebuilt; or whichever delivers, where each is as good.
    async fn run(
        &self,
        order: VecDeque<usize>,
        found: &mut dyn FnMut(Finding),
    ) -> Result<Bytes, FetchError> {
        let mut have = self.gather(order, found).await?;
        match &have[..] {
            [(shard, _)] if self.wanted.is_none_or(|wanted| wanted == *shard) => {
                Ok(have.remove(0).1)
            }
            _ => Ok(self.rebuild(&have)),
        }
    }

    /// The wanted shard alone, or as many others as the scheme needs.
    async fn gather(
        &self,
        order: VecDeque<usize>,
        found: &mut dyn FnMut(Finding),
    ) -> Result<Vec<(usize, Bytes)>, FetchError> {
        let source = self.source;
        let mut reads = FuturesUnordered::new();
        let mut field = Field { left: order, ..Field::default() };
        let (mut gone, mut last) = (true, Problem::Disk(ShardError::Gone));
        let mut silent = false;
        let mut more = 1;
        loop {
            more = more.max(self.lacks(&field)).min(field.left.len());
            for shard in field.left.drain(..more) {
                field.running.push(shard);
                reads.push(async move {
                    (shard, source.direct(self.disks, shard, self.block, self.count).await)
                });
            }
            let Some(&longest) = field.running.first() else {
                return Err(source.too_few(gone, field.have.len(), (&last, silent)));
            };
            more = 0;
            let overdue = self.disks.watch().overdue_after(source.members[longest]);
            let answer = if field.patient {
                reads.next().await
            } else {
                let Ok(answer) = timeout(overdue, reads.next()).await else {
                    more = self.hedge(&mut field, longest);
                    continue;
                };
                answer
            };
            let Some((shard, result)) = answer else { continue };
            field.running.retain(|&other| other != shard);
            match result {
                Ok(data) if self.wanted == Some(shard) => return Ok(vec![(shard, data)]),
                Ok(data) => {
                    gone = false;
                    field.have.push((shard, data));
                    if field.have.len() == usize::from(source.scheme.data) {
                        return Ok(field.have);
                    }
                }
                Err(problem) => {
                    gone &= problem == Problem::Disk(ShardError::Gone);
                    silent |= problem.is_silence();
                    found(Finding {
                        segment: source.segment,
                        disk: source.members[shard],
                        creation: source.creations[shard],
                        problem: problem.clone(),
                    });
                    last = problem;
                }
            }
        }
    }

    /// Shards that must be asked besides those that are, or there will be no answer.
    fn lacks(&self, field: &Field) -> usize {
        let running = field.running.len();
        let direct = field.running.iter().any(|&shard| Some(shard) == self.wanted);
        if direct && running == 1 && field.have.is_empty() {
            return 0;
        }
        let first = field.left.front().copied();
        if first.is_some() && first == self.wanted && running == 0 && field.have.is_empty() {
            return 1;
        }
        let others = field.have.len() + running - usize::from(direct);
        usize::from(self.source.scheme.data).saturating_sub(others)
    }

    /// How many more to ask because `shard` is overdue.
    fn hedge(&self, field: &mut Field, shard: usize) -> usize {
        let direct = Some(shard) == self.wanted && field.running.len() == 1;
        let more = if direct { usize::from(self.source.scheme.data) } else { 1 };
        let good = |&&i: &&usize| {
            !self.source.is_missing(i) && self.disks.rank(self.source.members[i]) < 2
        };
        let there = field.left.iter().take(more).filter(good).count() == more;
        if there && self.disks.watch().may_hedge(self.source.members[shard], more) {
            return more;
        }
        field.patient = true;
        0
    }

    fn rebuild(&self, have: &[(usize, Bytes)]) -> Bytes {
        let shards: Vec<(usize, &[u8])> = have.iter().map(|(i, data)| (*i, &data[..])).collect();
        let mut out = AlignedBuf::new(self.count as usize * BLOCK_SIZE);
        let wanted = self.wanted.expect("a copy needs no others");
        stripe::rebuild(self.source.scheme, &shards, wanted, &mut out);
        out.freeze()
    }
}
