//! Which slots should move between disks so that all are filled alike.
//!
//! The plan counts slots by volume and disk; the head of a volume picks the segments. It moves no
//! more than the minimum: disks that are too full give what is too much, disks that are too empty
//! get what they lack, and whatever one side needs beyond the other is taken from, or given to,
//! those next in line.

use std::collections::BTreeMap;

use crate::id::{DiskId, VolumeId};
use crate::shard::domain::{Domains, Level};

/// A disk and its fill.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// The disk.
    pub id: DiskId,
    /// Its failure domains.
    pub domains: Domains,
    /// All its slots.
    pub slots: u64,
    /// Slots in use.
    pub used: u64,
    /// It is up and takes slots. What is on others is moved away.
    pub open: bool,
}

/// What a volume has on the disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// The volume.
    pub id: VolumeId,
    /// The level of its failure domains.
    pub level: Level,
    /// Its segments. Each has one slot at most in a domain.
    pub segments: u64,
    /// Its slots by disk.
    pub slots: Vec<(DiskId, u64)>,
}

/// Slots of a volume that should move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shift {
    /// The volume.
    pub volume: VolumeId,
    /// From this disk
    pub from: DiskId,
    /// … to this one.
    pub to: DiskId,
    /// How many.
    pub slots: u64,
}

/// What should move.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The moves, each between two disks.
    pub shifts: Vec<Shift>,
    /// Slots that should move too, but found no disk that takes them: there is no room, or all
    /// segments have a slot in its domain.
    pub left: u64,
}

/// How much a disk gives and gets.
#[derive(Debug, Clone, Copy, Default)]
struct Quota {
    give: u64,
    get: u64,
}

/// The shifts after which the fill of each open disk differs from that of all by `tolerance_percent` of it at
/// most, and the others are empty. Nothing if that is so.
///
/// Who plans again whenever it is not so should plan with less tolerance than he looks with.
pub fn rebalance(disks: &[Disk], volumes: &[Volume], tolerance_percent: u32) -> Plan {
    let mut shifter = Shifter::new(disks, volumes);
    let quotas = shifter.quotas(u64::from(tolerance_percent.min(100)));
    shifter.shift(quotas)
}

/// Slots beyond this count as this, so that no product of sums overflows.
const MOST: u64 = 1 << 40;

struct Shifter<'a> {
    disks: Vec<Disk>,
    volumes: &'a [Volume],
    /// By disk: its volumes, with the slots of each that may still move.
    on: Vec<Vec<(usize, u64)>>,
    /// By volume and number of a domain of its level: slots there.
    there: Vec<BTreeMap<u32, u64>>,
}

impl<'a> Shifter<'a> {
    fn new(disks: &'a [Disk], volumes: &'a [Volume]) -> Self {
        let index: BTreeMap<DiskId, usize> = (0..).zip(disks).map(|(at, d)| (d.id, at)).collect();
        let mut on = vec![Vec::new(); disks.len()];
        let mut there = vec![BTreeMap::new(); volumes.len()];
        for (number, volume) in volumes.iter().enumerate() {
            for (disk, slots) in &volume.slots {
                let Some(at) = index.get(disk).copied() else { continue };
                let slots = (*slots).min(MOST);
                on[at].push((number, slots));
                let domain = disks[at].domains.at(volume.level);
                *there[number].entry(domain).or_default() += slots;
            }
        }
        for on in &mut on {
            on.sort_by_key(|(number, slots)| (std::cmp::Reverse(*slots), *number));
        }
        let bounded =
            |disk: &Disk| Disk { slots: disk.slots.min(MOST), used: disk.used.min(MOST), ..*disk };
        Self { disks: disks.iter().map(bounded).collect(), volumes, on, there }
    }

    fn quotas(&self, tolerance: u64) -> Vec<Quota> {
        let movable = |at: usize| self.on[at].iter().map(|(_, slots)| slots).sum::<u64>();
        let open = || (0..self.disks.len()).filter(|at| self.disks[*at].open);
        let slots: u64 = open().map(|at| self.disks[at].slots).sum();
        let mut quotas = vec![Quota::default(); self.disks.len()];
        if slots == 0 {
            return quotas;
        }
        let mut used: u64 = open().map(|at| self.disks[at].used).sum();
        for at in (0..self.disks.len()).filter(|at| !self.disks[*at].open) {
            quotas[at].give = movable(at);
            used += quotas[at].give;
        }
        // A disk's part, in hundredths of a slot, and its bounds in slots.
        let part = |at: usize, percent: u64| {
            let product = u128::from(used) * u128::from(self.disks[at].slots) * u128::from(percent);
            let per_cent = u128::from(slots) * 100;
            let whole = |slots: u128| u64::try_from(slots).unwrap_or(u64::MAX);
            (whole(product / per_cent), whole(product.div_ceil(per_cent)))
        };
        let (mut gives, mut gets): (u64, u64) = (quotas.iter().map(|q| q.give).sum(), 0);
        for at in open() {
            let most = part(at, 100 + tolerance).0.max(part(at, 100).1).min(self.disks[at].slots);
            let least = part(at, 100 - tolerance).1.min(part(at, 100).0);
            quotas[at].give = self.disks[at].used.saturating_sub(most).min(movable(at));
            quotas[at].get = least.saturating_sub(self.disks[at].used);
            gives += quotas[at].give;
            gets += quotas[at].get;
        }
        let fill = |at: &usize| {
            (u128::from(self.disks[*at].used) << 32) / u128::from(self.disks[*at].slots.max(1))
        };
        let mut by_fill: Vec<usize> = open().collect();
        by_fill.sort_by_key(fill);
        // Up to the average first, and only then up to the bounds.
        for (upper, lower) in [(100, 100), (100 + tolerance, 100 - tolerance)] {
            for at in &by_fill {
                let quota = &mut quotas[*at];
                let most = part(*at, upper).0.max(part(*at, 100).1).min(self.disks[*at].slots);
                let room = most.saturating_sub(self.disks[*at].used + quota.get);
                let more = room.min(gives.saturating_sub(gets));
                quota.get += more;
                gets += more;
            }
            for at in by_fill.iter().rev() {
                let quota = &mut quotas[*at];
                let least = part(*at, lower).1.min(part(*at, 100).0);
                let spare = self.disks[*at].used.saturating_sub(least).min(movable(*at));
                let more = spare.saturating_sub(quota.give).min(gets.saturating_sub(gives));
                quota.give += more;
                gives += more;
            }
        }
        quotas
    }

    fn shift(&mut self, mut quotas: Vec<Quota>) -> Plan {
        let mut plan = Plan::default();
        self.shift_by(&mut quotas, &mut plan.shifts);
        // To empty a disk matters more than balance.
        let mut came: BTreeMap<DiskId, u64> = BTreeMap::new();
        for shift in &plan.shifts {
            *came.entry(shift.to).or_default() += shift.slots;
        }
        for (quota, disk) in quotas.iter_mut().zip(&self.disks).filter(|(_, disk)| disk.open) {
            plan.left += quota.give;
            let came = came.get(&disk.id).copied().unwrap_or(0);
            *quota = Quota { give: 0, get: disk.slots.saturating_sub(disk.used + came) };
        }
        if quotas.iter().any(|quota| quota.give > 0) {
            self.shift_by(&mut quotas, &mut plan.shifts);
        }
        plan.left += quotas.iter().map(|quota| quota.give).sum::<u64>();
        plan
    }

    /// Shifts as much as quotas and volumes allow, and takes it off the quotas.
    fn shift_by(&mut self, quotas: &mut [Quota], shifts: &mut Vec<Shift>) {
        let mut givers: Vec<usize> = (0..quotas.len()).filter(|at| quotas[*at].give > 0).collect();
        givers.sort_by_key(|at| (self.disks[*at].open, std::cmp::Reverse(quotas[*at].give)));
        for from in givers {
            // Near ones first: within a node nothing crosses the network, and within a rack
            // the segments stay spread over the racks as they are.
            let far = |to: usize| {
                let (a, b) = (self.disks[from].domains, self.disks[to].domains);
                (a.node != b.node, a.rack != b.rack)
            };
            let mut takers: Vec<usize> =
                (0..quotas.len()).filter(|to| *to != from && quotas[*to].get > 0).collect();
            takers.sort_by_key(|to| (far(*to), std::cmp::Reverse(quotas[*to].get)));
            for to in takers {
                if quotas[from].give == 0 {
                    break;
                }
                let room = quotas[from].give.min(quotas[to].get);
                let moved = self.shift_between(from, to, room, shifts);
                quotas[from].give -= moved;
                quotas[to].get -= moved;
            }
        }
    }

    /// Moves up to `room` slots, of the volumes that have most on the disk first; how many.
    fn shift_between(&mut self, from: usize, to: usize, room: u64, shifts: &mut Vec<Shift>) -> u64 {
        let mut moved = 0;
        for position in 0..self.on[from].len() {
            if moved == room {
                break;
            }
            let (number, slots) = self.on[from][position];
            let volume = &self.volumes[number];
            let domain = |at: usize| self.disks[at].domains.at(volume.level);
            let there = self.there[number].get(&domain(to)).copied().unwrap_or(0);
            // A segment that has a slot in that domain cannot have another one.
            let near = domain(from) == domain(to);
            let bearable = if near { slots } else { volume.segments.saturating_sub(there) };
            let count = slots.min(room - moved).min(bearable);
            if count == 0 {
                continue;
            }
            self.on[from][position].1 -= count;
            *self.there[number].entry(domain(from)).or_default() -= count;
            *self.there[number].entry(domain(to)).or_default() += count;
            moved += count;
            let (from, to) = (self.disks[from].id, self.disks[to].id);
            shifts.push(Shift { volume: volume.id, from, to, slots: count });
        }
        moved
    }
}
