//! The index: a copy-on-write radix tree of 4 KiB pages from logical block to place.
//!
//! A page holds 512 entries of 8 bytes. A leaf's entry maps one block; an entry of a page at level
//! `l` covers `512^l` blocks. Entry: 56 bits of address, 8 bits of flags; 0 is a hole, the flag
//! ZERO alone stands for zeroes that count as allocated (at any level, for the whole subtree).
//!
//! Pages are immutable once written; [`merge`] writes changed pages in post-order, so that only
//! one path of the tree is in memory at a time, and reports how many references each segment
//! gained and lost. It knows nothing of where pages are stored: [`Pages`] does.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;

use super::overlay::{Extent, Target};
use crate::buffer::AlignedBuf;
use crate::id::{BLOCK_SIZE, SegmentId};
use crate::segment::BlockAddr;

/// Entries of a page.
pub const FANOUT: u64 = 512;
const FANOUT_BITS: u32 = 9;
const FLAG_DATA: u64 = 1;
const FLAG_ZERO: u64 = 2;

/// Root of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tree {
    /// Entry that refers to the root page, or a hole or zeroes.
    pub root: u64,
    /// Levels of pages; the root's level is `height - 1`.
    pub height: u8,
}

impl Tree {
    /// An empty index for `blocks` logical blocks.
    pub fn empty(blocks: u64) -> Self {
        Self { root: 0, height: height_for(blocks) }
    }

    /// Logical blocks that the tree can map.
    pub fn capacity(&self) -> u64 {
        1 << (FANOUT_BITS * u32::from(self.height))
    }
}

/// Levels needed for `blocks` logical blocks.
pub fn height_for(blocks: u64) -> u8 {
    let mut height = 1;
    while height < 6 && (1u64 << (FANOUT_BITS * u32::from(height))) < blocks {
        height += 1;
    }
    height
}

/// The entry for a target.
fn encode(target: Target) -> u64 {
    match target {
        Target::Hole => 0,
        Target::Zero => FLAG_ZERO,
        Target::Data(addr) => (addr.pack() << 8) | FLAG_DATA,
    }
}

/// The target of an entry; none for an entry that no version wrote.
pub fn decode(entry: u64) -> Option<Target> {
    match (entry & 0xff, entry >> 8) {
        (0, 0) => Some(Target::Hole),
        (FLAG_ZERO, 0) => Some(Target::Zero),
        (FLAG_DATA, addr) => Some(Target::Data(BlockAddr::unpack(addr))),
        _ => None,
    }
}

/// Entry of a page at `addr`.
pub fn page_entry(addr: BlockAddr) -> u64 {
    encode(Target::Data(addr))
}

/// Where pages come from and go to.
pub trait Pages {
    /// Why a page cannot be had.
    type Error: From<Malformed>;
    /// The 4 KiB of the page at `addr`.
    fn load(&self, addr: BlockAddr) -> impl Future<Output = Result<Bytes, Self::Error>>;
}

/// Where a merge writes pages.
pub trait PageSink: Pages {
    /// Stores a page; it is durable when the sink is flushed, not before.
    fn store(
        &mut self,
        level: u8,
        number: u64,
        page: Bytes,
    ) -> impl Future<Output = Result<BlockAddr, Self::Error>>;
}

/// A page or an entry that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the index has an impossible entry {0:#x}")]
pub struct Malformed(pub u64);

fn entry_of(page: &[u8], index: usize) -> u64 {
    let at = index * 8;
    u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"))
}

fn index_in(lba: u64, level: u8) -> usize {
    let index = (lba >> (FANOUT_BITS * u32::from(level))) & (FANOUT - 1);
    usize::try_from(index).expect("below 512")
}

/// What `lba .. lba + len` maps to: extents in order, neighbours joined, holes included.
///
/// # Errors
/// What [`Pages::load`] reports, or [`Malformed`].
pub async fn lookup<P: Pages>(
    pages: &P,
    tree: Tree,
    lba: u64,
    len: u64,
) -> Result<Vec<Extent>, P::Error> {
    let mut out: Vec<Extent> = Vec::new();
    let end = lba + len;
    let mut at = lba;
    while at < end {
        let mut entry = if at >= tree.capacity() { 0 } else { tree.root };
        let mut level = tree.height;
        while level > 0 {
            match decode(entry).ok_or(Malformed(entry))? {
                Target::Data(addr) => {
                    let page = pages.load(addr).await?;
                    level -= 1;
                    if level == 0 {
                        at = read_leaf(&page, at, end, &mut out)?;
                        break;
                    }
                    entry = entry_of(&page, index_in(at, level));
                }
                target => {
                    let span = 1u64 << (FANOUT_BITS * u32::from(level));
                    let next = if at >= tree.capacity() { end } else { (at | (span - 1)) + 1 };
                    push(&mut out, Extent { lba: at, len: next.min(end) - at, target });
                    at = next;
                    break;
                }
            }
        }
    }
    Ok(out)
}

fn read_leaf(page: &[u8], at: u64, end: u64, out: &mut Vec<Extent>) -> Result<u64, Malformed> {
    let leaf_end = ((at | (FANOUT - 1)) + 1).min(end);
    for lba in at..leaf_end {
        let entry = entry_of(page, index_in(lba, 0));
        let target = decode(entry).ok_or(Malformed(entry))?;
        push(out, Extent { lba, len: 1, target });
    }
    Ok(leaf_end)
}

/// Appends an extent, joined with the last where it continues it.
pub fn push(out: &mut Vec<Extent>, extent: Extent) {
    if let Some(last) = out.last_mut()
        && last.lba + last.len == extent.lba
        && super::overlay::continues(last.target, last.len, extent.target)
    {
        last.len += extent.len;
    } else {
        out.push(extent);
    }
}

/// Changes of the number of references to each segment.
pub type Deltas = BTreeMap<SegmentId, i64>;

/// Pages that a merge rewrites although nothing in them changed, because the segments they lie in
/// are to be emptied.
#[derive(Debug, Default)]
pub struct Relocate {
    /// Segments to be emptied.
    pub segments: BTreeSet<SegmentId>,
    /// (level, number) of the pages in them, and of all pages above those.
    visit: BTreeSet<(u8, u64)>,
}

impl Relocate {
    /// Adds a page that lies in one of the segments.
    pub fn add(&mut self, level: u8, number: u64, height: u8) {
        let mut number = number;
        for level in level..height {
            self.visit.insert((level, number));
            number >>= FANOUT_BITS;
        }
    }
}

/// A merge under way.
struct Merge<'a, S> {
    sink: &'a mut S,
    relocate: &'a Relocate,
    deltas: Deltas,
}

/// Merges `extents` (sorted, disjoint) into `tree` and gives the new tree and what each segment's
/// references changed by: data and log segments by block, meta segments by page.
///
/// # Errors
/// What the sink reports, or [`Malformed`]; the old tree stays valid.
pub async fn merge<S: PageSink>(
    sink: &mut S,
    tree: Tree,
    blocks: u64,
    extents: &[Extent],
    relocate: &Relocate,
) -> Result<(Tree, Deltas), S::Error> {
    let mut merge = Merge { sink, relocate, deltas: Deltas::new() };
    let mut tree = tree;
    while tree.height < height_for(blocks) {
        if tree.root != 0 {
            let mut page = AlignedBuf::zeroed(BLOCK_SIZE);
            page[..8].copy_from_slice(&tree.root.to_le_bytes());
            tree.root = merge.write(tree.height, 0, page.freeze()).await?;
        }
        tree.height += 1;
    }
    let root = merge.node(tree.height - 1, 0, tree.root, extents).await?;
    merge.deltas.retain(|_, delta| *delta != 0);
    Ok((Tree { root, height: tree.height }, merge.deltas))
}

type NodeFuture<'a, E> = Pin<Box<dyn Future<Output = Result<u64, E>> + 'a>>;

impl<S: PageSink> Merge<'_, S> {
    fn count(&mut self, entry: u64, by: i64) -> Result<(), Malformed> {
        if let Target::Data(addr) = decode(entry).ok_or(Malformed(entry))? {
            *self.deltas.entry(addr.segment).or_default() += by;
        }
        Ok(())
    }

    async fn write(&mut self, level: u8, number: u64, page: Bytes) -> Result<u64, S::Error> {
        let entry = page_entry(self.sink.store(level, number, page).await?);
        self.count(entry, 1)?;
        Ok(entry)
    }

    /// The new entry for the page `number` of `level`, whose entry was `old`.
    fn node<'b>(
        &'b mut self,
        level: u8,
        number: u64,
        old: u64,
        extents: &'b [Extent],
    ) -> NodeFuture<'b, S::Error> {
        Box::pin(async move {
            let shift = FANOUT_BITS * (u32::from(level) + 1);
            let base = number << shift;
            if let [whole] = extents
                && whole.lba <= base
                && whole.lba + whole.len >= base + (1 << shift)
                && !matches!(whole.target, Target::Data(_))
            {
                self.forget(level, old).await?;
                return Ok(encode(whole.target));
            }
            let mut page = AlignedBuf::new(BLOCK_SIZE);
            let mut moved = false;
            match decode(old).ok_or(Malformed(old))? {
                Target::Data(addr) => {
                    page.copy_from_slice(&self.sink.load(addr).await?);
                    moved = self.relocate.segments.contains(&addr.segment);
                }
                filler => {
                    let entry = encode(filler).to_le_bytes();
                    page.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&entry));
                }
            }
            let changed = if level == 0 {
                self.leaf(base, &mut page, extents)?
            } else {
                self.children(level, number, &mut page, extents).await?
            };
            if !changed && !moved {
                return Ok(old);
            }
            self.count(old, -1)?;
            let uniform = entry_of(&page, 0);
            let blank = uniform == 0 || uniform == FLAG_ZERO;
            if blank && page.chunks_exact(8).all(|chunk| chunk == uniform.to_le_bytes()) {
                return Ok(uniform);
            }
            self.write(level, number, page.freeze()).await
        })
    }

    fn leaf(&mut self, base: u64, page: &mut [u8], extents: &[Extent]) -> Result<bool, Malformed> {
        let mut changed = false;
        for extent in extents {
            let Some(part) = extent.clip(base, base + FANOUT) else { continue };
            for i in 0..part.len {
                let at = index_in(part.lba + i, 0);
                let (old, new) = (entry_of(page, at), encode(part.target.plus(i)));
                if old != new {
                    self.count(old, -1)?;
                    self.count(new, 1)?;
                    page[at * 8..at * 8 + 8].copy_from_slice(&new.to_le_bytes());
                    changed = true;
                }
            }
        }
        Ok(changed)
    }

    async fn children(
        &mut self,
        level: u8,
        number: u64,
        page: &mut [u8],
        extents: &[Extent],
    ) -> Result<bool, S::Error> {
        let shift = FANOUT_BITS * u32::from(level);
        let mut changed = false;
        let mut from = 0;
        for index in 0..FANOUT {
            let child = (number << FANOUT_BITS) | index;
            let (base, end) = (child << shift, (child + 1) << shift);
            while from < extents.len() && extents[from].lba + extents[from].len <= base {
                from += 1;
            }
            let count = extents[from..].iter().take_while(|extent| extent.lba < end).count();
            if count == 0 && !self.relocate.visit.contains(&(level - 1, child)) {
                continue;
            }
            let at = usize::try_from(index).expect("below 512");
            let old = entry_of(page, at);
            let new = self.node(level - 1, child, old, &extents[from..from + count]).await?;
            if new != old {
                page[at * 8..at * 8 + 8].copy_from_slice(&new.to_le_bytes());
                changed = true;
            }
        }
        Ok(changed)
    }

    /// Counts every reference below an entry away.
    fn forget(
        &mut self,
        level: u8,
        entry: u64,
    ) -> Pin<Box<dyn Future<Output = Result<(), S::Error>> + '_>> {
        Box::pin(async move {
            let Target::Data(addr) = decode(entry).ok_or(Malformed(entry))? else { return Ok(()) };
            let page = self.sink.load(addr).await?;
            for index in 0..BLOCK_SIZE / 8 {
                let child = entry_of(&page, index);
                if level == 0 {
                    self.count(child, -1)?;
                } else {
                    self.forget(level - 1, child).await?;
                }
            }
            self.count(entry, -1)?;
            Ok(())
        })
    }
}

/// Counts every reference of a tree from scratch: what the counters must equal.
///
/// # Errors
/// As [`lookup`].
pub async fn count_all<P: Pages>(pages: &P, tree: Tree) -> Result<Deltas, P::Error> {
    let mut deltas = Deltas::new();
    let mut stack = vec![(tree.height, tree.root)];
    while let Some((level, entry)) = stack.pop() {
        let Target::Data(addr) = decode(entry).ok_or(Malformed(entry))? else { continue };
        *deltas.entry(addr.segment).or_default() += 1;
        if level > 0 {
            let page = pages.load(addr).await?;
            stack.extend((0..BLOCK_SIZE / 8).map(|i| (level - 1, entry_of(&page, i))));
        }
    }
    Ok(deltas)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::overlay::Overlay;
    use proptest::prelude::*;
    use std::convert::Infallible;

    #[derive(Default)]
    struct Memory(Vec<Bytes>);

    #[derive(Debug)]
    struct Bad;
    impl From<Malformed> for Bad {
        fn from(_: Malformed) -> Self {
            Self
        }
    }
    impl From<Infallible> for Bad {
        fn from(never: Infallible) -> Self {
            match never {}
        }
    }

    const META: SegmentId = SegmentId(1000);

    impl Pages for Memory {
        type Error = Bad;
        async fn load(&self, addr: BlockAddr) -> Result<Bytes, Bad> {
            assert_eq!(addr.segment, META);
            Ok(self.0[addr.block as usize].clone())
        }
    }
    impl PageSink for Memory {
        async fn store(&mut self, _: u8, _: u64, page: Bytes) -> Result<BlockAddr, Bad> {
            self.0.push(page);
            let block = u32::try_from(self.0.len() - 1).unwrap();
            Ok(BlockAddr { segment: META, block })
        }
    }

    fn target() -> impl Strategy<Value = Target> {
        prop_oneof![
            Just(Target::Hole),
            Just(Target::Zero),
            (0u64..3, 0u32..500).prop_map(|(s, block)| {
                Target::Data(BlockAddr { segment: SegmentId(s), block })
            }),
        ]
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    proptest! {
        #[test]
        fn merges_like_an_array(
            rounds in prop::collection::vec(
                prop::collection::vec((0u64..3000, 1u64..1800, target()), 1..8), 1..6)
        ) {
            run(async {
                let mut pages = Memory::default();
                let mut tree = Tree::empty(100);
                let mut model = vec![Target::Hole; 8000];
                let mut counts = Deltas::new();
                for round in rounds {
                    let mut overlay = Overlay::default();
                    for (lba, len, target) in round {
                        overlay.insert(Extent { lba, len, target }, |_| ());
                        for i in 0..len {
                            model[usize::try_from(lba + i).unwrap()] = target.plus(i);
                        }
                    }
                    let extents: Vec<_> = overlay.iter().collect();
                    let (new, deltas) =
                        merge(&mut pages, tree, 5000, &extents, &Relocate::default()).await.unwrap();
                    tree = new;
                    for (segment, delta) in deltas {
                        *counts.entry(segment).or_default() += delta;
                    }
                    counts.retain(|_, n| *n != 0);
                    let found = lookup(&pages, tree, 3, 6000).await.unwrap();
                    let mut at = 3;
                    for e in found {
                        assert_eq!(e.lba, at);
                        for i in 0..e.len {
                            assert_eq!(e.target.plus(i), model[usize::try_from(at + i).unwrap()]);
                        }
                        at += e.len;
                    }
                    assert_eq!(at, 6003);
                    assert_eq!(count_all(&pages, tree).await.unwrap(), counts, "counters never drift");
                }
                // Emptying the meta segment rewrites every page and changes no mapping.
                let mut relocate = Relocate { segments: [META].into(), ..Relocate::default() };
                for number in 0..16 {
                    relocate.add(0, number, tree.height);
                }
                let before = lookup(&pages, tree, 0, 8000).await.unwrap();
                let first_new = u32::try_from(pages.0.len()).unwrap();
                let (moved, _) = merge(&mut pages, tree, 5000, &[], &relocate).await.unwrap();
                assert_eq!(lookup(&pages, moved, 0, 8000).await.unwrap(), before);
                if let Some(Target::Data(root)) = decode(moved.root) {
                    assert!(root.block >= first_new);
                }
            });
        }
    }
}
