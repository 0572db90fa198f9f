//! Buffers aligned for direct I/O, from a pool.
//!
//! A payload is received from a socket into an [`AlignedBuf`], frozen into [`Bytes`] and travels
//! as slices of it down to the disk: no copy in user space. Memory returns to the pool of the
//! thread that drops the last slice.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use bytes::Bytes;

use crate::id::BLOCK_SIZE;

/// Largest buffer that is kept for reuse, bytes.
const POOLED_BYTES_MAX: usize = 1 << 20;
/// Bytes that one thread's pool keeps at most.
const POOL_BYTES_MAX: usize = 8 << 20;
/// Size classes: powers of two from one block to [`POOLED_BYTES_MAX`].
const CLASSES: usize = (POOLED_BYTES_MAX / BLOCK_SIZE).trailing_zeros() as usize + 1;

#[derive(Default)]
struct Pool {
    free: [Vec<NonNull<u8>>; CLASSES],
    bytes: usize,
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (class, list) in self.free.iter_mut().enumerate() {
            for pointer in list.drain(..) {
                // SAFETY: the pool holds only pointers allocated with the layout of their class.
                unsafe { dealloc(pointer.as_ptr(), layout(BLOCK_SIZE << class)) };
            }
        }
    }
}

thread_local! {
    static POOL: RefCell<Pool> = RefCell::default();
}

fn layout(capacity: usize) -> Layout {
    Layout::from_size_align(capacity, BLOCK_SIZE).expect("a size that fits the address space")
}

fn class_of(capacity: usize) -> Option<usize> {
    (capacity <= POOLED_BYTES_MAX).then(|| (capacity / BLOCK_SIZE).trailing_zeros() as usize)
}

/// Memory aligned to [`BLOCK_SIZE`], owned by one holder. Its length is what was asked for; its
/// capacity is a multiple of the block size. Content is initialised, but not to any given value.
pub struct AlignedBuf {
    pointer: NonNull<u8>,
    len: usize,
    capacity: usize,
}

// SAFETY: the buffer owns its memory alone, as a Box<[u8]> does.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access is read-only.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// A buffer of `len` bytes with unspecified (but initialised) content.
    pub fn new(len: usize) -> Self {
        let mut capacity = len.max(1).next_multiple_of(BLOCK_SIZE);
        if capacity <= POOLED_BYTES_MAX {
            capacity = capacity.next_power_of_two();
        }
        let pooled = class_of(capacity).and_then(|class| {
            POOL.try_with(|pool| {
                let mut pool = pool.borrow_mut();
                let pointer = pool.free[class].pop()?;
                pool.bytes -= capacity;
                Some(pointer)
            })
            .ok()
            .flatten()
        });
        let pointer = pooled.unwrap_or_else(|| {
            let layout = layout(capacity);
            // SAFETY: the layout has a size of at least one block.
            let pointer = unsafe { alloc_zeroed(layout) };
            NonNull::new(pointer).unwrap_or_else(|| handle_alloc_error(layout))
        });
        Self { pointer, len, capacity }
    }

    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let mut buf = Self::new(len);
        buf.fill(0);
        buf
    }

    /// A buffer with a copy of `data`.
    pub fn copy_of(data: &[u8]) -> Self {
        let mut buf = Self::new(data.len());
        buf.copy_from_slice(data);
        buf
    }

    /// Shortens the buffer to `len` bytes; longer is ignored.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The buffer as shared bytes; slices at multiples of the block size stay aligned.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes from the pointer are allocated and initialised.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and the buffer is borrowed alone.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }
}

impl AsRef<[u8]> for AlignedBuf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        let kept = class_of(self.capacity).is_some_and(|class| {
            POOL.try_with(|pool| {
                let mut pool = pool.borrow_mut();
                let room = pool.bytes + self.capacity <= POOL_BYTES_MAX;
                if room {
                    pool.bytes += self.capacity;
                    pool.free[class].push(self.pointer);
                }
                room
            })
            .unwrap_or(false)
        });
        if !kept {
            // SAFETY: allocated in `new` with this layout, and not kept by the pool.
            unsafe { dealloc(self.pointer.as_ptr(), layout(self.capacity)) };
        }
    }
}

/// Whether `data` may be handed to direct I/O as it is.
pub fn is_aligned(data: &[u8]) -> bool {
    data.as_ptr().addr().is_multiple_of(BLOCK_SIZE) && data.len().is_multiple_of(BLOCK_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_reused() {
        let buf = AlignedBuf::new(5000);
        assert_eq!(buf.len(), 5000);
        let address = buf.as_ptr().addr();
        assert!(address.is_multiple_of(BLOCK_SIZE));
        drop(buf);
        let again = AlignedBuf::new(8192);
        assert_eq!(again.as_ptr().addr(), address, "the pool gives the same memory back");
        let shared = again.freeze();
        assert!(is_aligned(&shared.slice(4096..8192)));
        assert!(!is_aligned(&shared.slice(1..4097)));
    }
}
