//! The budget of work in the background: how much it may ask of the disks while clients are at work.
//!
//! Repair and scrub of all volumes of a node *take* bytes, read and written, before they use the
//! disks. The budget is a rate, and the rate is found by watching clients ([`super::activity`]):
//!
//! ```text
//! every JUDGE_EVERY with enough requests    s = what they took / what they take without the work
//!   s > AIM                                 rate -= rate * (s - AIM), at most half of it
//!   s < AIM, and the work waited            rate += rate * (AIM - s)
//!   always                                  FLOOR <= rate <= CEILING
//! ```
//!
//! A client that waits for answers gets 1/s of its throughput, so at `AIM` it keeps 93 % of it. What
//! requests take without the work is measured all the time: small rates leave gaps anyway, and where
//! too few requests began in one within [`GAP_EVERY`], the work pauses for [`GAP`] once it has ended.
//!
//! - While no client asks for anything there is no limit ([`IDLE_AFTER`]).
//! - It never starves: [`FLOOR`] is allowed whatever clients feel, so that redundancy comes back, and
//!   [`FLOOR_SOON`] while a segment waits that survives no further loss.
//! - What is [`Urgency::Now`] does not wait: clients wait for it.
//! - Those that wait are let through in the order of asking, [`Urgency::Soon`] before the others.
//!
//! Knows neither segments nor disks. There is no task and no timer of its own: who waits, judges.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

use super::activity::{Activity, Working};
use crate::limits::{
    BACKGROUND_BYTES_PER_SECOND_MAX, BACKGROUND_BYTES_PER_SECOND_MIN,
    BACKGROUND_BYTES_PER_SECOND_SOON,
};

/// The slowdown that is aimed at, per mille.
const AIM: u64 = 1075;
/// Time between two judgements at least, if so many requests ended …
const JUDGE_EVERY: Duration = Duration::from_millis(200);
const REQUESTS_ENOUGH: u64 = 32;
/// … and at most, however few did.
const JUDGE_AFTER: Duration = Duration::from_secs(1);
/// Bytes a second with which it begins.
const START: u64 = 32 << 20;
/// What is not used is kept for so long.
const BURST: Duration = Duration::from_millis(50);
/// For so long no client must have asked for anything, so that there is no limit.
const IDLE_AFTER: Duration = Duration::from_millis(100);
/// So often it is seen whether enough requests are quiet: one in so many, if they are not many.
const GAP_EVERY: Duration = Duration::from_millis(500);
const QUIET_SHARE: u64 = 16;
const QUIET_MANY: u64 = 1000;
/// How long a gap is at least, at most until so many requests were quiet, and how long it may wait for
/// the work to end.
const GAP: (Duration, Duration) = (Duration::from_millis(30), Duration::from_millis(80));
const GAP_REQUESTS: u64 = 16;
const DRAIN_MAX: Duration = Duration::from_millis(500);
/// How often who waits looks again.
const STEP: Duration = Duration::from_millis(5);

const FLOOR: u64 = BACKGROUND_BYTES_PER_SECOND_MIN;
const FLOOR_SOON: u64 = BACKGROUND_BYTES_PER_SECOND_SOON;
const CEILING: u64 = BACKGROUND_BYTES_PER_SECOND_MAX;

/// Whether work waits for the budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Urgency {
    /// It waits.
    Patient,
    /// It waits, but before all that is patient, and for less: a segment that survives no further
    /// loss.
    Soon,
    /// It does not, and takes nothing from the others.
    Now,
}

/// One that is not patient and waits, as long as this lives.
struct Hurry<'a>(&'a Cell<u32>);

impl<'a> Hurry<'a> {
    fn new(soon: &'a Cell<u32>) -> Self {
        soon.set(soon.get() + 1);
        Self(soon)
    }
}

impl Drop for Hurry<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// A pause of the work, to see what requests take without it.
#[derive(Debug, Clone, Copy)]
struct Gap {
    since: Instant,
    /// When the work had ended, and the quiet requests until then.
    drained: Option<(Instant, u64)>,
}

/// The budget of a node.
#[derive(Debug)]
pub struct Budget {
    activity: Rc<Activity>,
    /// Held by who is next, and by who is of those that are not patient.
    turn: Mutex<()>,
    turn_soon: Mutex<()>,
    /// How many are not patient and wait.
    soon: Cell<u32>,
    rate: Cell<u64>,
    /// Bytes that may be taken now; below zero while what was taken is paid back.
    tokens: Cell<i64>,
    filled_at: Cell<Instant>,
    judged_at: Cell<Instant>,
    /// The work had to wait since the last judgement.
    waited: Cell<bool>,
    slowdown: Cell<Option<u64>>,
    gap: Cell<Option<Gap>>,
    /// When it was last seen whether enough requests are quiet, and how many had ended, and been
    /// quiet, by then.
    quiet_at: Cell<(Instant, (u64, u64))>,
}

/// The budget at a glance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BudgetReport {
    /// Bytes a second that are allowed; none while there is no limit.
    pub limit: Option<u64>,
    /// What requests of clients took lately against what they take without the work, per mille; none
    /// if that is not known, or there were none.
    pub slowdown: Option<u64>,
}

impl Budget {
    /// A budget against these clients.
    pub fn new(activity: Rc<Activity>) -> Self {
        let now = Instant::now();
        Self {
            activity,
            turn: Mutex::new(()),
            turn_soon: Mutex::new(()),
            soon: Cell::new(0),
            rate: Cell::new(START),
            tokens: Cell::new(0),
            filled_at: Cell::new(now),
            judged_at: Cell::new(now),
            waited: Cell::new(false),
            slowdown: Cell::new(None),
            gap: Cell::new(None),
            quiet_at: Cell::new((now, (0, 0))),
        }
    }

    /// Waits until `bytes` may be read and written. The work counts as under way until the answer is
    /// dropped.
    pub async fn take(&self, bytes: u64, urgency: Urgency) -> Working {
        let turn = match urgency {
            Urgency::Now => return self.activity.work(),
            Urgency::Patient => &self.turn,
            Urgency::Soon => &self.turn_soon,
        };
        let _hurry = (urgency == Urgency::Soon).then(|| Hurry::new(&self.soon));
        let _turn = turn.lock().await;
        loop {
            let behind = urgency == Urgency::Patient && self.soon.get() > 0;
            let pause = if behind { Some(STEP) } else { self.pause(Instant::now()) };
            let Some(pause) = pause else { break };
            self.waited.set(true);
            sleep(pause).await;
        }
        if !self.is_open() {
            let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
            self.tokens.set(self.tokens.get().saturating_sub(bytes));
        }
        self.activity.work()
    }

    /// Bytes a second that are allowed whatever clients feel.
    fn floor(&self) -> u64 {
        if self.soon.get() > 0 { FLOOR_SOON } else { FLOOR }
    }

    /// Bytes a second that are allowed now.
    fn rate(&self) -> u64 {
        self.rate.get().max(self.floor())
    }

    /// Counts work as under way that was taken already.
    pub fn work(&self) -> Working {
        self.activity.work()
    }

    /// What is allowed now, and how clients fare.
    pub fn report(&self) -> BudgetReport {
        let limit = (!self.is_open()).then(|| self.rate());
        BudgetReport { limit, slowdown: self.slowdown.get().filter(|_| limit.is_some()) }
    }

    /// Whether there is no limit.
    fn is_open(&self) -> bool {
        self.activity.is_idle_for(IDLE_AFTER)
    }

    /// How long to wait before looking again; none if the next may go.
    fn pause(&self, now: Instant) -> Option<Duration> {
        if self.is_open() {
            self.gap.set(None);
            self.fill(now);
            self.tokens.set(0);
            self.quiet_at.set((now, self.activity.ended()));
            return None;
        }
        self.judge(now);
        self.fill(now);
        if self.is_gap(now) {
            return Some(STEP);
        }
        let debt = u64::try_from(-self.tokens.get()).unwrap_or(0);
        if debt == 0 {
            return None;
        }
        let nanos = u128::from(debt) * 1_000_000_000 / u128::from(self.rate());
        let pause = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        Some(pause.clamp(Duration::from_millis(1), STEP))
    }

    /// Gives what the rate allows for the time since this was done last.
    fn fill(&self, now: Instant) {
        let elapsed = now - self.filled_at.replace(now);
        let at = |time: Duration| {
            let bytes = u128::from(self.rate()) * time.as_nanos() / 1_000_000_000;
            i64::try_from(bytes).unwrap_or(i64::MAX)
        };
        self.tokens.set(self.tokens.get().saturating_add(at(elapsed)).min(at(BURST)));
    }

    /// Sets the rate by how clients fared, if it is time.
    fn judge(&self, now: Instant) {
        let elapsed = now - self.judged_at.get();
        let enough = elapsed >= JUDGE_EVERY && self.activity.news() >= REQUESTS_ENOUGH;
        if !enough && elapsed < JUDGE_AFTER {
            return;
        }
        self.judged_at.set(now);
        let waited = self.waited.replace(false);
        let fared = self.activity.look();
        // What lies longer back says nothing of the present rate.
        if elapsed > JUDGE_AFTER * 2 {
            return;
        }
        self.slowdown.set(fared.slowdown);
        let Some(slowdown) = fared.slowdown else { return };
        let rate = self.rate();
        let next = match slowdown.checked_sub(AIM) {
            Some(excess) => rate - rate.saturating_mul(excess.min(500)) / 1000,
            None if waited => rate + rate * (AIM - slowdown).min(250) / 1000,
            None => rate,
        };
        self.rate.set(next.clamp(self.floor(), CEILING));
        tracing::trace!(slowdown, requests = fared.requests, rate, next, "budget");
    }

    /// Whether the work pauses, to see what requests take without it.
    fn is_gap(&self, now: Instant) -> bool {
        let (ended, quiet) = self.activity.ended();
        let Some(gap) = self.gap.get() else {
            let (seen_at, (ended_then, quiet_then)) = self.quiet_at.get();
            if now - seen_at < GAP_EVERY {
                return false;
            }
            self.quiet_at.set((now, (ended, quiet)));
            let (requests, of_them) = (ended - ended_then, quiet - quiet_then);
            if of_them < QUIET_MANY && of_them * QUIET_SHARE < requests.max(QUIET_SHARE) {
                self.gap.set(Some(Gap { since: now, drained: None }));
            }
            return self.gap.get().is_some();
        };
        let over = match gap.drained {
            None if self.activity.working() == 0 => {
                self.gap.set(Some(Gap { drained: Some((now, quiet)), ..gap }));
                false
            }
            None => now - gap.since >= DRAIN_MAX,
            Some((since, before)) => {
                let enough = quiet >= before + GAP_REQUESTS && now - since >= GAP.0;
                enough || now - since >= GAP.1
            }
        };
        if over {
            self.gap.set(None);
            self.quiet_at.set((now, (ended, quiet)));
        }
        !over
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::activity::Request;
    use tokio::task::LocalSet;

    const PIECE: u64 = 1 << 20;

    /// A disk that takes `per_piece` for each piece of work and makes requests of clients wait for
    /// what is under way: what work and clients got within `time`, pieces and requests.
    async fn share(per_piece: Duration, clients: u32, time: Duration) -> (u64, u64) {
        let activity = Rc::new(Activity::default());
        let budget = Rc::new(Budget::new(activity.clone()));
        let disk = Rc::new(Mutex::new(()));
        let (pieces, requests) = (Rc::new(Cell::new(0_u64)), Rc::new(Cell::new(0_u64)));
        let tasks = LocalSet::new();
        for _ in 0..clients {
            let (activity, disk, requests) = (activity.clone(), disk.clone(), requests.clone());
            tasks.spawn_local(async move {
                loop {
                    let busy = activity.begin(Request::Read(4096));
                    let turn = disk.lock().await;
                    sleep(Duration::from_millis(1)).await;
                    drop((turn, busy));
                    requests.set(requests.get() + 1);
                    tokio::task::yield_now().await;
                }
            });
        }
        for _ in 0..8 {
            let (budget, disk, pieces) = (budget.clone(), disk.clone(), pieces.clone());
            tasks.spawn_local(async move {
                loop {
                    let _work = budget.take(PIECE, Urgency::Patient).await;
                    let _turn = disk.lock().await;
                    sleep(per_piece).await;
                    pieces.set(pieces.get() + 1);
                }
            });
        }
        drop(tasks.run_until(tokio::time::timeout(time, std::future::pending::<()>())).await);
        (pieces.get(), requests.get())
    }

    #[tokio::test(start_paused = true)]
    async fn clients_keep_nine_tenths_of_their_throughput() {
        let time = Duration::from_mins(1);
        for clients in [1, 4, 16] {
            // Without the work a request takes its millisecond on the one disk there is.
            let alone = 60_000;
            let (pieces, requests) = share(Duration::from_millis(4), clients, time).await;
            assert!(requests * 100 >= alone * 88, "{clients} clients: {requests} of {alone}");
            // What clients can spare is used: at least a third of the tenth.
            assert!(pieces * 4 * 100 >= 60_000 * 3, "{clients} clients: {pieces} pieces");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_clients_there_is_no_limit() {
        let (pieces, _) = share(Duration::from_millis(1), 0, Duration::from_secs(2)).await;
        assert!(pieces >= 1990, "{pieces} pieces");
    }

    #[tokio::test(start_paused = true)]
    async fn it_never_starves() {
        // Each piece hurts so much that nothing is left to give.
        let time = Duration::from_mins(1);
        let (pieces, _) = share(Duration::from_millis(90), 4, time).await;
        assert!(pieces * PIECE >= FLOOR * 60 * 8 / 10, "{pieces} pieces");
        // Clients that get no answer at all do not stop it either.
        let activity = Rc::new(Activity::default());
        let budget = Budget::new(activity.clone());
        let _hangs = activity.begin(Request::Write(4096));
        let since = Instant::now();
        for _ in 0..100 {
            drop(budget.take(PIECE, Urgency::Patient).await);
        }
        assert!(since.elapsed() < Duration::from_secs(100 * PIECE / FLOOR + 2));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_wanted_soon_overtakes_and_has_a_floor_of_its_own() {
        let activity = Rc::new(Activity::default());
        let budget = Rc::new(Budget::new(activity.clone()));
        let _hangs = activity.begin(Request::Read(4096));
        let order = Rc::new(std::cell::RefCell::new(Vec::new()));
        let tasks = LocalSet::new();
        for urgency in [Urgency::Patient, Urgency::Soon] {
            for _ in 0..64 {
                let (budget, order) = (budget.clone(), order.clone());
                tasks.spawn_local(async move {
                    drop(budget.take(PIECE, urgency).await);
                    order.borrow_mut().push(urgency);
                });
            }
        }
        let since = Instant::now();
        tasks.await;
        assert!(order.borrow()[1..65].iter().all(|urgency| *urgency == Urgency::Soon));
        // Clients that get no answer leave the floors.
        let least = 64 * PIECE * 1000 / FLOOR_SOON + 63 * PIECE * 1000 / START.max(FLOOR);
        let took = u64::try_from(since.elapsed().as_millis()).expect("not for ever");
        assert!(took <= least + 200, "{took} ms, at least {least}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_urgent_does_not_wait() {
        let activity = Rc::new(Activity::default());
        let budget = Budget::new(activity.clone());
        let _busy = activity.begin(Request::Read(4096));
        let since = Instant::now();
        for _ in 0..100 {
            drop(budget.take(1 << 30, Urgency::Now).await);
        }
        assert_eq!(since.elapsed(), Duration::ZERO);
        assert_eq!(budget.report(), BudgetReport { limit: Some(START), slowdown: None });
        assert_eq!(budget.tokens.get(), 0, "nothing is taken from the others");
    }

    #[tokio::test(start_paused = true)]
    async fn it_learns_anew_when_the_load_changes() {
        let activity = Rc::new(Activity::default());
        let budget = Budget::new(activity.clone());
        for took in [1, 20, 2] {
            // Work does not slow these clients down at all, so it may have more and more.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(30) {
                let busy = activity.begin(Request::Read(4096));
                sleep(Duration::from_millis(took)).await;
                drop(busy);
                let take = budget.take(PIECE, Urgency::Patient);
                drop(tokio::time::timeout(Duration::from_millis(1), take).await);
            }
            let limit = budget.report().limit.expect("clients are at work");
            assert!(limit > START, "{took} ms: {limit}");
        }
    }
}
