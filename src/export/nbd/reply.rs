//! Replies on their way to the socket, gathered into few vectored writes without copying data.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::Bytes;

use super::wire::REPLY_HEADER_BYTES_MAX;

/// A part of the stream.
enum Piece {
    /// A header, stored in place: no allocation.
    Header { bytes: [u8; REPLY_HEADER_BYTES_MAX], len: u8 },
    /// Data shared with the target.
    Data(Bytes),
}

impl Piece {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Header { bytes, len } => &bytes[..usize::from(*len)],
            Self::Data(data) => data,
        }
    }
}

/// The bytes to send, and what becomes free when they were sent.
///
/// Invariant: no piece is empty; the first `front_sent` bytes of the first piece were sent.
#[derive(Default)]
pub(super) struct ReplyQueue {
    pieces: VecDeque<Piece>,
    front_sent: usize,
    /// Bytes ever queued and ever sent.
    queued: u64,
    sent: u64,
    /// Charge of each reply, with the value of `queued` at its end.
    charges: VecDeque<(u64, usize)>,
}

impl ReplyQueue {
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Queues a header of at most [`REPLY_HEADER_BYTES_MAX`] bytes.
    pub(super) fn push_header(&mut self, header: &[u8]) {
        let mut bytes = [0; REPLY_HEADER_BYTES_MAX];
        bytes[..header.len()].copy_from_slice(header);
        self.queued += header.len() as u64;
        let len = u8::try_from(header.len()).expect("a header is shorter than 256 bytes");
        self.pieces.push_back(Piece::Header { bytes, len });
    }

    /// Queues data.
    pub(super) fn push_data(&mut self, data: Bytes) {
        if !data.is_empty() {
            self.queued += data.len() as u64;
            self.pieces.push_back(Piece::Data(data));
        }
    }

    /// Ends a reply: `charge` is returned by [`ReplyQueue::advance`] once all of it was sent.
    pub(super) fn push_charge(&mut self, charge: usize) {
        self.charges.push_back((self.queued, charge));
    }

    /// Fills `slices` from the front; returns how many.
    pub(super) fn gather<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut skip = self.front_sent;
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            *slice = IoSlice::new(&piece.as_slice()[skip..]);
            skip = 0;
            count += 1;
        }
        count
    }

    /// Takes note that `len` bytes were sent; `release` gets the charge of each reply that is
    /// complete.
    pub(super) fn advance(&mut self, len: usize, mut release: impl FnMut(usize)) {
        self.sent += len as u64;
        let mut left = len + self.front_sent;
        while let Some(front) = self.pieces.front() {
            let piece_len = front.as_slice().len();
            if left < piece_len {
                break;
            }
            left -= piece_len;
            self.pieces.pop_front();
        }
        self.front_sent = left;
        while let Some(&(end, charge)) = self.charges.front()
            && end <= self.sent
        {
            self.charges.pop_front();
            release(charge);
        }
    }

    /// Drops everything, as when the peer is gone.
    pub(super) fn clear(&mut self, release: impl FnMut(usize)) {
        let unsent: usize = self.pieces.iter().map(|piece| piece.as_slice().len()).sum();
        self.advance(unsent - self.front_sent, release);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever the sizes of replies and writes: the same bytes, and each charge exactly
        /// when the last byte of its reply was sent.
        #[test]
        fn stream_and_charges_are_kept(
            replies in prop::collection::vec((1_usize..=REPLY_HEADER_BYTES_MAX, 0_usize..100), 1..20),
            writes in prop::collection::vec(1_usize..200, 1..200),
        ) {
            let mut queue = ReplyQueue::default();
            let mut expected = Vec::new();
            let mut ends = Vec::new();
            for (i, &(header, data)) in replies.iter().enumerate() {
                let fill = u8::try_from(i).unwrap();
                queue.push_header(&vec![fill; header]);
                queue.push_data(Bytes::from(vec![fill | 0x80; data]));
                queue.push_charge(i);
                expected.extend(vec![fill; header]);
                expected.extend(vec![fill | 0x80; data]);
                ends.push(expected.len());
            }
            let mut sent = Vec::new();
            let mut released = Vec::new();
            for write in writes {
                let mut slices = [IoSlice::new(&[]); 3];
                let count = queue.gather(&mut slices);
                let bytes: Vec<u8> =
                    slices[..count].iter().flat_map(|slice| slice.iter().copied()).take(write).collect();
                sent.extend_from_slice(&bytes);
                queue.advance(bytes.len(), |charge| released.push(charge));
                let due: Vec<usize> = (0..ends.len()).filter(|&i| ends[i] <= sent.len()).collect();
                prop_assert_eq!(&released, &due);
            }
            prop_assert_eq!(&sent[..], &expected[..sent.len()]);
            queue.clear(|charge| released.push(charge));
            prop_assert_eq!(released.len(), replies.len());
            prop_assert!(queue.is_empty());
        }
    }
}
