//! One reading of all disks, and the fences that make the next one count.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::future::join_all;

use super::evidence::Evidence;
use super::{Found, RecoverError};
use crate::env::Env;
use crate::id::{ClusterId, DiskId, Epoch, HeadId, VolumeId};
use crate::shard::{Authority, Catalog, ShardError, ShardResult, VolumeFence};

/// What the disks said, each for itself.
pub(super) struct Survey {
    cluster: ClusterId,
    catalog: Catalog,
    /// Disks that were removed, as the newest catalog says: what they say does not count.
    removed: BTreeSet<DiskId>,
    fences: BTreeMap<DiskId, Vec<VolumeFence>>,
}

/// Fences of one incarnation: an id of nobody for each volume.
pub(super) struct Fences {
    pub(super) incarnation: u32,
    pub(super) heads: BTreeMap<VolumeId, HeadId>,
    /// Disks of the log sets.
    members: BTreeSet<(VolumeId, DiskId)>,
}

impl Fences {
    /// The lowest epoch of the new incarnation, which no head ever has.
    pub(super) const fn epoch(&self) -> Epoch {
        Epoch::new(self.incarnation, 0)
    }
}

/// What one disk answers.
async fn read(there: &Found) -> ShardResult<(ClusterId, Catalog, Vec<VolumeFence>)> {
    let cluster = there.client.info().await?.cluster;
    // One that is damaged is as if it were not there: others have it too.
    let catalog = match there.client.get_catalog().await {
        Err(ShardError::Damaged(_)) => Catalog::default(),
        answer => answer?,
    };
    Ok((cluster, catalog, there.client.volumes().await?))
}

impl Survey {
    /// Reads every disk.
    ///
    /// # Errors
    /// [`RecoverError::NoDisks`], [`RecoverError::Clusters`], [`RecoverError::Disk`],
    /// [`RecoverError::Record`].
    pub(super) async fn of(found: &BTreeMap<DiskId, Found>) -> Result<Self, RecoverError> {
        let answers = join_all(found.values().map(read)).await;
        let mut survey: Option<Self> = None;
        for ((&disk, there), answer) in found.iter().zip(answers) {
            let (cluster, catalog, fences) = answer
                .map_err(|why| RecoverError::Disk { disk: there.named(), why: why.to_string() })?;
            let survey = survey.get_or_insert_with(|| Self {
                cluster,
                catalog: Catalog::default(),
                removed: BTreeSet::new(),
                fences: BTreeMap::new(),
            });
            if survey.cluster != cluster {
                let expected = survey.cluster;
                let disk = there.named();
                return Err(RecoverError::Clusters { disk, found: cluster, expected });
            }
            let newest = (survey.catalog.incarnation, survey.catalog.revision);
            if (catalog.incarnation, catalog.revision) > newest {
                survey.catalog = catalog;
            }
            survey.fences.insert(disk, fences);
        }
        let mut survey = survey.ok_or(RecoverError::NoDisks)?;
        let known = Evidence::new(survey.cluster, &survey.catalog)?;
        survey.removed = found.keys().copied().filter(|disk| known.is_removed(*disk)).collect();
        Ok(survey)
    }

    /// What the disks that count say.
    fn heard(&self) -> impl Iterator<Item = (DiskId, &VolumeFence)> {
        let disks = self.fences.iter().filter(|(disk, _)| !self.removed.contains(disk));
        disks.flat_map(|(disk, fences)| fences.iter().map(|fence| (*disk, fence)))
    }

    fn alive(&self) -> impl Iterator<Item = (DiskId, &VolumeFence)> {
        self.heard().filter(|(_, fence)| fence.epoch != Epoch::TOMBSTONE)
    }

    /// All of it put together.
    ///
    /// # Errors
    /// [`RecoverError::Record`].
    pub(super) fn evidence(&self) -> Result<Evidence, RecoverError> {
        let mut evidence = Evidence::new(self.cluster, &self.catalog)?;
        for disk in &self.removed {
            evidence.notes.push(format!("disk {disk} was removed; what it says does not count"));
        }
        for (disk, fence) in self.heard() {
            evidence.hear(disk, fence)?;
        }
        Ok(evidence)
    }

    /// Fences above everything that was seen, of every volume that any disk has heard of.
    ///
    /// # Errors
    /// [`RecoverError::Record`] where there is nothing above it.
    pub(super) fn fences(&self, env: &Env) -> Result<Fences, RecoverError> {
        let evidence = self.evidence()?;
        let seen = evidence.incarnation;
        let incarnation = u32::try_from(seen + 1).ok().filter(|next| *next < 1 << 24);
        let Some(incarnation) = incarnation else {
            let why = format!("there is none above {seen} that fits an epoch");
            return Err(RecoverError::Record { what: "the store's incarnation".into(), why });
        };
        let volumes: BTreeSet<VolumeId> = self.alive().map(|(_, fence)| fence.volume).collect();
        let head = |volume| (volume, HeadId::from_bytes(env.random_bytes()));
        let sets = evidence.roots.iter().flat_map(|(volume, root)| {
            let sets = std::iter::once(&root.set).chain(&root.former);
            sets.flat_map(|set| set.members().iter().map(|member| (*volume, member.disk)))
        });
        let members = sets.collect();
        Ok(Fences { incarnation, heads: volumes.into_iter().map(head).collect(), members })
    }

    /// Whether nothing was seen that these fences, raised before, do not keep as it is.
    pub(super) fn is_covered(&self, fences: &Fences) -> bool {
        u64::from(self.catalog.incarnation) < u64::from(fences.incarnation)
            && self.alive().all(|(_, fence)| {
                let head = fences.heads.get(&fence.volume);
                fence.epoch == fences.epoch() && head == Some(&fence.head)
            })
    }
}

/// Raises fences on every disk that counts. Who is above them already is found by the next survey.
///
/// # Errors
/// [`RecoverError::Disk`].
pub(super) async fn raise(
    found: &BTreeMap<DiskId, Found>,
    survey: &Survey,
    fences: &Fences,
) -> Result<(), RecoverError> {
    let counting = found.iter().filter(|(disk, _)| !survey.removed.contains(disk));
    let each = counting.map(|(&disk, there)| async move {
        for (&volume, &head) in &fences.heads {
            let authority = Authority { volume, epoch: fences.epoch(), head };
            match there.client.fence(authority, None).await {
                // A tombstone is the highest fence of all.
                Ok(_) | Err(ShardError::Fenced(_)) => {}
                // A full table refuses what it never heard of; there is nothing to fence then.
                Err(ShardError::NoSpace) if !fences.members.contains(&(volume, disk)) => {}
                Err(why) => {
                    return Err(RecoverError::Disk { disk: there.named(), why: why.to_string() });
                }
            }
        }
        Ok(())
    });
    join_all(each).await.into_iter().collect()
}
