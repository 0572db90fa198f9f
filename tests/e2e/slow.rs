//! A disk becomes far slower in the middle of a load: it is named, avoided, set aside, taken back.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::support::{Node, directory, finish, run, spawn};

/// A disk whose speed a file says.
struct Sluggish {
    path: PathBuf,
    rate: PathBuf,
    mount: PathBuf,
    server: Child,
}

impl Sluggish {
    /// A disk of 512 MiB, by nbdkit's rate filter under FUSE; none where that cannot be mounted.
    fn new(dir: &Path) -> Option<Self> {
        let (mount, rate) = (dir.join("sluggish"), dir.join("rate"));
        std::fs::create_dir(&mount).expect("a directory");
        let path = mount.join("disk");
        std::fs::write(&rate, "100G").expect("a rate");
        let file = format!("rate-file={}", rate.display());
        let nbdkit = ["--command", "nbdkit", "-s", "--exit-with-parent", "memory", "512M"];
        let mut command = Command::new("nbdfuse");
        command.arg(&path).args(nbdkit).args(["--filter=rate", &file]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut server = command.spawn().expect("nbdfuse starts: tools/setup installs it");
        for _ in 0..100 {
            if path.exists() {
                return Some(Self { path, rate, mount, server });
            }
            if server.try_wait().is_ok_and(|ended| ended.is_some()) {
                return None;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        server.kill().ok();
        server.wait().ok();
        None
    }

    /// Bits a second from now on; the filter wants the file replaced at once.
    fn set_rate(&self, rate: &str) {
        let new = self.rate.with_extension("new");
        std::fs::write(&new, rate).expect("a rate");
        std::fs::rename(&new, &self.rate).expect("it is replaced");
    }
}

impl Drop for Sluggish {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.mount).stderr(Stdio::null()).status().ok();
        self.server.kill().ok();
        self.server.wait().ok();
    }
}

/// A node of a sluggish disk and six others, with a volume `p/v`.
fn node_with(dir: &Path, sluggish: &Sluggish) -> Node {
    let config = dir.join("sdsd.toml");
    let text = format!(
        "data_dir = \"{}\"\n[nbd]\naddresses = [\"127.0.0.1:0\"]\n[admin]\n\
         address = \"127.0.0.1:0\"\n[care]\nset_aside_seconds = 12\n",
        dir.join("data").display()
    );
    std::fs::write(&config, text).expect("a configuration");
    let node = Node::start_configured(&config, "p/v");
    node.ctl(&["disk", "add", sluggish.path.to_str().expect("UTF-8")]);
    for index in 1..7 {
        let path = node.disk(index).display().to_string();
        node.ctl(&["disk", "add", &path, "--size", "512M"]);
    }
    node.ctl(&["pool", "create", "p", "--ec", "4+2"]);
    node.ctl(&["volume", "create", "p/v", "--size", "128M"]);
    node
}

#[test]
fn a_slow_disk_is_named_and_avoided_then_set_aside_and_taken_back_under_fuse() {
    let dir = directory();
    // The kernel has no other disk whose speed can change; tools/test leaves such tests out where
    // this does not work, and says so.
    let sluggish = Sluggish::new(dir.path()).expect("FUSE works here");
    let node = node_with(dir.path(), &sluggish);
    let path = sluggish.path.display().to_string();
    let uri = format!("--uri={}", node.uri);
    let job = ["--name=v", "--ioengine=nbd", &uri, "--size=96M", "--bsrange=4k-128k"];
    let verify =
        ["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256", "--verify_state_save=0"];
    let load = ["--rw=randrw", "--iodepth=4", "--time_based", "--runtime=25", "--rate_iops=200"];
    let fio = spawn("fio", &[&job[..], &verify, &load, &["--output-format=json"]].concat());
    std::thread::sleep(Duration::from_secs(4));
    sluggish.set_rate("1M");
    node.wait_json("it is named", &["disk", "show", &path], |disk| disk["state"] == "slow");
    let status = node.json(&["status"]);
    assert_ne!(status["health"], "ok", "{status:#}");
    let text = node.ctl(&["status"]);
    let named = text.lines().find(|line| line.contains(&path)).unwrap_or_else(|| panic!("{text}"));
    assert!(named.contains("slower than its peers"), "{named}");
    assert!(named.contains("p99") && named.contains("its peers'"), "with its figures: {named}");
    assert!(node.ctl(&["disk", "show", &path]).contains("; its peers"), "{text}");
    node.wait_json("it is set aside", &["disk", "show", &path], |d| d["state"] == "set-aside");
    let report = finish("fio", fio);
    assert!(report.contains("\"error\" : 0"), "{report}");
    node.wait_json("healed around", &["volume", "ls"], |volumes| {
        volumes[0]["redundancy"]["state"] == "full"
    });
    assert!(node.ctl(&["status"]).contains("was set aside"));
    sluggish.set_rate("100G");
    // What it had begun may take a while to end.
    for _ in 0..60 {
        if node.ctl_raw(&["disk", "online", &path]).0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    node.wait_json("healthy", &["status"], |status| status["health"] == "ok");
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "write -P 7 0 8M", "-c", "read -P 7 0 8M"]);
    node.stop();
}
