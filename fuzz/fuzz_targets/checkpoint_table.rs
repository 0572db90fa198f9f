//! The table of a checkpoint: raw bytes, and bytes behind a right magic, version, length and
//! checksum. What decodes encodes to what decodes alike.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sds::id::BLOCK_SIZE;
use sds::volume::segtab::Snapshot;

mod checksums;

fn table(data: &[u8]) -> Vec<u8> {
    let mut bytes = b"SDSC\0\0\0\0\x01\0".to_vec();
    bytes.extend_from_slice(data);
    let len = bytes.len().max(96).next_multiple_of(BLOCK_SIZE);
    let mut bytes = checksums::of_len(&bytes, len);
    bytes[16..24].copy_from_slice(&(len as u64).to_le_bytes());
    checksums::with_crc(&bytes, 4)
}

fuzz_target!(|data: &[u8]| {
    for bytes in [data.to_vec(), table(data)] {
        let Ok(snapshot) = Snapshot::decode(&bytes) else { continue };
        // What was decoded may still be inconsistent; asking must not panic.
        let _verdict = snapshot.table.check();
        let again = Snapshot::decode(&snapshot.encode()).expect("as encoded");
        assert_eq!(format!("{again:?}"), format!("{snapshot:?}"));
    }
});
