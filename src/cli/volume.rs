//! `sdsctl volume …`.

use std::fmt::Write as _;

use clap::Subcommand;

use super::output::{Output, Table, fields, human_bytes, non_empty, repair_progress, space};
use super::{Failure, parse};
use crate::admin::client::Client;
use crate::admin::types::{CreateVolume, Narrowed, ResizeVolume, Volume, VolumeName};
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
    /// Changes the size of a volume
    ///
    /// It grows while clients are attached (they see it when they attach again); to make it smaller, detach
    /// them first.
    #[command(after_help = "Examples:\n  sdsctl volume resize default/vm1 --size 20G\n  \
                            sdsctl volume resize default/vm1 --size 5G --yes")]
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
            let before = client.volume(volume)?.size;
            out.show(&client.resize_volume(volume, &request)?, |v| resized(v, before))?;
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

fn resized(volume: &Volume, before: u64) -> String {
    let mut text = format!("volume {} has {} now", volume.name, ByteSize(volume.size));
    if let Some(cut) = before.checked_sub(volume.size).filter(|cut| *cut > 0) {
        write!(text, "; its last {} were cut off", ByteSize(cut)).expect("a string takes all");
    }
    if volume.cutting > 0 {
        text += ", and their space comes back in the background";
    }
    text + "\n"
}

fn table(volumes: &[Volume]) -> String {
    let clustered = volumes.iter().any(|volume| !volume.node.is_empty());
    let mut titles = vec![
        "NAME",
        ">SIZE",
        ">ALLOCATED",
        ">USED",
        ">RECLAIMABLE",
        "STATE",
        "REDUNDANCY",
        "EXPORTS",
    ];
    if clustered {
        titles.insert(1, "NODE");
    }
    let mut table = Table::new(&titles);
    for volume in volumes {
        let mut row = vec![
            volume.name.clone(),
            human_bytes(volume.size),
            human_bytes(volume.allocated),
            human_bytes(volume.space.used),
            human_bytes(volume.space.reclaimable),
            volume.state.to_string(),
            volume.redundancy.to_string(),
            non_empty(volume.exports.join(" "), "-"),
        ];
        if clustered {
            row.insert(1, non_empty(volume.node.clone(), "-"));
        }
        table.row(row);
    }
    table.render()
}

fn narrowed(narrowed: Narrowed) -> String {
    format!(
        "to {}: {} of {} are still to be moved; survives {} further losses",
        narrowed.scheme,
        human_bytes(narrowed.to_narrow_bytes),
        human_bytes(narrowed.to_narrow_bytes.saturating_add(narrowed.narrow_bytes)),
        narrowed.tolerates
    )
}

fn details(volume: &Volume) -> String {
    let repair = volume.repair.as_ref().map_or_else(|| "-".to_owned(), repair_progress);
    let balance = volume.balance.as_ref().map_or_else(|| "-".to_owned(), repair_progress);
    fields(&[
        ("name", volume.name.clone()),
        ("id", volume.id.to_string()),
        ("size", format!("{} ({} bytes)", human_bytes(volume.size), volume.size)),
        ("cutting", if volume.cutting > 0 { human_bytes(volume.cutting) } else { "no".into() }),
        ("allocated", human_bytes(volume.allocated)),
        ("space", space(&volume.space)),
        ("state", volume.state.to_string()),
        ("redundancy", volume.redundancy.to_string()),
        ("narrowed", volume.narrowed.map_or_else(|| "no".into(), narrowed)),
        ("repair", repair),
        ("balance", balance),
        ("epoch", volume.epoch.clone()),
        ("exports", non_empty(volume.exports.join(" "), "-")),
        ("failures", non_empty(volume.failures.join("; "), "none")),
    ])
}
