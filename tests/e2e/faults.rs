//! Disks that are taken away, or begin to fail, while a client verifies.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::support::{Node, directory, finish, run, spawn};

const ARGS: [&str; 4] = ["--disk-size", "1G", "--volume", "vol0:256M"];

fn pause(seconds: u64) {
    std::thread::sleep(Duration::from_secs(seconds));
}

/// Overwrites a disk with garbage, as `dd conv=notrunc` would.
fn overwrite(node: &Node, index: usize) {
    let target = format!("of={}", node.disk(index).display());
    run("dd", &["if=/dev/urandom", &target, "bs=1M", "count=64", "conv=notrunc"]);
}

fn online(node: &Node, count: u64) {
    node.wait_json("disks online", &["status"], |status| status["disks"]["online"] == count);
}

/// Waits for fio, which must have found every block as it wrote it; its longest stall.
fn verified(fio: Child) -> String {
    let text = finish("fio", fio);
    let from = text.find('{').expect("JSON");
    let report: serde_json::Value = serde_json::Deserializer::from_str(&text[from..])
        .into_iter()
        .next()
        .expect("one")
        .expect("JSON");
    assert_eq!(report["jobs"][0]["error"], 0, "{report:#}");
    let stall =
        |kind: &str| report["jobs"][0][kind]["clat_ns"]["max"].as_u64().unwrap_or(0) / 1_000_000;
    format!("longest stall: write {} ms, read {} ms", stall("write"), stall("read"))
}

#[test]
fn two_of_six_disks_are_lost_without_an_error() {
    let dir = directory();
    let node = Node::start(dir.path(), &ARGS);
    let uri = format!("--uri={}", node.uri);
    let job = ["--name=v", "--ioengine=nbd", &uri, "--size=192M", "--bsrange=4k-256k"];
    let verify =
        ["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256", "--verify_state_save=0"];
    let load = ["--rw=randrw", "--iodepth=8", "--time_based", "--runtime=24", "--rate_iops=400"];
    let fio = spawn("fio", &[&job[..], &verify, &load, &["--output-format=json"]].concat());
    pause(4);
    std::fs::File::options().write(true).open(node.disk(0)).expect("it").set_len(0).expect("cut");
    online(&node, 5);
    let status = node.json(&["status"]);
    assert_ne!(status["health"], "ok", "{status}");
    pause(4);
    overwrite(&node, 1);
    online(&node, 4);
    println!("{}", verified(fio));
    assert_ne!(node.json(&["status"])["health"], "ok");
    node.stop();
}

#[test]
fn with_a_third_disk_gone_clients_wait_and_nothing_is_lost() {
    let dir = directory();
    let node = Node::start(dir.path(), &ARGS);
    let write =
        ["-c", "write -P 17 0 64M", "-c", "write -P 18 100M 4k", "-c", "write -P 19 131072001 999"];
    run("qemu-io", &[&["-f", "raw", node.uri.as_str()][..], &write].concat());
    let away: Vec<_> = (0..3).map(|index| node.disk_id(index)).collect();
    for id in &away {
        node.ctl(&["disk", "offline", id]);
    }
    online(&node, 3);
    node.wait_json("critical", &["status"], |status| status["health"] == "critical");
    let read =
        ["-c", "read -P 17 0 64M", "-c", "read -P 18 100M 4k", "-c", "read -P 19 131072001 999"];
    let args = [&["-f", "raw", node.uri.as_str()][..], &read].concat();
    let mut waiting = spawn("qemu-io", &args);
    pause(3);
    for id in &away {
        node.ctl(&["disk", "online", id]);
    }
    online(&node, 6);
    waiting.wait().expect("it ends");
    let output = waiting.wait_with_output().expect("its output");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("Pattern verification failed"), "old or wrong data: {text}");
    assert!(!text.contains("failed"), "a client had an error instead of waiting: {text}");
    let text = run("qemu-io", &args);
    assert!(!text.contains("failed"), "{text}");
    node.wait_json("redundant again", &["status"], |status| status["health"] == "ok");
    node.stop();
}

#[test]
fn a_disk_that_vanishes_and_returns_is_used_again() {
    let dir = directory();
    let node = Node::start(dir.path(), &ARGS);
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "write -P 5 0 32M"]);
    let away = dir.path().join("away");
    std::fs::rename(node.disk(4), &away).expect("it goes");
    online(&node, 5);
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "write -P 6 8M 8M", "-c", "read -P 5 0 8M"]);
    pause(3);
    std::fs::rename(&away, node.disk(4)).expect("it comes back");
    online(&node, 6);
    node.wait_json("redundant again", &["status"], |status| status["health"] == "ok");
    let reads = ["-c", "read -P 5 0 8M", "-c", "read -P 6 8M 8M", "-c", "read -P 5 16M 16M"];
    run("qemu-io", &[&["-f", "raw", node.uri.as_str()][..], &reads].concat());
    node.stop();
}

/// A disk that answers requests with EIO while a file is there.
struct Frail {
    /// Its path.
    path: PathBuf,
    switch: PathBuf,
    mount: PathBuf,
    /// The process that serves it; none where there is no FUSE.
    server: Option<Child>,
}

impl Frail {
    /// A disk of 256 MiB, by nbdkit's error filter under FUSE; where that cannot be mounted, a file.
    /// `rate` says which requests fail, as the filter has it.
    fn new(dir: &Path, rate: &str) -> Self {
        let (mount, switch) = (dir.join("frail"), dir.join("fail"));
        std::fs::create_dir(&mount).expect("a directory");
        let path = mount.join("disk");
        let mut frail = Self { path, switch, mount, server: None };
        let flag = format!("error-file={}", frail.switch.display());
        let nbdkit = ["--command", "nbdkit", "-s", "--exit-with-parent", "memory", "256M"];
        let errors = ["--filter=error", "error=EIO", rate, &flag];
        let mut command = Command::new("nbdfuse");
        command.arg(&frail.path).args(nbdkit).args(errors);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut server = command.spawn().expect("nbdfuse starts: tools/setup installs it");
        for _ in 0..100 {
            if frail.path.exists() {
                frail.server = Some(server);
                return frail;
            }
            if server.try_wait().is_ok_and(|ended| ended.is_some()) {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        server.kill().ok();
        server.wait().expect("it ends");
        let file = std::fs::File::create(&frail.path).expect("a file");
        file.set_len(256 << 20).expect("its size");
        frail
    }

    /// Makes every request fail from now on: with EIO, or, without FUSE, by cutting the file.
    fn fail(&self) {
        if self.server.is_some() {
            std::fs::write(&self.switch, "").expect("a switch");
        } else {
            std::fs::File::options()
                .write(true)
                .open(&self.path)
                .and_then(|file| file.set_len(0))
                .expect("it is cut");
        }
    }

    /// Lets requests succeed again; false where that is not possible.
    fn heal(&self) -> bool {
        self.server.is_some() && std::fs::remove_file(&self.switch).is_ok()
    }
}

impl Drop for Frail {
    fn drop(&mut self) {
        std::fs::remove_file(&self.switch).ok();
        let Some(server) = &mut self.server else { return };
        Command::new("umount").arg("-l").arg(&self.mount).stderr(Stdio::null()).status().ok();
        server.kill().ok();
        server.wait().ok();
    }
}

/// A node of a frail disk and five others, with a volume `p/v` of 128 MiB.
fn node_with(dir: &Path, frail: &Frail, scheme: &[&str]) -> Node {
    let config = dir.join("sdsd.toml");
    let text = format!(
        "data_dir = \"{}\"\n[nbd]\naddresses = [\"127.0.0.1:0\"]\n[admin]\n\
         address = \"127.0.0.1:0\"\n",
        dir.join("data").display()
    );
    std::fs::write(&config, text).expect("a configuration");
    let node = Node::start_configured(&config, "p/v");
    node.ctl(&["disk", "add", frail.path.to_str().expect("UTF-8")]);
    for index in 1..6 {
        let path = node.disk(index).display().to_string();
        node.ctl(&["disk", "add", &path, "--size", "512M"]);
    }
    node.ctl(&[&["pool", "create", "p"][..], scheme].concat());
    node.ctl(&["volume", "create", "p/v", "--size", "128M"]);
    node
}

#[test]
fn a_disk_that_can_only_be_read_is_left_and_its_data_rebuilt_under_fuse() {
    let dir = directory();
    let frail = Frail::new(dir.path(), "error-pwrite-rate=100%");
    // The kernel has no other disk that fails like this; tools/test leaves such tests out, and says so.
    assert!(frail.server.is_some(), "FUSE does not work here");
    let node = node_with(dir.path(), &frail, &["--replicas", "3"]);
    let qemu_io = |command: &str| {
        let text = run("qemu-io", &["-f", "raw", &node.uri, "-c", command]);
        assert!(!text.contains("failed"), "{command}: {text}");
    };
    // Enough segments that some lie on every disk.
    for at in 0..16 {
        qemu_io(&format!("write -P {} {}M 4M", at + 1, at * 4));
    }
    frail.fail();
    for at in 16..32 {
        qemu_io(&format!("write -P {} {}M 4M", at + 1, at * 4));
    }
    online(&node, 5);
    pause(4);
    node.wait_json("rebuilt elsewhere while it cannot be written", &["volume", "ls"], |volumes| {
        volumes[0]["redundancy"]["state"] == "full"
    });
    let status = node.ctl(&["status"]);
    assert!(status.contains("it cannot be written to"), "{status}");
    assert_eq!(node.json(&["status"])["disks"]["online"], 5, "it does not come back as it is");
    assert!(frail.heal());
    online(&node, 6);
    node.wait_json("healthy", &["status"], |status| status["volumes"]["reduced"] == 0);
    for at in 0..32 {
        qemu_io(&format!("read -P {} {}M 4M", at + 1, at * 4));
    }
    node.stop();
}

#[test]
fn a_disk_that_answers_with_errors_is_left_and_taken_back() {
    let dir = directory();
    let frail = Frail::new(dir.path(), "error-rate=100%");
    if frail.server.is_none() {
        println!("no FUSE here: the disk is cut instead of answering with EIO");
    }
    let node = node_with(dir.path(), &frail, &["--ec", "4+2"]);
    let uri = format!("--uri={}", node.uri);
    let job = ["--name=v", "--ioengine=nbd", &uri, "--size=96M", "--bsrange=4k-256k"];
    let verify =
        ["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256", "--verify_state_save=0"];
    let load = ["--rw=randrw", "--iodepth=8", "--time_based", "--runtime=16", "--rate_iops=300"];
    let fio = spawn("fio", &[&job[..], &verify, &load, &["--output-format=json"]].concat());
    pause(4);
    frail.fail();
    online(&node, 5);
    let status = node.ctl(&["status"]);
    let why = if frail.server.is_some() { "Input/output error" } else { "was cut" };
    assert!(status.contains(why), "{status}");
    pause(4);
    let healed = frail.heal();
    if healed {
        online(&node, 6);
    }
    println!("{}", verified(fio));
    if healed {
        node.wait_json("redundant again", &["status"], |status| status["health"] == "ok");
    }
    node.stop();
}
