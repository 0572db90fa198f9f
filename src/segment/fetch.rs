//! Reading from segments: verified end to end, around shards that are missing, damaged or slow.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;

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
            .map_err(|problem| self.too_few(false, 0, &problem))
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
        let mut report = |shard: usize, problem: &Problem| {
            found(Finding {
                segment: self.segment,
                disk: self.members[shard],
                creation: self.creations[shard],
                problem: problem.clone(),
            });
        };
        let mut last = Problem::Disk(ShardError::Gone);
        let mut gone = true;
        if self.scheme.data == 1 {
            // Copies: healthy disks first, starting at a place that spreads the load.
            let width = self.scheme.width();
            let start = (block / 64) as usize % width;
            let mut order: Vec<usize> = (0..width).map(|i| (start + i) % width).collect();
            order.sort_by_key(|&i| (self.is_missing(i), !disks.is_healthy(self.members[i])));
            for i in order {
                match self.direct(disks, i, block, count).await {
                    Ok(data) => return Ok(data),
                    Err(problem) => {
                        gone &= problem == Problem::Disk(ShardError::Gone);
                        report(i, &problem);
                        last = problem;
                    }
                }
            }
            return Err(self.too_few(gone, 0, &last));
        }
        if !self.is_missing(shard) && disks.is_healthy(self.members[shard]) {
            match self.direct(disks, shard, block, count).await {
                Ok(data) => return Ok(data),
                Err(problem) => {
                    report(shard, &problem);
                    last = problem;
                }
            }
        }
        self.reconstruct(disks, shard, block, count, last, &mut report).await
    }

    /// Rebuilds blocks of one shard from any `k` others.
    async fn reconstruct(
        &self,
        disks: &Disks,
        wanted: usize,
        block: u32,
        count: u32,
        mut last: Problem,
        report: &mut dyn FnMut(usize, &Problem),
    ) -> Result<Bytes, FetchError> {
        let need = usize::from(self.scheme.data);
        let mut gone = last == Problem::Disk(ShardError::Gone);
        let mut order: Vec<usize> =
            (0..self.scheme.width()).filter(|&shard| shard != wanted).collect();
        order.sort_by_key(|&i| (self.is_missing(i), !disks.is_healthy(self.members[i])));
        // The wanted shard itself comes last: a suspect disk may still deliver.
        order.push(wanted);
        let mut have: Vec<(usize, Bytes)> = Vec::with_capacity(need);
        while have.len() < need && !order.is_empty() {
            let batch: Vec<usize> = order.drain(..(need - have.len()).min(order.len())).collect();
            let reads = batch.iter().map(|&shard| self.direct(disks, shard, block, count));
            for (&shard, result) in batch.iter().zip(join_all(reads).await) {
                match result {
                    Ok(data) if shard == wanted => return Ok(data),
                    Ok(data) => {
                        gone = false;
                        have.push((shard, data));
                    }
                    Err(problem) => {
                        gone &= problem == Problem::Disk(ShardError::Gone);
                        report(shard, &problem);
                        last = problem;
                    }
                }
            }
        }
        if have.len() < need {
            return Err(self.too_few(gone, have.len(), &last));
        }
        let shards: Vec<(usize, &[u8])> = have.iter().map(|(i, data)| (*i, &data[..])).collect();
        let mut out = AlignedBuf::new(count as usize * BLOCK_SIZE);
        stripe::rebuild(self.scheme, &shards, wanted, &mut out);
        Ok(out.freeze())
    }

    fn too_few(&self, gone: bool, have: usize, last: &Problem) -> FetchError {
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
        }
    }
}
