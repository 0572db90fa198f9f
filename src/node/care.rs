//! Care for disks that are sick but serve: slow ones, and ones that keep failing.
//!
//! What is slow is avoided at once ([`crate::shard::latency`]). A disk that stays slow, or has errors
//! again and again, for [`Care::set_aside_after`] is *set aside*: taken out of service as by
//! `disk offline`, rebuilt on the others, and left alone until an operator takes it back. That is done
//! only where nothing is lost by it and the others can take what it held; otherwise it stays, and
//! status says so.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use super::Node;
use super::disks::DiskSlot;
use super::smart;
use crate::admin::types::{DiskState as Shown, DiskTiming, LatencyFigures, Smart};
use crate::id::DiskId;
use crate::meta::record::DiskState;
use crate::shard::latency::{Class, Figures};

/// A disk that was well for so long is not sick any more.
const WELL_AFTER: Duration = Duration::from_mins(1);
/// Pause between two looks which disks are due to be asked for SMART data.
const SMART_LOOK: Duration = Duration::from_secs(10);

/// What is done for sick disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Care {
    /// How long a disk must have been slow or failing until it is set aside; zero never does it.
    pub set_aside_after: Duration,
    /// How often devices are asked for SMART data; zero never does it.
    pub smart_every: Duration,
}

impl Default for Care {
    fn default() -> Self {
        Self { set_aside_after: Duration::from_mins(10), smart_every: Duration::from_hours(1) }
    }
}

/// How a disk has been doing.
#[derive(Default)]
pub(super) struct Sickness {
    since: Cell<Option<Instant>>,
    last: Cell<Option<Instant>>,
    errors: Cell<u64>,
    /// Why it was not set aside, if it was to be.
    pub(super) kept: RefCell<Option<&'static str>>,
    pub(super) smart: RefCell<Option<Smart>>,
    asked: Cell<Option<Instant>>,
}

impl Sickness {
    /// Forgets what was: an operator wants the disk.
    pub(super) fn forgive(&self) {
        self.since.set(None);
        self.last.set(None);
        self.kept.borrow_mut().take();
    }

    /// Notes whether the disk is sick now; for how long it has been.
    fn note(&self, sick: bool) -> Duration {
        let now = Instant::now();
        if sick {
            self.last.set(Some(now));
            if self.since.get().is_none() {
                self.since.set(Some(now));
            }
        } else if self.last.get().is_none_or(|last| now - last >= WELL_AFTER) {
            self.forgive();
        }
        self.since.get().map_or(Duration::ZERO, |since| now - since)
    }
}

fn shown(figures: Figures) -> LatencyFigures {
    let Figures { p50_us, p99_us, peers_p50_us, peers_p99_us } = figures;
    LatencyFigures { p50_us, p99_us, peers_p50_us, peers_p99_us }
}

impl Node {
    /// How the requests to a disk fare, and those to its peers.
    pub(super) fn timing(&self, disk: DiskId) -> DiskTiming {
        let figures = |class| self.registry.watch().figures(disk, class).map(shown);
        DiskTiming {
            read: figures(Class::Read),
            append: figures(Class::Append),
            control: figures(Class::Control),
        }
    }

    /// Why a disk counts as slow: the class that is farthest from its peers, with the figures.
    pub(super) fn slowness(&self, slot: &DiskSlot) -> Option<String> {
        self.registry.watch().slow_since(slot.id)?;
        let DiskTiming { read, append, control } = self.timing(slot.id);
        let all = [("reads", read), ("appends", append), ("changes of tables", control)];
        let ratio = |f: &LatencyFigures| f.p50_us * 16 / f.peers_p50_us.max(1);
        let measured = all.into_iter().filter_map(|(what, figures)| Some((what, figures?)));
        let (what, f) = measured.max_by_key(|(_, figures)| ratio(figures))?;
        let kept = slot.sickness.kept.borrow();
        let kept = kept.map(|why| format!("; not set aside: {why}")).unwrap_or_default();
        Some(format!(
            "{what} take {} µs (p50) and {} µs (p99), its peers' {} µs and {} µs{kept}",
            f.p50_us, f.p99_us, f.peers_p50_us, f.peers_p99_us
        ))
    }

    /// Looks how every disk does, and sets aside one that has been sick for long.
    pub(super) async fn care_for_disks(self: &Rc<Self>) {
        let after = self.options.care.set_aside_after;
        for slot in self.slots() {
            let sick_for = slot.sickness.note(self.is_sick(&slot));
            let out = slot.record.borrow().state.is_out();
            if after.is_zero() || sick_for < after || out {
                continue;
            }
            match self.why_keep(&slot) {
                Some(why) => *slot.sickness.kept.borrow_mut() = Some(why),
                None => self.set_aside(&slot, sick_for).await,
            }
        }
    }

    fn is_sick(&self, slot: &DiskSlot) -> bool {
        let errors = slot.last_disk().map_or(0, |disk| disk.stats().errors());
        let more = errors > slot.sickness.errors.replace(errors);
        let failed = slot.state.get() == Shown::Failed;
        more || failed || self.registry.watch().slow_since(slot.id).is_some()
    }

    /// Why a sick disk cannot be set aside; none if it can.
    fn why_keep(&self, slot: &DiskSlot) -> Option<&'static str> {
        if self.cluster.is_some() {
            return Some("in a cluster that is for an operator: `sdsctl disk drain` empties it");
        }
        let slots = self.slots();
        let others = slots.iter().filter(|s| s.is_online() && s.id != slot.id);
        let domains: BTreeSet<u32> = others.map(|s| s.record.borrow().domain).collect();
        let widest = self.pools.borrow().values().map(|pool| pool.scheme.width()).max();
        if domains.len() < widest.unwrap_or(1) {
            return Some("the other disks are too few for the pools");
        }
        let volumes = self.volumes.borrow();
        let mut gone: BTreeSet<DiskId> =
            slots.iter().filter(|s| !s.is_online()).map(|s| s.id).collect();
        gone.insert(slot.id);
        let others_out = gone.len() > 1;
        for volume in volumes.values() {
            let Some(head) = volume.serving() else { return Some("a volume is not served") };
            if !head.bears_loss_of(&gone) {
                return Some("data would be lost");
            }
            if others_out && head.reduced().0 > 0 {
                return Some("what other disks lack is not rebuilt yet");
            }
        }
        None
    }

    async fn set_aside(self: &Rc<Self>, slot: &Rc<DiskSlot>, sick_for: Duration) {
        let Ok(_lock) = self.changes.try_lock() else { return };
        let minutes = sick_for.as_secs() / 60;
        let why = self.slowness(slot).or_else(|| slot.reason.borrow().clone());
        let why = why.unwrap_or_else(|| "it keeps failing".into());
        let reason = format!("after {minutes} minutes: {why}");
        if let Err(error) = self.set_disk_state(slot.id, DiskState::SetAside).await {
            tracing::warn!(disk = %slot.id, %error, "a sick disk cannot be set aside");
            return;
        }
        if slot.is_online() {
            self.take_down(slot, Shown::SetAside, &reason);
        } else {
            slot.down(Shown::SetAside, &reason);
        }
        self.tell_lost(slot.id);
        self.mirror_catalog().await;
    }

    /// Asks devices for SMART data from time to time, until the node stops.
    pub(super) async fn watch_smart(self: Rc<Self>) {
        let every = self.options.care.smart_every;
        while !every.is_zero() && !self.stopping.get() {
            for slot in self.slots() {
                let asked = slot.sickness.asked.get();
                if asked.is_some_and(|at| at.elapsed() < every) {
                    continue;
                }
                slot.sickness.asked.set(Some(Instant::now()));
                let data = smart::read(slot.path()).await;
                *slot.sickness.smart.borrow_mut() = data;
            }
            tokio::time::sleep(SMART_LOOK).await;
        }
    }
}
