//! Reserves: how many free slots each class must leave on a disk.
//!
//! Slots are given out in classes ([`SlotClass`]); a class may take a slot only while more are free
//! than the classes above it need. What a class frees, it frees for all, so the reserves must make
//! sure of one thing: *whatever was done before, there is room to do what frees space.* Nothing is
//! freed but by a checkpoint whose root was swapped, so that comes first:
//!
//! 1. **A checkpoint** writes `p` index pages and one table, to meta segments of `m + 1` copies. A
//!    slot of `b` blocks takes at least `b - 2` pages, so it opens at most
//!    `p / (b - 2) + CHECKPOINT_SLOTS_FIXED` of them, and in the smallest pool (`m + 1` disks) each
//!    takes a slot of every disk. Hence, with `c` the checkpoint's reserve,
//!
//!    ```text
//!    p <= pages_max(c, b) = (c - CHECKPOINT_SLOTS_FIXED) * (b - 2)
//!    ```
//!
//!    An overlay that would change more pages than that counts as full while space is short
//!    (`src/volume/space.rs`); the volumes of a pool share the bound, so what they hold back
//!    altogether fits too. One checkpoint of a pool at a time uses the reserve; it has its permit
//!    until its swap is done and the slots of the pages and the table that it replaces are free
//!    again, and gives back what it took when it fails. Where its swap takes longer than others can
//!    wait (the store or the disks of that volume are away), they get the permit with less behind
//!    it, and its own volume makes no other checkpoint. While space is short it also rewrites the
//!    pages of sparse meta segments, so that one volume's checkpoints take no more and more.
//! 2. **Trims** need a log segment, and so does everything that has its number in the log already
//!    (`TRIM_SLOTS_MIN`: one being filled, one that the checkpoint under way will free). When these
//!    are used up they wait for the next checkpoint, for which there is room by 1.
//! 3. **A pass of garbage collection** obtains the slots of all data segments that it will fill
//!    before it moves anything, and is cut to what it got; its moves are logged with the
//!    reserve of 2. One pass of a pool runs at a time, until its checkpoint has freed its victims,
//!    which are more slots than it filled (`src/volume/gc.rs`). So a pass that finds its reserve
//!    whole leaves it whole. A checkpoint that takes too long is not waited for by others: they
//!    are cut to what is left.
//! 4. **Repair** takes a slot for each shard that it builds elsewhere; the old one comes back after
//!    a checkpoint, or never, if its disk is lost. It may not use what garbage collection needs.
//! 5. **Clients** get what is left. Where garbage collection can gain nothing, they get "no space".

use super::SlotClass;
use crate::limits::{
    CHECKPOINT_SLOTS_FIXED, CHECKPOINT_SLOTS_MIN, CHECKPOINT_SLOTS_PERCENT, GC_SLOTS_MIN,
    GC_SLOTS_PERCENT, REPAIR_SLOTS_MIN, REPAIR_SLOTS_PERCENT, TRIM_SLOTS_MIN, TRIM_SLOTS_PERCENT,
};

/// Slots reserved of `slots`: `percent` of them, but at least `min`.
const fn share(slots: u32, percent: u32, min: u32) -> u32 {
    let part = slots / 100 * percent;
    if part > min { part } else { min }
}

/// Free slots that a request of this class must leave on a disk of `slots` slots.
pub const fn floor(class: SlotClass, slots: u32) -> u32 {
    let checkpoint = share(slots, CHECKPOINT_SLOTS_PERCENT, CHECKPOINT_SLOTS_MIN);
    let trim = share(slots, TRIM_SLOTS_PERCENT, TRIM_SLOTS_MIN);
    let gc = share(slots, GC_SLOTS_PERCENT, GC_SLOTS_MIN);
    let repair = share(slots, REPAIR_SLOTS_PERCENT, REPAIR_SLOTS_MIN);
    match class {
        SlotClass::Checkpoint => 0,
        SlotClass::Trim => checkpoint,
        SlotClass::Gc => checkpoint + trim,
        SlotClass::Repair => checkpoint + trim + gc,
        SlotClass::Client => checkpoint + trim + gc + repair,
    }
}

/// Fewest slots of a disk that a pool takes in: as many for clients as are reserved.
pub const SLOTS_MIN: u32 =
    2 * (CHECKPOINT_SLOTS_MIN + TRIM_SLOTS_MIN + GC_SLOTS_MIN + REPAIR_SLOTS_MIN);

const _: () = assert!(SLOTS_MIN >= 2 * floor(SlotClass::Client, SLOTS_MIN));

/// Index pages that a checkpoint may write with the reserve of a disk of `slots` slots of
/// `slot_blocks` blocks.
pub const fn pages_max(slots: u32, slot_blocks: u32) -> u64 {
    let reserve = floor(SlotClass::Trim, slots);
    (reserve - CHECKPOINT_SLOTS_FIXED) as u64 * slot_blocks.saturating_sub(2) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use SlotClass::{Checkpoint, Client, Gc, Repair, Trim};

    #[test]
    fn each_class_leaves_more_than_the_one_above_it() {
        for slots in (8..300).chain([1024, 4096, 1 << 20]) {
            let floors = [Checkpoint, Trim, Gc, Repair, Client].map(|class| floor(class, slots));
            assert!(floors.is_sorted_by(|a, b| a < b), "{slots}: {floors:?}");
            if slots >= SLOTS_MIN {
                assert!(floors[4] * 2 <= slots, "{slots}: clients get half at least");
            }
        }
    }
}
