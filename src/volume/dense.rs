//! Data segments: payload in full stripes, written by all shards at once.
//!
//! An append of `n` blocks (a multiple of `k`) lays block `j` of the payload on data shard
//! `j / (n / k)`: each shard gets a contiguous run behind a record header of its own, and a read of
//! a run touches few shards. References to the data are logged only after the append is durable on
//! all `k + m` shards and every earlier append to the segment is.
//!
//! The scheme is that of the payload: the pool's, or a narrower one where too few domains are left
//! ([`super::narrow`]).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::Notify;

use super::gc::Pass;
use super::head::{Head, HeadError, add, table_entry};
use crate::buffer::AlignedBuf;
use crate::id::{BLOCK_SIZE, DiskId, Lsn};
use crate::planted::{Bug, bug};
use crate::segment::BlockAddr;
use crate::segment::checksum::{Salt, raw_crcs};
use crate::segment::open::{OpenError, OpenRequest, OpenSegment, frame};
use crate::segment::record::{Entry, Header, header_blocks};
use crate::segment::stripe;
use crate::shard::{Scheme, SegmentKind, ShardError, SlotClass};

/// What a data segment is filled with: what dies together lies together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    /// Large writes of clients.
    Fresh = 0,
    /// What garbage collection moves out of the log.
    Moved = 1,
    /// What it moves out of data segments: that has lived for long, and will.
    Settled = 2,
}

/// The open data segments of a head, one for each stream. The slots of those that garbage collection
/// fills are not for clients.
#[derive(Default)]
pub(super) struct Dense {
    lanes: [Lane; 3],
}

#[derive(Default)]
struct Lane {
    open: RefCell<Option<Rc<DataSegment>>>,
    /// Opened ahead, to be filled next, the last one first.
    spare: RefCell<Vec<Rc<DataSegment>>>,
    opening: tokio::sync::Mutex<()>,
}

impl Dense {
    fn lane(&self, stream: Stream) -> &Lane {
        &self.lanes[stream as usize]
    }

    /// Takes out the open segments that `which` says.
    fn take_if(&self, which: impl Fn(&DataSegment) -> bool) -> Vec<Rc<DataSegment>> {
        let mut taken = Vec::new();
        for lane in &self.lanes {
            taken.extend(lane.open.borrow_mut().take_if(|data| which(data)));
            taken.extend(lane.spare.borrow_mut().extract_if(.., |data| which(data)));
        }
        taken
    }
}

/// A data segment that takes appends.
struct DataSegment {
    segment: OpenSegment,
    /// Ends of appends that are durable but follow one that is not.
    finished: RefCell<BTreeMap<u32, u32>>,
    /// Everything below is durable on all shards.
    committed: Cell<u32>,
    failed: Cell<bool>,
    changed: Notify,
    /// Whether a record that tells of the segment was acknowledged.
    announced: Rc<Cell<bool>>,
}

impl DataSegment {
    /// Blocks of a shard that were not given out yet.
    fn room(&self) -> u32 {
        self.segment.shard_blocks - self.segment.next.get()
    }

    /// Notes that `start .. end` is durable on all shards. Once an append has failed the
    /// committed length is final, because the segment is being sealed there.
    fn finish(&self, start: u32, end: u32) {
        if self.failed.get() {
            return;
        }
        let mut finished = self.finished.borrow_mut();
        finished.insert(start, end);
        while let Some(end) = finished.remove(&self.committed.get()) {
            self.committed.set(end);
        }
        self.changed.notify_waiters();
    }

    /// Waits until everything below `end` is committed; false if the segment failed before.
    async fn wait(&self, end: u32) -> bool {
        loop {
            let changed = self.changed.notified();
            if self.committed.get() >= end {
                return true;
            }
            if self.failed.get() {
                return false;
            }
            changed.await;
        }
    }
}

/// Data to be written to a data segment: logical runs and their content.
pub(super) struct Payload {
    /// Scheme of the segment that it is for.
    pub(super) scheme: Scheme,
    /// (first logical block, blocks), in the order of the content.
    pub(super) runs: Vec<(u64, u32)>,
    /// The content: a multiple of `k` blocks.
    pub(super) data: Vec<Bytes>,
    /// Raw CRC of each block.
    pub(super) crcs: Vec<u32>,
}

/// Where the blocks of a payload went: runs of (index of the first block, blocks, place).
pub(super) type Placed = Vec<(u32, u32, BlockAddr)>;

impl Head {
    /// Writes a payload to the open data segment, or to new ones until it is durable on all
    /// shards. The segment is pinned once per run of the answer; the entries that refer to it
    /// release that when they are applied ([`super::head::State::unpin`]).
    ///
    /// # Errors
    /// No segment can be opened.
    pub(super) async fn write_dense(
        self: &Rc<Self>,
        payload: Rc<Payload>,
        class: SlotClass,
        stream: Stream,
    ) -> Result<(Placed, Vec<Entry>, Rc<Cell<bool>>), HeadError> {
        loop {
            let blocks = u32::try_from(payload.crcs.len()).expect("bounded by its callers");
            let runs = u32::from(payload.scheme.data);
            let per_shard = blocks / runs;
            let need = header_blocks(payload.runs.len(), per_shard as usize) + per_shard;
            let data = self.data_segment(need, (class, stream), payload.scheme).await?;
            let start = data.segment.reserve(need).expect("room was checked without a pause");
            if let Some(entry) = self.state.borrow_mut().table.segments.get_mut(&data.segment.id) {
                entry.pins += runs;
            }
            // A task of its own: whoever gives the request up must not leave a hole in the
            // segment that everything after it waits for.
            let (head, segment, content) = (self.clone(), data.clone(), payload.clone());
            let append = tokio::task::spawn_local(async move {
                head.append_dense(&segment, start, need, &content).await
            });
            if append.await.unwrap_or(false) {
                let (placed, entries) = Self::placed(&data, start + need - per_shard, per_shard);
                return Ok((placed, entries, data.announced.clone()));
            }
            if let Some(entry) = self.state.borrow_mut().table.segments.get_mut(&data.segment.id) {
                entry.pins = entry.pins.saturating_sub(runs);
            }
            if let Some(why) = self.stopped() {
                return Err(HeadError::Stopped(why));
            }
        }
    }

    /// The runs of an append whose payload starts at `block` of each shard, and the entries that
    /// make the segment known to the log.
    fn placed(data: &DataSegment, block: u32, per_shard: u32) -> (Placed, Vec<Entry>) {
        let segment = &data.segment;
        let runs = (0..u32::from(segment.scheme.data))
            .map(|shard| {
                let place = shard * segment.shard_blocks + block;
                (shard * per_shard, per_shard, BlockAddr { segment: segment.id, block: place })
            })
            .collect();
        let mut entries = Vec::new();
        if !data.announced.get() {
            entries.push(Entry::Opened {
                segment: segment.id,
                data: segment.scheme.data,
                parity: segment.scheme.parity,
                shard_blocks: segment.shard_blocks,
                creation: segment.creation,
            });
            for (index, shard) in (0u8..).zip(&segment.shards) {
                entries.push(Entry::Member { index, disk: shard.disk });
            }
        }
        (runs, entries)
    }

    /// The open data segment if it is of this scheme and has `need` blocks left, or a new one.
    async fn data_segment(
        self: &Rc<Self>,
        need: u32,
        (class, stream): (SlotClass, Stream),
        scheme: Scheme,
    ) -> Result<Rc<DataSegment>, HeadError> {
        let fits = |data: &Rc<DataSegment>| {
            !data.failed.get() && data.segment.scheme == scheme && need <= data.room()
        };
        let lane = self.dense.lane(stream);
        let current = || lane.open.borrow().clone();
        if let Some(data) = current().filter(fits) {
            return Ok(data);
        }
        let _opening = lane.opening.lock().await;
        if let Some(data) = current().filter(fits) {
            return Ok(data);
        }
        if class == SlotClass::Client && self.stripes_would_be_slow(scheme) {
            // The log takes it as copies on the others.
            let (have, need) = (self.disks.fast_domains(), scheme.width());
            return Err(OpenError::TooFewDomains { have, need }.into());
        }
        let old = lane.open.borrow_mut().take();
        if let Some(old) = old {
            self.close_dense(old);
        }
        let next = || lane.spare.borrow_mut().pop();
        let mut spare = next();
        while let Some(bent) = spare.take_if(|spare| spare.segment.scheme != scheme) {
            self.close_dense(bent);
            spare = next();
        }
        let data = match spare {
            Some(spare) => spare,
            None => self.open_dense(class, scheme, |_| true).await?,
        };
        *lane.open.borrow_mut() = Some(data.clone());
        if fits(&data) { Ok(data) } else { Err(HeadError::TooLarge) }
    }

    /// Whether a stripe needs a slow disk, while a record of the log does not.
    fn stripes_would_be_slow(&self, scheme: Scheme) -> bool {
        let fast = self.disks.fast_domains();
        !self.disks.watch().slow().is_empty()
            && fast < scheme.width()
            && fast >= self.pool.log_scheme().width()
    }

    /// Opens data segments for a pass of garbage collection ahead, on disks that are
    /// admitted: `count`, or as many as there is room for. Tells the disks of each, in the order in
    /// which they are filled.
    ///
    /// # Errors
    /// They cannot be opened for other reasons.
    pub(super) async fn obtain_dense(
        self: &Rc<Self>,
        count: usize,
        pass: Pass,
        admitted: impl Fn(DiskId) -> bool,
    ) -> Result<Vec<Vec<DiskId>>, HeadError> {
        let lane = self.dense.lane(pass.stream);
        let mut disks = Vec::new();
        for _ in 0..count {
            match self.open_dense(pass.class, pass.scheme, &admitted).await {
                Ok(data) => {
                    disks.push(data.segment.shards.iter().map(|shard| shard.disk).collect());
                    lane.spare.borrow_mut().insert(0, data);
                }
                Err(HeadError::Open(OpenError::NoSpace)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(disks)
    }

    /// Closes the data segments that were opened ahead and are not needed.
    pub(super) fn close_spares(self: &Rc<Self>) {
        for lane in &self.dense.lanes {
            for spare in lane.spare.take() {
                self.close_dense(spare);
            }
        }
    }

    /// Blocks of a shard that are left in the data segment that a pass fills, if it is of its scheme.
    pub(super) fn gc_room(&self, pass: Pass) -> u32 {
        let open = self.dense.lane(pass.stream).open.borrow();
        let usable =
            |data: &&Rc<DataSegment>| !data.failed.get() && data.segment.scheme == pass.scheme;
        open.as_ref().filter(usable).map_or(0, |data| data.room())
    }

    async fn open_dense(
        self: &Rc<Self>,
        class: SlotClass,
        scheme: Scheme,
        admitted: impl Fn(DiskId) -> bool,
    ) -> Result<Rc<DataSegment>, HeadError> {
        let allowed: BTreeSet<_> =
            self.disks.ids().into_iter().filter(|&disk| admitted(disk)).collect();
        let request = OpenRequest {
            authority: self.authority,
            kind: SegmentKind::Data,
            scheme,
            class,
            allowed: &|disk| allowed.contains(&disk),
            first: &|_| true,
            least: self.dense_least(scheme),
        };
        let segment = match self.open_segment(request).await {
            Ok(segment) => segment,
            Err(OpenError::Fenced) => {
                self.stop("fenced while opening a data segment");
                return Err(OpenError::Fenced.into());
            }
            Err(error) => return Err(error.into()),
        };
        self.state.borrow_mut().table.segments.insert(segment.id, table_entry(&segment));
        Ok(Rc::new(DataSegment {
            segment,
            finished: RefCell::default(),
            committed: Cell::new(0),
            failed: Cell::new(false),
            changed: Notify::new(),
            announced: Rc::default(),
        }))
    }

    /// Seals a data segment once the appends under way are done.
    fn close_dense(self: &Rc<Self>, data: Rc<DataSegment>) {
        let head = Rc::downgrade(self);
        tokio::task::spawn_local(async move {
            if !data.failed.get() {
                data.wait(data.segment.next.get()).await;
            }
            let blocks = data.committed.get();
            let bad = data.segment.seal(blocks).await;
            let Some(head) = head.upgrade() else { return };
            if let Some(entry) = head.state.borrow_mut().table.segments.get_mut(&data.segment.id) {
                entry.sealed = true;
                entry.blocks = blocks;
                entry.missing |= bad;
                if entry.missing != 0 {
                    head.repair_wanted.notify_one();
                }
            }
        });
    }

    /// Seals the open data segments.
    pub(super) fn close_open_dense(self: &Rc<Self>) {
        for open in self.dense.take_if(|_| true) {
            self.close_dense(open);
        }
    }

    /// Seals the open data segment of a stream.
    pub(super) fn leave_stream(self: &Rc<Self>, stream: Stream) {
        if let Some(open) = self.dense.lane(stream).open.take() {
            self.close_dense(open);
        }
    }

    /// Seals the open data segments that are of another scheme.
    pub(super) fn leave_bent(self: &Rc<Self>, scheme: Scheme) {
        for open in self.dense.take_if(|data| data.segment.scheme != scheme) {
            self.close_dense(open);
        }
    }

    /// Seals the open data segments that have fewer copies than so many domains could hold.
    pub(super) fn leave_reduced(self: &Rc<Self>, domains: usize) {
        let reduced = |data: &DataSegment| {
            data.segment.shards.len() < data.segment.scheme.width().min(domains)
        };
        for open in self.dense.take_if(reduced) {
            self.close_dense(open);
        }
    }

    /// Seals the open data segments that have a shard on this disk.
    pub(super) fn leave_dense(self: &Rc<Self>, disk: DiskId) {
        let on_disk = |data: &DataSegment| data.segment.shards.iter().any(|s| s.disk == disk);
        for open in self.dense.take_if(on_disk) {
            self.close_dense(open);
        }
    }

    /// Appends a payload to all shards; true once it and all before it are durable on each.
    async fn append_dense(
        self: &Rc<Self>,
        data: &Rc<DataSegment>,
        start: u32,
        need: u32,
        payload: &Payload,
    ) -> bool {
        let mut appends = FuturesUnordered::new();
        for (shard, (pieces, crcs)) in self.stripes(data, start, payload).into_iter().enumerate() {
            let append = data.segment.append(shard, start, pieces.into(), crcs.into());
            appends.push(async move { (shard, append.await) });
        }
        let mut missing = (1u32 << data.segment.shards.len()) - 1;
        let mut ok = true;
        while missing != 0 && ok {
            // Once some have answered, the others must not be far behind.
            let first = missing.count_ones() as usize == data.segment.shards.len();
            let next = if first {
                appends.next().await
            } else {
                tokio::time::timeout(self.config.straggler, appends.next()).await.unwrap_or(None)
            };
            match next {
                Some((shard, Ok(()))) => missing &= !(1 << shard),
                Some((_, Err(ShardError::Fenced(epoch)))) => {
                    self.stop(&format!("fenced by epoch {epoch}"));
                    ok = false;
                }
                Some((shard, Err(error))) => {
                    self.disks.report(data.segment.shards[shard].disk, &error);
                    ok = false;
                }
                None => {
                    for (shard, member) in data.segment.shards.iter().enumerate() {
                        if missing >> shard & 1 == 1 {
                            self.disks.report(member.disk, &ShardError::Unreachable);
                        }
                    }
                    ok = false;
                }
            }
        }
        if ok {
            data.finish(start, start + need);
            ok = data.wait(start + need).await;
        }
        if ok {
            add(&self.stats.appended_blocks, u64::from(need) * u64::from(payload.scheme.data));
            let mut state = self.state.borrow_mut();
            if let Some(entry) = state.table.segments.get_mut(&data.segment.id) {
                entry.blocks = entry.blocks.max(start + need);
            }
        } else if !data.failed.replace(true) {
            add(&self.stats.failovers, 1);
            data.changed.notify_waiters();
            drop(self.dense.take_if(|open| std::ptr::eq(open, &raw const **data)));
            self.close_dense(data.clone());
        }
        ok
    }

    /// What each shard that was created gets: pieces and salted CRCs, header included.
    fn stripes(
        &self,
        data: &DataSegment,
        start: u32,
        payload: &Payload,
    ) -> Vec<(Vec<Bytes>, Vec<u32>)> {
        let segment = &data.segment;
        let k = usize::from(segment.scheme.data);
        let per_shard = payload.crcs.len() / k;
        let content = contiguous(&payload.data);
        let bytes = per_shard * BLOCK_SIZE;
        let shards: Vec<Bytes> =
            (0..k).map(|i| content.slice(i * bytes..(i + 1) * bytes)).collect();
        let mut parity: Vec<AlignedBuf> =
            (0..segment.scheme.parity).map(|_| AlignedBuf::new(bytes)).collect();
        {
            let mut inputs: Vec<&[u8]> = shards.iter().map(|s| &s[..]).collect();
            if bug(Bug::ParityOfOldStripe) {
                inputs.rotate_left(1);
            }
            let mut outputs: Vec<&mut [u8]> = parity.iter_mut().map(|p| &mut p[..]).collect();
            stripe::encode(segment.scheme, &inputs, &mut outputs);
        }
        let parity: Vec<Bytes> = parity.into_iter().map(AlignedBuf::freeze).collect();
        let entries: Vec<Entry> =
            payload.runs.iter().map(|&(lba, blocks)| Entry::Write { lba, blocks }).collect();
        let blocks = u32::try_from(per_shard).expect("bounded by the size of a record");
        let head_blocks = header_blocks(entries.len(), per_shard);
        let checkpoint = self.state.borrow().checkpoint_place();
        shards
            .into_iter()
            .chain(parity)
            .take(segment.shards.len())
            .enumerate()
            .map(|(index, piece)| {
                let salt: Salt = segment.salt(index);
                let first = start + head_blocks;
                let raw: Vec<u32> = match payload.crcs.get(index * per_shard..) {
                    Some(crcs) if index < k => crcs[..per_shard].to_vec(),
                    _ => raw_crcs(&piece).collect(),
                };
                let header = Header {
                    kind: SegmentKind::Data,
                    shard: u8::try_from(index).expect("at most 20 shards"),
                    header_blocks: head_blocks,
                    payload_blocks: blocks,
                    block: start,
                    volume: self.volume,
                    segment: segment.id,
                    epoch: self.authority.epoch,
                    head: self.authority.head,
                    lsn: Lsn(0),
                    acked: Lsn(0),
                    checkpoint,
                    entries: entries.clone(),
                    crcs: (first..).zip(raw).map(|(b, raw)| salt.apply(b, raw)).collect(),
                };
                frame(salt, &header, &[piece])
            })
            .collect()
    }
}

/// The pieces in one; copied only where they are several.
fn contiguous(pieces: &[Bytes]) -> Bytes {
    if let [one] = pieces {
        return one.clone();
    }
    let mut all = AlignedBuf::new(pieces.iter().map(Bytes::len).sum());
    let mut at = 0;
    for piece in pieces {
        all[at..at + piece.len()].copy_from_slice(piece);
        at += piece.len();
    }
    all.freeze()
}
