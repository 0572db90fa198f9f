//! How busy clients keep the disks of a node, for work in the background that leaves them alone.
//!
//! Knows counts only. Shared by the heads of a node, because they share the disks.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::{Semaphore, SemaphorePermit};

/// Requests of clients under way, and the one permit of scrubs.
#[derive(Debug)]
pub struct Activity {
    in_flight: Cell<u32>,
    begun: Cell<u64>,
    scrubs: Semaphore,
}

impl Default for Activity {
    fn default() -> Self {
        Self { in_flight: Cell::new(0), begun: Cell::new(0), scrubs: Semaphore::new(1) }
    }
}

/// A request of a client that is under way, as long as this lives.
#[derive(Debug)]
pub struct Busy(Rc<Activity>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get() - 1);
    }
}

impl Activity {
    /// Counts a request of a client until the answer is dropped.
    pub fn begin(self: &Rc<Self>) -> Busy {
        self.in_flight.set(self.in_flight.get() + 1);
        self.begun.set(self.begun.get() + 1);
        Busy(self.clone())
    }

    /// Requests under way now.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    /// Requests begun so far: it has changed if there was any meanwhile.
    pub fn begun(&self) -> u64 {
        self.begun.get()
    }

    /// The permit of the one window that may be scrubbed at a time, in the order of asking; none
    /// never happens.
    pub async fn scrub_permit(&self) -> Option<SemaphorePermit<'_>> {
        self.scrubs.acquire().await.ok()
    }
}
