//! The header of a record: raw bytes, and bytes behind a right magic, version, size and checksum.
//! What decodes keeps to the bounds, and encodes to what decodes alike.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sds::id::BLOCK_SIZE;
use sds::limits::{RECORD_ENTRIES_MAX, RECORD_HEADER_BLOCKS_MAX, RECORD_PAYLOAD_BLOCKS_MAX};
use sds::segment::record::{Header, RECORD_MAGIC, RECORD_VERSION, header_blocks};

mod checksums;

/// The bytes as a header: the counts they name are kept within their bounds.
fn header(data: &[u8]) -> Vec<u8> {
    let mut bytes = RECORD_MAGIC.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&RECORD_VERSION.to_le_bytes());
    bytes.extend_from_slice(data);
    let mut bytes = checksums::of_len(&bytes, RECORD_HEADER_BLOCKS_MAX * BLOCK_SIZE);
    let entries = usize::from(bytes[14]) % (RECORD_ENTRIES_MAX + 1);
    let payload = usize::from(u16::from_le_bytes([bytes[16], bytes[17]]));
    let payload = payload % (RECORD_PAYLOAD_BLOCKS_MAX + 1);
    let blocks = header_blocks(entries, payload) as usize;
    bytes[12] = blocks as u8;
    bytes[13] = 0;
    bytes[14..16].copy_from_slice(&(entries as u16).to_le_bytes());
    bytes[16..20].copy_from_slice(&(payload as u32).to_le_bytes());
    bytes.truncate(blocks * BLOCK_SIZE);
    checksums::with_crc(&bytes, 4)
}

fuzz_target!(|data: &[u8]| {
    for bytes in [data.to_vec(), header(data)] {
        let Ok(header) = Header::decode(&bytes) else { continue };
        assert!(header.entries.len() <= RECORD_ENTRIES_MAX);
        assert!(header.crcs.len() <= RECORD_PAYLOAD_BLOCKS_MAX);
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }
});
