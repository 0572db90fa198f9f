//! Roots: swaps and their replies, when a root is in force, and which sets bind a head.

use sds::volume::rules;

use crate::config::{Bug, Rules, SetTable, disk_ids};
use crate::state::{Checkpoint, Head, Phase, Root, SEGMENTS, State};
use crate::steps::{allow, has, spend, stop};

impl Rules {
    /// A swap reaches the store; its reply reaches the head, or is lost or late for ever.
    pub fn apply(&self, state: &mut State, head: usize, reply: bool) -> Option<()> {
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
    pub fn read_root(&self, state: &mut State, head: usize) -> Option<()> {
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

    /// The former sets of the root after `root`.
    pub fn former(&self, root: &Root, known_in_force: bool) -> u8 {
        let carried = if self.has(Bug::FormerSetForgotten) { 0 } else { root.former };
        self.set(root.set).next_former[usize::from(carried)][usize::from(known_in_force)]
    }

    pub fn in_force(&self, head: &Head) -> bool {
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
    pub fn pairs(&self, head: &Head) -> u8 {
        let wanted = head.pending.filter(|_| !self.has(Bug::IgnoreWantedSet));
        let in_force = self.in_force(head) || self.has(Bug::UseSetBeforeForce);
        let wanted = wanted.map_or(0, |root| 1 + usize::from(root.set));
        let former = usize::from(head.root.former);
        self.set(head.root.set).pairs[wanted][former][usize::from(in_force)]
    }

    /// Whether a predicate of the tables holds under all pairs in use.
    pub fn in_all_pairs(&self, head: &Head, holds: impl Fn(&SetTable) -> bool) -> bool {
        let pairs = self.pairs(head);
        self.sets.iter().enumerate().all(|(index, table)| !has(pairs, index) || holds(table))
    }

    /// A serving head asks for a new root: a checkpoint, another set, or both.
    pub fn swap(&self, state: &mut State, head: usize, set: u8, checkpoint: bool) -> Option<()> {
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
    pub fn release(&self, state: &mut State, head: usize) -> Option<()> {
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
}

/// The head knows that its pending root is, or was, the newest.
pub fn swapped(head: &mut Head) {
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
