//! Volumes as exports see them: by name, through whatever head a volume has now.
//!
//! A volume of the default pool is exported by its own name, every volume as `pool/name`. A
//! request waits while the volume has no head (it is being taken over) and fails after a time.
//! A read whose head stopped is made again by the next; a write is not, because it may have
//! happened. A read that fails while a disk is away is tried again until the disk is back or the
//! time is over.

use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use super::Node;
use super::volumes::VolumeSlot;
use crate::export::{BlockTarget, ExportDirectory, LocalFuture, MapExtent, TargetError};
use crate::id::VolumeId;
use crate::meta::record::VolumeRecord;
use crate::obs::histogram::LatencyHistogram;
use crate::volume::head::{Head, add};
use crate::volume::target::HeadTarget;

/// Pool whose volumes are exported by their bare names too.
pub const DEFAULT_POOL: &str = "default";

/// Pause before a read that failed while a disk is away is tried again.
const READ_RETRY: Duration = Duration::from_millis(250);

/// What clients did with a volume since the node started.
#[derive(Default)]
pub(super) struct TargetStats {
    pub(super) read_bytes: Cell<u64>,
    pub(super) write_bytes: Cell<u64>,
    pub(super) reads: LatencyHistogram,
    pub(super) writes: LatencyHistogram,
}

/// One attached client's view of a volume.
struct Attachment {
    node: Rc<Node>,
    slot: Rc<VolumeSlot>,
    patience: Duration,
}

impl Attachment {
    fn new(node: Rc<Node>, slot: Rc<VolumeSlot>) -> Self {
        slot.attached.set(slot.attached.get() + 1);
        let patience = node.options.head.io_timeout;
        Self { node, slot, patience }
    }

    /// Reads, however long disks are away, within the patience.
    async fn read_waiting(&self, offset: u64, len: usize) -> Result<Vec<Bytes>, TargetError> {
        let deadline = Instant::now() + self.patience;
        loop {
            let answer = self.ask(|head| async move { head.read(offset, len).await }).await;
            let waits = matches!(answer, Err(TargetError::Io(_)))
                && Instant::now() < deadline
                && self.node.slots().iter().any(|slot| !slot.is_online());
            if !waits {
                return answer;
            }
            tokio::time::sleep(READ_RETRY).await;
        }
    }

    /// The head, once there is one that serves.
    async fn head(&self) -> Result<Rc<Head>, TargetError> {
        let serving = async {
            loop {
                let changed = self.slot.changed.notified();
                if self.slot.closing.get() {
                    return Err(TargetError::Stopped);
                }
                if let Some(head) = self.slot.serving() {
                    return Ok(head);
                }
                changed.await;
            }
        };
        match timeout(self.patience, serving).await {
            Ok(result) => result,
            Err(_) => Err(TargetError::Io(self.slot.why_not())),
        }
    }

    /// Asks the head, and its successor if it stops meanwhile.
    async fn ask<T, F>(&self, request: impl Fn(HeadTarget) -> F) -> Result<T, TargetError>
    where
        F: Future<Output = Result<T, TargetError>>,
    {
        loop {
            let head = self.head().await?;
            match request(HeadTarget(head.clone())).await {
                Err(TargetError::Stopped) if !self.slot.closing.get() => self.slot.dismiss(&head),
                answer => return answer,
            }
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.slot.attached.set(self.slot.attached.get() - 1);
    }
}

impl BlockTarget for Attachment {
    fn size(&self) -> u64 {
        let size = self.slot.record.borrow().size_bytes;
        self.slot.head.borrow().as_ref().map_or(size, |head| head.size_bytes())
    }

    fn read_only(&self) -> bool {
        false
    }

    fn read(&self, offset: u64, len: usize) -> LocalFuture<'_, Result<Vec<Bytes>, TargetError>> {
        Box::pin(async move {
            let started = Instant::now();
            let answer = self.read_waiting(offset, len).await;
            self.slot.stats.reads.observe(started.elapsed());
            if answer.is_ok() {
                add(&self.slot.stats.read_bytes, len as u64);
            }
            answer
        })
    }

    fn write(&self, offset: u64, data: Bytes) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(async move {
            let started = Instant::now();
            let len = data.len() as u64;
            let answer = HeadTarget(self.head().await?).write(offset, data).await;
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
            let answer = HeadTarget(self.head().await?).zero(offset, len, unmap).await;
            self.slot.stats.writes.observe(started.elapsed());
            answer
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(self.ask(|head| async move { head.flush().await }))
    }

    fn map(
        &self,
        offset: u64,
        len: u64,
        max: usize,
    ) -> LocalFuture<'_, Result<Vec<MapExtent>, TargetError>> {
        Box::pin(self.ask(move |head| async move { head.map(offset, len, max).await }))
    }
}

impl Node {
    /// The names under which a volume is exported.
    pub(super) fn export_names(pool: &str, name: &str) -> Vec<String> {
        let full = format!("{pool}/{name}");
        if pool == DEFAULT_POOL { vec![name.to_owned(), full] } else { vec![full] }
    }

    fn exported(&self, name: &str) -> Option<Rc<VolumeSlot>> {
        let (pool, name) = name.split_once('/').unwrap_or((DEFAULT_POOL, name));
        self.volume_named(pool, name)
    }
}

/// The volumes of a node as a directory of exports.
pub struct Exports(pub Rc<Node>);

/// The same volumes for clients on this machine: in a cluster, their heads come here.
pub struct LocalExports(pub Rc<Node>);

impl ExportDirectory for LocalExports {
    fn list(&self) -> Vec<String> {
        Exports(self.0.clone()).list()
    }

    fn open(&self, name: &str) -> LocalFuture<'_, Option<Rc<dyn BlockTarget>>> {
        Box::pin(open(self.0.clone(), name.to_owned(), true))
    }
}

async fn open(node: Rc<Node>, name: String, local: bool) -> Option<Rc<dyn BlockTarget>> {
    if let Some(cluster) = node.cluster.as_ref() {
        let (pool, name) = name.split_once('/').unwrap_or((DEFAULT_POOL, &name));
        let named = |v: &VolumeRecord| v.pool == pool && v.name == name;
        let found = cluster.volumes().into_iter().find(|placed| named(&placed.record));
        return node.attach(found?.record.id, local).await;
    }
    let slot = node.exported(&name).filter(|slot| !slot.closing.get())?;
    Some(Rc::new(Attachment::new(node, slot)))
}

impl ExportDirectory for Exports {
    fn list(&self) -> Vec<String> {
        if let Some(cluster) = self.0.cluster.as_ref() {
            let volumes = cluster.volumes().into_iter().map(|placed| placed.record);
            let mut names: Vec<String> =
                volumes.map(|v| Node::export_names(&v.pool, &v.name).remove(0)).collect();
            names.sort_unstable();
            return names;
        }
        let volumes = self.0.volumes.borrow();
        let mut names: Vec<String> = volumes
            .values()
            .map(|slot| {
                let record = slot.record.borrow();
                Node::export_names(&record.pool, &record.name).remove(0)
            })
            .collect();
        names.sort_unstable();
        names
    }

    fn open(&self, name: &str) -> LocalFuture<'_, Option<Rc<dyn BlockTarget>>> {
        Box::pin(open(self.0.clone(), name.to_owned(), false))
    }
}

/// Names a volume in a log line.
pub(super) fn volume_label(pool: &str, name: &str, id: VolumeId) -> String {
    format!("{pool}/{name} ({id})")
}
