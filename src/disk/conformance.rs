//! What every block device, and a disk on any block device, must do: run by the tests of the
//! simulated and of the real device.
//!
//! The functions panic where the device does not conform. They need a `LocalSet`.

use std::rc::Rc;

use bytes::Bytes;

use crate::buffer::AlignedBuf;
use crate::disk::device::{BlockDevice, DeviceError};
use crate::disk::{Disk, FormatOptions};
use crate::id::{BLOCK_BYTES, BLOCK_SIZE, ClusterId, DiskId, Epoch, HeadId, SegmentId, VolumeId};
use crate::shard::{
    Append, Authority, Scheme, SegmentKind, ShardError, ShardSpec, ShardState, SlotClass,
};

/// Id of the disks formatted by [`format_options`].
pub const DISK: DiskId = DiskId::from_bytes([0xd1; 16]);
/// The volume that [`authority`] is for.
pub const VOLUME: VolumeId = VolumeId::from_bytes([0xa0; 16]);

/// Options for a small disk with slots of 64 KiB.
pub fn format_options() -> FormatOptions {
    FormatOptions {
        disk: DISK,
        cluster: ClusterId::from_bytes([0xc1; 16]),
        slot_bytes: Some(64 << 10),
        volumes_max: Some(16),
        force: false,
    }
}

/// The authority of the head of an epoch.
pub fn authority(epoch: u64) -> Authority {
    let byte = u8::try_from(epoch % 256).expect("a byte");
    Authority { volume: VOLUME, epoch: Epoch(epoch), head: HeadId::from_bytes([byte; 16]) }
}

/// A single-copy log segment of [`VOLUME`].
pub fn spec(segment: u64, creation: u64) -> ShardSpec {
    ShardSpec {
        volume: VOLUME,
        segment: SegmentId(segment),
        creation,
        kind: SegmentKind::Log,
        scheme: Scheme::replicated(1),
        index: 0,
        members: vec![DISK],
    }
}

/// `count` blocks filled with a byte.
pub fn blocks(byte: u8, count: usize) -> Bytes {
    let mut buf = AlignedBuf::new(count * BLOCK_SIZE);
    buf.fill(byte);
    buf.freeze()
}

/// An append of `count` blocks of a byte whose "checksums" are the byte, too.
pub fn append(epoch: u64, segment: u64, block: u32, byte: u8, count: usize) -> Append {
    Append {
        authority: authority(epoch),
        segment: SegmentId(segment),
        block,
        data: Rc::from([blocks(byte, count)]),
        crcs: vec![u32::from(byte); count].into(),
    }
}

/// Reads, writes, vectors, concurrency, bounds, dropped futures.
pub async fn check_device(device: Rc<dyn BlockDevice>) {
    let size = device.size();
    assert!(size >= 1 << 20 && size.is_multiple_of(BLOCK_BYTES));
    let pieces: Rc<[Bytes]> = Rc::from([blocks(1, 1), blocks(2, 3), blocks(3, 2)]);
    device.write(8 * BLOCK_BYTES, pieces, true).await.expect("a vectored write");
    let buf = device.read(8 * BLOCK_BYTES, AlignedBuf::new(6 * BLOCK_SIZE)).await.expect("read");
    assert_eq!(buf.len(), 6 * BLOCK_SIZE);
    for (index, byte) in [1, 2, 2, 2, 3, 3].into_iter().enumerate() {
        let block = &buf[index * BLOCK_SIZE..(index + 1) * BLOCK_SIZE];
        assert!(block.iter().all(|b| *b == byte), "block {index}");
    }
    let many = (0..64u8).map(|n| {
        let data: Rc<[Bytes]> = Rc::from([blocks(n, 1)]);
        device.write((64 + u64::from(n)) * BLOCK_BYTES, data, n % 2 == 0)
    });
    for result in futures_util::future::join_all(many).await {
        result.expect("concurrent writes");
    }
    device.flush().await.expect("a flush");
    // Operations whose futures are dropped harm nobody.
    drop(device.read(0, AlignedBuf::new(BLOCK_SIZE)));
    drop(device.write(200 * BLOCK_BYTES, Rc::from([blocks(9, 1)]), true));
    let reads =
        (0..64u64).map(|n| device.read((64 + n) * BLOCK_BYTES, AlignedBuf::new(BLOCK_SIZE)));
    for (n, result) in futures_util::future::join_all(reads).await.into_iter().enumerate() {
        let buf = result.expect("concurrent reads");
        assert!(buf.iter().all(|byte| usize::from(*byte) == n));
    }
    let last: Rc<[Bytes]> = Rc::from([blocks(7, 1)]);
    device.write(size - BLOCK_BYTES, last, true).await.expect("the last block");
    let beyond = device.read(size - BLOCK_BYTES, AlignedBuf::new(2 * BLOCK_SIZE)).await;
    assert!(matches!(beyond.map(drop), Err(DeviceError::Short { .. })));
    let beyond = device.write(size, Rc::from([blocks(7, 1)]), true).await;
    assert!(matches!(beyond, Err(DeviceError::Short { .. } | DeviceError::Io { .. })));
}

/// Formats a blank device and takes a shard through its life, across two restarts. `reopen` gives
/// a fresh handle on the same medium.
pub async fn check_disk(reopen: impl Fn() -> Rc<dyn BlockDevice>) {
    Disk::format(&*reopen(), format_options()).await.expect("a blank device");
    let disk = Disk::open(reopen()).await.expect("formatted");
    let (old, new) = (authority(1), authority(2));
    disk.create(old, spec(1, 10), SlotClass::Client).await.expect("created");
    let first = disk.append(append(1, 1, 0, 0x11, 3));
    let second = disk.append(append(1, 1, 3, 0x22, 2));
    let (first, second) = futures_util::future::join(first, second).await;
    assert_eq!((first, second), (Ok(()), Ok(())));
    let reply = disk.read(VOLUME, SegmentId(1), 2, 2).await.expect("open shards can be read");
    assert_eq!(reply.crcs, [0x11, 0x22]);
    assert_eq!((reply.data[0], reply.data[BLOCK_SIZE]), (0x11, 0x22));
    disk.seal(old, SegmentId(1), 4, None).await.expect("sealed");
    disk.create(old, spec(2, 11), SlotClass::Client).await.expect("created");
    disk.append(append(1, 2, 0, 0x33, 1)).await.expect("appended");
    disk.close("restart").await;

    let disk = Disk::open(reopen()).await.expect("opens again");
    let listed = disk.fence(new, None).await.expect("fenced");
    let states: Vec<_> = listed.shards.iter().map(|s| (s.spec.segment.0, s.state)).collect();
    assert_eq!(states, [(1, ShardState::Sealed), (2, ShardState::Closed)]);
    assert_eq!(listed.shards[0].blocks, 4);
    let reply = disk.read(VOLUME, SegmentId(1), 0, 4).await.expect("sealed shards can be read");
    assert_eq!(reply.crcs, [0x11, 0x11, 0x11, 0x22]);
    assert_eq!(disk.append(append(1, 2, 1, 0, 1)).await, Err(ShardError::Fenced(Epoch(2))));
    let raw = disk.read_raw(VOLUME, SegmentId(2), 0, 1).await.expect("raw");
    assert!(raw.data.iter().all(|byte| *byte == 0x33) && raw.crcs.is_empty());
    disk.seal(new, SegmentId(2), 1, Some(Rc::from([0x33]))).await.expect("sealed by the new head");
    disk.delete(new, SegmentId(1), 10).await.expect("deleted");
    disk.close("restart").await;

    let disk = Disk::open(reopen()).await.expect("opens again");
    let shards = disk.list(VOLUME).expect("lists").shards;
    assert_eq!(shards.len(), 1);
    assert_eq!((shards[0].state, shards[0].blocks), (ShardState::Sealed, 1));
    assert_eq!(disk.delete(new, SegmentId(1), 10).await, Err(ShardError::Gone));
    assert_eq!(disk.probe(old), Err(ShardError::Fenced(Epoch(2))));
    disk.check().expect("invariants");
    disk.close("end of test").await;
}
