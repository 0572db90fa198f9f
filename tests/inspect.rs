//! `sdsctl inspect` on disks with real data, and on what is no disk any more.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;

use bytes::Bytes;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use sds::buffer::AlignedBuf;
use sds::disk::format::Superblock;
use sds::disk::geometry::SUPERBLOCK_OFFSETS;
use sds::disk::uring::{OpenOptions, Ring, UringDevice};
use sds::disk::{Disk, FormatOptions, Geometry};
use sds::env::Env;
use sds::export::BlockTarget;
use sds::id::{BLOCK_SIZE, ClusterId, DiskId, VolumeId};
use sds::meta::memory::MemoryStore;
use sds::meta::record::{ClusterRecord, VolumeRecord, VolumeState};
use sds::meta::{MetaStore, Txn, schema};
use sds::shard::Scheme;
use sds::shard::disks::Disks;
use sds::shard::domain::Domains;
use sds::shard::local::LocalClient;
use sds::volume::head::{HeadConfig, HeadContext, PoolPolicy};
use sds::volume::root::Root;
use sds::volume::rules::{LogSet, Member};
use sds::volume::takeover::take_over;
use sds::volume::target::HeadTarget;
use serde_json::Value;

const DISK_BYTES: u64 = 8 << 20;
const SCHEME: Scheme = Scheme { data: 2, parity: 1 };
const NAME: &str = "default/vol0";

fn geometry() -> Geometry {
    Geometry::plan(DISK_BYTES).unwrap()
}

/// Three disks that a volume was written to, as they were when its node lost power.
struct Fixture {
    dir: tempfile::TempDir,
    volume: VolumeId,
    ids: Vec<DiskId>,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let local = tokio::task::LocalSet::new();
        let (volume, ids) = local.block_on(&runtime, write_disks(dir.path()));
        Self { dir, volume, ids }
    }

    fn disk(&self, index: usize) -> PathBuf {
        self.dir.path().join(format!("disk{index}"))
    }

    /// The slots that hold a shard, of a disk.
    fn shards(&self, index: usize) -> Vec<Value> {
        let report = inspect_json(0, &["disk", text(&self.disk(index)), "--slots"]);
        report["shards"].as_array().unwrap().clone()
    }

    /// A sealed shard of this kind on a disk.
    fn sealed(&self, index: usize, kind: &str) -> Value {
        let is_it = |s: &Value| s["kind"] == kind && s["state"] == "sealed";
        self.shards(index).into_iter().find(is_it).expect("the fixture has one")
    }
}

/// Formats disks, and writes a volume: stripes, small writes, zeroes, a checkpoint between.
async fn write_disks(dir: &Path) -> (VolumeId, Vec<DiskId>) {
    let env = Env::from_seed(7);
    let ring = Ring::new().unwrap();
    let cluster = ClusterId::from_bytes(env.random_bytes());
    let disks = Rc::new(Disks::default());
    let mut members = Vec::new();
    for domain in 0..3 {
        let options = OpenOptions { create_size: Some(DISK_BYTES), read_only: false };
        let device = UringDevice::open(dir.join(format!("disk{domain}")), &ring, options).unwrap();
        let disk = DiskId::from_bytes(env.random_bytes());
        let options =
            FormatOptions { disk, cluster, slot_bytes: None, volumes_max: None, force: false };
        Disk::format(&device, options).await.unwrap();
        let disk = Disk::open(Rc::new(device)).await.unwrap();
        let info = disk.info().unwrap();
        members.push(Member { disk: info.id, domain });
        disks.add(Rc::new(LocalClient::new(disk)), Domains::of_one_node(domain), info);
    }
    let ids = members.iter().map(|member| member.disk).collect();
    let store = Rc::new(MemoryStore::new(env.clone()));
    let record = ClusterRecord { id: cluster, incarnation: 1 };
    schema::Schema::new(store.clone()).initialise(&record).await.unwrap();
    let id = VolumeId::from_bytes(env.random_bytes());
    let description = VolumeRecord {
        id,
        name: "vol0".into(),
        pool: "default".into(),
        size_bytes: 16 << 20,
        cut_from_bytes: None,
        block_bytes: 512,
        state: VolumeState::Active,
        created_at_unix_s: 0,
    };
    let description = serde_json::json!({ "volume": description });
    let root = Root::fresh(id, LogSet::new(members, 2).unwrap(), description);
    store.txn(Txn::new().put(schema::root_key(id), root.encode())).await.unwrap();
    let config = HeadConfig { large_write_blocks: 16, ..HeadConfig::default() };
    let pool = PoolPolicy { scheme: SCHEME, min_size: 1 };
    let context = HeadContext { env, disks, store, config, pool };
    let target = HeadTarget(take_over(context, id, 16 << 20, &|_| ()).await.unwrap());
    for round in 0..3_u64 {
        for stripe in 0..4_u64 {
            let data = pattern(stripe + 10 * round, 32);
            target.write((round * 4 + stripe) * (128 << 10), data).await.unwrap();
        }
        for block in 0..12_u64 {
            target.write((8 << 20) + block * 8192, pattern(block, 1)).await.unwrap();
        }
        target.zero(round << 20, 8192, false).await.unwrap();
        target.flush().await.unwrap();
        if round < 2 {
            target.0.checkpoint().await.unwrap();
        }
    }
    (id, ids)
}

fn pattern(seed: u64, blocks: usize) -> Bytes {
    let mut buf = AlignedBuf::new(blocks * BLOCK_SIZE);
    for (index, word) in (0_u64..).zip(buf.chunks_exact_mut(8)) {
        word.copy_from_slice(&(index + (seed << 32) + 1).to_le_bytes());
    }
    buf.freeze()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn sdsctl(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sdsctl"));
    // It must do without a node, whatever the environment says of one.
    command.env("SDS_ENDPOINT", "no address").arg("inspect").args(args).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Runs it with this exit code; what it shows, as JSON.
fn inspect_json(code: i32, args: &[&str]) -> Value {
    let output = sdsctl(&[args, &["-o", "json"]].concat());
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Runs it with this exit code; what it says on standard error.
fn complaint(code: i32, args: &[&str]) -> String {
    let output = sdsctl(args);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}", stderr(&output));
    stderr(&output)
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

fn flip(path: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 4], offset).unwrap();
}

#[test]
fn a_disk_is_told_whole() {
    let fixture = Fixture::new();
    let (path, volume) = (fixture.disk(1), fixture.volume.to_string());
    let report = inspect_json(0, &["disk", text(&path), "--slots"]);
    assert_eq!(report["disk"], fixture.ids[1].to_string());
    assert_eq!(report["in_use"], false);
    let copies = report["superblocks"].as_array().unwrap();
    assert_eq!((&copies[0]["counts"], &copies[1]["counts"]), (&true.into(), &false.into()));
    assert_eq!(copies[1]["sequence"], 2);
    assert_eq!(number(&report["layout"]["slots"]), u64::from(geometry().slots));
    let fence = &report["volumes"][0];
    assert_eq!((&fence["volume"], &fence["name"]), (&volume.clone().into(), &NAME.into()));
    assert_eq!(fence["mirror"]["root"]["epoch"], (1_u64 << 40) | 1);
    assert!(number(&fence["mirror"]["root"]["checkpoint"]["place"]["sequence"]) > 1);
    let shards = report["shards"].as_array().unwrap();
    assert_eq!(number(&fence["shards"]), shards.len() as u64);
    let slots = &report["slots"];
    let used = ["open", "closed", "sealed"].map(|state| number(&slots[state]));
    assert_eq!(used.iter().sum::<u64>(), shards.len() as u64);
    assert!(used[0] > 0 && used[2] > 0, "some are open and some sealed: {slots}");
    for shard in shards {
        let members = shard["members"].as_array().unwrap();
        let index = usize::try_from(number(&shard["shard"])).unwrap();
        assert_eq!(members[index], fixture.ids[1].to_string(), "{shard}");
        assert_eq!(shard["blocks"].is_null(), shard["state"] != "sealed", "{shard}");
    }
    let shown = stdout(&sdsctl(&["disk", text(&path), "--slots"]));
    for part in [NAME, "superblock 0: valid, write 2, counts", "2+1", "2 copies", "sealed"] {
        assert!(shown.contains(part), "no {part:?} in:\n{shown}");
    }
    assert!(!stdout(&sdsctl(&["disk", text(&path)])).contains("WRITE SET"));
}

#[test]
fn every_record_of_every_shard_is_decoded() {
    let fixture = Fixture::new();
    let mut kinds = std::collections::BTreeSet::new();
    let (mut lsns, mut lbas) = (std::collections::BTreeSet::new(), 0);
    for index in 0..3 {
        let path = fixture.disk(index);
        for shard in fixture.shards(index) {
            let segment = shard["segment"].to_string();
            let report = inspect_json(0, &["segment", text(&path), NAME, &segment, "--blocks"]);
            kinds.insert(shard["kind"].as_str().unwrap().to_owned());
            let mut at = 0;
            for record in report["records"].as_array().unwrap() {
                assert_eq!((number(&record["block"]), &record["fault"]), (at, &Value::Null));
                let offset = at.to_string();
                let id = &fixture.volume.to_string()[..8];
                let whole = inspect_json(0, &["record", text(&path), id, &segment, &offset]);
                let payload = whole["payload"].as_array().unwrap();
                assert!(payload.iter().all(|block| block["state"] == "ok"), "{whole}");
                assert_eq!(payload.len() as u64, number(&record["payload_blocks"]));
                if shard["kind"] == "log" {
                    lsns.insert(number(&record["lsn"]));
                }
                lbas += whole["entries"].as_array().unwrap().iter().fold(0, |sum, entry| {
                    sum + if entry["kind"] == "write" { number(&entry["blocks"]) } else { 0 }
                });
                at += number(&record["blocks"]);
            }
            assert_eq!(number(&report["end"]["block"]), at);
            assert_eq!(number(&report["end"]["whole_blocks"]), at);
            let blocks = report["block_list"].as_array().unwrap();
            assert_eq!(blocks.len() as u64, at, "sealed or not, all that the records cover");
            assert!(blocks.iter().all(|block| block["state"] == "ok"));
            if shard["state"] == "sealed" {
                assert_eq!(number(&report["checksums"]["ok"]), at);
            }
        }
    }
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["data", "log", "meta"]);
    // The checkpoints let go of the beginning of the log; an opening record has LSN 0.
    lsns.remove(&0);
    let (first, last) = (*lsns.first().unwrap(), *lsns.last().unwrap());
    assert!(last > 50 && lsns.len() as u64 == last - first + 1, "one is left out: {lsns:?}");
    assert!(lbas > 3 * 12, "the small writes are in the log");
}

#[test]
fn a_record_shows_the_data_that_was_written() {
    let fixture = Fixture::new();
    let path = fixture.disk(0);
    let geometry = geometry();
    let shards = fixture.shards(0);
    let mut found = 0;
    for shard in shards.iter().filter(|shard| shard["kind"] != "meta") {
        let segment = shard["segment"].to_string();
        let slot = u32::try_from(number(&shard["slot"])).unwrap();
        let report = inspect_json(0, &["segment", text(&path), NAME, &segment]);
        for record in report["records"].as_array().unwrap() {
            let offset = record["block"].to_string();
            let whole = inspect_json(0, &["record", text(&path), NAME, &segment, &offset]);
            for view in whole["payload"].as_array().unwrap() {
                let Some(lba) = view["holds"].as_str().and_then(|h| h.strip_prefix("LBA ")) else {
                    assert_eq!(number(&shard["shard"]), 2, "only parity is nobody's: {whole}");
                    continue;
                };
                let lba: u64 = lba.parse().unwrap();
                let block = u32::try_from(number(&view["block"])).unwrap();
                let mut data = vec![0; BLOCK_SIZE];
                let file = File::open(&path).unwrap();
                file.read_exact_at(&mut data, geometry.block_offset(slot, block)).unwrap();
                let (round, stripe, inner) = (lba / 128, lba / 32 % 4, lba % 32);
                let expected = if lba < 2048 {
                    let start = usize::try_from(inner).unwrap() * BLOCK_SIZE;
                    pattern(stripe + 10 * round, 32).slice(start..start + BLOCK_SIZE)
                } else {
                    pattern((lba - 2048) / 2, 1)
                };
                assert!(data == expected[..], "block {block} of segment {segment}: LBA {lba}");
                found += 1;
            }
        }
    }
    assert!(found > 100, "{found} blocks");
}

#[test]
fn a_disk_in_use_is_shown_and_said_to_be() {
    let fixture = Fixture::new();
    let path = fixture.disk(0);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let local = tokio::task::LocalSet::new();
    let ring = local.block_on(&runtime, async { Ring::new().unwrap() });
    let device = UringDevice::open(&path, &ring, OpenOptions::default()).unwrap();
    assert_eq!(inspect_json(0, &["disk", text(&path)])["in_use"], true);
    assert!(stdout(&sdsctl(&["disk", text(&path)])).contains("may be changing"));
    drop(device);
    assert_eq!(inspect_json(0, &["disk", text(&path)])["in_use"], false);
}

#[test]
fn damage_is_located() {
    let fixture = Fixture::new();
    let geometry = geometry();
    let path = fixture.disk(0);
    let shard = fixture.sealed(0, "data");
    let (segment, slot) = (shard["segment"].to_string(), number(&shard["slot"]));
    let slot = u32::try_from(slot).unwrap();
    flip(&path, geometry.block_offset(slot, 3) + 77);
    let args = ["segment", text(&path), NAME, &segment];
    let report = inspect_json(4, &[&args[..], &["--blocks"]].concat());
    assert_eq!(report["records"][0]["bad_blocks"], serde_json::json!([3]));
    assert_eq!(report["checksums"]["bad"], 1);
    assert_eq!(report["block_list"][3]["state"], "bad");
    assert!(complaint(4, &args).contains("1 blocks do not match"));
    let args = ["record", text(&path), NAME, &segment, "0"];
    assert!(complaint(4, &args).contains("1 of"));

    flip(&path, geometry.block_offset(slot, 0) + 200);
    let report = inspect_json(4, &["segment", text(&path), NAME, &segment]);
    let records = report["records"].as_array().unwrap();
    assert_eq!(records[0]["fault"], "the record's header is damaged");
    assert!(records[1..].iter().all(|record| record["fault"].is_null()), "it goes on after it");
    assert_eq!(report["end"]["whole_blocks"], 0);
    assert!(complaint(1, &args).contains("header is damaged"));

    flip(&path, geometry.checksum_page_offset(geometry.checksum_page(slot)) + 999);
    let report = inspect_json(4, &["segment", text(&path), NAME, &segment]);
    assert_eq!(number(&report["checksums"]["unknown"]), number(&shard["blocks"]));
    assert!(report["checksums"]["faults"][0].as_str().unwrap().contains("wrong checksum"));

    // One copy of a page is no damage; both are.
    flip(&path, geometry.slot_page_offset(0, 1) + 999);
    let report = inspect_json(0, &["disk", text(&path)]);
    assert_eq!(
        (&report["pages"][0]["table"], &report["pages"][0]["damaged"]),
        (&"slot".into(), &false.into())
    );
    assert_eq!(report["slots"]["unreadable"], 0);
    flip(&path, geometry.slot_page_offset(0, 0) + 999);
    let report = inspect_json(4, &["disk", text(&path), "--slots"]);
    assert_eq!(report["slots"]["unreadable"], 8);
    let error = complaint(4, &["disk", text(&path)]);
    assert!(error.contains("1 table pages are unreadable in both copies"), "{error}");
    let error = complaint(1, &["segment", text(&path), NAME, &segment]);
    assert!(error.contains("8 slots are unreadable"), "{error}");

    flip(&path, SUPERBLOCK_OFFSETS[0] + 99);
    let report = inspect_json(4, &["disk", text(&path)]);
    assert_eq!(report["superblocks"][0]["fault"], "wrong checksum");
    assert_eq!(report["superblocks"][1]["counts"], true);
    flip(&path, SUPERBLOCK_OFFSETS[1] + 99);
    assert!(complaint(1, &["disk", text(&path)]).contains("both superblocks are damaged"));
}

#[test]
fn what_is_no_disk_is_refused_with_a_reason() {
    let fixture = Fixture::new();
    let path = fixture.disk(2);
    let (page, geometry) = (BLOCK_SIZE, geometry());
    let intact = fs::read(&path).unwrap();
    let write = |bytes: &[u8]| fs::write(&path, bytes).unwrap();
    let disk = ["disk", text(&path)];

    write(&vec![b'x'; 1 << 20]);
    assert!(complaint(1, &disk).contains("not ours"));
    write(&vec![0; 1 << 20]);
    assert!(complaint(1, &disk).contains("blank"));
    write(b"short");
    assert!(complaint(1, &disk).contains("less than one block"));
    assert!(complaint(1, &["disk", text(fixture.dir.path())]).contains("neither"));
    assert!(complaint(1, &["disk", "/nowhere/disk"]).contains("No such file"));
    assert!(complaint(2, &["disk"]).contains("PATH"));

    // The first superblock with other content and a checksum that fits.
    let change = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = intact.clone();
        for offset in SUPERBLOCK_OFFSETS {
            let at = usize::try_from(offset).unwrap();
            let page = &mut bytes[at..at + page];
            change(page);
            page[12..16].fill(0);
            let crc = crc32fast::hash(page);
            page[12..16].copy_from_slice(&crc.to_le_bytes());
        }
        write(&bytes);
    };
    change(&|page| page[8] = 9);
    assert!(complaint(1, &disk).contains("format version 9, which is newer"));
    let superblock = Superblock::decode(&intact[..page]).unwrap();
    let half = Superblock { complete: false, ..superblock }.encode();
    change(&|page| page.copy_from_slice(&half));
    assert!(complaint(1, &disk).contains("interrupted"));

    // Cut: what is left is told.
    write(&intact[..intact.len() - (1 << 20)]);
    let report = inspect_json(4, &disk);
    assert!(report["contradictions"][0].as_str().unwrap().contains("was formatted with"));
    assert_eq!(report["volumes"].as_array().unwrap().len(), 1);
    write(&intact[..usize::try_from(geometry.volume_table).unwrap()]);
    assert!(complaint(4, &disk).contains("unreadable in both copies"));
    write(&intact[..5000]);
    assert!(complaint(4, &disk).contains("was formatted with"));

    write(&intact);
    let there = fixture.shards(2)[0]["segment"].to_string();
    let path = text(&path);
    for (args, why) in [
        (&["segment", path, "default/other", "1"][..], "nothing of a volume"),
        (&["segment", path, "123", "1"], "nothing of a volume"),
        (&["segment", path, NAME, "99999"], "no shard of segment 99999"),
        (&["record", path, NAME, &there, "4294967295"], "ends before"),
    ] {
        let error = complaint(1, args);
        assert!(error.contains(why) && error.contains("hint: "), "{args:?}: {error}");
    }
    complaint(2, &["segment", path, NAME, "one"]);
    complaint(2, &["record", path, NAME, "1", "-1"]);
}

/// What is done to a disk.
#[derive(Debug, Clone)]
enum Harm {
    Flip(prop::sample::Index, u8),
    Noise(prop::sample::Index, Vec<u8>),
    Cut(prop::sample::Index),
}

fn harm() -> impl Strategy<Value = Harm> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        6 => (index(), any::<u8>()).prop_map(|(at, bits)| Harm::Flip(at, bits)),
        3 => (index(), prop::collection::vec(any::<u8>(), 1..5000))
            .prop_map(|(at, noise)| Harm::Noise(at, noise)),
        1 => index().prop_map(Harm::Cut),
    ]
}

#[test]
fn nothing_makes_it_panic() {
    let fixture = Fixture::new();
    let intact = fs::read(fixture.disk(0)).unwrap();
    let shards = fixture.shards(0);
    let path = fixture.disk(1);
    // Tables and the first slots: harm elsewhere changes nothing.
    let reach = usize::try_from(geometry().block_offset(8, 0)).unwrap();
    let mut runner = TestRunner::new(Config { cases: 64, ..Config::default() });
    let cases = (prop::collection::vec(harm(), 1..40), any::<prop::sample::Index>(), 0_u32..20);
    runner
        .run(&cases, |(harms, shard, offset)| {
            let mut bytes = intact.clone();
            for harm in harms {
                let reach = reach.min(bytes.len());
                match harm {
                    Harm::Flip(at, bits) => bytes[at.index(reach)] ^= bits,
                    Harm::Noise(at, noise) => {
                        let at = at.index(reach);
                        let end = bytes.len().min(at + noise.len());
                        bytes[at..end].copy_from_slice(&noise[..end - at]);
                    }
                    Harm::Cut(at) => bytes.truncate(at.index(bytes.len()).max(1)),
                }
            }
            fs::write(&path, &bytes).unwrap();
            let shard = shard.get(&shards);
            let segment = shard["segment"].to_string();
            let (volume, offset) = (fixture.volume.to_string(), offset.to_string());
            let path = text(&path);
            for args in [
                &["disk", path, "--slots"][..],
                &["segment", path, &volume, &segment, "--blocks"],
                &["record", path, &volume, &segment, &offset],
            ] {
                for form in ["table", "json"] {
                    let output = sdsctl(&[args, &["-o", form]].concat());
                    let error = stderr(&output);
                    prop_assert!(
                        matches!(output.status.code(), Some(0 | 1 | 4)),
                        "{:?}: {}",
                        args,
                        error
                    );
                    prop_assert!(error.is_empty() == output.status.success());
                    if form == "json" && !output.stdout.is_empty() {
                        let shown = serde_json::from_slice::<Value>(&output.stdout);
                        prop_assert!(shown.is_ok(), "{:?}", args);
                    }
                }
            }
            Ok(())
        })
        .unwrap();
}
