//! The keys that are mirrored to disks beside the roots: cluster, disks, pools, volumes.
//!
//! In its [envelope](super::envelope), a catalog is a run of entries, all numbers little-endian:
//!
//! ```text
//!  0            2              6
//!  | key length | value length | key … | value … | next entry …
//! ```
//!
//! Values are the store's, each in an envelope of its own, so that
//! [`EmbeddedStore::create`](super::embedded::EmbeddedStore::create) takes them as they are.

use bytes::Bytes;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::envelope::{self, Encoding, EnvelopeError, Kind};
use super::members::{ALIVE_PREFIX, MANAGER_KEY};
use super::schema::{CLUSTER_KEY, NODE_KEY, ROOT_PREFIX};
use super::{KEY_BYTES_MAX, MetaResult, MetaStore};

/// Version of the run of entries.
const VERSION: u16 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct EntryHeader {
    key: U16,
    value: U32,
}

const _: () = assert!(size_of::<EntryHeader>() == 6 && KEY_BYTES_MAX < 1 << 16);

fn bad(reason: &str) -> EnvelopeError {
    EnvelopeError::Payload { kind: Kind::Catalog, reason: reason.into() }
}

/// The keys to be mirrored, with the revision of the store they show: all of sds but the roots and
/// who uses the store.
///
/// # Errors
/// Those of [`MetaStore::list`].
pub async fn collect(store: &dyn MetaStore) -> MetaResult<(u64, Vec<(String, Bytes)>)> {
    let root_of_all = CLUSTER_KEY.trim_end_matches("cluster");
    let listing = store.list(root_of_all).await?;
    let entries = listing.entries.into_iter().filter(|(key, _)| !passing(key));
    Ok((listing.revision, entries.map(|(key, found)| (key, found.value)).collect()))
}

/// What is mirrored otherwise, or lives no longer than a lease.
fn passing(key: &str) -> bool {
    key == NODE_KEY
        || key == MANAGER_KEY
        || key.starts_with(ROOT_PREFIX)
        || key.starts_with(ALIVE_PREFIX)
}

/// Encodes keys and values for a disk.
///
/// # Errors
/// [`EnvelopeError::Payload`] if they are too many or too large.
pub fn encode(entries: &[(String, Bytes)]) -> Result<Bytes, EnvelopeError> {
    let mut payload = Vec::new();
    for (key, value) in entries {
        let key_bytes = u16::try_from(key.len()).map_err(|_| bad("a key is too long"))?;
        let value_bytes = u32::try_from(value.len()).map_err(|_| bad("a value is too long"))?;
        let header = EntryHeader { key: U16::new(key_bytes), value: U32::new(value_bytes) };
        payload.extend_from_slice(header.as_bytes());
        payload.extend_from_slice(key.as_bytes());
        payload.extend_from_slice(value);
    }
    envelope::seal(Kind::Catalog, VERSION, Encoding::Opaque, &payload).map(Bytes::from)
}

/// Decodes what [`encode`] wrote. The values themselves are not checked.
///
/// # Errors
/// Any [`EnvelopeError`].
pub fn decode(bytes: &[u8]) -> Result<Vec<(String, Bytes)>, EnvelopeError> {
    let opened = envelope::open(bytes, Kind::Catalog, Encoding::Opaque)?;
    if opened.kind_version > VERSION {
        return Err(EnvelopeError::Newer {
            what: "the catalog".into(),
            found: opened.kind_version,
            known: VERSION,
        });
    }
    let mut rest = opened.payload;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (header, after) =
            EntryHeader::read_from_prefix(rest).map_err(|_| bad("an entry is cut off"))?;
        let value_bytes = usize::try_from(header.value.get()).unwrap_or(usize::MAX);
        let (key, after) = after
            .split_at_checked(usize::from(header.key.get()))
            .ok_or_else(|| bad("a key is cut off"))?;
        let (value, after) =
            after.split_at_checked(value_bytes).ok_or_else(|| bad("a value is cut off"))?;
        let key = std::str::from_utf8(key).map_err(|_| bad("a key is not UTF-8"))?;
        entries.push((key.to_owned(), Bytes::copy_from_slice(value)));
        rest = after;
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::Env;
    use crate::meta::memory::MemoryStore;
    use crate::meta::{MetaStore, Txn};
    use proptest::prelude::*;

    #[tokio::test]
    async fn all_but_roots_is_collected() {
        let store = MemoryStore::new(Env::from_seed(1));
        let txn = Txn::new().put(CLUSTER_KEY, "c").put("/sds/root/x", "r").put("/sds/pool/p", "p");
        store.txn(txn.put("/other", "o")).await.unwrap();
        let (revision, entries) = collect(&store).await.unwrap();
        assert_eq!(revision, 1);
        assert_eq!(entries, [(CLUSTER_KEY.into(), "c".into()), ("/sds/pool/p".into(), "p".into())]);
    }

    proptest! {
        #[test]
        fn round_trip(
            entries in prop::collection::vec((".{0,20}", prop::collection::vec(any::<u8>(), 0..50)), 0..9)
        ) {
            let entries: Vec<_> = entries.into_iter().map(|(k, v)| (k, Bytes::from(v))).collect();
            prop_assert_eq!(decode(&encode(&entries).unwrap()).unwrap(), entries);
        }

        #[test]
        fn garbage_in_an_intact_envelope_is_refused_or_read(
            payload in prop::collection::vec(any::<u8>(), 0..60)
        ) {
            let bytes =
                envelope::seal(Kind::Catalog, VERSION, Encoding::Opaque, &payload).unwrap();
            if let Ok(entries) = decode(&bytes) {
                prop_assert_eq!(encode(&entries).unwrap(), bytes);
            }
        }
    }
}
