//! The head: the one running instance of a volume.
//!
//! Owns all state of the volume; everything else in this folder is a part of it. Invariants:
//!
//! - A write is acknowledged only after its record is durable on every shard of the write set and
//!   every record before it is acknowledged or will be in the same order ([`super::log`]).
//! - Reads see acknowledged state only, so what was read once never flips back.
//! - `table.live` equals a full walk of the index; `table.recent` equals what the overlays refer
//!   to; a segment is freed only by a checkpoint that nothing older needs ([`super::segtab`]).
//! - A head serves reads only under a read lease, and stops for good when it hears that it is
//!   fenced.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::NonZeroUsize;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{FuturesUnordered, StreamExt};
use lru::LruCache;
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use super::index::{Malformed, Pages, Tree};
use super::overlay::{Extent, Overlay, Target};
use super::root::Root;
use super::rules::{self, LogSet};
use super::segtab::{Segment, SegmentTable, ShardRef};
use crate::env::Env;
use crate::export::TargetError;
use crate::id::{BLOCK_SIZE, DiskId, Lsn, SegmentId, VolumeId};
use crate::meta::{MetaError, MetaStore};
use crate::obs::throttle::Throttle;
use crate::planted::{Bug, bug};
use crate::segment::BlockAddr;
use crate::segment::fetch::{FetchError, Finding, Source};
use crate::segment::open::OpenSegment;
use crate::segment::record::{CheckpointPlace, Entry};
use crate::shard::disks::{Disks, Member};
use crate::shard::{Authority, Scheme, ShardError, SlotClass};

/// Largest parity of a pool.
#[allow(clippy::cast_possible_truncation, reason = "a small constant")]
const PARITY_MAX: u8 = crate::limits::PARITY_SHARDS_MAX as u8;

/// What a head is tuned with.
#[derive(Debug, Clone)]
pub struct HeadConfig {
    /// Extents of the overlay at which writes wait for a checkpoint.
    pub overlay_extents_max: usize,
    /// Blocks appended to the log at which a checkpoint is made.
    pub checkpoint_log_blocks: u64,
    /// Index pages kept in memory, bytes.
    pub cache_bytes: usize,
    /// For how long an answered probe allows reads.
    pub lease: Duration,
    /// How much later than the first member of an append another may be.
    pub straggler: Duration,
    /// How long requests wait for enough disks before they fail.
    pub io_timeout: Duration,
    /// Blocks of the index that are cut off at a time when a volume shrinks.
    pub cut_blocks: u64,
    /// While space is wanted, a record of fewer blocks waits for those in flight, so that it becomes
    /// larger: each has a header of a block.
    pub thin_record_blocks: usize,
    /// Writes of at least so many blocks go to data segments directly.
    pub large_write_blocks: usize,
    /// Bytes of writes that wait for the log at most.
    pub pending_bytes_max: usize,
    /// How long too few domains of the log set may be reachable before its width shrinks.
    pub shrink_after: Duration,
    /// How long a disk of the log set may be away before another takes its place.
    pub replace_after: Duration,
    /// How long too few domains may be up, while more are expected back, before data segments are
    /// narrowed.
    pub narrow_after: Duration,
    /// Domains of the log set at most, where that is fewer than [`rules::log_domains`].
    pub log_domains_max: usize,
    /// Within how long every sealed shard is read and checked, again and again; none: only when it
    /// is asked for.
    pub scrub_period: Option<Duration>,
    /// Blocks of each shard that repair reads at a time, [`REPAIR_WINDOW_BLOCKS`] at most.
    ///
    /// [`REPAIR_WINDOW_BLOCKS`]: crate::limits::REPAIR_WINDOW_BLOCKS
    pub repair_window_blocks: u32,
    /// Pause between two rounds of moving shards to where there is room, about; none: they stay where
    /// they are.
    pub balance_every: Option<Duration>,
    /// Seconds since 1970, for what people read.
    pub unix_seconds: fn() -> u64,
}

impl Default for HeadConfig {
    fn default() -> Self {
        Self {
            overlay_extents_max: 64 << 10,
            checkpoint_log_blocks: 64 << 10,
            cache_bytes: 16 << 20,
            lease: Duration::from_secs(1),
            straggler: Duration::from_millis(500),
            io_timeout: Duration::from_secs(30),
            cut_blocks: 1 << 21,
            thin_record_blocks: 32,
            large_write_blocks: 32,
            pending_bytes_max: 16 << 20,
            shrink_after: Duration::from_millis(500),
            replace_after: Duration::from_secs(10),
            narrow_after: Duration::from_mins(10),
            log_domains_max: rules::log_domains(PARITY_MAX),
            scrub_period: Some(super::scrub::DEFAULT_PERIOD),
            repair_window_blocks: crate::limits::REPAIR_WINDOW_BLOCKS,
            balance_every: Some(super::balance::EVERY),
            unix_seconds: || 0,
        }
    }
}

/// Redundancy of the pool a volume lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolPolicy {
    /// Scheme of its data segments.
    pub scheme: Scheme,
    /// Copies below which writes wait.
    pub min_size: u8,
}

impl PoolPolicy {
    /// Scheme of log and meta segments: as many losses survived, by copies.
    pub const fn log_scheme(self) -> Scheme {
        Scheme { data: 1, parity: self.scheme.parity }
    }
}

/// Counters of a head, read at scrape.
#[derive(Debug, Default)]
pub struct HeadStats {
    /// Records acknowledged.
    pub records: Cell<u64>,
    /// Log segments closed because a member failed or was slow.
    pub failovers: Cell<u64>,
    /// Checkpoints made.
    pub checkpoints: Cell<u64>,
    /// Blocks that did not match their checksum when read.
    pub corrupt_blocks: Cell<u64>,
    /// Shards rebuilt.
    pub rebuilt_shards: Cell<u64>,
    /// Bytes rebuilt.
    pub rebuilt_bytes: Cell<u64>,
    /// Shards moved to where there is more room.
    pub balanced_shards: Cell<u64>,
    /// Bytes of them.
    pub balanced_bytes: Cell<u64>,
    /// Bytes that repairs read.
    pub repair_read_bytes: Cell<u64>,
    /// Bytes that scrubs read.
    pub scrub_bytes: Cell<u64>,
    /// Bad blocks and shards that scrubs found, and those of reads that were mended in place.
    pub scrub_found: Cell<u64>,
    /// Of them, those that were mended or built anew.
    pub scrub_repaired: Cell<u64>,
    /// Blocks moved by garbage collection.
    pub moved_blocks: Cell<u64>,
    /// Blocks written to segments (all copies counted once), headers included.
    pub appended_blocks: Cell<u64>,
    /// Blocks written by clients.
    pub client_blocks: Cell<u64>,
}

/// Adds to a counter.
pub(crate) fn add(counter: &Cell<u64>, by: u64) {
    counter.set(counter.get() + by);
}

/// Something that waits to become part of a record.
pub(super) struct Op {
    pub(super) entries: Vec<Entry>,
    pub(super) payload: Vec<Bytes>,
    /// Raw CRC of each payload block.
    pub(super) crcs: Vec<u32>,
    pub(super) class: SlotClass,
    /// Generation of the index that moves were looked up in.
    pub(super) generation: u64,
    pub(super) done: Option<oneshot::Sender<Result<(), TargetError>>>,
}

impl Op {
    pub(super) fn finish(self, result: Result<(), TargetError>) {
        if let Some(done) = self.done {
            // The client may have gone: its outcome is then nobody's.
            drop(done.send(result));
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.crcs.len() * BLOCK_SIZE
    }
}

/// A record that was given an LSN and is not acknowledged yet.
pub(super) struct Flight {
    pub(super) lsn: Lsn,
    pub(super) entries: Vec<Entry>,
    pub(super) payload: Vec<Bytes>,
    pub(super) crcs: Vec<u32>,
    pub(super) ops: Vec<Op>,
    /// First payload block in the segment it was sent to.
    pub(super) payload_block: u32,
    /// Where its header lies there.
    pub(super) block: u32,
    pub(super) end: u32,
    /// Bit per shard that has it.
    pub(super) done: u32,
    pub(super) sent: Instant,
    pub(super) first_done: Option<Instant>,
}

/// The newest content of a block that sub-block writes are being merged into.
#[derive(Default)]
pub(super) struct Chain {
    /// None while the committed content is being read.
    pub(super) content: Option<Bytes>,
    pub(super) users: usize,
}

/// All that changes.
#[allow(clippy::struct_excessive_bools, reason = "each says something else")]
pub(super) struct State {
    pub(super) size: u64,
    /// Nothing is mapped beyond this many bytes: larger than the size while what a shrink left is
    /// being cut off.
    pub(super) reach: u64,
    pub(super) tree: Tree,
    /// Counts the trees there have been.
    pub(super) generation: u64,
    pub(super) overlay: Overlay,
    pub(super) frozen: Option<Rc<Overlay>>,
    pub(super) table: SegmentTable,
    pub(super) next_lsn: Lsn,
    pub(super) acked: Lsn,
    pub(super) pending: VecDeque<Op>,
    pub(super) pending_bytes: usize,
    /// Given an LSN, not sent yet.
    pub(super) queue: VecDeque<Flight>,
    /// Sent, in LSN order.
    pub(super) flights: VecDeque<Flight>,
    pub(super) log: Option<Rc<OpenSegment>>,
    pub(super) meta: Option<Rc<OpenSegment>>,
    /// While no log segment is open: no number below this will be the next one's.
    pub(super) log_floor: u64,
    pub(super) next_segment: u64,
    pub(super) root: Root,
    pub(super) root_revision: u64,
    pub(super) root_in_force: bool,
    /// Swapped, but not in force yet.
    pub(super) pending_root: Option<Root>,
    /// The set of a swap that is under way: binds from capture until the outcome is known.
    pub(super) wanted: Option<LogSet>,
    /// A set that the next checkpoint is to bring: new segments suit it if they can.
    pub(super) planned: Option<LogSet>,
    /// Write sets of the log segments that the root in force does not list as sealed.
    pub(super) open_sets: BTreeMap<SegmentId, BTreeSet<DiskId>>,
    /// Where replay begins from the newest durable checkpoint, and from the root's: log segments
    /// with lower numbers are listed as sealed there, with all that they hold.
    pub(super) checkpoint_log: SegmentId,
    pub(super) root_log: SegmentId,
    /// The same for the root that is pending.
    pub(super) pending_log: SegmentId,
    /// The log goes on in another segment as soon as nothing is in flight.
    pub(super) roll_log: bool,
    /// Disks that are away, since when; and those of which the node says that they are lost.
    pub(super) away: BTreeMap<DiskId, Instant>,
    pub(super) lost: BTreeSet<DiskId>,
    /// When something last failed because too few domains were there.
    pub(super) starved_at: Option<Instant>,
    /// The newest index holds everything up to here.
    pub(super) merged_lsn: Lsn,
    /// The newest durable checkpoint, whether the root names it yet or not.
    pub(super) checkpoint: Option<super::root::CheckpointRef>,
    /// What that checkpoint lists as freed: deleted when the root names it.
    pub(super) listed: Vec<(SegmentId, ShardRef)>,
    pub(super) log_blocks: u64,
    pub(super) lease: BTreeMap<DiskId, Instant>,
    pub(super) chains: BTreeMap<u64, Chain>,
    pub(super) stopped: Option<String>,
    /// Takes no more requests; what was taken is still being written.
    pub(super) draining: bool,
    /// Nothing waits any more; the last checkpoint is being made.
    pub(super) releasing: bool,
    /// Since when writes wait for disks.
    pub(super) stalled_since: Option<Instant>,
}

/// The head of a volume.
pub struct Head {
    /// The volume.
    pub volume: VolumeId,
    /// In whose name it acts.
    pub authority: Authority,
    pub(super) env: Env,
    pub(super) disks: Rc<Disks>,
    pub(super) store: Rc<dyn MetaStore>,
    pub(super) config: HeadConfig,
    pub(super) pool: PoolPolicy,
    pub(super) state: RefCell<State>,
    pub(super) cache: RefCell<LruCache<BlockAddr, Bytes>>,
    /// Wakes the log's task.
    pub(super) wake: Notify,
    /// Told after records were applied, and when the head stops.
    pub(super) applied: Notify,
    /// Wakes the task that makes checkpoints.
    pub(super) checkpoint_wanted: Notify,
    /// Wakes the task that repairs.
    pub(super) repair_wanted: Notify,
    /// Wakes the task that collects garbage.
    pub(super) gc_wanted: Notify,
    /// Wakes the tasks that tend the log set.
    pub(super) width_wanted: Notify,
    /// Held by whoever makes a checkpoint.
    pub(super) checkpoint_lock: tokio::sync::Mutex<()>,
    /// Swaps of the root.
    pub(super) swaps: super::swap::Swaps,
    /// Where the log stood when the newest checkpoint began.
    pub(super) capture: RefCell<super::checkpoint::Capture>,
    /// Pages that the next checkpoint rewrites, to empty their segments.
    pub(super) relocate: RefCell<super::index::Relocate>,
    /// Segments to be moved, because a shard of them can be rebuilt nowhere.
    pub(super) torn: RefCell<BTreeSet<SegmentId>>,
    /// What slow disks are to delete is being deleted.
    pub(super) deletes_slowly: Cell<bool>,
    pub(super) repair: super::repair::Repair,
    pub(super) balance: super::balance::Balance,
    pub(super) dense: super::dense::Dense,
    pub(super) narrow: super::narrow::Narrow,
    pub(super) space: super::space::Space,
    /// Bounds how often it is logged that a block is bad.
    findings_told: Throttle,
    pub(super) scrub: super::scrub::Scrub,
    /// Counts this head among those that share the disks.
    pub(super) member: Member,
    /// Counters.
    pub stats: HeadStats,
    /// For tasks that must not keep the head alive.
    pub(super) this: std::rc::Weak<Self>,
}

/// Why an internal operation failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum HeadError {
    /// Blocks cannot be read.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// An index page is malformed.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// No segment can be opened.
    #[error("cannot open a segment: {0}")]
    Open(#[from] crate::segment::open::OpenError),
    /// An append to a segment failed.
    #[error("an append failed")]
    Append,
    /// The segment that was opened is too small for what was to be appended.
    #[error("the append is larger than a segment")]
    TooLarge,
    /// The metadata store failed.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// The log set cannot be changed so now.
    #[error("the log set cannot be changed: {0}")]
    Set(&'static str),
    /// The head has stopped.
    #[error("the head stopped: {0}")]
    Stopped(String),
}

impl State {
    /// Maps an extent, keeping the counters.
    pub(super) fn map(&mut self, extent: Extent) {
        let count = |len: u64| i64::try_from(len).expect("an extent lies in one segment");
        if let Target::Data(addr) = extent.target {
            self.table.add_recent(addr.segment, count(extent.len));
        }
        let table = &mut self.table;
        self.overlay.insert(extent, |old| {
            if let Target::Data(addr) = old.target {
                table.add_recent(addr.segment, -count(old.len));
            }
        });
    }

    /// What the overlays say of one block.
    pub(super) fn overlay_target(&self, lba: u64) -> Option<Target> {
        let of = |overlay: &Overlay| overlay.range(lba, 1).next().map(|e| e.target);
        of(&self.overlay).or_else(|| self.frozen.as_deref().and_then(of))
    }

    /// Applies the entries of an acknowledged record whose payload starts at `payload`.
    ///
    /// `unmapped_matches(lba, from)` tells whether a block that no overlay maps lies at `from`
    /// according to the index.
    pub(super) fn apply(
        &mut self,
        segment: SegmentId,
        payload: u32,
        entries: &[Entry],
        unmapped_matches: &dyn Fn(u64, BlockAddr) -> bool,
    ) {
        let mut block = payload;
        for entry in entries {
            match *entry {
                Entry::Write { lba, blocks } => {
                    let target = Target::Data(BlockAddr { segment, block });
                    self.map(Extent { lba, len: blocks.into(), target });
                    block += blocks;
                }
                Entry::Zero { lba, blocks, allocated } => {
                    let target = if allocated { Target::Zero } else { Target::Hole };
                    self.map(Extent { lba, len: blocks, target });
                }
                Entry::Place { lba, blocks, addr } => {
                    let target = Target::Data(addr);
                    self.map(Extent { lba, len: blocks.into(), target });
                }
                Entry::Move { lba, blocks, from, to } => {
                    for i in 0..blocks {
                        let here = lba + u64::from(i);
                        let old = from.plus(i);
                        let applies = match self.overlay_target(here) {
                            Some(target) => target == Target::Data(old),
                            None => unmapped_matches(here, old),
                        };
                        if applies || crate::planted::bug(crate::planted::Bug::MoveIgnoresNewer) {
                            let target = Target::Data(to.plus(i));
                            self.map(Extent { lba: here, len: 1, target });
                        }
                    }
                }
                _ => {}
            }
        }
    }

    /// The next segment number of the granted range.
    pub(super) fn take_segment_id(&mut self) -> Option<SegmentId> {
        (self.next_segment < self.root.range.1).then(|| {
            self.next_segment += 1;
            SegmentId(self.next_segment - 1)
        })
    }

    /// Where the first record that is not applied lies, or will lie.
    pub(super) fn log_position(&self) -> (SegmentId, u32) {
        match (&self.log, self.flights.front()) {
            (Some(log), Some(flight)) => (log.id, flight.block),
            (Some(log), None) => (log.id, log.next.get()),
            (None, _) => (SegmentId(self.log_floor), 0),
        }
    }

    /// The pairs that new write sets and lease probes must satisfy.
    pub(super) fn pairs(&self) -> Vec<&LogSet> {
        let wanted = self.wanted.as_ref();
        if let Some(root) = &self.pending_root {
            return rules::pairs_in_use(&root.set, &root.former, false, wanted);
        }
        let Root { set, former, .. } = &self.root;
        rules::pairs_in_use(set, former, self.root_in_force, wanted)
    }

    /// Whether the root in force lists a log segment as sealed, with all that it holds.
    pub(super) fn is_covered(&self, id: SegmentId) -> bool {
        id < self.root_log
    }

    /// The place of the newest checkpoint, for record headers.
    pub(super) fn checkpoint_place(&self) -> CheckpointPlace {
        self.checkpoint.as_ref().map(|c| c.place).unwrap_or_default()
    }
}

/// The entries of a new segment in the table.
pub(super) fn table_entry(segment: &OpenSegment) -> Segment {
    let width = segment.scheme.width();
    let creation = segment.creation;
    let nobody = ShardRef { disk: DiskId::default(), creation };
    let shards = segment.shards.iter().map(|s| ShardRef { disk: s.disk, creation });
    Segment {
        id: segment.id,
        kind: segment.kind,
        scheme: segment.scheme,
        epoch: segment.authority.epoch,
        members: shards.chain(std::iter::repeat(nobody)).take(width).collect(),
        shard_blocks: segment.shard_blocks,
        sealed: false,
        blocks: 0,
        missing: ((1 << width) - 1) & !((1 << segment.shards.len()) - 1),
        damaged: 0,
        live: 0,
        recent: 0,
        pins: 0,
    }
}

/// What a head is made with besides its state.
pub struct HeadContext {
    /// Randomness.
    pub env: Env,
    /// The disks.
    pub disks: Rc<Disks>,
    /// The metadata store.
    pub store: Rc<dyn MetaStore>,
    /// Tuning.
    pub config: HeadConfig,
    /// Redundancy.
    pub pool: PoolPolicy,
}

impl Head {
    pub(super) fn new(context: HeadContext, authority: Authority, state: State) -> Rc<Self> {
        let pages = NonZeroUsize::new((context.config.cache_bytes / BLOCK_SIZE).max(16))
            .expect("at least 16");
        let narrow = super::narrow::Narrow::new(&context.disks, context.pool.scheme);
        Rc::new_cyclic(|this| Self {
            this: this.clone(),
            volume: authority.volume,
            authority,
            env: context.env,
            member: context.disks.join(context.pool.scheme.parity),
            disks: context.disks,
            store: context.store,
            config: context.config,
            pool: context.pool,
            state: RefCell::new(state),
            cache: RefCell::new(LruCache::new(pages)),
            wake: Notify::new(),
            applied: Notify::new(),
            checkpoint_wanted: Notify::new(),
            repair_wanted: Notify::new(),
            gc_wanted: Notify::new(),
            width_wanted: Notify::new(),
            checkpoint_lock: tokio::sync::Mutex::new(()),
            swaps: super::swap::Swaps::default(),
            capture: RefCell::default(),
            relocate: RefCell::default(),
            torn: RefCell::default(),
            deletes_slowly: Cell::new(false),
            repair: super::repair::Repair::default(),
            balance: super::balance::Balance::default(),
            dense: super::dense::Dense::default(),
            narrow,
            space: super::space::Space::default(),
            findings_told: Throttle::default(),
            scrub: super::scrub::Scrub::default(),
            stats: HeadStats::default(),
        })
    }

    /// Stops serving for good: every waiting request fails.
    pub(super) fn stop(&self, why: &str) {
        let (pending, queue, flights) = {
            let mut state = self.state.borrow_mut();
            if state.stopped.is_some() {
                return;
            }
            if state.releasing {
                tracing::info!(volume = %self.volume, epoch = %self.authority.epoch, why, "head ends");
            } else {
                tracing::warn!(volume = %self.volume, epoch = %self.authority.epoch, why, "head stops");
            }
            state.stopped = Some(why.to_owned());
            state.pending_bytes = 0;
            let pending: Vec<Op> = state.pending.drain(..).collect();
            let queue: Vec<Flight> = state.queue.drain(..).collect();
            let flights: Vec<Flight> = state.flights.drain(..).collect();
            (pending, queue, flights)
        };
        let flown = queue.into_iter().chain(flights).flat_map(|flight| flight.ops);
        pending.into_iter().chain(flown).for_each(|op| op.finish(Err(TargetError::Stopped)));
        self.space.reserve.borrow_mut().take();
        self.wake.notify_waiters();
        self.applied.notify_waiters();
        self.wake.notify_one();
        self.checkpoint_wanted.notify_one();
        self.swaps.wanted.notify_one();
        self.repair_wanted.notify_one();
        self.gc_wanted.notify_one();
        self.width_wanted.notify_waiters();
        self.disks.space_wanted.notify_waiters();
        self.scrub.stop();
    }

    /// Whether the head takes requests.
    pub fn is_serving(&self) -> bool {
        let state = self.state.borrow();
        state.stopped.is_none() && !state.releasing
    }

    /// Whether requests of clients are taken up: not while the head is released.
    pub(super) fn takes_requests(&self) -> bool {
        self.is_serving() && !self.state.borrow().draining
    }

    /// Why the head stopped; none while it serves.
    pub fn stopped(&self) -> Option<String> {
        self.state.borrow().stopped.clone()
    }

    /// How to read a segment of the table; none if it was freed.
    pub(super) fn source(&self, segment: SegmentId) -> Option<(Source, u32)> {
        let state = self.state.borrow();
        let s = state.table.segments.get(&segment)?;
        let source = Source {
            volume: self.volume,
            segment,
            scheme: s.scheme,
            members: s.members.iter().map(|m| m.disk).collect(),
            creations: s.members.iter().map(|m| m.creation).collect(),
            missing: s.missing,
            without: 0,
        };
        Some((source, s.shard_blocks))
    }

    /// Whether a segment was freed, or one of its shards replaced, since `source` was made.
    fn has_moved(&self, source: &Source) -> bool {
        self.source(source.segment).is_none_or(|(now, _)| {
            now.members != source.members || now.creations != source.creations
        })
    }

    /// Reads `count` blocks from `addr`, which do not cross a shard.
    ///
    /// # Errors
    /// [`FetchError::Gone`] when the blocks have moved meanwhile: look them up again
    /// ([`Head::look_again`]).
    pub(super) async fn fetch(&self, addr: BlockAddr, count: u32) -> Result<Bytes, HeadError> {
        let (source, shard_blocks) =
            self.source(addr.segment).ok_or(FetchError::Gone(addr.segment))?;
        let shard = (addr.block / shard_blocks) as usize;
        let mut findings = Vec::new();
        let data = source
            .read(&self.disks, shard, addr.block % shard_blocks, count, &mut |f| findings.push(f))
            .await;
        self.note_findings(&findings);
        data.map_err(|error| {
            if self.has_moved(&source) {
                FetchError::Gone(addr.segment).into()
            } else {
                error.into()
            }
        })
    }

    /// Takes up what reads found: a bad block is mended in place, a shard that is worse is rebuilt.
    pub(super) fn note_findings(&self, findings: &[Finding]) {
        use crate::segment::fetch::Problem;
        for finding in findings {
            match &finding.problem {
                Problem::Corrupt(block) => {
                    add(&self.stats.corrupt_blocks, 1);
                    // Each read meets a block that cannot be repaired.
                    if self.findings_told.passes("blocks that do not match their checksum") {
                        tracing::warn!(
                            volume = %self.volume, segment = %finding.segment, disk = %finding.disk,
                            block, "a block does not match its checksum",
                        );
                    }
                    if self.scrub.suspect(finding.segment, *block) {
                        continue;
                    }
                }
                Problem::Disk(ShardError::Io(_) | ShardError::Damaged(_) | ShardError::Gone) => {}
                Problem::Disk(_) => continue,
            }
            let of_content = finding.problem.is_of_content();
            self.note_bad_shard(finding.segment, finding.disk, finding.creation, of_content);
        }
    }

    /// Notes that a shard of a sealed segment is not there, or some of its content bad: it is built
    /// anew. False if the segment has no such shard (any more), or that is known already.
    pub(super) fn note_bad_shard(
        &self,
        segment: SegmentId,
        disk: DiskId,
        creation: u64,
        of_content: bool,
    ) -> bool {
        let mut state = self.state.borrow_mut();
        let Some(segment) = state.table.segments.get_mut(&segment).filter(|s| s.sealed) else {
            return false;
        };
        // A shard that was replaced meanwhile says nothing of the new one.
        let there = ShardRef { disk, creation };
        let Some(shard) = segment.members.iter().position(|member| *member == there) else {
            return false;
        };
        let known = segment.missing >> shard & 1 == 1;
        segment.missing |= 1 << shard;
        if of_content {
            segment.damaged |= 1 << shard;
        }
        self.repair_wanted.notify_one();
        !known
    }

    /// Whether the head may serve reads now.
    pub(super) fn lease_valid(&self) -> bool {
        let state = self.state.borrow();
        let now = Instant::now();
        let answered = state
            .lease
            .iter()
            .filter(|(_, sent)| now < **sent + self.config.lease)
            .map(|(disk, _)| *disk)
            .collect();
        rules::lease_ok_in_all(&state.pairs(), &answered)
    }

    /// Notes that a disk answered "not fenced" to something sent at `sent`.
    pub(super) fn lease_evidence(&self, disk: DiskId, sent: Instant) {
        let sent = if bug(Bug::LeaseFromAnswer) { Instant::now() } else { sent };
        let mut state = self.state.borrow_mut();
        let newest = state.lease.entry(disk).or_insert(sent);
        *newest = sent.max(*newest);
    }

    /// Makes sure that the head may serve a read that was taken up just now.
    ///
    /// # Errors
    /// The head has stopped, or too few disks answer for as long as requests wait.
    pub(super) async fn ensure_lease(&self) -> Result<(), TargetError> {
        let since = Instant::now();
        while !self.lease_valid() {
            if self.state.borrow().stopped.is_some() {
                return Err(TargetError::Stopped);
            }
            if since.elapsed() >= self.config.io_timeout {
                return Err(TargetError::Io("too few disks answer for a read lease".into()));
            }
            self.probe_all().await;
            if !self.lease_valid() {
                self.note_starved();
                tokio::time::sleep(self.config.lease / 4).await;
            }
        }
        Ok(())
    }

    /// Asks the disks anew for the right to serve reads, even where it is held.
    ///
    /// # Errors
    /// The head has stopped.
    #[cfg(test)]
    pub(crate) async fn renew_lease(&self) -> Result<(), TargetError> {
        self.state.borrow_mut().lease.clear();
        self.ensure_lease().await
    }

    /// Asks all disks of the sets in use, until enough have answered.
    pub(super) async fn probe_all(&self) {
        let members: BTreeSet<DiskId> = {
            let state = self.state.borrow();
            state.pairs().iter().flat_map(|set| set.members()).map(|m| m.disk).collect()
        };
        let mut probes: FuturesUnordered<_> =
            members.into_iter().map(|disk| self.probe_one(disk)).collect();
        while probes.next().await.is_some() {
            if self.lease_valid() {
                return;
            }
        }
    }

    async fn probe_one(&self, disk: DiskId) {
        let Some(client) = self.disks.client(disk) else { return };
        let sent = Instant::now();
        match tokio::time::timeout(self.config.lease, client.probe(self.authority)).await {
            Ok(Ok(())) => self.lease_evidence(disk, sent),
            Ok(Err(ShardError::Fenced(epoch))) => self.stop(&format!("fenced by epoch {epoch}")),
            Ok(Err(error)) => self.disks.report(disk, &error),
            Err(_) => self.disks.report(disk, &ShardError::Unreachable),
        }
    }

    /// Size of the volume, bytes.
    pub fn size_bytes(&self) -> u64 {
        self.state.borrow().size
    }

    /// Changes the size that clients see, at once. What lies beyond a smaller one stays there until
    /// [`Head::cut_off`]; nothing may grow over it before.
    pub fn resize(&self, size: u64) {
        let mut state = self.state.borrow_mut();
        state.size = size;
        state.reach = state.reach.max(size);
    }
}

impl Pages for Head {
    type Error = HeadError;
    async fn load(&self, addr: BlockAddr) -> Result<Bytes, HeadError> {
        if let Some(page) = self.cache.borrow_mut().get(&addr) {
            return Ok(page.clone());
        }
        let page = self.fetch(addr, 1).await?;
        self.cache.borrow_mut().put(addr, page.clone());
        Ok(page)
    }
}
