//! Requests to volumes whose heads run here: which of them are begun, and when an earlier one is
//! over.
//!
//! A caller that lost the answer to a change must be able to learn that the change will not happen
//! any more before it makes a later one. So each change has the *turn* that its caller (a core of a
//! node) was given for the volume; an attach without the present turn begins a new one.
//!
//! # Invariants
//! - No change is begun whose turn is over, whose epoch is not that of the head, or whose
//!   connection has ended, even if it was received before.
//! - An attach that begins a turn is answered when every change of the turns before it, on the same
//!   head, is over, whatever connection it came by.
//! - A [`Gate`] exists while a connection knows it or a change of it runs. If there is none, then
//!   nothing of earlier turns can come: the connections of a caller do not live side by side.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};

use bytes::Bytes;
use tokio::sync::Notify;

use super::{Served, Shared};
use crate::export::TargetError;
use crate::id::{Epoch, NodeId, VolumeId};
use crate::rpc::planted::{self, Bug};
use crate::rpc::volume::{VolumeAnswer, VolumeCall, VolumeError, VolumeResult, VolumeState};

/// A core of a node.
type Caller = (NodeId, u16);

/// The changes that one caller makes to one volume.
struct Gate {
    key: (Caller, VolumeId),
    /// Changes of lower turns are not begun any more.
    turn: Cell<u64>,
    /// Changes that run, by epoch and turn.
    running: RefCell<BTreeMap<(Epoch, u64), usize>>,
    ended: Notify,
    registry: Weak<Gates>,
}

/// All gates of a server.
#[derive(Default)]
pub(super) struct Gates {
    all: RefCell<BTreeMap<(Caller, VolumeId), Weak<Gate>>>,
    /// The last turn that was given to anybody.
    turns: Cell<u64>,
}

impl Drop for Gate {
    fn drop(&mut self) {
        if let Some(registry) = self.registry.upgrade() {
            registry.all.borrow_mut().remove(&self.key);
        }
    }
}

impl Gates {
    fn gate(self: &Rc<Self>, key: (Caller, VolumeId)) -> Rc<Gate> {
        let mut all = self.all.borrow_mut();
        if let Some(gate) = all.get(&key).and_then(Weak::upgrade) {
            return gate;
        }
        let gate = Rc::new(Gate {
            key,
            turn: Cell::new(0),
            running: RefCell::default(),
            ended: Notify::new(),
            registry: Rc::downgrade(self),
        });
        all.insert(key, Rc::downgrade(&gate));
        gate
    }

    fn next_turn(&self) -> u64 {
        self.turns.set(self.turns.get() + 1);
        self.turns.get()
    }
}

/// A change that runs.
struct Running {
    gate: Rc<Gate>,
    key: (Epoch, u64),
}

impl Running {
    fn new(gate: Rc<Gate>, key: (Epoch, u64)) -> Self {
        *gate.running.borrow_mut().entry(key).or_default() += 1;
        Self { gate, key }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut running = self.gate.running.borrow_mut();
        if let Some(count) = running.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                running.remove(&self.key);
                self.gate.ended.notify_waiters();
            }
        }
    }
}

impl Gate {
    /// Returns when no change to the head of `epoch` runs that has an earlier turn.
    async fn over(&self, epoch: Epoch, turn: u64) {
        loop {
            let ended = self.ended.notified();
            let runs = self.running.borrow().keys().any(|(e, t)| *e == epoch && *t < turn);
            if !runs || planted::is(Bug::TurnTooSoon) {
                return;
            }
            ended.await;
        }
    }
}

/// One connection, as its requests to volumes know it.
pub(super) struct Line {
    caller: Caller,
    ended: Cell<bool>,
    /// Gates that a change may still come for. As many as there are volumes here.
    gates: RefCell<BTreeMap<VolumeId, Rc<Gate>>>,
}

/// Ends its line when it is dropped, at the latest.
pub(super) struct LineOwner(pub(super) Rc<Line>);

impl Drop for LineOwner {
    fn drop(&mut self) {
        self.end();
    }
}

impl LineOwner {
    /// What came and is not begun never will be.
    pub(super) fn end(&self) {
        self.0.ended.set(true);
        drop(self.0.gates.take());
    }

    pub(super) fn new(caller: Caller) -> Self {
        Self(Rc::new(Line { caller, ended: Cell::new(false), gates: RefCell::default() }))
    }
}

fn gone(text: String) -> VolumeError {
    VolumeError::Target(TargetError::Stopped, text)
}

impl Line {
    fn gate(&self, gates: &Rc<Gates>, volume: VolumeId) -> Result<Rc<Gate>, VolumeError> {
        if self.ended.get() && !planted::is(Bug::EndedAccepted) {
            return Err(gone("the connection has ended".into()));
        }
        let mut known = self.gates.borrow_mut();
        let gate = known.entry(volume).or_insert_with(|| gates.gate((self.caller, volume)));
        Ok(gate.clone())
    }
}

/// Answers a request to `volume`.
pub(super) async fn run(
    shared: Rc<Shared>,
    line: Rc<Line>,
    volume: VolumeId,
    call: VolumeCall,
    payload: Bytes,
) -> VolumeResult {
    let name = &shared.own.name;
    let served = shared.directories.volumes.volume(volume).await.map_err(|error| match error {
        TargetError::Stopped => gone(format!("node {name} has no head of volume {volume}")),
        other => other.into(),
    })?;
    // From here to the call of the target nothing else happens on this thread.
    let running = match call {
        VolumeCall::Attach { turn } => {
            let gate = line.gate(&shared.gates, volume)?;
            return Ok(attach(&shared, &gate, &served, turn).await);
        }
        VolumeCall::Write { epoch, turn, .. } | VolumeCall::Zero { epoch, turn, .. } => {
            let gate = line.gate(&shared.gates, volume)?;
            if turn < gate.turn.get() && !planted::is(Bug::LateAccepted) {
                return Err(VolumeError::Late);
            }
            Some(Running::new(gate, (epoch, turn)))
        }
        VolumeCall::Read { .. } | VolumeCall::Flush { .. } | VolumeCall::Map { .. } => None,
    };
    let meant = match call {
        VolumeCall::Read { epoch, .. }
        | VolumeCall::Flush { epoch }
        | VolumeCall::Map { epoch, .. }
        | VolumeCall::Write { epoch, .. }
        | VolumeCall::Zero { epoch, .. } => epoch,
        VolumeCall::Attach { .. } => served.epoch,
    };
    if meant != served.epoch && !planted::is(Bug::AnyEpoch) {
        let now = served.epoch;
        return Err(gone(format!("the head on node {name} is of epoch {now}, not {meant}")));
    }
    let answer = call.run(&*served.target, payload).await;
    drop(running);
    Ok((VolumeState::of(&*served.target), answer?))
}

async fn attach(
    shared: &Shared,
    gate: &Gate,
    served: &Served,
    turn: u64,
) -> (VolumeState, VolumeAnswer) {
    let epoch = served.epoch;
    let turn = if turn != 0 && turn == gate.turn.get() {
        turn
    } else {
        let next = shared.gates.next_turn();
        gate.turn.set(next);
        gate.over(epoch, next).await;
        next
    };
    (VolumeState::of(&*served.target), VolumeAnswer::Attached { epoch, turn })
}
