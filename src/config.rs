//! The daemon's configuration: one TOML file, every field with a default, nothing unknown.
//!
//! ```toml
//! node = "node0"
//! data_dir = "/var/lib/sds"
//! disks = ["/dev/sdb", "/dev/sdc"]
//!
//! [store]
//! backend = "etcd"
//! endpoints = ["https://10.0.0.1:2379", "https://10.0.0.2:2379", "https://10.0.0.3:2379"]
//! ca = "/etc/sds/etcd-ca.pem"
//! certificate = "/etc/sds/etcd-client.pem"
//! key = "/etc/sds/etcd-client-key.pem"
//! user = "sds"
//! password_file = "/etc/sds/etcd-password"
//!
//! [nbd]
//! addresses = ["0.0.0.0:10809"]
//! socket = "/run/sds/nbd.sock"
//! tls = { certificate = "/etc/sds/cert.pem", key = "/etc/sds/key.pem", required = true }
//!
//! [admin]
//! address = "10.0.0.1:9770"
//!
//! [cluster]
//! address = "0.0.0.0:9771"
//! advertise = "10.0.0.1:9771"
//! rack = "a"
//! credentials = "/etc/sds/node"
//! authority = "/etc/sds/authority"
//! balance = true
//!
//! [cache]
//! index = "64MiB"
//! overlay_extents = 1_000_000
//!
//! [scrub]
//! period = "7d"
//!
//! [space]
//! warning_percent = 80
//! critical_percent = 90
//! overcommit_percent = 200
//!
//! [care]
//! set_aside_seconds = 600
//! smart_seconds = 3600
//!
//! [log]
//! level = "info"
//! ```

mod cluster;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use toml::de::DeTable;

pub use cluster::{ClusterConfig, check_host_port};

use crate::meta::etcd::{EtcdOptions, OptionsError};
use crate::meta::record::check_name;
use crate::units::{ByteSize, TimeSpan};
use crate::volume::SCRUB_PERIOD;

/// Largest configuration file, bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most disks of one node.
pub const DISKS_MAX: usize = 256;
/// Most addresses that NBD listens on.
pub const ADDRESSES_MAX: usize = 64;
/// Smallest index cache: a few paths through the tree.
pub const INDEX_CACHE_BYTES_MIN: u64 = 1 << 20;
/// Fewest extents of the overlay: several records' worth.
pub const OVERLAY_EXTENTS_MIN: usize = 1024;
/// Shortest period of scrubs but none: the disks would do little else.
pub const SCRUB_PERIOD_MIN: Duration = Duration::from_mins(1);
/// Longest period of scrubs.
pub const SCRUB_PERIOD_MAX: Duration = Duration::from_hours(10 * 365 * 24);
/// Longest path of a unix socket, bytes, as the kernel has it.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML, an unknown field, or a value of the wrong kind.
    #[error("{path}:{line}: {message}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong there.
        message: String,
    },
    /// A value that makes no sense.
    #[error("{place}{field}: {message}")]
    Value {
        /// `FILE:LINE: `, or nothing where there is no file.
        place: String,
        /// The field, such as `nbd.tls.key`.
        field: String,
        /// What is wrong with it.
        message: String,
    },
}

/// Configuration of `sdsd`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of this node in the cluster.
    pub node: String,
    /// Where the embedded metadata store lies, and the lock of the node.
    pub data_dir: PathBuf,
    /// Disks to use: block devices, or files that were formatted.
    pub disks: Vec<PathBuf>,
    /// The metadata store.
    pub store: StoreConfig,
    /// The NBD server.
    pub nbd: NbdConfig,
    /// The admin HTTP API.
    pub admin: AdminConfig,
    /// This node among the others of its cluster.
    pub cluster: ClusterConfig,
    /// What the caches may take.
    pub cache: CacheConfig,
    /// How often everything that is stored is read and checked.
    pub scrub: ScrubConfig,
    /// From when on pools are reported to fill up.
    pub space: SpaceConfig,
    /// What is done for sick disks.
    pub care: CareConfig,
    /// What is logged.
    pub log: LogConfig,
}

/// What keeps the metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StoreBackend {
    /// A file in [`Config::data_dir`], for one node.
    #[default]
    Embedded,
    /// An etcd.
    Etcd,
}

/// The metadata store. All but the backend is for etcd.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreConfig {
    /// What keeps it.
    pub backend: StoreBackend,
    /// URLs of the members of the etcd: `http://HOST:PORT` or `https://HOST:PORT`.
    pub endpoints: Vec<String>,
    /// What stands before `/sds/` in all keys, for an etcd that several clusters share.
    pub prefix: String,
    /// Authority of the members' certificates, PEM file; needed for `https`.
    pub ca: Option<PathBuf>,
    /// Certificate to show to the members, PEM file.
    pub certificate: Option<PathBuf>,
    /// Its private key, PEM file.
    pub key: Option<PathBuf>,
    /// User of the etcd.
    pub user: Option<String>,
    /// File with the user's password.
    pub password_file: Option<PathBuf>,
}

/// Where NBD is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NbdConfig {
    /// TCP addresses; may be empty.
    pub addresses: Vec<SocketAddr>,
    /// Path of a unix socket.
    pub socket: Option<PathBuf>,
    /// TLS over TCP; none refuses STARTTLS.
    pub tls: Option<TlsConfig>,
}

/// Certificates of the NBD server, PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConfig {
    /// Certificate chain of the server.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// Authority that clients' certificates must come from; none asks clients for nothing.
    #[serde(default)]
    pub client_ca: Option<PathBuf>,
    /// Refuses TCP clients without TLS.
    #[serde(default)]
    pub required: bool,
}

/// Where the admin HTTP API is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdminConfig {
    /// TCP address; anything but a loopback address needs TLS.
    pub address: SocketAddr,
    /// TLS with other files than those of [`ClusterConfig::credentials`], which are used if there are
    /// any; without either there is no TLS.
    pub tls: Option<AdminTlsConfig>,
}

/// Certificates of the admin HTTP API, PEM files. Clients need one of the same authority.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdminTlsConfig {
    /// Certificate of the node.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The cluster's authority.
    pub ca: PathBuf,
}

/// What the caches of the node may take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheConfig {
    /// Index pages of all volumes.
    pub index: ByteSize,
    /// Extents of the overlay of each volume (about 16 bytes each) before a checkpoint merges it.
    pub overlay_extents: usize,
}

/// How often everything that is stored is read and checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScrubConfig {
    /// Within how long each sealed shard is read once; `0s`: only when `sdsctl scrub start` asks.
    pub period: TimeSpan,
}

/// From when on pools are reported to fill up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SpaceConfig {
    /// Percent of what clients may take, garbage not counted, at which it is a warning.
    pub warning_percent: u64,
    /// The same at which it is critical.
    pub critical_percent: u64,
    /// Sizes of a pool's volumes together, percent of what it holds, above which it is a warning; 0
    /// never.
    pub overcommit_percent: u64,
}

/// What is done for disks that are slow or failing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CareConfig {
    /// Seconds for which a disk must have been slow or failing until it is set aside and what is on
    /// it rebuilt; 0 never does it.
    pub set_aside_seconds: u64,
    /// Seconds between two questions for SMART data, where `smartctl` is there; 0 never asks.
    pub smart_seconds: u64,
}

/// What is logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// A level (`error` to `trace`), or directives such as `info,sds::disk=debug`.
    pub level: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            node: "node0".into(),
            data_dir: "/var/lib/sds".into(),
            disks: Vec::new(),
            store: StoreConfig::default(),
            nbd: NbdConfig::default(),
            admin: AdminConfig::default(),
            cluster: ClusterConfig::default(),
            cache: CacheConfig::default(),
            scrub: ScrubConfig::default(),
            space: SpaceConfig::default(),
            care: CareConfig::default(),
            log: LogConfig::default(),
        }
    }
}

impl Default for NbdConfig {
    fn default() -> Self {
        Self { addresses: vec![SocketAddr::from(([127, 0, 0, 1], 10809))], socket: None, tls: None }
    }
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self { address: SocketAddr::from(([127, 0, 0, 1], 9770)), tls: None }
    }
}

impl Default for CacheConfig {
    fn default() -> Self {
        Self { index: ByteSize(16 << 20), overlay_extents: 256 << 10 }
    }
}

impl Default for ScrubConfig {
    fn default() -> Self {
        Self { period: TimeSpan(SCRUB_PERIOD) }
    }
}

impl Default for SpaceConfig {
    fn default() -> Self {
        Self { warning_percent: 80, critical_percent: 90, overcommit_percent: 200 }
    }
}

impl Default for CareConfig {
    fn default() -> Self {
        Self { set_aside_seconds: 600, smart_seconds: 3_600 }
    }
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".into() }
    }
}

fn refuse<T>(field: impl Into<String>, message: impl Into<String>) -> Result<T, ConfigError> {
    let (field, message) = (field.into(), message.into());
    Err(ConfigError::Value { place: String::new(), field, message })
}

/// Line of a byte of the text, from 1.
fn line_at(text: &str, byte: usize) -> usize {
    let before = text.get(..byte).unwrap_or(text);
    before.bytes().filter(|byte| *byte == b'\n').count() + 1
}

/// Line on which `field`, such as `nbd.tls.key`, stands in the text, or the last of the tables
/// around it that does; none if all of it is left to its default.
fn line_of(text: &str, field: &str) -> Option<usize> {
    let table = DeTable::parse(text).ok()?;
    let (mut table, mut found) = (table.get_ref(), None);
    for part in field.split('.') {
        let Some((key, value)) = table.iter().find(|(key, _)| key.get_ref() == part) else { break };
        found = Some(line_at(text, key.span().start));
        let Some(inner) = value.get_ref().as_table() else { break };
        table = inner;
    }
    found
}

/// The field whose value is at this byte of the text.
fn field_at(text: &str, byte: usize) -> Option<String> {
    let table = DeTable::parse(text).ok()?;
    let (mut table, mut parts) = (table.get_ref(), Vec::new());
    loop {
        // The last that begins at or before the byte: a table's own span ends with its header.
        let mut before: Vec<_> = table.iter().filter(|(key, _)| key.span().start <= byte).collect();
        before.sort_by_key(|(key, _)| key.span().start);
        let Some((key, value)) = before.pop() else { break };
        if key.span().contains(&byte) {
            break;
        }
        parts.push(key.get_ref().to_string());
        let Some(inner) = value.get_ref().as_table() else { break };
        table = inner;
    }
    (!parts.is_empty()).then(|| parts.join("."))
}

impl Config {
    /// Reads and checks a file. Blocks; for the start of the daemon only.
    ///
    /// # Errors
    /// Any [`ConfigError`].
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read_error = |source| ConfigError::Read { path: path.to_owned(), source };
        let size = std::fs::metadata(path).map_err(read_error)?.len();
        if size > FILE_BYTES_MAX {
            return Err(read_error(std::io::Error::other(format!(
                "it has {size} bytes, a configuration has at most {FILE_BYTES_MAX}"
            ))));
        }
        let text = std::fs::read_to_string(path).map_err(read_error)?;
        Self::parse(&text, path)
    }

    /// Parses and checks the text of the file at `path`, which is only named in errors.
    ///
    /// # Errors
    /// [`ConfigError::Syntax`], [`ConfigError::Value`].
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let start = error.span().map_or(0, |span| span.start);
            let message = match field_at(text, start) {
                Some(field) => format!("{field}: {}", error.message()),
                None => error.message().to_owned(),
            };
            ConfigError::Syntax { path: path.to_owned(), line: line_at(text, start), message }
        })?;
        config.validate().map_err(|error| match error {
            ConfigError::Value { field, message, .. } => {
                let place = match line_of(text, &field) {
                    Some(line) => format!("{}:{line}: ", path.display()),
                    None => format!("{}: ", path.display()),
                };
                ConfigError::Value { place, field, message }
            }
            error => error,
        })?;
        Ok(config)
    }

    /// Checks what the types do not.
    ///
    /// # Errors
    /// [`ConfigError::Value`].
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_name("node", &self.node).or_else(|message| refuse("node", message))?;
        if self.data_dir.as_os_str().is_empty() {
            return refuse("data_dir", "the path is empty");
        }
        self.validate_disks()?;
        self.store.validate()?;
        self.nbd.validate(self.admin.address)?;
        self.validate_admin()?;
        self.cluster.validate()?;
        self.validate_cluster_address()?;
        if self.cache.index.0 < INDEX_CACHE_BYTES_MIN {
            let least = ByteSize(INDEX_CACHE_BYTES_MIN);
            return refuse("cache.index", format!("{} is less than {least}", self.cache.index));
        }
        if self.cache.overlay_extents < OVERLAY_EXTENTS_MIN {
            let extents = self.cache.overlay_extents;
            return refuse(
                "cache.overlay_extents",
                format!("{extents} is less than {OVERLAY_EXTENTS_MIN}"),
            );
        }
        let TimeSpan(period) = self.scrub.period;
        if !period.is_zero() && !(SCRUB_PERIOD_MIN..=SCRUB_PERIOD_MAX).contains(&period) {
            let (least, most) = (TimeSpan(SCRUB_PERIOD_MIN), TimeSpan(SCRUB_PERIOD_MAX));
            return refuse("scrub.period", format!("neither 0s nor within {least} and {most}"));
        }
        let SpaceConfig { warning_percent, critical_percent, .. } = self.space;
        if !(1..=100).contains(&critical_percent) {
            return refuse("space.critical_percent", "not within 1 and 100");
        }
        if !(1..=critical_percent).contains(&warning_percent) {
            return refuse("space.warning_percent", "not within 1 and space.critical_percent");
        }
        tracing_subscriber::EnvFilter::builder()
            .parse(&self.log.level)
            .map(|_| ())
            .or_else(|error| refuse("log.level", format!("'{}': {error}", self.log.level)))
    }

    fn validate_admin(&self) -> Result<(), ConfigError> {
        let AdminConfig { address, tls } = &self.admin;
        let Some(tls) = tls else {
            if address.ip().is_loopback() || self.cluster.credentials.is_some() {
                return Ok(());
            }
            return refuse(
                "admin.address",
                format!(
                    "{address} is not a loopback address, and without TLS anybody could give orders \
                     there: set cluster.credentials (see `sdsctl cluster init`) or admin.tls"
                ),
            );
        };
        for (field, path) in [
            ("admin.tls.certificate", &tls.certificate),
            ("admin.tls.key", &tls.key),
            ("admin.tls.ca", &tls.ca),
        ] {
            if path.as_os_str().is_empty() {
                return refuse(field, "the path is empty");
            }
        }
        Ok(())
    }

    fn validate_cluster_address(&self) -> Result<(), ConfigError> {
        let Some(address) = self.cluster.address.filter(|address| address.port() != 0) else {
            return Ok(());
        };
        if address == self.admin.address {
            return refuse("cluster.address", format!("{address} is admin.address too"));
        }
        if self.nbd.addresses.contains(&address) {
            return refuse("cluster.address", format!("{address} is one of nbd.addresses too"));
        }
        Ok(())
    }

    fn validate_disks(&self) -> Result<(), ConfigError> {
        if self.disks.len() > DISKS_MAX {
            return refuse(
                "disks",
                format!("{} disks are more than {DISKS_MAX}", self.disks.len()),
            );
        }
        let mut seen = BTreeSet::new();
        for disk in &self.disks {
            if disk.as_os_str().is_empty() {
                return refuse("disks", "a path is empty");
            }
            if !seen.insert(disk) {
                return refuse("disks", format!("{} is listed twice", disk.display()));
            }
        }
        Ok(())
    }
}

impl StoreConfig {
    /// The etcd, if it is one.
    ///
    /// # Errors
    /// [`ConfigError::Value`]: fields that do not go together.
    pub fn etcd(&self) -> Result<Option<EtcdOptions>, ConfigError> {
        if self.backend == StoreBackend::Embedded {
            if *self == Self::default() {
                return Ok(None);
            }
            return refuse("store", "without backend = \"etcd\" it has no other field");
        }
        for (field, path) in [
            ("store.ca", &self.ca),
            ("store.certificate", &self.certificate),
            ("store.key", &self.key),
            ("store.password_file", &self.password_file),
        ] {
            if path.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
                return refuse(field, "the path is empty");
            }
        }
        let identity = match (&self.certificate, &self.key) {
            (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
            (None, None) => None,
            (Some(_), None) => return refuse("store.certificate", "without store.key"),
            (None, Some(_)) => return refuse("store.key", "without store.certificate"),
        };
        let user = match (&self.user, &self.password_file) {
            (Some(user), Some(file)) => Some((user.clone(), file.clone())),
            (None, None) => None,
            (Some(_), None) => return refuse("store.user", "without store.password_file"),
            (None, Some(_)) => return refuse("store.password_file", "without store.user"),
        };
        Ok(Some(EtcdOptions {
            endpoints: self.endpoints.clone(),
            prefix: self.prefix.clone(),
            authority: self.ca.clone(),
            identity,
            user,
        }))
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let Some(options) = self.etcd()? else { return Ok(()) };
        options
            .validate()
            .or_else(|OptionsError { field, message }| refuse(format!("store.{field}"), message))
    }
}

impl NbdConfig {
    fn validate(&self, admin: SocketAddr) -> Result<(), ConfigError> {
        if self.addresses.len() > ADDRESSES_MAX {
            return refuse(
                "nbd.addresses",
                format!("{} are more than {ADDRESSES_MAX}", self.addresses.len()),
            );
        }
        // Port 0 asks the system for any free port, so two of them are no clash.
        let mut seen = BTreeSet::new();
        for address in self.addresses.iter().filter(|address| address.port() != 0) {
            if *address == admin {
                return refuse("nbd.addresses", format!("{address} is admin.address too"));
            }
            if !seen.insert(address) {
                return refuse("nbd.addresses", format!("{address} is listed twice"));
            }
        }
        if let Some(socket) = &self.socket {
            let bytes = socket.as_os_str().len();
            if !(1..=SOCKET_PATH_BYTES_MAX).contains(&bytes) {
                return refuse(
                    "nbd.socket",
                    format!("the path of a socket has 1 to {SOCKET_PATH_BYTES_MAX} bytes"),
                );
            }
        }
        if self.addresses.is_empty() && self.socket.is_none() {
            return refuse("nbd", "neither addresses nor a socket: nothing could be attached");
        }
        let Some(tls) = &self.tls else { return Ok(()) };
        let mut paths = vec![("nbd.tls.certificate", &tls.certificate), ("nbd.tls.key", &tls.key)];
        paths.extend(tls.client_ca.as_ref().map(|path| ("nbd.tls.client_ca", path)));
        for (field, path) in paths {
            if path.as_os_str().is_empty() {
                return refuse(field, "the path is empty");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("sdsd.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn everything_has_a_default() {
        let config = parse("").unwrap();
        assert_eq!(config, Config::default());
        assert_eq!(config.nbd.addresses, ["127.0.0.1:10809".parse().unwrap()]);
        let text = toml::to_string(&config).unwrap();
        assert_eq!(parse(&text).unwrap(), config);
    }

    #[test]
    fn the_example_of_the_documentation_is_read() {
        let source = include_str!("config.rs");
        let lines = source.lines().map_while(|line| line.strip_prefix("//!"));
        let example: Vec<&str> = lines
            .skip_while(|line| !line.contains("```toml"))
            .skip(1)
            .take_while(|line| !line.contains("```"))
            .collect();
        let config = parse(&example.join("\n")).unwrap();
        assert_eq!(config.cache.index, ByteSize(64 << 20));
        assert!(config.nbd.tls.unwrap().required);
        assert_eq!(config.disks.len(), 2);
        assert_eq!(config.store.etcd().unwrap().unwrap().endpoints.len(), 3);
        assert_eq!(config.cluster.advertised().unwrap(), "10.0.0.1:9771");
    }

    #[test]
    fn the_example_of_the_readme_is_read() {
        let readme = include_str!("../README.md");
        let example = readme.split("```toml\n").nth(1).unwrap().split("```").next().unwrap();
        let config = parse(example).unwrap();
        assert!(config.nbd.tls.is_some_and(|tls| tls.required && tls.client_ca.is_some()));
    }

    #[test]
    fn errors_name_the_place() {
        let error = |text| parse(text).unwrap_err();
        expect![
            "sdsd.toml:3: nbd: unknown field `adresses`, expected one of `addresses`, `socket`, `tls`"
        ]
        .assert_eq(&error("\n[nbd]\nadresses = []\n"));
        expect!["sdsd.toml:2: cache.index: '64Q' is not a size: its unit must be one of K, M, G, T, P, E, KiB …, KB …"]
            .assert_eq(&error("[cache]\nindex = \"64Q\"\n"));
        expect!["sdsd.toml:1: node: the name of a node consists of a-z, 0-9, '.', '_' and '-': 'a/b' contains a slash"]
            .assert_eq(&error("node = \"a/b\""));
        expect!["sdsd.toml:1: disks: /dev/sdb is listed twice"]
            .assert_eq(&error("disks = [\"/dev/sdb\", \"/dev/sdb\"]"));
        expect!["sdsd.toml:1: nbd: neither addresses nor a socket: nothing could be attached"]
            .assert_eq(&error("[nbd]\naddresses = []"));
        expect!["sdsd.toml:2: nbd.addresses: 127.0.0.1:9770 is admin.address too"]
            .assert_eq(&error("[nbd]\naddresses = [\"127.0.0.1:9770\"]"));
        expect!["sdsd.toml:2: cache.index: 4KiB is less than 1MiB"]
            .assert_eq(&error("[cache]\nindex = \"4K\""));
        expect!["sdsd.toml: nbd.addresses: 127.0.0.1:10809 is admin.address too"]
            .assert_eq(&error("[admin]\naddress = \"127.0.0.1:10809\""));
        expect!["sdsd.toml:3: nbd.addresses: invalid socket address syntax"]
            .assert_eq(&error("\n[nbd]\naddresses = [\"127.0.0.1:1\", \"here\"]"));
        expect!["sdsd.toml:2: nbd.tls.key: the path is empty"]
            .assert_eq(&error("[nbd]\ntls = { certificate = \"c\", key = \"\" }"));
        expect!["sdsd.toml:2: scrub.period: neither 0s nor within 1m and 3650d"]
            .assert_eq(&error("[scrub]\nperiod = \"5s\""));
        expect!["sdsd.toml:2: space.warning_percent: not within 1 and space.critical_percent"]
            .assert_eq(&error("[space]\nwarning_percent = 95"));
        assert!(error("node = ").starts_with("sdsd.toml:1: "));
        assert!(error("\n\n[log]\nlevel = 3").starts_with("sdsd.toml:4: "));
        assert!(error("[log]\nlevel = \"sds=loud\"").starts_with("sdsd.toml:2: log.level: "));
    }

    #[test]
    fn a_store_that_makes_no_sense_is_refused() {
        let error = |text: &str| parse(&format!("[store]\n{text}")).unwrap_err();
        expect![
            "sdsd.toml:2: store.backend: unknown variant `consul`, expected `embedded` or `etcd`"
        ]
        .assert_eq(&error("backend = \"consul\""));
        expect![[r#"sdsd.toml:1: store: without backend = "etcd" it has no other field"#]]
            .assert_eq(&error("endpoints = [\"http://a:1\"]"));
        let etcd = |text: &str| error(&format!("backend = \"etcd\"\n{text}"));
        expect!["sdsd.toml:1: store.endpoints: an etcd has 1 to 16 members, 0 are named"]
            .assert_eq(&etcd(""));
        expect!["sdsd.toml:3: store.endpoints: 'a:1': the scheme is neither http nor https: a member of etcd is written http://HOST:PORT or https://HOST:PORT"]
            .assert_eq(&etcd("endpoints = [\"a:1\"]"));
        let good = "endpoints = [\"http://a:1\"]\n";
        let with = |text: &str| etcd(&format!("{good}{text}"));
        expect!["sdsd.toml:4: store.user: without store.password_file"]
            .assert_eq(&with("user = \"u\""));
        expect!["sdsd.toml:4: store.key: without store.certificate"]
            .assert_eq(&with("key = \"/k\""));
        expect!["sdsd.toml:4: store.ca: TLS needs endpoints that begin with https://"]
            .assert_eq(&with("ca = \"/c\""));
        expect!["sdsd.toml:4: store.ca: the path is empty"].assert_eq(&with("ca = \"\""));
        assert!(with("user_name = \"u\"").contains("unknown field `user_name`"));
    }

    #[test]
    fn a_node_among_others_needs_credentials() {
        let error = |text: &str| parse(&format!("[cluster]\n{text}")).unwrap_err();
        expect!["sdsd.toml:2: cluster.address: without cluster.credentials, which `sdsctl cluster init` or `sdsd join` make"]
            .assert_eq(&error("address = \"10.0.0.1:9771\""));
        expect!["sdsd.toml:3: cluster.insecure: 10.0.0.1:9771 is not a loopback address: other hosts need credentials"]
            .assert_eq(&error("address = \"10.0.0.1:9771\"\ninsecure = true"));
        expect!["sdsd.toml:2: cluster.insecure: without cluster.address"]
            .assert_eq(&error("insecure = true"));
        expect!["sdsd.toml:2: cluster.advertise: without cluster.address"]
            .assert_eq(&error("advertise = \"a:1\""));
        expect!["sdsd.toml:2: cluster.authority: without cluster.credentials"]
            .assert_eq(&error("authority = \"/a\""));
        expect!["sdsd.toml:2: cluster.rack: the name of a rack consists of a-z, 0-9, '.', '_' and '-': 'a b' contains a space"]
            .assert_eq(&error("rack = \"a b\""));
        let secure = |text: &str| error(&format!("credentials = \"/c\"\n{text}"));
        expect!["sdsd.toml:3: cluster.insecure: there are cluster.credentials: use either"]
            .assert_eq(&secure("insecure = true"));
        expect!["sdsd.toml:3: cluster.address: 0.0.0.0:9771 is no address to call: name one in cluster.advertise"]
            .assert_eq(&secure("address = \"0.0.0.0:9771\""));
        expect!["sdsd.toml:4: cluster.advertise: 'a' is not HOST:PORT: it has no port"]
            .assert_eq(&secure("address = \"0.0.0.0:9771\"\nadvertise = \"a\""));
        expect!["sdsd.toml:3: cluster.address: 127.0.0.1:9770 is admin.address too"]
            .assert_eq(&secure("address = \"127.0.0.1:9770\""));
        expect!["sdsd.toml:3: cluster.address: 127.0.0.1:10809 is one of nbd.addresses too"]
            .assert_eq(&secure("address = \"127.0.0.1:10809\""));
        let alone = parse("").unwrap().cluster;
        assert_eq!((alone.advertised(), alone.rack.as_str()), (None, "default"));
        let test = parse("[cluster]\naddress = \"127.0.0.1:0\"\ninsecure = true").unwrap().cluster;
        assert_eq!(test.advertised().unwrap(), "127.0.0.1:0");
    }

    #[test]
    fn an_admin_address_for_others_needs_tls() {
        let error = |text: &str| parse(&format!("[admin]\n{text}")).unwrap_err();
        let open = "address = \"0.0.0.0:9770\"";
        expect!["sdsd.toml:2: admin.address: 0.0.0.0:9770 is not a loopback address, and without TLS anybody could give orders there: set cluster.credentials (see `sdsctl cluster init`) or admin.tls"]
            .assert_eq(&error(open));
        expect!["sdsd.toml:2: admin.tls.key: the path is empty"]
            .assert_eq(&error("tls = { certificate = \"c\", key = \"\", ca = \"a\" }"));
        parse(&format!("[admin]\n{open}\n[cluster]\ncredentials = \"/c\"")).unwrap();
        let tls = "tls = { certificate = \"c\", key = \"k\", ca = \"a\" }";
        parse(&format!("[admin]\n{open}\n{tls}")).unwrap();
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Config::load(Path::new("/nowhere/sdsd.toml")).unwrap_err().to_string();
        assert!(error.starts_with("cannot read /nowhere/sdsd.toml: "), "{error}");
    }
}
