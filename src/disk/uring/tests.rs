//! The device over real files.

use std::fs;
use std::future::Future;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use futures_util::future::join_all;

use super::*;
use crate::id::{BLOCK_BYTES, BLOCK_SIZE};

const SIZE: u64 = 1 << 20;

fn run<F: Future>(test: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

struct Fixture {
    _dir: tempfile::TempDir,
    path: PathBuf,
    ring: Rc<Ring>,
    device: UringDevice,
}

fn create() -> OpenOptions {
    OpenOptions { create_size: Some(SIZE), read_only: false }
}

fn fixture() -> Fixture {
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/target").unwrap();
    let path = dir.path().join("disk");
    let ring = Ring::new().unwrap();
    let device = UringDevice::open(&path, &ring, create()).unwrap();
    Fixture { _dir: dir, path, ring, device }
}

fn pattern(seed: u64, blocks: usize) -> AlignedBuf {
    let mut buf = AlignedBuf::new(blocks * BLOCK_SIZE);
    for (index, word) in buf.chunks_exact_mut(8).enumerate() {
        let value = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index as u64);
        word.copy_from_slice(&value.to_le_bytes());
    }
    buf
}

fn pieces(buf: AlignedBuf) -> Rc<[Bytes]> {
    Rc::from([buf.freeze()])
}

#[test]
fn what_was_written_is_read_back_in_one_piece_or_many() {
    run(async {
        let f = fixture();
        assert_eq!(f.device.size(), SIZE);
        assert!(f.device.is_direct(), "the tests want a filesystem with direct I/O");
        let whole = pattern(1, 6).freeze();
        let parts: Rc<[Bytes]> = Rc::from([
            whole.slice(..2 * BLOCK_SIZE),
            Bytes::new(),
            whole.slice(2 * BLOCK_SIZE..3 * BLOCK_SIZE),
            whole.slice(3 * BLOCK_SIZE..),
        ]);
        f.device.write(3 * BLOCK_BYTES, parts, false).await.unwrap();
        f.device.flush().await.unwrap();
        let read = f.device.read(3 * BLOCK_BYTES, AlignedBuf::new(whole.len())).await.unwrap();
        assert!(read[..] == whole[..]);
        let before = f.device.read(0, AlignedBuf::new(3 * BLOCK_SIZE)).await.unwrap();
        assert!(before.iter().all(|&byte| byte == 0), "the rest of a sparse file reads as zeros");
        let mut on_disk = vec![0; whole.len()];
        fs::File::open(&f.path).unwrap().read_exact_at(&mut on_disk, 3 * BLOCK_BYTES).unwrap();
        assert!(on_disk == whole[..]);
    });
}

#[test]
fn empty_requests_succeed() {
    run(async {
        let f = fixture();
        f.device.write(SIZE, Rc::from([]), true).await.unwrap();
        assert!(f.device.read(SIZE, AlignedBuf::new(0)).await.unwrap().is_empty());
    });
}

#[test]
fn more_requests_than_the_ring_holds_run_at_once() {
    run(async {
        let f = fixture();
        let blocks = SIZE / BLOCK_BYTES;
        for round in 0..8 {
            let writes = (0..blocks).map(|block| {
                let data = pieces(pattern(round * blocks + block, 1));
                f.device.write(block * BLOCK_BYTES, data, block % 16 == 0)
            });
            join_all(writes).await.into_iter().for_each(|written| written.unwrap());
            // Ten times the submission queue.
            let reads = (0..blocks * 10)
                .map(|i| f.device.read(i % blocks * BLOCK_BYTES, AlignedBuf::new(BLOCK_SIZE)));
            for (i, read) in (0..).zip(join_all(reads).await) {
                let want = pattern(round * blocks + i % blocks, 1);
                assert!(read.unwrap()[..] == want[..], "block {i} of round {round}");
            }
        }
    });
}

#[test]
fn requests_of_spawned_tasks_share_the_ring() {
    run(async {
        let f = fixture();
        let tasks = (0..32u64).map(|task| {
            let device = f.device.clone();
            tokio::task::spawn_local(async move {
                for i in 0..20 {
                    let offset = (task * 8 + i % 8) * BLOCK_BYTES;
                    let data = pattern(task * 1000 + i, 1).freeze();
                    device.write(offset, Rc::from([data.clone()]), true).await.unwrap();
                    let read = device.read(offset, AlignedBuf::new(BLOCK_SIZE)).await.unwrap();
                    assert!(read[..] == data[..]);
                }
            })
        });
        join_all(tasks).await.into_iter().for_each(|done| done.unwrap());
    });
}

#[test]
fn more_pieces_than_one_request_takes_are_split() {
    run(async {
        let f = fixture();
        let big = OpenOptions { create_size: Some(16 << 20), read_only: false };
        let device = UringDevice::open(f.path.with_extension("big"), &f.ring, big).unwrap();
        let blocks = ring::IOVECS_MAX * 2 + 3;
        let data: Rc<[Bytes]> =
            (0..blocks).map(|block| pattern(block as u64, 1).freeze()).collect();
        device.write(BLOCK_BYTES, data.clone(), true).await.unwrap();
        let read = device.read(BLOCK_BYTES, AlignedBuf::new(blocks * BLOCK_SIZE)).await.unwrap();
        assert!(read.chunks(BLOCK_SIZE).eq(data.iter().map(|piece| &piece[..])));
    });
}

#[test]
fn dropped_futures_leave_the_device_usable_and_their_memory_alone() {
    run(async {
        let f = fixture();
        for round in 0..50u64 {
            for block in 0..16 {
                let data = pieces(pattern(round, 1));
                let mut write = f.device.write(block * BLOCK_BYTES, data, true);
                let mut read = f.device.read(block * BLOCK_BYTES, AlignedBuf::new(BLOCK_SIZE));
                // Polled once, so that it is queued, and dropped before or after it is submitted.
                assert!(futures_util::poll!(&mut write).is_pending());
                assert!(futures_util::poll!(&mut read).is_pending());
                if block % 2 == 0 {
                    tokio::task::yield_now().await;
                }
                drop((write, read));
                // Would be overwritten by the dropped read if that still pointed here.
                let witness = pattern(u64::MAX - 1, 1);
                tokio::task::yield_now().await;
                assert!(witness[..] == pattern(u64::MAX - 1, 1)[..]);
            }
        }
        let data = pattern(77, 16).freeze();
        // A write that was dropped may still run, so this one goes elsewhere.
        f.device.write(32 * BLOCK_BYTES, Rc::from([data.clone()]), true).await.unwrap();
        let read = f.device.read(32 * BLOCK_BYTES, AlignedBuf::new(data.len())).await.unwrap();
        assert!(read[..] == data[..]);
    });
}

#[test]
fn the_ring_can_go_with_requests_under_way() {
    for _ in 0..20 {
        run(async {
            let f = fixture();
            for block in 0..64 {
                let data = pieces(pattern(5, 1));
                let mut write = f.device.write(block * BLOCK_BYTES, data, true);
                assert!(futures_util::poll!(&mut write).is_pending());
                if block == 32 {
                    tokio::task::yield_now().await;
                }
            }
        });
    }
}

#[test]
fn a_ring_without_its_runtime_answers_that_the_device_is_gone() {
    let f = run(async { fixture() });
    let error = run(async {
        let write = f.device.write(0, pieces(pattern(1, 1)), true);
        write.await.unwrap_err()
    });
    assert_eq!(error, DeviceError::Gone);
}

#[test]
fn requests_beyond_the_end_are_refused_and_extend_nothing() {
    run(async {
        let f = fixture();
        let error = f.device.write(SIZE, pieces(pattern(1, 1)), true).await.unwrap_err();
        let short = DeviceError::Short { operation: "write", offset: SIZE, len: BLOCK_BYTES };
        assert_eq!(error, short);
        let read = f.device.read(u64::MAX - 4095, AlignedBuf::new(2 * BLOCK_SIZE)).await;
        assert!(matches!(read, Err(DeviceError::Short { operation: "read", .. })));
        assert_eq!(fs::metadata(&f.path).unwrap().len(), SIZE);
    });
}

#[test]
fn a_file_that_was_cut_reads_short_and_is_not_grown_again() {
    run(async {
        let f = fixture();
        let file = fs::OpenOptions::new().write(true).open(&f.path).unwrap();
        // In the middle of a block: the part that is left is no multiple of a sector.
        file.set_len(SIZE / 2 + 100).unwrap();
        let read = f.device.read(SIZE / 2 - BLOCK_BYTES, AlignedBuf::new(4 * BLOCK_SIZE)).await;
        assert!(matches!(read, Err(DeviceError::Short { operation: "read", .. })));
        assert_eq!(f.device.size(), SIZE / 2);
        let write = f.device.write(SIZE - BLOCK_BYTES, pieces(pattern(1, 1)), true).await;
        assert!(matches!(write, Err(DeviceError::Short { operation: "write", .. })));
        assert_eq!(fs::metadata(&f.path).unwrap().len(), SIZE / 2 + 100);
        f.device.read(SIZE / 2 - BLOCK_BYTES, AlignedBuf::new(BLOCK_SIZE)).await.unwrap();
    });
}

#[test]
fn the_kernels_error_comes_through() {
    run(async {
        let f = fixture();
        let reader =
            UringDevice::open(&f.path, &f.ring, OpenOptions { create_size: None, read_only: true });
        assert!(matches!(reader, Err(OpenError::InUse(_))), "a writer has it open");
        drop(f.device);
        let options = OpenOptions { create_size: None, read_only: true };
        let reader = UringDevice::open(&f.path, &f.ring, options).unwrap();
        let second = UringDevice::open(&f.path, &f.ring, options).unwrap();
        let error = reader.write(0, pieces(pattern(1, 1)), false).await.unwrap_err();
        let errno = libc::EBADF;
        let want = DeviceError::Io { operation: "write", offset: 0, len: BLOCK_BYTES, errno };
        assert_eq!(error, want);
        second.read(0, AlignedBuf::new(BLOCK_SIZE)).await.unwrap();
        let error = second.read(1, AlignedBuf::new(BLOCK_SIZE)).await;
        assert!(matches!(error, Err(DeviceError::Io { errno: libc::EINVAL, .. })));
        let error = second.read(0, AlignedBuf::new(1)).await;
        assert!(matches!(error, Err(DeviceError::Io { errno: libc::EINVAL, .. })));
    });
}

#[test]
fn files_are_made_sparse_and_keep_what_they_hold() {
    run(async {
        let f = fixture();
        let path = f.path.with_extension("sparse");
        let huge = OpenOptions { create_size: Some(1 << 40), read_only: false };
        let device = UringDevice::open(&path, &f.ring, huge).unwrap();
        assert_eq!(device.size(), 1 << 40);
        let last = (1 << 40) - BLOCK_BYTES;
        device.write(last, pieces(pattern(9, 1)), true).await.unwrap();
        assert!(fs::metadata(&path).unwrap().blocks() < 1024);
        drop(device);
        let device = UringDevice::open(&path, &f.ring, create()).unwrap();
        assert_eq!(device.size(), 1 << 40, "an existing file keeps its size");
        let read = device.read(last, AlignedBuf::new(BLOCK_SIZE)).await.unwrap();
        assert!(read[..] == pattern(9, 1)[..]);
    });
}

#[test]
fn what_cannot_be_opened_says_why() {
    run(async {
        let f = fixture();
        let open = |path: &str, options| {
            let opened = UringDevice::open(f.path.with_file_name(path), &f.ring, options);
            opened.err().expect("must not open").to_string()
        };
        let any = OpenOptions::default();
        assert!(open("disk", any).ends_with("disk is in use by another process or mount"));
        assert!(open("disk", create()).ends_with("is in use by another process or mount"));
        assert!(open("missing", any).contains("cannot open"));
        assert!(open("missing", any).contains("No such file"));
        assert!(open(".", any).ends_with("is neither a regular file nor a block device"));
        assert!(open("/dev/null", any).ends_with("is neither a regular file nor a block device"));
        let odd = OpenOptions { create_size: Some(5000), read_only: false };
        assert!(open("odd", odd).contains("not a positive multiple of 4096"));
        assert!(!f.path.with_file_name("odd").exists());
        fs::write(f.path.with_file_name("tiny"), b"tiny").unwrap();
        assert!(open("tiny", any).ends_with("tiny holds 4 bytes, less than one block of 4096"));
        drop(f.device);
        UringDevice::open(&f.path, &f.ring, any).map(drop).unwrap();
    });
}
