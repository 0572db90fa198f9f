//! What a serving head does: it writes, frees, and reads under its lease.

use crate::config::{Bug, Rules};
use crate::state::{
    DISKS, Flight, Mask, Phase, Probe, RECORDS, Record, SEGMENTS, Shard, ShardState, State,
    Violation,
};
use crate::steps::{allow, bit, epoch_index, has, spend};

impl Rules {
    /// Deletes the segments that the newest checkpoint no longer needs.
    pub fn free(&self, state: &mut State, head: usize) -> Option<()> {
        let own = state.heads[head];
        allow(self.config.frees && own.phase == Phase::Serving)?;
        let doubt = own.pending.is_some();
        allow(!doubt || self.has(Bug::FreeInDoubt))?;
        allow(self.in_force(&own) || self.has(Bug::FreeBeforeForce))?;
        let needed = if doubt { own.pending_unsealed } else { own.unsealed };
        for disk in &mut state.disks {
            if !disk.admits(own.root.epoch, own.id) {
                continue;
            }
            for (segment, shard) in disk.shards.iter_mut().enumerate() {
                let newer = shard.epoch > own.root.epoch;
                if !has(needed, segment) && own.segment != u8::try_from(segment).ok() && !newer {
                    *shard = Shard::default();
                }
            }
        }
        Some(())
    }

    pub fn write(&self, state: &mut State, head: usize) -> Option<()> {
        let own = &mut state.heads[head];
        allow(own.phase == Phase::Serving && own.flight.is_none())?;
        allow(own.segment.is_some() || usize::from(state.segments) < SEGMENTS)?;
        spend(&mut state.used.writes, self.config.budget.writes)?;
        let value = state.used.writes;
        state.history = state.history.call(value);
        let record = Record {
            epoch: own.root.epoch,
            lsn: own.lsn + 1,
            value,
            acknowledged: own.lsn,
            closes: None,
        };
        own.flight = Some(Flight { record, done: 0 });
        Some(())
    }

    /// Chooses the write set of a new segment: one that the rules allow and that has no member
    /// too many.
    pub fn open(&self, state: &mut State, head: usize, write_set: Mask) -> Option<()> {
        let own = state.heads[head];
        let allowed =
            |mask: Mask| self.in_all_pairs(&own, |set| set.write_set_ok[usize::from(mask)]);
        let minimal = || {
            (0..DISKS).filter(|d| has(write_set, *d)).all(|disk| !allowed(write_set & !bit(disk)))
        };
        let mut segment = usize::from(state.segments);
        if self.has(Bug::ExtendStaleShard) && segment > 0 && own.root.epoch > 1 {
            segment -= 1;
            allow(write_set == state.write_sets[segment])?;
        } else {
            allow(segment < SEGMENTS && allowed(write_set) && minimal())?;
            let up = (0..DISKS).all(|disk| !has(write_set, disk) || !state.disks[disk].down);
            allow(up)?;
            state.write_sets[segment] = write_set;
            state.segments += 1;
        }
        let own = &mut state.heads[head];
        own.segment = u8::try_from(segment).ok();
        own.unsealed |= bit(segment);
        own.pending_unsealed |= if own.pending.is_some() { bit(segment) } else { 0 };
        own.position = 0;
        own.flight.as_mut()?.record.closes = own.closes;
        Some(())
    }

    /// A record becomes durable on a member, and the member's answer arrives. An answer that is
    /// lost is one that the head does not wait for: it rolls on.
    pub fn append(&self, state: &mut State, head: usize, disk: usize) -> Option<()> {
        let own = &mut state.heads[head];
        let segment = usize::from(own.segment?);
        let flight = own.flight.as_mut()?;
        allow(has(state.write_sets[segment], disk) && !has(flight.done, disk))?;
        let (epoch, id, position) = (own.root.epoch, own.id, own.position);
        let member = &mut state.disks[disk];
        allow(member.admits(epoch, id))?;
        let shard = &mut member.shards[segment];
        if self.has(Bug::ExtendStaleShard) && shard.state != ShardState::Absent {
            allow(usize::from(shard.length) < RECORDS)?;
            shard.push(flight.record);
        } else if position == 0 && shard.state == ShardState::Absent {
            shard.state = ShardState::Open;
            shard.epoch = epoch;
            shard.push(flight.record);
        } else {
            let fits = shard.length == position && usize::from(position) < RECORDS;
            allow(shard.state == ShardState::Open && shard.epoch == epoch && fits && position > 0)?;
            shard.push(flight.record);
        }
        flight.done |= bit(disk);
        member.raise(epoch, id);
        Some(())
    }

    /// All members answered: committed, applied, and the client hears of it.
    pub fn acknowledge(&self, state: &mut State, head: usize) -> Option<()> {
        let own = &mut state.heads[head];
        let segment = usize::from(own.segment?);
        let flight = own.flight?;
        let early = self.has(Bug::AcknowledgeEarly) && flight.done != 0;
        allow(flight.done == state.write_sets[segment] || early)?;
        own.flight = None;
        own.lsn = flight.record.lsn;
        own.value = flight.record.value;
        own.position += 1;
        own.closes = None;
        let acknowledger = &mut state.acknowledgers[epoch_index(own.root.epoch)];
        match state.history.acknowledge(flight.record.value) {
            _ if *acknowledger != 0 && *acknowledger != own.id => {
                state.violation = Some(Violation::TwoHeads);
            }
            None => state.violation = Some(Violation::LostWrite),
            Some(history) => state.history = history,
        }
        *acknowledger = own.id;
        Some(())
    }

    /// A member failed, or is taken for failed: the reachable shards are sealed at the committed
    /// length (or none is) and writing goes on in another segment.
    pub fn roll(&self, state: &mut State, head: usize, seal: bool) -> Option<()> {
        let own = state.heads[head];
        let segment = own.segment?;
        allow(own.phase == Phase::Serving && own.flight.is_some())?;
        allow(usize::from(state.segments) < SEGMENTS)?;
        spend(&mut state.used.rolls, self.config.budget.rolls)?;
        let changed = &mut state.heads[head];
        changed.closes = Some((segment, own.position));
        changed.segment = None;
        changed.position = 0;
        changed.flight.as_mut()?.done = 0;
        if seal {
            for disk in &mut state.disks {
                let shard = &mut disk.shards[usize::from(segment)];
                let here = shard.state != ShardState::Absent;
                if here
                    && !disk.down
                    && (disk.fence.0 < own.root.epoch || disk.fence == (own.root.epoch, own.id))
                {
                    shard.seal(own.position);
                }
            }
        }
        Some(())
    }

    /// Sends probes; the lease is counted from here.
    pub fn probe(&self, state: &mut State, head: usize) -> Option<()> {
        let lease = self.config.lease;
        let own = &mut state.heads[head];
        allow(lease > 0 && own.phase == Phase::Serving)?;
        allow(own.probe.is_none_or(|probe| probe.left == 0))?;
        own.probe = Some(Probe { left: lease, answered: 0 });
        Some(())
    }

    /// The answers reach the head.
    pub fn lease(&self, state: &mut State, head: usize) -> Option<()> {
        let own = state.heads[head];
        let probe = own.probe?;
        allow(self.in_all_pairs(&own, |set| set.lease_ok[usize::from(probe.answered)]))?;
        let left = if self.has(Bug::LeaseFromReceipt) { self.config.lease } else { probe.left };
        state.heads[head].lease = own.lease.max(left);
        state.heads[head].probe = None;
        Some(())
    }

    pub fn read(&self, state: &mut State, head: usize) -> Option<()> {
        let own = state.heads[head];
        allow(own.phase == Phase::Serving)?;
        if self.config.lease > 0 {
            allow(own.lease > 0)?;
        } else {
            // Without leases only what the newest head says counts.
            allow(state.served == own.root.epoch)?;
        }
        match state.history.read(own.value) {
            Some(history) => state.history = history,
            None => state.violation = Some(Violation::StaleRead),
        }
        Some(())
    }
}

/// A disk answers a probe with "not fenced".
pub fn answer(state: &mut State, head: usize, disk: usize) -> Option<()> {
    let own = &mut state.heads[head];
    allow(state.disks[disk].admits(own.root.epoch, own.id))?;
    own.probe.as_mut()?.answered |= bit(disk);
    Some(())
}
