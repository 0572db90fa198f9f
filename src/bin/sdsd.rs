//! The daemon: parses its arguments and runs a node.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program speaks to its user")]

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use sds::admin::types::PoolScheme;
use sds::config::{AdminConfig, Config, NbdConfig};
use sds::id::DiskId;
use sds::node::daemon::{self, Addresses};
use sds::node::dev::{DevOptions, disk_files};
use sds::node::recover;
use sds::trust::JoinToken;
use sds::units::ByteSize;

/// Software-defined block storage: the daemon of a node.
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, arg_required_else_help = true)]
struct Cli {
    /// Runs the node that this file describes.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Verb>,
}

#[derive(Subcommand)]
enum Verb {
    /// Runs an all-in-one node in a directory, which is made at the first start.
    Dev(Dev),
    /// Runs the node that a file describes.
    Run {
        /// The configuration, TOML.
        #[arg(long, value_name = "FILE")]
        config: PathBuf,
    },
    /// Rebuilds a lost metadata store from what the disks mirror.
    ///
    /// The store must be empty, and no sdsd may run: each other node of a cluster runs `sdsd recover --lend` instead.
    #[command(after_help = RECOVER_HELP)]
    Recover(Recover),
    /// Has this node join a cluster: fetches its credentials from a member.
    #[command(
        after_help = "The token comes from `sdsctl node token`, on a member of the cluster. \
                            `-` reads it from standard input, where `ps` does not see it."
    )]
    Join(Join),
}

const RECOVER_HELP: &str = "\
On each other node of the cluster:   sdsd recover --lend --config /etc/sds/sdsd.toml
then, on one node, naming all others: sdsd recover --config /etc/sds/sdsd.toml --from HOST:PORT --from HOST:PORT …
HOST:PORT is the [cluster] address of the other node. Every disk is needed that may know something newer; those that are
gone for good are named with --missing-disk. Then stop the lenders, and start sdsd everywhere. docs/cluster.md has
it step by step.";

#[derive(Args)]
struct Join {
    /// The join token, or `-`.
    token: String,
    /// Name of this node in the cluster, as `node` of its configuration says.
    #[arg(long, value_parser = parse_node)]
    name: String,
    /// Directory for the credentials.
    #[arg(long, default_value = "/etc/sds/node")]
    dir: PathBuf,
}

fn parse_node(text: &str) -> Result<String, String> {
    sds::admin::types::check_name("node", text)
        .map_err(|error| error.hint.unwrap_or(error.message))?;
    Ok(text.to_owned())
}

#[derive(Args)]
struct Recover {
    /// Directory of `sdsd dev`.
    #[arg(long, conflicts_with = "config", required_unless_present = "config")]
    dir: Option<PathBuf>,
    /// The configuration of the node, TOML.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A disk that is gone for good; may be given several times.
    #[arg(long, value_name = "ID")]
    missing_disk: Vec<DiskId>,
    /// A node that lends its disks; may be given several times.
    #[arg(long, value_name = "HOST:PORT", value_parser = parse_host_port)]
    from: Vec<String>,
    /// Rebuilds nothing, but lends the disks of this node to the node that does, until it is stopped.
    #[arg(long, conflicts_with_all = ["from", "missing_disk", "dir"])]
    lend: bool,
}

fn parse_host_port(text: &str) -> Result<String, String> {
    sds::config::check_host_port(text)?;
    Ok(text.to_owned())
}

#[derive(Args)]
struct Dev {
    /// Directory of the disks and the metadata store.
    #[arg(long, default_value = "sds-data")]
    dir: PathBuf,
    /// Number of disks (6).
    #[arg(long)]
    disks: Option<usize>,
    /// Size of each disk, sparse (4GiB).
    #[arg(long, value_name = "SIZE")]
    disk_size: Option<ByteSize>,
    /// Erasure coding of the pool: data and parity shards (4+2).
    #[arg(long, value_name = "K+M", value_parser = parse_ec, conflicts_with = "replicas")]
    ec: Option<PoolScheme>,
    /// Copies, instead of erasure coding.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=5))]
    replicas: Option<u8>,
    /// Name and size of the volume (vol0:10GiB).
    #[arg(long, value_name = "NAME:SIZE", value_parser = parse_volume)]
    volume: Option<(String, ByteSize)>,
    /// Address of NBD; port 0 takes any free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:10809")]
    nbd: SocketAddr,
    /// Unix socket of NBD, besides the address.
    #[arg(long, value_name = "PATH")]
    nbd_socket: Option<PathBuf>,
    /// Address of the admin API; port 0 takes any free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:9770")]
    admin: SocketAddr,
}

fn parse_ec(text: &str) -> Result<PoolScheme, String> {
    let parsed = text.split_once('+').and_then(|(k, m)| Some((k.parse().ok()?, m.parse().ok()?)));
    let Some((data, parity)) = parsed else {
        return Err("erasure coding is written K+M, for example 4+2".into());
    };
    let scheme = PoolScheme::Ec { data, parity };
    scheme.check().map_err(|error| error.hint.unwrap_or(error.message))?;
    Ok(scheme)
}

fn parse_volume(text: &str) -> Result<(String, ByteSize), String> {
    let (name, size) =
        text.rsplit_once(':').ok_or("a volume is written NAME:SIZE, for example vol0:10G")?;
    let size: ByteSize = size.parse().map_err(|error| format!("{error}"))?;
    Ok((name.to_owned(), size))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match (cli.command, cli.config) {
        (Some(Verb::Dev(args)), _) => dev(args),
        (Some(Verb::Run { config }), _) | (None, Some(config)) => run(&config),
        (Some(Verb::Recover(args)), _) => run_recover(&args),
        (Some(Verb::Join(args)), _) => join(&args),
        (None, None) => unreachable!("clap shows the help"),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("sdsd: {message}");
            ExitCode::FAILURE
        }
    }
}

fn run(path: &std::path::Path) -> Result<(), String> {
    let config = Config::load(path).map_err(|error| error.to_string())?;
    sds::obs::log::init(&config.log.level).map_err(|error| error.to_string())?;
    let ready = |at: &Addresses| tracing::info!(nbd = ?at.nbd, admin = %at.admin, "ready");
    daemon::run(&config, None, &ready).map_err(|error| error.to_string())
}

fn join(args: &Join) -> Result<(), String> {
    let mut token = args.token.clone();
    if token == "-" {
        token.clear();
        std::io::stdin().read_line(&mut token).map_err(|error| error.to_string())?;
    }
    let token: JoinToken = token.parse().map_err(|error: &str| error.to_owned())?;
    let told =
        sds::cli::join(&token, &args.name, &args.dir).map_err(|error| match error.hint() {
            Some(hint) => format!("{error}\n  hint: {hint}"),
            None => error.to_string(),
        })?;
    print!("{told}");
    Ok(())
}

fn run_recover(args: &Recover) -> Result<(), String> {
    sds::obs::log::init("warn").map_err(|error| error.to_string())?;
    let config = match (&args.dir, &args.config) {
        (Some(dir), _) => {
            Config { data_dir: dir.clone(), disks: disk_files(dir), ..Config::default() }
        }
        (None, Some(file)) => Config::load(file).map_err(|error| error.to_string())?,
        (None, None) => return Err("--dir or --config says where the disks are".into()),
    };
    if args.lend {
        return recover::lend(&config, &announce_loan).map_err(|error| error.to_string());
    }
    let order = recover::Order {
        from: &args.from,
        missing: args.missing_disk.iter().copied().collect(),
        progress: &|text| eprintln!("{text}"),
    };
    let rebuilt = recover::recover(&config, &order).map_err(|error| error.to_string())?;
    for note in &rebuilt.notes {
        println!("note: {note}");
    }
    println!(
        "the metadata store is rebuilt (incarnation {}); volumes: {}",
        rebuilt.incarnation,
        rebuilt.volumes.join(", ")
    );
    Ok(())
}

fn announce_loan(lent: &recover::Lent) {
    for (disk, path) in &lent.disks {
        println!("lent: disk {disk} ({path})");
    }
    for problem in &lent.problems {
        println!("not lent: {problem}");
    }
    println!(
        "{} disks are lent at {} until this is stopped, which is to be when `sdsd recover` is done",
        lent.disks.len(),
        lent.address
    );
}

fn dev(args: Dev) -> Result<(), String> {
    sds::obs::log::init("warn").map_err(|error| error.to_string())?;
    let dir = std::path::absolute(&args.dir).map_err(|error| error.to_string())?;
    let config = Config {
        data_dir: dir.clone(),
        nbd: NbdConfig { addresses: vec![args.nbd], socket: args.nbd_socket, tls: None },
        admin: AdminConfig { address: args.admin, tls: None },
        ..Config::default()
    };
    config.validate().map_err(|error| error.to_string())?;
    let scheme = args.replicas.map(|copies| PoolScheme::Replicas { copies }).or(args.ec);
    let name = args.volume.as_ref().map_or("vol0", |(name, _)| name).to_owned();
    let options = DevOptions {
        dir: dir.clone(),
        disks: args.disks,
        disk_size: args.disk_size,
        scheme,
        volume: args.volume,
    };
    let ready = |at: &Addresses| announce(at, &name, &dir);
    daemon::run(&config, Some(&options), &ready).map_err(|error| error.to_string())
}

/// Says where the node is, and what to try.
fn announce(at: &Addresses, volume: &str, dir: &std::path::Path) {
    use std::fmt::Write as _;
    use std::io::Write as _;
    let nbd = at.nbd.first().map_or_else(String::new, ToString::to_string);
    let uri = format!("nbd://{nbd}/{volume}");
    let mut text = String::from("sds is running; Ctrl-C stops it in order\n");
    let socket = at.nbd_socket.as_ref().map_or_else(String::new, |socket| {
        format!("  volume  nbd+unix:///{volume}?socket={}\n", socket.display())
    });
    write!(
        text,
        "  data    {}\n  volume  {uri}\n{socket}  admin   http://{}\ntry:\n  nbdinfo {uri}\n  \
         qemu-io -f raw {uri} -c 'write -P 7 0 1M' -c 'read -P 7 0 1M'\n  \
         {} --endpoint http://{} status\n",
        dir.display(),
        at.admin,
        sdsctl(),
        at.admin
    )
    .expect("a string takes everything");
    // Nobody has to read it.
    std::io::stdout().write_all(text.as_bytes()).ok();
}

/// How to call `sdsctl`: by the path beside this program, if it is there.
fn sdsctl() -> String {
    let beside = std::env::current_exe().map(|path| path.with_file_name("sdsctl"));
    match beside {
        Ok(path) if path.exists() => path.display().to_string(),
        _ => "cargo run --release --bin sdsctl --".to_owned(),
    }
}
