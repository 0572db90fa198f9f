//! What a server serves: disks, volumes and questions, each by a trait that others implement.

use std::rc::Rc;

use bytes::Bytes;

use crate::export::{BlockTarget, LocalFuture, TargetError};
use crate::id::{DiskId, Epoch, VolumeId};
use crate::rpc::request::AskResult;
use crate::shard::ShardClient;

/// The disks of this core.
pub trait DiskDirectory {
    /// The disk with this id, if it is here now.
    fn disk(&self, id: DiskId) -> Option<Rc<dyn ShardClient>>;
}

/// A volume's head, wherever it runs.
#[derive(Clone)]
pub struct Served {
    /// The epoch of the head.
    pub epoch: Epoch,
    /// Requests to exactly this head: once it has stopped, they fail with [`TargetError::Stopped`] and never
    /// reach the one after it. A change that is made here is begun only when all are over, or void,
    /// that this process made before and does not know the outcome of, or waits for no more.
    ///
    /// A head of this process keeps that by itself: who drops a request to it has either queued it
    /// before every later one, or never will have.
    pub target: Rc<dyn BlockTarget>,
}

/// The volumes whose heads run on this core.
pub trait VolumeDirectory {
    /// The head of this volume, if it runs here and serves now.
    ///
    /// # Errors
    /// [`TargetError::Stopped`] if it does not, [`TargetError::Io`] with a reason if that cannot be told.
    fn volume(&self, id: VolumeId) -> LocalFuture<'_, Result<Served, TargetError>>;
}

/// What a node is asked by other nodes.
pub trait Questions {
    /// The answer to a question, at most [`crate::limits::RPC_ASK_BYTES_MAX`] bytes long. It is asked once;
    /// who asked may not wait for the answer any more.
    ///
    /// # Errors
    /// A text for whoever asked.
    fn ask(&self, question: Bytes) -> LocalFuture<'_, AskResult>;
}

/// Has nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Refuses;

impl DiskDirectory for Refuses {
    fn disk(&self, _: DiskId) -> Option<Rc<dyn ShardClient>> {
        None
    }
}

impl VolumeDirectory for Refuses {
    fn volume(&self, _: VolumeId) -> LocalFuture<'_, Result<Served, TargetError>> {
        Box::pin(std::future::ready(Err(TargetError::Stopped)))
    }
}

impl Questions for Refuses {
    fn ask(&self, _: Bytes) -> LocalFuture<'_, AskResult> {
        Box::pin(std::future::ready(Err("no questions are answered here".into())))
    }
}

/// All that a server serves. What is not given refuses.
#[derive(Clone)]
pub struct Directories {
    /// Disks.
    pub disks: Rc<dyn DiskDirectory>,
    /// Volumes.
    pub volumes: Rc<dyn VolumeDirectory>,
    /// Questions.
    pub questions: Rc<dyn Questions>,
}

impl Default for Directories {
    fn default() -> Self {
        let none = Rc::new(Refuses);
        Self { disks: none.clone(), volumes: none.clone(), questions: none }
    }
}

/// Disks alone.
impl<D: DiskDirectory + 'static> From<Rc<D>> for Directories {
    fn from(disks: Rc<D>) -> Self {
        Self { disks, ..Self::default() }
    }
}
