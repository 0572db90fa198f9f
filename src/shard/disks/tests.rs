//! The registry seen at each level, over 3 racks of 2 nodes with 2 disks each.

use super::*;
use crate::disk::{Disk, FormatOptions};
use crate::id::ClusterId;
use crate::shard::local::LocalClient;
use crate::sim::device::{SimConfig, SimDevice};

const DISKS: u8 = 12;

fn id(number: u8) -> DiskId {
    DiskId::from_bytes([number + 1; 16])
}

fn domains(number: u8) -> Domains {
    let disk = u32::from(number);
    Domains { disk, node: disk / 2, rack: disk / 4 }
}

/// A client, for disks of which nothing is asked.
async fn client() -> Rc<dyn ShardClient> {
    let device = SimDevice::new(Env::from_seed(1), SimConfig::default());
    let (disk, cluster) = (id(0), ClusterId::from_bytes([9; 16]));
    let options =
        FormatOptions { disk, cluster, slot_bytes: Some(1 << 20), volumes_max: None, force: false };
    Disk::format(&device, options).await.expect("formatted");
    Rc::new(LocalClient::new(Disk::open(Rc::new(device)).await.expect("opened")))
}

async fn registry(count: u8) -> Disks {
    let disks = Disks::default();
    let client = client().await;
    for number in 0..count {
        let (id, cluster) = (id(number), ClusterId::from_bytes([9; 16]));
        let info = DiskInfo { id, cluster, slot_bytes: 1 << 20, slots: 1_000, slots_free: 1_000 };
        disks.add(client.clone(), domains(number), info);
    }
    disks
}

fn counts(disks: &Disks) -> [(usize, usize, (usize, usize)); 3] {
    Level::ALL.map(|level| {
        let view = disks.at(level);
        assert_eq!(view.domains_with_room(|_| true), view.healthy_domains());
        (view.healthy_domains(), view.fast_domains(), view.lasting_domains())
    })
}

#[tokio::test(start_paused = true)]
async fn domains_are_those_of_the_level() {
    let disks = registry(DISKS).await;
    assert_eq!(counts(&disks), [(12, 12, (12, 12)), (6, 6, (6, 6)), (3, 3, (3, 3))]);
    // One disk of node 0 fails, node 1 goes with all its disks, node 2 is emptied.
    disks.report(id(0), &ShardError::Unreachable);
    (2..4).for_each(|number| disks.remove(id(number)));
    (4..6).for_each(|number| disks.set_draining(id(number), true));
    assert_eq!(counts(&disks), [(7, 7, (8, 10)), (4, 4, (4, 5)), (3, 3, (3, 3))]);
    disks.remove(id(6));
    disks.remove(id(7));
    assert_eq!(counts(&disks), [(5, 5, (6, 10)), (3, 3, (3, 5)), (2, 2, (2, 3))]);
    assert_eq!(
        disks.at(Level::Rack).headroom(3, |_| true),
        disks.at(Level::Node).headroom(4, |_| true)
    );
}

#[tokio::test(start_paused = true)]
async fn no_two_chosen_disks_share_a_domain_of_the_level() {
    let disks = registry(DISKS).await;
    let env = Env::from_seed(3);
    for (level, most) in [(Level::Disk, 12), (Level::Node, 6), (Level::Rack, 3)] {
        let view = disks.at(level);
        assert_eq!(view.level(), level);
        for count in 0..14 {
            let chosen = view.choose(&env, SlotClass::Client, count, &[], |_| true);
            let found: BTreeSet<u32> =
                chosen.iter().filter_map(|target| view.domain(target.disk)).collect();
            assert_eq!(found.len(), chosen.len(), "{level}");
            assert_eq!(chosen.len(), count.min(most), "{level}");
        }
        let taken = [1];
        let chosen = view.choose(&env, SlotClass::Client, 12, &taken, |_| true);
        assert!(chosen.iter().all(|target| view.domain(target.disk) != Some(1)), "{level}");
        assert_eq!(chosen.len(), most - 1);
    }
}

#[tokio::test(start_paused = true)]
async fn write_sets_over_many_domains_are_few_and_the_same_for_all_who_know_the_disks() {
    let (disks, env) = (registry(120).await, Env::from_seed(5));
    let (nodes, other) = (disks.at(Level::Node), registry(120).await.at(Level::Node));
    let drawn = |view: &Disks, taken: &[u32]| -> BTreeSet<u32> {
        let chosen = view.choose(&env, SlotClass::Client, 3 - taken.len(), taken, |_| true);
        let found = chosen.iter().filter_map(|target| view.domain(target.disk));
        found.chain(taken.iter().copied()).collect()
    };
    let sets: BTreeSet<_> = (0..2_000).map(|_| drawn(&nodes, &[])).collect();
    let again: BTreeSet<_> = (0..2_000).map(|_| drawn(&other, &[])).collect();
    // 60 nodes on 5 rings; of all combinations, 2,000 draws would be almost all different.
    assert!((200..=300).contains(&sets.len()), "{}", sets.len());
    assert!(sets.union(&again).count() <= 300, "{}", sets.union(&again).count());
    let racks = |set: &BTreeSet<u32>| set.iter().map(|node| node / 2).collect::<BTreeSet<_>>();
    assert!(sets.iter().all(|set| racks(set).len() == 3), "in different racks");
    // A repair of one shard completes a set again.
    let copysets = nodes.copysets(&nodes.known.borrow(), 3).expect("many domains");
    let number = |at: &u32| copysets.domains()[*at as usize].number;
    let all: BTreeSet<BTreeSet<u32>> =
        copysets.sets().map(|(set, _)| set.iter().map(number).collect()).collect();
    assert!(sets.is_subset(&all) && again.is_subset(&all));
    for set in sets.iter().take(20) {
        let rest: Vec<u32> = set.iter().copied().take(2).collect();
        assert!(all.contains(&drawn(&nodes, &rest)), "{rest:?}");
    }
    // A node that leaves is in no set any more.
    disks.set_draining(id(0), true);
    disks.remove(id(1));
    assert!((0..500).all(|_| !drawn(&nodes, &[]).contains(&0)));
    // Few domains: every combination.
    let few = registry(40).await.at(Level::Node);
    let sets: BTreeSet<_> = (0..2_000).map(|_| drawn(&few, &[])).collect();
    assert!(sets.len() > 500, "{}", sets.len());
}
