//! The log set and its width while a head serves: shrunk when too few domains are left, renewed and
//! widened again when there are others.
//!
//! Two tasks change it. One shrinks, without a checkpoint and in milliseconds, once something failed for lack
//! of domains and they stay away; it takes only what [`super::rules::shrunk`] allows. The other
//! replaces disks that are lost and takes new ones in, by a checkpoint: from the plan on new
//! segments suit the old and the new set, the log moves to one that does, the checkpoint lists
//! what came before as sealed, and the swap is refused if anything is left that the new set would
//! miss ([`super::swap`]). Either gives way to the other: a plan binds only as long as nothing
//! waits for it, and a swap whose outcome is unknown binds both.
//!
//! A third task leaves the open segments of a disk that has become slow; new ones avoid it by
//! themselves, and the set takes other disks in where it has too few without it.
//!
//! Knows nothing of pools or nodes: the disks of the pool are all that the registry has.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use super::head::{Head, HeadError};
use super::rules::{self, LogSet, Member};
use super::segtab::ShardRef;
use crate::id::DiskId;
use crate::planted::{Bug, bug};
use crate::segment::open::{OpenError, OpenSegment};
use crate::shard::SlotClass;

/// Pause between two looks while something is not as it should be.
const LOOK: Duration = Duration::from_millis(100);
/// Longest pause between two tries to change the set.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// For how long a failure for lack of domains is a reason to shrink.
const STARVED_FOR: Duration = Duration::from_secs(2);
/// How long the log may take to leave a segment that the new set would miss.
const ROLL_PATIENCE: Duration = Duration::from_secs(2);

/// Shrinks the set where it must be, until the head stops.
pub(super) async fn run_shrink(head: Rc<Head>) {
    let mut short_since: Option<Instant> = None;
    while head.is_serving() {
        if !head.is_starved() {
            short_since = None;
            head.width_wanted.notified().await;
            continue;
        }
        if head.is_short() {
            let since = *short_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= head.config.shrink_after {
                head.shrink().await;
            }
        } else {
            short_since = None;
        }
        tokio::time::sleep(LOOK.min(head.config.shrink_after / 2)).await;
    }
}

/// Renews the set as disks go and come, until the head stops.
pub(super) async fn run_renew(head: Rc<Head>) {
    let mut pause = LOOK;
    while head.is_serving() {
        let all_well = head.look_at_members();
        // The set comes with a checkpoint, and none is made while the store is away.
        let wanted = if head.swaps_in_vain() { None } else { head.renewed_set() };
        if let Some(set) = wanted {
            match head.renew(set).await {
                Ok(()) => pause = LOOK,
                Err(error) => {
                    tracing::debug!(volume = %head.volume, %error, "the log set stays as it is");
                    pause = (pause * 2).min(RETRY_MAX);
                    tokio::time::sleep(pause).await;
                }
            }
            continue;
        }
        let changed = std::pin::pin!(head.disks.changed.notified());
        let wanted = std::pin::pin!(head.width_wanted.notified());
        let told = futures_util::future::select(changed, wanted);
        if all_well {
            told.await;
        } else {
            // Nobody tells when a disk has been away for long, or is trusted again.
            drop(tokio::time::timeout(LOOK.max(head.config.replace_after / 4), told).await);
        }
    }
}

/// Leaves the open segments of disks that have become slow, until the head stops.
pub(super) async fn run_avoid(head: Rc<Head>) {
    let mut known: Vec<DiskId> = Vec::new();
    while head.is_serving() {
        let changed = std::pin::pin!(head.disks.watch().changed.notified());
        let wanted = std::pin::pin!(head.width_wanted.notified());
        let slow = head.disks.watch().slow();
        for disk in slow.iter().filter(|disk| !known.contains(disk)) {
            head.avoid(*disk);
        }
        if slow != known {
            known = slow;
            head.width_wanted.notify_waiters();
            continue;
        }
        // The head's stop is told to all who wait for the width.
        futures_util::future::select(changed, wanted).await;
    }
}

impl Head {
    /// Has what is written from now on go to other disks than one that is slow, if there are enough.
    fn avoid(self: &Rc<Self>, disk: DiskId) {
        let fast = self.disks.fast_domains();
        if fast >= self.pool.log_scheme().width() {
            self.leave_dense(disk);
            self.leave_meta(disk);
        }
        if self.log_can_avoid(disk) {
            self.state.borrow_mut().roll_log = true;
            self.wake.notify_one();
        }
    }

    /// Whether the open log segment lies on a disk without which another could be opened.
    fn log_can_avoid(&self, disk: DiskId) -> bool {
        let state = self.state.borrow();
        let there = |log: &Rc<OpenSegment>| log.shards.iter().any(|shard| shard.disk == disk);
        let fast = self.fast();
        let enough = |set: &&LogSet| rules::write_set_ok(set, &fast);
        state.log.as_ref().is_some_and(there) && state.pairs().iter().all(enough)
    }

    /// The disks that fail nothing and are not slow.
    pub(super) fn fast(&self) -> BTreeSet<DiskId> {
        self.disks.ids().into_iter().filter(|disk| self.disks.rank(*disk) == 0).collect()
    }

    /// Notes that something failed because too few domains were there.
    pub(super) fn note_starved(&self) {
        self.state.borrow_mut().starved_at = Some(Instant::now());
        self.width_wanted.notify_waiters();
    }

    /// Notes why something failed.
    pub(super) fn note_failure(&self, error: &HeadError) {
        if matches!(error, HeadError::Open(OpenError::TooFewDomains { .. }) | HeadError::Append) {
            self.note_starved();
        }
    }

    fn is_starved(&self) -> bool {
        self.state.borrow().starved_at.is_some_and(|at| at.elapsed() < STARVED_FOR)
    }

    pub(super) fn healthy(&self) -> BTreeSet<DiskId> {
        self.disks.ids().into_iter().filter(|disk| self.disks.is_healthy(*disk)).collect()
    }

    /// Whether fewer domains of the set are healthy than it is wide.
    fn is_short(&self) -> bool {
        !rules::write_set_ok(&self.state.borrow().root.set, &self.healthy())
    }

    /// Shrinks the set to what is healthy, if that may be.
    pub(super) async fn shrink(self: &Rc<Self>) {
        let shrunk = self
            .swap_root_if(|head| head.is_short().then(|| head.narrower(&head.healthy())).flatten())
            .await;
        match shrunk {
            Ok(None) => {}
            Ok(Some(set)) => {
                tracing::warn!(volume = %self.volume, width = set.width(), disks = set.members().len(),
                    "too few failure domains: the log shrinks");
                self.wake.notify_one();
                self.checkpoint_wanted.notify_one();
            }
            Err(error) => {
                tracing::debug!(volume = %self.volume, %error, "the log cannot shrink now");
            }
        }
    }

    /// Notes which members of the set are away, and since when. Tells whether all disks are well.
    fn look_at_members(&self) -> bool {
        let mut state = self.state.borrow_mut();
        let state = &mut *state;
        let members = || state.root.set.members().iter().map(|member| member.disk);
        let away: BTreeSet<DiskId> = members().filter(|d| !self.disks.is_healthy(*d)).collect();
        state.away.retain(|disk, _| away.contains(disk));
        for disk in &away {
            state.away.entry(*disk).or_insert_with(Instant::now);
        }
        away.is_empty() && self.disks.ids().into_iter().all(|disk| self.disks.is_healthy(disk))
    }

    /// The set that a checkpoint is to bring; none if the present one is as it should be.
    fn renewed_set(&self) -> Option<LogSet> {
        let state = self.state.borrow();
        if state.pending_root.is_some() {
            return None;
        }
        let old = &state.root.set;
        let healthy = self.healthy();
        let long = self.config.replace_after;
        let mut lost: BTreeSet<DiskId> = state
            .away
            .iter()
            .filter(|(_, at)| at.elapsed() >= long)
            .map(|(disk, _)| *disk)
            .collect();
        lost.extend(&state.lost);
        let parity = self.pool.scheme.parity;
        // Where the set has too few domains without the slow disks, others come besides them.
        let slow = old.members().iter().filter(|m| self.disks.is_slow(m.disk)).count();
        let enough = usize::from(parity + 1) + slow;
        let most = rules::log_domains(parity).min(self.config.log_domains_max.max(enough));
        let kept: Vec<u32> =
            old.members().iter().filter(|m| !lost.contains(&m.disk)).map(|m| m.domain).collect();
        let domains: BTreeSet<u32> = kept.iter().copied().collect();
        let room = most.saturating_sub(domains.len());
        let fresh = |disk| {
            old.domain_of(disk).is_none() && healthy.contains(&disk) && !state.lost.contains(&disk)
        };
        let spare: Vec<Member> = if room == 0 {
            Vec::new()
        } else {
            let chosen = self.disks.choose(&self.env, SlotClass::Client, room, &kept, fresh);
            let domain = |disk| self.disks.domain(disk);
            let member = |disk| Some(Member { disk, domain: domain(disk)? });
            chosen.iter().filter_map(|target| member(target.disk)).collect()
        };
        rules::renewed(old, &lost, &healthy, &spare, (parity + 1, most)).or_else(|| {
            let up = self.disks.ids().into_iter().collect();
            rules::extended(old, &lost, &up, &spare)
        })
    }

    /// Brings a set into force by a checkpoint.
    async fn renew(self: &Rc<Self>, set: LogSet) -> Result<(), HeadError> {
        let old = self.state.borrow().root.set.clone();
        if !bug(Bug::WidthIgnoresOpenSegments) {
            self.state.borrow_mut().planned = Some(set.clone());
            self.leave_log_for(&set).await;
        }
        let wanted = set.clone();
        let result = self.checkpoint_with(move |root| {
            // Whoever shrank it meanwhile had a reason.
            if root.set == old {
                root.set = wanted;
            }
        });
        let result = result.await;
        let mut state = self.state.borrow_mut();
        state.planned = None;
        let done = state.root.set == set;
        drop(state);
        self.wake.notify_one();
        if let Err(error) = result {
            self.note_failure(&error);
            self.checkpoint_wanted.notify_one();
            return Err(error);
        }
        if !done {
            return Err(HeadError::Set("it was changed otherwise meanwhile"));
        }
        tracing::info!(volume = %self.volume, width = set.width(), disks = set.members().len(),
            "the log set was renewed");
        self.disks.watch().slow().into_iter().for_each(|disk| self.avoid(disk));
        Ok(())
    }

    /// Has the log leave a segment that the new set would miss.
    async fn leave_log_for(self: &Rc<Self>, set: &LogSet) {
        let missed = || {
            let state = self.state.borrow();
            state.log.as_ref().is_some_and(|log| {
                let disks = log.shards.iter().map(|shard| shard.disk).collect();
                !rules::write_set_ok(set, &disks)
            })
        };
        let left = async {
            while missed() && self.is_serving() {
                self.state.borrow_mut().roll_log = true;
                self.wake.notify_one();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(ROLL_PATIENCE, left).await.is_err() {
            tracing::debug!(volume = %self.volume, "the log does not leave its segment");
            self.state.borrow_mut().roll_log = false;
        }
    }

    /// Whether every segment that is needed could still be read without these disks.
    pub fn bears_loss_of(&self, disks: &BTreeSet<DiskId>) -> bool {
        let state = self.state.borrow();
        state.table.segments.values().filter(|s| self.is_needed(&state, s.id)).all(|s| {
            let left = |(index, member): &(usize, &ShardRef)| {
                s.missing >> index & 1 == 0 && !disks.contains(&member.disk)
            };
            s.members.iter().enumerate().filter(left).count() >= usize::from(s.scheme.data)
        })
    }

    /// Whether a disk is of the log set, or a segment that is needed has a shard there.
    pub fn uses_disk(&self, disk: DiskId) -> bool {
        let state = self.state.borrow();
        let sets = state.pairs();
        sets.iter().any(|set| set.domain_of(disk).is_some())
            || state.table.segments.values().any(|s| {
                s.members.iter().any(|member| member.disk == disk) && self.is_needed(&state, s.id)
            })
    }

    /// Hears that a disk is gone for good and will never be asked again: what is listed for
    /// deletion there needs no confirmation any more.
    pub fn disk_removed(self: &Rc<Self>, disk: DiskId) {
        self.disk_lost(disk);
        self.state.borrow_mut().table.freed.retain(|(_, shard)| shard.disk != disk);
    }

    /// Domains of the log set that are healthy, its width, and the width it should have.
    pub fn log_width(&self) -> (usize, u8, u8) {
        let state = self.state.borrow();
        let healthy = rules::domains_touched(&state.root.set, &self.healthy());
        (healthy, state.root.set.width(), self.pool.scheme.parity + 1)
    }
}
