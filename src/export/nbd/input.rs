//! The stream of requests: few reads of the socket for many small requests, and large payloads
//! straight into the aligned buffer that travels down to the disk.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use tokio::io::{AsyncRead, ReadBuf};
use zerocopy::FromBytes;

use super::request::{Connection, Failure, Request};
use super::session::SessionError;
use super::wire::{Command, Errno, REQUEST_HEADER_BYTES, REQUEST_MAGIC, RequestHeader};
use crate::buffer::AlignedBuf;
use crate::limits::REQUEST_BYTES_MAX;

/// Bytes asked of the socket in one read. The buffer comes from the thread's pool and is returned
/// when the connection has nothing to say.
const INPUT_BYTES: usize = 128 << 10;
/// A payload of which at least this much is missing is received in place.
const DIRECT_BYTES_MIN: usize = 32 << 10;
/// The payload of a refused write is skipped up to this size; beyond, the connection is closed.
const SKIP_BYTES_MAX: usize = 2 * REQUEST_BYTES_MAX;

/// What the next bytes are.
enum Next {
    Header,
    /// A whole header was read; the request waits for its permit.
    Permit(Request),
    Payload {
        request: Request,
        buf: AlignedBuf,
        filled: usize,
    },
    /// Payload of a refused write.
    Skip {
        request: Request,
        failure: Failure,
        left: usize,
    },
    /// Nothing more is read.
    End,
}

/// What is to be done with the input.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Read more.
    Starved,
    /// Wait for a permit.
    Blocked,
    /// The client said goodbye.
    Disconnected,
}

/// State of the input of one connection.
///
/// Invariant: `start <= end`; `buffer[start .. end]` was received and not yet used; without a
/// buffer both are zero.
pub(super) struct Input {
    buffer: Option<AlignedBuf>,
    start: usize,
    end: usize,
    next: Next,
    /// The last payload was received in place: expect another, and read its header alone.
    large: bool,
}

impl Input {
    pub(super) fn new() -> Self {
        Self { buffer: None, start: 0, end: 0, next: Next::Header, large: false }
    }

    /// Whether a request was begun and its rest is missing.
    pub(super) fn is_partial(&self) -> bool {
        match self.next {
            Next::Header => self.start < self.end,
            Next::Payload { .. } | Next::Skip { .. } => true,
            Next::Permit(_) | Next::End => false,
        }
    }

    /// Drops what was received and takes no more.
    pub(super) fn end(&mut self) {
        *self = Self { next: Next::End, ..Self::new() };
    }

    /// Takes up all requests that were received, as far as there are permits; `start` gets those
    /// that are to be carried out, with their payload.
    pub(super) fn take_up(
        &mut self,
        connection: &Connection,
        cx: &Context<'_>,
        mut start: impl FnMut(Request, Bytes),
    ) -> Result<Step, SessionError> {
        loop {
            match std::mem::replace(&mut self.next, Next::End) {
                Next::End => return Ok(Step::Disconnected),
                Next::Header => {
                    let Some(request) = self.header()? else {
                        self.next = Next::Header;
                        return Ok(Step::Starved);
                    };
                    if request.command == Ok(Command::Disconnect) {
                        return Ok(Step::Disconnected);
                    }
                    self.next = Next::Permit(request);
                }
                Next::Permit(request) => {
                    self.next = permit(request, connection, cx, &mut start)?;
                    if let Next::Permit(_) = self.next {
                        return Ok(Step::Blocked);
                    }
                }
                Next::Payload { request, mut buf, mut filled } => {
                    let missing = buf.len() - filled;
                    let data = self.received(missing);
                    buf[filled..filled + data.len()].copy_from_slice(data);
                    let used = data.len();
                    self.start += used;
                    filled += used;
                    if filled < buf.len() {
                        self.next = Next::Payload { request, buf, filled };
                        return Ok(Step::Starved);
                    }
                    start(request, buf.freeze());
                    self.next = Next::Header;
                }
                Next::Skip { request, failure, left } => {
                    let used = self.received(left).len();
                    self.start += used;
                    if used < left {
                        self.next = Next::Skip { request, failure, left: left - used };
                        return Ok(Step::Starved);
                    }
                    connection.refuse(&request, &failure);
                    self.next = Next::Header;
                }
            }
        }
    }

    /// Reads from the socket once; `Ok(0)` at its end.
    pub(super) fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if let Next::Payload { buf, filled, .. } = &mut self.next
                && buf.len() - *filled >= DIRECT_BYTES_MIN
            {
                self.large = true;
                let mut target = ReadBuf::new(&mut buf[*filled..]);
                ready!(Pin::new(stream).poll_read(cx, &mut target))?;
                let len = target.filled().len();
                *filled += len;
                return Poll::Ready(Ok(len));
            }
        }
        let mut buffer = self.buffer.take().unwrap_or_else(|| AlignedBuf::new(INPUT_BYTES));
        if self.start > 0 {
            buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let header_alone = self.large && matches!(self.next, Next::Header);
        let limit = if header_alone { REQUEST_HEADER_BYTES } else { INPUT_BYTES };
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

    /// At most `max` of the bytes that were received.
    fn received(&self, max: usize) -> &[u8] {
        let end = self.end.min(self.start.saturating_add(max));
        self.buffer.as_ref().map_or(&[], |buffer| &buffer[self.start..end])
    }

    fn header(&mut self) -> Result<Option<Request>, SessionError> {
        let Ok(header) = RequestHeader::read_from_bytes(self.received(REQUEST_HEADER_BYTES)) else {
            return Ok(None);
        };
        if header.magic.get() != REQUEST_MAGIC {
            return Err(SessionError::Magic(header.magic.get()));
        }
        self.start += REQUEST_HEADER_BYTES;
        let request = Request::new(&header);
        let payload = usize::try_from(request.payload_bytes()).unwrap_or(usize::MAX);
        self.large &= payload >= DIRECT_BYTES_MIN;
        Ok(Some(request))
    }
}

/// Judges a request and takes its permit. The next state: [`Next::Permit`] again if there is no
/// permit.
fn permit(
    request: Request,
    connection: &Connection,
    cx: &Context<'_>,
    start: &mut impl FnMut(Request, Bytes),
) -> Result<Next, SessionError> {
    let verdict = if connection.stopping.get() {
        Err(Failure::new(Errno::Shutdown, "the server is stopping"))
    } else {
        request.check(connection)
    };
    let payload = usize::try_from(request.payload_bytes()).unwrap_or(usize::MAX);
    if payload > SKIP_BYTES_MAX {
        return Err(SessionError::TooLarge(request.payload_bytes()));
    }
    let charge = if verdict.is_ok() { request.charge() } else { 0 };
    if !connection.permits.acquire(charge, cx) {
        return Ok(Next::Permit(request));
    }
    Ok(match verdict {
        Ok(_) if payload > 0 => Next::Payload { request, buf: AlignedBuf::new(payload), filled: 0 },
        Ok(_) => {
            start(request, Bytes::new());
            Next::Header
        }
        Err(failure) => Next::Skip { request, failure, left: payload },
    })
}
