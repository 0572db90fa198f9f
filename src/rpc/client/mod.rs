//! The connection to one core of another node, and the requests that go over it.
//!
//! A [`Peer`] connects by itself, again and again, as long as it or a disk or volume behind it exists. All
//! requests share the one connection; the task that owns it reads, writes and tells who waits.

mod session;
mod state;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};

use super::RpcConfig;
use super::frame::Kind;
use super::handshake::{
    Attempt, HandshakeError, Identity, PeerIdentity, Target, WindowSize, connect,
};
use super::link::LinkEnd;
use super::message::{Answer, AnswerResult, Payload};
use super::metrics::{PeerMetrics, add};
use super::remote_volume::Attachments;
use super::request::Asked;
use super::window::Share;
use crate::env::Env;
use crate::obs::throttle::Throttle;
use crate::shard::{LocalFuture, ShardError};
use session::Session;
use state::{Made, State};

/// How often deadlines are looked at while requests are under way.
const TICK: Duration = Duration::from_millis(50);
/// First pause between attempts to connect; doubled each time.
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// A connection that lasted so long was a good one: the next attempt is made at once.
const LASTED: Duration = Duration::from_secs(1);
/// Bytes of a request's control part that are not checksums, at most.
const CONTROL_REST_MAX: usize = 8 << 10;

/// Makes streams to one core of another node.
pub trait Dial {
    /// What it makes.
    type Stream: AsyncRead + AsyncWrite + Unpin + 'static;

    /// Makes another one.
    fn dial(&self) -> LocalFuture<'_, io::Result<Self::Stream>>;
}

/// How a connection is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConnectionState {
    /// Requests pass.
    Up {
        /// Since when.
        since: Instant,
        /// Who is there, and the version that is spoken.
        peer: PeerIdentity,
    },
    /// There is none.
    Down {
        /// Since when.
        since: Instant,
        /// Why: what the last attempt said.
        reason: String,
    },
}

struct Shared {
    label: String,
    config: RpcConfig,
    own: Identity,
    target: Target,
    env: Env,
    state: RefCell<State>,
    metrics: Rc<PeerMetrics>,
    connection: watch::Sender<ConnectionState>,
    closed: Notify,
    /// Whether deadlines are being looked at, and the wish that they be.
    ticking: Cell<bool>,
    tick: Notify,
    log: Throttle,
    questions: Rc<Share>,
    attachments: Attachments,
}

/// Why a question to a node has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// It may have been heard or not: the connection broke, or it took too long.
    #[error("the node did not answer")]
    Unreachable,
    /// The node refused it, or failed at it: the text says why.
    #[error("{0}")]
    Refused(String),
}

/// Closes the connection when the last holder is gone.
struct Holder(Rc<Shared>);

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.closed.notify_one();
        self.0.tick.notify_one();
    }
}

/// A connection to one core of another node. Clones share it; it is closed when the last one and
/// the last [`super::RemoteDisk`] or [`super::RemoteVolume`] is dropped.
#[derive(Clone)]
pub struct Peer(Rc<Holder>);

impl Peer {
    /// Keeps a connection to `target` over streams that `dial` makes. Must be called within a
    /// [`tokio::task::LocalSet`]. `label` names the peer in logs and metrics.
    pub fn spawn(
        label: &str,
        own: Identity,
        target: Target,
        dial: impl Dial + 'static,
        config: RpcConfig,
        env: Env,
    ) -> Self {
        let metrics: Rc<PeerMetrics> = Rc::default();
        let down = ConnectionState::Down {
            since: Instant::now(),
            reason: "there was no connection yet".into(),
        };
        let shared = Rc::new(Shared {
            label: label.to_owned(),
            state: RefCell::new(State::new(*config.versions.end(), metrics.clone())),
            config,
            own,
            target,
            env,
            metrics,
            connection: watch::Sender::new(down),
            closed: Notify::new(),
            ticking: Cell::new(false),
            tick: Notify::new(),
            log: Throttle::default(),
            questions: Rc::default(),
            attachments: Attachments::default(),
        });
        let holder = Rc::new(Holder(shared.clone()));
        let weak = Rc::downgrade(&holder);
        tokio::task::spawn_local(keep(shared.clone(), dial));
        tokio::task::spawn_local(watch_deadlines(shared, weak));
        Self(holder)
    }

    /// Ends the connection for good: what was not sent never will be, and requests fail as unreachable. For
    /// who makes another [`Peer`] to the same node: the order of requests is kept within one only.
    pub fn close(&self) {
        self.0.0.closed.notify_one();
    }

    /// What was said when it was made.
    pub fn label(&self) -> &str {
        &self.0.0.label
    }

    /// Whether both share one connection.
    pub fn is(&self, other: &Self) -> bool {
        Rc::ptr_eq(&self.0, &other.0)
    }

    /// What is counted.
    pub fn metrics(&self) -> &Rc<PeerMetrics> {
        &self.0.0.metrics
    }

    /// How the connection is, now and whenever that changes.
    pub fn connection(&self) -> watch::Receiver<ConnectionState> {
        self.0.0.connection.subscribe()
    }

    /// Whether the process that was there has surely died: the connection broke, and others are refused.
    pub fn is_refused(&self) -> bool {
        self.0.0.state.borrow().is_refused()
    }

    /// Makes a request. It is on its way when this returns. Without an answer after `patience` its
    /// outcome is unknown.
    pub(super) fn request(
        &self,
        asked: Asked<'_>,
        share: &Rc<Share>,
        payload: Payload,
        patience: Duration,
    ) -> Result<Request, ShardError> {
        let shared = &self.0.0;
        let long = |what: &str| Err(ShardError::Invalid(format!("{what} of one request")));
        if asked.is_too_long(payload.len()) {
            return long("more bytes than a message holds");
        }
        if asked.fields_bytes() > CONTROL_REST_MAX - 1024 {
            return long("more fields than a message holds");
        }
        let config = &shared.config;
        let mut state = shared.state.borrow_mut();
        let now = Instant::now();
        if state.is_away(now, config.down_patience) {
            add(&shared.metrics.requests, 1);
            add(&shared.metrics.unreachable, 1);
            return Err(ShardError::Unreachable);
        }
        let checked = asked.is_bare() || config.checked_payload;
        let deadline = now + patience;
        let id = state.make(Made { asked, share, payload, checked, deadline })?;
        if !shared.ticking.replace(true) {
            shared.tick.notify_one();
        }
        Ok(Request { peer: self.clone(), id })
    }

    /// Puts a question to the node, and waits at most so long. It is on its way when this returns.
    ///
    /// # Errors
    /// [`AskError`].
    pub fn ask(
        &self,
        question: Bytes,
        patience: Duration,
    ) -> LocalFuture<'static, Result<Bytes, AskError>> {
        let payload = Payload::One(question);
        let request = self.request(Asked::Ask, &self.0.0.questions, payload, patience);
        Box::pin(async move {
            let answer = match request {
                Ok(request) => request.await,
                Err(error) => Err(error),
            };
            match answer {
                Ok(Answer::Told(told)) => told.map_err(AskError::Refused),
                Err(error) if error != ShardError::Unreachable => {
                    Err(AskError::Refused(error.to_string()))
                }
                // Replies are decoded by what was asked, so it is of another kind never.
                _ => Err(AskError::Unreachable),
            }
        })
    }

    /// What requests of this process to a volume there share.
    pub(super) fn attachments(&self) -> &Attachments {
        &self.0.0.attachments
    }

    /// How requests behave.
    pub(super) fn config(&self) -> &RpcConfig {
        &self.0.0.config
    }

    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.0.0.state.borrow().is_idle()
    }
}

/// A request on its way; a future of what comes of it. Dropped, the request goes on by itself.
pub(super) struct Request {
    peer: Peer,
    id: u64,
}

impl Future for Request {
    type Output = AnswerResult;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<AnswerResult> {
        self.peer.0.0.state.borrow_mut().poll(self.id, cx)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.peer.0.0.state.borrow_mut().abandon(self.id);
    }
}

/// Ends the waiting of requests whose time is over, while there are any.
async fn watch_deadlines(shared: Rc<Shared>, holder: std::rc::Weak<Holder>) {
    while holder.strong_count() > 0 {
        {
            let mut state = shared.state.borrow_mut();
            if state.pending() == 0 {
                shared.ticking.set(false);
            }
            let now = Instant::now();
            if state.is_away(now, shared.config.down_patience) {
                state.fail_queued();
            }
            state.expire(now);
        }
        if shared.ticking.get() {
            sleep(TICK).await;
        } else {
            shared.tick.notified().await;
        }
    }
}

/// Connects, moves frames, and connects again, until nobody needs the connection.
async fn keep(shared: Rc<Shared>, dial: impl Dial) {
    let instance = shared.env.random_u64();
    let mut failures = 0;
    for number in 1.. {
        let attempt = Attempt { instance, number };
        let connected = tokio::select! {
            biased;
            () = shared.closed.notified() => return,
            connected = reach(&shared, &dial, attempt) => connected,
        };
        let reason = match connected {
            Ok((stream, peer, window)) => {
                let began = Instant::now();
                let end = hold(&shared, stream, peer, window).await;
                if matches!(end, LinkEnd::Stopped) {
                    return;
                }
                if began.elapsed() >= LASTED {
                    failures = 0;
                }
                end.to_string()
            }
            Err(error) => {
                add(&shared.metrics.connects_failed, 1);
                failures = failures.max(1);
                let refused = matches!(&error, HandshakeError::Io(error)
                    if error.kind() == io::ErrorKind::ConnectionRefused);
                shared.state.borrow_mut().missed(refused);
                error.to_string()
            }
        };
        shared.note_down(reason);
        if failures > 0 {
            let ceiling = BACKOFF_MIN.saturating_mul(1 << (failures - 1).min(16));
            let ceiling = ceiling.min(shared.config.backoff_max);
            let us = u64::try_from(ceiling.as_micros()).unwrap_or(u64::MAX).max(2);
            let pause = Duration::from_micros(us / 2 + shared.env.random_below(us / 2));
            tokio::select! {
                biased;
                () = shared.closed.notified() => return,
                () = sleep(pause) => {}
            }
        }
        failures += 1;
    }
}

async fn reach<D: Dial>(
    shared: &Shared,
    dial: &D,
    attempt: Attempt,
) -> Result<(D::Stream, PeerIdentity, WindowSize), HandshakeError> {
    let patience = shared.config.connect_timeout;
    let reached = timeout(patience, async {
        let mut stream = dial.dial().await?;
        let versions = &shared.config.versions;
        let (peer, window) =
            connect(&mut stream, &shared.own, versions, shared.target, attempt).await?;
        Ok((stream, peer, window))
    });
    reached.await.unwrap_or(Err(HandshakeError::TimedOut(patience)))
}

async fn hold<S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Rc<Shared>,
    stream: S,
    peer: PeerIdentity,
    window: WindowSize,
) -> LinkEnd {
    let label = &shared.label;
    if shared.log.passes("connections to nodes") {
        let (node, name, version) = (peer.node, &peer.name, peer.version);
        tracing::info!(peer = label, %node, name, version, "connected to a node");
    }
    add(&shared.metrics.connects, 1);
    let version = peer.version;
    shared.state.borrow_mut().up(version, window);
    shared.connection.send_replace(ConnectionState::Up { since: Instant::now(), peer });
    let mut session = Session::new(shared.clone(), stream, version);
    let end = tokio::select! {
        biased;
        () = shared.closed.notified() => LinkEnd::Stopped,
        end = session.run() => end,
    };
    let text = end.to_string();
    let broken = matches!(end, LinkEnd::Violation(_));
    if broken {
        add(&shared.metrics.violations, 1);
    }
    if shared.log.passes("connections to nodes") {
        if broken {
            tracing::warn!(peer = label, reason = text, "connection to a node closed");
        } else {
            tracing::info!(peer = label, reason = text, "connection to a node ended");
        }
    }
    if broken || matches!(end, LinkEnd::Stopped) {
        session.farewell(&text).await;
    }
    shared.state.borrow_mut().down();
    end
}

impl Shared {
    fn note_down(&self, reason: String) {
        let since = self.state.borrow().down_since;
        tracing::debug!(peer = self.label, reason, "no connection to a node");
        self.connection.send_replace(ConnectionState::Down { since, reason });
    }

    fn goodbye(&self, text: &str) {
        self.state.borrow_mut().push_control(Kind::Goodbye, 0, text.as_bytes());
    }
}
