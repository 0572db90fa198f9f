//! How a node gets at the devices of its disks: the seam that the simulation replaces.

use std::cell::RefCell;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use crate::buffer::AlignedBuf;
use crate::disk::device::{BlockDevice, DeviceError, LocalFuture};
use crate::disk::uring::{OpenError, OpenOptions, Ring, UringDevice};

/// How long a device may be in use by another process when the node starts.
const IN_USE_PATIENCE: Duration = Duration::from_secs(5);
/// Pause between two tries to open it.
const IN_USE_PAUSE: Duration = Duration::from_millis(10);

/// Why a device could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenFailure {
    /// There is nothing at the path.
    #[error("there is nothing at {0}")]
    NotFound(String),
    /// Another process, or this one, has it open.
    #[error("{0}")]
    InUse(String),
    /// Anything else; the sentence names the path.
    #[error("{0}")]
    Other(String),
}

/// Opens devices by path.
pub trait DeviceOpener {
    /// Opens the device for this process alone. With `create_size`, a missing file is made with
    /// so many bytes (a multiple of the block size).
    ///
    /// # Errors
    /// [`OpenFailure`].
    fn open(
        &self,
        path: &str,
        create_size: Option<u64>,
    ) -> Result<Rc<dyn BlockDevice>, OpenFailure>;

    /// Whether the path of an open device still leads to something of at least `size` bytes.
    ///
    /// # Errors
    /// A sentence: the file is gone, or was cut.
    fn check(&self, path: &str, size: u64) -> Result<(), String>;
}

/// Opens a device that is there; the kernel may take a moment to close those of a process that was
/// killed.
pub(super) async fn open_patiently(
    opener: &dyn DeviceOpener,
    path: &str,
) -> Result<Rc<dyn BlockDevice>, OpenFailure> {
    let deadline = Instant::now() + IN_USE_PATIENCE;
    loop {
        match opener.open(path, None) {
            Err(OpenFailure::InUse(_)) if Instant::now() < deadline => {
                tokio::time::sleep(IN_USE_PAUSE).await;
            }
            result => return result,
        }
    }
}

/// Block devices and files through `io_uring`.
pub struct UringOpener {
    ring: Rc<Ring>,
}

impl UringOpener {
    /// An opener of devices on this ring.
    pub fn new(ring: Rc<Ring>) -> Self {
        Self { ring }
    }
}

impl DeviceOpener for UringOpener {
    fn open(
        &self,
        path: &str,
        create_size: Option<u64>,
    ) -> Result<Rc<dyn BlockDevice>, OpenFailure> {
        let options = OpenOptions { create_size, read_only: false };
        match UringDevice::open(path, &self.ring, options) {
            Ok(device) => Ok(Rc::new(device)),
            Err(OpenError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Err(OpenFailure::NotFound(path.to_owned()))
            }
            Err(error @ OpenError::InUse(_)) => Err(OpenFailure::InUse(error.to_string())),
            Err(error) => Err(OpenFailure::Other(error.to_string())),
        }
    }

    fn check(&self, path: &str, size: u64) -> Result<(), String> {
        let metadata = std::fs::metadata(Path::new(path))
            .map_err(|error| format!("it cannot be found any more: {error}"))?;
        if metadata.file_type().is_block_device() || metadata.len() >= size {
            return Ok(());
        }
        Err(format!("the file was cut to {} bytes, the disk has {size}", metadata.len()))
    }
}

/// A device that can be let go of while others still refer to it, so that it can be opened again.
pub(super) struct Detachable {
    device: RefCell<Option<Rc<dyn BlockDevice>>>,
    size: u64,
}

impl Detachable {
    pub(super) fn new(device: Rc<dyn BlockDevice>) -> Self {
        Self { size: device.size(), device: RefCell::new(Some(device)) }
    }

    /// Lets go: every later request is answered with [`DeviceError::Gone`].
    pub(super) fn detach(&self) {
        self.device.borrow_mut().take();
    }

    fn get(&self) -> Option<Rc<dyn BlockDevice>> {
        self.device.borrow().clone()
    }
}

impl BlockDevice for Detachable {
    fn size(&self) -> u64 {
        self.get().map_or(self.size, |device| device.size())
    }

    fn read(
        &self,
        offset: u64,
        buf: AlignedBuf,
    ) -> LocalFuture<'static, Result<AlignedBuf, DeviceError>> {
        match self.get() {
            Some(device) => device.read(offset, buf),
            None => Box::pin(std::future::ready(Err(DeviceError::Gone))),
        }
    }

    fn write(
        &self,
        offset: u64,
        data: Rc<[Bytes]>,
        durable: bool,
    ) -> LocalFuture<'static, Result<(), DeviceError>> {
        match self.get() {
            Some(device) => device.write(offset, data, durable),
            None => Box::pin(std::future::ready(Err(DeviceError::Gone))),
        }
    }

    fn flush(&self) -> LocalFuture<'static, Result<(), DeviceError>> {
        match self.get() {
            Some(device) => device.flush(),
            None => Box::pin(std::future::ready(Err(DeviceError::Gone))),
        }
    }
}
