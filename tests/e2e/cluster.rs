//! A cluster of real processes, as `tools/cluster` starts it: what clients notice when nodes die, move and return.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use super::support::{directory, run};

/// Time until a cluster is whole again.
const HEAL_PATIENCE: Duration = Duration::from_mins(3);

/// A cluster in a directory of its own.
pub(super) struct Cluster {
    pub(super) dir: TempDir,
}

/// Where a node is reached.
pub(super) struct Address {
    pub(super) admin: String,
    pub(super) nbd: String,
}

fn tool(dir: &Path, arguments: &[&str]) -> String {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/cluster");
    let done = Command::new(tool).arg("--dir").arg(dir).args(arguments).output();
    let done = done.expect("tools/cluster can be run");
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "tools/cluster {arguments:?}: {said}");
    String::from_utf8(done.stdout).expect("UTF-8")
}

impl Cluster {
    pub(super) fn up(nodes: usize, extra: &[&str]) -> Self {
        let dir = directory();
        let sdsd = PathBuf::from(env!("CARGO_BIN_EXE_sdsd"));
        let bin = sdsd.parent().expect("a directory").display().to_string();
        let nodes = nodes.to_string();
        let mut arguments = vec![
            "up",
            "--nodes",
            &nodes,
            "--disks",
            "1",
            "--size",
            "1G",
            "--base-port",
            "0",
            "--bin",
            &bin,
        ];
        arguments.extend(extra);
        tool(dir.path(), &arguments);
        Self { dir }
    }

    pub(super) fn order(&self, arguments: &[&str]) -> String {
        tool(self.dir.path(), arguments)
    }

    pub(super) fn address(&self, node: usize) -> Address {
        let told = self.order(&["status"]);
        let name = format!("n{node} ");
        let line = told.lines().find(|line| line.starts_with(&name)).expect("the node is told of");
        let field = |key: &str| {
            let found = line.split_whitespace().find_map(|word| word.strip_prefix(key));
            found.expect("it is in the line").to_owned()
        };
        Address { admin: field("admin="), nbd: field("nbd=") }
    }

    pub(super) fn ctl_raw(&self, node: usize, arguments: &[&str]) -> (bool, String) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sdsctl"));
        command.args(["--endpoint", &self.address(node).admin]);
        command.arg("--credentials").arg(self.dir.path().join("trust/admin"));
        let done = command.args(arguments).output().expect("sdsctl can be run");
        let text = if done.status.success() { done.stdout } else { done.stderr };
        (done.status.success(), String::from_utf8_lossy(&text).into_owned())
    }

    pub(super) fn ctl(&self, node: usize, arguments: &[&str]) -> String {
        let (ok, said) = self.ctl_raw(node, arguments);
        assert!(ok, "sdsctl {arguments:?}: {said}");
        said
    }

    pub(super) fn json(&self, node: usize, arguments: &[&str]) -> Value {
        let mut all = vec!["-o", "json"];
        all.extend(arguments);
        serde_json::from_str(&self.ctl(node, &all)).expect("JSON")
    }

    /// Name of the node that serves the only volume.
    pub(super) fn head(&self, node: usize) -> String {
        let volumes = self.json(node, &["volume", "ls"]);
        volumes[0]["node"].as_str().expect("a name").to_owned()
    }

    pub(super) fn wait(&self, what: &str, node: usize, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + HEAL_PATIENCE;
        while !holds(self) {
            let status = self.ctl_raw(node, &["status"]).1;
            assert!(Instant::now() < deadline, "{what}: {status}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    pub(super) fn wait_whole(&self, node: usize) {
        self.wait("whole again", node, |cluster| {
            let volumes = cluster.json(node, &["volume", "ls"]);
            let volumes = volumes.as_array().expect("a list");
            volumes.iter().all(|v| v["state"] == "online" && v["redundancy"]["state"] == "full")
                && cluster.json(node, &["status"])["health"] == "ok"
        });
    }

    /// Random writes to a volume through a node, and reads that compare what was written, for some seconds.
    pub(super) fn load(&self, node: usize, volume: &str, seconds: u32) -> Child {
        self.load_at(&format!("{}{volume}", self.address(node).nbd), seconds)
    }

    fn load_at(&self, uri: &str, seconds: u32) -> Child {
        let mut command = Command::new("fio");
        command.args(["--name=load", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=8"]);
        command.args([format!("--uri={uri}"), format!("--runtime={seconds}")]);
        // Reads are those that compare. Without a backlog there are none before all was written once, and with
        // others in between fio leaves many of them out.
        command.args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64"]);
        command.args(["--size=48M", "--verify_state_save=0", "--time_based"]);
        command.arg("--output-format=json").current_dir(self.dir.path());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        child.expect("fio can be run")
    }

    /// Kills every node with disks, one after the other, under a client at the unix socket of the gateway, which
    /// is the last node. The head comes to this client, so none of the nodes has it. Gives the longest request.
    fn every_storage_node_dies(&self, gateway: usize, volume: &str) -> f64 {
        let name = format!("n{gateway}");
        let socket = self.dir.path().join(&name).join("nbd.sock");
        let load = self.load_at(&format!("nbd+unix:///{volume}?socket={}", socket.display()), 300);
        self.wait("the head is at its client", gateway, |cluster| cluster.head(gateway) == name);
        for node in 1..gateway {
            let node_name = format!("n{node}");
            self.order(&["kill", &node_name]);
            // Shorter and longer than a lease.
            std::thread::sleep(Duration::from_secs(if node % 2 == 0 { 1 } else { 3 }));
            self.order(&["start", &node_name]);
            self.wait_whole(gateway);
        }
        assert_eq!(self.head(gateway), name);
        interrupted(load)
    }
}

/// Longest request of a load that ended well, seconds.
pub(super) fn longest(load: Child) -> f64 {
    report(load, 0)
}

/// The same of one that runs still and is ended here.
fn interrupted(mut load: Child) -> f64 {
    assert!(load.try_wait().expect("a child").is_none(), "it ended early: {}", report(load, 0));
    let told = Command::new("kill").args(["-INT", &load.id().to_string()]).status();
    assert!(told.is_ok_and(|status| status.success()));
    report(load, 128)
}

fn report(load: Child, code: i32) -> f64 {
    let done = load.wait_with_output().expect("fio ends");
    let text = String::from_utf8_lossy(&done.stdout).into_owned();
    let error = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(code), "{text}{error}");
    let report: Value =
        serde_json::from_str(&text[text.find('{').expect("a report")..]).expect("JSON");
    let job = &report["jobs"][0];
    assert_eq!(job["error"], 0, "{text}{error}");
    let longest = |kind: &str| {
        assert!(
            job[kind]["total_ios"].as_u64() > Some(100),
            "next to nothing was written or compared: {text}"
        );
        job[kind]["clat_ns"]["max"].as_f64().expect("a number")
    };
    longest("read").max(longest("write")) / 1e9
}

#[allow(clippy::print_stdout, reason = "what the nodes said, for who looks into a failure")]
impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for entry in std::fs::read_dir(self.dir.path()).into_iter().flatten().flatten() {
                let log = std::fs::read_to_string(entry.path().join("log")).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                println!("{}:", entry.path().display());
                lines.iter().rev().take(15).rev().for_each(|line| println!("  {line}"));
            }
        }
        let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/cluster");
        let down = Command::new(tool).arg("--dir").arg(self.dir.path()).arg("down").status();
        assert!(std::thread::panicking() || down.is_ok_and(|status| status.success()));
    }
}

#[test]
fn any_of_five_nodes_dies_under_load_and_clients_of_a_gateway_see_no_error() {
    let cluster = Cluster::up(5, &["--gateways", "1"]);
    cluster.ctl(1, &["pool", "create", "p", "--replicas", "3", "--failure-domain", "node"]);
    cluster.ctl(2, &["volume", "create", "p/v", "--size", "64M"]);
    let (refused, said) =
        cluster.ctl_raw(1, &["pool", "create", "q", "--ec", "4+2", "--failure-domain", "node"]);
    assert!(!refused && said.contains("needs 6 of them"), "{said}");
    let nodes = cluster.json(3, &["node", "ls"]);
    assert_eq!(nodes.as_array().expect("a list").len(), 6, "{nodes}");
    assert_eq!(cluster.head(1), "n2");
    let uri = format!("{}p/v", cluster.address(6).nbd);
    run("qemu-io", &["-f", "raw", &uri, "-c", "write -P 5 48M 16M"]);

    // Clients are at the gateway's TCP port: a node without the head, then that with it.
    let load = cluster.load(6, "p/v", 8);
    std::thread::sleep(Duration::from_secs(2));
    cluster.order(&["kill", "n3"]);
    println!("longest request while a node without the head dies: {:.2} s", longest(load));
    cluster.order(&["start", "n3"]);
    cluster.wait_whole(1);
    let load = cluster.load(6, "p/v", 12);
    std::thread::sleep(Duration::from_secs(2));
    cluster.order(&["kill", "n2"]);
    println!("longest request while the node with the head dies: {:.2} s", longest(load));
    assert_ne!(cluster.head(1), "n2");
    let (_, said) = cluster.ctl_raw(1, &["node", "show", "n2"]);
    assert!(said.contains("down"), "{said}");
    cluster.order(&["start", "n2"]);
    cluster.wait_whole(1);

    // The head's node stops in order, then is drained: no error, and less of a stall.
    let head = cluster.head(1);
    let load = cluster.load(6, "p/v", 8);
    std::thread::sleep(Duration::from_secs(2));
    cluster.order(&["stop", &head]);
    println!("longest request while the node with the head stops: {:.2} s", longest(load));
    cluster.order(&["start", &head]);
    cluster.wait_whole(1);
    let head = cluster.head(1);
    let load = cluster.load(6, "p/v", 8);
    std::thread::sleep(Duration::from_secs(2));
    cluster.ctl(6, &["node", "drain", &head]);
    println!("longest request while the node with the head is drained: {:.2} s", longest(load));
    cluster.wait("drained", 6, |cluster| {
        let node = cluster.json(6, &["node", "show", &head]);
        let disks = cluster.json(6, &["disk", "ls"]);
        let disks = disks.as_array().expect("a list").iter();
        let taken = disks.filter(|d| d["node"] == head.as_str()).map(|d| d["slots_used"].as_u64());
        node["volumes"] == 0 && taken.sum::<Option<u64>>() == Some(0)
    });
    cluster.ctl(6, &["node", "undrain", &head]);

    let longest = cluster.every_storage_node_dies(6, "p/v");
    println!("longest request while every other node dies: {longest:.2} s");
    run("qemu-io", &["-f", "raw", &uri, "-c", "read -P 5 48M 16M"]);
    cluster.ctl(6, &["volume", "rm", "p/v", "--yes"]);
    cluster.wait("deleted", 6, |cluster| {
        cluster.json(6, &["volume", "ls"]).as_array().is_some_and(Vec::is_empty)
    });
}

#[test]
fn a_coded_pool_of_six_nodes_survives_any_and_etcd_may_go_away() {
    let cluster = Cluster::up(6, &["--tls", "--gateways", "1"]);
    cluster.ctl(1, &["pool", "create", "p", "--ec", "4+2", "--failure-domain", "node"]);
    cluster.ctl(1, &["volume", "create", "p/v", "--size", "64M"]);
    let uri = format!("{}p/v", cluster.address(4).nbd);
    run("qemu-io", &["-f", "raw", &uri, "-c", "write -P 5 48M 16M"]);
    let load = cluster.load(7, "p/v", 12);
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(cluster.head(7), "n1");
    cluster.order(&["kill", "n1"]);
    println!("longest request while the node with the head dies: {:.2} s", longest(load));
    run("qemu-io", &["-f", "raw", &uri, "-c", "read -P 5 48M 16M"]);
    cluster.order(&["start", "n1"]);
    cluster.wait_whole(2);

    // Without etcd clients read and write on; without a certificate nobody is answered.
    cluster.order(&["kill", "etcd1"]);
    longest(cluster.load(2, "p/v", 8));
    cluster.order(&["start", "etcd1"]);
    cluster.wait_whole(2);
    let mut stranger = Command::new(env!("CARGO_BIN_EXE_sdsctl"));
    stranger.args(["--endpoint", &cluster.address(1).admin, "status"]);
    let stranger = stranger.env("HOME", "/nonexistent").output().expect("sdsctl can be run");
    assert!(!stranger.status.success(), "somebody without credentials gives orders");

    let longest = cluster.every_storage_node_dies(7, "p/v");
    println!("longest request while every other node dies: {longest:.2} s");
    run("qemu-io", &["-f", "raw", &uri, "-c", "read -P 5 48M 16M"]);
}
