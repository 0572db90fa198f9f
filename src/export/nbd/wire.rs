//! The bytes of the NBD protocol: every number and header, once. Network byte order throughout.
//!
//! Source: `doc/proto.md` of the `NetworkBlockDevice` project. This module knows no socket and no
//! volume; it turns bytes into structures and back.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First eight bytes that a server sends.
pub const INIT_MAGIC: &[u8; 8] = b"NBDMAGIC";
/// `IHAVEOPT`: second half of the greeting, and start of each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
/// Start of each reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_E889_0455_65A9;
/// Start of each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668E_33EF;
/// Longest string that the protocol allows, bytes.
pub const STRING_BYTES_MAX: usize = 4096;

/// Handshake flags (server and client use the same bits).
pub mod handshake_flag {
    /// Fixed newstyle negotiation.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// No 124 zero bytes after `EXPORT_NAME`.
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Transmission flags: what an export can do.
pub mod export_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is understood.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// The FUA flag is understood.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is understood.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// `WRITE_ZEROES` is understood.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The DF flag is understood.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers all connections.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is understood.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The `FAST_ZERO` flag is understood.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Options of the negotiation.
pub mod option {
    /// Choose an export and start transmission; cannot fail but by closing.
    pub const EXPORT_NAME: u32 = 1;
    /// End the session.
    pub const ABORT: u32 = 2;
    /// List the exports.
    pub const LIST: u32 = 3;
    /// Change to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start transmission.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// List metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of replies to options.
pub mod option_reply {
    /// Success, or the end of a list.
    pub const ACK: u32 = 1;
    /// One export of a list.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    const ERROR: u32 = 1 << 31;
    /// Unknown option.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// Not allowed by this server.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// Malformed option.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// Only after STARTTLS.
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The server is stopping.
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    /// The option is too large.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
}

/// Types of information in an INFO reply.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// Canonical name.
    pub const NAME: u16 = 1;
    /// Block sizes.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Flags of a request.
pub mod command_flag {
    /// Reply only once the data is durable.
    pub const FUA: u16 = 1 << 0;
    /// Zero without giving storage back.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Reply to a read in one piece.
    pub const DF: u16 = 1 << 2;
    /// Report one extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zero fast or fail at once.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Types of chunks of a structured reply.
pub mod chunk {
    /// No content; last of its reply.
    pub const NONE: u16 = 0;
    /// Content of a range.
    pub const OFFSET_DATA: u16 = 1;
    /// Extents of a metadata context.
    pub const BLOCK_STATUS: u16 = 5;
    /// Error without an offset.
    pub const ERROR: u16 = (1 << 15) | 1;
    /// Flag: the last chunk of its reply.
    pub const FLAG_DONE: u16 = 1 << 0;
}

/// States of an extent in the context `base:allocation`.
pub mod extent_state {
    /// No storage behind it.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Name of the one metadata context.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Its number.
pub const BASE_ALLOCATION_ID: u32 = 1;

/// Error numbers of replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Errno {
    /// The export is read-only.
    Perm = 1,
    /// The data cannot be read or written.
    Io = 5,
    /// The request makes no sense or lies beyond the end.
    Inval = 22,
    /// The pool is full, or a write lies beyond the end.
    NoSpc = 28,
    /// The read is too large.
    Overflow = 75,
    /// Not faster than a write.
    NotSup = 95,
    /// The server is stopping.
    Shutdown = 108,
}

impl Errno {
    /// All numbers, in the order of [`Errno::index`].
    pub const ALL: [Self; 7] = [
        Self::Perm,
        Self::Io,
        Self::Inval,
        Self::NoSpc,
        Self::Overflow,
        Self::NotSup,
        Self::Shutdown,
    ];

    /// The number on the wire.
    pub const fn code(self) -> u32 {
        self as u32
    }

    /// Position in [`Errno::ALL`].
    pub const fn index(self) -> usize {
        match self {
            Self::Perm => 0,
            Self::Io => 1,
            Self::Inval => 2,
            Self::NoSpc => 3,
            Self::Overflow => 4,
            Self::NotSup => 5,
            Self::Shutdown => 6,
        }
    }

    /// The name as the protocol document has it, without its prefix.
    pub const fn name(self) -> &'static str {
        ["EPERM", "EIO", "EINVAL", "ENOSPC", "EOVERFLOW", "ENOTSUP", "ESHUTDOWN"][self.index()]
    }
}

/// Commands of the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum Command {
    /// Read a range.
    Read = 0,
    /// Write a range; the payload follows the header.
    Write = 1,
    /// End the session.
    Disconnect = 2,
    /// Make acknowledged writes durable.
    Flush = 3,
    /// The range is not needed any more.
    Trim = 4,
    /// The range will be accessed soon.
    Cache = 5,
    /// Make the range read as zeroes.
    WriteZeroes = 6,
    /// Report the extents of a range.
    BlockStatus = 7,
}

impl Command {
    /// All commands; the position is the number on the wire.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Disconnect,
        Self::Flush,
        Self::Trim,
        Self::Cache,
        Self::WriteZeroes,
        Self::BlockStatus,
    ];

    /// The command with this number.
    pub fn from_wire(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// The name for metrics and logs.
    pub const fn name(self) -> &'static str {
        ["read", "write", "disconnect", "flush", "trim", "cache", "write_zeroes", "block_status"]
            [self as usize]
    }

    /// Whether it changes the volume.
    pub const fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Trim | Self::WriteZeroes)
    }

    /// The flags that are documented for it.
    pub const fn flags(self) -> u16 {
        use command_flag::{DF, FAST_ZERO, FUA, NO_HOLE, REQ_ONE};
        match self {
            Self::Read => FUA | DF,
            Self::WriteZeroes => FUA | NO_HOLE | FAST_ZERO,
            Self::BlockStatus => FUA | REQ_ONE,
            Self::Write | Self::Disconnect | Self::Flush | Self::Trim | Self::Cache => FUA,
        }
    }
}

/// Header of an option that a client sends.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    /// [`OPTION_MAGIC`].
    pub magic: U64,
    /// One of [`option`].
    pub option: U32,
    /// Bytes of data that follow.
    pub len: U32,
}

/// Header of a reply to an option.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionReplyHeader {
    /// [`OPTION_REPLY_MAGIC`].
    pub magic: U64,
    /// The option replied to.
    pub option: U32,
    /// One of [`option_reply`].
    pub kind: U32,
    /// Bytes of data that follow.
    pub len: U32,
}

/// Header of a request.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RequestHeader {
    /// [`REQUEST_MAGIC`].
    pub magic: U32,
    /// Bits of [`command_flag`].
    pub flags: U16,
    /// Number of a [`Command`].
    pub command: U16,
    /// Chosen by the client, returned with the reply.
    pub cookie: U64,
    /// Byte offset.
    pub offset: U64,
    /// Bytes.
    pub len: U32,
}

/// A simple reply; the data of a successful read follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SimpleReply {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub magic: U32,
    /// Zero or an [`Errno`].
    pub error: U32,
    /// The request's.
    pub cookie: U64,
}

/// Header of a chunk of a structured reply.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChunkHeader {
    /// [`CHUNK_MAGIC`].
    pub magic: U32,
    /// [`chunk::FLAG_DONE`] or zero.
    pub flags: U16,
    /// One of [`chunk`].
    pub kind: U16,
    /// The request's.
    pub cookie: U64,
    /// Bytes that follow.
    pub len: U32,
}

/// Header of a chunk with content, and the offset that its payload starts with.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DataChunk {
    /// The header; its length counts the offset too.
    pub header: ChunkHeader,
    /// Byte offset of the content in the export.
    pub offset: U64,
}

/// One extent of a block status chunk.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Extent {
    /// Bytes, not zero.
    pub len: U32,
    /// Bits of [`extent_state`].
    pub state: U32,
}

/// Bytes of a request's header.
pub const REQUEST_HEADER_BYTES: usize = size_of::<RequestHeader>();
/// Bytes of the largest fixed part of a reply.
pub const REPLY_HEADER_BYTES_MAX: usize = size_of::<DataChunk>();

const _: () = assert!(size_of::<OptionHeader>() == 16);
const _: () = assert!(size_of::<OptionReplyHeader>() == 20);
const _: () = assert!(REQUEST_HEADER_BYTES == 28);
const _: () = assert!(size_of::<SimpleReply>() == 16);
const _: () = assert!(size_of::<ChunkHeader>() == 20);
const _: () = assert!(REPLY_HEADER_BYTES_MAX == 28);

impl SimpleReply {
    /// The reply to the request with this cookie.
    pub fn new(cookie: u64, error: Option<Errno>) -> Self {
        Self {
            magic: U32::new(SIMPLE_REPLY_MAGIC),
            error: U32::new(error.map_or(0, Errno::code)),
            cookie: U64::new(cookie),
        }
    }
}

impl ChunkHeader {
    /// A chunk of `len` bytes, `done` for the last of its reply.
    pub fn new(cookie: u64, kind: u16, len: u32, done: bool) -> Self {
        Self {
            magic: U32::new(CHUNK_MAGIC),
            flags: U16::new(if done { chunk::FLAG_DONE } else { 0 }),
            kind: U16::new(kind),
            cookie: U64::new(cookie),
            len: U32::new(len),
        }
    }
}

/// Reads fields of an option's data; every method returns none beyond the end.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    /// A 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        let (value, rest) = U16::read_from_prefix(self.0).ok()?;
        self.0 = rest;
        Some(value.get())
    }

    /// A 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        let (value, rest) = U32::read_from_prefix(self.0).ok()?;
        self.0 = rest;
        Some(value.get())
    }

    /// A string with its length in 32 bits before it.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        let (value, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_agree() {
        for (number, command) in Command::ALL.into_iter().enumerate() {
            assert_eq!(Command::from_wire(u16::try_from(number).unwrap()), Some(command));
        }
        assert_eq!(Command::from_wire(8), None);
        assert_eq!(Command::WriteZeroes.name(), "write_zeroes");
        for (position, errno) in Errno::ALL.into_iter().enumerate() {
            assert_eq!(errno.index(), position);
        }
        assert_eq!((Errno::Shutdown.name(), Errno::Shutdown.code()), ("ESHUTDOWN", 108));
    }

    #[test]
    fn replies_have_the_documented_bytes() {
        assert_eq!(
            SimpleReply::new(0x0102_0304_0506_0708, Some(Errno::NoSpc)).as_bytes(),
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 28, 1, 2, 3, 4, 5, 6, 7, 8]
        );
        assert_eq!(
            ChunkHeader::new(9, chunk::ERROR, 6, true).as_bytes(),
            [0x66, 0x8E, 0x33, 0xEF, 0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 6]
        );
    }

    #[test]
    fn fields_end_where_the_data_ends() {
        let mut fields = Fields(&[0, 0, 0, 2, b'a', b'b', 0, 7, 1]);
        assert_eq!(fields.string(), Some(&b"ab"[..]));
        assert_eq!(fields.u16(), Some(7));
        assert_eq!(fields.u16(), None);
        assert_eq!(Fields(&[0xff, 0xff, 0xff, 0xff, 1]).string(), None);
    }
}
