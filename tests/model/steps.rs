//! What may happen next: the protocol's steps, and the faults.
//!
//! Every step that takes a message is its own action, so that heads, disks and the store
//! interleave freely; a head that is slow, paused or wakes late is one whose actions come late.

use stateright::{Model, Property};

use crate::config::Rules;
use crate::faults::tick;
use crate::history::History;
use crate::serving::answer;
use crate::state::{
    Checkpoint, DISKS, Disk, EPOCHS, HEADS, Head, Mask, Phase, Recovery, Root, SEGMENTS, State,
    Used, Violation,
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
pub fn epoch_index(epoch: u8) -> usize {
    usize::from(epoch / INCARNATION * EPOCHS + epoch % INCARNATION)
}

pub fn bit(index: usize) -> u8 {
    1 << index
}

pub fn has(mask: u8, index: usize) -> bool {
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
}

/// A head crashes or gives up; its clients see their connections break.
pub fn stop(state: &mut State, head: usize) {
    if let Some(flight) = state.heads[head].flight {
        state.history = state.history.abandon(flight.record.value);
    }
    state.heads[head] = Head::default();
}

pub fn allow(condition: bool) -> Option<()> {
    condition.then_some(())
}

pub fn spend(used: &mut u8, budget: u8) -> Option<()> {
    allow(*used < budget)?;
    *used += 1;
    Some(())
}
