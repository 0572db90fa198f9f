//! What lies in the file: three redb tables, each value with its own checksum.
//!
//! | table | key | value |
//! | --- | --- | --- |
//! | `sds-store` | `head` | [`HeadRow`] |
//! | `sds-keys` | a key of the store | [`KeyRow`], then the value |
//! | `sds-leases` | number of a lease | [`LeaseRow`] |
//!
//! The CRC-32 of a row covers its table's key too, and the head row counts the other rows: a row
//! that is damaged, misplaced or missing is found when the file is opened.

use std::time::Duration;

use bytes::Bytes;
use redb::TableDefinition;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::meta::LeaseId;
use crate::meta::state::{Content, Entry};

/// Version of this layout.
pub(super) const FORMAT_VERSION: u32 = 1;
/// First bytes of the head row.
const MAGIC: [u8; 8] = *b"sdsstore";
/// Key of the only row in [`STORE`].
pub(super) const HEAD: &str = "head";

pub(super) const STORE: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("sds-store");
pub(super) const KEYS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("sds-keys");
pub(super) const LEASES: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("sds-leases");

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HeadRow {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    revision: U64,
    lease_last: U64,
    keys: U64,
    leases: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct KeyRow {
    crc: U32,
    reserved: U32,
    revision: U64,
    /// 0: none.
    lease: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct LeaseRow {
    crc: U32,
    reserved: U32,
    ttl_us: U64,
}

const _: () = assert!(size_of::<HeadRow>() == 48);
const _: () = assert!(size_of::<KeyRow>() == 24);
const _: () = assert!(size_of::<LeaseRow>() == 16);

/// What the head row says of the rest.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) revision: u64,
    pub(super) lease_last: u64,
    pub(super) keys: u64,
    pub(super) leases: u64,
}

/// Why a row is not what it should be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum RowError {
    Newer(u32),
    Bad(&'static str),
}

fn crc(key: &[u8], parts: [&[u8]; 2]) -> U32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key);
    for part in parts {
        hasher.update(part);
    }
    U32::new(hasher.finalize())
}

impl HeadRow {
    fn crc(&self) -> U32 {
        let bytes = self.as_bytes();
        crc(HEAD.as_bytes(), [&bytes[..12], &bytes[16..]])
    }
}

pub(super) fn encode_head(content: &Content) -> Vec<u8> {
    let count = |n: usize| U64::new(u64::try_from(n).expect("a count fits 64 bits"));
    let mut row = HeadRow {
        magic: MAGIC,
        version: U32::new(FORMAT_VERSION),
        crc: U32::ZERO,
        revision: U64::new(content.revision),
        lease_last: U64::new(content.lease_last),
        keys: count(content.entries.len()),
        leases: count(content.leases.len()),
    };
    row.crc = row.crc();
    row.as_bytes().to_vec()
}

pub(super) fn decode_head(bytes: &[u8]) -> Result<Head, RowError> {
    let (fixed, _) =
        <[u8; 12]>::read_from_prefix(bytes).map_err(|_| RowError::Bad("its head is too short"))?;
    if fixed[..8] != MAGIC {
        return Err(RowError::Bad("its head has another magic"));
    }
    let version = u32::from_le_bytes([fixed[8], fixed[9], fixed[10], fixed[11]]);
    if version > FORMAT_VERSION {
        return Err(RowError::Newer(version));
    }
    let row = HeadRow::read_from_bytes(bytes)
        .map_err(|_| RowError::Bad("its head has another length"))?;
    if row.crc != row.crc() {
        return Err(RowError::Bad("the checksum of its head is wrong"));
    }
    Ok(Head {
        revision: row.revision.get(),
        lease_last: row.lease_last.get(),
        keys: row.keys.get(),
        leases: row.leases.get(),
    })
}

pub(super) fn encode_entry(key: &str, entry: &Entry) -> Vec<u8> {
    let mut row = KeyRow {
        crc: U32::ZERO,
        reserved: U32::ZERO,
        revision: U64::new(entry.revision),
        lease: U64::new(entry.lease.map_or(0, |lease| lease.0)),
    };
    row.crc = crc(key.as_bytes(), [&row.as_bytes()[4..], &entry.value]);
    let mut bytes = Vec::with_capacity(size_of::<KeyRow>() + entry.value.len());
    bytes.extend_from_slice(row.as_bytes());
    bytes.extend_from_slice(&entry.value);
    bytes
}

pub(super) fn decode_entry(key: &str, bytes: &[u8]) -> Result<Entry, RowError> {
    let (row, value) =
        KeyRow::read_from_prefix(bytes).map_err(|_| RowError::Bad("the row is too short"))?;
    if row.crc != crc(key.as_bytes(), [&row.as_bytes()[4..], value]) {
        return Err(RowError::Bad("the checksum is wrong"));
    }
    let lease = row.lease.get();
    Ok(Entry {
        value: Bytes::copy_from_slice(value),
        revision: row.revision.get(),
        lease: (lease != 0).then_some(LeaseId(lease)),
    })
}

pub(super) fn encode_lease(id: LeaseId, ttl: Duration) -> Vec<u8> {
    let ttl_us = u64::try_from(ttl.as_micros()).unwrap_or(u64::MAX).max(1);
    let mut row = LeaseRow { crc: U32::ZERO, reserved: U32::ZERO, ttl_us: U64::new(ttl_us) };
    row.crc = crc(&id.0.to_le_bytes(), [&row.as_bytes()[4..], &[]]);
    row.as_bytes().to_vec()
}

pub(super) fn decode_lease(id: LeaseId, bytes: &[u8]) -> Result<Duration, RowError> {
    let row = LeaseRow::read_from_bytes(bytes)
        .map_err(|_| RowError::Bad("the row has another length"))?;
    if row.crc != crc(&id.0.to_le_bytes(), [&row.as_bytes()[4..], &[]]) {
        return Err(RowError::Bad("the checksum is wrong"));
    }
    Ok(Duration::from_micros(row.ttl_us.get()).min(crate::meta::LEASE_TTL_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_newer_head_is_told_from_a_damaged_one() {
        let good = encode_head(&Content { revision: 9, ..Content::default() });
        let head = Head { revision: 9, lease_last: 0, keys: 0, leases: 0 };
        assert_eq!(decode_head(&good), Ok(head));
        assert_eq!(good[..12], *b"sdsstore\x01\0\0\0");
        let mut newer = good.clone();
        newer[8] = 2;
        assert_eq!(decode_head(&newer), Err(RowError::Newer(2)));
        let mut bad = good;
        bad[20] ^= 1;
        assert!(matches!(decode_head(&bad), Err(RowError::Bad(_))));
    }

    proptest! {
        #[test]
        fn any_change_of_a_row_is_found(
            value in prop::collection::vec(any::<u8>(), 0..100),
            revision: u64,
            at in any::<prop::sample::Index>(),
            flip in 1_u8..,
        ) {
            let entry = Entry { value: value.into(), revision, lease: Some(LeaseId(3)) };
            let good = encode_entry("/a", &entry);
            prop_assert_eq!(decode_entry("/a", &good), Ok(entry));
            prop_assert!(decode_entry("/b", &good).is_err());
            let mut bad = good.clone();
            let at = at.index(bad.len());
            bad[at] ^= flip;
            prop_assert!(decode_entry("/a", &bad).is_err());
            prop_assert!(decode_entry("/a", &good[..at]).is_err());
            let lease = encode_lease(LeaseId(1), Duration::from_secs(revision % 9 + 1));
            prop_assert!(decode_lease(LeaseId(2), &lease).is_err());
        }
    }
}
