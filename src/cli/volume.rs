//! `sdsctl volume …`.

use std::fmt::Write as _;

use clap::Subcommand;

use super::output::{Output, Table, fields, human_bytes, non_empty, repair_progress};
use super::{Failure, parse};
use crate::admin::client::Client;
use crate::admin::types::{CreateVolume, ResizeVolume, Volume, VolumeName};
use crate::units::ByteSize;

/// Verbs on volumes.
#[derive(Debug, Subcommand)]
pub(super) enum VolumeVerb {
    /// Creates a thin volume and exports it
    #[command(after_help = "Example:\n  sdsctl volume create default/vm1 --size 10G")]
    Create {
        /// Pool and name of the volume
        #[arg(value_name = "POOL/NAME", value_parser = parse::volume_name)]
        volume: VolumeName,
        /// Size that clients see, such as 10G or 512MiB; a multiple of 4096 bytes, at most 1024T
        #[arg(long, value_parser = parse::volume_size, allow_negative_numbers = true)]
        size: u64,
    },
    /// Lists all volumes, or those of one pool
    #[command(visible_alias = "list")]
    Ls {
        /// Only the volumes of this pool
        #[arg(value_parser = parse::pool_name)]
        pool: Option<String>,
    },
    /// Shows one volume in full
    Show {
        /// Pool and name of the volume
        #[arg(value_name = "POOL/NAME", value_parser = parse::volume_name)]
        volume: VolumeName,
    },
    /// Changes the size of a volume while it is in use
    #[command(after_help = "Example:\n  sdsctl volume resize default/vm1 --size 20G")]
    Resize {
        /// Pool and name of the volume
        #[arg(value_name = "POOL/NAME", value_parser = parse::volume_name)]
        volume: VolumeName,
        /// The new size, such as 20G
        #[arg(long, value_parser = parse::volume_size, allow_negative_numbers = true)]
        size: u64,
        /// Even if it becomes smaller, which destroys what lies beyond the new end
        #[arg(long)]
        yes: bool,
    },
    /// Removes a volume
    #[command(visible_alias = "delete")]
    Rm {
        /// Pool and name of the volume
        #[arg(value_name = "POOL/NAME", value_parser = parse::volume_name)]
        volume: VolumeName,
        /// Even if it holds data
        #[arg(long)]
        yes: bool,
    },
}

/// Runs the verb.
pub(super) fn run(verb: &VolumeVerb, client: &Client, out: &mut Output) -> Result<(), Failure> {
    match verb {
        VolumeVerb::Create { volume, size } => {
            let request = CreateVolume { name: volume.to_string(), size: *size };
            out.show(&client.create_volume(&request)?, created)?;
        }
        VolumeVerb::Ls { pool } => {
            out.show(&client.volumes(pool.as_deref())?, |volumes| table(volumes))?;
        }
        VolumeVerb::Show { volume } => out.show(&client.volume(volume)?, details)?,
        VolumeVerb::Resize { volume, size, yes } => {
            let request = ResizeVolume { size: *size, force: *yes };
            out.show(&client.resize_volume(volume, &request)?, |v| {
                format!("volume {} has {} now\n", v.name, ByteSize(v.size))
            })?;
        }
        VolumeVerb::Rm { volume, yes } => {
            out.show(&client.remove_volume(volume, *yes)?, |r| {
                format!("removed volume {}\n", r.name)
            })?;
        }
    }
    Ok(())
}

fn created(volume: &Volume) -> String {
    let mut text = format!("created volume {} of {}\n", volume.name, ByteSize(volume.size));
    for export in &volume.exports {
        writeln!(text, "attach it at {export}").expect("a string takes all");
    }
    text
}

fn table(volumes: &[Volume]) -> String {
    let mut table = Table::new(&["NAME", ">SIZE", ">ALLOCATED", "STATE", "REDUNDANCY", "EXPORTS"]);
    for volume in volumes {
        table.row(vec![
            volume.name.clone(),
            human_bytes(volume.size),
            human_bytes(volume.allocated),
            volume.state.to_string(),
            volume.redundancy.to_string(),
            non_empty(volume.exports.join(" "), "-"),
        ]);
    }
    table.render()
}

fn details(volume: &Volume) -> String {
    let repair = volume.repair.as_ref().map_or_else(|| "-".to_owned(), repair_progress);
    fields(&[
        ("name", volume.name.clone()),
        ("id", volume.id.to_string()),
        ("size", format!("{} ({} bytes)", human_bytes(volume.size), volume.size)),
        ("allocated", human_bytes(volume.allocated)),
        ("state", volume.state.to_string()),
        ("redundancy", volume.redundancy.to_string()),
        ("repair", repair),
        ("epoch", volume.epoch.clone()),
        ("exports", non_empty(volume.exports.join(" "), "-")),
        ("failures", non_empty(volume.failures.join("; "), "none")),
    ])
}
