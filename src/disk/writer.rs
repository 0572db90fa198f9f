//! The open end of a shard: appends under way, durable length, checksums not yet written.

use std::cell::RefCell;
use std::collections::BTreeMap;

use tokio::sync::{Notify, oneshot};

use crate::shard::{ShardError, ShardResult, ShardState};

/// State of an open shard's end. Outlives the shard's slot entry, so that an append which is
/// still running when the shard is closed or deleted has a place to report to.
///
/// Invariants: `durable <= next`; `crcs.len() == next`; an append is answered with success only
/// once all before it are durable, and with an error once one before it failed.
#[derive(Debug, Default)]
pub(super) struct Writer {
    state: RefCell<WriterState>,
    reaped: Notify,
}

#[derive(Debug, Default)]
struct WriterState {
    next: u32,
    durable: u32,
    /// Why no append is taken any more.
    failed: Option<String>,
    /// A seal has fixed the length.
    sealing: bool,
    crcs: Vec<u32>,
    /// Appends not yet part of the durable prefix, by their first block.
    pending: BTreeMap<u32, Pending>,
    in_flight: u32,
}

#[derive(Debug)]
struct Pending {
    end: u32,
    done: bool,
    reply: Option<oneshot::Sender<ShardResult<()>>>,
}

impl Writer {
    /// Takes up an append of blocks with these CRCs at `block`; the answer comes through the
    /// receiver after [`Writer::complete`] was called for it and all before it.
    pub(super) fn begin(
        &self,
        block: u32,
        crcs: &[u32],
        slot_blocks: u32,
    ) -> ShardResult<oneshot::Receiver<ShardResult<()>>> {
        let mut state = self.state.borrow_mut();
        if state.sealing {
            return Err(ShardError::WrongState(ShardState::Sealed));
        }
        if let Some(reason) = &state.failed {
            return Err(ShardError::Io(format!("an earlier append failed: {reason}")));
        }
        let count = u32::try_from(crcs.len()).unwrap_or(u32::MAX);
        let end = block.checked_add(count).filter(|end| *end <= slot_blocks);
        let Some(end) = end.filter(|_| block == state.next) else {
            return Err(ShardError::WrongLength(state.next));
        };
        let (reply, answer) = oneshot::channel();
        state.pending.insert(block, Pending { end, done: false, reply: Some(reply) });
        state.crcs.extend_from_slice(crcs);
        state.next = end;
        state.in_flight += 1;
        Ok(answer)
    }

    /// Reports the end of the device write of the append that began at `block`.
    pub(super) fn complete(&self, block: u32, result: Result<(), String>) {
        let mut answers = Vec::new();
        {
            let mut state = self.state.borrow_mut();
            state.in_flight -= 1;
            match result {
                Ok(()) => {
                    if let Some(pending) = state.pending.get_mut(&block) {
                        pending.done = true;
                    }
                    state.advance(&mut answers);
                }
                Err(reason) => state.fail_from(block, &reason, &mut answers),
            }
            if state.in_flight == 0 {
                self.reaped.notify_waiters();
            }
        }
        for (reply, answer) in answers {
            // Nobody waits for it if the request was dropped.
            drop(reply.send(answer));
        }
    }

    /// Waits until no append is running.
    pub(super) async fn wait_reaped(&self) {
        loop {
            let reaped = self.reaped.notified();
            if self.state.borrow().in_flight == 0 {
                return;
            }
            reaped.await;
        }
    }

    /// Blocks that were appended durably.
    pub(super) fn durable(&self) -> u32 {
        self.state.borrow().durable
    }

    /// Fixes the length for a seal at `blocks` and gives the checksums up to there.
    pub(super) fn begin_seal(&self, blocks: u32) -> ShardResult<Vec<u32>> {
        let mut state = self.state.borrow_mut();
        if blocks > state.durable {
            return Err(ShardError::WrongLength(state.durable));
        }
        state.sealing = true;
        Ok(state.crcs[..blocks as usize].to_vec())
    }

    /// Checksums of durable blocks; none if the range goes beyond the durable length.
    pub(super) fn crcs(&self, block: u32, count: u32) -> Option<Vec<u32>> {
        let state = self.state.borrow();
        let end = block.checked_add(count).filter(|end| *end <= state.durable)?;
        Some(state.crcs[block as usize..end as usize].to_vec())
    }

    /// Frees the checksums of a shard that was closed: nobody will seal it with them.
    pub(super) fn forget_crcs(&self) {
        self.state.borrow_mut().crcs = Vec::new();
    }

    /// What is wrong with the invariants, for an open shard.
    pub(super) fn check(&self, slot_blocks: u32) -> Result<(), String> {
        let state = self.state.borrow();
        if state.durable > state.next || state.next > slot_blocks {
            return Err(format!("lengths {} > {} of {slot_blocks}", state.durable, state.next));
        }
        if state.crcs.len() != state.next as usize {
            return Err(format!("{} checksums of {} blocks", state.crcs.len(), state.next));
        }
        if (state.in_flight as usize) < state.pending.values().filter(|p| !p.done).count() {
            return Err("pending appends that nobody runs".into());
        }
        Ok(())
    }
}

type Answers = Vec<(oneshot::Sender<ShardResult<()>>, ShardResult<()>)>;

impl WriterState {
    fn advance(&mut self, answers: &mut Answers) {
        while let Some(first) = self.pending.first_entry() {
            if !first.get().done {
                break;
            }
            let pending = first.remove();
            self.durable = pending.end;
            answers.extend(pending.reply.map(|reply| (reply, Ok(()))));
        }
    }

    /// Fails the append at `block` and every later one; earlier ones go on.
    fn fail_from(&mut self, block: u32, reason: &str, answers: &mut Answers) {
        self.failed.get_or_insert_with(|| reason.to_owned());
        for (_, pending) in self.pending.split_off(&block) {
            let error = ShardError::Io(reason.to_owned());
            answers.extend(pending.reply.map(|reply| (reply, Err(error))));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_order_of_the_appends() {
        let writer = Writer::default();
        let mut first = writer.begin(0, &[1, 2], 16).expect("taken");
        let mut second = writer.begin(2, &[3], 16).expect("taken");
        assert_eq!(writer.begin(2, &[4], 16).err(), Some(ShardError::WrongLength(3)));
        writer.complete(2, Ok(()));
        assert!(second.try_recv().is_err(), "the first is not durable yet");
        assert_eq!((writer.durable(), writer.crcs(0, 1)), (0, None));
        writer.complete(0, Ok(()));
        assert_eq!((first.try_recv(), second.try_recv()), (Ok(Ok(())), Ok(Ok(()))));
        assert_eq!((writer.durable(), writer.crcs(1, 2)), (3, Some(vec![2, 3])));
        assert_eq!(writer.begin(3, &[0; 14], 16).err(), Some(ShardError::WrongLength(3)));
        writer.check(16).expect("invariants");
    }

    #[test]
    fn a_failure_fails_all_later_ones_and_no_earlier_one() {
        let writer = Writer::default();
        let mut answers: Vec<_> =
            (0..4).map(|n| writer.begin(n, &[n], 16).expect("taken")).collect();
        writer.complete(3, Ok(()));
        writer.complete(1, Err("broken".into()));
        assert!(matches!(answers[3].try_recv(), Ok(Err(ShardError::Io(_)))));
        assert!(matches!(answers[1].try_recv(), Ok(Err(ShardError::Io(_)))));
        writer.complete(2, Ok(()));
        assert!(matches!(answers[2].try_recv(), Ok(Err(ShardError::Io(_)))));
        assert!(answers[0].try_recv().is_err());
        writer.complete(0, Ok(()));
        assert_eq!(answers[0].try_recv(), Ok(Ok(())));
        assert!(matches!(writer.begin(4, &[4], 16), Err(ShardError::Io(_))));
        assert_eq!(writer.durable(), 1);
        assert_eq!(writer.begin_seal(2), Err(ShardError::WrongLength(1)));
        assert_eq!(writer.begin_seal(1), Ok(vec![0]));
        assert_eq!(
            writer.begin(4, &[4], 16).err(),
            Some(ShardError::WrongState(ShardState::Sealed))
        );
    }
}
