//! Narrowing and widening: the scheme of data segments as failure domains go for good and come.
//!
//! With too few domains for the pool's `k + m`, a segment that lost shards can be whole nowhere. What
//! is live in it is moved, by garbage collection, to segments of the widest `k' + m` that the domains
//! carry; and moved again, to the pool's scheme, when there are enough domains. Invariants:
//!
//! - `m` never changes: once everything is moved, as many further losses are survived as the pool
//!   promises. Only with fewer than `m + 1` domains are there fewer copies, as many as the log has
//!   (its width `w`, [`super::width`]), and repair adds the others when a domain comes.
//! - A segment is narrowed only if it misses a shard and is wider than there are domains: then one of
//!   its shards at least has no place, whatever repair does. Where places are, repair rebuilds.
//! - A segment is freed by the checkpoint after which nothing refers to it, as with all garbage
//!   collection. What cannot be moved, for lack of space or because a disk fails, stays where it is, and
//!   is moved later; nothing is given up for it.
//! - Passes come to an end: what is narrowed is never wider than the domains, what is widened has the
//!   pool's scheme. Which domains there are changes at most once in the times below.
//!
//! **How many domains there are** is not what is up now: a disk that is away for a moment must not have a
//! whole volume rewritten. A domain whose disks were removed, or are being emptied, does not count
//! from that moment. One that is down but expected back ([`Disks::lasting_domains`]) does, until it has been
//! down for `narrow_after`; one that comes counts when it has been up for `replace_after`.
//! Where space is short meanwhile, garbage collection takes the domains that are up as they are.
//!
//! New segments are opened in the scheme that the domains carry, so nothing is written that would have to be
//! narrowed. Widening waits for domains enough for the pool's scheme: what a few more would
//! gain, garbage collection takes up by itself when space is short.
//!
//! Knows nothing of pools or nodes, nor which disks they are: only how many domains.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::Instant;

use super::dense::Stream;
use super::gc::Pass;
use super::head::{Head, HeadError};
use super::rules::LogSet;
use super::segtab::Segment;
use crate::id::BLOCK_BYTES;
use crate::planted::{Bug, bug};
use crate::shard::disks::Disks;
use crate::shard::{Scheme, SegmentKind, SlotClass};

/// Pause between two looks whether domains stay as they are, at least and at most.
const LOOK_MIN: Duration = Duration::from_millis(20);
const LOOK_MAX: Duration = Duration::from_secs(10);
/// Pause until what is left to be moved is tried again, at first and at most.
const RETRY_MIN: Duration = Duration::from_millis(500);
const RETRY_MAX: Duration = Duration::from_mins(1);
/// Live blocks that one pass moves, about: other volumes' garbage collection waits meanwhile.
const PASS_BLOCKS: u64 = 32 << 10;

/// How many domains data segments count on.
pub(super) struct Narrow {
    /// The width of the pool at most.
    domains: Cell<usize>,
    /// Since when the domains that are up are more, or fewer; and of their numbers since, the nearest.
    doubt: Cell<Option<(Instant, usize)>>,
}

/// How far data segments are from the pool's scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bending {
    /// Scheme of new data segments.
    pub scheme: Scheme,
    /// Failure domains that count, the pool's width at most.
    pub domains: usize,
    /// Segments that are to be narrowed, and what is live in them, bytes.
    pub to_narrow: (usize, u64),
    /// Segments that are narrower than the pool's scheme, and what is live in them, bytes. They are
    /// widened when there are domains enough.
    pub narrow: (usize, u64),
}

impl Bending {
    /// Whether all is as the pool asks for.
    pub fn is_straight(&self, pool: Scheme) -> bool {
        self.scheme == pool && self.to_narrow.0 == 0 && self.narrow.0 == 0
    }

    /// Whether something is to be moved now.
    fn is_pending(&self, pool: Scheme) -> bool {
        self.to_narrow.0 > 0 || (self.scheme == pool && self.narrow.0 > 0)
    }
}

/// The widest scheme that so many domains carry, with the pool's parity.
fn scheme_for(pool: Scheme, domains: usize) -> Scheme {
    if domains >= pool.width() {
        return pool;
    }
    let parity = usize::from(pool.parity);
    let data = u8::try_from(domains.saturating_sub(parity).max(1)).expect("below the pool's");
    if bug(Bug::NarrowLosesParity) && domains > parity && parity > 0 {
        return Scheme { data: data + 1, parity: pool.parity - 1 };
    }
    Scheme { data, ..pool }
}

impl Narrow {
    pub(super) fn new(disks: &Disks, pool: Scheme) -> Self {
        let (_, expected) = disks.lasting_domains();
        Self { domains: Cell::new(expected.clamp(1, pool.width())), doubt: Cell::new(None) }
    }

    /// Takes note of the domains that are up, and those that are expected. Tells whether the number
    /// that counts has changed.
    fn judge(
        &self,
        (up, expected): (usize, usize),
        width: usize,
        (narrow_after, widen_after): (Duration, Duration),
    ) -> bool {
        let before = self.domains.get();
        let up = up.clamp(1, width);
        let now = before.min(expected.clamp(1, width));
        self.domains.set(now);
        if up == now {
            self.doubt.set(None);
            return now != before;
        }
        let same = |&(_, seen): &(Instant, usize)| seen != now && (seen > now) == (up > now);
        let (since, seen) = self.doubt.get().filter(same).unwrap_or((Instant::now(), up));
        let (seen, after) =
            if up < now { (seen.max(up), narrow_after) } else { (seen.min(up), widen_after) };
        if since.elapsed() >= after {
            self.domains.set(seen);
            self.doubt.set(None);
            return true;
        }
        self.doubt.set(Some((since, seen)));
        now != before
    }
}

/// Keeps track of the domains, and has what is to be moved moved, until the head stops.
pub(super) async fn run(head: Rc<Head>) {
    let mut pause = RETRY_MIN;
    let mut retry: Option<Instant> = None;
    while head.is_serving() {
        let changed = std::pin::pin!(head.disks.changed.notified());
        let wanted = std::pin::pin!(head.width_wanted.notified());
        if head.judge_domains() {
            head.leave_bent(head.dense_scheme());
            (pause, retry) = (RETRY_MIN, None);
            continue;
        }
        head.leave_reduced(head.disks.healthy_domains());
        if head.bending().is_pending(head.pool.scheme) {
            let at = *retry.get_or_insert_with(Instant::now);
            if at <= Instant::now() {
                head.leave_bent(head.dense_scheme());
                // Its end wakes garbage collection.
                head.checkpoint_wanted.notify_one();
                retry = Some(at + pause);
                pause = (pause * 2).min(RETRY_MAX);
            }
        } else {
            (pause, retry) = (RETRY_MIN, None);
        }
        let look = head.narrow.doubt.get().map(|_| {
            let shorter = head.config.narrow_after.min(head.config.replace_after);
            Instant::now() + (shorter / 4).clamp(LOOK_MIN, LOOK_MAX)
        });
        let told = futures_util::future::select(changed, wanted);
        match look.into_iter().chain(retry).min() {
            Some(at) => drop(tokio::time::timeout_at(at, told).await),
            None => {
                told.await;
            }
        }
    }
}

impl Head {
    /// Looks how many domains there are. Tells whether the number that counts has changed.
    fn judge_domains(self: &Rc<Self>) -> bool {
        let before = self.dense_scheme();
        let narrow_after = self.config.narrow_after;
        let times = (narrow_after, self.config.replace_after.min(narrow_after));
        let width = self.pool.scheme.width();
        if !self.narrow.judge(self.disks.lasting_domains(), width, times) {
            return false;
        }
        let (scheme, domains) = (self.dense_scheme(), self.narrow.domains.get());
        if scheme != before {
            tracing::warn!(volume = %self.volume, domains, data = scheme.data, parity = scheme.parity,
                "data segments have another scheme from now on");
        }
        true
    }

    /// Scheme of new data segments.
    pub(super) fn dense_scheme(&self) -> Scheme {
        scheme_for(self.pool.scheme, self.narrow.domains.get())
    }

    /// The same for garbage collection, which cannot wait for disks that are away while space is short.
    pub(super) fn gc_scheme(&self) -> Scheme {
        let scheme = self.dense_scheme();
        let (up, _) = self.disks.lasting_domains();
        if up < scheme.width() && self.wants_space(&self.state.borrow()) {
            return scheme_for(self.pool.scheme, up);
        }
        scheme
    }

    /// Shards that a data segment of this scheme must have at least: all, but of copies as many as the
    /// log has.
    pub(super) fn dense_least(&self, scheme: Scheme) -> usize {
        let state = self.state.borrow();
        let log = state.pairs().into_iter().map(LogSet::width).max();
        let copies = log.map_or(scheme.width(), usize::from);
        if scheme.data == 1 { copies.min(scheme.width()) } else { scheme.width() }
    }

    /// Whether a segment lacks a shard for which there is no domain, while what is live in it could
    /// be whole in a narrower one.
    pub(super) fn is_stranded(&self, segment: &Segment) -> bool {
        segment.kind == SegmentKind::Data
            && segment.missing != 0
            && segment.scheme.width() > self.narrow.domains.get()
            && segment.scheme.data > self.dense_scheme().data
    }

    /// Whether a segment is narrower than the pool asks for.
    fn is_narrow(&self, segment: &Segment) -> bool {
        segment.kind == SegmentKind::Data && segment.scheme.data < self.pool.scheme.data
    }

    /// How far data segments are from the pool's scheme.
    pub fn bending(&self) -> Bending {
        let state = self.state.borrow();
        let needed = |s: &&Segment| !s.sealed || s.live > 0 || s.recent > 0 || s.pins > 0;
        let count = |wanted: &dyn Fn(&Segment) -> bool| {
            let segments = state.table.segments.values().filter(needed).filter(|s| wanted(s));
            segments.fold((0, 0), |(count, bytes), s| {
                (count + 1, bytes + (u64::from(s.live) + u64::from(s.recent)) * BLOCK_BYTES)
            })
        };
        Bending {
            scheme: self.dense_scheme(),
            domains: self.narrow.domains.get(),
            to_narrow: count(&|s| self.is_stranded(s)),
            narrow: count(&|s| self.is_narrow(s)),
        }
    }

    /// Further losses of failure domains that everything survives now: what is stored, and what is
    /// written.
    pub fn tolerates(&self) -> usize {
        let (_, width, full) = self.log_width();
        let stored = self.reduced().1.unwrap_or(usize::from(full.saturating_sub(1)));
        stored.min(usize::from(width.saturating_sub(1)))
    }

    /// The segments to be moved next: those that are to be narrowed, fewest shards left first; if there
    /// are none, those that can be widened.
    fn bent(&self) -> Vec<Segment> {
        let state = self.state.borrow();
        let segments = state.table.segments.values();
        let movable = |s: &&Segment| s.sealed && s.pins == 0 && s.recent == 0 && s.live > 0;
        let mut bent: Vec<&Segment> =
            segments.clone().filter(movable).filter(|s| self.is_stranded(s)).collect();
        let can_widen = self.dense_scheme() == self.pool.scheme && !bug(Bug::NeverWidens);
        if bent.is_empty() && can_widen {
            bent = segments.filter(movable).filter(|s| self.is_narrow(s)).collect();
        }
        bent.sort_by_key(|s| (s.present().saturating_sub(s.scheme.data.into()), s.id));
        let mut blocks = 0;
        bent.into_iter()
            .take_while(|s| {
                let first = blocks == 0;
                blocks += u64::from(s.live);
                first || blocks <= PASS_BLOCKS
            })
            .cloned()
            .collect()
    }

    /// A pass that narrows or widens segments, as many as there are slots for. Tells how many were
    /// emptied.
    ///
    /// # Errors
    /// The segments to fill cannot be opened, or not be written.
    pub(super) async fn bend(self: &Rc<Self>) -> Result<usize, HeadError> {
        let mut bent = self.bent();
        let Some(first) = bent.first() else { return Ok(0) };
        // Widening gains space later but takes some now, of which there must be enough for clients.
        let class = if self.is_stranded(first) { SlotClass::Repair } else { SlotClass::Client };
        let scheme = self.dense_scheme();
        let pass = Pass { scheme, class, stream: Stream::Moved, paced: false };
        let lacking = self.segments_for(&bent, pass);
        let obtained = self.obtain_dense(lacking, pass, |_| true).await?.len();
        let fits = |count: &usize| self.segments_for(&bent[..*count], pass) <= obtained;
        bent.truncate((1..=bent.len()).rev().find(fits).unwrap_or(0));
        if bent.is_empty() {
            self.close_spares();
            return Ok(0);
        }
        let bare = |s: &Segment| s.present() <= usize::from(s.scheme.data);
        let paced = !bent.iter().any(bare);
        let pass = Pass { class: SlotClass::Repair, paced, ..pass };
        let emptied = self.clean(&bent, pass).await?;
        tracing::info!(volume = %self.volume, segments = emptied, data = scheme.data,
            parity = scheme.parity, "data segments were moved to another scheme");
        Ok(emptied)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POOL: Scheme = Scheme { data: 4, parity: 2 };

    #[test]
    fn parity_stays_while_there_are_domains_for_it() {
        let data = |domains| scheme_for(POOL, domains).data;
        assert_eq!([7, 6, 5, 4, 3, 2, 1].map(data), [4, 4, 3, 2, 1, 1, 1]);
        assert!((1..8).all(|domains| scheme_for(POOL, domains).parity == 2));
        assert_eq!(scheme_for(Scheme::replicated(3), 2), Scheme::replicated(3));
    }

    #[tokio::test(start_paused = true)]
    async fn domains_count_until_they_are_gone_for_long_and_when_they_stay() {
        let narrow = Narrow { domains: Cell::new(6), doubt: Cell::new(None) };
        let times = (Duration::from_mins(10), Duration::from_secs(10));
        let judge = |up, expected| {
            narrow.judge((up, expected), 6, times);
            narrow.domains.get()
        };
        let minutes = |n| tokio::time::advance(Duration::from_mins(n));
        assert_eq!(judge(7, 7), 6, "the pool's width at most");
        assert_eq!(judge(5, 6), 6, "a blip");
        minutes(9).await;
        assert_eq!(judge(4, 6), 6, "another goes");
        minutes(1).await;
        assert_eq!(judge(4, 6), 5, "the first was away for long");
        assert_eq!(judge(4, 6), 5);
        minutes(9).await;
        assert_eq!(judge(6, 6), 5, "both come back");
        tokio::time::advance(Duration::from_secs(9)).await;
        assert_eq!(judge(4, 6), 5, "and go again");
        tokio::time::advance(Duration::from_secs(9)).await;
        assert_eq!(judge(6, 6), 5);
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(judge(6, 6), 6, "they stay");
        assert_eq!(judge(6, 4), 4, "removed ones do not count");
        assert_eq!(judge(0, 0), 1);
    }
}
