//! Garbage collection: what is still live in a segment is moved, then the segment is freed.
//!
//! Victims are chosen after checkpoints, when the counters are exact: what is gained against the
//! cost of moving the rest, and by age ([`Head::score`]); the log of erasure-coded pools before its
//! stripes. Live blocks go to data segments: those of the log to other ones than those that were moved
//! before, because what has lived for long will ([`Stream`]); a *move* entry in the log redirects each
//! block only if it still lies where it was found. A segment is deleted by the checkpoint after
//! which nothing refers to it.
//!
//! The same moves narrow and widen data segments as failure domains go and come ([`super::narrow`]).
//!
//! Meta segments are emptied by having the next checkpoint rewrite the pages in them.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use tokio::sync::oneshot;

use super::dense::{Payload, Stream};
use super::head::{Head, HeadError, Op, add};
use super::overlay::Target;
use super::segtab::Segment;
use crate::buffer::AlignedBuf;
use crate::export::TargetError;
use crate::id::{BLOCK_BYTES, BLOCK_SIZE, DiskId, SegmentId};
use crate::limits::RECORD_ENTRIES_MAX;
use crate::segment::BlockAddr;
use crate::segment::checksum::raw_crcs;
use crate::segment::fetch::FetchError;
use crate::segment::open::OpenError;
use crate::segment::record::{Entry, Header};
use crate::shard::budget::Urgency;
use crate::shard::{Scheme, SegmentKind, SlotClass};

/// Segments that one pass may clean. Where they are nearly full, it takes many to free one.
const VICTIMS_MAX: usize = 64;
/// Segments that one pass cleans, if that frees as much as [`GAIN_ENOUGH`].
const VICTIMS_ENOUGH: usize = 8;
/// Segments' worth of slots that are enough for one pass to free.
const GAIN_ENOUGH: usize = 4;
/// Segments that are enough for one pass to fill, if it frees one more.
const TAKES_ENOUGH: usize = 8;
/// For how long a volume keeps others from cleaning while it waits for its checkpoint.
const FREE_PATIENCE: Duration = Duration::from_secs(10);
/// Pages that one checkpoint rewrites to empty meta segments.
const PAGES_MOVED_MAX: u32 = 512;
/// Blocks moved by one append.
const MOVE_BLOCKS: usize = 256;
/// Live blocks looked up before they are moved, so that neighbours of the volume come together.
const GATHER_BLOCKS: usize = 4096;
/// Reads of blocks to be moved under way at once.
const READS_AT_ONCE: usize = 16;
/// Runs moved by one append: with those of an opened segment they fit one record.
const MOVE_RUNS: usize = RECORD_ENTRIES_MAX / 3;
/// How often moves are looked up anew when the index changes meanwhile.
const MOVE_TRIES: usize = 8;
/// A segment is worth moving if what is live in it takes at most this share of what it frees,
/// percent.
const TAKES_PERCENT_MAX: u64 = 90;
/// Blocks of a shard that may be left unused at the end of a data segment.
const ROOM_LEFT: u32 = 2;

/// Cleans whenever a checkpoint asks for it, until the head stops.
pub(super) async fn run(head: Rc<Head>) {
    loop {
        head.gc_wanted.notified().await;
        // Held until the checkpoint has freed what was emptied, but not for ever.
        let pass = head.disks.gc_pass().await;
        if !head.is_serving() {
            return;
        }
        let collected = head.collect_garbage().await;
        head.close_spares();
        match collected {
            Ok(0) => head.round_ended(),
            Ok(_) => {
                if let Err(error) = head.free_emptied(pass).await {
                    tracing::debug!(volume = %head.volume, %error, "nothing freed yet");
                    head.checkpoint_wanted.notify_one();
                }
            }
            Err(error) => {
                tracing::debug!(volume = %head.volume, %error, "garbage collection paused");
                head.note_lack_of_copies(&error);
                head.trace_space();
                // What was looked up in an index that is not the newest any more is looked up
                // again after the checkpoint that made it so.
                if !matches!(error, HeadError::Append) {
                    head.round_ended();
                }
            }
        }
    }
}

/// How a pass moves what is live.
#[derive(Clone, Copy)]
pub(super) struct Pass {
    /// Scheme of the segments that it fills.
    pub(super) scheme: Scheme,
    /// Class of the slots that it takes besides those that were obtained before.
    pub(super) class: SlotClass,
    /// Which data segments it fills.
    pub(super) stream: Stream,
    /// It waits for the budget of the node ([`crate::shard::budget`]).
    pub(super) paced: bool,
}

/// A block that is live in a victim.
#[derive(Clone, Copy)]
struct Live {
    lba: u64,
    addr: BlockAddr,
}

/// What is live in the victims and not moved yet, and the generation of the index that it was
/// looked up in.
#[derive(Default)]
struct Found {
    live: Vec<Live>,
    generation: u64,
}

/// Blocks that can be filled of those that are left of a shard.
fn usable(room: u32) -> u32 {
    room.saturating_sub(ROOM_LEFT)
}

impl Head {
    /// Makes the checkpoint that frees what a pass emptied. If it takes too long, because the store
    /// or the disks of this volume do not answer, other volumes get their turn meanwhile.
    async fn free_emptied<P>(self: &Rc<Self>, pass: P) -> Result<(), HeadError> {
        let mut checkpoint = std::pin::pin!(self.checkpoint());
        if let Ok(result) = tokio::time::timeout(FREE_PATIENCE, &mut checkpoint).await {
            return result;
        }
        tracing::debug!(volume = %self.volume, "what was emptied is not freed yet");
        drop(pass);
        checkpoint.await
    }

    /// Chooses meta segments whose pages the next checkpoint is to rewrite.
    pub(super) async fn choose_meta_victims(&self) {
        let victims: Vec<Segment> = {
            let state = self.state.borrow();
            let tight = self.is_tight(&state);
            let pinned = [&state.checkpoint, &state.root.checkpoint]
                .map(|c| c.as_ref().map(|c| c.place.segment));
            let mut sealed: Vec<&Segment> = state
                .table
                .segments
                .values()
                .filter(|s| s.kind == SegmentKind::Meta && s.sealed && s.live > 0)
                .filter(|s| !pinned.contains(&Some(s.id)))
                .filter(|s| {
                    // A slot is taken whole, however little of it was written.
                    let sparse = if tight { s.shard_blocks / 4 * 3 } else { s.blocks / 4 };
                    s.live < sparse || self.is_torn(s)
                })
                .collect();
            sealed.sort_by_key(|s| s.live);
            let pages = self.disks.checkpoint_pages();
            let pages = u32::try_from(pages).unwrap_or(u32::MAX);
            let mut budget = if tight { PAGES_MOVED_MAX.min(pages) } else { PAGES_MOVED_MAX };
            sealed
                .into_iter()
                .take_while(|s| {
                    budget = budget.saturating_sub(s.live);
                    budget > 0
                })
                .cloned()
                .collect()
        };
        let height = self.state.borrow().tree.height;
        for segment in victims {
            let mut at = 0;
            while at < segment.blocks {
                let Ok(header) = self.victim_header(&segment, at).await else { break };
                let mut relocate = self.relocate.borrow_mut();
                for entry in &header.entries {
                    if let Entry::Page { level, number } = *entry {
                        relocate.add(level, number, height);
                    }
                }
                at += header.blocks();
            }
            if at >= segment.blocks {
                self.relocate.borrow_mut().segments.insert(segment.id);
            }
        }
    }

    /// Whether no set of shards holds the segment whole, or a shard can be rebuilt nowhere: what is
    /// live in it can still be moved.
    fn is_torn(&self, segment: &Segment) -> bool {
        segment.present() < usize::from(segment.scheme.data)
            || (segment.missing != 0 && self.torn.borrow().contains(&segment.id))
    }

    /// The header of a record, from whichever shard yields it: headers are not part of the stripes.
    async fn victim_header(&self, segment: &Segment, at: u32) -> Result<Header, HeadError> {
        let (source, _) = self.source(segment.id).ok_or(FetchError::Gone(segment.id))?;
        self.any_header(&source, segment, usize::MAX, at).await
    }

    /// Segments worth cleaning now, best first.
    pub(super) fn victims(&self) -> Vec<Segment> {
        let state = self.state.borrow();
        let (log, _) = self.capture.borrow().log;
        let scheme = self.gc_scheme();
        let coded = scheme.data > 1;
        let sealed: Vec<&Segment> = state
            .table
            .segments
            .values()
            .filter(|s| s.kind != SegmentKind::Meta && s.sealed && s.pins == 0 && s.recent == 0)
            .filter(|s| s.kind == SegmentKind::Data || s.id < log)
            .collect();
        let used: u64 = sealed.iter().map(|s| s.capacity_blocks()).sum();
        let live: u64 = sealed.iter().map(|s| u64::from(s.live)).sum();
        // What dies by itself need not be moved: with room to spare, only clear waste is worth it.
        let tight = self.wants_space(&state);
        let wasteful = used > 3 * live + 4096;
        let logs = sealed.iter().filter(|s| s.kind == SegmentKind::Log).count();
        let uncompacted = coded && logs > 64;
        let torn = |s: &Segment| self.is_torn(s);
        if !(tight || wasteful || uncompacted || sealed.iter().any(|s| torn(s))) {
            return Vec::new();
        }
        // Where only the log is too long, nothing else need be moved.
        let compacts_all = tight || wasteful;
        let newest = state.next_segment;
        let short = self.disks.full_for(SlotClass::Client);
        let on_short =
            |s: &Segment| short.iter().filter(|(disk, _)| s.lies_on(*disk)).count() as u64;
        let mut scored: Vec<((bool, u64), &Segment)> = sealed
            .into_iter()
            .filter(|s| compacts_all || s.kind == SegmentKind::Log || torn(s))
            .filter(|s| self.is_worth_moving(s, scheme) || torn(s))
            .map(|s| {
                let score = self.score(s, scheme, newest) * (1 + on_short(s));
                ((torn(s), score), s)
            })
            .collect();
        scored.sort_by_key(|(score, s)| (std::cmp::Reverse(*score), s.id));
        scored.into_iter().take(VICTIMS_MAX).map(|(_, s)| s.clone()).collect()
    }

    /// Slots that a segment takes of disks that are up.
    fn slots_held(&self, segment: &Segment) -> usize {
        segment.members.iter().filter(|member| self.disks.domain(member.disk).is_some()).count()
    }

    /// Blocks of all shards that are freed when what is live in a segment is moved, and that this
    /// takes. A slot is freed whole, however little of it was written.
    fn exchange(&self, segment: &Segment, scheme: Scheme) -> (u64, u64) {
        let width = |shards: usize| u64::try_from(shards).expect("at most 20");
        let frees = u64::from(segment.shard_blocks) * width(self.slots_held(segment));
        let stripes = segment.live.div_ceil(scheme.data.into());
        (frees, u64::from(stripes) * width(scheme.width()))
    }

    /// Benefit against cost: what is gained for each block that is written, `(1 - u) / u`, and more
    /// of it the older the segment, as what has lived for long will. The square root of the age
    /// beats the age itself (Rosenblum's LFS) and its logarithm at skewed loads, and at uniform ones
    /// it makes no difference (`docs/performance.md`). It also has the log of erasure-coded pools
    /// cleaned first: its copies free more than the stripes take.
    fn score(&self, segment: &Segment, scheme: Scheme, newest: u64) -> u64 {
        let (frees, takes) = self.exchange(segment, scheme);
        let age = newest.saturating_sub(segment.id.0) + 1;
        frees.saturating_sub(takes) * 1000 / takes.max(1) * age.isqrt()
    }

    /// Whether what is live takes clearly less than it frees when it is moved.
    fn is_worth_moving(&self, segment: &Segment, scheme: Scheme) -> bool {
        let (frees, takes) = self.exchange(segment, scheme);
        takes * 100 <= frees * TAKES_PERCENT_MAX
    }

    /// Segments that what is live in these fills beyond the one that is being filled.
    pub(super) fn segments_for(&self, victims: &[Segment], pass: Pass) -> usize {
        let each = usable(self.disks.slot_blocks_min()).max(1);
        let lacking = moved_blocks(victims, pass.scheme).saturating_sub(usable(self.gc_room(pass)));
        lacking.div_ceil(each) as usize
    }

    /// How many of the victims, from the first on, free the most slots beyond those that what is
    /// live in them will fill, where `fits` tells whether so many victims may take so many new
    /// segments; and how many it takes.
    fn best_pass(
        &self,
        victims: &[Segment],
        pass: Pass,
        fits: impl Fn(&[Segment], usize) -> bool,
    ) -> (usize, usize) {
        let mut best = (0, 0);
        let (mut gain, mut frees) = (0, 0);
        for (index, victim) in victims.iter().enumerate() {
            frees += self.slots_held(victim);
            let chosen = &victims[..=index];
            let segments = self.segments_for(chosen, pass);
            let here = frees.saturating_sub(segments * pass.scheme.width());
            if here > gain && (segments == 0 || fits(chosen, segments)) {
                gain = here;
                best = (index + 1, segments);
                let enough = GAIN_ENOUGH * pass.scheme.width();
                let many = segments >= TAKES_ENOUGH && gain >= pass.scheme.width();
                if many || (gain >= enough && index + 1 >= VICTIMS_ENOUGH) {
                    break;
                }
            }
        }
        best
    }

    /// Opens the data segments that a pass will fill, before anything is moved. Leaves out the
    /// victims for which there is no room, or that free nothing.
    ///
    /// On a disk that is full for clients a pass frees all but so many of the slots that it takes
    /// there, so that the reserve of garbage collection is not used up on one disk for the good of
    /// others. Where it cannot, it takes slots of the other disks only.
    async fn obtain(
        self: &Rc<Self>,
        mut victims: Vec<Segment>,
        pass: Pass,
    ) -> Result<Vec<Segment>, HeadError> {
        let mut short = self.disks.full_for(SlotClass::Client);
        // One slot of the reserve stays for a pass that gives back all it takes.
        for (_, slack) in &mut short {
            *slack = slack.saturating_sub(1);
        }
        let may_take = |victims: &[Segment], disk: DiskId, slots: usize| {
            let Some((_, slack)) = short.iter().find(|(full, _)| *full == disk) else {
                return true;
            };
            let freed = victims.iter().filter(|victim| victim.lies_on(disk)).count();
            freed + *slack as usize >= slots
        };
        let fits = |victims: &[Segment], segments: usize| {
            let disks = self.disks.ids().into_iter().filter(|&d| may_take(victims, d, segments));
            let domains: BTreeSet<_> = disks.filter_map(|disk| self.disks.domain(disk)).collect();
            domains.len() >= self.dense_least(pass.scheme)
        };
        let (count, segments) = self.best_pass(&victims, pass, fits);
        if count == 0 {
            return Ok(Vec::new());
        }
        let admitted = |disk| may_take(&victims[..count], disk, segments);
        let obtained = self.obtain_dense(segments, pass, admitted).await?;
        let fits = |victims: &[Segment], segments: usize| {
            let slots = |disk| obtained.iter().take(segments).filter(|s| s.contains(&disk)).count();
            let disks: BTreeSet<DiskId> = obtained.iter().flatten().copied().collect();
            segments <= obtained.len()
                && disks.iter().all(|&disk| may_take(victims, disk, slots(disk)))
        };
        let (count, _) = self.best_pass(&victims, pass, fits);
        if count == 0 {
            return Err(HeadError::Open(OpenError::NoSpace));
        }
        victims.truncate(count);
        Ok(victims)
    }

    /// Promises what a pass will free.
    #[expect(clippy::cast_precision_loss, reason = "a few slots")]
    fn promise(&self, victims: &[Segment], pass: Pass) {
        let frees: usize = victims.iter().map(|victim| self.slots_held(victim)).sum();
        let takes = self.segments_for(victims, pass) * pass.scheme.width();
        let each = |slots: usize| slots as f64 / self.disks.ids().len().max(1) as f64;
        let live = victims.iter().map(|victim| u64::from(victim.live)).sum();
        *self.space.emptying.borrow_mut() = victims.iter().map(|victim| victim.id).collect();
        self.disks.promise.begin(each(takes), each(frees), live);
    }

    /// Obtains what a pass takes that moves either what lies in the log or what was moved before, so
    /// that each gets segments of its own; or both together where slots are too few for that.
    async fn obtain_by_age(
        self: &Rc<Self>,
        victims: Vec<Segment>,
        pass: Pass,
    ) -> Result<(Vec<Segment>, Pass), HeadError> {
        if !self.may_separate() {
            self.leave_stream(Stream::Settled);
            return Ok((self.obtain(victims, pass).await?, pass));
        }
        let settled = |victim: &Segment| victim.kind == SegmentKind::Data;
        let first = victims.first().is_some_and(settled);
        for old in [first, !first] {
            let stream = if old { Stream::Settled } else { Stream::Moved };
            let some = victims.iter().filter(|victim| settled(victim) == old).cloned().collect();
            let pass = Pass { stream, ..pass };
            match self.obtain(some, pass).await {
                Ok(some) if some.is_empty() => {}
                Err(HeadError::Open(OpenError::NoSpace)) => self.close_spares(),
                obtained => return Ok((obtained?, pass)),
            }
        }
        Ok((self.obtain(victims, pass).await?, pass))
    }

    /// Moves what is live out of the victims. Tells how many segments were emptied.
    async fn collect_garbage(self: &Rc<Self>) -> Result<usize, HeadError> {
        let scheme = self.gc_scheme();
        let pass = Pass { scheme, class: SlotClass::Gc, stream: Stream::Moved, paced: false };
        let mut victims = self.victims();
        // What must be moved is moved whether it frees anything or not.
        if victims.iter().any(|victim| self.is_torn(victim)) {
            victims.retain(|victim| self.is_torn(victim));
            return self.clean(&victims, pass).await;
        }
        let tight = self.wants_space(&self.state.borrow());
        let bent = if tight { 0 } else { self.try_to_bend().await? };
        if bent > 0 {
            return Ok(bent);
        }
        let (victims, pass) = self.obtain_by_age(victims, pass).await?;
        self.promise(&victims, pass);
        match self.clean(&victims, pass).await? {
            0 if tight => self.try_to_bend().await,
            emptied => Ok(emptied),
        }
    }

    /// Narrows or widens some segments. That it cannot be done now holds up nothing else.
    async fn try_to_bend(self: &Rc<Self>) -> Result<usize, HeadError> {
        match self.bend().await {
            Err(
                error @ (HeadError::Open(OpenError::NoSpace | OpenError::TooFewDomains { .. })
                | HeadError::Fetch(_)),
            ) => {
                tracing::debug!(volume = %self.volume, %error, "segments keep their scheme for now");
                self.note_lack_of_copies(&error);
                Ok(0)
            }
            result => result,
        }
    }

    /// Copies are as many as the log's: has that shrink if there are too few domains for them.
    fn note_lack_of_copies(&self, error: &HeadError) {
        if self.dense_scheme().data == 1 {
            self.note_failure(error);
        }
    }

    /// Moves what is live out of segments. Tells how many of them were emptied.
    pub(super) async fn clean(
        self: &Rc<Self>,
        victims: &[Segment],
        pass: Pass,
    ) -> Result<usize, HeadError> {
        let (mut emptied, mut failed) = (0, None);
        let mut found = Found::default();
        for segment in victims {
            match self.empty(segment, &mut found, pass).await {
                Ok(()) => emptied += 1,
                // The next one may be readable.
                Err(error @ HeadError::Fetch(_)) => failed = Some(error),
                Err(error) => return Err(error),
            }
        }
        match self.move_live(found, pass).await {
            Err(error @ HeadError::Fetch(_)) => failed = Some(error),
            result => result?,
        }
        match failed {
            Some(error) if emptied == 0 => Err(error),
            _ => Ok(emptied),
        }
    }

    /// Finds what is live in one segment, and moves it whenever enough is found.
    async fn empty(
        self: &Rc<Self>,
        segment: &Segment,
        found: &mut Found,
        pass: Pass,
    ) -> Result<(), HeadError> {
        let mut at = 0;
        while at < segment.blocks {
            if found.live.is_empty() {
                found.generation = self.state.borrow().generation;
            }
            let header = self.victim_header(segment, at).await?;
            self.live_of(segment, &header, &mut found.live).await?;
            at += header.blocks();
            if found.live.len() >= GATHER_BLOCKS {
                self.move_live(std::mem::take(found), pass).await?;
            }
        }
        Ok(())
    }

    /// The blocks of a record that the index still refers to.
    async fn live_of(
        &self,
        segment: &Segment,
        header: &Header,
        live: &mut Vec<Live>,
    ) -> Result<(), HeadError> {
        let first = header.block + header.header_blocks;
        let mut index = 0;
        for entry in &header.entries {
            let Entry::Write { lba, blocks } = *entry else { continue };
            for extent in self.resolve(lba, blocks.into()).await? {
                let Target::Data(addr) = extent.target else { continue };
                if addr.segment != segment.id {
                    continue;
                }
                for i in 0..extent.len {
                    let lba_here = extent.lba + i;
                    let here = extent.target.plus(i);
                    let n = index + u32::try_from(lba_here - lba).expect("within the entry");
                    // Block n of the payload lies on shard n / per-shard.
                    let per_shard = header.payload_blocks;
                    let addr = BlockAddr {
                        segment: segment.id,
                        block: n / per_shard * segment.shard_blocks + first + n % per_shard,
                    };
                    if here == Target::Data(addr) {
                        live.push(Live { lba: lba_here, addr });
                    }
                }
            }
            index += blocks;
        }
        Ok(())
    }

    /// Writes live blocks to data segments and logs their moves.
    ///
    /// # Errors
    /// [`HeadError::Fetch`] if some cannot be read: the others are moved nevertheless.
    async fn move_live(self: &Rc<Self>, found: Found, pass: Pass) -> Result<(), HeadError> {
        let Found { mut live, generation } = found;
        live.sort_by_key(|l| l.lba);
        let mut unreadable = None;
        let mut rest = &live[..];
        while !rest.is_empty() {
            let count = batch(rest, self.batch_blocks(pass));
            // What is read, and what is written of it with parity, about.
            let bytes = count as u64 * BLOCK_BYTES * 3;
            let waits = pass.paced && !self.wants_space(&self.state.borrow());
            let budget = &self.disks.budget;
            let _working =
                if waits { Some(budget.take(bytes, Urgency::Patient).await) } else { None };
            let (readable, data, error) = self.fetch_live(&rest[..count]).await;
            unreadable = unreadable.or(error);
            if !readable.is_empty() {
                self.move_batch(&readable, data, generation, pass).await?;
            }
            rest = &rest[count..];
        }
        unreadable.map_or(Ok(()), Err)
    }

    /// The content of live blocks, one piece for each run that lies together. Leaves out what
    /// cannot be read, and says why; and what is not needed any more.
    async fn fetch_live(
        self: &Rc<Self>,
        live: &[Live],
    ) -> (Vec<Live>, Vec<Bytes>, Option<HeadError>) {
        let runs = live.chunk_by(follows).map(|run| async move {
            let blocks = u32::try_from(run.len()).expect("bounded by a batch");
            (run, self.look_again(async || self.fetch(run[0].addr, blocks).await).await)
        });
        let mut fetched = stream::iter(runs).buffered(READS_AT_ONCE);
        let (mut readable, mut data, mut unreadable) = (Vec::new(), Vec::new(), None);
        while let Some((run, result)) = fetched.next().await {
            match result {
                Ok(content) => {
                    readable.extend_from_slice(run);
                    data.push(content);
                }
                // All of it was overwritten meanwhile.
                Err(HeadError::Fetch(FetchError::Gone(_)))
                    if self.source(run[0].addr.segment).is_none() => {}
                Err(error) => unreadable = Some(error),
            }
        }
        (readable, data, unreadable)
    }

    /// Blocks of one append: as many as fit what is left of the segment that is being filled, or
    /// another.
    fn batch_blocks(&self, pass: Pass) -> usize {
        let left = self.gc_room(pass);
        let room = if left > ROOM_LEFT { left } else { self.disks.slot_blocks_min() };
        let blocks = room.saturating_sub(2).max(1) * u32::from(pass.scheme.data);
        MOVE_BLOCKS.min(blocks as usize)
    }

    async fn move_batch(
        self: &Rc<Self>,
        live: &[Live],
        mut data: Vec<Bytes>,
        generation: u64,
        pass: Pass,
    ) -> Result<(), HeadError> {
        let k = usize::from(pass.scheme.data);
        let mut runs: Vec<(u64, u32)> = Vec::new();
        for l in live {
            match runs.last_mut() {
                Some((lba, blocks)) if *lba + u64::from(*blocks) == l.lba => *blocks += 1,
                _ => runs.push((l.lba, 1)),
            }
        }
        let filler = live.len().next_multiple_of(k) - live.len();
        if filler > 0 {
            data.push(AlignedBuf::zeroed(filler * BLOCK_SIZE).freeze());
        }
        let crcs = data.iter().flat_map(|piece| raw_crcs(piece)).collect();
        let payload = Rc::new(Payload { scheme: pass.scheme, runs, data, crcs });
        let (placed, opened, announced) =
            self.write_dense(payload, pass.class, pass.stream).await?;
        let Some(&(_, _, BlockAddr { segment, .. })) = placed.first() else { return Ok(()) };
        let mut moves: Vec<Entry> = Vec::new();
        for (from, blocks, place) in placed {
            for i in 0..blocks {
                let Some(l) = live.get((from + i) as usize) else { continue };
                push_move(&mut moves, l.lba, l.addr, place.plus(i));
            }
        }
        add(&self.stats.moved_blocks, live.len() as u64);
        self.disks.promise.moved(live.len() as u64);
        // Pinned by the entries only while they wait, and until then by this.
        self.pin(segment, 1);
        self.pin_entries(&moves, k);
        let logged = self.log_moves(moves, &opened, generation).await;
        self.pin(segment, -1);
        announced.set(announced.get() || logged?);
        Ok(())
    }

    /// Logs moves to a segment that the entries `opened` tell of; looks those up again that an
    /// index newer than `generation` may have made wrong. They are pinned already. Tells whether a
    /// record was written at all.
    async fn log_moves(
        &self,
        mut moves: Vec<Entry>,
        opened: &[Entry],
        mut generation: u64,
    ) -> Result<bool, HeadError> {
        for _ in 0..MOVE_TRIES {
            let entries = opened.iter().chain(&moves).copied().collect();
            let (done, receiver) = oneshot::channel();
            self.enqueue(Op {
                entries,
                payload: vec![],
                crcs: vec![],
                class: SlotClass::Trim,
                generation,
                done: Some(done),
            });
            match receiver.await {
                Ok(Ok(())) => return Ok(true),
                Ok(Err(TargetError::Io(_))) => {}
                _ => return Err(HeadError::Append),
            }
            generation = self.state.borrow().generation;
            moves = self.still_right(&moves).await?;
            if moves.is_empty() {
                return Ok(false);
            }
            self.pin_entries(&moves, 0);
        }
        self.state.borrow_mut().unpin(&moves);
        Err(HeadError::Append)
    }

    /// The moves whose blocks still lie where they were found, as many as fit a record.
    async fn still_right(&self, moves: &[Entry]) -> Result<Vec<Entry>, HeadError> {
        let mut right = Vec::new();
        for entry in moves {
            let Entry::Move { lba, blocks, from, to } = *entry else { continue };
            for extent in self.resolve(lba, blocks.into()).await? {
                let offset = u32::try_from(extent.lba - lba).expect("within the move");
                if extent.target == Target::Data(from.plus(offset)) {
                    let blocks = u32::try_from(extent.len).expect("within the move");
                    let (from, to) = (from.plus(offset), to.plus(offset));
                    right.push(Entry::Move { lba: extent.lba, blocks, from, to });
                }
            }
        }
        right.truncate(2 * MOVE_RUNS);
        Ok(right)
    }

    /// Pins a segment `by` times more, so that it is not freed.
    fn pin(&self, segment: SegmentId, by: i32) {
        if let Some(s) = self.state.borrow_mut().table.segments.get_mut(&segment) {
            s.pins = s.pins.saturating_add_signed(by);
        }
    }

    /// Exchanges the pins of an append (one per run of its `k` shards) for one per entry.
    pub(super) fn pin_entries(&self, entries: &[Entry], runs: usize) {
        let mut state = self.state.borrow_mut();
        let mut segment: Option<SegmentId> = None;
        for entry in entries {
            let (Entry::Place { addr, .. } | Entry::Move { to: addr, .. }) = entry else {
                continue;
            };
            segment = Some(addr.segment);
            if let Some(s) = state.table.segments.get_mut(&addr.segment) {
                s.pins += 1;
            }
        }
        if let Some(s) = segment.and_then(|id| state.table.segments.get_mut(&id)) {
            s.pins = s.pins.saturating_sub(u32::try_from(runs).expect("at most 16"));
        }
    }
}

/// Blocks of each shard of new segments that hold what is live in these: stripes, a header for each
/// append, and filling.
fn moved_blocks(victims: &[Segment], scheme: Scheme) -> u32 {
    let live: u32 = victims.iter().map(|victim| victim.live).sum();
    let appends = live / u32::try_from(MOVE_RUNS).expect("a small constant") + 1;
    live / u32::from(scheme.data) + appends
}

/// Whether a block follows another both in the volume and in the segment.
fn follows(before: &Live, block: &Live) -> bool {
    before.lba + 1 == block.lba && before.addr.plus(1) == block.addr
}

/// How many of the blocks go into one append.
fn batch(live: &[Live], most: usize) -> usize {
    let mut runs = 0;
    for (index, l) in live.iter().enumerate() {
        runs += usize::from(index == 0 || !follows(&live[index - 1], l));
        if runs > MOVE_RUNS || index == most {
            return index;
        }
    }
    live.len()
}

/// Adds the move of one block, joined with the last where it continues it.
fn push_move(moves: &mut Vec<Entry>, at: u64, old: BlockAddr, new: BlockAddr) {
    if let Some(Entry::Move { lba, blocks, from, to }) = moves.last_mut()
        && *lba + u64::from(*blocks) == at
        && from.plus(*blocks) == old
        && to.plus(*blocks) == new
    {
        *blocks += 1;
    } else {
        moves.push(Entry::Move { lba: at, blocks: 1, from: old, to: new });
    }
}
