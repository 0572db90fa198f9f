//! Clients of the simulated cluster: each attached to a volume through the export of some node, one
//! request at a time, several to a volume.
//!
//! A client whose node dies, stops, or does not answer for long goes to another one, as qemu does
//! that reconnects. A write without an answer is in doubt until a head serves that is newer than all
//! there were when it was given up ([`super::context::Tested`]).

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::context::{Context, Tested};
use super::host::Host;
use crate::env::Env;
use crate::export::{BlockTarget, ExportDirectory, TargetError};
use crate::node::Exports;
use crate::sim::oracle::{Outcome, SECTOR, Write};

/// Pause of a client that is to rest.
const RESTS: Duration = Duration::from_millis(20);

/// A connection of a client to an export.
pub(super) struct Session {
    host: Rc<Host>,
    /// Which process of the host.
    process: u64,
    target: Rc<dyn BlockTarget>,
    /// Tells requests under way that the client is gone; none where they go on all the same.
    gone: Option<watch::Sender<()>>,
}

impl Session {
    /// Attaches to a volume at a host; none if that does not answer, or does not export it.
    pub(super) async fn open(
        context: &Context,
        volume: &Tested,
        host: Rc<Host>,
        patience: Duration,
    ) -> Option<Self> {
        let (process, name) = (host.starts(), volume.name.clone());
        let opened = host.run(move |node| async move { Exports(node).open(&name).await });
        let target = timeout(patience, opened).await.ok()???;
        let gone = context.env.chance(1, 2).then(|| watch::channel(()).0);
        Some(Self { host, process, target, gone })
    }

    /// Whether the process that it was made to is there still, and wants clients.
    pub(super) fn lasts(&self) -> bool {
        self.host.is_running() && self.host.starts() == self.process && !self.host.is_closing()
    }

    /// Writes, or zeroes, sectors. None: no answer within this time.
    pub(super) async fn write(
        &self,
        context: &Rc<Context>,
        volume: &Rc<Tested>,
        (first, count): (u64, u64),
        kind: Kind,
        patience: Duration,
    ) -> Option<Result<(), TargetError>> {
        let write = volume.oracle.borrow_mut().begin(first, count, kind != Kind::Write);
        let data = Bytes::from(if kind == Kind::Write { write.content() } else { Vec::new() });
        let pending =
            Pending { context: context.clone(), volume: volume.clone(), write: Some(write) };
        let (target, gone) =
            (self.target.clone(), self.gone.as_ref().map(watch::Sender::subscribe));
        let (offset, len) = (first * SECTOR as u64, count * SECTOR as u64);
        let answer = self.host.run(move |_| async move {
            let request = async {
                match kind {
                    Kind::Write => target.write(offset, data).await,
                    Kind::Zero => target.zero(offset, len, false).await,
                    Kind::Trim => target.zero(offset, len, true).await,
                }
            };
            let result = tokio::select! {
                biased;
                () = left(gone) => return None,
                result = request => result,
            };
            if result.is_ok() {
                pending.acknowledged();
            }
            Some(result)
        });
        timeout(patience, answer).await.ok().flatten().flatten()
    }

    /// Reads sectors and has them judged. None: no answer within this time.
    pub(super) async fn read(
        &self,
        context: &Rc<Context>,
        volume: &Rc<Tested>,
        (first, count): (u64, u64),
        patience: Duration,
    ) -> Option<Result<(), TargetError>> {
        let start = volume.oracle.borrow_mut().begin_read();
        let len = usize::try_from(count).expect("a small volume") * SECTOR;
        let (target, gone) =
            (self.target.clone(), self.gone.as_ref().map(watch::Sender::subscribe));
        let (context, volume) = (context.clone(), volume.clone());
        let host = self.host.name.clone();
        let answer = self.host.run(move |_| async move {
            let read = tokio::select! {
                biased;
                () = left(gone) => return None,
                read = target.read(first * SECTOR as u64, len) => read,
            };
            Some(read.map(|pieces| {
                let data = pieces.concat();
                context.digest_data(&data);
                if data.len() != len {
                    context.fail(format!("a read of {len} bytes gave {}", data.len()));
                }
                let judged = volume.oracle.borrow_mut().end_read(start, first, &data);
                if let Err(why) = judged {
                    context.fail(format!("volume {} through {host}: {why}", volume.name));
                }
            }))
        });
        timeout(patience, answer).await.ok().flatten().flatten()
    }
}

/// Returns when the client has left; never where that is not noticed.
async fn left(gone: Option<watch::Receiver<()>>) {
    match gone {
        // An error is what it waits for.
        Some(mut gone) => drop(gone.changed().await),
        None => std::future::pending().await,
    }
}

/// What a write writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Write,
    Zero,
    Trim,
}

/// A write until its outcome is known: dropped, it is in doubt.
struct Pending {
    context: Rc<Context>,
    volume: Rc<Tested>,
    write: Option<Write>,
}

impl Pending {
    fn acknowledged(mut self) {
        if let Some(write) = self.write.take() {
            self.volume.oracle.borrow_mut().end(write, Outcome::Acknowledged);
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(write) = self.write.take() {
            self.context.doubt(&self.volume, write);
        }
    }
}

/// A range of sectors: mostly whole blocks, sometimes parts, sometimes large.
fn range(env: &Env, sectors: u64) -> (u64, u64) {
    if env.chance(1, 6) {
        // Parts of few blocks, so that they overlap in flight.
        let at = env.random_below(16).min(sectors - 1);
        return (at, (1 + env.random_below(12)).min(sectors - at));
    }
    let count = match env.random_below(10) {
        0 => 1 + env.random_below(7),
        1 => 1 + env.random_below(40),
        2 => 8 * (1 + env.random_below(40)),
        3 => 8 * (1 + env.random_below(100)),
        _ => 8 * (1 + env.random_below(4)),
    }
    .min(sectors);
    // Half of the traffic goes to an eighth of the volume.
    let span = if env.chance(1, 2) { sectors / 8 } else { sectors };
    let at = env.random_below(span.max(1)).min(sectors - count);
    (if env.chance(1, 6) { at } else { at / 8 * 8 }, count)
}

/// A client, until the run has no use for it any more.
pub(super) async fn run(context: Rc<Context>, volume: Rc<Tested>, number: usize) {
    let mut session = None;
    while !context.stop.get() {
        if volume.rests() {
            sleep(RESTS).await;
            continue;
        }
        if session.as_ref().is_none_or(|session: &Session| !session.lasts())
            || context.env.chance(1, 40)
        {
            drop(session.take());
            session = connect(&context, &volume).await;
        }
        let Some(present) = &session else { continue };
        if !step(&context, &volume, present, number).await {
            context.cover_noted("a client goes to another node");
            session = None;
        }
        sleep(Duration::from_millis(context.env.random_below(60))).await;
    }
}

async fn connect(context: &Rc<Context>, volume: &Rc<Tested>) -> Option<Session> {
    let members = context.members();
    let host = context.host(members[context.pick(members.len())]);
    let patience = Duration::from_millis(200 + context.env.random_below(6000));
    let opened = if host.is_running() && !host.is_closing() {
        Session::open(context, volume, host, patience).await
    } else {
        None
    };
    if opened.is_none() {
        sleep(Duration::from_millis(20 + context.env.random_below(200))).await;
    }
    opened
}

/// One request; whether it had an answer.
async fn step(
    context: &Rc<Context>,
    volume: &Rc<Tested>,
    session: &Session,
    number: usize,
) -> bool {
    let range = range(&context.env, volume.sectors());
    let patience = Duration::from_millis(1000 + context.env.random_below(15_000));
    let (what, answer) = match context.env.random_below(10) {
        kind @ 0..=5 => {
            let kind = [Kind::Write, Kind::Zero, Kind::Trim]
                [usize::try_from(kind).map_or(0, |k| k.saturating_sub(3))];
            ("write", session.write(context, volume, range, kind, patience).await)
        }
        _ => ("read", session.read(context, volume, range, patience).await),
    };
    let (first, count) = range;
    context.note(&format!(
        "{} client {number} at {}: {what} {first}+{count}: {answer:?}",
        volume.name, session.host.name
    ));
    match &answer {
        Some(Ok(())) => context.cover(what),
        Some(Err(error @ (TargetError::OutOfRange | TargetError::ReadOnly))) => {
            context.fail(format!("a {what} was refused: {error}"));
        }
        Some(Err(TargetError::NoSpace)) => context.cover(&format!("{what} failed: no space")),
        Some(Err(_)) => context.cover(&format!("{what} failed")),
        None => context.cover(&format!("{what} without an answer")),
    }
    answer.is_some()
}
