//! A volume as exports see it: byte ranges of any alignment in, blocks out.
//!
//! Whole blocks go to the log (or, in large writes, to a data segment). Parts of blocks are merged
//! with the newest content of their block, in flight included: a *chain* per block holds that
//! content while such writes are under way, and every whole-block write to the block updates it.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::dense::{Payload, Stream};
use super::head::{Chain, Head, HeadError, Op, add};
use super::index::{lookup, push};
use super::overlay::{Extent, Overlay, Target};
use super::space::TRIES;
use crate::buffer::{AlignedBuf, is_aligned};
use crate::export::{BlockTarget, LocalFuture, MapExtent, TargetError};
use crate::id::{BLOCK_BYTES, BLOCK_SIZE};
use crate::segment::checksum::raw_crcs;
use crate::segment::fetch::FetchError;
use crate::segment::open::OpenError;
use crate::segment::record::Entry;
use crate::shard::activity::Request;
use crate::shard::{Scheme, SlotClass};

/// Blocks of one operation of the log, at most: several fit into a record.
const OP_BLOCKS_MAX: usize = 128;
/// Blocks of one append to a data segment, per shard, at most.
const DENSE_SHARD_BLOCKS_MAX: usize = 256;
/// A trim of at most so many blocks is looked up first, because most change nothing.
const TRIM_LOOKUP_BLOCKS: u64 = 1 << 18;
/// How often a place is looked up again because its content was moved meanwhile.
const LOOKUPS_MAX: u32 = 100;
/// Pause until disks that did not answer are asked again.
const SILENCE_PAUSE: Duration = Duration::from_millis(100);
/// Pause between two look-ups, after the first few.
const LOOKUP_PAUSE: Duration = Duration::from_millis(5);

impl From<HeadError> for TargetError {
    fn from(error: HeadError) -> Self {
        match error {
            HeadError::Open(OpenError::NoSpace) => Self::NoSpace,
            HeadError::Stopped(_) | HeadError::Open(OpenError::Fenced) => Self::Stopped,
            other => Self::Io(other.to_string()),
        }
    }
}

impl Head {
    /// What `lba .. lba + len` maps to, in acknowledged state: extents in order, without gaps.
    /// Pages that were freed meanwhile are looked up again in the newest index.
    pub(super) async fn resolve(&self, lba: u64, len: u64) -> Result<Vec<Extent>, HeadError> {
        self.look_again(async || self.resolve_once(lba, len).await).await
    }

    /// Runs `read` again, a bounded number of times, when pages or blocks were moved away from
    /// under it: it looks up where they lie now.
    pub(super) async fn look_again<T>(
        &self,
        read: impl AsyncFn() -> Result<T, HeadError>,
    ) -> Result<T, HeadError> {
        for tries in 0..LOOKUPS_MAX {
            match read().await {
                Err(HeadError::Fetch(FetchError::Gone(_))) if tries > 3 => {
                    tokio::time::sleep(LOOKUP_PAUSE).await;
                }
                Err(HeadError::Fetch(FetchError::Gone(_))) => {}
                other => return other,
            }
        }
        read().await
    }

    async fn resolve_once(&self, lba: u64, len: u64) -> Result<Vec<Extent>, HeadError> {
        let mut found: Vec<Extent> = Vec::new();
        let mut gaps = Vec::new();
        let tree = {
            let state = self.state.borrow();
            let empty = Overlay::default();
            let frozen = state.frozen.as_deref().unwrap_or(&empty);
            let mut unmapped = Vec::new();
            state.overlay.split(lba, len, |e| found.push(e), |at, len| unmapped.push((at, len)));
            for (at, len) in unmapped {
                frozen.split(at, len, |e| found.push(e), |at, len| gaps.push((at, len)));
            }
            state.tree
        };
        for (at, len) in gaps {
            found.extend(lookup(self, tree, at, len).await?);
        }
        found.sort_unstable_by_key(|e| e.lba);
        let mut out = Vec::with_capacity(found.len());
        for extent in found {
            push(&mut out, extent);
        }
        Ok(out)
    }

    /// Reads whole blocks.
    pub(super) async fn read_blocks(&self, lba: u64, len: u64) -> Result<Vec<Bytes>, HeadError> {
        self.look_again(async || self.read_blocks_once(lba, len).await).await
    }

    async fn read_blocks_once(&self, lba: u64, len: u64) -> Result<Vec<Bytes>, HeadError> {
        let mut runs = Vec::new();
        for extent in self.resolve_once(lba, len).await? {
            let Target::Data(addr) = extent.target else {
                runs.push((None, extent.len));
                continue;
            };
            let shard_blocks = self
                .source(addr.segment)
                .map(|(_, shard_blocks)| u64::from(shard_blocks))
                .ok_or(FetchError::Gone(addr.segment))?;
            let mut at = 0;
            while at < extent.len {
                let here = addr.plus(u32::try_from(at).expect("within one segment"));
                let left = shard_blocks - u64::from(here.block) % shard_blocks;
                let count = left.min(extent.len - at);
                runs.push((Some(here), count));
                at += count;
            }
        }
        if let [(Some(addr), count)] = runs[..] {
            let count = u32::try_from(count).expect("within one shard");
            return Ok(vec![self.fetch(addr, count).await?]);
        }
        let reads = runs.into_iter().map(|(addr, count)| async move {
            if let Some(addr) = addr {
                self.fetch(addr, u32::try_from(count).expect("within one shard")).await
            } else {
                let bytes = usize::try_from(count * BLOCK_BYTES).expect("a request's size");
                Ok(AlignedBuf::zeroed(bytes).freeze())
            }
        });
        futures_util::future::try_join_all(reads).await
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<(), TargetError> {
        let end = offset.checked_add(len).ok_or(TargetError::OutOfRange)?;
        if len == 0 || end > self.size_bytes() {
            return Err(TargetError::OutOfRange);
        }
        if self.takes_requests() { Ok(()) } else { Err(TargetError::Stopped) }
    }

    /// Reads whole blocks for a client. While too few disks answer it waits, as long as requests do:
    /// a disk that is slow to answer is not an error yet.
    async fn read_patiently(&self, lba: u64, len: u64) -> Result<Vec<Bytes>, TargetError> {
        let since = Instant::now();
        loop {
            match self.read_blocks(lba, len).await {
                Err(HeadError::Fetch(FetchError::TooFew { silent: true, .. }))
                    if since.elapsed() < self.config.io_timeout && self.takes_requests() => {}
                other => return Ok(other?),
            }
            tokio::time::sleep(SILENCE_PAUSE).await;
            self.ensure_lease().await?;
        }
    }

    async fn read_bytes(&self, offset: u64, len: usize) -> Result<Vec<Bytes>, TargetError> {
        self.check_range(offset, len as u64)?;
        self.ensure_lease().await?;
        let lba = offset / BLOCK_BYTES;
        let end = (offset + len as u64).div_ceil(BLOCK_BYTES);
        let mut skip = usize::try_from(offset % BLOCK_BYTES).expect("below a block");
        let mut left = len;
        let pieces = self.read_patiently(lba, end - lba).await?;
        let mut out = Vec::with_capacity(pieces.len());
        for piece in pieces {
            let take = (piece.len() - skip).min(left);
            out.push(piece.slice(skip..skip + take));
            left -= take;
            skip = 0;
        }
        Ok(out)
    }

    /// Waits until there is room for `bytes` more in the queue of the log.
    async fn admit(&self) -> Result<(), TargetError> {
        loop {
            let applied = self.applied.notified();
            {
                let state = self.state.borrow();
                if state.stopped.is_some() {
                    return Err(TargetError::Stopped);
                }
                if state.pending_bytes < self.config.pending_bytes_max {
                    return Ok(());
                }
            }
            applied.await;
        }
    }

    /// Queues an operation; the receiver resolves when its record is durable.
    fn submit(
        &self,
        entries: Vec<Entry>,
        payload: Vec<Bytes>,
        crcs: Vec<u32>,
        class: SlotClass,
    ) -> oneshot::Receiver<Result<(), TargetError>> {
        let (done, receiver) = oneshot::channel();
        if self.is_beyond(&entries) {
            // The volume shrank while the request was under way.
            self.state.borrow_mut().unpin(&entries);
            drop(done.send(Err(TargetError::OutOfRange)));
            return receiver;
        }
        self.update_chains(&entries, &payload);
        self.enqueue(Op { entries, payload, crcs, class, generation: 0, done: Some(done) });
        receiver
    }

    /// Whether some of this lies beyond the end of the volume.
    fn is_beyond(&self, entries: &[Entry]) -> bool {
        let end = self.size_bytes().div_ceil(BLOCK_BYTES);
        entries.iter().any(|entry| match *entry {
            Entry::Write { lba, blocks } | Entry::Place { lba, blocks, .. } => {
                lba + u64::from(blocks) > end
            }
            Entry::Zero { lba, blocks, .. } => lba + blocks > end,
            _ => false,
        })
    }

    /// Tells the chains of the blocks that these entries overwrite.
    pub(super) fn update_chains(&self, entries: &[Entry], payload: &[Bytes]) {
        let mut state = self.state.borrow_mut();
        if state.chains.is_empty() {
            return;
        }
        let mut piece = payload.iter();
        for entry in entries {
            match *entry {
                Entry::Write { lba, blocks } => {
                    let data = piece.next().expect("a piece per write");
                    for (&at, chain) in state.chains.range_mut(lba..lba + u64::from(blocks)) {
                        let from = usize::try_from(at - lba).expect("in memory") * BLOCK_SIZE;
                        chain.content = Some(data.slice(from..from + BLOCK_SIZE));
                    }
                }
                Entry::Zero { lba, blocks, .. } => {
                    for (_, chain) in state.chains.range_mut(lba..lba + blocks) {
                        chain.content = Some(AlignedBuf::zeroed(BLOCK_SIZE).freeze());
                    }
                }
                _ => {}
            }
        }
    }

    /// Overwrites `from .. from + patch.len()` of one block.
    async fn write_part(&self, lba: u64, from: usize, patch: &[u8]) -> Result<(), TargetError> {
        self.admit().await?;
        self.admit_write(1).await?;
        self.state.borrow_mut().chains.entry(lba).or_default().users += 1;
        let _user = ChainUser { head: self, lba };
        for _ in 1..TRIES {
            match self.write_part_chained(lba, from, patch).await {
                Err(TargetError::NoSpace) => self.reclaim().await?,
                other => return other,
            }
        }
        self.write_part_chained(lba, from, patch).await
    }

    async fn write_part_chained(
        &self,
        lba: u64,
        from: usize,
        patch: &[u8],
    ) -> Result<(), TargetError> {
        let known = |chain: Option<&Chain>| chain.and_then(|c| c.content.clone());
        let newest = known(self.state.borrow().chains.get(&lba));
        let base = if let Some(content) = newest {
            content
        } else {
            // Everything queued before must be applied before the committed content is read;
            // whatever is queued from now on updates the chain.
            self.barrier(SlotClass::Client).await?;
            self.ensure_lease().await?;
            let committed = self.read_blocks(lba, 1).await?.remove(0);
            known(self.state.borrow().chains.get(&lba)).unwrap_or(committed)
        };
        let mut block = AlignedBuf::copy_of(&base);
        block[from..from + patch.len()].copy_from_slice(patch);
        let block = block.freeze();
        let crcs = raw_crcs(&block).collect();
        let entry = Entry::Write { lba, blocks: 1 };
        wait(self.submit(vec![entry], vec![block], crcs, SlotClass::Client)).await
    }

    /// Returns when everything queued so far is applied.
    pub(super) async fn barrier(&self, class: SlotClass) -> Result<(), TargetError> {
        let idle = {
            let state = self.state.borrow();
            state.pending.is_empty() && state.queue.is_empty() && state.flights.is_empty()
        };
        if idle {
            return Ok(());
        }
        let nothing =
            Op { entries: vec![], payload: vec![], crcs: vec![], class, generation: 0, done: None };
        let (done, receiver) = oneshot::channel();
        self.enqueue(Op { done: Some(done), ..nothing });
        wait(receiver).await
    }

    /// Writes whole blocks.
    async fn write_blocks(self: &Rc<Self>, lba: u64, data: Bytes) -> Result<(), TargetError> {
        let data = if is_aligned(&data) { data } else { AlignedBuf::copy_of(&data).freeze() };
        let scheme = self.dense_scheme();
        let k = usize::from(scheme.data);
        let total = data.len() / BLOCK_SIZE;
        add(&self.stats.client_blocks, total as u64);
        if k == 1 || total < self.config.large_write_blocks.max(2 * k) {
            return self.write_to_log(lba, &data).await;
        }
        let dense = total / k * k;
        let mut writes = Vec::new();
        let step = DENSE_SHARD_BLOCKS_MAX.min(self.dense_blocks_max()) * k;
        for at in (0..dense).step_by(step) {
            let blocks = step.min(dense - at);
            let piece = data.slice(at * BLOCK_SIZE..(at + blocks) * BLOCK_SIZE);
            writes.push(self.write_large(lba + at as u64, piece, scheme));
        }
        let rest = data.slice(dense * BLOCK_SIZE..);
        let tail = async {
            if rest.is_empty() {
                return Ok(());
            }
            self.write_to_log(lba + dense as u64, &rest).await
        };
        let (large, tail) = tokio::join!(futures_util::future::join_all(writes), tail);
        large.into_iter().collect::<Result<(), _>>().and(tail)
    }

    /// Blocks of a shard that one append may take where slots are tiny.
    fn dense_blocks_max(&self) -> usize {
        (self.disks.slot_blocks_min() as usize / 4).max(1)
    }

    /// Writes stripes. In a task of its own: whoever gives the request up must not leave shards behind
    /// that no table lists, or a segment that is pinned for ever.
    async fn write_large(
        self: &Rc<Self>,
        lba: u64,
        data: Bytes,
        scheme: Scheme,
    ) -> Result<(), TargetError> {
        let head = self.clone();
        let written =
            tokio::task::spawn_local(async move { head.write_stripes(lba, data, scheme).await });
        written.await.unwrap_or(Err(TargetError::Stopped))
    }

    async fn write_stripes(
        self: &Rc<Self>,
        lba: u64,
        data: Bytes,
        scheme: Scheme,
    ) -> Result<(), TargetError> {
        self.admit().await?;
        let blocks = u32::try_from(data.len() / BLOCK_SIZE).expect("bounded by its caller");
        self.admit_write(self.log_equivalent(blocks, scheme)).await?;
        let crcs = raw_crcs(&data).collect();
        let payload =
            Rc::new(Payload { scheme, runs: vec![(lba, blocks)], data: vec![data.clone()], crcs });
        let written = self.write_dense(payload, SlotClass::Client, Stream::Fresh).await;
        let (placed, mut entries, announced) = match written {
            Ok(written) => written,
            // Without enough domains or room for a stripe, the log still takes the write.
            Err(
                HeadError::TooLarge
                | HeadError::Open(OpenError::TooFewDomains { .. } | OpenError::NoSpace),
            ) => {
                return self.write_to_log(lba, &data).await;
            }
            Err(error) => return Err(error.into()),
        };
        for (from, blocks, addr) in placed {
            entries.push(Entry::Place { lba: lba + u64::from(from), blocks, addr });
        }
        self.pin_entries(&entries, usize::from(scheme.data));
        if self.is_beyond(&entries) {
            self.state.borrow_mut().unpin(&entries);
            return Err(TargetError::OutOfRange);
        }
        // The chains see the content here, where the order of the write is decided.
        self.update_chains(&[Entry::Write { lba, blocks }], std::slice::from_ref(&data));
        match wait(self.submit(entries, vec![], vec![], SlotClass::Client)).await {
            Ok(()) => announced.set(true),
            Err(TargetError::NoSpace) => return self.write_to_log(lba, &data).await,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn write_to_log(&self, lba: u64, data: &Bytes) -> Result<(), TargetError> {
        let limit = OP_BLOCKS_MAX.min(self.log_op_blocks_max()) * BLOCK_SIZE;
        if data.len() <= limit {
            return self.write_op(lba, data.clone()).await;
        }
        let pieces = (0..data.len()).step_by(limit).map(|at| {
            let piece = data.slice(at..data.len().min(at + limit));
            self.write_op(lba + (at / BLOCK_SIZE) as u64, piece)
        });
        let results = futures_util::future::join_all(pieces).await;
        results.into_iter().collect()
    }

    /// Blocks that one operation may have where slots are tiny.
    fn log_op_blocks_max(&self) -> usize {
        let state = self.state.borrow();
        let blocks = state.log.as_ref().map_or(16, |log| log.shard_blocks);
        (blocks as usize / 4).max(1)
    }

    async fn write_op(&self, lba: u64, data: Bytes) -> Result<(), TargetError> {
        let blocks = u32::try_from(data.len() / BLOCK_SIZE).expect("bounded by its caller");
        let crcs: Vec<u32> = raw_crcs(&data).collect();
        let entry = Entry::Write { lba, blocks };
        let mut tries = 0;
        loop {
            self.admit().await?;
            self.admit_write(blocks.into()).await?;
            tries += 1;
            let (entry, data) = (vec![entry], vec![data.clone()]);
            match wait(self.submit(entry, data, crcs.clone(), SlotClass::Client)).await {
                // It was not done, so it may be tried again once there is room.
                Err(TargetError::NoSpace) if tries < TRIES => self.reclaim().await?,
                other => return other,
            }
        }
    }

    async fn write_bytes(self: &Rc<Self>, offset: u64, data: Bytes) -> Result<(), TargetError> {
        self.check_range(offset, data.len() as u64)?;
        if offset.is_multiple_of(BLOCK_BYTES) && data.len().is_multiple_of(BLOCK_SIZE) {
            return self.write_blocks(offset / BLOCK_BYTES, data).await;
        }
        let (lba, head_len, body_len) = split(offset, data.len());
        let head = data.slice(..head_len);
        let body = data.slice(head_len..head_len + body_len);
        let tail = data.slice(head_len + body_len..);
        let body_lba = lba + u64::from(head_len > 0);
        let tail_lba = body_lba + (body_len / BLOCK_SIZE) as u64;
        let from = usize::try_from(offset % BLOCK_BYTES).expect("below a block");
        let (a, b, c) = tokio::join!(
            async {
                if head.is_empty() { Ok(()) } else { self.write_part(lba, from, &head).await }
            },
            async {
                if body.is_empty() { Ok(()) } else { self.write_blocks(body_lba, body).await }
            },
            async {
                if tail.is_empty() { Ok(()) } else { self.write_part(tail_lba, 0, &tail).await }
            },
        );
        a.and(b).and(c)
    }

    async fn zero_bytes(&self, offset: u64, len: u64, unmap: bool) -> Result<(), TargetError> {
        self.check_range(offset, len)?;
        let first = offset.div_ceil(BLOCK_BYTES);
        // The part of a block at the volume's end counts as a whole one.
        let size = self.size_bytes();
        let end_byte =
            if offset + len == size { size.next_multiple_of(BLOCK_BYTES) } else { offset + len };
        let end = end_byte / BLOCK_BYTES;
        if first < end {
            self.zero_blocks(first, end - first, unmap).await?;
        }
        let zeroes = [0; BLOCK_SIZE];
        let from = usize::try_from(offset % BLOCK_BYTES).expect("below a block");
        if first > end {
            // Within one block.
            let part = usize::try_from(len).expect("below a block");
            return self.write_part(offset / BLOCK_BYTES, from, &zeroes[..part]).await;
        }
        if from > 0 {
            self.write_part(offset / BLOCK_BYTES, from, &zeroes[from..]).await?;
        }
        let rest = usize::try_from(end_byte % BLOCK_BYTES).expect("below a block");
        if rest > 0 {
            self.write_part(end, 0, &zeroes[..rest]).await?;
        }
        Ok(())
    }

    async fn zero_blocks(&self, lba: u64, blocks: u64, unmap: bool) -> Result<(), TargetError> {
        self.admit().await?;
        if unmap && blocks <= TRIM_LOOKUP_BLOCKS && self.nothing_queued() {
            self.ensure_lease().await?;
            let mapped = self.resolve(lba, blocks).await?;
            if mapped.iter().all(|e| e.target == Target::Hole) && self.nothing_queued() {
                return Ok(());
            }
        }
        // Zeroes that count as allocated take index pages for good, a trim gives some back.
        let class = if unmap { SlotClass::Trim } else { SlotClass::Client };
        let entry = Entry::Zero { lba, blocks, allocated: !unmap };
        let mut tries = 0;
        loop {
            if !unmap {
                self.admit_write(1).await?;
            }
            tries += 1;
            match wait(self.submit(vec![entry], vec![], vec![], class)).await {
                Err(TargetError::NoSpace) if tries < TRIES => self.reclaim().await?,
                other => return other,
            }
        }
    }

    pub(super) fn nothing_queued(&self) -> bool {
        let state = self.state.borrow();
        state.pending.is_empty() && state.queue.is_empty() && state.flights.is_empty()
    }

    async fn map_range(
        &self,
        offset: u64,
        len: u64,
        max: usize,
    ) -> Result<Vec<MapExtent>, TargetError> {
        self.check_range(offset, len)?;
        self.ensure_lease().await?;
        let mut out: Vec<MapExtent> = Vec::new();
        let end = offset + len;
        let mut at = offset;
        // In steps, so that the description of a large volume takes bounded memory.
        while at < end && out.len() <= max {
            let lba = at / BLOCK_BYTES;
            let blocks = (end.div_ceil(BLOCK_BYTES) - lba).min(TRIM_LOOKUP_BLOCKS);
            for extent in self.resolve(lba, blocks).await? {
                let until = ((extent.lba + extent.len) * BLOCK_BYTES).min(end);
                let allocated = extent.target != Target::Hole;
                match out.last_mut() {
                    Some(last) if last.allocated == allocated => last.len += until - at,
                    _ => out.push(MapExtent { len: until - at, allocated }),
                }
                at = until;
            }
        }
        out.truncate(max);
        Ok(out)
    }
}

/// A write that uses the chain of a block, until it ends or is given up.
struct ChainUser<'a> {
    head: &'a Head,
    lba: u64,
}

impl Drop for ChainUser<'_> {
    fn drop(&mut self) {
        let mut state = self.head.state.borrow_mut();
        if let Some(chain) = state.chains.get_mut(&self.lba) {
            chain.users -= 1;
            if chain.users == 0 {
                state.chains.remove(&self.lba);
            }
        }
    }
}

/// The first block, and how many bytes lie before the first and within the whole blocks.
fn split(offset: u64, len: usize) -> (u64, usize, usize) {
    let into = usize::try_from(offset % BLOCK_BYTES).expect("below a block");
    let head = if into == 0 { 0 } else { (BLOCK_SIZE - into).min(len) };
    (offset / BLOCK_BYTES, head, (len - head) / BLOCK_SIZE * BLOCK_SIZE)
}

pub(super) async fn wait(
    receiver: oneshot::Receiver<Result<(), TargetError>>,
) -> Result<(), TargetError> {
    receiver.await.unwrap_or(Err(TargetError::Stopped))
}

/// A head as the target of exports.
pub struct HeadTarget(pub Rc<Head>);

impl BlockTarget for HeadTarget {
    fn size(&self) -> u64 {
        self.0.size_bytes()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, len: usize) -> LocalFuture<'_, Result<Vec<Bytes>, TargetError>> {
        let busy = self.0.disks.activity.begin(Request::Read(len));
        Box::pin(async move {
            let _busy = busy;
            self.0.read_bytes(offset, len).await
        })
    }
    fn write(&self, offset: u64, data: Bytes) -> LocalFuture<'_, Result<(), TargetError>> {
        let busy = self.0.disks.activity.begin(Request::Write(data.len()));
        Box::pin(async move {
            let _busy = busy;
            self.0.write_bytes(offset, data).await
        })
    }
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> LocalFuture<'_, Result<(), TargetError>> {
        let busy = self.0.disks.activity.begin(Request::Write(0));
        Box::pin(async move {
            let _busy = busy;
            self.0.zero_bytes(offset, len, unmap).await
        })
    }
    fn flush(&self) -> LocalFuture<'_, Result<(), TargetError>> {
        // Whatever was acknowledged is durable on every shard of its segment.
        Box::pin(async {
            match self.0.stopped() {
                Some(_) => Err(TargetError::Stopped),
                None => Ok(()),
            }
        })
    }
    fn map(
        &self,
        offset: u64,
        len: u64,
        max: usize,
    ) -> LocalFuture<'_, Result<Vec<MapExtent>, TargetError>> {
        Box::pin(self.0.map_range(offset, len, max))
    }
}
