//! The listener of the admin server: bounds connections and their idle time, so that a client
//! that opens many, or sends nothing, disturbs nobody else; and begins TLS, side by side for all of them.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, Sleep};
use tokio_rustls::server::TlsStream;

use super::access::Who;
use crate::trust::AdminTls;

/// Connections served at once; further ones wait in the listen queue.
pub(super) const ADMIN_CONNECTIONS_MAX: usize = 64;

/// A connection on which neither a byte arrives nor one is sent for this long is closed. Longer
/// than [`super::server::REQUEST_TIMEOUT`], so that no request under way is cut.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_mins(1);

/// Longest time of a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A listener with a bound on its connections.
pub(super) struct GuardedListener {
    listener: TcpListener,
    tls: Option<AdminTls>,
    /// TLS handshakes under way; nothing comes of those that fail.
    handshakes: JoinSet<Option<(GuardedStream, SocketAddr)>>,
    permits: Arc<Semaphore>,
    idle: Duration,
}

impl GuardedListener {
    pub(super) fn new(
        listener: TcpListener,
        tls: Option<AdminTls>,
        connections_max: usize,
        idle: Duration,
    ) -> Self {
        let permits = Arc::new(Semaphore::new(connections_max));
        Self { listener, tls, handshakes: JoinSet::new(), permits, idle }
    }
}

/// The next connection, once there is room for it.
async fn take(
    permits: Arc<Semaphore>,
    listener: &mut TcpListener,
) -> (OwnedSemaphorePermit, TcpStream, SocketAddr) {
    let permit = permits.acquire_owned().await.expect("the listener never closes its semaphore");
    // `TcpListener`'s own accept logs and retries, with a pause when descriptors run out.
    let (stream, peer) = Listener::accept(listener).await;
    (permit, stream, peer)
}

/// Begins TLS on a connection; none if it fails.
async fn secure(
    tls: AdminTls,
    (permit, stream, peer): (OwnedSemaphorePermit, TcpStream, SocketAddr),
    idle: Duration,
) -> Option<(GuardedStream, SocketAddr)> {
    let failed = match tokio::time::timeout(HANDSHAKE_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok((stream, holder))) => {
            let who = holder.map_or(Who::Stranger, Who::Member);
            let wire = Wire::Tls(Box::new(stream));
            return Some((GuardedStream::new(wire, who, idle, permit), peer));
        }
        Ok(Err(why)) => crate::trust::reason(&why),
        Err(_) => format!("no handshake within {HANDSHAKE_TIMEOUT:?}"),
    };
    // Anybody can cause it.
    tracing::debug!(%peer, why = failed, "a client of the admin API was refused");
    None
}

impl Listener for GuardedListener {
    type Io = GuardedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            tokio::select! {
                biased;
                Some(done) = self.handshakes.join_next() => {
                    if let Ok(Some(accepted)) = done {
                        return accepted;
                    }
                }
                taken = take(Arc::clone(&self.permits), &mut self.listener) => {
                    if let Some(tls) = &self.tls {
                        self.handshakes.spawn(secure(tls.clone(), taken, self.idle));
                    } else {
                        let (permit, stream, peer) = taken;
                        let wire = Wire::Plain(stream);
                        return (GuardedStream::new(wire, Who::Local, self.idle, permit), peer);
                    }
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that fails reads after [`IDLE_TIMEOUT`] and gives its permit back when dropped.
pub(super) struct GuardedStream {
    stream: Wire,
    who: Who,
    idle: Pin<Box<Sleep>>,
    timeout: Duration,
    _permit: OwnedSemaphorePermit,
}

/// What bytes travel on.
enum Wire {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Calls the stream that it is.
macro_rules! on_wire {
    ($wire:expr, $stream:ident => $call:expr) => {
        match $wire {
            Wire::Plain($stream) => {
                let $stream = Pin::new($stream);
                $call
            }
            Wire::Tls($stream) => {
                let $stream = Pin::new($stream.as_mut());
                $call
            }
        }
    };
}

impl GuardedStream {
    fn new(stream: Wire, who: Who, timeout: Duration, permit: OwnedSemaphorePermit) -> Self {
        let idle = Box::pin(tokio::time::sleep(timeout));
        Self { stream, who, idle, timeout, _permit: permit }
    }

    /// Who connected.
    pub(super) fn who(&self) -> &Who {
        &self.who
    }

    fn touch(&mut self) {
        self.idle.as_mut().reset(Instant::now() + self.timeout);
    }
}

impl AsyncRead for GuardedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Poll::Ready(result) = on_wire!(&mut self.stream, it => it.poll_read(cx, buf)) {
            self.touch();
            return Poll::Ready(result);
        }
        ready!(self.idle.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncWrite for GuardedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(result) = on_wire!(&mut self.stream, it => it.poll_write(cx, buf)) {
            self.touch();
            return Poll::Ready(result);
        }
        ready!(self.idle.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_wire!(&mut self.stream, it => it.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_wire!(&mut self.stream, it => it.poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn connections_are_bounded_and_a_silent_one_is_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let mut guarded = GuardedListener::new(listener, None, 1, Duration::from_millis(50));
        let address = guarded.local_addr().expect("an address");
        let _first = TcpStream::connect(address).await.expect("the first connects");
        let _second = TcpStream::connect(address).await.expect("the second waits in the queue");
        let (mut stream, _) = guarded.accept().await;
        let held = tokio::time::timeout(Duration::from_millis(20), guarded.accept()).await;
        assert!(held.is_err(), "a second connection was taken beyond the bound");
        let error = stream.read_u8().await.expect_err("nothing was sent");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(stream);
        guarded.accept().await;
    }
}
