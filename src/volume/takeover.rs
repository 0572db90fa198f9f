//! Taking over a volume: fence, walk the log, settle what was open, checkpoint, serve.
//!
//! The five steps of design 6. Nothing is served, and nothing is deleted, before the checkpoint of
//! the new epoch is the root's and in force. When too few disks answer the take-over waits and
//! says for whom; when the log ends below what was acknowledged it fails with
//! [`TakeOverError::Damaged`] instead of serving old data.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::stream::{self, FuturesUnordered, StreamExt};
use tokio::time::Instant;

use super::head::{Head, HeadContext, HeadError, State};
use super::index::{Tree, height_for};
use super::overlay::Overlay;
use super::root::{CheckpointRef, Root};
use super::rules;
use super::segtab::{ShardRef, Snapshot};
use super::swap::{Swapped, mirror, swap};
use super::walk::{self, Replay};
use crate::id::{BLOCK_BYTES, DiskId, Epoch, HeadId, Lsn, SegmentId, VolumeId};
use crate::limits::SEGMENT_RANGE;
use crate::meta::{MetaError, schema};
use crate::planted::{Bug, bug};
use crate::segment::record::{CheckpointPlace, Entry, Header};
use crate::shard::disks::Disks;
use crate::shard::{
    Authority, MIRROR_BYTES_MAX, SegmentKind, ShardClient, ShardError, ShardInfo, ShardState,
};

/// How long one disk may take to answer a fence before the take-over goes on to ask again.
const FENCE_PATIENCE: Duration = Duration::from_secs(2);

/// Segments that are settled at the same time, so that a slow disk does not cost its time for each;
/// what is read of each is bounded, and so is what is read of all.
const SETTLED_AT_ONCE: usize = 8;
/// How often an orderly end tries to store its checkpoint, with another disk failing under each try.
const RELEASE_TRIES: u32 = 5;

/// Why a volume could not be taken over; all of them may pass when tried again.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// The metadata store failed.
    #[error(transparent)]
    Meta(#[from] MetaError),
    /// The volume has no root.
    #[error("volume {0} has no root in the metadata store")]
    NoRoot(VolumeId),
    /// The root cannot be understood.
    #[error("the root of the volume: {0}")]
    BadRoot(#[from] crate::meta::envelope::EnvelopeError),
    /// Another head took the volume meanwhile.
    #[error("another head took the volume")]
    Lost,
    /// A disk has seen a newer root.
    #[error(
        "disk {disk} has seen root {}.{} of the volume, but the metadata store has {}.{}: the store is an \
         old copy, which is not believed", seen.0, seen.1, found.0, found.1
    )]
    StoreBehind {
        /// The disk.
        disk: DiskId,
        /// Epoch and sequence that it has seen.
        seen: (Epoch, u64),
        /// Those of the store.
        found: (Epoch, u64),
    },
    /// The checkpoint cannot be read from any of its shards.
    #[error("the checkpoint in segment {segment} cannot be read: {why}")]
    NoCheckpoint {
        /// The segment.
        segment: SegmentId,
        /// What the last shard said.
        why: String,
    },
    /// The log ends below a record that was acknowledged.
    #[error("the log ends at record {end}, but record {acked} was acknowledged: disks are missing")]
    Damaged {
        /// The last record found.
        end: Lsn,
        /// The highest acknowledged one.
        acked: Lsn,
    },
    /// The log goes on with a record that this version does not understand.
    #[error(
        "block {block} of log segment {segment} holds a record of a newer version: run the newer sds"
    )]
    Newer {
        /// The segment.
        segment: SegmentId,
        /// Where the record lies, blocks.
        block: u32,
    },
    /// Disks were fenced but then did not yield their records, and one of them could hold the end
    /// of the log.
    #[error("disks {0:?} do not yield the records they hold")]
    Unread(BTreeSet<DiskId>),
    /// A later step failed.
    #[error(transparent)]
    Head(#[from] HeadError),
}

/// What the disks hold of the volume.
pub(super) type Listing = BTreeMap<SegmentId, BTreeMap<DiskId, ShardInfo>>;

/// Takes over the volume, whose size is `size` bytes; `waiting` hears for whom it waits.
///
/// # Errors
/// [`TakeOverError`].
pub async fn take_over(
    context: HeadContext,
    volume: VolumeId,
    size: u64,
    waiting: &dyn Fn(&str),
) -> Result<Rc<Head>, TakeOverError> {
    check_newest(&context, volume, waiting).await?;
    let (root, revision, released) = claim(&context, volume).await?;
    let authority = Authority { volume, epoch: root.epoch, head: root.head };
    let claimed = Claimed { root, revision };
    let (claimed, listing, fenced, fenced_at) =
        fence_all(&context, authority, claimed, waiting).await?;
    let root = (claimed.root, claimed.revision);
    let head = recover(context, authority, root, size, (listing, fenced.clone())).await?;
    head.checkpoint_until_done().await?;
    if !released && !bug(Bug::ServeBeforeLease) {
        tokio::time::sleep_until(fenced_at + head.config.lease.mul_f64(1.25)).await;
    }
    head.start();
    // Who did not answer, and is up all the same, may hold what nobody has listed.
    for disk in head.disks.ids().into_iter().filter(|disk| !fenced.contains(disk)) {
        let head = head.clone();
        tokio::task::spawn_local(async move { head.disk_returned(disk).await });
    }
    Ok(head)
}

async fn stored_root(context: &HeadContext, volume: VolumeId) -> Result<Root, TakeOverError> {
    let stored = context.store.get(&schema::root_key(volume)).await?;
    Ok(Root::decode(&stored.ok_or(TakeOverError::NoRoot(volume))?.value)?)
}

/// Before anything is changed: whether the store is as new as the disks are. A root is mirrored only when it is known to
/// be the store's, so one that is newer than the store's proves that the store is an old copy. (Whose
/// roots name checkpoints that were freed since; to claim one would make it newer than what the disks
/// remember.) As many disks are heard as a take-over has to fence.
async fn check_newest(
    context: &HeadContext,
    volume: VolumeId,
    waiting: &dyn Fn(&str),
) -> Result<(), TakeOverError> {
    if bug(Bug::SkipFence) || bug(Bug::FenceTooFew) {
        return Ok(());
    }
    let mut answered: BTreeSet<DiskId> = BTreeSet::new();
    for tries in 0_u32.. {
        let root = stored_root(context, volume).await?;
        let members = root.set.members().iter().map(|member| member.disk);
        let asked = members.filter(|disk| !answered.contains(disk));
        let mut answers: FuturesUnordered<_> = asked
            .filter_map(|disk| Some(seen_root(disk, context.disks.client(disk)?, volume)))
            .collect();
        while !rules::fenced_enough(&root.set, &answered)
            && let Some((disk, answer)) = answers.next().await
        {
            let Some(seen) = answer else { continue };
            // Its head may have swapped it since it was read here.
            if seen.is_some_and(|seen| seen > (root.epoch, root.sequence)) {
                let now = stored_root(context, volume).await?;
                let found = (now.epoch, now.sequence);
                if let Some(seen) = seen.filter(|seen| *seen > found) {
                    return Err(TakeOverError::StoreBehind { disk, seen, found });
                }
            }
            answered.insert(disk);
        }
        if rules::fenced_enough(&root.set, &answered) {
            return Ok(());
        }
        if tries % 10 == 0 {
            let missing = rules::domains_missing(&root.set, &answered);
            waiting(&format!("waiting for failure domains {missing:?} to answer"));
        }
        let changed = context.disks.changed.notified();
        drop(tokio::time::timeout(Duration::from_millis(100), changed).await);
    }
    unreachable!("tried for ever")
}

/// Epoch and sequence of the newest root that a disk has a mirror of, once it says so.
async fn seen_root(
    disk: DiskId,
    client: Rc<dyn ShardClient>,
    volume: VolumeId,
) -> (DiskId, Option<Option<(Epoch, u64)>>) {
    let answer = tokio::time::timeout(FENCE_PATIENCE, client.list(volume)).await;
    let held = answer.ok().and_then(Result::ok);
    (disk, held.map(|held| held.mirror.map(|mirror| mirror.revision)))
}

/// Step 1: swaps the root to the next epoch, with a fresh range of segment numbers.
async fn claim(
    context: &HeadContext,
    volume: VolumeId,
) -> Result<(Root, u64, bool), TakeOverError> {
    let incarnation = context.store.identity().await?.incarnation;
    let key = schema::root_key(volume);
    let stored = context.store.get(&key).await?.ok_or(TakeOverError::NoRoot(volume))?;
    let old = Root::decode(&stored.value)?;
    let epoch = if old.epoch.incarnation() == u64::from(incarnation) {
        old.epoch.next()
    } else {
        Epoch::new(incarnation, 1)
    };
    let former = rules::former_sets(&old.set, &old.former, false)
        .into_iter()
        .filter(|set| *set != old.set)
        .collect();
    let new = Root {
        epoch,
        head: HeadId::from_bytes(context.env.random_bytes()),
        sequence: old.sequence + 1,
        released: old.released && bug(Bug::StaysReleased),
        former,
        range: (old.range.1, old.range.1 + SEGMENT_RANGE),
        ..old
    };
    match swap(&*context.store, &new, stored.revision).await? {
        Swapped::Ours(revision) => Ok((new, revision, old.released)),
        Swapped::Lost => Err(TakeOverError::Lost),
        Swapped::Gone => Err(TakeOverError::NoRoot(volume)),
    }
}

/// A root that this head swapped in.
struct Claimed {
    root: Root,
    revision: u64,
}

/// Step 2: fences the disks of the log set until enough of them have answered and the root is in
/// force, and asks all others that are up. Where enough are fenced but too few are left for the
/// root to be in force, a narrower one follows it.
async fn fence_all(
    context: &HeadContext,
    authority: Authority,
    mut claimed: Claimed,
    waiting: &dyn Fn(&str),
) -> Result<(Claimed, Listing, BTreeSet<DiskId>, Instant), TakeOverError> {
    let mut listing = Listing::new();
    let mut answered: BTreeSet<DiskId> = BTreeSet::new();
    // Those that have the newest root.
    let mut mirrored: BTreeSet<DiskId> = BTreeSet::new();
    let refusals = Refusals::default();
    let started = Instant::now();
    let mut tries = 0;
    loop {
        let root = &claimed.root;
        let mut wanted: BTreeSet<DiskId> = context.disks.ids().into_iter().collect();
        let in_set = root.set.members().iter().map(|m| m.disk);
        wanted.extend(in_set.filter(|disk| context.disks.client(*disk).is_some()));
        let fences = wanted.difference(&answered).copied().collect::<Vec<_>>();
        let fence = |disk| fence_one(&context.disks, authority, root, disk, &refusals);
        let requests = fences.into_iter().map(fence);
        for fence in join_all(requests).await {
            let Some((disk, shards)) = fence? else { continue };
            answered.insert(disk);
            mirrored.insert(disk);
            for info in shards {
                listing.entry(info.spec.segment).or_default().insert(disk, info);
            }
        }
        let enough = rules::fenced_enough(&root.set, &answered) || bug(Bug::SkipFence);
        let too_few = bug(Bug::FenceTooFew) && !answered.is_empty();
        if too_few || (enough && rules::in_force(&root.set, &root.former, &mirrored)) {
            return Ok((claimed, listing, answered, Instant::now()));
        }
        tries += 1;
        if tries % 10 == 1 {
            let missing = rules::domains_missing(&root.set, &answered);
            waiting(&format!("waiting for failure domains {missing:?} to answer"));
        }
        if enough && started.elapsed() >= context.config.shrink_after {
            claimed = shrink_claimed(context, claimed, &answered).await?;
            let made = mirror(&context.disks, authority, &claimed.root).await;
            // Whoever fenced a disk swapped the root before.
            mirrored = made.map_err(|_| TakeOverError::Lost)?;
        }
        let changed = context.disks.changed.notified();
        // Whichever comes first: a disk that returned, or time to ask again.
        drop(tokio::time::timeout(Duration::from_millis(100), changed).await);
    }
}

/// Swaps in a narrower root where one could come into force on the disks that have answered. The
/// open segments are not known yet: each lost domain costs one of the width.
async fn shrink_claimed(
    context: &HeadContext,
    claimed: Claimed,
    answered: &BTreeSet<DiskId>,
) -> Result<Claimed, TakeOverError> {
    let Claimed { root, revision } = &claimed;
    let former = rules::former_sets(&root.set, &root.former, false);
    let reachable = answered.iter().copied().filter(|disk| context.disks.client(*disk).is_some());
    let Some(set) = rules::shrunk(&root.set, &former, &reachable.collect(), None) else {
        return Ok(claimed);
    };
    let former = former.into_iter().filter(|old| *old != set).collect();
    let new = Root { set, former, sequence: root.sequence + 1, ..root.clone() };
    if new.encode().len() > MIRROR_BYTES_MAX {
        return Ok(claimed);
    }
    match swap(&*context.store, &new, *revision).await {
        Ok(Swapped::Ours(revision)) => {
            tracing::warn!(volume = %new.volume, width = new.set.width(), "too few failure domains: the log shrinks");
            Ok(Claimed { root: new, revision })
        }
        Ok(Swapped::Lost) => Err(TakeOverError::Lost),
        Ok(Swapped::Gone) => Err(TakeOverError::NoRoot(new.volume)),
        // Nothing is in doubt: it is tried again.
        Err(_) => Ok(claimed),
    }
}

/// Why each disk refused a fence last: told once, however often it is asked.
type Refusals = RefCell<BTreeMap<DiskId, String>>;

async fn fence_one(
    disks: &Disks,
    authority: Authority,
    root: &Root,
    disk: DiskId,
    refusals: &Refusals,
) -> Result<Option<(DiskId, Vec<ShardInfo>)>, TakeOverError> {
    let Some(client) = disks.client(disk) else { return Ok(None) };
    if bug(Bug::SkipFence) {
        let held = client.list(authority.volume).await;
        return Ok(held.ok().map(|held| (disk, held.shards)));
    }
    // The mirror counts for the log set only; a disk outside it is fenced all the same.
    let fence = client.fence(authority, Some(root.mirror()));
    match tokio::time::timeout(FENCE_PATIENCE, fence).await {
        Ok(Ok(held)) => Ok(Some((disk, held.shards))),
        // Whoever fenced it swapped the root before.
        Ok(Err(ShardError::Fenced(epoch))) if epoch > authority.epoch => Err(TakeOverError::Lost),
        Ok(Err(error)) => {
            let why = error.to_string();
            let told = refusals.borrow_mut().insert(disk, why.clone());
            if told.is_none_or(|told| told != why) {
                tracing::warn!(volume = %authority.volume, %disk, %error, "fence refused");
            }
            Ok(None)
        }
        Err(_) => {
            disks.report(disk, &ShardError::Unreachable);
            Ok(None)
        }
    }
}

/// Steps 3 and 4, up to the point where the new checkpoint can be written.
async fn recover(
    context: HeadContext,
    authority: Authority,
    (root, revision): (Root, u64),
    size: u64,
    (listing, fenced): (Listing, BTreeSet<DiskId>),
) -> Result<Rc<Head>, TakeOverError> {
    let mut listing = listing;
    let void = take_void(&mut listing, &root);
    let listing = &listing;
    let base = match &root.checkpoint {
        None => None,
        Some(checkpoint) => {
            let newest =
                newer_checkpoint(&context.disks, authority.volume, checkpoint, listing).await;
            Some(load_checkpoint(&context.disks, authority.volume, newest).await?)
        }
    };
    let (snapshot, checkpoint) = if let Some((snapshot, checkpoint)) = base {
        (snapshot, Some(checkpoint))
    } else {
        let height = height_for(size.div_ceil(BLOCK_BYTES));
        (Snapshot { volume: authority.volume, height, ..Snapshot::default() }, None)
    };
    let (epoch, log) = (snapshot.epoch, snapshot.log.unwrap_or_default());
    let state = state_of(root, revision, size, snapshot, checkpoint.clone());
    let head = Head::new(context, authority, state);
    head.discard_now(void).await;
    let Some(checkpoint) = checkpoint else {
        head.adopt_orphans(listing);
        return Ok(head);
    };
    head.settle_kind(listing, SegmentKind::Meta, &checkpoint, &BTreeMap::new()).await;
    let replay = head.replay(listing, &fenced, epoch, log).await?;
    // The replay must still know what the checkpoint lists as freed: the disks offer it no less.
    head.finish_deletions(&checkpoint).await?;
    let lengths = &replay.lengths;
    head.settle_kind(listing, SegmentKind::Data, &checkpoint, lengths).await;
    head.settle_kind(listing, SegmentKind::Log, &checkpoint, lengths).await;
    head.adopt_orphans(listing);
    head.repair_tail(lengths.keys().copied().collect()).await;
    Ok(head)
}

/// The state of a head that found this checkpoint.
fn state_of(
    root: Root,
    revision: u64,
    size: u64,
    snapshot: Snapshot,
    checkpoint: Option<CheckpointRef>,
) -> State {
    let next_segment = root.range.0;
    State {
        size,
        reach: size,
        tree: Tree { root: snapshot.root, height: snapshot.height.max(1) },
        generation: 1,
        overlay: Overlay::default(),
        frozen: None,
        table: snapshot.table,
        next_lsn: snapshot.lsn.next(),
        acked: snapshot.lsn,
        pending: VecDeque::new(),
        pending_bytes: 0,
        queue: VecDeque::new(),
        flights: VecDeque::new(),
        log: None,
        meta: None,
        log_floor: next_segment,
        next_segment,
        root,
        root_revision: revision,
        root_in_force: true,
        pending_root: None,
        wanted: None,
        planned: None,
        open_sets: BTreeMap::new(),
        checkpoint_log: snapshot.log.unwrap_or_default().0,
        root_log: SegmentId::default(),
        pending_log: SegmentId::default(),
        roll_log: false,
        away: BTreeMap::new(),
        lost: BTreeSet::new(),
        starved_at: None,
        merged_lsn: snapshot.lsn,
        checkpoint,
        listed: Vec::new(),
        log_blocks: 0,
        lease: BTreeMap::new(),
        chains: BTreeMap::new(),
        stopped: None,
        stalled_since: None,
        draining: false,
        releasing: false,
    }
}

/// Takes out of a listing the shards of epochs between the checkpoint's and this one: heads that
/// took over and never got as far as a checkpoint of their own. All of them are fenced, and the
/// root in force names an older checkpoint, which cannot refer to them. They are deleted at once,
/// so that take-overs that are cut short again and again never fill the disks. Where the store was
/// rebuilt in between, they are left alone.
fn take_void(listing: &mut Listing, root: &Root) -> Vec<(SegmentId, ShardRef)> {
    let base = root.checkpoint.as_ref().map(|c| c.epoch).unwrap_or_default();
    let mut void = Vec::new();
    for (&segment, held) in listing.iter_mut() {
        held.retain(|&disk, info| {
            let newer = info.epoch > base;
            if newer && info.epoch.incarnation() == root.epoch.incarnation() {
                void.push((segment, ShardRef { disk, creation: info.spec.creation }));
            }
            !newer
        });
    }
    listing.retain(|_, held| !held.is_empty());
    void
}

/// A newer checkpoint of the same epoch that a record header names, or the root's.
async fn newer_checkpoint(
    disks: &Disks,
    volume: VolumeId,
    root: &CheckpointRef,
    listing: &Listing,
) -> CheckpointRef {
    let logs = listing.iter().rev().filter(|(_, members)| {
        members.values().any(|i| i.spec.kind == SegmentKind::Log && i.epoch == root.epoch)
    });
    for (&segment, members) in logs {
        let Some(header) = first_header(disks, volume, segment, members, root.epoch).await else {
            continue;
        };
        let place = header.checkpoint;
        if place.sequence <= root.place.sequence {
            return root.clone();
        }
        let Some(holders) = listing.get(&place.segment) else { return root.clone() };
        let Some(info) = holders.values().next() else { return root.clone() };
        let members = info
            .spec
            .members
            .iter()
            .map(|&disk| ShardRef { disk, creation: info.spec.creation })
            .collect();
        let newer = CheckpointRef { epoch: root.epoch, place, scheme: info.spec.scheme, members };
        // The root's stays what it was if the newer one cannot be read.
        return match load_checkpoint(disks, volume, newer.clone()).await {
            Ok((snapshot, _)) if !is_cut(&snapshot, place, listing) => newer,
            _ => root.clone(),
        };
    }
    root.clone()
}

/// Whether a shard that a checkpoint counts on was sealed shorter than it says: by a take-over that
/// did not hear of the checkpoint, settled its segments by an older one, and was cut short itself.
/// The older one is the root's still, and nothing that it needs was deleted.
fn is_cut(snapshot: &Snapshot, place: CheckpointPlace, listing: &Listing) -> bool {
    snapshot.table.segments.values().any(|segment| {
        let own = if segment.id == place.segment { place.block + place.blocks } else { 0 };
        let blocks = segment.blocks.max(own);
        segment.members.iter().enumerate().any(|(index, member)| {
            let held = listing.get(&segment.id).and_then(|held| held.get(&member.disk));
            segment.missing >> index & 1 == 0
                && held.is_some_and(|info| {
                    info.spec.creation == member.creation
                        && info.state == ShardState::Sealed
                        && info.blocks < blocks
                })
        })
    })
}

async fn first_header(
    disks: &Disks,
    volume: VolumeId,
    segment: SegmentId,
    members: &BTreeMap<DiskId, ShardInfo>,
    epoch: Epoch,
) -> Option<Header> {
    for disk in members.keys() {
        let mut raw = walk::Raw::new(disks, volume, segment, *disk);
        if let Some(header) = raw.header(0, 0).await
            && header.epoch == epoch
        {
            return Some(header);
        }
    }
    None
}

/// Reads a checkpoint's table from whichever of its shards yields it.
async fn load_checkpoint(
    disks: &Disks,
    volume: VolumeId,
    checkpoint: CheckpointRef,
) -> Result<(Snapshot, CheckpointRef), TakeOverError> {
    let place = checkpoint.place;
    let mut why = String::from("none of its disks answers");
    for member in &checkpoint.members {
        let mut raw = walk::Raw::new(disks, volume, place.segment, member.disk);
        let mut bytes = Vec::new();
        let mut at = place.block;
        while at < place.block + place.blocks {
            let Some(header) = raw.header(at, 0).await else { break };
            let payload = raw.blocks(at + header.header_blocks, header.payload_blocks).await;
            let Some(payload) = payload else { break };
            if matches!(header.entries.first(), Some(Entry::Table { .. })) {
                bytes.extend_from_slice(&payload);
            }
            at += header.blocks();
        }
        if crc32fast::hash(&bytes) != place.crc {
            why = format!("its copy on disk {} is damaged or cannot be read", member.disk);
            continue;
        }
        match Snapshot::decode(&bytes) {
            Ok(snapshot) if snapshot.volume == volume && snapshot.epoch == checkpoint.epoch => {
                return Ok((snapshot, checkpoint));
            }
            Ok(_) => why = "it belongs to another volume or epoch".into(),
            Err(error) => why = error.to_string(),
        }
    }
    Err(TakeOverError::NoCheckpoint { segment: place.segment, why })
}

impl Head {
    /// Deletes what the checkpoint lists as freed, so that there is room for the next one. The root
    /// must name that checkpoint first, where only record headers did.
    async fn finish_deletions(self: &Rc<Self>, base: &CheckpointRef) -> Result<(), HeadError> {
        let freed: Vec<(SegmentId, ShardRef)> = {
            let state = self.state.borrow();
            if base.epoch.incarnation() != self.authority.epoch.incarnation() {
                return Ok(());
            }
            state.table.freed.iter().copied().collect()
        };
        if freed.is_empty() || bug(Bug::ReplayOtherEpoch) {
            return Ok(());
        }
        if self.state.borrow().root.checkpoint.as_ref() != Some(base) {
            self.swap_root(|_| ()).await?;
        }
        self.delete_freed(&freed).await;
        Ok(())
    }

    /// Step 3: applies the records after the checkpoint.
    async fn replay(
        &self,
        listing: &Listing,
        fenced: &BTreeSet<DiskId>,
        epoch: Epoch,
        from: (SegmentId, u32),
    ) -> Result<Replay, TakeOverError> {
        let start = self.state.borrow().acked;
        let replay = walk::replay(self, listing, epoch, from, start).await;
        if let Some((segment, block)) = replay.newer {
            return Err(TakeOverError::Newer { segment, block });
        }
        let read = fenced - &replay.unread;
        if !rules::heard_enough(&self.state.borrow().root.set, fenced, &read)
            && !bug(Bug::SkipFence)
            && !bug(Bug::FenceTooFew)
        {
            return Err(TakeOverError::Unread(replay.unread));
        }
        let acked = if replay.cut { replay.acked.max(replay.end.next()) } else { replay.acked };
        if acked > replay.end && !bug(Bug::FenceTooFew) {
            return Err(TakeOverError::Damaged { end: replay.end, acked });
        }
        let mut state = self.state.borrow_mut();
        state.acked = replay.end;
        state.next_lsn = replay.end.next();
        Ok(replay)
    }

    /// Seals, at their settled length, the shards of all segments of a kind that are not sealed on
    /// their disks, and notes as missing those that are stale or not there.
    async fn settle_kind(
        &self,
        listing: &Listing,
        kind: SegmentKind,
        checkpoint: &CheckpointRef,
        lengths: &BTreeMap<SegmentId, u32>,
    ) {
        let segments: Vec<SegmentId> = {
            let state = self.state.borrow();
            state.table.segments.values().filter(|s| s.kind == kind).map(|s| s.id).collect()
        };
        let empty = BTreeMap::new();
        let settle = |id: SegmentId| {
            let segment = self.state.borrow().table.segments[&id].clone();
            let mut length = segment.blocks.max(lengths.get(&id).copied().unwrap_or(0));
            if id == checkpoint.place.segment {
                length = length.max(checkpoint.place.block + checkpoint.place.blocks);
            }
            if let (SegmentKind::Log, Some(&walked)) = (kind, lengths.get(&id)) {
                length = walked;
            }
            let held = listing.get(&id).unwrap_or(&empty);
            async move {
                let settled = walk::settle(&self.disks, self.authority, &segment, length, held);
                (id, settled.await)
            }
        };
        let mut settled = stream::iter(segments.into_iter().map(settle)).buffered(SETTLED_AT_ONCE);
        while let Some((id, settled)) = settled.next().await {
            let mut state = self.state.borrow_mut();
            let entry = state.table.segments.get_mut(&id).expect("nothing is freed here");
            entry.sealed = true;
            entry.blocks = settled.blocks;
            entry.missing = settled.missing;
            entry.damaged &= settled.missing;
        }
    }

    /// Lists as freed what disks offer from earlier number ranges and the table lacks. It is
    /// deleted once the checkpoint that says so is the root's. What heads of an earlier store left
    /// is never deleted: the checkpoint that was recovered may not have been the newest.
    pub(super) fn adopt_orphans(&self, listing: &Listing) {
        let mut state = self.state.borrow_mut();
        let own = state.root.range.0;
        let incarnation = self.authority.epoch.incarnation();
        let mut quarantined = 0;
        for (&segment, held) in listing {
            for (&disk, info) in held {
                let shard = ShardRef { disk, creation: info.spec.creation };
                let known = state
                    .table
                    .segments
                    .get(&segment)
                    .is_some_and(|entry| entry.members.contains(&shard));
                if !known && info.epoch.incarnation() != incarnation {
                    quarantined += 1;
                } else if !known && segment.0 < own {
                    state.table.freed.insert((segment, shard));
                }
            }
        }
        if quarantined > 0 {
            // The store was rebuilt: what nothing refers to is left where it is, and reported.
            tracing::warn!(volume = %self.volume, quarantined, "shards that the checkpoint lacks are kept");
        }
    }

    /// Makes the first checkpoint of the epoch, however often it takes.
    async fn checkpoint_until_done(self: &Rc<Self>) -> Result<(), TakeOverError> {
        let since = Instant::now();
        let mut pause = Duration::from_millis(20);
        let mut stored = false;
        loop {
            let step = if stored { self.publish().await } else { self.store_checkpoint().await };
            match step {
                Ok(()) if stored => return Ok(()),
                Ok(()) => stored = true,
                Err(HeadError::Stopped(_)) => return Err(TakeOverError::Lost),
                Err(error) => {
                    tracing::warn!(volume = %self.volume, %error, "first checkpoint failed");
                    self.trace_space();
                    if since.elapsed() >= self.config.shrink_after {
                        self.shrink().await;
                    }
                    // What cannot be read may be gone because another head has the volume: nothing
                    // that fails before a write would tell.
                    self.probe_all().await;
                    if self.stopped().is_some() {
                        return Err(TakeOverError::Lost);
                    }
                    self.reseal_missing().await;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
            }
        }
    }

    /// What takes the space, for the log.
    pub(super) fn trace_space(&self) {
        let state = self.state.borrow();
        let count = |kind: SegmentKind| {
            let of_kind = || state.table.segments.values().filter(move |s| s.kind == kind);
            (of_kind().count(), of_kind().filter(|s| state.table.is_dead(s.id)).count())
        };
        tracing::debug!(
            log = ?count(SegmentKind::Log), data = ?count(SegmentKind::Data),
            meta = ?count(SegmentKind::Meta), freed = state.table.freed.len(),
            "segments and how many of them are dead",
        );
    }

    /// Step 5: starts the tasks; the head serves from now on.
    fn start(self: &Rc<Self>) {
        tokio::task::spawn_local(super::log::run(self.clone()));
        tokio::task::spawn_local(super::checkpoint::run(self.clone()));
        tokio::task::spawn_local(super::swap::run(self.clone()));
        tokio::task::spawn_local(super::repair::run(self.clone()));
        tokio::task::spawn_local(super::gc::run(self.clone()));
        tokio::task::spawn_local(super::space::run_calls(self.clone()));
        tokio::task::spawn_local(super::width::run_shrink(self.clone()));
        tokio::task::spawn_local(super::width::run_renew(self.clone()));
        tokio::task::spawn_local(super::scrub::run_rounds(self.clone()));
        tokio::task::spawn_local(super::scrub::run_mends(self.clone()));
        tokio::task::spawn_local(super::width::run_avoid(self.clone()));
        tokio::task::spawn_local(super::narrow::run(self.clone()));
        tokio::task::spawn_local(super::balance::run(self.clone()));
        self.repair_wanted.notify_one();
    }

    /// Stops serving in order: everything acknowledged is in a checkpoint, nothing is open, and
    /// the next head need not wait for the lease. Requests that come meanwhile are refused, so that
    /// the end of those under way comes whatever the load.
    ///
    /// # Errors
    /// [`HeadError`]: the volume is intact all the same and the next head recovers it.
    pub async fn release(self: &Rc<Self>) -> Result<(), HeadError> {
        self.state.borrow_mut().draining = true;
        loop {
            let applied = self.applied.notified();
            let idle = {
                let state = self.state.borrow();
                state.stopped.is_some()
                    || (state.pending.is_empty()
                        && state.queue.is_empty()
                        && state.flights.is_empty())
            };
            if idle {
                break;
            }
            applied.await;
        }
        self.state.borrow_mut().releasing = true;
        let _lock = self.checkpoint_lock.lock().await;
        self.close_all().await;
        let result = self.release_locked().await;
        self.stop("released");
        result
    }

    async fn release_locked(self: &Rc<Self>) -> Result<(), HeadError> {
        let mut tries = 1;
        while let Err(error) = self.store_last().await {
            // A disk failed under it: it is stored on others.
            if tries == RELEASE_TRIES || !matches!(error, HeadError::Append) {
                return Err(error);
            }
            tracing::debug!(volume = %self.volume, %error, "the last checkpoint is tried again");
            tries += 1;
        }
        let meta = self.state.borrow_mut().meta.take();
        if let Some(meta) = meta {
            meta.seal(meta.next.get()).await;
        }
        self.swap_root(|root| root.released = true).await
    }

    async fn store_last(self: &Rc<Self>) -> Result<(), HeadError> {
        self.merge_overlay().await?;
        self.store_table().await
    }

    /// Seals the open log and data segments.
    async fn close_all(self: &Rc<Self>) {
        let log = {
            let mut state = self.state.borrow_mut();
            state.log_floor = state.next_segment;
            state.log.take()
        };
        if let Some(log) = log {
            let blocks = log.next.get();
            let bad = log.seal(blocks).await;
            if let Some(entry) = self.state.borrow_mut().table.segments.get_mut(&log.id) {
                entry.sealed = true;
                entry.blocks = blocks;
                entry.missing |= bad;
            }
        }
        self.close_open_dense();
        tokio::task::yield_now().await;
    }
}
