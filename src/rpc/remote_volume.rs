//! A volume whose head runs on another node, as an export sees it.
//!
//! # What may be relied on
//!
//! A change (a write, a zero) whose connection broke, whose deadline passed, or whose future was
//! dropped, has an *unknown outcome*: it may be done, it may never be done, and **it may still be
//! done later**, by a head that runs on and has it in hand. Whoever repeats it, or writes there
//! anew, must not have the old copy land on what it was told since is done. This module sees to
//! that for as long as one head serves:
//!
//! - Each change carries the epoch of the head that it is meant for, and another head refuses it.
//!   So no copy reaches a newer head.
//! - Each change carries a *turn* that the server gave to this core of this node for the volume.
//!   After an unknown outcome, no further change is sent before the server has given a new turn. It
//!   gives it when every change of an earlier turn that it had begun is over; what it had not
//!   begun, it refuses from then on, and what an earlier connection still holds, it will never read
//!   ([`crate::rpc`]: the connection before is cut).
//! - So a change that is made after another one of this process was answered, or had its outcome
//!   called unknown, or was given up, is also done after it. `server/volumes.rs` is the other half.
//!
//! What is done twice is done twice with the same content and without another change of that
//! process between that was made later, but one that was made while it was under way: overlapping
//! changes under way at once are done in any order, and what is read there may go back and forth
//! until the last of them is answered.
//!
//! It says nothing of changes that *other nodes* sent for the same client: who moves a client to
//! another export must end its requests at the first, as with any multipath.
//!
//! Knows a [`Peer`] and a volume's id; knows not who else might serve the volume: that is
//! `forward.rs`.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::sync::Mutex;

use super::client::Peer;
use super::message::{Answer, Payload};
use super::planted::{self, Bug};
use super::request::Asked;
use super::volume::{EXTENTS_MAX, VolumeAnswer, VolumeCall, VolumeError, VolumeState};
use super::window::Share;
use crate::export::{BlockTarget, LocalFuture, MapExtent, TargetError};
use crate::id::{BLOCK_BYTES, Epoch, VolumeId};
use crate::limits::RPC_VOLUME_PIECE_BYTES;
use crate::shard::ShardError;

/// How often a change is sent anew that came too late for its turn.
const LATE_MAX: usize = 100;

/// What all requests of this process to one volume behind one [`Peer`] share.
struct Attachment {
    volume: VolumeId,
    share: Rc<Share>,
    /// Of the last answer to an attach; zero before.
    epoch: Cell<Epoch>,
    turn: Cell<u64>,
    /// A change of the present turn may still be done, and nobody knows.
    unsure: Cell<bool>,
    state: Cell<VolumeState>,
    /// One attach at a time.
    attaching: Mutex<()>,
}

/// The volumes that are attached behind one [`Peer`].
#[derive(Default)]
pub(super) struct Attachments(RefCell<BTreeMap<VolumeId, Weak<Attachment>>>);

impl Attachments {
    fn of(&self, volume: VolumeId) -> Rc<Attachment> {
        let mut all = self.0.borrow_mut();
        if let Some(attachment) = all.get(&volume).and_then(Weak::upgrade) {
            return attachment;
        }
        all.retain(|_, attachment| attachment.strong_count() > 0);
        let attachment = Rc::new(Attachment {
            volume,
            share: Rc::default(),
            epoch: Cell::default(),
            turn: Cell::new(0),
            unsure: Cell::new(false),
            state: Cell::new(VolumeState { size_bytes: 0, read_only: true }),
            attaching: Mutex::new(()),
        });
        all.insert(volume, Rc::downgrade(&attachment));
        attachment
    }
}

/// Why a request has no good answer.
enum Failure {
    /// It was answered so, by the head or for it.
    Target(TargetError),
    /// Its turn is over: it was not begun.
    Late,
    /// Its outcome is unknown.
    Lost,
}

impl From<Failure> for TargetError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Target(error) => error,
            Failure::Late | Failure::Lost => Self::Stopped,
        }
    }
}

/// A change from when it is made until its outcome is known.
struct Made<'a> {
    attachment: &'a Attachment,
    turn: u64,
    known: bool,
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        if !self.known && self.attachment.turn.get() == self.turn {
            self.attachment.unsure.set(true);
        }
    }
}

/// One head behind a connection. [`TargetError::Stopped`] is the answer where it does not run any more, and
/// where the outcome is unknown: see the module's documentation for what is safe then.
pub struct RemoteVolume {
    peer: Peer,
    attachment: Rc<Attachment>,
    epoch: Epoch,
}

impl RemoteVolume {
    /// The head of `volume` that runs on the core behind `peer` now.
    ///
    /// # Errors
    /// [`TargetError::Stopped`] if there is none, or no answer; [`TargetError::Io`] with what the node said.
    pub async fn attach(peer: &Peer, volume: VolumeId) -> Result<Self, TargetError> {
        let attachment = peer.attachments().of(volume);
        let mut remote = Self { peer: peer.clone(), attachment, epoch: Epoch::default() };
        let one = remote.attachment.attaching.lock().await;
        remote.renew().await?;
        drop(one);
        remote.epoch = remote.attachment.epoch.get();
        Ok(remote)
    }

    /// The epoch of the head.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Asks which head there is; for a new turn if the present one is unsure. Only one may ask at a time.
    async fn renew(&self) -> Result<(), TargetError> {
        let Attachment { epoch, turn, unsure, .. } = &*self.attachment;
        let held = if unsure.get() { 0 } else { turn.get() };
        match self.request(VolumeCall::Attach { turn: held }, Payload::Empty).await? {
            VolumeAnswer::Attached { epoch: now, turn: given } => {
                if now < epoch.get() {
                    tracing::warn!(peer = self.peer.label(), %now, "a node serves an older head");
                    return Err(TargetError::Stopped);
                }
                epoch.set(now);
                if turn.replace(given) != given {
                    // Whatever was made before is over, or void.
                    unsure.set(false);
                }
                Ok(())
            }
            _ => Err(TargetError::Stopped),
        }
    }

    /// The turn in which a change may be made now.
    async fn turn(&self) -> Result<u64, TargetError> {
        let attachment = &*self.attachment;
        while attachment.unsure.get() && !planted::is(Bug::RepeatAtOnce) {
            let _one = attachment.attaching.lock().await;
            if attachment.unsure.get() {
                self.renew().await?;
            }
        }
        if attachment.epoch.get() == self.epoch {
            Ok(attachment.turn.get())
        } else {
            Err(TargetError::Stopped)
        }
    }

    async fn request(&self, call: VolumeCall, payload: Payload) -> Result<VolumeAnswer, Failure> {
        let Attachment { volume, share, state, epoch, .. } = &*self.attachment;
        let config = self.peer.config();
        let (patience, attach) = match call {
            VolumeCall::Attach { .. } => (config.deadline, true),
            // The head knows better how long it may take; a silent node is noticed anyway.
            _ => (config.long_deadline, false),
        };
        let answer = match self.peer.request(Asked::Volume(*volume, call), share, payload, patience)
        {
            Ok(request) => request.await,
            Err(error) => Err(error),
        };
        match answer {
            Ok(Answer::Volume(Ok((told, answer)))) => {
                if attach || epoch.get() == self.epoch {
                    state.set(told);
                }
                Ok(answer)
            }
            Ok(Answer::Volume(Err(VolumeError::Late))) => Err(Failure::Late),
            Ok(Answer::Volume(Err(VolumeError::Target(error, reason)))) => {
                if error == TargetError::Stopped {
                    tracing::debug!(peer = self.peer.label(), %volume, reason, "no head there");
                }
                Err(Failure::Target(error))
            }
            Err(ShardError::Offline(reason)) => {
                tracing::debug!(peer = self.peer.label(), %volume, reason, "not served there");
                Err(Failure::Target(TargetError::Stopped))
            }
            // Replies are decoded by what was asked, so it is of another kind never.
            Err(ShardError::Unreachable) | Ok(_) => Err(Failure::Lost),
            Err(error) => Err(Failure::Target(TargetError::Io(error.to_string()))),
        }
    }

    async fn change(
        &self,
        call: impl Fn(Epoch, u64) -> VolumeCall,
        payload: Payload,
    ) -> Result<(), TargetError> {
        for _ in 0..LATE_MAX {
            let attachment = &*self.attachment;
            let turn = self.turn().await?;
            let mut made = Made { attachment, turn, known: false };
            let answer = self.request(call(self.epoch, turn), payload.clone()).await;
            made.known = !matches!(answer, Err(Failure::Lost));
            drop(made);
            match answer {
                Ok(_) => return Ok(()),
                Err(Failure::Late) if attachment.turn.get() == turn => attachment.unsure.set(true),
                Err(Failure::Late) => {}
                Err(failure) => return Err(failure.into()),
            }
        }
        Err(TargetError::Io("a change always came too late for its turn".into()))
    }

    /// The parts that a range is asked for in. A range of several must lie within the volume, so that not some
    /// of it is changed and the rest refused.
    async fn parts(&self, offset: u64, len: usize) -> Result<Vec<(u64, usize)>, TargetError> {
        let end = offset.checked_add(len as u64).ok_or(TargetError::OutOfRange)?;
        let parts = parts(offset, len);
        if parts.len() > 1 && end > self.size() {
            let _one = self.attachment.attaching.lock().await;
            self.renew().await?;
            if end > self.size() {
                return Err(TargetError::OutOfRange);
            }
        }
        Ok(parts)
    }

    async fn read_part(&self, offset: u64, len: usize) -> Result<Vec<Bytes>, TargetError> {
        let len = u32::try_from(len).map_err(|_| TargetError::OutOfRange)?;
        let call = VolumeCall::Read { epoch: self.epoch, offset, len };
        match self.request(call, Payload::Empty).await? {
            VolumeAnswer::Read(pieces) => Ok(pieces),
            _ => Err(TargetError::Stopped),
        }
    }

    async fn write_part(&self, offset: u64, data: Bytes) -> Result<(), TargetError> {
        let call = |epoch, turn| VolumeCall::Write { epoch, turn, offset };
        self.change(call, Payload::One(data)).await
    }
}

/// A range in parts that are small enough for a request, cut between blocks.
fn parts(offset: u64, len: usize) -> Vec<(u64, usize)> {
    let into = usize::try_from(offset % BLOCK_BYTES).unwrap_or(0);
    let mut parts = Vec::with_capacity(1);
    let (mut at, mut left) = (offset, len);
    let mut most = RPC_VOLUME_PIECE_BYTES - into;
    while left > most {
        parts.push((at, most));
        at += most as u64;
        left -= most;
        most = RPC_VOLUME_PIECE_BYTES;
    }
    parts.push((at, left));
    parts
}

impl BlockTarget for RemoteVolume {
    fn size(&self) -> u64 {
        self.attachment.state.get().size_bytes
    }

    fn read_only(&self) -> bool {
        self.attachment.state.get().read_only
    }

    fn read(&self, offset: u64, len: usize) -> LocalFuture<'_, Result<Vec<Bytes>, TargetError>> {
        Box::pin(async move {
            let parts = self.parts(offset, len).await?;
            if let [(offset, len)] = parts[..] {
                return self.read_part(offset, len).await;
            }
            let reads = parts.into_iter().map(|(offset, len)| self.read_part(offset, len));
            let read: Result<Vec<_>, _> = join_all(reads).await.into_iter().collect();
            Ok(read?.concat())
        })
    }

    fn write(&self, offset: u64, data: Bytes) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(async move {
            let parts = self.parts(offset, data.len()).await?;
            if parts.len() == 1 {
                return self.write_part(offset, data).await;
            }
            let mut rest = data;
            let writes: Vec<_> = parts
                .into_iter()
                .map(|(offset, len)| self.write_part(offset, rest.split_to(len)))
                .collect();
            join_all(writes).await.into_iter().collect()
        })
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> LocalFuture<'_, Result<(), TargetError>> {
        let call = move |epoch, turn| VolumeCall::Zero { epoch, turn, offset, len, unmap };
        Box::pin(self.change(call, Payload::Empty))
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(async move {
            self.request(VolumeCall::Flush { epoch: self.epoch }, Payload::Empty).await?;
            Ok(())
        })
    }

    fn map(
        &self,
        offset: u64,
        len: u64,
        max: usize,
    ) -> LocalFuture<'_, Result<Vec<MapExtent>, TargetError>> {
        Box::pin(async move {
            let max = u32::try_from(max).unwrap_or(u32::MAX).min(EXTENTS_MAX);
            let call = VolumeCall::Map { epoch: self.epoch, offset, len, max };
            match self.request(call, Payload::Empty).await? {
                VolumeAnswer::Map(extents) => Ok(extents),
                _ => Err(TargetError::Stopped),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_between_blocks() {
        const MOST: usize = RPC_VOLUME_PIECE_BYTES;
        assert_eq!(parts(512, 0), [(512, 0)]);
        assert_eq!(parts(512, 4096), [(512, 4096)], "across blocks, and still one request");
        assert_eq!(parts(0, MOST), [(0, MOST)]);
        let most = MOST as u64;
        assert_eq!(parts(512, MOST), [(512, MOST - 512), (most, 512)]);
        let long = parts(4096 * 3 + 100, 32 << 20);
        assert_eq!(long.iter().map(|(_, len)| len).sum::<usize>(), 32 << 20);
        for ((at, len), (next, _)) in long.iter().zip(&long[1..]) {
            assert_eq!((at + *len as u64, next % BLOCK_BYTES), (*next, 0));
        }
    }
}
