//! One window of a segment: the same few blocks of all its shards, read, judged and mended.

use std::collections::BTreeSet;

use bytes::Bytes;
use futures_util::future::join_all;

use super::layout::{Layout, Piece, Window};
use super::{Place, SHARD_PATIENCE, WINDOW_BLOCKS};
use crate::buffer::{AlignedBuf, is_aligned};
use crate::id::{BLOCK_SIZE, SegmentId};
use crate::segment::checksum::{Salt, raw_crc, raw_crcs};
use crate::shard::{SealedShard, ShardError};
use crate::volume::head::{Head, add};
use crate::volume::segtab::Segment;

/// What a disk says of some blocks of a shard.
enum Look {
    /// It was read.
    Read(Piece),
    /// The disk does not hold the shard as the table has it, or cannot judge it.
    Not(ShardError),
    /// The disk is away, or too slow to tell.
    Away,
    /// The table knows already that the shard is not there, or not whole.
    Known,
}

/// How the mending of one block ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mended {
    /// It is on the medium again.
    Done,
    /// Its disk did not take it: the shard is to be built anew.
    Refused,
    /// No shard that can be read yields it, though every disk answers.
    Lost,
    /// Disks that may yield or take it are away.
    Later,
}

/// Who looks at a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// A round.
    Round,
    /// A read found a bad block in it: if it cannot be mended, its shard is to be built anew.
    Finding,
}

impl Head {
    /// Looks at `count` blocks from `at` of all shards of a segment and mends what is bad. Gives
    /// where to go on, and how many blocks could not be checked.
    pub(super) async fn scrub_window(
        &self,
        segment: &Segment,
        (at, count): (u32, u32),
        layout: Option<&mut Layout>,
        reason: Reason,
    ) -> (u32, u64) {
        let mut looks = self.look_at_all(segment, at, count).await;
        let (mut mended, mut unchecked) = (false, 0);
        for (index, look) in looks.iter().enumerate() {
            match look {
                Look::Read(piece) => {
                    for &block in &piece.bad {
                        mended = true;
                        if !self.repair_block(segment, index, block, reason).await {
                            break;
                        }
                    }
                }
                Look::Not(error) => self.take_up(segment, index, at, error).await,
                Look::Away => unchecked += u64::from(count),
                Look::Known => {}
            }
        }
        let Some(layout) = layout else { return (at + count, unchecked) };
        if mended {
            looks = self.look_at_all(segment, at, count).await;
        }
        let pieces: Vec<Option<Piece>> = looks
            .into_iter()
            .map(|look| if let Look::Read(piece) = look { Some(piece) } else { None })
            .collect();
        let window = Window { volume: self.volume, segment, at, count, pieces: &pieces };
        let judgement = layout.judge(&window);
        for (&index, &block) in &judgement.foreign {
            self.found(segment, index, block, "a block is not what its record says");
            self.rebuild_later(segment, index, true);
        }
        if let Some(block) = judgement.unlike {
            // Counted for no shard: any may be the wrong one.
            let nobody = segment.members.len();
            if self.scrub.note_lost(Place { segment: segment.id, shard: nobody, block }) {
                self.found(segment, nobody, block, "the shards contradict each other");
            }
        }
        (judgement.end, unchecked)
    }

    async fn look_at_all(&self, segment: &Segment, at: u32, count: u32) -> Vec<Look> {
        join_all((0..segment.members.len()).map(|index| self.look(segment, index, at, count))).await
    }

    async fn look(&self, segment: &Segment, index: usize, at: u32, count: u32) -> Look {
        let member = segment.members[index];
        let known = |s: &Segment| s.missing >> index & 1 == 1 || s.members[index] != member;
        let now_known = || self.state.borrow().table.segments.get(&segment.id).is_none_or(known);
        if member.disk.is_nil() || now_known() {
            return Look::Known;
        }
        match self.look_once(segment, index, at, count).await {
            Look::Not(ShardError::Io(_)) if count == 1 => {
                Look::Read(Piece { data: Bytes::new(), crcs: vec![0], bad: vec![at] })
            }
            Look::Not(ShardError::Io(_)) => self.look_one_by_one(segment, index, at, count).await,
            // It may have been replaced while its disk was asked.
            Look::Not(_) if now_known() => Look::Known,
            look => look,
        }
    }

    async fn look_once(&self, segment: &Segment, index: usize, at: u32, count: u32) -> Look {
        let member = segment.members[index];
        let Some(client) = self.disks.client(member.disk) else { return Look::Away };
        let read = client.read_sealed(self.sealed_shard(segment, index), at, count);
        match tokio::time::timeout(SHARD_PATIENCE, read).await {
            Ok(Ok(reply)) => {
                let salt = Salt::new(self.volume, segment.id, segment.scheme, index);
                let bad = (at..)
                    .zip(raw_crcs(&reply.data).zip(&reply.crcs))
                    .filter(|(block, (raw, stored))| salt.apply(*block, *raw) != **stored)
                    .map(|(block, _)| block)
                    .collect();
                Look::Read(Piece { data: reply.data, crcs: reply.crcs, bad })
            }
            Ok(Err(
                error @ (ShardError::Io(_)
                | ShardError::Gone
                | ShardError::WrongState(_)
                | ShardError::WrongLength(_)
                | ShardError::Damaged(_)),
            )) => Look::Not(error),
            Ok(Err(error)) => {
                self.disks.report(member.disk, &error);
                Look::Away
            }
            Err(_) => {
                self.disks.report(member.disk, &ShardError::Unreachable);
                Look::Away
            }
        }
    }

    /// Where a read of several blocks fails, each by itself.
    async fn look_one_by_one(&self, segment: &Segment, index: usize, at: u32, count: u32) -> Look {
        let mut data = AlignedBuf::zeroed(count as usize * BLOCK_SIZE);
        let mut piece = Piece::default();
        for (block, room) in (at..at + count).zip(data.chunks_exact_mut(BLOCK_SIZE)) {
            match self.look_once(segment, index, block, 1).await {
                Look::Read(one) => {
                    room.copy_from_slice(&one.data);
                    piece.crcs.extend_from_slice(&one.crcs);
                    piece.bad.extend_from_slice(&one.bad);
                }
                Look::Not(ShardError::Io(_)) => {
                    piece.crcs.push(0);
                    piece.bad.push(block);
                }
                other => return other,
            }
        }
        piece.data = data.freeze();
        Look::Read(piece)
    }

    fn sealed_shard(&self, segment: &Segment, index: usize) -> SealedShard {
        SealedShard {
            volume: self.volume,
            segment: segment.id,
            creation: segment.members[index].creation,
            blocks: segment.blocks,
        }
    }

    /// Counts and logs what was found.
    fn found(&self, segment: &Segment, index: usize, block: u32, what: &str) {
        add(&self.stats.scrub_found, 1);
        let disk = segment.members.get(index).map(|member| member.disk).unwrap_or_default();
        tracing::warn!(
            volume = %self.volume, segment = %segment.id, %disk, index, block, "scrub: {what}",
        );
    }

    /// Has a shard built anew.
    fn rebuild_later(&self, segment: &Segment, index: usize, of_content: bool) {
        let member = segment.members[index];
        self.note_bad_shard(segment.id, member.disk, member.creation, of_content);
        let mut awaited = self.scrub.awaited.borrow_mut();
        awaited.entry((segment.id, index)).or_insert((member.creation, 0)).1 += 1;
    }

    /// A shard that is not on its disk as the table has it.
    async fn take_up(&self, segment: &Segment, index: usize, at: u32, error: &ShardError) {
        let mut error = error.clone();
        if matches!(error, ShardError::WrongState(_)) {
            // It may be about to be sealed.
            tokio::time::sleep(SHARD_PATIENCE + SHARD_PATIENCE).await;
            match self.look(segment, index, at, 1).await {
                Look::Not(still) => error = still,
                _ => return,
            }
        }
        self.found(segment, index, at, &error.to_string());
        self.rebuild_later(segment, index, matches!(error, ShardError::Damaged(_)));
    }

    /// Mends one bad block, or has its shard built anew. Tells whether the shard still counts.
    async fn repair_block(
        &self,
        segment: &Segment,
        index: usize,
        block: u32,
        reason: Reason,
    ) -> bool {
        let mended = self.mend(segment, index, block).await;
        let new = mended != Mended::Lost
            || self.scrub.note_lost(Place { segment: segment.id, shard: index, block });
        if new {
            self.found(segment, index, block, "a block does not match its checksum");
            add(&self.stats.corrupt_blocks, 1);
        }
        tracing::debug!(segment = %segment.id, index, block, ?mended, "scrub");
        match mended {
            Mended::Done => add(&self.stats.scrub_repaired, 1),
            Mended::Later if reason == Reason::Round => {}
            Mended::Later | Mended::Refused => {
                self.rebuild_later(segment, index, true);
                return false;
            }
            Mended::Lost => {
                let member = segment.members[index];
                self.note_bad_shard(segment.id, member.disk, member.creation, true);
            }
        }
        true
    }

    /// Writes a bad block of a shard again, from what the others yield.
    async fn mend(&self, segment: &Segment, index: usize, block: u32) -> Mended {
        let all_there = segment.members.iter().all(|m| self.disks.client(m.disk).is_some());
        let Some((mut source, _)) = self.source(segment.id) else { return Mended::Later };
        source.without |= 1 << index;
        // Payload, and anything of copies, lies at the same place of the others.
        let same = source.read(&self.disks, index, block, 1, &mut |_| {}).await;
        if let Ok(data) = &same {
            match self.write_again(segment, index, block, data.clone()).await {
                Err(ShardError::Invalid(_)) => {}
                result => return self.settled(segment, index, block, result).await,
            }
        }
        // A header is each shard's own: the whole record tells it.
        match self.block_of_record(segment, index, block).await {
            Some(data) => {
                let result = self.write_again(segment, index, block, data).await;
                self.settled(segment, index, block, result).await
            }
            None if all_there => Mended::Lost,
            None => Mended::Later,
        }
    }

    /// What became of a block that was written again.
    async fn settled(
        &self,
        segment: &Segment,
        index: usize,
        block: u32,
        result: Result<(), ShardError>,
    ) -> Mended {
        match result {
            Ok(()) => match self.look(segment, index, block, 1).await {
                Look::Read(piece) if piece.bad.is_empty() => Mended::Done,
                Look::Read(_) | Look::Not(_) => Mended::Refused,
                Look::Away | Look::Known => Mended::Later,
            },
            Err(ShardError::Io(_) | ShardError::Damaged(_) | ShardError::Invalid(_)) => {
                Mended::Refused
            }
            Err(_) => Mended::Later,
        }
    }

    async fn write_again(
        &self,
        segment: &Segment,
        index: usize,
        block: u32,
        data: Bytes,
    ) -> Result<(), ShardError> {
        let member = segment.members[index];
        let client = self.disks.client(member.disk).ok_or(ShardError::Unreachable)?;
        let data = if is_aligned(&data) { data } else { AlignedBuf::copy_of(&data).freeze() };
        let salt = Salt::new(self.volume, segment.id, segment.scheme, index);
        let crc = salt.apply(block, raw_crc(&data));
        let shard = self.sealed_shard(segment, index);
        let mend = client.mend(self.authority, shard, block, data, crc);
        let mended = tokio::time::timeout(SHARD_PATIENCE, mend).await;
        mended.unwrap_or(Err(ShardError::Unreachable))
    }

    /// One block of a shard out of its whole record.
    async fn block_of_record(&self, segment: &Segment, index: usize, block: u32) -> Option<Bytes> {
        // The rest of the record may be whole in the shard itself and nowhere else.
        let (source, _) = self.source(segment.id)?;
        let mut at = 0;
        while at <= block {
            let header = self.any_header(&source, segment, index, at).await.ok()?;
            let next = at + header.blocks().max(1);
            if block < next {
                break;
            }
            at = next;
        }
        let (data, _) = self.rebuilt_record(&source, segment, index, at).await.ok()?;
        let mut skip = (block - at) as usize * BLOCK_SIZE;
        for piece in data {
            if skip < piece.len() {
                return Some(piece.slice(skip..skip + BLOCK_SIZE));
            }
            skip -= piece.len();
        }
        None
    }

    /// Looks at the windows in which reads found bad blocks.
    pub(super) async fn mend_suspects(&self) {
        loop {
            let suspect = self.scrub.suspects.borrow_mut().pop_first();
            let Some((id, block)) = suspect.filter(|_| self.is_serving()) else { return };
            let Some(segment) = self.sealed_segment(id) else { continue };
            if block >= segment.blocks {
                continue;
            }
            let at = block / WINDOW_BLOCKS * WINDOW_BLOCKS;
            let count = WINDOW_BLOCKS.min(segment.blocks - at);
            self.scrub_window(&segment, (at, count), None, Reason::Finding).await;
        }
    }
}

/// Windows in which reads found bad blocks, by segment and the first of their blocks.
pub(super) type Suspects = BTreeSet<(SegmentId, u32)>;
