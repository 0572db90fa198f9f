//! What a pass of garbage collection will free, counted as it goes.
//!
//! A pass takes its slots before it begins, and frees nothing before its end, and then much at once.
//! Writes that were slowed by what is free alone would go fast, then crawl, in turns. So what it took
//! counts as free, and what it frees beyond that as gained as far as it has done its share; less what has
//! really come already. The promise ends with the pass. Only one pass runs on the disks
//! of a node at a time, so there is one promise.
//!
//! Nobody opens a segment on a promise: it only says how much hurry there is.

use std::cell::Cell;

/// The promise of the pass that runs, if any does.
#[derive(Debug, Default)]
pub struct Promise {
    /// Slots on each disk that the pass took, and that it frees.
    took: Cell<f64>,
    frees: Cell<f64>,
    /// Those of them that are free.
    came: Cell<f64>,
    /// Blocks that it moves, and that it has moved.
    to_move: Cell<u64>,
    moved: Cell<u64>,
}

impl Promise {
    /// A pass begins that took so many slots of each disk, frees so many and is to move so many blocks.
    pub fn begin(&self, took: f64, frees: f64, to_move: u64) {
        self.took.set(took);
        self.frees.set(frees);
        self.came.set(0.0);
        self.to_move.set(to_move);
        self.moved.set(0);
    }

    /// The pass has moved more blocks.
    pub fn moved(&self, blocks: u64) {
        self.moved.set(self.moved.get().saturating_add(blocks));
    }

    /// So many of the slots of each disk that the pass frees are free.
    pub fn came(&self, slots: f64) {
        self.came.set(self.came.get() + slots);
    }

    /// The pass has ended: what it freed is free.
    pub fn end(&self) {
        self.begin(0.0, 0.0, 0);
    }

    /// Slots of each disk that count as free besides those that are.
    #[expect(clippy::cast_precision_loss, reason = "a share")]
    pub fn slots(&self) -> f64 {
        let all = self.to_move.get().max(1);
        let share = self.moved.get().min(all) as f64 / all as f64;
        let promised = self.took.get() + (self.frees.get() - self.took.get()) * share;
        (promised - self.came.get()).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_grows_with_what_was_moved_and_ends_with_the_pass() {
        let promise = Promise::default();
        assert_eq!(promise.slots().to_bits(), 0.0_f64.to_bits());
        promise.begin(7.0, 11.0, 100);
        assert!((promise.slots() - 7.0).abs() < 1e-9, "what was taken comes back");
        promise.moved(50);
        assert!((promise.slots() - 9.0).abs() < 1e-9);
        promise.moved(80);
        assert!((promise.slots() - 11.0).abs() < 1e-9, "no more than was promised");
        promise.came(9.0);
        assert!((promise.slots() - 2.0).abs() < 1e-9, "less what has come");
        promise.end();
        assert_eq!(promise.slots().to_bits(), 0.0_f64.to_bits());
    }
}
