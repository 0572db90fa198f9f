//! A node whose metadata is in an etcd, and what its users notice when that goes away.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::etcd_support::Etcd;
use super::support::{Client, Node, Noise, directory, run};

/// A configuration of a node on free ports in `dir`.
fn configure(dir: &Path, etcd: &[String], disks: &str) -> PathBuf {
    let path = dir.join("sdsd.toml");
    let text = format!(
        "data_dir = \"{}\"\n{disks}\n[store]\nbackend = \"etcd\"\nendpoints = {etcd:?}\n[nbd]\n\
         addresses = [\"127.0.0.1:0\"]\n[admin]\naddress = \"127.0.0.1:0\"\n[cache]\n\
         overlay_extents = 2048\n",
        dir.join("data").display()
    );
    std::fs::write(&path, text).expect("a configuration");
    path
}

fn furnish(node: &Node) {
    for index in 0..3 {
        let path = node.disk(index).display().to_string();
        node.ctl(&["disk", "add", &path, "--size", "512M"]);
    }
    node.ctl(&["pool", "create", "p", "--ec", "2+1"]);
    node.ctl(&["volume", "create", "p/v", "--size", "128M"]);
}

/// Bytes of all disks that are taken.
fn used(node: &Node) -> u64 {
    let disks = node.json(&["disk", "ls"]);
    let disks = disks.as_array().expect("a list").iter();
    disks.map(|disk| disk["used"].as_u64().expect("a number")).sum()
}

/// Overwrites random blocks of the first 32 MiB, and reads others; `image` is what is there.
fn churn(client: &mut Client, noise: &mut Noise, image: &mut [u8], rounds: usize) {
    const PIECE: usize = 4 << 10;
    let pieces = (image.len() / PIECE) as u64;
    for _ in 0..rounds {
        let at = usize::try_from(noise.below(pieces)).expect("small") * PIECE;
        let data = noise.bytes(PIECE);
        assert_eq!(client.write(at as u64, &data).expect("attached"), 0, "a write succeeds");
        image[at..at + PIECE].copy_from_slice(&data);
        let at = usize::try_from(noise.below(pieces)).expect("small") * PIECE;
        let read = client.read(at as u64, PIECE).expect("attached");
        assert!(read == image[at..at + PIECE], "what was written is read");
    }
}

#[test]
fn a_node_on_etcd_outlives_its_outages() {
    let dir = directory();
    let mut etcd = Etcd::start(1);
    let config = configure(dir.path(), &etcd.urls(), "");
    let node = Node::start_configured(&config, "p/v");
    furnish(&node);
    assert!(!dir.path().join("data/meta.redb").exists());
    let keys = etcd.ctl(0, &["get", "--prefix", "", "--keys-only"]);
    for key in ["/sds/cluster\n", "/sds/pool/p\n", "/sds/volume-name/p/v\n"] {
        assert!(keys.contains(key), "{key} is not in {keys}");
    }

    let mut noise = Noise(11);
    let mut image = vec![0; 32 << 20];
    let mut client = Client::attach(&node.nbd, "p/v").expect("it is served");
    churn(&mut client, &mut noise, &mut image, 200);
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "write -P 5 64M 56M"]);

    // The writes are scattered over more extents than one checkpoint may leave to the overlay.
    etcd.stop(0);
    churn(&mut client, &mut noise, &mut image, 3000);
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "discard 64M 56M"]);
    let (ok, said) = node.ctl_raw(&["volume", "create", "p/w", "--size", "16M"]);
    assert!(!ok && said.contains("the metadata store is unavailable"), "{said}");
    churn(&mut client, &mut noise, &mut image, 100);
    let taken = used(&node);
    etcd.restart(0);

    // All by itself: what was discarded is freed, which takes a root that names a checkpoint.
    let freed = || {
        churn(&mut client, &mut noise, &mut image, 200);
        used(&node) < taken
    };
    assert!(eventually(freed), "{} are taken, {taken} before", used(&node));
    node.ctl(&["volume", "create", "p/w", "--size", "16M"]);
    node.wait_json("healthy", &["status"], |status| status["health"] == "ok");

    // Another node would take the volumes from this one.
    let other = dir.path().join("other");
    std::fs::create_dir(&other).expect("a directory");
    let said = refused(&["--config", configure(&other, &etcd.urls(), "").to_str().expect("UTF-8")]);
    assert!(said.contains("only the nodes of a cluster share one"), "{said}");

    // A kill in the midst of it, and a restart of the node.
    etcd.kill(0);
    churn(&mut client, &mut noise, &mut image, 50);
    etcd.restart(0);
    drop(client);
    node.stop();
    let node = Node::start_configured(&config, "p/v");
    let mut client = Client::attach(&node.nbd, "p/v").expect("it is served");
    for at in (0..image.len()).step_by(1 << 20) {
        let read = client.read(at as u64, 1 << 20).expect("attached");
        assert!(read == image[at..at + (1 << 20)], "what was written is there");
    }
    node.kill();
    let node = Node::start_configured(&config, "p/v");
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "read 0 32M"]);
    node.stop();
}

fn eventually(mut done: impl FnMut() -> bool) -> bool {
    for _ in 0..240 {
        if done() {
            return true;
        }
        std::thread::sleep(std::time::Duration::from_millis(250));
    }
    false
}

/// Runs `sdsd` with arguments that it refuses; what it says.
fn refused(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_sdsd")).args(args).output().expect("sdsd starts");
    assert!(!output.status.success(), "{args:?} is accepted");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn an_etcd_that_was_lost_or_went_back_is_noticed_and_rebuilt_from_the_disks() {
    let dir = directory();
    let mut etcd = Etcd::start(1);
    let config = configure(dir.path(), &etcd.urls(), "");
    let node = Node::start_configured(&config, "p/v");
    let disk = node.disk(0).display().to_string();
    furnish(&node);
    let snapshot = etcd.snapshot();
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "write -P 5 1000 3M"]);
    node.ctl(&["volume", "create", "p/later", "--size", "16M"]);
    node.stop();

    // An old copy is not believed.
    let config = configure(dir.path(), &etcd.urls(), &format!("disks = [\"{disk}\"]"));
    let text = config.to_str().expect("UTF-8");
    etcd.stop(0);
    etcd.restore(&snapshot, None);
    let said = refused(&["--config", text]);
    assert!(said.contains("the store is an old copy"), "{said}");
    let said = refused(&["recover", "--config", text]);
    assert!(said.contains("recovered only when it is lost"), "{said}");

    // Nor is one that is empty, unless it is rebuilt.
    etcd.ctl(0, &["del", "--prefix", "/sds/"]);
    let said = refused(&["--config", text]);
    assert!(said.contains("`sdsd recover` rebuilds the store"), "{said}");
    etcd.ctl(0, &["put", "/sds/pool/x", "left"]);
    let said = refused(&["recover", "--config", text]);
    assert!(said.contains("but no cluster"), "{said}");
    etcd.ctl(0, &["del", "/sds/pool/x"]);
    run(env!("CARGO_BIN_EXE_sdsd"), &["recover", "--config", text]);
    let node = Node::start_configured(&config, "p/v");
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "read -P 5 1000 3M"]);
    node.ctl(&["volume", "create", "p/new", "--size", "16M"]);
    let volumes = node.ctl(&["volume", "ls"]);
    assert!(volumes.contains("later"), "{volumes}");
    node.stop();
}
