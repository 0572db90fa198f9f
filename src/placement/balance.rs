//! How much each head should move so that all disks are filled alike.
//!
//! Nobody plans for all. Every head looks at the same figures, how many slots of each disk are in use, and moves
//! its own part of what a disk has too much: by as much as the slots in use there are its own. The parts of all
//! heads add up to the whole, so it does no harm that all move at once; and as figures are old by the time
//! that somebody acts on them, everybody moves half of his part and looks again.
//!
//! ```text
//! mean      = slots in use / slots                 of the disks that take part
//! deviation = slots in use - mean * slots          of a disk: too much if above zero
//! part      = deviation * own slots / slots in use - own slots that are about to be free
//! ```
//!
//! Only disks with too much give, and only those with too little get: nothing moves twice, and what moves is the
//! least that there is to move. It begins when a disk is off by more than [`START`] and ends when none is by
//! more than [`END`], so that what is written meanwhile does not set it going again. It ends surely: with each move the
//! sum of the squares of the deviations falls.

use std::collections::BTreeMap;

use crate::env::Env;
use crate::id::DiskId;

/// A disk, as a head sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// The disk.
    pub id: DiskId,
    /// All its slots.
    pub slots: u32,
    /// Slots in use.
    pub used: u32,
    /// Of them, the head's own.
    pub own: u32,
    /// Of these, the ones that hold what was moved or is not needed, and will be free.
    pub leaving: u32,
}

/// How far a disk may be off before anything moves, or until nothing does any more. The largest counts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// Part of what it should hold.
    of_mean: f64,
    /// Part of all its slots: where disks are all but empty, the differences are too.
    of_slots: f64,
    /// Slots.
    slots: f64,
}

/// Balance begins beyond this.
pub const START: Tolerance = Tolerance { of_mean: 0.08, of_slots: 0.005, slots: 1.25 };
/// While space is short, balance begins beyond this only: moves take slots before they give any back.
pub const URGENT: Tolerance = Tolerance { of_mean: 0.25, of_slots: 0.02, slots: 4.0 };
/// Balance ends within this.
pub const END: Tolerance = Tolerance { of_mean: 0.03, of_slots: 0.002, slots: 1.0 };

/// Slots in use of all, over all of them; none of nothing.
fn mean(fills: impl Iterator<Item = (u32, u32)>) -> Option<f64> {
    let (mut used, mut slots) = (0_u64, 0_u64);
    for (of_them, all) in fills {
        used += u64::from(of_them);
        slots += u64::from(all);
    }
    (slots > 0).then(|| used as f64 / slots as f64)
}

/// Whether disks with these slots in use, of so many each, are filled alike.
pub fn is_even(fills: impl Iterator<Item = (u32, u32)> + Clone, tolerance: Tolerance) -> bool {
    let Some(mean) = mean(fills.clone()) else { return true };
    let mut fills = fills;
    fills.all(|(used, slots)| {
        let (off, slots) = (f64::from(used) - mean * f64::from(slots), f64::from(slots));
        let Tolerance { of_mean, of_slots, slots: least } = tolerance;
        off.abs() <= (of_mean * mean * slots).max(of_slots * slots).max(least)
    })
}

/// What a head should move, in slots.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Part {
    /// From these disks.
    pub give: BTreeMap<DiskId, f64>,
    /// To these: as much as is given.
    pub get: BTreeMap<DiskId, f64>,
}

impl Part {
    /// The part of a head. Where the disks that are off by more than [`END`] have more too much than too little, or the
    /// other way round, those that are off by less make up for it.
    pub fn of(disks: &[Disk]) -> Self {
        let fills = disks.iter().map(|disk| (disk.used, disk.slots));
        let Some(mean) = mean(fills) else { return Self::default() };
        let off = |disk: &Disk| f64::from(disk.used) - mean * f64::from(disk.slots);
        let far = |disk: &Disk| {
            let slots = f64::from(disk.slots);
            off(disk).abs() > (END.of_mean * mean * slots).max(END.of_slots * slots).max(END.slots)
        };
        let sum = |sign: f64, wanted: bool| -> f64 {
            let of_them = disks.iter().filter(|disk| far(disk) == wanted);
            of_them.map(|disk| (sign * off(disk)).max(0.0)).sum()
        };
        let (over, under) = (sum(1.0, true), sum(-1.0, true));
        let all = over.max(under);
        // Of what those take or give that are off by less.
        let share =
            |far: f64, near: f64| if near > 0.0 { ((all - far) / near).min(1.0) } else { 0.0 };
        let (mild_over, mild_under) =
            (share(over, sum(1.0, false)), share(under, sum(-1.0, false)));
        let mut part = Self::default();
        let mut lacks = BTreeMap::new();
        for disk in disks {
            let off = off(disk);
            let mild = if off > 0.0 { mild_over } else { mild_under };
            let off = if far(disk) { off } else { off * mild };
            if off < 0.0 {
                lacks.insert(disk.id, -off);
            } else if off > 0.0 {
                let own = off * f64::from(disk.own) / f64::from(disk.used.max(1));
                let give = own - f64::from(disk.leaving);
                if give > 0.0 {
                    part.give.insert(disk.id, give);
                }
            }
        }
        let (gives, lacking) = (part.slots(), lacks.values().sum::<f64>());
        if gives > 0.0 && lacking > 0.0 {
            part.get = lacks.into_iter().map(|(id, lack)| (id, gives * lack / lacking)).collect();
        }
        part
    }

    /// Slots to be moved.
    pub fn slots(&self) -> f64 {
        self.give.values().sum()
    }

    /// What is to be moved before the figures are looked at again: half of it, and whole slots, by chance where
    /// there are few.
    pub fn round(&self, env: &Env) -> (BTreeMap<DiskId, u32>, BTreeMap<DiskId, u32>) {
        let half = |of: &BTreeMap<DiskId, f64>, least: f64| {
            let whole = |slots: f64| whole(slots / 2.0 + least, env);
            let counts = of.iter().map(|(id, slots)| (*id, whole(*slots)));
            counts.filter(|(_, count)| *count > 0).collect::<BTreeMap<_, _>>()
        };
        // A little room on each, so that those which suit a segment may take it.
        (half(&self.give, 0.0), half(&self.get, 0.5))
    }
}

/// A whole number that is `number` on average.
fn whole(number: f64, env: &Env) -> u32 {
    let floor = number.clamp(0.0, 1e9).floor();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped and whole")]
    let (below, rest) = (floor as u32, ((number - floor).clamp(0.0, 1.0) * 1e6) as u64);
    below + u32::from(env.chance(rest, 1_000_000))
}
