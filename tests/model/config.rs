//! What a run of the model may do, and the rules as tables.
//!
//! The tables are filled by asking `sds::volume::rules` for every mask of disks: the model has no
//! rules of its own but those that a planted [`Bug`] breaks.

use std::collections::BTreeSet;

use sds::id::DiskId;
use sds::volume::rules::{self, LogSet, Member};

use crate::state::{DISKS, Mask, Used};

const MASKS: usize = 1 << DISKS;

/// A deviation from the protocol that the checker must find.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    SkipFence,
    CountPartDomains,
    CountUnread,
    ForgetFence,
    BelieveFailedSwap,
    BelieveOldRead,
    IgnoreWantedSet,
    UncheckedSwap,
    ChangeSetBeforeFence,
    ReplayOtherEpoch,
    ExtendStaleShard,
    AcknowledgeEarly,
    ServeBeforeLease,
    LeaseFromReceipt,
    ReleaseEarly,
    StaysReleased,
    ServeBeforeForce,
    UseSetBeforeForce,
    FreeInDoubt,
    FreeBeforeForce,
    FormerSetForgotten,
    OneFormerMirror,
    RecoverReadsFirst,
    RecoverPartly,
    RecoverReleased,
}

/// A configuration: log sets, budgets, switches.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "independent switches")]
pub struct Config {
    pub domains: [u32; DISKS],
    /// Log sets as (disks, width); the first is the initial one.
    pub sets: Vec<(Mask, u8)>,
    /// Upper bounds of everything that can be used up.
    pub budget: Used,
    /// Length of a read lease in ticks; 0 leaves out leases, and only the newest head reads.
    pub lease: u8,
    /// Whether old segments are freed.
    pub frees: bool,
    /// Whether serving heads write checkpoints.
    pub checkpoints: bool,
    /// Whether a new head may change the set in step 4.
    pub settle_changes_set: bool,
    /// Whether replies of the store get lost, so that swaps stay in doubt.
    pub doubt: bool,
    /// Whether an operator gives his word for disks that are gone.
    pub operator: bool,
    /// Whether a disk that went down may come back.
    pub returns: bool,
    pub bug: Option<Bug>,
}

/// One log set with the answers of the rules for each mask of disks.
pub struct SetTable {
    pub set: LogSet,
    pub disks: Mask,
    pub fenced_enough: [bool; MASKS],
    /// By fenced disks, then by those that were read.
    pub heard_enough: [[bool; MASKS]; MASKS],
    pub write_set_ok: [bool; MASKS],
    pub lease_ok: [bool; MASKS],
    /// By mask of former sets, then of mirrors.
    pub in_force: Vec<[bool; MASKS]>,
    /// By mask of former sets: what the next root carries, if this one is not known to be in
    /// force, and if it is.
    pub next_former: Vec<[u8; 2]>,
    /// By the set that a swap in doubt wants (0: none, else its index + 1), then by mask of former
    /// sets: the pairs in use, if the root is not known to be in force, and if it is.
    pub pairs: Vec<Vec<[u8; 2]>>,
}

/// A configuration with its tables.
pub struct Rules {
    pub config: Config,
    pub sets: Vec<SetTable>,
    /// Disks of equal class cannot be told apart.
    pub classes: [u8; DISKS],
}

pub fn disk_ids(mask: Mask) -> BTreeSet<DiskId> {
    (0..DISKS).filter(|disk| mask >> disk & 1 == 1).map(disk_id).collect()
}

fn disk_id(disk: usize) -> DiskId {
    DiskId::from_bytes([u8::try_from(disk).expect("four disks"); 16])
}

fn table(predicate: impl Fn(&BTreeSet<DiskId>) -> bool) -> [bool; MASKS] {
    std::array::from_fn(|mask| predicate(&disk_ids(Mask::try_from(mask).expect("four disks"))))
}

impl Rules {
    pub fn new(config: Config) -> Self {
        let sets: Vec<LogSet> = config
            .sets
            .iter()
            .map(|&(mask, width)| {
                let members = (0..DISKS)
                    .filter(|disk| mask >> disk & 1 == 1)
                    .map(|disk| Member { disk: disk_id(disk), domain: config.domains[disk] })
                    .collect();
                LogSet::new(members, width).expect("a valid log set")
            })
            .collect();
        let tables = sets
            .iter()
            .zip(&config.sets)
            .map(|(set, &(disks, _))| SetTable {
                disks,
                fenced_enough: table(|mask| rules::fenced_enough(set, mask)),
                heard_enough: std::array::from_fn(|fenced| {
                    let fenced = disk_ids(Mask::try_from(fenced).expect("four disks"));
                    table(|read| rules::heard_enough(set, &fenced, read))
                }),
                write_set_ok: table(|mask| rules::write_set_ok(set, mask)),
                lease_ok: table(|mask| rules::lease_ok(set, mask)),
                in_force: (0..1_usize << sets.len())
                    .map(|former| {
                        let former = pick(&sets, former);
                        table(|mask| rules::in_force(set, &former, mask))
                    })
                    .collect(),
                next_former: by_former(&sets, |former, known| {
                    mask_of(&sets, &rules::former_sets(set, former, known))
                }),
                pairs: std::iter::once(None)
                    .chain(sets.iter().map(Some))
                    .map(|wanted| {
                        by_former(&sets, |former, known| {
                            mask_of(&sets, rules::pairs_in_use(set, former, known, wanted))
                        })
                    })
                    .collect(),
                set: set.clone(),
            })
            .collect();
        let classes = classes(&config);
        Self { config, sets: tables, classes }
    }

    pub fn has(&self, bug: Bug) -> bool {
        self.config.bug == Some(bug)
    }

    pub fn set(&self, index: u8) -> &SetTable {
        &self.sets[usize::from(index)]
    }

    /// The sets of this mask.
    pub fn sets_of(&self, mask: u8) -> Vec<LogSet> {
        let all: Vec<LogSet> = self.sets.iter().map(|table| table.set.clone()).collect();
        pick(&all, usize::from(mask))
    }

    /// All disks of the sets of this mask.
    pub fn disks_of(&self, sets: u8) -> Mask {
        self.sets
            .iter()
            .enumerate()
            .filter(|(index, _)| sets >> index & 1 == 1)
            .fold(0, |disks, (_, table)| disks | table.disks)
    }
}

fn by_former(sets: &[LogSet], answer: impl Fn(&[LogSet], bool) -> u8) -> Vec<[u8; 2]> {
    let of = |former| [false, true].map(|known| answer(&pick(sets, former), known));
    (0..1 << sets.len()).map(of).collect()
}

/// The mask of `chosen` among `sets`.
fn mask_of<'a>(sets: &[LogSet], chosen: impl IntoIterator<Item = &'a LogSet>) -> u8 {
    chosen.into_iter().fold(0, |mask, set| {
        let index = sets.iter().position(|other| other == set);
        mask | 1 << index.expect("a set of the configuration")
    })
}

fn pick(sets: &[LogSet], mask: usize) -> Vec<LogSet> {
    let chosen = sets.iter().enumerate().filter(|(index, _)| mask >> index & 1 == 1);
    chosen.map(|(_, set)| set.clone()).collect()
}

/// Classes in ascending order of the disks. Two disks share one if they are neighbours, belong to
/// the same sets, and are alone in their domain or in the same domain.
fn classes(config: &Config) -> [u8; DISKS] {
    let kind = |disk: usize| {
        let domain = config.domains[disk];
        let shared = config.domains.iter().filter(|other| **other == domain).count() > 1;
        let sets: Vec<bool> = config.sets.iter().map(|(mask, _)| mask >> disk & 1 == 1).collect();
        (sets, shared.then_some(domain))
    };
    let mut classes = [0; DISKS];
    for disk in 1..DISKS {
        classes[disk] = classes[disk - 1] + u8::from(kind(disk) != kind(disk - 1));
    }
    classes
}
