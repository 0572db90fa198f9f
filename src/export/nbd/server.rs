//! Listeners and connections: who may connect, the handshake with its time limit, and the end.

use std::cell::Cell;
use std::future::{Future, poll_fn};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{sleep, timeout};

use super::metrics::{Gauge, NbdMetrics, add};
use super::negotiate::{Agreed, Negotiation, NegotiationError, Outcome, greet};
use super::permits::{Budget, Permits};
use super::request::Connection;
use super::session::{End, Patience, SessionError, serve};
use super::tls::TlsMode;
use crate::export::ExportDirectory;
use crate::limits::{CONNECTIONS_MAX, SERVER_BYTES_MAX};
use crate::obs::throttle::Throttle;

/// Connections beyond the limit that are told so; further ones are just closed.
const REFUSALS_MAX: u64 = 32;
/// How long a handshake may go on once the server stops.
const HANDSHAKE_STOP_GRACE: Duration = Duration::from_secs(1);
/// How long a closing connection waits for the client to close its side, so that no reset
/// overtakes the last replies.
const LINGER: Duration = Duration::from_secs(1);
/// Pause after a failed accept (say, no file descriptor left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Idle time before a TCP keepalive probe, time between probes, and probes before the end.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_mins(1), Duration::from_secs(10), 6);

/// Settings of a server. [`Default`] is what a node without configuration runs with.
#[derive(Clone)]
pub struct NbdConfig {
    /// Encryption.
    pub tls: TlsMode,
    /// Connections served at once, over all listeners.
    pub connections_max: usize,
    /// Payload bytes under way of all connections together, beyond the little that each has for
    /// itself; at least the largest request.
    pub memory_bytes_max: usize,
    /// Time from connecting to the start of transmission.
    pub handshake_timeout: Duration,
    /// Time without a byte after which a connection is closed: in the middle of a request, or, if
    /// others wait for the memory of its replies, when it does not take them.
    pub stall_timeout: Duration,
    /// Time that running requests get when a connection or the server ends.
    pub drain_timeout: Duration,
}

impl Default for NbdConfig {
    fn default() -> Self {
        Self {
            tls: TlsMode::Off,
            connections_max: CONNECTIONS_MAX,
            memory_bytes_max: SERVER_BYTES_MAX,
            handshake_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_mins(2),
            drain_timeout: Duration::from_secs(10),
        }
    }
}

/// What all connections of a server share.
pub(super) struct Shared {
    pub(super) config: NbdConfig,
    metrics: Rc<NbdMetrics>,
    budget: Rc<Budget>,
    refusing: Cell<u64>,
    /// Of what clients make the log tell.
    log: Throttle,
    stop: watch::Receiver<bool>,
}

impl Shared {
    /// Whether the server is stopping.
    pub(super) fn stopping(&self) -> bool {
        *self.stop.borrow() || self.stop.has_changed().is_err()
    }

    fn stopped(&self) -> impl Future<Output = ()> + use<> {
        let mut stop = self.stop.clone();
        async move {
            // An error means that the owner is gone, which is an order to stop as well.
            drop(stop.wait_for(|stop| *stop).await);
        }
    }
}

/// An NBD server: any number of listeners on one directory of exports. Lives on one thread, within
/// a [`tokio::task::LocalSet`]. Clones share everything.
#[derive(Clone)]
pub struct Server {
    pub(super) shared: Rc<Shared>,
    pub(super) directory: Rc<dyn ExportDirectory>,
}

impl Server {
    /// A server of the exports in `directory`. It stops in order when `stop` becomes true, or its
    /// sender is dropped: no new connections, no new requests, running ones finish within
    /// [`NbdConfig::drain_timeout`].
    pub fn new(
        directory: Rc<dyn ExportDirectory>,
        config: NbdConfig,
        stop: watch::Receiver<bool>,
    ) -> Self {
        let shared = Shared {
            budget: Rc::new(Budget::new(config.memory_bytes_max)),
            config,
            metrics: Rc::default(),
            refusing: Cell::new(0),
            log: Throttle::default(),
            stop,
        };
        Self { shared: Rc::new(shared), directory }
    }

    /// The same server, with its limits and counts, for other exports.
    #[must_use]
    pub fn with_directory(&self, directory: Rc<dyn ExportDirectory>) -> Self {
        Self { shared: self.shared.clone(), directory }
    }

    /// What the server counts.
    pub fn metrics(&self) -> &Rc<NbdMetrics> {
        &self.shared.metrics
    }

    /// Serves connections of `listener` until the server has stopped.
    pub async fn serve_tcp(&self, listener: TcpListener) {
        self.accept_all(listener).await;
    }

    /// Serves connections of `socket` until the server has stopped; then removes its file.
    pub async fn serve_unix(&self, socket: UnixSocket) {
        self.accept_all(socket).await;
    }

    /// Serves one connection that was accepted elsewhere; `peer` names the client in the log.
    pub async fn serve_stream<S>(&self, stream: S, peer: &str)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let metrics = &self.shared.metrics;
        let limit = self.shared.config.connections_max;
        if metrics.connections.get() < u64::try_from(limit).unwrap_or(u64::MAX) {
            add(&metrics.connections_total, 1);
            let _open = Gauge::new(&metrics.connections);
            self.connection(stream, peer, None).await;
            return;
        }
        add(&metrics.connections_refused, 1);
        if self.logs() {
            tracing::warn!(peer, limit, "NBD connection refused: too many connections");
        }
        if self.shared.refusing.get() < REFUSALS_MAX {
            let _refusing = Gauge::new(&self.shared.refusing);
            let text = format!("the server has its limit of {limit} connections");
            self.connection(stream, peer, Some(&text)).await;
        }
    }

    async fn accept_all<A: Accept>(&self, mut listener: A) {
        let mut connections = JoinSet::new();
        let mut stop = pin!(self.shared.stopped());
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut stop => break,
                Some(joined) = connections.join_next() => {
                    report(joined);
                    continue;
                }
                accepted = poll_fn(|cx| listener.poll_accept(cx)) => accepted,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let server = self.clone();
                    connections.spawn_local(async move {
                        server.serve_stream(stream, &peer).await;
                    });
                }
                Err(error) => {
                    if self.logs() {
                        tracing::warn!(%error, "cannot accept an NBD connection");
                    }
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        let all = async {
            while let Some(joined) = connections.join_next().await {
                report(joined);
            }
        };
        let patience = self.shared.config.drain_timeout + HANDSHAKE_STOP_GRACE + 2 * LINGER;
        if timeout(patience, all).await.is_err() {
            tracing::warn!("NBD connections are cut off: they did not end in time");
            connections.shutdown().await;
        }
    }

    /// Whether one more line about connections may be logged.
    fn logs(&self) -> bool {
        self.shared.log.passes("NBD connections")
    }

    /// Handshake, perhaps TLS, transmission.
    async fn connection<S>(&self, mut stream: S, peer: &str, refuse: Option<&str>)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut limit = pin!(self.handshake_limit());
        let plain = async {
            let flags = greet(&mut stream).await?;
            let negotiation = Negotiation::new(&mut stream, self, flags, false, refuse);
            Ok((flags, negotiation.run().await?))
        };
        let Some((flags, outcome)) = self.handshake(peer, plain, limit.as_mut()).await else {
            return;
        };
        match outcome {
            Outcome::Left => {}
            Outcome::Transmit(agreed) => self.transmission(stream, peer, agreed, false).await,
            Outcome::StartTls => {
                let Some(acceptor) = self.shared.config.tls.acceptor() else { return };
                let encrypted = async {
                    let mut stream = acceptor.accept(stream).await?;
                    let negotiation = Negotiation::new(&mut stream, self, flags, true, refuse);
                    let outcome = negotiation.run().await?;
                    Ok((stream, outcome))
                };
                match self.handshake(peer, encrypted, limit).await {
                    Some((stream, Outcome::Transmit(agreed))) => {
                        self.transmission(stream, peer, agreed, true).await;
                    }
                    Some((mut stream, _)) => close(&mut stream, false).await,
                    None => {}
                }
            }
        }
    }

    /// Completes when a handshake has to end; the text says why.
    async fn handshake_limit(&self) -> &'static str {
        tokio::select! {
            biased;
            () = self.shared.stopped() => {
                sleep(HANDSHAKE_STOP_GRACE).await;
                "the server is stopping"
            }
            () = sleep(self.shared.config.handshake_timeout) => "it took too long",
        }
    }

    /// Runs a part of a handshake within its limit; logs why it failed.
    async fn handshake<T>(
        &self,
        peer: &str,
        part: impl Future<Output = Result<T, NegotiationError>>,
        limit: impl Future<Output = &'static str>,
    ) -> Option<T> {
        let reason = tokio::select! {
            biased;
            result = part => match result {
                Ok(done) => return Some(done),
                Err(error) => error.to_string(),
            },
            reason = limit => reason.to_owned(),
        };
        add(&self.shared.metrics.handshakes_failed, 1);
        if self.logs() {
            tracing::warn!(peer, reason, "NBD handshake failed");
        }
        None
    }

    async fn transmission<S>(&self, mut stream: S, peer: &str, agreed: Agreed, tls: bool)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Agreed { name, target, structured, allocation } = agreed;
        let export = name.as_str();
        if self.logs() {
            tracing::info!(peer, export, tls, structured, "NBD client attached");
        }
        let connection = Rc::new(Connection {
            target,
            structured,
            allocation,
            metrics: Rc::clone(&self.shared.metrics),
            permits: Permits::new(Rc::clone(&self.shared.budget)),
            replies: std::cell::RefCell::default(),
            stopping: Cell::new(false),
        });
        let config = &self.shared.config;
        let patience = Patience { stall: config.stall_timeout, drain: config.drain_timeout };
        let result = serve(&mut stream, connection, patience, self.shared.stopped()).await;
        if let Err(error) = &result
            && !matches!(error, SessionError::Io(_))
        {
            add(&self.shared.metrics.protocol_errors, 1);
        }
        match &result {
            _ if !self.logs() => {}
            Ok(end) => tracing::info!(peer, export, ?end, "NBD client detached"),
            Err(SessionError::Io(error)) => {
                tracing::info!(peer, export, %error, "NBD connection broke");
            }
            Err(error) => {
                tracing::warn!(peer, export, %error, "NBD connection closed");
            }
        }
        if !matches!(result, Err(SessionError::Io(_))) {
            let heard = !matches!(result, Ok(End::Closed) | Err(SessionError::Truncated));
            close(&mut stream, heard).await;
        }
    }
}

/// Ends a stream in order; with `linger`, waits a moment for the client to close it too.
async fn close<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, linger: bool) {
    let orderly = async {
        if stream.shutdown().await.is_ok() && linger {
            let mut scrap = [0; 1024];
            while matches!(stream.read(&mut scrap).await, Ok(1..)) {}
        }
    };
    if timeout(LINGER, orderly).await.is_err() {
        tracing::debug!("an NBD client did not close its side of the connection");
    }
}

fn report(joined: Result<(), JoinError>) {
    if let Err(error) = joined {
        tracing::error!(%error, "an NBD connection ended by a defect");
    }
}

/// Where connections come from.
trait Accept {
    type Stream: AsyncRead + AsyncWrite + Unpin + 'static;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(Self::Stream, String)>>;
}

impl Accept for TcpListener {
    type Stream = TcpStream;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, String)>> {
        let (stream, address) = ready!(TcpListener::poll_accept(self, cx))?;
        let (idle, interval, probes) = KEEPALIVE;
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(idle)
            .with_interval(interval)
            .with_retries(probes);
        let prepared = stream
            .set_nodelay(true)
            .and_then(|()| socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive));
        if let Err(error) = prepared {
            tracing::debug!(%error, "cannot set options of an NBD connection");
        }
        Poll::Ready(Ok((stream, address.to_string())))
    }
}

impl Accept for UnixSocket {
    type Stream = UnixStream;

    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(UnixStream, String)>> {
        let (stream, _) = ready!(self.listener.poll_accept(cx))?;
        Poll::Ready(Ok((stream, format!("unix:{}", self.path.display()))))
    }
}

/// A listening unix socket, whose file is removed when it is dropped.
pub struct UnixSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl UnixSocket {
    /// Listens at `path`. A socket that nobody listens at any more is replaced.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] if somebody listens there, [`io::ErrorKind::AlreadyExists`] if
    /// something else than a socket is there, and what the operating system refuses.
    pub fn bind(path: &Path) -> io::Result<Self> {
        if let Ok(metadata) = std::fs::symlink_metadata(path) {
            let described =
                |kind, what: &str| Err(io::Error::new(kind, format!("{}: {what}", path.display())));
            if !metadata.file_type().is_socket() {
                return described(io::ErrorKind::AlreadyExists, "is not a socket");
            }
            if std::os::unix::net::UnixStream::connect(path).is_ok() {
                return described(io::ErrorKind::AddrInUse, "somebody listens there already");
            }
            std::fs::remove_file(path)?;
        }
        Ok(Self { listener: UnixListener::bind(path)?, path: path.to_owned() })
    }
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(%error, path = %self.path.display(), "cannot remove an NBD socket");
        }
    }
}
