//! A volume whose head moves from node to node in the middle of a load, over connections that break: what
//! a client may find in each sector, after everything that may have happened to what it wrote there.
//!
//! Heads are as those of a volume: one epoch each; a newer one fences the older, which then changes nothing
//! more; requests take their time, some a long one, and go on when nobody waits for them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};

use super::{Net, VOLUME};
use crate::env::Env;
use crate::export::memory::MemoryTarget;
use crate::export::{BlockTarget, LocalFuture, MapExtent, TargetError};
use crate::id::{Epoch, VolumeId};
use crate::rpc::planted::{Bug, PLANTED};
use crate::rpc::{ForwardConfig, Forwarder, Locate, Peer, RemoteVolume, RpcConfig, Served};
use crate::sim::simulate;

const SECTOR: usize = 512;
/// Sectors of each worker, and workers.
const SECTORS: usize = 40;
const WORKERS: usize = 5;
const SIZE: u64 = (SECTOR * SECTORS * WORKERS) as u64;

/// The disks that all heads share, and the nodes on which heads may run.
struct World {
    env: Env,
    store: MemoryTarget,
    /// Epoch of the newest head, and where it runs; none while it is being taken over.
    fence: Cell<u64>,
    place: Cell<Option<usize>>,
    /// Where it is said to run, which is late.
    said: Cell<Option<usize>>,
    /// Nodes behind the RPC; one more is the exporter's own.
    nets: Vec<Rc<Net>>,
    peers: Vec<Peer>,
    own: RefCell<Option<Rc<Head>>>,
    /// One of so many requests takes long.
    slow: Cell<u64>,
}

/// A head.
struct Head {
    world: Rc<World>,
    epoch: u64,
}

impl Head {
    fn alive(&self) -> Result<(), TargetError> {
        if self.world.fence.get() == self.epoch { Ok(()) } else { Err(TargetError::Stopped) }
    }

    async fn linger(&self) {
        let env = &self.world.env;
        let slow = env.chance(1, self.world.slow.get());
        let ms = env.random_below(if slow { 6000 } else { 4 });
        sleep(Duration::from_millis(ms)).await;
    }
}

impl BlockTarget for Head {
    fn size(&self) -> u64 {
        self.world.store.size()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, offset: u64, len: usize) -> LocalFuture<'_, Result<Vec<Bytes>, TargetError>> {
        Box::pin(async move {
            self.linger().await;
            self.alive()?;
            self.world.store.read(offset, len).await
        })
    }
    fn write(&self, offset: u64, data: Bytes) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(async move {
            self.linger().await;
            self.alive()?;
            self.world.store.write(offset, data).await?;
            self.linger().await;
            self.alive()
        })
    }
    fn zero(&self, offset: u64, len: u64, unmap: bool) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(async move {
            self.linger().await;
            self.alive()?;
            self.world.store.zero(offset, len, unmap).await?;
            self.alive()
        })
    }
    fn flush(&self) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(async move { self.alive() })
    }
    fn map(
        &self,
        offset: u64,
        len: u64,
        max: usize,
    ) -> LocalFuture<'_, Result<Vec<MapExtent>, TargetError>> {
        self.world.store.map(offset, len, max)
    }
}

/// How the exporter finds heads.
struct Finder(Rc<World>);

impl Locate for Finder {
    fn locate(&self, volume: VolumeId) -> LocalFuture<'_, Result<Served, TargetError>> {
        Box::pin(async move {
            let world = &self.0;
            sleep(Duration::from_millis(world.env.random_below(3))).await;
            let place = world.said.get().ok_or(TargetError::Stopped)?;
            let Some(peer) = world.peers.get(place) else {
                let own = world.own.borrow().clone().ok_or(TargetError::Stopped)?;
                return Ok(Served { epoch: Epoch(own.epoch), target: own });
            };
            let remote = RemoteVolume::attach(peer, volume).await?;
            Ok(Served { epoch: remote.epoch(), target: Rc::new(remote) })
        })
    }
}

impl World {
    fn new(seed: u64) -> Rc<Self> {
        let nets: Vec<_> = (0..3).map(|_| Net::new(RpcConfig::default())).collect();
        let peers = nets.iter().map(|net| net.peer(RpcConfig::default())).collect();
        Rc::new(Self {
            env: Env::from_seed(seed),
            store: MemoryTarget::new(SIZE),
            fence: Cell::new(0),
            place: Cell::new(None),
            said: Cell::new(None),
            nets,
            peers,
            own: RefCell::default(),
            slow: Cell::new(8),
        })
    }

    fn pick(&self, bound: usize) -> usize {
        usize::try_from(self.env.random_below(bound as u64)).unwrap()
    }

    /// A head begins to run on a node, some time after the one before was fenced.
    async fn take_over(self: &Rc<Self>, place: usize, gap: Duration) {
        self.fence.set(self.fence.get() + 1);
        sleep(gap).await;
        // The old node learns of it late, or when it asks.
        let old = self.place.replace(Some(place));
        let head = Rc::new(Head { world: self.clone(), epoch: self.fence.get() });
        if let Some(net) = old.and_then(|old| self.nets.get(old))
            && self.env.chance(1, 2)
        {
            net.shelf.head.take();
        }
        match self.nets.get(place) {
            Some(net) => net.shelf.serve(head.epoch, head),
            None => *self.own.borrow_mut() = Some(head),
        }
        sleep(Duration::from_millis(self.env.random_below(200))).await;
        self.said.set(Some(place));
    }

    /// Something happens.
    async fn strike(self: &Rc<Self>) {
        let place = self.pick(self.nets.len());
        let net = self.nets[place].clone();
        let pipe = net.pipes.borrow().last().cloned().unwrap_or_default();
        match self.env.random_below(10) {
            0..=2 => pipe.cut(),
            3 => pipe.cut_after.set(Some(pipe.written() + self.env.random_below(30_000))),
            4 => {
                pipe.hold(true);
                sleep(Duration::from_millis(self.env.random_below(3000))).await;
                pipe.hold(false);
            }
            5 => {
                net.unplugged.set(true);
                pipe.cut();
                sleep(Duration::from_millis(self.env.random_below(4000))).await;
                net.unplugged.set(false);
            }
            6 => net.shelf.delay.set(Duration::from_millis(self.env.random_below(3000))),
            7 => net.shelf.delay.set(Duration::ZERO),
            _ => {
                let gap = Duration::from_millis(self.env.random_below(1500));
                // Often again where it was: what is meant for the old one comes to the new one.
                let same = self.place.get().filter(|_| self.env.chance(1, 2));
                let place = same.unwrap_or_else(|| self.pick(self.nets.len() + 1));
                self.take_over(place, gap).await;
            }
        }
    }

    fn heal(&self) {
        self.slow.set(u64::MAX);
        for net in &self.nets {
            net.unplugged.set(false);
            net.shelf.delay.set(Duration::ZERO);
            for pipe in &*net.pipes.borrow() {
                pipe.hold(false);
                pipe.cut_after.set(None);
            }
        }
    }
}

/// What came of the requests of a run.
#[derive(Debug, Default)]
struct Counts {
    done: Cell<u64>,
    failed: Cell<u64>,
    given_up: Cell<u64>,
    reads: Cell<u64>,
}

fn count(cell: &Cell<u64>) {
    cell.set(cell.get() + 1);
}

/// Some sectors, and what each may hold: what was written last, and whatever had an unknown outcome since.
struct Worker {
    world: Rc<World>,
    target: Rc<Forwarder>,
    counts: Rc<Counts>,
    begin: usize,
    stamps: u32,
    may: Vec<BTreeSet<u32>>,
}

impl Worker {
    fn new(world: &Rc<World>, target: &Rc<Forwarder>, counts: &Rc<Counts>, number: usize) -> Self {
        Self {
            world: world.clone(),
            target: target.clone(),
            counts: counts.clone(),
            begin: number * SECTORS,
            stamps: 0,
            may: vec![BTreeSet::from([0]); SECTORS],
        }
    }

    /// Makes one request, and looks at what it read.
    async fn step(&mut self) -> Result<(), String> {
        let first = self.world.pick(SECTORS);
        let len = 1 + self.world.pick((SECTORS - first).min(20));
        let kind = self.world.env.random_below(10);
        if kind < 4 {
            return self.read(first, len).await.map(drop);
        }
        let offset = ((self.begin + first) * SECTOR) as u64;
        let bytes = len * SECTOR;
        let request = if kind < 9 {
            self.stamps += 1;
            let data: Vec<u8> = self.stamps.to_le_bytes().repeat(bytes / 4);
            self.target.write(offset, data.into())
        } else {
            self.target.zero(offset, bytes as u64, self.world.env.chance(1, 2))
        };
        let stamp = if kind < 9 { self.stamps } else { 0 };
        // A client that goes away, and comes back.
        let short = self.world.env.chance(1, 8);
        let ms = if short { self.world.env.random_below(10) } else { 200_000 };
        let answer = timeout(Duration::from_millis(ms), request).await;
        for may in &mut self.may[first..first + len] {
            if answer == Ok(Ok(())) {
                may.clear();
            }
            may.insert(stamp);
        }
        match answer {
            Ok(Ok(())) => count(&self.counts.done),
            Ok(Err(TargetError::Io(_))) => count(&self.counts.failed),
            Ok(Err(error)) => return Err(format!("a write answered with {error}")),
            Err(_) if short => count(&self.counts.given_up),
            Err(_) => return Err("a write hangs".into()),
        }
        Ok(())
    }

    /// Reads and compares; whether it could be read.
    async fn read(&self, first: usize, len: usize) -> Result<bool, String> {
        let offset = ((self.begin + first) * SECTOR) as u64;
        let read = self.target.read(offset, len * SECTOR);
        let read = match timeout(Duration::from_secs(200), read).await {
            Ok(Ok(read)) => read.concat(),
            Ok(Err(TargetError::Io(_))) => return Ok(false),
            Ok(Err(error)) => return Err(format!("a read answered with {error}")),
            Err(_) => return Err("a read hangs".into()),
        };
        count(&self.counts.reads);
        for (sector, data) in (first..).zip(read.chunks(SECTOR)) {
            let stamp = u32::from_le_bytes(data[..4].try_into().unwrap());
            if data.chunks(4).any(|piece| piece != stamp.to_le_bytes()) {
                return Err(format!("a sector of mixed content: {data:?}"));
            }
            if !self.may[sector].contains(&stamp) {
                let (at, may) = (self.begin + sector, &self.may[sector]);
                let now = Instant::now();
                return Err(format!("{now:?}: sector {at} holds {stamp}, and may hold {may:?}"));
            }
        }
        Ok(true)
    }
}

/// One run; the first thing that must not be.
fn run(seed: u64, bug: Option<Bug>) -> Result<(u64, Rc<Counts>), String> {
    PLANTED.set(bug);
    let result = simulate(async {
        let world = World::new(seed);
        world.take_over(0, Duration::ZERO).await;
        let config = ForwardConfig { patience: Duration::from_secs(8), ..ForwardConfig::default() };
        let finder = Rc::new(Finder(world.clone()));
        let target = Forwarder::open(VOLUME, finder, config).await.map_err(|e| e.to_string())?;
        let target = Rc::new(target);
        let counts: Rc<Counts> = Rc::default();
        let stop = Rc::new(Cell::new(false));
        let trouble = {
            let (world, stop) = (world.clone(), stop.clone());
            tokio::task::spawn_local(async move {
                while !stop.get() {
                    sleep(Duration::from_millis(world.env.random_below(900))).await;
                    world.strike().await;
                }
                world.heal();
            })
        };
        let workers = (0..WORKERS).map(|number| {
            let mut worker = Worker::new(&world, &target, &counts, number);
            async move {
                for _ in 0..120 {
                    worker.step().await?;
                }
                Ok::<_, String>(worker)
            }
        });
        let workers: Result<Vec<_>, _> = join_all(workers).await.into_iter().collect();
        let workers = workers?;
        stop.set(true);
        trouble.await.map_err(|error| error.to_string())?;
        // When all is well, everything is to be read, then and later.
        for _ in 0..2 {
            sleep(Duration::from_mins(1)).await;
            for worker in &workers {
                if !worker.read(0, SECTORS).await? {
                    return Err("all is well, and it cannot be read".into());
                }
            }
        }
        let idle = world.peers.iter().all(Peer::is_idle);
        let running: u64 = world.nets.iter().map(|net| net.server.metrics().running.get()).sum();
        if !idle || running > 0 {
            return Err(format!("{running} requests run, idle: {idle}"));
        }
        Ok((world.fence.get(), counts))
    });
    PLANTED.set(None);
    result
}

#[test]
fn a_head_that_moves_under_load() {
    let all = Counts::default();
    let mut heads = 0;
    // More of them than in each build: `SDS_FORWARD_SEEDS=1000`.
    let seeds = std::env::var("SDS_FORWARD_SEEDS").ok().and_then(|text| text.parse().ok());
    for seed in 0..seeds.unwrap_or(60) {
        let (epochs, counts) = run(seed, None).unwrap_or_else(|what| panic!("seed {seed}: {what}"));
        heads += epochs;
        for (sum, more) in [
            (&all.done, &counts.done),
            (&all.failed, &counts.failed),
            (&all.given_up, &counts.given_up),
            (&all.reads, &counts.reads),
        ] {
            sum.set(sum.get() + more.get());
        }
    }
    assert!(heads > 300, "{heads} heads");
    let some = [&all.done, &all.failed, &all.given_up, &all.reads].map(|cell| cell.get() > 10);
    assert_eq!(some, [true; 4], "{all:?}");
    assert!(all.failed.get() * 20 < all.done.get(), "hardly any fails: {all:?}");
}

#[test]
fn planted_bugs_are_found() {
    for bug in Bug::BY_CHANCE {
        let found = (0..300).find_map(|seed| run(seed, Some(bug)).err().map(|what| (seed, what)));
        let (seed, what) = found.unwrap_or_else(|| panic!("{bug:?} was not found"));
        assert!(what.contains("may hold"), "{bug:?}, seed {seed}: {what}");
    }
}

#[test]
fn patience_ends_with_a_reason() {
    simulate(async {
        let world = World::new(1);
        world.take_over(0, Duration::ZERO).await;
        let config = ForwardConfig::default();
        let finder = Rc::new(Finder(world.clone()));
        let target = Forwarder::open(VOLUME, finder.clone(), config.clone()).await.unwrap();
        assert_eq!((target.size(), target.read_only(), target.epoch()), (SIZE, false, Epoch(1)));
        world.nets[0].unplugged.set(true);
        world.nets[0].pipes.borrow()[0].cut();
        let began = Instant::now();
        let answers = join_all((0..50).map(|n| target.write(n * 512, vec![1; 512].into()))).await;
        let waited = began.elapsed();
        assert!((29..=32).contains(&waited.as_secs()), "{waited:?}");
        let text = answers[0].as_ref().unwrap_err().to_string();
        assert!(text.contains("was not served for 30s: it has no head at present"), "{text}");
        assert!(answers.iter().all(Result::is_err));
        assert_eq!(target.size(), SIZE, "still known");
        let none = Forwarder::open(VOLUME, finder, config).await;
        assert!(matches!(none, Err(TargetError::Io(_))));
        // It goes on where it was as soon as that is possible, and elsewhere.
        world.nets[0].unplugged.set(false);
        target.write(0, vec![2; 512].into()).await.unwrap();
        world.take_over(3, Duration::from_secs(5)).await;
        target.write(0, vec![2; 512].into()).await.unwrap();
        assert_eq!(target.epoch(), Epoch(2));
    });
}

/// A head whose node lives, but which is cut off from its disks, answers nothing: there is another one.
#[test]
fn a_request_follows_a_head_while_the_old_one_hangs() {
    simulate(async {
        let world = World::new(1);
        world.take_over(0, Duration::ZERO).await;
        let hung = Rc::new(MemoryTarget::new(SIZE));
        hung.hold(true);
        world.nets[0].shelf.serve(1, hung.clone());
        let finder = Rc::new(Finder(world.clone()));
        let target = Forwarder::open(VOLUME, finder, ForwardConfig::default()).await.unwrap();
        let write = target.write(0, vec![1; 512].into());
        let began = Instant::now();
        let (wrote, ()) = tokio::join!(write, world.take_over(1, Duration::from_secs(8)));
        wrote.unwrap();
        assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
        // So does one that was answered with an error.
        hung.hold(false);
        let burns = TargetError::Io("no disk answers".into());
        hung.set_failure(Some(burns.clone()));
        world.nets[1].shelf.serve(2, hung.clone());
        assert_eq!(target.write(0, vec![1; 512].into()).await, Err(burns), "there is no other");
        world.take_over(2, Duration::ZERO).await;
        world.nets[1].shelf.serve(2, hung);
        sleep(Duration::from_secs(1)).await;
        target.write(0, vec![1; 512].into()).await.unwrap();
        assert_eq!(target.epoch(), Epoch(3));
    });
}
