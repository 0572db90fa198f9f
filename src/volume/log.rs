//! The log: group commit, acknowledgement in order, seal-and-go-on.
//!
//! One task owns the open log segment. It forms a record from all that waits when the pipeline has
//! room, appends it to every member, and applies and acknowledges records in LSN order once they
//! are durable on all members. When a member fails or lags far behind the others of the same
//! append, the segment is closed at its committed length and the unacknowledged records are
//! appended to a new one, with the same LSN and content; the first record there names what was
//! closed (design 5, "Failure of a shard while writing").

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::Instant;

use super::discard::delete_shards;
use super::head::{Flight, Head, Op, State, add, table_entry};
use super::rules::{self, LogSet};
use super::segtab::ShardRef;
use crate::export::TargetError;
use crate::id::{Lsn, SegmentId};
use crate::limits::{RECORD_ENTRIES_MAX, RECORD_PAYLOAD_BLOCKS_MAX};
use crate::planted::{Bug, bug};
use crate::segment::checksum::Salt;
use crate::segment::open::{OpenError, OpenRequest, OpenSegment, frame};
use crate::segment::record::{Entry, Header, header_blocks};
use crate::shard::{SegmentKind, ShardError, ShardResult, SlotClass};

/// Records in flight at most.
const FLIGHTS_MAX: usize = 4;
/// How often stragglers are looked for while records are in flight.
const TICK: Duration = Duration::from_millis(50);
/// Longest pause between two failovers of a volume.
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// A closed predecessor that the next opening record names.
#[derive(Debug, Clone, Copy)]
struct Closed {
    segment: SegmentId,
    blocks: u32,
    bad: u32,
}

struct Done {
    lsn: Lsn,
    segment: SegmentId,
    shard: usize,
    result: ShardResult<()>,
}

type Append = Pin<Box<dyn Future<Output = Done>>>;

enum Event {
    Io(Done),
    Wake,
    Tick,
}

/// The task's own state.
struct Writer {
    head: Rc<Head>,
    io: FuturesUnordered<Append>,
    closed: Vec<Closed>,
    /// Class of the slots of the open segment.
    class: SlotClass,
    /// Members of the open segment that failed.
    failed: u32,
    tick: Option<Pin<Box<tokio::time::Sleep>>>,
    backoff: Duration,
    last_failover: Option<Instant>,
}

/// Runs the log of `head` until it stops.
pub(super) async fn run(head: Rc<Head>) {
    let mut writer = Writer {
        head,
        io: FuturesUnordered::new(),
        closed: Vec::new(),
        class: SlotClass::Client,
        failed: 0,
        tick: None,
        backoff: Duration::ZERO,
        last_failover: None,
    };
    while writer.head.is_serving() {
        writer.step().await;
    }
}

impl Writer {
    async fn step(&mut self) {
        self.drain();
        self.complete();
        self.roll_if_asked();
        if self.failed != 0 {
            self.fail_over().await;
            return;
        }
        while self.send_next().await {}
        match self.event().await {
            Event::Io(done) => self.take(done),
            Event::Wake => {}
            Event::Tick => self.look_for_stragglers(),
        }
    }

    /// Takes up every completion that is there already.
    fn drain(&mut self) {
        while let Some(Some(done)) = self.io.next().now_or_never() {
            self.take(done);
        }
    }

    async fn event(&mut self) -> Event {
        let busy = !self.head.state.borrow().flights.is_empty();
        let stalled = self.head.state.borrow().stalled_since.is_some();
        if self.tick.is_none() && (busy || stalled) {
            self.tick = Some(Box::pin(tokio::time::sleep(TICK)));
        }
        let head = self.head.clone();
        let mut wake = pin!(head.wake.notified());
        let (io, tick) = (&mut self.io, &mut self.tick);
        std::future::poll_fn(move |cx| {
            if let Poll::Ready(Some(done)) = io.poll_next_unpin(cx) {
                return Poll::Ready(Event::Io(done));
            }
            if wake.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Event::Wake);
            }
            if let Some(sleep) = tick
                && sleep.as_mut().poll(cx).is_ready()
            {
                *tick = None;
                return Poll::Ready(Event::Tick);
            }
            Poll::Pending
        })
        .await
    }

    fn take(&mut self, done: Done) {
        let head = self.head.clone();
        let mut state = head.state.borrow_mut();
        let Some(log) = state.log.clone().filter(|log| log.id == done.segment) else { return };
        let sent = {
            let Some(flight) = state.flights.iter_mut().find(|f| f.lsn == done.lsn) else { return };
            if done.result.is_ok() {
                flight.done |= 1 << done.shard;
                flight.first_done.get_or_insert_with(Instant::now);
            }
            flight.sent
        };
        drop(state);
        let disk = log.shards[done.shard].disk;
        match done.result {
            Ok(()) => head.lease_evidence(disk, sent),
            Err(ShardError::Fenced(epoch)) => head.stop(&format!("fenced by epoch {epoch}")),
            Err(error) => {
                tracing::warn!(volume = %head.volume, segment = %log.id, %disk, %error, "append failed");
                head.disks.report(disk, &error);
                self.failed |= 1 << done.shard;
            }
        }
    }

    /// Applies and acknowledges the records at the front that every member has.
    fn complete(&mut self) {
        let head = self.head.clone();
        let mut finished = Vec::new();
        {
            let mut state = head.state.borrow_mut();
            let Some(log) = state.log.clone() else { return };
            let all = (1u32 << log.shards.len()) - 1;
            loop {
                let ready = |flight: &Flight| {
                    let enough = if bug(Bug::AckBeforeAll) { flight.done != 0 } else { false };
                    flight.done == all || enough
                };
                let out_of_order = bug(Bug::ApplyOutOfOrder);
                let index = state
                    .flights
                    .iter()
                    .position(ready)
                    .filter(|&index| index == 0 || out_of_order);
                let Some(flight) = index.and_then(|index| state.flights.remove(index)) else {
                    break;
                };
                let generation = state.generation;
                let current = flight.ops.iter().all(|op| op.generation == generation);
                state.apply(log.id, flight.payload_block, &flight.entries, &|_, _| current);
                state.unpin(&flight.entries);
                state.acked = flight.lsn;
                state.log_blocks += u64::from(flight.end - flight.block);
                if let Some(segment) = state.table.segments.get_mut(&log.id) {
                    segment.blocks = flight.end;
                }
                add(&head.stats.records, 1);
                add(&head.stats.appended_blocks, u64::from(flight.end - flight.block));
                state.pending_bytes -= flight.ops.iter().map(Op::bytes).sum::<usize>();
                finished.extend(flight.ops);
                self.closed.clear();
                self.backoff = Duration::ZERO;
            }
            if state.overlay.len() >= head.overlay_extents_max(&state) / 2
                || state.log_blocks >= head.config.checkpoint_log_blocks
            {
                head.checkpoint_wanted.notify_one();
            }
        }
        if !finished.is_empty() {
            for op in finished {
                op.finish(Ok(()));
            }
            head.disks.note_acknowledged();
            head.applied.notify_waiters();
        }
    }

    fn look_for_stragglers(&mut self) {
        let state = self.head.state.borrow();
        let (Some(flight), Some(log)) = (state.flights.front(), &state.log) else { return };
        if flight.first_done.is_some_and(|at| at.elapsed() >= self.head.config.straggler) {
            let all = (1u32 << log.shards.len()) - 1;
            self.failed |= all & !flight.done;
            for (index, shard) in log.shards.iter().enumerate() {
                if self.failed >> index & 1 == 1 {
                    self.head.disks.report(shard.disk, &ShardError::Unreachable);
                }
            }
        }
    }

    /// Closes the open segment, whole as it is, where the log set is to change.
    fn roll_if_asked(&mut self) {
        let asked = {
            let state = self.head.state.borrow();
            state.roll_log && state.flights.is_empty()
        };
        if asked && self.failed == 0 {
            self.close(0);
        }
    }

    /// Sends the next record if there is one and the pipeline has room. Tells whether to go on.
    async fn send_next(&mut self) -> bool {
        let (idle, full) = {
            let state = self.head.state.borrow();
            let overlay_full = state.overlay.len() >= self.head.overlay_extents_max(&state);
            let waits = state.queue.is_empty() && (state.pending.is_empty() || overlay_full);
            (waits, state.flights.len() >= FLIGHTS_MAX || self.is_thin(&state))
        };
        if idle || full || self.head.state.borrow().stopped.is_some() {
            return false;
        }
        let needed = self.blocks_needed();
        let log = self.head.state.borrow().log.clone();
        let Some(log) = log else { return self.open_next().await };
        if self.head.state.borrow().roll_log {
            return false;
        }
        // What does not fit an empty segment fits none: it is failed when its record is formed.
        let fits_none = log.next.get() == 0 && self.head.state.borrow().queue.is_empty();
        if log.next.get() + needed > log.shard_blocks && !fits_none {
            if !self.head.state.borrow().flights.is_empty() {
                return false;
            }
            self.close(0);
            return self.open_next().await;
        }
        let from_queue = self.head.state.borrow_mut().queue.pop_front();
        if let Some(flight) = from_queue.or_else(|| self.form(&log)) {
            self.send(&log, flight);
        }
        true
    }

    /// Whether the next record would be mostly header, and can be made larger by waiting for what is
    /// in flight.
    fn is_thin(&self, state: &State) -> bool {
        let enough = self.head.config.thin_record_blocks;
        let mut blocks = 0;
        let mut grows = |op: &Op| {
            blocks += op.crcs.len();
            blocks < enough
        };
        !state.flights.is_empty()
            && state.queue.is_empty()
            && self.head.wants_space(state)
            && state.pending.iter().all(&mut grows)
    }

    /// Blocks that the next record will take at most, its opening record included.
    fn blocks_needed(&self) -> u32 {
        let state = self.head.state.borrow();
        let (entries, payload) = match state.queue.front() {
            Some(flight) => (flight.entries.len(), flight.crcs.len()),
            None => state.pending.front().map_or((0, 0), |op| (op.entries.len(), op.crcs.len())),
        };
        let payload_blocks = u32::try_from(payload).expect("bounded by the size of a record");
        header_blocks(entries, payload) + payload_blocks + 1
    }

    /// Forms a record from what waits, as much as fits; gives it its LSN.
    fn form(&self, log: &OpenSegment) -> Option<Flight> {
        if self.class > SlotClass::Client && self.head.is_full(&self.head.state.borrow()) {
            // The segment lies in a reserve: it is not for clients.
            self.refuse_clients();
        }
        let mut state = self.head.state.borrow_mut();
        let room = (log.shard_blocks - log.next.get()) as usize - 1;
        let (mut entries, mut payload, mut crcs, mut ops) = (vec![], vec![], vec![], vec![]);
        let mut skipped = Vec::new();
        while let Some(op) = state.pending.front() {
            let blocks = crcs.len() + op.crcs.len();
            let count = entries.len() + op.entries.len();
            if blocks > RECORD_PAYLOAD_BLOCKS_MAX
                || count > RECORD_ENTRIES_MAX
                || blocks + header_blocks(count, blocks) as usize > room
            {
                break;
            }
            let mut op = state.pending.pop_front().expect("it is there");
            let moves = op.entries.iter().any(|e| matches!(e, Entry::Move { .. }));
            if moves && op.generation != state.generation && !bug(Bug::MoveIgnoresNewer) {
                // Looked up in an index that is not the newest any more: garbage collection will
                // look again.
                skipped.push(op);
                continue;
            }
            if !moves {
                op.generation = state.generation;
            }
            entries.append(&mut op.entries.clone());
            payload.append(&mut op.payload.clone());
            crcs.extend_from_slice(&op.crcs);
            ops.push(op);
        }
        for op in skipped {
            state.fail(op, "looked up in an older index");
            self.head.applied.notify_waiters();
        }
        // What was first before, and was looked at, may have been skipped or refused: what is first
        // now may only lack room in this segment, and comes into the next one.
        let fits_none = |op: &Op| {
            log.next.get() == 0
                || op.crcs.len() > RECORD_PAYLOAD_BLOCKS_MAX
                || op.entries.len() > RECORD_ENTRIES_MAX
        };
        if ops.is_empty()
            && let Some(op) = state.pending.pop_front_if(|op| fits_none(op))
        {
            // It fits no record: a defect of whoever made it, but no reason to stand still.
            state.fail(op, "the operation fits no record");
            return None;
        }
        if entries.is_empty() {
            // Nothing but barriers: they are done when what was formed before them is.
            match state.flights.back_mut() {
                Some(last) => last.ops.extend(ops),
                None => ops.into_iter().for_each(|op| op.finish(Ok(()))),
            }
            return None;
        }
        let lsn = state.next_lsn;
        state.next_lsn = lsn.next();
        Some(Flight {
            lsn,
            entries,
            payload,
            crcs,
            ops,
            payload_block: 0,
            block: 0,
            end: 0,
            done: 0,
            sent: Instant::now(),
            first_done: None,
        })
    }

    /// Appends a record to every member of `log`, where it fits.
    fn send(&mut self, log: &Rc<OpenSegment>, mut flight: Flight) {
        let opening = log.next.get() == 0;
        let payload = u32::try_from(flight.crcs.len()).expect("bounded");
        let blocks = header_blocks(flight.entries.len(), flight.crcs.len());
        let start = log.reserve(u32::from(opening) + blocks + payload).expect("room was checked");
        flight.block = start;
        let at = start + u32::from(opening);
        flight.payload_block = at + blocks;
        flight.end = flight.payload_block + payload;
        flight.done = 0;
        flight.first_done = None;
        flight.sent = Instant::now();
        let salt = log.salt(0);
        let (mut data, mut crcs) =
            if opening { self.opening(log, salt) } else { Default::default() };
        let mut header = self.header(log, at);
        header.header_blocks = blocks;
        header.payload_blocks = payload;
        header.lsn = flight.lsn;
        header.entries.clone_from(&flight.entries);
        header.crcs = (flight.payload_block..)
            .zip(&flight.crcs)
            .map(|(block, &raw)| salt.apply(block, raw))
            .collect();
        let (record, record_crcs) = frame(salt, &header, &flight.payload);
        data.extend(record);
        crcs.extend(record_crcs);
        let (data, crcs): (Rc<[Bytes]>, Rc<[u32]>) = (data.into(), crcs.into());
        for shard in 0..log.shards.len() {
            let append = log.append(shard, start, data.clone(), crcs.clone());
            let (lsn, segment) = (flight.lsn, log.id);
            self.io
                .push(Box::pin(async move { Done { lsn, segment, shard, result: append.await } }));
        }
        self.head.state.borrow_mut().flights.push_back(flight);
    }

    /// A header with everything but its content.
    fn header(&self, log: &OpenSegment, block: u32) -> Header {
        let state = self.head.state.borrow();
        Header {
            kind: SegmentKind::Log,
            shard: 0,
            header_blocks: 1,
            payload_blocks: 0,
            block,
            volume: self.head.volume,
            segment: log.id,
            epoch: self.head.authority.epoch,
            head: self.head.authority.head,
            lsn: Lsn(0),
            acked: state.acked,
            checkpoint: state.checkpoint_place(),
            entries: Vec::new(),
            crcs: Vec::new(),
        }
    }

    /// The opening record: how earlier log segments ended.
    fn opening(&self, log: &OpenSegment, salt: Salt) -> (Vec<Bytes>, Vec<u32>) {
        let mut header = self.header(log, 0);
        header.entries = self
            .closed
            .iter()
            .map(|c| Entry::Closed { segment: c.segment, blocks: c.blocks, bad: c.bad })
            .collect();
        frame(salt, &header, &[])
    }

    /// Closes the open segment at its committed length and seals it in the background.
    fn close(&mut self, bad: u32) {
        let head = self.head.clone();
        let mut state = head.state.borrow_mut();
        state.roll_log = false;
        let Some(log) = state.log.take() else { return };
        let blocks = state.flights.front().map_or(log.next.get(), |flight| flight.block);
        state.log_floor = state.next_segment;
        self.io = FuturesUnordered::new();
        self.failed = 0;
        if let Some(segment) = state.table.segments.get_mut(&log.id) {
            segment.sealed = true;
            segment.blocks = blocks;
        }
        // One opening record holds only so many; a log that was voided so often in a row has
        // nothing committed in between, so the oldest are of no use but for the first.
        if self.closed.len() >= RECORD_ENTRIES_MAX / 2 {
            self.closed.remove(1);
        }
        self.closed.push(Closed { segment: log.id, blocks, bad });
        drop(state);
        tracing::debug!(volume = %head.volume, segment = %log.id, blocks, bad, "log segment closed");
        head.seal_in_background(log, blocks);
    }

    /// Opens the next log segment. Tells whether to go on sending.
    async fn open_next(&mut self) -> bool {
        let head = self.head.clone();
        let class = {
            let state = head.state.borrow();
            let pending = state.pending.iter().take(64).map(|op| op.class).max();
            // What has an LSN must be written, so it may use every reserve but the checkpoint's.
            if state.queue.is_empty() { pending } else { Some(SlotClass::Trim) }
        };
        let Some(class) = class else { return false };
        match head.open_log_segment(class).await {
            Ok(log) => {
                tracing::debug!(volume = %head.volume, segment = %log.id, "log segment opened");
                self.class = class;
                let mut state = head.state.borrow_mut();
                state.table.segments.insert(log.id, table_entry(&log));
                let write_set = log.shards.iter().map(|shard| shard.disk).collect();
                state.open_sets.insert(log.id, write_set);
                state.log = Some(Rc::new(log));
                state.stalled_since = None;
                true
            }
            Err(OpenError::Fenced) => {
                head.stop("fenced while opening a log segment");
                false
            }
            Err(OpenError::NoSpace) => {
                head.checkpoint_wanted.notify_one();
                self.refuse_clients();
                let waits = {
                    let state = head.state.borrow();
                    !(state.queue.is_empty() && state.pending.is_empty())
                };
                if waits {
                    self.note_stall(&TargetError::NoSpace);
                    tokio::time::sleep(TICK).await;
                }
                false
            }
            Err(error @ OpenError::TooFewDomains { .. }) => {
                self.wait_for_disks(&error.to_string()).await;
                false
            }
        }
    }

    /// Fails what waits of clients for want of space.
    fn refuse_clients(&self) {
        let failed = self.head.state.borrow_mut().fail_pending(SlotClass::Client);
        for op in failed {
            op.finish(Err(TargetError::NoSpace));
        }
        self.head.applied.notify_waiters();
    }

    /// Notes that no segment can be opened. What has waited for one too long is answered.
    fn note_stall(&self, error: &TargetError) {
        let head = &self.head;
        let since = *head.state.borrow_mut().stalled_since.get_or_insert_with(Instant::now);
        if since.elapsed() < head.config.io_timeout {
            return;
        }
        let failed = head.state.borrow_mut().fail_pending(SlotClass::Checkpoint);
        for op in failed {
            op.finish(Err(error.clone()));
        }
        head.state.borrow_mut().answer_queued(error);
        head.applied.notify_waiters();
    }

    async fn wait_for_disks(&self, why: &str) {
        let head = &self.head;
        head.note_starved();
        self.note_stall(&TargetError::Io(why.to_owned()));
        // Whichever comes first; both only mean to try again.
        let changed = head.disks.changed.notified();
        drop(tokio::time::timeout(TICK * 2, changed).await);
    }

    /// Goes on in a new segment after a member failed or lags.
    async fn fail_over(&mut self) {
        let head = self.head.clone();
        add(&head.stats.failovers, 1);
        let bad = self.failed;
        self.close(bad);
        {
            let mut state = head.state.borrow_mut();
            let flights = std::mem::take(&mut state.flights);
            for flight in flights.into_iter().rev() {
                state.queue.push_front(flight);
            }
        }
        if self.last_failover.is_some_and(|at| at.elapsed() < BACKOFF_MAX) {
            self.backoff = (self.backoff * 2).clamp(Duration::from_millis(10), BACKOFF_MAX);
            tokio::time::sleep(self.backoff).await;
        }
        self.last_failover = Some(Instant::now());
    }
}

impl super::head::State {
    /// Ends an operation that was taken out of the queue and is in no record.
    fn fail(&mut self, op: Op, why: &str) {
        self.unpin(&op.entries);
        self.pending_bytes -= op.bytes();
        op.finish(Err(TargetError::Io(why.into())));
    }

    /// Takes out the waiting operations of at most this class, to be failed.
    fn fail_pending(&mut self, class: SlotClass) -> Vec<Op> {
        let pending = std::mem::take(&mut self.pending);
        let (failed, kept): (Vec<Op>, Vec<Op>) =
            pending.into_iter().partition(|op| op.class <= class);
        self.pending = kept.into();
        self.pending_bytes -= failed.iter().map(Op::bytes).sum::<usize>();
        for op in &failed {
            self.unpin(&op.entries);
            self.forget_chained(&op.entries);
        }
        failed
    }

    /// What these entries were to write never will be: chains of their blocks begin anew.
    fn forget_chained(&mut self, entries: &[Entry]) {
        for entry in entries {
            let (lba, blocks) = match *entry {
                Entry::Write { lba, blocks } | Entry::Place { lba, blocks, .. } => {
                    (lba, u64::from(blocks))
                }
                Entry::Zero { lba, blocks, .. } => (lba, blocks),
                _ => continue,
            };
            for (_, chain) in self.chains.range_mut(lba..lba + blocks) {
                chain.content = None;
            }
        }
    }

    /// Answers the operations of records that have an LSN and wait to be written elsewhere. They
    /// are written all the same once that can be, so their outcome is in doubt until then.
    fn answer_queued(&mut self, error: &TargetError) {
        for op in self.queue.iter_mut().flat_map(|flight| &mut flight.ops) {
            if let Some(done) = op.done.take() {
                // Whoever asked may have gone.
                drop(done.send(Err(error.clone())));
            }
        }
    }

    /// Releases the pins of segments that entries refer to, once they are applied or given up.
    pub(super) fn unpin(&mut self, entries: &[Entry]) {
        for entry in entries {
            let (Entry::Place { addr, .. } | Entry::Move { to: addr, .. }) = entry else {
                continue;
            };
            if let Some(segment) = self.table.segments.get_mut(&addr.segment) {
                segment.pins = segment.pins.saturating_sub(1);
            }
        }
    }
}

impl Head {
    /// Opens a log segment on disks of the log set: `m + 1` of them, or as many domains as there
    /// are where the width shrank, but no fewer than clients may be served with.
    pub(super) async fn open_log_segment(
        &self,
        class: SlotClass,
    ) -> Result<OpenSegment, OpenError> {
        self.open_in_set(SegmentKind::Log, class, self.pool.min_size).await
    }

    /// Opens a log or meta segment that satisfies all pairs in use, and the planned set if it can.
    pub(super) async fn open_in_set(
        &self,
        kind: SegmentKind,
        class: SlotClass,
        least: u8,
    ) -> Result<OpenSegment, OpenError> {
        loop {
            let opened = self.open_in_pairs(kind, class, least).await;
            let too_few = matches!(opened, Err(OpenError::TooFewDomains { .. }));
            if !(too_few && self.state.borrow_mut().planned.take().is_some()) {
                return opened;
            }
        }
    }

    async fn open_in_pairs(
        &self,
        kind: SegmentKind,
        class: SlotClass,
        least: u8,
    ) -> Result<OpenSegment, OpenError> {
        let pairs: Vec<LogSet> = {
            let state = self.state.borrow();
            state.pairs().into_iter().chain(&state.planned).cloned().collect()
        };
        let width = pairs.iter().map(LogSet::width).max().unwrap_or(1).max(least);
        let contains = |set: &LogSet, disk| set.domain_of(disk).is_some();
        let request = OpenRequest {
            authority: self.authority,
            kind,
            scheme: self.pool.log_scheme(),
            class,
            allowed: &|disk| pairs.iter().any(|set| contains(set, disk)),
            first: &|disk| {
                let alone = pairs.len() == 1 || self.disks.is_healthy(disk);
                alone && pairs.iter().all(|set| contains(set, disk))
            },
            least: width.into(),
        };
        let segment = self.open_segment(request).await?;
        let write_set = segment.shards.iter().map(|s| s.disk).collect();
        // What binds may have changed meanwhile.
        let state = self.state.borrow();
        let mut binding = state.pairs();
        binding.extend(&state.planned);
        if !rules::write_set_ok_in_all(&binding, &write_set) {
            let unused = segment.shards.iter();
            let unused: Vec<_> = unused
                .map(|s| (segment.id, ShardRef { disk: s.disk, creation: segment.creation }))
                .collect();
            let this = self.this.clone();
            tokio::task::spawn_local(async move {
                if let Some(head) = this.upgrade() {
                    head.discard(unused);
                }
            });
            return Err(OpenError::TooFewDomains {
                have: rules::domains_touched(&state.root.set, &write_set),
                need: width.into(),
            });
        }
        Ok(segment)
    }

    /// Opens a segment with the next number, listing what failed attempts left as freed.
    pub(super) async fn open_segment(
        &self,
        request: OpenRequest<'_>,
    ) -> Result<OpenSegment, OpenError> {
        if self.state.borrow().next_segment + 64 >= self.state.borrow().root.range.1 {
            // The next swap of the root grants more; nothing is opened until then.
            self.swaps.wanted.notify_one();
            return Err(OpenError::TooFewDomains { have: 0, need: request.scheme.width() });
        }
        let next = || self.state.borrow_mut().take_segment_id().expect("64 numbers are left");
        let mut orphans = Vec::new();
        let orphan = |segment, disk, creation| orphans.push((segment, ShardRef { disk, creation }));
        let opened = OpenSegment::create(&self.env, &self.disks, request, next, orphan).await;
        self.discard(orphans);
        opened
    }

    /// Deletes shards that nothing durable names and waits for it, a moment at most. Those that their
    /// disks do not confirm are listed as freed.
    pub(super) async fn discard_now(&self, shards: Vec<(SegmentId, ShardRef)>) {
        let mut left: BTreeSet<(SegmentId, ShardRef)> = shards.iter().copied().collect();
        delete_shards(&self.disks, self.authority, shards, |gone| {
            left.remove(&gone);
        })
        .await;
        self.state.borrow_mut().table.freed.extend(left);
        self.disks.refresh().await;
    }

    /// Deletes shards that this head created and that nothing durable ever named: no checkpoint
    /// is needed for it. They are listed as freed until the disk confirms.
    pub(super) fn discard(&self, shards: Vec<(SegmentId, ShardRef)>) {
        // A nil disk stands for a shard that was never created.
        let shards: Vec<_> = shards.into_iter().filter(|(_, s)| !s.disk.is_nil()).collect();
        if shards.is_empty() {
            return;
        }
        self.state.borrow_mut().table.freed.extend(&shards);
        let (disks, authority, this) = (self.disks.clone(), self.authority, self.this.clone());
        tokio::task::spawn_local(async move {
            let confirmed = |shard| {
                if let Some(head) = this.upgrade() {
                    head.state.borrow_mut().table.freed.remove(&shard);
                }
            };
            delete_shards(&disks, authority, shards, confirmed).await;
        });
    }

    /// Seals a closed segment and notes the members that could not be.
    pub(super) fn seal_in_background(self: &Rc<Self>, segment: Rc<OpenSegment>, blocks: u32) {
        let head = Rc::downgrade(self);
        tokio::task::spawn_local(async move {
            let bad = segment.seal(blocks).await;
            let Some(head) = head.upgrade() else { return };
            let mut state = head.state.borrow_mut();
            if let Some(entry) = state.table.segments.get_mut(&segment.id)
                && (entry.missing | bad) != 0
            {
                entry.missing |= bad;
                head.repair_wanted.notify_one();
            }
        });
    }

    /// Hands an operation to the log. Its future resolves when the record is durable.
    pub(super) fn enqueue(&self, op: Op) {
        let mut state = self.state.borrow_mut();
        if state.stopped.is_some() || state.draining || state.releasing {
            drop(state);
            op.finish(Err(TargetError::Stopped));
            return;
        }
        state.pending_bytes += op.bytes();
        state.pending.push_back(op);
        drop(state);
        self.wake.notify_one();
    }
}
