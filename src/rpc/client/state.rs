//! The requests of one connection: waiting, sent, answered. No I/O; time is given.

use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::id::{DiskId, VolumeId};
use crate::limits::RPC_QUEUE_MAX;
use crate::rpc::frame::{FrameHeader, Kind, Opcode, Violation, flag};
use crate::rpc::handshake::WindowSize;
use crate::rpc::input::Receive;
use crate::rpc::message::{AnswerResult, Call, Expected, Payload, ReplyHead};
use crate::rpc::metrics::{PeerMetrics, add};
use crate::rpc::output::{Outgoing, Output};
use crate::rpc::request::{Asked, unchecked};
use crate::rpc::volume::VolumeCall;
use crate::rpc::window::{Share, Window};
use crate::shard::ShardError;

/// Tag of messages that belong to no request.
const NO_REQUEST: u64 = u64::MAX;
/// Unsent pongs beyond which the peer is not in its senses.
const PONGS_MAX: u32 = 16;
/// Attempts to reach a node again that may fail before requests stop waiting for it. The first is made at once, the
/// others some tens of milliseconds apart.
const MISSES_MAX: u32 = 2;

/// Requests to a volume with more payload are large: small ones do not wait for them.
const SMALL_BYTES_MAX: usize = 16 << 10;

/// What keeps the order of its messages: what changes, what reads, what is urgent, for each disk
/// and volume. Requests to a head need no order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    Change(DiskId, VolumeId),
    Read(DiskId, VolumeId),
    Urgent(DiskId, VolumeId),
    Head(VolumeId),
    HeadLarge(VolumeId),
    Attach(VolumeId),
    Node,
    Control,
}

impl Lane {
    /// The lane of a request. A fence or a delete must not overtake the create before it: what is
    /// not there then counts as gone for good.
    fn of_disk(disk: DiskId, call: &Call) -> Self {
        let volume = call.volume();
        match call.opcode() {
            Opcode::Read | Opcode::ReadRaw | Opcode::ReadSealed | Opcode::Exercise => {
                Self::Read(disk, volume)
            }
            Opcode::Probe | Opcode::Info | Opcode::List | Opcode::Volumes | Opcode::GetCatalog => {
                Self::Urgent(disk, volume)
            }
            _ => Self::Change(disk, volume),
        }
    }

    /// The lane of a request with so many bytes of payload.
    fn of(asked: Asked<'_>, payload: usize) -> Self {
        match asked {
            Asked::Disk(disk, call) => Self::of_disk(disk, call),
            Asked::Volume(volume, VolumeCall::Attach { .. }) => Self::Attach(volume),
            Asked::Volume(volume, _) if payload <= SMALL_BYTES_MAX => Self::Head(volume),
            Asked::Volume(volume, _) => Self::HeadLarge(volume),
            Asked::Ask => Self::Node,
        }
    }

    fn is_urgent(self) -> bool {
        matches!(self, Self::Urgent(..) | Self::Attach(_) | Self::Control)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// In no queue and on no wire.
    Idle,
    Queued,
    Sent,
}

struct Slot {
    generation: u32,
    phase: Phase,
    /// Somebody waits for the outcome.
    awaited: bool,
    outcome: Option<AnswerResult>,
    waker: Option<Waker>,
    deadline: Instant,
    share: Option<Rc<Share>>,
    /// What it counts in the window, and what it was charged there.
    bytes: usize,
    charged: usize,
    expected: Expected,
    /// Nothing is lost if it is never sent.
    droppable: bool,
}

/// A request as it is made.
pub(super) struct Made<'a> {
    pub(super) asked: Asked<'a>,
    pub(super) share: &'a Rc<Share>,
    pub(super) payload: Payload,
    /// Its frames carry checksums of the payload.
    pub(super) checked: bool,
    pub(super) deadline: Instant,
}

/// State of one connection's requests.
///
/// Invariants: a slot is in `free` exactly when it is idle and nobody awaits it; `window` is
/// charged for exactly the slots that are [`Phase::Sent`].
pub(super) struct State {
    slots: Vec<Slot>,
    free: Vec<u32>,
    queued: usize,
    pub(super) output: Output<Lane, u64>,
    /// None while there is no connection.
    window: Option<Window>,
    pub(super) down_since: Instant,
    /// Attempts to reach the node again since the last connection broke; none where there was none yet.
    misses: Option<u32>,
    /// Of these, the last ones that were refused: nobody listens there.
    refused: u32,
    /// The task that moves frames.
    pub(super) io: Option<Waker>,
    ping: Option<(u64, Instant)>,
    pings: u64,
    pongs: u32,
    pub(super) goodbye: Option<String>,
    metrics: Rc<PeerMetrics>,
}

impl State {
    pub(super) fn new(version: u16, metrics: Rc<PeerMetrics>) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            queued: 0,
            output: Output::new(version),
            window: None,
            down_since: Instant::now(),
            misses: None,
            refused: 0,
            io: None,
            ping: None,
            pings: 0,
            pongs: 0,
            goodbye: None,
            metrics,
        }
    }

    pub(super) fn is_up(&self) -> bool {
        self.window.is_some()
    }

    /// Whether there is no connection and requests no longer wait for one.
    pub(super) fn is_away(&self, now: Instant, patience: Duration) -> bool {
        let missed = self.misses.is_some_and(|misses| misses >= MISSES_MAX);
        !self.is_up() && (missed || now - self.down_since >= patience)
    }

    /// Whether there was a connection, and nobody listens any more where it led: the process died.
    pub(super) fn is_refused(&self) -> bool {
        !self.is_up() && self.misses.is_some() && self.refused >= MISSES_MAX
    }

    /// The node was not reached.
    pub(super) fn missed(&mut self, refused: bool) {
        self.misses = self.misses.map(|misses| misses.saturating_add(1));
        self.refused = if refused { self.refused.saturating_add(1) } else { 0 };
    }

    /// Requests that are not answered yet, awaited or not.
    pub(super) fn pending(&self) -> usize {
        self.queued + self.window.as_ref().map_or(0, |window| window.requests() as usize)
    }

    fn note_pending(&self) {
        self.metrics.in_flight.set(self.pending() as u64);
    }

    /// Queues a request; gives its id.
    pub(super) fn make(&mut self, made: Made<'_>) -> Result<u64, ShardError> {
        add(&self.metrics.requests, 1);
        if self.queued >= RPC_QUEUE_MAX {
            add(&self.metrics.unreachable, 1);
            return Err(ShardError::Unreachable);
        }
        let Made { asked, share, payload, checked, deadline } = made;
        let slot = Slot {
            generation: 0,
            phase: Phase::Queued,
            awaited: true,
            outcome: None,
            waker: None,
            deadline,
            share: Some(share.clone()),
            bytes: payload.len() + asked.reply_bytes(),
            charged: 0,
            expected: asked.expected(),
            droppable: asked.droppable(),
        };
        let mut head = self.output.buffer();
        asked.encode(&mut head);
        let index = self.place(slot);
        let id = u64::from(self.slots[index as usize].generation) << 32 | u64::from(index);
        let lane = Lane::of(asked, payload.len());
        let kind = (Kind::Request, asked.opcode().number(), id);
        self.output.push(lane.is_urgent(), lane, Outgoing::new(kind, head, (payload, checked), id));
        self.queued += 1;
        self.note_pending();
        self.wake_io();
        Ok(id)
    }

    fn place(&mut self, slot: Slot) -> u32 {
        if let Some(index) = self.free.pop() {
            let place = &mut self.slots[index as usize];
            // An id is not used again before 2^32 requests of the same slot.
            *place =
                Slot { generation: place.generation.wrapping_add(1) & (u32::MAX >> 1), ..slot };
            return index;
        }
        let index = u32::try_from(self.slots.len()).expect("bounded by window and queue");
        self.slots.push(slot);
        index
    }

    pub(super) fn wake_io(&mut self) {
        if let Some(io) = self.io.take() {
            io.wake();
        }
    }

    fn find(slots: &mut [Slot], id: u64) -> Option<(u32, &mut Slot)> {
        let index = u32::try_from(id & u64::from(u32::MAX)).ok()?;
        let slot = slots.get_mut(index as usize)?;
        (u64::from(slot.generation) == id >> 32).then_some((index, slot))
    }

    /// The outcome of a request, if it has one; then the request is forgotten.
    pub(super) fn poll(&mut self, id: u64, cx: &Context<'_>) -> Poll<AnswerResult> {
        let Some((index, slot)) = Self::find(&mut self.slots, id) else {
            return Poll::Ready(Err(ShardError::Unreachable));
        };
        if let Some(outcome) = slot.outcome.take() {
            slot.awaited = false;
            self.tidy(index);
            return Poll::Ready(outcome);
        }
        if slot.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
            slot.waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Nobody waits for a request any more. It is sent nevertheless, unless that would be in vain.
    pub(super) fn abandon(&mut self, id: u64) {
        let Some((index, slot)) = Self::find(&mut self.slots, id) else { return };
        slot.awaited = false;
        slot.waker = None;
        if slot.phase == Phase::Queued && slot.droppable {
            slot.phase = Phase::Idle;
            self.queued -= 1;
            self.output.retain(|message| *message.tag() != id);
        }
        self.tidy(index);
        self.note_pending();
    }

    /// Frees a slot that nothing refers to.
    fn tidy(&mut self, index: u32) {
        let slot = &mut self.slots[index as usize];
        if slot.phase == Phase::Idle && !slot.awaited && slot.share.is_some() {
            (slot.outcome, slot.waker, slot.share) = (None, None, None);
            self.free.push(index);
        }
    }

    /// Ends a request.
    fn complete(&mut self, index: u32, outcome: AnswerResult) {
        let slot = &mut self.slots[index as usize];
        match slot.phase {
            Phase::Queued => self.queued -= 1,
            Phase::Sent => {
                if let (Some(window), Some(share)) = (&mut self.window, &slot.share) {
                    window.give(share, slot.charged);
                }
            }
            Phase::Idle => {}
        }
        slot.phase = Phase::Idle;
        settle(slot, outcome);
        self.tidy(index);
    }

    /// Hands over what the window allows.
    pub(super) fn fill(&mut self) {
        let Self { slots, output, window, queued, .. } = self;
        let Some(window) = window else { return };
        output.fill(|urgent, tag| {
            if *tag == NO_REQUEST {
                return true;
            }
            let Some((_, slot)) = Self::find(slots, *tag) else { return true };
            let Some(share) = &slot.share else { return true };
            let Some(charged) = window.take(share, slot.bytes, urgent) else { return false };
            slot.charged = charged;
            slot.phase = Phase::Sent;
            *queued -= 1;
            true
        });
    }

    /// A connection has come.
    pub(super) fn up(&mut self, version: u16, window: WindowSize) {
        // Control parts are the same in every version so far: what waits need not be written anew.
        self.output.set_version(version);
        self.window = Some(Window::new(window));
        (self.ping, self.pongs, self.goodbye) = (None, 0, None);
        (self.misses, self.refused) = (Some(0), 0);
    }

    /// The connection has gone: what was sent has an unknown outcome, what was not still waits.
    pub(super) fn down(&mut self) {
        self.down_since = Instant::now();
        for index in self.indices() {
            if self.slots[index as usize].phase == Phase::Sent {
                add(&self.metrics.unreachable, 1);
                self.complete(index, Err(ShardError::Unreachable));
            }
        }
        self.window = None;
        self.output.clear_wire();
        let Self { output, slots, .. } = self;
        output.retain(|message| {
            let slot = Self::find(slots, *message.tag());
            !message.started() && slot.is_some_and(|(_, slot)| slot.phase == Phase::Queued)
        });
        self.note_pending();
    }

    fn indices(&self) -> std::ops::Range<u32> {
        0..u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    /// Ends all requests that were not sent.
    pub(super) fn fail_queued(&mut self) {
        self.fail_queued_if(|_| true);
    }

    fn fail_queued_if(&mut self, which: impl Fn(&Slot) -> bool) {
        let mut any = false;
        for index in self.indices() {
            let slot = &self.slots[index as usize];
            if slot.phase == Phase::Queued && which(slot) {
                any = true;
                add(&self.metrics.unreachable, 1);
                self.complete(index, Err(ShardError::Unreachable));
            }
        }
        if any {
            let Self { output, slots, .. } = self;
            output.retain(|message| {
                let slot = Self::find(slots, *message.tag());
                let queued = slot.is_some_and(|(_, slot)| slot.phase == Phase::Queued);
                message.started() || queued || *message.tag() == NO_REQUEST
            });
            self.note_pending();
        }
    }

    /// Ends the waiting of requests whose time is over. Those that were sent keep their place in the
    /// window until the answer comes.
    pub(super) fn expire(&mut self, now: Instant) {
        self.fail_queued_if(|slot| slot.deadline <= now);
        for slot in &mut self.slots {
            if slot.phase == Phase::Sent && slot.awaited && slot.deadline <= now {
                if slot.outcome.is_none() {
                    add(&self.metrics.unreachable, 1);
                }
                settle(slot, Err(ShardError::Unreachable));
            }
        }
    }

    /// Asks for a sign of life; false if the last one was not answered yet.
    pub(super) fn send_ping(&mut self) -> bool {
        if self.ping.is_some() {
            return false;
        }
        self.pings += 1;
        self.ping = Some((self.pings, Instant::now()));
        self.push_control(Kind::Ping, self.pings, b"");
        true
    }

    /// Queues a frame that belongs to no request.
    pub(super) fn push_control(&mut self, kind: Kind, id: u64, text: &[u8]) {
        let mut head = self.output.buffer();
        head.extend_from_slice(text);
        let message = Outgoing::new((kind, 0, id), head, (Payload::Empty, false), NO_REQUEST);
        self.output.push(true, Lane::Control, message);
    }
}

fn settle(slot: &mut Slot, outcome: AnswerResult) {
    if slot.awaited && slot.outcome.is_none() {
        slot.outcome = Some(outcome);
        if let Some(waker) = slot.waker.take() {
            waker.wake();
        }
    }
}

impl Receive for State {
    type Message = (u64, ReplyHead);

    fn parse(
        &mut self,
        kind: Kind,
        header: &FrameHeader,
        control: &[u8],
    ) -> Result<Option<Self::Message>, Violation> {
        let id = header.id.get();
        match kind {
            Kind::Reply => {
                let slot = Self::find(&mut self.slots, id).map(|(_, slot)| slot);
                let slot = slot.filter(|slot| slot.phase == Phase::Sent);
                let slot = slot.ok_or(Violation::Incoherent("a reply to what was not asked"))?;
                let payload = usize::try_from(header.payload_total.get()).unwrap_or(usize::MAX);
                let status = header.code.get();
                let has_crc = header.flags & flag::PAYLOAD_CRC != 0;
                unchecked(slot.expected.opcode, header.payload_len.get(), has_crc)?;
                let head = ReplyHead::decode(slot.expected, status, control, payload)?;
                return Ok(Some((id, head)));
            }
            Kind::Pong => {
                if let Some((_, sent)) = self.ping.take_if(|(number, _)| *number == id) {
                    self.metrics.pinged(sent.elapsed());
                }
            }
            Kind::Ping => {
                self.pongs += 1;
                if self.pongs > PONGS_MAX {
                    return Err(Violation::Incoherent("too many pings"));
                }
                self.push_control(Kind::Pong, id, b"");
            }
            Kind::Goodbye => {
                let text = String::from_utf8_lossy(control);
                self.goodbye = Some(text.chars().filter(|c| !c.is_control()).take(512).collect());
            }
            Kind::Request | Kind::More => return Err(Violation::Kind(header.kind)),
        }
        Ok(None)
    }

    fn deliver(&mut self, (id, head): Self::Message, payload: Bytes) -> Result<(), Violation> {
        let outcome = head.finish(payload)?;
        if let Some((index, slot)) = Self::find(&mut self.slots, id)
            && slot.phase == Phase::Sent
        {
            self.complete(index, outcome);
            self.note_pending();
        }
        Ok(())
    }
}

impl State {
    /// All that was to be sent has left.
    pub(super) fn sent_all(&mut self) {
        self.pongs = 0;
    }
}

#[cfg(test)]
impl State {
    /// Whether nothing is held for any request.
    pub(super) fn is_idle(&self) -> bool {
        self.queued == 0 && self.pending() == 0 && self.free.len() == self.slots.len()
    }
}
