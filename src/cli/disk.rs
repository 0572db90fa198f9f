//! `sdsctl disk …`.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Subcommand;

use super::output::{Output, Table, fields, human_bytes, non_empty, percent, space};
use super::{Failure, parse};
use crate::admin::client::{Client, ClientError};
use crate::admin::error::ApiError;
use crate::admin::types::{AddDisk, Disk, LatencyFigures, Smart};
use crate::id::DiskId;

/// Shortest prefix of an id that names a disk, characters.
const PREFIX_CHARS_MIN: usize = 4;

/// Verbs on disks; DISK is an id, the beginning of one (4 characters or more), or a path.
#[derive(Debug, Subcommand)]
pub(super) enum DiskVerb {
    /// Formats a block device or a file and adds it to the node
    #[command(after_help = "Examples:\n  sdsctl disk add /dev/sdb\n  \
                            sdsctl disk add /srv/sds/disk7 --size 100G")]
    Add {
        /// Path on the node; a relative one is taken from the current directory
        path: PathBuf,
        /// Creates a file of this size if there is none at PATH
        #[arg(long, value_parser = parse::size, allow_negative_numbers = true)]
        size: Option<u64>,
        /// Format it even if it carries something
        #[arg(long)]
        yes: bool,
    },
    /// Lists all disks; one that is much slower than its peers is "slow"
    #[command(visible_alias = "list")]
    Ls,
    /// Shows one disk in full: latencies against its peers', SMART data where smartctl is there
    Show {
        /// Id, beginning of an id, or path
        disk: String,
    },
    /// Takes a disk out of the node for good, once it is empty
    #[command(visible_alias = "delete")]
    Rm {
        /// Id, beginning of an id, or path
        disk: String,
        /// Even if it holds data, which is then rebuilt elsewhere
        #[arg(long)]
        yes: bool,
    },
    /// Takes a disk out of service until it is put online again
    Offline {
        /// Id, beginning of an id, or path
        disk: String,
    },
    /// Has all data leave a disk, which stays in the node; `disk online` takes it back
    Drain {
        /// Id, beginning of an id, or path
        disk: String,
    },
    /// Has another disk take the place of one, dead or alive, which is removed once it is empty
    #[command(after_help = "Examples:\n  sdsctl disk replace 3f2a /dev/sdq\n  \
                            sdsctl disk replace /dev/sdb /dev/sdb     # another is plugged in there")]
    Replace {
        /// The disk that goes: id, beginning of an id, or path
        old: String,
        /// Path of the new one, which is added unless the node has it already
        new: PathBuf,
        /// Creates a file of this size if there is none at NEW
        #[arg(long, value_parser = parse::size, allow_negative_numbers = true)]
        size: Option<u64>,
        /// Format it even if it carries something
        #[arg(long)]
        yes: bool,
    },
    /// Opens a disk again that is offline, set aside, failed or missing, and keeps one that is being drained
    Online {
        /// Id, beginning of an id, or path
        disk: String,
    },
}

/// Runs the verb.
pub(super) fn run(verb: &DiskVerb, client: &Client, out: &mut Output) -> Result<(), Failure> {
    match verb {
        DiskVerb::Add { path, size, yes } => {
            let request = AddDisk { path: absolute(path)?, size: *size, force: *yes };
            out.show(&client.add_disk(&request)?, |disk| {
                format!("added {} as {}\n", disk.path, disk.id)
            })?;
        }
        DiskVerb::Ls => out.show(&client.disks()?, |disks| table(disks))?,
        DiskVerb::Show { disk } => out.show(&client.disk(find(client, disk)?)?, details)?,
        DiskVerb::Rm { disk, yes } => {
            out.show(&client.remove_disk(find(client, disk)?, *yes)?, |removed| {
                format!("removed disk {}\n", removed.name)
            })?;
        }
        DiskVerb::Offline { disk } => {
            out.show(&client.offline_disk(find(client, disk)?)?, state)?;
        }
        DiskVerb::Drain { disk } => {
            out.show(&client.drain_disk(find(client, disk)?)?, state)?;
        }
        DiskVerb::Replace { old, new, size, yes } => {
            let request = AddDisk { path: absolute(new)?, size: *size, force: *yes };
            out.show(&client.replace_disk(find(client, old)?, &request)?, |disk| {
                format!(
                    "disk {} ({}) takes the place of {old}, which is removed once it is empty\n",
                    disk.id, disk.path
                )
            })?;
        }
        DiskVerb::Online { disk } => out.show(&client.online_disk(find(client, disk)?)?, state)?,
    }
    Ok(())
}

fn absolute(path: &PathBuf) -> Result<String, Failure> {
    let usage = |reason: String| Failure::Usage {
        message: format!("disk path {}: {reason}", path.display()),
        hint: "give the absolute path of a block device or a file on the node".to_owned(),
    };
    let absolute = std::path::absolute(path).map_err(|e| usage(e.to_string()))?;
    absolute.into_os_string().into_string().map_err(|_| usage("is not UTF-8".to_owned()))
}

/// The disk that `what` names.
fn find(client: &Client, what: &str) -> Result<DiskId, Failure> {
    if let Ok(id) = what.parse() {
        return Ok(id);
    }
    let disks = client.disks()?;
    let prefix = what.to_ascii_lowercase();
    let is_prefix = prefix.len() >= PREFIX_CHARS_MIN;
    let found: Vec<_> = disks
        .iter()
        .filter(|d| d.path == what || (is_prefix && d.id.to_string().starts_with(&prefix)))
        .collect();
    match found[..] {
        [disk] => Ok(disk.id),
        [] => Err(Failure::Client(ClientError::Api(
            ApiError::not_found(format!("no disk {what:?}")).with_hint(
                "name it by its id, at least 4 characters of it, or its path; see: \
                            sdsctl disk ls",
            ),
        ))),
        _ => Err(Failure::Usage {
            message: format!("{what:?} names {} disks", found.len()),
            hint: "give more of the id; see: sdsctl disk ls".to_owned(),
        }),
    }
}

fn state(disk: &Disk) -> String {
    format!("disk {} ({}) is {}\n", disk.id, disk.path, disk.state)
}

fn table(disks: &[Disk]) -> String {
    let mut table = Table::new(&[
        "ID",
        "PATH",
        "STATE",
        ">SIZE",
        ">USED",
        ">USE",
        ">LIVE",
        ">RECLAIMABLE",
        ">ERRORS",
        ">APPEND",
        ">READ",
        ">P99/PEERS",
    ]);
    for disk in disks {
        table.row(vec![
            disk.id.to_string(),
            disk.place(),
            disk.state.to_string(),
            human_bytes(disk.size),
            human_bytes(disk.used),
            percent(disk.slots_used.into(), disk.slots.into()),
            human_bytes(disk.space.live),
            human_bytes(disk.space.reclaimable),
            disk.errors.total().to_string(),
            format!("{} µs", disk.latency.append_us),
            format!("{} µs", disk.latency.read_us),
            against_peers(disk),
        ]);
    }
    table.render()
}

/// The 99th percentile of the latest appends, or reads where there were none, and the peers'.
fn against_peers(disk: &Disk) -> String {
    let figures = disk.timing.append.or(disk.timing.read);
    figures.map_or_else(|| "-".to_owned(), |f| format!("{}/{} µs", f.p99_us, f.peers_p99_us))
}

fn figures(of: Option<LatencyFigures>) -> String {
    of.map_or_else(
        || "-".to_owned(),
        |f| {
            format!(
                "p50 {} µs, p99 {} µs; its peers {} µs, {} µs",
                f.p50_us, f.p99_us, f.peers_p50_us, f.peers_p99_us
            )
        },
    )
}

fn smart(of: &Smart) -> String {
    let health = match of.passed {
        Some(true) => "passed",
        Some(false) => "EXPECTS TO FAIL",
        None => "no judgement",
    };
    let mut text = health.to_owned();
    let mut add = |count: Option<u64>, what: &str| {
        if let Some(count) = count {
            write!(text, ", {count} {what}").expect("a string takes all");
        }
    };
    add(of.reallocated_sectors, "sectors reallocated");
    add(of.pending_sectors, "pending");
    add(of.uncorrectable_sectors, "uncorrectable");
    add(of.media_errors, "errors of the medium");
    add(of.wear_percent, "% worn");
    add(of.power_on_hours, "hours on");
    add(of.temperature_c.and_then(|degrees| u64::try_from(degrees).ok()), "°C");
    text + &of.model.as_ref().map(|model| format!(" ({model})")).unwrap_or_default()
}

fn details(disk: &Disk) -> String {
    let slots = format!(
        "{} of {} in use ({}), {} each",
        disk.slots_used,
        disk.slots,
        percent(disk.slots_used.into(), disk.slots.into()),
        human_bytes(disk.slot_bytes)
    );
    let errors = format!(
        "{} I/O, {} checksum, {} time-out",
        disk.errors.io, disk.errors.checksum, disk.errors.timeout
    );
    let latency =
        format!("append {} µs, read {} µs (mean)", disk.latency.append_us, disk.latency.read_us);
    let mut pairs = vec![
        ("id", disk.id.to_string()),
        ("path", disk.place()),
        ("state", disk.state.to_string()),
        ("reason", non_empty(disk.state_reason.clone().unwrap_or_default(), "-")),
        ("size", human_bytes(disk.size)),
        ("space", space(&disk.space)),
        ("slots", slots),
        ("errors", errors),
        ("latency", latency),
        ("appends", figures(disk.timing.append)),
        ("reads", figures(disk.timing.read)),
        ("tables", figures(disk.timing.control)),
    ];
    if let Some(data) = &disk.smart {
        pairs.push(("smart", smart(data)));
    }
    fields(&pairs)
}
