//! An open segment: creating its shards, appending to all of them, sealing them.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;

use super::checksum::{Salt, raw_crcs};
use super::record::Header;
use super::slot_blocks;
use crate::env::Env;
use crate::id::{DiskId, SegmentId};
use crate::shard::disks::{Disks, Target};
use crate::shard::{
    Append, Authority, Scheme, SegmentKind, ShardClient, ShardError, ShardResult, ShardSpec,
    SlotClass,
};

/// How long a create or seal may take before the disk counts as unreachable.
pub const CONTROL_PATIENCE: Duration = Duration::from_secs(2);

/// One shard of an open segment.
#[derive(Clone)]
pub struct Shard {
    /// The disk.
    pub disk: DiskId,
    /// How to reach it.
    pub client: Rc<dyn ShardClient>,
}

/// A segment that takes appends.
pub struct OpenSegment {
    /// In whose name it is written.
    pub authority: Authority,
    /// Its number.
    pub id: SegmentId,
    /// What it is for.
    pub kind: SegmentKind,
    /// Its scheme.
    pub scheme: Scheme,
    /// Creation of its shards.
    pub creation: u64,
    /// Its shards by index; fewer than the scheme's width where too few domains were left.
    pub shards: Vec<Shard>,
    /// Blocks that each shard holds at most.
    pub shard_blocks: u32,
    /// Blocks given out to appends.
    pub next: Cell<u32>,
}

/// Why no segment could be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// A newer head has the volume.
    #[error("fenced")]
    Fenced,
    /// The disks have no slots left for this class.
    #[error("no free slots")]
    NoSpace,
    /// Fewer failure domains answer than the segment needs shards.
    #[error("{have} of {need} failure domains can take a shard")]
    TooFewDomains {
        /// Domains that could.
        have: usize,
        /// Shards of the segment.
        need: usize,
    },
}

/// What a segment is opened with.
pub struct OpenRequest<'a> {
    /// In whose name.
    pub authority: Authority,
    /// What for.
    pub kind: SegmentKind,
    /// Its scheme.
    pub scheme: Scheme,
    /// Class of its slots.
    pub class: SlotClass,
    /// The disks it may lie on.
    pub allowed: &'a dyn Fn(DiskId) -> bool,
    /// Of these, the ones that are taken before any other.
    pub first: &'a dyn Fn(DiskId) -> bool,
    /// Shards that are enough where no more domains are left; usually the scheme's width. The
    /// others are missing from the start.
    pub least: usize,
}

impl OpenSegment {
    /// Creates the shards of a new segment on disks of distinct domains. A disk that refuses is
    /// replaced by another as long as there are any; the segment's number is used either way. Full
    /// disks never make a segment narrower.
    ///
    /// # Errors
    /// [`OpenError`]. `orphan` hears of every shard of an attempt that failed: it may exist.
    pub async fn create(
        env: &Env,
        disks: &Disks,
        request: OpenRequest<'_>,
        mut next_id: impl FnMut() -> SegmentId,
        mut orphan: impl FnMut(SegmentId, DiskId, u64),
    ) -> Result<Self, OpenError> {
        let need = request.scheme.width();
        let mut refused: Vec<DiskId> = Vec::new();
        let mut id = next_id();
        let mut full = false;
        loop {
            let allowed = |disk| (request.allowed)(disk) && !refused.contains(&disk);
            let class = request.class;
            let first = |disk| allowed(disk) && (request.first)(disk);
            let mut targets = disks.choose(env, class, need, &[], first);
            if targets.len() < need {
                let taken: Vec<u32> = targets.iter().filter_map(|t| disks.domain(t.disk)).collect();
                targets.extend(disks.choose(env, class, need - targets.len(), &taken, allowed));
            }
            if targets.len() < need && full {
                return Err(OpenError::NoSpace);
            }
            if targets.len() < request.least.max(1) {
                let need = request.least;
                return Err(OpenError::TooFewDomains { have: targets.len(), need });
            }
            let creation = env.random_u64();
            let creates =
                (0..targets.len()).map(|i| create_one(&request, id, creation, &targets, i));
            let results = join_all(creates).await;
            let mut failed = false;
            for (target, result) in targets.iter().zip(&results) {
                match result {
                    Ok(()) => disks.took(target.disk),
                    Err(ShardError::Fenced(_)) => return Err(OpenError::Fenced),
                    Err(error) => {
                        if *error == ShardError::NoSpace {
                            full = true;
                            disks.refused(target.disk, request.class);
                        }
                        disks.report(target.disk, error);
                        refused.push(target.disk);
                        failed = true;
                    }
                }
            }
            if failed {
                // Where the outcome is not known, the shard may be there too.
                for target in &targets {
                    orphan(id, target.disk, creation);
                }
                id = next_id();
                continue;
            }
            let slot = targets.iter().map(|t| t.slot_bytes).min().expect("a shard at least");
            let shards =
                targets.into_iter().map(|t| Shard { disk: t.disk, client: t.client }).collect();
            let segment = Self {
                authority: request.authority,
                id,
                kind: request.kind,
                scheme: request.scheme,
                creation,
                shards,
                shard_blocks: slot_blocks(slot),
                next: Cell::new(0),
            };
            return Ok(segment);
        }
    }

    /// The salt of shard `index`.
    pub fn salt(&self, index: usize) -> Salt {
        Salt::new(self.authority.volume, self.id, self.scheme, index)
    }

    /// Takes `blocks` blocks of each shard; none if they do not fit.
    pub fn reserve(&self, blocks: u32) -> Option<u32> {
        let at = self.next.get();
        let end = at.checked_add(blocks)?;
        (end <= self.shard_blocks).then(|| {
            self.next.set(end);
            at
        })
    }

    /// Appends to shard `index`. The future does not borrow the segment.
    pub fn append(
        &self,
        index: usize,
        block: u32,
        data: Rc<[Bytes]>,
        crcs: Rc<[u32]>,
    ) -> impl Future<Output = ShardResult<()>> + 'static {
        let client = self.shards[index].client.clone();
        let append = Append { authority: self.authority, segment: self.id, block, data, crcs };
        async move { client.append(append).await }
    }

    /// Seals all shards at `blocks`; bit `i` of the result is set where shard `i` could not be.
    pub async fn seal(&self, blocks: u32) -> u32 {
        let seals = self.shards.iter().map(|shard| {
            let seal = shard.client.seal(self.authority, self.id, blocks, None);
            tokio::time::timeout(CONTROL_PATIENCE, seal)
        });
        let mut bad = 0;
        for (index, result) in join_all(seals).await.into_iter().enumerate() {
            if !matches!(result, Ok(Ok(()))) {
                tracing::debug!(segment = %self.id, index, ?result, "a shard was not sealed");
                bad |= 1 << index;
            }
        }
        bad
    }
}

async fn create_one(
    request: &OpenRequest<'_>,
    id: SegmentId,
    creation: u64,
    targets: &[Target],
    index: usize,
) -> ShardResult<()> {
    let spec = ShardSpec {
        volume: request.authority.volume,
        segment: id,
        creation,
        kind: request.kind,
        scheme: request.scheme,
        index: u8::try_from(index).expect("at most 20 shards"),
        members: (0..request.scheme.width())
            .map(|i| targets.get(i).map(|t| t.disk).unwrap_or_default())
            .collect(),
    };
    let create = targets[index].client.create(request.authority, spec, request.class);
    tokio::time::timeout(CONTROL_PATIENCE, create).await.unwrap_or(Err(ShardError::Unreachable))
}

/// A record ready to be appended to one shard: header blocks and payload, and the salted CRCs of
/// all of them. `header.crcs` must be salted already.
pub fn frame(salt: Salt, header: &Header, payload: &[Bytes]) -> (Vec<Bytes>, Vec<u32>) {
    let head = header.encode().freeze();
    let mut crcs: Vec<u32> =
        (header.block..).zip(raw_crcs(&head)).map(|(block, raw)| salt.apply(block, raw)).collect();
    crcs.extend_from_slice(&header.crcs);
    let mut data = Vec::with_capacity(1 + payload.len());
    data.push(head);
    data.extend_from_slice(payload);
    (data, crcs)
}
