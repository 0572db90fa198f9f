//! What a client has under way on one connection, and who may have more.
//!
//! The server says how much in all. Disks share it by dynamic thresholds (Choudhury and Hahne, 1998):
//! a disk may have no more than what is free at present. So one disk alone gets half, of `n` that hang
//! each holds an `n + 1`th, and as much is left to those that answer. What is urgent (and small) may
//! use the last eighth, which others may not.

use std::cell::Cell;

use super::handshake::WindowSize;

/// What one disk has under way.
#[derive(Debug, Default)]
pub(super) struct Share {
    requests: Cell<u32>,
    bytes: Cell<usize>,
}

/// What a connection has under way.
#[derive(Debug)]
pub(super) struct Window {
    max: WindowSize,
    requests: u32,
    bytes: usize,
}

/// What a request of `bytes` counts in a window of `max` bytes: never more than half of it, so that
/// the largest one can be sent while another disk hangs.
pub(super) fn charge(bytes: usize, max: usize) -> usize {
    bytes.min(max / 2)
}

impl Window {
    pub(super) fn new(max: WindowSize) -> Self {
        Self { max, requests: 0, bytes: 0 }
    }

    /// Requests under way.
    pub(super) fn requests(&self) -> u32 {
        self.requests
    }

    /// Takes room for a request of `bytes` of a disk, if there is any; gives what it was charged.
    pub(super) fn take(&mut self, share: &Share, bytes: usize, urgent: bool) -> Option<usize> {
        let bytes = charge(bytes, self.max.bytes);
        let free = self.max.requests - self.requests;
        let free_bytes = self.max.bytes - self.bytes;
        if free == 0 || free_bytes < bytes {
            return None;
        }
        let kept = if urgent { 0 } else { self.max.requests / 8 };
        let first = share.requests.get() == 0;
        let fair = share.requests.get() < free.saturating_sub(kept)
            && (bytes == 0 || share.bytes.get() + bytes <= free_bytes);
        if !first && !fair || free <= kept {
            return None;
        }
        self.requests += 1;
        self.bytes += bytes;
        share.requests.set(share.requests.get() + 1);
        share.bytes.set(share.bytes.get() + bytes);
        Some(bytes)
    }

    /// Gives back what [`Window::take`] charged.
    pub(super) fn give(&mut self, share: &Share, charged: usize) {
        self.requests -= 1;
        self.bytes -= charged;
        share.requests.set(share.requests.get() - 1);
        share.bytes.set(share.bytes.get() - charged);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: WindowSize = WindowSize { requests: 64, bytes: 1 << 20 };

    #[test]
    fn disks_that_hang_leave_room_for_others() {
        let mut window = Window::new(SIZE);
        let disks: [Share; 4] = std::array::from_fn(|_| Share::default());
        for hung in &disks[..3] {
            while window.take(hung, 64 << 10, false).is_some() {}
        }
        let last = &disks[3];
        let first = window.take(last, 4096, false).expect("room for a disk that answers");
        window.give(last, first);
        assert!(window.take(&disks[0], 4096, false).is_none());
        assert!(disks[0].bytes.get() <= SIZE.bytes / 2, "one alone gets half");
    }

    #[test]
    fn the_largest_goes_where_another_disk_hangs() {
        let mut window = Window::new(SIZE);
        let (hung, other) = (Share::default(), Share::default());
        while window.take(&hung, 4096, false).is_some() {}
        assert_eq!(window.take(&other, 32 << 20, false), Some(SIZE.bytes / 2));
    }

    #[test]
    fn urgent_requests_have_the_last_eighth() {
        let mut window = Window::new(SIZE);
        let disks: [Share; 64] = std::array::from_fn(|_| Share::default());
        let taken = disks.iter().filter(|d| window.take(d, 0, false).is_some()).count();
        assert_eq!(taken, 56);
        assert!(window.take(&Share::default(), 0, true).is_some());
    }
}
