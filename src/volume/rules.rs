//! The rules of roots, fences and leases as predicates over sets of disks (design, section 6).
//!
//! Everything here is a pure function: no I/O, no time, no state. The head asks these predicates
//! before it acts, the model in `tests/model.rs` explores what follows from them, and nobody
//! keeps a copy of his own.
//!
//! A **log set** is the pair (`D`, `w`): the disks that the log segments of a volume may lie on,
//! each with its failure domain, and the least number of domains that each log segment is written
//! to. All safety comes from sets that cannot miss each other:
//!
//! - [`fenced_enough`] meets every write set of [`write_set_ok`] and every quorum of [`lease_ok`]:
//!   a disk that is fenced is a member of each of them. It is tight: with one disk less that
//!   matters, some write set would escape.
//! - [`may_swap_set`] keeps that true over a change of the set, for the segments that are still
//!   open; [`pairs_in_use`] keeps it true for what is created and asked meanwhile.
//! - [`in_force`] makes sure that a root which anything depends on is found again by who searches
//!   the disks, wherever he begins.
//!
//! Disks that are not in `D` never count, whatever is claimed about them.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::id::DiskId;

/// Largest number of disks in a log set: bounds what a root takes in a mirror.
pub const LOG_SET_DISKS_MAX: usize = 64;

/// A disk of a log set. Its domain is fixed until the disk leaves the set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Member {
    /// The disk.
    pub disk: DiskId,
    /// Its failure domain: a number that is the same for all disks that fail together.
    pub domain: u32,
}

/// The log set `D` of a volume with its width `w`.
///
/// Invariants, kept by [`LogSet::new`] and by decoding: `1 <= w <=` number of domains; no disk
/// appears twice; at most [`LOG_SET_DISKS_MAX`] disks; members are sorted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "RawLogSet")]
pub struct LogSet {
    members: Vec<Member>,
    width: u8,
}

/// A log set as decoded, not yet checked.
#[derive(Deserialize)]
struct RawLogSet {
    members: Vec<Member>,
    width: u8,
}

impl TryFrom<RawLogSet> for LogSet {
    type Error = LogSetError;
    fn try_from(raw: RawLogSet) -> Result<Self, LogSetError> {
        Self::new(raw.members, raw.width)
    }
}

/// Why disks and a width make no log set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogSetError {
    /// A log segment would be written nowhere.
    #[error("the width of a log set must be at least 1")]
    NoWidth,
    /// No write set could exist.
    #[error("a log set of width {width} needs as many failure domains and has {domains}")]
    TooFewDomains {
        /// The width asked for.
        width: u8,
        /// Failure domains there are.
        domains: usize,
    },
    /// More than [`LOG_SET_DISKS_MAX`].
    #[error("a log set of {0} disks is larger than {LOG_SET_DISKS_MAX}")]
    TooManyDisks(usize),
    /// A disk is named more than once.
    #[error("disk {0} is in the log set twice")]
    Twice(DiskId),
}

impl LogSet {
    /// The set of these disks (in any order) with this width.
    pub fn new(mut members: Vec<Member>, width: u8) -> Result<Self, LogSetError> {
        if width == 0 {
            return Err(LogSetError::NoWidth);
        }
        if members.len() > LOG_SET_DISKS_MAX {
            return Err(LogSetError::TooManyDisks(members.len()));
        }
        members.sort_unstable();
        if let Some(pair) = members.windows(2).find(|pair| pair[0].disk == pair[1].disk) {
            return Err(LogSetError::Twice(pair[0].disk));
        }
        let set = Self { members, width };
        let domains = domains(&set).len();
        if domains < usize::from(width) {
            return Err(LogSetError::TooFewDomains { width, domains });
        }
        Ok(set)
    }

    /// The disks, sorted.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The least number of domains that a log segment is written to; at least 1.
    pub const fn width(&self) -> u8 {
        self.width
    }

    /// The failure domain of a disk, if the disk belongs to the set.
    pub fn domain_of(&self, disk: DiskId) -> Option<u32> {
        let at = self.members.binary_search_by_key(&disk, |member| member.disk).ok()?;
        Some(self.members[at].domain)
    }

    /// Whether `count` domains are as many as the width.
    fn is_width(&self, count: usize) -> bool {
        count >= usize::from(self.width)
    }
}

/// The failure domains of the set, each with all its disks in `D`.
pub fn domains(set: &LogSet) -> BTreeMap<u32, BTreeSet<DiskId>> {
    let mut domains: BTreeMap<u32, BTreeSet<DiskId>> = BTreeMap::new();
    for member in &set.members {
        domains.entry(member.domain).or_default().insert(member.disk);
    }
    domains
}

/// In how many domains of the set at least one of `disks` lies. Disks outside `D` do not count.
pub fn domains_touched(set: &LogSet, disks: &BTreeSet<DiskId>) -> usize {
    let touched: BTreeSet<u32> = disks.iter().filter_map(|&disk| set.domain_of(disk)).collect();
    touched.len()
}

/// The domains of the set that count as missing after `answered` have answered: those with a disk
/// in `D` that has not. Sorted; for the message that says whom a take-over waits for.
pub fn domains_missing(set: &LogSet, answered: &BTreeSet<DiskId>) -> Vec<u32> {
    domains(set)
        .into_iter()
        .filter(|(_, disks)| !disks.is_subset(answered))
        .map(|(domain, _)| domain)
        .collect()
}

/// Whether enough disks have confirmed a fence: fewer than `w` domains are missing, and a domain
/// counts only when all its disks in `D` have answered.
///
/// Then every write set that [`write_set_ok`] allows and every quorum that [`lease_ok`] accepts
/// contains a disk that answered.
pub fn fenced_enough(set: &LogSet, answered: &BTreeSet<DiskId>) -> bool {
    !set.is_width(domains_missing(set, answered).len())
}

/// Whether the log may be walked to its end: the disks that are fenced AND have since yielded what
/// they hold are enough by themselves.
///
/// A disk that confirmed the fence and was lost before its records were read does not count:
/// together with the missing domains it could be a whole write set.
pub fn heard_enough(set: &LogSet, fenced: &BTreeSet<DiskId>, read: &BTreeSet<DiskId>) -> bool {
    fenced_enough(set, &(fenced & read))
}

/// Whether a log segment may be written to these disks and commit on all of them: at least `w`
/// domains of `D`. Members outside `D` are allowed and do not count.
pub fn write_set_ok(set: &LogSet, write_set: &BTreeSet<DiskId>) -> bool {
    set.is_width(domains_touched(set, write_set))
}

/// Whether probes answered "not fenced" by these disks give a read lease: `w` domains of `D`, one
/// disk each being enough.
pub fn lease_ok(set: &LogSet, answered: &BTreeSet<DiskId>) -> bool {
    set.is_width(domains_touched(set, answered))
}

/// Whether a root with the set `new` may replace one with the set `old`.
///
/// `unsealed_write_sets`: the write sets of all log segments that the checkpoint of the NEW root
/// does not list as sealed, the one being written included. Each must have members in at least
/// `w'` domains of `D'`. A disk in both sets must keep its domain.
///
/// Only a head that knows all of them may ask: the serving head of the epoch, or a new head after
/// [`fenced_enough`], never before.
pub fn may_swap_set(old: &LogSet, new: &LogSet, unsealed_write_sets: &[BTreeSet<DiskId>]) -> bool {
    let domains_kept = new
        .members
        .iter()
        .all(|member| old.domain_of(member.disk).is_none_or(|domain| domain == member.domain));
    domains_kept && unsealed_write_sets.iter().all(|write_set| write_set_ok(new, write_set))
}

/// Whether a root is in force: mirrored on `w` domains of its own `D`, and of each earlier `D`
/// that may still be the newest one that somebody finds on as many domains as the narrower of both
/// widths, so that an operator's word for fewer disks than that never hides it.
///
/// `former`: see [`former_sets`]. `mirrored`: the disks that confirmed the mirror durable. Until a
/// root is in force none of its segment numbers, disks or narrower width is used alone, nothing is
/// freed and no client is served.
pub fn in_force(new: &LogSet, former: &[LogSet], mirrored: &BTreeSet<DiskId>) -> bool {
    new.is_width(domains_touched(new, mirrored))
        && former
            .iter()
            .all(|set| domains_touched(set, mirrored) >= usize::from(set.width.min(new.width)))
}

/// The former sets that the next root must carry: the set of the current root, and unless the
/// maker of the next root knows the current one to be in force, also those it carries itself.
///
/// A head that takes over does not know, so it passes `false`. Sets that appear twice are kept
/// once.
pub fn former_sets(current: &LogSet, former: &[LogSet], known_in_force: bool) -> Vec<LogSet> {
    let mut sets = vec![current.clone()];
    if !known_in_force {
        sets.extend(former.iter().filter(|set| *set != current).cloned());
    }
    sets
}

/// The pairs (`D`, `w`) that new write sets and lease probes of a head must all satisfy.
///
/// `root`: the set of its newest confirmed root, with the `former` sets that this root carries;
/// they bind until it is in force. `wanted`: the set of a swap from its capture until its outcome
/// is known.
pub fn pairs_in_use<'a>(
    root: &'a LogSet,
    former: &'a [LogSet],
    known_in_force: bool,
    wanted: Option<&'a LogSet>,
) -> Vec<&'a LogSet> {
    let mut pairs = vec![root];
    if !known_in_force {
        pairs.extend(former);
    }
    pairs.extend(wanted);
    pairs
}

/// Whether `write_set` satisfies all pairs in use.
pub fn write_set_ok_in_all(pairs: &[&LogSet], write_set: &BTreeSet<DiskId>) -> bool {
    pairs.iter().all(|set| write_set_ok(set, write_set))
}

/// Whether probes answered "not fenced" by `answered` give a lease under all pairs in use.
pub fn lease_ok_in_all(pairs: &[&LogSet], answered: &BTreeSet<DiskId>) -> bool {
    pairs.iter().all(|set| lease_ok(set, answered))
}

/// Failure domains that a log set is filled up to: enough that failures elsewhere do not matter,
/// few enough that a take-over asks a handful of disks.
pub const fn log_domains(parity: u8) -> usize {
    2 * parity as usize + 4
}

/// What remains of `old` when only the disks `kept` are reachable, without a new checkpoint: the
/// others are dropped and the width is lowered as far as it must be. None if that gains nothing,
/// or if no root with such a set could come into force.
///
/// `former`: the former sets that the new root will carry ([`former_sets`]). `unsealed`: as in
/// [`may_swap_set`], or none if they are not known, as in a take-over that has fenced enough but
/// not read yet: then the width falls by one for each domain that loses a disk, which every write
/// set of at least `w` domains of `D` bears.
pub fn shrunk(
    old: &LogSet,
    former: &[LogSet],
    kept: &BTreeSet<DiskId>,
    unsealed: Option<&[BTreeSet<DiskId>]>,
) -> Option<LogSet> {
    let members: Vec<Member> =
        old.members.iter().filter(|member| kept.contains(&member.disk)).copied().collect();
    let disks: BTreeSet<DiskId> = members.iter().map(|member| member.disk).collect();
    let most = match unsealed {
        None => usize::from(old.width).saturating_sub(domains_missing(old, kept).len()),
        Some(sets) => {
            let touched = sets.iter().map(|set| domains_touched(old, &(set & &disks)));
            touched.min().unwrap_or(usize::MAX)
        }
    };
    let most = most.min(domains_touched(old, &disks)).min(usize::from(old.width));
    (1..=most)
        .rev()
        .filter_map(|width| LogSet::new(members.clone(), u8::try_from(width).ok()?).ok())
        .find(|new| in_force(new, former, kept))
        .filter(|new| new != old)
}

/// The set that a checkpoint may put in the place of `old`: without the disks `lost`, filled up to
/// `most` domains from `spare` (healthy disks of the pool in order of preference), as wide as its
/// healthy domains allow up to `wide`, and never narrower than before. None if nothing changes, or
/// if too few healthy domains of `old` remain for a write set under both.
pub fn renewed(
    old: &LogSet,
    lost: &BTreeSet<DiskId>,
    healthy: &BTreeSet<DiskId>,
    spare: &[Member],
    (wide, most): (u8, usize),
) -> Option<LogSet> {
    let mut members: Vec<Member> =
        old.members.iter().filter(|member| !lost.contains(&member.disk)).copied().collect();
    let usable: BTreeSet<DiskId> = healthy - lost;
    if domains_touched(old, &usable) < usize::from(old.width) {
        return None;
    }
    let mut taken: BTreeSet<u32> = members.iter().map(|member| member.domain).collect();
    for member in spare.iter().filter(|member| old.domain_of(member.disk).is_none()) {
        let room = taken.len() < most && members.len() < LOG_SET_DISKS_MAX;
        if room && taken.insert(member.domain) {
            members.push(*member);
        }
    }
    let all = LogSet::new(members.clone(), 1).ok()?;
    let reachable = domains_touched(&all, &usable).min(usize::from(wide));
    let width = u8::try_from(reachable).ok()?.max(old.width);
    LogSet::new(members, width).ok().filter(|new| new != old)
}

/// The set that a checkpoint may put in the place of `old` where [`renewed`] finds too few healthy domains
/// without the disks `lost`, but those are still `up`, being only meant to go: nobody leaves, and members
/// of other domains join (from `spare`), as many as are missing. Then the lost ones can leave it. None
/// if nobody is missing, nobody can join, or too few are up for a write set under both.
pub fn extended(
    old: &LogSet,
    lost: &BTreeSet<DiskId>,
    up: &BTreeSet<DiskId>,
    spare: &[Member],
) -> Option<LogSet> {
    let width = usize::from(old.width);
    let missing = width.saturating_sub(domains_touched(old, &(up - lost)));
    if missing == 0 || domains_touched(old, up) < width {
        return None;
    }
    let taken: BTreeSet<u32> = old.members.iter().map(|member| member.domain).collect();
    let mut joining: BTreeMap<u32, Member> = BTreeMap::new();
    for member in spare.iter().filter(|member| !taken.contains(&member.domain)) {
        if joining.len() < missing && old.members.len() + joining.len() < LOG_SET_DISKS_MAX {
            joining.entry(member.domain).or_insert(*member);
        }
    }
    let members: Vec<Member> = old.members.iter().copied().chain(joining.into_values()).collect();
    LogSet::new(members, old.width).ok().filter(|new| new != old)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn disk(number: u8) -> DiskId {
        DiskId::from_bytes([number; 16])
    }

    fn disks(numbers: &[u8]) -> BTreeSet<DiskId> {
        numbers.iter().copied().map(disk).collect()
    }

    /// A set of disks numbered from 0, given the domain of each.
    fn log_set(domains: &[u32], width: u8) -> LogSet {
        let member = |(number, &domain): (u8, &u32)| Member { disk: disk(number), domain };
        LogSet::new((0..).zip(domains).map(member).collect(), width).expect("a valid set")
    }

    /// All subsets of disks 0 to `count - 1`.
    fn subsets(count: u8) -> impl Iterator<Item = BTreeSet<DiskId>> {
        (0_u32..1 << count)
            .map(move |mask| (0..count).filter(|bit| mask >> bit & 1 == 1).map(disk).collect())
    }

    #[test]
    fn absurd_sets_are_refused() {
        let a = Member { disk: disk(1), domain: 1 };
        let b = Member { disk: disk(2), domain: 1 };
        assert_eq!(LogSet::new(vec![a], 0), Err(LogSetError::NoWidth));
        assert_eq!(
            LogSet::new(vec![a, b], 2),
            Err(LogSetError::TooFewDomains { width: 2, domains: 1 })
        );
        assert_eq!(LogSet::new(vec![a, a], 1), Err(LogSetError::Twice(disk(1))));
        let moved = Member { disk: disk(1), domain: 2 };
        assert_eq!(LogSet::new(vec![moved, a], 1), Err(LogSetError::Twice(disk(1))));
        let many = (0..=64).map(|n| Member { disk: disk(n), domain: u32::from(n) }).collect();
        assert_eq!(LogSet::new(many, 1), Err(LogSetError::TooManyDisks(65)));
    }

    #[test]
    fn decoding_checks_what_new_checks() {
        let set = log_set(&[0, 1, 2], 2);
        let text = serde_json::to_string(&set).expect("encodes");
        assert_eq!(serde_json::from_str::<LogSet>(&text).expect("decodes"), set);
        let error = serde_json::from_str::<LogSet>(&text.replace("\"width\":2", "\"width\":4"))
            .expect_err("four of three domains");
        assert!(error.to_string().contains("needs as many failure domains"), "{error}");
    }

    #[test]
    fn a_domain_counts_only_whole() {
        // Two disks in domain 0, one each in 1 and 2.
        let set = log_set(&[0, 0, 1, 2], 2);
        assert!(!fenced_enough(&set, &disks(&[0, 2])), "disk 1 may still take writes with 3");
        assert!(fenced_enough(&set, &disks(&[0, 1, 2])));
        assert!(fenced_enough(&set, &disks(&[2, 3])));
        assert_eq!(domains_missing(&set, &disks(&[0, 2])), [0, 2]);
        assert!(!write_set_ok(&set, &disks(&[0, 1])), "one domain");
        assert!(lease_ok(&set, &disks(&[1, 3])));
    }

    #[test]
    fn a_fenced_disk_that_was_not_read_is_not_heard() {
        let set = log_set(&[0, 1, 2], 2);
        let fenced = disks(&[0, 1]);
        assert!(fenced_enough(&set, &fenced));
        assert!(!heard_enough(&set, &fenced, &disks(&[0, 2])), "1 and 2 may be a write set");
        assert!(heard_enough(&set, &fenced, &disks(&[0, 1, 2])));
    }

    #[test]
    fn shrinking_needs_no_checkpoint_when_members_remain() {
        let old = log_set(&[0, 1, 2], 3);
        let new = log_set(&[0, 1], 2);
        assert!(may_swap_set(&old, &new, &[disks(&[0, 1, 2])]));
        // Dropping a domain without lowering the width needs the segment sealed first.
        let wide = log_set(&[0, 1, 2, 3], 2);
        let dropped = log_set(&[0, 1, 2], 2);
        assert!(!may_swap_set(&wide, &dropped, &[disks(&[0, 3])]));
        assert!(may_swap_set(&wide, &dropped, &[]));
    }

    #[test]
    fn a_disk_keeps_its_domain() {
        let old = log_set(&[0, 1, 2], 2);
        let new = log_set(&[0, 1, 3], 2);
        assert!(!may_swap_set(&old, &new, &[]));
    }

    #[test]
    fn a_root_in_force_is_found_from_every_former_set() {
        let new = log_set(&[0, 1], 1);
        let former = [log_set(&[0, 1, 2], 2)];
        assert!(in_force(&new, &former, &disks(&[0])));
        let moved = LogSet::new(
            vec![Member { disk: disk(3), domain: 3 }, Member { disk: disk(4), domain: 4 }],
            2,
        )
        .expect("valid");
        assert!(!in_force(&moved, &former, &disks(&[3, 4])), "nothing in the former set");
        assert!(!in_force(&moved, &former, &disks(&[3, 4, 1])), "hidden if 1 is given up");
        assert!(in_force(&moved, &former, &disks(&[3, 4, 1, 0])));
        let carried = former_sets(&moved, &former, false);
        assert_eq!(carried, [moved.clone(), former[0].clone()]);
        assert_eq!(former_sets(&moved, &former, true), [moved]);
    }

    #[test]
    fn shrinking_drops_what_is_gone_and_no_more_width_than_it_must() {
        let set = log_set(&[0, 1, 2], 3);
        let former = std::slice::from_ref(&set);
        let of = |members: &[u8], width| {
            let member = |&n: &u8| Member { disk: disk(n), domain: u32::from(n) };
            LogSet::new(members.iter().map(member).collect(), width).expect("valid")
        };
        assert_eq!(shrunk(&set, former, &disks(&[0, 2]), None), Some(of(&[0, 2], 2)));
        assert_eq!(shrunk(&set, former, &disks(&[1]), None), Some(of(&[1], 1)));
        assert_eq!(shrunk(&set, former, &disks(&[]), None), None);
        assert_eq!(shrunk(&set, former, &disks(&[0, 1, 2]), None), None, "nothing is gained");
        // Of a large set too many are gone for who does not know the open segments ...
        let large = log_set(&[0, 1, 2, 3, 4, 5], 2);
        let former = std::slice::from_ref(&large);
        assert_eq!(shrunk(&large, former, &disks(&[0]), None), None);
        // ... but not for who does.
        let open = [disks(&[0, 4])];
        assert_eq!(shrunk(&large, former, &disks(&[0]), Some(&open)), Some(of(&[0], 1)));
        assert_eq!(shrunk(&large, former, &disks(&[1]), Some(&open)), None, "it would be missed");
        // A root that was never in force is left by way of a narrower one, and must be found.
        let former = [of(&[2, 3], 2), of(&[0, 1], 2)];
        assert_eq!(shrunk(&former[1], &former, &disks(&[0, 1]), None), None);
        assert_eq!(shrunk(&former[1], &former, &disks(&[0, 1, 2]), None), Some(of(&[0, 1], 1)));
    }

    #[test]
    fn a_checkpoint_replaces_the_dead_and_widens() {
        let old = log_set(&[0, 1, 2], 2);
        let member = |n: u8| Member { disk: disk(n), domain: u32::from(n) };
        let all = disks(&[0, 1, 3, 4]);
        let spare = [member(3), member(4)];
        let new = renewed(&old, &disks(&[2]), &all, &spare, (2, 3)).expect("a change");
        assert_eq!(new.members(), [member(0), member(1), member(3)]);
        let new = renewed(&old, &disks(&[2]), &all, &spare, (3, 4)).expect("a change");
        assert_eq!((new.width(), new.members().len()), (3, 4));
        // Who is away for a moment stays, and nobody is added twice.
        assert_eq!(renewed(&old, &disks(&[]), &all, &spare, (2, 3)), None);
        // Nobody is left behind whom a write set under both pairs needs.
        assert_eq!(renewed(&old, &disks(&[1, 2]), &all, &spare, (2, 3)), None);
    }

    #[test]
    fn who_is_meant_to_go_stays_until_others_have_joined() {
        let old = log_set(&[0, 1, 2], 3);
        let member = |n: u8| Member { disk: disk(n), domain: u32::from(n) };
        let (lost, up, spare) = (disks(&[2]), disks(&[0, 1, 2, 3, 4]), [member(3), member(4)]);
        let healthy = &up - &lost;
        assert_eq!(renewed(&old, &lost, &healthy, &spare, (3, 8)), None);
        let both = extended(&old, &lost, &up, &spare).expect("somebody joins");
        assert_eq!(both.members(), [member(0), member(1), member(2), member(3)]);
        let new = renewed(&both, &lost, &healthy, &[], (3, 8)).expect("it can leave now");
        assert_eq!((new.width(), new.members()), (3, &[member(0), member(1), member(3)][..]));
        assert_eq!(extended(&both, &lost, &up, &spare), None, "nobody is missing");
        assert_eq!(extended(&old, &lost, &healthy, &spare), None, "it is away");
        assert_eq!(extended(&old, &lost, &up, &[]), None, "there is nobody");
    }

    /// Random sets over disks 0 to 6 in up to 5 domains. Not every disk belongs to the set.
    fn any_set() -> impl Strategy<Value = LogSet> {
        let members = prop::collection::btree_map(0_u8..7, 0_u32..5, 1..=7);
        (members, any::<u8>()).prop_map(|(members, pick)| {
            let members: Vec<Member> = members
                .into_iter()
                .map(|(number, domain)| Member { disk: disk(number), domain })
                .collect();
            let count = members.iter().map(|m| m.domain).collect::<BTreeSet<_>>().len();
            let width = 1 + pick % u8::try_from(count).expect("at most 5");
            LogSet::new(members, width).expect("width within the domains")
        })
    }

    fn any_disks() -> impl Strategy<Value = BTreeSet<DiskId>> {
        prop::collection::btree_set((0_u8..7).prop_map(disk), 0..=7)
    }

    proptest! {
        #[test]
        fn a_fence_meets_every_write_set_and_lease(set in any_set(), answered in any_disks()) {
            let escapes = subsets(7).any(|other| {
                (write_set_ok(&set, &other) || lease_ok(&set, &other))
                    && other.is_disjoint(&answered)
            });
            // Both directions: safe, and never waiting for more than is needed.
            prop_assert_eq!(fenced_enough(&set, &answered), !escapes);
        }

        #[test]
        fn all_answers_are_always_enough(set in any_set()) {
            let all: BTreeSet<DiskId> = set.members().iter().map(|m| m.disk).collect();
            prop_assert!(fenced_enough(&set, &all) && lease_ok(&set, &all));
            prop_assert!(write_set_ok(&set, &all) && in_force(&set, std::slice::from_ref(&set), &all));
            prop_assert!(!fenced_enough(&set, &BTreeSet::new()));
        }

        #[test]
        fn a_swapped_set_still_fences_what_is_open(
            old in any_set(),
            new in any_set(),
            open in prop::collection::vec(any_disks(), 0..4),
            answered in any_disks(),
        ) {
            if may_swap_set(&old, &new, &open) && fenced_enough(&new, &answered) {
                for write_set in &open {
                    prop_assert!(!write_set.is_disjoint(&answered));
                }
            }
        }

        #[test]
        fn in_doubt_both_sets_fence_what_is_new(
            old in any_set(),
            new in any_set(),
            answered in any_disks(),
        ) {
            // Whichever of the two sets a new head reads from the store.
            let fenced = fenced_enough(&old, &answered) || fenced_enough(&new, &answered);
            let former = [old];
            let pairs = pairs_in_use(&new, &former, false, None);
            for other in subsets(7) {
                if write_set_ok_in_all(&pairs, &other) || lease_ok_in_all(&pairs, &other) {
                    prop_assert!(!fenced || !other.is_disjoint(&answered));
                }
            }
        }

        #[test]
        fn a_shrunk_set_may_be_swapped_in(
            old in any_set(),
            kept in any_disks(),
            open in prop::collection::vec(any_disks(), 0..4),
        ) {
            // Whoever wrote them kept the rules.
            let open: Vec<_> = open.into_iter().filter(|set| write_set_ok(&old, set)).collect();
            let former = std::slice::from_ref(&old);
            for known in [None, Some(&open[..])] {
                if let Some(new) = shrunk(&old, former, &kept, known) {
                    prop_assert!(may_swap_set(&old, &new, &open));
                    prop_assert!(new.width() <= old.width());
                    prop_assert!(new.members().iter().all(|member| kept.contains(&member.disk)));
                    prop_assert!(in_force(&new, former, &kept));
                    // Those who are left suffice by themselves.
                    prop_assert!(write_set_ok(&new, &kept) && lease_ok(&new, &kept));
                }
            }
        }

        #[test]
        fn a_renewed_set_leaves_a_write_set_under_both(
            old in any_set(),
            lost in any_disks(),
            healthy in any_disks(),
            wide in 1_u8..4,
        ) {
            let spare: Vec<Member> = healthy
                .iter()
                .filter(|disk| old.domain_of(**disk).is_none())
                .zip(10..)
                .map(|(&disk, domain)| Member { disk, domain })
                .collect();
            let wide = wide.max(old.width());
            if let Some(new) = renewed(&old, &lost, &healthy, &spare, (wide, 5)) {
                let usable = &healthy - &lost;
                prop_assert!(new.width() >= old.width() && new.width() <= wide);
                prop_assert!(write_set_ok_in_all(&[&old, &new], &usable));
                prop_assert!(in_force(&new, std::slice::from_ref(&old), &usable));
                prop_assert!(may_swap_set(&old, &new, &[]));
            }
        }

        #[test]
        fn an_extended_set_leaves_a_write_set_under_both(
            old in any_set(),
            lost in any_disks(),
            up in any_disks(),
        ) {
            let others = up.iter().filter(|disk| old.domain_of(**disk).is_none());
            let spare: Vec<Member> =
                others.zip(10..).map(|(&disk, domain)| Member { disk, domain }).collect();
            if let Some(new) = extended(&old, &lost, &up, &spare) {
                prop_assert_eq!(new.width(), old.width());
                prop_assert!(write_set_ok_in_all(&[&old, &new], &up));
                prop_assert!(in_force(&new, std::slice::from_ref(&old), &up));
                prop_assert!(may_swap_set(&old, &new, &[]));
            }
        }

        #[test]
        fn who_searches_meets_a_root_in_force(
            new in any_set(),
            former in prop::collection::vec(any_set(), 0..3),
            mirrored in any_disks(),
        ) {
            if in_force(&new, &former, &mirrored) {
                // The own set, with fewer than w domains gone for good ...
                for found in subsets(7).filter(|found| fenced_enough(&new, found)) {
                    prop_assert!(!found.is_disjoint(&mirrored));
                }
                // ... or a former set, with fewer domains gone than both widths allow.
                for set in &former {
                    let width = new.width().min(set.width());
                    let narrow = LogSet::new(set.members().to_vec(), width).expect("narrower");
                    for found in subsets(7).filter(|found| fenced_enough(&narrow, found)) {
                        prop_assert!(!found.is_disjoint(&mirrored));
                    }
                }
            }
        }
    }
}
