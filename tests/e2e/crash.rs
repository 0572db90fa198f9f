//! kill -9, and the loss of the metadata store.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::support::{Client, Node, Noise, SMALL, directory};

const SECTOR: usize = 512;
const CLIENTS: u64 = 4;
/// Sectors that each client owns.
const SECTORS: u64 = 8192;
/// Largest write, sectors.
const WRITE_SECTORS_MAX: u64 = 200;

/// What the sectors of one client may hold.
struct Owner {
    number: u64,
    noise: Noise,
    version: u64,
    acknowledged: Vec<u64>,
    /// The write that was under way when the node died: first sector, sectors, version.
    in_flight: Option<(u64, u64, u64)>,
}

fn content(sector: u64, version: u64) -> Vec<u8> {
    if version == 0 {
        return vec![0; SECTOR];
    }
    Noise(sector << 32 | version << 1 | 1).bytes(SECTOR)
}

impl Owner {
    fn new(number: u64) -> Self {
        let acknowledged = vec![0; usize::try_from(SECTORS).expect("small")];
        let noise = Noise(number * 7919 + 1);
        Self { number, noise, version: 0, acknowledged, in_flight: None }
    }

    fn base(&self) -> u64 {
        self.number * SECTORS
    }

    /// Writes until the node dies or `stop` is set.
    fn write(&mut self, address: &str, stop: &AtomicBool) {
        let Ok(mut client) = Client::attach(address, "vol0") else { return };
        while !stop.load(Ordering::Relaxed) {
            let small = self.noise.below(4) > 0;
            let most = if small { 16 } else { WRITE_SECTORS_MAX };
            let count = 1 + self.noise.below(most);
            let first = self.noise.below(SECTORS - count);
            self.version += 1;
            let base = self.base();
            let data: Vec<u8> =
                (first..first + count).flat_map(|s| content(base + s, self.version)).collect();
            self.in_flight = Some((first, count, self.version));
            match client.write((base + first) * SECTOR as u64, &data) {
                Ok(0) => {}
                Ok(errno) => panic!("a write failed with error {errno}"),
                Err(_) => return,
            }
            self.in_flight = None;
            for sector in first..first + count {
                self.acknowledged[usize::try_from(sector).expect("small")] = self.version;
            }
        }
    }

    /// Every acknowledged write is there.
    fn verify(&mut self, address: &str) {
        let mut client = Client::attach(address, "vol0").expect("the node serves");
        let base = self.base();
        let step = 512;
        for at in (0..SECTORS).step_by(step) {
            let data = client.read((base + at) * SECTOR as u64, step * SECTOR).expect("a read");
            for (sector, found) in (at..).zip(data.chunks(SECTOR)) {
                let index = usize::try_from(sector).expect("small");
                let known = self.acknowledged[index];
                if found == content(base + sector, known) {
                    continue;
                }
                let maybe = self.in_flight.filter(|(first, count, version)| {
                    (*first..first + count).contains(&sector)
                        && found == content(base + sector, *version)
                });
                let Some((_, _, version)) = maybe else {
                    panic!("sector {sector} of client {} lost version {known}", self.number);
                };
                self.acknowledged[index] = version;
            }
        }
        self.in_flight = None;
    }
}

/// Lets all clients write for a time, then ends the node with `end`.
fn write_for(node: Node, owners: Vec<Owner>, time: Duration, end: impl Fn(Node)) -> Vec<Owner> {
    let stop = Arc::new(AtomicBool::new(false));
    let address = node.nbd.clone();
    let threads: Vec<_> = owners
        .into_iter()
        .map(|mut owner| {
            let (stop, address) = (stop.clone(), address.clone());
            std::thread::Builder::new()
                .spawn(move || {
                    owner.write(&address, &stop);
                    owner
                })
                .expect("a thread")
        })
        .collect();
    std::thread::sleep(time);
    end(node);
    stop.store(true, Ordering::Relaxed);
    threads.into_iter().map(|thread| thread.join().expect("no client failed")).collect()
}

fn rounds() -> u64 {
    std::env::var("SDS_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5)
}

#[test]
fn no_acknowledged_write_is_lost_by_a_kill() {
    let dir = directory();
    let mut owners: Vec<Owner> = (0..CLIENTS).map(Owner::new).collect();
    let mut noise = Noise(99);
    let mut slowest = Duration::ZERO;
    for round in 0..rounds() {
        let args: &[&str] = if round == 0 { &SMALL } else { &[] };
        let node = Node::start(dir.path(), args);
        #[allow(
            clippy::disallowed_methods,
            reason = "the figure is printed, nothing depends on it"
        )]
        let started = Instant::now();
        for owner in &mut owners {
            owner.verify(&node.nbd);
        }
        slowest = slowest.max(started.elapsed());
        let time = Duration::from_millis(200 + noise.below(1500));
        owners = write_for(node, owners, time, Node::kill);
    }
    let node = Node::start(dir.path(), &[]);
    for owner in &mut owners {
        owner.verify(&node.nbd);
    }
    let writes: u64 = owners.iter().map(|owner| owner.version).sum();
    println!("{} kills, {writes} writes; slowest start and verification {slowest:?}", rounds());
    assert!(writes > 100, "too few writes to prove anything");
    node.stop();
}

#[test]
fn a_lost_store_is_rebuilt_from_the_disks() {
    let dir = directory();
    let owners = (0..CLIENTS).map(Owner::new).collect();
    let node = Node::start(dir.path(), &SMALL);
    node.ctl(&["volume", "create", "default/other", "--size", "64M"]);
    node.ctl(&["volume", "resize", "default/other", "--size", "128M"]);
    node.ctl(&["volume", "create", "default/gone", "--size", "64M"]);
    node.ctl(&["volume", "rm", "default/gone", "--yes"]);
    let mut owners = write_for(node, owners, Duration::from_secs(2), Node::kill);
    std::fs::remove_file(dir.path().join("meta.redb")).expect("the store was there");

    let refusal = Node::refused(dir.path(), &[]);
    assert!(refusal.contains("sdsd recover"), "{refusal}");
    let away = dir.path().join("away");
    std::fs::rename(dir.path().join("disk3.img"), &away).expect("a disk goes");
    let (ok, text) = recover(dir.path(), &[]);
    assert!(!ok && text.contains("--missing-disk"), "{text}");
    std::fs::rename(&away, dir.path().join("disk3.img")).expect("and comes back");
    let (ok, text) = recover(dir.path(), &[]);
    assert!(ok && text.contains("default/other, default/vol0"), "{text}");
    let (ok, text) = recover(dir.path(), &[]);
    assert!(!ok && text.contains("there is a metadata store"), "{text}");

    let node = Node::start(dir.path(), &[]);
    for owner in &mut owners {
        owner.verify(&node.nbd);
    }
    let volumes = node.json(&["volume", "ls"]);
    let sizes: Vec<_> = volumes.as_array().expect("a list").iter().map(|v| &v["size"]).collect();
    assert_eq!(sizes, [128 << 20, 256 << 20], "{volumes}");
    node.wait_json("healthy again", &["status"], |status| status["health"] == "ok");
    node.stop();
}

fn recover(dir: &std::path::Path, args: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_sdsd"))
        .args(["recover", "--dir"])
        .arg(dir)
        .args(args)
        .output()
        .expect("sdsd starts");
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn a_store_and_a_disk_are_lost_together() {
    let dir = directory();
    let owners = (0..CLIENTS).map(Owner::new).collect();
    let node = Node::start(dir.path(), &SMALL);
    let gone = node.disk_id(3);
    let mut owners = write_for(node, owners, Duration::from_secs(2), Node::kill);
    std::fs::remove_file(dir.path().join("meta.redb")).expect("the store was there");
    std::fs::remove_file(dir.path().join("disk3.img")).expect("the disk was there");

    let (ok, text) = recover(dir.path(), &[]);
    assert!(!ok && text.contains(&gone) && text.contains("--missing-disk"), "{text}");
    assert!(!dir.path().join("meta.redb").exists(), "a refusal leaves no store behind");
    let (ok, text) = recover(dir.path(), &["--missing-disk", "3f2a"]);
    assert!(!ok && text.contains("--missing-disk"), "{text}");
    let stranger = "11111111-2222-3333-4444-555555555555";
    let (ok, text) = recover(dir.path(), &["--missing-disk", stranger]);
    assert!(!ok && text.contains(&gone), "{text}");
    let (ok, text) = recover(dir.path(), &["--missing-disk", &gone]);
    assert!(ok && text.contains("default/vol0"), "{text}");

    let node = Node::start(dir.path(), &[]);
    node.wait_json("vol0 is served", &["volume", "ls"], |volumes| {
        volumes.as_array().is_some_and(|all| all.iter().all(|volume| volume["state"] == "online"))
    });
    for owner in &mut owners {
        owner.verify(&node.nbd);
    }
    let status = node.json(&["status"]);
    assert_ne!(status["health"], "ok", "five disks do not carry 4+2: {status}");
    let fresh = dir.path().join("fresh.img").display().to_string();
    node.ctl(&["disk", "add", &fresh, "--size", "512M"]);
    let listed = node.ctl(&["disk", "ls"]);
    if listed.contains(&gone) {
        node.ctl(&["disk", "rm", &gone, "--yes"]);
    }
    node.wait_json("redundant again", &["status"], |status| status["health"] == "ok");
    for owner in &mut owners {
        owner.verify(&node.nbd);
    }
    node.stop();
}
