//! A node whose disks are on other nodes: each behind the RPC, over pipes in memory that are slow,
//! hold everything back, or break.
//!
//! Requests go from the head through client, pipe and server to what the node would else call
//! directly, with the faults that this has. One server a disk, as if each were on a node of its own.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use super::pipe::{PipeEnd, PipeFaults, pipe};
use super::run::Context;
use crate::env::Env;
use crate::id::{ClusterId, DiskId, NodeId};
use crate::rpc::handshake::Target;
use crate::rpc::{Dial, DiskDirectory, Identity, Peer, RemoteDisk, RpcConfig, Server};
use crate::shard::{LocalFuture, ShardClient};

/// The one disk of a server: what is asked now.
struct Shelf(DiskId, RefCell<Rc<dyn ShardClient>>);

impl DiskDirectory for Shelf {
    fn disk(&self, id: DiskId) -> Option<Rc<dyn ShardClient>> {
        (id == self.0).then(|| self.1.borrow().clone())
    }
}

/// The way to one server.
struct Line {
    server: Server,
    env: Env,
    present: RefCell<Rc<PipeFaults>>,
    /// Nobody can connect.
    unplugged: Cell<bool>,
}

impl Dial for Rc<Line> {
    type Stream = PipeEnd;

    fn dial(&self) -> LocalFuture<'_, io::Result<PipeEnd>> {
        if self.unplugged.get() {
            return Box::pin(std::future::ready(Err(io::ErrorKind::ConnectionRefused.into())));
        }
        let faults = Rc::new(PipeFaults::random(self.env.clone()));
        faults.write_max.set(self.env.chance(1, 2).then_some(20_000));
        *self.present.borrow_mut() = faults.clone();
        let (ours, theirs) = pipe(&faults);
        let server = self.server.clone();
        tokio::task::spawn_local(async move { server.serve_stream(theirs, "pipe").await });
        Box::pin(std::future::ready(Ok(ours)))
    }
}

struct Far {
    shelf: Rc<Shelf>,
    line: Rc<Line>,
    peer: Peer,
    _stop: watch::Sender<bool>,
}

/// The ways of one node to all disks.
pub struct Wires {
    env: Env,
    cluster: ClusterId,
    node: NodeId,
    far: RefCell<BTreeMap<DiskId, Far>>,
}

impl Wires {
    /// None yet; what is random comes from `env`.
    pub fn new(env: Env, cluster: ClusterId) -> Self {
        let node = NodeId::from_bytes(env.random_bytes());
        Self { env, cluster, node, far: RefCell::default() }
    }

    /// `client` as it is seen from this node: further requests for its disk go there.
    pub fn reach(&self, client: Rc<dyn ShardClient>) -> Rc<dyn ShardClient> {
        let id = client.disk();
        let mut far = self.far.borrow_mut();
        let far = far.entry(id).or_insert_with(|| self.wire(id, client.clone()));
        *far.shelf.1.borrow_mut() = client;
        Rc::new(RemoteDisk::new(id, far.peer.clone()))
    }

    fn wire(&self, id: DiskId, client: Rc<dyn ShardClient>) -> Far {
        let config = RpcConfig { checked_payload: self.env.chance(1, 2), ..RpcConfig::default() };
        let identity = |node, name: &str| Identity {
            cluster: self.cluster,
            node,
            name: name.to_owned(),
            core: 0,
        };
        let shelf = Rc::new(Shelf(id, RefCell::new(client)));
        let (stop, stopped) = watch::channel(false);
        let own = identity(NodeId::from_bytes(id.to_bytes()), "store");
        let server = Server::new(own, shelf.clone(), config.clone(), stopped);
        let (env, present) = (self.env.clone(), RefCell::default());
        let line = Rc::new(Line { server, env: env.clone(), present, unplugged: Cell::new(false) });
        let target = Target { node: Some(NodeId::from_bytes(id.to_bytes())), core: 0 };
        let own = identity(self.node, "head");
        let peer = Peer::spawn("store", own, target, line.clone(), config, env);
        Far { shelf, line, peer, _stop: stop }
    }

    /// All ways work again.
    pub fn heal(&self) {
        for far in self.far.borrow().values() {
            far.line.unplugged.set(false);
            let faults = far.line.present.borrow();
            faults.hold(false);
            faults.delay.set(Duration::ZERO);
        }
    }

    /// Something happens to one of the ways; what it was.
    fn strike(&self) -> Option<&'static str> {
        let env = &self.env;
        let far = self.far.borrow();
        let one = usize::try_from(env.random_below(far.len().max(1) as u64)).ok()?;
        let Far { line, .. } = far.values().nth(one)?;
        let faults = line.present.borrow().clone();
        Some(match env.random_below(8) {
            0..=2 => {
                faults.cut();
                "a connection is cut"
            }
            3 => {
                faults.cut_after.set(Some(faults.written() + 1 + env.random_below(20_000)));
                "a connection is about to be cut"
            }
            4 => {
                faults.hold(true);
                let time = Duration::from_millis(20 + env.random_below(4000));
                tokio::task::spawn_local(async move {
                    sleep(time).await;
                    faults.hold(false);
                });
                "a connection holds everything back"
            }
            5 => {
                line.unplugged.set(true);
                faults.cut();
                let (time, line) = (env.random_below(3000), line.clone());
                tokio::task::spawn_local(async move {
                    sleep(Duration::from_millis(time)).await;
                    line.unplugged.set(false);
                });
                "a node cannot be reached"
            }
            _ => {
                faults.delay.set(Duration::from_millis(env.random_below(15)));
                "a connection is slow"
            }
        })
    }
}

/// Strikes the ways of the nodes of a life at random until it ends, if they are such.
pub(super) async fn run(context: Rc<Context>) {
    let Some(env) = context.world.wires.clone() else { return };
    while !context.stop.get() && !context.calm.get() {
        sleep(Duration::from_millis(20 + env.random_below(600))).await;
        if context.stop.get() || context.calm.get() || context.world.ending.get() {
            return;
        }
        let nodes = context.nodes.borrow().clone();
        let Some(newest) = nodes.len().checked_sub(1) else { continue };
        let which = usize::try_from(env.random_below(nodes.len() as u64)).unwrap_or(newest);
        let struck = nodes[which].wires.as_ref().and_then(Wires::strike);
        if let Some(what) = struck {
            context.disturbed();
            context.cover_noted(what);
        }
    }
}
