//! The root: the one small record per volume in the metadata store.
//!
//! Changed only by compare-and-swap, and rarely: at checkpoints, take-overs and changes of the log
//! set. The token (epoch, head, sequence) identifies each version of it, so that a swap whose
//! outcome is unknown is settled by reading one's own token, and by nothing else but a later
//! successful swap (design 6, "Ambiguous swap").

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::rules::LogSet;
use super::segtab::ShardRef;
use crate::id::{Epoch, HeadId, VolumeId};
use crate::meta::envelope::{self, Encoding, EnvelopeError, Kind};
use crate::segment::record::CheckpointPlace;
use crate::shard::{Mirror, Scheme};

/// Version of the root's record.
const VERSION: u16 = 1;

/// Where the checkpoint of a root lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointRef {
    /// Epoch of the head that wrote it: only its records are replayed.
    pub epoch: Epoch,
    /// Segment, offset, length and checksum.
    pub place: CheckpointPlace,
    /// Scheme of that segment.
    pub scheme: Scheme,
    /// Its shards.
    pub members: Vec<ShardRef>,
}

/// The root of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// The volume.
    pub volume: VolumeId,
    /// Epoch of the head in charge.
    pub epoch: Epoch,
    /// That head.
    pub head: HeadId,
    /// Counts the swaps of the volume's root.
    pub sequence: u64,
    /// Set by a head that stopped serving in order; its successor need not wait for its lease.
    pub released: bool,
    /// `D` and `w`.
    pub set: LogSet,
    /// Earlier sets that may still be the newest that somebody finds ([`super::rules::in_force`]).
    pub former: Vec<LogSet>,
    /// Segment numbers granted to the head: from, to (exclusive).
    pub range: (u64, u64),
    /// The newest checkpoint; none for a volume that was never written.
    pub checkpoint: Option<CheckpointRef>,
    /// The volume's own record in the metadata store, so that a lost store can be rebuilt.
    pub description: serde_json::Value,
}

impl Root {
    /// The root of a volume that no head has had yet.
    pub fn fresh(volume: VolumeId, set: LogSet, description: serde_json::Value) -> Self {
        Self {
            volume,
            epoch: Epoch::default(),
            head: HeadId::default(),
            sequence: 0,
            released: true,
            set,
            former: Vec::new(),
            range: (1, 1),
            checkpoint: None,
            description,
        }
    }

    /// What identifies this version.
    pub fn token(&self) -> (Epoch, HeadId, u64) {
        (self.epoch, self.head, self.sequence)
    }

    /// As stored in the metadata store and mirrored on the disks.
    pub fn encode(&self) -> Bytes {
        let json = serde_json::to_vec(self).expect("a root has only string keys");
        envelope::seal(Kind::Root, VERSION, Encoding::Json, &json)
            .expect("a root is far smaller than a value may be")
            .into()
    }

    /// Reads [`Root::encode`].
    ///
    /// # Errors
    /// [`EnvelopeError`]: foreign, newer, damaged or malformed bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        let opened = envelope::open(bytes, Kind::Root, Encoding::Json)?;
        if opened.kind_version > VERSION {
            return Err(EnvelopeError::Newer {
                what: "the root of a volume".into(),
                found: opened.kind_version,
                known: VERSION,
            });
        }
        let payload = |reason: String| EnvelopeError::Payload { kind: Kind::Root, reason };
        let root: Self =
            serde_json::from_slice(opened.payload).map_err(|e| payload(e.to_string()))?;
        if root.checkpoint.as_ref().is_some_and(|checkpoint| !checkpoint.place.is_possible()) {
            return Err(payload("its checkpoint lies beyond the end of a segment".into()));
        }
        Ok(root)
    }

    /// The mirror of this root for a disk.
    pub fn mirror(&self) -> Mirror {
        Mirror { revision: (self.epoch, self.sequence), data: self.encode() }
    }
}
