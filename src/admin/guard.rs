//! The listener of the admin server: bounds connections and their idle time, so that a client
//! that opens many, or sends nothing, disturbs nobody else.

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
use tokio::time::{Instant, Sleep};

/// Connections served at once; further ones wait in the listen queue.
pub(super) const ADMIN_CONNECTIONS_MAX: usize = 64;

/// A connection on which neither a byte arrives nor one is sent for this long is closed. Longer
/// than [`super::server::REQUEST_TIMEOUT`], so that no request under way is cut.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_mins(1);

/// A listener with a bound on its connections.
pub(super) struct GuardedListener {
    listener: TcpListener,
    permits: Arc<Semaphore>,
    idle: Duration,
}

impl GuardedListener {
    pub(super) fn new(listener: TcpListener, connections_max: usize, idle: Duration) -> Self {
        Self { listener, permits: Arc::new(Semaphore::new(connections_max)), idle }
    }
}

impl Listener for GuardedListener {
    type Io = GuardedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let permit = Arc::clone(&self.permits)
            .acquire_owned()
            .await
            .expect("the listener never closes its semaphore");
        // `TcpListener`'s own accept logs and retries, with a pause when descriptors run out.
        let (stream, peer) = Listener::accept(&mut self.listener).await;
        let idle = Box::pin(tokio::time::sleep(self.idle));
        (GuardedStream { stream, idle, timeout: self.idle, _permit: permit }, peer)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that fails reads after [`IDLE_TIMEOUT`] and gives its permit back when dropped.
pub(super) struct GuardedStream {
    stream: TcpStream,
    idle: Pin<Box<Sleep>>,
    timeout: Duration,
    _permit: OwnedSemaphorePermit,
}

impl GuardedStream {
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
        if let Poll::Ready(result) = Pin::new(&mut self.stream).poll_read(cx, buf) {
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
        if let Poll::Ready(result) = Pin::new(&mut self.stream).poll_write(cx, buf) {
            self.touch();
            return Poll::Ready(result);
        }
        ready!(self.idle.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn connections_are_bounded_and_a_silent_one_is_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let mut guarded = GuardedListener::new(listener, 1, Duration::from_millis(50));
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
