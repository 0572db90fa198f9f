//! What a process adds to a node of a cluster: its socket, and connections over TCP.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::{ClusterOptions, Wire, directories};
use crate::config::{Config, StoreBackend};
use crate::env::Env;
use crate::id::NodeId;
use crate::node::Node;
use crate::node::daemon::{DaemonError, error, fail};
use crate::node::store;
use crate::rpc::handshake::Target;
use crate::rpc::tcp::TcpDial;
use crate::rpc::tls::{TlsDial, serve_tls};
use crate::rpc::{Dial, Directories, Identity, Peer, RpcConfig, Server};
use crate::shard::LocalFuture;
use crate::trust::{Credentials, Holder, Kind, NodeTls};

/// How long after its last sign of life a node counts as gone.
const LEASE: Duration = Duration::from_secs(2);

/// Connections without TLS.
struct Plain {
    env: Env,
}

impl Wire for Plain {
    fn connect(&self, own: Identity, target: NodeId, label: &str, address: &str) -> Peer {
        let target = Target { node: Some(target), core: 0 };
        let dial = TcpDial { address: address.to_owned() };
        Peer::spawn(label, own, target, dial, RpcConfig::default(), self.env.clone())
    }
}

/// Connections with TLS.
struct Trusted {
    env: Env,
    tls: NodeTls,
}

impl Wire for Trusted {
    fn connect(&self, own: Identity, target: NodeId, label: &str, address: &str) -> Peer {
        let config = RpcConfig::default();
        let whom = Target { node: Some(target), core: 0 };
        match TlsDial::new(address.to_owned(), target, &self.tls) {
            Ok(dial) => Peer::spawn(label, own, whom, dial, config, self.env.clone()),
            Err(why) => {
                tracing::error!(node = label, %why, "no connection to the node can be made");
                Peer::spawn(label, own, whom, Never(why.to_string()), config, self.env.clone())
            }
        }
    }
}

/// Connects nowhere.
struct Never(String);

impl Dial for Never {
    type Stream = TcpStream;

    fn dial(&self) -> LocalFuture<'_, io::Result<TcpStream>> {
        Box::pin(std::future::ready(Err(io::Error::other(self.0.clone()))))
    }
}

/// The socket for other nodes.
pub(in crate::node) struct Door {
    tls: Option<NodeTls>,
    listener: TcpListener,
    /// Where it listens.
    pub(in crate::node) address: SocketAddr,
}

/// What is said to other nodes.
pub(in crate::node) struct Told {
    /// Address of the admin API.
    pub(in crate::node) admin: SocketAddr,
    /// Where NBD is served, around the name of an export.
    pub(in crate::node) exports: Vec<(String, String)>,
}

/// What other nodes are shown, if the configuration names credentials.
pub(in crate::node) fn trust(config: &Config) -> Result<Option<NodeTls>, DaemonError> {
    let Some(dir) = &config.cluster.credentials else { return Ok(None) };
    let credentials = Credentials::load(dir, Kind::Node).map_err(error)?;
    let named = &credentials.holder().name;
    if *named != config.node {
        return fail(format!(
            "the credentials in {} are those of node '{named}', and this is node '{}'",
            dir.display(),
            config.node
        ));
    }
    Ok(Some(NodeTls::new(&credentials).map_err(error)?))
}

impl Door {
    /// Listens, if the configuration is that of a node of a cluster.
    pub(in crate::node) async fn open(config: &Config) -> Result<Option<Self>, DaemonError> {
        let Some(address) = config.cluster.address else { return Ok(None) };
        if config.store.backend != StoreBackend::Etcd {
            return fail("cluster.address: the nodes of a cluster share an etcd: see [store]");
        }
        let tls = trust(config)?;
        let failed = |why| error(format!("cannot listen for other nodes on {address}: {why}"));
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Some(Self { tls, listener, address }))
    }

    /// Which cluster and node the credentials are of.
    pub(in crate::node) fn holder(&self) -> Option<&Holder> {
        self.tls.as_ref().map(NodeTls::holder)
    }

    /// What makes the node one of the cluster.
    pub(in crate::node) fn options(
        &self,
        config: &Config,
        env: &Env,
        told: Told,
    ) -> Result<ClusterOptions, DaemonError> {
        let node = store::node_record(&config.data_dir, env)?;
        let cluster = &config.cluster;
        // The port may have been any.
        let address = cluster.advertise.clone().unwrap_or_else(|| self.address.to_string());
        Ok(ClusterOptions {
            id: self.holder().and_then(Holder::node).unwrap_or(node.id),
            host: node.host,
            rack: cluster.rack.clone(),
            address,
            admin: told.admin.to_string(),
            exports: told.exports,
            wire: match &self.tls {
                None => Rc::new(Plain { env: env.clone() }),
                Some(tls) => Rc::new(Trusted { env: env.clone(), tls: tls.clone() }),
            },
            lease: LEASE,
            out_after: Duration::from_secs(cluster.out_after_seconds),
        })
    }

    /// Serves what is given to the nodes that `admits` lets in, until `stopped` says so.
    pub(in crate::node) async fn serve_with(
        self,
        own: Identity,
        served: Directories,
        admits: Rc<dyn Fn(NodeId) -> bool>,
        stopped: watch::Receiver<bool>,
    ) {
        let server = Server::new(own, served, RpcConfig::default(), stopped.clone());
        match self.tls {
            None => server.serve_tcp(self.listener).await,
            Some(tls) => serve_tls(server, self.listener, tls, admits, stopped).await,
        }
    }

    /// Serves the disks of the node to the others until the sender is dropped.
    pub(in crate::node) fn serve(self, node: &Rc<Node>) -> watch::Sender<bool> {
        let (stop, stopped) = watch::channel(false);
        let Some(cluster) = node.cluster.as_ref() else { return stop };
        let served = directories(node);
        let server =
            Server::new(cluster.own.clone(), served, RpcConfig::default(), stopped.clone());
        *node.rpc.borrow_mut() = Some(server.metrics().clone());
        let Self { tls, listener, .. } = self;
        let node = Rc::downgrade(node);
        tokio::task::spawn_local(async move {
            let Some(tls) = tls else { return server.serve_tcp(listener).await };
            // Whoever was removed has a certificate all the same.
            let admits = move |id| node.upgrade().is_some_and(|node| node.is_member(id));
            serve_tls(server, listener, tls, Rc::new(admits), stopped).await;
        });
        stop
    }
}
