//! A take-over, step by step.

use sds::volume::rules;

use crate::config::{Bug, Rules, disk_ids};
use crate::state::{Checkpoint, DISKS, Head, Mask, Phase, Root, SEGMENTS, Shard, State, Violation};
use crate::steps::{allow, bit, has, spend};

impl Rules {
    /// Step 1: asks for a new epoch.
    pub fn claim(&self, state: &mut State, head: usize) -> Option<()> {
        let base = state.root?;
        spend(&mut state.used.claims, self.config.budget.claims)?;
        let id = 1 + state.used.claims;
        let set =
            if self.has(Bug::ChangeSetBeforeFence) { self.sets.len() - 1 } else { base.set.into() };
        let root = Root {
            epoch: base.epoch + 1,
            head: id,
            sequence: base.sequence + 1,
            released: base.released && self.has(Bug::StaysReleased),
            set: u8::try_from(set).expect("few sets"),
            former: self.former(&base, false),
            checkpoint: base.checkpoint,
        };
        state.swaps[head] = Some((base.token(), root));
        state.heads[head] = Head {
            phase: Phase::Claiming,
            id,
            pending: Some(root),
            skip_wait: base.released,
            ..Head::default()
        };
        Some(())
    }

    /// Step 2, and every later mirror: a request that carries the newest confirmed root.
    pub fn fence(&self, state: &mut State, head: usize, disk: usize) -> Option<()> {
        let own = &state.heads[head];
        let asked = self.disks_of(bit(own.root.set.into()) | own.root.former);
        // More fences than are needed only add protection.
        let useful = match own.phase {
            Phase::Idle | Phase::Claiming | Phase::Settling => false,
            Phase::Fencing => true,
            Phase::Waiting | Phase::Serving => !self.in_force(own),
        };
        allow(useful && has(asked, disk) && !has(own.fenced & own.mirrored, disk))?;
        let (epoch, id) = (own.root.epoch, own.id);
        allow(state.disks[disk].admits(epoch, id))?;
        let own = &mut state.heads[head];
        state.disks[disk].raise(epoch, id);
        state.disks[disk].mirror = state.disks[disk].mirror.max(own.root);
        own.fenced |= bit(disk);
        own.mirrored |= bit(disk);
        if own.wait.is_none() && self.fenced_enough(own) {
            own.wait = Some(if own.skip_wait { 0 } else { self.config.lease });
        }
        Some(())
    }

    pub fn fenced_enough(&self, head: &Head) -> bool {
        if self.has(Bug::CountPartDomains) {
            // A domain with any disk that answered counts; fewer than the width are missing.
            let set = &self.set(head.root.set).set;
            let answered = disk_ids(head.fenced);
            let touched = rules::domains_touched(set, &answered);
            let all = rules::domains(set).len();
            return all - touched < usize::from(set.width());
        }
        self.has(Bug::SkipFence) || self.set(head.root.set).fenced_enough[usize::from(head.fenced)]
    }

    /// Steps 3 and 4: walks the log and asks for a checkpoint of what it found.
    pub fn settle(&self, state: &mut State, head: usize, set: u8) -> Option<()> {
        let own = state.heads[head];
        allow(own.phase == Phase::Fencing && self.fenced_enough(&own))?;
        if set != own.root.set {
            allow(self.config.settle_changes_set)?;
            spend(&mut state.used.swaps, self.config.budget.swaps)?;
        }
        let heard = if self.has(Bug::SkipFence) { Mask::MAX } else { own.fenced };
        let up = (0..DISKS).filter(|d| !state.disks[*d].down).fold(0, |mask, d| mask | bit(d));
        let enough = self.set(own.root.set).heard_enough[usize::from(own.fenced)][usize::from(up)];
        let sloppy = [Bug::SkipFence, Bug::CountPartDomains, Bug::CountUnread];
        allow(enough || self.config.bug.is_some_and(|bug| sloppy.contains(&bug)))?;
        let base = own.root.checkpoint;
        let (lsn, value) = self.walk(state, heard, base)?;
        let root = Root {
            sequence: own.root.sequence + 1,
            set,
            former: self.former(&own.root, self.in_force(&own)),
            checkpoint: Checkpoint { epoch: own.root.epoch, lsn, value },
            ..own.root
        };
        state.swaps[head] = Some((own.root.token(), root));
        let own = &mut state.heads[head];
        own.phase = Phase::Settling;
        own.pending = Some(root);
        own.lsn = lsn;
        own.value = value;
        own.wait = own.wait.or(Some(self.config.lease));
        Some(())
    }

    /// The end of the log and the content there, as the disks `heard` tell. None: a record that
    /// was acknowledged is missing, so the head waits.
    pub fn walk(&self, state: &State, heard: Mask, from: Checkpoint) -> Option<(u8, u8)> {
        let disks =
            || (0..DISKS).filter(|d| has(heard, *d)).map(|d| &state.disks[d]).filter(|d| !d.down);
        let valid = |epoch: u8| epoch == from.epoch || self.has(Bug::ReplayOtherEpoch);
        let all = || disks().flat_map(|disk| &disk.shards).flat_map(Shard::records);
        let closed_at = |segment: usize| {
            all()
                .filter(|record| valid(record.epoch))
                .filter_map(|record| record.closes)
                .find(|(closed, _)| usize::from(*closed) == segment)
                .map(|(_, length)| usize::from(length))
        };
        let (mut lsn, mut value) = (from.lsn, from.value);
        for segment in 0..SEGMENTS {
            let end = closed_at(segment).unwrap_or(usize::MAX);
            // The longest valid prefix that any member holds.
            let settled = disks()
                .map(|disk| {
                    let mut at = (lsn, value);
                    for record in disk.shards[segment].records().iter().take(end) {
                        if record.lsn <= from.lsn && record.lsn <= at.0 {
                            continue;
                        }
                        if !valid(record.epoch) || record.lsn > at.0 + 1 {
                            break;
                        }
                        if record.lsn == at.0 + 1 {
                            at = (record.lsn, record.value);
                        }
                    }
                    at
                })
                .max_by_key(|(lsn, _)| *lsn)?;
            (lsn, value) = settled;
        }
        let promised = all().filter(|record| record.epoch == from.epoch).map(|r| r.acknowledged);
        (promised.max().unwrap_or(0) <= lsn).then_some((lsn, value))
    }

    /// Step 5.
    pub fn serve(&self, state: &mut State, head: usize) -> Option<()> {
        let own = &mut state.heads[head];
        allow(own.phase == Phase::Waiting)?;
        allow(own.wait == Some(0) || self.has(Bug::ServeBeforeLease))?;
        allow(self.in_force(own) || self.has(Bug::ServeBeforeForce))?;
        own.phase = Phase::Serving;
        own.wait = Some(0);
        state.served = state.served.max(own.root.epoch);
        // A head that was superseded meanwhile may still come this far; it gets no lease.
        if state.served == own.root.epoch && state.history.read(own.value).is_none() {
            state.violation = Some(Violation::LostWrite);
        }
        Some(())
    }
}
