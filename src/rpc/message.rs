//! Requests to disks, and all replies, as the control and payload parts of messages.
//!
//! Numbers of requests are in [`Opcode`], those of answers in [`status`]; the fields of each are
//! written and read here (those of volumes in `volume.rs`), in one place each. Whoever decodes trusts nothing: what does not fit is a
//! [`Violation`].

use std::rc::Rc;

use bytes::Bytes;

use super::fields::{Get, Put};
use super::frame::{Audience, Opcode, Violation};
use super::request::AskResult;
use super::volume::{VolumeHead, VolumeResult, get_error, put_result};
use crate::id::{BLOCK_SIZE, ClusterId, DiskId, Epoch, HeadId, SegmentId, VolumeId};
use crate::limits::RPC_MESSAGE_BYTES_MAX;
use crate::shard::{
    Append, Authority, Catalog, DiskInfo, LocalFuture, Mirror, ReadReply, Scheme, SealedShard,
    SegmentKind, ShardClient, ShardError, ShardInfo, ShardResult, ShardSpec, ShardState, SlotClass,
    VolumeFence, VolumeOnDisk,
};

/// Bytes that a list is expected to take in a window: its length is not known before.
const LIST_BYTES: usize = 16 << 10;
/// Longest text of an error on the wire, bytes.
pub(super) const TEXT_BYTES_MAX: usize = 1024;
/// Longest text of the error that a question is answered with, bytes.
const REFUSAL_BYTES_MAX: usize = 8192;
/// Blocks that one request may read.
const READ_BLOCKS_MAX: usize = RPC_MESSAGE_BYTES_MAX / BLOCK_SIZE;

/// How a request went: zero for success, else a [`ShardError`]. For volumes see
/// [`super::volume::status`].
pub mod status {
    #![allow(missing_docs, reason = "named after the variants of ShardError")]
    pub const OK: u16 = 0;
    pub const FENCED: u16 = 1;
    pub const GONE: u16 = 2;
    pub const EXISTS: u16 = 3;
    pub const WRONG_STATE: u16 = 4;
    pub const WRONG_LENGTH: u16 = 5;
    pub const NO_SPACE: u16 = 6;
    pub const IO: u16 = 7;
    pub const DAMAGED: u16 = 8;
    pub const OFFLINE: u16 = 9;
    pub const UNREACHABLE: u16 = 10;
    pub const INVALID: u16 = 11;
    /// The node refuses what it was asked; the text says why.
    pub const REFUSED: u16 = 64;
}

/// Payload of a message: shared with who gave it, never copied.
#[derive(Debug, Clone, Default)]
pub enum Payload {
    /// None.
    #[default]
    Empty,
    /// One piece.
    One(Bytes),
    /// Pieces in order.
    Pieces(Rc<[Bytes]>),
}

impl Payload {
    /// The pieces.
    pub fn pieces(&self) -> &[Bytes] {
        match self {
            Self::Empty => &[],
            Self::One(piece) => std::slice::from_ref(piece),
            Self::Pieces(pieces) => pieces,
        }
    }

    /// Bytes of all pieces.
    pub fn len(&self) -> usize {
        self.pieces().iter().map(Bytes::len).sum()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What is asked of a disk, without its payload: the arguments of a method of [`ShardClient`].
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "named after the methods of ShardClient and their arguments")]
pub enum Call {
    Info,
    Fence {
        authority: Authority,
        mirror: Option<Mirror>,
    },
    Probe {
        authority: Authority,
    },
    Mirror {
        authority: Authority,
        mirror: Mirror,
    },
    Create {
        authority: Authority,
        spec: ShardSpec,
        class: SlotClass,
    },
    /// The blocks are the payload.
    Append {
        authority: Authority,
        segment: SegmentId,
        block: u32,
        crcs: Rc<[u32]>,
    },
    /// The checksums, if any are given, are the payload: a slot has up to 65,536.
    Seal {
        authority: Authority,
        segment: SegmentId,
        blocks: u32,
        given: bool,
    },
    Delete {
        authority: Authority,
        segment: SegmentId,
        creation: u64,
    },
    Read {
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    },
    ReadRaw {
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    },
    ReadSealed {
        shard: SealedShard,
        block: u32,
        count: u32,
    },
    /// The block is the payload.
    Mend {
        authority: Authority,
        shard: SealedShard,
        block: u32,
        crc: u32,
    },
    List {
        volume: VolumeId,
    },
    Volumes,
    DropVolume {
        volume: VolumeId,
    },
    ForgetVolume {
        volume: VolumeId,
    },
    /// The keys are the payload.
    PutCatalog {
        incarnation: u32,
        revision: u64,
    },
    GetCatalog,
    Exercise {
        write: bool,
    },
}

/// What is answered. Which of these is fixed by the [`Opcode`].
#[derive(Debug, Clone)]
#[allow(missing_docs, reason = "the answers of the methods of ShardClient")]
pub enum Answer {
    Done,
    Info(DiskInfo),
    OnDisk(VolumeOnDisk),
    Read(ReadReply),
    Fences(Vec<VolumeFence>),
    Catalog(Catalog),
    /// What a volume answers, errors included.
    Volume(VolumeResult),
    /// What a node answers to a question.
    Told(AskResult),
}

impl Call {
    /// Its number.
    pub fn opcode(&self) -> Opcode {
        match self {
            Self::Info => Opcode::Info,
            Self::Fence { .. } => Opcode::Fence,
            Self::Probe { .. } => Opcode::Probe,
            Self::Mirror { .. } => Opcode::Mirror,
            Self::Create { .. } => Opcode::Create,
            Self::Append { .. } => Opcode::Append,
            Self::Seal { .. } => Opcode::Seal,
            Self::Delete { .. } => Opcode::Delete,
            Self::Read { .. } => Opcode::Read,
            Self::ReadRaw { .. } => Opcode::ReadRaw,
            Self::ReadSealed { .. } => Opcode::ReadSealed,
            Self::Mend { .. } => Opcode::Mend,
            Self::List { .. } => Opcode::List,
            Self::Volumes => Opcode::Volumes,
            Self::DropVolume { .. } => Opcode::DropVolume,
            Self::ForgetVolume { .. } => Opcode::ForgetVolume,
            Self::PutCatalog { .. } => Opcode::PutCatalog,
            Self::GetCatalog => Opcode::GetCatalog,
            Self::Exercise { .. } => Opcode::Exercise,
        }
    }

    /// The volume it is about; nil if none.
    pub fn volume(&self) -> VolumeId {
        match self {
            Self::Fence { authority, .. }
            | Self::Probe { authority }
            | Self::Mirror { authority, .. }
            | Self::Create { authority, .. }
            | Self::Append { authority, .. }
            | Self::Seal { authority, .. }
            | Self::Delete { authority, .. }
            | Self::Mend { authority, .. } => authority.volume,
            Self::Read { volume, .. }
            | Self::ReadRaw { volume, .. }
            | Self::List { volume }
            | Self::DropVolume { volume }
            | Self::ForgetVolume { volume } => *volume,
            Self::ReadSealed { shard, .. } => shard.volume,
            Self::Info
            | Self::Volumes
            | Self::PutCatalog { .. }
            | Self::GetCatalog
            | Self::Exercise { .. } => VolumeId::default(),
        }
    }

    /// Blocks that it reads; none if it does not.
    pub fn reads(&self) -> Option<u32> {
        match self {
            Self::Read { count, .. }
            | Self::ReadRaw { count, .. }
            | Self::ReadSealed { count, .. } => Some(*count),
            _ => None,
        }
    }

    /// Whether a reply to it would be longer than a message may be.
    pub fn reads_too_much(&self) -> bool {
        self.reads().is_some_and(|count| count as usize > READ_BLOCKS_MAX)
    }

    /// Bytes of payload to expect of its reply, for the window.
    pub fn reply_bytes(&self) -> usize {
        match self {
            Self::Fence { .. } | Self::List { .. } | Self::Volumes | Self::GetCatalog => LIST_BYTES,
            _ => self.reads().map_or(0, |count| count as usize * BLOCK_SIZE),
        }
    }

    /// Appends the control part of a request to `disk`.
    pub fn encode(&self, disk: DiskId, out: &mut Vec<u8>) {
        let mut put = Put(out);
        put.raw(&disk.to_bytes());
        match self {
            Self::Info | Self::Volumes | Self::GetCatalog => {}
            Self::Probe { authority } => put_authority(&mut put, authority),
            Self::Fence { authority, mirror } => {
                put_authority(&mut put, authority);
                put_mirror(&mut put, mirror.as_ref());
            }
            Self::Mirror { authority, mirror } => {
                put_authority(&mut put, authority);
                put_mirror(&mut put, Some(mirror));
            }
            Self::Create { authority, spec, class } => {
                put_authority(&mut put, authority);
                put.u8(class_number(*class));
                put_spec(&mut put, spec);
            }
            Self::Append { authority, segment, block, crcs } => {
                put_authority(&mut put, authority);
                put.u64(segment.0).u32(*block).u32s(crcs);
            }
            Self::Seal { authority, segment, blocks, given } => {
                put_authority(&mut put, authority);
                put.u64(segment.0).u32(*blocks).u8(u8::from(*given));
            }
            Self::Delete { authority, segment, creation } => {
                put_authority(&mut put, authority);
                put.u64(segment.0).u64(*creation);
            }
            Self::Read { volume, segment, block, count }
            | Self::ReadRaw { volume, segment, block, count } => {
                put.raw(&volume.to_bytes()).u64(segment.0).u32(*block).u32(*count);
            }
            Self::ReadSealed { shard, block, count } => {
                put_sealed(&mut put, shard);
                put.u32(*block).u32(*count);
            }
            Self::Mend { authority, shard, block, crc } => {
                put_authority(&mut put, authority);
                put_sealed(&mut put, shard);
                put.u32(*block).u32(*crc);
            }
            Self::List { volume } | Self::DropVolume { volume } | Self::ForgetVolume { volume } => {
                put.raw(&volume.to_bytes());
            }
            Self::PutCatalog { incarnation, revision } => {
                put.u32(*incarnation).u64(*revision);
            }
            Self::Exercise { write } => {
                put.u8(u8::from(*write));
            }
        }
    }

    /// The request in a control part, and its disk.
    pub fn decode(opcode: Opcode, control: &[u8]) -> Result<(DiskId, Self), Violation> {
        let mut get = Get::new(control, "request");
        let disk = DiskId::from_bytes(get.array()?);
        let call = Self::fields(opcode, &mut get)?;
        get.end()?;
        Ok((disk, call))
    }

    fn fields(opcode: Opcode, get: &mut Get<'_>) -> Result<Self, Violation> {
        Ok(match opcode {
            Opcode::Info => Self::Info,
            Opcode::Volumes => Self::Volumes,
            Opcode::GetCatalog => Self::GetCatalog,
            Opcode::Probe => Self::Probe { authority: authority(get)? },
            Opcode::Fence => Self::Fence { authority: authority(get)?, mirror: mirror(get)? },
            Opcode::Mirror => {
                let authority = authority(get)?;
                let mirror = mirror(get)?.ok_or_else(|| get.malformed())?;
                Self::Mirror { authority, mirror }
            }
            Opcode::Create => {
                let authority = authority(get)?;
                let class = class(get)?;
                Self::Create { authority, spec: spec(get)?, class }
            }
            Opcode::Append => {
                let authority = authority(get)?;
                let (segment, block) = (SegmentId(get.u64()?), get.u32()?);
                Self::Append { authority, segment, block, crcs: get.rest_u32s()? }
            }
            Opcode::Seal => {
                let authority = authority(get)?;
                let (segment, blocks) = (SegmentId(get.u64()?), get.u32()?);
                Self::Seal { authority, segment, blocks, given: get.flag()? }
            }
            Opcode::Delete => {
                let authority = authority(get)?;
                Self::Delete { authority, segment: SegmentId(get.u64()?), creation: get.u64()? }
            }
            Opcode::Read | Opcode::ReadRaw => {
                let (volume, segment) = (volume(get)?, SegmentId(get.u64()?));
                let (block, count) = (get.u32()?, get.u32()?);
                if opcode == Opcode::Read {
                    Self::Read { volume, segment, block, count }
                } else {
                    Self::ReadRaw { volume, segment, block, count }
                }
            }
            Opcode::ReadSealed => {
                Self::ReadSealed { shard: sealed(get)?, block: get.u32()?, count: get.u32()? }
            }
            Opcode::Mend => {
                let (authority, shard) = (authority(get)?, sealed(get)?);
                Self::Mend { authority, shard, block: get.u32()?, crc: get.u32()? }
            }
            Opcode::List => Self::List { volume: volume(get)? },
            Opcode::DropVolume => Self::DropVolume { volume: volume(get)? },
            Opcode::ForgetVolume => Self::ForgetVolume { volume: volume(get)? },
            Opcode::PutCatalog => {
                Self::PutCatalog { incarnation: get.u32()?, revision: get.u64()? }
            }
            Opcode::Exercise => Self::Exercise { write: get.flag()? },
            _ => return Err(Violation::Incoherent("a request that is not for disks")),
        })
    }

    /// Asks `client`, with what was received as payload.
    pub fn run(self, client: &dyn ShardClient, payload: Bytes) -> LocalFuture<'_, AnswerResult> {
        match self {
            Self::Info => answer(client.info(), Answer::Info),
            Self::Fence { authority, mirror } => {
                answer(client.fence(authority, mirror), Answer::OnDisk)
            }
            Self::Probe { authority } => done(client.probe(authority)),
            Self::Mirror { authority, mirror } => done(client.mirror(authority, mirror)),
            Self::Create { authority, spec, class } => done(client.create(authority, spec, class)),
            Self::Append { authority, segment, block, crcs } => {
                let data = Rc::from([payload]);
                done(client.append(Append { authority, segment, block, data, crcs }))
            }
            Self::Seal { authority, segment, blocks, given } => {
                let crcs: Result<Option<Rc<[u32]>>, _> =
                    given.then(|| Get::new(&payload, "seal").rest_u32s()).transpose();
                match crcs {
                    Ok(crcs) => done(client.seal(authority, segment, blocks, crcs)),
                    Err(error) => {
                        let refused = Err(ShardError::Invalid(error.to_string()));
                        Box::pin(std::future::ready(refused))
                    }
                }
            }
            Self::Delete { authority, segment, creation } => {
                done(client.delete(authority, segment, creation))
            }
            Self::Read { volume, segment, block, count } => {
                answer(client.read(volume, segment, block, count), Answer::Read)
            }
            Self::ReadRaw { volume, segment, block, count } => {
                answer(client.read_raw(volume, segment, block, count), Answer::Read)
            }
            Self::ReadSealed { shard, block, count } => {
                answer(client.read_sealed(shard, block, count), Answer::Read)
            }
            Self::Mend { authority, shard, block, crc } => {
                done(client.mend(authority, shard, block, payload, crc))
            }
            Self::List { volume } => answer(client.list(volume), Answer::OnDisk),
            Self::Volumes => answer(client.volumes(), Answer::Fences),
            Self::DropVolume { volume } => done(client.drop_volume(volume)),
            Self::ForgetVolume { volume } => done(client.forget_volume(volume)),
            Self::PutCatalog { incarnation, revision } => {
                done(client.put_catalog(Catalog { incarnation, revision, data: payload }))
            }
            Self::GetCatalog => answer(client.get_catalog(), Answer::Catalog),
            Self::Exercise { write } => done(client.exercise(write)),
        }
    }
}

/// What comes of a request. For volumes and nodes, an error is of the RPC: it was not begun, or its
/// outcome is unknown if it is [`ShardError::Unreachable`].
pub type AnswerResult = ShardResult<Answer>;

fn answer<'a, T: 'a>(
    request: LocalFuture<'a, ShardResult<T>>,
    wrap: fn(T) -> Answer,
) -> LocalFuture<'a, AnswerResult> {
    Box::pin(async move { request.await.map(wrap) })
}

fn done(request: LocalFuture<'_, ShardResult<()>>) -> LocalFuture<'_, AnswerResult> {
    answer(request, |()| Answer::Done)
}

/// The parts of a reply.
#[derive(Debug)]
pub struct Reply {
    /// A number of [`status`].
    pub status: u16,
    /// The payload.
    pub payload: Payload,
    /// Nobody else checks the payload: it needs a checksum on the wire.
    pub bare: bool,
}

impl Reply {
    /// Appends the control part of a reply.
    pub fn encode(result: AnswerResult, control: &mut Vec<u8>) -> Self {
        let mut put = Put(control);
        let (payload, bare) = match result {
            Err(error) => {
                let status = put_error(&mut put, &error);
                return Self { status, payload: Payload::Empty, bare: false };
            }
            Ok(Answer::Done) => (Payload::Empty, false),
            Ok(Answer::Info(info)) => {
                put.raw(&info.id.to_bytes()).raw(&info.cluster.to_bytes());
                put.u64(info.slot_bytes).u32(info.slots).u32(info.slots_free);
                (Payload::Empty, false)
            }
            Ok(Answer::Read(ReadReply { data, crcs })) => {
                put.u32s(&crcs);
                (Payload::One(data), crcs.is_empty())
            }
            Ok(Answer::OnDisk(found)) => (list(|put| put_on_disk(put, &found)), true),
            Ok(Answer::Fences(fences)) => (list(|put| put_fences(put, &fences)), true),
            Ok(Answer::Catalog(Catalog { incarnation, revision, data })) => {
                put.u32(incarnation).u64(revision);
                (Payload::One(data), true)
            }
            Ok(Answer::Volume(result)) => {
                let (status, payload) = put_result(&mut put, result);
                return Self { status, payload, bare: true };
            }
            Ok(Answer::Told(Ok(data))) => (Payload::One(data), true),
            Ok(Answer::Told(Err(text))) => {
                put.raw(&text.as_bytes()[..text.floor_char_boundary(REFUSAL_BYTES_MAX)]);
                return Self { status: status::REFUSED, payload: Payload::Empty, bare: false };
            }
        };
        Self { status: status::OK, payload, bare }
    }
}

fn list(write: impl FnOnce(&mut Put<'_>)) -> Payload {
    let mut bytes = Vec::new();
    write(&mut Put(&mut bytes));
    Payload::One(bytes.into())
}

/// A reply whose payload is still to come.
#[derive(Debug)]
pub struct ReplyHead(Head);

#[derive(Debug)]
enum Head {
    Whole(AnswerResult),
    Read { crcs: Vec<u32> },
    OnDisk,
    Fences,
    Catalog { incarnation: u32, revision: u64 },
    Volume(VolumeHead),
    Told,
}

/// What the reply to a request must look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// What was asked.
    pub opcode: Opcode,
    /// Blocks, if it was a read of a disk.
    pub blocks: u32,
    /// Bytes, if it was a read of a volume.
    pub bytes: u32,
}

impl ReplyHead {
    /// The reply in a control part, judged by what was asked and the length of its payload.
    pub fn decode(
        expected: Expected,
        status: u16,
        control: &[u8],
        payload_bytes: usize,
    ) -> Result<Self, Violation> {
        let mut get = Get::new(control, "reply");
        let unexpected = Violation::Incoherent("the payload of a reply is not what was asked for");
        let Expected { opcode, blocks, bytes } = expected;
        if status != status::OK {
            let failed = failure(opcode, status, &mut get)?;
            get.end()?;
            let whole = Self(Head::Whole(failed));
            return if payload_bytes == 0 { Ok(whole) } else { Err(unexpected) };
        }
        if opcode.audience() == Audience::Volume {
            return VolumeHead::get(opcode, bytes, &mut get, payload_bytes)
                .map(|head| Self(Head::Volume(head)));
        }
        let head = match opcode {
            Opcode::Ask => Head::Told,
            Opcode::Info => {
                let id = DiskId::from_bytes(get.array()?);
                let cluster = ClusterId::from_bytes(get.array()?);
                let (slot_bytes, slots, slots_free) = (get.u64()?, get.u32()?, get.u32()?);
                let info = DiskInfo { id, cluster, slot_bytes, slots, slots_free };
                Head::Whole(Ok(Answer::Info(info)))
            }
            Opcode::Read | Opcode::ReadRaw | Opcode::ReadSealed => {
                let crcs: Vec<u32> = get.rest_u32s()?;
                let wanted = if opcode == Opcode::ReadRaw { 0 } else { blocks as usize };
                if crcs.len() != wanted || payload_bytes != blocks as usize * BLOCK_SIZE {
                    return Err(unexpected);
                }
                Head::Read { crcs }
            }
            Opcode::Fence | Opcode::List => Head::OnDisk,
            Opcode::Volumes => Head::Fences,
            Opcode::GetCatalog => Head::Catalog { incarnation: get.u32()?, revision: get.u64()? },
            _ => Head::Whole(Ok(Answer::Done)),
        };
        get.end()?;
        if matches!(head, Head::Whole(_)) && payload_bytes > 0 {
            return Err(unexpected);
        }
        Ok(Self(head))
    }

    /// The answer, once the payload is there.
    pub fn finish(self, payload: Bytes) -> Result<AnswerResult, Violation> {
        let mut get = Get::new(&payload, "list");
        Ok(Ok(match self.0 {
            Head::Whole(result) => return Ok(result),
            Head::Read { crcs } => Answer::Read(ReadReply { data: payload, crcs }),
            Head::OnDisk => Answer::OnDisk(on_disk(&mut get)?),
            Head::Fences => Answer::Fences(fences(&mut get)?),
            Head::Catalog { incarnation, revision } => {
                Answer::Catalog(Catalog { incarnation, revision, data: payload })
            }
            Head::Volume(head) => Answer::Volume(head.finish(payload)?),
            Head::Told => Answer::Told(Ok(payload)),
        }))
    }
}

/// The answer of another status than success.
fn failure(opcode: Opcode, number: u16, get: &mut Get<'_>) -> Result<AnswerResult, Violation> {
    match opcode.audience() {
        Audience::Volume => {
            if let Some(error) = get_error(get, number) {
                return Ok(Ok(Answer::Volume(Err(error))));
            }
        }
        Audience::Node if number == status::REFUSED => {
            return Ok(Ok(Answer::Told(Err(get.rest_text()))));
        }
        Audience::Disk | Audience::Node => {}
    }
    error(get, number).map(Err)
}

fn put_authority(put: &mut Put<'_>, authority: &Authority) {
    let Authority { volume, epoch, head } = authority;
    put.raw(&volume.to_bytes()).u64(epoch.0).raw(&head.to_bytes());
}

fn authority(get: &mut Get<'_>) -> Result<Authority, Violation> {
    let (volume, epoch) = (volume(get)?, Epoch(get.u64()?));
    Ok(Authority { volume, epoch, head: HeadId::from_bytes(get.array()?) })
}

fn volume(get: &mut Get<'_>) -> Result<VolumeId, Violation> {
    Ok(VolumeId::from_bytes(get.array()?))
}

fn put_mirror(put: &mut Put<'_>, mirror: Option<&Mirror>) {
    put.u8(u8::from(mirror.is_some()));
    if let Some(Mirror { revision: (epoch, sequence), data }) = mirror {
        put.u64(epoch.0).u64(*sequence).bytes(data);
    }
}

fn mirror(get: &mut Get<'_>) -> Result<Option<Mirror>, Violation> {
    if !get.flag()? {
        return Ok(None);
    }
    let revision = (Epoch(get.u64()?), get.u64()?);
    Ok(Some(Mirror { revision, data: Bytes::copy_from_slice(get.bytes()?) }))
}

const CLASSES: [SlotClass; 5] =
    [SlotClass::Client, SlotClass::Repair, SlotClass::Gc, SlotClass::Trim, SlotClass::Checkpoint];

fn class_number(class: SlotClass) -> u8 {
    match class {
        SlotClass::Client => 0,
        SlotClass::Repair => 1,
        SlotClass::Gc => 2,
        SlotClass::Trim => 3,
        SlotClass::Checkpoint => 4,
    }
}

fn class(get: &mut Get<'_>) -> Result<SlotClass, Violation> {
    let number = get.u8()?;
    CLASSES.get(usize::from(number)).copied().ok_or_else(|| get.malformed())
}

fn put_spec(put: &mut Put<'_>, spec: &ShardSpec) {
    put.raw(&spec.volume.to_bytes()).u64(spec.segment.0).u64(spec.creation);
    put.u8(spec.kind as u8).u8(spec.scheme.data).u8(spec.scheme.parity).u8(spec.index);
    put.count(spec.members.len());
    spec.members.iter().for_each(|disk| {
        put.raw(&disk.to_bytes());
    });
}

fn spec(get: &mut Get<'_>) -> Result<ShardSpec, Violation> {
    let (volume, segment, creation) = (volume(get)?, SegmentId(get.u64()?), get.u64()?);
    let kind = match get.u8()? {
        1 => SegmentKind::Log,
        2 => SegmentKind::Data,
        3 => SegmentKind::Meta,
        _ => return Err(get.malformed()),
    };
    let scheme = Scheme { data: get.u8()?, parity: get.u8()? };
    let index = get.u8()?;
    let count = get.count(16)?;
    let members =
        (0..count).map(|_| get.array().map(DiskId::from_bytes)).collect::<Result<_, _>>()?;
    Ok(ShardSpec { volume, segment, creation, kind, scheme, index, members })
}

fn put_sealed(put: &mut Put<'_>, shard: &SealedShard) {
    let SealedShard { volume, segment, creation, blocks } = shard;
    put.raw(&volume.to_bytes()).u64(segment.0).u64(*creation).u32(*blocks);
}

fn sealed(get: &mut Get<'_>) -> Result<SealedShard, Violation> {
    let (volume, segment) = (volume(get)?, SegmentId(get.u64()?));
    Ok(SealedShard { volume, segment, creation: get.u64()?, blocks: get.u32()? })
}

fn state(get: &mut Get<'_>) -> Result<ShardState, Violation> {
    Ok(match get.u8()? {
        1 => ShardState::Open,
        2 => ShardState::Closed,
        3 => ShardState::Sealed,
        _ => return Err(get.malformed()),
    })
}

/// Least bytes of a shard in a list.
const SHARD_BYTES_MIN: usize = 53;
/// Least bytes of a fence in a list.
const FENCE_BYTES_MIN: usize = 41;

fn put_on_disk(put: &mut Put<'_>, found: &VolumeOnDisk) {
    put.count(found.shards.len());
    for ShardInfo { spec, epoch, state, blocks } in &found.shards {
        put_spec(put, spec);
        put.u64(epoch.0).u8(*state as u8).u32(*blocks);
    }
    put_mirror(put, found.mirror.as_ref());
}

fn on_disk(get: &mut Get<'_>) -> Result<VolumeOnDisk, Violation> {
    let mut shards = Vec::new();
    for _ in 0..get.count(SHARD_BYTES_MIN)? {
        let (spec, epoch) = (spec(get)?, Epoch(get.u64()?));
        shards.push(ShardInfo { spec, epoch, state: state(get)?, blocks: get.u32()? });
    }
    let mirror = mirror(get)?;
    get.end()?;
    Ok(VolumeOnDisk { shards, mirror })
}

fn put_fences(put: &mut Put<'_>, fences: &[VolumeFence]) {
    put.count(fences.len());
    for VolumeFence { volume, epoch, head, mirror } in fences {
        put.raw(&volume.to_bytes()).u64(epoch.0).raw(&head.to_bytes());
        put_mirror(put, mirror.as_ref());
    }
}

fn fences(get: &mut Get<'_>) -> Result<Vec<VolumeFence>, Violation> {
    let mut fences = Vec::new();
    for _ in 0..get.count(FENCE_BYTES_MIN)? {
        let Authority { volume, epoch, head } = authority(get)?;
        fences.push(VolumeFence { volume, epoch, head, mirror: mirror(get)? });
    }
    get.end()?;
    Ok(fences)
}

fn put_error(put: &mut Put<'_>, error: &ShardError) -> u16 {
    let mut text = |text: &str, status| {
        put.raw(&text.as_bytes()[..text.floor_char_boundary(TEXT_BYTES_MAX)]);
        status
    };
    match error {
        ShardError::Io(reason) => text(reason, status::IO),
        ShardError::Damaged(reason) => text(reason, status::DAMAGED),
        ShardError::Offline(reason) => text(reason, status::OFFLINE),
        ShardError::Invalid(reason) => text(reason, status::INVALID),
        ShardError::Gone => status::GONE,
        ShardError::Exists => status::EXISTS,
        ShardError::NoSpace => status::NO_SPACE,
        ShardError::Unreachable => status::UNREACHABLE,
        ShardError::Fenced(epoch) => {
            put.u64(epoch.0);
            status::FENCED
        }
        ShardError::WrongState(state) => {
            put.u8(*state as u8);
            status::WRONG_STATE
        }
        ShardError::WrongLength(blocks) => {
            put.u32(*blocks);
            status::WRONG_LENGTH
        }
    }
}

fn error(get: &mut Get<'_>, number: u16) -> Result<ShardError, Violation> {
    Ok(match number {
        status::FENCED => ShardError::Fenced(Epoch(get.u64()?)),
        status::GONE => ShardError::Gone,
        status::EXISTS => ShardError::Exists,
        status::WRONG_STATE => ShardError::WrongState(state(get)?),
        status::WRONG_LENGTH => ShardError::WrongLength(get.u32()?),
        status::NO_SPACE => ShardError::NoSpace,
        status::IO => ShardError::Io(get.rest_text()),
        status::DAMAGED => ShardError::Damaged(get.rest_text()),
        status::OFFLINE => ShardError::Offline(get.rest_text()),
        status::UNREACHABLE => ShardError::Unreachable,
        status::INVALID => ShardError::Invalid(get.rest_text()),
        _ => return Err(Violation::Incoherent("an answer of an unknown kind")),
    })
}
