//! Bounds on what connections hold in memory: requests and payload bytes, per connection and per
//! server. A connection that has no permit stops reading its socket, which is the backpressure.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Context, Waker};

use crate::limits::{
    CONNECTION_BYTES_FREE, CONNECTION_BYTES_MAX, CONNECTION_REQUESTS_MAX, REQUEST_BYTES_MAX,
};

/// Payload bytes of all connections of a server beyond what each has for itself.
pub(super) struct Budget {
    max: usize,
    used: Cell<usize>,
    waiters: RefCell<Vec<Waker>>,
}

impl Budget {
    /// A budget of `max` bytes, but at least what one request can need.
    pub(super) fn new(max: usize) -> Self {
        let max = max.max(REQUEST_BYTES_MAX);
        Self { max, used: Cell::new(0), waiters: RefCell::default() }
    }

    fn release(&self, bytes: usize) {
        if bytes > 0 {
            self.used.set(self.used.get() - bytes);
            self.waiters.take().into_iter().for_each(Waker::wake);
        }
    }
}

/// What one connection holds. Returns it to the server's budget when dropped.
pub(super) struct Permits {
    requests: Cell<usize>,
    bytes: Cell<usize>,
    budget: Rc<Budget>,
}

impl Permits {
    pub(super) fn new(budget: Rc<Budget>) -> Self {
        Self { requests: Cell::new(0), bytes: Cell::new(0), budget }
    }

    /// Takes a permit for one request of `bytes`; if there is none, the task of `cx` is woken
    /// when the server has room again (a release of this connection's own permits happens in its
    /// own task, which then tries again).
    pub(super) fn acquire(&self, bytes: usize, cx: &Context<'_>) -> bool {
        let total = self.bytes.get() + bytes;
        if self.requests.get() >= CONNECTION_REQUESTS_MAX || total > CONNECTION_BYTES_MAX {
            return false;
        }
        let more = shared_part(total) - shared_part(self.bytes.get());
        if more > 0 && self.budget.used.get() + more > self.budget.max {
            let mut waiters = self.budget.waiters.borrow_mut();
            if !waiters.iter().any(|waker| waker.will_wake(cx.waker())) {
                waiters.push(cx.waker().clone());
            }
            return false;
        }
        self.budget.used.set(self.budget.used.get() + more);
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(total);
        true
    }

    /// Whether a connection waits for what this or another one holds.
    pub(super) fn contended(&self) -> bool {
        !self.budget.waiters.borrow().is_empty()
    }

    /// Gives a permit for one request of `bytes` back.
    pub(super) fn release(&self, bytes: usize) {
        let before = self.bytes.get();
        self.requests.set(self.requests.get() - 1);
        self.bytes.set(before - bytes);
        self.budget.release(shared_part(before) - shared_part(before - bytes));
    }
}

impl Drop for Permits {
    fn drop(&mut self) {
        self.budget.release(shared_part(self.bytes.get()));
    }
}

fn shared_part(bytes: usize) -> usize {
    bytes.saturating_sub(CONNECTION_BYTES_FREE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_bounded_in_count_and_bytes() {
        let cx = Context::from_waker(Waker::noop());
        let permits = Permits::new(Rc::new(Budget::new(usize::MAX)));
        assert!((0..CONNECTION_REQUESTS_MAX).all(|_| permits.acquire(4096, &cx)));
        assert!(!permits.acquire(0, &cx));
        permits.release(4096);
        assert!(permits.acquire(REQUEST_BYTES_MAX, &cx));
        assert!(!permits.acquire(REQUEST_BYTES_MAX, &cx));
    }

    #[test]
    fn greedy_connections_leave_others_their_share() {
        let cx = Context::from_waker(Waker::noop());
        let budget = Rc::new(Budget::new(4 * REQUEST_BYTES_MAX));
        let greedy: Vec<_> = (0..64)
            .map(|_| Permits::new(Rc::clone(&budget)))
            .take_while(|permits| permits.acquire(REQUEST_BYTES_MAX, &cx))
            .collect();
        assert!(greedy.len() < 64, "the server's budget ends it");
        let modest = Permits::new(Rc::clone(&budget));
        assert!(modest.acquire(CONNECTION_BYTES_FREE, &cx));
        let late = Permits::new(Rc::clone(&budget));
        assert!(!late.acquire(REQUEST_BYTES_MAX, &cx));
        assert!(late.contended());
        drop(greedy);
        assert!(!late.contended());
        assert!(late.acquire(REQUEST_BYTES_MAX, &cx));
        drop((modest, late));
        assert_eq!(budget.used.get(), 0);
    }
}
