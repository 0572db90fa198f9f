//! A disk against a model, through lives that end in power cuts, crashes and restarts.
//!
//! The model holds what was answered (must be there) and what was asked (may be there). The
//! content of a block is a function of segment, creation and block, so that the oldest tenant's
//! byte in the wrong place is noticed.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use tokio::task::LocalSet;
use tokio::time::sleep;

use super::conformance::{VOLUME, authority, format_options, spec};
use super::*;
use crate::buffer::AlignedBuf;
use crate::env::Env;
use crate::id::{BLOCK_SIZE, Epoch, SegmentId};
use crate::shard::{Append, Mirror, ShardInfo, ShardState, SlotClass};
use crate::sim::device::{SimConfig, SimDevice};
use crate::sim::simulate;

/// Asked for, then answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Done {
    #[default]
    No,
    Asked,
    Answered,
}

#[derive(Debug, Default, Clone)]
struct Shard {
    epoch: u64,
    created: Done,
    deleted: Done,
    appended: u32,
    next: u32,
    sealed: BTreeMap<u32, Done>,
}

#[derive(Default)]
struct Model {
    /// By segment and creation.
    shards: BTreeMap<(u64, u64), Shard>,
    fence_asked: u64,
    fence_answered: u64,
    mirror_answered: u64,
    creations: u64,
    events: Vec<String>,
    answered: BTreeMap<&'static str, u64>,
}

fn fill(segment: u64, creation: u64, block: u32) -> u8 {
    let mix = (segment * 31 + creation) * 17 + u64::from(block) * 7 + 1;
    u8::try_from(mix % 251).expect("less than 251")
}

struct Run {
    env: Env,
    device: SimDevice,
    model: Rc<RefCell<Model>>,
    disk: Rc<Disk>,
}

type Step = std::pin::Pin<Box<dyn Future<Output = ()>>>;

impl Run {
    fn answered(&self, what: &'static str, text: String) {
        let mut model = self.model.borrow_mut();
        *model.answered.entry(what).or_default() += 1;
        model.events.push(text);
    }

    /// A shard chosen at random among those that fit.
    fn pick(&self, fits: impl Fn(&Shard) -> bool) -> Option<((u64, u64), Shard)> {
        let model = self.model.borrow();
        let found: Vec<_> = model.shards.iter().filter(|(_, shard)| fits(shard)).collect();
        if found.is_empty() {
            return None;
        }
        let index = usize::try_from(self.env.random_below(found.len() as u64)).expect("small");
        Some((*found[index].0, found[index].1.clone()))
    }

    fn set(&self, key: (u64, u64), change: impl FnOnce(&mut Shard)) {
        change(self.model.borrow_mut().shards.get_mut(&key).expect("known"));
    }

    fn step(self: Rc<Self>, epoch: u64) -> Option<Step> {
        match self.env.random_below(20) {
            0..4 => Some(Box::pin(self.create(epoch))),
            4..12 => {
                let open = |shard: &Shard| shard.epoch == epoch && shard.created == Done::Answered;
                let (key, shard) =
                    self.pick(|s| open(s) && s.deleted == Done::No && s.next < 16)?;
                Some(self.append(epoch, key, &shard))
            }
            12..15 => {
                let alive = |s: &Shard| s.deleted == Done::No && s.created == Done::Answered;
                let (key, shard) = self.pick(|s| alive(s) && s.sealed.is_empty())?;
                Some(Box::pin(self.seal(epoch, key, shard)))
            }
            15..17 => {
                let (key, _) =
                    self.pick(|s| s.created == Done::Answered && s.deleted != Done::Answered)?;
                Some(Box::pin(self.delete(epoch, key)))
            }
            17..19 => {
                let (key, _) = self.pick(|s| s.created == Done::Answered)?;
                Some(Box::pin(self.read(key)))
            }
            _ => Some(Box::pin(self.mirror(epoch))),
        }
    }

    async fn create(self: Rc<Self>, epoch: u64) {
        let key = {
            let mut model = self.model.borrow_mut();
            model.creations += 1;
            let segment = self.env.random_below(12);
            let key = (segment, model.creations);
            let shard = Shard { epoch, created: Done::Asked, ..Shard::default() };
            model.shards.insert(key, shard);
            key
        };
        let class = if self.env.chance(1, 2) { SlotClass::Client } else { SlotClass::Checkpoint };
        let result = self.disk.create(authority(epoch), spec(key.0, key.1), class).await;
        match result {
            Ok(()) => {
                self.set(key, |shard| shard.created = Done::Answered);
                self.answered("create", format!("created {key:?}"));
            }
            Err(ShardError::Exists | ShardError::NoSpace) => {
                self.model.borrow_mut().shards.remove(&key);
            }
            Err(_) => {}
        }
    }

    fn append(self: Rc<Self>, epoch: u64, key: (u64, u64), shard: &Shard) -> Step {
        let room = u64::from(16 - shard.next).min(4);
        let count = u32::try_from(1 + self.env.random_below(room)).expect("few");
        let (block, end) = (shard.next, shard.next + count);
        let mut buf = AlignedBuf::new(count as usize * BLOCK_SIZE);
        for (n, bytes) in (block..).zip(buf.chunks_exact_mut(BLOCK_SIZE)) {
            bytes.fill(fill(key.0, key.1, n));
        }
        let crcs: Vec<u32> = (block..end).map(|n| fill(key.0, key.1, n).into()).collect();
        let (data, segment) = (Rc::from([buf.freeze()]), SegmentId(key.0));
        let append =
            Append { authority: authority(epoch), segment, block, data, crcs: crcs.into() };
        let begun_fenced = self.model.borrow().fence_answered > epoch;
        self.set(key, |shard| shard.next = end);
        let answer = self.disk.append(append);
        Box::pin(async move {
            if answer.await.is_err() {
                return self.set(key, |shard| shard.next = 16);
            }
            assert!(!begun_fenced, "an append of a fenced epoch was taken");
            self.set(key, |shard| {
                assert_eq!(shard.appended, block, "answered out of order");
                shard.appended = end;
            });
            self.answered("append", format!("appended {key:?} {block}"));
        })
    }

    async fn seal(self: Rc<Self>, epoch: u64, key: (u64, u64), shard: Shard) {
        let blocks = shard.appended;
        let crcs = (shard.epoch != epoch)
            .then(|| (0..blocks).map(|n| fill(key.0, key.1, n).into()).collect());
        self.set(key, |shard| _ = shard.sealed.insert(blocks, Done::Asked));
        let result = self.disk.seal(authority(epoch), SegmentId(key.0), blocks, crcs).await;
        if result.is_ok() {
            self.set(key, |shard| _ = shard.sealed.insert(blocks, Done::Answered));
            self.answered("seal", format!("sealed {key:?} {blocks}"));
        } else if self.disk.offline_reason().is_none() && matches!(result, Err(ShardError::Gone)) {
            self.set(key, |shard| assert_ne!(shard.deleted, Done::No, "a shard vanished"));
        }
    }

    async fn delete(self: Rc<Self>, epoch: u64, key: (u64, u64)) {
        self.set(key, |shard| shard.deleted = Done::Asked);
        let result = self.disk.delete(authority(epoch), SegmentId(key.0), key.1).await;
        if matches!(result, Ok(()) | Err(ShardError::Gone)) {
            self.set(key, |shard| shard.deleted = Done::Answered);
            self.answered("delete", format!("deleted {key:?}"));
        }
    }

    async fn read(self: Rc<Self>, key: (u64, u64)) {
        let length = self.model.borrow().shards[&key].appended;
        if length == 0 {
            return;
        }
        let reply = self.disk.read(VOLUME, SegmentId(key.0), 0, length).await;
        // Another creation of the segment may have taken its place meanwhile.
        let deleted = self.model.borrow().shards[&key].deleted != Done::No;
        match reply {
            Ok(reply) if !deleted => {
                check_content(key, &reply.data);
                let crcs = (0..length).map(|n| u32::from(fill(key.0, key.1, n)));
                assert!(crcs.eq(reply.crcs.iter().copied()));
                self.answered("read", format!("read {key:?} {length}"));
            }
            Err(ShardError::Gone) => assert!(deleted, "{key:?} vanished"),
            _ => {}
        }
    }

    async fn mirror(self: Rc<Self>, epoch: u64) {
        let sequence = self.env.random_below(1000);
        let mirror = Mirror { revision: (Epoch(epoch), sequence), data: vec![1; 3000].into() };
        if self.disk.mirror(authority(epoch), mirror).await.is_ok() {
            let mut model = self.model.borrow_mut();
            model.mirror_answered = model.mirror_answered.max(epoch * 1000 + sequence);
        }
    }

    async fn fence(&self, epoch: u64) {
        let before = {
            let mut model = self.model.borrow_mut();
            model.fence_asked = model.fence_asked.max(epoch);
            model.shards.clone()
        };
        let Ok(listed) = self.disk.fence(authority(epoch), None).await else { return };
        let mut model = self.model.borrow_mut();
        model.fence_answered = model.fence_answered.max(epoch);
        for shard in &listed.shards {
            assert!(shard.state != ShardState::Open || shard.epoch.0 >= epoch);
            let key = (shard.spec.segment.0, shard.spec.creation);
            let known = before.get(&key).map_or(0, |known| known.appended);
            let this_life = shard.blocks > 0 || shard.state == ShardState::Open;
            assert!(!this_life || shard.blocks >= known.min(shard.blocks));
        }
        drop(model);
        self.answered("fence", format!("fenced {epoch}"));
    }

    /// After a restart: everything answered is there, and nothing that was never asked for.
    async fn verify(&self) {
        self.disk.check().expect("invariants after opening");
        let listed = self.disk.list(VOLUME).expect("nothing is damaged");
        let shards = self.model.borrow().shards.clone();
        self.verify_fence(listed.mirror.as_ref());
        let mut found = BTreeMap::new();
        for info in listed.shards {
            found.insert((info.spec.segment.0, info.spec.creation), info);
        }
        for (key, shard) in &shards {
            if let Some(info) = found.remove(key) {
                self.verify_shard(*key, shard, &info).await;
            } else {
                assert!(
                    shard.created != Done::Answered || shard.deleted != Done::No,
                    "{key:?} is lost: {shard:?}"
                );
            }
        }
        assert!(found.is_empty(), "nobody created {found:?}");
    }

    fn verify_fence(&self, mirror: Option<&Mirror>) {
        let model = self.model.borrow();
        let fence = self.disk.volumes().expect("lists").first().map_or(0, |found| found.epoch.0);
        assert!(fence >= model.fence_answered && fence <= model.fence_asked, "fence {fence}");
        let mirror = mirror.map_or(0, |m| m.revision.0.0 * 1000 + m.revision.1);
        assert!(mirror >= model.mirror_answered, "mirror {mirror}");
    }

    async fn verify_shard(&self, key: (u64, u64), shard: &Shard, info: &ShardInfo) {
        assert_ne!(shard.deleted, Done::Answered, "{key:?} came back");
        assert_eq!(info.epoch.0, shard.epoch);
        let segment = SegmentId(key.0);
        if info.state == ShardState::Sealed {
            assert!(shard.sealed.contains_key(&info.blocks), "{key:?} sealed at {}", info.blocks);
            if info.blocks > 0 {
                let reply = self.disk.read(VOLUME, segment, 0, info.blocks).await.expect("sealed");
                check_content(key, &reply.data);
                let crcs = (0..info.blocks).map(|n| u32::from(fill(key.0, key.1, n)));
                assert!(crcs.eq(reply.crcs.iter().copied()));
            }
            return;
        }
        assert_eq!(info.state, ShardState::Closed);
        let sealed = shard.sealed.values().any(|done| *done == Done::Answered);
        assert!(!sealed, "{key:?} is not sealed any more");
        if shard.appended > 0 {
            let raw = self.disk.read_raw(VOLUME, segment, 0, shard.appended).await.expect("raw");
            check_content(key, &raw.data);
        }
    }
}

fn check_content(key: (u64, u64), data: &[u8]) {
    for (n, bytes) in (0..).zip(data.chunks_exact(BLOCK_SIZE)) {
        let expected = fill(key.0, key.1, n);
        assert!(bytes.iter().all(|byte| *byte == expected), "{key:?} block {n}");
    }
}

/// One life: verify, then random requests until the end comes.
async fn live(run: Rc<Run>) {
    run.verify().await;
    let mut epoch = run.model.borrow().fence_asked + 1;
    run.fence(epoch).await;
    let steps = 10 + run.env.random_below(80);
    for _ in 0..steps {
        if run.env.chance(1, 40) {
            // A new head comes while requests of the old one are under way.
            let (old, newer) = (epoch, run.clone());
            epoch += 1;
            tokio::task::spawn_local(async move { newer.fence(old + 1).await });
        }
        // Some requests come from a head that was fenced.
        let late = u64::from(epoch > 1 && run.env.chance(1, 10));
        if let Some(step) = run.clone().step(epoch - late) {
            tokio::task::spawn_local(step);
        }
        if run.env.chance(1, 3) {
            sleep(Duration::from_millis(run.env.random_below(6))).await;
        }
        run.disk.check().expect("invariants");
    }
}

/// A whole run of one seed; gives its trace.
fn simulate_lives(seed: u64, lying_device: bool) -> (Vec<String>, BTreeMap<&'static str, u64>) {
    let env = Env::from_seed(seed);
    let config = SimConfig { size_bytes: 4 << 20, ..SimConfig::default() };
    let mut device = SimDevice::new(env.clone(), config);
    let model = Rc::new(RefCell::new(Model::default()));
    simulate(async {
        Disk::format(&device, format_options()).await.expect("formats");
        device.set_drop_durability(lying_device);
        for _ in 0..6 {
            device = device.reopen();
            let life = LocalSet::new();
            let medium = device.clone();
            let (entropy, model) = (env.clone(), model.clone());
            let clean = life.run_until(async move {
                let disk = Disk::open(Rc::new(medium.clone())).await.expect("opens");
                let run = Rc::new(Run { env: entropy.clone(), device: medium, model, disk });
                live(run.clone()).await;
                let kind = entropy.random_below(4);
                run.model.borrow_mut().events.push(format!("end {kind}"));
                match kind {
                    0 => run.disk.close("restart").await,
                    1 => run.device.crash(),
                    _ => run.device.power_cut(),
                }
                kind == 0
            });
            let clean = clean.await;
            drop(life);
            if clean {
                rot_one_copy(&env, &device);
            }
        }
    });
    let model = Rc::try_unwrap(model).ok().expect("all tasks are gone").into_inner();
    (model.events, model.answered)
}

/// Damages one copy of one table page while the disk is down: nobody may notice. (After a power
/// cut the other copy may be torn: both at once are damage, and told as such.)
fn rot_one_copy(env: &Env, device: &SimDevice) {
    let options = format_options();
    let geometry =
        Geometry::plan_with(4 << 20, options.slot_bytes, options.volumes_max).expect("fits");
    let copy = u32::from(env.chance(1, 2));
    let pages = if env.chance(1, 2) { geometry.slot_pages() } else { 1 };
    let page = u32::try_from(env.random_below(pages.into())).expect("few pages");
    let offset = if pages == 1 {
        geometry.volume_page_offset(page, copy)
    } else {
        geometry.slot_page_offset(page, copy)
    };
    let bit = u8::try_from(env.random_below(8)).expect("a bit");
    match env.random_below(3) {
        0 => device.flip_bit(offset + env.random_below(4096), bit),
        1 => device.latent_error(offset..offset + 1),
        _ => {}
    }
}

#[test]
fn what_was_answered_survives_every_end() {
    let seeds = std::env::var("SDS_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(150);
    let mut totals = BTreeMap::new();
    for seed in 0..seeds {
        let result = std::panic::catch_unwind(|| simulate_lives(seed, false));
        let (_, answered) = result.unwrap_or_else(|_| panic!("seed {seed}"));
        for (what, count) in answered {
            *totals.entry(what).or_insert(0) += count;
        }
    }
    for what in ["create", "append", "seal", "delete", "read", "fence"] {
        assert!(totals.get(what).is_some_and(|count| *count > seeds), "{what}: {totals:?}");
    }
}

#[test]
fn a_device_that_drops_durability_is_found() {
    let found =
        (0..20).any(|seed| std::panic::catch_unwind(|| simulate_lives(seed, true)).is_err());
    assert!(found, "the model does not notice what a power cut takes");
}

#[test]
fn a_seed_is_a_whole_run() {
    for seed in 0..5 {
        assert_eq!(simulate_lives(seed, false), simulate_lives(seed, false));
    }
}

#[test]
fn a_lost_table_write_takes_nothing_back() {
    for victim in 0..6 {
        simulate(async {
            let device = super::tests::device(victim);
            Disk::format(&device, format_options()).await.expect("formats");
            let disk = Disk::open(Rc::new(device.clone())).await.expect("opens");
            let lose = |step| device.lose_next_writes(u64::from(step == victim));
            lose(0);
            disk.fence(authority(1), None).await.expect("fenced");
            lose(1);
            disk.create(authority(1), spec(1, 1), SlotClass::Client).await.expect("created");
            lose(2);
            disk.create(authority(1), spec(2, 2), SlotClass::Client).await.expect("created");
            lose(3);
            disk.seal(authority(1), SegmentId(1), 0, None).await.expect("sealed");
            lose(4);
            disk.delete(authority(1), SegmentId(2), 2).await.expect("deleted");
            lose(5);
            disk.fence(authority(3), None).await.expect("fenced");
            assert_eq!(device.fault_counts().lost_writes, 1);
            let disk = Disk::open(Rc::new(device.reopen())).await.expect("opens");
            assert_eq!(disk.probe(authority(2)), Err(ShardError::Fenced(Epoch(3))));
            let shards = disk.list(VOLUME).expect("lists").shards;
            assert_eq!(shards.len(), 1);
            assert_eq!((shards[0].spec.segment.0, shards[0].state), (1, ShardState::Sealed));
        });
    }
}
