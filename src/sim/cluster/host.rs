//! A machine of the simulated cluster, its disks, and the process on it.
//!
//! Everything of a process lives in a [`LocalSet`] of its own: it is killed by dropping that, and
//! paused by not polling it. Requests of clients run inside it too, as those of an NBD session do.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, LocalSet};
use tokio::time::sleep;

use super::net::Net;
use crate::disk::device::BlockDevice;
use crate::id::{ClusterId, NodeId};
use crate::meta::memory::Faults;
use crate::node::cluster::directories;
use crate::node::opener::{DeviceOpener, OpenFailure};
use crate::node::{Node, NodeOptions};
use crate::rpc::{Identity, RpcConfig, Server};
use crate::shard::LocalFuture;
use crate::sim::device::SimDevice;
use crate::sim::pipe::PipeEnd;

/// Pause before a process that could not start is started again, as systemd does.
const START_AGAIN: Duration = Duration::from_millis(500);

/// Something to be done inside a process.
type Job = Box<dyn FnOnce(Rc<Node>) -> LocalFuture<'static, ()>>;

/// What comes to a process from outside.
pub(super) enum Arrival {
    Stream(PipeEnd),
    Job(Job),
}

/// The devices of a machine, by path.
#[derive(Default)]
pub struct Devices(pub RefCell<BTreeMap<String, SimDevice>>);

impl Devices {
    /// Paths of all devices.
    pub fn paths(&self) -> Vec<String> {
        self.0.borrow().keys().cloned().collect()
    }

    /// All devices.
    pub fn all(&self) -> Vec<SimDevice> {
        self.0.borrow().values().cloned().collect()
    }

    /// Two devices change places, if there are so many; whether they did.
    pub(super) fn swap(&self, a: usize, b: usize) -> bool {
        let paths = self.paths();
        let (Some(a), Some(b)) = (paths.get(a), paths.get(b)) else { return false };
        let mut devices = self.0.borrow_mut();
        let (Some(one), Some(other)) = (devices.get(a).cloned(), devices.get(b).cloned()) else {
            return false;
        };
        devices.insert(a.clone(), other);
        devices.insert(b.clone(), one);
        a != b
    }

    /// Ends what the last process had under way.
    fn end_process(&self, power_cut: bool) {
        for device in self.0.borrow_mut().values_mut() {
            if power_cut {
                device.power_cut();
            } else {
                device.crash();
            }
            *device = device.reopen();
        }
    }
}

impl DeviceOpener for Devices {
    fn open(&self, path: &str, _: Option<u64>) -> Result<Rc<dyn BlockDevice>, OpenFailure> {
        let device = self.0.borrow().get(path).cloned();
        Ok(Rc::new(device.ok_or_else(|| OpenFailure::NotFound(path.to_owned()))?))
    }

    fn check(&self, path: &str, _: u64) -> Result<(), String> {
        let there = self.0.borrow().contains_key(path);
        if there { Ok(()) } else { Err("it cannot be found any more".into()) }
    }
}

/// Whether a process runs, and who polls it.
#[derive(Default)]
struct Gate {
    paused: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

/// A process that can be held, as by SIGSTOP.
struct Held {
    gate: Rc<Gate>,
    process: LocalSet,
}

impl Future for Held {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if self.gate.paused.get() {
            *self.gate.waker.borrow_mut() = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Pin::new(&mut self.process).poll(cx)
    }
}

struct Process {
    task: JoinHandle<()>,
    gate: Rc<Gate>,
    door: mpsc::UnboundedSender<Arrival>,
}

/// A machine.
pub struct Host {
    /// Its name, which is its address too.
    pub name: String,
    /// The node that it is.
    pub id: NodeId,
    /// Its disks.
    pub devices: Rc<Devices>,
    /// Its way to the store.
    pub store: Rc<Faults>,
    process: RefCell<Option<Process>>,
    /// The node of the process, once it has started.
    node: Rc<RefCell<Option<Rc<Node>>>>,
    /// Counts the processes there were.
    starts: Cell<u64>,
    /// It is about to stop: clients are sent away.
    closing: Cell<bool>,
    /// It lost its power: others are not told that its connections ended.
    dark: Cell<bool>,
}

impl Host {
    pub(super) fn new(name: String, id: NodeId, devices: BTreeMap<String, SimDevice>) -> Self {
        Self {
            name,
            id,
            devices: Rc::new(Devices(RefCell::new(devices))),
            store: Rc::default(),
            process: RefCell::default(),
            node: Rc::default(),
            starts: Cell::new(0),
            closing: Cell::new(false),
            dark: Cell::new(false),
        }
    }

    /// The node of the process that runs, if it has started.
    pub fn node(&self) -> Option<Rc<Node>> {
        self.node.borrow().clone()
    }

    /// Whether there is a process.
    pub fn is_running(&self) -> bool {
        self.process.borrow().is_some()
    }

    /// Whether clients are sent away, because the process is about to stop.
    pub fn is_closing(&self) -> bool {
        self.closing.get()
    }

    pub(super) fn close_exports(&self) {
        self.closing.set(true);
    }

    /// Number of the process, from 1.
    pub fn starts(&self) -> u64 {
        self.starts.get()
    }

    /// Starts a process that serves `cluster`, if there is none. `options` are made anew for each try.
    pub(super) fn start(
        &self,
        net: &Rc<Net>,
        cluster: ClusterId,
        options: impl Fn() -> NodeOptions + 'static,
    ) {
        if self.is_running() {
            return;
        }
        if self.dark.replace(false) {
            net.reset(&self.name);
        }
        self.closing.set(false);
        self.starts.set(self.starts.get() + 1);
        let (door, mut arrivals) = mpsc::unbounded_channel();
        net.listen(&self.name, door.clone());
        let own = Identity { cluster, node: self.id, name: self.name.clone(), core: 0 };
        let (place, paths) = (self.node.clone(), self.devices.paths());
        let process = LocalSet::new();
        process.spawn_local(async move {
            let node = loop {
                match Node::start(options(), &paths).await {
                    Ok(node) => break node,
                    Err(error) => tracing::warn!(node = own.name, %error, "not started"),
                }
                sleep(START_AGAIN).await;
            };
            let (_stop, stopped) = watch::channel(false);
            let server = Server::new(own, directories(&node), RpcConfig::default(), stopped);
            *place.borrow_mut() = Some(node.clone());
            while let Some(arrival) = arrivals.recv().await {
                match arrival {
                    Arrival::Stream(stream) => {
                        let server = server.clone();
                        tokio::task::spawn_local(async move {
                            server.serve_stream(stream, "pipe").await;
                        });
                    }
                    Arrival::Job(job) => drop(tokio::task::spawn_local(job(node.clone()))),
                }
            }
        });
        let gate = Rc::<Gate>::default();
        let task = tokio::task::spawn_local(Held { gate: gate.clone(), process });
        *self.process.borrow_mut() = Some(Process { task, gate, door });
    }

    /// The process dies at once, or the machine loses its power. Returns when nothing of it is left.
    pub(super) async fn kill(&self, net: &Net, power_cut: bool) {
        net.close(&self.name);
        self.node.borrow_mut().take();
        let process = self.process.borrow_mut().take();
        if power_cut {
            self.dark.set(true);
            net.silence(&self.name);
        }
        if let Some(process) = process {
            process.task.abort();
            // It ends as cancelled.
            drop(process.task.await);
        }
        self.devices.end_process(power_cut);
    }

    /// Holds the process, as by SIGSTOP, or lets it go on.
    pub fn pause(&self, paused: bool) {
        if let Some(process) = &*self.process.borrow() {
            process.gate.paused.set(paused);
            if let Some(waker) = process.gate.waker.take().filter(|_| !paused) {
                waker.wake();
            }
        }
    }

    /// Whether the process is held.
    pub fn is_paused(&self) -> bool {
        self.process.borrow().as_ref().is_some_and(|process| process.gate.paused.get())
    }

    /// Has something done inside the process; none if there is no node, or it ends before that is
    /// done. Begun when this returns; dropped, it goes on.
    pub fn run<T: 'static, F: Future<Output = T> + 'static>(
        &self,
        job: impl FnOnce(Rc<Node>) -> F + 'static,
    ) -> LocalFuture<'static, Option<T>> {
        let (done, answer) = oneshot::channel();
        let process = self.process.borrow();
        let started = process.as_ref().filter(|_| self.node.borrow().is_some());
        if let Some(process) = started {
            let job: Job = Box::new(move |node| {
                let job = job(node);
                Box::pin(async move { drop(done.send(job.await)) })
            });
            drop(process.door.send(Arrival::Job(job)));
        }
        Box::pin(async move { answer.await.ok() })
    }
}
