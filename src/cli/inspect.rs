//! `sdsctl inspect …`: what lies on a disk, decoded without a node.
//!
//! Opens a block device or file for reading only, beside a daemon that may have it open, and shows
//! what the decoders of the engine make of it. Declares no format of its own. What it finds
//! damaged is part of the answer; the exit code tells that there is any.

mod disk;
mod record;
mod shard;

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde::{Serialize, Serializer};

use self::disk::VolumeName;
use super::Failure;
use super::output::Output;
use crate::disk::device::BlockDevice;
use crate::disk::uring::{Ring, UringDevice};
use crate::disk::{DiskOpenError, Inspection, ShardReader, inspect, superblock_copies};
use crate::id::{SegmentId, VolumeId};
use crate::shard::{Scheme, SegmentKind, ShardState};

/// Shortest prefix of an id that names a volume, characters.
const PREFIX_CHARS_MIN: usize = 4;

/// Decodes what is on a disk; VOLUME is POOL/NAME, an id, or the beginning of one.
#[derive(Debug, Subcommand)]
pub(super) enum InspectVerb {
    /// Superblocks, tables, fences and root mirrors of a disk
    Disk {
        /// Block device or file
        path: PathBuf,
        /// Lists every slot that holds a shard
        #[arg(long)]
        slots: bool,
    },
    /// The part of a segment that lies on a disk: its slot, its records, their checksums
    #[command(after_help = "Examples:\n  sdsctl inspect disk sds-data/disk0.img --slots\n  \
                            sdsctl inspect segment sds-data/disk0.img default/vol0 65539")]
    Segment {
        /// Block device or file
        path: PathBuf,
        /// POOL/NAME, an id, or the beginning of one
        volume: String,
        /// Number of the segment
        segment: u64,
        /// Lists every block with its checksum
        #[arg(long)]
        blocks: bool,
    },
    /// One record of a segment, whole: header, entries, a checksum for each block
    Record {
        /// Block device or file
        path: PathBuf,
        /// POOL/NAME, an id, or the beginning of one
        volume: String,
        /// Number of the segment
        segment: u64,
        /// Block of the shard at which the record begins, as `inspect segment` lists it
        offset: u32,
    },
}

/// Why there is nothing to show, or what was shown is damaged.
#[derive(Debug, thiserror::Error)]
pub(super) enum InspectError {
    /// Not a disk that can be told anything of, or no such thing on it.
    #[error("{message}")]
    Nothing { message: String, hint: Option<String> },
    /// Shown, but damaged.
    #[error("{0}")]
    Damaged(String),
}

fn nothing(message: String) -> InspectError {
    InspectError::Nothing { message, hint: None }
}

/// Runs the verb.
pub(super) fn run(verb: &InspectVerb, out: &mut Output) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| nothing(format!("cannot start: {error}")))?;
    tokio::task::LocalSet::new().block_on(&runtime, run_local(verb, out))
}

async fn run_local(verb: &InspectVerb, out: &mut Output) -> Result<(), Failure> {
    let (InspectVerb::Disk { path, .. }
    | InspectVerb::Segment { path, .. }
    | InspectVerb::Record { path, .. }) = verb;
    let ring = Ring::new().map_err(|why| nothing(format!("io_uring is not available: {why}")))?;
    let (device, in_use) =
        UringDevice::open_beside(path, &ring).map_err(|error| nothing(error.to_string()))?;
    let subject = Subject { path: path.display().to_string(), in_use };
    let damage = match verb {
        InspectVerb::Disk { slots, .. } => {
            let copies = superblock_copies(&device).await;
            let found = look(&device, path).await?;
            let report = disk::DiskReport::new(subject, device.size(), &copies, &found, *slots);
            out.show(&report, disk::DiskReport::text)?;
            report.damage()
        }
        InspectVerb::Segment { volume, segment, blocks, .. } => {
            let found = look(&device, path).await?;
            let reader = find_shard(&found, &device, path, volume, SegmentId(*segment))?;
            let report = shard::SegmentReport::read(subject, &found, &reader, *blocks).await;
            out.show(&report, shard::SegmentReport::text)?;
            report.damage()
        }
        InspectVerb::Record { volume, segment, offset, .. } => {
            let found = look(&device, path).await?;
            let reader = find_shard(&found, &device, path, volume, SegmentId(*segment))?;
            let report = record::RecordReport::read(subject, &found, &reader, *offset).await?;
            out.show(&report, record::RecordReport::text)?;
            report.damage()
        }
    };
    damage.map_or(Ok(()), |what| Err(InspectError::Damaged(what).into()))
}

/// What is on the disk, or a sentence why that cannot be told.
async fn look(device: &dyn BlockDevice, path: &Path) -> Result<Inspection, InspectError> {
    inspect(device).await.map_err(|error| {
        let hint = match &error {
            DiskOpenError::NewerVersion(_) => Some("use the sdsctl of that version"),
            DiskOpenError::Foreign | DiskOpenError::NotFormatted => {
                Some("disks of a node: sdsctl disk ls")
            }
            DiskOpenError::HalfFormatted => Some("nothing was ever stored on it"),
            _ => None,
        };
        let message = format!("{}: {error}", path.display());
        InspectError::Nothing { message, hint: hint.map(str::to_owned) }
    })
}

/// The shard of a segment on the disk.
fn find_shard<'a>(
    found: &Inspection,
    device: &'a dyn BlockDevice,
    path: &Path,
    volume: &str,
    segment: SegmentId,
) -> Result<ShardReader<'a>, InspectError> {
    let volume = find_volume(found, path, volume)?;
    found.shard(device, volume, segment).ok_or_else(|| {
        let path = path.display();
        let unread = match found.slots_unreadable {
            0 => String::new(),
            slots => format!(" that could be read; {slots} slots are unreadable"),
        };
        InspectError::Nothing {
            message: format!(
                "{path}: no shard of segment {segment} of volume {volume} on this disk{unread}"
            ),
            hint: Some(format!("what is there: sdsctl inspect disk {path} --slots")),
        }
    })
}

/// The volume that `what` names: any that has a fence or a shard on the disk.
fn find_volume(found: &Inspection, path: &Path, what: &str) -> Result<VolumeId, InspectError> {
    if let Ok(id) = what.parse() {
        return Ok(id);
    }
    let prefix = what.to_ascii_lowercase();
    let is_prefix = prefix.len() >= PREFIX_CHARS_MIN;
    let fences = found.volumes.iter().map(|fence| (fence.volume, VolumeName::of(fence)));
    let shards = found.slots.iter().map(|(_, record)| (record.spec.volume, None));
    let mut ids: Vec<VolumeId> = fences
        .chain(shards)
        .filter(|(id, name)| {
            name.as_ref().is_some_and(|name| name.0 == what)
                || (is_prefix && id.to_string().starts_with(&prefix))
        })
        .map(|(id, _)| id)
        .collect();
    ids.sort_unstable();
    ids.dedup();
    let path = path.display();
    let message = match ids[..] {
        [id] => return Ok(id),
        [] => format!("{path}: nothing of a volume {what:?} on this disk"),
        _ => format!("{path}: {what:?} names {} volumes", ids.len()),
    };
    let hint = Some(format!("name it by POOL/NAME or its id; see: sdsctl inspect disk {path}"));
    Err(InspectError::Nothing { message, hint })
}

/// What is looked at.
#[derive(Serialize)]
struct Subject {
    path: String,
    /// A process has it open: what is shown may be changing, and may lack what is newest.
    in_use: bool,
}

impl Subject {
    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![("path", self.path.clone())];
        if self.in_use {
            let text = "in use by a process: what is shown may be changing as it is read";
            lines.push(("note", text.to_owned()));
        }
        lines
    }
}

fn as_text<T: ToString, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&value.to_string())
}

/// A checksum as people write it.
fn hex(crc: u32) -> String {
    format!("{crc:08x}")
}

fn scheme_text(scheme: Scheme) -> String {
    match scheme {
        Scheme { data: 1, parity } => format!("{} copies", u16::from(parity) + 1),
        Scheme { data, parity } => format!("{data}+{parity}"),
    }
}

fn kind_text(kind: SegmentKind) -> &'static str {
    match kind {
        SegmentKind::Log => "log",
        SegmentKind::Data => "data",
        SegmentKind::Meta => "meta",
    }
}

fn state_text(state: ShardState) -> &'static str {
    match state {
        ShardState::Open => "open",
        ShardState::Closed => "closed",
        ShardState::Sealed => "sealed",
    }
}
