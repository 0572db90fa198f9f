//! The simulation finds each planted bug within the number of seeds that docs/simulation.md states.
#![cfg(feature = "simulation")]

use std::collections::BTreeMap;

use sds::planted::{Bug, plant};
use sds::sim::cluster;
use sds::sim::run::{Report, run};

/// How the rows of the table of one node begin, and those of a whole cluster.
const NODE: &str = "| `";
const CLUSTER: &str = "| cluster `";

/// Bug and the seeds that are searched for it, of the table's rows that begin so.
fn table(start: &str) -> BTreeMap<String, u64> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/simulation.md");
    let text = std::fs::read_to_string(path).expect("the document is there");
    let rows = text.lines().filter(|line| line.starts_with(start));
    rows.map(|row| {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let seeds = cells[3].parse().expect("a number of seeds");
        (cells[1].trim_start_matches("cluster ").trim_matches('`').to_owned(), seeds)
    })
    .collect()
}

/// Whether the simulation fails on a seed, by its oracle or by a panic of the simulated node.
fn fails(run: fn(u64) -> Report, seed: u64, bug: Option<Bug>) -> bool {
    plant(bug);
    let found = std::panic::catch_unwind(|| run(seed).failure.is_some()).unwrap_or(true);
    plant(None);
    found
}

/// Any change of the code shifts what a seed does, so the table gives room, and any seed within it
/// will do, if it passes without the bug.
fn find(bug: Bug, run: fn(u64) -> Report, start: &str) {
    let seeds = table(start)[&format!("{bug:?}")];
    let found = (1..=seeds).find(|&seed| fails(run, seed, Some(bug)) && !fails(run, seed, None));
    assert!(found.is_some(), "{bug:?} is not found within {seeds} seeds");
}

macro_rules! planted {
    ($kind:ident, $run:path, $start:expr, $all:expr, $($test:ident: $bug:ident),* $(,)?) => {
        mod $kind {
            use super::*;

            $(
                #[test]
                fn $test() {
                    find(Bug::$bug, $run, $start);
                }
            )*

            #[test]
            fn every_bug_has_a_test_and_a_row() {
                assert_eq!([$(Bug::$bug),*], $all);
                let names: Vec<String> = $all.iter().map(|bug| format!("{bug:?}")).collect();
                let mut sorted: Vec<&String> = names.iter().collect();
                sorted.sort();
                assert!(table($start).keys().eq(sorted), "docs/simulation.md");
            }
        }
    };
}

planted! {
    node, run, NODE, Bug::ALL,
    drop_durability: DropDurability,
    skip_fence: SkipFence,
    apply_out_of_order: ApplyOutOfOrder,
    ignore_crc: IgnoreCrc,
    forget_fence: ForgetFence,
    replay_other_epoch: ReplayOtherEpoch,
    believe_failed_swap: BelieveFailedSwap,
    ack_before_all: AckBeforeAll,
    free_before_swap: FreeBeforeSwap,
    reuse_before_reap: ReuseBeforeReap,
    skip_checksum_area_on_seal: SkipChecksumAreaOnSeal,
    checkpoint_not_exact: CheckpointNotExact,
    stale_shard_accepted: StaleShardAccepted,
    lose_trim_in_replay: LoseTrimInReplay,
    serve_before_lease: ServeBeforeLease,
    move_ignores_newer: MoveIgnoresNewer,
    parity_of_old_stripe: ParityOfOldStripe,
    fence_too_few: FenceTooFew,
    width_ignores_open_segments: WidthIgnoresOpenSegments,
    scrub_skips: ScrubSkips,
    never_avoids_slow: NeverAvoidsSlow,
    narrow_loses_parity: NarrowLosesParity,
    never_widens: NeverWidens,
    forget_cut: ForgetCut,
    repair_from_stale_shard: RepairFromStaleShard,
    miscount_live: MiscountLive,
    move_half: MoveHalf,
    merge_given_up: MergeGivenUp,
}

planted! {
    whole_cluster, cluster::run, CLUSTER, Bug::CLUSTER,
    skip_fence: SkipFence,
    serve_before_lease: ServeBeforeLease,
    drained_too_early: DrainedTooEarly,
    leaves_for_good: LeavesForGood,
    lease_from_answer: LeaseFromAnswer,
    stays_released: StaysReleased,
    far_return_untold: FarReturnUntold,
}
