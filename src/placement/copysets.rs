//! Copysets: the few sets of failure domains that write sets are taken from.
//!
//! If every combination of domains is used, the loss of any `m + 1` of them loses some segment. With
//! few sets it rarely does, and the price is that what one domain held is rebuilt by fewer others:
//! its *scatter width* (Cidon et al., "Copysets: Reducing the Frequency of Data Loss in Cloud
//! Storage", USENIX ATC 2013). That paper cuts random permutations into groups; one domain more would
//! shift all groups after it, so here the permutations are *rings* ordered by a hash, and a set is
//! a domain with its next successors on a ring. A ring has as many sets as there are domains, each domain is in
//! `width` of them, and meets `2 (width - 1)` others.
//!
//! Where domains lie in wider ones (nodes in racks), a set takes no more of one rack than it must:
//! a successor of a rack that is used up is passed over.
//!
//! Invariants:
//! - The sets are a function of domains, width, scatter width and seed, in whatever order the domains are given.
//! - A domain that comes or goes changes only the sets that contain it, and in each of them one
//!   member; besides, its own set on each ring comes or goes. (With racks: as long as the number that
//!   a set must take of one rack stays.)
//! - Shares sum up to 1. By them each domain gets of all shards what its weight is of all
//!   weights: within 10 % for sets of up to 4 domains whose weights differ by up to 2 times, within 25 %
//!   (mostly 2 %) for those of up to 8 and 1.5 times. Where they differ more, the draw, which prefers
//!   what is empty, does the rest.
//!
//! The sets of a larger width on a ring contain those of a smaller one on it, where no racks are
//! passed over: what is drawn from within a volume's log set is a copyset as well.

use super::{TooFewDomains, mix};

/// Domains that one domain shares segments with, unless told otherwise: they rebuild it.
pub const SCATTER_WIDTH: usize = 20;
/// The largest scatter width; a larger one counts as this.
const SCATTER_MAX: usize = 1_024;
/// Rounds of fitting the shares to the weights.
const ROUNDS: usize = 32;
/// Fewest rings: with fewer, shares of wide sets cannot follow weights that differ.
const RINGS_MIN: usize = 3;
/// The largest part of all sets that a domain is given, where by its weight it should be in more.
const WANTED_MAX: f64 = 0.95;
/// By how many times a share changes in one step at most.
const STEP_MAX: f64 = 8.0;

/// A failure domain that sets are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Domain {
    /// Its number.
    pub number: u32,
    /// The domain of the next wider level that it lies in; 0 for all where there is none.
    pub wider: u32,
    /// What it can take, compared with others: bytes or slots.
    pub weight: u64,
}

/// The sets of failure domains that write sets of one width are taken from.
#[derive(Debug, Clone, PartialEq)]
pub struct Copysets {
    /// Sorted by number.
    domains: Vec<Domain>,
    width: usize,
    /// Indexes of domains, `width` for each set.
    members: Vec<u32>,
    /// Of all segments, by set.
    shares: Vec<f64>,
}

/// Whether write sets are bounded at all: where there are few domains, every combination is
/// allowed. Else a set that lost members would find no replacement, and each domain meets all others
/// anyway.
pub const fn bounded(domains: usize, width: usize, scatter: usize) -> bool {
    width >= 2 && domains >= 2 * width && domains > scatter + 1
}

/// Rings for sets of `width` domains where each is to meet `scatter` others.
pub const fn rings(width: usize, scatter: usize) -> usize {
    let met = 2 * width.saturating_sub(1);
    let rings = if met == 0 { 1 } else { scatter.div_ceil(met) };
    if rings < RINGS_MIN { RINGS_MIN } else { rings }
}

impl Copysets {
    /// The sets of `width` of these domains where each is to meet about `scatter` others: fewer by
    /// those that it meets on several rings, more where three rings (the fewest) have more.
    ///
    /// # Errors
    /// There are fewer domains than that.
    pub fn build(
        domains: &[Domain],
        width: usize,
        scatter: usize,
        seed: u64,
    ) -> Result<Self, TooFewDomains> {
        let mut domains = domains.to_vec();
        domains.sort_unstable_by_key(|domain| domain.number);
        domains.dedup_by_key(|domain| domain.number);
        if domains.len() < width {
            return Err(TooFewDomains { have: domains.len(), need: width });
        }
        let mut sets = Self { domains, width, members: Vec::new(), shares: Vec::new() };
        if width > 0 {
            for ring in 0..rings(width, scatter.min(SCATTER_MAX)) {
                sets.add_ring(mix(seed, ring as u64));
            }
            sets.fit();
        }
        Ok(sets)
    }

    /// Adds the sets of a ring, one for each domain.
    fn add_ring(&mut self, seed: u64) {
        let most = most_of_one(&self.domains, self.width);
        let mut ring: Vec<usize> = (0..self.domains.len()).collect();
        ring.sort_by_cached_key(|at| {
            let number = self.domains[*at].number;
            (mix(seed, number.into()), number)
        });
        for start in 0..ring.len() {
            let mut set: Vec<usize> = Vec::with_capacity(self.width);
            for at in ring.iter().cycle().skip(start).take(ring.len()) {
                let rack = self.domains[*at].wider;
                let there = set.iter().filter(|other| self.domains[**other].wider == rack);
                if there.count() < most {
                    set.push(*at);
                }
                if set.len() == self.width {
                    break;
                }
            }
            let index = |at| u32::try_from(at).expect("domains are numbered in 32 bits");
            self.members.extend(set.into_iter().map(index));
        }
    }

    /// Fits the shares to the weights of the domains by iterative proportional fitting (Deming and
    /// Stephan, 1940): each domain in turn has the shares of its sets scaled so that they are right
    /// for it.
    fn fit(&mut self) {
        let sets = self.members.len() / self.width;
        self.shares = vec![1.0 / sets as f64; sets];
        let all: f64 = self.domains.iter().map(|domain| domain.weight as f64).sum();
        let even = 1.0 / self.domains.len() as f64;
        let part = |domain: &Domain| if all > 0.0 { domain.weight as f64 / all } else { even };
        let mut sets_of = vec![Vec::new(); self.domains.len()];
        for (set, members) in self.members.chunks(self.width).enumerate() {
            for at in members {
                sets_of[*at as usize].push(set);
            }
        }
        for _ in 0..ROUNDS {
            // Kept up to date, as a sum over all sets for each domain would take long.
            let mut total: f64 = self.shares.iter().sum();
            for (domain, sets) in self.domains.iter().zip(&sets_of) {
                let wanted = (part(domain) * self.width as f64).min(WANTED_MAX);
                let has: f64 = sets.iter().map(|set| self.shares[*set]).sum();
                if has <= 0.0 || has >= total {
                    continue;
                }
                let odds = wanted / (1.0 - wanted) * (total - has) / has;
                let factor = odds.clamp(1.0 / STEP_MAX, STEP_MAX);
                for set in sets {
                    self.shares[*set] *= factor;
                }
                total += has * (factor - 1.0);
            }
            let total: f64 = self.shares.iter().sum();
            for share in &mut self.shares {
                *share /= total;
            }
        }
    }

    /// Of all shards, the part that each domain gets by the shares of the sets; by index.
    fn parts(&self) -> Vec<f64> {
        let mut parts = vec![0.0; self.domains.len()];
        for (share, set) in self.shares.iter().zip(self.members.chunks(self.width)) {
            for at in set {
                parts[*at as usize] += share / self.width as f64;
            }
        }
        parts
    }

    /// Domains of a set.
    pub const fn width(&self) -> usize {
        self.width
    }

    /// The domains, sorted by number.
    pub fn domains(&self) -> &[Domain] {
        &self.domains
    }

    /// Each set, as indexes into [`Self::domains`], with its share of all segments.
    pub fn sets(&self) -> impl Iterator<Item = (&[u32], f64)> {
        // Without members there are no chunks, whatever their size.
        self.members.chunks(self.width.max(1)).zip(self.shares.iter().copied())
    }

    /// The domains with the part of all shards that each gets.
    pub fn balance(&self) -> impl Iterator<Item = (Domain, f64)> {
        self.domains.iter().copied().zip(self.parts())
    }
}

/// How many shards of a set of `width` must lie in one wider domain at most, so that there are enough: as few
/// as possible.
fn most_of_one(domains: &[Domain], width: usize) -> usize {
    let mut sizes = std::collections::BTreeMap::<u32, usize>::new();
    for domain in domains {
        *sizes.entry(domain.wider).or_default() += 1;
    }
    let fits = |most: &usize| sizes.values().map(|size| size.min(most)).sum::<usize>() >= width;
    (1..width).find(fits).unwrap_or(width)
}
