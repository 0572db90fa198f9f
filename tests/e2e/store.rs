//! The metadata store of a cluster loses a member, goes away, goes back, and is lost: what clients notice, what nodes
//! refuse, and what an operator does.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::cluster::{Cluster, longest};
use super::support::run;

#[test]
fn etcd_loses_a_member_and_goes_away_under_load() {
    let cluster = Cluster::up(4, &["--etcd", "3"]);
    cluster.ctl(1, &["pool", "create", "p", "--replicas", "3", "--failure-domain", "node"]);
    cluster.ctl(1, &["volume", "create", "p/v", "--size", "64M"]);
    let load = cluster.load(2, "p/v", 6);
    std::thread::sleep(Duration::from_secs(1));
    cluster.order(&["kill", "etcd2"]);
    std::thread::sleep(Duration::from_secs(2));
    cluster.ctl(3, &["volume", "create", "p/w", "--size", "64M"]);
    cluster.order(&["start", "etcd2"]);
    println!("longest request while a member of etcd is away: {:.2} s", longest(load));
    let head = cluster.head(1);

    let load = cluster.load(2, "p/v", 25);
    std::thread::sleep(Duration::from_secs(1));
    cluster.order(&["kill", "etcd"]);
    std::thread::sleep(Duration::from_secs(14));
    let (created, said) = cluster.ctl_raw(1, &["volume", "create", "p/x", "--size", "64M"]);
    assert!(!created, "without a store nothing is created: {said}");
    assert!(cluster.ctl(1, &["status"]).contains("metadata store"), "status tells of it");
    std::thread::sleep(Duration::from_secs(2));
    cluster.order(&["start", "etcd"]);
    println!("longest request while all of etcd is away: {:.2} s", longest(load));
    assert_eq!(cluster.head(1), head, "nobody was taken for dead");
    cluster.wait_whole(1);
    cluster.ctl(4, &["volume", "create", "p/x", "--size", "64M"]);
}

/// Runs `sdsd recover` for a node; whether it was done, and what it said.
fn recover(cluster: &Cluster, node: &str, arguments: &[&str]) -> (bool, String) {
    let config = cluster.dir.path().join(node).join("sdsd.toml");
    let mut command = Command::new(env!("CARGO_BIN_EXE_sdsd"));
    let done = command.args(["recover", "--config"]).arg(config).args(arguments).output();
    let done = done.expect("sdsd can be run");
    let text = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8_lossy(&text).into_owned())
}

fn log(cluster: &Cluster, node: &str) -> String {
    let path = cluster.dir.path().join(node).join("log");
    std::fs::read_to_string(path).expect("a log")
}

#[test]
fn an_etcd_that_went_back_or_was_lost_is_noticed_and_rebuilt_by_all_nodes() {
    let cluster = Cluster::up(4, &["--tls"]);
    cluster.ctl(1, &["pool", "create", "p", "--replicas", "3", "--failure-domain", "node"]);
    cluster.ctl(2, &["volume", "create", "p/v", "--size", "64M"]);
    let uri = format!("{}p/v", cluster.address(1).nbd);
    let io = |order: &str| run("qemu-io", &["-f", "raw", &uri, "-c", order]);
    io("write -P 5 0 16M");
    let saved = cluster.dir.path().join("saved");
    let saved = saved.to_str().expect("UTF-8");
    cluster.order(&["etcd-save", saved]);
    cluster.ctl(3, &["volume", "create", "p/later", "--size", "64M"]);
    // Its head goes elsewhere, with a newer root than the one that was saved.
    cluster.ctl(1, &["node", "drain", "n2"]);
    cluster.wait("moved", 1, |cluster| {
        let volumes = cluster.json(1, &["volume", "ls"]);
        volumes.as_array().expect("a list").iter().all(|volume| volume["node"] != "n2")
    });
    cluster.ctl(1, &["node", "undrain", "n2"]);
    io("write -P 6 0 8M");

    // Nodes that run ask nothing of it, and serve on; one that starts refuses.
    cluster.order(&["etcd-restore", saved]);
    io("write -P 7 4M 2M");
    std::thread::sleep(Duration::from_secs(4));
    io("write -P 8 20M 1M");
    io("read -P 7 4M 2M");
    cluster.order(&["kill", "n2"]);
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/cluster");
    let start =
        Command::new(tool).arg("--dir").arg(cluster.dir.path()).args(["start", "n2"]).output();
    assert!(!start.expect("it can be run").status.success(), "an old copy is believed");
    assert!(log(&cluster, "n2").contains("the store is an old copy"), "{}", log(&cluster, "n2"));
    io("read -P 8 20M 1M");

    // Nothing is rebuilt over what is there, nor from a part of the disks.
    assert!(cluster.ctl(1, &["status"]).contains("not believed"), "status tells of it");
    cluster.order(&["kill", "all"]);
    let (done, said) = recover(&cluster, "n1", &[]);
    assert!(!done && said.contains("it is recovered only when it is lost"), "{said}");
    cluster.order(&["etcd-wipe"]);
    let start = Command::new(env!("CARGO_BIN_EXE_sdsd"))
        .arg("--config")
        .arg(cluster.dir.path().join("n3/sdsd.toml"))
        .output()
        .expect("sdsd can be run");
    let said = String::from_utf8_lossy(&start.stderr).into_owned();
    assert!(!start.status.success() && said.contains("`sdsd recover` rebuilds"), "{said}");
    let (done, said) = recover(&cluster, "n1", &[]);
    assert!(!done && said.contains("(n2:") && said.contains("--lend"), "{said}");
    let (done, said) = recover(&cluster, "n1", &["--from", "127.0.0.1:1"]);
    assert!(!done && said.contains("127.0.0.1:1 cannot be reached"), "{said}");

    let told = cluster.order(&["recover"]);
    assert!(told.contains("p/later, p/v"), "{told}");
    io("read -P 6 0 4M");
    io("read -P 7 4M 2M");
    io("read -P 6 6M 2M");
    io("read -P 5 8M 8M");
    io("read -P 8 20M 1M");
    cluster.wait_whole(4);
    let nodes = cluster.json(1, &["node", "ls"]);
    let nodes = nodes.as_array().expect("a list");
    assert!(nodes.len() == 4 && nodes.iter().all(|node| node["state"] == "up"), "{nodes:?}");
    let disks = cluster.json(1, &["disk", "ls"]);
    let mut owners: Vec<_> =
        disks.as_array().expect("a list").iter().map(|disk| disk["node"].clone()).collect();
    owners.sort_by_key(ToString::to_string);
    assert_eq!(owners, ["n1", "n2", "n3", "n4"], "{disks}");
    longest(cluster.load(2, "p/later", 3));
    cluster.ctl(3, &["volume", "rm", "p/later", "--yes"]);
}
