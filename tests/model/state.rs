//! What the model remembers: disks, store, heads, and the history that clients have seen.
//!
//! All of it is small, `Copy` and free of absolute time, so that equal situations are equal
//! states. Sets of disks and of segments are bit masks; [`State::canonical`] orders disks that the
//! configuration cannot tell apart, which merges up to 24 states into one.

use crate::history::History;

/// Disks there are.
pub const DISKS: usize = 4;
/// Log segments there are, for all heads together.
pub const SEGMENTS: usize = 3;
/// Records that fit a shard.
pub const RECORDS: usize = 3;
/// Heads there are; each may crash and take over again under a new id.
pub const HEADS: usize = 2;
/// Epochs of an incarnation of the store.
pub const EPOCHS: u8 = 4;

/// A set of disks, by bit.
pub type Mask = u8;

/// A record of the log with one write in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Record {
    pub epoch: u8,
    pub lsn: u8,
    pub value: u8,
    /// The highest acknowledged LSN when it was formed.
    pub acknowledged: u8,
    /// In the first record of a segment: the segment closed before it, and its final length.
    pub closes: Option<(u8, u8)>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum ShardState {
    #[default]
    Absent,
    Open,
    /// Fenced, restarted or sealed.
    Closed,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Shard {
    pub state: ShardState,
    pub epoch: u8,
    pub length: u8,
    pub records: [Record; RECORDS],
}

impl Shard {
    /// The durable records.
    pub fn records(&self) -> &[Record] {
        &self.records[..usize::from(self.length)]
    }

    pub fn push(&mut self, record: Record) {
        self.records[usize::from(self.length)] = record;
        self.length += 1;
    }

    /// Closes the shard and cuts it to `length` if it is longer.
    pub fn seal(&mut self, length: u8) {
        self.state = ShardState::Closed;
        self.length = self.length.min(length);
        self.records[usize::from(self.length)..].fill(Record::default());
    }
}

/// Epoch, id of the head, sequence: tells every root from every other.
pub type Token = (u8, u8, u8);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Checkpoint {
    pub epoch: u8,
    pub lsn: u8,
    /// The content of the block as of `lsn`.
    pub value: u8,
}

/// The root of the volume. Ordered by epoch, then sequence, as mirrors are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Root {
    pub epoch: u8,
    pub sequence: u8,
    pub head: u8,
    pub released: bool,
    /// Index of the log set in the configuration.
    pub set: u8,
    /// The former sets that are carried along, by bit.
    pub former: u8,
    pub checkpoint: Checkpoint,
}

impl Root {
    pub fn token(&self) -> Token {
        (self.epoch, self.head, self.sequence)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Disk {
    pub down: bool,
    /// Lowest epoch accepted, and its head.
    pub fence: (u8, u8),
    pub mirror: Root,
    pub shards: [Shard; SEGMENTS],
}

impl Disk {
    /// Whether a request of this epoch and head passes the fence.
    pub fn admits(&self, epoch: u8, head: u8) -> bool {
        !self.down && (self.fence.0 < epoch || self.fence == (epoch, head))
    }

    /// Raises the fence; open shards of older epochs close.
    pub fn raise(&mut self, epoch: u8, head: u8) {
        self.fence = (epoch, head);
        for shard in &mut self.shards {
            if shard.state == ShardState::Open && shard.epoch < epoch {
                shard.state = ShardState::Closed;
            }
        }
    }
}

/// How far a head is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub enum Phase {
    /// Not running.
    #[default]
    Idle,
    /// Step 1: the swap to a new epoch is under way or in doubt.
    Claiming,
    /// Step 2.
    Fencing,
    /// Step 4: the log is walked; the swap of the new checkpoint is under way or in doubt.
    Settling,
    /// Step 5: waits for the mirrors and for the old head's lease.
    Waiting,
    Serving,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Flight {
    pub record: Record,
    /// The members that answered "durable".
    pub done: Mask,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Probe {
    /// What a lease counted from sending would still be worth.
    pub left: u8,
    /// Who answered "not fenced".
    pub answered: Mask,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Head {
    pub phase: Phase,
    pub id: u8,
    /// The newest root it knows to be its own.
    pub root: Root,
    /// A root whose swap has no known outcome.
    pub pending: Option<Root>,
    /// The unsealed segments if that root becomes the newest.
    pub pending_unsealed: u8,
    /// Disks that confirmed the fence of its epoch.
    pub fenced: Mask,
    /// Disks that confirmed the mirror of `root`.
    pub mirrored: Mask,
    /// What is left to wait for the old head's lease, from step 2 on.
    pub wait: Option<u8>,
    /// The volume was released before.
    pub skip_wait: bool,
    /// What is left of its own lease.
    pub lease: u8,
    pub probe: Option<Probe>,
    /// LSN and content that are acknowledged (or settled).
    pub lsn: u8,
    pub value: u8,
    /// The segment being written, and its committed length.
    pub segment: Option<u8>,
    pub position: u8,
    /// What the next segment's first record will say.
    pub closes: Option<(u8, u8)>,
    pub flight: Option<Flight>,
    /// Segments that the checkpoint of `root` does not list as sealed, by bit.
    pub unsealed: u8,
}

/// A store that is being rebuilt.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Recovery {
    pub visited: Mask,
    /// Every disk of every set found.
    pub needed: Mask,
    pub best: Root,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Violation {
    LostWrite,
    StaleRead,
    TwoHeads,
}

/// What was used up of the configuration's budgets.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Used {
    pub writes: u8,
    pub crashes: u8,
    pub downs: u8,
    pub claims: u8,
    pub swaps: u8,
    pub rolls: u8,
    pub releases: u8,
    pub losses: u8,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct State {
    pub disks: [Disk; DISKS],
    /// Disks that an operator gave his word for: gone for good.
    pub dead: Mask,
    /// The store's content; none once it is lost.
    pub root: Option<Root>,
    pub recovery: Recovery,
    /// Swaps on their way to the store, by head: expected token and new root.
    pub swaps: [Option<(Token, Root)>; HEADS],
    pub heads: [Head; HEADS],
    /// The write set of each segment.
    pub write_sets: [Mask; SEGMENTS],
    pub segments: u8,
    pub used: Used,
    pub history: History,
    /// Who acknowledged in each epoch.
    pub acknowledgers: [u8; 2 * EPOCHS as usize],
    /// The newest epoch whose head began to serve.
    pub served: u8,
    pub violation: Option<Violation>,
}

impl State {
    /// All masks of disks but those inside [`Self::disks`].
    fn masks(&mut self) -> impl Iterator<Item = &mut Mask> {
        let heads = self.heads.iter_mut().flat_map(|head| {
            [Some(&mut head.fenced), Some(&mut head.mirrored)]
                .into_iter()
                .chain([
                    head.flight.as_mut().map(|flight| &mut flight.done),
                    head.probe.as_mut().map(|probe| &mut probe.answered),
                ])
                .flatten()
        });
        heads.chain(&mut self.write_sets).chain([
            &mut self.dead,
            &mut self.recovery.visited,
            &mut self.recovery.needed,
        ])
    }

    /// The same state with disks of equal class in a fixed order.
    pub fn canonical(mut self, classes: [u8; DISKS]) -> Self {
        let mut columns: [(u8, u16, Disk, usize); DISKS] =
            std::array::from_fn(|disk| (classes[disk], 0, self.disks[disk], disk));
        for mask in self.masks() {
            for (disk, column) in columns.iter_mut().enumerate() {
                column.1 = column.1 << 1 | u16::from(*mask >> disk & 1);
            }
        }
        // Classes are contiguous and ascending, so sorting moves disks only within them.
        columns.sort_unstable();
        let order = columns.map(|column| column.3);
        if order.is_sorted() {
            return self;
        }
        self.disks = columns.map(|column| column.2);
        for mask in self.masks() {
            let old = *mask;
            *mask =
                order.iter().enumerate().fold(0, |new, (to, &from)| new | (old >> from & 1) << to);
        }
        self
    }
}
