//! A run of the simulated cluster: it is set up, clients work while faults strike, everything heals, and
//! all is judged. A run is a function of its seed.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::context::{Context, Tested};
use super::operator::order;
use super::town::{Town, TownConfig};
use super::{clients, ends, nemesis};
use crate::admin::backend::Command;
use crate::admin::types::{CreatePool, CreateVolume, FailureDomain, PoolScheme};
use crate::env::Env;
use crate::id::BLOCK_BYTES;
use crate::shard::Scheme;
use crate::sim::run::Report;
use crate::sim::simulate;
use crate::volume::head::HeadConfig;

/// Longer than any run.
const NEVER: Duration = Duration::from_hours(10);
/// Longest run, in virtual time: what takes longer hangs.
const RUN_MAX: Duration = Duration::from_mins(15);
/// Pause between two looks at all heads.
const LOOK: Duration = Duration::from_millis(20);

/// Runs one seed.
pub fn run(seed: u64) -> Report {
    simulate(run_seed(seed))
}

fn pick(env: &Env, n: usize) -> usize {
    usize::try_from(env.random_below(n as u64)).expect("small")
}

fn config(env: &Env) -> TownConfig {
    let slot_bytes = [64 << 10, 128 << 10][pick(env, 2)];
    let head = HeadConfig {
        overlay_extents_max: 64 + pick(env, 600),
        thin_record_blocks: pick(env, 2) * 32,
        checkpoint_log_blocks: 32 + env.random_below(400),
        cache_bytes: (16 + pick(env, 64)) * 4096,
        lease: Duration::from_millis(300 + env.random_below(900)),
        straggler: Duration::from_millis(60 + env.random_below(400)),
        io_timeout: Duration::from_secs(20 + env.random_below(20)),
        large_write_blocks: 4 + pick(env, 24),
        pending_bytes_max: 256 << 10,
        shrink_after: Duration::from_millis(200 + env.random_below(500)),
        replace_after: Duration::from_millis(500 + env.random_below(5000)),
        narrow_after: NEVER,
        scrub_period: None,
        repair_window_blocks: [3, 8, 128][pick(env, 3)],
        ..HeadConfig::default()
    };
    TownConfig {
        disk_bytes: slot_bytes * (100 + env.random_below(60)) + (2 << 20),
        slot_bytes: Some(slot_bytes),
        latency: Duration::from_micros(50)..Duration::from_millis(1 + env.random_below(3)),
        head,
        lease: Duration::from_secs(2),
        out_after: Duration::from_secs(2 + env.random_below(8)),
    }
}

/// The machines of a run: how many begin, and how many may be added.
async fn build(context: &Rc<Context>) -> usize {
    let env = &context.env;
    let (nodes, spares) = (3 + pick(env, 4), pick(env, 3));
    for index in 0..nodes + spares {
        let host = context.town.add_host(1 + pick(env, 3)).await;
        host.store.watches_suffer.set(true);
        if index >= nodes {
            context.spares.borrow_mut().push(index);
            context.absent.borrow_mut().insert(index);
        }
    }
    if env.chance(1, 5) {
        // A gateway: a node without disks.
        let host = context.town.add_host(0).await;
        host.store.watches_suffer.set(true);
    }
    nodes
}

/// The pools that so many nodes carry.
fn schemes(env: &Env, nodes: usize) -> Vec<PoolScheme> {
    let all = [
        PoolScheme::Replicas { copies: 3 },
        PoolScheme::Replicas { copies: 2 },
        PoolScheme::Ec { data: 2, parity: 1 },
        PoolScheme::Ec { data: 2, parity: 2 },
        PoolScheme::Ec { data: 3, parity: 2 },
        PoolScheme::Ec { data: 4, parity: 2 },
    ];
    let fitting: Vec<PoolScheme> =
        all.into_iter().filter(|scheme| usize::from(scheme.width()) <= nodes).collect();
    (0..=pick(env, 2)).map(|_| fitting[pick(env, fitting.len())]).collect()
}

fn scheme_of(scheme: PoolScheme) -> Scheme {
    match scheme {
        PoolScheme::Ec { data, parity } => Scheme { data, parity },
        PoolScheme::Replicas { copies } => Scheme::replicated(copies),
    }
}

/// Creates pools and volumes.
async fn furnish(context: &Rc<Context>, nodes: usize) -> Result<(), String> {
    let env = &context.env;
    let schemes = schemes(env, nodes);
    for (number, scheme) in schemes.iter().enumerate() {
        let request = CreatePool {
            name: format!("p{number}"),
            scheme: *scheme,
            failure_domain: FailureDomain::Node,
            min_size: None,
        };
        let host = context.host(pick(env, nodes));
        order(&host, |reply| Command::PoolCreate { request, reply }).await?;
    }
    // Every node is to know of the pools.
    sleep(Duration::from_secs(1)).await;
    for number in 0..=pick(env, 4) {
        let pool = pick(env, schemes.len());
        let bytes = BLOCK_BYTES * (48 + env.random_below(160));
        let name = format!("p{pool}/v{number}");
        let request = CreateVolume { name: name.clone(), size: bytes };
        let host = context.host(pick(env, nodes));
        let made = order(&host, |reply| Command::VolumeCreate { request, reply }).await?;
        let tested = Tested::new(made.id, name, scheme_of(schemes[pool]), bytes);
        context.volumes.borrow_mut().push(tested);
    }
    Ok(())
}

async fn run_seed(seed: u64) -> Report {
    let env = Env::from_seed(seed);
    let town = Town::new(env.clone(), config(&env)).await;
    let context = Context::new(town);
    context.note(&format!("{:?}", context.town.config));
    if timeout(RUN_MAX, live(&context)).await.is_err() {
        let all = context.describe();
        context.fail(format!("the run does not end; {all}"));
    }
    for host in context.town.hosts() {
        context.town.kill(&host, false).await;
    }
    Report {
        seed,
        failure: context.failure(),
        coverage: context.coverage(),
        digest: context.digest(),
    }
}

/// Leases end on time, and all heads are looked at.
async fn watch(context: Rc<Context>) {
    loop {
        sleep(LOOK).await;
        context.town.store.tick();
        context.look();
    }
}

async fn live(context: &Rc<Context>) {
    let nodes = build(context).await;
    for index in context.members() {
        context.town.start(&context.host(index));
    }
    context.town.until_met(context.members().len()).await;
    if let Err(why) = furnish(context, nodes).await {
        return context.fail(format!("not set up: {why}"));
    }
    context.note("set up");
    let watcher = tokio::task::spawn_local(watch(context.clone()));
    for volume in context.volumes() {
        for number in 0..=pick(&context.env, 2) {
            tokio::task::spawn_local(clients::run(context.clone(), volume.clone(), number));
        }
    }
    sleep(Duration::from_millis(context.env.random_below(1000))).await;
    context.spawn(nemesis::run(context.clone()));
    sleep(Duration::from_millis(5000 + context.env.random_below(20_000))).await;
    if context.failure().is_none() {
        ends::reckon(context).await;
    }
    watcher.abort();
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_few_seeds_are_clean() {
        for seed in 1..=15 {
            let report = super::run(seed);
            assert_eq!(report.failure, None, "seed {seed}");
        }
    }

    #[test]
    fn a_seed_always_gives_the_same_run() {
        for seed in 100..104 {
            assert_eq!(super::run(seed).digest, super::run(seed).digest, "seed {seed}");
        }
    }
}
