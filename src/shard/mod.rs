//! The seam to disks near and far: what a head may ask of a disk.
//!
//! A shard is one segment's part on one disk: an append-only array of 4 KiB blocks in a slot. A
//! disk knows shards and fences; it knows nothing of what the blocks mean. [`ShardClient`] is the
//! trait; the local implementation calls [`crate::disk::Disk`], a remote one will speak RPC, and
//! the simulation wraps either with faults.
//!
//! # Rules every implementation keeps
//!
//! - A request carries the [`Authority`] it is made with. A disk refuses ([`ShardError::Fenced`])
//!   an authority whose epoch is lower than the volume's fence, or equal with another head id.
//! - Create, seal and delete first raise the fence to the sender's epoch, durably.
//! - Append: only to an open shard, only at its current length, only by the epoch that created it.
//!   It is answered when it is durable. Appends to one shard may overlap in time: the length grows
//!   when one is taken up, in order; when one fails, every later one fails.
//! - Fence: durable before it is answered; then no in-flight append of an older epoch is still
//!   running: open shards of older epochs are closed and their writes were reaped.
//! - A restart of the disk closes every open shard for appending ([`ShardState::Closed`]).
//! - Delete names the creation it means; a slot is reused only after every I/O on it ended.

pub mod activity;
pub mod budget;
pub mod disks;
pub mod domain;
pub mod latency;
pub mod local;
mod measured;
pub mod pace;
pub mod promise;
pub mod reserve;

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::id::{ClusterId, DiskId, Epoch, HeadId, SegmentId, VolumeId};

/// A future that stays on its core.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// In whose name a request is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Authority {
    /// The volume.
    pub volume: VolumeId,
    /// Epoch of the head.
    pub epoch: Epoch,
    /// Id of the head.
    pub head: HeadId,
}

/// How many data and parity shards a segment has. Replication is `data = 1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Scheme {
    /// Data shards `k`, 1 to 16.
    pub data: u8,
    /// Parity shards (further copies where `data` is 1) `m`, 0 to 4.
    pub parity: u8,
}

impl Scheme {
    /// `1 + parity` copies.
    pub const fn replicated(copies: u8) -> Self {
        Self { data: 1, parity: copies - 1 }
    }
    /// Data and parity shards together.
    pub const fn width(self) -> usize {
        self.data as usize + self.parity as usize
    }
}

/// What a segment is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum SegmentKind {
    /// Records of the volume's log with their payload.
    Log = 1,
    /// Payload in full stripes.
    Data = 2,
    /// Pages of the index and the rest of checkpoints.
    Meta = 3,
}

/// State of a shard on its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum ShardState {
    /// Takes appends from the epoch that created it.
    Open = 1,
    /// Was open when the disk restarted or a newer epoch fenced it; its length is not known to
    /// the disk. Only raw reads, seal and delete.
    Closed = 2,
    /// Immutable, with a known length and the checksums of all its blocks.
    Sealed = 3,
}

/// What a shard is created with; recorded in its slot for ever.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardSpec {
    /// The volume that owns the segment.
    pub volume: VolumeId,
    /// The segment.
    pub segment: SegmentId,
    /// Number that tells this creation from every other of the same segment on the same disk.
    pub creation: u64,
    /// What the segment is for.
    pub kind: SegmentKind,
    /// Its scheme.
    pub scheme: Scheme,
    /// Index of this shard in the write set.
    pub index: u8,
    /// The whole write set, by shard index; `scheme.width()` disks.
    pub members: Vec<DiskId>,
}

/// What a disk knows of a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardInfo {
    /// As given when it was created.
    pub spec: ShardSpec,
    /// Epoch that created it.
    pub epoch: Epoch,
    /// Its state.
    pub state: ShardState,
    /// Length in blocks: sealed length, or what was appended durably since the disk started.
    pub blocks: u32,
}

/// Class of a slot request: higher classes may use reserves that lower ones may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SlotClass {
    /// Fresh writes of clients.
    Client,
    /// Shards that are built anew elsewhere.
    Repair,
    /// Data segments that garbage collection fills.
    Gc,
    /// Log records that trims and moves need, and those that must be written again elsewhere.
    Trim,
    /// Checkpoints: without room for one, nothing could ever be freed, nor the volume taken over.
    Checkpoint,
}

/// An append of whole blocks.
#[derive(Debug, Clone)]
pub struct Append {
    /// In whose name.
    pub authority: Authority,
    /// The segment.
    pub segment: SegmentId,
    /// Offset in blocks; must be the shard's current length.
    pub block: u32,
    /// The blocks: pieces in order, each aligned and a multiple of the block size.
    pub data: Rc<[Bytes]>,
    /// Salted CRC-32 of each block (see [`crate::segment::checksum`]).
    pub crcs: Rc<[u32]>,
}

/// Blocks read from a shard.
#[derive(Debug, Clone)]
pub struct ReadReply {
    /// The blocks, aligned, in one piece.
    pub data: Bytes,
    /// The salted CRC-32 stored for each block; empty for a raw read. The disk has NOT compared
    /// them with the data: the reader does, end to end.
    pub crcs: Vec<u32>,
}

/// A sealed shard as its owner knows it: what a disk must hold exactly so, or refuse the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealedShard {
    /// The volume.
    pub volume: VolumeId,
    /// The segment.
    pub segment: SegmentId,
    /// As in [`ShardSpec::creation`].
    pub creation: u64,
    /// Its length.
    pub blocks: u32,
}

/// What a disk keeps of a volume's root: opaque to the disk, newest revision wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    /// Orders mirrors of one volume: (epoch, sequence) of the root.
    pub revision: (Epoch, u64),
    /// The encoded root; at most [`MIRROR_BYTES_MAX`].
    pub data: Bytes,
}

/// Largest [`Mirror::data`], bytes: it shares a 4 KiB page with the fence.
pub const MIRROR_BYTES_MAX: usize = 3840;

/// Answer to a fence or a list.
#[derive(Debug, Clone, Default)]
pub struct VolumeOnDisk {
    /// All shards of the volume on the disk, sorted by segment.
    pub shards: Vec<ShardInfo>,
    /// The newest root mirrored there.
    pub mirror: Option<Mirror>,
}

/// Identity and fill of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskInfo {
    /// The disk.
    pub id: DiskId,
    /// The cluster it was formatted for.
    pub cluster: ClusterId,
    /// Size of a slot in bytes.
    pub slot_bytes: u64,
    /// All slots.
    pub slots: u32,
    /// Slots in no use.
    pub slots_free: u32,
}

/// A volume's fence on a disk, of [`ShardClient::volumes`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeFence {
    /// The volume.
    pub volume: VolumeId,
    /// Lowest epoch accepted; [`Epoch::TOMBSTONE`] once deleted.
    pub epoch: Epoch,
    /// The head of that epoch.
    pub head: HeadId,
    /// The newest root mirrored there.
    pub mirror: Option<Mirror>,
}

/// Cluster-wide keys (pools, disks) mirrored on each disk, newest revision wins.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Catalog {
    /// Incarnation of the store the revision belongs to.
    pub incarnation: u32,
    /// Highest revision of the store that the disk has heard of.
    pub revision: u64,
    /// Encoded keys; opaque to the disk, at most [`CATALOG_BYTES_MAX`].
    pub data: Bytes,
}

/// Largest [`Catalog::data`], bytes.
pub const CATALOG_BYTES_MAX: usize = 256 << 10;

/// Why a disk did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// A newer head has the volume.
    #[error("fenced by epoch {0}")]
    Fenced(Epoch),
    /// The disk holds no such shard (or another creation of it).
    #[error("no such shard")]
    Gone,
    /// The shard exists already.
    #[error("the shard exists already")]
    Exists,
    /// The shard is not in the state that the request needs.
    #[error("the shard is {0:?}")]
    WrongState(ShardState),
    /// The append is not at the shard's current length (given, blocks), or does not fit.
    #[error("the shard's length is {0} blocks")]
    WrongLength(u32),
    /// No slot left for this class, or no room for another volume.
    #[error("the disk is full")]
    NoSpace,
    /// The medium failed: an I/O error.
    #[error("I/O error: {0}")]
    Io(String),
    /// The stored checksums or tables that cover the request are unreadable.
    #[error("the disk's tables are damaged: {0}")]
    Damaged(String),
    /// The disk is offline, was removed or failed before; it refuses everything until reopened.
    #[error("the disk is offline: {0}")]
    Offline(String),
    /// No answer in time, or the connection broke: the outcome is unknown.
    #[error("the disk does not answer")]
    Unreachable,
    /// The request makes no sense; a defect of the caller.
    #[error("invalid request: {0}")]
    Invalid(String),
}

/// Result of a request to a disk.
pub type ShardResult<T> = Result<T, ShardError>;

/// A disk, near or far, as a head sees it. Object-safe; futures may be dropped at any time, which
/// leaves the outcome unknown but never leaves memory that a device still uses.
pub trait ShardClient {
    /// The disk this client talks to. Requests go to exactly this disk, however it moves.
    fn disk(&self) -> DiskId;

    /// Identity and fill.
    fn info(&self) -> LocalFuture<'_, ShardResult<DiskInfo>>;

    /// Raises the volume's fence to `authority`, stores `mirror` if it is newer, waits until no
    /// append of an older epoch runs, and tells what the disk holds of the volume.
    fn fence(
        &self,
        authority: Authority,
        mirror: Option<Mirror>,
    ) -> LocalFuture<'_, ShardResult<VolumeOnDisk>>;

    /// Answers whether `authority` is not fenced: the read lease. Volatile, no I/O. A disk that
    /// never heard of the volume answers [`ShardError::Gone`].
    fn probe(&self, authority: Authority) -> LocalFuture<'_, ShardResult<()>>;

    /// Stores a newer root mirror; the authority must be the fence's own. Durable when answered.
    fn mirror(&self, authority: Authority, mirror: Mirror) -> LocalFuture<'_, ShardResult<()>>;

    /// Creates an open, empty shard. Durable when answered.
    fn create(
        &self,
        authority: Authority,
        spec: ShardSpec,
        class: SlotClass,
    ) -> LocalFuture<'_, ShardResult<()>>;

    /// Appends blocks; durable when answered.
    fn append(&self, append: Append) -> LocalFuture<'_, ShardResult<()>>;

    /// Seals a shard at `blocks`, cutting what lies beyond. `crcs` gives the salted CRC of every
    /// block of a [`ShardState::Closed`] shard (whose checksums the disk does not have) and is
    /// none for an open one. Sealing a sealed shard at the same length succeeds. Durable when
    /// answered.
    fn seal(
        &self,
        authority: Authority,
        segment: SegmentId,
        blocks: u32,
        crcs: Option<Rc<[u32]>>,
    ) -> LocalFuture<'_, ShardResult<()>>;

    /// Deletes the creation `creation` of a shard; [`ShardError::Gone`] if the disk does not hold
    /// it (which confirms the deletion). Durable when answered.
    fn delete(
        &self,
        authority: Authority,
        segment: SegmentId,
        creation: u64,
    ) -> LocalFuture<'_, ShardResult<()>>;

    /// Reads `count` blocks from `block` of an open (durable part only) or sealed shard.
    fn read(
        &self,
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>>;

    /// Reads blocks of a shard in any state without checksums, anywhere within its slot; the
    /// content beyond what was written is arbitrary. Recovery only.
    fn read_raw(
        &self,
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>>;

    /// Reads `count` blocks from `block` of a sealed shard as they lie on the medium, stored
    /// checksums included: nothing comes from a cache. [`ShardError::Gone`],
    /// [`ShardError::WrongState`] or [`ShardError::WrongLength`] if the disk does not hold exactly
    /// this shard.
    fn read_sealed(
        &self,
        shard: SealedShard,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>>;

    /// Writes one block of a sealed shard again, because what lies there is bad. `crc` is the
    /// salted CRC of `data`; [`ShardError::Invalid`] unless it is the one that was stored when the
    /// shard was sealed, so that a sealed shard never changes. Errors of [`Self::read_sealed`].
    /// Durable when answered.
    fn mend(
        &self,
        authority: Authority,
        shard: SealedShard,
        block: u32,
        data: Bytes,
        crc: u32,
    ) -> LocalFuture<'_, ShardResult<()>>;

    /// What the disk holds of a volume, without fencing.
    fn list(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<VolumeOnDisk>>;

    /// All volumes that the disk has a fence for, sorted by id.
    fn volumes(&self) -> LocalFuture<'_, ShardResult<Vec<VolumeFence>>>;

    /// Deletes all shards of a volume for good and keeps a tombstone that refuses every head.
    /// The caller has the volume's tombstone in the metadata store. Durable when answered.
    fn drop_volume(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<()>>;

    /// Forgets a tombstone, once every disk has confirmed the deletion.
    fn forget_volume(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<()>>;

    /// Stores the mirrored keys if newer than what the disk has. Durable when answered.
    fn put_catalog(&self, catalog: Catalog) -> LocalFuture<'_, ShardResult<()>>;

    /// The mirrored keys; empty with revision 0 on a fresh disk.
    fn get_catalog(&self) -> LocalFuture<'_, ShardResult<Catalog>>;

    /// Reads one block of the device, or writes one durably, and changes nothing by it: how long
    /// that takes is what matters. [`ShardError::Unreachable`] while another such request runs.
    fn exercise(&self, write: bool) -> LocalFuture<'_, ShardResult<()>>;
}
