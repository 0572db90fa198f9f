//! `sdsctl pool …`.

use clap::{Args, Subcommand, ValueEnum};

use super::output::{Output, Table, fields, human_bytes, percent, ratio, repair_progress, space};
use super::{Failure, parse};
use crate::admin::client::Client;
use crate::admin::types::{CreatePool, FailureDomain, Forecast, Pool, PoolScheme};

/// Verbs on pools.
#[derive(Debug, Subcommand)]
pub(super) enum PoolVerb {
    /// Creates a pool
    #[command(after_help = "Examples:\n  sdsctl pool create default --ec 4+2\n  \
                            sdsctl pool create fast --replicas 3 --min-size 2")]
    Create {
        /// Name of the pool
        #[arg(value_parser = parse::pool_name)]
        name: String,
        #[command(flatten)]
        scheme: SchemeArgs,
        /// What no two parts of the same data may share
        #[arg(long, value_enum, default_value_t = Domain::Disk)]
        failure_domain: Domain,
        /// Writes wait below this many copies [default: 2; 1 with at most two copies]
        #[arg(long, value_name = "N")]
        min_size: Option<u8>,
    },
    /// Lists all pools
    #[command(visible_alias = "list")]
    Ls,
    /// Shows one pool in full
    Show {
        /// Name of the pool
        #[arg(value_parser = parse::pool_name)]
        name: String,
    },
    /// Removes a pool that has no volumes
    #[command(visible_alias = "delete")]
    Rm {
        /// Name of the pool
        #[arg(value_parser = parse::pool_name)]
        name: String,
    },
}

/// Exactly one of the two.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct SchemeArgs {
    /// Erasure coding: K data and M parity shards, 2+1 to 16+4
    #[arg(long, value_name = "K+M", value_parser = parse::erasure_code,
          allow_hyphen_values = true)]
    ec: Option<PoolScheme>,
    /// Replication: N copies, 1 to 5
    #[arg(long, value_name = "N", value_parser = parse::replicas, allow_negative_numbers = true)]
    replicas: Option<PoolScheme>,
}

/// A failure domain, as an argument.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Domain {
    /// Disks
    Disk,
    /// Nodes
    Node,
    /// Racks
    Rack,
}

impl From<Domain> for FailureDomain {
    fn from(domain: Domain) -> Self {
        match domain {
            Domain::Disk => Self::Disk,
            Domain::Node => Self::Node,
            Domain::Rack => Self::Rack,
        }
    }
}

/// Runs the verb.
pub(super) fn run(verb: &PoolVerb, client: &Client, out: &mut Output) -> Result<(), Failure> {
    match verb {
        PoolVerb::Create { name, scheme, failure_domain, min_size } => {
            let request = CreatePool {
                name: name.clone(),
                scheme: scheme.ec.or(scheme.replicas).ok_or_else(|| Failure::Usage {
                    message: "no scheme given".to_owned(),
                    hint: "add --ec K+M or --replicas N".to_owned(),
                })?,
                failure_domain: (*failure_domain).into(),
                min_size: *min_size,
            };
            request.check().map_err(|e| Failure::Usage {
                message: e.message,
                hint: e.hint.unwrap_or_else(|| "see: sdsctl pool create --help".to_owned()),
            })?;
            out.show(&client.create_pool(&request)?, |pool| {
                format!("created pool {} ({})\n", pool.name, pool.scheme)
            })?;
        }
        PoolVerb::Ls => out.show(&client.pools()?, |pools| table(pools))?,
        PoolVerb::Show { name } => out.show(&client.pool(name)?, details)?,
        PoolVerb::Rm { name } => {
            out.show(&client.remove_pool(name)?, |r| format!("removed pool {}\n", r.name))?;
        }
    }
    Ok(())
}

fn table(pools: &[Pool]) -> String {
    let mut table = Table::new(&[
        "NAME",
        "SCHEME",
        "DOMAIN",
        ">MIN",
        ">VOLUMES",
        ">STORED",
        ">USABLE",
        ">THIN",
        ">FULL",
        ">WRITABLE",
        "FORECAST",
    ]);
    for pool in pools {
        table.row(vec![
            pool.name.clone(),
            pool.scheme.to_string(),
            pool.failure_domain.to_string(),
            pool.min_size.to_string(),
            pool.volumes.to_string(),
            human_bytes(pool.stored),
            human_bytes(pool.usable),
            ratio(pool.fill.thin_percent),
            format!("{}%", pool.fill.percent),
            human_bytes(pool.fill.writable),
            pool.fill.forecast.to_string(),
        ]);
    }
    table.render()
}

fn details(pool: &Pool) -> String {
    let domains = format!(
        "{} ({} online, {} needed)",
        pool.failure_domain,
        pool.domains_online,
        pool.scheme.width()
    );
    let raw = format!(
        "{}, {} used ({}), {} free",
        human_bytes(pool.capacity.raw),
        human_bytes(pool.capacity.used),
        percent(pool.capacity.used, pool.capacity.raw),
        human_bytes(pool.capacity.free)
    );
    let provisioned = format!(
        "{}, {} times what is usable",
        human_bytes(pool.fill.provisioned),
        ratio(pool.fill.thin_percent)
    );
    let forecast = match pool.fill.forecast {
        Forecast::Growing { bytes_per_day, .. } => {
            format!("{}, growing by {} a day", pool.fill.forecast, human_bytes(bytes_per_day))
        }
        other => other.to_string(),
    };
    let repair = pool.repair.as_ref().map_or_else(|| "-".to_owned(), repair_progress);
    fields(&[
        ("name", pool.name.clone()),
        ("id", pool.id.to_string()),
        ("scheme", format!("{}, survives {} lost", pool.scheme, pool.scheme.tolerates())),
        ("failure domain", domains),
        ("min size", pool.min_size.to_string()),
        ("volumes", pool.volumes.to_string()),
        ("stored", human_bytes(pool.stored)),
        ("usable", human_bytes(pool.usable)),
        ("raw", raw),
        ("space", space(&pool.space)),
        ("full", format!("{}% of what clients may take", pool.fill.percent)),
        ("writable", human_bytes(pool.fill.writable)),
        ("provisioned", provisioned),
        ("forecast", forecast),
        ("repair", repair),
    ])
}
