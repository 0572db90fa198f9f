//! Frames as they come in: few reads of the socket for many small ones, and large payloads straight
//! into the aligned buffer that travels on to the disk.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::{AsyncRead, ReadBuf};
use zerocopy::FromBytes;

use super::frame::{FRAME_HEADER_BYTES, FrameHeader, Kind, Violation, flag};
use crate::buffer::AlignedBuf;
use crate::limits::RPC_CONTROL_BYTES_MAX;

/// Bytes asked of the socket in one read. The buffer comes from the thread's pool and is returned
/// when the peer has nothing to say.
const INPUT_BYTES: usize = 128 << 10;
/// Of the payload in a frame, at least so much must be missing to be received in place.
const DIRECT_BYTES_MIN: usize = 32 << 10;
/// What is read where a header and then a large payload are expected.
const HEAD_BYTES: usize = FRAME_HEADER_BYTES + 256;

const _: () = assert!(INPUT_BYTES >= FRAME_HEADER_BYTES + RPC_CONTROL_BYTES_MAX);

/// Who takes the messages.
pub(super) trait Receive {
    /// A message whose payload is still to come.
    type Message;

    /// Takes the first frame of a message, before memory is taken for its payload; or a frame that is
    /// complete in itself (none).
    fn parse(
        &mut self,
        kind: Kind,
        header: &FrameHeader,
        control: &[u8],
    ) -> Result<Option<Self::Message>, Violation>;

    /// Takes a message that is complete. The payload is aligned.
    fn deliver(&mut self, message: Self::Message, payload: Bytes) -> Result<(), Violation>;
}

/// A message of which some payload is there.
struct Part<M> {
    message: M,
    buf: AlignedBuf,
    filled: usize,
    /// Its frames carry checksums of the payload.
    checked: bool,
}

enum Next<M> {
    Header,
    Payload {
        id: u64,
        part: Part<M>,
        /// Where the payload of the frame begins and ends in the message's.
        begin: usize,
        end: usize,
        crc: Option<u32>,
    },
}

/// State of the input of one connection.
///
/// Invariant: `start <= end`; `buffer[start .. end]` was received and not yet used; without a
/// buffer both are zero.
pub(super) struct Input<M> {
    version: u16,
    buffer: Option<AlignedBuf>,
    start: usize,
    end: usize,
    next: Next<M>,
    /// Messages whose next frame is still to come, by id. As many as there may be requests.
    parts: BTreeMap<u64, Part<M>>,
    /// The last payload was received in place: expect another, and read its header alone.
    large: bool,
}

fn length(value: u32) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

impl<M> Input<M> {
    pub(super) fn new(version: u16) -> Self {
        let (next, parts) = (Next::Header, BTreeMap::new());
        Self { version, buffer: None, start: 0, end: 0, next, parts, large: false }
    }

    /// Takes up everything that was received.
    pub(super) fn take_up(
        &mut self,
        receiver: &mut impl Receive<Message = M>,
    ) -> Result<(), Violation> {
        loop {
            match std::mem::replace(&mut self.next, Next::Header) {
                Next::Header => {
                    let Some(next) = self.header(receiver)? else { return Ok(()) };
                    self.next = next;
                }
                Next::Payload { id, mut part, begin, end, crc } => {
                    let missing = end - part.filled;
                    let data = self.received(missing);
                    let used = data.len();
                    part.buf[part.filled..part.filled + used].copy_from_slice(data);
                    self.start += used;
                    part.filled += used;
                    if used < missing {
                        self.next = Next::Payload { id, part, begin, end, crc };
                        return Ok(());
                    }
                    if crc.is_some_and(|crc| crc32fast::hash(&part.buf[begin..end]) != crc) {
                        return Err(Violation::PayloadChecksum);
                    }
                    if end < part.buf.len() {
                        self.parts.insert(id, part);
                    } else {
                        receiver.deliver(part.message, part.buf.freeze())?;
                    }
                }
            }
        }
    }

    /// Judges the next frame's header and control part. None if they are not there yet.
    fn header(
        &mut self,
        receiver: &mut impl Receive<Message = M>,
    ) -> Result<Option<Next<M>>, Violation> {
        let received = self.received(FRAME_HEADER_BYTES + RPC_CONTROL_BYTES_MAX);
        let Ok((header, rest)) = FrameHeader::read_from_prefix(received) else {
            return Ok(None);
        };
        let kind = header.check(self.version)?;
        let control_len = length(header.control_len.get());
        let Some(control) = rest.get(..control_len) else { return Ok(None) };
        header.verify(control)?;
        let id = header.id.get();
        let begin = length(header.payload_at.get());
        let end = begin + length(header.payload_len.get());
        let total = length(header.payload_total.get());
        let part = if kind == Kind::More {
            let part = self.parts.remove(&id);
            let checked = payload_crc(&header).is_some();
            let fits = |part: &Part<M>| {
                part.filled == begin && part.buf.len() == total && part.checked == checked
            };
            part.filter(fits)
                .ok_or(Violation::Incoherent("more of a message that was not begun so"))?
        } else {
            // Pings are numbered for themselves, and may have the number of a message of which more is to come.
            let is_message = matches!(kind, Kind::Request | Kind::Reply);
            if is_message && self.parts.contains_key(&id) {
                return Err(Violation::Incoherent("a second message of the same id"));
            }
            let message = receiver.parse(kind, &header, control)?;
            self.start += FRAME_HEADER_BYTES + control_len;
            let Some(message) = message else { return Ok(Some(Next::Header)) };
            if total == 0 {
                receiver.deliver(message, Bytes::new())?;
                return Ok(Some(Next::Header));
            }
            let crc = payload_crc(&header);
            let buf = AlignedBuf::new(total);
            let part = Part { message, buf, filled: 0, checked: crc.is_some() };
            self.large &= end - begin >= DIRECT_BYTES_MIN;
            return Ok(Some(Next::Payload { id, part, begin, end, crc }));
        };
        self.start += FRAME_HEADER_BYTES;
        Ok(Some(Next::Payload { id, part, begin, end, crc: payload_crc(&header) }))
    }

    /// Reads from the socket once; `Ok(0)` at its end.
    pub(super) fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if let Next::Payload { part, end, .. } = &mut self.next
                && *end - part.filled >= DIRECT_BYTES_MIN
            {
                self.large = true;
                let mut target = ReadBuf::new(&mut part.buf[part.filled..*end]);
                ready!(Pin::new(stream).poll_read(cx, &mut target))?;
                let len = target.filled().len();
                part.filled += len;
                return Poll::Ready(Ok(len));
            }
        }
        let mut buffer = self.buffer.take().unwrap_or_else(|| AlignedBuf::new(INPUT_BYTES));
        if self.start > 0 {
            buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let head_alone = self.large && self.end < HEAD_BYTES && matches!(self.next, Next::Header);
        let limit = if head_alone { HEAD_BYTES } else { INPUT_BYTES };
        let mut target = ReadBuf::new(&mut buffer[self.end..limit]);
        let polled = Pin::new(stream).poll_read(cx, &mut target);
        let len = target.filled().len();
        self.end += len;
        if self.end > 0 {
            self.buffer = Some(buffer);
        }
        ready!(polled)?;
        Poll::Ready(Ok(len))
    }

    /// Whether the peer has begun something and not ended it.
    pub(super) fn is_partial(&self) -> bool {
        self.start < self.end || matches!(self.next, Next::Payload { .. }) || !self.parts.is_empty()
    }

    /// At most `max` of the bytes that were received.
    fn received(&self, max: usize) -> &[u8] {
        let end = self.end.min(self.start.saturating_add(max));
        self.buffer.as_ref().map_or(&[], |buffer| &buffer[self.start..end])
    }
}

fn payload_crc(header: &FrameHeader) -> Option<u32> {
    (header.flags & flag::PAYLOAD_CRC != 0).then(|| header.payload_crc.get())
}

#[cfg(test)]
mod tests {
    use std::io::IoSlice;
    use std::task::Waker;

    use super::*;
    use crate::limits::RPC_FRAME_BYTES_MAX;
    use crate::rpc::message::Payload;
    use crate::rpc::output::{Outgoing, Output};

    /// What came, in order.
    #[derive(Default)]
    struct Heard(Vec<(Kind, usize)>);

    impl Receive for Heard {
        type Message = Kind;

        fn parse(
            &mut self,
            kind: Kind,
            _: &FrameHeader,
            _: &[u8],
        ) -> Result<Option<Kind>, Violation> {
            if kind == Kind::Ping {
                self.0.push((kind, 0));
                return Ok(None);
            }
            Ok(Some(kind))
        }

        fn deliver(&mut self, kind: Kind, payload: Bytes) -> Result<(), Violation> {
            self.0.push((kind, payload.len()));
            Ok(())
        }
    }

    fn push(output: &mut Output<u8, u64>, kind: Kind, lane: u8, payload: usize) {
        let head = output.buffer();
        let payload = match payload {
            0 => Payload::Empty,
            len => Payload::One(Bytes::from(vec![7; len])),
        };
        let opcode = u16::from(kind == Kind::Request);
        let message = Outgoing::new((kind, opcode, 5), head, (payload, false), 5);
        output.push(kind == Kind::Ping, lane, message);
    }

    #[test]
    fn a_ping_may_have_the_number_of_a_message_of_which_more_is_to_come() {
        let mut output: Output<u8, u64> = Output::new(1);
        let long = 3 * RPC_FRAME_BYTES_MAX;
        push(&mut output, Kind::Request, 0, long);
        output.fill(|_, _| true);
        push(&mut output, Kind::Ping, 1, 0);
        let (mut input, mut heard) = (Input::new(1), Heard::default());
        let mut cx = Context::from_waker(Waker::noop());
        loop {
            output.fill(|_, _| true);
            let mut slices = [IoSlice::new(&[]); 64];
            let count = output.gather(&mut slices);
            let bytes: Vec<u8> = slices[..count].iter().flat_map(|s| s.iter().copied()).collect();
            if bytes.is_empty() {
                break;
            }
            let mut stream = &bytes[..];
            while !stream.is_empty() {
                assert!(matches!(input.poll_fill(&mut stream, &mut cx), Poll::Ready(Ok(1..))));
                input.take_up(&mut heard).expect("nothing is wrong");
            }
            output.advance(bytes.len(), |_| ());
        }
        assert_eq!(heard.0, [(Kind::Ping, 0), (Kind::Request, long)]);
    }
}
