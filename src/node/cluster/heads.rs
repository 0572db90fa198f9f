//! Volumes of the cluster as this node exports them, wherever they are served.
//!
//! A client's requests follow the volume's head ([`crate::rpc::forward`](crate::rpc)): it is asked here if it is here,
//! else over the connection to its node.

use std::rc::Rc;

use bytes::Bytes;
use tokio::time::Instant;

use super::{Cluster, Node};
use crate::export::{BlockTarget, LocalFuture, MapExtent, TargetError};
use crate::id::VolumeId;
use crate::node::volumes::VolumeSlot;
use crate::rpc::{ForwardConfig, Forwarder, Locate, RemoteVolume, Served, VolumeDirectory};
use crate::volume::head::{Head, add};
use crate::volume::target::HeadTarget;

/// A head that counts what it is asked.
struct Counted {
    slot: Rc<VolumeSlot>,
    head: HeadTarget,
}

impl BlockTarget for Counted {
    fn size(&self) -> u64 {
        self.head.0.size_bytes()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, len: usize) -> LocalFuture<'_, Result<Vec<Bytes>, TargetError>> {
        Box::pin(async move {
            let started = Instant::now();
            let answer = self.head.read(offset, len).await;
            self.slot.stats.reads.observe(started.elapsed());
            if answer.is_ok() {
                add(&self.slot.stats.read_bytes, len as u64);
            }
            answer
        })
    }

    fn write(&self, offset: u64, data: Bytes) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(async move {
            let (started, len) = (Instant::now(), data.len() as u64);
            let answer = self.head.write(offset, data).await;
            self.slot.stats.writes.observe(started.elapsed());
            if answer.is_ok() {
                add(&self.slot.stats.write_bytes, len);
            }
            answer
        })
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(async move {
            let started = Instant::now();
            let answer = self.head.zero(offset, len, unmap).await;
            self.slot.stats.writes.observe(started.elapsed());
            answer
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), TargetError>> {
        self.head.flush()
    }

    fn map(
        &self,
        offset: u64,
        len: u64,
        max: usize,
    ) -> LocalFuture<'_, Result<Vec<MapExtent>, TargetError>> {
        self.head.map(offset, len, max)
    }
}

fn served(slot: Rc<VolumeSlot>, head: Rc<Head>) -> Served {
    let epoch = head.authority.epoch;
    Served { epoch, target: Rc::new(Counted { slot, head: HeadTarget(head) }) }
}

/// The volumes that a node serves, for other nodes.
pub struct NodeVolumes(pub Rc<Node>);

impl VolumeDirectory for NodeVolumes {
    fn volume(&self, id: VolumeId) -> LocalFuture<'_, Result<Served, TargetError>> {
        let slot = self.0.volumes.borrow().get(&id).cloned();
        let head = slot.and_then(|slot| Some((slot.clone(), slot.serving()?)));
        let found = head.map(|(slot, head)| served(slot, head)).ok_or(TargetError::Stopped);
        Box::pin(std::future::ready(found))
    }
}

/// Finds the heads of the cluster.
struct Finder(Rc<Node>);

impl Locate for Finder {
    fn locate(&self, volume: VolumeId) -> LocalFuture<'_, Result<Served, TargetError>> {
        Box::pin(async move {
            let node = &self.0;
            let slot = node.volumes.borrow().get(&volume).cloned();
            if let Some(slot) = slot {
                return match slot.serving() {
                    Some(head) => Ok(served(slot, head)),
                    None => Err(TargetError::Io(slot.why_not())),
                };
            }
            let Some(cluster) = node.cluster.as_ref() else { return Err(TargetError::Stopped) };
            let Some(place) = cluster.place(volume) else {
                return Err(TargetError::Io("no node is to serve the volume".into()));
            };
            let Some(peer) = cluster.peer(&place) else { return Err(TargetError::Stopped) };
            let remote = RemoteVolume::attach(&peer, volume).await?;
            Ok(Served { epoch: remote.epoch(), target: Rc::new(remote) })
        })
    }
}

/// A client's view of a volume of the cluster.
struct Attachment {
    node: Rc<Node>,
    volume: VolumeId,
    /// Whether the client is on this machine.
    local: bool,
    forwarder: Forwarder,
}

impl Cluster {
    fn count(&self, volume: VolumeId, local: bool, more: bool) {
        if local {
            self.local.borrow_mut().count(volume, more);
        }
        let mut attached = self.attached.borrow_mut();
        let count = attached.entry(volume).or_default();
        *count = if more { *count + 1 } else { count.saturating_sub(1) };
        if *count == 0 {
            attached.remove(&volume);
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if let Some(cluster) = self.node.cluster.as_ref() {
            cluster.count(self.volume, self.local, false);
        }
    }
}

impl BlockTarget for Attachment {
    fn size(&self) -> u64 {
        self.forwarder.size()
    }

    fn read_only(&self) -> bool {
        self.forwarder.read_only()
    }

    fn read(&self, offset: u64, len: usize) -> LocalFuture<'_, Result<Vec<Bytes>, TargetError>> {
        self.forwarder.read(offset, len)
    }

    fn write(&self, offset: u64, data: Bytes) -> LocalFuture<'_, Result<(), TargetError>> {
        self.forwarder.write(offset, data)
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> LocalFuture<'_, Result<(), TargetError>> {
        self.forwarder.zero(offset, len, unmap)
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), TargetError>> {
        self.forwarder.flush()
    }

    fn map(
        &self,
        offset: u64,
        len: u64,
        max: usize,
    ) -> LocalFuture<'_, Result<Vec<MapExtent>, TargetError>> {
        self.forwarder.map(offset, len, max)
    }
}

impl Node {
    /// Clients of this node that are attached to a volume.
    pub(in crate::node) fn attached_here(&self, volume: VolumeId) -> u32 {
        let cluster = self.cluster.as_ref();
        cluster.and_then(|c| c.attached.borrow().get(&volume).copied()).unwrap_or(0)
    }

    /// Clients of other nodes that answer which are attached to a volume.
    pub(in crate::node) async fn attached_elsewhere(&self, volume: VolumeId) -> u32 {
        let Some(cluster) = self.cluster.as_ref() else { return 0 };
        let question = crate::node::relay::Ask::Attached { volume }.encode();
        let mut count = self.attached_here(volume);
        for (_, peer) in cluster.others() {
            let answer = peer.ask(question.clone(), std::time::Duration::from_secs(2)).await;
            let told = answer.ok().and_then(|bytes| String::from_utf8(bytes.to_vec()).ok());
            count += told.and_then(|text| text.parse::<u32>().ok()).unwrap_or(0);
        }
        count
    }

    /// A volume of the cluster for a client, wherever its head is; `local`: the client is on this machine.
    pub(in crate::node) async fn attach(
        self: &Rc<Self>,
        volume: VolumeId,
        local: bool,
    ) -> Option<Rc<dyn BlockTarget>> {
        let cluster = self.cluster.as_ref()?;
        let config =
            ForwardConfig { patience: self.options.head.io_timeout, ..ForwardConfig::default() };
        let finder = Rc::new(Finder(self.clone()));
        match Forwarder::open(volume, finder, config).await {
            Ok(forwarder) => {
                cluster.count(volume, local, true);
                Some(Rc::new(Attachment { node: self.clone(), volume, local, forwarder }))
            }
            Err(error) => {
                tracing::warn!(%volume, %error, "the volume cannot be attached");
                None
            }
        }
    }
}
