//! Walking segments record by record, without trusting any one shard.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::Instant;

use super::head::Head;
use super::index::lookup;
use super::overlay::Target;
use super::segtab::{Segment, ShardRef};
use super::takeover::Listing;
use crate::id::{BLOCK_SIZE, DiskId, Epoch, Lsn, SegmentId, VolumeId};
use crate::limits::{RECORD_HEADER_BLOCKS_MAX, RECORD_PAYLOAD_BLOCKS_MAX};
use crate::planted::{Bug, bug};
use crate::segment::BlockAddr;
use crate::segment::checksum::{Salt, raw_crcs};
use crate::segment::record::{Entry, Header, RecordError};
use crate::shard::disks::Disks;
use crate::shard::{
    Authority, Scheme, SegmentKind, ShardClient, ShardError, ShardInfo, ShardState,
};

/// Blocks read ahead of a walk.
const WINDOW_BLOCKS: u32 = 256;
/// Length bound of a log segment found on the disks: with one data shard, addresses need no stride.
const COPIES_BLOCKS: u32 = 1 << crate::limits::SEGMENT_BLOCK_BITS;
/// Blocks of the largest record.
#[allow(clippy::cast_possible_truncation, reason = "small constants")]
const RECORD_BLOCKS_MAX: u32 = (RECORD_HEADER_BLOCKS_MAX + RECORD_PAYLOAD_BLOCKS_MAX) as u32;
/// How long a raw read or a seal of a recovery may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// A disk that took so long for a raw read is asked after the others from then on.
const SLOW: Duration = Duration::from_millis(100);

/// Unverified blocks of one shard, read ahead.
pub(super) struct Raw {
    client: Option<Rc<dyn ShardClient>>,
    volume: VolumeId,
    segment: SegmentId,
    window: (u32, Bytes),
    /// The disk, if it did not yield what was asked of it.
    unreadable: Option<DiskId>,
    /// Blocks of a slot of the disk: no read ahead goes beyond.
    slot_blocks: u32,
    /// The longest that a read took.
    slowest: Duration,
    disk: DiskId,
    /// The block at which a record of this segment lies that this version does not understand.
    newer: Option<u32>,
}

impl Raw {
    pub(super) fn new(disks: &Disks, volume: VolumeId, segment: SegmentId, disk: DiskId) -> Self {
        Self {
            client: disks.client(disk),
            volume,
            segment,
            window: (0, Bytes::new()),
            unreadable: None,
            slot_blocks: disks.slot_blocks(disk).unwrap_or(0),
            slowest: Duration::ZERO,
            disk,
            newer: None,
        }
    }

    /// `count` blocks from `block`; none if they cannot be read.
    pub(super) async fn blocks(&mut self, block: u32, count: u32) -> Option<Bytes> {
        let (start, data) = &self.window;
        let have = u32::try_from(data.len() / BLOCK_SIZE).ok()?;
        if block < *start || block + count > start + have {
            let Some(client) = self.client.clone() else {
                self.unreadable = Some(self.disk);
                return None;
            };
            // A window may reach into a bad sector: then just what is needed.
            let window = WINDOW_BLOCKS.min(self.slot_blocks.saturating_sub(block));
            let (mut found, mut failed) = (None, false);
            for want in [count.max(window), count] {
                let since = Instant::now();
                let read = client.read_raw(self.volume, self.segment, block, want);
                let reply = tokio::time::timeout(PATIENCE, read).await;
                self.slowest = self.slowest.max(since.elapsed());
                failed = match reply {
                    Ok(Ok(reply)) => {
                        found = Some(reply.data);
                        break;
                    }
                    // The slot ends there, or the disk has no such shard: that is an answer.
                    Ok(Err(
                        ShardError::WrongLength(_) | ShardError::Gone | ShardError::Invalid(_),
                    )) => false,
                    Ok(Err(_)) => true,
                    Err(_) => {
                        failed = true;
                        break;
                    }
                };
            }
            let Some(found) = found else {
                if failed {
                    self.unreadable = Some(self.disk);
                }
                return None;
            };
            self.window = (block, found);
        }
        let from = (block - self.window.0) as usize * BLOCK_SIZE;
        Some(self.window.1.slice(from..from + count as usize * BLOCK_SIZE))
    }

    /// The record header at `block`, if a valid one of this shard lies there.
    pub(super) async fn header(&mut self, block: u32, shard: u8) -> Option<Header> {
        let most = u32::try_from(RECORD_HEADER_BLOCKS_MAX).ok()?;
        let bytes = match self.blocks(block, most).await {
            Some(bytes) => bytes,
            None => self.blocks(block, 1).await?,
        };
        match Header::decode(&bytes) {
            Ok(header) => Some(header).filter(|h| h.is_at(self.volume, self.segment, shard, block)),
            Err(RecordError::Version(_) | RecordError::Entry)
                if Header::claims(&bytes, self.volume, self.segment, block) =>
            {
                self.newer = Some(block);
                None
            }
            Err(_) => None,
        }
    }

    /// The highest LSN that a record of `epoch` from `block` on says was acknowledged. Looks until
    /// no record begins within the size of the largest one.
    async fn acked_beyond(&mut self, mut block: u32, epoch: Epoch) -> Lsn {
        let mut highest = Lsn::default();
        let mut last = block;
        while block - last <= RECORD_BLOCKS_MAX {
            let found = self.header(block, 0).await.filter(|header| header.epoch == epoch);
            if let Some(header) = found {
                highest = highest.max(header.acked);
                block += header.blocks();
                last = block;
            } else if self.unreadable.is_some() || !self.has(block) {
                break;
            } else {
                block += 1;
            }
        }
        highest
    }

    /// Whether a block was read.
    fn has(&self, block: u32) -> bool {
        let (start, data) = &self.window;
        (*start..*start + u32::try_from(data.len() / BLOCK_SIZE).unwrap_or(0)).contains(&block)
    }

    /// Whether the payload of a record is there and matches its checksums.
    async fn payload_ok(&mut self, salt: Salt, header: &Header) -> bool {
        let first = header.block + header.header_blocks;
        if header.payload_blocks == 0 {
            return true;
        }
        match self.blocks(first, header.payload_blocks).await {
            Some(data) => salt.verify(first, &data, &header.crcs).is_none(),
            None => false,
        }
    }
}

/// How late a disk is asked whose slowest read took so long: those that are not slow are alike.
fn lateness(slowest: Duration) -> Duration {
    if slowest < SLOW { Duration::ZERO } else { slowest }
}

/// What a replay found.
#[derive(Debug, Default)]
pub(super) struct Replay {
    /// The last record applied.
    pub(super) end: Lsn,
    /// The highest acknowledged record that any header names.
    pub(super) acked: Lsn,
    /// A segment that ends, says its successor, beyond what could be read.
    pub(super) cut: bool,
    /// Where a record lies that this version does not understand.
    pub(super) newer: Option<(SegmentId, u32)>,
    /// Disks that did not yield all that was asked of them where the log seems to end.
    pub(super) unread: BTreeSet<DiskId>,
    /// Settled lengths: of log segments as walked, of data segments as referred to.
    pub(super) lengths: BTreeMap<SegmentId, u32>,
    /// The longest that a read of each disk took.
    slowest: BTreeMap<DiskId, Duration>,
}

impl Replay {
    /// The disks that hold a segment, in the order to ask them.
    fn raws(&self, head: &Head, id: SegmentId, held: &BTreeMap<DiskId, ShardInfo>) -> Vec<Raw> {
        let raw = |disk: &DiskId| {
            let slowest = self.slowest.get(disk).copied().unwrap_or_default();
            Raw { slowest, ..Raw::new(&head.disks, head.volume, id, *disk) }
        };
        let mut raws: Vec<Raw> = held.keys().map(raw).collect();
        raws.sort_by_key(|raw| lateness(raw.slowest));
        raws
    }

    fn note_slowest(&mut self, raw: &Raw) {
        self.slowest.insert(raw.disk, raw.slowest);
    }
}

/// The members of a log segment that may be read, in the order to try them.
struct Members {
    raws: Vec<Raw>,
    salt: Salt,
}

impl Members {
    /// The record at `block`, whole on at least one member.
    async fn record(&mut self, block: u32, verify: bool) -> Option<Header> {
        // Whoever kept the walk waiting is asked last from now on.
        self.raws.sort_by_key(|raw| lateness(raw.slowest));
        for raw in &mut self.raws {
            raw.unreadable = None;
            let Some(header) = raw.header(block, 0).await else {
                tracing::trace!(segment = %raw.segment, block, "no record on this member");
                continue;
            };
            if !verify || raw.payload_ok(self.salt, &header).await {
                return Some(header);
            }
            tracing::debug!(segment = %raw.segment, block, lsn = %header.lsn, "torn record on this member");
        }
        None
    }

    /// The highest LSN that what lies from `block` on says was acknowledged: a damaged record must
    /// not hide that the log went on behind it.
    async fn acked_beyond(&mut self, block: u32, epoch: Epoch) -> Lsn {
        let mut highest = Lsn::default();
        for raw in &mut self.raws {
            highest = highest.max(raw.acked_beyond(block, epoch).await);
        }
        highest
    }
}

/// The record at `block` of a log or meta segment, header and payload, as it lies on any of these
/// disks, whatever their tables say of it: records carry the checksums of their payload, and what
/// was ever written at a place of a segment is the same on every member.
pub(super) async fn copied_record(
    disks: &Disks,
    volume: VolumeId,
    segment: &Segment,
    members: impl Iterator<Item = DiskId>,
    block: u32,
) -> Option<(Header, Bytes)> {
    let salt = Salt::new(volume, segment.id, segment.scheme, 0);
    for disk in members {
        let mut raw = Raw::new(disks, volume, segment.id, disk);
        let Some(header) = raw.header(block, 0).await else { continue };
        if block + header.blocks() <= segment.blocks && raw.payload_ok(salt, &header).await {
            let first = block + header.header_blocks;
            let payload = match header.payload_blocks {
                0 => Some(Bytes::new()),
                count => raw.blocks(first, count).await,
            };
            if let Some(payload) = payload {
                return Some((header, payload));
            }
        }
    }
    None
}

/// Applies all records of `epoch` after `from`, of LSN `start + 1` and on.
pub(super) async fn replay(
    head: &Head,
    listing: &Listing,
    epoch: Epoch,
    from: (SegmentId, u32),
    start: Lsn,
) -> Replay {
    let mut replay = Replay { end: start, acked: start, ..Replay::default() };
    let logs: Vec<SegmentId> = listing
        .range(if bug(Bug::ReplayOtherEpoch) { SegmentId(0) } else { from.0 }..)
        .filter(|(id, held)| {
            held.iter().any(|(&disk, info)| {
                let shard = ShardRef { disk, creation: info.spec.creation };
                info.spec.kind == SegmentKind::Log
                    && (bug(Bug::ReplayOtherEpoch)
                        || (info.epoch == epoch
                            && !head.state.borrow().table.freed.contains(&(**id, shard))))
            })
        })
        .map(|(id, _)| *id)
        .collect();
    let closed = closures(head, listing, &logs, epoch, &mut replay).await;
    for id in logs {
        let held = &listing[&id];
        let sealed =
            held.values().find(|info| info.state == ShardState::Sealed).map(|info| info.blocks);
        let closure = closed.get(&id).copied();
        let end = closure.or(sealed.filter(|_| !bug(Bug::ReplayOtherEpoch)));
        head.know_log(id, held);
        let begin = if id == from.0 { from.1 } else { 0 };
        let walked =
            walk_log(head, id, held, epoch, (begin, end, closure.is_some()), &mut replay).await;
        tracing::debug!(segment = %id, begin, ?end, walked, end_lsn = %replay.end, "log segment walked");
        replay.lengths.insert(id, walked);
    }
    replay
}

/// What opening records say of how earlier log segments ended.
async fn closures(
    head: &Head,
    listing: &Listing,
    logs: &[SegmentId],
    epoch: Epoch,
    replay: &mut Replay,
) -> BTreeMap<SegmentId, u32> {
    let mut closed = BTreeMap::new();
    for id in logs {
        for mut raw in replay.raws(head, *id, &listing[id]) {
            let header = raw.header(0, 0).await.filter(|h| h.epoch == epoch);
            replay.note_slowest(&raw);
            let Some(header) = header else { continue };
            for entry in &header.entries {
                if let Entry::Closed { segment, blocks, .. } = entry {
                    closed.insert(*segment, *blocks);
                }
            }
            break;
        }
    }
    closed
}

/// Walks one log segment over `bounds` and applies what comes next; gives where it ended.
async fn walk_log(
    head: &Head,
    id: SegmentId,
    held: &BTreeMap<DiskId, ShardInfo>,
    epoch: Epoch,
    bounds: (u32, Option<u32>, bool),
    replay: &mut Replay,
) -> u32 {
    let (begin, end, acknowledged) = bounds;
    let scheme = Scheme { data: 1, parity: 0 };
    let mut members =
        Members { raws: replay.raws(head, id, held), salt: Salt::new(head.volume, id, scheme, 0) };
    let mut at = begin;
    let mut ends = false;
    while end.is_none_or(|end| at < end) {
        // What lies below an end that a later record names was acknowledged; its content is
        // verified when it is read. An end that a shard was sealed at proves less.
        let Some(header) = members.record(at, !acknowledged).await else {
            replay.unread.extend(members.raws.iter().filter_map(|raw| raw.unreadable));
            replay.cut |= acknowledged;
            ends = true;
            break;
        };
        let same = header.epoch == epoch || bug(Bug::ReplayOtherEpoch);
        if header.kind != SegmentKind::Log || !same {
            break;
        }
        replay.acked = replay.acked.max(header.acked);
        if header.lsn != Lsn(0) {
            if header.lsn > replay.end.next() {
                ends = true;
                break;
            }
            if header.lsn == replay.end.next() {
                head.replay_record(id, &header, replay).await;
                replay.end = header.lsn;
            }
        }
        at += header.blocks();
    }
    if ends && !bug(Bug::ReplayOtherEpoch) {
        let beyond = members.acked_beyond(at, epoch).await;
        replay.acked = replay.acked.max(beyond);
        let newer = members.raws.iter().find_map(|raw| raw.newer);
        replay.newer = replay.newer.or(newer.map(|block| (id, block)));
    }
    members.raws.iter().for_each(|raw| replay.note_slowest(raw));
    at
}

impl Head {
    /// Enters a log segment found on the disks into the table.
    fn know_log(&self, id: SegmentId, held: &BTreeMap<DiskId, ShardInfo>) {
        let Some((info, members)) = members_of(held) else { return };
        let mut state = self.state.borrow_mut();
        state.table.segments.entry(id).or_insert_with(|| Segment {
            id,
            kind: SegmentKind::Log,
            scheme: info.spec.scheme,
            epoch: info.epoch,
            members,
            shard_blocks: COPIES_BLOCKS,
            sealed: false,
            blocks: 0,
            missing: 0,
            damaged: 0,
            live: 0,
            recent: 0,
            pins: 0,
        });
        // What a checkpoint of this head does not cover yet binds its log set.
        let write_set = state.table.segments[&id].members.iter().map(|m| m.disk);
        let write_set = write_set.filter(|disk| !disk.is_nil()).collect();
        state.open_sets.insert(id, write_set);
    }

    /// Applies one record of the log.
    async fn replay_record(&self, id: SegmentId, header: &Header, replay: &mut Replay) {
        self.know_opened(header);
        // Moves apply only where the index still points to the old place; and not where the new
        // place is gone: the head did not apply the move either, and freed what held nothing.
        let mut matching: BTreeSet<(u64, BlockAddr)> = BTreeSet::new();
        for entry in &header.entries {
            if let Entry::Move { lba, blocks, from, to } = *entry {
                if !self.state.borrow().table.segments.contains_key(&to.segment) {
                    continue;
                }
                let tree = self.state.borrow().tree;
                let Ok(extents) = lookup(self, tree, lba, blocks.into()).await else { continue };
                for extent in extents {
                    let Target::Data(_) = extent.target else { continue };
                    for i in 0..extent.len {
                        let here = extent.lba + i;
                        let old = from.plus(u32::try_from(here - lba).expect("within the entry"));
                        if extent.target.plus(i) == Target::Data(old) {
                            matching.insert((here, old));
                        }
                    }
                }
            }
        }
        let mut state = self.state.borrow_mut();
        for entry in &header.entries {
            if let Entry::Place { blocks, addr, .. } | Entry::Move { blocks, to: addr, .. } = entry
                && let Some(segment) = state.table.segments.get(&addr.segment)
            {
                let end = addr.block % segment.shard_blocks + blocks;
                let length = replay.lengths.entry(addr.segment).or_default();
                *length = end.max(*length);
            }
        }
        let entries: Vec<Entry> = if bug(Bug::LoseTrimInReplay) {
            let kept = header.entries.iter().filter(|e| !matches!(e, Entry::Zero { .. }));
            kept.copied().collect()
        } else {
            header.entries.clone()
        };
        let payload = header.block + header.header_blocks;
        state.apply(id, payload, &entries, &|lba, old| matching.contains(&(lba, old)));
    }

    /// Enters data segments that a record says were opened.
    fn know_opened(&self, header: &Header) {
        let mut state = self.state.borrow_mut();
        let mut current: Option<SegmentId> = None;
        for entry in &header.entries {
            match *entry {
                Entry::Opened { segment, data, parity, shard_blocks, creation } => {
                    let freed = state
                        .table
                        .freed
                        .iter()
                        .any(|(id, s)| *id == segment && s.creation == creation);
                    let known = state.table.segments.contains_key(&segment);
                    current = (!freed && !known).then_some(segment);
                    if current.is_some() {
                        let nobody = ShardRef { disk: DiskId::default(), creation };
                        let scheme = Scheme { data, parity };
                        state.table.segments.insert(
                            segment,
                            Segment {
                                id: segment,
                                kind: SegmentKind::Data,
                                scheme,
                                epoch: header.epoch,
                                members: vec![nobody; scheme.width()],
                                shard_blocks,
                                sealed: false,
                                blocks: 0,
                                missing: 0,
                                damaged: 0,
                                live: 0,
                                recent: 0,
                                pins: 0,
                            },
                        );
                    }
                }
                Entry::Member { index, disk } => {
                    if let Some(segment) = current.and_then(|id| state.table.segments.get_mut(&id))
                        && let Some(member) = segment.members.get_mut(usize::from(index))
                    {
                        member.disk = disk;
                    }
                }
                _ => current = None,
            }
        }
    }
}

/// The shards of a segment that only its disks know of. A shard that was built anew by the same
/// epoch has a creation of its own; it counts where the first one of its index is gone.
fn members_of(held: &BTreeMap<DiskId, ShardInfo>) -> Option<(&ShardInfo, Vec<ShardRef>)> {
    let mut first: Option<(&ShardInfo, usize)> = None;
    for info in held.values() {
        let same = held.values().filter(|i| i.spec.creation == info.spec.creation).count();
        if first.is_none_or(|(_, most)| same > most) {
            first = Some((info, same));
        }
    }
    let (info, _) = first?;
    let creation = info.spec.creation;
    let mut members: Vec<ShardRef> =
        info.spec.members.iter().map(|&disk| ShardRef { disk, creation }).collect();
    for (&disk, other) in held {
        let there = |member: &ShardRef| {
            held.get(&member.disk).is_some_and(|i| i.spec.creation == member.creation)
        };
        if let Some(member) = members.get_mut(usize::from(other.spec.index))
            && !there(member)
        {
            *member = ShardRef { disk, creation: other.spec.creation };
        }
    }
    Some((info, members))
}

/// How a segment was settled.
pub(super) struct Settled {
    /// Length of its shards.
    pub(super) blocks: u32,
    /// Bit `i`: shard `i` is not there, or was not what was settled.
    pub(super) missing: u32,
}

/// Makes every shard of a segment that holds its first `length` blocks sealed there.
pub(super) async fn settle(
    disks: &Disks,
    authority: Authority,
    segment: &Segment,
    length: u32,
    held: &BTreeMap<DiskId, ShardInfo>,
) -> Settled {
    let info = |member: &ShardRef| {
        held.get(&member.disk).filter(|info| info.spec.creation == member.creation)
    };
    // A shard that the old head sealed tells where: it seals at one length only.
    let sealed_at = segment
        .members
        .iter()
        .filter_map(info)
        .filter(|info| info.state == ShardState::Sealed && info.blocks >= length)
        .map(|info| info.blocks)
        .max();
    let blocks = match (segment.kind, sealed_at) {
        (SegmentKind::Log, _) | (SegmentKind::Meta, None) => length,
        (SegmentKind::Data, None) => whole_records(disks, authority.volume, segment, length).await,
        (_, Some(sealed_at)) => sealed_at,
    };
    tracing::debug!(segment = %segment.id, kind = ?segment.kind, length, blocks, ?held, "settle");
    let mut missing = 0u32;
    let settled = segment.members.iter().enumerate().map(async |(index, member)| {
        let whole = match info(member) {
            None => false,
            Some(info) if info.state == ShardState::Sealed => {
                info.blocks == blocks && !segment.is_damaged(index)
            }
            Some(_) => seal_closed(disks, authority, segment, index, blocks, None).await,
        };
        whole || (info(member).is_some() && bug(Bug::StaleShardAccepted))
    });
    let settled = join_all(settled).await;
    for (index, (member, whole)) in segment.members.iter().zip(settled).enumerate() {
        if !whole {
            tracing::info!(
                volume = %authority.volume, segment = %segment.id, index, disk = %member.disk,
                "a shard is missing or stale",
            );
            missing |= 1 << index;
        }
    }
    // Of copies, where no member holds everything, each is sealed with the checksums of what any
    // of them holds: a block that one has lost is then read from another.
    let nobody = missing.count_ones() as usize == segment.members.len();
    if nobody
        && segment.kind != SegmentKind::Data
        && let Some(truth) = merged(disks, authority.volume, segment, blocks, held).await
    {
        for (index, member) in segment.members.iter().enumerate() {
            if info(member).is_some_and(|i| i.state != ShardState::Sealed) {
                seal_closed(disks, authority, segment, index, blocks, Some(&truth)).await;
            }
        }
    }
    Settled { blocks, missing }
}

/// The end of the record that reaches to block `length` of a data segment, or beyond: the log may
/// refer to the first blocks of a record only, because the others were overwritten before they
/// were moved. What is referred to at all was durable as a whole.
async fn whole_records(disks: &Disks, volume: VolumeId, segment: &Segment, length: u32) -> u32 {
    for (shard, member) in (0..).zip(&segment.members) {
        let mut raw = Raw::new(disks, volume, segment.id, member.disk);
        let mut at = 0;
        while at < length {
            let Some(header) = raw.header(at, shard).await else { break };
            at += header.blocks();
        }
        if at >= length {
            return at;
        }
    }
    length
}

/// Seals a closed shard if it holds the first `blocks` blocks intact.
pub(super) async fn seal_closed(
    disks: &Disks,
    authority: Authority,
    segment: &Segment,
    index: usize,
    blocks: u32,
    truth: Option<&[u32]>,
) -> bool {
    let disk = segment.members[index].disk;
    let Some(client) = disks.client(disk) else { return false };
    let own = collect(disks, authority.volume, segment, index, blocks).await;
    let whole = own.is_some() && truth.is_none_or(|truth| own.as_deref() == Some(truth));
    let Some(crcs) = truth.map(<[u32]>::to_vec).or(own) else { return false };
    let seal = client.seal(authority, segment.id, blocks, Some(crcs.into()));
    match tokio::time::timeout(PATIENCE, seal).await {
        Ok(Ok(())) => whole,
        other => {
            tracing::warn!(%disk, segment = %segment.id, ?other, "a shard could not be sealed");
            false
        }
    }
}

/// The salted CRCs of the first `blocks` blocks of copies, each record from any member that holds
/// it; none if a record is on no member.
async fn merged(
    disks: &Disks,
    volume: VolumeId,
    segment: &Segment,
    blocks: u32,
    held: &BTreeMap<DiskId, ShardInfo>,
) -> Option<Vec<u32>> {
    let salt = Salt::new(volume, segment.id, segment.scheme, 0);
    let raws = held.keys().map(|disk| Raw::new(disks, volume, segment.id, *disk)).collect();
    let mut members = Members { raws, salt };
    let mut crcs = Vec::with_capacity(blocks as usize);
    while crcs.len() < blocks as usize {
        let at = u32::try_from(crcs.len()).ok()?;
        let verify = segment.kind == SegmentKind::Log;
        let header = match members.record(at, verify).await {
            Some(header) => header,
            // Whoever reads the content will be told that it is damaged.
            None => members.record(at, false).await?,
        };
        let head = header.encode();
        crcs.extend((at..).zip(raw_crcs(&head)).map(|(b, crc)| salt.apply(b, crc)));
        crcs.extend_from_slice(&header.crcs);
    }
    (crcs.len() == blocks as usize).then_some(crcs)
}

/// The salted CRCs of the first `blocks` blocks of a shard, from its record headers; none if the
/// records do not reach so far. In log segments the payload is verified too.
async fn collect(
    disks: &Disks,
    volume: VolumeId,
    segment: &Segment,
    index: usize,
    blocks: u32,
) -> Option<Vec<u32>> {
    let copies = segment.scheme.data == 1;
    let shard =
        if copies && segment.kind != SegmentKind::Data { 0 } else { u8::try_from(index).ok()? };
    let salt = Salt::new(volume, segment.id, segment.scheme, index);
    let mut raw = Raw::new(disks, volume, segment.id, segment.members[index].disk);
    let mut crcs = Vec::with_capacity(blocks as usize);
    let mut at = 0;
    while at < blocks {
        let Some(header) = raw.header(at, shard).await else {
            tracing::debug!(segment = %segment.id, index, at, blocks, "no record to settle with");
            return None;
        };
        if segment.kind == SegmentKind::Log && !raw.payload_ok(salt, &header).await {
            tracing::debug!(segment = %segment.id, index, at, blocks, "damaged record to settle with");
            return None;
        }
        let head = raw.blocks(at, header.header_blocks).await?;
        crcs.extend((at..).zip(raw_crcs(&head)).map(|(b, crc)| salt.apply(b, crc)));
        crcs.extend_from_slice(&header.crcs);
        at += header.blocks();
    }
    (at == blocks).then_some(crcs)
}
