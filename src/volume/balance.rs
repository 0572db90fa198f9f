//! Balance: whole shards are moved from full disks to empty ones, so that a new disk takes its part of what is
//! stored.
//!
//! Nobody orders it. Each head moves shards of its own, by its part of what a disk has too much
//! ([`crate::placement::balance`]), in *rounds*: a few shards, then a checkpoint that frees what they left, then a pause
//! until the figures of the disks are new.
//!
//! A shard of a sealed segment never changes, so moving it is copying it, block by block with its checksums, to
//! a disk of a domain that no other shard of the segment lies in. The order is that of repair: create, copy, seal, name the
//! new one in the table, and only after the checkpoint that says so is delete the old one. So the segment is whole all the
//! time, and a move that fails, or whose head dies, leaves a shard that nobody refers to, which is freed like those of repair.
//!
//! Invariants:
//! - Whatever else there is to do comes first: nothing moves while a disk is down, failed a request just now or is being
//!   emptied, or anything is rebuilt on this node; and it takes from the budget of repair.
//! - A move takes slots of clients, never a reserve, so that it is in the way of nothing that frees space; and only
//!   where so many are left that no write is delayed. While writes are delayed, only large differences are made up for.
//! - Only log segments that the root lists as sealed are moved: the others belong to the log set.
//! - A segment that is being moved is not repaired to where its shard goes ([`Head::moves_to`]).
//!
//! Nothing is kept of it: the next head sees how full the disks are.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use tokio::time::{Instant, timeout};

use super::head::{Head, HeadError, State, add};
use super::repair::{Repair, RepairReport};
use super::segtab::{Segment, ShardRef};
use super::throttle::slow_from;
use crate::id::{BLOCK_BYTES, DiskId, SegmentId};
use crate::limits::{self, REPAIR_WINDOW_BLOCKS, REPAIR_WINDOWS_AHEAD};
use crate::placement::balance::{Disk, END, Part, URGENT, is_even};
use crate::planted::{Bug, bug};
use crate::segment::checksum::{Salt, raw_crcs};
use crate::segment::fetch::FetchError;
use crate::segment::open::CONTROL_PATIENCE;
use crate::shard::budget::Urgency;
use crate::shard::disks::{Fill, Target};
use crate::shard::{Append, SegmentKind, ShardError, ShardResult, ShardSpec, SlotClass};

/// Pause between two rounds, unless the configuration says otherwise: longer than figures of disks are old.
pub(super) const EVERY: Duration = Duration::from_secs(2);
/// How many pauses it waits at most where nothing can be moved though the disks are not filled alike.
const VAIN_MAX: u32 = 32;
/// Shards of a volume that are moved in a round, and at once.
const ROUND_SHARDS: usize = 64;
const SHARDS_AT_ONCE: usize = 4;
/// No further shard is begun in a round after this: what is moved is to be freed.
const ROUND_MAX: Duration = Duration::from_secs(10);

/// The moves of a head.
#[derive(Default)]
pub(super) struct Balance {
    /// Segments with a shard that is being moved, and where it goes.
    moving: RefCell<BTreeMap<SegmentId, DiskId>>,
    /// Of these, the ones whose shard is there, though not whole.
    begun: RefCell<BTreeMap<SegmentId, DiskId>>,
    /// It is under way.
    active: Cell<bool>,
    progress: Repair,
}

/// A shard that is to move.
struct Move {
    segment: SegmentId,
    shard: usize,
    target: Target,
}

/// What became of a round.
enum Round {
    /// Shards were moved, or will be the next time.
    Moved,
    /// The disks are filled alike, or nothing of this volume can make them so.
    Even,
    /// Nothing that should be moved can be.
    Vain,
}

/// Moves shards whenever the disks are not filled alike, until the head stops.
pub(super) async fn run(head: Rc<Head>) {
    let Some(every) = head.config.balance_every else { return };
    let mut vain = 0;
    while head.is_serving() {
        tokio::select! {
            biased;
            () = head.disks.uneven.notified() => {}
            // The head's stop is told to all who wait for the width.
            () = head.width_wanted.notified() => continue,
        }
        head.balance.active.set(true);
        loop {
            match head.balance_round().await {
                Round::Moved => vain = 0,
                Round::Even => break,
                Round::Vain => {
                    vain = (vain * 2).clamp(1, VAIN_MAX);
                    break;
                }
            }
            head.rest(every).await;
        }
        head.balance.active.set(false);
        head.rest(every * vain).await;
    }
}

impl Head {
    /// Sleeps about so long, not in step with other heads.
    async fn rest(&self, time: Duration) {
        let half = u64::try_from(time.as_millis() / 2).unwrap_or(u64::MAX).max(1);
        let until =
            Instant::now() + time - time / 4 + Duration::from_millis(self.env.random_below(half));
        while self.is_serving() && Instant::now() < until {
            let stopped = self.width_wanted.notified();
            drop(tokio::time::timeout_at(until, stopped).await);
        }
    }

    /// The disks as balance sees them; none where nothing may be moved.
    fn balance_fills(&self) -> Option<Vec<Fill>> {
        if !self.is_serving() || self.swaps_in_vain() {
            return None;
        }
        let fills = self.disks.fills().ok()?;
        let even = || is_even(fills.iter().map(|fill| (fill.used, fill.slots)), URGENT);
        if self.is_tight(&self.state.borrow()) && even() {
            return None;
        }
        Some(fills)
    }

    /// This volume's slots by disk, and of them those that will be free.
    fn own_slots(&self) -> BTreeMap<DiskId, (u32, u32)> {
        let state = self.state.borrow();
        let mut own: BTreeMap<DiskId, (u32, u32)> = BTreeMap::new();
        for segment in state.table.segments.values() {
            let dead = state.table.is_dead(segment.id);
            for (index, member) in segment.members.iter().enumerate() {
                if segment.missing >> index & 1 == 0 {
                    let slots = own.entry(member.disk).or_default();
                    slots.0 += 1;
                    slots.1 += u32::from(dead);
                }
            }
        }
        for (_, shard) in &state.table.freed {
            let slots = own.entry(shard.disk).or_default();
            slots.0 += 1;
            slots.1 += 1;
        }
        own
    }

    /// What this head should move, all in all, between the disks that `counts` admits.
    fn balance_part(
        own: &BTreeMap<DiskId, (u32, u32)>,
        fills: &[Fill],
        counts: impl Fn(&Fill) -> bool,
    ) -> Part {
        let disk = |fill: &Fill| {
            let (own, leaving) = own.get(&fill.id).copied().unwrap_or_default();
            Disk { id: fill.id, slots: fill.slots, used: fill.used, own, leaving }
        };
        let disks: Vec<Disk> = fills.iter().filter(|fill| counts(fill)).map(disk).collect();
        let even = is_even(disks.iter().map(|disk| (disk.used, disk.slots)), END);
        if even { Part::default() } else { Part::of(&disks) }
    }

    /// Moves a few shards, if there is anything to move.
    async fn balance_round(self: &Rc<Self>) -> Round {
        let Some(fills) = self.balance_fills() else { return Round::Even };
        let own = self.own_slots();
        let part = Self::balance_part(&own, &fills, |_| true);
        if part.give.is_empty() {
            return Round::Even;
        }
        let Some(mut moves) = self.moves(&fills, &part) else { return Round::Moved };
        let domains: BTreeSet<u32> = fills.iter().map(|fill| fill.domain).collect();
        if moves.is_empty() && domains.len() < fills.len() {
            // Where each segment has a shard in each domain, there may be room in the same one.
            let mut drawn = true;
            for domain in domains {
                let part = Self::balance_part(&own, &fills, |fill| fill.domain == domain);
                if !part.give.is_empty() {
                    let within = self.moves(&fills, &part);
                    drawn &= within.is_some();
                    moves.extend(within.unwrap_or_default());
                }
            }
            if moves.is_empty() && !drawn {
                return Round::Moved;
            }
        }
        if moves.is_empty() {
            self.cover_for_balance().await;
            return Round::Vain;
        }
        let begun = Instant::now();
        let moved = Cell::new(0_u32);
        let moves = stream::iter(moves).for_each_concurrent(SHARDS_AT_ONCE, |shard| {
            let (moved, late) = (&moved, || begun.elapsed() >= ROUND_MAX);
            async move {
                if late() || self.balance_fills().is_none() {
                    return;
                }
                match self.move_shard(&shard).await {
                    Ok(true) => moved.set(moved.get() + 1),
                    Ok(false) => {}
                    Err(error) => tracing::debug!(
                        volume = %self.volume, segment = %shard.segment, %error, "a shard stays where it is",
                    ),
                }
            }
        });
        moves.await;
        if moved.get() == 0 {
            return Round::Vain;
        }
        tracing::debug!(volume = %self.volume, shards = moved.get(), "shards moved to where there is room");
        // It frees what was left. If it fails it is tried again by who makes checkpoints.
        if let Err(error) = self.checkpoint().await {
            tracing::debug!(volume = %self.volume, %error, "what was moved is freed later");
            self.checkpoint_wanted.notify_one();
        }
        Round::Moved
    }

    /// Nothing can be moved now: perhaps it can be later, when a checkpoint lists more of the log as sealed. An idle volume
    /// makes none by itself.
    async fn cover_for_balance(self: &Rc<Self>) {
        let covers = {
            let state = self.state.borrow();
            let log = |s: &Segment| s.kind == SegmentKind::Log && s.sealed && s.missing == 0;
            state.table.segments.values().any(|s| log(s) && !state.is_covered(s.id))
        };
        if covers && let Err(error) = self.checkpoint().await {
            tracing::debug!(volume = %self.volume, %error, "the log is not listed as sealed yet");
        }
    }

    /// Which shards a round moves, and where to: of segments that hold what lives long before those that garbage
    /// collection will empty soon. None if by chance it is nothing this time, as less than a slot is to be moved.
    fn moves(&self, fills: &[Fill], part: &Part) -> Option<Vec<Move>> {
        let (mut give, mut get) = part.round(&self.env);
        if give.is_empty() || get.is_empty() {
            return None;
        }
        let room: BTreeMap<DiskId, (u32, u32)> =
            fills.iter().map(|fill| (fill.id, (fill.room, fill.slots))).collect();
        get.retain(|disk, count| {
            // Not so much that writes would be delayed.
            *count = (*count).min(room[disk].0.saturating_sub(slow_from(room[disk].1)));
            *count > 0 && self.disks.is_healthy(*disk)
        });
        let domain: BTreeMap<DiskId, u32> =
            fills.iter().map(|fill| (fill.id, fill.domain)).collect();
        let state = self.state.borrow();
        let mut segments: Vec<&Segment> =
            state.table.segments.values().filter(|s| self.may_move(&state, s)).collect();
        segments.sort_by_cached_key(|s| {
            let live = u64::from(s.live) + u64::from(s.recent);
            let percent = live * 100 / s.capacity_blocks().max(1);
            (s.kind != SegmentKind::Data, std::cmp::Reverse(percent), s.id)
        });
        let mut moves = Vec::new();
        for segment in segments {
            if moves.len() == ROUND_SHARDS || give.is_empty() || get.is_empty() {
                break;
            }
            let gives = |member: &ShardRef| give.contains_key(&member.disk);
            let Some(shard) = segment.members.iter().position(gives) else { continue };
            let from = segment.members[shard].disk;
            let mut taken: Vec<u32> = Vec::with_capacity(segment.members.len());
            let others = segment.members.iter().enumerate().filter(|(index, _)| *index != shard);
            taken.extend(others.filter_map(|(_, member)| domain.get(&member.disk)));
            let suits = |disk: &DiskId| {
                !taken.contains(&domain[disk])
                    && !segment.lies_on(*disk)
                    && !state.lost.contains(disk)
            };
            let remains = |disk: DiskId| {
                state.table.freed.iter().any(|(id, s)| *id == segment.id && s.disk == disk)
            };
            if !get.keys().any(suits) {
                continue;
            }
            let allowed = |disk| get.contains_key(&disk) && suits(&disk) && !remains(disk);
            let chosen = self.disks.choose(&self.env, SlotClass::Client, 1, &taken, allowed).pop();
            let Some(target) = chosen else { continue };
            for (counts, disk) in [(&mut give, from), (&mut get, target.disk)] {
                if let Some(count) = counts.get_mut(&disk) {
                    *count -= 1;
                    if *count == 0 {
                        counts.remove(&disk);
                    }
                }
            }
            moves.push(Move { segment: segment.id, shard, target });
        }
        Some(moves)
    }

    /// Whether shards of a segment may be moved: it is whole, and stays for a while.
    fn may_move(&self, state: &State, segment: &Segment) -> bool {
        let id = segment.id;
        let holds_table = [&state.checkpoint, &state.root.checkpoint]
            .iter()
            .any(|c| c.as_ref().is_some_and(|c| c.place.segment == id));
        segment.sealed
            && segment.missing == 0
            && segment.pins == 0
            && !holds_table
            && !state.table.is_dead(id)
            && (segment.kind != SegmentKind::Log || state.is_covered(id))
            && !self.torn.borrow().contains(&id)
            && !self.space.emptying.borrow().contains(&id)
            && !self.balance.moving.borrow().contains_key(&id)
    }

    /// The disk that a shard of a segment is being moved to.
    pub(super) fn moves_to(&self, id: SegmentId) -> Option<DiskId> {
        self.balance.moving.borrow().get(&id).copied()
    }

    /// The disks on which shards are being put together, once for each shard.
    pub(super) fn moves_begun(&self) -> Vec<DiskId> {
        self.balance.begun.borrow().values().copied().collect()
    }

    /// Moves one shard. False if that is not to be any more.
    async fn move_shard(self: &Rc<Self>, wanted: &Move) -> Result<bool, HeadError> {
        let segment = {
            let state = self.state.borrow();
            let segment = state.table.segments.get(&wanted.segment);
            match segment.filter(|segment| self.may_move(&state, segment)) {
                Some(segment) => segment.clone(),
                None => return Ok(false),
            }
        };
        self.balance.moving.borrow_mut().insert(segment.id, wanted.target.disk);
        let there = ShardRef { disk: wanted.target.disk, creation: self.env.random_u64() };
        let copied = self.copy_shard(&segment, wanted, there.creation).await;
        self.balance.moving.borrow_mut().remove(&segment.id);
        self.balance.begun.borrow_mut().remove(&segment.id);
        let moved = copied.is_ok() && self.name_moved(&segment, wanted.shard, there);
        if !moved {
            // Whatever is there is nobody's.
            self.state.borrow_mut().table.freed.insert((segment.id, there));
        }
        copied.map(|()| moved)
    }

    /// Has the table name a shard where it was moved to, if nothing has changed since.
    fn name_moved(&self, segment: &Segment, shard: usize, there: ShardRef) -> bool {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let Some(domain) = self.disks.domain(there.disk) else { return false };
        if state.lost.contains(&there.disk) {
            return false;
        }
        let Some(entry) = state.table.segments.get_mut(&segment.id) else { return false };
        let old = segment.members[shard];
        let alone = entry.members.iter().enumerate().all(|(index, member)| {
            index == shard || self.disks.domain(member.disk) != Some(domain)
        });
        if entry.members[shard] != old || entry.missing >> shard & 1 == 1 || !alone {
            return false;
        }
        entry.members[shard] = there;
        state.table.freed.insert((segment.id, old));
        add(&self.stats.balanced_shards, 1);
        let bytes = u64::from(segment.blocks) * BLOCK_BYTES;
        add(&self.stats.balanced_bytes, bytes);
        add(&self.disks.balanced_bytes, bytes);
        true
    }

    /// Copies a shard to another disk, as it is, and seals it there.
    async fn copy_shard(
        &self,
        segment: &Segment,
        wanted: &Move,
        creation: u64,
    ) -> Result<(), HeadError> {
        let (shard, target) = (wanted.shard, &wanted.target);
        let _permit = self.disks.repair_permit(limits::repair_blocks(1, 1)).await;
        let spec = ShardSpec {
            volume: self.volume,
            segment: segment.id,
            creation,
            kind: segment.kind,
            scheme: segment.scheme,
            index: u8::try_from(shard).expect("at most 20 shards"),
            members: (0..)
                .zip(&segment.members)
                .map(|(index, member)| if index == shard { target.disk } else { member.disk })
                .collect(),
        };
        let create = target.client.create(self.authority, spec, SlotClass::Client);
        self.asked(target, timeout(CONTROL_PATIENCE, create).await)?;
        self.disks.took(target.disk);
        self.balance.begun.borrow_mut().insert(segment.id, target.disk);
        let part = self.balance.progress.part();
        let (source, _) = self.source(segment.id).ok_or(FetchError::Gone(segment.id))?;
        let source = &source;
        let salt = Salt::new(self.volume, segment.id, segment.scheme, shard);
        let window = self.config.repair_window_blocks.clamp(1, REPAIR_WINDOW_BLOCKS);
        let blocks = if bug(Bug::MoveHalf) { segment.blocks / 2 } else { segment.blocks };
        let reads = (0..blocks).step_by(window as usize).map(|at| async move {
            let count = window.min(blocks - at);
            let bytes = 2 * u64::from(count) * BLOCK_BYTES;
            let working = self.disks.budget.take(bytes, Urgency::Patient).await;
            (at, source.read_own(&self.disks, shard, at, count).await, working)
        });
        let mut reads = pin!(stream::iter(reads).buffered(REPAIR_WINDOWS_AHEAD));
        while let Some((at, read, _working)) = reads.next().await {
            let data = read.map_err(|finding| {
                self.note_findings(std::slice::from_ref(&finding));
                FetchError::Gone(segment.id)
            })?;
            let crcs: Vec<u32> =
                (at..).zip(raw_crcs(&data)).map(|(block, crc)| salt.apply(block, crc)).collect();
            let bytes = data.len() as u64;
            let append = Append {
                authority: self.authority,
                segment: segment.id,
                block: at,
                data: [data].into(),
                crcs: crcs.into(),
            };
            let append = target.client.append(append);
            self.asked(target, timeout(CONTROL_PATIENCE, append).await)?;
            part.wrote(bytes);
        }
        let seal = target.client.seal(self.authority, segment.id, blocks, None);
        self.asked(target, timeout(CONTROL_PATIENCE, seal).await)
    }

    /// Takes up what a disk answered.
    fn asked(
        &self,
        target: &Target,
        answer: Result<ShardResult<()>, tokio::time::error::Elapsed>,
    ) -> Result<(), HeadError> {
        let Err(error) = answer.unwrap_or(Err(ShardError::Unreachable)) else { return Ok(()) };
        match error {
            ShardError::Fenced(epoch) => self.stop(&format!("fenced by epoch {epoch}")),
            ShardError::NoSpace => self.disks.refused(target.disk, SlotClass::Client),
            _ => self.disks.report(target.disk, &error),
        }
        Err(HeadError::Append)
    }

    /// Where balance stands as far as this volume's shards go; none while it is not under way.
    pub fn balance_report(&self) -> Option<RepairReport> {
        let left = if self.balance.active.get() { self.balance_left() } else { 0 };
        self.balance.progress.report(left, self.stats.balanced_bytes.get())
    }

    /// Bytes of this volume that are to be moved, by the figures of now.
    fn balance_left(&self) -> u64 {
        let Some(fills) = self.balance_fills() else { return 0 };
        let part = Self::balance_part(&self.own_slots(), &fills, |_| true);
        let state = self.state.borrow();
        let sealed = state.table.segments.values().filter(|segment| segment.sealed);
        let (mut shards, mut blocks) = (0_u64, 0_u64);
        for segment in sealed {
            shards += segment.members.len() as u64;
            blocks += segment.members.len() as u64 * u64::from(segment.blocks);
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "few slots")]
        let slots = part.slots().ceil() as u64;
        slots * (blocks / shards.max(1)) * BLOCK_BYTES
    }
}
