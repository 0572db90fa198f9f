//! The network between simulated nodes: who listens, what passes from whom to whom, and how fast.
//!
//! Knows hosts by their names and nothing of what is said. A way is cut without either end being
//! told, as by a firewall that drops packets; a connection is torn so that both ends are told.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::rc::{Rc, Weak};
use std::time::Duration;

use tokio::sync::mpsc;

use super::host::Arrival;
use crate::env::Env;
use crate::id::NodeId;
use crate::node::cluster::Wire;
use crate::rpc::handshake::Target;
use crate::rpc::{Dial, Identity, Peer, RpcConfig};
use crate::shard::LocalFuture;
use crate::sim::pipe::{PipeEnd, PipeFaults, pipe};

/// Time that bytes take where nothing is wrong.
const USUAL_DELAY: Duration = Duration::from_micros(100);

/// A connection: who made it, to whom.
struct Connection {
    from: String,
    to: String,
    faults: Weak<PipeFaults>,
}

impl Connection {
    fn is_between(&self, a: &str, b: &str) -> bool {
        (self.from == a && self.to == b) || (self.from == b && self.to == a)
    }

    fn is_of(&self, host: &str) -> bool {
        self.from == host || self.to == host
    }
}

/// The network.
#[derive(Default)]
pub struct Net {
    listeners: RefCell<BTreeMap<String, mpsc::UnboundedSender<Arrival>>>,
    /// Nothing passes from the first to the second.
    cut: RefCell<BTreeSet<(String, String)>>,
    /// Ways that are slower than usual.
    slow: RefCell<BTreeMap<(String, String), Duration>>,
    /// What passes from the first to the second takes so much longer; not so the way back.
    late: RefCell<BTreeMap<(String, String), Duration>>,
    connections: RefCell<Vec<Connection>>,
}

fn way(from: &str, to: &str) -> (String, String) {
    (from.to_owned(), to.to_owned())
}

impl Net {
    pub(super) fn listen(&self, host: &str, door: mpsc::UnboundedSender<Arrival>) {
        self.listeners.borrow_mut().insert(host.to_owned(), door);
    }

    pub(super) fn close(&self, host: &str) {
        self.listeners.borrow_mut().remove(host);
    }

    fn passes(&self, from: &str, to: &str) -> bool {
        !self.cut.borrow().contains(&way(from, to))
    }

    /// Calls `each` with every connection that lasts.
    fn each(&self, mut each: impl FnMut(&Connection, &PipeFaults)) {
        self.connections.borrow_mut().retain(|connection| {
            let faults = connection.faults.upgrade().filter(|faults| !faults.is_broken());
            faults.is_some_and(|faults| {
                each(connection, &faults);
                true
            })
        });
    }

    /// Nothing passes from one node to another any more, and neither is told.
    pub fn cut_way(&self, from: &str, to: &str) {
        self.cut.borrow_mut().insert(way(from, to));
        self.each(|connection, faults| {
            if connection.is_between(from, to) {
                faults.hold_to(usize::from(connection.to == to), true);
            }
        });
    }

    /// Nothing passes between two nodes any more, and neither is told.
    pub fn cut(&self, a: &str, b: &str) {
        self.cut_way(a, b);
        self.cut_way(b, a);
    }

    /// Bytes pass again from one node to another; those that were held back arrive now.
    pub fn mend_way(&self, from: &str, to: &str) {
        self.cut.borrow_mut().remove(&way(from, to));
        self.each(|connection, faults| {
            if connection.is_between(from, to) {
                faults.hold_to(usize::from(connection.to == to), false);
            }
        });
    }

    /// Everything passes again, at the usual speed. Connections that were cut are `torn`, or go on
    /// where they were.
    pub fn heal(&self, torn: bool) {
        let cut = std::mem::take(&mut *self.cut.borrow_mut());
        self.slow.borrow_mut().clear();
        self.late.borrow_mut().clear();
        self.each(|connection, faults| {
            faults.delay.set(USUAL_DELAY);
            (0..2).for_each(|end| faults.delay_to(end, Duration::ZERO));
            let was = cut.contains(&way(&connection.from, &connection.to))
                || cut.contains(&way(&connection.to, &connection.from));
            if was && torn {
                faults.cut();
            } else {
                faults.hold(false);
            }
        });
    }

    /// Whether any way is cut.
    pub fn is_cut(&self) -> bool {
        !self.cut.borrow().is_empty()
    }

    /// Breaks the connections between two nodes, at once or after so many bytes.
    pub fn tear(&self, a: &str, b: &str, after: Option<u64>) {
        self.each(|connection, faults| {
            if connection.is_between(a, b) {
                match after {
                    None => faults.cut(),
                    Some(bytes) => faults.cut_after.set(Some(faults.written() + bytes)),
                }
            }
        });
    }

    /// What passes between two nodes takes so long.
    pub fn slow_down(&self, a: &str, b: &str, delay: Duration) {
        self.slow.borrow_mut().insert(way(a, b), delay);
        self.slow.borrow_mut().insert(way(b, a), delay);
        self.each(|connection, faults| {
            if connection.is_between(a, b) {
                faults.delay.set(delay);
            }
        });
    }

    /// What passes from one node to another takes so much longer, and no longer the other way.
    pub fn delay_way(&self, from: &str, to: &str, late: Duration) {
        self.late.borrow_mut().insert(way(from, to), late);
        self.each(|connection, faults| {
            if connection.is_between(from, to) {
                faults.delay_to(usize::from(connection.to == to), late);
            }
        });
    }

    /// Nothing of a host's connections arrives any more, because it lost its power.
    pub(super) fn silence(&self, host: &str) {
        self.each(|connection, faults| {
            if connection.is_of(host) {
                faults.hold(true);
            }
        });
    }

    /// Connections that a host had before it started again are refused.
    pub(super) fn reset(&self, host: &str) {
        self.each(|connection, faults| {
            if connection.is_of(host) {
                faults.cut();
            }
        });
    }
}

/// Connects one node to another.
struct Way {
    net: Rc<Net>,
    from: String,
    to: String,
}

impl Dial for Way {
    type Stream = PipeEnd;

    fn dial(&self) -> LocalFuture<'_, io::Result<PipeEnd>> {
        Box::pin(async move {
            let Self { net, from, to } = self;
            if !net.passes(from, to) || !net.passes(to, from) {
                std::future::pending::<()>().await;
            }
            let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
            let listener = net.listeners.borrow().get(to).cloned();
            let faults = Rc::new(PipeFaults::default());
            let delay = net.slow.borrow().get(&way(from, to)).copied();
            faults.delay.set(delay.unwrap_or(USUAL_DELAY));
            for (end, way) in [(0, way(to, from)), (1, way(from, to))] {
                let late = net.late.borrow().get(&way).copied();
                faults.delay_to(end, late.unwrap_or_default());
            }
            let (ours, theirs) = pipe(&faults);
            listener.ok_or_else(refused)?.send(Arrival::Stream(theirs)).map_err(|_| refused())?;
            let faults = Rc::downgrade(&faults);
            let connection = Connection { from: from.clone(), to: to.clone(), faults };
            net.connections.borrow_mut().push(connection);
            Ok(ours)
        })
    }
}

/// Connections of a node over the simulated network; addresses are names of hosts.
pub(super) struct Pipes {
    pub(super) net: Rc<Net>,
    pub(super) env: Env,
}

impl Wire for Pipes {
    fn connect(&self, own: Identity, target: NodeId, label: &str, address: &str) -> Peer {
        let way = Way { net: self.net.clone(), from: own.name.clone(), to: address.to_owned() };
        let target = Target { node: Some(target), core: 0 };
        Peer::spawn(label, own, target, way, RpcConfig::default(), self.env.clone())
    }
}
