//! A server on memory in a thread of its own, listening on TCP and on a unix socket, for clients
//! that block; and certificates for it.

#![allow(dead_code, reason = "each test binary uses a part of it")]

mod identity;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::mpsc;
use std::thread::JoinHandle;

use sds::export::memory::MemoryDirectory;
use sds::export::nbd::{NbdConfig, Server, TlsMode, UnixSocket};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::LocalSet;

use crate::nbd_support::VOLUME_BYTES;

pub(crate) use identity::Identity;

pub(crate) struct Options {
    pub(crate) tls: TlsMode,
    pub(crate) volume_bytes: u64,
}

pub(crate) fn options() -> Options {
    Options { tls: TlsMode::Off, volume_bytes: VOLUME_BYTES }
}

impl Options {
    pub(crate) fn tls_required(self, acceptor: tokio_rustls::TlsAcceptor) -> Self {
        Self { tls: TlsMode::Require(acceptor), ..self }
    }

    pub(crate) fn tls_allowed(self, acceptor: tokio_rustls::TlsAcceptor) -> Self {
        Self { tls: TlsMode::Allow(acceptor), ..self }
    }
}

/// A running server; dropping it stops it in order.
pub(crate) struct Running {
    pub(crate) tcp: SocketAddr,
    pub(crate) unix: PathBuf,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    _dir: TempDir,
}

impl Running {
    pub(crate) fn start(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let unix = dir.path().join("nbd.sock");
        let path = unix.clone();
        let (stop, stopped) = watch::channel(false);
        let (ready, started) = mpsc::channel();
        #[allow(clippy::disallowed_methods, reason = "clients of this test block")]
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            LocalSet::new().block_on(&runtime, async {
                let directory = Rc::new(MemoryDirectory::default());
                directory.add("vol0", options.volume_bytes);
                directory.add("vol1", options.volume_bytes);
                let config = NbdConfig { tls: options.tls, ..NbdConfig::default() };
                let server = Server::new(directory, config, stopped);
                let socket = UnixSocket::bind(&path).unwrap();
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                ready.send(listener.local_addr().unwrap()).unwrap();
                tokio::join!(server.serve_tcp(listener), server.serve_unix(socket));
            });
        });
        let tcp = started.recv().unwrap();
        Self { tcp, unix, stop, thread: Some(thread), _dir: dir }
    }

    /// Stops the server and waits for its end.
    pub(crate) fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            assert!(joined.is_ok() || std::thread::panicking(), "the server panicked");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}
