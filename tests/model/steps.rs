//! What may happen next: the protocol's steps, and the faults.
//!
//! Every step that takes a message is its own action, so that heads, disks and the store
//! interleave freely; a head that is slow, paused or wakes late is one whose actions come late.

use sds::volume::rules;
use stateright::{Model, Property};

use crate::config::{Bug, Rules, SetTable, disk_ids};
use crate::history::History;
use crate::state::{
    Checkpoint, DISKS, Disk, EPOCHS, Flight, HEADS, Head, Mask, Phase, Probe, RECORDS, Record,
    Recovery, Root, SEGMENTS, Shard, ShardState, State, Used, Violation,
};

/// The fence of `recover`: no head has this id.
pub const RECOVERER: u8 = 15;
/// Epochs of the second incarnation of the store begin here.
pub const INCARNATION: u8 = 16;

/// The property that shows that a configuration does something.
pub const LATER_HEAD: &str = "a later head acknowledges";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    // Faults.
    Crash(usize),
    Down(usize),
    Up(usize),
    Kill(usize),
    LoseStore,
    Tick,
    // Store.
    Apply { head: usize, reply: bool },
    RecoverVisit(usize),
    RecoverFinish,
    // Heads.
    Claim(usize),
    ReadRoot(usize),
    Fence { head: usize, disk: usize },
    Settle { head: usize, set: u8 },
    Serve(usize),
    Swap { head: usize, set: u8, checkpoint: bool },
    Release(usize),
    Free(usize),
    Write(usize),
    Open { head: usize, write_set: Mask },
    Append { head: usize, disk: usize },
    Acknowledge(usize),
    Roll { head: usize, seal: bool },
    Probe(usize),
    Answer { head: usize, disk: usize },
    Lease(usize),
    Read(usize),
}

impl Model for Rules {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![self.start().canonical(self.classes)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.violation.is_some() {
            return;
        }
        actions.extend([Action::LoseStore, Action::Tick, Action::RecoverFinish]);
        for disk in 0..DISKS {
            actions.extend([Action::Down(disk), Action::Up(disk), Action::Kill(disk)]);
            actions.push(Action::RecoverVisit(disk));
        }
        for head in 0..HEADS {
            self.head_actions(state, head, actions);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = *last;
        self.step(&mut state, action)?;
        let state = state.canonical(self.classes);
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no acknowledged write lost", |_, state: &State| {
                state.violation != Some(Violation::LostWrite)
            }),
            Property::always("no stale read", |_, state: &State| {
                state.violation != Some(Violation::StaleRead)
            }),
            Property::always("one head acknowledges per epoch", |_, state: &State| {
                state.violation != Some(Violation::TwoHeads)
            }),
            // Without this, the others would hold for a model that does nothing.
            Property::sometimes(LATER_HEAD, |_, state: &State| {
                state.acknowledgers[2..].iter().any(|head| *head != 0)
            }),
        ]
    }
}

/// The place of an epoch in a table of both incarnations.
fn epoch_index(epoch: u8) -> usize {
    usize::from(epoch / INCARNATION * EPOCHS + epoch % INCARNATION)
}

fn bit(index: usize) -> u8 {
    1 << index
}

fn has(mask: u8, index: usize) -> bool {
    mask >> index & 1 == 1
}

impl Rules {
    /// Head 0 serves in epoch 1 with a root in force on all disks of the first set.
    fn start(&self) -> State {
        let checkpoint = Checkpoint { epoch: 1, lsn: 0, value: 0 };
        let root = Root { epoch: 1, head: 1, sequence: 1, checkpoint, ..Root::default() };
        let members = self.set(0).disks;
        let mut state = State {
            disks: [Disk::default(); DISKS],
            dead: 0,
            root: Some(root),
            recovery: Recovery::default(),
            swaps: [None; HEADS],
            heads: [Head::default(); HEADS],
            write_sets: [0; SEGMENTS],
            segments: 0,
            used: Used::default(),
            history: History::START,
            acknowledgers: [0; _],
            served: 1,
            violation: None,
        };
        let in_set = state.disks.iter_mut().enumerate().filter(|(disk, _)| has(members, *disk));
        for (_, entry) in in_set {
            entry.fence = (1, 1);
            entry.mirror = root;
        }
        state.heads[0] = Head {
            phase: Phase::Serving,
            id: 1,
            root,
            fenced: members,
            mirrored: members,
            wait: Some(0),
            ..Head::default()
        };
        state
    }

    fn head_actions(&self, state: &State, head: usize, actions: &mut Vec<Action>) {
        let own = &state.heads[head];
        actions.push(Action::Apply { head, reply: true });
        if self.config.doubt {
            actions.push(Action::Apply { head, reply: false });
        }
        if own.phase == Phase::Idle {
            actions.push(Action::Claim(head));
            return;
        }
        actions.extend([Action::Crash(head), Action::ReadRoot(head), Action::Serve(head)]);
        let sets = 0..u8::try_from(self.sets.len()).expect("few sets");
        for set in sets {
            actions.push(Action::Settle { head, set });
            actions.extend([false, true].map(|checkpoint| Action::Swap { head, set, checkpoint }));
        }
        for disk in 0..DISKS {
            actions.push(Action::Fence { head, disk });
            actions.push(Action::Append { head, disk });
            actions.push(Action::Answer { head, disk });
        }
        actions.extend([Action::Release(head), Action::Free(head), Action::Write(head)]);
        if own.flight.is_some() && own.segment.is_none() {
            actions.extend((1..1 << DISKS).map(|write_set| Action::Open { head, write_set }));
        }
        actions.extend([Action::Acknowledge(head), Action::Probe(head), Action::Lease(head)]);
        actions.extend([true, false].map(|seal| Action::Roll { head, seal }));
        actions.push(Action::Read(head));
    }

    /// Performs the action; none if it is not possible now.
    fn step(&self, state: &mut State, action: Action) -> Option<()> {
        match action {
            Action::Crash(head) => self.crash(state, head),
            Action::Down(disk) => self.down(state, disk),
            Action::Up(disk) => self.up(state, disk),
            Action::Kill(disk) => self.kill(state, disk),
            Action::LoseStore => self.lose_store(state),
            Action::Tick => tick(state),
            Action::Apply { head, reply } => self.apply(state, head, reply),
            Action::RecoverVisit(disk) => self.recover_visit(state, disk),
            Action::RecoverFinish => self.recover_finish(state),
            Action::Claim(head) => self.claim(state, head),
            Action::ReadRoot(head) => self.read_root(state, head),
            Action::Fence { head, disk } => self.fence(state, head, disk),
            Action::Settle { head, set } => self.settle(state, head, set),
            Action::Serve(head) => self.serve(state, head),
            Action::Swap { head, set, checkpoint } => self.swap(state, head, set, checkpoint),
            Action::Release(head) => self.release(state, head),
            Action::Free(head) => self.free(state, head),
            Action::Write(head) => self.write(state, head),
            Action::Open { head, write_set } => self.open(state, head, write_set),
            Action::Append { head, disk } => self.append(state, head, disk),
            Action::Acknowledge(head) => self.acknowledge(state, head),
            Action::Roll { head, seal } => self.roll(state, head, seal),
            Action::Probe(head) => self.probe(state, head),
            Action::Answer { head, disk } => answer(state, head, disk),
            Action::Lease(head) => self.lease(state, head),
            Action::Read(head) => self.read(state, head),
        }
    }

    fn crash(&self, state: &mut State, head: usize) -> Option<()> {
        // A head that crashes and claims nothing again is one that takes no more steps.
        allow(state.used.claims < self.config.budget.claims)?;
        spend(&mut state.used.crashes, self.config.budget.crashes)?;
        stop(state, head);
        Some(())
    }

    fn down(&self, state: &mut State, disk: usize) -> Option<()> {
        allow(!state.disks[disk].down && has(self.disks_of(u8::MAX), disk))?;
        spend(&mut state.used.downs, self.config.budget.downs)?;
        state.disks[disk].down = true;
        if self.has(Bug::ForgetFence) {
            state.disks[disk].fence = (0, 0);
        }
        Some(())
    }

    /// A member comes back; a restart is a short absence.
    fn up(&self, state: &mut State, disk: usize) -> Option<()> {
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
    fn kill(&self, state: &mut State, disk: usize) -> Option<()> {
        allow(self.config.operator && state.root.is_none() && state.disks[disk].down)?;
        allow(!has(state.dead, disk))?;
        let dead = state.dead | bit(disk);
        let alive = !dead & (bit(DISKS) - 1);
        allow(self.sets.iter().all(|table| table.fenced_enough[usize::from(alive)]))?;
        state.dead = dead;
        Some(())
    }

    fn lose_store(&self, state: &mut State) -> Option<()> {
        allow(state.root.is_some() && state.used.claims < self.config.budget.claims)?;
        spend(&mut state.used.losses, self.config.budget.losses)?;
        state.root = None;
        state.swaps = [None; HEADS];
        Some(())
    }

    /// `recover` raises a disk's fence to the new incarnation and takes its mirror, in this order.
    fn recover_visit(&self, state: &mut State, disk: usize) -> Option<()> {
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

    fn recover_finish(&self, state: &mut State) -> Option<()> {
        let recovery = state.recovery;
        allow(state.root.is_none() && recovery.best.epoch > 0)?;
        let heard = recovery.visited | state.dead;
        allow(recovery.needed & !heard == 0 || self.has(Bug::RecoverPartly))?;
        for disk in (0..DISKS).filter(|disk| has(recovery.visited, *disk)) {
            state.disks[disk].raise(INCARNATION, RECOVERER);
        }
        state.root =
            Some(Root { epoch: INCARNATION, head: RECOVERER, sequence: 0, ..recovery.best });
        state.recovery = Recovery::default();
        Some(())
    }

    /// A swap reaches the store; its reply reaches the head, or is lost or late for ever.
    fn apply(&self, state: &mut State, head: usize, reply: bool) -> Option<()> {
        let (expected, new) = state.swaps[head].take()?;
        let succeeded = state.root.as_ref()?.token() == expected;
        if succeeded {
            state.root = Some(new);
        }
        let waiting = state.heads[head].pending == Some(new);
        if !waiting {
            // Its head crashed or gave up: what matters is only whether the root changed.
            return allow(reply);
        }
        if reply {
            if succeeded || self.has(Bug::BelieveFailedSwap) {
                swapped(&mut state.heads[head]);
            } else {
                stop(state, head);
            }
        }
        Some(())
    }

    /// Only one's own token settles a swap in doubt; somebody else's deposes.
    fn read_root(&self, state: &mut State, head: usize) -> Option<()> {
        let token = state.root?.token();
        let own = &mut state.heads[head];
        if token == own.pending?.token() {
            swapped(own);
        } else if token == own.root.token() || own.phase == Phase::Claiming {
            allow(self.has(Bug::BelieveOldRead) && own.phase == Phase::Serving)?;
            own.pending = None;
            own.pending_unsealed = 0;
        } else {
            stop(state, head);
        }
        Some(())
    }

    /// Step 1: asks for a new epoch.
    fn claim(&self, state: &mut State, head: usize) -> Option<()> {
        let base = state.root?;
        spend(&mut state.used.claims, self.config.budget.claims)?;
        let id = 1 + state.used.claims;
        let set =
            if self.has(Bug::ChangeSetBeforeFence) { self.sets.len() - 1 } else { base.set.into() };
        let root = Root {
            epoch: base.epoch + 1,
            head: id,
            sequence: base.sequence + 1,
            released: false,
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

    /// The former sets of the root after `root`.
    fn former(&self, root: &Root, known_in_force: bool) -> u8 {
        let carried = if self.has(Bug::FormerSetForgotten) { 0 } else { root.former };
        self.set(root.set).next_former[usize::from(carried)][usize::from(known_in_force)]
    }

    fn in_force(&self, head: &Head) -> bool {
        if self.has(Bug::OneFormerMirror) {
            let touched =
                |set: &rules::LogSet| rules::domains_touched(set, &disk_ids(head.mirrored));
            let own = &self.set(head.root.set).set;
            let former = self.sets_of(head.root.former);
            return touched(own) >= own.width().into() && former.iter().all(|set| touched(set) > 0);
        }
        self.set(head.root.set).in_force[usize::from(head.root.former)][usize::from(head.mirrored)]
    }

    /// The sets whose rules bind the head now, by bit.
    fn pairs(&self, head: &Head) -> u8 {
        let wanted = head.pending.filter(|_| !self.has(Bug::IgnoreWantedSet));
        let in_force = self.in_force(head) || self.has(Bug::UseSetBeforeForce);
        let wanted = wanted.map_or(0, |root| 1 + usize::from(root.set));
        let former = usize::from(head.root.former);
        self.set(head.root.set).pairs[wanted][former][usize::from(in_force)]
    }

    /// Whether a predicate of the tables holds under all pairs in use.
    fn in_all_pairs(&self, head: &Head, holds: impl Fn(&SetTable) -> bool) -> bool {
        let pairs = self.pairs(head);
        self.sets.iter().enumerate().all(|(index, table)| !has(pairs, index) || holds(table))
    }

    /// Step 2, and every later mirror: a request that carries the newest confirmed root.
    fn fence(&self, state: &mut State, head: usize, disk: usize) -> Option<()> {
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

    fn fenced_enough(&self, head: &Head) -> bool {
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
    fn settle(&self, state: &mut State, head: usize, set: u8) -> Option<()> {
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
    fn walk(&self, state: &State, heard: Mask, from: Checkpoint) -> Option<(u8, u8)> {
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
    fn serve(&self, state: &mut State, head: usize) -> Option<()> {
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

    /// A serving head asks for a new root: a checkpoint, another set, or both.
    fn swap(&self, state: &mut State, head: usize, set: u8, checkpoint: bool) -> Option<()> {
        let own = state.heads[head];
        allow(own.phase == Phase::Serving && own.pending.is_none())?;
        allow(if checkpoint { self.config.checkpoints } else { set != own.root.set })?;
        spend(&mut state.used.swaps, self.config.budget.swaps)?;
        let mut root = Root {
            sequence: own.root.sequence + 1,
            set,
            former: self.former(&own.root, self.in_force(&own)),
            ..own.root
        };
        let changed = &mut state.heads[head];
        changed.pending_unsealed = own.unsealed;
        if checkpoint {
            // The checkpoint seals the segment that is being written, between two records.
            allow(own.flight.is_none())?;
            root.checkpoint = Checkpoint { epoch: own.root.epoch, lsn: own.lsn, value: own.value };
            changed.pending_unsealed = 0;
            changed.closes = own.segment.map(|segment| (segment, own.position)).or(own.closes);
            changed.segment = None;
            changed.position = 0;
        }
        let open: Vec<_> = (0..SEGMENTS)
            .filter(|segment| has(changed.pending_unsealed, *segment))
            .map(|segment| disk_ids(state.write_sets[segment]))
            .collect();
        let allowed = rules::may_swap_set(&self.set(own.root.set).set, &self.set(set).set, &open);
        allow(allowed || self.has(Bug::UncheckedSwap))?;
        changed.pending = Some(root);
        state.swaps[head] = Some((own.root.token(), root));
        Some(())
    }

    /// A head stops for good and says so. Whatever becomes of the swap, it does not serve again.
    fn release(&self, state: &mut State, head: usize) -> Option<()> {
        let own = state.heads[head];
        let early = self.has(Bug::ReleaseEarly) && own.phase == Phase::Waiting;
        allow((own.phase == Phase::Serving || early) && own.pending.is_none())?;
        allow(own.flight.is_none())?;
        spend(&mut state.used.releases, self.config.budget.releases)?;
        let root = Root {
            sequence: own.root.sequence + 1,
            released: true,
            former: self.former(&own.root, self.in_force(&own)),
            ..own.root
        };
        state.swaps[head] = Some((own.root.token(), root));
        state.heads[head] = Head::default();
        Some(())
    }

    /// Deletes the segments that the newest checkpoint no longer needs.
    fn free(&self, state: &mut State, head: usize) -> Option<()> {
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

    fn write(&self, state: &mut State, head: usize) -> Option<()> {
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
    fn open(&self, state: &mut State, head: usize, write_set: Mask) -> Option<()> {
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
    fn append(&self, state: &mut State, head: usize, disk: usize) -> Option<()> {
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
    fn acknowledge(&self, state: &mut State, head: usize) -> Option<()> {
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
    fn roll(&self, state: &mut State, head: usize, seal: bool) -> Option<()> {
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
    fn probe(&self, state: &mut State, head: usize) -> Option<()> {
        let lease = self.config.lease;
        let own = &mut state.heads[head];
        allow(lease > 0 && own.phase == Phase::Serving)?;
        allow(own.probe.is_none_or(|probe| probe.left == 0))?;
        own.probe = Some(Probe { left: lease, answered: 0 });
        Some(())
    }

    /// The answers reach the head.
    fn lease(&self, state: &mut State, head: usize) -> Option<()> {
        let own = state.heads[head];
        let probe = own.probe?;
        allow(self.in_all_pairs(&own, |set| set.lease_ok[usize::from(probe.answered)]))?;
        let left = if self.has(Bug::LeaseFromReceipt) { self.config.lease } else { probe.left };
        state.heads[head].lease = own.lease.max(left);
        state.heads[head].probe = None;
        Some(())
    }

    fn read(&self, state: &mut State, head: usize) -> Option<()> {
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

/// The head knows that its pending root is, or was, the newest.
fn swapped(head: &mut Head) {
    let Some(root) = head.pending.take() else { return };
    head.mirrored = 0;
    head.root = root;
    match head.phase {
        Phase::Claiming => head.phase = Phase::Fencing,
        Phase::Settling => head.phase = Phase::Waiting,
        _ => head.unsealed = head.pending_unsealed,
    }
    head.pending_unsealed = 0;
}

/// A disk answers a probe with "not fenced".
fn answer(state: &mut State, head: usize, disk: usize) -> Option<()> {
    let own = &mut state.heads[head];
    allow(state.disks[disk].admits(own.root.epoch, own.id))?;
    own.probe.as_mut()?.answered |= bit(disk);
    Some(())
}

/// A head crashes or gives up; its clients see their connections break.
fn stop(state: &mut State, head: usize) {
    if let Some(flight) = state.heads[head].flight {
        state.history = state.history.abandon(flight.record.value);
    }
    state.heads[head] = Head::default();
}

fn allow(condition: bool) -> Option<()> {
    condition.then_some(())
}

fn spend(used: &mut u8, budget: u8) -> Option<()> {
    allow(*used < budget)?;
    *used += 1;
    Some(())
}

/// Time passes, for all clocks alike.
fn tick(state: &mut State) -> Option<()> {
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
