//! `sdsd dev`: an all-in-one node in a directory, made at the first start.
//!
//! The store comes first, then the disks, the pool and the volume, then a marker that says that
//! all of it was made. A first start that was cut off goes on where it stopped; later ones only
//! compare the flags with what is there.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::daemon::{DaemonError, absolute, error, fail};
use super::opener::{DeviceOpener, OpenFailure, open_patiently};
use super::{DEFAULT_POOL, Node};
use crate::admin::types::{CreatePool, CreateVolume, FailureDomain, PoolScheme};
use crate::units::ByteSize;

/// Disks that are made unless told otherwise.
const DISKS: usize = 6;
/// Size of each, bytes.
const DISK_BYTES: u64 = 4 << 30;
/// Name and size of the volume.
const VOLUME: (&str, u64) = ("vol0", 10 << 30);
/// File that says that the first start was completed.
const MARKER_FILE: &str = "ready";
/// Most disks that are made.
const DISKS_MAX: usize = 64;

/// What was asked for; none where nothing was said.
#[derive(Debug, Clone, Default)]
pub struct DevOptions {
    /// The directory.
    pub dir: PathBuf,
    /// Number of disks.
    pub disks: Option<usize>,
    /// Size of each disk.
    pub disk_size: Option<ByteSize>,
    /// Redundancy of the pool.
    pub scheme: Option<PoolScheme>,
    /// The volume's name and size.
    pub volume: Option<(String, ByteSize)>,
}

impl DevOptions {
    fn marker(&self) -> PathBuf {
        self.dir.join(MARKER_FILE)
    }

    /// Whether the first start was completed.
    pub(super) fn is_made(&self) -> bool {
        self.marker().exists()
    }

    fn disk_path(dir: &Path, index: usize) -> PathBuf {
        dir.join(format!("disk{index}.img"))
    }

    /// Makes the files of the disks at the first start; the paths to use.
    pub(super) async fn prepare(
        &self,
        opener: &dyn DeviceOpener,
    ) -> Result<Vec<String>, DaemonError> {
        if self.is_made() {
            return absolute(&disk_files(&self.dir));
        }
        let count = self.disks.unwrap_or(DISKS);
        if !(1..=DISKS_MAX).contains(&count) {
            return fail(format!("--disks {count}: 1 to {DISKS_MAX} disks can be made"));
        }
        let size = self.disk_size.map_or(DISK_BYTES, |size| size.0);
        let paths: Vec<PathBuf> = (0..count).map(|i| Self::disk_path(&self.dir, i)).collect();
        let paths = absolute(&paths)?;
        for path in &paths {
            // Closed again at once; a file that has a size keeps it.
            match opener.open(path, Some(size)) {
                Ok(device) => drop(device),
                Err(OpenFailure::InUse(_)) => {
                    drop(open_patiently(opener, path).await.map_err(error)?);
                }
                Err(why) => return fail(why),
            }
        }
        Ok(paths)
    }

    /// Makes the pool and the volume at the first start; compares the flags at later ones.
    pub(super) async fn finish(&self, node: &Rc<Node>) -> Result<(), DaemonError> {
        self.check_disks(node)?;
        let made = self.is_made();
        let scheme = self.scheme.unwrap_or(PoolScheme::Ec { data: 4, parity: 2 });
        match node.view_pool(DEFAULT_POOL) {
            Ok(pool) => {
                if pool.scheme != scheme && (self.scheme.is_some() || !made) {
                    return fail(format!(
                        "pool {DEFAULT_POOL} in {} is {}, not {scheme}: leave the flag out, or \
                         use another --dir",
                        self.dir.display(),
                        pool.scheme
                    ));
                }
            }
            Err(_) if !made || self.scheme.is_some() => {
                let request = CreatePool {
                    name: DEFAULT_POOL.to_owned(),
                    scheme,
                    failure_domain: FailureDomain::Disk,
                    min_size: None,
                };
                node.create_pool(request).await.map_err(|why| told(&why))?;
            }
            Err(_) => {}
        }
        if !made || self.volume.is_some() {
            self.make_volume(node).await?;
        }
        if !made {
            let marker = self.marker();
            std::fs::File::create(&marker)
                .and_then(|file| file.sync_all())
                .and_then(|()| std::fs::File::open(&self.dir)?.sync_all())
                .map_err(|why| error(format!("cannot write {}: {why}", marker.display())))?;
        }
        Ok(())
    }

    async fn make_volume(&self, node: &Rc<Node>) -> Result<(), DaemonError> {
        let default = || (VOLUME.0.to_owned(), ByteSize(VOLUME.1));
        let (name, size) = self.volume.clone().unwrap_or_else(default);
        let name = if name.contains('/') { name } else { format!("{DEFAULT_POOL}/{name}") };
        let request = CreateVolume { name: name.clone(), size: size.0 };
        let parsed = request.check().map_err(|why| told(&why))?;
        if let Ok(slot) = node.find_volume(&parsed) {
            let there = ByteSize(slot.record.borrow().size_bytes);
            if there != size && self.volume.is_some() {
                return fail(format!(
                    "volume {name} in {} has {there}, not {size}: `sdsctl volume resize` changes \
                     it",
                    self.dir.display()
                ));
            }
            return Ok(());
        }
        node.create_volume(request).await.map_err(|why| told(&why))?;
        Ok(())
    }

    /// Whether the disks are those that the flags say.
    fn check_disks(&self, node: &Node) -> Result<(), DaemonError> {
        let slots = node.slots();
        let dir = self.dir.display();
        if let Some(wanted) = self.disks
            && wanted != slots.len()
        {
            let found = slots.len();
            return fail(format!(
                "there are {found} disks in {dir}, not {wanted}: leave --disks out, use another \
                 --dir, or add disks with `sdsctl disk add`"
            ));
        }
        let Some(wanted) = self.disk_size else { return Ok(()) };
        for slot in slots {
            let record = slot.record.borrow();
            if record.size_bytes != wanted.0 {
                let size = ByteSize(record.size_bytes);
                return fail(format!("disk {} has {size}, not {wanted}", record.path));
            }
        }
        Ok(())
    }
}

/// The disk files in a directory of `sdsd dev`.
pub fn disk_files(dir: &Path) -> Vec<PathBuf> {
    let paths = (0..DISKS_MAX).map(|index| DevOptions::disk_path(dir, index));
    paths.filter(|path| path.exists()).collect()
}

/// An admin error as a sentence.
fn told(why: &crate::admin::error::ApiError) -> DaemonError {
    match &why.hint {
        Some(hint) => error(format!("{why} ({hint})")),
        None => error(why),
    }
}
