//! One connection of another node, in one task: take requests up in the order they come, run them
//! side by side, send their answers.
//!
//! # Invariants
//! - Every request is begun (its disk was called) in the order in which it came; from then on none
//!   waits for another.
//! - What is under way is bounded: a peer that exceeds the window it was given breaks the protocol. A
//!   request counts from its first frame to the last byte of its reply.
//! - A session that ends lets its requests run on; only their answers are lost.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, Sleep, sleep};

use super::volumes::{self, LineOwner};
use super::{Cut, Shared};
use crate::id::DiskId;
use crate::limits::{RPC_ASK_BYTES_MAX, RPC_MESSAGE_BYTES_MAX};
use crate::rpc::RpcConfig;
use crate::rpc::frame::{FrameHeader, Kind, Opcode, Violation, flag};
use crate::rpc::handshake::{PeerIdentity, WindowSize};
use crate::rpc::input::Receive;
use crate::rpc::link::{Link, LinkEnd};
use crate::rpc::message::{Answer, AnswerResult, Call, Payload, Reply};
use crate::rpc::metrics::{ServerMetrics, add};
use crate::rpc::output::{Outgoing, Output};
use crate::rpc::request::{AskResult, Request, unchecked};
use crate::rpc::window::charge;
use crate::shard::ShardError;

/// A reply of at most so many bytes goes before larger ones.
const SMALL_BYTES_MAX: usize = 16 << 10;
/// Unsent pongs beyond which the peer is not in its senses.
const PONGS_MAX: u32 = 16;

/// A request that was answered: its id, what it counts in the window, and the answer.
type Answered = (u64, usize, AnswerResult);
type Running = Pin<Box<dyn Future<Output = Answered>>>;

/// A request whose payload is still to come.
struct Incoming {
    id: u64,
    charged: usize,
    request: Result<Request, ShardError>,
}

/// The part of a session that frames are taken up by.
struct Intake {
    shared: Rc<Shared>,
    window: WindowSize,
    requests: u32,
    bytes: usize,
    /// Taken up, not yet begun.
    begun: VecDeque<Running>,
    output: Output<Option<u64>, Option<usize>>,
    pongs: u32,
    goodbye: Option<String>,
    line: LineOwner,
    /// The server is stopping: nothing new is begun.
    stopping: bool,
}

pub(super) struct Session<S> {
    link: Link<S, Incoming>,
    intake: Intake,
    running: FuturesUnordered<Running>,
    timer: Pin<Box<Sleep>>,
    /// Bytes came or went since the timer was set.
    progressed: bool,
}

impl Receive for Intake {
    type Message = Incoming;

    fn parse(
        &mut self,
        kind: Kind,
        header: &FrameHeader,
        control: &[u8],
    ) -> Result<Option<Incoming>, Violation> {
        let id = header.id.get();
        match kind {
            Kind::Request => return self.request(id, header, control).map(Some),
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
            Kind::Pong => {}
            Kind::Reply | Kind::More => return Err(Violation::Kind(header.kind)),
        }
        Ok(None)
    }

    fn deliver(&mut self, message: Incoming, payload: Bytes) -> Result<(), Violation> {
        let Incoming { id, charged, request } = message;
        let shared = self.shared.clone();
        let running: Running = match request {
            Ok(Request::Disk(disk, call)) => self.disk_request((id, charged), disk, call, payload),
            Ok(Request::Volume(volume, call)) => {
                let line = self.line.0.clone();
                Box::pin(async move {
                    let result = volumes::run(shared, line, volume, call, payload).await;
                    (id, charged, Ok(Answer::Volume(result)))
                })
            }
            Ok(Request::Ask) => Box::pin(async move {
                let told = shared.directories.questions.ask(payload).await;
                (id, charged, Ok(Answer::Told(told.and_then(short_enough))))
            }),
            Err(error) => Box::pin(std::future::ready((id, charged, Err(error)))),
        };
        self.begun.push_back(running);
        Ok(())
    }
}

fn short_enough(answer: Bytes) -> AskResult {
    let (len, max) = (answer.len(), RPC_ASK_BYTES_MAX);
    if len <= max { Ok(answer) } else { Err(format!("an answer of {len} bytes, at most {max}")) }
}

impl Intake {
    fn disk_request(
        &self,
        (id, charged): (u64, usize),
        disk: DiskId,
        call: Call,
        payload: Bytes,
    ) -> Running {
        if let Some(client) = self.shared.directories.disks.disk(disk) {
            return Box::pin(async move { (id, charged, call.run(&*client, payload).await) });
        }
        let name = &self.shared.own.name;
        let error = ShardError::Offline(format!("node {name} has no disk {disk}"));
        Box::pin(std::future::ready((id, charged, Err(error))))
    }

    fn request(
        &mut self,
        id: u64,
        header: &FrameHeader,
        control: &[u8],
    ) -> Result<Incoming, Violation> {
        let payload = usize::try_from(header.payload_total.get()).unwrap_or(usize::MAX);
        let code = header.code.get();
        let request = match Opcode::from_wire(code) {
            None => Err(ShardError::Invalid(format!("request {code} is not known here"))),
            Some(opcode) => {
                let has_crc = header.flags & flag::PAYLOAD_CRC != 0;
                unchecked(opcode, header.payload_len.get(), has_crc)?;
                let request = Request::decode(opcode, control)?;
                if request.asked().is_too_long(payload) {
                    let reason = "more bytes than a message holds";
                    Err(ShardError::Invalid(reason.into()))
                } else if self.stopping {
                    let name = &self.shared.own.name;
                    Err(ShardError::Offline(format!("node {name} is stopping")))
                } else {
                    Ok(request)
                }
            }
        };
        let reply = request.as_ref().map_or(0, |request| request.asked().reply_bytes());
        let charged = charge(payload + reply, self.window.bytes);
        if self.requests >= self.window.requests || self.bytes + charged > self.window.bytes {
            return Err(Violation::Incoherent("more requests than the window allows"));
        }
        self.requests += 1;
        self.bytes += charged;
        Ok(Incoming { id, charged, request })
    }

    fn push_control(&mut self, kind: Kind, id: u64, text: &[u8]) {
        let mut head = self.output.buffer();
        head.extend_from_slice(text);
        let message = Outgoing::new((kind, 0, id), head, (Payload::Empty, false), None);
        self.output.push(true, None, message);
    }

    fn reply(&mut self, (id, charged, result): Answered) {
        let metrics = &self.shared.metrics;
        metrics.running.set(metrics.running.get() - 1);
        add(&metrics.requests, 1);
        let failed = matches!(result, Err(_) | Ok(Answer::Volume(Err(_)) | Answer::Told(Err(_))));
        add(&metrics.errors, u64::from(failed));
        let mut head = self.output.buffer();
        let empty = head.len();
        let mut reply = Reply::encode(result, &mut head);
        let mut len = reply.payload.len();
        if len > RPC_MESSAGE_BYTES_MAX {
            head.truncate(empty);
            let error = ShardError::Io(format!("an answer of {len} bytes is too long to be sent"));
            reply = Reply::encode(Err(error), &mut head);
            len = 0;
        }
        let checked = reply.bare || self.shared.config.checked_payload;
        let kind = (Kind::Reply, reply.status, id);
        let message = Outgoing::new(kind, head, (reply.payload, checked), Some(charged));
        // Small ones in the order of their answers, large ones in turns.
        let small = len <= SMALL_BYTES_MAX;
        self.output.push(small, (!small).then_some(id), message);
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
    pub(super) fn new(
        stream: S,
        peer: &PeerIdentity,
        window: WindowSize,
        shared: Rc<Shared>,
    ) -> Self {
        let timer = Box::pin(sleep(shared.config.idle_timeout));
        let line = LineOwner::new((peer.node, peer.core));
        let intake = Intake {
            window,
            requests: 0,
            bytes: 0,
            begun: VecDeque::new(),
            output: Output::new(peer.version),
            pongs: 0,
            goodbye: None,
            line,
            stopping: false,
            shared,
        };
        Self {
            link: Link::new(stream, peer.version),
            intake,
            running: FuturesUnordered::new(),
            timer,
            progressed: false,
        }
    }

    pub(super) fn stream(&mut self) -> &mut S {
        self.link.stream()
    }

    fn config(&self) -> &RpcConfig {
        &self.intake.shared.config
    }

    /// Serves requests until the connection is over, a newer one has its place, or the server stops.
    pub(super) async fn run(&mut self, cut: &Cut) -> LinkEnd {
        let shared = self.intake.shared.clone();
        let mut stop = pin!(shared.stopped());
        let mut told = pin!(cut.told());
        poll_fn(|cx| {
            if told.as_mut().poll(cx).is_ready() || cut.is_done() {
                return Poll::Ready(LinkEnd::Replaced);
            }
            if !self.intake.stopping && stop.as_mut().poll(cx).is_ready() {
                self.intake.stopping = true;
                let patience = self.config().drain_timeout;
                self.timer.as_mut().reset(Instant::now() + patience);
            }
            self.poll(cx)
        })
        .await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<LinkEnd> {
        loop {
            match self.step(cx) {
                Err(end) => return Poll::Ready(end),
                Ok(true) => self.progressed = true,
                Ok(false) => {
                    let done = self.running.is_empty() && self.intake.output.is_empty();
                    if self.intake.stopping && done {
                        return Poll::Ready(LinkEnd::Stopped);
                    }
                    if self.timer.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    if self.intake.stopping {
                        return Poll::Ready(LinkEnd::Stopped);
                    }
                    let patience = self.config().idle_timeout;
                    if !std::mem::take(&mut self.progressed) {
                        return Poll::Ready(LinkEnd::Silent(patience));
                    }
                    self.timer.as_mut().reset(Instant::now() + patience);
                }
            }
        }
    }

    /// Reads, runs and writes once. True if anything happened.
    fn step(&mut self, cx: &mut Context<'_>) -> Result<bool, LinkEnd> {
        let Self { link, intake, running, .. } = self;
        let metrics = intake.shared.metrics.clone();
        let (received, sent) = (link.received, link.sent);
        let mut progress = link.poll_input(cx, intake)?;
        add(&metrics.received_bytes, link.received - received);
        // Begun in order: what one does first is done before the next is even called.
        while let Some(mut begun) = intake.begun.pop_front() {
            metrics.running.set(metrics.running.get() + 1);
            match begun.as_mut().poll(cx) {
                Poll::Ready(answered) => intake.reply(answered),
                Poll::Pending => running.push(begun),
            }
        }
        if let Some(reason) = intake.goodbye.take() {
            return Err(LinkEnd::Goodbye(reason));
        }
        while let Poll::Ready(Some(answered)) = Pin::new(&mut *running).poll_next(cx) {
            intake.reply(answered);
            progress = true;
        }
        let Intake { output, requests, bytes, pongs, .. } = intake;
        output.fill(|_, _| true);
        let ended = |charged: Option<usize>| {
            if let Some(charged) = charged {
                *requests -= 1;
                *bytes -= charged;
            }
        };
        progress |= link.poll_output(cx, output, ended)?;
        if output.unsent() == 0 {
            *pongs = 0;
        }
        add(&metrics.sent_bytes, link.sent - sent);
        Ok(progress)
    }

    /// Takes the session apart: the requests that still run, and what closes the stream.
    pub(super) fn end(self, end: LinkEnd) -> (FuturesUnordered<Running>, impl Future<Output = ()>) {
        let Self { mut link, mut intake, running, .. } = self;
        intake.begun.clear();
        intake.line.end();
        let farewell = async move {
            let speaks =
                matches!(end, LinkEnd::Violation(_) | LinkEnd::Stopped | LinkEnd::Replaced);
            if speaks {
                intake.push_control(Kind::Goodbye, 0, end.to_string().as_bytes());
                let said = poll_fn(|cx| {
                    loop {
                        intake.output.fill(|_, _| true);
                        match link.poll_output(cx, &mut intake.output, |_| ()) {
                            Ok(true) => {}
                            Ok(false) if intake.output.is_empty() && link.is_flushed() => {
                                return Poll::Ready(());
                            }
                            Ok(false) => return Poll::Pending,
                            Err(_) => return Poll::Ready(()),
                        }
                    }
                });
                said.await;
            }
            // Whoever does not let us close in order is just left.
            drop(link.into_stream().shutdown().await);
        };
        (running, farewell)
    }
}

/// Lets requests finish whose connection is gone.
pub(super) async fn drain(mut running: FuturesUnordered<Running>, metrics: Rc<ServerMetrics>) {
    let mut late = Duration::ZERO;
    let began = Instant::now();
    while poll_fn(|cx| Pin::new(&mut running).poll_next(cx)).await.is_some() {
        metrics.running.set(metrics.running.get() - 1);
        late = began.elapsed();
    }
    tracing::trace!(?late, "the requests of an ended connection are done");
}
