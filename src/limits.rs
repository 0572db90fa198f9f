//! Every bound of the system, each with its reason; const asserts relate them to each other.

use crate::id::BLOCK_SIZE;

/// Largest payload of one NBD request, bytes.
pub const REQUEST_BYTES_MAX: usize = 32 << 20;
/// Largest number of data shards of a segment.
pub const DATA_SHARDS_MAX: usize = 16;
/// Largest number of parity shards (or further copies) of a segment.
pub const PARITY_SHARDS_MAX: usize = 4;
/// Largest number of shards of a segment.
pub const SHARDS_MAX: usize = DATA_SHARDS_MAX + PARITY_SHARDS_MAX;
/// Smallest size of a slot, bytes.
pub const SLOT_BYTES_MIN: u64 = 64 << 10;
/// Largest size of a slot, bytes: `DATA_SHARDS_MAX` of them are addressed with 20 bits of blocks.
pub const SLOT_BYTES_MAX: u64 = 256 << 20;
/// Bits of a block's address within its segment.
pub const SEGMENT_BLOCK_BITS: u32 = 20;
/// Bits of a segment's number.
pub const SEGMENT_ID_BITS: u32 = 36;
/// Segment numbers granted to a head at a time.
pub const SEGMENT_RANGE: u64 = 65_536;
/// Slots of a disk that only checkpoints take, at least (see [`crate::shard::reserve`]).
pub const CHECKPOINT_SLOTS_MIN: u32 = 6;
/// The same, percent of the disk's slots.
pub const CHECKPOINT_SLOTS_PERCENT: u32 = 2;
/// Of those, the ones that hold no index pages: the meta segment that was open before and has no
/// room left, the last one that pages fill in part, and the one of the table.
pub const CHECKPOINT_SLOTS_FIXED: u32 = 3;
/// Index pages that one checkpoint must be able to write whatever the size of the disks.
pub const CHECKPOINT_PAGES_MIN: u64 = 40;
/// Slots of a disk that only the log takes, for trims and what has its LSN already, at least.
pub const TRIM_SLOTS_MIN: u32 = 2;
/// The same, percent of the disk's slots.
pub const TRIM_SLOTS_PERCENT: u32 = 1;
/// Slots of a disk that garbage collection may take and clients may not, at least: a segment to
/// be filled, and one that was left partly filled by a failure.
pub const GC_SLOTS_MIN: u32 = 3;
/// The same, percent of the disk's slots.
pub const GC_SLOTS_PERCENT: u32 = 2;
/// Slots of a disk that repair may take and clients may not, at least.
pub const REPAIR_SLOTS_MIN: u32 = 1;
/// The same, percent of the disk's slots.
pub const REPAIR_SLOTS_PERCENT: u32 = 1;
/// Largest size of a volume, bytes.
pub const VOLUME_BYTES_MAX: u64 = 1 << 50;
/// Blocks in the header of a record, at most.
pub const RECORD_HEADER_BLOCKS_MAX: usize = 2;
/// Payload blocks of one record, per shard, at most.
pub const RECORD_PAYLOAD_BLOCKS_MAX: usize = 512;
/// Entries of one record, at most.
pub const RECORD_ENTRIES_MAX: usize = 120;
/// Bytes a second, read and written, that repair and scrub of a node may always have, whatever
/// clients feel: redundancy must come back.
pub const BACKGROUND_BYTES_PER_SECOND_MIN: u64 = 8 << 20;
/// … that they may have while a segment waits that survives no further loss …
pub const BACKGROUND_BYTES_PER_SECOND_SOON: u64 = 64 << 20;
/// … and at most while clients are at work.
pub const BACKGROUND_BYTES_PER_SECOND_MAX: u64 = 16 << 30;
/// Segments of one volume that are repaired at once.
pub const REPAIR_SEGMENTS_MAX: usize = 8;
/// Memory that the repairs of a node have for blocks, bytes: what they read ahead, rebuilt and write.
pub const REPAIR_BYTES_MAX: usize = 96 << 20;
/// Blocks of each shard that repair reads at a time.
pub const REPAIR_WINDOW_BLOCKS: u32 = 128;
/// Windows of one segment that are read at once, ahead of what is written.
pub const REPAIR_WINDOWS_AHEAD: usize = 3;
/// Appends to each new shard that are under way at once.
pub const REPAIR_APPENDS_MAX: usize = 2;
/// Connections that one export listener serves at once.
pub const CONNECTIONS_MAX: usize = 1024;
/// Requests of one connection that run at once.
pub const CONNECTION_REQUESTS_MAX: usize = 128;
/// Payload bytes of one connection under way at once (writes received, reads not yet sent).
pub const CONNECTION_BYTES_MAX: usize = 2 * REQUEST_BYTES_MAX;
/// Payload bytes that each connection may have under way whatever the others do.
pub const CONNECTION_BYTES_FREE: usize = 256 << 10;
/// Payload bytes of all connections of a server beyond [`CONNECTION_BYTES_FREE`] each.
pub const SERVER_BYTES_MAX: usize = 256 << 20;
/// Data of one option of an NBD negotiation, bytes: what is larger is skipped and refused.
pub const NBD_OPTION_BYTES_MAX: usize = 64 << 10;
/// Options of one NBD negotiation.
pub const NBD_OPTIONS_MAX: usize = 1024;
/// Extents in one reply to a block status request.
pub const NBD_EXTENTS_MAX: usize = 4096;
/// Bytes that one call of a target reads for an NBD request; longer reads are split.
pub const NBD_READ_PIECE_BYTES: usize = 4 << 20;

/// Payload of one message between nodes, bytes: the largest write that a client may make.
pub const RPC_MESSAGE_BYTES_MAX: usize = REQUEST_BYTES_MAX;
/// Payload of one frame of it, bytes: what a small message may have to wait for.
pub const RPC_FRAME_BYTES_MAX: usize = 128 << 10;
/// Control part of a message between nodes, bytes: it holds a checksum for each block of a payload.
pub const RPC_CONTROL_BYTES_MAX: usize = 64 << 10;
/// Bytes that one request to a volume of another node reads or writes; longer ones are split.
pub const RPC_VOLUME_PIECE_BYTES: usize = 4 << 20;
/// Question to another node, and its answer, bytes.
pub const RPC_ASK_BYTES_MAX: usize = 4 << 20;
/// Requests of one connection between nodes that are under way at once.
pub const RPC_REQUESTS_MAX: u32 = 512;
/// Requests that wait at one node for another to take them; further ones fail.
pub const RPC_QUEUE_MAX: usize = 16 << 10;
/// Bytes of one such connection under way at once: appends taken up, reads not yet sent. What is
/// larger than half of it counts as half.
pub const RPC_WINDOW_BYTES_MAX: usize = 16 << 20;
/// The least that a connection is given; it is refused if there is not so much.
pub const RPC_WINDOW_BYTES_MIN: usize = 1 << 20;
/// Bytes that the windows of all connections of a server of disks have together.
pub const RPC_SERVER_BYTES_MAX: usize = 512 << 20;

const _: () = assert!(
    RPC_VOLUME_PIECE_BYTES.is_multiple_of(BLOCK_SIZE)
        && RPC_VOLUME_PIECE_BYTES <= RPC_WINDOW_BYTES_MAX / 2
        && RPC_ASK_BYTES_MAX <= RPC_WINDOW_BYTES_MAX / 2,
    "what is sent whole must not be charged for less than it is"
);
const _: () = assert!(
    RPC_CONTROL_BYTES_MAX >= RPC_MESSAGE_BYTES_MAX / BLOCK_SIZE * 4 + 4096,
    "the checksums of the largest append must fit"
);
const _: () = assert!(
    RPC_FRAME_BYTES_MAX.is_multiple_of(BLOCK_SIZE)
        && RPC_MESSAGE_BYTES_MAX as u64 >= SLOT_BYTES_MAX / BLOCK_SIZE as u64 * 4,
    "frames hold whole blocks; the checksums of a slot fit a message"
);
const _: () = assert!(
    DATA_SHARDS_MAX as u64 * SLOT_BYTES_MAX / BLOCK_SIZE as u64 <= 1 << SEGMENT_BLOCK_BITS,
    "a block's address in a segment must fit its bits"
);
const _: () = assert!(
    (CHECKPOINT_SLOTS_MIN - CHECKPOINT_SLOTS_FIXED) as u64
        * (SLOT_BYTES_MIN / BLOCK_SIZE as u64 - 2)
        >= CHECKPOINT_PAGES_MIN,
    "the reserve of the smallest disk must hold a checkpoint"
);
const _: () = assert!(
    TRIM_SLOTS_MIN >= 2 && GC_SLOTS_MIN >= 2 && REPAIR_SLOTS_MIN >= 1,
    "each class needs room to do its work while the one below it waits"
);
const _: () = assert!(
    CHECKPOINT_SLOTS_PERCENT + TRIM_SLOTS_PERCENT + GC_SLOTS_PERCENT + REPAIR_SLOTS_PERCENT <= 10,
    "most of a disk is the clients'"
);
/// Blocks that the repair of one segment holds at most, where each window is read from `read` shards
/// and rebuilt for `built` others: windows being read, with what becomes of them and one shard's
/// headers; the record that is being put together; what is being appended.
pub const fn repair_blocks(read: usize, built: usize) -> usize {
    let window = REPAIR_WINDOW_BLOCKS as usize;
    let record = RECORD_HEADER_BLOCKS_MAX + RECORD_PAYLOAD_BLOCKS_MAX;
    REPAIR_WINDOWS_AHEAD * window * (read + built + 1)
        + (record + 2 * window) * (built + 1)
        + (REPAIR_APPENDS_MAX + 1) * (record + window) * built
}

const _: () = assert!(
    repair_blocks(DATA_SHARDS_MAX, PARITY_SHARDS_MAX) * BLOCK_SIZE <= REPAIR_BYTES_MAX,
    "the widest segment must be repaired within the bound"
);
const _: () = assert!(
    BACKGROUND_BYTES_PER_SECOND_MIN < BACKGROUND_BYTES_PER_SECOND_SOON
        && BACKGROUND_BYTES_PER_SECOND_SOON < BACKGROUND_BYTES_PER_SECOND_MAX,
    "there must be a range to regulate in"
);
const _: () = assert!(
    CONNECTION_BYTES_FREE + SERVER_BYTES_MAX >= REQUEST_BYTES_MAX,
    "one request of the largest size must fit"
);
