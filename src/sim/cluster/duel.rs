//! Clients of a volume while its head is replaced and does not know.
//!
//! Some read a few hot blocks through the old head's node, as fast as they can; another one writes these
//! blocks through the new head's node from the moment at which that serves. Whether what was read is stale
//! the oracle judges, as always. One hot block reads as zeroes at the old head, so that no disk is asked and
//! nothing but the lease stands between its clients and old content; the other one lies on disks.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::sleep;

use super::clients::{Kind, Session};
use super::context::{Context, Tested};
use super::host::Host;
use crate::id::{BLOCK_BYTES, Epoch};
use crate::sim::oracle::SECTORS_PER_BLOCK;

/// How long a request may take: longer ones say nothing here.
const PATIENCE: Duration = Duration::from_secs(2);
/// Pause between two looks whether the new head serves.
const LOOK: Duration = Duration::from_millis(3);

/// The clients of a volume from when its head `epoch` on `old` is to be replaced by one on `next`.
pub(super) struct Duel {
    pub(super) context: Rc<Context>,
    pub(super) volume: Rc<Tested>,
    pub(super) old: Rc<Host>,
    pub(super) next: Rc<Host>,
    pub(super) epoch: Epoch,
    /// Blocks: one that reads as zeroes, one with content, and one that is only written.
    blocks: [u64; 3],
}

impl Duel {
    pub(super) fn new(
        context: Rc<Context>,
        volume: Rc<Tested>,
        (old, next): (Rc<Host>, Rc<Host>),
        epoch: Epoch,
    ) -> Self {
        let all = volume.bytes / BLOCK_BYTES;
        // Half of the other clients' traffic goes to the first eighth.
        let first = all / 4 + context.env.random_below(all / 2);
        Self { context, volume, old, next, epoch, blocks: [first, first + 1, first + 2] }
    }

    async fn write(&self, session: &Session, block: u64, kind: Kind) -> bool {
        let range = (block * SECTORS_PER_BLOCK as u64, SECTORS_PER_BLOCK as u64);
        let answer = session.write(&self.context, &self.volume, range, kind, PATIENCE).await;
        matches!(answer, Some(Ok(())))
    }

    /// Brings the hot blocks into the state that the old head is to read.
    pub(super) async fn prepare(&self) {
        let opened = Session::open(&self.context, &self.volume, self.old.clone(), PATIENCE).await;
        let Some(session) = opened else { return };
        let zeroes = [Kind::Zero, Kind::Trim][self.context.pick(2)];
        let done = self.write(&session, self.blocks[0], zeroes).await
            && self.write(&session, self.blocks[1], Kind::Write).await;
        self.context.note(&format!("hot blocks {:?}: {done}", self.blocks));
    }

    /// All clients, for ever: to be dropped. With `feeds`, the old head has writes under way all the time.
    pub(super) async fn run(&self, feeds: bool) {
        let [zeroes, content, cold] = self.blocks;
        let feed = async {
            if feeds {
                self.feed(cold).await;
            }
        };
        tokio::join!(self.read(zeroes), self.read(content), self.rival(), feed);
    }

    /// Reads a block through the old head's node.
    async fn read(&self, block: u64) {
        let env = &self.context.env;
        loop {
            if let Some(session) = self.open(&self.old).await {
                while session.lasts() {
                    let sector = block * SECTORS_PER_BLOCK as u64 + env.random_below(8);
                    let read = session.read(&self.context, &self.volume, (sector, 1), PATIENCE);
                    drop(read.await);
                    sleep(Duration::from_millis(1 + env.random_below(10))).await;
                }
            }
            sleep(LOOK).await;
        }
    }

    /// Writes through the old head's node.
    async fn feed(&self, block: u64) {
        let pause = 1 + self.context.env.random_below(300);
        loop {
            if let Some(session) = self.open(&self.old).await {
                while session.lasts() {
                    self.write(&session, block, Kind::Write).await;
                    sleep(Duration::from_millis(1 + self.context.env.random_below(pause))).await;
                }
            }
            sleep(LOOK).await;
        }
    }

    async fn open(&self, host: &Rc<Host>) -> Option<Session> {
        Session::open(&self.context, &self.volume, host.clone(), PATIENCE).await
    }

    fn serves(&self, host: &Host, fits: impl Fn(Epoch) -> bool) -> bool {
        let served = host.node().map(|node| node.served()).unwrap_or_default();
        served.iter().any(|(id, head)| *id == self.volume.id && fits(head.authority.epoch))
    }

    /// Returns once the new head serves.
    pub(super) async fn replaced(&self) {
        while !self.serves(&self.next, |epoch| epoch > self.epoch) {
            sleep(LOOK).await;
        }
    }

    /// Writes the hot blocks through the new head's node once that serves.
    async fn rival(&self) {
        self.replaced().await;
        let mut told = false;
        loop {
            if let Some(session) = self.open(&self.next).await {
                while session.lasts() {
                    for block in &self.blocks[..2] {
                        let written = self.write(&session, *block, Kind::Write).await;
                        let both = self.serves(&self.old, |epoch| epoch == self.epoch);
                        if written && both && !told {
                            told = true;
                            self.context
                                .cover_noted("a head writes that the one before knows nothing of");
                        }
                    }
                    sleep(Duration::from_millis(5 + self.context.env.random_below(40))).await;
                }
            }
            sleep(LOOK).await;
        }
    }
}
