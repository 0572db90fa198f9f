//! Client and server against each other over pipes in memory, on simulated disks.

mod conformance;
mod faults;
mod forward;
mod golden;
mod limits;
mod questions;
mod roundtrip;
mod sessions;
mod tls;
mod volumes;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use super::handshake::Target;
use super::{
    ConnectionState, Dial, Directories, DiskDirectory, Identity, Peer, Questions, RemoteDisk,
    RpcConfig, Served, Server, VolumeDirectory,
};
use crate::disk::conformance::{DISK, format_options};
use crate::disk::{Disk, FormatOptions};
use crate::env::Env;
use crate::export::{BlockTarget, LocalFuture, TargetError};
use crate::id::{ClusterId, DiskId, Epoch, NodeId, VolumeId};
use crate::limits::RPC_ASK_BYTES_MAX;
use crate::shard::ShardClient;
use crate::shard::local::LocalClient;
use crate::sim::device::{SimConfig, SimDevice};
use crate::sim::pipe::{PipeEnd, PipeFaults, pipe};

pub(super) const CLUSTER: ClusterId = ClusterId::from_bytes([0xc1; 16]);
pub(super) const OTHER_DISK: DiskId = DiskId::from_bytes([0xd2; 16]);

/// Who a core of these tests is.
pub(super) fn identity(name: &str, byte: u8) -> Identity {
    let node = NodeId::from_bytes([byte; 16]);
    Identity { cluster: CLUSTER, node, name: name.to_owned(), core: 0 }
}

/// The disks of the server.
#[derive(Default)]
pub(super) struct Directory(RefCell<BTreeMap<DiskId, Rc<dyn ShardClient>>>);

impl DiskDirectory for Directory {
    fn disk(&self, id: DiskId) -> Option<Rc<dyn ShardClient>> {
        self.0.borrow().get(&id).cloned()
    }
}

/// The one volume of the server.
pub(super) const VOLUME: VolumeId = VolumeId::from_bytes([0xe0; 16]);

/// The volume of the server, if it is served.
#[derive(Default)]
pub(super) struct Shelf {
    pub(super) head: RefCell<Option<Served>>,
    /// It takes so long to find it.
    pub(super) delay: Cell<Duration>,
}

impl Shelf {
    /// From now on, this is the head.
    pub(super) fn serve(&self, epoch: u64, target: Rc<dyn BlockTarget>) {
        *self.head.borrow_mut() = Some(Served { epoch: Epoch(epoch), target });
    }
}

impl VolumeDirectory for Shelf {
    fn volume(&self, id: VolumeId) -> LocalFuture<'_, Result<Served, TargetError>> {
        Box::pin(async move {
            if !self.delay.get().is_zero() {
                tokio::time::sleep(self.delay.get()).await;
            }
            let head = self.head.borrow().clone().filter(|_| id == VOLUME);
            head.ok_or(TargetError::Stopped)
        })
    }
}

/// Answers each question with the question, upside down, after a while.
pub(super) struct Oracle;

impl Questions for Oracle {
    fn ask(&self, question: Bytes) -> LocalFuture<'_, Result<Bytes, String>> {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(5)).await;
            match &question[..] {
                b"why?" => Err("because".into()),
                b"for ever?" => std::future::pending().await,
                b"much?" => Ok(vec![7; RPC_ASK_BYTES_MAX].into()),
                b"too much?" => Ok(vec![7; RPC_ASK_BYTES_MAX + 1].into()),
                other => Ok(other.iter().rev().copied().collect()),
            }
        })
    }
}

/// A server and the way to it.
pub(super) struct Net {
    pub(super) directory: Rc<Directory>,
    pub(super) shelf: Rc<Shelf>,
    pub(super) server: Server,
    /// Nobody can connect.
    pub(super) unplugged: Cell<bool>,
    /// Faults of the connections to come; none after those.
    pub(super) next: RefCell<VecDeque<Rc<PipeFaults>>>,
    /// Faults of all connections so far.
    pub(super) pipes: RefCell<Vec<Rc<PipeFaults>>>,
    pub(super) stop: watch::Sender<bool>,
}

impl Net {
    pub(super) fn new(config: RpcConfig) -> Rc<Self> {
        let directory: Rc<Directory> = Rc::default();
        let (stop, stopped) = watch::channel(false);
        let shelf: Rc<Shelf> = Rc::default();
        let directories = Directories {
            disks: directory.clone(),
            volumes: shelf.clone(),
            questions: Rc::new(Oracle),
        };
        let server = Server::new(identity("store", 2), directories, config, stopped);
        let (unplugged, next, pipes) = Default::default();
        Rc::new(Self { directory, shelf, server, unplugged, next, pipes, stop })
    }

    /// Formats a disk of the server.
    pub(super) async fn disk(&self, id: DiskId) -> (SimDevice, Rc<Disk>) {
        let (device, disk) = fresh_disk(id).await;
        let client: Rc<dyn ShardClient> = Rc::new(LocalClient::new(disk.clone()));
        self.directory.0.borrow_mut().insert(id, client);
        (device, disk)
    }

    pub(super) fn peer(self: &Rc<Self>, config: RpcConfig) -> Peer {
        let target = Target { node: None, core: 0 };
        let env = Env::from_seed(1);
        Peer::spawn("store", identity("head", 1), target, Wire(self.clone()), config, env)
    }

    /// The server's disks over a connection.
    pub(super) fn remote(self: &Rc<Self>, config: RpcConfig) -> RemoteDisk {
        RemoteDisk::new(DISK, self.peer(config))
    }
}

pub(super) async fn fresh_disk(id: DiskId) -> (SimDevice, Rc<Disk>) {
    let latency = Duration::from_millis(1)..Duration::from_millis(3);
    let config = SimConfig { size_bytes: 16 << 20, latency };
    let device = SimDevice::new(Env::from_seed(7), config);
    Disk::format(&device, FormatOptions { disk: id, ..format_options() }).await.unwrap();
    let disk = Disk::open(Rc::new(device.clone())).await.unwrap();
    (device, disk)
}

/// Connects to the server of a net.
pub(super) struct Wire(pub(super) Rc<Net>);

impl Dial for Wire {
    type Stream = PipeEnd;

    fn dial(&self) -> crate::shard::LocalFuture<'_, io::Result<PipeEnd>> {
        let net = &self.0;
        if net.unplugged.get() {
            return Box::pin(std::future::ready(Err(io::ErrorKind::ConnectionRefused.into())));
        }
        let faults = net.next.borrow_mut().pop_front().unwrap_or_default();
        net.pipes.borrow_mut().push(faults.clone());
        let (ours, theirs) = pipe(&faults);
        let server = net.server.clone();
        tokio::task::spawn_local(async move { server.serve_stream(theirs, "pipe").await });
        Box::pin(std::future::ready(Ok(ours)))
    }
}

/// Waits until the connection is up.
pub(super) async fn until_up(peer: &Peer) {
    let mut connection = peer.connection();
    connection.wait_for(|state| matches!(state, ConnectionState::Up { .. })).await.unwrap();
}

/// Waits until the connection is down for a reason that holds this text.
pub(super) async fn until_down(peer: &Peer, why: &str) {
    let mut connection = peer.connection();
    let down = |state: &ConnectionState| matches!(state, ConnectionState::Down { reason, .. } if reason.contains(why));
    tokio::time::timeout(Duration::from_mins(1), connection.wait_for(down))
        .await
        .unwrap_or_else(|_| panic!("never down for {why}: {:?}", *peer.connection().borrow()))
        .unwrap();
}
