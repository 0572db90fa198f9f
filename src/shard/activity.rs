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
/// Weight of a new quiet request in the average of its kind: one in so many.
const WEIGHT: u64 = 32;
/// A quiet request that takes more than so many times the average counts as that: one stall says
/// nothing of the others.
const OUTLIER: u64 = 4;
/// Quiet requests before which the average of a kind says nothing.
const QUIET_MIN: u64 = 8;
/// Averages are kept in so many parts of a microsecond.
const FRACTION: u64 = 16;

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

/// One kind of requests.
#[derive(Debug, Clone, Copy, Default)]
struct Kind {
    /// Requests that ended since the last look, and the microseconds they took.
    ended: u64,
    took_us: u64,
    /// Quiet requests so far, and their average, in parts of a microsecond.
    quiet: u64,
    average: u64,
}

impl Kind {
    fn note(&mut self, took_us: u64, quiet: bool) {
        self.ended += 1;
        self.took_us += took_us;
        if !quiet {
            return;
        }
        let mut took = took_us * FRACTION;
        if self.quiet >= QUIET_MIN {
            took = took.min(self.average.max(FRACTION) * OUTLIER);
        }
        let weight = WEIGHT.min(self.quiet + 1);
        self.average = (self.average * (weight - 1) + took) / weight;
        self.quiet += 1;
    }
}

/// Requests of clients under way, and the one permit of scrubs.
#[derive(Debug)]
pub struct Activity {
    in_flight: Cell<u32>,
    /// When the last request ended.
    ended_at: Cell<Option<Instant>>,
    /// Quiet requests that ended.
    quiet: Cell<u64>,
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
            quiet: Cell::new(0),
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
        let took = u64::try_from((now - *since).as_micros()).unwrap_or(u64::MAX / FRACTION / 4);
        activity.in_flight.set(activity.in_flight.get() - 1);
        activity.ended_at.set(Some(now));
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

    /// Quiet requests that ended so far.
    pub fn quiet(&self) -> u64 {
        self.quiet.get()
    }

    /// Whether no request is under way, and none was for so long.
    pub fn is_idle_for(&self, time: Duration) -> bool {
        self.in_flight.get() == 0 && self.ended_at.get().is_none_or(|ended| ended.elapsed() >= time)
    }

    /// Requests that ended since the last look.
    pub fn ended(&self) -> u64 {
        self.kinds.borrow().iter().map(|kind| kind.ended).sum()
    }

    /// How the requests fared that ended since the last look. Kinds of which too few quiet requests
    /// are known are left out; if that leaves out more than half, nothing is known.
    pub fn look(&self) -> Fared {
        let mut kinds = self.kinds.borrow_mut();
        let requests: u64 = kinds.iter().map(|kind| kind.ended).sum();
        let known = || kinds.iter().filter(|kind| kind.quiet >= QUIET_MIN);
        let covered: u64 = known().map(|kind| kind.ended).sum();
        let took: u64 = known().map(|kind| kind.took_us * FRACTION).sum();
        let usual: u64 = known().map(|kind| kind.ended * kind.average).sum();
        let slowdown = (covered > 0 && covered * 2 >= requests)
            .then(|| took.saturating_mul(1000) / usual.max(1));
        for kind in kinds.iter_mut() {
            (kind.ended, kind.took_us) = (0, 0);
        }
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
        let work = activity.work();
        requests(&activity, 20, Duration::from_millis(15)).await;
        // Nothing is known of large writes.
        drop(activity.begin(Request::Write(1 << 20)));
        assert_eq!(activity.look(), Fared { requests: 21, slowdown: Some(1500) });
        drop(work);
        assert_eq!(activity.look(), Fared { requests: 0, slowdown: None });
        assert_eq!((activity.quiet(), activity.working()), (20, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn one_stall_hardly_changes_what_is_usual() {
        let activity = Rc::new(Activity::default());
        requests(&activity, 40, Duration::from_millis(10)).await;
        requests(&activity, 1, Duration::from_secs(10)).await;
        activity.look();
        requests(&activity, 1, Duration::from_millis(10)).await;
        let slowdown = activity.look().slowdown.expect("enough is known");
        assert!((900..=1000).contains(&slowdown), "{slowdown}");
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
