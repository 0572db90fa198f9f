//! Rebuilding a lost metadata store from what the disks mirror (design 6, "The store can be lost").
//!
//! ```text
//!  own disks ────────────────┐
//!  lenders ══ RPC ══ borrow ─┴─► survey ──► fences ──► evidence ──► content ──► the empty store
//! ```
//!
//! - `process.rs`: `sdsd recover` and `sdsd recover --lend` as processes; `lend.rs`: what a lender and who
//!   borrows say to each other;
//! - `survey.rs`: reads every disk, and raises fences; `evidence.rs`: what the disks say, put together;
//!   `content.rs`: the keys of the new store.
//!
//! # The argument
//!
//! A root is in force only once `w` domains of its `D` have its mirror. Who has heard every disk of
//! every `D` that he finds, but for fewer than `w` domains of each, has therefore heard of the
//! newest root in force. What counts is read *after* a fence of the new incarnation was raised for every
//! volume on every disk: a head of the lost store that still runs somewhere, on a node that was forgotten, can bring no root
//! into force any more that was not read (hole 4 of `docs/protocol-model.md`). Where a disk has heard of a
//! volume or an incarnation meanwhile that the fences did not cover, they are raised again. The store that
//! is made has an incarnation above everything that any disk has seen, and its roots are newer than all
//! mirrors.

mod content;
mod evidence;
mod lend;
pub(super) mod process;
mod survey;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;

use bytes::Bytes;

use self::survey::Survey;
use crate::env::Env;
use crate::id::{ClusterId, DiskId, VolumeId};
use crate::shard::ShardClient;

pub use self::process::{Lent, Order, lend, recover};

/// How often fences are raised anew because something newer was seen.
const ROUNDS_MAX: usize = 8;

/// A disk, and where it was as far as is known: `NODE:PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// The disk.
    pub disk: DiskId,
    /// Where.
    pub place: Option<String>,
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Some(place) => write!(f, "{} ({place})", self.disk),
            None => write!(f, "{} (in no catalog)", self.disk),
        }
    }
}

/// Why the store was not rebuilt; nothing but fences was changed.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// No disk was given, or none can be read.
    #[error(
        "no disk of a cluster was found: name one at least (`disks` in the configuration); it \
         knows where the others were"
    )]
    NoDisks,
    /// Disks of two clusters.
    #[error("disk {disk} belongs to cluster {found}, others to {expected}: leave it out")]
    Clusters {
        /// The disk.
        disk: Named,
        /// Its cluster.
        found: ClusterId,
        /// That of the first disk.
        expected: ClusterId,
    },
    /// One identity is offered twice.
    #[error("disk {disk} is at {first} and at {second}: one of them is a copy, leave it out")]
    Twice {
        /// The disk.
        disk: DiskId,
        /// Where it was found first.
        first: String,
        /// Where else.
        second: String,
    },
    /// Disks that have to be heard were not given.
    #[error(
        "these disks are needed and were not found: {}; {}if one is gone for good, say so with \
         --missing-disk ID", list(.disks), lending(*.clustered)
    )]
    DisksMissing {
        /// The disks.
        disks: Vec<Named>,
        /// Whether other nodes may have them.
        clustered: bool,
    },
    /// The operator's word is not enough.
    #[error(
        "volume {volume}: with {} missing, newer data may exist that nobody else knows of; it \
         cannot be recovered without them", list(.missing)
    )]
    TooManyMissing {
        /// The volume.
        volume: VolumeId,
        /// Disks of its log set that are not there.
        missing: Vec<Named>,
    },
    /// A disk cannot tell what it holds.
    #[error(
        "disk {disk}: {why}; if it is gone for good, leave it out and say --missing-disk {}",
        disk.disk
    )]
    Disk {
        /// The disk.
        disk: Named,
        /// What it answered.
        why: String,
    },
    /// A mirrored root or record cannot be understood.
    #[error("{what} cannot be understood: {why}")]
    Record {
        /// Which.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// Somebody raises fences all the time.
    #[error(
        "others raise fences on the disks at the same time: is another `sdsd recover`, or a node with a \
         metadata store, at work?"
    )]
    Unsettled,
}

fn list(disks: &[Named]) -> String {
    disks.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn lending(clustered: bool) -> &'static str {
    if clustered {
        "have their nodes lend them (`sdsd recover --lend --config FILE` there, --from HOST:PORT \
         here); "
    } else {
        ""
    }
}

/// What was found, and what the new store holds.
#[derive(Debug)]
pub struct Rebuilt {
    /// Keys and values of the new store.
    pub content: Vec<(String, Bytes)>,
    /// Its incarnation.
    pub incarnation: u32,
    /// Names of the volumes that are back.
    pub volumes: Vec<String>,
    /// What an operator should know of.
    pub notes: Vec<String>,
}

/// A disk that takes part: how to reach it and where it is.
pub struct Found {
    /// The disk.
    pub client: Rc<dyn ShardClient>,
    /// Name of its node.
    pub node: String,
    /// Its path.
    pub path: String,
    /// Size of the disk, bytes.
    pub size_bytes: u64,
    /// Size of a slot, bytes.
    pub slot_bytes: u64,
}

impl Found {
    fn named(&self) -> Named {
        let place = Some(format!("{}:{}", self.node, self.path));
        Named { disk: self.client.disk(), place }
    }
}

/// How a store is rebuilt.
pub struct Plan<'a> {
    /// Disks that are gone, by an operator's word.
    pub missing: &'a BTreeSet<DiskId>,
    /// Whether the node is one of several.
    pub clustered: bool,
    /// Hears how far it is.
    pub progress: &'a dyn Fn(&str),
}

/// Rebuilds the content of a lost store. Raises every fence; changes nothing else.
///
/// # Errors
/// [`RecoverError`].
pub async fn rebuild(
    env: &Env,
    found: &BTreeMap<DiskId, Found>,
    plan: &Plan<'_>,
) -> Result<Rebuilt, RecoverError> {
    let first = look(found, plan).await?;
    settle(env, found, plan, first).await
}

/// The first look at the disks: nothing is changed before every disk that it wants is there.
async fn look(found: &BTreeMap<DiskId, Found>, plan: &Plan<'_>) -> Result<Survey, RecoverError> {
    if found.is_empty() {
        return Err(RecoverError::NoDisks);
    }
    (plan.progress)(&format!("reading {} disks", found.len()));
    let survey = Survey::of(found).await?;
    survey.evidence()?.check_complete(found, plan)?;
    Ok(survey)
}

/// Raises fences, and takes what the disks say then.
async fn settle(
    env: &Env,
    found: &BTreeMap<DiskId, Found>,
    plan: &Plan<'_>,
    mut survey: Survey,
) -> Result<Rebuilt, RecoverError> {
    for _ in 0..ROUNDS_MAX {
        let fences = survey.fences(env)?;
        (plan.progress)(&format!(
            "raising the fences of {} volumes to incarnation {}",
            fences.heads.len(),
            fences.incarnation
        ));
        survey::raise(found, &survey, &fences).await?;
        survey = Survey::of(found).await?;
        if !survey.is_covered(&fences) {
            (plan.progress)("something newer was seen meanwhile: once more");
            continue;
        }
        let mut evidence = survey.evidence()?;
        evidence.check_complete(found, plan)?;
        evidence.describe_volumes();
        evidence.add_unknown_disks(found, plan.clustered);
        evidence.add_fresh_roots(found, plan);
        return evidence.into_content(&fences);
    }
    Err(RecoverError::Unsettled)
}
