//! The transmission phase of one connection, in one task: take requests up, run them
//! concurrently, send their replies.
//!
//! # Invariants
//! - Memory is bounded: each request holds a permit from its header to the last byte of its
//!   reply; without a permit the socket is not read.
//! - Requests run as parts of this task, without a task of their own; whatever is ready is taken
//!   up, run and sent together, so that a queue of small requests costs few system calls.
//! - A session that ends (goodbye, broken stream, stopping server) lets its running requests
//!   finish, for a bounded time.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep, sleep_until};

use super::input::{Input, Step};
use super::request::{Connection, Request, execute};

/// Pieces (headers and data) of one vectored write.
const GATHER_PIECES: usize = 128;

/// How a session ended well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The client said goodbye.
    Disconnected,
    /// The client closed the connection without goodbye.
    Closed,
    /// The server is stopping.
    Stopped,
}

/// Why a session failed; the connection is closed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    #[error("the connection ended in the middle of a request")]
    Truncated,
    #[error("garbage instead of a request: {0:#010x}")]
    Magic(u32),
    #[error("a write of {0} bytes")]
    TooLarge(u32),
    #[error("no progress in the middle of a request for {0:?}")]
    Stalled(Duration),
    #[error("replies were not taken for {0:?}, and others wait for their memory")]
    NotTaken(Duration),
}

/// How long a session waits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// For the rest of a request that was begun.
    pub(super) stall: Duration,
    /// For running requests after the end.
    pub(super) drain: Duration,
}

struct Session<'a, S> {
    stream: &'a mut S,
    connection: Rc<Connection>,
    patience: Patience,
    input: Input,
    /// Runs while a request is incomplete or replies are unsent; `progressed` tells that bytes
    /// came or went since it was set.
    stall: Option<Pin<Box<Sleep>>>,
    progressed: bool,
    /// How the session ends once what runs has finished, and when it stops waiting for that.
    end: Option<Result<End, SessionError>>,
    deadline: Option<Pin<Box<Sleep>>>,
    /// Bytes were written and not flushed.
    unflushed: bool,
    /// Nothing can be sent any more.
    deaf: bool,
}

/// Serves requests until the client or the server (when `stop` completes) ends the session.
pub(super) async fn serve<S>(
    stream: &mut S,
    connection: Rc<Connection>,
    patience: Patience,
    stop: impl Future<Output = ()>,
) -> Result<End, SessionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut session = Session {
        stream,
        connection,
        patience,
        input: Input::new(),
        stall: None,
        progressed: false,
        end: None,
        deadline: None,
        unflushed: false,
        deaf: false,
    };
    let mut running = pin!(FuturesUnordered::new());
    let mut stop = pin!(stop);
    poll_fn(|cx| {
        if !session.connection.stopping.get() && stop.as_mut().poll(cx).is_ready() {
            session.connection.stopping.set(true);
            session.expire();
        }
        session.poll(cx, running.as_mut(), &execute)
    })
    .await
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<'_, S> {
    fn poll<F: Future<Output = ()>>(
        &mut self,
        cx: &mut Context<'_>,
        mut running: Pin<&mut FuturesUnordered<F>>,
        execute: &impl Fn(Rc<Connection>, Request, Bytes) -> F,
    ) -> Poll<Result<End, SessionError>> {
        loop {
            let connection = Rc::clone(&self.connection);
            let mut progress = self.poll_input(cx, |request, payload| {
                running.push(execute(Rc::clone(&connection), request, payload));
            });
            while let Poll::Ready(Some(())) = running.as_mut().poll_next(cx) {
                progress = true;
            }
            progress |= self.poll_output(cx);
            let idle = running.is_empty() && self.connection.replies.borrow().is_empty();
            if idle && !self.unflushed {
                if let Some(end) = self.end.take() {
                    return Poll::Ready(end);
                }
                if connection.stopping.get() {
                    return Poll::Ready(Ok(End::Stopped));
                }
            }
            if !progress {
                return self.poll_timers(cx);
            }
        }
    }

    /// Reads and takes up requests; true if anything happened.
    fn poll_input(&mut self, cx: &mut Context<'_>, mut start: impl FnMut(Request, Bytes)) -> bool {
        if self.end.is_some() {
            return false;
        }
        let taken = match self.input.take_up(&self.connection, cx, &mut start) {
            Ok(Step::Blocked) => return false,
            Ok(Step::Starved) => self.input.poll_fill(self.stream, cx),
            Ok(Step::Disconnected) => return self.finish(Ok(End::Disconnected)),
            Err(error) => return self.finish(Err(error)),
        };
        match taken {
            Poll::Pending => false,
            Poll::Ready(Ok(0)) if self.input.is_partial() => {
                self.finish(Err(SessionError::Truncated))
            }
            Poll::Ready(Ok(0)) => self.finish(Ok(End::Closed)),
            Poll::Ready(Ok(_)) => {
                self.progressed = true;
                true
            }
            Poll::Ready(Err(error)) => self.finish(Err(error.into())),
        }
    }

    /// Sends what is queued; true if anything happened.
    fn poll_output(&mut self, cx: &mut Context<'_>) -> bool {
        let mut progress = false;
        loop {
            let connection = Rc::clone(&self.connection);
            let mut replies = connection.replies.borrow_mut();
            if self.deaf {
                replies.clear(|charge| connection.permits.release(charge));
                return progress;
            }
            let polled = if replies.is_empty() {
                if !self.unflushed {
                    return progress;
                }
                Pin::new(&mut *self.stream).poll_flush(cx).map_ok(|()| None)
            } else {
                let mut slices = [IoSlice::new(&[]); GATHER_PIECES];
                let count = replies.gather(&mut slices);
                Pin::new(&mut *self.stream).poll_write_vectored(cx, &slices[..count]).map_ok(Some)
            };
            match polled {
                Poll::Pending => return progress,
                Poll::Ready(Ok(None)) => self.unflushed = false,
                Poll::Ready(Ok(Some(0))) => self.go_deaf(io::ErrorKind::WriteZero.into()),
                Poll::Ready(Ok(Some(sent))) => {
                    self.unflushed = true;
                    self.progressed = true;
                    replies.advance(sent, |charge| connection.permits.release(charge));
                }
                Poll::Ready(Err(error)) => self.go_deaf(error),
            }
            progress = true;
        }
    }

    fn go_deaf(&mut self, error: io::Error) {
        self.deaf = true;
        self.unflushed = false;
        self.finish(Err(error.into()));
    }

    /// Ends the session with this result unless it has one. Always true.
    fn finish(&mut self, end: Result<End, SessionError>) -> bool {
        self.input.end();
        if self.end.is_none() {
            self.end = Some(end);
            self.expire();
        }
        true
    }

    fn expire(&mut self) {
        let deadline = Instant::now() + self.patience.drain;
        self.deadline.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
    }

    fn poll_timers(&mut self, cx: &mut Context<'_>) -> Poll<Result<End, SessionError>> {
        if let Some(deadline) = &mut self.deadline {
            ready!(deadline.as_mut().poll(cx));
            tracing::warn!("requests of a closing NBD connection are given up: they take too long");
            return Poll::Ready(self.end.take().unwrap_or(Ok(End::Stopped)));
        }
        let partial = self.input.is_partial();
        if !partial && self.connection.replies.borrow().is_empty() {
            return Poll::Pending;
        }
        loop {
            let patience = self.patience.stall;
            let stall = self.stall.get_or_insert_with(|| {
                self.progressed = false;
                Box::pin(sleep_until(Instant::now() + patience))
            });
            ready!(stall.as_mut().poll(cx));
            self.stall = None;
            if !self.progressed && partial {
                return Poll::Ready(Err(SessionError::Stalled(patience)));
            }
            if !self.progressed && self.connection.permits.contended() {
                return Poll::Ready(Err(SessionError::NotTaken(patience)));
            }
        }
    }
}
