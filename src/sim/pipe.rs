//! A connection in memory with the faults that networks have: it is slow, it takes little at a time, it
//! is cut in the middle of a byte stream, it holds everything back, it changes a bit.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::env::Env;

/// Bytes that a direction holds.
const CAPACITY: usize = 256 << 10;

/// What happens to the bytes of a connection, in both directions.
#[derive(Default)]
pub struct PipeFaults {
    /// Bytes take so long.
    pub delay: Cell<Duration>,
    /// What goes to an end takes so much longer, by end.
    late: [Cell<Duration>; 2],
    /// The connection is cut once so many bytes were written, by either side.
    pub cut_after: Cell<Option<u64>>,
    /// The bit of the byte with this number is flipped.
    pub flip_at: Cell<Option<u64>>,
    /// A write takes at most so many bytes; a random number below if there is randomness.
    pub write_max: Cell<Option<usize>>,
    /// Where the randomness comes from.
    env: Option<Env>,
    /// Nothing arrives, by end.
    held: [Cell<bool>; 2],
    written: Cell<u64>,
    broken: Cell<bool>,
    wakers: RefCell<Vec<Waker>>,
}

impl PipeFaults {
    /// None yet; what is random comes from `env`.
    pub fn random(env: Env) -> Self {
        Self { env: Some(env), ..Self::default() }
    }

    /// Breaks the connection: what is under way is lost, both sides get errors.
    pub fn cut(&self) {
        self.broken.set(true);
        self.wake();
    }

    /// Holds everything back, or lets it pass again.
    pub fn hold(&self, held: bool) {
        self.held.iter().for_each(|end| end.set(held));
        self.wake();
    }

    /// Holds back what goes to one end, the first (0) or the second (1) of [`pipe`], or lets it pass
    /// again.
    pub fn hold_to(&self, end: usize, held: bool) {
        self.held[end].set(held);
        self.wake();
    }

    /// What goes to one end, the first (0) or the second (1) of [`pipe`], takes so much longer from now on.
    pub fn delay_to(&self, end: usize, late: Duration) {
        self.late[end].set(late);
    }

    /// Whether it was cut.
    pub fn is_broken(&self) -> bool {
        self.broken.get()
    }

    /// Bytes written so far, by both sides.
    pub fn written(&self) -> u64 {
        self.written.get()
    }

    fn wake(&self) {
        self.wakers.take().into_iter().for_each(Waker::wake);
    }

    fn wait(&self, cx: &Context<'_>) {
        let mut wakers = self.wakers.borrow_mut();
        if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            wakers.push(cx.waker().clone());
        }
    }

    fn check(&self) -> io::Result<()> {
        if self.broken.get() { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }
}

/// One direction.
#[derive(Default)]
struct Half {
    /// What was written, with the time at which it arrives, and what was read of the first.
    queue: VecDeque<(Instant, Vec<u8>)>,
    read: usize,
    bytes: usize,
    /// The writer closed it.
    closed: bool,
    /// The reader is gone.
    deaf: bool,
}

/// One end of a connection.
pub struct PipeEnd {
    number: usize,
    input: Rc<RefCell<Half>>,
    output: Rc<RefCell<Half>>,
    faults: Rc<PipeFaults>,
    timer: Option<Pin<Box<Sleep>>>,
}

/// A connection with these faults.
pub fn pipe(faults: &Rc<PipeFaults>) -> (PipeEnd, PipeEnd) {
    let (one, other) = (Rc::<RefCell<Half>>::default(), Rc::<RefCell<Half>>::default());
    let end = |number, input: &Rc<RefCell<Half>>, output: &Rc<RefCell<Half>>| PipeEnd {
        number,
        input: input.clone(),
        output: output.clone(),
        faults: faults.clone(),
        timer: None,
    };
    (end(0, &one, &other), end(1, &other, &one))
}

impl Drop for PipeEnd {
    fn drop(&mut self) {
        self.output.borrow_mut().closed = true;
        self.input.borrow_mut().deaf = true;
        self.faults.wake();
    }
}

impl AsyncRead for PipeEnd {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.faults.check()?;
        let mut half = this.input.borrow_mut();
        let half = &mut *half;
        this.faults.wait(cx);
        if this.faults.held[this.number].get() {
            return Poll::Pending;
        }
        let Some((arrival, _)) = half.queue.front() else {
            return if half.closed { Poll::Ready(Ok(())) } else { Poll::Pending };
        };
        if *arrival > Instant::now() {
            let mut timer = Box::pin(sleep_until(*arrival));
            let waits = timer.as_mut().poll(cx).is_pending();
            this.timer = Some(timer);
            if waits {
                return Poll::Pending;
            }
        }
        while let Some((arrival, data)) = half.queue.front()
            && *arrival <= Instant::now()
            && buf.remaining() > 0
        {
            let rest = &data[half.read..];
            let len = rest.len().min(buf.remaining());
            buf.put_slice(&rest[..len]);
            half.read += len;
            half.bytes -= len;
            if half.read == data.len() {
                half.queue.pop_front();
                half.read = 0;
            }
        }
        this.faults.wake();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for PipeEnd {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let faults = &self.faults;
        faults.check()?;
        let mut half = self.output.borrow_mut();
        if half.closed || half.deaf {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let mut room = CAPACITY.saturating_sub(half.bytes);
        if room == 0 {
            faults.wait(cx);
            return Poll::Pending;
        }
        if let Some(most) = faults.write_max.get() {
            let most = most.max(1);
            let some = faults.env.as_ref().map_or(most, |env| {
                1 + usize::try_from(env.random_below(most as u64)).unwrap_or(0)
            });
            room = room.min(some);
        }
        let mut data: Vec<u8> =
            bufs.iter().flat_map(|buf| buf.iter().copied()).take(room).collect();
        let begin = faults.written.get();
        let end = begin + data.len() as u64;
        if let Some(at) = faults.flip_at.get()
            && (begin..end).contains(&at)
            && let Ok(index) = usize::try_from(at - begin)
        {
            data[index] ^= 1 << (at % 8);
        }
        faults.written.set(end);
        let len = data.len();
        if let Some(cut) = faults.cut_after.get()
            && end >= cut
        {
            faults.cut();
            return Poll::Ready(Ok(len));
        }
        half.bytes += len;
        let takes = faults.delay.get() + faults.late[1 - self.number].get();
        half.queue.push_back((Instant::now() + takes, data));
        faults.wake();
        Poll::Ready(Ok(len))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.faults.check())
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.output.borrow_mut().closed = true;
        self.faults.wake();
        Poll::Ready(Ok(()))
    }
}
