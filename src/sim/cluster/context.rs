//! What the tasks of a run share: the cluster, the volumes with what they may hold, and what was reached.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use futures_util::FutureExt;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::host::Host;
use super::town::Town;
use crate::env::Env;
use crate::id::{DiskId, Epoch, HeadId, VolumeId};
use crate::meta::record::DiskState;
use crate::meta::schema::{Schema, root_key};
use crate::shard::Scheme;
use crate::sim::oracle::{Oracle, Outcome, SECTOR, Write};
use crate::sim::run::Coverage;
use crate::volume::head::Head;
use crate::volume::root::Root;

/// A volume under test.
pub(super) struct Tested {
    pub(super) id: VolumeId,
    /// Pool and name.
    pub(super) name: String,
    pub(super) scheme: Scheme,
    pub(super) bytes: u64,
    pub(super) oracle: RefCell<Oracle>,
    /// Writes without an answer, with the newest epoch there was when they were given up.
    doubts: RefCell<Vec<(Epoch, Write)>>,
    /// The head of each epoch that was seen to serve.
    heads: RefCell<BTreeMap<Epoch, HeadId>>,
    /// How many want its ordinary clients to make no requests.
    rests: Cell<u32>,
}

impl Tested {
    pub(super) fn new(id: VolumeId, name: String, scheme: Scheme, bytes: u64) -> Rc<Self> {
        Rc::new(Self {
            id,
            name,
            scheme,
            bytes,
            oracle: RefCell::default(),
            doubts: RefCell::default(),
            heads: RefCell::default(),
            rests: Cell::new(0),
        })
    }

    pub(super) fn sectors(&self) -> u64 {
        self.bytes / SECTOR as u64
    }

    /// Whether its ordinary clients make no requests for now.
    pub(super) fn rests(&self) -> bool {
        self.rests.get() > 0
    }

    /// A head was seen to serve.
    ///
    /// What was given up while an older epoch was the newest is settled: this head has fenced
    /// whoever had it in hand, and a copy that comes later names another epoch.
    ///
    /// # Errors
    /// Another head served in the same epoch.
    fn saw(&self, head: &Head) -> Result<(), String> {
        let (epoch, id) = (head.authority.epoch, head.authority.head);
        let known = *self.heads.borrow_mut().entry(epoch).or_insert(id);
        if known != id {
            return Err(format!("two heads serve volume {} in epoch {epoch}", self.name));
        }
        let mut doubts = self.doubts.borrow_mut();
        let (settled, left) = doubts.drain(..).partition(|(given_up, _)| *given_up < epoch);
        *doubts = left;
        let settled: Vec<(Epoch, Write)> = settled;
        for (_, write) in settled {
            self.oracle.borrow_mut().end(write, Outcome::Settled);
        }
        Ok(())
    }
}

/// The ordinary clients of a volume make no further requests until this is dropped.
pub(super) struct Rest(Rc<Tested>);

impl Rest {
    pub(super) fn of(volume: &Rc<Tested>) -> Self {
        volume.rests.set(volume.rests.get() + 1);
        Self(volume.clone())
    }
}

impl Drop for Rest {
    fn drop(&mut self) {
        self.0.rests.set(self.0.rests.get() - 1);
    }
}

/// All that the tasks of a run share.
pub(super) struct Context {
    pub(super) town: Town,
    pub(super) env: Env,
    pub(super) volumes: RefCell<Vec<Rc<Tested>>>,
    started: Instant,
    coverage: RefCell<Coverage>,
    failure: RefCell<Option<String>>,
    digest: RefCell<crc32fast::Hasher>,
    /// Nothing strikes any more.
    pub(super) calm: Cell<bool>,
    /// Clients make no more requests.
    pub(super) stop: Cell<bool>,
    /// Machines that something is being done to.
    pub(super) busy: RefCell<BTreeSet<usize>>,
    /// Machines that are not, or not yet, part of the cluster.
    pub(super) absent: RefCell<BTreeSet<usize>>,
    /// Machines that an operator has drained.
    pub(super) drained: RefCell<BTreeSet<usize>>,
    /// The one machine whose disks' content is hurt in this run.
    pub(super) hurt: Cell<Option<usize>>,
    /// Disks that are lost for good.
    pub(super) lost: RefCell<BTreeSet<DiskId>>,
    /// Machines that may be added.
    pub(super) spares: RefCell<Vec<usize>>,
    /// Names of nodes that were taken out, and are to be forgotten.
    pub(super) removed: RefCell<Vec<String>>,
    /// Disks that were to be removed, with their machines, and are removed as soon as they are empty.
    pub(super) leaving: RefCell<BTreeSet<(usize, DiskId)>>,
    /// An operator is at work.
    pub(super) operator: Cell<bool>,
    tasks: RefCell<Vec<JoinHandle<()>>>,
}

impl Context {
    pub(super) fn new(town: Town) -> Rc<Self> {
        Rc::new(Self {
            env: town.env.clone(),
            town,
            volumes: RefCell::default(),
            started: Instant::now(),
            coverage: RefCell::default(),
            failure: RefCell::default(),
            digest: RefCell::default(),
            calm: Cell::new(false),
            stop: Cell::new(false),
            busy: RefCell::default(),
            absent: RefCell::default(),
            drained: RefCell::default(),
            hurt: Cell::new(None),
            lost: RefCell::default(),
            spares: RefCell::default(),
            removed: RefCell::default(),
            leaving: RefCell::default(),
            operator: Cell::new(false),
            tasks: RefCell::default(),
        })
    }

    pub(super) fn cover(&self, what: &str) {
        *self.coverage.borrow_mut().entry(what.to_owned()).or_default() += 1;
    }

    pub(super) fn cover_noted(&self, what: &str) {
        self.note(what);
        self.cover(what);
    }

    pub(super) fn coverage(&self) -> Coverage {
        self.coverage.borrow().clone()
    }

    pub(super) fn note(&self, what: &str) {
        let line = format!("{:?} {what}\n", self.started.elapsed());
        self.digest.borrow_mut().update(line.as_bytes());
        tracing::debug!(target: "sim", "{}", line.trim_end());
    }

    /// Takes content that was read into the digest.
    pub(super) fn digest_data(&self, data: &[u8]) {
        self.digest.borrow_mut().update(data);
    }

    pub(super) fn digest(&self) -> u32 {
        self.digest.borrow().clone().finalize()
    }

    pub(super) fn fail(&self, why: String) {
        self.note(&why);
        self.failure.borrow_mut().get_or_insert(why);
        self.stop.set(true);
        self.calm.set(true);
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.failure.borrow().clone()
    }

    /// A number below `n`.
    pub(super) fn pick(&self, n: usize) -> usize {
        usize::try_from(self.env.random_below(n.max(1) as u64)).unwrap_or(0)
    }

    pub(super) fn volumes(&self) -> Vec<Rc<Tested>> {
        self.volumes.borrow().clone()
    }

    pub(super) fn host(&self, index: usize) -> Rc<Host> {
        self.town.host(index)
    }

    /// Numbers of the machines that are part of the cluster.
    pub(super) fn members(&self) -> Vec<usize> {
        let absent = self.absent.borrow();
        (0..self.town.hosts().len()).filter(|index| !absent.contains(index)).collect()
    }

    /// Starts a task that strikes, which ends with the faults.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.tasks.borrow_mut().push(tokio::task::spawn_local(task));
    }

    /// Ends all that strikes.
    pub(super) async fn end_tasks(&self) {
        let tasks = self.tasks.take();
        tasks.iter().for_each(JoinHandle::abort);
        for task in tasks {
            // It ends as cancelled, if it has not ended before.
            drop(task.await);
        }
    }

    /// The newest epoch of a volume, served or not.
    pub(super) fn epoch(&self, volume: VolumeId) -> Epoch {
        let stored = self.town.store.peek(&root_key(volume));
        stored.and_then(|root| Root::decode(&root.value).ok()).map_or(Epoch::default(), |r| r.epoch)
    }

    /// A write has no answer.
    pub(super) fn doubt(&self, volume: &Tested, write: Write) {
        volume.doubts.borrow_mut().push((self.epoch(volume.id), write));
    }

    /// The heads of a volume that say that they serve, with their machines.
    pub(super) fn heads_of(&self, volume: VolumeId) -> Vec<(usize, Rc<Head>)> {
        let mut heads = Vec::new();
        for (index, host) in self.town.hosts().iter().enumerate() {
            let served = host.node().map(|node| node.served()).unwrap_or_default();
            let here = served.into_iter().filter(|(id, _)| *id == volume);
            heads.extend(here.map(|(_, head)| (index, head)));
        }
        heads
    }

    /// The disks that are lost, or were removed.
    pub(super) fn gone(&self) -> BTreeSet<DiskId> {
        let schema = Schema::new(Rc::new(self.town.store.client(Rc::default())));
        // Nothing is waited for: this client has no faults.
        let disks = schema.disks().now_or_never().and_then(Result::ok).unwrap_or_default();
        let removed = disks.iter().filter(|disk| disk.record.state == DiskState::Removed);
        let mut gone = self.lost.borrow().clone();
        gone.extend(removed.map(|disk| disk.record.id));
        gone
    }

    /// Looks at all heads: what must hold at any time.
    pub(super) fn look(&self) {
        for volume in self.volumes() {
            for (index, head) in self.heads_of(volume.id) {
                let host = self.host(index);
                let judged = volume.saw(&head).and_then(|()| head.check_log_set());
                if let Err(why) = judged {
                    self.fail(format!("{} on {}: {why}", volume.name, host.name));
                }
            }
        }
    }

    /// Why not every volume has one head with all redundancy, on a process that runs; none if each has.
    pub(super) fn ailing(&self) -> Option<String> {
        for volume in self.volumes() {
            let name = &volume.name;
            let heads = self.heads_of(volume.id);
            let [(index, head)] = &heads[..] else {
                return Some(format!("{} heads serve volume {name}", heads.len()));
            };
            if self.host(*index).is_paused() {
                return Some(format!("the head of volume {name} is held"));
            }
            if head.authority.epoch != self.epoch(volume.id) {
                return Some(format!("the head of volume {name} is not the newest"));
            }
            let (healthy, width, full) = head.log_width();
            if head.reduced().0 > 0 || width < full || healthy < usize::from(width) {
                return Some(format!(
                    "volume {name}: {:?} reduced, {healthy} healthy domains, width {width} of {full}, {}",
                    head.reduced(),
                    head.explain_log_set(),
                ));
            }
            if !head.bending().is_straight(volume.scheme) {
                return Some(format!("volume {name} bends: {:?}", head.bending()));
            }
        }
        None
    }

    /// What all nodes think, for the report of a failure.
    pub(super) fn describe(&self) -> String {
        let hosts = self.town.hosts();
        let texts = hosts.iter().map(|host| {
            host.node().map_or_else(|| format!("{}: no node", host.name), |node| node.describe())
        });
        texts.collect::<Vec<String>>().join("; ")
    }
}
