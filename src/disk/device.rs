//! The block device seam: real devices and files through `io-uring`, and simulated ones.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use bytes::Bytes;

use crate::buffer::AlignedBuf;

/// A future that stays on its core.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Why a device request failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The device answered with an error: `errno` of the operation at this byte offset.
    #[error("{operation} of {len} bytes at {offset}: {}", std::io::Error::from_raw_os_error(*errno))]
    Io {
        /// `read`, `write` or `flush`.
        operation: &'static str,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Error number of the operating system.
        errno: i32,
    },
    /// The device is shorter than the request, or became so.
    #[error("{operation} of {len} bytes at {offset} goes beyond the end of the device")]
    Short {
        /// `read` or `write`.
        operation: &'static str,
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// The device is gone (removed, or its driver stopped).
    #[error("the device is gone")]
    Gone,
}

/// A block device. Offsets and lengths are multiples of the block size, buffers aligned to it.
///
/// A future may be dropped at any time: the operation may still happen, and the device keeps its
/// buffers until it was reaped. Operations run concurrently and complete in any order;
/// overlapping ones that run at the same time have no defined order.
pub trait BlockDevice {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills the buffer from `offset`.
    fn read(
        &self,
        offset: u64,
        buf: AlignedBuf,
    ) -> LocalFuture<'static, Result<AlignedBuf, DeviceError>>;

    /// Writes the pieces one after the other from `offset`. With `durable`, the data survives a
    /// power cut when the future completes; without, after the next [`BlockDevice::flush`] that
    /// began later. Not atomic: a crash may leave any subset of its 512-byte sectors.
    fn write(
        &self,
        offset: u64,
        data: Rc<[Bytes]>,
        durable: bool,
    ) -> LocalFuture<'static, Result<(), DeviceError>>;

    /// Makes every write that completed before the call durable.
    fn flush(&self) -> LocalFuture<'static, Result<(), DeviceError>>;
}
