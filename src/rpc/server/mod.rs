//! The serving side: who may connect, what is served, and the end.

mod directories;
mod session;
mod volumes;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};

use super::RpcConfig;
use super::frame::Refusal;
use super::handshake::{
    Attempt, Caller, HandshakeError, Identity, WindowSize, accept, refuse, welcome,
};
use super::link::LinkEnd;
use super::metrics::{ServerMetrics, add};
use super::tcp;
use crate::id::NodeId;
use crate::limits::RPC_WINDOW_BYTES_MIN;
use crate::obs::throttle::Throttle;
pub use directories::{Directories, DiskDirectory, Questions, Refuses, Served, VolumeDirectory};
use session::{Session, drain};
use volumes::Gates;

/// Pause after a failed accept (say, no file descriptor left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long the end of a connection may take.
const LINGER: Duration = Duration::from_secs(1);
/// Handshakes that go on at once, at most.
const HANDSHAKES_MAX: u64 = 256;
/// Cores of other nodes that are remembered, at most.
const CALLERS_MAX: usize = 16 << 10;

/// The newest connection of a core of another node.
struct Newest {
    attempt: Attempt,
    /// Tells that connection that another has its place. Its sender is dropped with the entry.
    cut: Rc<Cut>,
}

/// Ends a session from outside.
#[derive(Default)]
pub(super) struct Cut {
    done: Cell<bool>,
    told: Notify,
}

impl Cut {
    fn now(&self) {
        self.done.set(true);
        self.told.notify_one();
    }

    pub(super) fn is_done(&self) -> bool {
        self.done.get()
    }

    pub(super) async fn told(&self) {
        self.told.notified().await;
    }
}

struct Shared {
    own: Identity,
    config: RpcConfig,
    directories: Directories,
    gates: Rc<Gates>,
    metrics: Rc<ServerMetrics>,
    callers: RefCell<BTreeMap<(NodeId, u16), Newest>>,
    handshakes: Cell<u64>,
    log: Throttle,
    stop: watch::Receiver<bool>,
}

/// Counts up while it lives.
struct Gauge<'a>(&'a Cell<u64>, u64);

impl<'a> Gauge<'a> {
    fn new(cell: &'a Cell<u64>, by: u64) -> Self {
        cell.set(cell.get() + by);
        Self(cell, by)
    }
}

impl Drop for Gauge<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - self.1);
    }
}

/// Serves the disks and volumes of one core. Lives on one thread, within a [`tokio::task::LocalSet`]. Clones share
/// everything.
#[derive(Clone)]
pub struct Server {
    shared: Rc<Shared>,
}

impl Server {
    /// A server of what is in `directories` (which disks alone may stand for). It stops in order when `stop` becomes true, or its
    /// sender is dropped: nothing new is taken, what runs finishes within
    /// [`RpcConfig::drain_timeout`].
    pub fn new(
        own: Identity,
        directories: impl Into<Directories>,
        config: RpcConfig,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let shared = Shared {
            own,
            config,
            directories: directories.into(),
            gates: Rc::default(),
            metrics: Rc::default(),
            callers: RefCell::default(),
            handshakes: Cell::new(0),
            log: Throttle::default(),
            stop,
        };
        Self { shared: Rc::new(shared) }
    }

    /// What the server counts.
    pub fn metrics(&self) -> &Rc<ServerMetrics> {
        &self.shared.metrics
    }

    /// Serves connections of `listener` until the server has stopped.
    pub async fn serve_tcp(&self, listener: TcpListener) {
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                biased;
                () = self.shared.stopped() => break,
                Some(joined) = connections.join_next() => {
                    report(joined);
                    continue;
                }
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, address)) => {
                    if let Err(error) = tcp::prepare(&stream) {
                        tracing::debug!(%error, "cannot set options of a connection of a node");
                    }
                    let server = self.clone();
                    connections.spawn_local(async move {
                        server.serve_stream(stream, &address.to_string()).await;
                    });
                }
                Err(error) => {
                    if self.logs() {
                        tracing::warn!(%error, "cannot accept a connection of a node");
                    }
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        while let Some(joined) = connections.join_next().await {
            report(joined);
        }
    }

    /// Serves one connection that was accepted elsewhere; `address` names it in the log until it has
    /// said who it is. What it asked for and is not done in the end goes on by itself.
    pub async fn serve_stream<S>(&self, stream: S, address: &str)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.serve_known(stream, address, None).await;
    }

    /// As [`Self::serve_stream`], for a stream whose other end has proven that it is `node`: a hello that
    /// says otherwise is refused.
    pub async fn serve_stream_of<S>(&self, stream: S, address: &str, node: NodeId)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        self.serve_known(stream, address, Some(node)).await;
    }

    async fn serve_known<S>(&self, mut stream: S, address: &str, proven: Option<NodeId>)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let shared = &self.shared;
        if shared.handshakes.get() >= HANDSHAKES_MAX {
            add(&shared.metrics.refused, 1);
            return;
        }
        let met = {
            let _counted = Gauge::new(&shared.handshakes, 1);
            let patience = shared.config.connect_timeout;
            tokio::select! {
                biased;
                () = shared.stopped() => return,
                met = timeout(patience, self.meet(&mut stream, proven)) => {
                    met.unwrap_or(Err(HandshakeError::TimedOut(patience)))
                }
            }
        };
        let (caller, window, cut) = match met {
            Ok(met) => met,
            Err(error) => {
                add(&shared.metrics.refused, 1);
                if self.logs() {
                    tracing::warn!(address, %error, "a node could not connect");
                }
                // Whoever was told why is given the chance to read it.
                drop(timeout(LINGER, stream.shutdown()).await);
                return;
            }
        };
        let metrics = &shared.metrics;
        let _given = Gauge::new(&metrics.window_bytes, window.bytes as u64);
        let _open = Gauge::new(&metrics.connections, 1);
        add(&metrics.accepted, 1);
        let peer = caller.identity.name.as_str();
        let (core, version) = (caller.identity.core, caller.identity.version);
        if self.logs() {
            tracing::info!(address, peer, core, version, "a node connected");
        }
        let mut session = Session::new(stream, &caller.identity, window, shared.clone());
        let end = match welcome(session.stream(), &shared.own, &caller.identity, window).await {
            Ok(()) => session.run(&cut).await,
            Err(_) => LinkEnd::Truncated,
        };
        shared.forget(&caller, &cut);
        let reason = end.to_string();
        let broken = matches!(end, LinkEnd::Violation(_));
        if broken {
            add(&metrics.violations, 1);
        }
        if self.logs() {
            if broken {
                tracing::warn!(address, peer, core, reason, "connection of a node closed");
            } else {
                tracing::info!(address, peer, core, reason, "connection of a node ended");
            }
        }
        let (running, farewell) = session.end(end);
        tokio::task::spawn_local(drain(running, shared.metrics.clone()));
        drop(timeout(LINGER, farewell).await);
    }

    /// Hears who connects and makes room for it. What an older connection of the same process has not
    /// delivered by now never will be.
    async fn meet<S>(
        &self,
        stream: &mut S,
        proven: Option<NodeId>,
    ) -> Result<(Caller, WindowSize, Rc<Cut>), HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Shared { own, config, callers, .. } = &*self.shared;
        let caller = accept(stream, own, &config.versions).await?;
        if let Some(proven) = proven.filter(|proven| *proven != caller.identity.node) {
            let reason =
                format!("the certificate is of node {proven}, not {}", caller.identity.node);
            return refuse(stream, own, &config.versions, Refusal::Node, &reason).await;
        }
        let key = (caller.identity.node, caller.identity.core);
        let refusal = {
            let mut callers = callers.borrow_mut();
            let newest = callers.get(&key);
            let Attempt { instance, number } = caller.attempt;
            let stale = newest.is_some_and(|newest| {
                newest.attempt.instance == instance && newest.attempt.number >= number
            });
            let window = self.shared.window();
            if stale {
                (Refusal::Stale, "a newer connection of this process was taken before")
            } else if let Some(window) = window
                && (newest.is_some() || callers.len() < CALLERS_MAX)
            {
                let cut: Rc<Cut> = Rc::default();
                let newest = Newest { attempt: caller.attempt, cut: cut.clone() };
                if let Some(older) = callers.insert(key, newest) {
                    older.cut.now();
                }
                return Ok((caller, window, cut));
            } else {
                (Refusal::Busy, "there are as many connections as there is memory for")
            }
        };
        refuse(stream, own, &config.versions, refusal.0, refusal.1).await
    }

    /// Whether one more line about connections may be logged.
    fn logs(&self) -> bool {
        self.shared.log.passes("connections of nodes")
    }
}

impl Shared {
    /// Completes when the server stops.
    async fn stopped(&self) {
        let mut stop = self.stop.clone();
        // An error means that the owner is gone, which is an order to stop as well.
        drop(stop.wait_for(|stop| *stop).await);
    }

    /// What the next connection may have: as configured, but no more than an eighth of what is left.
    fn window(&self) -> Option<WindowSize> {
        let given = usize::try_from(self.metrics.window_bytes.get()).unwrap_or(usize::MAX);
        let left = self.config.server_bytes.saturating_sub(given);
        let least = RPC_WINDOW_BYTES_MIN.min(self.config.window_bytes);
        let bytes = self.config.window_bytes.min((left / 8).max(least));
        let requests = self.config.requests_max.max(1);
        (left >= bytes).then_some(WindowSize { requests, bytes })
    }

    /// A connection has ended: nothing of it can arrive any more. The number of the newest connection of
    /// a process is remembered, as a late one may still come.
    fn forget(&self, caller: &Caller, cut: &Rc<Cut>) {
        let mut callers = self.callers.borrow_mut();
        let key = (caller.identity.node, caller.identity.core);
        let is_newest = callers.get(&key).is_some_and(|newest| Rc::ptr_eq(&newest.cut, cut));
        if is_newest && callers.len() > CALLERS_MAX / 2 {
            callers.remove(&key);
        }
    }
}

fn report(joined: Result<(), JoinError>) {
    if let Err(error) = joined {
        tracing::error!(%error, "a connection of a node ended by a defect");
    }
}
