//! One `io_uring` of one core, driven by that core's tokio runtime.
//!
//! Requests of many tasks gather in the submission queue; the driver task, woken by the first of
//! them, runs after everything that was ready before it, and hands all of them to the kernel in
//! one system call, which also collects what has completed. An eventfd registered with the
//! runtime wakes the driver for completions. It is silenced while the driver itself collects
//! them, and is never read: each signal is an edge of its own.
//!
//! # Invariants
//!
//! - The memory and the file of a request stay in its slot from before it is queued until its
//!   completion was reaped, whether or not anyone still waits for it. A slot is not reused before.
//! - Dropping the ring waits for the requests under way; memory of those that do not return
//!   within [`DRAIN_ATTEMPTS`] waits is leaked, never given back.
//! - No waker is called and no payload dropped while the ring's state is borrowed.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::atomic::{Ordering, fence};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, opcode, squeue};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::buffer::AlignedBuf;

/// Entries of the submission queue: requests that one system call can submit.
const SUBMISSION_ENTRIES: u32 = 256;
/// Entries of the completion queue; what does not fit waits in the kernel.
const COMPLETION_ENTRIES: u32 = 1024;
/// Pieces of one vectored request, as the kernel limits them (`UIO_MAXIOV`).
pub(super) const IOVECS_MAX: usize = 1024;
/// Bytes of one request; the kernel stops a little below 2 GiB.
pub(super) const OPERATION_BYTES_MAX: usize = 1 << 30;
/// Waits of [`DRAIN_WAIT_MS`] for requests under way when the ring is dropped.
const DRAIN_ATTEMPTS: u32 = 50;
/// One such wait, milliseconds.
const DRAIN_WAIT_MS: u32 = 100;
/// Whether completions collected by the driver itself leave the eventfd alone. The check that no
/// completion slipped in between needs the kernel's side to be ordered fully, as on x86 it is.
const SILENCE_EVENTFD: bool = cfg!(target_arch = "x86_64");

/// What is asked of a file.
pub(super) enum Request {
    /// Fill the buffer from byte `start` on.
    Read { buf: AlignedBuf, start: usize },
    /// Write the pieces but for the first `skip` bytes.
    Write { data: Rc<[Bytes]>, skip: usize, durable: bool },
    /// `fdatasync`.
    Flush,
}

/// The ring failed or its runtime stopped: nothing is known of the request.
#[derive(Debug)]
pub(super) struct RingStopped;

#[derive(Default)]
struct Slot {
    held: Option<(Request, Rc<OwnedFd>)>,
    /// Kept when the slot is reused.
    iovecs: Vec<libc::iovec>,
    result: Option<i32>,
    waker: Option<Waker>,
    abandoned: bool,
}

struct State {
    uring: IoUring,
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// What found the submission queue full.
    backlog: VecDeque<squeue::Entry>,
    /// Requests whose completion was not reaped.
    in_flight: usize,
    stopped: bool,
}

/// An `io_uring` and the task that drives it.
pub struct Ring {
    state: RefCell<State>,
    driver: RefCell<Option<Waker>>,
    driver_woken: Cell<bool>,
}

impl Ring {
    /// Sets up a ring and spawns its driver. Must be called within a `LocalSet` of a
    /// current-thread runtime with I/O enabled; the ring serves tasks of that thread only.
    ///
    /// # Errors
    ///
    /// What the kernel answers: `ENOSYS` or `EPERM` where `io_uring` is absent or disabled,
    /// `ENOMEM` where the limit of locked memory is too low.
    pub fn new() -> io::Result<Rc<Self>> {
        let uring = build()?;
        // SAFETY: eventfd takes no pointers; a negative answer is checked before it is owned.
        let raw = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor just created, owned by nobody else.
        let eventfd = unsafe { OwnedFd::from_raw_fd(raw) };
        uring.submitter().register_eventfd(eventfd.as_raw_fd())?;
        // SAFETY: an OwnedFd names the same open descriptor until it is dropped, with the AsyncFd.
        let notify = unsafe { AsyncFd::register_with_interest(eventfd, Interest::READABLE) }?;
        let ring = Rc::new(Self {
            state: RefCell::new(State {
                uring,
                slots: Vec::new(),
                free: Vec::new(),
                backlog: VecDeque::new(),
                in_flight: 0,
                stopped: false,
            }),
            driver: RefCell::new(None),
            driver_woken: Cell::new(false),
        });
        let mut driver = Driver { ring: Rc::downgrade(&ring), notify, completed: Vec::new() };
        tokio::task::spawn_local(poll_fn(move |context| driver.poll(context)));
        Ok(ring)
    }

    /// Queues a request at byte `offset` of `file`; it is submitted with all others of this
    /// round. Completes with the kernel's answer (bytes, or a negative error number).
    pub(super) fn perform(
        self: &Rc<Self>,
        file: &Rc<OwnedFd>,
        offset: u64,
        request: Request,
    ) -> Operation {
        let slot = self.state.borrow_mut().queue(file, offset, request);
        if !self.driver_woken.replace(true)
            && let Some(driver) = &*self.driver.borrow()
        {
            driver.wake_by_ref();
        }
        Operation { ring: self.clone(), slot: Some(slot) }
    }

    /// Gives up: everyone who waits hears of it, memory stays until reaped.
    fn stop(&self) {
        let wakers: Vec<Waker> = {
            let mut state = self.state.borrow_mut();
            state.stopped = true;
            state.slots.iter_mut().filter_map(|slot| slot.waker.take()).collect()
        };
        wakers.into_iter().for_each(Waker::wake);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if let Some(driver) = self.driver.get_mut().take() {
            driver.wake();
        }
        let state = self.state.get_mut();
        if !state.drain() {
            tracing::error!(
                requests = state.in_flight,
                "requests that a device never answered: their memory is leaked"
            );
            std::mem::forget(std::mem::take(&mut state.slots));
        }
    }
}

/// The ring with the cheapest way of completion that the kernel has.
fn build() -> io::Result<IoUring> {
    let builder = || {
        let mut builder = IoUring::builder();
        builder.dontfork().setup_clamp().setup_cqsize(COMPLETION_ENTRIES);
        builder
    };
    // Linux 6.1, 5.19, and any.
    let mut deferred = builder();
    deferred.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().setup_submit_all();
    let mut cooperative = builder();
    cooperative.setup_coop_taskrun().setup_taskrun_flag().setup_submit_all();
    let plain = builder();
    let mut last = None;
    for candidate in [deferred, cooperative, plain] {
        match candidate.build(SUBMISSION_ENTRIES) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => last = Some(error),
            other => return other,
        }
    }
    Err(last.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EINVAL)))
}

impl State {
    fn queue(&mut self, file: &Rc<OwnedFd>, offset: u64, request: Request) -> usize {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        slot.abandoned = false;
        let (request, file) = slot.held.insert((request, file.clone()));
        let entry = entry_of(request, Fd(file.as_raw_fd()), offset, &mut slot.iovecs)
            .user_data(index as u64);
        self.in_flight += 1;
        if self.backlog.is_empty() && self.push(&entry).is_ok() {
            return index;
        }
        // Any failure to make room shows itself to the driver, which also empties the backlog.
        if self.backlog.is_empty() && self.enter(0).is_ok() && self.push(&entry).is_ok() {
            return index;
        }
        self.backlog.push_back(entry);
        index
    }

    fn push(&mut self, entry: &squeue::Entry) -> Result<(), squeue::PushError> {
        // SAFETY: what the entry points to lies in its slot until its completion is reaped.
        unsafe { self.uring.submission().push(entry) }
    }

    fn fill_from_backlog(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            if self.push(&entry).is_err() {
                self.backlog.push_front(entry);
                return;
            }
        }
    }

    /// Submits what is queued and runs the kernel's deferred work.
    fn enter(&mut self, queued: u32) -> io::Result<()> {
        let queued = match queued {
            0 => u32::try_from(self.uring.submission().len()).unwrap_or(u32::MAX),
            given => given,
        };
        // SAFETY: no argument structure is given; the queue holds `queued` whole entries.
        unsafe {
            self.uring.submitter().enter::<libc::sigset_t>(
                queued,
                0,
                EnterFlags::GETEVENTS.bits(),
                None,
            )
        }
        .map(drop)
    }

    /// Moves completions into their slots; appends whom to wake and what to drop.
    fn reap(&mut self, completed: &mut Vec<Completed>) {
        let Self { uring, slots, free, in_flight, .. } = self;
        for entry in uring.completion() {
            let index = usize::try_from(entry.user_data()).expect("an index of a slot");
            let slot = &mut slots[index];
            *in_flight -= 1;
            if slot.abandoned {
                completed.push(Completed::Abandoned(slot.held.take()));
                free.push(index);
            } else {
                slot.result = Some(entry.result());
                completed.extend(slot.waker.take().map(Completed::Awaited));
            }
        }
    }

    /// Submits and collects until nothing is left to do now. `Ok(false)` when the kernel is short
    /// of something and has to be asked again later.
    fn turn(&mut self, completed: &mut Vec<Completed>) -> io::Result<bool> {
        if SILENCE_EVENTFD {
            self.uring.completion().disable_eventfd();
        }
        let outcome = self.submit_and_reap(completed);
        if SILENCE_EVENTFD {
            self.uring.completion().enable_eventfd();
            fence(Ordering::SeqCst);
            let flagged = {
                let queue = self.uring.submission();
                queue.taskrun() || queue.cq_overflow()
            };
            // What came before the event was enabled is done now. If there was nothing, the flag is
            // stale, and what comes after raises the event.
            let before = self.in_flight;
            if flagged {
                let entered = self.enter(0);
                self.reap(completed);
                if entered.is_err() || self.in_flight != before {
                    return outcome.map(|_| false);
                }
            }
        }
        outcome.map(|done| done && self.uring.completion().is_empty())
    }

    fn submit_and_reap(&mut self, completed: &mut Vec<Completed>) -> io::Result<bool> {
        loop {
            self.fill_from_backlog();
            let (queued, work) = {
                let queue = self.uring.submission();
                (queue.len(), queue.taskrun() || queue.cq_overflow())
            };
            if queued == 0 && !work {
                self.reap(completed);
                return Ok(true);
            }
            let before = self.in_flight;
            let entered = self.enter(u32::try_from(queued).unwrap_or(u32::MAX));
            self.reap(completed);
            match entered.map_err(|error| (error.raw_os_error(), error)) {
                // Another thread of the kernel raises the flag after it has added its work, which may
                // be done by then: the flag stays, and there is nothing to do.
                Ok(()) if queued == 0 && self.in_flight == before => return Ok(true),
                Ok(()) | Err((Some(libc::EINTR), _)) => {}
                Err((Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM), _)) => return Ok(false),
                Err((_, error)) => return Err(error),
            }
        }
    }

    /// Waits for all requests under way. False if some did not return.
    fn drain(&mut self) -> bool {
        let wait = Timespec::new().nsec(DRAIN_WAIT_MS * 1_000_000);
        let mut completed = Vec::new();
        for _ in 0..DRAIN_ATTEMPTS {
            loop {
                self.slots.iter_mut().for_each(|slot| slot.abandoned = true);
                self.fill_from_backlog();
                self.reap(&mut completed);
                if self.in_flight == 0 {
                    return true;
                }
                let args = SubmitArgs::new().timespec(&wait);
                if self.uring.submitter().submit_with_args(1, &args).is_err() {
                    break;
                }
            }
        }
        false
    }
}

/// The entry of a request; `iovecs` is what it may point to.
fn entry_of(
    request: &mut Request,
    file: Fd,
    offset: u64,
    iovecs: &mut Vec<libc::iovec>,
) -> squeue::Entry {
    match request {
        Request::Read { buf, start } => {
            let rest = &mut buf[*start..];
            let len = rest.len().min(OPERATION_BYTES_MAX);
            let len = u32::try_from(len).expect("at most OPERATION_BYTES_MAX");
            opcode::Read::new(file, rest.as_mut_ptr(), len).offset(offset).build()
        }
        Request::Write { data, skip, durable } => {
            gather(data, *skip, iovecs);
            let flags = if *durable { libc::RWF_DSYNC } else { 0 };
            let count = u32::try_from(iovecs.len()).expect("at most IOVECS_MAX");
            opcode::Writev::new(file, iovecs.as_ptr(), count).offset(offset).rw_flags(flags).build()
        }
        Request::Flush => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
    }
}

/// Lists the pieces beyond `skip` bytes, as many as one request takes.
fn gather(data: &[Bytes], mut skip: usize, iovecs: &mut Vec<libc::iovec>) {
    iovecs.clear();
    let mut room = OPERATION_BYTES_MAX;
    for piece in data {
        if skip >= piece.len() {
            skip -= piece.len();
            continue;
        }
        let rest = &piece[skip..];
        skip = 0;
        let len = rest.len().min(room);
        iovecs.push(libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: len });
        room -= len;
        if room == 0 || iovecs.len() == IOVECS_MAX {
            return;
        }
    }
}

/// What to do about a completion once the ring's state is free.
enum Completed {
    Awaited(Waker),
    Abandoned(#[expect(dead_code, reason = "held only to be dropped")] Option<Held>),
}

type Held = (Request, Rc<OwnedFd>);

struct Driver {
    ring: Weak<Ring>,
    notify: AsyncFd<OwnedFd>,
    completed: Vec<Completed>,
}

impl Driver {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(ring) = self.ring.upgrade() else { return Poll::Ready(()) };
        // Cleared before completions are looked at, so that a later one is a new edge.
        while let Poll::Ready(readiness) = self.notify.poll_read_ready(context) {
            match readiness {
                Ok(mut guard) => guard.clear_ready(),
                Err(_) => return Poll::Ready(()),
            }
        }
        ring.driver_woken.set(false);
        {
            let mut waker = ring.driver.borrow_mut();
            if !waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                *waker = Some(context.waker().clone());
            }
        }
        let outcome = ring.state.borrow_mut().turn(&mut self.completed);
        for completed in self.completed.drain(..) {
            if let Completed::Awaited(waker) = completed {
                waker.wake();
            }
        }
        match outcome {
            Ok(true) => {}
            Ok(false) => context.waker().wake_by_ref(),
            Err(error) => {
                tracing::error!(%error, "io_uring failed");
                return Poll::Ready(());
            }
        }
        Poll::Pending
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if let Some(ring) = self.ring.upgrade() {
            ring.stop();
        }
    }
}

/// A request under way. Dropping it leaves the request running.
pub(super) struct Operation {
    ring: Rc<Ring>,
    /// None once the result was taken.
    slot: Option<usize>,
}

impl Future for Operation {
    type Output = Result<(i32, Request), RingStopped>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let index = self.slot.expect("not polled after it completed");
        let mut state = self.ring.state.borrow_mut();
        let slot = &mut state.slots[index];
        if let Some(result) = slot.result.take() {
            let held = slot.held.take();
            state.free.push(index);
            drop(state);
            self.slot = None;
            let (request, _file) = held.expect("held until it is reaped");
            return Poll::Ready(Ok((result, request)));
        }
        if state.stopped {
            return Poll::Ready(Err(RingStopped));
        }
        let slot = &mut state.slots[index];
        if !slot.waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
            slot.waker = Some(context.waker().clone());
        }
        Poll::Pending
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        let Some(index) = self.slot else { return };
        let mut state = self.ring.state.borrow_mut();
        let slot = &mut state.slots[index];
        let waker = slot.waker.take();
        if slot.result.take().is_some() {
            let held = slot.held.take();
            state.free.push(index);
            drop(state);
            drop(held);
        } else {
            slot.abandoned = true;
            drop(state);
        }
        drop(waker);
    }
}
