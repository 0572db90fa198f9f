//! One connection's stream with what comes in; both sides drive it from one task.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite};

use super::frame::Violation;
use super::input::{Input, Receive};
use super::output::Output;

/// Pieces (headers and data) of one vectored write.
const GATHER_PIECES: usize = 128;

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub enum LinkEnd {
    /// The peer closed it.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer closed it in the middle of a message.
    #[error("the connection ended in the middle of a message")]
    Truncated,
    /// It broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// The peer broke the protocol.
    #[error("the peer broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The peer said goodbye.
    #[error("the peer closes the connection: {0}")]
    Goodbye(String),
    /// Nothing was heard, or nothing was taken, for too long.
    #[error("the peer has been silent for {0:?}")]
    Silent(std::time::Duration),
    /// A newer connection of the same peer has taken its place.
    #[error("a newer connection has its place")]
    Replaced,
    /// This side is stopping.
    #[error("this side is stopping")]
    Stopped,
}

/// A stream and its input.
pub(super) struct Link<S, M> {
    stream: S,
    input: Input<M>,
    unflushed: bool,
    /// Bytes ever received and sent.
    pub(super) received: u64,
    pub(super) sent: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin, M> Link<S, M> {
    pub(super) fn new(stream: S, version: u16) -> Self {
        Self { stream, input: Input::new(version), unflushed: false, received: 0, sent: 0 }
    }

    /// Reads once and takes up what came. True if anything did.
    pub(super) fn poll_input(
        &mut self,
        cx: &mut Context<'_>,
        receiver: &mut impl Receive<Message = M>,
    ) -> Result<bool, LinkEnd> {
        match self.input.poll_fill(&mut self.stream, cx) {
            Poll::Pending => Ok(false),
            Poll::Ready(Ok(0)) if self.input.is_partial() => Err(LinkEnd::Truncated),
            Poll::Ready(Ok(0)) => Err(LinkEnd::Closed),
            Poll::Ready(Ok(len)) => {
                self.received += len as u64;
                self.input.take_up(receiver)?;
                Ok(true)
            }
            Poll::Ready(Err(error)) => Err(error.into()),
        }
    }

    /// Writes once what was handed over, or flushes. True if anything happened.
    pub(super) fn poll_output<K: PartialEq, T: Copy>(
        &mut self,
        cx: &mut Context<'_>,
        output: &mut Output<K, T>,
        ended: impl FnMut(T),
    ) -> Result<bool, LinkEnd> {
        if output.unsent() == 0 {
            if self.unflushed && Pin::new(&mut self.stream).poll_flush(cx)?.is_ready() {
                self.unflushed = false;
            }
            return Ok(false);
        }
        let mut slices = [IoSlice::new(&[]); GATHER_PIECES];
        let count = output.gather(&mut slices);
        match Pin::new(&mut self.stream).poll_write_vectored(cx, &slices[..count])? {
            Poll::Pending => Ok(false),
            Poll::Ready(0) => Err(io::Error::from(io::ErrorKind::WriteZero).into()),
            Poll::Ready(len) => {
                self.unflushed = true;
                self.sent += len as u64;
                output.advance(len, ended);
                Ok(true)
            }
        }
    }

    /// Whether all that was written has left.
    pub(super) fn is_flushed(&self) -> bool {
        !self.unflushed
    }

    /// The stream, before frames pass.
    pub(super) fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    /// The stream, for its end.
    pub(super) fn into_stream(self) -> S {
        self.stream
    }
}
