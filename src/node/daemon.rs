//! The process around a node: its directory, sockets, signals and threads.
//!
//! Threads: the calling thread is the core (runtime, ring, disks, heads, NBD, the client of an
//! etcd); an embedded metadata store and the admin HTTP server have one each. Nothing of the data
//! path waits for either.

use std::fs::File;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::LocalSet;

use super::care::Care;
use super::cluster::process::{Door, Told};
use super::dev::DevOptions;
use super::opener::{DeviceOpener, UringOpener};
use super::space::SpaceLevels;
use super::{Exports, LocalExports, Node, NodeOptions, descriptors, store};
use crate::admin::access::Access;
use crate::admin::backend::{self, COMMAND_TIMEOUT, COMMANDS_WAITING_MAX};
use crate::admin::server;
use crate::config::{Config, NbdConfig, TlsConfig};
use crate::disk::uring::Ring;
use crate::env::{Env, wall_clock};
use crate::export::nbd::{self, Server, TlsMode, UnixSocket};
use crate::meta::MetaStore;
use crate::units::TimeSpan;
use crate::volume::head::HeadConfig;

/// File name of the metadata store in the data directory.
pub const STORE_FILE: &str = "meta.redb";
/// File name of the lock that keeps a second process out.
const LOCK_FILE: &str = "lock";

/// Why the daemon does not run: a sentence for the operator.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct DaemonError(pub String);

/// Makes an error of any other.
pub(super) fn fail<T>(message: impl std::fmt::Display) -> Result<T, DaemonError> {
    Err(DaemonError(message.to_string()))
}

pub(super) fn error(message: impl std::fmt::Display) -> DaemonError {
    DaemonError(message.to_string())
}

/// Where a started node can be reached.
#[derive(Debug, Clone)]
pub struct Addresses {
    /// TCP addresses of NBD.
    pub nbd: Vec<SocketAddr>,
    /// Unix socket of NBD.
    pub nbd_socket: Option<PathBuf>,
    /// Address of the admin API.
    pub admin: SocketAddr,
}

/// Runs a node until it is told to stop by SIGINT or SIGTERM. `ready` is called once it serves.
/// With `dev`, the directory is prepared first.
///
/// # Errors
/// [`DaemonError`]: the node did not start, or its sockets failed.
pub fn run(
    config: &Config,
    dev: Option<&DevOptions>,
    ready: &dyn Fn(&Addresses),
) -> Result<(), DaemonError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|why| error(format!("cannot start the runtime: {why}")))?;
    LocalSet::new().block_on(&runtime, run_local(config, dev, ready))
}

/// Keeps a second process out of a directory.
pub(super) struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    /// Makes the directory if need be and locks it.
    pub(super) fn take(dir: &Path) -> Result<Self, DaemonError> {
        let named = |why: std::io::Error| error(format!("cannot use {}: {why}", dir.display()));
        std::fs::create_dir_all(dir).map_err(named)?;
        let path = dir.join(LOCK_FILE);
        let options = File::options().create(true).truncate(false).write(true).open(path);
        let file = options.map_err(named)?;
        // SAFETY: flock takes an open descriptor and no pointers.
        if unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } == 0 {
            return Ok(Self { _file: file });
        }
        let why = std::io::Error::last_os_error();
        if why.kind() == std::io::ErrorKind::WouldBlock {
            return fail(format!("another sdsd runs on {}", dir.display()));
        }
        Err(named(why))
    }
}

/// The listening sockets.
struct Sockets {
    nbd: Vec<TcpListener>,
    nbd_socket: Option<UnixSocket>,
    admin: std::net::TcpListener,
    addresses: Addresses,
}

impl Sockets {
    async fn bind(config: &Config) -> Result<Self, DaemonError> {
        let mut nbd = Vec::new();
        for address in &config.nbd.addresses {
            let listener = TcpListener::bind(address).await;
            nbd.push(
                listener.map_err(|why| error(format!("cannot serve NBD on {address}: {why}")))?,
            );
        }
        let path = config.nbd.socket.clone();
        let nbd_socket = path.as_deref().map(UnixSocket::bind).transpose();
        let nbd_socket =
            nbd_socket.map_err(|why| error(format!("cannot serve NBD on a unix socket: {why}")))?;
        let address = config.admin.address;
        let failed = |why| error(format!("cannot serve the admin API on {address}: {why}"));
        let admin = std::net::TcpListener::bind(address).map_err(failed)?;
        admin.set_nonblocking(true).map_err(failed)?;
        let addresses = Addresses {
            nbd: nbd.iter().filter_map(|listener| listener.local_addr().ok()).collect(),
            nbd_socket: path,
            admin: admin.local_addr().map_err(failed)?,
        };
        Ok(Self { nbd, nbd_socket, admin, addresses })
    }
}

/// What the configuration says of a node that is alone.
fn node_options(
    config: &Config,
    env: Env,
    store: Rc<dyn MetaStore>,
    opener: Rc<dyn DeviceOpener>,
) -> NodeOptions {
    let TimeSpan(period) = config.scrub.period;
    NodeOptions {
        name: config.node.clone(),
        env,
        store,
        opener,
        cluster: None,
        head: HeadConfig {
            overlay_extents_max: config.cache.overlay_extents,
            scrub_period: (!period.is_zero()).then_some(period),
            balance_every: HeadConfig::default().balance_every.filter(|_| config.cluster.balance),
            unix_seconds,
            ..HeadConfig::default()
        },
        space: SpaceLevels {
            warning_percent: config.space.warning_percent,
            critical_percent: config.space.critical_percent,
            overcommit_percent: config.space.overcommit_percent,
        },
        care: Care {
            set_aside_after: Duration::from_secs(config.care.set_aside_seconds),
            smart_every: Duration::from_secs(config.care.smart_seconds),
        },
        index_cache_bytes: usize::try_from(config.cache.index.0).unwrap_or(usize::MAX),
        unix_seconds,
    }
}

async fn run_local(
    config: &Config,
    dev: Option<&DevOptions>,
    ready: &dyn Fn(&Addresses),
) -> Result<(), DaemonError> {
    let mut signals = Signals::listen()?;
    let files_max = descriptors::raise_limit();
    let _lock = DirectoryLock::take(&config.data_dir)?;
    let tls = config.nbd.tls.as_ref().map(load_tls).transpose()?;
    let access = Access::load(config).map_err(error)?;
    let sockets = Sockets::bind(config).await?;
    let door = Door::open(config).await?;
    let ring = Ring::new().map_err(|why| error(format!("io_uring is not available: {why}")))?;
    let opener: Rc<dyn DeviceOpener> = Rc::new(UringOpener::new(ring));
    let env = Env::from_entropy();
    let paths: Vec<String> = match dev {
        Some(dev) => dev.prepare(&*opener).await?,
        None => absolute(&config.disks)?,
    };
    let known = door.as_ref().and_then(Door::holder).map(|holder| holder.cluster);
    let store = store::open(config, known, &*opener, &env, &paths).await?;
    let told = || Told { admin: sockets.addresses.admin, exports: uris(&sockets.addresses) };
    let cluster = door.as_ref().map(|door| door.options(config, &env, told())).transpose()?;
    let options = NodeOptions { cluster, ..node_options(config, env, store, opener) };
    let listed = if dev.is_some_and(DevOptions::is_made) { &[][..] } else { &paths };
    let node = Node::start(options, listed).await.map_err(error)?;
    let others = door.map(|door| door.serve(&node));
    let (backend, commands) = backend::channel(COMMANDS_WAITING_MAX, COMMAND_TIMEOUT);
    let admin = AdminThread::start(sockets.admin, backend, access)?;
    tokio::task::spawn_local(node.clone().serve(commands));
    let listening = (sockets.nbd, sockets.nbd_socket);
    let exports = NbdService::start(&node, &config.nbd, (tls, files_max), listening);
    node.set_exports(uris(&sockets.addresses), exports.tcp.metrics().clone());
    let prepared = match dev {
        Some(dev) => dev.finish(&node).await,
        None => Ok(()),
    };
    if prepared.is_ok() {
        ready(&sockets.addresses);
        signals.wait().await;
        tracing::info!("stopping");
    }
    tokio::task::spawn_local(async move {
        signals.wait().await;
        tracing::warn!("stopped at once by a second signal");
        std::process::exit(130);
    });
    exports.stop().await;
    admin.stop();
    node.stop().await;
    drop(others);
    prepared
}

/// SIGINT and SIGTERM.
pub(super) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    pub(super) fn listen() -> Result<Self, DaemonError> {
        let failed = |why| error(format!("cannot listen for signals: {why}"));
        Ok(Self {
            interrupt: signal(SignalKind::interrupt()).map_err(failed)?,
            terminate: signal(SignalKind::terminate()).map_err(failed)?,
        })
    }

    pub(super) async fn wait(&mut self) {
        tokio::select! {
            biased;
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// The NBD servers: TCP, perhaps with TLS, and the unix socket, without.
struct NbdService {
    tcp: Server,
    stop: watch::Sender<bool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl NbdService {
    fn start(
        node: &Rc<Node>,
        config: &NbdConfig,
        (tls, files_max): (Option<tokio_rustls::TlsAcceptor>, u64),
        (listeners, socket): (Vec<TcpListener>, Option<UnixSocket>),
    ) -> Self {
        let (stop, stopped) = watch::channel(false);
        let directory = Rc::new(Exports(node.clone()));
        let required = config.tls.as_ref().is_some_and(|tls| tls.required);
        let mode = match tls {
            None => TlsMode::Off,
            Some(acceptor) if required => TlsMode::Require(acceptor),
            Some(acceptor) => TlsMode::Allow(acceptor),
        };
        let plain = matches!(mode, TlsMode::Off);
        // With TLS, the unix socket has a server of its own.
        let servers = if plain || socket.is_none() { 1 } else { 2 };
        let connections_max = descriptors::connections_max(files_max, servers);
        let plain_settings = nbd::NbdConfig { connections_max, ..nbd::NbdConfig::default() };
        let settings = nbd::NbdConfig { tls: mode, ..plain_settings.clone() };
        let tcp = Server::new(directory, settings, stopped.clone());
        let local = Rc::new(LocalExports(node.clone()));
        let unix = if plain {
            tcp.with_directory(local)
        } else {
            Server::new(local, plain_settings, stopped)
        };
        let mut tasks = Vec::new();
        for listener in listeners {
            let server = tcp.clone();
            tasks.push(tokio::task::spawn_local(async move { server.serve_tcp(listener).await }));
        }
        if let Some(socket) = socket {
            tasks.push(tokio::task::spawn_local(async move { unix.serve_unix(socket).await }));
        }
        Self { tcp, stop, tasks }
    }

    async fn stop(self) {
        if self.stop.send(true).is_err() {
            tracing::debug!("no NBD server is left to stop");
        }
        for task in self.tasks {
            if let Err(why) = task.await {
                tracing::error!(%why, "an NBD server ended by a defect");
            }
        }
    }
}

/// The admin HTTP server on a thread of its own.
struct AdminThread {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl AdminThread {
    fn start(
        listener: std::net::TcpListener,
        backend: backend::ChannelBackend,
        access: Access,
    ) -> Result<Self, DaemonError> {
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|why| error(format!("cannot start the admin runtime: {why}")))?;
        let serve = move || {
            let result = runtime.block_on(async move {
                let listener = TcpListener::from_std(listener)?;
                let stopped = async move {
                    // Whether told to or left alone: stop.
                    stopped.await.ok();
                };
                server::serve_with(listener, std::sync::Arc::new(backend), access, stopped).await
            });
            if let Err(why) = result {
                tracing::error!(%why, "the admin API failed");
            }
        };
        let thread = std::thread::Builder::new()
            .name("sds-admin".into())
            .spawn(serve)
            .map_err(|why| error(format!("cannot start the admin thread: {why}")))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }

    /// Tells the server to stop; it ends by itself within its time-out.
    fn stop(mut self) {
        self.stop.take();
        // Not joined: a request may wait for this very thread.
        self.thread.take();
    }
}

/// Paths as the admin API shows them, whatever directory the daemon was started in.
pub(super) fn absolute(paths: &[PathBuf]) -> Result<Vec<String>, DaemonError> {
    let absolute = |path: &PathBuf| {
        let full = std::path::absolute(path).map_err(error)?;
        let text =
            full.to_str().ok_or_else(|| error(format!("{} is not UTF-8", path.display())))?;
        Ok(text.to_owned())
    };
    paths.iter().map(absolute).collect()
}

fn load_tls(config: &TlsConfig) -> Result<tokio_rustls::TlsAcceptor, DaemonError> {
    let read = |field: &str, path: &PathBuf| {
        let failed = |why| error(format!("nbd.tls.{field}: cannot read {}: {why}", path.display()));
        std::fs::read(path).map_err(failed)
    };
    let authority = config.client_ca.as_ref().map(|path| read("client_ca", path)).transpose()?;
    let (certificate, key) = (read("certificate", &config.certificate)?, read("key", &config.key)?);
    nbd::tls::acceptor(&certificate, &key, authority.as_deref())
        .map_err(|why| error(format!("nbd.tls: {why}")))
}

fn uris(addresses: &Addresses) -> Vec<(String, String)> {
    let tcp = addresses.nbd.iter().map(|address| (format!("nbd://{address}/"), String::new()));
    let unix = addresses
        .nbd_socket
        .iter()
        .map(|path| ("nbd+unix:///".to_owned(), format!("?socket={}", path.display())));
    tcp.chain(unix).collect()
}

/// Seconds since 1970.
pub(super) fn unix_seconds() -> u64 {
    wall_clock().as_secs()
}
