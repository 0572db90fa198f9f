//! Runs of the simulation: clients, faults, crashes, and a final reckoning.
//!
//! A run is a function of its seed. It lives several lives: in each, a node starts on the devices
//! as the last life left them, clients write and read while faults strike and other heads take the
//! volume, and the life ends with a crash, a power cut or an orderly stop. What hurts content never
//! exceeds what the redundancy must survive. In the end ([`super::ends`]) all faults heal;
//! everything must be readable, fully redundant and free of leaks.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::{JoinHandle, LocalSet};
use tokio::time::{Instant, sleep};

use super::demands;
use super::oracle::{Outcome, SECTOR};
use super::simulate;
use super::world::{Node, Running, Volume, World, WorldConfig};
use crate::env::Env;
use crate::export::{BlockTarget, TargetError};
use crate::id::DiskId;
use crate::shard::Scheme;
use crate::volume::head::HeadConfig;
use crate::volume::target::HeadTarget;

/// Longer than any run.
pub(super) const NEVER: Duration = Duration::from_hours(10);

/// Longest life, in virtual time: of one whose take-over waits for disks that stay away.
const LIFE_MAX: Duration = Duration::from_mins(5);

/// Number of the neighbour's head among those of a life: no other follows it.
const NEIGHBOUR: usize = usize::MAX / 2;

/// In one of so many seeds, every disk is behind the RPC.
const WIRED_SEEDS: u64 = 4;

/// How often each fault struck in each state, for the coverage report.
pub type Coverage = BTreeMap<String, u64>;

/// How a run ended.
#[derive(Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What went wrong; none for a clean run.
    pub failure: Option<String>,
    /// What was reached.
    pub coverage: Coverage,
    /// Digest of everything that happened, to prove that a run repeats.
    pub digest: u32,
}

/// All that the tasks of a run share.
pub(super) struct Context {
    pub(super) world: World,
    pub(super) env: Env,
    started: Instant,
    coverage: RefCell<Coverage>,
    pub(super) failure: RefCell<Option<String>>,
    digest: RefCell<crc32fast::Hasher>,
    /// Disks under a fault now.
    pub(super) faulty: RefCell<BTreeSet<usize>>,
    /// Disks whose content was hurt in this run.
    pub(super) hurt: RefCell<BTreeSet<usize>>,
    /// Disks that are away for longer: not healed with the others.
    pub(super) long: RefCell<BTreeSet<usize>>,
    /// The disks of the log set while it was narrow, until something is done about it.
    pub(super) narrow_disks: RefCell<Vec<DiskId>>,
    /// No fault hurts content in this run.
    pub(super) gentle: bool,
    /// Disks that were struck and may lack something since.
    pub(super) stale: RefCell<BTreeSet<usize>>,
    /// Take-overs under way.
    pub(super) taking_over: Cell<u32>,
    /// Counts what disturbs a take-over.
    pub(super) strikes: Cell<u64>,
    /// Strikes and newest checkpoints when the newest heads were seen to have all.
    pub(super) whole_since: RefCell<Option<(u64, Vec<u64>)>>,
    /// Nothing strikes any more in this life.
    pub(super) calm: Cell<bool>,
    pub(super) stop: Cell<bool>,
    /// A disk that was left behind when the last life ended.
    pub(super) behind: Cell<Option<usize>>,
    /// Nodes of this life.
    pub(super) nodes: RefCell<Vec<Rc<Node>>>,
    /// Heads of this life, oldest first.
    pub(super) heads: RefCell<Vec<Rc<Running>>>,
    /// The head of the second volume in this life.
    pub(super) neighbour: RefCell<Option<Rc<Running>>>,
    /// Clients of heads with a lower number only read.
    pub(super) quiet_below: Cell<usize>,
    tasks: RefCell<Vec<JoinHandle<()>>>,
}

impl Context {
    pub(super) fn cover(&self, what: &str) {
        *self.coverage.borrow_mut().entry(what.to_owned()).or_default() += 1;
    }

    pub(super) fn cover_noted(&self, what: &str) {
        self.note(what);
        self.cover(what);
    }

    pub(super) fn note(&self, what: &str) {
        let line = format!("{:?} {what}\n", self.started.elapsed());
        self.digest.borrow_mut().update(line.as_bytes());
        tracing::debug!(target: "sim", "{line}");
    }

    pub(super) fn fail(&self, why: String) {
        self.note(&why);
        self.failure.borrow_mut().get_or_insert(why);
        self.stop.set(true);
    }

    /// Heads of this life, and that of the neighbour.
    pub(super) fn all_heads(&self) -> Vec<Rc<Running>> {
        self.heads.borrow().iter().chain(&*self.neighbour.borrow()).cloned().collect()
    }

    /// The newest head of each volume that has one in this life.
    pub(super) fn newest_heads(&self) -> Vec<Rc<Running>> {
        self.heads.borrow().last().into_iter().chain(&*self.neighbour.borrow()).cloned().collect()
    }

    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.tasks.borrow_mut().push(tokio::task::spawn_local(task));
    }

    pub(super) fn next_task(&self) -> Option<JoinHandle<()>> {
        self.tasks.borrow_mut().pop()
    }
}

/// The world of a seed. Where it is `narrow`, the log goes on with fewer copies than the pool has.
///
/// Where disks go for good though no others can take their place, data segments bend; the ones that
/// are added later are spares. Elsewhere there may be some too, by which the pool grows.
fn world_config(env: &Env, narrow: bool) -> WorldConfig {
    let schemes = [
        Scheme::replicated(2),
        Scheme::replicated(3),
        Scheme { data: 2, parity: 1 },
        Scheme { data: 4, parity: 2 },
        Scheme { data: 3, parity: 2 },
    ];
    let pick = |n: usize| usize::try_from(env.random_below(n as u64)).expect("small");
    let scheme = schemes[pick(schemes.len())];
    let bends = scheme.data > 1 && env.chance(1, 3);
    let grows = !bends && env.chance(1, 3);
    let slot_bytes = [64 << 10, 128 << 10, 256 << 10][pick(3)];
    let head = HeadConfig {
        overlay_extents_max: 32 + pick(400),
        thin_record_blocks: pick(2) * 32,
        checkpoint_log_blocks: 16 + env.random_below(300),
        cache_bytes: (16 + pick(64)) * 4096,
        lease: Duration::from_millis(200 + env.random_below(800)),
        straggler: Duration::from_millis(60 + env.random_below(200)),
        io_timeout: Duration::from_mins(1),
        large_write_blocks: 2 + pick(16),
        cut_blocks: 8 + env.random_below(120),
        pending_bytes_max: 256 << 10,
        shrink_after: if narrow {
            Duration::from_millis(50 + env.random_below(500))
        } else {
            NEVER
        },
        replace_after: Duration::from_millis(100 + env.random_below(3000)),
        narrow_after: if bends || (!grows && env.chance(1, 2)) {
            Duration::from_millis(100 + env.random_below(2000))
        } else {
            NEVER
        },
        log_domains_max: usize::from(scheme.parity) + 1 + pick(usize::from(scheme.parity) + 4),
        // Slots are tiny: most windows must be, for there to be several in a segment.
        repair_window_blocks: [1, 3, 8, 128][pick(4)],
        balance_every: Some(Duration::from_millis(50 + env.random_below(500))),
        ..HeadConfig::default()
    };
    let spares = match (bends, grows) {
        (true, _) => usize::from(scheme.parity) + pick(2),
        (_, true) => 1 + pick(2),
        _ => 0,
    };
    let most = if bends {
        1
    } else if narrow {
        2
    } else {
        5
    };
    let disks = scheme.width().max(usize::from(scheme.parity) + 1) + pick(most) + spares;
    let overcommitted = env.chance(1, 8);
    let slot_bytes = if overcommitted { 64 << 10 } else { slot_bytes };
    let disk_bytes = slot_bytes * (48 + env.random_below(40)) + (2 << 20);
    let small = 4096 * (64 + env.random_below(192));
    WorldConfig {
        scheme,
        disks,
        spares,
        disk_bytes,
        slot_bytes,
        volume_bytes: if overcommitted { disks as u64 * disk_bytes } else { small },
        neighbour_bytes: env.chance(1, 4).then(|| 4096 * (32 + env.random_below(128))),
        overcommitted,
        log_disks: usize::from(scheme.parity) + 1 + pick(usize::from(scheme.parity) + 4),
        min_size: if narrow && env.chance(1, 3) { 2 } else { 1 },
        latency: Duration::from_micros(50)..Duration::from_millis(1 + env.random_below(4)),
        head,
    }
}

/// Runs one seed.
pub fn run(seed: u64) -> Report {
    simulate(run_seed(seed))
}

async fn run_seed(seed: u64) -> Report {
    let env = Env::from_seed(seed);
    // What only one disk has must not be hurt.
    let narrow = env.chance(1, 4);
    let config = world_config(&env, narrow);
    let gentle = narrow || env.chance(1, 3);
    let setup = LocalSet::new();
    let mut world = setup.run_until(World::create(config, env.clone())).await;
    // A stream of its own: nothing changes for the other seeds.
    world.wires = seed.is_multiple_of(WIRED_SEEDS).then(|| Env::from_seed(!seed));
    let context = Rc::new(Context {
        world,
        env,
        coverage: RefCell::default(),
        started: Instant::now(),
        failure: RefCell::default(),
        digest: RefCell::default(),
        faulty: RefCell::default(),
        hurt: RefCell::default(),
        long: RefCell::default(),
        narrow_disks: RefCell::default(),
        stale: RefCell::default(),
        taking_over: Cell::new(0),
        strikes: Cell::new(0),
        whole_since: RefCell::default(),
        calm: Cell::new(false),
        gentle,
        stop: Cell::new(false),
        behind: Cell::new(None),
        nodes: RefCell::default(),
        heads: RefCell::default(),
        neighbour: RefCell::default(),
        quiet_below: Cell::new(0),
        tasks: RefCell::default(),
    });
    // Where a function lies in memory is no function of the seed.
    let config = &context.world.config;
    let clock = format!("{:?}", config.head.unix_seconds);
    context.note(&format!("{config:?}").replace(&clock, "clock"));
    let lives = 2 + context.env.random_below(4);
    for life in 0..lives {
        if context.failure.borrow().is_none() {
            live(&context, life).await;
        }
    }
    if context.failure.borrow().is_none() {
        super::ends::reckon(&context).await;
    }
    let digest = context.digest.borrow().clone().finalize();
    Report {
        seed,
        failure: context.failure.borrow().clone(),
        coverage: context.coverage.borrow().clone(),
        digest,
    }
}

/// Opens the disks and takes the volume over, as often as it takes; none if it is in vain.
pub(super) async fn start(context: &Rc<Context>) -> Option<Rc<Running>> {
    context.nodes.borrow_mut().clear();
    context.heads.borrow_mut().clear();
    context.neighbour.take();
    context.quiet_below.set(0);
    context.whole_since.take();
    let (config, faulty) = (&context.world.config, context.faulty.borrow().len());
    let parity = usize::from(config.scheme.parity);
    if faulty > parity || super::bend::present(context).len() - faulty <= parity {
        // Too many disks are away: the take-over waits until they are back.
        let context = context.clone();
        let pause = Duration::from_millis(context.env.random_below(3000));
        tokio::task::spawn_local(async move {
            sleep(pause).await;
            super::nemesis::heal(&context).await;
        });
    }
    for tries in 0.. {
        context.world.open_disks().await;
        let node = context.world.node();
        context.nodes.borrow_mut().push(node.clone());
        let taken = demands::take_over(context, &node, &context.world.volume).await;
        if context.failure.borrow().is_some() {
            return None;
        }
        match taken {
            Ok(running) => {
                context.heads.borrow_mut().push(running.clone());
                return Some(running);
            }
            Err(error) if tries > 200 => {
                context.fail(format!("the volume cannot be taken over: {error}"));
                return None;
            }
            Err(error) => {
                context.cover_noted("takeover failed, tried again");
                context.note(&error);
                *context.world.waiting.borrow_mut() = format!("the take-over: {error}");
            }
        }
        heal_all(context);
        for index in 0..context.world.config.disks {
            if let Some(disk) = context.world.disk(index) {
                disk.close("the take-over is tried again").await;
            }
        }
        context.nodes.borrow_mut().clear();
        sleep(Duration::from_millis(100)).await;
    }
    None
}

/// Starts clients of the newest head of a volume.
pub(super) fn spawn_clients(context: &Rc<Context>, running: &Rc<Running>) {
    let first = Rc::ptr_eq(&running.volume, &context.world.volume);
    let number = if first { context.heads.borrow().len() - 1 } else { NEIGHBOUR };
    super::resize::go_on_cutting(context, &running.volume);
    for _ in 0..=context.env.random_below(4) {
        context.spawn(client_loop(context.clone(), running.clone(), number));
    }
}

/// Has clients at the second volume, if there is one, on the node that the first began on. Both
/// share the slots, the reserve of checkpoints and the passes of garbage collection.
async fn run_neighbour(context: Rc<Context>, node: Rc<Node>) {
    let Some(volume) = &context.world.neighbour else { return };
    let Some(running) = demands::take_over_at_last(&context, &node, volume).await else { return };
    context.cover_noted("a second volume serves");
    *context.neighbour.borrow_mut() = Some(running.clone());
    spawn_clients(&context, &running);
}

/// One life of the nodes.
async fn live(context: &Rc<Context>, life: u64) {
    let process = LocalSet::new();
    let env = &context.env;
    let power_cut = env.chance(1, 2);
    let orderly = env.chance(1, 4);
    context.stop.set(false);
    context.calm.set(false);
    let early = env.chance(1, 5);
    let get_ahead = env.chance(2, 3) && !orderly;
    // What went on without a disk may end before it has gone far.
    let short = context.behind.get().is_some() && env.chance(2, 3);
    let served = Duration::from_millis(50 + env.random_below(if short { 150 } else { 3000 }));
    let limit = if early { Duration::from_millis(env.random_below(400)) } else { LIFE_MAX };
    let body = async {
        let Some(running) = start(context).await else { return };
        context.note(&format!("life {life} serves"));
        spawn_clients(context, &running);
        context.spawn(super::nemesis::run(context.clone()));
        context.spawn(super::wire::run(context.clone()));
        if super::bend::bends(&context.world.config) && env.chance(2, 3) {
            context.spawn(super::nemesis::go_for_good(context.clone()));
        }
        context.spawn(run_neighbour(context.clone(), running.node.clone()));
        if env.chance(1, 2) {
            context.spawn(super::rivals::run(context.clone()));
        }
        sleep(served).await;
        if orderly && context.failure.borrow().is_none() {
            demands::end_in_order(context).await;
        }
    };
    let ended = process.run_until(tokio::time::timeout(limit, body)).await;
    if ended.is_err() {
        context.cover(if early {
            "crash during start or at a random time"
        } else {
            "a take-over waits for disks until the process ends"
        });
    }
    context.cover(if power_cut { "power cut" } else { "crash" });
    let mut ahead = None;
    if get_ahead {
        ahead = process.run_until(super::ahead::get_ahead(context)).await;
    }
    context.world.stop_devices(power_cut);
    super::ahead::leave_behind(context, ahead);
    context.tasks.borrow_mut().clear();
    context.heads.borrow_mut().clear();
    context.neighbour.take();
    drop(process);
    context.note("the process ended");
}

/// All faults of devices and ways end. Disks that failed stay so until they are opened again.
pub(super) fn heal_all(context: &Context) {
    for device in context.world.devices.borrow().iter() {
        device.end_faults();
    }
    context.nodes.borrow().iter().for_each(|node| node.heal());
    context.faulty.borrow_mut().clear();
    context.long.borrow_mut().clear();
    context.behind.set(None);
}

async fn client_loop(context: Rc<Context>, running: Rc<Running>, number: usize) {
    let target = HeadTarget(running.head.clone());
    while !context.stop.get() {
        step(&context, &running.volume, &target, number).await;
        if context.env.chance(1, 3) {
            sleep(Duration::from_millis(context.env.random_below(30))).await;
        }
        if running.head.stopped().is_some() {
            context.cover("head stopped while clients ran");
            return;
        }
    }
}

/// A range of sectors: mostly whole blocks, sometimes parts, sometimes large.
fn range(env: &Env, sectors: u64) -> (u64, u64) {
    if env.chance(1, 6) {
        // Parts of few blocks, so that they overlap in flight.
        let at = env.random_below(16).min(sectors - 1);
        return (at, (1 + env.random_below(12)).min(sectors - at));
    }
    let count = match env.random_below(10) {
        0 => 1 + env.random_below(7),
        1 => 1 + env.random_below(40),
        2..=3 => 8 * (1 + env.random_below(40)),
        4 => 8 * (1 + env.random_below(120)),
        _ => 8 * (1 + env.random_below(4)),
    }
    .min(sectors);
    // Half of the traffic goes to an eighth of the volume.
    let span = if env.chance(1, 2) { sectors / 8 } else { sectors };
    let at = env.random_below(span.max(1)).min(sectors - count);
    (if env.chance(1, 6) { at } else { at / 8 * 8 }, count)
}

/// Ends its write as in doubt when the client is dropped with its process.
pub(super) struct Pending<'a> {
    volume: &'a Volume,
    write: Option<super::oracle::Write>,
}

impl<'a> Pending<'a> {
    pub(super) fn new(volume: &'a Volume, write: super::oracle::Write) -> Self {
        Self { volume, write: Some(write) }
    }

    pub(super) fn end(mut self, outcome: Outcome) {
        if let Some(write) = self.write.take() {
            self.volume.oracle.borrow_mut().end(write, outcome);
        }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let Some(write) = self.write.take() {
            self.volume.oracle.borrow_mut().end(write, Outcome::InDoubt);
        }
    }
}

async fn step(context: &Context, volume: &Volume, target: &HeadTarget, client: usize) {
    let resizes = volume.resizes.get();
    let (first, count) = range(&context.env, volume.sectors());
    let offset = first * SECTOR as u64;
    let bytes = usize::try_from(count).expect("small") * SECTOR;
    let what = context.env.random_below(10);
    match if client < context.quiet_below.get() { 9 } else { what } {
        0..=4 => {
            let write = volume.oracle.borrow_mut().begin(first, count, false);
            let data = Bytes::from(write.content());
            let pending = Pending::new(volume, write);
            let result = target.write(offset, data).await;
            context.note(&format!("client {client} write {first}+{count}: {result:?}"));
            let beyond = beyond(volume, target, first + count, resizes);
            finish(context, pending, &result, "write", (client, beyond));
        }
        5 => {
            let write = volume.oracle.borrow_mut().begin(first, count, true);
            let pending = Pending::new(volume, write);
            let unmap = context.env.chance(2, 3);
            let result = target.zero(offset, count * SECTOR as u64, unmap).await;
            context.note(&format!("client {client} zero {first}+{count}: {result:?}"));
            let beyond = beyond(volume, target, first + count, resizes);
            finish(context, pending, &result, "zero", (client, beyond));
        }
        6 => {
            let result = target.map(offset, count * SECTOR as u64, 8).await;
            if let Ok(extents) = result {
                let sum: u64 = extents.iter().map(|e| e.len).sum();
                if sum == 0 || sum > count * SECTOR as u64 || extents.iter().any(|e| e.len == 0) {
                    context.fail(format!("map of {offset}+{bytes} gave {extents:?}"));
                }
            }
        }
        _ => check_read(context, volume, target, first, bytes).await,
    }
}

/// Whether a request may have been refused because it goes beyond the end of a volume whose size
/// changed: while it was under way, or unknown to an old head.
fn beyond(volume: &Volume, target: &HeadTarget, end: u64, resizes: u64) -> bool {
    volume.resizes.get() != resizes || end * SECTOR as u64 > target.0.size_bytes()
}

fn finish(
    context: &Context,
    pending: Pending<'_>,
    result: &Result<(), TargetError>,
    what: &str,
    (number, beyond): (usize, bool),
) {
    let outcome = match result {
        Ok(()) => Outcome::Acknowledged,
        Err(error) => {
            let name = match error {
                TargetError::NoSpace => "no space",
                TargetError::Stopped => "stopped",
                TargetError::Io(_) => "I/O error",
                TargetError::OutOfRange if beyond => "beyond the end",
                TargetError::OutOfRange | TargetError::ReadOnly => {
                    context.fail(format!("{what} was refused: {error}"));
                    "refused"
                }
            };
            context.cover(&format!("{what} failed: {name}"));
            // Once another head serves, what this one failed to do never happens.
            let lost = number + 1 < context.heads.borrow().len();
            if lost { Outcome::Settled } else { Outcome::InDoubt }
        }
    };
    pending.end(outcome);
}

async fn check_read(
    context: &Context,
    volume: &Volume,
    target: &HeadTarget,
    first: u64,
    bytes: usize,
) {
    let start = volume.oracle.borrow_mut().begin_read();
    match target.read(first * SECTOR as u64, bytes).await {
        Ok(pieces) => {
            let data: Vec<u8> = pieces.iter().flat_map(|p| p.iter().copied()).collect();
            context.digest.borrow_mut().update(&data);
            if data.len() != bytes {
                context.fail(format!("read of {bytes} bytes gave {}", data.len()));
                return;
            }
            let judged = volume.oracle.borrow_mut().end_read(start, first, &data);
            if let Err(error) = judged {
                context.fail(error);
            }
        }
        Err(TargetError::Stopped) => {}
        Err(error) => {
            context.cover("read failed");
            context.note(&format!("read {first}: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_few_seeds_are_clean() {
        for seed in 1..=20 {
            let report = super::run(seed);
            assert_eq!(report.failure, None, "seed {seed}");
        }
    }

    #[test]
    fn a_seed_always_gives_the_same_run() {
        for seed in 100..110 {
            assert_eq!(super::run(seed).digest, super::run(seed).digest, "seed {seed}");
        }
    }
}
