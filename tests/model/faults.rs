//! What strikes, and what an operator does about it: crashes, members that are away, a lost store and
//! `recover`; and time.

use crate::config::{Bug, Rules};
use crate::state::{DISKS, HEADS, Recovery, Root, ShardState, State};
use crate::steps::{INCARNATION, RECOVERER, allow, bit, has, spend, stop};

impl Rules {
    pub fn crash(&self, state: &mut State, head: usize) -> Option<()> {
        // A head that crashes and claims nothing again is one that takes no more steps.
        allow(state.used.claims < self.config.budget.claims)?;
        spend(&mut state.used.crashes, self.config.budget.crashes)?;
        stop(state, head);
        Some(())
    }

    pub fn down(&self, state: &mut State, disk: usize) -> Option<()> {
        allow(!state.disks[disk].down && has(self.disks_of(u8::MAX), disk))?;
        spend(&mut state.used.downs, self.config.budget.downs)?;
        state.disks[disk].down = true;
        if self.has(Bug::ForgetFence) {
            state.disks[disk].fence = (0, 0);
        }
        Some(())
    }

    /// A member comes back; a restart is a short absence.
    pub fn up(&self, state: &mut State, disk: usize) -> Option<()> {
        allow(self.config.returns && state.disks[disk].down && !has(state.dead, disk))?;
        state.disks[disk].down = false;
        for shard in &mut state.disks[disk].shards {
            if shard.state == ShardState::Open {
                shard.state = ShardState::Closed;
            }
        }
        Some(())
    }

    /// An operator's word that a missing disk is gone for good, while the store is rebuilt: for
    /// fewer domains than the width of any set.
    pub fn kill(&self, state: &mut State, disk: usize) -> Option<()> {
        allow(self.config.operator && state.root.is_none() && state.disks[disk].down)?;
        allow(!has(state.dead, disk))?;
        let dead = state.dead | bit(disk);
        let alive = !dead & (bit(DISKS) - 1);
        allow(self.sets.iter().all(|table| table.fenced_enough[usize::from(alive)]))?;
        state.dead = dead;
        Some(())
    }

    pub fn lose_store(&self, state: &mut State) -> Option<()> {
        allow(state.root.is_some() && state.used.claims < self.config.budget.claims)?;
        spend(&mut state.used.losses, self.config.budget.losses)?;
        state.root = None;
        state.swaps = [None; HEADS];
        Some(())
    }

    /// `recover` raises a disk's fence to the new incarnation and takes its mirror, in this order.
    pub fn recover_visit(&self, state: &mut State, disk: usize) -> Option<()> {
        allow(state.root.is_none() && !state.disks[disk].down)?;
        allow(!has(state.recovery.visited, disk))?;
        state.recovery.visited |= bit(disk);
        let found = state.disks[disk].mirror;
        if found.epoch > 0 {
            state.recovery.needed |= self.set(found.set).disks;
            state.recovery.best = state.recovery.best.max(found);
        }
        if !self.has(Bug::RecoverReadsFirst) {
            state.disks[disk].raise(INCARNATION, RECOVERER);
        }
        Some(())
    }

    pub fn recover_finish(&self, state: &mut State) -> Option<()> {
        let recovery = state.recovery;
        allow(state.root.is_none() && recovery.best.epoch > 0)?;
        let heard = recovery.visited | state.dead;
        allow(recovery.needed & !heard == 0 || self.has(Bug::RecoverPartly))?;
        for disk in (0..DISKS).filter(|disk| has(recovery.visited, *disk)) {
            state.disks[disk].raise(INCARNATION, RECOVERER);
        }
        // The head that served may read on for as long as its lease.
        let released = self.has(Bug::RecoverReleased);
        let (epoch, sequence, head) = (INCARNATION, 0, RECOVERER);
        state.root = Some(Root { epoch, sequence, head, released, ..recovery.best });
        state.recovery = Recovery::default();
        Some(())
    }
}

/// Time passes, for all clocks alike.
pub fn tick(state: &mut State) -> Option<()> {
    let mut passed = false;
    for head in &mut state.heads {
        let probe = head.probe.as_mut().map(|probe| &mut probe.left);
        for timer in [Some(&mut head.lease), head.wait.as_mut(), probe].into_iter().flatten() {
            passed |= *timer > 0;
            *timer = timer.saturating_sub(1);
        }
    }
    allow(passed)
}
