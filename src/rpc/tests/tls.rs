//! Two ends over real sockets with TLS: who gets through to the disks, and who does not.

use std::cell::Cell;
use std::rc::Rc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::LocalSet;

use super::{CLUSTER, Net, identity, until_down, until_up};
use crate::disk::conformance::{DISK, VOLUME, append, authority as head, blocks, spec};
use crate::env::Env;
use crate::id::{ClusterId, NodeId, SegmentId};
use crate::rpc::handshake::Target;
use crate::rpc::tls::{TlsDial, serve_tls};
use crate::rpc::{ConnectionState, Peer, RemoteDisk, RpcConfig};
use crate::shard::{ShardClient, SlotClass};
use crate::trust::testing::{authority, credentials, node};
use crate::trust::{self, Authority, NodeTls};

/// A server that listens, with its authority.
struct Listening {
    net: Rc<Net>,
    authority: Authority,
    address: String,
    admitted: Rc<Cell<bool>>,
    stop: watch::Sender<bool>,
    serving: tokio::task::JoinHandle<()>,
}

impl Listening {
    async fn start() -> Self {
        let net = Net::new(RpcConfig::default());
        net.disk(DISK).await;
        let authority = authority(CLUSTER);
        let tls = credentials(&authority, &node(CLUSTER, 2), trust::now());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let admitted = Rc::new(Cell::new(true));
        let admits = {
            let admitted = admitted.clone();
            Rc::new(move |_| admitted.get())
        };
        let (stop, stopped) = watch::channel(false);
        let tls = NodeTls::new(&tls).unwrap();
        let server = net.server.clone();
        let serving = tokio::task::spawn_local(serve_tls(server, listener, tls, admits, stopped));
        Self { net, authority, address, admitted, stop, serving }
    }

    /// A node that says that it is all `byte`s, with credentials of a node of all `shown`s.
    fn peer(&self, byte: u8, shown: u8, to: u8) -> Peer {
        let shown = credentials(&self.authority, &node(CLUSTER, shown), trust::now());
        self.peer_with(&NodeTls::new(&shown).unwrap(), byte, to)
    }

    fn peer_with(&self, tls: &NodeTls, byte: u8, to: u8) -> Peer {
        let to = NodeId::from_bytes([to; 16]);
        let dial = TlsDial::new(self.address.clone(), to, tls).unwrap();
        let target = Target { node: Some(to), core: 0 };
        let (config, env) = (RpcConfig::default(), Env::from_seed(1));
        Peer::spawn("store", identity("head", byte), target, dial, config, env)
    }
}

#[tokio::test]
async fn nodes_of_the_cluster_reach_the_disks() {
    let test = async {
        let listening = Listening::start().await;
        let peer = listening.peer(1, 1, 2);
        until_up(&peer).await;
        match &*peer.connection().borrow() {
            ConnectionState::Up { peer, .. } => assert_eq!(peer.node, NodeId::from_bytes([2; 16])),
            down @ ConnectionState::Down { .. } => panic!("{down:?}"),
        }
        let disk = RemoteDisk::new(DISK, peer.clone());
        disk.create(head(1), spec(1, 10), SlotClass::Client).await.unwrap();
        disk.append(append(1, 1, 0, 7, 12)).await.unwrap();
        // More than the sockets, and the records of TLS, hold at once.
        let reads = (0..200).map(|_| disk.read(VOLUME, SegmentId(1), 0, 12));
        for reply in futures_util::future::join_all(reads).await {
            assert_eq!(reply.unwrap().data, blocks(7, 12));
        }
        // All ends in order.
        listening.stop.send(true).unwrap();
        listening.net.stop.send(true).unwrap();
        listening.serving.await.unwrap();
        until_down(&peer, "").await;
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn a_node_that_says_it_is_another_is_refused() {
    let test = async {
        let listening = Listening::start().await;
        until_down(&listening.peer(3, 1, 2), "the certificate is of node 0101").await;
        assert_eq!(listening.net.server.metrics().accepted.get(), 0);
        // Nor is one reached that is not the one meant.
        until_down(&listening.peer(1, 1, 9), "(node2) is there, not 0909").await;
        listening.admitted.set(false);
        until_down(&listening.peer(1, 1, 2), "").await;
        assert_eq!(listening.net.server.metrics().accepted.get(), 0);
    };
    LocalSet::new().run_until(test).await;
}

#[tokio::test]
async fn those_of_another_cluster_and_plain_ones_are_refused() {
    let test = async {
        let listening = Listening::start().await;
        let other = ClusterId::from_bytes([0xc2; 16]);
        let stranger = credentials(&authority(other), &node(other, 1), trust::now());
        let peer = listening.peer_with(&NodeTls::new(&stranger).unwrap(), 1, 2);
        until_down(&peer, "the certificate is of node node2 of cluster c1c1").await;
        // One that believes the server, but shows a certificate of another cluster.
        let mut impostor = stranger;
        impostor.trust_instead(listening.authority.certificate().clone());
        let peer = listening.peer_with(&NodeTls::new(&impostor).unwrap(), 1, 2);
        until_down(&peer, "alert").await;
        let plain = crate::rpc::tcp::TcpDial { address: listening.address.clone() };
        let target = Target { node: None, core: 0 };
        let (config, env) = (RpcConfig::default(), Env::from_seed(1));
        let peer = Peer::spawn("store", identity("head", 1), target, plain, config, env);
        until_down(&peer, "").await;
        let mut stream = TcpStream::connect(&listening.address).await.unwrap();
        stream.write_all(&[0; 64]).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap_or_default();
        assert!(answer.len() <= 7, "nothing but an alert: {answer:?}");
        assert_eq!(listening.net.server.metrics().accepted.get(), 0);
        assert_eq!(listening.net.server.metrics().refused.get(), 0, "none came so far");
    };
    LocalSet::new().run_until(test).await;
}
