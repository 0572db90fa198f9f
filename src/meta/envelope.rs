//! The bytes around every record that sds keeps in a metadata store or mirrors to disks.
//!
//! ```text
//!  0        4         6      8         10         12       16      20
//!  | "SDSM" | version | kind | version | encoding | length | CRC32 | payload …
//!           | envelope|      | of kind |
//! ```
//!
//! The CRC-32 covers the bytes before it and the payload. A record says itself what it is, so
//! that a mirror or a stray value can be told without its key.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of an envelope.
pub const MAGIC: [u8; 4] = *b"SDSM";
/// Version of the envelope itself.
pub const VERSION: u16 = 1;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = size_of::<Header>();
/// Offset of the CRC, which ends the header.
const CRC_OFFSET: usize = std::mem::offset_of!(Header, crc);

/// What stands before the payload.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct Header {
    magic: [u8; 4],
    version: U16,
    kind: U16,
    kind_version: U16,
    encoding: U16,
    length: U32,
    crc: U32,
}

const _: () = assert!(HEADER_BYTES == 20 && CRC_OFFSET == 16);

/// What a payload is. Numbers are never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum Kind {
    /// [`super::record::ClusterRecord`].
    Cluster = 1,
    /// [`super::record::DiskRecord`].
    Disk = 2,
    /// [`super::record::PoolRecord`].
    Pool = 3,
    /// [`super::record::VolumeRecord`].
    Volume = 4,
    /// [`super::record::VolumeNameRecord`].
    VolumeName = 5,
    /// A volume's root, encoded by the volume.
    Root = 6,
    /// Keys and values of a store, as mirrored to disks.
    Catalog = 7,
    /// [`super::record::NodeRecord`].
    Node = 8,
    /// [`super::members::MemberRecord`].
    Member = 9,
    /// [`super::members::AliveRecord`].
    Alive = 10,
    /// [`super::members::PlaceRecord`].
    Place = 11,
    /// [`super::members::ManagerRecord`].
    Manager = 12,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 12] = [
        Self::Cluster,
        Self::Disk,
        Self::Pool,
        Self::Volume,
        Self::VolumeName,
        Self::Root,
        Self::Catalog,
        Self::Node,
        Self::Member,
        Self::Alive,
        Self::Place,
        Self::Manager,
    ];

    /// The kind with this number.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u16 == number)
    }
}

/// How a payload is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Encoding {
    /// JSON.
    Json = 1,
    /// Bytes that only their owner understands.
    Opaque = 2,
}

/// Why bytes are not the record they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvelopeError {
    /// Too short for a header, or another magic.
    #[error("not a record of sds")]
    Foreign,
    /// Written by a newer sds: version found, version understood.
    #[error("{what} has format version {found}, this sds understands up to {known}: upgrade sds")]
    Newer {
        /// `envelope`, or the kind of the record.
        what: String,
        /// Version found.
        found: u16,
        /// Newest version understood.
        known: u16,
    },
    /// The length of the payload is not what the header says (said, found).
    #[error("truncated record: {said} bytes of payload announced, {found} found")]
    Length {
        /// Bytes that the header announces.
        said: usize,
        /// Bytes that follow it.
        found: usize,
    },
    /// The checksum does not match.
    #[error("checksum mismatch: stored {stored:08x}, computed {computed:08x}")]
    Checksum {
        /// CRC in the header.
        stored: u32,
        /// CRC of what is there.
        computed: u32,
    },
    /// An intact record of another kind or encoding.
    #[error("expected a record of kind {expected:?}, found kind {found}")]
    Kind {
        /// The kind wanted.
        expected: Kind,
        /// Number of the kind found.
        found: u16,
    },
    /// The payload is not what its kind and version promise.
    #[error("bad {kind:?} record: {reason}")]
    Payload {
        /// The kind.
        kind: Kind,
        /// What is wrong with it.
        reason: String,
    },
}

/// A payload with what its envelope says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened<'a> {
    /// What it is.
    pub kind: Kind,
    /// Version of the kind; not compared with anything yet.
    pub kind_version: u16,
    /// The payload, verified.
    pub payload: &'a [u8],
}

fn crc(header: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(payload);
    hasher.finalize()
}

/// Puts a payload into its envelope.
///
/// # Errors
/// [`EnvelopeError::Payload`] if the payload is longer than a value may be.
pub fn seal(
    kind: Kind,
    kind_version: u16,
    encoding: Encoding,
    payload: &[u8],
) -> Result<Vec<u8>, EnvelopeError> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|_| payload.len() <= super::VALUE_BYTES_MAX - HEADER_BYTES)
        .ok_or_else(|| EnvelopeError::Payload {
            kind,
            reason: format!("{} bytes are too many", payload.len()),
        })?;
    let mut header = Header {
        magic: MAGIC,
        version: U16::new(VERSION),
        kind: U16::new(kind as u16),
        kind_version: U16::new(kind_version),
        encoding: U16::new(encoding as u16),
        length: U32::new(length),
        crc: U32::ZERO,
    };
    header.crc = U32::new(crc(&header.as_bytes()[..CRC_OFFSET], payload));
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(payload);
    Ok(bytes)
}

/// Verifies an envelope and gives what is in it.
///
/// # Errors
/// Any [`EnvelopeError`] but `Payload`; a newer envelope is told from a damaged one as far as its
/// magic is intact.
pub fn open(bytes: &[u8], expected: Kind, encoding: Encoding) -> Result<Opened<'_>, EnvelopeError> {
    let (header, payload) = Header::read_from_prefix(bytes).map_err(|_| EnvelopeError::Foreign)?;
    if header.magic != MAGIC {
        return Err(EnvelopeError::Foreign);
    }
    if header.version.get() > VERSION {
        return Err(EnvelopeError::Newer {
            what: "the envelope of the record".into(),
            found: header.version.get(),
            known: VERSION,
        });
    }
    let said = usize::try_from(header.length.get()).unwrap_or(usize::MAX);
    if said != payload.len() {
        return Err(EnvelopeError::Length { said, found: payload.len() });
    }
    let computed = crc(&bytes[..CRC_OFFSET], payload);
    if computed != header.crc.get() {
        return Err(EnvelopeError::Checksum { stored: header.crc.get(), computed });
    }
    let kind = Kind::from_number(header.kind.get());
    if kind != Some(expected) || header.encoding.get() != encoding as u16 {
        return Err(EnvelopeError::Kind { expected, found: header.kind.get() });
    }
    Ok(Opened { kind: expected, kind_version: header.kind_version.get(), payload })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn layout_is_pinned() {
        let bytes = seal(Kind::Pool, 3, Encoding::Json, b"{}").unwrap();
        assert_eq!(bytes[..16], *b"SDSM\x01\x00\x03\x00\x03\x00\x01\x00\x02\x00\x00\x00");
        assert_eq!(bytes[16..20], crc(&bytes[..16], b"{}").to_le_bytes());
        assert_eq!(bytes[20..], *b"{}");
    }

    #[test]
    fn wrong_kind_and_newer_version_are_told_apart() {
        let bytes = seal(Kind::Pool, 1, Encoding::Json, b"{}").unwrap();
        let error = open(&bytes, Kind::Disk, Encoding::Json).unwrap_err();
        assert_eq!(error, EnvelopeError::Kind { expected: Kind::Disk, found: 3 });
        let mut newer = bytes.clone();
        newer[4] = 2;
        let error = open(&newer, Kind::Pool, Encoding::Json).unwrap_err();
        assert!(matches!(error, EnvelopeError::Newer { found: 2, known: 1, .. }), "{error}");
        assert_eq!(open(b"", Kind::Pool, Encoding::Json), Err(EnvelopeError::Foreign));
    }

    proptest! {
        #[test]
        fn any_change_is_found(
            payload in prop::collection::vec(any::<u8>(), 0..200),
            at in any::<prop::sample::Index>(),
            flip in 1_u8..,
        ) {
            let bytes = seal(Kind::Root, 1, Encoding::Opaque, &payload).unwrap();
            let opened = open(&bytes, Kind::Root, Encoding::Opaque).unwrap();
            prop_assert_eq!(opened.payload, &payload[..]);
            let mut bad = bytes.clone();
            let at = at.index(bad.len());
            bad[at] ^= flip;
            prop_assert!(open(&bad, Kind::Root, Encoding::Opaque).is_err());
            prop_assert!(open(&bytes[..at], Kind::Root, Encoding::Opaque).is_err());
        }

        #[test]
        fn garbage_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(open(&bytes, Kind::Root, Encoding::Opaque).is_err());
        }
    }
}
