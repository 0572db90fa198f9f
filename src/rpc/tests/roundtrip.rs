//! Everything that is written is read as it was; what is cut off or changed is refused.

use std::rc::Rc;

use bytes::Bytes;
use proptest::prelude::*;

use crate::env::Env;
use crate::export::{MapExtent, TargetError};
use crate::id::{DiskId, Epoch, HeadId, SegmentId, VolumeId};
use crate::rpc::frame::{Audience, Opcode};
use crate::rpc::message::{Answer, Call, Expected, Reply, ReplyHead};
use crate::rpc::request::Request;
use crate::rpc::volume::{VolumeAnswer, VolumeCall, VolumeError, VolumeState};
use crate::shard::{
    Authority, Catalog, DiskInfo, Mirror, ReadReply, Scheme, SealedShard, SegmentKind, ShardError,
    ShardInfo, ShardSpec, ShardState, SlotClass, VolumeFence, VolumeOnDisk,
};

struct Random(Env);

impl Random {
    fn u32(&self) -> u32 {
        u32::try_from(self.0.random_u64() >> 32).unwrap()
    }

    fn u8(&self) -> u8 {
        u8::try_from(self.0.random_u64() >> 56).unwrap()
    }

    fn below(&self, bound: usize) -> usize {
        usize::try_from(self.0.random_below(bound as u64)).unwrap()
    }

    fn volume(&self) -> VolumeId {
        VolumeId::from_bytes(self.0.random_bytes())
    }

    fn authority(&self) -> Authority {
        let head = HeadId::from_bytes(self.0.random_bytes());
        Authority { volume: self.volume(), epoch: Epoch(self.0.random_u64()), head }
    }

    fn bytes(&self, max: usize) -> Bytes {
        (0..self.below(max)).map(|_| self.u8()).collect()
    }

    fn mirror(&self) -> Mirror {
        let revision = (Epoch(self.0.random_u64()), self.0.random_u64());
        Mirror { revision, data: self.bytes(3840) }
    }

    fn maybe_mirror(&self) -> Option<Mirror> {
        self.0.chance(1, 2).then(|| self.mirror())
    }

    fn segment(&self) -> SegmentId {
        SegmentId(self.0.random_u64())
    }

    fn spec(&self) -> ShardSpec {
        let kind = [SegmentKind::Log, SegmentKind::Data, SegmentKind::Meta][self.below(3)];
        let members = (0..self.below(21)).map(|_| DiskId::from_bytes(self.0.random_bytes()));
        ShardSpec {
            volume: self.volume(),
            segment: self.segment(),
            creation: self.0.random_u64(),
            kind,
            scheme: Scheme { data: self.u8(), parity: self.u8() },
            index: self.u8(),
            members: members.collect(),
        }
    }

    fn sealed(&self) -> SealedShard {
        let (volume, segment) = (self.volume(), self.segment());
        SealedShard { volume, segment, creation: self.0.random_u64(), blocks: self.u32() }
    }

    fn state(&self) -> ShardState {
        [ShardState::Open, ShardState::Closed, ShardState::Sealed][self.below(3)]
    }

    fn call(&self, opcode: Opcode) -> Call {
        let (authority, segment, volume) = (self.authority(), self.segment(), self.volume());
        let (block, count, crc) = (self.u32(), self.u32(), self.u32());
        let classes = [
            SlotClass::Client,
            SlotClass::Repair,
            SlotClass::Gc,
            SlotClass::Trim,
            SlotClass::Checkpoint,
        ];
        match opcode {
            Opcode::Info => Call::Info,
            Opcode::Fence => Call::Fence { authority, mirror: self.maybe_mirror() },
            Opcode::Probe => Call::Probe { authority },
            Opcode::Mirror => Call::Mirror { authority, mirror: self.mirror() },
            Opcode::Create => {
                Call::Create { authority, spec: self.spec(), class: classes[self.below(5)] }
            }
            Opcode::Append => {
                let crcs: Rc<[u32]> = (0..self.below(600)).map(|_| self.u32()).collect();
                Call::Append { authority, segment, block, crcs }
            }
            Opcode::Seal => {
                Call::Seal { authority, segment, blocks: block, given: self.0.chance(1, 2) }
            }
            Opcode::Delete => Call::Delete { authority, segment, creation: self.0.random_u64() },
            Opcode::Read => Call::Read { volume, segment, block, count },
            Opcode::ReadRaw => Call::ReadRaw { volume, segment, block, count },
            Opcode::ReadSealed => Call::ReadSealed { shard: self.sealed(), block, count },
            Opcode::Mend => Call::Mend { authority, shard: self.sealed(), block, crc },
            Opcode::List => Call::List { volume },
            Opcode::Volumes => Call::Volumes,
            Opcode::DropVolume => Call::DropVolume { volume },
            Opcode::ForgetVolume => Call::ForgetVolume { volume },
            Opcode::PutCatalog => {
                Call::PutCatalog { incarnation: block, revision: self.0.random_u64() }
            }
            Opcode::GetCatalog => Call::GetCatalog,
            Opcode::Exercise => Call::Exercise { write: self.0.chance(1, 2) },
            other => panic!("{other:?} is not for disks"),
        }
    }

    fn volume_call(&self, opcode: Opcode) -> VolumeCall {
        let (epoch, turn, offset) =
            (Epoch(self.0.random_u64()), self.0.random_u64(), self.0.random_u64());
        let (len, unmap) = (self.0.random_u64(), self.0.chance(1, 2));
        match opcode {
            Opcode::Attach => VolumeCall::Attach { turn },
            Opcode::VolumeRead => VolumeCall::Read { epoch, offset, len: self.u32() },
            Opcode::VolumeWrite => VolumeCall::Write { epoch, turn, offset },
            Opcode::VolumeZero => VolumeCall::Zero { epoch, turn, offset, len, unmap },
            Opcode::VolumeFlush => VolumeCall::Flush { epoch },
            Opcode::VolumeMap => VolumeCall::Map { epoch, offset, len, max: self.u32() },
            other => panic!("{other:?} is not for volumes"),
        }
    }

    fn request(&self, opcode: Opcode) -> Request {
        match opcode.audience() {
            Audience::Disk => {
                let disk = DiskId::from_bytes(self.0.random_bytes());
                Request::Disk(disk, self.call(opcode))
            }
            Audience::Volume => Request::Volume(self.volume(), self.volume_call(opcode)),
            Audience::Node => Request::Ask,
        }
    }

    fn volume_answer(&self, expected: Expected) -> Answer {
        let answer = match expected.opcode {
            Opcode::Attach => VolumeAnswer::Attached {
                epoch: Epoch(self.0.random_u64()),
                turn: self.0.random_u64(),
            },
            Opcode::VolumeRead => {
                VolumeAnswer::Read(vec![vec![self.u8(); expected.bytes as usize].into()])
            }
            Opcode::VolumeMap => {
                let extent =
                    |_| MapExtent { len: self.0.random_u64(), allocated: self.0.chance(1, 2) };
                VolumeAnswer::Map((0..self.below(50)).map(extent).collect())
            }
            _ => VolumeAnswer::Done,
        };
        let state = VolumeState { size_bytes: self.0.random_u64(), read_only: self.0.chance(1, 2) };
        Answer::Volume(Ok((state, answer)))
    }

    fn volume_error(&self) -> Answer {
        let text = "weil ß".repeat(self.below(10));
        let error = match self.below(6) {
            0 => TargetError::OutOfRange,
            1 => TargetError::NoSpace,
            2 => TargetError::ReadOnly,
            3 => TargetError::Io(text.clone()),
            4 => TargetError::Stopped,
            _ => return Answer::Volume(Err(VolumeError::Late)),
        };
        Answer::Volume(Err(VolumeError::Target(error, text)))
    }

    fn answer(&self, expected: Expected) -> Answer {
        match expected.opcode {
            Opcode::Info => Answer::Info(DiskInfo {
                id: DiskId::from_bytes(self.0.random_bytes()),
                cluster: crate::id::ClusterId::from_bytes(self.0.random_bytes()),
                slot_bytes: self.0.random_u64(),
                slots: self.u32(),
                slots_free: self.u32(),
            }),
            Opcode::Fence | Opcode::List => {
                let shard = |_| ShardInfo {
                    spec: self.spec(),
                    epoch: Epoch(self.0.random_u64()),
                    state: self.state(),
                    blocks: self.u32(),
                };
                let shards = (0..self.below(30)).map(shard).collect();
                Answer::OnDisk(VolumeOnDisk { shards, mirror: self.maybe_mirror() })
            }
            Opcode::Read | Opcode::ReadRaw | Opcode::ReadSealed => {
                let blocks = expected.blocks as usize;
                let crcs = if expected.opcode == Opcode::ReadRaw { 0 } else { blocks };
                let data = vec![self.u8(); blocks * 4096].into();
                Answer::Read(ReadReply { data, crcs: (0..crcs).map(|_| self.u32()).collect() })
            }
            Opcode::Volumes => {
                let fence = |_| {
                    let Authority { volume, epoch, head } = self.authority();
                    VolumeFence { volume, epoch, head, mirror: self.maybe_mirror() }
                };
                Answer::Fences((0..self.below(20)).map(fence).collect())
            }
            Opcode::GetCatalog => Answer::Catalog(Catalog {
                incarnation: self.u32(),
                revision: self.0.random_u64(),
                data: self.bytes(10_000),
            }),
            Opcode::Ask if self.0.chance(1, 4) => Answer::Told(Err("no".repeat(self.below(99)))),
            Opcode::Ask => Answer::Told(Ok(self.bytes(10_000))),
            other if other.audience() == Audience::Volume => self.volume_answer(expected),
            _ => Answer::Done,
        }
    }

    fn error(&self) -> ShardError {
        let text = "äöü why ".repeat(self.below(10));
        match self.below(11) {
            0 => ShardError::Fenced(Epoch(self.0.random_u64())),
            1 => ShardError::Gone,
            2 => ShardError::Exists,
            3 => ShardError::WrongState(self.state()),
            4 => ShardError::WrongLength(self.u32()),
            5 => ShardError::NoSpace,
            6 => ShardError::Io(text),
            7 => ShardError::Damaged(text),
            8 => ShardError::Offline(text),
            9 => ShardError::Unreachable,
            _ => ShardError::Invalid(text),
        }
    }
}

/// Control part, status and payload of an answer, and what is read from them.
fn pass(expected: Expected, result: Result<Answer, ShardError>) -> String {
    let mut control = Vec::new();
    let reply = Reply::encode(result, &mut control);
    let payload: Bytes = reply.payload.pieces().concat().into();
    let head = ReplyHead::decode(expected, reply.status, &control, payload.len()).unwrap();
    format!("{:?}", head.finish(payload).unwrap())
}

proptest! {
    #[test]
    fn requests(seed: u64) {
        let random = Random(Env::from_seed(seed));
        for opcode in Opcode::ALL {
            let request = random.request(opcode);
            prop_assert_eq!(request.asked().opcode(), opcode);
            let mut control = Vec::new();
            request.asked().encode(&mut control);
            prop_assert_eq!(&Request::decode(opcode, &control).unwrap(), &request);
            let cut = random.below(control.len());
            // An append that was cut between two checksums is one of fewer blocks.
            if opcode != Opcode::Append {
                prop_assert!(Request::decode(opcode, &control[..cut]).is_err());
            }
            control.push(0);
            prop_assert!(Request::decode(opcode, &control).is_err());
        }
    }

    #[test]
    fn replies(seed: u64) {
        let random = Random(Env::from_seed(seed));
        for opcode in Opcode::ALL {
            let blocks = u32::try_from(random.below(4)).unwrap();
            let bytes = u32::try_from(random.below(9000)).unwrap();
            let expected = Expected { opcode, blocks, bytes };
            let answer = random.answer(expected);
            prop_assert_eq!(pass(expected, Ok(answer.clone())), format!("{:?}", Ok::<_, ShardError>(answer)));
            let error = random.error();
            prop_assert_eq!(pass(expected, Err(error.clone())), format!("{:?}", Err::<Answer, _>(error)));
            if opcode.audience() == Audience::Volume {
                let error = random.volume_error();
                prop_assert_eq!(pass(expected, Ok(error.clone())), format!("{:?}", Ok::<_, ShardError>(error)));
            }
        }
    }

    /// Whatever stands in lists: an error, and no more memory than they have bytes.
    #[test]
    fn lists_are_not_believed(seed: u64, cut in 0..2000_usize) {
        let random = Random(Env::from_seed(seed));
        for opcode in [Opcode::List, Opcode::Volumes, Opcode::VolumeMap] {
            let expected = Expected { opcode, blocks: 0, bytes: 0 };
            let mut control = Vec::new();
            let reply = Reply::encode(Ok(random.answer(expected)), &mut control);
            let mut bytes = reply.payload.pieces().concat();
            bytes.truncate(cut);
            if let Some(byte) = bytes.get_mut(random.below(cut.max(1))) {
                *byte = random.u8();
            }
            let head = ReplyHead::decode(expected, 0, &control, bytes.len()).unwrap();
            drop(head.finish(bytes.into()));
        }
    }
}

#[test]
fn a_read_of_another_length_is_refused() {
    let expected = Expected { opcode: Opcode::Read, blocks: 2, bytes: 0 };
    let crcs = [0; 8];
    assert!(ReplyHead::decode(expected, 0, &crcs, 8192).is_ok());
    assert!(ReplyHead::decode(expected, 0, &crcs, 4096).is_err());
    assert!(ReplyHead::decode(expected, 0, &crcs[..4], 8192).is_err());
    assert!(ReplyHead::decode(expected, 99, &[], 0).is_err(), "an unknown answer");
    assert!(ReplyHead::decode(expected, 36, &[], 0).is_err(), "an answer of volumes");
    let expected = Expected { opcode: Opcode::VolumeRead, blocks: 0, bytes: 513 };
    let state = [0; 9];
    assert!(ReplyHead::decode(expected, 0, &state, 513).is_ok());
    assert!(ReplyHead::decode(expected, 0, &state, 512).is_err());
    assert!(ReplyHead::decode(expected, 0, &state[1..], 513).is_err());
    assert!(ReplyHead::decode(expected, 9, &[], 0).is_ok(), "refused before any volume is asked");
}
