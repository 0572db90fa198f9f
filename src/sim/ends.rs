//! The ends of a run: the disks are filled up, everything heals, and all must be right.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::LocalSet;
use tokio::time::sleep;

use super::demands::take_over_at_last;
use super::oracle::{Outcome, SECTOR};
use super::run::{Context, NEVER, heal_all, start};
use super::world::Running;
use crate::export::{BlockTarget, TargetError};
use crate::id::{BLOCK_SIZE, DiskId, SegmentId, VolumeId};
use crate::segment::checksum::Salt;
use crate::segment::record::Header;
use crate::segment::stripe;
use crate::shard::{SegmentKind, ShardError, ShardInfo, ShardState};
use crate::volume::target::HeadTarget;

/// Sectors read or written at a time.
const STEP: u64 = 64;
/// Writes that are tried on full disks.
const OVERWRITES: u64 = 40;
/// How long the end of a run may take, in virtual time.
const PATIENCE: Duration = Duration::from_mins(10);

/// All faults heal: the disks are filled up where they are small, and then everything must be
/// readable, fully redundant and free of leaks.
pub(super) async fn reckon(context: &Rc<Context>) {
    let process = LocalSet::new();
    // The disk that was left behind may come back when the last head serves. Where the log may have
    // been narrow, a take-over may need every one of its disks; elsewhere it shrinks the log now.
    let wide = context.world.config.head.shrink_after == NEVER;
    let behind = context.behind.get().filter(|_| wide && context.env.chance(1, 2));
    context.world.ending.set(true);
    context.stop.set(false);
    heal_all(context);
    if let Some(index) = behind {
        context.world.devices.borrow()[index].vanish();
        context.struck(index);
    }
    let body = async {
        let Some(running) = start(context).await else { return };
        running.node.heal();
        super::nemesis::heal(context).await;
        if let Err(why) = super::resize::restore(context, &running).await {
            context.fail(format!("in the end: {why}"));
        }
        let spell = !context.world.config.overcommitted && context.env.chance(1, 6);
        if spell && let Err(why) = super::slow::spell(context, &running).await {
            context.fail(why);
        }
        let mut heads = vec![running];
        // What a volume that is not served holds of the reserves is given back by its next head only.
        if let Some(volume) = &context.world.neighbour {
            let neighbour = take_over_at_last(context, &heads[0].node, volume).await;
            heads.extend(neighbour.clone());
            *context.neighbour.borrow_mut() = neighbour;
        }
        for running in &heads[1..] {
            if let Err(why) = super::resize::restore(context, running).await {
                context.fail(format!("in the end: {why}"));
            }
        }
        if context.world.config.overcommitted
            && let Err(why) = fill_up(context, &heads[0]).await
        {
            note_slots(context);
            context.fail(format!("full disks: {why}"));
        }
        read_heads(context, &heads, "in the end").await;
        settle_all(context, &heads).await;
        change_disks(context, &heads).await;
    };
    if process.run_until(tokio::time::timeout(PATIENCE, body)).await.is_err() {
        note_slots(context);
        // Damage is the better answer to why, if there is any.
        let well = |index: usize, _: &ShardInfo| !context.hurt.borrow().contains(&index);
        let mut damage = None;
        for volume in context.world.volumes() {
            damage = damage.or(check_content(context, volume.id, &well).await.err());
        }
        let waiting = context.world.waiting.borrow().clone();
        context.fail(damage.unwrap_or(format!("in the end, for ever: {waiting}")));
    }
    if let Some(index) = overlapping(context) {
        context.fail(format!("disk {index} was given a write over another that was under way"));
    }
    context.world.stop_devices(false);
}

/// Disks come, and where the pool bends go for good; afterwards all must be right again.
async fn change_disks(context: &Context, heads: &[Rc<Running>]) {
    let spares = context.world.config.spares > 0 && damaged_tables(context).is_empty();
    if !spares || context.failure.borrow().is_some() {
        return;
    }
    let changed = if super::bend::bends(&context.world.config) {
        super::bend::spell(context, heads).await
    } else {
        super::grow::spell(context, heads).await
    };
    if let Err(why) = changed {
        context.fail(format!("in the end: {why}"));
    }
    read_heads(context, heads, "with other disks").await;
    settle_all(context, heads).await;
}

async fn read_heads(context: &Context, heads: &[Rc<Running>], when: &str) {
    for running in heads {
        if context.failure.borrow().is_none()
            && let Err(why) = read_all(context, running).await
        {
            context.fail(format!("{when}: {why}"));
        }
    }
}

fn note_slots(context: &Context) {
    let slots: Vec<_> = (0..context.world.config.disks)
        .map(|index| context.world.disk(index).map(|disk| disk.slot_counts()))
        .collect();
    context.note(&format!("slots: {slots:?}"));
}

/// A device that was given two writes to the same place at once.
fn overlapping(context: &Context) -> Option<usize> {
    let devices = context.world.devices.borrow();
    devices.iter().position(|device| device.fault_counts().overlapping_writes > 0)
}

async fn settle_all(context: &Context, heads: &[Rc<Running>]) {
    for running in heads {
        if context.failure.borrow().is_none()
            && let Err(why) = settle(context, running).await
        {
            context.fail(format!("in the end: {why}"));
        }
    }
}

pub(super) async fn read_all(context: &Context, running: &Running) -> Result<(), String> {
    let target = HeadTarget(running.head.clone());
    let volume = &running.volume;
    for at in (0..volume.sectors()).step_by(usize::try_from(STEP).expect("small")) {
        let count = STEP.min(volume.sectors() - at);
        let bytes = usize::try_from(count).expect("small") * SECTOR;
        let start = volume.oracle.borrow_mut().begin_read();
        *context.world.waiting.borrow_mut() = format!("a read of sector {at}");
        let pieces = target
            .read(at * SECTOR as u64, bytes)
            .await
            .map_err(|error| format!("sector {at} cannot be read: {error}"))?;
        let data: Vec<u8> = pieces.iter().flat_map(|p| p.iter().copied()).collect();
        volume.oracle.borrow_mut().end_read(start, at, &data)?;
    }
    Ok(())
}

/// Writes to some places; there must be room.
pub(super) async fn overwrite(context: &Context, running: &Running) -> Result<(), String> {
    let target = HeadTarget(running.head.clone());
    let pieces = context.world.volume.sectors() / STEP;
    for _ in 0..4 {
        write_at_last(context, &target, context.env.random_below(pieces) * STEP).await?;
    }
    Ok(())
}

/// Writes until the disks are full, and a little more; trims a half of each piece that was
/// written, so that only moving the rest makes room, and writes again; trims all and writes again.
/// The only error is "no space", and none after a trim.
async fn fill_up(context: &Context, running: &Running) -> Result<(), String> {
    let target = HeadTarget(running.head.clone());
    let pieces = context.world.volume.sectors() / STEP;
    let mut filled = pieces;
    for piece in 0..pieces {
        match write(context, &target, piece * STEP).await {
            Ok(()) => {}
            Err(TargetError::NoSpace) => {
                filled = piece;
                break;
            }
            Err(error) => return Err(format!("a write failed otherwise: {error}")),
        }
    }
    context.cover_noted(if filled < pieces { "filled up" } else { "the volume fits" });
    for _ in 0..OVERWRITES {
        match write(context, &target, context.env.random_below(pieces) * STEP).await {
            Ok(()) => context.cover("a write on full disks found room"),
            Err(TargetError::NoSpace) => context.cover("a write on full disks was refused"),
            Err(error) => return Err(format!("a write on full disks failed: {error}")),
        }
    }
    for piece in 0..pieces {
        trim(context, &target, piece * STEP, STEP / 2).await?;
    }
    for piece in 0..filled / 8 {
        write_at_last(context, &target, piece * STEP).await?;
    }
    context.cover_noted("written again after trims of parts");
    trim(context, &target, 0, context.world.volume.sectors()).await?;
    write_at_last(context, &target, 0).await
}

async fn trim(context: &Context, target: &HeadTarget, at: u64, sectors: u64) -> Result<(), String> {
    let trimmed = context.world.volume.oracle.borrow_mut().begin(at, sectors, true);
    let result = target.zero(at * SECTOR as u64, sectors * SECTOR as u64, true).await;
    result.map_err(|error| format!("a trim failed: {error}"))?;
    context.world.volume.oracle.borrow_mut().end(trimmed, Outcome::Acknowledged);
    Ok(())
}

/// Writes where there must be room, or will be in a while.
async fn write_at_last(context: &Context, target: &HeadTarget, at: u64) -> Result<(), String> {
    for tries in 0.. {
        match write(context, target, at).await {
            Ok(()) => break,
            Err(TargetError::NoSpace) if tries < 10 => {
                context.cover("after a trim, a write had to be repeated");
                sleep(Duration::from_millis(500)).await;
            }
            Err(error) => return Err(format!("after a trim, a write failed: {error}")),
        }
    }
    Ok(())
}

async fn write(context: &Context, target: &HeadTarget, at: u64) -> Result<(), TargetError> {
    let write = context.world.volume.oracle.borrow_mut().begin(at, STEP, false);
    let data = Bytes::from(write.content());
    let result = target.write(at * SECTOR as u64, data).await;
    let outcome = if result.is_ok() { Outcome::Acknowledged } else { Outcome::InDoubt };
    context.world.volume.oracle.borrow_mut().end(write, outcome);
    result
}

/// Waits for full redundancy and checks every invariant. What is found late in the end, or was
/// closed a moment ago, is still being repaired or sealed: it gets the time for it.
async fn settle(context: &Context, running: &Running) -> Result<(), String> {
    settle_at_last(context, running).await?;
    let head = &running.head;
    let id = running.volume.id;
    if damaged_tables(context).is_empty() {
        rot(context);
        let scrubbed = scrub_twice(context, running).await;
        // Unless the scrub was what found them out.
        if damaged_tables(context).is_empty() {
            scrubbed?;
            let counts =
                |index: usize, info: &ShardInfo| head.counts_on(context.world.ids[index], info);
            check_content(context, id, &counts).await?;
            context.cover("reckoned");
            return Ok(());
        }
    }
    // The operator replaces such a disk; on those that were never hurt, all must be right.
    let well = |index: usize, _: &ShardInfo| !context.hurt.borrow().contains(&index);
    check_content(context, id, &well).await?;
    context.cover("reckoned");
    Ok(())
}

async fn settle_at_last(context: &Context, running: &Running) -> Result<(), String> {
    let mut result = Ok(());
    for _ in 0..20 {
        result = settle_once(context, running).await;
        if result.is_ok() {
            break;
        }
        sleep(Duration::from_millis(500)).await;
    }
    result
}

/// Bits rot that nobody reads from then on: only a scrub can find them. Of one disk, since all else is whole by now.
fn rot(context: &Context) {
    let config = &context.world.config;
    let alone = context.world.neighbour.is_none() && config.spares == 0 && !config.overcommitted;
    if !alone || context.gentle || !context.env.chance(1, 2) {
        return;
    }
    let hurt = context.hurt.borrow().first().copied();
    let any = || usize::try_from(context.env.random_below(config.disks as u64)).expect("small");
    let index = hurt.unwrap_or_else(any);
    context.hurt.borrow_mut().insert(index);
    context.cover_noted("bits rot before the last scrub but one");
    let device = context.world.devices.borrow()[index].clone();
    for _ in 0..60 {
        let quarter = config.disk_bytes / 4;
        let at = quarter + context.env.random_below(config.disk_bytes - quarter);
        device.flip_bit(at, u8::try_from(context.env.random_below(8)).expect("small"));
    }
}

/// A scrub may find what faults left behind; once that is repaired, another finds nothing.
async fn scrub_twice(context: &Context, running: &Running) -> Result<(), String> {
    let head = &running.head;
    let scrub = async || {
        *context.world.waiting.borrow_mut() = "the end of a scrub".into();
        if !head.scrub_to_end().await {
            return Err(format!("the head stopped while it scrubbed: {:?}", head.stopped()));
        }
        Ok(head.scrub_report())
    };
    let first = scrub().await?;
    if first.found > 0 {
        context.cover_noted(&format!("the last scrub but one found {}", first.found));
        if context.hurt.borrow().is_empty() {
            context.cover("a scrub found what no fault of the content left");
        }
        settle_at_last(context, running).await?;
        // Where a disk did not answer in time, because a write there is stuck, the next round mends just
        // that.
        let left = first.found.saturating_sub(first.repaired + first.unrepairable);
        if left > 0 {
            let again = scrub().await?;
            if again.found > left || again.repaired < again.found {
                return Err(format!("a scrub leaves what it can mend: {first:?}, then {again:?}"));
            }
            settle_at_last(context, running).await?;
        }
    }
    let last = scrub().await?;
    if last.found > 0 || last.unchecked_bytes > 0 || last.unrepairable > 0 {
        return Err(format!("a scrub after a scrub finds more: {first:?}, then {last:?}"));
    }
    Ok(())
}

async fn settle_once(context: &Context, running: &Running) -> Result<(), String> {
    let head = &running.head;
    let broken = damaged_tables(context);
    // Where the others are too few to be whole without it, that waits for the operator.
    let others = context.world.config.disks - context.world.retired.borrow().len() - broken.len();
    let few = !broken.is_empty() && others < context.world.config.scheme.width();
    let narrow = || {
        let (healthy, width, full) = head.log_width();
        !few && (width < full || healthy < usize::from(width))
    };
    let reduced = || if few { 0 } else { head.reduced().0 };
    *context.world.waiting.borrow_mut() = "full redundancy".into();
    let left = super::bend::present(context).len();
    let bends = context.world.config.head.narrow_after != NEVER && broken.is_empty();
    let bent = || bends && !super::bend::fits(running, context, left);
    for _ in 0..40 {
        if reduced() == 0 && !narrow() && !bent() {
            break;
        }
        sleep(Duration::from_millis(250)).await;
    }
    if reduced() > 0 {
        return Err(format!("{} segments stay reduced", reduced()));
    }
    if bent() {
        return Err(format!("with {left} disks: {:?}", head.bending()));
    }
    // As a node does, again and again: segments that nothing needed may have had shards there.
    let retired = context.world.retired.borrow().clone();
    for index in &retired {
        head.disk_removed(context.world.ids[*index]);
    }
    *context.world.waiting.borrow_mut() = "a checkpoint".into();
    for _ in 0..3 {
        head.checkpoint().await.map_err(|e| format!("checkpoint: {e}"))?;
    }
    head.check().await?;
    if narrow() {
        return Err(format!("healthy domains, width and its goal: {:?}", head.log_width()));
    }
    for (index, disk) in context.world.disks.borrow().iter().enumerate() {
        if retired.contains(&index) || broken.contains(&context.world.ids[index]) {
            continue;
        }
        let disk = disk.as_ref().ok_or(format!("disk {index} cannot be opened"))?;
        disk.check().map_err(|e| format!("disk {index}: {e}"))?;
    }
    head.check_shards(&broken).await?;
    head.check_leaks(&broken).await?;
    head.check_usage(&broken).await?;
    if !broken.is_empty() {
        context.cover("a disk with damaged tables");
    }
    Ok(())
}

/// The disks that cannot tell any more what they hold, because both copies of a table page are
/// gone: the operator replaces them. Only disks whose content was hurt may be so.
fn damaged_tables(context: &Context) -> BTreeSet<DiskId> {
    let broken = |index: &usize| {
        let Some(disk) = context.world.disk(*index) else { return true };
        let mut lists = context.world.volumes().map(|volume| disk.list(volume.id));
        lists.any(|list| matches!(list, Err(ShardError::Damaged(_))))
    };
    let hurt = context.hurt.borrow();
    hurt.iter().copied().filter(broken).map(|index| context.world.ids[index]).collect()
}

/// Every block of every sealed shard that is `wanted`, by disk, matches its checksum, and the
/// parity its data where all shards of a segment are.
async fn check_content(
    context: &Context,
    volume: VolumeId,
    wanted: &dyn Fn(usize, &ShardInfo) -> bool,
) -> Result<(), String> {
    let mut segments: BTreeMap<SegmentId, Vec<(ShardInfo, Bytes)>> = BTreeMap::new();
    for index in 0..context.world.config.disks {
        let Some(disk) = context.world.disk(index) else { continue };
        let held = match disk.list(volume) {
            Ok(held) => held,
            // Of a disk with damaged tables, nothing is asked.
            Err(ShardError::Damaged(_)) if context.hurt.borrow().contains(&index) => continue,
            Err(error) => return Err(error.to_string()),
        };
        let sealed =
            held.shards.into_iter().filter(|i| i.state == ShardState::Sealed && i.blocks > 0);
        for info in sealed.filter(|info| wanted(index, info)) {
            let (spec, id) = (&info.spec, info.spec.segment);
            let reply = match disk.read(spec.volume, id, 0, info.blocks).await {
                // Deleted since it was listed.
                Err(ShardError::Gone) => continue,
                reply => {
                    reply.map_err(|e| format!("content of segment {id} on disk {index}: {e}"))?
                }
            };
            let salt = Salt::new(spec.volume, id, spec.scheme, usize::from(spec.index));
            if let Some(block) = salt.verify(0, &reply.data, &reply.crcs) {
                return Err(format!("segment {id} on disk {index}: block {block} is damaged"));
            }
            segments.entry(id).or_default().push((info, reply.data));
        }
    }
    for (id, shards) in &mut segments {
        shards.sort_by_key(|(info, _)| info.spec.index);
        check_parity(shards).map_err(|why| format!("segment {id}: {why}"))?;
    }
    Ok(())
}

/// Compares the parity of a whole data segment with its data, record by record.
fn check_parity(shards: &[(ShardInfo, Bytes)]) -> Result<(), String> {
    let Some((first, data)) = shards.first() else { return Ok(()) };
    let scheme = first.spec.scheme;
    if first.spec.kind != SegmentKind::Data || shards.len() != scheme.width() {
        return Ok(());
    }
    let mut at = 0;
    while at < data.len() {
        let Ok(header) = Header::decode(&data[at..]) else { break };
        let from = at + header.header_blocks as usize * BLOCK_SIZE;
        let to = from + header.payload_blocks as usize * BLOCK_SIZE;
        if shards.iter().any(|(_, data)| data.len() < to) {
            break;
        }
        let payload: Vec<&[u8]> = shards.iter().map(|(_, data)| &data[from..to]).collect();
        let (have, parity) = payload.split_at(usize::from(scheme.data));
        let mut expected = vec![vec![0; to - from]; parity.len()];
        let mut outputs: Vec<&mut [u8]> = expected.iter_mut().map(|p| &mut p[..]).collect();
        stripe::encode(scheme, have, &mut outputs);
        if expected.iter().zip(parity).any(|(expected, found)| expected != found) {
            return Err(format!("the parity of the record at byte {at} is wrong"));
        }
        at = to;
    }
    Ok(())
}
