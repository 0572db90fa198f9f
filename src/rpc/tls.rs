//! TLS between nodes: each end knows which node the other is before a byte of the protocol is read.
//!
//! What a node says of itself in its hello is then held against its certificate
//! ([`Server::serve_stream_of`]). Whether a node with a certificate of the cluster still belongs to it is
//! for `admits` to say, which the owner of the server gives.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::client::TlsStream;

use super::client::Dial;
use super::{Server, tcp};
use crate::id::NodeId;
use crate::obs::throttle::Throttle;
use crate::shard::LocalFuture;
use crate::trust::{NodeConnector, NodeTls, TrustError};

/// Longest time of a TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// TLS handshakes that go on at once, at most.
const HANDSHAKES_MAX: usize = 256;
/// Pause after a failed accept (say, no file descriptor left).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connects to one node at an address, which is resolved anew each time.
#[derive(Clone)]
pub struct TlsDial {
    /// `host:port`.
    address: String,
    connector: NodeConnector,
}

impl TlsDial {
    /// What connects to `node` at `address`, `host:port`, with the credentials of this node.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn new(address: String, node: NodeId, tls: &NodeTls) -> Result<Self, TrustError> {
        Ok(Self { address, connector: tls.client(node)? })
    }

    /// What connects to whichever node of the cluster is at `address`.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn to_any(address: String, tls: &NodeTls) -> Result<Self, TrustError> {
        Ok(Self { address, connector: tls.client_of_any()? })
    }
}

impl Dial for TlsDial {
    type Stream = TlsStream<TcpStream>;

    fn dial(&self) -> LocalFuture<'_, io::Result<Self::Stream>> {
        Box::pin(async move {
            let stream = TcpStream::connect(&self.address).await?;
            tcp::prepare(&stream)?;
            self.connector.connect(stream).await
        })
    }
}

/// Counts a handshake while it lives.
struct Counted(Rc<Cell<usize>>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Serves nodes of the cluster that connect to `listener`, until `stop` becomes true or its sender is
/// dropped; then waits for the connections that there are, which end with the server. `admits` is asked
/// once for each connection, after the certificate was found good. Must be called within a
/// [`tokio::task::LocalSet`].
pub async fn serve_tls(
    server: Server,
    listener: TcpListener,
    tls: NodeTls,
    admits: Rc<dyn Fn(NodeId) -> bool>,
    mut stop: watch::Receiver<bool>,
) {
    let mut connections = JoinSet::new();
    let handshakes: Rc<Cell<usize>> = Rc::default();
    let log = Rc::new(Throttle::default());
    loop {
        let accepted = tokio::select! {
            biased;
            // An error means that the owner is gone, which is an order to stop as well.
            _ = stop.wait_for(|stop| *stop) => break,
            Some(joined) = connections.join_next() => {
                report(joined);
                continue;
            }
            accepted = listener.accept() => accepted,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                if log.passes("connections of nodes") {
                    tracing::warn!(%error, "cannot accept a connection of a node");
                }
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if handshakes.get() >= HANDSHAKES_MAX {
            continue;
        }
        handshakes.set(handshakes.get() + 1);
        let counted = Counted(handshakes.clone());
        let (server, tls) = (server.clone(), tls.clone());
        let (admits, log) = (admits.clone(), log.clone());
        connections.spawn_local(async move {
            let address = address.to_string();
            match let_in(stream, &tls, &*admits).await {
                Ok((stream, node)) => {
                    drop(counted);
                    server.serve_stream_of(stream, &address, node).await;
                }
                Err(error) if log.passes("nodes that are not let in") => {
                    tracing::warn!(address, %error, "a connection to the port of nodes is refused");
                }
                Err(_) => {}
            }
        });
    }
    drop(listener);
    while let Some(joined) = connections.join_next().await {
        report(joined);
    }
}

/// Begins TLS on a connection and finds out which node it is.
async fn let_in(
    stream: TcpStream,
    tls: &NodeTls,
    admits: &dyn Fn(NodeId) -> bool,
) -> io::Result<(tokio_rustls::server::TlsStream<TcpStream>, NodeId)> {
    tcp::prepare(&stream)?;
    let (stream, node) = timeout(HANDSHAKE_TIMEOUT, tls.accept(stream))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no TLS handshake in time"))??;
    if admits(node) {
        return Ok((stream, node));
    }
    let why = format!("node {node} has a certificate of the cluster, but is no node of it");
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

fn report(joined: Result<(), tokio::task::JoinError>) {
    if let Err(error) = joined {
        tracing::error!(%error, "a connection of a node ended by a defect");
    }
}
