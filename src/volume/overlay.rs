//! The overlay: mappings newer than the index, sorted by block, in memory.
//!
//! Invariants: extents do not overlap, none is empty, and a data extent stays within one segment
//! and is contiguous there. `len()` bounds the memory.

use std::collections::BTreeMap;

use crate::segment::BlockAddr;

/// What a run of logical blocks maps to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Nothing: reads as zeroes, not allocated.
    Hole,
    /// Zeroes that count as allocated.
    Zero,
    /// Consecutive blocks from this address on.
    Data(BlockAddr),
}

impl Target {
    /// The target `n` blocks further on.
    #[must_use]
    pub fn plus(self, n: u64) -> Self {
        match self {
            Self::Data(addr) => {
                Self::Data(addr.plus(u32::try_from(n).expect("an extent lies in one segment")))
            }
            other => other,
        }
    }
}

/// A run of logical blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// First logical block.
    pub lba: u64,
    /// Blocks, not zero.
    pub len: u64,
    /// What it maps to.
    pub target: Target,
}

impl Extent {
    fn end(&self) -> u64 {
        self.lba + self.len
    }

    /// The part of the extent within `lba .. end`, if any.
    pub fn clip(&self, lba: u64, end: u64) -> Option<Self> {
        let from = self.lba.max(lba);
        let to = self.end().min(end);
        (from < to).then(|| Self {
            lba: from,
            len: to - from,
            target: self.target.plus(from - self.lba),
        })
    }
}

/// Whether `next` is what follows `len` blocks of `target`.
pub(super) fn continues(target: Target, len: u64, next: Target) -> bool {
    match (target, next) {
        (Target::Data(a), Target::Data(b)) => {
            a.segment == b.segment && u64::from(a.block) + len == u64::from(b.block)
        }
        (a, b) => a == b,
    }
}

/// Sorted, disjoint extents.
#[derive(Debug, Clone, Default)]
pub struct Overlay {
    map: BTreeMap<u64, (u64, Target)>,
}

impl Overlay {
    /// Number of extents.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether it maps nothing.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Maps `extent`, calling `replaced` with each part that was mapped here before.
    pub fn insert(&mut self, extent: Extent, mut replaced: impl FnMut(Extent)) {
        if extent.len == 0 {
            return;
        }
        let (lba, end) = (extent.lba, extent.end());
        if let Some((&start, &(len, target))) = self.map.range(..lba).next_back() {
            let old = Extent { lba: start, len, target };
            if let Some(part) = old.clip(lba, end) {
                replaced(part);
                self.map.insert(start, (lba - start, target));
                if let Some(tail) = old.clip(end, u64::MAX) {
                    self.map.insert(tail.lba, (tail.len, tail.target));
                }
            }
        }
        while let Some((&start, &(len, target))) = self.map.range(lba..end).next() {
            let old = Extent { lba: start, len, target };
            self.map.remove(&start);
            if let Some(part) = old.clip(lba, end) {
                replaced(part);
            }
            if let Some(tail) = old.clip(end, u64::MAX) {
                self.map.insert(tail.lba, (tail.len, tail.target));
            }
        }
        self.insert_merged(extent);
    }

    /// Inserts into a gap, joined with the extent before it where the two continue each other.
    fn insert_merged(&mut self, extent: Extent) {
        let before = self.map.range_mut(..extent.lba).next_back();
        if let Some((&start, (len, target))) = before
            && start + *len == extent.lba
            && continues(*target, *len, extent.target)
        {
            *len += extent.len;
        } else {
            self.map.insert(extent.lba, (extent.len, extent.target));
        }
    }

    /// The extents that meet `lba .. lba + len`, clipped to it, in order.
    pub fn range(&self, lba: u64, len: u64) -> impl Iterator<Item = Extent> + '_ {
        let end = lba + len;
        let first = self.map.range(..lba).next_back().map_or(lba, |(start, _)| *start);
        self.map
            .range(first..end)
            .map(|(&lba, &(len, target))| Extent { lba, len, target })
            .filter_map(move |extent| extent.clip(lba, end))
    }

    /// All extents in order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.map.iter().map(|(&lba, &(len, target))| Extent { lba, len, target })
    }

    /// Splits `lba .. lba + len` into what is mapped here and gaps: calls `mapped` or `gap`.
    pub fn split(
        &self,
        lba: u64,
        len: u64,
        mut mapped: impl FnMut(Extent),
        mut gap: impl FnMut(u64, u64),
    ) {
        let mut at = lba;
        for extent in self.range(lba, len) {
            if extent.lba > at {
                gap(at, extent.lba - at);
            }
            at = extent.end();
            mapped(extent);
        }
        if at < lba + len {
            gap(at, lba + len - at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::SegmentId;
    use proptest::prelude::*;

    fn target() -> impl Strategy<Value = Target> {
        prop_oneof![
            Just(Target::Hole),
            Just(Target::Zero),
            (0u64..3, 0u32..50).prop_map(|(s, block)| {
                Target::Data(BlockAddr { segment: SegmentId(s), block })
            }),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_an_array(ops in prop::collection::vec((0u64..60, 1u64..20, target()), 1..60)) {
            let mut overlay = Overlay::default();
            let mut model: Vec<Option<Target>> = vec![None; 100];
            for (lba, len, target) in ops {
                let mut replaced = vec![];
                overlay.insert(Extent { lba, len, target }, |e| replaced.push(e));
                let mut seen = vec![None; 100];
                for e in replaced {
                    for i in 0..e.len {
                        seen[usize::try_from(e.lba + i).unwrap()] = Some(e.target.plus(i));
                    }
                }
                for i in 0..100 {
                    let inside = (lba..lba + len).contains(&(i as u64));
                    prop_assert_eq!(seen[i], if inside { model[i] } else { None });
                    if inside {
                        model[i] = Some(target.plus(i as u64 - lba));
                    }
                }
                let mut flat = vec![None; 100];
                let mut end = 0;
                for e in overlay.iter() {
                    prop_assert!(e.len > 0 && e.lba >= end, "disjoint and sorted");
                    end = e.lba + e.len;
                    for i in 0..e.len {
                        flat[usize::try_from(e.lba + i).unwrap()] = Some(e.target.plus(i));
                    }
                }
                prop_assert_eq!(&flat, &model);
                let (mut mapped, mut gaps) = (0, 0);
                overlay.split(10, 50, |e| mapped += e.len, |_, len| gaps += len);
                prop_assert_eq!(usize::try_from(mapped).unwrap(), model[10..60].iter().flatten().count());
                prop_assert_eq!(mapped + gaps, 50);
            }
        }
    }
}
