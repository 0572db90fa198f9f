//! Disks of other nodes.
//!
//! A far disk is in the registry from when it said who it is until the connection to its node ends, or it
//! says that it is not there. What was on it is rebuilt elsewhere once it was away for
//! [`super::ClusterOptions::out_after`], or as soon as an operator took it out of service.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::{Cluster, Node};
use crate::id::DiskId;
use crate::meta::record::{DiskRecord, DiskState};
use crate::planted::{Bug, bug};
use crate::rpc::{ConnectionState, Peer, RemoteDisk};
use crate::shard::ShardClient;

/// Pause between two looks at the disks of other nodes.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How often a disk that is up is asked whether it still is.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// How long a disk may take to tell.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether requests pass.
pub(super) fn is_up(peer: &Peer) -> bool {
    matches!(*peer.connection().borrow(), ConnectionState::Up { .. })
}

/// A disk of another node.
pub(in crate::node) struct FarDisk {
    pub(in crate::node) id: DiskId,
    pub(in crate::node) record: RefCell<DiskRecord>,
    /// The connection that it is reached by.
    client: RefCell<Option<Rc<RemoteDisk>>>,
    up: Cell<bool>,
    draining: Cell<bool>,
    pub(in crate::node) up_since: Cell<Instant>,
    down_since: Cell<Instant>,
    asked: Cell<Instant>,
    told_lost: Cell<bool>,
    /// Somebody looks after it right now.
    attended: Cell<bool>,
    why: RefCell<String>,
}

impl FarDisk {
    fn new(record: DiskRecord) -> Rc<Self> {
        let now = Instant::now();
        Rc::new(Self {
            id: record.id,
            record: RefCell::new(record),
            client: RefCell::default(),
            up: Cell::new(false),
            draining: Cell::new(false),
            up_since: Cell::new(now),
            down_since: Cell::new(now),
            asked: Cell::new(now),
            told_lost: Cell::new(false),
            attended: Cell::new(false),
            why: RefCell::new("its node was not met yet".into()),
        })
    }

    /// Whether it is in use.
    pub(in crate::node) fn is_up(&self) -> bool {
        self.up.get()
    }

    /// Whether an operator wants it to be empty.
    pub(in crate::node) fn is_draining(&self) -> bool {
        self.record.borrow().state == DiskState::Draining
    }

    /// Node and path.
    pub(in crate::node) fn label(&self) -> String {
        let record = self.record.borrow();
        format!("{}:{}", record.node, record.path)
    }
}

impl Node {
    /// Takes up what the store says of other nodes' disks.
    pub(super) fn know_far_disks(self: &Rc<Self>, cluster: &Cluster) {
        let view = cluster.view.borrow();
        let mut gone = cluster.far.borrow().clone();
        for (_, record, _) in view.disks.iter() {
            if record.node == self.options.name {
                continue;
            }
            if record.state == DiskState::Removed {
                if self.removed.borrow_mut().insert(record.id) {
                    self.drop_far_disk(cluster, record.id);
                    self.tell_removed(record.id);
                }
                continue;
            }
            gone.remove(&record.id);
            let known = cluster.far.borrow().get(&record.id).cloned();
            let Some(known) = known else {
                let disk = FarDisk::new(record.clone());
                cluster.far.borrow_mut().insert(disk.id, disk);
                if !matches!(record.state, DiskState::Draining) && !record.removing {
                    self.registry.expect(record.id, self.domains_of(record));
                }
                self.registry.set_heir(record.id, record.heir);
                continue;
            };
            if *known.record.borrow() != *record {
                known.record.replace(record.clone());
                self.registry.set_heir(record.id, record.heir);
            }
        }
        drop(view);
        for disk in gone.into_keys() {
            self.drop_far_disk(cluster, disk);
        }
    }

    fn drop_far_disk(&self, cluster: &Cluster, disk: DiskId) {
        if cluster.far.borrow_mut().remove(&disk).is_some() {
            self.registry.remove(disk);
        }
        self.registry.forget(disk);
    }

    /// Looks after the disks of other nodes until the node stops.
    pub(super) async fn attend_far_disks(self: Rc<Self>) {
        let Some(cluster) = self.cluster.as_ref() else { return };
        while !self.stopping.get() {
            for disk in cluster.far() {
                // One that hangs holds up no other one.
                if disk.attended.replace(true) {
                    continue;
                }
                let node = self.clone();
                tokio::task::spawn_local(async move {
                    if let Some(cluster) = node.cluster.as_ref() {
                        node.attend(cluster, &disk).await;
                    }
                    disk.attended.set(false);
                });
            }
            sleep(LOOK_EVERY).await;
        }
    }

    async fn attend(self: &Rc<Self>, cluster: &Cluster, disk: &Rc<FarDisk>) {
        let (node, out) = {
            let record = disk.record.borrow();
            (record.node.clone(), record.state.is_out())
        };
        let peer = cluster.peer(&node).filter(is_up);
        let Some(peer) = peer.filter(|_| !out) else {
            let why = if out { "it is out of service" } else { "its node does not answer" };
            self.far_disk_down(disk, why);
            self.mourn(cluster, disk, out);
            return;
        };
        let same = |client: &Rc<RemoteDisk>| client.peer().is(&peer);
        let current = disk.client.borrow().clone().filter(same);
        if disk.up.get() && current.is_some() && disk.asked.get().elapsed() < ASK_EVERY {
            self.keep_drain(disk);
            return;
        }
        let client = current.unwrap_or_else(|| Rc::new(RemoteDisk::new(disk.id, peer)));
        disk.asked.set(Instant::now());
        match timeout(PATIENCE, client.info()).await {
            Ok(Ok(info)) if info.id == disk.id && info.cluster == self.identity.cluster => {
                let again = disk.client.borrow().as_ref().is_some_and(|c| Rc::ptr_eq(c, &client));
                if !(disk.up.get() && again) {
                    *disk.client.borrow_mut() = Some(client.clone());
                    self.far_disk_up(disk, client, info);
                }
                self.keep_drain(disk);
            }
            Ok(Ok(_)) => self.far_disk_down(disk, "another disk answers in its place"),
            Ok(Err(error)) => self.far_disk_down(disk, &error.to_string()),
            Err(_) => self.far_disk_down(disk, "it does not answer"),
        }
        if !disk.up.get() {
            self.mourn(cluster, disk, false);
        }
    }

    fn far_disk_up(
        self: &Rc<Self>,
        disk: &Rc<FarDisk>,
        client: Rc<RemoteDisk>,
        info: crate::shard::DiskInfo,
    ) {
        let domains = self.domains_of(&disk.record.borrow());
        self.registry.add(client, domains, info);
        disk.up.set(true);
        disk.draining.set(false);
        disk.up_since.set(Instant::now());
        disk.told_lost.set(false);
        tracing::info!(disk = %disk.id, at = disk.label(), "disk of another node in use");
        if !bug(Bug::FarReturnUntold) {
            self.tell_returned(disk.id);
        }
    }

    fn far_disk_down(&self, disk: &FarDisk, why: &str) {
        why.clone_into(&mut disk.why.borrow_mut());
        if disk.up.replace(false) {
            tracing::warn!(disk = %disk.id, at = disk.label(), why, "disk of another node not in use");
            self.registry.remove(disk.id);
            disk.client.borrow_mut().take();
            disk.down_since.set(Instant::now());
        }
    }

    /// Has what was on a disk rebuilt that is away for long, again and again because segments are
    /// sealed meanwhile.
    fn mourn(&self, cluster: &Cluster, disk: &FarDisk, out: bool) {
        if !out && disk.down_since.get().elapsed() < cluster.options.out_after {
            return;
        }
        if !disk.told_lost.replace(true) {
            tracing::warn!(disk = %disk.id, at = disk.label(), "what was on the disk is rebuilt elsewhere");
        }
        self.tell_lost(disk.id);
    }

    fn keep_drain(&self, disk: &FarDisk) {
        let draining = disk.is_draining();
        if disk.draining.replace(draining) != draining {
            self.registry.set_draining(disk.id, draining);
            if !draining {
                self.tell_returned(disk.id);
            }
        }
        if draining && disk.up.get() {
            self.tell_lost(disk.id);
        }
    }
}
