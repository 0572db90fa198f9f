//! The metadata store of a single node: a redb file, in process.
//!
//! Keys are few and small, so the whole content lies in memory ([`super::state`]) and the file is
//! what makes it durable. One thread owns both: a commit blocks for about half a millisecond,
//! which the data path must not. Requests go to the thread through a bounded channel and are
//! answered in order; those that wait share one commit.
//!
//! # Invariants
//!
//! - Nothing is answered, and no watcher told, before it is durable; not even a read that saw it.
//! - After a failed commit nothing is known of the file's content: what was in it answers
//!   [`MetaError::Unknown`], and the store refuses everything until it is opened again.
//! - A dropped future cancels nothing.
//! - The file is locked: one process opens it, once.
//!
//! Leases run by the real clock, not by a paused one: the simulation uses [`super::memory`].

mod format;
mod worker;

use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;

use self::worker::{File, Request};
use super::{
    LeaseId, Listing, LocalFuture, MetaError, MetaResult, MetaStore, StoreIdentity, Txn,
    TxnOutcome, Versioned, Watch,
};

/// Requests that wait for the thread, at most.
const REQUESTS_MAX: usize = 1024;

/// Why a store's file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No such file.
    #[error("there is no metadata store at {0}")]
    NotFound(PathBuf),
    /// A store is to be created where something is.
    #[error("{0} exists already")]
    Exists(PathBuf),
    /// Another process (or this one) has it open.
    #[error("the metadata store {0} is in use by another process")]
    Locked(PathBuf),
    /// Not a file of this kind.
    #[error("{0} is not a metadata store of sds")]
    Foreign(PathBuf),
    /// Of another version (file, version found, version understood).
    #[error(
        "the metadata store {path} has format version {found}, this sds understands {known}: \
         use the version of sds that wrote it"
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// Version found.
        found: u32,
        /// Version understood.
        known: u32,
    },
    /// The content is damaged: file, what is wrong.
    #[error("the metadata store {0} is damaged: {1}; `sdsd recover` rebuilds it from the disks")]
    Corrupt(PathBuf, String),
    /// The initial content is not acceptable.
    #[error("cannot create the metadata store: {0}")]
    Content(#[from] MetaError),
    /// The operating system refused.
    #[error("cannot use the metadata store {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// A store in a file. Dropping it finishes what was requested, and closes the file.
pub struct EmbeddedStore {
    requests: Option<SyncSender<Request>>,
    thread: Option<JoinHandle<()>>,
    path: PathBuf,
}

impl EmbeddedStore {
    /// Opens the store at `path`, reading all of it. Blocks.
    ///
    /// # Errors
    /// Any [`OpenError`] but `Exists` and `Content`.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Self::start(File::open(path)?, path)
    }

    /// Creates a store with this initial content (revision 1), which appears at `path` as a
    /// whole or not at all, and opens it. Blocks.
    ///
    /// # Errors
    /// [`OpenError::Exists`], [`OpenError::Content`], [`OpenError::Io`].
    pub fn create(path: &Path, content: Vec<(String, Bytes)>) -> Result<Self, OpenError> {
        Self::start(File::create(path, content)?, path)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn start(file: File, path: &Path) -> Result<Self, OpenError> {
        let (requests, receiver) = sync_channel(REQUESTS_MAX);
        // The one thread of this layer: redb blocks, and the core must not. It is outside the
        // simulation, which never opens a file.
        let thread = std::thread::Builder::new()
            .name("sds-meta".into())
            .spawn(move || file.run(&receiver))
            .map_err(|source| OpenError::Io { path: path.to_owned(), source })?;
        Ok(Self { requests: Some(requests), thread: Some(thread), path: path.to_owned() })
    }

    /// Sends a request at once, so that it is made whether or not the future is polled.
    fn ask<T: 'static>(
        &self,
        request: impl FnOnce(oneshot::Sender<MetaResult<T>>) -> Request,
    ) -> LocalFuture<'_, MetaResult<T>> {
        let (sender, receiver) = oneshot::channel();
        let sent = match &self.requests {
            Some(requests) => requests.try_send(request(sender)).map_err(|error| match error {
                TrySendError::Full(_) => "too many requests wait",
                TrySendError::Disconnected(_) => "its thread has ended",
            }),
            None => Err("it is closed"),
        };
        Box::pin(async move {
            sent.map_err(|reason| MetaError::Unavailable(reason.into()))?;
            let lost = |_| MetaError::Unknown("the store's thread ended".into());
            receiver.await.map_err(lost)?
        })
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        drop(self.requests.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(path = %self.path.display(), "the metadata store's thread panicked");
        }
    }
}

impl MetaStore for EmbeddedStore {
    fn get(&self, key: &str) -> LocalFuture<'_, MetaResult<Option<Versioned>>> {
        let key = key.to_owned();
        self.ask(|reply| Request::Get(key, reply))
    }

    fn list(&self, prefix: &str) -> LocalFuture<'_, MetaResult<Listing>> {
        let prefix = prefix.to_owned();
        self.ask(|reply| Request::List(prefix, reply))
    }

    fn txn(&self, txn: Txn) -> LocalFuture<'_, MetaResult<TxnOutcome>> {
        self.ask(|reply| Request::Txn(txn, reply))
    }

    fn watch(&self, prefix: &str, from: u64) -> LocalFuture<'_, MetaResult<Watch>> {
        let prefix = prefix.to_owned();
        self.ask(|reply| Request::Watch(prefix, from, reply))
    }

    fn lease_grant(&self, ttl: Duration) -> LocalFuture<'_, MetaResult<LeaseId>> {
        self.ask(|reply| Request::LeaseGrant(ttl, reply))
    }

    fn lease_keep_alive(&self, lease: LeaseId) -> LocalFuture<'_, MetaResult<Duration>> {
        self.ask(|reply| Request::LeaseKeepAlive(lease, reply))
    }

    fn lease_revoke(&self, lease: LeaseId) -> LocalFuture<'_, MetaResult<()>> {
        self.ask(|reply| Request::LeaseRevoke(lease, reply))
    }

    fn identity(&self) -> LocalFuture<'_, MetaResult<StoreIdentity>> {
        self.ask(Request::Identity)
    }
}

#[cfg(test)]
mod tests;
