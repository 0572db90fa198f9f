//! Block devices and regular files through `io_uring`, with direct I/O.
//!
//! [`Ring`] is one per core; [`UringDevice`] is one opened device on it and implements the
//! [`BlockDevice`] seam. It knows offsets and bytes, nothing of what they mean.
//!
//! # Invariants
//!
//! - A device is open once: a second opening, by any process, fails while the first lasts.
//! - A device never grows: a request beyond the size it was opened with is refused, also where a
//!   file would have been extended. When a request comes back short the size is asked again, so
//!   that a file which was cut is not silently made longer by the next write.
//! - Requests that the kernel does in part are continued until they are whole or fail.

mod open;
mod ring;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use bytes::Bytes;

pub use self::open::{OpenError, OpenOptions};
pub use self::ring::Ring;
use self::ring::{Request, RingStopped};
use crate::buffer::{AlignedBuf, is_aligned};
use crate::disk::device::{BlockDevice, DeviceError, LocalFuture};
use crate::id::BLOCK_BYTES;

/// Smallest unit in which direct I/O may come back short and be continued, bytes.
const SECTOR_BYTES: u64 = 512;
/// How often a request that was interrupted (`EINTR`, `EAGAIN`) is made again.
const RETRIES_MAX: u32 = 16;

/// A block device or file, opened for this process alone. Clones are the same opened device;
/// it closes when the last one is dropped and its requests have ended.
#[derive(Clone)]
pub struct UringDevice {
    inner: Rc<Inner>,
}

struct Inner {
    ring: Rc<Ring>,
    file: Rc<OwnedFd>,
    size: Cell<u64>,
    direct: bool,
}

impl UringDevice {
    /// Whether requests bypass the page cache. False on filesystems without direct I/O, where
    /// durable writes are buffered and synced.
    pub fn is_direct(&self) -> bool {
        self.inner.direct
    }
}

impl BlockDevice for UringDevice {
    fn size(&self) -> u64 {
        self.inner.size.get()
    }

    fn read(
        &self,
        offset: u64,
        buf: AlignedBuf,
    ) -> LocalFuture<'static, Result<AlignedBuf, DeviceError>> {
        let inner = self.inner.clone();
        Box::pin(async move { inner.read(offset, buf).await })
    }

    fn write(
        &self,
        offset: u64,
        data: Rc<[Bytes]>,
        durable: bool,
    ) -> LocalFuture<'static, Result<(), DeviceError>> {
        let inner = self.inner.clone();
        Box::pin(async move { inner.write(offset, data, durable).await })
    }

    fn flush(&self) -> LocalFuture<'static, Result<(), DeviceError>> {
        let inner = self.inner.clone();
        Box::pin(async move { inner.flush().await })
    }
}

/// A whole request, for its errors.
#[derive(Clone, Copy)]
struct Span {
    operation: &'static str,
    offset: u64,
    len: u64,
}

impl Span {
    fn short(self) -> DeviceError {
        DeviceError::Short { operation: self.operation, offset: self.offset, len: self.len }
    }

    fn failed(self, errno: i32) -> DeviceError {
        match errno {
            libc::ENODEV | libc::ENXIO => DeviceError::Gone,
            errno => DeviceError::Io {
                operation: self.operation,
                offset: self.offset,
                len: self.len,
                errno,
            },
        }
    }
}

impl Inner {
    async fn read(&self, offset: u64, mut buf: AlignedBuf) -> Result<AlignedBuf, DeviceError> {
        let span = Span { operation: "read", offset, len: buf.len() as u64 };
        self.check_aligned(span, std::slice::from_ref(&buf))?;
        let mut progress = Progress::new(span);
        while let Some(done) = progress.next() {
            let start = usize::try_from(done).expect("within the buffer");
            let answer = self.perform(offset + done, Request::Read { buf, start }).await?;
            let Request::Read { buf: returned, .. } = answer.1 else {
                unreachable!("a request comes back as itself")
            };
            buf = returned;
            self.advance(&mut progress, answer.0)?;
        }
        Ok(buf)
    }

    async fn write(
        &self,
        offset: u64,
        data: Rc<[Bytes]>,
        durable: bool,
    ) -> Result<(), DeviceError> {
        let len = data.iter().map(|piece| piece.len() as u64).sum();
        let span = Span { operation: "write", offset, len };
        self.check_aligned(span, &data)?;
        let mut progress = Progress::new(span);
        while let Some(done) = progress.next() {
            let skip = usize::try_from(done).expect("within the data");
            let request = Request::Write { data: data.clone(), skip, durable };
            let (result, _) = self.perform(offset + done, request).await?;
            self.advance(&mut progress, result)?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), DeviceError> {
        let span = Span { operation: "flush", offset: 0, len: self.size.get() };
        let mut retries = 0;
        loop {
            match self.perform(0, Request::Flush).await?.0 {
                0.. => return Ok(()),
                error if is_transient(-error) && retries < RETRIES_MAX => retries += 1,
                error => return Err(span.failed(-error)),
            }
        }
    }

    async fn perform(&self, offset: u64, request: Request) -> Result<(i32, Request), DeviceError> {
        let answer = self.ring.perform(&self.file, offset, request).await;
        answer.map_err(|RingStopped| DeviceError::Gone)
    }

    /// Takes up the kernel's answer to the next part of a read or write.
    fn advance(&self, progress: &mut Progress, result: i32) -> Result<(), DeviceError> {
        let span = progress.span;
        let Ok(bytes) = u64::try_from(result) else {
            let errno = -result;
            if is_transient(errno) && progress.retries < RETRIES_MAX {
                progress.retries += 1;
                return Ok(());
            }
            if errno == libc::ENOSPC {
                // What a block device that shrank answers to a write beyond its end.
                self.refresh_size();
                self.check_bounds(span)?;
            }
            return Err(span.failed(errno));
        };
        let whole = progress.done + bytes == span.len;
        if bytes == 0 || (self.direct && !whole && !bytes.is_multiple_of(SECTOR_BYTES)) {
            self.refresh_size();
            return Err(span.short());
        }
        progress.done += bytes;
        Ok(())
    }

    /// Refuses what the caller had to align: some filesystems would take it through their cache.
    fn check_aligned(&self, span: Span, pieces: &[impl AsRef<[u8]>]) -> Result<(), DeviceError> {
        let aligned = span.offset.is_multiple_of(BLOCK_BYTES)
            && pieces.iter().map(AsRef::as_ref).all(|piece| piece.is_empty() || is_aligned(piece));
        if aligned { self.check_bounds(span) } else { Err(span.failed(libc::EINVAL)) }
    }

    fn check_bounds(&self, span: Span) -> Result<(), DeviceError> {
        match span.offset.checked_add(span.len) {
            Some(end) if end <= self.size.get() => Ok(()),
            _ => Err(span.short()),
        }
    }

    /// Lowers the size to what the device has now.
    fn refresh_size(&self) {
        match open::size_of(&self.file).map(open::whole_blocks) {
            Ok(size) if size < self.size.get() => {
                tracing::warn!(was = self.size.get(), is = size, "a device became shorter");
                self.size.set(size);
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "a device does not tell its size"),
        }
    }
}

/// How far a request that may take several operations has come.
struct Progress {
    span: Span,
    done: u64,
    retries: u32,
}

impl Progress {
    fn new(span: Span) -> Self {
        Self { span, done: 0, retries: 0 }
    }

    /// Bytes done so far; none when that is all.
    fn next(&self) -> Option<u64> {
        (self.done < self.span.len).then_some(self.done)
    }
}

fn is_transient(errno: i32) -> bool {
    matches!(errno, libc::EINTR | libc::EAGAIN)
}
