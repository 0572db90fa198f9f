//! The typed records that sds keeps in the metadata store, and how they become bytes.
//!
//! A record is JSON in an [`envelope`](super::envelope) that names its kind and version. A field
//! that this version does not know is an error, not something to be dropped at the next write: a
//! change of a record's fields raises its [`Record::VERSION`].

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::envelope::{self, Encoding, EnvelopeError, Kind};
use crate::id::{BLOCK_BYTES, ClusterId, DiskId, NodeId, PoolId, VolumeId};
use crate::limits;
use crate::shard::Scheme;
use crate::shard::domain::Level;

/// Longest name of a pool, a volume or a node, bytes.
pub const NAME_BYTES_MAX: usize = 63;

/// A record of the store.
pub trait Record: Serialize + DeserializeOwned {
    /// What its envelope says it is.
    const KIND: Kind;
    /// Version that this sds writes; older ones it reads too.
    const VERSION: u16;
    /// Says what is wrong with a record that has the right shape.
    ///
    /// # Errors
    /// A sentence for the reader.
    fn validate(&self) -> Result<(), String>;
}

/// Encodes a record.
///
/// # Errors
/// [`EnvelopeError::Payload`] if the record is not valid.
pub fn encode<R: Record>(record: &R) -> Result<Vec<u8>, EnvelopeError> {
    let payload_error = |reason| EnvelopeError::Payload { kind: R::KIND, reason };
    record.validate().map_err(payload_error)?;
    let json = serde_json::to_vec(record).map_err(|error| payload_error(error.to_string()))?;
    envelope::seal(R::KIND, R::VERSION, Encoding::Json, &json)
}

/// Decodes and checks a record.
///
/// # Errors
/// Any [`EnvelopeError`].
pub fn decode<R: Record>(bytes: &[u8]) -> Result<R, EnvelopeError> {
    let opened = envelope::open(bytes, R::KIND, Encoding::Json)?;
    if opened.kind_version > R::VERSION {
        return Err(EnvelopeError::Newer {
            what: format!("the {:?} record", R::KIND),
            found: opened.kind_version,
            known: R::VERSION,
        });
    }
    let payload_error = |reason| EnvelopeError::Payload { kind: R::KIND, reason };
    let record: R =
        serde_json::from_slice(opened.payload).map_err(|error| payload_error(error.to_string()))?;
    record.validate().map_err(payload_error)?;
    Ok(record)
}

/// Whether `name` can name a pool, a volume or a node.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn check_name(what: &str, name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err(format!("the name of a {what} must not be empty"));
    }
    if name.len() > NAME_BYTES_MAX {
        let start: String = name.chars().take(20).collect();
        return Err(format!(
            "the name of a {what} has at most {NAME_BYTES_MAX} characters, '{start}…' has {}",
            name.chars().count()
        ));
    }
    let lower = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    if let Some(bad) = name.chars().find(|c| !lower(*c) && !"._-".contains(*c)) {
        let bad = match bad {
            '/' => "a slash".into(),
            ' ' => "a space".into(),
            'A'..='Z' => format!("the capital letter '{bad}'"),
            _ => format!("{bad:?}"),
        };
        return Err(format!(
            "the name of a {what} consists of a-z, 0-9, '.', '_' and '-': '{}' contains {bad}",
            name.escape_default()
        ));
    }
    if !name.starts_with(lower) {
        return Err(format!(
            "the name of a {what} begins with a letter or a digit, not as '{name}' does"
        ));
    }
    Ok(())
}

/// Whose store it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterRecord {
    /// The cluster.
    pub id: ClusterId,
    /// How often the store was rebuilt, plus one; less than 2^24.
    pub incarnation: u32,
}

impl Record for ClusterRecord {
    const KIND: Kind = Kind::Cluster;
    const VERSION: u16 = 1;
    fn validate(&self) -> Result<(), String> {
        if self.id.is_nil() {
            return Err("the cluster's id is nil".into());
        }
        if self.incarnation >= 1 << 24 {
            return Err(format!("incarnation {} does not fit an epoch", self.incarnation));
        }
        Ok(())
    }
}

/// The node that uses a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeRecord {
    /// The node.
    pub id: NodeId,
    /// Name of its host when it first used the store, for people.
    pub host: String,
}

impl Record for NodeRecord {
    const KIND: Kind = Kind::Node;
    const VERSION: u16 = 1;
    fn validate(&self) -> Result<(), String> {
        if self.id.is_nil() {
            return Err("the node's id is nil".into());
        }
        Ok(())
    }
}

/// Whether a disk is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskState {
    /// In use.
    Online,
    /// Not used, by order of an operator; may come back.
    Offline,
    /// In use, but avoided for new segments; its shards are moved elsewhere.
    Draining,
    /// Not used, because it was sick for long; an operator may take it back.
    #[serde(rename = "set-aside")]
    SetAside,
    /// Gone for good. Kept as evidence for deletions and recoveries that must hear of it.
    Removed,
}

impl DiskState {
    /// Whether the disk stays out of use until an operator wants it back.
    pub const fn is_out(self) -> bool {
        matches!(self, Self::Offline | Self::SetAside)
    }
}

impl std::fmt::Display for DiskState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Online => "online",
            Self::Offline => "offline",
            Self::Draining => "draining",
            Self::SetAside => "set-aside",
            Self::Removed => "removed",
        })
    }
}

/// A disk of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskRecord {
    /// The disk, as its superblock says.
    pub id: DiskId,
    /// Path of the device or file on its node.
    pub path: String,
    /// Name of the node.
    pub node: String,
    /// Its failure domain: a number never given to another disk while domains are disks.
    pub domain: u32,
    /// Size of a slot, bytes.
    pub slot_bytes: u64,
    /// Size of the device, bytes.
    pub size_bytes: u64,
    /// Whether it is used.
    pub state: DiskState,
    /// When it was added: seconds since 1970, for people only.
    pub added_at_unix_s: u64,
    /// It is removed as soon as it is empty. Records of earlier versions lack it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub removing: bool,
    /// The disk that takes its place, while it is to be removed. Records of earlier versions lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heir: Option<DiskId>,
}

impl Record for DiskRecord {
    const KIND: Kind = Kind::Disk;
    const VERSION: u16 = 1;
    fn validate(&self) -> Result<(), String> {
        check_name("node", &self.node)?;
        if self.id.is_nil() {
            return Err("the disk's id is nil".into());
        }
        if self.path.is_empty() {
            return Err("the disk has no path".into());
        }
        if !(limits::SLOT_BYTES_MIN..=limits::SLOT_BYTES_MAX).contains(&self.slot_bytes) {
            return Err(format!("slots of {} bytes", self.slot_bytes));
        }
        if self.removing && !matches!(self.state, DiskState::Draining | DiskState::Offline) {
            return Err(format!("it is {} and to be removed", self.state));
        }
        if self.heir.is_some_and(|heir| !self.removing || heir == self.id) {
            return Err("it has an heir that cannot be one".into());
        }
        Ok(())
    }
}

/// What two shards of a segment never share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FailureDomain {
    /// A disk.
    Disk,
    /// A node.
    Node,
    /// A rack.
    Rack,
}

impl From<FailureDomain> for Level {
    fn from(domain: FailureDomain) -> Self {
        match domain {
            FailureDomain::Disk => Self::Disk,
            FailureDomain::Node => Self::Node,
            FailureDomain::Rack => Self::Rack,
        }
    }
}

impl std::fmt::Display for FailureDomain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Disk => "disk",
            Self::Node => "node",
            Self::Rack => "rack",
        })
    }
}

impl std::str::FromStr for FailureDomain {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "disk" => Ok(Self::Disk),
            "node" => Ok(Self::Node),
            "rack" => Ok(Self::Rack),
            _ => Err(format!("a failure domain is disk, node or rack, not '{s}'")),
        }
    }
}

/// A pool: how its volumes are made redundant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolRecord {
    /// The pool.
    pub id: PoolId,
    /// Its name.
    pub name: String,
    /// Data and parity shards.
    pub scheme: Scheme,
    /// What two shards of a segment never share.
    pub failure_domain: FailureDomain,
    /// Copies of the log below which client writes wait: 1 to `scheme.parity + 1`.
    pub min_size: u8,
}

impl PoolRecord {
    /// The `min_size` of a pool that was given none: two copies, or one where two are all.
    pub const fn min_size_default(scheme: Scheme) -> u8 {
        if scheme.parity < 2 { 1 } else { 2 }
    }
}

impl Record for PoolRecord {
    const KIND: Kind = Kind::Pool;
    const VERSION: u16 = 1;
    fn validate(&self) -> Result<(), String> {
        check_name("pool", &self.name)?;
        if self.id.is_nil() {
            return Err("the pool's id is nil".into());
        }
        let Scheme { data, parity } = self.scheme;
        if !(1..=limits::DATA_SHARDS_MAX).contains(&usize::from(data)) {
            return Err(format!(
                "a pool has 1 to {} data shards, not {data}",
                limits::DATA_SHARDS_MAX
            ));
        }
        if usize::from(parity) > limits::PARITY_SHARDS_MAX {
            return Err(format!(
                "a pool has at most {} parity shards (or further copies), not {parity}",
                limits::PARITY_SHARDS_MAX
            ));
        }
        if data > 1 && parity == 0 {
            return Err(format!("an erasure-coded pool needs parity: {data}+0 would bear no loss"));
        }
        if !(1..=parity + 1).contains(&self.min_size) {
            return Err(format!(
                "min_size of a pool with {parity} parity shards is 1 to {}, not {}",
                parity + 1,
                self.min_size
            ));
        }
        Ok(())
    }
}

/// Whether a volume exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeState {
    /// It does.
    Active,
    /// The tombstone: deleted, and kept until every disk confirmed that it dropped its shards.
    Deleting,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeRecord {
    /// The volume.
    pub id: VolumeId,
    /// Its name within the pool.
    pub name: String,
    /// Name of its pool.
    pub pool: String,
    /// Size that clients see, bytes; a multiple of 4096.
    pub size_bytes: u64,
    /// Set while what lay between `size_bytes` and here is being cut off, after a shrink; bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut_from_bytes: Option<u64>,
    /// Logical block size that clients are told, bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Whether it exists.
    pub state: VolumeState,
    /// When it was created: seconds since 1970, for people only.
    pub created_at_unix_s: u64,
}

/// Whether a volume may have this size.
///
/// # Errors
/// A sentence that says what is wrong with it.
pub fn check_volume_size(bytes: u64) -> Result<(), String> {
    if bytes == 0 {
        return Err("the size of a volume must not be zero".into());
    }
    if bytes > limits::VOLUME_BYTES_MAX {
        return Err(format!(
            "a volume has at most {}, not {}",
            crate::units::ByteSize(limits::VOLUME_BYTES_MAX),
            crate::units::ByteSize(bytes)
        ));
    }
    if !bytes.is_multiple_of(BLOCK_BYTES) {
        return Err(format!("the size of a volume is a multiple of 4096 bytes, {bytes} is not"));
    }
    Ok(())
}

impl Record for VolumeRecord {
    const KIND: Kind = Kind::Volume;
    const VERSION: u16 = 1;
    fn validate(&self) -> Result<(), String> {
        check_name("volume", &self.name)?;
        check_name("pool", &self.pool)?;
        check_volume_size(self.size_bytes)?;
        if let Some(old) = self.cut_from_bytes {
            check_volume_size(old)?;
            if old <= self.size_bytes {
                return Err(
                    "nothing lies between the volume's size and the one it is cut from".into()
                );
            }
        }
        if self.id.is_nil() {
            return Err("the volume's id is nil".into());
        }
        if ![512, 4096].contains(&self.block_bytes) {
            return Err(format!(
                "the block size of a volume is 512 or 4096 bytes, not {}",
                self.block_bytes
            ));
        }
        Ok(())
    }
}

/// Which volume has a name in a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeNameRecord {
    /// The volume.
    pub id: VolumeId,
}

impl Record for VolumeNameRecord {
    const KIND: Kind = Kind::VolumeName;
    const VERSION: u16 = 1;
    fn validate(&self) -> Result<(), String> {
        if self.id.is_nil() { Err("the volume's id is nil".into()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;
    use proptest::prelude::*;

    fn pool() -> PoolRecord {
        PoolRecord {
            id: PoolId::from_bytes([7; 16]),
            name: "default".into(),
            scheme: Scheme { data: 4, parity: 2 },
            failure_domain: FailureDomain::Disk,
            min_size: 2,
        }
    }

    #[test]
    fn names() {
        for good in ["a", "0", "vol0", "my.pool_1-x", &"a".repeat(63)] {
            assert_eq!(check_name("pool", good), Ok(()));
        }
        let error = |name| check_name("volume", name).unwrap_err();
        expect![
            "the name of a volume consists of a-z, 0-9, '.', '_' and '-': 'a/b' contains a slash"
        ]
        .assert_eq(&error("a/b"));
        expect!["the name of a volume begins with a letter or a digit, not as '.hidden' does"]
            .assert_eq(&error(".hidden"));
        expect!["the name of a volume must not be empty"].assert_eq(&error(""));
        assert!(error("Vol").contains("the capital letter 'V'"));
        assert!(error("ä").contains("'ä'"));
        assert!(error("a\nb").contains("'\\n'"));
        assert!(error(&"a".repeat(64)).contains("at most 63 characters"));
    }

    #[test]
    fn json_is_pinned() {
        let bytes = encode(&pool()).unwrap();
        let json = std::str::from_utf8(&bytes[envelope::HEADER_BYTES..]).unwrap();
        expect![[
            r#"{"id":"07070707-0707-0707-0707-070707070707","name":"default","scheme":{"data":4,"parity":2},"failure_domain":"disk","min_size":2}"#
        ]]
        .assert_eq(json);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let seal = |version, json: &str| {
            envelope::seal(Kind::Pool, version, Encoding::Json, json.as_bytes()).unwrap()
        };
        let json = serde_json::to_string(&pool()).unwrap();
        let error = decode::<PoolRecord>(&seal(2, &json)).unwrap_err();
        assert!(matches!(error, EnvelopeError::Newer { found: 2, known: 1, .. }), "{error}");
        let more = json.replace('{', r#"{"more":1,"#);
        let error = decode::<PoolRecord>(&seal(1, &more)).unwrap_err();
        assert!(error.to_string().contains("unknown field `more`"), "{error}");
        let error = decode::<DiskRecord>(&seal(1, &json)).unwrap_err();
        assert!(matches!(error, EnvelopeError::Kind { .. }), "{error}");
        assert!(encode(&PoolRecord { min_size: 4, ..pool() }).is_err());
        assert!(encode(&PoolRecord { scheme: Scheme { data: 2, parity: 0 }, ..pool() }).is_err());
        assert!(encode(&PoolRecord { scheme: Scheme { data: 17, parity: 2 }, ..pool() }).is_err());
    }

    proptest! {
        #[test]
        fn disks_round_trip(
            id in any::<[u8; 16]>().prop_filter("nil", |id| *id != [0; 16]),
            path in ".{1,50}",
            node in "[a-z0-9][a-z0-9._-]{0,62}",
            size_bytes: u64,
        ) {
            let record = DiskRecord {
                id: DiskId::from_bytes(id),
                path,
                node,
                domain: 3,
                slot_bytes: 1 << 20,
                size_bytes,
                state: DiskState::Draining,
                added_at_unix_s: 1,
                removing: size_bytes % 2 == 0,
                heir: (size_bytes % 4 == 0).then(|| DiskId::from_bytes([0xfe; 16])),
            };
            let kept = DiskRecord { removing: false, heir: None, ..record.clone() };
            let text = String::from_utf8_lossy(&encode(&kept).unwrap()).into_owned();
            prop_assert!(!text.contains("removing") && !text.contains("heir"), "as it was before");
            let alone = DiskRecord { removing: false, heir: Some(kept.id), ..record.clone() };
            prop_assert!(encode(&alone).is_err());
            prop_assert_eq!(decode::<DiskRecord>(&encode(&record).unwrap()).unwrap(), record);
        }
    }
}
