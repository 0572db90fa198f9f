//! What a pass of garbage collection will free, counted as it goes.
//!
//! A pass frees nothing before its end, and then much at once. Writes that were slowed by what is free
//! alone would go fast, then crawl, in turns. So what a pass has done its share of counts as gained
//! already, and is given back as a promise when the slots really come. Only one pass runs on the disks
//! of a node at a time, so there is one promise.
//!
//! Nobody opens a segment on a promise: it only says how much hurry there is.

use std::cell::Cell;

/// The promise of the pass that runs, if any does.
#[derive(Debug, Default)]
pub struct Promise {
    /// Slots on each disk that the pass frees beyond those that it takes.
    slots: Cell<f64>,
    /// Blocks that it moves, and that it has moved.
    to_move: Cell<u64>,
    moved: Cell<u64>,
}

impl Promise {
    /// A pass begins that is to move so many blocks and frees so many slots of each disk.
    pub fn begin(&self, slots: f64, to_move: u64) {
        self.slots.set(slots);
        self.to_move.set(to_move);
        self.moved.set(0);
    }

    /// The pass has moved more blocks.
    pub fn moved(&self, blocks: u64) {
        self.moved.set(self.moved.get().saturating_add(blocks));
    }

    /// The pass has ended: what it freed is free.
    pub fn end(&self) {
        self.begin(0.0, 0);
    }

    /// Slots of each disk that count as gained.
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    pub fn slots(&self) -> f64 {
        let all = self.to_move.get().max(1);
        self.slots.get() * self.moved.get().min(all) as f64 / all as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_grows_with_what_was_moved_and_ends_with_the_pass() {
        let promise = Promise::default();
        assert_eq!(promise.slots().to_bits(), 0.0_f64.to_bits());
        promise.begin(4.0, 100);
        promise.moved(50);
        assert!((promise.slots() - 2.0).abs() < 1e-9);
        promise.moved(80);
        assert!((promise.slots() - 4.0).abs() < 1e-9, "no more than was promised");
        promise.end();
        assert_eq!(promise.slots().to_bits(), 0.0_f64.to_bits());
    }
}
