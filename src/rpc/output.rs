//! Messages on their way out: cut into frames, the small and urgent ones first, gathered into few
//! vectored writes without copying payload.
//!
//! Messages wait in lanes. Within a lane they keep their order; lanes take turns, a frame each; those
//! of the urgent class go before all others. So a probe waits for the batch that is being written
//! at most, and appends to one shard, which share a lane, arrive in order. Frames that were handed
//! to the batch lie behind each other in [`Wire`].

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::Bytes;
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::U32;

use super::frame::{FRAME_HEADER_BYTES, FrameHeader, Kind, flag};
use super::message::Payload;
use crate::limits::RPC_FRAME_BYTES_MAX;

/// Unsent bytes beyond which no more frames are added to a batch.
const BATCH_BYTES: usize = 256 << 10;
/// Unused buffers that are kept.
const SPARE_MAX: usize = 64;
/// A buffer that grew beyond is not kept.
const SPARE_BYTES_MAX: usize = 4096;

/// A message to be sent. `T` tells whose it is.
pub(super) struct Outgoing<T> {
    tag: T,
    /// Header and control part of the first frame; empty once that was taken.
    head: Vec<u8>,
    header: FrameHeader,
    payload: Payload,
    total: usize,
    at: usize,
    /// The piece of the payload that comes next, and the offset in it.
    piece: usize,
    piece_at: usize,
    checked: bool,
}

impl<T> Outgoing<T> {
    /// A message with the control part in `head`, behind room for the header (see
    /// [`Output::buffer`]). With `checked`, its frames carry checksums of the payload.
    pub(super) fn new(
        (kind, code, id): (Kind, u16, u64),
        head: Vec<u8>,
        (payload, checked): (Payload, bool),
        tag: T,
    ) -> Self {
        let header = FrameHeader::new(0, kind, code, id);
        let total = payload.len();
        Self { tag, head, header, payload, total, at: 0, piece: 0, piece_at: 0, checked }
    }

    /// Whose it is.
    pub(super) fn tag(&self) -> &T {
        &self.tag
    }

    /// Whether a part of it was sent.
    pub(super) fn started(&self) -> bool {
        self.head.is_empty()
    }

    fn slice(&mut self, mut left: usize, mut give: impl FnMut(Bytes)) {
        while left > 0 {
            let piece = &self.payload.pieces()[self.piece];
            let end = piece.len().min(self.piece_at + left);
            if end > self.piece_at {
                give(piece.slice(self.piece_at..end));
            }
            left -= end - self.piece_at;
            self.piece_at = end;
            if end == piece.len() {
                (self.piece, self.piece_at) = (self.piece + 1, 0);
            }
        }
    }

    /// Hands the next frame over. True if it was the last.
    fn frame(&mut self, version: u16, spare: &mut Vec<Vec<u8>>, wire: &mut Wire<T>) -> bool {
        let len = (self.total - self.at).min(RPC_FRAME_BYTES_MAX);
        let number = |n: usize| U32::new(u32::try_from(n).unwrap_or(u32::MAX));
        let last = self.at + len == self.total;
        let mut head = std::mem::take(&mut self.head);
        let header = &mut self.header;
        header.version.set(version);
        if head.is_empty() {
            header.kind = Kind::More as u8;
            header.code.set(0);
            head = buffer(spare);
        }
        header.control_len = number(head.len() - FRAME_HEADER_BYTES);
        (header.payload_len, header.payload_total) = (number(len), number(self.total));
        header.payload_at = number(self.at);
        header.flags = if last { 0 } else { flag::MORE };
        header.payload_crc = U32::ZERO;
        if self.checked && len > 0 {
            header.flags |= flag::PAYLOAD_CRC;
            let (piece, piece_at) = (self.piece, self.piece_at);
            let mut hasher = crc32fast::Hasher::new();
            self.slice(len, |data| hasher.update(&data));
            (self.piece, self.piece_at) = (piece, piece_at);
            self.header.payload_crc = U32::new(hasher.finalize());
        }
        self.header.seal(&head[FRAME_HEADER_BYTES..]);
        head[..FRAME_HEADER_BYTES].copy_from_slice(self.header.as_bytes());
        wire.push(Piece::Head(head));
        self.slice(len, |data| wire.push(Piece::Data(data)));
        self.at += len;
        last
    }
}

fn buffer(spare: &mut Vec<Vec<u8>>) -> Vec<u8> {
    let mut head = spare.pop().unwrap_or_else(|| Vec::with_capacity(256));
    head.clear();
    head.resize(FRAME_HEADER_BYTES, 0);
    head
}

enum Piece {
    Head(Vec<u8>),
    Data(Bytes),
}

impl Piece {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Head(bytes) => bytes,
            Self::Data(bytes) => bytes,
        }
    }
}

/// Frames in the order in which they are written.
///
/// Invariant: no piece is empty; the first `front_sent` bytes of the first piece were sent.
struct Wire<T> {
    pieces: VecDeque<Piece>,
    front_sent: usize,
    /// Bytes ever queued and ever sent.
    queued: u64,
    sent: u64,
    /// Whose message ends at which value of `queued`.
    ends: VecDeque<(u64, T)>,
}

impl<T> Wire<T> {
    fn push(&mut self, piece: Piece) {
        self.queued += piece.as_slice().len() as u64;
        self.pieces.push_back(piece);
    }

    fn unsent(&self) -> usize {
        usize::try_from(self.queued - self.sent).unwrap_or(usize::MAX)
    }
}

struct Lane<K, T> {
    key: K,
    queue: VecDeque<Outgoing<T>>,
}

struct Lanes<K, T> {
    all: Vec<Lane<K, T>>,
    /// Whose turn it is.
    turn: usize,
    unused: Vec<VecDeque<Outgoing<T>>>,
}

impl<K: PartialEq, T> Lanes<K, T> {
    fn push(&mut self, key: K, message: Outgoing<T>) {
        if let Some(lane) = self.all.iter_mut().find(|lane| lane.key == key) {
            lane.queue.push_back(message);
            return;
        }
        let mut queue = self.unused.pop().unwrap_or_default();
        queue.push_back(message);
        self.all.push(Lane { key, queue });
    }

    fn remove_if_empty(&mut self, index: usize) -> bool {
        let empty = self.all[index].queue.is_empty();
        if empty {
            let lane = self.all.swap_remove(index);
            if self.unused.len() < SPARE_MAX {
                self.unused.push(lane.queue);
            }
        }
        empty
    }

    /// Takes the next frame that may go; false if there is none.
    fn take(&mut self, mut one: impl FnMut(&mut Outgoing<T>) -> Option<bool>) -> bool {
        let count = self.all.len();
        for step in 0..count {
            let index = (self.turn + step) % count;
            let queue = &mut self.all[index].queue;
            let Some(last) = queue.front_mut().and_then(&mut one) else { continue };
            let message = if last { queue.pop_front() } else { None };
            drop(message);
            self.turn = index + usize::from(!self.remove_if_empty(index));
            return true;
        }
        false
    }

    fn retain(&mut self, keep: &mut impl FnMut(&Outgoing<T>) -> bool) {
        for lane in &mut self.all {
            lane.queue.retain(&mut *keep);
        }
        for index in (0..self.all.len()).rev() {
            self.remove_if_empty(index);
        }
    }
}

impl<K, T> Default for Lanes<K, T> {
    fn default() -> Self {
        Self { all: Vec::new(), turn: 0, unused: Vec::new() }
    }
}

/// Everything that waits to be sent over one connection.
pub(super) struct Output<K, T> {
    version: u16,
    urgent: Lanes<K, T>,
    bulk: Lanes<K, T>,
    wire: Wire<T>,
    spare: Vec<Vec<u8>>,
}

impl<K: PartialEq, T: Copy> Output<K, T> {
    pub(super) fn new(version: u16) -> Self {
        let (urgent, bulk) = (Lanes::default(), Lanes::default());
        let (pieces, ends) = (VecDeque::new(), VecDeque::new());
        let wire = Wire { pieces, front_sent: 0, queued: 0, sent: 0, ends };
        Self { version, urgent, bulk, wire, spare: Vec::new() }
    }

    /// From now on, frames carry this version.
    pub(super) fn set_version(&mut self, version: u16) {
        self.version = version;
    }

    /// A buffer with room for a header; the control part is to be appended.
    pub(super) fn buffer(&mut self) -> Vec<u8> {
        buffer(&mut self.spare)
    }

    /// Queues a message behind those of the same lane.
    pub(super) fn push(&mut self, urgent: bool, lane: K, message: Outgoing<T>) {
        let lanes = if urgent { &mut self.urgent } else { &mut self.bulk };
        lanes.push(lane, message);
    }

    /// Bytes handed over and not sent.
    pub(super) fn unsent(&self) -> usize {
        self.wire.unsent()
    }

    /// Whether nothing is left to be sent.
    pub(super) fn is_empty(&self) -> bool {
        self.unsent() == 0 && self.urgent.all.is_empty() && self.bulk.all.is_empty()
    }

    /// Hands frames over until a batch is full. `admit` judges (urgent or not) the messages of which
    /// nothing was sent yet.
    pub(super) fn fill(&mut self, mut admit: impl FnMut(bool, &T) -> bool) {
        while self.wire.unsent() < BATCH_BYTES {
            let Self { version, urgent, bulk, wire, spare } = self;
            let mut one = |is_urgent: bool, message: &mut Outgoing<T>| {
                if !message.started() && !admit(is_urgent, message.tag()) {
                    return None;
                }
                let last = message.frame(*version, spare, wire);
                if last {
                    wire.ends.push_back((wire.queued, message.tag));
                }
                Some(last)
            };
            let taken = urgent.take(|message| one(true, message))
                || bulk.take(|message| one(false, message));
            if !taken {
                return;
            }
        }
    }

    /// Drops waiting messages that are not to be kept. One that was started must be, unless the
    /// connection is given up.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&Outgoing<T>) -> bool) {
        self.urgent.retain(&mut keep);
        self.bulk.retain(&mut keep);
    }

    /// Drops what was handed over, as the connection is given up.
    pub(super) fn clear_wire(&mut self) {
        self.wire.pieces.clear();
        self.wire.ends.clear();
        self.wire.front_sent = 0;
        self.wire.sent = self.wire.queued;
    }

    /// Fills `slices` from the front; returns how many.
    pub(super) fn gather<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut skip = self.wire.front_sent;
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(&self.wire.pieces) {
            *slice = IoSlice::new(&piece.as_slice()[skip..]);
            skip = 0;
            count += 1;
        }
        count
    }

    /// Takes note that `len` bytes were sent; `ended` gets whose messages are complete.
    pub(super) fn advance(&mut self, len: usize, mut ended: impl FnMut(T)) {
        let wire = &mut self.wire;
        wire.sent += len as u64;
        let mut left = len + wire.front_sent;
        while let Some(front) = wire.pieces.front() {
            let piece_len = front.as_slice().len();
            if left < piece_len {
                break;
            }
            left -= piece_len;
            if let Some(Piece::Head(head)) = wire.pieces.pop_front()
                && self.spare.len() < SPARE_MAX
                && head.capacity() <= SPARE_BYTES_MAX
            {
                self.spare.push(head);
            }
        }
        wire.front_sent = left;
        while let Some(&(end, tag)) = wire.ends.front()
            && end <= wire.sent
        {
            wire.ends.pop_front();
            ended(tag);
        }
    }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromBytes;

    use super::*;

    fn message(output: &mut Output<u8, u64>, id: u64, payload: usize) -> Outgoing<u64> {
        let head = output.buffer();
        let payload = (Payload::One(Bytes::from(vec![0; payload])), false);
        Outgoing::new((Kind::Request, 1, id), head, payload, id)
    }

    /// Sends everything; the ids of the frames in the order they were sent.
    fn drain(output: &mut Output<u8, u64>, admit: impl Fn(&u64) -> bool) -> Vec<u64> {
        let mut ids = Vec::new();
        loop {
            output.fill(|_, tag| admit(tag));
            let mut slices = [IoSlice::new(&[]); 64];
            let count = output.gather(&mut slices);
            let bytes: Vec<u8> = slices[..count].iter().flat_map(|s| s.iter().copied()).collect();
            if bytes.is_empty() {
                return ids;
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let header = FrameHeader::read_from_prefix(rest).expect("48 bytes").0;
                ids.push(header.id.get());
                let len = header.control_len.get() + header.payload_len.get();
                rest = &rest[FRAME_HEADER_BYTES + len as usize..];
            }
            output.advance(bytes.len(), |_| ());
        }
    }

    #[test]
    fn urgent_first_lanes_in_turn_and_order_within_a_lane() {
        let mut output: Output<u8, u64> = Output::new(1);
        let (long, short) = (3 * RPC_FRAME_BYTES_MAX, 4096);
        for (lane, id, len) in [(0, 1, long), (0, 2, short), (1, 3, long), (1, 4, short)] {
            let message = message(&mut output, id, len);
            output.push(false, lane, message);
        }
        output.fill(|_, _| true);
        // The batch is full: what comes now waits for it, but for nothing else.
        let probe = message(&mut output, 9, 0);
        output.push(true, 0, probe);
        assert_eq!(drain(&mut output, |_| true), [1, 3, 9, 1, 3, 1, 3, 2, 4]);
        assert!(output.is_empty());
    }

    #[test]
    fn a_lane_that_may_not_send_does_not_hold_others() {
        let mut output: Output<u8, u64> = Output::new(1);
        for (lane, id) in [(0, 1), (0, 2), (1, 3)] {
            let message = message(&mut output, id, 10);
            output.push(false, lane, message);
        }
        assert_eq!(drain(&mut output, |id| *id != 1), [3], "2 may not overtake 1");
        assert_eq!(drain(&mut output, |_| true), [1, 2]);
    }
}
