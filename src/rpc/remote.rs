//! A disk of another node, as a head sees it.

use std::rc::Rc;

use bytes::Bytes;

use super::client::Peer;
use super::message::{Answer, AnswerResult, Call, Payload};
use super::request::Asked;
use super::window::Share;
use crate::id::{DiskId, SegmentId, VolumeId};
use crate::shard::{
    Append, Authority, Catalog, DiskInfo, LocalFuture, Mirror, ReadReply, SealedShard, ShardClient,
    ShardError, ShardResult, ShardSpec, SlotClass, VolumeFence, VolumeOnDisk,
};

/// A disk behind a connection. Requests are sent when they are made; what is promised about their
/// order and their failures is in [`crate::rpc`].
pub struct RemoteDisk {
    id: DiskId,
    peer: Peer,
    share: Rc<Share>,
}

fn answer<T>(result: AnswerResult, take: impl FnOnce(Answer) -> Option<T>) -> ShardResult<T> {
    // Replies are decoded by what was asked, so the kinds fit.
    result.and_then(|answer| take(answer).ok_or(ShardError::Unreachable))
}

impl RemoteDisk {
    /// The disk `id` behind `peer`.
    pub fn new(id: DiskId, peer: Peer) -> Self {
        Self { id, peer, share: Rc::default() }
    }

    /// The connection.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    fn ask<T: 'static>(
        &self,
        call: &Call,
        payload: Payload,
        take: impl FnOnce(Answer) -> Option<T> + 'static,
    ) -> LocalFuture<'static, ShardResult<T>> {
        let config = self.peer.config();
        let patience = match call {
            Call::DropVolume { .. } => config.long_deadline,
            _ => config.deadline,
        };
        match self.peer.request(Asked::Disk(self.id, call), &self.share, payload, patience) {
            Ok(request) => Box::pin(async move { answer(request.await, take) }),
            Err(error) => Box::pin(std::future::ready(Err(error))),
        }
    }

    fn order(&self, call: &Call, payload: Payload) -> LocalFuture<'static, ShardResult<()>> {
        self.ask(call, payload, |answer| matches!(answer, Answer::Done).then_some(()))
    }

    fn fetch(&self, call: &Call) -> LocalFuture<'static, ShardResult<ReadReply>> {
        self.ask(call, Payload::Empty, |answer| match answer {
            Answer::Read(reply) => Some(reply),
            _ => None,
        })
    }

    fn look(&self, call: &Call) -> LocalFuture<'static, ShardResult<VolumeOnDisk>> {
        self.ask(call, Payload::Empty, |answer| match answer {
            Answer::OnDisk(found) => Some(found),
            _ => None,
        })
    }
}

impl ShardClient for RemoteDisk {
    fn disk(&self) -> DiskId {
        self.id
    }

    fn info(&self) -> LocalFuture<'_, ShardResult<DiskInfo>> {
        self.ask(&Call::Info, Payload::Empty, |answer| match answer {
            Answer::Info(info) => Some(info),
            _ => None,
        })
    }

    fn fence(
        &self,
        authority: Authority,
        mirror: Option<Mirror>,
    ) -> LocalFuture<'_, ShardResult<VolumeOnDisk>> {
        self.look(&Call::Fence { authority, mirror })
    }

    fn probe(&self, authority: Authority) -> LocalFuture<'_, ShardResult<()>> {
        self.order(&Call::Probe { authority }, Payload::Empty)
    }

    fn mirror(&self, authority: Authority, mirror: Mirror) -> LocalFuture<'_, ShardResult<()>> {
        self.order(&Call::Mirror { authority, mirror }, Payload::Empty)
    }

    fn create(
        &self,
        authority: Authority,
        spec: ShardSpec,
        class: SlotClass,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.order(&Call::Create { authority, spec, class }, Payload::Empty)
    }

    fn append(&self, append: Append) -> LocalFuture<'_, ShardResult<()>> {
        let Append { authority, segment, block, data, crcs } = append;
        self.order(&Call::Append { authority, segment, block, crcs }, Payload::Pieces(data))
    }

    fn seal(
        &self,
        authority: Authority,
        segment: SegmentId,
        blocks: u32,
        crcs: Option<Rc<[u32]>>,
    ) -> LocalFuture<'_, ShardResult<()>> {
        let given = crcs.is_some();
        let payload = crcs.map_or(Payload::Empty, |crcs| {
            let bytes: Vec<u8> = crcs.iter().flat_map(|crc| crc.to_le_bytes()).collect();
            Payload::One(bytes.into())
        });
        self.order(&Call::Seal { authority, segment, blocks, given }, payload)
    }

    fn delete(
        &self,
        authority: Authority,
        segment: SegmentId,
        creation: u64,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.order(&Call::Delete { authority, segment, creation }, Payload::Empty)
    }

    fn read(
        &self,
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        self.fetch(&Call::Read { volume, segment, block, count })
    }

    fn read_raw(
        &self,
        volume: VolumeId,
        segment: SegmentId,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        self.fetch(&Call::ReadRaw { volume, segment, block, count })
    }

    fn read_sealed(
        &self,
        shard: SealedShard,
        block: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        self.fetch(&Call::ReadSealed { shard, block, count })
    }

    fn mend(
        &self,
        authority: Authority,
        shard: SealedShard,
        block: u32,
        data: Bytes,
        crc: u32,
    ) -> LocalFuture<'_, ShardResult<()>> {
        self.order(&Call::Mend { authority, shard, block, crc }, Payload::One(data))
    }

    fn list(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<VolumeOnDisk>> {
        self.look(&Call::List { volume })
    }

    fn volumes(&self) -> LocalFuture<'_, ShardResult<Vec<VolumeFence>>> {
        self.ask(&Call::Volumes, Payload::Empty, |answer| match answer {
            Answer::Fences(fences) => Some(fences),
            _ => None,
        })
    }

    fn drop_volume(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<()>> {
        self.order(&Call::DropVolume { volume }, Payload::Empty)
    }

    fn forget_volume(&self, volume: VolumeId) -> LocalFuture<'_, ShardResult<()>> {
        self.order(&Call::ForgetVolume { volume }, Payload::Empty)
    }

    fn put_catalog(&self, catalog: Catalog) -> LocalFuture<'_, ShardResult<()>> {
        let Catalog { incarnation, revision, data } = catalog;
        self.order(&Call::PutCatalog { incarnation, revision }, Payload::One(data))
    }

    fn get_catalog(&self) -> LocalFuture<'_, ShardResult<Catalog>> {
        self.ask(&Call::GetCatalog, Payload::Empty, |answer| match answer {
            Answer::Catalog(catalog) => Some(catalog),
            _ => None,
        })
    }

    fn exercise(&self, write: bool) -> LocalFuture<'_, ShardResult<()>> {
        self.order(&Call::Exercise { write }, Payload::Empty)
    }
}
