//! What a segment's blocks must be to each other: records in their places, copies that are alike,
//! parity that fits its data.
//!
//! Pure: it is given windows of all shards, in order, and says what is wrong in them. It knows no
//! disks and repairs nothing. Blocks that do not match their stored checksum are given as bad and
//! are not judged again.

use std::collections::BTreeMap;

use bytes::Bytes;

use crate::id::{BLOCK_SIZE, VolumeId};
use crate::limits::RECORD_HEADER_BLOCKS_MAX;
use crate::segment::record::Header;
use crate::segment::stripe;
use crate::shard::SegmentKind;
use crate::volume::segtab::Segment;

#[allow(clippy::cast_possible_truncation, reason = "a small constant")]
const HEADER_BLOCKS_MAX: u32 = RECORD_HEADER_BLOCKS_MAX as u32;

/// Blocks of one shard as its disk gave them.
#[derive(Debug, Clone, Default)]
pub(super) struct Piece {
    /// The blocks; none if all of them are bad.
    pub(super) data: Bytes,
    /// The stored checksum of each.
    pub(super) crcs: Vec<u32>,
    /// Blocks that do not match theirs or cannot be read, sorted.
    pub(super) bad: Vec<u32>,
}

/// The same blocks of all shards of a segment.
pub(super) struct Window<'a> {
    pub(super) volume: VolumeId,
    pub(super) segment: &'a Segment,
    /// First block.
    pub(super) at: u32,
    /// Blocks.
    pub(super) count: u32,
    /// By shard; none for one that was not read.
    pub(super) pieces: &'a [Option<Piece>],
}

/// What is wrong in a window.
#[derive(Debug, Default)]
pub(super) struct Judgement {
    /// Where the next window is to begin.
    pub(super) end: u32,
    /// Shards that hold what does not belong there although its checksum is right, each with the
    /// first such block.
    pub(super) foreign: BTreeMap<usize, u32>,
    /// The first block at which the shards contradict each other, and nobody can tell who is right.
    pub(super) unlike: Option<u32>,
}

/// A record that the walk is in.
struct Record {
    payload: u32,
    end: u32,
    /// What each shard's header says of the payload, where it could be read.
    crcs: Vec<Option<Vec<u32>>>,
}

/// A walk over a segment, window by window.
#[derive(Default)]
pub(super) struct Layout {
    record: Option<Record>,
    /// No shard has the header of a record: where the next one begins is not known any more.
    lost: bool,
}

impl Window<'_> {
    /// Blocks `from .. to` of a shard and their checksums, if none of them is bad.
    fn good(&self, shard: usize, from: u32, to: u32) -> Option<(&[u8], &[u32])> {
        let piece = self.pieces[shard].as_ref()?;
        if piece.bad.iter().any(|block| (from..to).contains(block)) || piece.data.is_empty() {
            return None;
        }
        let (first, last) = ((from - self.at) as usize, (to - self.at) as usize);
        Some((&piece.data[first * BLOCK_SIZE..last * BLOCK_SIZE], &piece.crcs[first..last]))
    }

    /// The shard that the headers of a shard name.
    fn tag(&self, shard: usize) -> Option<u8> {
        let copies = self.segment.scheme.data == 1 && self.segment.kind != SegmentKind::Data;
        if copies { Some(0) } else { u8::try_from(shard).ok() }
    }
}

impl Layout {
    /// Judges the window after the one before.
    pub(super) fn judge(&mut self, window: &Window<'_>) -> Judgement {
        let end = window.at + window.count;
        let mut judgement = Judgement { end, ..Judgement::default() };
        let mut at = window.at;
        while at < end && !self.lost {
            if let Some(record) = self.record.as_ref().filter(|record| at < record.end) {
                let until = record.end.min(end);
                judge_payload(window, record, at, until, &mut judgement);
                at = until;
                continue;
            }
            let most = HEADER_BLOCKS_MAX.min(end - at);
            if most < HEADER_BLOCKS_MAX && end < window.segment.blocks && at > window.at {
                // The rest of the header lies in the next window.
                judgement.end = at;
                return judgement;
            }
            match read_headers(window, at, most, &mut judgement) {
                Some(record) => {
                    at = record.payload;
                    self.record = Some(record);
                }
                None => self.lost = true,
            }
        }
        judgement
    }
}

/// The record at block `at`, as the shards' headers have it.
fn read_headers(
    window: &Window<'_>,
    at: u32,
    most: u32,
    judgement: &mut Judgement,
) -> Option<Record> {
    let width = window.segment.scheme.width();
    let mut shape: Option<(u32, u32)> = None;
    let mut crcs: Vec<Option<Vec<u32>>> = vec![None; width];
    for (shard, slot) in crcs.iter_mut().enumerate() {
        let whole = window.good(shard, at, at + most);
        let Some((data, _)) = whole.or_else(|| window.good(shard, at, at + 1)) else { continue };
        let header = Header::decode(data).ok().filter(|header| {
            let tag = window.tag(shard);
            tag.is_some_and(|tag| header.is_at(window.volume, window.segment.id, tag, at))
        });
        let Some(header) = header else {
            if whole.is_some() {
                judgement.foreign.entry(shard).or_insert(at);
            }
            continue;
        };
        let own = (header.header_blocks, header.payload_blocks);
        if *shape.get_or_insert(own) != own {
            judgement.unlike.get_or_insert(at);
        }
        *slot = Some(header.crcs);
    }
    let (header_blocks, payload_blocks) = shape?;
    if window.segment.scheme.data == 1 {
        let mut known = crcs.iter().flatten();
        let first = known.next();
        if known.any(|other| Some(other) != first) {
            judgement.unlike.get_or_insert(at);
        }
    }
    let payload = at + header_blocks.max(1);
    Some(Record { payload, end: payload.saturating_add(payload_blocks), crcs })
}

/// Compares payload with what the headers say of it, and the shards with each other.
fn judge_payload(
    window: &Window<'_>,
    record: &Record,
    at: u32,
    until: u32,
    judgement: &mut Judgement,
) {
    for (shard, said) in record.crcs.iter().enumerate() {
        let (Some(said), Some(piece)) = (said, &window.pieces[shard]) else { continue };
        for block in at..until {
            let stored = piece.crcs.get((block - window.at) as usize);
            let said = said.get((block - record.payload) as usize);
            if said.is_some() && stored.is_some() && said != stored {
                judgement.foreign.entry(shard).or_insert(block);
            }
        }
    }
    let width = window.segment.scheme.width();
    let shards: Option<Vec<&[u8]>> =
        (0..width).map(|shard| window.good(shard, at, until).map(|(data, _)| data)).collect();
    let Some(shards) = shards else { return };
    let scheme = window.segment.scheme;
    let (data, parity) = shards.split_at(usize::from(scheme.data));
    if scheme.data == 1 {
        if parity.iter().any(|copy| *copy != data[0]) {
            judgement.unlike.get_or_insert(at);
        }
        return;
    }
    let mut expected = vec![vec![0; data[0].len()]; parity.len()];
    let mut outputs: Vec<&mut [u8]> = expected.iter_mut().map(|p| &mut p[..]).collect();
    stripe::encode(scheme, data, &mut outputs);
    if expected.iter().zip(parity).any(|(expected, found)| expected != found) {
        judgement.unlike.get_or_insert(at);
    }
}
