//! Which node serves which volume: balanced by load, with few moves.
//!
//! A move costs a take-over, so nodes are left alone as long as each has what it should within a
//! tolerance; volumes of nodes that are down or to be emptied move in any case.

use std::collections::BTreeMap;

use crate::id::VolumeId;

/// A node that can serve volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// Its number.
    pub number: u32,
    /// How much of the load it should have, compared with others. With 0 it gets nothing.
    pub weight: u64,
    /// Load besides that of the volumes, in the same unit.
    pub load: u64,
    /// It is up, and not to be emptied.
    pub open: bool,
}

/// A volume that is to be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Volume {
    /// The volume.
    pub id: VolumeId,
    /// What it costs a node to serve it; any unit. Idle ones should cost something too.
    pub load: u64,
    /// The node that serves it; none if none does.
    pub node: Option<u32>,
}

/// A volume that another node is to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    /// The volume.
    pub volume: VolumeId,
    /// The node that serves it; none if none does.
    pub from: Option<u32>,
    /// The node that is to serve it.
    pub to: u32,
}

/// No node can serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{volumes} volumes need a node that is up and not to be emptied, there is none among {nodes}"
)]
pub struct NoNode {
    /// Volumes to serve.
    pub volumes: usize,
    /// Nodes that there are.
    pub nodes: usize,
}

/// Weights and loads beyond this count as this, so that no product of sums overflows.
const MOST: u64 = 1 << 44;

fn bounded(number: u64) -> u128 {
    number.min(MOST).into()
}

/// A node with what it would serve.
struct Place {
    number: u32,
    weight: u128,
    load: u128,
    /// Indexes of its volumes.
    volumes: Vec<usize>,
}

struct Plan<'a> {
    volumes: &'a [Volume],
    places: Vec<Place>,
    /// Those that moved once are not moved again.
    moved: Vec<bool>,
    load: u128,
    weight: u128,
    tolerance_percent: u128,
}

/// The moves after which each open node has its part of the load by weight, within `tolerance_percent`
/// or as near as whole volumes allow. Where all volumes cost the same, these are the fewest there
/// can be. In the order in which they are best made: first those that no open node serves, by load.
///
/// # Errors
/// There are volumes, and no open node.
pub fn spread_heads(
    nodes: &[Node],
    volumes: &[Volume],
    tolerance_percent: u32,
) -> Result<Vec<Move>, NoNode> {
    let open: BTreeMap<u32, &Node> =
        nodes.iter().filter(|n| n.open && n.weight > 0).map(|n| (n.number, n)).collect();
    if volumes.is_empty() {
        return Ok(Vec::new());
    }
    if open.is_empty() {
        return Err(NoNode { volumes: volumes.len(), nodes: nodes.len() });
    }
    let place = |node: &&Node| Place {
        number: node.number,
        weight: bounded(node.weight),
        load: bounded(node.load),
        volumes: Vec::new(),
    };
    let mut plan = Plan {
        volumes,
        places: open.values().map(place).collect(),
        moved: vec![false; volumes.len()],
        load: 0,
        weight: open.values().map(|node| bounded(node.weight)).sum(),
        tolerance_percent: tolerance_percent.min(100).into(),
    };
    let mut moves = plan.place_homeless();
    moves.extend(std::iter::from_fn(|| plan.improve()));
    Ok(moves)
}

impl Plan<'_> {
    /// Leaves volumes where they are served by an open node, and gives the others, the largest
    /// first, to the node that has least with them.
    fn place_homeless(&mut self) -> Vec<Move> {
        let mut homeless = Vec::new();
        for (index, volume) in self.volumes.iter().enumerate() {
            let at = volume.node.and_then(|node| self.at(node));
            match at {
                Some(at) => self.take(at, index),
                None => homeless.push(index),
            }
        }
        homeless.sort_by_key(|index| {
            let volume = &self.volumes[*index];
            (std::cmp::Reverse(volume.load), volume.id)
        });
        let mut moves = Vec::with_capacity(homeless.len());
        for index in homeless {
            let volume = self.volumes[index];
            let with = |at: &usize| self.places[*at].load + bounded(volume.load);
            let best = (0..self.places.len()).min_by(|a, b| {
                let (one, other) = (&self.places[*a], &self.places[*b]);
                (with(a) * other.weight).cmp(&(with(b) * one.weight))
            });
            let Some(to) = best else { continue };
            self.take(to, index);
            self.moved[index] = true;
            moves.push(Move { volume: volume.id, from: volume.node, to: self.places[to].number });
        }
        self.load = self.places.iter().map(|place| place.load).sum();
        moves
    }

    fn at(&self, node: u32) -> Option<usize> {
        self.places.binary_search_by_key(&node, |place| place.number).ok()
    }

    fn take(&mut self, at: usize, volume: usize) {
        self.places[at].volumes.push(volume);
        self.places[at].load += bounded(self.volumes[volume].load);
    }

    /// The most and the least that a node should have.
    fn band(&self, at: usize) -> (u128, u128) {
        let part = self.load * self.places[at].weight;
        let most = part * (100 + self.tolerance_percent) / (100 * self.weight);
        let least = (part * (100 - self.tolerance_percent)).div_ceil(100 * self.weight);
        (most.max(part.div_ceil(self.weight)), least.min(part / self.weight))
    }

    /// One more move, from a node that has more to one that has less, if one of them is out of its
    /// band.
    fn improve(&mut self) -> Option<Move> {
        let mut order: Vec<usize> = (0..self.places.len()).collect();
        order.sort_by(|a, b| {
            let (one, other) = (&self.places[*a], &self.places[*b]);
            (one.load * other.weight).cmp(&(other.load * one.weight))
        });
        let excess: Vec<u128> = (0..self.places.len())
            .map(|at| self.places[at].load.saturating_sub(self.band(at).0))
            .collect();
        let lack: Vec<u128> = (0..self.places.len())
            .map(|at| self.band(at).1.saturating_sub(self.places[at].load))
            .collect();
        for from in order.iter().rev() {
            for to in &order {
                let wanted = excess[*from].max(lack[*to]);
                if wanted == 0 || from == to {
                    continue;
                }
                if let Some(position) = self.pick(*from, *to, wanted) {
                    return Some(self.shift(*from, *to, position));
                }
            }
        }
        None
    }

    /// The volume of `from` that is best moved to `to`: the smallest that is enough, or else the
    /// largest that leaves both within their bands; or else the smallest that leaves the higher of
    /// both lower than before.
    fn pick(&self, from: usize, to: usize, wanted: u128) -> Option<usize> {
        let (source, goal) = (&self.places[from], &self.places[to]);
        let room = self.band(to).0.saturating_sub(goal.load);
        let spare = source.load.saturating_sub(self.band(from).1);
        let load = |position: &usize| bounded(self.volumes[source.volumes[*position]].load);
        let movable = || {
            (0..source.volumes.len()).filter(|at| !self.moved[source.volumes[*at]] && load(at) > 0)
        };
        let fits = |position: &usize| load(position) <= room.min(spare);
        let enough = |position: &usize| load(position) >= wanted;
        let better = |position: &usize| {
            (goal.load + load(position)) * source.weight < source.load * goal.weight
        };
        movable()
            .filter(|at| fits(at) && enough(at))
            .min_by_key(load)
            .or_else(|| movable().filter(fits).max_by_key(load))
            .or_else(|| movable().filter(better).min_by_key(load))
    }

    fn shift(&mut self, from: usize, to: usize, position: usize) -> Move {
        let index = self.places[from].volumes.swap_remove(position);
        let volume = self.volumes[index];
        self.places[from].load -= bounded(volume.load);
        self.take(to, index);
        self.moved[index] = true;
        Move { volume: volume.id, from: volume.node, to: self.places[to].number }
    }
}
