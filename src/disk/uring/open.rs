//! Opening a block device or file for one process alone.

use std::cell::Cell;
use std::fs::{File, OpenOptions as FileOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::{Inner, Ring, UringDevice};
use crate::buffer::AlignedBuf;
use crate::id::{BLOCK_BYTES, BLOCK_SIZE};

/// How to open a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// Makes a missing (or empty) file, sparse, of this many bytes: a positive multiple of the
    /// block size. A file that has a size keeps it.
    pub create_size: Option<u64>,
    /// Opens for reading only. Several readers may have a device open at once, but no writer.
    pub read_only: bool,
}

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process (or this one) has it open, mounted or otherwise claimed.
    #[error("{} is in use by another process or mount", .0.display())]
    InUse(PathBuf),
    /// A directory, socket, terminal or the like.
    #[error("{} is neither a regular file nor a block device", .0.display())]
    NotADevice(PathBuf),
    /// Smaller than one block.
    #[error("{} holds {size} bytes, less than one block of {BLOCK_SIZE}", path.display())]
    TooSmall {
        /// The device.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The size asked for is zero or no multiple of the block size.
    #[error("cannot create {} with {size} bytes: not a positive multiple of {BLOCK_SIZE}", path.display())]
    BadSize {
        /// The file.
        path: PathBuf,
        /// The size asked for, bytes.
        size: u64,
    },
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The device.
        path: PathBuf,
        /// Its answer.
        source: io::Error,
    },
}

impl UringDevice {
    /// Opens the block device or regular file at `path` on `ring`, with direct I/O where the
    /// filesystem has it (or else a warning), and locks it until the device is dropped. Its size
    /// is rounded down to whole blocks. Blocks the thread for a moment.
    ///
    /// # Errors
    ///
    /// See [`OpenError`]; nothing is created or changed unless `create_size` asks for it.
    pub fn open(
        path: impl AsRef<Path>,
        ring: &Rc<Ring>,
        options: OpenOptions,
    ) -> Result<Self, OpenError> {
        let attempt = Attempt { path: path.as_ref(), options };
        attempt.check()?;
        let file = attempt.open()?;
        attempt.lock(&file)?;
        attempt.set_size(&file)?;
        attempt.finish(file, ring)
    }

    /// Opens the device for reading beside whoever has it open, and keeps nobody out; also tells
    /// whether somebody has it open for writing. Its content may change between two reads.
    ///
    /// # Errors
    ///
    /// See [`OpenError`], but never [`OpenError::InUse`].
    pub fn open_beside(path: impl AsRef<Path>, ring: &Rc<Ring>) -> Result<(Self, bool), OpenError> {
        let options = OpenOptions { create_size: None, read_only: true };
        let attempt = Attempt { path: path.as_ref(), options };
        attempt.check()?;
        let file = attempt.open()?;
        let in_use = match attempt.lock(&file) {
            Ok(()) => {
                // SAFETY: flock takes an open descriptor and no pointers.
                unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_UN) };
                false
            }
            Err(OpenError::InUse(_)) => true,
            Err(error) => return Err(error),
        };
        Ok((attempt.finish(file, ring)?, in_use))
    }
}

struct Attempt<'a> {
    path: &'a Path,
    options: OpenOptions,
}

impl Attempt<'_> {
    /// The device in an opened file.
    fn finish(&self, file: File, ring: &Rc<Ring>) -> Result<UringDevice, OpenError> {
        let size = size_of(&file).map_err(|source| self.failed("tell the size of", source))?;
        if size < BLOCK_BYTES {
            return Err(OpenError::TooSmall { path: self.path.to_path_buf(), size });
        }
        let direct = self.make_direct(&file)?;
        let inner = Inner {
            ring: ring.clone(),
            file: Rc::new(OwnedFd::from(file)),
            size: Cell::new(whole_blocks(size)),
            direct,
        };
        Ok(UringDevice { inner: Rc::new(inner) })
    }

    fn failed(&self, action: &'static str, source: io::Error) -> OpenError {
        match source.raw_os_error() {
            Some(libc::EWOULDBLOCK | libc::EBUSY) => OpenError::InUse(self.path.to_path_buf()),
            _ => OpenError::Io { action, path: self.path.to_path_buf(), source },
        }
    }

    /// Refuses what must not even be opened (opening a pipe or a tape has effects).
    fn check(&self) -> Result<(), OpenError> {
        if let Some(size) = self.options.create_size
            && (size == 0 || !size.is_multiple_of(BLOCK_BYTES))
        {
            return Err(OpenError::BadSize { path: self.path.to_path_buf(), size });
        }
        match std::fs::metadata(self.path) {
            Ok(metadata) if metadata.is_file() || metadata.file_type().is_block_device() => Ok(()),
            Ok(_) => Err(OpenError::NotADevice(self.path.to_path_buf())),
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    && self.options.create_size.is_some() =>
            {
                Ok(())
            }
            Err(error) => Err(self.failed("open", error)),
        }
    }

    fn open(&self) -> Result<File, OpenError> {
        let is_block =
            std::fs::metadata(self.path).is_ok_and(|found| found.file_type().is_block_device());
        // On a block device O_EXCL claims it against mounts and other openings of this kind.
        let exclusive = if is_block && !self.options.read_only { libc::O_EXCL } else { 0 };
        FileOptions::new()
            .read(true)
            .write(!self.options.read_only)
            .create(self.options.create_size.is_some() && !self.options.read_only && !is_block)
            .truncate(false)
            .custom_flags(exclusive)
            .open(self.path)
            .map_err(|error| self.failed("open", error))
    }

    fn lock(&self, file: &File) -> Result<(), OpenError> {
        let kind = if self.options.read_only { libc::LOCK_SH } else { libc::LOCK_EX };
        // SAFETY: flock takes an open descriptor and no pointers.
        let answer = unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) };
        if answer == 0 {
            return Ok(());
        }
        Err(self.failed("lock", io::Error::last_os_error()))
    }

    /// Gives a new file its size, and makes its existence durable.
    fn set_size(&self, file: &File) -> Result<(), OpenError> {
        let Some(size) = self.options.create_size else { return Ok(()) };
        let metadata = file.metadata().map_err(|error| self.failed("inspect", error))?;
        if self.options.read_only || !metadata.is_file() || metadata.len() > 0 {
            return Ok(());
        }
        file.set_len(size)
            .and_then(|()| file.sync_all())
            .and_then(|()| {
                let parent = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
                File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
            })
            .map_err(|error| self.failed("create", error))
    }

    /// Switches to direct I/O and tries it with one block. False where the filesystem has none.
    fn make_direct(&self, file: &File) -> Result<bool, OpenError> {
        match set_direct(file, true).and_then(|()| {
            let mut block = AlignedBuf::new(BLOCK_SIZE);
            file.read_exact_at(&mut block, 0)
        }) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                tracing::warn!(
                    path = %self.path.display(),
                    "no direct I/O in blocks of {BLOCK_SIZE} bytes here: buffered and synced \
                     writes instead, which are slower and fill the page cache"
                );
                set_direct(file, false).map_err(|error| self.failed("open", error))?;
                Ok(false)
            }
            // An unreadable first block is for the reader of that block to judge.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Ok(true),
            Err(error) => Err(self.failed("read", error)),
        }
    }
}

/// Sets or clears `O_DIRECT`.
fn set_direct(file: &File, direct: bool) -> io::Result<()> {
    // SAFETY: fcntl with F_GETFL takes an open descriptor and no pointers.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    let flags = if direct { flags | libc::O_DIRECT } else { flags & !libc::O_DIRECT };
    // SAFETY: fcntl with F_SETFL takes an open descriptor and an integer.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Size of an opened device in bytes.
pub(super) fn size_of(file: &impl AsRawFd) -> io::Result<u64> {
    // SAFETY: lseek takes an open descriptor and integers; nobody uses the file's position.
    let end = unsafe { libc::lseek64(file.as_raw_fd(), 0, libc::SEEK_END) };
    u64::try_from(end).map_err(|_| io::Error::last_os_error())
}

/// The part of `size` bytes that is usable.
pub(super) fn whole_blocks(size: u64) -> u64 {
    size / BLOCK_BYTES * BLOCK_BYTES
}
