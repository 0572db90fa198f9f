//! The content of lost shards, streamed from the others to where they are built anew.
//!
//! A segment is read in windows, the same blocks of as many shards as its scheme needs, several
//! windows ahead of what is written; each window is decoded once for all shards that are to be built.
//! Parity is computed block by block, so that what comes out is right for payload wherever records
//! begin; headers are each shard's own and are made from one of those that were read. Records
//! are put together and appended in their order, small ones many at a time, to all new shards at once.
//!
//! Where no set of shards delivers a window whole, its records are read one by one, which gets by with
//! less ([`Head::rebuilt_record`]).
//!
//! Memory is bounded by [`crate::limits::repair_blocks`]; the caller holds a permit for it. Each window
//! is taken from the budget of the node. Knows nothing of what is done with the shards.

use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::stream::{self, FuturesUnordered, StreamExt};

use super::progress::Part;
use super::{Head, HeadError};
use crate::buffer::AlignedBuf;
use crate::id::{BLOCK_BYTES, BLOCK_SIZE};
use crate::limits::{
    RECORD_HEADER_BLOCKS_MAX, REPAIR_APPENDS_MAX, REPAIR_WINDOW_BLOCKS, REPAIR_WINDOWS_AHEAD,
};
use crate::planted::{Bug, bug};
use crate::segment::checksum::{Salt, raw_crcs};
use crate::segment::fetch::{FetchError, Source};
use crate::segment::open::{CONTROL_PATIENCE, frame};
use crate::segment::record::Header;
use crate::segment::stripe;
use crate::shard::budget::Urgency;
use crate::shard::disks::Target;
use crate::shard::{Append, SegmentKind, ShardError, ShardResult};
use crate::volume::head::add;
use crate::volume::segtab::Segment;

/// A shard that is to be built.
pub(super) struct Goal {
    /// Its index.
    pub(super) shard: usize,
    /// Where it goes; nowhere if it only matters whether it could be built.
    pub(super) target: Option<Target>,
    /// Why it will not be whole.
    pub(super) failed: Option<HeadError>,
}

/// One window, decoded.
struct Chunk {
    at: u32,
    count: u32,
    /// One of the shards that were read, for its headers.
    read: (usize, Bytes),
    /// What each goal is to hold.
    built: Vec<Bytes>,
}

impl Chunk {
    fn end(&self) -> u32 {
        self.at + self.count
    }
}

/// Part of `data`, whose first block is `at`.
fn blocks(data: &Bytes, at: u32, from: u32, to: u32) -> Bytes {
    data.slice((from - at) as usize * BLOCK_SIZE..(to - at) as usize * BLOCK_SIZE)
}

/// What is appended to one goal next.
#[derive(Default)]
struct Batch {
    data: Vec<Bytes>,
    crcs: Vec<u32>,
}

/// The repair of one segment.
pub(super) struct Stream<'a> {
    head: &'a Head,
    segment: &'a Segment,
    goals: Vec<Goal>,
    part: &'a Part<'a>,
    urgency: Urgency,
    /// Shards that are not read at all, a bit each.
    without: u32,
    chunks: VecDeque<Chunk>,
    /// Everything before it was appended, or is in the batches.
    next: u32,
    /// Everything before it was appended.
    sent: u32,
    batches: Vec<Batch>,
}

type Appends<'a> = FuturesUnordered<std::pin::Pin<Box<dyn Future<Output = Appended> + 'a>>>;
/// Which goal, how many blocks, and how it ended.
type Appended = (usize, u32, ShardResult<()>);

impl<'a> Stream<'a> {
    pub(super) fn new(
        head: &'a Head,
        segment: &'a Segment,
        goals: Vec<Goal>,
        part: &'a Part<'a>,
        urgency: Urgency,
        without: u32,
    ) -> Self {
        let batches = goals.iter().map(|_| Batch::default()).collect();
        let chunks = VecDeque::new();
        Self { head, segment, goals, part, urgency, without, chunks, next: 0, sent: 0, batches }
    }

    /// Reads all of the segment and appends it to the goals, whose shards are open and empty. Gives
    /// the goals back, with what failed of each.
    ///
    /// # Errors
    /// The segment cannot be read, or no goal is left.
    pub(super) async fn run(mut self) -> Result<Vec<Goal>, HeadError> {
        while self.next < self.segment.blocks {
            let Some(end) = self.flow().await? else { break };
            // Nobody delivers the window as a whole.
            while self.next < end {
                self.step().await?;
            }
        }
        Ok(self.goals)
    }

    fn wanted(&self) -> Vec<usize> {
        self.goals.iter().map(|goal| goal.shard).collect()
    }

    fn source(&self) -> Result<Source, HeadError> {
        let source = self.head.source(self.segment.id);
        let (mut source, _) = source.ok_or(FetchError::Gone(self.segment.id))?;
        source.without |= self.without;
        Ok(source)
    }

    /// Goes on from `next`, window by window. Gives the end of a window that no set of shards
    /// delivers; none when all is done.
    async fn flow(&mut self) -> Result<Option<u32>, HeadError> {
        let (head, segment, urgency, without) =
            (self.head, self.segment, self.urgency, self.without);
        let wanted: Rc<[usize]> = self.wanted().into();
        let window = head.config.repair_window_blocks.clamp(1, REPAIR_WINDOW_BLOCKS);
        let starts = (self.next..segment.blocks).step_by(window as usize);
        let windows = starts.map(|at| {
            let (count, wanted) = (window.min(segment.blocks - at), wanted.clone());
            async move {
                let read = read_window(head, segment, &wanted, (at, count), urgency, without);
                (at + count, read.await)
            }
        });
        let mut windows = stream::iter(windows).buffered(REPAIR_WINDOWS_AHEAD);
        let mut appends: Appends<'a> = FuturesUnordered::new();
        let (mut read_all, mut stuck) = (false, None);
        loop {
            let room = appends.len() <= (REPAIR_APPENDS_MAX - 1) * self.goals.len();
            if read_all && appends.is_empty() {
                break;
            }
            tokio::select! {
                biased;
                Some(appended) = appends.next(), if !appends.is_empty() => self.settle(appended)?,
                window = windows.next(), if room && !read_all => match window {
                    Some((_, Ok(chunk))) => {
                        self.chunks.push_back(chunk);
                        while self.put_together().await? {}
                        self.send(&appends);
                    }
                    Some((end, Err(HeadError::Fetch(error @ FetchError::TooFew { .. })))) => {
                        tracing::debug!(segment = %segment.id, %error, "read record by record");
                        (stuck, read_all) = (Some(end), true);
                    }
                    Some((_, Err(error))) => return Err(error),
                    None => read_all = true,
                },
            }
        }
        self.chunks.clear();
        Ok(stuck)
    }

    /// Takes up how an append ended.
    fn settle(&mut self, (goal, blocks, result): Appended) -> Result<(), HeadError> {
        let goal = &mut self.goals[goal];
        let Some(target) = &goal.target else { return Ok(()) };
        match result {
            Ok(()) => self.part.wrote(u64::from(blocks) * BLOCK_BYTES),
            Err(error) => {
                tracing::debug!(segment = %self.segment.id, disk = %target.disk, %error, "not built");
                self.head.disks.report(target.disk, &error);
                goal.failed.get_or_insert(HeadError::Append);
            }
        }
        if self.goals.iter().all(|goal| goal.failed.is_some()) {
            return Err(HeadError::Append);
        }
        Ok(())
    }

    /// Adds the next record to the batches, if all of it was read.
    async fn put_together(&mut self) -> Result<bool, HeadError> {
        let Some(mut header) = self.header().await? else { return Ok(false) };
        let first = self.next + header.header_blocks;
        let end = self.next + header.blocks();
        if self.chunks.back().is_none_or(|last| last.end() < end) {
            return Ok(false);
        }
        let segment = self.segment;
        for (index, goal) in self.goals.iter().enumerate().filter(|(_, g)| g.failed.is_none()) {
            let overlaps = |chunk: &&Chunk| chunk.at < end && chunk.end() > first;
            let payload: Vec<Bytes> = self
                .chunks
                .iter()
                .filter(overlaps)
                .map(|c| blocks(&c.built[index], c.at, first.max(c.at), end.min(c.end())))
                .collect();
            let salt = Salt::new(self.head.volume, segment.id, segment.scheme, goal.shard);
            header.shard = shard_in_header(segment, goal.shard);
            let raw = payload.iter().flat_map(|piece| raw_crcs(piece));
            header.crcs = (first..).zip(raw).map(|(block, crc)| salt.apply(block, crc)).collect();
            let (data, crcs) = frame(salt, &header, &payload);
            let batch = &mut self.batches[index];
            batch.data.extend(data);
            batch.crcs.extend(crcs);
        }
        self.next = end;
        while self.chunks.front().is_some_and(|first| first.end() <= end) {
            self.chunks.pop_front();
        }
        Ok(true)
    }

    /// The header of the record at `next`; none if it was not read yet.
    async fn header(&self) -> Result<Option<Header>, HeadError> {
        let (at, segment) = (self.next, self.segment);
        let Some(chunk) = self.chunks.front() else { return Ok(None) };
        let (shard, data) = &chunk.read;
        let most = u32::try_from(RECORD_HEADER_BLOCKS_MAX).expect("small");
        let known = blocks(data, chunk.at, at, chunk.end().min(at + most));
        let fits = |h: &Header| {
            h.is_at(self.head.volume, segment.id, shard_in_header(segment, *shard), at)
                && at + h.blocks() <= segment.blocks
        };
        if let Some(header) = Header::decode(&known).ok().filter(fits) {
            return Ok(Some(header));
        }
        // It goes on in a window that was read from another shard.
        let header = self.head.any_header(&self.source()?, segment, usize::MAX, at).await?;
        if at + header.blocks() > segment.blocks {
            return Err(FetchError::Gone(segment.id).into());
        }
        Ok(Some(header))
    }

    /// Appends the batches.
    fn send(&mut self, appends: &Appends<'a>) {
        for (index, goal) in self.goals.iter().enumerate() {
            let Batch { data, crcs } = std::mem::take(&mut self.batches[index]);
            let Some(target) = goal.target.as_ref().filter(|_| !crcs.is_empty()) else { continue };
            if goal.failed.is_some() {
                continue;
            }
            let blocks = u32::try_from(crcs.len()).expect("a batch is small");
            let append = Append {
                authority: self.head.authority,
                segment: self.segment.id,
                block: self.sent,
                data: data.into(),
                crcs: crcs.into(),
            };
            let (client, head) = (target.client.clone(), self.head);
            appends.push(Box::pin(async move {
                let _working = head.disks.budget.work();
                let appended = tokio::time::timeout(CONTROL_PATIENCE, client.append(append));
                (index, blocks, appended.await.unwrap_or(Err(ShardError::Unreachable)))
            }));
        }
        self.sent = self.next;
    }

    /// One record by itself, from whatever holds it.
    async fn step(&mut self) -> Result<(), HeadError> {
        let source = self.source()?;
        let mut blocks = 0;
        for index in 0..self.goals.len() {
            let shard = self.goals[index].shard;
            let bytes = u64::from(REPAIR_WINDOW_BLOCKS) * BLOCK_BYTES;
            let working = self.head.disks.budget.take(bytes, self.urgency).await;
            let record = self.head.rebuilt_record(&source, self.segment, shard, self.next).await;
            drop(working);
            let (data, crcs) = record?;
            blocks = u32::try_from(crcs.len()).expect("a record is small");
            self.batches[index] = Batch { data, crcs };
        }
        self.next += blocks;
        let mut appends: Appends<'a> = FuturesUnordered::new();
        self.send(&appends);
        while let Some(appended) = appends.next().await {
            self.settle(appended)?;
        }
        Ok(())
    }
}

/// What the headers of a shard say that it is: copies are all the same bytes.
fn shard_in_header(segment: &Segment, shard: usize) -> u8 {
    let copies = segment.scheme.data == 1 && segment.kind != SegmentKind::Data;
    if copies { 0 } else { u8::try_from(shard).expect("at most 20 shards") }
}

/// Reads one window and decodes it.
async fn read_window(
    head: &Head,
    segment: &Segment,
    wanted: &[usize],
    (at, count): (u32, u32),
    urgency: Urgency,
    without: u32,
) -> Result<Chunk, HeadError> {
    let shards = u64::from(segment.scheme.data) + wanted.len() as u64;
    let bytes = u64::from(count) * shards * BLOCK_BYTES;
    let _working = head.disks.budget.take(bytes, urgency).await;
    let (mut source, _) = head.source(segment.id).ok_or(FetchError::Gone(segment.id))?;
    source.without |= without;
    let mut findings = Vec::new();
    let start = segment.id.0 + u64::from(at / head.config.repair_window_blocks.max(1));
    let start = usize::try_from(start % 64).expect("small");
    let hear = &mut |finding| findings.push(finding);
    let have = source.gather(&head.disks, start, at, count, hear).await;
    head.note_findings(&findings);
    let mut have = have?;
    add(&head.stats.repair_read_bytes, u64::from(count) * have.len() as u64 * BLOCK_BYTES);
    let mut built = decode(segment, &have, wanted, count);
    if bug(Bug::RepairFromStaleShard) {
        for (shard, built) in wanted.iter().zip(&mut built) {
            let Some(client) = head.disks.client(segment.members[*shard].disk) else { continue };
            let stale = client.read_raw(head.volume, segment.id, at, count);
            if let Ok(Ok(stale)) = tokio::time::timeout(CONTROL_PATIENCE, stale).await {
                *built = stale.data;
            }
        }
    }
    Ok(Chunk { at, count, read: have.swap_remove(0), built })
}

/// The blocks of the wanted shards from those of as many others as are needed.
fn decode(segment: &Segment, have: &[(usize, Bytes)], wanted: &[usize], count: u32) -> Vec<Bytes> {
    if segment.scheme.data == 1 {
        return wanted.iter().map(|_| have[0].1.clone()).collect();
    }
    let lacking: Vec<usize> =
        wanted.iter().copied().filter(|w| have.iter().all(|(shard, _)| shard != w)).collect();
    let room = || AlignedBuf::new(count as usize * BLOCK_SIZE);
    let mut made: Vec<AlignedBuf> = lacking.iter().map(|_| room()).collect();
    {
        let shards: Vec<(usize, &[u8])> = have.iter().map(|(i, data)| (*i, &data[..])).collect();
        let mut out: Vec<&mut [u8]> = made.iter_mut().map(|buf| &mut buf[..]).collect();
        stripe::rebuild_all(segment.scheme, &shards, &lacking, &mut out);
    }
    let mut made = made.into_iter();
    let mut built = Vec::with_capacity(wanted.len());
    for shard in wanted {
        let read = have.iter().find(|(index, _)| index == shard).map(|(_, data)| data.clone());
        let data = read.or_else(|| made.next().map(AlignedBuf::freeze));
        built.push(data.expect("what was not read was made"));
    }
    built
}
