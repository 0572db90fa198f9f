//! Makes checksums right, so that a fuzzer's bytes get past them to the checks behind.

#![allow(dead_code, reason = "each target uses what it needs")]

/// A copy of `bytes`, with the CRC-32 of all of it (taken with these four bytes zero) at `at`.
pub fn with_crc(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if let Some(field) = bytes.get_mut(at..at + 4) {
        field.fill(0);
        let crc = crc32fast::hash(&bytes);
        bytes[at..at + 4].copy_from_slice(&crc.to_le_bytes());
    }
    bytes
}

/// `bytes` cut or filled with zeroes to `len`.
pub fn of_len(bytes: &[u8], len: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(len, 0);
    bytes
}

/// A page of a disk with a right header (magic, version, CRC) and this content after its 16 bytes.
pub fn page(magic: [u8; 8], content: &[u8]) -> Vec<u8> {
    let mut page = magic.to_vec();
    page.extend_from_slice(&sds::disk::format::VERSION.to_le_bytes());
    page.extend_from_slice(&[0; 4]);
    page.extend_from_slice(content);
    with_crc(&of_len(&page, sds::id::BLOCK_SIZE), 12)
}
