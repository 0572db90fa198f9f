//! The end of a run: everything heals, and all must be well within a bounded time.
//!
//! # The bound
//!
//! From the moment at which the last fault ends, in virtual time:
//!
//! - a process that starts is met by the others after 5 s at most (the longest pause between two
//!   attempts to connect, `RpcConfig::backoff_max`);
//! - a manager is elected within 2 s (a lease) and judges 4 s later (two leases); its orders are given
//!   again after 3 s; so every volume is placed within 14 s;
//! - a take-over that failed is tried again after 3 s at most, and takes 2 s at most for a disk that
//!   does not answer and 1.25 read leases;
//! - a disk that failed again and again is tried again after at most as long as it has been failing,
//!   and runs are short.
//!
//! Hence 24 s; rebuilding takes the rest, little, the disks being tiny. Nine of ten runs are well within 10 s.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::clients::{Kind, Session};
use super::context::{Context, Tested};
use super::nemesis::millis;
use super::operator;
use crate::id::DiskId;
use crate::volume::ScrubReport;

/// Within which all must be well after the last fault.
const WELL_WITHIN: Duration = Duration::from_secs(40);
/// Within which a request must be answered then.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Pause between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// All faults end.
fn heal(context: &Rc<Context>) {
    context.town.net.heal(context.env.chance(1, 2));
    for index in context.members() {
        let host = context.host(index);
        host.store.heal();
        host.pause(false);
        host.devices.all().iter().for_each(crate::sim::device::SimDevice::end_faults);
    }
}

/// Starts the process on every machine where none runs.
async fn start_all(context: &Rc<Context>) {
    for index in context.members() {
        let host = context.host(index);
        if host.is_closing() {
            // It was being stopped: that ends now.
            context.town.kill(&host, false).await;
        }
        context.town.start(&host);
    }
}

/// Whether a pool needs all machines with disks, so that the logs of its volumes are narrow without one.
fn is_tight(context: &Context) -> bool {
    let hosts = context.members().into_iter().map(|index| context.host(index));
    let domains = hosts.filter(|host| !host.devices.paths().is_empty()).count();
    context.volumes().iter().any(|volume| usize::from(volume.scheme.parity) + 1 == domains)
}

/// Once all is well, a machine is away for so long that it counts as lost, and returns. Nothing else
/// happens meanwhile, so heads that live through it have to take it back. Whether that was done.
async fn outlast(context: &Rc<Context>) -> bool {
    let of = if is_tight(context) { 2 } else { 8 };
    if !context.env.chance(1, of) || !context.drained.borrow().is_empty() {
        return false;
    }
    let begun = Instant::now();
    while ailing(context).is_some() {
        if begun.elapsed() > WELL_WITHIN || context.failure().is_some() {
            return false;
        }
        sleep(LOOK).await;
    }
    let mut away = context.members();
    away.retain(|index| {
        let node = context.host(*index).node();
        node.is_some_and(|node| node.served().is_empty() && !node.own_disks().is_empty())
    });
    let Some(index) = away.get(context.pick(away.len())).copied() else { return false };
    let host = context.host(index);
    context.cover_noted("in the end, a machine is away for long");
    context.note(&host.name);
    context.town.kill(&host, context.env.chance(1, 2)).await;
    let counts = context.town.config.out_after + context.town.config.head.replace_after;
    sleep(counts + millis(context, 4000)).await;
    context.town.start(&host);
    true
}

/// Why the cluster is not well yet; none if it is.
fn ailing(context: &Context) -> Option<String> {
    let nodes = context.town.nodes();
    if nodes.len() != context.members().len() {
        return Some(format!("{} of {} nodes run", nodes.len(), context.members().len()));
    }
    let own: BTreeSet<DiskId> =
        nodes.iter().flat_map(|node| node.own_disks()).map(|(_, id)| id).collect();
    let devices: usize =
        context.members().iter().map(|index| context.host(*index).devices.paths().len()).sum();
    let removed = context.gone();
    if own.len() + removed.len() < devices {
        return Some(format!("{} of {devices} disks are up", own.len()));
    }
    if let Some(node) = nodes.iter().find(|node| !own.is_subset(&node.disks_in_use())) {
        return Some(format!("a disk is not met: {}", node.describe()));
    }
    let lost = removed.iter().copied().collect::<Vec<_>>();
    for volume in context.volumes() {
        for (_, head) in context.heads_of(volume.id) {
            if let Some(disk) = lost.iter().find(|disk| head.uses_disk(**disk)) {
                return Some(format!("volume {} needs the lost disk {disk}", volume.name));
            }
        }
    }
    for index in context.drained.borrow().iter().copied() {
        let node = context.host(index).node();
        let disks = node.map(|node| node.own_disks()).unwrap_or_default();
        let disks: Vec<DiskId> = disks.into_iter().map(|(_, id)| id).collect();
        if !operator::is_empty(context, index, &disks) {
            return Some(format!("{} is drained and not empty", context.host(index).name));
        }
    }
    context.ailing()
}

/// Ends a run.
pub(super) async fn reckon(context: &Rc<Context>) {
    context.calm.set(true);
    context.end_tasks().await;
    heal(context);
    start_all(context).await;
    context.note("everything heals");
    let mut healed = Instant::now();
    operator::finish(context).await;
    if outlast(context).await {
        healed = Instant::now();
    }
    let mut since = None;
    while context.failure().is_none() {
        sleep(LOOK).await;
        let why = ailing(context);
        match (why, since) {
            (None, Some(well)) if Instant::now() - well >= Duration::from_secs(1) => break,
            (None, None) => since = Some(Instant::now()),
            (None, Some(_)) => {}
            (Some(why), _) => {
                since = None;
                if healed.elapsed() > WELL_WITHIN {
                    let all = context.describe();
                    context.fail(format!("{WELL_WITHIN:?} after all healed: {why}; {all}"));
                }
            }
        }
    }
    let took = healed.elapsed().as_secs();
    context.note(&format!("well after {took} s"));
    context.cover(&format!("well within {} s", took.next_multiple_of(10)));
    context.stop.set(true);
    // The last requests of clients end.
    sleep(Duration::from_secs(1)).await;
    for volume in context.volumes() {
        if context.failure().is_none() {
            judge(context, &volume).await;
        }
    }
}

/// Everything is read through each node, and all that must hold of the volume does.
async fn judge(context: &Rc<Context>, volume: &Rc<Tested>) {
    for index in context.members() {
        let host = context.host(index);
        let name = host.name.clone();
        let session = Session::open(context, volume, host, ANSWER_WITHIN).await;
        let Some(session) = session else {
            return context.fail(format!("volume {} is not exported by {name}", volume.name));
        };
        let at = context.env.random_below(volume.sectors() - 8);
        let wrote = session.write(context, volume, (at, 8), Kind::Write, ANSWER_WITHIN).await;
        if !matches!(wrote, Some(Ok(()))) {
            let all = context.describe();
            return context.fail(format!(
                "in the end, a write to {} through {name}: {wrote:?}; {all}",
                volume.name
            ));
        }
        let step = 128;
        for first in (0..volume.sectors()).step_by(step) {
            let range = (first, (volume.sectors() - first).min(step as u64));
            let read = session.read(context, volume, range, ANSWER_WITHIN).await;
            if !matches!(read, Some(Ok(()))) {
                let all = context.describe();
                return context.fail(format!(
                    "in the end, sector {first} of {} through {name}: {read:?}; {all}",
                    volume.name
                ));
            }
        }
    }
    settle(context, volume).await;
    if context.hurt.get().is_some() && context.failure().is_none() {
        scrub(context, volume).await;
    }
}

/// Two rounds of scrub: what the first one finds is repaired, the second finds nothing.
async fn scrub(context: &Rc<Context>, volume: &Rc<Tested>) {
    for round in 0..2 {
        let mut scrubbed = None;
        // The volume may be handed over meanwhile, for balance.
        for _ in 0..5 {
            scrubbed = scrub_once(context, volume).await;
            if scrubbed.is_some() {
                break;
            }
            sleep(Duration::from_secs(1)).await;
        }
        let Some(report) = scrubbed else {
            return context.fail(format!("volume {} is not scrubbed", volume.name));
        };
        if round == 0 {
            if report.found > 0 {
                context.cover_noted("the last scrub but one found something");
            }
            settle(context, volume).await;
        } else if report.found > 0 || report.unchecked_bytes > 0 || report.unrepairable > 0 {
            context.fail(format!("a scrub of {} after a scrub finds {report:?}", volume.name));
        }
    }
}

/// A whole round of scrub; none if the head stopped before its end.
async fn scrub_once(context: &Rc<Context>, volume: &Rc<Tested>) -> Option<ScrubReport> {
    let heads = context.heads_of(volume.id);
    let (index, head) = heads.first().cloned()?;
    let scrubbed = context.host(index).run(move |_| async move {
        let ended = head.scrub_to_end().await;
        ended.then(|| head.scrub_report())
    });
    scrubbed.await.flatten()
}

/// Waits for full redundancy and checks every invariant. What is found late in the end, or was closed
/// a moment ago, is still being repaired or sealed: it gets the time for it. So does a disk that is suspect because what
/// balance moves held up an append: disks are slow here, and some heads wait for 60 ms only.
async fn settle(context: &Rc<Context>, volume: &Rc<Tested>) {
    let mut judged = Ok(());
    for _ in 0..60 {
        judged = settle_once(context, volume).await;
        if judged.is_ok() {
            context.cover("reckoned");
            return;
        }
        sleep(Duration::from_millis(500)).await;
    }
    if let Err(why) = judged {
        let all = context.describe();
        context.fail(format!("in the end, volume {}: {why}; {all}", volume.name));
    }
}

async fn settle_once(context: &Rc<Context>, volume: &Rc<Tested>) -> Result<(), String> {
    if let Some(why) = context.ailing() {
        return Err(why);
    }
    let heads = context.heads_of(volume.id);
    let [(index, head)] = &heads[..] else {
        return Err(format!("{} heads serve", heads.len()));
    };
    let (head, lost) = (head.clone(), context.gone());
    let checked = context.host(*index).run(move |_| async move {
        for disk in &lost {
            head.disk_removed(*disk);
        }
        for _ in 0..3 {
            head.checkpoint().await.map_err(|error| format!("checkpoint: {error}"))?;
        }
        head.check().await?;
        head.check_log_set()?;
        head.check_shards(&lost).await?;
        head.check_leaks(&lost).await?;
        head.check_usage(&lost).await
    });
    checked.await.unwrap_or_else(|| Err("the process is gone".into()))
}
