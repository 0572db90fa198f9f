//! Properties of placement, over clusters of all shapes.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::TooFewDomains;
use super::balance::Part;
use super::choose::{Candidate, Request, choose, choose_all};
use super::copysets::{Copysets, Domain, SCATTER_WIDTH, bounded, rings};
use crate::env::Env;
use crate::shard::domain::{Domains, Level};

const SLOTS: u32 = 1_000;

/// Disks of nodes in turn, and these of racks in turn.
fn candidates(racks: u32, nodes: u32, disks: u32) -> Vec<Candidate> {
    let domains = |disk| Domains { disk, node: disk % nodes, rack: disk % nodes % racks };
    let candidate = |disk| Candidate {
        domains: domains(disk),
        rank: 0,
        free: SLOTS / 2,
        slots: SLOTS,
        load: 0,
    };
    (0..nodes * disks).map(candidate).collect()
}

/// Nodes in racks in turn.
fn nodes(count: u32, racks: u32) -> Vec<Domain> {
    (0..count).map(|number| Domain { number, wider: number % racks, weight: 24 }).collect()
}

fn sets_of(copysets: &Copysets) -> BTreeSet<BTreeSet<u32>> {
    let number = |at: &u32| copysets.domains()[*at as usize].number;
    copysets.sets().map(|(set, _)| set.iter().map(number).collect()).collect()
}

fn request(level: Level, count: usize) -> Request<'static> {
    Request { level, count, taken: &[], copysets: None }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn chosen_disks_share_no_domain_and_are_as_many_as_there_can_be(
        shape in (1_u32..5, 1_u32..12, 1_u32..5),
        level in prop::sample::select(&Level::ALL[..]),
        count in 0_usize..14,
        ranks in prop::collection::vec(0_u8..4, 60),
        frees in prop::collection::vec(0_u32..SLOTS, 60),
        seed: u64,
    ) {
        let mut disks = candidates(shape.0, shape.1, shape.2);
        for ((disk, rank), free) in disks.iter_mut().zip(ranks).zip(frees) {
            (disk.rank, disk.free) = (rank, free);
        }
        let of = |rank: u8| -> BTreeSet<u32> {
            disks.iter().filter(|c| c.rank <= rank).map(|c| c.domains.at(level)).collect()
        };
        let env = Env::from_seed(seed);
        let chosen = choose(&disks, request(level, count), &env);
        let found: BTreeSet<u32> = chosen.iter().map(|at| disks[*at].domains.at(level)).collect();
        prop_assert_eq!(found.len(), chosen.len());
        prop_assert_eq!(chosen.len(), count.min(of(u8::MAX).len()));
        // No slow or failing one as long as a domain has a better one.
        for rank in 0..2 {
            let good = chosen.iter().filter(|at| disks[**at].rank <= rank).count();
            prop_assert!(good >= count.min(of(rank).len()));
        }
        let all = choose_all(&disks, request(level, count), &env);
        let (have, need) = (of(u8::MAX).len(), count);
        prop_assert_eq!(all.err(), (have < need).then_some(TooFewDomains { have, need }));
        let again = choose(&disks, request(level, count), &Env::from_seed(seed));
        prop_assert_eq!(again, chosen);
    }

    #[test]
    fn racks_share_a_write_set_evenly_as_far_as_they_have_nodes(
        racks in 1_u32..6,
        count in 1_u32..30,
        width in 2_usize..9,
        seed: u64,
    ) {
        let mut disks = candidates(racks, count, 2);
        let mut sizes: BTreeMap<u32, usize> = BTreeMap::new();
        for node in 0..count {
            *sizes.entry(node % racks).or_default() += 1;
        }
        let fits = |most: &usize| sizes.values().map(|size| size.min(most)).sum::<usize>() >= width;
        let most = (1..width).find(fits).unwrap_or(width);
        let domains = nodes(count, racks);
        let copysets = Copysets::build(&domains, width, 8, seed);
        prop_assert_eq!(copysets.is_err(), domains.len() < width);
        for copysets in [None, copysets.as_ref().ok()] {
            let request = Request { copysets, ..request(Level::Node, width) };
            let chosen = choose(&disks, request, &Env::from_seed(seed));
            let mut used: BTreeMap<u32, usize> = BTreeMap::new();
            for at in &chosen {
                *used.entry(disks[*at].domains.rack).or_default() += 1;
            }
            prop_assert!(used.values().all(|used| *used <= most), "{used:?}, {most} at most");
        }
        // A rack that is all but full is no obstacle.
        disks.iter_mut().filter(|c| c.domains.rack == 0).for_each(|c| c.free = 1);
        let others = disks.iter().filter(|c| c.domains.rack != 0);
        let others = others.map(|c| c.domains.node).collect::<BTreeSet<_>>().len();
        if others >= width {
            let chosen = choose(&disks, request(Level::Node, width), &Env::from_seed(seed));
            let scarce = chosen.iter().filter(|at| disks[**at].free == 1).count();
            prop_assert!(scarce <= 1, "{scarce}");
        }
    }

    #[test]
    fn a_node_that_comes_changes_only_the_sets_it_is_in_and_few_of_them(
        count in 12_u32..70,
        width in 2_usize..9,
        new in 1_000_u32..2_000,
        seed: u64,
    ) {
        let few = nodes(count, 1);
        let many: Vec<Domain> =
            few.iter().copied().chain([Domain { number: new, wider: 0, weight: 24 }]).collect();
        let old = Copysets::build(&few, width, SCATTER_WIDTH, seed).expect("enough");
        let all = Copysets::build(&many, width, SCATTER_WIDTH, seed).expect("enough");
        let (old, all) = (sets_of(&old), sets_of(&all));
        let rings = rings(width, SCATTER_WIDTH);
        // Each ring lets go of one set for each of the node's predecessors in it.
        prop_assert!(old.difference(&all).count() <= (width - 1) * rings);
        prop_assert!(all.difference(&old).count() <= width * rings);
        prop_assert!(all.difference(&old).all(|set| set.contains(&new)));
    }

    #[test]
    fn with_racks_each_set_of_a_node_that_goes_changes_in_one_member(
        count in 12_u32..60,
        racks in 3_u32..5,
        seed: u64,
    ) {
        let all = nodes(count, racks);
        let gone = u32::try_from(seed % u64::from(count)).expect("below count");
        let few: Vec<Domain> = all.iter().copied().filter(|d| d.number != gone).collect();
        let sets = |domains| sets_of(&Copysets::build(domains, 3, SCATTER_WIDTH, seed).expect("enough"));
        let (all, few) = (sets(&all), sets(&few));
        prop_assert!(all.difference(&few).all(|set| set.contains(&gone)));
        for set in few.difference(&all) {
            let one_other = |old: &&BTreeSet<u32>| old.contains(&gone) && old.difference(set).count() == 1;
            prop_assert!(all.iter().any(|old| one_other(&old)), "{set:?}");
        }
    }

    #[test]
    fn shares_give_each_domain_what_its_weight_is(
        (weights, width, most) in prop_oneof![
            (prop::collection::vec(12_u64..=24, 24..70), 2_usize..=4, Just(0.1)),
            (prop::collection::vec(12_u64..=18, 24..70), 5_usize..=8, Just(0.25)),
        ],
        seed: u64,
    ) {
        let domain = |(number, weight): (u32, &u64)| Domain { number, wider: 0, weight: *weight };
        let domains: Vec<Domain> = (0..).zip(&weights).map(domain).collect();
        let sets = Copysets::build(&domains, width, SCATTER_WIDTH, seed).expect("enough");
        let all: u64 = weights.iter().sum();
        let shares: f64 = sets.sets().map(|(_, share)| share).sum();
        prop_assert!((shares - 1.0).abs() < 1e-6, "{shares}");
        for (domain, part) in sets.balance() {
            let ratio = part * all as f64 / domain.weight as f64;
            prop_assert!((ratio - 1.0).abs() < most, "{ratio} of {domain:?}");
        }
    }
}

#[test]
fn disks_are_drawn_in_proportion_to_what_they_have_free_squared_and_fill_alike() {
    let env = Env::from_seed(11);
    let mut disks = candidates(3, 30, 4);
    // Every third node is new and empty.
    for disk in &mut disks {
        disk.free = if disk.domains.node % 3 == 0 { SLOTS } else { SLOTS * 6 / 10 };
    }
    for bounded in [false, true] {
        let domains = nodes(30, 1);
        let sets = Copysets::build(&domains, 3, SCATTER_WIDTH, 5).expect("enough");
        let mut disks = disks.clone();
        for disk in &mut disks {
            disk.domains.rack = 0;
        }
        let copysets = bounded.then_some(&sets);
        for _ in 0..24_000 {
            let request = Request { copysets, ..request(Level::Node, 3) };
            for at in choose(&disks, request, &env) {
                disks[at].free -= 1;
            }
        }
        let free: u32 = disks.iter().map(|disk| disk.free).sum();
        let average = f64::from(free) / disks.len() as f64;
        for disk in &disks {
            let off = (f64::from(disk.free) - average).abs() / f64::from(SLOTS);
            assert!(off < 0.1, "{off}: {disk:?}, on average {average}");
        }
    }
}

#[test]
fn equal_nodes_get_equal_parts_of_many_segments() {
    let (disks, env) = (candidates(1, 60, 2), Env::from_seed(3));
    let domains = nodes(60, 1);
    for width in [3, 6] {
        let sets = Copysets::build(&domains, width, SCATTER_WIDTH, 5).expect("enough");
        let mut counts = vec![0.0; 60];
        let mut used = BTreeSet::new();
        let rounds = 20_000;
        for _ in 0..rounds {
            let request = Request { copysets: Some(&sets), ..request(Level::Node, width) };
            let chosen = choose(&disks, request, &env);
            used.insert(chosen.iter().map(|at| disks[*at].domains.node).collect::<BTreeSet<_>>());
            for at in &chosen {
                counts[disks[*at].domains.node as usize] += 1.0;
            }
        }
        let even = f64::from(rounds) * width as f64 / 60.0;
        let worst = counts.iter().map(|count: &f64| (count / even - 1.0).abs()).fold(0.0, f64::max);
        assert!(worst < 0.1, "{worst}");
        assert!(used.is_subset(&sets_of(&sets)), "no others");
        assert_eq!(used.len(), sets_of(&sets).len(), "all of them");
    }
}

#[test]
fn sets_are_few_and_meet_about_as_many_others_as_asked() {
    for (racks, width, scatter) in [(1, 3, 20), (1, 6, 20), (5, 3, 20), (10, 6, 20), (1, 2, 8)] {
        let sets = Copysets::build(&nodes(60, racks), width, scatter, 9).expect("enough");
        let rings = rings(width, scatter);
        let scatter = scatter.max(rings * 2 * (width - 1));
        let all = sets_of(&sets);
        assert!(all.len() <= 60 * rings, "{}", all.len());
        let mut met = vec![BTreeSet::<u32>::new(); 60];
        for set in &all {
            for at in set {
                met[*at as usize].extend(set.iter().filter(|b| *b != at));
            }
        }
        let average = met.iter().map(BTreeSet::len).sum::<usize>() as f64 / 60.0;
        assert!(average >= scatter as f64 * 0.75, "{racks} {width}: {average}");
        assert!(average <= scatter as f64 * 1.6, "{racks} {width}: {average}");
    }
}

#[test]
fn a_repair_completes_a_set_and_a_broken_one_is_left() {
    let (mut disks, env) = (candidates(1, 40, 2), Env::from_seed(3));
    let domains = nodes(40, 1);
    let sets = Copysets::build(&domains, 4, SCATTER_WIDTH, 5).expect("enough");
    let all = sets_of(&sets);
    let taken: Vec<(u32, Option<u32>)> =
        all.first().expect("a set").iter().take(3).map(|node| (*node, Some(0))).collect();
    let wanted = Request { level: Level::Node, count: 1, taken: &taken, copysets: Some(&sets) };
    for _ in 0..20 {
        let chosen = choose(&disks, wanted, &env);
        let mut set: BTreeSet<u32> = taken.iter().map(|(node, _)| *node).collect();
        set.extend(chosen.iter().map(|at| disks[*at].domains.node));
        assert!(all.contains(&set), "{set:?}");
    }
    // Half of the nodes suspect: no set is whole any more, but there are four nodes.
    for disk in disks.iter_mut().filter(|disk| disk.domains.node > 4) {
        disk.rank = 2;
    }
    let request = Request { copysets: Some(&sets), ..request(Level::Node, 4) };
    let chosen = choose(&disks, request, &env);
    assert_eq!(chosen.len(), 4);
    assert!(chosen.iter().all(|at| disks[*at].rank == 0));
}

#[test]
fn nothing_comes_of_nothing() {
    let env = Env::from_seed(1);
    for count in [0, 1, 3] {
        assert!(choose(&[], request(Level::Rack, count), &env).is_empty());
    }
    assert_eq!(
        Copysets::build(&[], 3, 20, 0).map(|_| ()).map_err(|e| e.to_string()),
        Err("a write set needs 3 failure domains, there are 0".to_owned())
    );
    let none = Copysets::build(&[], 0, 0, 0).expect("nothing");
    assert_eq!(none.sets().count(), 0);
    let weightless: Vec<Domain> =
        nodes(5, 2).into_iter().map(|d| Domain { weight: 0, ..d }).collect();
    assert!(
        Copysets::build(&weightless, 1, 0, 0)
            .is_ok_and(|sets| sets.sets().count() == 5 * rings(1, 0))
    );
    assert!(!bounded(1_000, 1, 20) && !bounded(21, 3, 20) && bounded(22, 3, 20));
    assert!(!bounded(30, 16, 20) && bounded(32, 16, 20));
    assert_eq!(Part::of(&[]), Part::default());
    let mut disks = candidates(1, 4, 1);
    for disk in &mut disks {
        disk.free = u32::MAX;
    }
    assert_eq!(choose(&disks, request(Level::Disk, 4), &env).len(), 4);
}
