//! A volume in memory, for tests of exports: sparse, with switches that make it fail, fill up,
//! refuse writes or hold requests back. Knows no protocol.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use tokio::sync::watch;

use super::{BlockTarget, ExportDirectory, LocalFuture, MapExtent, TargetError};
use crate::buffer::AlignedBuf;
use crate::id::{BLOCK_BYTES, BLOCK_SIZE};

/// A sparse volume in memory.
pub struct MemoryTarget {
    size: Cell<u64>,
    read_only: Cell<bool>,
    blocks: RefCell<BTreeMap<u64, Box<[u8; BLOCK_SIZE]>>>,
    blocks_max: Cell<usize>,
    failure: RefCell<Option<TargetError>>,
    held: watch::Sender<bool>,
    running: Cell<usize>,
    running_max: Cell<usize>,
    flushes: Cell<usize>,
}

impl MemoryTarget {
    /// An empty volume of `size` bytes.
    pub fn new(size: u64) -> Self {
        Self {
            size: Cell::new(size),
            read_only: Cell::new(false),
            blocks: RefCell::default(),
            blocks_max: Cell::new(usize::MAX),
            failure: RefCell::new(None),
            held: watch::Sender::new(false),
            running: Cell::new(0),
            running_max: Cell::new(0),
            flushes: Cell::new(0),
        }
    }

    /// Changes the size, in bytes.
    pub fn set_size(&self, size: u64) {
        self.size.set(size);
    }

    /// Refuses writes, or takes them again.
    pub fn set_read_only(&self, read_only: bool) {
        self.read_only.set(read_only);
    }

    /// Blocks that may be allocated before writes fail with [`TargetError::NoSpace`].
    pub fn set_blocks_max(&self, blocks: usize) {
        self.blocks_max.set(blocks);
    }

    /// Every later call fails with this error; none ends that.
    pub fn set_failure(&self, failure: Option<TargetError>) {
        *self.failure.borrow_mut() = failure;
    }

    /// Holds reads, writes, zeroes and flushes back until it is called with `false`.
    pub fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    /// Most calls that ran at the same time.
    pub fn running_max(&self) -> usize {
        self.running_max.get()
    }

    /// Calls that run now.
    pub fn running(&self) -> usize {
        self.running.get()
    }

    /// Flushes that were asked for.
    pub fn flushes(&self) -> usize {
        self.flushes.get()
    }

    async fn start(&self) -> Result<Running<'_>, TargetError> {
        let running = Running::new(self);
        if *self.held.borrow() {
            let mut held = self.held.subscribe();
            let released = held.wait_for(|held| !held).await.is_ok();
            assert!(released, "the sender lives as long as the target");
        }
        match &*self.failure.borrow() {
            Some(failure) => Err(failure.clone()),
            None => Ok(running),
        }
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), TargetError> {
        match offset.checked_add(len) {
            Some(end) if len > 0 && end <= self.size.get() => Ok(()),
            _ => Err(TargetError::OutOfRange),
        }
    }

    fn store(&self, offset: u64, data: &[u8]) -> Result<(), TargetError> {
        let mut blocks = self.blocks.borrow_mut();
        for (block, within, range) in parts(offset, data.len()) {
            if !blocks.contains_key(&block) && blocks.len() >= self.blocks_max.get() {
                return Err(TargetError::NoSpace);
            }
            let content = blocks.entry(block).or_insert_with(|| Box::new([0; BLOCK_SIZE]));
            content[within..within + range.len()].copy_from_slice(&data[range]);
        }
        Ok(())
    }

    fn load(&self, offset: u64, len: usize) -> Bytes {
        let mut data = AlignedBuf::zeroed(len);
        let blocks = self.blocks.borrow();
        for (block, within, range) in parts(offset, len) {
            if let Some(content) = blocks.get(&block) {
                let len = range.len();
                data[range].copy_from_slice(&content[within..within + len]);
            }
        }
        data.freeze()
    }

    fn clear(&self, offset: u64, len: u64, unmap: bool) -> Result<(), TargetError> {
        let end = offset + len;
        if unmap {
            let whole = offset.div_ceil(BLOCK_BYTES)..end / BLOCK_BYTES;
            if !whole.is_empty() {
                let mut blocks = self.blocks.borrow_mut();
                let mut beyond = blocks.split_off(&whole.start);
                blocks.append(&mut beyond.split_off(&whole.end));
                let head = whole.start * BLOCK_BYTES - offset;
                let tail = whole.end * BLOCK_BYTES;
                drop(blocks);
                self.store_zeroes(offset, head)?;
                return self.store_zeroes(tail, end - tail);
            }
        }
        self.store_zeroes(offset, len)
    }

    fn store_zeroes(&self, mut offset: u64, mut len: u64) -> Result<(), TargetError> {
        const ZEROES: [u8; BLOCK_SIZE] = [0; BLOCK_SIZE];
        while len > 0 {
            let part = usize::try_from(len.min(BLOCK_BYTES)).expect("at most a block");
            self.store(offset, &ZEROES[..part])?;
            offset += part as u64;
            len -= part as u64;
        }
        Ok(())
    }

    fn extents(&self, offset: u64, len: u64, max: usize) -> Vec<MapExtent> {
        let end = offset + len;
        let blocks = self.blocks.borrow();
        let mut extents: Vec<MapExtent> = Vec::new();
        let mut at = offset;
        while at < end {
            let allocated = blocks.contains_key(&(at / BLOCK_BYTES));
            let next = if allocated {
                (at / BLOCK_BYTES + 1) * BLOCK_BYTES
            } else {
                let after = blocks.range(at / BLOCK_BYTES..).next();
                after.map_or(end, |(block, _)| block * BLOCK_BYTES)
            };
            let len = next.min(end) - at;
            let count = extents.len();
            match extents.last_mut() {
                Some(last) if last.allocated == allocated => last.len += len,
                _ if count == max => break,
                _ => extents.push(MapExtent { len, allocated }),
            }
            at += len;
        }
        extents
    }
}

/// Block number, offset in it and range of the request, for each block that a range touches.
fn parts(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let within = usize::try_from(at % BLOCK_BYTES).expect("less than a block");
        let part = (BLOCK_SIZE - within).min(len - done);
        let start = done;
        done += part;
        (part > 0).then_some((at / BLOCK_BYTES, within, start..done))
    })
}

struct Running<'a>(&'a MemoryTarget);

impl<'a> Running<'a> {
    fn new(target: &'a MemoryTarget) -> Self {
        target.running.set(target.running.get() + 1);
        target.running_max.set(target.running_max.get().max(target.running.get()));
        Self(target)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.set(self.0.running.get() - 1);
    }
}

impl BlockTarget for MemoryTarget {
    fn size(&self) -> u64 {
        self.size.get()
    }

    fn read_only(&self) -> bool {
        self.read_only.get()
    }

    fn read(&self, offset: u64, len: usize) -> LocalFuture<'_, Result<Vec<Bytes>, TargetError>> {
        Box::pin(async move {
            let _running = self.start().await?;
            self.check(offset, len as u64)?;
            Ok(vec![self.load(offset, len)])
        })
    }

    fn write(&self, offset: u64, data: Bytes) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(async move {
            let _running = self.start().await?;
            self.check(offset, data.len() as u64)?;
            if self.read_only.get() {
                return Err(TargetError::ReadOnly);
            }
            self.store(offset, &data)
        })
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(async move {
            let _running = self.start().await?;
            self.check(offset, len)?;
            if self.read_only.get() {
                return Err(TargetError::ReadOnly);
            }
            self.clear(offset, len, unmap)
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(async move {
            let _running = self.start().await?;
            self.flushes.set(self.flushes.get() + 1);
            Ok(())
        })
    }

    fn map(
        &self,
        offset: u64,
        len: u64,
        max: usize,
    ) -> LocalFuture<'_, Result<Vec<MapExtent>, TargetError>> {
        Box::pin(async move {
            self.check(offset, len)?;
            Ok(self.extents(offset, len, max))
        })
    }
}

/// Volumes in memory by name.
#[derive(Default)]
pub struct MemoryDirectory {
    exports: RefCell<BTreeMap<String, Rc<MemoryTarget>>>,
}

impl MemoryDirectory {
    /// Adds (or replaces) an empty volume of `size` bytes and returns it.
    pub fn add(&self, name: &str, size: u64) -> Rc<MemoryTarget> {
        let target = Rc::new(MemoryTarget::new(size));
        self.exports.borrow_mut().insert(name.to_owned(), Rc::clone(&target));
        target
    }
}

impl ExportDirectory for MemoryDirectory {
    fn list(&self) -> Vec<String> {
        self.exports.borrow().keys().cloned().collect()
    }

    fn open(&self, name: &str) -> LocalFuture<'_, Option<Rc<dyn BlockTarget>>> {
        let target = self.exports.borrow().get(name).cloned();
        Box::pin(async move { target.map(|target| target as Rc<dyn BlockTarget>) })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a plain array: content, and that what is reported as a hole reads as zeroes.
        #[test]
        fn behaves_like_an_array(
            steps in prop::collection::vec((0_u8..3, 0_u64..40_000, 1_u64..20_000, 1_u8..255), 1..30),
        ) {
            let target = MemoryTarget::new(40_960);
            let mut model = vec![0_u8; 40_960];
            for (kind, offset, len, fill) in steps {
                let len = len.min(40_960 - offset);
                let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
                if kind == 0 {
                    model[range.clone()].fill(fill);
                    target.store(offset, &model[range]).unwrap();
                } else {
                    model[range].fill(0);
                    target.clear(offset, len, kind == 1).unwrap();
                }
            }
            prop_assert_eq!(&target.load(0, 40_960)[..], &model[..]);
            let mut at = 0;
            for extent in target.extents(0, 40_960, usize::MAX) {
                let end = at + usize::try_from(extent.len).unwrap();
                prop_assert!(extent.allocated || model[at..end].iter().all(|&byte| byte == 0));
                at = end;
            }
            prop_assert_eq!(at, 40_960);
        }
    }
}
