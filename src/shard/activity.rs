//! How busy clients keep the disks of a node, and how long they take, for work in the background
//! that leaves them alone.
//!
//! Knows counts and times only. Shared by the heads of a node, because they share the disks.
//!
//! Every request of a client is timed and falls into one of a few kinds, by direction and size. One
//! that began while no work of the background was under way is *quiet*: what quiet ones take is
//! what requests of their kind would take without that work. (To count the requests that no work
//! touched would not do: the longer one takes, the likelier it is touched.) What requests took
//! against what quiet ones of their kinds take is the *slowdown*: a client that waits for its
//! answers gets its throughput divided by it.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// Bytes up to which a request is small, and middling.
const SIZES: [usize; 2] = [16 << 10, 128 << 10];
/// Kinds of requests: reads and writes, each small, middling and large.
const KINDS: usize = 2 * (SIZES.len() + 1);
/// A request that takes more than so many times what is usual counts as that, quiet or not: one stall
/// must not outweigh all others.
const OUTLIER: u64 = 16;
/// Quiet requests of a kind without which nothing is known of it.
const QUIET_MIN: u64 = 8;
/// Counts are kept in so many parts of one, because they fade.
const PARTS: u64 = 256;
/// With each look, so much of what was counted before is forgotten: one part in so many.
const FADE: u64 = 4;

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// To read so many bytes.
    Read(usize),
    /// To write so many bytes; none to trim or zero.
    Write(usize),
}

impl Request {
    fn kind(self) -> usize {
        let size = |bytes| SIZES.iter().filter(|bound| bytes > **bound).count();
        match self {
            Self::Read(bytes) => size(bytes),
            Self::Write(bytes) => SIZES.len() + 1 + size(bytes),
        }
    }
}

/// Requests and the microseconds that they took, in parts.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    count: u64,
    took_us: u64,
}

impl Sum {
    fn add(&mut self, took_us: u64) {
        self.count += PARTS;
        self.took_us = self.took_us.saturating_add(took_us.saturating_mul(PARTS));
    }

    fn fade(&mut self) {
        self.count -= self.count.div_ceil(FADE);
        self.took_us -= self.took_us.div_ceil(FADE);
    }

    /// What so many requests would take at this average.
    fn scaled(&self, count: u64) -> u64 {
        let took = u128::from(self.took_us) * u128::from(count) / u128::from(self.count.max(1));
        u64::try_from(took).unwrap_or(u64::MAX)
    }
}

/// One kind of requests: all that ended lately, and those of them that were quiet, which are
/// remembered until there are others.
#[derive(Debug, Clone, Copy, Default)]
struct Kind {
    all: Sum,
    quiet: Sum,
}

impl Kind {
    fn note(&mut self, mut took_us: u64, quiet: bool) {
        if self.is_known() {
            took_us = took_us.min((self.quiet.scaled(OUTLIER)).max(OUTLIER));
        }
        self.all.add(took_us);
        if quiet {
            self.quiet.add(took_us);
        }
    }

    fn is_known(&self) -> bool {
        self.quiet.count >= QUIET_MIN * PARTS
    }

    fn fade(&mut self) {
        self.all.fade();
        if self.quiet.count > 2 * QUIET_MIN * PARTS {
            self.quiet.fade();
        }
    }
}

/// Requests of clients under way, and the one permit of scrubs.
#[derive(Debug)]
pub struct Activity {
    in_flight: Cell<u32>,
    /// When the last request ended.
    ended_at: Cell<Option<Instant>>,
    /// Requests that ended so far, those of them that were quiet, and those before the last look.
    ended: Cell<u64>,
    quiet: Cell<u64>,
    looked: Cell<u64>,
    kinds: RefCell<[Kind; KINDS]>,
    /// Pieces of work of the background under way.
    working: Cell<u32>,
    scrubs: Semaphore,
}

impl Default for Activity {
    fn default() -> Self {
        Self {
            in_flight: Cell::new(0),
            ended_at: Cell::new(None),
            ended: Cell::new(0),
            quiet: Cell::new(0),
            looked: Cell::new(0),
            kinds: RefCell::default(),
            working: Cell::new(0),
            scrubs: Semaphore::new(1),
        }
    }
}

/// A request of a client that is under way, as long as this lives.
#[derive(Debug)]
pub struct Busy {
    activity: Rc<Activity>,
    kind: usize,
    quiet: bool,
    since: Instant,
}

impl Drop for Busy {
    fn drop(&mut self) {
        let Self { activity, kind, quiet, since } = self;
        let now = Instant::now();
        let took = u64::try_from((now - *since).as_micros()).unwrap_or(u64::MAX);
        activity.in_flight.set(activity.in_flight.get() - 1);
        activity.ended_at.set(Some(now));
        activity.ended.set(activity.ended.get() + 1);
        activity.quiet.set(activity.quiet.get() + u64::from(*quiet));
        activity.kinds.borrow_mut()[*kind].note(took, *quiet);
    }
}

/// A piece of work of the background that keeps disks busy, as long as this lives.
#[derive(Debug)]
pub struct Working(Rc<Activity>);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.working.set(self.0.working.get() - 1);
    }
}

/// How requests fared between two looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fared {
    /// Requests that ended.
    pub requests: u64,
    /// What they took against what quiet ones take, per mille; none if too little is known of
    /// those.
    pub slowdown: Option<u64>,
}

impl Activity {
    /// Counts and times a request of a client until the answer is dropped.
    pub fn begin(self: &Rc<Self>, request: Request) -> Busy {
        self.in_flight.set(self.in_flight.get() + 1);
        Busy {
            activity: self.clone(),
            kind: request.kind(),
            quiet: self.working.get() == 0,
            since: Instant::now(),
        }
    }

    /// Counts a piece of work of the background until the answer is dropped.
    pub fn work(self: &Rc<Self>) -> Working {
        self.working.set(self.working.get() + 1);
        Working(self.clone())
    }

    /// Pieces of work of the background under way now.
    pub fn working(&self) -> u32 {
        self.working.get()
    }

    /// Requests that ended so far, and those of them that were quiet.
    pub fn ended(&self) -> (u64, u64) {
        (self.ended.get(), self.quiet.get())
    }

    /// Whether no request is under way, and none was for so long.
    pub fn is_idle_for(&self, time: Duration) -> bool {
        self.in_flight.get() == 0 && self.ended_at.get().is_none_or(|ended| ended.elapsed() >= time)
    }

    /// Requests that ended since the last look.
    pub fn news(&self) -> u64 {
        self.ended.get() - self.looked.get()
    }

    /// How requests fared lately; what was before fades with each look. Kinds of which too few quiet
    /// requests are known are left out; if that leaves out more than half, nothing is known.
    pub fn look(&self) -> Fared {
        let mut kinds = self.kinds.borrow_mut();
        let total: u64 = kinds.iter().map(|kind| kind.all.count).sum();
        let known = || kinds.iter().filter(|kind| kind.is_known());
        let covered: u64 = known().map(|kind| kind.all.count).sum();
        let took: u128 = known().map(|kind| u128::from(kind.all.took_us)).sum();
        let usual: u128 = known().map(|k| u128::from(k.quiet.scaled(k.all.count))).sum();
        let slowdown = (covered > 0 && covered * 2 >= total)
            .then(|| u64::try_from(took * 1000 / usual.max(1)).unwrap_or(u64::MAX));
        kinds.iter_mut().for_each(Kind::fade);
        let requests = self.news();
        self.looked.set(self.ended.get());
        Fared { requests, slowdown }
    }

    /// The permit of the one window that may be scrubbed at a time, in the order of asking; none
    /// never happens.
    pub async fn scrub_permit(&self) -> Option<SemaphorePermit<'_>> {
        self.scrubs.acquire().await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn requests(activity: &Rc<Activity>, count: u32, took: Duration) {
        for _ in 0..count {
            let _busy = activity.begin(Request::Read(4096));
            tokio::time::sleep(took).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_slowdown_is_against_quiet_requests_of_the_same_kind() {
        let activity = Rc::new(Activity::default());
        requests(&activity, 20, Duration::from_millis(10)).await;
        assert_eq!(activity.look(), Fared { requests: 20, slowdown: Some(1000) });
        // What was before fades.
        let work = activity.work();
        requests(&activity, 1000, Duration::from_millis(15)).await;
        // Nothing is known of large writes.
        drop(activity.begin(Request::Write(1 << 20)));
        let fared = activity.look();
        assert_eq!(fared.requests, 1001);
        let slowdown = fared.slowdown.expect("enough is known");
        assert!((1490..=1500).contains(&slowdown), "{slowdown}");
        drop(work);
        assert_eq!((activity.ended(), activity.working()), ((1021, 20), 0));
    }

    #[tokio::test(start_paused = true)]
    async fn of_what_is_not_known_nothing_is_said() {
        let activity = Rc::new(Activity::default());
        assert_eq!(activity.look(), Fared { requests: 0, slowdown: None });
        let _work = activity.work();
        requests(&activity, 100, Duration::from_millis(10)).await;
        assert_eq!(activity.look(), Fared { requests: 100, slowdown: None });
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_tail_is_no_slowdown() {
        let activity = Rc::new(Activity::default());
        for round in 0..40 {
            let work = (round % 2 == 1).then(|| activity.work());
            requests(&activity, 99, Duration::from_millis(1)).await;
            requests(&activity, 1, Duration::from_secs(1)).await;
            drop(work);
            if round % 2 == 1 {
                let slowdown = activity.look().slowdown.expect("enough is known");
                assert!((950..=1050).contains(&slowdown), "{slowdown}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn idle_is_without_requests_for_a_while() {
        let activity = Rc::new(Activity::default());
        let second = Duration::from_secs(1);
        assert!(activity.is_idle_for(second), "there was none yet");
        let busy = activity.begin(Request::Write(0));
        tokio::time::sleep(second).await;
        assert!(!activity.is_idle_for(second));
        drop(busy);
        assert!(!activity.is_idle_for(second));
        tokio::time::sleep(second).await;
        assert!(activity.is_idle_for(second));
    }
}
