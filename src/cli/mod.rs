//! `sdsctl`: the command line, one file per family of verbs.
//!
//! Knows a node through the admin API ([`crate::admin::client`]) only; `inspect` alone looks at
//! disks itself, and `cluster` at an authority's files, and neither needs a node. Answers go to standard output, as a
//! table or as exactly the API's JSON; everything else goes to standard error. Every outcome has
//! its exit code ([`Failure::exit_code`]), so that scripts need not read texts.

mod cluster;
mod disk;
mod events;
mod inspect;
mod node;
mod output;
mod parse;
mod pool;
mod scrub;
mod status;
mod volume;

pub use node::{JoinError, join};

use std::io::{self, Write};
use std::process::ExitCode;

use std::path::{Path, PathBuf};

use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::admin::client::{Client, ClientError, DEFAULT_ENDPOINT};
use crate::admin::error::{ApiError, ErrorBody, ErrorCode};
use crate::trust::{ClientTls, Credentials, Kind, TrustError};
use inspect::InspectError;
use output::{Format, Output};

const AFTER_HELP: &str = "\
Exit codes:
  0  done
  1  the node refused the request, or failed
  2  wrong usage; also: data would be destroyed and --yes is missing
  3  cannot connect to the node
  4  the node is not healthy (status --exit-code only); what was inspected is damaged

Examples:
  sdsctl status
  sdsctl events --since 1h --level warning
  sdsctl disk add /dev/sdb
  sdsctl pool create fast --replicas 3
  sdsctl volume create default/vm1 --size 10G
  sdsctl -o json volume ls
  sdsctl scrub start --volume default/vm1
  sdsctl inspect disk sds-data/disk0.img --slots
  sdsctl cluster init --dir /etc/sds --name east
  sdsctl --endpoint https://10.0.0.5:9770 status --watch
  sdsctl --endpoint https://10.0.0.5:9770 node token";

/// Manages an sds node: disks, pools and volumes
#[derive(Debug, Parser)]
#[command(name = "sdsctl", version, after_help = AFTER_HELP, max_term_width = 100)]
struct Cli {
    /// Admin address of the node: https://HOST:PORT with TLS, http://HOST:PORT or HOST:PORT without
    #[arg(long, global = true, env = "SDS_ENDPOINT", default_value = DEFAULT_ENDPOINT,
          value_name = "URL")]
    endpoint: String,
    /// Directory with ca.pem, admin.pem and admin.key, for https://; by default ~/.config/sds or
    /// /etc/sds/admin, whichever is there
    #[arg(long, global = true, env = "SDS_CREDENTIALS", value_name = "DIR")]
    credentials: Option<PathBuf>,
    /// How to print answers; json is exactly what the API answers
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Health, capacity and progress of repairs at a glance
    Status(status::StatusArgs),
    /// What happened lately, on all nodes
    Events(events::EventArgs),
    /// The disks of the node
    #[command(subcommand, visible_alias = "disks")]
    Disk(disk::DiskVerb),
    /// Pools: how redundant data is, and over what
    #[command(subcommand, visible_alias = "pools")]
    Pool(pool::PoolVerb),
    /// Volumes: virtual disks in a pool
    #[command(subcommand, visible_alias = "volumes")]
    Volume(volume::VolumeVerb),
    /// Scrubs: reading and checking everything that is stored
    #[command(subcommand, visible_alias = "scrubs")]
    Scrub(scrub::ScrubVerb),
    /// Nodes of the cluster, and how more join
    #[command(subcommand, visible_alias = "nodes")]
    Node(node::NodeVerb),
    /// The authority of a cluster and what it signs; without a node
    #[command(subcommand)]
    Cluster(cluster::ClusterVerb),
    /// Decodes what is on a disk, without a node
    #[command(subcommand)]
    Inspect(inspect::InspectVerb),
    /// Prints a completion script for a shell
    #[command(after_help = "Example, for bash:\n  sdsctl completion bash \
                            > ~/.local/share/bash-completion/completions/sdsctl")]
    Completion {
        /// The shell
        shell: Shell,
    },
}

/// Why the command did not succeed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// The node or the way to it.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The arguments make no sense together with what the node has.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to do.
        hint: String,
    },
    /// The node is not `ok`; it was printed already.
    #[error("the node is not healthy")]
    Unhealthy,
    /// Credentials that are no good, or cannot be made.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// What lies on a disk.
    #[error(transparent)]
    Inspect(#[from] inspect::InspectError),
    /// Standard output cannot be written to.
    #[error("cannot print the answer: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Client(ClientError::Api(e)) if e.code == ErrorCode::ConfirmationRequired => 2,
            Self::Client(ClientError::Api(_) | ClientError::Protocol { .. })
            | Self::Output(_)
            | Self::Trust(_)
            | Self::Inspect(InspectError::Nothing { .. }) => 1,
            Self::Client(ClientError::Endpoint { .. }) | Self::Usage { .. } => 2,
            Self::Client(ClientError::Connect { .. }) => 3,
            Self::Unhealthy | Self::Inspect(InspectError::Damaged(_)) => 4,
        }
    }

    fn to_api_error(&self) -> ApiError {
        match self {
            Self::Client(ClientError::Api(e)) if e.code == ErrorCode::ConfirmationRequired => {
                e.clone().with_hint("add --yes to go on; what is destroyed does not come back")
            }
            Self::Client(error) => error.to_api_error(),
            Self::Usage { message, hint } => ApiError::invalid(message).with_hint(hint),
            Self::Inspect(InspectError::Nothing { message, hint: Some(hint) }) => {
                ApiError::invalid(message).with_hint(hint)
            }
            Self::Inspect(error) => ApiError::invalid(error.to_string()),
            Self::Trust(error) => ApiError::invalid(error.to_string()),
            Self::Unhealthy | Self::Output(_) => ApiError::internal(self.to_string()),
        }
    }

    /// Tells standard error, in the format asked for.
    fn report(&self, format: Format) -> io::Result<()> {
        let error = self.to_api_error();
        let mut err = io::stderr().lock();
        match format {
            Format::Json => writeln!(err, "{}", serde_json::to_string(&ErrorBody { error })?),
            Format::Table => {
                writeln!(err, "sdsctl: {}", error.message)?;
                error.hint.map_or(Ok(()), |hint| writeln!(err, "  hint: {hint}"))
            }
        }
    }
}

/// Runs `sdsctl` with the arguments of the process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of a pipe has seen enough.
        Err(Failure::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            let told = match failure {
                Failure::Unhealthy => Ok(()),
                _ => failure.report(cli.output),
            };
            // Without a standard error there is nobody left to tell but by the exit code.
            told.ok();
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    if let Verb::Completion { shell } = cli.verb {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "sdsctl", &mut script);
        return Ok(io::stdout().lock().write_all(&script)?);
    }
    let mut out = Output::new(cli.output);
    if let Verb::Inspect(verb) = &cli.verb {
        return inspect::run(verb, &mut out);
    }
    match &cli.verb {
        Verb::Cluster(verb) => return cluster::run(verb, &mut out),
        Verb::Node(node::NodeVerb::Renew { dir }) => {
            return node::renew(&cli.endpoint, dir, &mut out);
        }
        _ => {}
    }
    let client = client(cli)?;
    match &cli.verb {
        Verb::Node(node::NodeVerb::Ls) => node::list(&client, &mut out),
        Verb::Node(node::NodeVerb::Show { node }) => node::show(node, &client, &mut out),
        Verb::Node(node::NodeVerb::Drain { node }) => node::drain(node, true, &client, &mut out),
        Verb::Node(node::NodeVerb::Undrain { node }) => node::drain(node, false, &client, &mut out),
        Verb::Node(node::NodeVerb::Rm { node }) => node::remove(node, &client, &mut out),
        Verb::Node(node::NodeVerb::Token { ttl, address }) => {
            node::token(*ttl, address.as_ref(), &client, &mut out)
        }
        Verb::Status(args) => status::run(args, &client, &mut out),
        Verb::Events(args) => events::run(args, &client, &mut out),
        Verb::Disk(verb) => disk::run(verb, &client, &mut out),
        Verb::Pool(verb) => pool::run(verb, &client, &mut out),
        Verb::Volume(verb) => volume::run(verb, &client, &mut out),
        Verb::Scrub(verb) => scrub::run(verb, &client, &mut out),
        Verb::Inspect(_) | Verb::Completion { .. } | Verb::Cluster(_) | Verb::Node(_) => Ok(()),
    }
}

/// A client of the endpoint, with credentials if it has TLS.
fn client(cli: &Cli) -> Result<Client, Failure> {
    let plain = cli.endpoint.starts_with("http://");
    if plain || (cli.credentials.is_none() && !cli.endpoint.starts_with("https://")) {
        return Ok(Client::new(&cli.endpoint)?);
    }
    let Some(dir) = cli.credentials.clone().or_else(default_credentials) else {
        return Err(Failure::Usage {
            message: format!("{} needs credentials, and there are none", cli.endpoint),
            hint:
                "--credentials DIR; `sdsctl cluster init` makes the first, `sdsctl cluster issue \
                   --admin NAME` more"
                    .to_owned(),
        });
    };
    let credentials = Credentials::load(&dir, Kind::Admin)?;
    Ok(Client::with_tls(&cli.endpoint, &ClientTls::new(&credentials)?)?)
}

/// The directory of credentials if none is named.
fn default_credentials() -> Option<PathBuf> {
    let home = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".config")));
    let places = home.map(|home| home.join("sds")).into_iter().chain(["/etc/sds/admin".into()]);
    places.into_iter().find(|dir| dir.join("admin.pem").exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Cli::command().debug_assert();
    }
}
