//! A request to whatever it is sent to: a disk, a volume, or the node.

use bytes::Bytes;

use super::fields::{Get, Put};
use super::frame::{Audience, Opcode, Violation};
use super::message::{Call, Expected};
use super::volume::VolumeCall;
use crate::id::{BLOCK_SIZE, DiskId, VolumeId};
use crate::limits::{RPC_ASK_BYTES_MAX, RPC_MESSAGE_BYTES_MAX};

/// Bytes that the answer to a question counts in a window. Most are far shorter, some are longer.
const ANSWER_BYTES: usize = 1 << 20;

/// A request without its payload, as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// To a disk.
    Disk(DiskId, Call),
    /// To a volume.
    Volume(VolumeId, VolumeCall),
    /// To the node: the question is the payload.
    Ask,
}

/// A request without its payload, as it is made.
#[derive(Debug, Clone, Copy)]
pub enum Asked<'a> {
    /// To a disk.
    Disk(DiskId, &'a Call),
    /// To a volume.
    Volume(VolumeId, VolumeCall),
    /// To the node.
    Ask,
}

impl Request {
    /// The request in a control part.
    pub fn decode(opcode: Opcode, control: &[u8]) -> Result<Self, Violation> {
        match opcode.audience() {
            Audience::Disk => {
                Call::decode(opcode, control).map(|(disk, call)| Self::Disk(disk, call))
            }
            Audience::Volume => {
                let mut get = Get::new(control, "request");
                let volume = VolumeId::from_bytes(get.array()?);
                let call = VolumeCall::get(opcode, &mut get)?;
                get.end()?;
                Ok(Self::Volume(volume, call))
            }
            Audience::Node => {
                let mut get = Get::new(control, "request");
                if get.array()? != [0; 16] {
                    return Err(get.malformed());
                }
                get.end()?;
                Ok(Self::Ask)
            }
        }
    }

    /// The same, as it was made.
    pub fn asked(&self) -> Asked<'_> {
        match self {
            Self::Disk(disk, call) => Asked::Disk(*disk, call),
            Self::Volume(volume, call) => Asked::Volume(*volume, *call),
            Self::Ask => Asked::Ask,
        }
    }
}

impl Asked<'_> {
    /// Its number.
    pub fn opcode(self) -> Opcode {
        match self {
            Self::Disk(_, call) => call.opcode(),
            Self::Volume(_, call) => call.opcode(),
            Self::Ask => Opcode::Ask,
        }
    }

    /// Appends the control part.
    pub fn encode(self, out: &mut Vec<u8>) {
        match self {
            Self::Disk(disk, call) => call.encode(disk, out),
            Self::Volume(volume, call) => {
                let mut put = Put(out);
                put.raw(&volume.to_bytes());
                call.put(&mut put);
            }
            Self::Ask => out.extend([0; 16]),
        }
    }

    /// What the reply must look like.
    pub fn expected(self) -> Expected {
        let (blocks, bytes) = match self {
            Self::Disk(_, call) => (call.reads().unwrap_or(0), 0),
            Self::Volume(_, call) => (0, call.reads().unwrap_or(0)),
            Self::Ask => (0, 0),
        };
        Expected { opcode: self.opcode(), blocks, bytes }
    }

    /// Nothing is lost if it is never sent once nobody waits for it.
    pub fn droppable(self) -> bool {
        match self {
            Self::Disk(_, call) => call.reads().is_some(),
            Self::Volume(_, call) => !call.changes(),
            Self::Ask => false,
        }
    }

    /// Bytes of payload to expect of its reply, for the window.
    pub fn reply_bytes(self) -> usize {
        match self {
            Self::Disk(_, call) => call.reply_bytes(),
            Self::Volume(_, call) => call.reply_bytes(),
            Self::Ask => ANSWER_BYTES,
        }
    }

    /// Whether it, with so many bytes of payload, or a reply to it is longer than a message may be.
    pub fn is_too_long(self, payload: usize) -> bool {
        payload > RPC_MESSAGE_BYTES_MAX
            || match self {
                Self::Disk(_, call) => call.reads_too_much(),
                Self::Volume(_, call) => call.reads_too_much(),
                Self::Ask => payload > RPC_ASK_BYTES_MAX,
            }
    }

    /// Bytes of variable fields in the control part that are not a checksum for each block.
    pub(super) fn fields_bytes(self) -> usize {
        match self {
            Self::Disk(_, Call::Append { crcs, .. })
                if crcs.len() > RPC_MESSAGE_BYTES_MAX / BLOCK_SIZE =>
            {
                usize::MAX
            }
            Self::Disk(_, Call::Create { spec, .. }) => spec.members.len() * 16,
            Self::Disk(
                _,
                Call::Mirror { mirror, .. } | Call::Fence { mirror: Some(mirror), .. },
            ) => mirror.data.len(),
            _ => 0,
        }
    }

    /// Whether its payload must travel with checksums of its own: nobody else compares any.
    pub fn is_bare(self) -> bool {
        !matches!(self, Self::Disk(_, Call::Append { .. } | Call::Mend { .. }))
    }
}

/// Whether a frame of a message that nobody else checks breaks the protocol: it has payload without
/// a checksum.
pub(super) fn unchecked(opcode: Opcode, payload: u32, has_crc: bool) -> Result<(), Violation> {
    if payload > 0 && !has_crc && opcode.audience() != Audience::Disk {
        return Err(Violation::Incoherent("data of a volume without a checksum"));
    }
    Ok(())
}

/// What a node answers to a question.
pub type AskResult = Result<Bytes, String>;
