//! The bytes between nodes: every number and layout, once. Little-endian throughout.
//!
//! A connection begins with a [`Preface`] and its body from either side ([`super::handshake`]).
//! After it come frames:
//!
//! ```text
//! | FrameHeader, 48 bytes | control part | payload part |
//! ```
//!
//! A message (a request or a reply) is one frame, or, if its payload is long, a first frame and
//! [`Kind::More`] frames with the same id; frames of different messages may lie between those. This
//! module knows no socket and no disk. Lengths are judged here, before anybody takes memory for
//! them. What may change between versions, and how, is in `docs/wire-format.md`.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::limits::{RPC_CONTROL_BYTES_MAX, RPC_FRAME_BYTES_MAX, RPC_MESSAGE_BYTES_MAX};

/// First bytes from either side of a connection.
pub const PREFACE_MAGIC: [u8; 8] = *b"sdsRPC\r\n";
/// First bytes of each frame.
pub const FRAME_MAGIC: [u8; 4] = *b"SDSf";
/// Longest body behind a [`Preface`], bytes.
pub const HELLO_BYTES_MAX: usize = 4096;
/// The oldest version of the frames that is understood.
pub const VERSION_MIN: u16 = 1;
/// The newest: 1, the first.
pub const VERSION_MAX: u16 = 1;
/// Bytes of a frame's header.
pub const FRAME_HEADER_BYTES: usize = size_of::<FrameHeader>();

/// What each side sends first. The same in every version, as are the fields that [`Hello`] and
/// [`Welcome`] have now: later ones come behind the names, where an older peer ignores them.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Preface {
    /// [`PREFACE_MAGIC`].
    pub magic: [u8; 8],
    /// Bytes of the body that follows.
    pub len: U32,
    /// CRC-32 of the body.
    pub crc: U32,
}

/// Body from who connects. The node's name follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Hello {
    /// The oldest version of the frames that it understands.
    pub version_min: U16,
    /// The newest.
    pub version_max: U16,
    /// Number of its core.
    pub core: U16,
    /// Number of the other's core that it wants.
    pub to_core: U16,
    /// Bits of what it can beyond the version.
    pub features: U64,
    /// Its cluster.
    pub cluster: [u8; 16],
    /// Its node.
    pub node: [u8; 16],
    /// The node that it means to reach; zero if any.
    pub to_node: [u8; 16],
    /// Random number of the process.
    pub instance: U64,
    /// Counts the connections that the process made to this core.
    pub attempt: U64,
    /// Bytes of the name.
    pub name_len: U16,
    /// Zero.
    pub zero: [u8; 6],
}

/// Body from who was connected to. The node's name and the reason of a refusal follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Welcome {
    /// Zero, or a [`Refusal`].
    pub status: U16,
    /// The version of the frames from now on; its newest where it refuses.
    pub version: U16,
    /// Number of its core.
    pub core: U16,
    /// Bytes of the name.
    pub name_len: U16,
    /// Bytes of the reason.
    pub reason_len: U16,
    /// Zero.
    pub zero: [u8; 6],
    /// Features that both have.
    pub features: U64,
    /// Its cluster.
    pub cluster: [u8; 16],
    /// Its node.
    pub node: [u8; 16],
    /// Requests that may be under way at once.
    pub requests_max: U32,
    /// Zero.
    pub zero_2: U32,
    /// Bytes that may be under way at once: payload of appends, expected payload of reads.
    pub bytes_max: U64,
}

/// Why a connection is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Refusal {
    /// No version is understood by both.
    Version = 1,
    /// It belongs to another cluster.
    Cluster = 2,
    /// It is another node than was meant, or has no such core.
    Node = 3,
    /// A newer connection of the same process and core was taken before.
    Stale = 4,
    /// It has as many connections as it can bear, or is stopping.
    Busy = 5,
    /// The hello makes no sense.
    Malformed = 6,
}

impl Refusal {
    /// All, by number from 1.
    pub const ALL: [Self; 6] =
        [Self::Version, Self::Cluster, Self::Node, Self::Stale, Self::Busy, Self::Malformed];
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// First frame of a request; `code` is an [`Opcode`].
    Request = 1,
    /// First frame of a reply; `code` is zero or a number of [`super::message::status`].
    Reply = 2,
    /// More payload of a message.
    More = 3,
    /// To be answered at once with a pong of the same id.
    Ping = 4,
    /// Answer to a ping.
    Pong = 5,
    /// The sender closes the connection; the control part is the reason as text.
    Goodbye = 6,
}

impl Kind {
    const ALL: [Self; 6] =
        [Self::Request, Self::Reply, Self::More, Self::Ping, Self::Pong, Self::Goodbye];

    fn from_wire(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number.checked_sub(1)?)).copied()
    }
}

/// What a request is sent to. Its number tells, so that no frame has to say it once more: the first
/// 16 bytes of its control part are the id of a disk, or of a volume, or zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Audience {
    /// A disk of the core.
    Disk,
    /// A volume whose head runs there.
    Volume,
    /// The node itself.
    Node,
}

/// What is asked. The position in [`Opcode::ALL`] plus one is the number on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
#[allow(missing_docs, reason = "named after the methods of ShardClient and BlockTarget")]
pub enum Opcode {
    Info = 1,
    Fence = 2,
    Probe = 3,
    Mirror = 4,
    Create = 5,
    Append = 6,
    Seal = 7,
    Delete = 8,
    Read = 9,
    ReadRaw = 10,
    ReadSealed = 11,
    Mend = 12,
    List = 13,
    Volumes = 14,
    DropVolume = 15,
    ForgetVolume = 16,
    PutCatalog = 17,
    GetCatalog = 18,
    Exercise = 19,
    Attach = 20,
    VolumeRead = 21,
    VolumeWrite = 22,
    VolumeZero = 23,
    VolumeFlush = 24,
    VolumeMap = 25,
    Ask = 26,
}

impl Opcode {
    /// All, by number from 1.
    pub const ALL: [Self; 26] = [
        Self::Info,
        Self::Fence,
        Self::Probe,
        Self::Mirror,
        Self::Create,
        Self::Append,
        Self::Seal,
        Self::Delete,
        Self::Read,
        Self::ReadRaw,
        Self::ReadSealed,
        Self::Mend,
        Self::List,
        Self::Volumes,
        Self::DropVolume,
        Self::ForgetVolume,
        Self::PutCatalog,
        Self::GetCatalog,
        Self::Exercise,
        Self::Attach,
        Self::VolumeRead,
        Self::VolumeWrite,
        Self::VolumeZero,
        Self::VolumeFlush,
        Self::VolumeMap,
        Self::Ask,
    ];

    /// The request with this number.
    pub fn from_wire(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number.checked_sub(1)?)).copied()
    }

    /// The number on the wire.
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// What it is sent to.
    pub fn audience(self) -> Audience {
        if self < Self::Attach {
            Audience::Disk
        } else if self < Self::Ask {
            Audience::Volume
        } else {
            Audience::Node
        }
    }
}

/// Flags of a frame.
pub mod flag {
    /// More frames of the message follow.
    pub const MORE: u8 = 1 << 0;
    /// `payload_crc` is the CRC-32 of the frame's payload; without it, the payload's blocks have
    /// checksums of their own, which the end user compares. The same in all frames of a message.
    pub const PAYLOAD_CRC: u8 = 1 << 1;
}

/// Start of each frame.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FrameHeader {
    /// [`FRAME_MAGIC`].
    pub magic: [u8; 4],
    /// The version that was agreed on.
    pub version: U16,
    /// A [`Kind`].
    pub kind: u8,
    /// Bits of [`flag`].
    pub flags: u8,
    /// What is asked, or how it went.
    pub code: U16,
    /// Zero.
    pub zero: U16,
    /// Bytes of the control part.
    pub control_len: U32,
    /// Chosen by who asks, returned with the reply.
    pub id: U64,
    /// Bytes of payload in this frame.
    pub payload_len: U32,
    /// Bytes of payload of the whole message.
    pub payload_total: U32,
    /// Offset of this frame's payload in the message's, bytes.
    pub payload_at: U32,
    /// See [`flag::PAYLOAD_CRC`]; else zero.
    pub payload_crc: U32,
    /// Zero.
    pub zero_2: U32,
    /// CRC-32 of the header up to here and the control part.
    pub crc: U32,
}

const _: () = assert!(size_of::<Preface>() == 16);
const _: () = assert!(size_of::<Hello>() == 88);
const _: () = assert!(size_of::<Welcome>() == 72);
const _: () = assert!(FRAME_HEADER_BYTES == 48);
/// Bytes of the header that its checksum covers.
const CHECKED_BYTES: usize = FRAME_HEADER_BYTES - 4;

/// How a peer broke the protocol. The connection is closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// Something else than a frame.
    #[error("garbage instead of a frame: {0:02x?}")]
    Magic([u8; 4]),
    /// A frame of a version that was not agreed on.
    #[error("a frame of version {0}")]
    Version(u16),
    /// A frame of an unknown kind, or one that this side must not get.
    #[error("a frame of kind {0}")]
    Kind(u8),
    /// A length beyond its bound.
    #[error("{what} of {len} bytes, at most {max}")]
    TooLong {
        /// Of what.
        what: &'static str,
        /// Bytes.
        len: usize,
        /// Bytes.
        max: usize,
    },
    /// The checksum of the header and control part does not match.
    #[error("the checksum of a header does not match")]
    Checksum,
    /// The checksum of a payload does not match.
    #[error("the checksum of a payload does not match")]
    PayloadChecksum,
    /// Fields of a frame contradict each other or what was agreed on.
    #[error("{0}")]
    Incoherent(&'static str),
    /// A control part that cannot be read.
    #[error("malformed {0}")]
    Malformed(&'static str),
}

impl FrameHeader {
    /// A frame of `kind` without payload and control part. [`FrameHeader::seal`] completes it.
    pub fn new(version: u16, kind: Kind, code: u16, id: u64) -> Self {
        Self {
            magic: FRAME_MAGIC,
            version: U16::new(version),
            kind: kind as u8,
            flags: 0,
            code: U16::new(code),
            zero: U16::ZERO,
            control_len: U32::ZERO,
            id: U64::new(id),
            payload_len: U32::ZERO,
            payload_total: U32::ZERO,
            payload_at: U32::ZERO,
            payload_crc: U32::ZERO,
            zero_2: U32::ZERO,
            crc: U32::ZERO,
        }
    }

    /// Sets the checksum. `control` must be the control part.
    pub fn seal(&mut self, control: &[u8]) {
        self.crc = U32::new(self.checksum(control));
    }

    /// Compares the checksum.
    pub fn verify(&self, control: &[u8]) -> Result<(), Violation> {
        if self.crc.get() == self.checksum(control) { Ok(()) } else { Err(Violation::Checksum) }
    }

    fn checksum(&self, control: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.as_bytes()[..CHECKED_BYTES]);
        hasher.update(control);
        hasher.finalize()
    }

    /// Judges a header before its control part is there; gives its kind. Bounds every length.
    pub fn check(&self, version: u16) -> Result<Kind, Violation> {
        if self.magic != FRAME_MAGIC {
            return Err(Violation::Magic(self.magic));
        }
        if self.version.get() != version {
            return Err(Violation::Version(self.version.get()));
        }
        let kind = Kind::from_wire(self.kind).ok_or(Violation::Kind(self.kind))?;
        bounded("a control part", self.control_len.get(), RPC_CONTROL_BYTES_MAX)?;
        bounded("a frame's payload", self.payload_len.get(), RPC_FRAME_BYTES_MAX)?;
        bounded("a payload", self.payload_total.get(), RPC_MESSAGE_BYTES_MAX)?;
        let end = self.payload_at.get().checked_add(self.payload_len.get());
        let more = self.flags & flag::MORE != 0;
        let total = self.payload_total.get();
        let fits = end.is_some_and(|end| if more { end < total } else { end == total });
        let started = match kind {
            Kind::Request | Kind::Reply => self.payload_at.get() == 0,
            Kind::More => self.payload_at.get() > 0 && self.control_len.get() == 0,
            Kind::Ping | Kind::Pong | Kind::Goodbye => total == 0,
        };
        let empty_but_part = self.payload_len.get() == 0 && (more || kind == Kind::More);
        if !fits || !started || empty_but_part {
            return Err(Violation::Incoherent("the parts of a payload do not fit each other"));
        }
        if self.flags & !(flag::MORE | flag::PAYLOAD_CRC) != 0 {
            return Err(Violation::Incoherent("unknown flags"));
        }
        Ok(kind)
    }
}

fn bounded(what: &'static str, len: u32, max: usize) -> Result<(), Violation> {
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    if len > max { Err(Violation::TooLong { what, len, max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_positions() {
        for (number, opcode) in (1..).zip(Opcode::ALL) {
            assert_eq!((opcode.number(), Opcode::from_wire(number)), (number, Some(opcode)));
        }
        assert_eq!((Opcode::from_wire(0), Opcode::from_wire(27)), (None, None));
        for (number, kind) in (1..).zip(Kind::ALL) {
            assert_eq!((kind as u8, Kind::from_wire(number)), (number, Some(kind)));
        }
        assert_eq!((Kind::from_wire(0), Kind::from_wire(7)), (None, None));
    }

    #[test]
    fn a_changed_bit_is_noticed() {
        let mut header = FrameHeader::new(1, Kind::Request, 3, 77);
        header.control_len = U32::new(4);
        header.seal(b"abcd");
        assert_eq!(header.verify(b"abcd"), Ok(()));
        assert_eq!(header.verify(b"abce"), Err(Violation::Checksum));
        for bit in 0..CHECKED_BYTES * 8 {
            let mut bytes: [u8; FRAME_HEADER_BYTES] = header.as_bytes().try_into().unwrap();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let changed = FrameHeader::read_from_bytes(&bytes[..]).unwrap();
            assert!(changed.verify(b"abcd").is_err(), "bit {bit}");
        }
    }

    #[test]
    fn lengths_are_bounded_before_anything_else() {
        let check = |change: fn(&mut FrameHeader)| {
            let mut header = FrameHeader::new(1, Kind::Request, 1, 1);
            change(&mut header);
            header.check(1)
        };
        assert_eq!(check(|_| ()), Ok(Kind::Request));
        assert!(matches!(
            check(|h| h.control_len = U32::MAX_VALUE),
            Err(Violation::TooLong { what: "a control part", .. })
        ));
        assert!(matches!(
            check(|h| h.payload_len = U32::MAX_VALUE),
            Err(Violation::TooLong { .. })
        ));
        assert!(matches!(
            check(|h| h.payload_total = U32::MAX_VALUE),
            Err(Violation::TooLong { what: "a payload", .. })
        ));
        assert!(check(|h| h.payload_total = U32::new(8)).is_err(), "an end that never comes");
        assert!(check(|h| h.payload_at = U32::MAX_VALUE).is_err());
        assert!(check(|h| h.flags = flag::MORE).is_err(), "empty, and more to come");
        assert!(check(|h| h.flags = 0x80).is_err());
        assert!(check(|h| h.kind = 9).is_err());
        assert!(check(|h| h.version = U16::new(2)).is_err());
    }
}
