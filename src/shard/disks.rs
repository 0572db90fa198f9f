//! The disks that a node can reach, and what it thinks of them.
//!
//! Heads look disks up by id and choose where new segments go. A disk that is much slower than the
//! others ([`super::latency`]) is taken after all that are not; one that failed a request is avoided
//! for a while ("suspect"); one that is down is not asked at all.
//!
//! There is one [`Registry`]. A head has a view of it, [`Disks`], at the [`Level`] of its pool's failure
//! domain: whatever speaks of domains means those of that level.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, SemaphorePermit};
use tokio::time::Instant;

use super::activity::Activity;
use super::budget::Budget;
use super::domain::{Domains, Level};
use super::latency::Watch;
use super::measured::MeasuredClient;
use super::pace::Pace;
use super::promise::Promise;
use super::{DiskInfo, ShardClient, ShardError, SlotClass, reserve};
use crate::env::Env;
use crate::id::{BLOCK_SIZE, DiskId};
use crate::limits::{REPAIR_BYTES_MAX, SLOT_BYTES_MAX};
use crate::placement::balance;
use crate::placement::choose::{Candidate, Request, choose};
use crate::placement::copysets::{Copysets, Domain, SCATTER_WIDTH, bounded};
use crate::segment::slot_blocks;

/// How long a disk that failed a request is avoided for new segments.
pub const SUSPECT_FOR: Duration = Duration::from_secs(5);
/// Deletions of shards that are under way at once.
pub const DELETES_MAX: usize = 64;
/// Pause between two exercises of the disks while one of them is slow.
const EXERCISE_EVERY: Duration = Duration::from_millis(500);
/// How long an exercise may take.
const EXERCISE_PATIENCE: Duration = Duration::from_secs(2);
/// How long a disk may take to tell its fill.
const INFO_PATIENCE: Duration = Duration::from_secs(1);

/// None where every combination is allowed.
type MaybeCopysets = Option<Rc<Copysets>>;

struct Entry {
    client: Rc<dyn ShardClient>,
    domains: Domains,
    suspect_until: Option<Instant>,
    /// It is being emptied.
    draining: bool,
    /// Tells this coming of the disk from others.
    arrival: u64,
    info: DiskInfo,
}

/// The disks that a node can reach, as a pool sees them: with failure domains of one level.
#[derive(Default)]
pub struct Disks {
    registry: Rc<Registry>,
    level: Level,
}

impl Deref for Disks {
    type Target = Registry;
    fn deref(&self) -> &Registry {
        &self.registry
    }
}

/// The disks that a node can reach, shared by its heads.
pub struct Registry {
    known: RefCell<BTreeMap<DiskId, Entry>>,
    /// Domains of the disks that are down and may come back.
    expected: RefCell<BTreeMap<DiskId, Domains>>,
    /// Disks that are replaced, and by which.
    heirs: RefCell<BTreeMap<DiskId, DiskId>>,
    /// By level and width, as far as they were asked for since a disk came or went.
    copysets: RefCell<BTreeMap<(Level, usize), MaybeCopysets>>,
    /// Counts the disks that came.
    arrivals: Cell<u64>,
    /// Counts the changes of what is known of their fill.
    version: Cell<u64>,
    /// Smallest slot of the disks that are up, bytes.
    slot_bytes_min: Cell<u64>,
    heads: Cell<u32>,
    /// By number of each head that shares the disks: the newest call for space that it answered.
    answered: RefCell<BTreeMap<u64, u64>>,
    /// Calls for space there have been.
    calls: Cell<u64>,
    /// Counts what heads acknowledged.
    acknowledged: Cell<u64>,
    /// Told when somebody calls for space, and when a head stops.
    pub space_wanted: Notify,
    checkpoint_reserve: Arc<Semaphore>,
    gc_passes: Arc<Semaphore>,
    deletes: Semaphore,
    /// How busy clients keep the disks.
    pub activity: Rc<Activity>,
    /// What garbage collection is about to free.
    pub promise: Promise,
    /// How fast clients may write while free slots run short.
    pub pace: Pace,
    /// What repair and scrub may ask of the disks.
    pub budget: Budget,
    /// Blocks that repairs may hold in memory.
    repairs: Semaphore,
    watch: Rc<Watch>,
    /// Told whenever a disk comes, goes or recovers.
    pub changed: Notify,
    /// Heads that rebuild something now.
    repairing: Cell<u32>,
    /// Bytes of the shards that heads rebuilt since the node started.
    pub rebuilt_bytes: Cell<u64>,
    /// The same of those that they moved to where there is room.
    pub balanced_bytes: Cell<u64>,
    /// Told after each look at the fill of the disks while they are not filled alike.
    pub uneven: Notify,
}

impl Default for Registry {
    fn default() -> Self {
        let activity: Rc<Activity> = Rc::default();
        Self {
            known: RefCell::default(),
            expected: RefCell::default(),
            heirs: RefCell::default(),
            copysets: RefCell::default(),
            arrivals: Cell::new(0),
            version: Cell::new(0),
            slot_bytes_min: Cell::new(SLOT_BYTES_MAX),
            heads: Cell::new(0),
            answered: RefCell::default(),
            calls: Cell::new(0),
            acknowledged: Cell::new(0),
            space_wanted: Notify::new(),
            checkpoint_reserve: Arc::new(Semaphore::new(1)),
            gc_passes: Arc::new(Semaphore::new(1)),
            deletes: Semaphore::new(DELETES_MAX),
            promise: Promise::default(),
            pace: Pace::default(),
            budget: Budget::new(activity.clone()),
            activity,
            repairs: Semaphore::new(REPAIR_BYTES_MAX / BLOCK_SIZE),
            watch: Rc::default(),
            changed: Notify::new(),
            repairing: Cell::new(0),
            rebuilt_bytes: Cell::new(0),
            balanced_bytes: Cell::new(0),
            uneven: Notify::new(),
        }
    }
}

/// A head that uses the disks, as long as this lives.
pub struct Member {
    disks: Rc<Registry>,
    level: Level,
    parity: u8,
    number: u64,
}

impl Member {
    /// The newest call for space, if this head has not answered it.
    pub fn called(&self) -> Option<u64> {
        let newest = self.disks.calls.get();
        let answered = self.disks.answered.borrow().get(&self.number).copied();
        (answered.unwrap_or(0) < newest).then_some(newest)
    }

    /// This head has done what it can since this call.
    pub fn answer(&self, call: u64) {
        let mut answered = self.disks.answered.borrow_mut();
        let newest = answered.entry(self.number).or_default();
        *newest = call.max(*newest);
    }

    /// This head takes part in calls from now on.
    pub fn take_part(&self) {
        self.disks.answered.borrow_mut().insert(self.number, self.disks.calls.get());
    }

    /// Tells this head from the others that share the disks.
    pub const fn number(&self) -> u64 {
        self.number
    }

    /// Asks all other heads to give back what they can; the number of the call.
    pub fn call_for_space(&self) -> u64 {
        let call = self.disks.calls.get() + 1;
        self.disks.calls.set(call);
        self.answer(call);
        self.disks.space_wanted.notify_waiters();
        call
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.disks.heads.set(self.disks.heads.get() - 1);
        self.disks.answered.borrow_mut().remove(&self.number);
        self.disks.watch.part(self.level, self.parity);
    }
}

/// The permit of a pass of garbage collection: when it is given back, what was promised is kept.
pub struct GcPass {
    _permit: Option<OwnedSemaphorePermit>,
    disks: Rc<Registry>,
}

impl Drop for GcPass {
    fn drop(&mut self) {
        self.disks.promise.end();
    }
}

/// Counts a head that rebuilds something, as long as this lives.
pub struct Repairing(Rc<Registry>);

impl Drop for Repairing {
    fn drop(&mut self) {
        self.0.repairing.set(self.0.repairing.get() - 1);
    }
}

/// How full a disk is, of those that shards are moved between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fill {
    /// The disk.
    pub id: DiskId,
    /// Its failure domain.
    pub domain: u32,
    /// All its slots.
    pub slots: u32,
    /// Slots in use.
    pub used: u32,
    /// Slots that it has for what is moved; none while it is slow.
    pub room: u32,
}

/// A disk chosen for a shard.
#[derive(Clone)]
pub struct Target {
    /// The disk.
    pub disk: DiskId,
    /// How to reach it.
    pub client: Rc<dyn ShardClient>,
    /// Its slot size, bytes.
    pub slot_bytes: u64,
}

impl Disks {
    /// The same disks with failure domains of this level.
    pub fn at(&self, level: Level) -> Rc<Self> {
        Rc::new(Self { registry: self.registry.clone(), level })
    }

    /// The level of the failure domains.
    pub const fn level(&self) -> Level {
        self.level
    }

    fn domain_of(&self, entry: &Entry) -> u32 {
        entry.domains.at(self.level)
    }

    /// The failure domain of a disk that is up.
    pub fn domain(&self, disk: DiskId) -> Option<u32> {
        self.known.borrow().get(&disk).map(|entry| self.domain_of(entry))
    }

    /// Domains with a disk that is up and is to stay; and those together with the domains whose
    /// disks are down but expected back.
    pub fn lasting_domains(&self) -> (usize, usize) {
        let disks = self.known.borrow();
        let staying =
            disks.values().filter(|entry| !entry.draining).map(|entry| self.domain_of(entry));
        let mut domains: BTreeSet<u32> = staying.collect();
        let up = domains.len();
        domains.extend(self.expected.borrow().values().map(|domains| domains.at(self.level)));
        (up, domains.len())
    }

    /// Domains that have at least one healthy disk.
    pub fn healthy_domains(&self) -> usize {
        let disks = self.known.borrow();
        let domains: BTreeSet<u32> =
            disks.values().filter(|e| e.healthy()).map(|e| self.domain_of(e)).collect();
        domains.len()
    }

    /// Domains with a disk that is up, fails nothing and is not slow.
    pub fn fast_domains(&self) -> usize {
        let disks = self.known.borrow();
        let fast = disks.values().filter(|e| e.healthy() && !self.is_slow(e.info.id));
        let domains: BTreeSet<u32> = fast.map(|e| self.domain_of(e)).collect();
        domains.len()
    }

    /// Domains in which a healthy disk that `allowed` admits has a slot for clients, as far as is
    /// known.
    pub fn domains_with_room(&self, allowed: impl Fn(DiskId) -> bool) -> usize {
        let disks = self.known.borrow();
        let usable = disks.values().filter(|e| e.healthy() && e.free_for(SlotClass::Client) > 0);
        let usable = usable.filter(|e| allowed(e.info.id));
        usable.map(|e| self.domain_of(e)).collect::<BTreeSet<u32>>().len()
    }

    /// How many segments of `width` shards clients can surely still open on the disks that
    /// `allowed` admits, as far as is known, and how many slots there are for it in all. None if
    /// too few domains are up to tell.
    pub fn headroom(&self, width: usize, allowed: impl Fn(DiskId) -> bool) -> Option<(u32, u32)> {
        let mut domains: BTreeMap<u32, (u32, u32)> = BTreeMap::new();
        for entry in self.known.borrow().values().filter(|e| allowed(e.info.id)) {
            let domain = domains.entry(self.domain_of(entry)).or_default();
            domain.0 += entry.free_for(SlotClass::Client);
            domain.1 += entry.info.slots;
        }
        let mut free: Vec<(u32, u32)> = domains.into_values().collect();
        free.sort_unstable();
        free.into_iter().rev().nth(width - 1)
    }

    /// Chooses up to `count` disks in different domains by weighted random draw (weight: slots
    /// that are free for `class`), healthy ones first and then slow ones, out of those that `allowed`
    /// admits, avoiding the domains in `taken`. Fewer are returned when there are no more.
    ///
    /// Where there are many domains they are, with those in `taken`, a copyset if one is healthy
    /// ([`crate::placement::copysets`]); and they are spread over the domains of the next wider level.
    pub fn choose(
        &self,
        env: &Env,
        class: SlotClass,
        count: usize,
        taken: &[u32],
        allowed: impl Fn(DiskId) -> bool,
    ) -> Vec<Target> {
        let disks = self.known.borrow();
        let slow = self.watch.slow();
        let entries: Vec<&Entry> = disks.values().filter(|e| allowed(e.info.id)).collect();
        let is_slow = |e: &Entry| slow.binary_search(&e.info.id).is_ok();
        let rank = |e: &Entry| if e.healthy() { u8::from(is_slow(e)) } else { 2 };
        let candidate = |e: &&Entry| Candidate {
            domains: e.domains,
            rank: rank(e),
            free: e.free_for(class),
            slots: e.info.slots,
            load: 0,
        };
        let candidates: Vec<Candidate> = entries.iter().map(candidate).collect();
        let wider = |domain: u32| {
            let there = disks.values().find(|e| self.domain_of(e) == domain)?;
            Some(there.domains.at(self.level.wider()?))
        };
        let taken: Vec<_> = taken.iter().map(|domain| (*domain, wider(*domain))).collect();
        let copysets = self.copysets(&disks, count + taken.len());
        let copysets = copysets.as_deref();
        let request = Request { level: self.level, count, taken: &taken, copysets };
        let target = |at: usize| Target {
            disk: entries[at].info.id,
            client: entries[at].client.clone(),
            slot_bytes: entries[at].info.slot_bytes,
        };
        choose(&candidates, request, env).into_iter().map(target).collect()
    }

    /// The sets that write sets of `width` domains are taken from; none where there are so few
    /// domains that every combination is allowed. All nodes that know the same disks have the same.
    fn copysets(&self, disks: &BTreeMap<DiskId, Entry>, width: usize) -> MaybeCopysets {
        if !bounded(disks.len(), width, SCATTER_WIDTH) {
            return None;
        }
        if let Some(known) = self.copysets.borrow().get(&(self.level, width)) {
            return known.clone();
        }
        let mut domains: BTreeMap<u32, Domain> = BTreeMap::new();
        for entry in disks.values().filter(|entry| !entry.draining) {
            let number = self.domain_of(entry);
            let wider = self.level.wider().map_or(0, |wider| entry.domains.at(wider));
            let domain = domains.entry(number).or_insert(Domain { number, wider, weight: 0 });
            domain.weight += u64::from(entry.info.slots);
        }
        let domains: Vec<Domain> = domains.into_values().collect();
        let cluster = disks.values().next().map(|entry| entry.info.cluster.to_bytes());
        let seed = cluster.map_or(0, |bytes| u64::from(crc32fast::hash(&bytes)));
        let sets = bounded(domains.len(), width, SCATTER_WIDTH)
            .then(|| Copysets::build(&domains, width, SCATTER_WIDTH, seed).ok().map(Rc::new))
            .flatten();
        self.copysets.borrow_mut().insert((self.level, width), sets.clone());
        sets
    }

    /// Counts a head, whose pool survives the loss of `parity` domains, among those that share the
    /// disks.
    pub fn join(&self, parity: u8) -> Member {
        self.heads.set(self.heads.get() + 1);
        self.watch.join(self.level, parity);
        let mut answered = self.answered.borrow_mut();
        let number = answered.last_key_value().map_or(0, |(last, _)| last + 1);
        // It has no part in calls before it serves.
        answered.insert(number, u64::MAX);
        drop(answered);
        Member { disks: self.registry.clone(), level: self.level, parity, number }
    }

    /// How full the disks are that shards may be moved between.
    ///
    /// # Errors
    /// Why nothing may be moved now, in words.
    pub fn fills(&self) -> Result<Vec<Fill>, &'static str> {
        self.is_settled()?;
        let disks = self.known.borrow();
        let staying = disks.values().filter(|entry| !entry.draining);
        let fill = |entry: &Entry| Fill {
            id: entry.info.id,
            domain: self.domain_of(entry),
            slots: entry.info.slots,
            used: entry.used(),
            room: if self.is_slow(entry.info.id) { 0 } else { entry.free_for(SlotClass::Client) },
        };
        Ok(staying.map(fill).collect())
    }

    /// Counts a head as one that rebuilds something.
    pub fn repairing(&self) -> Repairing {
        self.registry.repairing.set(self.registry.repairing.get() + 1);
        Repairing(self.registry.clone())
    }

    /// The permit of the one pass of garbage collection that may run.
    pub async fn gc_pass(&self) -> GcPass {
        let permit = self.gc_passes.clone().acquire_owned().await.ok();
        GcPass { _permit: permit, disks: self.registry.clone() }
    }

    /// Exercises the disks while one is slow, for ever: what is avoided is not measured otherwise.
    /// All of them, so that like is compared with like.
    pub async fn exercise(self: Rc<Self>) {
        loop {
            let changed = self.watch.changed.notified();
            if self.watch.slow().is_empty() {
                changed.await;
                continue;
            }
            let this = &self;
            let asked = self.ids().into_iter().filter_map(|disk| {
                let client = this.client(disk)?;
                Some(async move {
                    for write in [false, true] {
                        let exercise = client.exercise(write);
                        let done = tokio::time::timeout(EXERCISE_PATIENCE, exercise).await;
                        if let Ok(Err(error)) = done {
                            this.report(disk, &error);
                        }
                    }
                })
            });
            join_all(asked.collect::<Vec<_>>()).await;
            tokio::time::sleep(EXERCISE_EVERY).await;
        }
    }
}

impl Registry {
    /// Adds a disk, or replaces its client.
    pub fn add(&self, client: Rc<dyn ShardClient>, domains: Domains, info: DiskInfo) {
        let arrival = self.arrivals.get() + 1;
        self.arrivals.set(arrival);
        let gauge = self.watch.add(info.id, domains);
        let client = Rc::new(MeasuredClient::new(client, self.watch.clone(), gauge));
        let entry = Entry { client, domains, suspect_until: None, draining: false, arrival, info };
        self.expected.borrow_mut().remove(&entry.info.id);
        self.known.borrow_mut().insert(entry.info.id, entry);
        self.copysets.borrow_mut().clear();
        self.fill_changed();
        self.changed.notify_waiters();
    }

    /// Takes a disk out: it is down until added again, which is expected unless it was to go.
    pub fn remove(&self, disk: DiskId) {
        let gone = self.known.borrow_mut().remove(&disk);
        if let Some(entry) = gone.filter(|entry| !entry.draining) {
            self.expected.borrow_mut().insert(disk, entry.domains);
        }
        self.watch.remove(disk);
        self.copysets.borrow_mut().clear();
        self.fill_changed();
        self.changed.notify_waiters();
    }

    /// Expects a disk that is not up: it belongs to the node.
    pub fn expect(&self, disk: DiskId, domains: Domains) {
        if self.client(disk).is_none() {
            self.expected.borrow_mut().insert(disk, domains);
            self.changed.notify_waiters();
        }
    }

    /// Expects a disk that is down no longer: it is gone for good.
    pub fn forget(&self, disk: DiskId) {
        self.expected.borrow_mut().remove(&disk);
        self.changed.notify_waiters();
    }

    /// Has what a disk holds rebuilt on another one in the first place, or no longer.
    pub fn set_heir(&self, disk: DiskId, heir: Option<DiskId>) {
        let mut heirs = self.heirs.borrow_mut();
        match heir {
            Some(heir) => drop(heirs.insert(disk, heir)),
            None => drop(heirs.remove(&disk)),
        }
    }

    /// The disk on which what another one holds is to be rebuilt, if there is one that has room.
    pub fn heir(&self, disk: DiskId) -> Option<DiskId> {
        let heir = self.heirs.borrow().get(&disk).copied()?;
        let disks = self.known.borrow();
        let room = |e: &&Entry| e.healthy() && e.free_for(SlotClass::Repair) > 0;
        disks.get(&heir).filter(room).map(|_| heir)
    }

    /// Has a disk avoided for new segments because it is being emptied, or no longer.
    pub fn set_draining(&self, disk: DiskId, draining: bool) {
        if let Some(entry) = self.known.borrow_mut().get_mut(&disk) {
            entry.draining = draining;
            self.copysets.borrow_mut().clear();
        }
        self.changed.notify_waiters();
    }

    /// Whether nothing is more pressing than that disks are filled alike.
    ///
    /// # Errors
    /// What is, in words.
    pub fn is_settled(&self) -> Result<(), &'static str> {
        if !self.expected.borrow().is_empty() {
            return Err("a disk is down");
        }
        let disks = self.known.borrow();
        if disks.values().any(|entry| entry.draining && entry.used() > 0) {
            return Err("a disk is being emptied");
        }
        if disks.values().any(|entry| !entry.draining && !entry.healthy()) {
            return Err("a disk failed a request just now");
        }
        if self.repairing.get() > 0 {
            return Err("something is being rebuilt");
        }
        Ok(())
    }

    /// Whether the disks that are to stay are filled alike.
    fn is_even(&self) -> bool {
        let disks = self.known.borrow();
        let staying = disks.values().filter(|entry| !entry.draining);
        let fills: Vec<_> = staying.map(|entry| (entry.used(), entry.info.slots)).collect();
        balance::is_even(fills.into_iter(), balance::START)
    }

    /// What the moving of shards to where there is room waits for, in words; none if nothing is to be
    /// moved, or nothing is in its way.
    pub fn balance_waits(&self) -> Option<&'static str> {
        self.is_settled().err().filter(|_| !self.is_even())
    }

    /// Tells whoever moves shards if the disks are not filled alike.
    fn tell_uneven(&self) {
        if self.is_settled().is_ok() && !self.is_even() {
            self.uneven.notify_waiters();
        }
    }

    fn fill_changed(&self) {
        self.version.set(self.version.get() + 1);
        let disks = self.known.borrow();
        let smallest = disks.values().map(|entry| entry.info.slot_bytes).min();
        self.slot_bytes_min.set(smallest.unwrap_or(SLOT_BYTES_MAX));
    }

    /// Whether every head has done what it can since a call.
    pub fn is_answered(&self, call: u64) -> bool {
        self.answered.borrow().values().all(|answered| *answered >= call)
    }

    /// Notes that a head acknowledged something, which may have left space to be freed.
    pub fn note_acknowledged(&self) {
        self.acknowledged.set(self.acknowledged.get() + 1);
    }

    /// Changes whenever there may be space to be had that was not before.
    pub fn progress(&self) -> (u64, u64) {
        (self.acknowledged.get(), self.version.get())
    }

    /// How long the disks take.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Whether a disk that is up is much slower than its peers.
    pub fn is_slow(&self, disk: DiskId) -> bool {
        self.watch.is_slow(disk)
    }

    /// How much a disk is to be avoided: 0 not at all, 1 if it is slow, 2 if it failed lately, is to
    /// go or is down.
    pub fn rank(&self, disk: DiskId) -> u8 {
        if self.is_healthy(disk) { u8::from(self.is_slow(disk)) } else { 2 }
    }

    /// Heads that share the disks, one at least.
    pub fn heads(&self) -> u32 {
        self.heads.get().max(1)
    }

    /// Changes whenever what is known of the fill of the disks does.
    pub fn version(&self) -> u64 {
        self.version.get()
    }

    /// Blocks of the smallest slot there is.
    pub fn slot_blocks_min(&self) -> u32 {
        slot_blocks(self.slot_bytes_min.get())
    }

    /// The permit of the one checkpoint that may use the checkpoints' reserve.
    pub async fn checkpoint_reserve(&self) -> Option<OwnedSemaphorePermit> {
        self.checkpoint_reserve.clone().acquire_owned().await.ok()
    }

    /// A permit for a repair that holds so many blocks in memory, in the order of asking.
    pub async fn repair_permit(&self, blocks: usize) -> Option<SemaphorePermit<'_>> {
        let blocks = u32::try_from(blocks.min(REPAIR_BYTES_MAX / BLOCK_SIZE)).ok()?;
        self.repairs.acquire_many(blocks).await.ok()
    }

    /// Blocks that further repairs may hold.
    #[cfg(test)]
    pub(crate) fn repair_blocks_free(&self) -> usize {
        self.repairs.available_permits()
    }

    /// The permit of one of the deletions that may be under way.
    pub async fn delete_permit(&self) -> Option<SemaphorePermit<'_>> {
        self.deletes.acquire().await.ok()
    }

    /// Notes that a slot of a disk was taken.
    pub fn took(&self, disk: DiskId) {
        self.adjust(disk, |info| info.slots_free = info.slots_free.saturating_sub(1));
    }

    /// Notes that a slot of a disk was freed.
    pub fn gave(&self, disk: DiskId) {
        self.adjust(disk, |info| info.slots_free = (info.slots_free + 1).min(info.slots));
    }

    /// Notes that a disk had no slot for a class.
    pub fn refused(&self, disk: DiskId, class: SlotClass) {
        self.adjust(disk, |info| {
            info.slots_free = info.slots_free.min(reserve::floor(class, info.slots));
        });
    }

    fn adjust(&self, disk: DiskId, change: impl FnOnce(&mut DiskInfo)) {
        if let Some(entry) = self.known.borrow_mut().get_mut(&disk) {
            change(&mut entry.info);
            self.version.set(self.version.get() + 1);
        }
    }

    /// The disks that have no slot left for a class, as far as is known, and how many each has for
    /// garbage collection.
    pub fn full_for(&self, class: SlotClass) -> Vec<(DiskId, u32)> {
        let disks = self.known.borrow();
        let full = disks.values().filter(|e| e.free_for(class) == 0);
        full.map(|e| (e.info.id, e.free_for(SlotClass::Gc))).collect()
    }

    /// Index pages that one checkpoint may write with the reserves of the disks.
    pub fn checkpoint_pages(&self) -> u64 {
        let disks = self.known.borrow();
        let pages = |e: &Entry| reserve::pages_max(e.info.slots, slot_blocks(e.info.slot_bytes));
        disks.values().map(pages).min().unwrap_or(u64::MAX)
    }

    /// Blocks of a slot of a disk that is up.
    pub fn slot_blocks(&self, disk: DiskId) -> Option<u32> {
        self.known.borrow().get(&disk).map(|entry| slot_blocks(entry.info.slot_bytes))
    }

    /// The client of a disk; none if it is down.
    pub fn client(&self, disk: DiskId) -> Option<Rc<dyn ShardClient>> {
        self.known.borrow().get(&disk).map(|entry| entry.client.clone())
    }

    /// Which coming of a disk this is: another one each time it is added. None if it is down.
    pub fn arrival(&self, disk: DiskId) -> Option<u64> {
        self.known.borrow().get(&disk).map(|entry| entry.arrival)
    }

    /// Whether the disk is up, failed nothing lately and is to stay.
    pub fn is_healthy(&self, disk: DiskId) -> bool {
        self.known.borrow().get(&disk).is_some_and(Entry::healthy)
    }

    /// Ids of all disks that are up, sorted.
    pub fn ids(&self) -> Vec<DiskId> {
        self.known.borrow().keys().copied().collect()
    }

    /// Notes that a request to a disk failed; the disk is avoided for a while.
    pub fn report(&self, disk: DiskId, error: &ShardError) {
        let grave = matches!(
            error,
            ShardError::Io(_)
                | ShardError::Damaged(_)
                | ShardError::Offline(_)
                | ShardError::Unreachable
        );
        if !grave {
            return;
        }
        if let Some(entry) = self.known.borrow_mut().get_mut(&disk) {
            if entry.healthy() {
                tracing::warn!(%disk, %error, "disk is suspect");
            }
            entry.suspect_until = Some(Instant::now() + SUSPECT_FOR);
        }
    }

    /// Asks every disk for its fill, for the next choices. A disk that does not tell in time
    /// keeps the fill it told last.
    pub async fn refresh(&self) {
        let asked = self.ids().into_iter().filter_map(|disk| {
            let client = self.client(disk)?;
            Some(async move {
                let info = tokio::time::timeout(INFO_PATIENCE, client.info()).await;
                (disk, info)
            })
        });
        for (disk, info) in join_all(asked).await {
            if let Ok(Ok(info)) = info
                && let Some(entry) = self.known.borrow_mut().get_mut(&disk)
            {
                entry.info = info;
            }
        }
        self.fill_changed();
        self.tell_uneven();
    }
}

impl Entry {
    fn used(&self) -> u32 {
        self.info.slots.saturating_sub(self.info.slots_free)
    }

    /// Slots that are free for a class.
    fn free_for(&self, class: SlotClass) -> u32 {
        self.info.slots_free.saturating_sub(reserve::floor(class, self.info.slots))
    }

    fn healthy(&self) -> bool {
        !self.draining && self.suspect_until.is_none_or(|until| until <= Instant::now())
    }
}

#[cfg(test)]
mod tests;
