//! One connection while it lasts: what came is given to who waits for it, what waits is sent, and
//! pings tell whether the other still lives.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, Sleep, sleep, timeout};

use super::Shared;
use crate::rpc::link::{Link, LinkEnd};
use crate::rpc::message::ReplyHead;
use crate::rpc::metrics::add;

/// How long a goodbye may take.
const FAREWELL: Duration = Duration::from_millis(200);

pub(super) struct Session<S> {
    shared: Rc<Shared>,
    link: Link<S, (u64, ReplyHead)>,
    timer: Pin<Box<Sleep>>,
    heard: Instant,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
    pub(super) fn new(shared: Rc<Shared>, stream: S, version: u16) -> Self {
        // The first ping is sent at once: it measures the way.
        let timer = Box::pin(sleep(Duration::ZERO));
        Self { shared, link: Link::new(stream, version), timer, heard: Instant::now() }
    }

    /// Moves frames until the connection is over.
    pub(super) async fn run(&mut self) -> LinkEnd {
        let end = poll_fn(|cx| self.poll(cx)).await;
        self.shared.state.borrow_mut().io = None;
        end
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<LinkEnd> {
        loop {
            match self.step(cx) {
                Err(end) => return Poll::Ready(end),
                Ok(true) => {}
                Ok(false) => {
                    if self.timer.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    if let Err(end) = self.ping() {
                        return Poll::Ready(end);
                    }
                }
            }
        }
    }

    /// Reads and writes once. True if anything happened.
    fn step(&mut self, cx: &mut Context<'_>) -> Result<bool, LinkEnd> {
        let metrics = &self.shared.metrics;
        let mut state = self.shared.state.borrow_mut();
        if state.io.as_ref().is_none_or(|io| !io.will_wake(cx.waker())) {
            state.io = Some(cx.waker().clone());
        }
        let (received, sent) = (self.link.received, self.link.sent);
        let heard = self.link.poll_input(cx, &mut *state)?;
        if heard {
            self.heard = Instant::now();
            add(&metrics.received_bytes, self.link.received - received);
        }
        if let Some(reason) = state.goodbye.take() {
            return Err(LinkEnd::Goodbye(reason));
        }
        state.fill();
        let wrote = self.link.poll_output(cx, &mut state.output, |_| ())?;
        if wrote {
            add(&metrics.sent_bytes, self.link.sent - sent);
        }
        if state.output.unsent() == 0 {
            state.sent_all();
        }
        Ok(heard || wrote)
    }

    fn ping(&mut self) -> Result<(), LinkEnd> {
        let config = &self.shared.config;
        let waits = !self.shared.state.borrow_mut().send_ping();
        if waits && self.heard.elapsed() >= config.silence {
            return Err(LinkEnd::Silent(config.silence));
        }
        self.timer.as_mut().reset(Instant::now() + config.ping_interval);
        Ok(())
    }

    /// Tells the other why, if that can be done at once, and closes.
    pub(super) async fn farewell(mut self, text: &str) {
        self.shared.goodbye(text);
        let last = poll_fn(|cx| {
            let mut state = self.shared.state.borrow_mut();
            loop {
                state.fill();
                match self.link.poll_output(cx, &mut state.output, |_| ()) {
                    Ok(true) => {}
                    Ok(false) if state.output.unsent() == 0 && self.link.is_flushed() => {
                        return Poll::Ready(());
                    }
                    Ok(false) => return Poll::Pending,
                    Err(_) => return Poll::Ready(()),
                }
            }
        });
        if timeout(FAREWELL, last).await.is_ok() {
            let mut stream = self.link.into_stream();
            // Whoever does not let us close in order is just left.
            drop(timeout(FAREWELL, stream.shutdown()).await);
        }
    }
}
