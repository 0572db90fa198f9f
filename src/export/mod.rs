//! Exports: what a hypervisor talks to. An export knows a volume through [`BlockTarget`] and
//! nothing of segments, disks or redundancy.

#[doc(hidden)]
pub mod memory;
pub mod nbd;

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use bytes::Bytes;

/// A future that stays on its core.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Why a request to a volume failed; the exports translate it into their own error numbers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// The range does not lie within the volume, or its length is zero.
    #[error("the range is outside the volume")]
    OutOfRange,
    /// No space for the data in the pool.
    #[error("the pool is full")]
    NoSpace,
    /// The volume may not be written to.
    #[error("the volume is read-only")]
    ReadOnly,
    /// The data cannot be read or written now; the text says why.
    #[error("I/O error: {0}")]
    Io(String),
    /// The head stopped or lost the volume.
    #[error("the volume is not served here any more")]
    Stopped,
}

/// A run of blocks in the same state, of [`BlockTarget::map`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapExtent {
    /// Length in bytes, not zero.
    pub len: u64,
    /// Whether it has storage; what has none reads as zeroes.
    pub allocated: bool,
}

/// A volume as an export sees it. Offsets and lengths are in bytes, any alignment; the target
/// merges parts of blocks atomically. Calls run concurrently; overlapping ones in any order.
pub trait BlockTarget {
    /// Size in bytes, a multiple of 512; may grow (and, rarely, shrink) while attached.
    fn size(&self) -> u64;
    /// Whether writes are refused with [`TargetError::ReadOnly`].
    fn read_only(&self) -> bool;
    /// Reads `len` bytes at `offset`: pieces in order whose lengths add up to `len`.
    ///
    /// # Errors
    /// [`TargetError::OutOfRange`], [`TargetError::Io`], [`TargetError::Stopped`].
    fn read(&self, offset: u64, len: usize) -> LocalFuture<'_, Result<Vec<Bytes>, TargetError>>;
    /// Writes `data` at `offset`. Durable on every shard of its segment when it returns, so flush
    /// and FUA have nothing to wait for.
    ///
    /// # Errors
    /// All of [`TargetError`].
    fn write(&self, offset: u64, data: Bytes) -> LocalFuture<'_, Result<(), TargetError>>;
    /// Makes `len` bytes at `offset` read as zeroes, durably. `unmap` gives their storage back;
    /// otherwise the range stays (or becomes) allocated as far as the volume reports it.
    ///
    /// # Errors
    /// All of [`TargetError`].
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> LocalFuture<'_, Result<(), TargetError>>;
    /// Returns when every write acknowledged before the call is durable.
    ///
    /// # Errors
    /// [`TargetError::Io`], [`TargetError::Stopped`].
    fn flush(&self) -> LocalFuture<'_, Result<(), TargetError>>;
    /// Which parts of `offset .. offset + len` have storage: consecutive extents from `offset`
    /// that cover at least one byte, at most `max` of them; neighbours differ.
    ///
    /// # Errors
    /// [`TargetError::OutOfRange`], [`TargetError::Io`], [`TargetError::Stopped`].
    fn map(
        &self,
        offset: u64,
        len: u64,
        max: usize,
    ) -> LocalFuture<'_, Result<Vec<MapExtent>, TargetError>>;
}

/// The volumes that an export offers, by name.
pub trait ExportDirectory {
    /// Names of all exports, sorted.
    fn list(&self) -> Vec<String>;
    /// The target behind `name`; none if there is no such export.
    fn open(&self, name: &str) -> LocalFuture<'_, Option<Rc<dyn BlockTarget>>>;
}
