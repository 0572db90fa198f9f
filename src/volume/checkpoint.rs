//! Checkpoints: the overlay merged into the index, the table stored, the root swapped.
//!
//! A checkpoint is exact: it holds the mapping as of one LSN, while later changes go to a new
//! overlay. Everything it needs is durable before a record header or the root names it. What it no
//! longer names is freed only after a root that names it is in force.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;

use super::discard::delete_shards;
use super::head::{Head, HeadError, add, table_entry};
use super::index::{self, PageSink, Pages, Relocate, Tree};
use super::overlay::{Extent, Overlay, Target};
use super::root::{CheckpointRef, Root};
use super::rules;
use super::segtab::{Segment, ShardRef, Snapshot};
use crate::buffer::AlignedBuf;
use crate::id::{BLOCK_SIZE, Lsn, SegmentId};
use crate::limits::RECORD_PAYLOAD_BLOCKS_MAX;
use crate::planted::{Bug, bug};
use crate::segment::BlockAddr;
use crate::segment::checksum::raw_crcs;
use crate::segment::open::{OpenError, OpenSegment, frame};
use crate::segment::record::{CheckpointPlace, Entry, Header, header_blocks};
use crate::shard::{SegmentKind, ShardError, SlotClass};

/// Pages of one record: as many as fit with a header of one block.
const PAGES_PER_RECORD: usize = 100;
const _: () = assert!(128 + PAGES_PER_RECORD * 36 <= BLOCK_SIZE);
/// Blocks of a table in one record.
const TABLE_PIECE_BLOCKS: u32 = 256;
const _: () = assert!(TABLE_PIECE_BLOCKS as usize <= RECORD_PAYLOAD_BLOCKS_MAX);
/// How long an append of a checkpoint may take.
const APPEND_PATIENCE: Duration = Duration::from_secs(5);

/// Writes pages and tables to meta segments.
struct MetaWriter<'a> {
    head: &'a Rc<Head>,
    entries: Vec<Entry>,
    pages: Vec<Bytes>,
}

impl Pages for MetaWriter<'_> {
    type Error = HeadError;
    async fn load(&self, addr: BlockAddr) -> Result<Bytes, HeadError> {
        self.head.load(addr).await
    }
}

impl PageSink for MetaWriter<'_> {
    async fn store(&mut self, level: u8, number: u64, page: Bytes) -> Result<BlockAddr, HeadError> {
        let room = |writer: &Self| {
            let state = writer.head.state.borrow();
            state.meta.as_ref().map_or(0, |meta| meta.shard_blocks - meta.next.get()) as usize
        };
        if self.pages.len() == PAGES_PER_RECORD || room(self) < self.pages.len() + 2 {
            self.flush().await?;
            if room(self) < 2 {
                self.roll().await?;
            }
        }
        let meta = self.segment().await?;
        let index = u32::try_from(self.pages.len()).expect("bounded");
        let addr = BlockAddr { segment: meta.id, block: meta.next.get() + 1 + index };
        self.head.cache.borrow_mut().put(addr, page.clone());
        self.entries.push(Entry::Page { level, number });
        self.pages.push(page);
        Ok(addr)
    }
}

impl MetaWriter<'_> {
    /// The open meta segment, opened if there is none.
    async fn segment(&self) -> Result<Rc<OpenSegment>, HeadError> {
        if let Some(meta) = self.head.state.borrow().meta.clone() {
            return Ok(meta);
        }
        let mut opened = Err(OpenError::NoSpace);
        if !self.head.space.meta_failed.get() {
            opened = self.head.open_in_set(SegmentKind::Meta, SlotClass::Client, 1).await;
        }
        if matches!(opened, Err(OpenError::NoSpace)) {
            self.head.take_checkpoint_reserve().await;
            opened = self.head.open_in_set(SegmentKind::Meta, SlotClass::Checkpoint, 1).await;
        }
        let meta = match opened {
            Ok(meta) => meta,
            Err(OpenError::Fenced) => {
                self.head.stop("fenced while opening a meta segment");
                return Err(OpenError::Fenced.into());
            }
            Err(error) => return Err(error.into()),
        };
        let mut state = self.head.state.borrow_mut();
        state.table.segments.insert(meta.id, table_entry(&meta));
        self.head.space.opened.borrow_mut().push(meta.id);
        let meta = Rc::new(meta);
        state.meta = Some(meta.clone());
        Ok(meta)
    }

    /// Closes the open meta segment at its committed length.
    async fn roll(&self) -> Result<(), HeadError> {
        let meta = self.head.state.borrow_mut().meta.take();
        if let Some(meta) = meta {
            let blocks = {
                let mut state = self.head.state.borrow_mut();
                let entry = state.table.segments.get_mut(&meta.id).expect("an open one is listed");
                entry.sealed = true;
                entry.blocks
            };
            self.head.seal_in_background(meta, blocks);
        }
        self.segment().await.map(|_| ())
    }

    /// Makes the pages stored so far durable.
    async fn flush(&mut self) -> Result<(), HeadError> {
        if self.pages.is_empty() {
            return Ok(());
        }
        let meta = self.segment().await?;
        let (entries, pages) = (std::mem::take(&mut self.entries), std::mem::take(&mut self.pages));
        self.append(&meta, entries, pages).await
    }

    /// Appends a record to every member; a failure closes the segment.
    async fn append(
        &self,
        meta: &Rc<OpenSegment>,
        entries: Vec<Entry>,
        payload: Vec<Bytes>,
    ) -> Result<(), HeadError> {
        let raw: Vec<u32> = payload.iter().flat_map(|piece| raw_crcs(piece)).collect();
        let blocks = header_blocks(entries.len(), raw.len());
        let payload_blocks = u32::try_from(raw.len()).expect("bounded");
        let start = meta.reserve(blocks + payload_blocks).ok_or(HeadError::Append)?;
        let salt = meta.salt(0);
        let header = Header {
            kind: SegmentKind::Meta,
            shard: 0,
            header_blocks: blocks,
            payload_blocks,
            block: start,
            volume: self.head.volume,
            segment: meta.id,
            epoch: self.head.authority.epoch,
            head: self.head.authority.head,
            lsn: Lsn(0),
            acked: Lsn(0),
            checkpoint: self.head.state.borrow().checkpoint_place(),
            entries,
            crcs: (start + blocks..).zip(raw).map(|(b, raw)| salt.apply(b, raw)).collect(),
        };
        let (data, crcs) = frame(salt, &header, &payload);
        let (data, crcs): (Rc<[Bytes]>, Rc<[u32]>) = (data.into(), crcs.into());
        let appends = (0..meta.shards.len()).map(|shard| {
            let append = meta.append(shard, start, data.clone(), crcs.clone());
            tokio::time::timeout(APPEND_PATIENCE, append)
        });
        let mut failed = false;
        for (shard, result) in join_all(appends).await.into_iter().enumerate() {
            let error = match result {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error,
                Err(_) => ShardError::Unreachable,
            };
            if let ShardError::Fenced(epoch) = error {
                self.head.stop(&format!("fenced by epoch {epoch}"));
            }
            self.head.disks.report(meta.shards[shard].disk, &error);
            failed = true;
        }
        self.head.space.meta_failed.set(failed);
        let end = start + blocks + payload_blocks;
        let mut state = self.head.state.borrow_mut();
        let Some(entry) = state.table.segments.get_mut(&meta.id) else {
            return Err(HeadError::Append);
        };
        if failed {
            // What was appended before stays; the checkpoint begins anew elsewhere.
            entry.sealed = true;
            entry.blocks = start;
            let unused = start == 0;
            if state.meta.as_ref().is_some_and(|open| open.id == meta.id) {
                state.meta = None;
            }
            let removed = if unused { state.table.segments.remove(&meta.id) } else { None };
            drop(state);
            match removed {
                Some(segment) => {
                    self.head.discard(segment.members.iter().map(|m| (meta.id, *m)).collect());
                }
                None => self.head.seal_in_background(meta.clone(), start),
            }
            return Err(HeadError::Append);
        }
        entry.blocks = end;
        add(&self.head.stats.appended_blocks, u64::from(end - start));
        Ok(())
    }

    /// Stores the table of a checkpoint in one meta segment and tells where.
    async fn table(&mut self, sequence: u64, lsn: Lsn) -> Result<CheckpointPlace, HeadError> {
        self.flush().await?;
        // The table must lie in one segment; its size changes little by opening another.
        let mut fresh = false;
        loop {
            let meta = self.segment().await?;
            let bytes = self.snapshot(sequence, lsn);
            let blocks = u32::try_from(bytes.len() / BLOCK_SIZE).expect("bounded by the slots");
            let records = blocks.div_ceil(TABLE_PIECE_BLOCKS);
            if meta.next.get() + blocks + records > meta.shard_blocks {
                if fresh {
                    return Err(HeadError::Append);
                }
                self.roll().await?;
                fresh = true;
                continue;
            }
            let block = meta.next.get();
            let data = AlignedBuf::copy_of(&bytes).freeze();
            let piece = TABLE_PIECE_BLOCKS as usize * BLOCK_SIZE;
            for at in (0..data.len()).step_by(piece) {
                let part = data.slice(at..data.len().min(at + piece));
                let part_blocks = u32::try_from(part.len() / BLOCK_SIZE).expect("bounded");
                self.append(&meta, vec![Entry::Table { blocks: part_blocks }], vec![part]).await?;
            }
            return Ok(CheckpointPlace {
                sequence,
                lsn,
                segment: meta.id,
                block,
                blocks: meta.next.get() - block,
                crc: crc32fast::hash(&data),
            });
        }
    }

    fn snapshot(&self, sequence: u64, lsn: Lsn) -> Vec<u8> {
        let state = self.head.state.borrow();
        let capture = self.head.capture.borrow();
        Snapshot {
            volume: self.head.volume,
            epoch: self.head.authority.epoch,
            sequence,
            lsn,
            root: state.tree.root,
            height: state.tree.height,
            log: Some(capture.log),
            table: state.table.clone(),
        }
        .encode()
    }
}

/// Where the log stood when a checkpoint began.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Capture {
    pub(super) log: (SegmentId, u32),
}

/// Makes checkpoints whenever they are wanted, until the head stops.
pub(super) async fn run(head: Rc<Head>) {
    let mut pause = Duration::from_millis(20);
    loop {
        head.checkpoint_wanted.notified().await;
        if !head.is_serving() {
            return;
        }
        if head.defers_checkpoint() {
            continue;
        }
        match head.store_checkpoint().await {
            Ok(()) => pause = Duration::from_millis(20),
            Err(error) => {
                head.note_failure(&error);
                tracing::warn!(volume = %head.volume, %error, "checkpoint failed, will be tried again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(2));
                head.checkpoint_wanted.notify_one();
            }
        }
    }
}

impl Head {
    /// Makes a checkpoint of everything acknowledged so far, swaps the root to it and deletes what
    /// nothing refers to any more.
    ///
    /// # Errors
    /// [`HeadError`]; nothing is lost, and it may be tried again.
    pub async fn checkpoint(self: &Rc<Self>) -> Result<(), HeadError> {
        self.store_checkpoint().await?;
        self.publish().await
    }

    /// A checkpoint whose root changes otherwise too.
    pub(super) async fn checkpoint_with(
        self: &Rc<Self>,
        change: impl FnOnce(&mut Root) + 'static,
    ) -> Result<(), HeadError> {
        self.store_checkpoint().await?;
        self.publish_with(Some(change)).await
    }

    /// Makes a durable checkpoint of everything acknowledged so far. Record headers name it from
    /// now on; the root does when the store allows ([`Head::publish`]).
    ///
    /// In a task of its own: whoever gives up waiting (repair does, when the head is released) must not leave half a
    /// merge behind, whose part of the overlay the next one would not know.
    pub(super) async fn store_checkpoint(self: &Rc<Self>) -> Result<(), HeadError> {
        let head = self.clone();
        let stored = tokio::task::spawn_local(async move { head.store_in_turn().await });
        let ended = |_| Err(HeadError::Stopped("it ended while a checkpoint was made".into()));
        stored.await.unwrap_or_else(ended)
    }

    async fn store_in_turn(self: &Rc<Self>) -> Result<(), HeadError> {
        let _lock = self.checkpoint_lock.lock().await;
        if let Some(why) = self.stopped() {
            return Err(HeadError::Stopped(why));
        }
        if self.owes_reserve() {
            // What the last one took of the reserve comes back when the root names it.
            self.publish().await?;
            self.reserve_is_back();
        }
        let before = self.begin_checkpoint();
        let result = self.checkpoint_locked().await;
        self.end_checkpoint(before);
        result
    }

    async fn checkpoint_locked(self: &Rc<Self>) -> Result<(), HeadError> {
        self.leave_narrow_meta();
        self.choose_meta_victims().await;
        self.merge_overlay().await?;
        self.store_table().await?;
        self.swaps.wanted.notify_one();
        Ok(())
    }

    /// Closes an open meta segment with fewer copies than could be had now, or with one on a slow
    /// disk that could be avoided.
    fn leave_narrow_meta(self: &Rc<Self>) {
        let mut state = self.state.borrow_mut();
        let Some(meta) = state.meta.clone() else { return };
        let healthy = self.healthy();
        let sets = state.pairs().into_iter().chain(&state.planned);
        let domains = sets.map(|set| rules::domains_touched(set, &healthy)).max().unwrap_or(0);
        let slow = meta.shards.iter().any(|shard| self.disks.is_slow(shard.disk));
        let fast = self.fast();
        let avoidable = slow && state.pairs().iter().all(|set| rules::write_set_ok(set, &fast));
        if meta.shards.len() >= meta.scheme.width().min(domains) && !avoidable {
            return;
        }
        state.meta = None;
        let entry = state.table.segments.get_mut(&meta.id).expect("an open one is listed");
        entry.sealed = true;
        let blocks = entry.blocks;
        drop(state);
        self.seal_in_background(meta, blocks);
    }

    /// Merges the overlay into a new index and switches to it.
    pub(super) async fn merge_overlay(self: &Rc<Self>) -> Result<(), HeadError> {
        let (frozen, tree, blocks, lsn) = {
            let mut state = self.state.borrow_mut();
            if let Some(why) = &state.stopped {
                return Err(HeadError::Stopped(why.clone()));
            }
            let frozen = Rc::new(std::mem::take(&mut state.overlay));
            if !bug(Bug::CheckpointNotExact) {
                state.frozen = Some(frozen.clone());
            }
            state.log_blocks = 0;
            let capture = Capture { log: state.log_position() };
            *self.capture.borrow_mut() = capture;
            (frozen, state.tree, state.size.div_ceil(BLOCK_SIZE as u64), state.acked)
        };
        let relocate = std::mem::take(&mut *self.relocate.borrow_mut());
        let merged = self.merge_frozen(&frozen, tree, blocks, &relocate).await;
        let mut state = self.state.borrow_mut();
        state.frozen = None;
        match merged {
            Ok((tree, deltas)) => {
                state.tree = tree;
                state.generation += 1;
                state.merged_lsn = lsn;
                for extent in frozen.iter() {
                    if let Target::Data(addr) = extent.target {
                        let blocks = i64::try_from(extent.len).expect("within one segment");
                        state.table.add_recent(addr.segment, -blocks);
                    }
                }
                state.table.add_live(&deltas);
                drop(state);
                self.wake.notify_one();
                Ok(())
            }
            Err(error) => {
                state.restore(&frozen);
                drop(state);
                *self.relocate.borrow_mut() = relocate;
                Err(error)
            }
        }
    }

    async fn merge_frozen(
        self: &Rc<Self>,
        frozen: &Overlay,
        tree: Tree,
        blocks: u64,
        relocate: &Relocate,
    ) -> Result<(Tree, index::Deltas), HeadError> {
        let extents: Vec<Extent> = frozen.iter().collect();
        let mut writer = MetaWriter { head: self, entries: Vec::new(), pages: Vec::new() };
        let merged = index::merge(&mut writer, tree, blocks, &extents, relocate).await?;
        writer.flush().await?;
        Ok(merged)
    }

    /// Frees what is dead and stores the table.
    pub(super) async fn store_table(self: &Rc<Self>) -> Result<(), HeadError> {
        let (sequence, lsn) = {
            let mut state = self.state.borrow_mut();
            let (log, _) = self.capture.borrow().log;
            // The tables of earlier checkpoints are dead too: they are deleted when this one is in
            // force, and before that nobody is told to.
            let dead: Vec<SegmentId> = state
                .table
                .segments
                .values()
                .filter(|s| state.table.is_dead(s.id))
                .filter(|s| s.kind != SegmentKind::Log || s.id < log)
                .map(|s| s.id)
                .collect();
            for id in dead {
                state.table.free(id);
                self.torn.borrow_mut().remove(&id);
            }
            let sequence = state.checkpoint.as_ref().map_or(0, |c| c.place.sequence) + 1;
            (sequence, state.merged_lsn)
        };
        let mut writer = MetaWriter { head: self, entries: Vec::new(), pages: Vec::new() };
        let freed: Vec<(SegmentId, ShardRef)> =
            self.state.borrow().table.freed.iter().copied().collect();
        let place = writer.table(sequence, lsn).await?;
        let mut state = self.state.borrow_mut();
        let segment = &state.table.segments[&place.segment];
        let checkpoint = CheckpointRef {
            epoch: self.authority.epoch,
            place,
            scheme: segment.scheme,
            members: segment.members.clone(),
        };
        state.checkpoint = Some(checkpoint);
        state.listed = freed;
        state.checkpoint_log = self.capture.borrow().log.0;
        add(&self.stats.checkpoints, 1);
        Ok(())
    }

    /// Asks the disks to delete shards that the root's checkpoint lists as freed.
    pub(super) async fn delete_freed(&self, freed: &[(SegmentId, ShardRef)]) {
        // Until it is listed as sealed, a log segment keeps the copies it was written to.
        let freed: Vec<(SegmentId, ShardRef)> = {
            let state = self.state.borrow();
            let log = |s: &Segment| s.kind == SegmentKind::Log;
            let kept = |id: &SegmentId| {
                !state.is_covered(*id) && state.table.segments.get(id).is_some_and(log)
            };
            freed.iter().copied().filter(|(id, _)| !kept(id)).collect()
        };
        // Nobody waits for a slow disk: what it deletes meanwhile is listed until it has.
        let (slow, freed): (Vec<_>, Vec<_>) =
            freed.into_iter().partition(|(_, shard)| self.disks.is_slow(shard.disk));
        if !slow.is_empty() && !self.deletes_slowly.replace(true) {
            let this = self.this.clone();
            tokio::task::spawn_local(async move {
                let Some(head) = this.upgrade() else { return };
                head.delete_confirmed(slow).await;
                head.deletes_slowly.set(false);
            });
        }
        self.delete_confirmed(freed).await;
        self.disks.refresh().await;
        self.wake.notify_one();
    }

    /// Deletes shards, and lists those no longer whose deletion is confirmed.
    async fn delete_confirmed(&self, freed: Vec<(SegmentId, ShardRef)>) {
        let confirmed = |shard: (SegmentId, ShardRef)| {
            self.state.borrow_mut().table.freed.remove(&shard);
        };
        delete_shards(&self.disks, self.authority, freed, confirmed).await;
    }
}

impl super::head::State {
    /// Puts a frozen overlay back below the newer one, after a merge failed.
    fn restore(&mut self, frozen: &Overlay) {
        let newer = std::mem::replace(&mut self.overlay, frozen.clone());
        for extent in newer.iter() {
            // The references of the newer extents are counted already.
            let table = &mut self.table;
            self.overlay.insert(extent, |old| {
                if let Target::Data(addr) = old.target {
                    let blocks = i64::try_from(old.len).expect("within one segment");
                    table.add_recent(addr.segment, -blocks);
                }
            });
        }
    }
}
