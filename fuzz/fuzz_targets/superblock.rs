//! The superblock: raw bytes, and bytes behind a right magic, version and checksum. What decodes
//! describes a disk that fits its own size, and encodes to something that decodes alike.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sds::disk::format::{Page, Superblock, SuperblockPage};

mod checksums;

fuzz_target!(|data: &[u8]| {
    for bytes in [data.to_vec(), checksums::page(SuperblockPage::MAGIC, data)] {
        let Ok(superblock) = Superblock::decode(&bytes) else { continue };
        let g = &superblock.geometry;
        assert!(g.data + u64::from(g.slots) * g.slot_bytes <= g.size_bytes);
        assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock));
    }
});
