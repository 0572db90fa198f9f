//! Newtypes for everything that is counted or named, so that no two of them are ever mixed up.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Size of the unit of placement, checksums and the index, in bytes.
pub const BLOCK_SIZE: usize = 4096;
/// [`BLOCK_SIZE`] as a 64-bit value, for byte arithmetic.
pub const BLOCK_BYTES: u64 = BLOCK_SIZE as u64;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub uuid::Uuid);

        impl $name {
            /// The id with these 16 bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(uuid::Uuid::from_bytes(bytes))
            }
            /// The 16 bytes of the id, as stored in every format.
            pub const fn to_bytes(self) -> [u8; 16] {
                *self.0.as_bytes()
            }
            /// Whether this is the all-zero id, which names nothing.
            pub const fn is_nil(self) -> bool {
                self.0.is_nil()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
        impl FromStr for $name {
            type Err = uuid::Error;
            fn from_str(s: &str) -> Result<Self, Self::Err> {
                s.parse().map(Self)
            }
        }
    };
}

uuid_id!(
    /// A disk: written into its superblock when it is formatted; formatting again changes it.
    DiskId
);
uuid_id!(
    /// A volume: random, never used again.
    VolumeId
);
uuid_id!(
    /// One running instance of a volume's head: random, fresh for each take-over.
    HeadId
);
uuid_id!(
    /// A pool.
    PoolId
);
uuid_id!(
    /// A metadata store; a rebuilt store keeps the id and raises the incarnation.
    ClusterId
);
uuid_id!(
    /// A node: a member of a cluster that runs one daemon.
    NodeId
);

/// Number of a segment within its volume; never used again. At most 36 bits.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize,
)]
pub struct SegmentId(pub u64);

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Number of a record in the log of a volume, without holes within an epoch. The first is 1.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize,
)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The number after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Epoch of a volume: the incarnation of the metadata store (upper 24 bits) and the count of the
/// heads the volume has had in it (lower 40 bits). Ordered; the newer fences the older.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    const COUNT_BITS: u32 = 40;
    /// Higher than every epoch of a head: what a tombstone fences with.
    pub const TOMBSTONE: Self = Self(u64::MAX);

    /// The epoch number `count` of the store's `incarnation`.
    pub const fn new(incarnation: u32, count: u64) -> Self {
        assert!(incarnation < 1 << 24 && count < 1 << Self::COUNT_BITS);
        Self(((incarnation as u64) << Self::COUNT_BITS) | count)
    }
    /// Incarnation of the metadata store in which the epoch was given.
    pub const fn incarnation(self) -> u64 {
        self.0 >> Self::COUNT_BITS
    }
    /// Count of the epoch within its incarnation.
    pub const fn count(self) -> u64 {
        self.0 & ((1 << Self::COUNT_BITS) - 1)
    }
    /// The epoch after this one in the same incarnation.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.incarnation(), self.count())
    }
}

impl fmt::Debug for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Epoch({self})")
    }
}
