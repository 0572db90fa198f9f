//! Drawing the disks of a write set.

use super::TooFewDomains;
use super::copysets::Copysets;
use crate::env::Env;
use crate::shard::domain::{Domains, Level};

/// Ranks that a candidate may have; see [`Candidate::rank`].
const RANKS: std::ops::RangeInclusive<u8> = 0..=2;
/// A disk is emptier than the average by so many times at most until it counts as one without
/// room for the sake of being spread.
const SCARCE: u64 = 4;
/// Free slots beyond which a disk is not drawn more often: so that weights can be summed up.
const FREE_MAX: u32 = 1 << 20;

/// A disk that a shard may be placed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Candidate {
    /// Its failure domains.
    pub domains: Domains,
    /// How much it is to be avoided: 0 not at all, 1 if it is slow, 2 if it failed lately, is to go or is
    /// down. Higher ones count as 2.
    pub rank: u8,
    /// Slots that are free for the class of the request.
    pub free: u32,
    /// All its slots.
    pub slots: u32,
    /// How busy it is: thousandths, 1,000 at most. A busy disk is drawn less often, down to a tenth.
    pub load: u16,
}

impl Candidate {
    /// What its chance is proportional to. A disk that seems full comes last, but it may have room
    /// meanwhile.
    fn weight(&self) -> u64 {
        let weight = 64 * u64::from(self.free.min(FREE_MAX)).pow(2);
        match self.load {
            0 => weight + 1,
            load => weight / 1_000 * u64::from(1_000 - load.min(900)) + 1,
        }
    }
}

/// What is to be chosen.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The level of the failure domains.
    pub level: Level,
    /// Disks, each in another domain.
    pub count: usize,
    /// Domains of the level that are taken already, and the domain of the next wider level of each
    /// as far as it is known.
    pub taken: &'a [(u32, Option<u32>)],
    /// The sets that the domains, together with those that are taken, should be one of.
    pub copysets: Option<&'a Copysets>,
}

impl Request<'_> {
    fn domain(&self, candidate: &Candidate) -> u32 {
        candidate.domains.at(self.level)
    }

    /// The domain of the next wider level; the same for all on the widest one.
    fn wider(&self, candidate: &Candidate) -> u32 {
        self.level.wider().map_or(0, |wider| candidate.domains.at(wider))
    }
}

/// Chooses up to [`Request::count`] candidates in different domains, none of which is taken, by weighted
/// random draw; their indexes. Fewer only where there are no more domains.
///
/// If there are copysets, and one of which every domain has a healthy candidate with room, the domains
/// are one of these. Otherwise they are drawn one by one: healthy ones first, then slow ones, then
/// the others. Of equal rank, those are preferred whose wider domain (rack, for nodes) has
/// fewest of the chosen ones, unless that has much less room than the average.
pub fn choose(candidates: &[Candidate], request: Request<'_>, env: &Env) -> Vec<usize> {
    let set = request.copysets.and_then(|sets| draw_set(candidates, request, sets, env));
    set.unwrap_or_else(|| draw_each(candidates, request, env))
}

/// As [`choose`], but all or none.
///
/// # Errors
/// There are fewer domains than that.
pub fn choose_all(
    candidates: &[Candidate],
    request: Request<'_>,
    env: &Env,
) -> Result<Vec<usize>, TooFewDomains> {
    let chosen = choose(candidates, request, env);
    let (have, need) = (chosen.len(), request.count);
    if have < need { Err(TooFewDomains { have, need }) } else { Ok(chosen) }
}

fn draw_each(candidates: &[Candidate], request: Request<'_>, env: &Env) -> Vec<usize> {
    let mut taken: Vec<u32> = request.taken.iter().map(|(domain, _)| *domain).collect();
    let mut wider: Vec<u32> = request.taken.iter().filter_map(|(_, wider)| *wider).collect();
    let mut chosen = Vec::with_capacity(request.count.min(candidates.len()));
    for rank in RANKS {
        let of_rank = |at: &usize| candidates[*at].rank.min(*RANKS.end()) == rank;
        let mut pool: Vec<usize> = (0..candidates.len()).filter(of_rank).collect();
        while chosen.len() < request.count {
            pool.retain(|at| !taken.contains(&request.domain(&candidates[*at])));
            let allowed = spread(candidates, &pool, request, &wider);
            let weight = |at: &usize| candidates[pool[*at]].weight();
            let Some(index) = draw(&allowed, weight, env) else { break };
            let at = pool.swap_remove(index);
            taken.push(request.domain(&candidates[at]));
            wider.push(request.wider(&candidates[at]));
            chosen.push(at);
        }
    }
    chosen
}

/// The positions in `pool` of the candidates whose wider domain is used least, of those that have room.
fn spread(
    candidates: &[Candidate],
    pool: &[usize],
    request: Request<'_>,
    used: &[u32],
) -> Vec<usize> {
    let all = || (0..pool.len()).collect();
    let Some(first) = pool.first() else { return Vec::new() };
    let wider = |at: usize| request.wider(&candidates[at]);
    if used.is_empty() || pool.iter().all(|at| wider(*at) == wider(*first)) {
        return all();
    }
    let uses = |at: usize| used.iter().filter(|other| **other == wider(at)).count();
    let free = |at: usize| u64::from(candidates[at].free);
    let average = pool.iter().map(|at| free(*at)).sum::<u64>() / pool.len() as u64;
    let roomy = pool.iter().filter(|at| free(**at) * SCARCE >= average);
    let Some(least) = roomy.map(|at| uses(*at)).min() else { return all() };
    (0..pool.len()).filter(|index| uses(pool[*index]) <= least).collect()
}

/// Draws one of `of` by weight; none of nothing.
fn draw(of: &[usize], weight: impl Fn(&usize) -> u64, env: &Env) -> Option<usize> {
    let total: u64 = of.iter().map(&weight).sum();
    if total == 0 {
        return None;
    }
    let mut left = env.random_below(total);
    of.iter().copied().find(|item| {
        let hit = left < weight(item);
        left = left.wrapping_sub(weight(item));
        hit
    })
}

/// Draws one of the sets that contain all domains that are taken, and whose others have a healthy
/// candidate with room each; and one of these in each domain.
fn draw_set(
    candidates: &[Candidate],
    request: Request<'_>,
    sets: &Copysets,
    env: &Env,
) -> Option<Vec<usize>> {
    if request.count == 0 || request.count + request.taken.len() != sets.width() {
        return None;
    }
    let domains = sets.domains();
    let index = |number| domains.binary_search_by_key(&number, |domain| domain.number).ok();
    let mut usable: Vec<Vec<usize>> = vec![Vec::new(); domains.len()];
    for (at, candidate) in candidates.iter().enumerate() {
        let usable_now = candidate.rank == 0 && candidate.free > 0;
        if let Some(of) = index(request.domain(candidate)).filter(|_| usable_now) {
            usable[of].push(at);
        }
    }
    // The emptier a domain is, the more often it is chosen; one that is taken is settled.
    let sum = |of: &[usize], what: fn(&Candidate) -> u32| -> f64 {
        of.iter().map(|at| f64::from(what(&candidates[*at]))).sum()
    };
    let room = |of: &Vec<usize>| {
        let slots = sum(of, |c| c.slots.max(c.free));
        if slots > 0.0 { (sum(of, |c| c.free) / slots).powi(2) } else { 0.0 }
    };
    let rooms: Vec<f64> = usable.iter().map(room).collect();
    let taken: Vec<usize> =
        request.taken.iter().map(|(domain, _)| index(*domain)).collect::<Option<_>>()?;
    let chance = |(set, share): (&[u32], f64)| {
        if !taken.iter().all(|of| set.iter().any(|at| *at as usize == *of)) {
            return 0.0;
        }
        let others = set.iter().filter(|at| !taken.contains(&(**at as usize)));
        share * others.map(|at| rooms[*at as usize]).product::<f64>()
    };
    let total: f64 = sets.sets().map(chance).sum();
    if total <= 0.0 {
        return None;
    }
    let mut left = total * fraction(env);
    let mut drawn = None;
    for (set, share) in sets.sets() {
        let chance = chance((set, share));
        if chance > 0.0 {
            drawn = Some(set);
            left -= chance;
        }
        if left < 0.0 {
            break;
        }
    }
    let others = drawn?.iter().map(|at| *at as usize).filter(|at| !taken.contains(at));
    others.map(|of| draw(&usable[of], |at| candidates[*at].weight(), env)).collect()
}

/// A random number from 0 up to and without 1.
fn fraction(env: &Env) -> f64 {
    (env.random_u64() >> 11) as f64 / (1_u64 << 53) as f64
}
