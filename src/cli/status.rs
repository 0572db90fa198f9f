//! `sdsctl status`.

use std::fmt::Write as _;
use std::io::{IsTerminal, stdout};
use std::thread;
use std::time::Duration;

use clap::Args;

use super::Failure;
use super::output::{
    Format, Output, Table, bar, fields, human_bytes, human_seconds, percent, printable, ratio,
    repair_progress, space,
};
use crate::admin::client::{Client, ClientError};
use crate::admin::types::{Capacity, HealthLevel, PoolCapacity, Status};

const CLEAR_SCREEN: &str = "\x1b[H\x1b[2J";
/// Characters of the bar that shows how far repair is.
const BAR_WIDTH: usize = 40;

/// Arguments of `status`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  sdsctl status --watch\n  sdsctl status --exit-code \
                        || echo needs attention")]
pub(super) struct StatusArgs {
    /// Show it again every SECONDS (2 if not given), until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "2",
          require_equals = true, value_parser = clap::value_parser!(u64).range(1..=3_600))]
    watch: Option<u64>,
    /// Exit with 4 unless the health is ok
    #[arg(long, conflicts_with = "watch")]
    exit_code: bool,
}

/// Shows the status once or again and again.
pub(super) fn run(args: &StatusArgs, client: &Client, out: &mut Output) -> Result<(), Failure> {
    let status = client.status()?;
    let Some(seconds) = args.watch else {
        out.show(&status, |status| table(status, false))?;
        return match status.health {
            HealthLevel::Warning | HealthLevel::Critical if args.exit_code => {
                Err(Failure::Unhealthy)
            }
            _ => Ok(()),
        };
    };
    let mut answer = Ok(status);
    let terminal = out.format() == Format::Table && stdout().is_terminal();
    loop {
        if terminal {
            out.text(CLEAR_SCREEN)?;
        }
        match answer {
            Ok(status) => out.show(&status, |status| table(status, terminal))?,
            // A node that restarts is what one watches for.
            Err(error @ ClientError::Connect { .. }) => {
                Failure::from(error).report(out.format())?;
            }
            Err(error) => return Err(error.into()),
        }
        thread::sleep(Duration::from_secs(seconds));
        answer = client.status();
    }
}

fn table(status: &Status, with_bar: bool) -> String {
    let disks = format!("{} of {} online", status.disks.online, status.disks.total);
    let mut volumes = status.volumes.total.to_string();
    for (count, what) in
        [(status.volumes.reduced, "reduced"), (status.volumes.unavailable, "not served")]
    {
        if count > 0 {
            write!(volumes, ", {count} {what}").expect("a string takes all");
        }
    }
    let mut pairs = vec![
        ("health", status.health.to_string()),
        ("disks", disks),
        ("volumes", volumes),
        ("capacity", capacity(&status.capacity)),
        ("space", space(&status.space)),
    ];
    if let Some(repair) = &status.repair {
        let mut line = repair_progress(repair);
        if with_bar {
            line = bar(repair.bytes_done, repair.bytes_total, BAR_WIDTH) + " " + &line;
        }
        pairs.push(("repair", line));
    }
    if let Some(balance) = &status.balance {
        pairs.push(("balance", repair_progress(balance)));
    } else if let Some(why) = &status.balance_waits {
        pairs.push(("balance", format!("waits: {}", printable(why))));
    }
    pairs.push(("version", status.version.clone()));
    pairs.push(("up", human_seconds(status.uptime_s)));
    let mut text = fields(&pairs);
    if !status.reasons.is_empty() {
        text += "\n";
        for reason in &status.reasons {
            let subject = printable(&reason.subject);
            let message = printable(&reason.message);
            writeln!(text, "{:<8}  {subject} {message}", reason.level).expect("a string takes all");
        }
    }
    if !status.pools.is_empty() {
        text += "\n";
        text += &pools(&status.pools);
    }
    text
}

fn pools(pools: &[PoolCapacity]) -> String {
    let mut table = Table::new(&[
        "POOL",
        ">RAW",
        ">USED",
        ">FREE",
        ">LIVE",
        ">RECLAIMABLE",
        ">FULL",
        ">WRITABLE",
        ">THIN",
        "FORECAST",
    ]);
    for pool in pools {
        let Capacity { raw, used, free } = pool.capacity;
        table.row(vec![
            pool.name.clone(),
            human_bytes(raw),
            human_bytes(used),
            human_bytes(free),
            human_bytes(pool.space.live),
            human_bytes(pool.space.reclaimable),
            format!("{}%", pool.fill.percent),
            human_bytes(pool.fill.writable),
            ratio(pool.fill.thin_percent),
            pool.fill.forecast.to_string(),
        ]);
    }
    let mut text = table.render();
    for pool in pools.iter().filter(|_| pools.len() > 1) {
        if let Some(repair) = &pool.repair {
            writeln!(text, "repair of {}: {}", pool.name, repair_progress(repair))
                .expect("a string takes all");
        }
    }
    text
}

fn capacity(capacity: &Capacity) -> String {
    let Capacity { raw, used, free } = *capacity;
    format!(
        "{} raw, {} used ({}), {} free",
        human_bytes(raw),
        human_bytes(used),
        percent(used, raw),
        human_bytes(free)
    )
}
