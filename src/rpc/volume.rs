//! Requests to a volume whose head runs on another node, and what is answered: the fields of
//! control parts, each written and read in one place, as `message.rs` does it for disks.
//!
//! Knows [`BlockTarget`] and the numbers that requests carry so that none is done too late: the
//! epoch of the head that it is meant for, and its *turn* (see [`super::remote_volume`]). Whether
//! they are the right ones is judged by the server.

use std::rc::Rc;

use bytes::Bytes;

use super::fields::{Get, Put};
use super::frame::{Opcode, Violation};
use super::message::{Payload, TEXT_BYTES_MAX};
use crate::export::{BlockTarget, MapExtent, TargetError};
use crate::id::Epoch;
use crate::limits::RPC_MESSAGE_BYTES_MAX;

/// Extents of one answer, at most.
pub const EXTENTS_MAX: u32 = 4096;
/// Bytes of an extent in an answer.
const EXTENT_BYTES: usize = 9;

/// How a request to a volume failed: the variants of [`TargetError`], and one of the server's own.
/// Other numbers are those of [`super::message::status`], which say that it was not begun.
pub mod status {
    #![allow(missing_docs, reason = "named after the variants of TargetError")]
    pub const OUT_OF_RANGE: u16 = 32;
    pub const NO_SPACE: u16 = 33;
    pub const READ_ONLY: u16 = 34;
    pub const IO: u16 = 35;
    pub const STOPPED: u16 = 36;
    /// A change of a turn that is over: it was not begun and never will be.
    pub const LATE: u16 = 37;
}

/// What is asked of a volume, without its payload: the arguments of a method of [`BlockTarget`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "named after the methods of BlockTarget and their arguments")]
pub enum VolumeCall {
    /// Which head there is. With a `turn` that is not the present one (zero never is), the answer is a
    /// new turn and comes when every change of an earlier one is over.
    Attach {
        turn: u64,
    },
    Read {
        epoch: Epoch,
        offset: u64,
        len: u32,
    },
    /// The data are the payload.
    Write {
        epoch: Epoch,
        turn: u64,
        offset: u64,
    },
    Zero {
        epoch: Epoch,
        turn: u64,
        offset: u64,
        len: u64,
        unmap: bool,
    },
    Flush {
        epoch: Epoch,
    },
    Map {
        epoch: Epoch,
        offset: u64,
        len: u64,
        max: u32,
    },
}

impl VolumeCall {
    /// Its number.
    pub fn opcode(&self) -> Opcode {
        match self {
            Self::Attach { .. } => Opcode::Attach,
            Self::Read { .. } => Opcode::VolumeRead,
            Self::Write { .. } => Opcode::VolumeWrite,
            Self::Zero { .. } => Opcode::VolumeZero,
            Self::Flush { .. } => Opcode::VolumeFlush,
            Self::Map { .. } => Opcode::VolumeMap,
        }
    }

    /// Whether it changes the volume.
    pub fn changes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. })
    }

    /// Bytes that it reads; none if it does not.
    pub fn reads(&self) -> Option<u32> {
        if let Self::Read { len, .. } = self { Some(*len) } else { None }
    }

    /// Whether a reply to it would be longer than a message may be.
    pub fn reads_too_much(&self) -> bool {
        self.reads().is_some_and(|len| len as usize > RPC_MESSAGE_BYTES_MAX)
    }

    /// Bytes of payload to expect of its reply, for the window.
    pub fn reply_bytes(&self) -> usize {
        match self {
            Self::Map { max, .. } => (*max).min(EXTENTS_MAX) as usize * EXTENT_BYTES + 4,
            _ => self.reads().map_or(0, |len| len as usize),
        }
    }

    /// Appends the fields behind the target's id.
    pub(super) fn put(&self, put: &mut Put<'_>) {
        match *self {
            Self::Attach { turn } => put.u64(turn),
            Self::Read { epoch, offset, len } => put.u64(epoch.0).u64(offset).u32(len),
            Self::Write { epoch, turn, offset } => put.u64(epoch.0).u64(turn).u64(offset),
            Self::Zero { epoch, turn, offset, len, unmap } => {
                put.u64(epoch.0).u64(turn).u64(offset).u64(len).u8(u8::from(unmap))
            }
            Self::Flush { epoch } => put.u64(epoch.0),
            Self::Map { epoch, offset, len, max } => put.u64(epoch.0).u64(offset).u64(len).u32(max),
        };
    }

    /// The request of a number that is for volumes.
    pub(super) fn get(opcode: Opcode, get: &mut Get<'_>) -> Result<Self, Violation> {
        if opcode == Opcode::Attach {
            return Ok(Self::Attach { turn: get.u64()? });
        }
        let epoch = Epoch(get.u64()?);
        Ok(match opcode {
            Opcode::VolumeRead => Self::Read { epoch, offset: get.u64()?, len: get.u32()? },
            Opcode::VolumeWrite => Self::Write { epoch, turn: get.u64()?, offset: get.u64()? },
            Opcode::VolumeZero => {
                let (turn, offset, len) = (get.u64()?, get.u64()?, get.u64()?);
                Self::Zero { epoch, turn, offset, len, unmap: get.flag()? }
            }
            Opcode::VolumeFlush => Self::Flush { epoch },
            Opcode::VolumeMap => {
                Self::Map { epoch, offset: get.u64()?, len: get.u64()?, max: get.u32()? }
            }
            _ => return Err(get.malformed()),
        })
    }

    /// Asks `target`, with what was received as payload. An [`VolumeCall::Attach`] asks it nothing.
    ///
    /// # Errors
    /// Those of the methods of [`BlockTarget`].
    pub async fn run(
        self,
        target: &dyn BlockTarget,
        payload: Bytes,
    ) -> Result<VolumeAnswer, TargetError> {
        Ok(match self {
            Self::Attach { .. } => VolumeAnswer::Done,
            Self::Read { offset, len, .. } => {
                let pieces = target.read(offset, len as usize).await?;
                let read: usize = pieces.iter().map(Bytes::len).sum();
                if read != len as usize {
                    let text = format!("a read of {len} bytes at {offset} gave {read}");
                    return Err(TargetError::Io(text));
                }
                VolumeAnswer::Read(pieces)
            }
            Self::Write { offset, .. } => {
                target.write(offset, payload).await?;
                VolumeAnswer::Done
            }
            Self::Zero { offset, len, unmap, .. } => {
                target.zero(offset, len, unmap).await?;
                VolumeAnswer::Done
            }
            Self::Flush { .. } => {
                target.flush().await?;
                VolumeAnswer::Done
            }
            Self::Map { offset, len, max, .. } => {
                let max = max.min(EXTENTS_MAX) as usize;
                let mut extents = target.map(offset, len, max).await?;
                extents.truncate(max);
                VolumeAnswer::Map(extents)
            }
        })
    }
}

/// How a volume is, told with each answer: so a change of its size is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VolumeState {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

impl VolumeState {
    /// How `target` is now.
    pub fn of(target: &dyn BlockTarget) -> Self {
        Self { size_bytes: target.size(), read_only: target.read_only() }
    }
}

/// What a volume answers. Which of these is fixed by the [`Opcode`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeAnswer {
    /// It is done.
    Done,
    /// The head that there is, and the turn of changes from now on.
    Attached {
        /// Its epoch.
        epoch: Epoch,
        /// Not zero; never given twice by a server.
        turn: u64,
    },
    /// The data, in pieces.
    Read(Vec<Bytes>),
    /// Which parts have storage.
    Map(Vec<MapExtent>),
}

/// Why a request to a volume failed where the head would run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    /// What the head said, or that there is none: the text says why then.
    #[error("{0}: {1}")]
    Target(TargetError, String),
    /// The turn of this change is over: it was not begun.
    #[error("a change of a turn that is over")]
    Late,
}

impl From<TargetError> for VolumeError {
    fn from(error: TargetError) -> Self {
        let text = match &error {
            TargetError::Io(reason) => reason.clone(),
            other => other.to_string(),
        };
        Self::Target(error, text)
    }
}

/// What comes of a request to a volume.
pub type VolumeResult = Result<(VolumeState, VolumeAnswer), VolumeError>;

/// Appends the control part of a reply; gives status and payload.
pub(super) fn put_result(put: &mut Put<'_>, result: VolumeResult) -> (u16, Payload) {
    let (state, answer) = match result {
        Ok(answered) => answered,
        Err(error) => return (put_error(put, &error), Payload::Empty),
    };
    put.u64(state.size_bytes).u8(u8::from(state.read_only));
    let payload = match answer {
        VolumeAnswer::Done => Payload::Empty,
        VolumeAnswer::Attached { epoch, turn } => {
            put.u64(epoch.0).u64(turn);
            Payload::Empty
        }
        VolumeAnswer::Read(pieces) => Payload::Pieces(Rc::from(pieces)),
        VolumeAnswer::Map(extents) => {
            let mut bytes = Vec::with_capacity(4 + extents.len() * EXTENT_BYTES);
            let mut put = Put(&mut bytes);
            put.count(extents.len());
            for MapExtent { len, allocated } in extents {
                put.u64(len).u8(u8::from(allocated));
            }
            Payload::One(bytes.into())
        }
    };
    (super::message::status::OK, payload)
}

/// A reply whose payload is still to come.
#[derive(Debug)]
pub(super) struct VolumeHead {
    state: VolumeState,
    content: Content,
}

#[derive(Debug)]
enum Content {
    None(VolumeAnswer),
    Read,
    Map,
}

impl VolumeHead {
    /// The good reply to a request of `opcode` that reads `bytes`.
    pub(super) fn get(
        opcode: Opcode,
        bytes: u32,
        get: &mut Get<'_>,
        payload_bytes: usize,
    ) -> Result<Self, Violation> {
        let state = VolumeState { size_bytes: get.u64()?, read_only: get.flag()? };
        let (content, fits) = match opcode {
            Opcode::VolumeRead => (Content::Read, payload_bytes == bytes as usize),
            // An empty one is no list, which is found out where it is read.
            Opcode::VolumeMap => (Content::Map, true),
            Opcode::Attach => {
                let answer = VolumeAnswer::Attached { epoch: Epoch(get.u64()?), turn: get.u64()? };
                (Content::None(answer), payload_bytes == 0)
            }
            _ => (Content::None(VolumeAnswer::Done), payload_bytes == 0),
        };
        get.end()?;
        if !fits {
            return Err(Violation::Incoherent("the payload of a reply is not what was asked for"));
        }
        Ok(Self { state, content })
    }

    /// The answer, once the payload is there.
    pub(super) fn finish(self, payload: Bytes) -> Result<VolumeResult, Violation> {
        let answer = match self.content {
            Content::None(answer) => answer,
            Content::Read => VolumeAnswer::Read(vec![payload]),
            Content::Map => {
                let mut get = Get::new(&payload, "list");
                let mut extents = Vec::new();
                for _ in 0..get.count(EXTENT_BYTES)? {
                    extents.push(MapExtent { len: get.u64()?, allocated: get.flag()? });
                }
                get.end()?;
                VolumeAnswer::Map(extents)
            }
        };
        Ok(Ok((self.state, answer)))
    }
}

fn put_error(put: &mut Put<'_>, error: &VolumeError) -> u16 {
    let VolumeError::Target(error, text) = error else { return status::LATE };
    put.raw(&text.as_bytes()[..text.floor_char_boundary(TEXT_BYTES_MAX)]);
    match error {
        TargetError::OutOfRange => status::OUT_OF_RANGE,
        TargetError::NoSpace => status::NO_SPACE,
        TargetError::ReadOnly => status::READ_ONLY,
        TargetError::Io(_) => status::IO,
        TargetError::Stopped => status::STOPPED,
    }
}

/// The error of a number that is one of a volume; none if it is another.
pub(super) fn get_error(get: &mut Get<'_>, number: u16) -> Option<VolumeError> {
    let error = match number {
        status::OUT_OF_RANGE => TargetError::OutOfRange,
        status::NO_SPACE => TargetError::NoSpace,
        status::READ_ONLY => TargetError::ReadOnly,
        status::IO => {
            let text = get.rest_text();
            return Some(VolumeError::Target(TargetError::Io(text.clone()), text));
        }
        status::STOPPED => TargetError::Stopped,
        status::LATE => return Some(VolumeError::Late),
        _ => return None,
    };
    Some(VolumeError::Target(error, get.rest_text()))
}
