//! Runs of the simulation: clients, faults, crashes, and a final reckoning.
//!
//! A run is a function of its seed. It lives several lives: in each, a node starts on the devices
//! as the last life left them, clients write and read while faults strike, and the life ends with
//! a crash, a power cut or an orderly stop. Faults never exceed what the redundancy must survive.
//! In the end all faults heal; everything must be readable, fully redundant and free of leaks.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep};

use super::oracle::{Outcome, SECTOR};
use super::world::{Running, World, WorldConfig};
use crate::env::Env;
use crate::export::{BlockTarget, TargetError};
use crate::shard::Scheme;
use crate::volume::head::HeadConfig;
use crate::volume::target::HeadTarget;

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

struct Context {
    world: World,
    env: Env,
    coverage: RefCell<Coverage>,
    failure: RefCell<Option<String>>,
    digest: RefCell<crc32fast::Hasher>,
    /// Disks under a fault now.
    faulty: RefCell<BTreeSet<usize>>,
    /// Disks whose content was hurt in this life and that have not been repaired since.
    hurt: RefCell<BTreeSet<usize>>,
    stop: Cell<bool>,
}

impl Context {
    fn cover(&self, what: &str) {
        *self.coverage.borrow_mut().entry(what.to_owned()).or_default() += 1;
    }

    fn note(&self, what: &str) {
        let line = format!("{:?} {what}\n", Instant::now().elapsed());
        self.digest.borrow_mut().update(line.as_bytes());
        self.digest.borrow_mut().update(what.as_bytes());
        tracing::debug!(target: "sim", "{what}");
    }

    fn fail(&self, why: String) {
        self.note(&why);
        self.failure.borrow_mut().get_or_insert(why);
        self.stop.set(true);
    }

    fn sectors(&self) -> u64 {
        self.world.config.volume_bytes / SECTOR as u64
    }
}

/// The world of a seed.
fn world_config(env: &Env) -> WorldConfig {
    let schemes = [
        Scheme::replicated(2),
        Scheme::replicated(3),
        Scheme { data: 2, parity: 1 },
        Scheme { data: 4, parity: 2 },
        Scheme { data: 3, parity: 2 },
    ];
    let pick = |n: usize| usize::try_from(env.random_below(n as u64)).expect("small");
    let scheme = schemes[pick(schemes.len())];
    let slot_bytes = [64 << 10, 128 << 10, 256 << 10][pick(3)];
    let head = HeadConfig {
        overlay_extents_max: 32 + pick(400),
        checkpoint_log_blocks: 16 + env.random_below(300),
        cache_bytes: (16 + pick(64)) * 4096,
        lease: Duration::from_millis(200 + env.random_below(800)),
        straggler: Duration::from_millis(60 + env.random_below(200)),
        io_timeout: Duration::from_mins(1),
        large_write_blocks: 2 + pick(16),
        pending_bytes_max: 256 << 10,
    };
    WorldConfig {
        scheme,
        disks: scheme.width().max(usize::from(scheme.parity) + 1) + pick(3),
        disk_bytes: slot_bytes * (48 + env.random_below(40)) + (2 << 20),
        slot_bytes,
        volume_bytes: 4096 * (64 + env.random_below(192)),
        latency: Duration::from_micros(50)..Duration::from_millis(1 + env.random_below(4)),
        head,
    }
}

/// Runs one seed.
pub fn run(seed: u64) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime needs nothing from the system");
    runtime.block_on(run_seed(seed))
}

async fn run_seed(seed: u64) -> Report {
    let env = Env::from_seed(seed);
    let config = world_config(&env);
    let setup = LocalSet::new();
    let world = setup.run_until(World::create(config, env.clone())).await;
    let context = Rc::new(Context {
        world,
        env,
        coverage: RefCell::default(),
        failure: RefCell::default(),
        digest: RefCell::default(),
        faulty: RefCell::default(),
        hurt: RefCell::default(),
        stop: Cell::new(false),
    });
    context.note(&format!("{:?}", context.world.config));
    let lives = 2 + context.env.random_below(4);
    for life in 0..lives {
        if context.failure.borrow().is_none() {
            live(&context, life).await;
        }
    }
    if context.failure.borrow().is_none() {
        reckon(&context).await;
    }
    let digest = context.digest.borrow().clone().finalize();
    Report {
        seed,
        failure: context.failure.borrow().clone(),
        coverage: context.coverage.borrow().clone(),
        digest,
    }
}

/// One life of the node.
async fn live(context: &Rc<Context>, life: u64) {
    let process = LocalSet::new();
    let env = &context.env;
    let power_cut = env.chance(1, 2);
    let orderly = env.chance(1, 4);
    context.stop.set(false);
    let early = env.chance(1, 5);
    let limit = Duration::from_millis(if early { env.random_below(400) } else { 60_000 });
    let body = async {
        let mut tries = 0;
        let running = loop {
            match context.world.start().await {
                Ok(running) => break Rc::new(running),
                Err(error) => {
                    context.note(&format!("start: {error}"));
                    context.cover("takeover failed, tried again");
                    tries += 1;
                    if tries > 200 {
                        context.fail(format!("the volume cannot be taken over: {error}"));
                        return;
                    }
                    heal_all(context);
                    sleep(Duration::from_millis(100)).await;
                }
            }
        };
        context.note(&format!("life {life} serves"));
        let mut tasks = Vec::new();
        for client in 0..=env.random_below(4) {
            tasks.push(tokio::task::spawn_local(client_loop(
                context.clone(),
                running.clone(),
                client,
            )));
        }
        tasks.push(tokio::task::spawn_local(super::nemesis::run(Nemesis {
            context: context.clone(),
            running: running.clone(),
        })));
        sleep(Duration::from_millis(50 + env.random_below(3000))).await;
        if orderly && context.failure.borrow().is_none() {
            context.stop.set(true);
            heal_all(context);
            for task in tasks {
                // A client that panicked has reported its failure.
                drop(task.await);
            }
            let release = tokio::time::timeout(Duration::from_secs(30), running.head.release());
            match release.await {
                Ok(Ok(())) => context.cover("stopped in order"),
                other => context.note(&format!("release: {other:?}")),
            }
        }
    };
    let ended = process.run_until(tokio::time::timeout(limit, body)).await;
    if ended.is_err() {
        context.cover("crash during start or at a random time");
    }
    context.cover(if power_cut { "power cut" } else { "crash" });
    context.world.stop_devices(power_cut);
    drop(process);
    context.note("the process ended");
}

/// What the nemesis needs.
pub(super) struct Nemesis {
    context: Rc<Context>,
    running: Rc<Running>,
}

impl Nemesis {
    pub(super) fn env(&self) -> &Env {
        &self.context.env
    }
    pub(super) fn stopped(&self) -> bool {
        self.context.stop.get()
    }
    pub(super) fn cover(&self, what: &str) {
        self.context.note(what);
        self.context.cover(what);
    }
    pub(super) fn world(&self) -> &World {
        &self.context.world
    }
    pub(super) fn running(&self) -> &Running {
        &self.running
    }
    pub(super) fn faulty(&self) -> &RefCell<BTreeSet<usize>> {
        &self.context.faulty
    }
    pub(super) fn hurt(&self) -> &RefCell<BTreeSet<usize>> {
        &self.context.hurt
    }
}

fn heal_all(context: &Context) {
    for device in context.world.devices.borrow().iter() {
        device.heal();
        device.clear_errors();
        device.bring_back();
    }
    context.world.faults.heal();
    context.faulty.borrow_mut().clear();
}

async fn client_loop(context: Rc<Context>, running: Rc<Running>, client: u64) {
    let target = HeadTarget(running.head.clone());
    while !context.stop.get() {
        step(&context, &target, client).await;
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
fn range(context: &Context) -> (u64, u64) {
    let env = &context.env;
    let sectors = context.sectors();
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
struct Pending<'a> {
    context: &'a Context,
    write: Option<super::oracle::Write>,
}

impl Pending<'_> {
    fn end(mut self, outcome: Outcome) {
        if let Some(write) = self.write.take() {
            self.context.world.oracle.borrow_mut().end(write, outcome);
        }
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let Some(write) = self.write.take() {
            self.context.world.oracle.borrow_mut().end(write, Outcome::InDoubt);
        }
    }
}

async fn step(context: &Context, target: &HeadTarget, client: u64) {
    let (first, count) = range(context);
    let offset = first * SECTOR as u64;
    let bytes = usize::try_from(count).expect("small") * SECTOR;
    match context.env.random_below(10) {
        0..=4 => {
            let write = context.world.oracle.borrow_mut().begin(first, count, false);
            let data = Bytes::from(write.content());
            let pending = Pending { context, write: Some(write) };
            let result = target.write(offset, data).await;
            context.note(&format!("client {client} write {first}+{count}: {result:?}"));
            finish(context, pending, &result, "write");
        }
        5 => {
            let write = context.world.oracle.borrow_mut().begin(first, count, true);
            let pending = Pending { context, write: Some(write) };
            let unmap = context.env.chance(2, 3);
            let result = target.zero(offset, count * SECTOR as u64, unmap).await;
            context.note(&format!("client {client} zero {first}+{count}: {result:?}"));
            finish(context, pending, &result, "zero");
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
        _ => check_read(context, target, first, bytes).await,
    }
}

fn finish(context: &Context, pending: Pending<'_>, result: &Result<(), TargetError>, what: &str) {
    let outcome = match result {
        Ok(()) => Outcome::Acknowledged,
        Err(error) => {
            let name = match error {
                TargetError::NoSpace => "no space",
                TargetError::Stopped => "stopped",
                TargetError::Io(_) => "I/O error",
                TargetError::OutOfRange | TargetError::ReadOnly => {
                    context.fail(format!("{what} was refused: {error}"));
                    "refused"
                }
            };
            context.cover(&format!("{what} failed: {name}"));
            Outcome::InDoubt
        }
    };
    pending.end(outcome);
}

async fn check_read(context: &Context, target: &HeadTarget, first: u64, bytes: usize) {
    let start = context.world.oracle.borrow_mut().begin_read();
    match target.read(first * SECTOR as u64, bytes).await {
        Ok(pieces) => {
            let data: Vec<u8> = pieces.iter().flat_map(|p| p.iter().copied()).collect();
            context.digest.borrow_mut().update(&data);
            if data.len() != bytes {
                context.fail(format!("read of {bytes} bytes gave {}", data.len()));
                return;
            }
            let judged = context.world.oracle.borrow_mut().end_read(start, first, &data);
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

/// All faults heal: everything must be readable, fully redundant and free of leaks.
async fn reckon(context: &Rc<Context>) {
    let process = LocalSet::new();
    heal_all(context);
    let body = async {
        let mut tries = 0;
        let running = loop {
            match context.world.start().await {
                Ok(running) => break running,
                Err(error) if tries > 50 => {
                    context.fail(format!("after all healed, take-over fails: {error}"));
                    return;
                }
                Err(_) => tries += 1,
            }
            sleep(Duration::from_millis(100)).await;
        };
        let target = HeadTarget(running.head.clone());
        let step = 64;
        let mut at = 0;
        while at < context.sectors() && context.failure.borrow().is_none() {
            let count = step.min(context.sectors() - at);
            let start = context.world.oracle.borrow_mut().begin_read();
            let bytes = usize::try_from(count).expect("small") * SECTOR;
            match target.read(at * SECTOR as u64, bytes).await {
                Ok(pieces) => {
                    let data: Vec<u8> = pieces.iter().flat_map(|p| p.iter().copied()).collect();
                    let judged = context.world.oracle.borrow_mut().end_read(start, at, &data);
                    if let Err(error) = judged {
                        context.fail(format!("in the end: {error}"));
                    }
                }
                Err(error) => {
                    context.fail(format!("in the end, sector {at} cannot be read: {error}"));
                }
            }
            at += count;
        }
        if context.failure.borrow().is_none()
            && let Err(why) = settle(context, &running).await
        {
            context.fail(format!("in the end: {why}"));
        }
    };
    let limit = Duration::from_mins(10);
    if process.run_until(tokio::time::timeout(limit, body)).await.is_err() {
        context.fail("the end does not come: something waits for ever".into());
    }
    context.world.stop_devices(false);
}

/// Waits for full redundancy and checks every invariant.
async fn settle(context: &Context, running: &Running) -> Result<(), String> {
    let head = &running.head;
    let mut reduced = head.reduced();
    for _ in 0..200 {
        if reduced.0 == 0 {
            break;
        }
        sleep(Duration::from_millis(250)).await;
        reduced = head.reduced();
    }
    if reduced.0 > 0 {
        return Err(format!("{} segments stay reduced", reduced.0));
    }
    for _ in 0..3 {
        head.checkpoint().await.map_err(|e| format!("checkpoint: {e}"))?;
    }
    head.check().await?;
    for (index, disk) in running.disks.borrow().iter().enumerate() {
        let disk = disk.as_ref().ok_or(format!("disk {index} cannot be opened"))?;
        disk.check().map_err(|e| format!("disk {index}: {e}"))?;
    }
    if let Err(why) = head.check_leaks().await {
        if why.contains("tables are damaged") && !context.hurt.borrow().is_empty() {
            // Both copies of a table page are gone: the operator replaces the disk.
            context.cover("a disk with damaged tables");
            return Ok(());
        }
        return Err(why);
    }
    context.cover("reckoned");
    Ok(())
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
}
