//! Repair: shards that are missing, stale or damaged are built anew from the others.
//!
//! A segment is immutable once sealed, so a rebuilt shard is as good as the first. The new shard is
//! used from the moment it is sealed; the old one is listed as freed and deleted after the next
//! checkpoint. Where only the disk of the damaged shard itself is left, the old shard is given up
//! first, and only while the others suffice.
//!
//! Several segments are repaired at once, all that each lacks in one go ([`stream`]), so that many
//! disks read and write. Whenever one is done, the next is the one that survives the fewest further
//! losses *then*; one that survives none goes before all others in the budget
//! of the node ([`crate::shard::budget`]), which leaves it more. What could not be repaired is tried again after a pause.
//!
//! Nothing is kept of how far repair is but the segment table, which says what is missing: a head
//! that takes over goes on from its newest checkpoint, and checkpoints are made while it goes on.

mod progress;
mod stream;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::Instant;

use self::progress::Part;
pub(super) use self::progress::Repair;
pub use self::progress::RepairReport;
use self::stream::{Goal, Stream};
use super::head::{Head, HeadError, State, add};
use super::segtab::{Segment, ShardRef};
use super::walk;
use crate::id::{BLOCK_BYTES, DiskId, SegmentId};
use crate::limits::{self, RECORD_HEADER_BLOCKS_MAX, REPAIR_SEGMENTS_MAX};
use crate::segment::checksum::{Salt, raw_crcs};
use crate::segment::fetch::{FetchError, Source};
use crate::segment::open::{CONTROL_PATIENCE, frame};
use crate::segment::record::Header;
use crate::shard::budget::Urgency;
use crate::shard::disks::Target;
use crate::shard::{SegmentKind, ShardError, ShardResult, ShardSpec, SlotClass};

/// Pause before a segment that could not be repaired is tried again, unless a disk comes back.
const PAUSE: Duration = Duration::from_millis(500);
/// While shards are rebuilt, a checkpoint is asked for so often: it frees what they replace, and
/// a head that takes over need not rebuild them again.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(10);
/// How long a take-over repairs before it serves.
const TAIL_PATIENCE: Duration = Duration::from_secs(5);

/// Repairs whenever it is wanted, until the head stops.
pub(super) async fn run(head: Rc<Head>) {
    loop {
        head.repair_wanted.notified().await;
        if head.is_serving() {
            head.repair_all().await;
        }
        if !head.is_serving() {
            return;
        }
    }
}

/// The repair of one segment, and whether anything came of it.
type Running<'a> = Pin<Box<dyn Future<Output = (SegmentId, bool)> + 'a>>;

/// What is to be repaired, and what is being repaired.
#[derive(Default)]
struct Rounds<'a> {
    /// The next one first. Made anew whenever anything changes.
    queue: VecDeque<SegmentId>,
    under_way: BTreeSet<SegmentId>,
    running: FuturesUnordered<Running<'a>>,
    /// What could not be repaired, and when it is tried again.
    later: BTreeMap<SegmentId, Instant>,
}

impl Rounds<'_> {
    fn takes(&self, id: SegmentId) -> bool {
        !self.under_way.contains(&id) && !self.later.contains_key(&id)
    }
}

impl Head {
    /// Repairs until nothing is left that could be, or the head stops.
    async fn repair_all(self: &Rc<Self>) {
        let mut rounds = Rounds::default();
        // Since when no checkpoint was asked for, while there was something to repair.
        let mut asked_at = None;
        let mut repairing = None;
        while self.is_serving() {
            self.begin_repairs(&mut rounds);
            let idle = rounds.running.is_empty();
            if idle {
                repairing = None;
            } else {
                repairing.get_or_insert_with(|| self.disks.repairing());
            }
            if asked_at.is_some_and(|at: Instant| idle || at.elapsed() >= CHECKPOINT_EVERY) {
                self.checkpoint_wanted.notify_one();
                asked_at = None;
            }
            if !idle {
                asked_at.get_or_insert_with(Instant::now);
            }
            if idle {
                let Some(next) = rounds.later.values().min().copied() else { return };
                let changed = self.disks.changed.notified();
                // Whichever comes first; either is a reason to look again.
                drop(tokio::time::timeout_at(next, changed).await);
                rounds.later.clear();
                continue;
            }
            tokio::select! {
                biased;
                Some((id, repaired)) = rounds.running.next() => {
                    rounds.under_way.remove(&id);
                    if !repaired {
                        rounds.later.insert(id, Instant::now() + PAUSE);
                    }
                }
                () = self.repair_wanted.notified() => rounds.queue.clear(),
            }
        }
    }

    /// Begins to repair as many segments as may be at once.
    fn begin_repairs<'a>(self: &'a Rc<Self>, rounds: &mut Rounds<'a>) {
        let now = Instant::now();
        rounds.later.retain(|_, at| *at > now);
        if self.repair_wanted.notified().now_or_never().is_some() {
            // The next one may be another now.
            rounds.queue.clear();
        }
        let mut looked = false;
        while rounds.under_way.len() < REPAIR_SEGMENTS_MAX {
            let Some(id) = rounds.queue.pop_front() else {
                if looked {
                    return;
                }
                looked = true;
                rounds.queue = self.segments_to_repair().into();
                continue;
            };
            if !rounds.takes(id) {
                continue;
            }
            rounds.under_way.insert(id);
            rounds.running.push(Box::pin(async move {
                let repaired = self.rebuild(id, None).await;
                if let Err(error) = &repaired {
                    tracing::debug!(volume = %self.volume, segment = %id, %error, "not repaired");
                }
                (id, repaired.unwrap_or(false))
            }));
        }
    }

    /// Sealed segments with a shard missing: first those that survive the fewest further losses.
    fn segments_to_repair(&self) -> Vec<SegmentId> {
        let state = self.state.borrow();
        let mut wanted: Vec<(usize, SegmentId)> = state
            .table
            .segments
            .values()
            .filter(|s| s.sealed && s.missing != 0 && self.is_needed(&state, s.id))
            .map(|s| (self.survives(&state, s), s.id))
            .collect();
        wanted.sort_unstable();
        wanted.into_iter().map(|(_, id)| id).collect()
    }

    /// How many further losses a segment survives. What is to leave a disk that is up is not lost.
    fn survives(&self, state: &State, segment: &Segment) -> usize {
        let leaves = |&i: &usize| {
            let disk = segment.members[i].disk;
            segment.missing >> i & 1 == 1
                && !segment.is_damaged(i)
                && state.lost.contains(&disk)
                && self.disks.client(disk).is_some()
        };
        let leaving = (0..segment.members.len()).filter(leaves).count();
        (segment.present() + leaving).saturating_sub(segment.scheme.data.into())
    }

    /// Repairs log segments that a take-over found incomplete, as far as disks are there for it and
    /// do not take long: the newest first, whose records may be on fewer disks than the others'.
    /// The rest is repaired while the head serves.
    pub(super) async fn repair_tail(self: &Rc<Self>, segments: Vec<SegmentId>) {
        let since = Instant::now();
        for id in segments.into_iter().rev() {
            if since.elapsed() >= TAIL_PATIENCE {
                tracing::warn!(volume = %self.volume, "the log stays reduced for now: its disks are slow");
                return;
            }
            // Data segments may be large and many: they are repaired while the volume is served.
            let lacks = |s: &Segment| s.kind == SegmentKind::Log && s.missing != 0;
            if !self.state.borrow().table.segments.get(&id).is_some_and(lacks) {
                continue;
            }
            if let Err(error) = self.rebuild(id, Some(Urgency::Now)).await {
                tracing::warn!(volume = %self.volume, segment = %id, %error,
                    "a segment of the log stays reduced for now");
            }
        }
    }

    /// Seals the shards of disks that came too late to be settled by the take-over under way: what
    /// only they hold cannot be read before.
    pub(super) async fn reseal_missing(&self) {
        for id in self.segments_to_repair() {
            self.reseal_all(id).await;
        }
    }

    /// Seals the shards of a segment that their disks closed while they held all of it.
    async fn reseal_all(&self, id: SegmentId) {
        for shard in self.missing_of(id) {
            self.reseal(id, shard).await;
        }
    }

    /// The shards that a sealed segment lacks; none if it was freed.
    fn missing_of(&self, id: SegmentId) -> Vec<usize> {
        let state = self.state.borrow();
        let Some(segment) = state.table.segments.get(&id).filter(|s| s.sealed) else {
            return Vec::new();
        };
        (0..segment.members.len()).filter(|i| segment.missing >> i & 1 == 1).collect()
    }

    /// Builds the shards anew that a segment lacks; how urgent that is follows from what it
    /// survives, if nothing is said. False when there is nothing to do, or nowhere to put them.
    async fn rebuild(
        self: &Rc<Self>,
        id: SegmentId,
        urgency: Option<Urgency>,
    ) -> Result<bool, HeadError> {
        for shard in self.missing_of(id) {
            let leaves = {
                let state = self.state.borrow();
                let Some(segment) = state.table.segments.get(&id) else { return Ok(false) };
                // What is to leave a disk does not count again because it is whole there.
                state.lost.contains(&segment.members[shard].disk) || segment.is_damaged(shard)
            };
            if !leaves {
                self.reseal(id, shard).await;
            }
        }
        let missing = self.missing_of(id);
        let (segment, survives) = {
            let state = self.state.borrow();
            match state.table.segments.get(&id) {
                Some(s) if !missing.is_empty() => (s.clone(), self.survives(&state, s)),
                // It was whole, or is now.
                found => return Ok(found.is_some()),
            }
        };
        let urgency =
            urgency.unwrap_or(if survives == 0 { Urgency::Soon } else { Urgency::Patient });
        let mut goals = Vec::new();
        let mut homeless = Vec::new();
        for shard in missing {
            match self.repair_target(&segment, shard, &goals) {
                Some(target) => {
                    goals.push(Goal { shard, target: Some(target), failed: None });
                }
                None => homeless.push(shard),
            }
        }
        let mut result = Ok(false);
        if !goals.is_empty() {
            result = self.rebuild_elsewhere(&segment, goals, urgency).await;
        }
        for shard in homeless {
            let Some(segment) = self.state.borrow().table.segments.get(&id).cloned() else { break };
            if segment.missing >> shard & 1 == 1 {
                result = match (result, self.give_up_in_place(&segment, shard, urgency).await) {
                    (Ok(a), Ok(b)) => Ok(a || b),
                    (Ok(true), Err(_)) | (Err(_), Ok(true)) => Ok(true),
                    (Err(error), _) | (_, Err(error)) => Err(error),
                };
            }
        }
        result
    }

    /// Builds shards on other disks, and has the segment use them. False if nothing came of it.
    async fn rebuild_elsewhere(
        self: &Rc<Self>,
        segment: &Segment,
        goals: Vec<Goal>,
        urgency: Urgency,
    ) -> Result<bool, HeadError> {
        let id = segment.id;
        let creation = self.env.random_u64();
        let new: Vec<(usize, ShardRef)> = goals
            .iter()
            .filter_map(|goal| {
                let disk = goal.target.as_ref()?.disk;
                Some((goal.shard, ShardRef { disk, creation }))
            })
            .collect();
        let part = self.repair.part();
        let built = self.build(segment, goals, creation, urgency, &part).await;
        let mut rebuilt = false;
        for &(shard, there) in &new {
            let whole = built.as_ref().is_ok_and(|built| {
                built.iter().any(|goal| goal.shard == shard && goal.failed.is_none())
            });
            let mut state = self.state.borrow_mut();
            let entry = state.table.segments.get_mut(&id).filter(|s| {
                whole && s.members[shard] == segment.members[shard] && s.missing >> shard & 1 == 1
            });
            let Some(entry) = entry else {
                // Failed, or freed meanwhile: whatever is there is nobody's.
                state.table.freed.insert((id, there));
                continue;
            };
            let old = std::mem::replace(&mut entry.members[shard], there);
            entry.note_whole(shard);
            state.table.freed.remove(&(id, there));
            if !old.disk.is_nil() {
                state.table.freed.insert((id, old));
            }
            self.count_rebuilt(segment);
            rebuilt = true;
            tracing::info!(
                volume = %self.volume, segment = %id, shard, disk = %there.disk,
                bytes = u64::from(segment.blocks) * BLOCK_BYTES, "shard rebuilt",
            );
        }
        match built {
            Err(error) => Err(error),
            Ok(goals) => match goals.into_iter().find_map(|goal| goal.failed) {
                Some(error) if !rebuilt => Err(error),
                _ => Ok(rebuilt),
            },
        }
    }

    fn count_rebuilt(&self, segment: &Segment) {
        add(&self.stats.rebuilt_shards, 1);
        let bytes = u64::from(segment.blocks) * BLOCK_BYTES;
        add(&self.stats.rebuilt_bytes, bytes);
        add(&self.disks.rebuilt_bytes, bytes);
    }

    /// Where repair stands; none while nothing is to be rebuilt.
    pub fn repair_report(&self) -> Option<RepairReport> {
        let missing: u64 = {
            let state = self.state.borrow();
            let segments = state.table.segments.values();
            segments
                .filter(|s| s.sealed && s.missing != 0 && self.is_needed(&state, s.id))
                .map(|s| u64::from(s.missing.count_ones()) * u64::from(s.blocks))
                .sum()
        };
        self.repair.report(missing * BLOCK_BYTES, self.stats.rebuilt_bytes.get())
    }

    /// Where the shard may go: a domain that no other shard of the segment lies in, on a disk that
    /// holds no remains of the segment; nor those that are chosen for others of its shards.
    fn repair_target(&self, segment: &Segment, shard: usize, chosen: &[Goal]) -> Option<Target> {
        let state = self.state.borrow();
        let others = chosen.iter().filter_map(|goal| goal.target.as_ref());
        let mut taken: Vec<u32> = others.filter_map(|t| self.disks.domain(t.disk)).collect();
        for (index, member) in segment.members.iter().enumerate() {
            if index != shard
                && segment.missing >> index & 1 == 0
                && let Some(domain) = self.disks.domain(member.disk)
            {
                taken.push(domain);
            }
        }
        let remains: Vec<DiskId> = state
            .table
            .freed
            .iter()
            .filter(|(id, _)| *id == segment.id)
            .map(|(_, s)| s.disk)
            .chain(segment.members.iter().map(|m| m.disk))
            .collect();
        // One of its shards is on its way to another domain.
        taken.extend(self.moves_to(segment.id).and_then(|disk| self.disks.domain(disk)));
        // Until it is listed as sealed, a log segment stays within the log set.
        let free = segment.kind != SegmentKind::Log || state.is_covered(segment.id);
        let pairs = state.pairs();
        let allowed = |disk: DiskId| {
            let in_set = || pairs.iter().all(|set| set.domain_of(disk).is_some());
            !remains.contains(&disk)
                && self.disks.is_healthy(disk)
                && !state.lost.contains(&disk)
                && (free || in_set())
        };
        if let Some(heir) = self.disks.heir(segment.members[shard].disk) {
            let allowed = |disk| disk == heir && allowed(disk);
            let chosen = self.disks.choose(&self.env, SlotClass::Repair, 1, &taken, allowed).pop();
            if chosen.is_some() {
                return chosen;
            }
        }
        self.disks.choose(&self.env, SlotClass::Repair, 1, &taken, allowed).pop()
    }

    /// Where no other disk can take the shard but its own does work: lists the old shard as freed
    /// under a new creation, so that after the next checkpoint the disk has room for the new one.
    async fn give_up_in_place(
        self: &Rc<Self>,
        segment: &Segment,
        shard: usize,
        urgency: Urgency,
    ) -> Result<bool, HeadError> {
        let old = segment.members[shard];
        let placeholder_gone = {
            let state = self.state.borrow();
            !state.table.freed.iter().any(|(id, s)| *id == segment.id && s.disk == old.disk)
        };
        if !self.disks.is_healthy(old.disk)
            || segment.present() < usize::from(segment.scheme.data)
            || !placeholder_gone
        {
            return Ok(false);
        }
        // Does the disk still hold anything of the segment?
        let Some(client) = self.disks.client(old.disk) else { return Ok(false) };
        let held = client.list(self.volume);
        let Ok(Ok(held)) = tokio::time::timeout(CONTROL_PATIENCE, held).await else {
            return Ok(false);
        };
        let remains = held.shards.iter().find(|info| info.spec.segment == segment.id);
        if let Some(info) = remains {
            // Whatever only this shard holds would be lost with it.
            if let Err(error) = self.others_suffice(segment, shard, urgency).await {
                self.move_elsewhere(segment.id);
                return Err(error);
            }
            let shard_there = ShardRef { disk: old.disk, creation: info.spec.creation };
            {
                let mut state = self.state.borrow_mut();
                let fresh = ShardRef { disk: old.disk, creation: self.env.random_u64() };
                let Some(entry) = state.table.segments.get_mut(&segment.id) else {
                    return Ok(false);
                };
                // It may have been found whole meanwhile.
                if entry.members[shard] != old || entry.missing >> shard & 1 == 0 {
                    return Ok(false);
                }
                entry.members[shard] = fresh;
                entry.damaged &= !(1 << shard);
                state.table.freed.insert((segment.id, shard_there));
            }
            self.checkpoint().await?;
            return Ok(true);
        }
        let info = client.info();
        let Ok(Ok(info)) = tokio::time::timeout(CONTROL_PATIENCE, info).await else {
            return Ok(false);
        };
        let target = Target { disk: old.disk, client, slot_bytes: info.slot_bytes };
        self.rebuild_in_place(segment, Goal { shard, target: Some(target), failed: None }, urgency)
            .await
    }

    /// Builds a shard on the disk that held it, under the creation that the table names.
    async fn rebuild_in_place(
        self: &Rc<Self>,
        segment: &Segment,
        goal: Goal,
        urgency: Urgency,
    ) -> Result<bool, HeadError> {
        let shard = goal.shard;
        let old = segment.members[shard];
        let part = self.repair.part();
        let built = self.build(segment, vec![goal], old.creation, urgency, &part).await;
        let failed = match built {
            Ok(goals) => goals.into_iter().find_map(|goal| goal.failed),
            Err(error) => Some(error),
        };
        let mut state = self.state.borrow_mut();
        if let Some(error) = failed {
            // Whatever was created goes under this creation: the next try takes another.
            let fresh = ShardRef { disk: old.disk, creation: self.env.random_u64() };
            if let Some(entry) = state.table.segments.get_mut(&segment.id)
                && entry.members[shard] == old
                && entry.missing >> shard & 1 == 1
            {
                entry.members[shard] = fresh;
                state.table.freed.insert((segment.id, old));
            }
            return Err(error);
        }
        if let Some(entry) = state.table.segments.get_mut(&segment.id)
            && entry.members[shard] == old
        {
            entry.note_whole(shard);
            self.count_rebuilt(segment);
        }
        Ok(true)
    }

    /// Has garbage collection move what is live in a segment that lacks a shard for which there is
    /// no other place, while some blocks lie on nothing but what is left of that shard.
    fn move_elsewhere(&self, id: SegmentId) {
        self.torn.borrow_mut().insert(id);
        self.gc_wanted.notify_one();
    }

    /// Reads everything that a shard is to hold from the others.
    async fn others_suffice(
        &self,
        segment: &Segment,
        shard: usize,
        urgency: Urgency,
    ) -> Result<(), HeadError> {
        let data = segment.scheme.data.into();
        let _permit = self.disks.repair_permit(limits::repair_blocks(data, 1)).await;
        let goals = vec![Goal { shard, target: None, failed: None }];
        let part = self.repair.part();
        Stream::new(self, segment, goals, &part, urgency, 1 << shard).run().await.map(drop)
    }

    /// The record at block `at` as shard `shard` is to hold it, header and payload. Copies that no
    /// sealed shard delivers are taken as they lie on the disks: those of a member that was closed
    /// before it had all, or whose stored checksums are lost, are as good.
    async fn read_record(
        &self,
        source: &Source,
        segment: &Segment,
        shard: usize,
        at: u32,
    ) -> Result<(Header, Bytes), HeadError> {
        let error = match self.sealed_record(source, segment, shard, at).await {
            Err(HeadError::Fetch(error @ FetchError::TooFew { .. })) => error,
            other => return other,
        };
        let copies = segment.scheme.data == 1 && segment.kind != SegmentKind::Data;
        let members = (0..source.members.len()).filter(|i| source.without >> i & 1 == 0);
        let members = members.map(|i| source.members[i]);
        if !copies {
            return Err(error.into());
        }
        let copied = walk::copied_record(&self.disks, self.volume, segment, members, at);
        copied.await.ok_or(error.into())
    }

    async fn sealed_record(
        &self,
        source: &Source,
        segment: &Segment,
        shard: usize,
        at: u32,
    ) -> Result<(Header, Bytes), HeadError> {
        let header = self.any_header(source, segment, shard, at).await?;
        let first = at + header.header_blocks;
        if header.payload_blocks == 0 {
            return Ok((header, Bytes::new()));
        }
        let mut findings = Vec::new();
        let hear = &mut |finding| findings.push(finding);
        let read = source.read(&self.disks, shard, first, header.payload_blocks, hear).await;
        if source.missing >> shard & 1 == 0 {
            // It is being mended: that some of it is bad is known.
            findings.retain(|finding| {
                finding.creation != source.creations[shard] || finding.disk != source.members[shard]
            });
        }
        // What nobody holds whole is moved instead (garbage collection).
        self.note_findings(&findings);
        Ok((header, read?))
    }

    /// Creates, fills and seals shards, those without a failure in the answer.
    ///
    /// # Errors
    /// The segment cannot be read, or no shard could be built.
    async fn build(
        &self,
        segment: &Segment,
        mut goals: Vec<Goal>,
        creation: u64,
        urgency: Urgency,
        part: &Part<'_>,
    ) -> Result<Vec<Goal>, HeadError> {
        let held = limits::repair_blocks(segment.scheme.data.into(), goals.len());
        let _permit = self.disks.repair_permit(held).await;
        let creates = goals.iter().map(|goal| self.create_goal(segment, goal, creation));
        let created = join_all(creates).await;
        self.settle_goals(&mut goals, created)?;
        let mut goals = Stream::new(self, segment, goals, part, urgency, 0).run().await?;
        let patience = CONTROL_PATIENCE;
        let seals = goals.iter().map(async |goal| match &goal.target {
            Some(target) if goal.failed.is_none() => {
                let seal = target.client.seal(self.authority, segment.id, segment.blocks, None);
                let sealed = tokio::time::timeout(patience, seal).await;
                sealed.unwrap_or(Err(ShardError::Unreachable))
            }
            _ => Ok(()),
        });
        let sealed = join_all(seals).await;
        self.settle_goals(&mut goals, sealed)?;
        Ok(goals)
    }

    async fn create_goal(&self, segment: &Segment, goal: &Goal, creation: u64) -> ShardResult<()> {
        let Some(target) = &goal.target else { return Ok(()) };
        let spec = ShardSpec {
            volume: self.volume,
            segment: segment.id,
            creation,
            kind: segment.kind,
            scheme: segment.scheme,
            index: u8::try_from(goal.shard).expect("at most 20 shards"),
            members: (0..)
                .zip(&segment.members)
                .map(|(i, m)| if i == goal.shard { target.disk } else { m.disk })
                .collect(),
        };
        let create = target.client.create(self.authority, spec, SlotClass::Repair);
        let created = tokio::time::timeout(CONTROL_PATIENCE, create).await;
        created.unwrap_or(Err(ShardError::Unreachable))
    }

    /// Takes up what disks answered to goals.
    ///
    /// # Errors
    /// None of them is left.
    fn settle_goals(
        &self,
        goals: &mut [Goal],
        answers: Vec<ShardResult<()>>,
    ) -> Result<(), HeadError> {
        for (goal, answer) in goals.iter_mut().zip(answers) {
            if let (Err(error), Some(target)) = (answer, &goal.target) {
                if error == ShardError::NoSpace {
                    self.disks.refused(target.disk, SlotClass::Repair);
                }
                self.disks.report(target.disk, &error);
                goal.failed.get_or_insert(HeadError::Append);
            }
        }
        if goals.iter().all(|goal| goal.failed.is_some()) {
            return Err(HeadError::Append);
        }
        Ok(())
    }

    /// The record at block `at` of shard `shard`, made from the other shards.
    pub(super) async fn rebuilt_record(
        &self,
        source: &Source,
        segment: &Segment,
        shard: usize,
        at: u32,
    ) -> Result<(Vec<Bytes>, Vec<u32>), HeadError> {
        let (mut header, data) = self.read_record(source, segment, shard, at).await?;
        let copies = segment.scheme.data == 1 && segment.kind != SegmentKind::Data;
        header.shard = if copies { 0 } else { u8::try_from(shard).expect("at most 20") };
        let salt = Salt::new(self.volume, segment.id, segment.scheme, shard);
        let first = at + header.header_blocks;
        header.crcs = (first..).zip(raw_crcs(&data)).map(|(b, c)| salt.apply(b, c)).collect();
        let payload = if data.is_empty() { vec![] } else { vec![data] };
        Ok(frame(salt, &header, &payload))
    }

    /// The header of the record at block `at`: from the shard to be rebuilt only where no other
    /// holds it whole.
    pub(super) async fn any_header(
        &self,
        source: &Source,
        segment: &Segment,
        not: usize,
        at: u32,
    ) -> Result<Header, HeadError> {
        let most = u32::try_from(RECORD_HEADER_BLOCKS_MAX).expect("small");
        let mut error = FetchError::Gone(segment.id);
        let mut order: Vec<usize> = (0..segment.members.len()).collect();
        order.sort_by_key(|&i| (i == not, segment.missing >> i & 1));
        for other in order {
            for count in [most.min(segment.blocks - at), 1] {
                match source.read_one(&self.disks, other, at, count).await {
                    Ok(data) => {
                        if let Ok(header) = Header::decode(&data) {
                            return Ok(header);
                        }
                    }
                    Err(e) => error = e,
                }
            }
        }
        Err(error.into())
    }

    /// Whether anything still needs a segment: the index, a checkpoint, or the replay from it.
    pub(super) fn is_needed(&self, state: &State, id: SegmentId) -> bool {
        let holds_table = [&state.checkpoint, &state.root.checkpoint]
            .iter()
            .any(|c| c.as_ref().is_some_and(|c| c.place.segment == id));
        let (log, _) = self.capture.borrow().log;
        let replayed = state
            .table
            .segments
            .get(&id)
            .is_some_and(|s| s.kind == SegmentKind::Log && s.id >= log);
        holds_table || replayed || !state.table.is_dead(id)
    }

    /// Segments that have fewer shards than their scheme, and the fewest losses that one of them
    /// still survives.
    pub fn reduced(&self) -> (usize, Option<usize>) {
        let state = self.state.borrow();
        let reduced = state
            .table
            .segments
            .values()
            .filter(|s| s.missing != 0 && self.is_needed(&state, s.id));
        let left = reduced.clone().map(|s| s.present().saturating_sub(usize::from(s.scheme.data)));
        (reduced.count(), left.min())
    }
}
