//! A lookup in an index, a walk of it and a merge into it, with pages of arbitrary bytes that
//! refer to each other in any way: an error or an answer of the right length, in bounded time.
#![no_main]

use std::cell::Cell;

use bytes::Bytes;
use futures_util::FutureExt;
use libfuzzer_sys::fuzz_target;
use sds::id::{BLOCK_SIZE, SegmentId};
use sds::segment::BlockAddr;
use sds::volume::index::{
    Malformed, PageSink, Pages, Relocate, Tree, decode, lookup, merge, page_entry,
};
use sds::volume::overlay::{Extent, Target};

/// Pages that may be loaded in one run: what refers to itself would go on for ever otherwise.
const LOADS_MAX: u32 = 4000;

#[derive(Debug)]
enum Problem {
    Malformed,
    Enough,
}

impl From<Malformed> for Problem {
    fn from(_: Malformed) -> Self {
        Self::Malformed
    }
}

/// What is stored goes to a segment that no page of the input can name: an address is written once.
const STORED: SegmentId = SegmentId(1 << 20);

struct Arbitrary {
    pages: Vec<Bytes>,
    stored: Vec<Bytes>,
    loads: Cell<u32>,
}

impl Arbitrary {
    /// Pages of 64 entries each, repeated: small inputs make whole pages. Each entry is made of
    /// five bytes: what it is, and where it points to.
    fn new(data: &[u8]) -> Self {
        let pages = data.chunks(5 * 64).map(|chunk| {
            let mut page = Vec::with_capacity(BLOCK_SIZE);
            while page.len() < BLOCK_SIZE {
                for entry in chunk.chunks(5).take((BLOCK_SIZE - page.len()) / 8) {
                    let at = |i: usize| entry.get(i).copied().unwrap_or(0);
                    let addr = BlockAddr {
                        segment: SegmentId(u64::from(at(3))),
                        block: u32::from(at(1)) | u32::from(at(2)) << 8,
                    };
                    let bits = match at(0) {
                        0..100 => page_entry(addr),
                        100..150 => 0,
                        150..200 => 2,
                        other => u64::from(other) << 56 | u64::from(at(4)),
                    };
                    page.extend_from_slice(&bits.to_le_bytes());
                }
            }
            Bytes::from(page)
        });
        Self { pages: pages.collect(), stored: Vec::new(), loads: Cell::new(0) }
    }
}

impl Pages for Arbitrary {
    type Error = Problem;
    async fn load(&self, addr: BlockAddr) -> Result<Bytes, Problem> {
        self.loads.set(self.loads.get() + 1);
        if self.loads.get() > LOADS_MAX {
            return Err(Problem::Enough);
        }
        if addr.segment == STORED {
            return Ok(self.stored[addr.block as usize].clone());
        }
        Ok(self.pages[addr.block as usize % self.pages.len()].clone())
    }
}

impl PageSink for Arbitrary {
    async fn store(&mut self, _: u8, _: u64, page: Bytes) -> Result<BlockAddr, Problem> {
        let block = u32::try_from(self.stored.len()).expect("few pages");
        self.stored.push(page);
        Ok(BlockAddr { segment: STORED, block })
    }
}

fn now<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("memory never waits")
}

fuzz_target!(|data: &[u8]| {
    let Some((head, rest)) = data.split_first_chunk::<8>() else { return };
    if rest.is_empty() || rest.len() > 1 << 16 {
        return;
    }
    let mut pages = Arbitrary::new(rest);
    let height = 1 + head[0] % 6;
    let root = page_entry(BlockAddr { segment: SegmentId(1), block: head[1].into() });
    let tree = Tree { root, height };
    let lba = u64::from_le_bytes([head[2], head[3], head[4], head[5], head[6], 0, 0, 0]);
    let lba = lba % (2 * tree.capacity());
    let len = 1 + u64::from(head[7]) * 17;
    if let Ok(extents) = now(lookup(&pages, tree, lba, len)) {
        let mut at = lba;
        for extent in &extents {
            assert_eq!(extent.lba, at, "extents follow each other");
            assert!(extent.len > 0);
            at += extent.len;
        }
        assert_eq!(at, lba + len, "every block has an answer");
    }
    pages.loads.set(0);
    let first = lba % tree.capacity();
    let len = len.min(tree.capacity() - first);
    let target = Target::Data(BlockAddr { segment: SegmentId(9), block: 1 });
    let extent = Extent { lba: first, len, target };
    let merged = now(merge(&mut pages, tree, tree.capacity(), &[extent], &Relocate::default()));
    let Ok((merged, _)) = merged else { return };
    assert!(decode(merged.root).is_some());
    pages.loads.set(0);
    if let Ok(found) = now(lookup(&pages, merged, first, len)) {
        assert_eq!(found, [extent], "what was merged is found");
    }
});
