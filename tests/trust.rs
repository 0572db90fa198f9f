//! A cluster made by `sdsctl cluster init`: who is let in by the admin API, and how a node joins.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod admin_support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use admin_support::FakeNode;
use sds::admin::access::Access;
use sds::admin::client::{Client, ClientError};
use sds::admin::error::ErrorCode;
use sds::admin::joining::{CreateNodeToken, RenewNode};
use sds::config::Config;
use sds::trust::{ClientTls, Credentials, Kind};

/// A new cluster with a node that serves it.
struct Cluster {
    dir: tempfile::TempDir,
    node: FakeNode,
}

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .env_remove("SDS_ENDPOINT")
        .env_remove("SDS_CREDENTIALS")
        .env("XDG_CONFIG_HOME", "/nonexistent")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn sdsctl(args: &[&str]) -> Output {
    run(env!("CARGO_BIN_EXE_sdsctl"), args)
}

fn sdsd(args: &[&str]) -> Output {
    run(env!("CARGO_BIN_EXE_sdsd"), args)
}

fn ok(output: Output) -> String {
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn fails(output: Output) -> String {
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(!output.status.success(), "{stdout}");
    String::from_utf8(output.stderr).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn init(dir: &Path) {
    ok(sdsctl(&["cluster", "init", "--dir", text(dir), "--name", "east"]));
}

fn config(dir: &Path, authority: bool) -> Config {
    let mut config = Config::default();
    config.cluster.credentials = Some(dir.join("node"));
    config.cluster.authority = authority.then(|| dir.join("authority"));
    config
}

impl Cluster {
    fn start(authority: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        init(dir.path());
        let access = Access::load(&config(dir.path(), authority)).unwrap();
        Self { dir, node: FakeNode::start_with(access) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn endpoint(&self) -> String {
        format!("https://{}", self.node.address)
    }

    fn sdsctl(&self, args: &[&str]) -> Output {
        let (admin, endpoint) = (self.path("admin"), self.endpoint());
        sdsctl(&[&["--credentials", text(&admin), "--endpoint", &endpoint], args].concat())
    }

    fn token(&self) -> String {
        let address = self.node.address.to_string();
        ok(self.sdsctl(&["node", "token", "--address", &address])).trim().to_owned()
    }

    fn join(&self, token: &str, name: &str) -> Output {
        sdsd(&["join", token, "--name", name, "--dir", text(&self.path(name))])
    }

    fn client(&self, dir: &str, kind: Kind) -> Client {
        let credentials = Credentials::load(&self.path(dir), kind).unwrap();
        Client::with_tls(&self.endpoint(), &ClientTls::new(&credentials).unwrap()).unwrap()
    }
}

fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorCode {
    match result.unwrap_err() {
        ClientError::Api(error) => error.code,
        other => panic!("not an error of the API: {other}"),
    }
}

#[test]
fn init_makes_what_is_needed_and_overwrites_nothing() {
    let dir = tempfile::tempdir().unwrap();
    init(dir.path());
    for key in ["authority/ca.key", "admin/admin.key", "node/node.key"] {
        let path = dir.path().join(key);
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
        assert!(!path.with_extension("key.new").exists(), "{key}");
    }
    let before = fs::read(dir.path().join("authority/ca.key")).unwrap();
    let why = fails(sdsctl(&["cluster", "init", "--dir", text(dir.path()), "--name", "west"]));
    assert!(why.contains("ca.pem: it is there already"), "{why}");
    assert_eq!(fs::read(dir.path().join("authority/ca.key")).unwrap(), before);
    let config = Config { node: "other".into(), ..config(dir.path(), true) };
    let why = Access::load(&config).err().unwrap();
    assert!(why.contains("of node node0, but `node` says that this is other"), "{why}");
}

#[test]
fn operators_are_let_in_and_nobody_else() {
    let cluster = Cluster::start(true);
    let status = ok(cluster.sdsctl(&["status"]));
    assert!(status.contains("health:   ok"), "{status}");
    // Several requests on a connection, and on connections that resume the session.
    let client = cluster.client("admin", Kind::Admin);
    (0..3).for_each(|_| assert_eq!(client.disks().unwrap().len(), 6));

    let endpoint = cluster.endpoint();
    let why = fails(sdsctl(&["--endpoint", &endpoint, "status"]));
    assert!(why.contains("needs credentials") && why.contains("cluster init"), "{why}");
    let plain = format!("http://{}", cluster.node.address);
    let why = fails(sdsctl(&["--endpoint", &plain, "status"]));
    assert!(!why.contains("health:"), "{why}");

    // Another cluster's operator is told apart by both ends.
    let other = tempfile::tempdir().unwrap();
    init(other.path());
    let admin = other.path().join("admin");
    let args = ["--credentials", text(&admin), "--endpoint", &endpoint, "status"];
    let why = fails(sdsctl(&args));
    assert!(why.contains("the certificate is of node node0 of cluster"), "{why}");
    fs::copy(cluster.path("admin/ca.pem"), admin.join("ca.pem")).unwrap();
    let why = fails(sdsctl(&args));
    assert!(why.contains("admin.pem: ") && why.contains("of admin admin of cluster"), "{why}");

    // A node is not an operator.
    let node = cluster.client("node", Kind::Node);
    assert_eq!(code(node.status()), ErrorCode::Forbidden);
    assert_eq!(code(node.create_node_token(&CreateNodeToken::default())), ErrorCode::Forbidden);
    assert_eq!(code(client.renew_node(&renewal())), ErrorCode::Forbidden);
    let credentials = Credentials::load(&cluster.path("node"), Kind::Node).unwrap();
    let nobody = ClientTls::pinned(credentials.authority_fingerprint()).unwrap();
    let nobody = Client::with_tls(&endpoint, &nobody).unwrap();
    assert_eq!(code(nobody.status()), ErrorCode::Forbidden);
    assert_eq!(code(nobody.renew_node(&renewal())), ErrorCode::Forbidden);
    // One more operator.
    let (authority, eve) = (cluster.path("authority"), cluster.path("eve"));
    let args = ["--authority", text(&authority), "--admin", "eve", "--dir", text(&eve)];
    ok(sdsctl(&[&["cluster", "issue"], &args[..]].concat()));
    cluster.client("eve", Kind::Admin).status().unwrap();
}

fn renewal() -> RenewNode {
    let request = sds::trust::SigningRequest::new().unwrap().pem().unwrap();
    RenewNode { request }
}

#[test]
fn a_node_joins_with_a_token_that_is_then_used_up() {
    let cluster = Cluster::start(true);
    let token = cluster.token();
    let told = ok(cluster.join(&token, "node1"));
    assert!(told.contains("node node1 has joined cluster") && told.contains("[cluster]"), "{told}");
    let first = Credentials::load(&cluster.path("node"), Kind::Node).unwrap();
    let joined = Credentials::load(&cluster.path("node1"), Kind::Node).unwrap();
    assert_eq!(joined.holder().name, "node1");
    assert_eq!(joined.holder().cluster, first.holder().cluster);
    assert_ne!(joined.holder().node(), first.holder().node());
    let config = Config { node: "node1".into(), ..Config::default() };
    let cluster_section = sds::config::ClusterConfig {
        credentials: Some(cluster.path("node1")),
        ..config.cluster.clone()
    };
    Access::load(&Config { cluster: cluster_section, ..config }).unwrap();

    let why = fails(cluster.join(&token, "node2"));
    assert!(why.contains("the token was used already") && why.contains("node token"), "{why}");
    assert!(!cluster.path("node2/node.key").exists());
    let why = fails(cluster.join(&cluster.token(), "node1"));
    assert!(why.contains("it is there already, and is not overwritten"), "{why}");
    let why = fails(cluster.join("sds-join-1/cut", "node2"));
    assert!(why.contains("the token is not complete"), "{why}");

    // A token of another cluster, in front of this one.
    let other = Cluster::start(true);
    let token =
        other.token().replace(&other.node.address.to_string(), &cluster.node.address.to_string());
    let why = fails(cluster.join(&token, "node2"));
    assert!(why.contains("no authority with the fingerprint of the token"), "{why}");
    // A secret that nobody made.
    let made = cluster.token();
    let wrong = format!("{}/{}", made.rsplit_once('/').unwrap().0, "0".repeat(64));
    let why = fails(cluster.join(&wrong, "node2"));
    assert!(why.contains("this node has made no such token"), "{why}");
    ok(cluster.join(&made, "node2"));
}

#[test]
fn a_node_renews_its_certificate() {
    let cluster = Cluster::start(true);
    let (dir, endpoint) = (cluster.path("node"), cluster.endpoint());
    let before = fs::read(dir.join("node.pem")).unwrap();
    let holder = Credentials::load(&dir, Kind::Node).unwrap().holder().clone();
    ok(sdsctl(&["--endpoint", &endpoint, "node", "renew", "--dir", text(&dir)]));
    assert_ne!(fs::read(dir.join("node.pem")).unwrap(), before);
    assert_eq!(*Credentials::load(&dir, Kind::Node).unwrap().holder(), holder);
    ok(sdsctl(&["--endpoint", &endpoint, "node", "renew", "--dir", text(&dir)]));
}

#[test]
fn without_the_authority_a_node_lets_nobody_in() {
    let cluster = Cluster::start(false);
    ok(cluster.sdsctl(&["status"]));
    let why = fails(cluster.sdsctl(&["node", "token", "--address", "10.0.0.1:9770"]));
    assert!(why.contains("no key of the cluster's authority"), "{why}");
    assert!(why.contains("cluster.authority"), "{why}");
}
